//! Row-wise operations of training and their gradients: norms, RoPE, gating, sums, column and row copies.
//!
//! Shape legend: `R` rows, `C` row width.

use super::par::{LANES, Shared, fold_lanes, par_ranges, simd, sum2};
use crate::{Activation, RopeTable};

/// Rows per task; also the fixed partial of the weight gradient of a norm.
const ROWS: usize = 64;
/// Values per task of flat operations.
const FLAT: usize = 1 << 15;

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum2(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

/// `y = x * rsqrt(mean(x²) + eps) * weight` over rows of `width`.
pub fn rms_norm(
    threads: usize,
    x: &[f32],
    weight: &[f32],
    rows: usize,
    width: usize,
    eps: f32,
    y: &mut [f32],
) {
    let (x, w, y) = (&x[..rows * width], &weight[..width], Shared::new(&mut y[..rows * width]));
    par_ranges(threads, rows, ROWS, |r| {
        // SAFETY: row ranges of tasks are disjoint.
        let y = unsafe { y.range(r.start * width..r.end * width) };
        simd(
            #[inline(always)]
            || {
                for (x, y) in
                    x[r.start * width..r.end * width].chunks_exact(width).zip(y.chunks_exact_mut(width))
                {
                    let scale = inverse_rms(x, eps);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                        *y = x * scale * w;
                    }
                }
            },
        );
    });
}

/// Operands of [`rms_norm_grad`].
#[derive(Clone, Copy)]
pub struct NormGrad<'a> {
    /// `[R, C]` input of the norm.
    pub x: &'a [f32],
    /// `[C]`
    pub weight: &'a [f32],
    /// `[R, C]` gradient of the output.
    pub dy: &'a [f32],
    /// `R`
    pub rows: usize,
    /// `C`
    pub width: usize,
    /// As in the forward pass.
    pub eps: f32,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
}

/// Gradient of [`rms_norm`]: `dx` of the input and, if wanted, `dweight +=`.
pub fn rms_norm_grad(threads: usize, g: NormGrad<'_>, dx: Option<&mut [f32]>, dweight: Option<&mut [f32]>) {
    let (rows, width) = (g.rows, g.width);
    let tasks = rows.div_ceil(ROWS);
    let mut partial = vec![0.0f32; if dweight.is_some() { tasks * width } else { 0 }];
    let partials = Shared::new(&mut partial);
    let want_dw = dweight.is_some();
    let dx = dx.map(|dx| Shared::new(&mut dx[..rows * width]));
    par_ranges(threads, rows, ROWS, |r| {
        // SAFETY: row ranges and task numbers of tasks are disjoint.
        let (mut dx, dw) = unsafe {
            let task = r.start / ROWS;
            let dw = if want_dw { partials.range(task * width..(task + 1) * width) } else { &mut [][..] };
            (dx.as_ref().map(|dx| dx.range(r.start * width..r.end * width)), dw)
        };
        simd(
            #[inline(always)]
            || {
                let w = &g.weight[..width];
                for (i, row) in r.clone().enumerate() {
                    let x = &g.x[row * width..(row + 1) * width];
                    let dy = &g.dy[row * width..(row + 1) * width];
                    let scale = inverse_rms(x, g.eps);
                    if want_dw {
                        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                            *dw += dy * x * scale;
                        }
                    }
                    let Some(dx) = dx.as_mut() else { continue };
                    // mean(w dy x̂): the part of the gradient that goes through the root mean square
                    let mut acc = [0.0f32; LANES];
                    let lanes = width / LANES * LANES;
                    for c in (0..lanes).step_by(LANES) {
                        for l in 0..LANES {
                            acc[l] += w[c + l] * dy[c + l] * x[c + l];
                        }
                    }
                    for c in lanes..width {
                        acc[c - lanes] += w[c] * dy[c] * x[c];
                    }
                    let through = fold_lanes(acc) * scale * scale / width as f32;
                    let dx = &mut dx[i * width..(i + 1) * width];
                    if g.accumulate {
                        for c in 0..width {
                            dx[c] += scale * (w[c] * dy[c] - x[c] * through);
                        }
                    } else {
                        for c in 0..width {
                            dx[c] = scale * (w[c] * dy[c] - x[c] * through);
                        }
                    }
                }
            },
        );
    });
    if let Some(dweight) = dweight {
        for part in partial.chunks_exact(width) {
            add(&mut dweight[..width], part);
        }
    }
}

#[inline(always)]
fn add(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// RoPE of all heads of each row, or its inverse (which is its gradient). `x` and `y`: `[R, heads * head_dim]`.
#[allow(clippy::too_many_arguments, reason = "the operands of one operation")]
pub fn rotate(
    threads: usize,
    x: &[f32],
    table: &RopeTable,
    positions: &[u32],
    heads: usize,
    inverse: bool,
    accumulate: bool,
    y: &mut [f32],
) {
    let (hd, half) = (table.head_dim(), table.head_dim() / 2);
    let (rows, width) = (positions.len(), heads * hd);
    let (x, y) = (&x[..rows * width], Shared::new(&mut y[..rows * width]));
    par_ranges(threads, rows, ROWS, |r| {
        // SAFETY: row ranges of tasks are disjoint.
        let y = unsafe { y.range(r.start * width..r.end * width) };
        for (i, row) in r.clone().enumerate() {
            let (cos, sin) = table.angles(positions[row]);
            let turn = if inverse { -1.0 } else { 1.0 };
            simd(
                #[inline(always)]
                || {
                    for head in 0..heads {
                        let (xa, xb) = x[row * width + head * hd..][..hd].split_at(half);
                        let (ya, yb) = y[i * width + head * hd..][..hd].split_at_mut(half);
                        for j in 0..half {
                            let (a, b) = (xa[j], xb[j]);
                            let sin = turn * sin[j];
                            let (ra, rb) = (a * cos[j] - b * sin, b * cos[j] + a * sin);
                            ya[j] = if accumulate { ya[j] + ra } else { ra };
                            yb[j] = if accumulate { yb[j] + rb } else { rb };
                        }
                    }
                },
            );
        }
    });
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + super::par::exp(-x))
}

/// What the activation takes of both inputs, and whether they pass a gradient on.
#[inline(always)]
fn clamped(activation: Activation, gate: f32, up: f32) -> ((f32, f32), (bool, bool)) {
    match activation {
        Activation::Silu | Activation::GeluTanh => ((gate, up), (true, true)),
        Activation::ClampedSwiglu { limit, .. } => {
            let passes = (gate <= limit, up.abs() <= limit);
            // Comparisons that leave NaN as it is.
            let gate = if gate > limit { limit } else { gate };
            let up = if up.abs() > limit { limit.copysign(up) } else { up };
            ((gate, up + 1.0), passes)
        }
    }
}

/// Value and derivative of the activation.
#[inline(always)]
fn activate(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::ClampedSwiglu { alpha, .. } => {
            let s = sigmoid(alpha * x);
            (x * s, s + alpha * x * s * (1.0 - s))
        }
        Activation::Silu => {
            let s = sigmoid(x);
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::GeluTanh => {
            // 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x³)
            const K: f32 = 1.595_769_2;
            let s = sigmoid(K * (x + 0.044_715 * x * x * x));
            (x * s, s + x * s * (1.0 - s) * K * (1.0 + 3.0 * 0.044_715 * x * x))
        }
    }
}

/// `y = act(gate) * up` over `len` values.
pub fn gated(threads: usize, activation: Activation, gate: &[f32], up: &[f32], len: usize, y: &mut [f32]) {
    let y = Shared::new(&mut y[..len]);
    par_ranges(threads, len, FLAT, |r| {
        // SAFETY: ranges of tasks are disjoint.
        let y = unsafe { y.range(r.clone()) };
        simd(
            #[inline(always)]
            || {
                for ((y, g), u) in y.iter_mut().zip(&gate[r.clone()]).zip(&up[r]) {
                    let ((g, u), _) = clamped(activation, *g, *u);
                    *y = activate(activation, g).0 * u;
                }
            },
        );
    });
}

/// Gradient of [`gated`], overwriting `dgate` and `dup`.
pub fn gated_grad(
    threads: usize,
    activation: Activation,
    (gate, up): (&[f32], &[f32]),
    dy: &[f32],
    len: usize,
    (dgate, dup): (&mut [f32], &mut [f32]),
) {
    let (dgate, dup) = (Shared::new(&mut dgate[..len]), Shared::new(&mut dup[..len]));
    par_ranges(threads, len, FLAT, |r| {
        // SAFETY: ranges of tasks are disjoint.
        let (dgate, dup) = unsafe { (dgate.range(r.clone()), dup.range(r.clone())) };
        simd(
            #[inline(always)]
            || {
                let (gate, up, dy) = (&gate[r.clone()], &up[r.clone()], &dy[r]);
                for i in 0..dy.len() {
                    let ((gate, up), (gate_passes, up_passes)) = clamped(activation, gate[i], up[i]);
                    let (value, slope) = activate(activation, gate);
                    dgate[i] = if gate_passes { dy[i] * up * slope } else { 0.0 };
                    dup[i] = if up_passes { dy[i] * value } else { 0.0 };
                }
            },
        );
    });
}

/// `y = a + b` over `len` values.
pub fn sum(threads: usize, a: &[f32], b: &[f32], len: usize, y: &mut [f32]) {
    let y = Shared::new(&mut y[..len]);
    par_ranges(threads, len, FLAT, |r| {
        // SAFETY: ranges of tasks are disjoint.
        let y = unsafe { y.range(r.clone()) };
        simd(
            #[inline(always)]
            || {
                for ((y, a), b) in y.iter_mut().zip(&a[r.clone()]).zip(&b[r]) {
                    *y = a + b;
                }
            },
        );
    });
}

/// Zeros.
pub fn clear(threads: usize, y: &mut [f32]) {
    let (len, y) = (y.len(), Shared::new(y));
    par_ranges(threads, len, FLAT, |r| {
        // SAFETY: ranges of tasks are disjoint.
        unsafe { y.range(r) }.fill(0.0);
    });
}

/// `dst (+)= src` over `len` values.
pub fn add_to(threads: usize, src: &[f32], len: usize, accumulate: bool, dst: &mut [f32]) {
    let dst = Shared::new(&mut dst[..len]);
    par_ranges(threads, len, FLAT, |r| {
        // SAFETY: ranges of tasks are disjoint.
        let dst = unsafe { dst.range(r.clone()) };
        if accumulate {
            simd(
                #[inline(always)]
                || add(dst, &src[r]),
            );
        } else {
            dst.copy_from_slice(&src[r]);
        }
    });
}

/// Columns `from..` of a matrix that is `stride` wide.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Full row width.
    pub stride: usize,
    /// First column.
    pub from: usize,
}

/// `dst[:, to..to + width] (+)= src[:, from..from + width]`
pub fn copy_cols(
    threads: usize,
    (src, from): (&[f32], Columns),
    (dst, to): (&mut [f32], Columns),
    rows: usize,
    width: usize,
    accumulate: bool,
) {
    let dst = Shared::new(&mut dst[..rows * to.stride]);
    par_ranges(threads, rows, ROWS, |r| {
        for row in r {
            let src = &src[row * from.stride + from.from..][..width];
            // SAFETY: rows of tasks are disjoint.
            let dst = unsafe { dst.range(row * to.stride + to.from..row * to.stride + to.from + width) };
            if accumulate { add(dst, src) } else { dst.copy_from_slice(src) }
        }
    });
}

/// `y[i] = x[rows[i]]` over rows of `width`, times `scale`.
pub fn gather(threads: usize, x: &[f32], width: usize, rows: &[u32], scale: f32, y: &mut [f32]) {
    let y = Shared::new(&mut y[..rows.len() * width]);
    par_ranges(threads, rows.len(), ROWS, |r| {
        for i in r {
            let from = rows[i] as usize;
            // SAFETY: rows of tasks are disjoint.
            let y = unsafe { y.range(i * width..(i + 1) * width) };
            y.copy_from_slice(&x[from * width..(from + 1) * width]);
            if scale != 1.0 {
                y.iter_mut().for_each(|y| *y *= scale);
            }
        }
    });
}

/// `x[rows[i]] += y[i]`; `rows` strictly ascending.
pub fn scatter_add(threads: usize, y: &[f32], width: usize, rows: &[u32], x: &mut [f32]) {
    assert!(rows.windows(2).all(|w| w[0] < w[1]), "rows ascend strictly, so tasks write different rows");
    let x = Shared::new(x);
    par_ranges(threads, rows.len(), ROWS, |r| {
        for i in r {
            let to = rows[i] as usize;
            // SAFETY: rows are distinct.
            add(unsafe { x.range(to * width..(to + 1) * width) }, &y[i * width..(i + 1) * width]);
        }
    });
}

/// `x[rows[i]] += y[i] * scale`; `rows` in any order and with repeats, added up in the order of `y`.
pub fn gather_grad(threads: usize, y: &[f32], width: usize, rows: &[u32], scale: f32, x: &mut [f32]) {
    let mut order: Vec<u32> = (0..rows.len() as u32).collect();
    order.sort_by_key(|i| rows[*i as usize]);
    // One group per row of `x`.
    let groups: Vec<&[u32]> = order.chunk_by(|a, b| rows[*a as usize] == rows[*b as usize]).collect();
    let x = Shared::new(x);
    par_ranges(threads, groups.len(), 8, |r| {
        for group in &groups[r] {
            let to = rows[group[0] as usize] as usize;
            // SAFETY: every row is in one group alone.
            let x = unsafe { x.range(to * width..(to + 1) * width) };
            for i in *group {
                for (x, y) in x.iter_mut().zip(&y[*i as usize * width..(*i as usize + 1) * width]) {
                    *x += y * scale;
                }
            }
        }
    });
}
