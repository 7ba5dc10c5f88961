//! The training step: the same formulas as the CPU implementation, each gradient written out.
//!
//! Shape legend: `R` rows, `N` rows with a loss, `V` vocabulary, `nh`/`nkv` query/key heads, `hd` head width.

use burn_tensor::activation::sigmoid;
use burn_tensor::{FloatDType, Int, Tensor};
use draftsmith_kernels::train::soft_ce::{RowGrad, weigh};
use draftsmith_kernels::train::{
    AdamStep, AttentionMask, Columns, KeyValue, KeyValueMut, LinearShape, LogitPart, PartGrad, Rotation,
    SoftLoss, SoftScale, SoftSums, Teacher, TokenRow, TokenTargets, TttShape,
};
use draftsmith_kernels::{Activation, Cell, Deferred, Kernels, RopeTable, TrainKernels};

use crate::attention::{Heads, join};
use crate::infer::GELU;
use crate::{Buf, Gpu};

/// Logits over a vocabulary that exist at once: 256 MiB of f32.
pub(crate) const LOGITS: usize = 1 << 26;
/// Values added up on the device; the sums of these are added in double precision.
const SUM_BLOCK: usize = 4096;
/// Squares of it that are summed in f32, in whatever order the device likes.
const F32_SUM: usize = 64;

/// What the rows of one panel of training-time-test attention see of block 0.
struct Panel {
    /// Query rows.
    rows: std::ops::Range<usize>,
    /// Slots of block 0: a document up to the last row's slot.
    slots: std::ops::Range<usize>,
}

/// The operands of one layer's attention, by heads.
struct Attention<'a> {
    shape: TttShape<'a>,
    heads: Heads,
    /// `[R, nh hd]`
    q: Tensor<2>,
    /// `[S, nkv hd]`
    k0: Tensor<2>,
    /// `[S, nkv hd]`
    v0: Tensor<2>,
    /// `[nkv, 1, R, hd]` keys and values of the diagonals.
    diagonals: Vec<(Tensor<4>, Tensor<4>)>,
}

impl<'a> Attention<'a> {
    fn new(
        gpu: &Gpu,
        shape: TttShape<'a>,
        q: &Buf,
        (k0, v0): KeyValue<'_, Buf>,
        diagonals: &[KeyValue<'_, Buf>],
    ) -> Attention<'a> {
        let (rows, kv_width) = (shape.slots.len(), shape.kv_heads * shape.head_dim);
        let slots = shape.docs.last().map_or(0, |d| d.end());
        let heads = Heads { kv: shape.kv_heads, group: shape.heads / shape.kv_heads };
        let by_heads = |x: &Buf| heads.keys(gpu.read(x, rows, kv_width));
        Attention {
            shape,
            heads,
            q: gpu.stored(q, rows, shape.heads * shape.head_dim),
            k0: gpu.stored(k0, slots, kv_width),
            v0: gpu.stored(v0, slots, kv_width),
            diagonals: diagonals.iter().map(|(k, v)| (by_heads(k), by_heads(v))).collect(),
        }
    }

    fn panels(&self) -> Vec<Panel> {
        let mut panels = Vec::new();
        for d in self.shape.by_document(self.k0.dims()[0]) {
            let start = d.doc.start as usize;
            let step = self.heads.panel(d.doc.len as usize);
            for first in d.rows.clone().step_by(step) {
                let end = d.rows.end.min(first + step);
                let slots = start..self.shape.slots[end - 1] as usize + 1;
                panels.push(Panel { rows: first..end, slots });
            }
        }
        panels
    }

    /// Queries `[nkv, G, N, hd]`, keys and values `[nkv, 1, keys, hd]`, logits `[nkv, G, N, keys]` of a panel.
    fn block0(&self, gpu: &Gpu, p: &Panel) -> [Tensor<4>; 4] {
        let q = self.heads.queries(gpu.rows(&self.q, p.rows.start, p.rows.len()));
        let [k, v] = [&self.k0, &self.v0].map(|x| self.heads.keys(gpu.rows(x, p.slots.start, p.slots.len())));
        let first = p.slots.start as u32;
        let end: Vec<u32> = self.shape.slots[p.rows.clone()].iter().map(|slot| slot + 1 - first).collect();
        let logits = gpu.logits(&q, &k, &gpu.behind(&end, p.slots.len()), self.shape.scale, None);
        [q, k, v, logits]
    }

    /// The logit `[nkv, G, N, 1]` of each row with its own diagonal key.
    fn diagonal_logit(&self, q: &Tensor<4>, k: &Tensor<4>) -> Tensor<4> {
        (q.clone() * k.clone()).sum_dim(3).mul_scalar(self.shape.scale)
    }
}

/// Rows `range` of `[nkv, G, R, w]`.
fn narrow(x: &Tensor<4>, range: &std::ops::Range<usize>) -> Tensor<4> {
    x.clone().narrow(2, range.start, range.len())
}

impl Gpu {
    /// Logits `[N, V]` → their gradient, and per row KL, `α`, and 1 if the most likely token is the target's: `[N, 3]`.
    fn soft_rows(
        &self,
        z: Tensor<2>,
        p: Tensor<2>,
        (mass, labels): (&[f32], &[u32]),
        grad: RowGrad,
    ) -> (Tensor<2>, Tensor<2>) {
        let n = z.dims()[0];
        let labels: Tensor<2, Int> = self.indices(labels).reshape([n, 1]);
        let (top, best) = self.first_largest(z.clone());
        let correct = best.equal(labels).float().cast(FloatDType::F32);
        let z = z - top;
        let e = z.clone().exp();
        let sum = e.clone().sum_dim(1);
        let sum_p = p.clone().sum_dim(1);
        let kl = sum_p.clone() * sum.clone().log() - (p.clone() * z).sum_dim(1);
        let q = e / sum;
        let m = p.clone() * self.floats(mass).reshape([n, 1]);
        let alpha = q.clone().min_pair(m.clone()).sum_dim(1);
        let mut dz = (q.clone() * sum_p - p).mul_scalar(grad.kl);
        if grad.alpha != Some(0.0) {
            let slope = match grad.alpha {
                Some(slope) => alpha.clone().zeros_like().add_scalar(slope),
                // Without common tokens there is no direction.
                None => {
                    let none = alpha.clone().lower_equal_scalar(0.0);
                    alpha.clone().recip().mul_scalar(grad.log_alpha).mask_fill(none, 0.0)
                }
            };
            let inside = q.clone().lower(m).float().cast(FloatDType::F32);
            let below = (q.clone() * inside.clone()).sum_dim(1);
            dz = dz + slope * q * (inside - below);
        }
        (dz, Tensor::cat(vec![kl, alpha, correct], 1))
    }

    /// The loss of all rows, `chunk` at a time, as [`draftsmith_kernels::train::soft_ce::linear_soft_ce`].
    fn soft_ce_rows(
        &self,
        (hidden, head): (&Tensor<2>, &Tensor<2>),
        teacher: &Teacher<Buf>,
        rows: &[u32],
        grad: RowGrad,
        mut grads: Option<KeyValueMut<'_, Buf>>,
    ) -> SoftSums {
        let [vocab, _] = head.dims();
        let chunk = (LOGITS / vocab).max(1);
        let p = self.read(&teacher.p, teacher.mass.len(), vocab);
        let (mut stats, mut dhidden) = (Vec::new(), Vec::new());
        for (i, part) in rows.chunks(chunk).enumerate() {
            let x = self.rows(hidden, i * chunk, part.len());
            let z = self.product(x.clone(), head.clone().transpose());
            let mass: Vec<f32> = part.iter().map(|r| teacher.mass[*r as usize]).collect();
            let labels: Vec<u32> = part.iter().map(|r| teacher.labels[*r as usize]).collect();
            let p = p.clone().select(0, self.indices(part));
            let (dz, row_stats) = self.soft_rows(z, p, (&mass, &labels), grad);
            stats.push(row_stats);
            if let Some((_, dhead)) = &mut grads {
                dhidden.push(self.product(dz.clone(), head.clone()));
                self.add_master(dhead, self.product(dz.transpose(), x));
            }
        }
        if let Some((to, _)) = grads {
            self.keep(to, Tensor::cat(dhidden, 0));
        }
        let stats = self.host(Tensor::cat(stats, 0));
        let mut sums = SoftSums::default();
        for row in stats.chunks_exact(3) {
            sums.add_row(row[0], row[1], row[2] != 0.0);
        }
        sums
    }
}

impl TrainKernels for Gpu {
    const SQUARES: usize = SUM_BLOCK;
    const HOST_IS_FREE: bool = true;

    fn capacity(&self, buf: &Buf) -> usize {
        buf.capacity()
    }

    fn write(&self, buf: &mut Buf, data: &[f32]) {
        buf.clear();
        if !data.is_empty() {
            buf.set(self.floats(data));
        }
    }

    fn clear(&self, buf: &mut Buf, len: usize) {
        buf.clear();
        assert!(len <= buf.capacity(), "{len} values in a buffer of {}", buf.capacity());
    }

    fn retire(&self, buf: &mut Buf) {
        buf.clear();
    }

    fn linear(&self, x: &Buf, w: &Buf, s: LinearShape, y: &mut Buf) {
        if s.rows > 0 {
            let (x, w) = (self.stored(x, s.rows, s.inp), self.stored(w, s.out, s.inp));
            self.keep(y, self.product(x, w.transpose()));
        }
    }

    fn linear_dx(&self, dy: &Buf, w: &Buf, s: LinearShape, accumulate: bool, dx: &mut Buf) {
        if s.rows > 0 {
            let (dy, w) = (self.stored(dy, s.rows, s.out), self.stored(w, s.out, s.inp));
            self.keep_or_add(dx, self.product(dy, w), accumulate);
        }
    }

    fn linear_dw(&self, dy: &Buf, x: &Buf, s: LinearShape, dw: &mut Buf) {
        if s.rows > 0 {
            let (dy, x) = (self.stored(dy, s.rows, s.out), self.stored(x, s.rows, s.inp));
            self.add_master(dw, self.product(dy.transpose(), x));
        }
    }

    fn norm(&self, x: &Buf, w: &Buf, rows: usize, width: usize, eps: f32, y: &mut Buf) {
        if rows > 0 {
            self.keep(y, self.normed(self.read(x, rows, width), self.read(w, 1, width), eps));
        }
    }

    fn norm_grad(
        &self,
        x: &Buf,
        w: &Buf,
        dy: &Buf,
        (rows, width): (usize, usize),
        eps: f32,
        accumulate: bool,
        dx: Option<&mut Buf>,
        dw: Option<&mut Buf>,
    ) {
        if rows == 0 {
            return;
        }
        let (x, dy) = (self.read(x, rows, width), self.read(dy, rows, width));
        let inverse = self.inverse_rms(&x, eps); // [R, 1]
        let unit = x * inverse.clone(); // x̂
        if let Some(dw) = dw {
            self.add_master(dw, (dy.clone() * unit.clone()).sum_dim(0));
        }
        if let Some(dx) = dx {
            let scaled = dy * self.read(w, 1, width);
            // The part of the gradient that goes through the root mean square.
            let through = (scaled.clone() * unit.clone()).mean_dim(1);
            self.keep_or_add(dx, (scaled - unit * through) * inverse, accumulate);
        }
    }

    fn rotate(
        &self,
        x: &Buf,
        table: &RopeTable,
        positions: &[u32],
        heads: usize,
        direction: Rotation,
        y: &mut Buf,
    ) {
        if !positions.is_empty() {
            let x = self.read(x, positions.len(), heads * table.head_dim());
            let turned = self.turned(x, table, positions, heads, direction != Rotation::Forward);
            self.keep_or_add(y, turned, direction == Rotation::InverseAdd);
        }
    }

    fn gate(&self, activation: Activation, gate: &Buf, up: &Buf, len: usize, y: &mut Buf) {
        if len > 0 {
            let flat = |x: &Buf| self.read(x, 1, len).reshape([len]);
            self.keep(y, self.gate_value(activation, flat(gate), flat(up)));
        }
    }

    fn gate_grad(
        &self,
        activation: Activation,
        (gate, up): KeyValue<'_, Buf>,
        dy: &Buf,
        len: usize,
        (dgate, dup): KeyValueMut<'_, Buf>,
    ) {
        if len == 0 {
            return;
        }
        let flat = |x: &Buf| self.read(x, 1, len).reshape([len]);
        let dy = flat(dy);
        let (x, scale) = self.gate_inputs(activation, flat(gate), flat(up));
        let s = self.gate_sigmoid(activation, x.clone());
        // d(u)/dx of the sigmoid's argument u
        let inner = match activation {
            Activation::Silu => None,
            Activation::ClampedSwiglu { alpha, .. } => Some(x.ones_like().mul_scalar(alpha)),
            Activation::GeluTanh => {
                Some(x.clone().square().mul_scalar(3.0 * 0.044_715).add_scalar(1.0).mul_scalar(GELU))
            }
        };
        let bend = x.clone() * s.clone() * s.clone().neg().add_scalar(1.0);
        let slope = s.clone()
            + match inner {
                Some(inner) => bend * inner,
                None => bend,
            };
        let (mut to_gate, mut to_up) = (dy.clone() * scale * slope, dy * x * s);
        if let Activation::ClampedSwiglu { limit, .. } = activation {
            to_gate = to_gate.mask_fill(flat(gate).greater_elem(limit), 0.0);
            to_up = to_up.mask_fill(flat(up).abs().greater_elem(limit), 0.0);
        }
        self.keep(dgate, to_gate);
        self.keep(dup, to_up);
    }

    fn sum(&self, a: &Buf, b: &Buf, len: usize, y: &mut Buf) {
        if len > 0 {
            self.keep(y, self.read(a, 1, len) + self.read(b, 1, len));
        }
    }

    fn add_to(&self, src: &Buf, len: usize, accumulate: bool, dst: &mut Buf) {
        if len == 0 {
            return;
        }
        if !accumulate {
            return dst.set(self.stored(src, 1, len));
        }
        // Gradients of weights stay f32, those of activations as they are stored.
        let sum = self.take(dst, 1, len);
        let dtype: FloatDType = sum.dtype().into();
        dst.set((sum.cast(FloatDType::F32) + self.read(src, 1, len)).cast(dtype));
    }

    fn copy_cols(
        &self,
        (src, from): (&Buf, Columns),
        (dst, to): (&mut Buf, Columns),
        rows: usize,
        width: usize,
        accumulate: bool,
    ) {
        if rows == 0 {
            return;
        }
        let new = self.read(src, rows, from.stride).slice([0..rows, from.from..from.from + width]);
        let whole = self.take(dst, rows, to.stride).cast(FloatDType::F32);
        let columns = [0..rows, to.from..to.from + width];
        let new = if accumulate { whole.clone().slice(columns.clone()) + new } else { new };
        self.keep(dst, whole.slice_assign(columns, new));
    }

    fn gather(&self, x: &Buf, width: usize, rows: &[u32], scale: f32, y: &mut Buf) {
        let Some(last) = rows.iter().max() else { return };
        let x = self.stored(x, *last as usize + 1, width);
        let chosen = x.select(0, self.indices(rows)).cast(FloatDType::F32);
        self.keep(y, chosen.mul_scalar(scale));
    }

    fn scatter_add(&self, y: &Buf, width: usize, rows: &[u32], x: &mut Buf) {
        assert!(rows.windows(2).all(|w| w[0] < w[1]), "rows ascend strictly");
        if rows.is_empty() {
            return;
        }
        let all = x.capacity() / width;
        let sum = self.take(x, all, width).cast(FloatDType::F32);
        self.keep(x, self.add_rows(sum, rows, self.read(y, rows.len(), width)));
    }

    fn attention(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf,
        block0: KeyValue<'_, Buf>,
        diagonals: &[KeyValue<'_, Buf>],
        out: &mut Buf,
        lse: &mut Buf,
    ) {
        let shape = match mask {
            AttentionMask::Ttt(shape) => shape,
            AttentionMask::Spans(shape) => {
                return self.span_attention(shape, q, block0, diagonals, (out, lse));
            }
        };
        if shape.slots.is_empty() {
            return;
        }
        let x = Attention::new(self, shape, q, block0, diagonals);
        let (mut outs, mut sums) = (Vec::new(), Vec::new());
        for p in x.panels() {
            let [q, _, v, logits] = x.block0(self, &p);
            let own: Vec<Tensor<4>> =
                x.diagonals.iter().map(|(k, _)| x.diagonal_logit(&q, &narrow(k, &p.rows))).collect();
            let top = own.iter().fold(logits.clone().max_dim(3), |top, z| top.max_pair(z.clone()));
            let exp = |z: Tensor<4>| (z - top.clone()).exp();
            let weights = exp(logits);
            let mut sum = weights.clone().sum_dim(3);
            let mut mixed = self.mix(&weights, &v);
            for (z, (_, v)) in own.into_iter().zip(&x.diagonals) {
                let weight = exp(z);
                sum = sum + weight.clone();
                mixed = mixed + weight * narrow(v, &p.rows);
            }
            outs.push(join(mixed / sum.clone()));
            sums.push(join(top + sum.log()));
        }
        self.keep(out, Tensor::cat(outs, 0));
        lse.set(Tensor::cat(sums, 0));
    }

    fn attention_grad(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf,
        block0: KeyValue<'_, Buf>,
        diagonals: &[KeyValue<'_, Buf>],
        (out, lse): KeyValue<'_, Buf>,
        dout: &Buf,
        dq: &mut Buf,
        (dk0, dv0): KeyValueMut<'_, Buf>,
        ddiagonals: Vec<KeyValueMut<'_, Buf>>,
    ) {
        let shape = match mask {
            AttentionMask::Ttt(shape) => shape,
            AttentionMask::Spans(shape) => {
                let (inputs, grads) = ((q, block0, diagonals), (dq, (dk0, dv0), ddiagonals));
                return self.span_attention_grad(shape, inputs, (out, lse), dout, grads);
            }
        };
        let (rows, q_width) = (shape.slots.len(), shape.heads * shape.head_dim);
        if rows == 0 {
            return;
        }
        let x = Attention::new(self, shape, q, block0, diagonals);
        let (slots, kv_width) = (x.k0.dims()[0], x.k0.dims()[1]);
        let dout = self.read(dout, rows, q_width);
        let by_heads = |rows: Tensor<2>| x.heads.queries(rows);
        let lse = by_heads(self.read(lse, rows, shape.heads)); // [nkv, G, R, 1]
        let q = by_heads(x.q.clone().cast(FloatDType::F32));
        let dout_heads = by_heads(dout.clone());
        // <dO, out> of each row and head: what the softmax subtracts.
        let delta = (by_heads(self.read(out, rows, q_width)) * dout_heads.clone()).sum_dim(3);

        let mut dq_own: Option<Tensor<4>> = None;
        for ((k, v), (dk, dv)) in x.diagonals.iter().zip(ddiagonals) {
            let weight = (x.diagonal_logit(&q, k) - lse.clone()).exp();
            let through = (dout_heads.clone() * v.clone()).sum_dim(3) - delta.clone();
            let dlogit = (weight.clone() * through).mul_scalar(shape.scale);
            // Query heads of one key head add up.
            self.keep_or_add(dv, join((weight * dout_heads.clone()).sum_dim(1)), true);
            self.keep_or_add(dk, join((dlogit.clone() * q.clone()).sum_dim(1)), true);
            let part = dlogit * k.clone();
            dq_own = Some(match dq_own {
                Some(sum) => sum + part,
                None => part,
            });
        }

        let mut dqs = Vec::new();
        let (mut dk_all, mut dv_all) = [(); 2]
            .map(|()| Tensor::zeros([slots, kv_width], (&self.device, burn_tensor::DType::F32)))
            .into();
        for p in x.panels() {
            let [q, k, v, logits] = x.block0(self, &p);
            let probs = (logits - narrow(&lse, &p.rows)).exp();
            let dout = narrow(&dout_heads, &p.rows);
            let dlogits =
                (probs.clone() * (self.against(&dout, &v) - narrow(&delta, &p.rows))).mul_scalar(shape.scale);
            dqs.push(join(self.mix(&dlogits, &k)));
            let add = |all: Tensor<2>, part: Tensor<4>| {
                let place = [p.slots.clone(), 0..kv_width];
                let sum = all.clone().slice(place.clone()) + join(part);
                all.slice_assign(place, sum)
            };
            dk_all = add(dk_all, self.collect(&dlogits, &q));
            dv_all = add(dv_all, self.collect(&probs, &dout));
        }
        let mut dq_all = Tensor::cat(dqs, 0);
        if let Some(own) = dq_own {
            dq_all = dq_all + join(own);
        }
        self.keep_or_add(dq, dq_all, true);
        self.keep_or_add(dk0, dk_all, true);
        self.keep_or_add(dv0, dv_all, true);
    }

    fn gather_grad(&self, y: &Buf, width: usize, rows: &[u32], scale: f32, x: &mut Buf) {
        if rows.is_empty() {
            return;
        }
        // Equal rows are added up first, so that no device adds to one place from two sides.
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_by_key(|i| rows[*i as usize]);
        let sorted = self.read(y, rows.len(), width).mul_scalar(scale).select(0, self.indices(&order));
        let groups: Vec<&[u32]> = order.chunk_by(|a, b| rows[*a as usize] == rows[*b as usize]).collect();
        let places: Vec<u32> = groups.iter().map(|g| rows[g[0] as usize]).collect();
        let most = groups.iter().map(|g| g.len()).max().unwrap_or(0);
        // The k-th of every group, for each k: distinct places at a time.
        let mut sum: Option<Tensor<2>> = None;
        let mut at = 0;
        let starts: Vec<u32> = groups
            .iter()
            .map(|g| {
                at += g.len() as u32;
                at - g.len() as u32
            })
            .collect();
        for k in 0..most {
            let (numbers, from): (Vec<u32>, Vec<u32>) = groups
                .iter()
                .enumerate()
                .filter(|(_, g)| g.len() > k)
                .map(|(i, _)| (i as u32, starts[i] + k as u32))
                .unzip();
            let part = sorted.clone().select(0, self.indices(&from));
            sum = Some(match sum {
                None => part,
                Some(sum) => self.add_rows(sum, &numbers, part),
            });
        }
        let Some(sum) = sum else { return };
        let all = x.capacity() / width;
        let old = self.take(x, all, width);
        let dtype: FloatDType = old.dtype().into();
        x.set(self.add_rows(old.cast(FloatDType::F32), &places, sum).cast(dtype));
    }

    fn gate_cell(&self, cell: Cell, inputs: KeyValue<'_, Buf>, (rows, width): (usize, usize), y: &mut Buf) {
        Kernels::cell(self, cell, inputs, rows, width, y);
    }

    fn cell_grad(
        &self,
        cell: Cell,
        (a, b): KeyValue<'_, Buf>,
        dy: &Buf,
        (rows, width): (usize, usize),
        (da, db): KeyValueMut<'_, Buf>,
    ) {
        if rows == 0 {
            return;
        }
        let (a, b) = (self.read(a, rows, cell.input_width(width)), self.read(b, rows, width));
        let dy = self.read(dy, rows, cell.output_width(width));
        let columns = |x: &Tensor<2>, i: usize| x.clone().slice([0..rows, i * width..(i + 1) * width]);
        let gate = sigmoid(columns(&a, 0));
        let closing = gate.clone().neg().add_scalar(1.0);
        match cell {
            Cell::Gate => {
                self.keep(da, dy.clone() * b * gate.clone() * closing);
                self.keep(db, dy * gate);
            }
            Cell::Recurrent => {
                let (dstate, doutput) = (columns(&dy, 0), columns(&dy, 1));
                let (candidate, output) = (columns(&a, 1).tanh(), columns(&a, 2).tanh());
                let bend = |x: &Tensor<2>| x.clone().square().neg().add_scalar(1.0);
                let dgate = dstate.clone() * (b - candidate.clone()) * gate.clone() * closing.clone();
                let dcandidate = dstate.clone() * closing * bend(&candidate);
                self.keep(da, Tensor::cat(vec![dgate, dcandidate, doutput * bend(&output)], 1));
                self.keep(db, dstate * gate);
            }
        }
    }

    fn stream_head(&self, x: &Buf, head: &Buf, s: LinearShape) -> (Vec<u32>, Vec<f32>) {
        let (x, head) = (self.stored(x, s.rows, s.inp), self.stored(head, s.out, s.inp));
        let chunk = (LOGITS / s.out).max(1);
        let (mut ids, mut sums) = (Vec::new(), Vec::new());
        for first in (0..s.rows).step_by(chunk) {
            let n = chunk.min(s.rows - first);
            let z = self.product(self.rows(&x, first, n), head.clone().transpose());
            let (top, best) = self.first_largest(z.clone());
            let sum = (z - top.clone()).exp().sum_dim(1);
            ids.extend(self.host_ids(best));
            sums.extend(self.host(top + sum.log()));
        }
        (ids, sums)
    }

    fn soft_targets(&self, x: &Buf, head: &Buf, s: LinearShape, lse: &[f32], p: &mut Buf) -> Vec<f32> {
        if s.rows == 0 {
            return Vec::new();
        }
        let (x, head) = (self.stored(x, s.rows, s.inp), self.stored(head, s.out, s.inp));
        let z = self.product(x, head.transpose());
        let top = z.clone().max_dim(1);
        let e = (z - top.clone()).exp();
        let sum = e.clone().sum_dim(1);
        let mass = (top - self.floats(lse).reshape([s.rows, 1])).exp() * sum.clone();
        // Probabilities stay f32: in bf16 they would no longer add up to one.
        p.set(e / sum);
        self.host(mass)
    }

    fn linear_soft_ce(
        &self,
        hidden: &Buf,
        head: &Buf,
        s: LinearShape,
        teacher: &Teacher<Buf>,
        rows: &[u32],
        loss: SoftLoss,
        scale: SoftScale,
        grads: Option<KeyValueMut<'_, Buf>>,
    ) -> Deferred<SoftSums> {
        assert_eq!(rows.len(), s.rows, "one teacher row per loss row");
        let operands =
            (s.rows > 0).then(|| (self.stored(hidden, s.rows, s.inp), self.stored(head, s.out, s.inp)));
        let run = |grad, grads| match &operands {
            Some((hidden, head)) => self.soft_ce_rows((hidden, head), teacher, rows, grad, grads),
            None => SoftSums::default(),
        };
        let (kl_weight, grad) = weigh(loss, scale, || run(RowGrad::default(), None).mean_alpha());
        Deferred::here(SoftSums { kl_weight, ..run(grad, grads) })
    }

    fn linear_token_loss(
        &self,
        parts: &[LogitPart<'_, Buf>],
        (rows, vocab): (usize, usize),
        targets: &TokenTargets<'_, Buf>,
        grads: Option<Vec<PartGrad<'_, Buf>>>,
    ) -> Vec<TokenRow> {
        self.token_loss(parts, (rows, vocab), targets, grads)
    }

    fn adamw(&self, s: AdamStep, len: usize, w: &mut Buf, g: &Buf, (m, v): KeyValueMut<'_, Buf>) {
        let factors = s.factors();
        let g = self.read(g, 1, len).mul_scalar(s.grad_scale);
        let first = self.take(m, 1, len);
        let first = first.clone() + (g.clone() - first).mul_scalar(1.0 - s.beta1);
        let second = self.take(v, 1, len).mul_scalar(s.beta2) + g.square().mul_scalar(1.0 - s.beta2);
        let root = second.clone().sqrt().mul_scalar(factors.inverse_root).add_scalar(s.eps);
        let kept = self.take(w, 1, len).mul_scalar(factors.keep);
        w.set(kept - first.clone().mul_scalar(factors.step_size) / root);
        m.set(first);
        v.set(second);
    }

    fn square_sums(&self, all: &[(&Buf, usize)]) -> Vec<Vec<f64>> {
        let of = |(x, len): &(&Buf, usize)| {
            let len = *len;
            let mut parts = Vec::new();
            let whole = len / F32_SUM * F32_SUM;
            if len > 0 {
                let squares = self.read(x, 1, len).square();
                if whole > 0 {
                    let blocks = squares.clone().slice([0..1, 0..whole]);
                    let blocks = blocks.reshape([len / F32_SUM, F32_SUM]);
                    parts.extend(self.host(blocks.sum_dim(1)));
                }
                if whole < len {
                    parts.extend(self.host(squares.slice([0..1, whole..len]).sum_dim(1)));
                }
            }
            let blocks = parts.chunks(SUM_BLOCK / F32_SUM);
            blocks.map(|block| block.iter().map(|sum| f64::from(*sum)).sum()).collect()
        };
        all.iter().map(of).collect()
    }
}
