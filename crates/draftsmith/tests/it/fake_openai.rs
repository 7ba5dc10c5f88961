//! An OpenAI-compatible server of our own: checks every field of every request against the protocol as recorded here,
//! answers as it is told, and fails in all the ways that servers and the proxies before them do.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use draftsmith::target::TargetText;
use draftsmith::text::{Message, RenderOptions};
use serde_json::{Value, json};

use crate::fake_http::{Life, Out, Request, same, serve_at};
use crate::support::repository;

/// How an answer goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// Says nothing for so long.
    Silence(Duration),
    /// 429 with `Retry-After`.
    Busy,
    Status(u16),
    /// The connection ends in the middle of a chunk.
    Cut,
    /// The stream ends cleanly, but before the answer does.
    EndsEarly,
    /// Closes without a word.
    Hangup,
    NoJson,
    /// The error page of a proxy, with status 200.
    Html,
    Huge,
    EmptyChoices,
    ErrorInside,
}

/// What the model says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    pub(crate) text: String,
    /// The token limit ended it.
    pub(crate) cut: bool,
    /// What it wrote, the stop token included; without it, the tokens of the text.
    pub(crate) ids: Option<Vec<u32>>,
}

/// What the server makes of a wish for token ids.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Ids {
    /// Nothing: fields that it does not know are ignored.
    #[default]
    Ignored,
    /// 400, as strict servers answer to fields that they do not know.
    Refused,
    /// 400 in streams alone.
    NotInStreams,
    /// Prompt and answer, as vLLM and SGLang give them.
    Given,
    /// The same, but the last token of each answer is lost on the way.
    Lossy,
}

/// What every request must look like.
#[derive(Clone)]
pub(crate) struct Protocol {
    /// `text`, `ids` or `chat`.
    pub(crate) api: &'static str,
    pub(crate) key: Option<&'static str>,
    /// Longest answer asked for.
    pub(crate) max_tokens: u64,
    /// Temperature and nucleus of sampled answers.
    pub(crate) sampled: (f64, f64),
    /// Fields that the run file adds.
    pub(crate) extra: BTreeMap<&'static str, Value>,
    /// Tokens that the server says to read more than we send.
    pub(crate) more_prompt_tokens: u64,
    /// Whether streams count tokens too.
    pub(crate) usage_in_streams: bool,
    /// Whether token ids are given.
    pub(crate) ids: Ids,
    /// Tokens that the server counts more than there are in answers.
    pub(crate) more_answer_tokens: i64,
    /// Models listed.
    pub(crate) models: Vec<&'static str>,
    /// Shows counters of drafts as vLLM does: 10 proposals per answer, 6 accepted at position 0, 2 at position 1.
    pub(crate) metrics: bool,
}

impl Default for Protocol {
    fn default() -> Protocol {
        Protocol {
            api: "text",
            key: None,
            max_tokens: 32,
            sampled: (0.8, 0.95),
            extra: BTreeMap::new(),
            more_prompt_tokens: 0,
            usage_in_streams: true,
            ids: Ids::Ignored,
            more_answer_tokens: 0,
            models: vec!["tiny"],
            metrics: false,
        }
    }
}

/// What is said to a wish for token ids.
const NO_IDS: &str = "unknown field `return_token_ids`";

type Speak = Box<dyn Fn(&str) -> Said + Send + Sync>;
type Fail = Box<dyn Fn(u64) -> Option<Fault> + Send + Sync>;

struct State {
    protocol: Protocol,
    text: TargetText,
    speak: Speak,
    fail: Fail,
    /// Rendered prompts of the answers that were asked for, faults included.
    prompts: Mutex<Vec<String>>,
    /// Faults injected.
    faults: Mutex<BTreeMap<String, u64>>,
    /// Requests that were not as they must be.
    wrong: Mutex<Vec<String>>,
}

/// A running server.
pub(crate) struct Fake {
    address: String,
    state: Arc<State>,
}

pub(crate) fn tiny_text() -> TargetText {
    TargetText::open(&repository().join("fixtures/tiny-target"), None).unwrap()
}

/// FNV-1a, for choices that depend on a text alone.
pub(crate) fn hash(text: &str) -> u64 {
    let mixed =
        text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    (mixed ^ (mixed >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

impl Fake {
    /// `speak` answers a rendered prompt; `fail` says what happens to the n-th request for an answer.
    pub(crate) fn start(
        protocol: Protocol,
        speak: impl Fn(&str) -> Said + Send + Sync + 'static,
        fail: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Fake::start_at(listener, Life::default(), protocol, speak, fail)
    }

    /// The same at an address that is taken already, until its life is over.
    pub(crate) fn start_at(
        listener: TcpListener,
        life: Life,
        protocol: Protocol,
        speak: impl Fn(&str) -> Said + Send + Sync + 'static,
        fail: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Fake {
        let address = format!("http://{}/v1", listener.local_addr().unwrap());
        let state = Arc::new(State {
            protocol,
            text: tiny_text(),
            speak: Box::new(speak),
            fail: Box::new(fail),
            prompts: Mutex::default(),
            faults: Mutex::default(),
            wrong: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        serve_at(listener, life, move |out, request| shared.answer(out, request));
        Fake { address, state }
    }

    pub(crate) fn url(&self) -> &str {
        &self.address
    }

    /// Rendered prompts since the last call. Panics if a request was not as it must be.
    #[track_caller]
    pub(crate) fn take_prompts(&self) -> Vec<String> {
        let wrong = self.state.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{wrong:#?}");
        std::mem::take(&mut *self.state.prompts.lock().unwrap())
    }

    /// Faults injected so far.
    pub(crate) fn faults(&self) -> BTreeMap<String, u64> {
        self.state.faults.lock().unwrap().clone()
    }
}

impl Out<'_> {
    fn begin_stream(&mut self) -> std::io::Result<()> {
        write!(
            self.0,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
    }

    fn chunk(&mut self, text: &str) -> std::io::Result<()> {
        write!(self.0, "{:x}\r\n{text}\r\n", text.len())?;
        self.0.flush()
    }

    fn event(&mut self, value: &Value) -> std::io::Result<()> {
        self.chunk(&format!("data: {value}\n\n"))
    }
}

impl State {
    fn answer(&self, out: &mut Out<'_>, request: &Request) -> std::io::Result<()> {
        let path = request.path();
        if path == "/metrics" {
            return match self.protocol.metrics {
                true => out.whole("200 OK", "text/plain; version=0.0.4", "", &self.metrics()),
                false => out.whole("404 Not Found", "text/plain", "", "none"),
            };
        }
        let asked = match self.check(path, request) {
            Ok(asked) => asked,
            Err(problem) if problem == NO_IDS => {
                let body = json!({ "error": { "message": problem } }).to_string();
                return out.whole("400 Bad Request", "application/json", "", &body);
            }
            Err(problem) => {
                self.wrong.lock().unwrap().push(format!("{}: {problem}", request.line));
                let body = json!({ "error": { "message": problem } }).to_string();
                return out.whole("400 Bad Request", "application/json", "", &body);
            }
        };
        if self
            .protocol
            .key
            .is_some_and(|key| request.headers.get("authorization") != Some(&format!("Bearer {key}")))
        {
            let sent = request.headers.get("authorization").cloned().unwrap_or_default();
            let body = json!({ "error": { "message": format!("wrong key: {sent}") } }).to_string();
            return out.whole("401 Unauthorized", "application/json", "", &body);
        }
        let Some((prompt, streamed, with_ids)) = asked else {
            let models: Vec<Value> =
                self.protocol.models.iter().map(|id| json!({ "id": id, "object": "model" })).collect();
            let body = json!({ "object": "list", "data": models }).to_string();
            return out.whole("200 OK", "application/json", "", &body);
        };
        let prompt_ids = self.text.tokenizer.encode(&prompt, false).unwrap();
        let tokens = prompt_ids.len() as u64 + self.protocol.more_prompt_tokens;
        let usage = |answer: usize| {
            let counted = answer as i64 + self.protocol.more_answer_tokens;
            json!({ "prompt_tokens": tokens, "completion_tokens": counted })
        };
        let with_ids = with_ids && !matches!(self.protocol.ids, Ids::Ignored);
        if !streamed {
            let usage = usage(1);
            let mut choice = match self.protocol.api {
                "chat" => {
                    json!({ "index": 0, "message": { "role": "assistant", "content": "x" }, "finish_reason": "length" })
                }
                _ => json!({ "index": 0, "text": "x", "finish_reason": "length" }),
            };
            if with_ids {
                choice["token_ids"] = json!([100]);
                choice["prompt_token_ids"] = json!(prompt_ids);
            }
            let body = json!({ "id": "1", "model": "tiny", "choices": [choice], "usage": usage }).to_string();
            return out.whole("200 OK", "application/json", "", &body);
        }
        let nth = {
            let mut prompts = self.prompts.lock().unwrap();
            prompts.push(prompt.clone());
            prompts.len() as u64 - 1
        };
        let mut said = (self.speak)(&prompt);
        let mut written = said.ids.take().unwrap_or_else(|| {
            let mut ids = self.text.tokenizer.encode(&said.text, false).unwrap();
            ids.extend((!said.cut).then_some(self.text.tokenizer.eos_ids()[0]));
            ids
        });
        let usage = usage(written.len());
        if self.protocol.ids == Ids::Lossy {
            written.pop();
        }
        said.ids = with_ids.then_some(written);
        match (self.fail)(nth) {
            None => self.stream(out, &said, usage, usize::MAX),
            Some(fault) => {
                *self.faults.lock().unwrap().entry(format!("{fault:?}")).or_default() += 1;
                self.fail_with(fault, out, &said, usage)
            }
        }
    }

    fn stream(&self, out: &mut Out<'_>, said: &Said, usage: Value, pieces: usize) -> std::io::Result<()> {
        out.begin_stream()?;
        let choice = |text: &str, finish: Value| {
            let mut choice = json!({ "index": 0, "finish_reason": finish, "logprobs": null });
            match self.protocol.api {
                "chat" => choice["delta"] = json!({ "content": text }),
                _ => choice["text"] = text.into(),
            }
            json!({ "id": "1", "object": "chunk", "model": "tiny", "choices": [choice] })
        };
        let mut ids = said.ids.as_deref().unwrap_or_default().iter();
        out.chunk(": a comment\n\n")?;
        let letters: Vec<char> = said.text.chars().collect();
        for (i, piece) in letters.chunks(7).take(pieces).enumerate() {
            // Answers arrive in no fixed order.
            std::thread::sleep(Duration::from_micros(hash(&format!("{}{i}", said.text)) % 3000));
            let mut event = choice(&piece.iter().collect::<String>(), Value::Null);
            if said.ids.is_some() {
                // As many as there are letters, so that some are left for the end.
                let some: Vec<u32> = ids.by_ref().take(2).copied().collect();
                event["choices"][0]["token_ids"] = some.into();
            }
            out.event(&event)?;
        }
        if pieces < usize::MAX {
            return Ok(());
        }
        let mut last = choice("", if said.cut { "length" } else { "stop" }.into());
        if said.ids.is_some() {
            last["choices"][0]["token_ids"] = ids.copied().collect();
        }
        out.event(&last)?;
        if self.protocol.usage_in_streams {
            out.event(&json!({ "id": "1", "choices": [], "usage": usage }))?;
        }
        out.chunk("data: [DONE]\n\n")?;
        out.chunk("")
    }

    fn metrics(&self) -> String {
        let n = self.prompts.lock().unwrap().len();
        let name = "vllm:spec_decode_num";
        format!(
            "# TYPE {name}_drafts_total counter\n{name}_drafts_total{{engine=\"0\"}} {}.0\n\
             {name}_accepted_tokens_total{{engine=\"0\"}} {}.0\n\
             {name}_accepted_tokens_per_pos_total{{engine=\"0\",position=\"0\"}} {}.0\n\
             {name}_accepted_tokens_per_pos_total{{engine=\"0\",position=\"1\"}} {}.0\n",
            10 * n,
            8 * n,
            6 * n,
            2 * n
        )
    }

    /// Every fault but a status ends the connection.
    fn fail_with(&self, fault: Fault, out: &mut Out<'_>, said: &Said, usage: Value) -> std::io::Result<()> {
        let gone = Err(std::io::ErrorKind::ConnectionAborted.into());
        match fault {
            Fault::Silence(time) => {
                std::thread::sleep(time);
                gone
            }
            Fault::Busy => out.whole(
                "429 Too Many Requests",
                "application/json",
                "Retry-After: 0.7\r\n",
                r#"{"error":{"message":"slow down"}}"#,
            ),
            Fault::Status(status) => out.whole(&format!("{status} Trouble"), "text/plain", "", "try later"),
            Fault::Cut => {
                self.stream(out, said, usage, 2)?;
                let _ = write!(out.0, "40\r\ndata: {{\"choices\":[{{\"te");
                gone
            }
            Fault::EndsEarly => {
                self.stream(out, said, usage, 1)?;
                out.chunk("")
            }
            Fault::Hangup => gone,
            Fault::NoJson => {
                out.begin_stream()?;
                out.chunk("data: {\"choices\": [{]}\n\n")?;
                out.chunk("")
            }
            Fault::Html => out.whole("200 OK", "text/html", "", "<html>Bad gateway</html>"),
            Fault::Huge => {
                out.begin_stream()?;
                let chunk = "x".repeat(1 << 16);
                // The client must hang up long before.
                (0..4096).try_for_each(|_| out.chunk(&chunk))?;
                gone
            }
            Fault::EmptyChoices => {
                out.begin_stream()?;
                out.event(&json!({ "choices": [] , "usage": usage }))?;
                out.chunk("data: [DONE]\n\n")?;
                out.chunk("")
            }
            Fault::ErrorInside => {
                out.begin_stream()?;
                out.event(&json!({ "error": { "message": "CUDA out of memory", "code": 500 } }))?;
                out.chunk("")
            }
        }
    }

    /// The prompt as the model would see it, whether a stream is wanted, and token ids; `None` for the list of models.
    fn check(&self, path: &str, request: &Request) -> Result<Option<(String, bool, bool)>, String> {
        let header = |name: &str| request.header(name);
        if !header("user-agent").starts_with("draftsmith/") {
            return Err(format!("user agent `{}`", header("user-agent")));
        }
        if self.protocol.key.is_none() && request.headers.contains_key("authorization") {
            return Err("a key that nobody asked for".to_string());
        }
        if path == "/v1/models" {
            same("accept", header("accept"), "application/json")?;
            same("method", request.method(), "GET")?;
            return Ok(None);
        }
        let chat = self.protocol.api == "chat";
        same("path", path, if chat { "/v1/chat/completions" } else { "/v1/completions" })?;
        same("method", request.method(), "POST")?;
        same("content type", header("content-type"), "application/json")?;
        let body: Value = serde_json::from_slice(&request.body).map_err(|e| e.to_string())?;
        let mut fields = body.as_object().ok_or("no object")?.clone();
        let mut take = |name: &str| fields.remove(name).unwrap_or(Value::Null);
        let streamed = take("stream") == true;
        if streamed {
            same("accept", header("accept"), "text/event-stream")?;
            same("stream options", &take("stream_options").to_string(), r#"{"include_usage":true}"#)?;
        } else {
            same("accept", header("accept"), "application/json")?;
        }
        let with_ids = take("return_token_ids") == true;
        if with_ids
            && (self.protocol.ids == Ids::Refused || streamed && self.protocol.ids == Ids::NotInStreams)
        {
            return Err(NO_IDS.to_string());
        }
        if with_ids && streamed && self.protocol.ids == Ids::Ignored {
            return Err("token ids are asked for, though the first answer had none".to_string());
        }
        same("model", &take("model").to_string(), "\"tiny\"")?;
        same("stop", &take("stop").to_string(), &json!(self.stops()).to_string())?;
        let max_tokens = take("max_tokens").as_u64().ok_or("no max_tokens")?;
        if max_tokens == 0 || max_tokens > if streamed { self.protocol.max_tokens } else { 1 } {
            return Err(format!("max_tokens is {max_tokens}"));
        }
        let temperature = take("temperature").as_f64().ok_or("no temperature")?;
        if temperature != 0.0 {
            let top_p = take("top_p").as_f64().ok_or("no top_p")?;
            if (temperature, top_p) != self.protocol.sampled {
                return Err(format!("temperature {temperature}, top_p {top_p}"));
            }
            let seed = take("seed").as_u64().ok_or("no seed")?;
            if seed > i32::MAX as u64 {
                return Err(format!("seed {seed} needs more than 31 bits"));
            }
        }
        let prompt = if chat {
            let messages = take("messages");
            let messages = messages.as_array().ok_or("no messages")?;
            let messages: Vec<Message> =
                messages.iter().map(|m| serde_json::from_value(m.clone()).unwrap()).collect();
            let ask = RenderOptions::default().with_generation_prompt(true);
            self.text.template().unwrap().render(&messages, &ask).unwrap()
        } else {
            match (self.protocol.api, take("prompt")) {
                ("text", Value::String(text)) => text,
                ("ids", Value::Array(ids)) => {
                    let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
                    self.text.tokenizer.decode(&ids, false)
                }
                (api, other) => return Err(format!("prompt `{other}` for `{api}`")),
            }
        };
        for (name, value) in &self.protocol.extra {
            same(name, &take(name).to_string(), &value.to_string())?;
        }
        if fields.is_empty() {
            Ok(Some((prompt, streamed, with_ids)))
        } else {
            Err(format!("fields {fields:?}"))
        }
    }

    fn stops(&self) -> Vec<String> {
        let tokenizer = &self.text.tokenizer;
        let piece = |id: &u32| String::from_utf8_lossy(tokenizer.token_to_piece(*id)).into_owned();
        tokenizer.eos_ids().iter().map(piece).collect()
    }
}
