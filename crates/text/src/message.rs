//! One turn of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

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
    /// Calls of an assistant turn: `[{id, type, function: {name, arguments}}]`, arguments as an object.
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

/// Brings tool calls into one form; arguments written as JSON in a string become the object they spell.
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
        let function = call.get("function").unwrap_or(call);
        let name = function.get("name").and_then(Value::as_str).ok_or_else(wrong)?;
        let arguments = match function.get("arguments") {
            None | Some(Value::Null) => json!({}),
            Some(Value::String(text)) => {
                serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()))
            }
            Some(other) => other.clone(),
        };
        let mut object = Map::new();
        if let Some(id) = call.get("id").and_then(Value::as_str) {
            object.insert("id".into(), id.into());
        }
        object.insert("type".into(), "function".into());
        object.insert("function".into(), json!({"name": name, "arguments": arguments}));
        out.push(Value::Object(object));
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
    fn tool_call_arguments_in_a_string_become_an_object() {
        let value = json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
        let message = Message::from_json(&value).expect("a message");
        assert_eq!(
            message.tool_calls,
            Some(json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]))
        );
    }
}
