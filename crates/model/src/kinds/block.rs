//! Drafts that propose a block in one pass: DFlash and DSpark, written once for training and decoding.
//!
//! The context is the target's features; a block is the last token and mask tokens behind it. Keys and values of both
//! come from the same weights, so a committed position is a slot of the cache, made of its features [dflash §1.1].
//! Embedding and head are the target's. DSpark adds a Markov head, which corrects the logits of a slot by the token
//! before it, and a confidence for every slot [dflash §3].
//!
//! Shape legend: `R` rows, `C` context positions, `K` captured layers, `H` width of draft and target, `V`/`Vd` vocabulary
//! of the target, and the part of it that is proposed, `M` Markov rank, `Bk` slots of a block.

use std::sync::Arc;

use draftsmith_formats::run::{DraftTable, MarkovHead, MethodWord};
use draftsmith_kernels::{Cell, PackMode, RopeScaling, RopeTable};
use serde_json::{Map, Value, json};

use crate::classes::draft_defaults;
use crate::config::TargetConfig;
use crate::draft_config::{
    DraftConfigError, DraftKind, DraftNumbers, DraftShape, DraftSpec, DraftWork, Keys, Published, Word,
    eos_value, plain, rope_scaling_value,
};
use crate::draft_layer::{LayerShape, PlainLayer};
use crate::ops::{Attend, Ops};
use crate::weights::{BuildWeights, TensorList};

/// The word for plain blocks.
const DFLASH_WORD: &str = "dflash";
/// The word for blocks with a Markov head.
const DSPARK_WORD: &str = "dspark";
/// Names of the architecture of plain blocks; the first is written.
const DFLASH: [&str; 1] = ["DFlashDraftModel"];
/// Names of the architecture of blocks with a Markov head; the first, which the engines take, is written.
const DSPARK: [&str; 2] = ["Qwen3DSparkModel", "DSparkDraftModel"];

/// What the network covers, as advice.
const SUPPORTED: &str = "use a DFlash or DSpark draft of Qwen3 layers: SiLU, no biases, RoPE plain, linear or llama3, \
     full or sliding attention";
/// How captured layers are put right.
const LAYERS_HINT: &str = "name the target's layers whose output the draft reads, counted from 0";

/// How a Markov head makes its correction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkovKind {
    /// Of the token before alone.
    Vanilla,
    /// The same, gated by the slot's output.
    Gated,
    /// A state that runs along the block.
    Rnn,
}

impl MarkovKind {
    /// The word in configurations.
    pub fn name(self) -> &'static str {
        match self {
            MarkovKind::Vanilla => "vanilla",
            MarkovKind::Gated => "gated",
            MarkovKind::Rnn => "rnn",
        }
    }
}

/// A Markov head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkovConfig {
    /// `M`
    pub rank: usize,
    /// Its kind.
    pub kind: MarkovKind,
}

/// What DSpark has beside DFlash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparkConfig {
    /// The Markov head; `None` for rank 0.
    pub markov: Option<MarkovConfig>,
    /// A confidence for each slot; whether it sees the token before.
    pub confidence: Option<bool>,
}

/// Shapes and switches of a block draft, as in its `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockConfig {
    /// `V`
    pub vocab_size: usize,
    /// `Vd`: rows of the target's head that proposals are chosen from.
    pub draft_vocab_size: usize,
    /// Sizes of a layer.
    pub layer: LayerShape,
    /// RoPE base.
    pub rope_theta: f32,
    /// RoPE frequency scaling.
    pub rope_scaling: RopeScaling,
    /// Positions the draft is meant for.
    pub max_position_embeddings: usize,
    /// `[layers]` whether a layer sees the last positions alone, and its block causally.
    pub sliding: Vec<bool>,
    /// Positions of such a window, the query's own included.
    pub sliding_window: Option<usize>,
    /// `Bk`
    pub block_size: usize,
    /// Layers of the target.
    pub num_target_layers: Option<usize>,
    /// Token that stands for one to be proposed.
    pub mask_token_id: u32,
    /// 0-based output layers, `None` for the default formula.
    pub target_layer_ids: Option<Vec<u32>>,
    /// DSpark's heads; `None` for DFlash.
    pub spark: Option<SparkConfig>,
    /// Standard deviation of random initial weights.
    pub initializer_range: f32,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

/// The layers that a block draft of `layers` layers reads of a target with `target_layers`, if nobody says otherwise:
/// from the second to the last but two, evenly, halves to the even side [dflash §1.1].
pub fn default_block_layers(layers: usize, target_layers: u32) -> Vec<u32> {
    if layers <= 1 {
        return vec![target_layers / 2];
    }
    let last = target_layers.saturating_sub(1);
    (0..layers)
        .map(|i| {
            let place = 1.0 + i as f64 * (f64::from(target_layers) - 4.0) / (layers as f64 - 1.0);
            (place.round_ties_even().max(0.0) as u32).min(last)
        })
        .collect()
}

impl BlockConfig {
    /// The draft that a target gets when nobody says otherwise: `layers` layers of the target's own shapes, with the
    /// norms on query and key heads that the layer's class has.
    pub fn for_target(
        target: &TargetConfig,
        draft_vocab_size: usize,
        layers: usize,
        block_size: usize,
        mask_token_id: u32,
        spark: Option<SparkConfig>,
    ) -> BlockConfig {
        let rope_scaling = match &target.rope_scaling {
            RopeScaling::Factors(_) => RopeScaling::None,
            other => other.clone(),
        };
        BlockConfig {
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
            rope_theta: target.rope_theta,
            rope_scaling,
            max_position_embeddings: target.max_position,
            sliding: vec![false; layers],
            sliding_window: None,
            block_size,
            num_target_layers: Some(target.num_layers),
            mask_token_id,
            target_layer_ids: Some(default_block_layers(layers, target.num_layers as u32)),
            spark,
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
    pub fn from_value(value: &Value) -> Result<BlockConfig, DraftConfigError> {
        let keys = Keys::of_config(value, SUPPORTED)?;
        let object = keys.object();
        keys.needs_silu()?;
        let model_type = keys.present("model_type").and_then(Value::as_str).unwrap_or("qwen3");
        let class = draft_defaults(Some(model_type));
        let table = |key: &str| match keys.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map).filter(|map| !map.is_empty())),
            Some(_) => Err(keys.bad(key, "an object or null")),
        };
        // The four words of the Markov head may stand at the top, too, where an engine wants them.
        let empty = Map::new();
        let nested = keys.inside(table("dflash_config")?.unwrap_or(&empty));
        let either = |key: &str| if nested.present(key).is_some() { &nested } else { &keys };
        let hidden_size = keys.size_or("hidden_size", class.hidden_size)?;
        let num_attention_heads = keys.size_or("num_attention_heads", class.num_attention_heads)?;
        let max_position_embeddings =
            keys.size_or("max_position_embeddings", class.max_position_embeddings)?;
        let head_dim = match class.head_dim {
            Some(dim) => keys.size_or("head_dim", dim)?,
            None => keys.size_or("head_dim", hidden_size / num_attention_heads)?,
        };
        let num_key_value_heads = match class.num_key_value_heads {
            Some(heads) if !object.contains_key("num_key_value_heads") => heads,
            _ => keys.size_or("num_key_value_heads", num_attention_heads)?,
        };
        let rope = match table("rope_scaling")? {
            Some(rope) => Some(rope),
            None => table("rope_parameters")?,
        };
        let beside = keys.float_or("rope_theta", class.rope_theta as f32)?;
        let rope_theta = match rope {
            Some(rope) => keys.inside(rope).float_or("rope_theta", beside)?,
            None => beside,
        };
        let rope_scaling = match rope {
            Some(rope) => keys.inside(rope).rope_scaling(max_position_embeddings)?,
            None => RopeScaling::None,
        };
        let layers = keys.count_or("num_hidden_layers", 1)?;
        let (sliding, sliding_window) = sliding_from(&keys, layers)?;
        let vocab_size = keys.size_or("vocab_size", class.vocab_size)?;
        let layer_ids = match nested.present("target_layer_ids") {
            None => None,
            Some(list) => {
                let ids: Option<Vec<u32>> = list.as_array().map(Vec::as_slice).and_then(|list| {
                    list.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect()
                });
                Some(ids.filter(|ids| !ids.is_empty()).ok_or_else(|| DraftConfigError::Layers {
                    key: "dflash_config.target_layer_ids".into(),
                    wanted: "a list of layer ids, counted from 0",
                    found: list.to_string().chars().take(80).collect(),
                    hint: LAYERS_HINT,
                })?)
            }
        };
        let mask = either("mask_token_id");
        let mask_token_id =
            mask.id("mask_token_id")?.ok_or_else(|| mask.bad("mask_token_id", "a token id"))?;
        let config = BlockConfig {
            vocab_size,
            draft_vocab_size: keys.size_or("draft_vocab_size", vocab_size)?,
            layer: LayerShape {
                hidden_size,
                intermediate_size: keys.size_or("intermediate_size", class.intermediate_size)?,
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                rms_norm_eps: keys.float_or("rms_norm_eps", class.rms_norm_eps as f32)?,
            },
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            sliding,
            sliding_window,
            block_size: keys.count_or("block_size", 16)?,
            num_target_layers: match keys.present("num_target_layers") {
                None => None,
                Some(_) => Some(keys.size("num_target_layers")?),
            },
            mask_token_id,
            target_layer_ids: layer_ids,
            spark: spark_from(object, &nested, either)?,
            initializer_range: keys.float_or("initializer_range", 0.02)?,
            bos_token_id: keys.bos_or(class.bos_token_id)?,
            eos_token_ids: keys.eos_or(class.eos_token_id)?,
            pad_token_id: keys.id("pad_token_id")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Captured layers of the target.
    pub fn captured_layers(&self) -> usize {
        self.target_layer_ids.as_ref().map_or(self.sliding.len(), Vec::len)
    }

    /// Width of the concatenated target features, `K H`.
    pub fn features_width(&self) -> usize {
        self.captured_layers() * self.layer.hidden_size
    }

    /// Tokens that a block proposes: with DSpark the slot of the last token proposes, too.
    pub fn proposals(&self) -> usize {
        self.block_size - usize::from(self.spark.is_none())
    }

    /// Slots of a block before the first that proposes.
    pub fn first_proposal(&self) -> usize {
        self.block_size - self.proposals()
    }

    /// The Markov head.
    pub fn markov(&self) -> Option<MarkovConfig> {
        self.spark.and_then(|spark| spark.markov)
    }

    /// The first slot of the context that slot `slot` of a block at position `anchor` sees in a layer.
    pub fn context_from(&self, layer: usize, anchor: u32, slot: u32) -> u32 {
        match self.sliding_window.filter(|_| self.sliding[layer]) {
            Some(window) => (anchor + slot + 1).saturating_sub(window as u32),
            None => 0,
        }
    }
}

fn sliding_from(keys: &Keys<'_>, layers: usize) -> Result<(Vec<bool>, Option<usize>), DraftConfigError> {
    let used = keys.flag("use_sliding_window")?;
    let window = match keys.present("sliding_window") {
        None => None,
        Some(_) => Some(keys.size("sliding_window")?),
    };
    let sliding = match keys.present("layer_types") {
        None => {
            let from = match keys.present("max_window_layers") {
                Some(v) => v.as_u64().map_or(usize::MAX, |n| n as usize),
                None => crate::classes::QWEN_MAX_WINDOW_LAYERS,
            };
            (0..layers).map(|i| used && window.is_some() && i >= from).collect()
        }
        Some(list) => {
            let kind = |v: &Value| match v.as_str() {
                Some("full_attention") => Some(false),
                Some("sliding_attention") => Some(true),
                _ => None,
            };
            let kinds: Option<Vec<bool>> =
                list.as_array().map(Vec::as_slice).and_then(|list| list.iter().map(kind).collect());
            let kinds = kinds.filter(|kinds| kinds.len() == layers);
            kinds.ok_or_else(|| {
                keys.bad("layer_types", "`full_attention` or `sliding_attention` for each layer")
            })?
        }
    };
    if !sliding.contains(&true) {
        return Ok((sliding, None));
    }
    if !used {
        return Err(keys.bad("use_sliding_window", "true, for `layer_types` names a sliding layer"));
    }
    match window {
        Some(window) => Ok((sliding, Some(window))),
        None => {
            Err(keys.bad("sliding_window", "a positive integer, for `layer_types` names a sliding layer"))
        }
    }
}

fn spark_from<'k, 'a: 'k>(
    object: &Map<String, Value>,
    nested: &Keys<'_>,
    either: impl Fn(&str) -> &'k Keys<'a>,
) -> Result<Option<SparkConfig>, DraftConfigError> {
    let architecture = object.get("architectures").and_then(|a| a[0].as_str()).unwrap_or_default();
    match nested.present("projector_type").map(|p| p.as_str().unwrap_or_default()) {
        Some("dspark") => {}
        Some(other) => {
            return Err(nested.unsupported("dflash_config.projector_type", other.to_owned()));
        }
        None if DSPARK.contains(&architecture) => {}
        None => return Ok(None),
    }
    let rank = match either("markov_rank").present("markov_rank").and_then(Value::as_u64) {
        Some(0) => 0,
        _ => either("markov_rank").size_or("markov_rank", 256)?,
    };
    let kinds = [MarkovKind::Vanilla, MarkovKind::Gated, MarkovKind::Rnn];
    let at = either("markov_head_type");
    let kind = match at.present("markov_head_type") {
        None => MarkovKind::Vanilla,
        Some(word) => kinds
            .into_iter()
            .find(|k| word == k.name())
            .ok_or_else(|| at.bad("markov_head_type", "`vanilla`, `gated` or `rnn`"))?,
    };
    let at = either("enable_confidence_head");
    let confident = match at.present("enable_confidence_head") {
        Some(_) => at.flag("enable_confidence_head")?,
        // A positive factor of its loss means that there is one.
        None => {
            let alpha = either("confidence_head_alpha").present("confidence_head_alpha");
            alpha.and_then(Value::as_f64).is_some_and(|alpha| alpha > 0.0)
        }
    };
    let with_markov = either("confidence_head_with_markov").flag("confidence_head_with_markov")?;
    if confident && with_markov && rank == 0 {
        return Err(nested.bad("confidence_head_with_markov", "false without a Markov head"));
    }
    Ok(Some(SparkConfig {
        markov: (rank > 0).then_some(MarkovConfig { rank, kind }),
        confidence: confident.then_some(with_markov),
    }))
}

impl DraftKind for BlockConfig {
    const WORDS: &'static [Word] = &[
        Word {
            method: MethodWord {
                name: DFLASH_WORD,
                about: "DFlash: layers over target states that propose a block in one pass.",
            },
            architectures: &DFLASH,
        },
        Word {
            method: MethodWord {
                name: DSPARK_WORD,
                about: "DSpark: DFlash with a head that corrects each token by the one before it, and a confidence.",
            },
            architectures: &DSPARK,
        },
    ];

    /// The mask token is the last id unless one is named.
    fn of_table(table: &DraftTable, target: &TargetConfig, draft_vocab_size: usize) -> BlockConfig {
        let last = target.vocab_size as u32 - 1;
        let (layers, block_size, mask, window, spark) = match table.method.name() == DSPARK_WORD {
            true => {
                let t = &table.dspark;
                let kind = match t.markov_head {
                    MarkovHead::Vanilla => MarkovKind::Vanilla,
                    MarkovHead::Gated => MarkovKind::Gated,
                    MarkovHead::Rnn => MarkovKind::Rnn,
                };
                let rank = t.markov_rank as usize;
                let spark = SparkConfig {
                    markov: (rank > 0).then_some(MarkovConfig { rank, kind }),
                    confidence: t.confidence.then_some(t.confidence_with_markov && rank > 0),
                };
                (t.layers, t.block_size, t.mask_token_id, t.window, Some(spark))
            }
            false => {
                let t = &table.dflash;
                (t.layers, t.block_size, t.mask_token_id, t.window, None)
            }
        };
        let (layers, block_size) = (layers as usize, block_size as usize);
        let mut config = BlockConfig::for_target(
            target,
            draft_vocab_size,
            layers,
            block_size,
            mask.unwrap_or(last),
            spark,
        );
        config.layer.take_table(table);
        config.sliding_window = window.map(|window| window as usize);
        config.sliding = vec![window.is_some(); layers];
        config
    }

    fn read(value: &Value) -> Result<BlockConfig, DraftConfigError> {
        BlockConfig::from_value(value)
    }
}

impl DraftSpec for BlockConfig {
    fn name(&self) -> &'static str {
        if self.spark.is_some() { DSPARK_WORD } else { DFLASH_WORD }
    }

    fn title(&self) -> &'static str {
        if self.spark.is_some() { "A DSpark draft" } else { "A DFlash draft" }
    }

    fn shape(&self) -> DraftShape {
        DraftShape {
            vocab_size: self.vocab_size,
            draft_vocab_size: self.draft_vocab_size,
            hidden_size: self.layer.hidden_size,
            target_hidden_size: self.layer.hidden_size,
            head_dim: self.layer.head_dim,
            max_position_embeddings: self.max_position_embeddings,
            initializer_range: self.initializer_range,
            captured_layers: self.captured_layers(),
            has_vocab_map: self.draft_vocab_size < self.vocab_size,
            has_embedding: false,
            answer_width: self.layer.hidden_size + self.markov().map_or(0, |m| m.rank),
        }
    }

    fn target_layers(&self) -> Option<Vec<u32>> {
        self.target_layer_ids.clone()
    }

    fn default_layers(&self, num_layers: u32) -> Vec<u32> {
        default_block_layers(self.sliding.len(), num_layers)
    }

    fn set_target_layers(&mut self, layers: &[u32]) -> Result<(), DraftConfigError> {
        if layers.is_empty() {
            return Err(DraftConfigError::Shapes { what: "it reads at least one layer, not 0".into() });
        }
        self.target_layer_ids = Some(layers.to_vec());
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
            rope_scaling: Some(&mut self.rope_scaling),
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
        if self.block_size < 2 {
            return bad(format!("a block of {} slots proposes nothing", self.block_size));
        }
        if self.sliding.is_empty() {
            return bad("a draft has at least one layer".into());
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
        let kinds: Vec<&str> =
            self.sliding.iter().map(|s| if *s { "sliding_attention" } else { "full_attention" }).collect();
        let mut nested = json!({ "mask_token_id": self.mask_token_id });
        if let Some(ids) = &self.target_layer_ids {
            nested["target_layer_ids"] = json!(ids);
        }
        let architecture = if self.spark.is_some() { DSPARK[0] } else { DFLASH[0] };
        let mut value = json!({
            "architectures": [architecture],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": l.hidden_size,
            "intermediate_size": l.intermediate_size,
            "num_hidden_layers": self.sliding.len(),
            "num_attention_heads": l.num_attention_heads,
            "num_key_value_heads": l.num_key_value_heads,
            "head_dim": l.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": plain(l.rms_norm_eps),
            "rope_theta": plain(self.rope_theta),
            "rope_scaling": rope_scaling_value(&self.rope_scaling, SUPPORTED)?,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "layer_types": kinds,
            "use_sliding_window": self.sliding_window.is_some(),
            "sliding_window": self.sliding_window,
            "max_window_layers": 0,
            "block_size": self.block_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_value(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "initializer_range": plain(self.initializer_range),
            "torch_dtype": "bfloat16",
            "use_cache": true,
        });
        if let Some(layers) = self.num_target_layers {
            value["num_target_layers"] = json!(layers);
        }
        if self.draft_vocab_size != self.vocab_size {
            value["draft_vocab_size"] = json!(self.draft_vocab_size);
        }
        if let Some(spark) = &self.spark {
            let kind = spark.markov.map_or(MarkovKind::Vanilla, |m| m.kind).name();
            nested["projector_type"] = json!("dspark");
            nested["attention_mode"] =
                json!(if l.num_key_value_heads < l.num_attention_heads { "gqa" } else { "mha" });
            for (key, set) in [
                ("markov_rank", json!(spark.markov.map_or(0, |m| m.rank))),
                ("markov_head_type", json!(kind)),
                ("enable_confidence_head", json!(spark.confidence.is_some())),
                ("confidence_head_with_markov", json!(spark.confidence == Some(true))),
            ] {
                value[key] = set.clone();
                nested[key] = set;
            }
        }
        value["dflash_config"] = nested;
        Ok(value)
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = TensorList::default();
        let Ok(_) = BlockWeights::build(self, &mut list);
        list.0
    }

    /// One pass over the layers and the target's head, whatever the number of tokens; a Markov head for each of them.
    fn work(&self, tokens: usize, mode: PackMode) -> DraftWork {
        let matrices = self.tensors().into_iter().filter(|(_, shape)| shape.len() > 1);
        let size = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let (mut once, mut each) = ((self.draft_vocab_size * self.layer.hidden_size) as u64, 0);
        for (name, shape) in matrices {
            match name.as_str() {
                // A row of it.
                "markov_head.markov_w1.weight" => each += shape[1] as u64,
                name if name.starts_with("markov_head.") => each += size(&shape),
                _ => once += size(&shape),
            }
        }
        let rows = self.block_size as u64;
        let read = DraftWork::of(once + each, mode);
        DraftWork { multiply_adds: once * rows + each * tokens as u64, ..read }
    }

    fn tokens_per_pass(&self) -> usize {
        self.proposals()
    }

    fn published(&self) -> Published<'_> {
        Published::Block(self)
    }
}

/// Weights of a Markov head.
#[derive(Clone, Debug)]
pub struct MarkovWeights<W, N> {
    /// `markov_head.markov_w1.weight` `[V, M]`: a row for the token before.
    pub w1: W,
    /// `markov_head.markov_w2.weight` `[Vd, M]`: from the row to the logits.
    pub w2: W,
    /// `markov_head.gate_proj` `[M, H + M]` or `markov_head.joint_proj` `[3M, 2M + H]`, with a bias.
    pub gate: Option<(W, N)>,
}

/// All trained weights of a block draft.
#[derive(Clone, Debug)]
pub struct BlockWeights<W, N> {
    /// `fc.weight` `[H, K H]`
    pub fc: W,
    /// `hidden_norm.weight` `[H]`
    pub hidden_norm: N,
    /// `layers.{i}`
    pub layers: Vec<PlainLayer<W, N>>,
    /// `norm.weight` `[H]`
    pub norm: N,
    /// DSpark.
    pub markov: Option<MarkovWeights<W, N>>,
    /// `confidence_head.proj` `[1, H (+ M)]` with a bias.
    pub confidence: Option<(W, N)>,
}

impl<W, N> BlockWeights<W, N> {
    /// Asks `source` for every tensor once, in a fixed order.
    ///
    /// # Errors
    /// The source's.
    pub fn build<S: BuildWeights<W = W, N = N>>(
        config: &BlockConfig,
        source: &mut S,
    ) -> Result<BlockWeights<W, N>, S::Error> {
        let h = config.layer.hidden_size;
        let fc = source.linear("fc.weight", h, config.features_width())?;
        let hidden_norm = source.norm("hidden_norm.weight", h)?;
        let mut layers = Vec::with_capacity(config.sliding.len());
        for i in 0..config.sliding.len() {
            layers.push(PlainLayer::build(&format!("layers.{i}"), &config.layer, true, source)?);
        }
        let norm = source.norm("norm.weight", h)?;
        let markov = match config.markov() {
            None => None,
            Some(MarkovConfig { rank, kind }) => {
                let mut layer = |name: &str, out: usize, inp: usize| -> Result<(W, N), S::Error> {
                    let w = source.linear(&format!("markov_head.{name}.weight"), out, inp)?;
                    Ok((w, source.norm(&format!("markov_head.{name}.bias"), out)?))
                };
                let gate = match kind {
                    MarkovKind::Vanilla => None,
                    MarkovKind::Gated => Some(layer("gate_proj", rank, h + rank)?),
                    MarkovKind::Rnn => Some(layer("joint_proj", 3 * rank, 2 * rank + h)?),
                };
                Some(MarkovWeights {
                    w1: source.linear("markov_head.markov_w1.weight", config.vocab_size, rank)?,
                    w2: source.linear("markov_head.markov_w2.weight", config.draft_vocab_size, rank)?,
                    gate,
                })
            }
        };
        let confidence = match config.spark.and_then(|spark| spark.confidence) {
            None => None,
            Some(with_markov) => {
                let rank = config.markov().filter(|_| with_markov).map_or(0, |m| m.rank);
                let w = source.linear("confidence_head.proj.weight", 1, h + rank)?;
                Some((w, source.norm("confidence_head.proj.bias", 1)?))
            }
        };
        Ok(BlockWeights { fc, hidden_norm, layers, norm, markov, confidence })
    }
}

/// The network of a block draft: configuration and RoPE table. Weights are handed to each call.
#[derive(Clone, Debug)]
pub struct BlockNet {
    /// Shapes and switches.
    pub config: BlockConfig,
    /// RoPE frequencies.
    pub rope: Arc<RopeTable>,
}

impl BlockNet {
    /// The network of a checked configuration.
    pub fn new(config: BlockConfig) -> BlockNet {
        let rope = Arc::new(RopeTable::new(config.layer.head_dim, config.rope_theta, &config.rope_scaling));
        BlockNet { config, rope }
    }

    /// Target features `[C, K H]` → rotated keys and values `[C, nkv hd]` of every layer.
    pub fn context<O: Ops>(
        &self,
        ops: &mut O,
        w: &BlockWeights<O::W, O::N>,
        features: &O::T,
        positions: &[u32],
    ) -> Vec<(O::T, O::T)> {
        let shape = &self.config.layer;
        let joined = ops.linear(features, &w.fc, None); // [C, H]
        let context = ops.rms_norm(&joined, &w.hidden_norm, shape.rms_norm_eps);
        let place = (&self.rope, positions);
        w.layers.iter().map(|layer| layer.attention.keys(ops, shape, &context, place)).collect()
    }

    /// Embeddings `[R, H]` of block slots → input of the head `[R, H]`. `attend` is asked once for every layer, in order.
    pub fn block<O: Ops, A: Attend<O>>(
        &self,
        ops: &mut O,
        w: &BlockWeights<O::W, O::N>,
        embedded: O::T,
        positions: &[u32],
        attend: &mut A,
    ) -> O::T {
        let shape = &self.config.layer;
        let mut h = embedded;
        for layer in &w.layers {
            h = layer.run(ops, shape, h, (&self.rope, positions), attend);
        }
        ops.rms_norm(&h, &w.norm, shape.rms_norm_eps)
    }

    /// The Markov head's row `[R, M]` of the token before each slot.
    pub fn before<O: Ops>(&self, ops: &mut O, w: &MarkovWeights<O::W, O::N>, tokens: &[u32]) -> O::T {
        ops.embed(&w.w1, tokens, 1.0)
    }

    /// What corrects the logits, `[R, M]`, to be multiplied with [`MarkovWeights::w2`]; and the state `[R, M]` for the next
    /// slot, if the head has one. `state` is that of the slot before, `None` at the first.
    pub fn correction<O: Ops>(
        &self,
        ops: &mut O,
        w: &MarkovWeights<O::W, O::N>,
        output: &O::T,
        before: &O::T,
        state: Option<O::T>,
    ) -> (O::T, Option<O::T>) {
        let (Some(markov), Some((gate, bias))) = (self.config.markov(), &w.gate) else {
            return (before.clone(), None);
        };
        let rank = markov.rank;
        match markov.kind {
            MarkovKind::Vanilla => (before.clone(), None),
            MarkovKind::Gated => {
                let joint = ops.concat(&[output, before]); // [R, H + M]
                let gate = ops.linear(&joint, gate, Some(bias));
                (ops.cell(Cell::Gate, &gate, before, rank), None)
            }
            MarkovKind::Rnn => {
                // Zeros of its shape where there is no state yet.
                let state = state.unwrap_or_else(|| ops.zeros_like(before));
                let joint = ops.concat(&[&state, before, output]); // [R, 2M + H]
                let joint = ops.linear(&joint, gate, Some(bias)); // [R, 3M]
                let both = ops.cell(Cell::Recurrent, &joint, &state, rank); // [R, 2M]
                (ops.slice_cols(&both, rank, rank), Some(ops.slice_cols(&both, 0, rank)))
            }
        }
    }

    /// Logit `[R, 1]` of the probability that a slot's token is accepted.
    pub fn confidence<O: Ops>(
        &self,
        ops: &mut O,
        (w, bias): &(O::W, O::N),
        output: &O::T,
        before: Option<&O::T>,
    ) -> O::T {
        let with_markov = self.config.spark.and_then(|spark| spark.confidence) == Some(true);
        match before.filter(|_| with_markov) {
            Some(before) => {
                let joint = ops.concat(&[output, before]); // [R, H + M]
                ops.linear(&joint, w, Some(bias))
            }
            None => ops.linear(output, w, Some(bias)),
        }
    }
}

mod decode;

pub use decode::BlockDraft;

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN: &str = r#"{"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu",
        "max_position_embeddings": 40960, "block_size": 16, "num_target_layers": 36, "tie_word_embeddings": false,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]}}"#;

    fn read(text: &str) -> Result<BlockConfig, DraftConfigError> {
        BlockConfig::from_value(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn config_survives_writing_and_reading() {
        let plain = read(QWEN).unwrap();
        assert_eq!((plain.features_width(), plain.proposals(), plain.first_proposal()), (5 * 2560, 15, 1));
        let mut variants = vec![plain.clone()];
        let mut other = plain;
        other.sliding = vec![false, true];
        other.sliding_window = Some(2048);
        other.draft_vocab_size = 8192;
        variants.push(other.clone());
        for kind in [MarkovKind::Vanilla, MarkovKind::Gated, MarkovKind::Rnn] {
            other.spark = Some(SparkConfig {
                markov: Some(MarkovConfig { rank: 256, kind }),
                confidence: Some(kind == MarkovKind::Gated),
            });
            variants.push(other.clone());
        }
        other.spark = Some(SparkConfig { markov: None, confidence: None });
        variants.push(other);
        for config in variants {
            assert_eq!(BlockConfig::from_value(&config.to_value().unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn captured_layers_are_spread_as_published() {
        assert_eq!(default_block_layers(5, 36), [1, 9, 17, 25, 33]);
        assert_eq!(default_block_layers(1, 30), [15]);
        // Python rounds halves to even: 1 + 25/2 = 13.5 and 1 + 2.5 = 3.5.
        assert_eq!(default_block_layers(3, 29), [1, 14, 26]);
        assert_eq!(default_block_layers(3, 9), [1, 4, 6]);
    }

    #[test]
    fn what_the_network_does_not_cover_is_refused_by_key() {
        for (from, to, key) in [
            (r#""hidden_act": "silu""#, r#""hidden_act": "gelu""#, "hidden_act"),
            (r#""mask_token_id": 151669, "#, "", "mask_token_id"),
            (r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 200000000"#, "num_hidden_layers"),
            (r#""block_size": 16"#, r#""block_size": 200000000"#, "block_size"),
            (r#"[1, 9, 17, 25, 33]"#, r#"[1, "9"]"#, "dflash_config.target_layer_ids"),
            (r#"[1, 9, 17, 25, 33]"#, "[]", "dflash_config.target_layer_ids"),
            (r#""block_size": 16"#, r#""block_size": 16, "layer_types": ["full_attention"]"#, "layer_types"),
            (
                r#""block_size": 16"#,
                r#""block_size": 16, "layer_types": ["full_attention", "sliding_attention"]"#,
                "use_sliding_window",
            ),
            (
                r#""mask_token_id""#,
                r#""projector_type": "domino", "mask_token_id""#,
                "dflash_config.projector_type",
            ),
        ] {
            let text = QWEN.replacen(from, to, 1);
            assert_ne!(text, QWEN);
            let error = read(&text).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
            assert!(error.hint().is_some());
        }
        for (from, to) in [
            (r#""block_size": 16"#, r#""block_size": 1"#),
            ("151669", "151936"),
            (r#""head_dim": 128"#, r#""head_dim": 127"#),
        ] {
            assert!(read(&QWEN.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn tensors_carry_the_published_names() {
        let names: Vec<String> = read(QWEN).unwrap().tensors().into_iter().map(|t| t.0).collect();
        assert_eq!(names.len(), 2 + 2 * 11 + 1);
        let spark = QWEN.replace(
            r#""mask_token_id""#,
            r#""projector_type": "dspark", "markov_rank": 8, "markov_head_type": "rnn", "enable_confidence_head": true,
               "mask_token_id""#,
        );
        let tensors = read(&spark).unwrap().tensors();
        for (name, shape) in [
            ("layers.1.self_attn.q_norm.weight", vec![128]),
            ("markov_head.markov_w1.weight", vec![151936, 8]),
            ("markov_head.joint_proj.weight", vec![24, 16 + 2560]),
            ("markov_head.joint_proj.bias", vec![24]),
            ("confidence_head.proj.weight", vec![1, 2560]),
        ] {
            assert!(tensors.contains(&(name.to_owned(), shape)), "{name}");
        }
    }
}
