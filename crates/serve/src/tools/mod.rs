//! Tool calls: how families of models write them, which family a chat template belongs to, and the calls in an answer.
//!
//! A family is a row of [`FAMILIES`]. It is found by the marks that the template writes; where that fails, the option
//! `--tool-format` names it. Answers are read by [`Reader`], whole and streamed ones alike, and held to the tools' schemas
//! by [`held`].

mod held;
mod json;
mod reader;

use std::collections::BTreeSet;

use draftsmith_text::{ChatTemplate, Message, RenderOptions, Tokenizer};
use serde_json::{Value, json};

pub(crate) use held::hold;
pub(crate) use reader::{Part, Reader};

/// How the calls of a family are written.
#[derive(Debug)]
pub(crate) enum Style {
    /// JSON objects with these keys, alone or in a list.
    Json { list: bool, name: &'static str, arguments: &'static str },
    /// The name, `separator`, and the arguments as JSON, between `open` and `close`.
    Named { open: &'static str, separator: &'static str, close: &'static str },
    /// The name, and each argument by itself.
    Pairs(Pairs),
}

/// Texts around a name and its arguments that stand one by one.
#[derive(Debug)]
pub(crate) struct Pairs {
    pub(crate) name_open: &'static str,
    pub(crate) name_close: &'static str,
    pub(crate) key_open: &'static str,
    pub(crate) key_close: &'static str,
    pub(crate) value_open: &'static str,
    pub(crate) value_close: &'static str,
    /// Behind the last argument; empty where the block's end stands there.
    pub(crate) close: &'static str,
    /// A line break stands on either side of a value.
    pub(crate) lines: bool,
}

/// How models of a family write calls.
#[derive(Debug)]
pub(crate) struct Family {
    /// For `--tool-format`.
    pub(crate) name: &'static str,
    /// Texts that its templates have, all of them.
    marks: &'static [&'static str],
    /// Opens calls.
    pub(crate) begin: &'static str,
    /// Closes calls; empty where the end of the answer does.
    pub(crate) end: &'static str,
    /// The first is the one that answers are held to.
    pub(crate) styles: &'static [Style],
    /// An answer may begin with a call without `begin`.
    pub(crate) bare: bool,
    /// An answer may have several calls.
    pub(crate) several: bool,
    /// What ids look like.
    pub(crate) ids: Ids,
}

/// What a family wants of the ids of calls, which its template gets again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ids {
    /// Anything: `call_` and 24 letters and digits.
    Any,
    /// Nine letters and digits.
    Nine,
    /// `functions.NAME:0`, counted.
    Counted,
}

const OBJECT: Style = Style::Json { list: false, name: "name", arguments: "arguments" };
const LIST: Style = Style::Json { list: true, name: "name", arguments: "arguments" };
const MISTRAL_NAMED: Style = Style::Named { open: "", separator: "[ARGS]", close: "" };

const fn family(
    name: &'static str,
    marks: &'static [&'static str],
    [begin, end]: [&'static str; 2],
    styles: &'static [Style],
) -> Family {
    Family { name, marks, begin, end, styles, bare: false, several: true, ids: Ids::Any }
}

/// The families, those with more particular marks first.
pub(crate) static FAMILIES: [Family; 13] = [
    family(
        "qwen3_coder",
        &["<tool_call>", "<function=", "<parameter="],
        ["<tool_call>", "</tool_call>"],
        &[
            Style::Pairs(Pairs {
                name_open: "<function=",
                name_close: ">",
                key_open: "<parameter=",
                key_close: ">",
                value_open: "",
                value_close: "</parameter>",
                close: "</function>",
                lines: true,
            }),
            OBJECT,
        ],
    ),
    family(
        "glm4",
        &["<tool_call>", "<arg_key>", "<arg_value>"],
        ["<tool_call>", "</tool_call>"],
        &[Style::Pairs(Pairs {
            name_open: "",
            name_close: "\n",
            key_open: "<arg_key>",
            key_close: "</arg_key>",
            value_open: "<arg_value>",
            value_close: "</arg_value>",
            close: "",
            lines: false,
        })],
    ),
    family(
        "deepseek_v3",
        &["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"],
        ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
        &[Style::Named {
            open: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            separator: "\n```json\n",
            close: "\n```<｜tool▁call▁end｜>",
        }],
    ),
    family(
        "deepseek_v31",
        &["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"],
        ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
        &[Style::Named {
            open: "<｜tool▁call▁begin｜>",
            separator: "<｜tool▁sep｜>",
            close: "<｜tool▁call▁end｜>",
        }],
    ),
    Family {
        ids: Ids::Counted,
        ..family(
            "kimi_k2",
            &["<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"],
            ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"],
            &[Style::Named {
                open: "<|tool_call_begin|>",
                separator: "<|tool_call_argument_begin|>",
                close: "<|tool_call_end|>",
            }],
        )
    },
    Family {
        ids: Ids::Nine,
        ..family("mistral_args", &["[TOOL_CALLS]", "[ARGS]"], ["[TOOL_CALLS]", ""], &[MISTRAL_NAMED, LIST])
    },
    Family {
        ids: Ids::Nine,
        ..family("mistral", &["[TOOL_CALLS]"], ["[TOOL_CALLS]", ""], &[LIST, MISTRAL_NAMED])
    },
    family(
        "command_r7b",
        &["<|START_ACTION|>", "<|END_ACTION|>"],
        ["<|START_ACTION|>", "<|END_ACTION|>"],
        &[Style::Json { list: true, name: "tool_name", arguments: "parameters" }],
    ),
    family("phi4_mini", &["<|tool_call|>", "<|/tool_call|>"], ["<|tool_call|>", "<|/tool_call|>"], &[LIST]),
    family("granite", &["<|tool_call|>"], ["<|tool_call|>", ""], &[LIST]),
    family("functools", &["functools["], ["functools", ""], &[LIST]),
    family("hermes", &["<tool_call>"], ["<tool_call>", "</tool_call>"], &[OBJECT]),
    Family {
        bare: true,
        several: false,
        ..family(
            "llama3_json",
            &["\"parameters\": ", "ipython"],
            ["<|python_tag|>", ""],
            &[Style::Json { list: false, name: "name", arguments: "parameters" }],
        )
    },
];

impl Family {
    /// The family of this name.
    pub(crate) fn named(name: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    /// The family whose marks a template has.
    pub(crate) fn of_template(source: &str) -> Option<&'static Family> {
        // Strings of a template may have their quotes escaped.
        let plain = source.replace("\\\"", "\"");
        FAMILIES.iter().find(|family| family.marks.iter().all(|mark| plain.contains(mark)))
    }

    /// Texts that its calls are made of, which may be control tokens.
    fn texts(&self) -> impl Iterator<Item = &'static str> {
        let of_style = |style: &'static Style| match style {
            Style::Json { .. } => Vec::new(),
            // Several control tokens may stand side by side in one of these.
            Style::Named { open, separator, close } => vec![*open, *separator, *close, "[CALL_ID]"],
            Style::Pairs(p) => {
                vec![p.name_open, p.key_open, p.key_close, p.value_open, p.value_close, p.close]
            }
        };
        [self.begin, self.end].into_iter().chain(self.styles.iter().flat_map(of_style))
    }

    /// The control tokens that must be seen to find calls, ascending.
    pub(crate) fn control_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut ids = BTreeSet::new();
        for text in self.texts().filter(|text| !text.is_empty()) {
            let within = |id: &&u32| {
                let piece = tokenizer.token_to_piece(**id);
                !piece.is_empty() && text.as_bytes().windows(piece.len()).any(|part| part == piece)
            };
            ids.extend(tokenizer.special_ids().iter().filter(within));
        }
        ids.into_iter().filter(|id| !tokenizer.eos_ids().contains(id)).collect()
    }
}

/// What the model in service can do with tools.
#[derive(Clone, Debug)]
pub(crate) struct Ability {
    pub(crate) family: &'static Family,
    /// Control tokens that are part of calls.
    pub(crate) control_ids: std::sync::Arc<[u32]>,
}

/// Why a model takes no tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unable {
    /// No template.
    NoTemplate,
    /// The template leaves tools out.
    NotShown,
    /// Calls are written in no known way.
    UnknownFamily,
}

impl Ability {
    /// What a template can do; `format`: the family, where it is named.
    pub(crate) fn of(
        template: Option<&ChatTemplate>,
        tokenizer: &Tokenizer,
        format: Option<&'static Family>,
    ) -> Result<Ability, Unable> {
        let template = template.ok_or(Unable::NoTemplate)?;
        if !shows_tools(template) {
            return Err(Unable::NotShown);
        }
        let found = format.or_else(|| Family::of_template(template.tool_source()));
        let family = found.ok_or(Unable::UnknownFamily)?;
        Ok(Ability { family, control_ids: family.control_ids(tokenizer).into() })
    }
}

/// True if a template tells the model of the tools.
fn shows_tools(template: &ChatTemplate) -> bool {
    let name = "a_tool_to_look_for";
    let tool = json!({"type": "function", "function": {
        "name": name, "description": "None.", "parameters": {"type": "object", "properties": {}},
    }});
    let options = RenderOptions { tools: Some(json!([tool])), ..RenderOptions::default() };
    let options = options.with_generation_prompt(true);
    let conversations =
        [vec![Message::new("user", "a")], vec![Message::new("system", "b"), Message::new("user", "a")]];
    conversations.iter().any(|messages| template.render(messages, &options).is_ok_and(|t| t.contains(name)))
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// JSON schema of its arguments.
    pub(crate) parameters: Value,
    /// Arguments follow the schema exactly.
    pub(crate) strict: bool,
    /// Where its parameters stand in the request.
    pub(crate) at: String,
}

impl Tool {
    /// The schema of an argument, references followed; `null` if there is none.
    fn argument(&self, name: &str) -> &Value {
        let mut schema = &self.parameters["properties"][name];
        // References in a circle end here, too.
        for _ in 0..16 {
            let to = schema.get("$ref").and_then(Value::as_str).and_then(|to| to.strip_prefix('#'));
            match to.and_then(|to| self.parameters.pointer(to)) {
                Some(there) => schema = there,
                None => break,
            }
        }
        schema
    }

    /// The types that a schema allows for an argument; empty if it does not say.
    fn types(&self, argument: &str) -> Vec<&str> {
        fn types(schema: &Value) -> Vec<&str> {
            let named = match &schema["type"] {
                Value::String(one) => vec![one.as_str()],
                Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
                _ => Vec::new(),
            };
            let parts =
                ["anyOf", "oneOf"].into_iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
            named.into_iter().chain(parts.flat_map(types)).collect()
        }
        types(self.argument(argument))
    }
}

/// Which calls an answer must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// As the model likes.
    Auto,
    /// One at least.
    Required,
}

/// The tools of a request.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) family: &'static Family,
    pub(crate) control_ids: std::sync::Arc<[u32]>,
    /// Those that may be called.
    pub(crate) list: Vec<Tool>,
    pub(crate) need: Need,
    /// Calls of one answer at most.
    pub(crate) most: usize,
}

impl Tools {
    fn tool(&self, name: &str) -> Option<&Tool> {
        self.list.iter().find(|tool| tool.name == name)
    }
}

#[cfg(test)]
mod tests;
