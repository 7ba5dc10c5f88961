//! Runs as the page of `serve` shows them: read from their folders each time that it asks, so what goes on is seen.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use draftsmith::formats::run::{RunFile, Stage};
use draftsmith::run::curve::Curve;
use draftsmith::run::state::RunFolder;
use draftsmith::run::{self, stages_of};
use draftsmith::serve::Runs;
use serde_json::{Value, json};

use super::status::states;
use crate::failure::Failure;

/// Lines of a log that are shown; a screen has no more points.
const MOST_STEPS: usize = 1000;

/// A folder of runs, or a run.
pub(super) struct ServedRuns {
    root: PathBuf,
}

impl ServedRuns {
    /// The runs of `--runs`. The folder may be empty: the first run may begin later.
    pub(super) fn of(root: &Path) -> Result<ServedRuns, Failure> {
        let root = root.canonicalize().ok().filter(|root| root.is_dir()).ok_or_else(|| {
            Failure::input(
                format!("`--runs {}` is not a folder", root.display()),
                Some(
                    "name the folder that has your runs (`runs`, unless `run.dir` says otherwise) or one run"
                        .into(),
                ),
            )
        })?;
        Ok(ServedRuns { root })
    }

    /// Runs by name. Names come from the folder alone and links lead nowhere else, so no request reaches another place.
    fn found(&self) -> BTreeMap<String, RunFolder> {
        // A bundle has a run file, too, and no state.
        let is_run = |path: &Path| path.join("run.toml").is_file() && path.join("state").is_dir();
        let named = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.to_owned();
            Some((name, RunFolder::new(path)))
        };
        if is_run(&self.root) {
            return named(self.root.clone()).into_iter().collect();
        }
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten().map(|entry| entry.path());
        let inside = |path: &PathBuf| path.canonicalize().is_ok_and(|real| real.starts_with(&self.root));
        entries.filter(|path| is_run(path) && inside(path)).filter_map(named).collect()
    }
}

/// When something was last written.
fn written_unix_s(folder: &RunFolder) -> Option<u64> {
    let state = std::fs::read_dir(folder.root().join("state")).into_iter().flatten().flatten();
    let files = state.map(|entry| entry.path()).chain([folder.stage_dir(Stage::Train).join("log.jsonl")]);
    let written = files.filter_map(|path| path.metadata().ok()?.modified().ok()).max()?;
    Some(written.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// How far a run is. Files that cannot be read are told in words, as the others can still be shown.
fn overview(name: &str, folder: &RunFolder, curve: Option<&Curve>) -> Value {
    let busy = folder.is_busy();
    let file: Result<RunFile, _> = run::load(&folder.run_file(), &[]);
    let mut errors: Vec<String> = file.as_ref().err().map(ToString::to_string).into_iter().collect();
    let stages = file.as_ref().map_or_else(|_| Stage::ALL.to_vec(), stages_of);
    let (mut shown, mut state_of) = (Vec::new(), states(busy));
    for stage in stages {
        let known = folder.read(stage).unwrap_or_else(|error| {
            errors.push(error.to_string());
            None
        });
        shown.push(json!({
            "stage": stage,
            "state": state_of(known.as_ref()),
            "seconds": known.as_ref().map(|file| file.seconds),
            "progress": known.as_ref().and_then(|file| file.progress.clone()),
            "summary": known.map(|file| file.summary),
        }));
    }
    let any = |state: &str| shown.iter().any(|stage| stage["state"] == state);
    let state = if busy {
        "running"
    } else if any("interrupted") {
        "interrupted"
    } else if any("waiting") || any("outdated") {
        "unfinished"
    } else {
        "done"
    };
    json!({
        "name": name,
        "state": state,
        "method": file.as_ref().ok().map(|file| file.draft.method.name()),
        "target": file.as_ref().ok().map(|file| &file.target.source),
        "written_unix_s": written_unix_s(folder),
        "step": curve.and_then(|curve| curve.steps.last()).map(|last| last.step),
        "total_steps": curve.and_then(|curve| curve.total_steps),
        "best_accept_len": curve.and_then(Curve::best_accept_len),
        "stages": shown,
        "errors": errors,
    })
}

impl Runs for ServedRuns {
    fn list(&self) -> Vec<Value> {
        let runs = self.found();
        runs.iter().map(|(name, folder)| overview(name, folder, Curve::of(folder).as_ref())).collect()
    }

    fn run(&self, name: &str) -> Option<Value> {
        let folder = self.found().remove(name)?;
        let curve = Curve::of(&folder);
        let mut run = overview(name, &folder, curve.as_ref());
        run["curve"] = curve.map_or(Value::Null, |mut curve| {
            let every = curve.thin(MOST_STEPS);
            let mut value = json!(curve);
            value["every"] = every.into();
            value
        });
        Some(run)
    }
}
