//! f32 matrix products on tile registers, every number as the sum of two bf16 numbers.
//!
//! `x = high + low + rest` with a rest of at most `2^-17 |x|`. Of the four products of two such sums the three larger ones are
//! taken, with f32 accumulators: a product is off by at most `2^-15` of itself, where one f32 rounding is `2^-24`, TF32 `2^-10`
//! and bf16 alone `2^-8`. The sum over `k` runs in an order that the sizes alone decide.

use std::arch::asm;
use std::arch::x86_64::*;

use super::linear::Product;
use super::par::{Shared, par_ranges, with_scratch};
use crate::tiles::{self, Config};

/// Rows or columns of `dst` that registers hold together: two tiles.
const SIDE: usize = 32;
/// Terms of the sum that one instruction takes per element.
const DEPTH: usize = 32;
/// Values of a packed step: of [`SIDE`] rows or columns, [`DEPTH`] terms each, the high and the low halves.
const STEP: usize = SIDE * DEPTH;
/// Steps after which `dst` is set aside: so many columns' worth of operands stay in the nearest cache.
const STEPS: usize = 8;
/// Steps of packed rows that a task works with before it takes the next ones.
const REACH: usize = 32;
/// Values of packed rows that a task works with at once, so that they stay in a cache of its own.
const ROWS_AT_ONCE: usize = 1 << 18;
/// Products below this are not worth packing.
const LEAST: usize = 1 << 20;

/// Whether a product is one for tiles.
pub(super) fn fits(p: &Product) -> bool {
    let sides = p.m.min(p.n).min(p.k) >= SIDE;
    let unit = |s: (isize, isize)| s.0 == 1 || s.1 == 1;
    tiles::is_usable() && sides && p.m * p.n * p.k >= LEAST && p.dst.1 == 1 && unit(p.lhs) && unit(p.rhs)
}

/// An operand: where it is, and how to walk along its own side and along the sum.
#[derive(Clone, Copy)]
struct Side {
    at: *const f32,
    /// Rows of the left operand, columns of the right one.
    len: usize,
    along: isize,
    /// Terms.
    k: usize,
    along_k: isize,
    /// Rows of a tile stand for terms, as the right operand wants it, and not for rows.
    by_term: bool,
}

// SAFETY: what is behind the pointer is only read, and outlives the call.
unsafe impl Send for Side {}
// SAFETY: as above.
unsafe impl Sync for Side {}

impl Side {
    fn blocks(&self) -> usize {
        self.len.div_ceil(SIDE)
    }

    fn steps(&self) -> usize {
        self.k.div_ceil(DEPTH)
    }

    /// Packs the rows (columns) of a block, from step `first` on: step by step two tiles with the high halves and two with
    /// the low ones.
    ///
    /// # Safety
    /// The operand is complete, `out` has [`STEP`] values per step, and the CPU has `avx512f`, `avx512bw` and `avx512bf16`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pack(&self, block: usize, first: usize, out: &mut [f32]) {
        for (step, out) in (first..).zip(out.chunks_exact_mut(STEP)) {
            for tile in 0..2 {
                let first = block * SIDE + tile * 16;
                let rows = self.len.saturating_sub(first).min(16);
                let terms = (self.k - step * DEPTH).min(DEPTH);
                let out = out.as_mut_ptr().cast::<__m512i>();
                // SAFETY: rows and terms of the operand; the tiles stand at `out + 16 t`, high ones first.
                unsafe {
                    let at = self.at.offset(
                        first.min(self.len) as isize * self.along + (step * DEPTH) as isize * self.along_k,
                    );
                    let (mut high, mut low) = if self.along_k == 1 {
                        self.pairs_of_rows(at, rows, terms)
                    } else {
                        self.pairs_of_terms(at, rows, terms)
                    };
                    if (self.along_k == 1) == self.by_term {
                        (high, low) = (transposed(high), transposed(low));
                    }
                    for i in 0..16 {
                        _mm512_storeu_si512(out.add(tile * 16 + i), high[i]);
                        _mm512_storeu_si512(out.add((2 + tile) * 16 + i), low[i]);
                    }
                }
            }
        }
    }

    /// A register per row: the terms, two by two. For terms side by side.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pairs_of_rows(
        &self,
        at: *const f32,
        rows: usize,
        terms: usize,
    ) -> ([__m512i; 16], [__m512i; 16]) {
        let masks = [mask(terms), mask(terms.saturating_sub(16))];
        let (mut high, mut low) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
        for r in 0..rows {
            // SAFETY: the masks cover the terms that there are.
            let x = unsafe {
                let at = at.offset(r as isize * self.along);
                [_mm512_maskz_loadu_ps(masks[0], at), _mm512_maskz_loadu_ps(masks[1], at.wrapping_add(16))]
            };
            let both = [halves(x[0]), halves(x[1])];
            let join = |a: __m256i, b: __m256i| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            high[r] = join(both[0].0, both[1].0);
            low[r] = join(both[0].1, both[1].1);
        }
        (high, low)
    }

    /// A register per pair of terms: the rows, side by side. For rows side by side.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pairs_of_terms(
        &self,
        at: *const f32,
        rows: usize,
        terms: usize,
    ) -> ([__m512i; 16], [__m512i; 16]) {
        let there = mask(rows);
        let (mut high, mut low) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
        for pair in 0..terms.div_ceil(2) {
            let mut both = [(_mm256_setzero_si256(), _mm256_setzero_si256()); 2];
            for (i, both) in both.iter_mut().enumerate() {
                let term = 2 * pair + i;
                if term < terms {
                    // SAFETY: the mask covers the rows that there are.
                    *both = halves(unsafe {
                        _mm512_maskz_loadu_ps(there, at.offset(term as isize * self.along_k))
                    });
                }
            }
            let join = |a: __m256i, b: __m256i| {
                _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(b)))
            };
            high[pair] = join(both[0].0, both[1].0);
            low[pair] = join(both[0].1, both[1].1);
        }
        (high, low)
    }
}

/// The first `count` of 16 lanes.
fn mask(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// 16 numbers as two bf16 numbers each: the nearest one, and the nearest one to what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn halves(x: __m512) -> (__m256i, __m256i) {
    // SAFETY: both are 16 numbers of 16 bits.
    let bits = |v: __m256bh| unsafe { std::mem::transmute::<__m256bh, __m256i>(v) };
    let high = bits(_mm512_cvtneps_pbh(x));
    let back = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
    (high, bits(_mm512_cvtneps_pbh(_mm512_sub_ps(x, back))))
}

/// Rows of 16 values as columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = rows;
    // Pairs of rows, then of pairs, within parts of 128 bits.
    for i in (0..16).step_by(2) {
        (a[i], a[i + 1]) =
            (_mm512_unpacklo_epi32(rows[i], rows[i + 1]), _mm512_unpackhi_epi32(rows[i], rows[i + 1]));
    }
    let mut b = a;
    for i in (0..16).step_by(4) {
        for j in 0..2 {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    }
    // `b[4 i + c]` holds column `c` of each part, of rows `4 i..4 i + 4`: the parts are a matrix of four by four to turn.
    let mut out = b;
    for c in 0..4 {
        let [p, q, r, s] = [b[c], b[4 + c], b[8 + c], b[12 + c]];
        let (pq, rs) = (_mm512_shuffle_i32x4::<0x88>(p, q), _mm512_shuffle_i32x4::<0x88>(r, s));
        let (pq2, rs2) = (_mm512_shuffle_i32x4::<0xdd>(p, q), _mm512_shuffle_i32x4::<0xdd>(r, s));
        out[c] = _mm512_shuffle_i32x4::<0x88>(pq, rs);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(pq, rs);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(pq2, rs2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(pq2, rs2);
    }
    out
}

/// One step of [`SIDE`] rows times [`SIDE`] columns into registers 0 to 3.
///
/// # Safety
/// Tiles are configured; both operands have a packed step.
#[inline(always)]
unsafe fn multiply(rows: *const f32, columns: *const f32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            // High by high.
            "tileloadd tmm4, [{columns} + {row}*1]",
            "tileloadd tmm6, [{rows} + {row}*1]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tileloadd tmm5, [{columns} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tileloadd tmm7, [{rows} + {row}*1 + 1024]",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            // High by low.
            "tileloadd tmm4, [{columns} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tileloadd tmm5, [{columns} + {row}*1 + 3072]",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            // Low by high.
            "tileloadd tmm4, [{columns} + {row}*1]",
            "tileloadd tmm6, [{rows} + {row}*1 + 2048]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tileloadd tmm5, [{columns} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tileloadd tmm7, [{rows} + {row}*1 + 3072]",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            rows = in(reg) rows,
            columns = in(reg) columns,
            row = in(reg) 64usize,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// A part of `dst` in registers.
#[derive(Clone, Copy)]
struct Part {
    at: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
}

impl Part {
    /// `dst (+)= rows · columns` over `steps` steps; starts from zero unless `adds`.
    ///
    /// # Safety
    /// Tiles are configured, the operands have so many packed steps, and the part lies in `dst` and is nobody else's.
    unsafe fn add(self, rows: *const f32, columns: *const f32, steps: usize, adds: bool) {
        if self.rows == SIDE && self.columns == SIDE {
            // SAFETY: the caller's promise.
            return unsafe { add_whole((self.at, self.stride), rows, columns, steps, adds) };
        }
        let mut buffer = [0.0f32; SIDE * SIDE];
        let at = buffer.as_mut_ptr();
        // SAFETY: the caller's promise; the buffer has the size of a whole part.
        unsafe {
            for r in 0..self.rows {
                std::ptr::copy_nonoverlapping(self.at.add(r * self.stride), at.add(r * SIDE), self.columns);
            }
            add_whole((at, SIDE), rows, columns, steps, adds);
            for r in 0..self.rows {
                std::ptr::copy_nonoverlapping(at.add(r * SIDE), self.at.add(r * self.stride), self.columns);
            }
        }
    }
}

/// The same for [`SIDE`] rows and columns, with so many values from one row of them to the next.
///
/// # Safety
/// As of [`Part::add`].
#[inline(always)]
unsafe fn add_whole(
    (at, stride): (*mut f32, usize),
    rows: *const f32,
    columns: *const f32,
    steps: usize,
    adds: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if adds {
            load(at, stride);
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, preserves_flags, nomem),
            );
        }
        for step in 0..steps {
            multiply(rows.add(step * STEP), columns.add(step * STEP));
        }
        store(at, stride);
    }
}

/// Registers 0 to 3 from `SIDE` rows of `stride` values.
///
/// # Safety
/// Tiles are configured, and there are such rows.
#[inline(always)]
unsafe fn load(at: *const f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm0, [{upper} + {stride}*1]",
            "tileloadd tmm1, [{upper} + {stride}*1 + 64]",
            "tileloadd tmm2, [{lower} + {stride}*1]",
            "tileloadd tmm3, [{lower} + {stride}*1 + 64]",
            upper = in(reg) at,
            lower = in(reg) at.wrapping_add(16 * stride),
            stride = in(reg) 4 * stride,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Registers 0 to 3 to `SIDE` rows of `stride` values.
///
/// # Safety
/// Tiles are configured, and the rows are nobody else's.
#[inline(always)]
unsafe fn store(at: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{upper} + {stride}*1], tmm0",
            "tilestored [{upper} + {stride}*1 + 64], tmm1",
            "tilestored [{lower} + {stride}*1], tmm2",
            "tilestored [{lower} + {stride}*1 + 64], tmm3",
            upper = in(reg) at,
            lower = in(reg) at.wrapping_add(16 * stride),
            stride = in(reg) 4 * stride,
            options(nostack, preserves_flags),
        );
    }
}

/// How a product is shared: blocks of rows per task, and parts of the columns.
fn shares(threads: usize, left: &Side, right: &Side) -> (usize, usize) {
    let most = (ROWS_AT_ONCE / (left.steps().min(REACH) * STEP)).clamp(1, left.blocks());
    let tasks = 4 * threads;
    if left.len > right.len {
        // Packed once each, the columns read by all.
        (left.blocks().div_ceil(tasks).min(most), 1)
    } else {
        // The columns read as seldom as can be, the rows packed for every part of them.
        (most, tasks.div_ceil(left.blocks().div_ceil(most)).min(right.blocks()))
    }
}

/// The product on tiles. The columns are packed as a whole, the rows by each task, so many that they stay in its cache.
///
/// # Safety
/// As of [`Product::run`]; the product [`fits`].
pub(super) unsafe fn run(p: &Product, threads: usize, dst: *mut f32, lhs: *const f32, rhs: *const f32) {
    let left = Side { at: lhs, len: p.m, along: p.lhs.0, k: p.k, along_k: p.lhs.1, by_term: false };
    let right = Side { at: rhs, len: p.n, along: p.rhs.1, k: p.k, along_k: p.rhs.0, by_term: true };
    let steps = left.steps();
    let block = steps * STEP;
    let (rows, parts) = shares(threads, &left, &right);
    let row_tasks = left.blocks().div_ceil(rows);
    let columns = right.blocks().div_ceil(parts);
    let column_tasks = right.blocks().div_ceil(columns);
    struct Out(*mut f32);
    // SAFETY: tasks write disjoint parts.
    unsafe impl Sync for Out {}
    let out = Out(dst);
    with_lines(right.blocks() * block, |packed| {
        let whole = Shared::new(packed);
        par_ranges(threads, right.blocks(), 4, |blocks| {
            for i in blocks {
                // SAFETY: every block has its own part; the features are those of tiles that may be used.
                unsafe { right.pack(i, 0, whole.range(i * block..(i + 1) * block)) };
            }
        });
        let packed = &*packed;
        par_ranges(threads, row_tasks * column_tasks, 1, |tasks| {
            let out = &out;
            let reach = steps.min(REACH);
            with_lines(rows * reach * STEP, |mine| {
                // SAFETY: tiles may be used, or the product would not fit.
                unsafe { Config::WHOLE.load() };
                for task in tasks {
                    let (row, column) = (task % row_tasks * rows, task / row_tasks * columns);
                    let row_end = (row + rows).min(left.blocks());
                    let column_end = (column + columns).min(right.blocks());
                    for first in (0..steps).step_by(reach) {
                        let count = reach.min(steps - first);
                        for (r, mine) in (row..row_end).zip(mine.chunks_exact_mut(reach * STEP)) {
                            // SAFETY: the features are those of tiles that may be used.
                            unsafe { left.pack(r, first, &mut mine[..count * STEP]) };
                        }
                        for c in column..column_end {
                            for from in (0..count).step_by(STEPS) {
                                let steps = STEPS.min(count - from);
                                let columns = packed[c * block + (first + from) * STEP..].as_ptr();
                                for r in row..row_end {
                                    let rows = mine[(r - row) * reach * STEP + from * STEP..].as_ptr();
                                    // SAFETY: blocks of both operands and the part of `dst` that they give; other tasks
                                    // have other blocks.
                                    unsafe {
                                        let part = Part {
                                            at: out.0.add(r * SIDE * p.dst.0 as usize + c * SIDE),
                                            stride: p.dst.0 as usize,
                                            rows: SIDE.min(p.m - r * SIDE),
                                            columns: SIDE.min(p.n - c * SIDE),
                                        };
                                        part.add(rows, columns, steps, p.accumulate || first + from > 0);
                                    }
                                }
                            }
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { tiles::release() };
            });
        });
    });
}

/// Scratch that begins at a cache line.
fn with_lines<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    with_scratch(len + 15, |all| {
        let skip = all.as_ptr().align_offset(64).min(15);
        f(&mut all[skip..skip + len])
    })
}
