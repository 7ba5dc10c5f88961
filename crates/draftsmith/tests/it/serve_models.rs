//! `serve --model NAME=BUNDLE`: several models in one process, loaded when they are asked for and unloaded by memory.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bundles::with_bundle;
use crate::serve::{Served, agent, ask, text, with};
use crate::support::{Home, repository};

fn tiny() -> String {
    repository().join("fixtures/tiny-target").display().to_string()
}

/// Two names of one target, with a small cache for each.
fn two(home: Home, more: &[&str]) -> Served {
    let (a, b) = (format!("a={}", tiny()), format!("org/b={}", tiny()));
    Served::start_as(home, &[&["--model", &a, "--model", &b, "--kv-budget", "8192"], more].concat())
}

fn body(model: &str, question: &str) -> Value {
    with(&ask(question), json!({"model": model, "max_tokens": 24}))
}

/// How the models stand: `/health`, which `/version` agrees with.
fn states(served: &Served) -> Vec<(String, String)> {
    let (status, health) = served.get("/health");
    assert_eq!(status, 200, "{health}");
    assert_eq!(served.get("/version").1["models"], health["models"]);
    let models = health["models"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    models.map(|model| (text(&model["id"]), text(&model["state"]))).collect()
}

fn stand(served: &Served) -> String {
    states(served).into_iter().map(|(id, state)| format!("{id} {state}")).collect::<Vec<_>>().join(", ")
}

#[test]
fn two_models_answer_side_by_side_as_each_does_alone() {
    let questions = ["Calculate 2 + 3.", "Tell me a story.", "Why is the sky blue?"];
    let alone = Served::start(Home::new(), &[]);
    let wanted: Vec<String> =
        questions.iter().map(|q| text(&alone.chat(&with(&ask(q), json!({"max_tokens": 24}))))).collect();
    let served = two(Home::new(), &[]);
    assert_eq!(stand(&served), "a not loaded, org/b not loaded");
    std::thread::scope(|scope| {
        for (i, model) in ["a", "org/b", "a", "org/b", "org/b", "a"].into_iter().enumerate() {
            let (served, wanted) = (&served, &wanted);
            scope.spawn(move || {
                let body = body(model, questions[i % 3]);
                let answer = served.chat(&body);
                assert_eq!((answer["model"].as_str(), text(&answer)), (Some(model), wanted[i % 3].clone()));
                let events = served.stream("/v1/chat/completions", &body);
                let deltas = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
                assert_eq!(deltas.collect::<String>(), wanted[i % 3]);
            });
        }
    });
    assert_eq!(stand(&served), "a loaded, org/b loaded");
    let (_, models) = served.get("/v1/models");
    let cards: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| (&m["id"], &m["loaded"])).collect();
    assert_eq!(cards, [(&json!("a"), &json!(true)), (&json!("org/b"), &json!(true))]);
    assert!(models["data"][0]["max_model_len"].as_u64().unwrap() > 100, "{models}");
    assert_eq!(served.get("/v1/models/org/b").1["id"], "org/b");
    // Each is counted by itself, each was loaded once, and a family of counters stands in one piece.
    for model in ["a", "org/b"] {
        let label = format!("model_name=\"{model}\"");
        assert!(served.counter("vllm:generation_tokens_total", &label) > 20.0);
        assert_eq!(served.counter("vllm:request_success_total", &label), 6.0);
        assert_eq!(served.counter("draftsmith:http_requests_total", &label), 6.0);
        assert_eq!(served.counter("draftsmith:model_loads_total", &label), 1.0);
        assert_eq!(served.counter("draftsmith:model_loaded", &label), 1.0);
    }
    let mut response = agent().get(format!("{}/metrics", served.url)).call().unwrap();
    let page = response.body_mut().read_to_string().unwrap();
    let mut types: Vec<&str> = page.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    types.sort_unstable();
    let count = types.len();
    types.dedup();
    assert_eq!((types.len(), page.ends_with("# EOF\n")), (count, true), "{page}");
    // What is shown of one of them, and tokens.
    assert_eq!(served.get("/api/state?model=org%2Fb").1["model"], "org/b");
    assert_eq!(served.get("/api/state").1["models"].as_array().unwrap().len(), 2);
    let (status, tokens) = served.post("/tokenize", &json!({"model": "a", "prompt": "Hello"}));
    assert!(status == 200 && tokens["count"].as_u64() > Some(0), "{tokens}");
}

#[test]
fn a_name_that_is_not_served_and_none_at_all_are_told_as_openai_does() {
    let served = two(Home::new(), &[]);
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"] {
        let (status, answer) = served.post(path, &body("gpt-4", "Hello"));
        assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")), "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("`gpt-4`") && message.contains("`a`, `org/b` are"), "{answer}");
        served.refused(path, "{\"messages\": []}", 400, Some("model"), "`model` is missing");
        served.refused(path, "{\"model\": 3}", 400, Some("model"), "`model`");
    }
    let (status, answer) = served.get("/v1/models/gpt-4");
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")), "{answer}");
    assert_eq!(stand(&served), "a not loaded, org/b not loaded", "nothing was loaded for that");
    // What only a loaded model can tell.
    let (status, answer) = served.get("/api/bundle?model=a");
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_not_loaded")), "{answer}");
    let state = served.get("/api/state").1;
    assert_eq!((&state["model"], &state["has_draft"]), (&json!("a"), &json!(false)), "{state}");
}

/// Bytes that a model of ours is estimated to take.
fn estimate() -> u64 {
    let served = two(Home::new(), &[]);
    served.chat(&body("a", "Hello"));
    served.get("/health").1["models"][0]["bytes"].as_u64().unwrap()
}

#[test]
fn where_memory_is_short_the_model_that_was_not_used_for_longest_goes_and_none_that_is_used() {
    let bytes = estimate();
    let names = ["a", "b", "c"].map(|name| format!("{name}={}", tiny()));
    let models: Vec<&str> = names.iter().flat_map(|name| ["--model", name]).collect();
    let room = |models: u64| format!("{}KiB", (models * bytes + bytes / 2) >> 10);
    let start = |memory: &str| {
        let more = ["--kv-budget", "8192", "--memory", memory];
        Served::start_as(Home::new(), &[&models[..], &more].concat())
    };
    let served = start(&room(2));
    let wanted = text(&served.chat(&body("a", "Tell me a story.")));
    assert_eq!(text(&served.chat(&body("b", "Tell me a story."))), wanted);
    served.chat(&body("a", "Hello"));
    assert_eq!(text(&served.chat(&body("c", "Tell me a story."))), wanted);
    assert_eq!(stand(&served), "a loaded, b not loaded, c loaded");
    assert_eq!(text(&served.chat(&body("b", "Tell me a story."))), wanted);
    assert_eq!(stand(&served), "a not loaded, b loaded, c loaded");
    assert!(served.log().contains("model `b`: unloaded"), "{}", served.log());
    assert_eq!(served.counter("draftsmith:model_unloads_total", ""), 2.0);
    // Counts of a model outlive it.
    assert_eq!(served.counter("vllm:request_success_total", "model_name=\"a\""), 2.0);

    // Room for one: while it answers the others wait, and nobody loses anything.
    let served = start(&room(1));
    let long = with(&body("a", "Tell me a story."), json!({"max_tokens": 300, "ignore_eos": true}));
    let whole = text(&served.chat(&long));
    std::thread::scope(|scope| {
        for i in 0..9 {
            let (served, long, whole, wanted) = (&served, &long, &whole, &wanted);
            scope.spawn(move || match ["a", "b", "c"][i % 3] {
                "a" => {
                    // A stream keeps its model to the last event.
                    let events = served.stream("/v1/chat/completions", long);
                    let deltas = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
                    assert_eq!(deltas.collect::<String>(), *whole);
                }
                name => assert_eq!(text(&served.chat(&body(name, "Tell me a story."))), *wanted),
            });
        }
    });
    let loaded = states(&served).iter().filter(|(_, state)| state == "loaded").count();
    assert_eq!(loaded, 1, "{}", stand(&served));

    // Room for none: the requests hear so, and the server lives on.
    let served = start(&format!("{}KiB", (bytes / 2) >> 10));
    let (status, answer) = served.post("/v1/chat/completions", &body("a", "Hello"));
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_not_loaded")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("`--memory`"), "{answer}");
    assert_eq!(stand(&served), "a failed, b not loaded, c not loaded");
}

#[test]
fn a_model_that_does_not_load_fails_its_own_requests_and_a_bundle_brings_its_draft() {
    let home = with_bundle();
    let broken = home.path().join("broken");
    std::process::Command::new("cp").arg("-r").arg(home.path().join("bundle")).arg(&broken).status().unwrap();
    std::fs::write(broken.join("model.safetensors"), b"no weights").unwrap();
    let (with_draft, of_broken) =
        (format!("drafted=bundle,target={}", tiny()), format!("broken=broken,target={}", tiny()));
    let plain = format!("plain={}", tiny());
    // Beside the run file that made it a bundle's target is known, though the bundle names no folder.
    let text_of_run =
        format!("[target]\nsource = \"{}\"\n[data]\nsources = [{{ path = \"a.jsonl\" }}]\n", tiny());
    home.write("run/run.toml", text_of_run);
    home.write("run/state/lock", "");
    let own = home.path().join("run/bundle");
    std::process::Command::new("cp").arg("-r").arg(home.path().join("bundle")).arg(&own).status().unwrap();
    let models =
        [&with_draft, &of_broken, &plain, &"nowhere=./nothing".to_string(), &"of-a-run=run".to_string()];
    let models: Vec<&str> = models.into_iter().flat_map(|model| ["--model", model]).collect();
    let served = Served::start_as(home, &[&models[..], &["--kv-budget", "8192", "--depth", "3"]].concat());
    assert!(
        served.log().contains("model `nowhere`: there is nothing at `./nothing` yet"),
        "{}",
        served.log()
    );
    for (name, reason) in [("broken", "model.safetensors"), ("nowhere", "./nothing")] {
        for stream in [false, true] {
            let body = with(&body(name, "Hello"), json!({"stream": stream}));
            let (status, answer) = served.post("/v1/chat/completions", &body);
            assert_eq!((status, &answer["error"]["code"]), (503, &json!("model_not_loaded")), "{answer}");
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.contains(reason) && message.contains(&format!("`{name}`")), "{answer}");
        }
    }
    let drafted = served.chat(&body("drafted", "Tell me a story."));
    assert_eq!(text(&drafted), text(&served.chat(&body("plain", "Tell me a story."))));
    assert_eq!(text(&drafted), text(&served.chat(&body("of-a-run", "Tell me a story."))));
    let standing = "drafted loaded, broken failed, plain loaded, nowhere failed, of-a-run loaded";
    assert_eq!(stand(&served), standing);
    let label = "model_name=\"drafted\"";
    assert!(served.counter("vllm:spec_decode_num_drafts_total", label) > 0.0, "the flag's plan drafts");
    assert_eq!(served.counter("vllm:spec_decode_num_drafts_total", "model_name=\"plain\""), 0.0);
    assert_eq!(served.counter("draftsmith:draft_info", label), 1.0);
    // What was mended is loaded: a failure is not remembered.
    let home = served.home.path();
    std::fs::copy(home.join("bundle/model.safetensors"), home.join("broken/model.safetensors")).unwrap();
    assert_eq!(text(&served.chat(&body("broken", "Tell me a story."))), text(&drafted));
    // The draft of one of them is changed by its name, and SIGHUP reads all of them anew.
    let bundle = home.join("broken");
    let (status, answer) = served.post("/admin/draft", &json!({"bundle": bundle}));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("model")), "{answer}");
    let (status, answer) = served.post("/admin/draft", &json!({"bundle": bundle, "model": "drafted"}));
    assert_eq!((status, &answer["outcome"]), (200, &json!("switched")), "{answer}");
    served.signal("-HUP");
    let began = Instant::now();
    let reloaded = || served.counter("draftsmith:draft_swaps_total", "outcome=\"switched\"");
    while reloaded() < 4.0 && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(reloaded(), 4.0, "{}", served.log());
}

#[test]
fn a_server_of_several_models_ends_while_some_wait_and_wrong_arguments_are_named() {
    let served = two(Home::new(), &["--drain-timeout", "50"]);
    let story = with(&body("a", "Tell me a story."), json!({"max_tokens": 200, "ignore_eos": true}));
    let answer = std::thread::scope(|scope| {
        let reader = scope.spawn(|| served.post("/v1/chat/completions", &story));
        let began = Instant::now();
        while served.counter("vllm:num_requests_running", "") < 1.0 {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
        served.signal("-TERM");
        reader.join().unwrap()
    });
    assert_eq!(answer.0, 200, "{}", answer.1);
    let (code, log) = served.exit_code();
    assert_eq!(code, Some(0), "{log}");

    let home = Home::new();
    let check = |args: &[&str]| {
        let ended = home.run(&[&["serve", "--port", "0"], args].concat());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("\nhint: "), "{}", ended.stderr);
        ended.stderr
    };
    let twice = check(&["--model", "a=x", "--model", "a=y"]);
    assert!(twice.contains("`--model a=y`: another model has this name"), "{twice}");
    assert!(check(&["--model", "x"]).contains("expected `NAME=BUNDLE`"));
    assert!(check(&["--model", "a=x", "--memory", "4GB"]).contains("a number of GiB above 0"));
    assert!(check(&["--model", "a=x", "--target", "y"]).contains("--target"));
    assert!(check(&["--target", "y", "--memory", "4"]).contains("--memory"));
}
