//! Streaming equals decoding at once.

use crate::common::byte_level;
use draftsmith_text::Tokenizer;
use proptest::prelude::*;

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool, stops: &[String]) -> (String, bool) {
    let mut decoder = tokenizer.stream_decoder(skip_special, stops);
    let mut out = String::new();
    for id in ids {
        out.push_str(&decoder.push(*id).text);
    }
    let last = decoder.finish();
    (out + &last.text, last.stopped)
}

/// The specification: decode everything, cut before the stop string that ends first (of several, the longest).
fn cut(text: &str, stops: &[String]) -> (String, bool) {
    for end in 0..=text.len() {
        if !text.is_char_boundary(end) {
            continue;
        }
        let stop = stops
            .iter()
            .filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()))
            .map(String::len)
            .max();
        if let Some(length) = stop {
            return (text[..end - length].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

#[test]
fn a_character_comes_out_whole() {
    let tokenizer = byte_level(&["</s>"]);
    let mut decoder = tokenizer.stream_decoder(true, &[]);
    let ids = tokenizer.encode("🙂!", false).expect("ids");
    let parts: Vec<String> = ids.iter().map(|id| decoder.push(*id).text).collect();
    assert_eq!(parts, ["", "", "", "🙂", "!"]);
}

#[test]
fn nothing_that_may_start_a_stop_string_comes_out() {
    let tokenizer = byte_level(&["</s>"]);
    let mut decoder = tokenizer.stream_decoder(true, &["abc".into(), "b".into()]);
    let ids = tokenizer.encode("xab", false).expect("ids");
    let chunks: Vec<(String, bool)> =
        ids.iter().map(|id| decoder.push(*id)).map(|c| (c.text, c.stopped)).collect();
    assert_eq!(chunks, [("x".into(), false), (String::new(), false), ("a".into(), true)]);
    assert!(decoder.push(ids[0]).text.is_empty());
}

proptest! {
    #[test]
    fn streaming_equals_decoding_at_once(
        ids in proptest::collection::vec(0u32..280, 0..60),
        skip_special in any::<bool>(),
    ) {
        let tokenizer = byte_level(&["</s>"]);
        let (text, stopped) = stream(&tokenizer, &ids, skip_special, &[]);
        prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
        prop_assert!(!stopped);
    }

    #[test]
    fn stop_strings_cut_where_the_specification_cuts(
        text in "[abcé ]{0,30}",
        stops in proptest::collection::vec("[abcé ]{0,4}", 0..4),
    ) {
        let tokenizer = byte_level(&["</s>"]);
        let ids = tokenizer.encode(&text, false).expect("ids");
        prop_assert_eq!(stream(&tokenizer, &ids, false, &stops), cut(&text, &stops));
    }
}
