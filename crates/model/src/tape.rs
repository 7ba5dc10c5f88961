//! A tape over coarse operations: runs a network of [`Ops`] forward, keeps what the gradients need, and walks back.
//!
//! There is no element-wise autograd: every node is one call of [`TrainKernels`] with a hand-written gradient.
//! Parameters live in the tape by name, each with a gradient accumulator unless frozen. Buffers of activations and
//! gradients go back to a pool when the walk has passed them and are reused by the next step.
//!
//! Shape legend: `R` rows, `C` width of an activation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use draftsmith_kernels::experts::Routing;
use draftsmith_kernels::train::{
    AdamStep, AttentionMask, Columns, DocSpan, LinearShape, LogitPart, PartGrad, Rotation, Sight, SoftLoss,
    SoftScale, SoftSums, SpanShape, Teacher, TokenRow, TokenTargets, TokenTeacher, TttShape,
};
use draftsmith_kernels::{Activation, Cell, Deferred, RopeTable, TrainKernels};

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
    /// A row of a trained embedding that is left as it is.
    fixed_row: Option<u32>,
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

/// Heads of an attention.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    /// `nh`
    pub heads: usize,
    /// `nkv`
    pub kv_heads: usize,
    /// `hd`
    pub head_dim: usize,
    /// Logit scale.
    pub scale: f32,
}

/// What the rows of an attention see.
#[derive(Clone, Debug)]
pub enum MaskLayout {
    /// Training-time test: queries at `slots` of a pack of documents.
    Ttt {
        /// Documents of the pack.
        docs: Arc<[DocSpan]>,
        /// `[R]`
        slots: Arc<[u32]>,
    },
    /// Blocks and rollouts: `[R]` two spans each.
    Spans(Arc<[Sight]>),
}

impl MaskLayout {
    fn mask<'a>(&'a self, h: HeadLayout) -> AttentionMask<'a> {
        let HeadLayout { heads, kv_heads, head_dim, scale } = h;
        match self {
            MaskLayout::Ttt { docs, slots } => {
                AttentionMask::Ttt(TttShape { docs, slots, heads, kv_heads, head_dim, scale })
            }
            MaskLayout::Spans(sights) => {
                AttentionMask::Spans(SpanShape { sights, heads, kv_heads, head_dim, scale })
            }
        }
    }
}

/// Documents and heads of training-time-test attention.
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

impl TttLayout {
    fn heads(&self) -> HeadLayout {
        let TttLayout { heads, kv_heads, head_dim, scale, .. } = *self;
        HeadLayout { heads, kv_heads, head_dim, scale }
    }
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
    Stack {
        parts: Vec<Var>,
    },
    Select {
        x: Var,
        rows: Vec<u32>,
    },
    Embed {
        table: ParamId,
        ids: Vec<u32>,
        scale: f32,
    },
    /// A bias `[O]` of each row: the product of ones `[R, 1]` with it.
    Bias {
        ones: Var,
        bias: ParamId,
    },
    Cell {
        cell: Cell,
        a: Var,
        b: Var,
        width: usize,
    },
    Attention {
        q: Var,
        context: (Var, Var),
        own: Vec<(Var, Var)>,
        mask: MaskLayout,
        heads: HeadLayout,
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

/// Gradients of all trained parameters of a tape, taken out of it.
#[derive(Debug)]
pub struct Grads<B>(Vec<B>);

/// Rows that are no activation of the tape.
#[derive(Debug)]
pub enum OuterRows<'a, B> {
    /// `[R, C]` on the host, row-major.
    Host(&'a [f32]),
    /// Rows of a buffer on the tape's device.
    Device {
        /// `[_, C]`
        buf: &'a B,
        /// `[R]`
        rows: &'a [u32],
    },
}

impl<'a, B> From<&'a [f32]> for OuterRows<'a, B> {
    fn from(values: &'a [f32]) -> Self {
        OuterRows::Host(values)
    }
}

impl<'a, B> From<&'a Vec<f32>> for OuterRows<'a, B> {
    fn from(values: &'a Vec<f32>) -> Self {
        OuterRows::Host(values)
    }
}

/// Records a network and computes gradients. See the module's description.
pub struct Tape<K: TrainKernels> {
    kernels: K,
    params: Vec<Param<K::Buf>>,
    /// Cleared ones that nobody holds.
    spare_grads: Vec<Grads<K::Buf>>,
    nodes: Vec<Node<K::Buf>>,
    pool: BufferPool<K::Buf>,
}

impl<K: TrainKernels> Tape<K> {
    /// An empty tape.
    pub fn new(kernels: K) -> Tape<K> {
        Tape {
            kernels,
            params: Vec::new(),
            spare_grads: Vec::new(),
            nodes: Vec::new(),
            pool: BufferPool(BTreeMap::new()),
        }
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
        self.params.push(Param {
            name: name.to_owned(),
            shape: shape.to_vec(),
            value,
            grad,
            fixed_row: None,
        });
        ParamId(self.params.len() - 1)
    }

    /// Leaves a row of an embedding out of its gradient: that of padding.
    pub fn fix_row(&mut self, id: ParamId, row: u32) {
        self.params[id.0].fixed_row = Some(row);
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

    /// Copies a part of a parameter to the host.
    pub fn param_part(&self, id: ParamId, part: Range<usize>) -> Vec<f32> {
        self.host_part(&self.params[id.0].value, part)
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

    /// A parameter on the device.
    pub fn param_buf(&self, id: ParamId) -> &K::Buf {
        &self.params[id.0].value
    }

    /// The backend, and a parameter to write to.
    pub fn param_buf_mut(&mut self, id: ParamId) -> (&K, &mut K::Buf) {
        (&self.kernels, &mut self.params[id.0].value)
    }

    /// The gradient of a trained parameter on the device.
    ///
    /// # Panics
    /// If the parameter is frozen.
    pub fn grad_buf(&self, id: ParamId) -> &K::Buf {
        self.params[id.0].grad.as_ref().expect("only trained parameters have gradients")
    }

    /// The backend, and the gradients of the trained parameter at a place: those that were taken out, in their order, and last the
    /// accumulator.
    ///
    /// # Panics
    /// If there is no such place.
    pub fn grad_bufs_mut<'a>(
        &'a mut self,
        place: usize,
        taken: &'a mut [Grads<K::Buf>],
    ) -> (&'a K, Vec<&'a mut K::Buf>) {
        let now = self.params.iter_mut().filter_map(|p| p.grad.as_mut()).nth(place);
        let now = now.expect("a trained parameter");
        let taken = taken.iter_mut().map(|taken| &mut taken.0[place]);
        (&self.kernels, taken.chain([now]).collect())
    }

    /// Copies the gradient of a trained parameter to the host.
    pub fn grad_values(&self, id: ParamId) -> Option<Vec<f32>> {
        let p = &self.params[id.0];
        p.grad.as_ref().map(|g| self.host(g, p.numel()))
    }

    /// Copies a part of the gradient of a trained parameter to the host.
    ///
    /// # Panics
    /// If the parameter is frozen.
    pub fn grad_part(&self, id: ParamId, part: Range<usize>) -> Vec<f32> {
        let grad = self.params[id.0].grad.as_ref().expect("only trained parameters have gradients");
        self.host_part(grad, part)
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

    /// Takes the gradients out; the accumulators then hold zeros. Hand them back with [`Tape::add_grads`] or
    /// [`Tape::drop_grads`].
    pub fn take_grads(&mut self) -> Grads<K::Buf> {
        let mut taken = self.spare_grads.pop().unwrap_or_else(|| {
            let trained = self.params.iter().filter(|p| p.is_trained());
            Grads(trained.map(|p| self.kernels.zeros(p.numel())).collect())
        });
        let grads = self.params.iter_mut().filter_map(|p| p.grad.as_mut());
        grads.zip(&mut taken.0).for_each(|(grad, taken)| std::mem::swap(grad, taken));
        taken
    }

    /// Adds gradients that were taken out before.
    pub fn add_grads(&mut self, taken: Grads<K::Buf>) {
        let trained = self.params.iter_mut().filter(|p| p.is_trained());
        for (p, taken) in trained.zip(&taken.0) {
            let len = p.numel();
            let grad = p.grad.as_mut().expect("only trained ones are asked");
            self.kernels.add_to(taken, len, true, grad);
        }
        self.drop_grads(taken);
    }

    /// Forgets gradients that were taken out before; their memory is used again.
    pub fn drop_grads(&mut self, mut taken: Grads<K::Buf>) {
        let trained = self.params.iter().filter(|p| p.is_trained());
        trained.zip(&mut taken.0).for_each(|(p, taken)| self.kernels.clear(taken, p.numel()));
        self.spare_grads.push(taken);
    }

    /// Copies one of the gradients that were taken out to the host: that of a parameter, by its place among the trained.
    pub fn taken_values(&self, taken: &Grads<K::Buf>, place: usize) -> Vec<f32> {
        let p = self.params.iter().filter(|p| p.is_trained()).nth(place).expect("a trained parameter");
        self.host(&taken.0[place], p.numel())
    }

    /// Overwrites the gradient of a trained parameter.
    ///
    /// # Panics
    /// If the parameter is frozen or the length differs.
    pub fn set_grad(&mut self, id: ParamId, values: &[f32]) {
        let p = &mut self.params[id.0];
        assert_eq!(values.len(), p.numel(), "one gradient per value");
        let grad = p.grad.as_mut().expect("only trained parameters have gradients");
        self.kernels.write(grad, values);
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
        let all: Vec<_> =
            self.params.iter().filter_map(|p| p.grad.as_ref().map(|g| (g, p.numel()))).collect();
        self.kernels.sum_squares_of(&all).sqrt()
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
        self.host_part(buf, 0..len)
    }

    fn host_part(&self, buf: &K::Buf, part: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; part.len()];
        self.kernels.download(buf, part.start, &mut out);
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
            Op::Linear { w, .. }
            | Op::Norm { w, .. }
            | Op::Embed { table: w, .. }
            | Op::Bias { bias: w, .. } => self.params[w.0].is_trained(),
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

    /// The same from a buffer on the tape's device, which is copied.
    pub fn input_on_device(&mut self, data: &K::Buf, rows: usize, width: usize) -> Var {
        let mut value = self.buffer(rows, width);
        self.kernels.add_to(data, rows * width, false, &mut value);
        self.push(Op::Input, rows, width, value, &[])
    }

    /// Chosen rows of an activation, strictly ascending.
    pub fn gather_rows(&mut self, x: Var, rows: &[u32]) -> Var {
        let width = self.nodes[x.0].width;
        let mut y = self.buffer(rows.len(), width);
        self.kernels.gather(self.value(x), width, rows, 1.0, &mut y);
        self.push(Op::Gather { x, rows: rows.to_vec() }, rows.len(), width, y, &[x])
    }

    /// Attention of queries under a mask over the context and the rows' own keys and values.
    pub fn attention(
        &mut self,
        mask: &MaskLayout,
        heads: HeadLayout,
        q: Var,
        context: (Var, Var),
        own: &[(Var, Var)],
    ) -> Var {
        let (rows, width) = self.shape(q);
        let mut out = self.buffer(rows, width);
        let mut lse = self.buffer(rows, heads.heads);
        let pairs: Vec<_> = own.iter().map(|(k, v)| (self.value(*k), self.value(*v))).collect();
        let block = (self.value(context.0), self.value(context.1));
        self.kernels.attention(mask.mask(heads), self.value(q), block, &pairs, &mut out, &mut lse);
        let mut inputs = vec![q, context.0, context.1];
        inputs.extend(own.iter().flat_map(|(k, v)| [*k, *v]));
        let op = Op::Attention { q, context, own: own.to_vec(), mask: mask.clone(), heads, lse };
        self.push(op, rows, width, out, &inputs)
    }

    /// Losses against tokens through several heads, and gradients of their inputs and of those heads that are trained;
    /// see [`draftsmith_kernels::train::token_loss`]. `states` are the target's final states of the rows with its head, if
    /// the rows are compared with it, and the log-sum-exp of its full logits, if that head is a part of it.
    #[allow(
        clippy::too_many_arguments,
        clippy::type_complexity,
        reason = "the operands of one fused operation"
    )]
    pub fn token_loss(
        &mut self,
        parts: &[(Var, ParamId)],
        labels: &[u32],
        (ce, l1): (&[f32], &[f32]),
        states: Option<(OuterRows<'_, K::Buf>, ParamId, Option<&[f32]>)>,
        grads: bool,
    ) -> Vec<TokenRow> {
        let rows = labels.len();
        let vocab = self.params[parts[0].1.0].shape[0];
        let states = states.map(|(x, head, lse)| {
            let width = self.params[head.0].shape[1];
            (self.take_in(x, width).0, head, lse)
        });
        // The gradients leave the parameters for the call: their values stay borrowed.
        let mut dheads: Vec<Option<K::Buf>> =
            parts.iter().map(|(_, w)| if grads { self.params[w.0].grad.take() } else { None }).collect();
        let mut dxs: Vec<K::Buf> = parts
            .iter()
            .map(|(x, _)| {
                let len = if grads { rows * self.nodes[x.0].width } else { 0 };
                self.pool.take(&self.kernels, len)
            })
            .collect();
        let operands: Vec<LogitPart<'_, K::Buf>> = parts
            .iter()
            .map(|(x, w)| LogitPart {
                x: self.value(*x),
                w: &self.params[w.0].value,
                inp: self.nodes[x.0].width,
            })
            .collect();
        let teacher = states.as_ref().map(|(x, head, lse)| {
            let head = &self.params[head.0];
            TokenTeacher { x, head: &head.value, inp: head.shape[1], lse: *lse }
        });
        let targets = TokenTargets { labels, ce, l1, teacher };
        let to: Option<Vec<PartGrad<'_, K::Buf>>> =
            grads.then(|| dxs.iter_mut().zip(dheads.iter_mut().map(Option::as_mut)).collect());
        let found = self.kernels.linear_token_loss(&operands, (rows, vocab), &targets, to);
        drop(operands);
        if let Some((buf, ..)) = states {
            self.release(buf);
        }
        for (((x, w), dx), dhead) in parts.iter().zip(dxs).zip(dheads) {
            if grads {
                if dhead.is_some() {
                    self.params[w.0].grad = dhead;
                }
                self.give_grad(*x, dx);
            } else {
                self.release(dx);
            }
        }
        found
    }

    /// Adds host values `[R, C]` to the gradient of an activation.
    ///
    /// # Panics
    /// If the length differs.
    pub fn add_activation_grad(&mut self, x: Var, values: &[f32]) {
        let (rows, width) = self.shape(x);
        assert_eq!(values.len(), rows * width, "one gradient per value");
        let buf = self.upload(values);
        self.give_grad(x, buf);
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
    ) -> Deferred<SoftSums> {
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

    /// Arg-max and log-sum-exp of rows `x[M, Ht]` times a frozen head `[V, Ht]`, without the `[M, V]` buffer.
    pub fn stream_head<'x>(
        &mut self,
        x: impl Into<OuterRows<'x, K::Buf>>,
        head: ParamId,
    ) -> (Vec<u32>, Vec<f32>) {
        let (out, inp) = (self.params[head.0].shape[0], self.params[head.0].shape[1]);
        let (buf, rows) = self.take_in(x.into(), inp);
        let shape = LinearShape { rows, out, inp };
        let result = self.kernels.stream_head(&buf, &self.params[head.0].value, shape);
        self.release(buf);
        result
    }

    /// Probabilities `[M, Vd]` of rows `x[M, Ht]` over the rows of a frozen head `[Vd, Ht]`, and the share `[M]`
    /// of the full distribution (log-sum-exp `lse[M]`) that they cover. Hand the teacher back with
    /// [`Tape::recycle`].
    pub fn teacher<'x>(
        &mut self,
        x: impl Into<OuterRows<'x, K::Buf>>,
        head: ParamId,
        lse: &[f32],
        labels: Vec<u32>,
    ) -> Teacher<K::Buf> {
        let (out, inp) = (self.params[head.0].shape[0], self.params[head.0].shape[1]);
        let (buf, _) = self.take_in(x.into(), inp);
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

    /// Rows of a width in a buffer of the pool, and their number.
    fn take_in(&mut self, x: OuterRows<'_, K::Buf>, width: usize) -> (K::Buf, usize) {
        match x {
            OuterRows::Host(values) => (self.upload(values), values.len() / width),
            OuterRows::Device { buf, rows } => {
                let mut taken = self.buffer(rows.len(), width);
                self.kernels.gather(buf, width, rows, 1.0, &mut taken);
                (taken, rows.len())
            }
        }
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
            Op::Stack { parts } => {
                let mut from = 0;
                for part in parts.iter() {
                    let len = self.nodes[part.0].rows * width;
                    if wants(self, *part) {
                        let (mut dx, filled) = self.grad_slot(*part);
                        let src = (&grad, Columns { stride: rows * width, from });
                        let dst = (&mut dx, Columns { stride: len, from: 0 });
                        self.kernels.copy_cols(src, dst, 1, len, filled);
                        self.nodes[part.0].grad = Some(dx);
                    }
                    from += len;
                }
            }
            Op::Select { x, rows: chosen } => {
                if wants(self, *x) {
                    let mut dx = self.grad_sum(*x);
                    self.kernels.gather_grad(&grad, width, chosen, 1.0, &mut dx);
                    self.nodes[x.0].grad = Some(dx);
                }
            }
            Op::Embed { table, ids, scale } => {
                let table = &mut self.params[table.0];
                let moves = |id: &u32| table.fixed_row != Some(*id);
                if let Some(dtable) = &mut table.grad {
                    if ids.iter().all(moves) {
                        self.kernels.gather_grad(&grad, width, ids, *scale, dtable);
                    } else {
                        let kept: Vec<u32> =
                            (0..rows as u32).filter(|row| moves(&ids[*row as usize])).collect();
                        let ids: Vec<u32> = kept.iter().map(|row| ids[*row as usize]).collect();
                        let mut some = self.pool.take(&self.kernels, kept.len() * width);
                        self.kernels.gather(&grad, width, &kept, 1.0, &mut some);
                        self.kernels.gather_grad(&some, width, &ids, *scale, dtable);
                        self.kernels.retire(&mut some);
                        self.pool.put(&self.kernels, some);
                    }
                }
            }
            Op::Bias { ones, bias } => {
                let shape = LinearShape { rows, out: width, inp: 1 };
                if let Some(dbias) = &mut self.params[bias.0].grad {
                    let ones =
                        self.nodes[ones.0].value.as_ref().expect("inputs are released after their users");
                    self.kernels.linear_dw(&grad, ones, shape, dbias);
                }
            }
            Op::Cell { cell, a, b, width: state } => {
                let inputs = (cell.input_width(*state), *state);
                let (mut da, mut db) = (self.buffer(rows, inputs.0), self.buffer(rows, inputs.1));
                let values = (self.value(*a), self.value(*b));
                self.kernels.cell_grad(*cell, values, &grad, (rows, *state), (&mut da, &mut db));
                self.give_grad(*a, da);
                self.give_grad(*b, db);
            }
            Op::Attention { q, context: block0, own: diagonals, mask, heads, lse } => {
                let mut dq = self.grad_sum(*q);
                let (mut dk0, mut dv0) = (self.grad_sum(block0.0), self.grad_sum(block0.1));
                let mut dpairs: Vec<(K::Buf, K::Buf)> =
                    diagonals.iter().map(|(k, v)| (self.grad_sum(*k), self.grad_sum(*v))).collect();
                let pairs: Vec<_> = diagonals.iter().map(|(k, v)| (self.value(*k), self.value(*v))).collect();
                let out = node.value.as_ref().expect("kept until its own gradient");
                self.kernels.attention_grad(
                    mask.mask(*heads),
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

impl<K: TrainKernels> Ops for Tape<K> {
    type T = Var;
    type W = ParamId;
    type N = ParamId;
    /// No trained draft has experts.
    type E = std::convert::Infallible;

    fn linear(&mut self, x: &Var, w: &ParamId, bias: Option<&ParamId>) -> Var {
        let (rows, inp) = self.shape(*x);
        let out = self.params[w.0].shape[0];
        assert_eq!(self.params[w.0].shape, [out, inp], "`{}` fits its input", self.params[w.0].name);
        let mut y = self.buffer(rows, out);
        self.kernels.linear(self.value(*x), &self.params[w.0].value, LinearShape { rows, out, inp }, &mut y);
        let product = self.push(Op::Linear { x: *x, w: *w }, rows, out, y, &[*x]);
        let Some(bias) = bias else { return product };
        assert_eq!(self.params[bias.0].shape, [out], "`{}` fits its layer", self.params[bias.0].name);
        let ones = self.input(&vec![1.0; rows], rows, 1);
        let mut y = self.buffer(rows, out);
        let shape = LinearShape { rows, out, inp: 1 };
        self.kernels.linear(self.value(ones), &self.params[bias.0].value, shape, &mut y);
        let spread = self.push(Op::Bias { ones, bias: *bias }, rows, out, y, &[]);
        self.add(product, &spread)
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

    fn stack(&mut self, parts: &[&Var]) -> Var {
        let width = parts.first().map_or(0, |x| self.nodes[x.0].width);
        let rows: usize = parts.iter().map(|x| self.nodes[x.0].rows).sum();
        let mut y = self.buffer(rows, width);
        // One below the other is the same memory as side by side in one row.
        let mut from = 0;
        for x in parts {
            let (part_rows, part_width) = self.shape(**x);
            assert_eq!(part_width, width, "stacked parts have one width");
            let len = part_rows * width;
            let src = (self.value(**x), Columns { stride: len, from: 0 });
            self.kernels.copy_cols(src, (&mut y, Columns { stride: rows * width, from }), 1, len, false);
            from += len;
        }
        let parts: Vec<Var> = parts.iter().map(|x| **x).collect();
        self.push(Op::Stack { parts: parts.clone() }, rows, width, y, &parts)
    }

    fn select(&mut self, x: &Var, rows: &[u32]) -> Var {
        let width = self.nodes[x.0].width;
        let mut y = self.buffer(rows.len(), width);
        self.kernels.gather(self.value(*x), width, rows, 1.0, &mut y);
        self.push(Op::Select { x: *x, rows: rows.to_vec() }, rows.len(), width, y, &[*x])
    }

    fn zeros_like(&mut self, x: &Var) -> Var {
        let (rows, width) = self.shape(*x);
        let mut y = self.buffer(rows, width);
        self.kernels.clear(&mut y, rows * width);
        self.push(Op::Input, rows, width, y, &[])
    }

    fn cell(&mut self, cell: Cell, a: &Var, b: &Var, width: usize) -> Var {
        let rows = self.nodes[a.0].rows;
        assert_eq!(self.shape(*a), (rows, cell.input_width(width)), "gates fit their state");
        assert_eq!(self.shape(*b), (rows, width), "states fit their width");
        let out = cell.output_width(width);
        let mut y = self.buffer(rows, out);
        self.kernels.gate_cell(cell, (self.value(*a), self.value(*b)), (rows, width), &mut y);
        self.push(Op::Cell { cell, a: *a, b: *b, width }, rows, out, y, &[*a, *b])
    }

    fn embed(&mut self, table: &ParamId, ids: &[u32], scale: f32) -> Var {
        let p = &self.params[table.0];
        let (vocab, width, trained) = (p.shape[0], p.shape[1], p.is_trained());
        assert!(ids.iter().all(|id| (*id as usize) < vocab), "ids inside the vocabulary");
        let mut y = self.pool.take(&self.kernels, ids.len() * width);
        self.kernels.gather(&self.params[table.0].value, width, ids, scale, &mut y);
        let op = match trained {
            true => Op::Embed { table: *table, ids: ids.to_vec(), scale },
            false => Op::Input,
        };
        self.push(op, ids.len(), width, y, &[])
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

    /// Sets the slots of the steps after the first, before the first of them.
    ///
    /// # Panics
    /// If one of those steps was taken.
    pub fn set_later(&mut self, later: Arc<[u32]>) {
        assert!(self.diagonals.is_empty(), "no step has these slots yet");
        self.slots[1] = later;
    }
}

impl<K: TrainKernels> Attend<Tape<K>> for TttAttend {
    fn attend(&mut self, tape: &mut Tape<K>, q: Var, k: Var, v: Var) -> Var {
        let mask = |slots: &Arc<[u32]>| MaskLayout::Ttt {
            docs: Arc::clone(&self.layout.docs),
            slots: Arc::clone(slots),
        };
        match self.block0 {
            None => {
                self.block0 = Some((k, v));
                tape.attention(&mask(&self.slots[0]), self.layout.heads(), q, (k, v), &[])
            }
            Some(block0) => {
                self.diagonals.push((k, v));
                tape.attention(&mask(&self.slots[1]), self.layout.heads(), q, block0, &self.diagonals)
            }
        }
    }
}

/// The attention of anchored blocks: each call is a layer, which sees the keys and values of the context of its own.
pub struct BlockAttend {
    heads: HeadLayout,
    /// Per layer: what its rows see, and the context.
    layers: std::vec::IntoIter<(MaskLayout, (Var, Var))>,
}

impl BlockAttend {
    /// The layers in order.
    pub fn new(heads: HeadLayout, layers: Vec<(MaskLayout, (Var, Var))>) -> BlockAttend {
        BlockAttend { heads, layers: layers.into_iter() }
    }
}

impl<K: TrainKernels> Attend<Tape<K>> for BlockAttend {
    fn attend(&mut self, tape: &mut Tape<K>, q: Var, k: Var, v: Var) -> Var {
        let (mask, context) = self.layers.next().expect("one context per layer");
        tape.attention(&mask, self.heads, q, context, &[(k, v)])
    }
}

/// The attention of rollouts: the first rows are the context, the others see it up to their anchor, and their own
/// rollout.
pub struct RolloutAttend {
    heads: HeadLayout,
    mask: MaskLayout,
    /// Rows of the context, and all others.
    rows: [Vec<u32>; 2],
}

impl RolloutAttend {
    /// Of `sights.len()` rows the first `context` ones are the context.
    pub fn new(heads: HeadLayout, sights: Arc<[Sight]>, context: usize) -> RolloutAttend {
        let all = sights.len() as u32;
        let rows = [(0..context as u32).collect(), (context as u32..all).collect()];
        RolloutAttend { heads, mask: MaskLayout::Spans(sights), rows }
    }
}

impl<K: TrainKernels> Attend<Tape<K>> for RolloutAttend {
    fn attend(&mut self, tape: &mut Tape<K>, q: Var, k: Var, v: Var) -> Var {
        let mut part = |x: Var, which: usize| tape.gather_rows(x, &self.rows[which]);
        let (context, own) = ((part(k, 0), part(v, 0)), (part(k, 1), part(v, 1)));
        tape.attention(&self.mask, self.heads, q, context, &[own])
    }
}
