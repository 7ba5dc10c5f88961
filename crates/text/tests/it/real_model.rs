//! Needs the real target: a path to its GGUF file in DRAFTSMITH_TEST_TARGET.

use crate::common::{assistant, gguf_tokenizer, read, user};
use draftsmith_text::{ChatTemplate, MaskOptions, RenderOptions, Tokenizer, mask_conversation};
use serde_json::Value;

fn target() -> (Tokenizer, ChatTemplate) {
    let path = std::env::var("DRAFTSMITH_TEST_TARGET")
        .expect("set DRAFTSMITH_TEST_TARGET to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (gguf, template) = gguf_tokenizer(&bytes);
    let tokenizer = gguf.build().expect("the tokenizer builds");
    let template = ChatTemplate::parse(&template.expect("the file has a template")).expect("it parses");
    let template = template.with_tokens_of(&tokenizer);
    (tokenizer, template)
}

#[test]
fn real_model_tokenizer_gives_the_reference_ids_and_texts() {
    let (tokenizer, _) = target();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.eos_ids(), [2, 0]);
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    let (mut encoded, mut decoded) = (0, 0);
    for line in read("tests/data/smollm2_cases.jsonl").lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        let text = case["text"].as_str().expect("text");
        if let Some(list) = case.get("decode") {
            assert_eq!(tokenizer.decode(&ids(list), true), text, "{line}");
            assert_eq!(
                tokenizer.decode(&ids(list), false),
                case["text_with_special"].as_str().expect("text")
            );
            decoded += 1;
        } else {
            assert_eq!(tokenizer.encode(text, false).expect("ids"), ids(&case["ids"]), "{text:?}");
            let encoding = tokenizer.encode_with_spans(text).expect("ids");
            assert_eq!(encoding.ids, ids(&case["ids"]));
            assert_eq!(encoding.spans.last().map_or(0, |span| span.end), text.len());
            assert_eq!(tokenizer.decode(&encoding.ids, false), text);
            encoded += 1;
        }
    }
    assert!(encoded > 150 && decoded == 20, "{encoded} {decoded}");
}

#[test]
fn real_model_template_renders_the_reference_prompts() {
    let (tokenizer, template) = target();
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let mut count = 0;
    for line in read("tests/data/smollm2_cases.jsonl").lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        if let Some(text) = case.get("user").and_then(Value::as_str) {
            let prompt = template.render(&[user(text)], &options).expect("it renders");
            assert_eq!(prompt, case["text"].as_str().expect("text"));
            assert_eq!(
                tokenizer.encode(&prompt, false).expect("ids").len(),
                case["ids"].as_array().expect("ids").len()
            );
            count += 1;
        }
    }
    assert_eq!(count, 7);
}

#[test]
fn real_model_mask_trains_the_answers_and_their_end() {
    let (tokenizer, template) = target();
    let messages = [user("Hi"), assistant("Hello, héllo!\n\n"), user("Bye"), assistant("See you.")];
    let rows = mask_conversation(&tokenizer, &template, &messages, &MaskOptions::default()).expect("rows");
    assert_eq!(rows.len(), 1);
    let texts: Vec<String> =
        rows[0].turns.iter().map(|turn| tokenizer.decode(&rows[0].ids[turn.tokens.clone()], false)).collect();
    assert_eq!(texts, ["Hello, héllo!\n\n<|im_end|>", "See you.<|im_end|>"]);
}
