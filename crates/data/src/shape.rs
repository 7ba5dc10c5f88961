//! The shapes of conversations in data sets.
//!
//! First come lists of turns by their names, then a prompt with its answer by theirs. What a shape does not take stays
//! unread and is counted; a shape that is almost one is an error that says what it lacks.

use draftsmith_text::{Message, MessageError};
use serde_json::{Map, Value, json};

use crate::RowError;
use crate::notes::{Change, Fields, RowNotes, holds_something, names};

/// Conversations with more messages are refused; the longest known data sets stay far below.
const MAX_MESSAGES: usize = 10_000;

/// Columns that hold whole conversations.
const LISTS: [&str; 9] = [
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
    "items",
    "chat",
    "trajectory",
    "traj",
];

/// Columns with a prompt, and those with its answer, the best first.
const PAIRS: [(&str, &[&str]); 11] = [
    ("prompt", &["completion", "response", "answer", "chosen", "output", "final"]),
    ("instruction", &["output", "response", "completion", "answer", "chosen"]),
    (
        "question",
        &["answer", "response", "final", "generated_solution", "solution", "output", "completion", "chosen"],
    ),
    ("query", &["response", "answer", "output", "completion", "chosen"]),
    (
        "problem",
        &["solution", "answer", "deepseek_solution", "generated_solution", "response", "output", "chosen"],
    ),
    ("input", &["output", "response", "answer", "completion", "chosen"]),
    ("inputs", &["targets"]),
    ("user", &["assistant", "bot", "gpt"]),
    ("human", &["assistant", "gpt", "bot"]),
    ("message_1", &["message_2"]),
    ("user_input", &["response", "output"]),
];

/// Columns with the reasoning that leads to the answer.
const REASONING: [&str; 4] = ["reasoning_content", "reasoning", "thinking", "deepseek_reasoning"];

/// What such a column says where it holds no reasoning but whether, or how much, the model shall reason.
const SWITCH_WORDS: [&str; 10] = ["", "on", "off", "true", "false", "yes", "no", "low", "medium", "high"];

/// Names of the two sides of a turn that is one object.
const SIDES: [(&str, &str); 9] = [
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("q", "a"),
    ("Q", "A"),
];

/// Speakers that are keys of a turn; other names of roles (`model`, `function`) are keys with other meanings too.
const SPEAKERS: [&str; 9] =
    ["system", "user", "human", "prompter", "assistant", "gpt", "chatgpt", "bot", "ai"];

/// What strings in a list are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Strings {
    /// User turns that wait for their answers.
    Questions,
    /// A user and an assistant in turn.
    Alternating,
}

/// Finds the conversation in a row.
pub(crate) fn messages(fields: &Fields<'_>, notes: &mut RowNotes) -> Result<Vec<Message>, RowError> {
    if let Some((field, value)) = LISTS.iter().find_map(|field| Some((*field, fields.peek(field)?))) {
        fields.mark(field);
        let mut out = list(value, field, Strings::Alternating, notes)?;
        if out.last().is_some_and(|m| m.role == "user" || m.role == "tool") {
            // Prompts in one column, the answer in another.
            if let Some(answer) = answer(fields, &["chosen", "completion", "response", "output"], notes)? {
                out.extend(answer);
            }
        }
        // The first question, said once more in a column of its own.
        let asked = out.iter().find(|m| m.role == "user").map(|m| m.content.trim());
        if fields.peek("prompt").and_then(Value::as_str).is_some_and(|prompt| asked == Some(prompt.trim())) {
            fields.mark("prompt");
        }
        return Ok(out);
    }
    if let Some(value) = fields.take("turns") {
        return list(value, "turns", Strings::Questions, notes);
    }
    for (prompt, answers) in PAIRS {
        if let Some(value) = fields.peek(prompt) {
            return pair(fields, prompt, value, answers, notes);
        }
    }
    if let Some(value) = fields.peek("chosen") {
        fields.mark("chosen");
        return match value {
            Value::String(text) if json_in(text).is_none() => human_and_assistant(text),
            _ => list(value, "chosen", Strings::Alternating, notes),
        };
    }
    for field in ["data", "history"] {
        if let Some(value @ Value::Array(_)) = fields.peek(field) {
            fields.mark(field);
            return list(value, field, Strings::Alternating, notes);
        }
    }
    if fields.peek("text").or(fields.peek("content")).is_some()
        && (fields.peek("role").or(fields.peek("from"))).is_some()
    {
        return Err(RowError::OneMessage { columns: fields.names() });
    }
    if fields.peek("text").is_some_and(Value::is_string) {
        return Err(RowError::PlainText { field: "text" });
    }
    Err(RowError::NoConversation { columns: fields.names() })
}

/// A prompt and its answer in columns of their own.
fn pair(
    fields: &Fields<'_>,
    prompt: &'static str,
    value: &Value,
    answers: &[&'static str],
    notes: &mut RowNotes,
) -> Result<Vec<Message>, RowError> {
    fields.mark(prompt);
    let mut out = Vec::new();
    let mut asked = match value {
        Value::String(text) => vec![Message::new("user", text.as_str())],
        Value::Array(_) | Value::Object(_) => list(value, prompt, Strings::Questions, notes)?,
        _ => return Err(RowError::WrongType { field: prompt, wanted: "a string or a list of messages" }),
    };
    // Alpaca's second half of the question; Dolly calls it `context`.
    let more = match prompt {
        "input" => None,
        "instruction" => ["input", "context"].iter().find(|key| fields.peek(key).is_some()).copied(),
        _ => Some("input"),
    };
    if let (Some(key), Some(message)) = (more, asked.last_mut())
        && let Some(text) = fields.text(key).filter(|text| !text.trim().is_empty())
    {
        if !message.content.trim().is_empty() {
            message.content.push_str("\n\n");
            message.content.push_str(text);
        } else {
            message.content = text.to_owned();
        }
    }
    // A list of messages in `chosen` may hold the prompt as well.
    let whole = |answer: &[Message]| answer.iter().any(|m| m.role == "user");
    let answer = match answer(fields, answers, notes)? {
        Some(answer) if whole(&answer) => {
            let same = |m: &Message| asked.last().is_some_and(|last| last.content.trim() == m.content.trim());
            if !answer.iter().any(|m| m.role == "user" && same(m)) {
                return Err(RowError::WrongType {
                    field: prompt,
                    wanted: "what the messages of the answer start with",
                });
            }
            return Ok(answer);
        }
        Some(answer) => answer,
        None => calls(fields)?,
    };
    if let Some(history) = fields.peek("history").filter(|h| h.is_array() || h.is_string()) {
        fields.mark("history");
        if holds_something(history) {
            out.extend(list(history, "history", Strings::Alternating, notes)?);
        }
    }
    out.extend(asked);
    out.extend(answer);
    Ok(out)
}

/// The answer in one of some columns, with its reasoning.
fn answer(
    fields: &Fields<'_>,
    keys: &[&'static str],
    notes: &mut RowNotes,
) -> Result<Option<Vec<Message>>, RowError> {
    let readable = |value: &Value| matches!(value, Value::String(_) | Value::Array(_) | Value::Object(_));
    let present = |key: &&&'static str| fields.peek(key).is_some();
    let Some(key) =
        keys.iter().find(|key| fields.peek(key).is_some_and(readable)).or(keys.iter().find(present)).copied()
    else {
        return Ok(None);
    };
    let value = fields.take(key).unwrap_or(&Value::Null);
    let mut out = match value {
        Value::String(text) => vec![Message::new("assistant", text.as_str())],
        Value::Array(_) | Value::Object(_) => list(value, key, Strings::Questions, notes)?,
        _ => return Err(RowError::WrongType { field: key, wanted: "a string or a list of messages" }),
    };
    // Sets for preferences without pairs: the answer is one that people did not want.
    if let Some(Value::Bool(good)) = fields.peek("label") {
        fields.mark("label");
        if !good {
            notes.changes.insert(Change::RejectedAnswerLeftOut);
            return Ok(Some(Vec::new()));
        }
    }
    if let (Some(reasoning), [message]) =
        (REASONING.iter().find(|key| fields.peek(key).is_some_and(Value::is_string)), out.as_mut_slice())
        && message.reasoning_content.is_none()
        // Reasoning that the answer holds already is not said twice.
        && !message.content.contains("</think>")
        && let Some(Value::String(text)) = fields.peek(reasoning)
        && !SWITCH_WORDS.contains(&text.trim().to_lowercase().as_str())
    {
        fields.mark(reasoning);
        message.reasoning_content = Some(text.to_owned());
    }
    Ok(Some(out))
}

/// Calls that answer a query (`answers` of function-calling sets); answers of another kind are not read.
fn calls(fields: &Fields<'_>) -> Result<Vec<Message>, RowError> {
    let Some(value) = fields.peek("answers") else { return Ok(Vec::new()) };
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Ok(match Message::from_json(&json!({"from": "function_call", "value": text})) {
        Ok(message) => {
            fields.mark("answers");
            vec![message]
        }
        Err(_) => Vec::new(),
    })
}

/// Anthropic's way to write a dialogue down: `\n\nHuman: …\n\nAssistant: …`.
fn human_and_assistant(text: &str) -> Result<Vec<Message>, RowError> {
    const SIDES: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let text = if text.starts_with("Human:") { format!("\n\n{text}") } else { text.to_owned() };
    let mut rest = text.as_str();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let Some((mark, role)) = SIDES.iter().find(|(mark, _)| rest.starts_with(mark)) else {
            return Err(RowError::PlainText { field: "chosen" });
        };
        rest = &rest[mark.len()..];
        let end = SIDES.iter().filter_map(|(mark, _)| rest.find(mark)).min().unwrap_or(rest.len());
        out.push(Message::new(*role, rest[..end].trim()));
        rest = &rest[end..];
    }
    Ok(out)
}

fn json_in(text: &str) -> Option<Value> {
    serde_json::from_str::<Value>(text).ok().filter(|v| v.is_array() || v.is_object())
}

/// A list of turns in one of its forms; also as JSON in a string, as lists by field, and as a single message.
fn list(
    value: &Value,
    field: &'static str,
    strings: Strings,
    notes: &mut RowNotes,
) -> Result<Vec<Message>, RowError> {
    let parsed;
    let value = match value {
        Value::String(text) => {
            parsed = json_in(text).ok_or(RowError::PlainText { field })?;
            &parsed
        }
        other => other,
    };
    let transposed;
    let items = match value {
        Value::Array(items) => items,
        Value::Object(object) => {
            transposed = rows_of_columns(object).unwrap_or_else(|| vec![value.clone()]);
            &transposed
        }
        _ => return Err(RowError::WrongType { field, wanted: "a list of messages" }),
    };
    if items.len() > MAX_MESSAGES {
        return Err(RowError::WrongType { field, wanted: "a list of at most 10000 messages" });
    }
    let names_a_role =
        |item: &Value| item.get(0).and_then(Value::as_str).and_then(Message::role_of).is_some();
    let pairs_of_role_and_text = !items.is_empty() && items.iter().all(names_a_role);
    let mut out = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let message =
            |value: &Value| Message::from_json(value).map_err(|problem| RowError::BadMessage { at, problem });
        match item {
            Value::String(text) => {
                let assistant = strings == Strings::Alternating && at % 2 == 1;
                out.push(Message::new(if assistant { "assistant" } else { "user" }, text.as_str()));
            }
            Value::Array(pair) if pairs_of_role_and_text && pair.len() == 2 => {
                out.push(message(&json!({"role": pair[0], "content": pair[1]}))?);
            }
            Value::Array(pair) if pair.len() == 2 => {
                for (role, text) in ["user", "assistant"].iter().zip(pair) {
                    if !text.is_null() {
                        out.push(message(&json!({"role": role, "content": text}))?);
                    }
                }
            }
            Value::Object(object) if !has_role(object) => out.extend(keyed(object, at, field, notes)?),
            other => out.push(described(message(other)?)),
        }
    }
    Ok(out)
}

fn has_role(object: &Map<String, Value>) -> bool {
    ["role", "from"].iter().any(|key| object.get(*key).is_some_and(|v| !v.is_null()))
}

/// Agent traces that keep the text of their system message in a field of its own.
fn described(mut message: Message) -> Message {
    if message.role == "system"
        && message.content.trim().is_empty()
        && let Some(Value::String(text)) = message.extra.get("system_prompt")
    {
        message.content = text.clone();
        message.extra.remove("system_prompt");
    }
    message
}

/// A turn whose keys say who speaks: `{"human": …, "assistant": …}`, or names of the two sides.
fn keyed(
    object: &Map<String, Value>,
    at: usize,
    field: &'static str,
    notes: &mut RowNotes,
) -> Result<Vec<Message>, RowError> {
    let side = SIDES.iter().find(|(user, answer)| object.contains_key(*user) && object.contains_key(*answer));
    let mut out = Vec::new();
    let mut unread = Vec::new();
    for (key, value) in object {
        let role = match side {
            Some((user, _)) if key == user => Some("user"),
            Some((_, answer)) if key == answer => Some("assistant"),
            Some(_) => None,
            None => SPEAKERS.contains(&key.to_lowercase().as_str()).then_some(key.as_str()),
        };
        match role {
            Some(role) if !value.is_null() => {
                let message = Message::from_json(&json!({"from": role, "value": value}));
                out.push(message.map_err(|problem| RowError::BadMessage { at, problem })?);
            }
            Some(_) => {}
            None if holds_something(value) => unread.push(key),
            None => {}
        }
    }
    if out.is_empty() {
        if object.is_empty() {
            return Err(RowError::BadMessage { at, problem: MessageError::NoRole });
        }
        return Err(RowError::NoRole { at, found: names(object.keys()) });
    }
    // The question stands before its answer, however the keys are sorted.
    let order = |m: &Message| match m.role.as_str() {
        "system" | "developer" => 0,
        "user" => 1,
        "assistant" => 2,
        _ => 3,
    };
    out.sort_by_key(order);
    for key in unread {
        let name = format!("{field}[].{key}");
        if !notes.unused_keys.contains(&name) {
            notes.unused_keys.push(name);
        }
    }
    Ok(out)
}

/// `{"role": [a, b], "content": [c, d]}`, as column stores keep lists of structs, as a list of objects.
fn rows_of_columns(object: &Map<String, Value>) -> Option<Vec<Value>> {
    if !has_role(object) {
        return None;
    }
    let columns: Vec<(&String, &Vec<Value>)> =
        object.iter().map(|(key, value)| Some((key, value.as_array()?))).collect::<Option<_>>()?;
    let length = columns.first()?.1.len();
    if columns.iter().any(|(_, values)| values.len() != length) {
        return None;
    }
    let row = |at: usize| {
        columns.iter().map(|(key, values)| ((*key).clone(), values[at].clone())).collect::<Map<_, _>>()
    };
    Some((0..length).map(|at| Value::Object(row(at))).collect())
}
