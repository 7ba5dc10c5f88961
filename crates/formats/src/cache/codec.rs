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

/// Bytes of ids and mask of a row whose encoded size does not overflow.
pub(super) fn head_len(tokens: usize) -> usize {
    tokens * 4 + tokens.div_ceil(8)
}

/// Ids and mask from so many bytes.
pub(super) fn decode_head(head: &[u8], tokens: usize) -> Result<(Vec<u32>, Vec<bool>), String> {
    let (ids, mask) = head.split_at(tokens * 4);
    let ids = ids.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    Ok((ids, unpack_bits(mask, tokens).ok_or("the mask has spare bits")?))
}

/// What is said of a state that cannot be stored, by its number among those of a token.
pub(super) fn unfit(layers: &[u32], token: usize, state: usize) -> String {
    let what = match layers.get(state) {
        Some(layer) => format!("layer {layer}"),
        None => "the final state".to_string(),
    };
    format!("{what} of token {token} has a value that is not finite")
}

/// The states of a row's tokens as they are stored, token by token as they come.
#[derive(Clone, Debug, PartialEq)]
pub struct RowEncoder {
    hidden: usize,
    layers: Vec<u32>,
    dtype: CaptureDtype,
    tokens: usize,
    /// Scales of the blocks, where the type has them.
    scales: Vec<u8>,
    values: Vec<u8>,
    /// The first token with a state that cannot be stored, and which.
    problem: Option<(usize, usize)>,
}

impl RowEncoder {
    /// For rows of a cache like this.
    pub fn new(spec: &CacheSpec) -> RowEncoder {
        RowEncoder {
            hidden: spec.hidden_size as usize,
            layers: spec.target_layer_ids.clone(),
            dtype: spec.dtype,
            tokens: 0,
            scales: Vec::new(),
            values: Vec::new(),
            problem: None,
        }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Adds tokens: `features` `[n, K * Ht]` and `last` `[n, Ht]`.
    ///
    /// # Panics
    /// If the two do not have the same number of whole tokens.
    pub fn push(&mut self, features: &[f32], last: &[f32]) {
        let (hidden, joined) = (self.hidden, self.hidden * self.layers.len());
        let tokens = last.len() / hidden;
        assert_eq!((features.len(), last.len()), (tokens * joined, tokens * hidden), "whole tokens");
        for t in 0..tokens {
            let features = features[t * joined..(t + 1) * joined].chunks_exact(hidden);
            for (i, state) in features.chain([&last[t * hidden..(t + 1) * hidden]]).enumerate() {
                self.push_state(i, state);
            }
            self.tokens += 1;
        }
    }

    fn push_state(&mut self, i: usize, state: &[f32]) {
        // Largest magnitude that int8 and bf16 both keep finite when rounded.
        if self.problem.is_none() && !state.iter().all(|v| v.abs() <= 3.3e38) {
            self.problem = Some((self.tokens, i));
        }
        match self.dtype {
            CaptureDtype::Bf16 => {
                state.iter().for_each(|v| self.values.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()));
            }
            CaptureDtype::Int8 => {
                for block in state.chunks(BLOCK) {
                    let max = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    let scale = scale_of(max);
                    self.scales.extend_from_slice(&scale.to_le_bytes());
                    let inverse = if max > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
                    // A subnormal scale has an infinite inverse; such a block is zero for every purpose.
                    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
                    self.values.extend(block.iter().map(|v| (v * inverse).round_ties_even() as i8 as u8));
                }
            }
        }
    }

    /// Forgets all tokens but the first ones.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens < self.tokens {
            self.scales.truncate(self.scales.len() / self.tokens * tokens);
            self.values.truncate(self.values.len() / self.tokens * tokens);
            self.problem.take_if(|(token, _)| *token >= tokens);
            self.tokens = tokens;
        }
    }

    /// The bytes of a frame of the row with these ids and this loss mask, `[S]` each.
    pub(super) fn finish(&self, ids: &[u32], loss_mask: &[bool]) -> Result<Vec<u8>, String> {
        if ids.is_empty() {
            return Err("it has no tokens".to_string());
        }
        if loss_mask.len() != ids.len() {
            return Err(format!("{} tokens but {} mask entries", ids.len(), loss_mask.len()));
        }
        if ids.len() != self.tokens {
            return Err(format!("{} tokens but the states of {}", ids.len(), self.tokens));
        }
        if let Some((token, state)) = self.problem {
            return Err(unfit(&self.layers, token, state));
        }
        let mask = pack_bits(loss_mask);
        let mut out = Vec::with_capacity(ids.len() * 4 + mask.len() + self.scales.len() + self.values.len());
        ids.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
        out.extend_from_slice(&mask);
        out.extend_from_slice(&self.scales);
        out.extend_from_slice(&self.values);
        Ok(out)
    }
}

pub(super) fn encode(row: &CaptureRow, spec: &CacheSpec) -> Result<Vec<u8>, String> {
    let (tokens, hidden, layers) = (row.len(), spec.hidden_size as usize, spec.target_layer_ids.len());
    let mut encoder = RowEncoder::new(spec);
    if tokens > 0 && row.loss_mask.len() == tokens {
        for (name, found, wanted) in [
            ("features", row.features.len(), tokens * layers * hidden),
            ("final states", row.last.len(), tokens * hidden),
        ] {
            if found != wanted {
                return Err(format!(
                    "it has {found} values of {name}, expected {wanted} for {tokens} tokens"
                ));
            }
        }
        encoder.push(&row.features, &row.last);
    }
    let out = encoder.finish(&row.ids, &row.loss_mask)?;
    debug_assert_eq!(Some(out.len()), encoded_len(tokens, spec));
    Ok(out)
}

pub(super) fn decode(bytes: &[u8], tokens: usize, spec: &CacheSpec) -> Result<CaptureRow, String> {
    let (hidden, layers) = (spec.hidden_size as usize, spec.target_layer_ids.len());
    if tokens == 0 || encoded_len(tokens, spec) != Some(bytes.len()) {
        return Err(format!("{tokens} tokens do not fit a frame of {} bytes", bytes.len()));
    }
    let (head, states) = bytes.split_at(head_len(tokens));
    let (ids, loss_mask) = decode_head(head, tokens)?;
    let mut row = CaptureRow {
        ids,
        loss_mask,
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
