//! Any text as a chat template, rendered with two short conversations: an error, or text, in bounded time.

#![no_main]

use draftsmith_text::{ChatTemplate, Message, RenderOptions};

libfuzzer_sys::fuzz_target!(|source: &str| {
    let template = match ChatTemplate::parse(source) {
        Ok(template) => template.with_tokens("<s>", "</s>"),
        Err(e) => {
            let _ = (e.to_string(), e.hint());
            return;
        }
    };
    let tools = serde_json::json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
    let talk = [Message::new("system", "s"), Message::new("user", "a\n"), Message::new("assistant", "<b>")];
    for (messages, tools) in [(&talk[1..2], None), (&talk[..], Some(tools))] {
        let options = RenderOptions { tools, ..RenderOptions::default() };
        match template.render(messages, &options) {
            Ok(text) => drop(text),
            Err(e) => {
                let _ = (e.to_string(), e.hint());
            }
        }
    }
});
