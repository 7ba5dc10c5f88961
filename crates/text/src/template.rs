//! The model's own Jinja chat template, rendered as the Hugging Face library renders it.
//!
//! The engine is [`crate::jinja`]; here are the variables that a template gets: the conversation, tools, documents, the
//! tokenizer's special tokens, and the caller's own.

use std::sync::Arc;

use serde_json::Map;
use sha2::{Digest, Sha256};

use crate::jinja::{Error, Interp, Kind, Template, Value};
use crate::message::Arguments;
use crate::tokenizer::{hex, one_line};
use crate::{Message, TextError};

/// Steps of one rendering; a step is a part of an expression or 64 bytes of text. Real templates use a few hundred per
/// message.
const FUEL: u64 = 4_000_000;
/// Longer sources are refused: the longest template in use has about 30 kB.
const MAX_SOURCE: usize = 1 << 20;

/// What `strftime_now` answers where the caller names no moment: 2024-07-26, 0:00 UTC, so that training data does not
/// depend on the day it was made. It is the date that Llama 3 templates use without a clock.
pub const FIXED_NOW: i64 = 1_721_952_000;

/// What a rendering gets besides the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    /// End with the header of an assistant turn.
    pub add_generation_prompt: bool,
    /// Tool descriptions (JSON schema), as the template wants them.
    pub tools: Option<serde_json::Value>,
    /// More variables, such as `enable_thinking`.
    pub kwargs: Map<String, serde_json::Value>,
    /// What `strftime_now` answers, in seconds since 1970 (UTC); [`FIXED_NOW`] where not given.
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
    template: Arc<Template>,
    source: Arc<str>,
    /// `bos_token` and the like.
    tokens: Vec<(String, serde_json::Value)>,
    /// The template for conversations with tools, where the model has one of its own.
    tool_use: Option<Arc<ChatTemplate>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("hash", &self.hash()).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Parses a template. `bos_token` and the like are undefined until [`ChatTemplate::with_tokens`].
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
        let template = Template::parse(source).map_err(|e| TextError::TemplateSyntax {
            line: e.line.max(1) as usize,
            detail: one_line(&e.detail),
        })?;
        Ok(ChatTemplate {
            template: Arc::new(template),
            source: source.into(),
            tokens: Vec::new(),
            tool_use: None,
        })
    }

    /// Adds a template that is used in place of this one when there are tools (`tool_use` in lists of named templates).
    /// To be called before tokens are set.
    pub fn with_tool_use(mut self, tool_use: ChatTemplate) -> ChatTemplate {
        self.tool_use = Some(Arc::new(tool_use));
        self
    }

    /// Sets what `bos_token` and `eos_token` stand for.
    pub fn with_tokens(self, bos_token: impl Into<String>, eos_token: impl Into<String>) -> ChatTemplate {
        self.with_variables(vec![
            ("bos_token".into(), bos_token.into().into()),
            ("eos_token".into(), eos_token.into().into()),
        ])
    }

    /// Sets the special tokens that a template may name to those of a tokenizer.
    pub fn with_tokens_of(self, tokenizer: &crate::Tokenizer) -> ChatTemplate {
        self.with_variables(tokenizer.template_tokens())
    }

    fn with_variables(mut self, tokens: Vec<(String, serde_json::Value)>) -> ChatTemplate {
        self.tool_use =
            self.tool_use.map(|t| Arc::new(ChatTemplate::clone(&t).with_variables(tokens.clone())));
        self.tokens = tokens;
        self
    }

    /// Renders a conversation.
    ///
    /// Arguments of tool calls that are spelled as a string are given as the object they spell; a template that fails
    /// with them, or prints them without `tojson`, is rendered once more with the strings.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] if the template refuses it, [`TextError::TemplateRender`] with the line if it
    /// fails or spends its budget; never panics.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TextError> {
        if let (Some(tool_use), Some(_)) = (&self.tool_use, &options.tools) {
            return tool_use.render(messages, options);
        }
        let first = match self.render_with(messages, options, Arguments::Objects) {
            Ok(text) => return Ok(text),
            Err(error) => error,
        };
        let spelled = first.kind != Kind::Fuel && messages.iter().any(Message::has_spelled_arguments);
        if spelled {
            match self.render_with(messages, options, Arguments::AsWritten) {
                Ok(text) => return Ok(text),
                Err(second) if first.kind == Kind::Spelled => return Err(failed(&second)),
                Err(_) => {}
            }
        }
        Err(failed(&first))
    }

    fn render_with(
        &self,
        messages: &[Message],
        options: &RenderOptions,
        arguments: Arguments,
    ) -> Result<String, Box<Error>> {
        let mut interp = self.template.start(FUEL, options.now.unwrap_or(FIXED_NOW));
        // Only what the template names at all is made.
        let define =
            |interp: &mut Interp<'_>, name: &str, value: &dyn Fn() -> Result<Value, Box<Error>>| match self
                .template
                .sym(name)
            {
                Some(sym) => value().map(|value| interp.define(sym, value)),
                None => Ok(()),
            };
        for (name, value) in &self.tokens {
            define(&mut interp, name, &|| Value::of(value))?;
        }
        define(&mut interp, "documents", &|| Ok(Value::None))?;
        // Later entries win: callers cannot replace the conversation by an extra variable.
        for (name, value) in &options.kwargs {
            define(&mut interp, name, &|| Value::of(value))?;
        }
        define(&mut interp, "tools", &|| options.tools.as_ref().map_or(Ok(Value::None), Value::of))?;
        define(&mut interp, "add_generation_prompt", &|| Ok(Value::Bool(options.add_generation_prompt)))?;
        define(&mut interp, "messages", &|| {
            let messages = messages.iter().map(|m| m.to_value(arguments)).collect::<Result<_, _>>()?;
            Value::list(messages)
        })?;
        interp.render()
    }

    /// The source text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The source text of the template that conversations with tools go to.
    pub fn tool_source(&self) -> &str {
        self.tool_use.as_ref().map_or(&self.source, |template| &template.source)
    }

    /// SHA-256 (hex) of the source, and of that for tools where there is one.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update(self.source.as_bytes());
        if let Some(tool_use) = &self.tool_use {
            hasher.update([0]);
            hasher.update(tool_use.source.as_bytes());
        }
        hex(&hasher.finalize())
    }
}

fn failed(error: &Error) -> TextError {
    match error.kind {
        Kind::Raised => TextError::TemplateRaised { message: one_line(&error.detail) },
        _ => TextError::TemplateRender { line: error.line as usize, detail: one_line(&error.detail) },
    }
}
