//! Parity with the reference vectors of `fixtures/golden` (`e3_*`): forward, teacher, losses, gradients, one
//! optimiser step, incremental decoding. Tolerances are those of its README.

use std::path::PathBuf;

use draftsmith_core::VocabMap;
use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Cuda, CudaOptions, Operands};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::train::SoftLoss;
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::eagle3::{Eagle3Config, Feedback};
use draftsmith_train::eagle3::TargetSide;
use draftsmith_train::{
    AdamW, AdamWOptions, DraftTensor, Eagle3Options, Eagle3Train, LossDivisor, Method, Mode, Pack,
};
use serde_json::Value;

use crate::infer;

/// The kernels for NVIDIA GPUs, on the host.
pub(crate) fn cuda_shim() -> Cuda<Shim> {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    Cuda::new(Shim::new(folder).unwrap(), CudaOptions { operands: Operands::F32, ..CudaOptions::default() })
}

/// One recorded case.
pub(crate) struct Case {
    pub(crate) json: Value,
    pub(crate) file: SafetensorsDir,
}

impl Case {
    pub(crate) fn open(name: &str) -> Case {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden");
        let json = std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap();
        let file = SafetensorsDir::open(dir.join(format!("{name}.safetensors"))).unwrap();
        Case { json: serde_json::from_str(&json).unwrap(), file }
    }
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.file.get(name).unwrap().to_f32().unwrap()
    }
    pub(crate) fn ints(&self, name: &str) -> Vec<i64> {
        self.file.get(name).unwrap().to_i64().unwrap()
    }
    pub(crate) fn shape(&self, name: &str) -> Vec<usize> {
        self.file.get(name).unwrap().shape.to_vec()
    }
    pub(crate) fn bools(&self, name: &str) -> Vec<bool> {
        self.file.get(name).unwrap().to_bool().unwrap()
    }
    pub(crate) fn has(&self, name: &str) -> bool {
        self.file.find(name).is_some()
    }
    pub(crate) fn number(&self, path: &str) -> f64 {
        self.json.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} is a number"))
    }
    pub(crate) fn config(&self) -> Eagle3Config {
        let mut config = Eagle3Config::from_value(&self.json["draft_config"]).unwrap();
        // The recorded reference keeps the pre-norm feedback whatever the configuration says.
        let post = self.json["feedback"].as_str().unwrap().starts_with("post-norm");
        config.feedback = if post { Feedback::PostNorm } else { Feedback::PreNorm };
        config
    }
    pub(crate) fn valid_lengths(&self) -> Vec<usize> {
        self.json["valid_lengths"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
    }
    pub(crate) fn vocab_map(&self) -> VocabMap {
        let t2d = self.file.get("vocab.t2d").unwrap().to_bool().unwrap();
        VocabMap::from_tensors(&self.ints("vocab.d2t"), &t2d).unwrap()
    }
    pub(crate) fn weights(&self, config: &Eagle3Config) -> Vec<DraftTensor> {
        let tensor = |(name, shape): (String, Vec<usize>)| {
            assert_eq!(self.shape(&format!("w.{name}")), shape);
            DraftTensor { values: self.floats(&format!("w.{name}")), name, shape }
        };
        config.tensors().into_iter().map(tensor).collect()
    }

    fn options(&self) -> Eagle3Options {
        let t = &self.json["training"];
        let loss = match t["lk_loss_type"].as_str() {
            None => SoftLoss::Kl,
            Some("alpha") => SoftLoss::LkAlpha,
            Some("lambda") => SoftLoss::LkLambda {
                kl_scale: t["kl_scale"].as_f64().unwrap() as f32,
                kl_decay: t["kl_decay"].as_f64().unwrap() as f32,
            },
            Some(other) => panic!("unknown loss {other}"),
        };
        Eagle3Options {
            ttt_length: t["ttt_length"].as_u64().unwrap() as usize,
            step_decay: t["step_decay"].as_f64().unwrap(),
            loss,
            divisor: LossDivisor::AllSlots,
        }
    }

    fn method<K: TrainKernels>(&self, kernels: K) -> Eagle3Train<K> {
        let config = self.config();
        let (embed, head) =
            (self.floats("frozen.embed_tokens.weight"), self.floats("frozen.target_lm_head.weight"));
        let target = TargetSide { embed: &embed, head: Some(&head) };
        let weights = self.weights(&config);
        Eagle3Train::new(kernels, config, self.options(), self.vocab_map(), &target, &weights).unwrap()
    }

    /// The batch rows as documents of one pack, without their padding.
    pub(crate) fn pack(&self) -> Pack {
        let config = self.config();
        let (fw, lw) = (config.features_width(), config.target_hidden_size);
        let shape = self.shape("in.input_ids");
        let (ids, mask) = (self.ints("in.input_ids"), self.ints("in.loss_mask_raw"));
        let positions = self.ints("in.position_ids");
        let (features, last) = (self.floats("in.aux_hidden_states"), self.floats("in.last_hidden_states"));
        let mut pack = Pack::default();
        pack.positions.clear();
        let mut all_positions = Vec::new();
        for (b, len) in self.valid_lengths().into_iter().enumerate() {
            let at = b * shape[1];
            let row = CaptureRow {
                ids: ids[at..at + len].iter().map(|i| *i as u32).collect(),
                loss_mask: mask[at..at + len].iter().map(|m| *m != 0).collect(),
                features: features[at * fw..(at + len) * fw].to_vec(),
                last: last[at * lw..(at + len) * lw].to_vec(),
            };
            pack.push(b as u64, &row, usize::MAX, fw, lw).unwrap();
            all_positions.extend(positions[at..at + len].iter().map(|p| *p as u32));
        }
        pack.positions = all_positions;
        pack.counted_slots = shape[0] * shape[1];
        pack
    }

    /// Index in `[B, S]` of each slot of the pack, with its document's length.
    fn padded(&self) -> Vec<(usize, usize, usize)> {
        let width = self.shape("in.input_ids")[1];
        let lengths = self.valid_lengths();
        lengths
            .iter()
            .enumerate()
            .flat_map(|(b, len)| (0..*len).map(move |t| (b * width + t, t, *len)))
            .collect()
    }
}

/// Largest errors of a case, by quantity.
#[derive(Default)]
pub(crate) struct Errors(Vec<(&'static str, f64)>);

impl Errors {
    /// `found` must be within `atol + rtol * |wanted|`.
    #[track_caller]
    pub(crate) fn check(&mut self, what: &'static str, found: &[f32], wanted: &[f32], atol: f64, rtol: f64) {
        assert_eq!(found.len(), wanted.len(), "{what}");
        let mut worst = 0.0f64;
        for (i, (f, w)) in found.iter().zip(wanted).enumerate() {
            let error = (f64::from(*f) - f64::from(*w)).abs();
            assert!(error <= atol + rtol * f64::from(*w).abs(), "{what}[{i}]: found {f}, wanted {w}");
            worst = worst.max(error);
        }
        match self.0.iter_mut().find(|e| e.0 == what) {
            Some(e) => e.1 = e.1.max(worst),
            None => self.0.push((what, worst)),
        }
    }
}

/// Every implementation of the operations must give the recorded numbers.
#[track_caller]
fn check(name: &str) {
    let case = Case::open(name);
    check_training(name, &case, Cpu::new(2));
    check_training(name, &case, Gpu::new(Accelerator::flex(), GpuOptions::default()));
    check_training(name, &case, cuda_shim());
    infer::check_recorded(&case, &mut Errors::default());
}

#[track_caller]
fn check_training<K: TrainKernels>(name: &str, case: &Case, kernels: K) {
    let config = case.config();
    let (h, vd) = (config.hidden_size, config.draft_vocab_size);
    let mut method = case.method(kernels);
    let pack = case.pack();
    let mut errors = Errors::default();

    // Forward and teacher
    let (stats, trace) = method.trace(&pack).unwrap();
    let padded = case.padded();
    let wanted = case.floats("fwd.projected");
    let (hidden, logits) = (case.floats("fwd.hidden"), case.floats("fwd.logits"));
    let all = case.shape("fwd.hidden")[1] * case.shape("fwd.hidden")[2];
    let row = |v: &[f32], i: usize, width: usize| v[i * width..(i + 1) * width].to_vec();
    for (slot, (at, t, len)) in padded.iter().enumerate() {
        errors.check("projected", &row(&trace.projected, slot, h), &row(&wanted, *at, h), 2e-5, 1e-4);
        for k in (0..trace.hidden.len()).filter(|k| t + k < *len) {
            let recorded = k * all + at;
            errors.check("hidden", &row(&trace.hidden[k].1, slot, h), &row(&hidden, recorded, h), 2e-5, 1e-4);
            errors.check("logits", &row(&trace.logits[k], slot, vd), &row(&logits, recorded, vd), 2e-5, 1e-4);
        }
    }
    let (p, p_abs) = (case.floats("teacher.p"), case.floats("teacher.p_on_draft"));
    let (token_ids, position_mask) = (case.ints("teacher.token_ids"), case.ints("teacher.position_mask"));
    for (slot, (at, _, _)) in padded.iter().enumerate() {
        let m = trace.teacher_slots.iter().position(|s| *s as usize == slot);
        assert_eq!(m.is_some(), position_mask[*at] != 0, "{name}: slot {slot} is trained");
        if let Some(id) = trace.token_ids[slot] {
            assert_eq!(i64::from(id), token_ids[*at], "{name}: token of slot {slot}");
        }
        if let Some(m) = m {
            let found = row(&trace.p, m, vd);
            let mass: Vec<f32> = found.iter().map(|p| p * trace.mass[m]).collect();
            errors.check("teacher p", &found, &row(&p, *at, vd), 1e-6, 1e-5);
            errors.check("teacher p on draft", &mass, &row(&p_abs, *at, vd), 1e-6, 1e-5);
        }
    }

    // Losses and metrics, of the trace (every slot computed) and of the training step (only what is needed)
    let trained = method.micro_batch(&pack, Mode::Train).unwrap();
    for stats in [&stats, &trained] {
        let depths = &stats.depths;
        let column = |f: &dyn Fn(&draftsmith_train::DepthStats) -> f64| -> Vec<f32> {
            depths.iter().map(|d| f(d) as f32).collect()
        };
        errors.check("step loss", &column(&|d| d.loss), &case.floats("step.loss"), 1e-6, 1e-5);
        let rate = column(&|d| d.alpha / (d.trained as f64 + 1e-8));
        errors.check("acceptance rate", &rate, &case.floats("step.acceptance_rate"), 1e-6, 1e-5);
        assert_eq!(column(&|d| d.correct as f64), case.floats("step.acc_correct"), "{name}: correct");
        assert_eq!(column(&|d| d.slots as f64), case.floats("step.acc_denom"), "{name}: counted");
        errors.check("loss", &[stats.loss as f32], &case.floats("loss"), 1e-6, 1e-5);
    }

    check_gradients_and_step(case, &mut method, 1.0, &mut errors);
}

/// Gradients after a training step of everything, divided by `divisor`, and one optimiser step from them.
#[track_caller]
pub(crate) fn check_gradients_and_step<M: Method>(
    case: &Case,
    method: &mut M,
    divisor: f64,
    errors: &mut Errors,
) {
    // Gradients
    let norm = method.tape().grad_norm() / divisor;
    errors.check("grad norm", &[norm as f32], &case.floats("grad_norm"), 1e-6, 1e-5);
    let ids = method.tape().trained();
    let mut grads = Vec::new();
    for id in &ids {
        let name = format!("grad.{}", method.tape().param(*id).name);
        let (mut found, wanted) = (method.tape().grad_values(*id).unwrap(), case.floats(&name));
        found.iter_mut().for_each(|g| *g = (f64::from(*g) / divisor) as f32);
        let top = wanted.iter().fold(0.0f32, |a, g| a.max(g.abs()));
        errors.check("gradients", &found, &wanted, 1e-6 + 2e-6 * f64::from(top), 1e-4);
        grads.push(wanted);
    }

    // One optimiser step from our own gradients
    let o = AdamWOptions {
        beta1: case.number("/optimizer/betas/0"),
        beta2: case.number("/optimizer/betas/1"),
        eps: case.number("/optimizer/eps"),
        weight_decay: case.number("/optimizer/weight_decay"),
        max_grad_norm: case.number("/optimizer/max_grad_norm"),
    };
    let (lr, clip) = (case.number("/optimizer/lr_used_for_step"), case.number("/optimizer/clip_coef"));
    let mut optimizer = AdamW::new(o, method.tape());
    optimizer.step(method.tape_mut(), lr, divisor).unwrap();
    for (id, grad) in ids.iter().zip(grads) {
        let name = format!("after.{}", method.tape().param(*id).name);
        if !case.has(&name) {
            continue;
        }
        let (found, wanted) = (method.tape().param_values(*id), case.floats(&name));
        for i in 0..found.len() {
            // Where the gradient vanishes, the first Adam step is a sign of rounding noise.
            let clear = (clip * f64::from(grad[i])).abs() > 1e-5;
            let (what, atol) = if clear { ("after", 1e-6) } else { ("after, no gradient", 2.0 * lr + 1e-6) };
            errors.check(what, &found[i..=i], &wanted[i..=i], atol, 0.0);
        }
    }
    assert!(method.tape().grad_norm() == 0.0, "gradients are cleared by the step");
}

#[test]
fn base_case_equals_the_reference() {
    check("e3_base");
}

#[test]
fn full_vocabulary_equals_the_reference() {
    check("e3_fullvocab");
}

#[test]
fn alpha_loss_equals_the_reference() {
    check("e3_lk_alpha");
}

#[test]
fn lambda_loss_with_reset_positions_equals_the_reference() {
    check("e3_lk_lambda_posreset");
}

#[test]
fn seven_steps_with_llama3_rope_equal_the_reference() {
    check("e3_llama3rope_t7");
}

#[test]
fn a_wider_target_equals_the_reference() {
    check("e3_target_wider");
}

#[test]
fn per_layer_norms_before_fc_equal_the_reference() {
    check("e3_1_fcnorm");
}

#[test]
fn post_norm_feedback_equals_the_recomposed_reference() {
    check("e3_1_postnorm_feedback");
}
