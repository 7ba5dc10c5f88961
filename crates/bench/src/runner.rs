//! What is measured, seen from here: two ways to decode one prompt, and a way to hold a conversation.

use std::time::Duration;

use draftsmith_core::{AcceptStats, Sampling};

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
}

/// Turns a conversation into a prompt and an answer into text.
pub trait Dialogue {
    /// The prompt for the next answer: `answers[i]` follows user turn `i`, and user turn `answers.len()` is last.
    fn prompt(&mut self, row: &WorkloadRow, answers: &[String]) -> Result<Vec<u32>, BoxError>;
    /// The text of an answer, without its stop token.
    fn answer(&mut self, token_ids: &[u32]) -> Result<String, BoxError>;
}
