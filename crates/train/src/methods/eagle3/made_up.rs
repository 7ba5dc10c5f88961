//! A step on made-up rows, for measurements of speed: nothing is learnt.

use draftsmith_core::VocabMap;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::TrainKernels;
use draftsmith_model::eagle3::Eagle3Config;
use serde_json::json;

use super::{Eagle3Options, Eagle3Train, TargetSide, random_weights};
use crate::{MadeUpShape, Pack, Rng, TrainError};

/// The method with random weights, and one row whose slots are all trained.
pub(crate) fn made_up<K: TrainKernels>(
    kernels: K,
    shape: MadeUpShape,
) -> Result<(Eagle3Train<K>, Pack), TrainError> {
    let MadeUpShape { slots, hidden, vocab, .. } = shape;
    let config = Eagle3Config::from_value(&json!({
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
    }))?;
    let mut rng = Rng::new(1, &[]);
    let embed = rng.normal(vocab * hidden, 0.1);
    let row = CaptureRow {
        ids: (0..slots).map(|_| rng.below(vocab as u64) as u32).collect(),
        loss_mask: vec![true; slots],
        features: rng.normal(slots * 3 * hidden, 1.0),
        last: rng.normal(slots * hidden, 1.0),
    };
    let mut pack = Pack::default();
    pack.push(0, &row, slots, 3 * hidden, hidden)?;
    let weights = random_weights(&config, 1);
    let options = Eagle3Options { ttt_length: shape.unrolled_steps, ..Eagle3Options::default() };
    let side = TargetSide { embed: &embed, head: None };
    let method = Eagle3Train::new(kernels, config, options, VocabMap::identity(vocab), &side, &weights)?;
    Ok((method, pack))
}
