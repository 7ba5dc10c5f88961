//! Calls of tools and `/v1/responses` over real HTTP: the tiny target with a chat template that shows tools.

use serde_json::{Value, json};

use crate::serve::{Served, ask, with};
use crate::support::{Home, repository};

/// A template of our own in the manner of Qwen's.
const TEMPLATE: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\nTools:' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\nCall one by <tool_call>\n{\"name\": , \"arguments\": }\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\nIt said: ' + message.content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;

/// The tiny target with another chat template.
fn target(home: &Home, template: &str) -> String {
    let folder = repository().join("fixtures/tiny-target");
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        home.write(&format!("target/{file}"), std::fs::read(folder.join(file)).unwrap());
    }
    let text = std::fs::read_to_string(folder.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["chat_template"] = template.into();
    home.write("target/tokenizer_config.json", config.to_string());
    home.path().join("target").display().to_string()
}

/// A server whose target knows tools and drafts for itself.
pub(crate) fn with_tools(more: &[&str]) -> Served {
    let home = Home::new();
    let target = target(&home, TEMPLATE);
    Served::start_with(home, &target, &[&["--draft-model", &target, "--kv-budget", "20000"], more].concat())
}

fn parameters() -> Value {
    json!({
        "type": "object",
        "properties": {
            "unit": {"$ref": "#/$defs/unit"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["unit", "days", "tags"],
        "$defs": {"unit": {"enum": ["km", "mi"]}},
    })
}

fn tool(name: &str, strict: bool) -> Value {
    json!({"type": "function", "function": {
        "name": name, "description": "Tells something.", "parameters": parameters(), "strict": strict,
    }})
}

/// A request that must be answered with a call.
fn calling() -> Value {
    let more = json!({
        "tools": [tool("distance", false), tool("speed", true)], "tool_choice": "required", "max_tokens": 400,
        "parallel_tool_calls": false,
    });
    with(&ask("How far is it?"), more)
}

#[track_caller]
fn check_call(call: &Value) {
    assert_eq!(call["type"], "function", "{call}");
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_") && id.len() == 29), "{call}");
    let name = call["function"]["name"].as_str().unwrap();
    assert!(["distance", "speed"].contains(&name), "{call}");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    let keys: Vec<&String> = arguments.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["unit", "days", "tags"], "{call}");
    assert!(["km", "mi"].contains(&arguments["unit"].as_str().unwrap()), "{call}");
    assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{call}");
}

/// Calls without their ids, which are drawn.
fn functions(message: &Value) -> Vec<&Value> {
    message["tool_calls"].as_array().into_iter().flatten().map(|call| &call["function"]).collect()
}

#[test]
fn calls_that_are_required_follow_their_schemas_with_every_draft_whole_and_streamed() {
    let served = with_tools(&[]);
    let plans = [
        json!("none"),
        json!("auto"),
        json!({"chain": 3}),
        json!({"tree": {"depth": 3, "top_k": 2, "nodes": 6}}),
    ];
    for more in [
        json!({}),
        json!({"temperature": 1.0, "seed": 4, "n": 2}),
        json!({"temperature": 1.0, "seed": 9, "logprobs": true, "top_logprobs": 1}),
        json!({"tool_choice": {"type": "function", "function": {"name": "speed"}}, "temperature": 1.0, "seed": 2}),
        json!({"parallel_tool_calls": true, "temperature": 1.0, "seed": 5}),
        json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "distance"}}]}}}),
    ] {
        let body = with(&calling(), more);
        let whole = served.chat(&body);
        for choice in whole["choices"].as_array().unwrap() {
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            // Of several the last may be cut by the limit.
            let cut = choice["finish_reason"] == "length" && body["parallel_tool_calls"] == true;
            let reason = if cut { "length" } else { "tool_calls" };
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&json!(reason), &Value::Null),
                "{choice}"
            );
            calls[..calls.len() - usize::from(cut)].iter().for_each(check_call);
            let ids: std::collections::BTreeSet<&str> =
                calls.iter().map(|c| c["id"].as_str().unwrap()).collect();
            assert_eq!(ids.len(), calls.len());
            assert!(calls.len() == 1 || body["parallel_tool_calls"] == true, "{choice}");
            match body["tool_choice"]["type"].as_str() {
                Some("function") => assert_eq!(calls[0]["function"]["name"], "speed"),
                Some(_) => assert!(calls.iter().all(|call| call["function"]["name"] == "distance")),
                None => {}
            }
        }
        for plan in &plans {
            let body = with(&body, json!({"draftsmith": {"draft": plan}}));
            let same = served.chat(&body);
            let parts = served.stream("/v1/chat/completions", &body);
            assert_eq!(parts.last(), Some(&Value::Null), "no [DONE]");
            for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
                let message = &choice["message"];
                assert_eq!(functions(&same["choices"][index]["message"]), functions(message), "{plan}");
                check_stream(&parts, index, choice);
            }
            let usage = &parts[parts.len() - 2]["usage"];
            for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
                assert_eq!(
                    (&same["usage"][count], &usage[count]),
                    (&whole["usage"][count], &whole["usage"][count])
                );
            }
        }
    }
}

/// The parts of choice `index` say what the whole one does, in the form that OpenAI sends.
#[track_caller]
fn check_stream(parts: &[Value], index: usize, choice: &Value) {
    let of_choice: Vec<&Value> = parts
        .iter()
        .filter_map(|part| part["choices"].get(0))
        .filter(|chunk| chunk["index"] == index)
        .collect();
    let role = json!({"role": "assistant", "content": null});
    assert_eq!(of_choice[0]["delta"], role);
    assert_eq!(of_choice.last().unwrap()["finish_reason"], choice["finish_reason"]);
    let mut calls: Vec<Value> = Vec::new();
    let deltas = of_choice.iter().filter_map(|chunk| chunk["delta"]["tool_calls"].as_array()).flatten();
    for delta in deltas {
        let at = delta["index"].as_u64().unwrap() as usize;
        if delta.get("id").is_some() {
            assert_eq!(
                (at, &delta["type"], &delta["function"]["arguments"]),
                (calls.len(), &json!("function"), &json!(""))
            );
            calls.push(delta["function"].clone());
        } else {
            assert_eq!(at + 1, calls.len());
            assert_eq!(delta["function"].as_object().unwrap().keys().collect::<Vec<_>>(), ["arguments"]);
            let before = calls[at]["arguments"].as_str().unwrap().to_owned();
            calls[at]["arguments"] = (before + delta["function"]["arguments"].as_str().unwrap()).into();
        }
    }
    assert_eq!(calls.iter().collect::<Vec<_>>(), functions(&choice["message"]));
    let logprobs: Vec<&Value> =
        of_choice.iter().filter_map(|chunk| chunk["logprobs"]["content"].as_array()).flatten().collect();
    let whole: Vec<&Value> = choice["logprobs"]["content"].as_array().into_iter().flatten().collect();
    assert_eq!(logprobs, whole);
}

#[test]
fn an_answer_without_calls_is_the_text_that_it_was() {
    let served = with_tools(&[]);
    for more in [
        json!({"max_tokens": 40}),
        json!({"max_tokens": 40, "temperature": 0.9, "seed": 3, "logprobs": true}),
    ] {
        // Free, and held where a call began.
        for strict in [false, true] {
            let base = with(&ask("Tell me a story."), more.clone());
            let body = with(&base, json!({"tools": [tool("distance", strict)]}));
            let whole = served.chat(&body);
            let content = whole["choices"][0]["message"]["content"].as_str().unwrap();
            assert!(whole["choices"][0]["message"].get("tool_calls").is_none(), "{whole}");
            for plan in [json!("none"), json!({"chain": 3})] {
                let body = with(&body, json!({"draftsmith": {"draft": plan}}));
                let parts = served.stream("/v1/chat/completions", &body);
                let chunks: Vec<&Value> = parts.iter().filter_map(|part| part["choices"].get(0)).collect();
                let said: String = chunks.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
                assert_eq!((said.as_str(), &chunks[0]["delta"]["content"]), (content, &json!("")), "{plan}");
                let logprobs: Vec<&Value> =
                    chunks.iter().filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
                let tokens = whole["usage"]["completion_tokens"].as_u64().unwrap() as usize;
                assert!(logprobs.is_empty() || logprobs.len() == tokens);
            }
            // With `none` the model is told of no tools.
            let none = with(&body, json!({"tool_choice": "none"}));
            assert_eq!(served.text_of(&none), served.text_of(&base));
        }
    }
}

#[test]
fn a_call_that_is_cut_has_what_there_is_of_it() {
    let served = with_tools(&[]);
    let whole = served.chat(&calling());
    let tokens = whole["usage"]["completion_tokens"].as_u64().unwrap();
    let arguments = functions(&whole["choices"][0]["message"])[0]["arguments"].as_str().unwrap().to_owned();
    let cut = with(&calling(), json!({"max_tokens": tokens - 12}));
    let answer = served.chat(&cut);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let calls = functions(&answer["choices"][0]["message"]);
    assert!(calls.iter().all(|call| arguments.starts_with(call["arguments"].as_str().unwrap())), "{answer}");
    check_stream(&served.stream("/v1/chat/completions", &cut), 0, &answer["choices"][0]);
    // A stop text ends a call as it ends a text.
    let stopped = served.chat(&with(&calling(), json!({"stop": "\"days"})));
    let calls = functions(&stopped["choices"][0]["message"]);
    assert_eq!(calls[0]["arguments"].as_str().unwrap(), arguments.split_once("\"days").unwrap().0);
}

#[test]
fn tools_and_calls_are_rendered_by_the_template() {
    let served = with_tools(&[]);
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "distance", "arguments": "{\"days\": 3}"}});
    let messages = json!([
        {"role": "user", "content": "How far?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Far."},
    ]);
    let shown = tool("distance", false);
    let spelled = |tools: &str| {
        format!(
            "{tools}<|im_start|>user\nHow far?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{{\"name\": \"distance\", \
             \"arguments\": {{\"days\": 3}}}}\n</tool_call><|im_end|>\n<|im_start|>user\nIt said: Far.<|im_end|>\n\
             <|im_start|>assistant\n"
        )
    };
    // As Python's json writes it.
    let json = r#"{"type": "function", "function": {"name": "distance", "description": "Tells something.", "parameters": {"type": "object", "properties": {"unit": {"$ref": "\#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2}}, "required": ["unit", "days", "tags"], "$defs": {"unit": {"enum": ["km", "mi"]}}}, "strict": false}}"#;
    let json = json.replace("\\#", "#");
    let head = format!(
        "<|im_start|>system\nTools:\n{json}\nCall one by <tool_call>\n{{\"name\": , \"arguments\": }}\n</tool_call><|im_end|>\n"
    );
    let ids = |path: &str, body: Value| {
        let (status, answer) = served.post(path, &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    for (tools, choice, text) in [
        (json!([shown]), json!("auto"), spelled(&head)),
        (json!([shown]), json!("none"), spelled("")),
        (Value::Null, Value::Null, spelled("")),
    ] {
        let body = json!({"messages": messages, "tools": tools, "tool_choice": choice});
        let wanted = ids("/tokenize", json!({"prompt": text, "add_special_tokens": false}));
        assert_eq!(ids("/tokenize", body.clone())["tokens"], wanted["tokens"], "{choice}");
        assert_eq!(ids("/v1/chat/completions/render", body.clone())["token_ids"], wanted["tokens"]);
        let answer = ids("/v1/chat/completions", with(&body, json!({"max_tokens": 2})));
        assert_eq!(answer["usage"]["prompt_tokens"], wanted["count"]);
        // The same conversation as items.
        let tools = tools.as_array().map(|tools| {
            let flat = |tool: &Value| with(&tool["function"], json!({"type": "function"}));
            tools.iter().map(flat).collect::<Vec<_>>()
        });
        let input = json!([
            {"role": "user", "content": [{"type": "input_text", "text": "How far?"}]},
            {"type": "function_call", "call_id": "call_1", "name": "distance", "arguments": "{\"days\": 3}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "Far."},
        ]);
        let body = json!({"input": input, "tools": tools, "tool_choice": choice, "max_output_tokens": 2});
        let response = ids("/v1/responses", body);
        // Whether a tool is strict is nothing that the model is told there.
        let less = if text.contains("strict") {
            let text = text.replace(", \"strict\": false", "");
            ids("/tokenize", json!({"prompt": text, "add_special_tokens": false}))["count"].clone()
        } else {
            wanted["count"].clone()
        };
        assert_eq!(response["usage"]["input_tokens"], less, "{response}");
    }
}

#[test]
fn what_is_wrong_with_tools_is_named() {
    let served = with_tools(&[]);
    let chat = "/v1/chat/completions";
    let refuse = |more: Value, param: &str, message: &str| {
        served.refused(chat, &with(&ask("Why?"), more).to_string(), 400, Some(param), message);
    };
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    refuse(json!({"tools": [3]}), "tools[0]", "is a number, not an object");
    refuse(json!({"tools": [{"type": "custom"}]}), "tools[0].type", "functions alone");
    refuse(json!({"tools": [{"function": {}}]}), "tools[0].type", "is missing");
    refuse(json!({"tools": [{"type": "function"}]}), "tools[0].function", "is missing");
    refuse(function(json!({})), "tools[0].function.name", "is missing");
    refuse(function(json!({"name": "a b"})), "tools[0].function.name", "is `a b`, expected 1 to 64");
    refuse(function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters", "is a list");
    let kind = json!({"name": "f", "parameters": {"type": "array"}});
    refuse(function(kind), "tools[0].function.parameters.type", "are an `object`");
    refuse(
        json!({"tools": [tool("f", false), tool("f", false)]}),
        "tools[1]",
        "second tool with the name `f`",
    );
    refuse(json!({"tool_choice": "required"}), "tool_choice", "there are no `tools`");
    refuse(json!({"tool_choice": "maybe"}), "tool_choice", "is `maybe`");
    let named =
        json!({"tools": [tool("f", false)], "tool_choice": {"type": "function", "function": {"name": "g"}}});
    refuse(named, "tool_choice", "`g`, which is not among");
    let odd = json!({"name": "f", "strict": true, "parameters": {"properties": {"a": {"not": {}}}}});
    refuse(function(odd.clone()), "tools[0].function.parameters.properties.a", "cannot be held");
    // Where nothing is held to it, any schema may be shown.
    let loose = with(&odd, json!({"strict": false}));
    served.chat(&with(&ask("Why?"), with(&function(loose), json!({"max_tokens": 2}))));
    refuse(json!({"functions": [{"name": "f"}]}), "functions", "use `tools`");
    refuse(json!({"function_call": {"name": "f"}}), "function_call", "use `tool_choice`");
    let completion = json!({"prompt": "a", "tools": [tool("f", false)]}).to_string();
    served.refused("/v1/completions", &completion, 400, Some("tools"), "/v1/chat/completions");

    // A template that leaves tools out, and one that writes calls in a form of its own.
    let asks = with(&ask("Why?"), json!({"tools": [tool("f", false)], "max_tokens": 2}));
    let plain = Served::start(Home::new(), &[]);
    plain.refused(chat, &asks.to_string(), 400, Some("tools"), "does not tell the model of tools");
    plain.chat(&with(&asks, json!({"tool_choice": "none"})));
    let own = TEMPLATE.replace("tool_call>", "call_me>");
    let (home, more) = (Home::new(), Home::new());
    let (first, second) = (target(&home, &own), target(&more, &own));
    let unknown = Served::start_with(home, &first, &[]);
    unknown.refused(chat, &asks.to_string(), 400, Some("tools"), "--tool-format`: qwen3_coder, glm4");
    let named = Served::start_with(more, &second, &["--tool-format", "llama3_json"]);
    let called = named.chat(&with(&calling(), json!({"temperature": 0})));
    check_call(&called["choices"][0]["message"]["tool_calls"][0]);
    let ended = Home::new().run(&["serve", "--target", &second, "--port", "0", "--tool-format", "morse"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("error: `--tool-format morse` is not known\nhint: choose one of: "),
        "{}",
        ended.stderr
    );
}

#[test]
fn every_form_of_calls_can_be_held_to() {
    for format in draftsmith::serve::tool_formats() {
        let home = Home::new();
        let target = target(&home, TEMPLATE);
        let served = Served::start_with(home, &target, &["--tool-format", format]);
        for seed in 0..3 {
            let answer =
                served.chat(&with(&calling(), json!({"temperature": 1.0, "seed": seed, "max_tokens": 400})));
            let choice = &answer["choices"][0];
            if choice["finish_reason"] == "length" {
                continue;
            }
            assert_eq!(choice["finish_reason"], "tool_calls", "{format}: {choice}");
            let calls = functions(&choice["message"]);
            assert!(!calls.is_empty(), "{format}: {choice}");
            for call in calls {
                let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap())
                    .unwrap_or_else(|e| panic!("{format}: {e} in {call}"));
                assert!(["km", "mi"].contains(&arguments["unit"].as_str().unwrap()), "{format}: {call}");
                assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{format}: {call}");
            }
        }
    }
}

/// The events of a stream of `/v1/responses`: name, then data.
fn events(served: &Served, body: &Value) -> Vec<(String, Value)> {
    let body = with(body, json!({"stream": true}));
    let (status, text, _) = served.send("/v1/responses", None, &body.to_string());
    assert_eq!(status, 200, "{text}");
    let event = |block: &str| {
        let (name, data) = block.strip_prefix("event: ")?.split_once("\ndata: ")?;
        Some((name.to_owned(), serde_json::from_str(data).unwrap()))
    };
    text.split("\n\n").filter_map(event).collect()
}

/// A response without what differs from request to request.
fn steady(response: &Value) -> Value {
    let mut response = response.clone();
    for key in ["id", "created_at", "completed_at"] {
        response[key] = Value::Null;
    }
    response["usage"]["input_tokens_details"] = Value::Null;
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        item["call_id"] = Value::Null;
    }
    response
}

#[test]
fn responses_are_the_answers_of_a_chat_whole_and_streamed() {
    let served = with_tools(&[]);
    let chat = with(&ask("Calculate 22 + 20."), json!({"max_tokens": 30}));
    let body = json!({"input": "Calculate 22 + 20.", "temperature": 0, "max_output_tokens": 30, "metadata": {"a": "b"}});
    let flat = with(&tool("distance", false)["function"], json!({"type": "function"}));
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"], "additionalProperties": false});
    for (more, of_chat, status) in [
        (json!({}), json!({}), "completed"),
        (json!({"max_output_tokens": 2}), json!({"max_tokens": 2}), "incomplete"),
        (
            json!({"temperature": 0.9, "top_p": 0.9, "seed": 3}),
            json!({"temperature": 0.9, "top_p": 0.9, "seed": 3}),
            "",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}}),
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
            "completed",
        ),
        (
            json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
            json!({"logprobs": true, "top_logprobs": 2}),
            "completed",
        ),
        (
            json!({"tools": [flat], "tool_choice": {"type": "function", "name": "distance"}, "max_output_tokens": 400}),
            json!({"tools": [{"type": "function", "function": {"name": "distance", "description": "Tells something.", "parameters": parameters()}}],
                "tool_choice": {"type": "function", "function": {"name": "distance"}}, "max_tokens": 400}),
            "completed",
        ),
    ] {
        let (body, chat) = (with(&body, more), with(&chat, of_chat));
        let (code, whole) = served.post("/v1/responses", &body);
        assert_eq!(code, 200, "{whole}");
        assert!(status.is_empty() || whole["status"] == status, "{whole}");
        let answer = served.chat(&chat);
        let choice = &answer["choices"][0];
        let item = &whole["output"][0];
        assert_eq!(whole["usage"]["output_tokens"], answer["usage"]["completion_tokens"]);
        assert_eq!(whole["incomplete_details"].is_null(), whole["status"] != "incomplete");
        match item["type"].as_str().unwrap() {
            "message" => {
                assert_eq!(item["content"][0]["text"], choice["message"]["content"], "{whole}");
                let logprobs = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
                assert_eq!(item["content"][0]["logprobs"], json!(logprobs));
            }
            "function_call" => {
                let function = functions(&choice["message"])[0];
                assert_eq!((&item["name"], &item["arguments"]), (&function["name"], &function["arguments"]));
            }
            other => panic!("{other}"),
        }
        for key in ["temperature", "metadata", "tools", "tool_choice", "max_output_tokens"] {
            let wanted =
                body.get(key).cloned().unwrap_or(if key == "tools" { json!([]) } else { json!("auto") });
            assert_eq!(whole[key], wanted, "{key}");
        }
        for plan in [json!("none"), json!({"chain": 3})] {
            let events = events(&served, &with(&body, json!({"draftsmith": {"draft": plan}})));
            for (number, (name, data)) in events.iter().enumerate() {
                assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(number)));
            }
            let last = &events.last().unwrap();
            assert_eq!(last.0, format!("response.{}", whole["status"].as_str().unwrap()));
            assert_eq!(steady(&last.1["response"]), steady(&whole), "{plan}");
            let call = item["type"] == "function_call";
            let delta =
                if call { "response.function_call_arguments.delta" } else { "response.output_text.delta" };
            let said: String = events
                .iter()
                .filter(|(name, _)| name == delta)
                .map(|(_, data)| data["delta"].as_str().unwrap())
                .collect();
            let wanted = if call { &item["arguments"] } else { &item["content"][0]["text"] };
            assert_eq!(&json!(said), wanted);
            let names: Vec<&str> =
                events.iter().map(|(name, _)| name.as_str()).filter(|name| *name != delta).collect();
            let mut expected = vec!["response.created", "response.in_progress", "response.output_item.added"];
            match call {
                true => expected.push("response.function_call_arguments.done"),
                false => expected.extend([
                    "response.content_part.added",
                    "response.output_text.done",
                    "response.content_part.done",
                ]),
            }
            expected.extend(["response.output_item.done", last.0.as_str()]);
            assert_eq!(names, expected);
        }
    }
    let refuse = |more: Value, param: &str, message: &str| {
        served.refused("/v1/responses", &with(&body, more).to_string(), 400, Some(param), message);
    };
    refuse(json!({"previous_response_id": "resp_1"}), "previous_response_id", "not kept");
    refuse(json!({"conversation": "c"}), "conversation", "not kept");
    refuse(json!({"background": true}), "background", "not supported");
    refuse(json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "`web_search`");
    refuse(json!({"tools": [{"type": "mcp", "server_label": "x"}]}), "tools[0].type", "`mcp`");
    refuse(json!({"input": []}), "input", "no item");
    refuse(json!({"input": null}), "input", "is missing");
    refuse(json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type", "`item_reference`");
    refuse(json!({"input": [{"type": "function_call", "name": "f"}]}), "input[0].call_id", "is missing");
    let image = json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]});
    refuse(image, "input[0]", "only text");
    refuse(json!({"include": ["file_search_call.results"]}), "include", "file_search_call");
    refuse(json!({"messages": []}), "messages", "called `input`");
    refuse(json!({"max_output_tokens": 0}), "max_output_tokens", "from 1");
    refuse(json!({"text": {"format": {"type": "xml"}}}), "text.format.type", "`xml`");
    let odd =
        json!({"text": {"format": {"type": "json_schema", "schema": {"properties": {"a": {"not": {}}}}}}});
    refuse(odd, "text.format.schema.properties.a", "cannot be held");
    refuse(json!({"max_output_tokens": 100_000}), "max_output_tokens", "context");
}

#[test]
fn the_rest_that_engines_have() {
    let served = Served::start(Home::new(), &["--quiet", "--log-json", "--no-draft"]);
    assert_eq!(served.get("/version"), (200, json!({"version": env!("CARGO_PKG_VERSION")})));
    let (_, document) = served.get("/openapi.json");
    assert!(document["paths"]["/v1/responses"]["post"].is_object());
    served.refused("/v1/embeddings", r#"{"input": "a"}"#, 400, None, "the model that is served writes text");
    // Every path of the description is there, and answers with its methods alone.
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "none");
        for method in ["GET", "POST"] {
            let (head, body) = served.raw(&format!("{method} {path} HTTP/1.1"), &[], "{}");
            let there = methods.get(method.to_lowercase()).is_some();
            let wrong = head.starts_with("http/1.1 405");
            assert_ne!(there, wrong, "{method} {path}: {head}");
            assert!(!body.contains("there is nothing at"), "{method} {path}");
        }
    }
    for name in ["process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"] {
        assert!(served.counter(name, "") > 0.0, "{name}");
    }
    // What was read before is not read again, and both counters and usage say so.
    let long = ask(&"Tell me a short story about a cow. ".repeat(4));
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let first = served.chat(&with(&long, json!({"max_tokens": 4})));
    let second = served.chat(&with(&long, json!({"max_tokens": 4})));
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!((cached(&first), cached(&second)), (0, prompt - 1), "{second}");
    assert_eq!(first["choices"][0]["message"], second["choices"][0]["message"]);
    assert_eq!(served.counter("vllm:prefix_cache_queries_total", ""), 2.0 * prompt as f64);
    assert_eq!(served.counter("vllm:prefix_cache_hits_total", ""), (prompt - 1) as f64);
    // The log: an object a line, one of each request, refused ones too.
    served.refused("/v1/chat/completions", "{", 400, None, "no JSON");
    let streamed = served.stream("/v1/completions", &json!({"prompt": "Once", "max_tokens": 3}));
    let id = streamed[0]["id"].as_str().unwrap();
    let lines: Vec<Value> = served
        .log()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}")))
        .filter(|line: &Value| line.get("route").is_some())
        .collect();
    let of = |index: usize, keys: [&str; 6]| keys.map(|key| lines[index][key].clone());
    let keys = ["route", "status", "prompt_tokens", "cached_tokens", "completion_tokens", "stream"];
    let at = lines.len() - 4;
    let route = "/v1/chat/completions";
    assert_eq!(of(at, keys), [json!(route), json!(200), json!(prompt), json!(0), json!(4), json!(false)]);
    assert_eq!(of(at + 1, keys)[3], json!(prompt - 1));
    assert_eq!(of(at + 2, keys), [json!(route), json!(400), json!(0), json!(0), json!(0), json!(false)]);
    assert!(lines[at + 2]["error"]["message"].as_str().unwrap().contains("no JSON"));
    assert_eq!((&lines[at + 3]["id"], &lines[at + 3]["stream"]), (&json!(id), &json!(true)));
    assert_eq!((&lines[at]["key"], &lines[at]["finish_reasons"]), (&json!("127.0.0.1"), &json!(["length"])));
    assert!(lines[at]["total_ms"].as_f64() >= lines[at]["first_token_ms"].as_f64(), "{}", lines[at]);

    // A plan for requests that name none, and lines for people.
    let home = Home::new();
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let keys = home.write("keys", "alice secret-a\n").display().to_string();
    let more = ["--draft-model", &tiny, "--depth", "3", "--log-requests", "--api-keys-file", &keys];
    let served = Served::start(home, &more);
    let asks = |more: Value| {
        let base = with(&ask("Tell me a story."), json!({"max_tokens": 24, "ignore_eos": true}));
        let (status, text, _) = served.send(route, Some("secret-a"), &with(&base, more).to_string());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let drafted = asks(json!({"draftsmith": {"trace": true}}));
    let most = &drafted["metrics"]["speculative_decoding"]["acceptance_histogram"];
    assert!(
        most.as_array().unwrap().len() <= 4
            && drafted["metrics"]["speculative_decoding"]["num_spec_steps"].as_u64() > Some(0),
        "{drafted}"
    );
    let none = asks(json!({"draftsmith": {"trace": true, "draft": "none"}}));
    assert_eq!(none["metrics"]["speculative_decoding"]["num_spec_steps"], 0);
    let log = served.log();
    let line = log.lines().rfind(|line| line.starts_with("chatcmpl-")).unwrap();
    for part in [" key=alice ", " /v1/chat/completions 200 ", " out=24 ", " accept=1.00 length"] {
        assert!(line.contains(part), "{line}");
    }
    let ended = Home::new().run(&["serve", "--target", &tiny, "--port", "0", "--depth", "3"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(
        ended.stderr.contains(
            "error: `--depth` says how a draft is asked, and there is no draft\nhint: name a draft"
        ),
        "{}",
        ended.stderr
    );
}

/// Everything of a streamed chat: its text, its calls as name and arguments, and why it ended.
fn heard(parts: &[Value]) -> (String, Vec<(String, String)>, String) {
    let (mut text, mut calls, mut reason) = (String::new(), Vec::<(String, String)>::new(), String::new());
    for choice in parts.iter().filter_map(|part| part["choices"].get(0)) {
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for delta in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let part = |key: &str| delta["function"][key].as_str().unwrap_or_default().to_owned();
            if delta.get("id").is_some() {
                calls.push((part("name"), String::new()));
            }
            calls.last_mut().unwrap().1.push_str(&part("arguments"));
        }
        reason = choice["finish_reason"].as_str().unwrap_or(&reason).to_owned();
    }
    (text, calls, reason)
}

/// Needs the folder of real targets, see the README.
#[test]
fn real_model_calls_are_the_same_streamed_and_with_a_draft() {
    let folder = std::env::var_os("DRAFTSMITH_TEST_REAL_TARGETS")
        .expect("DRAFTSMITH_TEST_REAL_TARGETS names the folder of the real targets");
    let model = std::path::Path::new(&folder).join("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
    let model = model.canonicalize().unwrap().display().to_string();
    let served = Served::start_with(Home::new(), &model, &["--draft-model", &model]);
    let weather = json!({"type": "function", "function": {"name": "get_weather", "description": "Weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"]}}});
    let question = "Use the tool: how will the weather be in Paris for the next 3 days?";
    let base = with(&ask(question), json!({"tools": [weather], "max_tokens": 80}));
    for more in [
        json!({}),
        json!({"temperature": 0.8, "seed": 7}),
        json!({"tool_choice": "required"}),
        json!({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "temperature": 0.8, "seed": 7}),
    ] {
        let body = with(&base, more);
        let whole = served.chat(&body);
        let message = &whole["choices"][0]["message"];
        if body["tool_choice"].is_string() || body["tool_choice"].is_object() {
            let call = functions(message)[0];
            let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
            assert_eq!((&call["name"], arguments["days"].is_i64()), (&json!("get_weather"), true), "{whole}");
        }
        for plan in [json!("none"), json!("auto"), json!({"chain": 4})] {
            let parts =
                served.stream("/v1/chat/completions", &with(&body, json!({"draftsmith": {"draft": plan}})));
            let (text, calls, reason) = heard(&parts);
            assert_eq!(text, message["content"].as_str().unwrap_or_default(), "{plan}");
            let wanted: Vec<(String, String)> = functions(message)
                .iter()
                .map(|call| {
                    (call["name"].as_str().unwrap().into(), call["arguments"].as_str().unwrap().into())
                })
                .collect();
            assert_eq!(
                (calls, json!(reason)),
                (wanted, whole["choices"][0]["finish_reason"].clone()),
                "{plan}"
            );
        }
    }
}
