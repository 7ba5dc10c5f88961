//! One row of a data set, in any of the shapes that data sets have.

use draftsmith_text::{MaskOptions, Message};
use serde_json::{Map, Value, json};

use crate::json::{self, Repairs};
use crate::notes::{Change, Fields, RowNotes, holds_something, names};
use crate::{Location, RowError, shape};

/// A conversation, with or without answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The data set's id, if it has one.
    pub id: Option<String>,
    /// Domain for reports.
    pub domain: Option<String>,
    /// Data set the row comes from.
    pub source: Option<String>,
    /// Licence of the row.
    pub license: Option<String>,
    /// The turns. Without an assistant turn they are prompts for the target, to be answered one by one.
    pub messages: Vec<Message>,
    /// Tool descriptions.
    pub tools: Option<Value>,
    /// More variables for the chat template (`chat_template_kwargs`).
    pub kwargs: Map<String, Value>,
    /// The last answer hit a token limit (`finish_reason` is `length`): its end is not trained.
    pub last_answer_cut: bool,
}

impl Conversation {
    /// True if there is something to train on as it is.
    pub fn has_answer(&self) -> bool {
        self.messages.iter().any(|m| m.role == "assistant")
    }

    /// The options of a run with what this row adds to them: tools, template variables, a cut answer.
    pub fn mask_options(&self, run: &MaskOptions) -> MaskOptions {
        let mut options = run.clone();
        if self.tools.is_some() {
            options.render.tools.clone_from(&self.tools);
        }
        options.render.kwargs.extend(self.kwargs.clone());
        options.last_answer_cut |= self.last_answer_cut;
        options
    }

    /// The words that make two prompts alike: user, system and tool turns.
    pub(crate) fn prompt_text(&self) -> String {
        let turns: Vec<&str> =
            self.messages.iter().filter(|m| m.role != "assistant").map(|m| m.content.as_str()).collect();
        turns.join("\n")
    }

    /// Everything that the rendered conversation (or, without its answers, the rendered prompts) depends on.
    pub(crate) fn inputs(&self, with_answers: bool) -> Value {
        let messages: Vec<&Message> =
            self.messages.iter().filter(|m| with_answers || m.role != "assistant").collect();
        json!([messages, self.tools, self.kwargs, with_answers && self.last_answer_cut])
    }
}

/// A row that is tokens already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRow {
    /// The data set's id, if it has one.
    pub id: Option<String>,
    /// Domain for reports.
    pub domain: Option<String>,
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` true where the token is trained.
    pub loss_mask: Vec<bool>,
}

impl TokenRow {
    /// Number of trained tokens.
    pub fn trained_tokens(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }
}

/// A row.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// Text.
    Conversation(Conversation),
    /// Tokens.
    Tokens(TokenRow),
}

impl Row {
    /// The data set's id, if it has one.
    pub fn id(&self) -> Option<&str> {
        match self {
            Row::Conversation(row) => row.id.as_deref(),
            Row::Tokens(row) => row.id.as_deref(),
        }
    }

    /// Domain for reports; `unnamed` where the data set gives none.
    pub fn domain(&self) -> &str {
        match self {
            Row::Conversation(row) => row.domain.as_deref(),
            Row::Tokens(row) => row.domain.as_deref(),
        }
        .unwrap_or("unnamed")
    }
}

/// A row and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct LocatedRow {
    /// The row.
    pub row: Row,
    /// Where it stands.
    pub location: Location,
    /// 0 for the row itself, then one more for each repetition that a weight above 1 asks for.
    pub repeat: u32,
}

impl LocatedRow {
    /// The row's id; its place where the data set gives none.
    pub fn id(&self) -> String {
        let id = self.row.id();
        let name =
            self.location.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let id = id.map_or_else(|| format!("{name}:{}", self.location.number), str::to_owned);
        if self.repeat == 0 { id } else { format!("{id}#{}", self.repeat + 1) }
    }

    /// Domain for reports.
    pub fn domain(&self) -> &str {
        self.row.domain()
    }
}

/// Reads one line of JSON in any of the shapes that docs/DATA.md lists, or pre-tokenised `input_ids` with `loss_mask` or
/// `labels`. The conversation is checked: order of roles, blank messages.
///
/// # Errors
/// [`RowError`]; never panics.
pub fn parse_conversation_line(line: &[u8]) -> Result<Row, RowError> {
    parse_line(line, &mut RowNotes::default())
}

/// [`parse_conversation_line`], and what to know about the row.
pub(crate) fn parse_line(line: &[u8], notes: &mut RowNotes) -> Result<Row, RowError> {
    // Files that were put together may have a mark of UTF-8 in their middle.
    let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii_end();
    let (value, repairs) = json::parse(line)?;
    parse_row(&value, &repairs, notes)
}

pub(crate) fn parse_row(value: &Value, repairs: &Repairs, notes: &mut RowNotes) -> Result<Row, RowError> {
    let object = value.as_object().ok_or(RowError::NotAnObject)?;
    let fields = Fields::new(object);
    let row = match fields.peek("input_ids") {
        Some(_) => tokens(&fields).map(Row::Tokens),
        None => conversation(&fields, notes).map(Row::Conversation),
    }?;
    if repairs.not_finite.iter().any(|key| fields.concerns(key)) {
        notes.changes.insert(Change::NotFiniteAsNull);
    }
    if repairs.surrogates.iter().any(|key| fields.concerns(key)) {
        notes.changes.insert(Change::SurrogateReplaced);
    }
    notes.unused_keys.extend(fields.unused());
    Ok(row)
}

fn conversation(fields: &Fields<'_>, notes: &mut RowNotes) -> Result<Conversation, RowError> {
    let mut row = Conversation {
        id: id_of(fields),
        domain: domain_of(fields),
        source: fields.text("source").map(str::to_owned),
        license: fields.text("license").map(str::to_owned),
        last_answer_cut: was_cut(fields),
        tools: tools(fields, notes)?,
        ..Conversation::default()
    };
    if let Some(kwargs) = fields.take("chat_template_kwargs") {
        let wrong = RowError::WrongType { field: "chat_template_kwargs", wanted: "an object" };
        row.kwargs = match kwargs {
            Value::String(text) if text.trim().is_empty() => Map::new(),
            // Data sets in columns store objects as text.
            Value::String(text) => serde_json::from_str(text).map_err(|_| wrong)?,
            other => other.as_object().cloned().ok_or(wrong)?,
        };
    }
    row.messages = shape::messages(fields, notes)?;
    let is_blank_system = |m: &Message| {
        is_system(&m.role)
            && m.content.trim().is_empty()
            && m.name.is_none()
            && !m.extra.values().any(holds_something)
    };
    let before = row.messages.len();
    row.messages.retain(|m| !is_blank_system(m));
    if row.messages.len() < before {
        notes.changes.insert(Change::BlankSystemLeftOut);
    }
    for key in ["system", "system_prompt", "system_message"] {
        let system = match fields.peek(key) {
            None => continue,
            Some(Value::String(system)) if !system.trim().is_empty() => system,
            Some(Value::String(_)) => {
                fields.mark(key);
                continue;
            }
            Some(_) => return Err(RowError::WrongType { field: key, wanted: "a string" }),
        };
        match row.messages.first().filter(|m| is_system(&m.role)) {
            None => {
                row.messages.insert(0, Message::new("system", system.as_str()));
                fields.mark(key);
            }
            // Said twice, used once; another text stays unused and is counted.
            Some(first) if first.content.trim() == system.trim() => fields.mark(key),
            Some(_) => {}
        }
    }
    check(&row.messages)?;
    Ok(row)
}

/// True for the roles that speak before a user does.
pub(crate) fn is_system(role: &str) -> bool {
    matches!(role, "system" | "developer")
}

fn id_of(fields: &Fields<'_>) -> Option<String> {
    let keys = ["id", "prompt_id", "uuid", "question_id", "conversation_id", "conversation_hash"];
    keys.iter().find_map(|key| {
        let id = match fields.peek(key) {
            Some(Value::String(id)) if !id.is_empty() => id.clone(),
            Some(Value::Number(id)) => id.to_string(),
            _ => return None,
        };
        fields.mark(key);
        Some(id)
    })
}

fn domain_of(fields: &Fields<'_>) -> Option<String> {
    fields.text("domain").or_else(|| fields.text("category")).map(str::to_owned)
}

/// What ended the last answer, by the words of servers; other words stay unread.
fn was_cut(fields: &Fields<'_>) -> bool {
    let Some(Value::String(reason)) = fields.peek("finish_reason") else { return false };
    let cut = match reason.to_lowercase().as_str() {
        // Something other than the model's own end of turn.
        "length" | "max_tokens" | "model_length" | "max_output_tokens" | "content_filter" | "abort"
        | "error" | "cancelled" | "stop_sequence" => true,
        "" | "stop" | "end_turn" | "eos" | "eos_token" | "tool_calls" | "tool_use" | "function_call" => false,
        _ => return false,
    };
    fields.mark("finish_reason");
    cut
}

/// `tools`, or OpenAI's old `functions`; as a list or as JSON in a string, whole or item by item.
fn tools(fields: &Fields<'_>, notes: &mut RowNotes) -> Result<Option<Value>, RowError> {
    let read = |key: &'static str| -> Result<Option<Vec<Value>>, RowError> {
        let wrong = || RowError::WrongType { field: key, wanted: "a list, or JSON of one in a string" };
        let Some(value) = fields.take(key) else { return Ok(None) };
        let list = match value {
            // Data sets in columns store nested schemas as text.
            Value::String(text) if matches!(text.trim(), "" | "null" | "None") => return Ok(None),
            Value::String(text) => serde_json::from_str::<Vec<Value>>(text).map_err(|_| wrong())?,
            Value::Array(list) => list.clone(),
            _ => return Err(wrong()),
        };
        let whole = |tool: Value| match &tool {
            Value::String(text) => match serde_json::from_str::<Value>(text) {
                Ok(parsed @ Value::Object(_)) => Ok(parsed),
                _ => Err(wrong()),
            },
            _ => Ok(tool),
        };
        let list: Vec<Value> = list.into_iter().map(whole).collect::<Result<_, _>>()?;
        Ok((!list.is_empty()).then_some(list))
    };
    if let Some(tools) = read("tools")? {
        return Ok(Some(Value::Array(tools)));
    }
    Ok(read("functions")?.map(|functions| {
        notes.changes.insert(Change::FunctionsAsTools);
        let wrap = |function: Value| json!({"type": "function", "function": function});
        functions.into_iter().map(wrap).collect()
    }))
}

/// Fields of an assistant message that say whether it is trained on.
const SWITCHES: [&str; 4] = ["weight", "train", "training", "loss"];

/// False if a message says not to train on it.
pub(crate) fn is_trained(message: &Message) -> bool {
    !SWITCHES.iter().any(|key| message.extra.get(*key).and_then(switch) == Some(false))
}

fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(on) => Some(*on),
        Value::Number(n) if n.as_f64() == Some(0.0) => Some(false),
        Value::Number(n) if n.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

/// Rules of a conversation: system turns only in front; then a user; an assistant follows a user or a tool; a tool
/// follows an assistant or a tool; an assistant turn has text, calls or reasoning. Several user turns in a row are fine:
/// prompts that wait for their answers. A user turn may be blank, as models see it in use, but not all of them.
fn check(messages: &[Message]) -> Result<(), RowError> {
    if messages.is_empty() {
        return Err(RowError::Empty);
    }
    let asks = messages.iter().any(|m| m.role == "user" && !m.content.trim().is_empty());
    let mut before: Option<&str> = None;
    for (at, message) in messages.iter().enumerate() {
        let role = message.role.as_str();
        let wrong = |after: &str| RowError::WrongOrder { at, role: role.to_owned(), after: after.to_owned() };
        match (role, before) {
            ("system" | "developer", None | Some("system" | "developer")) | ("user", _) => {}
            ("assistant", Some("user" | "tool")) | ("tool", Some("assistant" | "tool")) => {}
            ("assistant", None | Some("system" | "developer")) => return Err(RowError::StartsWithAssistant),
            ("system" | "developer" | "assistant" | "tool", Some(after)) => {
                return Err(wrong(&format!("a `{after}` message")));
            }
            ("tool", None) => return Err(wrong("nothing")),
            _ => return Err(RowError::UnknownRole { at, role: role.to_owned() }),
        }
        let silent = message.content.trim().is_empty();
        let reasons = message.reasoning_content.as_ref().is_some_and(|r| !r.trim().is_empty());
        let blank = match role {
            "assistant" => silent && message.tool_calls.is_none() && !reasons,
            "user" => silent && !asks,
            _ => false,
        };
        if blank {
            let says = |(key, value): &(&String, &Value)| {
                holds_something(value) && !SWITCHES.contains(&key.as_str())
            };
            let unread: Vec<&String> = message.extra.iter().filter(says).map(|(key, _)| key).collect();
            let unread = match unread.is_empty() {
                true => String::new(),
                false => format!("; {} of it is not read as its text", names(unread.into_iter())),
            };
            return Err(RowError::BlankMessage { at, role: role.to_owned(), unread });
        }
        if role == "assistant" {
            for field in SWITCHES {
                if let Some(value) = message.extra.get(field).filter(|v| !v.is_null() && switch(v).is_none())
                {
                    return Err(RowError::BadSwitch { at, field, found: short(value) });
                }
            }
            if let Some(value) = message.extra.get("train_detail").filter(|v| holds_something(v)) {
                return Err(RowError::BadSwitch { at, field: "train_detail", found: short(value) });
            }
        }
        before = Some(role);
    }
    if !messages.iter().any(|m| m.role == "user") {
        return Err(RowError::Empty);
    }
    Ok(())
}

/// A value for a message, cut to what fits.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn tokens(fields: &Fields<'_>) -> Result<TokenRow, RowError> {
    let numbers = |field| {
        let wrong = || RowError::WrongType { field, wanted: "a list of numbers" };
        fields.take(field).and_then(Value::as_array).ok_or_else(wrong)
    };
    let no_id = || RowError::WrongType { field: "input_ids", wanted: "a list of numbers" };
    let ids: Vec<u32> = numbers("input_ids")?
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(no_id))
        .collect::<Result<_, _>>()?;
    // Trainers' own way to say what is trained: labels are the ids, or -100.
    let from_labels = fields.peek("loss_mask").is_none() && fields.peek("labels").is_some();
    let name = if from_labels { "labels" } else { "loss_mask" };
    let mask = numbers(name)?;
    if ids.is_empty() {
        return Err(RowError::Empty);
    }
    if ids.len() != mask.len() {
        return Err(RowError::BadTokens {
            detail: format!("`input_ids` has {} entries, `{name}` {}", ids.len(), mask.len()),
        });
    }
    let loss_mask: Vec<bool> = mask
        .iter()
        .enumerate()
        .map(|(at, m)| match m {
            Value::Bool(trained) if !from_labels => Ok(*trained),
            other if from_labels => match other.as_i64() {
                Some(-100) => Ok(false),
                Some(label) if label == i64::from(ids[at]) => Ok(true),
                _ => Err(RowError::BadTokens {
                    detail: format!("`labels[{at}]` is {}, neither -100 nor `input_ids[{at}]`", short(other)),
                }),
            },
            other => match other.as_u64() {
                Some(0) => Ok(false),
                Some(1) => Ok(true),
                _ => Err(RowError::WrongType { field: "loss_mask", wanted: "a list of 0 and 1" }),
            },
        })
        .collect::<Result<_, _>>()?;
    Ok(TokenRow { id: id_of(fields), domain: domain_of(fields), ids, loss_mask })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn roles(line: &str, expected: &[(&str, &str)]) {
        match parse_conversation_line(line.as_bytes()) {
            Ok(Row::Conversation(row)) => {
                let found: Vec<(&str, &str)> =
                    row.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
                assert_eq!(found, expected, "{line}");
            }
            other => panic!("{other:?} for {line}"),
        }
    }

    #[test]
    fn the_known_shapes_are_read() {
        let pair = [("user", "a"), ("assistant", "b")];
        roles(r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#, &pair);
        roles(r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}"#, &pair);
        roles(
            r#"{"conversations":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
            &pair,
        );
        roles(r#"{"prompt":"a","completion":"b"}"#, &pair);
        roles(r#"{"instruction":"a","input":"","output":"b"}"#, &pair);
        roles(r#"{"instruction":"a","input":"x","output":"b"}"#, &[("user", "a\n\nx"), ("assistant", "b")]);
        roles(r#"{"question":"a","answer":"b"}"#, &pair);
        roles(r#"{"prompt":"a"}"#, &[("user", "a")]);
        roles(
            r#"{"id":"x","turns":["a","b"],"system":"s"}"#,
            &[("system", "s"), ("user", "a"), ("user", "b")],
        );
    }

    #[test]
    fn an_answer_that_hit_the_token_limit_is_known() {
        let cut = |line: &str| match parse_conversation_line(line.as_bytes()) {
            Ok(Row::Conversation(row)) => row.last_answer_cut,
            other => panic!("{other:?}"),
        };
        assert!(cut(r#"{"prompt":"a","completion":"b","finish_reason":"length"}"#));
        assert!(!cut(r#"{"prompt":"a","completion":"b","finish_reason":"stop"}"#));
        assert!(!cut(r#"{"prompt":"a","completion":"b"}"#));
    }

    #[test]
    fn tokens_are_read() {
        let row = parse_conversation_line(br#"{"id":7,"input_ids":[1,2],"loss_mask":[0,true]}"#);
        let expected =
            TokenRow { id: Some("7".into()), domain: None, ids: vec![1, 2], loss_mask: vec![false, true] };
        assert_eq!(row, Ok(Row::Tokens(expected)));
    }

    #[track_caller]
    fn refuse(line: &str, reason: DropReason, words: &str) {
        let error = parse_conversation_line(line.as_bytes()).expect_err(line);
        assert_eq!(error.reason(), reason, "{line}");
        assert!(error.to_string().contains(words), "{error}");
    }

    use crate::DropReason;

    #[test]
    fn what_is_wrong_is_named() {
        refuse("{\"messages\": [}", DropReason::BrokenJson, "broken JSON at column 15");
        refuse("{\"messages\": [", DropReason::CutOff, "the line ends inside the row");
        refuse("[1]", DropReason::NotAConversation, "not a JSON object");
        refuse("{\"text\": \"x\"}", DropReason::NotAConversation, "`text` is one text");
        refuse(
            "{\"title\": \"x\", \"n\": 1, \"e\": []}",
            DropReason::NotAConversation,
            "columns (`title`, `n`)",
        );
        refuse("{\"messages\": 3}", DropReason::WrongType, "`messages` is not a list");
        refuse("{\"prompt\":\"a\",\"completion\":3}", DropReason::WrongType, "`completion` is not a string");
        refuse("{\"prompt\":\"a\",\"system\":3}", DropReason::WrongType, "`system` is not a string");
        refuse("{\"messages\": []}", DropReason::Empty, "empty");
        refuse(r#"{"messages":[{"role":"system","content":"a"}]}"#, DropReason::Empty, "empty");
        let starts = r#"{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]}"#;
        refuse(starts, DropReason::StartsWithAssistant, "starts with an assistant");
        let twice = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"assistant","content":"c"}]}"#;
        refuse(
            twice,
            DropReason::WrongOrder,
            "message 2: a `assistant` message cannot follow a `assistant` message",
        );
        let late = r#"{"messages":[{"role":"user","content":"a"},{"role":"system","content":"b"}]}"#;
        refuse(late, DropReason::WrongOrder, "message 1: a `system` message");
        refuse(r#"{"messages":[{"role":"narrator","content":"a"}]}"#, DropReason::UnknownRole, "narrator");
        refuse(r#"{"messages":[{"role":"user","content":" \n"}]}"#, DropReason::BlankMessage, "blank");
        refuse(r#"{"messages":[{"content":"a"}]}"#, DropReason::BadMessage, "message 0");
        refuse(r#"{"input_ids":[1,2],"loss_mask":[1]}"#, DropReason::BadTokens, "2 entries");
        refuse(r#"{"input_ids":[-1],"loss_mask":[1]}"#, DropReason::WrongType, "`input_ids`");
        refuse(r#"{"input_ids":[1],"loss_mask":[2]}"#, DropReason::WrongType, "0 and 1");
        refuse(r#"{"input_ids":[],"labels":[1]}"#, DropReason::Empty, "empty");
        refuse(r#"{"input_ids":[],"loss_mask":[]}"#, DropReason::Empty, "empty");
    }
}
