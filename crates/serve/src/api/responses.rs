//! `/v1/responses`: the same answers in OpenAI's newer words. Nothing is kept: each request brings its conversation.

use std::collections::VecDeque;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use draftsmith_text::Message;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::answer::{Head, Item, Sums, finish_reason, gather};
use super::ask::Asked;
use super::error::ApiError;
use super::fields::Fields;
use super::ledger::Ledger;
use super::stream::{Writes, send};
use crate::queue::{End, Event};
use crate::speech::{Delta, Shown};
use crate::tools::Part;

/// Fields that would change the answer, and why they are refused.
const REFUSED: &[(&str, &str)] = &[
    ("previous_response_id", "responses are not kept; send the conversation as `input`"),
    ("conversation", "conversations are not kept; send them as `input`"),
    ("prompt", "there are no stored prompts; send `instructions` and `input`"),
    ("background", "an answer is waited for, or streamed"),
    ("messages", "at this route they are called `input`"),
    ("max_tokens", "at this route it is called `max_output_tokens`"),
    ("response_format", "at this route it is called `text.format`"),
    ("n", "there is one answer"),
];

const LOGPROBS: &str = "message.output_text.logprobs";

pub(super) fn refuse(fields: &Fields<'_>) -> Result<(), ApiError> {
    for (name, why) in REFUSED {
        let asks = match fields.get(name) {
            None | Some(Value::Bool(false)) => false,
            Some(value) => !(*name == "n" && *value == 1),
        };
        if asks {
            return Err(ApiError::unsupported(name, why));
        }
    }
    includes_logprobs(fields).map(drop)
}

/// True if log-probabilities are asked for.
pub(super) fn includes_logprobs(fields: &Fields<'_>) -> Result<bool, ApiError> {
    let list = fields.list("include")?.unwrap_or_default();
    // Reasoning has no items of its own here, so none is left out.
    let known = |value: &&Value| *value == LOGPROBS || *value == "reasoning.encrypted_content";
    match list.iter().find(|value| !known(value)) {
        Some(other) => Err(ApiError::unsupported("include", &format!("there is nothing called {other}"))),
        None => Ok(list.iter().any(|value| *value == LOGPROBS)),
    }
}

/// The schema of `text.format`, and its place.
pub(super) fn text_format(fields: &Fields<'_>) -> Result<(&'static str, Option<Value>), ApiError> {
    let at = "text.format.schema";
    let text = fields.object("text", "text.")?;
    let Some(format) = text.map(|text| text.object("format", "text.format.")).transpose()?.flatten() else {
        return Ok((at, None));
    };
    match format.string("type")? {
        Some("text") => Ok((at, None)),
        Some("json_object") => Ok((at, Some(json!({"type": "object"})))),
        Some("json_schema") => match format.get("schema") {
            Some(schema) => Ok((at, Some(schema.clone()))),
            None => Err(ApiError::invalid(at, format!("`{at}` is missing"))),
        },
        other => {
            let name = "text.format.type";
            let found = other.map_or_else(|| "missing".to_string(), |other| format!("`{other}`"));
            let message = format!("`{name}` is {found}, expected `text`, `json_object` or `json_schema`");
            Err(ApiError::invalid(name, message))
        }
    }
}

/// What an answer says again of its request.
pub(super) fn echoed(fields: &Fields<'_>) -> Map<String, Value> {
    let or = |name: &str, value: Value| (name.to_owned(), fields.get(name).cloned().unwrap_or(value));
    let mut echoed: Map<String, Value> = [
        or("instructions", Value::Null),
        or("max_output_tokens", Value::Null),
        or("max_tool_calls", Value::Null),
        or("metadata", json!({})),
        or("parallel_tool_calls", true.into()),
        or("reasoning", json!({"effort": null, "summary": null})),
        or("temperature", json!(1.0)),
        or("tool_choice", json!("auto")),
        or("tools", json!([])),
        or("top_logprobs", json!(0)),
        or("top_p", json!(1.0)),
        or("truncation", json!("disabled")),
        or("text", json!({"format": {"type": "text"}})),
        or("user", Value::Null),
    ]
    .into_iter()
    .collect();
    if echoed["text"].get("format").is_none_or(Value::is_null) {
        echoed["text"]["format"] = json!({"type": "text"});
    }
    // Whatever was asked for, nothing is kept.
    echoed.insert("store".into(), false.into());
    echoed.insert("background".into(), false.into());
    echoed.insert("previous_response_id".into(), Value::Null);
    echoed
}

/// `instructions` and `input` as the messages of a chat.
pub(super) fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    let mut messages: Vec<Message> = Vec::new();
    if let Some(instructions) = fields.string("instructions")? {
        messages.push(Message::new("system", instructions));
    }
    match fields.get("input") {
        None => return Err(ApiError::invalid("input", "`input` is missing")),
        Some(Value::String(text)) => messages.push(Message::new("user", text.as_str())),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                add(item, &format!("input[{i}]"), &mut messages)?;
            }
        }
        Some(Value::Array(_)) => return Err(ApiError::invalid("input", "`input` has no item")),
        Some(_) => return Err(ApiError::invalid("input", "`input` is neither a text nor a list of items")),
    }
    Ok(messages)
}

/// One item of the input.
fn add(item: &Value, at: &str, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let name = format!("{at}.");
    let fields = Fields::inside(item, &name)?;
    let missing = |field: &str| {
        let name = fields.name(field);
        ApiError::invalid(&name, format!("`{name}` is missing"))
    };
    let read = |value: &Value| {
        Message::from_json(value).map_err(|error| ApiError::invalid(at, format!("`{at}`: {error}")))
    };
    match fields.string("type")?.unwrap_or("message") {
        "message" => {
            let mut message = read(&json!({
                "role": fields.string("role")?.ok_or_else(|| missing("role"))?,
                "content": fields.get("content").map(plain).ok_or_else(|| missing("content"))?,
            }))?;
            // What templates call it.
            if message.role == "developer" {
                message.role = "system".into();
            }
            match messages.last_mut() {
                // Templates know one system message, at the beginning.
                Some(before) if before.role == "system" && message.role == "system" => {
                    before.content = format!("{}\n\n{}", before.content, message.content);
                }
                _ => messages.push(message),
            }
        }
        "function_call" => {
            let id = fields.string("call_id")?.ok_or_else(|| missing("call_id"))?;
            let function = fields.string("name")?.ok_or_else(|| missing("name"))?;
            let arguments = fields.string("arguments")?.ok_or_else(|| missing("arguments"))?;
            let call = json!({
                "id": id, "type": "function", "function": {"name": function, "arguments": arguments},
            });
            match messages.last_mut() {
                Some(before) if before.role == "assistant" => match &mut before.tool_calls {
                    Some(Value::Array(calls)) => calls.push(call),
                    other => *other = Some(json!([call])),
                },
                _ => messages.push(read(&json!({"role": "assistant", "content": "", "tool_calls": [call]}))?),
            }
        }
        "function_call_output" => {
            let id = fields.string("call_id")?.ok_or_else(|| missing("call_id"))?;
            let output = fields.get("output").map(plain).ok_or_else(|| missing("output"))?;
            let mut message = read(&json!({"role": "tool", "content": output, "tool_call_id": id}))?;
            let mut calls = messages.iter().filter_map(|m| m.tool_calls.as_ref()?.as_array()).flatten();
            let called = calls.rfind(|call| call["id"] == id);
            message.name = called.and_then(|call| Some(call["function"]["name"].as_str()?.to_owned()));
            messages.push(message);
        }
        // What a model thought before is no part of what it reads again.
        "reasoning" => {}
        other => {
            let message = format!(
                "`{at}.type` is `{other}`, which is not supported: send messages, calls and their outputs"
            );
            return Err(ApiError::unsupported_as(&format!("{at}.type"), message));
        }
    }
    Ok(())
}

/// Refusals as text, everything else as it is.
fn plain(content: &Value) -> Value {
    let Some(parts) = content.as_array() else { return content.clone() };
    let part = |part: &Value| match (part["type"].as_str(), part["refusal"].as_str()) {
        (Some("refusal"), Some(text)) => json!({"type": "text", "text": text}),
        _ => part.clone(),
    };
    parts.iter().map(part).collect()
}

/// A response without what it consists of.
fn object(head: &Head, asked: &Asked, status: &str, output: &[Value]) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("id".into(), head.id.as_str().into());
    map.insert("object".into(), "response".into());
    map.insert("created_at".into(), head.created.into());
    map.insert("status".into(), status.into());
    map.insert("error".into(), Value::Null);
    map.insert("incomplete_details".into(), Value::Null);
    map.insert("model".into(), head.model.as_str().into());
    map.insert("output".into(), output.into());
    map.insert("usage".into(), Value::Null);
    map.extend(asked.echoed.clone());
    map
}

/// A response that ended.
fn ended(head: &Head, asked: &Asked, sums: &Sums, reason: &str, output: &[Value]) -> Map<String, Value> {
    let cut = reason == "length";
    let mut map = object(head, asked, status(cut), output);
    if cut {
        map.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
    } else {
        map.insert("completed_at".into(), crate::unix_s().into());
    }
    let input = asked.prompt_tokens();
    let usage = json!({
        "input_tokens": input,
        "input_tokens_details": {"cached_tokens": sums.cached_tokens(), "cache_write_tokens": 0},
        "output_tokens": sums.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input + sums.tokens,
    });
    map.insert("usage".into(), usage);
    if asked.trace {
        sums.describe(&mut map);
    }
    map
}

fn status(cut: bool) -> &'static str {
    if cut { "incomplete" } else { "completed" }
}

/// The id of item `index`.
fn item_id(head: &Head, kind: &str, index: usize) -> String {
    let rest = head.id.trim_start_matches("resp_");
    format!("{kind}_{rest}{index:04x}")
}

fn text_part(text: &str, logprobs: &Value) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

fn message_item(id: &str, status: &str, content: Vec<Value>) -> Value {
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn call_item(id: &str, status: &str, call_id: &str, name: &str, arguments: &str) -> Value {
    json!({
        "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
        "arguments": arguments,
    })
}

/// Log-probabilities of tokens as this route has them; a list, empty where nobody asked.
fn logprobs(head: &Head, asked: &Asked, tokens: &[Shown]) -> Value {
    match asked.options.logprobs {
        Some(_) => head.logprobs(tokens, 0)["content"].take(),
        None => json!([]),
    }
}

/// Waits for the answer and writes it.
pub(super) async fn whole(
    head: &Head,
    asked: &Asked,
    events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
    ledger: &mut Ledger,
) -> Result<Response, ApiError> {
    let (choices, sums) = gather(asked, events, timeout_s, ledger).await?;
    let choice = &choices[0];
    let reason = choice.reason.unwrap_or("stop");
    let mut items = choice.items.clone();
    if items.is_empty() {
        items.push(Item::Text(String::new()));
    }
    let last = items.len() - 1;
    let mut tokens = Some(choice.tokens.as_slice());
    let write = |(index, item): (usize, &Item)| {
        let status = status(reason == "length" && index == last);
        match item {
            Item::Text(text) => {
                // Those of calls are not told apart.
                let logprobs = logprobs(head, asked, tokens.take().unwrap_or_default());
                message_item(&item_id(head, "msg", index), status, vec![text_part(text, &logprobs)])
            }
            Item::Call { id, name, arguments } => {
                call_item(&item_id(head, "fc", index), status, id, name, arguments)
            }
        }
    };
    let output: Vec<Value> = items.iter().enumerate().map(write).collect();
    Ok(Json(Value::Object(ended(head, asked, &sums, reason, &output))).into_response())
}

/// The body of a streamed answer.
pub(super) fn body(
    head: Head,
    asked: Asked,
    events: UnboundedReceiver<(usize, Event)>,
    timeout_s: f64,
    ledger: Ledger,
) -> Body {
    let mut writer = Writer {
        head,
        asked,
        timeout_s,
        ledger,
        number: 0,
        output: Vec::new(),
        open: None,
        called: false,
        waiting: Vec::new(),
        lines: VecDeque::new(),
        done: false,
    };
    let response = Value::Object(object(&writer.head, &writer.asked, "in_progress", &[]));
    writer.send("response.created", json!({"response": response}));
    writer.send("response.in_progress", json!({"response": response}));
    send(writer, events)
}

/// The item under way.
enum Open {
    Message { text: String, tokens: Vec<Shown> },
    Call { id: String, name: String, arguments: String },
}

struct Writer {
    head: Head,
    asked: Asked,
    timeout_s: f64,
    ledger: Ledger,
    /// Events sent.
    number: u64,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<Open>,
    called: bool,
    /// Tokens that no event has shown.
    waiting: Vec<Shown>,
    lines: VecDeque<String>,
    done: bool,
}

impl Writer {
    fn send(&mut self, kind: &str, mut event: Value) {
        event["type"] = kind.into();
        event["sequence_number"] = self.number.into();
        self.number += 1;
        self.lines.push_back(format!("event: {kind}\ndata: {event}\n\n"));
    }

    fn id(&self, kind: &str) -> String {
        item_id(&self.head, kind, self.output.len())
    }

    fn say(&mut self, text: &str) {
        let index = self.output.len();
        let id = self.id("msg");
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close(false);
            return self.begin_message(text);
        }
        let tokens = std::mem::take(&mut self.waiting);
        let logprobs = logprobs(&self.head, &self.asked, &tokens);
        if let Some(Open::Message { text: all, tokens: shown }) = &mut self.open {
            all.push_str(text);
            shown.extend(tokens);
        }
        let event = json!({
            "item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": logprobs,
        });
        self.send("response.output_text.delta", event);
    }

    fn begin_message(&mut self, text: &str) {
        let index = self.output.len();
        let id = self.id("msg");
        let item = message_item(&id, "in_progress", Vec::new());
        self.send("response.output_item.added", json!({"output_index": index, "item": item}));
        let part = text_part("", &json!([]));
        let event = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
        self.send("response.content_part.added", event);
        self.open = Some(Open::Message { text: String::new(), tokens: Vec::new() });
        if !text.is_empty() {
            self.say(text);
        }
    }

    fn call(&mut self, id: &str, name: &str) {
        self.close(false);
        self.called = true;
        self.waiting.clear();
        let item = call_item(&self.id("fc"), "in_progress", id, name, "");
        let event = json!({"output_index": self.output.len(), "item": item});
        self.send("response.output_item.added", event);
        self.open = Some(Open::Call { id: id.into(), name: name.into(), arguments: String::new() });
    }

    fn argue(&mut self, text: &str) {
        if let Some(Open::Call { arguments, .. }) = &mut self.open {
            arguments.push_str(text);
        }
        self.waiting.clear();
        let event = json!({"item_id": self.id("fc"), "output_index": self.output.len(), "delta": text});
        self.send("response.function_call_arguments.delta", event);
    }

    /// Ends the item under way. `cut`: the answer ended in it.
    fn close(&mut self, cut: bool) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        let status = status(cut);
        let item = match open {
            Open::Message { text, tokens } => {
                let id = self.id("msg");
                let logprobs = logprobs(&self.head, &self.asked, &tokens);
                let at = |field: &str, value: Value| {
                    let mut event = json!({"item_id": id, "output_index": index, "content_index": 0});
                    event[field] = value;
                    event
                };
                let mut event = at("text", text.as_str().into());
                event["logprobs"] = logprobs.clone();
                self.send("response.output_text.done", event);
                let part = text_part(&text, &logprobs);
                self.send("response.content_part.done", at("part", part.clone()));
                message_item(&id, status, vec![part])
            }
            Open::Call { id: call, name, arguments } => {
                let id = self.id("fc");
                let event = json!({
                    "item_id": id, "output_index": index, "name": name, "arguments": arguments,
                });
                self.send("response.function_call_arguments.done", event);
                call_item(&id, status, &call, &name, &arguments)
            }
        };
        self.send("response.output_item.done", json!({"output_index": index, "item": item}));
        self.output.push(item);
    }

    fn delta(&mut self, delta: &Delta) {
        self.waiting.extend(delta.tokens.iter().cloned());
        if self.asked.tools.is_none() {
            if !delta.text.is_empty() {
                self.say(&delta.text);
            }
            return;
        }
        for part in &delta.parts {
            match part {
                Part::Text(text) => self.say(text),
                Part::Call { id, name, .. } => self.call(id, name),
                Part::Arguments { text, .. } => self.argue(text),
            }
        }
    }

    fn end(&mut self, end: &End) {
        self.delta(&end.rest);
        let mut sums = Sums::default();
        sums.add(&self.asked, 0, end);
        self.ledger.cached(sums.cached_tokens());
        let reason = match finish_reason(&end.outcome, &self.asked, self.called, self.timeout_s) {
            Ok(reason) => reason,
            Err(error) => return self.fail(&error),
        };
        self.ledger.end(end, reason);
        if self.output.is_empty() && self.open.is_none() {
            self.begin_message("");
        }
        // Control tokens behind the text.
        let tokens = std::mem::take(&mut self.waiting);
        if let Some(Open::Message { tokens: shown, .. }) = &mut self.open {
            shown.extend(tokens);
        }
        let cut = reason == "length";
        self.close(cut);
        let response = ended(&self.head, &self.asked, &sums, reason, &self.output);
        let kind = if cut { "response.incomplete" } else { "response.completed" };
        self.send(kind, json!({"response": response}));
        self.ledger.close();
        self.done = true;
    }
}

impl Writes for Writer {
    fn next(&mut self) -> Option<String> {
        self.lines.pop_front()
    }

    fn is_done(&self) -> bool {
        self.done
    }

    fn take(&mut self, index: usize, event: Event) {
        let Some(event) = self.ledger.see(index, event) else { return };
        match event {
            Event::Prompt(_) => {}
            Event::Delta(delta) => self.delta(&delta),
            Event::End(end) => self.end(&end),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.ledger.fail(error, true);
        self.ledger.close();
        let mut response = object(&self.head, &self.asked, "failed", &self.output);
        response.insert("error".into(), json!({"code": "server_error", "message": error.message()}));
        self.send("response.failed", json!({"response": response}));
        self.done = true;
    }
}
