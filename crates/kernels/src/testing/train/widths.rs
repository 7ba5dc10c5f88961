//! Attention of heads as wide as models have them, against the CPU implementation.
//!
//! Shape legend: `R` query rows, `C` context slots, `B` own rows.

use super::super::{host, noise};
use crate::train::{AttentionMask, DocSpan, Sight, Span, SpanShape, TttShape};
use crate::{Cpu, TrainKernels};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Sizes {
    /// `R`
    rows: usize,
    /// `C`
    context: usize,
    /// `B`
    own: usize,
    head_dim: usize,
    /// Pairs of own keys and values.
    pairs: usize,
}

/// Everything that attention gives: outputs, log-sum-exp, gradients.
fn attend<K: TrainKernels>(k: &K, mask: AttentionMask<'_>, s: Sizes) -> Vec<Vec<f32>> {
    let (q_len, kv) = (s.rows * HEADS * s.head_dim, KV_HEADS * s.head_dim);
    let up = |seed: u64, len: usize| k.upload(&noise(seed, len));
    let (q, dout) = (up(1, q_len), up(2, q_len));
    let (kc, vc) = (up(3, s.context * kv), up(4, s.context * kv));
    let own: Vec<_> = (0..s.pairs as u64).map(|i| (up(20 + i, s.own * kv), up(50 + i, s.own * kv))).collect();
    let own: Vec<_> = own.iter().map(|(k, v)| (k, v)).collect();
    let (mut out, mut lse) = (k.scratch(q_len), k.scratch(s.rows * HEADS));
    k.attention(mask, &q, (&kc, &vc), &own, &mut out, &mut lse);
    let (mut dq, mut dk, mut dv) = (up(6, q_len), up(7, s.context * kv), up(8, s.context * kv));
    let mut down: Vec<_> = own.iter().map(|_| (up(9, s.own * kv), up(10, s.own * kv))).collect();
    let grads = down.iter_mut().map(|(k, v)| (k, v)).collect();
    k.attention_grad(mask, &q, (&kc, &vc), &own, (&out, &lse), &dout, &mut dq, (&mut dk, &mut dv), grads);
    let mut all = vec![
        host(k, &out, q_len),
        host(k, &lse, s.rows * HEADS),
        host(k, &dq, q_len),
        host(k, &dk, s.context * kv),
        host(k, &dv, s.context * kv),
    ];
    for (dk, dv) in &down {
        all.extend([host(k, dk, s.own * kv), host(k, dv, s.own * kv)]);
    }
    all
}

/// Attention of heads of 64 to 256 values, under both masks, equals the CPU implementation's.
pub fn head_widths<K: TrainKernels>(k: &K, rounding: f64) {
    let cpu = Cpu::new(1);
    let docs = [DocSpan { start: 0, len: 37 }, DocSpan { start: 37, len: 2 }, DocSpan { start: 40, len: 33 }];
    let slots: Vec<u32> = (3..36).chain(38..39).chain(41..73).collect();
    let sight = |r: u32| Sight { context: Span::new(r / 9, r), own: Span::new(r / 5 * 5, r / 5 * 5 + 5) };
    let sights: Vec<Sight> = (0..50).map(sight).collect();
    // Widths with a kernel of their own, and ones that are rounded up; more pairs than one launch may take.
    for (head_dim, pairs) in [(64, 1), (72, 9), (128, 8), (136, 2), (256, 0)] {
        let (heads, kv_heads, scale) = (HEADS, KV_HEADS, 0.1);
        let ttt = TttShape { docs: &docs, slots: &slots, heads, kv_heads, head_dim, scale };
        let spans = SpanShape { sights: &sights, heads, kv_heads, head_dim, scale };
        let rows = slots.len();
        for (mask, sizes) in [
            (AttentionMask::Ttt(ttt), Sizes { rows, context: 73, own: rows, head_dim, pairs }),
            (AttentionMask::Spans(spans), Sizes { rows: 50, context: 50, own: 50, head_dim, pairs: 1 }),
        ] {
            let (found, wanted) = (attend(k, mask, sizes), attend(&cpu, mask, sizes));
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                for (found, wanted) in found.iter().zip(wanted) {
                    let far = f64::from((found - wanted).abs()) / (1.0 + f64::from(wanted.abs()));
                    // Written so that NaN fails.
                    assert!(far <= rounding.max(2e-5), "width {head_dim}, result {i}: {found}, not {wanted}");
                }
            }
        }
    }
}
