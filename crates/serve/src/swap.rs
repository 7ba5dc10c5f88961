//! Change of the draft while serving: load and check beside the engine, switch between two steps, watch, and go back if
//! the new draft guesses worse than the old one did.
//!
//! The text of an answer never depends on the draft, so a switch needs no pause and a bad one costs time only.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use draftsmith_core::AcceptStats;
use draftsmith_decode::{DecodeError, DraftPlan, Engine, GenerateOptions};
use draftsmith_kernels::{Kernels, catch_failure};
use tokio::sync::oneshot;

use crate::queue::{Order, Queue};

/// A lower accept length is put up with down to this share of the old one.
const TOLERATED: f64 = 0.95;
/// Standard errors by which the difference must be larger than chance.
const SIGMAS: f64 = 3.0;
/// Tokens that a new draft must decode as the target alone does.
const PROBE_TOKENS: usize = 24;
/// Draft tokens per proposal meanwhile.
const PROBE_DEPTH: usize = 4;

/// A draft as people know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DraftInfo {
    /// Its name.
    pub name: String,
    /// What it is: the method of a bundle, or `small` for an ordinary model.
    pub kind: String,
    /// The folder or the model that it was read from.
    pub bundle: PathBuf,
    /// Hash of its weights.
    pub sha256: Option<String>,
    /// How it drafts where a request says nothing.
    pub plan: DraftPlan,
}

/// A draft joined to the target that is being served.
pub struct Loaded<K: Kernels> {
    /// What it is.
    pub info: DraftInfo,
    /// The engine that uses it. Costs that are not set are measured between two steps.
    pub engine: Engine<K>,
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
pub trait Drafts<K: Kernels>: Send + Sync {
    /// Reads a bundle, compares its hashes and checks that it fits the target.
    ///
    /// # Errors
    /// [`Refused`], naming the file.
    fn load(&self, bundle: &Path) -> Result<Loaded<K>, Refused>;
}

/// A checked draft on its way to the worker.
pub(crate) struct Replacement<K: Kernels> {
    pub(crate) loaded: Loaded<K>,
    /// Told when it is in use, or why not.
    pub(crate) done: oneshot::Sender<Result<(), DecodeError>>,
}

/// How a change of the draft ended.
pub(crate) type Switched = oneshot::Receiver<Result<(), DecodeError>>;

/// A draft that was read and checked: what it is, and how it is put to use.
pub(crate) struct Candidate {
    pub(crate) info: DraftInfo,
    /// Hands it to the worker.
    pub(crate) hand_over: Box<dyn FnOnce() -> Switched + Send>,
}

/// Other drafts for a model, whatever its kernels are.
pub(crate) trait Candidates: Send + Sync {
    /// Reads a bundle and lets it decode a little behind `prompt`.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    fn read(&self, bundle: &Path, prompt: &[u32]) -> Result<Candidate, String>;
}

/// The same for one kind of kernels.
pub(crate) struct CandidatesOn<K: Kernels> {
    pub(crate) drafts: Arc<dyn Drafts<K>>,
    /// Without a draft of its own, for probes of new ones.
    pub(crate) target: Arc<Engine<K>>,
    pub(crate) to_worker: Sender<Replacement<K>>,
    /// Where the worker hears that something was sent.
    pub(crate) queue: Arc<Queue>,
}

impl<K: Kernels> Candidates for CandidatesOn<K> {
    fn read(&self, bundle: &Path, prompt: &[u32]) -> Result<Candidate, String> {
        let loaded = self.drafts.load(bundle).map_err(|refused| {
            let hint = refused.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            format!("{}{hint}", refused.message)
        })?;
        let decode = |engine: &Engine<K>, draft| {
            let options =
                GenerateOptions { max_new_tokens: PROBE_TOKENS, draft, ..GenerateOptions::default() };
            catch_failure(|| engine.generate(prompt, &options, &mut |_| ControlFlow::Continue(())))
                .map_err(|failure| failure.message)?
                .map(|generation| generation.token_ids)
                .map_err(|error| error.to_string())
        };
        let plain = decode(&self.target, DraftPlan::None)?;
        if decode(&loaded.engine, DraftPlan::Chain { depth: PROBE_DEPTH })? != plain {
            return Err("with this draft the target's answer is another one".to_owned());
        }
        let (to_worker, queue) = (self.to_worker.clone(), Arc::clone(&self.queue));
        let info = loaded.info.clone();
        let hand_over = Box::new(move || {
            let (done, switched) = oneshot::channel();
            // A worker that ended drops it, and whoever waits hears that nobody says how it ended.
            let _ = to_worker.send(Replacement { loaded, done });
            queue.order(Order::Replace);
            switched
        });
        Ok(Candidate { info, hand_over })
    }
}

/// An engine and what is known of it.
pub(crate) struct InUse<K: Kernels> {
    pub(crate) engine: Arc<Engine<K>>,
    pub(crate) info: Option<DraftInfo>,
}

impl<K: Kernels> Clone for InUse<K> {
    fn clone(&self) -> Self {
        InUse { engine: Arc::clone(&self.engine), info: self.info.clone() }
    }
}

/// A new draft on probation.
pub(crate) struct Watch<K: Kernels> {
    /// What was proven before.
    pub(crate) fallback: InUse<K>,
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

/// Compares a draft with the one before it.
pub(crate) fn judge(before: &AcceptStats, since: &AcceptStats) -> Verdict {
    match (accept_len(before), accept_len(since)) {
        (Some((old, old_error)), Some((new, new_error))) => {
            let noise = SIGMAS * old_error.hypot(new_error);
            if new + noise < TOLERATED * old { Verdict::GoBack } else { Verdict::Keep }
        }
        // Nothing to compare with.
        _ => Verdict::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `steps` verify steps with a proposal of four tokens, of which these many are kept in turn.
    fn steps(steps: usize, kept: &[usize]) -> AcceptStats {
        let mut stats = AcceptStats::default();
        kept.iter().cycle().take(steps).for_each(|kept| stats.record(4, 4, *kept, kept + 1));
        stats
    }

    #[track_caller]
    fn check(before: AcceptStats, since: AcceptStats, expected: Verdict) {
        assert_eq!(judge(&before, &since), expected);
    }

    #[test]
    fn mean_and_error_of_the_accept_length_are_those_of_the_steps() {
        let (mean, error) = accept_len(&steps(400, &[0, 1, 2, 4])).unwrap();
        // Of 0, 1, 2, 4: mean 1.75, variance 21 / 4 - 1.75².
        assert!((mean - 2.75).abs() < 1e-12, "{mean}");
        assert!((error - ((5.25 - 1.75 * 1.75) / 400.0_f64).sqrt()).abs() < 1e-12, "{error}");
        assert_eq!(accept_len(&AcceptStats::default()), None);
    }

    #[test]
    fn only_a_fall_beyond_chance_and_tolerance_goes_back() {
        let good = || steps(500, &[0, 1, 2, 4]);
        check(good(), steps(500, &[0]), Verdict::GoBack);
        check(good(), good(), Verdict::Keep);
        check(good(), steps(500, &[4]), Verdict::Keep);
        // 4 % lower is put up with, however certain.
        check(steps(1_000_000, &[1; 50]), steps(1_000_000, &[&[1; 46][..], &[0; 4]].concat()), Verdict::Keep);
        // Ten steps tell little.
        check(good(), steps(10, &[0, 1, 2]), Verdict::Keep);
        // Nothing to compare with.
        check(AcceptStats::default(), steps(500, &[0]), Verdict::Keep);
    }
}
