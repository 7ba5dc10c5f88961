//! Products of quantised activations with block panels.
//!
//! The reduction of one output runs over the blocks in order: an exact integer sum per block (per half for two
//! scales) and one fused multiply-add, then one for the minimum. Tiles and registers only decide which outputs are
//! computed together.

use super::dot::Dot;
use super::isa::{Isa, Lanes, Level, dispatch, prefetch_ahead};
use super::matmul::PanelArgs;
use super::pack::{BlockFormat, LANES};
use crate::Pool;
use crate::pool::SendPtr;

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
    /// Scale times sum: what a minimum is multiplied with.
    offsets: Vec<f32>,
}

#[derive(Clone, Copy)]
struct QuantizeArgs {
    x: *const f32,
    quants: *mut i8,
    scales: *mut f32,
    sums: *mut [i32; 2],
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
        assert!(x.len() >= rows * in_features, "activations too short");
        let blocks = in_features / 32;
        if self.scales.len() < rows * blocks {
            self.quants.resize(rows * in_features, 0);
            self.scales.resize(rows * blocks, 0.0);
            self.sums.resize(rows * blocks, [0; 2]);
            self.offsets.resize(rows * blocks, 0.0);
        }
        let (quants, scales, sums, offsets) = (
            SendPtr(self.quants.as_mut_ptr()),
            SendPtr(self.scales.as_mut_ptr()),
            SendPtr(self.sums.as_mut_ptr()),
            SendPtr(self.offsets.as_mut_ptr()),
        );
        let run = |from: usize, to: usize| {
            // SAFETY: rows `from..to` of arrays sized above; `from` starts a tile and tasks take disjoint rows.
            unsafe {
                quantize(
                    level,
                    QuantizeArgs {
                        x: x.as_ptr().add(from * in_features),
                        quants: quants.get().add(from * in_features),
                        scales: scales.get().add(from * blocks),
                        sums: sums.get().add(from * blocks),
                        offsets: offsets.get().add(from * blocks),
                        in_features,
                        rows: to - from,
                    },
                );
            }
        };
        if rows * in_features < 1 << 13 {
            run(0, rows);
        } else {
            let step = rows.div_ceil(pool.threads() * 2).next_multiple_of(TILE);
            pool.run(rows.div_ceil(step), &|t| run(t * step, ((t + 1) * step).min(rows)));
        }
    }

    /// The tiles from `row` on, which starts one.
    pub(crate) fn tiles(&self, row: usize, in_features: usize) -> TilePtr {
        let blocks = in_features / 32;
        assert!(row.is_multiple_of(TILE) && row * blocks < self.scales.len(), "a row of the activations");
        TilePtr {
            quants: self.quants[row * in_features..].as_ptr(),
            scales: self.scales[row * blocks..].as_ptr(),
            sums: self.sums[row * blocks..].as_ptr(),
            offsets: self.offsets[row * blocks..].as_ptr(),
        }
    }
}

/// Where tiles of activations stand.
#[derive(Clone, Copy)]
pub(crate) struct TilePtr {
    quants: *const i8,
    scales: *const f32,
    sums: *const [i32; 2],
    offsets: *const f32,
}

impl TilePtr {
    /// For float weights, which do not read it.
    pub(crate) const NONE: TilePtr = TilePtr {
        quants: std::ptr::null(),
        scales: std::ptr::null(),
        sums: std::ptr::null(),
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
                offsets: self.offsets.add(count),
            }
        }
    }
}

/// The records of a panel, known when the kernel is compiled.
trait Records {
    const FORMAT: BlockFormat;
}

/// `R` rows of a tile of `height` rows against outputs `part * D::V::COUNT..` of one panel.
#[inline(always)]
unsafe fn rows<D: Dot, W: Records, const R: usize>(
    blocks: usize,
    panel: *const u8,
    part: usize,
    tile: TilePtr,
    height: usize,
    ahead: bool,
) -> [D::V; R] {
    let format = const { W::FORMAT };
    // SAFETY: module rule of `isa`; the panel has `blocks` records, the tile `blocks * height` blocks.
    unsafe {
        let load = |p: *const u8| {
            if format.half() {
                D::V::load_f16(p.cast::<u16>().add(part * D::V::COUNT))
            } else {
                D::V::load(p.cast::<f32>().add(part * D::V::COUNT))
            }
        };
        let mut acc = [D::V::splat(0.0); R];
        for b in 0..blocks {
            let record = panel.add(b * format.record_bytes());
            let quants = record.add(format.header_bytes() + part * D::V::COUNT * 4);
            let here = tile.add(b * height);
            let act = |r: usize, group: usize| here.quants.add(r * 32 + group * 4);
            if ahead {
                let mut offset = 0;
                while offset < format.record_bytes() {
                    prefetch_ahead(record.wrapping_add(offset));
                    offset += 64;
                }
            }
            let scale = load(record);
            if format.four_bit() {
                let mut sums = [D::zero4(); R];
                for j in 0..4 {
                    let (low, high) = D::nibbles(quants.add(j * 64));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = D::dot4(*sum, low, act(r, 2 * j));
                    }
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = D::dot4(*sum, high, act(r, 2 * j + 1));
                    }
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let mut dot = D::sum4(sums[r]);
                    if format.zero() != 0 {
                        let [first, second] = *here.sums.add(r);
                        dot = D::sub(dot, format.zero() * (first + second));
                    }
                    *acc = D::V::fma(D::V::mul(scale, D::V::splat(*here.scales.add(r))), D::to_f(dot), *acc);
                }
            } else {
                // One sum per scale: the whole block, or its halves.
                let mut first = [D::zero_i(); R];
                let mut second = [D::zero_i(); R];
                for group in 0..8 {
                    let bytes = D::bytes(quants.add(group * 64));
                    let sums = if format.two_scales() && group >= 4 { &mut second } else { &mut first };
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = D::dot8(*sum, bytes, act(r, group));
                    }
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let act_scale = D::V::splat(*here.scales.add(r));
                    let bias =
                        |dot: D::I, sum: i32| if D::BIAS8 == 0 { dot } else { D::sub(dot, D::BIAS8 * sum) };
                    let [sum, sum1] = *here.sums.add(r);
                    if format.two_scales() {
                        *acc = D::V::fma(D::V::mul(scale, act_scale), D::to_f(bias(first[r], sum)), *acc);
                        let scale1 = load(record.add(format.vector_bytes()));
                        *acc = D::V::fma(D::V::mul(scale1, act_scale), D::to_f(bias(second[r], sum1)), *acc);
                    } else {
                        *acc =
                            D::V::fma(D::V::mul(scale, act_scale), D::to_f(bias(first[r], sum + sum1)), *acc);
                    }
                }
            }
            if format.mins() {
                let min = load(record.add(format.min_at()));
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = D::V::fma(min, D::V::splat(*here.offsets.add(r)), *acc);
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
                        let panel = a.w.add(p * a.panel_bytes);
                        let mut tile = a.tiles.add(row * blocks);
                        // Rows of a block stand side by side: `r` rows further on in each.
                        tile = tile.add(r);
                        let y = a.y.add((row + r) * a.y_stride + p * LANES + part * I::V::COUNT);
                        macro_rules! run {
                            ($n:literal) => {{
                                let values = rows::<I, W, $n>(blocks, panel, part, tile, height, first);
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
                    const FORMAT: BlockFormat = BlockFormat::$format;
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
    q8_0: Q8_0;
    q8: Q8;
    q4k: Q4K;
    q6k: Q6K;
}
