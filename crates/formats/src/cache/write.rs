//! Filling a cache, shard by shard.

use std::path::{Path, PathBuf};

use super::shard::{ShardFile, StoredRow};
use super::{CacheError, CacheManifest, CacheSpec, CaptureRow, shard_name};
use crate::atomic::{self, AtomicError};

/// Writes a target cache. After a kill, opening it again goes on behind the last finished shard.
pub struct CacheWriter {
    dir: PathBuf,
    manifest: CacheManifest,
    shard: Option<ShardFile>,
    rows_done: u64,
}

impl CacheWriter {
    /// Starts a cache, or goes on with one that was interrupted.
    ///
    /// # Errors
    /// [`CacheError::Differs`] if the folder holds a cache of something else; nothing is deleted.
    pub fn open(dir: impl AsRef<Path>, spec: &CacheSpec) -> Result<CacheWriter, CacheError> {
        let dir = dir.as_ref();
        check_spec(spec)?;
        let manifest = match CacheManifest::read(dir)? {
            Some(found) => {
                found.check_spec(spec, dir)?;
                for shard in &found.shards {
                    let path = dir.join(&shard.file);
                    let len =
                        std::fs::metadata(&path).map_err(|e| AtomicError::from_io("read", &path, e))?.len();
                    if len != shard.bytes {
                        let problem = format!("it has {len} bytes, the manifest says {}", shard.bytes);
                        return Err(CacheError::Damaged { path, problem });
                    }
                }
                found
            }
            None => {
                let new = CacheManifest::begin(spec);
                return CacheWriter::go_on(dir, new);
            }
        };
        Ok(CacheWriter::of(dir, manifest))
    }

    /// Goes on behind the shards of a manifest, which lie elsewhere: none is looked for in the folder, and its own manifest
    /// becomes this one.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn go_on(dir: impl AsRef<Path>, manifest: CacheManifest) -> Result<CacheWriter, CacheError> {
        let dir = dir.as_ref();
        check_spec(&manifest.spec)?;
        atomic::create_dir_all(dir)?;
        manifest.write(dir)?;
        Ok(CacheWriter::of(dir, manifest))
    }

    fn of(dir: &Path, manifest: CacheManifest) -> CacheWriter {
        let rows_done = manifest.rows_done();
        CacheWriter { dir: dir.to_path_buf(), manifest, shard: None, rows_done }
    }

    /// The finished shards.
    pub fn manifest(&self) -> &CacheManifest {
        &self.manifest
    }

    /// Rows that need not be captured again: the next row to push has this number.
    pub fn rows_done(&self) -> u64 {
        self.rows_done
    }

    /// True once all rows are there.
    pub fn is_complete(&self) -> bool {
        self.manifest.complete
    }

    /// Bytes in finished shards and the open one.
    pub fn bytes_written(&self) -> u64 {
        let finished: u64 = self.manifest.shards.iter().map(|s| s.bytes).sum();
        finished + self.shard.as_ref().map_or(0, ShardFile::bytes)
    }

    /// Adds the row with number [`CacheWriter::rows_done`].
    ///
    /// # Errors
    /// [`CacheError::Row`] for shapes that disagree, values that are not finite, and rows beyond the expected number;
    /// [`CacheError::File`] if the disk is full: then the open shard is gone and finished ones stay.
    pub fn push(&mut self, row: &CaptureRow) -> Result<(), CacheError> {
        self.check_room()?;
        self.push_stored(&StoredRow::of_row(row, &self.manifest.spec, self.rows_done)?)
    }

    /// The same with a row that is as it is stored, in a cache of the same target, layers and type.
    ///
    /// # Errors
    /// Those of [`CacheWriter::push`] but for shapes and values.
    pub fn push_stored(&mut self, row: &StoredRow) -> Result<(), CacheError> {
        self.check_room()?;
        let result = self.append(row);
        if result.is_err() {
            // What was in the open shard is lost; the numbers must say so.
            self.shard = None;
            self.rows_done = self.manifest.rows_done();
        }
        result
    }

    fn check_room(&self) -> Result<(), CacheError> {
        let (row, rows) = (self.rows_done, self.manifest.spec.rows);
        match row < rows {
            true => Ok(()),
            false => Err(CacheError::Row { row, problem: format!("the cache is for {rows} rows") }),
        }
    }

    fn append(&mut self, row: &StoredRow) -> Result<(), CacheError> {
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => {
                let name = shard_name(self.manifest.shards.len());
                self.shard.insert(ShardFile::create(&self.dir, name)?)
            }
        };
        shard.push(row)?;
        let full = shard.rows() >= u64::from(self.manifest.spec.shard_rows);
        self.rows_done += 1;
        if full || self.rows_done == self.manifest.spec.rows {
            self.finish_shard()?;
        }
        Ok(())
    }

    fn finish_shard(&mut self) -> Result<(), CacheError> {
        let Some(shard) = self.shard.take() else { return Ok(()) };
        // Shard first, manifest second: a shard that no manifest lists is written again.
        let manifest = self.manifest.with(shard.close()?);
        manifest.write(&self.dir)?;
        self.manifest = manifest;
        Ok(())
    }

    /// Ends the cache.
    ///
    /// # Errors
    /// [`CacheError::Incomplete`] if rows are missing; those in finished shards are kept.
    pub fn finish(self) -> Result<CacheManifest, CacheError> {
        if self.manifest.complete {
            return Ok(self.manifest);
        }
        Err(CacheError::Incomplete { path: self.dir, done: self.rows_done, rows: self.manifest.spec.rows })
    }
}

fn check_spec(spec: &CacheSpec) -> Result<(), CacheError> {
    if spec.hidden_size > 0 && spec.shard_rows > 0 {
        return Ok(());
    }
    Err(CacheError::Row { row: 0, problem: "hidden size and shard rows must be above 0".to_string() })
}
