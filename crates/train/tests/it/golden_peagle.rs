//! Parity with the reference vectors of `fixtures/golden` (`peagle_*`): what entries see, forward, teacher, loss, metrics,
//! gradients, one optimiser step. Entries are the recorded ones. Tolerances are those of its README.

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::train::DocSpan;
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::DraftSpec;
use draftsmith_model::peagle::PEagleConfig;
use draftsmith_train::peagle::Element;
use draftsmith_train::{DraftTensor, Mode, PEagleOptions, PEagleTrain, Pack};
use serde_json::Value;

use crate::golden::{Case, Errors, check_gradients_and_step, cuda_shim};

impl Case {
    fn peagle_config(&self) -> PEagleConfig {
        let mut value = self.json["draft_config"].clone();
        value["pard_token"] = self.json["training"]["mask_token_id"].clone();
        value["num_depths"] = self.json["training"]["num_depths"].clone();
        PEagleConfig::from_value(&value).unwrap()
    }

    fn peagle_method<K: TrainKernels>(&self, kernels: K) -> PEagleTrain<K> {
        let config = self.peagle_config();
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let recorded = self.shape(&format!("w.{name}"));
            assert_eq!(recorded.iter().product::<usize>(), shape.iter().product::<usize>());
            DraftTensor { values: self.floats(&format!("w.{name}")), name, shape }
        };
        let weights: Vec<DraftTensor> = config.tensors().into_iter().map(tensor).collect();
        let head = self.floats("frozen.target_lm_head.weight");
        PEagleTrain::new(kernels, config, PEagleOptions::PUBLISHED, self.vocab_map(), &head, &weights)
            .unwrap()
    }

    /// The recorded row, documents beside each other, without padding; positions run on.
    fn peagle_pack(&self) -> Pack {
        let config = self.peagle_config();
        let mut pack = Pack::default();
        for (row, len) in self.ints("in.doc_lengths").into_iter().enumerate() {
            let start = pack.docs.last().map_or(0, |d: &DocSpan| d.end() as u32);
            pack.docs.push(DocSpan { start, len: len as u32 });
            pack.rows.push(row as u64);
        }
        let all = pack.docs.last().unwrap().end();
        pack.ids = self.ints("in.input_ids")[..all].iter().map(|i| *i as u32).collect();
        pack.loss_mask = self.ints("in.loss_mask")[..all].iter().map(|m| *m != 0).collect();
        pack.positions = (0..all as u32).collect();
        pack.features = self.floats("in.aux_hidden_states")[..all * config.features_width()].to_vec();
        pack.last = self.floats("in.last_hidden_states")[..all * config.target_hidden_size].to_vec();
        pack
    }

    fn elements(&self) -> Vec<Element> {
        let (anchors, depths) = (self.ints("in.element_anchor"), self.ints("in.element_depth"));
        let element = |(a, d): (&i64, &i64)| Element { anchor: *a as u32, depth: *d as u32 };
        anchors.iter().zip(&depths).map(element).collect()
    }
}

#[track_caller]
fn check_on<K: TrainKernels>(case: &Case, kernels: K) {
    let mut errors = Errors::default();
    let config = case.peagle_config();
    let mut method = case.peagle_method(kernels);
    let pack = case.peagle_pack();
    let recorded = case.elements();
    let rollouts: Vec<Element> = recorded.iter().copied().filter(|e| e.depth > 0).collect();
    let (stats, trace) = method.trace(&pack, &rollouts).unwrap();
    let (h, vd) = (config.layer.hidden_size, config.draft_vocab_size);
    let (hidden, logits) = (case.floats("fwd.hidden"), case.floats("fwd.logits"));
    let (p, weights) = (case.floats("teacher.p"), case.floats("loss.weights"));
    for (i, element) in trace.elements.iter().enumerate() {
        let at = recorded.iter().position(|e| e == element).unwrap();
        let teacher = trace.teacher_rows[element.slot()];
        assert_eq!(teacher != u32::MAX, weights[at] != 0.0, "{element:?}");
        // The reference feeds the last slot of a document the first token of the next, which nobody looks at.
        if pack.docs.iter().any(|d| element.depth == 0 && element.slot() + 1 == d.end()) {
            continue;
        }
        let row = |v: &[f32], i: usize, width: usize| v[i * width..(i + 1) * width].to_vec();
        errors.check("hidden", &row(&trace.hidden, i, h), &row(&hidden, at, h), 2e-5, 1e-4);
        errors.check("logits", &row(&trace.logits, i, vd), &row(&logits, at, vd), 2e-5, 1e-4);
        if teacher != u32::MAX {
            errors.check("teacher", &row(&trace.p, teacher as usize, vd), &row(&p, at, vd), 1e-6, 1e-5);
        }
    }
    let trained = method.micro_batch_at(&pack, &rollouts, Mode::Train).unwrap();
    for stats in [&stats, &trained] {
        let loss = stats.loss / stats.weight;
        errors.check("loss", &[loss as f32], &case.floats("loss"), 1e-6, 1e-5);
        let mut correct: Vec<f32> = stats.depths.iter().map(|d| d.correct as f32).collect();
        let mut total: Vec<f32> = stats.depths.iter().map(|d| d.slots as f32).collect();
        let depths = case.shape("metric.position_total")[0];
        correct.resize(depths, 0.0);
        total.resize(depths, 0.0);
        assert_eq!(correct, case.floats("metric.position_correct"));
        assert_eq!(total, case.floats("metric.position_total"));
    }
    check_gradients_and_step(case, &mut method, trained.weight, &mut errors);
}

#[track_caller]
fn check(name: &str) {
    let case = Case::open(name);
    check_mask(&case);
    check_on(&case, Cpu::new(2));
    check_on(&case, Gpu::new(Accelerator::flex(), GpuOptions::default()));
    check_on(&case, cuda_shim());
}

/// The recorded mask is the rule of anchor and depth.
#[track_caller]
fn check_mask(case: &Case) {
    let (elements, recorded) = (case.elements(), case.bools("mask.elements"));
    let pack = case.peagle_pack();
    let doc = |e: &Element| {
        pack.docs.iter().position(|d| (d.start as usize..d.end()).contains(&(e.anchor as usize)))
    };
    for (i, q) in elements.iter().enumerate() {
        for (j, kv) in elements.iter().enumerate() {
            if doc(q).is_none() {
                continue;
            }
            let behind = kv.depth == 0 && q.anchor >= kv.anchor;
            let own = kv.anchor == q.anchor && q.depth >= kv.depth;
            let wanted = doc(q) == doc(kv) && (behind || own);
            assert_eq!(recorded[i * elements.len() + j], wanted, "{q:?} {kv:?}");
        }
    }
}

#[test]
fn rollouts_equal_the_reference() {
    check("peagle_basic");
}

#[test]
fn packed_documents_with_a_normalised_residual_equal_the_reference() {
    check("peagle_packed_nbr");
}

#[test]
fn a_case_names_its_mask_token() {
    let case = Case::open("peagle_basic");
    assert_eq!(case.json["training"]["mask_token_id"], Value::from(case.peagle_config().mask_token_id));
}
