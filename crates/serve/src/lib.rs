//! OpenAI-compatible HTTP over the decode engine.

pub mod grammar;
