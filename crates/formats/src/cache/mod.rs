//! The target cache: what training needs to know about the target, row by row.
//!
//! A folder with `manifest.json` and shards. The manifest is read first: version, target, tokenizer, template, layers
//! and type are compared before a byte of data is read, and it lists every shard with rows, size and hash.
//!
//! ```text
//! shard:   magic "DSCACHE1" · zstd frames, one per row · index · trailer
//! index:   per row  offset u64 · length u32 · tokens u32
//! trailer: offset of index u64 · rows u64 · magic "DSCACHE1"
//! frame:   ids S·u32 · mask ⌈S/8⌉ bytes · states
//! states:  bf16: S·(K+1)·Ht values; int8: S·(K+1)·⌈Ht/32⌉ scales (bf16), then S·(K+1)·Ht integers
//! ```
//! The states of a token are its `K` captured layers in order and then the final normed state, each of `Ht` values.
//!
//! **int8**: blocks of 32 neighbouring values share a scale, `max / 127` rounded up to bf16, so no value is clipped
//! and the error is at most half a scale. One scale per whole state would save 6 % of the bytes, but residual streams
//! carry a few values hundreds of times larger than the rest. Measured on SmolLM2-135M (layers 1, 14, 26 and the
//! final state, 516 positions): KL of the teacher's distribution 4.0e-3 with one scale per state and the arg-max
//! changed at 2.3 % of the positions; 6.7e-4 with blocks of 64; 1.9e-4 with blocks of 32, where bf16 has 1.2e-4.
//!
//! Where shards lie in an object store, each has its row places beside it ([`RowPlaces`]), and the manifest their hash: rows are
//! then fetched one by one, and none is used unless its bytes have the hash that was written with it.
//!
//! Invariant: a shard is complete or absent; the manifest lists complete shards only; so a killed writer loses at most
//! the shard that it was filling, and the finished cache has the same bytes as if it had never been interrupted. Row `i` of the
//! cache belongs to row `i` of the token file. Several processes may fill one ([`Parts`]).
//!
//! Shape legend: `S` tokens of a row, `Ht` target width, `K` captured layers.

mod codec;
mod kept;
mod parts;
mod places;
mod read;
mod row;
mod shard;
#[cfg(test)]
mod tests;
mod write;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::{self, AtomicError};
use crate::mapped::OpenError;
pub use crate::run::CaptureDtype;

pub use codec::RowEncoder;
pub use kept::{KeptKey, KeptRows, KeptWriter, drop_kept};
pub use parts::{Part, PartWriter, Parts};
pub use places::{RowPlace, RowPlaces, decode_frame};
pub use read::CacheReader;
pub use row::{CacheSpec, CaptureRow};
pub use shard::StoredRow;
pub use write::CacheWriter;

/// Newest version that this code reads and writes.
pub const CACHE_VERSION: u32 = 1;

/// Name of the manifest in the folder.
pub const MANIFEST_NAME: &str = "manifest.json";

const FORMAT: &str = "draftsmith-target-cache";

const MAGIC: &[u8; 8] = b"DSCACHE1";

/// Bytes per row of a shard's index.
const INDEX_ENTRY: usize = 16;

/// Bytes of a shard's trailer.
const TRAILER: usize = 24;

impl CaptureRow {
    /// Number of tokens `S`.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The row as it would come back from a cache of this type: online and offline training can be compared bit
    /// for bit.
    ///
    /// # Errors
    /// [`CacheError::Row`] if the shapes disagree or a value is not finite.
    pub fn stored_as(&self, spec: &CacheSpec) -> Result<CaptureRow, CacheError> {
        let bytes = codec::encode(self, spec).map_err(|problem| CacheError::Row { row: 0, problem })?;
        codec::decode(&bytes, self.len(), spec).map_err(|problem| CacheError::Row { row: 0, problem })
    }
}

impl CacheSpec {
    /// States per token: the captured layers and the final one.
    fn states(&self) -> usize {
        self.target_layer_ids.len() + 1
    }

    /// What is said where a device finds that a state of a row cannot be stored; `state` counts the captured layers, then the final one.
    pub fn unfit_state(&self, row: u64, token: usize, state: usize) -> CacheError {
        CacheError::Row { row, problem: codec::unfit(&self.target_layer_ids, token, state) }
    }

    /// Names and values of what must be equal.
    pub fn compared(&self) -> [(&'static str, String); 10] {
        [
            ("target_sha256", self.target_sha256.clone()),
            ("precision", self.precision.clone()),
            ("tokenizer_sha256", self.tokenizer_sha256.clone()),
            ("template_sha256", self.template_sha256.clone()),
            ("tokens_sha256", self.tokens_sha256.clone()),
            ("target_layer_ids", format!("{:?}", self.target_layer_ids)),
            ("hidden_size", self.hidden_size.to_string()),
            ("dtype", format!("{:?}", self.dtype).to_lowercase()),
            ("shard_rows", self.shard_rows.to_string()),
            ("rows", self.rows.to_string()),
        ]
    }

    /// The first thing that differs: name, here, there.
    pub fn difference(&self, other: &CacheSpec) -> Option<(&'static str, String, String)> {
        let pairs = self.compared().into_iter().zip(other.compared());
        pairs.map(|((name, a), (_, b))| (name, a, b)).find(|(_, a, b)| a != b)
    }
}

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name.
    pub file: String,
    /// Rows.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens with loss.
    pub trained_tokens: u64,
    /// Size.
    pub bytes: u64,
    /// Hash.
    pub sha256: String,
    /// Hash of its row places, where they lie beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_sha256: Option<String>,
}

impl ShardEntry {
    /// Name of the row places that lie beside the shard in a store.
    pub fn rows_file(&self) -> String {
        format!("{}.rows", self.file)
    }
}

/// Content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheManifest {
    /// Always `draftsmith-target-cache`.
    pub format: String,
    /// Format version.
    pub version: u32,
    /// What the rows depend on.
    pub spec: CacheSpec,
    /// True once all rows are there.
    pub complete: bool,
    /// Finished shards in order.
    pub shards: Vec<ShardEntry>,
}

impl CacheManifest {
    /// Reads and checks the manifest of a cache folder, finished or not; `None` if there is none.
    ///
    /// # Errors
    /// [`CacheError::Manifest`], [`CacheError::Version`].
    pub fn read(dir: &Path) -> Result<Option<CacheManifest>, CacheError> {
        let path = dir.join(MANIFEST_NAME);
        if !path.exists() {
            return Ok(None);
        }
        CacheManifest::parse(&atomic::read(&path)?, &path).map(Some)
    }

    /// The same from the bytes of a manifest; `path` names it in messages.
    ///
    /// # Errors
    /// [`CacheError::Manifest`], [`CacheError::Version`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<CacheManifest, CacheError> {
        let path = path.to_path_buf();
        let problem = |problem: String| CacheError::Manifest { path: path.clone(), problem };
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(|e| problem(e.to_string()))?;
        if head.format != FORMAT {
            return Err(problem(format!("`format` is `{}`, expected `{FORMAT}`", head.format)));
        }
        if head.version == 0 || head.version > CACHE_VERSION {
            return Err(CacheError::Version { path, found: head.version, newest: CACHE_VERSION });
        }
        let manifest: CacheManifest = serde_json::from_slice(bytes).map_err(|e| problem(e.to_string()))?;
        for (i, shard) in manifest.shards.iter().enumerate() {
            if shard.file != shard_name(i) {
                return Err(problem(format!("shard {i} is `{}`, expected `{}`", shard.file, shard_name(i))));
            }
        }
        let rows: Option<u64> = manifest.shards.iter().try_fold(0u64, |n, s| n.checked_add(s.rows));
        let spec = &manifest.spec;
        let fits = rows.is_some_and(|n| if manifest.complete { n == spec.rows } else { n <= spec.rows });
        if !fits {
            return Err(problem(format!("the shards do not add up to its {} rows", spec.rows)));
        }
        if spec.hidden_size == 0 || spec.shard_rows == 0 || spec.target_layer_ids.len() > 1024 {
            return Err(problem("hidden size, shard rows or layers are out of range".to_string()));
        }
        Ok(manifest)
    }

    /// A manifest without shards.
    pub fn begin(spec: &CacheSpec) -> CacheManifest {
        CacheManifest {
            format: FORMAT.to_string(),
            version: CACHE_VERSION,
            spec: spec.clone(),
            complete: spec.rows == 0,
            shards: Vec::new(),
        }
    }

    /// As it is written.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("the manifest is plain data") + "\n"
    }

    fn write(&self, dir: &Path) -> Result<(), CacheError> {
        Ok(atomic::write(dir.join(MANIFEST_NAME), self.to_text())?)
    }

    /// The same with another finished shard.
    #[must_use]
    pub fn with(&self, shard: ShardEntry) -> CacheManifest {
        let mut manifest = self.clone();
        manifest.shards.push(shard);
        manifest.complete = manifest.rows_done() == manifest.spec.rows;
        manifest
    }

    /// It is of this target, data and type; `path` is where it lies.
    ///
    /// # Errors
    /// [`CacheError::Differs`], naming the first difference.
    pub fn check_spec(&self, wanted: &CacheSpec, path: &Path) -> Result<(), CacheError> {
        match self.spec.difference(wanted) {
            None => Ok(()),
            Some((what, found, wanted)) => {
                Err(CacheError::Differs { path: path.to_path_buf(), what, found, wanted })
            }
        }
    }

    /// Rows in finished shards.
    pub fn rows_done(&self) -> u64 {
        self.shards.iter().map(|s| s.rows).sum()
    }
}

fn shard_name(i: usize) -> String {
    format!("shard-{i:05}.dscache")
}

/// Bytes that `tokens` tokens need, before compression (states hardly compress).
pub fn estimate_bytes(tokens: u64, hidden: u64, layers: u64, dtype: CaptureDtype) -> u64 {
    let values = hidden.saturating_mul(layers.saturating_add(1));
    let states = match dtype {
        CaptureDtype::Bf16 => values.saturating_mul(2),
        CaptureDtype::Int8 => {
            let blocks = hidden.div_ceil(codec::BLOCK as u64).saturating_mul(layers.saturating_add(1));
            values.saturating_add(blocks.saturating_mul(2))
        }
    };
    // An id and a mask bit come on top.
    tokens.saturating_mul(states.saturating_add(4)).saturating_add(tokens.div_ceil(8))
}

/// What is wrong with a target cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] AtomicError),
    /// A shard could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A folder without a cache.
    #[error("`{}` holds no target cache: there is no `{MANIFEST_NAME}`", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest is not readable.
    #[error("target cache manifest `{}`: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong, with line and column.
        problem: String,
    },
    /// A version from the future.
    #[error("target cache `{}` has format version {found}, this program reads up to {newest}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Newest version that is known.
        newest: u32,
    },
    /// The cache was made from something else than the run wants.
    #[error("target cache `{}` was captured with {what} = `{found}`, but the run wants `{wanted}`", path.display())]
    Differs {
        /// The folder.
        path: PathBuf,
        /// Field of the manifest.
        what: &'static str,
        /// Value in the manifest.
        found: String,
        /// Value of the run.
        wanted: String,
    },
    /// Capture was interrupted.
    #[error("target cache `{}` has {done} of {rows} rows", path.display())]
    Incomplete {
        /// The folder.
        path: PathBuf,
        /// Rows that are there.
        done: u64,
        /// Rows that there should be.
        rows: u64,
    },
    /// A shard is cut off or damaged.
    #[error("target cache shard `{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The shard.
        path: PathBuf,
        /// What is wrong and where.
        problem: String,
    },
    /// A row that cannot be stored.
    #[error("row {row} cannot be stored: {problem}")]
    Row {
        /// Its number in the cache.
        row: u64,
        /// What is wrong with it.
        problem: String,
    },
}

impl CacheError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            CacheError::File(e) if e.is_disk_full() => Some(
                "free space and run the same command again: finished shards are kept; `capture.dtype = \"int8\"` \
                 needs half the space of `bf16`, and `capture.mode = \"online\"` needs none"
                    .to_string(),
            ),
            CacheError::File(e) => e.hint(),
            CacheError::Open(_) | CacheError::Row { .. } => None,
            CacheError::Missing { .. } | CacheError::Incomplete { .. } => {
                Some("run `draftsmith capture` with the same run file: it goes on where it stopped".to_string())
            }
            CacheError::Version { .. } => Some("update draftsmith".to_string()),
            CacheError::Differs { .. } => {
                Some("delete the cache folder and capture again, or use the run file it was made with".to_string())
            }
            CacheError::Manifest { .. } | CacheError::Damaged { .. } => {
                Some("delete the cache folder and capture again".to_string())
            }
        }
    }
}
