//! Packed weights of a model in one file, to be mapped in place of packing them again.
//!
//! ```text
//! "DSPACKED", zeros up to 4096
//! panels of weights, each from a multiple of 4096 on
//! JSON of Trailer
//! u64 start of the JSON, u64 its length, u32 CRC-32C of the JSON, "DSPACKED"      (little-endian)
//! ```
//!
//! Invariant: an opened [`PackedFile`] has the key that was asked for, and every byte of its weights has the checksum
//! that was taken when it was written. The check reads the file once, on several threads: that costs about one pass of
//! the model, which the first token would read anyway. So the file is never flushed to the device: what a power cut leaves
//! fails the check and is written anew.
//!
//! Written in large pieces, so that the system can keep and map it in large pages.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use crate::atomic::{AtomicError, AtomicFile};
use crate::mapped::Mapped;

const MAGIC: &[u8; 8] = b"DSPACKED";
/// Start of the first weight, and what all starts are multiples of.
const ALIGN: usize = 4096;
/// Bytes under one checksum, and written at once.
const PIECE: usize = 4 << 20;
/// Bytes behind the JSON.
const FOOT: usize = 8 + 8 + 4 + 8;

/// Whose weights a file holds, in what form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedKey {
    /// SHA-256 of the model.
    pub weights_sha256: String,
    /// Everything else that the bytes depend on: versions, precision, byte order.
    pub layout: String,
}

/// One weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedEntry {
    /// Which one it is inside the model.
    pub name: String,
    /// Name of its form.
    pub form: String,
    /// Bits of the f32 that belongs to it.
    pub largest_scale_bits: u32,
    /// Start in the file.
    pub at: usize,
    /// Bytes.
    pub len: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trailer {
    key: PackedKey,
    weights: Vec<PackedEntry>,
    /// CRC-32C of each piece of what stands in front of the JSON.
    crc32c: Vec<u32>,
}

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// There is none.
    #[error("`{}` does not exist", path.display())]
    Absent {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot open `{}`: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It belongs to another model, version or precision.
    #[error("`{}` holds packed weights of another model or version", path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
    },
    /// Its bytes are not those that were written.
    #[error("`{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The path.
        path: PathBuf,
        /// What does not hold.
        problem: &'static str,
    },
}

/// An opened and checked file.
#[derive(Debug)]
pub struct PackedFile {
    bytes: Mapped,
    weights: Vec<PackedEntry>,
}

impl PackedFile {
    /// Maps a file and checks all of it on `threads` threads.
    ///
    /// # Errors
    /// [`PackedError`].
    pub fn open(path: &Path, key: &PackedKey, threads: usize) -> Result<PackedFile, PackedError> {
        let bytes = Mapped::open(path).map_err(|e| match e.source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                PackedError::Absent { path: path.to_path_buf() }
            }
            _ => PackedError::Open { path: path.to_path_buf(), source: e.source },
        })?;
        let damaged = |problem| PackedError::Damaged { path: path.to_path_buf(), problem };
        let (trailer, data) = trailer(&bytes).map_err(damaged)?;
        if trailer.key != *key {
            return Err(PackedError::Foreign { path: path.to_path_buf() });
        }
        let mut end = ALIGN;
        for weight in &trailer.weights {
            let after = weight.at.checked_add(weight.len).filter(|after| *after <= data.len());
            match after {
                Some(after) if weight.at >= end && weight.at.is_multiple_of(ALIGN) => end = after,
                _ => return Err(damaged("weights do not follow each other")),
            }
        }
        if !is_whole(data, &trailer.crc32c, threads) {
            return Err(damaged("checksums differ"));
        }
        Ok(PackedFile { bytes, weights: trailer.weights })
    }

    /// The weight of a name.
    pub fn find(&self, name: &str) -> Option<&PackedEntry> {
        self.weights.iter().find(|w| w.name == name)
    }

    /// The weight that stands at a place, if it has this name: models are read in the order they were written in.
    pub fn at(&self, number: usize, name: &str) -> Option<&PackedEntry> {
        self.weights.get(number).filter(|w| w.name == name)
    }

    /// The weight that stands at a place.
    pub fn nth(&self, number: usize) -> Option<&PackedEntry> {
        self.weights.get(number)
    }

    /// How many weights it has.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// True without weights.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> &Mapped {
        &self.bytes
    }
}

/// The trailer, and what stands in front of it.
fn trailer(bytes: &[u8]) -> Result<(Trailer, &[u8]), &'static str> {
    let foot = bytes.len().checked_sub(FOOT).filter(|at| *at >= ALIGN).ok_or("it is cut off")?;
    if !bytes.starts_with(MAGIC) || !bytes.ends_with(MAGIC) {
        return Err("it does not begin and end as such a file does");
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let crc = u32::from_le_bytes(std::array::from_fn(|i| bytes[foot + 16 + i]));
    let (at, len) = (number(foot), number(foot + 8));
    if at < ALIGN as u64 || at.checked_add(len) != Some(foot as u64) {
        return Err("its directory is not where it should be");
    }
    let json = &bytes[at as usize..foot];
    if crc32c::crc32c(json) != crc {
        return Err("checksums differ");
    }
    let trailer = serde_json::from_slice(json).map_err(|_| "its directory cannot be read")?;
    Ok((trailer, &bytes[..at as usize]))
}

fn is_whole(data: &[u8], sums: &[u32], threads: usize) -> bool {
    if data.len().div_ceil(PIECE) != sums.len() {
        return false;
    }
    let (next, bad) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        while !bad.load(Ordering::Relaxed) {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            let Some(sum) = sums.get(piece) else { return };
            let bytes = &data[piece * PIECE..((piece + 1) * PIECE).min(data.len())];
            if crc32c::crc32c(bytes) != *sum {
                bad.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(sums.len()) {
            scope.spawn(work);
        }
        work();
    });
    !bad.into_inner()
}

/// Writes such a file weight by weight; dropped before [`PackedWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct PackedWriter {
    file: AtomicFile,
    /// What was not written yet, less than a piece.
    piece: Vec<u8>,
    /// Bytes so far, those in `piece` included.
    at: usize,
    trailer: Trailer,
}

impl std::fmt::Debug for Trailer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trailer").field("key", &self.key).field("weights", &self.weights.len()).finish()
    }
}

impl PackedWriter {
    /// Starts a file.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn create(path: &Path, key: PackedKey) -> Result<PackedWriter, AtomicError> {
        let file = AtomicFile::create(path)?;
        let trailer = Trailer { key, weights: Vec::new(), crc32c: Vec::new() };
        let mut writer = PackedWriter { file, piece: Vec::with_capacity(PIECE), at: 0, trailer };
        writer.put(MAGIC)?;
        Ok(writer)
    }

    /// True before the first weight.
    pub fn is_empty(&self) -> bool {
        self.trailer.weights.is_empty()
    }

    /// Adds a weight.
    ///
    /// # Errors
    /// A disk that is full or fails.
    pub fn add(
        &mut self,
        name: &str,
        form: &str,
        largest_scale_bits: u32,
        bytes: &[u8],
    ) -> Result<(), AtomicError> {
        self.put(&[0; ALIGN][..self.at.next_multiple_of(ALIGN) - self.at])?;
        let (name, form) = (name.to_owned(), form.to_owned());
        self.trailer.weights.push(PackedEntry {
            name,
            form,
            largest_scale_bits,
            at: self.at,
            len: bytes.len(),
        });
        self.put(bytes)
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), AtomicError> {
        self.at += bytes.len();
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.piece.len()));
            self.piece.extend_from_slice(now);
            bytes = later;
            if self.piece.len() == PIECE {
                self.write_piece()?;
            }
        }
        Ok(())
    }

    fn write_piece(&mut self) -> Result<(), AtomicError> {
        self.trailer.crc32c.push(crc32c::crc32c(&self.piece));
        self.file.write_all(&self.piece).map_err(|e| self.file.error(e))?;
        self.piece.clear();
        Ok(())
    }

    /// Gives the file its name, and says how many bytes it has.
    ///
    /// # Errors
    /// A disk that is full or fails.
    pub fn finish(mut self) -> Result<u64, AtomicError> {
        self.put(&[0; ALIGN][..self.at.next_multiple_of(ALIGN) - self.at])?;
        if !self.piece.is_empty() {
            self.write_piece()?;
        }
        let mut foot = serde_json::to_vec(&self.trailer).expect("names and numbers are JSON");
        let (len, crc) = (foot.len() as u64, crc32c::crc32c(&foot));
        foot.extend((self.at as u64).to_le_bytes());
        foot.extend(len.to_le_bytes());
        foot.extend(crc.to_le_bytes());
        foot.extend(MAGIC);
        self.file.write_all(&foot).map_err(|e| self.file.error(e))?;
        let bytes = (self.at + foot.len()) as u64;
        self.file.commit_unflushed()?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(model: &str) -> PackedKey {
        PackedKey { weights_sha256: model.to_owned(), layout: "1".to_owned() }
    }

    fn written(path: &Path) -> Vec<u8> {
        let mut writer = PackedWriter::create(path, key("a")).unwrap();
        writer.add("Q of layer 0", "Q4_K", 0, &[7; 5000]).unwrap();
        let long: Vec<u8> = (0..PIECE + 77).map(|i| (i % 251) as u8).collect();
        writer.add("head", "Q8_0", 1.5f32.to_bits(), &long).unwrap();
        writer.add("empty", "F32", 0, &[]).unwrap();
        writer.finish().unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn what_was_written_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.panels");
        written(&path);
        for threads in [1, 3] {
            let file = PackedFile::open(&path, &key("a"), threads).unwrap();
            let (q, head) = (file.find("Q of layer 0").unwrap(), file.at(1, "head").unwrap());
            assert_eq!(file.bytes()[q.at..q.at + q.len], [7; 5000]);
            assert_eq!((head.form.as_str(), f32::from_bits(head.largest_scale_bits)), ("Q8_0", 1.5));
            assert!((0..head.len).all(|i| file.bytes()[head.at + i] == (i % 251) as u8));
            assert_eq!((file.len(), file.find("v")), (3, None));
        }
        assert!(matches!(PackedFile::open(&path, &key("b"), 1), Err(PackedError::Foreign { .. })));
        let absent = PackedFile::open(&dir.path().join("b"), &key("a"), 1);
        assert!(matches!(absent, Err(PackedError::Absent { .. })));
    }

    #[test]
    fn no_changed_byte_goes_unnoticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.panels");
        let whole = written(&path);
        #[track_caller]
        fn check(path: &Path, bytes: &[u8]) {
            std::fs::write(path, bytes).unwrap();
            let opened = PackedFile::open(path, &key("a"), 2);
            assert!(matches!(opened, Err(PackedError::Damaged { .. })), "{opened:?}");
        }
        let len = whole.len();
        for at in [0, 9, 4095, 4096, 9000, 9100, PIECE - 1, PIECE, len - 300, len - 28, len - 12, len - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            check(&path, &bytes);
        }
        for cut in [0, 1, 4096, PIECE, len - 1] {
            check(&path, &whole[..cut]);
        }
        let mut longer = whole.clone();
        longer.push(0);
        check(&path, &longer);
    }

    #[test]
    fn a_writer_that_goes_away_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.panels");
        let mut writer = PackedWriter::create(&path, key("a")).unwrap();
        writer.add("Q", "Q4_K", 0, &[1; 100]).unwrap();
        assert!(crate::atomic::is_being_written(&path));
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(!crate::atomic::is_being_written(&path));
    }
}
