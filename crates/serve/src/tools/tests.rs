use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn one() -> u64 {
    7
}

/// Two tools whose arguments have all types.
fn tools(family: &str, most: usize) -> Arc<Tools> {
    let tool = |name: &str, properties: Value| Tool {
        name: name.into(),
        parameters: json!({"type": "object", "properties": properties}),
        strict: false,
        at: String::new(),
    };
    let weather = json!({
        "city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"},
        "near": {"type": ["array", "null"]}, "more": {"type": "object"}, "id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    });
    Arc::new(Tools {
        family: Family::named(family).unwrap(),
        control_ids: Arc::from([]),
        list: vec![tool("weather", weather), tool("noop", json!({}))],
        need: Need::Auto,
        most,
    })
}

/// Text and calls of an answer that arrives in these pieces.
fn read<'a>(
    tools: &Arc<Tools>,
    pieces: impl IntoIterator<Item = &'a str>,
) -> (String, Vec<(String, String)>) {
    let mut reader = Reader::new(Arc::clone(tools), one);
    let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
    let mut hear = |parts: Vec<Part>| {
        for part in parts {
            match part {
                Part::Text(more) => text.push_str(&more),
                Part::Call { index, name, id } => {
                    assert_eq!(index, calls.len());
                    assert!(!id.is_empty());
                    calls.push((name, String::new()));
                }
                Part::Arguments { index, text } => {
                    assert_eq!(index + 1, calls.len(), "arguments of the last call");
                    assert!(!text.is_empty());
                    calls[index].1.push_str(&text);
                }
            }
        }
    };
    for piece in pieces {
        hear(reader.push(piece));
    }
    hear(reader.finish());
    (text, calls)
}

/// Cuts a text in two at each place, and into its characters: the same comes out.
#[track_caller]
fn check_at_most(family: &str, most: usize, answer: &str, text: &str, calls: &[(&str, &str)]) {
    let tools = tools(family, most);
    let wanted: Vec<(String, String)> = calls.iter().map(|(n, a)| ((*n).into(), (*a).into())).collect();
    let whole = read(&tools, [answer]);
    assert_eq!((whole.0.as_str(), &whole.1), (text, &wanted), "{family}: {answer:?}");
    for (at, _) in answer.char_indices() {
        assert_eq!(read(&tools, [&answer[..at], &answer[at..]]), whole, "{family}: {answer:?} cut at {at}");
    }
    let mut ends: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
    ends.push(answer.len());
    assert_eq!(read(&tools, ends.windows(2).map(|w| &answer[w[0]..w[1]])), whole, "{family}: {answer:?}");
}

#[track_caller]
fn check(family: &str, answer: &str, text: &str, calls: &[(&str, &str)]) {
    check_at_most(family, usize::MAX, answer, text, calls);
}

const PARIS: &str = r#"{"city": "Paris", "days": 3}"#;

#[test]
fn an_answer_without_calls_is_given_out_as_it_is() {
    for family in &FAMILIES {
        for text in [
            "",
            " ",
            "Why?\n",
            "  two  words \n\n",
            "a < b and c <t> and <to and <tool",
            "[1, 2] is a list; {\"a\": 1} an object.",
            "größer €",
            "```json\n{\"a\": [1, 2]}\n```",
        ] {
            check(family.name, text, text, &[]);
        }
    }
}

#[test]
fn calls_of_hermes_and_qwen() {
    let call = |name: &str, arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    check("hermes", &call("weather", PARIS), "", &[("weather", PARIS)]);
    let two = format!("Let me see.\n\n{}\n{}", call("weather", PARIS), call("noop", "{}"));
    check("hermes", &two, "Let me see.", &[("weather", PARIS), ("noop", "{}")]);
    check("hermes", &format!("{}\nDone. ", call("noop", "{}")), "Done.", &[("noop", "{}")]);
    check("hermes", &format!("One\n{}\ntwo", call("noop", "{}")), "One\ntwo", &[("noop", "{}")]);
    // One is wanted: what follows is left out.
    check_at_most("hermes", 1, &two, "Let me see.", &[("weather", PARIS)]);
    // Everything that may stand in a text.
    let odd = r#"{"city": "}\"]</tool_call>{ \\", "n": [{"a": "{"}, null]}"#;
    check("hermes", &call("weather", odd), "", &[("weather", odd)]);
    // The other order, other names, more fields, no line breaks, no closing mark.
    for answer in [
        r#"<tool_call>{"arguments": {"a": 1}, "name": "noop"}</tool_call>"#,
        r#"<tool_call> {"name": "noop", "parameters": {"a": 1}} </tool_call>"#,
        r#"<tool_call>{"id": 3, "type": "function", "function": {"name": "noop", "arguments": {"a": 1}}}</tool_call>"#,
        r#"<tool_call>[{"name": "noop", "arguments": {"a": 1}, "x": [1, {"y": "}"}]}]</tool_call>"#,
        r#"<tool_call>{"name": "noop", "arguments": "{\"a\": 1}"}</tool_call>"#,
        r#"<tool_call>{{"name": "noop", "arguments": {"a": 1}}}</tool_call>"#,
        r#"<tool_call>{"name": "noop", "arguments": {"a": 1}}}</tool_call>"#,
        r#"<tool_call>{"name": "noop", "arguments": {"a": 1}}"#,
        r#"<tool_call>{"name": "noop", "arguments": {"a": 1}"#,
    ] {
        check("hermes", answer, "", &[("noop", r#"{"a": 1}"#)]);
    }
    for none in
        [r#"{"name": "noop"}"#, r#"{"name": "noop", "arguments": null}"#, r#"{"name":"noop","arguments": }"#]
    {
        check("hermes", &format!("<tool_call>{none}</tool_call>"), "", &[("noop", "{}")]);
    }
    let lists = r#"<tool_call>[{"name": "noop", "arguments": {}}, {"name": "weather", "arguments": [1]}]</tool_call>"#;
    check("hermes", lists, "", &[("noop", "{}"), ("weather", "[1]")]);
}

#[test]
fn arguments_that_are_no_json_are_given_through() {
    let call = |arguments: &str| {
        format!("<tool_call>{{\"name\": \"noop\", \"arguments\": {arguments}}}</tool_call>")
    };
    for arguments in [r#"{"a": 1,}"#, "{a: 'b'}", r#"{"a": [1 2]}"#, "[", "{\"a\": TRUE}"] {
        let closed = arguments.chars().filter(|c| "{[".contains(*c)).count()
            == arguments.chars().filter(|c| "}]".contains(*c)).count();
        // Brackets that are never closed take all up to the mark.
        let wanted = if closed { arguments.to_owned() } else { format!("{arguments}}}") };
        check("hermes", &call(arguments), "", &[("noop", &wanted)]);
    }
    check("hermes", &call("17"), "", &[("noop", "17")]);
    check("hermes", &call("\"soon\""), "", &[("noop", "soon")]);
    // Cut by the limit of tokens.
    check(
        "hermes",
        "<tool_call>{\"name\": \"noop\", \"arguments\": {\"a\": \"b",
        "",
        &[("noop", "{\"a\": \"b")],
    );
}

#[test]
fn what_is_no_call_stays_text() {
    for answer in [
        "<tool_call>soon</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>{\"a\": 1}</tool_call> and so on",
        "<tool_call>{\"name\": 3, \"arguments\": {}}</tool_call>",
        "Write <tool_call> before it.",
        "Write <tool_call>",
        "<tool_call>{\"name\": \"no",
        "<tool_call>{\"name\": \"noop\", ",
    ] {
        check("hermes", answer, answer, &[]);
    }
    check(
        "hermes",
        "It is <tool_call>{}</tool_call>, so:\n<tool_call>{\"name\": \"noop\"}</tool_call>",
        "It is <tool_call>{}</tool_call>, so:",
        &[("noop", "{}")],
    );
}

#[test]
fn calls_of_llama() {
    let call = r#"{"name": "weather", "parameters": {"city": "Paris", "days": 3}}"#;
    check("llama3_json", call, "", &[("weather", PARIS)]);
    check("llama3_json", &format!("\n {call}\n"), "", &[("weather", PARIS)]);
    check("llama3_json", &format!("<|python_tag|>{call}"), "", &[("weather", PARIS)]);
    let typed = r#"{"type": "function", "name": "weather", "parameters": {"city": "Paris", "days": 3}}"#;
    check("llama3_json", typed, "", &[("weather", PARIS)]);
    check("llama3_json", &format!("{call}; {call}"), "", &[("weather", PARIS), ("weather", PARIS)]);
    check("llama3_json", &format!("Sure. <|python_tag|>{call}"), "Sure.", &[("weather", PARIS)]);
    // An answer in JSON, and a call of something that there is not: without a mark these are text.
    for answer in [
        r#"{"name": "Alice", "age": 3}"#,
        r#"{"name": "weather"}"#,
        r#"{"name": "other", "parameters": {"a": 1}}"#,
        r#"{"parameters": {}, "name": "other"}"#,
        "{}",
        "{\"a\"",
        &format!("It is {call}"),
    ] {
        check("llama3_json", answer, answer, &[]);
    }
    let other = r#"<|python_tag|>{"name": "other", "parameters": {"a": 1}}"#;
    check("llama3_json", other, "", &[("other", r#"{"a": 1}"#)]);
    check("llama3_json", "<|python_tag|>print(3)", "<|python_tag|>print(3)", &[]);
}

#[test]
fn calls_of_mistral_in_both_forms() {
    for family in ["mistral", "mistral_args"] {
        let list = r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "noop", "arguments": {}, "id": "abcdefghi"}]"#;
        check(family, list, "", &[("weather", PARIS), ("noop", "{}")]);
        let named =
            format!("I look.[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]noop[CALL_ID]abcdefghi[ARGS]{{}}");
        check(family, &named, "I look.", &[("weather", PARIS), ("noop", "{}")]);
        check(family, "[TOOL_CALLS] soon", "[TOOL_CALLS] soon", &[]);
    }
    let mut reader = Reader::new(tools("mistral", 1), one);
    let parts = reader.push(r#"[TOOL_CALLS] [{"name": "noop", "arguments": {}}]"#);
    assert!(matches!(&parts[0], Part::Call { id, .. } if id.len() == 9), "{parts:?}");
    assert!(reader.is_over());
}

#[test]
fn calls_whose_arguments_stand_one_by_one() {
    let call = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
                </function>\n</tool_call>";
    check("qwen3_coder", call, "", &[("weather", PARIS)]);
    check(
        "qwen3_coder",
        &format!("I look.\n{call}\n{call}"),
        "I look.",
        &[("weather", PARIS), ("weather", PARIS)],
    );
    let empty = "<tool_call>\n<function=noop>\n</function>\n</tool_call>";
    check("qwen3_coder", empty, "", &[("noop", "{}")]);
    // Types come from the schema; a text keeps its lines, and looks like what it looks like.
    let typed = "<tool_call><function=weather><parameter=city>\n12\n\n13\n</parameter><parameter=metric>True</parameter>\
                 <parameter=near>\n[1, \"a\"]\n</parameter><parameter=more>{\"a\": null}</parameter><parameter=id>null\
                 </parameter><parameter=days>many</parameter><parameter=other>5</parameter></function></tool_call>";
    let wanted = r#"{"city": "12\n\n13", "metric": true, "near": [1,"a"], "more": {"a":null}, "id": null, "days": "many", "other": "5"}"#;
    check("qwen3_coder", typed, "", &[("weather", wanted)]);
    // The JSON of its older relatives is read, too.
    check(
        "qwen3_coder",
        "<tool_call>{\"name\": \"noop\", \"arguments\": {}}</tool_call>",
        "",
        &[("noop", "{}")],
    );
    let glm = "Hm.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n\
               <arg_value>3</arg_value>\n</tool_call>";
    check("glm4", glm, "Hm.", &[("weather", PARIS)]);
    check("glm4", "<tool_call>noop\n</tool_call>", "", &[("noop", "{}")]);
    check("glm4", "<tool_call>noop</tool_call>", "", &[("noop", "{}")]);
    let close = "<tool_call>weather<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>";
    check("glm4", close, "", &[("weather", r#"{"days": 3}"#)]);
}

#[test]
fn calls_with_a_name_before_their_json() {
    let v3 = format!(
        "So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{PARIS}\n```<｜tool▁call▁end｜>\n\
         <｜tool▁call▁begin｜>function<｜tool▁sep｜>noop\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    check("deepseek_v3", &v3, "So.", &[("weather", PARIS), ("noop", "{}")]);
    let v31 = format!(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>noop\
         <｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    check("deepseek_v31", &v31, "", &[("weather", PARIS), ("noop", "{}")]);
    let broken = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>noop<｜tool▁sep｜>{\"a\": [<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("deepseek_v31", broken, "", &[("noop", "{\"a\": [")]);
    let kimi = format!(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{PARIS}\
         <|tool_call_end|><|tool_call_begin|>functions.noop:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>\
         <|tool_calls_section_end|>"
    );
    check("kimi_k2", &kimi, "", &[("weather", PARIS), ("noop", "{}")]);
    let mut reader = Reader::new(tools("kimi_k2", usize::MAX), one);
    let parts = reader.push(&kimi);
    assert!(matches!(&parts[0], Part::Call { id, .. } if id == "functions.weather:0"), "{parts:?}");
}

#[test]
fn calls_in_lists() {
    let list = r#"[{"name": "weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "noop", "arguments": {}}]"#;
    let calls = [("weather", PARIS), ("noop", "{}")];
    check("granite", &format!("<|tool_call|>{list}"), "", &calls);
    check("phi4_mini", &format!("<|tool_call|>{list}<|/tool_call|>"), "", &calls);
    check("functools", &format!(" functools{list}"), "", &calls);
    check("functools", "functools are useful", "functools are useful", &[]);
    let cohere = r#"<|START_ACTION|>[
    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Paris", "days": 3}}
]<|END_ACTION|>"#;
    check("command_r7b", cohere, "", &[("weather", PARIS)]);
}

#[test]
fn families_are_known_by_their_templates() {
    for (source, family) in [
        (r#"{{- '<tool_call>\n{\"name\": ' }}"#, Some("hermes")),
        ("<tool_call> '\\n<function=' + name + '>\\n' <parameter=", Some("qwen3_coder")),
        ("<tool_call> <arg_key> <arg_value>", Some("glm4")),
        (r#"{{- '"parameters": ' }} ... "<|start_header_id|>ipython<|end_header_id|>""#, Some("llama3_json")),
        (r#"{{- "\"parameters\": " }} ipython"#, Some("llama3_json")),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [", Some("mistral")),
        ("[TOOL_CALLS] + name + [ARGS]", Some("mistral_args")),
        ("<|START_ACTION|>[ <|END_ACTION|>", Some("command_r7b")),
        ("<|tool_call|>", Some("granite")),
        ("{{ tools }}", None),
    ] {
        assert_eq!(Family::of_template(source).map(|family| family.name), family, "{source}");
    }
    let names: BTreeSet<&str> = FAMILIES.iter().map(|family| family.name).collect();
    assert_eq!(names.len(), FAMILIES.len());
}

proptest! {
    /// Pieces of calls in any order, cut anywhere: nothing panics, and the cuts change nothing.
    #[test]
    fn cuts_change_nothing_in_any_text(
        family in 0..FAMILIES.len(),
        parts in proptest::collection::vec(0..24usize, 0..12),
        cuts in proptest::collection::vec(0..200usize, 0..6),
        most in 1..3usize,
    ) {
        let family = &FAMILIES[family];
        let own: Vec<&str> = family.texts().filter(|text| !text.is_empty()).collect();
        let common = [
            "{\"name\": \"noop\", \"arguments\": ", "{\"name\": \"noop\", \"parameters\": {}}", "{\"a\": \"}\"}", "}", "[", "]", "\n",
            " ", "text", ", ", "noop", "\"", "é",
        ];
        let pick = |at: &usize| match own.get(*at) {
            Some(text) => *text,
            None => common[(at - own.len().min(*at)) % common.len()],
        };
        let answer: String = parts.iter().map(pick).collect();
        let tools = tools(family.name, most);
        let whole = read(&tools, [answer.as_str()]);
        let mut at: Vec<usize> = cuts.into_iter().filter(|at| answer.is_char_boundary(*at)).collect();
        at.extend([0, answer.len()]);
        at.sort_unstable();
        let pieces = at.windows(2).filter(|w| w[1] <= answer.len()).map(|w| &answer[w[0]..w[1]]);
        prop_assert_eq!(read(&tools, pieces), whole, "{}", answer);
    }
}
