//! What a target gives to training: hidden states ([`CaptureSource`]) and answers ([`Generator`]).
//!
//! The in-process target implements both with the same forward that decoding uses, so what a draft is trained on is
//! what it meets when it serves. A server that speaks the OpenAI protocol can write the answers too, and vLLM and SGLang can
//! compute the states ([`RemoteCapture`]); both take several servers of one model.

mod engine;
mod error;
mod generator;
mod hidden;
mod http;
mod openai;
mod regenerate;
mod remote;
#[cfg(test)]
mod thinking_tests;

pub use engine::EngineGenerator;
pub use error::RegenerateError;
pub use generator::{
    Answer, AnswerMark, Generator, IdsFrom, Outcome, Prompt, Prompter, Request, ends_in_loop,
};
pub use hidden::{CaptureError, CaptureSource, InProcess, OnStep, StepPart, TokenRow};
pub use http::{Alive, Asked, Asker, Fault, Note, ServerError, knock};
pub use openai::{OpenAiGenerator, metrics_page};
pub use regenerate::{
    AnswerSpan, AnsweredRow, Dialogue, FinishedDialogue, Progress, SamplingMix, regenerate,
};
pub use remote::{
    RemoteCapture, RemoteOptions, StatesProblem, StatesShape, read_json_states, read_state_file,
};
