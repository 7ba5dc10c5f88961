//! Decoding through packed weights and a KV cache computes what training computed.

use std::collections::BTreeMap;

use draftsmith_core::VocabMap;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::{Cpu, Kernels, Memory, PackMode, StepMask, TrainKernels, WeightView};
use draftsmith_model::eagle3::{Eagle3Config, Feedback};
use draftsmith_model::tape::Tape;
use draftsmith_model::{CacheAttend, Draft, DraftConfig, Infer, Linear, Ops};
use draftsmith_train::eagle3::{TargetSide, random_weights};
use draftsmith_train::{DraftTensor, Eagle3Options, Eagle3Train, Pack, Rng};

use crate::golden::{Case, Errors};

/// Layer outputs `[depths, H]` and logits `[depths, Vd]` of a draft that starts from slot `slot` of document
/// `doc` and is fed the true tokens.
fn decode(
    config: &Eagle3Config,
    weights: &[DraftTensor],
    embed: &[f32],
    pack: &Pack,
    doc: usize,
    slot: usize,
    depths: usize,
) -> (Vec<f32>, Vec<f32>) {
    let kernels = Cpu::new(1);
    let tensors: BTreeMap<_, _> =
        weights.iter().map(|t| (t.name.clone(), (t.shape.clone(), t.values.clone()))).collect();
    let vocab_map = VocabMap::identity(config.draft_vocab_size);
    let any = DraftConfig::Eagle3(config.clone());
    let Draft::Eagle3(draft) =
        Draft::from_tensors(&kernels, any, &tensors, Some(vocab_map), PackMode::F32, "test").unwrap()
    else {
        panic!("another kind of draft")
    };
    let view = WeightView::f32(embed, config.vocab_size, config.hidden_size);
    let packed = kernels.pack("embed", &view, PackMode::F32).unwrap();
    let table = std::sync::Arc::new(Linear {
        packed,
        out_features: config.vocab_size,
        in_features: config.hidden_size,
    });
    let start = pack.docs[doc].start as usize;
    let end = start + pack.docs[doc].len as usize;
    let token = |t: usize| if start + t < end { pack.ids[start + t] } else { 0 };
    let mut ops = Infer::new(&kernels);
    let mut kv = draft.new_kv(&kernels);
    let scale = 1.0 / (config.head_dim as f32).sqrt();
    let (net, w) = (&draft.network, &draft.weights);

    let width = config.features_width();
    let features = ops.input(&pack.features[start * width..(start + slot + 1) * width], width);
    let mut hidden = net.project(&mut ops, w, &features);
    let (mut outputs, mut logits) = (Vec::new(), Vec::new());
    for depth in 0..depths {
        // Depth 0 is the prefill over all true features; every later depth is one token.
        let (base, rows) = if depth == 0 { (0, slot + 1) } else { (slot + depth, 1) };
        let tokens: Vec<u32> = (base..base + rows).map(|t| token(t + 1)).collect();
        let positions: Vec<u32> = if depth == 0 {
            pack.positions[start..=start + slot].to_vec()
        } else {
            vec![pack.positions[start + slot] + depth as u32]
        };
        let parents: Vec<Option<u32>> = (0..rows as u32).map(|r| r.checked_sub(1)).collect();
        let mask = StepMask::step(base, &parents, None, scale);
        let mut attend = CacheAttend::one(&mut kv, mask, config.head_dim);
        let embedded = ops.embed(&table, &tokens, 1.0);
        let output = net.step(&mut ops, w, &embedded, &hidden, &positions, &mut attend);
        let output = ops.gather(&output, &[rows as u32 - 1]);
        let normed = net.head_input(&mut ops, w, &output);
        let z = net.logits(&mut ops, w, &normed);
        outputs.extend(ops.values(&output));
        logits.extend(ops.values(&z));
        hidden = net.feedback(&output, &normed);
    }
    (outputs, logits)
}

pub(crate) fn check_recorded(case: &Case, errors: &mut Errors) {
    if case.json["infer"].is_null() {
        return;
    }
    let config = case.config();
    let (h, vd) = (config.hidden_size, config.draft_vocab_size);
    let (doc, depths) = (case.number("/infer/batch_row") as usize, case.number("/infer/depths") as usize);
    let (hidden, logits) = (case.floats("infer.hidden"), case.floats("infer.logits"));
    let embed = case.floats("frozen.embed_tokens.weight");
    for (i, slot) in case.ints("infer.slots").into_iter().enumerate() {
        let (found, z) =
            decode(&config, &case.weights(&config), &embed, &case.pack(), doc, slot as usize, depths);
        errors.check("infer hidden", &found, &hidden[i * depths * h..(i + 1) * depths * h], 2e-5, 1e-4);
        errors.check("infer logits", &z, &logits[i * depths * vd..(i + 1) * depths * vd], 2e-5, 1e-4);
    }
}

/// A draft of odd shapes with random weights, and a pack of random rows.
pub(crate) struct Random {
    pub(crate) config: Eagle3Config,
    pub(crate) weights: Vec<DraftTensor>,
    pub(crate) embed: Vec<f32>,
    pub(crate) head: Vec<f32>,
    pub(crate) vocab_map: VocabMap,
    pub(crate) rows: Vec<CaptureRow>,
}

impl Random {
    pub(crate) fn new(seed: u64, lengths: &[usize]) -> Random {
        let text = r#"{"vocab_size": 90, "draft_vocab_size": 40, "hidden_size": 48, "target_hidden_size": 32,
            "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.12}"#;
        let config = Eagle3Config::from_json(text).unwrap();
        let weights = random_weights(&config, seed);
        let mut rng = Rng::new(seed, &[1]);
        let ht = config.target_hidden_size;
        let embed = rng.normal(config.vocab_size * config.hidden_size, 1.0);
        let head = rng.normal(config.vocab_size * ht, 0.4);
        let ids: Vec<u32> = (0..40).map(|i| i * 2 + 3).collect();
        let vocab_map = VocabMap::from_target_ids(&ids, config.vocab_size).unwrap();
        let rows = lengths
            .iter()
            .map(|len| CaptureRow {
                ids: (0..*len).map(|_| rng.below(90) as u32).collect(),
                loss_mask: (0..*len).map(|t| t * 3 / len != 1).collect(),
                features: rng.normal(len * config.features_width(), 1.0),
                last: rng.normal(len * ht, 1.0),
            })
            .collect();
        Random { config, weights, embed, head, vocab_map, rows }
    }
    pub(crate) fn target(&self) -> TargetSide<'_> {
        TargetSide { embed: &self.embed, head: Some(&self.head) }
    }
    pub(crate) fn pack(&self) -> Pack {
        let mut pack = Pack::default();
        for (i, row) in self.rows.iter().enumerate() {
            pack.push(
                i as u64,
                row,
                usize::MAX,
                self.config.features_width(),
                self.config.target_hidden_size,
            )
            .unwrap();
        }
        pack
    }
    pub(crate) fn method(&self, threads: usize, options: Eagle3Options) -> Eagle3Train<Cpu> {
        self.method_on(Cpu::new(threads), options)
    }
    pub(crate) fn method_on<K: TrainKernels>(&self, kernels: K, options: Eagle3Options) -> Eagle3Train<K> {
        let (config, map) = (self.config.clone(), self.vocab_map.clone());
        Eagle3Train::new(kernels, config, options, map, &self.target(), &self.weights).unwrap()
    }
}

#[test]
fn every_slot_of_step_k_equals_decoding_at_depth_k() {
    for feedback in [Feedback::PreNorm, Feedback::PostNorm] {
        let mut random = Random::new(5, &[1, 19, 8]);
        random.config.feedback = feedback;
        let pack = random.pack();
        let steps = 5;
        let mut method = random.method(2, Eagle3Options { ttt_length: steps, ..Eagle3Options::default() });
        let (_, trace) = method.trace(&pack).unwrap();
        let (h, vd) = (random.config.hidden_size, random.config.draft_vocab_size);
        let mut errors = Errors::default();
        for (doc, span) in pack.docs.iter().enumerate() {
            for slot in 0..span.len as usize {
                let depths = steps.min(span.len as usize - slot);
                let (hidden, logits) =
                    decode(&random.config, &random.weights, &random.embed, &pack, doc, slot, depths);
                for k in 0..depths {
                    let at = span.start as usize + slot;
                    let (found, wanted) =
                        (&hidden[k * h..(k + 1) * h], &trace.hidden[k].1[at * h..(at + 1) * h]);
                    errors.check("hidden", found, wanted, 2e-5, 1e-4);
                    let (found, wanted) =
                        (&logits[k * vd..(k + 1) * vd], &trace.logits[k][at * vd..(at + 1) * vd]);
                    errors.check("logits", found, wanted, 2e-5, 1e-4);
                }
            }
        }
    }
}

#[test]
fn the_tape_and_the_packed_weights_agree_on_every_operation() {
    let kernels = Cpu::new(2);
    let mut rng = Rng::new(9, &[]);
    let (x, w, n) = (rng.normal(7 * 24, 1.0), rng.normal(10 * 24, 0.3), rng.normal(24, 1.0));
    let mut tape = Tape::new(kernels.clone());
    let (wt, nt) = (tape.add_param("w", &[10, 24], &w, true), tape.add_param("n", &[24], &n, true));
    let xt = tape.input(&x, 7, 24);
    let normed = tape.rms_norm(&xt, &nt, 1e-5);
    let y = tape.linear(&normed, &wt, None);
    let mut ops = Infer::new(&kernels);
    let packed = kernels.pack("w", &WeightView::f32(&w, 10, 24), PackMode::F32).unwrap();
    let wi = std::sync::Arc::new(Linear { packed, out_features: 10, in_features: 24 });
    let xi = ops.input(&x, 24);
    let ni = ops.rms_norm(&xi, &std::sync::Arc::new(kernels.upload(&n)), 1e-5);
    let yi = ops.linear(&ni, &wi, None);
    Errors::default().check("y", &tape.values(y), &ops.values(&yi), 1e-5, 1e-5);
}
