//! What the attention of decoding and of training share: heads beside each other in batched products.
//!
//! Shape legend: `N` query rows of a panel, `S` keys, `nkv` key heads, `G` query heads per key head, `hd` head width.

use burn_tensor::{Bool, FloatDType, Int, Tensor};

use crate::Gpu;

/// Logits that exist at once: 256 MiB of f32.
const LOGITS: usize = 1 << 26;
/// The logit of a key that is not seen. Far below every other, and finite: an infinity would turn into NaN where a
/// device reorders arithmetic.
const HIDDEN: f32 = -1e30;

/// How rows are cut into heads.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// `nkv`
    pub(crate) kv: usize,
    /// `G`
    pub(crate) group: usize,
}

impl Heads {
    /// Query rows `[N, nkv G w]` by heads: `[nkv, G, N, w]`.
    pub(crate) fn queries(self, rows: Tensor<2>) -> Tensor<4> {
        split(rows, self.kv, self.group)
    }

    /// Key rows `[S, nkv w]` by heads: `[nkv, 1, S, w]`.
    pub(crate) fn keys(self, rows: Tensor<2>) -> Tensor<4> {
        split(rows, self.kv, 1)
    }

    /// Query rows of one panel.
    pub(crate) fn panel(self, keys: usize) -> usize {
        (LOGITS / (self.kv * self.group * keys).max(1)).max(1)
    }
}

fn split(rows: Tensor<2>, kv: usize, group: usize) -> Tensor<4> {
    let [n, width] = rows.dims();
    rows.reshape([n, kv, group, width / (kv * group)]).permute([1, 2, 0, 3])
}

/// The inverse of [`Heads::queries`] and [`Heads::keys`].
pub(crate) fn join(heads: Tensor<4>) -> Tensor<2> {
    let [kv, group, n, width] = heads.dims();
    heads.permute([2, 0, 1, 3]).reshape([n, kv * group * width])
}

/// All query heads of a key head below each other: `[nkv, G N, w]`.
fn stack(heads: Tensor<4>) -> Tensor<3> {
    let [kv, group, n, width] = heads.dims();
    heads.reshape([kv, group * n, width])
}

impl Gpu {
    /// `a · bᵀ` per head: `[nkv, G, N, w]` and `[nkv, 1, S, w]` to `[nkv, G, N, S]`.
    pub(crate) fn against(&self, a: &Tensor<4>, b: &Tensor<4>) -> Tensor<4> {
        let [kv, group, n, _] = a.dims();
        let keys = b.dims()[2];
        self.product(stack(a.clone()), stack(b.clone()).swap_dims(1, 2)).reshape([kv, group, n, keys])
    }

    /// `p · b` per head: `[nkv, G, N, S]` and `[nkv, 1, S, w]` to `[nkv, G, N, w]`.
    pub(crate) fn mix(&self, p: &Tensor<4>, b: &Tensor<4>) -> Tensor<4> {
        let [kv, group, n, _] = p.dims();
        let width = b.dims()[3];
        self.product(stack(p.clone()), stack(b.clone())).reshape([kv, group, n, width])
    }

    /// `pᵀ · a` per key head, summed over its query heads: `[nkv, G, N, S]` and `[nkv, G, N, w]` to
    /// `[nkv, 1, S, w]`.
    pub(crate) fn collect(&self, p: &Tensor<4>, a: &Tensor<4>) -> Tensor<4> {
        let [kv, _, _, keys] = p.dims();
        let width = a.dims()[3];
        self.product(stack(p.clone()).swap_dims(1, 2), stack(a.clone())).reshape([kv, 1, keys, width])
    }

    /// Scaled and capped logits `[nkv, G, N, S]` of queries against keys, of which each row does not see the `hidden[N, S]`.
    pub(crate) fn logits(
        &self,
        q: &Tensor<4>,
        k: &Tensor<4>,
        hidden: &Tensor<2, Bool>,
        scale: f32,
        softcap: Option<f32>,
    ) -> Tensor<4> {
        let logits = self.against(q, k).mul_scalar(scale);
        let logits = match softcap {
            Some(cap) => logits.div_scalar(cap).tanh().mul_scalar(cap),
            None => logits,
        };
        let [kv, group, n, keys] = logits.dims();
        let hidden: Tensor<4, Bool> = hidden.clone().reshape([1, 1, n, keys]).expand([kv, group, n, keys]);
        logits.mask_fill(hidden, HIDDEN)
    }

    /// Whether key `s` of `keys` lies at or behind `end[row]`: `[N, S]`.
    pub(crate) fn behind(&self, end: &[u32], keys: usize) -> Tensor<2, Bool> {
        let (n, end) = (end.len(), self.indices(end));
        let s = Tensor::<1, Int>::arange(0..keys as i64, &self.device).reshape([1, keys]).expand([n, keys]);
        s.greater_equal(end.reshape([n, 1]).expand([n, keys]))
    }

    /// Rows `from..from + n` of a matrix as f32.
    pub(crate) fn rows(&self, x: &Tensor<2>, from: usize, n: usize) -> Tensor<2> {
        let width = x.dims()[1];
        x.clone().slice([from..from + n, 0..width]).cast(FloatDType::F32)
    }
}
