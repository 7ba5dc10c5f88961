//! Which chat template a model has, and what `data render` makes of conversations.

use draftsmith::formats::gguf::{GgufArray, GgufFile, GgufValue, GgufWriter};
use serde_json::{Value, json};

use crate::support::{Home, repository};

/// A copy of the tiny target's text side, with `chat_template` of its configuration replaced.
fn model(home: &Home, chat_template: Value) -> String {
    let tiny = repository().join("fixtures/tiny-target");
    let read = |file: &str| std::fs::read(tiny.join(file)).unwrap();
    home.write("model/tokenizer.json", read("tokenizer.json"));
    home.write("model/config.json", read("config.json"));
    home.write("model/generation_config.json", r#"{"eos_token_id": [0, 2]}"#);
    let mut config: Value = serde_json::from_slice(&read("tokenizer_config.json")).unwrap();
    config["chat_template"] = chat_template;
    home.write("model/tokenizer_config.json", config.to_string());
    home.path().join("model").display().to_string()
}

/// Texts (or errors) of a row without and one with tools.
fn render(home: &Home, target: &str) -> [String; 2] {
    let plain = json!({"messages": [{"role": "user", "content": "x"}]});
    let mut tools = plain.clone();
    tools["tools"] = json!([]);
    home.write("two.jsonl", format!("{plain}\n\n{tools}\n"));
    let ended = home.run(&["data", "render", "two.jsonl", "--json", "--target", target]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let rows: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!([&rows[0]["row"], &rows[1]["row"]], [1, 3]);
    [0, 1].map(|i| rows[i]["text"].as_str().or(rows[i]["error"].as_str()).unwrap().to_string())
}

#[test]
fn templates_are_taken_from_the_places_that_transformers_takes_them_from() {
    let home = Home::new();
    let named = json!([{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T{{ bos_token }}"}]);
    // The end of a turn is the tokenizer's, not the first id that generation_config.json lists.
    assert_eq!(render(&home, &model(&home, named.clone())), ["D<|im_end|>", "T<|im_start|>"]);
    assert_eq!(render(&home, &model(&home, json!("only"))), ["only", "only"]);
    home.write("model/chat_template.json", r#"{"chat_template": "processor"}"#);
    assert_eq!(render(&home, &model(&home, json!("only"))), ["only", "only"]);
    assert_eq!(render(&home, &model(&home, Value::Null)), ["processor", "processor"]);
    home.write("model/chat_template.jinja", "file");
    assert_eq!(render(&home, &model(&home, named.clone())), ["file", "file"]);
    home.write("model/additional_chat_templates/tool_use.jinja", "more");
    assert_eq!(render(&home, &model(&home, named)), ["file", "more"]);
}

#[test]
fn a_gguf_file_may_carry_several_templates() {
    let home = Home::new();
    let bytes = std::fs::read(repository().join("fixtures/gguf/tokenizer.gguf")).unwrap();
    let file = GgufFile::parse(&bytes).unwrap();
    let mut copy = GgufWriter::new();
    for (key, value) in file.metadata() {
        copy.set(key.clone(), value.clone());
    }
    let text = |text: &str| GgufValue::Str(text.to_string());
    copy.set("tokenizer.chat_template", text("D"));
    copy.set("tokenizer.chat_templates", GgufValue::Array(GgufArray::Str(vec!["tool_use".to_string()])));
    copy.set("tokenizer.chat_template.tool_use", text("T"));
    let path = home.write("several.gguf", copy.to_bytes());
    assert_eq!(render(&home, &path.display().to_string()), ["D", "T"]);
}

#[test]
fn a_row_may_bring_its_template_and_what_it_refuses_is_said_row_by_row() {
    let home = Home::new();
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let row = |template: &str| {
        json!({"messages": [{"role": "user", "content": "hi"}], "template": template,
        "chat_template_kwargs": {"who": [1, true]}, "add_generation_prompt": true, "now": 0})
    };
    let rows = ["{{ who }}{{ add_generation_prompt }}{{ strftime_now('%F') }}", "{{ 1 + 'a' }}", "{% if %}"];
    home.write("rows.jsonl", rows.map(|template| row(template).to_string() + "\n").concat());
    let ended = home.run(&["data", "render", "rows.jsonl", "--target", &tiny]);
    let expected =
        "── `rows.jsonl`, line 1\n[1, True]True1970-01-01\n── `rows.jsonl`, line 2\nerror: chat template";
    assert!(ended.stdout.starts_with(expected), "{}", ended.stdout);
    let ended = home.run(&["data", "render", "rows.jsonl", "--json", "--target", &tiny]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let rows: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows[0]["text"], "[1, True]True1970-01-01");
    assert!(
        rows[1]["error"].as_str().unwrap().starts_with("chat template, line 1: unsupported operand"),
        "{}",
        rows[1]
    );
    assert!(rows[2]["error"].as_str().unwrap().starts_with("chat template, line 1: expected"), "{}", rows[2]);
    home.write("rows.jsonl", "{\"messages\": 3}\n");
    let ended = home.run(&["data", "render", "rows.jsonl", "--target", &tiny]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("line 1: `messages` is missing"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: give each line"), "{}", ended.stderr);
}
