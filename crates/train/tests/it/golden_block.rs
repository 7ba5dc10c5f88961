//! Parity with the reference vectors of `fixtures/golden` (`df_*`, `dspark_*`): what blocks see, forward, losses, metrics,
//! gradients, one optimiser step. Anchors are the recorded ones. Tolerances are those of its README.

use draftsmith_core::VocabMap;
use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::train::DocSpan;
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::DraftSpec;
use draftsmith_model::block::BlockConfig;
use draftsmith_train::block::{BlockTrace, DpaceKind};
use draftsmith_train::eagle3::TargetSide;
use draftsmith_train::{BatchStats, BlockLoss, BlockOptions, BlockTrain, DraftTensor, Mode, Pack};
use serde_json::Value;

use crate::golden::{Case, Errors, check_gradients_and_step, cuda_shim};

impl Case {
    fn block_config(&self) -> BlockConfig {
        BlockConfig::from_value(&self.json["draft_config"]).unwrap()
    }

    fn block_loss(&self) -> BlockLoss {
        let t = &self.json["training"];
        let gamma = t["loss_decay_gamma"].as_f64();
        let dpace = |kind| BlockLoss::Dpace { kind, alpha: t["dpace_alpha"].as_f64().unwrap() };
        match t["loss_type"].as_str().unwrap() {
            "dflash" => BlockLoss::Tokens { gamma },
            "dpace" => dpace(DpaceKind::Full),
            "dpace-cumulative-confidence-only" => dpace(DpaceKind::Confidence),
            "dpace-continuation-value-only" => dpace(DpaceKind::Continuation),
            "dspark" => {
                let factor = |name: &str| t["dspark_alphas"][name].as_f64().unwrap();
                BlockLoss::Spark {
                    gamma,
                    ce: factor("ce"),
                    l1: factor("l1"),
                    confidence: factor("confidence"),
                }
            }
            other => panic!("unknown loss {other}"),
        }
    }

    fn block_method<K: TrainKernels>(&self, kernels: K) -> BlockTrain<K> {
        let config = self.block_config();
        let (embed, head) =
            (self.floats("frozen.embed_tokens.weight"), self.floats("frozen.target_lm_head.weight"));
        let target = TargetSide { embed: &embed, head: Some(&head) };
        let tensor = |(name, shape): (String, Vec<usize>)| {
            assert_eq!(self.shape(&format!("w.{name}")), shape);
            DraftTensor { values: self.floats(&format!("w.{name}")), name, shape }
        };
        let weights: Vec<DraftTensor> = config.tensors().into_iter().map(tensor).collect();
        let map = VocabMap::identity(config.vocab_size);
        let options = BlockOptions { num_anchors: 512, loss: self.block_loss(), seed: 0 };
        BlockTrain::new(kernels, config, options, map, &target, &weights).unwrap()
    }
}

/// A recorded micro-batch: its rows without their padding, and the anchors that are kept.
struct Batch {
    pack: Pack,
    anchors: Vec<Vec<u32>>,
    /// Index among the recorded blocks of each block of the pack.
    recorded: Vec<usize>,
}

fn batch(case: &Case, prefix: &str) -> Batch {
    let config = case.block_config();
    let name = |n: &str| format!("{prefix}{n}");
    let (fw, h) = (config.features_width(), config.layer.hidden_size);
    let shape = case.shape(&name("in.input_ids"));
    let (ids, mask) = (case.ints(&name("in.input_ids")), case.ints(&name("in.loss_mask")));
    let features = case.floats(&name("in.hidden_states"));
    let last = name("in.target_last_hidden_states");
    let last = if case.has(&last) { case.floats(&last) } else { vec![0.0; shape[0] * shape[1] * h] };
    let (anchors, keep) = (case.ints(&name("in.anchors")), case.bools(&name("in.anchor_keep")));
    let blocks = case.shape(&name("in.anchors"))[1];
    let mut out = Batch { pack: Pack::default(), anchors: Vec::new(), recorded: Vec::new() };
    for (b, len) in case.valid_lengths().into_iter().enumerate() {
        let (at, start) = (b * shape[1], out.pack.ids.len() as u32);
        out.pack.docs.push(DocSpan { start, len: len as u32 });
        out.pack.rows.push(b as u64);
        out.pack.ids.extend(ids[at..at + len].iter().map(|i| *i as u32));
        // As it is: labels are tokens, so the last one may be trained.
        out.pack.loss_mask.extend(mask[at..at + len].iter().map(|m| *m != 0));
        out.pack.positions.extend(0..len as u32);
        out.pack.features.extend_from_slice(&features[at * fw..(at + len) * fw]);
        out.pack.last.extend_from_slice(&last[at * h..(at + len) * h]);
        let kept: Vec<usize> = (b * blocks..(b + 1) * blocks).filter(|i| keep[*i]).collect();
        out.anchors.push(kept.iter().map(|i| start + anchors[*i] as u32).collect());
        out.recorded.extend(kept);
    }
    out
}

/// The rows of a trace as `[N recorded, Bk]`, zero where there is none.
fn spread(
    batch: &Batch,
    trace: &BlockTrace,
    (all, size): (usize, usize),
    of: impl Fn(usize) -> f32,
) -> Vec<f32> {
    let mut out = vec![0.0; all * size];
    for (i, row) in trace.rows.iter().enumerate() {
        out[batch.recorded[row.block] * size + row.slot] = of(i);
    }
    out
}

#[track_caller]
fn check_forward<K: TrainKernels>(
    case: &Case,
    method: &mut BlockTrain<K>,
    prefix: &str,
    errors: &mut Errors,
) -> (Batch, BatchStats) {
    let config = case.block_config();
    let batch = batch(case, prefix);
    let name = |n: &str| format!("{prefix}{n}");
    let (stats, trace) = method.trace(&batch.pack, &batch.anchors).unwrap();
    let shape = case.shape(&name("fwd.hidden"));
    let (all, size, h, v) = (shape[0] * shape[1], shape[2], shape[3], config.vocab_size);
    let spark = config.spark.is_some();
    let (hidden, logits) = (
        case.floats(&name("fwd.hidden")),
        case.floats(&name(if spark { "fwd.base_logits" } else { "fwd.logits" })),
    );
    for (i, at) in batch.recorded.iter().enumerate() {
        let (w, r) = (size * h, size * v);
        errors.check("hidden", &trace.hidden[i * w..(i + 1) * w], &hidden[at * w..(at + 1) * w], 2e-5, 1e-4);
        errors.check(
            "logits",
            &trace.base_logits[i * r..(i + 1) * r],
            &logits[at * r..(at + 1) * r],
            2e-5,
            1e-4,
        );
    }
    // What has a loss, and how much.
    let mask = spread(&batch, &trace, (all, size), |_| 1.0);
    let labels = case.ints(&name("loss.labels"));
    for row in &trace.rows {
        let at = batch.recorded[row.block] * size + row.slot;
        assert_eq!(i64::from(batch.pack.ids[row.label_slot as usize]), labels[at]);
    }
    let weights = spread(&batch, &trace, (all, size), |i| trace.weights[i]);
    if spark {
        let wanted: Vec<f32> = case.bools(&name("loss.eval_mask")).iter().map(|m| f32::from(*m)).collect();
        assert_eq!(mask, wanted);
        errors.check("weights", &weights, &case.floats(&name("loss.weights")), 1e-6, 1e-5);
    } else {
        let wanted = case.floats(&name("loss.mask"));
        assert_eq!(mask, wanted);
        if case.has(&name("loss.dpace_weights")) {
            let all = case.floats(&name("loss.dpace_weights"));
            let wanted: Vec<f32> = all.iter().zip(&wanted).map(|(w, m)| w * m).collect();
            errors.check("D-PACE weights", &weights, &wanted, 1e-6, 1e-5);
        } else {
            errors.check("weights", &weights, &case.floats(&name("loss.weights")), 1e-6, 1e-5);
        }
        errors.check("numerator", &[stats.loss as f32], &case.floats(&name("loss.numerator")), 1e-6, 1e-5);
        errors.check(
            "denominator",
            &[stats.weight as f32],
            &case.floats(&name("loss.denominator")),
            1e-6,
            1e-5,
        );
        let (correct, slots) = totals(&stats);
        assert_eq!(slots as f32, case.floats(&name("accuracy_denom"))[0]);
        let accuracy = (correct as f64 / slots as f64) as f32;
        errors.check("accuracy", &[accuracy], &case.floats(&name("accuracy")), 1e-6, 0.0);
    }
    if spark {
        check_spark(case, &batch, &stats, &trace, (all, size), errors);
    }
    (batch, stats)
}

fn totals(stats: &BatchStats) -> (u64, u64) {
    stats.depths.iter().fold((0, 0), |(c, s), d| (c + d.correct, s + d.slots))
}

/// What DSpark measures beside its loss.
#[track_caller]
fn check_spark(
    case: &Case,
    batch: &Batch,
    stats: &BatchStats,
    trace: &BlockTrace,
    (all, size): (usize, usize),
    errors: &mut Errors,
) {
    let accepted = |i: usize| (1.0 - trace.found[i].l1 / 2.0).clamp(0.0, 1.0);
    let found = spread(batch, trace, (all, size), accepted);
    let mask = case.bools("loss.eval_mask");
    let wanted: Vec<f32> =
        case.floats("loss.accept_prob").iter().zip(&mask).map(|(a, m)| if *m { *a } else { 0.0 }).collect();
    errors.check("acceptance", &found, &wanted, 1e-6, 1e-5);
    if case.has("fwd.confidence_logits") && !trace.confidence.is_empty() {
        let found = spread(batch, trace, (all, size), |i| trace.confidence[i]);
        let wanted: Vec<f32> = case
            .floats("fwd.confidence_logits")
            .iter()
            .zip(&mask)
            .map(|(c, m)| if *m { *c } else { 0.0 })
            .collect();
        errors.check("confidence", &found, &wanted, 2e-5, 1e-4);
        let mut error = 0.0;
        let mut entropy = 0.0;
        for (i, x) in trace.confidence.iter().enumerate() {
            let (x, a, w) = (f64::from(*x), f64::from(accepted(i)), f64::from(trace.weights[i]));
            error += w * (1.0 / (1.0 + (-x).exp()) - a).abs();
            entropy += w * (x.max(0.0) + (-x.abs()).exp().ln_1p() - a * x);
        }
        let wanted = case.floats("metric_num.confidence_abs_error");
        errors.check("confidence error", &[error as f32], &wanted, 2e-5, 1e-4);
        let wanted = case.floats("metric_num.confidence_loss");
        errors.check("confidence loss", &[entropy as f32], &wanted, 2e-5, 1e-4);
    }
    let weighed = |of: &dyn Fn(usize) -> f32| -> f32 {
        (0..trace.rows.len()).map(|i| f64::from(of(i)) * f64::from(trace.weights[i])).sum::<f64>() as f32
    };
    let ce = weighed(&|i| trace.found[i].ce);
    errors.check("ce", &[ce], &case.floats("metric_num.ce_loss"), 1e-6, 1e-5);
    let l1 = weighed(&|i| trace.found[i].l1);
    errors.check("l1", &[l1], &case.floats("metric_num.l1_loss"), 1e-6, 1e-5);
    let column = |f: &dyn Fn(&draftsmith_train::DepthStats) -> f64| -> Vec<f32> {
        stats.depths.iter().map(|d| f(d) as f32).collect()
    };
    errors.check("ce by slot", &column(&|d| d.loss), &case.floats("metric_num.ce_position"), 1e-5, 1e-5);
    assert_eq!(column(&|d| d.slots as f64), case.floats("metric_den.ce_position"));
    assert_eq!(column(&|d| d.correct as f64), case.floats("metric_num.accuracy_position"));
    let (correct, slots) = totals(stats);
    assert_eq!(
        vec![correct as f32, slots as f32],
        [case.floats("metric_num.acc")[0], case.floats("metric_den.acc")[0]]
    );
    let tau = case.floats("metric_num.tau_probabilistic");
    errors.check("tau", &[stats.sim_accepted as f32], &tau, 1e-6, 1e-5);
    assert_eq!(stats.blocks as f32, case.floats("metric_den.tau_probabilistic")[0]);
    let agree = trace.found.iter().filter(|f| f.top == f.teacher_top).count();
    assert_eq!(agree as f32, case.floats("metric_num.teacher_agreement")[0]);
    let sum = |of: &dyn Fn(&draftsmith_kernels::train::TokenRow) -> f32| -> f32 {
        trace.found.iter().map(|f| f64::from(of(f))).sum::<f64>() as f32
    };
    errors.check("top", &[sum(&|f| f.top_prob)], &case.floats("metric_num.draft_top1_prob"), 1e-6, 1e-5);
    errors.check(
        "teacher top",
        &[sum(&|f| f.teacher_top_prob)],
        &case.floats("metric_num.teacher_top1_prob"),
        1e-6,
        1e-5,
    );
}

#[track_caller]
fn check_on<K: TrainKernels>(case: &Case, kernels: K) {
    let mut errors = Errors::default();
    let mut method = case.block_method(kernels);
    let prefixes: Vec<String> = match case.json["training"]["micro_batches"].as_u64() {
        Some(n) if n > 1 => (0..n).map(|i| format!("mb{i}.")).collect(),
        _ => vec![String::new()],
    };
    let mut total = BatchStats::default();
    for prefix in &prefixes {
        let (batch, found) = check_forward(case, &mut method, prefix, &mut errors);
        let trained = method.micro_batch_at(&batch.pack, &batch.anchors, Mode::Train).unwrap();
        assert_eq!(found.weight, trained.weight);
        errors.check("trained loss", &[trained.loss as f32], &[found.loss as f32], 1e-6, 1e-5);
        total.add(&trained);
    }
    let loss = total.loss / total.weight;
    errors.check("loss", &[loss as f32], &case.floats("loss"), 1e-6, 1e-5);
    check_gradients_and_step(case, &mut method, total.weight, &mut errors);
}

/// Every implementation of the operations must give the recorded numbers.
#[track_caller]
fn check(name: &str) {
    let case = Case::open(name);
    check_masks(&case);
    check_on(&case, Cpu::new(2));
    check_on(&case, Gpu::new(Accelerator::flex(), GpuOptions::default()));
    check_on(&case, cuda_shim());
}

/// The recorded masks are what the rule says.
#[track_caller]
fn check_masks(case: &Case) {
    if !case.has("mask.full") {
        return;
    }
    let config = case.block_config();
    let shape = case.shape("mask.full");
    let (queries, keys) = (shape[1], shape[2]);
    let slots = keys - queries;
    let (anchors, keep) = (case.ints("in.anchors"), case.bools("in.anchor_keep"));
    let size = config.block_size;
    for layer in 0..config.sliding.len() {
        let sliding = config.sliding[layer];
        let recorded = case.bools(if sliding { "mask.sliding" } else { "mask.full" });
        for (i, seen) in recorded.iter().enumerate() {
            let (row, key) = (i / keys, i % keys);
            let (block, slot) = (row / size, row % size);
            let anchor = anchors[block] as u32;
            let wanted = keep[block]
                && if key < slots {
                    (config.context_from(layer, anchor, slot as u32)..anchor).contains(&(key as u32))
                } else {
                    let own = (key - slots) / size == block % (queries / size);
                    own && (!sliding || (key - slots) % size <= slot)
                };
            assert_eq!(*seen, wanted, "layer {layer} row {row} key {key}");
        }
    }
}

#[test]
fn decayed_blocks_equal_the_reference() {
    check("df_gamma");
}

#[test]
fn dpace_equals_the_reference() {
    check("df_dpace");
}

#[test]
fn two_micro_batches_are_divided_by_the_weights_of_both() {
    check("df_window2");
}

#[test]
fn a_vanilla_markov_head_with_confidence_equals_the_reference() {
    check("dspark_vanilla");
}

#[test]
fn a_recurrent_markov_head_equals_the_reference() {
    check("dspark_rnn");
}

/// Cases that are not recorded here still name their settings in the words of the reference.
#[test]
fn settings_are_read_by_the_words_of_the_reference() {
    let case = Case::open("df_dpace");
    let mut json = case.json.clone();
    for (word, kind) in [
        ("dpace", DpaceKind::Full),
        ("dpace-cumulative-confidence-only", DpaceKind::Confidence),
        ("dpace-continuation-value-only", DpaceKind::Continuation),
    ] {
        json["training"]["loss_type"] = Value::from(word);
        let case = Case { json: json.clone(), ..Case::open("df_dpace") };
        assert_eq!(case.block_loss(), BlockLoss::Dpace { kind, alpha: 0.5 });
    }
}
