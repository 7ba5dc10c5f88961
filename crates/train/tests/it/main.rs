//! Training against reference vectors, against decoding, and against itself.

mod ahead;
mod block_infer;
mod blocks;
mod golden;
mod golden_block;
mod golden_peagle;
mod infer;
mod learning;
mod optimizer;
mod peers;
mod replay;
