//! What a configuration means where it says nothing: the defaults of transformers' configuration classes.
//!
//! Published configurations leave out what equals the class default, so a reader needs the defaults of every class it
//! reads. They differ where one would not look: a missing `num_key_value_heads` is the number of heads for Llama, but
//! 32 for Qwen and 4 for Gemma 3; only Gemma 3 ties its head. `fixtures/class-defaults` holds what the classes
//! themselves say.

use std::sync::Arc;

use draftsmith_formats::hf_config::{HfConfig, HfConfigError};
use draftsmith_kernels::{RopeScaling, RopeTable};

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

pub(crate) const PHI3: ClassDefaults = ClassDefaults {
    vocab_size: 32_064,
    hidden_size: 3072,
    intermediate_size: 8192,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(32_000),
    ..LLAMA
};

pub(crate) const GEMMA2: ClassDefaults =
    ClassDefaults { vocab_size: 256_000, max_position_embeddings: 8192, rope_theta: 10_000.0, ..GEMMA3 };

pub(crate) const OLMO2: ClassDefaults = ClassDefaults {
    vocab_size: 50_304,
    rms_norm_eps: 1e-5,
    bos_token_id: None,
    eos_token_id: Some(50_279),
    ..LLAMA
};

pub(crate) const SMOLLM3: ClassDefaults = ClassDefaults {
    vocab_size: 128_256,
    hidden_size: 2048,
    num_hidden_layers: 36,
    num_attention_heads: 16,
    num_key_value_heads: Some(4),
    max_position_embeddings: 32_768,
    rope_theta: 2_000_000.0,
    tie_word_embeddings: true,
    bos_token_id: Some(128_000),
    eos_token_id: Some(128_001),
    ..LLAMA
};

pub(crate) const GLM4: ClassDefaults = ClassDefaults {
    vocab_size: 151_552,
    intermediate_size: 13_696,
    num_hidden_layers: 40,
    num_key_value_heads: Some(2),
    head_dim: Some(128),
    max_position_embeddings: 131_072,
    rms_norm_eps: 0.000_000_156_25,
    bos_token_id: None,
    // Three of them: see `Spec::eos_ids`.
    eos_token_id: None,
    ..LLAMA
};

/// `eos_token_id` of GLM-4, also where the key is `null`.
pub(crate) const GLM4_EOS: [u32; 3] = [151_329, 151_336, 151_338];
/// `original_max_position_embeddings` of Phi-3, which stands beside the table there.
pub(crate) const PHI3_ORIGINAL: usize = 4096;
/// `attn_logit_softcapping` and `final_logit_softcapping` of Gemma 2.
pub(crate) const GEMMA2_SOFTCAPS: [f64; 2] = [50.0, 30.0];
/// `no_rope_layer_interval` of SmolLM3: the last of so many layers has no RoPE.
pub(crate) const SMOLLM3_NOPE: usize = 4;
/// `rope_local_base_freq` of Gemma 3.
pub(crate) const GEMMA3_LOCAL_THETA: f64 = 10_000.0;
/// `query_pre_attn_scalar` of Gemma 2 and 3.
pub(crate) const GEMMA_QUERY_SCALAR: f64 = 256.0;
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
    /// Values of a head that are turned.
    pub(crate) rotary_dim: usize,
    /// Factor on cosine and sine.
    pub(crate) magnitude: f64,
    /// LongRoPE: divisors for sequences longer than this, in place of those of `scaling`.
    pub(crate) long: Option<(usize, Vec<f32>)>,
}

impl Rope {
    /// Plain RoPE.
    pub(crate) fn plain(theta: f64, rotary_dim: usize) -> Rope {
        Rope { theta, scaling: RopeScaling::None, rotary_dim, magnitude: 1.0, long: None }
    }

    /// The table for heads of `head_dim`.
    pub(crate) fn table(&self, head_dim: usize) -> Arc<RopeTable> {
        self.table_with(head_dim, &self.scaling)
    }

    /// The table of long sequences, with their length.
    pub(crate) fn long_table(&self, head_dim: usize) -> Option<(usize, Arc<RopeTable>)> {
        let (from, factors) = self.long.as_ref()?;
        Some((*from, self.table_with(head_dim, &RopeScaling::Factors(factors.clone()))))
    }

    fn table_with(&self, head_dim: usize, scaling: &RopeScaling) -> Arc<RopeTable> {
        let table = RopeTable::partial(head_dim, self.rotary_dim, self.theta as f32, scaling);
        Arc::new(match self.magnitude {
            1.0 => table,
            magnitude => table.with_magnitude(magnitude as f32),
        })
    }
}

/// What is wrong with a RoPE table.
pub(crate) enum RopeError {
    Config(HfConfigError),
    /// No such scaling, or a key of it, in words.
    Unsupported(String),
    /// Numbers that contradict each other, in words.
    Shapes(String),
}

impl From<HfConfigError> for RopeError {
    fn from(error: HfConfigError) -> RopeError {
        RopeError::Config(error)
    }
}

/// What a RoPE table is read against.
#[derive(Clone, Copy)]
pub(crate) struct RopeContext {
    /// Holds if the table does not say.
    pub(crate) theta: f64,
    /// Share of a head that is turned, if the table does not say; `None` if the class turns whole heads.
    pub(crate) partial: Option<f64>,
    pub(crate) head_dim: usize,
    pub(crate) max_position: usize,
    /// `original_max_position_embeddings` that stands beside the table: it wins over the one inside.
    pub(crate) original: Option<usize>,
    /// Phi-3 called LongRoPE `su` and `yarn` before it had its name.
    pub(crate) old_names: bool,
}

/// A table of `rope_parameters` (transformers 5) or `rope_scaling` (4), `None` if there is neither.
pub(crate) fn rope_of(table: Option<&HfConfig>, context: RopeContext) -> Result<Rope, RopeError> {
    let RopeContext { head_dim, max_position, .. } = context;
    let part = table.map(|t| t.find_f64("partial_rotary_factor")).transpose()?.flatten();
    let part = match (part.or(context.partial), context.partial) {
        (Some(part), None) if part != 1.0 => {
            return Err(RopeError::Unsupported(format!("`partial_rotary_factor` {part}")));
        }
        (part, _) => part.unwrap_or(1.0),
    };
    let rotary_dim = (head_dim as f64 * part) as usize;
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
        return Err(RopeError::Shapes(format!(
            "`partial_rotary_factor` {part} turns {rotary_dim} of the {head_dim} values of a head"
        )));
    }
    let Some(table) = table else { return Ok(Rope::plain(context.theta, rotary_dim)) };
    let kind = match table.find_str("rope_type")? {
        Some(kind) => kind,
        None => table.find_str("type")?.unwrap_or("default"),
    };
    let theta = table.find_f64("rope_theta")?.unwrap_or(context.theta);
    let original = || -> Result<usize, HfConfigError> {
        let beside = table.find_usize("original_max_position_embeddings")?;
        Ok(context.original.or(beside).unwrap_or(max_position))
    };
    // YaRN and LongRoPE allow `null` for what the lengths give.
    let factor = || -> Result<f64, HfConfigError> {
        Ok(match table.find_f64("factor")? {
            Some(factor) => factor,
            None => max_position as f64 / original()?.max(1) as f64,
        })
    };
    let mut rope = Rope::plain(theta, rotary_dim);
    let float = |key: &str| table.get_f64(key).map(|x| x as f32);
    match kind {
        "default" => {}
        "linear" => rope.scaling = RopeScaling::Linear { factor: float("factor")? },
        "llama3" => {
            rope.scaling = RopeScaling::Llama3 {
                factor: float("factor")?,
                low_freq_factor: float("low_freq_factor")?,
                high_freq_factor: float("high_freq_factor")?,
                original_max_position: original()? as u32,
            };
        }
        "longrope" | "su" | "yarn" if kind == "longrope" || context.old_names => {
            let original = original()?;
            let factor = factor()?;
            let divisors = |key: &str| -> Result<Vec<f32>, RopeError> {
                let list = table.get_f64_list(key)?;
                if list.len() != rotary_dim / 2 {
                    return Err(RopeError::Shapes(format!(
                        "`{key}` has {} entries for {} frequencies",
                        list.len(),
                        rotary_dim / 2
                    )));
                }
                Ok(list.into_iter().map(|x| x as f32).collect())
            };
            rope.scaling = RopeScaling::Factors(divisors("short_factor")?);
            rope.long = Some((original, divisors("long_factor")?));
            rope.magnitude = match table.find_f64("attention_factor")? {
                Some(magnitude) => magnitude,
                None => long_magnitude(factor, original),
            };
        }
        "yarn" => {
            let factor = factor()?;
            // Zero counts as absent there.
            let number = |key: &str| Ok::<_, HfConfigError>(table.find_f64(key)?.filter(|x| *x != 0.0));
            let yarn = Yarn {
                factor,
                original: original()?,
                beta_fast: number("beta_fast")?.unwrap_or(32.0),
                beta_slow: number("beta_slow")?.unwrap_or(1.0),
                truncate: table.find_bool("truncate")?.unwrap_or(true),
            };
            rope.scaling = yarn.scaling(theta, rotary_dim);
            rope.magnitude = match table.find_f64("attention_factor")? {
                Some(magnitude) => magnitude,
                None => match (number("mscale")?, number("mscale_all_dim")?) {
                    (Some(one), Some(all)) => yarn_magnitude(factor, one) / yarn_magnitude(factor, all),
                    _ => yarn_magnitude(factor, 1.0),
                },
            };
        }
        other => return Err(RopeError::Unsupported(format!("RoPE scaling `{other}`"))),
    }
    Ok(rope)
}

/// What LongRoPE puts on cosine and sine for a context that is `factor` times the original one.
pub(crate) fn long_magnitude(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
}

/// What YaRN puts on cosine and sine.
pub(crate) fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// RoPE of gpt-oss where nothing is said.
pub(crate) fn gpt_oss_rope(theta: f64, head_dim: usize) -> Rope {
    let yarn = Yarn { factor: 32.0, original: 4096, beta_fast: 32.0, beta_slow: 1.0, truncate: false };
    Rope {
        scaling: yarn.scaling(theta, head_dim),
        magnitude: yarn_magnitude(yarn.factor, 1.0),
        ..Rope::plain(theta, head_dim)
    }
}

/// YaRN: frequencies that turn often within the original context are kept, those that turn rarely are divided, with a
/// ramp between.
#[derive(Clone, Copy)]
pub(crate) struct Yarn {
    pub(crate) factor: f64,
    pub(crate) original: usize,
    pub(crate) beta_fast: f64,
    pub(crate) beta_slow: f64,
    /// The ramp begins and ends at whole pairs.
    pub(crate) truncate: bool,
}

impl Yarn {
    /// The divisors of all frequencies.
    pub(crate) fn scaling(&self, theta: f64, rotary_dim: usize) -> RopeScaling {
        // The pair that turns so many times within the original context.
        let pair = |turns: f64| {
            let wavelength = self.original as f64 / (turns * 2.0 * std::f64::consts::PI);
            rotary_dim as f64 * wavelength.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let divisor = |i: usize| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / (ramp / self.factor + 1.0 - ramp)) as f32
        };
        RopeScaling::Factors((0..rotary_dim / 2).map(divisor).collect())
    }
}
