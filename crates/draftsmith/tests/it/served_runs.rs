//! What `serve` shows to people beside the API: runs of `--runs` from their folders, while they go on, and nothing outside;
//! generations of `--keep-generations`, to those who asked for them.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::bundles::with_bundle;
use crate::serve::Served;
use crate::support::{Home, repository};

/// A folder of runs with the run of the fixtures in it.
fn home() -> Home {
    let home = Home::new();
    copy(&repository().join("fixtures/run-folder-v1"), &home.path().join("runs/first"));
    home
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let place = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &place),
            false => drop(std::fs::copy(&path, &place).unwrap()),
        }
    }
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|run| run["name"].as_str().unwrap()).collect()
}

#[test]
fn a_run_is_shown_with_the_curves_of_its_log_while_that_grows() {
    let home = home();
    let log = home.path().join("runs/first/train/log.jsonl");
    let served = Served::start(home, &["--runs", "runs"]);
    let (status, list) = served.get("/api/runs");
    assert_eq!((status, names(&list)), (200, vec!["first"]));
    assert_eq!(
        (&list[0]["state"], &list[0]["step"], &list[0]["total_steps"]),
        (&json!("done"), &json!(1), &json!(1))
    );
    let (_, run) = served.get("/api/runs/first");
    assert_eq!((&run["method"], &run["best_accept_len"]), (&json!("eagle3"), &json!(1.0)));
    assert_eq!(run["errors"], json!([]));
    let states: Vec<&Value> = run["stages"].as_array().unwrap().iter().map(|stage| &stage["state"]).collect();
    assert!(!states.is_empty() && states.iter().all(|state| *state == "done"), "{run}");
    // No place of this machine is told.
    assert!(!run.to_string().contains(log.to_str().unwrap().trim_end_matches("/train/log.jsonl")), "{run}");

    // A line that another program broke, one of a later version, and one that is being written.
    let mut file = std::fs::OpenOptions::new().append(true).open(&log).unwrap();
    file.write_all(b"{\"event\":\"ste\n{\"event\":\"new\",\"step\":2}\n\xff\n").unwrap();
    file.write_all(
        b"{\"event\":\"step\",\"step\":2,\"total_steps\":4,\"loss\":null,\"acc\":[0.5,null],\"lr\":0.5}\n",
    )
    .unwrap();
    file.write_all(
        b"{\"event\":\"validation\",\"step\":2,\"accept_len\":1.5,\"low\":1.25,\"high\":1.75}\n{\"eve",
    )
    .unwrap();
    let (status, run) = served.get("/api/runs/first");
    let curve = &run["curve"];
    assert_eq!((status, &curve["unread_lines"], &curve["every"]), (200, &json!(3), &json!(1)));
    assert_eq!(
        curve["steps"][1],
        json!({"step": 2, "loss": null, "acc": [0.5, null], "lr": 0.5, "tokens_per_s": null})
    );
    let validation = &curve["validations"][1];
    assert_eq!(
        (&validation["accept_len"], &validation["low"], &validation["high"]),
        (&json!(1.5), &json!(1.25), &json!(1.75))
    );
    assert_eq!(
        (&run["step"], &run["total_steps"], &run["best_accept_len"]),
        (&json!(2), &json!(4), &json!(1.5))
    );
    file.write_all(b"nt\":\"step\",\"step\":3,\"loss\":1.0}\n").unwrap();
    assert_eq!(served.get("/api/runs/first").1["curve"]["steps"][2]["step"], 3);
}

#[test]
fn files_of_a_run_that_are_broken_are_told_and_the_rest_is_shown() {
    let home = home();
    home.write("runs/second/run.toml", "[target\n");
    home.write("runs/second/train/log.jsonl", "{\"event\":\"step\",\"step\":7,\"loss\":2.0}\n");
    home.write("runs/second/state/train.json", "{");
    // Neither is a run.
    home.write("runs/notes/readme.txt", "");
    home.write("runs/file", "");
    let served = Served::start(home, &["--runs", "runs"]);
    let (status, list) = served.get("/api/runs");
    assert_eq!((status, names(&list)), (200, vec!["first", "second"]));
    let (status, run) = served.get("/api/runs/second");
    assert_eq!((status, &run["curve"]["steps"][0]["step"]), (200, &json!(7)));
    let errors = run["errors"].to_string();
    assert!(errors.contains("run.toml") && errors.contains("train.json"), "{errors}");
    // A run that begins later is there at the next look.
    copy(&repository().join("fixtures/run-folder-v1"), &served.folder().join("runs/a third"));
    assert_eq!(names(&served.get("/api/runs").1), ["a third", "first", "second"]);
    assert_eq!(served.get("/api/runs/a%20third").0, 200);
}

#[test]
fn no_name_leads_out_of_the_folder() {
    let home = home();
    copy(&repository().join("fixtures/run-folder-v1"), &home.path().join("secret"));
    #[cfg(unix)]
    std::os::unix::fs::symlink(home.path().join("secret"), home.path().join("runs/link")).unwrap();
    let served = Served::start(home, &["--runs", "runs"]);
    assert_eq!(names(&served.get("/api/runs").1), ["first"]);
    let outside = [
        "link",
        "..%2Fsecret",
        "..",
        "%2e%2e%2fsecret",
        ".",
        "first%2F..%2F..%2Fsecret",
        "%2Ftmp",
        "none",
        "first%00",
    ];
    for name in outside {
        let (head, body) = served.raw(&format!("GET /api/runs/{name} HTTP/1.1"), &[], "");
        assert!(head.starts_with("http/1.1 404 "), "{name}: {head}");
        assert!(body.contains("not_found"), "{name}: {body}");
    }
}

#[test]
fn one_run_may_be_named_and_without_any_that_is_said() {
    let served = Served::start(home(), &["--runs", "runs/first"]);
    assert_eq!(names(&served.get("/api/runs").1), ["first"]);
    assert_eq!(served.get("/api/runs/first").0, 200);
    let served = Served::start(Home::new(), &[]);
    let (status, refused) = served.get("/api/runs");
    assert_eq!((status, &refused["error"]["code"]), (404, &json!("no_runs")));
    assert!(refused["error"]["message"].as_str().unwrap().contains("--runs DIR"), "{refused}");
    assert_eq!(served.get("/api/runs/first").0, 404);
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let home = Home::new();
    insta::assert_snapshot!(
        home.snapshot(&["serve", "--target", &target, "--port", "0", "--runs", "nowhere"])
    );
}

#[test]
fn runs_want_the_key_where_there_is_one() {
    let home = home();
    home.write("keys", "secret-a\n");
    let served = Served::start(home, &["--runs", "runs", "--api-keys-file", "keys"]);
    for path in ["/api/runs", "/api/runs/first", "/api/runs/none"] {
        assert_eq!(served.get(path).0, 401, "{path}");
        let head = |key: &str| {
            served.raw(&format!("GET {path} HTTP/1.1"), &[&format!("authorization: Bearer {key}")], "").0
        };
        assert!(head("wrong").starts_with("http/1.1 401 "), "{path}");
        let good = if path.ends_with("none") { "http/1.1 404 " } else { "http/1.1 200 " };
        assert!(head("secret-a").starts_with(good), "{path}");
    }
}

#[test]
fn generations_are_kept_with_their_tokens_and_change_no_answer() {
    let more = ["--bundle", "bundle", "--keep-generations", "3"];
    let served = Served::start(with_bundle(), &more);
    let plain = Served::start(with_bundle(), &more[..2]);
    assert_eq!(served.get("/api/generations").1, json!([]));
    let (status, refused) = plain.get("/api/generations");
    assert_eq!((status, &refused["error"]["code"]), (404, &json!("keeps_no_generations")));
    let chat = "/v1/chat/completions";
    let ask = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Why?"}], "seed": 1, "temperature": 0, "max_tokens": 24});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let same = |text: &str| {
        // Ids and times differ between two servers.
        let cut = |line: &str| -> Option<String> {
            let mut value: Value = serde_json::from_str(line.strip_prefix("data: ").unwrap_or(line)).ok()?;
            for key in ["id", "created"] {
                value.as_object_mut()?.remove(key);
            }
            Some(value.to_string())
        };
        text.lines().map(|line| cut(line).unwrap_or_else(|| line.to_owned())).collect::<Vec<_>>().join("\n")
    };
    // No event more and no field more than without keeping, whole and streamed.
    for more in
        [json!({}), json!({"stream": true}), json!({"stream": true, "logprobs": true}), json!({"n": 2})]
    {
        let [ours, theirs] = [&served, &plain].map(|server| server.send(chat, None, &ask(more.clone())));
        assert_eq!((ours.0, same(&ours.1)), (200, same(&theirs.1)), "{more}");
    }
    let (_, text, _) = served.send(chat, None, &ask(json!({})));
    let answer: Value = serde_json::from_str(&text).unwrap();
    let id = answer["id"].as_str().unwrap();
    let (_, list) = served.get("/api/generations");
    assert_eq!(list.as_array().unwrap().len(), 3, "{list}");
    let first = &list[0];
    assert_eq!(
        (first["id"].as_str(), &first["tokens"], &first["text"]),
        (Some(id), &Value::Null, &Value::Null)
    );
    let made: u64 =
        ["draft", "recovered", "bonus", "plain"].map(|way| first["made"][way].as_u64().unwrap()).iter().sum();
    assert_eq!(Some(made), answer["usage"]["completion_tokens"].as_u64());
    assert!(first["prompt_end"].as_str().unwrap().contains("Why?"), "{first}");
    let (status, one) = served.get(&format!("/api/generations/{id}"));
    assert_eq!((status, &one["text"]), (200, &answer["choices"][0]["message"]["content"]));
    assert!(one["prompt"].as_str().unwrap().contains("Why?"), "{one}");
    let tokens = one["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert!(text.starts_with(one["text"].as_str().unwrap()), "{one}");
    assert!(one["accept_length"].as_f64().is_some_and(|length| length >= 1.0), "{one}");
    // The two before came of one request.
    assert!(
        list[1]["id"].as_str().unwrap().ends_with("-1") || list[1]["id"].as_str().unwrap().ends_with("-0"),
        "{list}"
    );
    assert_eq!(served.get("/api/generations/none").0, 404);
}

#[test]
fn a_key_sees_its_own_generations_alone() {
    let home = Home::new();
    home.write("keys", "alice secret-a\nbob secret-b\n");
    let served = Served::start(home, &["--keep-generations", "9", "--api-keys-file", "keys"]);
    let body = r#"{"prompt": "a", "max_tokens": 2}"#;
    assert_eq!(served.send("/v1/completions", Some("secret-a"), body).0, 200);
    let list = |key: &str| {
        let (head, body) =
            served.raw("GET /api/generations HTTP/1.1", &[&format!("authorization: Bearer {key}")], "");
        (head.split(' ').nth(1).unwrap().to_owned(), body)
    };
    let (status, own) = list("secret-a");
    let own: Value = serde_json::from_str(&own).unwrap();
    assert_eq!((status.as_str(), own.as_array().unwrap().len()), ("200", 1));
    assert_eq!(list("secret-b"), ("200".to_owned(), "[]".to_owned()));
    assert_eq!(list("wrong").0, "401");
    let id = own[0]["id"].as_str().unwrap();
    let of_bob =
        served.raw(&format!("GET /api/generations/{id} HTTP/1.1"), &["authorization: Bearer secret-b"], "");
    assert!(of_bob.0.starts_with("http/1.1 404 "), "{}", of_bob.0);
}
