//! An ordinary model as draft, on the command line: `--draft-model`.

use serde_json::{Value, json};

use crate::serve::Served;
use crate::support::{Home, repository};

fn tiny() -> String {
    repository().join("fixtures/tiny-target").display().to_string()
}

/// A copy of the tiny target's folder whose tokenizer was changed.
fn other(home: &Home, name: &str, change: impl Fn(&mut Value)) -> String {
    let folder = repository().join("fixtures/tiny-target");
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"] {
        home.write(&format!("{name}/{file}"), std::fs::read(folder.join(file)).unwrap());
    }
    let text = std::fs::read_to_string(folder.join("tokenizer.json")).unwrap();
    let mut tokenizer = serde_json::from_str(&text).unwrap();
    change(&mut tokenizer);
    home.write(&format!("{name}/tokenizer.json"), tokenizer.to_string());
    home.path().join(name).display().to_string()
}

fn added(id: u64, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

#[test]
fn a_draft_model_is_proved_and_measured_like_a_bundle() {
    let (home, tiny) = (Home::new(), tiny());
    let prompt = ["generate", "--target", &tiny, "--prompt", "Calculate 22 + 20.", "--max-new-tokens", "24"];
    let plain = home.run(&[prompt.as_slice(), &["--json"]].concat()).json();
    for more in [&["--depth", "3"][..], &["--tree-top-k", "3"], &["--auto"], &[], &["--temperature", "0.8"]] {
        let with = [prompt.as_slice(), &["--draft-model", &tiny, "--prove", "--json"], more].concat();
        let answer = home.run(&with).json();
        assert_eq!(answer["identical"], true, "{more:?}");
        if more != ["--temperature", "0.8"] {
            assert_eq!(answer["text"], plain["text"], "{more:?}");
        }
    }
    // The target drafts for itself: every step commits all that it may.
    let exact = [prompt.as_slice(), &["--draft-model", &tiny, "--depth", "3", "--json", "--f32"]].concat();
    let found = home.run(&exact).json();
    let tokens = found["token_ids"].as_array().unwrap().len() - 1;
    let wanted = tokens as f64 / tokens.div_ceil(4) as f64;
    assert!((found["accept_len"].as_f64().unwrap() - wanted).abs() < 1e-9, "{found}");
    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    let own = ["--target", &tiny, "--draft-model", &tiny, "--workload", &workload, "--limit", "2"];
    let identity = [&["bench", "identity"][..], &own, &["--new-tokens", "12", "--json"]].concat();
    let identity = home.run(&identity).json();
    assert_eq!((&identity["identical"], identity["ways"].as_array().map(Vec::len)), (&json!(true), Some(24)));
    assert!(identity["draft_sha256"].is_string(), "{identity}");
    for verb in [&["bench"][..], &["bench", "tune"]] {
        let args = [verb, &own, &["--max-new-tokens", "8", "--json", "out.json"]].concat();
        let ended = home.run(&args);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let text = std::fs::read_to_string(home.path().join("out.json")).unwrap();
        assert!(text.contains("\"small\"") || verb.len() == 1, "{text}");
    }
    let decode = [&["bench", "decode"][..], &own, &["--new-tokens", "8", "--json", "out.json"]].concat();
    let ended = home.run(&decode);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let text = std::fs::read_to_string(home.path().join("out.json")).unwrap();
    assert!(text.contains("with draft"), "{text}");
}

#[test]
fn a_model_of_another_tokenizer_is_refused_by_its_first_id_and_padding_is_none() {
    let (home, tiny) = (Home::new(), tiny());
    let count = |tokenizer: &Value| {
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap().values().filter_map(Value::as_u64);
        let added = tokenizer["added_tokens"].as_array().unwrap().iter().filter_map(|t| t["id"].as_u64());
        vocab.chain(added).max().unwrap() + 1
    };
    let padded = other(&home, "padded", |t| {
        let id = count(t);
        t["added_tokens"].as_array_mut().unwrap().push(added(id, "[PAD1]"));
    });
    let prompt = ["generate", "--target", &tiny, "--prompt", "Calculate 22 + 20.", "--max-new-tokens", "12"];
    let ended =
        home.run(&[prompt.as_slice(), &["--draft-model", &padded, "--depth", "2", "--prove"]].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let longer = other(&home, "longer", |t| {
        let id = count(t);
        t["added_tokens"].as_array_mut().unwrap().push(added(id, "<|image|>"));
    });
    let ended = home.run(&[prompt.as_slice(), &["--draft-model", &longer]].concat());
    assert_eq!(ended.code, Some(2));
    let wanted = "error: draft model `longer` has another tokenizer than target `tiny-target`: id ";
    assert!(ended.stderr.contains(wanted), "{}", ended.stderr);
    let wanted =
        " is nothing in the target and `<|image|>` in the draft model\nhint: give a smaller model of";
    assert!(ended.stderr.contains(wanted), "{}", ended.stderr);
    let ended = home.run(&[prompt.as_slice(), &["--draft-model", "nowhere/model.gguf"]].concat());
    assert!(ended.code == Some(2) && ended.stderr.contains("nowhere/model.gguf"), "{}", ended.stderr);
    let both = [prompt.as_slice(), &["--draft-model", &tiny, "--bundle", "bundle"]].concat();
    let ended = home.run(&both);
    assert!(ended.code == Some(2) && ended.stderr.contains("cannot be used with"), "{}", ended.stderr);
    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    for verb in [&["bench"][..], &["bench", "tune"]] {
        let ended = home.run(&[verb, &["--draft-model", &tiny, "--workload", &workload]].concat());
        assert!(ended.code == Some(2) && ended.stderr.contains("--target <REF>"), "{}", ended.stderr);
        let ended = home.run(&[verb, &["--workload", &workload]].concat());
        assert!(ended.code == Some(2) && ended.stderr.contains("--bundle <BUNDLE>"), "{}", ended.stderr);
    }
}

#[test]
fn serve_names_a_draft_model_and_reads_it_anew() {
    let tiny = tiny();
    let served = Served::start(Home::new(), &["--draft-model", &tiny]);
    let state = served.wait_for(|state| state["has_draft"] == true);
    assert_eq!((&state["draft"]["name"], &state["draft"]["kind"]), (&json!("tiny-target"), &json!("small")));
    assert_eq!(served.counter("draftsmith:draft_info", "draft=\"tiny-target\",kind=\"small\""), 1.0);
    let ask = |draft: Value| {
        json!({"messages": [{"role": "user", "content": "Calculate 22 + 20."}], "max_tokens": 40, "temperature": 0,
            "draftsmith": {"draft": draft}})
    };
    let plain = served.text_of(&ask(json!("none")));
    for plan in [json!({"chain": 4}), json!({"tree": {"depth": 3, "top_k": 2, "nodes": 8}}), json!("auto")] {
        assert_eq!(served.text_of(&ask(plan)), plain);
    }
    assert!(served.counter("vllm:spec_decode_num_accepted_tokens_total", "") > 0.0);
    let (status, swapped) = served.post("/admin/draft", &json!({"bundle": tiny}));
    assert_eq!((status, &swapped["draft"]["kind"]), (200, &json!("small")), "{swapped}");
    assert_eq!(served.text_of(&ask(json!({"chain": 4}))), plain);
}

#[test]
fn a_measurement_without_a_draft_is_told_both_ways_to_name_one() {
    let home = Home::new();
    for verb in [&["bench"][..], &["bench", "tune"]] {
        let ended = home.run(&[verb, &["--workload", "w.jsonl"]].concat());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        let hint = ended.stderr.lines().find(|line| line.starts_with("hint: ")).unwrap_or_default();
        assert!(hint.contains("<--bundle <BUNDLE>|--draft-model <REF>>"), "{}", ended.stderr);
    }
}
