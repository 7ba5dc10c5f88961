//! Sources to conversations to token ids and loss mask; packing, reports, vocabulary map.
//!
//! ```text
//! files ── SourceReader ──► rows ── load: validate, de-duplicate, mix, shuffle ──► rows
//!                                     │
//!                                     ├── the target answers their prompts (draftsmith-capture)
//!                                     ▼
//!                     Preparer: render, tokenise, mask, cut ──► PreparedRow {ids, loss_mask} ── pack
//! ```
//! Nothing is dropped silently: each row that does not come out is counted in the [`Report`] under its [`DropReason`],
//! each change of a row under its [`Change`], each key that nobody read under its name, and strict mode turns the reasons
//! that speak of broken rows into errors with file and line. The same files, options and seed give the same rows in the
//! same order.

mod counts;
mod decontam;
mod error;
mod json;
mod load;
mod notes;
mod pack;
mod prepare;
mod preview;
mod ranged;
mod report;
mod rng;
mod row;
mod shape;
mod source;
mod workload;

pub use counts::TokenCounts;
pub use decontam::Decontaminator;
pub use error::{DataError, DropReason, Location, RowError};
pub use load::{Dedupe, LoadOptions, Loaded, SourceSpec, hold_back, leave_out_prompts, load};
pub use notes::{Change, RowNotes};
pub use pack::{PackError, PackedSequence, pack};
pub use prepare::{MaskedAnswers, PrepareOptions, Preparer, control_token, mask_row, prepare};

/// A row as training takes it.
pub use draftsmith_formats::tokens::TokenRow as PreparedRow;
pub use preview::{Paint, preview, preview_conversation, preview_notes};
pub use ranged::Ranged;
pub use report::{DomainCounts, Lengths, Report};
pub use row::{Conversation, LocatedRow, Row, TokenRow, parse_conversation_line};
pub use source::{ReadOptions, SourceReader};
pub use workload::{WorkItem, parse_work_item, read_workload, read_workload_bytes};
