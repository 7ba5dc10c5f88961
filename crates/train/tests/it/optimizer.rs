//! Parity of AdamW, clipping and schedule with the recorded optimiser runs (`opt_*`).

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions};
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::tape::Tape;
use draftsmith_train::ranks::threads::on_ranks;
use draftsmith_train::{AdamW, AdamWOptions, Alone, Collective, LrSchedule, Moment, Rng, Slices, TrainError};

use crate::golden::{Case, Errors, cuda_shim};
use crate::peers::Linked;

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

/// Lengths of parameters: long ones that are cut, with and without a rest, and short ones.
fn lens<K: TrainKernels>() -> [usize; 6] {
    [3 * K::SQUARES + 5, 7, 2 * K::SQUARES, 1, K::SQUARES + 1, 900]
}

fn tape<K: TrainKernels>(kernels: K) -> Tape<K> {
    let mut tape = Tape::new(kernels);
    tape.add_param("frozen", &[4], &[1.0; 4], false);
    for (i, len) in lens::<K>().into_iter().enumerate() {
        tape.add_param(&format!("p{i}"), &[len], &Rng::new(3, &[i as u64]).normal(len, 0.1), true);
    }
    tape
}

/// Parameters and both moments, and the norms of the steps, as bits.
type After = (Vec<[Vec<u32>; 3]>, Vec<u64>);

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Two steps; `None` on ranks that do not get the moments.
fn after_steps<K: TrainKernels>(
    collective: &dyn Collective,
    tape: &mut Tape<K>,
    optimizer: &mut AdamW<K>,
) -> Option<After> {
    let mut norms = Vec::new();
    for step in 0..2u64 {
        for (place, id) in tape.trained().into_iter().enumerate() {
            let whole = Rng::new(4, &[step, place as u64]).normal(tape.param(id).numel(), 0.3);
            let own = optimizer.slices().map_or(0..whole.len(), |s| s.mine(place, whole.len()));
            // Nobody looks at what is another rank's.
            let mut values = vec![f32::NAN; whole.len()];
            values[own.clone()].copy_from_slice(&whole[own]);
            tape.set_grad(id, &values);
        }
        let (norm, _) = optimizer.step_among(tape, (1e-2, 3.0), collective).unwrap();
        norms.push(norm.to_bits());
        assert_eq!(tape.grad_norm(), 0.0);
    }
    let mut all = Vec::new();
    for (place, id) in tape.trained().into_iter().enumerate() {
        let [first, second] = [Moment::First, Moment::Second]
            .map(|moment| optimizer.moment(tape, (place, moment), collective).map(|m| bits(&m)));
        all.extend(first.zip(second).map(|(m, v)| [bits(&tape.param_values(id)), m, v]));
    }
    (!all.is_empty()).then_some((all, norms))
}

#[track_caller]
fn check_slices<K: TrainKernels>(kernels: impl Fn(&dyn Collective) -> K + Sync, counts: &[usize]) {
    let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
    let mut alone = tape(kernels(&Alone));
    let mut optimizer = AdamW::new(options, &alone);
    let lens = lens::<K>();
    let all: usize = lens.iter().sum();
    assert_eq!(optimizer.moment_bytes(), 8 * all as u64);
    let wanted = after_steps(&Alone, &mut alone, &mut optimizer).unwrap();
    for ranks in counts.iter().copied() {
        let found = on_ranks(ranks, |collective| {
            let mut tape = tape(kernels(collective));
            let slices = Slices::among::<K>(collective);
            let mut optimizer = AdamW::sharded(options, &tape, slices);
            let own: usize = lens.iter().enumerate().map(|(place, len)| slices.mine(place, *len).len()).sum();
            let before = collective.sent_bytes();
            let after = after_steps(collective, &mut tape, &mut optimizer);
            let handed_in = if collective.is_first() { 0 } else { 2 * own };
            let sent = 4 * (2 * (ranks - 1) * own + handed_in) as u64;
            assert_eq!(collective.sent_bytes() - before, sent, "over {ranks}");
            // All have the parameters, whoever updated them.
            for (place, id) in tape.trained().into_iter().enumerate() {
                assert!(bits(&tape.param_values(id)) == wanted.0[place][0], "p{place} over {ranks}");
            }
            (after, optimizer.moment_bytes(), own as u64)
        });
        assert!(found[0].0.as_ref() == Some(&wanted), "over {ranks}");
        assert!(found[1..].iter().all(|(after, ..)| after.is_none()));
        assert!(found.iter().all(|(_, bytes, own)| *bytes == 8 * own));
        assert_eq!(found.iter().map(|(_, bytes, _)| bytes).sum::<u64>(), 8 * all as u64);
        let most = found.iter().map(|(_, bytes, _)| *bytes).max().unwrap();
        let blocks = 8 * (lens.len() * K::SQUARES) as u64;
        assert!(most <= 8 * (all / ranks) as u64 + blocks, "{most} of {ranks}");
    }
}

#[test]
fn slices_are_stepped_as_the_whole_is() {
    check_slices(|_| Cpu::new(2), &[1, 2, 3, 4, 5]);
}

#[test]
fn slices_are_stepped_as_the_whole_is_on_devices() {
    check_slices(|_| Gpu::new(Accelerator::flex(), GpuOptions::default()), &[2, 3]);
    check_slices(|_| cuda_shim(), &[3]);
}

#[test]
fn slices_go_from_device_to_device() {
    let linked = Linked::default();
    check_slices(|collective| linked.device(collective), &[2, 3]);
}

#[test]
fn moments_go_to_any_number_of_ranks_and_back() {
    let options = AdamWOptions::default();
    let lens = lens::<Cpu>();
    let whole = |place: usize, which| Rng::new(which, &[place as u64]).normal(lens[place], 1.0);
    for ranks in [1, 2, 3] {
        let found = on_ranks(ranks, |collective| {
            let tape = tape(Cpu::new(1));
            let mut optimizer = AdamW::sharded(options, &tape, Slices::among::<Cpu>(collective));
            let all = (0..lens.len()).flat_map(|place| [(place, Moment::First), (place, Moment::Second)]);
            let value = |(place, moment)| whole(place, if moment == Moment::First { 6 } else { 7 });
            all.clone().for_each(|which| optimizer.set_moment(&tape, which, &value(which)));
            optimizer.set_steps(9);
            assert_eq!(optimizer.steps(), 9);
            all.map(|which| (optimizer.moment(&tape, which, collective), value(which))).collect::<Vec<_>>()
        });
        assert!(found[0].iter().all(|(found, wanted)| found.as_ref() == Some(wanted)), "{ranks} ranks");
    }
}

#[test]
fn a_norm_that_is_no_number_stops_every_rank_before_it_changes_anything() {
    let ended = on_ranks(3, |collective| {
        let mut tape = tape(Cpu::new(1));
        let slices = Slices::among::<Cpu>(collective);
        let mut optimizer = AdamW::sharded(AdamWOptions::default(), &tape, slices);
        // In the slice of one rank alone.
        let id = tape.trained()[0];
        let mut gradient = vec![0.5; tape.param(id).numel()];
        *gradient.last_mut().unwrap() = f32::INFINITY;
        tape.set_grad(id, &gradient);
        let before = bits(&tape.param_values(id));
        let error = optimizer.step_among(&mut tape, (1e-2, 1.0), collective).unwrap_err();
        assert!(bits(&tape.param_values(id)) == before);
        (matches!(error, TrainError::Diverged { step: 0, .. }), optimizer.steps())
    });
    assert_eq!(ended, [(true, 0); 3]);
}
