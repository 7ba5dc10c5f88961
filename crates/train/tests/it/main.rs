//! Training against reference vectors, against decoding, and against itself.

mod blocks;
mod golden;
mod golden_block;
mod golden_peagle;
mod infer;
mod learning;
mod optimizer;
