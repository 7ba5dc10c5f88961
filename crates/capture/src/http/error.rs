//! What a server can do wrong: faults that pass, and errors that do not.

use std::path::PathBuf;
use std::time::Duration;

/// One failed attempt that is worth another.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
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
        /// How long the server wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// The connection ended in the middle.
    #[error("the answer was cut off")]
    Cut,
    /// Not what was asked for, such as the error page of a proxy.
    #[error("an answer of type `{found}` instead of `{wanted}`")]
    ContentType {
        /// The header.
        found: String,
        /// The right one.
        wanted: &'static str,
    },
    /// The answer is not in the protocol.
    #[error("an answer that cannot be read: {reason}")]
    Garbled {
        /// What is wrong with it.
        reason: String,
    },
    /// More than an answer can be.
    #[error("an answer of more than {limit} bytes")]
    TooLarge {
        /// What would have been read.
        limit: u64,
    },
    /// Nothing was said.
    #[error("an answer without a choice")]
    NoChoice,
    /// The server reported an error inside its answer.
    #[error("an error inside the answer{}", said(message))]
    Inside {
        /// Its words.
        message: String,
    },
}

fn said(message: &str) -> String {
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
            Fault::ContentType { .. } => "wrong type".to_string(),
            Fault::Garbled { .. } => "garbled".to_string(),
            Fault::TooLarge { .. } => "too large".to_string(),
            Fault::NoChoice => "without a choice".to_string(),
            Fault::Inside { .. } => "error inside".to_string(),
        }
    }
}

/// What a server cannot be asked for.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ServerError {
    /// It failed too often.
    #[error("`{url}` gave no answer for `{row}` (attempts: {attempts}); the last time: {last}")]
    GaveUp {
        /// Address of the server.
        url: String,
        /// The conversation, or what else was asked for.
        row: String,
        /// Attempts in all.
        attempts: u32,
        /// Why the last one failed.
        last: Fault,
    },
    /// It refuses the request, and would again.
    #[error("`{url}` refused `{row}` with status {status}{}", said(message))]
    Refused {
        /// Address of the server.
        url: String,
        /// The conversation, or what else was asked for.
        row: String,
        /// HTTP status.
        status: u16,
        /// What the body said.
        message: String,
    },
    /// It wants a (different) key.
    #[error("no access to `{url}`: status {status}{}", said(message))]
    NoAccess {
        /// Address of the server.
        url: String,
        /// HTTP status.
        status: u16,
        /// What the body said.
        message: String,
        /// Whether a key was sent.
        had_key: bool,
    },
    /// No model was named, and the server does not list exactly one.
    #[error("`{url}` serves {}, and the run file names no model", models_in_words(models))]
    WhichModel {
        /// Address of the server.
        url: String,
        /// Models that it lists.
        models: Vec<String>,
    },
    /// It lists another model than the other servers do.
    #[error("`{url}` serves `{found}`, but the other servers serve `{wanted}`")]
    OtherModel {
        /// Address of the server.
        url: String,
        /// The model that it lists.
        found: String,
        /// What was found before.
        wanted: String,
    },
    /// The servers list models of different names.
    #[error("the servers serve different models: {}", models_of_each(each))]
    DifferentModels {
        /// Address and model of each.
        each: Vec<(String, String)>,
    },
    /// Of several servers none can answer.
    #[error("no server is left for `{row}`: {}", in_one_line(each))]
    NoneLeft {
        /// The conversation, or what else was asked for.
        row: String,
        /// What is wrong with each server.
        each: Vec<ServerError>,
    },
    /// Several servers cannot be used, each for a reason of its own.
    #[error("{}", in_one_line(each))]
    Several {
        /// What is wrong with each.
        each: Vec<ServerError>,
    },
    /// It reads another text than training will.
    #[error("`{url}` reads {theirs} tokens in the prompt of `{row}`, but training will see {ours}")]
    OtherPrompt {
        /// Address of the server.
        url: String,
        /// The conversation.
        row: String,
        /// Tokens of our rendering.
        ours: usize,
        /// Tokens that the server counted.
        theirs: u64,
    },
    /// It answered something else than what was asked.
    #[error("`{url}` answered `{row}` with another `{field}` than asked: {found} instead of {wanted}")]
    Unexpected {
        /// Address of the server.
        url: String,
        /// What was asked for.
        row: String,
        /// The field of the answer.
        field: Box<str>,
        /// What it says.
        found: Box<str>,
        /// What it should say.
        wanted: Box<str>,
    },
    /// Its states are those of another layer.
    #[error(
        "`{url}` gave states of `{row}` that are nearest to the output of layer {found}, where layer {asked} was asked for"
    )]
    OtherLayer {
        /// Address of the server.
        url: String,
        /// The row that was compared.
        row: String,
        /// The layer asked for.
        asked: u32,
        /// The layer whose output in this process is nearest.
        found: u32,
        /// What to start the server with.
        launch: String,
    },
    /// Its states are not those of the target.
    #[error("`{url}` gave {what} of `{row}` that differ from the target here by {percent:.0} %")]
    OtherStates {
        /// Address of the server.
        url: String,
        /// The row that was compared.
        row: String,
        /// Which states.
        what: String,
        /// Mean relative difference.
        percent: f64,
    },
    /// What it wrote cannot be removed.
    #[error("`{}`, which `{url}` wrote, cannot be removed: {reason}", path.display())]
    NotRemoved {
        /// Address of the server.
        url: String,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It takes parts of the answer out of the text.
    #[error("`{url}` gave {what} beside the text of `{row}`, so what the model wrote is not known")]
    NotPlain {
        /// Address of the server.
        url: String,
        /// The conversation.
        row: String,
        /// What came.
        what: &'static str,
    },
}

fn models_of_each(each: &[(String, String)]) -> String {
    each.iter().map(|(url, model)| format!("`{url}` serves `{model}`")).collect::<Vec<_>>().join(", ")
}

fn in_one_line(each: &[ServerError]) -> String {
    each.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn models_in_words(models: &[String]) -> String {
    if models.is_empty() { "no model".to_string() } else { format!("`{}`", models.join("`, `")) }
}

/// Who asks a server, for the names of keys in hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// `[regenerate.server]`.
    Regenerate,
    /// `[capture.server]`.
    Capture,
}

impl Asker {
    fn table(self) -> &'static str {
        match self {
            Asker::Regenerate => "regenerate.server",
            Asker::Capture => "capture.server",
        }
    }

    /// The key that says how much is asked at once.
    fn at_once(self) -> &'static str {
        match self {
            Asker::Regenerate => "regenerate.batch_size",
            Asker::Capture => "capture.server.concurrency",
        }
    }
}

impl ServerError {
    /// True if the request itself was refused: it says nothing about other requests to the same server.
    pub(crate) fn is_of_the_request(&self) -> bool {
        matches!(self, ServerError::Refused { status: 400 | 413 | 414 | 422, .. })
    }

    /// What the user can do about it.
    pub fn hint(&self, asker: Asker) -> Option<String> {
        let (table, at_once) = (asker.table(), asker.at_once());
        let hint = match self {
            ServerError::GaveUp { last: Fault::NoConnection { .. }, .. } => {
                "start the server, or correct its address; the same command goes on where this stopped"
            }
            ServerError::GaveUp { last: Fault::Silence, .. } => {
                return Some(format!(
                    "raise `{table}.timeout_s` or lower `{at_once}`; the same command goes on where this stopped"
                ));
            }
            ServerError::GaveUp { .. } => {
                return Some(format!(
                    "see the server's own log; the same command goes on where this stopped, `{table}.retries` makes it \
                     more patient"
                ));
            }
            ServerError::Refused { status: 404 | 405, .. } if asker == Asker::Regenerate => {
                "the address must end before `/completions` (usually in `/v1`), and `regenerate.server.model` must be a \
                 name that the server knows"
            }
            ServerError::Refused { status: 300..=399, .. } => "give the address that the redirect names",
            ServerError::Refused { .. } if asker == Asker::Capture => {
                "docs/SERVERS.md says which server takes these requests, at which address, and how it is started"
            }
            ServerError::Refused { .. } => {
                "a context limit of the server goes into `target.max_context`, fields that it does not know out of \
                 `regenerate.server.extra`"
            }
            ServerError::NoAccess { had_key: false, .. } => {
                return Some(format!(
                    "put the key into an environment variable and its name into `{table}.key_env`"
                ));
            }
            ServerError::NoAccess { had_key: true, .. } => {
                return Some(format!("check the key in the variable that `{table}.key_env` names"));
            }
            ServerError::NoneLeft { each, .. } | ServerError::Several { each } => {
                let mut hints: Vec<String> = Vec::new();
                for hint in each.iter().filter_map(|error| error.hint(asker)) {
                    if !hints.contains(&hint) {
                        hints.push(hint);
                    }
                }
                return (!hints.is_empty()).then(|| hints.join("; "));
            }
            ServerError::OtherModel { .. } | ServerError::DifferentModels { .. } => {
                return Some(format!(
                    "leave the servers of other models out of `{table}.urls`; if it is one model under several names, \
                     start them with the same name"
                ));
            }
            ServerError::WhichModel { .. } => return Some(format!("name one with `{table}.model`")),
            ServerError::Unexpected { .. } => {
                "the server must serve the target of the run file and be started as docs/SERVERS.md says"
            }
            ServerError::OtherLayer { launch, .. } => {
                return Some(format!(
                    "start the server with {launch}, or name its layers in `capture.layers`"
                ));
            }
            ServerError::NotRemoved { .. } => {
                "give this user write permission in `capture.server.shared_dir`: files of states are removed once read"
            }
            ServerError::OtherStates { .. } => {
                "the server must serve the target of the run file; `capture.server.compare_states=false` lets it pass"
            }
            ServerError::OtherPrompt { .. } => {
                "give the server the same model and chat template; where it adds a token of its own, send \
                 `regenerate.server.api=ids`; `regenerate.server.compare_prompts=false` lets it pass"
            }
            ServerError::NotPlain { .. } => {
                "use `regenerate.server.api=text`, or start the server without reasoning and tool parsers"
            }
        };
        Some(hint.to_string())
    }
}
