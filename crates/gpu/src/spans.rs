//! Attention of drafts that propose blocks, in training: the formulas of [`draftsmith_kernels::train::spans`].
//!
//! Shape legend: `N` query rows of a tile, `K` keys of a tile, `nkv` key heads, `G` query heads per key head, `hd` head
//! width.

use burn_tensor::{Bool, DType, FloatDType, Tensor};
use draftsmith_kernels::train::spans::SpanTile;
use draftsmith_kernels::train::{KeyValue, KeyValueMut, Span, SpanShape};

use crate::attention::{Heads, join};
use crate::{Buf, Gpu};

/// Query rows of a tile at most.
const ROWS: usize = 2048;

/// The operands of one layer's attention.
struct Spans<'a> {
    shape: SpanShape<'a>,
    heads: Heads,
    /// `[R, nh hd]`
    q: Tensor<2>,
    /// Keys and values `[C, nkv hd]` of the context, `[B, nkv hd]` of the rows.
    context: [Tensor<2>; 2],
    own: [Tensor<2>; 2],
}

impl<'a> Spans<'a> {
    fn new(
        gpu: &Gpu,
        shape: SpanShape<'a>,
        q: &Buf,
        context: KeyValue<'_, Buf>,
        own: &[KeyValue<'_, Buf>],
    ) -> Spans<'a> {
        let [(k, v)] = own else { panic!("blocks have one pair of own keys and values") };
        let width = shape.kv_heads * shape.head_dim;
        let rows = |of: fn(&(Span, Span)) -> Span| {
            shape.sights.iter().map(|s| of(&(s.context, s.own)).to as usize).max().unwrap_or(0)
        };
        let (slots, own_rows) = (rows(|s| s.0), rows(|s| s.1));
        Spans {
            shape,
            heads: Heads { kv: shape.kv_heads, group: shape.heads / shape.kv_heads },
            q: gpu.stored(q, shape.sights.len(), shape.heads * shape.head_dim),
            context: [context.0, context.1].map(|x| gpu.stored(x, slots, width)),
            own: [k, v].map(|x| gpu.stored(x, own_rows, width)),
        }
    }

    fn tiles(&self) -> Vec<SpanTile> {
        let slots = self.context[0].dims()[0] + self.own[0].dims()[0];
        self.shape.tiles(self.heads.panel(slots).min(ROWS))
    }

    /// Keys or values of a tile by heads, those of the context first: `[nkv, 1, K, hd]`.
    fn keys(&self, gpu: &Gpu, t: &SpanTile, which: usize) -> Tensor<4> {
        let of = |x: &Tensor<2>, span: Span| gpu.rows(x, span.from as usize, span.len());
        let rows = match (t.context.is_empty(), t.own.is_empty()) {
            (false, false) => {
                Tensor::cat(vec![of(&self.context[which], t.context), of(&self.own[which], t.own)], 0)
            }
            (false, true) => of(&self.context[which], t.context),
            _ => of(&self.own[which], t.own),
        };
        self.heads.keys(rows)
    }

    /// What the rows of a tile do not see: `[N, K]`.
    fn hidden(&self, gpu: &Gpu, t: &SpanTile) -> Tensor<2, Bool> {
        let sights = &self.shape.sights[t.first..t.first + t.rows];
        let outside = |spans: Vec<Span>, keys: usize| {
            let from: Vec<u32> = spans.iter().map(|s| s.from).collect();
            let to: Vec<u32> = spans.iter().map(|s| s.to).collect();
            gpu.behind(&from, keys).bool_not().bool_or(gpu.behind(&to, keys))
        };
        let context =
            || outside(sights.iter().map(|s| s.context.inside(t.context)).collect(), t.context.len());
        let own = || outside(sights.iter().map(|s| s.own.inside(t.own)).collect(), t.own.len());
        match (t.context.is_empty(), t.own.is_empty()) {
            (false, false) => Tensor::cat(vec![context(), own()], 1),
            (false, true) => context(),
            _ => own(),
        }
    }
}

/// A mask of a tile for all heads.
fn for_heads(hidden: Tensor<2, Bool>, [kv, group, n, keys]: [usize; 4]) -> Tensor<4, Bool> {
    hidden.reshape([1, 1, n, keys]).expand([kv, group, n, keys])
}

impl Gpu {
    pub(crate) fn span_attention(
        &self,
        shape: SpanShape<'_>,
        q: &Buf,
        context: KeyValue<'_, Buf>,
        own: &[KeyValue<'_, Buf>],
        (out, lse): KeyValueMut<'_, Buf>,
    ) {
        if shape.sights.is_empty() {
            return;
        }
        let x = Spans::new(self, shape, q, context, own);
        let (mut outs, mut sums) = (Vec::new(), Vec::new());
        for t in x.tiles() {
            if t.keys() == 0 {
                let zeros = |width: usize| Tensor::zeros([t.rows, width], (&self.device, DType::F32));
                outs.push(zeros(shape.heads * shape.head_dim));
                sums.push(zeros(shape.heads));
                continue;
            }
            let q = x.heads.queries(self.rows(&x.q, t.first, t.rows));
            let (k, v, hidden) = (x.keys(self, &t, 0), x.keys(self, &t, 1), x.hidden(self, &t));
            let logits = self.logits(&q, &k, &hidden, shape.scale, None);
            let top = logits.clone().max_dim(3);
            let dims = logits.dims();
            // A row that sees nothing has no weights, whatever its largest logit.
            let weights = (logits - top.clone()).exp().mask_fill(for_heads(hidden, dims), 0.0);
            let sum = weights.clone().sum_dim(3);
            let some = sum.clone().clamp_min(f32::MIN_POSITIVE);
            outs.push(join(self.mix(&weights, &v) / some.clone()));
            let none = sum.lower_equal_scalar(0.0);
            sums.push(join((top + some.log()).mask_fill(none, 0.0)));
        }
        self.keep(out, Tensor::cat(outs, 0));
        lse.set(Tensor::cat(sums, 0));
    }

    #[allow(clippy::type_complexity, reason = "the operands of one gradient, in groups")]
    pub(crate) fn span_attention_grad(
        &self,
        shape: SpanShape<'_>,
        (q, context, own): (&Buf, KeyValue<'_, Buf>, &[KeyValue<'_, Buf>]),
        (out, lse): KeyValue<'_, Buf>,
        dout: &Buf,
        (dq, dcontext, down): (&mut Buf, KeyValueMut<'_, Buf>, Vec<KeyValueMut<'_, Buf>>),
    ) {
        let (rows, q_width) = (shape.sights.len(), shape.heads * shape.head_dim);
        if rows == 0 {
            return;
        }
        let x = Spans::new(self, shape, q, context, own);
        let dout = self.read(dout, rows, q_width);
        let lse = self.read(lse, rows, shape.heads);
        let out = self.read(out, rows, q_width);
        let by_heads = |all: &Tensor<2>, t: &SpanTile| x.heads.queries(self.rows(all, t.first, t.rows));
        let zeros = |like: &Tensor<2>| Tensor::zeros(like.dims(), (&self.device, DType::F32));
        let mut context: [Tensor<2>; 2] = [zeros(&x.context[0]), zeros(&x.context[1])];
        let mut own: [Tensor<2>; 2] = [zeros(&x.own[0]), zeros(&x.own[1])];
        let mut dqs = Vec::new();
        for t in x.tiles() {
            if t.keys() == 0 {
                dqs.push(Tensor::zeros([t.rows, q_width], (&self.device, DType::F32)));
                continue;
            }
            let q = by_heads(&x.q, &t).cast(FloatDType::F32);
            let (k, v, hidden) = (x.keys(self, &t, 0), x.keys(self, &t, 1), x.hidden(self, &t));
            let logits = self.logits(&q, &k, &hidden, shape.scale, None);
            let dims = logits.dims();
            let probs = (logits - by_heads(&lse, &t)).exp().mask_fill(for_heads(hidden, dims), 0.0);
            let d = by_heads(&dout, &t);
            let delta = (by_heads(&out, &t) * d.clone()).sum_dim(3);
            let dlogits = (probs.clone() * (self.against(&d, &v) - delta)).mul_scalar(shape.scale);
            dqs.push(join(self.mix(&dlogits, &k)));
            let (dk, dv) = (join(self.collect(&dlogits, &q)), join(self.collect(&probs, &d)));
            for (which, part) in [dk, dv].into_iter().enumerate() {
                let width = part.dims()[1];
                let split = t.context.len();
                for (all, span, from) in
                    [(&mut context[which], t.context, 0), (&mut own[which], t.own, split)]
                {
                    if span.is_empty() {
                        continue;
                    }
                    let place = [span.from as usize..span.to as usize, 0..width];
                    let new = part.clone().slice([from..from + span.len(), 0..width]);
                    let sum = all.clone().slice(place.clone()) + new;
                    *all = all.clone().slice_assign(place, sum);
                }
            }
        }
        self.keep_or_add(dq, Tensor::cat(dqs, 0), true);
        let [dk, dv] = context;
        self.add_first(dcontext.0, dk);
        self.add_first(dcontext.1, dv);
        let (to_k, to_v) = down.into_iter().next().expect("one gradient per pair");
        let [dk, dv] = own;
        self.add_first(to_k, dk);
        self.add_first(to_v, dv);
    }

    /// Adds to the first rows of a gradient; those behind them, which no row sees, stay as they are.
    fn add_first(&self, sum: &mut Buf, values: Tensor<2>) {
        let [rows, width] = values.dims();
        if rows == 0 {
            return;
        }
        let all = sum.capacity() / width;
        let old = self.take(sum, all, width).cast(FloatDType::F32);
        let place = [0..rows, 0..width];
        let first = old.clone().slice(place.clone()) + values;
        self.keep(sum, old.slice_assign(place, first));
    }
}
