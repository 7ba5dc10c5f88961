//! `draftsmith-VERSION-MACHINE-linux.tar.gz`: `bin` and `share`, to be unpacked anywhere.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use draftsmith::formats::atomic;
use flate2::Compression;
use flate2::write::GzEncoder;

use super::parts::{Entry, Parts};

const BLOCK: usize = 512;

/// Writes the archive and returns its name.
pub(crate) fn write(parts: &Parts, out: &Path) -> Result<String> {
    let root = format!("draftsmith-{}-{}-linux", parts.version, parts.needs.machine);
    let mut entries =
        vec![Entry { name: "bin/draftsmith".to_string(), bytes: parts.program.clone(), executable: true }];
    for (from, to) in [
        ("bundles", "share/draftsmith/bundles"),
        ("recipes", "share/draftsmith/recipes"),
        ("contrib", "share/draftsmith/contrib"),
        ("docs", "share/doc/draftsmith"),
    ] {
        entries
            .extend(parts.below(from)?.into_iter().map(|e| Entry { name: format!("{to}/{}", e.name), ..e }));
    }
    for entry in parts.licences()? {
        entries.push(Entry { name: format!("share/doc/draftsmith/{}", entry.name), ..entry });
    }
    entries.push(Entry::file("share/doc/draftsmith/draftsmith.cdx.json", parts.sbom.clone()));
    entries.push(Entry::file("README.md", parts.tree.read("README.md")?));
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    for entry in entries {
        let entry = Entry { name: format!("{root}/{}", entry.name), ..entry };
        gzip.write_all(&header(&entry)?)?;
        gzip.write_all(&entry.bytes)?;
        gzip.write_all(&vec![0; entry.bytes.len().next_multiple_of(BLOCK) - entry.bytes.len()])?;
    }
    gzip.write_all(&[0; 2 * BLOCK])?;
    let name = format!("{root}.tar.gz");
    atomic::write(out.join(&name), &gzip.finish()?)?;
    Ok(name)
}

/// The header of a file in the format `ustar`.
fn header(entry: &Entry) -> Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    // A longer name stands in two fields, parted at a slash.
    let (prefix, name) = match entry.name.len() {
        0..=100 => ("", entry.name.as_str()),
        _ => {
            let parts =
                entry.name.match_indices('/').map(|(at, _)| (&entry.name[..at], &entry.name[at + 1..]));
            let mut fits = parts.filter(|(prefix, name)| prefix.len() <= 155 && name.len() <= 100);
            fits.next().with_context(|| format!("`{}` is too long for an archive", entry.name))?
        }
    };
    if entry.bytes.len() >= 1 << 33 {
        bail!("`{}` is too large for an archive", entry.name);
    }
    let mode = if entry.executable { 0o755 } else { 0o644 };
    let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}\0{:07o}\0{:07o}\0", 0, 0).as_bytes());
    put(124, format!("{:011o}\0{:011o}\0", entry.bytes.len(), 0).as_bytes());
    // The sum is taken over blanks in its own place.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(265, b"root");
    put(297, b"root");
    put(345, prefix.as_bytes());
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_name_mode_size_and_sum_where_tar_looks_for_them() {
        let entry = Entry { name: "a/b".to_string(), bytes: vec![7; 10], executable: true };
        let block = header(&entry).unwrap();
        assert_eq!(&block[..4], b"a/b\0");
        assert_eq!(&block[100..108], b"0000755\0");
        assert_eq!(&block[124..136], b"00000000012\0");
        // Python's `tarfile.calc_chksums` of this header.
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) })
            .sum();
        assert_eq!(&block[148..156], format!("{sum:06o}\0 ").as_bytes());
    }

    #[test]
    fn long_names_are_parted_at_a_slash() {
        let name = format!("{}/{}", "p".repeat(90), "n".repeat(90));
        let block = header(&Entry::file(name, "")).unwrap();
        assert_eq!((block[89], block[90]), (b'n', 0));
        assert_eq!((block[345], block[345 + 89], block[345 + 90]), (b'p', b'p', 0));
        assert!(header(&Entry::file("n".repeat(101), "")).is_err());
    }
}
