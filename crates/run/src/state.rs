//! The folder of a run and what it knows about its stages.
//!
//! ```text
//! runs/NAME/run.toml             the completed run file: runs again to the same end
//! runs/NAME/state/STAGE.json     key, state and summary of a stage
//! runs/NAME/state/planned.json   what it was planned to take
//! runs/NAME/state/lock           held while a process works here
//! runs/NAME/STAGE/               what the stage made
//! runs/NAME/STAGE.old-KEY/       what it made from other inputs; state/STAGE.old-KEY.json says which
//! ```
//! Invariant: a stage file says `done` only after everything the stage made is on disk. A stage whose key (the hash of
//! all its inputs) differs from the file's was made from something else and is set aside ([`aside`](super::aside)). A
//! stage that is `running` under the right key was interrupted: it goes on by its own means. No file here names the
//! folder of the run, so the folder can be moved.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::run::Stage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The page, in the folder of stage `bench`.
pub(crate) const REPORT: &str = "report.html";
/// Finished dialogues, in the folder of stage `regenerate`.
pub(crate) const ANSWERS: &str = "answers.jsonl";
/// Seconds between two writes of a stage's progress.
const PROGRESS_EVERY_S: f64 = 2.0;

/// Whether a stage is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Begun; if no process holds the lock, interrupted.
    Running,
    /// Everything it makes is on disk.
    Done,
}

/// How far a running stage is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub task: String,
    /// Units done.
    pub done: u64,
    /// Units in all, where that is known.
    pub total: Option<u64>,
    /// `rows`, `steps`, …
    pub unit: String,
    /// Seconds left at the speed so far.
    pub eta_s: Option<f64>,
    /// Numbers in words: loss, accept length.
    pub detail: String,
    /// When this was written.
    pub unix_s: u64,
}

/// `state/STAGE.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageFile {
    /// Hash of all inputs.
    pub key: String,
    /// Finished or not.
    pub phase: Phase,
    /// Seconds spent, interrupted attempts included.
    pub seconds: f64,
    /// Last known progress.
    pub progress: Option<Progress>,
    /// What came out: counts per stage, and paths relative to the folder of the run.
    pub summary: Value,
    /// What the key is the hash of, by name; empty in files of the first version.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
}

/// Why the folder of a run cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Somebody works there.
    #[error("another draftsmith works in `{}`", folder.display())]
    Busy {
        /// The folder of the run.
        folder: PathBuf,
    },
    /// A stage file that is not ours.
    #[error("`{}` is not a stage file: {reason}", path.display())]
    BadStageFile {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// A kept bill that is not ours.
    #[error("`{}` is not the bill of a run: {reason}", path.display())]
    BadBill {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// No run there.
    #[error("`{}` is not the folder of a run", folder.display())]
    NoRun {
        /// The folder.
        folder: PathBuf,
    },
    /// The disk does not play along.
    #[error(transparent)]
    Disk(#[from] AtomicError),
}

impl StateError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            StateError::Busy { .. } => Some("wait for it, or give this run another `run.name`".to_string()),
            StateError::BadStageFile { path, .. } => {
                Some(format!("remove `{}`: the stage is then made again", path.display()))
            }
            StateError::BadBill { path, .. } => {
                Some(format!("remove `{}`: only what was planned is then no longer told", path.display()))
            }
            StateError::NoRun { .. } => {
                Some("give the folder that `draftsmith run` printed, or the run file".to_string())
            }
            StateError::Disk(error) => error.hint(),
        }
    }
}

/// The folder of a run.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// The folder at `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> RunFolder {
        RunFolder { root: root.into() }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What a stage makes.
    pub fn stage_dir(&self, stage: Stage) -> PathBuf {
        self.root.join(stage.name())
    }

    /// States that answering left for capture, which removes them.
    pub fn kept_dir(&self) -> PathBuf {
        self.root.join("kept")
    }

    /// The completed run file.
    pub fn run_file(&self) -> PathBuf {
        self.root.join("run.toml")
    }

    pub(super) fn state_dir(&self) -> PathBuf {
        self.root.join("state")
    }

    pub(super) fn stage_file(&self, stage: Stage) -> PathBuf {
        self.state_dir().join(format!("{}.json", stage.name()))
    }

    /// True if a run has worked here.
    pub fn is_run(&self) -> bool {
        self.run_file().is_file() && self.state_dir().join("lock").is_file()
    }

    /// Takes the folder for this process, making it if needed.
    ///
    /// # Errors
    /// [`StateError::Busy`] if another process holds it.
    pub fn lock(&self) -> Result<RunLock, StateError> {
        let dir = self.state_dir();
        atomic::create_dir_all(&dir)?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| AtomicError::from_io("open", &path, e))?;
        // `status` holds the lock for an instant to see whether it is free: worth a second look.
        for _ in 0..5 {
            match file.try_lock() {
                Ok(()) => return Ok(RunLock { _file: file }),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(20)),
                Err(TryLockError::Error(e)) => return Err(AtomicError::from_io("lock", &path, e).into()),
            }
        }
        Err(StateError::Busy { folder: self.root.clone() })
    }

    /// True while a process holds the folder.
    pub fn is_busy(&self) -> bool {
        File::open(self.state_dir().join("lock"))
            .is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    }

    /// What is known about a stage; `None` before it began.
    ///
    /// # Errors
    /// [`StateError::BadStageFile`].
    pub fn read(&self, stage: Stage) -> Result<Option<StageFile>, StateError> {
        read_stage_file(self.stage_file(stage))
    }

    /// Writes what is known about a stage.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn write(&self, stage: Stage, file: &StageFile) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(file).expect("a stage file holds only what JSON can say");
        Ok(atomic::write(self.stage_file(stage), text)?)
    }

    /// Forgets a stage; what it made stays.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn forget(&self, stage: Stage) -> Result<(), StateError> {
        let path = self.stage_file(stage);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(AtomicError::from_io("remove", &path, e).into())
            }
            _ => Ok(()),
        }
    }
}

/// A stage file at a path; `None` if there is none.
pub(super) fn read_stage_file(path: PathBuf) -> Result<Option<StageFile>, StateError> {
    read_json(path, |path, reason| StateError::BadStageFile { path, reason })
}

/// What a file of a run's state says; `None` if there is none, and `bad` of its path and the reason where it cannot be read.
pub(super) fn read_json<T: DeserializeOwned>(
    path: PathBuf,
    bad: impl FnOnce(PathBuf, String) -> StateError,
) -> Result<Option<T>, StateError> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = atomic::read(&path)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| bad(path, e.to_string()))
}

/// Held while a process works in the folder of a run.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

/// A stage at work: keeps its file up to date.
pub struct StageClock {
    folder: RunFolder,
    stage: Stage,
    file: StageFile,
    began: Instant,
    before_s: f64,
    last_write_s: f64,
    task_began: Instant,
    task_from: Option<u64>,
}

impl StageClock {
    /// Marks a stage as running under `key`, the hash of `inputs`.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn begin(
        folder: &RunFolder,
        stage: Stage,
        key: &str,
        inputs: BTreeMap<String, String>,
        before_s: f64,
    ) -> Result<StageClock, StateError> {
        let file = StageFile {
            key: key.to_string(),
            phase: Phase::Running,
            seconds: before_s,
            progress: None,
            summary: Value::Null,
            inputs,
        };
        folder.write(stage, &file)?;
        let now = Instant::now();
        Ok(StageClock {
            folder: folder.clone(),
            stage,
            file,
            began: now,
            before_s,
            last_write_s: 0.0,
            task_began: now,
            task_from: None,
        })
    }

    /// A task of the stage begins.
    pub fn task(&mut self, task: &str, total: Option<u64>, unit: &str) {
        self.file.progress = Some(Progress {
            task: task.to_string(),
            done: 0,
            total,
            unit: unit.to_string(),
            eta_s: None,
            detail: String::new(),
            unix_s: unix_s(),
        });
        self.task_began = Instant::now();
        self.task_from = None;
    }

    /// So much of the task is done. Written now and then; a failure to write progress stops nobody.
    pub fn at(&mut self, done: u64) {
        let elapsed = self.began.elapsed().as_secs_f64();
        let Some(progress) = &mut self.file.progress else { return };
        // A resumed task begins in the middle: the rate counts only what this process did.
        let from = *self.task_from.get_or_insert(done);
        progress.done = done;
        if elapsed - self.last_write_s < PROGRESS_EVERY_S {
            return;
        }
        self.last_write_s = elapsed;
        let here = done.saturating_sub(from);
        progress.eta_s = progress.total.filter(|_| here > 0).map(|total| {
            self.task_began.elapsed().as_secs_f64() / here as f64 * total.saturating_sub(done) as f64
        });
        progress.unix_s = unix_s();
        self.file.seconds = self.before_s + elapsed;
        let _ = self.folder.write(self.stage, &self.file);
    }

    /// Numbers in words.
    pub fn detail(&mut self, text: &str) {
        if let Some(progress) = &mut self.file.progress {
            progress.detail = text.to_string();
        }
    }

    /// The stage was interrupted: its seconds are kept.
    pub fn pause(mut self) {
        self.file.seconds = self.before_s + self.began.elapsed().as_secs_f64();
        let _ = self.folder.write(self.stage, &self.file);
    }

    /// The stage is done.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn finish(mut self, summary: Value) -> Result<StageFile, StateError> {
        self.file.phase = Phase::Done;
        self.file.seconds = self.before_s + self.began.elapsed().as_secs_f64();
        self.file.progress = None;
        self.file.summary = summary;
        self.folder.write(self.stage, &self.file)?;
        Ok(self.file)
    }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Changed inputs that are named.
pub(crate) const WHY_SHOWN: usize = 4;

/// What differs between two lists of inputs. An input that one list lacks has its default there.
pub(crate) fn changes(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let show = |side: Option<&String>| side.map_or("the default", String::as_str).to_string();
    names
        .into_iter()
        .filter(|name| before.get(*name) != now.get(*name))
        .map(|name| match name.starts_with("content of ") || name == "target weights" {
            true => format!("{name} changed"),
            false => format!("{name}: {} → {}", show(before.get(name)), show(now.get(name))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_by_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path().join("run"));
        assert!(!folder.is_busy());
        let lock = folder.lock().unwrap();
        assert!(folder.is_busy());
        assert!(matches!(folder.lock(), Err(StateError::Busy { .. })));
        drop(lock);
        folder.lock().unwrap();
    }

    #[test]
    fn a_stage_is_done_only_after_finish_and_keeps_the_seconds_of_earlier_attempts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        let _lock = folder.lock().unwrap();
        assert_eq!(folder.read(Stage::Data).unwrap(), None);
        let clock = StageClock::begin(&folder, Stage::Data, "k", BTreeMap::new(), 5.0).unwrap();
        assert_eq!(folder.read(Stage::Data).unwrap().unwrap().phase, Phase::Running);
        let file = clock.finish(serde_json::json!({"rows": 3})).unwrap();
        assert_eq!(folder.read(Stage::Data).unwrap().unwrap(), file);
        assert!(file.phase == Phase::Done && file.seconds >= 5.0);
        folder.forget(Stage::Data).unwrap();
        assert_eq!(folder.read(Stage::Data).unwrap(), None);
    }

    #[test]
    fn a_foreign_stage_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        let _lock = folder.lock().unwrap();
        fs::write(dir.path().join("state/data.json"), "{}").unwrap();
        let error = folder.read(Stage::Data).unwrap_err();
        assert!(error.to_string().contains("state/data.json"), "{error}");
    }
}
