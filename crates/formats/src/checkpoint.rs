//! Checkpoints of a training run: one folder per step, whole or absent.
//!
//! ```text
//! checkpoints/step-00000400/model.safetensors      weights of the draft
//!                           optimizer.safetensors  master weights and moments
//!                           state.json             where training stands; written last, holds the hashes of both
//! checkpoints/best.json                            which step validated best
//! ```
//! The newest step folder is where a run goes on; a pointer file could disagree with the folders, so there is none.
//! A run file with other training keys is refused, since the rest of the schedule would not fit its beginning.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::{self, AtomicDir, AtomicError};
use crate::hash;
use crate::run::{RunFile, Stage};
use crate::safetensors_dir::{self, SafetensorsDir, SafetensorsError, TensorData};

/// Newest version that this code reads and writes.
pub const CHECKPOINT_VERSION: u32 = 1;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const BEST: &str = "best.json";

/// Where training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointState {
    /// Optimiser steps done.
    pub step: u64,
    /// Passes over the data begun, from 0.
    pub epoch: u64,
    /// Where in the data the next step begins.
    pub cursor: DataCursor,
    /// State of every random generator, by name.
    pub rng: BTreeMap<String, Vec<u64>>,
    /// Numbers the schedule was laid out with, such as `total_steps`.
    pub schedule: BTreeMap<String, u64>,
    /// Tokens trained so far.
    pub trained_tokens: u64,
    /// Numbers for people; those that are not finite are left out. Nothing is computed from them.
    pub metrics: BTreeMap<String, f64>,
    /// [`RunFile::stage_hash`] of [`Stage::Train`].
    pub run_hash: String,
    /// The resolved run file, to tell what has changed.
    pub run_toml: String,
}

/// Where in the data the next step begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataCursor {
    /// Epoch of the order that `position` counts in.
    pub epoch: u64,
    /// Packed sequences of that epoch that are used up.
    pub position: u64,
}

/// `state.json`: the state with what makes it a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    format: String,
    version: u32,
    model_sha256: String,
    optimizer_sha256: String,
    state: CheckpointState,
}

const FORMAT: &str = "draftsmith-checkpoint";

/// The checkpoint with the best validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its score; larger is better.
    pub score: f64,
    /// What was measured, such as `accept_len`.
    pub metric: String,
}

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] AtomicError),
    /// The tensors are not readable.
    #[error(transparent)]
    Tensors(#[from] SafetensorsError),
    /// `state.json` or `best.json` is not readable.
    #[error("checkpoint file `{}`: {problem}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        problem: String,
    },
    /// A version from the future.
    #[error("checkpoint `{}` has format version {found}, this program reads up to {newest}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Newest version that is known.
        newest: u32,
    },
    /// A file with other content than when it was saved.
    #[error("checkpoint file `{}` has sha256 {found}, `state.json` says {wanted}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Hash of the file.
        found: String,
        /// Hash when it was saved.
        wanted: String,
    },
    /// The run file's training keys have changed.
    #[error("checkpoint `{}` belongs to another run file: {}", path.display(), changes(differences))]
    OtherRun {
        /// The checkpoint.
        path: PathBuf,
        /// `key: then → now`
        differences: Vec<String>,
    },
    /// No checkpoint where one is needed.
    #[error("`{}` holds no checkpoint", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
    },
}

fn changes(differences: &[String]) -> String {
    match differences {
        [] => "its hash differs".to_string(),
        [one] => one.clone(),
        [one, rest @ ..] => format!("{one} (and {} more)", rest.len()),
    }
}

impl CheckpointError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            CheckpointError::File(e) => e.hint(),
            CheckpointError::Tensors(e) => e.hint(),
            CheckpointError::Version { .. } => Some("update draftsmith".to_string()),
            CheckpointError::State { path, .. } | CheckpointError::Hash { path, .. } => Some(format!(
                "delete `{}` to go on from the checkpoint before it",
                path.parent().unwrap_or(path).display()
            )),
            CheckpointError::OtherRun { differences, path } => {
                let all = if differences.len() > 1 {
                    format!("changed: {}; ", differences.join(", "))
                } else {
                    String::new()
                };
                let folder = path.parent().unwrap_or(path).display();
                Some(format!(
                    "{all}undo the change, choose another `run.name`, or delete `{folder}` to start over"
                ))
            }
            CheckpointError::Missing { .. } => Some("train first: `draftsmith train RUN.toml`".to_string()),
        }
    }
}

/// A checkpoint read back; the tensors are mapped.
#[derive(Clone, Debug)]
pub struct LoadedCheckpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Where training stood.
    pub state: CheckpointState,
    /// Weights of the draft.
    pub model: SafetensorsDir,
    /// Master weights and moments.
    pub optimizer: SafetensorsDir,
    /// Hash of the weights file.
    pub model_sha256: String,
}

/// The folder with all checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// The checkpoints in a folder, which need not exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Checkpoints {
        Checkpoints { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the checkpoint of a step is or would be.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }

    /// Saves a checkpoint, replacing one of the same step. Returns its folder.
    pub fn save(
        &self,
        state: &CheckpointState,
        model: &[TensorData],
        optimizer: &[TensorData],
    ) -> Result<PathBuf, CheckpointError> {
        let path = self.path_of(state.step);
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let model = safetensors_dir::to_bytes(model, &metadata);
        let optimizer = safetensors_dir::to_bytes(optimizer, &metadata);
        let mut state = state.clone();
        state.metrics.retain(|_, value| value.is_finite());
        let file = StateFile {
            format: FORMAT.to_string(),
            version: CHECKPOINT_VERSION,
            model_sha256: hash::sha256_hex(&model),
            optimizer_sha256: hash::sha256_hex(&optimizer),
            state,
        };
        let mut text = serde_json::to_string_pretty(&file).expect("the state is plain data");
        text.push('\n');
        let new = AtomicDir::create(&path)?;
        new.write(MODEL, model)?;
        new.write(OPTIMIZER, optimizer)?;
        new.write(STATE, text)?;
        new.commit_replacing()?;
        Ok(path)
    }

    /// Steps with a checkpoint, ascending.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(AtomicError::from_io("list", &self.dir, e).into()),
        };
        let step_of = |name: &str| name.strip_prefix("step-")?.parse::<u64>().ok();
        let mut steps: Vec<u64> = entries
            .flatten()
            .filter(|e| e.path().join(STATE).is_file())
            .filter_map(|e| step_of(&e.file_name().to_string_lossy()))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Folder of the newest checkpoint.
    pub fn latest(&self) -> Result<Option<PathBuf>, CheckpointError> {
        Ok(self.steps()?.last().map(|step| self.path_of(*step)))
    }

    /// Reads a checkpoint and compares its hashes.
    pub fn load(path: impl AsRef<Path>) -> Result<LoadedCheckpoint, CheckpointError> {
        let path = path.as_ref();
        let state_path = path.join(STATE);
        if !state_path.is_file() {
            return Err(CheckpointError::Missing { path: path.to_path_buf() });
        }
        let bytes = atomic::read(&state_path)?;
        let problem = |problem: String| CheckpointError::State { path: state_path.clone(), problem };
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| problem(e.to_string()))?;
        if head.format != FORMAT {
            return Err(problem(format!("`format` is `{}`, expected `{FORMAT}`", head.format)));
        }
        if head.version == 0 || head.version > CHECKPOINT_VERSION {
            let (path, found) = (state_path, head.version);
            return Err(CheckpointError::Version { path, found, newest: CHECKPOINT_VERSION });
        }
        let file: StateFile = serde_json::from_slice(&bytes).map_err(|e| problem(e.to_string()))?;
        for (name, wanted) in [(MODEL, &file.model_sha256), (OPTIMIZER, &file.optimizer_sha256)] {
            let path = path.join(name);
            let found = hash::sha256_file(&path)?;
            if found != *wanted {
                return Err(CheckpointError::Hash { path, found, wanted: wanted.clone() });
            }
        }
        Ok(LoadedCheckpoint {
            path: path.to_path_buf(),
            state: file.state,
            model: SafetensorsDir::open(path.join(MODEL))?,
            optimizer: SafetensorsDir::open(path.join(OPTIMIZER))?,
            model_sha256: file.model_sha256,
        })
    }

    /// The newest checkpoint, if there is one, to go on with this run file.
    ///
    /// # Errors
    /// [`CheckpointError::OtherRun`] if the run file differs in a key that training depends on.
    pub fn resume(&self, run: &RunFile) -> Result<Option<LoadedCheckpoint>, CheckpointError> {
        // A save that was killed while it replaced a checkpoint is ended first.
        for name in self.interrupted()? {
            atomic::recover(self.dir.join(name))?;
        }
        let Some(path) = self.latest()? else { return Ok(None) };
        let loaded = Checkpoints::load(path)?;
        if loaded.state.run_hash != run.stage_hash(Stage::Train) {
            let then = RunFile::parse(&loaded.path.join(STATE), &loaded.state.run_toml, &[]).ok();
            let differences = then.map_or(Vec::new(), |then| then.differences(run, Some(Stage::Train)));
            return Err(CheckpointError::OtherRun { path: loaded.path, differences });
        }
        Ok(Some(loaded))
    }

    /// Names of step folders of which only an `.old` twin may be left.
    fn interrupted(&self) -> Result<Vec<String>, CheckpointError> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Ok(Vec::new()) };
        let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        let old = |name: String| {
            let inner = name.strip_prefix('.')?.strip_suffix(".old")?;
            inner.split_once('.').map(|(step, _)| step.to_string())
        };
        Ok(names.filter_map(old).collect())
    }

    /// The checkpoint with the best validation, if one was marked and is still there.
    pub fn best(&self) -> Result<Option<Best>, CheckpointError> {
        let path = self.dir.join(BEST);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = atomic::read(&path)?;
        let best: Best = serde_json::from_slice(&bytes)
            .map_err(|e| CheckpointError::State { path: path.clone(), problem: e.to_string() })?;
        Ok(Some(best).filter(|b| self.path_of(b.step).join(STATE).is_file()))
    }

    /// Marks a saved checkpoint as best if its score is higher than the best so far. Ties keep the earlier one.
    ///
    /// Returns true if it is the best now.
    pub fn offer_best(&self, step: u64, metric: &str, score: f64) -> Result<bool, CheckpointError> {
        if !self.path_of(step).join(STATE).is_file() {
            return Err(CheckpointError::Missing { path: self.path_of(step) });
        }
        let before = self.best()?;
        let better = score.is_finite() && before.is_none_or(|b| score > b.score || b.step == step);
        if better {
            let best = Best { step, score, metric: metric.to_string() };
            let text = serde_json::to_string_pretty(&best).expect("plain data");
            atomic::write(self.dir.join(BEST), text + "\n")?;
        }
        Ok(better)
    }

    /// The checkpoint to make a bundle of: the best, or the newest if none was marked.
    pub fn load_best(&self) -> Result<LoadedCheckpoint, CheckpointError> {
        let path = match self.best()? {
            Some(best) => Some(self.path_of(best.step)),
            None => self.latest()?,
        };
        Checkpoints::load(path.ok_or_else(|| CheckpointError::Missing { path: self.dir.clone() })?)
    }

    /// Removes all but the newest `keep` checkpoints and the best one.
    pub fn rotate(&self, keep: usize) -> Result<(), CheckpointError> {
        let steps = self.steps()?;
        let best = self.best()?.map(|b| b.step);
        let old = &steps[..steps.len().saturating_sub(keep.max(1))];
        for step in old.iter().filter(|s| Some(**s) != best) {
            atomic::remove_dir_all(self.path_of(*step))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic::small_disk;

    fn run(overrides: &[&str]) -> RunFile {
        let text = "[target]\nsource = \"m\"\n[[data.sources]]\npath = \"a\"\n";
        let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
        RunFile::parse(Path::new("run.toml"), text, &overrides).unwrap()
    }

    fn state(step: u64) -> CheckpointState {
        CheckpointState {
            step,
            epoch: 1,
            cursor: DataCursor { epoch: 1, position: 3 },
            rng: BTreeMap::from([("data".to_string(), vec![u64::MAX, 1])]),
            schedule: BTreeMap::from([("total_steps".to_string(), 100)]),
            trained_tokens: 5,
            metrics: BTreeMap::from([("loss".to_string(), 1.5), ("bad".to_string(), f64::NAN)]),
            run_hash: run(&[]).stage_hash(Stage::Train),
            run_toml: run(&[]).to_toml(),
        }
    }

    fn save(all: &Checkpoints, step: u64) -> PathBuf {
        let model = [TensorData::f32("w", &[1], &[step as f32])];
        let optimizer = [TensorData::f32("m", &[2], &[0.1, 0.2])];
        all.save(&state(step), &model, &optimizer).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_newest_checkpoint_is_where_a_run_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path().join("checkpoints"));
        assert!(all.resume(&run(&[])).unwrap().is_none());
        save(&all, 9);
        save(&all, 10);
        save(&all, 100);
        // What kill -9 leaves while step 110 is being saved.
        std::fs::create_dir(all.dir().join(".step-00000110.1-0.tmp")).unwrap();
        let found = all.resume(&run(&["train.log_every=1", "run.name=other"])).unwrap().unwrap();
        let mut wanted = state(100);
        wanted.metrics.remove("bad");
        assert_eq!(found.state, wanted);
        assert_eq!(found.model.get("w").unwrap().to_f32().unwrap(), [100.0]);
        assert_eq!(found.optimizer.get("m").unwrap().to_f32().unwrap(), [0.1, 0.2]);
        assert_eq!(all.steps().unwrap(), [9, 10, 100]);
    }

    #[test]
    fn the_same_checkpoint_has_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Checkpoints::new(dir.path().join("a")), Checkpoints::new(dir.path().join("b")));
        let (a, b) = (save(&a, 7), save(&b, 7));
        for name in [MODEL, OPTIMIZER, STATE] {
            assert_eq!(std::fs::read(a.join(name)).unwrap(), std::fs::read(b.join(name)).unwrap());
        }
        assert_eq!(names(&a), [MODEL, OPTIMIZER, STATE]);
    }

    #[test]
    fn another_run_file_is_refused_and_the_changes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path());
        let path = save(&all, 5);
        let err = all.resume(&run(&["train.lr=1e-3"])).unwrap_err();
        let expected =
            format!("checkpoint `{}` belongs to another run file: train.lr: 0.0001 → 0.001", path.display());
        assert_eq!(err.to_string(), expected);
        assert!(err.hint().unwrap().contains("undo the change"));
        let err = all.resume(&run(&["train.lr=1e-3", "train.epochs=3"])).unwrap_err();
        assert!(err.to_string().ends_with("train.epochs: 1 → 3 (and 1 more)"), "{err}");
        assert!(err.hint().unwrap().contains("train.lr: 0.0001 → 0.001"));
    }

    #[test]
    fn rotation_keeps_the_newest_and_the_best() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path());
        for (step, score) in [(1, 1.2), (2, 2.5), (3, 2.5), (4, 2.0), (5, f64::NAN)] {
            save(&all, step);
            assert_eq!(all.offer_best(step, "accept_len", score).unwrap(), step <= 2, "step {step}");
            all.rotate(2).unwrap();
        }
        assert_eq!(all.steps().unwrap(), [2, 4, 5]);
        assert_eq!(all.best().unwrap().unwrap().step, 2);
        assert_eq!(all.load_best().unwrap().state.step, 2);
        assert!(matches!(all.offer_best(77, "accept_len", 9.0), Err(CheckpointError::Missing { .. })));
        let none = Checkpoints::new(dir.path().join("none"));
        assert!(matches!(none.load_best(), Err(CheckpointError::Missing { .. })));
    }

    #[test]
    fn a_changed_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path());
        let path = save(&all, 5);
        for name in [MODEL, OPTIMIZER] {
            let good = std::fs::read(path.join(name)).unwrap();
            let mut bad = good.clone();
            *bad.last_mut().unwrap() ^= 1;
            std::fs::write(path.join(name), &bad).unwrap();
            let err = all.resume(&run(&[])).unwrap_err();
            assert!(matches!(&err, CheckpointError::Hash { path, .. } if path.ends_with(name)), "{err}");
            assert!(err.hint().unwrap().contains("step-00000005"));
            std::fs::write(path.join(name), &good).unwrap();
        }
        let text = std::fs::read_to_string(path.join(STATE)).unwrap();
        for (from, to, expected) in [
            ("\"version\": 1", "\"version\": 2", "format version 2"),
            ("draftsmith-checkpoint", "x", "`format` is `x`"),
            ("\"epoch\"", "\"epoche\"", "unknown field"),
            ("{", "[", "line 2 column"),
        ] {
            std::fs::write(path.join(STATE), text.replacen(from, to, 1)).unwrap();
            let err = all.resume(&run(&[])).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        }
    }

    #[test]
    fn a_full_disk_leaves_the_checkpoints_before() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path());
        save(&all, 5);
        let model = [TensorData::f32("w", &[1000], &[1.0; 1000])];
        let err = small_disk::with(6000, || all.save(&state(6), &model, &model)).unwrap_err();
        assert!(err.to_string().contains("no space left while writing"), "{err}");
        assert!(err.to_string().contains("step-00000006"), "{err}");
        assert_eq!(names(dir.path()), ["step-00000005"]);
    }

    #[test]
    fn a_replacement_that_was_killed_is_undone_on_resume() {
        let dir = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(dir.path());
        let path = save(&all, 5);
        std::fs::rename(&path, dir.path().join(".step-00000005.12-3.old")).unwrap();
        assert_eq!(all.resume(&run(&[])).unwrap().unwrap().state.step, 5);
    }
}
