//! `list`: the targets and bundles that are on this machine, which of them belong together, and what was gained.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use draftsmith_bundle::{Headline, MANIFEST_FILE, Manifest, has_manifest};
use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::bundle_files::listed_files;
use draftsmith_formats::gguf::{self, GgufFile, SplitName};
use draftsmith_formats::hash::{is_sha256_hex, sha256_file};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_model::TargetConfig;
use draftsmith_pull::Places;
use serde::Serialize;

use crate::Error;
use crate::catalogue::catalogue;
use crate::disk::human;
use crate::engine::{bundle_place, target_references};
use crate::imports::measured_results;
use crate::state::RunFolder;
use crate::target::model_hash_with;

/// Levels of folders that are looked through.
const DEPTH: usize = 3;
/// Smaller files are hashed to be compared: of these no record is kept, and it takes milliseconds.
const SMALL: u64 = 16 << 20;

/// What is looked through.
pub struct ListOptions<'a> {
    /// Caches.
    pub places: &'a Places,
    /// Folders that hold what ships with draftsmith, in order.
    pub roots: &'a [PathBuf],
    /// More folders: bundles, runs, models, or folders of these.
    pub folders: &'a [PathBuf],
    /// Read weights whose hash is not known.
    pub hashes: bool,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// Bundles, those of the catalogue first.
    pub bundles: Vec<ListedBundle>,
    /// Models that can be decoded.
    pub targets: Vec<ListedTarget>,
}

/// A bundle.
#[derive(Clone, Debug, Serialize)]
pub struct ListedBundle {
    /// What to write behind `--bundle`: a name of the catalogue, a reference, or a path.
    pub name: String,
    /// Its name on the model card.
    pub title: String,
    /// Where it lies; `None` if it is not here.
    pub path: Option<PathBuf>,
    /// How it came to be known: `catalogue`, `folder`, `hub`.
    pub from: &'static str,
    /// Kind of draft.
    pub kind: String,
    /// Size of its files.
    pub bytes: u64,
    /// SPDX expression of its weights' licence.
    pub license: String,
    /// What is wrong with it at first sight.
    pub problem: Option<String>,
    /// The target's name.
    pub target: String,
    /// References that lead to its target.
    pub target_references: Vec<String>,
    /// Hash of the target's weights.
    pub target_sha256: String,
    /// Targets of this list that it fits.
    pub fits: Vec<Fit>,
    /// The largest speedup that its records show.
    pub measured: Option<Headline>,
}

/// A target that a bundle fits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// The target's [`ListedTarget::name`].
    pub target: String,
    /// How it is known.
    pub by: FitBy,
}

/// How a fit is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FitBy {
    /// These are the weights that it was trained beside.
    Weights,
    /// Width, vocabulary and layers are the same, the weights are others: it works, and is accepted less often.
    OtherWeights,
    /// Width, vocabulary and layers are the same; the weights were not compared.
    Shape,
}

impl FitBy {
    fn words(self) -> &'static str {
        match self {
            FitBy::Weights => "same weights",
            FitBy::OtherWeights => "other weights of the same shape",
            FitBy::Shape => "same shape, weights not read",
        }
    }
}

/// A model that can be decoded.
#[derive(Clone, Debug, Serialize)]
pub struct ListedTarget {
    /// What to write behind `--target`: a reference, or a path.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Size of its weights.
    pub bytes: u64,
    /// Hash of its weights, if it is known.
    pub sha256: Option<String>,
    /// Width of its residual stream.
    pub hidden_size: usize,
    /// Its vocabulary.
    pub vocab_size: usize,
    /// Its decoder layers.
    pub num_layers: usize,
    /// Bundles of this list that fit it.
    pub bundles: Vec<String>,
}

/// Looks through caches and folders. Fetches nothing and writes nothing.
///
/// # Errors
/// A folder that was named and is not there.
pub fn list(options: &ListOptions<'_>) -> Result<Listing, Error> {
    let mut found = Found { options, bundles: Vec::new(), targets: Vec::new(), seen: BTreeSet::new() };
    for entry in catalogue() {
        match entry.find_below(options.roots) {
            Some(folder) => found.bundle(&folder, &entry.name, "catalogue"),
            None => found.bundles.push(Candidate {
                listed: ListedBundle {
                    name: entry.name.clone(),
                    title: entry.title.clone(),
                    path: None,
                    from: "catalogue",
                    kind: entry.kind.clone(),
                    bytes: entry.bytes,
                    license: entry.license.clone(),
                    problem: None,
                    target: entry.target.name.clone(),
                    target_references: entry.target.references.clone(),
                    target_sha256: entry.target.weights_sha256.clone(),
                    fits: Vec::new(),
                    measured: entry.measured.clone(),
                },
                shape: None,
            }),
        }
    }
    for folder in options.folders {
        if !folder.exists() {
            return Err(Error::input(
                format!("`{}` does not exist", folder.display()),
                "give folders with bundles, runs or models; without any, `runs`, `bundles` and the caches are shown",
            ));
        }
        found.below(folder, DEPTH);
    }
    for folder in ["bundles", "runs"] {
        found.below(Path::new(folder), DEPTH);
    }
    found.hub();
    found.pip();
    found.named_by_bundles();
    Ok(found.joined())
}

struct Candidate {
    listed: ListedBundle,
    /// Width, vocabulary and layers of the target.
    shape: Option<[u64; 3]>,
}

struct Found<'a> {
    options: &'a ListOptions<'a>,
    bundles: Vec<Candidate>,
    targets: Vec<ListedTarget>,
    /// Real paths of what was found.
    seen: BTreeSet<PathBuf>,
}

impl Found<'_> {
    fn is_new(&mut self, path: &Path) -> bool {
        self.seen.insert(path.canonicalize().unwrap_or_else(|_| path.to_path_buf()))
    }

    /// A bundle at a folder.
    fn bundle(&mut self, folder: &Path, name: &str, from: &'static str) {
        if !self.is_new(folder) {
            return;
        }
        let mut listed = ListedBundle {
            name: name.to_string(),
            title: String::new(),
            path: Some(folder.to_path_buf()),
            from,
            kind: String::new(),
            bytes: 0,
            license: String::new(),
            problem: None,
            target: String::new(),
            target_references: Vec::new(),
            target_sha256: String::new(),
            fits: Vec::new(),
            measured: None,
        };
        let manifest = match Manifest::read(folder) {
            Ok(manifest) => manifest,
            Err(error) => {
                listed.problem = Some(error.to_string());
                self.bundles.push(Candidate { listed, shape: None });
                return;
            }
        };
        let size = |path: &str| std::fs::metadata(folder.join(path)).ok().map(|meta| meta.len());
        let wrong = manifest.files.iter().find(|file| size(&file.path) != Some(file.bytes));
        listed.problem = wrong.map(|file| match size(&file.path) {
            None => format!("`{}` is missing", file.path),
            Some(bytes) => format!("`{}` has {bytes} bytes, listed are {}", file.path, file.bytes),
        });
        listed.bytes =
            size(MANIFEST_FILE).unwrap_or(0) + manifest.files.iter().map(|file| file.bytes).sum::<u64>();
        match measured_results(folder) {
            Ok(results) => listed.measured = Headline::of(&results),
            Err(error) => {
                listed.problem.get_or_insert_with(|| error.to_string());
            }
        }
        let target = &manifest.target;
        let shape = Some([target.hidden_size, target.vocab_size, target.num_layers]);
        listed.target_references =
            target_references(folder).unwrap_or_else(|_| manifest.target.references.clone());
        (listed.title, listed.kind, listed.license) =
            (manifest.name.clone(), manifest.method.clone(), manifest.license.clone());
        (listed.target, listed.target_sha256) = (target.name.clone(), target.weights_sha256.clone());
        self.bundles.push(Candidate { listed, shape });
    }

    /// Bundles, runs and models at a folder or below it.
    fn below(&mut self, folder: &Path, depth: usize) {
        let place = bundle_place(folder);
        if is_bundle(&place) {
            // The folder of a run is what a user writes.
            self.bundle(&place, &folder.display().to_string(), "folder");
            return;
        }
        // What else lies in a run is on its way to one.
        if RunFolder::new(folder).is_run() {
            return;
        }
        if folder.is_file() {
            self.target(folder, None);
            return;
        }
        if folder.join("config.json").is_file() {
            self.target(folder, None);
            return;
        }
        for path in entries(folder) {
            match path.is_dir() {
                true if depth > 0 => self.below(&path, depth - 1),
                true => {}
                false if path.extension().is_some_and(|e| e == "gguf") => self.target(&path, None),
                false => {}
            }
        }
    }

    /// The cache of the hub: `models--ORG--NAME/snapshots/COMMIT`.
    fn hub(&mut self) {
        for repo in entries(&self.options.places.hf_cache) {
            let file_name = repo.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(name) = file_name.strip_prefix("models--").map(|name| name.replacen("--", "/", 1))
            else {
                continue;
            };
            let branches: Vec<(String, String)> = entries(&repo.join("refs"))
                .into_iter()
                .filter_map(|path| {
                    let commit = std::fs::read_to_string(&path).ok()?.trim().to_string();
                    Some((path.file_name()?.to_string_lossy().into_owned(), commit))
                })
                .collect();
            for snapshot in entries(&repo.join("snapshots")) {
                let commit = snapshot.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let reference = match branches.iter().find(|(_, points_at)| *points_at == commit) {
                    Some((branch, _)) if branch == "main" => format!("hf:{name}"),
                    Some((branch, _)) => format!("hf:{name}@{branch}"),
                    None => format!("hf:{name}@{commit}"),
                };
                if is_bundle(&snapshot) {
                    self.bundle(&snapshot, &reference, "hub");
                    continue;
                }
                if snapshot.join("config.json").is_file() {
                    self.target(&snapshot, Some(&reference));
                }
                for file in files_below(&snapshot, DEPTH) {
                    let inside = file.strip_prefix(&snapshot).unwrap_or(&file).display().to_string();
                    self.target(&file, Some(&format!("{reference}:{inside}")));
                }
            }
        }
    }

    /// Our own cache: `pip/PACKAGE-VERSION/PATH`.
    fn pip(&mut self) {
        let cache = self.options.places.cache.join("pip");
        for package in entries(&cache) {
            for file in files_below(&package, DEPTH) {
                // A counted package has a folder of another name, which does not tell how it was written.
                let inside = file.strip_prefix(&package).unwrap_or(&file);
                let name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let written = name.rsplit_once('-').filter(|(_, version)| {
                    version.starts_with(|c: char| c.is_ascii_digit()) && inside.components().count() > 1
                });
                let reference = written
                    .map(|(package, version)| format!("pip:{package}=={version}:{}", inside.display()));
                self.target(&file, reference.as_deref());
            }
        }
    }

    /// Targets that bundles name by a path.
    fn named_by_bundles(&mut self) {
        let references: Vec<String> =
            self.bundles.iter().flat_map(|bundle| bundle.listed.target_references.clone()).collect();
        for reference in references {
            let path = Path::new(&reference);
            if !reference.starts_with("hf:") && !reference.starts_with("pip:") && path.exists() {
                self.target(path, None);
            }
        }
    }

    /// A model, if it is one that can be decoded; any other is passed over.
    fn target(&mut self, path: &Path, reference: Option<&str>) {
        let part = path.file_name().and_then(|name| name.to_str()).and_then(SplitName::parse);
        // The first part stands for all.
        if part.is_some_and(|part| part.no != 1 && part.count > 1) {
            return;
        }
        let Some(config) = config_of(path) else { return };
        if !self.is_new(path) {
            return;
        }
        self.targets.push(ListedTarget {
            name: reference.map_or_else(|| path.display().to_string(), str::to_string),
            path: path.to_path_buf(),
            bytes: weights_bytes(path),
            sha256: self.hash(path),
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            num_layers: config.num_layers,
            bundles: Vec::new(),
        });
    }

    /// The hash of a model, if it is known or may be read for it.
    fn hash(&self, path: &Path) -> Option<String> {
        let records = self.options.places.hash_records();
        let known = |file: &Path| {
            if let Some(sha256) = records.find(file) {
                return Ok(sha256);
            }
            // The hub's cache calls large files by their hash, which was checked when they came.
            let real = file.canonicalize().unwrap_or_else(|_| file.to_path_buf());
            let blob = real.file_name().and_then(|name| name.to_str()).filter(|name| is_sha256_hex(name));
            if let Some(sha256) = blob {
                return Ok(sha256.to_string());
            }
            match std::fs::metadata(file).is_ok_and(|meta| meta.len() < SMALL) {
                true => sha256_file(file),
                false if self.options.hashes => records.sha256_file(file),
                false => Err(AtomicError::BadPath { path: file.to_path_buf() }),
            }
        };
        model_hash_with(path, &known).ok()
    }

    /// Bundles and targets, each with those of the other kind that belong to it.
    fn joined(mut self) -> Listing {
        for bundle in &mut self.bundles {
            for target in &mut self.targets {
                let own = [target.hidden_size, target.vocab_size, target.num_layers].map(|n| n as u64);
                let same_shape = bundle.shape.map(|shape| shape == own);
                let same_weights =
                    target.sha256.as_ref().map(|sha256| *sha256 == bundle.listed.target_sha256);
                let by = match (same_weights, same_shape) {
                    (Some(true), _) => FitBy::Weights,
                    (Some(false), Some(true)) => FitBy::OtherWeights,
                    (None, Some(true)) => FitBy::Shape,
                    (Some(false) | None, Some(false) | None) => continue,
                };
                bundle.listed.fits.push(Fit { target: target.name.clone(), by });
                target.bundles.push(bundle.listed.name.clone());
            }
        }
        Listing {
            bundles: self.bundles.into_iter().map(|bundle| bundle.listed).collect(),
            targets: self.targets,
        }
    }
}

/// True of a folder with a manifest of ours, even if that is damaged: others call files so, too, the state of a run among
/// them.
fn is_bundle(folder: &Path) -> bool {
    has_manifest(folder)
        && std::fs::read(folder.join(MANIFEST_FILE))
            .is_ok_and(|bytes| !matches!(listed_files(&bytes), Ok(None)))
}

/// What lies in a folder, by name; nothing where it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// GGUF files below a folder.
fn files_below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in entries(folder) {
        match path.is_dir() {
            true if depth > 0 => found.extend(files_below(&path, depth - 1)),
            true => {}
            false if path.extension().is_some_and(|e| e == "gguf") => found.push(path),
            false => {}
        }
    }
    found
}

/// The configuration of a model that can be decoded; `None` of anything else, drafts among them.
fn config_of(path: &Path) -> Option<TargetConfig> {
    if !path.is_dir() {
        return TargetConfig::from_gguf(&GgufFile::open(path).ok()?).ok();
    }
    let config = HfConfig::open(path.join("config.json")).ok()?;
    const OF_DRAFTS: [&str; 7] = [
        "draft_vocab_size",
        "eagle_config",
        "dflash_config",
        "dspark_config",
        "speculators_config",
        "speculators_model_type",
        "target_layer_ids",
    ];
    let is_draft = OF_DRAFTS.iter().any(|key| config.get(key).is_some());
    let has_weights =
        || entries(path).iter().any(|file| file.extension().is_some_and(|e| e == "safetensors"));
    if is_draft || !has_weights() {
        return None;
    }
    TargetConfig::from_hf(&config).ok()
}

/// Size of a model: of all parts of a GGUF file, or of the safetensors files of a folder.
fn weights_bytes(path: &Path) -> u64 {
    let files = match path.is_dir() {
        true => {
            entries(path).into_iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")).collect()
        }
        false => gguf::parts_of(path).unwrap_or_else(|_| vec![path.to_path_buf()]),
    };
    files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|meta| meta.len()).sum()
}

impl Listing {
    /// As people read it. Ends with a line feed.
    pub fn text(&self) -> String {
        let mut text = String::from("bundles\n");
        // Writing to a String cannot fail.
        for bundle in &self.bundles {
            let _ = writeln!(text, "  {}", bundle.name);
            let kind = if bundle.kind.is_empty() { "?" } else { &bundle.kind };
            let _ = writeln!(text, "    {kind}, {}, for {}", human(bundle.bytes), bundle.target);
            match &bundle.measured {
                Some(measured) => {
                    let accept =
                        measured.accept_len.map_or(String::new(), |a| format!(", accept length {a:.2}"));
                    let _ = writeln!(
                        text,
                        "    measured {:.2}x over the target alone ({}{accept}; {}; {}{})",
                        measured.speedup,
                        measured.drafting,
                        measured.workloads.join(", "),
                        measured.machine,
                        if measured.identical { "" } else { "; TEXTS DIFFER" }
                    );
                    for doubt in &measured.doubts {
                        let _ = writeln!(text, "    doubt about {doubt}");
                    }
                }
                None => text.push_str("    not measured: `draftsmith bench --bundle` does\n"),
            }
            if let Some(problem) = &bundle.problem {
                let _ = writeln!(text, "    damaged: {problem}");
            }
            match &bundle.path {
                Some(path) if path.display().to_string() != bundle.name => {
                    let _ = writeln!(text, "    in {}", path.display());
                }
                Some(_) => {}
                None => text.push_str("    not here\n"),
            }
            match bundle.fits.as_slice() {
                [] => match bundle.target_references.first() {
                    Some(reference) => {
                        let _ = writeln!(text, "    its target is not here: draftsmith pull {reference}");
                    }
                    None => text.push_str("    its target is not here\n"),
                },
                fits => {
                    for fit in fits {
                        let _ = writeln!(text, "    fits {} ({})", fit.target, fit.by.words());
                    }
                }
            }
        }
        if self.bundles.is_empty() {
            text.push_str("  none\n");
        }
        text.push_str("targets\n");
        for target in &self.targets {
            let _ = writeln!(text, "  {}", target.name);
            let _ = writeln!(
                text,
                "    {}, {} layers of width {}, {} token ids",
                human(target.bytes),
                target.num_layers,
                target.hidden_size,
                target.vocab_size
            );
            if target.path.display().to_string() != target.name {
                let _ = writeln!(text, "    in {}", target.path.display());
            }
            if target.bundles.is_empty() {
                let _ = writeln!(text, "    no bundle here: draftsmith make {}", target.name);
            }
        }
        if self.targets.is_empty() {
            text.push_str("  none\n");
        }
        text
    }
}
