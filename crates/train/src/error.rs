//! What training can fail with.

use std::path::PathBuf;

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_model::DraftConfigError;

/// Why training stopped or did not start.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// There is nothing to train on.
    #[error("the training data has no rows with trained tokens")]
    NoData,
    /// A row does not have the shape that the draft needs.
    #[error("row {row} has {found} {what}, expected {wanted}")]
    RowShape {
        /// Row number in its store.
        row: u64,
        /// Which values.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        wanted: usize,
    },
    /// A token id outside the target's vocabulary.
    #[error("row {row} has token id {id}, but the target's vocabulary has {vocab} ids")]
    TokenId {
        /// Row number in its store.
        row: u64,
        /// The id.
        id: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// The store could not deliver a row.
    #[error("cannot read training rows: {source}")]
    Rows {
        /// The store's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A tensor to start from has the wrong size.
    #[error("tensor `{name}` has {found} values, the draft needs {wanted}")]
    Tensor {
        /// Tensor name.
        name: String,
        /// Values found.
        found: usize,
        /// Values needed.
        wanted: usize,
    },
    /// The draft does not have the shapes of the target that it should start from.
    #[error(
        "the draft cannot start from the target: `{name}` has {found} values there, the draft needs {wanted}"
    )]
    Start {
        /// Tensor name.
        name: String,
        /// Values of the target.
        found: usize,
        /// Values of the draft.
        wanted: usize,
    },
    /// A tensor to start from is missing.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Tensor name.
        name: String,
    },
    /// The loss is no longer a number.
    #[error("the loss is {loss} and the gradient norm {grad_norm} at step {step}")]
    Diverged {
        /// Optimiser step.
        step: u64,
        /// Loss found.
        loss: f64,
        /// Gradient norm found.
        grad_norm: f64,
    },
    /// A checkpoint belongs to another run.
    #[error("checkpoint `{}` was written by run `{found}`, this run is `{wanted}`", path.display())]
    OtherRun {
        /// Checkpoint folder.
        path: PathBuf,
        /// Hash found.
        found: String,
        /// Hash of this run.
        wanted: String,
    },
    /// A checkpoint that cannot be understood.
    #[error("checkpoint `{}` is damaged: {what}", path.display())]
    BadCheckpoint {
        /// Checkpoint folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A kind of draft that does not learn from its rejections.
    #[error(
        "`train.replay.share` is set, but a draft of the kind `{method}` is not trained on its rejections"
    )]
    NoReplay {
        /// Method name.
        method: &'static str,
    },
    /// Processes that train together see other files.
    #[error("rank {rank} begins at {found}, rank 0 at {wanted}")]
    Beginning {
        /// Which of them.
        rank: usize,
        /// Where it begins.
        found: String,
        /// Where rank 0 does.
        wanted: String,
    },
    /// Validation failed.
    #[error("validation failed: {source}")]
    Validation {
        /// The validator's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The draft's configuration is refused.
    #[error(transparent)]
    Config(#[from] DraftConfigError),
    /// A tensor file could not be read or written.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A file could not be written.
    #[error(transparent)]
    Atomic(#[from] AtomicError),
}

impl TrainError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            TrainError::NoData => {
                Some("look at the data report: every conversation needs at least one assistant answer".into())
            }
            TrainError::RowShape { .. } | TrainError::TokenId { .. } => {
                Some("the target cache was captured for another target or other layers; capture again".into())
            }
            TrainError::Start { .. } => Some(
                "set `draft.init = \"random\"`, or leave `draft.hidden`, `draft.intermediate`, `draft.heads` and \
                 `draft.kv_heads` to the target's"
                    .into(),
            ),
            TrainError::Diverged { .. } => Some(
                "lower `train.lr` or `train.max_grad_norm`, then run again from the last checkpoint".into(),
            ),
            TrainError::OtherRun { .. } => {
                Some("use another run folder, or remove the checkpoints to start again".into())
            }
            TrainError::BadCheckpoint { path, .. } => {
                Some(format!("remove `{}`; training resumes from the one before it", path.display()))
            }
            TrainError::NoReplay { .. } => Some("leave `train.replay.share` at 0".into()),
            TrainError::Beginning { .. } => {
                Some("put the folder of the run on a disk that all ranks share".into())
            }
            TrainError::Config(e) => e.hint(),
            TrainError::Safetensors(e) => e.hint(),
            TrainError::Atomic(e) => e.hint(),
            TrainError::Rows { .. }
            | TrainError::Tensor { .. }
            | TrainError::MissingTensor { .. }
            | TrainError::Validation { .. } => None,
        }
    }
}
