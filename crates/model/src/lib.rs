//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

pub mod block;
mod classes;
mod config;
mod draft;
mod draft_config;
pub mod draft_layer;
mod dtype;
pub mod eagle3;
mod error;
mod family;
mod infer;
mod keys;
mod load;
mod mlp;
mod moe;
mod ops;
pub mod peagle;
mod quantised;
pub mod tape;
mod target;
mod weights;

pub use config::TargetConfig;
pub use draft::{Draft, DraftAnswer, DraftError, DraftNetwork, DraftQuestion, DraftTensors, read_draft};
pub use draft_config::{DraftConfig, DraftConfigError, DraftShape, DraftSpec, DraftWork};
pub use dtype::{Precision, weight_dtype};
pub use error::ModelError;
pub use family::{Family, Norm, Norms, QkNorm};
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use load::{Packing, rope_halves_from_pairs, rope_pairs_from_halves};
pub use mlp::{ExpertsMlp, GatedMlp, Mlp, MlpKind, feed_forward};
pub use moe::ExpertsConfig;
pub use ops::{Attend, Ops};
pub use quantised::{QuantisedLayer, quantised_layers, quantised_values};
pub use target::{
    GrowItem, LayerWeights, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer,
};
pub use weights::BuildWeights;
