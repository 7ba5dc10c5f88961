//! The configuration of a draft, whatever its kind: what the others need to know of a kind.

use draftsmith_formats::run::{DraftTable, Method, MethodWord};
use draftsmith_kernels::{PackMode, RopeScaling};
use serde_json::{Map, Value, json};

use crate::config::TargetConfig;
use crate::kinds::DraftConfig;
use crate::kinds::block::BlockConfig;
use crate::kinds::eagle3::Eagle3Config;
use crate::kinds::peagle::PEagleConfig;

/// Numbers that every kind of draft has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftShape {
    /// `V`
    pub vocab_size: usize,
    /// `Vd`: ids that it can propose.
    pub draft_vocab_size: usize,
    /// `H`
    pub hidden_size: usize,
    /// `Ht`
    pub target_hidden_size: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions the draft is meant for.
    pub max_position_embeddings: usize,
    /// Standard deviation of random initial weights.
    pub initializer_range: f32,
    /// Target layers whose output it reads.
    pub captured_layers: usize,
    /// `d2t` and `t2d` stand beside its weights; without them it proposes target ids.
    pub has_vocab_map: bool,
    /// Its embedding is its own, not the target's.
    pub has_embedding: bool,
    /// Numbers that it answers a question by hand with: logits, or what the target's head makes logits of.
    pub answer_width: usize,
}

impl DraftShape {
    /// Width of the captured states of a position side by side.
    pub fn features_width(&self) -> usize {
        self.captured_layers * self.target_hidden_size
    }
}

/// What a proposal costs, beside the attention over what is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftWork {
    /// Bytes of weights that are read.
    pub bytes: u64,
    /// Multiplications with an addition each.
    pub multiply_adds: u64,
}

impl DraftWork {
    /// Where each weight is read once per multiplication: one row at a time.
    pub fn of(weights: u64, mode: PackMode) -> DraftWork {
        let bytes = match mode {
            PackMode::F32 => 4 * weights,
            PackMode::Stored => 2 * weights,
            // Blocks of 32 with a 16-bit scale.
            PackMode::Q8 => weights + weights / 16,
        };
        DraftWork { bytes, multiply_adds: weights }
    }
}

/// A word that a kind of draft goes by.
pub(crate) struct Word {
    /// In run files, manifests and records.
    pub(crate) method: MethodWord,
    /// Names of its architecture in a `config.json`; the first is written.
    pub(crate) architectures: &'static [&'static str],
}

/// How a kind of draft begins.
pub(crate) trait DraftKind: Sized {
    /// The words that it goes by.
    const WORDS: &'static [Word];

    /// The draft that a run file's `[draft]` table asks for, before it is checked: the target's shapes where it says
    /// nothing.
    fn of_table(table: &DraftTable, target: &TargetConfig, draft_vocab_size: usize) -> Self;
    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// What is wrong with it, key named.
    fn read(value: &Value) -> Result<Self, DraftConfigError>;
}

/// A draft as those know it who read or write other engines' layouts.
#[derive(Clone, Copy, Debug)]
pub enum Published<'a> {
    /// Nobody else has a layout for it.
    Nowhere,
    /// EAGLE-3's layouts.
    Eagle3(&'a Eagle3Config),
    /// The layouts of DFlash and DSpark.
    Block(&'a BlockConfig),
    /// P-EAGLE's.
    PEagle(&'a PEagleConfig),
}

/// Numbers of a configuration that may be set beside its file, where a draft is read as somebody else may have meant it.
pub struct DraftNumbers<'a> {
    /// Tokens of the target.
    pub vocab_size: &'a mut usize,
    /// Tokens that can be proposed.
    pub draft_vocab_size: &'a mut usize,
    /// Base of RoPE.
    pub rope_theta: &'a mut f32,
    /// Its scaling, for a kind that has one.
    pub rope_scaling: Option<&'a mut RopeScaling>,
    /// The small number inside the norms.
    pub rms_norm_eps: &'a mut f32,
}

/// What a kind of draft says of itself.
pub trait DraftSpec {
    /// The word in run files, manifests and records.
    fn name(&self) -> &'static str;
    /// What it is called in a sentence, with its article.
    fn title(&self) -> &'static str;
    /// The numbers that every kind has.
    fn shape(&self) -> DraftShape;
    /// The target layers that it reads (0-based, output of layer); `None` where the default of its kind holds.
    fn target_layers(&self) -> Option<Vec<u32>>;
    /// The layers that it reads of a target with this many, if nobody says otherwise.
    fn default_layers(&self, num_layers: u32) -> Vec<u32>;
    /// Sets the layers that it reads.
    ///
    /// # Errors
    /// A number of layers that the kind does not take.
    fn set_target_layers(&mut self, layers: &[u32]) -> Result<(), DraftConfigError>;
    /// Sets the token that stands for one to be proposed, for a kind that has one.
    fn set_mask_token(&mut self, _id: u32) {}
    /// Its numbers to be set; a kind without layouts elsewhere says nothing.
    fn numbers(&mut self) -> Option<DraftNumbers<'_>> {
        None
    }
    /// Sets the ids of special tokens.
    fn set_token_ids(&mut self, bos: Option<u32>, eos: &[u32], pad: Option<u32>);
    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// Those that do not.
    fn check(&self) -> Result<(), DraftConfigError>;
    /// Writes the `config.json` that training frameworks and engines read.
    ///
    /// # Errors
    /// What has no key there.
    fn to_value(&self) -> Result<Value, DraftConfigError>;
    /// Every trained tensor: name, shape (`[O, I]` or `[width]`).
    fn tensors(&self) -> Vec<(String, Vec<usize>)>;
    /// What a proposal of so many tokens costs with weights packed like this.
    fn work(&self, tokens: usize, mode: PackMode) -> DraftWork;
    /// Tokens of a proposal that its size is judged by: those of a block, or one of a chain.
    fn tokens_per_pass(&self) -> usize {
        1
    }
    /// What other engines know it as; a kind without layouts elsewhere says nothing.
    fn published(&self) -> Published<'_> {
        Published::Nowhere
    }

    /// The layers to capture of a target with this many: as configured, or the default ones.
    fn layers(&self, num_layers: u32) -> Vec<u32> {
        self.target_layers().unwrap_or_else(|| self.default_layers(num_layers))
    }
}

impl DraftConfig {
    /// The draft that a target gets when nobody says otherwise.
    ///
    /// # Errors
    /// [`DraftConfigError::Method`] for a word that no kind has.
    pub fn for_target(
        method: Method,
        target: &TargetConfig,
        draft_vocab_size: usize,
    ) -> Result<DraftConfig, DraftConfigError> {
        DraftConfig::of_table(&DraftTable::of(method), target, draft_vocab_size)
    }

    /// The draft that a run file's `[draft]` table asks for: the target's shapes where it says nothing.
    ///
    /// # Errors
    /// If the numbers do not fit together; [`DraftConfigError::Method`] for a word that no kind has.
    pub fn from_table(
        table: &DraftTable,
        target: &TargetConfig,
        draft_vocab_size: usize,
    ) -> Result<DraftConfig, DraftConfigError> {
        let config = DraftConfig::of_table(table, target, draft_vocab_size)?;
        config.check()?;
        Ok(config)
    }

    /// Reads a draft's `config.json`.
    ///
    /// # Errors
    /// What is wrong with it, key named.
    pub fn from_json(text: &str) -> Result<DraftConfig, DraftConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| DraftConfigError::Json { message: e.to_string() })?;
        DraftConfig::from_value(&value)
    }
}

/// The kind that a word means, and what it says of the word.
pub(crate) fn words() -> impl Iterator<Item = &'static Word> {
    DraftConfig::WORDS.iter().copied().flatten()
}

/// The words that `draft.method` may be, in the order of the kinds.
pub fn methods() -> Vec<MethodWord> {
    words().map(|word| word.method).collect()
}

/// True if a kind of draft has this word.
pub fn is_method(name: &str) -> bool {
    words().any(|word| word.method.name == name)
}

/// The kind that a configuration is of, by its first architecture. One that names none, or none that is known, is read
/// as the first kind there was: what does not fit is then told key by key.
pub(crate) fn method_of(config: &Value) -> &'static str {
    let named = config["architectures"][0].as_str().unwrap_or_default();
    let known = words().find(|word| word.architectures.contains(&named)).or_else(|| words().next());
    known.map_or("", |word| word.method.name)
}

/// What a draft's `config.json` can be refused for.
#[derive(Debug, thiserror::Error)]
pub enum DraftConfigError {
    /// Not JSON at all.
    #[error("draft configuration is not JSON: {message}")]
    Json {
        /// The parser's words.
        message: String,
    },
    /// A key is missing or has the wrong type.
    #[error("draft configuration key `{key}` should be {wanted}, found `{found}`")]
    Key {
        /// Dotted key.
        key: String,
        /// Expected type or range.
        wanted: &'static str,
        /// JSON text found, `null` if absent.
        found: String,
    },
    /// A value that this implementation has no network for.
    #[error("draft configuration key `{key}` = `{found}` is not supported")]
    Unsupported {
        /// Dotted key.
        key: String,
        /// JSON text found.
        found: String,
        /// What the kind's network covers, as advice.
        supported: &'static str,
    },
    /// Captured layers that are not as the kind has them.
    #[error("draft configuration key `{key}` should be {wanted}, found `{found}`")]
    Layers {
        /// Dotted key.
        key: String,
        /// What stands there otherwise.
        wanted: &'static str,
        /// JSON text found.
        found: String,
        /// How they are put right.
        hint: &'static str,
    },
    /// A word that no kind of draft has.
    #[error("no kind of draft is called `{method}`")]
    Method {
        /// The word.
        method: String,
    },
    /// Numbers that contradict each other.
    #[error("draft configuration does not fit together: {what}")]
    Shapes {
        /// Which.
        what: String,
    },
}

impl DraftConfigError {
    /// Advice for the person who wrote the file.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            DraftConfigError::Unsupported { supported, .. } => (*supported).into(),
            DraftConfigError::Layers { hint, .. } => (*hint).into(),
            DraftConfigError::Json { .. } => {
                "correct the file, or take it from the draft's repository again".into()
            }
            DraftConfigError::Key { key, wanted, .. } => format!(
                "set `{key}` to {wanted}, or take the `config.json` of the repository that the weights are from"
            ),
            DraftConfigError::Method { .. } => {
                let names: Vec<&str> = words().map(|word| word.method.name).collect();
                format!("use one of `{}`", names.join("`, `"))
            }
            DraftConfigError::Shapes { .. } => {
                "take `config.json` and weights from the same repository and revision".into()
            }
        })
    }
}

/// Reads typed keys of one JSON object.
pub(crate) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// What the kind's network covers.
    supported: &'static str,
}

impl<'a> Keys<'a> {
    /// The keys of a whole `config.json`, which must be an object and ask for neither biases nor a tied head.
    pub(crate) fn of_config(value: &'a Value, supported: &'static str) -> Result<Keys<'a>, DraftConfigError> {
        let map = value.as_object().ok_or_else(|| DraftConfigError::Json {
            message: "the outermost value is not an object".into(),
        })?;
        let keys = Keys { map, supported };
        for key in ["attention_bias", "tie_word_embeddings"] {
            if keys.flag(key)? {
                return Err(keys.unsupported(key, "true".into()));
            }
        }
        Ok(keys)
    }

    /// The object itself.
    pub(crate) fn object(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The gate of the feed-forward layers is SiLU.
    pub(crate) fn needs_silu(&self) -> Result<(), DraftConfigError> {
        match self.present("hidden_act").filter(|act| *act != "silu") {
            None => Ok(()),
            Some(act) => Err(self.unsupported("hidden_act", act.to_string())),
        }
    }

    /// Another object of the same configuration.
    pub(crate) fn inside<'b>(&self, map: &'b Map<String, Value>) -> Keys<'b> {
        Keys { map, supported: self.supported }
    }

    pub(crate) fn bad(&self, key: &str, wanted: &'static str) -> DraftConfigError {
        let found = self.map.get(key).map_or_else(|| "null".to_owned(), Value::to_string);
        DraftConfigError::Key { key: key.to_owned(), wanted, found: found.chars().take(80).collect() }
    }

    pub(crate) fn unsupported(&self, key: &str, found: String) -> DraftConfigError {
        DraftConfigError::Unsupported { key: key.to_owned(), found, supported: self.supported }
    }

    pub(crate) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Sizes are bounded so that products of two fit `usize` with room to spare.
    pub(crate) fn size(&self, key: &str) -> Result<usize, DraftConfigError> {
        let n = self.map.get(key).and_then(Value::as_u64).filter(|n| (1..=1 << 28).contains(n));
        n.map(|n| n as usize).ok_or_else(|| self.bad(key, "a positive integer"))
    }

    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize, DraftConfigError> {
        if self.present(key).is_none() { Ok(default) } else { self.size(key) }
    }

    /// A number of layers or slots. Networks are laid out by it before any tensor is looked at, so it is bounded by what
    /// a draft can have.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize, DraftConfigError> {
        match self.size_or(key, default)? {
            n if n <= 1024 => Ok(n),
            _ => Err(self.bad(key, "at most 1024")),
        }
    }

    pub(crate) fn float(&self, key: &str) -> Result<f32, DraftConfigError> {
        let x = self.map.get(key).and_then(Value::as_f64).filter(|x| x.is_finite() && *x > 0.0);
        x.map(|x| x as f32).ok_or_else(|| self.bad(key, "a positive number"))
    }

    pub(crate) fn float_or(&self, key: &str, default: f32) -> Result<f32, DraftConfigError> {
        if self.present(key).is_none() { Ok(default) } else { self.float(key) }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool, DraftConfigError> {
        match self.present(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.bad(key, "true or false")),
        }
    }

    pub(crate) fn id(&self, key: &str) -> Result<Option<u32>, DraftConfigError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => {
                let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
                id.map(Some).ok_or_else(|| self.bad(key, "a token id"))
            }
        }
    }

    /// The beginning-of-sequence id, which `null` says there is none of; that of the class where the key is left out.
    pub(crate) fn bos_or(&self, class: Option<u32>) -> Result<Option<u32>, DraftConfigError> {
        if self.map.contains_key("bos_token_id") { self.id("bos_token_id") } else { Ok(class) }
    }

    /// [`Keys::eos`], or that of the class where the key is left out.
    pub(crate) fn eos_or(&self, class: Option<u32>) -> Result<Vec<u32>, DraftConfigError> {
        if self.map.contains_key("eos_token_id") { self.eos() } else { Ok(class.into_iter().collect()) }
    }

    /// End-of-sequence ids: one, a list, or none.
    pub(crate) fn eos(&self) -> Result<Vec<u32>, DraftConfigError> {
        match self.present("eos_token_id") {
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok()))
                .collect::<Option<Vec<u32>>>()
                .ok_or_else(|| self.bad("eos_token_id", "a token id or a list of them")),
            _ => Ok(self.id("eos_token_id")?.into_iter().collect()),
        }
    }

    /// RoPE scaling of an object that holds its keys.
    pub(crate) fn rope_scaling(&self, max_position: usize) -> Result<RopeScaling, DraftConfigError> {
        let kind = self.present("rope_type").or_else(|| self.present("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.float("factor")? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: self.float("factor")?,
                low_freq_factor: self.float("low_freq_factor")?,
                high_freq_factor: self.float("high_freq_factor")?,
                original_max_position: self.size_or("original_max_position_embeddings", max_position)? as u32,
            }),
            Some(other) => Err(self.unsupported("rope_scaling.rope_type", other.to_owned())),
        }
    }
}

/// The `rope_scaling` of a configuration.
///
/// # Errors
/// Explicit factors per frequency have no key.
pub(crate) fn rope_scaling_value(
    scaling: &RopeScaling,
    supported: &'static str,
) -> Result<Value, DraftConfigError> {
    Ok(match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position,
        }),
        RopeScaling::Factors(_) => {
            return Err(DraftConfigError::Unsupported {
                key: "rope_scaling".into(),
                found: "explicit factors per frequency".into(),
                supported,
            });
        }
    })
}

/// End-of-sequence ids as a configuration has them: none, one, or a list.
pub(crate) fn eos_value(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// f32 as the shortest decimal number, so that `1e-5` is not written as `9.999999747378752e-6`.
pub(crate) fn plain(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}
