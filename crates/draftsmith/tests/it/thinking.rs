//! Stage `regenerate` with the templates of reasoning models: trained tokens are the generated ones, all of them, in the
//! rows and in every table; what cannot be asked is refused before anything is.

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith::formats::tokens::TokenFile;
use serde_json::{Value, json};

use crate::fake_openai::{Fake, Ids, Protocol, Said, hash, tiny_text};
use crate::support::{Home, repository};

const TEMPLATES: [&str; 4] = ["opens_and_strips", "opens_and_shows", "hybrid", "strips"];

fn home(name: &str, rows: &[Value]) -> Home {
    let home = Home::new();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    home.write("rows.jsonl", lines.join("\n") + "\n");
    let template = repository().join(format!("fixtures/thinking/{name}.jinja"));
    let template = std::fs::read_to_string(template).unwrap_or_else(|_| name.to_string());
    home.write("t.jinja", template);
    home.write(
        "run.toml",
        format!(
            "[run]\nname = \"t\"\ndir = \"out\"\nthreads = 1\n[target]\nsource = \"{}\"\n[bundle]\nlicense = \"MIT\"\n\
             [validate]\nevery = 0\n[data]\nvalidation_rows = 2\nmax_length = 512\ntemplate = \"t.jinja\"\n\
             sources = [{{ path = \"rows.jsonl\" }}]\n[regenerate]\nmax_new_tokens = 12\n",
            repository().join("fixtures/tiny-target").display()
        ),
    );
    home
}

fn prompts(count: usize) -> Vec<Value> {
    (0..count)
        .map(|i| {
            let first = format!("Calculate {} + {}.", i * 7 % 30, i + 2);
            let mut turns = vec![json!({ "role": "user", "content": first })];
            if i % 3 == 0 {
                turns.push(json!({ "role": "user", "content": format!("Tell me a story about {i} cats.") }));
            }
            json!({ "messages": turns })
        })
        .collect()
}

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Lines of a JSONL file by id.
fn lines(path: impl AsRef<Path>) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| (line["id"].as_str().unwrap().to_string(), line))
        .collect()
}

/// Trained tokens per conversation in the token file, of which those of each run, in order.
fn trained(out: &Path) -> BTreeMap<String, Vec<u32>> {
    let file = TokenFile::open(out.join("regenerate/train.tokens")).unwrap();
    let mut by_id: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for row in file.rows() {
        let id = row.id.split('#').next().unwrap().to_string();
        let ids = row.ids.iter().zip(row.loss_mask.iter()).filter(|(_, m)| **m).map(|(id, _)| *id);
        by_id.entry(id).or_default().extend(ids);
    }
    by_id
}

/// Generated tokens of a line of the log.
fn generated(line: &Value) -> Vec<u32> {
    let mut out = Vec::new();
    for row in line["rows"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        for answer in row["answers"].as_array().unwrap() {
            let [_, start, end]: [usize; 3] = serde_json::from_value(answer.clone()).unwrap();
            out.extend(&ids[start..end]);
        }
    }
    assert_eq!(out.len() as u64, line["generated_tokens"].as_u64().unwrap());
    out
}

#[track_caller]
fn check_report(report: &Value) {
    let total = &report["answers"];
    let n = |key: &str| total[key].as_u64().unwrap_or_else(|| panic!("{key} in {total}"));
    assert_eq!(n("generated_tokens"), n("trained_tokens") + n("left_out_tokens"), "{total}");
    let reasons: u64 =
        report["left_out_tokens"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(reasons, n("left_out_tokens"), "{report}");
    assert_eq!(report["rows"]["trained_tokens"], total["trained_tokens"]);
}

#[test]
fn trained_tokens_are_the_generated_ones_under_every_template() {
    for name in TEMPLATES {
        let home = home(name, &prompts(24));
        let done = home.run(&["--quiet", "regenerate", "run.toml"]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let out = home.path().join("out");
        let report = read(out.join("regenerate/report.json"));
        check_report(&report);
        assert!(report["answers"]["cut"].as_u64().unwrap() > 2, "{report}");
        let trained = trained(&out);
        let held = lines(out.join("regenerate/validation.jsonl"));
        let mut rows = 0;
        for (id, line) in lines(out.join("regenerate/answers.jsonl")) {
            if line["mark"] == "empty" || line["mark"] == "loop" {
                continue;
            }
            let written = generated(&line);
            let held: Vec<&Value> =
                held.iter().filter(|(key, _)| key.split('#').next() == Some(&id)).map(|(_, v)| v).collect();
            match held.is_empty() {
                true => assert_eq!(trained.get(&id), Some(&written), "{name}, {id}"),
                false => {
                    let ones: usize = held
                        .iter()
                        .flat_map(|row| row["loss_mask"].as_array().unwrap())
                        .filter(|m| **m == 1)
                        .count();
                    assert_eq!(ones, written.len(), "{name}, {id}: held out");
                }
            }
            rows += 1;
        }
        assert!(rows > 10, "{name}: {rows}");
    }
}

#[test]
fn rows_that_are_cut_to_the_length_limit_or_dropped_are_counted_token_by_token() {
    let home = home("opens_and_shows", &prompts(24));
    let run = |more: &[&str]| {
        let done = home.run(&[&["--quiet", "regenerate", "run.toml"], more].concat());
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let report = read(home.path().join("out/regenerate/report.json"));
        check_report(&report);
        let of = |key: &str| report["left_out_tokens"][key].as_u64().unwrap();
        (of("beyond_max_length"), of("dropped_rows"), report["answers"]["left_out_tokens"].as_u64().unwrap())
    };
    assert_eq!(run(&[]), (0, 0, 0));
    let (cut, dropped, all) = run(&["data.max_length=40"]);
    assert!(cut > 0 && all == cut + dropped);
    let (_, dropped, _) = run(&["data.min_trained_tokens=12"]);
    assert!(dropped > 0);
}

#[test]
fn a_template_that_refuses_a_conversation_does_so_before_anything_is_asked() {
    let refuses = "{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}\
        {% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}";
    let rows: Vec<Value> = ["yes", "no", "yes too", "say <|im_end|>", "yes again", "and yes", "more yes"]
        .map(|text| json!({ "messages": [{ "role": "user", "content": text }] }))
        .to_vec();
    let home = home(refuses, &rows);
    home.write("held.jsonl", json!({ "messages": [{ "role": "user", "content": "yes" }] }).to_string());
    let held = "data.validation=held.jsonl";
    let fake = Fake::start(Protocol { max_tokens: 12, ..Protocol::default() }, |_| Said::default(), |_| None);
    let url = format!("regenerate.server.url={}", fake.url());
    let strict = home.run(&["--quiet", "regenerate", "run.toml", held, &url]);
    assert_eq!(strict.code, Some(2), "{}", strict.stderr);
    assert!(
        strict.stderr.contains("chat template refuses the conversation: not that")
            || strict.stderr.contains("the text holds the control token `<|im_end|>`"),
        "{}",
        strict.stderr
    );
    assert!(fake.take_prompts().is_empty(), "nothing was asked");
    let done = home.run(&["--quiet", "regenerate", "run.toml", "data.strict=false", held]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let report = read(home.path().join("out/regenerate/report.json"));
    check_report(&report);
    // "yes" itself is held out.
    assert_eq!(report["answers"]["dialogues"], 4);
    assert_eq!(report["rows"]["dropped"]["template_refused"], 1);
    assert_eq!(report["rows"]["dropped"]["special_token_in_text"], 1);
    let always = "{{ raise_exception('never') }}";
    home.write("t.jinja", always);
    let none = home.run(&["--quiet", "regenerate", "run.toml", "data.strict=false", held, &url]);
    assert_eq!(none.code, Some(2), "{}", none.stderr);
    assert!(
        none.stderr.contains("no conversation can be asked (1 special_token_in_text, 5 template_refused)"),
        "{}",
        none.stderr
    );
    assert!(fake.take_prompts().is_empty(), "nothing was asked");
}

#[test]
fn a_template_that_refuses_the_second_turn_leaves_the_first_one() {
    let one_turn = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}\
        <|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n";
    let home = home(one_turn, &prompts(12));
    let done = home.run(&["regenerate", "run.toml"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("dialogues that the template did not let go on: "), "{}", done.stderr);
    let report = read(home.path().join("out/regenerate/report.json"));
    check_report(&report);
    assert!(report["answers"]["refused"].as_u64().unwrap() > 0);
}

#[test]
fn answers_of_an_earlier_version_are_asked_for_again_and_that_is_said() {
    let home = home("opens_and_shows", &prompts(12));
    let run = || {
        let done = home.run(&["regenerate", "run.toml"]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        (done.stderr, std::fs::read(home.path().join("out/regenerate/train.tokens")).unwrap())
    };
    let (_, tokens) = run();
    let log = home.path().join("out/regenerate/answers.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    let old: Vec<String> = text
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            if i % 2 == 0 {
                line.as_object_mut().unwrap().remove("rows");
            }
            line.to_string() + "\n"
        })
        .collect();
    std::fs::write(&log, old.concat()).unwrap();
    std::fs::remove_file(home.path().join("out/state/regenerate.json")).unwrap();
    let (said, again) = run();
    assert!(said.contains("6 answers in `answers.jsonl` were kept by an earlier version"), "{said}");
    assert_eq!(again, tokens);
    std::fs::remove_file(home.path().join("out/state/regenerate.json")).unwrap();
    let (said, _) = run();
    assert!(!said.contains("earlier version"), "{said}");
}

#[test]
fn a_token_file_that_another_hand_has_changed_is_refused() {
    let home = home("opens_and_shows", &prompts(12));
    let done = home.run(&["--quiet", "regenerate", "run.toml"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let other = home.run(&["--quiet", "regenerate", "run.toml", "run.dir=other", "regenerate.max_rows=5"]);
    assert_eq!(other.code, Some(0), "{}", other.stderr);
    let tokens = |dir: &str| home.path().join(dir).join("regenerate/train.tokens");
    std::fs::copy(tokens("other"), tokens("out")).unwrap();
    let capture = home.run(&["--quiet", "capture", "run.toml"]);
    assert_eq!(capture.code, Some(2), "{}", capture.stderr);
    assert!(capture.stderr.contains("train.tokens` trains "), "{}", capture.stderr);
    assert!(capture.stderr.contains("state/regenerate.json` and run again"), "{}", capture.stderr);
}

/// Writes each answer in an odd way: some of its tokens split.
fn speak(prompt: &str) -> Said {
    let n = hash(prompt) % 90;
    let text = format!("It is {n}.\n</think>\n\nThat is all.");
    let text_of = tiny_text();
    let tokenizer = &text_of.tokenizer;
    let mut ids = tokenizer.encode("It", false).unwrap();
    ids.extend(tokenizer.encode(" i", false).unwrap());
    ids.extend(tokenizer.encode("s ", false).unwrap());
    ids.extend(tokenizer.encode(&format!("{n}.\n</think>\n\nThat is all."), false).unwrap());
    ids.extend(tokenizer.token_to_id("<|im_end|>"));
    Said { text, cut: false, ids: Some(ids) }
}

#[test]
fn the_ids_of_a_server_are_used_and_where_it_gives_none_its_counts_are_compared() {
    let check = |ids: Ids, more_answer_tokens: i64, api: &'static str| {
        let home = home("opens_and_shows", &prompts(12));
        let protocol = Protocol { max_tokens: 12, ids, more_answer_tokens, api, ..Protocol::default() };
        // The fake renders chats by the target's own template, which is not ours here.
        let fake = Fake::start(protocol, speak, |_| None);
        let (url, api) =
            (format!("regenerate.server.url={}", fake.url()), format!("regenerate.server.api={api}"));
        let done = home.run(&["regenerate", "run.toml", "regenerate.max_new_tokens=12", &url, &api]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        fake.take_prompts();
        let out = home.path().join("out");
        let report = read(out.join("regenerate/report.json"));
        check_report(&report);
        let log = lines(out.join("regenerate/answers.jsonl"));
        let first = generated(log.values().next().unwrap());
        (report["answers"].clone(), first, done.stderr)
    };
    let odd = |ids: &[u32]| {
        let tokenizer = &tiny_text().tokenizer;
        assert_eq!(ids.last(), tokenizer.token_to_id("<|im_end|>").as_ref());
        tokenizer.encode(&tokenizer.decode(&ids[..ids.len() - 1], false), false).unwrap()
            != ids[..ids.len() - 1]
    };
    for api in ["text", "ids"] {
        let (answers, first, said) = check(Ids::Given, 0, api);
        assert!(odd(&first), "the ids that the model wrote");
        assert_eq!(answers["tokenised_here"], 0, "{said}");
    }
    for (ids, more) in
        [(Ids::Ignored, 0), (Ids::Refused, 0), (Ids::NotInStreams, 0), (Ids::Lossy, 0), (Ids::Given, 1)]
    {
        let (answers, first, said) = check(ids, more, "text");
        assert!(!odd(&first), "{ids:?}: the ids of the text");
        assert_eq!(answers["tokenised_here"], answers["answers"], "{ids:?}: {said}");
        // The odd way has more tokens than the usual one, and the counts say so.
        let differences = answers["count_differences"].as_object().unwrap();
        let sum: u64 = differences.values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(Some(sum), answers["answers"].as_u64(), "{ids:?}: {answers}");
        assert!(said.contains("; the server counted other tokens in "), "{ids:?}: {said}");
    }
}
