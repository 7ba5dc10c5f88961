//! The grammar of answers that must have calls, or whose calls must follow their schemas: in Lark's words, as the grammar
//! engine takes it, with the tools' schemas inside.

use draftsmith_text::Tokenizer;
use serde_json::{Map, Value, json};

use super::{Family, Ids, Need, Pairs, Style, Tool, Tools};
use crate::grammar::{GrammarError, Trigger, moved_to, with_call_options, with_options};

/// What an answer is held to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Held {
    /// The grammar.
    pub(crate) lark: String,
    /// What it begins at; `None`: at the beginning of the answer.
    pub(crate) trigger: Option<Trigger>,
}

/// Keywords of a text that cannot be held to where values stand without quotes.
const OF_TEXTS: [&str; 5] = ["pattern", "minLength", "maxLength", "format", "const"];

/// The grammar that a request needs; `None` if its answer is free. `answer`: the schema that an answer without calls
/// must follow.
///
/// # Errors
/// [`GrammarError::Refused`], with the place below the tool's parameters, for what a format of calls cannot express.
pub(crate) fn hold(
    tools: &Tools,
    answer: Option<&Value>,
    tokenizer: &Tokenizer,
) -> Result<Option<Held>, (String, GrammarError)> {
    let strict = tools.list.iter().any(|tool| tool.strict);
    if tools.need == Need::Auto && !strict && answer.is_none() {
        return Ok(None);
    }
    let writer = Writer { tools, tokenizer, schemas: tools.list.iter().map(|t| schema(tools, t)).collect() };
    let block = writer.block()?;
    let family = tools.family;
    // A list holds all calls of an answer.
    let lists = matches!(family.styles[0], Style::Json { list: true, .. });
    let again = family.several && tools.most > 1 && !lists;
    let (start, trigger) = match (tools.need, answer) {
        (Need::Auto, None) => {
            let trigger = Trigger { begin: family.begin.into(), bare: family.bare, again: family.several };
            ("start: block".to_owned(), Some(trigger))
        }
        (need, answer) => {
            let calls = if again { "block (\"\\n\"? block)*" } else { "block" };
            match answer.filter(|_| need == Need::Auto) {
                Some(schema) => {
                    (format!("start: {calls} | answer\nanswer: %json {}", with_options(schema)), None)
                }
                None => (format!("start: {calls}"), None),
            }
        }
    };
    Ok(Some(Held { lark: format!("{start}\n{block}"), trigger }))
}

/// What the arguments of a tool must follow.
fn schema(tools: &Tools, tool: &Tool) -> Value {
    if tools.need == Need::Auto && !tool.strict {
        return json!({"type": "object"});
    }
    let mut schema = tool.parameters.clone();
    // Names that the tool does not know are valid, and of no use to it.
    if let Some(object) = schema.as_object_mut()
        && object.contains_key("properties")
        && !object.contains_key("patternProperties")
    {
        object.entry("additionalProperties").or_insert(false.into());
    }
    schema
}

struct Writer<'a> {
    tools: &'a Tools,
    tokenizer: &'a Tokenizer,
    /// In the order of the tools.
    schemas: Vec<Value>,
}

impl Writer<'_> {
    fn family(&self) -> &'static Family {
        self.tools.family
    }

    /// A text: its control tokens by their ids, the rest as it is.
    fn literal(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let control = self
                .tools
                .control_ids
                .iter()
                .map(|id| (*id, self.tokenizer.token_to_piece(*id)))
                .filter(|(_, piece)| !piece.is_empty() && rest.as_bytes().starts_with(piece))
                .max_by_key(|(_, piece)| piece.len());
            match control {
                Some((id, piece)) => {
                    if !plain.is_empty() {
                        parts.push(Value::String(std::mem::take(&mut plain)).to_string());
                    }
                    parts.push(format!("<[{id}]>"));
                    rest = rest.get(piece.len()..).unwrap_or_default();
                }
                None => {
                    plain.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        if !plain.is_empty() {
            parts.push(Value::String(plain).to_string());
        }
        parts.join(" ")
    }

    /// The rules of a block of calls.
    fn block(&self) -> Result<String, (String, GrammarError)> {
        let family = self.family();
        let (begin, end) = (self.literal(family.begin), self.literal(family.end));
        let one = self.tools.most == 1 || !family.several;
        match &family.styles[0] {
            Style::Json { list, name, arguments } => {
                let calls = self.calls(name, arguments, list.then_some(one));
                let space = r#"(" " | "\n")?"#;
                let (before, after) = match (family.bare, end.is_empty()) {
                    (true, _) => (String::new(), String::new()),
                    (false, true) => (format!("{begin} {space}"), String::new()),
                    (false, false) => (format!("{begin} {space}"), format!("{space} {end}")),
                };
                Ok(format!("block: {before} %json {} {after}", with_call_options(&calls)))
            }
            Style::Named { open, separator, close } => {
                let (open, separator, close) =
                    (self.literal(open), self.literal(separator), self.literal(close));
                let alternatives = self.tools.list.iter().zip(&self.schemas).map(|(tool, schema)| {
                    let name = match family.ids {
                        Ids::Counted => {
                            format!("{} /[0-9]/", Value::String(format!("functions.{}:", tool.name)))
                        }
                        Ids::Any | Ids::Nine => Value::String(tool.name.clone()).to_string(),
                    };
                    format!("{open} {name} {separator} %json {} {close}", with_call_options(schema))
                });
                let call = format!("call: {}", alternatives.collect::<Vec<_>>().join("\n    | "));
                let calls = if one || end.is_empty() { "call" } else { "call (\"\\n\"? call)*" };
                Ok(format!("block: {begin} {calls} {end}\n{call}"))
            }
            Style::Pairs(pairs) => self.pairs(pairs, &begin, &end),
        }
    }

    /// The schema of a call, or of a list of calls; `list`: with one call alone.
    fn calls(&self, name: &str, arguments: &str, list: Option<bool>) -> Value {
        let mut defs = Map::new();
        let mut any = Vec::new();
        for (i, (tool, schema)) in self.tools.list.iter().zip(&self.schemas).enumerate() {
            let place = format!("#/$defs/tool{i}");
            defs.insert(format!("tool{i}"), moved_to(schema, &place));
            any.push(json!({
                "type": "object",
                "properties": {name: {"const": tool.name}, arguments: {"$ref": place}},
                "required": [name, arguments],
                "additionalProperties": false,
            }));
        }
        let mut schema = match list {
            None => json!({"anyOf": any}),
            Some(true) => json!({"type": "array", "items": {"anyOf": any}, "minItems": 1, "maxItems": 1}),
            Some(false) => json!({"type": "array", "items": {"anyOf": any}, "minItems": 1}),
        };
        schema["$defs"] = Value::Object(defs);
        schema
    }

    /// Arguments that stand one by one, in the schema's order.
    fn pairs(&self, pairs: &Pairs, begin: &str, end: &str) -> Result<String, (String, GrammarError)> {
        let line = if pairs.lines { "\"\\n\"" } else { "\"\\n\"?" };
        let mut rules = Vec::new();
        let mut calls = Vec::new();
        for (i, (tool, schema)) in self.tools.list.iter().zip(&self.schemas).enumerate() {
            let required: Vec<&str> =
                schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let name = format!("{}{}{}", pairs.name_open, tool.name, pairs.name_close);
            let mut call = vec![self.literal(&name)];
            let properties = schema["properties"].as_object();
            for (n, key) in properties.into_iter().flat_map(Map::keys).enumerate() {
                let value = tool.argument(key);
                let rule = format!("p{i}x{n}");
                let before = self.literal(&format!("{}{key}{}", pairs.key_open, pairs.key_close));
                let open = self.literal(pairs.value_open);
                let gap = if open.is_empty() { String::new() } else { format!("\"\\n\"? {open}") };
                let break_ = if pairs.lines { line } else { "" };
                let close = format!("{}{}", if pairs.lines { "\n" } else { "" }, pairs.value_close);
                let at = |detail: String| {
                    let path = format!("properties.{key}");
                    (tool.at.clone(), GrammarError::Refused { path, detail })
                };
                let types = tool.types(key);
                let text = types.is_empty() || types.contains(&"string");
                let value = match value["enum"].as_array() {
                    Some(allowed) if text => {
                        let one = |value: &Value| {
                            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                            Value::String(text).to_string()
                        };
                        let allowed: Vec<String> = allowed.iter().map(one).collect();
                        format!("({}) {}", allowed.join(" | "), self.literal(&close))
                    }
                    None if text => {
                        if let Some(keyword) = OF_TEXTS.iter().find(|key| value.get(**key).is_some()) {
                            let format = self.family().name;
                            return Err(at(format!(
                                "`{keyword}` of a text cannot be held to in calls of `{format}`"
                            )));
                        }
                        let after = self.literal(&close);
                        // A text has no control tokens in it, and ends before one.
                        match after.contains("<[") {
                            true => format!("/(?s:.*)/ {after}"),
                            false => {
                                rules.push(format!("{rule}v[suffix={}]: /(?s:.*)/", Value::String(close)));
                                format!("{rule}v")
                            }
                        }
                    }
                    _ => {
                        let whole = json!({
                            "$ref": format!("#/$defs/tool/properties/{}", key.replace('~', "~0").replace('/', "~1")),
                            "$defs": {"tool": moved_to(schema, "#/$defs/tool")},
                        });
                        format!("%json {} {}", with_call_options(&whole), self.literal(&close))
                    }
                };
                rules.push(format!("{rule}: {before} {gap} {break_} {value} {line}"));
                call.push(if required.contains(&key.as_str()) { rule } else { format!("{rule}?") });
            }
            if pairs.lines {
                call.insert(1, line.to_owned());
            }
            call.push(self.literal(pairs.close));
            if !pairs.close.is_empty() {
                call.push(line.to_owned());
            }
            calls.push(call.join(" "));
        }
        let first = if pairs.lines { line } else { "" };
        rules.insert(0, format!("block: {begin} {first} call {end}\ncall: {}", calls.join("\n    | ")));
        Ok(rules.join("\n"))
    }
}
