//! Filling a cache, shard by shard.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{CacheError, CacheManifest, CacheSpec, CaptureRow, MAGIC, ShardEntry, codec, shard_name};
use crate::atomic::{self, AtomicError, AtomicFile};
use crate::hash::Hasher;

/// Level 1 takes what there is: states are close to noise, ids and masks are not.
const ZSTD_LEVEL: i32 = 1;

/// The shard being filled.
struct OpenShard {
    file: AtomicFile,
    hasher: Hasher,
    at: u64,
    index: Vec<u8>,
    entry: ShardEntry,
}

impl OpenShard {
    fn write(&mut self, bytes: &[u8]) -> Result<(), AtomicError> {
        self.file.write_all(bytes).map_err(|e| self.file.error(e))?;
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }
}

/// Writes a target cache. After a kill, opening it again goes on behind the last finished shard.
pub struct CacheWriter {
    dir: PathBuf,
    manifest: CacheManifest,
    shard: Option<OpenShard>,
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
                if let Some((what, found, wanted)) = found.spec.difference(spec) {
                    return Err(CacheError::Differs { path: dir.to_path_buf(), what, found, wanted });
                }
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
        finished + self.shard.as_ref().map_or(0, |s| s.at)
    }

    /// Adds the row with number [`CacheWriter::rows_done`].
    ///
    /// # Errors
    /// [`CacheError::Row`] for shapes that disagree, values that are not finite, and rows beyond the expected number;
    /// [`CacheError::File`] if the disk is full: then the open shard is gone and finished ones stay.
    pub fn push(&mut self, row: &CaptureRow) -> Result<(), CacheError> {
        let number = self.rows_done;
        let refuse = |problem: String| CacheError::Row { row: number, problem };
        if number >= self.manifest.spec.rows {
            return Err(refuse(format!("the cache is for {} rows", self.manifest.spec.rows)));
        }
        let raw = codec::encode(row, &self.manifest.spec).map_err(refuse)?;
        let frame = zstd::bulk::compress(&raw, ZSTD_LEVEL).map_err(|e| refuse(e.to_string()))?;
        let (Ok(frame_len), Ok(tokens)) = (u32::try_from(frame.len()), u32::try_from(row.len())) else {
            return Err(refuse("it is larger than 4 GiB".to_string()));
        };
        let result = self.append(&frame, frame_len, tokens, row);
        if result.is_err() {
            // What was in the open shard is lost; the numbers must say so.
            self.shard = None;
            self.rows_done = self.manifest.rows_done();
        }
        result
    }

    fn append(&mut self, frame: &[u8], len: u32, tokens: u32, row: &CaptureRow) -> Result<(), CacheError> {
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => {
                let name = shard_name(self.manifest.shards.len());
                let file = AtomicFile::create(self.dir.join(&name))?;
                let entry = ShardEntry {
                    file: name,
                    rows: 0,
                    tokens: 0,
                    trained_tokens: 0,
                    bytes: 0,
                    sha256: String::new(),
                    rows_sha256: None,
                };
                let new = OpenShard { file, hasher: Hasher::default(), at: 0, index: Vec::new(), entry };
                let new = self.shard.insert(new);
                new.write(MAGIC)?;
                new
            }
        };
        shard.index.extend_from_slice(&shard.at.to_le_bytes());
        shard.index.extend_from_slice(&len.to_le_bytes());
        shard.index.extend_from_slice(&tokens.to_le_bytes());
        shard.write(frame)?;
        shard.entry.rows += 1;
        shard.entry.tokens += u64::from(tokens);
        shard.entry.trained_tokens += row.loss_mask.iter().filter(|m| **m).count() as u64;
        self.rows_done += 1;
        let full = shard.entry.rows >= u64::from(self.manifest.spec.shard_rows);
        if full || self.rows_done == self.manifest.spec.rows {
            self.finish_shard()?;
        }
        Ok(())
    }

    fn finish_shard(&mut self) -> Result<(), CacheError> {
        let Some(mut shard) = self.shard.take() else { return Ok(()) };
        let index_at = shard.at;
        let mut tail = std::mem::take(&mut shard.index);
        tail.extend_from_slice(&index_at.to_le_bytes());
        tail.extend_from_slice(&shard.entry.rows.to_le_bytes());
        tail.extend_from_slice(MAGIC);
        shard.write(&tail)?;
        let OpenShard { file, hasher, at, mut entry, .. } = shard;
        entry.bytes = at;
        entry.sha256 = hasher.finish();
        // Shard first, manifest second: a shard that no manifest lists is written again.
        file.commit()?;
        let mut manifest = self.manifest.clone();
        manifest.shards.push(entry);
        manifest.complete = manifest.rows_done() == manifest.spec.rows;
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
