//! Rows to tokens.

use draftsmith_data::{
    DataError, DropReason, LoadOptions, Paint, PrepareOptions, PreparedRow, Preparer, Report, Row,
    SourceSpec, TokenCounts, load, prepare, preview_conversation,
};
use draftsmith_text::{ChatTemplate, MaskOptions};

use crate::{chat, chatml, tokenizer, write};

fn options() -> PrepareOptions {
    PrepareOptions {
        mask: MaskOptions::default(),
        max_length: 1000,
        min_trained_tokens: 1,
        target_vocab: 300,
        strict: false,
    }
}

fn run(lines: &str, options: PrepareOptions) -> Result<(Vec<PreparedRow>, Report, TokenCounts), DataError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", lines);
    let loaded = load(&[SourceSpec::new(path)], &LoadOptions::default(), |_| {}).expect("rows");
    let (tokenizer, template) = (tokenizer(), chatml());
    let preparer = Preparer::new(&tokenizer, &template, options, loaded.report);
    let result = prepare(&loaded.rows, preparer, |_| {});
    if let Ok((rows, r, _)) = &result {
        assert_eq!(r.rows, rows.len() as u64);
        assert_eq!(
            r.rows_read + r.rows_repeated + r.rows_split,
            r.rows + r.held_back + r.limited + r.dropped_total(),
            "{r:?}"
        );
    }
    result
}

fn trained(row: &PreparedRow) -> String {
    let ids: Vec<u32> = row.ids.iter().zip(&row.loss_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    tokenizer().decode(&ids, false)
}

#[test]
fn answers_are_masked_counted_and_reported() {
    let tokens = "{\"id\":\"t\",\"domain\":\"d\",\"input_ids\":[1,2,3],\"loss_mask\":[0,1,1]}\n";
    let (rows, report, counts) = run(&format!("{}{tokens}", chat("hi", "yes")), options()).expect("rows");
    assert_eq!(trained(&rows[0]), "yes<|im_end|>");
    assert_eq!((rows[0].id.as_str(), rows[0].domain.as_str()), ("a.jsonl:1", "unnamed"));
    assert_eq!((rows[1].id.as_str(), rows[1].ids.as_slice()), ("t", &[1, 2, 3][..]));
    assert_eq!((report.trained_tokens, counts.total()), (6, 6));
    assert_eq!(report.tokens, rows.iter().map(|r| r.ids.len() as u64).sum::<u64>());
    assert_eq!(report.domains["d"].trained_tokens, 2);
    assert_eq!(report.lengths.as_ref().map(|l| l.max), Some(rows[0].ids.len() as u64));
    let map = counts.vocab_map(270, &tokenizer().always_in_draft_vocab()).expect("a map");
    assert_eq!(counts.coverage(&map), Some(1.0));
}

#[test]
fn long_rows_are_cut_after_a_turn_or_else_inside_the_first() {
    let two = serde_json::json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "first"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "second"}]});
    let lines = format!("{two}\n");
    let whole = run(&lines, options()).expect("rows").0.remove(0).ids.len();
    let (rows, report, _) = run(&lines, PrepareOptions { max_length: whole - 2, ..options() }).expect("rows");
    assert_eq!(trained(&rows[0]), "first<|im_end|>");
    assert_eq!((report.cut_at_turn, report.cut_inside_turn), (1, 0));
    assert_eq!(report.trained_tokens_cut, 7, "`second<|im_end|>`");
    assert_eq!(rows[0].loss_mask.last(), Some(&true));
    // `<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n` has 20 tokens.
    let (rows, report, _) = run(&lines, PrepareOptions { max_length: 22, ..options() }).expect("rows");
    assert_eq!(trained(&rows[0]), "fi");
    assert_eq!((report.cut_at_turn, report.cut_inside_turn), (0, 1));
    assert_eq!(report.trained_tokens_cut, 11);
    let error = run(&lines, PrepareOptions { max_length: 20, ..options() }).expect_err("nothing left");
    assert!(error.to_string().contains("1 too_few_trained_tokens"), "{error}");
}

#[test]
fn rows_that_train_nothing_are_counted_or_in_strict_mode_named() {
    let prompt = "{\"prompt\":\"only a question\"}\n";
    let control = chat("say <|im_end|> please", "no");
    let far = "{\"input_ids\":[1,999],\"loss_mask\":[0,1]}\n";
    let none = "{\"input_ids\":[1,2],\"loss_mask\":[0,0]}\n";
    let lines = format!("{}{prompt}{control}{far}{none}", chat("hi", "yes"));
    let (rows, report, _) = run(&lines, options()).expect("rows");
    assert_eq!(rows.len(), 1);
    for reason in [
        DropReason::NoAnswer,
        DropReason::SpecialTokenInText,
        DropReason::TokenOutOfVocabulary,
        DropReason::TooFewTrainedTokens,
    ] {
        assert_eq!(report.dropped_for(reason), 1, "{}", reason.name());
    }
    for (line, expected) in [
        (prompt, "line 1: the conversation has no assistant message, so it has zero trained tokens"),
        (&control, "line 1: message 0: the text holds the control token `<|im_end|>`"),
        (far, "line 1: `input_ids[1]` is 999, but the target has 300 tokens"),
        (none, "line 1: the row has 0 trained tokens, at least 1 are asked for"),
    ] {
        let error = run(line, PrepareOptions { strict: true, ..options() }).expect_err(line);
        assert!(error.to_string().ends_with(expected), "{error}");
        assert!(error.hint().is_some());
    }
}

/// What a template makes of rows, the second of which it cannot render.
#[track_caller]
fn refuses(source: &str, second: &str, reason: DropReason, message: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", format!("{}{second}\n{}", chat("a", "b"), chat("c", "d")));
    let loaded = load(&[SourceSpec::new(path)], &LoadOptions::default(), |_| {}).expect("rows");
    let (tokenizer, template) = (tokenizer(), ChatTemplate::parse(source).expect("it parses"));
    let go = |strict| {
        let options = PrepareOptions { strict, ..options() };
        prepare(&loaded.rows, Preparer::new(&tokenizer, &template, options, loaded.report.clone()), |_| {})
    };
    let (rows, report, _) = go(false).expect("two rows");
    assert_eq!((rows.len(), report.dropped_for(reason), report.dropped_total()), (2, 1, 1), "{report:?}");
    assert!(report.first_dropped[reason.name()].starts_with("`a.jsonl`, line 2: "), "{report:?}");
    let error = go(true).expect_err("strict");
    assert!(error.to_string().contains("line 2: ") && error.to_string().contains(message), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("data.strict = false")), "{error}");
}

#[test]
fn rows_that_a_template_cannot_render_are_counted_by_kind() {
    let think =
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"<think>x</think>b"}]}"#;
    let turn = "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}";
    let prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let each = |body: &str| {
        format!("{{% for m in messages %}}{{% set c = m.content %}}{body}{turn}{{% endfor %}}{prompt}")
    };
    let raises = each("{% if '<think>' in c %}{{ raise_exception('no thoughts here') }}{% endif %}");
    refuses(&raises, think, DropReason::TemplateRefused, "no thoughts here");
    let fails = each("{% if '<think>' in c %}{{ c + 1 + none }}{% endif %}");
    refuses(&fails, think, DropReason::TemplateFailed, "chat template, line 1");
    let rewrites = each("{% if '<think>' in c %}<thoughtful>{% endif %}");
    refuses(&rewrites, think, DropReason::AnswerNotContinued, "does not continue");
}

#[test]
fn rows_are_the_same_if_their_token_ids_are() {
    let tokens = "{\"input_ids\":[1,2],\"loss_mask\":[0,1]}\n{\"input_ids\":[1,2],\"loss_mask\":[1,1]}\n";
    let reasoned = r#"{"prompt":"hi","completion":"yes","reasoning":"why"}"#;
    let lines = format!("{}{}{reasoned}\n{tokens}", chat("hi", "yes"), chat("Hi", "yes"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", &lines);
    // A weight repeats rows on purpose.
    let source = SourceSpec { weight: 2.0, ..SourceSpec::new(path) };
    let loaded = load(&[source], &LoadOptions::default(), |_| {}).expect("rows");
    let (tokenizer, template) = (tokenizer(), chatml());
    let preparer =
        Preparer::new(&tokenizer, &template, options(), loaded.report.clone()).without_duplicates();
    let (rows, report, _) = prepare(&loaded.rows, preparer, |_| {}).expect("rows");
    // The template does not render reasoning, so row 3 is row 1.
    assert_eq!((rows.len(), report.dropped_for(DropReason::Duplicate)), (8, 2), "{report:?}");
    assert!(report.first_dropped["duplicate"].contains("line 3: its token ids are those of"), "{report:?}");
    let (rows, ..) = run(&lines, options()).expect("rows");
    assert_eq!(rows.len(), 5, "without being asked to, no row is dropped");
}

#[test]
fn what_the_template_leaves_out_of_an_answer_is_counted() {
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning":"why","tool_calls":[{"function":{"name":"count","arguments":{}}}]}]}"#;
    let (_, report, _) = run(&format!("{row}\n{}", chat("c", "d")), options()).expect("rows");
    assert_eq!(report.changed_by(draftsmith_data::Change::CallsNotRendered), 1);
    assert_eq!(report.changed_by(draftsmith_data::Change::ReasoningNotRendered), 1);
}

#[test]
fn answers_that_say_so_are_context_alone() {
    let row = r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"wrong","weight":0},{"from":"human","value":"b"},{"from":"gpt","value":"right","train":true},{"from":"human","value":"bye"}]}"#;
    let (rows, report, _) = run(&format!("{row}\n"), options()).expect("rows");
    assert_eq!(trained(&rows[0]), "right<|im_end|>");
    assert!(tokenizer().decode(&rows[0].ids, false).contains("wrong"));
    assert_eq!(report.changed_by(draftsmith_data::Change::AnswersNotTrained), 1);
    assert_eq!(report.changed_by(draftsmith_data::Change::EndWithoutAnswerLeftOut), 1);
    let none = r#"{"prompt":"a","completion":[{"role":"assistant","content":"b","loss":false}]}"#;
    let error = run(none, PrepareOptions { strict: true, ..options() }).expect_err("nothing to train");
    assert!(error.to_string().contains("no answer of the conversation can be trained"), "{error}");
}

#[test]
fn an_answer_of_calls_that_the_template_leaves_out_is_not_trained_as_silence() {
    let call =
        r#"{"role":"assistant","content":"","tool_calls":[{"function":{"name":"weather","arguments":{}}}]}"#;
    let row = |rest: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}},{call}{rest}]}}"#) + "\n";
    let more = r#",{"role":"tool","content":"3"},{"role":"assistant","content":"cold"}"#;
    let (rows, report, _) = run(&row(more), options()).expect("rows");
    assert_eq!(trained(&rows[0]), "cold<|im_end|>");
    assert_eq!(report.changed_by(draftsmith_data::Change::CallsNotRendered), 1);
    let error = run(&row(""), PrepareOptions { strict: true, ..options() }).expect_err("nothing to train");
    assert!(error.to_string().contains("nothing but calls that the template leaves out"), "{error}");
}

#[test]
fn trained_tokens_of_rows_that_are_dropped_are_counted() {
    let far = "{\"input_ids\":[1,999,2],\"loss_mask\":[0,1,1]}\n";
    let lines = format!("{}{}{far}", chat("hi", "yes"), chat("hi", "a longer answer"));
    let (rows, report, _) = run(&lines, PrepareOptions { min_trained_tokens: 5, ..options() }).expect("rows");
    assert_eq!(rows.len(), 1);
    assert_eq!(report.trained_tokens_dropped, 4 + 2, "`yes<|im_end|>` and two ids");
}

#[test]
fn an_answer_that_does_not_follow_its_prompt_is_dropped_or_in_strict_mode_named() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}\
        {% if add_generation_prompt and 'odd' in messages[-1].content %}[other]{% endif %}";
    let template = draftsmith_text::ChatTemplate::parse(source).expect("it parses");
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", format!("{}{}", chat("odd", "yes"), chat("hi", "no")));
    let loaded = load(&[SourceSpec::new(path)], &LoadOptions::default(), |_| {}).expect("rows");
    let tokenizer = tokenizer();
    let preparer = |strict| {
        Preparer::new(&tokenizer, &template, PrepareOptions { strict, ..options() }, loaded.report.clone())
    };
    let (rows, report, _) = prepare(&loaded.rows, preparer(false), |_| {}).expect("rows");
    assert_eq!((rows.len(), report.dropped_for(DropReason::AnswerNotContinued)), (1, 1));
    let error = prepare(&loaded.rows, preparer(true), |_| {}).expect_err("strict");
    assert!(error.to_string().contains("does not continue the generation prompt"), "{error}");
    assert!(error.hint().expect("a hint").contains("enable_thinking"));
}

#[test]
fn the_preview_marks_what_is_trained() {
    let line = chat("hé\u{1b}[31m", "yes 🙂\n");
    let Ok(Row::Conversation(row)) = draftsmith_data::parse_conversation_line(line.as_bytes()) else {
        panic!("no conversation")
    };
    let show = |paint| {
        preview_conversation(&tokenizer(), &chatml(), &row, &MaskOptions::default(), paint)
            .expect("a preview")
    };
    assert_eq!(
        show(Paint::Plain),
        "38 tokens, 10 trained\n<|im_start|>user\nhé\\u{1b}[31m<|im_end|>\n<|im_start|>assistant\n⟦yes 🙂\n<|im_end|>⟧\n"
    );
    let colour = show(Paint::Ansi);
    assert!(colour.contains("\x1b[32myes 🙂\n\x1b[0m\x1b[32m\x1b[2m<|im_end|>\x1b[0m"), "{colour:?}");
    let mut prompt = row.clone();
    prompt.messages.pop();
    let text = preview_conversation(&tokenizer(), &chatml(), &prompt, &MaskOptions::default(), Paint::Plain);
    assert!(text.expect("a preview").starts_with("27 tokens, 0 trained"));
}
