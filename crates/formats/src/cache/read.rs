//! Reading a finished cache in any order.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::{
    CacheError, CacheManifest, CacheSpec, CaptureRow, INDEX_ENTRY, MAGIC, ShardEntry, TRAILER, codec,
};
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
            let found = index_of(&shard, entry, i as u32, &manifest.spec)
                .map_err(|problem| CacheError::Damaged { path, problem })?;
            rows.extend(found);
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
        if let Some(manifest) = CacheManifest::read(dir)?
            && let Some((what, found, wanted)) = manifest.spec.difference(wanted)
        {
            return Err(CacheError::Differs { path: dir.to_path_buf(), what, found, wanted });
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
        let expected =
            codec::encoded_len(at.tokens, self.spec()).ok_or_else(|| damaged("its size overflows".into()))?;
        let decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(|e| damaged(e.to_string()))?;
        // Grown as data comes: the index may lie about the number of tokens.
        let mut raw = Vec::with_capacity(expected.min(frame.len().saturating_mul(8)));
        let limit = (expected as u64).saturating_add(1);
        decoder.take(limit).read_to_end(&mut raw).map_err(|e| damaged(e.to_string()))?;
        codec::decode(&raw, at.tokens, self.spec()).map_err(damaged)
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

/// Checks a shard against its manifest entry and returns its rows, which must tile it.
fn index_of(bytes: &[u8], entry: &ShardEntry, shard: u32, spec: &CacheSpec) -> Result<Vec<RowEntry>, String> {
    let len = bytes.len();
    if len as u64 != entry.bytes {
        return Err(format!("it has {len} bytes, the manifest says {}", entry.bytes));
    }
    if len < MAGIC.len() + TRAILER || !bytes.starts_with(MAGIC) || !bytes.ends_with(MAGIC) {
        return Err("it does not begin and end as a shard does".to_string());
    }
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let (index_at, rows) = (u64_at(len - TRAILER), u64_at(len - TRAILER + 8));
    let index_end = rows.checked_mul(INDEX_ENTRY as u64).and_then(|n| n.checked_add(index_at));
    if rows != entry.rows || index_end != Some((len - TRAILER) as u64) {
        return Err(format!("an index of {rows} rows at byte {index_at} does not end at the trailer"));
    }
    let mut at = MAGIC.len();
    let (mut out, mut tokens) = (Vec::new(), 0u64);
    for i in 0..rows as usize {
        let place = index_at as usize + i * INDEX_ENTRY;
        let row = RowEntry {
            shard,
            offset: at,
            len: u32_at(place + 8) as usize,
            tokens: u32_at(place + 12) as usize,
        };
        if u64_at(place) != at as u64 || row.len > index_at as usize - at {
            return Err(format!("row {i} does not begin where the one before it ends"));
        }
        if row.tokens == 0 || codec::encoded_len(row.tokens, spec).is_none() {
            return Err(format!("row {i} says that it has {} tokens", row.tokens));
        }
        at += row.len;
        tokens += row.tokens as u64;
        out.push(row);
    }
    if at as u64 != index_at {
        return Err(format!("the last row ends at byte {at}, the index begins at {index_at}"));
    }
    if tokens != entry.tokens {
        return Err(format!("it has {tokens} tokens, the manifest says {}", entry.tokens));
    }
    Ok(out)
}
