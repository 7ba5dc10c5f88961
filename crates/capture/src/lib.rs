//! What a target gives to training: hidden states ([`CaptureSource`]) and answers ([`Generator`]).
//!
//! The in-process target implements both with the same forward that decoding uses, so what a draft is trained on is
//! what it meets when it serves. A server that speaks the OpenAI protocol can write the answers too.

mod engine;
mod generator;
mod hidden;
mod openai;
mod regenerate;

pub use engine::EngineGenerator;
pub use generator::{Answer, AnswerMark, Generator, Prompt, Prompter, Request};
pub use hidden::{CaptureError, CaptureSource, InProcess};
pub use openai::{Asked, Fault, OpenAiGenerator, ServerError, metrics_page};
pub use regenerate::{Dialogue, FinishedDialogue, Progress, RegenerateError, SamplingMix, regenerate};
