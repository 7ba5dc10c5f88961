//! One line for the log about each request that asks for an answer, however it ended; and its tokens, where they are kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_core::AcceptStats;
use serde_json::{Value, json};

use super::answer::Head;
use super::ask::Asked;
use super::error::ApiError;
use crate::generations::Generations;
use crate::queue::{Client, End, Event};
use crate::speech::{Delta, Shown};
use crate::{App, RequestLog};

/// A sequence whose tokens are kept.
#[derive(Default)]
struct Kept {
    prompt: String,
    text: String,
    tokens: Vec<Shown>,
}

/// What is kept of a request's answers.
struct Keeping {
    place: Arc<Generations>,
    /// The request does not show tokens: they are taken away here.
    hide_tokens: bool,
    sequences: Vec<Kept>,
}

/// What is known of a request. It is told when this is dropped: at the end of the answer, or when the reader left.
pub(crate) struct Ledger {
    log: Option<RequestLog>,
    keeping: Option<Keeping>,
    route: &'static str,
    client: Client,
    arrived: Instant,
    unix_s: f64,
    id: Option<String>,
    model: Option<String>,
    stream: bool,
    status: u16,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    queued: Duration,
    first: Option<Duration>,
    stats: AcceptStats,
    reasons: Vec<&'static str>,
    error: Option<(Option<&'static str>, String)>,
    /// Sequences that go on.
    open: usize,
}

impl Ledger {
    pub(super) fn new(app: &Arc<App>, route: &'static str, client: &Client) -> Ledger {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ledger {
            log: app.options.request_log.clone(),
            keeping: None,
            route,
            client: Arc::clone(client),
            arrived: Instant::now(),
            unix_s: since.map_or(0.0, |time| time.as_secs_f64()),
            id: None,
            model: None,
            stream: false,
            status: 200,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            queued: Duration::ZERO,
            first: None,
            stats: AcceptStats::default(),
            reasons: Vec::new(),
            error: None,
            open: 0,
        }
    }

    /// The request was understood and waits.
    pub(super) fn begin(&mut self, head: &Head, asked: &Asked, app: &App) {
        self.id = Some(head.id.clone());
        self.model = Some(head.model.clone());
        self.stream = asked.stream;
        self.prompt_tokens = asked.prompt_tokens();
        self.open = asked.sequences();
        if app.generations.keeps() {
            let prompt = |index: usize| head.tokenizer.decode(&asked.prompts[index / asked.n], false);
            let kept = |index: usize| Kept { prompt: prompt(index), ..Kept::default() };
            self.keeping = Some(Keeping {
                place: Arc::clone(&app.generations),
                hide_tokens: !asked.shows_tokens,
                sequences: (0..asked.sequences()).map(kept).collect(),
            });
        }
    }

    /// What a sequence made, as the request may see it; `None`: there is nothing in it for the request.
    pub(super) fn see(&mut self, index: usize, mut event: Event) -> Option<Event> {
        let Some(keeping) = &mut self.keeping else { return Some(event) };
        let Some(sequence) = keeping.sequences.get_mut(index) else { return Some(event) };
        let hide = keeping.hide_tokens;
        let mut take = |delta: &mut Delta| {
            sequence.text.push_str(&delta.text);
            match hide {
                true => sequence.tokens.append(&mut delta.tokens),
                false => sequence.tokens.extend(delta.tokens.iter().cloned()),
            }
        };
        match &mut event {
            Event::Prompt(_) => {}
            Event::Delta(delta) => {
                take(delta);
                if delta.is_empty() {
                    return None;
                }
            }
            Event::End(end) => {
                take(&mut end.rest);
                self.keep(index, end);
            }
        }
        Some(event)
    }

    /// A sequence ended, well or not.
    fn keep(&mut self, index: usize, end: &End) {
        let Some(keeping) = &mut self.keeping else { return };
        let Kept { prompt, text, tokens } = std::mem::take(&mut keeping.sequences[index]);
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let id = self.id.as_deref().unwrap_or_default();
        // The first token is the prompt's own; the others took the decoding time.
        let rate = end.tokens.saturating_sub(1) as f64 / end.decode.as_secs_f64();
        let answer = json!({
            "id": if keeping.sequences.len() > 1 { format!("{id}-{index}") } else { id.to_owned() },
            "time": self.unix_s,
            "route": self.route,
            "model": self.model,
            "prompt": prompt,
            // The end of it tells prompts of one template apart.
            "prompt_end": prompt.chars().rev().take(300).collect::<Vec<_>>().into_iter().rev().collect::<String>(),
            "text": text,
            "tokens": Head::traced(&tokens),
            "outcome": end.outcome.word(),
            "completion_tokens": end.tokens,
            "cached_tokens": end.cached,
            "accept_length": end.stats.accept_len(),
            "verify_steps": end.stats.verify_steps,
            "tokens_per_s": (rate.is_finite() && end.tokens > 1).then_some(rate),
            "queue_ms": ms(end.queued),
            "prefill_ms": ms(end.prefill),
            "decode_ms": ms(end.decode),
        });
        keeping.place.keep(&self.client, answer);
    }

    /// A sequence ended.
    pub(super) fn end(&mut self, end: &End, reason: &'static str) {
        self.open = self.open.saturating_sub(1);
        self.completion_tokens += end.tokens;
        self.queued = self.queued.max(end.queued);
        let first = end.queued + end.prefill;
        self.first = Some(self.first.map_or(first, |before| before.min(first)));
        self.stats.add(&end.stats);
        self.reasons.push(reason);
    }

    /// Tokens of the prompts that were in kept caches.
    pub(super) fn cached(&mut self, tokens: usize) {
        self.cached_tokens = tokens;
    }

    /// It is answered with an error. A stream that broke off has its status said already.
    pub(super) fn fail(&mut self, error: &ApiError, streaming: bool) {
        if !streaming {
            self.status = error.status();
        }
        self.open = 0;
        self.error = Some((error.code(), error.message().to_owned()));
    }

    fn line(&self) -> Value {
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let left = self.open > 0;
        let error = self.error.as_ref().map(|(code, message)| json!({"code": code, "message": message}));
        json!({
            "time": self.unix_s,
            "id": self.id,
            "key": &*self.client,
            "route": self.route,
            // A reader that left got no status that it could read.
            "status": if left && !self.stream { Value::Null } else { self.status.into() },
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_ms": ms(self.queued),
            "first_token_ms": self.first.map(ms),
            "total_ms": ms(self.arrived.elapsed()),
            "accept_length": self.stats.accept_len(),
            "finish_reasons": self.reasons,
            "reader_left": left,
            "error": error,
        })
    }
}

impl Ledger {
    /// Tells it now: before the reader can have read the end.
    pub(super) fn close(&mut self) {
        if let Some(log) = self.log.take() {
            log(&self.line());
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.close();
    }
}
