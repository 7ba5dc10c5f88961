//! Weights repacked once at load: panels of 16 outputs, so that one register holds one step of 16 dot products.
//!
//! * Float panels: `[panel][k][16]` values in their stored type.
//! * Block panels: per panel and block of 32 inputs one record `[scales x16][minima x16][quants]`, so that a pass
//!   over the weight is one forward stream. Quants are `[k / 4][16 outputs][4 inputs]`; 4-bit ones hold group
//!   `2j` in the low and `2j + 1` in the high nibbles.

use super::pages::Pages;
use crate::pool::SendPtr;
use crate::quant::{self, Block32};
use crate::{KernelError, PackMode, Pool, WeightDtype, WeightView};

/// Outputs per panel.
pub(crate) const LANES: usize = 16;

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

/// How the records of a block panel look: `[scales][second scales][minima][quants]`, what a format has of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockFormat {
    Q4_0,
    Q4_1,
    Q8_0,
    /// Ours: signed bytes with an f32 scale.
    Q8,
    Q4K,
    Q6K,
}

impl BlockFormat {
    /// 4-bit quants, else signed 8-bit.
    pub(crate) const fn four_bit(self) -> bool {
        matches!(self, BlockFormat::Q4_0 | BlockFormat::Q4_1 | BlockFormat::Q4K)
    }

    /// Scales and minima are f16, else f32.
    pub(crate) const fn half(self) -> bool {
        matches!(self, BlockFormat::Q4_0 | BlockFormat::Q4_1 | BlockFormat::Q8_0)
    }

    /// Two scales per block (groups of 16), else one.
    pub(crate) const fn two_scales(self) -> bool {
        matches!(self, BlockFormat::Q6K)
    }

    /// Minima present.
    pub(crate) const fn mins(self) -> bool {
        matches!(self, BlockFormat::Q4_1 | BlockFormat::Q4K)
    }

    /// Added to every quant when it is stored.
    pub(crate) const fn zero(self) -> i32 {
        if matches!(self, BlockFormat::Q4_0) { 8 } else { 0 }
    }

    /// Bytes of the scales of a panel, or of its minima.
    pub(crate) const fn vector_bytes(self) -> usize {
        LANES * if self.half() { 2 } else { 4 }
    }

    /// Where the minima begin.
    pub(crate) const fn min_at(self) -> usize {
        (1 + self.two_scales() as usize) * self.vector_bytes()
    }

    /// Where the quants begin.
    pub(crate) const fn header_bytes(self) -> usize {
        self.min_at() + self.mins() as usize * self.vector_bytes()
    }

    pub(crate) const fn record_bytes(self) -> usize {
        self.header_bytes() + if self.four_bit() { 256 } else { 512 }
    }
}

pub(crate) enum Body {
    Float(FloatKind),
    Block(BlockFormat),
}

impl Body {
    fn panel_bytes(&self, in_features: usize) -> usize {
        match self {
            Body::Float(kind) => in_features * LANES * kind.bytes(),
            Body::Block(format) => in_features / 32 * format.record_bytes(),
        }
    }
}

/// A weight in panel layout.
pub struct PackedWeight {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) body: Body,
    data: Pages,
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

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.body.panel_bytes(self.in_features)
    }

    fn new(out_features: usize, in_features: usize, body: Body) -> PackedWeight {
        let data = Pages::new(out_features.div_ceil(LANES) * body.panel_bytes(in_features));
        PackedWeight { out_features, in_features, body, data }
    }

    pub(crate) fn pack(
        pool: &Pool,
        name: &str,
        w: &WeightView<'_>,
        mode: PackMode,
    ) -> Result<PackedWeight, KernelError> {
        w.check(name)?;
        let blocks = match (mode, w.dtype) {
            (PackMode::F32, _) => false,
            (PackMode::Stored, WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16) => false,
            (PackMode::Stored, _) => true,
            // Rows that are not whole blocks stay floats.
            (PackMode::Q8, _) => w.in_features.is_multiple_of(32),
        };
        Ok(if blocks { Self::pack_blocks(pool, w) } else { Self::pack_floats(pool, w, mode) })
    }

    /// Lets `fill` write every panel: its first output and its bytes.
    fn fill_panels(&mut self, pool: &Pool, fill: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        let (panels, panel_bytes) = (self.panels(), self.panel_bytes());
        let data = SendPtr(self.data.as_mut_ptr());
        // Panels in runs, so that a task writes whole pages.
        let run = panels.div_ceil(pool.threads() * 4).max(1);
        pool.run(panels.div_ceil(run), &|task| {
            for panel in task * run..((task + 1) * run).min(panels) {
                // SAFETY: panel `panel` lies inside the data; tasks take disjoint panels.
                let bytes = unsafe {
                    std::slice::from_raw_parts_mut(data.get().add(panel * panel_bytes), panel_bytes)
                };
                fill(panel * LANES, bytes);
            }
        });
    }

    fn pack_floats(pool: &Pool, w: &WeightView<'_>, mode: PackMode) -> PackedWeight {
        let kind = match (mode, w.dtype) {
            (PackMode::Stored, WeightDtype::F16) => FloatKind::F16,
            (PackMode::Stored, WeightDtype::Bf16) => FloatKind::Bf16,
            _ => FloatKind::F32,
        };
        let mut packed = PackedWeight::new(w.out_features, w.in_features, Body::Float(kind));
        let (in_features, size) = (w.in_features, kind.bytes());
        packed.fill_panels(pool, &|first, panel| {
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
        });
        packed
    }

    fn pack_blocks(pool: &Pool, w: &WeightView<'_>) -> PackedWeight {
        let format = match w.dtype {
            WeightDtype::Q4_0 => BlockFormat::Q4_0,
            WeightDtype::Q4_1 => BlockFormat::Q4_1,
            WeightDtype::Q8_0 => BlockFormat::Q8_0,
            WeightDtype::Q4K => BlockFormat::Q4K,
            WeightDtype::Q6K => BlockFormat::Q6K,
            WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16 => BlockFormat::Q8,
        };
        let is_float = w.dtype.block().0 == 1;
        let mut packed = PackedWeight::new(w.out_features, w.in_features, Body::Block(format));
        let record_bytes = format.record_bytes();
        packed.fill_panels(pool, &|first, panel| {
            let mut values = vec![0.0f32; if is_float { w.in_features } else { 0 }];
            for (lane, o) in (first..w.out_features.min(first + LANES)).enumerate() {
                if is_float {
                    quant::dequantize_row(w, o, &mut values);
                }
                let stored = &w.data[o * w.row_bytes()..(o + 1) * w.row_bytes()];
                for b in 0..w.in_features / 32 {
                    let block = if is_float {
                        let mut quants = [0i8; 32];
                        let scale = quant::quantize_block(&values[b * 32..b * 32 + 32], &mut quants);
                        Block32 { quants, scales: [scale; 2], min: 0.0 }
                    } else {
                        quant::block32(w.dtype, stored, b)
                    };
                    let record = &mut panel[b * record_bytes..(b + 1) * record_bytes];
                    let mut put = |at: usize, v: f32| {
                        if format.half() {
                            let slot = at + lane * 2;
                            // Exact: the value came from an f16 of the file.
                            record[slot..slot + 2]
                                .copy_from_slice(&half::f16::from_f32(v).to_bits().to_ne_bytes());
                        } else {
                            let slot = at + lane * 4;
                            record[slot..slot + 4].copy_from_slice(&v.to_ne_bytes());
                        }
                    };
                    put(0, block.scales[0]);
                    if format.two_scales() {
                        put(format.vector_bytes(), block.scales[1]);
                    }
                    if format.mins() {
                        put(format.min_at(), block.min);
                    }
                    let quants = &mut record[format.header_bytes()..];
                    for (k, q) in block.quants.iter().enumerate() {
                        let (group, i) = (k / 4, k % 4);
                        if format.four_bit() {
                            let byte = (i32::from(*q) + format.zero()) as u8;
                            quants[group / 2 * 64 + lane * 4 + i] |= byte << (group % 2 * 4);
                        } else {
                            quants[group * 64 + lane * 4 + i] = *q as u8;
                        }
                    }
                }
            }
        });
        packed
    }

    /// Row `o` as f32, the same values that [`quant::dequantize_row`] gives for the stored weight.
    pub(crate) fn row(&self, o: usize, out: &mut [f32]) {
        let panel = &self.data()[o / LANES * self.panel_bytes()..(o / LANES + 1) * self.panel_bytes()];
        let lane = o % LANES;
        let f16_at = |bytes: &[u8], at: usize| half::f16::from_ne_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let f32_at = |b: &[u8], at: usize| f32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        match self.body {
            Body::Float(kind) => {
                for (k, v) in out.iter_mut().enumerate() {
                    let at = (k * LANES + lane) * kind.bytes();
                    *v = match kind {
                        FloatKind::F32 => f32_at(panel, at),
                        FloatKind::F16 => f16_at(panel, at),
                        FloatKind::Bf16 => half::bf16::from_ne_bytes([panel[at], panel[at + 1]]).to_f32(),
                    };
                }
            }
            Body::Block(format) => {
                let record_bytes = format.record_bytes();
                for (b, values) in out.chunks_exact_mut(32).enumerate() {
                    let record = &panel[b * record_bytes..(b + 1) * record_bytes];
                    let get = |at: usize| {
                        if format.half() {
                            f16_at(record, at + lane * 2)
                        } else {
                            f32_at(record, at + lane * 4)
                        }
                    };
                    let second = if format.two_scales() { format.vector_bytes() } else { 0 };
                    let scales = [get(0), get(second)];
                    let min = if format.mins() { get(format.min_at()) } else { 0.0 };
                    let quants = &record[format.header_bytes()..];
                    for (k, v) in values.iter_mut().enumerate() {
                        let (group, i) = (k / 4, k % 4);
                        let q = if format.four_bit() {
                            let byte = quants[group / 2 * 64 + lane * 4 + i];
                            i32::from(byte >> (group % 2 * 4) & 15) - format.zero()
                        } else {
                            i32::from(quants[group * 64 + lane * 4 + i] as i8)
                        };
                        *v = scales[k / 16] * q as f32 + min;
                    }
                }
            }
        }
    }
}
