//! Captures that lie in an object store or on a shared folder: where the stages meet crate `store`.
//!
//! A build without the feature `object-store` knows the keys, and says that it cannot use them.

#[cfg(feature = "object-store")]
mod open;

use std::path::Path;

use draftsmith_formats::cache::{CacheManifest, CacheSpec, CacheWriter, StoredRow};
#[cfg(feature = "object-store")]
use draftsmith_store::StoredWriter;
use draftsmith_train::RowStore;

use super::Run;
use crate::Error;
#[cfg(not(feature = "object-store"))]
use crate::elsewhere::built_without;

/// Bytes that need room here of a capture of so many that goes to a store: one shard is filled, one waits, one travels.
pub(super) fn on_the_way(bytes: u64, rows: u64, shard_rows: u32) -> u64 {
    let shards = rows.div_ceil(u64::from(shard_rows.max(1)));
    if shards > 3 { bytes / shards * 3 } else { bytes }
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
            Some(_) => on_the_way(bytes, spec.rows, spec.shard_rows),
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

impl Run<'_> {
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
