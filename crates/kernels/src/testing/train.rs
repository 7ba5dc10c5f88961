//! Checks of [`TrainKernels`].
//!
//! Shape legend: `R` rows, `S` slots, `N` rows with a loss, `M` teacher rows, `V`/`Vd` target/draft vocabulary.

mod block;
mod widths;

pub use block::{cells, spans, token_loss};
pub use widths::head_widths;

use super::{CLAMPED, close, directional, host, noise, wide};
use crate::reference::gated;
use crate::train::{
    AdamStep, AttentionMask, Columns, DocSpan, LinearShape, Rotation, SoftLoss, SoftScale, SoftSums, Teacher,
    TttShape,
};
use crate::{Activation, RopeScaling, RopeTable, TrainKernels};

/// Everything below.
pub fn all<K: TrainKernels>(k: &K, rounding: f64) {
    linear(k, rounding);
    norm(k, rounding);
    rotation(k, rounding);
    gating(k, rounding);
    copies(k);
    attention(k, rounding);
    spans(k, rounding);
    loss(k, rounding);
    token_loss(k, rounding);
    cells(k, rounding);
    adamw(k);
}

/// Linear layers and their gradients equal the double-precision sums.
pub fn linear<K: TrainKernels>(k: &K, rounding: f64) {
    for (rows, out, inp) in [(1, 1, 1), (7, 5, 3), (65, 33, 96), (130, 257, 64)] {
        // Errors of the operands add up in the sums.
        let tolerance = (rounding * (rows.max(out).max(inp) as f64).sqrt()).max(1e-4);
        let s = LinearShape { rows, out, inp };
        let (x, w, dy) = (noise(1, rows * inp), noise(2, out * inp), noise(3, rows * out));
        let (dx, dw) = (noise(4, rows * inp), noise(5, out * inp));
        let (bx, bw, bdy) = (k.upload(&x), k.upload(&w), k.upload(&dy));
        let (mut by, mut bdx, mut bdw) = (k.scratch(rows * out), k.upload(&dx), k.upload(&dw));
        k.linear(&bx, &bw, s, &mut by);
        k.linear_dx(&bdy, &bw, s, true, &mut bdx);
        k.linear_dw(&bdy, &bx, s, &mut bdw);
        let (y, new_dx, new_dw) =
            (host(k, &by, rows * out), host(k, &bdx, rows * inp), host(k, &bdw, out * inp));
        k.linear_dx(&bdy, &bw, s, false, &mut bdx);
        let overwritten = host(k, &bdx, rows * inp);
        let (x, w, dy) = (wide(&x), wide(&w), wide(&dy));
        for r in 0..rows {
            for o in 0..out {
                let want: f64 = (0..inp).map(|i| x[r * inp + i] * w[o * inp + i]).sum();
                close(y[r * out + o], want, tolerance);
            }
            for i in 0..inp {
                let want: f64 = (0..out).map(|o| dy[r * out + o] * w[o * inp + i]).sum();
                close(new_dx[r * inp + i], want + f64::from(dx[r * inp + i]), tolerance);
                close(overwritten[r * inp + i], want, tolerance);
            }
        }
        for o in 0..out {
            for i in 0..inp {
                let want: f64 = (0..rows).map(|r| dy[r * out + o] * x[r * inp + i]).sum();
                close(new_dw[o * inp + i], want + f64::from(dw[o * inp + i]), tolerance);
            }
        }
    }
}

/// The norm equals its formula, its gradients the difference quotients.
pub fn norm<K: TrainKernels>(k: &K, rounding: f64) {
    for (rows, width) in [(1, 2), (3, 7), (130, 40)] {
        let (x, w, dy) = (noise(1, rows * width), noise(2, width), noise(3, rows * width));
        let eps = 1e-5;
        let rows_of = |x: &[f64], w: &[f64]| -> Vec<f64> {
            x.chunks_exact(width)
                .flat_map(|x| {
                    let ms = x.iter().map(|x| x * x).sum::<f64>() / width as f64;
                    let scale = 1.0 / (ms + f64::from(eps)).sqrt();
                    x.iter().zip(w).map(move |(x, w)| x * scale * w).collect::<Vec<_>>()
                })
                .collect()
        };
        let total = |x: &[f64], w: &[f64]| -> f64 {
            rows_of(x, w).iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum()
        };
        let (bx, bw, bdy) = (k.upload(&x), k.upload(&w), k.upload(&dy));
        let mut y = k.scratch(rows * width);
        k.norm(&bx, &bw, rows, width, eps, &mut y);
        for (y, want) in host(k, &y, rows * width).iter().zip(rows_of(&wide(&x), &wide(&w))) {
            close(*y, want, rounding.max(1e-5));
        }
        let (mut dx, mut dw) = (k.upload(&vec![1.0; rows * width]), k.zeros(width));
        k.norm_grad(&bx, &bw, &bdy, (rows, width), eps, true, Some(&mut dx), Some(&mut dw));
        let mut dx = host(k, &dx, rows * width);
        dx.iter_mut().for_each(|d| *d -= 1.0);
        directional(&x, &dx, rounding.max(2e-4), |x| total(x, &wide(&w)));
        directional(&w, &host(k, &dw, width), rounding.max(2e-4), |w| total(&wide(&x), w));
    }
}

/// A rotation leaves position 0 alone, and its inverse undoes it.
pub fn rotation<K: TrainKernels>(k: &K, rounding: f64) {
    let table = RopeTable::new(8, 10_000.0, &RopeScaling::None);
    let positions = [0, 5, 77];
    let x = noise(1, 3 * 16);
    let (mut y, mut back) = (k.scratch(48), k.upload(&x));
    k.rotate(&k.upload(&x), &table, &positions, 2, Rotation::Forward, &mut y);
    let turned = host(k, &y, 48);
    for (row, position) in positions.iter().enumerate() {
        let want = crate::reference::rope(&x[row * 16..(row + 1) * 16], &table, *position);
        for (y, want) in turned[row * 16..].iter().zip(want) {
            close(*y, want, rounding.max(1e-6));
        }
    }
    k.rotate(&y, &table, &positions, 2, Rotation::InverseAdd, &mut back);
    for (b, x) in host(k, &back, 48).iter().zip(&x) {
        close(*b, 2.0 * f64::from(*x), rounding.max(1e-6));
    }
    k.rotate(&y, &table, &positions, 2, Rotation::Inverse, &mut back);
    for (b, x) in host(k, &back, 48).iter().zip(&x) {
        close(*b, f64::from(*x), rounding.max(1e-6));
    }
}

/// Gating equals its formula, its gradients the difference quotients.
pub fn gating<K: TrainKernels>(k: &K, rounding: f64) {
    let n = 70_000;
    // Difference quotients say nothing where the clamped activation has its bends.
    let smooth = |x: f32| if (x.abs() - 0.75).abs() < 1e-3 { 0.7 } else { x };
    let straight = |seed| noise(seed, n).into_iter().map(smooth).collect::<Vec<f32>>();
    let (g, u, dy) = (straight(1), straight(2), noise(3, n));
    let (bg, bu, bdy) = (k.upload(&g), k.upload(&u), k.upload(&dy));
    for activation in [Activation::Silu, Activation::GeluTanh, CLAMPED] {
        let run = |g: &[f64], u: &[f64]| -> f64 {
            g.iter().zip(u).zip(&dy).map(|((g, u), d)| gated(activation, *g, *u) * f64::from(*d)).sum()
        };
        let mut y = k.scratch(n);
        k.gate(activation, &bg, &bu, n, &mut y);
        let y = host(k, &y, n);
        for i in (0..n).step_by(997) {
            close(y[i], gated(activation, f64::from(g[i]), f64::from(u[i])), rounding.max(1e-6));
        }
        let (mut dg, mut du) = (k.scratch(n), k.scratch(n));
        k.gate_grad(activation, (&bg, &bu), &bdy, n, (&mut dg, &mut du));
        directional(&g, &host(k, &dg, n), rounding.max(2e-4), |g| run(g, &wide(&u)));
        directional(&u, &host(k, &du, n), rounding.max(2e-4), |u| run(&wide(&g), u));
    }
}

/// Copies and sums move the named rows and columns. The numbers are small integers: exact in every storage.
pub fn copies<K: TrainKernels>(k: &K) {
    let x = k.upload(&(0..12).map(|i| i as f32).collect::<Vec<_>>()); // [3, 4]
    // Longer than what is written, as buffers of a step are.
    let mut y = k.zeros(9); // [3, 2]
    let columns = |stride, from| Columns { stride, from };
    k.copy_cols((&x, columns(4, 1)), (&mut y, columns(2, 0)), 3, 2, false);
    assert_eq!(host(k, &y, 6), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    k.copy_cols((&x, columns(4, 0)), (&mut y, columns(2, 1)), 3, 1, true);
    assert_eq!(host(k, &y, 6), [1.0, 2.0, 5.0, 10.0, 9.0, 18.0]);
    let mut g = k.zeros(8);
    k.gather(&x, 4, &[0, 2], 2.0, &mut g);
    assert_eq!(host(k, &g, 8), [0.0, 2.0, 4.0, 6.0, 16.0, 18.0, 20.0, 22.0]);
    let mut s = k.zeros(12);
    k.scatter_add(&g, 4, &[0, 2], &mut s);
    k.scatter_add(&g, 4, &[0, 1], &mut s);
    assert_eq!(host(k, &s, 12), [0.0, 4.0, 8.0, 12.0, 16.0, 18.0, 20.0, 22.0, 16.0, 18.0, 20.0, 22.0]);
    let mut again = k.upload(&[1.0; 12]);
    k.gather_grad(&x, 4, &[2, 0, 2], 2.0, &mut again);
    assert_eq!(host(k, &again, 12), [9.0, 11.0, 13.0, 15.0, 1.0, 1.0, 1.0, 1.0, 17.0, 21.0, 25.0, 29.0]);
    k.gather_grad(&x, 4, &[], 2.0, &mut again);
    k.add_to(&x, 12, true, &mut s);
    assert_eq!(host(k, &s, 12)[8..], [24.0, 27.0, 30.0, 33.0]);
    k.sum(&x, &x, 5, &mut s);
    assert_eq!(host(k, &s, 5), [0.0, 2.0, 4.0, 6.0, 8.0]);
    k.add_to(&x, 3, false, &mut s);
    assert_eq!(host(k, &s, 3), [0.0, 1.0, 2.0]);
    k.write(&mut s, &[7.0, 8.0]);
    assert_eq!(host(k, &s, 2), [7.0, 8.0]);
    k.clear(&mut s, 12);
    assert_eq!(host(k, &s, 12), [0.0; 12]);
    assert_eq!(k.capacity(&s), 12);
    k.gather(&x, 4, &[], 1.0, &mut s);
    k.scatter_add(&g, 4, &[], &mut s);
}

/// A case of training-time-test attention.
struct Pack {
    docs: Vec<DocSpan>,
    slots: Vec<u32>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    diagonals: usize,
}

impl Pack {
    fn total(&self) -> usize {
        self.docs.last().expect("a pack has documents").end()
    }

    fn shape(&self) -> TttShape<'_> {
        TttShape {
            docs: &self.docs,
            slots: &self.slots,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }

    /// Dense attention over `D + 1` blocks with the published flat mask, in double precision.
    fn dense(&self, q: &[f64], k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<f64> {
        let (hd, qw, kvw) = (self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut out = vec![0.0; self.slots.len() * qw];
        for (r, slot) in self.slots.iter().enumerate() {
            let doc = self.docs.iter().find(|d| (d.start..d.start + d.len).contains(slot));
            let doc = doc.expect("every slot belongs to a document");
            for head in 0..self.heads {
                let kv = head / (self.heads / self.kv_heads);
                let mut seen = Vec::new();
                for (block, keys) in k.iter().enumerate() {
                    // Rows of block 0 are slots of the pack, rows of later blocks are query rows.
                    let of_block = if block == 0 { self.total() } else { self.slots.len() };
                    for i in 0..of_block {
                        let allowed =
                            if block == 0 { i >= doc.start as usize && i <= *slot as usize } else { i == r };
                        if allowed {
                            let z: f64 = (0..hd)
                                .map(|c| q[r * qw + head * hd + c] * keys[i * kvw + kv * hd + c])
                                .sum();
                            seen.push((z / (hd as f64).sqrt(), block, i));
                        }
                    }
                }
                let top = seen.iter().map(|s| s.0).fold(f64::MIN, f64::max);
                let sum: f64 = seen.iter().map(|s| (s.0 - top).exp()).sum();
                for (z, block, i) in seen {
                    let w = (z - top).exp() / sum;
                    for c in 0..hd {
                        out[r * qw + head * hd + c] += w * v[block][i * kvw + kv * hd + c];
                    }
                }
            }
        }
        out
    }

    #[track_caller]
    fn check<K: TrainKernels>(&self, kernels: &K, rounding: f64) {
        let (qw, kvw) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (rows, total) = (self.slots.len(), self.total());
        let q = noise(1, rows * qw).iter().map(|x| x * 2.0).collect::<Vec<_>>();
        let of_block = |seed: u64| -> Vec<Vec<f32>> {
            (0..=self.diagonals)
                .map(|b| noise(seed + b as u64, if b == 0 { total } else { rows } * kvw))
                .collect()
        };
        let (k, v, dout) = (of_block(20), of_block(40), noise(3, rows * qw));
        let upload = |blocks: &[Vec<f32>]| blocks.iter().map(|b| kernels.upload(b)).collect::<Vec<_>>();
        let (bq, bk, bv, bdout) = (kernels.upload(&q), upload(&k), upload(&v), kernels.upload(&dout));
        let diagonals: Vec<_> = (1..=self.diagonals).map(|b| (&bk[b], &bv[b])).collect();
        let (mut out, mut lse) = (kernels.scratch(rows * qw), kernels.scratch(rows * self.heads));
        let mask = AttentionMask::Ttt(self.shape());
        kernels.attention(mask, &bq, (&bk[0], &bv[0]), &diagonals, &mut out, &mut lse);
        let wide_all = |blocks: &[Vec<f32>]| blocks.iter().map(|b| wide(b)).collect::<Vec<_>>();
        let (wk, wv) = (wide_all(&k), wide_all(&v));
        let found = host(kernels, &out, rows * qw);
        for (found, wanted) in found.iter().zip(self.dense(&wide(&q), &wk, &wv)) {
            close(*found, wanted, rounding.max(2e-6));
        }
        // Gradients are added to what is there: little, so that a coarse storage does not lose them in it.
        const THERE: f32 = 0.125;
        let some = |b: &Vec<f32>| kernels.upload(&vec![THERE; b.len()]);
        let mut dq = some(&q);
        let mut dk: Vec<_> = k.iter().map(some).collect();
        let mut dv: Vec<_> = v.iter().map(some).collect();
        let (dk0, dks) = dk.split_first_mut().expect("block 0");
        let (dv0, dvs) = dv.split_first_mut().expect("block 0");
        kernels.attention_grad(
            mask,
            &bq,
            (&bk[0], &bv[0]),
            &diagonals,
            (&out, &lse),
            &bdout,
            &mut dq,
            (dk0, dv0),
            dks.iter_mut().zip(dvs).collect(),
        );
        let added = |buf: &K::Buf, len: usize| {
            let mut values = host(kernels, buf, len);
            values.iter_mut().for_each(|x| *x -= THERE);
            values
        };
        let total_of = |q: &[f64], k: &[Vec<f64>], v: &[Vec<f64>]| -> f64 {
            self.dense(q, k, v).iter().zip(&dout).map(|(o, d)| o * f64::from(*d)).sum()
        };
        let tolerance = rounding.max(1e-4);
        directional(&q, &added(&dq, q.len()), tolerance, |q| total_of(q, &wk, &wv));
        for (block, (k_block, v_block)) in k.iter().zip(&v).enumerate() {
            let with = |all: &[Vec<f64>], x: &[f64]| {
                let mut all = all.to_vec();
                all[block] = x.to_vec();
                all
            };
            let (dk, dv) = (added(&dk[block], k_block.len()), added(&dv[block], v_block.len()));
            directional(k_block, &dk, tolerance, |x| total_of(&wide(&q), &with(&wk, x), &wv));
            directional(v_block, &dv, tolerance, |x| total_of(&wide(&q), &wk, &with(&wv, x)));
        }
    }
}

/// Merged attention equals the dense mask, its gradients the difference quotients.
pub fn attention<K: TrainKernels>(k: &K, rounding: f64) {
    let doc = |start, len| DocSpan { start, len };
    let small = |heads, kv_heads, head_dim, len, diagonals| Pack {
        docs: vec![doc(0, len)],
        slots: (0..len).collect(),
        heads,
        kv_heads,
        head_dim,
        diagonals,
    };
    // One key has all the weight: its gradient is zero, which rounding has no share of.
    if rounding == 0.0 {
        small(1, 1, 2, 1, 0).check(k, rounding);
    }
    small(4, 2, 6, 9, 0).check(k, rounding);
    small(4, 2, 6, 9, 2).check(k, rounding);
    let docs = vec![doc(0, 70), doc(70, 3), doc(80, 90)];
    let slots = (10..69).chain(85..169).collect();
    Pack { docs, slots, heads: 3, kv_heads: 1, head_dim: 8, diagonals: 3 }.check(k, rounding);
}

/// A case of the fused head and loss.
struct Head {
    rows: usize,
    vocab: usize,
    width: usize,
    full: usize,
}

impl Head {
    /// Loss and sums in double precision.
    #[allow(clippy::too_many_arguments, reason = "the operands of one formula")]
    fn plain(
        &self,
        hidden: &[f64],
        head: &[f64],
        p: &[f32],
        t: &Teacher<()>,
        rows: &[u32],
        (loss, scale): (SoftLoss, SoftScale),
        w: f64,
    ) -> (f64, SoftSums) {
        let (mut total, mut sums) =
            (0.0, SoftSums { rows: self.rows as u64, kl_weight: w, ..SoftSums::default() });
        for n in 0..self.rows {
            let z = logits(&hidden[n * self.width..(n + 1) * self.width], head, self.width);
            let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
            let m = rows[n] as usize;
            let (mut kl, mut alpha) = (0.0, 0.0f64);
            for (j, z) in z.iter().enumerate() {
                let p = f64::from(p[m * self.vocab + j]);
                kl -= p * (z - lse);
                alpha += (z - lse).exp().min(p * f64::from(t.mass[m]));
            }
            sums.correct += u64::from(largest(&z) == t.labels[m] as usize);
            sums.kl += kl;
            sums.alpha += alpha;
            sums.neg_log_alpha -= alpha.ln();
            total += match loss {
                SoftLoss::Kl => f64::from(scale.kl) * kl,
                SoftLoss::LkAlpha => -f64::from(scale.alpha) * alpha.ln(),
                SoftLoss::LkLambda { .. } => {
                    w * f64::from(scale.kl) * kl + (1.0 - w) * f64::from(scale.alpha) * (1.0 - alpha)
                }
            };
        }
        (total, sums)
    }

    /// The teacher, checked against double precision.
    #[track_caller]
    fn teacher<K: TrainKernels>(&self, k: &K, rounding: f64) -> Teacher<K::Buf> {
        let m = self.rows + 2;
        let (x, full) = (noise(5, m * self.width), noise(6, self.full * self.width));
        let ids: Vec<usize> = (0..self.vocab).map(|j| j * self.full / self.vocab).collect();
        let draft: Vec<f32> =
            ids.iter().flat_map(|i| full[i * self.width..(i + 1) * self.width].to_vec()).collect();
        let shape = LinearShape { rows: m, out: self.full, inp: self.width };
        let (bx, bfull) = (k.upload(&x), k.upload(&full));
        let (argmax, lse) = k.stream_head(&bx, &bfull, shape);
        let mut p = k.scratch(m * self.vocab);
        let shape = LinearShape { rows: m, out: self.vocab, inp: self.width };
        let mass = k.soft_targets(&bx, &k.upload(&draft), shape, &lse, &mut p);
        let found = host(k, &p, m * self.vocab);
        for r in 0..m {
            let z = logits(&wide(&x[r * self.width..(r + 1) * self.width]), &wide(&full), self.width);
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            close(lse[r], sum.ln(), rounding.max(1e-6));
            // Rounding may swap the order of near equals.
            assert!(z[largest(&z)] - z[argmax[r] as usize] <= 10.0 * rounding, "row {r}");
            let covered: f64 = ids.iter().map(|i| z[*i].exp()).sum();
            close(mass[r], covered / sum, rounding.max(2e-6));
            for (j, i) in ids.iter().enumerate() {
                close(found[r * self.vocab + j], z[*i].exp() / covered, rounding.max(2e-6));
            }
        }
        Teacher { p, mass, labels: (0..m).map(|r| (r % self.vocab) as u32).collect() }
    }

    #[track_caller]
    fn check<K: TrainKernels>(&self, k: &K, loss: SoftLoss, rounding: f64) {
        let t = self.teacher(k, rounding);
        let m = t.mass.len();
        let p = host(k, &t.p, m * self.vocab);
        let on_host = Teacher { p: (), mass: t.mass.clone(), labels: t.labels.clone() };
        let rows: Vec<u32> = (0..self.rows as u32).map(|r| (r * 7 + 1) % m as u32).collect();
        let scale = SoftScale { kl: 0.7, alpha: 1.3 };
        let (hidden, head) = (noise(1, self.rows * self.width), noise(2, self.vocab * self.width));
        let shape = LinearShape { rows: self.rows, out: self.vocab, inp: self.width };
        let (bhidden, bhead) = (k.upload(&hidden), k.upload(&head));
        let (mut dhidden, mut dhead) =
            (k.upload(&vec![f32::NAN; hidden.len()]), k.upload(&vec![0.5; head.len()]));
        let grads = Some((&mut dhidden, &mut dhead));
        let sums = k.linear_soft_ce(&bhidden, &bhead, shape, &t, &rows, loss, scale, grads).get();
        assert_eq!(k.linear_soft_ce(&bhidden, &bhead, shape, &t, &rows, loss, scale, None).get(), sums);
        let plain = |hidden: &[f64], head: &[f64]| {
            self.plain(hidden, head, &p, &on_host, &rows, (loss, scale), sums.kl_weight)
        };
        let (_, want) = plain(&wide(&hidden), &wide(&head));
        let n = self.rows as f64;
        close((sums.kl / n) as f32, want.kl / n, rounding.max(2e-6));
        close((sums.alpha / n) as f32, want.alpha / n, rounding.max(2e-6));
        close((sums.neg_log_alpha / n) as f32, want.neg_log_alpha / n, rounding.max(2e-6));
        let swapped = sums.correct.abs_diff(want.correct);
        assert!(
            swapped as f64 <= 5.0 * rounding * n,
            "{} of {n} correct, not {}",
            sums.correct,
            want.correct
        );
        if let SoftLoss::LkLambda { kl_scale, kl_decay } = loss {
            let weight = f64::from(kl_scale) * (-f64::from(kl_decay) * want.alpha / n).exp();
            close(sums.kl_weight as f32, weight, rounding.max(1e-6));
        }
        let mut dhead = host(k, &dhead, head.len());
        dhead.iter_mut().for_each(|d| *d -= 0.5);
        let tolerance = rounding.max(5e-4);
        directional(&hidden, &host(k, &dhidden, hidden.len()), tolerance, |h| plain(h, &wide(&head)).0);
        directional(&head, &dhead, tolerance, |h| plain(&wide(&hidden), h).0);
    }
}

/// `x · headᵀ` of one row.
fn logits(x: &[f64], head: &[f64], width: usize) -> Vec<f64> {
    head.chunks_exact(width).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn largest(z: &[f64]) -> usize {
    (0..z.len()).fold(0, |best, i| if z[i] > z[best] { i } else { best })
}

/// Teacher, fused head and loss equal the plain formulas, their gradients the difference quotients.
pub fn loss<K: TrainKernels>(k: &K, rounding: f64) {
    for loss in [SoftLoss::Kl, SoftLoss::LkAlpha, SoftLoss::LkLambda { kl_scale: 1.0, kl_decay: 3.0 }] {
        Head { rows: 1, vocab: 3, width: 2, full: 5 }.check(k, loss, rounding);
        Head { rows: 13, vocab: 37, width: 8, full: 101 }.check(k, loss, rounding);
    }
    // More rows and words than the CPU implementation takes at once.
    Head { rows: 521, vocab: 21, width: 4, full: 2098 }.check(k, SoftLoss::Kl, rounding);
    no_rows(k);
}

/// No rows have no loss and no gradient.
fn no_rows<K: TrainKernels>(k: &K) {
    let (hidden, head) = (k.upload(&[]), k.upload(&[1.0, 1.0]));
    let teacher = Teacher { p: k.upload(&[]), mass: Vec::new(), labels: Vec::new() };
    let (mut dhidden, mut dhead) = (k.upload(&[]), k.upload(&[1.0, 2.0]));
    let shape = LinearShape { rows: 0, out: 2, inp: 1 };
    let scale = SoftScale { kl: 1.0, alpha: 1.0 };
    let loss = SoftLoss::LkLambda { kl_scale: 1.0, kl_decay: 1.0 };
    let grads = Some((&mut dhidden, &mut dhead));
    let sums = k.linear_soft_ce(&hidden, &head, shape, &teacher, &[], loss, scale, grads).get();
    assert_eq!((sums.rows, sums.kl, host(k, &dhead, 2)), (0, 0.0, vec![1.0, 2.0]));
}

/// AdamW follows the textbook for three steps; sums of squares are right. Both work on masters: f32 in every storage. Slices of
/// a parameter come out as the whole does, bit for bit.
pub fn adamw<K: TrainKernels>(k: &K) {
    let n = 40_000;
    let start = noise(1, n);
    let (mut w, mut m, mut v) = (k.upload(&start), k.zeros(n), k.zeros(n));
    let mut plain: Vec<(f64, f64, f64)> = start.iter().map(|w| (f64::from(*w), 0.0, 0.0)).collect();
    for step in 1..=3u64 {
        let g = noise(10 + step, n);
        let s = AdamStep {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            grad_scale: 0.5,
            step,
        };
        k.adamw(s, n, &mut w, &k.upload(&g), (&mut m, &mut v));
        for ((w, m, v), g) in plain.iter_mut().zip(&g) {
            let g = f64::from(*g) * 0.5;
            *w *= 1.0 - 0.01 * 0.1;
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            let (mh, vh) = (*m / (1.0 - 0.9f64.powi(step as i32)), *v / (1.0 - 0.999f64.powi(step as i32)));
            *w -= 0.01 * mh / (vh.sqrt() + 1e-8);
        }
    }
    for (w, p) in host(k, &w, n).iter().zip(&plain) {
        close(*w, p.0, 1e-6);
    }
    let x = noise(1, 100_003);
    let want: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((k.sum_squares(&k.upload(&x), x.len()) - want).abs() < 1e-3);
    adamw_slices(k);
}

fn adamw_slices<K: TrainKernels>(k: &K) {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let n = 5 * K::SQUARES / 2 + 77;
    let [w, g, m] = [1, 2, 3].map(|seed| noise(seed, n));
    let v: Vec<f32> = noise(4, n).iter().map(|v| v * v).collect();
    let s = AdamStep {
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        grad_scale: 0.3,
        step: 7,
    };
    let step = |of: std::ops::Range<usize>| {
        let up = |values: &[f32]| k.upload(&values[of.clone()]);
        let (mut w, mut m, mut v, g) = (up(&w), up(&m), up(&v), up(&g));
        k.adamw(s, of.len(), &mut w, &g, (&mut m, &mut v));
        [&w, &m, &v].map(|buf| bits(&host(k, buf, of.len())))
    };
    let whole = step(0..n);
    for slice in [0..K::SQUARES, K::SQUARES..2 * K::SQUARES, 2 * K::SQUARES..n, 5..n - 3] {
        let found = step(slice.clone());
        assert!(found.iter().zip(&whole).all(|(a, b)| *a == b[slice.clone()]), "adamw of {slice:?}");
    }
    let all = k.upload(&g);
    let sums = k.square_sums(&[(&all, n), (&all, K::SQUARES), (&k.upload(&[]), 0)]);
    assert_eq!(sums.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 0]);
    assert_eq!(sums[1][0].to_bits(), sums[0][0].to_bits());
    for (block, sum) in sums[0].iter().enumerate() {
        let from = block * K::SQUARES;
        let part = &g[from..n.min(from + K::SQUARES)];
        let found = k.square_sums(&[(&k.upload(part), part.len())]);
        assert_eq!(
            found[0].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            [sum.to_bits()],
            "block {block}"
        );
        // And with others behind it.
        let rest = k.square_sums(&[(&k.upload(&g[from..]), n - from)]);
        assert_eq!(rest[0][0].to_bits(), sum.to_bits(), "from block {block} on");
    }
    assert_eq!(k.sum_squares(&all, n).to_bits(), sums[0].iter().sum::<f64>().to_bits());
}
