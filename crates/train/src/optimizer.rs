//! AdamW with global-norm clipping, and the learning-rate schedule in closed form [eagle3 §6].
//!
//! Ranks may share the moments ([`AdamW::sharded`]): each has those of its [`Slices`], and what comes out is the same.

use std::ops::Range;
use std::time::{Duration, Instant};

use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::AdamStep;
use draftsmith_model::tape::{ParamId, Tape};

use crate::device_sums::join_slices;
use crate::{Collective, Slices, TrainError};

/// Learning rate as a function of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LrSchedule {
    /// Rise, then half a cosine down to 0.
    Cosine,
    /// Rise, then constant.
    Constant,
}

impl LrSchedule {
    /// Learning rate of step `n` (from 0) of `total`, the first `floor(warmup_ratio · total)` of which rise.
    ///
    /// The reference's nested scheduler gives a slightly larger value after the rise [eagle3 §11]; this is the
    /// formula it means.
    pub fn lr(self, peak: f64, warmup_ratio: f64, total: u64, n: u64) -> f64 {
        let warmup = (warmup_ratio * total as f64) as u64;
        if n < warmup {
            return peak * (n + 1) as f64 / warmup as f64;
        }
        match self {
            LrSchedule::Constant => peak,
            LrSchedule::Cosine => {
                let progress = (n - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
                peak * 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
            }
        }
    }
}

/// Settings of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global L2 norm.
    pub max_grad_norm: f64,
}

impl Default for AdamWOptions {
    fn default() -> AdamWOptions {
        AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.5 }
    }
}

/// Which of a parameter's two moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The running mean of the gradient.
    First,
    /// That of its square.
    Second,
}

/// Moments of one parameter, of the values that this process owns.
struct Moments<B> {
    id: ParamId,
    own: Range<usize>,
    first: B,
    second: B,
}

/// Moments of every trained parameter; of this rank's slices alone where ranks share them.
pub struct AdamW<K: TrainKernels> {
    options: AdamWOptions,
    /// Steps taken.
    steps: u64,
    moments: Vec<Moments<K::Buf>>,
    slices: Option<Slices>,
}

impl<K: TrainKernels> AdamW<K> {
    /// Zero moments for the trained parameters of a tape.
    pub fn new(options: AdamWOptions, tape: &Tape<K>) -> AdamW<K> {
        AdamW::with(options, tape, None)
    }

    /// The same, of which this process has its slices alone. All processes of the collective that was cut for make the same
    /// steps together, by [`AdamW::step_among`].
    pub fn sharded(options: AdamWOptions, tape: &Tape<K>, slices: Slices) -> AdamW<K> {
        AdamW::with(options, tape, Some(slices))
    }

    fn with(options: AdamWOptions, tape: &Tape<K>, slices: Option<Slices>) -> AdamW<K> {
        let of = |(place, id): (usize, ParamId)| {
            let len = tape.param(id).numel();
            let own = slices.map_or(0..len, |slices| slices.mine(place, len));
            let zeros = || tape.kernels().zeros(own.len());
            Moments { id, first: zeros(), second: zeros(), own }
        };
        let moments = tape.trained().into_iter().enumerate().map(of).collect();
        AdamW { options, steps: 0, moments, slices }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// How parameters are cut, where ranks share the moments.
    pub fn slices(&self) -> Option<&Slices> {
        self.slices.as_ref()
    }

    /// Bytes of moments that this process has.
    pub fn moment_bytes(&self) -> u64 {
        self.moments.iter().map(|moments| 8 * moments.own.len() as u64).sum()
    }

    /// One step with the accumulated gradients divided by `divisor`; clears them. Returns the global gradient norm
    /// before clipping.
    ///
    /// # Errors
    /// If that norm is not finite; weights and moments are then unchanged.
    ///
    /// # Panics
    /// If ranks share the moments.
    pub fn step(&mut self, tape: &mut Tape<K>, lr: f64, divisor: f64) -> Result<f64, TrainError> {
        assert!(self.slices.is_none(), "moments that ranks share are stepped together");
        let norm = tape.grad_norm() / divisor;
        let step = self.adam_step(norm, lr, divisor)?;
        for Moments { id, first, second, .. } in &mut self.moments {
            tape.adamw(*id, step, first, second);
        }
        tape.clear_grads();
        Ok(norm)
    }

    /// [`AdamW::step`] by all ranks. Where they share the moments, the gradients of this rank's slices are whole sums; it updates
    /// those, and gets the updated values of the others. Norm and weights have the bits of [`AdamW::step`]. Returns the seconds
    /// that getting them took beside the norm.
    ///
    /// # Errors
    /// As [`AdamW::step`], on every rank.
    pub fn step_among(
        &mut self,
        tape: &mut Tape<K>,
        (lr, divisor): (f64, f64),
        collective: &dyn Collective,
    ) -> Result<(f64, f64), TrainError> {
        let Some(slices) = self.slices else { return Ok((self.step(tape, lr, divisor)?, 0.0)) };
        // Copied twice, so that no more than one slice of them is held beside the gradients.
        let grad = |tape: &Tape<K>, of: &Moments<K::Buf>| own_part(tape, (of.id, &of.own), Side::Gradient);
        let squares = |of: &Moments<K::Buf>| {
            tape.kernels().square_sums(&[(&grad(tape, of), of.own.len())]).swap_remove(0)
        };
        let squares: Vec<Vec<f64>> = self.moments.iter().map(squares).collect();
        let lens: Vec<usize> = self.moments.iter().map(|of| tape.param(of.id).numel()).collect();
        let norm = slices.norm(collective, &squares, &lens) / divisor;
        let step = self.adam_step(norm, lr, divisor)?;
        let mut joining = Duration::ZERO;
        for (place, of) in self.moments.iter_mut().enumerate() {
            let len = of.own.len();
            let mut weights = own_part(tape, (of.id, &of.own), Side::Value);
            if len > 0 {
                let grad = grad(tape, of);
                tape.kernels().adamw(step, len, &mut weights, &grad, (&mut of.first, &mut of.second));
            }
            joining += join(tape, (of.id, &of.own), &weights, &slices.of(place, lens[place]), collective);
        }
        tape.clear_grads();
        Ok((norm, joining.as_secs_f64()))
    }

    /// The next step, for gradients of this norm.
    fn adam_step(&mut self, norm: f64, lr: f64, divisor: f64) -> Result<AdamStep, TrainError> {
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: self.steps, loss: f64::NAN, grad_norm: norm });
        }
        let clip = (self.options.max_grad_norm / (norm + 1e-6)).min(1.0);
        self.steps += 1;
        Ok(AdamStep {
            lr: lr as f32,
            beta1: self.options.beta1 as f32,
            beta2: self.options.beta2 as f32,
            eps: self.options.eps as f32,
            weight_decay: self.options.weight_decay as f32,
            grad_scale: (clip / divisor) as f32,
            step: self.steps,
        })
    }

    /// A moment of the trained parameter at a place, whole. Where ranks share the moments all of them call this, and rank 0 alone
    /// gets it.
    pub fn moment(
        &self,
        tape: &Tape<K>,
        (place, which): (usize, Moment),
        collective: &dyn Collective,
    ) -> Option<Vec<f32>> {
        let of = &self.moments[place];
        let mut own = vec![0.0; of.own.len()];
        let buf = match which {
            Moment::First => &of.first,
            Moment::Second => &of.second,
        };
        tape.kernels().download(buf, 0, &mut own);
        match &self.slices {
            None => Some(own),
            Some(slices) => collective.hand_in_slices(&own, &slices.of(place, tape.param(of.id).numel())),
        }
    }

    /// Restores what [`AdamW::moment`] gave; each rank keeps its own of it.
    ///
    /// # Panics
    /// If the parameter is not so long.
    pub fn set_moment(&mut self, tape: &Tape<K>, (place, which): (usize, Moment), whole: &[f32]) {
        let of = &mut self.moments[place];
        assert_eq!(whole.len(), tape.param(of.id).numel(), "one moment for each value");
        let buf = match which {
            Moment::First => &mut of.first,
            Moment::Second => &mut of.second,
        };
        tape.kernels().write(buf, &whole[of.own.clone()]);
    }

    /// Goes on after so many steps.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }
}

/// What of a parameter is meant.
#[derive(Clone, Copy)]
enum Side {
    Value,
    Gradient,
}

/// A copy of a part of a parameter, or of its gradient: on the device where it has peers, else over the host.
fn own_part<K: TrainKernels>(tape: &Tape<K>, (id, own): (ParamId, &Range<usize>), side: Side) -> K::Buf {
    let kernels = tape.kernels();
    let Some(peers) = kernels.peers() else {
        return kernels.upload(&match side {
            Side::Value => tape.param_part(id, own.clone()),
            Side::Gradient => tape.grad_part(id, own.clone()),
        });
    };
    let whole = match side {
        Side::Value => tape.param_buf(id),
        Side::Gradient => tape.grad_buf(id),
    };
    let mut part = kernels.scratch(own.len());
    peers.copy((whole, own.start), (&mut part, 0), own.len(), false);
    part
}

/// Puts a parameter together from what each rank has of it, `own` values here. Returns the time of the exchange.
fn join<K: TrainKernels>(
    tape: &mut Tape<K>,
    (id, own): (ParamId, &Range<usize>),
    weights: &K::Buf,
    slices: &[Range<usize>],
    collective: &dyn Collective,
) -> Duration {
    let (kernels, value) = tape.param_buf_mut(id);
    if let Some(peers) = kernels.peers() {
        peers.copy((weights, 0), (value, own.start), own.len(), false);
        let began = Instant::now();
        collective.count_sent(join_slices(peers, value, slices, collective.rank()));
        return began.elapsed();
    }
    let mut values = vec![0.0; own.len()];
    if !values.is_empty() {
        kernels.download(weights, 0, &mut values);
    }
    let began = Instant::now();
    let whole = collective.join_slices(&values, slices);
    let took = began.elapsed();
    tape.set_param(id, &whole);
    took
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_rises_to_the_peak_and_falls_to_zero() {
        let lr = |n| LrSchedule::Cosine.lr(1.0, 0.2, 20, n);
        assert_eq!((lr(0), lr(3), lr(4)), (0.25, 1.0, 1.0));
        assert!((lr(12) - 0.5).abs() < 1e-12);
        assert!(lr(19) > 0.0 && lr(19) < 0.01 && lr(20) < 1e-12);
        assert_eq!(LrSchedule::Constant.lr(1.0, 0.2, 20, 19), 1.0);
        assert_eq!(LrSchedule::Cosine.lr(1.0, 0.0, 1, 0), 1.0);
    }
}
