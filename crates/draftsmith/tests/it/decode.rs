//! `generate` and `bench` on the tiny target.

use crate::support::{Home, repository};

fn tiny() -> String {
    repository().join("fixtures/tiny-target").display().to_string()
}

#[test]
fn the_answer_is_the_one_that_the_reference_gave() {
    let expected = std::fs::read_to_string(repository().join("fixtures/tiny-target/expected.jsonl")).unwrap();
    let home = Home::new();
    for line in expected.lines().take(3) {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let ids: Vec<String> =
            row["prompt_token_ids"].as_array().unwrap().iter().map(|id| id.to_string()).collect();
        let answer = home
            .run(&[
                "generate",
                "--target",
                &tiny(),
                "--prompt-ids",
                &ids.join(","),
                "--max-new-tokens",
                "64",
                "--json",
            ])
            .json();
        let (eos, reference) = (row["eos_at"].as_u64(), row["token_ids"].as_array().unwrap());
        let wanted = &reference[..eos.map_or(reference.len(), |e| e as usize + 1)];
        assert_eq!(answer["token_ids"].as_array().unwrap(), wanted, "{}", row["id"]);
        assert_eq!(answer["finish_reason"], if eos.is_some() { "stop" } else { "length" });
        assert_eq!(answer["accept_len"], serde_json::Value::Null, "nothing was drafted");
    }
}

#[test]
fn a_seed_gives_the_same_text_and_another_seed_another() {
    let home = Home::new();
    let text = |seed: &str| {
        home.run(&[
            "generate",
            "--target",
            &tiny(),
            "--prompt",
            "Tell me a short story about a cow.",
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--max-new-tokens",
            "40",
            "--json",
        ])
        .json()["text"]
            .clone()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn messages_come_from_a_file_and_wrong_ones_are_named() {
    let home = Home::new();
    home.write("chat.json", r#"{"messages":[{"role":"user","content":"Calculate 1 + 1."}]}"#);
    let by_file = home.run(&["generate", "--target", &tiny(), "--messages", "chat.json", "--json"]).json();
    let by_flag =
        home.run(&["generate", "--target", &tiny(), "--prompt", "Calculate 1 + 1.", "--json"]).json();
    assert_eq!(by_file["token_ids"], by_flag["token_ids"]);
    home.write("bad.json", r#"[{"content":"a"}]"#);
    insta::assert_snapshot!(home.snapshot(&["generate", "--target", &tiny(), "--messages", "bad.json"]));
    home.write("bad.json", "[");
    insta::assert_snapshot!(home.snapshot(&["generate", "--target", &tiny(), "--messages", "bad.json"]));
}

#[test]
fn prompts_that_cannot_be_decoded_are_named() {
    let home = Home::new();
    insta::assert_snapshot!(home.snapshot(&["generate", "--target", &tiny(), "--prompt-ids", "1,5000"]));
    let long = vec!["1"; 2000].join(",");
    let ended = home.run(&["generate", "--target", &tiny(), "--prompt-ids", &long]);
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 2), "{}", ended.stderr);
    insta::assert_snapshot!(home.snapshot(&[
        "generate",
        "--target",
        &tiny(),
        "--prompt",
        "a",
        "--temperature=-1"
    ]));
    insta::assert_snapshot!(home.snapshot(&["generate", "--target", &tiny()]));
    insta::assert_snapshot!(home.snapshot(&["generate", "--target", &tiny(), "--prompt", "a", "--prove"]));
}

#[test]
fn the_cost_of_a_pass_is_measured_for_every_width() {
    let home = Home::new();
    let report = home.run(&["bench", "kernels", "--target", &tiny(), "--json"]).json();
    for m in ["1", "2", "4", "8", "16", "32"] {
        assert!(report["t_ms"][m].as_f64().is_some_and(|t| t > 0.0), "{m} in {report}");
    }
    assert!(report["prefill_tokens_per_s"].as_f64().is_some_and(|r| r > 0.0));
    assert!(report["decode_tokens_per_s"].as_f64().is_some_and(|r| r > 0.0));
}

#[test]
fn real_model_quickstart_proves_that_the_texts_are_equal() {
    let target = std::env::var("DRAFTSMITH_TEST_TARGET").expect(
        "set DRAFTSMITH_TEST_TARGET to SmolLM2-135M-Instruct.Q4_1.gguf (`draftsmith pull` prints its path)",
    );
    let home = Home::new();
    let output = home
        .command(&["quickstart", "--target", &target, "--max-new-tokens", "32", "--json"])
        .current_dir(repository())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["identical"], true, "{value}");
    assert!(value["accept_len"].as_f64().is_some_and(|a| a > 1.0), "{value}");
}
