//! [`Ops`] for decoding and capture: runs each operation at once on packed weights.

use std::sync::Arc;

use draftsmith_kernels::experts::{Experts, Routing};
use draftsmith_kernels::{Activation, Buffer, Cell, Kernels, RopeTable, Segment, StepMask};

use crate::ops::{Attend, Ops};

/// Activations `[rows, width]` on the device; their memory goes back when the last owner drops them.
pub struct Rows<B: Buffer> {
    /// Row-major values.
    pub buf: B,
    /// Tokens.
    pub rows: usize,
    /// Values per token.
    pub width: usize,
}

impl<B: Buffer> Drop for Rows<B> {
    fn drop(&mut self) {
        self.buf.give_back();
    }
}

/// Runs networks on a backend without recording anything.
pub struct Infer<'k, K: Kernels> {
    kernels: &'k K,
}

impl<'k, K: Kernels> Infer<'k, K> {
    /// An executor on this backend.
    pub fn new(kernels: &'k K) -> Infer<'k, K> {
        Infer { kernels }
    }

    /// Host values `[rows, width]` as activations.
    ///
    /// # Panics
    /// If the length is not a multiple of the width.
    pub fn input(&self, values: &[f32], width: usize) -> Arc<Rows<K::Buf>> {
        assert!(values.len().is_multiple_of(width), "whole rows");
        Arc::new(Rows { buf: self.kernels.upload(values), rows: values.len() / width, width })
    }

    /// Chosen rows.
    pub fn gather(&self, x: &Rows<K::Buf>, rows: &[u32]) -> Arc<Rows<K::Buf>> {
        let mut buf = self.kernels.scratch(rows.len() * x.width);
        self.kernels.gather_rows(&x.buf, x.width, rows, &mut buf);
        Arc::new(Rows { buf, rows: rows.len(), width: x.width })
    }

    /// Chosen rows of two values of one width, counted through both.
    pub(crate) fn choose(&self, a: &Rows<K::Buf>, b: &Rows<K::Buf>, rows: &[u32]) -> Arc<Rows<K::Buf>> {
        let mut both = self.kernels.scratch((a.rows + b.rows) * a.width);
        let parts = [(&a.buf, a.rows * a.width), (&b.buf, b.rows * b.width)];
        self.kernels.concat_cols(&parts, 1, &mut both);
        self.gather(&self.wrap(both, a.rows + b.rows, a.width), rows)
    }

    /// Capped values.
    pub(crate) fn softcap(&self, x: Arc<Rows<K::Buf>>, cap: f32) -> Arc<Rows<K::Buf>> {
        self.change(x, |kernels, x| kernels.softcap(x, cap))
    }

    /// All values on the host.
    pub fn values(&self, x: &Rows<K::Buf>) -> Vec<f32> {
        let mut out = vec![0.0; x.rows * x.width];
        self.kernels.download(&x.buf, 0, &mut out);
        out
    }

    /// The value itself if nobody else holds it, else a copy.
    fn own(&self, mut x: Arc<Rows<K::Buf>>) -> Arc<Rows<K::Buf>> {
        if Arc::get_mut(&mut x).is_some() {
            return x;
        }
        let mut buf = self.kernels.scratch(x.rows * x.width);
        self.kernels.slice_cols(&x.buf, x.width, 0, x.width, x.rows, &mut buf);
        self.wrap(buf, x.rows, x.width)
    }

    /// Changes a value in place, or its copy if others hold it.
    fn change(&self, x: Arc<Rows<K::Buf>>, change: impl FnOnce(&K, &mut K::Buf)) -> Arc<Rows<K::Buf>> {
        let mut x = self.own(x);
        change(self.kernels, &mut Arc::get_mut(&mut x).expect("just made the only owner").buf);
        x
    }

    fn wrap(&self, buf: K::Buf, rows: usize, width: usize) -> Arc<Rows<K::Buf>> {
        Arc::new(Rows { buf, rows, width })
    }

    fn norm(&self, x: &Rows<K::Buf>, w: &K::Buf, width: usize, eps: f32) -> Arc<Rows<K::Buf>> {
        let mut y = self.kernels.scratch(x.rows * x.width);
        self.kernels.rms_norm(&x.buf, w, width, eps, &mut y);
        self.wrap(y, x.rows, x.width)
    }
}

/// A packed linear weight with its shape.
pub struct Linear<P> {
    /// Backend layout.
    pub packed: P,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
}

impl<K: Kernels> Ops for Infer<'_, K> {
    type T = Arc<Rows<K::Buf>>;
    type W = Arc<Linear<K::Packed>>;
    type N = Arc<K::Buf>;
    type E = Experts<K::Packed, K::Buf>;

    fn linear(&mut self, x: &Self::T, w: &Self::W, bias: Option<&Self::N>) -> Self::T {
        let [y] = self.linears(x, [(w, bias)]);
        y
    }

    fn linears<const N: usize>(
        &mut self,
        x: &Self::T,
        layers: [(&Self::W, Option<&Self::N>); N],
    ) -> [Self::T; N] {
        let mut ys = layers.map(|(w, _)| {
            assert!(
                x.width == w.in_features,
                "linear input of {} values, weight wants {}",
                x.width,
                w.in_features
            );
            self.kernels.scratch(x.rows * w.out_features)
        });
        let weights = layers.map(|(w, bias)| (&w.packed, bias.map(Arc::as_ref)));
        self.kernels.matmuls(&x.buf, x.rows, &weights, &mut ys);
        let mut ys = ys.into_iter().zip(layers).map(|(y, (w, _))| self.wrap(y, x.rows, w.out_features));
        std::array::from_fn(|_| ys.next().expect("one output per layer"))
    }

    fn rms_norm(&mut self, x: &Self::T, w: &Self::N, eps: f32) -> Self::T {
        self.norm(x, w, x.width, eps)
    }

    fn head_norm(&mut self, x: &Self::T, w: &Self::N, head_dim: usize, eps: f32) -> Self::T {
        self.norm(x, w, head_dim, eps)
    }

    fn rope(&mut self, x: Self::T, table: &Arc<RopeTable>, positions: &[u32]) -> Self::T {
        let heads = x.width / table.head_dim();
        self.change(x, |kernels, x| kernels.rope(x, heads, table, positions))
    }

    fn gated(&mut self, activation: Activation, gate: Self::T, up: &Self::T) -> Self::T {
        self.change(gate, |kernels, gate| kernels.gated(activation, gate, &up.buf))
    }

    fn experts(&mut self, x: &Self::T, logits: &Self::T, routing: Routing, experts: &Self::E) -> Self::T {
        assert!(x.width == experts.hidden && logits.width == routing.experts, "the experts' layer");
        let routes = routing.choose(&self.values(logits));
        let mut y = self.kernels.scratch(x.rows * x.width);
        self.kernels.experts(&x.buf, &routes, experts, &mut y);
        self.wrap(y, x.rows, x.width)
    }

    fn add(&mut self, a: Self::T, b: &Self::T) -> Self::T {
        self.change(a, |kernels, a| kernels.add(a, &b.buf))
    }

    fn scale(&mut self, x: Self::T, factor: f32) -> Self::T {
        self.change(x, |kernels, x| kernels.scale(x, factor))
    }

    fn concat(&mut self, parts: &[&Self::T]) -> Self::T {
        let rows = parts.first().map_or(0, |p| p.rows);
        let width = parts.iter().map(|p| p.width).sum();
        let mut y = self.kernels.scratch(rows * width);
        let list: Vec<_> = parts.iter().map(|p| (&p.buf, p.width)).collect();
        self.kernels.concat_cols(&list, rows, &mut y);
        self.wrap(y, rows, width)
    }

    fn slice_cols(&mut self, x: &Self::T, from: usize, width: usize) -> Self::T {
        let mut y = self.kernels.scratch(x.rows * width);
        self.kernels.slice_cols(&x.buf, x.width, from, width, x.rows, &mut y);
        self.wrap(y, x.rows, width)
    }

    fn stack(&mut self, parts: &[&Self::T]) -> Self::T {
        if let [one] = parts {
            return Arc::clone(one);
        }
        // Side by side in one row is the same memory as one below the other.
        let width = parts.first().map_or(0, |p| p.width);
        let rows = parts.iter().map(|p| p.rows).sum();
        let mut y = self.kernels.scratch(rows * width);
        let list: Vec<_> = parts.iter().map(|p| (&p.buf, p.rows * width)).collect();
        self.kernels.concat_cols(&list, 1, &mut y);
        self.wrap(y, rows, width)
    }

    fn select(&mut self, x: &Self::T, rows: &[u32]) -> Self::T {
        self.gather(x, rows)
    }

    fn zeros_like(&mut self, x: &Self::T) -> Self::T {
        self.wrap(self.kernels.zeros(x.rows * x.width), x.rows, x.width)
    }

    fn cell(&mut self, cell: Cell, a: &Self::T, b: &Self::T, width: usize) -> Self::T {
        let out = cell.output_width(width);
        let mut y = self.kernels.scratch(a.rows * out);
        self.kernels.cell(cell, (&a.buf, &b.buf), a.rows, width, &mut y);
        self.wrap(y, a.rows, out)
    }

    fn embed(&mut self, table: &Self::W, ids: &[u32], scale: f32) -> Self::T {
        let mut y = self.kernels.scratch(ids.len() * table.in_features);
        self.kernels.embed(&table.packed, ids, scale, &mut y);
        self.wrap(y, ids.len(), table.in_features)
    }
}

/// Attention of one layer over the caches of one or more sequences.
pub struct CacheAttend<'a, Kv> {
    /// Caches and masks; their rows stand one after the other.
    pub segments: Vec<Segment<'a, Kv>>,
    /// Values per head.
    pub head_dim: usize,
}

impl<'a, Kv> CacheAttend<'a, Kv> {
    /// One sequence.
    pub fn one(kv: &'a mut Kv, mask: StepMask<'a>, head_dim: usize) -> CacheAttend<'a, Kv> {
        CacheAttend { segments: vec![Segment { kv, mask }], head_dim }
    }
}

impl<'k, K: Kernels> Attend<Infer<'k, K>> for CacheAttend<'_, K::Kv> {
    fn attend(
        &mut self,
        ops: &mut Infer<'k, K>,
        q: Arc<Rows<K::Buf>>,
        k: Arc<Rows<K::Buf>>,
        v: Arc<Rows<K::Buf>>,
    ) -> Arc<Rows<K::Buf>> {
        let mut y = ops.kernels.scratch(q.rows * q.width);
        let heads = q.width / self.head_dim;
        ops.kernels.attend(&q.buf, &k.buf, &v.buf, heads, &mut self.segments, &mut y);
        ops.wrap(y, q.rows, q.width)
    }
}
