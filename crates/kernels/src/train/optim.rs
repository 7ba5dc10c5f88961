//! AdamW on f32 values, and the sums that clipping needs.

use super::par::{LANES, Shared, fold_lanes, par_ranges, simd};

const CHUNK: usize = 1 << 14;

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

/// One AdamW step in place: weights `w`, first and second moments `m` and `v`, gradient `g`, all of one length.
pub fn adamw(threads: usize, s: AdamStep, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let len = w.len();
    assert!(g.len() >= len && m.len() == len && v.len() == len, "one gradient and two moments per weight");
    let power = |beta: f32| 1.0 - f64::from(beta).powi(i32::try_from(s.step).unwrap_or(i32::MAX));
    let (c1, c2) = (power(s.beta1), power(s.beta2).sqrt());
    let step_size = (f64::from(s.lr) / c1) as f32;
    let inverse_c2 = (1.0 / c2) as f32;
    let keep = (1.0 - f64::from(s.lr) * f64::from(s.weight_decay)) as f32;
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
                    w[i] = w[i] * keep - step_size * m[i] / (v[i].sqrt() * inverse_c2 + s.eps);
                }
            },
        );
    });
}

/// `Σ x²`, in double precision across chunks.
pub fn sum_squares(threads: usize, x: &[f32]) -> f64 {
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
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::testing::{close, noise};

    #[test]
    fn adamw_follows_the_textbook_for_three_steps() {
        let n = 40_000;
        let (mut w, mut m, mut v) = (noise(1, n), vec![0.0; n], vec![0.0; n]);
        let mut plain: Vec<(f64, f64, f64)> = w.iter().map(|w| (f64::from(*w), 0.0, 0.0)).collect();
        for step in 1..=3u64 {
            let g = noise(10 + step, n);
            let s = AdamStep {
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.1,
                grad_scale: 0.5,
                step,
            };
            adamw(2, s, &mut w, &g, &mut m, &mut v);
            for ((w, m, v), g) in plain.iter_mut().zip(&g) {
                let g = f64::from(*g) * 0.5;
                *w *= 1.0 - 0.01 * 0.1;
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (mh, vh) =
                    (*m / (1.0 - 0.9f64.powi(step as i32)), *v / (1.0 - 0.999f64.powi(step as i32)));
                *w -= 0.01 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (w, p) in w.iter().zip(&plain) {
            close(*w, p.0, 1e-6);
        }
    }

    #[test]
    fn sum_of_squares_does_not_depend_on_threads() {
        let x = noise(1, 100_003);
        let want: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((sum_squares(1, &x) - want).abs() < 1e-3);
        assert_eq!(sum_squares(1, &x).to_bits(), sum_squares(2, &x).to_bits());
    }
}
