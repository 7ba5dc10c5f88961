//! How the weights of a block draft start.

use draftsmith_model::DraftSpec;
use draftsmith_model::block::BlockConfig;

use crate::methods::eagle3::TargetStart;
use crate::{DraftTensor, Rng, TrainError};

/// Share of `initializer_range` that is added as noise to weights that start at zero or at the identity.
const NOISE: f32 = 0.1;

/// Linear weights from N(0, `initializer_range`), norms 1, biases 0.
pub fn random_weights(config: &BlockConfig, seed: u64) -> Vec<DraftTensor> {
    let tensors = config.tensors().into_iter().enumerate();
    tensors
        .map(|(i, (name, shape))| {
            let values = match shape.len() {
                1 if name.ends_with(".bias") => vec![0.0; shape[0]],
                1 => vec![1.0; shape[0]],
                _ => Rng::new(seed, &[0x0062_6c6f_636b, i as u64])
                    .normal(shape.iter().product(), config.initializer_range),
            };
            DraftTensor { name, shape, values }
        })
        .collect()
}

/// Starts every layer as the target's last one and the context as the highest captured layer; the rest of `fc` as small
/// noise. Heads of DSpark start at random.
///
/// # Errors
/// If the draft's shapes are not the target's.
pub fn warm_weights(
    config: &BlockConfig,
    start: &TargetStart<'_>,
    seed: u64,
) -> Result<Vec<DraftTensor>, TrainError> {
    let mut tensors = random_weights(config, seed);
    let h = config.layer.hidden_size;
    let copy = |name: &str, from: &[f32], to: &mut [f32]| match from.len() == to.len() {
        true => {
            to.copy_from_slice(from);
            Ok(())
        }
        false => Err(TrainError::Start { name: name.to_owned(), found: from.len(), wanted: to.len() }),
    };
    let layer = |name: &str| start.layer.iter().find(|(n, _)| *n == name).map(|(_, values)| *values);
    for t in &mut tensors {
        match t.name.as_str() {
            "fc.weight" => {
                let width = config.features_width();
                for (i, row) in t.values.chunks_exact_mut(width).enumerate() {
                    row.iter_mut().for_each(|x| *x *= NOISE);
                    row[width - h + i] += 1.0;
                }
            }
            "hidden_norm.weight" => {
                if let Some(from) = layer("input_layernorm.weight") {
                    copy(&t.name, from, &mut t.values)?;
                }
            }
            "norm.weight" => copy(&t.name, start.final_norm, &mut t.values)?,
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
