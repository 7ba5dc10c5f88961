//! One way to read a draft: its configuration and weights, what it is fed and what it borrows from the target.
//!
//! A probe is another setting. All of them go through the drafter that decodes: there is no second network here.

use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_decode::{Borrowed, Drafter, drafter_with};
use draftsmith_kernels::{Kernels, PackMode, WeightView};
use draftsmith_model::{Draft, DraftConfig, DraftTensors, Infer, Linear, Ops, Target};

use super::texts::Tap;

/// How states and tokens are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// The state of a position beside the token that follows it.
    Next,
    /// The state of the position before, beside the same token.
    StateBefore,
    /// The state of a position beside its own token. The token that follows the text's last state is known: what the
    /// draft proposes for it is passed over.
    OwnToken,
}

/// A change of weights that the configuration does not tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WeightChange {
    /// Added to every weight of a norm.
    Norms(f32),
    /// Rows of q and k from interleaved pairs to halves.
    HalvesFromPairs,
    /// And back.
    PairsFromHalves,
    /// The target's rows in place of the draft's own embedding.
    TargetEmbedding,
}

/// Where a matrix of the target's shape comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The target's matrix of that name.
    Target,
    /// The copy that came with the draft.
    Own,
    /// The target's embedding in place of its head.
    Embedding,
}

/// A way to read a draft.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Shapes and switches.
    pub config: DraftConfig,
    /// Weights as they were read.
    pub tensors: Arc<DraftTensors>,
    /// What is done to them.
    pub weights: Vec<WeightChange>,
    /// Draft ids to target ids.
    pub vocab_map: Option<VocabMap>,
    /// States that it reads, in order.
    pub taps: Vec<Tap>,
    /// How they meet the tokens.
    pub feed: Feed,
    /// Its embedding, if that is the target's.
    pub embedding: Source,
    /// Factor of the rows; `None`: the target's.
    pub embed_scale: Option<f32>,
    /// Its head, if that is the target's.
    pub head: Source,
    /// Positions that a block's RoPE stands off.
    pub rope_gap: i32,
}

/// Copies of the target's matrices that came with a draft.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    /// `[V, H]`
    pub embedding: Option<Vec<f32>>,
    /// `[Vd, H]`
    pub head: Option<Vec<f32>>,
}

type Matrix<K> = Arc<Linear<<K as Kernels>::Packed>>;

impl Setting {
    /// True if the other one of the same draft is the same.
    pub fn is_as(&self, other: &Setting) -> bool {
        let Setting {
            config,
            tensors: _,
            weights,
            vocab_map,
            taps,
            feed,
            embedding,
            embed_scale,
            head,
            rope_gap,
        } = self;
        *config == other.config
            && *weights == other.weights
            && *vocab_map == other.vocab_map
            && *taps == other.taps
            && (*feed, *embedding, *head) == (other.feed, other.embedding, other.head)
            && (*embed_scale, *rope_gap) == (other.embed_scale, other.rope_gap)
    }

    /// The drafter of this setting.
    ///
    /// # Errors
    /// What does not fit, as a sentence.
    pub fn drafter<K: Kernels>(
        &self,
        target: &Target<K>,
        copies: &Copies,
    ) -> Result<Arc<dyn Drafter<K>>, String> {
        let kernels = target.kernels().as_ref();
        let mut config = self.config.clone();
        // What is fed is decided here; the drafter only counts the layers.
        let layers = target.config().num_layers as u32;
        let any: Vec<u32> = (0..self.taps.len() as u32).map(|i| i.min(layers.saturating_sub(1))).collect();
        config.set_target_layers(&any).map_err(|e| e.to_string())?;
        let changed;
        let tensors = match self.weights.is_empty() {
            true => self.tensors.as_ref(),
            false => {
                changed = self.changed(target);
                &changed
            }
        };
        // As decoding packs them.
        let map = self.vocab_map.clone();
        let mut draft = Draft::from_tensors(kernels, config, tensors, map, PackMode::Q8, "draft")
            .map_err(|e| e.to_string())?;
        if let Draft::Block(block) = &mut draft {
            block.rope_gap = self.rope_gap;
        }
        let mut borrowed = Borrowed::of(target);
        let width = target.config().hidden_size;
        let matrix = |values: &Option<Vec<f32>>| -> Result<Matrix<K>, String> {
            let values = values.as_ref().ok_or("the draft brought no copy")?;
            let rows = values.len() / width;
            let view = WeightView::f32(values, rows, width);
            let packed = kernels.pack("copy", &view, PackMode::Q8).map_err(|e| e.to_string())?;
            Ok(Arc::new(Linear { packed, out_features: rows, in_features: width }))
        };
        match self.embedding {
            Source::Target | Source::Embedding => {}
            Source::Own => borrowed.embedding = matrix(&copies.embedding)?,
        }
        match self.head {
            Source::Target => {}
            Source::Own => borrowed.head = matrix(&copies.head)?,
            Source::Embedding => borrowed.head = Arc::clone(target.embedding()),
        }
        if let Some(scale) = self.embed_scale {
            borrowed.embed_scale = scale;
        }
        drafter_with(target, draft, borrowed).map_err(|e| e.to_string())
    }

    fn changed<K: Kernels>(&self, target: &Target<K>) -> DraftTensors {
        let mut tensors = self.tensors.as_ref().clone();
        let head_dim = self.config.shape().head_dim;
        for change in &self.weights {
            for (name, (shape, values)) in &mut tensors {
                match change {
                    WeightChange::Norms(add) if shape.len() == 1 && is_norm(name) => {
                        values.iter_mut().for_each(|w| *w += add);
                    }
                    WeightChange::HalvesFromPairs if turns(name) => {
                        *values = reordered(values, shape, head_dim, |r, half| r % half * 2 + r / half);
                    }
                    WeightChange::PairsFromHalves if turns(name) => {
                        *values = reordered(values, shape, head_dim, |r, half| r % 2 * half + r / 2);
                    }
                    WeightChange::TargetEmbedding if name == "embed_tokens.weight" => {
                        let ids: Vec<u32> = (0..shape[0].min(target.config().vocab_size) as u32).collect();
                        let mut ops = Infer::new(target.kernels().as_ref());
                        let rows = ops.embed(target.embedding(), &ids, target.config().embed_scale);
                        let rows = ops.values(&rows);
                        values[..rows.len()].copy_from_slice(&rows);
                    }
                    WeightChange::Norms(_)
                    | WeightChange::HalvesFromPairs
                    | WeightChange::PairsFromHalves
                    | WeightChange::TargetEmbedding => {}
                }
            }
        }
        tensors
    }
}

/// Biases are no norms.
pub(crate) fn is_norm(name: &str) -> bool {
    name.contains("norm") && name.ends_with(".weight")
}

/// True for weights whose rows RoPE turns. Norms on heads are turned with them.
fn turns(name: &str) -> bool {
    ["q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight"].iter().any(|end| name.ends_with(end))
}

/// Rows of each head in another order: row `r` is taken from row `from(r, half)` of the same head.
fn reordered(
    values: &[f32],
    shape: &[usize],
    head_dim: usize,
    from: impl Fn(usize, usize) -> usize,
) -> Vec<f32> {
    let rows = shape[0];
    let width = values.len() / rows.max(1);
    (0..rows)
        .flat_map(|row| {
            let source = row / head_dim * head_dim + from(row % head_dim, head_dim / 2);
            &values[source * width..(source + 1) * width]
        })
        .copied()
        .collect()
}
