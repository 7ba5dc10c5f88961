//! What a target is: a family is a row of switches ([`crate::family`]), not a copy of the forward.

use std::sync::Arc;

use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling, RopeTable};

use crate::ModelError;
use crate::classes::Rope;
use crate::family::{Family, Norm, Norms, QkNorm};
use crate::keys::{GgufKeys, HfKeys, Key, Keys, Multipliers, Ropes};
use crate::mlp::MlpKind;
use crate::moe::ExpertsConfig;

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
    /// LongRoPE: a position that makes its sequence longer than this sees all of it turned by this table.
    pub rope_long: Option<(usize, Arc<RopeTable>)>,
    /// Values of a head that RoPE turns.
    pub rotary_dim: usize,
    /// `[layers]` whether a layer has RoPE (SmolLM3: not every one).
    pub turns: Vec<bool>,
    /// `[layers]` window of each layer in positions, `None` for full attention.
    pub windows: Vec<Option<usize>>,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// A logit per head that takes its share of the attention's softmax (gpt-oss).
    pub sinks: bool,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// Where a layer normalises.
    pub norms: Norms,
    /// What the stored norm weights mean.
    pub norm: Norm,
    /// `[layers]` MLP of each layer.
    pub mlps: Vec<MlpKind>,
    /// Of the layers with [`MlpKind::Experts`].
    pub experts: Option<ExpertsConfig>,
    /// Factor on embeddings.
    pub embed_scale: f32,
    /// Factor on attention logits.
    pub attention_scale: f32,
    /// Cap on attention logits (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// Factor on what attention and MLP add to the residual stream (Granite).
    pub residual_scale: f32,
    /// Logits are divided by this (Granite).
    pub logit_divisor: f32,
    /// Cap on logits (Gemma 2).
    pub final_softcap: Option<f32>,
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

impl TargetConfig {
    /// Reads a Hugging Face `config.json`. Keys that it leaves out have the defaults of transformers' configuration
    /// class; `null` is what it is there.
    pub fn from_hf(root: &HfConfig) -> Result<TargetConfig, ModelError> {
        read(&HfKeys::of(root)?)
    }

    /// Reads GGUF metadata.
    pub fn from_gguf(file: &GgufFile<'_>) -> Result<TargetConfig, ModelError> {
        read(&GgufKeys::of(file)?)
    }

    /// The last layer's attention means the same in a draft, which has no biases, no norms on queries, keys and
    /// outputs, and turns whole heads.
    pub fn attention_is_a_drafts(&self) -> bool {
        !self.qkv_bias
            && !self.o_bias
            && !self.sinks
            && self.qk_norm == QkNorm::None
            && self.norms == Norms::Pre
            && self.rotary_dim == self.head_dim
            && self.turns.last() == Some(&true)
            && self.attention_softcap.is_none()
            && self.residual_scale == 1.0
    }

    /// The last layer's MLP means the same in a draft, which has SiLU and no norms on outputs.
    pub fn mlp_is_a_drafts(&self) -> bool {
        self.activation == Activation::Silu
            && self.norms == Norms::Pre
            && !self.mlp_bias
            && self.residual_scale == 1.0
            && self.mlps.last() == Some(&MlpKind::Gated)
    }

    /// Values of one row of keys.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Values that a cache keeps of one position: keys and values of all layers, of LongRoPE models in both kinds.
    pub fn kv_values(&self) -> usize {
        2 * self.kv_width() * self.num_layers * if self.rope_long.is_some() { 2 } else { 1 }
    }

    /// Values of one row of queries.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

fn read(keys: &dyn Keys) -> Result<TargetConfig, ModelError> {
    let (place, spec) = (keys.place(), keys.spec());
    keys.refuse_unbuilt()?;
    let (hidden_size, num_heads, num_layers) =
        (keys.size(Key::HiddenSize)?, keys.size(Key::Heads)?, keys.size(Key::Layers)?);
    let max_position = keys.size(Key::MaxPosition)?;
    let head_dim = match keys.find_size(Key::HeadDim)? {
        Some(dim) => dim,
        None => hidden_size / num_heads.max(1),
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 || num_layers > 1 << 16 {
        return Err(ModelError::Shapes {
            place,
            what: format!("head size is {head_dim}, layers {num_layers}"),
        });
    }
    let experts = keys.experts(num_layers)?;
    let windows = keys.windows(num_layers)?;
    let sliding = windows.iter().any(Option::is_some);
    let Ropes { full, local } = keys.ropes(head_dim, sliding, max_position)?;
    let table = |rope: &Rope| rope.table(head_dim);
    let [qkv_bias, o_bias, mlp_bias] = keys.biases()?;
    let [attention_softcap, final_softcap] = keys.softcaps()?;
    let Multipliers { embed_scale, residual_scale, logit_divisor } = keys.multipliers(hidden_size)?;
    let made = TargetConfig {
        family: spec.family,
        vocab_size: keys.vocab_size()?,
        hidden_size,
        num_layers,
        num_heads,
        num_kv_heads: keys.find_size(Key::KvHeads)?.unwrap_or(num_heads),
        head_dim,
        intermediate_size: keys.size(Key::MlpWidth)?,
        rms_norm_eps: keys.float(Key::NormEps)? as f32,
        rope: table(&full),
        rope_theta: full.theta as f32,
        rope_scaling: full.scaling.clone(),
        rope_local: local.as_ref().map(table),
        rope_long: full.long_table(head_dim),
        rotary_dim: full.rotary_dim,
        turns: keys.turned_layers(num_layers)?,
        windows,
        activation: keys.activation()?,
        qkv_bias,
        o_bias,
        mlp_bias,
        sinks: spec.sinks,
        qk_norm: spec.qk_norm,
        norms: spec.norms,
        norm: match keys.stores_norms_minus_one() {
            true => spec.norm,
            false => Norm::Rms,
        },
        mlps: match &experts {
            Some(experts) => {
                experts.layers.iter().map(|e| if *e { MlpKind::Experts } else { MlpKind::Gated }).collect()
            }
            None => vec![MlpKind::Gated; num_layers],
        },
        experts,
        embed_scale,
        attention_scale: keys.attention_scale([hidden_size, num_layers, num_heads, head_dim])?,
        attention_softcap,
        residual_scale,
        logit_divisor,
        final_softcap,
        tied: keys.tied()?,
        max_position,
        bos_id: keys.bos_id()?,
        eos_ids: keys.eos_ids()?,
    };
    check_sizes(&made, &place)?;
    Ok(made)
}
