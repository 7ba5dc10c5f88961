//! Decoding with drafts: one text whatever drafts, batches, threads and devices do.

mod blocks;
mod common;
mod cuda;
mod drawn;
mod experts;
mod isolated;
mod lossless;
mod small;
