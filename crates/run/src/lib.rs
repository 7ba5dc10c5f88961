//! A run: its folder, and its stages one after the other.
//!
//! Each stage has a key: the hash of everything that its result depends on. A stage that is done under its key is not
//! done again; one that was interrupted under its key goes on; one with another key is set aside and made anew, and
//! taken back when its key comes back. So `run` can be killed at any moment and called again, and an edit of the run
//! file loses nothing.

pub mod among;
mod answers;
pub mod aside;
mod backend;
mod begun;
mod bench;
mod bundle;
mod capture;
mod cards;
pub mod catalogue;
mod check;
pub mod costs;
pub mod curve;
mod data;
pub mod device;
pub mod disk;
pub mod doctor;
pub mod elsewhere;
pub mod engine;
mod error;
mod host;
pub mod imports;
mod init;
pub mod inspect;
mod license;
pub mod list;
pub mod measure;
mod online;
pub mod packs;
mod passes;
pub mod peer;
pub mod plan;
pub mod planned;
pub mod ranks;
mod rates;
mod regenerate;
pub mod rules;
pub mod scale;
pub mod serve_gap;
pub mod server;
pub mod shelf;
mod size;
pub mod state;
mod stored;
pub mod target;
mod train;
pub mod verdict;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;

use draftsmith_core::LayerId;
use draftsmith_core::report::{Report, Silent, Stop, Unit};
use draftsmith_data::SourceSpec;
use draftsmith_formats::atomic;
use draftsmith_formats::bundle_files::is_address;
use draftsmith_formats::hash::{Hasher, sha256_file};
#[cfg(feature = "gpu-flex")]
use draftsmith_formats::run::GpuDtype;
use draftsmith_formats::run::{
    CaptureMode, Faulty, Precision as RunPrecision, RunError, RunFile, Stage, place_of_key,
};
use draftsmith_kernels::Kernels;
use draftsmith_kernels::catch_failure;
use draftsmith_model::Target;
use draftsmith_model::{DraftConfig, Precision, is_method, methods};
use draftsmith_pull::{Places, PullError, Pulled, Reference, is_hub_name};
use serde::Serialize;

use aside::Aside;
pub use capture::Bill;
pub use check::Origin;
pub use check::target_config;
pub use error::{Error, Told};
pub use init::{Init, InitOptions, init, run_name};
use ranks::Order;
pub use ranks::{Launch, Ranks};
use state::{Phase, RunFolder, RunLock, StageClock, StageFile, WHY_SHOWN, changes};

use crate::begun::Begun;
use crate::device::{Around, Compute};
use crate::elsewhere::{Outside, open_source};
use crate::engine::{LoadedTarget, TargetOptions, locate};
use crate::shelf::Shelf;
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
    /// Folders that may hold bundles that ship with draftsmith, in order.
    pub roots: &'a [PathBuf],
    /// The processes of the run. Rank 0 works as if it were alone, and calls the others to the stages that are shared.
    pub ranks: &'a Ranks,
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
    target_reference: String,
    target_sha256: String,
    sources: Vec<SourceSpec>,
    validation: Option<SourceSpec>,
    /// Hashes of the content of all data files and of the template file, by key; of what lies in a store what that says of it.
    files: Vec<(String, String)>,
}

/// A run file at work.
pub struct Run<'a> {
    file: RunFile,
    folder: RunFolder,
    env: Env<'a>,
    origin: Origin,
    inputs: Inputs,
    compute: Compute,
    target: OnceCell<LoadedTarget>,
    /// The run file that was saved here before this one.
    saved: Option<RunFile>,
    /// The sizes of a draft that left them to the target, in words.
    decided: Option<String>,
    /// The draft that training begins with.
    begun: Option<Begun>,
    /// Held by whoever works here; who only looks has none.
    _lock: Option<RunLock>,
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

/// The same when keys were made in the first way ([`Run::key_v1`]). Never changed.
const STAGE_VERSIONS_V1: [(Stage, u32); 6] = [
    (Stage::Data, 2),
    (Stage::Regenerate, 2),
    (Stage::Capture, 1),
    (Stage::Train, 1),
    (Stage::Bundle, 1),
    (Stage::Bench, 1),
];

/// Version of a stage that only puts rows in order for the target to answer: what has changed since is how rows become
/// ids, and that is not its work then.
const DATA_FOR_ANSWERS: u32 = 2;

fn version(of: &[(Stage, u32)], stage: Stage) -> u32 {
    of.iter().find(|(s, _)| *s == stage).map_or(0, |(_, v)| *v)
}

/// Reads a run file. The completed copy in the folder of a run means that folder, wherever it was moved to.
///
/// # Errors
/// As [`RunFile::load`].
pub fn load(path: &Path, overrides: &[String]) -> Result<RunFile, Error> {
    let file = read(path, overrides).map_err(Faulty::first)?;
    check_method(&file, path, overrides)?;
    Ok(moved(file, path, overrides))
}

/// The same, with everything that is wrong with it: the faults come with what is left of the run file, for
/// [`Run::look_on`] to find those that only show beside target and data.
///
/// # Errors
/// All faults at once, if they are such that nothing can be looked at beside them.
pub fn load_all(path: &Path, overrides: &[String]) -> Result<(RunFile, Vec<Told>), Error> {
    let faulty = match read(path, overrides) {
        Ok(file) => {
            check_method(&file, path, overrides)?;
            return Ok((moved(file, path, overrides), Vec::new()));
        }
        Err(faulty) => faulty,
    };
    let mut told: Vec<Told> = faulty.faults.into_iter().flat_map(|fault| Error::from(fault).told()).collect();
    match faulty.mended {
        Some(file) if check_method(&file, path, overrides).is_ok() => {
            Ok((moved(*file, path, overrides), told))
        }
        rest => {
            let method = rest.and_then(|file| check_method(&file, path, overrides).err());
            told.extend(method.into_iter().flat_map(|fault| Error::from(fault).told()));
            Err(Error::of_all(told).unwrap_or_else(|| Error::input("the run file is wrong", "mend it")))
        }
    }
}

/// The run of which this is the completed copy of the run file.
fn copy_of(path: &Path) -> Option<RunFolder> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = RunFolder::new(parent);
    (path.file_name() == folder.run_file().file_name() && folder.is_run()).then_some(folder)
}

fn read(path: &Path, overrides: &[String]) -> Result<RunFile, Faulty> {
    match copy_of(path) {
        Some(_) => RunFile::load_saved(path, overrides),
        None => RunFile::load_all(path, overrides),
    }
}

fn moved(mut file: RunFile, path: &Path, overrides: &[String]) -> RunFile {
    let sets = |key: &str| overrides.iter().any(|o| o.split('=').next().is_some_and(|k| k.trim() == key));
    let Some(folder) = copy_of(path).filter(|_| !sets("run.dir")) else { return file };
    let parent = folder.root();
    let before = file.dir();
    if !sets("bundle.dir")
        && let Ok(inside) = file.bundle_dir().strip_prefix(&before)
    {
        file.bundle.dir = Some(parent.join(inside));
    }
    file.run.dir = Some(parent.to_path_buf());
    file
}

/// A run file may name any kind of draft; here it must be one that there is.
fn check_method(file: &RunFile, path: &Path, overrides: &[String]) -> Result<(), RunError> {
    let name = file.draft.method.name();
    if is_method(name) {
        return Ok(());
    }
    let names: Vec<&str> = methods().iter().map(|word| word.name).collect();
    let key = "draft.method".to_string();
    Err(RunError::Type {
        place: place_of_key(path, overrides, &key),
        key,
        found: format!("`{name}`"),
        wanted: format!("one of `{}`", names.join("`, `")),
    })
}

/// What a stage did, with its paths as they are now: stage files hold none that a move of the folder would break.
pub fn with_paths(mut file: StageFile, stage: Stage, run: &RunFile) -> StageFile {
    let folder = RunFolder::new(run.dir());
    let path = match stage {
        Stage::Bundle => Some(("path", run.bundle_dir())),
        Stage::Bench => Some(("report", folder.stage_dir(stage).join(state::REPORT))),
        Stage::Data | Stage::Regenerate | Stage::Capture | Stage::Train => None,
    };
    if let Some((key, path)) = path
        && file.summary.get(key).is_some()
    {
        file.summary[key] = path.display().to_string().into();
    }
    file
}

/// Where a stage of a run file puts what it makes.
pub fn made_by(run: &RunFile, stage: Stage) -> PathBuf {
    match stage {
        Stage::Bundle => run.bundle_dir(),
        _ => RunFolder::new(run.dir()).stage_dir(stage),
    }
}

/// A stage that is about to be done, or that is done already.
struct Due {
    stage: Stage,
    /// What it depends on.
    inputs: BTreeMap<String, String>,
    /// Under which keys its result is known: the one of this version, then older ones.
    keys: Vec<String>,
}

fn key_of(stage: Stage, inputs: &BTreeMap<String, String>) -> String {
    let mut hasher = Hasher::default();
    hasher.field(stage.name().as_bytes());
    for (name, value) in inputs {
        hasher.field(name.as_bytes());
        hasher.field(value.as_bytes());
    }
    hasher.finish()
}

impl<'a> Run<'a> {
    /// Takes the folder of a run, finds its inputs, and saves the completed run file there.
    ///
    /// # Errors
    /// A busy folder, inputs that are not there, rules between keys, files and target: all that can be known before the
    /// work, named with key and line.
    pub fn open(file: RunFile, origin: Origin, env: Env<'a>) -> Result<Run<'a>, Error> {
        Run::open_on(file, Vec::new(), origin, env)
    }

    /// [`Run::open`] of a run file with faults that were found before.
    ///
    /// # Errors
    /// As [`Run::look_on`], and a busy folder.
    pub fn open_on(file: RunFile, faults: Vec<Told>, origin: Origin, env: Env<'a>) -> Result<Run<'a>, Error> {
        // What rank 0 fetches and hashes, the others find.
        let wait = || env.ranks.collective().barrier();
        if !env.ranks.is_first() {
            wait();
        }
        let looked = Run::look_on(file, faults, origin, env);
        if env.ranks.is_first() {
            wait();
        }
        let mut run = env.ranks.agree(looked, Run::identity)?;
        if !env.ranks.is_first() {
            return Ok(run);
        }
        run.decided.iter().for_each(|decided| env.report.note(decided));
        run._lock = Some(run.folder.lock()?);
        atomic::write(run.folder.run_file(), run.file.to_saved_toml())?;
        Ok(run)
    }

    /// Like [`Run::open`], but takes and writes nothing.
    ///
    /// # Errors
    /// As [`Run::open`], without the folder's.
    pub fn look(file: RunFile, origin: Origin, env: Env<'a>) -> Result<Run<'a>, Error> {
        Run::look_on(file, Vec::new(), origin, env)
    }

    /// Like [`Run::look`], of a run file with faults that were found before: those that show beside target and data are
    /// told with them, and nothing is fetched for a run that cannot begin.
    ///
    /// # Errors
    /// As [`Run::look`], all at once.
    pub fn look_on(
        mut file: RunFile,
        mut faults: Vec<Told>,
        origin: Origin,
        env: Env<'a>,
    ) -> Result<Run<'a>, Error> {
        faults.extend(check::check_alone(&file, &origin));
        let around = Around { variable: env.variable, python: &env.places.python, report: env.report };
        let compute = match Compute::open(&file.run, around) {
            Ok(compute) => Some(compute),
            Err(error) => {
                faults.extend(error.told());
                None
            }
        };
        let folder = RunFolder::new(file.dir());
        let offline;
        let places = match faults.is_empty() {
            true => env.places,
            false => {
                offline = Places { offline: true, ..env.places.clone() };
                &offline
            }
        };
        let look = Env { places, ..env };
        let target = keep(&mut faults, Inputs::find_target(&file, &origin, look));
        let data = Inputs::find_data(&file, &origin, look, &mut faults);
        let (mut decided, mut begun) = (None, None);
        if let Some(target) = &target {
            let shelf = Shelf { places, roots: env.roots, report: env.report, stop: env.stop };
            let found = check::check_with_target(&mut file, &origin, &target.path, shelf, &mut faults);
            (decided, begun) = keep(&mut faults, found).unwrap_or_default();
        }
        if let Some(error) = Error::of_all(faults) {
            return Err(error);
        }
        let (Some(compute), Some(target)) = (compute, target) else {
            return Err(Error::input("the target was not found", "name it in `target.source`"));
        };
        let inputs = data.with_target(target)?;
        let decided = decided.map(|decided| decided.to_string());
        let saved = RunFile::load_saved(folder.run_file(), &[]).ok();
        Ok(Run {
            file,
            folder,
            env,
            origin,
            inputs,
            compute,
            target: OnceCell::new(),
            saved,
            decided,
            begun,
            _lock: None,
        })
    }

    /// What all ranks of a run must have alike.
    fn identity(&self) -> BTreeMap<String, String> {
        let mut identity = self.file.keys();
        // How many threads a rank has is its own matter.
        identity.remove("run.threads");
        identity.insert("target weights".to_string(), self.inputs.target_sha256.clone());
        for (key, sha256) in &self.inputs.files {
            identity.insert(format!("content of {key}"), sha256.clone());
        }
        identity
            .extend(self.begun.iter().map(|begun| ("draft to begin with".to_string(), begun.sha256.clone())));
        identity
    }

    /// The folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// The run file, sizes of the draft decided.
    pub(crate) fn file(&self) -> &RunFile {
        &self.file
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
        if !self.env.ranks.is_first() {
            return self.follow().map(|()| Vec::new());
        }
        self.env.ranks.note().iter().for_each(|note| self.env.report.note(note));
        let done = self.lead(last)?;
        self.env.ranks.order(&Order::End);
        Ok(done)
    }

    /// Does what rank 0 calls for.
    fn follow(&self) -> Result<(), Error> {
        loop {
            let order = self.env.ranks.hear()?;
            // What a device fails with arrives here from wherever it happened.
            catch_failure(|| match &order {
                Order::Answer { held, rows } => self.follow_answer(*held, rows),
                Order::Capture { shares } => self.follow_capture(shares),
                Order::Train { key } => self.train(&self.made_by(Stage::Train), key, &Silent).map(drop),
                Order::End => Ok(()),
            })??;
            if order == Order::End {
                return Ok(());
            }
        }
    }

    fn lead(&self, last: Stage) -> Result<Vec<StageDone>, Error> {
        let due: Vec<Due> = self
            .stages()
            .into_iter()
            .filter(|s| *s <= last)
            .map(|stage| self.due(stage))
            .collect::<Result<_, _>>()?;
        let mut to_do = Vec::new();
        for due in &due {
            if !self.is_done(due)? {
                to_do.push(due.stage);
            }
        }
        check::check_servers(&self.file, &self.origin, self.env.places, self.env.variable, &to_do)?;
        if to_do.contains(&Stage::Capture) || to_do.contains(&Stage::Train) {
            self.check_store()?;
        }
        if to_do.contains(&Stage::Train) {
            if let Some(begun) = &self.begun {
                begun.check_target(self.target()?)?;
            }
            self.warn();
        }
        let mut done: Vec<StageDone> = Vec::new();
        for due in &due {
            // A bundle that was made again has lost its results: the measurement puts them back.
            let bundle_is_new = done.iter().any(|d| d.stage == Stage::Bundle && !d.before);
            done.push(self.one(due, due.stage == Stage::Bench && bundle_is_new)?);
            if due.stage == Stage::Data && to_do.contains(&Stage::Train) {
                self.check_validation()?;
            }
        }
        Ok(done)
    }

    /// Says before the work what of this run is bound to disappoint. Where no plan was made before, answers are taken to
    /// be as long as they may be: what is too little then is too little for certain.
    fn warn(&self) {
        // Whatever is wrong with the data is its stage's to tell.
        let Ok(mut amounts) = self.count() else { return };
        let rates = self.kept_rates().unwrap_or_default();
        self.complete(&mut amounts, &rates);
        for warning in rules::warnings(&self.facts(Some(&amounts), None)) {
            self.env.report.note(&format!("warning: {}", warning.line()));
        }
    }

    /// The version of a stage, as this run file has it.
    fn version(&self, stage: Stage) -> u32 {
        match stage == Stage::Data && self.file.regenerate.enabled {
            true => DATA_FOR_ANSWERS,
            false => version(&STAGE_VERSIONS, stage),
        }
    }

    /// What a stage depends on, and the keys of that.
    fn due(&self, stage: Stage) -> Result<Due, Error> {
        let mut workloads = Vec::new();
        if stage == Stage::Bench {
            for workload in &self.file.bench.workloads {
                workloads.push(sha256_file(workload)?);
            }
        }
        let inputs = self.stage_inputs(&self.file, stage, &workloads);
        // Once the paths of a run file counted from the working directory.
        let then = self.file.from_here();
        let mut keys =
            vec![key_of(stage, &inputs), key_of(stage, &self.stage_inputs(&then, stage, &workloads))];
        keys.extend([&self.file, &then].into_iter().filter_map(|file| self.key_v1(file, stage, &workloads)));
        Ok(Due { stage, inputs, keys })
    }

    /// What a stage depends on; `workloads` are the hashes of what it measures on.
    fn stage_inputs(&self, file: &RunFile, stage: Stage, workloads: &[String]) -> BTreeMap<String, String> {
        let mut inputs = file.stage_inputs(stage);
        inputs.insert("target weights".to_string(), self.inputs.target_sha256.clone());
        for (key, sha256) in &self.inputs.files {
            inputs.insert(format!("content of {key}"), sha256.clone());
        }
        let begun = self.begun.iter().filter(|_| stage >= Stage::Train);
        inputs.extend(begun.map(|begun| ("content of draft.from".to_string(), begun.sha256.clone())));
        for before in self.stages().into_iter().filter(|s| *s <= stage) {
            let version = self.version(before);
            inputs.insert(format!("version of stage {}", before.name()), version.to_string());
        }
        for (i, sha256) in workloads.iter().enumerate() {
            inputs.insert(format!("content of bench.workloads.{i}"), sha256.clone());
        }
        inputs
    }

    /// The key that the first version of run folders gave to a stage; `None` if its result would differ today.
    fn key_v1(&self, file: &RunFile, last: Stage, workloads: &[String]) -> Option<String> {
        let mut files = Hasher::default();
        self.inputs.files.iter().for_each(|(_, sha256)| files.field(sha256.as_bytes()));
        let files = files.finish();
        let mut key = String::new();
        for stage in self.stages().into_iter().filter(|s| *s <= last) {
            let then = version(&STAGE_VERSIONS_V1, stage);
            let hash = file.stage_hash_v1(stage).filter(|_| then == self.version(stage));
            let hash = hash?;
            let mut hasher = Hasher::default();
            for part in [stage.name(), &then.to_string(), &hash, &key, &self.inputs.target_sha256, &files] {
                hasher.field(part.as_bytes());
            }
            if stage == Stage::Bench {
                workloads.iter().for_each(|sha256| hasher.field(sha256.as_bytes()));
            }
            key = hasher.finish();
        }
        Some(key)
    }

    /// Where a stage puts what it makes.
    fn made_by(&self, stage: Stage) -> PathBuf {
        made_by(&self.file, stage)
    }

    /// True if nothing is left to do for a stage, or only to take it back.
    fn is_done(&self, due: &Due) -> Result<bool, Error> {
        let made = self.made_by(due.stage);
        let file = match self.folder.read(due.stage)?.filter(|file| due.keys.contains(&file.key)) {
            Some(file) => Some(file),
            None => self.folder.find_aside(due.stage, &made, &due.keys)?.and_then(|aside| aside.file),
        };
        Ok(file.is_some_and(|file| file.phase == Phase::Done))
    }

    /// Does a stage, or finds it done. `again`: it has something to put right although it is done.
    fn one(&self, due: &Due, again: bool) -> Result<StageDone, Error> {
        let stage = due.stage;
        let made = self.made_by(stage);
        self.folder.mend(stage, &made)?;
        self.make_room(due, &made)?;
        let known = self.folder.read(stage)?;
        let mut before_s = 0.0;
        let mut key = &due.keys[0];
        if let Some(file) = &known {
            // Work that began under an older key ends under it: its checkpoints carry it.
            key = &file.key;
            if file.phase == Phase::Done && made.exists() && !again {
                self.env.report.note(&format!("{}: done before", stage.name()));
                let file = with_paths(file.clone(), stage, &self.file);
                return Ok(StageDone { stage, before: true, file });
            }
            let is_gone = file.phase == Phase::Done && !made.exists();
            let how = if is_gone { "its folder is gone, made anew" } else { "goes on" };
            self.env.report.note(&format!("{}: {how}", stage.name()));
            before_s = if is_gone { 0.0 } else { file.seconds };
        }
        let clock = StageClock::begin(&self.folder, stage, key, due.inputs.clone(), before_s)?;
        let report = ClockReport { inner: self.env.report, clock: Mutex::new(clock) };
        let result = self.work(stage, key, &made, &report);
        let clock = report.clock.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        match result {
            Ok(summary) => {
                let file = with_paths(clock.finish(summary)?, stage, &self.file);
                Ok(StageDone { stage, before: false, file })
            }
            Err(error) => {
                clock.pause();
                match self.env.stop.requested() {
                    true => Err(self.interrupted(stage)),
                    false => Err(error),
                }
            }
        }
    }

    /// Sets aside what a stage made from other inputs, and takes back what it once made from these. Afterwards the stage
    /// file, if there is one, has one of the keys.
    fn make_room(&self, due: &Due, made: &Path) -> Result<(), Error> {
        let (stage, report) = (due.stage, self.env.report);
        let name = stage.name();
        let known = self.folder.read(stage)?;
        if known.as_ref().is_some_and(|file| due.keys.contains(&file.key)) {
            return Ok(());
        }
        let back = self.folder.find_aside(stage, made, &due.keys)?;
        // The bundle may be in use where it lies: it goes when the new one is ready.
        let stays = stage == Stage::Bundle && back.is_none();
        let aside = match known {
            Some(file) => {
                let why = self.why_stale(due, &file);
                let aside = self.folder.set_aside(stage, made, file, stays)?;
                Some((format!("inputs changed ({why})"), aside))
            }
            // Answers are known by their own keys.
            None if stage == Stage::Regenerate && back.is_none() => None,
            None if made.is_dir() => {
                let aside = self.folder.set_aside_unknown(stage, made, stays)?;
                Some(("nothing is known about its folder".to_string(), Some(aside)))
            }
            None => None,
        };
        if let Some((why, aside)) = aside {
            let then = if back.is_some() { "" } else { ", made anew" };
            let kept = aside.map(|aside| kept_line(&aside)).unwrap_or_default();
            report.note(&format!("{name}: {why}{then}{kept}"));
        }
        match back {
            Some(back) => {
                self.folder.take_back(made, &back)?;
                report.note(&format!("{name}: found again in `{}`", back.folder.display()));
            }
            None if stage == Stage::Regenerate => self.inherit_answers(made)?,
            None => {}
        }
        Ok(())
    }

    /// The inputs that differ, in words.
    fn why_stale(&self, due: &Due, file: &StageFile) -> String {
        let lines = if file.inputs.is_empty() {
            // Written by the first version, which kept no list: the run file that was saved beside it may tell.
            let saved = self.saved.as_ref();
            let mut lines =
                saved.map(|saved| saved.differences(&self.file, Some(due.stage))).unwrap_or_default();
            let newer = |s: &Stage| self.version(*s) != version(&STAGE_VERSIONS_V1, *s);
            let newer = self.stages().into_iter().filter(|s| *s <= due.stage).find(newer);
            lines.extend(newer.map(|stage| {
                format!("stage `{}` of this version of draftsmith gives other results", stage.name())
            }));
            lines
        } else {
            changes(&file.inputs, &due.inputs)
        };
        match lines.as_slice() {
            [] => "other data, weights or files".to_string(),
            all if all.len() <= WHY_SHOWN => all.join(", "),
            all => format!("{}, and {} more", all[..WHY_SHOWN].join(", "), all.len() - WHY_SHOWN),
        }
    }

    fn interrupted(&self, stage: Stage) -> Error {
        Error::Interrupted { what: stage.name().to_string(), resume: Some(self.origin.resume()) }
    }

    fn work(
        &self,
        stage: Stage,
        key: &str,
        made: &Path,
        report: &dyn Report,
    ) -> Result<serde_json::Value, Error> {
        // What a device fails with arrives here from wherever it happened.
        catch_failure(|| match stage {
            Stage::Data => self.data(made, report),
            Stage::Regenerate => self.regenerate(made, report),
            Stage::Capture => self.capture(made, report),
            Stage::Train => {
                if self.env.ranks.count() > 1 {
                    self.env.ranks.order(&Order::Train { key: key.to_string() });
                }
                self.train(made, key, report)
            }
            Stage::Bundle => self.bundle(made, key),
            Stage::Bench => self.bench(made, report),
        })?
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
            (Compute::Cuda(_), RunPrecision::Stored) => "cuda-bf16",
            (Compute::Cuda(_), RunPrecision::F32) => "cuda-f32",
            #[cfg(feature = "cuda-shim")]
            (Compute::Shim(_), RunPrecision::Stored) => "cuda-bf16",
            #[cfg(feature = "cuda-shim")]
            (Compute::Shim(_), RunPrecision::F32) => "cuda-f32",
            #[cfg(feature = "gpu-flex")]
            (Compute::Gpu(_), _) => match self.file.run.gpu_dtype.unwrap_or_default() {
                GpuDtype::F32 => "gpu-f32",
                GpuDtype::Bf16 => "gpu-bf16",
            },
        }
    }

    /// The target once more, on another device.
    fn target_on<K: Kernels + Clone>(&self, device: &K) -> Result<Arc<Target<K>>, Error> {
        Ok(Arc::new(Target::load(Arc::new(device.clone()), &self.inputs.target_path, self.precision())?))
    }

    fn threads(&self) -> usize {
        self.file.run.threads.map_or_else(|| self.env.ranks.threads(), |t| t as usize)
    }

    /// Captured layers: those of the run file, or the default ones of the target.
    fn layers(&self) -> Result<Vec<LayerId>, Error> {
        let target = self.target()?.target.config();
        let layers = match &self.file.capture.layers {
            // They were held against the target when the run was opened.
            Some(layers) => layers.clone(),
            None => {
                let draft = DraftConfig::from_table(&self.file.draft, target, target.vocab_size);
                draft.map_err(draftsmith_train::TrainError::from)?.layers(target.num_layers as u32)
            }
        };
        Ok(layers.into_iter().map(LayerId).collect())
    }

    /// A path for a stage file: relative to the folder of the run where it lies inside.
    fn in_folder(&self, path: &Path) -> PathBuf {
        path.strip_prefix(self.folder.root()).unwrap_or(path).to_path_buf()
    }

    /// The token file that capture and training read.
    fn tokens_path(&self) -> PathBuf {
        let stage = if self.file.regenerate.enabled { Stage::Regenerate } else { Stage::Data };
        self.folder.stage_dir(stage).join("train.tokens")
    }

    /// What a store is asked with.
    #[cfg(feature = "object-store")]
    fn outside(&self) -> Outside<'_> {
        Outside { places: self.env.places, stop: self.env.stop, variable: self.env.variable }
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

/// Where old work is, how large it is, and how to be rid of it.
fn kept_line(aside: &Aside) -> String {
    format!(
        "; the old one is kept in `{}` and found again if they change back; `{}` frees {}",
        aside.folder.display(),
        aside.free_command(),
        crate::disk::human(aside.bytes())
    )
}

/// The value, or its error among the faults. That something could not be looked for is none: it was not fetched because
/// of the others.
fn keep<T>(faults: &mut Vec<Told>, found: Result<T, Error>) -> Option<T> {
    match found {
        Ok(value) => Some(value),
        Err(Error::Pull(error)) if !faults.is_empty() && !is_local(&error) => None,
        Err(error) => {
            faults.extend(error.told());
            None
        }
    }
}

/// True of what no network could change.
fn is_local(error: &PullError) -> bool {
    matches!(
        error,
        PullError::BadReference { .. } | PullError::NoSuchPath { .. } | PullError::WrongHash { .. }
    )
}

impl Inputs {
    fn find_target(file: &RunFile, origin: &Origin, env: Env<'_>) -> Result<Pulled, Error> {
        let sources = &file.target.source.0;
        let found = locate(sources, file.target.sha256.as_deref(), env.places, env.report, env.stop);
        match found {
            Err(Error::Pull(PullError::NoSuchPath { path })) => {
                let name = path.to_string_lossy();
                Err(match origin.way_advice(file, &name) {
                    Some(advice) => {
                        Error::input(format!("`target.source` names `{name}`, which does not exist"), advice)
                    }
                    // A name of the hub is no path: what to write for it is known better.
                    None => {
                        let written = PathBuf::from(file.as_written(&name));
                        PullError::NoSuchPath { path: if is_hub_name(&written) { written } else { path } }
                            .into()
                    }
                })
            }
            found => found,
        }
    }

    fn with_target(mut self, target: Pulled) -> Result<Inputs, Error> {
        self.target_sha256 = match target.sha256 {
            Some(sha256) => sha256,
            None => model_hash(&target.path)?,
        };
        (self.target_path, self.target_reference) = (target.path, target.reference);
        Ok(self)
    }

    /// Everything but the target.
    fn find_data(file: &RunFile, origin: &Origin, env: Env<'_>, faults: &mut Vec<Told>) -> Inputs {
        let mut inputs = Inputs {
            target_path: PathBuf::new(),
            target_reference: String::new(),
            target_sha256: String::new(),
            sources: Vec::new(),
            validation: None,
            files: Vec::new(),
        };
        let files = &mut inputs.files;
        let mut find = |key: &str, name: &str, may_be_stored: bool| -> Option<SourceSpec> {
            let found = match may_be_stored && is_address(name) {
                true => Inputs::find_stored(key, name, origin, env),
                false => Inputs::find_file(key, name, file, origin, env)
                    .map(|(path, sha256)| (SourceSpec::new(path), sha256)),
            };
            let (source, content) = keep(faults, found)?;
            files.push((key.to_string(), content));
            Some(source)
        };
        for (i, source) in file.data.sources.iter().enumerate() {
            inputs.sources.extend(
                find(&format!("data.sources.{i}.path"), &source.path, true).map(|found| SourceSpec {
                    weight: source.weight,
                    max_rows: source.max_rows,
                    ..found
                }),
            );
        }
        inputs.validation =
            file.data.validation.as_deref().and_then(|name| find("data.validation", name, true));
        if let Some(template) = &file.data.template {
            find("data.template", &template.display().to_string(), false);
        }
        inputs
    }

    /// An object in a store, and what that says of its content.
    fn find_stored(
        key: &str,
        name: &str,
        origin: &Origin,
        env: Env<'_>,
    ) -> Result<(SourceSpec, String), Error> {
        let outside = Outside { places: env.places, stop: env.stop, variable: env.variable };
        let (file, content) = open_source(name, &outside).map_err(|error| origin.at_key(key, error))?;
        Ok((SourceSpec { elsewhere: Some(file), ..SourceSpec::new(name) }, content))
    }

    /// Where a file is, and its hash.
    fn find_file(
        key: &str,
        name: &str,
        file: &RunFile,
        origin: &Origin,
        env: Env<'_>,
    ) -> Result<(PathBuf, String), Error> {
        let reference: Reference = name.parse()?;
        let found = match draftsmith_pull::pull(&[reference], None, env.places, env.report, env.stop) {
            Err(PullError::NoSuchPath { .. }) => {
                return Err(Error::input(
                    format!("`{key}` names `{name}`, which does not exist"),
                    origin.path_advice(file, name),
                ));
            }
            found => found?,
        };
        match found.sha256 {
            Some(sha256) => Ok((found.path, sha256)),
            None => Err(Error::input(
                format!("`{key}` names `{name}`, a folder, expected a file"),
                "name one file, for `hf:` references after a `:`",
            )),
        }
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
