//! A weight as it stands in a file: type, shape, bytes.

use crate::{KernelError, KvDtype};

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF 4-bit, blocks of 32: f16 scale, 16 bytes of nibbles.
    Q4_0,
    /// GGUF 4-bit, blocks of 32: f16 scale, f16 minimum, 16 bytes of nibbles.
    Q4_1,
    /// GGUF 8-bit, blocks of 32: f16 scale, 32 signed bytes.
    Q8_0,
    /// GGUF 4-bit K-quant: super-blocks of 256.
    Q4K,
    /// GGUF 6-bit K-quant: super-blocks of 256.
    Q6K,
}

impl WeightDtype {
    /// Values and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        match self {
            WeightDtype::F32 => (1, 4),
            WeightDtype::F16 | WeightDtype::Bf16 => (1, 2),
            WeightDtype::Q4_0 => (32, 18),
            WeightDtype::Q4_1 => (32, 20),
            WeightDtype::Q8_0 => (32, 34),
            WeightDtype::Q4K => (256, 144),
            WeightDtype::Q6K => (256, 210),
        }
    }
}

/// A row-major `[O, I]` weight in stored form.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// Stored type.
    pub dtype: WeightDtype,
    /// `O`
    pub out_features: usize,
    /// `I`
    pub in_features: usize,
    /// Row after row, little-endian.
    pub data: &'a [u8],
}

impl<'a> WeightView<'a> {
    /// A view of f32 values.
    pub fn f32(values: &'a [f32], out_features: usize, in_features: usize) -> WeightView<'a> {
        WeightView { dtype: WeightDtype::F32, out_features, in_features, data: bytemuck::cast_slice(values) }
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        let (values, bytes) = self.dtype.block();
        self.in_features / values * bytes
    }

    /// Checks that rows are whole blocks and that the bytes are all there.
    pub fn check(&self, name: &str) -> Result<(), KernelError> {
        let (block, _) = self.dtype.block();
        if !self.in_features.is_multiple_of(block) {
            return Err(KernelError::WeightBlock {
                name: name.into(),
                in_features: self.in_features,
                block,
                dtype: self.dtype,
            });
        }
        let wanted = self.row_bytes().saturating_mul(self.out_features);
        if wanted != self.data.len() {
            return Err(KernelError::WeightBytes {
                name: name.into(),
                out_features: self.out_features,
                in_features: self.in_features,
                dtype: self.dtype,
                wanted,
                found: self.data.len(),
            });
        }
        Ok(())
    }
}

/// What to make of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackMode {
    /// De-quantise to f32: the specification path.
    F32,
    /// Keep as stored: block types by exact integer dot products on the stored blocks, f16/bf16/f32 as floats.
    Stored,
    /// Quantise floats to signed 8-bit blocks of 32 (block types stay as stored).
    Q8,
}

impl PackMode {
    /// How the keys and values of a network with such weights are stored.
    pub fn kv_dtype(self) -> KvDtype {
        match self {
            PackMode::F32 => KvDtype::F32,
            PackMode::Stored | PackMode::Q8 => KvDtype::F16,
        }
    }
}
