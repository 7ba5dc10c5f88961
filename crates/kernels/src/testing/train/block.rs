//! Checks of what drafts that propose blocks need of [`TrainKernels`].
//!
//! Shape legend: `R` query rows, `C` context slots, `B` own rows, `N` rows with a loss, `V` vocabulary.

use super::super::{close, directional, host, noise, wide};
use super::{largest, logits};
use crate::train::{
    AttentionMask, LogitPart, NO_LABEL, Sight, Span, SpanShape, TokenRow, TokenTargets, TokenTeacher,
};
use crate::{Cell, TrainKernels, cell};

/// A case of attention under spans.
struct Spans {
    sights: Vec<Sight>,
    /// `C`, `B`
    keys: (usize, usize),
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// Replaces one of the operands.
type Set<'a> = &'a dyn Fn(&mut Operands<Vec<f64>>, Vec<f64>);

/// Every value of the operands: queries, keys and values of context and rows.
struct Operands<T> {
    q: T,
    kc: T,
    vc: T,
    ko: T,
    vo: T,
}

impl Spans {
    fn shape(&self) -> SpanShape<'_> {
        SpanShape {
            sights: &self.sights,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }

    /// Dense attention over context and rows in double precision.
    fn dense(&self, x: &Operands<Vec<f64>>) -> Vec<f64> {
        let (hd, qw, kvw) = (self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut out = vec![0.0; self.sights.len() * qw];
        for (r, sight) in self.sights.iter().enumerate() {
            for head in 0..self.heads {
                let kv = head / (self.heads / self.kv_heads);
                let of = |keys: &[f64], i: usize| -> f64 {
                    let at = |c: usize| x.q[r * qw + head * hd + c] * keys[i * kvw + kv * hd + c];
                    (0..hd).map(at).sum::<f64>() / (hd as f64).sqrt()
                };
                let context =
                    (sight.context.from..sight.context.to).map(|i| (of(&x.kc, i as usize), &x.vc, i));
                let own = (sight.own.from..sight.own.to).map(|i| (of(&x.ko, i as usize), &x.vo, i));
                let seen: Vec<(f64, &Vec<f64>, u32)> = context.chain(own).collect();
                let top = seen.iter().map(|s| s.0).fold(f64::MIN, f64::max);
                let sum: f64 = seen.iter().map(|s| (s.0 - top).exp()).sum();
                for (z, v, i) in seen {
                    let w = (z - top).exp() / sum;
                    for c in 0..hd {
                        out[r * qw + head * hd + c] += w * v[i as usize * kvw + kv * hd + c];
                    }
                }
            }
        }
        out
    }

    #[track_caller]
    fn check<K: TrainKernels>(&self, k: &K, rounding: f64) {
        let (qw, kvw) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let rows = self.sights.len();
        let q: Vec<f32> = noise(1, rows * qw).iter().map(|x| x * 2.0).collect();
        let (kc, vc) = (noise(2, self.keys.0 * kvw), noise(3, self.keys.0 * kvw));
        let (ko, vo) = (noise(4, self.keys.1 * kvw), noise(5, self.keys.1 * kvw));
        let dout = noise(6, rows * qw);
        let up = |x: &Vec<f32>| k.upload(x);
        let b = Operands { q: up(&q), kc: up(&kc), vc: up(&vc), ko: up(&ko), vo: up(&vo) };
        let mask = AttentionMask::Spans(self.shape());
        let (mut out, mut lse) = (k.scratch(rows * qw), k.scratch(rows * self.heads));
        k.attention(mask, &b.q, (&b.kc, &b.vc), &[(&b.ko, &b.vo)], &mut out, &mut lse);
        let wide_all =
            || Operands { q: wide(&q), kc: wide(&kc), vc: wide(&vc), ko: wide(&ko), vo: wide(&vo) };
        for (found, wanted) in host(k, &out, rows * qw).iter().zip(self.dense(&wide_all())) {
            close(*found, wanted, rounding.max(2e-6));
        }
        const THERE: f32 = 0.125;
        let some = |x: &Vec<f32>| k.upload(&vec![THERE; x.len()]);
        let mut g = Operands { q: some(&q), kc: some(&kc), vc: some(&vc), ko: some(&ko), vo: some(&vo) };
        k.attention_grad(
            mask,
            &b.q,
            (&b.kc, &b.vc),
            &[(&b.ko, &b.vo)],
            (&out, &lse),
            &k.upload(&dout),
            &mut g.q,
            (&mut g.kc, &mut g.vc),
            vec![(&mut g.ko, &mut g.vo)],
        );
        let total = |x: &Operands<Vec<f64>>| -> f64 {
            self.dense(x).iter().zip(&dout).map(|(o, d)| o * f64::from(*d)).sum()
        };
        let tolerance = rounding.max(1e-4);
        let against = |at: &Vec<f32>, grad: &K::Buf, set: Set<'_>| {
            let mut grad = host(k, grad, at.len());
            grad.iter_mut().for_each(|x| *x -= THERE);
            directional(at, &grad, tolerance, |moved| {
                let mut x = wide_all();
                set(&mut x, moved.to_vec());
                total(&x)
            });
        };
        against(&q, &g.q, &|x, v| x.q = v);
        against(&kc, &g.kc, &|x, v| x.kc = v);
        against(&vc, &g.vc, &|x, v| x.vc = v);
        against(&ko, &g.ko, &|x, v| x.ko = v);
        against(&vo, &g.vo, &|x, v| x.vo = v);
    }
}

/// Anchored blocks in documents, with and without a window, one that sees nothing, and rollouts behind anchors equal the
/// dense mask; their gradients the difference quotients.
pub fn spans<K: TrainKernels>(k: &K, rounding: f64) {
    let mut blocks = Vec::new();
    for (start, anchor) in [(0u32, 0u32), (0, 3), (0, 9), (20, 21), (20, 33)] {
        let own = blocks.len() as u32;
        for j in 0..4 {
            // The window bounds the context alone; inside the block the rows before it are seen.
            let from = if anchor > 5 { (anchor + j).saturating_sub(4).max(start) } else { start };
            let to = if anchor > 5 { own + j + 1 } else { own + 4 };
            blocks.push(Sight { context: Span::new(from, anchor), own: Span::new(own, to) });
        }
    }
    let own = blocks.len() as u32;
    blocks.extend(
        (0..70).map(|i| Sight { context: Span::new(20, 22 + i % 13), own: Span::new(own, own + i + 1) }),
    );
    blocks.extend([Sight::default(); 2]);
    let rows = blocks.len();
    Spans { sights: blocks, keys: (40, rows), heads: 4, kv_heads: 2, head_dim: 6 }.check(k, rounding);
    // Rollouts: 9 real slots of two documents, then entries by anchor.
    let start = |slot: u32| if slot < 5 { 0 } else { 5 };
    let mut rollouts: Vec<Sight> = (0..9)
        .map(|slot| Sight { context: Span::new(start(slot), slot + 1), own: Span::default() })
        .collect();
    let mut first = 0;
    for (anchor, depths) in [(1u32, 3u32), (2, 1), (6, 2)] {
        rollouts.extend((1..=depths).map(|d| Sight {
            context: Span::new(start(anchor), anchor + 1),
            own: Span::new(first, first + d),
        }));
        first += depths;
    }
    Spans { sights: rollouts, keys: (9, first as usize), heads: 3, kv_heads: 1, head_dim: 4 }
        .check(k, rounding);
}

/// A case of the losses against tokens.
struct Tokens {
    rows: usize,
    vocab: usize,
    /// Rows of the teacher's head are a part of this many.
    full: usize,
}

const WIDTH: usize = 6;
const RANK: usize = 3;

impl Tokens {
    /// The loss and its rows in double precision.
    fn plain(
        &self,
        x: [&[f64]; 4],
        t: (&[f64], &[f64]),
        targets: &TokenTargets<'_, ()>,
        partial: bool,
    ) -> f64 {
        (0..self.rows)
            .map(|r| {
                let row = self.row(x, t, r, targets.labels[r], partial);
                let ce = if targets.labels[r] == NO_LABEL { 0.0 } else { row.0 };
                f64::from(targets.ce[r]) * ce + f64::from(targets.l1[r]) * row.1
            })
            .sum()
    }

    /// Cross-entropy, L1, and the best tokens of draft and target.
    fn row(
        &self,
        [hidden, head, state, markov]: [&[f64]; 4],
        (states, full): (&[f64], &[f64]),
        r: usize,
        label: u32,
        partial: bool,
    ) -> (f64, f64, usize, usize) {
        let mut z = logits(&hidden[r * WIDTH..(r + 1) * WIDTH], head, WIDTH);
        let more = logits(&state[r * RANK..(r + 1) * RANK], markov, RANK);
        z.iter_mut().zip(more).for_each(|(z, m)| *z += m);
        let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        let t = logits(&states[r * WIDTH..(r + 1) * WIDTH], full, WIDTH);
        let used = if partial { self.full } else { self.vocab };
        let t_lse = t[..used].iter().map(|z| z.exp()).sum::<f64>().ln();
        let mut l1 = if partial { t[self.vocab..used].iter().map(|t| (t - t_lse).exp()).sum() } else { 0.0 };
        for (z, t) in z.iter().zip(&t) {
            l1 += ((z - lse).exp() - (t - t_lse).exp()).abs();
        }
        let ce = if label == NO_LABEL { 0.0 } else { lse - z[label as usize] };
        (ce, l1, largest(&z), largest(&t[..self.vocab]))
    }

    #[track_caller]
    fn check<K: TrainKernels>(&self, k: &K, rounding: f64, partial: bool) {
        let (n, v) = (self.rows, self.vocab);
        let (hidden, head) = (noise(1, n * WIDTH), noise(2, v * WIDTH));
        let (state, markov) = (noise(3, n * RANK), noise(4, v * RANK));
        let (states, full) = (noise(5, n * WIDTH), noise(6, self.full * WIDTH));
        let labels: Vec<u32> =
            (0..n).map(|r| if r % 5 == 4 { NO_LABEL } else { (r * 7 % v) as u32 }).collect();
        let (ce, l1): (Vec<f32>, Vec<f32>) =
            (0..n).map(|r| (0.3 + r as f32 * 0.1, 0.9 - r as f32 * 0.05)).unzip();
        let (ws, wf) = (wide(&states), wide(&full));
        let lse: Vec<f32> = (0..n)
            .map(|r| {
                logits(&ws[r * WIDTH..(r + 1) * WIDTH], &wf, WIDTH).iter().map(|z| z.exp()).sum::<f64>().ln()
                    as f32
            })
            .collect();
        let up = |x: &[f32]| k.upload(x);
        let (bx, bw, bs, bm) = (up(&hidden), up(&head), up(&state), up(&markov));
        let (bt, bf) = (up(&states), up(&full[..v * WIDTH]));
        let parts = [LogitPart { x: &bx, w: &bw, inp: WIDTH }, LogitPart { x: &bs, w: &bm, inp: RANK }];
        let teacher = TokenTeacher { x: &bt, head: &bf, inp: WIDTH, lse: partial.then_some(&lse[..]) };
        let targets = TokenTargets { labels: &labels, ce: &ce, l1: &l1, teacher: Some(teacher) };
        let (mut dx, mut ds) = (up(&vec![f32::NAN; n * WIDTH]), up(&vec![f32::NAN; n * RANK]));
        let (mut dw, mut dm) = (up(&vec![0.5; v * WIDTH]), up(&vec![0.5; v * RANK]));
        let grads = vec![(&mut dx, Some(&mut dw)), (&mut ds, Some(&mut dm))];
        let found = k.linear_token_loss(&parts, (n, v), &targets, Some(grads));
        assert_eq!(k.linear_token_loss(&parts, (n, v), &targets, None), found);
        let plain_targets = TokenTargets { labels: &labels, ce: &ce, l1: &l1, teacher: None };
        let at = [wide(&hidden), wide(&head), wide(&state), wide(&markov)];
        let views = |x: &[Vec<f64>; 4]| -> f64 {
            let [a, b, c, d] = x;
            self.plain([a, b, c, d], (&ws, &wf), &plain_targets, partial)
        };
        for (r, row) in found.iter().enumerate() {
            let [a, b, c, d] = &at;
            let want = self.row([a, b, c, d], (&ws, &wf), r, labels[r], partial);
            close(row.ce, want.0, rounding.max(2e-6));
            close(row.l1, want.1, rounding.max(4e-6));
            if rounding == 0.0 {
                assert_eq!((row.top as usize, row.teacher_top as usize), (want.2, want.3), "row {r}");
            }
        }
        let tolerance = rounding.max(5e-4) * if rounding > 0.0 { 4.0 } else { 1.0 };
        let check = |i: usize, values: &[f32], grad: &K::Buf, there: f32| {
            let mut grad = host(k, grad, values.len());
            grad.iter_mut().for_each(|x| *x -= there);
            directional(values, &grad, tolerance, |moved| {
                let mut x = at.clone();
                x[i] = moved.to_vec();
                views(&x)
            });
        };
        check(0, &hidden, &dx, 0.0);
        check(1, &head, &dw, 0.5);
        check(2, &state, &ds, 0.0);
        check(3, &markov, &dm, 0.5);
        // Without a teacher, and a head that is not trained.
        let targets = TokenTargets { labels: &labels, ce: &ce, l1: &l1, teacher: None };
        let alone = [LogitPart { x: &bx, w: &bw, inp: WIDTH }];
        let rows = k.linear_token_loss(&alone, (n, v), &targets, Some(vec![(&mut dx, None)]));
        assert!(rows.iter().all(|r| r.l1 == 0.0));
        let no_l1 = vec![0.0; n];
        let plain_targets = TokenTargets { labels: &labels, ce: &ce, l1: &no_l1, teacher: None };
        directional(&hidden, &host(k, &dx, n * WIDTH), tolerance, |h| {
            let nothing = vec![0.0; n * RANK];
            self.plain([h, &at[1], &nothing, &at[3]], (&ws, &wf), &plain_targets, partial)
        });
    }
}

/// Losses against tokens equal the plain formulas, their gradients the difference quotients.
pub fn token_loss<K: TrainKernels>(k: &K, rounding: f64) {
    Tokens { rows: 1, vocab: 3, full: 3 }.check(k, rounding, false);
    Tokens { rows: 13, vocab: 37, full: 37 }.check(k, rounding, false);
    Tokens { rows: 13, vocab: 37, full: 61 }.check(k, rounding, true);
    let nothing = k.upload(&[]);
    let one = k.upload(&[1.0]);
    let parts = [LogitPart { x: &nothing, w: &one, inp: 1 }];
    let targets = TokenTargets { labels: &[], ce: &[], l1: &[], teacher: None };
    assert_eq!(k.linear_token_loss(&parts, (0, 1), &targets, None), Vec::<TokenRow>::new());
}

/// Gates equal their formulas, their gradients the difference quotients.
pub fn cells<K: TrainKernels>(k: &K, rounding: f64) {
    let (rows, width) = (5, 3);
    for kind in [Cell::Gate, Cell::Recurrent] {
        let (wide_in, wide_out) = (kind.input_width(width), kind.output_width(width));
        let (a, b) = (noise(1, rows * wide_in), noise(2, rows * width));
        let dy = noise(3, rows * wide_out);
        let (ba, bb) = (k.upload(&a), k.upload(&b));
        let mut y = k.scratch(rows * wide_out);
        k.gate_cell(kind, (&ba, &bb), (rows, width), &mut y);
        let plain = |a: &[f64], b: &[f64]| -> Vec<f64> {
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let mut y = vec![0.0; rows * wide_out];
            for r in 0..rows {
                for i in 0..width {
                    let (at, state) = (|n: usize| a[r * wide_in + n * width + i], b[r * width + i]);
                    match kind {
                        Cell::Gate => y[r * width + i] = sigmoid(at(0)) * state,
                        Cell::Recurrent => {
                            y[r * wide_out + i] =
                                sigmoid(at(0)) * state + (1.0 - sigmoid(at(0))) * at(1).tanh();
                            y[r * wide_out + width + i] = at(2).tanh();
                        }
                    }
                }
            }
            y
        };
        for (y, want) in host(k, &y, rows * wide_out).iter().zip(plain(&wide(&a), &wide(&b))) {
            close(*y, want, rounding.max(1e-6));
        }
        let mut on_host = vec![0.0; rows * wide_out];
        cell::forward(kind, (&a, &b), rows, width, &mut on_host);
        for (y, want) in host(k, &y, rows * wide_out).iter().zip(on_host) {
            close(*y, f64::from(want), rounding.max(1e-6));
        }
        let (mut da, mut db) = (k.scratch(rows * wide_in), k.scratch(rows * width));
        k.cell_grad(kind, (&ba, &bb), &k.upload(&dy), (rows, width), (&mut da, &mut db));
        let total = |a: &[f64], b: &[f64]| -> f64 {
            plain(a, b).iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum()
        };
        let tolerance = rounding.max(1e-4);
        directional(&a, &host(k, &da, rows * wide_in), tolerance, |a| total(a, &wide(&b)));
        directional(&b, &host(k, &db, rows * width), tolerance, |b| total(&wide(&a), b));
    }
}
