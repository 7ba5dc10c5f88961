//! How the weights of an EAGLE-3 draft start.

use draftsmith_core::VocabMap;
use draftsmith_model::TargetTensors;
use draftsmith_model::eagle3::Eagle3Config;

use crate::{DraftTensor, Rng, TrainError};

/// Share of `initializer_range` that is added as noise to weights that start at zero or at the identity.
const NOISE: f32 = 0.1;

/// Published initialisation: linear weights from N(0, `initializer_range`), norms 1 [eagle3 §2.1].
pub fn random_weights(config: &Eagle3Config, seed: u64) -> Vec<DraftTensor> {
    let tensors = config.tensors().into_iter().enumerate();
    tensors
        .map(|(i, (name, shape))| {
            let values = match shape.len() {
                1 => vec![1.0; shape[0]],
                _ => Rng::new(seed, &[0x696e_6974, i as u64])
                    .normal(shape.iter().product(), config.initializer_range),
            };
            DraftTensor { name, shape, values }
        })
        .collect()
}

/// Tensors of the target that a draft of the same shapes can start from.
pub struct TargetStart<'a> {
    /// Last decoder layer, by the names of a Hugging Face checkpoint without the layer prefix. What is not there
    /// starts at random: see [`TargetStart::of`].
    pub layer: Vec<(&'static str, &'a [f32])>,
    /// `[Ht]`
    pub final_norm: &'a [f32],
    /// `[V, Ht]`
    pub head: &'a [f32],
}

impl<'a> TargetStart<'a> {
    /// The parts of a target's last layer that mean the same in a draft.
    ///
    /// A draft has no biases, no norms on query and key heads, and SiLU: attention weights that were trained with
    /// the former, or an MLP with another non-linearity, are left out, and so is a layer with norms on its outputs.
    pub fn of(target: &'a TargetTensors) -> TargetStart<'a> {
        let c = &target.config;
        let attention = c.attention_is_a_drafts();
        let mlp = c.mlp_is_a_drafts();
        let keep = |name: &str| match name {
            "input_layernorm.weight" => attention,
            "post_attention_layernorm.weight" => mlp,
            name if name.starts_with("self_attn.") => attention,
            _ => mlp,
        };
        let layer = target.last_layer.iter().filter(|t| keep(t.0)).map(|(n, v)| (*n, v.as_slice())).collect();
        let head = target.head.as_deref().unwrap_or(&target.embed);
        TargetStart { layer, final_norm: &target.final_norm, head }
    }
}

/// Starts the draft as the target's own last layer, final norm and head, fed with the highest captured layer.
///
/// Query, key and value weights act on the hidden half of the layer's input; the embedding half starts as small
/// noise, and so does what `fc` takes from the two lower layers.
///
/// # Errors
/// If the draft's shapes are not the target's.
pub fn warm_weights(
    config: &Eagle3Config,
    vocab_map: &VocabMap,
    start: &TargetStart<'_>,
    seed: u64,
) -> Result<Vec<DraftTensor>, TrainError> {
    let (h, ht) = (config.hidden_size, config.target_hidden_size);
    if h != ht {
        return Err(TrainError::Start { name: "final hidden state".into(), found: ht, wanted: h });
    }
    let layer = |name: &str, len: usize| -> Result<Option<&[f32]>, TrainError> {
        match start.layer.iter().find(|(n, _)| *n == name) {
            None => Ok(None),
            Some((_, values)) if values.len() == len => Ok(Some(*values)),
            Some((_, values)) => {
                Err(TrainError::Start { name: name.to_owned(), found: values.len(), wanted: len })
            }
        }
    };
    let mut tensors = random_weights(config, seed);
    for t in &mut tensors {
        let numel = t.values.len();
        let quiet = |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= NOISE);
        match t.name.as_str() {
            "fc.weight" => {
                quiet(&mut t.values);
                for i in 0..h {
                    t.values[i * 3 * h + 2 * h + i] += 1.0;
                }
            }
            name @ ("midlayer.self_attn.q_proj.weight"
            | "midlayer.self_attn.k_proj.weight"
            | "midlayer.self_attn.v_proj.weight") => {
                let Some(from) = layer(&name["midlayer.".len()..], numel / 2)? else { continue };
                for (row, from) in t.values.chunks_exact_mut(2 * h).zip(from.chunks_exact(h)) {
                    quiet(&mut row[..h]);
                    row[h..].copy_from_slice(from);
                }
            }
            "midlayer.hidden_norm.weight" => {
                if let Some(from) = layer("input_layernorm.weight", numel)? {
                    t.values.copy_from_slice(from);
                }
            }
            "midlayer.input_layernorm.weight" => {}
            "norm.weight" => {
                if start.final_norm.len() != numel {
                    let (found, wanted) = (start.final_norm.len(), numel);
                    return Err(TrainError::Start { name: "norm.weight".into(), found, wanted });
                }
                t.values.copy_from_slice(start.final_norm);
            }
            "lm_head.weight" => {
                let wanted = config.vocab_size * ht;
                if start.head.len() != wanted {
                    let found = start.head.len();
                    return Err(TrainError::Start { name: "lm_head.weight".into(), found, wanted });
                }
                for (row, id) in t.values.chunks_exact_mut(h).zip(vocab_map.target_ids()) {
                    row.copy_from_slice(&start.head[*id as usize * ht..(*id as usize + 1) * ht]);
                }
            }
            name if name.starts_with("midlayer.") => {
                if let Some(from) = layer(&name["midlayer.".len()..], numel)? {
                    t.values.copy_from_slice(from);
                }
            }
            // The per-layer norms before `fc` of EAGLE-3.1 start at 1.
            _ => {}
        }
    }
    Ok(tensors)
}
