//! Files that lie elsewhere and are read in ranges: as a stream, or, of Parquet, block by block.
//!
//! Memory stays bounded: one piece of a stream, or a fixed number of bytes in blocks, the ones used last.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

/// A file that is read in ranges. A range comes whole or as an error: whoever implements this has tried as often as makes sense.
pub trait Ranged: Send + Sync + Debug {
    /// Bytes of the file.
    fn size(&self) -> u64;

    /// So many bytes from a place inside.
    ///
    /// # Errors
    /// They cannot be had.
    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>>;
}

/// Bytes of a stream that are asked for at once.
const PIECE: u64 = 8 << 20;
/// Bytes in blocks of a Parquet file.
const BLOCKS_BYTES: usize = 64 << 20;
/// A block before the columns are known: the end of the file, where they are told.
const FIRST_BLOCK: usize = 256 << 10;
const LARGEST_BLOCK: usize = 4 << 20;

/// The bytes of a file from its beginning to its end.
pub(crate) struct Stream {
    file: Arc<dyn Ranged>,
    /// Where the next piece begins.
    at: u64,
    piece: io::Cursor<Vec<u8>>,
}

impl Stream {
    pub(crate) fn new(file: Arc<dyn Ranged>) -> Stream {
        Stream { file, at: 0, piece: io::Cursor::default() }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.piece.read(buffer)?;
        let left = self.file.size() - self.at;
        if n > 0 || left == 0 || buffer.is_empty() {
            return Ok(n);
        }
        let len = left.min(PIECE);
        self.piece = io::Cursor::new(self.file.read(self.at, len as usize)?);
        self.at += len;
        self.piece.read(buffer)
    }
}

/// Blocks of a Parquet file, whose columns are read side by side.
#[derive(Debug)]
pub(crate) struct Blocks {
    file: Arc<dyn Ranged>,
    kept: Mutex<Kept>,
    /// What went wrong first: the reader of Parquet turns it into words about Parquet.
    failed: Mutex<Option<io::Error>>,
}

#[derive(Debug)]
struct Kept {
    /// Bytes of a block.
    size: usize,
    /// By number, the one used last in front.
    blocks: VecDeque<(u64, Bytes)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Blocks {
    pub(crate) fn new(file: Arc<dyn Ranged>) -> Blocks {
        let kept = Kept { size: FIRST_BLOCK, blocks: VecDeque::new() };
        Blocks { file, kept: Mutex::new(kept), failed: Mutex::default() }
    }

    /// Every column has room for two blocks from now on, or a little less where there are very many.
    pub(crate) fn for_columns(&self, columns: usize) {
        let mut kept = lock(&self.kept);
        kept.size = (BLOCKS_BYTES / (2 * columns.max(1))).clamp(FIRST_BLOCK, LARGEST_BLOCK);
        kept.blocks.clear();
    }

    /// What went wrong with the file itself since the last call.
    pub(crate) fn take_failure(&self) -> Option<io::Error> {
        lock(&self.failed).take()
    }

    fn fetch(&self, from: u64, len: usize) -> io::Result<Bytes> {
        self.file.read(from, len).map(Bytes::from).map_err(|error| {
            let told = io::Error::new(error.kind(), "the file cannot be read");
            lock(&self.failed).get_or_insert(error);
            told
        })
    }

    /// What of the file lies at a place, up to the end of its block; empty behind the end.
    fn at(&self, at: u64) -> io::Result<Bytes> {
        let mut kept = lock(&self.kept);
        let size = kept.size as u64;
        let (number, inside) = (at / size, (at % size) as usize);
        if at >= self.file.size() {
            return Ok(Bytes::new());
        }
        let found = kept.blocks.iter().position(|(n, _)| *n == number).and_then(|i| kept.blocks.remove(i));
        let block = match found {
            Some((_, block)) => block,
            None => {
                let from = number * size;
                let most = (BLOCKS_BYTES / kept.size).max(1);
                kept.blocks.truncate(most - 1);
                self.fetch(from, size.min(self.file.size() - from) as usize)?
            }
        };
        kept.blocks.push_front((number, block.clone()));
        Ok(block.slice(inside..))
    }
}

/// [`Blocks`] as the reader of Parquet wants them.
#[derive(Clone, Debug)]
pub(crate) struct Shared(pub(crate) Arc<Blocks>);

impl Length for Shared {
    fn len(&self) -> u64 {
        self.0.file.size()
    }
}

impl ChunkReader for Shared {
    type T = FromPlace;

    fn get_read(&self, start: u64) -> Result<FromPlace, ParquetError> {
        Ok(FromPlace { blocks: Arc::clone(&self.0), at: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let end = start.checked_add(length as u64);
        if end.is_none_or(|end| end > self.0.file.size()) {
            let size = self.0.file.size();
            return Err(ParquetError::EOF(format!("{length} bytes at {start} of a file of {size}")));
        }
        let first = self.0.at(start)?;
        if first.len() >= length {
            return Ok(first.slice(..length));
        }
        if length > LARGEST_BLOCK {
            return Ok(self.0.fetch(start, length)?);
        }
        let mut out = Vec::with_capacity(length);
        let mut reader = self.get_read(start)?.take(length as u64);
        reader.read_to_end(&mut out)?;
        Ok(out.into())
    }
}

/// Reads on from a place.
#[derive(Debug)]
pub(crate) struct FromPlace {
    blocks: Arc<Blocks>,
    at: u64,
}

impl Read for FromPlace {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let here = self.blocks.at(self.at)?;
        let n = here.len().min(buffer.len());
        buffer[..n].copy_from_slice(&here[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Bytes that are counted when they are asked for; the n-th request fails.
    #[derive(Debug)]
    pub(crate) struct Counted {
        bytes: Vec<u8>,
        asked: AtomicU64,
        fails_at: u64,
    }

    impl Counted {
        fn new(len: usize, fails_at: u64) -> Arc<Counted> {
            let bytes = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            Arc::new(Counted { bytes, asked: AtomicU64::new(0), fails_at })
        }
    }

    impl Ranged for Counted {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
            if self.asked.fetch_add(1, Ordering::Relaxed) == self.fails_at {
                return Err(io::Error::other("gone"));
            }
            assert!(len <= 16 << 20, "{len} bytes at once");
            Ok(self.bytes[from as usize..from as usize + len].to_vec())
        }
    }

    #[test]
    fn a_stream_has_every_byte_once_and_asks_for_few_pieces() {
        let file = Counted::new(20_000_000, u64::MAX);
        let mut all = Vec::new();
        Stream::new(Arc::clone(&file) as _).read_to_end(&mut all).unwrap();
        assert_eq!(all, file.bytes);
        assert_eq!(file.asked.load(Ordering::Relaxed), 3);
        let mut none = Vec::new();
        Stream::new(Counted::new(0, 0)).read_to_end(&mut none).unwrap();
        assert!(none.is_empty());
        let mut cut = Vec::new();
        let error = Stream::new(Counted::new(20_000_000, 1)).read_to_end(&mut cut).unwrap_err();
        assert_eq!((error.to_string().as_str(), cut.len() as u64), ("gone", PIECE));
    }

    #[test]
    fn blocks_give_the_bytes_of_the_file_wherever_they_are_asked_for() {
        let file = Counted::new(9_000_001, u64::MAX);
        let blocks = Shared(Arc::new(Blocks::new(Arc::clone(&file) as _)));
        for columns in [1, 7, 500] {
            blocks.0.for_columns(columns);
            for (start, length) in
                [(0, 8), (8_999_990, 11), (262_100, 100), (1_000_000, 5_000_000), (3, 900_000)]
            {
                let got = blocks.get_bytes(start, length).unwrap();
                assert_eq!(got[..], file.bytes[start as usize..start as usize + length]);
                let mut read = vec![0; length];
                blocks.get_read(start).unwrap().read_exact(&mut read).unwrap();
                assert_eq!(read, file.bytes[start as usize..start as usize + length]);
            }
            let kept = lock(&blocks.0.kept);
            assert!(kept.blocks.iter().map(|(_, block)| block.len()).sum::<usize>() <= BLOCKS_BYTES);
        }
        assert!(blocks.get_bytes(9_000_000, 2).is_err());
        let asked = file.asked.load(Ordering::Relaxed);
        blocks.get_bytes(10, 20).unwrap();
        blocks.get_bytes(500, 20).unwrap();
        assert!(file.asked.load(Ordering::Relaxed) <= asked + 1, "a block is asked for once");
    }

    #[test]
    fn what_is_wrong_with_the_file_is_told_as_that() {
        let blocks = Shared(Arc::new(Blocks::new(Counted::new(1000, 0))));
        assert!(blocks.get_bytes(0, 10).is_err());
        assert_eq!(blocks.0.take_failure().unwrap().to_string(), "gone");
        assert!(blocks.0.take_failure().is_none());
        assert_eq!(blocks.get_bytes(0, 10).unwrap().len(), 10);
    }
}
