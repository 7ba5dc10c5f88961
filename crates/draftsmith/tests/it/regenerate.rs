//! Stage `regenerate`: through a server that fails in every way it can, killed at random moments, and asked again with
//! other keys.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fake_openai::{Fake, Fault, Protocol, Said, hash};
use crate::stages::{bytes, finish, kill_when};
use crate::support::{Ended, Home, repository};

pub(crate) fn arguments(dir: &Path, more: &[&str]) -> Vec<String> {
    let mut args = vec!["regenerate".to_string(), "recipes/smoke.toml".to_string()];
    args.push(format!("run.dir={}", dir.display()));
    args.push("regenerate.max_new_tokens=32".to_string());
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

fn spawn(home: &Home, dir: &Path, more: &[&str]) -> Child {
    home.spawn(&arguments(dir, more))
}

fn end(home: &Home, dir: &Path, more: &[&str]) -> Ended {
    Ended::from(spawn(home, dir, more).wait_with_output().unwrap())
}

/// Lines of the log of answers, by id; fails if one is there twice.
#[track_caller]
pub(crate) fn answers(dir: &Path) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(dir.join("regenerate/answers.jsonl")).unwrap();
    let mut by_id = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let id = line["id"].as_str().unwrap().to_string();
        assert!(by_id.insert(id.clone(), line).is_none(), "`{id}` is there twice");
    }
    by_id
}

fn report(dir: &Path) -> Value {
    serde_json::from_slice(&bytes(dir.join("regenerate/report.json"))).unwrap()
}

/// An answer that depends on the prompt alone: now and then empty, a loop or cut.
pub(crate) fn speak(prompt: &str) -> Said {
    let n = hash(prompt);
    match n % 16 {
        0 => Said::default(),
        1 => Said { text: " again".repeat(40), cut: true, ids: None },
        2 => Said { text: format!("The answer is a long one, number {n}, and then"), cut: true, ids: None },
        _ => {
            Said { text: format!(" It is {n}.\nThat is é all of “{}”.", n % 97), cut: false, ids: None }
        }
    }
}

/// All kinds of faults, a quarter of all requests.
pub(crate) fn trouble(seed: u64) -> impl Fn(u64) -> Option<Fault> + Send + Sync {
    move |nth| {
        let n = hash(&format!("{seed} {nth}"));
        let faults = [
            Fault::Silence(Duration::from_millis(1500)),
            Fault::Busy,
            Fault::Status(500),
            Fault::Status(503),
            Fault::Cut,
            Fault::EndsEarly,
            Fault::Hangup,
            Fault::NoJson,
            Fault::Html,
            Fault::Huge,
            Fault::EmptyChoices,
            Fault::ErrorInside,
        ];
        n.is_multiple_of(4).then(|| faults[(n / 4) as usize % faults.len()])
    }
}

#[test]
fn two_hundred_rows_under_all_faults_lose_and_double_none_and_keep_their_order() {
    let home = Home::new();
    let rows = ["regenerate.max_rows=200", "regenerate.server.timeout_s=1"];
    let run = |name: &str, fake: &Fake, batch: &str| {
        let dir = home.path().join(name);
        let url = format!("regenerate.server.url={}", fake.url());
        let batch = format!("regenerate.batch_size={batch}");
        let more = [rows.as_slice(), &[&url, &batch]].concat();
        let said = finish(spawn(&home, &dir, &more));
        (dir, said)
    };
    let calm = Fake::start(Protocol::default(), speak, |_| None);
    let (whole, _) = run("calm", &calm, "3");
    let asked = calm.take_prompts().len();
    let fake = Fake::start(Protocol::default(), speak, trouble(1));
    let (dir, said) = run("trouble", &fake, "24");
    let faults: u64 = fake.faults().values().sum();
    assert!(fake.faults().len() == 12 && faults >= 50, "{:?}", fake.faults());
    assert_eq!(fake.take_prompts().len() as u64, asked as u64 + faults, "one repetition per fault");
    assert!(said.contains("of them failed: "), "{said}");
    assert_eq!(answers(&dir), answers(&whole));
    for file in ["train.tokens", "validation.jsonl"] {
        let of = |dir: &Path| bytes(dir.join("regenerate").join(file));
        assert_eq!(of(&dir), of(&whole), "{file} differs");
    }
    // 200 rows and the 40 that are held out.
    assert_eq!(answers(&whole).len(), 240);
}

#[test]
fn every_way_to_send_a_prompt_keeps_to_the_protocol_and_gives_the_same_rows() {
    let mut home = Home::new();
    home.set("MY_KEY", "sesame");
    let extra: BTreeMap<&str, Value> = [("repetition_penalty", json!(1.0)), ("top_k", json!(0))].into();
    let mut first = None;
    for (api, usage_in_streams) in [("text", true), ("ids", false), ("chat", true)] {
        let (key, extra) = (Some("sesame"), extra.clone());
        let fake =
            Fake::start(Protocol { api, key, extra, usage_in_streams, ..Protocol::default() }, speak, |_| {
                None
            });
        let dir = home.path().join(api);
        let more = [
            format!("regenerate.server.url={}/", fake.url()),
            format!("regenerate.server.api={api}"),
            "regenerate.server.key_env=MY_KEY".to_string(),
            "regenerate.server.extra={ repetition_penalty = 1.0, top_k = 0 }".to_string(),
            "regenerate.max_rows=40".to_string(),
        ];
        finish(spawn(&home, &dir, &more.each_ref().map(String::as_str)));
        assert!(!fake.take_prompts().is_empty());
        let tokens = bytes(dir.join("regenerate/train.tokens"));
        assert_eq!(*first.get_or_insert(tokens.clone()), tokens, "{api}");
    }
}

#[test]
fn a_server_that_reads_another_prompt_or_takes_no_request_is_named_with_a_way_out() {
    let mut home = Home::new();
    home.set("MY_KEY", "sesame");
    let check = |protocol: Protocol, more: &[&str], fail: Option<Fault>| {
        let fake = Fake::start(protocol, speak, move |_| fail);
        let url = format!("regenerate.server.url={}", fake.url());
        let ended = end(
            &home,
            &home.path().join("run"),
            &[&["--quiet", &url, "regenerate.max_rows=3"], more].concat(),
        );
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        ended.stderr.replace(fake.url(), "[URL]")
    };
    let protocol = Protocol::default;
    insta::assert_snapshot!(check(Protocol { more_prompt_tokens: 1, ..protocol() }, &[], None));
    insta::assert_snapshot!(check(Protocol { models: vec!["a", "b"], ..protocol() }, &[], None));
    insta::assert_snapshot!(check(Protocol { models: vec![], ..protocol() }, &[], None));
    insta::assert_snapshot!(check(Protocol { key: Some("open"), ..protocol() }, &[], None));
    let key = "regenerate.server.key_env=MY_KEY";
    let refused = check(Protocol { key: Some("open"), ..protocol() }, &[key], None);
    assert!(!refused.contains("sesame"), "{refused}");
    insta::assert_snapshot!(refused);
    insta::assert_snapshot!(check(protocol(), &["regenerate.server.key_env=NO_SUCH_KEY"], None));
    insta::assert_snapshot!(check(protocol(), &["regenerate.server.extra={ best_of = 3 }"], None));
    let retries = ["regenerate.server.retries=1", "regenerate.batch_size=1"];
    insta::assert_snapshot!(check(protocol(), &retries, Some(Fault::Status(503))));
    let redirect = Some(Fault::Status(308));
    insta::assert_snapshot!(check(protocol(), &retries, redirect));
    let nobody = end(
        &home,
        &home.path().join("run"),
        &["--quiet", "regenerate.server.url=http://127.0.0.1:9/v1", "regenerate.server.retries=0"],
    );
    insta::assert_snapshot!(nobody.stderr);
    let offline = end(
        &home,
        &home.path().join("run"),
        &["--offline", "--quiet", "regenerate.server.url=http://192.0.2.1/v1"],
    );
    insta::assert_snapshot!(offline.stderr);
}

#[test]
fn a_server_that_gives_up_for_good_stops_the_run_and_the_next_call_asks_only_what_is_missing() {
    let home = Home::new();
    let dir = home.path().join("run");
    // After 60 answers every request fails.
    let dying = Fake::start(Protocol::default(), speak, |nth| (nth >= 60).then_some(Fault::Status(500)));
    let more = |fake: &Fake| {
        [
            format!("regenerate.server.url={}", fake.url()),
            "regenerate.max_rows=50".into(),
            "regenerate.server.retries=1".into(),
        ]
    };
    let ended = end(&home, &dir, &more(&dying).each_ref().map(String::as_str));
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("(attempts: 2)"), "{}", ended.stderr);
    // 50 rows and 40 held out; some have two turns.
    let there = answers(&dir).len();
    assert!((40..60).contains(&there), "{there}");
    let well = Fake::start(Protocol::default(), speak, |_| None);
    finish(spawn(&home, &dir, &more(&well).each_ref().map(String::as_str)));
    assert_eq!(answers(&dir).len(), 90);
    let rows: std::collections::BTreeSet<String> = well.take_prompts().into_iter().collect();
    assert!(rows.len() >= 90 - there && rows.len() < 90, "{}", rows.len());
}

#[test]
fn answers_whose_own_inputs_did_not_change_are_kept() {
    let home = Home::new();
    let dir = home.path().join("run");
    let fake = Fake::start(Protocol { sampled: (0.5, 0.95), ..Protocol::default() }, speak, |_| None);
    let url = format!("regenerate.server.url={}", fake.url());
    let asked = |more: &[&str]| {
        let said =
            finish(spawn(&home, &dir, &[&[url.as_str(), "regenerate.temperature=0.5"], more].concat()));
        let first_turns = |p: &String| {
            !p.contains("<|im_start|>assistant\n ") && p.matches("<|im_start|>assistant").count() == 1
        };
        (fake.take_prompts().iter().filter(|p| first_turns(p)).count(), said)
    };
    assert_eq!(asked(&["regenerate.max_rows=30"]).0, 70, "30 rows, 40 held out");
    let (more_rows, said) = asked(&["regenerate.max_rows=50"]);
    assert_eq!(more_rows, 20, "{said}");
    assert!(said.contains("30 of 50 answers are there already"), "{said}");
    assert_eq!(asked(&["regenerate.max_rows=20"]).0, 0);
    assert_eq!(asked(&["regenerate.max_rows=50", "regenerate.max_tokens=200"]).0, 0);
    assert_eq!(asked(&["regenerate.max_rows=50", "data.max_length=200", "regenerate.max_loop_share=1"]).0, 0);
    let sampled = answers(&dir).values().filter(|line| line["greedy"] == false).count();
    assert!((10..50).contains(&sampled), "{sampled}");
    assert_eq!(asked(&["regenerate.max_rows=50", "regenerate.top_p=0.95", "run.threads=1"]).0, 0);
    // What is greedy does not depend on the seed of the others, but which rows are does.
    assert_eq!(asked(&["regenerate.max_rows=50", "regenerate.max_new_tokens=30"]).0, 90);
    assert_eq!(asked(&["regenerate.max_rows=50"]).0, 0, "the older answers are still there");
}

#[test]
fn loops_and_empty_answers_are_left_out_and_their_shares_can_be_raised() {
    let home = Home::new();
    let fake = Fake::start(Protocol::default(), speak, |_| None);
    let url = format!("regenerate.server.url={}", fake.url());
    let run = |name: &str, more: &[&str]| {
        let dir = home.path().join(name);
        finish(spawn(&home, &dir, &[&[url.as_str(), "regenerate.max_rows=200"], more].concat()));
        let lines = bytes(dir.join("regenerate/validation.jsonl"));
        (report(&dir), String::from_utf8(lines).unwrap())
    };
    let (none, validation) = run("none", &[]);
    let count = |report: &Value, key: &str| report["answers"][key].as_u64().unwrap();
    let (empty, looping, cut) = (count(&none, "empty"), count(&none, "looping"), count(&none, "cut"));
    assert!(empty > 3 && looping > 3 && cut > 3, "{none}");
    assert_eq!(count(&none, "left_out"), empty + looping);
    assert_eq!(count(&none, "dialogues"), 200);
    let domains = none["domains"].as_object().unwrap();
    assert!(domains.len() > 1);
    let sum: u64 = domains.values().map(|d| d["generated_tokens"].as_u64().unwrap()).sum();
    assert_eq!(sum, count(&none, "generated_tokens"));
    assert!(!validation.contains(" again again") && validation.lines().count() > 20);

    let (some, _) = run("some", &["regenerate.max_loop_share=0.01"]);
    assert_eq!(count(&some, "left_out"), empty + looping - 2, "2 of 200 may stay");
    let (all, validation) = run("all", &["regenerate.max_loop_share=1"]);
    assert_eq!(count(&all, "left_out"), empty);
    assert!(validation.contains(" again again"));
    let (no_cuts, _) = run("no-cuts", &["regenerate.max_cut_share=0"]);
    assert_eq!(count(&no_cuts, "left_out"), empty + looping + cut);
    let trained = |report: &Value| report["rows"]["trained_tokens"].as_u64().unwrap();
    assert!(
        trained(&no_cuts) < trained(&none)
            && trained(&none) < trained(&some)
            && trained(&some) < trained(&all)
    );
}

#[test]
fn what_is_held_out_is_never_trained_on() {
    let home = Home::new();
    let dir = home.path().join("run");
    let fake = Fake::start(Protocol::default(), speak, |_| None);
    let url = format!("regenerate.server.url={}", fake.url());
    // The validation file holds the very rows that are trained on, at first.
    let text =
        std::fs::read_to_string(repository().join("fixtures/tiny-target/prompts-train.jsonl")).unwrap();
    let held: Vec<&str> = text.lines().take(30).collect();
    let file = home.write("held.jsonl", held.join("\n"));
    let more = [url, format!("data.validation={}", file.display())];
    finish(spawn(&home, &dir, &more.each_ref().map(String::as_str)));
    let users = |name: &str| -> std::collections::BTreeSet<String> {
        let text = std::fs::read_to_string(dir.join(name)).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.map(|row| {
            row["messages"].as_array().unwrap().iter().find(|m| m["role"] == "user").unwrap()["content"]
                .to_string()
        })
        .collect()
    };
    let (train, held) = (users("data/conversations.jsonl"), users("data/validation.jsonl"));
    assert!(train.len() > 300 && held.len() > 20);
    assert!(users("regenerate/validation.jsonl").is_subset(&held));
    let shared: Vec<_> = train.intersection(&held).collect();
    assert!(shared.is_empty(), "{shared:?}");
    let none = end(&home, &dir, &["data.validation_rows=0", "validate.every=0"]);
    assert_eq!(none.code, Some(0), "a file holds rows out: {}", none.stderr);
}

#[test]
fn ten_kills_at_random_moments_give_the_rows_of_an_undisturbed_run() {
    let home = Home::new();
    let keys = ["regenerate.temperature=0", "regenerate.max_new_tokens=64", "run.threads=1"];
    let whole = home.path().join("whole");
    let began = Instant::now();
    finish(spawn(&home, &whole, &keys));
    let took = began.elapsed();
    let lines = |dir: &Path| {
        std::fs::read_to_string(dir.join("regenerate/answers.jsonl")).map_or(0, |text| text.lines().count())
    };
    let (mut kills, mut in_the_stage, mut round, mut draws) = (0, 0, 0, hash(&format!("{began:?}")));
    while kills < 10 {
        let dir = home.path().join(format!("killed{round}"));
        round += 1;
        loop {
            draws = draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let wait = took.mul_f64(0.4 * (draws >> 11) as f64 / (1u64 << 53) as f64);
            let start = Instant::now();
            let before = lines(&dir);
            let killed = kills < 10 && kill_when(spawn(&home, &dir, &keys), || start.elapsed() >= wait);
            if !killed {
                break;
            }
            kills += 1;
            in_the_stage += u32::from(lines(&dir) > before);
        }
        // Whatever is left after the tenth kill, or nothing if the run ended before it.
        finish(spawn(&home, &dir, &keys));
        assert_eq!(answers(&dir), answers(&whole));
        for file in ["train.tokens", "validation.jsonl"] {
            let of = |dir: &Path| bytes(dir.join("regenerate").join(file));
            assert_eq!(of(&dir), of(&whole), "{file} differs after {kills} kills");
        }
    }
    assert!(in_the_stage >= 3, "only {in_the_stage} of 10 kills fell between two answers of one call");
}

#[test]
fn a_kill_while_a_server_answers_loses_and_doubles_nothing() {
    let home = Home::new();
    let dir = home.path().join("run");
    let fake = Fake::start(Protocol::default(), speak, trouble(7));
    let more = [
        format!("regenerate.server.url={}", fake.url()),
        "regenerate.max_rows=100".into(),
        "regenerate.server.timeout_s=1".into(),
    ];
    let more = more.each_ref().map(String::as_str);
    for wanted in [20, 70, 110] {
        let lines = || {
            std::fs::read_to_string(dir.join("regenerate/answers.jsonl"))
                .map_or(0, |text| text.lines().count())
        };
        assert!(
            kill_when(spawn(&home, &dir, &more), || lines() >= wanted),
            "the run ended before it was killed"
        );
    }
    finish(spawn(&home, &dir, &more));
    assert_eq!(answers(&dir).len(), 140);
}
