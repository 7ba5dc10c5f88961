//! `y = x · Wᵀ` over packed weights, any number of rows.
//!
//! The reduction of one output runs over the inputs in order: float weights by one fused multiply-add per input,
//! block weights by an exact integer sum per block and one fused multiply-add per block (and one for the minima).
//! Row and panel grouping only decide which outputs are in registers together.
#![expect(
    clippy::needless_range_loop,
    reason = "rows of several arrays run together; their number is a constant"
)]

use super::isa::{Isa, Level, dispatch};
use super::pack::{Body, FloatKind, LANES, PackedWeight};
use crate::Pool;

/// Activations quantised per row in blocks of 32.
pub(crate) struct QuantRows {
    /// `[R, I]`
    quants: Vec<i8>,
    /// `[R, I / 32]`
    scales: Vec<f32>,
    /// `[R, I / 32]` sums of the quants of a block.
    sums: Vec<i32>,
    /// `[R, I / 32]` scale times sum: what a minimum is multiplied with.
    offsets: Vec<f32>,
}

struct SendPtr<T>(*mut T);
// SAFETY: tasks write disjoint parts behind the pointer.
unsafe impl<T> Sync for SendPtr<T> {}
impl<T> SendPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

#[derive(Clone, Copy)]
struct QuantizeArgs {
    x: *const f32,
    quants: *mut i8,
    scales: *mut f32,
    sums: *mut i32,
    offsets: *mut f32,
    blocks: usize,
}

#[expect(clippy::manual_clamp, reason = "`max` first turns NaN into the bound, `clamp` would keep it")]
#[inline(always)]
unsafe fn quantize_body<I: Isa>(a: QuantizeArgs) {
    for b in 0..a.blocks {
        // SAFETY: the caller's arrays hold `blocks` blocks.
        let (x, q) =
            unsafe { (&*a.x.add(b * 32).cast::<[f32; 32]>(), &mut *a.quants.add(b * 32).cast::<[i8; 32]>()) };
        let mut lanes = [0.0f32; 16];
        for i in 0..16 {
            lanes[i] = x[i].abs().max(x[i + 16].abs());
        }
        let max = lanes.iter().fold(0.0f32, |m, v| m.max(*v));
        let scale = max / 127.0;
        let inv = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut sum = 0i32;
        for i in 0..32 {
            // `max` before `min` turns NaN into -127, so the cast is defined.
            let v = (x[i] * inv).round_ties_even().max(-127.0).min(127.0);
            // SAFETY: -127 <= v <= 127.
            let v = unsafe { v.to_int_unchecked::<i32>() };
            q[i] = v as i8;
            sum += v;
        }
        // SAFETY: as above.
        unsafe {
            *a.scales.add(b) = scale;
            *a.sums.add(b) = sum;
            *a.offsets.add(b) = scale * sum as f32;
        }
    }
}
dispatch! { unsafe fn quantize(a: QuantizeArgs) = quantize_body }

impl QuantRows {
    pub(crate) fn new(level: Level, pool: &Pool, x: &[f32], rows: usize, in_features: usize) -> QuantRows {
        let blocks = in_features / 32;
        let mut out = QuantRows {
            quants: vec![0; rows * in_features],
            scales: vec![0.0; rows * blocks],
            sums: vec![0; rows * blocks],
            offsets: vec![0.0; rows * blocks],
        };
        let (quants, scales, sums, offsets) = (
            SendPtr(out.quants.as_mut_ptr()),
            SendPtr(out.scales.as_mut_ptr()),
            SendPtr(out.sums.as_mut_ptr()),
            SendPtr(out.offsets.as_mut_ptr()),
        );
        let run = |from: usize, to: usize| {
            // SAFETY: rows `from..to` of arrays sized above; tasks take disjoint rows.
            unsafe {
                quantize(
                    level,
                    QuantizeArgs {
                        x: x.as_ptr().add(from * in_features),
                        quants: quants.get().add(from * in_features),
                        scales: scales.get().add(from * blocks),
                        sums: sums.get().add(from * blocks),
                        offsets: offsets.get().add(from * blocks),
                        blocks: (to - from) * blocks,
                    },
                );
            }
        };
        if rows < 16 {
            run(0, rows);
        } else {
            let step = rows.div_ceil(pool.threads() * 2);
            pool.run(rows.div_ceil(step), &|t| run(t * step, ((t + 1) * step).min(rows)));
        }
        out
    }
}

#[derive(Clone, Copy)]
struct PanelArgs {
    /// First record or first value of the panel.
    w: *const u8,
    panel_bytes: usize,
    /// Panels side by side from `w` on.
    panels: usize,
    in_features: usize,
    x: *const f32,
    quants: *const i8,
    scales: *const f32,
    sums: *const i32,
    offsets: *const f32,
    rows: usize,
    /// First output of the panel in the first row.
    y: *mut f32,
    y_stride: usize,
    /// Outputs from `y` on, at most `panels * 16`.
    outputs: usize,
}

/// Writes 16 outputs, or the few that exist.
#[inline(always)]
unsafe fn store_lanes<I: Isa>(y: *mut f32, count: usize, v: I::F) {
    if count >= LANES {
        // SAFETY: 16 outputs exist.
        unsafe { I::store(y, v) };
    } else {
        let mut buffer = [0.0f32; LANES];
        // SAFETY: the buffer has 16 values, `y` has `count`.
        unsafe {
            I::store(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), y, count);
        }
    }
}

#[inline(always)]
unsafe fn block_rows<
    I: Isa,
    const FOUR: bool,
    const HALF: bool,
    const TWO: bool,
    const MINS: bool,
    const ZERO: i32,
    const R: usize,
>(
    a: &PanelArgs,
    w: *const u8,
    row: usize,
    y: *mut f32,
    count: usize,
) {
    let blocks = a.in_features / 32;
    let vector = if HALF { 2 * LANES } else { 4 * LANES };
    let record = (1 + TWO as usize + MINS as usize) * vector + if FOUR { 256 } else { 512 };
    // SAFETY: module rule of `isa`; the panel has `blocks` records, the rows `blocks` blocks each.
    unsafe {
        let load = |p: *const u8| if HALF { I::load_f16(p.cast()) } else { I::load(p.cast()) };
        let mut acc = [I::splat(0.0); R];
        for b in 0..blocks {
            let base = w.add(b * record);
            let scale = load(base);
            let quants = base.add((1 + TWO as usize + MINS as usize) * vector);
            let act = |r: usize, group: usize| {
                a.quants.add((row + r) * a.in_features + b * 32 + group * 4).cast::<i32>().read_unaligned()
            };
            let mut first = [I::zero_i(); R];
            let mut second = [I::zero_i(); R];
            if FOUR {
                for j in 0..4 {
                    let bytes = I::load_w(quants.add(j * 64));
                    let (low, high) = (I::low_nibbles(bytes), I::high_nibbles(bytes));
                    for r in 0..R {
                        // Integer sums are exact, so two chains may be joined later.
                        first[r] = I::dot_u4(first[r], low, act(r, 2 * j));
                        second[r] = I::dot_u4(second[r], high, act(r, 2 * j + 1));
                    }
                }
            } else {
                for group in 0..8 {
                    let bytes = I::prepare_i8(I::load_w(quants.add(group * 64)));
                    for r in 0..R {
                        if if TWO { group >= 4 } else { group % 2 == 1 } {
                            second[r] = I::dot_i8(second[r], bytes, act(r, group));
                        } else {
                            first[r] = I::dot_i8(first[r], bytes, act(r, group));
                        }
                    }
                }
            }
            for r in 0..R {
                let at = (row + r) * blocks + b;
                let act_sum = *a.sums.add(at);
                let act_scale_v = I::splat(*a.scales.add(at));
                if TWO {
                    // Two groups of 16: the bias of the second half is its own sum.
                    let mut half_sum = 0i32;
                    for i in 0..16 {
                        half_sum += i32::from(*a.quants.add((row + r) * a.in_features + b * 32 + i));
                    }
                    let d0 = I::sub_i(first[r], I::I8_BIAS * half_sum);
                    let d1 = I::sub_i(second[r], I::I8_BIAS * (act_sum - half_sum));
                    acc[r] = I::fma(I::mul(scale, act_scale_v), I::to_f(d0), acc[r]);
                    let scale1 = load(base.add(vector));
                    acc[r] = I::fma(I::mul(scale1, act_scale_v), I::to_f(d1), acc[r]);
                } else {
                    let bias = if FOUR { ZERO } else { I::I8_BIAS };
                    let both = I::add_i(first[r], second[r]);
                    let dot = if bias == 0 { both } else { I::sub_i(both, bias * act_sum) };
                    acc[r] = I::fma(I::mul(scale, act_scale_v), I::to_f(dot), acc[r]);
                }
                if MINS {
                    let min = load(base.add((1 + TWO as usize) * vector));
                    acc[r] = I::fma(min, I::splat(*a.offsets.add(at)), acc[r]);
                }
            }
        }
        for (r, v) in acc.into_iter().enumerate() {
            store_lanes::<I>(y.add((row + r) * a.y_stride), count, v);
        }
    }
}

#[inline(always)]
unsafe fn block_body<
    I: Isa,
    const FOUR: bool,
    const HALF: bool,
    const TWO: bool,
    const MINS: bool,
    const ZERO: i32,
>(
    a: PanelArgs,
) {
    for p in 0..a.panels {
        // SAFETY: the caller passed `panels` panels and their outputs.
        unsafe {
            let (w, y) = (a.w.add(p * a.panel_bytes), a.y.add(p * LANES));
            let count = a.outputs - p * LANES;
            let mut row = 0;
            while row < a.rows {
                match a.rows - row {
                    8.. => {
                        block_rows::<I, FOUR, HALF, TWO, MINS, ZERO, 8>(&a, w, row, y, count);
                        row += 8;
                    }
                    6..8 => {
                        block_rows::<I, FOUR, HALF, TWO, MINS, ZERO, 6>(&a, w, row, y, count);
                        row += 6;
                    }
                    4..6 => {
                        block_rows::<I, FOUR, HALF, TWO, MINS, ZERO, 4>(&a, w, row, y, count);
                        row += 4;
                    }
                    2..4 => {
                        block_rows::<I, FOUR, HALF, TWO, MINS, ZERO, 2>(&a, w, row, y, count);
                        row += 2;
                    }
                    _ => {
                        block_rows::<I, FOUR, HALF, TWO, MINS, ZERO, 1>(&a, w, row, y, count);
                        row += 1;
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn q4_0_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, true, true, false, false, 8>(a) }
}
#[inline(always)]
unsafe fn q4_1_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, true, true, false, true, 0>(a) }
}
#[inline(always)]
unsafe fn q8_0_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, false, true, false, false, 0>(a) }
}
#[inline(always)]
unsafe fn q8_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, false, false, false, false, 0>(a) }
}
#[inline(always)]
unsafe fn q4k_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, true, false, false, true, 0>(a) }
}
#[inline(always)]
unsafe fn q6k_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { block_body::<I, false, false, true, false, 0>(a) }
}
dispatch! { unsafe fn q4_0(a: PanelArgs) = q4_0_body }
dispatch! { unsafe fn q4_1(a: PanelArgs) = q4_1_body }
dispatch! { unsafe fn q8_0(a: PanelArgs) = q8_0_body }
dispatch! { unsafe fn q8(a: PanelArgs) = q8_body }
dispatch! { unsafe fn q4k(a: PanelArgs) = q4k_body }
dispatch! { unsafe fn q6k(a: PanelArgs) = q6k_body }

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// `R` rows by `P` panels in registers; one chain of fused multiply-adds per output.
#[inline(always)]
unsafe fn float_rows<I: Isa, const KIND: u8, const R: usize, const P: usize>(
    a: &PanelArgs,
    panel: usize,
    row: usize,
) {
    let size = if KIND == F32 { 4 } else { 2 };
    // SAFETY: module rule of `isa`; `P` panels from `panel` on and `R` rows from `row` on exist.
    unsafe {
        let mut acc = [[I::splat(0.0); P]; R];
        let w = a.w.add(panel * a.panel_bytes);
        for k in 0..a.in_features {
            let mut columns = [I::splat(0.0); P];
            for (p, c) in columns.iter_mut().enumerate() {
                let at = w.add(p * a.panel_bytes + k * LANES * size);
                *c = match KIND {
                    F32 => I::load(at.cast()),
                    F16 => I::load_f16(at.cast()),
                    _ => I::load_bf16(at.cast()),
                };
            }
            for r in 0..R {
                let x = I::splat(*a.x.add((row + r) * a.in_features + k));
                for p in 0..P {
                    acc[r][p] = I::fma(columns[p], x, acc[r][p]);
                }
            }
        }
        for (r, values) in acc.into_iter().enumerate() {
            for (p, v) in values.into_iter().enumerate() {
                let at = (panel + p) * LANES;
                store_lanes::<I>(a.y.add((row + r) * a.y_stride + at), a.outputs - at, v);
            }
        }
    }
}

#[inline(always)]
unsafe fn float_body<I: Isa, const KIND: u8>(a: PanelArgs) {
    let mut panel = 0;
    while panel < a.panels {
        let wide = a.panels - panel >= 4;
        let mut row = 0;
        while row < a.rows {
            // SAFETY: rows and panels are in range by the loop conditions.
            unsafe {
                match (a.rows - row, wide) {
                    (4.., true) => {
                        float_rows::<I, KIND, 4, 4>(&a, panel, row);
                        row += 4;
                    }
                    (2..4, true) => {
                        float_rows::<I, KIND, 2, 4>(&a, panel, row);
                        row += 2;
                    }
                    (_, true) => {
                        float_rows::<I, KIND, 1, 4>(&a, panel, row);
                        row += 1;
                    }
                    (4.., false) => {
                        float_rows::<I, KIND, 4, 1>(&a, panel, row);
                        row += 4;
                    }
                    (_, false) => {
                        float_rows::<I, KIND, 1, 1>(&a, panel, row);
                        row += 1;
                    }
                }
            }
        }
        panel += if wide { 4 } else { 1 };
    }
}
#[inline(always)]
unsafe fn f32_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { float_body::<I, F32>(a) }
}
#[inline(always)]
unsafe fn f16_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { float_body::<I, F16>(a) }
}
#[inline(always)]
unsafe fn bf16_body<I: Isa>(a: PanelArgs) {
    // SAFETY: passed on.
    unsafe { float_body::<I, BF16>(a) }
}
dispatch! { unsafe fn f32_panels(a: PanelArgs) = f32_body }
dispatch! { unsafe fn f16_panels(a: PanelArgs) = f16_body }
dispatch! { unsafe fn bf16_panels(a: PanelArgs) = bf16_body }

/// Rows whose activations are kept in the fast caches while panels stream by.
const ROW_TILE: usize = 64;

/// `y[R, O] = x[R, I] · Wᵀ`.
pub(crate) fn matmul(level: Level, pool: &Pool, x: &[f32], rows: usize, w: &PackedWeight, y: &mut [f32]) {
    assert!(x.len() >= rows * w.in_features && y.len() >= rows * w.out_features, "matmul buffers too short");
    let quantised =
        matches!(w.body, Body::Block(_)).then(|| QuantRows::new(level, pool, x, rows, w.in_features));
    let blocks = w.in_features / 32;
    let panels = w.panels();
    let (panel_bytes, data) = (w.panel_bytes(), w.data());
    // A few tasks per thread even out an unlucky core; a multiple of four panels keeps the float path wide.
    let step = panels.div_ceil(pool.threads() * if rows >= 4 { 4 } else { 2 }).next_multiple_of(4);
    let out = SendPtr(y.as_mut_ptr());
    pool.run(panels.div_ceil(step), &|task| {
        let (from, to) = (task * step, ((task + 1) * step).min(panels));
        for row in (0..rows).step_by(ROW_TILE) {
            let null = (std::ptr::null(), std::ptr::null(), std::ptr::null(), std::ptr::null());
            let (quants, scales, sums, offsets) = quantised.as_ref().map_or(null, |q| {
                // SAFETY: `row` is in range of the arrays.
                unsafe {
                    (
                        q.quants.as_ptr().add(row * w.in_features),
                        q.scales.as_ptr().add(row * blocks),
                        q.sums.as_ptr().add(row * blocks),
                        q.offsets.as_ptr().add(row * blocks),
                    )
                }
            });
            let args = PanelArgs {
                w: data[from * panel_bytes..].as_ptr(),
                panel_bytes,
                panels: to - from,
                in_features: w.in_features,
                x: x[row * w.in_features..].as_ptr(),
                quants,
                scales,
                sums,
                offsets,
                rows: ROW_TILE.min(rows - row),
                // SAFETY: output `from * 16` of `row` exists; tasks write disjoint outputs.
                y: unsafe { out.get().add(row * w.out_features + from * LANES) },
                y_stride: w.out_features,
                outputs: w.out_features - from * LANES,
            };
            // SAFETY: `args` describes panels `from..to` and rows of this tile, all inside their slices.
            unsafe {
                match w.body {
                    Body::Float(FloatKind::F32) => f32_panels(level, args),
                    Body::Float(FloatKind::F16) => f16_panels(level, args),
                    Body::Float(FloatKind::Bf16) => bf16_panels(level, args),
                    Body::Block(f) => match (f.four_bit, f.half, f.two_scales, f.mins) {
                        (true, true, _, false) => q4_0(level, args),
                        (true, true, _, true) => q4_1(level, args),
                        (true, false, ..) => q4k(level, args),
                        (false, true, ..) => q8_0(level, args),
                        (false, false, false, _) => q8(level, args),
                        (false, false, true, _) => q6k(level, args),
                    },
                }
            }
        }
    });
}
