//! What can go wrong while a bundle is made or opened. What a check finds is no error but a
//! [`Problem`](crate::Problem).

use std::path::PathBuf;

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::mapped::OpenError;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_model::eagle3::Eagle3ConfigError;

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
        source: Eagle3ConfigError,
    },
    /// The checkpoint's weights do not make a draft.
    #[error("checkpoint `{}` cannot be bundled: {problem}{}", path.display(), more_text(*more))]
    Checkpoint {
        /// The folder.
        path: PathBuf,
        /// The first problem.
        problem: Box<Problem>,
        /// How many others there are.
        more: usize,
    },
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

fn more_text(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more)") }
}

impl BundleError {
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
            BundleError::Checkpoint { problem, .. } => problem.hint(),
            BundleError::MissingField { field } => {
                Some(format!("set `{field}` in the `[bundle]` table of the run file"))
            }
            BundleError::Exists { .. } => Some("choose another folder, or remove this one".into()),
            BundleError::Weights(e) => e.hint(),
            BundleError::Io(e) => e.hint(),
            BundleError::Manifest { .. }
            | BundleError::Open(_)
            | BundleError::Probe { .. }
            | BundleError::Json { .. } => None,
        }
    }
}
