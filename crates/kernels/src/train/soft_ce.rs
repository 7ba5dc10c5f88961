//! The head of the draft and its loss, fused: logits exist for one chunk of rows at a time, gradients leave in the
//! same pass. Also the teacher: the target's distribution without a `[S, V]` buffer [eagle3 §4.3-4.5].
//!
//! Shape legend: `N` rows with a loss at this step, `M` teacher rows, `V`/`Vd` target/draft vocabulary, `H` draft
//! width, `Ht` target width.

use super::linear::{LinearShape, Team, matmul, matmul_dw_acc, matmul_dx};
use super::par::{LANES, Shared, exp, exp_shifted, fold_lanes, max, par_ranges, simd, with_scratch};

/// Rows whose logits exist at once, at least.
const CHUNK: usize = 512;
/// Logits that exist at once in [`linear_soft_ce`] if that is more than [`CHUNK`] rows: 64 MiB. Every chunk reads the
/// head twice and its gradient once, so few large ones are faster.
const LOGITS: usize = 1 << 24;
/// Vocabulary rows of the target head taken at once by [`stream_head`].
const VOCAB_BLOCK: usize = 2048;

/// What is minimised [eagle3 §4.3, §4.4].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SoftLoss {
    /// Soft cross-entropy against the teacher on the draft vocabulary: KL up to the teacher's entropy.
    Kl,
    /// `-log α`, `α` the expected acceptance of one sampling step.
    LkAlpha,
    /// `w KL + (1 - w)(1 - α)` with `w = kl_scale · exp(-kl_decay · mean α)`.
    LkLambda {
        /// Weight of the KL term at `α = 0`.
        kl_scale: f32,
        /// How fast it fades as acceptance grows.
        kl_decay: f32,
    },
}

/// The teacher's side of [`linear_soft_ce`].
#[derive(Clone, Copy)]
pub struct SoftTargets<'a> {
    /// `[M, Vd]` probabilities, renormalised on the draft vocabulary.
    pub p: &'a [f32],
    /// `[M]` share of the target's probability that lies on the draft vocabulary.
    pub mass: &'a [f32],
    /// `[M]` draft id of the target's most likely token.
    pub labels: &'a [u32],
    /// `[N]` teacher row of each loss row.
    pub rows: &'a [u32],
}

/// How much each sum counts in the total loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftScale {
    /// Factor of `Σ KL`.
    pub kl: f32,
    /// Factor of the sums over `α`.
    pub alpha: f32,
}

/// Sums over the rows of one call, all un-scaled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SoftSums {
    /// `N`
    pub rows: u64,
    /// `Σ -Σ_j p_j log q_j`
    pub kl: f64,
    /// `Σ α`
    pub alpha: f64,
    /// `Σ -log α` (0 where `α` is 0)
    pub neg_log_alpha: f64,
    /// Rows whose most likely draft token is the target's.
    pub correct: u64,
    /// Weight of the KL term; 1 for [`SoftLoss::Kl`], 0 for [`SoftLoss::LkAlpha`].
    pub kl_weight: f64,
}

impl SoftSums {
    /// Counts one more row.
    pub fn add_row(&mut self, kl: f32, alpha: f32, correct: bool) {
        self.rows += 1;
        self.kl += f64::from(kl);
        self.alpha += f64::from(alpha);
        self.neg_log_alpha -= if alpha > 0.0 { f64::from(alpha).ln() } else { 0.0 };
        self.correct += u64::from(correct);
    }

    /// Mean `α` of the rows, 0 for none.
    pub fn mean_alpha(&self) -> f64 {
        self.alpha / self.rows.max(1) as f64
    }
}

#[derive(Clone, Copy, Default)]
struct RowStats {
    kl: f32,
    alpha: f32,
    correct: bool,
}

/// The gradient of the loss of a row, as factors of the gradients it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowGrad {
    /// Factor of `dKL`.
    pub kl: f32,
    /// Factor of `dα`; `None`: of `dlog α`, which is `log_alpha`.
    pub alpha: Option<f32>,
    /// Factor of `dlog α`.
    pub log_alpha: f32,
}

/// Weight of the KL term, and the gradient of a row. `mean_alpha` is the mean over all rows; only
/// [`SoftLoss::LkLambda`], whose weight depends on it, asks.
pub fn weigh(loss: SoftLoss, scale: SoftScale, mean_alpha: impl FnOnce() -> f64) -> (f64, RowGrad) {
    match loss {
        SoftLoss::Kl => (1.0, RowGrad { kl: scale.kl, alpha: Some(0.0), log_alpha: 0.0 }),
        SoftLoss::LkAlpha => (0.0, RowGrad { kl: 0.0, alpha: None, log_alpha: -scale.alpha }),
        SoftLoss::LkLambda { kl_scale, kl_decay } => {
            let weight = f64::from(kl_scale) * (-f64::from(kl_decay) * mean_alpha()).exp();
            let w = weight as f32;
            (weight, RowGrad { kl: w * scale.kl, alpha: Some(-(1.0 - w) * scale.alpha), log_alpha: 0.0 })
        }
    }
}

/// `logits[Vd]` → their gradient.
#[inline(always)]
fn soft_row(z: &mut [f32], p: &[f32], mass: f32, label: u32, grad: RowGrad) -> RowStats {
    let top = max(z);
    let argmax = position(z, top);
    // Σ p, Σ p (z - top) and Σ e^(z - top), which replaces z
    let (mut sum_p, mut sum_pz, mut sum) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (cp, rp) = p.as_chunks::<LANES>();
    let (cz, rz) = z.as_chunks_mut::<LANES>();
    for (z, p) in cz.iter_mut().zip(cp) {
        for i in 0..LANES {
            let shifted = z[i] - top;
            sum_p[i] += p[i];
            sum_pz[i] += p[i] * shifted;
            z[i] = exp(shifted);
            sum[i] += z[i];
        }
    }
    for (i, (z, p)) in rz.iter_mut().zip(rp).enumerate() {
        let shifted = *z - top;
        sum_p[i] += p;
        sum_pz[i] += p * shifted;
        *z = exp(shifted);
        sum[i] += *z;
    }
    let (sum_p, sum_pz, sum) = (fold_lanes(sum_p), fold_lanes(sum_pz), fold_lanes(sum));
    let inverse = 1.0 / sum;
    // α and, for its gradient, the q mass where q is the smaller one. Without a gradient of α the row is done here.
    let (kl, scaled_p) = (grad.kl * sum_p, grad.kl);
    let only_kl = grad.alpha == Some(0.0);
    let (mut alpha, mut below) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (z, p) in cz.iter_mut().zip(cp) {
        for i in 0..LANES {
            let (q, m) = (z[i] * inverse, p[i] * mass);
            z[i] = if only_kl { q * kl - scaled_p * p[i] } else { q };
            alpha[i] += if q < m { q } else { m };
            below[i] += if q < m { q } else { 0.0 };
        }
    }
    for (i, (z, p)) in rz.iter_mut().zip(rp).enumerate() {
        let (q, m) = (*z * inverse, p * mass);
        *z = if only_kl { q * kl - scaled_p * p } else { q };
        alpha[i] += if q < m { q } else { m };
        below[i] += if q < m { q } else { 0.0 };
    }
    let (alpha, below) = (fold_lanes(alpha), fold_lanes(below));
    if !only_kl {
        let slope = match grad.alpha {
            Some(slope) => slope,
            None if alpha > 0.0 => grad.log_alpha / alpha,
            None => 0.0,
        };
        for (z, p) in z.iter_mut().zip(p) {
            let q = *z;
            let inside = if q < p * mass { 1.0 } else { 0.0 };
            *z = q * kl - scaled_p * p + slope * q * (inside - below);
        }
    }
    RowStats { kl: sum_p * sum.ln() - sum_pz, alpha, correct: argmax == label as usize }
}

/// First place of a value that is there; whole vectors are compared at once.
#[inline(always)]
pub(super) fn position(z: &[f32], value: f32) -> usize {
    let (chunks, _) = z.as_chunks::<LANES>();
    let found = chunks.iter().position(|c| c.iter().fold(false, |found, x| found | (*x == value)));
    let from = found.unwrap_or(chunks.len()) * LANES;
    from + z[from..].iter().position(|x| *x == value).unwrap_or(0)
}

/// Head product, loss, and gradients of hidden and head in one call.
///
/// `hidden[N, H]` is the head's input of the loss rows, `head[Vd, H]`; `dhidden[N, H]` is overwritten, `dhead[Vd, H]`
/// added to. Without gradients (`None`) only the sums are computed.
pub fn linear_soft_ce(
    team: impl Into<Team>,
    (hidden, head): (&[f32], &[f32]),
    shape: LinearShape,
    targets: SoftTargets<'_>,
    loss: SoftLoss,
    scale: SoftScale,
    grads: Option<(&mut [f32], &mut [f32])>,
) -> SoftSums {
    assert_eq!(targets.rows.len(), shape.rows, "one teacher row per loss row");
    let team = team.into();
    let chunk = (LOGITS / shape.out.max(1)).max(CHUNK).min(shape.rows);
    let acceptance =
        || run(team, (hidden, head), shape, targets, RowGrad::default(), chunk, None).mean_alpha();
    let (kl_weight, grad) = weigh(loss, scale, acceptance);
    let sums = run(team, (hidden, head), shape, targets, grad, chunk, grads);
    SoftSums { kl_weight, ..sums }
}

/// `chunk` rows at a time.
fn run(
    team: Team,
    (hidden, head): (&[f32], &[f32]),
    shape: LinearShape,
    targets: SoftTargets<'_>,
    grad: RowGrad,
    chunk: usize,
    mut grads: Option<(&mut [f32], &mut [f32])>,
) -> SoftSums {
    let LinearShape { rows, out: vocab, inp: width } = shape;
    let mut sums = SoftSums::default();
    let mut stats = vec![RowStats::default(); chunk];
    with_scratch(chunk * vocab, |logits| {
        for first in (0..rows).step_by(chunk.max(1)) {
            let n = chunk.min(rows - first);
            let s = LinearShape { rows: n, ..shape };
            let x = &hidden[first * width..(first + n) * width];
            matmul(team, x, head, s, logits);
            let (lines, all_stats) = (Shared::new(logits), Shared::new(&mut stats));
            par_ranges(team.threads, n, 4, |r| {
                for i in r {
                    let m = targets.rows[first + i] as usize;
                    let p = &targets.p[m * vocab..(m + 1) * vocab];
                    // SAFETY: rows of tasks are disjoint.
                    let (z, stats) =
                        unsafe { (lines.range(i * vocab..(i + 1) * vocab), all_stats.range(i..i + 1)) };
                    stats[0] = simd(
                        #[inline(always)]
                        || soft_row(z, p, targets.mass[m], targets.labels[m], grad),
                    );
                }
            });
            stats[..n].iter().for_each(|row| sums.add_row(row.kl, row.alpha, row.correct));
            if let Some((dhidden, dhead)) = &mut grads {
                matmul_dx(team, logits, head, s, false, &mut dhidden[first * width..(first + n) * width]);
                matmul_dw_acc(team, logits, x, s, dhead);
            }
        }
    });
    sums
}

/// The most likely token and the log-sum-exp of `x[M, Ht] · head[V, Ht]ᵀ`, streamed over blocks of the vocabulary.
/// Ties go to the smaller id.
pub fn stream_head(
    team: impl Into<Team>,
    (x, head): (&[f32], &[f32]),
    shape: LinearShape,
) -> (Vec<u32>, Vec<f32>) {
    let team = team.into();
    let LinearShape { rows, out: vocab, inp: width } = shape;
    #[derive(Clone, Copy)]
    struct Running {
        top: f32,
        argmax: u32,
        sum: f64,
    }
    let mut running = vec![Running { top: f32::NEG_INFINITY, argmax: 0, sum: 0.0 }; rows];
    let block = VOCAB_BLOCK.min(vocab);
    with_scratch(CHUNK.min(rows) * block, |logits| {
        for first in (0..rows).step_by(CHUNK) {
            let n = CHUNK.min(rows - first);
            for v in (0..vocab).step_by(block) {
                let cols = block.min(vocab - v);
                let s = LinearShape { rows: n, out: cols, inp: width };
                matmul(
                    team,
                    &x[first * width..(first + n) * width],
                    &head[v * width..(v + cols) * width],
                    s,
                    logits,
                );
                let (lines, all) = (Shared::new(logits), Shared::new(&mut running));
                par_ranges(team.threads, n, 8, |r| {
                    for i in r {
                        // SAFETY: rows of tasks are disjoint.
                        let (z, state) = unsafe {
                            (
                                lines.range(i * cols..(i + 1) * cols),
                                &mut all.range(first + i..first + i + 1)[0],
                            )
                        };
                        let top = simd(
                            #[inline(always)]
                            || max(z),
                        );
                        if top > state.top {
                            state.sum *= f64::from(state.top - top).exp();
                            state.argmax = (v + position(z, top)) as u32;
                            state.top = top;
                        }
                        let top = state.top;
                        state.sum += f64::from(simd(
                            #[inline(always)]
                            || exp_shifted(z, top),
                        ));
                    }
                });
            }
        }
    });
    running.iter().map(|r| (r.argmax, (f64::from(r.top) + r.sum.ln()) as f32)).unzip()
}

/// Teacher probabilities `p[M, Vd]` from `x[M, Ht]` and the head rows of the draft vocabulary `head[Vd, Ht]`; returns
/// `[M]` the share of the full distribution that they cover, given its `lse[M]`.
pub fn soft_targets(
    team: impl Into<Team>,
    (x, head): (&[f32], &[f32]),
    shape: LinearShape,
    lse: &[f32],
    p: &mut [f32],
) -> Vec<f32> {
    let team = team.into();
    let vocab = shape.out;
    matmul(team, x, head, shape, p);
    let mut mass = vec![0.0f32; shape.rows];
    let (lines, all) = (Shared::new(p), Shared::new(&mut mass));
    par_ranges(team.threads, shape.rows, 4, |r| {
        for i in r {
            // SAFETY: rows of tasks are disjoint.
            let (z, mass) = unsafe { (lines.range(i * vocab..(i + 1) * vocab), all.range(i..i + 1)) };
            simd(
                #[inline(always)]
                || {
                    let top = max(z);
                    let sum = exp_shifted(z, top);
                    let inverse = 1.0 / sum;
                    z.iter_mut().for_each(|z| *z *= inverse);
                    mass[0] = exp(top - lse[i]) * sum;
                },
            );
        }
    });
    mass
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, noise};

    const SHAPE: LinearShape = LinearShape { rows: 13, out: 37, inp: 8 };

    /// What the loss takes, for [`SHAPE`].
    struct Operands {
        hidden: Vec<f32>,
        head: Vec<f32>,
        p: Vec<f32>,
        mass: Vec<f32>,
        rows: Vec<u32>,
    }

    fn operands() -> Operands {
        let LinearShape { rows, out, inp } = SHAPE;
        let (x, head) = (noise(5, rows * inp), noise(6, out * inp));
        let mut p = vec![0.0; rows * out];
        let mass = soft_targets(2, (&x, &head), SHAPE, &vec![5.0; rows], &mut p);
        let rows = (0..rows as u32).rev().collect();
        Operands { hidden: noise(1, SHAPE.rows * inp), head: noise(2, out * inp), p, mass, rows }
    }

    impl Operands {
        fn targets(&self) -> SoftTargets<'_> {
            SoftTargets { p: &self.p, mass: &self.mass, labels: &[3; SHAPE.rows], rows: &self.rows }
        }
    }

    #[test]
    fn sums_and_gradients_do_not_depend_on_the_thread_count() {
        let x = operands();
        let scale = SoftScale { kl: 0.7, alpha: 1.3 };
        for loss in [SoftLoss::Kl, SoftLoss::LkAlpha, SoftLoss::LkLambda { kl_scale: 1.0, kl_decay: 3.0 }] {
            let run = |threads| {
                let (mut dhidden, mut dhead) = (vec![f32::NAN; x.hidden.len()], vec![0.5; x.head.len()]);
                let grads = Some((&mut dhidden[..], &mut dhead[..]));
                let sums =
                    linear_soft_ce(threads, (&x.hidden, &x.head), SHAPE, x.targets(), loss, scale, grads);
                (sums, dhidden, dhead)
            };
            assert!(run(1) == run(2), "{loss:?}");
        }
    }

    #[test]
    fn chunks_of_rows_add_up_to_the_whole() {
        let x = operands();
        let grad = RowGrad { kl: 0.7, alpha: Some(0.0), log_alpha: 0.0 };
        let chunked = |chunk| {
            let (mut dhidden, mut dhead) = (vec![f32::NAN; x.hidden.len()], vec![0.5; x.head.len()]);
            let grads = Some((&mut dhidden[..], &mut dhead[..]));
            let sums = run(2.into(), (&x.hidden, &x.head), SHAPE, x.targets(), grad, chunk, grads);
            (sums, dhidden, dhead)
        };
        let whole = chunked(SHAPE.rows);
        for chunk in [1, 5] {
            let parts = chunked(chunk);
            close(parts.0.kl as f32, whole.0.kl, 1e-6);
            assert_eq!(parts.0.correct, whole.0.correct);
            for (part, whole) in parts.1.iter().chain(&parts.2).zip(whole.1.iter().chain(&whole.2)) {
                close(*part, f64::from(*whole), 1e-5);
            }
        }
    }
}
