//! What was not taken from a row, and what was changed in it: nothing of a row is lost without a name.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// A change that a row came through with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Change {
    /// A blank system or developer message was left out.
    BlankSystemLeftOut,
    /// Half a surrogate pair became U+FFFD.
    SurrogateReplaced,
    /// `NaN` or `Infinity` in a field that is read became `null`.
    NotFiniteAsNull,
    /// The row's `label` says that its answer is a bad one: the answer was left out.
    RejectedAnswerLeftOut,
    /// OpenAI's old `functions` became `tools`.
    FunctionsAsTools,
    /// Messages behind the last answer train nothing and were left out.
    EndWithoutAnswerLeftOut,
    /// Answers that their message says not to train on (`weight`, `train`, `loss`).
    AnswersNotTrained,
    /// The template does not render the calls of an answer.
    CallsNotRendered,
    /// The template does not render the reasoning of an answer.
    ReasoningNotRendered,
    /// The id occurred before, so a number was added to it.
    IdRepeated,
}

impl Change {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Change::BlankSystemLeftOut => "blank_system_left_out",
            Change::SurrogateReplaced => "surrogate_replaced",
            Change::NotFiniteAsNull => "not_finite_as_null",
            Change::RejectedAnswerLeftOut => "rejected_answer_left_out",
            Change::FunctionsAsTools => "functions_as_tools",
            Change::EndWithoutAnswerLeftOut => "end_without_answer_left_out",
            Change::AnswersNotTrained => "answers_not_trained",
            Change::CallsNotRendered => "calls_not_rendered",
            Change::ReasoningNotRendered => "reasoning_not_rendered",
            Change::IdRepeated => "id_repeated",
        }
    }
}

/// What to know about a row besides itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowNotes {
    /// Keys that hold something and that nobody read.
    pub unused_keys: Vec<String>,
    /// What was changed.
    pub changes: BTreeSet<Change>,
    /// More rows that went the way of this one: the rest of a broken group of a Parquet file.
    pub rows_lost: u64,
}

/// A row's columns, and which of them were read.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'a str>>,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>) -> Fields<'a> {
        Fields { object, read: RefCell::default(), asked: RefCell::default() }
    }

    /// A column that is not null; looking at it does not count as reading it.
    pub(crate) fn peek(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// A column that is not null, as read.
    pub(crate) fn take(&self, key: &str) -> Option<&'a Value> {
        let value = self.peek(key)?;
        self.mark(key);
        Some(value)
    }

    /// A column's text, as read; other types are left alone.
    pub(crate) fn text(&self, key: &str) -> Option<&'a str> {
        let text = self.peek(key)?.as_str()?;
        self.mark(key);
        Some(text)
    }

    /// Counts a column as read.
    pub(crate) fn mark(&self, key: &str) {
        if let Some((key, _)) = self.object.get_key_value(key) {
            self.read.borrow_mut().insert(key);
        }
    }

    /// True for columns that were read, or would have been if they held something.
    pub(crate) fn concerns(&self, key: &str) -> bool {
        match self.object.get(key) {
            Some(Value::Null) | None => self.asked.borrow().contains(key),
            Some(_) => self.read.borrow().contains(key),
        }
    }

    /// Columns that hold something and were not read.
    pub(crate) fn unused(&self) -> Vec<String> {
        let read = self.read.borrow();
        let unused =
            self.object.iter().filter(|(key, value)| holds_something(value) && !read.contains(key.as_str()));
        unused.map(|(key, _)| key.clone()).collect()
    }

    /// Names of the columns that hold something, for messages.
    pub(crate) fn names(&self) -> String {
        names(self.object.iter().filter(|(_, value)| holds_something(value)).map(|(key, _)| key))
    }
}

/// False for null, and for text and lists without content.
pub(crate) fn holds_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// `` `a`, `b` ``, cut after the first dozen.
pub(crate) fn names<'k>(keys: impl Iterator<Item = &'k String>) -> String {
    let keys: Vec<String> = keys.map(|key| format!("`{}`", key.escape_debug())).collect();
    let shown = keys.iter().take(12).cloned().collect::<Vec<_>>().join(", ");
    match keys.len() {
        0 => "nothing".into(),
        1..=12 => shown,
        more => format!("{shown} and {} more", more - 12),
    }
}
