//! What a target gives to training: hidden states ([`CaptureSource`]) and answers ([`Generator`]).
//!
//! The in-process target implements both with the same forward that decoding uses, so what a draft is trained on is
//! what it meets when it serves.

mod hidden;
mod regenerate;

pub use hidden::{CaptureError, CaptureSource, InProcess};
pub use regenerate::{
    Answer, AnswerMark, Dialogue, EngineGenerator, FinishedDialogue, Generator, Progress, RegenerateError,
    RegenerateOptions, regenerate,
};
