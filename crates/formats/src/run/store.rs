//! `[capture.store]`: a capture that lies in an object store or on a shared folder.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Broken, at_most, broken_with, number, positive};
use super::{CaptureMode, RunFile};

/// An object store, or a folder that several machines see, that captured states go to; docs/STORE.md tells more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptureStoreTable {
    /// Where: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH` or `file:///FOLDER`. Keys and endpoints come from
    /// the usual variables of the environment.
    pub url: String,
    /// Bytes of the local cache that each process trains from. Default: half of what is free on its disk, at most 16 GiB.
    #[serde(default)]
    pub cache_bytes: Option<u64>,
    /// Folder of that cache. Default: in the folder of the run.
    #[serde(default)]
    pub cache_dir: Option<PathBuf>,
    /// Rows fetched ahead at once.
    #[serde(default = "CaptureStoreTable::default_readers")]
    pub readers: u32,
    /// Seconds of silence after which a request is repeated.
    #[serde(default = "CaptureStoreTable::default_timeout_s")]
    pub timeout_s: f64,
    /// How often a request is repeated before the run stops: after silence, 429, 5xx, cut and broken answers.
    #[serde(default = "CaptureStoreTable::default_retries")]
    pub retries: u32,
}

impl CaptureStoreTable {
    fn default_readers() -> u32 {
        4
    }

    /// Seconds of silence, for requests of other tables too.
    pub fn default_timeout_s() -> f64 {
        60.0
    }

    /// Repetitions, for requests of other tables too.
    pub fn default_retries() -> u32 {
        8
    }
}

impl RunFile {
    pub(super) fn check_store(&self) -> Result<(), Broken> {
        let Some(store) = &self.capture.store else { return Ok(()) };
        let key = |name: &str| format!("capture.store.{name}");
        if self.capture.mode == CaptureMode::Online {
            let advice = "leave `[capture.store]` out, or set `capture.mode = \"cache\"`";
            return broken_with(
                "capture.store",
                "is set, but `capture.mode = \"online\"` stores nothing",
                advice,
            );
        }
        // The run file is kept beside the results and goes into the bundle.
        let place = store.url.split_once("://").map_or(store.url.as_str(), |(_, place)| place);
        if place.split('/').next().is_some_and(|bucket| bucket.contains('@')) {
            return broken_with(
                &key("url"),
                "holds a user name or password",
                "leave it out, and set the variables of the store (docs/STORE.md names them)",
            );
        }
        if let Some(bytes) = store.cache_bytes {
            positive(&key("cache_bytes"), bytes)?;
        }
        positive(&key("readers"), u64::from(store.readers))?;
        at_most(&key("readers"), u64::from(store.readers), 64)?;
        let seconds = store.timeout_s;
        let wanted = "seconds above 0, at most a day";
        number(&key("timeout_s"), seconds, seconds > 0.0 && seconds <= 86_400.0, wanted)?;
        at_most(&key("retries"), u64::from(store.retries), 100)
    }
}
