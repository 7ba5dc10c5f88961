//! What differs between methods of training a draft.

use draftsmith_kernels::TrainKernels;
use draftsmith_model::DraftTensors;
use draftsmith_model::tape::Tape;

use crate::to_tape::expect_len;
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

/// Values of [`BatchStats`] before those of its depths, and of each depth.
const STATS_VALUES: usize = 6;
const DEPTH_VALUES: usize = 5;

impl BatchStats {
    /// For other processes: every value as 8 bytes, exactly.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let own = [self.loss, self.weight, self.coefficients, self.sim_accepted].map(f64::to_bits);
        let mut values = own.to_vec();
        values.extend([self.slots, self.blocks]);
        for d in &self.depths {
            values.extend([d.loss.to_bits(), d.correct, d.slots, d.alpha.to_bits(), d.trained]);
        }
        values.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// Takes back what [`BatchStats::to_bytes`] gave.
    pub(crate) fn from_bytes(bytes: &[u8]) -> BatchStats {
        let value = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("chunks of eight bytes"));
        let values: Vec<u64> = bytes.chunks_exact(8).map(value).collect();
        let (own, depths) = values.split_at(STATS_VALUES.min(values.len()));
        let [loss, weight, coefficients, sim_accepted, slots, blocks] = own else {
            panic!("{} bytes are no sums of a micro-batch", bytes.len())
        };
        let depth = |d: &[u64]| DepthStats {
            loss: f64::from_bits(d[0]),
            correct: d[1],
            slots: d[2],
            alpha: f64::from_bits(d[3]),
            trained: d[4],
        };
        BatchStats {
            loss: f64::from_bits(*loss),
            weight: f64::from_bits(*weight),
            coefficients: f64::from_bits(*coefficients),
            slots: *slots,
            depths: depths.chunks_exact(DEPTH_VALUES).map(depth).collect(),
            sim_accepted: f64::from_bits(*sim_accepted),
            blocks: *blocks,
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

/// Puts the weights of a draft in place of those that a method began with.
///
/// # Errors
/// A weight that is missing or has another size, named; nothing was changed then.
pub fn begin_with<K: TrainKernels>(
    method: &mut dyn Method<Kernels = K>,
    weights: &DraftTensors,
) -> Result<(), TrainError> {
    let trained = method.tape().trained();
    let mut found = Vec::with_capacity(trained.len());
    for id in trained {
        let wanted = method.tape().param(id);
        let name = &wanted.name;
        let (_, values) =
            weights.get(name).ok_or_else(|| TrainError::MissingTensor { name: name.clone() })?;
        expect_len(name, values.len(), wanted.numel())?;
        found.push((id, values));
    }
    found.into_iter().for_each(|(id, values)| method.tape_mut().set_param(id, values));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_back_from_their_bytes() {
        let depth = DepthStats { loss: -0.1, correct: 3, slots: 9, alpha: 1.0 / 3.0, trained: 8 };
        let stats = BatchStats {
            loss: 0.7,
            weight: f64::MIN_POSITIVE,
            coefficients: 2.5,
            slots: u64::MAX,
            depths: vec![depth, DepthStats::default()],
            sim_accepted: 4.0,
            blocks: 6,
        };
        for stats in [stats, BatchStats::default()] {
            assert_eq!(BatchStats::from_bytes(&stats.to_bytes()), stats);
        }
    }
}
