//! Weights of decoding as they stand on the device: the file's own blocks where the kernels unpack them, floats otherwise.

use std::sync::PoisonError;

use draftsmith_kernels::{KernelError, PackMode, WeightDtype, WeightView, quant};
use half::{bf16, f16};

use crate::launcher::{Arg, At, Launcher};
use crate::memory::{Block, Buf};
use crate::ops::{BLOCKS_Y, Cuda, Operands, THREADS};

/// Rows up to which products take tiles of 16 rows.
const FEW_ROWS: usize = 32;
/// Values that share a scale in Q8_0.
const Q8_BLOCK: usize = 32;

/// A stored type that the kernels read, with their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stored {
    embed: &'static str,
    exact: &'static str,
    few: &'static str,
    many: &'static str,
    /// Values and words of 16 bits of a block.
    block: (usize, usize),
}

macro_rules! stored {
    ($name:literal, $values:literal, $words:literal) => {
        Stored {
            embed: concat!("embed_", $name),
            exact: concat!("multiply_", $name),
            few: concat!("multiply_", $name, "_16"),
            many: concat!("multiply_", $name, "_64"),
            block: ($values, $words),
        }
    };
}

const F32: Stored = stored!("f32", 1, 2);
const BF16: Stored = stored!("bf16", 1, 1);
const Q8_0: Stored = stored!("q8_0", 32, 17);

impl Stored {
    /// The type as it is in the file, if the kernels read that.
    fn of(dtype: WeightDtype) -> Option<Stored> {
        Some(match dtype {
            WeightDtype::F32 => F32,
            WeightDtype::F16 => stored!("f16", 1, 1),
            WeightDtype::Bf16 => BF16,
            WeightDtype::Q4_0 => stored!("q4_0", 32, 9),
            WeightDtype::Q4_1 => stored!("q4_1", 32, 10),
            WeightDtype::Q5_0 => stored!("q5_0", 32, 11),
            WeightDtype::Q5_1 => stored!("q5_1", 32, 12),
            WeightDtype::Q8_0 => Q8_0,
            WeightDtype::Q4K => stored!("q4_k", 256, 72),
            WeightDtype::Q5K => stored!("q5_k", 256, 88),
            WeightDtype::Q6K => stored!("q6_k", 256, 105),
            WeightDtype::Q2K
            | WeightDtype::Q3K
            | WeightDtype::Iq4Nl
            | WeightDtype::Iq4Xs
            | WeightDtype::Mxfp4
            | WeightDtype::Nvfp4
            | WeightDtype::Tq1_0
            | WeightDtype::Tq2_0
            | WeightDtype::Iq2Xxs
            | WeightDtype::Iq2Xs
            | WeightDtype::Iq2S
            | WeightDtype::Iq3Xxs
            | WeightDtype::Iq3S
            | WeightDtype::Iq1S
            | WeightDtype::Iq1M
            | WeightDtype::Int4(_)
            | WeightDtype::Int8(_)
            | WeightDtype::Fp8(_) => return None,
        })
    }
}

/// A stored type as people write it.
fn name_of(dtype: WeightDtype) -> String {
    match dtype {
        WeightDtype::Q2K => "Q2_K".into(),
        WeightDtype::Q3K => "Q3_K".into(),
        WeightDtype::Int4(_) => "4 bits in groups".into(),
        WeightDtype::Int8(_) => "8 bits in groups".into(),
        WeightDtype::Fp8(_) => "FP8 in groups".into(),
        WeightDtype::Tq1_0 => "TQ1_0".into(),
        WeightDtype::Tq2_0 => "TQ2_0".into(),
        WeightDtype::Mxfp4 | WeightDtype::Nvfp4 => format!("{dtype:?}").to_uppercase(),
        // `Iq4Xs`: the letters behind the bits stand apart.
        other => {
            let name = format!("{other:?}");
            match name.get(..3).zip(name.get(3..)) {
                Some((bits, letters)) => format!("{bits}_{letters}").to_uppercase(),
                None => name.to_uppercase(),
            }
        }
    }
}

/// A weight on the device.
pub struct Packed<L: Launcher> {
    block: Block<L>,
    stored: Stored,
    /// Products round nothing.
    exact: bool,
    pub(crate) out: usize,
    inp: usize,
}

impl<L: Launcher> Packed<L> {
    /// Words of a row.
    fn words(&self) -> usize {
        let (values, words) = self.stored.block;
        self.inp / values * words
    }
}

/// Blocks of Q8_0 of rows of floats.
fn quantised(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / Q8_BLOCK * 34);
    for block in values.chunks_exact(Q8_BLOCK) {
        let most = block.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let scale = f16::from_f32(most / 127.0);
        let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        out.extend(scale.to_le_bytes());
        out.extend(block.iter().map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
    }
    out
}

impl<L: Launcher> Cuda<L> {
    /// Puts a weight on the device.
    pub(crate) fn put(
        &self,
        name: &str,
        w: &WeightView<'_>,
        mode: PackMode,
    ) -> Result<Packed<L>, KernelError> {
        w.check(name)?;
        let exact = mode == PackMode::F32 || self.operands == Operands::F32;
        let (out, inp) = (w.out_features, w.in_features);
        let packed = |bytes: &[u8], stored| Packed { block: self.put_values(bytes), stored, exact, out, inp };
        let floats = w.dtype.block().0 == 1;
        if mode == PackMode::Q8 && floats && inp.is_multiple_of(Q8_BLOCK) {
            return Ok(packed(&quantised(&quant::dequantize(w)), Q8_0));
        }
        if let Some(stored) = Stored::of(w.dtype) {
            return Ok(packed(w.data, stored));
        }
        // Rare types: the values as products take them.
        let mut row = vec![0.0; inp];
        let mut bytes = Vec::with_capacity(out * inp * if exact { 4 } else { 2 });
        for o in 0..out {
            quant::dequantize_row(w, o, &mut row);
            match exact {
                true => bytes.extend_from_slice(bytemuck::cast_slice(&row)),
                false => bytes.extend(row.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            }
        }
        let mut expanded = self.expanded.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = expanded.entry(name_of(w.dtype)).or_default();
        entry.weights += 1;
        entry.file_bytes += w.data.len() as u64;
        entry.bytes += bytes.len() as u64;
        drop(expanded);
        Ok(packed(&bytes, if exact { F32 } else { BF16 }))
    }

    /// `to[n, O] = x[first.., I] · Wᵀ`, plus a bias.
    pub(crate) fn multiply(
        &self,
        (x, first, rows): (&Buf<L>, usize, usize),
        w: &Packed<L>,
        bias: Option<&Buf<L>>,
        to: At<'_, L::Memory>,
    ) {
        assert!((first + rows) * w.inp <= x.capacity, "{rows} rows of {} from {first}", w.inp);
        let (kernel, tile) = match (w.exact, rows <= FEW_ROWS) {
            (true, _) => (w.stored.exact, 16),
            (false, true) => (w.stored.few, 16),
            (false, false) => (w.stored.many, 64),
        };
        // Rows beyond what one launch takes go in further ones.
        let most = BLOCKS_Y * tile;
        for start in (0..rows).step_by(most) {
            let n = most.min(rows - start);
            let args = [
                Arg::Buffer(x.place((first + start) * w.inp)),
                Arg::Buffer(Some(w.block.at(0))),
                Arg::Buffer(bias.and_then(|b| b.place(0))),
                Arg::Buffer(Some(to.plus(start * w.out * 4))),
                Arg::I64(n as i64),
                Arg::I32(w.out as i32),
                Arg::I32(w.inp as i32),
                Arg::I64(w.words() as i64),
            ];
            self.launch(kernel, (w.out.div_ceil(64), n.div_ceil(tile)), THREADS, &args);
        }
    }

    /// Rows of a table.
    pub(crate) fn rows_of(&self, w: &Packed<L>, ids: &[u32], factor: f32, y: &mut Buf<L>) {
        assert!(ids.iter().all(|id| (*id as usize) < w.out), "rows of the table");
        assert!(ids.len() * w.inp <= y.capacity, "room for the rows");
        y.changed();
        if ids.is_empty() {
            return;
        }
        let ids_there = self.table(ids);
        let args = [
            Arg::Buffer(Some(w.block.at(0))),
            Arg::Buffer(Some(ids_there.at(0))),
            Arg::Buffer(y.place(0)),
            Arg::I64(ids.len() as i64),
            Arg::I32(w.inp as i32),
            Arg::I64(w.words() as i64),
            Arg::F32(factor),
        ];
        self.over(ids.len() * w.inp.div_ceil(16), w.stored.embed, &args);
    }
}
