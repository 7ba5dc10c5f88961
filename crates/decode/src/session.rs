//! One sequence in the engine.

use std::time::Duration;

use draftsmith_core::{AcceptStats, DrawnChain, TokenLogprobs};
use draftsmith_kernels::{DrawRow, Kernels};
use draftsmith_model::TargetKv;

use crate::auto::{Grown, Pacer};
use crate::drafter::{BoxedSession, DraftPlan};
use crate::grammar::GrammarState;
use crate::lookup::Lookup;
use crate::options::GenerateOptions;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The target chose a stop id.
    Stop,
    /// The token limit or the context was reached.
    Length,
    /// The caller's callback ended it.
    Cancelled,
}

impl FinishReason {
    /// The word used in JSON.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// How a token came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenOrigin {
    /// The target's own, without a proposal (also the first token, which the prefill gives).
    Plain,
    /// Drafted and accepted.
    Draft,
    /// The target's own after a rejected draft token.
    Recovered,
    /// The target's own after a proposal that was accepted to its end.
    Bonus,
}

/// A committed token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// Target id.
    pub id: u32,
    /// Its position in the sequence.
    pub position: usize,
    /// How it came about.
    pub origin: TokenOrigin,
    /// What the target's row said about it, if the request asked for that.
    pub logprobs: Option<TokenLogprobs>,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Generated tokens; a stop id is included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Counts of the verify steps. The first token comes from the prefill and is not among them.
    pub stats: AcceptStats,
    /// Time until the first token.
    pub prefill: Duration,
    /// Time from the first token to the last.
    pub decode: Duration,
    /// Of each prompt token but the first, if they were asked for and not taken before.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// Prompt tokens whose keys and values were kept from an earlier sequence.
    pub cached_tokens: usize,
}

/// What an automatic plan keeps per sequence.
pub(crate) struct Auto {
    pub pacer: Pacer,
    pub lookup: Lookup,
    /// The proposal under way.
    pub grown: Grown,
    /// When the step before was verified.
    pub clock: std::time::Instant,
    /// The draft was handed that step and nothing before it waits.
    pub fed: bool,
}

/// What a sequence leaves.
pub(crate) struct Finished<K: Kernels> {
    pub generation: Generation,
    pub tokens: Vec<u32>,
    pub kv: TargetKv<K>,
    pub drafter: Option<BoxedSession<K>>,
}

/// State of one request inside the engine.
pub(crate) struct Session<K: Kernels> {
    pub kv: TargetKv<K>,
    pub drafter: Option<BoxedSession<K>>,
    /// Set for an automatic plan.
    pub auto: Option<Auto>,
    /// The proposal under way, if it was drawn.
    pub drawn: Option<DrawnChain>,
    /// Prompt and committed tokens. Once decoding, the last one is not in the cache yet.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Of the prompt, those that were in a kept cache.
    pub cached_len: usize,
    /// Tokens that are read before the next one is chosen: the prompt, and more after a step that broke off.
    pub fill_to: usize,
    /// Of each prompt token but the first; `None` unless asked for, and once handed out.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub options: GenerateOptions,
    /// Where the answer stands in the request's grammar.
    pub grammar: Option<Box<dyn GrammarState>>,
    pub stats: AcceptStats,
    pub finish: Option<FinishReason>,
    pub prefill: Duration,
    pub started: std::time::Instant,
    /// When the first token was committed.
    pub first_token: Option<std::time::Instant>,
}

impl<K: Kernels> Session<K> {
    /// Goes on without a draft.
    pub(crate) fn drop_drafter(&mut self) {
        self.options.draft = DraftPlan::None;
        self.drafter = None;
        self.auto = None;
        self.drawn = None;
    }

    /// True if a row's arg-max is all that this request wants to know.
    pub(crate) fn wants_argmax_only(&self) -> bool {
        let options = &self.options;
        let untouched = options.shaping.is_none() && self.grammar.is_none();
        options.sampling.is_greedy() && untouched && options.logprobs.is_none()
    }

    /// How a backend may choose the next token by itself: the arg-max (`None` inside) or a draw. `None` if more is asked for
    /// than the token, or a rule that only the host has. `ahead`: drafted tokens between the text and the one that is chosen.
    pub(crate) fn choice_by_device(&self, ahead: usize) -> Option<Option<DrawRow>> {
        if self.wants_argmax_only() {
            return Some(None);
        }
        let (options, sampling) = (&self.options, &self.options.sampling);
        let untouched = options.shaping.is_none() && self.grammar.is_none() && self.drawn.is_none();
        if !untouched || options.logprobs.is_some() {
            return None;
        }
        let key = sampling.draw_key((self.tokens.len() + ahead) as u64)?;
        Some(Some(DrawRow {
            factor: key.factor,
            temperature: sampling.temperature,
            least_share: key.least_share,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            key: key.key,
        }))
    }

    /// Bytes that its drafter holds: keys and values, and features that wait to be taken in.
    pub(crate) fn drafter_bytes(&self) -> usize {
        self.drafter.as_ref().map_or(0, |d| d.held_bytes())
    }

    /// True if all that is left to do is to read the last token, for its states.
    pub(crate) fn owes_states(&self) -> bool {
        self.options.known_states.is_some() && self.finish.is_some() && self.kv.len() < self.tokens.len()
    }

    /// True if the next step has nothing to do for it.
    pub(crate) fn is_over(&self) -> bool {
        self.finish.is_some() && !self.owes_states()
    }

    /// Tokens generated so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens of the prompt, or of what is read anew, that are not in the cache yet; 0 once decoding.
    pub(crate) fn prompt_left(&self) -> usize {
        self.fill_to.saturating_sub(self.kv.len())
    }

    /// Tokens that may still be committed.
    pub(crate) fn room(&self, context: usize) -> usize {
        let by_limit = self.options.max_new_tokens - self.generated();
        by_limit.min(context.saturating_sub(self.tokens.len()))
    }

    /// The answer, and what is known of the sequence.
    pub(crate) fn finish(self) -> Finished<K> {
        let now = std::time::Instant::now();
        let generation = Generation {
            token_ids: self.tokens[self.prompt_len..].to_vec(),
            finish_reason: self.finish.unwrap_or(FinishReason::Cancelled),
            stats: self.stats,
            prefill: self.prefill,
            decode: self.first_token.map_or(Duration::ZERO, |t| now - t),
            prompt_logprobs: self.prompt_logprobs,
            cached_tokens: self.cached_len,
        };
        Finished { generation, tokens: self.tokens, kv: self.kv, drafter: self.drafter }
    }
}
