//! Target and draft, loaded and joined: from references to something that decodes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_bench::other_weights;
use draftsmith_bench::record::ArtifactInfo;
use draftsmith_bundle::{Manifest, TargetInfo, TunedDrafting, has_manifest, layer_problem, target_problems};
use draftsmith_core::report::{Report, Stop};
use draftsmith_decode::{DraftPlan, Drafter, Engine, drafter, small_drafter};
use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::bundle_files::portable;
use draftsmith_formats::gguf::{GgufFile, SplitName, parts_of};
use draftsmith_formats::hash;
use draftsmith_formats::hash_records::HashRecords;
use draftsmith_formats::run::RunFile;
use draftsmith_kernels::{Kernels, PackMode};
use draftsmith_model::{Draft, Precision, Target};
use draftsmith_pull::{Places, Pulled, Reference, pull};

use crate::Error;
use crate::backend::{Backend, ToLoad};
use crate::host::Host;
pub use crate::host::default_threads;
use crate::packs::LoadedFrom;
use crate::state::RunFolder;
use crate::target::{TargetText, TargetTextError, model_hash_with, tokenizer_of};

/// What a target is loaded from and how.
#[derive(Debug, Clone)]
pub struct TargetOptions<'a> {
    /// Model references, the first that answers wins.
    pub sources: &'a [String],
    /// Hash the model file must have.
    pub sha256: Option<&'a str>,
    /// In which arithmetic it runs.
    pub precision: Precision,
    /// Threads, where the kernels are not given.
    pub threads: usize,
    /// Jinja file that replaces the model's own template.
    pub template: Option<&'a Path>,
}

/// A target ready to decode, with its text side.
pub struct LoadedTarget<K: Kernels = Host> {
    /// The network.
    pub target: Arc<Target<K>>,
    /// Tokenizer and template.
    pub text: TargetText,
    /// Where it lies on this machine.
    pub path: PathBuf,
    /// The reference that answered.
    pub reference: String,
    /// Hash of its weights.
    pub sha256: String,
    /// Threads it computes with.
    pub threads: usize,
    /// In which arithmetic it runs.
    pub precision: Precision,
    /// Where its packed weights came from.
    pub loaded_from: LoadedFrom,
    /// From the reference to a target that can decode.
    pub load_time: Duration,
}

/// Finds a target on this machine or fetches it.
///
/// # Errors
/// Those of [`pull`].
pub fn locate(
    sources: &[String],
    sha256: Option<&str>,
    places: &Places,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Pulled, Error> {
    let references = sources.iter().map(|s| s.parse::<Reference>()).collect::<Result<Vec<_>, _>>()?;
    Ok(pull(&references, sha256, places, report, stop)?)
}

/// Bytes of a model's weights on disk, over all parts of a split file or all files of a folder.
///
/// # Errors
/// A file that cannot be read, a part that is missing.
pub fn weight_bytes(path: &Path) -> Result<u64, Error> {
    let unreadable = |path: &Path, source| Error::unreadable(path, source);
    let files = match path.is_dir() {
        false if path.extension().is_some_and(|e| e == "gguf") => parts_of(path)?,
        false => vec![path.to_path_buf()],
        true => {
            let entries = std::fs::read_dir(path).map_err(|source| unreadable(path, source))?;
            let files = entries.flatten().map(|entry| entry.path());
            files.filter(|p| p.extension().is_some_and(|e| e == "safetensors" || e == "gguf")).collect()
        }
    };
    let mut sum = 0;
    for file in files {
        sum += std::fs::metadata(&file).map_err(|source| unreadable(&file, source))?.len();
    }
    Ok(sum)
}

/// The hash of a model folder, if it need not be read for it.
fn known_hash(path: &Path, records: &HashRecords) -> Option<String> {
    let known = |file: &Path| match records.find(file) {
        Some(sha256) => Ok(sha256),
        None if std::fs::metadata(file).is_ok_and(|meta| meta.len() < 1 << 20) => hash::sha256_file(file),
        None => Err(AtomicError::BadPath { path: file.to_path_buf() }),
    };
    model_hash_with(path, &known).ok()
}

/// A model's network and whatever is wanted of its text side.
struct Parts<K: Kernels, T> {
    target: Target<K>,
    loaded_from: LoadedFrom,
    text: T,
    sha256: String,
}

/// Loads a model that was found.
fn load_parts<K: Backend, T: Send>(
    pulled: &Pulled,
    kernels: &Arc<K>,
    precision: Precision,
    (places, report, stop): (&Places, &dyn Report, &Stop),
    open: impl FnOnce() -> Result<T, TargetTextError> + Send,
) -> Result<Parts<K, T>, Error> {
    let records = places.hash_records();
    let known = pulled.sha256.clone().or_else(|| known_hash(&pulled.path, &records));
    // Weights, text side and a hash that is not known yet do not need each other.
    let (target, text, sha256) = std::thread::scope(|scope| {
        let text = scope.spawn(open);
        let hashed = scope.spawn(|| match &known {
            Some(sha256) => Ok(sha256.clone()),
            None => model_hash_with(&pulled.path, &|file| records.sha256_file(file)),
        });
        let target = kernels.load(&ToLoad {
            path: &pulled.path,
            precision,
            sha256: known.as_deref(),
            bytes: pulled.bytes,
            places,
            report,
            stop,
        });
        let joined = "a loader does not panic";
        (target, text.join().expect(joined), hashed.join().expect(joined))
    });
    let ((target, loaded_from), text, sha256) = (target?, text?, sha256?);
    Ok(Parts { target, loaded_from, text, sha256 })
}

/// Name for people of a model at a path: the file name without its ending, or the folder's name.
fn model_name(path: &Path, reference: &str) -> String {
    let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let file = path.file_name().and_then(|n| n.to_str()).and_then(SplitName::parse);
    match file {
        // All parts are one model.
        Some(part) => part.prefix().to_string(),
        None => stem.map(|s| s.to_string_lossy().into_owned()).unwrap_or_else(|| reference.to_owned()),
    }
}

impl LoadedTarget {
    /// Locates and loads a target on this machine's own kernels.
    ///
    /// # Errors
    /// Whatever is wrong with reference, weights, tokenizer or template, named.
    pub fn load(
        options: &TargetOptions<'_>,
        places: &Places,
        report: &dyn Report,
        stop: &Stop,
    ) -> Result<LoadedTarget, Error> {
        LoadedTarget::load_on(&Arc::new(Host::new(options.threads)), options, places, report, stop)
    }
}

impl<K: Backend> LoadedTarget<K> {
    /// Locates and loads a target on these kernels, whose threads count.
    ///
    /// # Errors
    /// Whatever is wrong with reference, weights, tokenizer or template, named.
    pub fn load_on(
        kernels: &Arc<K>,
        options: &TargetOptions<'_>,
        places: &Places,
        report: &dyn Report,
        stop: &Stop,
    ) -> Result<LoadedTarget<K>, Error> {
        let began = Instant::now();
        let pulled = locate(options.sources, options.sha256, places, report, stop)?;
        let open = || TargetText::open(&pulled.path, options.template);
        let Parts { target, loaded_from, text, sha256 } =
            load_parts(&pulled, kernels, options.precision, (places, report, stop), open)?;
        Ok(LoadedTarget {
            target: Arc::new(target),
            text,
            path: pulled.path,
            reference: pulled.reference,
            sha256,
            threads: kernels.threads(),
            precision: options.precision,
            loaded_from,
            load_time: began.elapsed(),
        })
    }

    /// Ids that end an answer.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.text.tokenizer.eos_ids().to_vec()
    }

    /// Name for people: the file name without its ending, or the folder's name.
    pub fn name(&self) -> String {
        model_name(&self.path, &self.reference)
    }

    /// `Q4_1`, `BF16`: the type that most of the weights are stored in.
    pub fn weight_format(&self) -> String {
        weight_format(&self.path)
    }

    /// For records.
    pub fn artifact(&self) -> ArtifactInfo {
        ArtifactInfo {
            name: self.name(),
            sha256: Some(self.sha256.clone()),
            kind: self.weight_format(),
            trained_beside: None,
        }
    }

    /// For manifests; licence and hub name are not known from the weights and stay as given.
    pub fn info(&self) -> TargetInfo {
        let config = self.target.config();
        TargetInfo {
            name: self.name(),
            references: vec![self.reference.clone()],
            hub_name: None,
            license: String::new(),
            weights_sha256: self.sha256.clone(),
            tokenizer_sha256: self.text.tokenizer.content_hash().to_string(),
            template_sha256: self.text.template.as_ref().map(|t| t.hash()).unwrap_or_default(),
            hidden_size: config.hidden_size as u64,
            vocab_size: config.vocab_size as u64,
            num_layers: config.num_layers as u64,
            context_len: Some(config.max_position as u64),
            weight_format: self.weight_format(),
        }
    }
}

/// The type that most of the weights of a model are stored in.
fn weight_format(path: &Path) -> String {
    let mut bytes: Vec<(String, usize)> = Vec::new();
    let mut add = |kind: String, size: usize| match bytes.iter_mut().find(|(k, _)| *k == kind) {
        Some((_, sum)) => *sum += size,
        None => bytes.push((kind, size)),
    };
    if path.is_dir() {
        if let Ok(dir) = draftsmith_formats::safetensors_dir::SafetensorsDir::open(path) {
            for tensor in dir.names().filter_map(|name| dir.find(name)) {
                add(format!("{:?}", tensor.dtype).to_uppercase(), tensor.bytes.len());
            }
        }
    } else if let Ok(file) = GgufFile::open(path) {
        for tensor in file.tensors() {
            add(tensor.ggml_type.to_string().to_uppercase(), file.data(tensor).len());
        }
    }
    bytes.into_iter().max_by_key(|(_, sum)| *sum).map(|(kind, _)| kind).unwrap_or_default()
}

/// A draft joined to its target.
pub struct LoadedDraft<K: Kernels = Host> {
    /// Where it lies: the folder of a bundle, or a model.
    pub path: PathBuf,
    /// Proposes tokens.
    pub drafter: Arc<dyn Drafter<K>>,
    /// What the bundle says, if it is one.
    pub manifest: Option<Manifest>,
    /// For records.
    pub artifact: ArtifactInfo,
}

/// Where a bundle lies: a folder that is one, or the folder of a run that made one.
pub fn bundle_place(dir: &Path) -> PathBuf {
    let run = RunFolder::new(dir);
    if has_manifest(dir) || !run.is_run() {
        return dir.to_path_buf();
    }
    let inside = dir.join("bundle");
    if has_manifest(&inside) {
        return inside;
    }
    // A run file may put it elsewhere.
    let elsewhere = RunFile::load_saved(run.run_file(), &[]).ok().map(|file| file.bundle_dir());
    elsewhere.filter(|place| has_manifest(place)).unwrap_or_else(|| dir.to_path_buf())
}

/// References that lead to the target of a bundle, best first. A bundle names no folder of the machine that made it; where
/// it still lies in the folder of its run, the run file does.
///
/// # Errors
/// A folder that is no bundle.
pub fn target_references(bundle: &Path) -> Result<Vec<String>, Error> {
    let bundle = bundle_place(bundle);
    let named = Manifest::read(&bundle)?.target.references;
    let run = bundle.parent().map(RunFolder::new).filter(RunFolder::is_run);
    let Some(file) = run.and_then(|run| RunFile::load_saved(run.run_file(), &[]).ok()) else {
        return Ok(named);
    };
    let mut found = Vec::new();
    for reference in &named {
        // The source that this name stands for, where it was a path of this machine.
        let source =
            file.target.source.0.iter().find(|source| portable(&file.as_written(source)) == *reference);
        found.push(source.unwrap_or(reference).clone());
    }
    Ok(found)
}

/// A bundle was made for this target.
///
/// # Errors
/// What differs.
pub(crate) fn belongs<K: Backend>(
    dir: &Path,
    manifest: &Manifest,
    target: &LoadedTarget<K>,
) -> Result<(), Error> {
    match target_problems(&manifest.target, &target.info()).into_iter().next() {
        None => Ok(()),
        Some(problem) => Err(Error::Input {
            message: format!(
                "bundle `{}` does not belong to target `{}`: {problem}",
                dir.display(),
                target.name()
            ),
            hint: problem.hint(),
        }),
    }
}

/// What a draft is called: as its bundle says, or else as its folder.
pub(crate) fn draft_name(dir: &Path, manifest: Option<&Manifest>) -> String {
    match manifest {
        Some(manifest) => manifest.name.clone(),
        None => dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
    }
}

/// Loads a bundle, or a plain draft folder, for a target.
///
/// # Errors
/// A draft that was made for another target (hidden size, vocabulary, tokenizer or template hash), or is damaged.
pub fn load_draft<K: Backend>(
    dir: &Path,
    target: &LoadedTarget<K>,
    mode: PackMode,
) -> Result<LoadedDraft<K>, Error> {
    let dir = &bundle_place(dir);
    if !dir.is_dir() {
        return Err(Error::input(
            format!("`{}` is not a folder", dir.display()),
            "give the folder of a bundle: `draftsmith run` makes one, and one ships in `bundles`",
        ));
    }
    let manifest = match has_manifest(dir) {
        true => Some(Manifest::read(dir)?),
        false => None,
    };
    if let Some(manifest) = &manifest {
        belongs(dir, manifest, target)?;
    }
    let draft = Draft::load(target.target.kernels().as_ref(), dir, mode)?;
    let config = draft.config();
    if let Some(problem) = layer_problem(&config, target.target.config().num_layers as u32) {
        return Err(Error::Input {
            message: format!("draft `{}` does not fit target `{}`: {problem}", dir.display(), target.name()),
            hint: problem.hint(),
        });
    }
    let drafter = drafter(&target.target, draft)?;
    let name = draft_name(dir, manifest.as_ref());
    let weights = dir.join("model.safetensors");
    let sha256 = if weights.is_file() { Some(hash::sha256_file(&weights)?) } else { None };
    let trained_beside =
        manifest.as_ref().map(|m| m.target.weights_sha256.clone()).filter(|hash| !hash.is_empty());
    let artifact = ArtifactInfo { name, sha256, kind: config.name().to_string(), trained_beside };
    Ok(LoadedDraft { path: dir.to_path_buf(), drafter, manifest, artifact })
}

/// The kind of an ordinary model that drafts, in records.
pub const SMALL: &str = "small";

/// Loads an ordinary model to draft for a target: any reference, in the target's arithmetic and on its threads.
///
/// # Errors
/// As [`LoadedTarget::load`]; a model of another tokenizer, with the first id that differs.
pub fn load_small<K: Backend>(
    reference: &str,
    target: &LoadedTarget<K>,
    places: &Places,
    report: &dyn Report,
    stop: &Stop,
) -> Result<LoadedDraft<K>, Error> {
    let pulled = locate(&[reference.to_owned()], None, places, report, stop)?;
    let name = model_name(&pulled.path, &pulled.reference);
    let kernels = target.target.kernels();
    // Whatever template it has, none is rendered with it.
    let open = || tokenizer_of(&pulled.path);
    let parts = load_parts(&pulled, kernels, target.precision, (places, report, stop), open)?;
    if let Some(difference) = target.text.tokenizer.difference(&parts.text) {
        return Err(Error::Input {
            message: format!(
                "draft model `{name}` has another tokenizer than target `{}`: {}",
                target.name(),
                difference.told("the target", "the draft model")
            ),
            hint: Some(
                "give a smaller model of the target's own family, whose ids mean the same, or a bundle that was \
                 trained for the target (`--bundle DIR`)"
                    .into(),
            ),
        });
    }
    let artifact =
        ArtifactInfo { name, sha256: Some(parts.sha256), kind: SMALL.to_owned(), trained_beside: None };
    let drafter = small_drafter(&target.target, Arc::new(parts.target));
    Ok(LoadedDraft { path: pulled.path, drafter, manifest: None, artifact })
}

/// What to tell the user of a draft beside this target: the bundle names other weights than these. It decodes the same
/// text all the same, so this is a warning; what does not fit is an error of [`load_draft`].
pub fn weights_warning<K: Backend>(draft: &LoadedDraft<K>, target: &LoadedTarget<K>) -> Option<String> {
    let doubt = other_weights(&draft.artifact, &target.artifact())?;
    Some(format!("warning: {} ({})", doubt.message(), doubt.advice()))
}

/// An engine over a target, with a drafter if there is one.
pub fn engine<K: Kernels>(target: &LoadedTarget<K>, draft: Option<&LoadedDraft<K>>) -> Engine<K> {
    let drafter = draft.map(|d| Arc::clone(&d.drafter));
    Engine::new(Arc::clone(&target.target), drafter)
}

/// How a draft decodes when nobody says: as `bench tune` found best, else as much as pays.
pub fn default_plan<K: Kernels>(draft: &LoadedDraft<K>) -> DraftPlan {
    let tuned = draft.manifest.as_ref().and_then(|manifest| manifest.recommended.tuned.as_ref());
    match tuned.map(|tuned| tuned.drafting) {
        None | Some(TunedDrafting::Auto) => DraftPlan::Auto,
        Some(TunedDrafting::Plain) => DraftPlan::None,
        Some(TunedDrafting::Chain { depth }) => draft_plan(depth, None),
        Some(TunedDrafting::Tree { depth, top_k, num_draft_tokens }) => {
            draft_plan(depth, Some((top_k, Some(num_draft_tokens))))
        }
    }
}

/// A chain, or a tree if `tree` names candidates per node (and nodes in all, 4 per level if not said).
pub fn draft_plan(depth: u32, tree: Option<(u32, Option<u32>)>) -> DraftPlan {
    let depth = depth as usize;
    match tree {
        None => DraftPlan::Chain { depth },
        Some((top_k, nodes)) => DraftPlan::Tree {
            depth,
            top_k: top_k as usize,
            num_draft_tokens: nodes.map_or(4 * depth, |n| n as usize).max(depth),
        },
    }
}
