//! Every byte draftsmith reads and writes: run file, corpus, target cache, checkpoint, bundle, records, GGUF and
//! safetensors containers.
//!
//! Invariant: foreign bytes are checked completely before they are used (no panic, no allocation on the word of a
//! count), and everything of ours appears on disk whole or not at all (see [`atomic`]).
//!
//! Each format is one module with one error type.

pub mod atomic;
pub mod bundle_files;
pub mod cache;
pub mod gguf;
pub mod hash;
pub mod hash_records;
pub mod hf_config;
pub mod mapped;
pub mod mxint8;
pub mod packed;
pub mod run;
pub mod safetensors_dir;
pub mod tokens;
