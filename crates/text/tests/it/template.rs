//! Chat templates against Jinja2, and the loss mask they give.

use crate::common::{assistant, byte_level, byte_level_with, read, template_source, user};
use draftsmith_text::{
    ChatTemplate, MaskOptions, MaskedRow, Message, RenderOptions, SplitReason, TextError, Tokenizer, Turns,
    mask_conversation,
};
use proptest::prelude::*;
use serde_json::{Value, json};

#[test]
fn templates_render_what_jinja2_renders() {
    let mut count = 0;
    for line in read("tests/data/render_cases.jsonl").lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        let name = case["template"].as_str().expect("a name");
        let template =
            ChatTemplate::parse(&template_source(name)).expect("it parses").with_tokens("<s>", "</s>");
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .expect("messages")
            .iter()
            .map(|m| Message::from_json(m).expect("a message"))
            .collect();
        let options = RenderOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().expect("a flag"),
            tools: case.get("tools").cloned(),
            kwargs: case.get("kwargs").and_then(Value::as_object).cloned().unwrap_or_default(),
            now: case.get("now").and_then(Value::as_i64),
        };
        match (template.render(&messages, &options), case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{line}"),
            (Err(TextError::TemplateRaised { message }), None) => assert_eq!(message, case["raised"]),
            (result, _) => panic!("{result:?} for {line}"),
        }
        count += 1;
    }
    assert!(count > 100, "{count}");
}

#[track_caller]
fn check_error(source: &str, expected: &str) {
    let options = RenderOptions::default();
    let error = match ChatTemplate::parse(source) {
        Ok(template) => template.render(&[user("hi")], &options).expect_err("a broken template"),
        Err(error) => error,
    };
    assert!(error.to_string().contains(expected), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn template_errors_name_the_line() {
    check_error("{% for m in messages %}\n{{ m.role }\n{% endfor %}", "chat template, line 2");
    check_error("\n\n{{ messages[0].role.nothing.more }}", "chat template, line 3");
    check_error("{% generation\n%}\n{{ 1 }}{% endgeneration %}\n{{ f() }}", "chat template, line 4");
    check_error("{{ raise_exception('no\n system') }}", "refuses the conversation: no system");
    check_error("{% include 'other' %}", "chat template, line 1");
    check_error("{{ strftime_now('%Q') }}", "chat template, line 1: strftime_now: unknown directive `%Q`");
}

#[test]
fn runaway_templates_end() {
    check_error("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", "fuel");
    check_error(
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "fuel",
    );
    check_error("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion");
    let wide =
        "{% set ns = namespace(a=[1]) %}{% for i in range(90) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}";
    check_error(&format!("{wide}{{{{ ns.a | tojson }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ ns.a | tojson(indent=4) }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ ns.a }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ raise_exception(ns.a) }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ ns.a ~ 'x' }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ [ns.a] | join }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ '%s' % [ns.a] }}}}"), "fuel");
    check_error(&format!("{wide}{{{{ '{{}}'.format(ns.a) }}}}"), "fuel");
    let twins = "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(90) %}{% set n.a = [n.a, n.a] %}\
                 {% set n.b = [n.b, n.b] %}{% endfor %}";
    check_error(&format!("{twins}{{{{ n.a == n.b }}}}"), "fuel");
    check_error(&format!("{twins}{{{{ n.a < n.b }}}}"), "fuel");
    check_error(&format!("{twins}{{{{ [n.a] | unique | list }}}}"), "unhashable");
    check_error("{{ 'x' * 999999999999 }}", "fuel");
    check_error("{{ [1] * 999999999999 }}", "fuel");
    check_error("{{ 'x'.ljust(999999999999) }}", "fuel");
    check_error("{{ '%999999999999d' % 1 }}", "too wide");
    check_error("{{ 'x' | indent(999999999999) }}", "fuel");
    check_error("{{ range(999999999) | list }}", "Range too big");
    check_error(
        "{% set n = namespace(a=1) %}{% for i in range(9999) %}{% set n.a = [n.a] %}{% endfor %}",
        "nested too deeply",
    );
    check_error("{% set n = namespace(a=1) %}{% set n.a = [n] %}{{ n }}", "nested too deeply");
    check_error(
        "{% set n = namespace() %}{% for i in range(9999) %}{% set n.a = namespace(b=n.a) %}{% endfor %}{{ n }}",
        "nested too deeply",
    );
    check_error("{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}", "recursion");
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
    check_error(&deep, "recursion");
}

/// What transformers gives for templates that use the constructs of the large families, and for some thousand
/// expressions; `make.py` of that folder made it.
fn families(file: &str) -> Vec<Value> {
    let path = format!("{}/../../fixtures/templates/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("the fixture is there");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn row_of(row: &Value) -> (Vec<Message>, RenderOptions) {
    let messages = row["messages"].as_array().expect("messages").iter();
    let options = RenderOptions {
        add_generation_prompt: row["add_generation_prompt"].as_bool().unwrap_or(false),
        tools: row.get("tools").cloned(),
        kwargs: row["chat_template_kwargs"].as_object().cloned().unwrap_or_default(),
        now: None,
    };
    (messages.map(|m| Message::from_json(m).expect("a message")).collect(), options)
}

#[test]
fn templates_of_the_large_families_render_what_transformers_renders() {
    let rows: Vec<_> = families("rows.jsonl").iter().map(row_of).collect();
    let mut parsed = std::collections::HashMap::new();
    let mut count = 0;
    for case in families("expected.jsonl") {
        let name = case["template"].as_str().expect("a name").to_owned();
        let template = parsed.entry(name.clone()).or_insert_with(|| {
            let path = format!("{}/../../fixtures/templates/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
            let source = std::fs::read_to_string(path).expect("the template is there");
            ChatTemplate::parse(&source).expect("it parses").with_tokens("<s>", "</s>")
        });
        let row = case["row"].as_u64().expect("a row") as usize;
        let (messages, options) = &rows[row];
        match (template.render(messages, options), case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{name}, row {row}"),
            (Err(_), None) => {}
            (result, expected) => panic!("{name}, row {row}: {result:?}, expected {expected:?}"),
        }
        count += 1;
    }
    assert!(count > 300, "{count}");
}

#[test]
fn expressions_give_what_jinja2_gives() {
    let mut lines = families("expressions.jsonl").into_iter();
    let variables =
        lines.next().expect("the variables")["variables"].as_object().cloned().expect("an object");
    let options = RenderOptions { kwargs: variables, ..RenderOptions::default() };
    let (mut equal, mut refused, mut wrong) = (0, 0, Vec::new());
    for case in lines {
        let source = case[0].as_str().expect("a source");
        let result = ChatTemplate::parse(source)
            .map(|template| template.with_tokens("<s>", "</s>"))
            .and_then(|template| template.render(&[user("hi")], &options));
        match (result, case[1].as_str()) {
            (Ok(text), Some(expected)) if text == expected => equal += 1,
            (Err(_), None) => equal += 1,
            // What cannot be done alike is refused, and says so.
            (Err(_), Some(expected)) if expected.contains(" at 0x") => refused += 1,
            (Err(error), Some(_))
                if ["not supported", "cannot be printed"]
                    .iter()
                    .any(|why| error.to_string().contains(why)) =>
            {
                refused += 1;
            }
            (result, expected) => wrong.push(format!("{source:?}: {result:?}, expected {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), equal + refused + wrong.len(), wrong.join("\n"));
    assert!(equal > 2000 && refused < 100, "{equal} equal, {refused} refused");
}

#[test]
fn arguments_in_a_string_are_given_as_an_object_first_and_as_written_where_that_fails() {
    let call = json!({"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{\"x\":  1e-05}"}}]});
    let messages = [user("a"), Message::from_json(&call).expect("a message")];
    let render = |body: &str| {
        let source = "{% for m in messages %}{% for c in m.tool_calls %}{% set a = c.function.arguments %}BODY{% endfor %}{% endfor %}";
        let template = ChatTemplate::parse(&source.replace("BODY", body)).expect("it parses");
        template.render(&messages, &RenderOptions::default())
    };
    let check = |body: &str, expected: &str| assert_eq!(render(body).expect(body), expected, "{body}");
    check("{{ a | tojson }}", "{\"x\": 1e-05}");
    check("{{ a.x }}{% for k, v in a | items %}{{ k }}{% endfor %}", "1e-05x");
    check("{{ a if a is string else a | tojson }}", "{\"x\": 1e-05}");
    // Joined with text or printed bare, the object cannot be meant.
    for body in
        ["{{ '<' + a + '>' }}", "<{{ a }}>", "{{ '<' ~ a ~ '>' }}", "{{ '<%s>' % a }}", "<{{ a | string }}>"]
    {
        check(body, "<{\"x\":  1e-05}>");
    }
    check("{{ raise_exception('a string, please') if a is not string }}{{ a | length }}", "13");
    let error = render("{{ a + 1 }}").expect_err("neither works").to_string();
    assert!(error.contains("dict"), "{error}");
}

#[test]
fn special_tokens_are_the_tokenizers_own_and_undefined_where_it_has_none() {
    let tokenizer = byte_level(&["</s>", "<|im_end|>"]);
    let template =
        ChatTemplate::parse("{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ sep_token }}");
    let template = template.expect("it parses").with_tokens_of(&tokenizer);
    let text = template.render(&[user("x")], &RenderOptions::default()).expect("text");
    assert_eq!(text, "<s>|</s>|False|");
}

#[test]
fn the_date_is_the_callers_or_the_templates() {
    let template = ChatTemplate::parse(&template_source("llama3")).expect("it parses");
    let text =
        |now| template.render(&[user("x")], &RenderOptions { now, ..Default::default() }).expect("text");
    assert!(text(None).contains("26 Jul 2024"));
    assert!(text(Some(0)).contains("01 Jan 1970"));
}

fn mask(
    name: &str,
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &MaskOptions,
) -> Result<Vec<MaskedRow>, TextError> {
    let template = ChatTemplate::parse(&template_source(name)).expect("it parses").with_tokens("<s>", "</s>");
    mask_conversation(tokenizer, &template, messages, options)
}

/// What each row trains, one string per run of trained tokens.
fn trained(tokenizer: &Tokenizer, rows: &[MaskedRow]) -> Vec<Vec<String>> {
    rows.iter()
        .map(|row| {
            let mut runs: Vec<Vec<u32>> = Vec::new();
            for (i, id) in row.ids.iter().enumerate() {
                if row.loss_mask[i] {
                    if i == 0 || !row.loss_mask[i - 1] {
                        runs.push(Vec::new());
                    }
                    runs.last_mut().expect("a run").push(*id);
                }
            }
            runs.iter().map(|run| tokenizer.decode(run, false)).collect()
        })
        .collect()
}

fn chat() -> Vec<Message> {
    vec![
        Message::new("system", "Be kind."),
        user("hello the assistant\n"),
        assistant("the\n\nassistant\nsays <b>é</b>"),
        user("is it <|im_start|>?"),
        assistant("  it is.\n\n"),
        user("left over"),
    ]
}

#[track_caller]
fn check_mask(
    name: &str,
    eos: &[&str],
    messages: &[Message],
    options: &MaskOptions,
    expected: &[&[&str]],
) -> Vec<MaskedRow> {
    let tokenizer = byte_level(eos);
    let rows = mask(name, &tokenizer, messages, options).expect("rows");
    assert_eq!(trained(&tokenizer, &rows), expected, "{name}");
    for row in &rows {
        assert_eq!(row.ids.len(), row.loss_mask.len());
        assert_eq!(tokenizer.encode(&row.text, false).expect("ids"), row.ids);
    }
    rows
}

#[test]
fn the_mask_covers_what_the_model_writes_and_nothing_else() {
    let all = MaskOptions::default();
    let first = "the\n\nassistant\nsays <b>é</b>";
    check_mask(
        "chatml",
        &["<|im_end|>"],
        &chat(),
        &all,
        &[&[&format!("{first}<|im_end|>"), "  it is.\n\n<|im_end|>"]],
    );
    check_mask(
        "llama3",
        &["<|eot_id|>"],
        &chat(),
        &all,
        &[&[&format!("{first}<|eot_id|>"), "it is.<|eot_id|>"]],
    );
    check_mask(
        "qwen25_tools",
        &["<|im_end|>", "</s>"],
        &chat(),
        &all,
        &[&[&format!("{first}<|im_end|>"), "  it is.\n\n<|im_end|>"]],
    );
    check_mask(
        "gemma",
        &["<end_of_turn>"],
        &chat(),
        &all,
        &[&[&format!("{first}<end_of_turn>"), "it is.<end_of_turn>"]],
    );
    check_mask("zephyr", &["</s>"], &chat(), &all, &[&[&format!("{first}</s>"), "  it is.\n\n</s>"]]);
    check_mask(
        "generation_tags",
        &["</s>"],
        &chat(),
        &all,
        &[&[&format!("{first}</s>"), "  it is.\n\n</s>"]],
    );
}

#[test]
fn an_end_of_turn_token_that_the_configuration_forgot_is_still_found() {
    let rows = check_mask(
        "gemma",
        &["</s>"],
        &chat()[1..3],
        &MaskOptions::default(),
        &[&["the\n\nassistant\nsays <b>é</b><end_of_turn>"]],
    );
    assert!(rows[0].turns[0].ends_turn);
}

#[test]
fn a_tokenizer_that_normalises_text_masks_the_same_answers() {
    // Qwen's tokenizers compose characters, so that tokens no longer spell the rendered text.
    let tokenizer = byte_level_with("qwen2", &["<|im_end|>"]);
    let messages =
        [user("cafe\u{301}?"), assistant("oui, cafe\u{301}."), user("u\u{308}"), assistant("o\u{308}")];
    let rows = mask("chatml", &tokenizer, &messages, &MaskOptions::default()).expect("rows");
    assert_eq!(trained(&tokenizer, &rows), [["oui, caf\u{e9}.<|im_end|>", "\u{f6}<|im_end|>"]]);
}

#[test]
fn what_the_generation_prompt_leaves_out_is_trained() {
    // The line break after the header stands in the conversation but not in the prompt, so the model has to write it.
    let source = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let template = ChatTemplate::parse(&source.replace("]\n", "]{{ '\\n' }}")).expect("it parses");
    let tokenizer = byte_level(&["</s>"]);
    let rows =
        mask_conversation(&tokenizer, &template, &[user("a"), assistant("b")], &MaskOptions::default());
    assert_eq!(trained(&tokenizer, &rows.expect("rows")), [["\nb</s>"]]);
}

#[test]
fn only_the_last_turn_is_trained_on_request() {
    let options = MaskOptions { turns: Turns::Last, ..MaskOptions::default() };
    check_mask("chatml", &["<|im_end|>"], &chat(), &options, &[&["  it is.\n\n<|im_end|>"]]);
}

#[test]
fn a_template_that_rewrites_history_gives_a_row_per_answer() {
    let reasoned = |text: &str, reasoning: &str| Message {
        reasoning_content: Some(reasoning.into()),
        ..assistant(text)
    };
    let messages = [user("a"), reasoned("one", "r1"), user("b"), reasoned("two", "r2")];
    let rows = check_mask(
        "qwen3_thinking",
        &["<|im_end|>"],
        &messages,
        &MaskOptions::default(),
        &[&["<think>\nr1\n</think>\n\none<|im_end|>"], &["<think>\nr2\n</think>\n\ntwo<|im_end|>"]],
    );
    assert_eq!(rows[0].split, Some(SplitReason::HistoryRewritten { turn: 1 }));
    assert!(rows[1].text.contains("assistant\none<|im_end|>") && !rows[1].text.contains("r1"));
}

#[test]
fn without_thinking_the_empty_thought_belongs_to_the_prompt() {
    let mut options = MaskOptions::default();
    options.render.kwargs.insert("enable_thinking".into(), json!(false));
    check_mask(
        "qwen3_thinking",
        &["<|im_end|>"],
        &[user("a"), assistant("one")],
        &options,
        &[&["one<|im_end|>"]],
    );
}

#[test]
fn an_answer_that_does_not_continue_its_prompt_is_an_error() {
    let mut options = MaskOptions::default();
    options.render.kwargs.insert("enable_thinking".into(), json!(false));
    let thought = Message { reasoning_content: Some("why".into()), ..assistant("one") };
    let error = mask("qwen3_thinking", &byte_level(&["<|im_end|>"]), &[user("a"), thought], &options);
    match error {
        Err(TextError::AnswerNotContinued { turn, prompt, rendered }) => {
            assert_eq!((turn, prompt.as_str()), (1, "\n</think>\n\n"));
            assert!(rendered.starts_with("why\n</think>"), "{rendered}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_that_was_cut_off_does_not_end_its_turn() {
    let options = MaskOptions { last_answer_cut: true, ..MaskOptions::default() };
    let tokenizer = byte_level(&["<|im_end|>"]);
    let messages = [user("a"), assistant("one"), user("b"), assistant("and so")];
    let rows = mask("chatml", &tokenizer, &messages, &options).expect("rows");
    assert_eq!(trained(&tokenizer, &rows), [["one<|im_end|>", "and so"]]);
    assert!(tokenizer.decode(&rows[0].ids, false).ends_with("assistant\nand so"));
    assert_eq!((rows[0].ids.len(), rows[0].spans.len()), (rows[0].loss_mask.len(), rows[0].loss_mask.len()));
    assert_eq!(rows[0].turns.iter().map(|t| t.ends_turn).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn tool_calls_are_trained_and_tool_answers_are_not() {
    let call = json!({"role": "assistant", "content": null,
        "tool_calls": [{"function": {"name": "add", "arguments": "{\"a\": 1}"}}]});
    let messages = [
        user("add"),
        Message::from_json(&call).expect("a message"),
        Message::new("tool", "3"),
        assistant("It is 3."),
    ];
    // The call follows the header without the line break of the generation prompt, as in the model's own template.
    let error = mask("qwen25_tools", &byte_level(&["<|im_end|>"]), &messages, &MaskOptions::default());
    let rows = error.expect("rows");
    assert_eq!(
        trained(&byte_level(&["<|im_end|>"]), &rows),
        [vec![
            "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call><|im_end|>".to_owned(),
            "It is 3.<|im_end|>".to_owned()
        ]]
    );
}

#[test]
fn two_bos_tokens_are_an_error() {
    let template =
        ChatTemplate::parse("{{ bos_token }}<s>{% for m in messages %}{{ m.content }}{% endfor %}")
            .expect("it parses")
            .with_tokens("<s>", "</s>");
    let tokenizer = byte_level(&["</s>"]);
    let error =
        mask_conversation(&tokenizer, &template, &[user("a"), assistant("b")], &MaskOptions::default());
    assert!(matches!(error, Err(TextError::DoubleBos { .. })), "{error:?}");
}

#[test]
fn control_tokens_written_out_in_a_text_are_found() {
    let tokenizer = byte_level(&["<|im_end|>"]);
    assert_eq!(tokenizer.special_in("a <|im_end|> b"), tokenizer.token_to_id("<|im_end|>"));
    assert_eq!(tokenizer.special_in("a <|im_ end|> <think> b"), None);
}

#[test]
fn a_conversation_without_answers_gives_no_rows() {
    let rows =
        mask("chatml", &byte_level(&["<|im_end|>"]), &[user("a")], &MaskOptions::default()).expect("rows");
    assert!(rows.is_empty());
}

#[test]
fn the_layout_of_json_is_pythons() {
    let value = r#"{"b": [1, 2], "a": "<é\"\n", "empty": []}"#;
    let render = |filter: &str| {
        let mut options = RenderOptions::default();
        options.kwargs.insert("v".into(), serde_json::from_str(value).expect("JSON"));
        let template = ChatTemplate::parse(&format!("{{{{ v|{filter} }}}}")).expect("it parses");
        template.render(&[], &options).expect("text")
    };
    assert_eq!(render("tojson"), value);
    assert_eq!(
        render("tojson(indent=2, sort_keys=true, ensure_ascii=true)"),
        "{\n  \"a\": \"<\\u00e9\\\"\\n\",\n  \"b\": [\n    1,\n    2\n  ],\n  \"empty\": []\n}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn trained_text_is_the_answers_on_any_words(
        // An answer that starts with a line break may share a token with the one before it, which is not trained.
        turns in proptest::collection::vec(("[a-z hé\n<>|]{1,20}", "[a-z hé<>|][a-z hé\n<>|]{0,19}"), 1..4),
    ) {
        let tokenizer = byte_level(&["<|im_end|>"]);
        let mut messages = Vec::new();
        let mut expected = Vec::new();
        for (question, answer) in &turns {
            messages.push(user(question));
            messages.push(assistant(answer));
            expected.push(format!("{answer}<|im_end|>"));
        }
        let rows = mask("chatml", &tokenizer, &messages, &MaskOptions::default()).expect("rows");
        prop_assert_eq!(trained(&tokenizer, &rows), vec![expected]);
    }

    #[test]
    fn any_template_parses_or_fails_politely(source in "(\\{\\{|\\}\\}|\\{%|%\\}|[a-z ]{1,6}|for|in|if|endfor|endif|messages|\\(|\\)|\\[|\\]|\\||'|~|-|generation|\n|0){0,30}") {
        if let Ok(template) = ChatTemplate::parse(&source) {
            let _ = template.render(&[user("x"), assistant("y")], &RenderOptions::default());
        }
    }
}
