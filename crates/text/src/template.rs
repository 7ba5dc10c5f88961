//! The model's own Jinja chat template, rendered as the Hugging Face library renders it.
//!
//! Blocks are trimmed, `tojson` is Python's, `raise_exception` and string methods work, loops have `break`. A template
//! is foreign code: a budget of steps and bytes bounds each rendering, recursion is limited, nothing can be included.
//! Not bounded by it: text that a template makes with `~`, `join` or `format` of lists that hold each other many times.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use serde_json::Map;
use sha2::{Digest, Sha256};

use crate::python_json::{Style, dumps};
use crate::strftime::strftime;
use crate::tokenizer::{hex, one_line};
use crate::{Message, TextError};

/// Steps of one rendering; a step is an instruction or 64 bytes of text. Real templates use a few hundred per message.
const FUEL: u64 = 2_000_000;
/// Longer sources are refused: the longest template in use has about 30 kB.
const MAX_SOURCE: usize = 1 << 20;
/// Longest text of one printed list or object.
const MAX_PRINTED: usize = 16 << 20;
/// Marks errors that `raise_exception` made.
const RAISED: &str = "\u{1}raised:";

/// What a rendering gets besides the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    /// End with the header of an assistant turn.
    pub add_generation_prompt: bool,
    /// Tool descriptions (JSON schema), as the template wants them.
    pub tools: Option<serde_json::Value>,
    /// More variables, such as `enable_thinking`.
    pub kwargs: Map<String, serde_json::Value>,
    /// What `strftime_now` answers, in seconds since 1970 (UTC). Without it the function is not defined, and templates
    /// use the date they have for that case; so training data does not depend on the day it was made.
    pub now: Option<i64>,
}

impl RenderOptions {
    /// The same options, asking for an answer.
    pub fn with_generation_prompt(&self, add_generation_prompt: bool) -> RenderOptions {
        RenderOptions { add_generation_prompt, ..self.clone() }
    }
}

/// A parsed chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    bos_token: String,
    eos_token: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("hash", &self.hash()).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Parses a template. `bos_token` and `eos_token` render as nothing until [`ChatTemplate::with_tokens`].
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`] with the line; never panics.
    pub fn parse(source: &str) -> Result<ChatTemplate, TextError> {
        if source.len() > MAX_SOURCE {
            return Err(TextError::TemplateSyntax {
                line: 1,
                detail: format!("the template has {} bytes, at most {MAX_SOURCE} are read", source.len()),
            });
        }
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(print);
        environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
            let message = bounded_text(&message)?;
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned("chat", without_generation_tags(source))
            .map_err(|e| TextError::TemplateSyntax { line: e.line().unwrap_or(1), detail: words(&e) })?;
        Ok(ChatTemplate {
            environment: Arc::new(environment),
            source: source.into(),
            bos_token: String::new(),
            eos_token: String::new(),
        })
    }

    /// Sets what `bos_token` and `eos_token` stand for.
    pub fn with_tokens(mut self, bos_token: impl Into<String>, eos_token: impl Into<String>) -> ChatTemplate {
        self.bos_token = bos_token.into();
        self.eos_token = eos_token.into();
        self
    }

    /// Sets `bos_token` and `eos_token` from a tokenizer.
    pub fn with_tokens_of(self, tokenizer: &crate::Tokenizer) -> ChatTemplate {
        let text = |id: Option<u32>| {
            id.map(|id| String::from_utf8_lossy(tokenizer.token_to_piece(id)).into_owned())
                .unwrap_or_default()
        };
        let bos = text(tokenizer.bos_id());
        let eos = text(tokenizer.eos_ids().first().copied());
        self.with_tokens(bos, eos)
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] if the template refuses it, [`TextError::TemplateRender`] with the line if it
    /// fails or spends its budget; never panics.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TextError> {
        let mut context: Vec<(String, Value)> = Vec::with_capacity(options.kwargs.len() + 7);
        // Later entries win: callers cannot replace the conversation by an extra variable.
        for (name, value) in &options.kwargs {
            context.push((name.clone(), value_of(value)));
        }
        if let Some(tools) = &options.tools {
            context.push(("tools".into(), value_of(tools)));
        } else {
            context.push(("tools".into(), Value::from(())));
        }
        if let Some(now) = options.now {
            let function = move |format: &str| {
                strftime(format, now).map_err(|detail| Error::new(ErrorKind::InvalidOperation, detail))
            };
            context.push(("strftime_now".into(), Value::from_function(function)));
        }
        context.push(("bos_token".into(), Value::from(self.bos_token.as_str())));
        context.push(("eos_token".into(), Value::from(self.eos_token.as_str())));
        context.push(("add_generation_prompt".into(), Value::from(options.add_generation_prompt)));
        context.push(("messages".into(), messages.iter().map(|m| value_of(&m.to_json())).collect()));
        let failed = |e: Error| {
            let mut source: Option<&dyn std::error::Error> = Some(&e);
            while let Some(error) = source {
                if let Some(raised) = error
                    .downcast_ref::<Error>()
                    .and_then(|e| e.detail())
                    .and_then(|detail| detail.strip_prefix(RAISED))
                {
                    return TextError::TemplateRaised { message: one_line(raised) };
                }
                source = error.source();
            }
            TextError::TemplateRender { line: e.line().unwrap_or(0), detail: words(&e) }
        };
        let template = self.environment.get_template("chat").map_err(failed)?;
        template.render(Value::from_pairs(context)).map_err(failed)
    }

    /// The source text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// SHA-256 (hex) of the source.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.source.as_bytes()))
    }
}

/// `{{ value }}`. Lists and objects are written through a limit: a few lists that hold each other several times spell
/// a text of any length, and the engine's budget only counts it afterwards.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            out.write_str(&bounded_text(value)?).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// A value as text, or an error beyond `MAX_PRINTED` bytes.
fn bounded_text(value: &Value) -> Result<String, Error> {
    struct Bounded(String);
    impl std::fmt::Write for Bounded {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            if self.0.len() + text.len() > MAX_PRINTED {
                return Err(std::fmt::Error);
            }
            self.0.push_str(text);
            Ok(())
        }
    }
    let mut out = Bounded(String::new());
    match std::fmt::Write::write_fmt(&mut out, format_args!("{value}")) {
        Ok(()) => Ok(out.0),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, "a printed value is too long")),
    }
}

fn syntax() -> SyntaxConfig {
    let mut builder = SyntaxConfig::builder();
    builder.trim_blocks(true).lstrip_blocks(true);
    builder.build().expect("the default delimiters are valid")
}

fn words(error: &Error) -> String {
    match error.detail() {
        Some(detail) => one_line(&format!("{}: {detail}", error.kind())),
        None => one_line(&error.kind().to_string()),
    }
}

/// JSON to template values, keys in their order.
fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => Value::from(value),
            (None, Some(value), _) => Value::from(value),
            (None, None, value) => Value::from(value.unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value_of).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), value_of(v))))
        }
    }
}

/// `tojson(indent=None, ensure_ascii=False, separators=None, sort_keys=False)`.
fn tojson(state: &State, value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|v| !v.is_none()) {
        // Indentation multiplies with depth; nobody means more than a few.
        Some(indent) => Some(usize::try_from(indent)?.min(16)),
        None => None,
    };
    let separators = match kwargs.get::<Option<Value>>("separators")?.filter(|v| !v.is_none()) {
        Some(pair) => {
            let parts: Vec<Value> = pair.try_iter()?.collect();
            let (item, key): (String, String) = from_args(&parts)?;
            Some((item, key))
        }
        None => None,
    };
    let style = Style {
        indent,
        separators,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    Ok(Value::from(dumps(value, &style, &|fuel| state.consume_fuel(fuel))?))
}

/// `{% generation %}` marks answers for a training library; for the text it is a block that is always on.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let (tag_start, tag_end) = (open + 2, open + length);
        let inner = rest.get(tag_start..tag_end).unwrap_or_default();
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..open]);
        match replacement {
            Some(statement) => {
                let mark = |c: Option<char>| {
                    c.filter(|c| *c == '-' || *c == '+').map(String::from).unwrap_or_default()
                };
                let (before, after) = (mark(inner.chars().next()), mark(inner.chars().next_back()));
                // The tag keeps its lines, so that error messages name the right one.
                let lines = "\n".repeat(inner.matches('\n').count());
                out.push_str(&format!("{{%{before} {statement}{lines} {after}%}}"));
            }
            None => out.push_str(&rest[open..tag_end + 2]),
        }
        rest = &rest[tag_end + 2..];
    }
    out.push_str(rest);
    out
}
