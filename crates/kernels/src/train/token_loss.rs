//! Losses against tokens, with a weight for each row: cross-entropy with a label, and the distance from the target's
//! distribution. The logits may be a sum of several linear layers (the target's head and a Markov head), and exist for
//! one chunk of rows at a time; gradients leave in the same pass.
//!
//! Shape legend: `N` rows, `V` vocabulary, `I` input features of a layer, `Ht` target width.

use super::linear::{LinearShape, Team, matmul, matmul_acc, matmul_dw_acc, matmul_dx};
use super::par::{LANES, Shared, exp, fold_lanes, max, par_ranges, simd, with_scratch};
use super::soft_ce::position;

/// Logits that exist at once: 32 MiB.
const LOGITS: usize = 1 << 23;
/// Rows taken at once at least.
const CHUNK: usize = 64;

/// A label that is none of the vocabulary: the row has no cross-entropy.
pub const NO_LABEL: u32 = u32::MAX;

/// One linear layer into the logits.
pub struct LogitPart<'a, B> {
    /// `[N, I]`
    pub x: &'a B,
    /// `[V, I]`
    pub w: &'a B,
    /// `I`
    pub inp: usize,
}

/// The target's distribution of each row.
pub struct TokenTeacher<'a, B> {
    /// `[N, Ht]` final states of the target.
    pub x: &'a B,
    /// `[V, Ht]` rows of its head.
    pub head: &'a B,
    /// `Ht`
    pub inp: usize,
    /// `[N]` log-sum-exp of the full logits if the vocabulary here is a part of them.
    pub lse: Option<&'a [f32]>,
}

/// What the rows are compared with, and how much each comparison counts.
pub struct TokenTargets<'a, B> {
    /// `[N]`; [`NO_LABEL`] for none.
    pub labels: &'a [u32],
    /// `[N]` factor of the cross-entropy.
    pub ce: &'a [f32],
    /// `[N]` factor of the L1 distance; without a teacher nothing.
    pub l1: &'a [f32],
    /// The target.
    pub teacher: Option<TokenTeacher<'a, B>>,
}

/// What was found in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenRow {
    /// `-log q(label)`; 0 without a label.
    pub ce: f32,
    /// `Σ |q - p|`, what lies outside the vocabulary included.
    pub l1: f32,
    /// The draft's most likely token.
    pub top: u32,
    /// Its probability.
    pub top_prob: f32,
    /// The target's most likely token here.
    pub teacher_top: u32,
    /// Its probability.
    pub teacher_top_prob: f32,
}

/// Gradients of one [`LogitPart`]: `[N, I]`, overwritten, and `[V, I]`, added to, if that is trained.
pub type PartGrad<'a, B> = (&'a mut B, Option<&'a mut B>);

/// `p = e^(t - lse)` in place; returns the sum.
#[inline(always)]
fn teacher_row(t: &mut [f32], lse: Option<f32>) -> (f32, u32, f32) {
    let top = max(t);
    let best = position(t, top);
    let shift = match lse {
        Some(lse) => lse,
        None => {
            let mut acc = [0.0f32; LANES];
            for (i, x) in t.iter().enumerate() {
                acc[i % LANES] += exp(*x - top);
            }
            top + fold_lanes(acc).ln()
        }
    };
    let mut acc = [0.0f32; LANES];
    for (i, x) in t.iter_mut().enumerate() {
        *x = exp(*x - shift);
        acc[i % LANES] += *x;
    }
    (fold_lanes(acc), best as u32, exp(top - shift))
}

/// `logits[V]` → their gradient.
#[inline(always)]
fn token_row(
    z: &mut [f32],
    p: Option<&mut [f32]>,
    label: u32,
    (ce, l1): (f32, f32),
    lse: Option<f32>,
) -> TokenRow {
    let top = max(z);
    let mut row = TokenRow { top: position(z, top) as u32, ..TokenRow::default() };
    let at_label = if label == NO_LABEL { top } else { z[label as usize] };
    let mut acc = [0.0f32; LANES];
    for (i, z) in z.iter_mut().enumerate() {
        *z = exp(*z - top);
        acc[i % LANES] += *z;
    }
    let sum = fold_lanes(acc);
    let inverse = 1.0 / sum;
    row.top_prob = inverse;
    row.ce = if label == NO_LABEL { 0.0 } else { sum.ln() - (at_label - top) };
    let ce = if label == NO_LABEL { 0.0 } else { ce };
    match p {
        None => z.iter_mut().for_each(|z| *z *= inverse * ce),
        Some(p) => {
            let (mass, best, prob) = teacher_row(p, lse);
            (row.teacher_top, row.teacher_top_prob) = (best, prob);
            let (mut distance, mut signed) = ([0.0f32; LANES], [0.0f32; LANES]);
            for (i, (z, p)) in z.iter_mut().zip(p.iter()).enumerate() {
                *z *= inverse;
                let d = *z - *p;
                distance[i % LANES] += d.abs();
                signed[i % LANES] += if d > 0.0 {
                    *z
                } else if d < 0.0 {
                    -*z
                } else {
                    0.0
                };
            }
            let signed = fold_lanes(signed);
            row.l1 = fold_lanes(distance) + if lse.is_some() { (1.0 - mass).max(0.0) } else { 0.0 };
            for (z, p) in z.iter_mut().zip(p.iter()) {
                let sign = if *z > *p {
                    1.0
                } else if *z < *p {
                    -1.0
                } else {
                    0.0
                };
                *z *= ce + l1 * (sign - signed);
            }
        }
    }
    if label != NO_LABEL {
        z[label as usize] -= ce;
    }
    row
}

/// Head products, losses, and gradients in one call, for `rows` rows over `vocab` tokens. Without gradients only the
/// rows are computed.
pub fn linear_token_loss(
    team: impl Into<Team>,
    parts: &[LogitPart<'_, Vec<f32>>],
    (rows, vocab): (usize, usize),
    targets: &TokenTargets<'_, Vec<f32>>,
    mut grads: Option<Vec<PartGrad<'_, Vec<f32>>>>,
) -> Vec<TokenRow> {
    let team = team.into();
    assert!(!parts.is_empty(), "logits come from somewhere");
    for given in [targets.labels.len(), targets.ce.len(), targets.l1.len()] {
        assert_eq!(given, rows, "one label and one factor per row");
    }
    let mut found = vec![TokenRow::default(); rows];
    let panels = 1 + usize::from(targets.teacher.is_some());
    let chunk = (LOGITS / vocab.max(1)).max(CHUNK).min(rows);
    with_scratch(panels * chunk * vocab, |all| {
        let (logits, teacher) = all.split_at_mut(chunk * vocab);
        for first in (0..rows).step_by(chunk.max(1)) {
            let n = chunk.min(rows - first);
            for (i, part) in parts.iter().enumerate() {
                let s = LinearShape { rows: n, out: vocab, inp: part.inp };
                let x = &part.x[first * part.inp..(first + n) * part.inp];
                match i {
                    0 => matmul(team, x, part.w, s, logits),
                    _ => matmul_acc(team, x, part.w, s, logits),
                }
            }
            if let Some(t) = &targets.teacher {
                let s = LinearShape { rows: n, out: vocab, inp: t.inp };
                matmul(team, &t.x[first * t.inp..(first + n) * t.inp], t.head, s, teacher);
            }
            let lse = targets.teacher.as_ref().and_then(|t| t.lse);
            let has_teacher = targets.teacher.is_some();
            let (lines, wanted, out) =
                (Shared::new(logits), Shared::new(teacher), Shared::new(&mut found[first..first + n]));
            par_ranges(team.threads, n, 4, |r| {
                for i in r {
                    let line = i * vocab..(i + 1) * vocab;
                    // SAFETY: rows of tasks are disjoint.
                    let (z, p, row) = unsafe {
                        let p = has_teacher.then(|| wanted.range(line.clone()));
                        (lines.range(line), p, out.range(i..i + 1))
                    };
                    let at = first + i;
                    let factors = (targets.ce[at], targets.l1[at]);
                    row[0] = simd(
                        #[inline(always)]
                        || token_row(z, p, targets.labels[at], factors, lse.map(|lse| lse[at])),
                    );
                }
            });
            for (part, (dx, dw)) in parts.iter().zip(grads.iter_mut().flatten()) {
                let s = LinearShape { rows: n, out: vocab, inp: part.inp };
                let place = first * part.inp..(first + n) * part.inp;
                matmul_dx(team, logits, part.w, s, false, &mut dx[place.clone()]);
                if let Some(dw) = dw {
                    matmul_dw_acc(team, logits, &part.x[place], s, dw);
                }
            }
        }
    });
    found
}
