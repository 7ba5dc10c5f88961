//! Reading a finished cache in any order.

use std::path::{Path, PathBuf};

use super::places::{RowPlace, decode_frame, places_in};
use super::{CacheError, CacheManifest, CacheSpec, CaptureRow};
use crate::hash;
use crate::mapped::Mapped;

/// Where a row lies in its shard.
#[derive(Clone, Copy, Debug)]
struct RowEntry {
    shard: u32,
    offset: usize,
    len: usize,
    tokens: usize,
}

impl RowEntry {
    fn of(shard: u32, RowPlace { offset, len, tokens }: RowPlace) -> RowEntry {
        RowEntry { shard, offset: offset as usize, len: len as usize, tokens: tokens as usize }
    }
}

/// A complete target cache. Rows can be read from several threads at once.
#[derive(Clone, Debug)]
pub struct CacheReader {
    dir: PathBuf,
    manifest: CacheManifest,
    shards: Vec<Mapped>,
    rows: Vec<RowEntry>,
}

impl CacheReader {
    /// Opens a cache and checks the structure of every shard. Hashes are compared by [`CacheReader::verify`].
    ///
    /// # Errors
    /// [`CacheError::Incomplete`] if rows are missing.
    pub fn open(dir: impl AsRef<Path>) -> Result<CacheReader, CacheError> {
        let dir = dir.as_ref();
        let missing = || CacheError::Missing { path: dir.to_path_buf() };
        let manifest = CacheManifest::read(dir)?.ok_or_else(missing)?;
        if !manifest.complete {
            return Err(CacheError::Incomplete {
                path: dir.to_path_buf(),
                done: manifest.rows_done(),
                rows: manifest.spec.rows,
            });
        }
        let (mut shards, mut rows) = (Vec::new(), Vec::new());
        for (i, entry) in manifest.shards.iter().enumerate() {
            let path = dir.join(&entry.file);
            let shard = Mapped::open(&path)?;
            let found = places_in(&shard, entry, &manifest.spec)
                .map_err(|problem| CacheError::Damaged { path, problem })?;
            rows.extend(found.into_iter().map(|place| RowEntry::of(i as u32, place)));
            shards.push(shard);
        }
        Ok(CacheReader { dir: dir.to_path_buf(), manifest, shards, rows })
    }

    /// Like [`CacheReader::open`], but the cache must be of this target, data and type.
    ///
    /// # Errors
    /// [`CacheError::Differs`] names the first difference; looked at before any shard.
    pub fn open_for(dir: impl AsRef<Path>, wanted: &CacheSpec) -> Result<CacheReader, CacheError> {
        let dir = dir.as_ref();
        if let Some(manifest) = CacheManifest::read(dir)? {
            manifest.check_spec(wanted, dir)?;
        }
        CacheReader::open(dir)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &CacheManifest {
        &self.manifest
    }

    /// What the rows depend on.
    pub fn spec(&self) -> &CacheSpec {
        &self.manifest.spec
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tokens of a row, without reading it.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_tokens(&self, i: usize) -> usize {
        self.rows[i].tokens
    }

    /// Reads a row.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] if the frame does not decode to what the index says.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, i: usize) -> Result<CaptureRow, CacheError> {
        let at = self.rows[i];
        let damaged = |problem: String| CacheError::Damaged {
            path: self.dir.join(&self.manifest.shards[at.shard as usize].file),
            problem: format!("row {i} at byte {}: {problem}", at.offset),
        };
        let frame = &self.shards[at.shard as usize][at.offset..at.offset + at.len];
        decode_frame(frame, at.tokens, self.spec()).map_err(damaged)
    }

    /// Compares the hash of every shard.
    pub fn verify(&self) -> Result<(), CacheError> {
        for (entry, shard) in self.manifest.shards.iter().zip(&self.shards) {
            let found = hash::sha256_hex(shard.bytes());
            if found != entry.sha256 {
                let problem = format!("its sha256 is {found}, the manifest says {}", entry.sha256);
                return Err(CacheError::Damaged { path: self.dir.join(&entry.file), problem });
            }
        }
        Ok(())
    }
}
