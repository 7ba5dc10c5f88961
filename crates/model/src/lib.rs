//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

mod classes;
mod config;
mod draft;
pub mod eagle3;
mod error;
mod infer;
mod load;
mod ops;
mod quantised;
pub mod tape;
mod target;

pub use config::{Family, TargetConfig};
pub use draft::{Draft, DraftError, DraftTensors, PackedEagle3, read_draft};
pub use error::ModelError;
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use load::{Packing, rope_halves_from_pairs, rope_pairs_from_halves, weight_dtype};
pub use ops::{Attend, Ops};
pub use target::{
    LayerWeights, Precision, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer,
};
