//! Measured costs of an engine, kept in the cache folder: measuring takes about a second, a start should not.

use std::path::PathBuf;

use draftsmith_decode::{Costs, Engine};
use draftsmith_formats::{atomic, hash};
use draftsmith_kernels::Cpu;
use serde::{Deserialize, Serialize};

use crate::engine::{LoadedDraft, LoadedTarget};
use crate::pull::Places;
use crate::report::Report;

/// Version of the file; another one is measured anew.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostFile {
    version: u32,
    verify_ms: Vec<(usize, f32)>,
    draft_step_ms: f32,
    extend_ms: f32,
}

/// Where the costs of this target, draft, machine and thread count are kept.
fn path(places: &Places, target: &LoadedTarget, draft: Option<&LoadedDraft>) -> PathBuf {
    let features = target.target.kernels().features();
    let key = format!(
        "{}\n{}\n{}\n{}\n{} {}\n{:?}",
        env!("CARGO_PKG_VERSION"),
        target.sha256,
        draft.and_then(|d| d.artifact.sha256.as_deref()).unwrap_or("no draft"),
        target.threads,
        crate::measure::cpu_name(),
        features.path,
        target.precision,
    );
    places.cache.join("costs").join(format!("{}.json", &hash::sha256_hex(key)[..32]))
}

fn read(path: &PathBuf) -> Option<Costs> {
    let file: CostFile = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
    let sane = |v: f32| v.is_finite() && v >= 0.0;
    let ordered = file.verify_ms.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1);
    let usable = file.version == VERSION
        && file.verify_ms.first().is_some_and(|(rows, ms)| *rows == 1 && *ms > 0.0)
        && ordered
        && file.verify_ms.iter().all(|(_, ms)| sane(*ms))
        && sane(file.draft_step_ms)
        && sane(file.extend_ms);
    usable.then_some(Costs {
        verify_ms: file.verify_ms,
        draft_step_ms: file.draft_step_ms,
        extend_ms: file.extend_ms,
    })
}

/// The engine with its costs if they are in the cache; else they are measured when they are first needed.
pub fn with_kept_costs(
    engine: Engine<Cpu>,
    places: &Places,
    target: &LoadedTarget,
    draft: &LoadedDraft,
) -> Engine<Cpu> {
    match read(&path(places, target, Some(draft))) {
        Some(costs) => engine.with_costs(costs),
        None => engine,
    }
}

/// The engine with its costs: those of the cache, or measured now and kept.
pub fn with_costs(
    engine: Engine<Cpu>,
    places: &Places,
    target: &LoadedTarget,
    draft: Option<&LoadedDraft>,
    report: &dyn Report,
) -> Engine<Cpu> {
    let path = path(places, target, draft);
    if let Some(costs) = read(&path) {
        return engine.with_costs(costs);
    }
    let costs = engine.costs();
    let file = CostFile {
        version: VERSION,
        verify_ms: costs.verify_ms.clone(),
        draft_step_ms: costs.draft_step_ms,
        extend_ms: costs.extend_ms,
    };
    let text = serde_json::to_string_pretty(&file).expect("numbers are JSON") + "\n";
    let kept = path.parent().map_or(Ok(()), atomic::create_dir_all).and_then(|()| atomic::write(&path, text));
    if let Err(error) = kept {
        report.note(&format!("measured costs are not kept, the next start measures again: {error}"));
    }
    engine
}
