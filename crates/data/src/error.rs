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
    /// A line that is not JSON.
    BrokenJson,
    /// A line that ends inside its row.
    CutOff,
    /// Bytes that are no UTF-8.
    InvalidUtf8,
    /// A line longer than the limit.
    LineTooLong,
    /// Rows of a Parquet file that cannot be read.
    BrokenParquet,
    /// A field of another type than it has to be.
    WrongType,
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
    /// The chat template fails on the conversation.
    TemplateFailed,
    /// A rendered answer does not continue the generation prompt.
    AnswerNotContinued,
    /// The rendered text starts with two BOS tokens.
    DoubleBos,
    /// The tokenizer refuses the text.
    NotEncodable,
    /// Another fault of rendering.
    NotRendered,
    /// No assistant message: nothing to train.
    NoAnswer,
    /// All answers say not to train on them, or nothing is left of them.
    NothingTrained,
    /// Fewer trained tokens than asked for, after cutting.
    TooFewTrainedTokens,
    /// Seen before: the same inputs, or the same token ids.
    Duplicate,
    /// The prompt is one of validation's but for case and punctuation.
    LikeValidation,
    /// Overlaps with an evaluation set.
    Contaminated,
}

impl DropReason {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::NotAConversation => "not_a_conversation",
            DropReason::BrokenJson => "broken_json",
            DropReason::CutOff => "cut_off",
            DropReason::InvalidUtf8 => "invalid_utf8",
            DropReason::LineTooLong => "line_too_long",
            DropReason::BrokenParquet => "broken_parquet",
            DropReason::WrongType => "wrong_type",
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
            DropReason::TemplateFailed => "template_failed",
            DropReason::AnswerNotContinued => "answer_not_continued",
            DropReason::DoubleBos => "double_bos",
            DropReason::NotEncodable => "not_encodable",
            DropReason::NotRendered => "not_rendered",
            DropReason::NoAnswer => "no_answer",
            DropReason::NothingTrained => "nothing_trained",
            DropReason::TooFewTrainedTokens => "too_few_trained_tokens",
            DropReason::Duplicate => "duplicate",
            DropReason::LikeValidation => "like_validation",
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
    /// The line ends before the row does.
    #[error("the line ends inside the row ({detail})")]
    CutOff {
        /// What the parser said.
        detail: String,
    },
    /// Not UTF-8.
    #[error("byte {at} is not UTF-8")]
    InvalidUtf8 {
        /// The first such byte, from 1.
        at: usize,
    },
    /// A line is longer than allowed.
    #[error("the line is longer than {limit} bytes")]
    LineTooLong {
        /// The limit.
        limit: usize,
    },
    /// The Parquet reader gave up on a group of rows.
    #[error("broken Parquet: {detail}")]
    BrokenParquet {
        /// What the reader said.
        detail: String,
    },
    /// Not an object.
    #[error("the row is not a JSON object")]
    NotAnObject,
    /// No known field.
    #[error("none of the row's columns ({columns}) holds a conversation, a prompt or tokens")]
    NoConversation {
        /// Their names.
        columns: String,
    },
    /// Text without roles where a list of messages is wanted.
    #[error("`{field}` is one text, not a list of messages")]
    PlainText {
        /// The field.
        field: &'static str,
    },
    /// One message, not a conversation.
    #[error("the row is one message ({columns}), not a conversation")]
    OneMessage {
        /// Names of its columns.
        columns: String,
    },
    /// A field of the wrong type.
    #[error("`{field}` is not {wanted}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A message without a role.
    #[error("message {at} has neither `role` nor `from`, but {found}")]
    NoRole {
        /// Index of the message.
        at: usize,
        /// The fields it has.
        found: String,
    },
    /// A switch of a message (train it or not) that is none.
    #[error("message {at}: `{field}` is {found}, not 0 or 1, true or false")]
    BadSwitch {
        /// Index of the message.
        at: usize,
        /// The field.
        field: &'static str,
        /// What it is.
        found: String,
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
    #[error("message {at}: the `{role}` message is blank{unread}")]
    BlankMessage {
        /// Index of the message.
        at: usize,
        /// Its role.
        role: String,
        /// Fields that hold something and are not read as its text, in words; empty if there are none.
        unread: String,
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
    /// Nothing to train.
    #[error("the conversation has no assistant message, so it has zero trained tokens")]
    NoAnswer,
    /// All answers are excluded, or nothing is left of them.
    #[error(
        "no answer of the conversation can be trained: each says not to, or is nothing but calls that the template leaves out"
    )]
    NothingTrained,
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
            RowError::BrokenJson { .. } => DropReason::BrokenJson,
            RowError::CutOff { .. } => DropReason::CutOff,
            RowError::InvalidUtf8 { .. } => DropReason::InvalidUtf8,
            RowError::LineTooLong { .. } => DropReason::LineTooLong,
            RowError::BrokenParquet { .. } => DropReason::BrokenParquet,
            RowError::NotAnObject
            | RowError::NoConversation { .. }
            | RowError::PlainText { .. }
            | RowError::OneMessage { .. } => DropReason::NotAConversation,
            RowError::WrongType { .. } => DropReason::WrongType,
            RowError::BadMessage { .. } | RowError::NoRole { .. } | RowError::BadSwitch { .. } => {
                DropReason::BadMessage
            }
            RowError::Empty => DropReason::Empty,
            RowError::StartsWithAssistant => DropReason::StartsWithAssistant,
            RowError::WrongOrder { .. } => DropReason::WrongOrder,
            RowError::UnknownRole { .. } => DropReason::UnknownRole,
            RowError::BlankMessage { .. } => DropReason::BlankMessage,
            RowError::BadTokens { .. } => DropReason::BadTokens,
            RowError::TokenOutOfVocabulary { .. } => DropReason::TokenOutOfVocabulary,
            RowError::SpecialTokenInText { .. } => DropReason::SpecialTokenInText,
            RowError::TemplateRefused { .. } => DropReason::TemplateRefused,
            RowError::NoAnswer => DropReason::NoAnswer,
            RowError::NothingTrained => DropReason::NothingTrained,
            RowError::TooFewTrainedTokens { .. } => DropReason::TooFewTrainedTokens,
        }
    }

    /// Advice for the user.
    fn hint(&self) -> String {
        let repair = match self {
            RowError::NoAnswer => "let the target answer the prompts first (`regenerate.enabled = true`)",
            RowError::TooFewTrainedTokens { .. } => {
                return "raise `data.max_length`, lower `data.min_trained_tokens`, or set `data.strict = false` to drop such rows"
                    .into();
            }
            RowError::NothingTrained => "set the `weight` of an answer to 1, or remove the row",
            RowError::TokenOutOfVocabulary { .. } => "the row was made with another tokenizer: make it again",
            RowError::BrokenJson { .. } => "every line has to be one JSON object; repair or remove the line",
            RowError::CutOff { .. } => {
                "one line holds one whole row (or the file is one JSON array); write the file again, or remove the line"
            }
            RowError::InvalidUtf8 { .. } => "write the file as UTF-8, or remove the line",
            RowError::LineTooLong { .. } => {
                "one line holds one conversation; check that the file is JSON Lines"
            }
            RowError::BrokenParquet { .. } => "fetch or write the file again",
            RowError::NoConversation { .. } => {
                "rename the columns: the list of messages to `messages`, or the prompt to `prompt` and its answer to \
                 `completion`"
            }
            RowError::PlainText { .. } => {
                "split the text into `messages` with a `role` and a `content` each; text without roles is not read"
            }
            RowError::OneMessage { .. } => {
                "put the messages of one conversation into one row, as a list `messages`"
            }
            RowError::NoRole { .. } => {
                "rename the field that says who speaks to `role`, and the one with the text to `content`"
            }
            RowError::BadSwitch { .. } => "write 1 to train the answer and 0 not to",
            RowError::BlankMessage { unread, .. } if !unread.is_empty() => {
                "rename the field that holds the message's text to `content`, or remove the row"
            }
            RowError::UnknownRole { .. } => {
                "rename the role to `system`, `user`, `assistant` or `tool`, or remove the row"
            }
            RowError::SpecialTokenInText { .. } => {
                "take the control token out of the text, or remove the row"
            }
            _ => "repair or remove the row",
        };
        format!("{repair}; with `data.strict = false` such rows are dropped and counted")
    }
}

/// Under which name a row is counted that cannot be rendered or tokenised; `None` if the fault is not the row's.
pub(crate) fn text_reason(error: &TextError) -> Option<DropReason> {
    Some(match error {
        TextError::TemplateRaised { .. } => DropReason::TemplateRefused,
        TextError::TemplateRender { .. } => DropReason::TemplateFailed,
        TextError::AnswerNotContinued { .. } => DropReason::AnswerNotContinued,
        TextError::DoubleBos { .. } => DropReason::DoubleBos,
        TextError::Encode { .. } => DropReason::NotEncodable,
        TextError::TokenizerJson { .. }
        | TextError::UnsupportedDecoder { .. }
        | TextError::UnsupportedModel { .. }
        | TextError::UnsupportedPre { .. }
        | TextError::NoGgufForm { .. }
        | TextError::BadGguf { .. }
        | TextError::ConfigJson { .. }
        | TextError::TemplateSyntax { .. } => return None,
        // Kinds of a later version: they come from rendering this row.
        _ => DropReason::NotRendered,
    })
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
    /// A JSON array that is broken as a whole.
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
    /// Too much of a JSON array.
    #[error("`{}` is a JSON array of more than {limit} bytes", path.display())]
    ArrayTooLong {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// A file that holds no rows we can read.
    #[error("`{}` is {what}", path.display())]
    UnknownFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do with it.
        advice: &'static str,
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
                "the file starts as one JSON array and has to be one; write it again, or as JSON Lines".into()
            }
            DataError::ArrayTooLong { .. } => "write the rows as JSON Lines: one object per line".into(),
            DataError::UnknownFile { advice, .. } => (*advice).into(),
            DataError::BadRow { problem, .. } => problem.hint(),
            DataError::Parquet { .. } => {
                "fetch the file again; read files are Parquet with snappy, zstd or gzip".into()
            }
            DataError::Text { source, .. } => {
                let advice = source.hint().unwrap_or_else(|| "remove the row".into());
                match text_reason(source) {
                    Some(_) => format!("{advice}; with `data.strict = false` such rows are dropped and counted"),
                    None => advice,
                }
            }
            DataError::NoRows { .. } => {
                "look at the reasons: `draftsmith data preview FILE --target REF --row N` says what is wrong with a row".into()
            }
        })
    }
}
