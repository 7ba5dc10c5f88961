//! AdamW on f32 values, and the sums that clipping needs.

use super::par::{LANES, Shared, fold_lanes, par_ranges, simd};

/// Values of a task, and of one of the [`square_sums`].
pub const CHUNK: usize = 1 << 14;

/// Settings of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled decay: weights shrink by `lr * weight_decay`.
    pub weight_decay: f32,
    /// Gradients are multiplied by this first (clipping, loss normalisation).
    pub grad_scale: f32,
    /// Number of this step, from 1.
    pub step: u64,
}

/// What a step multiplies with, bias corrections included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamFactors {
    /// Of the first moment.
    pub step_size: f32,
    /// Of the root of the second moment.
    pub inverse_root: f32,
    /// Of the weight.
    pub keep: f32,
}

impl AdamStep {
    /// The factors of this step.
    pub fn factors(&self) -> AdamFactors {
        let power = |beta: f32| 1.0 - f64::from(beta).powi(i32::try_from(self.step).unwrap_or(i32::MAX));
        AdamFactors {
            step_size: (f64::from(self.lr) / power(self.beta1)) as f32,
            inverse_root: (1.0 / power(self.beta2).sqrt()) as f32,
            keep: (1.0 - f64::from(self.lr) * f64::from(self.weight_decay)) as f32,
        }
    }
}

/// One AdamW step in place: weights `w`, first and second moments `m` and `v`, gradient `g`, all of one length.
pub fn adamw(threads: usize, s: AdamStep, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let len = w.len();
    assert!(g.len() >= len && m.len() == len && v.len() == len, "one gradient and two moments per weight");
    let AdamFactors { step_size, inverse_root, keep } = s.factors();
    let (w, m, v) = (Shared::new(w), Shared::new(m), Shared::new(v));
    par_ranges(threads, len, CHUNK, |r| {
        // SAFETY: ranges of tasks are disjoint.
        let (w, m, v) = unsafe { (w.range(r.clone()), m.range(r.clone()), v.range(r.clone())) };
        let g = &g[r];
        simd(
            #[inline(always)]
            || {
                for i in 0..g.len() {
                    let g = g[i] * s.grad_scale;
                    m[i] += (1.0 - s.beta1) * (g - m[i]);
                    v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
                    w[i] = w[i] * keep - step_size * m[i] / (v[i].sqrt() * inverse_root + s.eps);
                }
            },
        );
    });
}

/// `Σ x²` of each [`CHUNK`] of values; their sum, in order, is that of all.
pub fn square_sums(threads: usize, x: &[f32]) -> Vec<f64> {
    let mut parts = vec![0.0f64; x.len().div_ceil(CHUNK)];
    let shared = Shared::new(&mut parts);
    par_ranges(threads, x.len(), CHUNK, |r| {
        let task = r.start / CHUNK;
        let sum = simd(
            #[inline(always)]
            || {
                let mut total = 0.0f64;
                for block in x[r.clone()].chunks(1024) {
                    let mut acc = [0.0f32; LANES];
                    let (chunks, rest) = block.as_chunks::<LANES>();
                    for x in chunks {
                        for i in 0..LANES {
                            acc[i] += x[i] * x[i];
                        }
                    }
                    for (i, x) in rest.iter().enumerate() {
                        acc[i] += x * x;
                    }
                    total += f64::from(fold_lanes(acc));
                }
                total
            },
        );
        // SAFETY: task numbers are distinct.
        unsafe { shared.range(task..task + 1)[0] = sum };
    });
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn sum_of_squares_does_not_depend_on_threads() {
        let x = noise(1, 100_003);
        let bits = |threads| square_sums(threads, &x).iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(1).len(), 7);
        assert_eq!(bits(1), bits(2));
    }
}
