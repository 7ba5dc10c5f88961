//! `bench train`: the same training step by several sides in turn, ours and those of other frameworks.
//!
//! Every side builds a draft of the same shape on made-up data, takes one step to warm up, then one step per round;
//! the side that goes first rotates from round to round.

use std::time::Duration;

use serde::Serialize;

use crate::record::Machine;
use crate::stats::{Estimate, median, ratio};
use crate::table::with_interval;
use crate::{BenchError, BoxError};

/// Sizes of the draft and of its data, and the unroll.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepShape {
    /// Slots of the one row that a step trains on.
    pub slots: usize,
    /// Width of draft and target.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Ids of the draft's head; the made-up target has the same.
    pub draft_vocab: usize,
    /// Steps unrolled.
    pub ttt_length: usize,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// RoPE base.
    pub rope_theta: f32,
}

impl StepShape {
    /// A draft of one layer of SmolLM2-135M.
    pub fn smollm2_135m(slots: usize, draft_vocab: usize, ttt_length: usize) -> StepShape {
        StepShape {
            slots,
            hidden: 576,
            intermediate: 1536,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            draft_vocab,
            ttt_length,
            eps: 1e-5,
            rope_theta: 100_000.0,
        }
    }
}

/// One optimiser step of one side.
#[derive(Clone, Copy, Debug)]
pub struct StepTime {
    /// Forward, backward, clipping and update.
    pub time: Duration,
    /// Loss before the update.
    pub loss: f64,
    /// Most memory that the process has held so far; `None` where the system does not say.
    pub peak_bytes: Option<u64>,
}

/// A framework that trains.
pub trait Trainer {
    /// Name and version, `torch 2.15.0 eager`.
    fn name(&self) -> String;
    /// One optimiser step.
    fn step(&mut self) -> Result<StepTime, BoxError>;
}

/// What one side did.
#[derive(Clone, Debug, Serialize)]
pub struct TrainSide {
    /// Name and version.
    pub name: String,
    /// Median of the steps.
    pub step_ms: Option<f64>,
    /// Slots per second over all steps.
    pub slots_per_s: Option<Estimate>,
    /// Time of this side over that of the first.
    pub this_over_first: Option<Estimate>,
    /// Most memory that the process held, all of it.
    pub peak_bytes: Option<u64>,
    /// Loss of the last step, which shows that it trained.
    pub last_loss: f64,
    /// Raw times.
    pub step_ns: Vec<u64>,
}

/// `OUT.json` of `bench train`.
#[derive(Clone, Debug, Serialize)]
pub struct TrainReport {
    /// The sides; the first is ours.
    pub sides: Vec<TrainSide>,
    /// What is trained.
    pub shape: StepShape,
    /// Threads of every side.
    pub threads: u32,
    /// Where it was run.
    pub machine: Machine,
}

/// Runs `steps` rounds of all sides.
///
/// # Errors
/// What a side says when it cannot train.
pub fn run_train(
    sides: &mut [&mut dyn Trainer],
    steps: usize,
    (shape, machine, threads): (StepShape, Machine, u32),
    progress: &mut dyn FnMut(usize),
) -> Result<TrainReport, BenchError> {
    let failed = |source| BenchError::Kernels { source };
    let count = sides.len();
    // The first step allocates, and compiles where that is asked for.
    let mut last = sides.iter_mut().map(|s| s.step().map_err(failed)).collect::<Result<Vec<_>, _>>()?;
    let mut step_ns: Vec<Vec<u64>> = vec![Vec::new(); count];
    for round in 0..steps {
        for turn in 0..count {
            let at = (round + turn) % count;
            last[at] = sides[at].step().map_err(failed)?;
            step_ns[at].push(last[at].time.as_nanos() as u64);
        }
        progress(round + 1);
    }
    let seconds = |ns: u64| ns as f64 / 1e9;
    let sides = (0..count)
        .map(|i| {
            let rate: Vec<(f64, f64)> =
                step_ns[i].iter().map(|ns| (shape.slots as f64, seconds(*ns))).collect();
            let pairs: Vec<(f64, f64)> = step_ns[i]
                .iter()
                .zip(&step_ns[0])
                .map(|(own, first)| (seconds(*own), seconds(*first)))
                .collect();
            let ms: Vec<f64> = step_ns[i].iter().map(|ns| *ns as f64 / 1e6).collect();
            TrainSide {
                name: sides[i].name(),
                step_ms: median(&ms),
                slots_per_s: ratio(&rate),
                this_over_first: if i == 0 { None } else { ratio(&pairs) },
                peak_bytes: last[i].peak_bytes,
                last_loss: last[i].loss,
                step_ns: step_ns[i].clone(),
            }
        })
        .collect();
    Ok(TrainReport { sides, shape, threads, machine })
}

/// Aligned text.
pub fn train_text(report: &TrainReport) -> String {
    let width = report.sides.iter().map(|s| s.name.chars().count()).max().unwrap_or(0).max(4);
    let mut out = format!(
        "{:width$}  {:>10}  {:>8}  {:>18}  {:>10}  {:>9}\n",
        "side", "ms a step", "slots/s", "over the first", "peak MB", "last loss"
    );
    for side in &report.sides {
        let number =
            |v: Option<f64>, digits: usize| v.map_or_else(|| "–".into(), |v| format!("{v:.digits$}"));
        let over = with_interval(&side.this_over_first, 2);
        out.push_str(&format!(
            "{:width$}  {:>10}  {:>8}  {over:>18}  {:>10}  {:>9.3}\n",
            side.name,
            number(side.step_ms, 0),
            number(side.slots_per_s.map(|e| e.value), 0),
            number(side.peak_bytes.map(|b| b as f64 / 1e6), 0),
            side.last_loss,
        ));
    }
    let s = &report.shape;
    out.push_str(&format!(
        "one row of {} slots, {} draft ids, {} unrolled steps, {} threads, sides in turn\n",
        s.slots, s.draft_vocab, s.ttt_length, report.threads
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed {
        ms: u64,
        calls: usize,
    }

    impl Trainer for Fixed {
        fn name(&self) -> String {
            format!("{} ms", self.ms)
        }
        fn step(&mut self) -> Result<StepTime, BoxError> {
            self.calls += 1;
            let warm_up = if self.calls == 1 { 1000 } else { 0 };
            let time = Duration::from_millis(self.ms + warm_up);
            Ok(StepTime { time, loss: self.calls as f64, peak_bytes: Some(self.calls as u64 * 1_000_000) })
        }
    }

    #[test]
    fn ratios_follow_from_the_steps_after_the_first() {
        let (mut fast, mut slow) = (Fixed { ms: 100, calls: 0 }, Fixed { ms: 150, calls: 0 });
        let shape = StepShape::smollm2_135m(50, 8, 2);
        let mut rounds = Vec::new();
        let report = run_train(&mut [&mut fast, &mut slow], 3, (shape, Machine::default(), 2), &mut |n| {
            rounds.push(n)
        })
        .unwrap();
        assert_eq!((fast.calls, slow.calls, rounds), (4, 4, vec![1, 2, 3]));
        assert_eq!(report.sides[0].step_ns, [100_000_000; 3]);
        assert!((report.sides[0].slots_per_s.unwrap().value - 500.0).abs() < 1e-6);
        assert!(report.sides[0].this_over_first.is_none());
        assert!((report.sides[1].this_over_first.unwrap().value - 1.5).abs() < 1e-9);
        assert_eq!((report.sides[1].peak_bytes, report.sides[1].last_loss), (Some(4_000_000), 4.0));
        assert!(train_text(&report).contains("1.50 [1.50, 1.50]"), "{}", train_text(&report));
    }
}
