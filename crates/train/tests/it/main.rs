//! Training against reference vectors, against decoding, and against itself.

mod golden;
mod infer;
mod learning;
mod optimizer;
