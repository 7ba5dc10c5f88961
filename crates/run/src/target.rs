//! The text side of a target: tokenizer and chat template from wherever its weights come from.
//!
//! A GGUF file carries both in its metadata; a Hugging Face folder has `tokenizer.json`, `tokenizer_config.json`,
//! `generation_config.json` and, in newer ones, `chat_template.jinja`, which wins over the copy in the config.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::gguf::{
    ContentError, GgufArray, GgufError, GgufFile, GgufValue, content_sha256_with,
};
use draftsmith_formats::hash;
use draftsmith_text::{ChatTemplate, ChatTemplates, GgufTokenizer, TextError, Tokenizer, TokenizerConfig};

/// Why a target has no usable text side.
#[derive(Debug, thiserror::Error)]
pub enum TargetTextError {
    /// The GGUF file is broken.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The text files or the metadata are not usable.
    #[error("`{}`: {source}", path.display())]
    Text {
        /// The model file or the template file.
        path: PathBuf,
        /// What is wrong.
        source: TextError,
    },
    /// A file that a model folder must have.
    #[error("`{}` has no `{file}`", folder.display())]
    MissingFile {
        /// The model folder.
        folder: PathBuf,
        /// The file.
        file: &'static str,
    },
    /// The model brings no chat template and none was given.
    #[error("`{}` has no chat template", path.display())]
    NoTemplate {
        /// The model.
        path: PathBuf,
    },
    /// A file that cannot be read.
    #[error(transparent)]
    Disk(#[from] AtomicError),
}

impl TargetTextError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            TargetTextError::Gguf(error) => error.hint(),
            TargetTextError::Text { source, .. } => source.hint(),
            TargetTextError::MissingFile { .. } => {
                Some("download the whole model folder, or use a GGUF file, which carries its tokenizer".to_string())
            }
            TargetTextError::NoTemplate { .. } => Some(
                "use the instruct version of the model, or give a Jinja file: `data.template` in a run file, \
                 `--template` on the command line"
                    .to_string(),
            ),
            TargetTextError::Disk(error) => error.hint(),
        }
    }
}

/// Tokenizer and chat template of a target.
#[derive(Debug)]
pub struct TargetText {
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text; `None` for a base model without one.
    pub template: Option<ChatTemplate>,
    path: PathBuf,
}

impl TargetText {
    /// Reads them from a GGUF file or a model folder; `template` replaces the model's own.
    ///
    /// # Errors
    /// [`TargetTextError`], naming the file.
    pub fn open(path: &Path, template: Option<&Path>) -> Result<TargetText, TargetTextError> {
        let text_error = |source| TargetTextError::Text { path: path.to_path_buf(), source };
        let (tokenizer, templates) = if path.is_dir() { from_folder(path)? } else { from_gguf(path)? };
        let template = match template {
            Some(file) => {
                let bytes = atomic::read(file)?;
                let parsed = ChatTemplate::parse(&String::from_utf8_lossy(&bytes));
                Some(parsed.map_err(|source| TargetTextError::Text { path: file.to_path_buf(), source })?)
            }
            None => templates.parse().map_err(text_error)?,
        };
        let template = template.map(|template| template.with_tokens_of(&tokenizer));
        Ok(TargetText { tokenizer: Arc::new(tokenizer), template, path: path.to_path_buf() })
    }

    /// The template, or an error that says what to do.
    pub fn template(&self) -> Result<&ChatTemplate, TargetTextError> {
        self.template.as_ref().ok_or_else(|| TargetTextError::NoTemplate { path: self.path.clone() })
    }
}

/// The tokenizer of a model alone.
///
/// # Errors
/// [`TargetTextError`], naming the file.
pub fn tokenizer_of(path: &Path) -> Result<Tokenizer, TargetTextError> {
    Ok(if path.is_dir() { from_folder(path)? } else { from_gguf(path)? }.0)
}

fn from_gguf(path: &Path) -> Result<(Tokenizer, ChatTemplates), TargetTextError> {
    let file = GgufFile::open(path)?;
    let id = |key: &str| file.find_u32(key);
    let strings = |key: &str| file.find_str_array(key).map(|a| a.map(<[String]>::to_vec));
    let token_types = file.find_i64_array("tokenizer.ggml.token_type")?.unwrap_or_default();
    let mut eos_ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        eos_ids.extend(id(key)?.filter(|id| !eos_ids.contains(id)));
    }
    let mut named_ids = Vec::new();
    for (name, key) in [
        // Spelled so in the format.
        ("sep_token", "tokenizer.ggml.seperator_token_id"),
        ("cls_token", "tokenizer.ggml.cls_token_id"),
        ("mask_token", "tokenizer.ggml.mask_token_id"),
    ] {
        named_ids.extend(id(key)?.map(|id| (name, id)));
    }
    let plain = GgufTokenizer {
        model: file.get_str("tokenizer.ggml.model")?.to_string(),
        pre: file.find_str("tokenizer.ggml.pre")?.map(str::to_string),
        tokens: file.get_str_array("tokenizer.ggml.tokens")?.to_vec(),
        // What does not fit an i32 is no type we know; the tokenizer refuses it by value.
        token_types: token_types.into_iter().map(|t| i32::try_from(t).unwrap_or(-1)).collect(),
        merges: strings("tokenizer.ggml.merges")?.unwrap_or_default(),
        scores: file.find_f32_array("tokenizer.ggml.scores")?.map(<[f32]>::to_vec),
        bos_id: id("tokenizer.ggml.bos_token_id")?,
        eos_ids,
        unk_id: id("tokenizer.ggml.unknown_token_id")?,
        pad_id: id("tokenizer.ggml.padding_token_id")?,
        named_ids,
        add_bos: file.find_bool("tokenizer.ggml.add_bos_token")?,
        add_space_prefix: file.find_bool("tokenizer.ggml.add_space_prefix")?,
    };
    let tokenizer =
        plain.build().map_err(|source| TargetTextError::Text { path: path.to_path_buf(), source })?;
    let mut templates = ChatTemplates::default();
    if let Some(text) = file.find_str("tokenizer.chat_template")? {
        templates.insert("default", text);
    }
    for name in strings("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(text) = file.find_str(&format!("tokenizer.chat_template.{name}"))? {
            templates.insert(name, text);
        }
    }
    Ok((tokenizer, templates))
}

/// `tokenizer.*` for a GGUF file of a target: as it stands in the target's own, or made from `tokenizer.json`.
///
/// # Errors
/// A broken file; a tokenizer without a GGUF form.
pub fn gguf_tokenizer(path: &Path) -> Result<Vec<(String, GgufValue)>, TargetTextError> {
    if !path.is_dir() {
        let file = GgufFile::open(path)?;
        return Ok(file
            .metadata()
            .iter()
            .filter(|(key, _)| key.starts_with("tokenizer."))
            .cloned()
            .collect());
    }
    let (tokenizer, templates) = from_folder(path)?;
    let json = atomic::read(path.join("tokenizer.json"))?;
    let plain = GgufTokenizer::of(&json, &tokenizer)
        .map_err(|source| TargetTextError::Text { path: path.to_path_buf(), source })?;
    let mut keys = vec![
        ("model", GgufValue::Str(plain.model)),
        ("tokens", GgufValue::Array(GgufArray::Str(plain.tokens))),
        ("token_type", GgufValue::Array(GgufArray::I32(plain.token_types))),
        ("merges", GgufValue::Array(GgufArray::Str(plain.merges))),
    ];
    keys.extend(plain.pre.map(|pre| ("pre", GgufValue::Str(pre))));
    keys.extend(plain.add_bos.map(|add| ("add_bos_token", GgufValue::Bool(add))));
    for (key, id) in [
        ("bos_token_id", plain.bos_id),
        ("eos_token_id", plain.eos_ids.first().copied()),
        ("unknown_token_id", plain.unk_id),
        ("padding_token_id", plain.pad_id),
    ] {
        keys.extend(id.map(|id| (key, GgufValue::U32(id))));
    }
    let mut named: Vec<_> =
        keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let default = templates.get("default").map(str::to_string);
    named.extend(default.map(|text| ("tokenizer.chat_template".to_string(), GgufValue::Str(text))));
    if let Some(text) = templates.get("tool_use") {
        let names = GgufArray::Str(vec!["tool_use".to_string()]);
        named.push(("tokenizer.chat_templates".to_string(), GgufValue::Array(names)));
        named.push(("tokenizer.chat_template.tool_use".to_string(), GgufValue::Str(text.to_string())));
    }
    Ok(named)
}

fn from_folder(folder: &Path) -> Result<(Tokenizer, ChatTemplates), TargetTextError> {
    let optional = |file: &'static str| -> Result<Option<Vec<u8>>, TargetTextError> {
        let path = folder.join(file);
        if path.is_file() { Ok(Some(atomic::read(path)?)) } else { Ok(None) }
    };
    let needed = |file: &'static str| -> Result<Vec<u8>, TargetTextError> {
        optional(file)?.ok_or_else(|| TargetTextError::MissingFile { folder: folder.to_path_buf(), file })
    };
    let text = |source| TargetTextError::Text { path: folder.to_path_buf(), source };
    let (map, generation) = (optional("special_tokens_map.json")?, optional("generation_config.json")?);
    let config = TokenizerConfig::parse_all(
        &needed("tokenizer_config.json")?,
        map.as_deref(),
        generation.as_deref(),
        optional("config.json")?.as_deref(),
    )
    .map_err(text)?;
    let tokenizer = config.tokenizer(&needed("tokenizer.json")?).map_err(text)?;
    let templates = match folder_templates(folder)? {
        files if !files.is_empty() => files,
        _ if !config.chat_templates.is_empty() => config.chat_templates,
        // Older processors keep theirs in a file of its own.
        _ => match optional("chat_template.json")? {
            Some(bytes) => {
                let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| {
                    text(TextError::ConfigJson { file: "chat_template.json", detail: e.to_string() })
                })?;
                match json.get("chat_template").and_then(serde_json::Value::as_str) {
                    Some(template) => ChatTemplates::plain(template),
                    None => ChatTemplates::default(),
                }
            }
            None => ChatTemplates::default(),
        },
    };
    Ok((tokenizer, templates))
}

/// Templates in files of their own, which win over what `tokenizer_config.json` says: `chat_template.jinja`, and those
/// with names in `additional_chat_templates/`.
fn folder_templates(folder: &Path) -> Result<ChatTemplates, TargetTextError> {
    let mut templates = ChatTemplates::default();
    let read = |path: &Path| -> Result<String, TargetTextError> {
        Ok(String::from_utf8_lossy(&atomic::read(path)?).into_owned())
    };
    let single = folder.join("chat_template.jinja");
    if single.is_file() {
        templates.insert("default", read(&single)?);
    }
    let named = folder.join("additional_chat_templates");
    if named.is_dir() {
        let entries = std::fs::read_dir(&named).map_err(|e| AtomicError::from_io("read", &named, e))?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|e| e == "jinja"));
        files.sort();
        for file in files {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            templates.insert(name, read(&file)?);
        }
    }
    Ok(templates)
}

/// SHA-256 of a model: of the file, over the hashes of the parts of a split GGUF
/// ([`draftsmith_formats::gguf::content_sha256`]), or over names and hashes of the files of a folder that decide what
/// it says.
///
/// # Errors
/// A file that cannot be read, a part that is missing.
pub fn model_hash(path: &Path) -> Result<String, ContentError> {
    model_hash_with(path, &|file| hash::sha256_file(file))
}

/// [`model_hash`] from hashes of files that `sha256_of` knows.
///
/// # Errors
/// As [`model_hash`] and `sha256_of`.
pub fn model_hash_with(
    path: &Path,
    sha256_of: &dyn Fn(&Path) -> Result<String, AtomicError>,
) -> Result<String, ContentError> {
    if !path.is_dir() {
        let split = path.extension().is_some_and(|e| e == "gguf");
        return if split { content_sha256_with(path, sha256_of) } else { Ok(sha256_of(path)?) };
    }
    let entries = std::fs::read_dir(path).map_err(|e| AtomicError::from_io("read", path, e))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| {
            p.extension().is_some_and(|e| e == "safetensors")
                || p.file_name().is_some_and(|n| n == "config.json")
        })
        .collect();
    files.sort();
    let mut hasher = hash::Hasher::default();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hasher.field(name.as_bytes());
        hasher.field(sha256_of(&file)?.as_bytes());
    }
    Ok(hasher.finish())
}
