//! One shard, while it is written.

use std::io::Write;
use std::path::Path;

use super::{CacheError, CacheSpec, CaptureRow, MAGIC, RowEncoder, ShardEntry, codec};
use crate::atomic::{AtomicError, AtomicFile};
use crate::hash::Hasher;

/// Level 1 takes what there is: states are close to noise, ids and masks are not.
const ZSTD_LEVEL: i32 = 1;

/// A row as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRow {
    /// Its frame.
    pub(super) frame: Vec<u8>,
    /// Its tokens.
    pub(super) tokens: u32,
    /// Those with loss.
    pub(super) trained: u32,
}

impl StoredRow {
    /// A row whose states came token by token.
    ///
    /// # Errors
    /// [`CacheError::Row`] with this number, if the lengths disagree or a state is not finite.
    pub fn of(
        encoder: &RowEncoder,
        ids: &[u32],
        loss_mask: &[bool],
        number: u64,
    ) -> Result<StoredRow, CacheError> {
        StoredRow::pack(encoder.finish(ids, loss_mask), loss_mask, number)
    }

    /// A row of floats.
    ///
    /// # Errors
    /// The same for a row of other shapes than the spec says.
    pub fn of_row(row: &CaptureRow, spec: &CacheSpec, number: u64) -> Result<StoredRow, CacheError> {
        StoredRow::pack(codec::encode(row, spec), &row.loss_mask, number)
    }

    /// Tokens of the row.
    pub fn tokens(&self) -> u64 {
        u64::from(self.tokens)
    }

    fn pack(raw: Result<Vec<u8>, String>, mask: &[bool], number: u64) -> Result<StoredRow, CacheError> {
        let refuse = |problem: String| CacheError::Row { row: number, problem };
        let frame = zstd::bulk::compress(&raw.map_err(refuse)?, ZSTD_LEVEL);
        let frame = frame.map_err(|e| refuse(e.to_string()))?;
        match (u32::try_from(frame.len()), u32::try_from(mask.len())) {
            (Ok(_), Ok(tokens)) => {
                let trained = mask.iter().filter(|m| **m).count() as u32;
                Ok(StoredRow { frame, tokens, trained })
            }
            _ => Err(refuse("it is larger than 4 GiB".to_string())),
        }
    }
}

/// A file in the format of a shard, frame by frame. Dropped before it is closed it leaves nothing.
pub(super) struct ShardFile {
    file: AtomicFile,
    hasher: Hasher,
    at: u64,
    index: Vec<u8>,
    entry: ShardEntry,
}

impl ShardFile {
    pub(super) fn create(dir: &Path, name: String) -> Result<ShardFile, AtomicError> {
        let file = AtomicFile::create(dir.join(&name))?;
        let (rows, tokens, trained_tokens, bytes, sha256) = (0, 0, 0, 0, String::new());
        let entry = ShardEntry { file: name, rows, tokens, trained_tokens, bytes, sha256, rows_sha256: None };
        let mut new = ShardFile { file, hasher: Hasher::default(), at: 0, index: Vec::new(), entry };
        new.write(MAGIC)?;
        Ok(new)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), AtomicError> {
        self.file.write_all(bytes).map_err(|e| self.file.error(e))?;
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Rows so far.
    pub(super) fn rows(&self) -> u64 {
        self.entry.rows
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.at
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: &StoredRow) -> Result<(), AtomicError> {
        self.push_frame(&row.frame, row.tokens)?;
        self.count_trained(u64::from(row.trained));
        Ok(())
    }

    /// Counts tokens with loss, of frames that came without their rows.
    pub(super) fn count_trained(&mut self, tokens: u64) {
        self.entry.trained_tokens += tokens;
    }

    /// Adds a row as it is stored.
    pub(super) fn push_frame(&mut self, frame: &[u8], tokens: u32) -> Result<(), AtomicError> {
        self.index.extend_from_slice(&self.at.to_le_bytes());
        self.index.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        self.index.extend_from_slice(&tokens.to_le_bytes());
        self.write(frame)?;
        self.entry.rows += 1;
        self.entry.tokens += u64::from(tokens);
        Ok(())
    }

    /// Ends the file: it is there now.
    pub(super) fn close(mut self) -> Result<ShardEntry, AtomicError> {
        let mut tail = std::mem::take(&mut self.index);
        tail.extend_from_slice(&self.at.to_le_bytes());
        tail.extend_from_slice(&self.entry.rows.to_le_bytes());
        tail.extend_from_slice(MAGIC);
        self.write(&tail)?;
        let ShardFile { file, hasher, at, mut entry, .. } = self;
        entry.bytes = at;
        entry.sha256 = hasher.finish();
        file.commit()?;
        Ok(entry)
    }
}
