//! Learning from rejections: gradients, devices, and what a run with it leaves.

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::block::BlockConfig;
use draftsmith_model::peagle::PEagleConfig;
use draftsmith_train::block::{DpaceKind, random_weights};
use draftsmith_train::eagle3::TargetSide;
use draftsmith_train::peagle::{self, Element, Thinning};
use draftsmith_train::{
    BatchStats, BlockLoss, BlockOptions, BlockTrain, Eagle3Options, Eagle3Train, End, Method, Mode,
    PEagleOptions, PEagleTrain, Pack, Rejected, walk,
};
use serde_json::{Value, json};

use crate::blocks::{block_value, pack, peagle_value, shaken, spark, target, vocab_map};
use crate::infer::Random;

fn eagle3<K: TrainKernels>(kernels: K) -> (Eagle3Train<K>, Pack) {
    let random = Random::new(5, &[31, 19, 8]);
    let options = Eagle3Options { ttt_length: 4, ..Eagle3Options::default() };
    let (config, map) = (random.config.clone(), random.vocab_map.clone());
    let method = Eagle3Train::new(kernels, config, options, map, &random.target(), &random.weights).unwrap();
    (method, random.pack())
}

fn block<K: TrainKernels>(kernels: K, value: &Value, loss: BlockLoss) -> (BlockTrain<K>, Pack) {
    let config = BlockConfig::from_value(value).unwrap();
    let [embed, head] = target();
    let weights = shaken(random_weights(&config, 5));
    let map = vocab_map(config.draft_vocab_size);
    let options = BlockOptions { num_anchors: 9, loss, seed: 2 };
    let side = TargetSide { embed: &embed, head: Some(&head) };
    let method = BlockTrain::new(kernels, config, options, map, &side, &weights).unwrap();
    (method, pack(8, &[31, 19, 8], 3))
}

fn p_eagle<K: TrainKernels>(kernels: K) -> (PEagleTrain<K>, Pack) {
    let config = PEagleConfig::from_value(&peagle_value()).unwrap();
    let [embed, head] = target();
    let weights = shaken(peagle::random_weights(&config, &embed, 5));
    let options = PEagleOptions { thinning: Thinning { num_depths: 4, ratio: 0.8, least: 0.2 }, seed: 2 };
    let method = PEagleTrain::new(kernels, config, options, vocab_map(40), &head, &weights).unwrap();
    (method, pack(4, &[31, 19, 8], 3))
}

fn gradients<M: Method>(method: &mut M) -> Vec<(String, Vec<f32>)> {
    let tape = method.tape();
    let of = |id| (tape.param(id).name.clone(), tape.grad_values(id).unwrap());
    let all = tape.trained().into_iter().map(of).collect();
    method.tape_mut().clear_grads();
    all
}

#[track_caller]
fn compare(found: &[(String, Vec<f32>)], wanted: &[(String, Vec<f32>)], tolerance: f32) {
    for ((name, found), (_, wanted)) in found.iter().zip(wanted) {
        let top = wanted.iter().fold(1e-6f32, |a, g| a.max(g.abs()));
        for (f, w) in found.iter().zip(wanted) {
            assert!((f - w).abs() <= tolerance * top, "`{name}`: {f} {w} of {top}");
        }
    }
}

/// The positions of an ordinary step, replayed depth by depth, have its gradients.
#[track_caller]
fn check_whole<M: Method>((mut method, pack): (M, Pack), at: &[Rejected], weight: impl Fn(u32) -> f64) {
    let whole = method.micro_batch(&pack, Mode::Train).unwrap();
    let wanted = gradients(&mut method);
    let mut sum = BatchStats::default();
    let deepest = at.iter().map(|r| r.depth).max().unwrap();
    assert!(deepest > 1);
    for depth in 0..=deepest {
        let mut here: Vec<Rejected> = at.iter().copied().filter(|r| r.depth == depth).collect();
        here.sort_unstable();
        let coefficients = weight(depth) * whole.depths[depth as usize].trained as f64;
        let found = method.replays().unwrap().replay(&pack, &here, coefficients).unwrap();
        assert!((found.coefficients - coefficients).abs() < 1e-5 * coefficients);
        sum.add(&found);
    }
    assert!((sum.coefficients - whole.coefficients).abs() < 1e-5 * whole.coefficients);
    assert!((sum.loss - whole.loss).abs() < 1e-5 * whole.loss.abs(), "{} {}", sum.loss, whole.loss);
    compare(&gradients(&mut method), &wanted, 2e-4);
}

#[test]
fn replaying_every_slot_is_an_ordinary_step() {
    let (mut method, pack) = eagle3(Cpu::new(2));
    let (_, trace) = method.trace(&pack).unwrap();
    let taught: Vec<u32> = trace.teacher_slots.clone();
    let mut at = Vec::new();
    for doc in &pack.docs {
        for slot in doc.start..doc.start + doc.len {
            let depths = (0..4).filter(|k| slot + k < doc.start + doc.len && taught.contains(&(slot + k)));
            at.extend(depths.map(|depth| Rejected { anchor: slot + 1, depth }));
        }
    }
    check_whole((method, pack), &at, |depth| 0.8f64.powi(depth as i32));

    let (method, pack) = p_eagle(Cpu::new(2));
    let real = (0..pack.len() as u32).map(|anchor| Element { anchor, depth: 0 });
    let at: Vec<Rejected> = real
        .chain(method.rollouts(&pack))
        .map(|e| Rejected { anchor: e.anchor + 1, depth: e.depth })
        .collect();
    check_taught(method, &pack, &at);
}

/// As [`check_whole`], of the entries that have a teacher.
#[track_caller]
fn check_taught(mut method: PEagleTrain<Cpu>, pack: &Pack, at: &[Rejected]) {
    let rollouts = method.rollouts(pack);
    let (_, trace) = method.trace(pack, &rollouts).unwrap();
    let taught = |r: &&Rejected| {
        let slot = (r.anchor - 1 + r.depth) as usize;
        trace.teacher_rows.get(slot).is_some_and(|row| *row != u32::MAX)
    };
    let at: Vec<Rejected> = at.iter().filter(taught).copied().collect();
    check_whole((method, pack.clone()), &at, |_| 1.0);
}

#[test]
fn replaying_every_slot_of_blocks_is_an_ordinary_step() {
    let tokens = BlockLoss::Tokens { gamma: Some(3.0) };
    let sparked = BlockLoss::Spark { gamma: Some(4.0), ce: 0.6, l1: 0.4, confidence: 0.0 };
    for draft_vocab in [90, 40] {
        let cases = [
            (json!({}), tokens, 1, 3.0),
            (spark("vanilla", true, true), sparked, 0, 4.0),
            (spark("gated", false, false), sparked, 0, 4.0),
            (spark("rnn", true, true), sparked, 0, 4.0),
        ];
        for (more, loss, first, gamma) in cases {
            let (mut method, pack) = block(Cpu::new(2), &block_value(&more, draft_vocab), loss);
            let anchors = method.anchors(&pack);
            let flat: Vec<u32> = anchors.iter().flatten().copied().collect();
            let (_, trace) = method.trace(&pack, &anchors).unwrap();
            let of = |r: &draftsmith_train::block::LossRow| Rejected {
                anchor: flat[r.block],
                depth: (r.slot - first) as u32,
            };
            let at: Vec<Rejected> = trace.rows.iter().map(of).collect();
            check_whole((method, pack), &at, |depth| (-f64::from(depth) / gamma).exp());
        }
    }
}

#[test]
fn a_replay_leaves_the_confidence_alone_and_weighs_dpace_as_tokens() {
    let loss = BlockLoss::Spark { gamma: Some(4.0), ce: 0.6, l1: 0.4, confidence: 1.0 };
    let (mut method, pack) = block(Cpu::new(2), &block_value(&spark("vanilla", true, true), 40), loss);
    let rejected = rejections(&mut method, &pack);
    method.replays().unwrap().replay(&pack, &rejected, 5.0).unwrap();
    for (name, grad) in gradients(&mut method) {
        let quiet = grad.iter().all(|g| *g == 0.0);
        assert_eq!(quiet, name.contains("confidence"), "`{name}`");
    }

    let value = block_value(&json!({}), 90);
    let dpace = BlockLoss::Dpace { kind: DpaceKind::Full, alpha: 0.5 };
    let mut both = Vec::new();
    for loss in [dpace, BlockLoss::Tokens { gamma: None }] {
        let (mut method, pack) = block(Cpu::new(2), &value, loss);
        let rejected = rejections(&mut method, &pack);
        let found = method.replays().unwrap().replay(&pack, &rejected, 5.0).unwrap();
        assert!((found.coefficients - 5.0).abs() < 1e-4);
        both.push(gradients(&mut method));
    }
    assert!(both[0] == both[1]);
}

/// Rejected positions of the walk.
fn rejections<M: Method>(method: &mut M, pack: &Pack) -> Vec<Rejected> {
    let proposed = method.replays().unwrap().propose(pack).unwrap();
    assert!(proposed.windows(2).all(|w| w[0].anchor < w[1].anchor));
    let steps = walk(pack, &proposed);
    let rejected = steps.iter().filter(|p| p.end == End::Rejected);
    rejected.map(|p| Rejected { anchor: p.anchor, depth: p.accepted }).collect()
}

/// Proposals and gradients are the CPU's; what was proposed leaves nothing behind.
#[track_caller]
fn check_devices<A: Method, B: Method>((mut cpu, pack): (A, Pack), (mut gpu, _): (B, Pack)) {
    let before = cpu.micro_batch(&pack, Mode::Train).unwrap();
    let wanted = gradients(&mut cpu);
    let rejected = rejections(&mut cpu, &pack);
    assert!(rejected.len() > 2);
    assert_eq!(rejected, rejections(&mut cpu, &pack));
    assert_eq!(rejected, rejections(&mut gpu, &pack));
    assert_eq!(before, cpu.micro_batch(&pack, Mode::Train).unwrap());
    assert!(gradients(&mut cpu) == wanted, "a step after a look is the step before it");
    let a = cpu.replays().unwrap().replay(&pack, &rejected, 3.0).unwrap();
    let b = gpu.replays().unwrap().replay(&pack, &rejected, 3.0).unwrap();
    assert!((a.loss - b.loss).abs() < 1e-4 * a.loss.abs(), "{} {}", a.loss, b.loss);
    compare(&gradients(&mut gpu), &gradients(&mut cpu), 1e-3);
}

#[test]
fn every_device_finds_the_same_rejections() {
    let flex = || Gpu::new(Accelerator::flex(), GpuOptions::default());
    check_devices(eagle3(Cpu::new(1)), eagle3(flex()));
    check_devices(p_eagle(Cpu::new(1)), p_eagle(flex()));
    let tokens = BlockLoss::Tokens { gamma: Some(3.0) };
    let value = block_value(&json!({}), 40);
    check_devices(block(Cpu::new(1), &value, tokens), block(flex(), &value, tokens));
    let sparked = BlockLoss::Spark { gamma: Some(4.0), ce: 0.6, l1: 0.4, confidence: 1.0 };
    for kind in ["vanilla", "rnn"] {
        let value = block_value(&spark(kind, true, true), 40);
        check_devices(block(Cpu::new(1), &value, sparked), block(flex(), &value, sparked));
    }
}

#[test]
fn rows_without_an_answer_propose_nothing() {
    let check = |method: &mut dyn Method<Kernels = Cpu>, mut pack: Pack| {
        pack.loss_mask.fill(false);
        assert!(method.replays().unwrap().propose(&pack).unwrap().is_empty());
    };
    let (mut method, pack) = eagle3(Cpu::new(1));
    check(&mut method, pack);
    let (mut method, pack) = p_eagle(Cpu::new(1));
    check(&mut method, pack);
    let loss = BlockLoss::Tokens { gamma: None };
    let (mut method, pack) = block(Cpu::new(1), &block_value(&json!({}), 40), loss);
    check(&mut method, pack);
}
