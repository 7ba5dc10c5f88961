//! Decoding a block through packed weights and caches computes what training computed at the same slot.

use std::sync::Arc;

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::{Cpu, Kernels, PackMode, TrainKernels, WeightView};
use draftsmith_model::block::BlockConfig;
use draftsmith_model::peagle::{PEagleConfig, PEaglePart};
use draftsmith_model::{Draft, DraftConfig, DraftTensors, Infer, Linear, Ops};
use draftsmith_train::block::random_weights;
use draftsmith_train::eagle3::TargetSide;
use draftsmith_train::peagle::{self, Element, Thinning};
use draftsmith_train::{BlockLoss, BlockOptions, BlockTrain, DraftTensor, PEagleOptions, PEagleTrain};
use serde_json::{Value, json};

use crate::blocks::{VOCAB, WIDTH, block_value, pack, peagle_value, shaken, spark, target, vocab_map};
use crate::golden::Errors;

fn tensors(weights: &[DraftTensor]) -> DraftTensors {
    weights.iter().map(|t| (t.name.clone(), (t.shape.clone(), t.values.clone()))).collect()
}

fn linear<K: Kernels>(kernels: &K, values: &[f32], width: usize) -> Arc<Linear<K::Packed>> {
    let view = WeightView::f32(values, values.len() / width, width);
    let packed = kernels.pack("test", &view, PackMode::F32).unwrap();
    Arc::new(Linear { packed, out_features: values.len() / width, in_features: width })
}

#[track_caller]
fn check_block<K: TrainKernels + Kernels + Clone>(kernels: &K, value: &Value, loss: BlockLoss) {
    let config = BlockConfig::from_value(value).unwrap();
    let [embed, head] = target();
    let weights = shaken(random_weights(&config, 5));
    let options = BlockOptions { num_anchors: 9, loss, seed: 2 };
    let side = TargetSide { embed: &embed, head: Some(&head) };
    let map = vocab_map(config.draft_vocab_size);
    let mut method =
        BlockTrain::new(kernels.clone(), config.clone(), options, map.clone(), &side, &weights).unwrap();
    let pack = pack(8, &[23, 11], 3);
    let anchors = method.anchors(&pack);
    let (_, trace) = method.trace(&pack, &anchors).unwrap();

    let draft = Draft::from_tensors(
        kernels,
        DraftConfig::Block(config.clone()),
        &tensors(&weights),
        (!map.is_identity()).then_some(map.clone()),
        PackMode::F32,
        "test",
    );
    let Draft::Block(draft) = draft.unwrap() else { panic!("a block draft") };
    let table = linear(kernels, &embed, WIDTH);
    let rows: Vec<f32> = map
        .target_ids()
        .iter()
        .flat_map(|id| &head[*id as usize * WIDTH..(*id as usize + 1) * WIDTH])
        .copied()
        .collect();
    let part = linear(kernels, &rows, WIDTH);
    let mut ops = Infer::new(kernels);
    let mut errors = Errors::default();
    let (size, width) = (config.block_size, config.features_width());
    let blocks: Vec<(usize, u32)> = anchors
        .iter()
        .enumerate()
        .flat_map(|(doc, anchors)| anchors.iter().map(move |anchor| (doc, *anchor)))
        .collect();
    assert!(blocks.len() > 8);
    for (number, (doc, anchor)) in blocks.iter().enumerate() {
        let start = pack.docs[*doc].start;
        let mut kv = draft.new_kv(kernels);
        // As a prompt and a step would bring them.
        let middle = start + (anchor - start) / 2;
        for (from, to) in [(start, middle), (middle, *anchor)].into_iter().filter(|(from, to)| from < to) {
            let features = ops.input(&pack.features[from as usize * width..to as usize * width], width);
            draft.take_in(kernels, &features, &mut [(&mut kv, (to - from) as usize)]);
        }
        let tokens = draft.block_tokens(pack.ids[*anchor as usize]);
        // Twice: nothing of a block stays behind.
        for _ in 0..2 {
            let embedded = ops.embed(&table, &tokens, 1.0);
            let output = draft.run(kernels, embedded, &mut [&mut kv]);
            let wanted = &trace.hidden[number * size * WIDTH..(number + 1) * size * WIDTH];
            errors.check("hidden", &ops.values(&output), wanted, 2e-5, 1e-4);
            let logits = ops.linear(&output, &part, None);
            let vocab = config.draft_vocab_size;
            let wanted = &trace.base_logits[number * size * vocab..(number + 1) * size * vocab];
            errors.check("logits", &ops.values(&logits), wanted, 4e-5, 1e-4);
            let Some(w) = &draft.weights.markov else { continue };
            let rank = config.markov().unwrap().rank;
            let mut state = None;
            // Slot by slot, as decoding goes.
            for slot in 0..size {
                let Some(at) = trace.rows.iter().position(|r| r.block == number && r.slot == slot) else {
                    break;
                };
                let token = pack.ids[trace.rows[at].label_slot as usize - 1];
                let z = ops.gather(&output, &[slot as u32]);
                let before = draft.network.before(&mut ops, w, &[token]);
                let (correction, next) = draft.network.correction(&mut ops, w, &z, &before, state);
                state = next;
                let wanted = &trace.correction[at * rank..(at + 1) * rank];
                errors.check("correction", &ops.values(&correction), wanted, 2e-5, 1e-4);
                let Some(head) = &draft.weights.confidence else { continue };
                let found = draft.network.confidence(&mut ops, head, &z, Some(&before));
                errors.check("confidence", &ops.values(&found), &trace.confidence[at..=at], 2e-5, 1e-4);
            }
        }
    }
}

#[test]
fn every_slot_of_a_block_equals_decoding_it() {
    let gpu = Gpu::new(Accelerator::flex(), GpuOptions::default());
    let spark_loss = BlockLoss::Spark { gamma: Some(4.0), ce: 0.1, l1: 0.9, confidence: 1.0 };
    for (more, loss) in [
        (json!({}), BlockLoss::Tokens { gamma: Some(7.0) }),
        (spark("vanilla", true, true), spark_loss),
        (spark("gated", true, false), spark_loss),
        (spark("rnn", true, true), spark_loss),
    ] {
        for draft_vocab in [VOCAB, 40] {
            let value = block_value(&more, draft_vocab);
            check_block(&Cpu::new(2), &value, loss);
            check_block(&gpu, &value, loss);
        }
    }
}

#[track_caller]
fn check_rollouts<K: TrainKernels + Kernels + Clone>(kernels: &K) {
    let config = PEagleConfig::from_value(&peagle_value()).unwrap();
    let [embed, head] = target();
    let weights = shaken(peagle::random_weights(&config, &embed, 5));
    let thinning = Thinning { num_depths: 4, ratio: 1.0, least: 0.2 };
    let options = PEagleOptions { thinning, seed: 2 };
    let map = vocab_map(40);
    let mut method =
        PEagleTrain::new(kernels.clone(), config.clone(), options, map.clone(), &head, &weights).unwrap();
    let pack = pack(8, &[23, 11], 3);
    let (_, trace) = method.trace(&pack, &method.rollouts(&pack)).unwrap();
    let draft = Draft::from_tensors(
        kernels,
        DraftConfig::PEagle(config.clone()),
        &tensors(&weights),
        Some(map),
        PackMode::F32,
        "test",
    );
    let Draft::PEagle(draft) = draft.unwrap() else { panic!("a P-EAGLE draft") };
    let mut ops = Infer::new(kernels);
    let mut errors = Errors::default();
    let width = config.features_width();
    let mut compared = 0;
    for doc in &pack.docs {
        for anchor in doc.start..doc.end() as u32 - 1 {
            let mut kv = draft.new_kv(kernels);
            let next = |from: u32, to: u32| &pack.ids[from as usize + 1..to as usize + 1];
            let features = |from: u32, to: u32, ops: &Infer<'_, K>| {
                ops.input(&pack.features[from as usize * width..to as usize * width], width)
            };
            let middle = doc.start + (anchor - doc.start) / 2;
            if middle > doc.start {
                let part = PEaglePart { kv: &mut kv, next_tokens: next(doc.start, middle), unknown: 0 };
                draft.run(kernels, &features(doc.start, middle, &ops), &mut [part]);
            }
            let real = (anchor + 1 - middle) as usize;
            let part = PEaglePart { kv: &mut kv, next_tokens: next(middle, anchor + 1), unknown: 3 };
            let output = draft.run(kernels, &features(middle, anchor + 1, &ops), &mut [part]);
            assert_eq!(kv.len() as u32, anchor + 1 - doc.start);
            let head_input = draft.network.head_input(&mut ops, &draft.weights, &output);
            let logits = draft.network.logits(&mut ops, &draft.weights, &head_input);
            let (hidden, logits) = (ops.values(&output), ops.values(&logits));
            for depth in 0..4 {
                let element = Element { anchor, depth };
                let Some(at) = trace.elements.iter().position(|e| *e == element) else { continue };
                let row = real - 1 + depth as usize;
                let part = |v: &[f32], i: usize, w: usize| v[i * w..(i + 1) * w].to_vec();
                errors.check(
                    "hidden",
                    &part(&hidden, row, WIDTH),
                    &part(&trace.hidden, at, WIDTH),
                    2e-5,
                    1e-4,
                );
                errors.check("logits", &part(&logits, row, 40), &part(&trace.logits, at, 40), 4e-5, 1e-4);
                compared += 1;
            }
        }
    }
    assert!(compared > 60);
}

#[test]
fn every_entry_of_a_rollout_equals_decoding_it() {
    check_rollouts(&Cpu::new(2));
    check_rollouts(&Gpu::new(Accelerator::flex(), GpuOptions::default()));
}
