//! Row operations: norms, RoPE, gates, exponentials. Plain loops over slices, compiled per instruction set; every
//! one is element-wise or has one fixed reduction order, so the sets agree bit for bit.

use super::isa::{Isa, dispatch};
use crate::Activation;

/// `e^x` within two units in the last place for `-87 <= x <= 88`, clamped outside.
///
/// Cody-Waite reduction by `ln 2` in two parts and a polynomial of degree 6 (the series of `e^r` on
/// `|r| <= ln 2 / 2`, last coefficients adjusted for the interval).
#[expect(clippy::manual_clamp, reason = "`max` first turns NaN into the bound, `clamp` would keep it")]
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.max(-87.0).min(88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = (-n).mul_add(0.693_359_4, x);
    let r = (-n).mul_add(-2.121_944_4e-4, r);
    let p = 1.388_889e-3f32.mul_add(r, 8.333_334e-3);
    let p = p.mul_add(r, 4.166_666_8e-2);
    let p = p.mul_add(r, 1.666_666_7e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // SAFETY: -126 <= n <= 127 after clamping, also for NaN, which `max` turns into the bound.
    let n = unsafe { n.to_int_unchecked::<i32>() };
    p * f32::from_bits(((n + 127) << 23) as u32)
}

/// Hyperbolic tangent within a few units in the last place.
///
/// Near zero an odd polynomial (fitted to the smallest relative error on |x| < 0.625, 4.4e-9), else from [`exp`]: there
/// the difference from one loses nothing.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = a * a;
    let p = (-5.704_986_3e-3f32).mul_add(z, 2.063_908_7e-2);
    let p = p.mul_add(z, -5.373_971_5e-2);
    let p = p.mul_add(z, 1.333_144_2e-1);
    let p = p.mul_add(z, -3.333_328e-1);
    let small = (p * z).mul_add(a, a);
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    (if a < 0.625 { small } else { large }).copysign(x)
}

/// `cap tanh(x / cap)`.
#[inline(always)]
pub(crate) fn capped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[derive(Clone, Copy)]
pub(crate) struct CapArgs {
    pub x: *mut f32,
    pub len: usize,
    pub cap: f32,
}

#[inline(always)]
unsafe fn softcap_body<I: Isa>(a: CapArgs) {
    // SAFETY: the array holds `len` values.
    for v in unsafe { std::slice::from_raw_parts_mut(a.x, a.len) } {
        *v = capped(*v, a.cap);
    }
}
dispatch! { pub(crate) unsafe fn softcap(a: CapArgs) = softcap_body }

#[derive(Clone, Copy)]
pub(crate) struct NormArgs {
    pub x: *const f32,
    pub weight: *const f32,
    pub width: usize,
    pub groups: usize,
    pub eps: f32,
    pub y: *mut f32,
}

#[inline(always)]
unsafe fn rms_norm_body<I: Isa>(a: NormArgs) {
    // SAFETY: the caller's arrays hold `groups * width` values and `width` weights.
    let (x, weight, y) = unsafe {
        (
            std::slice::from_raw_parts(a.x, a.groups * a.width),
            std::slice::from_raw_parts(a.weight, a.width),
            std::slice::from_raw_parts_mut(a.y, a.groups * a.width),
        )
    };
    for (x, y) in x.chunks_exact(a.width).zip(y.chunks_exact_mut(a.width)) {
        let mut lanes = [0.0f32; 16];
        let mut chunks = x.chunks_exact(16);
        for chunk in &mut chunks {
            for (l, v) in lanes.iter_mut().zip(chunk) {
                *l = v.mul_add(*v, *l);
            }
        }
        for (l, v) in lanes.iter_mut().zip(chunks.remainder()) {
            *l = v.mul_add(*v, *l);
        }
        let inv = 1.0 / (sum_lanes(&lanes) / a.width as f32 + a.eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = (x * inv) * w;
        }
    }
}
dispatch! { pub(crate) unsafe fn rms_norm(a: NormArgs) = rms_norm_body }

/// Sixteen lanes in one fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &[f32; 16]) -> f32 {
    let mut v = *lanes;
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            v[i] += v[i + width];
        }
        width /= 2;
    }
    v[0]
}

#[derive(Clone, Copy)]
pub(crate) struct GateArgs {
    pub gate: *mut f32,
    pub up: *const f32,
    pub len: usize,
    pub activation: Activation,
}

#[inline(always)]
unsafe fn gated_body<I: Isa>(a: GateArgs) {
    // SAFETY: both arrays hold `len` values.
    let (gate, up) =
        unsafe { (std::slice::from_raw_parts_mut(a.gate, a.len), std::slice::from_raw_parts(a.up, a.len)) };
    match a.activation {
        Activation::Silu => {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = *g / (1.0 + exp(-*g)) * u;
            }
        }
        Activation::GeluTanh => {
            for (g, u) in gate.iter_mut().zip(up) {
                // 0.5 (1 + tanh t) = sigmoid(2 t)
                let t = 0.797_884_6 * (0.044_715 * *g * *g).mul_add(*g, *g);
                *g = *g / (1.0 + exp(-2.0 * t)) * u;
            }
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            for (g, u) in gate.iter_mut().zip(up) {
                // Comparisons that leave NaN as it is.
                let x = if *g > limit { limit } else { *g };
                let u = if *u > limit { limit } else { *u };
                let u = if u < -limit { -limit } else { u };
                *g = x / (1.0 + exp(-alpha * x)) * (u + 1.0);
            }
        }
    }
}
dispatch! { pub(crate) unsafe fn gated(a: GateArgs) = gated_body }

#[derive(Clone, Copy)]
pub(crate) struct RopeArgs {
    pub x: *mut f32,
    pub heads: usize,
    pub half: usize,
    pub cos: *const f32,
    pub sin: *const f32,
}

/// One row.
#[inline(always)]
unsafe fn rope_body<I: Isa>(a: RopeArgs) {
    // SAFETY: the row holds `heads * 2 * half` values, the tables `half`.
    let (x, cos, sin) = unsafe {
        (
            std::slice::from_raw_parts_mut(a.x, a.heads * 2 * a.half),
            std::slice::from_raw_parts(a.cos, a.half),
            std::slice::from_raw_parts(a.sin, a.half),
        )
    };
    for head in x.chunks_exact_mut(2 * a.half) {
        let (first, second) = head.split_at_mut(a.half);
        for (((p, q), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*p, *q) = (*p * c - *q * s, *q * c + *p * s);
        }
    }
}
dispatch! { pub(crate) unsafe fn rope(a: RopeArgs) = rope_body }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_true_value() {
        let mut worst = 0.0f64;
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            let (found, wanted) = (f64::from(exp(x)), f64::from(x).exp());
            worst = worst.max(((found - wanted) / wanted).abs());
        }
        assert!(worst < 3.0e-7, "relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn tanh_is_close_to_the_true_value() {
        let mut worst = 0.0f64;
        for i in 1..20_000 {
            let x = i as f32 * 0.001;
            let wanted = f64::from(x).tanh();
            worst = worst.max(((f64::from(tanh(x)) - wanted) / wanted).abs());
            assert_eq!(tanh(-x), -tanh(x));
        }
        assert!(worst < 3.0e-7, "relative error {worst}");
        assert_eq!((tanh(0.0), tanh(1e30), tanh(-1e30)), (0.0, 1.0, -1.0));
    }
}
