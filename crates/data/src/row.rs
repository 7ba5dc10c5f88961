//! One row of a data set, in any of the shapes that data sets have.

use draftsmith_text::{MaskOptions, Message};
use serde_json::{Map, Value};

use crate::{Location, RowError};

/// Conversations with more messages are refused; the longest known data sets stay far below.
const MAX_MESSAGES: usize = 10_000;

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

    /// The text that makes two rows the same prompt: user and system turns.
    pub(crate) fn prompt_text(&self) -> String {
        let turns: Vec<&str> =
            self.messages.iter().filter(|m| m.role != "assistant").map(|m| m.content.as_str()).collect();
        turns.join("\n")
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

/// Reads one line of JSON: `messages`, ShareGPT `conversations`, `turns`, `prompt` (with or without an answer),
/// `instruction`/`output`, `question`/`answer`, or pre-tokenised `input_ids` and `loss_mask`. The conversation is
/// checked: order of roles, blank messages.
///
/// # Errors
/// [`RowError`]; never panics.
pub fn parse_conversation_line(line: &[u8]) -> Result<Row, RowError> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|e| RowError::BrokenJson { column: e.column(), detail: json_detail(&e) })?;
    parse_row(&value)
}

/// What the parser said, without the place, which the error names itself.
pub(crate) fn json_detail(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(detail, _)| detail.to_owned())
}

pub(crate) fn parse_row(value: &Value) -> Result<Row, RowError> {
    let object = value.as_object().ok_or(RowError::NotAnObject)?;
    if present(object, "input_ids") {
        return tokens(object).map(Row::Tokens);
    }
    let mut row = Conversation {
        id: id_of(object),
        domain: text(object, "domain").or_else(|| text(object, "category")),
        source: text(object, "source"),
        license: text(object, "license"),
        last_answer_cut: object.get("finish_reason").and_then(Value::as_str) == Some("length"),
        ..Conversation::default()
    };
    if let Some(tools) = object.get("tools").filter(|t| !t.is_null()) {
        row.tools = match tools {
            // Data sets in columns store nested schemas as text.
            Value::String(text) if text.trim().is_empty() => None,
            Value::String(text) => Some(serde_json::from_str(text).map_err(|_| RowError::WrongType {
                field: "tools",
                wanted: "a list, or JSON in a string",
            })?),
            Value::Array(list) if list.is_empty() => None,
            Value::Array(_) => Some(tools.clone()),
            _ => return Err(RowError::WrongType { field: "tools", wanted: "a list, or JSON in a string" }),
        };
    }
    if let Some(kwargs) = object.get("chat_template_kwargs").filter(|k| !k.is_null()) {
        let wrong = RowError::WrongType { field: "chat_template_kwargs", wanted: "an object" };
        row.kwargs = kwargs.as_object().cloned().ok_or(wrong)?;
    }
    row.messages = messages(object)?;
    let has_system = row.messages.first().is_some_and(|m| m.role == "system");
    if let (Some(system), false) = (text(object, "system"), has_system)
        && !system.trim().is_empty()
    {
        row.messages.insert(0, Message::new("system", system));
    }
    check(&row.messages)?;
    Ok(Row::Conversation(row))
}

fn present(object: &Map<String, Value>, key: &str) -> bool {
    object.get(key).is_some_and(|v| !v.is_null())
}

fn text(object: &Map<String, Value>, key: &str) -> Option<String> {
    object.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn id_of(object: &Map<String, Value>) -> Option<String> {
    ["id", "prompt_id", "uuid", "question_id"].iter().find_map(|key| match object.get(*key) {
        Some(Value::String(id)) if !id.is_empty() => Some(id.clone()),
        Some(Value::Number(id)) => Some(id.to_string()),
        _ => None,
    })
}

fn messages(object: &Map<String, Value>) -> Result<Vec<Message>, RowError> {
    for field in ["messages", "conversations", "conversation"] {
        if present(object, field) {
            return list(&object[field], field);
        }
    }
    if present(object, "turns") {
        let wrong = RowError::WrongType { field: "turns", wanted: "a list of strings" };
        let turns = object["turns"].as_array().ok_or_else(|| wrong.clone())?;
        return turns
            .iter()
            .map(|t| t.as_str().map(|t| Message::new("user", t)).ok_or_else(|| wrong.clone()))
            .collect();
    }
    // Prompt (or problem) with an answer, by the names that data sets use.
    for (prompt, answers) in [
        ("prompt", &["completion", "response", "answer", "chosen"][..]),
        ("instruction", &["output", "response"]),
        ("question", &["answer", "response"]),
        ("problem", &["solution", "answer"]),
    ] {
        let mut out = match object.get(prompt) {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) => vec![Message::new("user", text.as_str())],
            Some(value @ Value::Array(_)) => list(value, "prompt")?,
            Some(_) => {
                return Err(RowError::WrongType {
                    field: "prompt",
                    wanted: "a string or a list of messages",
                });
            }
        };
        if let (Some(input), Some(message)) =
            (text(object, "input").filter(|i| !i.trim().is_empty()), out.last_mut())
        {
            message.content.push_str("\n\n");
            message.content.push_str(&input);
        }
        let answer =
            answers.iter().find_map(|key| object.get(*key).filter(|v| v.is_string() || v.is_array()));
        match answer {
            Some(Value::String(answer)) => out.push(Message::new("assistant", answer.as_str())),
            Some(value) => out.extend(list(value, "completion")?),
            None => {}
        }
        return Ok(out);
    }
    Err(RowError::NoConversation)
}

fn list(value: &Value, field: &'static str) -> Result<Vec<Message>, RowError> {
    let parsed;
    let items = match value {
        Value::String(text) => {
            parsed = serde_json::from_str::<Value>(text).ok();
            parsed.as_ref().and_then(Value::as_array)
        }
        other => other.as_array(),
    };
    let items = items.ok_or(RowError::WrongType { field, wanted: "a list of messages" })?;
    if items.len() > MAX_MESSAGES {
        return Err(RowError::WrongType { field, wanted: "a list of at most 10000 messages" });
    }
    items
        .iter()
        .enumerate()
        .map(|(at, item)| Message::from_json(item).map_err(|problem| RowError::BadMessage { at, problem }))
        .collect()
}

/// Rules of a conversation: system turns only in front; then a user; an assistant follows a user or a tool; a tool
/// follows an assistant or a tool; no turn is blank (an assistant turn may be nothing but calls). Several user turns in
/// a row are fine: prompts that wait for their answers.
fn check(messages: &[Message]) -> Result<(), RowError> {
    if messages.is_empty() {
        return Err(RowError::Empty);
    }
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
        let calls =
            role == "assistant" && (message.tool_calls.is_some() || message.reasoning_content.is_some());
        if message.content.trim().is_empty() && role != "tool" && !calls {
            return Err(RowError::BlankMessage { at, role: role.to_owned() });
        }
        before = Some(role);
    }
    if !messages.iter().any(|m| m.role == "user") {
        return Err(RowError::Empty);
    }
    Ok(())
}

fn tokens(object: &Map<String, Value>) -> Result<TokenRow, RowError> {
    let wrong = |field| RowError::WrongType { field, wanted: "a list of numbers" };
    let ids = object["input_ids"].as_array().ok_or_else(|| wrong("input_ids"))?;
    let ids: Vec<u32> = ids
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong("input_ids")))
        .collect::<Result<_, _>>()?;
    let mask = object.get("loss_mask").and_then(Value::as_array).ok_or_else(|| wrong("loss_mask"))?;
    let loss_mask: Vec<bool> = mask
        .iter()
        .map(|m| match m {
            Value::Bool(trained) => Ok(*trained),
            other => match other.as_u64() {
                Some(0) => Ok(false),
                Some(1) => Ok(true),
                _ => Err(RowError::WrongType { field: "loss_mask", wanted: "a list of 0 and 1" }),
            },
        })
        .collect::<Result<_, _>>()?;
    if ids.is_empty() {
        return Err(RowError::Empty);
    }
    if ids.len() != loss_mask.len() {
        return Err(RowError::BadTokens {
            detail: format!("`input_ids` has {} entries, `loss_mask` {}", ids.len(), loss_mask.len()),
        });
    }
    Ok(TokenRow { id: id_of(object), domain: text(object, "domain"), ids, loss_mask })
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
        refuse("{\"messages\": [}", DropReason::NotAConversation, "broken JSON at column 15");
        refuse("[1]", DropReason::NotAConversation, "not a JSON object");
        refuse("{\"text\": \"x\"}", DropReason::NotAConversation, "none of `messages`");
        refuse("{\"messages\": 3}", DropReason::NotAConversation, "`messages` is not a list");
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
        refuse(r#"{"input_ids":[-1],"loss_mask":[1]}"#, DropReason::NotAConversation, "`input_ids`");
        refuse(r#"{"input_ids":[1],"loss_mask":[2]}"#, DropReason::NotAConversation, "0 and 1");
        refuse(r#"{"input_ids":[],"loss_mask":[]}"#, DropReason::Empty, "empty");
    }
}
