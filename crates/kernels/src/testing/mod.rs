//! Checks that every implementation of the operations must pass, against double-precision formulas and difference
//! quotients. They panic where a result is wrong, as tests do.
//!
//! `rounding` is the relative error that the storage type of an implementation may add: 0 for f32. A tolerance is what
//! f32 needs, or that.

pub mod infer;
pub mod train;

use crate::{Activation, Memory};

/// The activation of gpt-oss, with a limit that inputs in -1..1 reach.
pub(crate) const CLAMPED: Activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 0.75 };

/// Reproducible values in -1..1.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let z = (state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((z >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect()
}

/// Whether a value is as near as `tolerance`, relative to one and its size.
#[track_caller]
pub fn close(found: f32, wanted: f64, tolerance: f64) {
    let error = (f64::from(found) - wanted).abs();
    // Written so that NaN fails.
    assert!(error <= tolerance * (1.0 + wanted.abs()), "found {found}, wanted {wanted}");
}

/// Compares `<grad, v>` with the central difference of `f` along three fixed directions `v`.
#[track_caller]
pub fn directional(at: &[f32], grad: &[f32], tolerance: f64, f: impl Fn(&[f64]) -> f64) {
    for seed in [11, 12, 13] {
        let v = noise(seed, at.len());
        let h = 1e-4;
        let moved = |sign: f64| -> Vec<f64> {
            at.iter().zip(&v).map(|(x, v)| f64::from(*x) + sign * h * f64::from(*v)).collect()
        };
        let wanted = (f(&moved(1.0)) - f(&moved(-1.0))) / (2.0 * h);
        let found: f64 = grad.iter().zip(&v).map(|(g, v)| f64::from(*g) * f64::from(*v)).sum();
        let scale: f64 = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt().max(1e-3);
        assert!(
            (found - wanted).abs() <= tolerance * scale,
            "gradient says {found}, difference quotient {wanted}"
        );
    }
}

/// In double precision.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// The first `len` values of a buffer.
pub fn host<K: Memory>(kernels: &K, buf: &K::Buf, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    kernels.download(buf, 0, &mut out);
    out
}
