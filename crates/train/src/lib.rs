//! Training of drafts: methods, losses, optimiser, schedule, trainer loop, checkpoints and exact resume.
//!
//! [`Method`] is what differs between kinds of drafts; [`train`] is the loop that knows none of them. Data comes
//! through [`RowStore`], from disk or from a live target, as the same rows. Validation by real speculative decoding
//! is handed in by the caller, because this crate cannot decode.
//!
//! Invariants: one optimiser step is normalised by the trained slots of all its packs; the order of the data, the
//! weights and the moments at step `n` are functions of run file and seed alone, so a resumed run equals an
//! uninterrupted one bit for bit. Several processes may do it together ([`Collective`]): they change the time, never a bit.

mod ahead;
mod average;
mod checkpoint;
mod collective;
mod data;
mod device_sums;
mod draft;
mod error;
mod log;
mod method;
mod methods;
mod optimizer;
pub mod ranks;
mod replay;
mod rng;
mod slices;
mod states;
mod sum_tree;
mod teacher;
mod to_tape;
mod trainer;

pub use block::{BlockLoss, BlockOptions, BlockTrain};
pub use checkpoint::{Best, TrainState, ValidationResult};
pub use collective::{Alone, Collective};
pub use data::{Order, Pack, PackShape, RowStore};
pub use draft::{DraftTensor, DraftWeights};
pub use eagle3::{Eagle3Options, Eagle3Train, LossDivisor};

pub use error::TrainError;
pub use log::{JsonLog, TensorBoard};
pub use method::{BatchStats, DepthStats, Method, Mode, begin_with};
pub use methods::{MadeUpShape, block, eagle3, made_up, method, peagle};
pub use optimizer::{AdamW, AdamWOptions, LrSchedule, Moment};
pub use peagle::{PEagleOptions, PEagleTrain};
pub use ranks::{Link, Ranks};
pub use replay::{End, Proposed, Rejected, ReplayOptions, ReplayReport, Replays, walk};
pub use rng::Rng;
pub use slices::Slices;
pub use states::DeviceStates;
pub use sum_tree::{Piece, SumTree, Visit};
pub use teacher::OwnHead;
pub use trainer::{Event, Flow, Hooks, Outcome, RanksReport, StepReport, TrainOptions, Validator, train};
