//! Parity of AdamW, clipping and schedule with the recorded optimiser runs (`opt_*`).

use draftsmith_kernels::Cpu;
use draftsmith_model::tape::Tape;
use draftsmith_train::{AdamW, AdamWOptions, LrSchedule};

use crate::golden::{Case, Errors};

#[track_caller]
fn check(name: &str) -> Errors {
    let case = Case::open(name);
    let o = AdamWOptions {
        beta1: case.number("/optimizer/betas/0"),
        beta2: case.number("/optimizer/betas/1"),
        eps: case.number("/optimizer/eps"),
        weight_decay: case.number("/optimizer/weight_decay"),
        max_grad_norm: case.number("/optimizer/max_grad_norm"),
    };
    let mut tape = Tape::new(Cpu::new(2));
    for t in ["a", "b"] {
        tape.add_param(t, &case.shape(&format!("w0.{t}")), &case.floats(&format!("w0.{t}")), true);
    }
    let ids = tape.trained();
    let mut optimizer = AdamW::new(o, &tape);
    let mut errors = Errors::default();
    let steps = case.number("/optimizer/steps_recorded") as usize;
    let (norms, ratio) = (case.floats("grad_norm"), case.number("/optimizer/warmup_ratio"));
    let half = case.json["optimizer"]["model_dtype"] == "bfloat16";
    // In the recorded f32 run `w0.*` share memory with the model and hold its weights after the last step. There the
    // first step gives the moments, and weights are compared from the second on.
    let aliased = case.floats("w0.a") == case.floats("model.a")[(steps - 1) * 30..];
    assert_eq!(aliased, !half);
    for step in 0..steps {
        let part = |kind: &str, t: &str| {
            let all = case.floats(&format!("{kind}.{t}"));
            let len = all.len() / steps;
            all[step * len..(step + 1) * len].to_vec()
        };
        for (id, t) in ids.iter().zip(["a", "b"]) {
            tape.add_grad(*id, &part("grads", t));
        }
        let norm = optimizer.step(&mut tape, case.number(&format!("/lr_per_step/{step}")), 1.0).unwrap();
        errors.check("grad norm", &[norm as f32], &norms[step..=step], 1e-6, 1e-5);
        for (id, t) in ids.iter().zip(["a", "b"]) {
            if aliased && step == 0 {
                tape.set_param(*id, &part("master", t));
            }
            let found = tape.param_values(*id);
            errors.check("master", &found, &part("master", t), 1e-7, 1e-6);
            let wanted = part("model", t);
            if half {
                for (f, w) in found.iter().zip(&wanted) {
                    let (f, w) = (half::bf16::from_f32(*f), half::bf16::from_f32(*w));
                    assert!(
                        (f.to_bits() as i32 - w.to_bits() as i32).abs() <= 1,
                        "model copy {f}, wanted {w}"
                    );
                }
            } else {
                errors.check("model", &found, &wanted, 1e-7, 1e-6);
            }
        }
        let (peak, total) = (case.number("/optimizer/lr_base"), case.number("/optimizer/total_steps"));
        let lr = LrSchedule::Cosine.lr(peak, ratio, total as u64, step as u64);
        assert!((lr - case.number(&format!("/lr_closed_form/{step}"))).abs() < 1e-12, "step {step}: {lr}");
    }
    errors
}

#[test]
fn float_weights_equal_the_recorded_run() {
    check("opt_fp32_cosine");
}

#[test]
fn bfloat16_weights_with_decay_equal_the_recorded_run() {
    check("opt_bf16_cosine_wd");
}
