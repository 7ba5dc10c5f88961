//! draftsmith: draft models for speculative decoding, from conversations to a measured bundle.
//!
//! This crate is the front of the workspace: the crates behind it under short names, and the arguments. The binary of
//! the same name adds printing and exit codes; nothing here prints, exits or reads the environment by itself.

pub mod cli;

pub use draftsmith_run::{
    Error, catalogue, costs, device, disk, doctor, elsewhere, engine, imports, inspect, list, measure, packs,
    peer, serve_gap, server, shelf, target,
};

pub use draftsmith_bench as bench;
pub use draftsmith_bundle as bundle;
pub use draftsmith_capture as capture;
pub use draftsmith_core as core;
pub use draftsmith_core::report;
pub use draftsmith_data as data;
pub use draftsmith_decode as decode;
pub use draftsmith_formats as formats;
pub use draftsmith_kernels as kernels;
pub use draftsmith_model as model;
pub use draftsmith_pull as pull;
pub use draftsmith_run as run;
pub use draftsmith_serve as serve;
pub use draftsmith_text as text;
pub use draftsmith_train as train;
