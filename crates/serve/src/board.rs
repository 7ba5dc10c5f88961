//! What the server is doing now, for people: written by the worker, read by `/api/state`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_core::AcceptStats;
use serde_json::{Value, json};

use crate::swap::DraftInfo;

/// Rates are over this long.
const WINDOW: Duration = Duration::from_secs(10);
/// The window is kept in pieces of this length.
const PIECE: Duration = Duration::from_millis(500);

/// Tokens of a piece of the window.
struct Piece {
    began: Instant,
    tokens: u64,
    /// Verify steps of drafting sequences, and what they committed.
    steps: u64,
    committed: u64,
}

struct State {
    draft: Option<DraftInfo>,
    /// Counts of the finished sequences since the draft came.
    stats: AcceptStats,
    last_swap: Option<Value>,
    window: VecDeque<Piece>,
}

/// See the module.
pub(crate) struct Board {
    began: Instant,
    state: Mutex<State>,
}

impl Board {
    pub(crate) fn new(draft: Option<DraftInfo>) -> Board {
        let state = State { draft, stats: AcceptStats::default(), last_swap: None, window: VecDeque::new() };
        Board { began: Instant::now(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the tokens of a step.
    pub(crate) fn count(&self, tokens: u64, steps: u64, committed: u64) {
        let now = Instant::now();
        let window = &mut self.state().window;
        window.retain(|piece| now - piece.began < WINDOW);
        match window.back_mut().filter(|piece| now - piece.began < PIECE) {
            Some(piece) => {
                piece.tokens += tokens;
                piece.steps += steps;
                piece.committed += committed;
            }
            None => window.push_back(Piece { began: now, tokens, steps, committed }),
        }
    }

    /// Adds the counts of a finished sequence that used the present draft.
    pub(crate) fn add(&self, stats: &AcceptStats) {
        self.state().stats.add(stats);
    }

    /// Another draft is in use.
    pub(crate) fn set_draft(&self, draft: Option<DraftInfo>) {
        let mut state = self.state();
        state.draft = draft;
        state.stats = AcceptStats::default();
    }

    /// What became of the last change of the draft.
    pub(crate) fn set_swap(&self, swap: Value) {
        self.state().last_swap = Some(swap);
    }

    /// The draft in use.
    pub(crate) fn draft(&self) -> Option<DraftInfo> {
        self.state().draft.clone()
    }

    /// The body of `/api/state`, but for what the queue knows.
    pub(crate) fn page(&self, model: &str, running: i64, queued: usize) -> Value {
        let now = Instant::now();
        let state = self.state();
        let recent = state.window.iter().filter(|piece| now - piece.began < WINDOW);
        let (mut tokens, mut steps, mut committed) = (0, 0, 0);
        for piece in recent {
            tokens += piece.tokens;
            steps += piece.steps;
            committed += piece.committed;
        }
        let seconds = WINDOW.min(now - self.began).as_secs_f64().max(PIECE.as_secs_f64());
        let draft = state.draft.as_ref().map(|draft| {
            json!({
                "name": draft.name, "kind": draft.kind, "bundle": draft.bundle, "sha256": draft.sha256,
                "accept_length": state.stats.accept_len(), "verify_steps": state.stats.verify_steps,
            })
        });
        json!({
            "model": model,
            "has_draft": draft.is_some(),
            "draft": draft,
            "running": running,
            "queued": queued,
            "tokens_per_s": tokens as f64 / seconds,
            "accept_length": (steps > 0).then(|| committed as f64 / steps as f64),
            "uptime_s": (now - self.began).as_secs_f64(),
            "last_swap": state.last_swap,
        })
    }
}
