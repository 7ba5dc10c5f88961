//! `serve` over real HTTP, with the tiny target.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bundles::with_bundle;
use crate::support::{Home, repository};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server and the folder that it calls home.
pub(crate) struct Served {
    pub(crate) home: Home,
    child: Child,
    pub(crate) url: String,
    model: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        // A server that ended by itself needs no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(PATIENCE))
        .build()
        .new_agent()
}

/// The data of a stream's events, `[DONE]` as `null`.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| if data == "[DONE]" { Value::Null } else { serde_json::from_str(data).unwrap() })
        .collect()
}

impl Served {
    pub(crate) fn start(home: Home, more: &[&str]) -> Served {
        let target = repository().join("fixtures/tiny-target").display().to_string();
        Served::start_with(home, &target, more)
    }

    /// A server of another target.
    pub(crate) fn start_with(home: Home, target: &str, more: &[&str]) -> Served {
        Served::start_as(home, &[&["--target", target], more].concat())
    }

    /// A server of whatever the arguments name.
    pub(crate) fn start_as(home: Home, what: &[&str]) -> Served {
        let log = std::fs::File::create(home.path().join("log")).unwrap();
        // A card has no threads to choose.
        let threads: &[&str] = if what.contains(&"--device") { &[] } else { &["--threads", "1"] };
        let mut child = home
            .command(&["serve", "--port", "0", "--json"])
            .args(threads)
            .args(what)
            .stdout(std::process::Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let log = std::fs::read_to_string(home.path().join("log")).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}{log}"));
        let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
        Served { url: text("url"), model: text("model"), home, child }
    }

    /// The folder that it works in.
    pub(crate) fn folder(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("log")).unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        let ended = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(ended.success());
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let mut response = agent().get(format!("{}{path}", self.url)).call().unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    pub(crate) fn send(&self, path: &str, key: Option<&str>, body: &str) -> (u16, String, Option<String>) {
        let mut request = agent().post(format!("{}{path}", self.url)).content_type("application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).unwrap();
        let wait = response.headers().get("retry-after").map(|v| v.to_str().unwrap().to_owned());
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap(), wait)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text, _) = self.send(path, None, &body.to_string());
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    #[track_caller]
    /// What a chat request is answered with.
    pub(crate) fn text_of(&self, body: &Value) -> String {
        text(&self.chat(body))
    }

    pub(crate) fn chat(&self, body: &Value) -> Value {
        let (status, answer) = self.post("/v1/chat/completions", body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let (status, text, _) = self.send(path, None, &body.to_string());
        assert_eq!(status, 200, "{text}");
        events(&text)
    }

    #[track_caller]
    pub(crate) fn refused(&self, path: &str, body: &str, status: u16, param: Option<&str>, message: &str) {
        let (found, text, _) = self.send(path, None, body);
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        let error = &answer["error"];
        assert_eq!((found, error["param"].as_str()), (status, param), "{answer}");
        assert!(error["message"].as_str().unwrap().contains(message), "{answer}");
    }

    /// Waits until `/api/state` is as wanted.
    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let (_, state) = self.get("/api/state");
            if wanted(&state) {
                return state;
            }
            assert!(began.elapsed() < PATIENCE, "{state}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A counter of the metrics page, summed over its labels that contain `label`.
    pub(crate) fn counter(&self, name: &str, label: &str) -> f64 {
        let mut response = agent().get(format!("{}/metrics", self.url)).call().unwrap();
        let page = response.body_mut().read_to_string().unwrap();
        let lines = page.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }

    /// A request written by hand, so that its connection can be dropped.
    fn open(&self, body: &Value) -> BufReader<TcpStream> {
        let host = self.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        BufReader::new(stream)
    }

    pub(crate) fn exit_code(mut self) -> (Option<i32>, String) {
        let began = Instant::now();
        let code = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if began.elapsed() > PATIENCE => break None,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        (code, self.log())
    }
}

pub(crate) fn ask(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "temperature": 0})
}

/// `base` with more fields.
pub(crate) fn with(base: &Value, more: Value) -> Value {
    let mut body = base.clone();
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    body
}

/// A request that keeps the server busy for a while: long answers, one token after the other.
pub(crate) fn long(n: usize) -> Value {
    let base = ask("Tell me a short story about a cow.");
    let more = json!({"n": n, "max_tokens": 900, "ignore_eos": true, "draftsmith": {"draft": "none"}});
    with(&base, more)
}

pub(crate) fn text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap().to_owned()
}

#[test]
fn serve_answers_as_generate_does_in_the_words_of_openai() {
    let served = Served::start(Home::new(), &[]);
    assert_eq!(served.get("/health"), (200, json!({"status": "ok"})));
    let (_, models) = served.get("/v1/models");
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!(served.model)));
    assert_eq!(served.get(&format!("/v1/models/{}", served.model)).1["object"], "model");

    let question = "Calculate 22 + 20.";
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let wanted = served.home.run(&["generate", "--target", &target, "--prompt", question, "--json"]).json();
    let answer = served.chat(&with(&ask(question), json!({"model": served.model})));
    assert_eq!(text(&answer), wanted["text"].as_str().unwrap());
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["finish_reason"], wanted["finish_reason"]);
    let prompt = wanted["prompt_ids"].as_array().unwrap().len();
    let tokens = wanted["token_ids"].as_array().unwrap().len();
    let usage = json!({
        "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    });
    assert_eq!(answer["usage"], usage);
    assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("draftsmith-"));

    let (_, tokenized) = served.post("/tokenize", &ask(question));
    assert_eq!((&tokenized["tokens"], &tokenized["count"]), (&wanted["prompt_ids"], &json!(prompt)));
    let body = json!({"prompt": wanted["prompt_ids"], "temperature": 0, "max_tokens": 64});
    let (status, completed) = served.post("/v1/completions", &body);
    assert_eq!((status, text(&completed)), (200, text(&answer)), "{completed}");
    assert_eq!(completed["object"], "text_completion");

    // What training would learn of this conversation: the answer and its end, nothing else.
    let mut messages = ask(question)["messages"].clone();
    messages.as_array_mut().unwrap().push(answer["choices"][0]["message"].clone());
    let (_, rendered) = served.post("/v1/chat/completions/render", &json!({"messages": messages}));
    let ids = rendered["token_ids"].as_array().unwrap();
    let mask = rendered["loss_mask"].as_array().unwrap();
    let trained: Vec<&Value> =
        ids.iter().zip(mask).filter(|(_, trained)| **trained == 1).map(|(id, _)| id).collect();
    assert_eq!(trained, wanted["token_ids"].as_array().unwrap().iter().collect::<Vec<_>>());
    assert_eq!(&ids[..prompt], wanted["prompt_ids"].as_array().unwrap().as_slice());

    assert!(served.counter("vllm:generation_tokens_total", "") >= 2.0 * tokens as f64);
    assert_eq!(served.counter("draftsmith:http_requests_total", "/v1/completions\",status=\"200\""), 1.0);
    let state = served.wait_for(|state| state["running"] == 0);
    assert_eq!((&state["has_draft"], &state["draft"]), (&json!(false), &Value::Null));
}

#[test]
fn our_own_server_has_no_gap() {
    let served = Served::start(Home::new(), &[]);
    let fixture = |name: &str| repository().join("fixtures/tiny-target").join(name).display().to_string();
    let (url, target, workload) = (format!("{}/v1", served.url), fixture(""), fixture("eval.jsonl"));
    for api in ["text", "ids", "chat"] {
        let args = ["doctor", "serve-gap", &url, "--target", &target, "--workload", &workload, "--api", api];
        let gap = served
            .home
            .run(&[&args[..], &["--limit", "4", "--max-new-tokens", "16", "--json"]].concat())
            .json();
        assert_eq!(gap["same"], 4, "{gap}");
    }
}

#[test]
fn a_stream_says_the_same_as_a_whole_answer() {
    let served = Served::start(Home::new(), &[]);
    let seeded = json!({"temperature": 0.9, "seed": 5, "max_tokens": 40});
    let base = with(&ask("Tell me a short story about a cow."), seeded);
    for more in [
        json!({}),
        json!({"n": 3, "seed": -7}),
        json!({"logprobs": true, "top_logprobs": 2, "min_p": 0.05, "top_k": 40, "top_p": 0.9}),
        json!({"stop": ["the", "zzz"], "logprobs": true, "repetition_penalty": 1.1}),
        json!({"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"300": 5, "7": -100}}),
        json!({"draftsmith": {"draft": "none"}}),
    ] {
        let body = with(&base, more);
        let whole = served.chat(&body);
        let parts = served.stream("/v1/chat/completions", &body);
        assert_eq!(parts.last(), Some(&Value::Null), "no [DONE]");
        let usage = &parts[parts.len() - 2];
        let counts = |answer: &Value| {
            ["prompt_tokens", "completion_tokens", "total_tokens"]
                .map(|key| answer["usage"][key].as_u64().unwrap())
        };
        assert_eq!((counts(usage), &usage["choices"]), (counts(&whole), &json!([])));
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let of_choice = || {
                let chunks = parts.iter().filter_map(|part| part["choices"].get(0));
                chunks.filter(|chunk| chunk["index"] == index)
            };
            let said: String = of_choice().filter_map(|c| c["delta"]["content"].as_str()).collect();
            assert_eq!(said, choice["message"]["content"].as_str().unwrap(), "{body}");
            assert_eq!(of_choice().next_back().unwrap()["finish_reason"], choice["finish_reason"]);
            assert_eq!(of_choice().next().unwrap()["delta"]["role"], "assistant");
            let logprobs: Vec<&Value> =
                of_choice().filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
            let whole: Vec<&Value> = choice["logprobs"]["content"].as_array().into_iter().flatten().collect();
            assert_eq!(logprobs, whole);
            assert_eq!(whole.is_empty(), body.get("logprobs").is_none());
            let spelt: String = whole.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
            assert!(whole.is_empty() || spelt == said, "{spelt:?} is not {said:?}");
        }
    }
    // A choice has the seed of the request and its own number.
    let two = served.chat(&with(&base, json!({"n": 2})));
    let second = served.chat(&with(&base, json!({"seed": 6})));
    assert_eq!(two["choices"][1]["message"], second["choices"][0]["message"]);
    assert_ne!(two["choices"][0]["message"], second["choices"][0]["message"]);
    // The older form: echo, several prompts, log-probabilities with offsets.
    let body = json!({"prompt": ["Why", "One two"], "echo": true, "max_tokens": 8, "seed": 1});
    let (_, whole) = served.post("/v1/completions", &body);
    let parts = served.stream("/v1/completions", &body);
    for index in 0..2 {
        let chunks = parts.iter().filter_map(|part| part["choices"].get(0));
        let said: String =
            chunks.filter(|c| c["index"] == index).filter_map(|c| c["text"].as_str()).collect();
        assert_eq!(said, whole["choices"][index]["text"].as_str().unwrap());
        assert!(said.starts_with(body["prompt"][index].as_str().unwrap()), "{said}");
    }
    let body = json!({"prompt": "Why", "max_tokens": 5, "logprobs": 1, "temperature": 0});
    let (_, answer) = served.post("/v1/completions", &body);
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"][0], 0, "{answer}");
    let best = logprobs["top_logprobs"][0].as_object().unwrap().values().next().unwrap();
    assert_eq!(&logprobs["token_logprobs"][0], best, "the greedy token is the best one");
}

#[test]
fn a_seed_gives_one_text_with_every_draft_alone_and_among_others() {
    let served = Served::start(with_bundle(), &["--bundle", "bundle"]);
    let base = with(&ask("Calculate 22 + 20 and tell a story."), json!({"max_tokens": 48}));
    let plans = [
        json!("none"),
        json!("auto"),
        json!({"chain": 4}),
        json!({"tree": {"depth": 3, "top_k": 2, "nodes": 8}}),
    ];
    let settings = [json!({"temperature": 0}), json!({"temperature": 0.8, "seed": 3, "top_p": 0.95})];
    let answers = |body: &Value| -> Vec<String> {
        let answer = |plan: &Value| text(&served.chat(&with(body, json!({"draftsmith": {"draft": plan}}))));
        plans.iter().map(answer).collect()
    };
    for setting in settings {
        let body = with(&base, setting);
        let alone = answers(&body);
        assert!(alone.iter().all(|text| *text == alone[0]), "{alone:?}");
        std::thread::scope(|scope| {
            for seed in 0..32 {
                let (served, base, plans) = (&served, &base, &plans);
                scope.spawn(move || {
                    let plan = &plans[seed % plans.len()];
                    let more = json!({"temperature": 1, "seed": seed, "draftsmith": {"draft": plan}});
                    for _ in 0..4 {
                        served.chat(&with(base, more.clone()));
                    }
                });
            }
            served.wait_for(|state| state["running"].as_u64() >= Some(8));
            assert_eq!(answers(&body), alone);
        });
    }
    assert!(served.counter("vllm:spec_decode_num_drafts_total", "") > 0.0);
    let drafted = served.counter("vllm:spec_decode_num_draft_tokens_total", "");
    assert!(drafted >= served.counter("vllm:spec_decode_num_accepted_tokens_total", ""));
    let (_, bundle) = served.get("/api/bundle");
    assert_eq!(bundle["bundle"]["name"], "theirs", "{bundle}");
    assert!(bundle["card_md"].as_str().is_some_and(|card| card.contains("theirs")));
}

#[test]
fn of_a_stop_text_nothing_is_shown_not_even_in_traces() {
    let served = Served::start(Home::new(), &[]);
    let base = with(&ask("Tell me a short story about a cow."), json!({"max_tokens": 60}));
    let whole = text(&served.chat(&base));
    let cut = whole.char_indices().map(|(at, _)| at).collect::<Vec<_>>();
    for start in (3..cut.len() - 6).step_by(7) {
        let stop = &whole[cut[start]..cut[start + 5]];
        let (before, _) = whole.split_once(stop).unwrap();
        let body = with(&base, json!({"stop": stop, "draftsmith": {"trace": true}}));
        let answer = served.chat(&body);
        assert_eq!(
            (text(&answer).as_str(), &answer["choices"][0]["finish_reason"]),
            (before, &json!("stop"))
        );
        let shown = |traces: Vec<&Value>| -> String {
            let tokens = traces.into_iter().filter_map(|trace| trace["tokens"].as_array()).flatten();
            tokens.map(|token| token["text"].as_str().unwrap()).collect()
        };
        assert_eq!(shown(vec![&answer["choices"][0]["draftsmith"]]), before);
        let parts = served.stream("/v1/chat/completions", &body);
        let content = |part: &Value| part["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        assert_eq!(parts.iter().filter_map(content).collect::<String>(), before);
        assert_eq!(shown(parts.iter().map(|part| &part["draftsmith"]).collect()), before);
        assert!(answer["metrics"]["speculative_decoding"]["num_spec_steps"].is_u64(), "{answer}");
        assert!(answer["draftsmith"]["prefill_ms"].as_f64() > Some(0.0), "{answer}");
    }
}

#[test]
fn what_is_wrong_with_a_request_is_named() {
    let home = Home::new();
    let keys = home.write("keys", "alice secret-a # hers\nsecret-b\n").display().to_string();
    let served = Served::start(Home::new(), &["--max-body", "4096"]);
    let chat = "/v1/chat/completions";
    let refuse = |body: Value, status, param, message: &str| {
        served.refused(chat, &with(&ask("Why?"), body).to_string(), status, Some(param), message);
    };
    served.refused(chat, "{", 400, None, "the body is no JSON");
    served.refused(chat, "[]", 400, None, "the body is a list, not an object");
    served.refused(chat, "{}", 400, Some("messages"), "no message");
    served.refused(chat, r#"{"messages":[{"role":"user"},3]}"#, 400, Some("messages[1]"), "a number");
    refuse(json!({"temperature": 3}), 400, "temperature", "from 0 to 2");
    refuse(json!({"n": 0}), 400, "n", "from 1 to 16");
    refuse(json!({"stop": [""]}), 400, "stop", "empty");
    refuse(json!({"max_tokens": 100_000}), 400, "max_tokens", "context");
    refuse(json!({"logit_bias": {"99999": 1}}), 400, "logit_bias", "99999");
    refuse(json!({"top_logprobs": 2}), 400, "top_logprobs", "needs `logprobs`");
    refuse(json!({"model": "gpt"}), 404, "model", "not served here");
    refuse(json!({"tools": [{"type": "file_search"}]}), 400, "tools[0].type", "functions alone");
    refuse(json!({"tool_choice": "required"}), 400, "tool_choice", "there are no `tools`");
    refuse(json!({"draftsmith": {"draft": {"chain": 3}}}), 400, "draftsmith.draft", "no draft is loaded");
    refuse(json!({"response_format": {"type": "xml"}}), 400, "response_format.type", "`xml`");
    // What clients send out of habit changes nothing.
    let habits = json!({"tools": [], "user": "u", "store": false, "tool_choice": "auto", "stop": null,
        "parallel_tool_calls": true, "metadata": {"a": "b"}, "response_format": {"type": "text"}});
    served.chat(&with(&ask("Why?"), habits));
    served.refused(chat, &ask(&"a".repeat(5000)).to_string(), 413, None, "more than 4096 bytes");
    let long: Vec<u32> = vec![5; 1024];
    let body = json!({"prompt": long}).to_string();
    served.refused("/v1/completions", &body, 400, Some("prompt"), "context of the model ends at 1024");
    served.refused("/v1/completions", r#"{"prompt": ""}"#, 400, Some("prompt"), "no tokens");
    served.refused("/v1/nothing", "{}", 404, None, "nothing at `/v1/nothing`");
    served.refused("/v1/models", "{}", 405, None, "does not answer POST");
    assert_eq!(served.get("/api/records/none").0, 404);

    let served = Served::start(home, &["--api-keys-file", &keys]);
    let status = |key| served.send(chat, key, &ask("Why?").to_string()).0;
    assert_eq!(
        [None, Some("secret"), Some("alice"), Some("secret-a"), Some("secret-b")].map(status),
        [401, 401, 401, 200, 200]
    );
    assert_eq!((served.get("/health").0, served.get("/api/state").0), (200, 401));
}

#[test]
fn a_full_queue_and_a_small_cache_hold_requests_back() {
    let limits = ["--max-running", "1", "--queue", "4", "--kv-budget", "980"];
    let served = Served::start(Home::new(), &limits);
    let refused = with(&long(1), json!({"max_tokens": 980}));
    let (status, answer) = served.post("/v1/chat/completions", &refused);
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("context_length_exceeded")), "{answer}");
    let reader = served.open(&with(&long(4), json!({"stream": true})));
    served.wait_for(|state| state["running"] == 1 && state["queued"] == 3);
    let (status, text, wait) = served.send("/v1/chat/completions", None, &long(2).to_string());
    assert_eq!(status, 429, "{text}");
    assert!(wait.unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(served.send("/v1/chat/completions", None, &ask("Why?").to_string()).0, 200, "one fits");
    drop(reader);
    served.wait_for(|state| state["running"] == 0 && state["queued"] == 0);
}

#[test]
fn a_reader_that_leaves_frees_its_place_and_a_slow_one_holds_nobody_up() {
    let served = Served::start(Home::new(), &["--max-running", "4"]);
    // Both ways to wait for an answer.
    for stream in [true, false] {
        let reader = served.open(&with(&long(16), json!({"stream": stream})));
        served.wait_for(|state| state["running"] == 4);
        drop(reader);
        served.wait_for(|state| state["running"] == 0 && state["queued"] == 0);
    }
    let aborted = served.counter("vllm:request_success_total", "finished_reason=\"abort\"");
    assert!(aborted >= 8.0, "{aborted}");
    assert_eq!(served.counter("vllm:kv_cache_usage_perc", ""), 0.0);
    // Nobody reads this one; the others are answered meanwhile, and it is whole when it is read at last.
    let mut slow = served.open(&with(&long(3), json!({"stream": true})));
    served.wait_for(|state| state["running"] == 3);
    assert_eq!(served.send("/v1/chat/completions", None, &ask("Why?").to_string()).0, 200);
    served.wait_for(|state| state["running"] == 0);
    let mut line = String::new();
    while !line.contains("[DONE]") {
        line.clear();
        assert!(slow.read_line(&mut line).unwrap() > 0, "the stream broke off");
    }
}

#[test]
fn an_answer_that_takes_too_long_is_cut_with_an_error() {
    let served = Served::start(Home::new(), &["--max-running", "1", "--request-timeout", "1"]);
    let (status, answer) = served.post("/v1/chat/completions", &long(16));
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("timeout")), "{answer}");
    let parts = served.stream("/v1/chat/completions", &long(16));
    assert_eq!(parts.last().unwrap()["error"]["code"], "timeout");
    served.wait_for(|state| state["running"] == 0 && state["queued"] == 0);
}

/// Streams from eight readers at once, SIGTERM in the middle: the last event of each, and how the server ended.
fn drained(limit: &str, running: u32, n: usize) -> (Vec<Value>, Option<i32>, Duration) {
    let at_once = running.to_string();
    let served = Served::start(Home::new(), &["--max-running", &at_once, "--drain-timeout", limit]);
    let readers: Vec<_> = (0..8).map(|_| served.open(&with(&long(n), json!({"stream": true})))).collect();
    served.wait_for(|state| state["running"] == running);
    served.signal("-TERM");
    let began = Instant::now();
    let last = readers.into_iter().map(|mut reader| {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        events(&text).pop().expect("something was said")
    });
    let last = last.collect();
    let (code, log) = served.exit_code();
    assert!(log.contains("ended"), "{log}");
    (last, code, began.elapsed())
}

#[test]
fn after_sigterm_answers_are_finished_and_the_server_ends_well() {
    let (last, code, _) = drained("50", 8, 2);
    assert_eq!((last, code), (vec![Value::Null; 8], Some(0)));
}

#[test]
fn answers_beyond_the_drain_limit_end_with_a_clean_error() {
    // One at a time: the first reader's answers alone take several times the limit.
    let (last, code, time) = drained("1", 1, 16);
    assert!(last.iter().all(|event| event["error"]["code"] == "draining"), "{last:?}");
    assert_eq!(code, Some(0));
    assert!(time < Duration::from_secs(2), "{time:?}");
}

fn change(served: &Served, bundle: &Path) -> (u16, Value) {
    served.post("/admin/draft", &json!({"bundle": bundle}))
}

#[test]
fn a_draft_is_changed_while_serving_and_a_broken_one_is_refused() {
    let served = Served::start(with_bundle(), &["--bundle", "bundle", "--watch-steps", "40"]);
    let folder = |name: &str| served.home.path().join(name);
    let base = with(&ask("Tell me a story."), json!({"max_tokens": 30, "ignore_eos": true}));
    let body = with(&base, json!({"draftsmith": {"draft": {"chain": 4}}}));
    let wanted = text(&served.chat(&body));
    let steps = || served.counter("vllm:spec_decode_num_drafts_total", "");
    while steps() < 100.0 {
        served.chat(&body);
    }
    // Hashes are compared, folders that are no bundles are named, and what is served stays as it is.
    std::process::Command::new("cp").arg("-r").args([folder("bundle"), folder("broken")]).status().unwrap();
    let weights = folder("broken/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    for (name, message) in [("broken", "model.safetensors"), ("nowhere", "does not exist")] {
        let (status, answer) = change(&served, &folder(name));
        assert_eq!(status, 400, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
    let state = served.wait_for(|state| state["last_swap"]["outcome"] == "refused");
    assert_eq!(state["draft"]["bundle"], "bundle", "{state}");
    // As good a draft as before is kept.
    let (status, answer) = change(&served, &folder("bundle"));
    assert_eq!((status, &answer["outcome"]), (200, &json!("switched")), "{answer}");
    while served.get("/api/state").1["last_swap"]["outcome"] == "switched" {
        assert_eq!(text(&served.chat(&body)), wanted);
    }
    let state = served.wait_for(|state| state["last_swap"]["outcome"] == "kept");
    assert_eq!(state["draft"]["bundle"], json!(folder("bundle")), "{state}");
    // SIGHUP reads the same folder again.
    served.signal("-HUP");
    served.wait_for(|state| state["last_swap"]["outcome"] == "switched");
    for outcome in ["refused", "switched", "kept"] {
        let count = served.counter("draftsmith:draft_swaps_total", &format!("outcome=\"{outcome}\""));
        assert_eq!(count, if outcome == "kept" { 1.0 } else { 2.0 }, "{outcome}");
    }
    assert!(served.log().contains("draft `theirs`: kept"), "{}", served.log());
}

/// False if repetitions were not guessed, or too few of them, for want of a quiet moment to measure what a guess costs.
fn a_worse_draft_is_taken_back() -> bool {
    // Without a draft repetitions of the text are guessed, and a list that repeats itself is guessed well.
    let served = Served::start(with_bundle(), &["--watch-steps", "60"]);
    let ids: Vec<u32> = (0..200).map(|i| 300 + i % 5).collect();
    let bias: Value =
        (300..305).map(|id| (id.to_string(), json!(60))).collect::<serde_json::Map<_, _>>().into();
    let base =
        json!({"prompt": ids, "temperature": 0, "max_tokens": 120, "ignore_eos": true, "logit_bias": bias});
    let wanted = served.post("/v1/completions", &base).1;
    for _ in 0..9 {
        served.post("/v1/completions", &base);
    }
    let state = served.wait_for(|state| state["accept_length"].as_f64().is_some());
    if state["accept_length"].as_f64() <= Some(1.5) {
        return false;
    }
    let (status, answer) = change(&served, &served.home.path().join("bundle"));
    assert_eq!(status, 200, "{answer}");
    // A draft with random weights, and nothing but it.
    let body = with(&base, json!({"draftsmith": {"draft": {"chain": 2}}}));
    while served.get("/api/state").1["last_swap"]["outcome"] == "switched" {
        let (status, answer) = served.post("/v1/completions", &body);
        if status == 200 {
            assert_eq!(text(&answer), text(&wanted));
        }
    }
    let state = served.wait_for(|state| state["last_swap"]["outcome"] != "switched");
    if state["last_swap"]["outcome"] == "kept" {
        return false;
    }
    assert_eq!(state["last_swap"]["outcome"], "rolled_back", "{state}");
    assert_eq!(state["has_draft"], false, "{state}");
    assert!(served.log().contains("rolled back"), "{}", served.log());
    assert_eq!(text(&served.post("/v1/completions", &base).1), text(&wanted));
    true
}

#[test]
fn a_draft_that_guesses_worse_is_taken_back() {
    assert!((0..5).any(|_| a_worse_draft_is_taken_back()), "never in five servers");
}

#[test]
fn only_those_with_the_admin_key_change_the_draft() {
    let home = Home::new();
    let key = home.write("admin", "top-secret\n").display().to_string();
    let served = Served::start(home, &["--admin-key-file", &key]);
    let status = |key| served.send("/admin/draft", key, r#"{"bundle": "nowhere"}"#).0;
    assert_eq!([None, Some("wrong"), Some("top-secret")].map(status), [401, 401, 400]);
    // Without a key this machine may, but no page of another site that a browser shows here.
    let served = Served::start(Home::new(), &[]);
    let send = |name: &str, value: &str| {
        let request = agent().post(format!("{}/admin/draft", served.url)).header(name, value);
        request.send(r#"{"bundle": "nowhere"}"#).unwrap().status().as_u16()
    };
    assert_eq!(send("content-type", "application/json"), 400);
    assert_eq!((send("content-type", "text/plain"), send("host", "evil.example")), (400, 403));
    assert_eq!(send("x-forwarded-for", "10.0.0.1"), 403);
}

#[test]
fn wrong_settings_are_named_before_anything_is_loaded() {
    let home = Home::new();
    home.write("empty", "# no key\n");
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let serve =
        |more: &[&str]| home.snapshot(&[&["serve", "--target", &target, "--port", "0"], more].concat());
    insta::assert_snapshot!(serve(&["--api-keys-file", "empty"]));
    insta::assert_snapshot!(serve(&["--records", "nowhere"]));
    insta::assert_snapshot!(serve(&["--kv-budget", "4GB"]));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ended = home.run(&["serve", "--target", &target, "--port", &port]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("cannot be listened at"), "{}", ended.stderr);
}

impl Served {
    /// Head and body of an answer, in full, to a request whose head is written by hand.
    pub(crate) fn raw(&self, line: &str, headers: &[&str], body: &str) -> (String, String) {
        let host = self.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = format!("content-length: {}", body.len());
        let host = format!("host: {host}");
        let fixed = [host.as_str(), "connection: close", length.as_str()];
        let head: String =
            [line].iter().chain(&fixed).chain(headers).map(|line| format!("{line}\r\n")).collect();
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_lowercase(), body.to_string())
    }
}

#[test]
fn pages_of_named_origins_may_use_the_server_and_no_others() {
    let home = Home::new();
    let keys = home.write("keys", "secret-a\n").display().to_string();
    let more = ["--api-keys-file", &keys, "--allow-origin", "http://app.local/", "--allow-origin", "null"];
    let served = Served::start(home, &more);
    let chat = "/v1/chat/completions HTTP/1.1";
    let before = |path: &str, origin: &str, more: &[&str]| {
        let origin = format!("origin: {origin}");
        let fixed = [origin.as_str(), "access-control-request-method: POST"];
        served.raw(&format!("OPTIONS {path}"), &[&fixed[..], more].concat(), "").0
    };
    // What a browser asks before has no key, and is answered all the same.
    let head = before(chat, "http://app.local", &["access-control-request-headers: authorization,x-mine"]);
    assert!(head.starts_with("http/1.1 204 "), "{head}");
    for line in [
        "access-control-allow-origin: http://app.local",
        "access-control-allow-methods: get, post, options",
        "access-control-allow-headers: authorization,x-mine",
        "access-control-max-age: 86400",
        "vary: origin, access-control-request-method, access-control-request-headers",
    ] {
        assert!(head.contains(&format!("\r\n{line}")), "{line}: {head}");
    }
    assert!(!head.contains("private-network"), "{head}");
    let head = before(chat, "null", &["access-control-request-private-network: true"]);
    assert!(head.contains("access-control-allow-private-network: true"), "{head}");
    assert!(head.contains("access-control-allow-headers: authorization, content-type"), "{head}");
    for (path, origin) in [
        (chat, "http://other.local"),
        (chat, "https://app.local"),
        (chat, "http://app.local:8080"),
        (chat, "http://app.local.evil"),
        ("/admin/draft HTTP/1.1", "http://app.local"),
    ] {
        let head = before(path, origin, &[]);
        assert!(
            head.starts_with("http/1.1 403 ") && !head.contains("\r\naccess-control-"),
            "{origin}: {head}"
        );
        assert!(head.contains("vary: origin"), "{head}");
    }
    // Answers, errors and streams say who may read them.
    let body = with(&ask("Why?"), json!({"max_tokens": 4})).to_string();
    let stream = with(&ask("Why?"), json!({"max_tokens": 4, "stream": true})).to_string();
    let key = "authorization: Bearer secret-a";
    for (headers, body, status) in [
        (&["origin: http://app.local", key][..], &body, 200),
        (&["origin: http://app.local", key], &stream, 200),
        (&["origin: http://app.local", key], &"{".to_string(), 400),
        (&["origin: http://app.local"], &body, 401),
    ] {
        let (head, _) = served.raw(&format!("POST {chat}"), headers, body);
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{head}");
        assert!(head.contains("\r\naccess-control-allow-origin: http://app.local"), "{head}");
        assert!(head.contains("\r\nvary: origin"), "{head}");
    }
    let (head, _) = served.raw("GET /nowhere HTTP/1.1", &["origin: null"], "");
    assert!(
        head.starts_with("http/1.1 404 ") && head.contains("access-control-allow-origin: null"),
        "{head}"
    );
    // Without an origin, and of another one: answered as ever, and not marked.
    for headers in [&[key][..], &[key, "origin: http://other.local"]] {
        let (head, _) = served.raw(&format!("POST {chat}"), headers, &body);
        assert!(head.starts_with("http/1.1 200 ") && !head.contains("access-control-"), "{head}");
        assert!(head.contains("vary: origin"), "{head}");
    }
    // All origins; and the option left out.
    let served = Served::start(Home::new(), &["--allow-origin", "*"]);
    let asks = ["origin: http://any.where", "access-control-request-method: POST"];
    let (head, _) = served.raw(&format!("OPTIONS {chat}"), &asks, "");
    assert!(head.starts_with("http/1.1 204 ") && head.contains("access-control-allow-origin: *"), "{head}");
    let served = Served::start(Home::new(), &[]);
    let (head, _) = served.raw(&format!("OPTIONS {chat}"), &asks, "");
    assert!(head.starts_with("http/1.1 405 ") && !head.contains("access-control-"), "{head}");
    let (head, _) = served.raw(&format!("POST {chat}"), &asks[..1], &body);
    assert!(head.starts_with("http/1.1 200 ") && !head.contains("vary"), "{head}");
}

#[test]
fn prompts_are_scored_as_lm_evaluation_harness_asks_for_it() {
    use draftsmith::core::{TokenLogprobs, TokenTree};
    use draftsmith::kernels::Cpu;
    use draftsmith::model::{Precision, StepItem, Target};

    let served = Served::start(with_bundle(), &["--bundle", "bundle"]);
    let complete = |body: Value| {
        let (status, answer) = served.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    // The values by the target itself, in this process.
    let fixture = repository().join("fixtures/tiny-target");
    let target = Target::<Cpu>::load(std::sync::Arc::new(Cpu::new(1)), &fixture, Precision::Stored).unwrap();
    let scores = |ids: &[u32]| -> Vec<TokenLogprobs> {
        let mut kv = target.new_kv();
        let parents = TokenTree::chain_parents(ids.len());
        let item = StepItem { kv: &mut kv, tokens: ids, parents: &parents };
        let output = target.forward(&mut [item], &[]);
        let rows: Vec<u32> = (0..ids.len() as u32 - 1).collect();
        let logits = target.logits(&output, &rows);
        let of = logits.chunks_exact(target.config().vocab_size).zip(&ids[1..]);
        of.map(|(logits, id)| TokenLogprobs::of(logits, *id, 2)).collect()
    };
    let check = |choice: &Value, ids: &[u32], generated: usize| {
        let logprobs = &choice["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap().clone();
        let (tokens, chosen) = (list("tokens"), list("token_logprobs"));
        let (top, offsets) = (list("top_logprobs"), list("text_offset"));
        let lengths = [tokens.len(), chosen.len(), top.len(), offsets.len()];
        assert_eq!(lengths, [ids.len() + generated; 4], "{choice}");
        assert_eq!((&chosen[0], &top[0], &offsets[0]), (&Value::Null, &Value::Null, &json!(0)));
        for (i, wanted) in scores(ids).iter().enumerate() {
            assert_eq!(chosen[i + 1].as_f64().unwrap() as f32, wanted.chosen, "token {}", i + 1);
            let best = top[i + 1].as_object().unwrap().values().map(|v| v.as_f64().unwrap() as f32);
            assert_eq!(best.fold(f32::MIN, f32::max), wanted.top[0].1);
            assert!(top[i + 1].get(tokens[i + 1].as_str().unwrap()).is_some(), "the one that is there");
        }
        let text = choice["text"].as_str().unwrap();
        let end = text.chars().count() as u64;
        let offsets: Vec<u64> = offsets.iter().map(|o| o.as_u64().unwrap()).collect();
        assert!(offsets.is_sorted() && offsets.iter().all(|o| *o <= end), "{offsets:?} of {end}");
    };
    let first: Vec<u32> = vec![1, 87, 85, 289, 201, 74];
    let second: Vec<u32> = (0..300).map(|i| 3 + i * 7 % 1000).collect();
    // The request of the harness: lists of ids, one token, which it leaves out again.
    let base = json!({"max_tokens": 1, "logprobs": 2, "echo": true, "temperature": 0, "seed": 1234});
    let harness = complete(with(&base, json!({"prompt": [first, second]})));
    check(&harness["choices"][0], &first, 1);
    check(&harness["choices"][1], &second, 1);
    assert_eq!(harness["usage"]["prompt_tokens"], first.len() + second.len());
    // No token at all; one list of ids, a text, texts.
    let none = complete(with(&base, json!({"prompt": first, "max_tokens": 0})));
    check(&none["choices"][0], &first, 0);
    assert_eq!(
        (&none["choices"][0]["finish_reason"], &none["usage"]["completion_tokens"]),
        (&json!("length"), &json!(0))
    );
    let words = "There are 2 boxes. Add 3 buttons.";
    let ids: Vec<u32> = served.post("/tokenize", &json!({"prompt": words})).1["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect();
    let texts = complete(with(&base, json!({"prompt": [words, "Why?"], "max_tokens": 0})));
    check(&texts["choices"][0], &ids, 0);
    assert_eq!((&texts["choices"][0]["text"], &texts["choices"][1]["text"]), (&json!(words), &json!("Why?")));
    // Where a token begins, its text stands.
    let logprobs = &texts["choices"][0]["logprobs"];
    for (token, offset) in
        logprobs["tokens"].as_array().unwrap().iter().zip(logprobs["text_offset"].as_array().unwrap())
    {
        let (token, at) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        let rest: String = words.chars().skip(at).collect();
        assert!(
            rest.starts_with(if at == 0 { token.trim_start() } else { token }) || token.starts_with('<'),
            "{token:?} at {at}: {rest:?}"
        );
    }
    // The answer is the same with and without, whole and streamed, and echo works without scores.
    for more in [
        json!({"temperature": 0}),
        json!({"temperature": 0.9, "seed": 5}),
        json!({"n": 2, "seed": 3, "temperature": 1}),
    ] {
        let long = with(&base, json!({"prompt": [words, first], "max_tokens": 24}));
        let scored = with(&long, more);
        let echoed = with(&scored, json!({"logprobs": null}));
        let plain = with(&echoed, json!({"echo": false}));
        let [scored_whole, echoed, plain] = [&scored, &echoed, &plain].map(|body| complete(body.clone()));
        let parts = served.stream("/v1/completions", &scored);
        for (i, choice) in scored_whole["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(choice["text"], echoed["choices"][i]["text"]);
            let text = choice["text"].as_str().unwrap();
            assert!(text.ends_with(plain["choices"][i]["text"].as_str().unwrap()), "{text}");
            let chunks: Vec<&Value> = parts
                .iter()
                .filter_map(|part| part["choices"].get(0))
                .filter(|chunk| chunk["index"] == i)
                .collect();
            let streamed: String = chunks.iter().map(|chunk| chunk["text"].as_str().unwrap()).collect();
            assert_eq!(streamed, text);
            for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let lists = chunks.iter().filter_map(|chunk| chunk["logprobs"][name].as_array());
                let joined: Vec<Value> = lists.flatten().cloned().collect();
                assert_eq!(json!(joined), choice["logprobs"][name], "{name}");
            }
        }
    }
    served.refused("/v1/completions", r#"{"prompt":"a","max_tokens":-1}"#, 400, Some("max_tokens"), "from 0");
    served.refused(
        "/v1/chat/completions",
        &with(&ask("Why?"), json!({"max_tokens": 0})).to_string(),
        400,
        Some("max_tokens"),
        "from 1",
    );
    let empty = complete(json!({"prompt": "Why?", "max_tokens": 0}));
    assert_eq!(
        (&empty["choices"][0]["text"], &empty["choices"][0]["finish_reason"]),
        (&json!(""), &json!("length"))
    );
    let whole: Vec<u32> = (0..1024).map(|i| 3 + i % 1000).collect();
    check(&complete(with(&base, json!({"prompt": whole, "max_tokens": 0})))["choices"][0], &whole, 0);
}

#[test]
fn the_accept_length_is_committed_tokens_per_verify_step() {
    let served = Served::start(with_bundle(), &["--bundle", "bundle"]);
    let base = with(&ask("Tell me a story."), json!({"max_tokens": 31, "ignore_eos": true}));
    for plan in [json!({"chain": 4}), json!("auto"), json!("none")] {
        let body = with(&base, json!({"draftsmith": {"draft": plan, "trace": true}}));
        let answer = served.chat(&body);
        let (said, tokens) = (&answer["draftsmith"], &answer["choices"][0]["draftsmith"]["tokens"]);
        let origins: Vec<&str> =
            tokens.as_array().unwrap().iter().map(|token| token["origin"].as_str().unwrap()).collect();
        assert_eq!(origins.len(), 31);
        // The first token comes from the prompt's pass; a step ends with the target's own token, or where it is cut.
        let own = origins[1..].iter().filter(|origin| **origin != "draft").count();
        let steps = own + usize::from(origins.last() == Some(&"draft"));
        assert_eq!(
            (&said["committed_tokens"], &said["verify_steps"]),
            (&json!(30), &json!(steps)),
            "{answer}"
        );
        // Read back from text, which may cost the last bit.
        let said = said["accept_length"].as_f64().unwrap();
        assert!((said * steps as f64 - 30.0).abs() < 1e-9, "{plan}: {said} in {steps} steps");
    }
    let ratio = |name: &str| served.counter(&format!("draftsmith:{name}_total"), "");
    assert_eq!(ratio("committed_tokens"), 90.0);
    assert!(ratio("verify_steps") >= 31.0 && ratio("verify_steps") <= 90.0);
    let (committed, steps) = (ratio("committed_tokens"), ratio("verify_steps"));
    let live = served.get("/api/state").1["draft"]["accept_length"].as_f64();
    // That of answers with a draft.
    assert!(live >= Some(1.0), "{live:?}, {committed} in {steps}");
}

#[test]
fn hosts_are_names_or_addresses_and_a_budget_holds_a_sequence() {
    for host in ["localhost", "127.0.0.1", "[::1]", "::1", "::"] {
        if host.contains(':') && std::net::TcpListener::bind("[::1]:0").is_err() {
            continue;
        }
        let served = Served::start(Home::new(), &["--host", host]);
        assert_eq!(served.get("/health").0, 200, "{host}: {}", served.url);
    }
    let home = Home::new();
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let serve =
        |more: &[&str]| home.snapshot(&[&["serve", "--target", &target, "--port", "0"], more].concat());
    insta::assert_snapshot!(serve(&["--host", ""]));
    insta::assert_snapshot!(serve(&["--allow-origin", "app.local"]));
    let ended = home.run(&["serve", "--target", &target, "--port", "0", "--host", "no-such-host.invalid"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("`--host no-such-host.invalid` is not found"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: give a name or an address"), "{}", ended.stderr);
    for (budget, room) in [("1", 1), ("1KiB", 0)] {
        let ended = home.run(&["serve", "--target", &target, "--port", "0", "--kv-budget", budget]);
        let wanted = format!(
            "error: `--kv-budget {budget}` has room for {room} of the 14 tokens that the shortest chat"
        );
        assert_eq!(ended.code, Some(2));
        assert!(ended.stderr.contains(&wanted), "{}", ended.stderr);
    }
    // What the hint names works.
    let least = |budget: &str| {
        let ended = home.run(&["serve", "--target", &target, "--port", "0", "--kv-budget", budget]);
        let (_, rest) = ended.stderr.split_once("give `--kv-budget ").unwrap();
        rest.split_once('`').unwrap().0.to_string()
    };
    for budget in ["1", "1KiB"] {
        let served = Served::start(Home::new(), &["--kv-budget", &least(budget)]);
        served.chat(&with(&ask("a"), json!({"max_tokens": 1})));
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ended = home.run(&["serve", "--target", &target, "--host", "127.0.0.1", "--port", &port]);
    assert_eq!(ended.code, Some(2));
    assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: another program listens there"), "{}", ended.stderr);
}
