//! Losses against tokens: the formulas of [`draftsmith_kernels::train::token_loss`].
//!
//! Shape legend: `N` rows of a chunk, `V` vocabulary.

use burn_tensor::{FloatDType, Int, Tensor};
use draftsmith_kernels::train::{LogitPart, NO_LABEL, PartGrad, TokenRow, TokenTargets};

use crate::train::LOGITS;
use crate::{Buf, Gpu};

/// Numbers of a row that come back: CE, L1, and for draft and target the best token and its probability.
const NUMBERS: usize = 6;

impl Gpu {
    /// Logits `[N, V]` → their gradient and the [`NUMBERS`] of each row. `p` are the target's logits.
    fn token_rows(
        &self,
        z: Tensor<2>,
        p: Option<Tensor<2>>,
        labels: &[u32],
        (ce, l1): (&[f32], &[f32]),
        lse: Option<&[f32]>,
    ) -> (Tensor<2>, Tensor<2>) {
        let [n, vocab] = z.dims();
        let column = |values: &[f32]| self.floats(values).reshape([n, 1]);
        let has: Vec<f32> = labels.iter().map(|l| f32::from(*l != NO_LABEL)).collect();
        let has = column(&has);
        let ids: Vec<u32> = labels.iter().map(|l| if *l == NO_LABEL { 0 } else { *l }).collect();
        let ids: Tensor<2, Int> = self.indices(&ids).reshape([n, 1]);
        let (top, best) = self.first_largest(z.clone());
        let z = z - top;
        let at_label = z.clone().gather(1, ids.clone());
        let e = z.exp();
        let sum = e.clone().sum_dim(1);
        let q = e / sum.clone();
        let found_ce = (sum.clone().log() - at_label) * has.clone();
        let ce = column(ce) * has;
        let all =
            Tensor::<1, Int>::arange(0..vocab as i64, &self.device).reshape([1, vocab]).expand([n, vocab]);
        let one_hot = all.equal(ids.expand([n, vocab])).float().cast(FloatDType::F32);
        let float = |x: Tensor<2, Int>| x.float().cast(FloatDType::F32);
        let mut numbers = vec![found_ce];
        let mut dz = (q.clone() - one_hot) * ce;
        match p {
            None => {
                let zero = sum.clone().zeros_like();
                numbers.extend([zero.clone(), float(best), sum.recip(), zero.clone(), zero]);
            }
            Some(t) => {
                let (top, teacher_best) = self.first_largest(t.clone());
                let shift = match lse {
                    Some(lse) => column(lse),
                    None => top.clone() + (t.clone() - top.clone()).exp().sum_dim(1).log(),
                };
                let p = (t - shift.clone()).exp();
                let d = q.clone() - p.clone();
                let sign = d.clone().sign();
                let mut distance = d.abs().sum_dim(1);
                if lse.is_some() {
                    distance = distance + p.sum_dim(1).neg().add_scalar(1.0).clamp_min(0.0);
                }
                let signed = (sign.clone() * q.clone()).sum_dim(1);
                dz = dz + q * (sign - signed) * column(l1);
                let teacher_prob = (top - shift).exp();
                numbers.extend([distance, float(best), sum.recip(), float(teacher_best), teacher_prob]);
            }
        }
        (dz, Tensor::cat(numbers, 1))
    }

    pub(crate) fn token_loss(
        &self,
        parts: &[LogitPart<'_, Buf>],
        (rows, vocab): (usize, usize),
        targets: &TokenTargets<'_, Buf>,
        mut grads: Option<Vec<PartGrad<'_, Buf>>>,
    ) -> Vec<TokenRow> {
        if rows == 0 {
            return Vec::new();
        }
        let operands: Vec<(Tensor<2>, Tensor<2>)> =
            parts.iter().map(|p| (self.stored(p.x, rows, p.inp), self.stored(p.w, vocab, p.inp))).collect();
        let teacher = targets
            .teacher
            .as_ref()
            .map(|t| (self.stored(t.x, rows, t.inp), self.stored(t.head, vocab, t.inp)));
        let lse = targets.teacher.as_ref().and_then(|t| t.lse);
        let chunk = (LOGITS / vocab).max(1);
        let mut dx: Vec<Vec<Tensor<2>>> = parts.iter().map(|_| Vec::new()).collect();
        let mut found = Vec::with_capacity(rows);
        for first in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - first);
            let here = first..first + n;
            let product =
                |(x, w): &(Tensor<2>, Tensor<2>)| self.product(self.rows(x, first, n), w.clone().transpose());
            let z = operands.iter().map(product).reduce(|a, b| a + b).expect("logits come from somewhere");
            let p = teacher.as_ref().map(product);
            let factors = (&targets.ce[here.clone()], &targets.l1[here.clone()]);
            let lse = lse.map(|lse| &lse[here.clone()]);
            let (dz, numbers) = self.token_rows(z, p, &targets.labels[here.clone()], factors, lse);
            for (i, (_, dw)) in grads.iter_mut().flatten().enumerate() {
                let (x, w) = &operands[i];
                dx[i].push(self.product(dz.clone(), w.clone()));
                if let Some(dw) = dw {
                    self.add_master(dw, self.product(dz.clone().transpose(), self.rows(x, first, n)));
                }
            }
            for row in self.host(numbers).chunks_exact(NUMBERS) {
                found.push(TokenRow {
                    ce: row[0],
                    l1: row[1],
                    top: row[2] as u32,
                    top_prob: row[3],
                    teacher_top: row[4] as u32,
                    teacher_top_prob: row[5],
                });
            }
        }
        for ((to, _), dx) in grads.iter_mut().flatten().zip(dx) {
            self.keep(to, Tensor::cat(dx, 0));
        }
        found
    }
}
