//! What every kind of source is handed, and what it answers with.

use std::path::{Path, PathBuf};

use draftsmith_core::report::{Report, Stop};
use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::gguf;
use draftsmith_formats::hash_records::HashRecords;

use crate::error::PullError;
use crate::places::Places;
use crate::reference::Reference;

/// What is handed down to each kind of source.
pub(crate) struct Context<'a> {
    pub(crate) places: &'a Places,
    pub(crate) report: &'a dyn Report,
    pub(crate) stop: &'a Stop,
}

/// What `pull` found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Pulled {
    /// The file, or the folder of a whole repository.
    pub path: PathBuf,
    /// The reference that answered.
    pub reference: String,
    /// Hash of the file, of a split GGUF the one over all parts ([`gguf::content_sha256`]); `None` for a folder.
    pub sha256: Option<String>,
    /// Size of the file, of all parts, or of the files of the folder.
    pub bytes: u64,
    /// True if nothing had to be fetched.
    pub cached: bool,
}

/// The answer for one file, or for a split that it is a part of: the first part stands for all.
pub(crate) fn model(
    reference: &Reference,
    path: &Path,
    sha256: Option<&str>,
    cached: bool,
    records: &HashRecords,
) -> Result<Pulled, PullError> {
    let parts = match path.extension().is_some_and(|e| e == "gguf") {
        true => gguf::parts_of(path)?,
        false => vec![path.to_path_buf()],
    };
    let found = match parts.as_slice() {
        [one] => records.sha256_file(one)?,
        _ => gguf::content_sha256_with(path, &|part| records.sha256_file(part))?,
    };
    check_hash(reference, &found, sha256)?;
    let mut bytes = 0;
    for part in &parts {
        bytes += std::fs::metadata(part).map_err(|e| AtomicError::from_io("read", part, e))?.len();
    }
    let path = parts.into_iter().next().unwrap_or_else(|| path.to_path_buf());
    Ok(Pulled { path, reference: reference.to_string(), sha256: Some(found), bytes, cached })
}

/// The answer for a whole folder.
pub(crate) fn folder(reference: &Reference, path: PathBuf, cached: bool) -> Pulled {
    let bytes = std::fs::read_dir(&path)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum();
    Pulled { path, reference: reference.to_string(), sha256: None, bytes, cached }
}

pub(crate) fn check_hash(reference: &Reference, found: &str, wanted: Option<&str>) -> Result<(), PullError> {
    match wanted {
        Some(wanted) if !wanted.eq_ignore_ascii_case(found) => Err(PullError::WrongHash {
            reference: reference.to_string(),
            found: found.to_string(),
            wanted: wanted.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Opens the file that what comes is written to, beside what came before, and waits until no other process has it.
pub(crate) fn open_partial(path: &Path) -> std::io::Result<std::fs::File> {
    let file = std::fs::OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
    file.lock()?;
    Ok(file)
}
