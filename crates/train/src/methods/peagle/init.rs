//! How the weights of a P-EAGLE draft start.

use draftsmith_core::VocabMap;
use draftsmith_model::DraftSpec;
use draftsmith_model::peagle::PEagleConfig;

use crate::methods::eagle3::TargetStart;
use crate::{DraftTensor, Rng, TrainError};

/// Share of `initializer_range` that is added as noise to weights that start at zero or at the identity.
const NOISE: f32 = 0.1;

/// Published initialisation: linear weights from N(0, `initializer_range`), norms 1, the stand-in for features from
/// N(0, 1), the embedding the target's `[V, H]`.
pub fn random_weights(config: &PEagleConfig, embed: &[f32], seed: u64) -> Vec<DraftTensor> {
    let tensors = config.tensors().into_iter().enumerate();
    tensors
        .map(|(i, (name, shape))| {
            let numel = shape.iter().product();
            let normal = |std: f32| Rng::new(seed, &[0x7065_6167_6c65, i as u64]).normal(numel, std);
            let values = match name.as_str() {
                "embed_tokens.weight" => embed.to_vec(),
                "mask_hidden" => normal(1.0),
                _ if shape.len() == 1 => vec![1.0; shape[0]],
                _ => normal(config.initializer_range),
            };
            DraftTensor { name, shape, values }
        })
        .collect()
}

/// Starts every layer as the target's last one, head and final norm as the target's; what the first layer takes of the
/// embedding, and `fc` of the two lower layers, as small noise.
///
/// # Errors
/// If the draft's shapes are not the target's.
pub fn warm_weights(
    config: &PEagleConfig,
    vocab_map: &VocabMap,
    start: &TargetStart<'_>,
    embed: &[f32],
    seed: u64,
) -> Result<Vec<DraftTensor>, TrainError> {
    let (h, ht) = (config.layer.hidden_size, config.target_hidden_size);
    if h != ht {
        return Err(TrainError::Start { name: "final hidden state".into(), found: ht, wanted: h });
    }
    let mut tensors = random_weights(config, embed, seed);
    let copy = |name: &str, from: &[f32], to: &mut [f32]| match from.len() == to.len() {
        true => {
            to.copy_from_slice(from);
            Ok(())
        }
        false => Err(TrainError::Start { name: name.to_owned(), found: from.len(), wanted: to.len() }),
    };
    let layer = |name: &str| start.layer.iter().find(|(n, _)| *n == name).map(|(_, values)| *values);
    for t in &mut tensors {
        let quiet = |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= NOISE);
        match t.name.as_str() {
            "fc.weight" => {
                quiet(&mut t.values);
                for (i, row) in t.values.chunks_exact_mut(3 * h).enumerate() {
                    row[2 * h + i] += 1.0;
                }
            }
            "norm.weight" => copy(&t.name, start.final_norm, &mut t.values)?,
            "lm_head.weight" => {
                let (found, wanted) = (start.head.len(), config.vocab_size * ht);
                if found != wanted {
                    return Err(TrainError::Start { name: "lm_head.weight".into(), found, wanted });
                }
                t.values = crate::to_tape::head_rows(start.head, ht, vocab_map);
            }
            "layers.0.hidden_norm.weight" => {
                if let Some(from) = layer("input_layernorm.weight") {
                    copy(&t.name, from, &mut t.values)?;
                }
            }
            "layers.0.input_layernorm.weight" => {}
            name @ ("layers.0.self_attn.q_proj.weight"
            | "layers.0.self_attn.k_proj.weight"
            | "layers.0.self_attn.v_proj.weight") => {
                let Some(from) = layer(&name["layers.0.".len()..]) else { continue };
                if 2 * from.len() != t.values.len() {
                    let (found, wanted) = (from.len(), t.values.len() / 2);
                    return Err(TrainError::Start { name: name.to_owned(), found, wanted });
                }
                for (row, from) in t.values.chunks_exact_mut(2 * h).zip(from.chunks_exact(h)) {
                    quiet(&mut row[..h]);
                    row[h..].copy_from_slice(from);
                }
            }
            name if name.starts_with("layers.") => {
                let of_layer = name.splitn(3, '.').nth(2).unwrap_or_default();
                if let Some(from) = layer(of_layer) {
                    copy(&t.name, from, &mut t.values)?;
                }
            }
            _ => {}
        }
    }
    Ok(tensors)
}
