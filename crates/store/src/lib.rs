//! Object stores and shared folders: captures and data that are larger than the memory and the disk of one machine.
//!
//! ```text
//! capture ─ shard by shard ─► local folder ─ StoredWriter ─► store: shards, row places, manifest last
//! store ─ row by row, in the order of training ─ StoredCache ─► bounded local cache ─► training
//! ```
//! Invariant: what is used has the hash that was written with it, whatever happened on the way; what is missing or cannot be had
//! is one error that names the object. Nothing that somebody else wrote is ever removed.

mod address;
mod cached;
mod client;
mod connect;
mod error;
mod settings;
mod writer;

use draftsmith_formats::cache::CacheSpec;
use draftsmith_formats::hash::Hasher;

pub use address::{Address, BadAddress, Scheme};
pub use cached::{CacheOptions, StoredCache};
pub use client::{Asked, Object, Settings, Store};
pub use error::{Fault, StoreError};
pub use writer::{ShardUploads, StoredParts, StoredWriter};

/// Hex digits in the name of the folder of a capture.
const ID_LEN: usize = 16;

/// Name of the folder that a capture has in a store: captures of other rows, layers or targets have other ones, so one address
/// serves any number of runs, and runs that capture the same share it.
pub fn capture_folder(spec: &CacheSpec, version: u32) -> String {
    let mut hasher = Hasher::default();
    hasher.field(&version.to_le_bytes());
    for (name, value) in spec.compared() {
        hasher.field(name.as_bytes());
        hasher.field(value.as_bytes());
    }
    format!("capture-{}", &hasher.finish()[..ID_LEN])
}
