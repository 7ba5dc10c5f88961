//! `draftsmith status`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use draftsmith::Error;
use draftsmith::cli;
use draftsmith::disk::human;
use draftsmith::formats::run::Stage;
use draftsmith::run::aside::{bytes_below, free_command};
use draftsmith::run::curve::Curve;
use draftsmith::run::planned::Planned;
use draftsmith::run::state::{Phase, RunFolder, StageFile, StateError};
use draftsmith::run::{self, made_by, stages_of, with_paths};
use serde_json::{Value, json};

use super::Session;
use crate::failure::Failure;
use crate::printer::{self, duration};

pub(crate) fn run(args: &cli::Status, _session: &Session) -> Result<u8, Failure> {
    let folders = match &args.run {
        Some(path) => vec![folder_of(path)?],
        None => all_runs(Path::new("runs"))?,
    };
    for folder in &folders {
        let status = status(folder)?;
        if args.json {
            printer::json(&status)?;
        } else {
            printer::out(&page(&status))?;
        }
    }
    Ok(0)
}

fn folder_of(path: &Path) -> Result<RunFolder, Failure> {
    if path.is_file() {
        let folder = RunFolder::new(run::load(path, &[])?.dir());
        if !folder.run_file().is_file() {
            return Err(Failure::input(
                format!(
                    "the run of `{}` was not begun here: there is no `{}`",
                    path.display(),
                    folder.root().display()
                ),
                Some(format!(
                    "`draftsmith run {}` begins it, `--plan` behind it shows the bill",
                    path.display()
                )),
            ));
        }
        return Ok(folder);
    }
    Ok(RunFolder::new(path))
}

fn all_runs(root: &Path) -> Result<Vec<RunFolder>, Failure> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("run.toml").is_file())
        .collect();
    folders.sort();
    if folders.is_empty() {
        return Err(Failure::input(
            format!("no runs in `{}`", root.display()),
            Some("begin one with `draftsmith run RUN.toml`, or name the folder of one".to_string()),
        ));
    }
    Ok(folders.into_iter().map(RunFolder::new).collect())
}

fn status(folder: &RunFolder) -> Result<Value, Failure> {
    if !folder.run_file().is_file() {
        return Err(Error::from(StateError::NoRun { folder: folder.root().to_path_buf() }).into());
    }
    let file = run::load(&folder.run_file(), &[])?;
    let busy = folder.is_busy();
    let planned = Planned::of(folder).map_err(Error::from)?;
    let (mut stages, mut state_of) = (Vec::new(), states(busy));
    for stage in stages_of(&file) {
        let known = folder.read(stage).map_err(Error::from)?;
        let known = known.map(|known| with_paths(known, stage, &file));
        stages.push(json!({
            "stage": stage,
            "state": state_of(known.as_ref()),
            "seconds": known.as_ref().map(|f| f.seconds),
            "planned_seconds": planned.as_ref().and_then(|planned| planned.seconds(stage)),
            "progress": known.as_ref().and_then(|f| f.progress.clone()),
            "summary": known.map(|f| f.summary).unwrap_or(Value::Null),
        }));
    }
    let mut aside = Vec::new();
    for stage in Stage::ALL {
        for old in folder.all_aside(stage, &made_by(&file, stage)) {
            aside.push(json!({
                "stage": stage,
                "path": old.folder,
                "bytes": old.bytes(),
                "free_with": old.free_command(),
            }));
        }
    }
    let kept = bytes_below(&folder.kept_dir());
    let kept = (kept > 0).then(|| {
        json!({
            "path": folder.kept_dir(),
            "bytes": kept,
            "free_with": free_command(&folder.kept_dir()),
        })
    });
    Ok(json!({
        "run": folder.root(),
        "name": file.run.name,
        "busy": busy,
        "best_accept_len": Curve::of(folder).and_then(|curve| curve.best_accept_len()),
        "stages": stages,
        "kept_states": kept,
        "aside": aside,
    }))
}

/// Words for how far stages are, asked in their order; `busy`: somebody works in the folder. What was made of something
/// that is being made anew is `outdated`.
pub(super) fn states(busy: bool) -> impl FnMut(Option<&StageFile>) -> &'static str {
    let mut all_done = true;
    move |known| {
        let state = match known {
            None => "waiting",
            Some(StageFile { phase: Phase::Done, .. }) if all_done => "done",
            Some(StageFile { phase: Phase::Done, .. }) => "outdated",
            Some(_) if busy => "running",
            Some(_) => "interrupted",
        };
        all_done &= state == "done";
        state
    }
}

fn page(status: &Value) -> String {
    let mut page = String::new();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let _ = writeln!(page, "{}", text(&status["run"]));
    for stage in status["stages"].as_array().into_iter().flatten() {
        let mut line = format!("  {:<11} {:<12}", text(&stage["stage"]), text(&stage["state"]));
        let time = |seconds: f64| duration(Duration::from_secs_f64(seconds.max(0.0)));
        let (took, planned) = (stage["seconds"].as_f64(), stage["planned_seconds"].as_f64());
        if took.is_some() || planned.is_some() {
            let _ = write!(line, "{:>7}  ", took.map_or_else(String::new, time));
        }
        if let Some(planned) = planned {
            let _ = write!(line, "of {:>7} planned  ", time(planned));
        }
        let progress = &stage["progress"];
        if let Some(done) = progress["done"].as_u64() {
            let total = progress["total"].as_u64().map(|t| format!(" of {t}")).unwrap_or_default();
            let _ = write!(line, "{}: {done}{total} {}", text(&progress["task"]), text(&progress["unit"]));
            if let Some(eta) = progress["eta_s"].as_f64().filter(|_| stage["state"] == "running") {
                let _ = write!(line, ", {} left", duration(Duration::from_secs_f64(eta.max(0.0))));
            }
            let detail = text(&progress["detail"]);
            if !detail.is_empty() {
                let _ = write!(line, ", {detail}");
            }
        }
        let _ = writeln!(page, "{}", line.trim_end());
    }
    let mut free = |name: &str, what: &str, place: &Value| {
        let size = human(place["bytes"].as_u64().unwrap_or(0));
        let _ = writeln!(page, "  {name:<11} {what:<12}{size:>9}  {}", text(&place["free_with"]));
    };
    for old in status["aside"].as_array().into_iter().flatten() {
        free(&text(&old["stage"]), "set aside", old);
    }
    if status["kept_states"].is_object() {
        free("states", "for capture", &status["kept_states"]);
    }
    if let Some(best) = status["best_accept_len"].as_f64() {
        let over = status["stages"].as_array().is_some_and(|all| all.iter().all(|s| s["state"] == "done"));
        let so_far = if over { "" } else { " so far" };
        let _ = writeln!(page, "  best accept length{so_far}: {best:.3}");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_of_something_that_is_made_anew_is_outdated() {
        let file = |phase| {
            Some(StageFile {
                key: "k".to_string(),
                phase,
                seconds: 1.0,
                progress: None,
                summary: Value::Null,
                inputs: std::collections::BTreeMap::new(),
            })
        };
        let all = [file(Phase::Done), file(Phase::Running), file(Phase::Done), None];
        let words = |busy| all.iter().map(|known| known.as_ref()).map(states(busy)).collect::<Vec<_>>();
        assert_eq!(words(true), ["done", "running", "outdated", "waiting"]);
        assert_eq!(words(false), ["done", "interrupted", "outdated", "waiting"]);
    }
}
