//! Naive double-precision twins of the operations: the specification that the tests compare against.

use crate::{RopeTable, StepMask, WeightView, quant};

/// `y[R, O] = x[R, I] · Wᵀ` on the de-quantised weight.
pub fn matmul(x: &[f32], rows: usize, w: &WeightView<'_>) -> Vec<f64> {
    let weight = quant::dequantize(w);
    let mut y = Vec::with_capacity(rows * w.out_features);
    for row in x.chunks_exact(w.in_features).take(rows) {
        for o in weight.chunks_exact(w.in_features) {
            y.push(row.iter().zip(o).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum());
        }
    }
    y
}

/// RMS norm over groups of `weight.len()` values.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let width = weight.len();
    x.chunks_exact(width)
        .flat_map(|group| {
            let mean = group.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / width as f64;
            let inv = 1.0 / (mean + eps).sqrt();
            group
                .iter()
                .zip(weight)
                .map(move |(v, w)| f64::from(*v) * inv * f64::from(*w))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// RoPE of one row of `heads * head_dim` values.
pub fn rope(x: &[f32], table: &RopeTable, position: u32) -> Vec<f64> {
    let dim = table.head_dim();
    let (cos, sin) = table.angles(position);
    let mut y = vec![0.0; x.len()];
    for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
        for i in 0..dim / 2 {
            let (a, b, c, s) =
                (f64::from(x[i]), f64::from(x[i + dim / 2]), f64::from(cos[i]), f64::from(sin[i]));
            y[i] = a * c - b * s;
            y[i + dim / 2] = b * c + a * s;
        }
    }
    y
}

/// Attention of a step: `q[R, heads * dim]` over `k`, `v` of `[base + R, kv_heads * dim]` slots.
pub fn attention(
    q: &[f32],
    heads: usize,
    kv_heads: usize,
    dim: usize,
    k: &[f32],
    v: &[f32],
    mask: &StepMask<'_>,
) -> Vec<f64> {
    let rows = mask.new_rows;
    let earlier = mask.parents.len() - rows;
    let mut y = vec![0.0; rows * heads * dim];
    for row in 0..rows {
        let mut path = vec![mask.base + earlier + row];
        let mut at = mask.parents[earlier + row];
        while let Some(p) = at {
            path.push(mask.base + p as usize);
            at = mask.parents[p as usize];
        }
        path.reverse();
        if mask.whole_block {
            path = (mask.base..mask.base + mask.parents.len()).collect();
        }
        let mut slots: Vec<usize> = (0..mask.base).chain(path).collect();
        if let Some(window) = mask.window {
            slots.drain(..slots.len().saturating_sub(window));
        }
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let q = &q[(row * heads + head) * dim..(row * heads + head + 1) * dim];
            let scores: Vec<f64> = slots
                .iter()
                .map(|s| {
                    let k = &k[(s * kv_heads + kv_head) * dim..(s * kv_heads + kv_head + 1) * dim];
                    let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(mask.scale)
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let y = &mut y[(row * heads + head) * dim..(row * heads + head + 1) * dim];
            for (s, w) in slots.iter().zip(&weights) {
                let v = &v[(s * kv_heads + kv_head) * dim..(s * kv_heads + kv_head + 1) * dim];
                for (y, v) in y.iter_mut().zip(v) {
                    *y += w / total * f64::from(*v);
                }
            }
        }
    }
    y
}
