//! The OpenAI protocol as far as it is used: bodies of requests, events of answers.
//!
//! Everything that comes from the server is foreign: unknown fields are ignored, missing ones are faults, and nothing
//! is read beyond a limit that follows from the longest answer.

use std::io::{BufRead, BufReader, Read};

use draftsmith_formats::run::ServerApi;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::http::{Fault, error_text};
use crate::{Prompt, Request};

/// Bytes of an answer besides its tokens.
const ANSWER_BYTES: u64 = 1 << 20;
/// Bytes that the event of one token may have.
const EVENT_BYTES: u64 = 8 << 10;
/// Stop texts that the protocol allows.
const MAX_STOPS: usize = 4;

/// Fields of a request for an answer, without those of the run file.
pub(super) fn body(
    api: ServerApi,
    request: &Request,
    prompt: &Prompt,
    stops: &[String],
) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut set = |name: &str, value: Value| fields.insert(name.to_string(), value);
    match api {
        ServerApi::Text => {
            set("prompt", prompt.text.as_str().into());
        }
        ServerApi::Ids => {
            set("prompt", prompt.ids.as_slice().into());
        }
        ServerApi::Chat => {
            set("messages", json!(request.messages));
            if let Some(tools) = &request.render.tools {
                set("tools", tools.clone());
            }
            if !request.render.kwargs.is_empty() {
                set("chat_template_kwargs", Value::Object(request.render.kwargs.clone()));
            }
        }
    }
    set("max_tokens", prompt.max_new_tokens.into());
    let sampling = &request.sampling;
    set("temperature", number(sampling.temperature));
    if !sampling.is_greedy() {
        set("top_p", number(sampling.top_p));
        // Servers keep seeds in 32 or 64 bits, some of them signed.
        set("seed", (sampling.seed & 0x7fff_ffff).into());
    }
    if !stops.is_empty() {
        set("stop", stops.iter().take(MAX_STOPS).map(String::as_str).collect());
    }
    fields
}

/// 0.8 as 0.8, not as the nearest 64-bit number to the nearest 32-bit number.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |v| json!(v))
}

/// What a server may send for an answer of so many tokens.
pub(super) fn byte_limit(max_new_tokens: usize) -> u64 {
    ANSWER_BYTES + EVENT_BYTES * max_new_tokens as u64
}

/// An answer as far as it came.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) text: String,
    pub(super) finish: Option<String>,
    pub(super) prompt_tokens: Option<u64>,
    /// Tokens of the answer as the server counts them.
    pub(super) counted: Option<u64>,
    /// The prompt as the server read it, if it says so.
    pub(super) prompt_ids: Option<Vec<u32>>,
    /// The generated tokens, if the server gives them.
    pub(super) ids: Option<Vec<u32>>,
    /// Something beside the text that the text does not tell.
    pub(super) beside: Option<&'static str>,
}

#[derive(Deserialize)]
struct Event {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u64,
    text: Option<String>,
    #[serde(alias = "message")]
    delta: Option<Delta>,
    finish_reason: Option<String>,
    token_ids: Option<Vec<u32>>,
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
    tool_calls: Option<Value>,
}

impl Reply {
    /// Takes one event of a stream, or the whole answer where none was asked for.
    pub(super) fn take(&mut self, data: &[u8]) -> Result<(), Fault> {
        let garbled = |reason: String| Fault::Garbled { reason };
        let event: Event = serde_json::from_slice(data).map_err(|e| garbled(e.to_string()))?;
        if let Some(error) = event.error.filter(|e| !e.is_null()) {
            return Err(Fault::Inside { message: error_text(&error) });
        }
        if event.choices.is_none() && event.usage.is_none() {
            return Err(garbled("neither `choices` nor `usage`".to_string()));
        }
        if let Some(usage) = event.usage {
            self.prompt_tokens = usage.prompt_tokens.or(self.prompt_tokens);
            self.counted = usage.completion_tokens.or(self.counted);
        }
        // With completions the prompt stands in the choice, with chats beside it.
        self.prompt_ids = event.prompt_token_ids.or(self.prompt_ids.take());
        for choice in event.choices.into_iter().flatten().filter(|c| c.index == 0) {
            self.text.push_str(choice.text.as_deref().unwrap_or_default());
            self.prompt_ids = choice.prompt_token_ids.or(self.prompt_ids.take());
            if let Some(ids) = choice.token_ids {
                self.ids.get_or_insert_default().extend(ids);
            }
            if let Some(delta) = choice.delta {
                self.text.push_str(delta.content.as_deref().unwrap_or_default());
                if delta.reasoning_content.is_some_and(|text| !text.is_empty()) {
                    self.beside = Some("reasoning");
                }
                if delta.tool_calls.is_some_and(|calls| calls.as_array().is_some_and(|c| !c.is_empty())) {
                    self.beside = Some("tool calls");
                }
            }
            self.finish = choice.finish_reason.or(self.finish.take());
        }
        Ok(())
    }

    /// Reads a whole event stream; `go_on` is asked before each line, and `None` comes if it says no.
    pub(super) fn stream(
        reader: impl Read,
        limit: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Reply>, Fault> {
        let mut reader = BufReader::new(reader.take(limit + 1));
        let (mut reply, mut line, mut read) = (Reply::default(), Vec::new(), 0);
        loop {
            if !go_on() {
                return Ok(None);
            }
            line.clear();
            read += reader.read_until(b'\n', &mut line).map_err(|e| read_fault(&e))? as u64;
            if read > limit {
                return Err(Fault::TooLarge { limit });
            }
            let whole = line.ends_with(b"\n");
            // Comments and event names carry nothing; the text follows a colon and maybe a space.
            if let Some(data) = line.trim_ascii_end().strip_prefix(b"data:") {
                match data.trim_ascii_start() {
                    b"[DONE]" => break,
                    data if whole => reply.take(data)?,
                    _ => return Err(Fault::Cut),
                }
            }
            if !whole {
                break;
            }
        }
        Ok(Some(reply))
    }

    /// True if the token limit ended it, false if the model did.
    pub(super) fn is_cut(&self) -> Result<bool, Fault> {
        match self.finish.as_deref() {
            Some("stop") => Ok(false),
            Some("length") => Ok(true),
            Some(other) => Err(Fault::Garbled { reason: format!("finish reason `{other}`") }),
            // Without any text this is what servers send when they have nothing to say; with text it is a cut.
            None if self.text.is_empty() => Err(Fault::NoChoice),
            None => Err(Fault::Cut),
        }
    }
}

/// A read that failed: too late, or in the middle.
fn read_fault(error: &std::io::Error) -> Fault {
    let timed_out = error.kind() == std::io::ErrorKind::TimedOut
        || error
            .get_ref()
            .and_then(|e| e.downcast_ref::<ureq::Error>())
            .is_some_and(|e| matches!(e, ureq::Error::Timeout(_)));
    if timed_out { Fault::Silence } else { Fault::Cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &str) -> Result<Reply, Fault> {
        Reply::stream(stream.as_bytes(), 10_000, &|| true).map(|reply| reply.expect("nobody says stop"))
    }

    #[test]
    fn events_of_both_kinds_add_up_to_one_answer() {
        let completions = ": ping\n\nevent: x\ndata: {\"choices\":[{\"text\":\"ab\",\"index\":0}]}\r\n\r\n\
            data:{\"choices\":[{\"text\":\" c\",\"finish_reason\":\"stop\"},{\"index\":1,\"text\":\"no\"}]}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7}}\n\ndata: [DONE]\n\ndata: after the end";
        let reply = read(completions).unwrap();
        assert_eq!((reply.text.as_str(), reply.prompt_tokens, reply.is_cut()), ("ab c", Some(7), Ok(false)));
        let chat = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}],\"usage\":null}\n\n\
            data: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\n\n\
            data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
        let reply = read(chat).unwrap();
        assert_eq!((reply.text.as_str(), reply.is_cut()), ("é", Ok(true)));
    }

    #[test]
    fn token_ids_are_read_where_servers_put_them() {
        let completions = "data: {\"choices\":[{\"text\":\"a\",\"prompt_token_ids\":[1,2],\"token_ids\":[7]}]}\n\n\
            data: {\"choices\":[{\"text\":\"b\",\"token_ids\":[8,9],\"finish_reason\":\"stop\"}]}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":3}}\n\n";
        let reply = read(completions).unwrap();
        assert_eq!(
            (reply.prompt_ids, reply.ids, reply.counted),
            (Some(vec![1, 2]), Some(vec![7, 8, 9]), Some(3))
        );
        let chat = "data: {\"prompt_token_ids\":[1],\"choices\":[{\"delta\":{\"content\":\"a\"},\"token_ids\":null}]}\n\n";
        let reply = read(chat).unwrap();
        assert_eq!((reply.prompt_ids, reply.ids, reply.counted), (Some(vec![1]), None, None));
        let mut whole = Reply::default();
        whole.take(br#"{"choices":[{"text":"a","token_ids":[7]}],"usage":{"completion_tokens":1}}"#).unwrap();
        assert_eq!((whole.ids, whole.counted), (Some(vec![7]), Some(1)));
        assert!(matches!(read("data: {\"choices\":[{\"token_ids\":[-1]}]}\n"), Err(Fault::Garbled { .. })));
    }

    #[test]
    fn a_stream_that_is_not_whole_or_not_ours_is_a_fault() {
        let piece = "data: {\"choices\":[{\"text\":\"ab\"}]}\n\n";
        assert_eq!(read(piece).unwrap().is_cut(), Err(Fault::Cut));
        assert_eq!(read(&format!("{piece}data: {{\"choi")), Err(Fault::Cut));
        assert_eq!(read("data: [DONE]\n").unwrap().is_cut(), Err(Fault::NoChoice));
        assert_eq!(read("data: {\"choices\":[]}\n\n").unwrap().is_cut(), Err(Fault::NoChoice));
        assert!(matches!(read("data: {\"choices\":\n"), Err(Fault::Garbled { .. })));
        assert!(matches!(read("data: {\"choices\":{}}\n"), Err(Fault::Garbled { .. })));
        assert!(matches!(read("data: 3\n"), Err(Fault::Garbled { .. })));
        assert!(matches!(read("data: {}\n"), Err(Fault::Garbled { .. })));
        let inside = read("data: {\"error\":{\"message\":\"out of memory\\nat x\"}}\n");
        assert_eq!(inside, Err(Fault::Inside { message: "out of memory".to_string() }));
        assert_eq!(read(&"x".repeat(20_000)), Err(Fault::TooLarge { limit: 10_000 }));
        let odd = read("data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":\"abort\"}]}\n").unwrap();
        assert!(matches!(odd.is_cut(), Err(Fault::Garbled { .. })));
    }

    #[test]
    fn what_the_text_does_not_tell_is_noticed() {
        let thinking = "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\n";
        assert_eq!(read(thinking).unwrap().beside, Some("reasoning"));
        let tools = "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"id\":\"1\"}]}}]}\n";
        assert_eq!(read(tools).unwrap().beside, Some("tool calls"));
        let none = "data: {\"choices\":[{\"delta\":{\"tool_calls\":[],\"reasoning\":\"\"}}]}\n";
        assert_eq!(read(none).unwrap().beside, None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_a_fault(bytes: Vec<u8>, limit in 0u64..300) {
            if let Ok(Some(reply)) = Reply::stream(bytes.as_slice(), limit, &|| true) {
                proptest::prop_assert!(reply.text.len() as u64 <= limit);
                let _ = reply.is_cut();
            }
        }

        #[test]
        fn damaged_events_are_an_answer_or_a_fault(at in 0usize..60, byte: u8) {
            let mut bytes = b"data: {\"choices\":[{\"text\":\"ab\",\"finish_reason\":\"stop\"}]}\n\n".to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(Some(reply)) = Reply::stream(bytes.as_slice(), 1000, &|| true) {
                let _ = reply.is_cut();
            }
        }
    }
}
