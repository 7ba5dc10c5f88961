//! draftsmith: draft models for speculative decoding, from conversations to a measured bundle.
//!
//! This crate is the front of the workspace: the stages in the order of a run, the crates behind them under short
//! names, and what needs the network or the machine (`pull`, `doctor`). The binary of the same name adds arguments,
//! printing and exit codes; nothing here prints, exits or reads the environment by itself.

pub mod cli;
pub mod costs;
pub mod device;
pub mod doctor;
pub mod engine;
mod error;
pub mod imports;
pub mod inspect;
pub mod measure;
pub mod packs;
pub mod peer;
pub mod pull;
pub mod report;
pub mod run;
pub mod serve_gap;
pub mod server;
pub mod target;

pub use error::Error;

pub use draftsmith_bench as bench;
pub use draftsmith_bundle as bundle;
pub use draftsmith_capture as capture;
pub use draftsmith_core as core;
pub use draftsmith_data as data;
pub use draftsmith_decode as decode;
pub use draftsmith_formats as formats;
pub use draftsmith_kernels as kernels;
pub use draftsmith_model as model;
pub use draftsmith_serve as serve;
pub use draftsmith_text as text;
pub use draftsmith_train as train;
