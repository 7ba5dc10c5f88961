//! The target network and its key-value cache.
//!
//! Invariant: a step of many rows gives each row the bits it would have alone (the kernel contract), whatever the
//! batch, the tree, or the chunking of a prefill.
//!
//! Shape legend: `R` rows of a step, `Ht` hidden size, `V` vocabulary.

use std::path::Path;
use std::sync::Arc;

use draftsmith_core::LayerId;
use draftsmith_kernels::experts::Experts;
use draftsmith_kernels::{
    Buffer, DrawRow, Kernels, KvDtype, Memory, PackedWeight, RopeTable, Segment, StepMask, TopK,
};

use crate::ModelError;
use crate::config::TargetConfig;
use crate::dtype::Precision;
use crate::family::QkNorm;
use crate::infer::{CacheAttend, Infer, Linear, Rows};
use crate::load::{PackEach, Packing, Part, Source};
use crate::mlp::{ExpertsMlp, GatedMlp, Mlp, MlpKind, feed_forward};
use crate::ops::{Attend, Ops};

/// Weights of one decoder layer.
pub struct LayerWeights<W, N, E> {
    /// Norm of the attention's input.
    input_norm: Option<N>,
    q: W,
    k: W,
    v: W,
    o: W,
    /// Biases of q, k, v.
    bias: Option<[N; 3]>,
    o_bias: Option<N>,
    /// `[heads]` logits that take their share of the attention's softmax.
    sinks: Option<Vec<f32>>,
    /// Norms of queries and keys.
    qk_norm: Option<[N; 2]>,
    /// Norm of the attention's output.
    attention_post_norm: Option<N>,
    /// Norm of the MLP's input.
    mlp_norm: Option<N>,
    mlp: Mlp<W, N, E>,
    /// Norm of the MLP's output.
    mlp_post_norm: Option<N>,
}

/// One decoder layer: residual stream `[R, Ht]` in, residual stream out. `rope` turns the layers that have no table of
/// their own.
#[expect(clippy::too_many_arguments, reason = "a layer, its place in the network, and what it works on")]
pub fn decoder_layer<O: Ops, A: Attend<O>>(
    ops: &mut O,
    config: &TargetConfig,
    layer: usize,
    w: &LayerWeights<O::W, O::N, O::E>,
    hidden: O::T,
    rope: &Arc<RopeTable>,
    positions: &[u32],
    attend: &mut A,
) -> O::T {
    let eps = config.rms_norm_eps;
    let n = normed(ops, hidden.clone(), w.input_norm.as_ref(), eps);
    let bias = |i: usize| w.bias.as_ref().map(|b| &b[i]);
    // [R, heads * dim], [R, kv_heads * dim] twice
    let [mut q, mut k, v] = ops.linears(&n, [(&w.q, bias(0)), (&w.k, bias(1)), (&w.v, bias(2))]);
    if let Some([q_norm, k_norm]) = &w.qk_norm {
        (q, k) = match config.qk_norm {
            QkNorm::Full => (ops.rms_norm(&q, q_norm, eps), ops.rms_norm(&k, k_norm, eps)),
            _ => {
                let dim = config.head_dim;
                (ops.head_norm(&q, q_norm, dim, eps), ops.head_norm(&k, k_norm, dim, eps))
            }
        };
    }
    if config.turns[layer] {
        let rope = match (&config.rope_local, config.windows[layer]) {
            (Some(local), Some(_)) => local,
            _ => rope,
        };
        q = ops.rope(q, rope, positions);
        k = ops.rope(k, rope, positions);
    }
    let mixed = attend.attend(ops, q, k, v); // [R, heads * dim]
    let o = ops.linear(&mixed, &w.o, w.o_bias.as_ref()); // [R, Ht]
    let o = normed(ops, o, w.attention_post_norm.as_ref(), eps);
    let o = scaled(ops, o, config.residual_scale);
    // Freed before the sum, which is then made in place.
    drop(n);
    let hidden = ops.add(hidden, &o);
    let n = normed(ops, hidden.clone(), w.mlp_norm.as_ref(), eps);
    let down = feed_forward(ops, config.activation, &w.mlp, &n); // [R, Ht]
    let down = normed(ops, down, w.mlp_post_norm.as_ref(), eps);
    let down = scaled(ops, down, config.residual_scale);
    drop(n);
    ops.add(hidden, &down)
}

/// Times a factor, if it is one.
fn scaled<O: Ops>(ops: &mut O, x: O::T, factor: f32) -> O::T {
    if factor == 1.0 { x } else { ops.scale(x, factor) }
}

/// Through a norm, if there is one.
fn normed<O: Ops>(ops: &mut O, x: O::T, norm: Option<&O::N>, eps: f32) -> O::T {
    match norm {
        Some(norm) => ops.rms_norm(&x, norm, eps),
        None => x,
    }
}

/// Keys and values of one sequence in all layers.
pub struct TargetKv<K: Kernels> {
    layers: Vec<K::Kv>,
    len: usize,
    long: Option<LongKv<K>>,
}

/// What LongRoPE needs beside: a sequence longer than the original context is turned by other angles from its first
/// position on, so both kinds of keys are kept, each as far as it was asked for, and the tokens to make up the rest from.
struct LongKv<K: Kernels> {
    /// Of all positions.
    tokens: Vec<u32>,
    /// Positions that [`TargetKv::layers`] has, turned as in a short sequence.
    short_len: usize,
    /// Turned as in a long sequence.
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
        if let Some(long) = &mut self.long {
            long.tokens.truncate(len);
            long.short_len = long.short_len.min(len);
            long.len = long.len.min(len);
        }
    }

    /// Keeps the accepted rows of the last step: `rows` (ascending) of the step that began at `base`.
    pub fn commit(&mut self, kernels: &K, base: usize, rows: &[u32]) {
        // Plain decoding keeps all that a step appended.
        if self.len == base + rows.len() && rows.iter().zip(0..).all(|(row, at)| *row == at) {
            return;
        }
        let from: Vec<usize> = rows.iter().map(|r| base + *r as usize).collect();
        self.len = base + rows.len();
        let keep = |layers: &mut [K::Kv]| {
            for layer in layers {
                kernels.kv_compact(layer, base, &from);
            }
        };
        let Some(long) = &mut self.long else { return keep(&mut self.layers) };
        let kept: Vec<u32> = from.iter().map(|slot| long.tokens[*slot]).collect();
        long.tokens.truncate(base);
        long.tokens.extend(kept);
        // A cache that the step did not reach has nothing of it.
        for (layers, len) in [(&mut self.layers, &mut long.short_len), (&mut long.layers, &mut long.len)] {
            if *len > base {
                keep(layers);
                *len = self.len;
            }
        }
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

/// One sequence's new rows of a tree that is grown call by call ([`Target::grow`]).
pub struct GrowItem<'a, K: Kernels> {
    /// Its cache; what it holds behind `base` are the rows of the calls before.
    pub kv: &'a mut TargetKv<K>,
    /// Committed positions.
    pub base: usize,
    /// `[R]` tokens of all rows behind `base`, the new ones last.
    pub tokens: &'a [u32],
    /// `[R]` their parents among them; `None` follows the committed positions.
    pub parents: &'a [Option<u32>],
    /// How many of them are new.
    pub new_rows: usize,
}

/// Rows of one sequence and the layers that they are appended to.
struct Pass<'a, K: Kernels> {
    layers: &'a mut [K::Kv],
    /// Committed positions in the layers.
    base: usize,
    /// Of the rows of this pass.
    tokens: &'a [u32],
    /// Of all rows behind `base`; those of this pass are the last.
    parents: &'a [Option<u32>],
}

/// Positions that are made up at once when a sequence of a LongRoPE model passes its original length.
const CATCH_UP: usize = 512;

/// `[R]` positions of rows that follow `base` others.
fn positions(base: usize, parents: &[Option<u32>]) -> Vec<u32> {
    let mut positions: Vec<u32> = Vec::with_capacity(parents.len());
    for parent in parents {
        positions.push(parent.map_or(base as u32, |p| positions[p as usize] + 1));
    }
    positions
}

/// The id of the largest logit, the lowest among equals; NaN never wins.
fn first_largest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in (0u32..).zip(logits) {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0
}

/// What a step gives, rows of all items one after the other.
pub struct StepOutput<B: Buffer> {
    /// Per captured layer `[R, Ht]`: residual stream after that layer, before any norm.
    pub hidden: Vec<Arc<Rows<B>>>,
    /// `[R, Ht]` after the final norm: the input of the head.
    pub last: Arc<Rows<B>>,
}

/// Weights of a layer in the backend's layout.
type PackedLayer<K> = LayerWeights<
    Arc<Linear<<K as Kernels>::Packed>>,
    Arc<<K as Memory>::Buf>,
    Experts<<K as Kernels>::Packed, <K as Memory>::Buf>,
>;

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
        Target::load_with(Arc::clone(&kernels), path, precision, &PackEach(kernels.as_ref()))
    }

    /// The same with packed weights from somewhere. A quantised folder is packed by the kernels whatever `k` is: its
    /// weights become groups when they are read, so little is saved by keeping them.
    ///
    /// # Errors
    /// As [`Target::load`].
    pub fn load_with(
        kernels: Arc<K>,
        path: &Path,
        precision: Precision,
        k: &dyn Packing<K::Packed>,
    ) -> Result<Target<K>, ModelError> {
        let mut source = Source::open(path)?;
        let each = PackEach(kernels.as_ref());
        let k = (kernels.as_ref(), if source.is_quantised_folder() { &each } else { k });
        let c = source.config.clone();
        let (h, q, kv, i) = (c.hidden_size, c.q_width(), c.kv_width(), c.intermediate_size);
        let upload = |values: Vec<f32>| Arc::new(kernels.upload(&values));
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
            let mlp = match (c.mlps[l], &c.experts) {
                (MlpKind::Experts, Some(experts)) => {
                    let count = experts.routing.experts;
                    let router = linear(Part::Router, count, h)?;
                    let router_bias = match experts.biases {
                        true => Some(upload(source.floats(Part::RouterBias, l, [1, count])?)),
                        false => None,
                    };
                    Mlp::Experts(ExpertsMlp {
                        router,
                        router_bias,
                        routing: experts.routing,
                        experts: source.experts(k, precision, l, experts)?,
                    })
                }
                _ => Mlp::Gated(GatedMlp {
                    gate: linear(Part::Gate, i, h)?,
                    up: linear(Part::Up, i, h)?,
                    down: linear(Part::Down, h, i)?,
                    bias: match c.mlp_bias {
                        true => Some([
                            upload(source.floats(Part::GateBias, l, [1, i])?),
                            upload(source.floats(Part::UpBias, l, [1, i])?),
                            upload(source.floats(Part::DownBias, l, [1, h])?),
                        ]),
                        false => None,
                    },
                }),
            };
            let bias = match c.qkv_bias {
                true => Some([
                    upload(source.floats(Part::QBias, l, [1, q])?),
                    upload(source.floats(Part::KBias, l, [1, kv])?),
                    upload(source.floats(Part::VBias, l, [1, kv])?),
                ]),
                false => None,
            };
            let sinks = match c.sinks {
                true => Some(source.floats(Part::Sinks, l, [1, c.num_heads])?),
                false => None,
            };
            let qk_norm = match c.qk_norm {
                QkNorm::Head => Some([
                    upload(source.norm(Part::QNorm, l, c.head_dim)?),
                    upload(source.norm(Part::KNorm, l, c.head_dim)?),
                ]),
                QkNorm::Full => {
                    Some([upload(source.norm(Part::QNorm, l, q)?), upload(source.norm(Part::KNorm, l, kv)?)])
                }
                QkNorm::None => None,
            };
            let o_bias = match c.o_bias {
                true => Some(upload(source.floats(Part::OBias, l, [1, h])?)),
                false => None,
            };
            let mut norm = |part, here: bool| here.then(|| source.norm(part, l, h).map(&upload)).transpose();
            let (pre, post) = (c.norms.pre(), c.norms.post());
            layers.push(LayerWeights {
                input_norm: norm(Part::InputNorm, pre)?,
                q: wq,
                k: wk,
                v: wv,
                o: wo,
                bias,
                o_bias,
                sinks,
                qk_norm,
                attention_post_norm: norm(Part::AttentionPostNorm, post)?,
                mlp_norm: norm(Part::MlpNorm, pre)?,
                mlp,
                mlp_post_norm: norm(Part::MlpPostNorm, post)?,
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

    /// Bytes that the cache takes for each position.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.kv_dtype.bytes() * self.config.kv_values()
    }

    /// An empty cache.
    pub fn new_kv(&self) -> TargetKv<K> {
        let layer = || self.kernels.kv_new(self.config.num_kv_heads, self.config.head_dim, self.kv_dtype);
        let layers = || -> Vec<K::Kv> { (0..self.config.num_layers).map(|_| layer()).collect() };
        let long = self.config.rope_long.as_ref().map(|_| LongKv {
            tokens: Vec::new(),
            short_len: 0,
            layers: layers(),
            len: 0,
        });
        TargetKv { layers: layers(), len: 0, long }
    }

    /// What a step captured, on the host: `[R, K * Ht]` outputs of the layers, side by side for each row, and `[R, Ht]` final states.
    pub fn states(&self, output: &StepOutput<K::Buf>) -> (Vec<f32>, Vec<f32>) {
        let (rows, joined) = (output.last.rows, output.hidden.iter().map(|h| h.width).sum::<usize>());
        let mut buf = self.kernels.scratch(rows * joined);
        let layers: Vec<_> = output.hidden.iter().map(|h| (&h.buf, h.width)).collect();
        self.kernels.concat_cols(&layers, rows, &mut buf);
        let mut features = vec![0.0; rows * joined];
        self.kernels.download(&buf, 0, &mut features);
        buf.give_back();
        (features, Infer::new(self.kernels.as_ref()).values(&output.last))
    }

    /// Runs all layers on the rows of all items and appends them to their caches.
    ///
    /// # Panics
    /// If an item's tokens and parents differ in length, or a token is outside the vocabulary.
    pub fn forward(&self, items: &mut [StepItem<'_, K>], capture: &[LayerId]) -> StepOutput<K::Buf> {
        for item in items.iter() {
            assert!(item.tokens.len() == item.parents.len(), "one parent per token");
            assert!(
                item.tokens.iter().all(|t| (*t as usize) < self.config.vocab_size),
                "token outside the vocabulary"
            );
        }
        let output = match &self.config.rope_long {
            Some((original, rope)) => self.forward_long(items, capture, *original, rope),
            None => {
                let mut passes: Vec<Pass<'_, K>> = items
                    .iter_mut()
                    .map(|item| Pass {
                        layers: &mut item.kv.layers,
                        base: item.kv.len,
                        tokens: item.tokens,
                        parents: item.parents,
                    })
                    .collect();
                self.pass(&mut passes, capture, &self.config.rope)
            }
        };
        for item in items.iter_mut() {
            item.kv.len += item.tokens.len();
        }
        output
    }

    /// Runs all layers on the new rows of trees that are grown level by level, each below rows that earlier calls left
    /// in its cache. A row has the bits that it has in one step with the whole tree ([`Target::forward`]).
    ///
    /// # Panics
    /// As [`Target::forward`]; if a cache does not hold the committed positions and the rows before.
    pub fn grow(&self, items: &mut [GrowItem<'_, K>]) -> StepOutput<K::Buf> {
        for item in items.iter() {
            let before = item.tokens.len() - item.new_rows;
            assert!(item.kv.len == item.base + before, "the rows before are in the cache");
        }
        if self.config.rope_long.is_some() {
            // Which angles a row is turned by depends on where it ends: whole trees alone are steps.
            let mut wanted: Vec<u32> = Vec::new();
            let mut steps: Vec<StepItem<'_, K>> = Vec::new();
            let mut end = 0;
            for item in items.iter_mut() {
                end += item.tokens.len() as u32;
                wanted.extend(end - item.new_rows as u32..end);
                item.kv.rollback_to(item.base);
                steps.push(StepItem { kv: &mut *item.kv, tokens: item.tokens, parents: item.parents });
            }
            let output = self.forward(&mut steps, &[]);
            let last = Infer::new(self.kernels.as_ref()).gather(&output.last, &wanted);
            return StepOutput { hidden: Vec::new(), last };
        }
        for item in items.iter() {
            assert!(item.tokens.len() == item.parents.len(), "one parent per token");
            assert!(
                item.tokens.iter().all(|t| (*t as usize) < self.config.vocab_size),
                "token outside the vocabulary"
            );
        }
        let mut passes: Vec<Pass<'_, K>> = items
            .iter_mut()
            .map(|item| Pass {
                layers: &mut item.kv.layers,
                base: item.base,
                tokens: &item.tokens[item.tokens.len() - item.new_rows..],
                parents: item.parents,
            })
            .collect();
        let output = self.pass(&mut passes, &[], &self.config.rope);
        for item in items.iter_mut() {
            item.kv.len += item.new_rows;
        }
        output
    }

    /// All layers on the rows of all passes.
    fn pass(
        &self,
        passes: &mut [Pass<'_, K>],
        capture: &[LayerId],
        rope: &Arc<RopeTable>,
    ) -> StepOutput<K::Buf> {
        let mut ops = Infer::new(self.kernels.as_ref());
        let tokens: Vec<u32> = passes.iter().flat_map(|p| p.tokens).copied().collect();
        let new = |p: &Pass<'_, K>| positions(p.base, p.parents).split_off(p.parents.len() - p.tokens.len());
        let positions: Vec<u32> = passes.iter().flat_map(new).collect();
        let mut hidden = ops.embed(&self.embed, &tokens, self.config.embed_scale); // [R, Ht]
        let mut captured: Vec<Option<Arc<Rows<K::Buf>>>> = vec![None; capture.len()];
        for (l, weights) in self.layers.iter().enumerate() {
            let segments = passes
                .iter_mut()
                .map(|p| Segment {
                    mask: StepMask {
                        sinks: weights.sinks.as_deref(),
                        new_rows: p.tokens.len(),
                        ..StepMask::step(
                            p.base,
                            p.parents,
                            self.config.windows[l],
                            self.config.attention_scale,
                        )
                        .capped(self.config.attention_softcap)
                    },
                    kv: &mut p.layers[l],
                })
                .collect();
            let mut attend = CacheAttend { segments, head_dim: self.config.head_dim };
            hidden = decoder_layer(&mut ops, &self.config, l, weights, hidden, rope, &positions, &mut attend);
            for (slot, id) in captured.iter_mut().zip(capture) {
                if id.0 as usize == l {
                    *slot = Some(Arc::clone(&hidden));
                }
            }
        }
        let last = ops.rms_norm(&hidden, &self.final_norm, self.config.rms_norm_eps);
        let hidden =
            captured.into_iter().map(|h| h.expect("captured layers are inside the network")).collect();
        StepOutput { hidden, last }
    }

    /// LongRoPE: rows whose sequence, they included, has at most `original` positions see it turned by the short
    /// divisors, the others by the long ones, as if each were the last of its own prefill. A row's bits depend on its
    /// own sequence alone; near the border a step runs twice.
    fn forward_long(
        &self,
        items: &mut [StepItem<'_, K>],
        capture: &[LayerId],
        original: usize,
        long_rope: &Arc<RopeTable>,
    ) -> StepOutput<K::Buf> {
        // Which rows of each item are long.
        let kinds: Vec<Vec<bool>> = items
            .iter()
            .map(|item| {
                let positions = positions(item.kv.len, item.parents);
                positions.into_iter().map(|p| p as usize >= original).collect()
            })
            .collect();
        let mut outputs = Vec::new();
        // Per kind the row at which each item begins in the output of that kind.
        let mut starts = [vec![0; items.len()], vec![0; items.len()]];
        for (kind, rope) in [(false, &self.config.rope), (true, long_rope)] {
            let mut rows = 0;
            let mut passes = Vec::new();
            for (i, item) in items.iter_mut().enumerate() {
                if !kinds[i].contains(&kind) {
                    continue;
                }
                let base = item.kv.len;
                let long = item.kv.long.as_mut().expect("caches of this target have both kinds");
                let (layers, len) = match kind {
                    false => (&mut item.kv.layers, &mut long.short_len),
                    true => (&mut long.layers, &mut long.len),
                };
                while *len < base {
                    let part = &long.tokens[*len..base.min(*len + CATCH_UP)];
                    let parents: Vec<Option<u32>> =
                        (0..part.len() as u32).map(|row| row.checked_sub(1)).collect();
                    let missing = Pass { layers, base: *len, tokens: part, parents: &parents };
                    self.pass(&mut [missing], &[], rope);
                    *len += part.len();
                }
                *len = base + item.tokens.len();
                starts[usize::from(kind)][i] = rows;
                rows += item.tokens.len() as u32;
                passes.push(Pass { layers, base, tokens: item.tokens, parents: item.parents });
            }
            outputs.push((rows > 0).then(|| self.pass(&mut passes, capture, rope)));
        }
        for item in items.iter_mut() {
            let base = item.kv.len;
            let long = item.kv.long.as_mut().expect("caches of this target have both kinds");
            long.tokens.truncate(base);
            long.tokens.extend_from_slice(item.tokens);
        }
        let (short, long) = match <[_; 2]>::try_from(outputs) {
            Ok([Some(short), Some(long)]) => (short, long),
            Ok([Some(only), None] | [None, Some(only)]) => return only,
            _ => return self.pass(&mut [], capture, &self.config.rope),
        };
        // Rows of the long output stand behind those of the short one.
        let short_rows = short.last.rows as u32;
        let chosen: Vec<u32> = kinds
            .iter()
            .enumerate()
            .flat_map(|(i, kinds)| {
                let [short, long] = [starts[0][i], short_rows + starts[1][i]];
                (0u32..).zip(kinds).map(move |(row, kind)| row + if *kind { long } else { short })
            })
            .collect();
        let ops = Infer::new(self.kernels.as_ref());
        let hidden = short.hidden.iter().zip(&long.hidden).map(|(a, b)| ops.choose(a, b, &chosen)).collect();
        StepOutput { hidden, last: ops.choose(&short.last, &long.last, &chosen) }
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

    /// Per chosen row of a step the `k` best tokens with their logits, and what all of them come to.
    pub fn top_k(&self, output: &StepOutput<K::Buf>, rows: &[u32], k: usize) -> Vec<TopK> {
        if self.config.final_softcap.is_some() || self.config.logit_divisor != 1.0 {
            let logits = self.logits(output, rows);
            return logits.chunks_exact(self.config.vocab_size).map(|row| TopK::of(row, k)).collect();
        }
        let chosen = Infer::new(self.kernels.as_ref()).gather(&output.last, rows);
        self.kernels.top_k(&chosen.buf, rows.len(), (&self.head.packed, self.config.vocab_size), k)
    }

    /// The most probable token of chosen rows of a step, the lowest id among equals.
    pub fn argmax(&self, output: &StepOutput<K::Buf>, rows: &[u32]) -> Vec<u32> {
        // Rounding may make equals of different products.
        if self.config.final_softcap.is_some() || self.config.logit_divisor != 1.0 {
            let logits = self.logits(output, rows);
            return logits.chunks_exact(self.config.vocab_size).map(first_largest).collect();
        }
        let chosen = Infer::new(self.kernels.as_ref()).gather(&output.last, rows);
        self.kernels.argmax(&chosen.buf, rows.len(), &self.head.packed)
    }

    /// A token per chosen row of a step, the most probable or drawn, where the backend does that by itself (`None`: it does
    /// not, or not for a target whose logits are capped or divided).
    pub fn choose(
        &self,
        output: &StepOutput<K::Buf>,
        rows: &[u32],
        draws: &[Option<DrawRow>],
    ) -> Option<Vec<u32>> {
        if !K::DRAWS || self.config.final_softcap.is_some() || self.config.logit_divisor != 1.0 {
            return None;
        }
        let chosen = Infer::new(self.kernels.as_ref()).gather(&output.last, rows);
        Some(self.kernels.choose(&chosen.buf, &self.head.packed, draws))
    }

    /// [`Target::argmax`], and the logits `[whole.len(), V]` of the rows at the places `whole` of `rows` in `logits`, whatever it
    /// held before: one pass over the head.
    pub fn argmax_and_logits(
        &self,
        output: &StepOutput<K::Buf>,
        rows: &[u32],
        whole: &[u32],
        logits: &mut Vec<f32>,
    ) -> Vec<u32> {
        logits.resize(whole.len() * self.config.vocab_size, 0.0);
        if whole.is_empty() {
            return self.argmax(output, rows);
        }
        let chosen = Infer::new(self.kernels.as_ref()).gather(&output.last, rows);
        let mut y = self.kernels.scratch(logits.len());
        let shape = (rows.len(), chosen.width);
        let best = self.kernels.argmax_and_outputs(&chosen.buf, shape, &self.head.packed, whole, &mut y);
        self.kernels.download(&y, 0, logits);
        y.give_back();
        best
    }

    /// Logits `[rows.len(), V]` of chosen rows of a step, on the host.
    pub fn logits(&self, output: &StepOutput<K::Buf>, rows: &[u32]) -> Vec<f32> {
        let mut ops = Infer::new(self.kernels.as_ref());
        let chosen = ops.gather(&output.last, rows);
        let logits = ops.linear(&chosen, &self.head, None);
        let logits = scaled(&mut ops, logits, 1.0 / self.config.logit_divisor);
        let logits = match self.config.final_softcap {
            Some(cap) => ops.softcap(logits, cap),
            None => logits,
        };
        ops.values(&logits)
    }
}

impl Target<draftsmith_kernels::Cpu> {
    /// Bytes of weights that a pass of one row reads: all layers and the head, of experts those that compute a row.
    /// Without experts, passes of more rows read the same.
    pub fn pass_bytes(&self) -> usize {
        self.pass_packed().map(PackedWeight::bytes).sum()
    }

    /// Arg-max and log-sum-exp of the logits of final states `[N, Ht]` (what the head reads), in the products of decoding. As in
    /// [`TargetTensors::head`] a divisor of the logits is in them and a cap is not.
    ///
    /// # Panics
    /// If the states are not whole.
    pub fn tops(&self, states: &[f32]) -> (Vec<u32>, Vec<f32>) {
        match self.config.logit_divisor {
            1.0 => self.kernels.tops(states, &self.head.packed),
            divisor => {
                let divided: Vec<f32> = states.iter().map(|v| v / divisor).collect();
                self.kernels.tops(&divided, &self.head.packed)
            }
        }
    }

    /// Bytes of the weights of all layers and the head, all experts among them: what a pass of many rows reads.
    pub fn all_bytes(&self) -> usize {
        let experts = self.layers.iter().filter_map(|l| l.mlp.experts());
        let idle = experts.flat_map(|mlp| {
            mlp.experts.each[mlp.routing.used..].iter().flat_map(|e| [&e.gate, &e.up, &e.down])
        });
        self.pass_bytes() + idle.map(PackedWeight::bytes).sum::<usize>()
    }

    /// Multiply-adds with weights per row of a pass.
    pub fn pass_macs(&self) -> usize {
        self.pass_packed().map(|w| w.out_features() * w.in_features()).sum()
    }

    /// The weights that a pass of one row reads, the head last; of a layer's experts the first stand for those that are
    /// chosen.
    pub fn pass_packed(&self) -> impl Iterator<Item = &PackedWeight> {
        let layers = self.layers.iter().flat_map(|l| {
            let mut weights: Vec<&PackedWeight> = [&l.q, &l.k, &l.v, &l.o].map(|w| &w.packed).to_vec();
            weights.extend(l.mlp.weights().into_iter().map(|w| &w.packed));
            if let Some(mlp) = l.mlp.experts() {
                let chosen = &mlp.experts.each[..mlp.routing.used];
                weights.extend(chosen.iter().flat_map(|e| [&e.gate, &e.up, &e.down]));
            }
            weights
        });
        layers.chain([&self.head.packed])
    }
}

/// Weights of a target as plain f32, for training: the frozen embedding and head, and the last decoder layer, from
/// which a draft can start.
pub struct TargetTensors {
    /// Shapes and switches.
    pub config: TargetConfig,
    /// `[V, Ht]`
    pub embed: Vec<f32>,
    /// `[V, Ht]`, with the divisor of the logits in it; `None` when it is the embedding.
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
        let mut head = (!c.tied).then(|| source.floats(Part::Head, 0, [c.vocab_size, h])).transpose()?;
        if c.logit_divisor != 1.0 {
            let divided = head.get_or_insert_with(|| embed.clone());
            divided.iter_mut().for_each(|w| *w /= c.logit_divisor);
        }
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
            // A draft has one MLP: none of many experts is the one to start from.
            if matches!(part, Part::Gate | Part::Up | Part::Down) && c.mlps[l] == MlpKind::Experts {
                continue;
            }
            last_layer.push((name, source.floats(part, l, shape)?));
        }
        if c.norms.pre() {
            last_layer.push(("input_layernorm.weight", source.norm(Part::InputNorm, l, h)?));
            last_layer.push(("post_attention_layernorm.weight", source.norm(Part::MlpNorm, l, h)?));
        }
        Ok(TargetTensors { config: c, embed, head, final_norm, last_layer })
    }
}
