//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

mod classes;
mod config;
mod draft;
mod draft_config;
pub mod draft_layer;
mod dtype;
mod error;
mod family;
mod infer;
mod keys;
pub mod kinds;
mod load;
mod mlp;
mod moe;
mod ops;
mod quantised;
pub mod tape;
mod target;
mod weights;

pub use config::TargetConfig;
pub use draft::{
    ChainNetwork, Corrected, Correction, DraftAnswer, DraftError, DraftKv, DraftNetwork, DraftQuestion,
    DraftTensors, PassNetwork, PassPart, Proposer, Shared, read_draft, read_draft_config,
};
pub use draft_config::{
    DraftConfigError, DraftNumbers, DraftShape, DraftSpec, DraftWork, Published, is_method, methods,
};
pub use dtype::{Precision, weight_dtype};
pub use error::ModelError;
pub use family::{Family, Norm, Norms, QkNorm};
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use kinds::{Draft, DraftConfig, block, eagle3, peagle};
pub use load::{Packing, rope_halves_from_pairs, rope_pairs_from_halves};
pub use mlp::{ExpertsMlp, GatedMlp, Mlp, MlpKind, feed_forward};
pub use moe::ExpertsConfig;
pub use ops::{Attend, Ops};
pub use quantised::{QuantisedLayer, quantised_layers, quantised_values};
pub use target::{
    GrowItem, LayerWeights, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer,
};
pub use weights::BuildWeights;
