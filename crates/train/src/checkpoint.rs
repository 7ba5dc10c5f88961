//! Checkpoints: everything that the next step depends on, written whole or not at all.
//!
//! A checkpoint is a folder `step-NNNNNNNN` with `state.json` and `tensors.safetensors` (f32 weights `w.NAME`,
//! moments `m.NAME` and `v.NAME`; `replay.positions` where rejections are trained on again). Random streams are functions of seed and position, so no generator state is kept.
//! It does not know how many ranks wrote it, nor whether they shared the moments: those are whole.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::{self, AtomicDir, AtomicError};
use draftsmith_formats::hash::{Hasher, sha256_file};
use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorHead, file_order, write_each};
use serde::{Deserialize, Serialize};

use crate::replay::Replay;
use crate::{AdamW, Collective, Method, Moment, TrainError};

/// One measured validation, as the caller's decoder found it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationResult {
    /// Committed tokens per verify step.
    pub accept_len: f64,
    /// Lower end of its confidence interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Verify steps measured.
    pub verify_steps: u64,
    /// Tokens committed by them.
    pub committed_tokens: u64,
}

/// The best draft so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimiser steps it was trained for.
    pub step: u64,
    /// What was measured.
    pub result: ValidationResult,
    /// Steps of the drafts that it is the mean of; empty for a draft as it was trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mean_of: Vec<u64>,
}

/// What a checkpoint says beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Layout of the checkpoint.
    pub version: u32,
    /// Method name.
    pub method: String,
    /// Hash of everything in the run file that changes the result.
    pub run_hash: String,
    /// Optimiser steps done.
    pub step: u64,
    /// Epoch of the next pack.
    pub epoch: u64,
    /// Number of the next pack in its epoch.
    pub pack: u64,
    /// Slots trained on so far, all passes counted.
    pub slots: u64,
    /// Seed of weights and order.
    pub seed: u64,
    /// Best validated draft.
    pub best: Option<Best>,
    /// Validated drafts kept for averaging, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Best>,
    /// Hash of `tensors.safetensors`; checkpoints of earlier programs have none.
    #[serde(default)]
    pub tensors_sha256: Option<String>,
}

const VERSION: u32 = 1;
const PREFIX: &str = "step-";
const TENSORS_FILE: &str = "tensors.safetensors";
/// `[N, 3]` row, anchor and depth of what the replay keeps.
const REPLAY: &str = "replay.positions";

impl TrainState {
    /// The state before the first step.
    pub(crate) fn start(method: &str, run_hash: &str, seed: u64) -> TrainState {
        TrainState {
            version: VERSION,
            method: method.to_owned(),
            run_hash: run_hash.to_owned(),
            step: 0,
            epoch: 0,
            pack: 0,
            slots: 0,
            seed,
            best: None,
            candidates: Vec::new(),
            tensors_sha256: None,
        }
    }
}

/// Name of the folder after `step` steps.
pub(crate) fn folder_name(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// Checkpoint folders, newest last.
pub(crate) fn list(root: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|e| {
            let step = e.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            e.path().is_dir().then(|| (step, e.path()))
        })
        .collect();
    found.sort();
    found
}

/// What a tensor of a checkpoint holds.
#[derive(Clone, Copy)]
enum Content {
    /// Of the trained parameter at a place.
    Weights(usize),
    Moment(usize, Moment),
    Replay,
}

/// Names of both moments.
const MOMENTS: [(&str, Moment); 2] = [("m", Moment::First), ("v", Moment::Second)];

/// Writes a checkpoint and removes all but the newest `keep`. No more than one tensor is held at a time. Rank 0 writes; where
/// ranks share the moments the others come here too, and hand theirs in.
pub(crate) fn save<M: Method + ?Sized>(
    root: &Path,
    method: &M,
    (optimizer, collective): (&AdamW<M::Kernels>, &dyn Collective),
    (state, replay): (&TrainState, Option<&Replay>),
    keep: usize,
) -> Result<PathBuf, TrainError> {
    let (path, tape) = (root.join(folder_name(state.step)), method.tape());
    let trained = tape.trained();
    let positions = replay.map(Replay::state).unwrap_or_default();
    let (mut heads, mut contents) = (Vec::new(), Vec::new());
    for (place, id) in trained.iter().enumerate() {
        let p = tape.param(*id);
        heads.push(TensorHead::f32(&format!("w.{}", p.name), &p.shape));
        contents.push(Content::Weights(place));
        for (letter, moment) in MOMENTS {
            heads.push(TensorHead::f32(&format!("{letter}.{}", p.name), &[p.numel()]));
            contents.push(Content::Moment(place, moment));
        }
    }
    if replay.is_some() {
        heads.push(TensorHead::i64(REPLAY, &[positions.len() / 3, 3]));
        contents.push(Content::Replay);
    }
    if !collective.is_first() {
        if optimizer.slices().is_some() {
            for at in file_order(&heads) {
                if let Content::Moment(place, moment) = contents[at] {
                    optimizer.moment(tape, (place, moment), collective);
                }
            }
        }
        return Ok(path);
    }
    atomic::create_dir_all(root)?;
    let dir = AtomicDir::create(&path)?;
    let sha256 = dir.write_with(TENSORS_FILE, |file| {
        let mut out = Hashed { file, hasher: Hasher::default() };
        write_each(&mut out, &heads, |at, out| match contents[at] {
            Content::Weights(place) => out.f32(&tape.param_values(trained[place])),
            Content::Moment(place, moment) => {
                let values = optimizer.moment(tape, (place, moment), collective);
                out.f32(&values.expect("rank 0 gets what all hand in"))
            }
            Content::Replay => out.i64(&positions),
        })?;
        Ok(out.hasher.finish())
    })?;
    let written = TrainState { tensors_sha256: Some(sha256), ..state.clone() };
    let text = serde_json::to_string_pretty(&written).expect("plain numbers and strings");
    dir.write("state.json", text + "\n")?;
    dir.commit_replacing()?;
    let all = list(root);
    for (_, old) in &all[..all.len().saturating_sub(keep.max(1))] {
        atomic::remove_dir_all(old)?;
    }
    Ok(path)
}

/// A file that is hashed as it is written.
struct Hashed<'a, W> {
    file: &'a mut W,
    hasher: Hasher,
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Restores the newest checkpoint, if there is one.
///
/// # Errors
/// If it belongs to another run or is damaged: training then does not start silently from the beginning.
pub(crate) fn resume<M: Method + ?Sized>(
    root: &Path,
    method: &mut M,
    optimizer: &mut AdamW<M::Kernels>,
    replay: Option<&mut Replay>,
    wanted: &TrainState,
    collective: &dyn Collective,
) -> Result<Option<TrainState>, TrainError> {
    if collective.is_first() {
        for (_, path) in list(root) {
            atomic::recover(&path)?;
        }
    }
    collective.barrier();
    let Some((_, path)) = list(root).pop() else { return Ok(None) };
    let damaged = |what: String| TrainError::BadCheckpoint { path: path.clone(), what };
    let text = atomic::read(path.join("state.json"))?;
    let state: TrainState = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
    if state.version != VERSION {
        return Err(damaged(format!("version {}, expected {VERSION}", state.version)));
    }
    if state.run_hash != wanted.run_hash || state.method != wanted.method || state.seed != wanted.seed {
        let describe = |s: &TrainState| format!("{} {} seed {}", s.method, s.run_hash, s.seed);
        return Err(TrainError::OtherRun { path, found: describe(&state), wanted: describe(wanted) });
    }
    let file = path.join(TENSORS_FILE);
    if let Some(wanted) = &state.tensors_sha256 {
        let found = sha256_file(&file)?;
        if found != *wanted {
            return Err(damaged(format!("`{TENSORS_FILE}` has hash {found}, `state.json` says {wanted}")));
        }
    }
    let tensors = SafetensorsDir::open(&file)?;
    let read = |name: String, wanted: usize| -> Result<Vec<f32>, TrainError> {
        let values = tensors.get(&name)?.to_f32()?;
        match values.len() == wanted {
            true => Ok(values),
            false => Err(damaged(format!("`{name}` has {} values, expected {wanted}", values.len()))),
        }
    };
    if let Some(replay) = replay {
        let state = tensors.get(REPLAY)?.to_i64()?;
        replay.restore(&state).ok_or_else(|| damaged(format!("`{REPLAY}` holds no positions")))?;
    }
    // One tensor at a time: nothing is trained with what an error leaves half restored.
    for (place, id) in method.tape().trained().into_iter().enumerate() {
        let (name, len) = (method.tape().param(id).name.clone(), method.tape().param(id).numel());
        method.tape_mut().set_param(id, &read(format!("w.{name}"), len)?);
        for (letter, moment) in MOMENTS {
            let values = read(format!("{letter}.{name}"), len)?;
            optimizer.set_moment(method.tape(), (place, moment), &values);
        }
    }
    optimizer.set_steps(state.step);
    Ok(Some(state))
}

/// Wraps a file-system error of the log files.
pub(crate) fn io_error(action: &'static str, path: &Path, source: std::io::Error) -> TrainError {
    TrainError::Atomic(AtomicError::from_io(action, path, source))
}
