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
fn repetitions_of_the_text_are_drafted_without_a_bundle_and_change_nothing() {
    let home = Home::new();
    let answer = |more: &[&str]| {
        let mut args = vec!["generate", "--target"];
        let tiny = tiny();
        args.extend([tiny.as_str(), "--prompt", "Calculate 22 + 20.", "--max-new-tokens", "60", "--json"]);
        args.extend(more);
        home.run(&args).json()
    };
    let (plain, auto) = (answer(&[]), answer(&["--auto", "--prove"]));
    assert_eq!(plain["token_ids"], auto["token_ids"]);
    assert_eq!(auto["identical"], true);
    assert!(auto["accept_len"].as_f64().is_some_and(|a| a >= 1.0), "{auto}");
    // Costs were measured once and are kept.
    let kept: Vec<_> = std::fs::read_dir(home.path().join(".cache/draftsmith/costs")).unwrap().collect();
    assert_eq!(kept.len(), 1);
}

#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let home = Home::new();
    let answer = |more: &[&str]| {
        let mut args = vec!["generate", "--target"];
        let tiny = tiny();
        args.extend([tiny.as_str(), "--prompt", "Tell me a short story about a cow.", "--json"]);
        args.extend(more);
        home.run(&args).json()
    };
    let whole = answer(&[])["text"].as_str().unwrap().to_owned();
    let stop = whole.split_whitespace().nth(3).expect("a story has words").to_owned();
    let cut = answer(&["--stop", &stop]);
    assert_eq!(cut["text"].as_str(), whole.split_once(&stop).map(|(before, _)| before));
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn every_way_to_decode_gives_one_text_and_a_peer_refuses_a_folder() {
    let home = Home::new();
    home.write(
        "prompts.jsonl",
        "{\"id\":\"a\",\"turns\":[\"Calculate 22 + 20.\"]}\n{\"id\":\"b\",\"turns\":[\"Why?\"]}\n",
    );
    let tiny = tiny();
    let identity = ["bench", "identity", "--target", &tiny, "--workload", "prompts.jsonl", "--json"];
    let output = home.run(&identity).json();
    assert_eq!(output["identical"], true);
    assert_eq!(output["prompts"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        output["ways"].as_array().map(Vec::len),
        Some(8),
        "two ways, alone and batched, 1 and 2 threads"
    );
    let decode = ["bench", "decode", "--target", &tiny, "--workload", "prompts.jsonl", "--new-tokens", "8"];
    let report =
        home.run(&[&decode[..], &["--batch", "4", "--prefill-tokens", "32", "--json"]].concat()).json();
    assert!(report["sides"][0]["decode_tokens_per_s"]["value"].as_f64().is_some_and(|r| r > 0.0), "{report}");
    assert_eq!(report["batch"]["sequences"], 4);
    let missing = [&decode[..], &["--peer", "llama-cpp-python", "--peer-python", "no-such-python"]].concat();
    insta::assert_snapshot!(home.snapshot(&missing));
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

fn real_target() -> String {
    std::env::var("DRAFTSMITH_TEST_TARGET").expect(
        "set DRAFTSMITH_TEST_TARGET to SmolLM2-135M-Instruct.Q4_1.gguf (`draftsmith pull` prints its path)",
    )
}

#[test]
fn real_model_every_way_to_decode_gives_one_text() {
    let home = Home::new();
    let root = repository();
    let path = |name: &str| root.join(name).display().to_string();
    let (target, bundle, workload) =
        (real_target(), path("bundles/smollm2-135m-instruct-eagle3"), path("recipes/data/eval/gsm8k.jsonl"));
    let output = home
        .run(&[
            "bench",
            "identity",
            "--target",
            &target,
            "--bundle",
            &bundle,
            "--workload",
            &workload,
            "--limit",
            "9",
            "--new-tokens",
            "12",
            "--json",
        ])
        .json();
    assert_eq!(output["identical"], true, "{output}");
    assert_eq!(output["prompts"].as_array().map(Vec::len), Some(9), "more than a batch");
    assert_eq!(output["ways"].as_array().map(Vec::len), Some(24), "{output}");
}

#[test]
fn real_model_a_peer_that_is_not_there_is_named() {
    let home = Home::new();
    home.write("prompts.jsonl", "{\"id\":\"a\",\"turns\":[\"Why?\"]}\n");
    let target = real_target();
    let ended = home.run(&[
        "bench",
        "decode",
        "--target",
        &target,
        "--workload",
        "prompts.jsonl",
        "--new-tokens",
        "2",
        "--peer",
        "llama-cpp-python",
        "--peer-python",
        "no-such-python",
    ]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("llama-cpp-python does not run in `no-such-python`"), "{}", ended.stderr);
    assert!(ended.stderr.contains("bench/peers/install-llama-cpp-python.sh"), "{}", ended.stderr);
}

#[test]
fn real_model_quickstart_proves_that_the_texts_are_equal() {
    let target = real_target();
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

#[test]
fn rules_that_draw_refuse_what_does_not_fit_them() {
    let home = Home::new();
    let start = ["generate", "--target", &tiny(), "--prompt", "Hi", "--max-new-tokens", "4"];
    for (more, said, hint) in [
        (
            &["--verify", "block", "--temperature", "0.8", "--auto", "--prove"][..],
            "`--verify block` needs a chain that the draft draws, and `--auto` takes its best tokens",
            "give `--depth D` instead of `--auto`",
        ),
        (
            &["--verify", "rejection", "--temperature", "0.8", "--prove"],
            "`--prove` compares texts token by token, and `--verify rejection` draws another one",
            "`--verify seeded` is the rule that gives the same text",
        ),
        (
            &["--verify", "rejection"],
            "`--verify rejection` draws tokens, and `--temperature 0` draws none",
            "give a temperature above 0",
        ),
    ] {
        let run = home.run(&[&start[..], more].concat());
        assert_eq!(run.code, Some(2), "{}", run.stderr);
        assert!(run.stderr.contains(said) && run.stderr.contains(hint), "{}", run.stderr);
    }
    // Without a draft nothing is verified: the rule changes nothing.
    let text = |more: &[&str]| {
        let sampled = ["--temperature", "0.8", "--seed", "3", "--json"];
        home.run(&[&start[..], &sampled, more].concat()).json()["token_ids"].clone()
    };
    assert_eq!(text(&["--verify", "block"]), text(&[]));
}
