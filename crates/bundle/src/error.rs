//! What can go wrong while a bundle is made or opened. What a check finds is no error but a
//! [`Problem`](crate::Problem).

use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::gguf::{ContentError, GgufError};
use draftsmith_formats::mapped::OpenError;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_model::DraftConfigError;

use crate::Problem;

/// An error of another layer, passed through with its own message.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why a bundle could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A folder without `bundle.json`.
    #[error("`{}` is no bundle: it has no `bundle.json`", path.display())]
    NoManifest {
        /// The folder.
        path: PathBuf,
    },
    /// `bundle.json` is not one.
    #[error("`{}`: {problem}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A bundle of a later version.
    #[error("`{}` has bundle version {found}, but this program reads up to {supported}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version in the file.
        found: u64,
        /// Newest version known here.
        supported: u32,
    },
    /// The draft's configuration is not one.
    #[error("`{}`: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: DraftConfigError,
    },
    /// A draft that is not what its configuration says, or that has no place where it should go.
    #[error("draft `{}` cannot be {action}: {problem}{}", path.display(), more_text(*more))]
    Draft {
        /// File or folder.
        path: PathBuf,
        /// `bundled`, `exported`, `imported`.
        action: &'static str,
        /// The first problem.
        problem: Box<Problem>,
        /// How many others there are.
        more: usize,
    },
    /// Captured layers that were given for a draft that reads another number of them.
    #[error("`--layers` has {found} numbers, expected {wanted}")]
    LayerCount {
        /// How many were given.
        found: usize,
        /// How many the draft reads.
        wanted: usize,
    },
    /// A kind of draft that has no place in a layout yet.
    #[error("a draft of the kind `{method}` has no place in the layout `{layout}`")]
    NoLayout {
        /// The kind.
        method: &'static str,
        /// The layout.
        layout: &'static str,
    },
    /// A path without a draft in any layout that is known.
    #[error("`{}` is no draft: neither a folder with `config.json` and safetensors, nor one GGUF file", path.display())]
    NoDraft {
        /// The path.
        path: PathBuf,
    },
    /// A GGUF file is to be written, and nothing to take its tokenizer from.
    #[error("a GGUF draft carries the target's tokenizer, and no target was given")]
    NoTokenizer,
    /// A field that a bundle must not be without.
    #[error("a bundle needs `{field}`, but it is empty")]
    MissingField {
        /// Which.
        field: &'static str,
    },
    /// The bundle's folder is taken.
    #[error("`{}` exists already", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// A GGUF file could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Weights could not be read.
    #[error(transparent)]
    Weights(#[from] SafetensorsError),
    /// A file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file could not be read or written.
    #[error(transparent)]
    Io(#[from] AtomicError),
    /// The draft network failed on a probe.
    #[error("the draft network failed on probe {index}: {source}")]
    Probe {
        /// 0-based probe.
        index: usize,
        /// What it said.
        source: BoxError,
    },
    /// A manifest could not be turned into JSON.
    #[error("the manifest cannot be written as JSON: {source}")]
    Json {
        /// What the serialiser said.
        source: serde_json::Error,
    },
}

impl From<ContentError> for BundleError {
    fn from(error: ContentError) -> BundleError {
        match error {
            ContentError::Gguf(error) => error.into(),
            ContentError::Read(error) => error.into(),
        }
    }
}

fn more_text(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more)") }
}

impl BundleError {
    /// The first of some problems, with the count of the others.
    ///
    /// # Panics
    /// Without a problem.
    pub(crate) fn draft(path: &Path, action: &'static str, mut problems: Vec<Problem>) -> BundleError {
        let problem = Box::new(problems.remove(0));
        BundleError::Draft { path: path.to_owned(), action, problem, more: problems.len() }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            BundleError::NoManifest { .. } => Some(
                "give the folder that `bundle` wrote: it holds `bundle.json` beside `model.safetensors`"
                    .into(),
            ),
            BundleError::Version { .. } => {
                Some("use the draftsmith version that wrote it, or a later one".into())
            }
            BundleError::Config { source, .. } => source.hint(),
            BundleError::Draft { problem, .. } => problem.hint(),
            BundleError::NoDraft { .. } => Some(
                "drafts are read in the layouts of SpecForge, vLLM, speculators and llama.cpp; pickled weights \
                 (`.bin`, `.pt`) must be converted to safetensors first"
                    .into(),
            ),
            BundleError::LayerCount { .. } => {
                Some("give the layers low, mid, high, counted from 0: `--layers 1,14,26`".into())
            }
            BundleError::NoLayout { .. } => {
                Some("use the bundle's own folder: its weights and `config.json` carry the published names".into())
            }
            BundleError::NoTokenizer => Some("name the target with `--target`".into()),
            BundleError::Gguf(e) => e.hint(),
            BundleError::MissingField { field } => {
                Some(format!("set `{field}` in the `[bundle]` table of the run file"))
            }
            BundleError::Exists { .. } => {
                Some("add `--replace` to put the new one in its place, or name another folder with `--out`".into())
            }
            BundleError::Weights(e) => e.hint(),
            BundleError::Io(e) => e.hint(),
            BundleError::Manifest { .. } => {
                Some("the file was changed or damaged: make the bundle or export anew".into())
            }
            BundleError::Open(_) => Some("check the path and whether the file may be read".into()),
            BundleError::Probe { .. } => {
                Some("the draft does not run beside this target: name the one that it was trained for".into())
            }
            BundleError::Json { .. } => None,
        }
    }
}
