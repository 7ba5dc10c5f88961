//! One model in several files, as `llama-gguf-split` and the `gguf` package write them.
//!
//! Parts are named `PREFIX-00001-of-0000N.gguf`. Each has `split.no` (from 0), `split.count` and
//! `split.tensors.count` (of all parts together) and a directory of its own tensors; everything else of the metadata
//! stands in the first. Invariant: a split that was opened has every part once and in order, no tensor twice, and as
//! many tensors as it says.
//!
//! The content hash of a split is the SHA-256 over the hashes of its parts in order, each with its length in front
//! ([`Hasher::field`]): names do not count, so renamed parts are the same model.

use std::path::{Path, PathBuf};

use super::{Backing, GgufError, GgufFile, read};
use crate::atomic::AtomicError;
use crate::hash::{Hasher, sha256_file};
use crate::mapped::Mapped;

const COUNT: &str = "split.count";
const NO: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// `split.count` is 16 bits wide.
const PARTS_MAX: i64 = u16::MAX as i64;

/// A file name `PREFIX-00001-of-0000N.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitName {
    prefix: String,
    /// Which part, from 1.
    pub no: u32,
    /// Of how many, at least 1.
    pub count: u32,
}

impl SplitName {
    /// Reads a file name, or a path whose last part is one.
    pub fn parse(name: &str) -> Option<SplitName> {
        let digits = |text: &str| -> Option<u32> {
            let plain = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            if plain { text.parse().ok() } else { None }
        };
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let (no, count) = (digits(no)?, digits(count)?);
        (1..=count).contains(&no).then(|| SplitName { prefix: prefix.to_owned(), no, count })
    }

    /// The name of part `no`, from 1.
    pub fn part(&self, no: u32) -> String {
        format!("{}-{no:05}-of-{:05}.gguf", self.prefix, self.count)
    }

    /// The names of all parts in order.
    pub fn parts(&self) -> impl Iterator<Item = String> + '_ {
        (1..=self.count).map(|no| self.part(no))
    }

    /// The name without number and ending.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}

/// A split name and the folder it lies in.
fn split_name(path: &Path) -> Option<(SplitName, PathBuf)> {
    let name = SplitName::parse(path.file_name()?.to_str()?)?;
    Some((name, path.parent().unwrap_or(Path::new("")).to_path_buf()))
}

/// What a file says about the split that it is a part of.
#[derive(Clone, Copy)]
struct Said {
    /// From 0.
    no: u32,
    count: u32,
    tensors: Option<u64>,
}

/// `None` for a file that is whole: without the keys, or (as merging leaves them) with a count of 0 or 1.
fn said(parsed: &read::Parsed) -> Result<Option<Said>, GgufError> {
    let get = |key: &str| parsed.keys.get(key).map(|i| &parsed.metadata[*i].1);
    let number = |key: &'static str, max: i64| match get(key) {
        None => Ok(None),
        Some(value) => match value.to_i64().filter(|n| (0..=max).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(GgufError::Split {
                problem: format!("metadata key `{key}` is no number from 0 to {max}"),
            }),
        },
    };
    let Some(count) = number(COUNT, PARTS_MAX)?.filter(|count| *count > 1) else { return Ok(None) };
    let no = number(NO, count - 1)?
        .ok_or_else(|| GgufError::Split { problem: format!("metadata key `{NO}` is missing") })?;
    let tensors = number(TENSORS, i64::MAX)?.map(|n| n as u64);
    Ok(Some(Said { no: no as u32, count: count as u32, tensors }))
}

/// All files of the model that `path` is, or is a part of, in order.
///
/// # Errors
/// A file that is no GGUF file; [`GgufError::PartMissing`].
pub fn parts_of(path: &Path) -> Result<Vec<PathBuf>, GgufError> {
    let whole = vec![path.to_path_buf()];
    let Some((name, folder)) = split_name(path).filter(|(name, _)| name.count > 1) else { return Ok(whole) };
    let mapped = Mapped::open(path)?;
    let parsed = read::parse(mapped.bytes()).map_err(|e| e.in_file(path))?;
    if said(&parsed).map_err(|e| e.in_file(path))?.is_none() {
        return Ok(whole);
    }
    let parts: Vec<PathBuf> = name.parts().map(|part| folder.join(part)).collect();
    match parts.iter().find(|part| !part.is_file()) {
        Some(missing) => Err(missing_part(missing, &name, &parts)),
        None => Ok(parts),
    }
}

fn missing_part(missing: &Path, name: &SplitName, parts: &[PathBuf]) -> GgufError {
    let no = parts.iter().position(|part| part == missing).map_or(0, |i| i as u32 + 1);
    GgufError::PartMissing { path: missing.to_path_buf(), no, count: name.count }
}

/// The only model in GGUF form of a folder: one file, or the first part of one split. `None` if there is none or more
/// than one.
///
/// # Errors
/// A folder that cannot be listed.
pub fn only_model(folder: &Path) -> std::io::Result<Option<PathBuf>> {
    let mut models: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "gguf") || !path.is_file() {
            continue;
        }
        // Every part stands for the first.
        let model = match split_name(&path) {
            Some((name, folder)) => folder.join(name.part(1)),
            None => path,
        };
        if !models.contains(&model) {
            models.push(model);
        }
    }
    let only = if models.len() == 1 { models.pop() } else { None };
    // Without its first part a split begins with what is there; opening it says what is missing.
    Ok(match only {
        Some(first) if !first.is_file() => {
            let mut parts: Vec<PathBuf> = std::fs::read_dir(folder)?
                .flatten()
                .map(|e| e.path())
                .filter(|p| split_name(p).is_some())
                .collect();
            parts.sort();
            parts.into_iter().next()
        }
        other => other,
    })
}

/// SHA-256 of a model in GGUF form: of the file, or over the hashes of all parts of a split.
///
/// # Errors
/// As [`parts_of`], or a part that cannot be read.
pub fn content_sha256(path: &Path) -> Result<String, ContentError> {
    content_sha256_with(path, &|part| sha256_file(part))
}

/// [`content_sha256`] from hashes of files that `sha256_of` knows.
///
/// # Errors
/// As [`parts_of`] and `sha256_of`.
pub fn content_sha256_with(
    path: &Path,
    sha256_of: &dyn Fn(&Path) -> Result<String, AtomicError>,
) -> Result<String, ContentError> {
    let parts = parts_of(path)?;
    if let [one] = parts.as_slice() {
        return Ok(sha256_of(one)?);
    }
    let hashes: Result<Vec<String>, AtomicError> = parts.iter().map(|part| sha256_of(part)).collect();
    Ok(joined_sha256(&hashes?))
}

/// The content hash of a split from the hashes of its parts in order.
pub fn joined_sha256(parts: &[String]) -> String {
    let mut hasher = Hasher::default();
    for part in parts {
        hasher.field(part.as_bytes());
    }
    hasher.finish()
}

/// Why a model has no content hash.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A part is missing or no GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A file that cannot be read.
    #[error(transparent)]
    Read(#[from] AtomicError),
}

/// A split with its files, put together behind its first part.
pub(super) fn open(path: &Path) -> Result<GgufFile<'static>, GgufError> {
    let mapped = Mapped::open(path)?;
    let parsed = read::parse(mapped.bytes()).map_err(|e| e.in_file(path))?;
    let Some(own) = said(&parsed).map_err(|e| e.in_file(path))? else {
        return Ok(GgufFile::assemble(parsed, Backing::Mapped(mapped), Some(path.to_path_buf())));
    };
    let split = |problem: String| GgufError::Split { problem }.in_file(path);
    let (this, of) = (own.no + 1, own.count);
    let (name, folder) = split_name(path).filter(|(name, _)| name.count > 1).ok_or_else(|| {
        split(format!("it is part {this} of {of}, but its name does not end in `-{this:05}-of-{of:05}.gguf`"))
    })?;
    if (name.no, name.count) != (this, of) {
        return Err(split(format!(
            "it is part {this} of {of} by its own words, but part {} of {} by its name",
            name.no, name.count
        )));
    }
    let paths: Vec<PathBuf> = name.parts().map(|part| folder.join(part)).collect();
    if let Some(missing) = paths.iter().find(|part| !part.is_file()) {
        return Err(missing_part(missing, &name, &paths));
    }
    let mut parts = Vec::new();
    for path in &paths {
        let mapped = Mapped::open(path)?;
        let parsed = read::parse(mapped.bytes()).map_err(|e| e.in_file(path))?;
        parts.push((Some(path.clone()), parsed, Backing::Mapped(mapped)));
    }
    joined(parts)
}

/// Like opening a split, for parts whose bytes somebody else holds.
pub(super) fn parse<'a>(parts: &[&'a [u8]]) -> Result<GgufFile<'a>, GgufError> {
    let parts: Result<Vec<_>, GgufError> =
        parts.iter().map(|bytes| Ok((None, read::parse(bytes)?, Backing::Borrowed(bytes)))).collect();
    joined(parts?)
}

type Part<'a> = (Option<PathBuf>, read::Parsed, Backing<'a>);

fn joined(parts: Vec<Part<'_>>) -> Result<GgufFile<'_>, GgufError> {
    let count = parts.len() as u32;
    let mut out: Option<GgufFile<'_>> = None;
    let mut promised = None;
    for (i, (path, parsed, backing)) in parts.into_iter().enumerate() {
        let at = |error: GgufError| match &path {
            Some(path) => error.in_file(path),
            None => error,
        };
        let split = |problem: String| at(GgufError::Split { problem });
        let number = i as u32 + 1;
        let found = said(&parsed).map_err(at)?;
        match found {
            Some(said) if (said.no + 1, said.count) == (number, count) => {}
            Some(said) => {
                return Err(split(format!(
                    "it is part {} of {} by its own words, but part {number} of {count} by its name",
                    said.no + 1,
                    said.count
                )));
            }
            None => {
                return Err(split(format!(
                    "it stands for part {number} of {count}, but is no part of a split"
                )));
            }
        }
        let tensors = found.and_then(|said| said.tensors);
        match (promised, tensors) {
            (None, _) => promised = tensors,
            (Some(before), Some(now)) if before != now => {
                return Err(split(format!(
                    "it is of a split with {now} tensors, the parts before it of one with {before}"
                )));
            }
            _ => {}
        }
        match &mut out {
            None => out = Some(GgufFile::assemble(parsed, backing, path)),
            Some(file) => {
                if let Some(twice) = parsed.tensors.iter().find(|t| file.names.contains_key(&t.name)) {
                    return Err(split(format!("tensor `{}` is in an earlier part, too", twice.name)));
                }
                for mut tensor in parsed.tensors {
                    tensor.part = i;
                    file.names.insert(tensor.name.clone(), file.tensors.len());
                    file.tensors.push(tensor);
                }
                file.parts.push((path, backing));
            }
        }
    }
    let file = out.ok_or_else(|| GgufError::Split { problem: "it has no parts".into() })?;
    match promised {
        Some(promised) if promised != file.tensors.len() as u64 => Err(file.fail(GgufError::Split {
            problem: format!(
                "metadata key `{TENSORS}` says {promised}, but all parts together have {}",
                file.tensors.len()
            ),
        })),
        _ => Ok(file),
    }
}
