//! What a target is: a family is a set of switches read from its configuration, not a copy of the forward.

use std::sync::Arc;

use draftsmith_formats::gguf::{GgufArray, GgufFile, GgufValue};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling, RopeTable};

use crate::ModelError;
use crate::classes::{
    GEMMA3_LOCAL_THETA, GEMMA3_PATTERN, GEMMA3_QUERY_SCALAR, QWEN_MAX_WINDOW_LAYERS, Rope, RopeError,
    class_defaults, rope_of,
};

/// Families whose forward is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2/3, SmolLM.
    Llama,
    /// Mistral: Llama with a sliding window on every layer, or on none. In GGUF files it is a Llama.
    Mistral,
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
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
        }
    }

    /// `model_type` of its configuration class.
    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Family::Gemma3 => "gemma3_text",
            other => other.name(),
        }
    }

    /// The class name in a Hugging Face `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
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

/// A class name in `architectures` for a configuration that names no `model_type`.
fn model_type_of(architectures: &[String]) -> Option<&'static str> {
    architectures.iter().find_map(|name| match name.as_str() {
        "LlamaForCausalLM" => Some("llama"),
        "MistralForCausalLM" => Some("mistral"),
        "Qwen2ForCausalLM" => Some("qwen2"),
        "Qwen3ForCausalLM" => Some("qwen3"),
        "Gemma3ForCausalLM" => Some("gemma3_text"),
        "Gemma3ForConditionalGeneration" => Some("gemma3"),
        _ => None,
    })
}

/// Token ids under a key: `None` if it is absent, none of them if it is `null`.
fn token_ids(config: &HfConfig, key: &str) -> Result<Option<Vec<u32>>, ModelError> {
    if config.is_null(key) {
        return Ok(Some(Vec::new()));
    }
    let ids = config.find_usize_list(key)?;
    Ok(ids.map(|ids| ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()))
}

impl TargetConfig {
    /// Reads a Hugging Face `config.json`. Keys that it leaves out have the defaults of transformers' configuration
    /// class; `null` is what it is there.
    pub fn from_hf(root: &HfConfig) -> Result<TargetConfig, ModelError> {
        let place = root.path().display().to_string();
        let unsupported = |what: String| ModelError::Unsupported { place: place.clone(), what };
        let named = match root.find_str("model_type")? {
            Some(name) => Some(name),
            None => model_type_of(&root.find_str_list("architectures")?.unwrap_or_default()),
        };
        // Multimodal checkpoints keep the language model's keys in `text_config`; of Gemma 3 it may be missing whole.
        let multimodal = named == Some("gemma3");
        let nested = match root.find_table("text_config")? {
            None if multimodal => Some(root.empty_table("text_config")),
            table => table,
        };
        let config = nested.as_ref().unwrap_or(root);
        let own = nested.as_ref().map(|n| n.find_str("model_type")).transpose()?.flatten();
        let model_type = match own.or(named) {
            Some("gemma3") => "gemma3_text",
            Some(name) => name,
            None => root.get_str("model_type")?,
        };
        let unknown =
            || ModelError::UnknownArchitecture { place: place.clone(), found: model_type.to_owned() };
        let class = class_defaults(model_type).ok_or_else(unknown)?;
        let family = match model_type {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3_text" => Family::Gemma3,
            _ => return Err(unknown()),
        };
        let gemma = family == Family::Gemma3;
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if config.get(key).is_some() {
                return Err(unsupported(format!("`{key}`")));
            }
        }
        if gemma && config.find_bool("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(unsupported("`use_bidirectional_attention`".into()));
        }
        let size = |key: &str, default: usize| config.find_usize(key).map(|n| n.unwrap_or(default));
        let hidden_size = size("hidden_size", class.hidden_size)?;
        let num_heads = size("num_attention_heads", class.num_attention_heads)?;
        let num_layers = size("num_hidden_layers", class.num_hidden_layers)?;
        let max_position = size("max_position_embeddings", class.max_position_embeddings)?;
        let head_dim = match config.find_usize("head_dim")?.or(class.head_dim) {
            Some(dim) => dim,
            None => hidden_size / num_heads.max(1),
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 || num_layers > 1 << 16 {
            return Err(ModelError::Shapes {
                place,
                what: format!("head size is {head_dim}, layers {num_layers}"),
            });
        }
        let num_kv_heads = match config.find_usize("num_key_value_heads")? {
            Some(heads) => heads,
            None if config.is_null("num_key_value_heads") => num_heads,
            None => class.num_key_value_heads.unwrap_or(num_heads),
        };
        let activation = match config.find_str(class.activation_key)?.unwrap_or(class.activation) {
            "silu" | "swish" => Activation::Silu,
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => return Err(unsupported(format!("activation `{other}`"))),
        };
        if config.find_bool("mlp_bias")?.unwrap_or(false) {
            return Err(unsupported("`mlp_bias`".into()));
        }
        // Qwen 2 has its biases whatever the key says.
        if family != Family::Qwen2 && config.find_bool("attention_bias")?.unwrap_or(false) {
            return Err(unsupported("`attention_bias`".into()));
        }
        if let Some(part) = config.find_f64("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(unsupported(format!("`partial_rotary_factor` {part}")));
        }
        let windows = windows(config, family, num_layers)?;
        let sliding = windows.iter().any(Option::is_some);
        let (rope, local) =
            ropes(config, family, sliding, class.rope_theta, max_position).map_err(|e| match e {
                RopeError::Config(error) => error.into(),
                RopeError::Unsupported(what) => unsupported(what),
            })?;
        let eos_ids = match (token_ids(config, "eos_token_id")?, nested.is_some()) {
            (Some(ids), _) => Some(ids),
            // The whole model's own word, where the language model says nothing.
            (None, true) => token_ids(root, "eos_token_id")?,
            (None, false) => None,
        };
        let bos_id = match (token_ids(config, "bos_token_id")?, nested.is_some()) {
            (Some(ids), _) => ids.first().copied(),
            (None, true) => {
                token_ids(root, "bos_token_id")?.map_or(class.bos_token_id, |ids| ids.first().copied())
            }
            (None, false) => class.bos_token_id,
        };
        // The language model inside a larger one is tied as the larger one says.
        let tied = match root.find_bool("tie_word_embeddings")? {
            Some(tied) => tied,
            None => config.find_bool("tie_word_embeddings")?.unwrap_or(class.tie_word_embeddings),
        };
        let query_scale = match gemma {
            true => config.find_f64("query_pre_attn_scalar")?.unwrap_or(GEMMA3_QUERY_SCALAR),
            false => head_dim as f64,
        };
        let table = |rope: &Rope| Arc::new(RopeTable::new(head_dim, rope.theta as f32, &rope.scaling));
        let made = TargetConfig {
            family,
            vocab_size: size("vocab_size", class.vocab_size)?,
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            intermediate_size: size("intermediate_size", class.intermediate_size)?,
            rms_norm_eps: config.find_f64("rms_norm_eps")?.unwrap_or(class.rms_norm_eps) as f32,
            rope: table(&rope),
            rope_theta: rope.theta as f32,
            rope_scaling: rope.scaling,
            rope_local: local.as_ref().map(table),
            windows,
            activation,
            qkv_bias: family == Family::Qwen2,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            post_norms: gemma,
            norm_plus_one: gemma,
            embed_scale: if gemma { (hidden_size as f32).sqrt() } else { 1.0 },
            attention_scale: 1.0 / (query_scale as f32).sqrt(),
            tied,
            max_position,
            bos_id,
            eos_ids: eos_ids.unwrap_or_else(|| class.eos_token_id.into_iter().collect()),
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

/// `[layers]` window of each layer, as the family's class derives them.
fn windows(config: &HfConfig, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let default = class_defaults(family.model_type()).and_then(|class| class.sliding_window);
    // A window of `null` is none, an absent one the class's.
    let window = match config.find_usize("sliding_window")? {
        Some(window) => Some(window),
        None if config.is_null("sliding_window") => None,
        None => default,
    };
    let types = config.find_str_list("layer_types")?;
    let typed = |window: Option<usize>,
                 otherwise: &dyn Fn(usize) -> bool|
     -> Result<Vec<Option<usize>>, ModelError> {
        let unsupported =
            |what: String| Err(ModelError::Unsupported { place: config.path().display().to_string(), what });
        if let Some(types) = &types {
            if let Some(other) =
                types.iter().find(|t| !matches!(t.as_str(), "full_attention" | "sliding_attention"))
            {
                return unsupported(format!("layers of type `{other}`"));
            }
            if types.len() != num_layers {
                return Err(ModelError::Shapes {
                    place: config.path().display().to_string(),
                    what: format!("`layer_types` has {} entries for {num_layers} layers", types.len()),
                });
            }
        }
        let sliding = |layer: usize| match &types {
            Some(types) => types[layer] == "sliding_attention",
            None => otherwise(layer),
        };
        Ok((0..num_layers).map(|layer| window.filter(|_| sliding(layer))).collect())
    };
    match family {
        // Its class knows no windows, whatever the file says.
        Family::Llama => Ok(vec![None; num_layers]),
        Family::Mistral => Ok(vec![window; num_layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let window = window.filter(|_| matches!(config.find_bool("use_sliding_window"), Ok(Some(true))));
            config.find_bool("use_sliding_window")?;
            let first = config.find_usize("max_window_layers")?.unwrap_or(QWEN_MAX_WINDOW_LAYERS);
            typed(window, &|layer| layer >= first)
        }
        Family::Gemma3 => {
            let pattern = config.find_usize("sliding_window_pattern")?.unwrap_or(GEMMA3_PATTERN).max(1);
            typed(window, &|layer| !(layer + 1).is_multiple_of(pattern))
        }
    }
}

/// RoPE of the layers that see everything, and of those with a window where it is another.
fn ropes(
    config: &HfConfig,
    family: Family,
    sliding: bool,
    theta: f64,
    max_position: usize,
) -> Result<(Rope, Option<Rope>), RopeError> {
    let filled = |key: &str| -> Result<Option<HfConfig>, RopeError> {
        Ok(config.find_table(key)?.filter(|table| !table.map().is_empty()))
    };
    let (old, new) = (filled("rope_scaling")?, filled("rope_parameters")?);
    let theta = config.find_f64("rope_theta")?.unwrap_or(theta);
    if family == Family::Gemma3 {
        // Only nested tables count there, and the old one is laid over the new.
        let part = |key: &str| new.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
        let full = match (part("full_attention")?, old) {
            (Some(new), Some(old)) => Some(new.overlaid(&old)),
            (new, old) => new.or(old),
        };
        let local_theta = config.find_f64("rope_local_base_freq")?.unwrap_or(GEMMA3_LOCAL_THETA);
        let local = rope_of(part("sliding_attention")?.as_ref(), local_theta, max_position)?;
        return Ok((rope_of(full.as_ref(), theta, max_position)?, Some(local)));
    }
    let table = old.or(new);
    let part = |key: &str| table.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
    let (full, local) = (part("full_attention")?, part("sliding_attention")?);
    if full.is_none() && local.is_none() {
        return Ok((rope_of(table.as_ref(), theta, max_position)?, None));
    }
    let full = rope_of(full.as_ref(), theta, max_position)?;
    let local = rope_of(local.as_ref(), theta, max_position)?;
    let differs = sliding && local != full;
    Ok((full, differs.then_some(local)))
}
