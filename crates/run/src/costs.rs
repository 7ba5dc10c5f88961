//! Measured costs of an engine, kept in the cache folder: measuring takes a second or more, a start should not.
//!
//! Kept costs are measured anew when they cannot be right: of another version or thread count, old, measured while
//! others were using the machine, or contradicted by the steps of an engine that used them. Corrections that an engine
//! makes while it decodes are not written back: they hold for its load and its contexts. What it finds to be wrong is
//! only marked, by replacing the file as a whole.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use draftsmith_bench::BusyTimes;
use draftsmith_bench::record::{CostsInfo, PassCosts};
use draftsmith_core::report::{Report, Unit};
use draftsmith_decode::{Costs, CostsOff, Engine};
use draftsmith_formats::{atomic, hash};
use draftsmith_pull::Places;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::engine::{LoadedDraft, LoadedTarget};
use crate::measure::busy_times;

/// Version of the file; another one is measured anew.
const VERSION: u32 = 3;
/// Costs are measured anew after this, in seconds: drivers, memory and neighbours change.
pub(crate) const OLD: u64 = 30 * 86_400;
/// Share of the processors that others may use while costs are measured; what disturbs a benchmark disturbs them.
pub(crate) const BUSY_SHARE: f64 = 0.1;
/// How far passes of one size may lie apart, as a share: an idle machine stays far below.
const NOISY: f32 = 0.25;
/// From here on progress is shown.
const SLOW: Duration = Duration::from_secs(2);

/// `costs/KEY.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostFile {
    version: u32,
    draftsmith_version: String,
    measured_unix_s: u64,
    threads: usize,
    /// `None` where the system does not say.
    others_busy_share: Option<f64>,
    spread: f32,
    passes: usize,
    verify_ms: Vec<(usize, f32)>,
    draft_step_ms: f32,
    draft_row_ms: f32,
    extend_ms: f32,
    extend_row_ms: f32,
    read_row_ms: f32,
    /// What contradicted them.
    off: Option<String>,
}

impl CostFile {
    /// True if the numbers can be costs at all.
    fn is_usable(&self) -> bool {
        let sane = |v: f32| v.is_finite() && v >= 0.0;
        self.version == VERSION
            && self.verify_ms.first().is_some_and(|(rows, ms)| *rows == 1 && *ms > 0.0)
            && self.verify_ms.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1)
            && self.verify_ms.iter().all(|(_, ms)| sane(*ms))
            && [self.draft_step_ms, self.draft_row_ms, self.extend_ms, self.extend_row_ms, self.read_row_ms]
                .into_iter()
                .all(sane)
    }

    /// Others were using the machine.
    fn is_disturbed(&self) -> bool {
        self.others_busy_share.is_some_and(|share| share > BUSY_SHARE) || self.spread > NOISY
    }

    /// Why they are not to be trusted at all; being disturbed is not among that.
    fn is_wrong(&self, now: u64, threads: usize) -> Option<String> {
        if self.draftsmith_version != env!("CARGO_PKG_VERSION") {
            return Some(format!("they are of draftsmith {}", self.draftsmith_version));
        }
        if self.threads != threads {
            return Some(format!("they are of {} threads", self.threads));
        }
        if let Some(off) = &self.off {
            return Some(off.clone());
        }
        // A clock that stood wrong says nothing about their age.
        if now.saturating_sub(self.measured_unix_s) > OLD || self.measured_unix_s > now + 86_400 {
            return Some("they are old".to_string());
        }
        None
    }

    /// Why they are to be measured anew.
    fn reason(&self, now: u64, threads: usize) -> Option<String> {
        let disturbed = || {
            let share = self.others_busy_share.unwrap_or(0.0) * 100.0;
            format!("others used {share:.0} % of the processors when they were measured")
        };
        self.is_wrong(now, threads).or_else(|| self.is_disturbed().then(disturbed))
    }

    /// What to tell whoever waited for them.
    fn doubt(&self) -> Option<String> {
        let share = 100.0 * self.others_busy_share?;
        self.is_disturbed().then(|| {
            format!(
                "doubt: the machine was busy while the costs of steps were measured (others used {share:.0} % of it, like passes \
                 lay {:.0} % apart): how much is drafted may be chosen badly at first; steps correct it, and the next start \
                 measures anew",
                100.0 * self.spread
            )
        })
    }

    fn costs(&self) -> Costs {
        Costs {
            verify_ms: self.verify_ms.clone(),
            draft_step_ms: self.draft_step_ms,
            draft_row_ms: self.draft_row_ms,
            extend_ms: self.extend_ms,
            extend_row_ms: self.extend_row_ms,
            read_row_ms: self.read_row_ms,
        }
    }
}

/// Kept costs, or such as `measure` finds now and for what reason, and whether these are to be kept.
fn choose(
    kept: Option<CostFile>,
    now: u64,
    threads: usize,
    measure: &mut dyn FnMut(Option<&str>) -> CostFile,
) -> (CostFile, bool) {
    let Some(kept) = kept else { return (measure(None), true) };
    let Some(reason) = kept.reason(now, threads) else { return (kept, false) };
    let fresh = measure(Some(&reason));
    // The calmer of two disturbed measurements.
    let share = |file: &CostFile| file.others_busy_share.unwrap_or(0.0);
    if kept.is_wrong(now, threads).is_none() && share(&fresh) > share(&kept) + 0.05 {
        return (kept, false);
    }
    (fresh, true)
}

/// Where the costs of this target, draft, machine and thread count are kept.
fn path<K: Backend>(places: &Places, target: &LoadedTarget<K>, draft: Option<&LoadedDraft<K>>) -> PathBuf {
    let key = format!(
        "{}\n{}\n{}\n{}\n{:?}",
        target.sha256,
        draft.and_then(|d| d.artifact.sha256.as_deref()).unwrap_or("no draft"),
        target.threads,
        target.target.kernels().cost_key(),
        target.precision,
    );
    places.cache.join("costs").join(format!("{}.json", &hash::sha256_hex(key)[..32]))
}

/// A file of another version, or that cannot be read, is as good as none.
fn read(path: &Path) -> Option<CostFile> {
    let file: CostFile = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
    file.is_usable().then_some(file)
}

fn write(path: &Path, file: &CostFile) -> Result<(), atomic::AtomicError> {
    let text = serde_json::to_string_pretty(file).expect("numbers are JSON") + "\n";
    path.parent().map_or(Ok(()), atomic::create_dir_all)?;
    atomic::write(path, text)
}

pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Measures, and how much others disturbed that.
fn measure<K: Backend>(
    engine: &Engine<K>,
    threads: usize,
    why: Option<&str>,
    report: &dyn Report,
) -> CostFile {
    let (began, before) = (Instant::now(), busy_times());
    let mut shown = false;
    let found = engine.calibrate(&mut |done, all| {
        if !shown && began.elapsed() > SLOW {
            shown = true;
            let anew = why.map(|why| format!(" anew, {why}")).unwrap_or_default();
            report.begin(&format!("measuring what passes cost{anew}"), Some(all as u64), Unit::Steps);
        }
        if shown {
            report.at(done as u64);
        }
    });
    if shown {
        report.end();
    }
    let shares = before.zip(busy_times()).and_then(|(a, b)| BusyTimes::others_share(a, b));
    CostFile {
        version: VERSION,
        draftsmith_version: env!("CARGO_PKG_VERSION").to_string(),
        measured_unix_s: unix_s(),
        threads,
        others_busy_share: shares,
        spread: found.spread,
        passes: found.passes,
        verify_ms: found.costs.verify_ms,
        draft_step_ms: found.costs.draft_step_ms,
        draft_row_ms: found.costs.draft_row_ms,
        extend_ms: found.costs.extend_ms,
        extend_row_ms: found.costs.extend_row_ms,
        read_row_ms: found.costs.read_row_ms,
        off: None,
    }
}

fn off_text(off: &CostsOff) -> String {
    format!(
        "a pass of {} rows took {:.1} ms where {:.1} were expected",
        off.rows, off.found_ms, off.expected_ms
    )
}

/// Uses costs that are kept in a file, which is marked when steps contradict them.
fn apply<K: Backend>(engine: Engine<K>, path: PathBuf, file: CostFile) -> Engine<K> {
    let costs = file.costs();
    engine.with_measured_costs(costs).on_costs_off(Box::new(move |off| {
        // Where the folder cannot be written there is nothing to mark.
        let _ = write(&path, &CostFile { off: Some(off_text(off)), ..file.clone() });
    }))
}

/// The engine with its costs if they are in the cache; else they are measured when they are first needed. Costs of a
/// busy machine do: steps correct them, and a server should not stand still.
pub fn with_kept_costs<K: Backend>(
    engine: Engine<K>,
    places: &Places,
    target: &LoadedTarget<K>,
    draft: &LoadedDraft<K>,
) -> Engine<K> {
    let path = path(places, target, Some(draft));
    match read(&path) {
        Some(file) if file.is_wrong(unix_s(), target.threads).is_none() => apply(engine, path, file),
        _ => engine,
    }
}

/// The engine with its costs: those of the cache, or measured now and kept.
pub fn with_costs<K: Backend>(
    engine: Engine<K>,
    places: &Places,
    target: &LoadedTarget<K>,
    draft: Option<&LoadedDraft<K>>,
    report: &dyn Report,
) -> Engine<K> {
    let path = path(places, target, draft);
    let mut fresh = |why: Option<&str>| measure(&engine, target.threads, why, report);
    let (file, is_new) = choose(read(&path), unix_s(), target.threads, &mut fresh);
    if is_new && let Err(error) = write(&path, &file) {
        report.note(&format!("measured costs are not kept, the next start measures again: {error}"));
    }
    if let Some(doubt) = file.doubt().filter(|_| is_new) {
        report.note(&doubt);
    }
    apply(engine, path, file)
}

/// The costs that an engine plans with, for records: as measured, and as its steps corrected them since.
pub fn used<K: Backend>(
    engine: &Engine<K>,
    places: &Places,
    target: &LoadedTarget<K>,
    draft: Option<&LoadedDraft<K>>,
) -> CostsInfo {
    let pass = |costs: &Costs| PassCosts {
        verify_ms: costs.verify_ms.iter().map(|(rows, ms)| (*rows as u32, *ms)).collect(),
        draft_step_ms: costs.draft_step_ms,
        draft_row_ms: costs.draft_row_ms,
        extend_ms: costs.extend_ms,
        extend_row_ms: costs.extend_row_ms,
        read_row_ms: costs.read_row_ms,
    };
    let measured = engine.costs();
    // Costs that could not be kept have no date.
    let file = read(&path(places, target, draft)).filter(|file| file.costs() == *measured);
    CostsInfo {
        measured_unix_s: file.as_ref().map(|f| f.measured_unix_s),
        others_busy_share: file.as_ref().and_then(|f| f.others_busy_share),
        spread: file.as_ref().map(|f| f.spread),
        measured: pass(measured),
        corrected: pass(&engine.current_costs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn file(first_ms: f32, share: f64) -> CostFile {
        CostFile {
            version: VERSION,
            draftsmith_version: env!("CARGO_PKG_VERSION").to_string(),
            measured_unix_s: NOW - 60,
            threads: 2,
            others_busy_share: Some(share),
            spread: 0.02,
            passes: 25,
            verify_ms: vec![(1, first_ms), (2, first_ms + 1.0)],
            draft_step_ms: 1.0,
            draft_row_ms: 0.1,
            extend_ms: 1.0,
            extend_row_ms: 0.2,
            read_row_ms: 0.05,
            off: None,
        }
    }

    /// What is used of kept costs and such as would be measured now (45 ms a pass), and whether those are written.
    #[track_caller]
    fn check(kept: Option<CostFile>, share_now: f64, used_ms: f32, is_written: bool) {
        let (used, is_new) = choose(kept, NOW, 2, &mut |_| file(45.0, share_now));
        assert_eq!((used.verify_ms[0].1, is_new), (used_ms, is_written));
    }

    #[test]
    fn costs_that_cannot_be_right_are_measured_anew() {
        check(None, 0.5, 45.0, true);
        check(Some(file(44.0, 0.02)), 0.0, 44.0, false);
        // Of a busy machine, by what the system says and by what the passes say.
        check(Some(file(90.0, 0.4)), 0.0, 45.0, true);
        check(Some(CostFile { spread: 0.6, ..file(90.0, 0.0) }), 0.0, 45.0, true);
        check(Some(CostFile { spread: 0.6, others_busy_share: None, ..file(90.0, 0.0) }), 0.0, 45.0, true);
        // It is busier now.
        check(Some(file(50.0, 0.2)), 0.5, 50.0, false);
        // Whatever is worse than that.
        for wrong in [
            CostFile { measured_unix_s: NOW - OLD - 1, ..file(44.0, 0.0) },
            CostFile { measured_unix_s: NOW + 100_000, ..file(44.0, 0.0) },
            CostFile { draftsmith_version: "0.0.9".to_string(), ..file(44.0, 0.0) },
            CostFile { threads: 8, ..file(44.0, 0.0) },
            CostFile { off: Some("slower".to_string()), ..file(44.0, 0.0) },
        ] {
            check(Some(wrong), 0.5, 45.0, true);
        }
    }

    #[test]
    fn costs_of_a_busy_machine_are_doubted() {
        assert_eq!(file(44.0, 0.02).doubt(), None);
        assert!(file(44.0, 0.4).doubt().is_some_and(|doubt| doubt.contains("others used 40 %")));
    }

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("costs").join("a.json");
        assert_eq!(read(&path), None);
        write(&path, &file(44.0, 0.1)).unwrap();
        assert_eq!(read(&path), Some(file(44.0, 0.1)));
        // The layout before this one, a curve that falls, half a file.
        let old = r#"{"version":1,"verify_ms":[[1,44.0],[2,44.0]],"draft_step_ms":1.0,"extend_ms":1.0}"#;
        let falls = CostFile { verify_ms: vec![(1, 44.0), (2, 43.0)], ..file(1.0, 0.0) };
        let falls = serde_json::to_string(&falls).unwrap();
        for text in [old, &falls, &falls[..60], ""] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path), None, "{text}");
        }
    }
}
