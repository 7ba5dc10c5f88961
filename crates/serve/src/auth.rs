//! Keys. They are kept and compared as hashes, so the time of a comparison tells nothing about a key.

use std::sync::Arc;

use axum::http::{HeaderMap, header};
use draftsmith_formats::hash::sha256_hex;

use crate::queue::Client;

/// A key and the name that it goes by in the queue.
#[derive(Clone)]
pub struct ApiKey {
    name: Client,
    sha256: String,
}

impl ApiKey {
    /// A named key. Two keys of one name share a line of the queue.
    pub fn new(name: &str, key: &str) -> ApiKey {
        ApiKey { name: Arc::from(name), sha256: sha256_hex(key) }
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The key that a request brings.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// The name of the key that a request brings, if it is one of these.
pub(crate) fn client_of(keys: &[ApiKey], headers: &HeaderMap) -> Option<Client> {
    let sha256 = sha256_hex(bearer(headers)?);
    keys.iter().find(|key| key.sha256 == sha256).map(|key| Arc::clone(&key.name))
}
