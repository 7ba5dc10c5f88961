//! Matrix products of f32 numbers as products of bf16 numbers with f32 sums, in tile registers or in vectors.
//!
//! Every number is rounded to one bf16 number, and a product is off by at most `2^-8` of itself; or it is taken as the sum of two:
//! `x = high + low + rest` with a rest of at most `2^-17 |x|`. Of the four products of two such sums the three larger ones are
//! taken, and a product is off by at most `2^-15` of itself, where one f32 rounding is `2^-24` and TF32's `2^-10`. The sum over
//! `k` runs in an order that the sizes and the CPU alone decide.

use std::arch::asm;
use std::arch::x86_64::*;

use super::linear::{Product, Products};
use super::par::{Shared, par_ranges, with_scratch};
use crate::tiles::{self, Config};

/// Rows or columns of `dst` that registers hold together: two tiles.
const SIDE: usize = 32;
/// Terms of the sum that one instruction takes per element.
const DEPTH: usize = 32;
/// Values of a packed step per part: [`SIDE`] rows or columns of [`DEPTH`] terms, two in the room of a value.
const PART: usize = SIDE * DEPTH / 2;
/// Steps after which `dst` is set aside: so many columns' worth of operands stay in the nearest cache.
const STEPS: usize = 8;
/// Steps of packed rows that a task works with before it takes the next ones.
const REACH: usize = 32;
/// Values of packed rows that a task works with at once, so that they stay in a cache of its own.
const ROWS_AT_ONCE: usize = 1 << 18;
/// Products below this are not worth packing.
const LEAST: usize = 1 << 20;

/// Whether a product is worth packing, and can be.
pub(super) fn fits(p: &Product) -> bool {
    let sides = p.m.min(p.n).min(p.k) >= SIDE;
    let unit = |s: (isize, isize)| s.0 == 1 || s.1 == 1;
    sides && p.m * p.n * p.k >= LEAST && p.dst.1 == 1 && unit(p.lhs) && unit(p.rhs)
}

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// Tile registers.
    Tiles,
    /// AVX-512 with products of bf16 numbers.
    Vectors,
}

/// How this CPU computes products of bf16 numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    unit: Unit,
    /// bf16 numbers that stand for a number: 1 or 2.
    parts: usize,
}

/// `dst (+)= rows · columns` over packed steps, for [`SIDE`] rows and columns: `dst` and the values from one row of it to the next,
/// the operands, the steps, and whether it adds to what is there.
type AddWhole = unsafe fn((*mut f32, usize), *const f32, *const f32, usize, bool);

impl Way {
    /// All that this CPU has.
    pub(super) fn all() -> impl Iterator<Item = Way> {
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        [
            (tiles::is_usable(), Way { unit: Unit::Tiles, parts: 2 }),
            (tiles::is_usable(), Way { unit: Unit::Tiles, parts: 1 }),
            (vectors, Way { unit: Unit::Vectors, parts: 1 }),
        ]
        .into_iter()
        .filter_map(|(has, way)| has.then_some(way))
    }

    /// The fastest one for these products; `None` where there is none, or none is wanted.
    pub(super) fn of(products: Products) -> Option<Way> {
        match products {
            Products::F32 => None,
            Products::Bf16 => Way::all().find(|way| way.parts == 1),
            Products::Bf16x3 => Way::all().find(|way| way.parts == 2),
        }
    }

    /// Values of a packed step.
    fn step(self) -> usize {
        self.parts * PART
    }

    fn add_whole(self) -> AddWhole {
        match self {
            Way { unit: Unit::Tiles, parts: 1 } => add_in_tiles::<1>,
            Way { unit: Unit::Tiles, .. } => add_in_tiles::<2>,
            Way { unit: Unit::Vectors, .. } => add_in_vectors,
        }
    }
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

    /// Packs the rows (columns) of a block, from step `first` on, in so many parts.
    ///
    /// # Safety
    /// The operand is complete, `out` has [`PART`] values per step and part, and the CPU has `avx512f`, `avx512bw` and `avx512bf16`.
    unsafe fn pack(&self, parts: usize, block: usize, first: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match parts {
                1 => self.pack_parts::<1>(block, first, out),
                _ => self.pack_parts::<2>(block, first, out),
            }
        }
    }

    /// [`Side::pack`]: step by step two tiles with the high parts, and two with the low ones if there are two.
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn pack_parts<const PARTS: usize>(&self, block: usize, first: usize, out: &mut [f32]) {
        for (step, out) in (first..).zip(out.chunks_exact_mut(PARTS * PART)) {
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
                    let turns = (self.along_k == 1) == self.by_term;
                    if turns {
                        high = transposed(high);
                    }
                    for (i, high) in high.into_iter().enumerate() {
                        _mm512_storeu_si512(out.add(tile * 16 + i), high);
                    }
                    if PARTS == 1 {
                        continue;
                    }
                    if turns {
                        low = transposed(low);
                    }
                    for (i, low) in low.into_iter().enumerate() {
                        _mm512_storeu_si512(out.add((2 + tile) * 16 + i), low);
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

/// One step of [`SIDE`] rows times [`SIDE`] columns into registers 0 to 3: the high parts of both, which stay in registers 4 to 7, and
/// what `more` does with them.
macro_rules! multiply {
    ($rows:ident, $columns:ident $(, $more:literal)* $(,)?) => {
        asm!(
            "tileloadd tmm4, [{columns} + {row}*1]",
            "tileloadd tmm6, [{rows} + {row}*1]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tileloadd tmm5, [{columns} + {row}*1 + 1024]",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tileloadd tmm7, [{rows} + {row}*1 + 1024]",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            $($more,)*
            rows = in(reg) $rows,
            columns = in(reg) $columns,
            row = in(reg) 64usize,
            options(nostack, preserves_flags, readonly),
        )
    };
}

/// A step of numbers in one part.
///
/// # Safety
/// Tiles are configured; both operands have a packed step.
#[inline(always)]
unsafe fn multiply_once(rows: *const f32, columns: *const f32) {
    // SAFETY: the caller's promise.
    unsafe { multiply!(rows, columns) };
}

/// The same of numbers in two parts.
///
/// # Safety
/// As of [`multiply_once`].
#[inline(always)]
unsafe fn multiply_thrice(rows: *const f32, columns: *const f32) {
    // SAFETY: the caller's promise.
    unsafe {
        multiply!(
            rows,
            columns,
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
    /// What `add_whole` needs; the operands have so many packed steps, and the part lies in `dst` and is nobody else's.
    unsafe fn add(
        self,
        add_whole: AddWhole,
        (rows, columns): (*const f32, *const f32),
        steps: usize,
        adds: bool,
    ) {
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

/// [`AddWhole`] in vectors, of numbers in one part: eight rows at a time, two vectors of columns each.
///
/// # Safety
/// The CPU has `avx512f` and `avx512bf16`, the operands have so many packed steps, and `dst` is nobody else's.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_in_vectors(
    (at, stride): (*mut f32, usize),
    rows: *const f32,
    columns: *const f32,
    steps: usize,
    adds: bool,
) {
    const ROWS: usize = 8;
    // SAFETY: both are 512 bits.
    let numbers = |v: __m512| unsafe { std::mem::transmute::<__m512, __m512bh>(v) };
    for first in (0..SIDE).step_by(ROWS) {
        // SAFETY: `dst` has [`SIDE`] rows and columns; steps of rows have 16 pairs of terms a row, those of columns two tiles of 16 pairs
        // with 16 columns each.
        unsafe {
            let at = at.add(first * stride);
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            if adds {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let at = at.add(i * stride);
                    *sums = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))];
                }
            }
            for step in 0..steps {
                let rows = rows.add(step * PART + first * 16);
                let columns = columns.add(step * PART);
                for pair in 0..16 {
                    let column = columns.add(pair * 16);
                    let both = [_mm512_loadu_ps(column), _mm512_loadu_ps(column.add(PART / 2))];
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let row = numbers(_mm512_set1_ps(*rows.add(i * 16 + pair)));
                        sums[0] = _mm512_dpbf16_ps(sums[0], row, numbers(both[0]));
                        sums[1] = _mm512_dpbf16_ps(sums[1], row, numbers(both[1]));
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let at = at.add(i * stride);
                _mm512_storeu_ps(at, sums[0]);
                _mm512_storeu_ps(at.add(16), sums[1]);
            }
        }
    }
}

/// [`AddWhole`] in tile registers, of numbers in so many parts.
///
/// # Safety
/// Tiles are configured, the operands have so many packed steps, and `dst` is nobody else's.
unsafe fn add_in_tiles<const PARTS: usize>(
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
            let at = step * PARTS * PART;
            match PARTS {
                1 => multiply_once(rows.add(at), columns.add(at)),
                _ => multiply_thrice(rows.add(at), columns.add(at)),
            }
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
fn shares(threads: usize, step: usize, left: &Side, right: &Side) -> (usize, usize) {
    let most = (ROWS_AT_ONCE / (left.steps().min(REACH) * step)).clamp(1, left.blocks());
    let tasks = 4 * threads;
    if left.len > right.len {
        // Packed once each, the columns read by all.
        (left.blocks().div_ceil(tasks).min(most), 1)
    } else {
        // The columns read as seldom as can be, the rows packed for every part of them.
        (most, tasks.div_ceil(left.blocks().div_ceil(most)).min(right.blocks()))
    }
}

/// The product of bf16 numbers. The columns are packed as a whole, the rows by each task, so many that they stay in its cache.
///
/// # Safety
/// As of [`Product::run`]; the product [`fits`].
pub(super) unsafe fn run(
    p: &Product,
    way: Way,
    threads: usize,
    dst: *mut f32,
    (lhs, rhs): (*const f32, *const f32),
) {
    let left = Side { at: lhs, len: p.m, along: p.lhs.0, k: p.k, along_k: p.lhs.1, by_term: false };
    let right = Side { at: rhs, len: p.n, along: p.rhs.1, k: p.k, along_k: p.rhs.0, by_term: true };
    let (steps, step, add_whole) = (left.steps(), way.step(), way.add_whole());
    let block = steps * step;
    let (rows, parts) = shares(threads, step, &left, &right);
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
                // SAFETY: every block has its own part; the CPU has what a way needs.
                unsafe { right.pack(way.parts, i, 0, whole.range(i * block..(i + 1) * block)) };
            }
        });
        let packed = &*packed;
        par_ranges(threads, row_tasks * column_tasks, 1, |tasks| {
            let out = &out;
            let reach = steps.min(REACH);
            with_lines(rows * reach * step, |mine| {
                if way.unit == Unit::Tiles {
                    // SAFETY: there is no such way where they may not be used.
                    unsafe { Config::WHOLE.load() };
                }
                for task in tasks {
                    let (row, column) = (task % row_tasks * rows, task / row_tasks * columns);
                    let row_end = (row + rows).min(left.blocks());
                    let column_end = (column + columns).min(right.blocks());
                    for first in (0..steps).step_by(reach) {
                        let count = reach.min(steps - first);
                        for (r, mine) in (row..row_end).zip(mine.chunks_exact_mut(reach * step)) {
                            // SAFETY: the CPU has what a way needs.
                            unsafe { left.pack(way.parts, r, first, &mut mine[..count * step]) };
                        }
                        for c in column..column_end {
                            for from in (0..count).step_by(STEPS) {
                                let steps = STEPS.min(count - from);
                                let columns = packed[c * block + (first + from) * step..].as_ptr();
                                for r in row..row_end {
                                    let rows = mine[((r - row) * reach + from) * step..].as_ptr();
                                    // SAFETY: blocks of both operands and the part of `dst` that they give; other tasks
                                    // have other blocks.
                                    unsafe {
                                        let part = Part {
                                            at: out.0.add(r * SIDE * p.dst.0 as usize + c * SIDE),
                                            stride: p.dst.0 as usize,
                                            rows: SIDE.min(p.m - r * SIDE),
                                            columns: SIDE.min(p.n - c * SIDE),
                                        };
                                        let adds = p.accumulate || first + from > 0;
                                        part.add(add_whole, (rows, columns), steps, adds);
                                    }
                                }
                            }
                        }
                    }
                }
                if way.unit == Unit::Tiles {
                    // SAFETY: as above.
                    unsafe { tiles::release() };
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    /// Each way that the CPU has, not only the fastest: products of rounded numbers are the same, sums are off by f32's roundings.
    #[test]
    fn every_way_gives_the_sums_of_rounded_numbers() {
        let (m, n, k) = (70, 300, 577);
        let (a, b) = (noise(1, m * k), noise(2, n * k));
        let rounded = |x: f32| half::bf16::from_f32(x).to_f64();
        let p = Product {
            m,
            n,
            k,
            dst: (n as isize, 1),
            lhs: (k as isize, 1),
            rhs: (1, k as isize),
            accumulate: false,
        };
        assert!(fits(&p));
        for way in Way::all().filter(|way| way.parts == 1) {
            let mut y = vec![f32::NAN; m * n];
            // SAFETY: the operands are complete, and `y` is.
            unsafe { run(&p, way, 2, y.as_mut_ptr(), (a.as_ptr(), b.as_ptr())) };
            for (at, y) in y.iter().enumerate() {
                let terms = a[at / n * k..]
                    .iter()
                    .zip(&b[at % n * k..])
                    .take(k)
                    .map(|(a, b)| rounded(*a) * rounded(*b));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                assert!((f64::from(*y) - sum).abs() <= 1e-5 * size, "{way:?} at {at}: {y}, not {sum}");
            }
        }
    }
}
