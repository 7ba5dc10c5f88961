//! A tape over coarse operations: runs a network of [`Ops`] forward, keeps what the gradients need, and walks back.
//!
//! There is no element-wise autograd: every node is one call of [`TrainKernels`] with a hand-written gradient.
//! Parameters live in the tape by name, each with a gradient accumulator unless frozen. Buffers of activations and
//! gradients go back to a pool when the walk has passed them and are reused by the next step.
//!
//! Shape legend: `R` rows, `C` width of an activation.

use std::collections::BTreeMap;
use std::sync::Arc;

use draftsmith_kernels::experts::Routing;
use draftsmith_kernels::train::{
    AdamStep, Columns, DocSpan, LinearShape, Rotation, SoftLoss, SoftScale, SoftSums, Teacher, TttShape,
};
use draftsmith_kernels::{Activation, RopeTable, TrainKernels};

use crate::ops::{Attend, Ops};

/// An activation on the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

/// A parameter of the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParamId(usize);

/// A named weight with its gradient.
#[derive(Debug)]
pub struct Param<B> {
    /// Tensor name as in a checkpoint.
    pub name: String,
    /// `[O, I]` or `[width]`
    pub shape: Vec<usize>,
    value: B,
    /// `None` for frozen weights.
    grad: Option<B>,
}

impl<B> Param<B> {
    /// Number of values.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
    /// Whether it has a gradient.
    pub fn is_trained(&self) -> bool {
        self.grad.is_some()
    }
}

/// Which slots the queries of a step sit at, for training-time-test attention.
#[derive(Clone, Debug)]
pub struct TttLayout {
    /// Documents of the pack.
    pub docs: Arc<[DocSpan]>,
    /// `nh`
    pub heads: usize,
    /// `nkv`
    pub kv_heads: usize,
    /// `hd`
    pub head_dim: usize,
    /// Logit scale.
    pub scale: f32,
}

enum Op<B> {
    Input,
    Linear {
        x: Var,
        w: ParamId,
    },
    Norm {
        x: Var,
        w: ParamId,
        group: usize,
        eps: f32,
    },
    Rope {
        x: Var,
        table: Arc<RopeTable>,
        positions: Vec<u32>,
        heads: usize,
    },
    Gate {
        activation: Activation,
        gate: Var,
        up: Var,
    },
    Add {
        a: Var,
        b: Var,
    },
    Concat {
        parts: Vec<Var>,
    },
    Slice {
        x: Var,
        from: usize,
    },
    Gather {
        x: Var,
        rows: Vec<u32>,
    },
    Attention {
        q: Var,
        block0: (Var, Var),
        diagonals: Vec<(Var, Var)>,
        layout: TttLayout,
        slots: Arc<[u32]>,
        lse: B,
    },
}

struct Node<B> {
    op: Op<B>,
    rows: usize,
    width: usize,
    value: Option<B>,
    grad: Option<B>,
    wants_grad: bool,
}

/// Free buffers by capacity.
struct BufferPool<B>(BTreeMap<usize, Vec<B>>);

impl<B> BufferPool<B> {
    /// A buffer of at least `len` values of unspecified content: the smallest free one of at most twice that.
    fn take<K: TrainKernels<Buf = B>>(&mut self, kernels: &K, len: usize) -> B {
        let reused = self.0.range_mut(len..=len * 2 + 64).find_map(|(_, free)| free.pop());
        // Capacities are multiples of a sixteenth of a power of two, so that packs of similar size share buffers.
        let grain = 1 << (len.max(64).ilog2() - 4);
        reused.unwrap_or_else(|| kernels.zeros(len.div_ceil(grain) * grain))
    }

    fn put<K: TrainKernels<Buf = B>>(&mut self, kernels: &K, buf: B) {
        self.0.entry(kernels.capacity(&buf)).or_default().push(buf);
    }
}

/// Records a network and computes gradients. See the module's description.
pub struct Tape<K: TrainKernels> {
    kernels: K,
    params: Vec<Param<K::Buf>>,
    nodes: Vec<Node<K::Buf>>,
    pool: BufferPool<K::Buf>,
}

impl<K: TrainKernels> Tape<K> {
    /// An empty tape.
    pub fn new(kernels: K) -> Tape<K> {
        Tape { kernels, params: Vec::new(), nodes: Vec::new(), pool: BufferPool(BTreeMap::new()) }
    }

    /// The backend.
    pub fn kernels(&self) -> &K {
        &self.kernels
    }

    /// Adds a weight; `trained` ones get a gradient accumulator of zeros.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn add_param(&mut self, name: &str, shape: &[usize], values: &[f32], trained: bool) -> ParamId {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values of `{name}` fill its shape");
        let value = self.kernels.upload(values);
        let grad = trained.then(|| self.kernels.zeros(values.len()));
        self.params.push(Param { name: name.to_owned(), shape: shape.to_vec(), value, grad });
        ParamId(self.params.len() - 1)
    }

    /// All parameters in the order they were added.
    pub fn params(&self) -> &[Param<K::Buf>] {
        &self.params
    }

    /// Ids of the trained parameters, in order.
    pub fn trained(&self) -> Vec<ParamId> {
        (0..self.params.len()).filter(|i| self.params[*i].is_trained()).map(ParamId).collect()
    }

    /// Name and shape of a parameter.
    pub fn param(&self, id: ParamId) -> &Param<K::Buf> {
        &self.params[id.0]
    }

    /// Copies a parameter to the host.
    pub fn param_values(&self, id: ParamId) -> Vec<f32> {
        let p = &self.params[id.0];
        self.host(&p.value, p.numel())
    }

    /// Overwrites a parameter.
    ///
    /// # Panics
    /// If the length differs.
    pub fn set_param(&mut self, id: ParamId, values: &[f32]) {
        let p = &mut self.params[id.0];
        assert_eq!(values.len(), p.numel(), "values of `{}` fill its shape", p.name);
        self.kernels.write(&mut p.value, values);
    }

    /// Copies the gradient of a trained parameter to the host.
    pub fn grad_values(&self, id: ParamId) -> Option<Vec<f32>> {
        let p = &self.params[id.0];
        p.grad.as_ref().map(|g| self.host(g, p.numel()))
    }

    /// Adds host values to the gradient of a trained parameter.
    ///
    /// # Panics
    /// If the parameter is frozen or the length differs.
    pub fn add_grad(&mut self, id: ParamId, values: &[f32]) {
        assert_eq!(values.len(), self.params[id.0].numel(), "one gradient per value");
        let buf = self.upload(values);
        let grad = self.params[id.0].grad.as_mut().expect("only trained parameters have gradients");
        self.kernels.add_to(&buf, values.len(), true, grad);
        self.release(buf);
    }

    /// Zeros every gradient accumulator.
    pub fn clear_grads(&mut self) {
        for p in &mut self.params {
            let len = p.numel();
            if let Some(g) = &mut p.grad {
                self.kernels.clear(g, len);
            }
        }
    }

    /// Global L2 norm of all gradients.
    pub fn grad_norm(&self) -> f64 {
        let squares = self
            .params
            .iter()
            .filter_map(|p| p.grad.as_ref().map(|g| self.kernels.sum_squares(g, p.numel())));
        squares.sum::<f64>().sqrt()
    }

    /// One AdamW step of a trained parameter with its accumulated gradient.
    ///
    /// # Panics
    /// If the parameter is frozen.
    pub fn adamw(&mut self, id: ParamId, step: AdamStep, m: &mut K::Buf, v: &mut K::Buf) {
        let p = &mut self.params[id.0];
        let len = p.numel();
        let grad = p.grad.as_ref().expect("only trained parameters are stepped");
        self.kernels.adamw(step, len, &mut p.value, grad, (m, v));
    }

    fn host(&self, buf: &K::Buf, len: usize) -> Vec<f32> {
        let mut out = vec![0.0; len];
        self.kernels.download(buf, 0, &mut out);
        out
    }

    /// Drops all recorded activations, keeping their buffers for the next step.
    pub fn reset(&mut self) {
        for node in std::mem::take(&mut self.nodes) {
            let lse = match node.op {
                Op::Attention { lse, .. } => Some(lse),
                _ => None,
            };
            for buf in [node.value, node.grad, lse].into_iter().flatten() {
                self.release(buf);
            }
        }
    }

    fn release(&mut self, mut buf: K::Buf) {
        self.kernels.retire(&mut buf);
        self.pool.put(&self.kernels, buf);
    }

    /// Values of an activation, `[R, C]` row-major.
    ///
    /// # Panics
    /// If the backward walk has passed it already.
    pub fn values(&self, x: Var) -> Vec<f32> {
        let node = &self.nodes[x.0];
        self.host(self.value(x), node.rows * node.width)
    }

    /// Rows and width of an activation.
    pub fn shape(&self, x: Var) -> (usize, usize) {
        (self.nodes[x.0].rows, self.nodes[x.0].width)
    }

    fn value(&self, x: Var) -> &K::Buf {
        self.nodes[x.0].value.as_ref().expect("activations are used before the walk back")
    }

    fn push(&mut self, op: Op<K::Buf>, rows: usize, width: usize, value: K::Buf, inputs: &[Var]) -> Var {
        let wants_grad = match &op {
            Op::Input => false,
            Op::Linear { w, .. } | Op::Norm { w, .. } => self.params[w.0].is_trained(),
            _ => false,
        } || inputs.iter().any(|x| self.nodes[x.0].wants_grad);
        self.nodes.push(Node { op, rows, width, value: Some(value), grad: None, wants_grad });
        Var(self.nodes.len() - 1)
    }

    fn buffer(&mut self, rows: usize, width: usize) -> K::Buf {
        self.pool.take(&self.kernels, rows * width)
    }

    /// A constant activation `[rows, width]` from the host.
    ///
    /// # Panics
    /// If `data` is not `rows * width` long.
    pub fn input(&mut self, data: &[f32], rows: usize, width: usize) -> Var {
        assert_eq!(data.len(), rows * width, "input fills its shape");
        let mut value = self.buffer(rows, width);
        self.kernels.write(&mut value, data);
        self.push(Op::Input, rows, width, value, &[])
    }

    /// Chosen rows of an activation, strictly ascending.
    pub fn gather_rows(&mut self, x: Var, rows: &[u32]) -> Var {
        let width = self.nodes[x.0].width;
        let mut y = self.buffer(rows.len(), width);
        self.kernels.gather(self.value(x), width, rows, 1.0, &mut y);
        self.push(Op::Gather { x, rows: rows.to_vec() }, rows.len(), width, y, &[x])
    }

    /// Training-time-test attention of queries at `slots` over block 0 and diagonals [eagle3 §4.2].
    pub fn ttt_attention(
        &mut self,
        layout: &TttLayout,
        slots: &Arc<[u32]>,
        q: Var,
        block0: (Var, Var),
        diagonals: &[(Var, Var)],
    ) -> Var {
        let (rows, width) = self.shape(q);
        let mut out = self.buffer(rows, width);
        let mut lse = self.buffer(rows, layout.heads);
        let pairs: Vec<_> = diagonals.iter().map(|(k, v)| (self.value(*k), self.value(*v))).collect();
        let block = (self.value(block0.0), self.value(block0.1));
        let shape = layout.shape(slots);
        self.kernels.ttt_attention(shape, self.value(q), block, &pairs, &mut out, &mut lse);
        let mut inputs = vec![q, block0.0, block0.1];
        inputs.extend(diagonals.iter().flat_map(|(k, v)| [*k, *v]));
        let op = Op::Attention {
            q,
            block0,
            diagonals: diagonals.to_vec(),
            layout: layout.clone(),
            slots: Arc::clone(slots),
            lse,
        };
        self.push(op, rows, width, out, &inputs)
    }

    /// Head, loss and gradients in one call: adds to the gradients of `hidden` `[N, H]` and of the head. `rows[N]`
    /// are the teacher's rows. Without `grads` only the sums are computed.
    ///
    /// # Panics
    /// If `grads` are wanted of a frozen head.
    #[allow(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    pub fn soft_ce(
        &mut self,
        hidden: Var,
        head: ParamId,
        teacher: &Teacher<K::Buf>,
        rows: &[u32],
        loss: SoftLoss,
        scale: SoftScale,
        grads: bool,
    ) -> SoftSums {
        let (n, width) = self.shape(hidden);
        let p = &mut self.params[head.0];
        let shape = LinearShape { rows: n, out: p.shape[0], inp: width };
        let x = self.nodes[hidden.0].value.as_ref().expect("activations are used before the walk back");
        if !grads {
            return self.kernels.linear_soft_ce(x, &p.value, shape, teacher, rows, loss, scale, None);
        }
        let mut dhidden = self.pool.take(&self.kernels, n * width);
        let dhead = p.grad.as_mut().expect("the head is trained");
        let pair = Some((&mut dhidden, dhead));
        let sums = self.kernels.linear_soft_ce(x, &p.value, shape, teacher, rows, loss, scale, pair);
        self.give_grad(hidden, dhidden);
        sums
    }

    /// Arg-max and log-sum-exp of host rows `x[M, Ht]` times a frozen head `[V, Ht]`, without the `[M, V]` buffer.
    pub fn stream_head(&mut self, x: &[f32], head: ParamId) -> (Vec<u32>, Vec<f32>) {
        let (out, inp) = (self.params[head.0].shape[0], self.params[head.0].shape[1]);
        let buf = self.upload(x);
        let shape = LinearShape { rows: x.len() / inp, out, inp };
        let result = self.kernels.stream_head(&buf, &self.params[head.0].value, shape);
        self.release(buf);
        result
    }

    /// Probabilities `[M, Vd]` of host rows `x[M, Ht]` over the rows of a frozen head `[Vd, Ht]`, and the share `[M]`
    /// of the full distribution (log-sum-exp `lse[M]`) that they cover. Hand the teacher back with
    /// [`Tape::recycle`].
    pub fn teacher(&mut self, x: &[f32], head: ParamId, lse: &[f32], labels: Vec<u32>) -> Teacher<K::Buf> {
        let (out, inp) = (self.params[head.0].shape[0], self.params[head.0].shape[1]);
        let buf = self.upload(x);
        let shape = LinearShape { rows: lse.len(), out, inp };
        let mut p = self.buffer(shape.rows, out);
        let mass = self.kernels.soft_targets(&buf, &self.params[head.0].value, shape, lse, &mut p);
        self.release(buf);
        Teacher { p, mass, labels }
    }

    /// Takes the buffers of a teacher back.
    pub fn recycle(&mut self, teacher: Teacher<K::Buf>) {
        self.release(teacher.p);
    }

    fn upload(&mut self, x: &[f32]) -> K::Buf {
        let mut buf = self.pool.take(&self.kernels, x.len());
        self.kernels.write(&mut buf, x);
        buf
    }

    /// Adds an owned gradient to that of `x`.
    fn give_grad(&mut self, x: Var, grad: K::Buf) {
        let node = &mut self.nodes[x.0];
        let len = node.rows * node.width;
        match &mut node.grad {
            None => node.grad = Some(grad),
            Some(sum) => {
                self.kernels.add_to(&grad, len, true, sum);
                self.release(grad);
            }
        }
    }

    /// The gradient buffer of `x` to write into, and whether it already holds something to add to.
    fn grad_slot(&mut self, x: Var) -> (K::Buf, bool) {
        let node = &mut self.nodes[x.0];
        match node.grad.take() {
            Some(g) => (g, true),
            None => (self.pool.take(&self.kernels, node.rows * node.width), false),
        }
    }

    /// As [`Tape::grad_slot`], zeroed if new.
    fn grad_sum(&mut self, x: Var) -> K::Buf {
        let len = self.nodes[x.0].rows * self.nodes[x.0].width;
        let (mut g, filled) = self.grad_slot(x);
        if !filled {
            self.kernels.clear(&mut g, len);
        }
        g
    }

    /// Walks back from the last activation to the first, adding to the gradients of all trained parameters, and
    /// empties the tape.
    pub fn backward(&mut self) {
        while let Some(mut node) = self.nodes.pop() {
            if let Some(grad) = node.grad.take()
                && node.wants_grad
            {
                self.node_backward(&mut node, grad);
            } else if let Op::Attention { lse, .. } = node.op {
                self.release(lse);
            }
            if let Some(value) = node.value {
                self.release(value);
            }
        }
    }

    fn node_backward(&mut self, node: &mut Node<K::Buf>, grad: K::Buf) {
        let (rows, width) = (node.rows, node.width);
        let wants = |tape: &Tape<K>, x: Var| tape.nodes[x.0].wants_grad;
        match &mut node.op {
            Op::Input => {}
            Op::Linear { x, w } => {
                let shape = LinearShape { rows, out: width, inp: self.nodes[x.0].width };
                let p = &mut self.params[w.0];
                if let Some(dw) = &mut p.grad {
                    let x = self.nodes[x.0].value.as_ref().expect("inputs are released after their users");
                    self.kernels.linear_dw(&grad, x, shape, dw);
                }
                if wants(self, *x) {
                    let (mut dx, filled) = self.grad_slot(*x);
                    self.kernels.linear_dx(&grad, &self.params[w.0].value, shape, filled, &mut dx);
                    self.nodes[x.0].grad = Some(dx);
                }
            }
            Op::Norm { x, w, group, eps } => {
                let shape = (rows * width / *group, *group);
                let slot = wants(self, *x).then(|| self.grad_slot(*x));
                let (mut dx, filled) = slot.map_or((None, false), |(g, filled)| (Some(g), filled));
                let input = self.nodes[x.0].value.as_ref().expect("inputs are released after their users");
                let p = &mut self.params[w.0];
                self.kernels.norm_grad(
                    input,
                    &p.value,
                    &grad,
                    shape,
                    *eps,
                    filled,
                    dx.as_mut(),
                    p.grad.as_mut(),
                );
                self.nodes[x.0].grad = dx;
            }
            Op::Rope { x, table, positions, heads } => {
                if wants(self, *x) {
                    let (mut dx, filled) = self.grad_slot(*x);
                    let direction = if filled { Rotation::InverseAdd } else { Rotation::Inverse };
                    self.kernels.rotate(&grad, table, positions, *heads, direction, &mut dx);
                    self.nodes[x.0].grad = Some(dx);
                }
            }
            Op::Gate { activation, gate, up } => {
                let (mut dgate, mut dup) = (self.buffer(rows, width), self.buffer(rows, width));
                let inputs = (self.value(*gate), self.value(*up));
                self.kernels.gate_grad(*activation, inputs, &grad, rows * width, (&mut dgate, &mut dup));
                self.give_grad(*gate, dgate);
                self.give_grad(*up, dup);
            }
            Op::Add { a, b } => {
                if wants(self, *b) {
                    let (mut db, filled) = self.grad_slot(*b);
                    self.kernels.add_to(&grad, rows * width, filled, &mut db);
                    self.nodes[b.0].grad = Some(db);
                }
                if wants(self, *a) {
                    // The buffer itself moves on where nothing has to be added to.
                    self.give_grad(*a, grad);
                    return;
                }
            }
            Op::Concat { parts } => {
                let mut from = 0;
                for part in parts.iter() {
                    let part_width = self.nodes[part.0].width;
                    if wants(self, *part) {
                        let (mut dx, filled) = self.grad_slot(*part);
                        let src = (&grad, Columns { stride: width, from });
                        let dst = (&mut dx, Columns { stride: part_width, from: 0 });
                        self.kernels.copy_cols(src, dst, rows, part_width, filled);
                        self.nodes[part.0].grad = Some(dx);
                    }
                    from += part_width;
                }
            }
            Op::Slice { x, from } => {
                if wants(self, *x) {
                    let mut dx = self.grad_sum(*x);
                    let src = (&grad, Columns { stride: width, from: 0 });
                    let dst = (&mut dx, Columns { stride: self.nodes[x.0].width, from: *from });
                    self.kernels.copy_cols(src, dst, rows, width, true);
                    self.nodes[x.0].grad = Some(dx);
                }
            }
            Op::Gather { x, rows: chosen } => {
                if wants(self, *x) {
                    let mut dx = self.grad_sum(*x);
                    self.kernels.scatter_add(&grad, width, chosen, &mut dx);
                    self.nodes[x.0].grad = Some(dx);
                }
            }
            Op::Attention { q, block0, diagonals, layout, slots, lse } => {
                let mut dq = self.grad_sum(*q);
                let (mut dk0, mut dv0) = (self.grad_sum(block0.0), self.grad_sum(block0.1));
                let mut dpairs: Vec<(K::Buf, K::Buf)> =
                    diagonals.iter().map(|(k, v)| (self.grad_sum(*k), self.grad_sum(*v))).collect();
                let pairs: Vec<_> = diagonals.iter().map(|(k, v)| (self.value(*k), self.value(*v))).collect();
                let out = node.value.as_ref().expect("kept until its own gradient");
                self.kernels.ttt_attention_grad(
                    layout.shape(slots),
                    self.value(*q),
                    (self.value(block0.0), self.value(block0.1)),
                    &pairs,
                    (out, lse),
                    &grad,
                    &mut dq,
                    (&mut dk0, &mut dv0),
                    dpairs.iter_mut().map(|(k, v)| (k, v)).collect(),
                );
                self.nodes[q.0].grad = Some(dq);
                self.nodes[block0.0.0].grad = Some(dk0);
                self.nodes[block0.1.0].grad = Some(dv0);
                for ((k, v), (dk, dv)) in diagonals.iter().zip(dpairs) {
                    self.nodes[k.0].grad = Some(dk);
                    self.nodes[v.0].grad = Some(dv);
                }
                let empty = self.kernels.zeros(0);
                let lse = std::mem::replace(lse, empty);
                self.release(lse);
            }
        }
        self.release(grad);
    }
}

impl TttLayout {
    fn shape<'a>(&'a self, slots: &'a [u32]) -> TttShape<'a> {
        TttShape {
            docs: &self.docs,
            slots,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
        }
    }
}

impl<K: TrainKernels> Ops for Tape<K> {
    type T = Var;
    type W = ParamId;
    type N = ParamId;
    /// No trained draft has experts.
    type E = std::convert::Infallible;

    /// # Panics
    /// With a bias: no trained layer has one.
    fn linear(&mut self, x: &Var, w: &ParamId, bias: Option<&ParamId>) -> Var {
        assert!(bias.is_none(), "no layer of a trained draft has a bias");
        let (rows, inp) = self.shape(*x);
        let out = self.params[w.0].shape[0];
        assert_eq!(self.params[w.0].shape, [out, inp], "`{}` fits its input", self.params[w.0].name);
        let mut y = self.buffer(rows, out);
        self.kernels.linear(self.value(*x), &self.params[w.0].value, LinearShape { rows, out, inp }, &mut y);
        self.push(Op::Linear { x: *x, w: *w }, rows, out, y, &[*x])
    }

    fn rms_norm(&mut self, x: &Var, w: &ParamId, eps: f32) -> Var {
        let width = self.nodes[x.0].width;
        self.head_norm(x, w, width, eps)
    }

    fn head_norm(&mut self, x: &Var, w: &ParamId, head_dim: usize, eps: f32) -> Var {
        let (rows, width) = self.shape(*x);
        assert_eq!(self.params[w.0].shape, [head_dim], "`{}` fits its input", self.params[w.0].name);
        let mut y = self.buffer(rows, width);
        let groups = rows * width / head_dim;
        self.kernels.norm(self.value(*x), &self.params[w.0].value, groups, head_dim, eps, &mut y);
        self.push(Op::Norm { x: *x, w: *w, group: head_dim, eps }, rows, width, y, &[*x])
    }

    fn rope(&mut self, x: Var, table: &Arc<RopeTable>, positions: &[u32]) -> Var {
        let (rows, width) = self.shape(x);
        assert_eq!(rows, positions.len(), "one position per row");
        let heads = width / table.head_dim();
        let mut y = self.buffer(rows, width);
        self.kernels.rotate(self.value(x), table, positions, heads, Rotation::Forward, &mut y);
        let op = Op::Rope { x, table: Arc::clone(table), positions: positions.to_vec(), heads };
        self.push(op, rows, width, y, &[x])
    }

    fn experts(&mut self, _x: &Var, _logits: &Var, _routing: Routing, experts: &Self::E) -> Var {
        match *experts {}
    }

    fn gated(&mut self, activation: Activation, gate: Var, up: &Var) -> Var {
        let (rows, width) = self.shape(gate);
        let mut y = self.buffer(rows, width);
        self.kernels.gate(activation, self.value(gate), self.value(*up), rows * width, &mut y);
        self.push(Op::Gate { activation, gate, up: *up }, rows, width, y, &[gate, *up])
    }

    fn add(&mut self, a: Var, b: &Var) -> Var {
        let (rows, width) = self.shape(a);
        assert_eq!((rows, width), self.shape(*b), "sums have one shape");
        let mut y = self.buffer(rows, width);
        self.kernels.sum(self.value(a), self.value(*b), rows * width, &mut y);
        self.push(Op::Add { a, b: *b }, rows, width, y, &[a, *b])
    }

    /// # Panics
    /// With a factor: no trained layer has one.
    fn scale(&mut self, x: Var, factor: f32) -> Var {
        assert!(factor == 1.0, "no layer of a trained draft has a multiplier");
        x
    }

    fn concat(&mut self, parts: &[&Var]) -> Var {
        let rows = parts.first().map_or(0, |x| self.nodes[x.0].rows);
        let width = parts.iter().map(|x| self.nodes[x.0].width).sum();
        let mut y = self.buffer(rows, width);
        let mut from = 0;
        for x in parts {
            let (part_rows, part_width) = self.shape(**x);
            assert_eq!(part_rows, rows, "concatenated parts have one row count");
            let src = (self.value(**x), Columns { stride: part_width, from: 0 });
            self.kernels.copy_cols(src, (&mut y, Columns { stride: width, from }), rows, part_width, false);
            from += part_width;
        }
        let parts: Vec<Var> = parts.iter().map(|x| **x).collect();
        self.push(Op::Concat { parts: parts.clone() }, rows, width, y, &parts)
    }

    fn slice_cols(&mut self, x: &Var, from: usize, width: usize) -> Var {
        let (rows, stride) = self.shape(*x);
        assert!(from + width <= stride, "slice inside the row");
        let mut y = self.buffer(rows, width);
        let src = (self.value(*x), Columns { stride, from });
        self.kernels.copy_cols(src, (&mut y, Columns { stride: width, from: 0 }), rows, width, false);
        self.push(Op::Slice { x: *x, from }, rows, width, y, &[*x])
    }

    /// # Panics
    /// With a trained table: embeddings are the target's and stay frozen.
    fn embed(&mut self, table: &ParamId, ids: &[u32], scale: f32) -> Var {
        let p = &self.params[table.0];
        assert!(!p.is_trained(), "embedding tables are frozen");
        let (vocab, width) = (p.shape[0], p.shape[1]);
        assert!(ids.iter().all(|id| (*id as usize) < vocab), "ids inside the vocabulary");
        let mut y = self.pool.take(&self.kernels, ids.len() * width);
        self.kernels.gather(&self.params[table.0].value, width, ids, scale, &mut y);
        self.push(Op::Input, ids.len(), width, y, &[])
    }
}

/// The attention of one training-time-test unroll: the first call is block 0, each later one adds a diagonal.
pub struct TttAttend {
    layout: TttLayout,
    /// Slots of the queries: of block 0, then of all later steps.
    slots: [Arc<[u32]>; 2],
    block0: Option<(Var, Var)>,
    diagonals: Vec<(Var, Var)>,
}

impl TttAttend {
    /// `all` are the slots of step 0 (every slot of the pack), `later` those of the steps after it.
    pub fn new(layout: TttLayout, all: Arc<[u32]>, later: Arc<[u32]>) -> TttAttend {
        TttAttend { layout, slots: [all, later], block0: None, diagonals: Vec::new() }
    }
}

impl<K: TrainKernels> Attend<Tape<K>> for TttAttend {
    fn attend(&mut self, tape: &mut Tape<K>, q: Var, k: Var, v: Var) -> Var {
        match self.block0 {
            None => {
                self.block0 = Some((k, v));
                tape.ttt_attention(&self.layout, &self.slots[0], q, (k, v), &[])
            }
            Some(block0) => {
                self.diagonals.push((k, v));
                tape.ttt_attention(&self.layout, &self.slots[1], q, block0, &self.diagonals)
            }
        }
    }
}
