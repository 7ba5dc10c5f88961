//! Mixing files.

use draftsmith_data::{
    DataError, Decontaminator, Dedupe, DropReason, LoadOptions, Loaded, Row, SourceSpec, hold_back, load,
};

use crate::{chat, write};

fn prompts(loaded: &Loaded) -> Vec<String> {
    loaded
        .rows
        .iter()
        .map(|row| match &row.row {
            Row::Conversation(row) => {
                row.messages.iter().find(|m| m.role == "user").expect("a prompt").content.clone()
            }
            Row::Tokens(_) => panic!("tokens"),
        })
        .collect()
}

#[track_caller]
fn conserved(loaded: &Loaded) {
    let r = &loaded.report;
    assert_eq!(r.rows_read + r.rows_repeated, r.rows + r.held_back + r.limited + r.dropped_total(), "{r:?}");
    assert_eq!(r.rows, loaded.rows.len() as u64);
}

fn hundred() -> String {
    (0..100).map(|i| chat(&format!("question {i}"), "answer")).collect()
}

#[test]
fn broken_rows_are_counted_or_in_strict_mode_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let bad = "{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\"}]}\n{\"messages\":[]}\n";
    let path = write(folder.path(), "a.jsonl", format!("{}{bad}{}", chat("a", "b"), chat("c", "d")));
    let sources = [SourceSpec::new(&path)];
    let loaded = load(&sources, &LoadOptions::default(), |_| {}).expect("rows");
    conserved(&loaded);
    assert_eq!(prompts(&loaded), ["a", "c"]);
    assert_eq!(loaded.report.dropped_for(DropReason::StartsWithAssistant), 1);
    assert_eq!(loaded.report.dropped_for(DropReason::Empty), 1);
    let strict = LoadOptions { strict: true, ..LoadOptions::default() };
    let error = load(&sources, &strict, |_| {}).expect_err("strict");
    assert!(
        error.to_string().ends_with("line 2: the conversation starts with an assistant message"),
        "{error}"
    );
    let only_bad = write(folder.path(), "b.jsonl", bad);
    let error =
        load(&[SourceSpec::new(only_bad)], &LoadOptions::default(), |_| {}).expect_err("nothing left");
    assert!(error.to_string().contains("2 read, 1 empty, 1 starts_with_assistant"), "{error}");
}

#[test]
fn duplicates_are_the_same_in_all_that_is_rendered() {
    let folder = tempfile::tempdir().expect("a folder");
    let with = |key: &str, value: serde_json::Value| {
        let mut row: serde_json::Value = serde_json::from_str(&chat("What is 2?", "two")).expect("JSON");
        row[key] = value;
        format!("{row}\n")
    };
    let rows = [
        chat("What is 2?", "two"),
        chat("what is 2", "two"),
        chat("What is 2?", "Two!"),
        chat("a = b + c", "x"),
        chat("a = b - c", "x"),
        with("tools", serde_json::json!([{"name": "f"}])),
        with("chat_template_kwargs", serde_json::json!({"enable_thinking": false})),
        with("system", "Be brief.".into()),
        // The same again, apart from what does not reach the text.
        with("id", "seven".into()),
        with("system", "Be brief.".into()),
    ];
    let path = write(folder.path(), "a.jsonl", rows.concat());
    let count = |dedupe| {
        let options = LoadOptions { dedupe, ..LoadOptions::default() };
        let loaded = load(&[SourceSpec::new(&path)], &options, |_| {}).expect("rows");
        conserved(&loaded);
        loaded.rows.len()
    };
    assert_eq!(count(Dedupe::Off), 10);
    assert_eq!(count(Dedupe::Conversation), 8);
    // Row 3 asks what row 1 does.
    assert_eq!(count(Dedupe::Prompt), 7);
}

#[test]
fn what_is_nearly_a_validation_prompt_is_left_out_under_its_own_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows =
        [chat("what is two", "x"), chat("Three?", "y"), chat("What is two?", "z"), chat("What is two?", "2")];
    let path = write(folder.path(), "a.jsonl", rows.concat());
    let mut loaded = load(&[SourceSpec::new(path)], &LoadOptions::default(), |_| {}).expect("rows");
    let held = hold_back(&mut loaded, 1);
    conserved(&loaded);
    assert_eq!((held.len(), prompts(&loaded)), (1, vec!["Three?".to_owned()]));
    assert_eq!((loaded.report.held_back, loaded.report.dropped_for(DropReason::LikeValidation)), (2, 1));
}

#[test]
fn unused_keys_and_changes_are_counted() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\",\"score\":1}\n\
                {\"prompt\":\"d\",\"chosen\":\"e\",\"rejected\":\"f\",\"note\":\"\",\"x\":null}\n\
                {\"messages\":[{\"role\":\"developer\",\"content\":\" \"},{\"role\":\"user\",\"content\":\"g\"}]}\n";
    let path = write(folder.path(), "a.jsonl", rows);
    let options = LoadOptions { strict: true, system: Some("s".into()), ..LoadOptions::default() };
    let loaded = load(&[SourceSpec::new(path)], &options, |_| {}).expect("rows");
    let found: Vec<_> = loaded.report.unused_keys.iter().map(|(k, n)| (k.as_str(), *n)).collect();
    assert_eq!(found, [("rejected", 2), ("score", 1)]);
    assert_eq!(loaded.report.changed_by(draftsmith_data::Change::BlankSystemLeftOut), 1);
}

#[test]
fn weights_and_limits_are_kept_and_a_seed_fixes_the_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", hundred());
    let run = |weight, max_rows, seed| {
        let source = SourceSpec { weight, max_rows, ..SourceSpec::new(&path) };
        let options = LoadOptions { shuffle: true, seed, ..LoadOptions::default() };
        let loaded = load(&[source], &options, |_| {}).expect("rows");
        conserved(&loaded);
        loaded
    };
    assert_eq!(run(2.0, None, 0).rows.len(), 200);
    assert_eq!(run(1.0, Some(7), 0).rows.len(), 7);
    let half = run(0.5, None, 0).rows.len();
    assert!((35..=65).contains(&half), "{half}");
    let ids: std::collections::BTreeSet<String> = run(2.0, None, 0).rows.iter().map(|row| row.id()).collect();
    assert_eq!(ids.len(), 200, "repeated rows have ids of their own");
    assert_eq!(prompts(&run(1.0, None, 3)), prompts(&run(1.0, None, 3)));
    assert_ne!(prompts(&run(1.0, None, 3)), prompts(&run(1.0, None, 4)));
}

#[test]
fn no_prompt_that_is_held_back_stays_in_training() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), "a.jsonl", hundred());
    let source = SourceSpec { weight: 2.0, ..SourceSpec::new(path) };
    let options = LoadOptions { shuffle: true, ..LoadOptions::default() };
    let mut loaded = load(&[source], &options, |_| {}).expect("rows");
    let held = Loaded { rows: hold_back(&mut loaded, 10), ..Loaded::default() };
    conserved(&loaded);
    assert_eq!((held.rows.len(), loaded.rows.len(), loaded.report.held_back), (10, 180, 20));
    let kept = prompts(&loaded);
    assert!(prompts(&held).iter().all(|prompt| !kept.contains(prompt)));
}

#[test]
fn evaluation_questions_and_a_default_system_message_are_respected() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(
        folder.path(),
        "a.jsonl",
        [chat("one two three four five six", "x"), chat("other", "y")].concat(),
    );
    let options = LoadOptions {
        decontaminate: Some(Decontaminator::new(["Two, three: four five SIX"])),
        system: Some("Be brief.".into()),
        ..LoadOptions::default()
    };
    let loaded = load(&[SourceSpec::new(path)], &options, |_| {}).expect("rows");
    conserved(&loaded);
    assert_eq!(prompts(&loaded), ["other"]);
    assert_eq!(loaded.report.dropped_for(DropReason::Contaminated), 1);
    let Row::Conversation(row) = &loaded.rows[0].row else { panic!("tokens") };
    assert_eq!((row.messages[0].role.as_str(), row.messages[0].content.as_str()), ("system", "Be brief."));
    let missing = load(&[SourceSpec::new("nothing.jsonl")], &LoadOptions::default(), |_| {});
    assert!(matches!(missing, Err(DataError::Io { .. })));
}
