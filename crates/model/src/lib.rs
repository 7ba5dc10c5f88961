//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

mod classes;
mod config;
mod draft;
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
mod quantised;
pub mod tape;
mod target;

pub use config::TargetConfig;
pub use draft::{Draft, DraftError, DraftTensors, PackedEagle3, read_draft};
pub use dtype::{Precision, weight_dtype};
pub use error::ModelError;
pub use family::{Family, Norm, Norms, QkNorm};
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use load::{Packing, rope_halves_from_pairs, rope_pairs_from_halves};
pub use mlp::{ExpertsMlp, GatedMlp, Mlp, MlpKind, feed_forward};
pub use moe::ExpertsConfig;
pub use ops::{Attend, Ops};
pub use quantised::{QuantisedLayer, quantised_layers, quantised_values};
pub use target::{LayerWeights, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer};
