//! [`TrainKernels`] on a device: the same formulas as the CPU's, by the kernels of this crate.
//!
//! Shape legend: `R` rows, `N` rows with a loss, `V` vocabulary, `O`/`I` output and input features.

use draftsmith_kernels::train::soft_ce::{RowGrad, weigh};
use draftsmith_kernels::train::{
    AdamStep, AttentionMask, Columns, KeyValue, KeyValueMut, LinearShape, LogitPart, PartGrad, Rotation,
    SoftLoss, SoftScale, SoftSums, Teacher, TokenRow, TokenTargets,
};
use draftsmith_kernels::{Activation, Cell, Courier, Deferred, Memory, Peers, RopeTable, TrainKernels};

use crate::courier::Sender;
use crate::launcher::{Arg, At, Launcher, Operand, Product};
use crate::memory::Buf;
use crate::ops::{BLOCKS_Y, Cuda, THREADS};

/// Rows that one row of partial sums of a norm's gradient stands for: `rms_norm_dw` of the kernels says the same.
const NORM_ROWS: usize = 64;
/// Squares that one block adds up.
const SQUARES: usize = 1 << 16;

/// A product of whole matrices, operands to be chosen.
fn product(m: usize, n: usize, k: usize, transposed: (bool, bool), accumulate: bool) -> Product {
    let (a_transposed, b_transposed) = transposed;
    Product { m, n, k, a_transposed, b_transposed, accumulate, operands: Operand::F32 }
}

/// Words of the kernels for an activation.
pub(crate) fn activation_args<'a, M>(activation: Activation) -> [Arg<'a, M>; 3] {
    let (kind, alpha, limit) = match activation {
        Activation::Silu => (0, 0.0, 0.0),
        Activation::GeluTanh => (1, 0.0, 0.0),
        Activation::ClampedSwiglu { alpha, limit } => (2, alpha, limit),
    };
    [Arg::I32(kind), Arg::F32(alpha), Arg::F32(limit)]
}

fn cell_kind(cell: Cell) -> i32 {
    match cell {
        Cell::Gate => 0,
        Cell::Recurrent => 1,
    }
}

impl<L: Launcher> Cuda<L> {
    /// `capacity` values, unspecified.
    fn buffer(&self, capacity: usize) -> Buf<L> {
        let block = (capacity > 0).then(|| self.block(capacity * size_of::<f32>()));
        Buf { capacity, block, ..Buf::default() }
    }

    /// `logits[n, V] (+)=` rows `first..first + n` of `x` through `w`.
    #[track_caller]
    fn logits(
        &self,
        (x, first, rows): (&Buf<L>, usize, usize),
        w: &Buf<L>,
        s: LinearShape,
        add: bool,
        to: At<'_, L::Memory>,
    ) {
        let shape = product(s.rows, s.out, s.inp, (false, true), add);
        self.product(shape, (x, first * s.inp, rows * s.inp), (w, 0, s.out * s.inp), to);
    }

    /// Gradients of the rows `first..first + n` of a layer into logits whose gradient is `dlogits`.
    fn logit_grads(
        &self,
        dlogits: &Buf<L>,
        (x, first, rows): (&Buf<L>, usize, usize),
        w: &Buf<L>,
        s: LinearShape,
        dx: &mut Buf<L>,
        dw: Option<&mut Buf<L>>,
    ) {
        let (n, all) = (s.rows, s.rows * s.out);
        assert!(dx.capacity >= rows * s.inp, "complete gradients");
        dx.changed();
        let Some(to) = dx.place(first * s.inp) else { return };
        self.product(
            product(n, s.inp, s.out, (false, false), false),
            (dlogits, 0, all),
            (w, 0, s.out * s.inp),
            to,
        );
        if let Some(dw) = dw {
            dw.changed();
            let Some(to) = dw.place(0) else { return };
            let shape = product(s.out, s.inp, n, (true, false), true);
            self.product(shape, (dlogits, 0, all), (x, first * s.inp, rows * s.inp), to);
        }
    }

    /// One pass over the rows of [`TrainKernels::linear_soft_ce`]; the sums stay on the device.
    fn soft_rows(
        &self,
        (hidden, head): (&Buf<L>, &Buf<L>),
        shape: LinearShape,
        teacher: &Teacher<Buf<L>>,
        rows: &[u32],
        grad: RowGrad,
        mut grads: Option<KeyValueMut<'_, Buf<L>>>,
    ) -> Deferred<SoftSums> {
        let (vocab, teachers) = (shape.out, teacher.mass.len());
        if shape.rows == 0 || vocab == 0 {
            return Deferred::here(SoftSums::default());
        }
        assert!(rows.iter().all(|row| (*row as usize) < teachers), "teacher rows are there");
        assert!(
            teacher.labels.len() == teachers && teacher.p.capacity >= teachers * vocab,
            "a whole teacher"
        );
        let chunk = (self.logits_at_once / vocab).max(1).min(shape.rows);
        let (masses, labels) = (self.table(&teacher.mass), self.table(&teacher.labels));
        let (table, stats) = (self.table(rows), self.block(shape.rows * 3 * 4));
        let mut logits = self.buffer(chunk * vocab);
        let (kind, factor) = match grad.alpha {
            Some(0.0) => (0, 0.0),
            Some(factor) => (1, factor),
            None => (2, grad.log_alpha),
        };
        for first in (0..shape.rows).step_by(chunk) {
            let n = chunk.min(shape.rows - first);
            let s = LinearShape { rows: n, ..shape };
            logits.changed();
            let z = logits.place(0).expect("logits have memory");
            self.logits((hidden, first, shape.rows), head, s, false, z);
            let args = [
                Arg::Buffer(Some(z)),
                Arg::Buffer(teacher.p.place(0)),
                Arg::Buffer(Some(masses.at(0))),
                Arg::Buffer(Some(labels.at(0))),
                Arg::Buffer(Some(table.at(0))),
                Arg::I64(first as i64),
                Arg::I64(vocab as i64),
                Arg::F32(grad.kl),
                Arg::I32(kind),
                Arg::F32(factor),
                Arg::Buffer(Some(stats.at(first * 3 * 4))),
            ];
            self.launch("soft_rows", (n, 1), THREADS, &args);
            if let Some((dhidden, dhead)) = &mut grads {
                self.logit_grads(&logits, (hidden, first, shape.rows), head, s, dhidden, Some(dhead));
            }
        }
        let (device, rows) = (self.clone(), shape.rows);
        Deferred::there(move || {
            let mut found = vec![0.0f32; 3 * rows];
            device.fetch(stats.at(0), &mut found);
            let mut sums = SoftSums::default();
            found.chunks_exact(3).for_each(|row| sums.add_row(row[0], row[1], row[2] != 0.0));
            sums
        })
    }
}

impl<L: Launcher> Memory for Cuda<L> {
    type Buf = Buf<L>;

    fn zeros(&self, len: usize) -> Buf<L> {
        let buf = self.buffer(len);
        if let Some(at) = buf.place(0) {
            self.fill(at, len, 0.0);
        }
        buf
    }
    fn scratch(&self, len: usize) -> Buf<L> {
        self.buffer(len)
    }
    fn upload(&self, data: &[f32]) -> Buf<L> {
        let mut buf = self.buffer(data.len());
        self.write(&mut buf, data);
        buf
    }
    fn download(&self, buf: &Buf<L>, offset: usize, out: &mut [f32]) {
        assert!(offset + out.len() <= buf.capacity, "{} values from {offset} of {}", out.len(), buf.capacity);
        if let Some(at) = buf.place(offset).filter(|_| !out.is_empty()) {
            self.fetch(at, out);
        }
    }
}

impl<L: Launcher> TrainKernels for Cuda<L> {
    const SQUARES: usize = SQUARES;
    const HOST_IS_FREE: bool = true;

    fn courier(&self) -> Option<Box<dyn Courier<Buf<L>>>> {
        Some(Box::new(Sender::new(self.clone())))
    }

    fn capacity(&self, buf: &Buf<L>) -> usize {
        buf.capacity
    }
    fn write(&self, buf: &mut Buf<L>, data: &[f32]) {
        assert!(data.len() <= buf.capacity, "{} values into {}", data.len(), buf.capacity);
        buf.changed();
        if let Some(at) = buf.place(0) {
            self.must(self.pool.stream.write(at, bytemuck::cast_slice(data)));
        }
    }
    fn clear(&self, buf: &mut Buf<L>, len: usize) {
        assert!(len <= buf.capacity, "{len} values of {}", buf.capacity);
        buf.changed();
        if let Some(at) = buf.place(0) {
            self.fill(at, len, 0.0);
        }
    }
    fn retire(&self, buf: &mut Buf<L>) {
        buf.changed();
    }
    fn peers(&self) -> Option<&dyn Peers<Buf<L>>> {
        self.link.as_ref().map(|_| self as &dyn Peers<Buf<L>>)
    }

    fn linear(&self, x: &Buf<L>, w: &Buf<L>, s: LinearShape, y: &mut Buf<L>) {
        assert!(y.capacity >= s.rows * s.out, "room for the product");
        y.changed();
        if let Some(to) = y.place(0) {
            self.logits((x, 0, s.rows), w, s, false, to);
        }
    }
    fn linear_dx(&self, dy: &Buf<L>, w: &Buf<L>, s: LinearShape, accumulate: bool, dx: &mut Buf<L>) {
        assert!(dx.capacity >= s.rows * s.inp, "room for the product");
        dx.changed();
        if let Some(to) = dx.place(0) {
            let shape = product(s.rows, s.inp, s.out, (false, false), accumulate);
            self.product(shape, (dy, 0, s.rows * s.out), (w, 0, s.out * s.inp), to);
        }
    }
    fn linear_dw(&self, dy: &Buf<L>, x: &Buf<L>, s: LinearShape, dw: &mut Buf<L>) {
        assert!(dw.capacity >= s.out * s.inp, "room for the product");
        dw.changed();
        if let Some(to) = dw.place(0) {
            let shape = product(s.out, s.inp, s.rows, (true, false), true);
            self.product(shape, (dy, 0, s.rows * s.out), (x, 0, s.rows * s.inp), to);
        }
    }

    fn norm(&self, x: &Buf<L>, w: &Buf<L>, rows: usize, width: usize, eps: f32, y: &mut Buf<L>) {
        y.changed();
        let args = [
            Arg::Buffer(x.place(0)),
            Arg::Buffer(w.place(0)),
            Arg::Buffer(y.place(0)),
            Arg::I32(width as i32),
            Arg::F32(eps),
        ];
        self.launch("rms_norm", (rows, 1), THREADS, &args);
    }
    fn norm_grad(
        &self,
        x: &Buf<L>,
        w: &Buf<L>,
        dy: &Buf<L>,
        (rows, width): (usize, usize),
        eps: f32,
        accumulate: bool,
        dx: Option<&mut Buf<L>>,
        dw: Option<&mut Buf<L>>,
    ) {
        if rows == 0 || width == 0 {
            return;
        }
        let dx = dx.map(|dx| {
            dx.changed();
            &*dx
        });
        let inverse = self.block(rows * 4);
        let args = [
            Arg::Buffer(x.place(0)),
            Arg::Buffer(w.place(0)),
            Arg::Buffer(dy.place(0)),
            Arg::Buffer(dx.and_then(|dx| dx.place(0))),
            Arg::Buffer(Some(inverse.at(0))),
            Arg::I32(width as i32),
            Arg::F32(eps),
            Arg::I32(accumulate.into()),
        ];
        self.launch("rms_norm_dx", (rows, 1), THREADS, &args);
        let Some(dw) = dw else { return };
        dw.changed();
        // Rows beyond what one launch takes add up in further ones.
        let most = BLOCKS_Y * NORM_ROWS;
        for first in (0..rows).step_by(most) {
            let n = most.min(rows - first);
            let parts = n.div_ceil(NORM_ROWS);
            let part = self.block(parts * width * 4);
            let args = [
                Arg::Buffer(x.place(first * width)),
                Arg::Buffer(dy.place(first * width)),
                Arg::Buffer(Some(inverse.at(first * 4))),
                Arg::Buffer(Some(part.at(0))),
                Arg::I64(n as i64),
                Arg::I32(width as i32),
            ];
            self.launch("rms_norm_dw", (width.div_ceil(THREADS), parts), THREADS, &args);
            let args = [
                Arg::Buffer(Some(part.at(0))),
                Arg::Buffer(dw.place(0)),
                Arg::I64(parts as i64),
                Arg::I64(width as i64),
            ];
            self.launch("fold_rows", (width.div_ceil(THREADS), 1), THREADS, &args);
        }
    }
    fn rotate(
        &self,
        x: &Buf<L>,
        table: &RopeTable,
        positions: &[u32],
        heads: usize,
        direction: Rotation,
        y: &mut Buf<L>,
    ) {
        let (rows, half) = (positions.len(), table.head_dim() / 2);
        let Some(last) = positions.iter().max() else { return };
        assert!(x.capacity.min(y.capacity) >= rows * heads * 2 * half, "complete rows");
        y.changed();
        let (angles, positions) = (self.angles(table, *last), self.table(positions));
        let (turn, accumulate) = match direction {
            Rotation::Forward => (1.0, 0),
            Rotation::Inverse => (-1.0, 0),
            Rotation::InverseAdd => (-1.0, 1),
        };
        let args = [
            Arg::Buffer(x.place(0)),
            Arg::Buffer(Some(angles.at(0))),
            Arg::Buffer(Some(positions.at(0))),
            Arg::Buffer(y.place(0)),
            Arg::I64(rows as i64),
            Arg::I32(heads as i32),
            Arg::I32(half as i32),
            Arg::F32(turn),
            Arg::I32(accumulate),
        ];
        self.over(rows * heads * half, "rotate", &args);
    }
    fn gate(&self, activation: Activation, gate: &Buf<L>, up: &Buf<L>, len: usize, y: &mut Buf<L>) {
        y.changed();
        let [kind, alpha, limit] = activation_args(activation);
        let args = [
            Arg::Buffer(gate.place(0)),
            Arg::Buffer(up.place(0)),
            Arg::Buffer(y.place(0)),
            Arg::I64(len as i64),
            kind,
            alpha,
            limit,
        ];
        self.over(len, "gate", &args);
    }
    fn gate_grad(
        &self,
        activation: Activation,
        (gate, up): KeyValue<'_, Buf<L>>,
        dy: &Buf<L>,
        len: usize,
        (dgate, dup): KeyValueMut<'_, Buf<L>>,
    ) {
        dgate.changed();
        dup.changed();
        let [kind, alpha, limit] = activation_args(activation);
        let args = [
            Arg::Buffer(gate.place(0)),
            Arg::Buffer(up.place(0)),
            Arg::Buffer(dy.place(0)),
            Arg::Buffer(dgate.place(0)),
            Arg::Buffer(dup.place(0)),
            Arg::I64(len as i64),
            kind,
            alpha,
            limit,
        ];
        self.over(len, "gate_grad", &args);
    }
    fn sum(&self, a: &Buf<L>, b: &Buf<L>, len: usize, y: &mut Buf<L>) {
        y.changed();
        let args =
            [Arg::Buffer(a.place(0)), Arg::Buffer(b.place(0)), Arg::Buffer(y.place(0)), Arg::I64(len as i64)];
        self.over(len, "sum", &args);
    }
    fn add_to(&self, src: &Buf<L>, len: usize, accumulate: bool, dst: &mut Buf<L>) {
        dst.changed();
        self.copy_values(src.place(0), dst.place(0), len, accumulate);
    }
    fn copy_cols(
        &self,
        (src, from): (&Buf<L>, Columns),
        (dst, to): (&mut Buf<L>, Columns),
        rows: usize,
        width: usize,
        accumulate: bool,
    ) {
        dst.changed();
        let args = [
            Arg::Buffer(src.place(0)),
            Arg::I64(from.stride as i64),
            Arg::I64(from.from as i64),
            Arg::Buffer(dst.place(0)),
            Arg::I64(to.stride as i64),
            Arg::I64(to.from as i64),
            Arg::I64(rows as i64),
            Arg::I64(width as i64),
            Arg::I32(accumulate.into()),
        ];
        self.over(rows * width, "copy_cols", &args);
    }
    fn gather(&self, x: &Buf<L>, width: usize, rows: &[u32], scale: f32, y: &mut Buf<L>) {
        let Some(last) = rows.iter().max() else { return };
        assert!((*last as usize + 1) * width <= x.capacity, "row {last} is there");
        assert!(y.capacity >= rows.len() * width, "room for the rows");
        y.changed();
        let table = self.table(rows);
        let args = [
            Arg::Buffer(x.place(0)),
            Arg::Buffer(Some(table.at(0))),
            Arg::Buffer(y.place(0)),
            Arg::I64(rows.len() as i64),
            Arg::I64(width as i64),
            Arg::F32(scale),
        ];
        self.over(rows.len() * width, "gather", &args);
    }
    fn scatter_add(&self, y: &Buf<L>, width: usize, rows: &[u32], x: &mut Buf<L>) {
        assert!(rows.windows(2).all(|w| w[0] < w[1]), "rows ascend strictly");
        self.gather_grad(y, width, rows, 1.0, x);
    }
    fn gather_grad(&self, y: &Buf<L>, width: usize, rows: &[u32], scale: f32, x: &mut Buf<L>) {
        let Some(last) = rows.iter().max() else { return };
        assert!((*last as usize + 1) * width <= x.capacity, "row {last} is there");
        x.changed();
        // One group per row of `x`, each added up in the order of `y`.
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_by_key(|i| rows[*i as usize]);
        let groups: Vec<&[u32]> = order.chunk_by(|a, b| rows[*a as usize] == rows[*b as usize]).collect();
        let places: Vec<u32> = groups.iter().map(|g| rows[g[0] as usize]).collect();
        let starts: Vec<u32> = std::iter::once(0)
            .chain(groups.iter().scan(0, |at, g| {
                *at += g.len() as u32;
                Some(*at)
            }))
            .collect();
        let count = groups.len();
        let (places, starts, order) = (self.table(&places), self.table(&starts), self.table(&order));
        let args = [
            Arg::Buffer(y.place(0)),
            Arg::Buffer(Some(places.at(0))),
            Arg::Buffer(Some(starts.at(0))),
            Arg::Buffer(Some(order.at(0))),
            Arg::Buffer(x.place(0)),
            Arg::I64(width as i64),
            Arg::F32(scale),
        ];
        self.launch("add_rows", (count, 1), THREADS, &args);
    }
    fn gate_cell(
        &self,
        cell: Cell,
        (a, b): KeyValue<'_, Buf<L>>,
        (rows, width): (usize, usize),
        y: &mut Buf<L>,
    ) {
        y.changed();
        let args = [
            Arg::I32(cell_kind(cell)),
            Arg::Buffer(a.place(0)),
            Arg::Buffer(b.place(0)),
            Arg::Buffer(y.place(0)),
            Arg::I64(rows as i64),
            Arg::I64(width as i64),
        ];
        self.over(rows * width, "cell", &args);
    }
    fn cell_grad(
        &self,
        cell: Cell,
        (a, b): KeyValue<'_, Buf<L>>,
        dy: &Buf<L>,
        (rows, width): (usize, usize),
        (da, db): KeyValueMut<'_, Buf<L>>,
    ) {
        da.changed();
        db.changed();
        let args = [
            Arg::I32(cell_kind(cell)),
            Arg::Buffer(a.place(0)),
            Arg::Buffer(b.place(0)),
            Arg::Buffer(dy.place(0)),
            Arg::Buffer(da.place(0)),
            Arg::Buffer(db.place(0)),
            Arg::I64(rows as i64),
            Arg::I64(width as i64),
        ];
        self.over(rows * width, "cell_grad", &args);
    }

    fn attention(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf<L>,
        context: KeyValue<'_, Buf<L>>,
        own: &[KeyValue<'_, Buf<L>>],
        out: &mut Buf<L>,
        lse: &mut Buf<L>,
    ) {
        self.attend_packs(mask, q, context, own, out, lse);
    }
    fn attention_grad(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf<L>,
        context: KeyValue<'_, Buf<L>>,
        own: &[KeyValue<'_, Buf<L>>],
        forward: KeyValue<'_, Buf<L>>,
        dout: &Buf<L>,
        dq: &mut Buf<L>,
        dcontext: KeyValueMut<'_, Buf<L>>,
        down: Vec<KeyValueMut<'_, Buf<L>>>,
    ) {
        self.attend_packs_grad(mask, q, context, own, forward, dout, dq, dcontext, down);
    }

    fn stream_head(&self, x: &Buf<L>, head: &Buf<L>, s: LinearShape) -> (Vec<u32>, Vec<f32>) {
        let (mut ids, mut sums) = (vec![0u32; s.rows], vec![0.0f32; s.rows]);
        if s.rows == 0 || s.out == 0 {
            return (ids, sums);
        }
        let chunk = (self.logits_at_once / s.out).max(1).min(s.rows);
        let logits = self.block(chunk * s.out * 4);
        let (best, lse) = (self.block(s.rows * 4), self.block(s.rows * 4));
        for first in (0..s.rows).step_by(chunk) {
            let n = chunk.min(s.rows - first);
            self.logits((x, first, s.rows), head, LinearShape { rows: n, ..s }, false, logits.at(0));
            let args = [
                Arg::Buffer(Some(logits.at(0))),
                Arg::Buffer(Some(best.at(first * 4))),
                Arg::Buffer(Some(lse.at(first * 4))),
                Arg::I64(s.out as i64),
            ];
            self.launch("log_sum_exp", (n, 1), THREADS, &args);
        }
        self.fetch(best.at(0), &mut ids);
        self.fetch(lse.at(0), &mut sums);
        (ids, sums)
    }
    fn soft_targets(
        &self,
        x: &Buf<L>,
        head: &Buf<L>,
        s: LinearShape,
        lse: &[f32],
        p: &mut Buf<L>,
    ) -> Vec<f32> {
        let mut found = vec![0.0f32; s.rows];
        if s.rows == 0 || s.out == 0 {
            return found;
        }
        assert!(lse.len() == s.rows && p.capacity >= s.rows * s.out, "a row for every row");
        p.changed();
        let to = p.place(0).expect("probabilities have memory");
        self.logits((x, 0, s.rows), head, s, false, to);
        let (lse, mass) = (self.table(lse), self.block(s.rows * 4));
        let args = [
            Arg::Buffer(Some(to)),
            Arg::Buffer(Some(lse.at(0))),
            Arg::Buffer(Some(mass.at(0))),
            Arg::I64(s.out as i64),
        ];
        self.launch("soft_targets", (s.rows, 1), THREADS, &args);
        self.fetch(mass.at(0), &mut found);
        found
    }
    fn linear_soft_ce(
        &self,
        hidden: &Buf<L>,
        head: &Buf<L>,
        shape: LinearShape,
        teacher: &Teacher<Buf<L>>,
        rows: &[u32],
        loss: SoftLoss,
        scale: SoftScale,
        grads: Option<KeyValueMut<'_, Buf<L>>>,
    ) -> Deferred<SoftSums> {
        assert_eq!(rows.len(), shape.rows, "one teacher row per loss row");
        let run = |grad, grads| self.soft_rows((hidden, head), shape, teacher, rows, grad, grads);
        // A loss whose weights follow the acceptance asks for it first.
        let (kl_weight, grad) = weigh(loss, scale, || run(RowGrad::default(), None).get().mean_alpha());
        let sums = run(grad, grads);
        Deferred::there(move || SoftSums { kl_weight, ..sums.get() })
    }

    fn linear_token_loss(
        &self,
        parts: &[LogitPart<'_, Buf<L>>],
        (rows, vocab): (usize, usize),
        targets: &TokenTargets<'_, Buf<L>>,
        mut grads: Option<Vec<PartGrad<'_, Buf<L>>>>,
    ) -> Vec<TokenRow> {
        assert!(!parts.is_empty(), "logits come from somewhere");
        for given in [targets.labels.len(), targets.ce.len(), targets.l1.len()] {
            assert_eq!(given, rows, "one label and one factor per row");
        }
        let mut found = vec![TokenRow::default(); rows];
        if rows == 0 || vocab == 0 {
            return found;
        }
        let panels = 1 + usize::from(targets.teacher.is_some());
        let chunk = (self.logits_at_once / panels / vocab).max(1).min(rows);
        let mut logits = self.buffer(chunk * vocab);
        let wanted = targets.teacher.as_ref().map(|_| self.block(chunk * vocab * 4));
        let labels = self.table(targets.labels);
        let (ce, l1) = (self.table(targets.ce), self.table(targets.l1));
        let lse = targets.teacher.as_ref().and_then(|t| t.lse).map(|lse| self.table(lse));
        let (values, tops) = (self.block(rows * 4 * 4), self.block(rows * 2 * 4));
        for first in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - first);
            logits.changed();
            let z = logits.place(0).expect("logits have memory");
            for (i, part) in parts.iter().enumerate() {
                let s = LinearShape { rows: n, out: vocab, inp: part.inp };
                self.logits((part.x, first, rows), part.w, s, i > 0, z);
            }
            if let (Some(t), Some(to)) = (&targets.teacher, &wanted) {
                let s = LinearShape { rows: n, out: vocab, inp: t.inp };
                self.logits((t.x, first, rows), t.head, s, false, to.at(0));
            }
            let args = [
                Arg::Buffer(Some(z)),
                Arg::Buffer(wanted.as_ref().map(|t| t.at(0))),
                Arg::Buffer(Some(labels.at(0))),
                Arg::Buffer(Some(ce.at(0))),
                Arg::Buffer(Some(l1.at(0))),
                Arg::Buffer(lse.as_ref().map(|lse| lse.at(0))),
                Arg::I64(first as i64),
                Arg::I64(vocab as i64),
                Arg::Buffer(Some(values.at(first * 4 * 4))),
                Arg::Buffer(Some(tops.at(first * 2 * 4))),
            ];
            self.launch("token_rows", (n, 1), THREADS, &args);
            for (part, (dx, dw)) in parts.iter().zip(grads.iter_mut().flatten()) {
                let s = LinearShape { rows: n, out: vocab, inp: part.inp };
                self.logit_grads(&logits, (part.x, first, rows), part.w, s, dx, dw.as_deref_mut());
            }
        }
        let (mut host_values, mut host_tops) = (vec![0.0f32; 4 * rows], vec![0u32; 2 * rows]);
        self.fetch(values.at(0), &mut host_values);
        self.fetch(tops.at(0), &mut host_tops);
        let pairs = host_values.chunks_exact(4).zip(host_tops.chunks_exact(2));
        for (row, (value, top)) in found.iter_mut().zip(pairs) {
            *row = TokenRow {
                ce: value[0],
                l1: value[1],
                top: top[0],
                top_prob: value[2],
                teacher_top: top[1],
                teacher_top_prob: value[3],
            };
        }
        found
    }

    fn adamw(&self, s: AdamStep, len: usize, w: &mut Buf<L>, g: &Buf<L>, (m, v): KeyValueMut<'_, Buf<L>>) {
        let all = w.capacity.min(g.capacity).min(m.capacity).min(v.capacity);
        assert!(len <= all, "one gradient and two moments per weight");
        m.changed();
        v.changed();
        // The copy that products read is written with the weights, if it holds all of them.
        let half = w.half.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        if half.as_ref().is_some_and(|half| half.len > len) {
            *half = None;
        }
        let copied = half.as_ref().map(|half| (std::sync::Arc::clone(&half.block), half.len));
        let factors = s.factors();
        let step = |from: usize, count: usize, half: Option<At<'_, L::Memory>>| {
            let args = [
                Arg::Buffer(w.place(from)),
                Arg::Buffer(g.place(from)),
                Arg::Buffer(m.place(from)),
                Arg::Buffer(v.place(from)),
                Arg::Buffer(half),
                Arg::I64(count as i64),
                Arg::F32(s.grad_scale),
                Arg::F32(s.beta1),
                Arg::F32(s.beta2),
                Arg::F32(s.eps),
                Arg::F32(factors.keep),
                Arg::F32(factors.step_size),
                Arg::F32(factors.inverse_root),
            ];
            self.over(count, "adamw", &args);
        };
        match &copied {
            Some((block, rounded)) => {
                step(0, *rounded, Some(block.at(0)));
                step(*rounded, len - rounded, None);
            }
            None => step(0, len, None),
        }
    }
    fn square_sums(&self, all: &[(&Buf<L>, usize)]) -> Vec<Vec<f64>> {
        let blocks: Vec<usize> = all.iter().map(|(_, len)| len.div_ceil(SQUARES)).collect();
        let count = blocks.iter().sum::<usize>();
        let mut found = vec![0.0f64; count];
        if count > 0 {
            let parts = self.block(count * 8);
            let mut first = 0;
            for ((x, len), blocks) in all.iter().zip(&blocks).filter(|(_, blocks)| **blocks > 0) {
                assert!(*len <= x.capacity, "{len} values of {}", x.capacity);
                let args = [
                    Arg::Buffer(x.place(0)),
                    Arg::Buffer(Some(parts.at(first * 8))),
                    Arg::I64(*len as i64),
                    Arg::I64(SQUARES as i64),
                ];
                self.launch("sum_squares", (*blocks, 1), THREADS, &args);
                first += blocks;
            }
            self.fetch(parts.at(0), &mut found);
        }
        let mut found = found.as_slice();
        let own = |blocks: &usize| {
            let (own, rest) = found.split_at(*blocks);
            found = rest;
            own.to_vec()
        };
        blocks.iter().map(own).collect()
    }
}
