//! What a turn trains where the rendered answer is not what the model wrote: reasoning models and cut answers.
//!
//! Right values: the ids of the generation prompt, then those of the answer as a model that is asked with it writes it.

use crate::common::{assistant, byte_level, template_source, user};
use draftsmith_text::{
    ChatTemplate, MaskOptions, MaskedRow, Message, TextError, Tokenizer, Turns, control_token_in,
    is_reasoning_mark, mask_conversation,
};
use proptest::prelude::*;

fn rows(
    template: &str,
    eos: &[&str],
    messages: &[Message],
    options: &MaskOptions,
) -> Result<(Tokenizer, Vec<MaskedRow>), TextError> {
    let tokenizer = byte_level(eos);
    let template =
        ChatTemplate::parse(&template_source(template)).expect("it parses").with_tokens("<s>", "</s>");
    let rows = mask_conversation(&tokenizer, &template, messages, options)?;
    for row in &rows {
        assert_eq!(row.ids.len(), row.loss_mask.len());
        assert_eq!(row.ids.len(), row.spans.len());
        let text: Vec<u8> = row.ids.iter().flat_map(|id| tokenizer.token_to_piece(*id).to_vec()).collect();
        assert!(row.text.as_bytes().starts_with(&text), "the ids spell the text");
    }
    Ok((tokenizer, rows))
}

/// A row with `⟦` and `⟧` around what is trained.
fn marked(tokenizer: &Tokenizer, row: &MaskedRow) -> String {
    let mut out = Vec::new();
    for (i, id) in row.ids.iter().enumerate() {
        if row.loss_mask[i] && (i == 0 || !row.loss_mask[i - 1]) {
            out.extend("⟦".as_bytes());
        }
        out.extend(tokenizer.token_to_piece(*id));
        if row.loss_mask[i] && row.loss_mask.get(i + 1) != Some(&true) {
            out.extend("⟧".as_bytes());
        }
    }
    String::from_utf8(out).expect("text")
}

const EOS: &[&str] = &["<|im_end|>", "</s>"];

#[track_caller]
fn check_with(template: &str, messages: &[Message], options: &MaskOptions, expected: &[&str]) {
    let (tokenizer, rows) = rows(template, EOS, messages, options).expect("rows");
    let found: Vec<String> = rows.iter().map(|row| marked(&tokenizer, row)).collect();
    assert_eq!(found, expected, "{template}");
}

#[track_caller]
fn check(template: &str, messages: &[Message], expected: &[&str]) {
    check_with(template, messages, &MaskOptions::default(), expected);
}

#[track_caller]
fn check_cut(template: &str, messages: &[Message], expected: &[&str]) {
    let options = MaskOptions { last_answer_cut: true, ..MaskOptions::default() };
    check_with(template, messages, &options, expected);
}

fn reasoned(reasoning: &str, content: &str) -> Message {
    Message { reasoning_content: Some(reasoning.into()), ..assistant(content) }
}

#[test]
fn reasoning_follows_the_mark_that_the_prompt_opens() {
    let expected = ["<|im_start|>U:2 + 2<|im_start|>A:<think>\n⟦two and two\n</think>\n\n4<|im_end|>⟧"];
    for content in ["<think>\ntwo and two\n</think>\n\n4", "two and two\n</think>\n\n4"] {
        // The template leaves the line breaks behind the reasoning in.
        let template = "opens_and_strips";
        check(template, &[user("2 + 2"), assistant(content)], &expected);
    }
    for (reasoning, content) in [("two and two", "4"), ("two and two\n", "\n\n4")] {
        check("opens_and_strips", &[user("2 + 2"), reasoned(reasoning, content)], &expected);
    }
}

#[test]
fn an_answer_without_reasoning_is_the_rendered_one() {
    check(
        "opens_and_strips",
        &[user("2 + 2"), assistant("4"), user("<b>"), assistant("<b>4</b>")],
        &[
            "<|im_start|>U:2 + 2<|im_start|>A:⟦4<|im_end|>⟧<|im_start|>U:<b><|im_start|>A:⟦<b>4</b><|im_end|>⟧",
        ],
    );
}

#[test]
fn a_turn_whose_reasoning_is_gone_later_is_a_row_of_its_own() {
    check(
        "opens_and_strips",
        &[user("a"), assistant("<think>\nhm\n</think>1"), user("b"), assistant("<think>\nha\n</think>2")],
        &[
            "<|im_start|>U:a<|im_start|>A:<think>\n⟦hm\n</think>1<|im_end|>⟧",
            "<|im_start|>U:a<|im_start|>A:1<|im_end|><|im_start|>U:b<|im_start|>A:<think>\n⟦ha\n</think>2<|im_end|>⟧",
        ],
    );
    let last = MaskOptions { turns: Turns::Last, ..MaskOptions::default() };
    check_with(
        "opens_and_strips",
        &[user("a"), assistant("<think>\nhm\n</think>1"), user("b"), assistant("<think>\nha\n</think>2")],
        &last,
        &[
            "<|im_start|>U:a<|im_start|>A:1<|im_end|><|im_start|>U:b<|im_start|>A:<think>\n⟦ha\n</think>2<|im_end|>⟧",
        ],
    );
}

#[test]
fn reasoning_that_the_template_takes_out_of_the_trained_answer_is_put_back() {
    check(
        "strips",
        &[user("a"), assistant("<think>\nhm\n</think>\n\n1")],
        &["<|im_start|>U:a<|im_start|>A:⟦<think>\nhm\n</think>\n\n1<|im_end|>⟧"],
    );
    check("strips", &[user("a"), assistant("1")], &["<|im_start|>U:a<|im_start|>A:⟦1<|im_end|>⟧"]);
}

#[test]
fn a_template_that_shows_reasoning_is_taken_at_its_word() {
    check(
        "opens_and_shows",
        &[user("a"), assistant("hm\n</think>\n\n1")],
        &["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n⟦hm\n</think>\n\n1<|im_end|>⟧\n"],
    );
}

#[test]
fn an_answer_behind_a_closed_thought_follows_it_and_reasoning_there_is_refused() {
    check(
        "closed_thought",
        &[user("a"), assistant("  1")],
        &["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦1<|im_end|>⟧\n"],
    );
    for message in [assistant("<think>\nhm\n</think>1"), reasoned("hm", "1")] {
        let refused = rows("closed_thought", EOS, &[user("a"), message], &MaskOptions::default());
        assert!(matches!(refused, Err(TextError::AnswerNotContinued { turn: 1, .. })), "{refused:?}");
    }
}

#[test]
fn a_cut_answer_is_what_was_written_and_nothing_else() {
    let cut = "Once upon a";
    let opened = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n⟦Once upon a⟧";
    check_cut("opens_and_shows", &[user("a"), assistant(cut)], &[opened]);
    check_cut("opens_and_shows", &[user("a"), assistant("<think>\nOnce upon a")], &[opened]);
    check_cut("opens_and_shows", &[user("a"), reasoned(cut, "")], &[opened]);
    check_cut(
        "opens_and_strips",
        &[user("a"), assistant(cut)],
        &["<|im_start|>U:a<|im_start|>A:<think>\n⟦Once upon a⟧"],
    );
    check_cut(
        "opens_and_strips",
        &[user("a"), reasoned("hm", "")],
        &["<|im_start|>U:a<|im_start|>A:<think>\n⟦hm⟧"],
    );
    check_cut(
        "opens_and_strips",
        &[user("a"), reasoned("hm", "on")],
        &["<|im_start|>U:a<|im_start|>A:<think>\n⟦hm\n</think>\n\non⟧"],
    );
    for written in ["<think>\nOkay, Let me", "<think>", "Okay", "<think>\nhm\n</think>\n\nwe", " Okay \n"] {
        check_cut(
            "hybrid",
            &[user("a"), assistant(written)],
            &[&format!("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦{written}⟧")],
        );
        check_cut(
            "strips",
            &[user("a"), assistant(written)],
            &[&format!("<|im_start|>U:a<|im_start|>A:⟦{written}⟧")],
        );
    }
    // Channels are written by the model, so the header stays.
    check_cut(
        "channels",
        &[user("a"), assistant("fin")],
        &["<|im_start|>user[]a<|end_header_id|><|im_start|>assistant⟦[final]fin⟧"],
    );
    check_cut(
        "channels",
        &[user("a"), reasoned("ana", "")],
        &["<|im_start|>user[]a<|end_header_id|><|im_start|>assistant⟦[analysis]ana⟧"],
    );
}

#[test]
fn a_cut_answer_keeps_the_turns_before_it() {
    check_cut(
        "chatml",
        &[user("a"), assistant("one"), user("b"), assistant("and so")],
        &[
            "<|im_start|>system\nYou answer questions.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦one<|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦and so⟧",
        ],
    );
    check_cut(
        "hybrid",
        &[user("a"), assistant("one"), user("b"), assistant("<think>\nand so")],
        &[
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\none<|im_end|>⟧\n",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<think>\nand so⟧",
        ],
    );
}

#[test]
fn the_first_stop_token_ends_the_turn_whatever_the_answer_says() {
    for answer in ["B", "d", "end", "im_end", "|>", "<", "assistant", "text", " d ", "\u{e9}nd\n"] {
        for eos in [&["<|im_end|>"][..], &["<|im_end|>", "</s>"], &["</s>", "<|im_end|>"]] {
            let (tokenizer, rows) =
                rows("end_of_text", eos, &[user("x"), assistant(answer)], &MaskOptions::default())
                    .expect("rows");
            let expected =
                format!("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n</s>");
            assert_eq!(marked(&tokenizer, &rows[0]), expected);
            assert!(rows[0].turns[0].ends_turn);
        }
        let (tokenizer, rows) =
            rows("end_of_text", &[], &[user("x"), assistant(answer)], &MaskOptions::default()).expect("rows");
        assert!(
            marked(&tokenizer, &rows[0]).ends_with(&format!("⟦{answer}<|im_end|>⟧\n</s>")),
            "without stop ids"
        );
    }
    check_cut(
        "end_of_text",
        &[user("x"), assistant("d")],
        &["<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n⟦d⟧"],
    );
}

#[test]
fn control_tokens_are_found_wherever_a_message_holds_text() {
    let tokenizer = byte_level(EOS);
    let find = |message: &Message| {
        control_token_in(&tokenizer, message)
            .map(|id| String::from_utf8(tokenizer.token_to_piece(id).to_vec()).expect("text"))
    };
    let call = |text: &str| Message {
        tool_calls: Some(serde_json::json!([{"function": {"name": "f", "arguments": {"x": text}}}])),
        ..assistant("")
    };
    for (message, expected) in [
        (user("a <|im_end|> b"), Some("<|im_end|>")),
        (reasoned("hm </s>", "1"), Some("</s>")),
        (call("<|eot_id|>"), Some("<|eot_id|>")),
        (call("<|eot id|>"), None),
        (assistant("<think>hm</think>1"), None),
        (reasoned("", ""), None),
    ] {
        assert_eq!(find(&message).as_deref(), expected, "{message:?}");
    }
    assert!(is_reasoning_mark(b"[THINK]") && !is_reasoning_mark(b"think") && !is_reasoning_mark(b""));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_cut_answer_is_trained_as_it_stands_in_every_template(
        answer in "[a-z<][a-z <>|/\n]{0,19}", think: bool, which in 0usize..5,
    ) {
        let template = ["opens_and_strips", "opens_and_shows", "hybrid", "strips", "chatml"][which];
        let written = if think { format!("<think>\n{answer}") } else { answer.clone() };
        let options = MaskOptions { last_answer_cut: true, ..MaskOptions::default() };
        let (tokenizer, rows) = rows(template, EOS, &[user("q"), assistant(&written)], &options).expect("rows");
        let trained: Vec<u32> =
            rows[0].ids.iter().zip(&rows[0].loss_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
        let opened = template.starts_with("opens");
        let expected = if opened { &answer } else { &written };
        prop_assert_eq!(&tokenizer.decode(&trained, false), expected);
    }
}
