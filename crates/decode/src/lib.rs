//! The engine: draft → verify → commit or roll back, for one sequence or many.
//!
//! Invariants, each a test:
//! * the output of a request is the same with any drafter, alone or in a batch, greedy or seeded; by the two rules that
//!   draw the draft's tokens ([`GenerateOptions::verify`]) it has the same distribution;
//! * after a rejected step the caches equal a fresh prefill of the committed text.

mod auto;
mod batch;
mod block;
mod calibrate;
mod chain;
mod costs;
mod drafter;
mod drawn;
mod engine;
mod grammar;
mod isolate;
mod lookup;
mod options;
mod prefix;
mod propose;
mod score;
mod session;
mod small;
mod tree;

pub use batch::Batch;
pub use costs::{Calibration, Costs, CostsOff};
pub use drafter::{
    Ask, Borrowed, Children, Committed, DraftPlan, Drafter, DrafterSession, Features, Node, Shape, drafter,
    drafter_with, small_drafter,
};
pub use engine::Engine;
pub use grammar::{Grammar, GrammarState};
pub use isolate::Survived;
pub use options::{BatchOptions, GenerateOptions, States, Watch};
pub use session::{FinishReason, Generation, TokenEvent, TokenOrigin};

use draftsmith_core::VerifyRule;

/// What decoding can refuse.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No room for a single token.
    #[error("the prompt has {found} tokens, but the context ends at {limit}")]
    PromptTooLong {
        /// Tokens in the prompt.
        found: usize,
        /// Longest context.
        limit: usize,
    },
    /// A token that the target does not have.
    #[error("prompt token {id} at position {position} is outside the target's vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// Its place in the prompt.
        position: usize,
        /// Vocabulary size.
        vocab: usize,
    },
    /// A plan that needs a draft, without one.
    #[error("speculation was asked for, but no draft is loaded")]
    NoDraft,
    /// Trees whose tokens would have to be drawn.
    #[error("verification by `{rule}` needs a chain of draft tokens, and a tree was asked for")]
    NeedsChain {
        /// The rule.
        rule: VerifyRule,
    },
    /// An engine that cannot take over what another has begun.
    #[error("the new engine decodes another target")]
    AnotherTarget,
    /// A draft made for another target.
    #[error("the draft does not fit the target: its {what} is {draft}, the target's {target}")]
    DraftMismatch {
        /// Which number.
        what: &'static str,
        /// The draft's.
        draft: usize,
        /// The target's.
        target: usize,
    },
}

impl DecodeError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            DecodeError::EmptyPrompt => Some("give a prompt of at least one token".into()),
            DecodeError::PromptTooLong { .. } => Some("shorten the prompt".into()),
            DecodeError::TokenOutOfRange { .. } => Some("the ids come from another tokenizer".into()),
            DecodeError::NoDraft => {
                Some("give a bundle with `--bundle DIR`, or a smaller model with `--draft-model REF`".into())
            }
            DecodeError::NeedsChain { .. } => {
                Some("draft a chain (`--depth D` alone), or verify by `seeded`".into())
            }
            DecodeError::AnotherTarget => None,
            DecodeError::DraftMismatch { .. } => Some("use the target that the draft was trained for".into()),
        }
    }
}
