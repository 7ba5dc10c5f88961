//! What a pass of a target on this machine could take at best.

use std::time::Instant;

use draftsmith_bench::kernels::{Limits, WeightTimes};
use draftsmith_core::TokenTree;
use draftsmith_kernels::{Kernels, Memory, PackedWeight};
use draftsmith_model::{Precision, StepItem, Target};

use crate::host::Host;

/// Memory that is read to measure its bandwidth: more than a pass reads, and than most caches hold.
const READ_BYTES: usize = 256 << 20;
/// Rounds over all weights, of which the best counts.
const WEIGHT_ROUNDS: usize = 6;

/// Times of the products by the form of the weights, in rounds over all of them, so that none stays in a cache that
/// would not hold it in a pass.
fn weight_times(target: &Target<Host>) -> Vec<WeightTimes> {
    let kernels = target.kernels();
    let packed: Vec<&PackedWeight> = target.pass_packed().collect();
    let Some((head, layers)) = packed.split_last() else { return Vec::new() };
    // Forms in order of appearance, then the head with its outputs, and with the largest alone.
    let mut groups: Vec<(String, Vec<&PackedWeight>, bool)> = Vec::new();
    for weight in layers {
        match groups.iter_mut().find(|(form, ..)| form == weight.form()) {
            Some((_, weights, _)) => weights.push(weight),
            None => groups.push((weight.form().to_string(), vec![weight], false)),
        }
    }
    groups.push((format!("head {}", head.form()), vec![head], false));
    groups.push(("head, largest alone".to_string(), vec![head], true));
    // What the head is asked for in a pass, for states as the target has them.
    let tokens = made_up_tokens(target.config().vocab_size, 8, 0);
    let parents = TokenTree::chain_parents(8);
    let mut kv = target.new_kv();
    let item = StepItem { kv: &mut kv, tokens: &tokens, parents: &parents };
    let output = target.forward(&mut [item], &[]);
    let mut times: Vec<WeightTimes> = groups
        .iter()
        .map(|(form, weights, _)| WeightTimes {
            form: form.clone(),
            bytes: weights.iter().map(|w| w.bytes()).sum(),
            macs_per_row: weights.iter().map(|w| w.in_features() * w.out_features()).sum(),
            ms: [f64::INFINITY; 2],
        })
        .collect();
    let widest = packed.iter().map(|w| w.in_features()).max().unwrap_or(0);
    // Made-up activations of both signs.
    let x: Vec<f32> = (0..8 * widest).map(|i| ((i * 7919 + 13) % 1024) as f32 / 512.0 - 1.0).collect();
    let mut y = [kernels.zeros(8 * packed.iter().map(|w| w.out_features()).max().unwrap_or(0))];
    for _ in 0..WEIGHT_ROUNDS {
        for (slot, rows) in [1, 8].into_iter().enumerate() {
            for ((_, weights, largest), times) in groups.iter().zip(&mut times) {
                let began = Instant::now();
                for weight in weights {
                    if *largest {
                        target.argmax(&output, &[0, 1, 2, 3, 4, 5, 6, 7][8 - rows..]);
                    } else {
                        kernels.matmuls(&x, rows, &[(*weight, None)], &mut y);
                    }
                }
                times.ms[slot] = times.ms[slot].min(began.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    times
}

/// Tokens for passes whose cost depends on their number alone, the first at position `from`.
pub(crate) fn made_up_tokens(vocab: usize, count: usize, from: usize) -> Vec<u32> {
    (from..from + count).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
}

/// Peaks of the machine, and what the weights of a target take of them.
pub(crate) fn limits(target: &Target<Host>, precision: Precision) -> Limits {
    let kernels = target.kernels();
    Limits {
        read_gb_per_s: kernels.read_rate(READ_BYTES) / 1e9,
        dot_gmac_per_s: (precision == Precision::Stored).then(|| kernels.dot_rate() / 1e9),
        weight_bytes: target.pass_bytes(),
        macs_per_row: target.pass_macs(),
        weights: weight_times(target),
    }
}
