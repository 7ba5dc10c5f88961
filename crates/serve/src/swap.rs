//! Change of the draft while serving: load and check beside the engine, switch between two steps, watch, and go back if
//! the new draft guesses worse than the old one did.
//!
//! The text of an answer never depends on the draft, so a switch needs no pause and a bad one costs time only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::AcceptStats;
use draftsmith_decode::{DecodeError, Engine};
use draftsmith_kernels::Cpu;
use tokio::sync::oneshot;

/// A lower accept length is put up with down to this share of the old one.
const TOLERATED: f64 = 0.95;
/// Standard errors by which the difference must be larger than chance.
const SIGMAS: f64 = 3.0;

/// A draft as people know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DraftInfo {
    /// Its name.
    pub name: String,
    /// The folder that it was read from.
    pub bundle: PathBuf,
    /// Hash of its weights.
    pub sha256: Option<String>,
}

/// A draft joined to the target that is being served.
pub struct Loaded {
    /// What it is.
    pub info: DraftInfo,
    /// The engine that uses it. Costs that are not set are measured between two steps.
    pub engine: Engine<Cpu>,
}

/// Why a bundle is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// What is wrong, with the file.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Where drafts come from.
pub trait Drafts: Send + Sync {
    /// Reads a bundle, compares its hashes and checks that it fits the target.
    ///
    /// # Errors
    /// [`Refused`], naming the file.
    fn load(&self, bundle: &Path) -> Result<Loaded, Refused>;
}

/// A checked draft on its way to the worker.
pub(crate) struct Replacement {
    pub(crate) loaded: Loaded,
    /// Told when it is in use, or why not.
    pub(crate) done: oneshot::Sender<Result<(), DecodeError>>,
}

/// An engine and what is known of it.
#[derive(Clone)]
pub(crate) struct InUse {
    pub(crate) engine: Arc<Engine<Cpu>>,
    pub(crate) info: Option<DraftInfo>,
}

/// A new draft on probation.
pub(crate) struct Watch {
    /// What was proven before.
    pub(crate) fallback: InUse,
    /// Counts of the fallback shortly before the switch.
    pub(crate) before: AcceptStats,
    /// Counts of the new draft.
    pub(crate) since: AcceptStats,
}

/// How a probation ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Verdict {
    Keep,
    GoBack,
}

/// Mean and standard error of the tokens that a verify step commits.
fn accept_len(stats: &AcceptStats) -> Option<(f64, f64)> {
    let mean = stats.accept_len()?;
    let steps = stats.verify_steps as f64;
    // A step that accepts n tokens counts once at each of the depths 1..=n, so sums over depths give the moments of n.
    let moment = |weight: fn(usize) -> f64| -> f64 {
        stats.accepted_at.iter().enumerate().map(|(i, n)| weight(i) * *n as f64 / steps).sum()
    };
    let (first, second) = (moment(|_| 1.0), moment(|i| (2 * i + 1) as f64));
    Some((mean, ((second - first * first).max(0.0) / steps).sqrt()))
}

impl Watch {
    /// Compares the two.
    pub(crate) fn verdict(&self) -> Verdict {
        match (accept_len(&self.before), accept_len(&self.since)) {
            (Some((old, old_error)), Some((new, new_error))) => {
                let noise = SIGMAS * old_error.hypot(new_error);
                if new + noise < TOLERATED * old { Verdict::GoBack } else { Verdict::Keep }
            }
            // Nothing to compare with.
            _ => Verdict::Keep,
        }
    }
}
