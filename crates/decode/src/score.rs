//! What the target says about tokens that it did not choose: log-probabilities of a prompt.
//!
//! Shape legend: `R` rows of a step, `V` ids of the target.

use draftsmith_core::TokenLogprobs;
use draftsmith_kernels::Kernels;
use draftsmith_model::StepOutput;

use crate::batch::Batch;
use crate::engine::Engine;
use crate::session::Session;

/// Rows of logits that stand in memory at a time: 10 MB at a vocabulary of 152,000. The head costs the same per row from
/// here on.
const SCORED_ROWS: usize = 16;

impl<K: Kernels> Engine<K> {
    /// Scores the prompt tokens that follow the rows of a step, if the request wants that. The session's rows began at
    /// position `base` and stand from `first_row` on.
    pub(crate) fn score_prompt(
        &self,
        session: &mut Session<K>,
        output: &StepOutput<K::Buf>,
        first_row: u32,
        base: usize,
    ) {
        let (Some(top), Some(scored)) = (session.options.prompt_logprobs, &mut session.prompt_logprobs)
        else {
            return;
        };
        // The row at position `p` says what it thinks of token `p + 1`.
        let end = session.kv.len().min(session.prompt_len - 1);
        let followers = session.tokens.get(base + 1..end + 1).unwrap_or_default();
        let vocab = self.target().config().vocab_size;
        let mut row = first_row;
        for chunk in followers.chunks(SCORED_ROWS) {
            let rows: Vec<u32> = (row..row + chunk.len() as u32).collect();
            let logits = self.target().logits(output, &rows); // [chunk, V]
            let of = logits.chunks_exact(vocab).zip(chunk);
            scored.extend(of.map(|(logits, id)| TokenLogprobs::of(logits, *id, top)));
            row += chunk.len() as u32;
        }
    }
}

impl<K: Kernels, E: std::ops::Deref<Target = Engine<K>>> Batch<E, K> {
    /// The log-probabilities of a prompt, once all of it is read: one entry for each token but the first. `None` before
    /// that, after the first call, and for requests that did not ask. A request that ended has them in its
    /// [`Generation`](crate::Generation).
    pub fn take_prompt_logprobs(&mut self, id: u64) -> Option<Vec<TokenLogprobs>> {
        let at = self.ids.iter().position(|i| *i == id)?;
        let session = &mut self.running[at];
        if session.prompt_left() > 0 { None } else { session.prompt_logprobs.take() }
    }
}
