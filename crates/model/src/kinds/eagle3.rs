//! The EAGLE-3 draft: configuration, weights and the network, written once for training and decoding.
//!
//! One decoder layer whose input is the token's embedding beside a hidden vector: at depth 0 the projected target
//! features, later the layer's own output [eagle3 §2]. The network is a set of functions over [`Ops`]; decoding
//! calls them through packed weights and a KV cache, training through the tape.
//!
//! Shape legend: `R` rows (slots), `H` draft width, `Ht` target width, `V`/`Vd` target/draft vocabulary, `nh`/`nkv`
//! query/key heads, `hd` head width, `I` MLP width.

use std::sync::Arc;

use draftsmith_core::{LayerId, default_target_layers};
use draftsmith_formats::run::{DraftTable, MethodWord};
use draftsmith_kernels::{Activation, PackMode, RopeScaling, RopeTable};
use serde_json::{Value, json};

use crate::classes::draft_defaults;
use crate::config::TargetConfig;
use crate::draft_config::{
    DraftConfigError, DraftKind, DraftNumbers, DraftShape, DraftSpec, DraftWork, Keys, Published, Word,
    eos_value, plain, rope_scaling_value,
};
use crate::ops::{Attend, Ops};
use crate::weights::{BuildWeights, TensorList};

pub use decode::Eagle3Draft;

/// What the next draft step receives from this one [eagle3 §7].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feedback {
    /// The layer output before the final norm: EAGLE-3 as published.
    PreNorm,
    /// The layer output after the final norm: EAGLE-3.1 as the engines serve it (`norm_output: true`).
    PostNorm,
}

/// Shapes and switches of one EAGLE-3 draft, as in its `config.json` [formats §1.1].
#[derive(Clone, Debug, PartialEq)]
pub struct Eagle3Config {
    /// `V`
    pub vocab_size: usize,
    /// `Vd`
    pub draft_vocab_size: usize,
    /// `H`
    pub hidden_size: usize,
    /// `Ht`
    pub target_hidden_size: usize,
    /// `I`
    pub intermediate_size: usize,
    /// `nh`
    pub num_attention_heads: usize,
    /// `nkv`
    pub num_key_value_heads: usize,
    /// `hd`
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// RoPE base.
    pub rope_theta: f32,
    /// RoPE frequency scaling.
    pub rope_scaling: RopeScaling,
    /// Positions the draft is meant for.
    pub max_position_embeddings: usize,
    /// One norm per captured layer before `fc` (EAGLE-3.1).
    pub fc_norm: bool,
    /// One norm over the three layers side by side before `fc` (as gpt-oss drafts have it); excludes `fc_norm`.
    pub norm_before_fc: bool,
    /// The layer's residual is the normalised hidden input (as `speculators` trains it).
    pub norm_before_residual: bool,
    /// What is fed back to the next depth.
    pub feedback: Feedback,
    /// Standard deviation of random initial weights.
    pub initializer_range: f32,
    /// 0-based output layers, `None` for the default formula.
    pub target_layer_ids: Option<[u32; 3]>,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

/// What this network covers, as advice for a configuration that asks for more.
pub const SUPPORTED: &str =
    "use an EAGLE-3 draft with one Llama layer: SiLU, no biases, RoPE plain, linear or llama3";

/// How captured layers are put right.
pub const LAYERS_HINT: &str = "say which layers the draft reads with `draftsmith bundle import DRAFT --target TARGET --layers LOW,MID,HIGH`, \
     counted from 0, or correct the key";

/// The key of the captured layers: nested under `eagle_config` counted from 0, at the top level from 1.
pub const LAYERS_KEY: &str = "eagle_aux_hidden_state_layer_ids";

/// What `architectures` of such drafts holds: SpecForge's name, vLLM's, and that of the `speculators` library.
pub const ARCHITECTURES: [&str; 3] = ["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator"];

/// Layers that it reads.
const CAPTURED: usize = 3;

impl Eagle3Config {
    /// The draft that a target gets when nobody says otherwise: the shapes of one of its own layers
    /// [formats §1.1].
    ///
    /// Explicit RoPE divisors have no key in a draft's configuration; such a target's draft gets plain RoPE.
    pub fn for_target(target: &TargetConfig, draft_vocab_size: usize) -> Eagle3Config {
        let rope_scaling = match &target.rope_scaling {
            RopeScaling::Factors(_) => RopeScaling::None,
            other => other.clone(),
        };
        Eagle3Config {
            vocab_size: target.vocab_size,
            draft_vocab_size,
            hidden_size: target.hidden_size,
            target_hidden_size: target.hidden_size,
            intermediate_size: target.intermediate_size,
            num_attention_heads: target.num_heads,
            num_key_value_heads: target.num_kv_heads,
            head_dim: target.head_dim,
            rms_norm_eps: target.rms_norm_eps,
            rope_theta: target.rope_theta,
            rope_scaling,
            max_position_embeddings: target.max_position,
            fc_norm: false,
            norm_before_fc: false,
            norm_before_residual: false,
            feedback: Feedback::PreNorm,
            initializer_range: 0.02,
            target_layer_ids: None,
            bos_token_id: target.bos_id,
            eos_token_ids: target.eos_ids.clone(),
            pad_token_id: None,
        }
    }

    /// Reads a draft's `config.json`.
    pub fn from_json(text: &str) -> Result<Eagle3Config, DraftConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| DraftConfigError::Json { message: e.to_string() })?;
        Eagle3Config::from_value(&value)
    }

    /// Reads the parsed `config.json`.
    pub fn from_value(value: &Value) -> Result<Eagle3Config, DraftConfigError> {
        let keys = Keys::of_config(value, SUPPORTED)?;
        let object = keys.object();
        if keys.size_or("num_hidden_layers", 1)? != 1 {
            return Err(keys.unsupported("num_hidden_layers", object["num_hidden_layers"].to_string()));
        }
        keys.needs_silu()?;
        // What is left out has the defaults of the layer's own class.
        let model_type = keys.present("model_type").and_then(Value::as_str);
        let class = draft_defaults(model_type);
        let vocab_size = keys.size_or("vocab_size", class.vocab_size)?;
        let hidden_size = keys.size_or("hidden_size", class.hidden_size)?;
        let num_attention_heads = keys.size_or("num_attention_heads", class.num_attention_heads)?;
        let max_position_embeddings =
            keys.size_or("max_position_embeddings", class.max_position_embeddings)?;
        let head_dim = match class.head_dim {
            Some(dim) => keys.size_or("head_dim", dim)?,
            None => keys.size_or("head_dim", hidden_size / num_attention_heads)?,
        };
        let num_key_value_heads = match class.num_key_value_heads {
            // `null` is "as many as heads" in every class.
            Some(heads) if !object.contains_key("num_key_value_heads") => heads,
            _ => keys.size_or("num_key_value_heads", num_attention_heads)?,
        };
        // New transformers write `rope_parameters` with the base inside, older ones `rope_scaling` beside it.
        let table = |key: &str| match keys.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(keys.inside(map)).filter(|_| !map.is_empty())),
            Some(_) => Err(keys.bad(key, "an object or null")),
        };
        let rope = match table("rope_scaling")? {
            Some(rope) => Some(rope),
            None => table("rope_parameters")?,
        };
        let beside = keys.float_or("rope_theta", class.rope_theta as f32)?;
        let rope_theta = match &rope {
            Some(rope) => rope.float_or("rope_theta", beside)?,
            None => beside,
        };
        let rope_scaling = rope.map_or(Ok(RopeScaling::None), |r| r.rope_scaling(max_position_embeddings))?;
        let config = Eagle3Config {
            vocab_size,
            draft_vocab_size: keys.size_or("draft_vocab_size", vocab_size)?,
            hidden_size,
            target_hidden_size: keys.size_or("target_hidden_size", hidden_size)?,
            intermediate_size: keys.size_or("intermediate_size", class.intermediate_size)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: keys.float_or("rms_norm_eps", class.rms_norm_eps as f32)?,
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            fc_norm: keys.flag("fc_norm")?,
            norm_before_fc: keys.flag("norm_before_fc")?,
            norm_before_residual: keys.flag("norm_before_residual")?,
            feedback: if keys.flag("norm_output")? { Feedback::PostNorm } else { Feedback::PreNorm },
            initializer_range: keys.float_or("initializer_range", 0.02)?,
            target_layer_ids: layer_ids_from(&keys)?,
            bos_token_id: keys.bos_or(class.bos_token_id)?,
            eos_token_ids: keys.eos_or(class.eos_token_id)?,
            pad_token_id: keys.id("pad_token_id")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Checks that the numbers fit together.
    pub fn check(&self) -> Result<(), DraftConfigError> {
        let bad = |what: String| Err(DraftConfigError::Shapes { what });
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(format!(
                "{} query heads cannot share {} key heads",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return bad(format!("RoPE needs an even head dimension, found {}", self.head_dim));
        }
        if self.fc_norm && self.norm_before_fc {
            return bad("`fc_norm` and `norm_before_fc` exclude each other".into());
        }
        if self.draft_vocab_size > self.vocab_size {
            return bad(format!(
                "a draft vocabulary of {} ids is larger than the target's {}",
                self.draft_vocab_size, self.vocab_size
            ));
        }
        if let RopeScaling::Factors(f) = &self.rope_scaling
            && f.len() != self.head_dim / 2
        {
            return bad(format!("{} RoPE factors for {} frequencies", f.len(), self.head_dim / 2));
        }
        Ok(())
    }

    /// Writes the `config.json` that SpecForge and the engines read.
    ///
    /// # Errors
    /// Explicit RoPE factors have no key there.
    pub fn to_value(&self) -> Result<Value, DraftConfigError> {
        let rope_scaling = rope_scaling_value(&self.rope_scaling, SUPPORTED)?;
        let mut value = json!({
            "architectures": [ARCHITECTURES[0]],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rms_norm_eps": plain(self.rms_norm_eps),
            "rope_theta": plain(self.rope_theta),
            "rope_scaling": rope_scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_value(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "initializer_range": plain(self.initializer_range),
            "torch_dtype": "bfloat16",
            "use_cache": true,
        });
        let object = value.as_object_mut().expect("built as an object");
        if self.target_hidden_size != self.hidden_size {
            object.insert("target_hidden_size".into(), json!(self.target_hidden_size));
        }
        for (key, set) in [
            ("fc_norm", self.fc_norm),
            ("norm_before_fc", self.norm_before_fc),
            ("norm_before_residual", self.norm_before_residual),
            ("norm_output", self.feedback == Feedback::PostNorm),
        ] {
            if set {
                object.insert(key.into(), json!(true));
            }
        }
        if let Some(ids) = self.target_layer_ids {
            // Nested key: 0-based output layers. Top-level key: the "+1" numbering of vLLM [eagle3 §1.1].
            object.insert(
                "eagle_config".into(),
                json!({ "eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": true }),
            );
            object.insert("eagle_aux_hidden_state_layer_ids".into(), json!(ids.map(|id| id + 1)));
        }
        Ok(value)
    }

    /// The layers to capture of a target with this many: as configured, or by the default formula.
    pub fn layers(&self, num_layers: u32) -> [u32; 3] {
        self.target_layer_ids.unwrap_or_else(|| default_target_layers(num_layers).map(|LayerId(id)| id))
    }

    /// Width of the concatenated target features.
    pub fn features_width(&self) -> usize {
        3 * self.target_hidden_size
    }

    /// Query width, `nh * hd`.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Key and value width, `nkv * hd`.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Every trained tensor in the order of [`Eagle3Weights::build`]: name, shape (`[O, I]` or `[width]`).
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = TensorList::default();
        let Ok(_) = Eagle3Weights::build(self, &mut list);
        list.0
    }
}

impl DraftKind for Eagle3Config {
    const WORDS: &'static [Word] = &[Word {
        method: MethodWord {
            name: "eagle3",
            about: "EAGLE-3: one decoder layer over fused target states, trained with training-time test.",
        },
        architectures: &ARCHITECTURES,
    }];

    fn of_table(table: &DraftTable, target: &TargetConfig, draft_vocab_size: usize) -> Eagle3Config {
        let mut config = Eagle3Config::for_target(target, draft_vocab_size);
        let set = |size: &mut usize, wanted: Option<u32>| *size = wanted.map_or(*size, |n| n as usize);
        set(&mut config.hidden_size, table.hidden);
        set(&mut config.intermediate_size, table.intermediate);
        set(&mut config.num_attention_heads, table.heads);
        set(&mut config.num_key_value_heads, table.kv_heads);
        config.fc_norm = table.eagle3.fc_norm;
        config.feedback = if table.eagle3.norm_output { Feedback::PostNorm } else { Feedback::PreNorm };
        config
    }

    fn read(value: &Value) -> Result<Eagle3Config, DraftConfigError> {
        Eagle3Config::from_value(value)
    }
}

impl DraftSpec for Eagle3Config {
    fn name(&self) -> &'static str {
        Self::WORDS[0].method.name
    }

    fn title(&self) -> &'static str {
        "An EAGLE-3 draft"
    }

    fn shape(&self) -> DraftShape {
        DraftShape {
            vocab_size: self.vocab_size,
            draft_vocab_size: self.draft_vocab_size,
            hidden_size: self.hidden_size,
            target_hidden_size: self.target_hidden_size,
            head_dim: self.head_dim,
            max_position_embeddings: self.max_position_embeddings,
            initializer_range: self.initializer_range,
            captured_layers: CAPTURED,
            has_vocab_map: true,
            has_embedding: false,
            answer_width: self.draft_vocab_size,
        }
    }

    fn target_layers(&self) -> Option<Vec<u32>> {
        self.target_layer_ids.map(|ids| ids.to_vec())
    }

    fn default_layers(&self, num_layers: u32) -> Vec<u32> {
        default_target_layers(num_layers).map(|LayerId(id)| id).to_vec()
    }

    fn set_target_layers(&mut self, layers: &[u32]) -> Result<(), DraftConfigError> {
        let three = layers.try_into().map_err(|_| DraftConfigError::Shapes {
            what: format!("it reads {CAPTURED} layers, not {}", layers.len()),
        })?;
        self.target_layer_ids = Some(three);
        Ok(())
    }

    fn numbers(&mut self) -> Option<DraftNumbers<'_>> {
        Some(DraftNumbers {
            vocab_size: &mut self.vocab_size,
            draft_vocab_size: &mut self.draft_vocab_size,
            rope_theta: &mut self.rope_theta,
            rope_scaling: Some(&mut self.rope_scaling),
            rms_norm_eps: &mut self.rms_norm_eps,
        })
    }

    fn set_token_ids(&mut self, bos: Option<u32>, eos: &[u32], pad: Option<u32>) {
        (self.bos_token_id, self.pad_token_id) = (bos, pad);
        self.eos_token_ids = eos.to_vec();
    }

    fn check(&self) -> Result<(), DraftConfigError> {
        Eagle3Config::check(self)
    }

    fn to_value(&self) -> Result<Value, DraftConfigError> {
        Eagle3Config::to_value(self)
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Eagle3Config::tensors(self)
    }

    /// A chain: the features once, then layer and head for every token.
    fn work(&self, tokens: usize, mode: PackMode) -> DraftWork {
        let features = (self.hidden_size * self.features_width()) as u64;
        let matrices = self.tensors().into_iter().filter(|(_, shape)| shape.len() > 1);
        let all: u64 = matrices.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        DraftWork::of(features + tokens as u64 * (all - features), mode)
    }

    fn published(&self) -> Published<'_> {
        Published::Eagle3(self)
    }
}

/// The captured layers; `None` where no key says any: absent, `null` and an empty list all leave the default.
fn layer_ids_from(keys: &Keys<'_>) -> Result<Option<[u32; 3]>, DraftConfigError> {
    let some = |list: &&Value| list.as_array().is_none_or(|list| !list.is_empty());
    let layers = |key: String, wanted, list: &Value| DraftConfigError::Layers {
        key,
        wanted,
        found: list.to_string().chars().take(80).collect(),
        hint: LAYERS_HINT,
    };
    let nested = match keys.present("eagle_config") {
        None => None,
        Some(Value::Object(map)) => Some(keys.inside(map)),
        Some(other) => return Err(layers("eagle_config".into(), "an object", other)),
    };
    if let Some(list) = nested.as_ref().and_then(|n| n.present(LAYERS_KEY)).filter(some) {
        let key = format!("eagle_config.{LAYERS_KEY}");
        return match three_ids(list) {
            Some(ids) => Ok(Some(ids)),
            None => Err(layers(key, "three layer ids, counted from 0", list)),
        };
    }
    // Only vLLM's top-level key, which counts from 1.
    let Some(list) = keys.present(LAYERS_KEY).filter(some) else { return Ok(None) };
    match three_ids(list).filter(|ids| !ids.contains(&0)) {
        Some(ids) => Ok(Some(ids.map(|id| id - 1))),
        None => Err(layers(LAYERS_KEY.into(), "three layer numbers, counted from 1", list)),
    }
}

fn three_ids(list: &Value) -> Option<[u32; 3]> {
    let ids: Option<Vec<u32>> =
        list.as_array()?.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect();
    ids?.try_into().ok()
}

/// All trained weights of a draft. `W` is a linear weight, `N` a norm weight, in whatever form the [`Ops`] take.
#[derive(Clone, Debug)]
pub struct Eagle3Weights<W, N> {
    /// `fc.weight` `[H, 3 Ht]`
    pub fc: W,
    /// `fc_norm.{0,1,2}.weight` `[Ht]`
    pub fc_norm: Option<[N; 3]>,
    /// `input_norm.weight` `[3 Ht]`: the norm of `norm_before_fc`.
    pub fusion_norm: Option<N>,
    /// `midlayer.input_layernorm.weight` `[H]`: norm of the token embedding.
    pub input_norm: N,
    /// `midlayer.hidden_norm.weight` `[H]`: norm of the hidden input.
    pub hidden_norm: N,
    /// `[nh hd, 2H]`
    pub q_proj: W,
    /// `[nkv hd, 2H]`
    pub k_proj: W,
    /// `[nkv hd, 2H]`
    pub v_proj: W,
    /// `[H, nh hd]`
    pub o_proj: W,
    /// `midlayer.post_attention_layernorm.weight` `[H]`
    pub post_norm: N,
    /// `[I, H]`
    pub gate_proj: W,
    /// `[I, H]`
    pub up_proj: W,
    /// `[H, I]`
    pub down_proj: W,
    /// `norm.weight` `[H]`: final norm before the head.
    pub norm: N,
    /// `lm_head.weight` `[Vd, H]`
    pub lm_head: W,
}

impl<W, N> Eagle3Weights<W, N> {
    /// Asks `source` for every tensor once, in a fixed order.
    pub fn build<S: BuildWeights<W = W, N = N>>(
        config: &Eagle3Config,
        source: &mut S,
    ) -> Result<Eagle3Weights<W, N>, S::Error> {
        let (h, ht, i) = (config.hidden_size, config.target_hidden_size, config.intermediate_size);
        let (qw, kvw) = (config.q_width(), config.kv_width());
        let fc = source.linear("fc.weight", h, 3 * ht)?;
        let fc_norm = match config.fc_norm {
            true => Some([
                source.norm("fc_norm.0.weight", ht)?,
                source.norm("fc_norm.1.weight", ht)?,
                source.norm("fc_norm.2.weight", ht)?,
            ]),
            false => None,
        };
        let fusion_norm = match config.norm_before_fc {
            true => Some(source.norm("input_norm.weight", 3 * ht)?),
            false => None,
        };
        Ok(Eagle3Weights {
            fc,
            fc_norm,
            fusion_norm,
            input_norm: source.norm("midlayer.input_layernorm.weight", h)?,
            hidden_norm: source.norm("midlayer.hidden_norm.weight", h)?,
            q_proj: source.linear("midlayer.self_attn.q_proj.weight", qw, 2 * h)?,
            k_proj: source.linear("midlayer.self_attn.k_proj.weight", kvw, 2 * h)?,
            v_proj: source.linear("midlayer.self_attn.v_proj.weight", kvw, 2 * h)?,
            o_proj: source.linear("midlayer.self_attn.o_proj.weight", h, qw)?,
            post_norm: source.norm("midlayer.post_attention_layernorm.weight", h)?,
            gate_proj: source.linear("midlayer.mlp.gate_proj.weight", i, h)?,
            up_proj: source.linear("midlayer.mlp.up_proj.weight", i, h)?,
            down_proj: source.linear("midlayer.mlp.down_proj.weight", h, i)?,
            norm: source.norm("norm.weight", h)?,
            lm_head: source.linear("lm_head.weight", config.draft_vocab_size, h)?,
        })
    }
}

/// The EAGLE-3 network: configuration and RoPE table. Weights are handed to each call.
#[derive(Clone, Debug)]
pub struct Eagle3 {
    /// Shapes and switches.
    pub config: Eagle3Config,
    /// RoPE frequencies.
    pub rope: Arc<RopeTable>,
}

impl Eagle3 {
    /// The network of a checked configuration.
    pub fn new(config: Eagle3Config) -> Eagle3 {
        let rope = Arc::new(RopeTable::new(config.head_dim, config.rope_theta, &config.rope_scaling));
        Eagle3 { config, rope }
    }

    /// Depth 0 only: target features `[R, 3 Ht]` (low, mid, high side by side) → hidden input `[R, H]`.
    pub fn project<O: Ops>(&self, ops: &mut O, w: &Eagle3Weights<O::W, O::N>, features: &O::T) -> O::T {
        match (&w.fc_norm, &w.fusion_norm) {
            (None, None) => ops.linear(features, &w.fc, None),
            (None, Some(norm)) => {
                let normed = ops.rms_norm(features, norm, self.config.rms_norm_eps); // [R, 3 Ht]
                ops.linear(&normed, &w.fc, None)
            }
            (Some(norms), _) => {
                let ht = self.config.target_hidden_size;
                let chunks: Vec<O::T> = norms
                    .iter()
                    .enumerate()
                    .map(|(i, norm)| {
                        let chunk = ops.slice_cols(features, i * ht, ht); // [R, Ht]
                        ops.rms_norm(&chunk, norm, self.config.rms_norm_eps)
                    })
                    .collect();
                let normed = ops.concat(&[&chunks[0], &chunks[1], &chunks[2]]); // [R, 3 Ht]
                ops.linear(&normed, &w.fc, None)
            }
        }
    }

    /// The decoder layer: embeddings `[R, H]` of the tokens that follow each slot and hidden inputs `[R, H]` →
    /// layer output `[R, H]` before the final norm.
    ///
    /// `positions: [R]` are the RoPE positions of the *features* (slot position plus depth) [eagle3 §1].
    pub fn step<O: Ops, A: Attend<O>>(
        &self,
        ops: &mut O,
        w: &Eagle3Weights<O::W, O::N>,
        embedded: &O::T,
        hidden: &O::T,
        positions: &[u32],
        attend: &mut A,
    ) -> O::T {
        let eps = self.config.rms_norm_eps;
        let e = ops.rms_norm(embedded, &w.input_norm, eps);
        let n = ops.rms_norm(hidden, &w.hidden_norm, eps);
        let u = ops.concat(&[&e, &n]); // [R, 2H]
        // [R, nh hd], [R, nkv hd] twice
        let [q, k, v] = ops.linears(&u, [(&w.q_proj, None), (&w.k_proj, None), (&w.v_proj, None)]);
        let q = ops.rope(q, &self.rope, positions);
        let k = ops.rope(k, &self.rope, positions);
        let mixed = attend.attend(ops, q, k, v); // [R, nh hd]
        let o = ops.linear(&mixed, &w.o_proj, None); // [R, H]
        // As published the residual is the raw hidden input [eagle3 §2.2, §7].
        let residual = if self.config.norm_before_residual { n } else { hidden.clone() };
        let h1 = ops.add(residual, &o);
        let n = ops.rms_norm(&h1, &w.post_norm, eps);
        let [gate, up] = ops.linears(&n, [(&w.gate_proj, None), (&w.up_proj, None)]); // [R, I] each
        let act = ops.gated(Activation::Silu, gate, &up);
        let down = ops.linear(&act, &w.down_proj, None); // [R, H]
        ops.add(h1, &down)
    }

    /// Final norm: layer output `[R, H]` → input of the head `[R, H]`.
    pub fn head_input<O: Ops>(&self, ops: &mut O, w: &Eagle3Weights<O::W, O::N>, output: &O::T) -> O::T {
        ops.rms_norm(output, &w.norm, self.config.rms_norm_eps)
    }

    /// Logits over the draft vocabulary `[R, Vd]` from [`Eagle3::head_input`].
    pub fn logits<O: Ops>(&self, ops: &mut O, w: &Eagle3Weights<O::W, O::N>, head_input: &O::T) -> O::T {
        ops.linear(head_input, &w.lm_head, None)
    }

    /// The hidden input of the next depth, given this depth's layer output and its [`Eagle3::head_input`].
    pub fn feedback<T: Clone>(&self, output: &T, head_input: &T) -> T {
        match self.config.feedback {
            Feedback::PreNorm => output.clone(),
            Feedback::PostNorm => head_input.clone(),
        }
    }
}

mod decode;

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN: &str = r#"{"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "vocab_size": 151936,
        "draft_vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": null, "max_position_embeddings": 40960,
        "attention_bias": false, "tie_word_embeddings": false, "bos_token_id": 151643, "eos_token_id": 151645}"#;

    #[test]
    fn config_survives_writing_and_reading() {
        let config = Eagle3Config::from_json(QWEN).unwrap();
        assert_eq!((config.draft_vocab_size, config.head_dim, config.kv_width()), (32000, 128, 1024));
        let mut variants = vec![config.clone()];
        let mut other = config;
        other.fc_norm = true;
        other.norm_before_residual = true;
        other.feedback = Feedback::PostNorm;
        other.target_hidden_size = 5120;
        other.target_layer_ids = Some([1, 9, 17]);
        other.eos_token_ids = vec![3, 4];
        other.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        variants.push(other);
        for config in variants {
            let text = config.to_value().unwrap().to_string();
            assert_eq!(Eagle3Config::from_json(&text).unwrap(), config);
        }
    }

    #[test]
    fn layer_ids_of_both_conventions_mean_the_same_layers() {
        let with = |key: &str| {
            let text = QWEN.replacen('{', &format!("{{{key}, "), 1);
            Eagle3Config::from_json(&text).unwrap().target_layer_ids
        };
        assert_eq!(
            with(r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}"#),
            Some([1, 17, 32])
        );
        assert_eq!(with(r#""eagle_aux_hidden_state_layer_ids": [2, 18, 33]"#), Some([1, 17, 32]));
        for open in [
            r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": []}"#,
            r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": null}"#,
            r#""eagle_config": {"use_aux_hidden_state": true}"#,
            r#""eagle_config": {}"#,
            r#""eagle_config": null"#,
            r#""eagle_aux_hidden_state_layer_ids": []"#,
            r#""eagle_aux_hidden_state_layer_ids": null"#,
            r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": []}, "eagle_aux_hidden_state_layer_ids": []"#,
        ] {
            assert_eq!(with(open), None, "{open} leaves the default");
        }
        assert_eq!(
            with(
                r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": []}, "eagle_aux_hidden_state_layer_ids": [2, 18, 33]"#
            ),
            Some([1, 17, 32]),
            "an empty list does not hide the other key"
        );
    }

    #[test]
    fn layer_ids_that_are_none_name_their_key_and_the_way_out() {
        for (key, wanted) in [
            (
                r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}"#,
                "`eagle_config.eagle_aux_hidden_state_layer_ids` should be three layer ids, counted from 0, found `[1,2]`",
            ),
            (
                r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1", "2", "3"]}"#,
                r#"found `["1","2","3"]`"#,
            ),
            (r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 2, 3]}"#, "found `[-1,2,3]`"),
            (r#""eagle_config": {"eagle_aux_hidden_state_layer_ids": "1,2,3"}"#, r#"found `"1,2,3"`"#),
            (r#""eagle_config": [1, 2, 3]"#, "`eagle_config` should be an object, found `[1,2,3]`"),
            (
                r#""eagle_aux_hidden_state_layer_ids": [0, 2, 3]"#,
                "`eagle_aux_hidden_state_layer_ids` should be three layer numbers, counted from 1, found `[0,2,3]`",
            ),
            (r#""eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4]"#, "found `[1,2,3,4]`"),
        ] {
            let text = QWEN.replacen('{', &format!("{{{key}, "), 1);
            let error = Eagle3Config::from_json(&text).unwrap_err();
            assert!(error.to_string().contains(wanted), "{key}: {error}");
            assert!(error.hint().unwrap().contains("--layers LOW,MID,HIGH"), "{error}");
        }
    }

    #[test]
    fn unsupported_variants_and_wrong_numbers_are_refused() {
        for (from, to) in [
            (r#""attention_bias": false"#, r#""attention_bias": true"#),
            (r#""num_hidden_layers": 1"#, r#""num_hidden_layers": 2"#),
            (r#""silu""#, r#""gelu""#),
            (r#""rope_scaling": null"#, r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#),
            (r#""hidden_size": 4096"#, r#""hidden_size": -1"#),
            (r#""hidden_size": 4096"#, r#""hidden_size": 1e300"#),
            (r#""num_key_value_heads": 8"#, r#""num_key_value_heads": 7"#),
            (r#""draft_vocab_size": 32000"#, r#""draft_vocab_size": 9999999"#),
            (r#""head_dim": 128"#, r#""head_dim": 127"#),
        ] {
            let text = QWEN.replace(from, to);
            assert_ne!(text, QWEN);
            assert!(Eagle3Config::from_json(&text).is_err(), "{to}");
        }
        assert!(Eagle3Config::from_json("[1]").is_err());
        assert!(Eagle3Config::from_json("{").is_err());
    }

    #[test]
    fn tensors_carry_the_published_names() {
        let names: Vec<String> =
            Eagle3Config::from_json(QWEN).unwrap().tensors().into_iter().map(|t| t.0).collect();
        assert_eq!(names.len(), 13);
        for name in [
            "fc.weight",
            "midlayer.self_attn.o_proj.weight",
            "midlayer.mlp.down_proj.weight",
            "lm_head.weight",
        ] {
            assert!(names.iter().any(|n| n == name), "{name}");
        }
    }
}
