//! What a store can do wrong: faults that pass, and errors that do not.

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::cache::CacheError;

use crate::address::{Address, BadAddress, Scheme};

/// One failed attempt that is worth another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No connection.
    #[error("no connection: {reason}")]
    NoConnection {
        /// What the connection said.
        reason: String,
    },
    /// Nothing came for too long.
    #[error("silence for too long")]
    Silence,
    /// A status that asks to come again.
    #[error("status {status}{}", said(message))]
    Status {
        /// HTTP status.
        status: u16,
        /// What the body said.
        message: String,
    },
    /// The connection ended in the middle.
    #[error("the answer was cut off")]
    Cut,
    /// An answer that does not fit the request.
    #[error("an answer that cannot be used: {reason}")]
    Garbled {
        /// Why not.
        reason: String,
    },
    /// Bytes that are not those that were written.
    #[error("wrong bytes: {problem}")]
    WrongBytes {
        /// How that shows.
        problem: String,
    },
}

pub(crate) fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

impl Fault {
    /// One or two words, for counts.
    pub(crate) fn kind(&self) -> String {
        match self {
            Fault::NoConnection { .. } => "no connection".to_string(),
            Fault::Silence => "silent".to_string(),
            Fault::Status { status, .. } => format!("status {status}"),
            Fault::Cut => "cut off".to_string(),
            Fault::Garbled { .. } => "garbled".to_string(),
            Fault::WrongBytes { .. } => "wrong bytes".to_string(),
        }
    }
}

/// Why a store gave or took nothing.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The text is no address.
    #[error(transparent)]
    BadAddress(#[from] BadAddress),
    /// The network is switched off.
    #[error("`{address}` is elsewhere, but the network is switched off")]
    Offline {
        /// What was to be reached.
        address: Address,
    },
    /// The variables of the environment do not make a client.
    #[error("`{address}` cannot be opened: {problem}")]
    Settings {
        /// What was to be opened.
        address: Address,
        /// What is missing or wrong.
        problem: String,
    },
    /// Nothing says who we are.
    #[error("there are no credentials for `{address}`")]
    NoCredentials {
        /// What was to be opened.
        address: Address,
        /// What was tried last.
        reason: String,
    },
    /// The store does not let us.
    #[error("no access to `{object}`: status {status}{}", said(message))]
    NoAccess {
        /// The object.
        object: Address,
        /// HTTP status.
        status: u16,
        /// What the store said.
        message: String,
    },
    /// The bucket lies in another region.
    #[error("the bucket of `{object}` is not in the region that was asked{}", other_region(region))]
    WrongRegion {
        /// The object.
        object: Address,
        /// Where it is, if the store said so.
        region: Option<String>,
    },
    /// There is no such bucket.
    #[error("the bucket of `{object}` does not exist")]
    NoBucket {
        /// The object.
        object: Address,
    },
    /// There is no such object.
    #[error("`{object}` does not exist")]
    Missing {
        /// The object.
        object: Address,
    },
    /// Somebody wrote it anew while it was read.
    #[error("`{object}` was changed while it was read")]
    Changed {
        /// The object.
        object: Address,
    },
    /// It refuses the request, and would again.
    #[error("`{object}` was refused with status {status}{}", said(message))]
    Refused {
        /// The object.
        object: Address,
        /// HTTP status.
        status: u16,
        /// What the store said.
        message: String,
    },
    /// It failed too often.
    #[error("`{object}` could not be {action} (attempts: {attempts}); the last time: {last}")]
    GaveUp {
        /// The object.
        object: Address,
        /// What was tried: `read`, `written`.
        action: &'static str,
        /// Attempts in all.
        attempts: u32,
        /// Why the last one failed.
        last: Fault,
    },
    /// A folder that does not play along.
    #[error("`{object}` could not be {action}: {reason}")]
    Folder {
        /// The file.
        object: Address,
        /// What was tried: `read`, `written`.
        action: &'static str,
        /// What the system said.
        reason: String,
        /// There was no room.
        is_full: bool,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Stopped,
    /// What lies there is no capture that can be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The local disk.
    #[error(transparent)]
    Disk(#[from] AtomicError),
}

fn other_region(region: &Option<String>) -> String {
    region.as_ref().map(|region| format!(": it is in `{region}`")).unwrap_or_default()
}

/// The variables that say who we are.
fn variables(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::S3 => {
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where there is one; AWS_SKIP_SIGNATURE=true for a public bucket)"
        }
        Scheme::Gs => {
            "GOOGLE_APPLICATION_CREDENTIALS to a file of credentials (GOOGLE_SKIP_SIGNATURE=true for a public bucket)"
        }
        Scheme::Az => "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
        Scheme::File => "nothing",
    }
}

impl StoreError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let again = "the same command goes on where this stopped";
        Some(match self {
            StoreError::BadAddress(bad) if bad.problem.contains("password") => {
                "leave it out, and set the variables of the store (docs/STORE.md names them)".to_string()
            }
            StoreError::BadAddress(_) => {
                "write `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH` or `file:///FOLDER/PATH`"
                    .to_string()
            }
            StoreError::Offline { .. } => {
                "leave `--offline` (or HF_HUB_OFFLINE) out, or use a folder: `file:///FOLDER`".to_string()
            }
            StoreError::Settings { address, .. } | StoreError::NoCredentials { address, .. } => {
                format!("set {}", variables(address.scheme))
            }
            StoreError::NoAccess { object, status, .. } if object.is_local() => {
                debug_assert_eq!(*status, 403);
                "change the permissions of the folder, or name another".to_string()
            }
            StoreError::NoAccess { object, .. } => format!(
                "check that the credentials are right and may list, read and write there; they come from {}",
                variables(object.scheme)
            ),
            StoreError::WrongRegion { region: Some(region), .. } => format!("set AWS_REGION={region}"),
            StoreError::WrongRegion { region: None, .. } => {
                "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL if it is no bucket of Amazon's".to_string()
            }
            StoreError::NoBucket { .. } => {
                "check its name (and AWS_ENDPOINT_URL, if it is no bucket of Amazon's), or make the bucket".to_string()
            }
            StoreError::Missing { object } if object.is_local() => {
                "check its name, make the folder, or mount it".to_string()
            }
            StoreError::Missing { .. } => "check bucket and name; names are told apart by upper and lower case".to_string(),
            StoreError::Changed { .. } => "run the same command again when nobody writes it any more".to_string(),
            StoreError::Refused { .. } => {
                "check the address, and the variables of the store (docs/STORE.md names them)".to_string()
            }
            StoreError::GaveUp { last: Fault::WrongBytes { .. }, .. } => {
                "what lies there is damaged: move that folder of the store away, and run the same command again"
                    .to_string()
            }
            StoreError::GaveUp { last: Fault::NoConnection { .. }, object, .. } => format!(
                "check the connection and {}; {again}",
                match object.scheme {
                    Scheme::S3 => "AWS_ENDPOINT_URL and AWS_REGION",
                    Scheme::Gs => "GOOGLE_BASE_URL",
                    Scheme::Az => "AZURE_STORAGE_ENDPOINT",
                    Scheme::File => "the folder",
                }
            ),
            StoreError::GaveUp { .. } => format!("look at the store or the connection; {again}"),
            StoreError::Folder { is_full: true, .. } => format!("free space there; {again}"),
            StoreError::Folder { .. } => format!("look at the folder, and whether it is mounted; {again}"),
            StoreError::Stopped => return None,
            StoreError::Cache(error) => return error.hint(),
            StoreError::Disk(error) => return error.hint(),
        })
    }

    /// True if the user asked for it.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, StoreError::Stopped)
    }
}
