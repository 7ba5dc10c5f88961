//! Why nothing was put on a hub, and what to do about it.

use std::path::PathBuf;

use draftsmith_formats::atomic::AtomicError;

/// Why a push did not end well. Files that were sent before are kept by the hub and not sent again.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Nobody is allowed to write without one.
    #[error("a push to `{endpoint}` needs an access token, and none is set")]
    NoToken {
        /// Base address of the hub.
        endpoint: String,
    },
    /// The network is switched off.
    #[error("`push` needs the network, and it is switched off")]
    Offline,
    /// The connection could not be made, or broke.
    #[error("the connection to `{host}` failed while it was to {step}: {reason}")]
    Unreachable {
        /// Base address.
        host: String,
        /// What was being done.
        step: String,
        /// What the connection said.
        reason: String,
    },
    /// The server refuses.
    #[error("the server answered {status} when it was to {step}{}", said_text(said))]
    Status {
        /// HTTP status.
        status: u16,
        /// What was being done.
        step: String,
        /// What the server said about it, if anything.
        said: String,
        /// `ORG/NAME`.
        repo: String,
        /// Base address of the hub.
        endpoint: String,
    },
    /// An answer of no use.
    #[error("the server's answer makes no sense when it was to {step}: {reason}")]
    BadAnswer {
        /// What was being done.
        step: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The hub does not want one of the files.
    #[error("the server refuses `{path}`: {said}")]
    Refused {
        /// Path inside the bundle.
        path: String,
        /// What it said.
        said: String,
    },
    /// The repository is told to leave a file out.
    #[error("repository `{repo}` ignores `{path}` by its `.gitignore`, and a bundle without it is none")]
    Ignored {
        /// `ORG/NAME`.
        repo: String,
        /// Path inside the bundle.
        path: String,
    },
    /// The repository stands open.
    #[error("everybody may read repository `{repo}`, but `--private` was asked for: nothing was sent")]
    NotPrivate {
        /// `ORG/NAME`.
        repo: String,
    },
    /// A file on this disk that is not what the bundle lists.
    #[error("`{}` {problem}", path.display())]
    WrongFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The user pressed Ctrl-C.
    #[error("the push to `{repo}` was interrupted: nothing was committed")]
    Interrupted {
        /// `ORG/NAME`.
        repo: String,
    },
    /// The disk does not play along.
    #[error(transparent)]
    Disk(#[from] AtomicError),
}

fn said_text(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

impl PushError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            PushError::NoToken { endpoint } => format!(
                "make a token that may write at {endpoint}/settings/tokens and set HF_TOKEN to it (or HF_TOKEN_PATH to a \
                 file with it; `hf auth login` leaves one in ~/.cache/huggingface/token)"
            ),
            PushError::Offline => {
                "leave out --offline (or unset HF_HUB_OFFLINE), or see with `--dry-run` what would be sent".into()
            }
            PushError::Unreachable { step, .. } if step.starts_with("commit") => {
                "whether the commit was made is not known: run the same command again, which sends only what is not there"
                    .into()
            }
            PushError::Unreachable { .. } => {
                "check the connection (proxies are read from HTTPS_PROXY) and HF_ENDPOINT, and run the same command again: \
                 nothing was committed, and what was sent whole is not sent again"
                    .into()
            }
            PushError::Status { status: 401, endpoint, .. } => format!(
                "the token is wrong or has expired: make one that may write at {endpoint}/settings/tokens and set HF_TOKEN"
            ),
            PushError::Status { status: 403, repo, endpoint, .. } => format!(
                "the token may not write to `{repo}`: give it write access at {endpoint}/settings/tokens, or push to a name \
                 of your own"
            ),
            PushError::Status { status: 404, repo, .. } => format!(
                "check that `{repo}` and the branch behind `@` exist and that the token may see them; HF_ENDPOINT must be \
                 the address of a hub"
            ),
            PushError::Status { status: 409 | 412, .. } => {
                "the repository was changed at the same time: look at it, and run the same command again".into()
            }
            PushError::Status { status: 413, .. } => {
                "the hub finds it too large: leave out what a draft does not need (`bundle card DIR --record FILE` keeps \
                 the records that you name), or ask for more room"
                    .into()
            }
            PushError::Status { status: 429, .. } => {
                "wait some minutes, and run the same command again: what was sent whole is not sent again".into()
            }
            PushError::Status { status: 500.., .. } => {
                "the hub has trouble: run the same command again later; what was sent whole is not sent again".into()
            }
            PushError::Status { .. } | PushError::BadAnswer { .. } => {
                "check that HF_ENDPOINT is the address of a hub, and run the same command again".into()
            }
            PushError::Refused { .. } => "change what the server names, and run the same command again".into(),
            PushError::Ignored { .. } => {
                "take the line out of the repository's `.gitignore`, or push to another repository".into()
            }
            PushError::NotPrivate { repo } => format!(
                "make it private in its settings, leave `--private` out, or push to another name than `{repo}`"
            ),
            PushError::WrongFile { .. } => {
                "make the bundle again, or get it again: `draftsmith bundle check` shows all that is wrong with it".into()
            }
            PushError::Interrupted { .. } => {
                "run the same command again: what was sent whole is not sent again".into()
            }
            PushError::Disk(error) => return error.hint(),
        })
    }

    /// True if the user asked for it.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, PushError::Interrupted { .. })
    }
}
