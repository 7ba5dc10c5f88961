//! What can go wrong between messages and tokens.

/// An error of this crate. Messages state the fact; [`TextError::hint`] gives the advice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// `tokenizer.json` does not parse.
    #[error("`tokenizer.json` cannot be read: {detail}")]
    TokenizerJson {
        /// What the reader said.
        detail: String,
    },
    /// A tokenizer whose pieces have no byte form here.
    #[error("the tokenizer's decoder `{decoder}` is neither byte-level nor byte-fallback")]
    UnsupportedDecoder {
        /// Names of the decoder's parts.
        decoder: String,
    },
    /// GGUF names a tokenizer model that is not built here.
    #[error("`tokenizer.ggml.model` is `{model}`, known are `gpt2` and `llama`")]
    UnsupportedModel {
        /// The name found.
        model: String,
    },
    /// GGUF names a pre-tokenizer that is not built here.
    #[error("`tokenizer.ggml.pre` is `{pre}`, known are {known}")]
    UnsupportedPre {
        /// The name found.
        pre: String,
        /// The names known.
        known: String,
    },
    /// A `tokenizer.json` that GGUF metadata cannot say.
    #[error("`tokenizer.json` has no GGUF form: {why}")]
    NoGgufForm {
        /// Why.
        why: String,
    },
    /// GGUF tokenizer metadata contradicts itself.
    #[error("GGUF tokenizer: {detail}")]
    BadGguf {
        /// What is wrong, with the key.
        detail: String,
    },
    /// `tokenizer_config.json` or `generation_config.json` does not parse.
    #[error("`{file}` cannot be read: {detail}")]
    ConfigJson {
        /// Which of the two.
        file: &'static str,
        /// What the reader said.
        detail: String,
    },
    /// Several chat templates, and none of them is the usual one.
    #[error("the model has the chat templates {names}, and none is named `default`")]
    NoDefaultTemplate {
        /// The names found.
        names: String,
    },
    /// The tokenizer refused a text.
    #[error("text cannot be encoded: {detail}")]
    Encode {
        /// What the tokenizer said.
        detail: String,
    },
    /// The chat template does not parse.
    #[error("chat template, line {line}: {detail}")]
    TemplateSyntax {
        /// Line in the template, from 1.
        line: usize,
        /// What the parser said.
        detail: String,
    },
    /// The chat template failed while rendering.
    #[error("chat template, line {line}: {detail}")]
    TemplateRender {
        /// Line in the template, from 1; 0 where unknown.
        line: usize,
        /// What the engine said.
        detail: String,
    },
    /// The template called `raise_exception`.
    #[error("chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// A rendered answer does not continue the rendered generation prompt.
    #[error(
        "message {turn}: the rendered answer does not continue the generation prompt (prompt ends {prompt:?}, \
         rendered {rendered:?})"
    )]
    AnswerNotContinued {
        /// Index of the assistant message.
        turn: usize,
        /// End of the generation prompt, from where the two differ.
        prompt: String,
        /// What the rendered conversation has there.
        rendered: String,
    },
    /// The rendered text starts with two BOS tokens.
    #[error("the rendered conversation starts with two BOS tokens (id {bos})")]
    DoubleBos {
        /// The BOS id.
        bos: u32,
    },
}

impl TextError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            TextError::TokenizerJson { .. } => "pass the `tokenizer.json` that belongs to the model".into(),
            TextError::UnsupportedDecoder { .. } => "use a model with a byte-level BPE or a SentencePiece BPE tokenizer".into(),
            TextError::UnsupportedModel { .. } | TextError::UnsupportedPre { .. } => {
                "use the model's safetensors folder; its `tokenizer.json` is read as it is".into()
            }
            TextError::NoGgufForm { .. } => "name the target's GGUF file, whose tokenizer is copied".into(),
            TextError::BadGguf { .. } => "the file is damaged or made by an old converter; convert the model again".into(),
            TextError::ConfigJson { file, .. } => format!("check the JSON of `{file}`"),
            TextError::TemplateSyntax { .. } => "check the template; it is read as the Hugging Face library reads it".into(),
            TextError::TemplateRender { .. } => {
                "check that the messages have the fields the template reads (tools, dates, reasoning)".into()
            }
            TextError::NoDefaultTemplate { .. } => {
                "name the template to use: `data.template` in a run file, `--template FILE` on the command line".into()
            }
            TextError::TemplateRaised { .. } => "bring the roles into the order the model expects".into(),
            TextError::AnswerNotContinued { .. } => {
                "give the template the arguments it was trained with (for example `enable_thinking`), or pass \
                 pre-tokenised rows"
                    .into()
            }
            TextError::DoubleBos { .. } => {
                "remove the BOS token from the message text; the template already adds it".into()
            }
            TextError::Encode { .. } => return None,
        })
    }
}
