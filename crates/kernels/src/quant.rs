//! Block formats of GGUF, value by value: the specification of what a stored weight means.
//!
//! Layouts follow ggml (facts of the format): a Q4 block holds value `i` in the low nibble of byte `i` and value
//! `i + 16` in its high nibble; Q4_K has eight sub-blocks of 32 with 6-bit scales and minima; Q6_K sixteen
//! sub-blocks of 16 with 8-bit scales.

use half::{bf16, f16};

use crate::{WeightDtype, WeightView};

/// One block of 32 values in a uniform form: `value[i] = scale[i / group] * quant[i] + min`.
///
/// `group` is 32, or 16 for Q6_K. The products are rounded to f32 as written here; every path uses the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block32 {
    pub quants: [i8; 32],
    pub scales: [f32; 2],
    pub min: f32,
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The 6-bit scale and minimum of sub-block `j` of a Q4_K super-block.
fn k4_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 0x0f) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    }
}

/// Block `b` (of 32 values) of one stored row.
///
/// # Panics
/// For float types, which have no blocks.
pub(crate) fn block32(dtype: WeightDtype, row: &[u8], b: usize) -> Block32 {
    let mut quants = [0i8; 32];
    let nibbles = |quants: &mut [i8; 32], bytes: &[u8]| {
        for (i, byte) in bytes.iter().enumerate() {
            quants[i] = (byte & 15) as i8;
            quants[i + 16] = (byte >> 4) as i8;
        }
    };
    match dtype {
        WeightDtype::Q4_0 => {
            let block = &row[b * 18..b * 18 + 18];
            nibbles(&mut quants, &block[2..]);
            quants.iter_mut().for_each(|q| *q -= 8);
            Block32 { quants, scales: [half_at(block, 0); 2], min: 0.0 }
        }
        WeightDtype::Q4_1 => {
            let block = &row[b * 20..b * 20 + 20];
            nibbles(&mut quants, &block[4..]);
            Block32 { quants, scales: [half_at(block, 0); 2], min: half_at(block, 2) }
        }
        WeightDtype::Q8_0 => {
            let block = &row[b * 34..b * 34 + 34];
            for (q, byte) in quants.iter_mut().zip(&block[2..]) {
                *q = *byte as i8;
            }
            Block32 { quants, scales: [half_at(block, 0); 2], min: 0.0 }
        }
        WeightDtype::Q4K => {
            let block = &row[b / 8 * 144..b / 8 * 144 + 144];
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let sub = b % 8;
            let (scale, min) = k4_scale_min(&block[4..16], sub);
            let bytes = &block[16 + sub / 2 * 32..16 + sub / 2 * 32 + 32];
            for (q, byte) in quants.iter_mut().zip(bytes) {
                *q = if sub.is_multiple_of(2) { byte & 15 } else { byte >> 4 } as i8;
            }
            Block32 { quants, scales: [d * f32::from(scale); 2], min: -(dmin * f32::from(min)) }
        }
        WeightDtype::Q6K => {
            let block = &row[b / 8 * 210..b / 8 * 210 + 210];
            let d = half_at(block, 208);
            let sub = b % 8; // 32 values: half `sub / 4`, quarter `sub % 4`
            let (half, quarter) = (sub / 4, sub % 4);
            let low = &block[half * 64..half * 64 + 64];
            let high = &block[128 + half * 32..128 + half * 32 + 32];
            for (i, q) in quants.iter_mut().enumerate() {
                let l = low[i + 32 * (quarter % 2)];
                let l = if quarter < 2 { l & 15 } else { l >> 4 };
                let h = (high[i] >> (2 * quarter)) & 3;
                *q = ((l | (h << 4)) as i8) - 32;
            }
            let scale = |i: usize| d * f32::from(block[192 + half * 8 + quarter * 2 + i] as i8);
            Block32 { quants, scales: [scale(0), scale(1)], min: 0.0 }
        }
        WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16 => unreachable!("float types have no blocks"),
    }
}

/// De-quantises row `o` into `out[I]`.
///
/// # Panics
/// If the view was not checked ([`WeightView::check`]) or `out` has another length.
pub fn dequantize_row(w: &WeightView<'_>, o: usize, out: &mut [f32]) {
    assert!(out.len() == w.in_features, "one value per input feature");
    let row = &w.data[o * w.row_bytes()..(o + 1) * w.row_bytes()];
    match w.dtype {
        WeightDtype::F32 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        WeightDtype::F16 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *v = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        WeightDtype::Bf16 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *v = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        block_type => {
            for (b, values) in out.chunks_exact_mut(32).enumerate() {
                let block = block32(block_type, row, b);
                for (i, v) in values.iter_mut().enumerate() {
                    *v = block.scales[i / 16] * f32::from(block.quants[i]) + block.min;
                }
            }
        }
    }
}

/// De-quantises a whole weight: `[O, I]`.
pub fn dequantize(w: &WeightView<'_>) -> Vec<f32> {
    let mut out = vec![0.0; w.out_features * w.in_features];
    for (o, row) in out.chunks_exact_mut(w.in_features.max(1)).enumerate() {
        dequantize_row(w, o, row);
    }
    out
}

/// Quantises 32 values to signed bytes: `scale = max|x| / 127`, round half to even.
pub(crate) fn quantize_block(x: &[f32], quants: &mut [i8]) -> f32 {
    let max = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let scale = max / 127.0;
    let inv = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (q, v) in quants.iter_mut().zip(x) {
        *q = (v * inv).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    scale
}
