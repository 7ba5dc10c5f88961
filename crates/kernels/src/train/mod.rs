//! Gradients and the optimiser: what training needs.
//!
//! The functions of the submodules work on slices and are the CPU implementation; [`TrainKernels`] is the seam for
//! other backends. Row counts are explicit and buffers may be longer, so that they can be reused between steps of
//! different size; what lies behind the rows of a result is unspecified. Results do not depend on the thread count.
//!
//! Shape legend: `R` rows, `I`/`O` input and output features, `S` slots of a pack.

pub mod attention;
pub mod linear;
pub mod optim;
pub(crate) mod par;
pub mod rowwise;
pub mod soft_ce;
pub mod spans;
#[cfg(target_arch = "x86_64")]
mod split;
pub mod token_loss;

pub use attention::{DocSpan, TttShape};
pub use linear::{LinearShape, Products, Team};
pub use optim::AdamStep;
pub use rowwise::Columns;
pub use soft_ce::{SoftLoss, SoftScale, SoftSums};
pub use spans::{Sight, Span, SpanShape};
pub use token_loss::{LogitPart, NO_LABEL, PartGrad, TokenRow, TokenTargets, TokenTeacher};

use crate::{Activation, Cell, Courier, Deferred, Memory, Peers, RopeTable, cell};
use attention::{TttGrads, TttInputs};
use rowwise::NormGrad;
use soft_ce::SoftTargets;
use spans::{SpanGrads, SpanInputs};

/// What attention in training sees: the one description of a mask.
#[derive(Clone, Copy, Debug)]
pub enum AttentionMask<'a> {
    /// Training-time test: a causal block, then each row's own entry of every later step; see [`mod@attention`].
    Ttt(TttShape<'a>),
    /// Per row a span of the context and a span of its own rows: anchored blocks and rollouts; see [`mod@spans`].
    Spans(SpanShape<'a>),
}

/// Keys and values of one block of training-time-test attention.
pub type KeyValue<'a, B> = (&'a B, &'a B);
/// Gradients of a [`KeyValue`].
pub type KeyValueMut<'a, B> = (&'a mut B, &'a mut B);

/// Teacher rows on the device, and what goes with each [eagle3 §4.5].
#[derive(Debug, Default)]
pub struct Teacher<B> {
    /// `[M, Vd]` probabilities, renormalised on the draft vocabulary.
    pub p: B,
    /// `[M]` share of the target's probability on the draft vocabulary.
    pub mass: Vec<f32>,
    /// `[M]` draft id of the target's most likely token.
    pub labels: Vec<u32>,
}

/// Operations of the training step, each with its gradient. `accumulate` adds to the result instead of overwriting.
pub trait TrainKernels: Memory {
    /// Values whose squares make one of the [`TrainKernels::square_sums`].
    const SQUARES: usize;
    /// Whether the operations run beside the host, which may do something else meanwhile.
    const HOST_IS_FREE: bool = false;

    /// Who sends data to the device while it computes, where somebody does.
    fn courier(&self) -> Option<Box<dyn Courier<Self::Buf>>> {
        None
    }
    /// Values that a buffer can hold.
    fn capacity(&self, buf: &Self::Buf) -> usize;
    /// Overwrites the beginning of a buffer with host data.
    fn write(&self, buf: &mut Self::Buf, data: &[f32]);
    /// Zeros the first `len` values.
    fn clear(&self, buf: &mut Self::Buf, len: usize);
    /// The values are not needed any more; the buffer is, for others of its size. A backend whose buffers are only
    /// names for memory may give that back.
    fn retire(&self, _buf: &mut Self::Buf) {}
    /// The devices of the other processes, where this one reaches them: gradients then need no way over the host.
    fn peers(&self) -> Option<&dyn Peers<Self::Buf>> {
        None
    }

    /// `y[R, O] = x[R, I] · w[O, I]ᵀ`
    fn linear(&self, x: &Self::Buf, w: &Self::Buf, shape: LinearShape, y: &mut Self::Buf);
    /// `dx[R, I] (+)= dy[R, O] · w[O, I]`
    fn linear_dx(
        &self,
        dy: &Self::Buf,
        w: &Self::Buf,
        shape: LinearShape,
        accumulate: bool,
        dx: &mut Self::Buf,
    );
    /// `dw[O, I] += dy[R, O]ᵀ · x[R, I]`
    fn linear_dw(&self, dy: &Self::Buf, x: &Self::Buf, shape: LinearShape, dw: &mut Self::Buf);

    /// RMS norm over `rows` of `width`.
    fn norm(&self, x: &Self::Buf, w: &Self::Buf, rows: usize, width: usize, eps: f32, y: &mut Self::Buf);
    /// Gradient of [`TrainKernels::norm`] over `(rows, width)`: `dx` (added to if `accumulate`) and `dw +=`, either if
    /// wanted.
    #[allow(clippy::too_many_arguments, reason = "the operands of one gradient")]
    fn norm_grad(
        &self,
        x: &Self::Buf,
        w: &Self::Buf,
        dy: &Self::Buf,
        rows_width: (usize, usize),
        eps: f32,
        accumulate: bool,
        dx: Option<&mut Self::Buf>,
        dw: Option<&mut Self::Buf>,
    );
    /// RoPE of `positions.len()` rows of `heads`; its `inverse` is its gradient.
    fn rotate(
        &self,
        x: &Self::Buf,
        table: &RopeTable,
        positions: &[u32],
        heads: usize,
        direction: Rotation,
        y: &mut Self::Buf,
    );
    /// `y = act(gate) * up` over `len` values.
    fn gate(&self, activation: Activation, gate: &Self::Buf, up: &Self::Buf, len: usize, y: &mut Self::Buf);
    /// Gradient of [`TrainKernels::gate`], overwriting.
    fn gate_grad(
        &self,
        activation: Activation,
        inputs: KeyValue<'_, Self::Buf>,
        dy: &Self::Buf,
        len: usize,
        grads: KeyValueMut<'_, Self::Buf>,
    );
    /// `y = a + b` over `len` values.
    fn sum(&self, a: &Self::Buf, b: &Self::Buf, len: usize, y: &mut Self::Buf);
    /// `dst (+)= src` over `len` values.
    fn add_to(&self, src: &Self::Buf, len: usize, accumulate: bool, dst: &mut Self::Buf);
    /// `dst` columns `(+)=` `src` columns, `width` of them.
    fn copy_cols(
        &self,
        src: (&Self::Buf, Columns),
        dst: (&mut Self::Buf, Columns),
        rows: usize,
        width: usize,
        accumulate: bool,
    );
    /// `y[i] = x[rows[i]] * scale`
    fn gather(&self, x: &Self::Buf, width: usize, rows: &[u32], scale: f32, y: &mut Self::Buf);
    /// `x[rows[i]] += y[i]`, rows strictly ascending.
    fn scatter_add(&self, y: &Self::Buf, width: usize, rows: &[u32], x: &mut Self::Buf);
    /// `x[rows[i]] += y[i] * scale`, rows in any order and with repeats.
    fn gather_grad(&self, y: &Self::Buf, width: usize, rows: &[u32], scale: f32, x: &mut Self::Buf);
    /// The gate of a Markov head over `(rows, width)`, see [`Cell`].
    fn gate_cell(
        &self,
        cell: Cell,
        inputs: KeyValue<'_, Self::Buf>,
        rows_width: (usize, usize),
        y: &mut Self::Buf,
    );
    /// Gradient of [`TrainKernels::gate_cell`] over `(rows, width)`, overwriting.
    fn cell_grad(
        &self,
        cell: Cell,
        inputs: KeyValue<'_, Self::Buf>,
        dy: &Self::Buf,
        rows_width: (usize, usize),
        grads: KeyValueMut<'_, Self::Buf>,
    );

    /// Attention under a mask. `context` are the keys and values that many rows share, `own` those of the rows: a pair for
    /// each later step of a training-time test, or the one pair of blocks. Writes `out` and `lse[R, nh]`.
    fn attention(
        &self,
        mask: AttentionMask<'_>,
        q: &Self::Buf,
        context: KeyValue<'_, Self::Buf>,
        own: &[KeyValue<'_, Self::Buf>],
        out: &mut Self::Buf,
        lse: &mut Self::Buf,
    );
    /// Its gradient; everything is added to.
    #[allow(clippy::too_many_arguments, reason = "the operands of one gradient")]
    fn attention_grad(
        &self,
        mask: AttentionMask<'_>,
        q: &Self::Buf,
        context: KeyValue<'_, Self::Buf>,
        own: &[KeyValue<'_, Self::Buf>],
        forward: KeyValue<'_, Self::Buf>,
        dout: &Self::Buf,
        dq: &mut Self::Buf,
        dcontext: KeyValueMut<'_, Self::Buf>,
        down: Vec<KeyValueMut<'_, Self::Buf>>,
    );

    /// Arg-max and log-sum-exp of the target's full logits; see [`soft_ce::stream_head`].
    fn stream_head(&self, x: &Self::Buf, head: &Self::Buf, shape: LinearShape) -> (Vec<u32>, Vec<f32>);
    /// Teacher probabilities over the draft vocabulary; see [`soft_ce::soft_targets`].
    fn soft_targets(
        &self,
        x: &Self::Buf,
        head: &Self::Buf,
        shape: LinearShape,
        lse: &[f32],
        p: &mut Self::Buf,
    ) -> Vec<f32>;
    /// Head, loss and gradients in one call; see [`soft_ce::linear_soft_ce`]. `rows` are teacher rows. The sums may stay on
    /// the device until they are asked for.
    #[allow(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    fn linear_soft_ce(
        &self,
        hidden: &Self::Buf,
        head: &Self::Buf,
        shape: LinearShape,
        teacher: &Teacher<Self::Buf>,
        rows: &[u32],
        loss: SoftLoss,
        scale: SoftScale,
        grads: Option<KeyValueMut<'_, Self::Buf>>,
    ) -> Deferred<SoftSums>;

    /// Losses against tokens over `(rows, vocab)`, weighed row by row; see [`token_loss`].
    fn linear_token_loss(
        &self,
        parts: &[LogitPart<'_, Self::Buf>],
        rows_vocab: (usize, usize),
        targets: &TokenTargets<'_, Self::Buf>,
        grads: Option<Vec<PartGrad<'_, Self::Buf>>>,
    ) -> Vec<TokenRow>;

    /// One AdamW step over the first `len` values: weights, gradient, moments.
    fn adamw(
        &self,
        step: AdamStep,
        len: usize,
        w: &mut Self::Buf,
        g: &Self::Buf,
        moments: KeyValueMut<'_, Self::Buf>,
    );
    /// Per buffer, over its first `len` values: `Σ x²` of every [`TrainKernels::SQUARES`] of them, the last of what is left. A
    /// sum depends on its own values alone, so a part of a buffer that begins at a multiple has the sums of the whole there. A
    /// device is waited for once.
    fn square_sums(&self, all: &[(&Self::Buf, usize)]) -> Vec<Vec<f64>>;
    /// `Σ x²` over the first `len` values.
    fn sum_squares(&self, x: &Self::Buf, len: usize) -> f64 {
        self.sum_squares_of(&[(x, len)])
    }
    /// The sum of [`TrainKernels::sum_squares`] over several buffers, in their order.
    fn sum_squares_of(&self, all: &[(&Self::Buf, usize)]) -> f64 {
        sum_of_squares(&self.square_sums(all))
    }
}

/// Adds up [`TrainKernels::square_sums`], those of each buffer first: the one order of these sums, whoever made them.
pub fn sum_of_squares(sums: &[Vec<f64>]) -> f64 {
    sums.iter().map(|sums| sums.iter().sum::<f64>()).sum()
}

/// Which way to rotate, and whether to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// `y = rope(x)`
    Forward,
    /// `y = rope⁻¹(x)`
    Inverse,
    /// `y += rope⁻¹(x)`
    InverseAdd,
}

impl TrainKernels for crate::Cpu {
    const SQUARES: usize = optim::CHUNK;

    fn capacity(&self, buf: &Vec<f32>) -> usize {
        buf.len()
    }
    fn write(&self, buf: &mut Vec<f32>, data: &[f32]) {
        buf[..data.len()].copy_from_slice(data);
    }
    fn clear(&self, buf: &mut Vec<f32>, len: usize) {
        rowwise::clear(self.threads(), &mut buf[..len]);
    }

    fn linear(&self, x: &Vec<f32>, w: &Vec<f32>, shape: LinearShape, y: &mut Vec<f32>) {
        linear::matmul(self.team(), x, w, shape, y);
    }
    fn linear_dx(
        &self,
        dy: &Vec<f32>,
        w: &Vec<f32>,
        shape: LinearShape,
        accumulate: bool,
        dx: &mut Vec<f32>,
    ) {
        linear::matmul_dx(self.team(), dy, w, shape, accumulate, dx);
    }
    fn linear_dw(&self, dy: &Vec<f32>, x: &Vec<f32>, shape: LinearShape, dw: &mut Vec<f32>) {
        linear::matmul_dw_acc(self.team(), dy, x, shape, dw);
    }

    fn norm(&self, x: &Vec<f32>, w: &Vec<f32>, rows: usize, width: usize, eps: f32, y: &mut Vec<f32>) {
        rowwise::rms_norm(self.threads(), x, w, rows, width, eps, y);
    }
    fn norm_grad(
        &self,
        x: &Vec<f32>,
        w: &Vec<f32>,
        dy: &Vec<f32>,
        (rows, width): (usize, usize),
        eps: f32,
        accumulate: bool,
        dx: Option<&mut Vec<f32>>,
        dw: Option<&mut Vec<f32>>,
    ) {
        let g = NormGrad { x, weight: w, dy, rows, width, eps, accumulate };
        rowwise::rms_norm_grad(self.threads(), g, dx.map(|d| &mut d[..]), dw.map(|d| &mut d[..]));
    }
    fn rotate(
        &self,
        x: &Vec<f32>,
        table: &RopeTable,
        positions: &[u32],
        heads: usize,
        direction: Rotation,
        y: &mut Vec<f32>,
    ) {
        let (inverse, accumulate) = match direction {
            Rotation::Forward => (false, false),
            Rotation::Inverse => (true, false),
            Rotation::InverseAdd => (true, true),
        };
        rowwise::rotate(self.threads(), x, table, positions, heads, inverse, accumulate, y);
    }
    fn gate(&self, activation: Activation, gate: &Vec<f32>, up: &Vec<f32>, len: usize, y: &mut Vec<f32>) {
        rowwise::gated(self.threads(), activation, gate, up, len, y);
    }
    fn gate_grad(
        &self,
        activation: Activation,
        (gate, up): KeyValue<'_, Vec<f32>>,
        dy: &Vec<f32>,
        len: usize,
        (dgate, dup): KeyValueMut<'_, Vec<f32>>,
    ) {
        rowwise::gated_grad(self.threads(), activation, (gate, up), dy, len, (dgate, dup));
    }
    fn sum(&self, a: &Vec<f32>, b: &Vec<f32>, len: usize, y: &mut Vec<f32>) {
        rowwise::sum(self.threads(), a, b, len, y);
    }
    fn add_to(&self, src: &Vec<f32>, len: usize, accumulate: bool, dst: &mut Vec<f32>) {
        rowwise::add_to(self.threads(), src, len, accumulate, dst);
    }
    fn copy_cols(
        &self,
        (src, from): (&Vec<f32>, Columns),
        (dst, to): (&mut Vec<f32>, Columns),
        rows: usize,
        width: usize,
        accumulate: bool,
    ) {
        rowwise::copy_cols(self.threads(), (src, from), (dst, to), rows, width, accumulate);
    }
    fn gather(&self, x: &Vec<f32>, width: usize, rows: &[u32], scale: f32, y: &mut Vec<f32>) {
        rowwise::gather(self.threads(), x, width, rows, scale, y);
    }
    fn scatter_add(&self, y: &Vec<f32>, width: usize, rows: &[u32], x: &mut Vec<f32>) {
        rowwise::scatter_add(self.threads(), y, width, rows, x);
    }
    fn gather_grad(&self, y: &Vec<f32>, width: usize, rows: &[u32], scale: f32, x: &mut Vec<f32>) {
        rowwise::gather_grad(self.threads(), y, width, rows, scale, x);
    }
    fn gate_cell(
        &self,
        cell: Cell,
        (a, b): KeyValue<'_, Vec<f32>>,
        (rows, width): (usize, usize),
        y: &mut Vec<f32>,
    ) {
        cell::forward(cell, (a, b), rows, width, y);
    }
    fn cell_grad(
        &self,
        cell: Cell,
        (a, b): KeyValue<'_, Vec<f32>>,
        dy: &Vec<f32>,
        (rows, width): (usize, usize),
        (da, db): KeyValueMut<'_, Vec<f32>>,
    ) {
        cell::backward(cell, (a, b), dy, rows, width, (da, db));
    }

    fn attention(
        &self,
        mask: AttentionMask<'_>,
        q: &Vec<f32>,
        (k0, v0): KeyValue<'_, Vec<f32>>,
        own: &[KeyValue<'_, Vec<f32>>],
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) {
        match mask {
            AttentionMask::Ttt(shape) => {
                let diagonals: Vec<(&[f32], &[f32])> = own.iter().map(|(k, v)| (&k[..], &v[..])).collect();
                let x = TttInputs { q, k0, v0, diagonals: &diagonals };
                attention::ttt_attention(self.threads(), shape, x, out, lse);
            }
            AttentionMask::Spans(shape) => {
                let [(k, v)] = own else { panic!("blocks have one pair of own keys and values") };
                let x = SpanInputs { q, context: (k0, v0), own: (k, v) };
                spans::span_attention(self.threads(), shape, x, out, lse);
            }
        }
    }
    fn attention_grad(
        &self,
        mask: AttentionMask<'_>,
        q: &Vec<f32>,
        (k0, v0): KeyValue<'_, Vec<f32>>,
        own: &[KeyValue<'_, Vec<f32>>],
        (out, lse): KeyValue<'_, Vec<f32>>,
        dout: &Vec<f32>,
        dq: &mut Vec<f32>,
        (dk0, dv0): KeyValueMut<'_, Vec<f32>>,
        down: Vec<KeyValueMut<'_, Vec<f32>>>,
    ) {
        match mask {
            AttentionMask::Ttt(shape) => {
                let diagonals: Vec<(&[f32], &[f32])> = own.iter().map(|(k, v)| (&k[..], &v[..])).collect();
                let x = TttInputs { q, k0, v0, diagonals: &diagonals };
                let diagonals = down.into_iter().map(|(k, v)| (&mut k[..], &mut v[..])).collect();
                let grads = TttGrads { dq, dk0, dv0, diagonals };
                attention::ttt_attention_grad(self.threads(), shape, x, (out, lse), dout, grads);
            }
            AttentionMask::Spans(shape) => {
                let [(k, v)] = own else { panic!("blocks have one pair of own keys and values") };
                let x = SpanInputs { q, context: (k0, v0), own: (k, v) };
                let mut down = down.into_iter();
                let (dk, dv) = down.next().expect("one gradient per pair");
                let grads = SpanGrads { dq, context: (dk0, dv0), own: (dk, dv) };
                spans::span_attention_grad(self.threads(), shape, x, (out, lse), dout, grads);
            }
        }
    }

    fn stream_head(&self, x: &Vec<f32>, head: &Vec<f32>, shape: LinearShape) -> (Vec<u32>, Vec<f32>) {
        soft_ce::stream_head(self.team(), (x, head), shape)
    }
    fn soft_targets(
        &self,
        x: &Vec<f32>,
        head: &Vec<f32>,
        shape: LinearShape,
        lse: &[f32],
        p: &mut Vec<f32>,
    ) -> Vec<f32> {
        soft_ce::soft_targets(self.team(), (x, head), shape, lse, p)
    }
    fn linear_soft_ce(
        &self,
        hidden: &Vec<f32>,
        head: &Vec<f32>,
        shape: LinearShape,
        teacher: &Teacher<Vec<f32>>,
        rows: &[u32],
        loss: SoftLoss,
        scale: SoftScale,
        grads: Option<KeyValueMut<'_, Vec<f32>>>,
    ) -> Deferred<SoftSums> {
        let targets = SoftTargets { p: &teacher.p, mass: &teacher.mass, labels: &teacher.labels, rows };
        let grads = grads.map(|(h, w)| (&mut h[..], &mut w[..]));
        let sums = soft_ce::linear_soft_ce(self.team(), (hidden, head), shape, targets, loss, scale, grads);
        Deferred::here(sums)
    }

    fn linear_token_loss(
        &self,
        parts: &[LogitPart<'_, Vec<f32>>],
        rows_vocab: (usize, usize),
        targets: &TokenTargets<'_, Vec<f32>>,
        grads: Option<Vec<PartGrad<'_, Vec<f32>>>>,
    ) -> Vec<TokenRow> {
        token_loss::linear_token_loss(self.team(), parts, rows_vocab, targets, grads)
    }

    fn adamw(
        &self,
        step: AdamStep,
        len: usize,
        w: &mut Vec<f32>,
        g: &Vec<f32>,
        (m, v): KeyValueMut<'_, Vec<f32>>,
    ) {
        optim::adamw(self.threads(), step, &mut w[..len], &g[..len], &mut m[..len], &mut v[..len]);
    }
    fn square_sums(&self, all: &[(&Vec<f32>, usize)]) -> Vec<Vec<f64>> {
        all.iter().map(|(x, len)| optim::square_sums(self.threads(), &x[..*len])).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::{Cpu, testing};

    #[test]
    fn operations_equal_the_formulas_and_their_gradients_the_difference_quotients() {
        for threads in [1, 2] {
            testing::train::all(&Cpu::new(threads), 0.0);
        }
    }
}
