//! A weight as it stands in a file: type, shape, bytes.

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF 4-bit, blocks of 32: f16 scale.
    Q4_0,
    /// GGUF 4-bit, blocks of 32: f16 scale, f16 minimum.
    Q4_1,
    /// GGUF 5-bit, blocks of 32: f16 scale.
    Q5_0,
    /// GGUF 5-bit, blocks of 32: f16 scale, f16 minimum.
    Q5_1,
    /// GGUF 8-bit, blocks of 32: f16 scale, 32 signed bytes.
    Q8_0,
    /// GGUF 2-bit K-quant: super-blocks of 256, as all K-quants.
    Q2K,
    /// GGUF 3-bit K-quant.
    Q3K,
    /// GGUF 4-bit K-quant.
    Q4K,
    /// GGUF 5-bit K-quant.
    Q5K,
    /// GGUF 6-bit K-quant.
    Q6K,
    /// GGUF 4-bit into a table, blocks of 32: f16 scale.
    Iq4Nl,
    /// GGUF 4-bit into a table, super-blocks of 256.
    Iq4Xs,
    /// 4-bit floats, blocks of 32: a power of two.
    Mxfp4,
    /// 4-bit floats, groups of 16: an 8-bit float.
    Nvfp4,
    /// GGUF ternary, five values a byte.
    Tq1_0,
    /// GGUF ternary, four values a byte.
    Tq2_0,
    /// GGUF vectors of a grid, 2.06 bits.
    Iq2Xxs,
    /// GGUF vectors of a grid, 2.31 bits.
    Iq2Xs,
    /// GGUF vectors of a grid, 2.56 bits.
    Iq2S,
    /// GGUF vectors of a grid, 3.06 bits.
    Iq3Xxs,
    /// GGUF vectors of a grid, 3.44 bits.
    Iq3S,
    /// GGUF vectors of a grid, 1.56 bits.
    Iq1S,
    /// GGUF vectors of a grid, 1.75 bits.
    Iq1M,
    /// 4-bit numbers with a scale per group, as AWQ, GPTQ and compressed-tensors have them; see [`Groups`].
    Int4(Groups),
    /// The same with 8 bits.
    Int8(Groups),
    /// 8-bit floats (E4M3) with a scale per group.
    Fp8(Groups),
}

/// How the values of a row share scales, in [`WeightDtype::Int4`], [`WeightDtype::Int8`] and [`WeightDtype::Fp8`].
///
/// A row is one record per group: the scale, the zero as one signed byte if there are any, then the values: bytes,
/// or pairs of nibbles of which the low one comes first. `value = scale * (number - zero)`, rounded to f32 once. A
/// nibble stands for 0 to 15 and has the zero 8 where none is stored; a byte of an `Int8` is signed. No float is NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Values of a group: a multiple of 32 for whole numbers.
    pub len: u32,
    /// Scales are f32, not f16; those of floats always are.
    pub single: bool,
    /// Each group has a zero of its own; floats have none.
    pub zeros: bool,
}

impl Groups {
    /// Bytes in front of the values of a group.
    pub fn head_bytes(self) -> usize {
        2 + 2 * usize::from(self.single) + usize::from(self.zeros)
    }
}

impl WeightDtype {
    /// Every type that GGUF files have.
    pub const ALL: [WeightDtype; 26] = [
        WeightDtype::F32,
        WeightDtype::F16,
        WeightDtype::Bf16,
        WeightDtype::Q4_0,
        WeightDtype::Q4_1,
        WeightDtype::Q5_0,
        WeightDtype::Q5_1,
        WeightDtype::Q8_0,
        WeightDtype::Q2K,
        WeightDtype::Q3K,
        WeightDtype::Q4K,
        WeightDtype::Q5K,
        WeightDtype::Q6K,
        WeightDtype::Iq4Nl,
        WeightDtype::Iq4Xs,
        WeightDtype::Mxfp4,
        WeightDtype::Nvfp4,
        WeightDtype::Tq1_0,
        WeightDtype::Tq2_0,
        WeightDtype::Iq2Xxs,
        WeightDtype::Iq2Xs,
        WeightDtype::Iq2S,
        WeightDtype::Iq3Xxs,
        WeightDtype::Iq3S,
        WeightDtype::Iq1S,
        WeightDtype::Iq1M,
    ];

    /// Values and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        match self {
            WeightDtype::F32 => (1, 4),
            WeightDtype::F16 | WeightDtype::Bf16 => (1, 2),
            WeightDtype::Q4_0 | WeightDtype::Iq4Nl => (32, 18),
            WeightDtype::Q4_1 => (32, 20),
            WeightDtype::Q5_0 => (32, 22),
            WeightDtype::Q5_1 => (32, 24),
            WeightDtype::Q8_0 => (32, 34),
            WeightDtype::Mxfp4 => (32, 17),
            WeightDtype::Nvfp4 => (64, 36),
            WeightDtype::Q2K => (256, 84),
            WeightDtype::Q3K => (256, 110),
            WeightDtype::Q4K => (256, 144),
            WeightDtype::Q5K => (256, 176),
            WeightDtype::Q6K => (256, 210),
            WeightDtype::Iq4Xs => (256, 136),
            WeightDtype::Tq1_0 => (256, 54),
            WeightDtype::Tq2_0 => (256, 66),
            WeightDtype::Iq2Xxs => (256, 66),
            WeightDtype::Iq2Xs => (256, 74),
            WeightDtype::Iq2S => (256, 82),
            WeightDtype::Iq3Xxs => (256, 98),
            WeightDtype::Iq3S => (256, 110),
            WeightDtype::Iq1S => (256, 50),
            WeightDtype::Iq1M => (256, 56),
            WeightDtype::Int4(g) => (g.len as usize, g.head_bytes() + g.len as usize / 2),
            WeightDtype::Int8(g) | WeightDtype::Fp8(g) => (g.len as usize, g.head_bytes() + g.len as usize),
        }
    }

    /// In what form a type runs that is not kept at its own size; the values are the same.
    pub fn widened(self) -> Option<&'static str> {
        match self {
            WeightDtype::Tq1_0 | WeightDtype::Tq2_0 => Some("2 bits, an f16 scale per 32"),
            WeightDtype::Iq2Xxs | WeightDtype::Iq3Xxs | WeightDtype::Iq3S | WeightDtype::Iq1S => {
                Some("8 bits, an f32 scale per 32")
            }
            WeightDtype::Nvfp4 | WeightDtype::Iq2Xs | WeightDtype::Iq2S | WeightDtype::Iq1M => {
                Some("8 bits, an f32 scale per 16")
            }
            WeightDtype::F32
            | WeightDtype::F16
            | WeightDtype::Bf16
            | WeightDtype::Q4_0
            | WeightDtype::Q4_1
            | WeightDtype::Q5_0
            | WeightDtype::Q5_1
            | WeightDtype::Q8_0
            | WeightDtype::Q2K
            | WeightDtype::Q3K
            | WeightDtype::Q4K
            | WeightDtype::Q5K
            | WeightDtype::Q6K
            | WeightDtype::Iq4Nl
            | WeightDtype::Iq4Xs
            | WeightDtype::Mxfp4
            | WeightDtype::Int4(_)
            | WeightDtype::Int8(_)
            | WeightDtype::Fp8(_) => None,
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
        let whole = match self.dtype {
            WeightDtype::Int4(g) | WeightDtype::Int8(g) => g.len > 0 && g.len.is_multiple_of(32),
            WeightDtype::Fp8(g) => g.len > 0 && g.single && !g.zeros,
            _ => true,
        };
        if !whole || !self.in_features.is_multiple_of(block) {
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

/// How keys and values are stored. Sums over them run in f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// As computed: the specification.
    F32,
    /// Rounded to f16, values beyond its range to its largest: half the memory, and half the time where a long
    /// context makes attention wait for it.
    F16,
}

impl KvDtype {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 => 2,
        }
    }
}

/// What a kernel call can refuse.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Bytes and shape of a weight disagree.
    #[error(
        "weight `{name}` of {out_features} x {in_features} {dtype:?} needs {wanted} bytes, found {found}"
    )]
    WeightBytes {
        /// Tensor name.
        name: String,
        /// Rows.
        out_features: usize,
        /// Columns.
        in_features: usize,
        /// Stored type.
        dtype: WeightDtype,
        /// Bytes expected.
        wanted: usize,
        /// Bytes given.
        found: usize,
    },
    /// A block-quantised weight whose rows are not whole blocks.
    #[error("weight `{name}` has {in_features} input features, not a multiple of the {block} of {dtype:?}")]
    WeightBlock {
        /// Tensor name.
        name: String,
        /// Columns.
        in_features: usize,
        /// Block length.
        block: usize,
        /// Stored type.
        dtype: WeightDtype,
    },
    /// An order of columns that is no permutation.
    #[error(
        "the order of the columns of weight `{name}` does not name each of its {in_features} inputs once"
    )]
    WeightOrder {
        /// Tensor name.
        name: String,
        /// Columns.
        in_features: usize,
    },
}
