//! The two places that say what a model is, a Hugging Face `config.json` and the metadata of a GGUF file, behind one
//! interface: [`crate::TargetConfig`] is read once, from either.
//!
//! They differ in what silence means: a key that `config.json` leaves out has the default of its class
//! ([`crate::classes`]), GGUF files write all sizes.

use draftsmith_formats::gguf::{GgufArray, GgufFile, GgufValue};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling};

use crate::ModelError;
use crate::classes::{
    GEMMA_QUERY_SCALAR, GEMMA3_LOCAL_THETA, PHI3_ORIGINAL, QWEN_MAX_WINDOW_LAYERS, Rope, RopeContext,
    RopeError, Yarn, gpt_oss_rope, long_magnitude, rope_of, yarn_magnitude,
};
use crate::family::{Bias, EmbedScale, Family, Spec, WindowRule};
use crate::load::Part;
use crate::moe::{self, ExpertsConfig};

/// Sizes and numbers that both containers have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    HiddenSize,
    Layers,
    Heads,
    KvHeads,
    HeadDim,
    MlpWidth,
    NormEps,
    MaxPosition,
}

impl Key {
    /// Its names: in `config.json`, and in GGUF metadata behind the architecture.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Key::HiddenSize => ("hidden_size", "embedding_length"),
            Key::Layers => ("num_hidden_layers", "block_count"),
            Key::Heads => ("num_attention_heads", "attention.head_count"),
            Key::KvHeads => ("num_key_value_heads", "attention.head_count_kv"),
            Key::HeadDim => ("head_dim", "attention.key_length"),
            Key::MlpWidth => ("intermediate_size", "feed_forward_length"),
            Key::NormEps => ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
            Key::MaxPosition => ("max_position_embeddings", "context_length"),
        }
    }
}

/// RoPE of the layers that see everything, and of those with a window where it is another.
pub(crate) struct Ropes {
    pub(crate) full: Rope,
    pub(crate) local: Option<Rope>,
}

/// Factors outside attention.
pub(crate) struct Multipliers {
    pub(crate) embed_scale: f32,
    pub(crate) residual_scale: f32,
    pub(crate) logit_divisor: f32,
}

/// What a description of a model says.
pub(crate) trait Keys {
    /// The file, for messages.
    fn place(&self) -> String;
    /// The family that it names.
    fn spec(&self) -> &'static Spec;
    /// A size that every model has.
    fn size(&self, key: Key) -> Result<usize, ModelError>;
    /// A size that follows from others where it is not given.
    fn find_size(&self, key: Key) -> Result<Option<usize>, ModelError>;
    /// A number that every model has.
    fn float(&self, key: Key) -> Result<f64, ModelError>;
    /// Tokens of the vocabulary.
    fn vocab_size(&self) -> Result<usize, ModelError>;
    /// Non-linearity of the MLP.
    fn activation(&self) -> Result<Activation, ModelError>;
    /// Refuses what is asked for and not built.
    fn refuse_unbuilt(&self) -> Result<(), ModelError>;
    /// Experts, of families that have them.
    fn experts(&self, num_layers: usize) -> Result<Option<ExpertsConfig>, ModelError>;
    /// `[layers]` window of each layer, `None` for full attention.
    fn windows(&self, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError>;
    /// RoPE; `sliding` if any layer has a window.
    fn ropes(&self, head_dim: usize, sliding: bool, max_position: usize) -> Result<Ropes, ModelError>;
    /// `[layers]` whether a layer has RoPE.
    fn turned_layers(&self, num_layers: usize) -> Result<Vec<bool>, ModelError>;
    /// Biases on q, k and v; on the output projection; in the MLP.
    fn biases(&self) -> Result<[bool; 3], ModelError>;
    /// Caps on attention logits and on logits.
    fn softcaps(&self) -> Result<[Option<f32>; 2], ModelError>;
    /// Factors outside attention.
    fn multipliers(&self, hidden_size: usize) -> Result<Multipliers, ModelError>;
    /// Factor on attention logits, from sizes where nothing is said.
    fn attention_scale(&self, sizes: [usize; 4]) -> Result<f32, ModelError>;
    /// The head is the embedding table.
    fn tied(&self) -> Result<bool, ModelError>;
    /// Beginning-of-sequence id.
    fn bos_id(&self) -> Result<Option<u32>, ModelError>;
    /// Ids that end an answer.
    fn eos_ids(&self) -> Result<Vec<u32>, ModelError>;
    /// Norm weights are stored without Gemma's one.
    fn stores_norms_minus_one(&self) -> bool;

    /// A cap, if it is one.
    fn checked_cap(&self, key: &str, cap: Option<f64>) -> Result<Option<f32>, ModelError> {
        match cap {
            Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
                Err(ModelError::Shapes { place: self.place(), what: format!("`{key}` is {cap}") })
            }
            cap => Ok(cap.map(|cap| cap as f32)),
        }
    }

    /// What logits are divided by, if it keeps their order.
    fn checked_divisor(&self, key: &str, divisor: f32) -> Result<f32, ModelError> {
        match divisor > 0.0 && divisor.is_finite() {
            true => Ok(divisor),
            false => Err(ModelError::Shapes { place: self.place(), what: format!("`{key}` is {divisor}") }),
        }
    }
}

/// A `config.json`, with the table inside it that describes the language model.
pub(crate) struct HfKeys<'a> {
    root: &'a HfConfig,
    nested: Option<HfConfig>,
    spec: &'static Spec,
}

/// A class name in `architectures` for a configuration that names no `model_type`.
fn model_type_of(architectures: &[String]) -> Option<&'static str> {
    architectures.iter().find_map(|name| match name.as_str() {
        "Gemma3ForConditionalGeneration" => Some("gemma3"),
        name => crate::family::FAMILIES.iter().find(|f| f.architecture == name).map(|f| f.model_type),
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

impl<'a> HfKeys<'a> {
    /// Finds out which family it is.
    pub(crate) fn of(root: &'a HfConfig) -> Result<HfKeys<'a>, ModelError> {
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
        let own = nested.as_ref().map(|n| n.find_str("model_type")).transpose()?.flatten();
        let model_type = match own.or(named) {
            Some("gemma3") => "gemma3_text",
            Some(name) => name,
            None => root.get_str("model_type")?,
        };
        let spec = Spec::of_model_type(model_type).ok_or_else(|| ModelError::UnknownArchitecture {
            place: root.path().display().to_string(),
            found: model_type.to_owned(),
        })?;
        Ok(HfKeys { root, nested, spec })
    }

    fn config(&self) -> &HfConfig {
        self.nested.as_ref().unwrap_or(self.root)
    }

    fn unsupported<T>(&self, what: String) -> Result<T, ModelError> {
        Err(ModelError::Unsupported { place: self.place(), what })
    }

    fn layer_types(&self, num_layers: usize) -> Result<Option<Vec<String>>, ModelError> {
        let Some(types) = self.config().find_str_list("layer_types")? else { return Ok(None) };
        if let Some(other) =
            types.iter().find(|t| !matches!(t.as_str(), "full_attention" | "sliding_attention"))
        {
            return self.unsupported(format!("layers of type `{other}`"));
        }
        if types.len() != num_layers {
            return Err(ModelError::Shapes {
                place: self.place(),
                what: format!("`layer_types` has {} entries for {num_layers} layers", types.len()),
            });
        }
        Ok(Some(types))
    }

    fn raw_ropes(&self, head_dim: usize, sliding: bool, max_position: usize) -> Result<Ropes, RopeError> {
        let config = self.config();
        let filled = |key: &str| -> Result<Option<HfConfig>, RopeError> {
            Ok(config.find_table(key)?.filter(|table| !table.map().is_empty()))
        };
        let (old, new) = (filled("rope_scaling")?, filled("rope_parameters")?);
        let full_context = RopeContext {
            theta: config.find_f64("rope_theta")?.unwrap_or(self.spec.class.rope_theta),
            partial: match self.spec.partial_rotary {
                Some(default) => Some(config.find_f64("partial_rotary_factor")?.unwrap_or(default)),
                None => None,
            },
            head_dim,
            max_position,
            original: None,
            old_names: self.spec.own_original,
        };
        if self.spec.local_rope {
            // Only nested tables count there, and the old one is laid over the new.
            let part = |key: &str| new.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
            let full = match (part("full_attention")?, old) {
                (Some(new), Some(old)) => Some(new.overlaid(&old)),
                (new, old) => new.or(old),
            };
            let theta = config.find_f64("rope_local_base_freq")?.unwrap_or(GEMMA3_LOCAL_THETA);
            let local_context = RopeContext { theta, ..full_context };
            let local = rope_of(part("sliding_attention")?.as_ref(), local_context)?;
            return Ok(Ropes { full: rope_of(full.as_ref(), full_context)?, local: Some(local) });
        }
        let table = old.or(new);
        if table.is_none() && self.spec.family == Family::GptOss {
            return Ok(Ropes { full: gpt_oss_rope(full_context.theta, head_dim), local: None });
        }
        let part = |key: &str| table.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
        let (full, local) = (part("full_attention")?, part("sliding_attention")?);
        if full.is_none() && local.is_none() {
            let beside = config.find_usize("original_max_position_embeddings")?;
            let original = beside.or(self.spec.own_original.then_some(PHI3_ORIGINAL));
            let context = RopeContext { original, ..full_context };
            return Ok(Ropes { full: rope_of(table.as_ref(), context)?, local: None });
        }
        let full = rope_of(full.as_ref(), full_context)?;
        let local = rope_of(local.as_ref(), full_context)?;
        let differs = sliding && local != full;
        Ok(Ropes { full, local: differs.then_some(local) })
    }
}

impl Keys for HfKeys<'_> {
    fn place(&self) -> String {
        self.root.path().display().to_string()
    }

    fn spec(&self) -> &'static Spec {
        self.spec
    }

    fn size(&self, key: Key) -> Result<usize, ModelError> {
        let class = self.spec.class;
        let default = match key {
            Key::HiddenSize => class.hidden_size,
            Key::Layers => class.num_hidden_layers,
            Key::Heads => class.num_attention_heads,
            Key::MlpWidth => class.intermediate_size,
            Key::MaxPosition => class.max_position_embeddings,
            Key::KvHeads | Key::HeadDim | Key::NormEps => unreachable!("no size that every model has"),
        };
        Ok(self.config().find_usize(key.names().0)?.unwrap_or(default))
    }

    fn find_size(&self, key: Key) -> Result<Option<usize>, ModelError> {
        let (name, class) = (key.names().0, self.spec.class);
        let found = self.config().find_usize(name)?;
        Ok(match key {
            // `null` is "as many as heads" in every class.
            Key::KvHeads if self.config().is_null(name) => None,
            Key::KvHeads => found.or(class.num_key_value_heads),
            Key::HeadDim => found.or(class.head_dim),
            _ => found,
        })
    }

    fn float(&self, key: Key) -> Result<f64, ModelError> {
        assert!(key == Key::NormEps, "the only number that every model has");
        Ok(self.config().find_f64(key.names().0)?.unwrap_or(self.spec.class.rms_norm_eps))
    }

    fn vocab_size(&self) -> Result<usize, ModelError> {
        Ok(self.config().find_usize("vocab_size")?.unwrap_or(self.spec.class.vocab_size))
    }

    fn activation(&self) -> Result<Activation, ModelError> {
        let class = self.spec.class;
        if self.spec.experts.is_some_and(|e| e.clamped) {
            return moe::clamped(Some(self.config()));
        }
        match self.config().find_str(class.activation_key)?.unwrap_or(class.activation) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            other => self.unsupported(format!("activation `{other}`")),
        }
    }

    fn refuse_unbuilt(&self) -> Result<(), ModelError> {
        let config = self.config();
        let spec = self.spec;
        if spec.softcaps.is_none()
            && let Some(key) = SOFTCAPS.iter().find(|key| config.get(key).is_some())
        {
            return self.unsupported(format!("`{key}`"));
        }
        if spec.query_scalar && config.find_bool("use_bidirectional_attention")?.unwrap_or(false) {
            return self.unsupported("`use_bidirectional_attention`".into());
        }
        if !spec.mlp_bias && config.find_bool("mlp_bias")?.unwrap_or(false) {
            return self.unsupported("`mlp_bias`".into());
        }
        if spec.bias == Bias::Never && config.find_bool("attention_bias")?.unwrap_or(false) {
            return self.unsupported("`attention_bias`".into());
        }
        if spec.partial_rotary.is_none()
            && let Some(part) = config.find_f64("partial_rotary_factor")?.filter(|part| *part != 1.0)
        {
            return self.unsupported(format!("`partial_rotary_factor` {part}"));
        }
        for (key, neutral) in HF_UNREAD {
            let read = spec.embed_scale == EmbedScale::Multiplier && key.contains("multipl")
                || spec.experts.is_some() && matches!(key, "num_experts" | "num_local_experts");
            if !read && config.get(key).is_some_and(|v| v.as_f64() != Some(neutral) && *v != false) {
                return self.unsupported(format!("`{key}`"));
            }
        }
        Ok(())
    }

    fn experts(&self, num_layers: usize) -> Result<Option<ExpertsConfig>, ModelError> {
        let spec = self.spec.experts.as_ref();
        spec.map(|spec| moe::from_hf(self.config(), spec, num_layers)).transpose()
    }

    fn windows(&self, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let config = self.config();
        // A window of `null` is none, an absent one the class's.
        let window = match config.find_usize("sliding_window")? {
            None if !config.is_null("sliding_window") => self.spec.class.sliding_window,
            window => window,
        };
        let typed = |window: Option<usize>, otherwise: &dyn Fn(usize) -> bool| {
            let types = self.layer_types(num_layers)?;
            let sliding = |layer: usize| match &types {
                Some(types) => types[layer] == "sliding_attention",
                None => otherwise(layer),
            };
            Ok((0..num_layers).map(|layer| window.filter(|_| sliding(layer))).collect())
        };
        match self.spec.windows {
            WindowRule::Never => Ok(vec![None; num_layers]),
            WindowRule::EveryLayer => Ok(vec![window; num_layers]),
            WindowRule::Switched => {
                let on = config.find_bool("use_sliding_window")?.unwrap_or(false);
                let first = config.find_usize("max_window_layers")?.unwrap_or(QWEN_MAX_WINDOW_LAYERS);
                typed(window.filter(|_| on), &|layer| layer >= first)
            }
            WindowRule::Alternate => typed(window, &|layer| layer.is_multiple_of(2)),
            WindowRule::WithoutRope => {
                let on = config.find_bool("use_sliding_window")?.unwrap_or(false);
                let turns = self.turned_layers(num_layers)?;
                typed(window, &|layer| on && !turns[layer])
            }
            WindowRule::AllButOneOf(of) => {
                let of = config.find_usize("sliding_window_pattern")?.unwrap_or(of).max(1);
                typed(window, &|layer| !(layer + 1).is_multiple_of(of))
            }
        }
    }

    fn ropes(&self, head_dim: usize, sliding: bool, max_position: usize) -> Result<Ropes, ModelError> {
        self.raw_ropes(head_dim, sliding, max_position).or_else(|e| match e {
            RopeError::Config(error) => Err(error.into()),
            RopeError::Unsupported(what) => self.unsupported(what),
            RopeError::Shapes(what) => Err(ModelError::Shapes { place: self.place(), what }),
        })
    }

    fn turned_layers(&self, num_layers: usize) -> Result<Vec<bool>, ModelError> {
        let Some(every) = self.spec.nope_every else { return Ok(vec![true; num_layers]) };
        let config = self.config();
        let shapes = |what: String| Err(ModelError::Shapes { place: self.place(), what });
        if let Some(list) = config.find_usize_list("no_rope_layers")? {
            if list.len() < num_layers {
                return shapes(format!(
                    "`no_rope_layers` has {} entries for {num_layers} layers",
                    list.len()
                ));
            }
            return Ok(list[..num_layers].iter().map(|turns| *turns != 0).collect());
        }
        match config.find_usize("no_rope_layer_interval")?.unwrap_or(every) {
            0 => shapes("`no_rope_layer_interval` is 0".into()),
            every => Ok((0..num_layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect()),
        }
    }

    fn biases(&self) -> Result<[bool; 3], ModelError> {
        let config = self.config();
        let mlp = self.spec.mlp_bias && config.find_bool("mlp_bias")?.unwrap_or(false);
        Ok(match self.spec.bias {
            Bias::Never => [false, false, mlp],
            Bias::Always => [true, false, mlp],
            Bias::Asked { default, output } => {
                let asked = config.find_bool("attention_bias")?.unwrap_or(default);
                [asked, asked && output, mlp]
            }
        })
    }

    fn softcaps(&self) -> Result<[Option<f32>; 2], ModelError> {
        let Some(defaults) = self.spec.softcaps else { return Ok([None; 2]) };
        let config = self.config();
        let mut caps = [None; 2];
        for ((cap, key), default) in caps.iter_mut().zip(SOFTCAPS).zip(defaults) {
            let found = match config.find_f64(key)? {
                None if !config.is_null(key) => default,
                found => found,
            };
            *cap = self.checked_cap(key, found)?;
        }
        Ok(caps)
    }

    fn multipliers(&self, hidden_size: usize) -> Result<Multipliers, ModelError> {
        let config = self.config();
        let plain = Multipliers { embed_scale: 1.0, residual_scale: 1.0, logit_divisor: 1.0 };
        Ok(match self.spec.embed_scale {
            EmbedScale::One => plain,
            EmbedScale::RootHidden => Multipliers { embed_scale: (hidden_size as f32).sqrt(), ..plain },
            EmbedScale::Multiplier => {
                let factor = |key: &str| config.find_f64(key).map(|x| x.unwrap_or(1.0) as f32);
                Multipliers {
                    embed_scale: factor("embedding_multiplier")?,
                    residual_scale: factor("residual_multiplier")?,
                    logit_divisor: self.checked_divisor("logits_scaling", factor("logits_scaling")?)?,
                }
            }
        })
    }

    fn attention_scale(&self, [_, _, _, head_dim]: [usize; 4]) -> Result<f32, ModelError> {
        let config = self.config();
        if self.spec.embed_scale == EmbedScale::Multiplier {
            return Ok(config.find_f64("attention_multiplier")?.unwrap_or(1.0) as f32);
        }
        let scalar = match self.spec.query_scalar {
            true => config.find_f64("query_pre_attn_scalar")?.unwrap_or(GEMMA_QUERY_SCALAR),
            false => head_dim as f64,
        };
        Ok(1.0 / (scalar as f32).sqrt())
    }

    fn tied(&self) -> Result<bool, ModelError> {
        // The language model inside a larger one is tied as the larger one says.
        Ok(match self.root.find_bool("tie_word_embeddings")? {
            Some(tied) => tied,
            None => {
                self.config().find_bool("tie_word_embeddings")?.unwrap_or(self.spec.class.tie_word_embeddings)
            }
        })
    }

    fn bos_id(&self) -> Result<Option<u32>, ModelError> {
        let class = self.spec.class.bos_token_id;
        Ok(match (token_ids(self.config(), "bos_token_id")?, self.nested.is_some()) {
            (Some(ids), _) => ids.first().copied(),
            (None, true) => token_ids(self.root, "bos_token_id")?.map_or(class, |ids| ids.first().copied()),
            (None, false) => class,
        })
    }

    fn eos_ids(&self) -> Result<Vec<u32>, ModelError> {
        let ids = match (token_ids(self.config(), "eos_token_id")?, self.nested.is_some()) {
            (Some(ids), _) => Some(ids),
            // The whole model's own word, where the language model says nothing.
            (None, true) => token_ids(self.root, "eos_token_id")?,
            (None, false) => None,
        };
        let default = self.spec.eos_ids();
        Ok(match ids {
            // GLM-4 counts `null` as absent.
            Some(ids) if ids.is_empty() && default.len() > 1 => default,
            ids => ids.unwrap_or(default),
        })
    }

    fn stores_norms_minus_one(&self) -> bool {
        true
    }
}

/// Metadata of a GGUF file.
pub(crate) struct GgufKeys<'a> {
    file: &'a GgufFile<'a>,
    arch: &'a str,
    spec: &'static Spec,
}

impl<'a> GgufKeys<'a> {
    /// Finds out which family it is.
    pub(crate) fn of(file: &'a GgufFile<'_>) -> Result<GgufKeys<'a>, ModelError> {
        let arch = file.get_str("general.architecture")?;
        let spec = Spec::of_gguf(arch).ok_or_else(|| ModelError::UnknownArchitecture {
            place: place_of(file),
            found: arch.to_owned(),
        })?;
        Ok(GgufKeys { file, arch, spec })
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn unsupported<T>(&self, what: String) -> Result<T, ModelError> {
        Err(ModelError::Unsupported { place: self.place(), what })
    }

    /// Divisors of the frequencies in a tensor of this name, if it is there.
    fn divisors(&self, name: &str, rotary_dim: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(info) = self.file.find_tensor(name) else { return Ok(None) };
        if info.elements() != rotary_dim / 2 || info.byte_len != rotary_dim * 2 {
            return Err(ModelError::Shapes {
                place: self.place(),
                what: format!("`{name}` does not match the head size"),
            });
        }
        let floats = self.file.data(info).chunks_exact(4);
        Ok(Some(floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }
}

/// Caps on attention logits and on logits, in both containers.
const SOFTCAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

/// Keys of `config.json` that change what a relative of these families computes, each with the number that changes
/// nothing. No class that is read here knows them; weights that were made for them would give other text.
const HF_UNREAD: [(&str, f64); 16] = [
    ("kv_lora_rank", 0.0),
    ("q_lora_rank", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("n_routed_experts", 0.0),
    ("clip_qkv", 0.0),
    ("logit_scale", 1.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("attention_multiplier", 1.0),
    ("scale_emb", 1.0),
    ("scale_depth", 1.0),
    ("use_parallel_residual", 0.0),
    ("parallel_attn", 0.0),
    ("alibi", 0.0),
    ("attn_temperature_tuning", 0.0),
];

/// The same for GGUF metadata, behind the architecture.
const GGUF_UNREAD: [(&str, f64); 24] = [
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("logit_scale", 1.0),
    ("use_parallel_residual", 0.0),
    ("swin_norm", 0.0),
    ("nextn_predict_layers", 0.0),
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.q_lora_rank", 0.0),
    ("attention.kv_lora_rank", 0.0),
    ("attention.key_length_mla", 0.0),
    ("attention.value_length_mla", 0.0),
    ("attention.key_length_swa", 0.0),
    ("attention.value_length_swa", 0.0),
    ("attention.output_scale", 1.0),
    ("attention.temperature_scale", 0.0),
    ("attention.shared_kv_layers", 0.0),
    ("rope.dimension_sections", 0.0),
    ("rope.dimension_count_swa", 0.0),
    ("rope.scaling.alpha", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
];

fn place_of(file: &GgufFile<'_>) -> String {
    file.path().map_or_else(|| "GGUF".to_owned(), |p| p.display().to_string())
}

impl Keys for GgufKeys<'_> {
    fn place(&self) -> String {
        place_of(self.file)
    }

    fn spec(&self) -> &'static Spec {
        self.spec
    }

    fn size(&self, key: Key) -> Result<usize, ModelError> {
        let name = self.name(key.names().1);
        Ok(match key {
            Key::MaxPosition => self.file.find_u64(&name)?.unwrap_or(8192),
            _ => self.file.get_u64(&name)?,
        } as usize)
    }

    fn find_size(&self, key: Key) -> Result<Option<usize>, ModelError> {
        Ok(self.file.find_u64(&self.name(key.names().1))?.map(|n| n as usize))
    }

    fn float(&self, key: Key) -> Result<f64, ModelError> {
        Ok(f64::from(self.file.get_f32(&self.name(key.names().1))?))
    }

    fn vocab_size(&self) -> Result<usize, ModelError> {
        Ok(self.file.tensor("token_embd.weight")?.dims.get(1).copied().unwrap_or(0))
    }

    fn activation(&self) -> Result<Activation, ModelError> {
        // Files do not say; llama.cpp knows it by the architecture.
        if self.spec.experts.is_some_and(|e| e.clamped) {
            return moe::clamped(None);
        }
        Ok(match self.spec.class.activation {
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            _ => Activation::Silu,
        })
    }

    fn refuse_unbuilt(&self) -> Result<(), ModelError> {
        if self.spec.experts.is_none() && self.file.find_u32(&self.name("expert_count"))?.unwrap_or(0) > 0 {
            return self.unsupported("mixture of experts".into());
        }
        let spec = self.spec;
        for (key, neutral) in GGUF_UNREAD {
            let read = match key {
                "attn_logit_softcapping" | "final_logit_softcapping" => spec.softcaps.is_some(),
                "embedding_scale" | "residual_scale" | "logit_scale" => {
                    spec.embed_scale == EmbedScale::Multiplier
                }
                _ => false,
            };
            let Some(value) = self.file.get(&self.name(key)).filter(|_| !read) else { continue };
            let number = match value {
                GgufValue::F32(x) => Some(f64::from(*x)),
                GgufValue::F64(x) => Some(*x),
                GgufValue::Bool(on) => Some(f64::from(u8::from(*on))),
                other => other.to_i64().map(|n| n as f64),
            };
            // Zero is llama.cpp's word for a number that is not there.
            if number != Some(neutral) && number != Some(0.0)
                || (number == Some(0.0) && key == "attention.causal")
            {
                return self.unsupported(format!("`{}`", self.name(key)));
            }
        }
        let length = |key: &str| self.file.find_u64(&self.name(key));
        if let (Some(keys), Some(values)) =
            (length("attention.key_length")?, length("attention.value_length")?)
            && keys != values
        {
            return self.unsupported(format!("values of {values} beside keys of {keys} per head"));
        }
        Ok(())
    }

    fn experts(&self, num_layers: usize) -> Result<Option<ExpertsConfig>, ModelError> {
        let arch = self.spec.gguf.unwrap_or_default();
        let spec = self.spec.experts.as_ref();
        spec.map(|spec| moe::from_gguf(self.file, arch, spec, num_layers)).transpose()
    }

    fn windows(&self, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let window = self.file.find_u32(&self.name("attention.sliding_window"))?.map(|w| w as usize);
        // Newer files say which layers slide; older ones mean what the family does.
        let pattern = match self.file.get(&self.name("attention.sliding_window_pattern")) {
            Some(GgufValue::Array(GgufArray::Bool(pattern))) => Some(pattern.as_slice()),
            _ => None,
        };
        let patterned = |otherwise: &dyn Fn(usize) -> bool| {
            let window = window.unwrap_or(4096);
            let sliding = |layer: usize| match pattern {
                Some(p) => p.get(layer).copied().unwrap_or(false),
                None => otherwise(layer),
            };
            Ok((0..num_layers).map(|layer| sliding(layer).then_some(window)).collect())
        };
        let given = window.filter(|w| *w > 0);
        match (self.spec.gguf_windows, given) {
            (WindowRule::AllButOneOf(of), _) => patterned(&|layer| !(layer + 1).is_multiple_of(of)),
            (WindowRule::Alternate, _) => patterned(&|layer| layer.is_multiple_of(2)),
            (WindowRule::EveryLayer, Some(_)) if pattern.is_some() => {
                self.unsupported(format!("`{}`", self.name("attention.sliding_window_pattern")))
            }
            (WindowRule::EveryLayer, given) => Ok(vec![given; num_layers]),
            (_, None) => Ok(vec![None; num_layers]),
            (_, Some(_)) => self.unsupported("sliding-window layers in this family".into()),
        }
    }

    fn ropes(&self, head_dim: usize, _sliding: bool, max_position: usize) -> Result<Ropes, ModelError> {
        let file = self.file;
        let shapes = |what: String| Err(ModelError::Shapes { place: self.place(), what });
        let default = self.spec.partial_rotary.map_or(head_dim, |part| (head_dim as f64 * part) as usize);
        let rotary_dim = file.find_u64(&self.name("rope.dimension_count"))?.map_or(default, |n| n as usize);
        if rotary_dim != head_dim && self.spec.partial_rotary.is_none() {
            return self.unsupported(format!("RoPE on {rotary_dim} of {head_dim} values"));
        }
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            return shapes(format!("RoPE turns {rotary_dim} of the {head_dim} values of a head"));
        }
        let float = |key: &str| file.find_f32(&self.name(key)).map(|x| x.map(f64::from));
        let theta = float("rope.freq_base")?.unwrap_or(self.spec.gguf_theta());
        let mut full = Rope::plain(theta, rotary_dim);
        let kind = file.find_str(&self.name("rope.scaling.type"))?;
        let factor = match float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            // The same key in the oldest files.
            None => float("rope.scale_linear")?,
        }
        .filter(|factor| *factor != 0.0);
        let original = file.find_u64(&self.name("rope.scaling.original_context_length"))?.map(|n| n as usize);
        match (
            self.divisors("rope_factors_short.weight", rotary_dim)?,
            self.divisors("rope_factors_long.weight", rotary_dim)?,
        ) {
            (Some(short), Some(long)) => {
                let original = original.unwrap_or(max_position);
                full.scaling = RopeScaling::Factors(short);
                full.long = Some((original, long));
                full.magnitude = long_magnitude(max_position as f64 / original.max(1) as f64, original);
            }
            (None, None) => {}
            _ => {
                return shapes(
                    "of `rope_factors_long.weight` and `rope_factors_short.weight` one is missing".into(),
                );
            }
        }
        let freqs = self.divisors("rope_freqs.weight", rotary_dim)?;
        match kind {
            None | Some("linear") => match (factor, freqs) {
                (Some(factor), Some(freqs)) if factor != 1.0 => {
                    full.scaling = RopeScaling::Factors(freqs.iter().map(|f| f * factor as f32).collect());
                }
                (_, Some(freqs)) => full.scaling = RopeScaling::Factors(freqs),
                // Without a type a factor is linear.
                (Some(factor), None) if full.long.is_none() && (kind.is_some() || factor != 1.0) => {
                    full.scaling = RopeScaling::Linear { factor: factor as f32 };
                }
                (None, None) if kind.is_some() => {
                    file.get_f32(&self.name("rope.scaling.factor"))?;
                }
                _ => {}
            },
            Some("none") => {
                if let Some(freqs) = freqs {
                    full.scaling = RopeScaling::Factors(freqs);
                }
            }
            Some("longrope") if full.long.is_some() => {}
            Some("yarn") if freqs.is_none() && full.long.is_none() => {
                let factor = match factor {
                    Some(factor) => factor,
                    None => f64::from(file.get_f32(&self.name("rope.scaling.factor"))?),
                };
                if let Some(other) = float("rope.scaling.yarn_ext_factor")?.filter(|x| *x >= 0.0 && *x != 1.0)
                {
                    return self
                        .unsupported(format!("`{}` {other}", self.name("rope.scaling.yarn_ext_factor")));
                }
                let yarn = Yarn {
                    factor,
                    original: original.unwrap_or(max_position),
                    beta_fast: float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    // Files do not say; gpt-oss was trained without.
                    truncate: self.spec.family != Family::GptOss,
                };
                full.scaling = yarn.scaling(theta, rotary_dim);
                full.magnitude = match float("rope.scaling.yarn_attn_factor")? {
                    Some(magnitude) => magnitude,
                    None => yarn_magnitude(factor, 1.0),
                };
            }
            Some(other) => return self.unsupported(format!("RoPE scaling `{other}`")),
        }
        if let Some(magnitude) = float("rope.scaling.attn_factor")? {
            // Of LongRoPE it is the whole of it.
            full.magnitude = if full.long.is_some() { magnitude } else { full.magnitude * magnitude };
        }
        let local = match self.spec.local_rope {
            true => {
                let theta = float("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA);
                Some(Rope::plain(theta, rotary_dim))
            }
            false => None,
        };
        Ok(Ropes { full, local })
    }

    fn turned_layers(&self, num_layers: usize) -> Result<Vec<bool>, ModelError> {
        // No key says it: llama.cpp knows the interval by the architecture.
        let every = self.spec.nope_every.unwrap_or(usize::MAX);
        Ok((0..num_layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect())
    }

    fn biases(&self) -> Result<[bool; 3], ModelError> {
        // No key says it; there are tensors, or there are none.
        let there = |part: Part| self.file.find_tensor(&self.spec.gguf_name(part, 0)).is_some();
        let mlp = self.spec.mlp_bias && there(Part::GateBias);
        Ok(match self.spec.bias {
            Bias::Never => [false, false, mlp],
            Bias::Always => [true, false, mlp],
            Bias::Asked { output, .. } => [there(Part::QBias), output && there(Part::OBias), mlp],
        })
    }

    fn softcaps(&self) -> Result<[Option<f32>; 2], ModelError> {
        let Some(defaults) = self.spec.softcaps else { return Ok([None; 2]) };
        let mut caps = [None; 2];
        for ((cap, key), default) in caps.iter_mut().zip(SOFTCAPS).zip(defaults) {
            let found = self.file.find_f32(&self.name(key))?.map(f64::from);
            *cap = self.checked_cap(&self.name(key), found.or(default).filter(|cap| *cap != 0.0))?;
        }
        Ok(caps)
    }

    fn multipliers(&self, hidden_size: usize) -> Result<Multipliers, ModelError> {
        let plain = Multipliers { embed_scale: 1.0, residual_scale: 1.0, logit_divisor: 1.0 };
        Ok(match self.spec.embed_scale {
            EmbedScale::One => plain,
            EmbedScale::RootHidden => Multipliers { embed_scale: (hidden_size as f32).sqrt(), ..plain },
            EmbedScale::Multiplier => {
                let factor = |key: &str| -> Result<f32, ModelError> {
                    Ok(self.file.find_f32(&self.name(key))?.filter(|x| *x != 0.0).unwrap_or(1.0))
                };
                Multipliers {
                    embed_scale: factor("embedding_scale")?,
                    residual_scale: factor("residual_scale")?,
                    logit_divisor: self.checked_divisor("logit_scale", factor("logit_scale")?)?,
                }
            }
        })
    }

    fn attention_scale(&self, sizes: [usize; 4]) -> Result<f32, ModelError> {
        let [hidden_size, num_layers, num_heads, head_dim] = sizes;
        Ok(match self.file.find_f32(&self.name("attention.scale"))?.filter(|scale| *scale != 0.0) {
            Some(scale) => scale,
            // The 27B models of Gemma 2 and 3, known by their layers, scale by hidden size per head.
            None if (self.spec.family, num_layers) == (Family::Gemma3, 62)
                || (self.spec.family, num_layers) == (Family::Gemma2, 46) =>
            {
                1.0 / (hidden_size as f32 / num_heads as f32).sqrt()
            }
            None => 1.0 / (head_dim as f32).sqrt(),
        })
    }

    fn tied(&self) -> Result<bool, ModelError> {
        Ok(self.file.find_tensor("output.weight").is_none())
    }

    fn bos_id(&self) -> Result<Option<u32>, ModelError> {
        Ok(self.file.find_u32("tokenizer.ggml.bos_token_id")?)
    }

    fn eos_ids(&self) -> Result<Vec<u32>, ModelError> {
        let mut ids: Vec<u32> = self.file.find_u32("tokenizer.ggml.eos_token_id")?.into_iter().collect();
        ids.extend(self.file.find_u32("tokenizer.ggml.eot_token_id")?.filter(|e| !ids.contains(e)));
        Ok(ids)
    }

    fn stores_norms_minus_one(&self) -> bool {
        // The converter has added the one already.
        false
    }
}
