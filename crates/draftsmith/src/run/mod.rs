//! A run: its folder, and its stages one after the other.
//!
//! Each stage has a key: the hash of everything that its result depends on. A stage that is done under its key is not
//! done again; one that was interrupted under its key goes on; one with another key is made anew. So `run` can be
//! killed at any moment and called again.

mod answers;
pub(crate) mod bench;
pub(crate) mod bundle;
mod capture;
mod data;
mod regenerate;
pub mod state;
mod train;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
#[cfg(feature = "gpu-flex")]
use std::sync::Arc;
use std::sync::Mutex;

use draftsmith_core::{LayerId, default_target_layers};
use draftsmith_data::SourceSpec;
use draftsmith_formats::atomic;
use draftsmith_formats::hash::{Hasher, sha256_file};
#[cfg(feature = "gpu-flex")]
use draftsmith_formats::run::GpuDtype;
use draftsmith_formats::run::{CaptureMode, Precision as RunPrecision, RunFile, Stage};
#[cfg(feature = "gpu-flex")]
use draftsmith_gpu::Gpu;
use draftsmith_model::Precision;
#[cfg(feature = "gpu-flex")]
use draftsmith_model::Target;
use serde::Serialize;

pub use capture::Bill;
use state::{Phase, RunFolder, RunLock, StageClock, StageFile};

use crate::Error;
use crate::device::Compute;
use crate::engine::{LoadedTarget, TargetOptions, default_threads, locate};
use crate::pull::{Places, PullError, Reference};
use crate::report::{Report, Stop, Unit};
use crate::target::model_hash;

/// What a run needs from outside.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// Caches and network.
    pub places: &'a Places,
    /// Where progress goes.
    pub report: &'a dyn Report,
    /// The wish to stop.
    pub stop: &'a Stop,
    /// Looks up the environment variable that a run file names.
    pub variable: fn(&str) -> Option<String>,
}

/// A stage that is done.
#[derive(Debug, Clone, Serialize)]
pub struct StageDone {
    /// Its word.
    pub stage: Stage,
    /// True if an earlier call had done it.
    pub before: bool,
    /// What came out.
    #[serde(flatten)]
    pub file: StageFile,
}

/// Found on this machine, or fetched.
struct Inputs {
    /// The target's reference and hash, as located.
    target_path: PathBuf,
    target_sha256: String,
    sources: Vec<SourceSpec>,
    validation: Option<PathBuf>,
    /// Hash over the content of all data files and the template file.
    files_sha256: String,
}

/// A run file at work.
pub struct Run<'a> {
    file: RunFile,
    folder: RunFolder,
    env: Env<'a>,
    /// The command that goes on after an interruption.
    resume: String,
    inputs: Inputs,
    compute: Compute,
    target: OnceCell<LoadedTarget>,
    _lock: RunLock,
}

/// Changed whenever a stage gives other results for the same inputs.
const STAGE_VERSIONS: [(Stage, u32); 6] = [
    (Stage::Data, 3),
    (Stage::Regenerate, 3),
    (Stage::Capture, 1),
    (Stage::Train, 1),
    (Stage::Bundle, 1),
    (Stage::Bench, 1),
];

impl<'a> Run<'a> {
    /// Takes the folder of a run, finds its inputs, and saves the completed run file there.
    ///
    /// # Errors
    /// A busy folder, inputs that are not there, rules between keys and target.
    pub fn open(file: RunFile, resume: String, env: Env<'a>) -> Result<Run<'a>, Error> {
        check_bundle_keys(&file)?;
        let compute = Compute::open(&file.run)?;
        let folder = RunFolder::new(file.dir());
        let inputs = Inputs::find(&file, env)?;
        let lock = folder.lock()?;
        atomic::write(folder.run_file(), file.to_toml())?;
        Ok(Run { file, folder, env, resume, inputs, compute, target: OnceCell::new(), _lock: lock })
    }

    /// The folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// The stages that this run file has.
    pub fn stages(&self) -> Vec<Stage> {
        stages_of(&self.file)
    }

    /// Does every stage up to and including `last` that is not done yet.
    ///
    /// # Errors
    /// The first stage that fails; what it had made is kept if it can go on from there.
    pub fn advance(&self, last: Stage) -> Result<Vec<StageDone>, Error> {
        let mut done = Vec::new();
        let mut key = String::new();
        for stage in self.stages().into_iter().filter(|s| *s <= last) {
            key = self.key(stage, &key)?;
            done.push(self.one(stage, &key)?);
        }
        Ok(done)
    }

    fn key(&self, stage: Stage, before: &str) -> Result<String, Error> {
        let version = STAGE_VERSIONS.iter().find(|(s, _)| *s == stage).map_or(0, |(_, v)| *v);
        let mut hasher = Hasher::default();
        for part in [
            stage.name(),
            &version.to_string(),
            &self.file.stage_hash(stage),
            before,
            &self.inputs.target_sha256,
            &self.inputs.files_sha256,
        ] {
            hasher.field(part.as_bytes());
        }
        if stage == Stage::Bench {
            for workload in &self.file.bench.workloads {
                hasher.field(sha256_file(workload)?.as_bytes());
            }
        }
        Ok(hasher.finish())
    }

    /// Where a stage puts what it makes.
    fn made_by(&self, stage: Stage) -> PathBuf {
        match stage {
            Stage::Bundle => self.file.bundle_dir(),
            _ => self.folder.stage_dir(stage),
        }
    }

    fn one(&self, stage: Stage, key: &str) -> Result<StageDone, Error> {
        let made = self.made_by(stage);
        let known = self.folder.read(stage)?;
        let mut before_s = 0.0;
        match known {
            Some(file) if file.key == key && file.phase == Phase::Done && made.exists() => {
                self.env.report.note(&format!("{}: done before", stage.name()));
                return Ok(StageDone { stage, before: true, file });
            }
            Some(file) if file.key == key && file.phase == Phase::Running => {
                self.env.report.note(&format!("{}: goes on", stage.name()));
                before_s = file.seconds;
            }
            Some(_) => {
                self.env.report.note(&format!("{}: inputs changed, made anew", stage.name()));
                self.forget(stage, &made)?;
            }
            // A folder without a stage file: a removal that was interrupted.
            None if !is_replaced_in_place(stage) && made.exists() => atomic::remove_dir_all(&made)?,
            None => {}
        }
        let clock = StageClock::begin(&self.folder, stage, key, before_s)?;
        let report = ClockReport { inner: self.env.report, clock: Mutex::new(clock) };
        let result = self.work(stage, key, &made, &report);
        let clock = report.clock.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        match result {
            Ok(summary) => Ok(StageDone { stage, before: false, file: clock.finish(summary)? }),
            Err(error) => {
                clock.pause();
                match self.env.stop.requested() {
                    true => Err(self.interrupted(stage)),
                    false => Err(error),
                }
            }
        }
    }

    fn interrupted(&self, stage: Stage) -> Error {
        Error::Interrupted { what: stage.name().to_string(), resume: Some(self.resume.clone()) }
    }

    /// Removes what a stage made from other inputs, unless it replaces that itself.
    fn forget(&self, stage: Stage, made: &Path) -> Result<(), Error> {
        match is_replaced_in_place(stage) {
            true => Ok(self.folder.forget(stage, &self.folder.root().join("state/none"))?),
            false => Ok(self.folder.forget(stage, made)?),
        }
    }

    fn work(
        &self,
        stage: Stage,
        key: &str,
        made: &Path,
        report: &dyn Report,
    ) -> Result<serde_json::Value, Error> {
        match stage {
            Stage::Data => self.data(made, report),
            Stage::Regenerate => self.regenerate(made, report),
            Stage::Capture => self.capture(made, report),
            Stage::Train => self.train(made, key, report),
            Stage::Bundle => self.bundle(made, key),
            Stage::Bench => self.bench(made, report),
        }
    }

    /// The target, loaded once.
    fn target(&self) -> Result<&LoadedTarget, Error> {
        if let Some(target) = self.target.get() {
            return Ok(target);
        }
        let path = [self.inputs.target_path.display().to_string()];
        let mut target = LoadedTarget::load(
            &TargetOptions {
                sources: &path,
                sha256: None,
                precision: self.precision(),
                threads: self.threads(),
                template: self.file.data.template.as_deref(),
            },
            self.env.places,
            self.env.report,
            self.env.stop,
        )?;
        target.sha256.clone_from(&self.inputs.target_sha256);
        let longest = self.file.data.max_length as usize;
        if longest > target.target.config().max_position {
            return Err(Error::input(
                format!(
                    "`data.max_length` is {longest}, but the target's context ends at {}",
                    target.target.config().max_position
                ),
                "lower `data.max_length`",
            ));
        }
        Ok(self.target.get_or_init(|| target))
    }

    fn precision(&self) -> Precision {
        match self.file.target.precision {
            RunPrecision::Stored => Precision::Stored,
            RunPrecision::F32 => Precision::F32,
        }
    }

    /// In which arithmetic the target computes answers and hidden states.
    fn arithmetic(&self) -> &'static str {
        match (&self.compute, self.file.target.precision) {
            (Compute::Cpu, RunPrecision::Stored) => "stored",
            (Compute::Cpu, RunPrecision::F32) => "f32",
            #[cfg(feature = "gpu-flex")]
            (Compute::Gpu(_), _) => match self.file.run.gpu_dtype.unwrap_or_default() {
                GpuDtype::F32 => "gpu-f32",
                GpuDtype::Bf16 => "gpu-bf16",
            },
        }
    }

    /// The target once more, on another device.
    #[cfg(feature = "gpu-flex")]
    fn target_on(&self, gpu: &Gpu) -> Result<Arc<Target<Gpu>>, Error> {
        Ok(Arc::new(Target::load(Arc::new(gpu.clone()), &self.inputs.target_path, self.precision())?))
    }

    fn threads(&self) -> usize {
        self.file.run.threads.map_or_else(default_threads, |t| t as usize)
    }

    /// Captured layers: those of the run file, or the default ones of the target.
    fn layers(&self) -> Result<Vec<LayerId>, Error> {
        let num_layers = self.target()?.target.config().num_layers as u32;
        match &self.file.capture.layers {
            None => Ok(default_target_layers(num_layers).to_vec()),
            Some(layers) => match layers.iter().find(|l| **l >= num_layers) {
                Some(outside) => Err(Error::input(
                    format!("`capture.layers` names layer {outside}, but the target has {num_layers} layers"),
                    "layers count from 0; leave the key out for the default",
                )),
                None => Ok(layers.iter().map(|l| LayerId(*l)).collect()),
            },
        }
    }

    /// The token file that capture and training read.
    fn tokens_path(&self) -> PathBuf {
        let stage = if self.file.regenerate.enabled { Stage::Regenerate } else { Stage::Data };
        self.folder.stage_dir(stage).join("train.tokens")
    }

    fn check_stop(&self, stage: Stage) -> Result<(), Error> {
        if self.env.stop.requested() { Err(self.interrupted(stage)) } else { Ok(()) }
    }
}

/// The stages of a run file.
pub fn stages_of(file: &RunFile) -> Vec<Stage> {
    Stage::ALL
        .into_iter()
        .filter(|stage| match stage {
            Stage::Regenerate => file.regenerate.enabled,
            Stage::Capture => file.capture.mode == CaptureMode::Cache,
            Stage::Bench => !file.bench.workloads.is_empty(),
            Stage::Data | Stage::Train | Stage::Bundle => true,
        })
        .collect()
}

/// True for stages that replace what they made: a bundle may lie where the user put it, so it goes when the new one is
/// ready; answers whose own inputs are unchanged are taken over.
fn is_replaced_in_place(stage: Stage) -> bool {
    match stage {
        Stage::Bundle | Stage::Regenerate => true,
        Stage::Data | Stage::Capture | Stage::Train | Stage::Bench => false,
    }
}

/// What the last stages need is asked for before the first one begins.
fn check_bundle_keys(file: &RunFile) -> Result<(), Error> {
    if file.bundle.license.as_ref().is_none_or(|l| l.trim().is_empty()) {
        return Err(Error::input(
            "key `bundle.license` is missing",
            "name the licence of the draft's weights as an SPDX expression, for example `Apache-2.0`",
        ));
    }
    bundle::hub_name(file.bundle.base_model.as_deref(), &[])?;
    for workload in &file.bench.workloads {
        if !workload.is_file() {
            return Err(Error::input(
                format!("`bench.workloads` names `{}`, which does not exist", workload.display()),
                "relative paths start at the working directory",
            ));
        }
    }
    Ok(())
}

impl Inputs {
    fn find(file: &RunFile, env: Env<'_>) -> Result<Inputs, Error> {
        let target =
            locate(&file.target.source.0, file.target.sha256.as_deref(), env.places, env.report, env.stop)?;
        let target_sha256 = match target.sha256 {
            Some(sha256) => sha256,
            None => model_hash(&target.path)?,
        };
        let mut hasher = Hasher::default();
        let mut find = |key: &str, name: &str| -> Result<PathBuf, Error> {
            let reference: Reference = name.parse()?;
            let found = match crate::pull::pull(&[reference], None, env.places, env.report, env.stop) {
                Err(PullError::NoSuchPath { .. }) => {
                    return Err(Error::input(
                        format!("`{key}` names `{name}`, which does not exist"),
                        "relative paths start at the working directory",
                    ));
                }
                found => found?,
            };
            hasher.field(found.sha256.as_deref().unwrap_or_default().as_bytes());
            match found.sha256 {
                Some(_) => Ok(found.path),
                None => Err(Error::input(
                    format!("`{key}` names `{name}`, a folder, expected a file"),
                    "name one file, for `hf:` references after a `:`",
                )),
            }
        };
        let mut sources = Vec::new();
        for (i, source) in file.data.sources.iter().enumerate() {
            sources.push(SourceSpec {
                path: find(&format!("data.sources.{i}.path"), &source.path)?,
                weight: source.weight,
                max_rows: source.max_rows,
            });
        }
        let validation =
            file.data.validation.as_deref().map(|name| find("data.validation", name)).transpose()?;
        if let Some(template) = &file.data.template {
            find("data.template", &template.display().to_string())?;
        }
        Ok(Inputs {
            target_path: target.path,
            target_sha256,
            sources,
            validation,
            files_sha256: hasher.finish(),
        })
    }
}

/// Passes progress on and keeps it in the stage file.
struct ClockReport<'a> {
    inner: &'a dyn Report,
    clock: Mutex<StageClock>,
}

impl ClockReport<'_> {
    fn clock(&self) -> std::sync::MutexGuard<'_, StageClock> {
        self.clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Report for ClockReport<'_> {
    fn begin(&self, task: &str, total: Option<u64>, unit: Unit) {
        self.clock().task(task, total, unit.word());
        self.inner.begin(task, total, unit);
    }

    fn at(&self, done: u64) {
        self.clock().at(done);
        self.inner.at(done);
    }

    fn detail(&self, text: &str) {
        self.clock().detail(text);
        self.inner.detail(text);
    }

    fn end(&self) {
        self.inner.end();
    }

    fn note(&self, line: &str) {
        self.inner.note(line);
    }
}
