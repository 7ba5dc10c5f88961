//! Captures that lie in an object store or on a shared folder: where the stages meet crate `store`.
//!
//! A build without the feature `object-store` knows the keys, and says that it cannot use them.

#[cfg(feature = "object-store")]
mod open;

use std::path::Path;

use draftsmith_formats::cache::{CacheManifest, CacheSpec, CacheWriter, Part, Parts, StoredRow};
#[cfg(feature = "object-store")]
use draftsmith_store::{ShardUploads, StoredParts, StoredWriter};
use draftsmith_train::RowStore;

use super::Run;
use crate::Error;
#[cfg(not(feature = "object-store"))]
use crate::elsewhere::built_without;

/// Bytes that need room here of a capture of so many that goes to a store: of each rank one shard is filled, one waits, one
/// travels; where there are several, parts of one that two share stay to the end.
pub(super) fn on_the_way(bytes: u64, rows: u64, shard_rows: u32, ranks: u64) -> u64 {
    let shards = rows.div_ceil(u64::from(shard_rows.max(1)));
    let here = if ranks > 1 { 4 * ranks } else { 3 };
    if shards > here { bytes / shards * here } else { bytes }
}

/// Where captured rows go.
pub(super) enum Sink {
    /// Into the folder of the stage.
    Here(Box<CacheWriter>),
    /// Through it into a store.
    #[cfg(feature = "object-store")]
    Stored(Box<StoredWriter>, draftsmith_store::Store),
}

impl Sink {
    /// Rows that need not be captured again.
    pub(super) fn rows_done(&self) -> u64 {
        match self {
            Sink::Here(writer) => writer.rows_done(),
            #[cfg(feature = "object-store")]
            Sink::Stored(writer, _) => writer.rows_done(),
        }
    }

    /// Rows in finished shards: they are there after a kill, too.
    pub(super) fn rows_finished(&self) -> u64 {
        match self {
            Sink::Here(writer) => writer.manifest().rows_done(),
            #[cfg(feature = "object-store")]
            Sink::Stored(writer, _) => writer.rows_finished(),
        }
    }

    /// Bytes of the capture so far.
    pub(super) fn bytes_written(&self) -> u64 {
        match self {
            Sink::Here(writer) => writer.bytes_written(),
            #[cfg(feature = "object-store")]
            Sink::Stored(writer, _) => writer.bytes_written(),
        }
    }

    /// Bytes that need room in the folder of the stage, of a capture of so many.
    pub(super) fn bytes_here(&self, bytes: u64, spec: &CacheSpec) -> u64 {
        match self.place() {
            None => bytes,
            Some(_) => on_the_way(bytes, spec.rows, spec.shard_rows, 1),
        }
    }

    /// Where rows go, in words; nothing of a folder of the run.
    pub(super) fn place(&self) -> Option<String> {
        match self {
            Sink::Here(_) => None,
            #[cfg(feature = "object-store")]
            Sink::Stored(_, store) => Some(store.address().to_string()),
        }
    }

    pub(super) fn push(&mut self, row: &StoredRow) -> Result<(), Error> {
        match self {
            Sink::Here(writer) => Ok(writer.push_stored(row)?),
            #[cfg(feature = "object-store")]
            Sink::Stored(writer, _) => Ok(writer.push(row)?),
        }
    }

    /// What the user should know by now.
    pub(super) fn notes(&self) -> Vec<String> {
        match self {
            Sink::Here(_) => Vec::new(),
            #[cfg(feature = "object-store")]
            Sink::Stored(_, store) => store.take_notes(),
        }
    }

    /// Ends the capture.
    pub(super) fn finish(self) -> Result<CacheManifest, Error> {
        match self {
            Sink::Here(writer) => Ok(writer.finish()?),
            #[cfg(feature = "object-store")]
            Sink::Stored(writer, _) => Ok(writer.finish()?),
        }
    }
}

/// A capture that ranks share, as rank 0 sees it.
pub(super) enum Shared {
    /// In the folder of the stage.
    Here(Box<Parts>),
    /// In a store.
    #[cfg(feature = "object-store")]
    Stored(Box<StoredParts>, draftsmith_store::Store),
}

impl Shared {
    /// What is there of it.
    pub(super) fn parts(&self) -> &Parts {
        match self {
            Shared::Here(parts) => parts,
            #[cfg(feature = "object-store")]
            Shared::Stored(stored, _) => stored.parts(),
        }
    }

    /// Takes a part that a rank has finished.
    pub(super) fn add(&mut self, part: Part) {
        match self {
            Shared::Here(parts) => parts.add(part),
            #[cfg(feature = "object-store")]
            Shared::Stored(stored, _) => stored.add(part),
        }
    }

    /// Bytes that need room in the folder of the stage, of a capture of so many by so many ranks.
    pub(super) fn bytes_here(&self, bytes: u64, spec: &CacheSpec, ranks: usize) -> u64 {
        match self.place() {
            None => bytes,
            Some(_) => on_the_way(bytes, spec.rows, spec.shard_rows, ranks as u64),
        }
    }

    /// As [`Sink::place`].
    pub(super) fn place(&self) -> Option<String> {
        match self {
            Shared::Here(_) => None,
            #[cfg(feature = "object-store")]
            Shared::Stored(_, store) => Some(store.address().to_string()),
        }
    }

    /// Ends the capture. Gives its bytes, and what is to be said of the store.
    pub(super) fn finish(self) -> (Result<u64, Error>, Vec<String>) {
        let bytes = |manifest: CacheManifest| manifest.shards.iter().map(|shard| shard.bytes).sum();
        match self {
            Shared::Here(parts) => (parts.finish().map(bytes).map_err(Error::from), Vec::new()),
            #[cfg(feature = "object-store")]
            Shared::Stored(stored, store) => {
                (stored.finish().map(bytes).map_err(Error::from), store.take_notes())
            }
        }
    }
}

/// Where the parts go that a rank finishes.
pub(super) enum Finished {
    /// They stay in the folder of the stage.
    Here(Vec<Part>),
    /// Whole shards go to a store.
    #[cfg(feature = "object-store")]
    Stored(ShardUploads, draftsmith_store::Store),
}

impl Finished {
    pub(super) fn take(&mut self, part: Part) -> Result<(), Error> {
        match self {
            Finished::Here(parts) => {
                parts.push(part);
                Ok(())
            }
            #[cfg(feature = "object-store")]
            Finished::Stored(uploads, _) => Ok(uploads.take(part)?),
        }
    }

    /// The parts, once they are where they belong, and what is to be said of the store.
    pub(super) fn finish(self) -> (Result<Vec<Part>, Error>, Vec<String>) {
        match self {
            Finished::Here(parts) => (Ok(parts), Vec::new()),
            #[cfg(feature = "object-store")]
            Finished::Stored(uploads, store) => (uploads.finish().map_err(Error::from), store.take_notes()),
        }
    }
}

impl Run<'_> {
    /// The capture as so many ranks share it; `None` if one makes it alone, and nobody left parts.
    pub(super) fn shared(&self, dir: &Path, spec: &CacheSpec, ranks: usize) -> Result<Option<Shared>, Error> {
        match &self.file.capture.store {
            None => {
                let parts = Parts::open(dir, spec)?;
                Ok((ranks > 1 || !parts.is_empty()).then(|| Shared::Here(Box::new(parts))))
            }
            #[cfg(feature = "object-store")]
            Some(table) => match ranks > 1 || Parts::are_in(dir) {
                true => self.stored_parts(table, dir, spec).map(Some),
                false => Ok(None),
            },
            #[cfg(not(feature = "object-store"))]
            Some(_) => Err(built_without("`capture.store` is set")),
        }
    }

    /// Where the parts of this rank go.
    pub(super) fn finished(&self, dir: &Path, spec: &CacheSpec) -> Result<Finished, Error> {
        match &self.file.capture.store {
            None => Ok(Finished::Here(Vec::new())),
            #[cfg(feature = "object-store")]
            Some(table) => self.shard_uploads(table, dir, spec),
            #[cfg(not(feature = "object-store"))]
            Some(_) => {
                let _ = (dir, spec);
                Err(built_without("`capture.store` is set"))
            }
        }
    }

    /// Where captured rows go.
    pub(super) fn sink(&self, dir: &Path, spec: &CacheSpec) -> Result<Sink, Error> {
        match &self.file.capture.store {
            None => Ok(Sink::Here(Box::new(CacheWriter::open(dir, spec)?))),
            #[cfg(feature = "object-store")]
            Some(table) => self.stored_sink(table, dir, spec),
            #[cfg(not(feature = "object-store"))]
            Some(_) => Err(built_without("`capture.store` is set")),
        }
    }

    /// The rows of a capture that lies in a store; `None` where it lies in the folder of the run.
    pub(super) fn stored_rows(&self, spec: &CacheSpec) -> Result<Option<Box<dyn RowStore + '_>>, Error> {
        match &self.file.capture.store {
            None => Ok(None),
            #[cfg(feature = "object-store")]
            Some(table) => self.open_stored_rows(table, spec).map(Some),
            #[cfg(not(feature = "object-store"))]
            Some(_) => {
                let _ = spec;
                Err(built_without("`capture.store` is set"))
            }
        }
    }

    /// A store can be used at all: known before the first stage.
    pub(super) fn check_store(&self) -> Result<(), Error> {
        match &self.file.capture.store {
            None => Ok(()),
            #[cfg(feature = "object-store")]
            Some(table) => self.look_at_store(table),
            #[cfg(not(feature = "object-store"))]
            Some(_) => Err(built_without("`capture.store` is set")),
        }
    }
}
