//! The files of a model folder that say which ids have a role and which template the model has.

use serde_json::Value;

use crate::TextError;

/// What those files say that `tokenizer.json` does not.
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
    /// Ids that end generation, from the model's own `config.json`.
    pub model_eos_ids: Vec<u32>,
    /// What templates call special tokens, as transformers names them (`bos_token` to `mask_token`).
    pub named_tokens: Vec<(&'static str, String)>,
    /// The Jinja chat templates that stand in the file.
    pub chat_templates: ChatTemplates,
}

/// The chat templates of a model: one, or several with names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatTemplates {
    named: Vec<(String, String)>,
    /// Given as a text and not by names.
    plain: bool,
}

/// The names under which transformers gives special tokens to templates.
const TOKEN_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The text of a special token: a string or an added-token object.
fn token_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(added) => added.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    }
}

fn id_list(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

impl ChatTemplates {
    /// A single template.
    pub fn plain(text: impl Into<String>) -> ChatTemplates {
        ChatTemplates { named: vec![("default".into(), text.into())], plain: true }
    }

    /// Adds a template with a name, or replaces the one that has it.
    pub fn insert(&mut self, name: impl Into<String>, text: impl Into<String>) {
        let (name, text) = (name.into(), text.into());
        self.named.retain(|(other, _)| *other != name);
        self.named.push((name, text));
    }

    /// No template at all.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The text of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(other, _)| other == name).map(|(_, text)| text.as_str())
    }

    /// Parses them: `default`, and `tool_use` for conversations with tools where the model has one.
    ///
    /// # Errors
    /// A template that does not parse; several names, and none of them `default`.
    pub fn parse(&self) -> Result<Option<crate::ChatTemplate>, TextError> {
        if self.is_empty() {
            return Ok(None);
        }
        let tool_use =
            self.get("tool_use").filter(|_| !self.plain).map(crate::ChatTemplate::parse).transpose()?;
        match (self.get("default"), tool_use) {
            (Some(text), None) => crate::ChatTemplate::parse(text).map(Some),
            (Some(text), Some(tool_use)) => {
                crate::ChatTemplate::parse(text).map(|template| Some(template.with_tool_use(tool_use)))
            }
            (None, _) => Err(TextError::NoDefaultTemplate {
                names: self.named.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", "),
            }),
        }
    }
}

impl TokenizerConfig {
    /// Reads the bytes of `tokenizer_config.json` and, where there are such, of `generation_config.json`.
    ///
    /// # Errors
    /// [`TextError::ConfigJson`].
    pub fn parse(
        tokenizer_config: &[u8],
        generation_config: Option<&[u8]>,
    ) -> Result<TokenizerConfig, TextError> {
        TokenizerConfig::parse_all(tokenizer_config, None, generation_config, None)
    }

    /// Reads the bytes of all files of a model folder that name special tokens or ends of text: besides the two of
    /// [`TokenizerConfig::parse`] `special_tokens_map.json`, which counts where `tokenizer_config.json` does not list
    /// the added tokens itself (older folders), and `config.json`.
    ///
    /// # Errors
    /// [`TextError::ConfigJson`].
    pub fn parse_all(
        tokenizer_config: &[u8],
        special_tokens_map: Option<&[u8]>,
        generation_config: Option<&[u8]>,
        model_config: Option<&[u8]>,
    ) -> Result<TokenizerConfig, TextError> {
        let read = |file: &'static str, bytes: Option<&[u8]>| -> Result<Value, TextError> {
            match bytes {
                Some(bytes) => serde_json::from_slice(bytes)
                    .map_err(|e| TextError::ConfigJson { file, detail: e.to_string() }),
                None => Ok(Value::Null),
            }
        };
        let config = read("tokenizer_config.json", Some(tokenizer_config))?;
        let map = read("special_tokens_map.json", special_tokens_map)?;
        let generation = read("generation_config.json", generation_config)?;
        let model = read("config.json", model_config)?;
        let listed = config.get("added_tokens_decoder").is_some_and(Value::is_object);
        let token = |key: &str| {
            let from_map = map.get(key).filter(|_| !listed).and_then(token_text);
            from_map.or_else(|| config.get(key).and_then(token_text))
        };
        let chat_templates = match config.get("chat_template") {
            Some(Value::String(text)) => ChatTemplates::plain(text),
            Some(Value::Array(entries)) => {
                let mut templates = ChatTemplates::default();
                for entry in entries {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    if let (Some(name), Some(template)) = (text("name"), text("template")) {
                        templates.insert(name, template);
                    }
                }
                templates
            }
            Some(Value::Object(named)) => {
                let mut templates = ChatTemplates::default();
                for (name, template) in named {
                    if let Some(template) = template.as_str() {
                        templates.insert(name, template);
                    }
                }
                templates
            }
            _ => ChatTemplates::default(),
        };
        let eos_ids = id_list(generation.get("eos_token_id"));
        let mut model_eos_ids = id_list(model.get("eos_token_id"));
        model_eos_ids.extend(id_list(model.get("text_config").and_then(|text| text.get("eos_token_id"))));
        Ok(TokenizerConfig {
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            unk_token: token("unk_token"),
            pad_token: token("pad_token"),
            add_bos: config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false),
            eos_ids,
            model_eos_ids,
            named_tokens: TOKEN_NAMES.iter().filter_map(|name| Some((*name, token(name)?))).collect(),
            chat_templates,
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
        // A default of the model's class, beyond this vocabulary, cannot come up.
        eos.extend(self.model_eos_ids.iter().filter(|id| (**id as usize) < plain.vocab_size()));
        let mut seen = std::collections::BTreeSet::new();
        eos.retain(|id| seen.insert(*id));
        let special = crate::SpecialIds {
            bos: id(&self.bos_token),
            eos,
            unk: id(&self.unk_token),
            pad: id(&self.pad_token),
            add_bos: self.add_bos,
        };
        Ok(plain.with_special(special)?.with_named(self.named_tokens.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Message, RenderOptions};

    fn config(
        tokenizer: &str,
        map: Option<&str>,
        generation: Option<&str>,
        model: Option<&str>,
    ) -> TokenizerConfig {
        TokenizerConfig::parse_all(
            tokenizer.as_bytes(),
            map.map(str::as_bytes),
            generation.map(str::as_bytes),
            model.map(str::as_bytes),
        )
        .expect("JSON")
    }

    const TOKENIZER: &str = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1, "<e>": 2, "<t>": 3, "<m>": 4}, "merges": []},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "added_tokens": []}"#;

    #[test]
    fn every_file_names_ids_that_stop_and_only_the_tokenizer_says_what_templates_write() {
        let config = config(
            r#"{"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "<t>"}, "unk_token": null, "mask_token": "<m>"}"#,
            None,
            Some(r#"{"eos_token_id": [2]}"#),
            Some(r#"{"eos_token_id": 4, "text_config": {"eos_token_id": [2, 99]}}"#),
        );
        let tokenizer = config.tokenizer(TOKENIZER.as_bytes()).expect("it builds");
        assert_eq!(tokenizer.eos_ids(), [2, 3, 4]);
        let named = tokenizer.template_tokens();
        let named: Vec<_> =
            named.iter().map(|(name, text)| (name.as_str(), text.as_str().unwrap_or(""))).collect();
        assert_eq!(named, [("bos_token", "<s>"), ("eos_token", "<t>"), ("mask_token", "<m>")]);
    }

    #[test]
    fn the_map_of_special_tokens_counts_where_the_configuration_lists_no_added_tokens() {
        let map = Some(r#"{"eos_token": {"content": "<t>"}, "sep_token": "<m>"}"#);
        let old = config(r#"{"eos_token": "<e>"}"#, map, None, None);
        assert_eq!(old.eos_token.as_deref(), Some("<t>"));
        assert_eq!(old.named_tokens, [("eos_token", "<t>".to_owned()), ("sep_token", "<m>".to_owned())]);
        let new = config(r#"{"eos_token": "<e>", "added_tokens_decoder": {}}"#, map, None, None);
        assert_eq!(new.named_tokens, [("eos_token", "<e>".to_owned())]);
    }

    #[track_caller]
    fn check_named(json: &str, tools: Option<Value>, expected: Result<Option<&str>, &str>) {
        let templates = config(json, None, None, None).chat_templates;
        let options = RenderOptions { tools, ..RenderOptions::default() };
        let rendered = templates
            .parse()
            .map(|t| t.map(|t| t.render(&[Message::new("user", "x")], &options).expect("text")))
            .map_err(|e| e.to_string());
        assert_eq!(rendered.as_ref().map(Option::as_deref).map_err(String::as_str), expected, "{json}");
    }

    #[test]
    fn of_several_templates_the_one_for_tools_is_taken_where_there_are_tools() {
        let both = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}"#;
        check_named(both, None, Ok(Some("D")));
        check_named(both, Some(serde_json::json!([])), Ok(Some("T")));
        let other =
            r#"{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}"#;
        check_named(other, Some(serde_json::json!([])), Ok(Some("D")));
        check_named(r#"{"chat_template": "D"}"#, Some(serde_json::json!([])), Ok(Some("D")));
        check_named("{}", None, Ok(None));
        check_named(
            r#"{"chat_template": [{"name": "rag", "template": "R"}]}"#,
            None,
            Err("the model has the chat templates `rag`, and none is named `default`"),
        );
    }
}
