//! P-EAGLE: an EAGLE-3 layer and plain layers behind it that propose several tokens in one pass [dflash §4].
//!
//! A real slot holds the target's features and the token behind them, as in EAGLE-3. Behind the last one stand entries of
//! a mask token and a learnt stand-in for the missing features; each proposes the token of its own depth.
//!
//! Shape legend: `R` rows, `H` draft width, `Ht` target width, `V`/`Vd` target/draft vocabulary.

use std::sync::Arc;

use draftsmith_core::{LayerId, default_target_layers};
use draftsmith_formats::run::{DraftTable, MethodWord};
use draftsmith_kernels::{PackMode, RopeScaling, RopeTable};
use serde_json::{Value, json};

use crate::classes::draft_defaults;
use crate::config::TargetConfig;
use crate::draft_config::{
    DraftConfigError, DraftKind, DraftNumbers, DraftShape, DraftSpec, DraftWork, Keys, Published, Word,
    eos_value, plain,
};
use crate::draft_layer::{AttentionWeights, LayerShape, MlpWeights, PlainLayer};
use crate::ops::{Attend, Ops};
use crate::weights::{BuildWeights, TensorList};

/// Names of the architecture; the first is written.
const ARCHITECTURES: [&str; 1] = ["PEagleDraftModel"];

/// What the network covers, as advice.
const SUPPORTED: &str = "use a P-EAGLE draft of Llama layers: SiLU, no biases, plain RoPE";
/// How captured layers are put right.
const LAYERS_HINT: &str = "name three of the target's layers whose output the draft reads, counted from 0";
/// Captured layers.
const CAPTURED: usize = 3;
/// Tokens of a proposal where the configuration does not say.
const DEPTHS: usize = 5;

/// Shapes and switches of a P-EAGLE draft, as in its `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct PEagleConfig {
    /// `V`
    pub vocab_size: usize,
    /// `Vd`
    pub draft_vocab_size: usize,
    /// Sizes of a layer.
    pub layer: LayerShape,
    /// `Ht`
    pub target_hidden_size: usize,
    /// Layers, the first one included.
    pub num_layers: usize,
    /// Tokens of a proposal.
    pub num_depths: usize,
    /// RoPE base.
    pub rope_theta: f32,
    /// Positions the draft is meant for.
    pub max_position_embeddings: usize,
    /// The first layer's residual is the normalised hidden input.
    pub norm_before_residual: bool,
    /// Token of the entries that stand for what is not known.
    pub mask_token_id: u32,
    /// 0-based output layers, `None` for the default formula.
    pub target_layer_ids: Option<[u32; 3]>,
    /// Standard deviation of random initial weights.
    pub initializer_range: f32,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

impl PEagleConfig {
    /// The draft that a target gets when nobody says otherwise: layers of the target's own shapes.
    pub fn for_target(
        target: &TargetConfig,
        draft_vocab_size: usize,
        num_layers: usize,
        num_depths: usize,
        mask_token_id: u32,
    ) -> PEagleConfig {
        PEagleConfig {
            vocab_size: target.vocab_size,
            draft_vocab_size,
            layer: LayerShape {
                hidden_size: target.hidden_size,
                intermediate_size: target.intermediate_size,
                num_attention_heads: target.num_heads,
                num_key_value_heads: target.num_kv_heads,
                head_dim: target.head_dim,
                rms_norm_eps: target.rms_norm_eps,
            },
            target_hidden_size: target.hidden_size,
            num_layers,
            num_depths,
            rope_theta: target.rope_theta,
            max_position_embeddings: target.max_position,
            norm_before_residual: false,
            mask_token_id,
            target_layer_ids: None,
            initializer_range: 0.02,
            bos_token_id: target.bos_id,
            eos_token_ids: target.eos_ids.clone(),
            pad_token_id: None,
        }
    }

    /// Reads the parsed `config.json`.
    ///
    /// # Errors
    /// What is wrong with it, key named.
    pub fn from_value(value: &Value) -> Result<PEagleConfig, DraftConfigError> {
        let keys = Keys::of_config(value, SUPPORTED)?;
        let object = keys.object();
        keys.needs_silu()?;
        let class = draft_defaults(keys.present("model_type").and_then(Value::as_str));
        let vocab_size = keys.size_or("vocab_size", class.vocab_size)?;
        let hidden_size = keys.size_or("hidden_size", class.hidden_size)?;
        let num_attention_heads = keys.size_or("num_attention_heads", class.num_attention_heads)?;
        // The base alone counts: the reference ignores a scaling.
        let beside = keys.float_or("rope_theta", class.rope_theta as f32)?;
        let rope_theta = match keys.present("rope_parameters").and_then(Value::as_object) {
            Some(rope) => keys.inside(rope).float_or("rope_theta", beside)?,
            None => beside,
        };
        let nested = keys.present("dflash_config").and_then(Value::as_object);
        let mask = match nested.map(|n| keys.inside(n).id("mask_token_id")).transpose()?.flatten() {
            Some(id) => Some(id),
            None => match keys.id("pard_token")? {
                Some(id) => Some(id),
                None => keys.id("ptd_token_id")?,
            },
        };
        let mask_token_id = mask.ok_or_else(|| keys.bad("pard_token", "the id of the mask token"))?;
        let config = PEagleConfig {
            vocab_size,
            draft_vocab_size: keys.size_or("draft_vocab_size", vocab_size)?,
            layer: LayerShape {
                hidden_size,
                intermediate_size: keys.size_or("intermediate_size", class.intermediate_size)?,
                num_attention_heads,
                num_key_value_heads: match class.num_key_value_heads {
                    Some(heads) if !object.contains_key("num_key_value_heads") => heads,
                    _ => keys.size_or("num_key_value_heads", num_attention_heads)?,
                },
                head_dim: match class.head_dim {
                    Some(dim) => keys.size_or("head_dim", dim)?,
                    None => keys.size_or("head_dim", hidden_size / num_attention_heads)?,
                },
                rms_norm_eps: keys.float_or("rms_norm_eps", class.rms_norm_eps as f32)?,
            },
            target_hidden_size: keys.size_or("target_hidden_size", hidden_size)?,
            num_layers: keys.count_or("num_hidden_layers", 4)?,
            num_depths: keys.count_or("num_depths", DEPTHS)?,
            rope_theta,
            max_position_embeddings: keys
                .size_or("max_position_embeddings", class.max_position_embeddings)?,
            norm_before_residual: keys.flag("norm_before_residual")?,
            mask_token_id,
            target_layer_ids: layers_from(&keys)?,
            initializer_range: keys.float_or("initializer_range", 0.02)?,
            bos_token_id: keys.bos_or(class.bos_token_id)?,
            eos_token_ids: keys.eos_or(class.eos_token_id)?,
            pad_token_id: keys.id("pad_token_id")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Width of the concatenated target features, `3 Ht`.
    pub fn features_width(&self) -> usize {
        CAPTURED * self.target_hidden_size
    }
}

fn layers_from(keys: &Keys<'_>) -> Result<Option<[u32; 3]>, DraftConfigError> {
    const KEY: &str = "eagle_aux_hidden_state_layer_ids";
    let Some(nested) = keys.present("eagle_config").and_then(Value::as_object) else { return Ok(None) };
    let Some(list) = nested.get(KEY).filter(|list| !list.is_null()) else { return Ok(None) };
    let ids: Option<Vec<u32>> = list
        .as_array()
        .map(Vec::as_slice)
        .and_then(|list| list.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect());
    match ids {
        Some(ids) if ids.is_empty() => Ok(None),
        Some(ids) if ids.len() == CAPTURED => Ok(Some([ids[0], ids[1], ids[2]])),
        _ => Err(DraftConfigError::Layers {
            key: format!("eagle_config.{KEY}"),
            wanted: "three layer ids, counted from 0",
            found: list.to_string().chars().take(80).collect(),
            hint: LAYERS_HINT,
        }),
    }
}

impl DraftKind for PEagleConfig {
    const WORDS: &'static [Word] = &[Word {
        method: MethodWord {
            name: "p-eagle",
            about: "P-EAGLE: an EAGLE-3 layer and plain ones that propose several tokens in one pass.",
        },
        architectures: &ARCHITECTURES,
    }];

    /// The mask token is the last id unless one is named.
    fn of_table(table: &DraftTable, target: &TargetConfig, draft_vocab_size: usize) -> PEagleConfig {
        let t = &table.p_eagle;
        let mask = t.mask_token_id.unwrap_or(target.vocab_size as u32 - 1);
        let (layers, depths) = (t.layers as usize, t.depths as usize);
        let mut config = PEagleConfig::for_target(target, draft_vocab_size, layers, depths, mask);
        config.layer.take_table(table);
        config
    }

    fn read(value: &Value) -> Result<PEagleConfig, DraftConfigError> {
        PEagleConfig::from_value(value)
    }
}

impl DraftSpec for PEagleConfig {
    fn name(&self) -> &'static str {
        Self::WORDS[0].method.name
    }

    fn title(&self) -> &'static str {
        "A P-EAGLE draft"
    }

    fn shape(&self) -> DraftShape {
        DraftShape {
            vocab_size: self.vocab_size,
            draft_vocab_size: self.draft_vocab_size,
            hidden_size: self.layer.hidden_size,
            target_hidden_size: self.target_hidden_size,
            head_dim: self.layer.head_dim,
            max_position_embeddings: self.max_position_embeddings,
            initializer_range: self.initializer_range,
            captured_layers: CAPTURED,
            has_vocab_map: true,
            has_embedding: true,
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

    fn set_mask_token(&mut self, id: u32) {
        self.mask_token_id = id;
    }

    fn numbers(&mut self) -> Option<DraftNumbers<'_>> {
        Some(DraftNumbers {
            vocab_size: &mut self.vocab_size,
            draft_vocab_size: &mut self.draft_vocab_size,
            rope_theta: &mut self.rope_theta,
            rope_scaling: None,
            rms_norm_eps: &mut self.layer.rms_norm_eps,
        })
    }

    fn set_token_ids(&mut self, bos: Option<u32>, eos: &[u32], pad: Option<u32>) {
        (self.bos_token_id, self.pad_token_id) = (bos, pad);
        self.eos_token_ids = eos.to_vec();
    }

    fn check(&self) -> Result<(), DraftConfigError> {
        let bad = |what: String| Err(DraftConfigError::Shapes { what });
        if let Some(what) = self.layer.problem() {
            return bad(what);
        }
        if self.num_layers == 0 || self.num_depths == 0 {
            return bad("a draft has at least one layer and one depth".into());
        }
        if self.mask_token_id as usize >= self.vocab_size {
            return bad(format!(
                "the mask token {} is outside the vocabulary of {} ids",
                self.mask_token_id, self.vocab_size
            ));
        }
        if self.draft_vocab_size > self.vocab_size {
            return bad(format!(
                "a draft vocabulary of {} ids is larger than the target's {}",
                self.draft_vocab_size, self.vocab_size
            ));
        }
        Ok(())
    }

    fn to_value(&self) -> Result<Value, DraftConfigError> {
        let l = &self.layer;
        let mut value = json!({
            "architectures": [ARCHITECTURES[0]],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "hidden_size": l.hidden_size,
            "intermediate_size": l.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": l.num_attention_heads,
            "num_key_value_heads": l.num_key_value_heads,
            "head_dim": l.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": plain(l.rms_norm_eps),
            "rope_theta": plain(self.rope_theta),
            "rope_scaling": Value::Null,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "norm_before_residual": self.norm_before_residual,
            "num_depths": self.num_depths,
            // Engines ask for either.
            "pard_token": self.mask_token_id,
            "ptd_token_id": self.mask_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_value(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "initializer_range": plain(self.initializer_range),
            "torch_dtype": "bfloat16",
            "use_cache": true,
        });
        if self.target_hidden_size != l.hidden_size {
            value["target_hidden_size"] = json!(self.target_hidden_size);
        }
        if let Some(ids) = self.target_layer_ids {
            // Nested key: 0-based output layers. Top-level key: counted from 1, as vLLM does.
            value["eagle_config"] =
                json!({ "eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": true });
            value["eagle_aux_hidden_state_layer_ids"] = json!(ids.map(|id| id + 1));
        }
        Ok(value)
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = TensorList::default();
        let Ok(_) = PEagleWeights::build(self, &mut list);
        // Stored with one more dimension, as the reference has it.
        for (_, shape) in list.0.iter_mut().filter(|(name, _)| name == "mask_hidden") {
            shape.insert(0, 1);
        }
        list.0
    }

    /// One pass over the layers and the head, a row for each token.
    fn work(&self, tokens: usize, mode: PackMode) -> DraftWork {
        let used = |name: &str| name != "embed_tokens.weight" && name != "mask_hidden";
        let matrices = self.tensors().into_iter().filter(|(name, shape)| shape.len() > 1 && used(name));
        let weights: u64 = matrices.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        DraftWork { multiply_adds: weights * tokens as u64, ..DraftWork::of(weights, mode) }
    }

    fn tokens_per_pass(&self) -> usize {
        self.num_depths
    }

    fn published(&self) -> Published<'_> {
        Published::PEagle(self)
    }
}

/// The first layer: EAGLE-3's.
#[derive(Clone, Debug)]
pub struct FusedLayer<W, N> {
    /// Norm of the token embedding `[H]`.
    pub input_norm: N,
    /// Norm of the hidden input `[H]`.
    pub hidden_norm: N,
    /// Attention over both side by side.
    pub attention: AttentionWeights<W, N>,
    /// Feed-forward.
    pub mlp: MlpWeights<W, N>,
}

/// All trained weights of a P-EAGLE draft.
#[derive(Clone, Debug)]
pub struct PEagleWeights<W, N> {
    /// `embed_tokens.weight` `[V, H]`: it starts as the target's and is trained.
    pub embed: W,
    /// `fc.weight` `[H, 3 Ht]`
    pub fc: W,
    /// `mask_hidden` `[1, 3 Ht]`: stands for features that are not there.
    pub mask_hidden: W,
    /// `layers.0`
    pub first: FusedLayer<W, N>,
    /// `layers.{i}`, from 1 on.
    pub layers: Vec<PlainLayer<W, N>>,
    /// `norm.weight` `[H]`
    pub norm: N,
    /// `lm_head.weight` `[Vd, H]`
    pub lm_head: W,
}

impl<W, N> PEagleWeights<W, N> {
    /// Asks `source` for every tensor once, in a fixed order.
    ///
    /// # Errors
    /// The source's.
    pub fn build<S: BuildWeights<W = W, N = N>>(
        config: &PEagleConfig,
        source: &mut S,
    ) -> Result<PEagleWeights<W, N>, S::Error> {
        let (shape, h) = (&config.layer, config.layer.hidden_size);
        let embed = source.linear("embed_tokens.weight", config.vocab_size, h)?;
        let fc = source.linear("fc.weight", h, config.features_width())?;
        let mask_hidden = source.linear("mask_hidden", 1, config.features_width())?;
        let first = FusedLayer {
            input_norm: source.norm("layers.0.input_layernorm.weight", h)?,
            hidden_norm: source.norm("layers.0.hidden_norm.weight", h)?,
            attention: AttentionWeights::build("layers.0", shape, 2 * h, false, source)?,
            mlp: MlpWeights::build("layers.0", shape, source)?,
        };
        let mut layers = Vec::with_capacity(config.num_layers.saturating_sub(1));
        for i in 1..config.num_layers {
            layers.push(PlainLayer::build(&format!("layers.{i}"), shape, false, source)?);
        }
        Ok(PEagleWeights {
            embed,
            fc,
            mask_hidden,
            first,
            layers,
            norm: source.norm("norm.weight", h)?,
            lm_head: source.linear("lm_head.weight", config.draft_vocab_size, h)?,
        })
    }
}

/// The P-EAGLE network: configuration and RoPE table. Weights are handed to each call.
#[derive(Clone, Debug)]
pub struct PEagleNet {
    /// Shapes and switches.
    pub config: PEagleConfig,
    /// RoPE frequencies.
    pub rope: Arc<RopeTable>,
}

impl PEagleNet {
    /// The network of a checked configuration.
    pub fn new(config: PEagleConfig) -> PEagleNet {
        let rope = Arc::new(RopeTable::new(config.layer.head_dim, config.rope_theta, &RopeScaling::None));
        PEagleNet { config, rope }
    }

    /// Target features `[R, 3 Ht]` → hidden input `[R, H]`.
    pub fn project<O: Ops>(&self, ops: &mut O, w: &PEagleWeights<O::W, O::N>, features: &O::T) -> O::T {
        ops.linear(features, &w.fc, None)
    }

    /// Hidden input `[1, H]` of an entry whose features are not there.
    pub fn unknown<O: Ops>(&self, ops: &mut O, w: &PEagleWeights<O::W, O::N>) -> O::T {
        let stand_in = ops.embed(&w.mask_hidden, &[0], 1.0); // [1, 3 Ht]
        ops.linear(&stand_in, &w.fc, None)
    }

    /// Tokens and hidden inputs `[R, H]` → output of the last layer `[R, H]` before the final norm. `attend` is asked once
    /// for every layer, in order.
    pub fn layers<O: Ops, A: Attend<O>>(
        &self,
        ops: &mut O,
        w: &PEagleWeights<O::W, O::N>,
        tokens: &[u32],
        hidden: &O::T,
        positions: &[u32],
        attend: &mut A,
    ) -> O::T {
        let (shape, place) = (&self.config.layer, (&self.rope, positions));
        let embedded = ops.embed(&w.embed, tokens, 1.0);
        let e = ops.rms_norm(&embedded, &w.first.input_norm, shape.rms_norm_eps);
        let n = ops.rms_norm(hidden, &w.first.hidden_norm, shape.rms_norm_eps);
        let u = ops.concat(&[&e, &n]); // [R, 2H]
        let o = w.first.attention.run(ops, shape, &u, place, attend);
        let residual = if self.config.norm_before_residual { n } else { hidden.clone() };
        let h = ops.add(residual, &o);
        let mut h = w.first.mlp.run(ops, shape, h);
        for layer in &w.layers {
            h = layer.run(ops, shape, h, place, attend);
        }
        h
    }

    /// Final norm: output of the last layer `[R, H]` → input of the head `[R, H]`.
    pub fn head_input<O: Ops>(&self, ops: &mut O, w: &PEagleWeights<O::W, O::N>, output: &O::T) -> O::T {
        ops.rms_norm(output, &w.norm, self.config.layer.rms_norm_eps)
    }

    /// Logits over the draft vocabulary `[R, Vd]`.
    pub fn logits<O: Ops>(&self, ops: &mut O, w: &PEagleWeights<O::W, O::N>, head_input: &O::T) -> O::T {
        ops.linear(head_input, &w.lm_head, None)
    }
}

mod decode;

pub use decode::{PEagleDraft, PEaglePart};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_survives_writing_and_reading_and_needs_a_mask_token() {
        let text = json!({
            "architectures": ["PEagleDraftModel"], "vocab_size": 48, "draft_vocab_size": 20, "hidden_size": 16,
            "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "num_hidden_layers": 3, "pard_token": 47, "norm_before_residual": true, "rms_norm_eps": 1e-5,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}
        });
        let config = PEagleConfig::from_value(&text).unwrap();
        assert_eq!((config.mask_token_id, config.num_layers, config.num_depths), (47, 3, 5));
        assert_eq!(config.target_layer_ids, Some([1, 3, 5]));
        assert_eq!(PEagleConfig::from_value(&config.to_value().unwrap()).unwrap(), config);
        let mut without = text.clone();
        without.as_object_mut().unwrap().remove("pard_token");
        assert!(PEagleConfig::from_value(&without).unwrap_err().to_string().contains("pard_token"));
        let mut nested = without;
        nested["dflash_config"] = json!({"mask_token_id": 7});
        assert_eq!(PEagleConfig::from_value(&nested).unwrap().mask_token_id, 7);
        for key in ["num_hidden_layers", "num_depths"] {
            let mut many = text.clone();
            many[key] = json!(200_000_000);
            assert!(PEagleConfig::from_value(&many).unwrap_err().to_string().contains(key));
        }
        let mut wrong = text;
        wrong["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([1, 2]);
        assert!(PEagleConfig::from_value(&wrong).is_err());
    }
}
