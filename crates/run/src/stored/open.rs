//! Opens stores for the stages.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use draftsmith_core::report::Report;
use draftsmith_data::Ranged;
use draftsmith_formats::cache::{CacheError, CacheManifest, CacheSpec, CaptureRow};
use draftsmith_formats::run::{CaptureStoreTable, Stage};
use draftsmith_store::{
    Address, CacheOptions, Object, Settings, Store, StoreError, StoredCache, StoredWriter, capture_folder,
};
use draftsmith_train::RowStore;

use super::{Found, Sink};
use crate::check::Origin;
use crate::disk::{free_bytes, human};
use crate::{Env, Error, Run, STAGE_VERSIONS, version};

/// Bytes of the local cache where nobody says how many.
const CACHE_BYTES: u64 = 16 << 30;

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        match error {
            StoreError::Cache(error) => error.into(),
            StoreError::Disk(error) => error.into(),
            StoreError::Stopped => Error::Interrupted { what: "a transfer".to_string(), resume: None },
            error => Error::Input { hint: error.hint(), message: error.to_string() },
        }
    }
}

fn open(address: &Address, env: &Env<'_>, timeout_s: f64, retries: u32) -> Result<Store, StoreError> {
    let timeout = Duration::from_secs_f64(timeout_s);
    let variable = &env.variable;
    let (offline, stop) = (env.places.offline, env.stop.clone());
    Store::open(address, Settings { offline, variable, timeout, retries, stop })
}

/// An error of a store at the key that names it.
fn at_key(error: Error, origin: &Origin, key: &str) -> Error {
    match error {
        Error::Input { message, hint } => {
            Error::Input { message: format!("{}: `{key}`: {message}", origin.place(key)), hint }
        }
        error => error,
    }
}

/// An object of conversations.
struct Remote {
    store: Store,
    name: String,
    found: Object,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Remote").field(&self.store.address().join(&self.name)).finish()
    }
}

impl Ranged for Remote {
    fn size(&self) -> u64 {
        self.found.size
    }

    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let range = from..from + len as u64;
        self.store.read(&self.name, range, self.found.tag.as_deref(), |_| Ok(())).map_err(io::Error::other)
    }
}

/// Finds a file of conversations in a store.
///
/// # Errors
/// An address that is none, an object that is not there or may not be read.
pub fn open_source(name: &str, env: &Env<'_>) -> Result<Found, Error> {
    let address: Address = name.parse()?;
    let Some((folder, name)) = address.split() else {
        let problem = "names no object, expected a file of conversations".to_string();
        return Err(StoreError::BadAddress { address: address.to_string(), problem }.into());
    };
    let (timeout_s, retries) = (CaptureStoreTable::default_timeout_s(), CaptureStoreTable::default_retries());
    let store = open(&folder, env, timeout_s, retries)?;
    let Some(found) = store.find(name)? else {
        // The bucket may be what is missing.
        return Err(match store.reach() {
            Err(StoreError::NoBucket { .. }) => StoreError::NoBucket { object: address },
            Err(error) => error,
            Ok(()) => StoreError::Missing { object: address },
        }
        .into());
    };
    let identity = found.identity();
    Ok((Arc::new(Remote { store, name: name.to_string(), found }), identity))
}

impl Run<'_> {
    /// The folder of this capture in its store.
    fn store_of(&self, table: &CaptureStoreTable, spec: &CacheSpec) -> Result<Store, StoreError> {
        let address: Address = table.url.parse()?;
        let store = open(&address, &self.env, table.timeout_s, table.retries)?;
        Ok(store.inside(&capture_folder(spec, version(&STAGE_VERSIONS, Stage::Capture))))
    }

    pub(super) fn stored_sink(
        &self,
        table: &CaptureStoreTable,
        dir: &Path,
        spec: &CacheSpec,
    ) -> Result<Sink, Error> {
        let store = self.store_of(table, spec)?;
        // What was captured into the folder of the run before is uploaded, not captured again.
        let aside = self.folder.all_aside(Stage::Capture, dir);
        let others: Vec<PathBuf> = aside.into_iter().map(|aside| aside.folder).collect();
        let same = |folder: &PathBuf| {
            let found = CacheManifest::read(folder).ok().flatten();
            found.is_some_and(|found| found.spec.difference(spec).is_none())
        };
        let others: Vec<PathBuf> = others.into_iter().filter(same).collect();
        let writer = StoredWriter::open(dir, spec, &store, &others)?;
        Ok(Sink::Stored(Box::new(writer), store))
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
            open(&address, &self.env, table.timeout_s, table.retries.min(2))?.reach()
        };
        let key = "capture.store.url";
        look().map_err(|error| at_key(error.into(), &self.origin, key))
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

    fn expect(&mut self, rows: &[usize]) {
        self.cache.expect(rows);
    }
}
