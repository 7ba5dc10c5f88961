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
use super::ledger::Ledger;
use crate::fleet::Lease;
use crate::queue::{End, Event, Outcome};
use crate::speech::{Delta, Shown};
use crate::tools::Part;
use crate::{App, unix_s};

/// What every part of an answer begins with.
pub(crate) struct Head {
    pub(crate) form: Form,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    fingerprint: String,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Until the answer has ended, its model stays.
    _model: Lease,
}

impl Head {
    pub(super) fn new(app: &App, service: Lease, form: Form) -> Head {
        let number = app.next_id.fetch_add(1, Ordering::Relaxed);
        let prefix = match form {
            Form::Chat => "chatcmpl",
            Form::Completion => "cmpl",
            Form::Responses => "resp",
        };
        let mark = if form == Form::Responses { '_' } else { '-' };
        Head {
            form,
            id: format!("{prefix}{mark}{:016x}{number:08x}", app.start),
            created: unix_s(),
            model: service.name.clone(),
            fingerprint: service.fingerprint.clone(),
            tokenizer: Arc::clone(&service.tokenizer),
            _model: service,
        }
    }

    /// An answer or a part of one.
    pub(super) fn object(&self, streamed: bool, choices: Value) -> Map<String, Value> {
        let object = match (self.form, streamed) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Completion, _) => "text_completion",
            // Has a form of its own.
            (Form::Responses, _) => "response",
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
            Form::Chat | Form::Responses => self.chat_logprobs(tokens),
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
        json!({"tokens": Head::traced(tokens)})
    }

    /// The same as a list.
    pub(super) fn traced(tokens: &[Shown]) -> Vec<Value> {
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
        tokens.iter().map(token).collect()
    }
}

/// What a request used.
pub(super) fn usage(asked: &Asked, sums: &Sums) -> Value {
    let prompt_tokens = asked.prompt_tokens();
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sums.tokens,
        "total_tokens": prompt_tokens + sums.tokens,
        "prompt_tokens_details": {"cached_tokens": sums.cached_tokens()},
    })
}

/// The word for why an answer ended, or the error that it broke off with. `called`: it has calls.
pub(super) fn finish_reason(
    outcome: &Outcome,
    asked: &Asked,
    called: bool,
    timeout_s: f64,
) -> Result<&'static str, ApiError> {
    match outcome {
        // JSON that is not complete must not look complete.
        Outcome::Stop if asked.grammar.as_ref().is_some_and(|grammar| grammar.was_cut()) => Ok("length"),
        Outcome::Stop if called => Ok("tool_calls"),
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
    /// Of each prompt, what its first sequence found in a kept cache.
    cached: Vec<usize>,
    stats: AcceptStats,
    prefill: Duration,
    decode: Duration,
}

impl Sums {
    /// Adds the end of the request's sequence `index`.
    pub(super) fn add(&mut self, asked: &Asked, index: usize, end: &End) {
        self.cached.resize(asked.prompts.len(), 0);
        if index.is_multiple_of(asked.n) {
            self.cached[index / asked.n] = end.cached;
        }
        self.tokens += end.tokens;
        self.stats.add(&end.stats);
        self.prefill = self.prefill.max(end.prefill);
        self.decode = self.decode.max(end.decode);
    }

    /// Tokens of the prompts that were in kept caches.
    pub(super) fn cached_tokens(&self) -> usize {
        self.cached.iter().sum()
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

/// Something that an answer is made of, in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Text(String),
    Call { id: String, name: String, arguments: String },
}

/// One choice on its way to being whole.
#[derive(Default)]
pub(super) struct Choice {
    pub(super) items: Vec<Item>,
    pub(super) tokens: Vec<Shown>,
    /// Of the prompt.
    scores: Vec<TokenLogprobs>,
    pub(super) reason: Option<&'static str>,
}

impl Choice {
    fn add(&mut self, delta: Delta, has_tools: bool) {
        self.tokens.extend(delta.tokens);
        if !has_tools {
            return self.say(&delta.text);
        }
        for part in delta.parts {
            match part {
                Part::Text(text) => self.say(&text),
                Part::Call { id, name, .. } => {
                    self.items.push(Item::Call { id, name, arguments: String::new() });
                }
                Part::Arguments { text, .. } => {
                    if let Some(Item::Call { arguments, .. }) = self.items.last_mut() {
                        arguments.push_str(&text);
                    }
                }
            }
        }
    }

    fn say(&mut self, text: &str) {
        match self.items.last_mut() {
            Some(Item::Text(before)) => before.push_str(text),
            _ if text.is_empty() => {}
            _ => self.items.push(Item::Text(text.to_owned())),
        }
    }

    fn called(&self) -> bool {
        self.items.iter().any(|item| matches!(item, Item::Call { .. }))
    }

    /// Its text.
    fn text(&self) -> String {
        let texts = self.items.iter().filter_map(|item| match item {
            Item::Text(text) => Some(text.as_str()),
            Item::Call { .. } => None,
        });
        texts.collect()
    }

    /// As a chat has it.
    fn message(&self) -> Value {
        let text = self.text();
        if !self.called() {
            return json!({"role": "assistant", "content": text, "refusal": null});
        }
        let content = if text.is_empty() { Value::Null } else { text.into() };
        let calls = self.items.iter().filter_map(|item| match item {
            Item::Text(_) => None,
            Item::Call { id, name, arguments } => Some(json!({
                "id": id, "type": "function", "function": {"name": name, "arguments": arguments},
            })),
        });
        json!({
            "role": "assistant", "content": content, "refusal": null, "tool_calls": calls.collect::<Vec<_>>(),
        })
    }
}

/// Waits for every sequence.
pub(super) async fn gather(
    asked: &Asked,
    mut events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
    ledger: &mut Ledger,
) -> Result<(Vec<Choice>, Sums), ApiError> {
    let mut choices: Vec<Choice> = (0..asked.sequences()).map(|_| Choice::default()).collect();
    let mut sums = Sums::default();
    let has_tools = asked.tools.is_some();
    while let Some((index, event)) = events.recv().await {
        let Some(event) = ledger.see(index, event) else { continue };
        let choice = &mut choices[index];
        match event {
            Event::Prompt(scores) => choice.scores = scores,
            Event::Delta(delta) => choice.add(delta, has_tools),
            Event::End(end) => {
                sums.add(asked, index, &end);
                ledger.cached(sums.cached_tokens());
                let outcome = end.outcome.clone();
                choice.add(end.rest.clone(), has_tools);
                let reason = finish_reason(&outcome, asked, choice.called(), timeout_s)?;
                ledger.end(&end, reason);
                choice.reason = Some(reason);
            }
        }
    }
    match choices.iter().all(|choice| choice.reason.is_some()) {
        true => Ok((choices, sums)),
        false => Err(ApiError::internal("the engine ended")),
    }
}

/// Waits for every sequence and writes the answer.
pub(super) async fn whole(
    head: &Head,
    asked: &Asked,
    events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
    ledger: &mut Ledger,
) -> Result<Response, ApiError> {
    let (choices, sums) = gather(asked, events, timeout_s, ledger).await?;
    let mut written = Vec::with_capacity(choices.len());
    for (index, choice) in choices.into_iter().enumerate() {
        let reason = choice.reason;
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
            Form::Chat | Form::Responses => json!({
                "index": index,
                "message": choice.message(),
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
            Form::Completion => json!({
                "index": index,
                "text": format!("{echo}{}", choice.text()),
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
    object.insert("usage".into(), usage(asked, &sums));
    if asked.trace {
        sums.describe(&mut object);
    }
    Ok(Json(Value::Object(object)).into_response())
}
