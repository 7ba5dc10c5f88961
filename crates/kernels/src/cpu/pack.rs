//! Weights repacked once at load: panels of 16 outputs, so that one register holds one step of 16 dot products.
//!
//! * Float panels: `[panel][k][16]` values in their stored type.
//! * Block panels: per panel one record per block of 32 inputs, or per super-block of 256 where blocks share a scale,
//!   so that a pass over the weight is one forward stream: first the scales and minima of the 16 outputs, as small as
//!   in the file, then the quants block by block ([`Quants`]). Groups of any number of blocks have a record each.
//! * Panels of 8-bit floats: `[panel][k][16]` bytes, then the scales of the panel: per group one, or one per output.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::pages::Pages;
use crate::pool::SendPtr;
use crate::quant::{self, Block32, FP4_VALUES, IQ4_VALUES};
use crate::{Groups, KernelError, PackMode, Pool, WeightDtype, WeightView};

/// Outputs per panel.
pub(crate) const LANES: usize = 16;

/// Version of the panels' layout, to be raised with every change of it: a copy that was kept with another one is of no
/// use. [`PackedWeight::from_kept`] does not rely on it, but then the copy is read in vain.
pub const PANEL_VERSION: u32 = 2;

/// Stored type of a float panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatKind {
    F32,
    F16,
    Bf16,
}

impl FloatKind {
    pub(crate) fn bytes(self) -> usize {
        if self == FloatKind::F32 { 4 } else { 2 }
    }
}

/// How the 32 quants of each of 16 outputs stand: rows of 64 bytes, byte `4 * output + i` for input `4 * group + i`.
///
/// A row of low bits holds as many of the eight groups as its bytes have room for, in order from the lowest bits on;
/// rows of high bits follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quants {
    /// Two rows of 2 bits for four groups.
    Two,
    /// The same, and one row with the third bit of all groups.
    Three,
    /// Four rows of 4 bits for two groups.
    Four,
    /// The same, and one row with the fifth bit of all groups.
    Five,
    /// The same, and two rows with two more bits for four groups.
    Six,
    /// Eight rows of signed bytes.
    Eight,
    /// Four rows with the high nibbles of signed bytes, 128 added; the low ones stand in a second plane behind all
    /// panels, so that the largest output can be told from one stream over half the bytes.
    Split,
    /// Four rows of 4-bit indices into [`IQ4_VALUES`].
    Iq4,
    /// Four rows of 4-bit indices into [`FP4_VALUES`].
    Fp4,
}

/// [`FP4_VALUES`] as unsigned numbers, 12 added.
pub(crate) const FP4_LEVELS: [u8; 16] = {
    let mut levels = [0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = (FP4_VALUES[i] + 12) as u8;
        i += 1;
    }
    levels
};

impl Quants {
    /// Bytes of a block of 16 outputs.
    pub(crate) const fn bytes(self) -> usize {
        64 * match self {
            Quants::Two => 2,
            Quants::Three => 3,
            Quants::Four | Quants::Iq4 | Quants::Fp4 | Quants::Split => 4,
            Quants::Five => 5,
            Quants::Six => 6,
            Quants::Eight => 8,
        }
    }

    /// Read as signed bytes; the others are numbers from zero on.
    pub(crate) const fn signed(self) -> bool {
        matches!(self, Quants::Eight | Quants::Split | Quants::Iq4)
    }

    /// Bytes of a block in the second plane.
    pub(crate) const fn low_bytes(self) -> usize {
        if matches!(self, Quants::Split) { 256 } else { 0 }
    }

    /// Largest unsigned number.
    pub(crate) const fn max(self) -> u8 {
        match self {
            Quants::Two => 3,
            Quants::Three => 7,
            Quants::Four => 15,
            Quants::Fp4 => 24,
            Quants::Five => 31,
            Quants::Six => 63,
            Quants::Eight | Quants::Split | Quants::Iq4 => 255,
        }
    }

    /// Writes a block: `groups[g]` is a row of 64 bytes, levels or indices.
    fn write(self, groups: &[[u8; 64]; 8], block: &mut [u8], low: &mut [u8]) {
        // Row `row` from the bits `mask << from` of the groups that it holds.
        let put_in = |out: &mut [u8], row: usize, held: std::ops::Range<usize>, from: usize, bits: usize| {
            let out = &mut out[row * 64..row * 64 + 64];
            let mask = (1u32 << bits) as u8 - 1;
            let first = held.start;
            for g in held {
                for (o, level) in out.iter_mut().zip(&groups[g]) {
                    *o |= (level >> from & mask) << ((g - first) * bits);
                }
            }
        };
        let mut put = |row, held, from, bits| put_in(block, row, held, from, bits);
        match self {
            Quants::Two | Quants::Three => {
                put(0, 0..4, 0, 2);
                put(1, 4..8, 0, 2);
                if self == Quants::Three {
                    put(2, 0..8, 2, 1);
                }
            }
            Quants::Four | Quants::Five | Quants::Six | Quants::Iq4 | Quants::Fp4 => {
                for row in 0..4 {
                    put(row, 2 * row..2 * row + 2, 0, 4);
                }
                match self {
                    Quants::Five => put(4, 0..8, 4, 1),
                    Quants::Six => {
                        put(4, 0..4, 4, 2);
                        put(5, 4..8, 4, 2);
                    }
                    _ => {}
                }
            }
            Quants::Eight => {
                for (out, group) in block.chunks_exact_mut(64).zip(groups) {
                    out.copy_from_slice(group);
                }
            }
            Quants::Split => {
                for row in 0..4 {
                    put(row, 2 * row..2 * row + 2, 4, 4);
                    put_in(low, row, 2 * row..2 * row + 2, 0, 4);
                }
            }
        }
    }

    /// The level or index of input `k` of an output.
    fn read(self, block: &[u8], low: &[u8], lane: usize, k: usize) -> u8 {
        let g = k / 4;
        let byte = |row: usize| block[row * 64 + lane * 4 + k % 4];
        let two = |row: usize| byte(row + g / 4) >> (g % 4 * 2) & 3;
        let four = || byte(g / 2) >> (g % 2 * 4) & 15;
        let one = |row: usize| byte(row) >> g & 1;
        match self {
            Quants::Two => two(0),
            Quants::Three => two(0) | one(2) << 2,
            Quants::Four | Quants::Iq4 | Quants::Fp4 => four(),
            Quants::Five => four() | one(4) << 4,
            Quants::Six => four() | two(4) << 4,
            Quants::Eight => byte(g),
            Quants::Split => four() << 4 | low[g / 2 * 64 + lane * 4 + k % 4] >> (g % 2 * 4) & 15,
        }
    }

    /// What is stored for a value; `zero` is added first.
    fn level(self, value: i8, zero: i32) -> u8 {
        match self {
            Quants::Iq4 => IQ4_INDICES[value as u8 as usize],
            Quants::Fp4 => FP4_INDICES[value as u8 as usize],
            Quants::Eight => value as u8,
            Quants::Split => value as u8 ^ 0x80,
            _ => (i32::from(value) + zero) as u8,
        }
    }

    fn value(self, level: u8, zero: i32) -> i8 {
        match self {
            Quants::Iq4 => IQ4_VALUES[usize::from(level)],
            Quants::Fp4 => FP4_VALUES[usize::from(level)],
            Quants::Eight => level as i8,
            Quants::Split => (level ^ 0x80) as i8,
            _ => (i32::from(level) - zero) as i8,
        }
    }
}

/// Index of each value of a table, the lowest of equal ones.
const fn inverse(table: &[i8; 16]) -> [u8; 256] {
    let mut out = [0; 256];
    let mut i = 16;
    while i > 0 {
        i -= 1;
        out[table[i] as u8 as usize] = i as u8;
    }
    out
}

const IQ4_INDICES: [u8; 256] = inverse(&IQ4_VALUES);
const FP4_INDICES: [u8; 256] = inverse(&FP4_VALUES);

/// How the head of a record looks. `x16`: one number per output, output by output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// One block: f16 scale x16, and f16 minimum x16.
    Half,
    /// One block: f16 scale x16, and byte x16: four times the length of the low nibbles, less 7.5 each, rounded up.
    HalfLength,
    /// One block: f32 scale x16, a second one for its second half.
    Single,
    /// One block: byte x16, a power of two.
    Exponent,
    /// Super-block: f16 scale x16, f16 minimum x16; per block (or half) a byte x16 that it is multiplied with; the
    /// same for the minima.
    Bytes,
    /// The same with signed bytes.
    SignedBytes,
    /// The same with a nibble for the scale and the high one for the minimum.
    Nibbles,
    /// The same with six bits, 32 added: low nibbles of both halves in a byte, then the high pairs of two blocks.
    Six,
}

/// What a block panel is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub quants: Quants,
    pub scales: Scales,
    /// Added to every quant when it is stored.
    pub zero: i32,
    /// Two scales (and minima) per block, one for each 16 inputs.
    pub halves: bool,
    pub mins: bool,
    /// A record holds a group: as many blocks as the weight says, not the layout.
    pub grouped: bool,
    /// Behind the scales stands a signed byte x16: a zero that is subtracted from every quant.
    pub zeros: bool,
}

/// The stored forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    /// The same in two planes: heads of large vocabularies.
    Q8_0Split,
    /// Ours: signed bytes with an f32 scale.
    Q8,
    /// Ours: signed bytes with two f32 scales.
    Q8Halves,
    /// Ours: -1 to 2 with an f16 scale.
    Ternary,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
    /// Groups of nibbles around 8 with an f16 scale.
    Int4,
    /// Groups of nibbles with an f16 scale and a zero.
    Int4Zeros,
    /// The same with an f32 scale.
    Int4Single,
    /// Groups of signed bytes with an f16 scale and a zero.
    Int8,
    /// The same with an f32 scale.
    Int8Single,
}

impl BlockFormat {
    pub(crate) const fn layout(self) -> Layout {
        use BlockFormat as B;
        let (quants, scales, zero) = match self {
            B::Q4_0 => (Quants::Four, Scales::Half, 8),
            B::Q4_1 => (Quants::Four, Scales::Half, 0),
            B::Q5_0 => (Quants::Five, Scales::Half, 16),
            B::Q5_1 => (Quants::Five, Scales::Half, 0),
            B::Q8_0 => (Quants::Eight, Scales::Half, 0),
            B::Q8_0Split => (Quants::Split, Scales::HalfLength, 0),
            B::Q8 | B::Q8Halves => (Quants::Eight, Scales::Single, 0),
            B::Ternary => (Quants::Two, Scales::Half, 1),
            B::Q2K => (Quants::Two, Scales::Nibbles, 0),
            B::Q3K => (Quants::Three, Scales::Six, 4),
            B::Q4K => (Quants::Four, Scales::Bytes, 0),
            B::Q5K => (Quants::Five, Scales::Bytes, 0),
            B::Q6K => (Quants::Six, Scales::SignedBytes, 32),
            B::Iq4Nl => (Quants::Iq4, Scales::Half, 0),
            B::Iq4Xs => (Quants::Iq4, Scales::SignedBytes, 0),
            B::Mxfp4 => (Quants::Fp4, Scales::Exponent, 12),
            B::Int4 => (Quants::Four, Scales::Half, 8),
            B::Int4Zeros => (Quants::Four, Scales::Half, 0),
            B::Int4Single => (Quants::Four, Scales::Single, 0),
            B::Int8 => (Quants::Eight, Scales::Half, 0),
            B::Int8Single => (Quants::Eight, Scales::Single, 0),
        };
        let halves = matches!(self, B::Q8Halves | B::Q2K | B::Q3K | B::Q6K);
        let mins = matches!(self, B::Q4_1 | B::Q5_1 | B::Q2K | B::Q4K | B::Q5K);
        let zeros = matches!(self, B::Int4Zeros | B::Int4Single | B::Int8 | B::Int8Single);
        let grouped = zeros || matches!(self, B::Int4);
        Layout { quants, scales, zero, halves, mins, grouped, zeros }
    }

    fn name(self) -> &'static str {
        match self {
            BlockFormat::Q4_0 => "Q4_0",
            BlockFormat::Q4_1 => "Q4_1",
            BlockFormat::Q5_0 => "Q5_0",
            BlockFormat::Q5_1 => "Q5_1",
            BlockFormat::Q8_0 => "Q8_0",
            BlockFormat::Q8_0Split => "Q8_0 in two planes",
            BlockFormat::Q8 => "8 bits, f32 per 32",
            BlockFormat::Q8Halves => "8 bits, f32 per 16",
            BlockFormat::Ternary => "2 bits, f16 per 32",
            BlockFormat::Q2K => "Q2_K",
            BlockFormat::Q3K => "Q3_K",
            BlockFormat::Q4K => "Q4_K",
            BlockFormat::Q5K => "Q5_K",
            BlockFormat::Q6K => "Q6_K",
            BlockFormat::Iq4Nl => "IQ4_NL",
            BlockFormat::Iq4Xs => "IQ4_XS",
            BlockFormat::Mxfp4 => "MXFP4",
            BlockFormat::Int4 => "4 bits, f16 per group",
            BlockFormat::Int4Zeros => "4 bits, f16 and zero per group",
            BlockFormat::Int4Single => "4 bits, f32 and zero per group",
            BlockFormat::Int8 => "8 bits, f16 and zero per group",
            BlockFormat::Int8Single => "8 bits, f32 and zero per group",
        }
    }

    /// The form of a stored type; of floats, the one that they are quantised to.
    fn of(dtype: WeightDtype) -> BlockFormat {
        match dtype {
            WeightDtype::Q4_0 => BlockFormat::Q4_0,
            WeightDtype::Q4_1 => BlockFormat::Q4_1,
            WeightDtype::Q5_0 => BlockFormat::Q5_0,
            WeightDtype::Q5_1 => BlockFormat::Q5_1,
            WeightDtype::Q8_0 => BlockFormat::Q8_0,
            WeightDtype::Q2K => BlockFormat::Q2K,
            WeightDtype::Q3K => BlockFormat::Q3K,
            WeightDtype::Q4K => BlockFormat::Q4K,
            WeightDtype::Q5K => BlockFormat::Q5K,
            WeightDtype::Q6K => BlockFormat::Q6K,
            WeightDtype::Iq4Nl => BlockFormat::Iq4Nl,
            WeightDtype::Iq4Xs => BlockFormat::Iq4Xs,
            WeightDtype::Mxfp4 => BlockFormat::Mxfp4,
            WeightDtype::Tq1_0 | WeightDtype::Tq2_0 => BlockFormat::Ternary,
            WeightDtype::Int4(Groups { single: true, .. }) => BlockFormat::Int4Single,
            WeightDtype::Int4(Groups { zeros: true, .. }) => BlockFormat::Int4Zeros,
            WeightDtype::Int4(_) => BlockFormat::Int4,
            WeightDtype::Int8(Groups { single: true, .. }) => BlockFormat::Int8Single,
            WeightDtype::Int8(_) => BlockFormat::Int8,
            WeightDtype::Fp8(_) => unreachable!("8-bit floats have panels of their own"),
            WeightDtype::F32
            | WeightDtype::F16
            | WeightDtype::Bf16
            | WeightDtype::Iq2Xxs
            | WeightDtype::Iq3Xxs
            | WeightDtype::Iq3S
            | WeightDtype::Iq1S => BlockFormat::Q8,
            WeightDtype::Nvfp4 | WeightDtype::Iq2Xs | WeightDtype::Iq2S | WeightDtype::Iq1M => {
                BlockFormat::Q8Halves
            }
        }
    }
}

impl Layout {
    /// Blocks of 32 inputs per record; of groups, what a weight says.
    pub(crate) const fn blocks(self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfLength | Scales::Single | Scales::Exponent => 1,
            Scales::Bytes | Scales::SignedBytes | Scales::Nibbles | Scales::Six => 8,
        }
    }

    /// Bytes of the scales of a panel, or of its minima, in [`Scales::Half`] and [`Scales::Single`].
    pub(crate) const fn vector_bytes(self) -> usize {
        LANES * if matches!(self.scales, Scales::Single) { 4 } else { 2 }
    }

    /// Where the bytes of a super-block begin.
    pub(crate) const fn bytes_at(self) -> usize {
        2 * LANES * (1 + self.mins as usize)
    }

    /// Where the bytes of block `b` stand: of its first half, with [`Layout::halves`]; the second half's follow.
    pub(crate) const fn scale_at(self, b: usize) -> usize {
        let per_block = match self.scales {
            Scales::Six => 1,
            _ => 1 + self.halves as usize,
        };
        self.bytes_at() + b * per_block * LANES
    }

    /// Where the bytes of the minimum of block `b` stand.
    pub(crate) const fn min_at(self, b: usize) -> usize {
        self.bytes_at() + (self.blocks() + b) * LANES
    }

    /// Where the high pairs of block `b` stand, in [`Scales::Six`].
    pub(crate) const fn high_at(self, b: usize) -> usize {
        self.bytes_at() + (self.blocks() + b / 2) * LANES
    }

    /// Where the quants begin; those of super-blocks on a cache line.
    pub(crate) const fn header_bytes(self) -> usize {
        let bytes = match self.scales {
            Scales::Half => self.vector_bytes() * (1 + self.mins as usize) + LANES * self.zeros as usize,
            Scales::HalfLength => self.vector_bytes() + LANES,
            Scales::Single => self.vector_bytes() * (1 + self.halves as usize) + LANES * self.zeros as usize,
            Scales::Exponent => LANES,
            Scales::Bytes | Scales::SignedBytes => {
                self.bytes_at() + 8 * LANES * (1 + self.halves as usize + self.mins as usize)
            }
            Scales::Nibbles => self.bytes_at() + 16 * LANES,
            Scales::Six => self.bytes_at() + 12 * LANES,
        };
        if self.blocks() == 1 { bytes } else { bytes.next_multiple_of(64) }
    }

    pub(crate) const fn record_bytes(self) -> usize {
        self.record_of(self.blocks())
    }

    /// Bytes of a record of so many blocks.
    pub(crate) const fn record_of(self, blocks: usize) -> usize {
        self.header_bytes() + blocks * self.quants.bytes()
    }

    /// Writes the scales of output `lane` in block `b` of a record.
    fn put_scales(self, record: &mut [u8], b: usize, lane: usize, block: &Block32) {
        fn put16(record: &mut [u8], at: usize, v: f32) {
            // Exact: the value came from an f16 of the file.
            record[at..at + 2].copy_from_slice(&half::f16::from_f32(v).to_bits().to_ne_bytes());
        }
        let parts = &block.parts;
        if self.zeros {
            record[self.vector_bytes() + lane] = block.zero as u8;
        }
        match self.scales {
            Scales::Half => {
                put16(record, lane * 2, block.scales[0]);
                if self.mins {
                    put16(record, self.vector_bytes() + lane * 2, block.mins[0]);
                }
                return;
            }
            Scales::HalfLength => {
                put16(record, lane * 2, block.scales[0]);
                record[self.vector_bytes() + lane] = low_length(&block.quants);
                return;
            }
            Scales::Single => {
                for half in 0..1 + usize::from(self.halves) {
                    let at = half * self.vector_bytes() + lane * 4;
                    record[at..at + 4].copy_from_slice(&block.scales[half].to_ne_bytes());
                }
                return;
            }
            Scales::Exponent => {
                record[lane] = parts.scales[0] as u8;
                return;
            }
            Scales::Bytes | Scales::SignedBytes => {
                record[self.scale_at(b) + lane] = parts.scales[0] as u8;
                if self.halves {
                    record[self.scale_at(b) + LANES + lane] = parts.scales[1] as u8;
                }
                if self.mins {
                    record[self.min_at(b) + lane] = parts.mins[0];
                }
            }
            Scales::Nibbles => {
                for half in 0..2 {
                    record[self.scale_at(b) + half * LANES + lane] =
                        parts.scales[half] as u8 | parts.mins[half] << 4;
                }
            }
            Scales::Six => {
                for half in 0..2 {
                    let six = (parts.scales[half] + 32) as u8;
                    record[self.scale_at(b) + lane] |= (six & 15) << (4 * half);
                    record[self.high_at(b) + lane] |= six >> 4 << (b % 2 * 4 + 2 * half);
                }
            }
        }
        put16(record, lane * 2, parts.scale);
        if self.mins {
            put16(record, 2 * LANES + lane * 2, parts.min);
        }
    }

    /// The zero of output `lane` in a record.
    fn lane_zero(self, record: &[u8], lane: usize) -> i8 {
        if self.zeros { record[self.vector_bytes() + lane] as i8 } else { 0 }
    }

    /// Scales and minima of output `lane` in block `b` of a record: those of [`Block32`].
    fn scales(self, record: &[u8], b: usize, lane: usize) -> [[f32; 2]; 2] {
        let f16_at = |at: usize| half::f16::from_ne_bytes([record[at], record[at + 1]]).to_f32();
        let none = [-0.0; 2];
        let byte = |half: usize| record[self.scale_at(b) + half * LANES + lane];
        let second = usize::from(self.halves);
        let scaled = |factors: [i8; 2]| factors.map(|s| f16_at(lane * 2) * f32::from(s));
        let min = |factors: [u8; 2]| factors.map(|m| -(f16_at(2 * LANES + lane * 2) * f32::from(m)));
        match self.scales {
            Scales::Half => {
                let mins = if self.mins { [f16_at(self.vector_bytes() + lane * 2); 2] } else { none };
                [[f16_at(lane * 2); 2], mins]
            }
            Scales::HalfLength => [[f16_at(lane * 2); 2], none],
            Scales::Single => {
                let scale = |half: usize| {
                    let at = half * self.vector_bytes() + lane * 4;
                    f32::from_ne_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
                };
                [[scale(0), scale(second)], none]
            }
            Scales::Exponent => [[quant::exponent_scale(record[lane]); 2], none],
            Scales::Bytes | Scales::SignedBytes => {
                let scales = scaled([byte(0) as i8, byte(second) as i8]);
                [scales, if self.mins { min([record[self.min_at(b) + lane]; 2]) } else { none }]
            }
            Scales::Nibbles => {
                [scaled([0, 1].map(|h| (byte(h) & 15) as i8)), min([0, 1].map(|h| byte(h) >> 4))]
            }
            Scales::Six => {
                let high = record[self.high_at(b) + lane] >> (b % 2 * 4);
                let six = |half: usize| (byte(0) >> (4 * half) & 15 | (high >> (2 * half) & 3) << 4) as i8;
                [scaled([six(0) - 32, six(1) - 32]), none]
            }
        }
    }
}

/// Four times the length of the low nibbles of a block, less 7.5 each, rounded up.
fn low_length(quants: &[i8; 32]) -> u8 {
    // Twice the numbers: odd ones from -15 to 15.
    let squares: u32 = quants
        .iter()
        .map(|q| {
            let twice = 2 * i32::from(*q as u8 & 15) - 15;
            (twice * twice) as u32
        })
        .sum();
    // At most 2 sqrt(32 * 15^2) = 169.7.
    (2.0 * f64::from(squares).sqrt()).ceil() as u8
}

/// Outputs from which a Q8_0 weight is worth two planes: vocabularies.
const SPLIT_OUTPUTS: usize = 16384;

#[derive(Clone, Copy)]
pub(crate) enum Body {
    Float(FloatKind),
    Block(BlockFormat),
    /// 8-bit floats.
    Fp8 {
        /// Scales of a group: one, or one per output of the panel.
        scales: usize,
    },
}

impl Body {
    /// `group`: values of a group, where the body does not know.
    fn panel_bytes(&self, in_features: usize, group: usize) -> usize {
        match self {
            Body::Float(kind) => in_features * LANES * kind.bytes(),
            Body::Block(format) => {
                let layout = format.layout();
                let blocks = if layout.grouped { group / 32 } else { layout.blocks() };
                in_features / (32 * blocks) * layout.record_of(blocks)
            }
            Body::Fp8 { scales } => in_features * LANES + in_features / group * scales * 4,
        }
    }

    /// Bytes of a panel in the second plane.
    fn low_bytes(&self, in_features: usize) -> usize {
        match self {
            Body::Float(_) | Body::Fp8 { .. } => 0,
            Body::Block(format) => in_features / 32 * format.layout().quants.low_bytes(),
        }
    }
}

/// When to ask the first plane alone: states of which it tells too little come in runs, so after each of them more
/// calls do without, and after each that it decided fewer. This changes the time of a call, never what it gives.
#[derive(Default)]
pub(crate) struct Doubts {
    skip: AtomicU32,
    penalty: AtomicU32,
}

impl Doubts {
    const MOST: u32 = 63;

    /// Whether this call should try.
    pub(crate) fn worth_a_try(&self) -> bool {
        let skip = self.skip.load(Ordering::Relaxed);
        self.skip.store(skip.saturating_sub(1), Ordering::Relaxed);
        skip == 0
    }

    /// What a try came to.
    pub(crate) fn tell(&self, decided: bool) {
        // A vain try costs about twice what another one saves.
        let penalty = self.penalty.load(Ordering::Relaxed);
        let penalty = if decided { penalty / 2 } else { penalty * 2 + 3 };
        self.penalty.store(penalty.min(Self::MOST), Ordering::Relaxed);
        self.skip.store(penalty.min(Self::MOST), Ordering::Relaxed);
    }
}

/// Writes a panel: its first output, its bytes and those in the second plane.
type FillPanel<'a> = dyn Fn(usize, &mut [u8], &mut [u8]) + Sync + 'a;

/// Bytes that others keep in memory, such as a mapped file.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Panels that were kept when a weight was packed: what [`PackedWeight::form`], [`PackedWeight::largest_scale`] and
/// [`PackedWeight::panel_bytes_all`] gave then.
pub struct KeptPanels<'a> {
    /// Name of the stored form.
    pub form: &'a str,
    /// Largest scale of a weight in two planes, else 0.
    pub largest_scale: f32,
    /// Where the panels are.
    pub bytes: SharedBytes,
    /// The panels' place in `bytes`.
    pub range: Range<usize>,
}

/// Where the panels are.
enum Data {
    Own(Pages),
    Shared(SharedBytes, Range<usize>),
}

/// A weight in panel layout.
pub struct PackedWeight {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) body: Body,
    /// Values of a group that shares a scale, where the type leaves that open.
    pub(crate) group: usize,
    /// Where column `k` does not belong to input `k`: the input that it belongs to.
    pub(crate) order: Option<Box<[u32]>>,
    /// Largest scale of a weight in two planes.
    pub(crate) largest_scale: f32,
    /// Whether the first plane of two was enough lately.
    pub(crate) doubts: Doubts,
    data: Data,
}

impl PackedWeight {
    /// Rows of the weight.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the weight.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// In what form it stands in memory: the name of a stored type, or of what was made of one.
    pub fn form(&self) -> &'static str {
        match self.body {
            Body::Float(FloatKind::F32) => "F32",
            Body::Float(FloatKind::F16) => "F16",
            Body::Float(FloatKind::Bf16) => "BF16",
            Body::Block(format) => format.name(),
            Body::Fp8 { .. } => "FP8, f32 per group",
        }
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.data().len()
    }

    /// All panels, to be kept for a later [`PackedWeight::from_kept`].
    pub fn panel_bytes_all(&self) -> &[u8] {
        self.data()
    }

    /// Largest scale of a weight in two planes, else 0.
    pub fn largest_scale(&self) -> f32 {
        self.largest_scale
    }

    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    pub(crate) fn data(&self) -> &[u8] {
        match &self.data {
            Data::Own(pages) => pages,
            Data::Shared(bytes, range) => &bytes.as_ref().as_ref()[range.clone()],
        }
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.body.panel_bytes(self.in_features, self.group)
    }

    /// Blocks of 32 inputs per record.
    pub(crate) fn record_blocks(&self) -> usize {
        match self.body {
            Body::Block(format) if !format.layout().grouped => format.layout().blocks(),
            _ => self.group / 32,
        }
    }

    /// Bytes of a panel in the second plane.
    pub(crate) fn low_bytes(&self) -> usize {
        self.body.low_bytes(self.in_features)
    }

    /// The second plane from a panel on.
    pub(crate) fn low(&self, panel: usize) -> &[u8] {
        &self.data()[self.panels() * self.panel_bytes() + panel * self.low_bytes()..]
    }

    /// Lets `fill` write every panel of a weight.
    fn fill(
        pool: &Pool,
        w: &WeightView<'_>,
        body: Body,
        largest_scale: f32,
        fill: &FillPanel<'_>,
    ) -> PackedWeight {
        let group = w.dtype.block().0;
        let (panel_bytes, low_bytes) =
            (body.panel_bytes(w.in_features, group), body.low_bytes(w.in_features));
        let panels = w.out_features.div_ceil(LANES);
        let mut pages = Pages::new(panels * (panel_bytes + low_bytes));
        let data = SendPtr(pages.as_mut_ptr());
        // Panels in runs, so that a task writes whole pages.
        let run = panels.div_ceil(pool.threads() * 4).max(1);
        pool.run(panels.div_ceil(run), &|task| {
            for panel in task * run..((task + 1) * run).min(panels) {
                // SAFETY: panel `panel` lies inside the data, in both planes; tasks take disjoint panels.
                let (bytes, low) = unsafe {
                    let low = data.get().add(panels * panel_bytes + panel * low_bytes);
                    (
                        std::slice::from_raw_parts_mut(data.get().add(panel * panel_bytes), panel_bytes),
                        std::slice::from_raw_parts_mut(low, low_bytes),
                    )
                };
                fill(panel * LANES, bytes, low);
            }
        });
        PackedWeight {
            out_features: w.out_features,
            in_features: w.in_features,
            body,
            group,
            order: None,
            largest_scale,
            doubts: Doubts::default(),
            data: Data::Own(pages),
        }
    }

    /// What a weight becomes; of a head that may stand in two planes, the form in one.
    fn body(w: &WeightView<'_>, mode: PackMode) -> Body {
        let blocks = match (mode, w.dtype) {
            (PackMode::F32, _) => false,
            (_, WeightDtype::Fp8(groups)) => return Body::Fp8 { scales: fp8_scales(w, groups) },
            (PackMode::Stored, WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16) => false,
            (PackMode::Stored, _) => true,
            // Rows that are not whole blocks stay floats.
            (PackMode::Q8, _) => w.in_features.is_multiple_of(32),
        };
        match (blocks, mode, w.dtype) {
            (true, ..) => Body::Block(BlockFormat::of(w.dtype)),
            (false, PackMode::Stored, WeightDtype::F16) => Body::Float(FloatKind::F16),
            (false, PackMode::Stored, WeightDtype::Bf16) => Body::Float(FloatKind::Bf16),
            (false, ..) => Body::Float(FloatKind::F32),
        }
    }

    pub(crate) fn pack(
        pool: &Pool,
        name: &str,
        w: &WeightView<'_>,
        mode: PackMode,
    ) -> Result<PackedWeight, KernelError> {
        w.check(name)?;
        let mut body = Self::body(w, mode);
        let mut largest_scale = None;
        if may_split(&body, w) {
            largest_scale = largest_q8_0_scale(pool, w);
            if largest_scale.is_some() {
                body = Body::Block(BlockFormat::Q8_0Split);
            }
        }
        let largest_scale = largest_scale.unwrap_or_default();
        Ok(match body {
            Body::Float(kind) => {
                Self::fill(pool, w, body, 0.0, &|first, panel, _| fill_floats(w, kind, first, panel))
            }
            Body::Block(format) => Self::fill(pool, w, body, largest_scale, &|first, panel, low| {
                fill_blocks(w, format, first, panel, low);
            }),
            Body::Fp8 { scales } => {
                Self::fill(pool, w, body, 0.0, &|first, panel, _| fill_fp8(w, scales, first, panel))
            }
        })
    }

    /// The weight from panels that were kept when it was packed before, in place of packing it again.
    ///
    /// `None` if they are not what packing gives: another form or length, or other bytes in one of three panels
    /// (the first, the last, one between) that are packed anew for this. That the rest is whole is for who keeps them.
    /// The columns are in the order of the inputs: a weight with another order is not for this.
    ///
    /// # Errors
    /// As of packing: a weight whose bytes do not fit its shape.
    pub fn from_kept(
        name: &str,
        w: &WeightView<'_>,
        mode: PackMode,
        kept: &KeptPanels<'_>,
    ) -> Result<Option<PackedWeight>, KernelError> {
        w.check(name)?;
        let mut body = Self::body(w, mode);
        if may_split(&body, w) && kept.form == BlockFormat::Q8_0Split.name() {
            body = Body::Block(BlockFormat::Q8_0Split);
        }
        let is_split = matches!(body, Body::Block(BlockFormat::Q8_0Split));
        let scale_fits = if is_split {
            kept.largest_scale.is_finite() && kept.largest_scale >= 0.0
        } else {
            kept.largest_scale == 0.0
        };
        let panels = w.out_features.div_ceil(LANES);
        let group = w.dtype.block().0;
        let (panel_bytes, low_bytes) =
            (body.panel_bytes(w.in_features, group), body.low_bytes(w.in_features));
        let bytes = kept.bytes.as_ref().as_ref().get(kept.range.clone());
        let fits = bytes.is_some_and(|b| {
            b.len() == panels * (panel_bytes + low_bytes) && b.as_ptr().addr().is_multiple_of(64)
        });
        if !fits || !scale_fits {
            return Ok(None);
        }
        let packed = PackedWeight {
            out_features: w.out_features,
            in_features: w.in_features,
            body,
            group,
            order: None,
            largest_scale: kept.largest_scale,
            doubts: Doubts::default(),
            data: Data::Shared(Arc::clone(&kept.bytes), kept.range.clone()),
        };
        let same = packed.form() == kept.form
            && [0, panels / 2, panels - 1].iter().all(|p| packed.is_panel_of(w, *p));
        Ok(same.then_some(packed))
    }

    /// Whether a panel is what packing the weight gives.
    fn is_panel_of(&self, w: &WeightView<'_>, panel: usize) -> bool {
        let (panel_bytes, low_bytes) = (self.panel_bytes(), self.low_bytes());
        let (mut bytes, mut low) = (vec![0; panel_bytes], vec![0; low_bytes]);
        match self.body {
            Body::Float(kind) => fill_floats(w, kind, panel * LANES, &mut bytes),
            Body::Block(format) => fill_blocks(w, format, panel * LANES, &mut bytes, &mut low),
            Body::Fp8 { scales } => fill_fp8(w, scales, panel * LANES, &mut bytes),
        }
        bytes == self.data()[panel * panel_bytes..][..panel_bytes] && low == self.low(panel)[..low_bytes]
    }

    /// Row `o` as f32, the same values that [`quant::dequantize_row`] gives for the stored weight.
    pub(crate) fn row(&self, o: usize, out: &mut [f32]) {
        match &self.order {
            None => self.columns(o, out),
            Some(order) => {
                let mut columns = vec![0.0; out.len()];
                self.columns(o, &mut columns);
                order.iter().zip(columns).for_each(|(input, v)| out[*input as usize] = v);
            }
        }
    }

    /// Row `o` in the order of the columns.
    fn columns(&self, o: usize, out: &mut [f32]) {
        let panel = &self.data()[o / LANES * self.panel_bytes()..(o / LANES + 1) * self.panel_bytes()];
        let lane = o % LANES;
        match self.body {
            Body::Float(kind) => {
                for (k, v) in out.iter_mut().enumerate() {
                    let at = (k * LANES + lane) * kind.bytes();
                    let two = [panel[at], panel[at + 1]];
                    *v = match kind {
                        FloatKind::F32 => f32::from_ne_bytes([two[0], two[1], panel[at + 2], panel[at + 3]]),
                        FloatKind::F16 => half::f16::from_ne_bytes(two).to_f32(),
                        FloatKind::Bf16 => f32::from_bits(u32::from(u16::from_ne_bytes(two)) << 16),
                    };
                }
            }
            Body::Block(format) => {
                let layout = format.layout();
                let low_bytes = layout.quants.low_bytes();
                let low = self.low(o / LANES);
                let per_record = self.record_blocks();
                let record_bytes = layout.record_of(per_record);
                for (b, values) in out.chunks_exact_mut(32).enumerate() {
                    let (record, sub) = (b / per_record, b % per_record);
                    let record = &panel[record * record_bytes..][..record_bytes];
                    let [scales, mins] = layout.scales(record, sub, lane);
                    let zero = i16::from(layout.lane_zero(record, lane));
                    let quants = &record[layout.header_bytes() + sub * layout.quants.bytes()..];
                    for (k, v) in values.iter_mut().enumerate() {
                        let level = layout.quants.read(quants, &low[b * low_bytes..], lane, k);
                        let q = layout.quants.value(level, layout.zero);
                        *v = scales[k / 16] * f32::from(i16::from(q) - zero) + mins[k / 16];
                    }
                }
            }
            Body::Fp8 { scales } => {
                let (values, heads) = panel.split_at(self.in_features * LANES);
                for (k, v) in out.iter_mut().enumerate() {
                    let at = (k / self.group * scales + lane % scales) * 4;
                    let scale = f32::from_ne_bytes([heads[at], heads[at + 1], heads[at + 2], heads[at + 3]]);
                    *v = scale * quant::f8_value(values[k * LANES + lane]);
                }
            }
        }
    }
}

/// Whether a weight may stand in two planes.
fn may_split(body: &Body, w: &WeightView<'_>) -> bool {
    matches!(body, Body::Block(BlockFormat::Q8_0)) && w.out_features >= SPLIT_OUTPUTS
}

/// Writes the float panel of the outputs from `first` on.
fn fill_floats(w: &WeightView<'_>, kind: FloatKind, first: usize, panel: &mut [u8]) {
    let (in_features, size) = (w.in_features, kind.bytes());
    let mut row = vec![0.0f32; if kind == FloatKind::F32 { in_features } else { 0 }];
    for (lane, o) in (first..w.out_features.min(first + LANES)).enumerate() {
        if kind == FloatKind::F32 {
            quant::dequantize_row(w, o, &mut row);
            for (k, v) in row.iter().enumerate() {
                let at = (k * LANES + lane) * 4;
                panel[at..at + 4].copy_from_slice(&v.to_ne_bytes());
            }
        } else {
            let stored = &w.data[o * w.row_bytes()..(o + 1) * w.row_bytes()];
            for (k, v) in stored.chunks_exact(size).enumerate() {
                let at = (k * LANES + lane) * size;
                panel[at..at + size].copy_from_slice(v);
            }
        }
    }
}

/// Scales of a group in a panel of 8-bit floats: one if all outputs of every panel have the same, else one each.
fn fp8_scales(w: &WeightView<'_>, groups: Groups) -> usize {
    let (len, bytes) = w.dtype.block();
    let row_bytes = w.row_bytes();
    let scale = |o: usize, g: usize| quant::group_head(groups, &w.data[o * row_bytes + g * bytes..]).0;
    // Blocks of a matrix are higher than a panel: all of its outputs have the scales of the first.
    let alike = |o: usize| {
        let first = o / LANES * LANES;
        (0..w.in_features / len).all(|g| scale(o, g).to_bits() == scale(first, g).to_bits())
    };
    if (0..w.out_features).all(alike) { 1 } else { LANES }
}

/// Writes the panel of 8-bit floats of the outputs from `first` on, zeroed before.
fn fill_fp8(w: &WeightView<'_>, scales: usize, first: usize, panel: &mut [u8]) {
    let WeightDtype::Fp8(groups) = w.dtype else { unreachable!("only 8-bit floats become such a panel") };
    let (len, bytes) = w.dtype.block();
    let row_bytes = w.row_bytes();
    let (values, heads) = panel.split_at_mut(w.in_features * LANES);
    for (lane, o) in (first..w.out_features.min(first + LANES)).enumerate() {
        for g in 0..w.in_features / len {
            let group = &w.data[o * row_bytes + g * bytes..][..bytes];
            let (scale, _, stored) = quant::group_head(groups, group);
            for (k, byte) in stored.iter().enumerate() {
                values[(g * len + k) * LANES + lane] = *byte;
            }
            if lane < scales {
                let at = (g * scales + lane) * 4;
                heads[at..at + 4].copy_from_slice(&scale.to_ne_bytes());
            }
        }
    }
}

/// Writes the block panel of the outputs from `first` on, zeroed before, and its part of the second plane.
fn fill_blocks(w: &WeightView<'_>, format: BlockFormat, first: usize, panel: &mut [u8], low: &mut [u8]) {
    let layout = format.layout();
    let per_record = if layout.grouped { w.dtype.block().0 / 32 } else { layout.blocks() };
    let is_float = w.dtype.block().0 == 1;
    let row_bytes = w.row_bytes();
    let lanes = LANES.min(w.out_features - first);
    let mut values = vec![0.0f32; if is_float { lanes * w.in_features } else { 0 }];
    if is_float {
        for (lane, row) in values.chunks_exact_mut(w.in_features).enumerate() {
            quant::dequantize_row(w, first + lane, row);
        }
    }
    let stored = &w.data[first * row_bytes..(first + lanes) * row_bytes];
    for (at, record) in panel.chunks_exact_mut(layout.record_of(per_record)).enumerate() {
        for sub in 0..per_record {
            let b = at * per_record + sub;
            // Outputs that are not there stay zero.
            let mut groups = [[0u8; 64]; 8];
            for lane in 0..lanes {
                let block = if is_float {
                    quant::quantized(&values[lane * w.in_features + b * 32..][..32])
                } else {
                    quant::block32(w.dtype, &stored[lane * row_bytes..(lane + 1) * row_bytes], b)
                };
                layout.put_scales(record, sub, lane, &block);
                for (group, quants) in groups.iter_mut().zip(block.quants.chunks_exact(4)) {
                    for (byte, q) in group[lane * 4..lane * 4 + 4].iter_mut().zip(quants) {
                        *byte = layout.quants.level(*q, layout.zero);
                    }
                }
            }
            let quants = layout.header_bytes() + sub * layout.quants.bytes();
            let low_bytes = layout.quants.low_bytes();
            layout.quants.write(
                &groups,
                &mut record[quants..quants + layout.quants.bytes()],
                &mut low[b * low_bytes..(b + 1) * low_bytes],
            );
        }
    }
}

/// The largest scale of a Q8_0 weight; `None` if one is negative or no number, which a bound does not cover.
fn largest_q8_0_scale(pool: &Pool, w: &WeightView<'_>) -> Option<f32> {
    // Bits of numbers from zero on are in the order of the numbers, and infinities and NaN come after them.
    let largest = AtomicU32::new(0);
    let run = w.data.len().div_ceil(pool.threads() * 4).next_multiple_of(34).max(34);
    pool.run(w.data.len().div_ceil(run), &|task| {
        let part = &w.data[task * run..((task + 1) * run).min(w.data.len())];
        let max = part.chunks_exact(34).map(|b| u16::from_le_bytes([b[0], b[1]])).max().unwrap_or(0);
        largest.fetch_max(u32::from(max), Ordering::Relaxed);
    });
    let bits = largest.into_inner() as u16;
    (bits < 0x7c00).then(|| half::f16::from_bits(bits).to_f32())
}
