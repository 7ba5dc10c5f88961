//! One line for the log about each request that asks for an answer, however it ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_core::AcceptStats;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::queue::{Client, End};
use crate::{App, RequestLog};

/// What is known of a request. It is told when this is dropped: at the end of the answer, or when the reader left.
pub(crate) struct Ledger {
    log: Option<RequestLog>,
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
    pub(super) fn begin(
        &mut self,
        id: &str,
        model: &str,
        stream: bool,
        prompt_tokens: usize,
        sequences: usize,
    ) {
        self.id = Some(id.to_owned());
        self.model = Some(model.to_owned());
        self.stream = stream;
        self.prompt_tokens = prompt_tokens;
        self.open = sequences;
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
