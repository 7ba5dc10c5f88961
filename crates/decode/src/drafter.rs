//! Anything that proposes tokens.

use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_kernels::Kernels;
use draftsmith_model::{Draft, Rows, StepOutput, Target};

use crate::DecodeError;
use crate::eagle::EagleDrafter;

/// How much to draft per step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftPlan {
    /// Plain decoding.
    None,
    /// One token after the other.
    Chain {
        /// Draft tokens per step.
        depth: usize,
    },
    /// The best nodes of a tree grown by cumulative draft probability.
    Tree {
        /// Levels.
        depth: usize,
        /// Children per node, and nodes expanded per level.
        top_k: usize,
        /// Nodes verified.
        num_draft_tokens: usize,
    },
    /// Whatever pays on this machine: the draft and repetitions of the text, deeper or wider where that is likely to
    /// be accepted ([`crate::Costs`]).
    Auto,
}

impl DraftPlan {
    /// Levels proposed at most.
    pub fn depth(&self) -> usize {
        match self {
            DraftPlan::None => 0,
            DraftPlan::Auto => crate::auto::MOST_NODES,
            DraftPlan::Chain { depth } | DraftPlan::Tree { depth, .. } => *depth,
        }
    }
}

/// Captured hidden states of a step and the rows of it that were committed.
pub struct Features<'a, K: Kernels> {
    /// Everything the target step gave.
    pub output: &'a StepOutput<K::Buf>,
    /// Rows of the step, in order of position.
    pub rows: &'a [u32],
}

impl<K: Kernels> Features<'_, K> {
    /// Captured layers side by side, for the chosen rows: `[R, layers * Ht]`.
    pub fn concat(&self, kernels: &K) -> Rows<K::Buf> {
        let parts: Vec<K::Buf> = self
            .output
            .hidden
            .iter()
            .map(|h| {
                let mut buf = kernels.scratch(self.rows.len() * h.width);
                kernels.gather_rows(&h.buf, h.width, self.rows, &mut buf);
                buf
            })
            .collect();
        let widths: Vec<usize> = self.output.hidden.iter().map(|h| h.width).collect();
        let list: Vec<_> = parts.iter().zip(&widths).map(|(p, w)| (p, *w)).collect();
        let width = widths.iter().sum();
        let mut buf = kernels.scratch(self.rows.len() * width);
        kernels.concat_cols(&list, self.rows.len(), &mut buf);
        Rows { buf, rows: self.rows.len(), width }
    }
}

/// A method that proposes tokens. One value serves many sequences; each has its own session.
pub trait Drafter<K: Kernels>: Send + Sync {
    /// Target layers whose output the sessions want to see.
    fn target_layers(&self) -> &[LayerId];
    /// Starts a sequence.
    fn begin(self: Arc<Self>) -> Box<dyn DrafterSession<K>>;
    /// Bytes that a session keeps for each committed position.
    fn bytes_per_token(&self) -> usize {
        0
    }
    /// Bytes that a session holds at most beside those, between two steps.
    fn bytes_per_session(&self) -> usize {
        0
    }
}

/// What proposes with a draft, beside the target that it was made for.
///
/// # Errors
/// [`DecodeError::DraftMismatch`] if their shapes disagree.
pub fn drafter<K: Kernels>(
    target: &Target<K>,
    draft: Draft<K>,
) -> Result<Arc<dyn Drafter<K>>, DecodeError> {
    Ok(match draft {
        Draft::Eagle3(draft) => Arc::new(EagleDrafter::new(target, Arc::new(draft))?),
    })
}

/// The drafter's view of one sequence.
pub trait DrafterSession<K: Kernels> {
    /// Takes in committed positions: their features and, for each, the token that follows it.
    ///
    /// Positions arrive in order, each once. Anything the session computed from its own proposals is replaced by
    /// what follows from these features [eagle3 §9].
    fn extend(&mut self, features: &Features<'_, K>, next_tokens: &[u32]);

    /// As [`DrafterSession::extend`], but the work may wait until the next proposal. What waits is bounded: the session
    /// takes it in by pieces when it becomes too much.
    fn defer(&mut self, features: &Features<'_, K>, next_tokens: &[u32]);

    /// The `k` most probable tokens after a node (`None`: after the last committed token), which stands at `position`,
    /// best first, with their probabilities. Asking for the root forgets all nodes expanded before.
    fn children(
        &mut self,
        node: Option<u32>,
        k: usize,
        sampling: &Sampling,
        position: u64,
    ) -> Vec<(u32, f32)>;

    /// Runs the draft on `token`, a child of `parent` in level `depth` (0: below the root), and returns its handle for
    /// [`DrafterSession::children`].
    fn expand(&mut self, parent: Option<u32>, token: u32, depth: usize) -> u32;

    /// Proposes tokens after the last committed one, which stands at `position`, at most `room` levels deep.
    fn propose(&mut self, plan: &DraftPlan, room: usize, sampling: &Sampling, position: u64) -> TokenTree;

    /// Bytes that it holds now: what committed positions keep, and what waits.
    fn held_bytes(&self) -> usize {
        0
    }
}
