//! What can go wrong between a file and a row of tokens.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_text::{MessageError, TextError};

/// Where a row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: Arc<Path>,
    /// Line, or row where the format has no lines; from 1.
    pub number: u64,
    /// `number` is a line.
    pub is_line: bool,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.is_line { "line" } else { "row" };
        write!(f, "`{}`, {unit} {}", self.path.display(), self.number)
    }
}

/// Why a row is not trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// Not an object, or no field that holds a conversation, a prompt or tokens.
    NotAConversation,
    /// A message that is not one (no role, wrong type, not text).
    BadMessage,
    /// No messages.
    Empty,
    /// An assistant speaks before any user.
    StartsWithAssistant,
    /// Roles in an order that no chat has.
    WrongOrder,
    /// A role other than system, user, assistant, tool.
    UnknownRole,
    /// A message without text.
    BlankMessage,
    /// Pre-tokenised row whose lists do not fit together.
    BadTokens,
    /// Pre-tokenised row with an id that the target does not have.
    TokenOutOfVocabulary,
    /// A control token is written out in a message.
    SpecialTokenInText,
    /// The chat template refuses the conversation.
    TemplateRefused,
    /// What the model was asked and wrote does not follow from the rendered answer.
    AnswerNotContinued,
    /// No assistant message: nothing to train.
    NoAnswer,
    /// Fewer trained tokens than asked for, after cutting.
    TooFewTrainedTokens,
    /// Seen before.
    Duplicate,
    /// Overlaps with an evaluation set.
    Contaminated,
}

impl DropReason {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::NotAConversation => "not_a_conversation",
            DropReason::BadMessage => "bad_message",
            DropReason::Empty => "empty",
            DropReason::StartsWithAssistant => "starts_with_assistant",
            DropReason::WrongOrder => "wrong_order",
            DropReason::UnknownRole => "unknown_role",
            DropReason::BlankMessage => "blank_message",
            DropReason::BadTokens => "bad_tokens",
            DropReason::TokenOutOfVocabulary => "token_out_of_vocabulary",
            DropReason::SpecialTokenInText => "special_token_in_text",
            DropReason::TemplateRefused => "template_refused",
            DropReason::AnswerNotContinued => "answer_not_continued",
            DropReason::NoAnswer => "no_answer",
            DropReason::TooFewTrainedTokens => "too_few_trained_tokens",
            DropReason::Duplicate => "duplicate",
            DropReason::Contaminated => "contaminated",
        }
    }
}

/// What is wrong with one row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// Not JSON.
    #[error("broken JSON at column {column}: {detail}")]
    BrokenJson {
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        detail: String,
    },
    /// Not an object.
    #[error("the row is not a JSON object")]
    NotAnObject,
    /// No known field.
    #[error("the row has none of `messages`, `conversations`, `turns`, `prompt`, `input_ids`")]
    NoConversation,
    /// A field of the wrong type.
    #[error("`{field}` is not {wanted}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A message that is not one.
    #[error("message {at}: {problem}")]
    BadMessage {
        /// Index of the message.
        at: usize,
        /// What is wrong with it.
        problem: MessageError,
    },
    /// No messages.
    #[error("the conversation is empty")]
    Empty,
    /// An assistant speaks first.
    #[error("the conversation starts with an assistant message")]
    StartsWithAssistant,
    /// Roles in the wrong order.
    #[error("message {at}: a `{role}` message cannot follow {after}")]
    WrongOrder {
        /// Index of the message.
        at: usize,
        /// Its role.
        role: String,
        /// What stands before it.
        after: String,
    },
    /// An unknown role.
    #[error("message {at}: unknown role `{role}`")]
    UnknownRole {
        /// Index of the message.
        at: usize,
        /// The role.
        role: String,
    },
    /// A message without text.
    #[error("message {at}: the `{role}` message is blank")]
    BlankMessage {
        /// Index of the message.
        at: usize,
        /// Its role.
        role: String,
    },
    /// Pre-tokenised lists that do not fit together.
    #[error("{detail}")]
    BadTokens {
        /// What does not fit.
        detail: String,
    },
    /// An id that the target does not have.
    #[error("`input_ids[{at}]` is {id}, but the target has {vocab} tokens")]
    TokenOutOfVocabulary {
        /// Position.
        at: usize,
        /// The id.
        id: u32,
        /// Vocabulary of the target.
        vocab: usize,
    },
    /// A control token in a message.
    #[error("message {at}: the text holds the control token `{token}`")]
    SpecialTokenInText {
        /// Index of the message.
        at: usize,
        /// The token.
        token: String,
    },
    /// The template refuses the conversation.
    #[error("chat template refuses the conversation: {message}")]
    TemplateRefused {
        /// The template's words.
        message: String,
    },
    /// The rendered answer does not continue the generation prompt, and what the model wrote does not follow from it.
    #[error(
        "message {turn}: the rendered answer does not continue the generation prompt (prompt ends {prompt:?}, \
         rendered {rendered:?})"
    )]
    AnswerNotContinued {
        /// Index of the assistant message.
        turn: usize,
        /// End of the generation prompt, from where the two differ.
        prompt: String,
        /// What the rendered conversation has there.
        rendered: String,
    },
    /// Nothing to train.
    #[error("the conversation has no assistant message, so it has zero trained tokens")]
    NoAnswer,
    /// Too little to train.
    #[error("the row has {found} trained tokens, at least {wanted} are asked for")]
    TooFewTrainedTokens {
        /// Trained tokens after cutting.
        found: usize,
        /// The minimum.
        wanted: usize,
    },
}

impl RowError {
    /// Under which name the row is counted.
    pub fn reason(&self) -> DropReason {
        match self {
            RowError::BrokenJson { .. }
            | RowError::NotAnObject
            | RowError::NoConversation
            | RowError::WrongType { .. } => DropReason::NotAConversation,
            RowError::BadMessage { .. } => DropReason::BadMessage,
            RowError::Empty => DropReason::Empty,
            RowError::StartsWithAssistant => DropReason::StartsWithAssistant,
            RowError::WrongOrder { .. } => DropReason::WrongOrder,
            RowError::UnknownRole { .. } => DropReason::UnknownRole,
            RowError::BlankMessage { .. } => DropReason::BlankMessage,
            RowError::BadTokens { .. } => DropReason::BadTokens,
            RowError::TokenOutOfVocabulary { .. } => DropReason::TokenOutOfVocabulary,
            RowError::SpecialTokenInText { .. } => DropReason::SpecialTokenInText,
            RowError::TemplateRefused { .. } => DropReason::TemplateRefused,
            RowError::AnswerNotContinued { .. } => DropReason::AnswerNotContinued,
            RowError::NoAnswer => DropReason::NoAnswer,
            RowError::TooFewTrainedTokens { .. } => DropReason::TooFewTrainedTokens,
        }
    }
}

/// An error of this crate. Messages state the fact; [`DataError::hint`] gives the advice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system or the decompressor said.
        source: std::io::Error,
    },
    /// Reading stopped inside the file.
    #[error("cannot read {location}: {source}")]
    IoAt {
        /// Where.
        location: Location,
        /// What the operating system or the decompressor said.
        source: std::io::Error,
    },
    /// A line is not JSON.
    #[error("`{}`: broken JSON at line {line}, column {column}: {detail}", path.display())]
    BrokenJson {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        detail: String,
    },
    /// A line is longer than allowed.
    #[error("{location} is longer than {limit} bytes")]
    LineTooLong {
        /// Where.
        location: Location,
        /// The limit.
        limit: usize,
    },
    /// A row that strict mode does not let pass.
    #[error("{location}: {problem}")]
    BadRow {
        /// Where.
        location: Location,
        /// What is wrong.
        problem: RowError,
    },
    /// The Parquet reader gave up.
    #[error("`{}`: broken Parquet at row {row}: {detail}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Row, from 1; 0 in the file's metadata.
        row: u64,
        /// What the reader said.
        detail: String,
    },
    /// The conversation cannot be rendered or tokenised.
    #[error("{location}: {source}")]
    Text {
        /// Where.
        location: Location,
        /// What is wrong.
        source: TextError,
    },
    /// No row came out.
    #[error("no row of {files} is left ({dropped})")]
    NoRows {
        /// The files.
        files: String,
        /// Counts by reason.
        dropped: String,
    },
}

impl DataError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            DataError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "check the path; it is taken relative to where the command runs".into()
            }
            DataError::Io { .. } | DataError::IoAt { .. } => {
                "the file is damaged or cut short; fetch or write it again".into()
            }
            DataError::BrokenJson { .. } => {
                "every line has to be one JSON object; repair or remove the line".into()
            }
            DataError::LineTooLong { .. } => {
                "one line holds one conversation; check that the file is JSON Lines".into()
            }
            DataError::BadRow { problem, .. } => match problem {
                RowError::NoAnswer => "let the target answer the prompts first (`regenerate`)".into(),
                RowError::TooFewTrainedTokens { .. } => {
                    "raise `data.max_length`, lower `data.min_trained_tokens`, or leave strict mode".into()
                }
                RowError::TokenOutOfVocabulary { .. } => "the row was made with another tokenizer".into(),
                _ => "repair or remove the row; without strict mode such rows are dropped and counted".into(),
            },
            DataError::Parquet { .. } => {
                "fetch the file again; read files are Parquet with snappy, zstd or gzip".into()
            }
            DataError::Text { source, .. } => return source.hint(),
            DataError::NoRows { .. } => {
                "look at the reasons; `draftsmith data preview` shows single rows".into()
            }
        })
    }
}
