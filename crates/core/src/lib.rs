//! The rules of speculative decoding as pure functions: ids, vocabulary map, tree shape, verify rules,
//! token choice and accept counts. And what all long work is handed: where progress goes, the wish to stop, and how
//! long to wait before asking again. No tensors, no I/O.
//!
//! Everything here is small enough to be checked exhaustively on tiny vocabularies; the engine, the trainer and
//! the reports all call these same functions.

mod accept;
mod choose;
mod drawn;
mod ids;
pub mod patience;
pub mod report;
mod shaping;
mod tree;
mod verify;
mod vocab;

pub use accept::AcceptStats;
pub use choose::{DrawKey, Sampling, choose_token, gumbel_noise, token_distribution};
pub use drawn::{Distribution, DrawnChain, Draws, Kept, VerifyRule, accept_probability, verify_drawn};
pub use ids::{DraftTokenId, LayerId, TargetTokenId, default_target_layers};
pub use shaping::{Shaping, TokenLogprobs};
pub use tree::{TokenTree, TreeError};
pub use verify::{TreeVerdict, Verdict, verify_greedy, verify_tree};
pub use vocab::{VocabMap, VocabMapError};
