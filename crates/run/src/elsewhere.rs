//! What lies in an object store or on a shared folder, as stages find it: addresses, files of conversations, errors.
//!
//! A build without the feature `object-store` knows addresses, and says that it cannot use them.

#[cfg(feature = "object-store")]
use std::io;
use std::sync::Arc;
#[cfg(feature = "object-store")]
use std::time::Duration;

use draftsmith_core::report::Stop;
use draftsmith_data::{DataError, Ranged};
#[cfg(feature = "object-store")]
use draftsmith_formats::run::CaptureStoreTable;
use draftsmith_pull::Places;
#[cfg(feature = "object-store")]
use draftsmith_store::{Address, BadAddress, Object, Settings, Store, StoreError};
use draftsmith_train::TrainError;

use crate::error::Error;

/// What a store is asked with.
#[derive(Clone, Copy)]
pub struct Outside<'a> {
    /// Whether the network may be used.
    pub places: &'a Places,
    /// The wish to stop.
    pub stop: &'a Stop,
    /// Looks up a variable of the environment.
    pub variable: fn(&str) -> Option<String>,
}

/// A file of conversations in a store, and what the store says of its content.
pub type Found = (Arc<dyn Ranged>, String);

#[cfg(not(feature = "object-store"))]
pub(crate) fn built_without(what: &str) -> Error {
    Error::input(
        format!("{what}, but this program was built without object stores"),
        "build it with `cargo build --release --features object-store` (docs/STORE.md), or use files on this machine",
    )
}

/// Finds a file of conversations in a store.
///
/// # Errors
/// An address that is none, an object that is not there or may not be read.
#[cfg(not(feature = "object-store"))]
pub fn open_source(name: &str, _: &Outside<'_>) -> Result<Found, Error> {
    Err(built_without(&format!("`{name}` lies in a store")))
}

#[cfg(feature = "object-store")]
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

/// A client of the folder at an address.
#[cfg(feature = "object-store")]
pub(crate) fn open(
    address: &Address,
    around: &Outside<'_>,
    timeout_s: f64,
    retries: u32,
) -> Result<Store, StoreError> {
    let timeout = Duration::from_secs_f64(timeout_s);
    let variable = &around.variable;
    let (offline, stop) = (around.places.offline, around.stop.clone());
    Store::open(address, Settings { offline, variable, timeout, retries, stop })
}

/// An object of conversations.
#[cfg(feature = "object-store")]
struct Remote {
    store: Store,
    name: String,
    found: Object,
}

#[cfg(feature = "object-store")]
impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Remote").field(&self.store.address().join(&self.name)).finish()
    }
}

#[cfg(feature = "object-store")]
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
#[cfg(feature = "object-store")]
pub fn open_source(name: &str, around: &Outside<'_>) -> Result<Found, Error> {
    let address: Address = name.parse().map_err(StoreError::from)?;
    let Some((folder, name)) = address.split() else {
        let problem = "names no object, expected a file of conversations".to_string();
        return Err(StoreError::from(BadAddress { address: address.to_string(), problem }).into());
    };
    let (timeout_s, retries) = (CaptureStoreTable::default_timeout_s(), CaptureStoreTable::default_retries());
    let store = open(&folder, around, timeout_s, retries)?;
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

/// What keeps from reading a file that lies elsewhere has better words than "cannot read".
pub fn data_error(error: DataError) -> Error {
    #[cfg(feature = "object-store")]
    {
        let is_stores =
            |source: &std::io::Error| source.get_ref().is_some_and(|inner| inner.is::<StoreError>());
        match error {
            DataError::Io { source, .. } | DataError::IoAt { source, .. } if is_stores(&source) => {
                let inner = source.into_inner().and_then(|inner| inner.downcast::<StoreError>().ok());
                inner.map_or_else(|| StoreError::Stopped.into(), |inner| (*inner).into())
            }
            error => error.into(),
        }
    }
    #[cfg(not(feature = "object-store"))]
    {
        error.into()
    }
}

/// The same of rows that training asked for.
pub(crate) fn train_error(error: TrainError) -> Error {
    #[cfg(feature = "object-store")]
    if let TrainError::Rows { source } = error {
        return match source.downcast::<StoreError>() {
            Ok(error) => Error::from(*error),
            Err(source) => TrainError::Rows { source }.into(),
        };
    }
    error.into()
}
