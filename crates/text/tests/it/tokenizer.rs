//! Tokenizers rebuilt from metadata and read from files.

use crate::common::{byte_level, gguf_tokenizer, read};
use draftsmith_text::{GgufTokenizer, SpecialIds, TextError, Tokenizer, TokenizerConfig};
use proptest::prelude::*;
use serde_json::Value;

fn fixture() -> Tokenizer {
    let path = format!("{}/../../fixtures/gguf/tokenizer.gguf", env!("CARGO_MANIFEST_DIR"));
    let (gguf, _) = gguf_tokenizer(&std::fs::read(path).expect("the fixture is there"));
    gguf.build().expect("the tokenizer builds")
}

#[test]
fn the_fixture_tokenizer_gives_the_reference_ids() {
    let tokenizer = fixture();
    let mut count = 0;
    for line in read("../../fixtures/gguf/tokenizer-cases.jsonl").lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        let text = case["text"].as_str().expect("text");
        let ids: Vec<u32> = case["ids"]
            .as_array()
            .expect("ids")
            .iter()
            .map(|id| id.as_u64().expect("an id") as u32)
            .collect();
        assert_eq!(tokenizer.encode(text, false).expect("ids"), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false), text);
        count += 1;
    }
    assert!(count >= 20);
}

#[test]
fn metadata_and_tokenizer_json_of_one_vocabulary_agree() {
    let folder = format!("{}/../../fixtures/tiny-target", env!("CARGO_MANIFEST_DIR"));
    let file =
        |name: &str| std::fs::read(format!("{folder}/{name}")).unwrap_or_else(|e| panic!("{name}: {e}"));
    let config = TokenizerConfig::parse(&file("tokenizer_config.json"), None).expect("it parses");
    let from_json = config.tokenizer(&file("tokenizer.json")).expect("it builds");
    let from_gguf = fixture();
    assert_eq!(from_json.content_hash(), from_gguf.content_hash());
    assert_eq!(from_json.eos_ids().first(), from_gguf.eos_ids().first());
    for text in ["Hello world 123", "<|im_start|>user\n é🙂", ""] {
        assert_eq!(from_json.encode(text, false).expect("ids"), from_gguf.encode(text, false).expect("ids"));
    }
}

#[test]
fn a_tokenizer_json_becomes_the_metadata_that_a_converter_writes() {
    let folder = format!("{}/../../fixtures/tiny-target", env!("CARGO_MANIFEST_DIR"));
    let file =
        |name: &str| std::fs::read(format!("{folder}/{name}")).unwrap_or_else(|e| panic!("{name}: {e}"));
    let json = file("tokenizer.json");
    let config = TokenizerConfig::parse(&file("tokenizer_config.json"), None).expect("it parses");
    let tokenizer = config.tokenizer(&json).expect("it builds");
    let made = GgufTokenizer::of(&json, &tokenizer).expect("it has a form");
    let path = format!("{}/../../fixtures/gguf/tokenizer.gguf", env!("CARGO_MANIFEST_DIR"));
    let (wanted, _) = gguf_tokenizer(&std::fs::read(path).expect("the fixture is there"));
    assert_eq!(made.pre.as_deref(), Some("smollm"));
    assert_eq!((&made.model, &made.tokens, &made.merges), (&wanted.model, &wanted.tokens, &wanted.merges));
    assert_eq!(made.token_types, wanted.token_types);
    assert_eq!(made.build().expect("it builds").content_hash(), tokenizer.content_hash());

    // What GGUF has no word for is an error.
    let mut other: Value = serde_json::from_slice(&json).expect("JSON");
    other["normalizer"] = serde_json::json!({"type": "Lowercase"});
    let other = other.to_string();
    let lowered = Tokenizer::from_json(other.as_bytes(), SpecialIds::default()).expect("it builds");
    let error = GgufTokenizer::of(other.as_bytes(), &lowered).unwrap_err();
    assert!(matches!(&error, TextError::NoGgufForm { .. }), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn every_byte_and_every_control_token_is_in_each_draft_vocabulary() {
    let tokenizer = byte_level(&["<|im_end|>"]);
    assert_eq!(tokenizer.byte_ids().len(), 256);
    assert_eq!(tokenizer.special_ids().len(), 9);
    assert_eq!(tokenizer.always_in_draft_vocab().len(), 256 + 9);
}

#[track_caller]
fn check_error(change: impl FnOnce(&mut GgufTokenizer), expected: &str) {
    let mut gguf = GgufTokenizer {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: ["a", "b", "ab"].map(String::from).to_vec(),
        merges: vec!["a b".into()],
        ..GgufTokenizer::default()
    };
    assert!(gguf.build().is_ok());
    change(&mut gguf);
    let error = gguf.build().expect_err("a broken tokenizer");
    assert!(error.hint().is_some());
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn broken_metadata_is_named() {
    check_error(|g| g.model = "bert".into(), "`tokenizer.ggml.model` is `bert`");
    check_error(|g| g.pre = Some("klingon".into()), "`tokenizer.ggml.pre` is `klingon`");
    check_error(|g| g.tokens.clear(), "`tokenizer.ggml.tokens` has 0 entries");
    check_error(|g| g.token_types = vec![1], "`tokenizer.ggml.token_type` has 1 entries for 3 tokens");
    check_error(|g| g.merges = vec!["ab".into()], "`tokenizer.ggml.merges[0]` is not two tokens");
    check_error(|g| g.merges = vec!["a x".into()], "x");
    check_error(|g| g.eos_ids = vec![7], "`tokenizer.ggml.eos_token_id` is 7");
    check_error(|g| g.model = "llama".into(), "`tokenizer.ggml.scores` is missing");
}

#[test]
fn a_broken_tokenizer_json_is_an_error() {
    for bytes in [&b"{"[..], b"[]", b"{\"model\": 3}", b"\xff"] {
        let error = Tokenizer::from_json(bytes, SpecialIds::default()).expect_err("not a tokenizer");
        assert!(matches!(error, TextError::TokenizerJson { .. }), "{error}");
    }
}

/// SentencePiece BPE in its plainest form: join the neighbours with the best joint score, leftmost first.
fn plain_sentence_piece(gguf: &GgufTokenizer, text: &str) -> Vec<u32> {
    let scores = gguf.scores.as_ref().expect("scores");
    let id_of = |token: &str| gguf.tokens.iter().position(|t| t == token);
    let text = format!("\u{2581}{}", text.replace(' ', "\u{2581}"));
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let best = (0..parts.len().saturating_sub(1))
            .filter_map(|i| id_of(&format!("{}{}", parts[i], parts[i + 1])).map(|id| (i, scores[id])))
            .max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
        let Some((i, _)) = best else { break };
        let right = parts.remove(i + 1);
        parts[i].push_str(&right);
    }
    let mut ids = Vec::new();
    for part in parts {
        match id_of(&part) {
            Some(id) => ids.push(id as u32),
            None => ids.extend(part.bytes().map(|b| id_of(&format!("<0x{b:02X}>")).expect("a byte") as u32)),
        }
    }
    ids
}

fn sentence_piece() -> GgufTokenizer {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut token_types = vec![2, 3, 3];
    for byte in 0..=255u8 {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
    }
    let mut scores = vec![0.0; tokens.len()];
    let words = ["▁t", "he", "▁the", "in", "▁a", "er", "▁th", "ab", "ba", "aba", "▁▁", "ing", "▁in"];
    for (rank, word) in words.iter().enumerate() {
        tokens.push((*word).into());
        scores.push(-(rank as f32));
    }
    for (rank, c) in "▁abehinrtgé".chars().enumerate() {
        tokens.push(c.to_string());
        scores.push(-100.0 - rank as f32);
    }
    token_types.resize(tokens.len(), 1);
    GgufTokenizer {
        model: "llama".into(),
        tokens,
        token_types,
        scores: Some(scores),
        bos_id: Some(1),
        eos_ids: vec![2],
        unk_id: Some(0),
        ..GgufTokenizer::default()
    }
}

proptest! {
    #[test]
    fn sentence_piece_by_merge_table_equals_joining_by_score(text in "[abehinrtgé xü\n🙂]{1,24}") {
        let gguf = sentence_piece();
        let tokenizer = gguf.build().expect("it builds");
        let ids = tokenizer.encode(&text, false).expect("ids");
        prop_assert_eq!(&ids, &plain_sentence_piece(&gguf, &text));
        prop_assert_eq!(tokenizer.decode(&ids, false), text.clone());
        let spans = tokenizer.encode_with_spans(&text).expect("ids").spans;
        prop_assert_eq!(spans.last().expect("a token").end, text.len());
    }

    #[test]
    fn byte_level_text_comes_back_and_spans_tile_it(text in "\\PC{0,40}|[ he\n\tlt<|im_end|>é🙂]{0,60}") {
        let tokenizer = byte_level(&["<|im_end|>"]);
        let encoding = tokenizer.encode_with_spans(&text).expect("ids");
        prop_assert_eq!(tokenizer.decode(&encoding.ids, false), text.clone());
        let mut at = 0;
        for span in &encoding.spans {
            prop_assert_eq!(span.start, at);
            at = span.end;
        }
        prop_assert_eq!(at, text.len());
    }
}
