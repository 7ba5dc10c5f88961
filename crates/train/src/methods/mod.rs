//! The methods there are, chosen by the draft's kind: the one place where this crate names them.
//!
//! A new kind is a module here and a line in [`method`].

pub mod block;
pub mod eagle3;
pub mod peagle;

use draftsmith_core::VocabMap;
use draftsmith_formats::run::RunFile;
use draftsmith_kernels::TrainKernels;
use draftsmith_model::{DraftConfig, TargetTensors};

use crate::{Method, OwnHead, Pack, TrainError};

/// A method, whatever its kind.
pub(crate) type BoxedMethod<K> = Box<dyn Method<Kernels = K>>;

/// What a method is made of, beside the draft's configuration.
pub(crate) struct Start<'a, K> {
    /// Backend.
    pub(crate) kernels: K,
    /// Draft ids to target ids.
    pub(crate) vocab_map: VocabMap,
    /// The target's tensors.
    pub(crate) target: &'a TargetTensors,
    /// Hyper-parameters, and how weights start.
    pub(crate) file: &'a RunFile,
    /// Seed of initial weights and of what is drawn.
    pub(crate) seed: u64,
    /// Asked for the target's choices in place of its head on the tape.
    pub(crate) own_head: Option<OwnHead>,
}

/// The method that trains a draft of this configuration as a run file says, started from a loaded target or at random. `own_head`
/// is asked for the target's choices where decoding of the target runs beside training.
///
/// # Errors
/// Numbers or tensors that do not fit each other.
pub fn method<K: TrainKernels>(
    kernels: K,
    config: DraftConfig,
    file: &RunFile,
    vocab_map: VocabMap,
    target: &TargetTensors,
    own_head: Option<OwnHead>,
) -> Result<BoxedMethod<K>, TrainError> {
    let seed = file.train.seed.unwrap_or(file.run.seed);
    let start = Start { kernels, vocab_map, target, file, seed, own_head };
    match config {
        DraftConfig::Eagle3(config) => eagle3::method(config, start),
        DraftConfig::Block(config) => block::method(config, start),
        DraftConfig::PEagle(config) => peagle::method(config, start),
    }
}

/// Shape of a step that is measured for its speed.
#[derive(Clone, Copy, Debug)]
pub struct MadeUpShape {
    /// Slots of the one row.
    pub slots: usize,
    /// Width of target and draft.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Ids, of the draft's vocabulary and of the target's.
    pub vocab: usize,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// RoPE base.
    pub rope_theta: f32,
    /// Draft steps unrolled.
    pub unrolled_steps: usize,
}

/// A method and rows that a step of it can be timed on; what is measured is the unroll that other trainers have, too.
///
/// # Errors
/// Numbers that do not fit each other.
pub fn made_up<K: TrainKernels>(
    kernels: K,
    shape: MadeUpShape,
) -> Result<(BoxedMethod<K>, Pack), TrainError> {
    let (method, pack) = eagle3::made_up(kernels, shape)?;
    Ok((Box::new(method), pack))
}
