//! Conversation rows and templates that cannot be used: file and line in one `error:` line, exit code 2.

use insta::assert_snapshot;

use crate::support::{Home, repository};

const GOOD: &str = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;

fn home(rows: &[&str]) -> Home {
    let home = Home::new();
    home.write("rows.jsonl", rows.join("\n") + "\n");
    let tiny = repository().join("fixtures/tiny-target");
    home.write(
        "run.toml",
        format!(
            "[target]\nsource = \"{}\"\n[bundle]\nlicense = \"MIT\"\n[regenerate]\nenabled = false\n[validate]\nevery = 0\n\
             [data]\nvalidation_rows = 0\nmax_length = 64\nsources = [{{ path = \"rows.jsonl\" }}]\n",
            tiny.display()
        ),
    );
    home
}

/// What `data prepare` says about a second row like this.
fn second(row: &str) -> String {
    let home = home(&[GOOD, row]);
    let text = home.snapshot(&["--quiet", "data", "prepare", "run.toml"]);
    assert!(text.contains("exit: 2"), "{text}");
    assert!(!home.path().join("runs/run/data/train.tokens").exists(), "nothing half-written");
    text
}

#[test]
fn broken_json_is_named_with_its_line() {
    assert_snapshot!(second(r#"{"messages":[{"role":"user","content":"a"}"#));
}

#[test]
fn an_empty_conversation_is_named() {
    assert_snapshot!(second(r#"{"messages":[]}"#));
}

#[test]
fn a_conversation_that_starts_with_the_assistant_is_named() {
    assert_snapshot!(second(
        r#"{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]}"#
    ));
}

#[test]
fn a_conversation_without_an_answer_is_named() {
    assert_snapshot!(second(r#"{"messages":[{"role":"user","content":"a"}]}"#));
}

#[test]
fn a_row_whose_answer_lies_behind_the_length_limit_is_named() {
    let long = "word ".repeat(200);
    assert_snapshot!(second(&format!(
        r#"{{"messages":[{{"role":"user","content":"{long}"}},{{"role":"assistant","content":"b"}}]}}"#
    )));
}

#[test]
fn a_row_that_is_no_conversation_is_named() {
    assert_snapshot!(second(r#"{"text":"a"}"#));
    assert_snapshot!(second(r#"[1, 2]"#));
}

#[test]
fn tokens_outside_the_vocabulary_are_named() {
    assert_snapshot!(second(r#"{"input_ids":[1,99999],"loss_mask":[0,1]}"#));
    assert_snapshot!(second(r#"{"input_ids":[1,2],"loss_mask":[1]}"#));
}

/// What `data preview` says with this template.
fn template(source: &str) -> String {
    let home = home(&[GOOD]);
    home.write("t.jinja", source);
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    home.snapshot(&["data", "preview", "rows.jsonl", "--target", &tiny, "--template", "t.jinja"])
}

#[test]
fn a_template_that_does_not_parse_is_named_with_its_line() {
    assert_snapshot!(template("{{ messages }}\n{% for m in messages %}"));
}

#[test]
fn a_template_that_fails_is_named_with_row_and_line() {
    assert_snapshot!(template("{{ messages[0].content + 1 }}"));
}

#[test]
fn a_template_that_refuses_a_conversation_says_so() {
    assert_snapshot!(template("{{ raise_exception('roles must alternate') }}"));
}

#[test]
fn a_template_whose_answers_do_not_continue_the_prompt_is_refused() {
    assert_snapshot!(template("{{ messages | length }}"));
}

#[test]
fn a_preview_marks_what_is_trained() {
    let home = home(&[GOOD]);
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    assert_snapshot!(home.snapshot(&["data", "preview", "rows.jsonl", "--target", &tiny]));
    assert_snapshot!(home.snapshot(&["data", "preview", "rows.jsonl", "--target", &tiny, "--json"]));
    assert_snapshot!(home.snapshot(&["data", "preview", "rows.jsonl", "--target", &tiny, "--row", "7"]));
}
