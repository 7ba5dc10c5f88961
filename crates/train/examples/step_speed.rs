//! Speed of one training step at the shapes of SmolLM2-135M: `step_speed [THREADS] [TTT_LENGTH] [STEPS]`.
//!
//! Packs of 2048 slots made of rows of 340 or so, 60 % of the slots trained, as instruct data has them.
#![allow(clippy::print_stdout, reason = "an example reports on standard output")]

use std::time::Instant;

use draftsmith_core::VocabMap;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Cpu;
use draftsmith_kernels::train::LinearShape;
use draftsmith_kernels::train::linear::matmul;
use draftsmith_model::eagle3::Eagle3Config;
use draftsmith_train::eagle3::{TargetSide, random_weights};
use draftsmith_train::{AdamW, AdamWOptions, Eagle3Options, Eagle3Train, Method, Mode, Pack, Rng};

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("arguments are numbers"));
    let threads = args.next().unwrap_or(2);
    let ttt_length = args.next().unwrap_or(5);
    let steps = args.next().unwrap_or(3);
    let config = Eagle3Config::from_json(
        r#"{"vocab_size": 49152, "draft_vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0}"#,
    )
    .expect("a valid configuration");
    let mut rng = Rng::new(1, &[]);
    let embed = rng.normal(49152 * 576, 0.1);
    // Frequent ids first, so that most teacher tokens are in the draft vocabulary, as they are in real data.
    let ids: Vec<u32> = (0..8192).map(|i| i * 6).collect();
    let map = VocabMap::from_target_ids(&ids, 49152).expect("a valid map");
    let weights = random_weights(&config, 1);
    let options = Eagle3Options { ttt_length, ..Eagle3Options::default() };
    let target = TargetSide { embed: &embed, head: None };
    let mut method =
        Eagle3Train::new(Cpu::new(threads), config, options, map, &target, &weights).expect("shapes fit");
    let mut pack = Pack::default();
    let mut number = 0;
    while pack.len() < 2048 {
        let len = 340.min(2048 - pack.len());
        // The final state is close to a draft-vocabulary row of the head, which makes that row the arg-max.
        let ids: Vec<u32> = (0..len).map(|_| rng.below(8192) as u32 * 6).collect();
        let last =
            ids.iter().flat_map(|i| embed[*i as usize * 576..(*i as usize + 1) * 576].to_vec()).collect();
        let row = CaptureRow {
            loss_mask: (0..len).map(|t| t * 10 >= len * 4).collect(),
            features: rng.normal(len * 3 * 576, 1.0),
            last,
            ids,
        };
        pack.push(number, &row, 2048, 3 * 576, 576).expect("a row of the right shape");
        number += 1;
    }
    let trained = pack.loss_mask.iter().filter(|m| **m).count();
    println!("{} slots, {trained} trained, TTT {ttt_length}, {threads} threads", pack.len());

    let s = LinearShape { rows: 1024, out: 8192, inp: 576 };
    let (x, mut y) = (rng.normal(s.rows * s.inp, 1.0), vec![0.0; s.rows * s.out]);
    let mut best = f64::MAX;
    for _ in 0..5 {
        let began = Instant::now();
        matmul(threads, &x, &embed, s, &mut y);
        best = best.min(began.elapsed().as_secs_f64());
    }
    println!("matmul 1024 x 576 x 8192: {:.0} GFLOP/s", 2e-9 * (s.rows * s.out * s.inp) as f64 / best);

    let mut optimizer = AdamW::new(AdamWOptions::default(), method.tape());
    for step in 0..=steps {
        for p in &mut pack.rows {
            // New numbers: the target's head is streamed again, as for rows of a first epoch.
            *p += if step == 2 { 0 } else { number };
        }
        let began = Instant::now();
        let stats = method.micro_batch(&pack, Mode::Train).expect("a good pack");
        let norm = optimizer.step(method.tape_mut(), 1e-4, stats.weight).expect("finite");
        let took = began.elapsed().as_secs_f64();
        let kind = if step == 0 {
            "first"
        } else if step == 2 {
            "known rows"
        } else {
            "new rows"
        };
        println!(
            "step {step} ({kind}): {took:.2} s, {:.0} slots/s, loss {:.4}, grad norm {norm:.3}",
            pack.len() as f64 / took,
            stats.loss / stats.weight
        );
    }
}
