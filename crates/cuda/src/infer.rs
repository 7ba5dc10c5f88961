//! [`Kernels`] on a device: decoding and capture.
//!
//! Every operation is row-exact, whatever the number of rows: a row's outputs, norms and attention run over its own numbers
//! in one fixed order. With [`Operands::Bf16`](crate::Operands) products round inputs and weights to bf16 and add in f32.
//!
//! Shape legend: `R` rows of a call, `I`/`O` input and output features, `V` outputs of a head.

use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_kernels::train::Columns;
use draftsmith_kernels::{
    Activation, Cell, DrawRow, KernelError, Kernels, KvDtype, Memory, PackMode, RopeTable, Segment, StepMask,
    TopK, TrainKernels, WeightView,
};

use crate::error::{CudaError, MOST_HEAD_DIM};
use crate::launcher::{Arg, At, Launcher};
use crate::memory::{Buf, KeptTable, Table};
use crate::ops::{Cuda, THREADS};
use crate::pages::{KvPages, KvShape, PAGE, Slabs};
use crate::train::activation_args;
use crate::weights::Packed;

/// Queries that a warp takes together, as `decode.cu` says.
const TOGETHER: usize = 4;
/// A row whose positions stand in order.
const NO_PATH: u32 = u32::MAX;
/// No id.
const NO_ID: u32 = u32::MAX;
/// Tables of steps that are kept on the device.
const KEPT_TABLES: usize = 4;

/// Whether one launch can take both.
fn alike<L: Launcher>(a: &Segment<'_, KvPages<L>>, b: &Segment<'_, KvPages<L>>) -> bool {
    let (m, n) = (&a.mask, &b.mask);
    let sinks = match (m.sinks, n.sinks) {
        (None, None) => true,
        (Some(a), Some(b)) => std::ptr::eq(a, b) || a == b,
        _ => false,
    };
    a.kv.shape == b.kv.shape && m.scale == n.scale && m.softcap == n.softcap && sinks
}

/// What the rows of a mask see, four numbers each as `decode.cu` takes them; slots of paths are added to `paths`.
fn sights(mask: &StepMask<'_>, rows: &mut Vec<u32>, paths: &mut Vec<u32>) {
    let (base, all) = (mask.base, mask.parents.len());
    let first = all - mask.new_rows;
    let chain = mask.parents.iter().enumerate().all(|(i, p)| p.map_or(0, |p| p as usize + 1) == i);
    for row in first..all {
        let mut path = NO_PATH;
        let end = if mask.whole_block {
            base + all
        } else if chain {
            base + row + 1
        } else {
            // Itself, then its ancestors; kept from the oldest on.
            let from = paths.len();
            let mut at = Some(row);
            while let Some(slot) = at {
                paths.push((base + slot) as u32);
                at = mask.parents[slot].map(|p| p as usize);
            }
            paths[from..].reverse();
            path = from as u32;
            base + paths.len() - from
        };
        let window = mask.window.filter(|_| !mask.whole_block);
        let begin = window.map_or(0, |window| end.saturating_sub(window));
        rows.extend([begin as u32, end as u32, path, base as u32]);
    }
}

impl<L: Launcher> Cuda<L> {
    /// Slabs of keys and values of this shape.
    fn slabs_of(&self, shape: KvShape) -> Arc<Mutex<Slabs<L>>> {
        let mut all = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(shape).or_insert_with(|| Arc::new(Mutex::new(Slabs::new(shape)))))
    }

    /// A table on the device, the same as before if it holds the same. They are kept until somebody asks for a result.
    fn kept_table(&self, words: Vec<u32>) -> Arc<Table<L>> {
        let mut kept = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|table| table.words == words) {
            return Arc::clone(&kept[at].table);
        }
        let table = Arc::new(self.table(&words));
        kept.truncate(KEPT_TABLES - 1);
        kept.insert(0, KeptTable { words, table: Arc::clone(&table) });
        table
    }

    /// Writes rows of keys and values where `places` (page and slot of each) says.
    fn append(
        &self,
        slabs: &Slabs<L>,
        shape: KvShape,
        (k, v, first): (&Buf<L>, &Buf<L>, usize),
        places: &[u32],
    ) {
        let (rows, width) = (places.len() / 2, shape.width());
        if rows == 0 {
            return;
        }
        assert!((first + rows) * width <= k.capacity.min(v.capacity), "complete keys and values");
        let places = self.table(places);
        let args = [
            Arg::Buffer(k.place(first * width)),
            Arg::Buffer(v.place(first * width)),
            slabs.arg(),
            Arg::Buffer(Some(places.at(0))),
            Arg::I64(rows as i64),
            Arg::I32(width as i32),
            Arg::I32(shape.head_dim as i32),
        ];
        let kernel = match shape.dtype {
            KvDtype::F16 => "kv_append_f16",
            KvDtype::F32 => "kv_append_f32",
        };
        self.over(rows * width, kernel, &args);
    }

    /// Attention of segments that one launch takes, whose rows begin at `first_row`; returns their rows.
    fn attend_alike(
        &self,
        (q, k, v): (&Buf<L>, &Buf<L>, &Buf<L>),
        heads: usize,
        segments: &mut [Segment<'_, KvPages<L>>],
        first_row: usize,
        y: &Buf<L>,
    ) -> usize {
        let shape = segments[0].kv.shape;
        let (scale, softcap) = (segments[0].mask.scale, segments[0].mask.softcap);
        let sinks = segments[0].mask.sinks.map(|sinks| {
            assert_eq!(sinks.len(), heads, "one sink per head");
            self.kept_table(sinks.iter().map(|s| s.to_bits()).collect())
        });
        let KvShape { kv_heads, head_dim, dtype } = shape;
        assert!(heads.is_multiple_of(kv_heads) && head_dim.is_multiple_of(2), "whole groups of heads");
        let group = heads / kv_heads;
        let (mut places, mut pages) = (Vec::new(), Vec::new());
        let (mut rows, mut items, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for segment in segments.iter_mut() {
            let (kv, mask) = (&mut *segment.kv, &segment.mask);
            let (first, new) = (mask.first_slot(), mask.new_rows);
            assert!(first <= kv.len, "rows follow the slots that are there");
            self.must(kv.resize(first + new, &self.pool));
            places.extend((first..first + new).flat_map(|slot| kv.place(slot)));
            let row = rows.len() / 4;
            sights(mask, &mut rows, &mut paths);
            for query in (0..new * group).step_by(TOGETHER) {
                let count = TOGETHER.min(new * group - query);
                for head in 0..kv_heads {
                    items.extend([head, row, query, count, pages.len()].map(|n| n as u32));
                }
            }
            pages.extend_from_slice(&kv.pages);
        }
        let (new_rows, item_count) = (rows.len() / 4, items.len() / 5);
        if new_rows == 0 {
            return 0;
        }
        let width = heads * head_dim;
        assert!((first_row + new_rows) * width <= q.capacity.min(y.capacity), "complete queries");
        let slabs = segments[0].kv.slabs();
        self.append(&slabs, shape, (k, v, first_row), &places);
        let (rows_at, paths_at) = (items.len() * 4, (items.len() + rows.len()) * 4);
        items.extend(rows);
        // A place for no path.
        paths.push(0);
        items.extend(paths);
        let (table, pages) = (self.kept_table(items), self.table(&pages));
        let kernel = match (dtype, head_dim) {
            (KvDtype::F16, ..=64) => "attend_f16_64",
            (KvDtype::F16, ..=128) => "attend_f16_128",
            (KvDtype::F16, ..=256) => "attend_f16_256",
            (KvDtype::F32, ..=64) => "attend_f32_64",
            (KvDtype::F32, ..=128) => "attend_f32_128",
            (KvDtype::F32, ..=256) => "attend_f32_256",
            (_, found) => self.must(Err(CudaError::WideHeads { found })),
        };
        let args = [
            Arg::Buffer(q.place(first_row * width)),
            slabs.arg(),
            Arg::Buffer(Some(table.at(0))),
            Arg::Buffer(Some(table.at(rows_at))),
            Arg::Buffer(Some(pages.at(0))),
            Arg::Buffer(Some(table.at(paths_at))),
            Arg::Buffer(sinks.as_ref().map(|sinks| sinks.at(0))),
            Arg::Buffer(y.place(first_row * width)),
            Arg::I64(item_count as i64),
            Arg::I32(heads as i32),
            Arg::I32(kv_heads as i32),
            Arg::I32(head_dim as i32),
            Arg::F32(scale),
            Arg::F32(softcap.unwrap_or(0.0)),
        ];
        self.warps(item_count, kernel, &args);
        new_rows
    }

    /// Outputs of a head in chunks of rows: calls `take` with the first row, their number, and where their outputs are.
    fn outputs(&self, x: &Buf<L>, rows: usize, w: &Packed<L>, mut take: impl FnMut(usize, usize, &Buf<L>)) {
        let chunk = (self.logits_at_once / w.out.max(1)).max(1).min(rows.max(1));
        let logits = self.scratch(chunk * w.out);
        for first in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - first);
            if let Some(to) = logits.place(0) {
                self.multiply((x, first, n), w, None, to);
                take(first, n, &logits);
            }
        }
    }

    /// The best of each row of outputs.
    fn best(&self, logits: &Buf<L>, rows: usize, outputs: usize, to: At<'_, L::Memory>) {
        let args = [Arg::Buffer(logits.place(0)), Arg::Buffer(Some(to)), Arg::I64(outputs as i64)];
        self.launch("row_best", (rows, 1), THREADS, &args);
    }
}

impl<L: Launcher> Kernels for Cuda<L> {
    type Packed = Packed<L>;
    type Kv = KvPages<L>;
    const STEP_ROWS: usize = 8192;
    const ROW_EXACT: bool = true;
    const DRAWS: bool = true;

    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<Packed<L>, KernelError> {
        self.put(name, weight, mode)
    }
    fn matmuls(&self, x: &Buf<L>, rows: usize, weights: &[(&Packed<L>, Option<&Buf<L>>)], ys: &mut [Buf<L>]) {
        for ((w, bias), y) in weights.iter().zip(ys) {
            assert!(rows * w.out <= y.capacity, "room for the outputs");
            y.changed();
            if let Some(to) = y.place(0) {
                self.multiply((x, 0, rows), w, *bias, to);
            }
        }
    }
    fn argmax(&self, x: &Buf<L>, rows: usize, w: &Packed<L>) -> Vec<u32> {
        let mut ids = vec![0u32; rows];
        if rows > 0 && w.out > 0 {
            let found = self.block(rows * 4);
            self.outputs(x, rows, w, |first, n, z| self.best(z, n, w.out, found.at(first * 4)));
            self.fetch(found.at(0), &mut ids);
        }
        ids
    }
    fn argmax_and_outputs(
        &self,
        x: &Buf<L>,
        (rows, _): (usize, usize),
        w: &Packed<L>,
        whole: &[u32],
        y: &mut Buf<L>,
    ) -> Vec<u32> {
        let mut ids = vec![0u32; rows];
        if rows == 0 || w.out == 0 {
            return ids;
        }
        assert!(whole.len() * w.out <= y.capacity, "room for the outputs");
        y.changed();
        let found = self.block(rows * 4);
        self.outputs(x, rows, w, |first, n, z| {
            self.best(z, n, w.out, found.at(first * 4));
            // Runs of wanted rows that stand side by side in both.
            for (to, row) in whole.iter().enumerate() {
                let row = *row as usize;
                if (first..first + n).contains(&row) {
                    self.copy_values(z.place((row - first) * w.out), y.place(to * w.out), w.out, false);
                }
            }
        });
        self.fetch(found.at(0), &mut ids);
        ids
    }
    fn top_k(&self, x: &Buf<L>, rows: usize, (w, outputs): (&Packed<L>, usize), k: usize) -> Vec<TopK> {
        assert_eq!(outputs, w.out, "outputs of the head");
        if rows == 0 || outputs == 0 {
            return vec![TopK::default(); rows];
        }
        let (ids, values) = (self.block(rows * k * 4), self.block(rows * k * 4));
        let log_sums = self.block(rows * 4);
        self.outputs(x, rows, w, |first, n, z| {
            let args = [
                Arg::Buffer(z.place(0)),
                Arg::Buffer(Some(ids.at(first * k * 4))),
                Arg::Buffer(Some(values.at(first * k * 4))),
                Arg::Buffer(Some(log_sums.at(first * 4))),
                Arg::I64(outputs as i64),
                Arg::I32(k as i32),
            ];
            self.launch("row_top_k", (n, 1), THREADS, &args);
        });
        let (mut host_ids, mut host_values) = (vec![0u32; rows * k], vec![0.0f32; rows * k]);
        let mut host_sums = vec![0.0f32; rows];
        if k > 0 {
            self.fetch(ids.at(0), &mut host_ids);
            self.fetch(values.at(0), &mut host_values);
        }
        self.fetch(log_sums.at(0), &mut host_sums);
        (0..rows)
            .map(|row| {
                let found = host_ids[row * k..(row + 1) * k].iter().zip(&host_values[row * k..]);
                let best = found.take_while(|(id, _)| **id != NO_ID).map(|(id, value)| (*id, *value));
                TopK { best: best.collect(), log_sum: host_sums[row] }
            })
            .collect()
    }
    fn choose(&self, x: &Buf<L>, w: &Packed<L>, draws: &[Option<DrawRow>]) -> Vec<u32> {
        let rows = draws.len();
        let mut ids = vec![0u32; rows];
        if rows == 0 || w.out == 0 {
            return ids;
        }
        let settings: Vec<f32> = draws
            .iter()
            .flat_map(|draw| match draw {
                // No factor: the largest.
                None => [0.0, 0.0, 0.0, 1.0],
                Some(d) => [d.factor, d.temperature, d.least_share, d.top_p],
            })
            .collect();
        let keys: Vec<u32> = draws
            .iter()
            .flat_map(|draw| draw.map_or([0; 3], |d| [d.top_k, d.key as u32, (d.key >> 32) as u32]))
            .collect();
        let (settings, keys) = (self.table(&settings), self.table(&keys));
        let found = self.block(rows * 4);
        self.outputs(x, rows, w, |first, n, z| {
            let args = [
                Arg::Buffer(z.place(0)),
                Arg::Buffer(Some(settings.at(first * 4 * 4))),
                Arg::Buffer(Some(keys.at(first * 3 * 4))),
                Arg::Buffer(Some(found.at(first * 4))),
                Arg::I64(w.out as i64),
            ];
            self.launch("draw_rows", (n, 1), THREADS, &args);
        });
        self.fetch(found.at(0), &mut ids);
        ids
    }
    fn embed(&self, table: &Packed<L>, ids: &[u32], scale: f32, y: &mut Buf<L>) {
        self.rows_of(table, ids, scale, y);
    }
    fn rms_norm(&self, x: &Buf<L>, weight: &Buf<L>, width: usize, eps: f32, y: &mut Buf<L>) {
        assert!(x.capacity <= y.capacity && weight.capacity == width, "complete rows");
        self.norm(x, weight, x.capacity / width, width, eps, y);
    }
    fn rope(&self, x: &mut Buf<L>, heads: usize, table: &RopeTable, positions: &[u32]) {
        let (rows, half) = (positions.len(), table.head_dim() / 2);
        let Some(last) = positions.iter().max() else { return };
        assert!(x.capacity >= rows * heads * 2 * half, "complete rows");
        x.changed();
        let angles = self.angles(table, *last);
        let positions = self.kept_table(positions.to_vec());
        let args = [
            Arg::Buffer(x.place(0)),
            Arg::Buffer(Some(angles.at(0))),
            Arg::Buffer(Some(positions.at(0))),
            Arg::I64(rows as i64),
            Arg::I32(heads as i32),
            Arg::I32(half as i32),
        ];
        self.over(rows * heads * half, "turn", &args);
    }
    fn gated(&self, activation: Activation, gate: &mut Buf<L>, up: &Buf<L>) {
        assert!(gate.capacity <= up.capacity, "as many values of both");
        gate.changed();
        let [kind, alpha, limit] = activation_args(activation);
        let len = gate.capacity;
        let args =
            [Arg::Buffer(gate.place(0)), Arg::Buffer(up.place(0)), Arg::I64(len as i64), kind, alpha, limit];
        self.over(len, "gate_by", &args);
    }
    fn add(&self, a: &mut Buf<L>, b: &Buf<L>) {
        assert!(a.capacity <= b.capacity, "as many values of both");
        let len = a.capacity;
        self.add_to(b, len, true, a);
    }
    fn scale(&self, x: &mut Buf<L>, factor: f32) {
        x.changed();
        let args = [Arg::Buffer(x.place(0)), Arg::I64(x.capacity as i64), Arg::F32(factor)];
        self.over(x.capacity, "scale_by", &args);
    }
    fn softcap(&self, x: &mut Buf<L>, cap: f32) {
        x.changed();
        let args = [Arg::Buffer(x.place(0)), Arg::I64(x.capacity as i64), Arg::F32(cap)];
        self.over(x.capacity, "cap_by", &args);
    }
    fn concat_cols(&self, parts: &[(&Buf<L>, usize)], rows: usize, y: &mut Buf<L>) {
        let stride: usize = parts.iter().map(|(_, width)| width).sum();
        assert!(rows * stride <= y.capacity, "room for all columns");
        let mut from = 0;
        for (x, width) in parts {
            let (own, to) = (Columns { stride: *width, from: 0 }, Columns { stride, from });
            self.copy_cols((x, own), (&mut *y, to), rows, *width, false);
            from += width;
        }
    }
    fn slice_cols(&self, x: &Buf<L>, x_width: usize, from: usize, width: usize, rows: usize, y: &mut Buf<L>) {
        assert!(rows * width <= y.capacity, "room for the columns");
        let (own, to) = (Columns { stride: x_width, from }, Columns { stride: width, from: 0 });
        self.copy_cols((x, own), (y, to), rows, width, false);
    }
    fn gather_rows(&self, x: &Buf<L>, width: usize, rows: &[u32], y: &mut Buf<L>) {
        self.gather(x, width, rows, 1.0, y);
    }
    fn cell(&self, cell: Cell, inputs: (&Buf<L>, &Buf<L>), rows: usize, width: usize, y: &mut Buf<L>) {
        self.gate_cell(cell, inputs, (rows, width), y);
    }

    fn kv_write(&self, kv: &mut KvPages<L>, at: usize, rows: usize, k: &Buf<L>, v: &Buf<L>) {
        assert!(at <= kv.len, "rows follow the slots that are there");
        self.must(kv.resize(at + rows, &self.pool));
        let places: Vec<u32> = (at..at + rows).flat_map(|slot| kv.place(slot)).collect();
        self.append(&kv.slabs(), kv.shape, (k, v, 0), &places);
    }
    fn kv_new(&self, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> KvPages<L> {
        if head_dim > MOST_HEAD_DIM {
            self.must::<()>(Err(CudaError::WideHeads { found: head_dim }));
        }
        let shape = KvShape { kv_heads, head_dim, dtype };
        KvPages::new(shape, self.slabs_of(shape))
    }
    fn kv_compact(&self, kv: &mut KvPages<L>, base: usize, from: &[usize]) {
        let moves: Vec<u32> = from
            .iter()
            .enumerate()
            .filter(|(i, slot)| base + i != **slot)
            .flat_map(|(i, slot)| [kv.place(*slot), kv.place(base + i)])
            .flatten()
            .collect();
        if !moves.is_empty() {
            let (count, width) = (moves.len() / 4, kv.shape.width());
            let moves = self.table(&moves);
            let slabs = kv.slabs();
            let args = [
                slabs.arg(),
                Arg::Buffer(Some(moves.at(0))),
                Arg::I32(count as i32),
                Arg::I32(width as i32),
                Arg::I32(kv.shape.head_dim as i32),
            ];
            let kernel = match kv.shape.dtype {
                KvDtype::F16 => "kv_move_f16",
                KvDtype::F32 => "kv_move_f32",
            };
            self.launch(kernel, ((2 * width).div_ceil(THREADS), 1), THREADS, &args);
        }
        self.must(kv.resize(base + from.len(), &self.pool));
    }
    fn attend(
        &self,
        q: &Buf<L>,
        k: &Buf<L>,
        v: &Buf<L>,
        heads: usize,
        segments: &mut [Segment<'_, KvPages<L>>],
        y: &mut Buf<L>,
    ) {
        y.changed();
        let mut first_row = 0;
        let mut rest = segments;
        while let Some(first) = rest.first() {
            let count = rest.iter().take_while(|other| alike(first, other)).count();
            let (now, later) = rest.split_at_mut(count);
            first_row += self.attend_alike((q, k, v), heads, now, first_row, y);
            rest = later;
        }
    }
}

// A page is what a warp reads at once.
const _: () = assert!(PAGE == 32);
