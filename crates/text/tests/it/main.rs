//! Tests of the crate from outside, in one binary.

mod common;
mod real_model;
mod stream;
mod template;
mod tokenizer;
mod turns;
