//! What differs between methods of training a draft.

use draftsmith_kernels::TrainKernels;
use draftsmith_model::tape::Tape;

use crate::{DraftWeights, Pack, Replays, TrainError};

/// Whether a micro-batch leaves gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Loss and gradients.
    Train,
    /// Loss and metrics only.
    Evaluate,
}

/// Sums of one depth of the unroll over a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DepthStats {
    /// Un-normalised loss of this depth, before its depth weight.
    pub loss: f64,
    /// Slots where the draft's most likely token is the target's.
    pub correct: u64,
    /// Slots with a set loss mask: what `correct` is counted out of.
    pub slots: u64,
    /// Sum of the expected acceptance `α` over trained slots.
    pub alpha: f64,
    /// Slots with a loss: those whose target token is in the draft vocabulary.
    pub trained: u64,
}

/// Sums of one micro-batch. `loss / weight` is the mean loss; both add up over micro-batches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchStats {
    /// Un-normalised loss, depth weights included; its gradient is what was accumulated.
    pub loss: f64,
    /// What the loss and the gradients of an optimiser step are divided by, summed over its micro-batches.
    pub weight: f64,
    /// Sum of the factors of all losses of single slots.
    pub coefficients: f64,
    /// All slots.
    pub slots: u64,
    /// Per depth.
    pub depths: Vec<DepthStats>,
    /// Tokens of the verify steps that the metrics of proposed blocks come to, the target's own included.
    pub sim_accepted: f64,
    /// Such steps: proposed blocks.
    pub blocks: u64,
}

impl BatchStats {
    /// Adds another micro-batch.
    pub fn add(&mut self, other: &BatchStats) {
        self.loss += other.loss;
        self.weight += other.weight;
        self.coefficients += other.coefficients;
        self.slots += other.slots;
        self.sim_accepted += other.sim_accepted;
        self.blocks += other.blocks;
        self.depths.resize(self.depths.len().max(other.depths.len()), DepthStats::default());
        for (sum, d) in self.depths.iter_mut().zip(&other.depths) {
            sum.loss += d.loss;
            sum.correct += d.correct;
            sum.slots += d.slots;
            sum.alpha += d.alpha;
            sum.trained += d.trained;
        }
    }
}

/// A kind of draft and how it is trained. The trainer loop knows nothing else of it.
pub trait Method {
    /// Backend.
    type Kernels: TrainKernels;

    /// Name as in the run file.
    fn name(&self) -> &'static str;
    /// Width of the captured features of a row.
    fn feature_width(&self) -> usize;
    /// Width of the target's final hidden state.
    fn last_width(&self) -> usize;
    /// The parameters and their gradients.
    fn tape(&self) -> &Tape<Self::Kernels>;
    /// As [`Method::tape`].
    fn tape_mut(&mut self) -> &mut Tape<Self::Kernels>;
    /// Computes loss and metrics of one micro-batch and, in [`Mode::Train`], adds its gradients.
    fn micro_batch(&mut self, pack: &Pack, mode: Mode) -> Result<BatchStats, TrainError>;
    /// Training on rejected positions, for a kind that has it.
    fn replays(&mut self) -> Option<&mut dyn Replays> {
        None
    }
    /// The draft as it stands.
    fn draft(&self) -> Result<DraftWeights, TrainError>;
}
