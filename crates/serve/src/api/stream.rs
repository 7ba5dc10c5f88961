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
use crate::queue::{End, Event};
use crate::speech::{Delta, Shown};

/// While nothing is to say, a comment tells the reader that we are still there.
const SILENCE: Duration = Duration::from_secs(15);

/// The body of a streamed answer.
pub(super) fn body(
    head: Head,
    asked: Asked,
    events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
) -> Body {
    let sequences = asked.sequences();
    let writer = Writer {
        head,
        asked,
        timeout_s,
        sums: Sums::default(),
        begun: vec![false; sequences],
        scores: vec![Vec::new(); sequences],
        offsets: vec![0; sequences],
        open: sequences,
        lines: VecDeque::new(),
        done: false,
    };
    Body::from_stream(unfold((writer, events), async |(mut writer, mut events)| {
        loop {
            if let Some(line) = writer.lines.pop_front() {
                return Some((Ok::<_, Infallible>(line), (writer, events)));
            }
            if writer.done {
                return None;
            }
            match tokio::time::timeout(SILENCE, events.recv()).await {
                Err(_) => return Some((Ok(": waiting\n\n".to_string()), (writer, events))),
                Ok(Some((choice, Event::Prompt(scores)))) => writer.scores[choice] = scores,
                Ok(Some((choice, Event::Delta(delta)))) => writer.delta(choice, &delta),
                Ok(Some((choice, Event::End(end)))) => writer.end(choice, &end),
                Ok(None) => writer.fail(&ApiError::internal("the engine ended")),
            }
        }
    }))
}

struct Writer {
    head: Head,
    asked: Asked,
    timeout_s: f64,
    sums: Sums,
    /// Choices whose first event is out.
    begun: Vec<bool>,
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

    /// One choice of a chunk.
    fn choice(&self, index: usize, text: Option<&str>, reason: Option<&str>, tokens: &[Shown]) -> Value {
        let logprobs = match self.asked.options.logprobs {
            Some(_) if !tokens.is_empty() => self.head.logprobs(tokens, self.offsets[index]),
            _ => Value::Null,
        };
        match self.head.form {
            Form::Chat => {
                let delta = text.map_or_else(|| json!({}), |text| json!({"content": text}));
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
            }
            Form::Completion => json!({
                "index": index, "text": text.unwrap_or_default(), "logprobs": logprobs, "finish_reason": reason,
            }),
        }
    }

    /// What comes before the first text of a choice.
    fn begin(&mut self, index: usize) {
        if std::mem::replace(&mut self.begun[index], true) {
            return;
        }
        let choice = match self.head.form {
            Form::Chat => json!({
                "index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null,
                "finish_reason": null,
            }),
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
        self.begin(index);
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
        self.sums.add(end);
        let reason = match finish_reason(&end.outcome, &self.asked, self.timeout_s) {
            Ok(reason) => reason,
            Err(error) => return self.fail(&error),
        };
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
            chunk.insert("usage".into(), usage(self.asked.prompt_tokens(), self.sums.tokens));
            self.send(&Value::Object(chunk));
        }
        self.lines.push_back("data: [DONE]\n\n".into());
        self.done = true;
    }

    /// The answer breaks off: no `[DONE]`, so nobody takes it for whole.
    fn fail(&mut self, error: &ApiError) {
        self.send(&error.body());
        self.done = true;
    }
}
