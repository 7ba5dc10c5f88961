//! `doctor serve-gap` against a server that is our own target, and against ones that are not quite.

use std::sync::Arc;

use serde_json::Value;

use crate::fake_openai::{Fake, Protocol, Said};
use crate::generators::speaking;
use crate::support::{Home, repository, tiny_target};

const MAX_NEW_TOKENS: usize = 24;

/// The exit code and what was found, with a server that changes what the target says.
fn check(
    protocol: Protocol,
    change: impl Fn(&str, Said) -> Said + Send + Sync + 'static,
    more: &[&str],
) -> (i32, Value) {
    let target = Arc::new(tiny_target());
    let says = speaking(&target, MAX_NEW_TOKENS, target.target.config().max_position);
    let fake = Fake::start(protocol, move |prompt| change(prompt, says(prompt)), |_| None);
    let tiny = repository().join("fixtures/tiny-target");
    let workload = tiny.join("eval.jsonl").display().to_string();
    let tiny = tiny.display().to_string();
    let args =
        ["doctor", "serve-gap", fake.url(), "--target", &tiny, "--workload", &workload, "--limit", "6"];
    let tokens = MAX_NEW_TOKENS.to_string();
    let ended = Home::new().run(&[&args, ["--max-new-tokens", &tokens, "--json"].as_slice(), more].concat());
    let found = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stderr));
    fake.take_prompts();
    (ended.code.unwrap(), found)
}

fn protocol() -> Protocol {
    Protocol { max_tokens: MAX_NEW_TOKENS as u64, ..Protocol::default() }
}

#[test]
fn an_engine_that_says_the_same_has_no_gap() {
    for api in ["text", "ids", "chat"] {
        let (code, found) =
            check(Protocol { api, metrics: api == "ids", ..protocol() }, |_, said| said, &["--api", api]);
        assert_eq!((code, &found["same"], &found["rows"]), (0, &6.into(), &6.into()), "{found}");
        let theirs = &found["theirs"];
        if api == "ids" {
            assert_eq!(theirs["rate_at"], serde_json::json!([0.6, 0.2]), "{found}");
            assert_eq!((&theirs["accept_len"], &theirs["proposals"]), (&1.8.into(), &60.into()));
        } else {
            assert!(theirs.is_null(), "{found}");
        }
    }
}

#[test]
fn an_engine_that_chooses_another_token_is_named_with_row_and_token() {
    let change = |prompt: &str, said: Said| match prompt.contains("boxes") {
        true => Said {
            text: format!("{} zebra", said.text.chars().take(6).collect::<String>()),
            cut: false,
            ids: None,
        },
        false => said,
    };
    let (code, found) = check(protocol(), change, &[]);
    assert_eq!(code, 1, "{found}");
    let differences = found["differences"].as_array().unwrap();
    assert!(!differences.is_empty() && differences.len() < 6, "{found}");
    let first = &differences[0];
    assert!(first["margin"].as_f64().unwrap() > 0.5 && first["ours"] != first["theirs"], "{found}");
    let what = found["findings"][0]["what"].as_str().unwrap();
    assert!(what.starts_with("target: at token ") && what.contains(first["id"].as_str().unwrap()), "{what}");
}

#[test]
fn an_engine_that_stops_early_is_named_by_its_end() {
    let change = |_: &str, said: Said| Said {
        text: said.text.split(' ').next().unwrap().into(),
        cut: false,
        ids: None,
    };
    let (code, found) = check(protocol(), change, &[]);
    assert_eq!(code, 1, "{found}");
    let ends = found["differences"].as_array().unwrap().iter().filter(|d| d["theirs"] == "<|im_end|>");
    assert!(ends.count() > 0, "{found}");
}

#[test]
fn an_engine_that_reads_another_prompt_is_named_before_anything_else() {
    let (code, found) = check(Protocol { more_prompt_tokens: 3, ..protocol() }, |_, said| said, &[]);
    assert_eq!(code, 1, "{found}");
    assert_eq!(found["prompt"]["theirs"].as_u64(), found["prompt"]["ours"].as_u64().map(|n| n + 3));
    assert!(found["findings"][0]["what"].as_str().unwrap().starts_with("template: "), "{found}");
}

#[test]
fn arguments_that_cannot_be_are_told() {
    let home = Home::new();
    let file = home.write("w.jsonl", "{\"id\": \"a\", \"turns\": [\"b\"]}\n").display().to_string();
    let base = ["doctor", "serve-gap", "localhost:8000", "--target", "none", "--workload", &file];
    insta::assert_snapshot!(home.run(&base).stderr);
    let extra =
        ["doctor", "serve-gap", "http://localhost/v1", "--target", "x", "--workload", &file, "--extra", "3"];
    insta::assert_snapshot!(home.run(&extra).stderr);
    insta::assert_snapshot!(home.run(&["doctor", "serve-gap", "http://localhost/v1"]).stderr);
}
