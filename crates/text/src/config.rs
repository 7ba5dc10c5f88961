//! `tokenizer_config.json` and `generation_config.json`: which ids have a role, which template the model has.

use serde_json::Value;

use crate::TextError;

/// What those two files say that `tokenizer.json` does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Text of the BOS token.
    pub bos_token: Option<String>,
    /// Text of the EOS token.
    pub eos_token: Option<String>,
    /// Text of the unknown token.
    pub unk_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// `add_bos_token`.
    pub add_bos: bool,
    /// Ids that end generation, from `generation_config.json`.
    pub eos_ids: Vec<u32>,
    /// The Jinja chat template, if it stands in the file; of several named ones `default`.
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the bytes of the two files.
    ///
    /// # Errors
    /// [`TextError::ConfigJson`].
    pub fn parse(
        tokenizer_config: &[u8],
        generation_config: Option<&[u8]>,
    ) -> Result<TokenizerConfig, TextError> {
        let read = |file: &'static str, bytes: &[u8]| -> Result<Value, TextError> {
            serde_json::from_slice(bytes).map_err(|e| TextError::ConfigJson { file, detail: e.to_string() })
        };
        let config = read("tokenizer_config.json", tokenizer_config)?;
        let token = |key: &str| match config.get(key) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Object(added)) => added.get("content").and_then(Value::as_str).map(str::to_owned),
            _ => None,
        };
        let chat_template = match config.get("chat_template") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(named)) => named
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template").and_then(Value::as_str))
                .map(str::to_owned),
            _ => None,
        };
        let mut eos_ids = Vec::new();
        if let Some(bytes) = generation_config {
            let generation = read("generation_config.json", bytes)?;
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            match generation.get("eos_token_id") {
                Some(Value::Array(ids)) => eos_ids.extend(ids.iter().filter_map(id)),
                Some(value) => eos_ids.extend(id(value)),
                None => {}
            }
        }
        Ok(TokenizerConfig {
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            unk_token: token("unk_token"),
            pad_token: token("pad_token"),
            add_bos: config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false),
            eos_ids,
            chat_template,
        })
    }

    /// Builds the tokenizer of a `tokenizer.json` with these roles.
    ///
    /// # Errors
    /// Those of [`crate::Tokenizer::from_json`].
    pub fn tokenizer(&self, tokenizer_json: &[u8]) -> Result<crate::Tokenizer, TextError> {
        let plain = crate::Tokenizer::from_json(tokenizer_json, crate::SpecialIds::default())?;
        let id = |token: &Option<String>| token.as_ref().and_then(|text| plain.token_to_id(text));
        let mut eos = self.eos_ids.clone();
        eos.extend(id(&self.eos_token));
        let mut seen = std::collections::BTreeSet::new();
        eos.retain(|id| seen.insert(*id));
        let special = crate::SpecialIds {
            bos: id(&self.bos_token),
            eos,
            unk: id(&self.unk_token),
            pad: id(&self.pad_token),
            add_bos: self.add_bos,
        };
        plain.with_special(special)
    }
}
