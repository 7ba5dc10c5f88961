//! Naive double-precision twins of the operations: the specification that the tests compare against.

use crate::experts::Routing;
use crate::{Activation, RopeTable, StepMask, WeightView, quant};

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

/// A capped logit.
pub fn softcap(x: f64, cap: f64) -> f64 {
    cap * (x / cap).tanh()
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
                    let logit = dot * f64::from(mask.scale);
                    mask.softcap.map_or(logit, |cap| softcap(logit, f64::from(cap)))
                })
                .collect();
            let sink = mask.sinks.map(|sinks| f64::from(sinks[head]));
            let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
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

/// `act(gate) * up`.
pub fn gated(activation: Activation, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => {
            let t = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + t.tanh()) * up
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * sigmoid(alpha * gate) * (up + 1.0)
        }
    }
}

/// One expert: `[gate, up, down]` and their biases.
pub type ExpertView<'a> = ([WeightView<'a>; 3], Option<[&'a [f32]; 3]>);

/// The experts of each row of `x[R, H]` and what they give, from router logits `[R, E]`.
pub fn experts(
    x: &[f32],
    logits: &[f32],
    routing: Routing,
    activation: Activation,
    experts: &[ExpertView<'_>],
) -> Vec<f64> {
    let hidden = x.len() / (logits.len() / routing.experts);
    let mut y = Vec::new();
    for (x, logits) in x.chunks_exact(hidden).zip(logits.chunks_exact(routing.experts)) {
        let mut order: Vec<usize> = (0..routing.experts).collect();
        // Adding zero makes both zeros one.
        order.sort_by(|a, b| (logits[*b] + 0.0).total_cmp(&(logits[*a] + 0.0)).then(a.cmp(b)));
        let share = |e: usize| f64::from(logits[e]).exp();
        let chosen = &order[..routing.used];
        let total: f64 = if routing.normalised { chosen } else { &order }.iter().map(|e| share(*e)).sum();
        let mut sum = vec![0.0; hidden];
        for e in chosen {
            let (weights, bias) = &experts[*e];
            let product = |i: usize, x: &[f32]| -> Vec<f64> {
                let bias = |o: usize| bias.as_ref().map_or(0.0, |b| f64::from(b[i][o]));
                matmul(x, 1, &weights[i]).into_iter().enumerate().map(|(o, v)| v + bias(o)).collect()
            };
            let inner: Vec<f32> = product(0, x)
                .into_iter()
                .zip(product(1, x))
                .map(|(gate, up)| gated(activation, gate, up) as f32)
                .collect();
            for (s, v) in sum.iter_mut().zip(product(2, &inner)) {
                *s += share(*e) / total * v;
            }
        }
        y.extend(sum);
    }
    y
}
