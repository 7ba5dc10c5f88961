//! Attention of drafts that propose blocks: every query row sees a span of the context and a span of its own rows.
//!
//! An anchored block sees the context strictly before its anchor and itself; a rollout sees the context up to its anchor
//! and the entries before it. What is allowed is two spans per row ([`Sight`]), so no mask of rows by keys exists
//! anywhere. Rows are taken in tiles; a tile holds the logits of its rows against the union of their spans.
//!
//! Shape legend: `R` query rows, `C` context slots, `B` own rows, `nh`/`nkv` query/key heads, `hd` head width.

use gemm::Parallelism;

use super::linear::Product;
use super::par::{Shared, dot, exp, exp_shifted, max, par_ranges, simd, with_scratch};

/// Query rows of one tile.
const TILE: usize = 64;

/// Places `from..to`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First place.
    pub from: u32,
    /// The place behind the last.
    pub to: u32,
}

impl Span {
    /// Places from the first to before the last; nothing if they are the wrong way round.
    pub fn new(from: u32, to: u32) -> Span {
        if from < to { Span { from, to } } else { Span::default() }
    }

    /// No places.
    pub fn is_empty(self) -> bool {
        self.from >= self.to
    }

    /// Number of places.
    pub fn len(self) -> usize {
        (self.to.saturating_sub(self.from)) as usize
    }

    /// The smallest span over both.
    fn join(self, other: Span) -> Span {
        match (self.is_empty(), other.is_empty()) {
            (_, true) => self,
            (true, _) => other,
            _ => Span { from: self.from.min(other.from), to: self.to.max(other.to) },
        }
    }

    fn meets(self, other: Span) -> bool {
        self.is_empty() || other.is_empty() || self.from < other.to && other.from < self.to
    }

    /// This span counted from the beginning of a larger one.
    pub fn inside(self, outer: Span) -> Span {
        if self.is_empty() {
            return Span::default();
        }
        Span { from: self.from - outer.from, to: self.to - outer.from }
    }
}

/// What one query row sees. A row that sees nothing mixes to zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Slots of the context.
    pub context: Span,
    /// Own rows.
    pub own: Span,
}

/// Who sees what, and the head layout.
#[derive(Clone, Copy, Debug)]
pub struct SpanShape<'a> {
    /// `[R]`
    pub sights: &'a [Sight],
    /// `nh`
    pub heads: usize,
    /// `nkv`
    pub kv_heads: usize,
    /// `hd`
    pub head_dim: usize,
    /// Logit scale.
    pub scale: f32,
}

/// Rows that are computed together, and the union of what they see.
#[derive(Clone, Copy, Debug)]
pub struct SpanTile {
    /// First query row.
    pub first: usize,
    /// Query rows.
    pub rows: usize,
    /// Slots of the context.
    pub context: Span,
    /// Own rows.
    pub own: Span,
}

impl SpanTile {
    /// Keys of the tile: those of the context, then the own ones.
    pub fn keys(&self) -> usize {
        self.context.len() + self.own.len()
    }
}

impl SpanShape<'_> {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Cuts the rows into tiles of at most `most` rows. A row that sees nothing that the rows before it see begins a new
    /// one: documents do not pay for each other.
    pub fn tiles(&self, most: usize) -> Vec<SpanTile> {
        let mut tiles: Vec<SpanTile> = Vec::new();
        for (row, sight) in self.sights.iter().enumerate() {
            match tiles.last_mut() {
                Some(t) if t.rows < most && t.context.meets(sight.context) => {
                    t.rows += 1;
                    t.context = t.context.join(sight.context);
                    t.own = t.own.join(sight.own);
                }
                _ => tiles.push(SpanTile { first: row, rows: 1, context: sight.context, own: sight.own }),
            }
        }
        tiles
    }

    /// Checks that every span lies inside its keys.
    ///
    /// # Panics
    /// If one does not.
    pub fn check(&self, context: usize, own: usize) {
        for sight in self.sights {
            assert!(
                sight.context.is_empty() || sight.context.to as usize <= context,
                "context inside its slots"
            );
            assert!(sight.own.is_empty() || sight.own.to as usize <= own, "own rows are there");
        }
    }
}

/// Rotated queries, keys and values.
#[derive(Clone, Copy)]
pub struct SpanInputs<'a> {
    /// `[R, nh hd]`
    pub q: &'a [f32],
    /// `[C, nkv hd]` keys and values of the context.
    pub context: (&'a [f32], &'a [f32]),
    /// `[B, nkv hd]` own keys and values.
    pub own: (&'a [f32], &'a [f32]),
}

/// Gradients, all added to.
pub struct SpanGrads<'a> {
    /// `[R, nh hd]`
    pub dq: &'a mut [f32],
    /// `[C, nkv hd]` twice
    pub context: (&'a mut [f32], &'a mut [f32]),
    /// `[B, nkv hd]` twice
    pub own: (&'a mut [f32], &'a mut [f32]),
}

/// `out[rows, keys] = a[rows, hd] · b[keys, hd]ᵀ` of one head into a panel `stride` wide.
struct Strip {
    rows: usize,
    keys: usize,
    stride: usize,
}

impl Strip {
    /// Products of query-like rows with key-like rows.
    fn against(&self, hd: usize, (a, aw): (&[f32], usize), (b, bw): (&[f32], usize), panel: &mut [f32]) {
        if self.keys == 0 {
            return;
        }
        let product = Product {
            m: self.rows,
            n: self.keys,
            k: hd,
            dst: (self.stride as isize, 1),
            lhs: (aw as isize, 1),
            rhs: (1, bw as isize),
            accumulate: false,
        };
        assert!(
            a.len() >= (self.rows - 1) * aw + hd && b.len() >= (self.keys - 1) * bw + hd,
            "complete operands"
        );
        assert!(panel.len() >= (self.rows - 1) * self.stride + self.keys, "panel holds the strip");
        // SAFETY: bounds checked just above.
        unsafe { product.run(panel.as_mut_ptr(), a.as_ptr(), b.as_ptr(), Parallelism::None) };
    }

    /// `dst[rows, hd] (+)= panel · b`; `dst` is `dw` wide.
    ///
    /// # Safety
    /// `dst` is valid for the rows, and nobody else writes them.
    unsafe fn mix(
        &self,
        hd: usize,
        panel: &[f32],
        (b, bw): (&[f32], usize),
        (dst, dw): (*mut f32, usize),
        accumulate: bool,
    ) {
        if self.keys == 0 {
            return;
        }
        let product = Product {
            m: self.rows,
            n: hd,
            k: self.keys,
            dst: (dw as isize, 1),
            lhs: (self.stride as isize, 1),
            rhs: (bw as isize, 1),
            accumulate,
        };
        assert!(b.len() >= (self.keys - 1) * bw + hd, "complete keys");
        assert!(panel.len() >= (self.rows - 1) * self.stride + self.keys, "panel holds the strip");
        // SAFETY: bounds checked just above; `dst` is the caller's promise.
        unsafe { product.run(dst, panel.as_ptr(), b.as_ptr(), Parallelism::None) };
    }

    /// `dst[keys, hd] += panelᵀ · a`.
    fn collect(&self, hd: usize, panel: &[f32], (a, aw): (&[f32], usize), dst: &mut [f32]) {
        if self.keys == 0 {
            return;
        }
        let product = Product {
            m: self.keys,
            n: hd,
            k: self.rows,
            dst: (hd as isize, 1),
            lhs: (1, self.stride as isize),
            rhs: (aw as isize, 1),
            accumulate: true,
        };
        assert!(a.len() >= (self.rows - 1) * aw + hd && dst.len() >= self.keys * hd, "complete operands");
        assert!(panel.len() >= (self.rows - 1) * self.stride + self.keys, "panel holds the strip");
        // SAFETY: bounds checked just above.
        unsafe { product.run(dst.as_mut_ptr(), panel.as_ptr(), a.as_ptr(), Parallelism::None) };
    }
}

/// The two strips of a tile: context and own.
fn strips(t: &SpanTile) -> [Strip; 2] {
    let stride = t.keys();
    [t.context, t.own].map(|span| Strip { rows: t.rows, keys: span.len(), stride })
}

/// Where the spans of a row lie in the panel of its tile.
fn places(t: &SpanTile, sight: Sight) -> [std::ops::Range<usize>; 2] {
    let (context, own, split) = (sight.context.inside(t.context), sight.own.inside(t.own), t.context.len());
    [context.from as usize..context.to as usize, split + own.from as usize..split + own.to as usize]
}

/// Zeros what a row does not see.
fn hide(line: &mut [f32], [a, b]: &[std::ops::Range<usize>; 2], split: usize) {
    line[..a.start].fill(0.0);
    line[a.end..split].fill(0.0);
    line[split..b.start].fill(0.0);
    line[b.end..].fill(0.0);
}

/// `out[R, nh hd]` and `lse[R, nh]`, the log-sum-exp of all logits of a row.
pub fn span_attention(
    threads: usize,
    shape: SpanShape<'_>,
    x: SpanInputs<'_>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let rows = shape.sights.len();
    assert!(x.q.len() >= rows * qw, "complete queries");
    shape.check(x.context.0.len().min(x.context.1.len()) / kvw, x.own.0.len().min(x.own.1.len()) / kvw);
    let tiles = shape.tiles(TILE);
    let (out, lse) = (Shared::new(&mut out[..rows * qw]), Shared::new(&mut lse[..rows * shape.heads]));
    par_ranges(threads, tiles.len() * shape.heads, 1, |r| {
        for task in r {
            let (t, head) = (&tiles[task / shape.heads], task % shape.heads);
            let kv = head / (shape.heads / shape.kv_heads);
            let (keys, split) = (t.keys(), t.context.len());
            let [context, own] = strips(t);
            let at = |span: Span| span.from as usize * kvw + kv * hd;
            with_scratch(t.rows * keys, |panel| {
                let q = &x.q[t.first * qw + head * hd..];
                context.against(
                    hd,
                    (q, qw),
                    (&x.context.0[at(t.context).min(x.context.0.len())..], kvw),
                    panel,
                );
                let rest = split.min(panel.len());
                own.against(hd, (q, qw), (&x.own.0[at(t.own).min(x.own.0.len())..], kvw), &mut panel[rest..]);
                let mut sums = [0.0f32; TILE];
                for (i, row_sum) in sums[..t.rows].iter_mut().enumerate() {
                    let row = t.first + i;
                    let line = &mut panel[i * keys..(i + 1) * keys];
                    let seen = places(t, shape.sights[row]);
                    let (shift, sum) = simd(
                        #[inline(always)]
                        || {
                            let mut shift = f32::NEG_INFINITY;
                            for part in &seen {
                                let part = &mut line[part.clone()];
                                part.iter_mut().for_each(|z| *z *= shape.scale);
                                shift = shift.max(max(part));
                            }
                            hide(line, &seen, split);
                            let mut sum = 0.0;
                            for part in &seen {
                                sum += exp_shifted(&mut line[part.clone()], shift);
                            }
                            (shift, sum)
                        },
                    );
                    *row_sum = sum;
                    // SAFETY: one task per (row, head).
                    let lse = unsafe { lse.range(row * shape.heads + head..row * shape.heads + head + 1) };
                    lse[0] = if sum > 0.0 { shift + sum.ln() } else { 0.0 };
                }
                for i in 0..t.rows {
                    // SAFETY: this task alone writes these rows of this head.
                    unsafe {
                        out.range((t.first + i) * qw + head * hd..(t.first + i) * qw + (head + 1) * hd)
                    }
                    .fill(0.0);
                }
                let dst = out.at(t.first * qw + head * hd);
                // SAFETY: as above; the rows exist.
                unsafe {
                    context.mix(
                        hd,
                        panel,
                        (&x.context.1[at(t.context).min(x.context.1.len())..], kvw),
                        (dst, qw),
                        true,
                    );
                    own.mix(
                        hd,
                        &panel[rest..],
                        (&x.own.1[at(t.own).min(x.own.1.len())..], kvw),
                        (dst, qw),
                        true,
                    );
                }
                for (i, sum) in sums[..t.rows].iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
                    let from = (t.first + i) * qw + head * hd;
                    // SAFETY: as above.
                    let o = unsafe { out.range(from..from + hd) };
                    let inverse = 1.0 / sum;
                    o.iter_mut().for_each(|o| *o *= inverse);
                }
            });
        }
    });
}

/// Gradient of [`span_attention`]: `out` and `lse` as it left them, `dout[R, nh hd]`.
pub fn span_attention_grad(
    threads: usize,
    shape: SpanShape<'_>,
    x: SpanInputs<'_>,
    (out, lse): (&[f32], &[f32]),
    dout: &[f32],
    grads: SpanGrads<'_>,
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let rows = shape.sights.len();
    let group = shape.heads / shape.kv_heads;
    let slots = x.context.0.len().min(x.context.1.len()) / kvw;
    let own_rows = x.own.0.len().min(x.own.1.len()) / kvw;
    shape.check(slots, own_rows);
    let tiles = shape.tiles(TILE);
    // Only what some row sees has a gradient.
    let all = |of: fn(&SpanTile) -> Span| tiles.iter().fold(Span::default(), |all, t| all.join(of(t)));
    let (seen_context, seen_own) = (all(|t| t.context), all(|t| t.own));
    let (c, b) = (seen_context.len() * hd, seen_own.len() * hd);
    let dq = Shared::new(&mut grads.dq[..rows * qw]);
    // Keys and values of every query head apart, added up per key head afterwards in head order.
    with_scratch(shape.heads * 2 * (c + b), |apart| {
        let parts = Shared::new(apart);
        par_ranges(threads, shape.heads, 1, |heads| {
            for head in heads {
                let from = head * 2 * (c + b);
                // SAFETY: each head has its own part.
                let part = unsafe { parts.range(from..from + 2 * (c + b)) };
                part.fill(0.0);
                let (context, own) = part.split_at_mut(2 * c);
                let (dkc, dvc) = context.split_at_mut(c);
                let (dko, dvo) = own.split_at_mut(b);
                for t in &tiles {
                    let place = |span: Span, all: Span| span.inside(all).from as usize * hd;
                    let (pc, po) = (place(t.context, seen_context), place(t.own, seen_own));
                    let into = [(&mut dkc[pc..], &mut dvc[pc..]), (&mut dko[po..], &mut dvo[po..])];
                    tile_grad(&shape, &x, t, head, (out, lse), dout, dq, into);
                }
            }
        });
        let context = [Shared::new(grads.context.0), Shared::new(grads.context.1)];
        let own = [Shared::new(grads.own.0), Shared::new(grads.own.1)];
        par_ranges(threads, shape.kv_heads, 1, |kvs| {
            for kv in kvs {
                for head in kv * group..(kv + 1) * group {
                    let from = head * 2 * (c + b);
                    let places = [
                        (0, seen_context, context[0]),
                        (c, seen_context, context[1]),
                        (2 * c, seen_own, own[0]),
                        (2 * c + b, seen_own, own[1]),
                    ];
                    for (offset, seen, all) in places {
                        for i in 0..seen.len() {
                            let at = (seen.from as usize + i) * kvw + kv * hd;
                            let own = from + offset + i * hd;
                            // SAFETY: the head tasks are done; each key head is one task.
                            let (sum, add) = unsafe { (all.range(at..at + hd), parts.range(own..own + hd)) };
                            for (s, a) in sum.iter_mut().zip(add) {
                                *s += *a;
                            }
                        }
                    }
                }
            }
        });
    });
}

/// Gradient of one tile of one query head; keys and values `[keys, hd]` are added to, from the tile's first key on.
#[allow(clippy::too_many_arguments, reason = "the pieces of one inner loop")]
fn tile_grad(
    shape: &SpanShape<'_>,
    x: &SpanInputs<'_>,
    t: &SpanTile,
    head: usize,
    (out, lse): (&[f32], &[f32]),
    dout: &[f32],
    dq: Shared<f32>,
    into: [(&mut [f32], &mut [f32]); 2],
) {
    let (qw, kvw, hd) = (shape.q_width(), shape.kv_width(), shape.head_dim);
    let kv = head / (shape.heads / shape.kv_heads);
    let (keys, split) = (t.keys(), t.context.len());
    if keys == 0 {
        return;
    }
    let of = |values: &'_ [f32], span: Span| (span.from as usize * kvw + kv * hd).min(values.len());
    let (kc, vc) = (&x.context.0[of(x.context.0, t.context)..], &x.context.1[of(x.context.1, t.context)..]);
    let (ko, vo) = (&x.own.0[of(x.own.0, t.own)..], &x.own.1[of(x.own.1, t.own)..]);
    let (q, d) = (&x.q[t.first * qw + head * hd..], &dout[t.first * qw + head * hd..]);
    let [context, own] = strips(t);
    with_scratch(2 * t.rows * keys, |both| {
        let (probs, dlogits) = both.split_at_mut(t.rows * keys);
        context.against(hd, (q, qw), (kc, kvw), probs);
        own.against(hd, (q, qw), (ko, kvw), &mut probs[split.min(t.rows * keys)..]);
        // dP = dO · Vᵀ
        context.against(hd, (d, qw), (vc, kvw), dlogits);
        own.against(hd, (d, qw), (vo, kvw), &mut dlogits[split.min(t.rows * keys)..]);
        for i in 0..t.rows {
            let row = t.first + i;
            let seen = places(t, shape.sights[row]);
            let at = row * qw + head * hd;
            let (probs, dlogits) =
                (&mut probs[i * keys..(i + 1) * keys], &mut dlogits[i * keys..(i + 1) * keys]);
            simd(
                #[inline(always)]
                || {
                    // <dO, out>: what the softmax subtracts.
                    let delta = dot(&dout[at..at + hd], &out[at..at + hd]);
                    let lse = lse[row * shape.heads + head];
                    for part in &seen {
                        for (p, d) in probs[part.clone()].iter_mut().zip(&mut dlogits[part.clone()]) {
                            *p = exp(*p * shape.scale - lse);
                            *d = *p * (*d - delta) * shape.scale;
                        }
                    }
                    hide(probs, &seen, split);
                    hide(dlogits, &seen, split);
                },
            );
        }
        let (dq, [(dkc, dvc), (dko, dvo)]) = (dq.at(t.first * qw + head * hd), into);
        // SAFETY: rows of this head belong to this task alone.
        unsafe {
            context.mix(hd, dlogits, (kc, kvw), (dq, qw), true);
            own.mix(hd, &dlogits[split..], (ko, kvw), (dq, qw), true);
        }
        context.collect(hd, dlogits, (q, qw), dkc);
        context.collect(hd, probs, (d, qw), dvc);
        own.collect(hd, &dlogits[split..], (q, qw), dko);
        own.collect(hd, &probs[split..], (d, qw), dvo);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    /// Blocks of 4 at anchors 3, 9 of the first document (slots 0..70) and 71 of the second, one that sees nothing, and
    /// more rows than a tile takes.
    fn sights() -> Vec<Sight> {
        let mut sights = Vec::new();
        let mut block = |start: u32, anchor: u32| {
            let own = sights.len() as u32;
            sights.extend(
                (0..4).map(|_| Sight { context: Span::new(start, anchor), own: Span::new(own, own + 4) }),
            );
        };
        block(0, 3);
        block(0, 9);
        (10..40).for_each(|anchor| block(0, anchor));
        block(70, 71);
        sights.extend([Sight::default(); 4]);
        sights
    }

    #[test]
    fn documents_are_tiles_of_their_own() {
        let sights = sights();
        let shape = SpanShape { sights: &sights, heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0 };
        let tiles = shape.tiles(TILE);
        assert_eq!(tiles.iter().map(|t| t.rows).collect::<Vec<_>>(), [64, 64, 8]);
        assert_eq!(tiles[1].context, Span::new(0, 39));
        assert_eq!(tiles[2].context, Span::new(70, 71));
    }

    #[test]
    fn results_do_not_depend_on_the_thread_count_and_unseen_rows_are_zero() {
        let sights = sights();
        let rows = sights.len();
        let shape = SpanShape { sights: &sights, heads: 4, kv_heads: 2, head_dim: 4, scale: 0.5 };
        let (q, dout) = (noise(1, rows * 16), noise(2, rows * 16));
        let (kc, vc) = (noise(3, 75 * 8), noise(4, 75 * 8));
        let (ko, vo) = (noise(5, rows * 8), noise(6, rows * 8));
        let x = SpanInputs { q: &q, context: (&kc, &vc), own: (&ko, &vo) };
        let run = |threads| {
            let (mut out, mut lse) = (vec![f32::NAN; rows * 16], vec![f32::NAN; rows * 4]);
            span_attention(threads, shape, x, &mut out, &mut lse);
            let mut g = [
                vec![0.0; rows * 16],
                vec![0.0; 600],
                vec![0.0; 600],
                vec![0.0; rows * 8],
                vec![0.0; rows * 8],
            ];
            let [dq, dkc, dvc, dko, dvo] = &mut g;
            let grads = SpanGrads { dq, context: (dkc, dvc), own: (dko, dvo) };
            span_attention_grad(threads, shape, x, (&out, &lse), &dout, grads);
            (out, g)
        };
        let one = run(1);
        assert!(run(2) == one);
        let blind = (rows - 4) * 16;
        assert!(one.0[blind..].iter().chain(&one.1[0][blind..]).all(|x| *x == 0.0));
        assert!(one.0[..blind].iter().all(|x| x.is_finite() && *x != 0.0));
    }
}
