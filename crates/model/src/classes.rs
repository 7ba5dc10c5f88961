//! What a configuration means where it says nothing: the defaults of transformers' configuration classes.
//!
//! Published configurations leave out what equals the class default, so a reader needs the defaults of every class it
//! reads. They differ where one would not look: a missing `num_key_value_heads` is the number of heads for Llama, but
//! 32 for Qwen and 4 for Gemma 3; only Gemma 3 ties its head. `fixtures/class-defaults` holds what the classes
//! themselves say.

use draftsmith_formats::hf_config::{HfConfig, HfConfigError};
use draftsmith_kernels::RopeScaling;

use crate::family::Spec;

/// The values of one class for keys that are left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ClassDefaults {
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    /// `None`: as many as heads.
    pub(crate) num_key_value_heads: Option<usize>,
    /// `None`: hidden size over heads.
    pub(crate) head_dim: Option<usize>,
    /// Name of the key that holds the activation.
    pub(crate) activation_key: &'static str,
    pub(crate) activation: &'static str,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) rope_theta: f64,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) eos_token_id: Option<u32>,
    pub(crate) sliding_window: Option<usize>,
}

pub(crate) const LLAMA: ClassDefaults = ClassDefaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
    rope_theta: 10_000.0,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
    sliding_window: None,
};

pub(crate) const MISTRAL: ClassDefaults = ClassDefaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    sliding_window: Some(4096),
    ..LLAMA
};

pub(crate) const QWEN2: ClassDefaults = ClassDefaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_id: None,
    sliding_window: Some(4096),
    ..LLAMA
};

pub(crate) const QWEN3: ClassDefaults = ClassDefaults { head_dim: Some(128), ..QWEN2 };

pub(crate) const QWEN3_MOE: ClassDefaults = ClassDefaults {
    hidden_size: 2048,
    intermediate_size: 6144,
    num_hidden_layers: 24,
    num_key_value_heads: Some(4),
    ..QWEN2
};

pub(crate) const GPT_OSS: ClassDefaults = ClassDefaults {
    vocab_size: 201_088,
    hidden_size: 2880,
    intermediate_size: 2880,
    num_hidden_layers: 36,
    num_attention_heads: 64,
    num_key_value_heads: Some(8),
    head_dim: Some(64),
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    rope_theta: 150_000.0,
    bos_token_id: None,
    eos_token_id: None,
    sliding_window: Some(128),
    ..LLAMA
};

pub(crate) const GEMMA3: ClassDefaults = ClassDefaults {
    vocab_size: 262_208,
    hidden_size: 2304,
    intermediate_size: 9216,
    num_hidden_layers: 26,
    num_attention_heads: 8,
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    activation_key: "hidden_activation",
    activation: "gelu_pytorch_tanh",
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: true,
    rope_theta: 1_000_000.0,
    bos_token_id: Some(2),
    eos_token_id: Some(1),
    sliding_window: Some(4096),
};

/// `rope_local_base_freq` of Gemma 3.
pub(crate) const GEMMA3_LOCAL_THETA: f64 = 10_000.0;
/// `query_pre_attn_scalar` of Gemma 3.
pub(crate) const GEMMA3_QUERY_SCALAR: f64 = 256.0;
/// `sliding_window_pattern` of Gemma 3: the last of six layers sees everything.
pub(crate) const GEMMA3_PATTERN: usize = 6;
/// `max_window_layers` of Qwen 2 and 3: the layers below see everything.
pub(crate) const QWEN_MAX_WINDOW_LAYERS: usize = 28;

/// The defaults of a draft's configuration: of the class that it names, Llama's if it names none that is known.
pub(crate) fn draft_defaults(model_type: Option<&str>) -> &'static ClassDefaults {
    model_type.and_then(Spec::of_model_type).map_or(&LLAMA, |spec| spec.class)
}

/// RoPE of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    pub(crate) theta: f64,
    pub(crate) scaling: RopeScaling,
}

/// What is wrong with a RoPE table.
pub(crate) enum RopeError {
    Config(HfConfigError),
    /// No such scaling, or a key of it, in words.
    Unsupported(String),
}

impl From<HfConfigError> for RopeError {
    fn from(error: HfConfigError) -> RopeError {
        RopeError::Config(error)
    }
}

/// A table of `rope_parameters` (transformers 5) or `rope_scaling` (4), `None` if there is neither; `theta` is what
/// holds if the table does not say.
pub(crate) fn rope_of(table: Option<&HfConfig>, theta: f64, max_position: usize) -> Result<Rope, RopeError> {
    let Some(table) = table else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = match table.find_str("rope_type")? {
        Some(kind) => kind,
        None => table.find_str("type")?.unwrap_or("default"),
    };
    let float = |key: &str| table.get_f64(key).map(|x| x as f32);
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: float("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: float("factor")?,
            low_freq_factor: float("low_freq_factor")?,
            high_freq_factor: float("high_freq_factor")?,
            original_max_position: table
                .find_usize("original_max_position_embeddings")?
                .unwrap_or(max_position) as u32,
        },
        other => return Err(RopeError::Unsupported(format!("RoPE scaling `{other}`"))),
    };
    if let Some(part) = table.find_f64("partial_rotary_factor")?.filter(|part| *part != 1.0) {
        return Err(RopeError::Unsupported(format!("`partial_rotary_factor` {part}")));
    }
    Ok(Rope { theta: table.find_f64("rope_theta")?.unwrap_or(theta), scaling })
}
