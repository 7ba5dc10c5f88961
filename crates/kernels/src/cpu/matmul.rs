//! `y = x · Wᵀ` over packed weights, any number of rows.
//!
//! The reduction of one output runs over the inputs in order: float weights by one fused multiply-add per input,
//! block weights as [`super::block`] says. Row and panel grouping only decide which outputs are in registers together.
#![expect(
    clippy::needless_range_loop,
    reason = "rows of several arrays run together; their number is a constant"
)]

use std::cell::RefCell;

use super::block::{self, BoundArgs, QuantRows, TilePtr};
use super::isa::{Isa, Lanes, Level, dispatch};
use super::pack::{BlockFormat, Body, FloatKind, LANES, PackedWeight};
use crate::Pool;
use crate::pool::SendPtr;
use crate::train::par::{exp_shifted, simd};

/// Panels of one weight times rows.
#[derive(Clone, Copy)]
pub(crate) struct PanelArgs {
    /// First record or first value of the panel.
    pub w: *const u8,
    pub panel_bytes: usize,
    /// The same panel in the second plane, where there is one.
    pub low: *const u8,
    pub low_bytes: usize,
    /// Panels side by side from `w` on.
    pub panels: usize,
    pub in_features: usize,
    /// Blocks of a record, for layouts of groups; values of a group, for 8-bit floats.
    pub group: usize,
    /// Scales of a group, of 8-bit floats.
    pub scales: usize,
    /// Activations, read by float weights.
    pub x: *const f32,
    /// The same quantised, read by block weights.
    pub tiles: TilePtr,
    pub rows: usize,
    /// First output of the panel in the first row.
    pub y: *mut f32,
    pub y_stride: usize,
    /// Outputs from `y` on, at most `panels * 16`.
    pub outputs: usize,
}

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
        let mut acc = [[I::F::splat(0.0); P]; R];
        let w = a.w.add(panel * a.panel_bytes);
        for k in 0..a.in_features {
            let mut columns = [I::F::splat(0.0); P];
            for (p, c) in columns.iter_mut().enumerate() {
                let at = w.add(p * a.panel_bytes + k * LANES * size);
                *c = match KIND {
                    F32 => I::F::load(at.cast()),
                    F16 => I::F::load_f16(at.cast()),
                    _ => I::F::load_bf16(at.cast()),
                };
            }
            for r in 0..R {
                let x = I::F::splat(*a.x.add((row + r) * a.in_features + k));
                for p in 0..P {
                    acc[r][p] = I::F::fma(columns[p], x, acc[r][p]);
                }
            }
        }
        for (r, values) in acc.into_iter().enumerate() {
            for (p, v) in values.into_iter().enumerate() {
                let at = (panel + p) * LANES;
                I::F::store_first(a.y.add((row + r) * a.y_stride + at), a.outputs - at, v);
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

/// The same for 8-bit floats: a chain per group, then one fused multiply-add with the scale of the group.
#[inline(always)]
unsafe fn fp8_rows<I: Isa, const R: usize, const P: usize>(a: &PanelArgs, panel: usize, row: usize) {
    // SAFETY: module rule of `isa`; `P` panels from `panel` on and `R` rows from `row` on exist.
    unsafe {
        let mut acc = [[I::F::splat(0.0); P]; R];
        let w = a.w.add(panel * a.panel_bytes);
        for group in 0..a.in_features / a.group {
            let mut sum = [[I::F::splat(0.0); P]; R];
            for k in group * a.group..(group + 1) * a.group {
                let mut columns = [I::F::splat(0.0); P];
                for (p, c) in columns.iter_mut().enumerate() {
                    *c = I::F::load_f8(w.add(p * a.panel_bytes + k * LANES));
                }
                for r in 0..R {
                    let x = I::F::splat(*a.x.add((row + r) * a.in_features + k));
                    for p in 0..P {
                        sum[r][p] = I::F::fma(columns[p], x, sum[r][p]);
                    }
                }
            }
            for p in 0..P {
                let heads = w.add(p * a.panel_bytes + a.in_features * LANES).cast::<f32>();
                let scale = match a.scales {
                    1 => I::F::splat(heads.add(group).read_unaligned()),
                    _ => I::F::load(heads.add(group * LANES)),
                };
                // What was divided by 256 above.
                let scale = I::F::mul(scale, I::F::splat(256.0));
                for r in 0..R {
                    acc[r][p] = I::F::fma(scale, sum[r][p], acc[r][p]);
                }
            }
        }
        for (r, values) in acc.into_iter().enumerate() {
            for (p, v) in values.into_iter().enumerate() {
                let at = (panel + p) * LANES;
                I::F::store_first(a.y.add((row + r) * a.y_stride + at), a.outputs - at, v);
            }
        }
    }
}

#[inline(always)]
unsafe fn fp8_body<I: Isa>(a: PanelArgs) {
    let mut panel = 0;
    while panel < a.panels {
        let wide = a.panels - panel >= 4;
        let mut row = 0;
        while row < a.rows {
            // SAFETY: rows and panels are in range by the loop conditions.
            unsafe {
                match (a.rows - row, wide) {
                    (2.., true) => {
                        fp8_rows::<I, 2, 4>(&a, panel, row);
                        row += 2;
                    }
                    (_, true) => {
                        fp8_rows::<I, 1, 4>(&a, panel, row);
                        row += 1;
                    }
                    (4.., false) => {
                        fp8_rows::<I, 4, 1>(&a, panel, row);
                        row += 4;
                    }
                    (_, false) => {
                        fp8_rows::<I, 1, 1>(&a, panel, row);
                        row += 1;
                    }
                }
            }
        }
        panel += if wide { 4 } else { 1 };
    }
}
dispatch! { unsafe fn fp8_panels(a: PanelArgs) = fp8_body }
dispatch! { unsafe fn f32_panels(a: PanelArgs) = f32_body }
dispatch! { unsafe fn f16_panels(a: PanelArgs) = f16_body }
dispatch! { unsafe fn bf16_panels(a: PanelArgs) = bf16_body }

/// Rows whose activations are kept in the fast caches while panels stream by; whole tiles.
const ROW_TILE: usize = 64;

thread_local! {
    static QUANT: RefCell<QuantRows> = RefCell::default();
    static OUTPUTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What the panels of a call read.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub level: Level,
    pub x: &'a [f32],
    /// Set if a weight of the call is quantised.
    pub quant: Option<&'a QuantRows>,
    /// Where the quantised rows begin.
    pub first: usize,
    pub rows: usize,
}

impl Input<'_> {
    /// Panels `from..to` of `w` times all rows, into rows of `y_stride` values.
    ///
    /// # Safety
    /// `y` has `rows` rows, each with the outputs of these panels from its start on.
    pub(crate) unsafe fn panels(
        &self,
        w: &PackedWeight,
        from: usize,
        to: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        let (panel_bytes, in_features) = (w.panel_bytes(), w.in_features);
        let scales = if let Body::Fp8 { scales } = w.body { scales } else { 0 };
        for row in (0..self.rows).step_by(ROW_TILE) {
            let args = PanelArgs {
                w: w.data()[from * panel_bytes..].as_ptr(),
                panel_bytes,
                low: w.low(from).as_ptr(),
                low_bytes: w.low_bytes(),
                panels: to - from,
                in_features,
                group: if scales > 0 { w.group } else { w.record_blocks() },
                scales,
                x: self.x[row * in_features..].as_ptr(),
                tiles: self.quant.map_or(TilePtr::NONE, |q| q.tiles(self.first, row, in_features)),
                rows: ROW_TILE.min(self.rows - row),
                // SAFETY: `row` is one of the rows.
                y: unsafe { y.add(row * y_stride) },
                y_stride,
                outputs: w.out_features - from * LANES,
            };
            // SAFETY: `args` describes panels `from..to` and rows of this tile, all inside their slices.
            unsafe {
                match w.body {
                    Body::Float(FloatKind::F32) => f32_panels(self.level, args),
                    Body::Float(FloatKind::F16) => f16_panels(self.level, args),
                    Body::Float(FloatKind::Bf16) => bf16_panels(self.level, args),
                    Body::Block(format) => block::panels(self.level, format, args),
                    Body::Fp8 { .. } => fp8_panels(self.level, args),
                }
            }
        }
    }
}

/// Quantises `x` if one of the weights wants it, and runs `body` on it.
fn with_input<R>(
    level: Level,
    pool: &Pool,
    x: &[f32],
    rows: usize,
    weights: &[&PackedWeight],
    body: impl FnOnce(Input<'_>) -> R,
) -> R {
    let in_features = weights[0].in_features;
    assert!(weights.iter().all(|w| w.in_features == in_features), "weights of one input have its width");
    assert!(x.len() >= rows * in_features, "activations too short");
    if weights.iter().any(|w| matches!(w.body, Body::Block(_))) {
        QUANT.with_borrow_mut(|quant| {
            quant.fill(level, pool, x, rows, in_features);
            body(Input { level, x, quant: Some(quant), first: 0, rows })
        })
    } else {
        body(Input { level, x, quant: None, first: 0, rows })
    }
}

/// Panels per task: a few tasks per thread even out an unlucky core, and the last round of tasks should leave no thread
/// without one.
pub(crate) fn balanced_step(panels: usize, threads: usize, multiple: usize) -> usize {
    (2..=6)
        .rev()
        .map(|per_thread| panels.div_ceil(threads * per_thread).next_multiple_of(multiple).max(1))
        .min_by_key(|step| panels.div_ceil(*step).div_ceil(threads) * step)
        .unwrap_or(1)
}

/// A weight, and what is added to its products.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub weight: &'a PackedWeight,
    /// `[O]`
    pub bias: Option<&'a [f32]>,
}

/// Several layers of one input: `ys[i][R, Oᵢ] = x[R, I] · Wᵢᵀ`, plus the bias.
pub(crate) fn matmuls(
    level: Level,
    pool: &Pool,
    x: &[f32],
    rows: usize,
    layers: &[Layer<'_>],
    ys: &mut [&mut [f32]],
) {
    assert!(layers.len() == ys.len(), "one output per weight");
    if layers.is_empty() || rows == 0 {
        return;
    }
    let weights: Vec<&PackedWeight> = layers.iter().map(|l| l.weight).collect();
    assert!(
        layers.iter().all(|l| l.bias.is_none_or(|b| b.len() >= l.weight.out_features)),
        "biases have the outputs of their weights"
    );
    let outputs: Vec<SendPtr<f32>> = weights
        .iter()
        .zip(ys)
        .map(|(w, y)| {
            assert!(y.len() >= rows * w.out_features, "output buffer too short");
            SendPtr(y.as_mut_ptr())
        })
        .collect();
    let all: usize = weights.iter().map(|w| w.panels()).sum();
    // A multiple of four panels keeps the float path wide.
    let wide =
        if weights.iter().any(|w| matches!(w.body, Body::Float(_) | Body::Fp8 { .. })) { 4 } else { 1 };
    let step = balanced_step(all, pool.threads(), wide);
    let tasks = weights.iter().map(|w| w.panels().div_ceil(step)).sum();
    with_input(level, pool, x, rows, &weights, |input| {
        pool.run(tasks, &|mut task| {
            for (Layer { weight: w, bias }, y) in layers.iter().zip(&outputs) {
                let own = w.panels().div_ceil(step);
                if task < own {
                    let (from, to) = (task * step, ((task + 1) * step).min(w.panels()));
                    // SAFETY: `y` was checked to have `rows` rows of outputs; tasks write disjoint ones.
                    unsafe {
                        let y = y.get().add(from * LANES);
                        input.panels(w, from, to, y, w.out_features);
                        if let Some(bias) = bias {
                            let bias = &bias[from * LANES..(to * LANES).min(w.out_features)];
                            for row in 0..rows {
                                let y = y.add(row * w.out_features);
                                let y = std::slice::from_raw_parts_mut(y, bias.len());
                                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                            }
                        }
                    }
                    return;
                }
                task -= own;
            }
        });
    });
}

/// Panels whose outputs a task of [`argmax`] holds at once.
const ARGMAX_PANELS: usize = 32;

/// Rows up to which the largest outputs are looked for in the first plane alone: beyond, the work is with the
/// products and no longer with the bytes.
const BOUND_ROWS: usize = 4;

/// One in so many blocks is read in both planes.
const BOTH_OF: usize = 7;

/// Per row the output with the largest value, the lowest among equals; NaN never wins.
pub(crate) fn argmax(level: Level, pool: &Pool, x: &[f32], rows: usize, w: &PackedWeight) -> Vec<u32> {
    let split = matches!(w.body, Body::Block(BlockFormat::Q8_0Split)) && (1..=BOUND_ROWS).contains(&rows);
    if split && w.doubts.worth_a_try() {
        let found = argmax_split(level, pool, x, rows, w);
        w.doubts.tell(found.is_some());
        if let Some(found) = found {
            return found;
        }
    }
    with_input(level, pool, x, rows, &[w], |input| argmax_of(&input, pool, w, &all_spans(w), None))
}

/// All panels of a weight, as many side by side as a task of [`argmax`] takes.
fn all_spans(w: &PackedWeight) -> Vec<(usize, usize)> {
    (0..w.panels()).step_by(ARGMAX_PANELS).map(|p| (p, (p + ARGMAX_PANELS).min(w.panels()))).collect()
}

/// [`argmax`], and the outputs of some rows in `y`, one after the other.
pub(crate) fn argmax_and_outputs(
    level: Level,
    pool: &Pool,
    x: &[f32],
    rows: usize,
    w: &PackedWeight,
    (whole, y): (&[u32], &mut [f32]),
) -> Vec<u32> {
    assert!(whole.iter().all(|row| (*row as usize) < rows), "rows of the input");
    assert!(y.len() >= whole.len() * w.out_features, "output buffer too short");
    let whole = Whole { rows: whole, y: SendPtr(y.as_mut_ptr()) };
    with_input(level, pool, x, rows, &[w], |input| argmax_of(&input, pool, w, &all_spans(w), Some(&whole)))
}

/// Rows whose outputs are wanted, and where they go: `[rows.len(), O]`.
struct Whole<'a> {
    rows: &'a [u32],
    y: SendPtr<f32>,
}

/// The same where weights stand in two planes: what [`argmax`] gives, from little more than the first plane.
fn argmax_split(level: Level, pool: &Pool, x: &[f32], rows: usize, w: &PackedWeight) -> Option<Vec<u32>> {
    let in_features = w.in_features;
    assert!(x.len() >= rows * in_features, "activations too short");
    QUANT.with_borrow_mut(|quant| {
        quant.fill(level, pool, x, rows, in_features);
        quant.measure(rows, in_features);
        // A sum of `n` products in f32 is off by less than `(n + 1) 2^-23` times the sum of their sizes; both sums that
        // are compared have such an error. No block of quants is longer than sqrt(32) * 128.
        let rounding = 2.0 * (in_features / 32 + 8) as f32 * f32::EPSILON;
        let slack: Vec<f32> = (0..rows)
            .map(|row| rounding * 725.0 * w.largest_scale * quant.length_sum(row, rows, in_features) + 1e-30)
            .collect();
        // The blocks whose rests could add most: a seventh of the second plane leaves a small part of the candidates.
        // Fewer rows than a tile: the lengths of a block's rows stand side by side.
        let mut open: Vec<(f32, usize)> =
            quant.lengths(0, in_features).chunks_exact(rows).map(|rows| rows.iter().sum()).zip(0..).collect();
        open.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut both = vec![false; open.len()];
        open.iter().take(open.len() / BOTH_OF).for_each(|(_, b)| both[*b] = true);
        let tasks = w.panels().div_ceil(ARGMAX_PANELS);
        let mut upper = vec![0.0f32; w.panels() * rows];
        let mut lower = vec![f32::NEG_INFINITY; tasks * rows];
        let (uppers, lowers) = (SendPtr(upper.as_mut_ptr()), SendPtr(lower.as_mut_ptr()));
        pool.run(tasks, &|task| {
            let (from, to) = (task * ARGMAX_PANELS, ((task + 1) * ARGMAX_PANELS).min(w.panels()));
            let args = BoundArgs {
                w: w.data()[from * w.panel_bytes()..].as_ptr(),
                panel_bytes: w.panel_bytes(),
                low: w.low(from).as_ptr(),
                low_bytes: w.low_bytes(),
                both: both.as_ptr(),
                panels: to - from,
                in_features,
                tiles: quant.tiles(0, 0, in_features),
                lengths: quant.lengths(0, in_features).as_ptr(),
                rows,
                outputs: w.out_features - from * LANES,
                slack: slack.as_ptr(),
                // SAFETY: every panel has `rows` values, every task too; tasks are disjoint.
                upper: unsafe { uppers.get().add(from * rows) },
                // SAFETY: as above.
                lower: unsafe { lowers.get().add(task * rows) },
            };
            // SAFETY: as described in `args`.
            unsafe { block::bounds(level, args) };
        });
        let least: Vec<f32> = (0..rows)
            .map(|row| (0..tasks).fold(f32::NEG_INFINITY, |m, task| m.max(lower[task * rows + row])))
            .collect();
        let mut spans: Vec<(usize, usize)> = Vec::new();
        let mut left = 0;
        for (panel, upper) in upper.chunks_exact(rows).enumerate() {
            if upper.iter().zip(&least).all(|(upper, least)| upper < least) {
                continue;
            }
            left += 1;
            match spans.last_mut() {
                Some((from, to)) if *to == panel && panel - *from < ARGMAX_PANELS => *to = panel + 1,
                _ => spans.push((panel, panel + 1)),
            }
        }
        // Where the bound says little, one stream over everything is faster.
        (left <= w.panels() / 3).then(|| {
            argmax_of(&Input { level, x, quant: Some(&*quant), first: 0, rows }, pool, w, &spans, None)
        })
    })
}

/// Values from one row of the outputs of a span to the next.
const STRIDE: usize = ARGMAX_PANELS * LANES;

/// The outputs of some panels, at most [`ARGMAX_PANELS`] side by side: `each` hears the number of the span, its first output, how many there
/// are, and the values of all rows, [`STRIDE`] apart, which it may change.
fn over_outputs(
    input: &Input<'_>,
    pool: &Pool,
    w: &PackedWeight,
    spans: &[(usize, usize)],
    each: &(impl Fn(usize, usize, usize, &mut [f32]) + Sync),
) {
    let len = input.rows * STRIDE;
    pool.run(spans.len(), &|task| {
        let (from, to) = spans[task];
        let count = (to * LANES).min(w.out_features) - from * LANES;
        OUTPUTS.with_borrow_mut(|values| {
            if values.len() < len {
                values.resize(len, 0.0);
            }
            // SAFETY: `values` has `rows` rows of `STRIDE`, at least the outputs of these panels.
            unsafe { input.panels(w, from, to, values.as_mut_ptr(), STRIDE) };
            each(task, from * LANES, count, &mut values[..len]);
        });
    });
}

/// [`argmax`] among the outputs of some panels, in ascending order; at most [`ARGMAX_PANELS`] side by side.
fn argmax_of(
    input: &Input<'_>,
    pool: &Pool,
    w: &PackedWeight,
    spans: &[(usize, usize)],
    whole: Option<&Whole<'_>>,
) -> Vec<u32> {
    let rows = input.rows;
    let mut best = vec![(f32::NEG_INFINITY, 0u32); spans.len() * rows];
    let out = SendPtr(best.as_mut_ptr());
    over_outputs(input, pool, w, spans, &|task, first, count, values| {
        if let Some(whole) = whole {
            for (i, row) in whole.rows.iter().enumerate() {
                let values = &values[*row as usize * STRIDE..][..count];
                // SAFETY: `y` was checked to have that many rows of outputs; tasks write disjoint ones.
                unsafe {
                    let y = whole.y.get().add(i * w.out_features + first);
                    std::ptr::copy_nonoverlapping(values.as_ptr(), y, count);
                }
            }
        }
        for (row, values) in values.chunks_exact(STRIDE).enumerate() {
            let (max, at) = largest(&values[..count]);
            // SAFETY: tasks write disjoint rows of `best`.
            unsafe { *out.get().add(task * rows + row) = (max, (first + at) as u32) };
        }
    });
    (0..rows)
        .map(|row| {
            let mut winner = (f32::NEG_INFINITY, 0);
            for task in 0..spans.len() {
                let here = best[task * rows + row];
                if here.0 > winner.0 {
                    winner = here;
                }
            }
            winner.1
        })
        .collect()
}

/// The largest value and its first place; NaN is never it.
fn largest(values: &[f32]) -> (f32, usize) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    for v in chunks.remainder() {
        lanes[0] = lanes[0].max(*v);
    }
    for chunk in chunks {
        for (l, v) in lanes.iter_mut().zip(chunk) {
            *l = if *v > *l { *v } else { *l };
        }
    }
    let max = lanes.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    (max, values.iter().position(|v| *v == max).unwrap_or(0))
}

/// Rows of [`tops`] that meet some panels one after the other: their outputs stay near.
const TOPS_ROWS: usize = 64;

/// Per row the output with the largest value, the lowest among equals, and the logarithm of the sum of the exponentials of all.
pub(crate) fn tops(level: Level, pool: &Pool, x: &[f32], rows: usize, w: &PackedWeight) -> Vec<(u32, f32)> {
    let (spans, width) = (all_spans(w), w.in_features);
    let mut found = Vec::with_capacity(rows);
    for first in (0..rows).step_by(TOPS_ROWS) {
        let n = TOPS_ROWS.min(rows - first);
        let x = &x[first * width..(first + n) * width];
        with_input(level, pool, x, n, &[w], |input| found.extend(tops_of(&input, pool, w, &spans)));
    }
    found
}

/// What a row comes to in some panels: the largest output, the first place of it, and the sum of the exponentials of all outputs less
/// the largest.
#[derive(Clone, Copy, Default)]
struct Part {
    max: f32,
    at: u32,
    sum: f32,
}

fn tops_of(
    input: &Input<'_>,
    pool: &Pool,
    w: &PackedWeight,
    spans: &[(usize, usize)],
) -> impl Iterator<Item = (u32, f32)> + use<> {
    let (rows, tasks) = (input.rows, spans.len());
    let mut parts = vec![Part::default(); tasks * rows];
    let out = SendPtr(parts.as_mut_ptr());
    over_outputs(input, pool, w, spans, &|task, first, count, values| {
        for (row, values) in values.chunks_exact_mut(STRIDE).enumerate() {
            let values = &mut values[..count];
            let (max, at) = largest(values);
            let sum = simd(
                #[inline(always)]
                || exp_shifted(values, max),
            );
            // SAFETY: there is one for every task and row; tasks write disjoint ones.
            unsafe { *out.get().add(task * rows + row) = Part { max, at: (first + at) as u32, sum } };
        }
    });
    (0..rows).map(move |row| {
        let of_row = || (0..tasks).map(|task| parts[task * rows + row]);
        // Panels ascend, so the first of equals is the lowest.
        let best = of_row().reduce(|best, part| if part.max > best.max { part } else { best });
        let best = best.expect("a weight has outputs");
        let sum: f64 = of_row().map(|p| f64::from(p.sum) * f64::from(p.max - best.max).exp()).sum();
        (best.at, (f64::from(best.max) + sum.ln()) as f32)
    })
}
