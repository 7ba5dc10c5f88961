//! Streamed answers: server-sent events, one for each step that made text certain.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use draftsmith_core::TokenLogprobs;
use futures_util::stream::unfold;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::answer::{Head, Sums, finish_reason, usage};
use super::ask::{Asked, Form};
use super::error::ApiError;
use super::ledger::Ledger;
use crate::queue::{End, Event};
use crate::speech::{Delta, Shown};
use crate::tools::Part;

/// While nothing is to say, a comment tells the reader that we are still there.
const SILENCE: Duration = Duration::from_secs(15);

/// The body of a streamed answer.
pub(super) fn body(
    head: Head,
    asked: Asked,
    events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
    ledger: Ledger,
) -> Body {
    let sequences = asked.sequences();
    let writer = Writer {
        head,
        asked,
        timeout_s,
        ledger,
        sums: Sums::default(),
        begun: vec![false; sequences],
        called: vec![false; sequences],
        scores: vec![Vec::new(); sequences],
        waiting: vec![Vec::new(); sequences],
        offsets: vec![0; sequences],
        open: sequences,
        lines: VecDeque::new(),
        done: false,
    };
    send(writer, events)
}

/// What writes the events of a stream.
pub(super) trait Writes: Send + 'static {
    /// The next event that is ready.
    fn next(&mut self) -> Option<String>;
    /// Nothing follows what is ready.
    fn is_done(&self) -> bool;
    fn take(&mut self, index: usize, event: Event);
    fn fail(&mut self, error: &ApiError);
}

/// The body that a writer makes of these events.
pub(super) fn send<W: Writes>(writer: W, events: UnboundedReceiver<(usize, Event)>) -> Body {
    Body::from_stream(unfold((writer, events), async |(mut writer, mut events)| {
        loop {
            if let Some(line) = writer.next() {
                return Some((Ok::<_, Infallible>(line), (writer, events)));
            }
            if writer.is_done() {
                return None;
            }
            match tokio::time::timeout(SILENCE, events.recv()).await {
                Err(_) => return Some((Ok(": waiting\n\n".to_string()), (writer, events))),
                Ok(Some((index, event))) => writer.take(index, event),
                Ok(None) => writer.fail(&ApiError::internal("the engine ended")),
            }
        }
    }))
}

struct Writer {
    head: Head,
    asked: Asked,
    timeout_s: f64,
    ledger: Ledger,
    sums: Sums,
    /// Choices whose first event is out.
    begun: Vec<bool>,
    /// Choices that have calls.
    called: Vec<bool>,
    /// Tokens of each choice that no event has shown: those of marks and names that are not certain.
    waiting: Vec<Vec<Shown>>,
    /// Log-probabilities of the prompts whose first event is not out.
    scores: Vec<Vec<TokenLogprobs>>,
    /// Characters of each choice that are out.
    offsets: Vec<usize>,
    /// Choices that go on.
    open: usize,
    /// Events to send.
    lines: VecDeque<String>,
    done: bool,
}

impl Writer {
    fn send(&mut self, value: &Value) {
        self.lines.push_back(format!("data: {value}\n\n"));
    }

    fn chunk(&self, choices: Value) -> Map<String, Value> {
        let mut chunk = self.head.object(true, choices);
        if self.asked.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk
    }

    /// Sends one choice with what it adds, and the tokens that wait.
    fn add(&mut self, index: usize, delta: Value, tokens: &[Shown]) {
        let mut shown = std::mem::take(&mut self.waiting[index]);
        shown.extend_from_slice(tokens);
        let mut choice = self.choice(index, None, None, &shown);
        choice["delta"] = delta;
        let mut chunk = self.chunk(json!([choice]));
        if self.asked.trace {
            chunk.insert("draftsmith".into(), Head::trace(&shown));
        }
        self.send(&Value::Object(chunk));
    }

    /// An answer that may have calls.
    fn parts(&mut self, index: usize, delta: &Delta) {
        let mut tokens = delta.tokens.as_slice();
        for part in &delta.parts {
            let added = match part {
                Part::Text(text) => {
                    self.begin(index, true);
                    json!({"content": text})
                }
                Part::Call { index: call, id, name } => {
                    self.begin(index, false);
                    self.called[index] = true;
                    json!({"tool_calls": [{
                        "index": call, "id": id, "type": "function", "function": {"name": name, "arguments": ""},
                    }]})
                }
                Part::Arguments { index: call, text } => {
                    json!({"tool_calls": [{"index": call, "function": {"arguments": text}}]})
                }
            };
            self.add(index, added, std::mem::take(&mut tokens));
        }
        self.waiting[index].extend_from_slice(tokens);
    }

    /// One choice of a chunk.
    fn choice(&self, index: usize, text: Option<&str>, reason: Option<&str>, tokens: &[Shown]) -> Value {
        let logprobs = match self.asked.options.logprobs {
            Some(_) if !tokens.is_empty() => self.head.logprobs(tokens, self.offsets[index]),
            _ => Value::Null,
        };
        match self.head.form {
            Form::Chat | Form::Responses => {
                let delta = text.map_or_else(|| json!({}), |text| json!({"content": text}));
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
            }
            Form::Completion => json!({
                "index": index, "text": text.unwrap_or_default(), "logprobs": logprobs, "finish_reason": reason,
            }),
        }
    }

    /// What comes before the first text of a choice. `text`: it does not begin with a call.
    fn begin(&mut self, index: usize, text: bool) {
        if std::mem::replace(&mut self.begun[index], true) {
            return;
        }
        let choice = match self.head.form {
            Form::Chat | Form::Responses => {
                let content = if text { json!("") } else { Value::Null };
                json!({
                    "index": index, "delta": {"role": "assistant", "content": content}, "logprobs": null,
                    "finish_reason": null,
                })
            }
            Form::Completion => {
                let Some(echo) = self.asked.echo.as_ref().map(|echo| &echo[index / self.asked.n]) else {
                    return;
                };
                let mut choice = self.choice(index, Some(&echo.text), None, &[]);
                self.offsets[index] += echo.chars();
                if self.asked.options.prompt_logprobs.is_some() {
                    let scores = std::mem::take(&mut self.scores[index]);
                    choice["logprobs"] = self.head.prompt_logprobs(&self.asked, index, &scores).into_json();
                }
                choice
            }
        };
        let chunk = self.chunk(json!([choice]));
        self.send(&Value::Object(chunk));
    }

    fn delta(&mut self, index: usize, delta: &Delta) {
        if self.asked.tools.is_some() {
            return self.parts(index, delta);
        }
        self.begin(index, true);
        if delta.is_empty() {
            return;
        }
        let choice = self.choice(index, Some(&delta.text), None, &delta.tokens);
        let mut chunk = self.chunk(json!([choice]));
        if self.asked.trace {
            chunk.insert("draftsmith".into(), Head::trace(&delta.tokens));
        }
        self.offsets[index] += delta.text.chars().count();
        self.send(&Value::Object(chunk));
    }

    fn end(&mut self, index: usize, end: &End) {
        self.delta(index, &end.rest);
        self.begin(index, true);
        self.sums.add(&self.asked, index, end);
        self.ledger.cached(self.sums.cached_tokens());
        let reason = match finish_reason(&end.outcome, &self.asked, self.called[index], self.timeout_s) {
            Ok(reason) => reason,
            Err(error) => return self.fail(&error),
        };
        self.ledger.end(end, reason);
        if !self.waiting[index].is_empty() {
            self.add(index, json!({}), &[]);
        }
        self.open -= 1;
        let choice = self.choice(index, None, Some(reason), &[]);
        let mut chunk = self.chunk(json!([choice]));
        if self.open == 0 && self.asked.trace {
            self.sums.describe(&mut chunk);
        }
        self.send(&Value::Object(chunk));
        if self.open > 0 {
            return;
        }
        if self.asked.include_usage {
            let mut chunk = self.head.object(true, json!([]));
            chunk.insert("usage".into(), usage(&self.asked, &self.sums));
            self.send(&Value::Object(chunk));
        }
        self.lines.push_back("data: [DONE]\n\n".into());
        self.ledger.close();
        self.done = true;
    }
}

impl Writes for Writer {
    fn next(&mut self) -> Option<String> {
        self.lines.pop_front()
    }

    fn is_done(&self) -> bool {
        self.done
    }

    fn take(&mut self, index: usize, event: Event) {
        let Some(event) = self.ledger.see(index, event) else { return };
        match event {
            Event::Prompt(scores) => self.scores[index] = scores,
            Event::Delta(delta) => self.delta(index, &delta),
            Event::End(end) => self.end(index, &end),
        }
    }

    /// The answer breaks off: no `[DONE]`, so nobody takes it for whole.
    fn fail(&mut self, error: &ApiError) {
        self.ledger.fail(error, true);
        self.ledger.close();
        self.send(&error.body());
        self.done = true;
    }
}
