//! Anything that proposes tokens, for all sequences of a step at once.

use std::any::Any;
use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_kernels::Kernels;
use draftsmith_model::{Draft, Infer, Linear, Proposer, Rows, StepOutput, Target};

use crate::DecodeError;
use crate::block::BlockDrafter;
use crate::chain::ChainDrafter;
use crate::small::SmallDrafter;
use crate::tree;

/// Nodes of an automatic proposal at most.
pub(crate) const MOST_NODES: usize = 32;

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
            DraftPlan::Auto => MOST_NODES,
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

impl<K: Kernels> Clone for Features<'_, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K: Kernels> Copy for Features<'_, K> {}

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

/// A sequence's state inside a drafter: what is known of its committed tokens, and nodes grown below the last one.
pub trait DrafterSession<K: Kernels>: Any + Send {
    /// For the drafter that began it, which knows the type.
    fn as_any_mut(&mut self) -> &mut dyn Any;

    /// Bytes that it holds now: what committed positions keep, and what waits to be taken in.
    fn held_bytes(&self) -> usize {
        0
    }

    /// Committed positions that it was handed and can go back to ([`Drafter::rollback_to`]); no limit if it reads the text
    /// itself.
    fn positions(&self) -> usize {
        0
    }

    /// Positions of a text of so many tokens that it would have to read by itself before its next proposal; 0 if those
    /// that a step leaves are all.
    fn behind(&self, _tokens: usize) -> usize {
        0
    }
}

/// The first `rows` rows of pieces that stand one below the other.
pub(crate) fn first_rows<K: Kernels>(
    kernels: &K,
    pieces: Vec<Arc<Rows<K::Buf>>>,
    mut rows: usize,
) -> Vec<Arc<Rows<K::Buf>>> {
    let mut first = Vec::new();
    for piece in pieces {
        match rows {
            0 => break,
            all if all >= piece.rows => first.push(piece),
            some => {
                let kept: Vec<u32> = (0..some as u32).collect();
                first.push(Infer::new(kernels).gather(&piece, &kept));
            }
        }
        rows -= rows.min(first.last().map_or(0, |p| p.rows));
    }
    first
}

/// A sequence's state, owned.
pub(crate) type BoxedSession<K> = Box<dyn DrafterSession<K>>;

/// Committed positions of a sequence that its drafter has not seen.
pub struct Committed<'a, K: Kernels> {
    /// The sequence.
    pub session: &'a mut dyn DrafterSession<K>,
    /// Their captured states, in order of position.
    pub features: Features<'a, K>,
    /// For each the token that follows it.
    pub next_tokens: &'a [u32],
}

/// A sequence that wants a proposal.
pub struct Ask<'a, K: Kernels> {
    /// The sequence.
    pub session: &'a mut dyn DrafterSession<K>,
    /// How its tokens are chosen.
    pub sampling: &'a Sampling,
    /// All of its tokens, for drafters that read them themselves.
    pub text: &'a [u32],
    /// Where its last committed token stands.
    pub position: u64,
    /// Children of a node that are wanted.
    pub k: usize,
    /// Instead of those, all tokens that the draft may draw by `sampling`, with the logarithms of their probabilities,
    /// which need not add up to 1. Fewer are as good: the draft's distribution is whatever it answers.
    pub whole: bool,
}

/// What may follow a node: tokens and their log-probabilities, best first. Of a node's only child the log-probability
/// need not be right.
pub type Children = Vec<(u32, f32)>;

/// A drafted token whose children are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Which of the asking sequences it belongs to.
    pub of: usize,
    /// Handle of the node that it is a child of; `None`: it follows the last committed token.
    pub parent: Option<u32>,
    /// The token.
    pub token: u32,
    /// Levels above it: 0 right below the committed text.
    pub depth: usize,
}

/// Shape of a proposal that is not planned by cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Levels.
    pub depth: usize,
    /// Children per node, and nodes expanded per level.
    pub top_k: usize,
    /// Nodes at most.
    pub nodes: usize,
}

impl Shape {
    /// What a fixed plan asks for, with so many levels left; `None` for a plan that is not fixed.
    pub(crate) fn of(plan: &DraftPlan, room: usize) -> Option<Shape> {
        match *plan {
            DraftPlan::None | DraftPlan::Auto => None,
            DraftPlan::Chain { depth } => Some(Shape { depth: depth.min(room), top_k: 1, nodes: depth }),
            DraftPlan::Tree { depth, top_k, num_draft_tokens } => {
                Some(Shape { depth: depth.min(room), top_k: top_k.max(1), nodes: num_draft_tokens })
            }
        }
    }
}

/// A method that proposes tokens. One value serves many sequences, whose sessions it is handed side by side: a call is
/// one pass of the draft over the rows of all of them.
pub trait Drafter<K: Kernels>: Send + Sync {
    /// Target layers whose output it wants to see.
    fn target_layers(&self) -> &[LayerId];
    /// Starts a sequence.
    fn begin(&self) -> Box<dyn DrafterSession<K>>;

    /// Takes note of committed positions, which arrive in order, each once. The work may wait until the next proposal;
    /// what waits is bounded.
    ///
    /// Anything that a session computed from its own proposals is replaced by what follows from these features
    /// [eagle3 §9].
    fn take_in(&self, committed: &mut [Committed<'_, K>]);

    /// Goes back to the first `positions` of what a session was handed, at most [`DrafterSession::positions`]: another
    /// text goes on from there. Positions behind are handed over before the next proposal.
    fn rollback_to(&self, _session: &mut dyn DrafterSession<K>, _positions: usize) {}

    /// What may follow the last committed token of each sequence. Forgets the nodes grown before.
    fn roots(&self, asks: &mut [Ask<'_, K>]) -> Vec<Children>;

    /// What may follow drafted tokens, and the handle of each for its own children. The sequences are those of the last
    /// [`Drafter::roots`], or some of them.
    fn expand(&self, asks: &mut [Ask<'_, K>], nodes: &[Node]) -> Vec<(u32, Children)>;

    /// Levels that one pass of the draft computes: so deep, asking for children costs nothing further.
    fn levels_per_pass(&self) -> usize {
        1
    }

    /// Levels that there are at most: below the last of them, no node has children.
    fn deepest(&self) -> usize {
        usize::MAX
    }

    /// Proposals of fixed shapes.
    fn propose(&self, asks: &mut [Ask<'_, K>], shapes: &[Shape]) -> Vec<TokenTree> {
        tree::propose(self, asks, shapes)
    }

    /// Bytes that a session keeps for each committed position.
    fn bytes_per_token(&self) -> usize {
        0
    }

    /// Bytes that a session holds at most beside those, between two steps.
    fn bytes_per_session(&self) -> usize {
        0
    }
}

/// What a draft takes from its target beside the captured states.
pub struct Borrowed<K: Kernels> {
    /// `[V, H]` rows of tokens.
    pub embedding: Arc<Linear<K::Packed>>,
    /// Their factor.
    pub embed_scale: f32,
    /// `[V, H]` what tokens are chosen with, for a draft without a head of its own.
    pub head: Arc<Linear<K::Packed>>,
}

impl<K: Kernels> Borrowed<K> {
    /// The target's own.
    pub fn of(target: &Target<K>) -> Borrowed<K> {
        Borrowed {
            embedding: Arc::clone(target.embedding()),
            embed_scale: target.config().embed_scale,
            head: Arc::clone(target.head()),
        }
    }
}

/// What proposes with a draft, beside the target that it was made for.
///
/// # Errors
/// [`DecodeError::DraftMismatch`] if their shapes disagree.
pub fn drafter<K: Kernels>(target: &Target<K>, draft: Draft<K>) -> Result<Arc<dyn Drafter<K>>, DecodeError> {
    drafter_with(target, draft, Borrowed::of(target))
}

/// The same with embedding and head of another place, in the target's shapes.
///
/// # Errors
/// As [`drafter`].
pub fn drafter_with<K: Kernels>(
    target: &Target<K>,
    draft: Draft<K>,
    borrowed: Borrowed<K>,
) -> Result<Arc<dyn Drafter<K>>, DecodeError> {
    Ok(match draft.into_proposer() {
        Proposer::Chain(draft) => Arc::new(ChainDrafter::new(target, draft, borrowed)?),
        Proposer::Pass(draft) => Arc::new(BlockDrafter::new(target, draft, borrowed)?),
    })
}

/// What proposes with an ordinary model of the target's tokenizer. Ids that one of the two does not have are never
/// proposed.
pub fn small_drafter<K: Kernels>(target: &Target<K>, small: Arc<Target<K>>) -> Arc<dyn Drafter<K>> {
    Arc::new(SmallDrafter::new(target, small))
}
