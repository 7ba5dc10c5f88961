//! What a target is: a family is a set of switches read from its configuration, not a copy of the forward.

use std::sync::Arc;

use draftsmith_formats::gguf::{GgufArray, GgufFile, GgufValue};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling, RopeTable};

use crate::ModelError;

/// Families whose forward is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2/3, SmolLM, Mistral without sliding window.
    Llama,
    /// Qwen2 and 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3 dense: norms on q and k heads.
    Qwen3,
    /// Gemma 3 text: four norms a layer, two RoPE bases, sliding windows.
    Gemma3,
}

impl Family {
    /// The word used in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
        }
    }

    /// The class name in a Hugging Face `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Gemma3 => "Gemma3ForCausalLM",
        }
    }
}

/// Shapes and switches of a target.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Which family.
    pub family: Family,
    /// `V`
    pub vocab_size: usize,
    /// `Ht`
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// MLP width.
    pub intermediate_size: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// RoPE base of full-attention layers.
    pub rope_theta: f32,
    /// RoPE scaling of full-attention layers.
    pub rope_scaling: RopeScaling,
    /// RoPE table of full-attention layers.
    pub rope: Arc<RopeTable>,
    /// RoPE table of sliding-window layers (Gemma 3).
    pub rope_local: Option<Arc<RopeTable>>,
    /// `[layers]` window of each layer in positions, `None` for full attention.
    pub windows: Vec<Option<usize>>,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Norms on q and k heads.
    pub qk_norm: bool,
    /// Norms on the outputs of attention and MLP (Gemma 3).
    pub post_norms: bool,
    /// Stored norm weights are `w - 1` (Gemma in safetensors).
    pub norm_plus_one: bool,
    /// Factor on embeddings.
    pub embed_scale: f32,
    /// Factor on attention logits.
    pub attention_scale: f32,
    /// The head is the embedding table.
    pub tied: bool,
    /// Longest context of the model.
    pub max_position: usize,
    /// Beginning-of-sequence id.
    pub bos_id: Option<u32>,
    /// Ids that end an answer.
    pub eos_ids: Vec<u32>,
}

fn check_sizes(c: &TargetConfig, place: &str) -> Result<(), ModelError> {
    let bad = |what: String| Err(ModelError::Shapes { place: place.to_owned(), what });
    for (name, n) in [
        ("vocabulary", c.vocab_size),
        ("hidden size", c.hidden_size),
        ("layers", c.num_layers),
        ("heads", c.num_heads),
        ("key heads", c.num_kv_heads),
        ("head size", c.head_dim),
        ("MLP width", c.intermediate_size),
    ] {
        if n == 0 || n > 1 << 24 {
            return bad(format!("{name} is {n}"));
        }
    }
    if !c.num_heads.is_multiple_of(c.num_kv_heads) {
        return bad(format!("{} heads are not a multiple of {} key heads", c.num_heads, c.num_kv_heads));
    }
    if !c.head_dim.is_multiple_of(2) {
        return bad(format!("head size {} is odd", c.head_dim));
    }
    Ok(())
}

/// Reads `rope_parameters` (transformers 5) or `rope_scaling` (4) of one layer kind.
fn rope_scaling(table: &HfConfig) -> Result<RopeScaling, ModelError> {
    let kind = match table.find_str("rope_type")? {
        Some(kind) => kind,
        None => table.find_str("type")?.unwrap_or("default"),
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: table.get_f64("factor")? as f32 },
        "llama3" => RopeScaling::Llama3 {
            factor: table.get_f64("factor")? as f32,
            low_freq_factor: table.get_f64("low_freq_factor")? as f32,
            high_freq_factor: table.get_f64("high_freq_factor")? as f32,
            original_max_position: table.get_usize("original_max_position_embeddings")? as u32,
        },
        other => {
            return Err(ModelError::Unsupported {
                place: table.path().display().to_string(),
                what: format!("RoPE scaling `{other}`"),
            });
        }
    })
}

impl TargetConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf(root: &HfConfig) -> Result<TargetConfig, ModelError> {
        let place = root.path().display().to_string();
        // Multimodal checkpoints keep the language model's keys in `text_config`.
        let nested = root.find_table("text_config")?;
        let config = nested.as_ref().unwrap_or(root);
        let model_type = match config.find_str("model_type")? {
            Some(t) => t,
            None => root.get_str("model_type")?,
        };
        let family = match model_type {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3_text" => Family::Gemma3,
            other => return Err(ModelError::UnknownArchitecture { place, found: other.to_owned() }),
        };
        let unsupported = |what: String| ModelError::Unsupported { place: place.clone(), what };
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if config.get(key).is_some() {
                return Err(unsupported(format!("`{key}`")));
            }
        }
        let (hidden_size, num_heads) =
            (config.get_usize("hidden_size")?, config.get_usize("num_attention_heads")?);
        let num_layers = config.get_usize("num_hidden_layers")?;
        let head_dim = match config.find_usize("head_dim")? {
            Some(dim) => dim,
            None => hidden_size / num_heads.max(1),
        };
        let gemma = family == Family::Gemma3;
        let act_key = if gemma { "hidden_activation" } else { "hidden_act" };
        let activation =
            match config.find_str(act_key)?.unwrap_or(if gemma { "gelu_pytorch_tanh" } else { "silu" }) {
                "silu" => Activation::Silu,
                "gelu_pytorch_tanh" => Activation::GeluTanh,
                other => return Err(unsupported(format!("activation `{other}`"))),
            };
        if config.find_bool("mlp_bias")?.unwrap_or(false) {
            return Err(unsupported("`mlp_bias`".into()));
        }
        let attention_bias = config.find_bool("attention_bias")?.unwrap_or(false);
        if attention_bias && family != Family::Qwen2 {
            return Err(unsupported("`attention_bias`".into()));
        }
        // Full-attention RoPE.
        let parameters = config.find_table("rope_parameters")?;
        let full = match &parameters {
            Some(p) => Some(p.find_table("full_attention")?.unwrap_or_else(|| p.clone())),
            None => config.find_table("rope_scaling")?,
        };
        let default_theta = if gemma { 1e6 } else { 1e4 };
        let theta = match full.as_ref().map(|f| f.find_f64("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => config.find_f64("rope_theta")?.unwrap_or(default_theta),
        } as f32;
        let scaling = full.as_ref().map_or(Ok(RopeScaling::None), rope_scaling)?;
        // Windows.
        let (mut windows, mut rope_local) = (vec![None; num_layers], None);
        let layer_types = config.find_str_list("layer_types")?;
        let window = config.find_usize("sliding_window")?;
        if gemma {
            let window = window.unwrap_or(4096);
            let pattern = config.find_usize("sliding_window_pattern")?.unwrap_or(6).max(1);
            for (l, w) in windows.iter_mut().enumerate() {
                let sliding = match &layer_types {
                    Some(types) => types.get(l).is_some_and(|t| t == "sliding_attention"),
                    None => !(l + 1).is_multiple_of(pattern),
                };
                *w = sliding.then_some(window);
            }
            let local = parameters.as_ref().map(|p| p.find_table("sliding_attention")).transpose()?.flatten();
            let local_theta = match local.map(|l| l.find_f64("rope_theta")).transpose()?.flatten() {
                Some(theta) => theta,
                None => config.find_f64("rope_local_base_freq")?.unwrap_or(1e4),
            };
            rope_local = Some(Arc::new(RopeTable::new(head_dim, local_theta as f32, &RopeScaling::None)));
        } else if let Some(types) = &layer_types {
            if types.iter().any(|t| t != "full_attention") {
                return Err(unsupported("sliding-window layers in this family".into()));
            }
        } else if window.is_some()
            && config.find_bool("use_sliding_window")?.unwrap_or(family == Family::Llama)
        {
            return Err(unsupported("sliding-window layers in this family".into()));
        }
        let eos_ids = match config.get("eos_token_id") {
            Some(v) if v.is_array() => config
                .find_usize_list("eos_token_id")?
                .unwrap_or_default()
                .into_iter()
                .map(|i| i as u32)
                .collect(),
            Some(_) => config.find_usize("eos_token_id")?.into_iter().map(|i| i as u32).collect(),
            None => Vec::new(),
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 || num_layers > 1 << 16 {
            return Err(ModelError::Shapes {
                place,
                what: format!("head size is {head_dim}, layers {num_layers}"),
            });
        }
        let query_scale =
            config.find_f64("query_pre_attn_scalar")?.filter(|_| gemma).unwrap_or(head_dim as f64);
        let made = TargetConfig {
            family,
            vocab_size: config.get_usize("vocab_size")?,
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads: config.find_usize("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            intermediate_size: config.get_usize("intermediate_size")?,
            rms_norm_eps: config.find_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: Arc::new(RopeTable::new(head_dim, theta, &scaling)),
            rope_theta: theta,
            rope_scaling: scaling,
            rope_local,
            windows,
            activation,
            qkv_bias: family == Family::Qwen2,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            post_norms: gemma,
            norm_plus_one: gemma,
            embed_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
            attention_scale: 1.0 / (query_scale as f32).sqrt(),
            tied: config.find_bool("tie_word_embeddings")?.unwrap_or(gemma),
            max_position: config.find_usize("max_position_embeddings")?.unwrap_or(8192),
            bos_id: config.find_usize("bos_token_id")?.map(|i| i as u32),
            eos_ids,
        };
        check_sizes(&made, &place)?;
        Ok(made)
    }

    /// Reads GGUF metadata.
    pub fn from_gguf(file: &GgufFile<'_>) -> Result<TargetConfig, ModelError> {
        let place = file.path().map_or_else(|| "GGUF".to_owned(), |p| p.display().to_string());
        let arch = file.get_str("general.architecture")?;
        let family = match arch {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3" => Family::Gemma3,
            other => return Err(ModelError::UnknownArchitecture { place, found: other.to_owned() }),
        };
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| file.get_u64(&key(name)).map(|n| n as usize);
        let gemma = family == Family::Gemma3;
        if file.find_u32(&key("expert_count"))?.unwrap_or(0) > 0 {
            return Err(ModelError::Unsupported { place, what: "mixture of experts".into() });
        }
        let (hidden_size, num_heads, num_layers) =
            (size("embedding_length")?, size("attention.head_count")?, size("block_count")?);
        let head_dim = match file.find_u64(&key("attention.key_length"))? {
            Some(n) => n as usize,
            None => hidden_size / num_heads.max(1),
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 || num_layers > 1 << 16 {
            return Err(ModelError::Shapes {
                place,
                what: format!("head size is {head_dim}, layers {num_layers}"),
            });
        }
        if let Some(rotated) = file.find_u64(&key("rope.dimension_count"))?
            && rotated as usize != head_dim
        {
            return Err(ModelError::Unsupported {
                place,
                what: format!("RoPE on {rotated} of {head_dim} values"),
            });
        }
        let theta = file.find_f32(&key("rope.freq_base"))?.unwrap_or(if gemma { 1e6 } else { 1e4 });
        let scaling = match file.find_tensor("rope_freqs.weight") {
            Some(info) if info.elements() == head_dim / 2 && info.byte_len == head_dim * 2 => {
                let factors: Vec<f32> = file
                    .data(info)
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                RopeScaling::Factors(factors)
            }
            Some(_) => {
                return Err(ModelError::Shapes {
                    place,
                    what: "`rope_freqs.weight` does not match the head size".into(),
                });
            }
            None => match file.find_str(&key("rope.scaling.type"))? {
                None | Some("none") => RopeScaling::None,
                Some("linear") => RopeScaling::Linear { factor: file.get_f32(&key("rope.scaling.factor"))? },
                Some(other) => {
                    return Err(ModelError::Unsupported { place, what: format!("RoPE scaling `{other}`") });
                }
            },
        };
        let (mut windows, mut rope_local) = (vec![None; num_layers], None);
        if gemma {
            let window = file.find_u32(&key("attention.sliding_window"))?.unwrap_or(4096) as usize;
            // Newer files say which layers slide; older ones mean one full layer in six.
            let pattern = match file.get(&key("attention.sliding_window_pattern")) {
                Some(GgufValue::Array(GgufArray::Bool(pattern))) => Some(pattern.as_slice()),
                _ => None,
            };
            for (l, w) in windows.iter_mut().enumerate() {
                let sliding = match pattern {
                    Some(p) => p.get(l).copied().unwrap_or(false),
                    None => !(l + 1).is_multiple_of(6),
                };
                *w = sliding.then_some(window);
            }
            let local_theta = file.find_f32(&key("rope.freq_base_swa"))?.unwrap_or(1e4);
            rope_local = Some(Arc::new(RopeTable::new(head_dim, local_theta, &RopeScaling::None)));
        } else if file.find_u32(&key("attention.sliding_window"))?.unwrap_or(0) > 0 {
            return Err(ModelError::Unsupported {
                place,
                what: "sliding-window layers in this family".into(),
            });
        }
        let embedding = file.tensor("token_embd.weight")?;
        let mut eos_ids: Vec<u32> = file.find_u32("tokenizer.ggml.eos_token_id")?.into_iter().collect();
        eos_ids.extend(file.find_u32("tokenizer.ggml.eot_token_id")?.filter(|e| !eos_ids.contains(e)));
        let made = TargetConfig {
            family,
            vocab_size: embedding.dims.get(1).copied().unwrap_or(0),
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads: file.find_u64(&key("attention.head_count_kv"))?.map_or(num_heads, |n| n as usize),
            head_dim,
            intermediate_size: size("feed_forward_length")?,
            rms_norm_eps: file.get_f32(&key("attention.layer_norm_rms_epsilon"))?,
            rope: Arc::new(RopeTable::new(head_dim, theta, &scaling)),
            rope_theta: theta,
            rope_scaling: scaling,
            rope_local,
            windows,
            activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
            qkv_bias: family == Family::Qwen2,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            post_norms: gemma,
            // The converter has added the one already.
            norm_plus_one: false,
            embed_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
            attention_scale: match file.find_f32(&key("attention.scale"))? {
                Some(scale) => scale,
                // Gemma 3 27B, the one with 62 layers, scales by hidden size per head.
                None if gemma && num_layers == 62 => 1.0 / (hidden_size as f32 / num_heads as f32).sqrt(),
                None => 1.0 / (head_dim as f32).sqrt(),
            },
            tied: file.find_tensor("output.weight").is_none(),
            max_position: file.find_u64(&key("context_length"))?.unwrap_or(8192) as usize,
            bos_id: file.find_u32("tokenizer.ggml.bos_token_id")?,
            eos_ids,
        };
        check_sizes(&made, &place)?;
        Ok(made)
    }

    /// Values of one row of keys.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Values of one row of queries.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }
}
