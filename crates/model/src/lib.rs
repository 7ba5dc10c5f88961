//! Target and draft networks, written once over the kernels; KV cache with rollback; weight loading; the tape.

mod config;
pub mod eagle3;
mod error;
mod infer;
mod load;
mod ops;
mod target;

pub use config::{Family, TargetConfig};
pub use error::ModelError;
pub use infer::{CacheAttend, Infer, Linear, Rows};
pub use ops::{Attend, Ops};
pub use target::{
    LayerWeights, Precision, StepItem, StepOutput, Target, TargetKv, TargetTensors, decoder_layer,
};
