//! What is measured, seen from here: two ways to decode one prompt, and a way to hold a conversation.

use std::time::Duration;

use draftsmith_core::{AcceptStats, Sampling, VerifyRule};

use crate::BoxError;
use crate::record::Finish;
use crate::workload::WorkloadRow;

/// How both sides decode.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunOptions {
    /// Limit of an answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Which draft tokens of a sampled answer are kept.
    pub verify: VerifyRule,
}

/// One finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct RunOutput {
    /// The answer, a stop token included if one was chosen.
    pub token_ids: Vec<u32>,
    /// How many of them the decode time covers.
    pub decode_tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Prompt processing.
    pub prefill: Duration,
    /// From the end of the prefill to the last token.
    pub decode: Duration,
    /// Verify counts; all zero for target-only decoding.
    pub stats: AcceptStats,
}

/// Decodes a prompt with and without a drafter. Each call starts from an empty cache.
pub trait Runner {
    /// Target-only decoding: the baseline of every speedup.
    fn plain(&mut self, prompt_ids: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError>;
    /// Speculative decoding.
    fn spec(&mut self, prompt_ids: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError>;
    /// Longest prompt plus answer, in tokens.
    fn context_len(&self) -> usize;
    /// Processor times up to now, where the system tells them; read before the first sample and after the last.
    fn busy_times(&mut self) -> Option<BusyTimes> {
        None
    }
}

/// Counters of processor time, all in the same unit, since some fixed moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyTimes {
    /// Of all processors, idle or not.
    pub total: u64,
    /// Of all processors, at work for anybody.
    pub busy: u64,
    /// At work for this program.
    pub own: u64,
}

impl BusyTimes {
    /// Share of all processors that others used between two readings; `None` if no time passed.
    pub fn others_share(before: BusyTimes, after: BusyTimes) -> Option<f64> {
        let total = after.total.checked_sub(before.total).filter(|t| *t > 0)?;
        let busy = after.busy.saturating_sub(before.busy);
        let own = after.own.saturating_sub(before.own);
        Some((busy.saturating_sub(own) as f64 / total as f64).min(1.0))
    }
}

/// Turns a conversation into a prompt and an answer into text.
pub trait Dialogue {
    /// The prompt for the next answer: `answers[i]` follows user turn `i`, and user turn `answers.len()` is last.
    fn prompt(&mut self, row: &WorkloadRow, answers: &[String]) -> Result<Vec<u32>, BoxError>;
    /// The text of an answer, without its stop token.
    fn answer(&mut self, token_ids: &[u32]) -> Result<String, BoxError>;
}
