//! The methods there are, chosen by the draft's kind: the one place where this crate names them.

use draftsmith_core::VocabMap;
use draftsmith_formats::run::RunFile;
use draftsmith_kernels::TrainKernels;
use draftsmith_model::{DraftConfig, TargetTensors};

use crate::block::{BlockOptions, BlockTrain};
use crate::eagle3::{self, Eagle3Options, Eagle3Train};
use crate::peagle::{PEagleOptions, PEagleTrain};
use crate::{Method, Pack, TrainError};

/// The method that trains a draft of this configuration as a run file says, started from a loaded target or at random.
///
/// # Errors
/// Numbers or tensors that do not fit each other.
pub fn method<K: TrainKernels>(
    kernels: K,
    config: DraftConfig,
    file: &RunFile,
    vocab_map: VocabMap,
    target: &TargetTensors,
) -> Result<Box<dyn Method<Kernels = K>>, TrainError> {
    let (init, seed) = (file.draft.init, file.train.seed.unwrap_or(file.run.seed));
    Ok(match config {
        DraftConfig::Eagle3(config) => {
            let options = Eagle3Options::from_table(&file.train.eagle3);
            Box::new(Eagle3Train::for_target(kernels, config, options, vocab_map, target, init, seed)?)
        }
        DraftConfig::Block(config) => {
            let options = match config.spark {
                None => BlockOptions::from_dflash(&file.train.dflash, seed),
                Some(_) => BlockOptions::from_dspark(&file.train.dspark, seed),
            };
            Box::new(BlockTrain::for_target(kernels, config, options, vocab_map, target, init)?)
        }
        DraftConfig::PEagle(config) => {
            let options = PEagleOptions::from_table(&file.train.p_eagle, config.num_depths, seed);
            Box::new(PEagleTrain::for_target(kernels, config, options, vocab_map, target, init)?)
        }
    })
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
) -> Result<(Box<dyn Method<Kernels = K>>, Pack), TrainError> {
    let (method, pack) = eagle3::made_up(kernels, shape)?;
    Ok((Box::new(method), pack))
}
