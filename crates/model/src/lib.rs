//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

pub mod block;
mod classes;
mod config;
mod draft;
mod draft_config;
pub mod draft_layer;
pub mod eagle3;
mod error;
mod infer;
mod load;
mod ops;
pub mod peagle;
mod quantised;
pub mod tape;
mod target;
mod weights;

pub use config::{Family, TargetConfig};
pub use draft::{
    Draft, DraftAnswer, DraftError, DraftNetwork, DraftQuestion, DraftTensors, read_draft,
};
pub use draft_config::{DraftConfig, DraftConfigError, DraftShape, DraftSpec, DraftWork};
pub use error::ModelError;
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use load::{rope_halves_from_pairs, rope_pairs_from_halves, weight_dtype};
pub use ops::{Attend, Ops};
pub use target::{
    LayerWeights, Precision, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer,
};
pub use weights::BuildWeights;
