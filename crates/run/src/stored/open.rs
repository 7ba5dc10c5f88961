//! Opens stores for the stages.

use std::path::{Path, PathBuf};

use draftsmith_core::report::Report;
use draftsmith_formats::cache::{CacheError, CacheSpec, CaptureRow};
use draftsmith_formats::run::{CaptureStoreTable, Stage};
use draftsmith_store::{
    Address, CacheOptions, ShardUploads, Store, StoreError, StoredCache, StoredParts, StoredWriter,
    capture_folder,
};
use draftsmith_train::RowStore;

use super::{Finished, Shared, Sink};
use crate::disk::{free_bytes, human};
use crate::elsewhere::open;
use crate::{Error, Run, STAGE_VERSIONS, version};

/// Bytes of the local cache where nobody says how many.
const CACHE_BYTES: u64 = 16 << 30;

impl Run<'_> {
    /// The folder of this capture in its store.
    fn store_of(&self, table: &CaptureStoreTable, spec: &CacheSpec) -> Result<Store, StoreError> {
        let address: Address = table.url.parse()?;
        let store = open(&address, &self.outside(), table.timeout_s, table.retries)?;
        Ok(store.inside(&capture_folder(spec, version(&STAGE_VERSIONS, Stage::Capture))))
    }

    pub(super) fn stored_sink(
        &self,
        table: &CaptureStoreTable,
        dir: &Path,
        spec: &CacheSpec,
    ) -> Result<Sink, Error> {
        let store = self.store_of(table, spec)?;
        let writer = StoredWriter::open(dir, spec, &store, &self.captured_before(dir))?;
        Ok(Sink::Stored(Box::new(writer), store))
    }

    /// What was captured into the folder of the run before is uploaded, not captured again.
    fn captured_before(&self, dir: &Path) -> Vec<PathBuf> {
        let aside = self.folder.all_aside(Stage::Capture, dir);
        aside.into_iter().map(|aside| aside.folder).collect()
    }

    pub(super) fn stored_parts(
        &self,
        table: &CaptureStoreTable,
        dir: &Path,
        spec: &CacheSpec,
    ) -> Result<Shared, Error> {
        let store = self.store_of(table, spec)?;
        let parts = StoredParts::open(dir, spec, &store, &self.captured_before(dir))?;
        Ok(Shared::Stored(Box::new(parts), store))
    }

    pub(super) fn shard_uploads(
        &self,
        table: &CaptureStoreTable,
        dir: &Path,
        spec: &CacheSpec,
    ) -> Result<Finished, Error> {
        let store = self.store_of(table, spec)?;
        Ok(Finished::Stored(ShardUploads::begin(dir, spec, &store)?, store))
    }

    pub(super) fn open_stored_rows(
        &self,
        table: &CaptureStoreTable,
        spec: &CacheSpec,
    ) -> Result<Box<dyn RowStore + '_>, Error> {
        let store = self.store_of(table, spec)?;
        let folder =
            table.cache_dir.clone().unwrap_or_else(|| self.folder.stage_dir(Stage::Capture).join("rows"));
        // Processes that share a folder have caches of their own in it.
        let rank = self.env.ranks.collective().rank();
        let name = store.address().path.rsplit('/').next().unwrap_or_default().to_string();
        let dir = folder.join(if rank == 0 { name } else { format!("{name}-{rank}") });
        let there = dir.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
        let free = free_bytes(there);
        let used = crate::aside::bytes_below(&dir);
        let room = free.map(|free| free.saturating_add(used));
        let bytes = match (table.cache_bytes, room) {
            (Some(wanted), Some(room)) if wanted > room => {
                return Err(Error::input(
                    format!(
                        "`capture.store.cache_bytes` asks for {}, but `{}` has room for {}",
                        human(wanted),
                        there.display(),
                        human(room)
                    ),
                    "lower it, or name a folder on another disk in `capture.store.cache_dir`",
                ));
            }
            (Some(wanted), _) => wanted,
            (None, room) => room.map_or(CACHE_BYTES, |room| CACHE_BYTES.min(room / 2)),
        };
        let options = CacheOptions { dir, bytes, readers: table.readers as usize };
        let cache = StoredCache::open(&store, spec, options).map_err(|error| match error {
            // Its stage ended once: somebody took away what it made.
            StoreError::Cache(error @ (CacheError::Missing { .. } | CacheError::Incomplete { .. })) => {
                let state = self.folder.root().join("state").join(format!("{}.json", Stage::Capture.name()));
                Error::input(
                    error.to_string(),
                    format!(
                        "bring it back, or delete `{}` and run again: what is missing is captured again",
                        state.display()
                    ),
                )
            }
            error => error.into(),
        })?;
        Ok(Box::new(StoredRows { cache, report: self.env.report }))
    }

    /// The address is one, and its store lets us in.
    pub(super) fn look_at_store(&self, table: &CaptureStoreTable) -> Result<(), Error> {
        let look = || {
            let address: Address = table.url.parse()?;
            open(&address, &self.outside(), table.timeout_s, table.retries.min(2))?.reach()
        };
        look().map_err(|error| self.origin.at_key("capture.store.url", error.into()))
    }
}

/// Rows from a store, in the order that training says before.
struct StoredRows<'a> {
    cache: StoredCache,
    report: &'a dyn Report,
}

impl Drop for StoredRows<'_> {
    fn drop(&mut self) {
        let store = self.cache.store();
        let asked = store.asked();
        self.report.note(&format!("`{}`: {asked}; {} read", store.address(), human(asked.bytes_read)));
    }
}

impl RowStore for StoredRows<'_> {
    fn num_rows(&self) -> usize {
        self.cache.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.cache.row_tokens(row)
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        let read = rows.iter().map(|row| self.cache.row(*row)).collect::<Result<_, _>>();
        self.cache.store().take_notes().iter().for_each(|note| self.report.note(note));
        Ok(read?)
    }

    fn looks_ahead(&self) -> bool {
        true
    }

    fn expect(&mut self, packs: &[Vec<usize>]) {
        self.cache.expect(&packs.concat());
    }

    fn beside(&mut self) -> Option<&mut (dyn RowStore + Send)> {
        Some(self)
    }
}
