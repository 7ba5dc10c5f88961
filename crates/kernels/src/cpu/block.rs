//! Products of quantised activations with block panels.
//!
//! The reduction of one output runs over the blocks in order: an exact integer sum per block (per half for two
//! scales) and one fused multiply-add, then the same for the minima. Tiles and registers only decide which outputs are
//! computed together.

use super::dot::Dot;
use super::isa::{Isa, Lanes, Level, dispatch, prefetch, prefetch_ahead};
use super::matmul::PanelArgs;
use super::pack::{BlockFormat, FP4_LEVELS, LANES, Layout, Quants, Scales};
use crate::Pool;
use crate::pool::SendPtr;
use crate::quant::IQ4_VALUES;

/// Rows of activations that stand together, block by block.
pub(crate) const TILE: usize = 8;

/// Activations quantised per row in blocks of 32.
///
/// Rows stand in tiles of [`TILE`] (the last one as high as needed): `[tile][block][row][32]` quants and
/// `[tile][block][row]` scales, so that a kernel walks one forward stream.
#[derive(Default)]
pub(crate) struct QuantRows {
    quants: Vec<i8>,
    scales: Vec<f32>,
    /// Sums of the quants of each half of a block.
    sums: Vec<[i32; 2]>,
    /// The same times -[`FROM_ZERO`].
    starts: Vec<[i32; 2]>,
    /// Scale times sum: what a minimum is multiplied with.
    offsets: Vec<f32>,
    /// Scale times the length of the quants, rounded up; filled for bounds alone.
    lengths: Vec<f32>,
}

/// The zero of six-bit quants: what their products are too large by is what their sums start from, so that it costs a
/// load where a subtraction would follow each half.
const FROM_ZERO: i32 = 32;

#[derive(Clone, Copy)]
struct QuantizeArgs {
    x: *const f32,
    quants: *mut i8,
    scales: *mut f32,
    sums: *mut [i32; 2],
    starts: *mut [i32; 2],
    offsets: *mut f32,
    in_features: usize,
    rows: usize,
}

/// Rows from the start of a tile on; all pointers stand at that tile.
#[inline(always)]
unsafe fn quantize_body<I: Isa + Dot>(a: QuantizeArgs) {
    let blocks = a.in_features / 32;
    let mut row = 0;
    while row < a.rows {
        let height = TILE.min(a.rows - row);
        for r in 0..height {
            for b in 0..blocks {
                let at = row * blocks + b * height + r;
                // SAFETY: the caller's arrays hold `rows * blocks` blocks.
                unsafe {
                    let (scale, sums) =
                        I::quantize(a.x.add((row + r) * a.in_features + b * 32), a.quants.add(at * 32));
                    *a.scales.add(at) = scale;
                    *a.sums.add(at) = sums;
                    *a.starts.add(at) = sums.map(|sum| -FROM_ZERO * sum);
                    *a.offsets.add(at) = scale * (sums[0] + sums[1]) as f32;
                }
            }
        }
        row += height;
    }
}
dispatch! { unsafe fn quantize(a: QuantizeArgs) = quantize_body }

impl QuantRows {
    /// Quantises `x[rows, in_features]` into this memory.
    pub(crate) fn fill(&mut self, level: Level, pool: &Pool, x: &[f32], rows: usize, in_features: usize) {
        let step = if rows * in_features < 1 << 13 {
            rows.max(1)
        } else {
            rows.div_ceil(pool.threads() * 2).next_multiple_of(TILE)
        };
        let parts = (0..rows).step_by(step).map(|from| (from, (from + step).min(rows)));
        self.fill_runs(level, pool, x, rows, in_features, &parts.collect::<Vec<_>>());
    }

    /// The same of several groups of rows, each from a tile of its own on: rows `from..to`, one group after the other.
    pub(crate) fn fill_parts(
        &mut self,
        level: Level,
        pool: &Pool,
        x: &[f32],
        groups: &[(usize, usize)],
        in_features: usize,
    ) {
        const STEP: usize = 8 * TILE;
        let rows = groups.last().map_or(0, |(_, to)| *to);
        let runs: Vec<(usize, usize)> = groups
            .iter()
            .flat_map(|(from, to)| (*from..*to).step_by(STEP).map(|at| (at, (at + STEP).min(*to))))
            .collect();
        self.fill_runs(level, pool, x, rows, in_features, &runs);
    }

    /// Quantises runs of rows, each of which starts a tile.
    fn fill_runs(
        &mut self,
        level: Level,
        pool: &Pool,
        x: &[f32],
        rows: usize,
        in_features: usize,
        runs: &[(usize, usize)],
    ) {
        assert!(x.len() >= rows * in_features, "activations too short");
        let blocks = in_features / 32;
        if self.scales.len() < rows * blocks {
            self.quants.resize(rows * in_features, 0);
            self.scales.resize(rows * blocks, 0.0);
            self.sums.resize(rows * blocks, [0; 2]);
            self.starts.resize(rows * blocks, [0; 2]);
            self.offsets.resize(rows * blocks, 0.0);
        }
        let (quants, scales, sums, starts, offsets) = (
            SendPtr(self.quants.as_mut_ptr()),
            SendPtr(self.scales.as_mut_ptr()),
            SendPtr(self.sums.as_mut_ptr()),
            SendPtr(self.starts.as_mut_ptr()),
            SendPtr(self.offsets.as_mut_ptr()),
        );
        let run = |(from, to): (usize, usize)| {
            // SAFETY: rows `from..to` of arrays sized above; `from` starts a tile and tasks take disjoint rows.
            unsafe {
                quantize(
                    level,
                    QuantizeArgs {
                        x: x.as_ptr().add(from * in_features),
                        quants: quants.get().add(from * in_features),
                        scales: scales.get().add(from * blocks),
                        sums: sums.get().add(from * blocks),
                        starts: starts.get().add(from * blocks),
                        offsets: offsets.get().add(from * blocks),
                        in_features,
                        rows: to - from,
                    },
                );
            }
        };
        if rows * in_features < 1 << 13 {
            runs.iter().copied().for_each(run);
        } else {
            pool.run(runs.len(), &|t| run(runs[t]));
        }
    }

    /// The tiles from row `row` of the group that begins with row `first` on; it starts one.
    pub(crate) fn tiles(&self, first: usize, row: usize, in_features: usize) -> TilePtr {
        let blocks = in_features / 32;
        assert!(row.is_multiple_of(TILE), "a row that starts a tile");
        let row = first + row;
        assert!(row * blocks < self.scales.len(), "a row of the activations");
        TilePtr {
            quants: self.quants[row * in_features..].as_ptr(),
            scales: self.scales[row * blocks..].as_ptr(),
            sums: self.sums[row * blocks..].as_ptr(),
            starts: self.starts[row * blocks..].as_ptr(),
            offsets: self.offsets[row * blocks..].as_ptr(),
        }
    }

    /// Works out the lengths of the blocks of `rows` rows that were filled in.
    pub(crate) fn measure(&mut self, rows: usize, in_features: usize) {
        let blocks = rows * (in_features / 32);
        self.lengths.clear();
        self.lengths.extend(self.quants.chunks_exact(32).zip(&self.scales).take(blocks).map(|(q, scale)| {
            let squares: i32 = q.iter().map(|q| i32::from(*q) * i32::from(*q)).sum();
            (squares as f32).sqrt() * scale * 1.000_001
        }));
    }

    /// The lengths of the tiles from `row` on, in the order of the scales.
    pub(crate) fn lengths(&self, row: usize, in_features: usize) -> &[f32] {
        &self.lengths[row * (in_features / 32)..]
    }

    /// The sum of the lengths of a row's blocks.
    pub(crate) fn length_sum(&self, row: usize, rows: usize, in_features: usize) -> f32 {
        let blocks = in_features / 32;
        let first = row / TILE * TILE;
        let height = TILE.min(rows - first);
        (0..blocks).map(|b| self.lengths[first * blocks + b * height + row - first]).sum()
    }
}

/// Where tiles of activations stand.
#[derive(Clone, Copy)]
pub(crate) struct TilePtr {
    quants: *const i8,
    scales: *const f32,
    sums: *const [i32; 2],
    starts: *const [i32; 2],
    offsets: *const f32,
}

impl TilePtr {
    /// For float weights, which do not read it.
    pub(crate) const NONE: TilePtr = TilePtr {
        quants: std::ptr::null(),
        scales: std::ptr::null(),
        sums: std::ptr::null(),
        starts: std::ptr::null(),
        offsets: std::ptr::null(),
    };

    /// `count` blocks later.
    #[inline(always)]
    unsafe fn add(self, count: usize) -> TilePtr {
        // SAFETY: the caller stays inside the arrays (or at their end).
        unsafe {
            TilePtr {
                quants: self.quants.add(count * 32),
                scales: self.scales.add(count),
                sums: self.sums.add(count),
                starts: self.starts.add(count),
                offsets: self.offsets.add(count),
            }
        }
    }
}

/// The records of a panel, known when the kernel is compiled.
trait Records {
    const LAYOUT: Layout;
}

/// [`IQ4_VALUES`] as bytes.
const IQ4_BYTES: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = IQ4_VALUES[i] as u8;
        i += 1;
    }
    bytes
};

/// Scales and minima of a register of outputs in one block, per half.
struct Factors<V> {
    scales: [V; 2],
    mins: [V; 2],
    /// Less than nothing: what the sum of the activations is multiplied with, of groups with zeros.
    zero: V,
}

/// The factors of block `b` of a record, for outputs `part * D::V::COUNT..`: what [`super::pack::PackedWeight::row`]
/// takes, in the same roundings.
#[inline(always)]
unsafe fn factors<D: Dot, W: Records>(record: *const u8, b: usize, part: usize) -> Factors<D::V> {
    let layout = const { W::LAYOUT };
    // SAFETY: module rule of `isa`; all offsets lie in the header of the record.
    unsafe {
        let first = part * D::V::COUNT;
        let half = |at: usize| D::V::load_f16(record.add(at).cast::<u16>().add(first));
        let single = |at: usize| D::V::load(record.add(at).cast::<f32>().add(first));
        let byte = |at: usize| D::load_u8(record.add(at + first));
        let second = if layout.halves { LANES } else { 0 };
        let zero = D::V::splat(-0.0);
        let (scales, mins) = match layout.scales {
            Scales::Half => {
                let min = if layout.mins { half(layout.vector_bytes()) } else { zero };
                ([half(0); 2], [min; 2])
            }
            Scales::HalfLength => ([half(0); 2], [zero; 2]),
            Scales::Single => {
                let second = if layout.halves { layout.vector_bytes() } else { 0 };
                ([single(0), single(second)], [zero; 2])
            }
            Scales::Exponent => {
                // 2^(e - 128) as two factors that are normal numbers for every e.
                let e = byte(0);
                let low = D::shr::<1>(e);
                let high = D::shr::<1>(D::sub(e, -1));
                let power = |e: D::I| D::bits_f(D::shl::<23>(D::sub(e, -63)));
                ([D::V::mul(power(low), power(high)); 2], [zero; 2])
            }
            Scales::Bytes | Scales::SignedBytes => {
                let load = |at: usize| {
                    if matches!(layout.scales, Scales::Bytes) {
                        byte(at)
                    } else {
                        D::load_i8(record.add(at + first))
                    }
                };
                let d = half(0);
                let scale = |at: usize| D::V::mul(d, D::to_f(load(at)));
                let at = layout.scale_at(b);
                let min = if layout.mins {
                    // The sign of a product is exact: -(d m) = (-d) m.
                    let d = D::V::mul(half(2 * LANES), D::V::splat(-1.0));
                    D::V::mul(d, D::to_f(byte(layout.min_at(b))))
                } else {
                    zero
                };
                ([scale(at), scale(at + second)], [min; 2])
            }
            Scales::Nibbles => {
                let d = half(0);
                let dmin = D::V::mul(half(2 * LANES), D::V::splat(-1.0));
                let both = [byte(layout.scale_at(b)), byte(layout.scale_at(b) + LANES)];
                (
                    both.map(|x| D::V::mul(d, D::to_f(D::and(x, 15)))),
                    both.map(|x| D::V::mul(dmin, D::to_f(D::shr::<4>(x)))),
                )
            }
            Scales::Six => {
                let d = half(0);
                let low = byte(layout.scale_at(b));
                let high = byte(layout.high_at(b));
                let high = if b.is_multiple_of(2) { high } else { D::shr::<4>(high) };
                let six = [
                    D::or(D::and(low, 15), D::shl::<4>(D::and(high, 3))),
                    D::or(D::shr::<4>(low), D::shl::<2>(D::and(high, 12))),
                ];
                (six.map(|x| D::V::mul(d, D::to_f(D::sub(x, 32)))), [zero; 2])
            }
        };
        let zero = match layout.zeros {
            true => {
                D::V::mul(D::to_f(D::load_i8(record.add(layout.vector_bytes() + first))), D::V::splat(-1.0))
            }
            false => zero,
        };
        Factors { scales, mins, zero }
    }
}

/// The bytes of one group of four inputs; `block` are the quants of a block from a register of outputs on, `low` the
/// same of the second plane.
#[inline(always)]
unsafe fn weights<D: Dot, W: Records>(block: *const u8, low: *const u8, group: usize) -> D::W {
    // SAFETY: module rule of `isa`; the rows are those of the layout.
    unsafe {
        let row = |i: usize| D::load_w(block.add(i * 64));
        let g = group as i32;
        let two = || D::bits(row(group / 4), g % 4 * 2, 3);
        let four = || D::bits(row(group / 2), g % 2 * 4, 15);
        match const { W::LAYOUT.quants } {
            Quants::Two => two(),
            Quants::Three => D::or_w(two(), D::bits(row(2), g - 2, 4)),
            Quants::Four => four(),
            Quants::Five => D::or_w(four(), D::bits(row(4), g - 4, 16)),
            Quants::Six => D::or_w(four(), D::bits(row(4 + group / 4), g % 4 * 2 - 4, 0x30)),
            Quants::Eight => row(group),
            Quants::Split => {
                let high = D::bits(row(group / 2), g % 2 * 4 - 4, 0xf0);
                D::flip(D::or_w(high, D::bits(D::load_w(low.add(group / 2 * 64)), g % 2 * 4, 15)))
            }
            Quants::Iq4 => D::table(four(), &IQ4_BYTES),
            Quants::Fp4 => D::table(four(), &FP4_LEVELS),
        }
    }
}

/// `R` rows of a tile of `height` rows against outputs `part * D::V::COUNT..` of one panel.
#[inline(always)]
unsafe fn rows<D: Dot, W: Records, const R: usize>(
    blocks: usize,
    group: usize,
    (panel, low): (*const u8, *const u8),
    part: usize,
    tile: TilePtr,
    height: usize,
    ahead: bool,
) -> [D::V; R] {
    let layout = const { W::LAYOUT };
    // Where a record of a group stands and which of its blocks is next.
    let (mut group_record, mut group_sub) = (panel, 0);
    // What a signed sum is too large by, per unit of the activation sum; the same for unsigned ones.
    let zero = if layout.quants.signed() { D::BIAS8 } else { layout.zero };
    // Groups whose sum is taken at once: a half if the halves have scales of their own, fewer if sums are narrow.
    let chunk = const {
        let half = if W::LAYOUT.halves { 4 } else { 8 };
        let narrow = match W::LAYOUT.quants.max() {
            0..=15 => 8,
            16..=31 => 4,
            _ => 2,
        };
        if D::NARROW && narrow < half { narrow } else { half }
    };
    let per_half = if layout.halves { 4 } else { 8 };
    let from_start = layout.halves && !layout.quants.signed() && zero == FROM_ZERO;
    // SAFETY: module rule of `isa`; the panel has the records of `blocks` blocks, the tile `blocks * height` blocks.
    unsafe {
        let mut acc = [D::V::splat(0.0); R];
        for b in 0..blocks {
            let (record, sub) = if layout.grouped {
                if group_sub == group {
                    group_record = group_record.add(layout.record_of(group));
                    group_sub = 0;
                }
                group_sub += 1;
                (group_record, group_sub - 1)
            } else {
                let record = panel.add(b / layout.blocks() * layout.record_bytes());
                (record, b % layout.blocks())
            };
            let quants = record.add(layout.header_bytes() + sub * layout.quants.bytes());
            let quants = quants.add(part * D::V::COUNT * 4);
            let low_bytes = layout.quants.low_bytes();
            let low = low.wrapping_add(b * low_bytes + part * D::V::COUNT * 4);
            let here = tile.add(b * height);
            let act = |r: usize, group: usize| here.quants.add(r * 32 + group * 4);
            if ahead {
                // An equal share of the record.
                let share = layout.record_bytes() / layout.blocks();
                let mut offset = 0;
                while offset < share {
                    prefetch_ahead(record.wrapping_add(sub * share + offset));
                    offset += 64;
                }
                let mut offset = 0;
                while offset < low_bytes {
                    prefetch_ahead(low.wrapping_add(offset));
                    offset += 64;
                }
            }
            let Factors { scales, mins, zero: lane_zero } = factors::<D, W>(record, sub, part);
            let mut dots = [[D::zero_i(); R]; 2];
            // Written out, as the number of a half must be a constant.
            macro_rules! sum {
                ($half:literal) => {
                    let dots = &mut dots[$half];
                    if from_start {
                        for (r, dot) in dots.iter_mut().enumerate() {
                            *dot = D::splat_i(here.starts.cast::<i32>().add(r * 2 + $half));
                        }
                    }
                    let groups = $half * per_half..($half + 1) * per_half;
                    if layout.quants.signed() {
                        for group in groups {
                            let bytes = D::signed(weights::<D, W>(quants, low, group));
                            for (r, dot) in dots.iter_mut().enumerate() {
                                *dot = D::dot8(*dot, bytes, act(r, group));
                            }
                        }
                    } else {
                        for first in groups.step_by(chunk) {
                            let mut sums = [D::zero4(); R];
                            let mut rests = [D::zero_i(); R];
                            for r in 0..R {
                                (sums[r], rests[r]) = D::open4(dots[r]);
                            }
                            for group in first..first + chunk {
                                let bytes = weights::<D, W>(quants, low, group);
                                for (r, sum) in sums.iter_mut().enumerate() {
                                    *sum = D::dot4(*sum, bytes, act(r, group));
                                }
                            }
                            for r in 0..R {
                                dots[r] = D::add4(rests[r], sums[r]);
                            }
                        }
                    }
                };
            }
            // A macro, as a closure that is not inlined would lose the instruction set.
            macro_rules! finish {
                ($acc:expr, $r:expr, $half:expr, $dot:expr) => {{
                    let act_scale = D::V::splat(*here.scales.add($r));
                    let [sum0, sum1] = *here.sums.add($r);
                    let sum = if layout.halves { [sum0, sum1][$half] } else { sum0 + sum1 };
                    let dot = if zero == 0 || from_start { $dot } else { D::sub($dot, zero * sum) };
                    let mut dot = D::to_f(dot);
                    if layout.zeros {
                        // Whole numbers below 2^21: exact.
                        dot = D::V::fma(lane_zero, D::V::splat(sum as f32), dot);
                    }
                    $acc = D::V::fma(D::V::mul(scales[$half], act_scale), dot, $acc);
                }};
            }
            sum!(0);
            if layout.halves && !from_start {
                sum!(1);
            }
            if from_start {
                // One half after the other: the sums of both would not leave registers for the rest.
                for r in 0..R {
                    finish!(acc[r], r, 0, dots[0][r]);
                }
                sum!(1);
                for r in 0..R {
                    finish!(acc[r], r, 1, dots[1][r]);
                }
            } else {
                for r in 0..R {
                    finish!(acc[r], r, 0, dots[0][r]);
                    if layout.halves {
                        finish!(acc[r], r, 1, dots[1][r]);
                    }
                }
            }
            if layout.mins {
                for (r, acc) in acc.iter_mut().enumerate() {
                    if layout.halves {
                        let [sum0, sum1] = *here.sums.add(r);
                        let scale = *here.scales.add(r);
                        *acc = D::V::fma(mins[0], D::V::splat(scale * sum0 as f32), *acc);
                        *acc = D::V::fma(mins[1], D::V::splat(scale * sum1 as f32), *acc);
                    } else {
                        *acc = D::V::fma(mins[0], D::V::splat(*here.offsets.add(r)), *acc);
                    }
                }
            }
        }
        acc
    }
}

#[inline(always)]
unsafe fn panels_body<I: Isa + Dot, W: Records>(a: PanelArgs) {
    let blocks = a.in_features / 32;
    for p in 0..a.panels {
        let count = (a.outputs - p * LANES).min(LANES);
        for part in 0..LANES / I::V::COUNT {
            let Some(lanes @ 1..) = count.checked_sub(part * I::V::COUNT) else { break };
            let mut row = 0;
            while row < a.rows {
                let height = TILE.min(a.rows - row);
                let mut r = 0;
                while r < height {
                    // Later rows find the panel in the nearest cache.
                    let first = row + r == 0 && part == 0;
                    // SAFETY: panels, parts and rows are in range by the loop conditions.
                    unsafe {
                        let panel = (a.w.add(p * a.panel_bytes), a.low.add(p * a.low_bytes));
                        let mut tile = a.tiles.add(row * blocks);
                        // Rows of a block stand side by side: `r` rows further on in each.
                        tile = tile.add(r);
                        let y = a.y.add((row + r) * a.y_stride + p * LANES + part * I::V::COUNT);
                        macro_rules! run {
                            ($n:literal) => {{
                                let values =
                                    rows::<I, W, $n>(blocks, a.group, panel, part, tile, height, first);
                                for (i, v) in values.into_iter().enumerate() {
                                    I::V::store_first(y.add(i * a.y_stride), lanes, v);
                                }
                                r += $n;
                            }};
                        }
                        match (height - r).min(I::ROWS) {
                            1 => run!(1),
                            2 => run!(2),
                            3 => run!(3),
                            4 => run!(4),
                            5 => run!(5),
                            6 => run!(6),
                            7 => run!(7),
                            _ => run!(8),
                        }
                    }
                }
                row += height;
            }
        }
    }
}

macro_rules! formats {
    ($($module:ident: $format:ident;)*) => {
        $(
            mod $module {
                use super::*;

                struct Own;
                impl Records for Own {
                    const LAYOUT: Layout = BlockFormat::$format.layout();
                }
                #[inline(always)]
                unsafe fn body<I: Isa + Dot>(a: PanelArgs) {
                    // SAFETY: passed on.
                    unsafe { panels_body::<I, Own>(a) }
                }
                dispatch! { pub(super) unsafe fn run(a: PanelArgs) = body }
            }
        )*

        /// Panels of this format times quantised rows.
        ///
        /// # Safety
        /// `a` describes panels, rows and outputs inside their buffers.
        pub(crate) unsafe fn panels(level: Level, format: BlockFormat, a: PanelArgs) {
            match format {
                // SAFETY: passed on.
                $(BlockFormat::$format => unsafe { $module::run(level, a) },)*
            }
        }
    };
}
formats! {
    q4_0: Q4_0;
    q4_1: Q4_1;
    q5_0: Q5_0;
    q5_1: Q5_1;
    q8_0: Q8_0;
    q8_0_split: Q8_0Split;
    q8: Q8;
    q8_halves: Q8Halves;
    ternary: Ternary;
    q2k: Q2K;
    q3k: Q3K;
    q4k: Q4K;
    q5k: Q5K;
    q6k: Q6K;
    iq4nl: Iq4Nl;
    iq4xs: Iq4Xs;
    mxfp4: Mxfp4;
    int4: Int4;
    int4_zeros: Int4Zeros;
    int4_single: Int4Single;
    int8: Int8;
    int8_single: Int8Single;
}

/// Panels of a weight in two planes, whose first plane is read, times rows.
#[derive(Clone, Copy)]
pub(crate) struct BoundArgs {
    /// As in [`PanelArgs`].
    pub w: *const u8,
    pub panel_bytes: usize,
    pub low: *const u8,
    pub low_bytes: usize,
    /// Per block whether the second plane is read, too.
    pub both: *const bool,
    pub panels: usize,
    pub in_features: usize,
    pub tiles: TilePtr,
    /// [`QuantRows::lengths`] at the tiles.
    pub lengths: *const f32,
    pub rows: usize,
    /// Outputs from the first panel on.
    pub outputs: usize,
    /// Per row what a sum in f32 may be off by.
    pub slack: *const f32,
    /// `[panel][row]`: no output of the panel is larger.
    pub upper: *mut f32,
    /// Per row: some output is at least as large. Raised, never lowered.
    pub lower: *mut f32,
}

/// The records of [`bounds`].
struct Planes;

impl Records for Planes {
    const LAYOUT: Layout = BlockFormat::Q8_0Split.layout();
}

/// Outputs in the middle of what their high nibbles leave open, and how far off they may be, for `R` rows of a tile.
///
/// A quant is `16 h - 120.5 + r` with a rest `|r| <= 7.5`, and the products with the rests of a block are at most the
/// length of the rests times that of the activations. Of some blocks both planes are read and nothing is left open.
#[inline(always)]
unsafe fn bound_rows<D: Dot, const R: usize>(
    a: &BoundArgs,
    (panel, low): (*const u8, *const u8),
    part: usize,
    tile: TilePtr,
    lengths: *const f32,
    height: usize,
) -> ([D::V; R], [D::V; R]) {
    let layout = const { Planes::LAYOUT };
    // SAFETY: module rule of `isa`; the panel has a record per block, the tile `height` rows per block.
    unsafe {
        let mut middle = [D::V::splat(0.0); R];
        let mut off = [D::V::splat(0.0); R];
        for b in 0..a.in_features / 32 {
            let record = panel.add(b * layout.record_bytes());
            let mut offset = 0;
            while part == 0 && offset < layout.record_bytes() {
                prefetch_ahead(record.wrapping_add(offset));
                offset += 64;
            }
            let quants = record.add(layout.header_bytes() + part * D::V::COUNT * 4);
            let here = tile.add(b * height);
            let scale = D::V::load_f16(record.cast::<u16>().add(part * D::V::COUNT));
            if *a.both.add(b) {
                let low = low.add(b * layout.quants.low_bytes() + part * D::V::COUNT * 4);
                let mut dots = [D::zero_i(); R];
                for group in 0..8 {
                    if part == 0 && group % 2 == 0 {
                        // The same block of the next panel.
                        prefetch(low.wrapping_add(a.low_bytes + group / 2 * 64));
                    }
                    let bytes = D::signed(weights::<D, Planes>(quants, low, group));
                    for (r, dot) in dots.iter_mut().enumerate() {
                        *dot = D::dot8(*dot, bytes, here.quants.add(r * 32 + group * 4));
                    }
                }
                for (r, dot) in dots.into_iter().enumerate() {
                    let [sum0, sum1] = *here.sums.add(r);
                    let dot = D::to_f(D::sub(dot, D::BIAS8 * (sum0 + sum1)));
                    let act_scale = D::V::splat(*here.scales.add(r));
                    middle[r] = D::V::fma(D::V::mul(scale, act_scale), dot, middle[r]);
                }
                continue;
            }
            let rest = D::load_u8(record.add(layout.vector_bytes() + part * D::V::COUNT));
            let rest = D::V::mul(scale, D::to_f(rest));
            let mut sums = [D::zero4(); R];
            for group in 0..8 {
                let high = D::bits(D::load_w(quants.add(group / 2 * 64)), group as i32 % 2 * 4, 15);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = D::dot4(*sum, high, here.quants.add(r * 32 + group * 4));
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                let [sum0, sum1] = *here.sums.add(r);
                // Twice the quants are whole numbers.
                let twice = D::sub(D::shl::<5>(D::add4(D::zero_i(), sum)), 241 * (sum0 + sum1));
                let half = D::V::splat(0.5 * *here.scales.add(r));
                middle[r] = D::V::fma(D::V::mul(scale, half), D::to_f(twice), middle[r]);
                off[r] = D::V::fma(rest, D::V::splat(0.25 * *lengths.add(b * height + r)), off[r]);
            }
        }
        (middle, off)
    }
}

#[inline(always)]
unsafe fn bounds_body<I: Isa + Dot>(a: BoundArgs) {
    let blocks = a.in_features / 32;
    for p in 0..a.panels {
        let count = (a.outputs - p * LANES).min(LANES);
        let mut row = 0;
        while row < a.rows {
            let height = TILE.min(a.rows - row);
            let mut r = 0;
            while r < height {
                let mut middles = [[0.0f32; LANES]; TILE];
                let mut offs = [[0.0f32; LANES]; TILE];
                // SAFETY: panels and rows are in range by the loop conditions; parts fill the 16 lanes.
                let done = unsafe {
                    let panel = (a.w.add(p * a.panel_bytes), a.low.add(p * a.low_bytes));
                    let tile = a.tiles.add(row * blocks).add(r);
                    let lengths = a.lengths.add(row * blocks + r);
                    macro_rules! run {
                        ($n:literal) => {{
                            for part in 0..LANES / I::V::COUNT {
                                let (middle, off) =
                                    bound_rows::<I, $n>(&a, panel, part, tile, lengths, height);
                                for i in 0..$n {
                                    let at = part * I::V::COUNT;
                                    I::V::store(middles[i].as_mut_ptr().add(at), middle[i]);
                                    I::V::store(offs[i].as_mut_ptr().add(at), off[i]);
                                }
                            }
                            $n
                        }};
                    }
                    match height - r {
                        1 => run!(1),
                        2 => run!(2),
                        3 => run!(3),
                        _ => run!(4),
                    }
                };
                for i in 0..done {
                    // SAFETY: one slack, upper and lower value per row.
                    let (slack, upper, lower) = unsafe {
                        let row = row + r + i;
                        (*a.slack.add(row), &mut *a.upper.add(p * a.rows + row), &mut *a.lower.add(row))
                    };
                    let mut most = f32::NEG_INFINITY;
                    for (middle, off) in middles[i].iter().zip(&offs[i]).take(count) {
                        let off = off * 1.0001 + slack;
                        // What is no number may be anything.
                        let up = if (middle + off).is_nan() { f32::INFINITY } else { middle + off };
                        most = most.max(up);
                        *lower = lower.max(middle - off);
                    }
                    *upper = most;
                }
                r += done;
            }
            row += height;
        }
    }
}
dispatch! {
    /// Bounds of the outputs of panels in two planes.
    ///
    /// # Safety
    /// `a` describes panels, rows and bounds inside their buffers.
    pub(crate) unsafe fn bounds(a: BoundArgs) = bounds_body
}
