//! Why a regeneration stopped.

use draftsmith_decode::DecodeError;
use draftsmith_text::TextError;

use crate::http::{Asker, ServerError};

/// What stops a run.
#[derive(Debug, thiserror::Error)]
pub enum RegenerateError {
    /// The engine refused a request.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The tokenizer failed on an answer.
    #[error("dialogue `{id}`: {source}")]
    Text {
        /// The dialogue.
        id: String,
        /// Cause.
        source: TextError,
    },
    /// The server cannot do it.
    #[error(transparent)]
    Server(#[from] ServerError),
}

impl RegenerateError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            RegenerateError::Decode(e) => e.hint(),
            RegenerateError::Text { source, .. } => source.hint(),
            RegenerateError::Server(e) => e.hint(Asker::Regenerate),
        }
    }
}
