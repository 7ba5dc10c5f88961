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

/// `data prepare` without strictness over these rows: the report.
fn lax(home: &Home) -> serde_json::Value {
    let ended = home.run(&["data", "prepare", "run.toml", "data.strict=false"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let report = std::fs::read(home.path().join("runs/run/data/report.json")).expect("a report");
    serde_json::from_slice(&report).expect("JSON")
}

#[test]
fn without_strictness_no_row_stops_a_run() {
    let home = home(&[
        GOOD,
        r#"{"score":NaN,"prompt":"c","completion":"d"}"#,
        r#"{"prompt":"half \ud83d here","completion":"e","rejected":"f"}"#,
        r#"{"prompt":"g" "completion":"h"}"#,
        r#"{"title":"x"}"#,
        r#"{"prompt":"i","completion":7}"#,
        r#"{"messages":[{"role":"system","content":""},{"role":"user","content":"j"},{"role":"assistant","content":"<think>\nk\n</think>\n\nl"}]}"#,
        r#"{"messages":[{"role":"system","content":""},{"role":"user","content":"m"},{"role":"assistant","content":"n"}]}"#,
        r#"{"prompt":"o","completion":"p"}"#,
        r#"{"id":"again","prompt":"o","completion":"p"}"#,
        r#"{"prompt":"q","compl"#,
    ]);
    home.write(
        "t.jinja",
        "{%- for m in messages -%}{%- if '<think>' in m.content -%}other{%- endif -%}\
         {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}\
         {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    );
    let toml = std::fs::read_to_string(home.path().join("run.toml")).expect("the run file");
    home.write("run.toml", toml.replace("[data]", "[data]\ntemplate = \"t.jinja\""));
    let report = lax(&home);
    assert_eq!(report["rows"], 5);
    assert_eq!(
        report["dropped"],
        serde_json::json!({"broken_json": 1, "not_a_conversation": 1, "wrong_type": 1, "answer_not_continued": 1,
                           "duplicate": 1, "cut_off": 1})
    );
    assert_eq!(report["changed"], serde_json::json!({"blank_system_left_out": 2, "surrogate_replaced": 1}));
    assert_eq!(report["unused_keys"], serde_json::json!({"rejected": 1}));
    assert!(
        report["first_dropped"]["broken_json"]
            .as_str()
            .is_some_and(|w| w.starts_with("`rows.jsonl`, line 4: "))
    );
}

#[test]
fn a_broken_row_of_validation_is_counted() {
    let home = home(&[GOOD]);
    home.write("valid.jsonl", "{\"prompt\":\"x\",\"completion\":\"y\"}\n{\"prompt\":\n");
    let toml = std::fs::read_to_string(home.path().join("run.toml")).expect("the run file");
    home.write("run.toml", toml.replace("[data]", "[data]\nvalidation = \"valid.jsonl\""));
    assert_eq!(lax(&home)["validation_dropped"], serde_json::json!({"cut_off": 1}));
}

#[test]
fn fields_and_calls_of_other_dialects_reach_the_template_and_the_rows_on_disk() {
    let home = home(&[
        r#"{"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","thinking":"two and two","tool_plan":"none needed","content":"4"}],"note":"x"}"#,
        r#"{"conversations":[{"from":"human","value":"Plim?"},{"from":"function_call","value":"{\"name\": \"w\", \"arguments\": {}}"},{"from":"observation","value":"3"},{"from":"gpt","value":"Three."}]}"#,
        r#"{"messages":[{"role":"user","content":"Plim?"},{"role":"assistant","content":null,"function_call":{"name":"w","arguments":"{}"}},{"role":"function","name":"w","content":"3"},{"role":"assistant","content":"Three."}]}"#,
    ]);
    home.write(
        "t.jinja",
        "{%- for m in messages -%}{{- m.role + ' ' -}}{%- if m.role == 'assistant' -%}\
         {{- '[' ~ (m.reasoning_content or '') ~ '|' ~ (m.thinking or '') ~ '|' ~ (m.tool_plan or '') -}}\
         {%- for c in m.tool_calls or [] -%}{{- '|' ~ c.function.name -}}{%- endfor -%}{{- ']' -}}{%- endif -%}\
         {{- m.content + '\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant [' -}}{%- endif -%}",
    );
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let preview = |file: &str| -> Vec<serde_json::Value> {
        let args =
            ["data", "preview", file, "--target", &tiny, "--template", "t.jinja", "--rows", "3", "--json"];
        let ended = home.run(&args);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let rows = preview("rows.jsonl");
    let texts: Vec<&str> = rows.iter().map(|row| row["text"].as_str().expect("a text")).collect();
    let call = "user Plim?\nassistant [|||w]\ntool 3\nassistant [||]Three.\n";
    assert_eq!(texts, ["user 2+2?\nassistant [two and two|two and two|none needed]4\n", call, call]);
    assert_eq!(rows[0]["unused_keys"], serde_json::json!(["note"]));
    // What a run writes down is read back to the same text.
    lax(&home);
    let again = preview("runs/run/data/conversations.jsonl");
    let mut again: Vec<&str> = again.iter().map(|row| row["text"].as_str().expect("a text")).collect();
    let mut texts = texts;
    again.sort_unstable();
    texts.sort_unstable();
    assert_eq!(again, texts);
}
