//! Block drafts and P-EAGLE against difference quotients, and against themselves.

use draftsmith_core::VocabMap;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Cpu;
use draftsmith_model::block::BlockConfig;
use draftsmith_model::peagle::PEagleConfig;
use draftsmith_model::tape::ParamId;
use draftsmith_train::block::{DpaceKind, random_weights};
use draftsmith_train::eagle3::TargetSide;
use draftsmith_train::peagle::{self, Thinning};
use draftsmith_train::{
    BlockLoss, BlockOptions, BlockTrain, DraftTensor, Method, Mode, PEagleOptions, PEagleTrain, Pack, Rng,
};
use serde_json::{Value, json};

pub(crate) const VOCAB: usize = 90;
pub(crate) const WIDTH: usize = 24;

/// Layers, a window and heads of odd shapes; `more` goes into `dflash_config`.
pub(crate) fn block_value(more: &Value, draft_vocab: usize) -> Value {
    let mut nested = json!({"mask_token_id": 89, "target_layer_ids": [0, 2, 3]});
    nested.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "vocab_size": VOCAB,
        "draft_vocab_size": draft_vocab, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "block_size": 5, "initializer_range": 0.12,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": true, "sliding_window": 7, "dflash_config": nested
    })
}

/// A DSpark head of a kind.
pub(crate) fn spark(kind: &str, confidence: bool, with_markov: bool) -> Value {
    json!({"projector_type": "dspark", "markov_rank": 6, "markov_head_type": kind,
        "enable_confidence_head": confidence, "confidence_head_with_markov": with_markov})
}

pub(crate) fn peagle_value() -> Value {
    json!({
        "architectures": ["PEagleDraftModel"], "model_type": "llama", "vocab_size": VOCAB, "draft_vocab_size": 40,
        "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "initializer_range": 0.12, "pard_token": 89, "num_depths": 4
    })
}

/// Every second id from 3 on, or all.
pub(crate) fn vocab_map(draft_vocab: usize) -> VocabMap {
    let ids: Vec<u32> = (0..draft_vocab as u32).map(|i| i * 2 + 3).collect();
    match draft_vocab {
        VOCAB => VocabMap::identity(VOCAB),
        _ => VocabMap::from_target_ids(&ids, VOCAB).unwrap(),
    }
}

/// Rows of random tokens and states.
pub(crate) fn pack(seed: u64, lengths: &[usize], captured: usize) -> Pack {
    let mut rng = Rng::new(seed, &[7]);
    let mut pack = Pack::default();
    for (i, len) in lengths.iter().enumerate() {
        let row = CaptureRow {
            ids: (0..*len).map(|_| rng.below(VOCAB as u64 - 1) as u32).collect(),
            loss_mask: (0..*len).map(|t| t * 3 / len != 1).collect(),
            features: rng.normal(len * captured * WIDTH, 1.0),
            last: rng.normal(len * WIDTH, 1.0),
        };
        pack.push(i as u64, &row, usize::MAX, captured * WIDTH, WIDTH).unwrap();
    }
    pack
}

/// Embedding and head of a target.
pub(crate) fn target() -> [Vec<f32>; 2] {
    let mut rng = Rng::new(3, &[1]);
    [rng.normal(VOCAB * WIDTH, 1.0), rng.normal(VOCAB * WIDTH, 0.4)]
}

/// Norms and biases that are not what they start as.
pub(crate) fn shaken(mut weights: Vec<DraftTensor>) -> Vec<DraftTensor> {
    for (i, t) in weights.iter_mut().enumerate().filter(|(_, t)| t.shape.len() == 1) {
        let noise = Rng::new(11, &[i as u64]).normal(t.values.len(), 0.2);
        t.values.iter_mut().zip(noise).for_each(|(x, n)| *x += n);
    }
    weights
}

pub(crate) fn block(threads: usize, value: &Value, loss: BlockLoss) -> BlockTrain<Cpu> {
    let config = BlockConfig::from_value(value).unwrap();
    let [embed, head] = target();
    let weights = shaken(random_weights(&config, 5));
    let map = vocab_map(config.draft_vocab_size);
    let options = BlockOptions { num_anchors: 6, loss, seed: 2 };
    let side = TargetSide { embed: &embed, head: Some(&head) };
    BlockTrain::new(Cpu::new(threads), config, options, map, &side, &weights).unwrap()
}

pub(crate) fn peagle(threads: usize) -> PEagleTrain<Cpu> {
    let config = PEagleConfig::from_value(&peagle_value()).unwrap();
    let [embed, head] = target();
    let weights = shaken(peagle::random_weights(&config, &embed, 5));
    let thinning = Thinning { num_depths: 4, ratio: 0.8, least: 0.2 };
    let options = PEagleOptions { thinning, seed: 2 };
    PEagleTrain::new(Cpu::new(threads), config, options, vocab_map(40), &head, &weights).unwrap()
}

/// Compares gradients of all parameters, along one direction for each, with the difference quotient of the loss.
#[track_caller]
fn check_quotients<M: Method>(mut method: M, pack: &Pack, skip: &[&str]) {
    method.micro_batch(pack, Mode::Train).unwrap();
    let ids = method.tape().trained();
    let mut compared = 0;
    for (i, id) in ids.into_iter().enumerate() {
        let name = method.tape().param(id).name.clone();
        if skip.iter().any(|s| name.contains(s)) {
            continue;
        }
        let (grad, at) = (method.tape().grad_values(id).unwrap(), method.tape().param_values(id));
        let direction = Rng::new(21, &[i as u64]).normal(at.len(), 1.0);
        let scale = at.iter().map(|x| x * x).sum::<f32>().sqrt() / (at.len() as f32).sqrt();
        let h = 5e-3 * scale.max(0.1);
        let loss_at = |method: &mut M, sign: f32, id: ParamId| -> f64 {
            let moved: Vec<f32> = at.iter().zip(&direction).map(|(x, d)| x + sign * h * d).collect();
            method.tape_mut().set_param(id, &moved);
            method.micro_batch(pack, Mode::Evaluate).unwrap().loss
        };
        let wanted = (loss_at(&mut method, 1.0, id) - loss_at(&mut method, -1.0, id)) / (2.0 * f64::from(h));
        method.tape_mut().set_param(id, &at);
        let found: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.0, "`{name}` has a gradient");
        assert!(
            (found - wanted).abs() <= 2e-2 * norm.max(0.25),
            "`{name}`: {found}, quotient {wanted}, norm {norm}"
        );
        compared += 1;
    }
    assert!(compared > 20);
}

#[test]
fn gradients_of_a_block_are_the_difference_quotients() {
    let pack = pack(1, &[26, 9, 14], 3);
    for draft_vocab in [VOCAB, 40] {
        let value = block_value(&json!({}), draft_vocab);
        check_quotients(block(2, &value, BlockLoss::Tokens { gamma: Some(3.0) }), &pack, &[]);
    }
}

#[test]
fn gradients_of_every_markov_head_are_the_difference_quotients() {
    let pack = pack(2, &[26, 9, 14], 3);
    for kind in ["vanilla", "gated", "rnn"] {
        for draft_vocab in [VOCAB, 40] {
            // The confidence takes the acceptance as given, so its part has no quotient here.
            let value = block_value(&spark(kind, true, true), draft_vocab);
            let loss = BlockLoss::Spark { gamma: Some(4.0), ce: 0.6, l1: 0.4, confidence: 0.0 };
            check_quotients(block(2, &value, loss), &pack, &["confidence"]);
        }
    }
}

#[test]
fn gradients_of_the_confidence_are_the_difference_quotients() {
    let pack = pack(2, &[26, 9, 14], 3);
    let value = block_value(&spark("gated", true, true), VOCAB);
    let loss = BlockLoss::Spark { gamma: None, ce: 0.0, l1: 0.0, confidence: 1.0 };
    let mut method = block(2, &value, loss);
    method.micro_batch(&pack, Mode::Train).unwrap();
    let id = method
        .tape()
        .trained()
        .into_iter()
        .find(|id| method.tape().param(*id).name == "confidence_head.proj.bias");
    let (id, h) = (id.unwrap(), 1e-2);
    let (grad, at) = (method.tape().grad_values(id).unwrap()[0], method.tape().param_values(id)[0]);
    let mut loss_at = |x: f32| {
        method.tape_mut().set_param(id, &[x]);
        method.micro_batch(&pack, Mode::Evaluate).unwrap().loss
    };
    let wanted = (loss_at(at + h) - loss_at(at - h)) / (2.0 * f64::from(h));
    assert!((f64::from(grad) - wanted).abs() < 1e-3 * (1.0 + wanted.abs()), "{grad} {wanted}");
}

#[test]
fn gradients_of_rollouts_are_the_difference_quotients() {
    check_quotients(peagle(2), &pack(4, &[26, 9, 14], 3), &[]);
}

/// Loss, weight and all gradients.
fn step<M: Method>(method: &mut M, packs: &[Pack]) -> (f64, f64, Vec<f32>) {
    let (mut loss, mut weight) = (0.0, 0.0);
    for pack in packs {
        let stats = method.micro_batch(pack, Mode::Train).unwrap();
        (loss, weight) = (loss + stats.loss, weight + stats.weight);
    }
    let tape = method.tape();
    let grads = tape.trained().into_iter().flat_map(|id| tape.grad_values(id).unwrap()).collect();
    (loss, weight, grads)
}

#[track_caller]
fn check_packing<M: Method>(mut make: impl FnMut(usize) -> M) {
    let whole = pack(6, &[26, 9, 14], 3);
    // The same rows one by one.
    let mut single: Vec<Pack> = Vec::new();
    let width = 3 * WIDTH;
    for (doc, row) in whole.docs.iter().zip(&whole.rows) {
        let slots = doc.start as usize..doc.end();
        single.push(Pack {
            docs: vec![draftsmith_kernels::train::DocSpan { start: 0, len: doc.len }],
            rows: vec![*row],
            ids: whole.ids[slots.clone()].to_vec(),
            loss_mask: whole.loss_mask[slots.clone()].to_vec(),
            positions: whole.positions[slots.clone()].to_vec(),
            features: whole.features[slots.start * width..slots.end * width].to_vec(),
            last: whole.last[slots.start * WIDTH..slots.end * WIDTH].to_vec(),
            ..Pack::default()
        });
    }
    let together = step(&mut make(1), std::slice::from_ref(&whole));
    assert_eq!(step(&mut make(2), std::slice::from_ref(&whole)), together, "threads do not matter");
    let apart = step(&mut make(2), &single);
    assert!((apart.0 - together.0).abs() < 1e-4 * together.0.abs() && apart.1 == together.1);
    let top = together.2.iter().fold(0.0f32, |a, g| a.max(g.abs()));
    for (a, t) in apart.2.iter().zip(&together.2) {
        assert!((a - t).abs() <= 1e-4 * top, "{a} {t}");
    }
}

#[test]
fn rows_of_a_pack_are_each_the_row_alone_and_threads_do_not_matter() {
    let losses = [
        (json!({}), BlockLoss::Tokens { gamma: Some(7.0) }),
        (json!({}), BlockLoss::Dpace { kind: DpaceKind::Continuation, alpha: 0.5 }),
        (spark("rnn", true, true), BlockLoss::Spark { gamma: Some(4.0), ce: 0.1, l1: 0.9, confidence: 1.0 }),
    ];
    for (more, loss) in losses {
        for draft_vocab in [VOCAB, 40] {
            check_packing(|threads| block(threads, &block_value(&more, draft_vocab), loss));
        }
    }
    check_packing(peagle);
}

/// Length of the gradient of one row of the embedding, with this padding.
fn embedding_gradient(pad: Option<u32>, row: usize) -> f32 {
    let mut value = peagle_value();
    value["pad_token_id"] = json!(pad);
    let config = PEagleConfig::from_value(&value).unwrap();
    let [embed, head] = target();
    let weights = peagle::random_weights(&config, &embed, 5);
    let options = PEagleOptions { thinning: Thinning { num_depths: 4, ratio: 0.8, least: 0.2 }, seed: 2 };
    let mut method = PEagleTrain::new(Cpu::new(1), config, options, vocab_map(40), &head, &weights).unwrap();
    let pack = pack(4, &[26, 9, 14], 3);
    method.micro_batch(&pack, Mode::Train).unwrap();
    let tape = method.tape();
    let id = tape.trained().into_iter().find(|id| tape.param(*id).name == "embed_tokens.weight").unwrap();
    let grad = tape.grad_values(id).unwrap();
    grad[row * WIDTH..(row + 1) * WIDTH].iter().map(|g| g * g).sum::<f32>().sqrt()
}

#[test]
fn padding_is_not_learnt_unless_it_is_the_mask_token() {
    let seen = pack(4, &[26, 9, 14], 3).ids[2];
    let (mask, token) = (89, seen as usize);
    assert!(embedding_gradient(None, mask) > 0.0 && embedding_gradient(None, token) > 0.0);
    assert_eq!(embedding_gradient(Some(seen), token), 0.0);
    assert_eq!(embedding_gradient(Some(seen), mask), embedding_gradient(None, mask));
    assert_eq!(embedding_gradient(Some(mask as u32), mask), embedding_gradient(None, mask));
}

#[test]
fn a_pack_without_trained_slots_has_no_loss_and_no_gradient() {
    let mut nothing = pack(6, &[12], 3);
    nothing.loss_mask.fill(false);
    let mut method = block(1, &block_value(&json!({}), VOCAB), BlockLoss::Tokens { gamma: None });
    let stats = method.micro_batch(&nothing, Mode::Train).unwrap();
    assert_eq!((stats.loss, stats.weight, method.tape().grad_norm()), (0.0, 0.0, 0.0));
    let mut method = peagle(1);
    let stats = method.micro_batch(&nothing, Mode::Train).unwrap();
    assert_eq!((stats.loss, stats.weight, method.tape().grad_norm()), (0.0, 0.0, 0.0));
}
