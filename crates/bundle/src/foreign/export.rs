//! A bundle in the layout of another engine.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::{self, AtomicDir};
use draftsmith_formats::mxint8;
use draftsmith_model::{DraftConfig, Published};

use super::parallel::Parallel;
use super::{Layout, TargetFacts, eagle3, launch, lint, parallel};
use crate::engines::Launch;
use crate::layout::{WeightTypes, read_config, vocab_map, weight_problems};
use crate::make::Existing;
use crate::manifest::{CONFIG_FILE, Manifest, WEIGHTS_FILE};
use crate::problem::layer_problem;
use crate::{BundleError, Problem, card};

/// Files that go along as they are, where the bundle has them.
const COMPANIONS: [&str; 3] = ["LICENSE", "NOTICE", "RESULTS.md"];

/// What to export and where to.
pub struct ExportInput<'a> {
    /// The bundle.
    pub bundle: &'a Path,
    /// In which layout.
    pub layout: Layout,
    /// Folder to be made.
    pub out: &'a Path,
    /// What to do if it exists.
    pub existing: Existing,
    /// The target, which [`Layout::Gguf`] takes its tokenizer from.
    pub target: Option<TargetFacts<'a>>,
}

/// An export that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// Its folder.
    pub path: PathBuf,
    /// Files in it with their sizes.
    pub files: Vec<(String, u64)>,
    /// What an engine may stumble over.
    pub warnings: Vec<Problem>,
    /// How the engines that read this layout are started.
    pub launch: Vec<Launch>,
}

/// Writes a bundle's draft in the layout of another engine, in one atomic step.
///
/// # Errors
/// [`BundleError::Draft`] names what the bundle lacks or what the engine cannot serve; [`BundleError::Exists`];
/// [`BundleError::NoTokenizer`] for a GGUF file without a target to take the tokenizer from.
pub fn export(input: &ExportInput<'_>) -> Result<Exported, BundleError> {
    export_as(input, &|_, _, _| Ok(()))
}

/// Puts the files of a layout into the words of a kindred one.
pub(super) type Dress<'a> =
    dyn Fn(&Manifest, &DraftConfig, &mut BTreeMap<String, Vec<u8>>) -> Result<(), BundleError> + 'a;

/// [`export`], with a last word on the files.
pub(super) fn export_as(input: &ExportInput<'_>, dress: &Dress<'_>) -> Result<Exported, BundleError> {
    let manifest = Manifest::read(input.bundle)?;
    if input.existing == Existing::Refuse && input.out.exists() {
        return Err(BundleError::Exists { path: input.out.to_owned() });
    }
    let refused = |problems: Vec<Problem>| BundleError::draft(input.bundle, "exported", problems);
    let (_, mut config) =
        read_config(&input.bundle.join(CONFIG_FILE)).map_err(|problem| refused(vec![problem]))?;
    let layers = config.layers(manifest.target.num_layers as u32);
    let bad = |source| BundleError::Config { path: input.bundle.join(CONFIG_FILE), source };
    config.set_target_layers(&layers).map_err(bad)?;
    let weights = mxint8::open(input.bundle.join(WEIGHTS_FILE))?;
    let mut problems = weight_problems(&config, &weights, WeightTypes::Bundle);
    if let Some(Err(problem)) = vocab_map(&*config, &weights) {
        problems.push(problem);
    }
    problems.extend(layer_problem(&config, manifest.target.num_layers as u32));
    // A target at hand may be another than the one that the bundle was made for.
    let at_hand = input.target.as_ref().map(|target| target.config.num_layers as u32);
    problems.extend(at_hand.and_then(|num_layers| layer_problem(&config, num_layers)));
    problems.dedup();
    let (fatal, warnings): (Vec<_>, Vec<_>) = lint(&config, input.layout, &manifest, input.target.as_ref())
        .into_iter()
        .partition(Problem::is_fatal);
    problems.extend(fatal);
    if !problems.is_empty() {
        return Err(refused(problems));
    }

    let parallel = |draft: &Parallel<'_>| {
        parallel::files(draft, input.layout, &manifest, &weights, input.target.as_ref())
    };
    let mut files = match config.published() {
        Published::Nowhere => {
            Err(BundleError::NoLayout { method: config.name(), layout: input.layout.name() })
        }
        Published::Eagle3(config) => {
            eagle3::files(config, input.layout, &manifest, &weights, input.target.as_ref())
        }
        Published::Block(block) => parallel(&Parallel::Block(Cow::Borrowed(block))),
        Published::PEagle(config) => parallel(&Parallel::PEagle(Cow::Borrowed(config))),
    }
    .map_err(|error| match error {
        BundleError::Config { path, source } => BundleError::Config { path: input.bundle.join(path), source },
        other => other,
    })?;
    for name in COMPANIONS {
        let path = input.bundle.join(name);
        if path.is_file() {
            files.insert(name.into(), atomic::read(&path)?);
        }
    }
    files.insert("README.md".into(), card::export_readme(&manifest, &config, input.layout).into());
    dress(&manifest, &config, &mut files)?;

    let dir = AtomicDir::create(input.out)?;
    for (path, bytes) in &files {
        dir.write(path, bytes)?;
    }
    match input.existing {
        Existing::Refuse => dir.commit()?,
        Existing::Replace => dir.commit_replacing()?,
    }
    Ok(Exported {
        path: input.out.to_owned(),
        files: files.into_iter().map(|(path, bytes)| (path, bytes.len() as u64)).collect(),
        warnings,
        launch: launch(&config, &manifest, input.layout, &input.out.display().to_string()),
    })
}
