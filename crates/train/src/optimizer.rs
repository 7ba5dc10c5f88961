//! AdamW with global-norm clipping, and the learning-rate schedule in closed form [eagle3 §6].

use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::AdamStep;
use draftsmith_model::tape::{ParamId, Tape};

use crate::TrainError;

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

/// Moments of every trained parameter.
pub struct AdamW<K: TrainKernels> {
    options: AdamWOptions,
    /// Steps taken.
    steps: u64,
    moments: Vec<(ParamId, K::Buf, K::Buf)>,
}

impl<K: TrainKernels> AdamW<K> {
    /// Zero moments for the trained parameters of a tape.
    pub fn new(options: AdamWOptions, tape: &Tape<K>) -> AdamW<K> {
        let zeros = |id: ParamId| tape.kernels().zeros(tape.param(id).numel());
        let moments = tape.trained().into_iter().map(|id| (id, zeros(id), zeros(id))).collect();
        AdamW { options, steps: 0, moments }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step with the accumulated gradients divided by `divisor`; clears them. Returns the global gradient norm
    /// before clipping.
    ///
    /// # Errors
    /// If that norm is not finite; weights and moments are then unchanged.
    pub fn step(&mut self, tape: &mut Tape<K>, lr: f64, divisor: f64) -> Result<f64, TrainError> {
        let norm = tape.grad_norm() / divisor;
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: self.steps, loss: f64::NAN, grad_norm: norm });
        }
        let clip = (self.options.max_grad_norm / (norm + 1e-6)).min(1.0);
        self.steps += 1;
        let step = AdamStep {
            lr: lr as f32,
            beta1: self.options.beta1 as f32,
            beta2: self.options.beta2 as f32,
            eps: self.options.eps as f32,
            weight_decay: self.options.weight_decay as f32,
            grad_scale: (clip / divisor) as f32,
            step: self.steps,
        };
        for (id, m, v) in &mut self.moments {
            tape.adamw(*id, step, m, v);
        }
        tape.clear_grads();
        Ok(norm)
    }

    /// Both moments of each trained parameter, by parameter name.
    pub fn state(&self, tape: &Tape<K>) -> Vec<(String, Vec<f32>, Vec<f32>)> {
        let host = |buf: &K::Buf, len: usize| {
            let mut out = vec![0.0; len];
            tape.kernels().download(buf, 0, &mut out);
            out
        };
        self.moments
            .iter()
            .map(|(id, m, v)| {
                let p = tape.param(*id);
                (p.name.clone(), host(m, p.numel()), host(v, p.numel()))
            })
            .collect()
    }

    /// Restores [`AdamW::state`] after `steps` steps.
    ///
    /// # Errors
    /// If names or sizes do not fit the tape.
    pub fn restore(
        &mut self,
        tape: &Tape<K>,
        steps: u64,
        state: &[(String, Vec<f32>, Vec<f32>)],
    ) -> Result<(), TrainError> {
        for (id, m, v) in &mut self.moments {
            let p = tape.param(*id);
            let found = state.iter().find(|s| s.0 == p.name);
            let (_, fm, fv) = found.ok_or_else(|| TrainError::MissingTensor { name: p.name.clone() })?;
            for values in [fm, fv] {
                if values.len() != p.numel() {
                    let (name, found, wanted) = (p.name.clone(), values.len(), p.numel());
                    return Err(TrainError::Tensor { name, found, wanted });
                }
            }
            tape.kernels().write(m, fm);
            tape.kernels().write(v, fv);
        }
        self.steps = steps;
        Ok(())
    }
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
