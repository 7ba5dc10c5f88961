//! Block formats of GGUF, value by value: the specification of what a stored weight means.
//!
//! Layouts follow ggml (facts of the format). Every type comes down to blocks of 32 small integers with scales, some
//! with minima; the values are those of the `gguf` package bit for bit.

use half::f16;

use crate::{Groups, WeightDtype, WeightView};

/// Values that the indices of IQ4_NL and IQ4_XS stand for.
pub(crate) const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Values that the indices of MXFP4 and NVFP4 stand for, doubled.
pub(crate) const FP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// One block of 32 values in a uniform form: `value[i] = scale[i / 16] * (quant[i] - zero) + min[i / 16]`.
///
/// The products are rounded to f32 as written here; every path uses the same. Without minima `min` is -0.0, which
/// changes no bit of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block32 {
    pub quants: [i8; 32],
    pub scales: [f32; 2],
    pub mins: [f32; 2],
    pub zero: i8,
    pub parts: Parts,
}

/// What the scales and minima of a block are made of where several blocks share one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    /// Scale of the super-block and what each half multiplies it with.
    pub scale: f32,
    pub scales: [i8; 2],
    /// The same of what is subtracted.
    pub min: f32,
    pub mins: [u8; 2],
}

impl Parts {
    fn block(self, quants: [i8; 32]) -> Block32 {
        let scales = self.scales.map(|s| self.scale * f32::from(s));
        Block32 { quants, scales, mins: [-0.0; 2], zero: 0, parts: self }
    }

    fn block_with_mins(self, quants: [i8; 32]) -> Block32 {
        let mins = self.mins.map(|m| -(self.min * f32::from(m)));
        Block32 { mins, ..self.block(quants) }
    }
}

impl Block32 {
    /// Scales of its own.
    fn plain(quants: [i8; 32], scales: [f32; 2], min: f32) -> Block32 {
        Block32 { quants, scales, mins: [min; 2], zero: 0, parts: Parts::default() }
    }

    /// The values.
    pub(crate) fn values(&self, out: &mut [f32]) {
        for (i, (v, q)) in out.iter_mut().zip(&self.quants).enumerate() {
            *v = self.scales[i / 16] * f32::from(i16::from(*q) - i16::from(self.zero)) + self.mins[i / 16];
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The 6-bit scale and minimum of sub-block `j` of a Q4_K or Q5_K super-block.
fn k4_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 0x0f) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    }
}

/// Half of 2^(e - 127), the scale of an MXFP4 block.
pub(crate) fn exponent_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// Half of an unsigned 8-bit float with 4 bits of exponent, the scale of an NVFP4 group.
fn float8_scale(x: u8) -> f32 {
    if x == 0x7f {
        return 0.0;
    }
    let (exponent, mantissa) = (i32::from(x >> 3 & 15), f32::from(x & 7));
    if exponent == 0 {
        mantissa * 2f32.powi(-9) * 0.5
    } else {
        (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) * 0.5
    }
}

/// Vectors of the IQ types, from `fixtures/gguf/grids.py`: two bytes each, eight 2-bit or four 4-bit indices.
static GRIDS: &[u8; 9216] = include_bytes!("quant/grids.bin");

/// Where each type's vectors begin, counted in vectors.
const IQ2_XXS: usize = 0;
const IQ2_XS: usize = 256;
const IQ2_S: usize = 768;
const IQ3_XXS: usize = 1792;
const IQ3_S: usize = 2048;
const IQ1: usize = 2560;

const IQ2_VALUES: [i8; 4] = [8, 25, 43, 0];
const IQ3_XXS_VALUES: [i8; 8] = [4, 12, 20, 28, 36, 44, 52, 62];

/// Eight values of a vector of 2-bit indices.
fn vector8(at: usize, values: [i8; 4]) -> [i8; 8] {
    let bits = u16_at(GRIDS, 2 * at);
    std::array::from_fn(|i| values[usize::from(bits >> (2 * i) & 3)])
}

/// Four values of a vector of 4-bit indices.
fn vector4(at: usize, values: [i8; 8]) -> [i8; 4] {
    let bits = u16_at(GRIDS, 2 * at);
    std::array::from_fn(|i| values[usize::from(bits >> (4 * i) & 7)])
}

/// Negates the values whose bit is set.
fn signed(values: &mut [i8], signs: u8) {
    for (i, v) in values.iter_mut().enumerate() {
        if signs >> i & 1 == 1 {
            *v = -*v;
        }
    }
}

/// Seven signs and an eighth that makes their number even.
fn even_signs(bits: u32) -> u8 {
    let bits = (bits & 127) as u8;
    bits | (bits.count_ones() as u8 & 1) << 7
}

/// Block `b` (of 32 values) of one stored row.
///
/// # Panics
/// For float types, which have no blocks.
pub(crate) fn block32(dtype: WeightDtype, row: &[u8], b: usize) -> Block32 {
    let mut quants = [0i8; 32];
    let (values, bytes) = dtype.block();
    let per_block = values / 32;
    // The block as it is stored, and which 32 of its values are wanted.
    let (block, sub) = (&row[b / per_block.max(1) * bytes..][..bytes], b % per_block.max(1));
    match dtype {
        WeightDtype::Q4_0 => {
            nibbles(&mut quants, &block[2..]);
            quants.iter_mut().for_each(|q| *q -= 8);
            Block32::plain(quants, [half_at(block, 0); 2], -0.0)
        }
        WeightDtype::Q4_1 => {
            nibbles(&mut quants, &block[4..]);
            Block32::plain(quants, [half_at(block, 0); 2], half_at(block, 2))
        }
        WeightDtype::Q5_0 => {
            nibbles(&mut quants, &block[6..]);
            let high = u32_at(block, 2);
            for (i, q) in quants.iter_mut().enumerate() {
                *q |= ((high >> i & 1) << 4) as i8;
                *q -= 16;
            }
            Block32::plain(quants, [half_at(block, 0); 2], -0.0)
        }
        WeightDtype::Q5_1 => {
            nibbles(&mut quants, &block[8..]);
            let high = u32_at(block, 4);
            for (i, q) in quants.iter_mut().enumerate() {
                *q |= ((high >> i & 1) << 4) as i8;
            }
            Block32::plain(quants, [half_at(block, 0); 2], half_at(block, 2))
        }
        WeightDtype::Q8_0 => {
            for (q, byte) in quants.iter_mut().zip(&block[2..]) {
                *q = *byte as i8;
            }
            Block32::plain(quants, [half_at(block, 0); 2], -0.0)
        }
        WeightDtype::Q2K => {
            let (low, shift) = (&block[16 + sub / 4 * 32..][..32], 2 * (sub % 4));
            for (q, byte) in quants.iter_mut().zip(low) {
                *q = (byte >> shift & 3) as i8;
            }
            let scales = [block[2 * sub], block[2 * sub + 1]];
            let parts = Parts {
                scale: half_at(block, 80),
                scales: scales.map(|s| (s & 15) as i8),
                min: half_at(block, 82),
                mins: scales.map(|s| s >> 4),
            };
            parts.block_with_mins(quants)
        }
        WeightDtype::Q3K => {
            let (low, shift) = (&block[32 + sub / 4 * 32..][..32], 2 * (sub % 4));
            for (i, q) in quants.iter_mut().enumerate() {
                let high = block[i] >> sub & 1;
                *q = (low[i] >> shift & 3 | high << 2) as i8 - 4;
            }
            let scale = |half: usize| {
                let i = 2 * sub + half;
                let low = block[96 + i % 8] >> (i / 8 * 4) & 15;
                let high = block[104 + i % 4] >> (i / 4 * 2) & 3;
                (low | high << 4) as i8 - 32
            };
            let parts =
                Parts { scale: half_at(block, 108), scales: [scale(0), scale(1)], ..Parts::default() };
            parts.block(quants)
        }
        WeightDtype::Q4K | WeightDtype::Q5K => {
            let (scale, min) = k4_scale_min(&block[4..16], sub);
            let five = dtype == WeightDtype::Q5K;
            let low = &block[if five { 48 } else { 16 } + sub / 2 * 32..][..32];
            for (i, q) in quants.iter_mut().enumerate() {
                *q = (low[i] >> (sub % 2 * 4) & 15) as i8;
                if five {
                    *q |= ((block[16 + i] >> sub & 1) << 4) as i8;
                }
            }
            let parts = Parts {
                scale: half_at(block, 0),
                scales: [scale as i8; 2],
                min: half_at(block, 2),
                mins: [min; 2],
            };
            parts.block_with_mins(quants)
        }
        WeightDtype::Q6K => {
            let (half, quarter) = (sub / 4, sub % 4);
            let low = &block[half * 64..half * 64 + 64];
            let high = &block[128 + half * 32..128 + half * 32 + 32];
            for (i, q) in quants.iter_mut().enumerate() {
                let l = low[i + 32 * (quarter % 2)];
                let l = if quarter < 2 { l & 15 } else { l >> 4 };
                let h = (high[i] >> (2 * quarter)) & 3;
                *q = ((l | (h << 4)) as i8) - 32;
            }
            let scales = [block[192 + 2 * sub] as i8, block[193 + 2 * sub] as i8];
            Parts { scale: half_at(block, 208), scales, ..Parts::default() }.block(quants)
        }
        WeightDtype::Iq4Nl => {
            table(&mut quants, &block[2..], &IQ4_VALUES);
            Block32::plain(quants, [half_at(block, 0); 2], -0.0)
        }
        WeightDtype::Iq4Xs => {
            table(&mut quants, &block[8 + sub * 16..][..16], &IQ4_VALUES);
            let low = block[4 + sub / 2] >> (sub % 2 * 4) & 15;
            let high = (u16_at(block, 2) >> (2 * sub) & 3) as u8;
            let scale = (low | high << 4) as i8 - 32;
            Parts { scale: half_at(block, 0), scales: [scale; 2], ..Parts::default() }.block(quants)
        }
        WeightDtype::Mxfp4 => {
            table(&mut quants, &block[1..], &FP4_VALUES);
            let scales = [exponent_scale(block[0]); 2];
            let parts = Parts { scales: [block[0] as i8; 2], ..Parts::default() };
            Block32 { parts, ..Block32::plain(quants, scales, -0.0) }
        }
        WeightDtype::Nvfp4 => {
            for (half, quants) in quants.chunks_exact_mut(16).enumerate() {
                for (i, byte) in block[4 + (2 * sub + half) * 8..][..8].iter().enumerate() {
                    quants[i] = FP4_VALUES[usize::from(byte & 15)];
                    quants[i + 8] = FP4_VALUES[usize::from(byte >> 4)];
                }
            }
            let scales = [float8_scale(block[2 * sub]), float8_scale(block[2 * sub + 1])];
            Block32::plain(quants, scales, -0.0)
        }
        WeightDtype::Tq1_0 => {
            for (i, q) in quants.iter_mut().enumerate() {
                let at = 32 * sub + i;
                // Five powers of 32 bytes, five of 16 bytes, four of 4 bytes.
                let (byte, power) = match at {
                    0..160 => (block[at % 32], at / 32),
                    160..240 => (block[32 + at % 16], (at - 160) / 16),
                    _ => (block[48 + at % 4], (at - 240) / 4),
                };
                let digits = byte.wrapping_mul([1, 3, 9, 27, 81][power]);
                *q = ((u16::from(digits) * 3) >> 8) as i8 - 1;
            }
            Block32::plain(quants, [half_at(block, 52); 2], -0.0)
        }
        WeightDtype::Tq2_0 => {
            for (q, byte) in quants.iter_mut().zip(&block[sub / 4 * 32..][..32]) {
                *q = (byte >> (2 * (sub % 4)) & 3) as i8 - 1;
            }
            Block32::plain(quants, [half_at(block, 64); 2], -0.0)
        }
        WeightDtype::Iq2Xxs => {
            let bits = u32_at(block, 6 + 8 * sub);
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                let index = usize::from(block[2 + 8 * sub + j]);
                quants.copy_from_slice(&vector8(IQ2_XXS + index, IQ2_VALUES));
                signed(quants, even_signs(bits >> (7 * j)));
            }
            let scale = half_at(block, 0) * (0.5 + (bits >> 28) as f32) * 0.25;
            Block32::plain(quants, [scale; 2], -0.0)
        }
        WeightDtype::Iq2Xs => {
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                let bits = u16_at(block, 2 + 8 * sub + 2 * j);
                quants.copy_from_slice(&vector8(IQ2_XS + usize::from(bits & 511), IQ2_VALUES));
                signed(quants, even_signs(u32::from(bits >> 9)));
            }
            Block32::plain(quants, iq2_scales(half_at(block, 0), block[66 + sub]), -0.0)
        }
        WeightDtype::Iq2S => {
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                let high = usize::from(block[66 + sub] >> (2 * j) & 3);
                let index = usize::from(block[2 + 4 * sub + j]) | high << 8;
                quants.copy_from_slice(&vector8(IQ2_S + index, IQ2_VALUES));
                signed(quants, block[34 + 4 * sub + j]);
            }
            Block32::plain(quants, iq2_scales(half_at(block, 0), block[74 + sub]), -0.0)
        }
        WeightDtype::Iq3Xxs => {
            let bits = u32_at(block, 66 + 4 * sub);
            for (j, quants) in quants.chunks_exact_mut(4).enumerate() {
                let index = usize::from(block[2 + 8 * sub + j]);
                quants.copy_from_slice(&vector4(IQ3_XXS + index, IQ3_XXS_VALUES));
            }
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                signed(quants, even_signs(bits >> (7 * j)));
            }
            let scale = half_at(block, 0) * (0.5 + (bits >> 28) as f32) * 0.5;
            Block32::plain(quants, [scale; 2], -0.0)
        }
        WeightDtype::Iq3S => {
            for (j, quants) in quants.chunks_exact_mut(4).enumerate() {
                let high = usize::from(block[66 + sub] >> j & 1);
                let index = usize::from(block[2 + 8 * sub + j]) | high << 8;
                quants.copy_from_slice(&vector4(IQ3_S + index, [1, 3, 5, 7, 9, 11, 13, 15]));
            }
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                signed(quants, block[74 + 4 * sub + j]);
            }
            let nibble = block[106 + sub / 2] >> (sub % 2 * 4) & 15;
            Block32::plain(quants, [half_at(block, 0) * f32::from(1 + 2 * nibble); 2], -0.0)
        }
        WeightDtype::Iq1S => {
            let bits = u16_at(block, 34 + 2 * sub);
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                let index = usize::from(block[2 + 4 * sub + j]) | usize::from(bits >> (3 * j) & 7) << 8;
                eighths(quants, index, bits & 0x8000 != 0);
            }
            let scale = half_at(block, 0) * f32::from(2 * (bits >> 12 & 7) + 1);
            Block32::plain(quants, [scale * 0.125; 2], -0.0)
        }
        WeightDtype::Iq1M => {
            let words: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + 2 * i));
            let d = words.iter().enumerate().fold(0, |d, (i, w)| d | w >> 12 << (4 * i));
            let d = f16::from_bits(d).to_f32();
            for (j, quants) in quants.chunks_exact_mut(8).enumerate() {
                let bits = block[32 + 2 * sub + j / 2] >> (j % 2 * 4);
                let index = usize::from(block[4 * sub + j]) | usize::from(bits & 7) << 8;
                eighths(quants, index, bits & 8 != 0);
            }
            let scale = |half: usize| {
                let i = 2 * sub + half;
                d * f32::from(2 * (words[i / 4] >> (i % 4 * 3) & 7) + 1) * 0.125
            };
            Block32::plain(quants, [scale(0), scale(1)], -0.0)
        }
        WeightDtype::Int4(g) => {
            let (scale, zero, stored) = group_head(g, block);
            for (i, q) in quants.iter_mut().enumerate() {
                *q = (stored[16 * sub + i / 2] >> (i % 2 * 4) & 15) as i8;
            }
            let mut zero = zero.unwrap_or(8);
            // A form of its own, which has the zero in its layout.
            if !g.zeros && !g.single {
                quants.iter_mut().for_each(|q| *q -= 8);
                zero = 0;
            }
            Block32 { zero, ..Block32::plain(quants, [scale; 2], -0.0) }
        }
        WeightDtype::Int8(g) => {
            let (scale, zero, stored) = group_head(g, block);
            for (q, byte) in quants.iter_mut().zip(&stored[32 * sub..]) {
                *q = *byte as i8;
            }
            Block32 { zero: zero.unwrap_or(0), ..Block32::plain(quants, [scale; 2], -0.0) }
        }
        WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16 | WeightDtype::Fp8(_) => {
            unreachable!("float types have no blocks")
        }
    }
}

/// Scale and zero of a group, and its values as they are stored.
pub(crate) fn group_head(g: Groups, group: &[u8]) -> (f32, Option<i8>, &[u8]) {
    let scale = match g.single {
        true => f32::from_bits(u32_at(group, 0)),
        false => half_at(group, 0),
    };
    let stored = g.head_bytes();
    (scale, g.zeros.then(|| group[stored - 1] as i8), &group[stored..])
}

/// An 8-bit float (E4M3, not NaN) divided by 256: its bits as an f16 of a larger exponent.
#[inline]
pub(crate) fn f8_part(bits: u8) -> f32 {
    let bits = u16::from(bits);
    f16::from_bits((bits & 0x7f) << 7 | (bits & 0x80) << 8).to_f32()
}

/// The value of an 8-bit float (E4M3): four bits of exponent, no infinities, NaN where all bits but the sign are set.
pub fn f8_value(bits: u8) -> f32 {
    if bits & 0x7f == 0x7f { f32::NAN } else { f8_part(bits) * 256.0 }
}

/// 32 nibbles of 16 bytes: value `i` in the low half of byte `i`, value `i + 16` in its high half.
fn nibbles(quants: &mut [i8; 32], bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        quants[i] = (byte & 15) as i8;
        quants[i + 16] = (byte >> 4) as i8;
    }
}

/// The same nibbles as indices.
fn table(quants: &mut [i8; 32], bytes: &[u8], values: &[i8; 16]) {
    nibbles(quants, bytes);
    quants.iter_mut().for_each(|q| *q = values[*q as usize]);
}

/// The scales of both halves from the nibbles of a byte.
fn iq2_scales(d: f32, byte: u8) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|s| d * (0.5 + f32::from(s)) * 0.25)
}

/// A vector of -1, 0 and 1 plus or minus an eighth, in eighths. Powers of two leave the roundings as they are.
fn eighths(quants: &mut [i8], index: usize, negative: bool) {
    quants.copy_from_slice(&vector8(IQ1 + index, [-8, 0, 8, 0]));
    quants.iter_mut().for_each(|q| *q += if negative { -1 } else { 1 });
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
                *v = f32::from_bits(u32::from(u16_at(b, 0)) << 16);
            }
        }
        WeightDtype::Fp8(g) => {
            let (len, bytes) = w.dtype.block();
            for (values, group) in out.chunks_exact_mut(len).zip(row.chunks_exact(bytes)) {
                let (scale, _, stored) = group_head(g, group);
                for (v, byte) in values.iter_mut().zip(stored) {
                    *v = scale * f8_value(*byte);
                }
            }
        }
        block_type => {
            for (b, values) in out.chunks_exact_mut(32).enumerate() {
                block32(block_type, row, b).values(values);
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

/// Signed bytes of floats.
pub(crate) fn quantized(x: &[f32]) -> Block32 {
    let mut quants = [0i8; 32];
    let scale = quantize_block(x, &mut quants);
    Block32::plain(quants, [scale; 2], -0.0)
}
