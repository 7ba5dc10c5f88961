//! Read-only memory-mapped files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a file could not be opened for reading.
#[derive(Debug, thiserror::Error)]
#[error("cannot open `{}`: {source}", path.display())]
pub struct OpenError {
    /// Which file.
    pub path: PathBuf,
    /// What the operating system said.
    pub source: std::io::Error,
}

/// The bytes of a file, mapped into memory; clones share them.
#[derive(Clone, Debug)]
pub struct Mapped(Bytes);

#[derive(Clone, Debug)]
enum Bytes {
    Map(Arc<memmap2::Mmap>),
    /// Bytes that are in memory already, and empty files, which cannot be mapped.
    Owned(Arc<[u8]>),
}

impl Mapped {
    /// Maps a file for reading.
    pub fn open(path: impl AsRef<Path>) -> Result<Mapped, OpenError> {
        let path = path.as_ref();
        let fail = |source| OpenError { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if meta.is_dir() {
            return Err(fail(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
        }
        if meta.len() == 0 {
            return Ok(Mapped::from(Vec::new()));
        }
        // SAFETY: the mapping is private and read-only. Weight files are replaced by rename, never changed in
        // place (see `atomic`), so the bytes stay the same while they are mapped; a file that someone else
        // truncates meanwhile ends the process with SIGBUS, as in every program that maps files.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?;
        Ok(Mapped(Bytes::Map(Arc::new(map))))
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Mapped {
    fn from(bytes: Vec<u8>) -> Mapped {
        Mapped(Bytes::Owned(bytes.into()))
    }
}

impl std::ops::Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}
