//! One turn of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::jinja;

/// One turn, in the words of the OpenAI chat format.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; other roles go to the template as they are.
    pub role: String,
    /// The text.
    #[serde(default)]
    pub content: String,
    /// Reasoning of an assistant turn, for templates that render it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls of an assistant turn: `[{id, type, function: {name, arguments}}]`, arguments as they were written: an object
    /// or a string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Value>,
    /// Name of the speaker or of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The call that a `tool` turn answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// Why a JSON value is no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Not an object.
    #[error("a message is {found}, not an object")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// Neither `role` nor `from`.
    #[error("a message has neither `role` nor `from`")]
    NoRole,
    /// A field of the wrong type.
    #[error("`{field}` of a message is {found}, not {wanted}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A part of the content is not text.
    #[error("a message has a content part of type `{kind}`; only text is supported")]
    NotText {
        /// The type of the part.
        kind: String,
    },
}

/// What a JSON value is, in words.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Message {
    /// A turn with nothing but text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), ..Message::default() }
    }

    /// Reads a message as chat data sets write it: `role`/`content` or ShareGPT's `from`/`value`; content as a string,
    /// as `null` or as a list of text parts; tool calls as a list or as JSON in a string.
    ///
    /// # Errors
    /// [`MessageError`]; never panics.
    pub fn from_json(value: &Value) -> Result<Message, MessageError> {
        let object = value.as_object().ok_or(MessageError::NotAnObject { found: kind_of(value) })?;
        let text = |field: &'static str| match object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(MessageError::WrongType { field, found: kind_of(other), wanted: "a string" }),
        };
        let role = match text("role")? {
            Some(role) => role,
            None => text("from")?.ok_or(MessageError::NoRole)?,
        };
        let role = match role.as_str() {
            "human" => "user".to_owned(),
            "gpt" | "chatgpt" | "bing" | "bard" | "model" => "assistant".to_owned(),
            _ => role,
        };
        let content = match object.get("content").or_else(|| object.get("value")) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => join_parts(parts)?,
            Some(other) => {
                return Err(MessageError::WrongType {
                    field: "content",
                    found: kind_of(other),
                    wanted: "a string or a list of text parts",
                });
            }
        };
        let reasoning = match text("reasoning_content")? {
            Some(reasoning) => Some(reasoning),
            None => text("reasoning")?,
        };
        Ok(Message {
            role,
            content,
            reasoning_content: reasoning,
            tool_calls: match object.get("tool_calls") {
                None | Some(Value::Null) => None,
                Some(calls) => tool_calls(calls)?,
            },
            name: text("name")?,
            tool_call_id: text("tool_call_id")?,
        })
    }

    /// The message as templates see it. Absent fields are absent, so that `is defined` works.
    pub(crate) fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("role".into(), self.role.as_str().into());
        object.insert("content".into(), self.content.as_str().into());
        if let Some(reasoning) = &self.reasoning_content {
            object.insert("reasoning_content".into(), reasoning.as_str().into());
        }
        if let Some(calls) = &self.tool_calls {
            object.insert("tool_calls".into(), calls.clone());
        }
        if let Some(name) = &self.name {
            object.insert("name".into(), name.as_str().into());
        }
        if let Some(id) = &self.tool_call_id {
            object.insert("tool_call_id".into(), id.as_str().into());
        }
        Value::Object(object)
    }

    /// [`Message::to_json`] as a template's value, with the arguments of its tool calls in the form asked for.
    pub(crate) fn to_value(&self, arguments: Arguments) -> jinja::Result<jinja::Value> {
        let Value::Object(object) = self.to_json() else { return Ok(jinja::Value::None) };
        let mut entries = Vec::with_capacity(object.len() + 1);
        // Some templates know reasoning by its older name.
        if let (Some(reasoning), None) = (object.get("reasoning_content"), object.get("thinking")) {
            entries.push((jinja::Value::str("thinking"), jinja::Value::of(reasoning)?));
        }
        for (key, value) in &object {
            let value = match (key.as_str(), value, arguments) {
                ("tool_calls", Value::Array(calls), Arguments::Objects) => {
                    jinja::Value::list(calls.iter().map(call_value).collect::<jinja::Result<_>>()?)?
                }
                _ => jinja::Value::of(value)?,
            };
            entries.push((jinja::Value::str(key.as_str()), value));
        }
        Ok(jinja::Value::dict(jinja::Dict::from_entries(entries)?))
    }

    /// Some arguments are a string that spells an object.
    pub(crate) fn has_spelled_arguments(&self) -> bool {
        let calls = self.tool_calls.as_ref().and_then(Value::as_array);
        calls.into_iter().flatten().any(|call| {
            let arguments = call.get("function").unwrap_or(call).get("arguments");
            arguments.and_then(Value::as_str).is_some_and(|text| spelled(text).is_some())
        })
    }
}

/// In which form templates get the arguments of tool calls that are spelled as a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// As the object that the string spells.
    Objects,
    /// As the string.
    AsWritten,
}

/// The object that a string spells.
fn spelled(text: &str) -> Option<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// A tool call as a template's value, its arguments as an object.
fn call_value(call: &Value) -> jinja::Result<jinja::Value> {
    let Some(object) = call.as_object() else { return jinja::Value::of(call) };
    let mut entries = Vec::with_capacity(object.len());
    for (key, value) in object {
        let value = match (key.as_str(), value) {
            ("function", Value::Object(_)) => call_value(value)?,
            ("arguments", Value::String(text)) => match spelled(text) {
                Some(object) => jinja::Value::of_map(&object)?.spelled(),
                None => jinja::Value::str(text.as_str()),
            },
            _ => jinja::Value::of(value)?,
        };
        entries.push((jinja::Value::str(key.as_str()), value));
    }
    Ok(jinja::Value::dict(jinja::Dict::from_entries(entries)?))
}

fn join_parts(parts: &[Value]) -> Result<String, MessageError> {
    let mut out = String::new();
    for part in parts {
        match part {
            Value::String(text) => out.push_str(text),
            Value::Object(part) => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
                match (kind, part.get("text").and_then(Value::as_str)) {
                    ("text" | "input_text" | "output_text", Some(text)) => out.push_str(text),
                    _ => return Err(MessageError::NotText { kind: kind.to_owned() }),
                }
            }
            other => {
                return Err(MessageError::WrongType {
                    field: "content",
                    found: kind_of(other),
                    wanted: "a string or a list of text parts",
                });
            }
        }
    }
    Ok(out)
}

/// Brings tool calls into one form: a list of calls, each with a `function`. Everything else stays as it was written,
/// arguments in a string too; [`Message::to_value`] reads them for the templates that want objects.
fn tool_calls(value: &Value) -> Result<Option<Value>, MessageError> {
    let parsed;
    let calls = match value {
        Value::String(text) => {
            parsed = serde_json::from_str::<Value>(text).ok();
            parsed.as_ref().and_then(Value::as_array)
        }
        other => other.as_array(),
    };
    let wrong =
        || MessageError::WrongType { field: "tool_calls", found: kind_of(value), wanted: "a list of calls" };
    let calls = calls.ok_or_else(wrong)?;
    let mut out = Vec::with_capacity(calls.len());
    for call in calls {
        let mut call = call.as_object().ok_or_else(wrong)?.clone();
        let mut function = match call.get_mut("function") {
            Some(function) => function.as_object().ok_or_else(wrong)?.clone(),
            // A call without the wrapping: its own keys are the function's, except the id.
            None => {
                let function = std::mem::take(&mut call);
                call.extend(function.get("id").map(|id| ("id".to_owned(), id.clone())));
                call.insert("type".into(), "function".into());
                let own = |key: &String| key != "id" && key != "type";
                function.into_iter().filter(|(key, _)| own(key)).collect()
            }
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong());
        }
        if function.get("arguments").is_none_or(Value::is_null) {
            function.insert("arguments".into(), json!({}));
        }
        call.insert("function".into(), Value::Object(function));
        out.push(Value::Object(call));
    }
    Ok((!out.is_empty()).then_some(Value::Array(out)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Result<Message, MessageError>) {
        let value: Value = serde_json::from_str(json).expect("the case is JSON");
        assert_eq!(Message::from_json(&value), expected, "{json}");
    }

    #[test]
    fn both_spellings_of_a_turn_are_read() {
        check(r#"{"role":"user","content":"hi"}"#, Ok(Message::new("user", "hi")));
        check(r#"{"from":"human","value":"hi"}"#, Ok(Message::new("user", "hi")));
        check(r#"{"from":"gpt","value":"yo"}"#, Ok(Message::new("assistant", "yo")));
        check(
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#,
            Ok(Message::new("user", "ab")),
        );
        check(r#"{"role":"assistant","content":null}"#, Ok(Message::new("assistant", "")));
    }

    #[test]
    fn what_is_no_turn_is_named() {
        check("3", Err(MessageError::NotAnObject { found: "a number" }));
        check("{}", Err(MessageError::NoRole));
        check(
            r#"{"role":"user","content":3}"#,
            Err(MessageError::WrongType {
                field: "content",
                found: "a number",
                wanted: "a string or a list of text parts",
            }),
        );
        check(
            r#"{"role":"user","content":[{"type":"image_url"}]}"#,
            Err(MessageError::NotText { kind: "image_url".into() }),
        );
    }

    #[test]
    fn tool_calls_are_kept_as_they_are_written() {
        let read = |calls: Value| {
            let value = json!({"role": "assistant", "tool_calls": calls});
            Message::from_json(&value).expect("a message").tool_calls
        };
        let calls =
            json!([{"index": 0, "function": {"arguments": "{\"x\":1e-05 }", "name": "f", "strict": true}}]);
        assert_eq!(read(calls.clone()), Some(calls.clone()));
        assert_eq!(read(calls.to_string().into()), Some(calls));
        assert_eq!(
            read(json!([{"id": "a", "name": "f", "arguments": {"x": 1}}, {"function": {"name": "g"}}])),
            Some(json!([
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"function": {"name": "g", "arguments": {}}}
            ]))
        );
    }
}
