//! Answers in OpenAI's words: the parts that whole and streamed answers share, and whole answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use draftsmith_core::{AcceptStats, TokenLogprobs};
use draftsmith_decode::TokenOrigin;
use draftsmith_text::Tokenizer;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::ask::{Asked, Form};
use super::echo::{Columns, finite, top};
use super::error::ApiError;
use crate::queue::{End, Event, Outcome};
use crate::speech::{Delta, Shown};
use crate::{App, Service, unix_s};

/// What every part of an answer begins with.
pub(crate) struct Head {
    pub(crate) form: Form,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    tokenizer: Arc<Tokenizer>,
}

impl Head {
    pub(super) fn new(app: &App, service: &Service, form: Form) -> Head {
        let number = app.next_id.fetch_add(1, Ordering::Relaxed);
        let prefix = match form {
            Form::Chat => "chatcmpl",
            Form::Completion => "cmpl",
        };
        Head {
            form,
            id: format!("{prefix}-{:016x}{number:08x}", app.start),
            created: unix_s(),
            model: service.name.clone(),
            fingerprint: service.fingerprint.clone(),
            tokenizer: Arc::clone(&service.tokenizer),
        }
    }

    /// An answer or a part of one.
    pub(super) fn object(&self, streamed: bool, choices: Value) -> Map<String, Value> {
        let object = match (self.form, streamed) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Completion, _) => "text_completion",
        };
        let mut map = Map::new();
        map.insert("id".into(), self.id.as_str().into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.as_str().into());
        map.insert("system_fingerprint".into(), self.fingerprint.as_str().into());
        map.insert("choices".into(), choices);
        map
    }

    /// Log-probabilities of tokens; `offset` is where the first one stands in the text, in characters.
    pub(super) fn logprobs(&self, tokens: &[Shown], offset: usize) -> Value {
        match self.form {
            Form::Chat => self.chat_logprobs(tokens),
            Form::Completion => self.completion_logprobs(tokens, offset).into_json(),
        }
    }

    /// Log-probabilities of a prompt that stands before its answers: of the request's sequence `index`.
    pub(super) fn prompt_logprobs(&self, asked: &Asked, index: usize, scores: &[TokenLogprobs]) -> Columns {
        let prompt = index / asked.n;
        match &asked.echo {
            Some(echo) => echo[prompt].logprobs(&self.tokenizer, &asked.prompts[prompt], scores),
            None => Columns::default(),
        }
    }

    fn chat_logprobs(&self, tokens: &[Shown]) -> Value {
        let entry = |bytes: &[u8], logprob: f32| {
            let token = String::from_utf8_lossy(bytes);
            json!({"token": token, "logprob": finite(logprob), "bytes": bytes})
        };
        let content: Vec<Value> = tokens
            .iter()
            .filter_map(|shown| {
                let logprobs = shown.event.logprobs.as_ref()?;
                let mut value = entry(&shown.bytes, logprobs.chosen);
                let top = logprobs.top.iter().map(|(id, p)| entry(self.tokenizer.token_to_piece(*id), *p));
                value["top_logprobs"] = top.collect();
                Some(value)
            })
            .collect();
        json!({"content": content, "refusal": null})
    }

    pub(super) fn completion_logprobs(&self, tokens: &[Shown], mut offset: usize) -> Columns {
        let mut columns = Columns::default();
        for shown in tokens {
            let Some(logprobs) = &shown.event.logprobs else { continue };
            let text = String::from_utf8_lossy(&shown.bytes).into_owned();
            columns.offsets.push(offset.into());
            offset += text.chars().count();
            columns.tokens.push(text.into());
            columns.chosen.push(finite(logprobs.chosen).into());
            columns.top.push(top(&self.tokenizer, shown.event.id, logprobs));
        }
        columns
    }

    /// How each token came about, for those who asked.
    pub(super) fn trace(tokens: &[Shown]) -> Value {
        let token = |shown: &Shown| {
            let origin = match shown.event.origin {
                TokenOrigin::Plain => "plain",
                TokenOrigin::Draft => "draft",
                TokenOrigin::Recovered => "recovered",
                TokenOrigin::Bonus => "bonus",
            };
            let text = String::from_utf8_lossy(&shown.bytes);
            json!({"id": shown.event.id, "text": text, "origin": origin})
        };
        json!({"tokens": tokens.iter().map(token).collect::<Vec<_>>()})
    }
}

/// What a request used.
pub(super) fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// The word for why an answer ended, or the error that it broke off with.
pub(super) fn finish_reason(
    outcome: &Outcome,
    asked: &Asked,
    timeout_s: f64,
) -> Result<&'static str, ApiError> {
    match outcome {
        // JSON that is not complete must not look complete.
        Outcome::Stop if asked.grammar.as_ref().is_some_and(|grammar| grammar.was_cut()) => Ok("length"),
        Outcome::Stop => Ok("stop"),
        Outcome::Length => Ok("length"),
        Outcome::Timeout => Err(ApiError::timeout(timeout_s)),
        Outcome::Drained => Err(ApiError::draining()),
        Outcome::Refused(message) => Err(ApiError::internal(message.clone())),
        Outcome::Failed(message) => Err(ApiError::failed(message)),
    }
}

/// Counts over the sequences of one request.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) tokens: usize,
    stats: AcceptStats,
    prefill: Duration,
    decode: Duration,
}

impl Sums {
    pub(super) fn add(&mut self, end: &End) {
        self.tokens += end.tokens;
        self.stats.add(&end.stats);
        self.prefill = self.prefill.max(end.prefill);
        self.decode = self.decode.max(end.decode);
    }

    /// Adds `metrics` as vLLM has it, and our times.
    pub(super) fn describe(&self, object: &mut Map<String, Value>) {
        let stats = &self.stats;
        let drafts = stats.proposals_at.first().copied().unwrap_or(0);
        let per_draft = |count: u64| (drafts > 0).then(|| count as f64 / drafts as f64);
        // Of the proposals that kept `n` tokens or more, those that kept `n + 1` or more are no longer among `n`.
        let kept: Vec<u64> = std::iter::once(drafts).chain(stats.accepted_at.iter().copied()).collect();
        let next = kept.iter().skip(1).copied().chain([0]);
        let histogram: Vec<u64> = kept.iter().zip(next).map(|(n, next)| n.saturating_sub(next)).collect();
        let metrics = json!({"speculative_decoding": {
            "mean_acceptance_length": per_draft(drafts + stats.accepted_drafts),
            "draft_acceptance_rate": stats.draft_accept_rate(),
            "acceptance_histogram": histogram,
            "num_spec_steps": drafts,
            "num_draft_tokens": stats.proposed_drafts,
            "num_accepted_draft_tokens": stats.accepted_drafts,
        }});
        object.insert("metrics".into(), metrics);
        let ours = object.entry("draftsmith").or_insert_with(|| json!({}));
        // vLLM's mean counts steps with a proposal only; this is the accept length of the glossary.
        ours["accept_length"] = stats.accept_len().into();
        ours["verify_steps"] = stats.verify_steps.into();
        ours["committed_tokens"] = stats.committed_tokens.into();
        ours["prefill_ms"] = (self.prefill.as_secs_f64() * 1e3).into();
        ours["decode_ms"] = (self.decode.as_secs_f64() * 1e3).into();
    }
}

/// One choice on its way to being whole.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<Shown>,
    /// Of the prompt.
    scores: Vec<TokenLogprobs>,
    reason: Option<&'static str>,
}

impl Choice {
    fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
    }
}

/// Waits for every sequence and writes the answer.
pub(super) async fn whole(
    head: &Head,
    asked: &Asked,
    mut events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
) -> Result<Response, ApiError> {
    let mut choices: Vec<Choice> = (0..asked.sequences()).map(|_| Choice::default()).collect();
    let mut sums = Sums::default();
    while let Some((choice, event)) = events.recv().await {
        match event {
            Event::Prompt(scores) => choices[choice].scores = scores,
            Event::Delta(delta) => choices[choice].add(delta),
            Event::End(end) => {
                choices[choice].reason = Some(finish_reason(&end.outcome, asked, timeout_s)?);
                sums.add(&end);
                choices[choice].add(end.rest);
            }
        }
    }
    let mut written = Vec::with_capacity(choices.len());
    for (index, choice) in choices.into_iter().enumerate() {
        let reason = choice.reason.ok_or_else(|| ApiError::internal("the engine ended"))?;
        let echo = asked.echo.as_ref().map(|echo| &echo[index / asked.n]);
        let logprobs = match (asked.options.logprobs, asked.options.prompt_logprobs) {
            (Some(_), None) => head.logprobs(&choice.tokens, echo.map_or(0, |echo| echo.chars())),
            (Some(_), Some(_)) => {
                let mut columns = head.prompt_logprobs(asked, index, &choice.scores);
                let offset = echo.map_or(0, |echo| echo.chars());
                columns.extend(head.completion_logprobs(&choice.tokens, offset));
                columns.into_json()
            }
            (None, _) => Value::Null,
        };
        let echo = echo.map_or("", |echo| echo.text.as_str());
        let mut value = match head.form {
            Form::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": null},
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
            Form::Completion => json!({
                "index": index,
                "text": format!("{echo}{}", choice.text),
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
        };
        if asked.trace {
            value["draftsmith"] = Head::trace(&choice.tokens);
        }
        written.push(value);
    }
    let mut object = head.object(false, Value::Array(written));
    object.insert("usage".into(), usage(asked.prompt_tokens(), sums.tokens));
    if asked.trace {
        sums.describe(&mut object);
    }
    Ok(Json(Value::Object(object)).into_response())
}
