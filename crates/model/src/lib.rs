//! Target and draft networks written once over the kernels, tape, KV cache with rollback, weight loading

pub mod eagle3;
mod ops;

pub use ops::{Attend, Ops};
