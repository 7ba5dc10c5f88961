//! The tools of a request, as the two routes that take them write them.

use std::sync::Arc;

use draftsmith_text::Tokenizer;
use serde_json::{Map, Value, json};

use super::ask::Form;
use super::error::ApiError;
use super::fields::Fields;
use crate::Service;
use crate::grammar::{GrammarError, JsonGrammar};
use crate::tools::{Ability, FAMILIES, Need, Tool, Tools, Unable, hold};

/// Tools of one request, as many as OpenAI takes.
const MOST_TOOLS: usize = 128;
const MOST_NAME: usize = 64;

/// The tools that a request wants.
#[derive(Default)]
pub(super) struct Wanted {
    /// As the template gets them; `None`: the model is told of none.
    pub(super) shown: Option<Value>,
    /// As answers are read; `None`: answers are text.
    pub(super) tools: Option<Arc<Tools>>,
}

/// Who may be called, and whether somebody must be.
enum Choice {
    None,
    Any(Need),
    /// These alone; `true`: exactly one call.
    Of(Need, Vec<String>, bool),
}

impl Wanted {
    pub(super) fn read(fields: &Fields<'_>, form: Form, service: &Service) -> Result<Wanted, ApiError> {
        let list = fields.list("tools")?.unwrap_or_default();
        if list.len() > MOST_TOOLS {
            let message = format!("`tools` has {} tools, at most {MOST_TOOLS}", list.len());
            return Err(ApiError::invalid("tools", message));
        }
        let mut read = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            let (tool, shown) = tool(value, i, form)?;
            if read.iter().any(|(known, _): &(Tool, Value)| known.name == tool.name) {
                let at = format!("tools[{i}]");
                let message = format!("`{at}` is the second tool with the name `{}`", tool.name);
                return Err(ApiError::invalid(at, message));
            }
            read.push((tool, shown));
        }
        let choice = choice(fields, form)?;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let (need, one) = match &choice {
            Choice::None => return Ok(Wanted::default()),
            Choice::Any(need) => (*need, false),
            Choice::Of(need, names, one) => {
                let unknown = names.iter().find(|name| read.iter().all(|(tool, _)| tool.name != **name));
                if let Some(name) = unknown {
                    let message = format!("`tool_choice` names `{name}`, which is not among the `tools`");
                    return Err(ApiError::invalid("tool_choice", message));
                }
                (*need, *one)
            }
        };
        if read.is_empty() {
            return match need {
                Need::Auto => Ok(Wanted::default()),
                Need::Required => {
                    let message = "`tool_choice` wants a call, and there are no `tools`";
                    Err(ApiError::invalid("tool_choice", message))
                }
            };
        }
        let ability = service.tools.as_ref().map_err(|why| unable(*why, &service.name))?;
        // One that must be called stands among all that the model knows of; of others it need not know.
        let listed = |tool: &Tool| match &choice {
            Choice::Of(_, names, _) => names.contains(&tool.name),
            Choice::None | Choice::Any(_) => true,
        };
        let told = |tool: &Tool| one || listed(tool);
        let shown = read.iter().filter(|(tool, _)| told(tool)).map(|(_, shown)| shown.clone()).collect();
        let Ability { family, control_ids } = ability.clone();
        let most = if one || !parallel || !family.several { 1 } else { usize::MAX };
        let list = read.into_iter().map(|(tool, _)| tool).filter(listed).collect();
        let tools = Tools { family, control_ids, list, need, most };
        Ok(Wanted { shown: Some(shown), tools: Some(Arc::new(tools)) })
    }
}

fn unable(why: Unable, model: &str) -> ApiError {
    let message = match why {
        Unable::NoTemplate => format!("`{model}` has no chat template, so it cannot be told of tools"),
        Unable::NotShown => format!(
            "the chat template of `{model}` does not tell the model of tools, so it cannot call any; leave `tools` out, \
             or serve a model whose template shows them"
        ),
        Unable::UnknownFamily => format!(
            "the chat template of `{model}` writes calls in no form that is known here; name the form with `serve \
             --tool-format`: {}",
            FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
        ),
    };
    ApiError::unsupported_as("tools", message)
}

/// One tool, and what the template gets of it.
fn tool(value: &Value, i: usize, form: Form) -> Result<(Tool, Value), ApiError> {
    let at = format!("tools[{i}].");
    let wrong = |field: &str, what: &str| {
        let name = format!("{at}{field}");
        ApiError::invalid(&name, format!("`{name}` {what}"))
    };
    let fields = Fields::inside(value, &at)?;
    match fields.string("type")? {
        Some("function") => {}
        Some(other) => {
            let name = format!("{at}type");
            let message = format!("`{name}` is `{other}`, and functions alone can be called here");
            return Err(ApiError::unsupported_as(&name, message));
        }
        None => return Err(wrong("type", "is missing, expected `function`")),
    }
    let nested = format!("{at}function.");
    let (function, at) = match form {
        Form::Responses => (fields, at.as_str()),
        Form::Chat | Form::Completion => {
            let function = fields.object("function", &nested)?;
            (function.ok_or_else(|| wrong("function", "is missing"))?, nested.as_str())
        }
    };
    let wrong = |field: &str, what: &str| {
        let name = format!("{at}{field}");
        ApiError::invalid(&name, format!("`{name}` {what}"))
    };
    let name = function.string("name")?.ok_or_else(|| wrong("name", "is missing"))?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    if name.is_empty() || name.len() > MOST_NAME || !name.chars().all(allowed) {
        let what = format!("is `{name}`, expected 1 to {MOST_NAME} letters, digits, `_` and `-`");
        return Err(wrong("name", &what));
    }
    function.string("description")?;
    let strict = function.bool("strict")?.unwrap_or(false);
    let mut parameters: Map<String, Value> = match function.object("parameters", "")? {
        Some(parameters) => parameters.entries().map(|(key, value)| (key.clone(), value.clone())).collect(),
        None => Map::from_iter([("properties".to_owned(), json!({}))]),
    };
    match parameters.get("type") {
        None => {
            parameters.insert("type".into(), "object".into());
        }
        Some(kind) if kind == "object" => {}
        Some(other) => {
            let what = format!("is {other}, and the arguments of a call are an `object`");
            return Err(wrong("parameters.type", &what));
        }
    }
    let shown = match form {
        Form::Chat | Form::Completion => value.clone(),
        Form::Responses => {
            let keys = ["name", "description", "parameters"];
            let known = keys.iter().filter_map(|key| Some(((*key).to_owned(), function.get(key)?.clone())));
            json!({"type": "function", "function": known.collect::<Map<_, _>>()})
        }
    };
    let tool = Tool {
        name: name.to_owned(),
        parameters: Value::Object(parameters),
        strict,
        at: format!("{at}parameters"),
    };
    Ok((tool, shown))
}

fn choice(fields: &Fields<'_>, form: Form) -> Result<Choice, ApiError> {
    let name = "tool_choice";
    let words = "expected `none`, `auto`, `required`, or an object that names a function";
    let Some(value) = fields.get(name) else { return Ok(Choice::Any(Need::Auto)) };
    let need = |word: &str| match word {
        "auto" => Some(Need::Auto),
        "required" => Some(Need::Required),
        _ => None,
    };
    // The function that an entry names, at either route.
    let named = |entry: &Value| {
        let inner = match form {
            Form::Responses => entry,
            Form::Chat | Form::Completion => &entry["function"],
        };
        let function = entry["type"] == "function";
        inner["name"].as_str().filter(|_| function).map(str::to_owned)
    };
    match value {
        Value::String(word) if word == "none" => Ok(Choice::None),
        Value::String(word) => need(word)
            .map(Choice::Any)
            .ok_or_else(|| ApiError::invalid(name, format!("`{name}` is `{word}`, {words}"))),
        Value::Object(object) => match object.get("type").and_then(Value::as_str) {
            Some("function") => {
                let function = named(value)
                    .ok_or_else(|| ApiError::invalid(name, format!("`{name}` names no function")))?;
                Ok(Choice::Of(Need::Required, vec![function], true))
            }
            Some("allowed_tools") => {
                let allowed = match form {
                    Form::Responses => value,
                    Form::Chat | Form::Completion => &value["allowed_tools"],
                };
                let wrong = |what: &str| ApiError::invalid(name, format!("`{name}.allowed_tools` {what}"));
                let mode = allowed["mode"].as_str().and_then(need);
                let mode = mode.ok_or_else(|| wrong("has no `mode` that is `auto` or `required`"))?;
                let tools = allowed["tools"].as_array().filter(|tools| !tools.is_empty());
                let tools = tools.ok_or_else(|| wrong("has no `tools`"))?;
                let names = tools.iter().map(named).collect::<Option<Vec<_>>>();
                Ok(Choice::Of(mode, names.ok_or_else(|| wrong("has a tool that is no function"))?, false))
            }
            Some(other) => {
                let message = format!("`{name}.type` is `{other}`, and functions alone can be called here");
                Err(ApiError::unsupported_as(name, message))
            }
            None => Err(ApiError::invalid(name, format!("`{name}.type` is missing"))),
        },
        _ => Err(ApiError::invalid(name, format!("`{name}` is neither a text nor an object, {words}"))),
    }
}

/// What holds the calls of an answer to their schemas, where something must. `answer`: the schema of an answer without
/// calls.
pub(super) fn grammar(
    tools: &Tools,
    answer: Option<&Value>,
    service: &Service,
) -> Result<Option<Arc<JsonGrammar>>, ApiError> {
    let tokenizer: &Arc<Tokenizer> = &service.tokenizer;
    let held = hold(tools, answer, tokenizer).map_err(|(at, error)| error.into_api_error(&at))?;
    let Some(held) = held else { return Ok(None) };
    let grammars = service.grammars.as_ref().map_err(|error| error.clone().into_api_error("tools"))?;
    // One by one, so that an error names the tool.
    for tool in tools.list.iter().filter(|tool| tools.need == Need::Required || tool.strict) {
        grammars.json_schema(&tool.parameters).map_err(|error| error.into_api_error(&tool.at))?;
    }
    let whole = |error: GrammarError| error.into_api_error("tools");
    let made = grammars.calls(&held.lark, held.trigger, tokenizer).map_err(whole)?;
    Ok(Some(Arc::new(made)))
}
