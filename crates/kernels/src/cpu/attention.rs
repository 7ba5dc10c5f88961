//! Attention of a step's queries over the key-value cache.
//!
//! Keys stand in blocks of 16 slots, transposed (`[block][d][16]`), so that one register holds the scores of 16
//! slots and each score is one chain of fused multiply-adds over `d`. The softmax sum and the mix of values run
//! over *logical* positions in order: committed slots first, then the path of the row inside the step. A row of a
//! tree therefore reduces exactly as the same row decoded alone does, whatever slot it stands in.
#![expect(
    clippy::needless_range_loop,
    reason = "lanes of several arrays run together; their number is a constant"
)]

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::isa::{Isa, Lanes, Level, dispatch, prefetch_ahead};
use super::math::{capped, exp, sum_lanes};
use crate::pool::SendPtr;
use crate::{KvDtype, Pool, Segment, StepMask};

const BLOCK: usize = 16;

/// A number as the cache stores it.
trait Stored: Copy + Default + Send + Sync {
    fn round(values: &[f32], out: &mut [Self]);
    unsafe fn load<F: Lanes>(p: *const Self) -> F;
}

impl Stored for f32 {
    fn round(values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
    #[inline(always)]
    unsafe fn load<F: Lanes>(p: *const f32) -> F {
        // SAFETY: module rule of `isa`.
        unsafe { F::load(p) }
    }
}

impl Stored for f16 {
    fn round(values: &[f32], out: &mut [f16]) {
        out.convert_from_f32_slice(values);
        // A number beyond the range stays the largest one: an infinity would make every later row NaN.
        for v in out.iter_mut().filter(|v| v.is_infinite()) {
            *v = if v.is_sign_positive() { f16::MAX } else { f16::MIN };
        }
    }
    #[inline(always)]
    unsafe fn load<F: Lanes>(p: *const f16) -> F {
        // SAFETY: module rule of `isa`; `f16` is its bits.
        unsafe { F::load_f16(p.cast()) }
    }
}

/// Keys and values of one layer of one sequence.
pub struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    slots: Slots,
}

enum Slots {
    F32(Heads<f32>),
    F16(Heads<f16>),
}

/// Slots as stored; heads of `padded` values, whole registers.
struct Heads<T> {
    /// Per head `[block][head_dim][16]`.
    keys: Vec<Vec<T>>,
    /// Per head `[slot][padded]`.
    values: Vec<Vec<T>>,
}

/// Values that are rounded at once on their way into the cache.
const AT_ONCE: usize = 64;

/// Rows on their way into the slots of a head.
#[derive(Clone, Copy)]
struct NewRows<'a> {
    /// First slot.
    base: usize,
    count: usize,
    head: usize,
    /// Values of a row.
    width: usize,
    k: &'a [f32],
    v: &'a [f32],
}

fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(BLOCK)
}

impl<T: Stored> Heads<T> {
    fn new(kv_heads: usize) -> Heads<T> {
        Heads { keys: vec![Vec::new(); kv_heads], values: vec![Vec::new(); kv_heads] }
    }

    fn bytes(&self) -> usize {
        let count: usize = self.keys.iter().chain(&self.values).map(Vec::capacity).sum();
        count * size_of::<T>()
    }

    /// Columns `head * dim..` of rows of `width` values as slots `base..` of a head.
    fn write(keys: &mut Vec<T>, values: &mut Vec<T>, dim: usize, rows: NewRows<'_>) {
        let padded = padded(dim);
        let blocks = (rows.base + rows.count).div_ceil(BLOCK);
        if keys.len() < blocks * dim * BLOCK {
            keys.resize(blocks * dim * BLOCK, T::default());
            values.resize(blocks * BLOCK * padded, T::default());
        }
        for row in 0..rows.count {
            let slot = rows.base + row;
            let from = row * rows.width + rows.head * dim;
            let block = slot / BLOCK * dim * BLOCK + slot % BLOCK;
            for (at, part) in rows.k[from..from + dim].chunks(AT_ONCE).enumerate() {
                let mut rounded = [T::default(); AT_ONCE];
                T::round(part, &mut rounded[..part.len()]);
                let keys = &mut keys[block + at * AT_ONCE * BLOCK..];
                for (key, rounded) in keys.iter_mut().step_by(BLOCK).zip(&rounded[..part.len()]) {
                    *key = *rounded;
                }
            }
            T::round(&rows.v[from..from + dim], &mut values[slot * padded..slot * padded + dim]);
        }
    }

    fn copy(&mut self, dim: usize, from: usize, to: usize) {
        let padded = padded(dim);
        for keys in &mut self.keys {
            for d in 0..dim {
                let at = |s: usize| (s / BLOCK * dim + d) * BLOCK + s % BLOCK;
                keys[at(to)] = keys[at(from)];
            }
        }
        for values in &mut self.values {
            values.copy_within(from * padded..(from + 1) * padded, to * padded);
        }
    }
}

impl KvLayer {
    pub(crate) fn new(kv_heads: usize, head_dim: usize, dtype: KvDtype) -> KvLayer {
        let slots = match dtype {
            KvDtype::F32 => Slots::F32(Heads::new(kv_heads)),
            KvDtype::F16 => Slots::F16(Heads::new(kv_heads)),
        };
        KvLayer { kv_heads, head_dim, len: 0, slots }
    }

    /// Slots in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Key heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Values of one row of keys: `kv_heads * head_dim`.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// True before the first write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        match &self.slots {
            Slots::F32(heads) => heads.bytes(),
            Slots::F16(heads) => heads.bytes(),
        }
    }

    /// Writes `count` rows from slot `base` on and drops what lay behind them.
    pub(crate) fn write(&mut self, base: usize, count: usize, k: &[f32], v: &[f32]) {
        assert!(base <= self.len, "slots before {base} are not all written (cache has {})", self.len);
        let (width, dim) = (self.width(), self.head_dim);
        for head in 0..self.kv_heads {
            let rows = NewRows { base, count, head, width, k, v };
            match &mut self.slots {
                Slots::F32(heads) => {
                    Heads::write(&mut heads.keys[head], &mut heads.values[head], dim, rows);
                }
                Slots::F16(heads) => {
                    Heads::write(&mut heads.keys[head], &mut heads.values[head], dim, rows);
                }
            }
        }
        self.len = base + count;
    }

    pub(crate) fn compact(&mut self, base: usize, from: &[usize]) {
        for (i, &slot) in from.iter().enumerate() {
            let to = base + i;
            assert!(to <= slot && slot < self.len, "slots to keep must be ascending and written");
            if to != slot {
                match &mut self.slots {
                    Slots::F32(heads) => heads.copy(self.head_dim, slot, to),
                    Slots::F16(heads) => heads.copy(self.head_dim, slot, to),
                }
            }
        }
        self.len = base + from.len();
    }
}

/// Values from which writing is shared out among threads.
const PARALLEL_VALUES: usize = 1 << 11;

/// Writes the rows of `segments`, which stand one after the other in `k` and `v`, into their caches.
pub(crate) fn append(pool: &Pool, segments: &mut [Segment<'_, KvLayer>], k: &[f32], v: &[f32]) {
    let mut writes: Vec<Write<'_>> = Vec::new();
    let mut at = 0;
    for segment in segments {
        let (base, count) = (segment.mask.first_slot(), segment.mask.new_rows);
        let kv = &mut *segment.kv;
        assert!(base <= kv.len, "slots before {base} are not all written (cache has {})", kv.len);
        let (width, dim) = (kv.width(), kv.head_dim);
        let part = at..at + count * width;
        at = part.end;
        let (k, v) = (&k[part.clone()], &v[part]);
        kv.len = base + count;
        let rows = NewRows { base, count, head: 0, width, k, v };
        let mut add = |head: usize, slots| writes.push(Write { slots, dim, rows: NewRows { head, ..rows } });
        match &mut kv.slots {
            Slots::F32(heads) => {
                let heads = heads.keys.iter_mut().zip(&mut heads.values).enumerate();
                heads.for_each(|(head, (keys, values))| add(head, HeadSlots::F32(keys, values)));
            }
            Slots::F16(heads) => {
                let heads = heads.keys.iter_mut().zip(&mut heads.values).enumerate();
                heads.for_each(|(head, (keys, values))| add(head, HeadSlots::F16(keys, values)));
            }
        }
    }
    let run = if at < PARALLEL_VALUES { writes.len() } else { writes.len().div_ceil(pool.threads() * 2) };
    let len = writes.len();
    let all = SendPtr(writes.as_mut_ptr());
    pool.run(len.div_ceil(run.max(1)), &|task| {
        for i in task * run..((task + 1) * run).min(len) {
            // SAFETY: one of the writes, which all go to different heads; tasks take disjoint ones.
            let write = unsafe { &mut *all.get().add(i) };
            match &mut write.slots {
                HeadSlots::F32(keys, values) => Heads::write(keys, values, write.dim, write.rows),
                HeadSlots::F16(keys, values) => Heads::write(keys, values, write.dim, write.rows),
            }
        }
    });
}

/// What is to be written into one head.
struct Write<'a> {
    slots: HeadSlots<'a>,
    dim: usize,
    rows: NewRows<'a>,
}

/// Keys and values of one head.
enum HeadSlots<'a> {
    F32(&'a mut Vec<f32>, &'a mut Vec<f32>),
    F16(&'a mut Vec<f16>, &'a mut Vec<f16>),
}

/// Queries (rows, and heads that share a key head) that share one pass over keys and values.
const ROWS: usize = 4;

#[derive(Clone, Copy)]
struct AttendArgs<'a, T> {
    /// The queries of the group, `head_dim` values each.
    q: [*const f32; ROWS],
    y: [*mut f32; ROWS],
    keys: &'a [T],
    values: &'a [T],
    head_dim: usize,
    scale: f32,
    /// Per row the logit of its head's sink.
    sinks: Option<[f32; ROWS]>,
    softcap: Option<f32>,
    rows: usize,
    /// Slots `0..common_end` are seen by all rows at their own index.
    common_end: usize,
    /// Per row: first visible position.
    first: [usize; ROWS],
    /// Per row: slots after `common_end`, in logical order.
    tails: [&'a [u32]; ROWS],
    slots: usize,
    /// `[ROWS, stride]`
    scores: *mut f32,
    stride: usize,
}

/// Scores of `R` rows against `B` blocks of 16 slots.
#[inline(always)]
unsafe fn score_blocks<I: Isa, T: Stored, const R: usize, const B: usize>(
    a: &AttendArgs<'_, T>,
    row: usize,
    block: usize,
) {
    // SAFETY: module rule of `isa`; rows and blocks are in range by the caller's loops.
    unsafe {
        let mut acc = [[I::F::splat(0.0); B]; R];
        let base = a.keys.as_ptr().add(block * a.head_dim * BLOCK);
        for d in 0..a.head_dim {
            let mut keys = [I::F::splat(0.0); B];
            for (b, k) in keys.iter_mut().enumerate() {
                let at = base.add((b * a.head_dim + d) * BLOCK);
                prefetch_ahead(at);
                *k = T::load(at);
            }
            for r in 0..R {
                let q = I::F::splat(*a.q[row + r].add(d));
                for b in 0..B {
                    acc[r][b] = I::F::fma(keys[b], q, acc[r][b]);
                }
            }
        }
        let scale = I::F::splat(a.scale);
        for (r, values) in acc.into_iter().enumerate() {
            for (b, v) in values.into_iter().enumerate() {
                I::F::store(a.scores.add((row + r) * a.stride + (block + b) * BLOCK), I::F::mul(v, scale));
            }
        }
    }
}

/// Values of `R` rows mixed by their weights, `C` groups of 16 columns from `column` on.
#[inline(always)]
unsafe fn mix<I: Isa, T: Stored, const R: usize, const C: usize>(
    a: &AttendArgs<'_, T>,
    column: usize,
    joint: usize,
    sums: &[f32; ROWS],
) {
    // SAFETY: module rule; positions and columns are in range by the caller's loops.
    unsafe {
        let mut acc = [[I::F::splat(0.0); C]; R];
        let padded = padded(a.head_dim);
        let value = |slot: usize, c: usize| -> I::F {
            T::load(a.values.as_ptr().add(slot * padded + column + c * BLOCK))
        };
        let weight = |r: usize, position: usize| I::F::splat(*a.scores.add(r * a.stride + position));
        for r in 0..R {
            for p in a.first[r].min(joint)..joint {
                let w = weight(r, p);
                for c in 0..C {
                    acc[r][c] = I::F::fma(w, value(p, c), acc[r][c]);
                }
            }
        }
        for p in joint..a.common_end {
            prefetch_ahead(a.values.as_ptr().add(p * padded + column));
            let mut v = [I::F::splat(0.0); C];
            for c in 0..C {
                v[c] = value(p, c);
            }
            for r in 0..R {
                let w = weight(r, p);
                for c in 0..C {
                    acc[r][c] = I::F::fma(w, v[c], acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for (i, slot) in a.tails[r].iter().enumerate() {
                let position = a.common_end + i;
                if position < a.first[r] {
                    continue;
                }
                let w = weight(r, position);
                for c in 0..C {
                    acc[r][c] = I::F::fma(w, value(*slot as usize, c), acc[r][c]);
                }
            }
            for c in 0..C {
                let out = I::F::mul(acc[r][c], I::F::splat(sums[r]));
                let from = column + c * BLOCK;
                let y = a.y[r].add(from);
                let count = a.head_dim.saturating_sub(from).min(BLOCK);
                I::F::store_first(y, count, out);
            }
        }
    }
}

#[inline(always)]
unsafe fn attend_body<I: Isa, T: Stored>(a: AttendArgs<'_, T>) {
    let blocks = a.slots.div_ceil(BLOCK);
    let start = (0..a.rows).map(|r| a.first[r]).min().unwrap_or(0) / BLOCK;
    let mut sums = [0.0f32; ROWS];
    // SAFETY: module rule of `isa`; `scores` has `rows * stride` values with `stride >= blocks * 16`.
    unsafe {
        let mut block = start;
        while block < blocks {
            let wide = if blocks - block >= I::SCORE_BLOCKS { I::SCORE_BLOCKS } else { 1 };
            match (a.rows, wide) {
                (4, 4) => score_blocks::<I, T, 4, 4>(&a, 0, block),
                (4, 2) => score_blocks::<I, T, 4, 2>(&a, 0, block),
                (4, _) => score_blocks::<I, T, 4, 1>(&a, 0, block),
                (3, 4) => score_blocks::<I, T, 3, 4>(&a, 0, block),
                (3, 2) => score_blocks::<I, T, 3, 2>(&a, 0, block),
                (3, _) => score_blocks::<I, T, 3, 1>(&a, 0, block),
                (2, 4) => score_blocks::<I, T, 2, 4>(&a, 0, block),
                (2, 2) => score_blocks::<I, T, 2, 2>(&a, 0, block),
                (2, _) => score_blocks::<I, T, 2, 1>(&a, 0, block),
                (_, 4) => score_blocks::<I, T, 1, 4>(&a, 0, block),
                (_, 2) => score_blocks::<I, T, 1, 2>(&a, 0, block),
                (_, _) => score_blocks::<I, T, 1, 1>(&a, 0, block),
            }
            block += wide;
        }
        for r in 0..a.rows {
            let scores = std::slice::from_raw_parts_mut(a.scores.add(r * a.stride), a.stride);
            // Logical order: the tail is gathered behind the common part. Tail slots only grow along a path, so
            // reading ahead of writing is safe.
            for (i, slot) in a.tails[r].iter().enumerate() {
                scores[a.common_end + i] = scores[*slot as usize];
            }
            let end = a.common_end + a.tails[r].len();
            let first = a.first[r];
            let from = first / BLOCK * BLOCK;
            if let Some(cap) = a.softcap {
                for s in &mut scores[from..end] {
                    *s = capped(*s, cap);
                }
            }
            scores[from..first].fill(f32::NEG_INFINITY);
            let padded_end = end.next_multiple_of(BLOCK);
            scores[end..padded_end].fill(f32::NEG_INFINITY);
            let mut lanes = [f32::NEG_INFINITY; BLOCK];
            for chunk in scores[from..padded_end].chunks_exact(BLOCK) {
                for (l, s) in lanes.iter_mut().zip(chunk) {
                    *l = l.max(*s);
                }
            }
            let max = lanes.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            let max = a.sinks.map_or(max, |sinks| max.max(sinks[r]));
            for s in &mut scores[from..padded_end] {
                *s = exp(*s - max);
            }
            scores[from..first].fill(0.0);
            scores[end..padded_end].fill(0.0);
            let mut lanes = [0.0f32; BLOCK];
            for chunk in scores[from..padded_end].chunks_exact(BLOCK) {
                for (l, s) in lanes.iter_mut().zip(chunk) {
                    *l += *s;
                }
            }
            let sum = sum_lanes(&lanes);
            sums[r] = 1.0 / a.sinks.map_or(sum, |sinks| sum + exp(sinks[r] - max));
        }
        let joint = (0..a.rows).map(|r| a.first[r]).max().unwrap_or(0).min(a.common_end);
        let columns = a.head_dim.div_ceil(BLOCK);
        let mut at = 0;
        while at < columns {
            let wide = if columns - at >= I::MIX_COLUMNS { I::MIX_COLUMNS } else { 1 };
            let column = at * BLOCK;
            match (a.rows, wide) {
                (4, 4) => mix::<I, T, 4, 4>(&a, column, joint, &sums),
                (4, 2) => mix::<I, T, 4, 2>(&a, column, joint, &sums),
                (4, _) => mix::<I, T, 4, 1>(&a, column, joint, &sums),
                (3, 4) => mix::<I, T, 3, 4>(&a, column, joint, &sums),
                (3, 2) => mix::<I, T, 3, 2>(&a, column, joint, &sums),
                (3, _) => mix::<I, T, 3, 1>(&a, column, joint, &sums),
                (2, 4) => mix::<I, T, 2, 4>(&a, column, joint, &sums),
                (2, 2) => mix::<I, T, 2, 2>(&a, column, joint, &sums),
                (2, _) => mix::<I, T, 2, 1>(&a, column, joint, &sums),
                (_, 4) => mix::<I, T, 1, 4>(&a, column, joint, &sums),
                (_, 2) => mix::<I, T, 1, 2>(&a, column, joint, &sums),
                (_, _) => mix::<I, T, 1, 1>(&a, column, joint, &sums),
            }
            at += wide;
        }
    }
}
#[inline(always)]
unsafe fn attend_f32_body<I: Isa>(a: AttendArgs<'_, f32>) {
    // SAFETY: passed on.
    unsafe { attend_body::<I, f32>(a) }
}
#[inline(always)]
unsafe fn attend_f16_body<I: Isa>(a: AttendArgs<'_, f16>) {
    // SAFETY: passed on.
    unsafe { attend_body::<I, f16>(a) }
}
dispatch! { unsafe fn attend_f32(a: AttendArgs<'_, f32>) = attend_f32_body }
dispatch! { unsafe fn attend_f16(a: AttendArgs<'_, f16>) = attend_f16_body }

thread_local! {
    static SCORES: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// One sequence's part of a step: rows `first_row..` of the batch and the cache they end.
pub(crate) struct Part<'a> {
    pub first_row: usize,
    pub kv: &'a KvLayer,
    pub mask: &'a StepMask<'a>,
}

/// A part with the paths of its rows worked out.
struct Prepared<'a> {
    part: &'a Part<'a>,
    /// The rows follow each other.
    chain: bool,
    step_slots: Vec<u32>,
    /// Slots inside the step that each row sees: its path, itself last, or the whole block; empty for a chain.
    paths: Vec<Vec<u32>>,
}

impl<'a> Prepared<'a> {
    fn new(part: &'a Part<'a>) -> Prepared<'a> {
        let (base, parents) = (part.mask.base, part.mask.parents);
        assert!(part.kv.len == base + parents.len(), "the cache must end with the rows of this step");
        let step_slots: Vec<u32> = (0..parents.len()).map(|i| (base + i) as u32).collect();
        let block = part.mask.whole_block;
        let chain =
            !block && parents.iter().enumerate().all(|(i, p)| *p == i.checked_sub(1).map(|p| p as u32));
        let mut paths: Vec<Vec<u32>> = Vec::new();
        if block {
            paths = vec![step_slots.clone(); parents.len()];
        } else if !chain {
            for (i, parent) in parents.iter().enumerate() {
                let mut path = parent.map_or_else(Vec::new, |p| paths[p as usize].clone());
                path.push((base + i) as u32);
                paths.push(path);
            }
        }
        Prepared { part, chain, step_slots, paths }
    }
}

pub(crate) fn attention(
    level: Level,
    pool: &Pool,
    q: &[f32],
    heads: usize,
    parts: &[Part<'_>],
    y: &mut [f32],
) {
    let prepared: Vec<Prepared<'_>> = parts.iter().map(Prepared::new).collect();
    // Few queries are shared out in smaller groups if that leaves no thread without work.
    let group_rows = [ROWS, 2, 1]
        .into_iter()
        .find(|rows| {
            let tasks: usize = parts
                .iter()
                .map(|p| {
                    let kv_heads = p.kv.kv_heads;
                    kv_heads * (p.mask.new_rows * (heads / kv_heads.max(1))).div_ceil(*rows)
                })
                .sum();
            tasks.is_multiple_of(pool.threads()) || tasks >= 4 * pool.threads()
        })
        .unwrap_or(ROWS);
    let mut tasks: Vec<(usize, usize, usize)> = Vec::new();
    for (index, p) in prepared.iter().enumerate() {
        let kv = p.part.kv;
        assert!(heads.is_multiple_of(kv.kv_heads), "query heads must be a multiple of key heads");
        let end = (p.part.first_row + p.part.mask.new_rows) * heads * kv.head_dim;
        assert!(q.len() >= end && y.len() >= end, "attention buffers too short");
        assert!(p.part.mask.sinks.is_none_or(|s| s.len() == heads), "one sink per head");
        let queries = p.part.mask.new_rows * (heads / kv.kv_heads);
        for kv_head in 0..kv.kv_heads {
            tasks.extend((0..queries.div_ceil(group_rows)).map(|group| (index, kv_head, group)));
        }
    }
    let out = SendPtr(y.as_mut_ptr());
    pool.run(tasks.len(), &|task| {
        let (index, kv_head, group) = tasks[task];
        let p = &prepared[index];
        let (kv, mask, chain) = (p.part.kv, p.part.mask, p.chain);
        let width = heads * kv.head_dim;
        // Queries of a key head: row by row, in each row the heads that share it.
        let sharing = heads / kv.kv_heads;
        let count = group_rows.min(mask.new_rows * sharing - group * group_rows);
        let row_of = |lane: usize| (group * group_rows + lane) / sharing;
        // Index of a row among the uncommitted ones.
        let node_of = |lane: usize| mask.parents.len() - mask.new_rows + row_of(lane);
        // In a chain the rows before the group are common too; a tree shares the committed part only.
        let common_end = if chain { mask.base + node_of(0) } else { mask.base };
        let mut first = [0usize; ROWS];
        let mut tails: [&[u32]; ROWS] = [&[]; ROWS];
        let mut sinks = mask.sinks.map(|_| [0.0; ROWS]);
        let mut queries = [std::ptr::null(); ROWS];
        let mut outputs = [std::ptr::null_mut(); ROWS];
        for lane in 0..count {
            let node = node_of(lane);
            tails[lane] = if chain { &p.step_slots[node_of(0)..=node] } else { &p.paths[node] };
            first[lane] = mask.window.map_or(0, |w| (common_end + tails[lane].len()).saturating_sub(w));
            let head = kv_head * sharing + (group * group_rows + lane) % sharing;
            if let (Some(sinks), Some(all)) = (&mut sinks, mask.sinks) {
                sinks[lane] = all[head];
            }
            let at = (p.part.first_row + row_of(lane)) * width + head * kv.head_dim;
            queries[lane] = q[at..].as_ptr();
            // SAFETY: the head's columns of the row exist; tasks write disjoint parts.
            outputs[lane] = unsafe { out.get().add(at) };
        }
        let last = if mask.whole_block { mask.parents.len() - 1 } else { node_of(count - 1) };
        let slots = mask.base + last + 1;
        let stride = slots.next_multiple_of(BLOCK) + 4 * BLOCK;
        SCORES.with_borrow_mut(|scores| {
            if scores.len() < ROWS * stride {
                scores.resize(ROWS * stride, 0.0);
            }
            macro_rules! attend {
                ($kernel:ident, $heads:expr) => {{
                    let args = AttendArgs {
                        q: queries,
                        y: outputs,
                        keys: &$heads.keys[kv_head],
                        values: &$heads.values[kv_head],
                        head_dim: kv.head_dim,
                        scale: mask.scale,
                        sinks,
                        softcap: mask.softcap,
                        rows: count,
                        common_end,
                        first,
                        tails,
                        slots,
                        scores: scores.as_mut_ptr(),
                        stride,
                    };
                    // SAFETY: `args` describes slots, rows and columns inside their buffers.
                    unsafe { $kernel(level, args) };
                }};
            }
            match &kv.slots {
                Slots::F32(heads) => attend!(attend_f32, heads),
                Slots::F16(heads) => attend!(attend_f16, heads),
            }
        });
    });
}
