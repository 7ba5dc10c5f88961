//! The two places that say what a model is, a Hugging Face `config.json` and the metadata of a GGUF file, behind one
//! interface: [`crate::TargetConfig`] is read once, from either.
//!
//! They differ in what silence means: a key that `config.json` leaves out has the default of its class
//! ([`crate::classes`]), GGUF files write all sizes.

use draftsmith_formats::gguf::{GgufArray, GgufFile, GgufValue};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling};

use crate::ModelError;
use crate::classes::{GEMMA3_LOCAL_THETA, QWEN_MAX_WINDOW_LAYERS, Rope, RopeError, rope_of};
use crate::family::{Bias, Spec, WindowRule};
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

    fn raw_ropes(&self, sliding: bool, max_position: usize) -> Result<Ropes, RopeError> {
        let config = self.config();
        let filled = |key: &str| -> Result<Option<HfConfig>, RopeError> {
            Ok(config.find_table(key)?.filter(|table| !table.map().is_empty()))
        };
        let (old, new) = (filled("rope_scaling")?, filled("rope_parameters")?);
        let theta = config.find_f64("rope_theta")?.unwrap_or(self.spec.class.rope_theta);
        if self.spec.local_rope {
            // Only nested tables count there, and the old one is laid over the new.
            let part = |key: &str| new.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
            let full = match (part("full_attention")?, old) {
                (Some(new), Some(old)) => Some(new.overlaid(&old)),
                (new, old) => new.or(old),
            };
            let local_theta = config.find_f64("rope_local_base_freq")?.unwrap_or(GEMMA3_LOCAL_THETA);
            let local = rope_of(part("sliding_attention")?.as_ref(), local_theta, max_position)?;
            return Ok(Ropes { full: rope_of(full.as_ref(), theta, max_position)?, local: Some(local) });
        }
        let table = old.or(new);
        let part = |key: &str| table.as_ref().map(|p| p.find_table(key)).transpose().map(Option::flatten);
        let (full, local) = (part("full_attention")?, part("sliding_attention")?);
        if full.is_none() && local.is_none() {
            return Ok(Ropes { full: rope_of(table.as_ref(), theta, max_position)?, local: None });
        }
        let full = rope_of(full.as_ref(), theta, max_position)?;
        let local = rope_of(local.as_ref(), theta, max_position)?;
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
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if config.get(key).is_some() {
                return self.unsupported(format!("`{key}`"));
            }
        }
        if self.spec.query_scalar && config.find_bool("use_bidirectional_attention")?.unwrap_or(false) {
            return self.unsupported("`use_bidirectional_attention`".into());
        }
        if config.find_bool("mlp_bias")?.unwrap_or(false) {
            return self.unsupported("`mlp_bias`".into());
        }
        if self.spec.bias == Bias::Never && config.find_bool("attention_bias")?.unwrap_or(false) {
            return self.unsupported("`attention_bias`".into());
        }
        if self.spec.bias == Bias::WithOutput && !config.find_bool("attention_bias")?.unwrap_or(true) {
            return self.unsupported("`attention_bias` false".into());
        }
        if let Some(part) = config.find_f64("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return self.unsupported(format!("`partial_rotary_factor` {part}"));
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
            WindowRule::AllButOneOf(of) => {
                let of = config.find_usize("sliding_window_pattern")?.unwrap_or(of).max(1);
                typed(window, &|layer| !(layer + 1).is_multiple_of(of))
            }
        }
    }

    fn ropes(&self, _head_dim: usize, sliding: bool, max_position: usize) -> Result<Ropes, ModelError> {
        self.raw_ropes(sliding, max_position).or_else(|e| match e {
            RopeError::Config(error) => Err(error.into()),
            RopeError::Unsupported(what) => self.unsupported(what),
        })
    }

    fn attention_scale(&self, [_, _, _, head_dim]: [usize; 4]) -> Result<f32, ModelError> {
        let scalar = match self.spec.query_scalar {
            true => self
                .config()
                .find_f64("query_pre_attn_scalar")?
                .unwrap_or(crate::classes::GEMMA3_QUERY_SCALAR),
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
        Ok(ids.unwrap_or_else(|| self.spec.class.eos_token_id.into_iter().collect()))
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
}

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
        Ok(())
    }

    fn experts(&self, num_layers: usize) -> Result<Option<ExpertsConfig>, ModelError> {
        let arch = self.spec.gguf.unwrap_or_default();
        let spec = self.spec.experts.as_ref();
        spec.map(|spec| moe::from_gguf(self.file, arch, spec, num_layers)).transpose()
    }

    fn windows(&self, num_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let window = self.file.find_u32(&self.name("attention.sliding_window"))?;
        let WindowRule::AllButOneOf(of) = self.spec.windows else {
            return match window.unwrap_or(0) {
                0 => Ok(vec![None; num_layers]),
                _ => self.unsupported("sliding-window layers in this family".into()),
            };
        };
        // Newer files say which layers slide; older ones mean what the family does.
        let pattern = match self.file.get(&self.name("attention.sliding_window_pattern")) {
            Some(GgufValue::Array(GgufArray::Bool(pattern))) => Some(pattern.as_slice()),
            _ => None,
        };
        let window = window.unwrap_or(4096) as usize;
        let sliding = |layer: usize| match pattern {
            Some(p) => p.get(layer).copied().unwrap_or(false),
            None => !(layer + 1).is_multiple_of(of),
        };
        Ok((0..num_layers).map(|layer| sliding(layer).then_some(window)).collect())
    }

    fn ropes(&self, head_dim: usize, _sliding: bool, _max_position: usize) -> Result<Ropes, ModelError> {
        let file = self.file;
        if let Some(rotated) = file.find_u64(&self.name("rope.dimension_count"))?
            && rotated as usize != head_dim
        {
            return self.unsupported(format!("RoPE on {rotated} of {head_dim} values"));
        }
        let theta = file.find_f32(&self.name("rope.freq_base"))?.map_or(self.spec.gguf_theta(), f64::from);
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
                    place: self.place(),
                    what: "`rope_freqs.weight` does not match the head size".into(),
                });
            }
            None => match file.find_str(&self.name("rope.scaling.type"))? {
                None | Some("none") => RopeScaling::None,
                Some("linear") => {
                    RopeScaling::Linear { factor: file.get_f32(&self.name("rope.scaling.factor"))? }
                }
                Some(other) => return self.unsupported(format!("RoPE scaling `{other}`")),
            },
        };
        let local = match self.spec.local_rope {
            true => Some(Rope {
                theta: file.find_f32(&self.name("rope.freq_base_swa"))?.map_or(GEMMA3_LOCAL_THETA, f64::from),
                scaling: RopeScaling::None,
            }),
            false => None,
        };
        Ok(Ropes { full: Rope { theta, scaling }, local })
    }

    fn attention_scale(&self, sizes: [usize; 4]) -> Result<f32, ModelError> {
        let [hidden_size, num_layers, num_heads, head_dim] = sizes;
        Ok(match self.file.find_f32(&self.name("attention.scale"))? {
            Some(scale) => scale,
            // Gemma 3 27B, the one with 62 layers, scales by hidden size per head.
            None if self.spec.query_scalar && num_layers == 62 => {
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
