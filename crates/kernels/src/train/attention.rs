//! Attention of the training-time test: one causal block over the true features, plus each slot's own entry of every
//! later step [eagle3 §4.2].
//!
//! Query row `r` sits at slot `slots[r]` of a pack of documents. It sees block 0 from the start of its document up to
//! and including its slot, and row `r` of each diagonal. Block 0 is taken in panels of [`TILE`] query rows; the
//! diagonal logits join the same softmax. Forward keeps the merged log-sum-exp, backward recomputes the panels.
//!
//! Shape legend: `S` slots of the pack, `R` query rows, `D` diagonals, `nh`/`nkv` query/key heads, `hd` head width.

use gemm::Parallelism;

use super::linear::Product;
use super::par::{Shared, dot, exp, exp_shifted, max, par_ranges, simd, sum2, with_scratch};

/// Query rows of one panel; a panel holds `TILE * S` logits at most.
const TILE: usize = 64;
/// Rows per task of the diagonal gradients.
const ROWS: usize = 32;

/// A document inside a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DocSpan {
    /// First slot.
    pub start: u32,
    /// Number of slots.
    pub len: u32,
}

impl DocSpan {
    /// The slot behind the last.
    pub fn end(self) -> usize {
        self.start as usize + self.len as usize
    }
}

/// Who sees what, and the head layout.
#[derive(Clone, Copy, Debug)]
pub struct TttShape<'a> {
    /// Documents: ascending, disjoint.
    pub docs: &'a [DocSpan],
    /// `[R]` slot of each query row, strictly ascending, each inside a document.
    pub slots: &'a [u32],
    /// `nh`
    pub heads: usize,
    /// `nkv`
    pub kv_heads: usize,
    /// `hd`
    pub head_dim: usize,
    /// Logit scale.
    pub scale: f32,
}

/// Rotated queries, keys and values.
#[derive(Clone, Copy)]
pub struct TttInputs<'a> {
    /// `[R, nh hd]`
    pub q: &'a [f32],
    /// `[S, nkv hd]` keys of block 0.
    pub k0: &'a [f32],
    /// `[S, nkv hd]` values of block 0.
    pub v0: &'a [f32],
    /// `D` pairs of keys and values `[R, nkv hd]`.
    pub diagonals: &'a [(&'a [f32], &'a [f32])],
}

/// Gradients, all added to.
pub struct TttGrads<'a> {
    /// `[R, nh hd]`
    pub dq: &'a mut [f32],
    /// `[S, nkv hd]`
    pub dk0: &'a mut [f32],
    /// `[S, nkv hd]`
    pub dv0: &'a mut [f32],
    /// `D` pairs `[R, nkv hd]`
    pub diagonals: Vec<(&'a mut [f32], &'a mut [f32])>,
}

/// Query rows of one document.
#[derive(Clone, Debug)]
pub struct DocRows {
    /// The document.
    pub doc: DocSpan,
    /// Its rows of the query matrix.
    pub rows: std::ops::Range<usize>,
}

impl TttShape<'_> {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Splits the query rows by document, those without rows left out, and checks the layout.
    ///
    /// # Panics
    /// If the layout is not as the fields say, or block 0 has fewer slots than the documents need.
    pub fn by_document(&self, block0_slots: usize) -> Vec<DocRows> {
        assert!(self.slots.windows(2).all(|w| w[0] < w[1]), "slots ascend");
        let mut row = 0;
        let mut out = Vec::with_capacity(self.docs.len());
        for doc in self.docs {
            assert!(doc.end() <= block0_slots, "documents lie inside the pack");
            let begin = row;
            while row < self.slots.len() && (self.slots[row] as usize) < doc.end() {
                assert!(self.slots[row] >= doc.start, "every query slot belongs to a document");
                row += 1;
            }
            if row > begin {
                out.push(DocRows { doc: *doc, rows: begin..row });
            }
        }
        assert_eq!(row, self.slots.len(), "every query slot belongs to a document");
        out
    }
}

/// One panel: queries `rows` of head `head` against the keys of their document up to the last of them.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    rows: usize,
    /// First slot of the document.
    start: usize,
    /// Keys in reach of the last row.
    keys: usize,
    head: usize,
}

/// `out[R, nh hd]` and `lse[R, nh]`, the log-sum-exp of all logits of a row.
pub fn ttt_attention(
    threads: usize,
    shape: TttShape<'_>,
    x: TttInputs<'_>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let rows = shape.slots.len();
    assert!(x.q.len() >= rows * qw, "complete queries");
    let mut panels = Vec::new();
    for d in shape.by_document(x.k0.len().min(x.v0.len()) / kvw) {
        for first in d.rows.clone().step_by(TILE) {
            let n = TILE.min(d.rows.end - first);
            let keys = shape.slots[first + n - 1] as usize + 1 - d.doc.start as usize;
            for head in 0..shape.heads {
                panels.push(Panel { first, rows: n, start: d.doc.start as usize, keys, head });
            }
        }
    }
    let (out, lse) = (Shared::new(&mut out[..rows * qw]), Shared::new(&mut lse[..rows * shape.heads]));
    par_ranges(threads, panels.len(), 1, |r| {
        for p in &panels[r] {
            let kv = p.head / (shape.heads / shape.kv_heads);
            with_scratch(p.rows * p.keys, |logits| {
                panel_logits(&shape, x.q, x.k0, p, kv, logits);
                let mut sums = [0.0f32; TILE];
                for (i, row_sum) in sums[..p.rows].iter_mut().enumerate() {
                    let row = p.first + i;
                    let line = &mut logits[i * p.keys..(i + 1) * p.keys];
                    let seen = shape.slots[row] as usize + 1 - p.start;
                    let q = &x.q[row * qw + p.head * hd..][..hd];
                    let (shift, sum) = simd(
                        #[inline(always)]
                        || {
                            let (line, hidden) = line.split_at_mut(seen);
                            hidden.fill(0.0);
                            line.iter_mut().for_each(|z| *z *= shape.scale);
                            let mut shift = max(line);
                            for (k, _) in x.diagonals {
                                shift = shift.max(shape.scale * dot(q, &k[row * kvw + kv * hd..][..hd]));
                            }
                            (shift, exp_shifted(line, shift))
                        },
                    );
                    let mut total = sum;
                    for (k, _) in x.diagonals {
                        let z = simd(
                            #[inline(always)]
                            || shape.scale * dot(q, &k[row * kvw + kv * hd..][..hd]),
                        );
                        total += exp(z - shift);
                    }
                    *row_sum = total;
                    // SAFETY: one task per (row, head).
                    unsafe {
                        lse.range(row * shape.heads + p.head..row * shape.heads + p.head + 1)[0] =
                            shift + total.ln()
                    };
                }
                // out = P · V0, not yet divided by the sum
                let product = Product {
                    m: p.rows,
                    n: hd,
                    k: p.keys,
                    dst: (qw as isize, 1),
                    lhs: (p.keys as isize, 1),
                    rhs: (kvw as isize, 1),
                    accumulate: false,
                };
                let (dst, v) = (out.at(p.first * qw + p.head * hd), &x.v0[p.start * kvw + kv * hd..]);
                // SAFETY: `keys` rows of V0 exist, and this task alone writes these rows of this head.
                unsafe { product.run(dst, logits.as_ptr(), v.as_ptr(), Parallelism::None) };
                for (i, row_sum) in sums[..p.rows].iter().enumerate() {
                    let row = p.first + i;
                    let q = &x.q[row * qw + p.head * hd..][..hd];
                    // SAFETY: as above.
                    let (o, lse) = unsafe {
                        let lse = lse.range(row * shape.heads + p.head..row * shape.heads + p.head + 1)[0];
                        (out.range(row * qw + p.head * hd..row * qw + (p.head + 1) * hd), lse)
                    };
                    simd(
                        #[inline(always)]
                        || {
                            let inverse = 1.0 / row_sum;
                            o.iter_mut().for_each(|o| *o *= inverse);
                            for (k, v) in x.diagonals {
                                let weight = exp(shape.scale * dot(q, &k[row * kvw + kv * hd..][..hd]) - lse);
                                for (o, v) in o.iter_mut().zip(&v[row * kvw + kv * hd..][..hd]) {
                                    *o += weight * v;
                                }
                            }
                        },
                    );
                }
            });
        }
    });
}

/// Raw logits `q · k0ᵀ` of one panel, `[rows, keys]`.
fn panel_logits(shape: &TttShape<'_>, q: &[f32], k0: &[f32], p: &Panel, kv: usize, logits: &mut [f32]) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let product = Product {
        m: p.rows,
        n: p.keys,
        k: hd,
        dst: (p.keys as isize, 1),
        lhs: (qw as isize, 1),
        rhs: (1, kvw as isize),
        accumulate: false,
    };
    let (q, k) = (&q[p.first * qw + p.head * hd..], &k0[p.start * kvw + kv * hd..]);
    assert!(
        q.len() >= (p.rows - 1) * qw + hd && k.len() >= (p.keys - 1) * kvw + hd,
        "panel inside its operands"
    );
    // SAFETY: checked just above; `logits` is `[rows, keys]`.
    unsafe { product.run(logits.as_mut_ptr(), q.as_ptr(), k.as_ptr(), Parallelism::None) };
}

/// Gradient of [`ttt_attention`]: `out` and `lse` as it left them, `dout[R, nh hd]`.
pub fn ttt_attention_grad(
    threads: usize,
    shape: TttShape<'_>,
    x: TttInputs<'_>,
    (out, lse): (&[f32], &[f32]),
    dout: &[f32],
    grads: TttGrads<'_>,
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let rows = shape.slots.len();
    let group = shape.heads / shape.kv_heads;
    let documents = shape.by_document(x.k0.len().min(x.v0.len()) / kvw);
    // <dO, out> of each row and head: what the softmax subtracts.
    let mut delta = vec![0.0f32; rows * shape.heads];
    let deltas = Shared::new(&mut delta);
    let dq = Shared::new(&mut grads.dq[..rows * qw]);
    let diagonals: Vec<_> = grads
        .diagonals
        .into_iter()
        .map(|(k, v)| (Shared::new(&mut k[..rows * kvw]), Shared::new(&mut v[..rows * kvw])))
        .collect();
    assert_eq!(diagonals.len(), x.diagonals.len(), "one gradient per diagonal");
    par_ranges(threads, rows, ROWS, |r| {
        simd(
            #[inline(always)]
            || {
                for row in r.clone() {
                    for head in 0..shape.heads {
                        let at = row * qw + head * hd;
                        let kv_at = row * kvw + head / group * hd;
                        let (q, o, d) = (&x.q[at..at + hd], &out[at..at + hd], &dout[at..at + hd]);
                        let through = dot(d, o);
                        // SAFETY: rows of tasks are disjoint; all heads of a row are in one task.
                        let dq = unsafe {
                            deltas.range(row * shape.heads + head..row * shape.heads + head + 1)[0] = through;
                            dq.range(at..at + hd)
                        };
                        for ((k, v), (dk, dv)) in x.diagonals.iter().zip(&diagonals) {
                            let (k, v) = (&k[kv_at..kv_at + hd], &v[kv_at..kv_at + hd]);
                            let weight = exp(shape.scale * dot(q, k) - lse[row * shape.heads + head]);
                            let dlogit = shape.scale * weight * (sum2(d, v, |a, b| a * b) - through);
                            // SAFETY: as above.
                            let (dk, dv) =
                                unsafe { (dk.range(kv_at..kv_at + hd), dv.range(kv_at..kv_at + hd)) };
                            for c in 0..hd {
                                dv[c] += weight * d[c];
                                dq[c] += dlogit * k[c];
                                dk[c] += dlogit * q[c];
                            }
                        }
                    }
                }
            },
        );
    });
    // Block 0: a task per document and query head, with its own key and value gradients, added up per key head
    // afterwards in head order.
    let tasks: Vec<(usize, usize)> =
        (0..documents.len()).flat_map(|d| (0..shape.heads).map(move |h| (d, h))).collect();
    let mut offsets = Vec::with_capacity(tasks.len() + 1);
    let mut total = 0;
    for (d, _) in &tasks {
        offsets.push(total);
        let doc = &documents[*d];
        total += (shape.slots[doc.rows.end - 1] as usize + 1 - doc.doc.start as usize) * hd;
    }
    offsets.push(total);
    with_scratch(2 * total, |own| {
        let (own_dk, own_dv) = own.split_at_mut(total);
        let (shared_dk, shared_dv) = (Shared::new(own_dk), Shared::new(own_dv));
        par_ranges(threads, tasks.len(), 1, |t| {
            for task in t {
                let (d, head) = tasks[task];
                // SAFETY: each task has its own part.
                let (dk, dv) = unsafe {
                    let part = offsets[task]..offsets[task + 1];
                    (shared_dk.range(part.clone()), shared_dv.range(part))
                };
                block_grad(&shape, &x, &documents[d], head, (lse, &delta), dout, dq, (dk, dv));
            }
        });
        let (dk0, dv0) = (Shared::new(grads.dk0), Shared::new(grads.dv0));
        par_ranges(threads, documents.len() * shape.kv_heads, 1, |r| {
            for i in r {
                let (d, kv) = (i / shape.kv_heads, i % shape.kv_heads);
                let start = documents[d].doc.start as usize;
                for head in kv * group..(kv + 1) * group {
                    let part = offsets[d * shape.heads + head]..offsets[d * shape.heads + head + 1];
                    // SAFETY: the block tasks are done; each document and key head is one task.
                    let (dk, dv) = unsafe { (shared_dk.range(part.clone()), shared_dv.range(part)) };
                    for (own, all) in [(dk, dk0), (dv, dv0)] {
                        for (s, own) in own.chunks_exact(hd).enumerate() {
                            let at = (start + s) * kvw + kv * hd;
                            // SAFETY: as above.
                            let all = unsafe { all.range(at..at + hd) };
                            for (a, o) in all.iter_mut().zip(own) {
                                *a += o;
                            }
                        }
                    }
                }
            }
        });
    });
}

/// Gradient of one query head of one document through block 0. `dk` and `dv`: `[keys, hd]`, overwritten.
#[allow(clippy::too_many_arguments, reason = "the pieces of one inner loop")]
fn block_grad(
    shape: &TttShape<'_>,
    x: &TttInputs<'_>,
    doc: &DocRows,
    head: usize,
    (lse, delta): (&[f32], &[f32]),
    dout: &[f32],
    dq: Shared<f32>,
    (dk, dv): (&mut [f32], &mut [f32]),
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let kv = head / (shape.heads / shape.kv_heads);
    let start = doc.doc.start as usize;
    dk.fill(0.0);
    dv.fill(0.0);
    for first in doc.rows.clone().step_by(TILE) {
        let n = TILE.min(doc.rows.end - first);
        let keys = shape.slots[first + n - 1] as usize + 1 - start;
        let p = Panel { first, rows: n, start, keys, head };
        with_scratch(2 * n * keys, |both| {
            let (probs, dlogits) = both.split_at_mut(n * keys);
            panel_logits(shape, x.q, x.k0, &p, kv, probs);
            // dP = dO · V0ᵀ
            panel_logits(shape, dout, x.v0, &p, kv, dlogits);
            for i in 0..n {
                let row = first + i;
                let seen = shape.slots[row] as usize + 1 - start;
                let (lse, delta) = (lse[row * shape.heads + head], delta[row * shape.heads + head]);
                let (probs, dlogits) =
                    (&mut probs[i * keys..(i + 1) * keys], &mut dlogits[i * keys..(i + 1) * keys]);
                simd(
                    #[inline(always)]
                    || {
                        for (p, d) in probs[..seen].iter_mut().zip(&mut dlogits[..seen]) {
                            *p = exp(*p * shape.scale - lse);
                            *d = *p * (*d - delta) * shape.scale;
                        }
                        probs[seen..].fill(0.0);
                        dlogits[seen..].fill(0.0);
                    },
                );
            }
            let (ks, qs, hs) = (keys as isize, qw as isize, hd as isize);
            let (q, d) = (&x.q[first * qw + head * hd..], &dout[first * qw + head * hd..]);
            let k = &x.k0[start * kvw + kv * hd..];
            // dq += dS · K0
            let to_q = Product {
                m: n,
                n: hd,
                k: keys,
                dst: (qs, 1),
                lhs: (ks, 1),
                rhs: (kvw as isize, 1),
                accumulate: true,
            };
            // dK0 += dSᵀ · q and dV0 += Pᵀ · dO
            let to_k =
                Product { m: keys, n: hd, k: n, dst: (hs, 1), lhs: (1, ks), rhs: (qs, 1), accumulate: true };
            // SAFETY: `panel_logits` checked the operands; rows of this head belong to this task alone.
            unsafe {
                to_q.run(dq.at(first * qw + head * hd), dlogits.as_ptr(), k.as_ptr(), Parallelism::None);
                to_k.run(dk.as_mut_ptr(), dlogits.as_ptr(), q.as_ptr(), Parallelism::None);
                to_k.run(dv.as_mut_ptr(), probs.as_ptr(), d.as_ptr(), Parallelism::None);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    const SHAPE: TttShape<'_> = TttShape {
        docs: &[DocSpan { start: 0, len: 70 }, DocSpan { start: 70, len: 5 }],
        slots: &[3, 4, 9, 50, 69, 70, 72, 73],
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        scale: 0.5,
    };

    #[test]
    fn gradients_do_not_depend_on_the_thread_count() {
        let (q, dout) = (noise(1, 8 * 8), noise(2, 8 * 8));
        let (k0, v0) = (noise(3, 75 * 4), noise(4, 75 * 4));
        let (k1, v1) = (noise(5, 8 * 4), noise(6, 8 * 4));
        let x = TttInputs { q: &q, k0: &k0, v0: &v0, diagonals: &[(&k1, &v1)] };
        let run = |threads| {
            let (mut out, mut lse) = (vec![0.0; 64], vec![0.0; 16]);
            ttt_attention(threads, SHAPE, x, &mut out, &mut lse);
            let mut g = [vec![0.0; 64], vec![0.0; 300], vec![0.0; 300], vec![0.0; 32], vec![0.0; 32]];
            let [dq, dk0, dv0, dk1, dv1] = &mut g;
            let grads = TttGrads { dq, dk0, dv0, diagonals: vec![(dk1, dv1)] };
            ttt_attention_grad(threads, SHAPE, x, (&out, &lse), &dout, grads);
            (out, g)
        };
        assert!(run(1) == run(2));
    }

    #[test]
    fn documents_do_not_see_each_other() {
        let (q, mut k, v) = (noise(1, 8 * 8), noise(2, 75 * 4), noise(3, 75 * 4));
        let run = |k: &[f32]| {
            let (mut out, mut lse) = (vec![0.0; 64], vec![0.0; 16]);
            ttt_attention(1, SHAPE, TttInputs { q: &q, k0: k, v0: &v, diagonals: &[] }, &mut out, &mut lse);
            out
        };
        let before = run(&k);
        k[..70 * 4].iter_mut().for_each(|k| *k += 1.0);
        k[..4].iter_mut().for_each(|k| *k -= 3.0);
        let after = run(&k);
        assert_eq!(before[5 * 8..], after[5 * 8..]);
        assert_ne!(before[..5 * 8], after[..5 * 8]);
    }
}
