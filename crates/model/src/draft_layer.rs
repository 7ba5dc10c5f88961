//! What the decoder layers of drafts with several of them have in common.
//!
//! Shape legend: `R` rows, `H` draft width, `nh`/`nkv` query/key heads, `hd` head width, `I` MLP width.

use std::sync::Arc;

use draftsmith_formats::run::DraftTable;
use draftsmith_kernels::{Activation, RopeTable};

use crate::ops::{Attend, Ops};
use crate::weights::BuildWeights;

/// Sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// `H`
    pub hidden_size: usize,
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
}

impl LayerShape {
    /// Query width, `nh * hd`.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Key and value width, `nkv * hd`.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Logit scale.
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Takes what a run file says; the width is the target's, whose embedding and head read it.
    pub(crate) fn take_table(&mut self, table: &DraftTable) {
        let set = |size: &mut usize, wanted: Option<u32>| *size = wanted.map_or(*size, |n| n as usize);
        set(&mut self.intermediate_size, table.intermediate);
        set(&mut self.num_attention_heads, table.heads);
        set(&mut self.num_key_value_heads, table.kv_heads);
    }

    /// What does not fit together, in words.
    pub(crate) fn problem(&self) -> Option<String> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Some(format!(
                "{} query heads cannot share {} key heads",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        (self.head_dim == 0 || !self.head_dim.is_multiple_of(2))
            .then(|| format!("RoPE needs an even head dimension, found {}", self.head_dim))
    }
}

/// Query, key, value and output weights.
#[derive(Clone, Debug)]
pub struct AttentionWeights<W, N> {
    /// `[nh hd, inp]`
    pub q_proj: W,
    /// `[nkv hd, inp]`
    pub k_proj: W,
    /// `[nkv hd, inp]`
    pub v_proj: W,
    /// `[H, nh hd]`
    pub o_proj: W,
    /// Norms `[hd]` of query and key heads.
    pub qk_norm: Option<[N; 2]>,
}

impl<W, N> AttentionWeights<W, N> {
    pub(crate) fn build<S: BuildWeights<W = W, N = N>>(
        prefix: &str,
        shape: &LayerShape,
        inp: usize,
        qk_norm: bool,
        source: &mut S,
    ) -> Result<AttentionWeights<W, N>, S::Error> {
        let (qw, kvw) = (shape.q_width(), shape.kv_width());
        let name = |part: &str| format!("{prefix}.self_attn.{part}.weight");
        Ok(AttentionWeights {
            q_proj: source.linear(&name("q_proj"), qw, inp)?,
            k_proj: source.linear(&name("k_proj"), kvw, inp)?,
            v_proj: source.linear(&name("v_proj"), kvw, inp)?,
            o_proj: source.linear(&name("o_proj"), shape.hidden_size, qw)?,
            qk_norm: match qk_norm {
                true => Some([
                    source.norm(&name("q_norm"), shape.head_dim)?,
                    source.norm(&name("k_norm"), shape.head_dim)?,
                ]),
                false => None,
            },
        })
    }

    /// Attention of layer inputs `[R, inp]`: `[R, H]`, to be added to the residual.
    pub(crate) fn run<O: Ops<W = W, N = N>, A: Attend<O>>(
        &self,
        ops: &mut O,
        shape: &LayerShape,
        x: &O::T,
        (rope, positions): (&Arc<RopeTable>, &[u32]),
        attend: &mut A,
    ) -> O::T {
        // [R, nh hd], [R, nkv hd] twice
        let [mut q, k, v] =
            ops.linears(x, [(&self.q_proj, None), (&self.k_proj, None), (&self.v_proj, None)]);
        if let Some([q_norm, _]) = &self.qk_norm {
            q = ops.head_norm(&q, q_norm, shape.head_dim, shape.rms_norm_eps);
        }
        let q = ops.rope(q, rope, positions);
        let k = self.placed(ops, shape, k, (rope, positions));
        let mixed = attend.attend(ops, q, k, v); // [R, nh hd]
        ops.linear(&mixed, &self.o_proj, None)
    }

    /// Rotated keys and values `[R, nkv hd]` of inputs that ask nothing.
    pub(crate) fn keys<O: Ops<W = W, N = N>>(
        &self,
        ops: &mut O,
        shape: &LayerShape,
        x: &O::T,
        place: (&Arc<RopeTable>, &[u32]),
    ) -> (O::T, O::T) {
        let [k, v] = ops.linears(x, [(&self.k_proj, None), (&self.v_proj, None)]);
        (self.placed(ops, shape, k, place), v)
    }

    fn placed<O: Ops<W = W, N = N>>(
        &self,
        ops: &mut O,
        shape: &LayerShape,
        mut k: O::T,
        (rope, positions): (&Arc<RopeTable>, &[u32]),
    ) -> O::T {
        if let Some([_, k_norm]) = &self.qk_norm {
            k = ops.head_norm(&k, k_norm, shape.head_dim, shape.rms_norm_eps);
        }
        ops.rope(k, rope, positions)
    }
}

/// The second half of a layer: norm and SwiGLU.
#[derive(Clone, Debug)]
pub struct MlpWeights<W, N> {
    /// `post_attention_layernorm` `[H]`
    pub norm: N,
    /// `[I, H]`
    pub gate_proj: W,
    /// `[I, H]`
    pub up_proj: W,
    /// `[H, I]`
    pub down_proj: W,
}

impl<W, N> MlpWeights<W, N> {
    pub(crate) fn build<S: BuildWeights<W = W, N = N>>(
        prefix: &str,
        shape: &LayerShape,
        source: &mut S,
    ) -> Result<MlpWeights<W, N>, S::Error> {
        let (h, i) = (shape.hidden_size, shape.intermediate_size);
        Ok(MlpWeights {
            norm: source.norm(&format!("{prefix}.post_attention_layernorm.weight"), h)?,
            gate_proj: source.linear(&format!("{prefix}.mlp.gate_proj.weight"), i, h)?,
            up_proj: source.linear(&format!("{prefix}.mlp.up_proj.weight"), i, h)?,
            down_proj: source.linear(&format!("{prefix}.mlp.down_proj.weight"), h, i)?,
        })
    }

    /// Residual stream `[R, H]` in and out.
    pub(crate) fn run<O: Ops<W = W, N = N>>(&self, ops: &mut O, shape: &LayerShape, h: O::T) -> O::T {
        let n = ops.rms_norm(&h, &self.norm, shape.rms_norm_eps);
        let [gate, up] = ops.linears(&n, [(&self.gate_proj, None), (&self.up_proj, None)]); // [R, I] each
        let act = ops.gated(Activation::Silu, gate, &up);
        let down = ops.linear(&act, &self.down_proj, None); // [R, H]
        ops.add(h, &down)
    }
}

/// A pre-norm decoder layer.
#[derive(Clone, Debug)]
pub struct PlainLayer<W, N> {
    /// `input_layernorm` `[H]`
    pub input_norm: N,
    /// Attention over the residual stream.
    pub attention: AttentionWeights<W, N>,
    /// Feed-forward.
    pub mlp: MlpWeights<W, N>,
}

impl<W, N> PlainLayer<W, N> {
    pub(crate) fn build<S: BuildWeights<W = W, N = N>>(
        prefix: &str,
        shape: &LayerShape,
        qk_norm: bool,
        source: &mut S,
    ) -> Result<PlainLayer<W, N>, S::Error> {
        let h = shape.hidden_size;
        Ok(PlainLayer {
            input_norm: source.norm(&format!("{prefix}.input_layernorm.weight"), h)?,
            attention: AttentionWeights::build(prefix, shape, h, qk_norm, source)?,
            mlp: MlpWeights::build(prefix, shape, source)?,
        })
    }

    /// Residual stream `[R, H]` in and out.
    pub(crate) fn run<O: Ops<W = W, N = N>, A: Attend<O>>(
        &self,
        ops: &mut O,
        shape: &LayerShape,
        h: O::T,
        place: (&Arc<RopeTable>, &[u32]),
        attend: &mut A,
    ) -> O::T {
        let x = ops.rms_norm(&h, &self.input_norm, shape.rms_norm_eps);
        let o = self.attention.run(ops, shape, &x, place, attend);
        let h = ops.add(h, &o);
        self.mlp.run(ops, shape, h)
    }
}
