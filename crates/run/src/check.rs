//! What can be known before the first stage begins: keys against the target's configuration, files that later stages
//! read, and folders that they write. A run of hours must not end at a key of its last stage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_bench::Workload;
use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::run::{CaptureMode, DraftInit, Place, RunFile, Stage, place_of_key, way_to};
use draftsmith_model::{DraftConfig, ModelError, TargetConfig};
use draftsmith_pull::Places;

use crate::Error;
use crate::begun::Begun;
use crate::disk::writable;
use crate::error::Told;
use crate::license::hub_name;
use crate::server::server_key;
use crate::shelf::Shelf;
use crate::size::{self, Decided};
use crate::state::RunFolder;

/// Where a run file comes from: for errors, and for the command that goes on.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The verb that was called.
    pub verb: String,
    /// The run file.
    pub path: PathBuf,
    /// Overrides behind it.
    pub overrides: Vec<String>,
}

impl Origin {
    /// What to do about a place of a run file that is not there.
    pub(super) fn path_advice(&self, file: &RunFile, name: &str) -> String {
        let general = || match file.paths_from().as_os_str().is_empty() {
            true => "check the path; relative paths in a run file count from its folder".to_string(),
            false => format!(
                "check the path; relative paths in this run file count from `{}`",
                file.paths_from().display()
            ),
        };
        self.way_advice(file, name).unwrap_or_else(general)
    }

    /// What to write for a place of a run file that is not there, if the working directory leads to it.
    pub(super) fn way_advice(&self, file: &RunFile, name: &str) -> Option<String> {
        let (from, written) = (file.paths_from(), file.as_written(name));
        let is_here =
            !from.as_os_str().is_empty() && Path::new(&written).is_relative() && Path::new(&written).exists();
        is_here.then(|| {
            format!(
                "relative paths in this run file count from `{}`; for what is in the working directory write `{}`",
                from.display(),
                way_to(from, &written)
            )
        })
    }

    /// The command that goes on after an interruption.
    pub(super) fn resume(&self) -> String {
        let mut command = format!("draftsmith {} {}", self.verb, self.path.display());
        for text in &self.overrides {
            command.push(' ');
            command.push_str(text);
        }
        command
    }

    /// An error at the key that names what is wrong.
    pub(super) fn at_key(&self, key: &str, error: Error) -> Error {
        match error {
            Error::Input { message, hint } => {
                Error::Input { message: format!("{}: `{key}`: {message}", self.place(key)), hint }
            }
            error => error,
        }
    }

    fn place(&self, key: &str) -> Place {
        place_of_key(&self.path, &self.overrides, key)
    }
}

/// A key that cannot be, with advice.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    key: String,
    problem: String,
    advice: String,
}

#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, key: impl Into<String>, problem: impl Into<String>, advice: impl Into<String>) {
        self.0.push(Fault { key: key.into(), problem: problem.into(), advice: advice.into() });
    }

    /// Each with its place and its advice.
    fn told(self, origin: &Origin) -> Vec<Told> {
        let place =
            |fault: &Fault| format!("{}: `{}` {}", origin.place(&fault.key), fault.key, fault.problem);
        self.0.into_iter().map(|fault| Told { message: place(&fault), hint: Some(fault.advice) }).collect()
    }
}

/// Everything that needs neither network nor target.
pub(super) fn check_alone(file: &RunFile, origin: &Origin) -> Vec<Told> {
    let mut faults = Faults::default();
    bundle_keys(file, &mut faults);
    folders(file, &mut faults);
    workloads(file, origin, &mut faults);
    faults.told(origin)
}

/// The keys of servers that stages still have to ask.
pub(super) fn check_servers(
    file: &RunFile,
    origin: &Origin,
    places: &Places,
    variable: fn(&str) -> Option<String>,
    to_do: &[Stage],
) -> Result<(), Error> {
    let mut faults = Faults::default();
    servers(file, places, variable, to_do, &mut faults);
    Error::of_all(faults.told(origin)).map_or(Ok(()), Err)
}

/// Keys against the target. Its configuration alone is read, no weights. Decides the size of a draft that is left to it.
/// What is wrong joins what was `found` before.
pub(super) fn check_with_target(
    file: &mut RunFile,
    origin: &Origin,
    target: &Path,
    shelf: Shelf<'_>,
    found: &mut Vec<Told>,
) -> Result<(Option<Decided>, Option<Begun>), Error> {
    let config = match target_config(target) {
        Ok(config) => config,
        Err(
            error @ (ModelError::UnknownArchitecture { .. }
            | ModelError::Unsupported { .. }
            | ModelError::Shapes { .. }),
        ) => return Err(error.into()),
        // A damaged or odd container: whoever loads the weights has the better words.
        Err(_) => return Ok((None, None)),
    };
    let begun = Begun::find(file, &config, shelf);
    let begun = begun.map_err(|error| origin.at_key("draft.from", error))?;
    let decided = size::decide(&mut file.draft, &config, || size::pass_bytes(target, &config));
    let mut faults = Faults::default();
    against(file, &config, &mut faults);
    // A key that is wrong was put back to its default: what comes of that is nobody's fault.
    faults.0.retain(|fault| {
        let key = format!("`{}` ", fault.key);
        !found.iter().any(|told| told.message.contains(&key))
    });
    found.extend(faults.told(origin));
    Ok((decided, begun))
}

/// The configuration of a target, without its weights.
///
/// # Errors
/// A file that cannot be read, an architecture that is not known.
pub fn target_config(path: &Path) -> Result<TargetConfig, ModelError> {
    match path.is_dir() {
        true => TargetConfig::from_hf(&HfConfig::open(path.join("config.json"))?),
        false => TargetConfig::from_gguf(&GgufFile::open(path)?),
    }
}

fn bundle_keys(file: &RunFile, faults: &mut Faults) {
    let empty = |text: &Option<String>| text.as_ref().is_none_or(|t| t.trim().is_empty());
    if empty(&file.bundle.license) {
        faults.add(
            "bundle.license",
            "is missing",
            "name the licence of the draft's weights as an SPDX expression, for example `Apache-2.0`",
        );
    }
    if empty(&file.bundle.name) {
        faults.add("bundle.name", "is empty", "name the draft, or leave `bundle.name` out");
    }
    if file.bundle.base_license.is_some() && empty(&file.bundle.base_license) {
        faults.add(
            "bundle.base_license",
            "is empty",
            "name the licence of the target's weights as an SPDX expression, or leave it out",
        );
    }
    if let Err(error) = hub_name(file.bundle.base_model.as_deref(), &[]) {
        faults.add("bundle.base_model", error.to_string(), error.hint().unwrap_or_default());
    }
}

/// Folders of the run and of the bundle can be written and do not stand in each other's way.
fn folders(file: &RunFile, faults: &mut Faults) {
    let (root, made) = (absolute(&file.dir()), absolute(&file.bundle_dir()));
    let folder = RunFolder::new(root.clone());
    let own = Stage::ALL.into_iter().filter(|s| *s != Stage::Bundle).map(|s| folder.stage_dir(s));
    let shown = file.bundle_dir();
    if root.starts_with(&made) || own.chain([folder.state_dir()]).any(|dir| made.starts_with(dir)) {
        faults.add(
            "bundle.dir",
            format!("is `{}`, a folder that the run itself needs", shown.display()),
            "leave `bundle.dir` out, or name a folder of its own",
        );
    } else if made.symlink_metadata().is_ok() && !draftsmith_bundle::has_manifest(&made) {
        faults.add(
            "bundle.dir",
            format!("is `{}`, which exists and is not a bundle", shown.display()),
            "name another folder in `bundle.dir`, or move it away",
        );
    }
    let mut refused: Vec<PathBuf> = Vec::new();
    for (key, path, shown) in [("run.dir", &root, file.dir()), ("bundle.dir", &made, shown)] {
        // The nearest thing that is there says whether the rest can be made.
        let there = path.ancestors().find(|p| p.symlink_metadata().is_ok());
        let there = there.unwrap_or(Path::new("/")).to_path_buf();
        let below = if there == *path { there.parent().filter(|_| key == "bundle.dir") } else { None };
        let there = below.map_or(there.clone(), Path::to_path_buf);
        if refused.contains(&there) {
            continue;
        }
        if !there.is_dir() {
            faults.add(
                key,
                format!("is `{}`, but `{}` is no folder", shown.display(), there.display()),
                format!("name another folder in `{key}`"),
            );
            refused.push(there);
        } else if !writable(&there) {
            faults.add(
                key,
                format!("is `{}`, but `{}` cannot be written", shown.display(), there.display()),
                format!("change the permissions of `{}`, or name another folder in `{key}`", there.display()),
            );
            refused.push(there);
        }
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Every workload can be read, and each has a name of its own: records are named after it.
fn workloads(file: &RunFile, origin: &Origin, faults: &mut Faults) {
    let mut names: BTreeMap<String, &Path> = BTreeMap::new();
    for (i, path) in file.bench.workloads.iter().enumerate() {
        let key = format!("bench.workloads.{i}");
        if !path.is_file() {
            faults.add(
                key,
                format!("names `{}`, which does not exist", path.display()),
                origin.path_advice(file, &path.to_string_lossy()),
            );
            continue;
        }
        match Workload::read(path, None) {
            Ok(workload) => {
                if let Some(other) = names.insert(workload.name.clone(), path) {
                    faults.add(
                        key,
                        format!(
                            "names `{}`, which is called `{}` in records, like `{}`",
                            path.display(),
                            workload.name,
                            other.display()
                        ),
                        "rename one of the files: without its ending a file has the name of its records",
                    );
                }
            }
            Err(error) => faults.add(
                key,
                format!("cannot be used: {error}"),
                error.hint().unwrap_or_else(|| "mend the file, or leave it out".to_string()),
            ),
        }
    }
}

/// Keys of servers are there.
fn servers(
    file: &RunFile,
    places: &Places,
    variable: fn(&str) -> Option<String>,
    to_do: &[Stage],
    faults: &mut Faults,
) {
    let asks = |stage| to_do.contains(&stage);
    let answers = file.regenerate.server.iter().filter(|_| asks(Stage::Regenerate));
    let answers = answers
        .flat_map(|s| s.addresses().into_iter().map(move |url| ("regenerate.server", url, &s.key_env)));
    // Without a cache the states are asked for while training.
    let stage = if file.capture.mode == CaptureMode::Cache { Stage::Capture } else { Stage::Train };
    let states = file.capture.server.iter().filter(|_| asks(stage));
    let states = states
        .flat_map(|s| s.all_addresses().into_iter().map(move |url| ("capture.server", url, &s.key_env)));
    for (key, url, key_env) in answers.chain(states) {
        if let Err(error) = server_key(url, key_env.as_deref(), places, variable) {
            faults.add(
                key,
                format!("cannot be asked: {error}"),
                error.hint().unwrap_or_else(|| format!("mend `{key}`")),
            );
        }
    }
}

/// Numbers that only the target's configuration shows to be wrong.
fn against(file: &RunFile, target: &TargetConfig, faults: &mut Faults) {
    let context = target.max_position;
    if file.data.max_length as usize > context {
        faults.add(
            "data.max_length",
            format!("is {}, but the target's context ends at {context}", file.data.max_length),
            "lower `data.max_length`",
        );
    }
    let layers = file.capture.layers.iter().flatten();
    if let Some(outside) = layers.clone().find(|l| **l as usize >= target.num_layers) {
        faults.add(
            "capture.layers",
            format!("names layer {outside}, but the target has {} layers", target.num_layers),
            "layers count from 0; leave the key out for the default",
        );
    }
    // An answer of full length must find room behind a prompt.
    for (key, tokens, used) in [
        ("validate.max_new_tokens", file.validate.max_new_tokens, file.validate.every > 0),
        ("bench.max_new_tokens", file.bench.max_new_tokens, !file.bench.workloads.is_empty()),
    ] {
        if used && tokens as usize + 1 >= context {
            faults.add(
                key,
                format!(
                    "is {tokens}, which leaves no room for a prompt in the target's context of {context}"
                ),
                format!("lower `{key}`"),
            );
        }
    }
    draft_shapes(file, target, faults);
}

fn draft_shapes(file: &RunFile, target: &TargetConfig, faults: &mut Faults) {
    let draft = &file.draft;
    let differs = |wanted: Option<u32>, own: usize| wanted.filter(|w| *w as usize != own);
    if let Some(hidden) = differs(draft.hidden, target.hidden_size) {
        faults.add(
            "draft.hidden",
            format!(
                "is {hidden}, but the draft shares the target's embedding of width {}",
                target.hidden_size
            ),
            "leave `draft.hidden` out",
        );
    }
    let heads = draft.heads.map_or(target.num_heads, |n| n as usize);
    let kv_heads = draft.kv_heads.map_or(target.num_kv_heads, |n| n as usize);
    let key = if draft.heads.is_some() { "draft.heads" } else { "draft.kv_heads" };
    let before = faults.0.len();
    if !heads.is_multiple_of(kv_heads) {
        let whose = |own: bool| if own { "" } else { " of the target" };
        let problem = match draft.heads {
            Some(_) => {
                format!(
                    "is {heads}, which {kv_heads} key-value heads{} do not divide",
                    whose(draft.kv_heads.is_some())
                )
            }
            None => format!("is {kv_heads}, which does not divide the target's {heads} heads"),
        };
        faults.add(
            key,
            problem,
            format!(
                "set `draft.heads` to a multiple of `draft.kv_heads`; the target has {} and {}",
                target.num_heads, target.num_kv_heads
            ),
        );
    }
    // Started from the target's last layer, the draft must have its shapes.
    if draft.init == DraftInit::Target {
        let attention = target.attention_is_a_drafts();
        let mlp = target.mlp_is_a_drafts();
        for (key, wanted, own, copied) in [
            ("draft.heads", draft.heads, target.num_heads, attention),
            ("draft.kv_heads", draft.kv_heads, target.num_kv_heads, attention),
            ("draft.intermediate", draft.intermediate, target.intermediate_size, mlp),
        ] {
            if let Some(wanted) = differs(wanted, own).filter(|_| copied) {
                faults.add(
                    key,
                    format!("is {wanted}, but a draft that starts from the target has its {own}"),
                    format!("leave `{key}` out, or set `draft.init = \"random\"`"),
                );
            }
        }
    }
    let size = (draft.vocab_size as usize).min(target.vocab_size);
    if faults.0.len() == before
        && let Err(error) = DraftConfig::from_table(draft, target, size)
    {
        faults.add(
            "draft",
            format!("does not fit the target: {error}"),
            error
                .hint()
                .unwrap_or_else(|| "leave the keys of `[draft]` out for the target's own".to_string()),
        );
    }
}
