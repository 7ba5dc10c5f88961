//! Speed of one training step at the shapes of SmolLM2-135M: `step_speed [THREADS] [TTT_LENGTH] [STEPS] [PRODUCTS]`, products `f32`, `bf16` or `bf16x3`.
//!
//! Packs of 2048 slots made of rows of 340 or so, 60 % of the slots trained, as instruct data has them.
#![allow(clippy::print_stdout, reason = "an example reports on standard output")]

use std::time::Instant;

use draftsmith_core::VocabMap;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::train::attention::{TttGrads, TttInputs, ttt_attention, ttt_attention_grad};
use draftsmith_kernels::train::linear::{matmul, matmul_dw_acc, matmul_dx};
use draftsmith_kernels::train::rowwise::{NormGrad, gated, rms_norm, rms_norm_grad};
use draftsmith_kernels::train::soft_ce::{SoftTargets, linear_soft_ce, stream_head};
use draftsmith_kernels::train::{LinearShape, Products, SoftLoss, SoftScale, Team, TttShape};
use draftsmith_kernels::{Activation, Cpu};
use draftsmith_model::eagle3::Eagle3Config;
use draftsmith_train::eagle3::{TargetSide, random_weights};
use draftsmith_train::{AdamW, AdamWOptions, Eagle3Options, Eagle3Train, Method, Mode, Pack, Rng};

/// Best of five runs, in milliseconds.
fn time(mut f: impl FnMut()) -> f64 {
    let once = |f: &mut dyn FnMut()| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64() * 1e3
    };
    (0..5).map(|_| once(&mut f)).fold(f64::MAX, f64::min)
}

/// The pieces of a step, alone.
fn kernel_times(team: Team, pack: &Pack, trained: usize, embed: &[f32], rng: &mut Rng) {
    let report = |what: &str, ms: f64, flops: f64| {
        println!("{what:<44} {ms:>8.1} ms  {:>6.0} GFLOP/s", flops / ms * 1e-6);
    };
    let (h, vd, rows) = (576, 8192, trained);
    let x = rng.normal(pack.len() * h, 1.0);
    let s = LinearShape { rows, out: vd, inp: h };
    let product = 2.0 * (rows * vd * h) as f64;
    let (mut y, mut dx, mut dw) = (vec![0.0; rows * vd], vec![0.0; rows * h], vec![0.0; vd * h]);
    report("head product", time(|| matmul(team, &x, embed, s, &mut y)), product);
    report(
        "head product, gradient of the input",
        time(|| matmul_dx(team, &y, embed, s, false, &mut dx)),
        product,
    );
    report("head product, gradient of the weight", time(|| matmul_dw_acc(team, &y, &x, s, &mut dw)), product);
    let full = LinearShape { out: 49152, ..s };
    let ms = time(|| {
        stream_head(team, (&x, embed), full);
    });
    report("teacher: full head streamed", ms, 2.0 * (rows * 49152 * h) as f64);
    y.fill(1.0 / vd as f32);
    let (mass, labels, of) = (vec![0.9; rows], vec![0; rows], (0..rows as u32).collect::<Vec<_>>());
    let targets = SoftTargets { p: &y, mass: &mass, labels: &labels, rows: &of };
    let scale = SoftScale { kl: 1.0, alpha: 1.0 };
    let ms = time(|| {
        linear_soft_ce(team, (&x, embed), s, targets, SoftLoss::Kl, scale, Some((&mut dx, &mut dw)));
    });
    report("head, loss and gradients, one depth", ms, 3.0 * product);
    for (out, inp) in [(576, 1152), (192, 1152), (576, 576), (1536, 576), (576, 1536)] {
        let s = LinearShape { rows: pack.len(), out, inp };
        let (x, w) = (rng.normal(s.rows * inp, 1.0), rng.normal(out * inp, 1.0));
        let (mut y, mut dx, mut dw) =
            (vec![0.0; s.rows * out], vec![0.0; s.rows * inp], vec![0.0; out * inp]);
        let flops = 2.0 * (s.rows * out * inp) as f64;
        report(&format!("linear {inp} to {out}"), time(|| matmul(team, &x, &w, s, &mut y)), flops);
        report("  gradient of the input", time(|| matmul_dx(team, &y, &w, s, false, &mut dx)), flops);
        report("  gradient of the weight", time(|| matmul_dw_acc(team, &y, &x, s, &mut dw)), flops);
    }
    let threads = team.threads;
    let slots: Vec<u32> = (0..pack.len() as u32).collect();
    let shape =
        TttShape { docs: &pack.docs, slots: &slots, heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125 };
    let (q, kv) = (rng.normal(pack.len() * 576, 1.0), rng.normal(pack.len() * 192, 1.0));
    let diagonals = vec![(&kv[..], &kv[..]); 3];
    let inputs = TttInputs { q: &q, k0: &kv, v0: &kv, diagonals: &diagonals };
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; pack.len() * 9]);
    let pairs: f64 = pack.docs.iter().map(|d| f64::from(d.len).powi(2) / 2.0).sum::<f64>() * 9.0 * 64.0 * 2.0;
    let ms = time(|| ttt_attention(threads, shape, inputs, &mut out, &mut lse));
    report("attention, all slots, 3 diagonals", ms, 2.0 * pairs);
    let (mut dq, mut dk0, mut dv0) = (q.clone(), kv.clone(), kv.clone());
    let mut more = vec![(kv.clone(), kv.clone()); 3];
    let ms = time(|| {
        let diagonals = more.iter_mut().map(|(k, v)| (&mut k[..], &mut v[..])).collect();
        let grads = TttGrads { dq: &mut dq, dk0: &mut dk0, dv0: &mut dv0, diagonals };
        ttt_attention_grad(threads, shape, inputs, (&out, &lse), &q, grads);
    });
    report("  its gradient", ms, 5.0 * pairs);
    let (rows, width) = (pack.len(), 1536);
    let (g, mut y) = (rng.normal(rows * width, 1.0), vec![0.0; rows * width]);
    report("gate", time(|| gated(threads, Activation::Silu, &g, &g, g.len(), &mut y)), 0.0);
    let weight = vec![1.0; h];
    report("norm", time(|| rms_norm(threads, &x, &weight, rows, h, 1e-5, &mut y)), 0.0);
    let mut dx = vec![0.0; rows * h];
    let ms = time(|| {
        let n = NormGrad { x: &x, weight: &weight, dy: &x, rows, width: h, eps: 1e-5, accumulate: true };
        rms_norm_grad(threads, n, Some(&mut dx), Some(&mut dw[..h]));
    });
    report("  its gradient", ms, 0.0);
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, or: usize| args.get(i).map_or(or, |a| a.parse().expect("a number"));
    let (threads, ttt_length, steps) = (number(0, 2), number(1, 5), number(2, 3));
    let products = match args.get(3).map(String::as_str) {
        None | Some("f32") => Products::F32,
        Some("bf16") => Products::Bf16,
        Some("bf16x3") => Products::Bf16x3,
        Some(other) => panic!("no products {other}"),
    };
    let cpu = Cpu::new(threads).with_products(products);
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
    let mut method = Eagle3Train::new(cpu, config, options, map, &target, &weights).expect("shapes fit");
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
    println!("{} slots, {trained} trained, TTT {ttt_length}, {threads} threads, {products:?}", pack.len());

    kernel_times(Team { threads, products }, &pack, trained, &embed, &mut rng);

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
