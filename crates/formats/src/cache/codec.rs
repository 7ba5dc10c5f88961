//! Between a row of floats and the bytes of a frame, before compression.

use half::bf16;

use super::row::{CacheSpec, CaptureRow};
use crate::run::CaptureDtype;
use crate::tokens::{pack_bits, unpack_bits};

/// Neighbouring values that share a scale. 32 costs 6 % on top of the integers; larger blocks save little of that and
/// let an outlier coarsen more neighbours.
pub(super) const BLOCK: usize = 32;

/// The scale of a block whose largest magnitude is `max`: `max / 127` rounded *up* to bf16, so that no value is clipped.
fn scale_of(max: f32) -> bf16 {
    let exact = max / 127.0;
    let down = bf16::from_bits((exact.to_bits() >> 16) as u16);
    if down.to_f32() >= exact { down } else { bf16::from_bits(down.to_bits() + 1) }
}

/// Exact size of an encoded row, or `None` if it overflows.
pub(super) fn encoded_len(tokens: usize, spec: &CacheSpec) -> Option<usize> {
    let hidden = spec.hidden_size as usize;
    let per_state = match spec.dtype {
        CaptureDtype::Bf16 => hidden.checked_mul(2)?,
        CaptureDtype::Int8 => hidden.checked_add(hidden.div_ceil(BLOCK).checked_mul(2)?)?,
    };
    let states = per_state.checked_mul(spec.states())?.checked_mul(tokens)?;
    tokens.checked_mul(4)?.checked_add(tokens.div_ceil(8))?.checked_add(states)
}

/// The states of all tokens in storage order: `[S][K + 1][Ht]`.
fn states<'a>(row: &'a CaptureRow, spec: &CacheSpec) -> impl Iterator<Item = &'a [f32]> {
    let hidden = spec.hidden_size as usize;
    let layers = spec.target_layer_ids.len();
    (0..row.len()).flat_map(move |t| {
        let features = row.features[t * layers * hidden..(t + 1) * layers * hidden].chunks_exact(hidden);
        features.chain([&row.last[t * hidden..(t + 1) * hidden]])
    })
}

pub(super) fn encode(row: &CaptureRow, spec: &CacheSpec) -> Result<Vec<u8>, String> {
    let (tokens, hidden, layers) = (row.len(), spec.hidden_size as usize, spec.target_layer_ids.len());
    if tokens == 0 {
        return Err("it has no tokens".to_string());
    }
    if row.loss_mask.len() != tokens {
        return Err(format!("{tokens} tokens but {} mask entries", row.loss_mask.len()));
    }
    for (name, found, wanted) in [
        ("features", row.features.len(), tokens * layers * hidden),
        ("final states", row.last.len(), tokens * hidden),
    ] {
        if found != wanted {
            return Err(format!("it has {found} values of {name}, expected {wanted} for {tokens} tokens"));
        }
    }
    // Largest magnitude that int8 and bf16 both keep finite when rounded.
    let storable = |v: &f32| v.abs() <= 3.3e38;
    if let Some(i) = states(row, spec).position(|s| !s.iter().all(storable)) {
        let (token, state) = (i / (layers + 1), i % (layers + 1));
        let what = if state < layers {
            format!("layer {}", spec.target_layer_ids[state])
        } else {
            "the final state".to_string()
        };
        return Err(format!("{what} of token {token} has a value that is not finite"));
    }
    let len = encoded_len(tokens, spec).ok_or("its size overflows")?;
    let mut out = Vec::with_capacity(len);
    row.ids.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
    out.extend_from_slice(&pack_bits(&row.loss_mask));
    match spec.dtype {
        CaptureDtype::Bf16 => {
            for state in states(row, spec) {
                state.iter().for_each(|v| out.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()));
            }
        }
        CaptureDtype::Int8 => {
            let mut integers = Vec::with_capacity(tokens * (layers + 1) * hidden);
            for block in states(row, spec).flat_map(|s| s.chunks(BLOCK)) {
                let max = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let scale = scale_of(max);
                out.extend_from_slice(&scale.to_le_bytes());
                let inverse = if max > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
                // A subnormal scale has an infinite inverse; such a block is zero for every purpose.
                let inverse = if inverse.is_finite() { inverse } else { 0.0 };
                integers.extend(block.iter().map(|v| (v * inverse).round_ties_even() as i8 as u8));
            }
            out.append(&mut integers);
        }
    }
    debug_assert_eq!(out.len(), len);
    Ok(out)
}

pub(super) fn decode(bytes: &[u8], tokens: usize, spec: &CacheSpec) -> Result<CaptureRow, String> {
    let (hidden, layers) = (spec.hidden_size as usize, spec.target_layer_ids.len());
    if tokens == 0 || encoded_len(tokens, spec) != Some(bytes.len()) {
        return Err(format!("{tokens} tokens do not fit a frame of {} bytes", bytes.len()));
    }
    let (ids, rest) = bytes.split_at(tokens * 4);
    let (mask, states) = rest.split_at(tokens.div_ceil(8));
    let mut row = CaptureRow {
        ids: ids.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
        loss_mask: unpack_bits(mask, tokens).ok_or("the mask has spare bits")?,
        features: Vec::with_capacity(tokens * layers * hidden),
        last: Vec::with_capacity(tokens * hidden),
    };
    let half = |c: &[u8]| bf16::from_le_bytes([c[0], c[1]]).to_f32();
    match spec.dtype {
        CaptureDtype::Bf16 => {
            for (i, state) in states.chunks_exact(hidden * 2).enumerate() {
                let out = if i % (layers + 1) < layers { &mut row.features } else { &mut row.last };
                out.extend(state.chunks_exact(2).map(half));
            }
        }
        CaptureDtype::Int8 => {
            let blocks = hidden.div_ceil(BLOCK);
            let (scales, integers) = states.split_at(tokens * (layers + 1) * blocks * 2);
            let pairs = scales.chunks_exact(blocks * 2).zip(integers.chunks_exact(hidden));
            for (i, (scales, state)) in pairs.enumerate() {
                let out = if i % (layers + 1) < layers { &mut row.features } else { &mut row.last };
                for (scale, block) in scales.chunks_exact(2).zip(state.chunks(BLOCK)) {
                    let scale = half(scale);
                    out.extend(block.iter().map(|q| f32::from(*q as i8) * scale));
                }
            }
        }
    }
    Ok(row)
}
