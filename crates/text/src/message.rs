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
    /// All other fields, as they were written: templates may know them (`tool_plan`, `thinking`).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
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
    /// The text of a `function_call` turn spells no call.
    #[error(
        "the `{role}` message is no call: wanted is JSON like {{\"name\": …, \"arguments\": {{…}}}}, or a list of them"
    )]
    NotACall {
        /// The role, as it was written.
        role: String,
    },
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

    /// Reads a message as chat data sets write it: `role`/`content`, ShareGPT's `from`/`value` or `role`/`text`; content
    /// as a string, as `null` or as a list of text parts; tool calls as a list or as JSON in a string, in `tool_calls`, in
    /// OpenAI's old `function_call` or as a turn of their own. Roles are known by many names, in any case; unknown ones
    /// stay as they are. Reasoning may be called `reasoning_content`, `thinking` or `reasoning`, in this order. Fields
    /// that have no place here stay in [`Message::extra`].
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
        let (role, role_field) = match text("role")? {
            Some(role) => (role, "role"),
            None => (text("from")?.ok_or(MessageError::NoRole)?, "from"),
        };
        let speaker = Speaker::of(&role);
        let present = |field: &&&'static str| object.get(**field).is_some_and(|v| !v.is_null());
        let content_field = CONTENT_FIELDS.iter().find(present).copied().unwrap_or("content");
        let mut content = match object.get(content_field) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            // Calls that were not packed into a string.
            Some(calls @ (Value::Object(_) | Value::Array(_))) if speaker == Speaker::Caller => {
                calls.to_string()
            }
            Some(Value::Array(parts)) => join_parts(parts)?,
            Some(other) => {
                return Err(MessageError::WrongType {
                    field: content_field,
                    found: kind_of(other),
                    wanted: "a string or a list of text parts",
                });
            }
        };
        let mut reasoning = None;
        for field in REASONING_FIELDS {
            if reasoning.is_none() {
                reasoning = text(field)?;
            }
        }
        let mut calls = match object.get("tool_calls") {
            None | Some(Value::Null) => None,
            Some(calls) => tool_calls(calls)?,
        };
        let mut read = vec![
            role_field,
            content_field,
            "content",
            "reasoning_content",
            "tool_calls",
            "name",
            "tool_call_id",
        ];
        if let (None, Some(call)) = (&calls, object.get("function_call").filter(|c| !c.is_null())) {
            let wrong =
                MessageError::WrongType { field: "function_call", found: kind_of(call), wanted: "a call" };
            calls = tool_calls(&calls_in(call).ok_or(wrong)?)?;
            read.push("function_call");
        }
        if speaker == Speaker::Caller && calls.is_none() {
            let list =
                calls_in(&Value::String(content)).ok_or(MessageError::NotACall { role: role.clone() })?;
            calls = tool_calls(&list)?;
            content = String::new();
        }
        // A null says no more than a missing field, unless a template may ask for it.
        let dropped =
            |key: &str, value: &Value| read.contains(&key) || (key == "function_call" && value.is_null());
        Ok(Message {
            role: speaker.name().map_or(role, str::to_owned),
            content,
            reasoning_content: reasoning,
            tool_calls: calls,
            name: text("name")?,
            tool_call_id: text("tool_call_id")?,
            extra: object
                .iter()
                .filter(|(key, value)| !dropped(key, value))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        })
    }

    /// The role that a name stands for (`human` is `user`); `None` for a name nobody knows.
    pub fn role_of(name: &str) -> Option<&'static str> {
        Speaker::of(name).name()
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
        self.add_extra(&mut object);
        Value::Object(object)
    }

    /// The other fields, and reasoning under the second name that templates (gpt-oss) read it by, as transformers does.
    fn add_extra(&self, object: &mut Map<String, Value>) {
        if let Some(reasoning) = &self.reasoning_content
            && !self.extra.contains_key("thinking")
        {
            object.insert("thinking".into(), reasoning.as_str().into());
        }
        for (key, value) in &self.extra {
            // What stands in a named field cannot be replaced from here.
            if !object.contains_key(key) {
                object.insert(key.clone(), value.clone());
            }
        }
    }

    /// [`Message::to_json`] as a template's value, with the arguments of its tool calls in the form asked for.
    pub(crate) fn to_value(&self, arguments: Arguments) -> jinja::Result<jinja::Value> {
        let Value::Object(object) = self.to_json() else { return Ok(jinja::Value::None) };
        let mut entries = Vec::with_capacity(object.len());
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

/// Names of a message's text, the first that holds something wins.
const CONTENT_FIELDS: &[&str] = &["content", "value", "text"];
/// Names of a message's reasoning, in the order in which transformers looks for them.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Who speaks, by the names that data sets use.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaker {
    System,
    Developer,
    User,
    Assistant,
    Tool,
    /// An assistant whose text is a call.
    Caller,
    Other,
}

impl Speaker {
    fn of(role: &str) -> Speaker {
        let role = role.trim().to_lowercase().replace(['-', ' '], "_");
        match role.as_str() {
            "system" => Speaker::System,
            "developer" => Speaker::Developer,
            "user" | "human" | "prompter" => Speaker::User,
            "assistant" | "gpt" | "gpt4" | "gpt_4" | "chatgpt" | "bing" | "bard" | "claude" | "model"
            | "ai" | "bot" | "chatbot" | "llm" => Speaker::Assistant,
            "tool" | "function" | "observation" | "ipython" | "tool_response" | "tool_result"
            | "tool_results" | "tool_output" | "function_response" | "function_result"
            | "function_output" => Speaker::Tool,
            "function_call" | "function_calls" | "tool_call" | "tool_calls" => Speaker::Caller,
            _ => Speaker::Other,
        }
    }

    fn name(self) -> Option<&'static str> {
        match self {
            Speaker::System => Some("system"),
            Speaker::Developer => Some("developer"),
            Speaker::User => Some("user"),
            Speaker::Assistant | Speaker::Caller => Some("assistant"),
            Speaker::Tool => Some("tool"),
            Speaker::Other => None,
        }
    }
}

/// The calls in a value: one or a list, as JSON or as JSON in a string; `parameters` is another word for `arguments`.
/// `None` if it is anything else.
fn calls_in(value: &Value) -> Option<Value> {
    let parsed = match value {
        Value::String(text) => serde_json::from_str(text.trim()).ok()?,
        other => other.clone(),
    };
    let mut list = match parsed {
        Value::Array(list) if !list.is_empty() => list,
        Value::Object(call) => vec![Value::Object(call)],
        _ => return None,
    };
    for call in &mut list {
        let function = match call.get("function") {
            Some(Value::Object(_)) => &mut call["function"],
            _ => call,
        };
        let function = function.as_object_mut()?;
        if !function.get("name").is_some_and(Value::is_string) {
            return None;
        }
        if !function.contains_key("arguments")
            && let Some(parameters) = function.remove("parameters")
        {
            function.insert("arguments".into(), parameters);
        }
    }
    Some(Value::Array(list))
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

    #[track_caller]
    fn reads(json: &str, expected: Value) {
        let value: Value = serde_json::from_str(json).expect("the case is JSON");
        let message = Message::from_json(&value).expect(json);
        assert_eq!(message.to_json(), expected, "{json}");
        // What is written to a file is read back the same.
        let written = serde_json::to_value(&message).expect("a message is JSON");
        assert_eq!(Message::from_json(&written), Ok(message.clone()), "{json}");
        assert_eq!(serde_json::from_value::<Message>(written).expect("a message"), message, "{json}");
    }

    #[test]
    fn other_fields_reach_the_template_and_reasoning_has_three_names() {
        // Expected is what transformers 5.23 hands to a template (`_alias_reasoning_fields`).
        let all = json!({"role": "assistant", "content": "4", "reasoning_content": "why", "thinking": "why"});
        reads(r#"{"role":"assistant","thinking":"why","content":"4"}"#, all.clone());
        reads(r#"{"role":"assistant","reasoning_content":"why","content":"4"}"#, all);
        reads(
            r#"{"role":"assistant","reasoning":"why","content":"4","tool_plan":"none","n":[1,null]}"#,
            json!({"role": "assistant", "content": "4", "reasoning_content": "why", "thinking": "why", "reasoning": "why",
                   "tool_plan": "none", "n": [1, null]}),
        );
        reads(
            r#"{"role":"assistant","reasoning":"c","thinking":"b","reasoning_content":"a","content":"4"}"#,
            json!({"role": "assistant", "content": "4", "reasoning_content": "a", "reasoning": "c", "thinking": "b"}),
        );
        reads(
            r#"{"role":"assistant","reasoning_content":null,"thinking":"b","content":"4"}"#,
            json!({"role": "assistant", "content": "4", "reasoning_content": "b", "thinking": "b"}),
        );
        reads(
            r#"{"role":"user","content":"a","text":"b"}"#,
            json!({"role": "user", "content": "a", "text": "b"}),
        );
    }

    #[test]
    fn roles_are_known_by_many_names_in_any_case() {
        for (name, role) in [
            ("Human", "user"),
            ("USER", "user"),
            ("prompter", "user"),
            ("GPT", "assistant"),
            ("Model", "assistant"),
            ("chatgpt", "assistant"),
            ("bot", "assistant"),
            ("AI", "assistant"),
            ("System", "system"),
            ("developer", "developer"),
            ("observation", "tool"),
            ("function", "tool"),
            ("Tool Response", "tool"),
            ("tool-result", "tool"),
            ("ipython", "tool"),
            ("Narrator", "Narrator"),
        ] {
            check(&json!({"from": name, "value": "x"}).to_string(), Ok(Message::new(role, "x")));
            check(&json!({"role": name, "text": "x"}).to_string(), Ok(Message::new(role, "x")));
        }
    }

    #[test]
    fn calls_are_read_from_turns_of_their_own_and_from_the_old_field() {
        let call =
            |name: &str| json!({"type": "function", "function": {"name": name, "arguments": {"x": 1}}});
        let calls = |list: &[&str]| {
            let list: Vec<Value> = list.iter().map(|name| call(name)).collect();
            json!({"role": "assistant", "content": "", "tool_calls": list})
        };
        reads(
            r#"{"from":"function_call","value":"{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}"#,
            calls(&["f"]),
        );
        reads(
            r#"{"from":"tool_call","value":"{\"name\": \"f\", \"parameters\": {\"x\": 1}}"}"#,
            calls(&["f"]),
        );
        reads(r#"{"role":"function_call","content":{"name":"f","arguments":{"x":1}}}"#, calls(&["f"]));
        reads(r#"{"role":"tool_calls","content":[{"name":"f","arguments":{"x":1}}]}"#, calls(&["f"]));
        reads(
            r#"{"from":"function_call","value":"[{\"name\":\"f\",\"arguments\":{\"x\":1}},{\"name\":\"g\",\"arguments\":{\"x\":1}}]"}"#,
            calls(&["f", "g"]),
        );
        reads(
            r#"{"role":"assistant","content":null,"function_call":{"name":"f","arguments":{"x":1}}}"#,
            calls(&["f"]),
        );
        check(
            r#"{"from":"gpt","value":"<tool_call>\n{\"name\": \"f\"}\n</tool_call>"}"#,
            Ok(Message::new("assistant", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>")),
        );
        check(
            r#"{"role":"assistant","content":"x","function_call":null}"#,
            Ok(Message::new("assistant", "x")),
        );
        for value in ["look it up", "{}", "[]", "[1]", "{\"arguments\": {}}"] {
            let error = Message::from_json(&json!({"from": "function_call", "value": value}));
            assert_eq!(error, Err(MessageError::NotACall { role: "function_call".into() }), "{value}");
        }
        let error =
            Message::from_json(&json!({"role": "assistant", "function_call": "soon"})).expect_err("no call");
        assert!(error.to_string().contains("`function_call` of a message is a string"), "{error}");
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
