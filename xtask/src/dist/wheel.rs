//! A wheel: the program as a script, the draft that ships as data, the Python module that drives the program.
//!
//! Made here and not by a build backend, for it packs the program that the tests ran, and says of it what its own bytes say.

use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use draftsmith::formats::atomic;
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::elf;
use super::parts::{Entry, Parts};

/// The oldest Python that the module is written for.
const PYTHON_MIN: &str = "3.9";

/// Writes the wheel and returns its name.
pub(crate) fn write(parts: &Parts, out: &Path) -> Result<String> {
    let tag = format!("py3-none-{}", elf::platform(&parts.needs)?);
    let name = format!("draftsmith-{}-{tag}.whl", parts.version);
    let mut entries = contents(parts, &tag)?;
    let info = format!("draftsmith-{}.dist-info", parts.version);
    entries.sort_by(|a, b| (a.name.starts_with(&info), &a.name).cmp(&(b.name.starts_with(&info), &b.name)));
    let record = format!("{info}/RECORD");
    let lines: Vec<String> = entries
        .iter()
        .map(|e| {
            format!("{},sha256={},{}\n", e.name, base64(Sha256::digest(&e.bytes).as_slice()), e.bytes.len())
        })
        .collect();
    entries.push(Entry::file(&record, format!("{}{record},,\n", lines.concat())));
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for entry in &entries {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .last_modified_time(DateTime::default())
            .unix_permissions(if entry.executable { 0o755 } else { 0o644 });
        zip.start_file(&entry.name, options)?;
        zip.write_all(&entry.bytes)?;
    }
    atomic::write(out.join(&name), zip.finish()?.get_ref())?;
    Ok(name)
}

fn contents(parts: &Parts, tag: &str) -> Result<Vec<Entry>> {
    let version = &parts.version;
    let module = parts.tree.read("python/draftsmith/_version.py")?;
    if !module.contains(&format!("__version__ = \"{version}\"\n")) {
        bail!("python/draftsmith/_version.py: not the version {version} of the program");
    }
    let under = |folder: &str, entries: Vec<Entry>| {
        entries
            .into_iter()
            .map(move |e| Entry { name: format!("{folder}/{}", e.name), ..e })
            .collect::<Vec<_>>()
    };
    let data = format!("draftsmith-{version}.data");
    let info = format!("draftsmith-{version}.dist-info");
    let mut entries = under("draftsmith", parts.below("python/draftsmith")?);
    entries.push(Entry {
        name: format!("{data}/scripts/draftsmith"),
        bytes: parts.program.clone(),
        executable: true,
    });
    // `share` beside `bin`: where the program looks for what ships with it.
    for folder in ["bundles", "recipes"] {
        entries.extend(under(&format!("{data}/data/share/draftsmith/{folder}"), parts.below(folder)?));
    }
    entries.extend(under(&format!("{info}/licenses"), parts.licences()?));
    entries.push(Entry::file(format!("{info}/sboms/draftsmith.cdx.json"), parts.sbom.clone()));
    entries.push(Entry::file(format!("{info}/METADATA"), metadata(parts)?));
    entries.push(Entry::file(
        format!("{info}/WHEEL"),
        format!("Wheel-Version: 1.0\nGenerator: draftsmith-xtask\nRoot-Is-Purelib: false\nTag: {tag}\n"),
    ));
    Ok(entries)
}

fn metadata(parts: &Parts) -> Result<String> {
    let manifest = parts.tree.read("crates/draftsmith/Cargo.toml")?;
    let manifest: toml::Table = manifest.parse()?;
    let summary = manifest["package"]["description"].as_str().context("`description` of the program")?;
    let mut text = format!(
        "Metadata-Version: 2.4\nName: draftsmith\nVersion: {}\nSummary: {summary}\n\
         Keywords: speculative-decoding,llm,inference,draft-model,eagle\n\
         License-Expression: MIT OR Apache-2.0\n",
        parts.version
    );
    for licence in parts.licences()? {
        text.push_str(&format!("License-File: {}\n", licence.name));
    }
    text.push_str(&format!(
        "Requires-Python: >={PYTHON_MIN}\n\
         Classifier: Operating System :: POSIX :: Linux\n\
         Classifier: Programming Language :: Rust\n\
         Classifier: Programming Language :: Python :: 3\n\
         Classifier: Topic :: Scientific/Engineering :: Artificial Intelligence\n\
         Classifier: Typing :: Typed\n\
         Description-Content-Type: text/markdown\n\n{}",
        parts.tree.read("README.md")?
    ));
    Ok(text)
}

/// Base64 for URLs, without padding, as RECORD wants hashes.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let three = [0, 1, 2].map(|i| u32::from(chunk.get(i).copied().unwrap_or(0)));
        let bits = three[0] << 16 | three[1] << 8 | three[2];
        for i in 0..=chunk.len() {
            text.push(char::from(LETTERS[(bits >> (18 - 6 * i) & 63) as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_python() {
        // `base64.urlsafe_b64encode(…).rstrip(b"=")`
        for (bytes, expected) in
            [(&b""[..], ""), (b"f", "Zg"), (b"fo", "Zm8"), (b"foo", "Zm9v"), (b"\xfb\xff\xfe?", "-__-Pw")]
        {
            assert_eq!(base64(bytes), expected);
        }
    }
}
