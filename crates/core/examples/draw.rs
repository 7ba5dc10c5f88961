//! What it costs to draw one token from a whole vocabulary (temperature 1, top-p 1), beside noise for every token.
//!
//! `cargo run --release -p draftsmith-core --example draw`
#![expect(clippy::print_stdout, reason = "an example talks to people")]

use std::hint::black_box;
use std::time::Instant;

use draftsmith_core::{Sampling, TargetTokenId, choose_token, gumbel_noise};

/// Tokens, as Qwen2.5 has them.
const VOCAB: usize = 152_064;
/// Draws per measurement.
const DRAWS: u64 = 40;

/// Noise for every token.
fn plain(logits: &[f32], sampling: &Sampling, position: u64) -> TargetTokenId {
    let factor = 1.0 / sampling.temperature;
    let mut best = (0, f32::NEG_INFINITY);
    for (i, logit) in logits.iter().enumerate() {
        let value = logit * factor + gumbel_noise(sampling.seed, position, i as u32);
        if value > best.1 {
            best = (i, value);
        }
    }
    TargetTokenId(best.0 as u32)
}

fn main() {
    println!("{VOCAB} tokens, temperature 1, top-p 1; milliseconds per draw, the best of five");
    println!("{:28} {:>9} {:>9} {:>8}", "logits", "each", "pruned", "ratio");
    // Spread of the bulk around zero (sums of uniform noise), and how far the best ones stand above it.
    for (name, spread, peak) in [
        ("flat", 0.0f32, 0.0f32),
        ("spread 1, no peak", 1.0, 0.0),
        ("spread 3, no peak", 3.0, 0.0),
        ("spread 3, peak at 15", 3.0, 15.0),
        ("spread 3, peak at 30", 3.0, 30.0),
        ("spread 3, peak at 60", 3.0, 60.0),
    ] {
        let bulk = |i: usize| (0..4).map(|k| 0.43 * gumbel_noise(k, 1 << 40, i as u32)).sum::<f32>() - 1.0;
        let mut logits: Vec<f32> = (0..VOCAB).map(|i| spread * bulk(i).clamp(-4.0, 4.0)).collect();
        (0..8).for_each(|i| logits[i * 7919] += peak - i as f32 * f32::from(peak > 0.0));
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::GREEDY };
        let time = |draw: &dyn Fn(u64) -> TargetTokenId| {
            let run = |round: u64| {
                let began = Instant::now();
                for p in 0..DRAWS {
                    black_box(draw(round * DRAWS + p));
                }
                began.elapsed().as_secs_f64() * 1e3 / DRAWS as f64
            };
            (0..5).map(run).fold(f64::INFINITY, f64::min)
        };
        for position in 0..5 * DRAWS {
            assert_eq!(choose_token(&logits, &sampling, position), plain(&logits, &sampling, position));
        }
        let each = time(&|p| plain(&logits, &sampling, p));
        let pruned = time(&|p| choose_token(&logits, &sampling, p));
        println!("{name:28} {each:9.3} {pruned:9.3} {:8.1}", each / pruned);
    }
}
