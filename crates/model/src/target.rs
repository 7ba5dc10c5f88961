//! The target network and its key-value cache.
//!
//! Invariant: a step of many rows gives each row the bits it would have alone (the kernel contract), whatever the
//! batch, the tree, or the chunking of a prefill.
//!
//! Shape legend: `R` rows of a step, `Ht` hidden size, `V` vocabulary.

use std::path::Path;
use std::sync::Arc;

use draftsmith_core::LayerId;
use draftsmith_kernels::{Buffer, Kernels, KvDtype, PackMode, Segment, StepMask};

use crate::ModelError;
use crate::config::TargetConfig;
use crate::infer::{CacheAttend, Infer, Linear, Rows};
use crate::load::{Part, Source};
use crate::ops::{Attend, Ops};

/// In which arithmetic a target runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Weights as f32: the specification.
    F32,
    /// Weights as stored: block types by exact integer dot products, floats as floats.
    Stored,
}

impl Precision {
    /// What the kernels make of the weights.
    pub(crate) fn pack_mode(self) -> PackMode {
        match self {
            Precision::F32 => PackMode::F32,
            Precision::Stored => PackMode::Stored,
        }
    }
}

/// Weights of one decoder layer.
pub struct LayerWeights<W, N> {
    input_norm: N,
    q: W,
    k: W,
    v: W,
    o: W,
    /// Biases of q, k, v.
    bias: Option<[N; 3]>,
    /// Norms of q and k heads.
    qk_norm: Option<[N; 2]>,
    /// Norm of the attention output (Gemma 3).
    attention_post_norm: Option<N>,
    mlp_norm: N,
    gate: W,
    up: W,
    down: W,
    /// Norm of the MLP output (Gemma 3).
    mlp_post_norm: Option<N>,
}

/// One decoder layer: residual stream `[R, Ht]` in, residual stream out.
pub fn decoder_layer<O: Ops, A: Attend<O>>(
    ops: &mut O,
    config: &TargetConfig,
    layer: usize,
    w: &LayerWeights<O::W, O::N>,
    hidden: O::T,
    positions: &[u32],
    attend: &mut A,
) -> O::T {
    let eps = config.rms_norm_eps;
    let n = ops.rms_norm(&hidden, &w.input_norm, eps);
    let bias = |i: usize| w.bias.as_ref().map(|b| &b[i]);
    // [R, heads * dim], [R, kv_heads * dim] twice
    let [mut q, mut k, v] = ops.linears(&n, [(&w.q, bias(0)), (&w.k, bias(1)), (&w.v, bias(2))]);
    if let Some([q_norm, k_norm]) = &w.qk_norm {
        q = ops.head_norm(&q, q_norm, config.head_dim, eps);
        k = ops.head_norm(&k, k_norm, config.head_dim, eps);
    }
    let rope = match (&config.rope_local, config.windows[layer]) {
        (Some(local), Some(_)) => local,
        _ => &config.rope,
    };
    let q = ops.rope(q, rope, positions);
    let k = ops.rope(k, rope, positions);
    let mixed = attend.attend(ops, q, k, v); // [R, heads * dim]
    let mut o = ops.linear(&mixed, &w.o, None); // [R, Ht]
    if let Some(norm) = &w.attention_post_norm {
        o = ops.rms_norm(&o, norm, eps);
    }
    let hidden = ops.add(hidden, &o);
    let n = ops.rms_norm(&hidden, &w.mlp_norm, eps);
    let [gate, up] = ops.linears(&n, [(&w.gate, None), (&w.up, None)]);
    let act = ops.gated(config.activation, gate, &up);
    let mut down = ops.linear(&act, &w.down, None); // [R, Ht]
    if let Some(norm) = &w.mlp_post_norm {
        down = ops.rms_norm(&down, norm, eps);
    }
    ops.add(hidden, &down)
}

/// Keys and values of one sequence in all layers.
pub struct TargetKv<K: Kernels> {
    layers: Vec<K::Kv>,
    len: usize,
}

impl<K: Kernels> TargetKv<K> {
    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first step.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything from position `len` on.
    ///
    /// # Panics
    /// If the cache is shorter.
    pub fn rollback_to(&mut self, len: usize) {
        assert!(len <= self.len, "cannot roll back to {len}, the cache has {}", self.len);
        self.len = len;
    }

    /// Keeps the accepted rows of the last step: `rows` (ascending) of the step that began at `base`.
    pub fn commit(&mut self, kernels: &K, base: usize, rows: &[u32]) {
        let from: Vec<usize> = rows.iter().map(|r| base + *r as usize).collect();
        for layer in &mut self.layers {
            kernels.kv_compact(layer, base, &from);
        }
        self.len = base + rows.len();
    }
}

/// One sequence's part of a step.
pub struct StepItem<'a, K: Kernels> {
    /// Its cache; grows by the rows of the step.
    pub kv: &'a mut TargetKv<K>,
    /// `[R]` tokens.
    pub tokens: &'a [u32],
    /// `[R]` parent row inside the step; `None` follows the cache.
    pub parents: &'a [Option<u32>],
}

/// What a step gives, rows of all items one after the other.
pub struct StepOutput<B: Buffer> {
    /// Per captured layer `[R, Ht]`: residual stream after that layer, before any norm.
    pub hidden: Vec<Arc<Rows<B>>>,
    /// `[R, Ht]` after the final norm: the input of the head.
    pub last: Arc<Rows<B>>,
}

/// Weights of a layer in the backend's layout.
type PackedLayer<K> = LayerWeights<Arc<Linear<<K as Kernels>::Packed>>, Arc<<K as Kernels>::Buf>>;

/// A target loaded on a backend.
pub struct Target<K: Kernels> {
    kernels: Arc<K>,
    config: TargetConfig,
    kv_dtype: KvDtype,
    embed: Arc<Linear<K::Packed>>,
    layers: Vec<PackedLayer<K>>,
    final_norm: Arc<K::Buf>,
    head: Arc<Linear<K::Packed>>,
}

impl<K: Kernels> Target<K> {
    /// Loads a GGUF file or a Hugging Face folder.
    ///
    /// # Errors
    /// Broken containers, unknown architectures, missing, extra or misshapen tensors: all named.
    pub fn load(kernels: Arc<K>, path: &Path, precision: Precision) -> Result<Target<K>, ModelError> {
        let mut source = Source::open(path)?;
        let c = source.config.clone();
        let (h, q, kv, i) = (c.hidden_size, c.q_width(), c.kv_width(), c.intermediate_size);
        let k = kernels.as_ref();
        let upload = |values: Vec<f32>| Arc::new(k.upload(&values));
        let embed = source.linear(k, precision, Part::Embed, 0, [c.vocab_size, h])?;
        let final_norm = upload(source.norm(Part::FinalNorm, 0, h)?);
        let head = match c.tied {
            true => Arc::clone(&embed),
            false => source.linear(k, precision, Part::Head, 0, [c.vocab_size, h])?,
        };
        let mut layers = Vec::with_capacity(c.num_layers);
        for l in 0..c.num_layers {
            let mut linear = |part, out, inp| source.linear(k, precision, part, l, [out, inp]);
            let (wq, wk, wv, wo) = (
                linear(Part::Q, q, h)?,
                linear(Part::K, kv, h)?,
                linear(Part::V, kv, h)?,
                linear(Part::O, h, q)?,
            );
            let (gate, up, down) =
                (linear(Part::Gate, i, h)?, linear(Part::Up, i, h)?, linear(Part::Down, h, i)?);
            let bias = match c.qkv_bias {
                true => Some([
                    upload(source.floats(Part::QBias, l, [1, q])?),
                    upload(source.floats(Part::KBias, l, [1, kv])?),
                    upload(source.floats(Part::VBias, l, [1, kv])?),
                ]),
                false => None,
            };
            let qk_norm = match c.qk_norm {
                true => Some([
                    upload(source.norm(Part::QNorm, l, c.head_dim)?),
                    upload(source.norm(Part::KNorm, l, c.head_dim)?),
                ]),
                false => None,
            };
            let mut norm = |part| source.norm(part, l, h).map(&upload);
            layers.push(LayerWeights {
                input_norm: norm(Part::InputNorm)?,
                q: wq,
                k: wk,
                v: wv,
                o: wo,
                bias,
                qk_norm,
                attention_post_norm: c.post_norms.then(|| norm(Part::AttentionPostNorm)).transpose()?,
                mlp_norm: norm(Part::MlpNorm)?,
                gate,
                up,
                down,
                mlp_post_norm: c.post_norms.then(|| norm(Part::MlpPostNorm)).transpose()?,
            });
        }
        let config = source.finish()?;
        Ok(Target {
            kernels,
            config,
            kv_dtype: precision.pack_mode().kv_dtype(),
            embed,
            layers,
            final_norm,
            head,
        })
    }

    /// Shapes and switches.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    /// The backend.
    pub fn kernels(&self) -> &Arc<K> {
        &self.kernels
    }

    /// The embedding table, which a draft shares.
    pub fn embedding(&self) -> &Arc<Linear<K::Packed>> {
        &self.embed
    }

    /// An empty cache.
    pub fn new_kv(&self) -> TargetKv<K> {
        let layer = || self.kernels.kv_new(self.config.num_kv_heads, self.config.head_dim, self.kv_dtype);
        TargetKv { layers: (0..self.config.num_layers).map(|_| layer()).collect(), len: 0 }
    }

    /// Runs all layers on the rows of all items and appends them to their caches.
    ///
    /// # Panics
    /// If an item's tokens and parents differ in length, or a token is outside the vocabulary.
    pub fn forward(&self, items: &mut [StepItem<'_, K>], capture: &[LayerId]) -> StepOutput<K::Buf> {
        let mut ops = Infer::new(self.kernels.as_ref());
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        for item in items.iter() {
            assert!(item.tokens.len() == item.parents.len(), "one parent per token");
            assert!(
                item.tokens.iter().all(|t| (*t as usize) < self.config.vocab_size),
                "token outside the vocabulary"
            );
            tokens.extend_from_slice(item.tokens);
            let first = positions.len();
            for parent in item.parents {
                let position = parent.map_or(item.kv.len as u32, |p| positions[first + p as usize] + 1);
                positions.push(position);
            }
        }
        let mut hidden = ops.embed(&self.embed, &tokens, self.config.embed_scale); // [R, Ht]
        let mut captured: Vec<Option<Arc<Rows<K::Buf>>>> = vec![None; capture.len()];
        for (l, weights) in self.layers.iter().enumerate() {
            let segments = items
                .iter_mut()
                .map(|item| Segment {
                    mask: StepMask::step(
                        item.kv.len,
                        item.parents,
                        self.config.windows[l],
                        self.config.attention_scale,
                    ),
                    kv: &mut item.kv.layers[l],
                })
                .collect();
            let mut attend = CacheAttend { segments, head_dim: self.config.head_dim };
            hidden = decoder_layer(&mut ops, &self.config, l, weights, hidden, &positions, &mut attend);
            for (slot, id) in captured.iter_mut().zip(capture) {
                if id.0 as usize == l {
                    *slot = Some(Arc::clone(&hidden));
                }
            }
        }
        for item in items.iter_mut() {
            item.kv.len += item.tokens.len();
        }
        let last = ops.rms_norm(&hidden, &self.final_norm, self.config.rms_norm_eps);
        let hidden =
            captured.into_iter().map(|h| h.expect("captured layers are inside the network")).collect();
        StepOutput { hidden, last }
    }

    /// The final norm of outputs of the last layer, `[R, Ht]` to `[R, Ht]`: what the head reads.
    ///
    /// # Panics
    /// If the length is no multiple of the width.
    pub fn normed(&self, hidden: &[f32]) -> Vec<f32> {
        let mut ops = Infer::new(self.kernels.as_ref());
        let hidden = ops.input(hidden, self.config.hidden_size);
        let last = ops.rms_norm(&hidden, &self.final_norm, self.config.rms_norm_eps);
        ops.values(&last)
    }

    /// The head.
    pub fn head(&self) -> &Arc<Linear<K::Packed>> {
        &self.head
    }

    /// The most probable token of chosen rows of a step, the lowest id among equals.
    pub fn argmax(&self, output: &StepOutput<K::Buf>, rows: &[u32]) -> Vec<u32> {
        let chosen = Infer::new(self.kernels.as_ref()).gather(&output.last, rows);
        self.kernels.argmax(&chosen.buf, rows.len(), &self.head.packed)
    }

    /// Logits `[rows.len(), V]` of chosen rows of a step, on the host.
    pub fn logits(&self, output: &StepOutput<K::Buf>, rows: &[u32]) -> Vec<f32> {
        let mut ops = Infer::new(self.kernels.as_ref());
        let chosen = ops.gather(&output.last, rows);
        let logits = ops.linear(&chosen, &self.head, None);
        ops.values(&logits)
    }
}

impl Target<draftsmith_kernels::Cpu> {
    /// Bytes of weights that a pass reads, whatever its number of rows: all layers and the head.
    pub fn pass_bytes(&self) -> usize {
        self.pass_weights().map(|w| w.packed.bytes()).sum()
    }

    /// Multiply-adds with weights per row of a pass.
    pub fn pass_macs(&self) -> usize {
        self.pass_weights().map(|w| w.out_features * w.in_features).sum()
    }

    /// The weights that a pass reads, the head last.
    pub fn pass_packed(&self) -> impl Iterator<Item = &draftsmith_kernels::PackedWeight> {
        self.pass_weights().map(|w| &w.packed)
    }

    fn pass_weights(&self) -> impl Iterator<Item = &Linear<draftsmith_kernels::PackedWeight>> {
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        layers.chain([&self.head]).map(Arc::as_ref)
    }
}

/// Weights of a target as plain f32, for training: the frozen embedding and head, and the last decoder layer, from
/// which a draft can start.
pub struct TargetTensors {
    /// Shapes and switches.
    pub config: TargetConfig,
    /// `[V, Ht]`
    pub embed: Vec<f32>,
    /// `[V, Ht]`; `None` when it is the embedding.
    pub head: Option<Vec<f32>>,
    /// `[Ht]`
    pub final_norm: Vec<f32>,
    /// Last layer by the names of a Hugging Face checkpoint, without the layer prefix: `self_attn.q_proj.weight`, …
    pub last_layer: Vec<(&'static str, Vec<f32>)>,
}

impl TargetTensors {
    /// Reads them from a GGUF file or a Hugging Face folder.
    pub fn load(path: &Path) -> Result<TargetTensors, ModelError> {
        let mut source = Source::open(path)?;
        let c = source.config.clone();
        let (h, q, kv, i, l) =
            (c.hidden_size, c.q_width(), c.kv_width(), c.intermediate_size, c.num_layers - 1);
        let embed = source.floats(Part::Embed, 0, [c.vocab_size, h])?;
        let head = (!c.tied).then(|| source.floats(Part::Head, 0, [c.vocab_size, h])).transpose()?;
        let final_norm = source.norm(Part::FinalNorm, 0, h)?;
        let mut last_layer = Vec::new();
        for (name, part, shape) in [
            ("self_attn.q_proj.weight", Part::Q, [q, h]),
            ("self_attn.k_proj.weight", Part::K, [kv, h]),
            ("self_attn.v_proj.weight", Part::V, [kv, h]),
            ("self_attn.o_proj.weight", Part::O, [h, q]),
            ("mlp.gate_proj.weight", Part::Gate, [i, h]),
            ("mlp.up_proj.weight", Part::Up, [i, h]),
            ("mlp.down_proj.weight", Part::Down, [h, i]),
        ] {
            last_layer.push((name, source.floats(part, l, shape)?));
        }
        last_layer.push(("input_layernorm.weight", source.norm(Part::InputNorm, l, h)?));
        last_layer.push(("post_attention_layernorm.weight", source.norm(Part::MlpNorm, l, h)?));
        Ok(TargetTensors { config: c, embed, head, final_norm, last_layer })
    }
}
