//! SHA-256 in the one spelling used everywhere: 64 lower-case hex digits.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::atomic::AtomicError;

/// The hash of some bytes.
///
/// ```
/// let empty = draftsmith_formats::hash::sha256_hex(b"");
/// assert_eq!(empty, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
/// ```
pub fn sha256_hex(bytes: impl AsRef<[u8]>) -> String {
    let mut hasher = Hasher::default();
    hasher.update(bytes.as_ref());
    hasher.finish()
}

/// The hash of a file's bytes, read in pieces.
pub fn sha256_file(path: impl AsRef<Path>) -> Result<String, AtomicError> {
    let path = path.as_ref();
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&buffer[..n]);
        }
    };
    read().map_err(|e| AtomicError::from_io("read", path, e))
}

/// Hashes bytes as they come. Also a [`Write`] that goes nowhere else.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds a field with its length in front, so that neighbouring fields cannot be confused.
    pub fn field(&mut self, bytes: &[u8]) {
        self.update(&(bytes.len() as u64).to_le_bytes());
        self.update(bytes);
    }

    /// The hash of everything added, as bytes.
    pub fn finish_bytes(self) -> [u8; 32] {
        self.0.finalize().into()
    }

    /// The hash of everything added.
    pub fn finish(self) -> String {
        let mut hex = String::with_capacity(64);
        for byte in self.finish_bytes() {
            for nibble in [byte >> 4, byte & 15] {
                hex.push(char::from_digit(u32::from(nibble), 16).expect("a nibble is below 16"));
            }
        }
        hex
    }
}

impl Write for Hasher {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// True for 64 lower-case hex digits.
pub fn is_sha256_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}
