//! Read-only memory-mapped files.

use std::fs::File;
use std::ops::Range;
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

impl Mapped {
    /// Gives the memory of a part back to the system; reading it again fetches it from the file.
    pub fn release(&self, part: Range<usize>) {
        let Bytes::Map(map) = &self.0 else { return };
        // Whole pages inside the part, of any size that is in use; the edges stay.
        const PAGE: usize = 1 << 16;
        let (from, to) = (part.start.next_multiple_of(PAGE), part.end.min(map.len()) / PAGE * PAGE);
        if from < to {
            // SAFETY: the pages are clean copies of the file (read-only, see `open`), so they come back unchanged.
            let done =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
            // Advice only: without it the memory is given back later.
            drop(done);
        }
    }
}

impl From<Vec<u8>> for Mapped {
    fn from(bytes: Vec<u8>) -> Mapped {
        Mapped(Bytes::Owned(bytes.into()))
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl std::ops::Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}
