//! GGUF containers, versions 2 and 3, little-endian: typed metadata, tensor directory, tensor bytes; and a writer.
//!
//! Invariant: once a [`GgufFile`] exists, every tensor range lies inside the file, starts aligned, and has exactly
//! the length that its shape and type imply. Nothing is allocated on the word of a count alone: a count is
//! accepted only if that many of the smallest possible items fit into the bytes that are left.
//!
//! Dimensions are in file order (`ne`): `dims[0]` is the contiguous one, so a weight that maps `in` to `out`
//! features has dims `[in, out]`.
//!
//! Source: the GGUF specification of the ggml project [gguf].

mod open;
mod read;
mod split;
#[cfg(test)]
mod split_tests;
#[cfg(test)]
mod tests;
mod write;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::mapped::{Mapped, OpenError};

pub use split::{
    ContentError, SplitName, content_sha256, content_sha256_with, joined_sha256, only_model, parts_of,
};
pub use write::GgufWriter;

/// Data starts and tensors are aligned to this many bytes when `general.alignment` is absent.
pub const DEFAULT_ALIGNMENT: u64 = 32;

macro_rules! ggml_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $text:literal, $elements:literal, $bytes:literal;)*) => {
        /// Element types of tensors, with the block they are stored in.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum GgmlType {
            $($(#[$doc])* $name,)*
        }

        impl GgmlType {
            /// Every known type.
            pub const ALL: &'static [GgmlType] = &[$(GgmlType::$name),*];

            /// The type of a number in the file.
            pub fn from_id(id: u32) -> Option<GgmlType> {
                match id {
                    $($id => Some(GgmlType::$name),)*
                    _ => None,
                }
            }

            /// The number in the file.
            pub fn id(self) -> u32 {
                match self { $(GgmlType::$name => $id,)* }
            }

            /// The name that the ggml project uses.
            pub fn name(self) -> &'static str {
                match self { $(GgmlType::$name => $text,)* }
            }

            /// Elements per block.
            pub fn block_elements(self) -> usize {
                match self { $(GgmlType::$name => $elements,)* }
            }

            /// Bytes per block.
            pub fn block_bytes(self) -> usize {
                match self { $(GgmlType::$name => $bytes,)* }
            }
        }
    };
}

ggml_types! {
    /// 32-bit float.
    F32 = 0, "F32", 1, 4;
    /// 16-bit IEEE float.
    F16 = 1, "F16", 1, 2;
    /// 4 bits, f16 scale per 32.
    Q4_0 = 2, "Q4_0", 32, 18;
    /// 4 bits, f16 scale and minimum per 32.
    Q4_1 = 3, "Q4_1", 32, 20;
    /// 5 bits, f16 scale per 32.
    Q5_0 = 6, "Q5_0", 32, 22;
    /// 5 bits, f16 scale and minimum per 32.
    Q5_1 = 7, "Q5_1", 32, 24;
    /// 8 bits, f16 scale per 32.
    Q8_0 = 8, "Q8_0", 32, 34;
    /// 2 bits in super-blocks of 256.
    Q2K = 10, "Q2_K", 256, 84;
    /// 3 bits in super-blocks of 256.
    Q3K = 11, "Q3_K", 256, 110;
    /// 4 bits in super-blocks of 256.
    Q4K = 12, "Q4_K", 256, 144;
    /// 5 bits in super-blocks of 256.
    Q5K = 13, "Q5_K", 256, 176;
    /// 6 bits in super-blocks of 256.
    Q6K = 14, "Q6_K", 256, 210;
    /// 2.06 bits: vectors of a grid in super-blocks of 256.
    IQ2XXS = 16, "IQ2_XXS", 256, 66;
    /// 2.31 bits: vectors of a grid in super-blocks of 256.
    IQ2XS = 17, "IQ2_XS", 256, 74;
    /// 3.06 bits: vectors of a grid in super-blocks of 256.
    IQ3XXS = 18, "IQ3_XXS", 256, 98;
    /// 1.56 bits: vectors of a grid in super-blocks of 256.
    IQ1S = 19, "IQ1_S", 256, 50;
    /// 4 bits into a table of 16 values, f16 scale per 32.
    IQ4NL = 20, "IQ4_NL", 32, 18;
    /// 3.44 bits: vectors of a grid in super-blocks of 256.
    IQ3S = 21, "IQ3_S", 256, 110;
    /// 2.56 bits: vectors of a grid in super-blocks of 256.
    IQ2S = 22, "IQ2_S", 256, 82;
    /// 4 bits into a table of 16 values, in super-blocks of 256.
    IQ4XS = 23, "IQ4_XS", 256, 136;
    /// 8-bit integer.
    I8 = 24, "I8", 1, 1;
    /// 16-bit integer.
    I16 = 25, "I16", 1, 2;
    /// 32-bit integer.
    I32 = 26, "I32", 1, 4;
    /// 64-bit integer.
    I64 = 27, "I64", 1, 8;
    /// 64-bit float.
    F64 = 28, "F64", 1, 8;
    /// 1.75 bits: vectors of a grid in super-blocks of 256.
    IQ1M = 29, "IQ1_M", 256, 56;
    /// 16-bit brain float.
    BF16 = 30, "BF16", 1, 2;
    /// Ternary, five values a byte, f16 scale per 256.
    TQ1_0 = 34, "TQ1_0", 256, 54;
    /// Ternary, four values a byte, f16 scale per 256.
    TQ2_0 = 35, "TQ2_0", 256, 66;
    /// 4-bit floats, a power of two per 32.
    MXFP4 = 39, "MXFP4", 32, 17;
    /// 4-bit floats, an 8-bit float per 16.
    NVFP4 = 40, "NVFP4", 64, 36;
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Type 0.
    U8(u8),
    /// Type 1.
    I8(i8),
    /// Type 2.
    U16(u16),
    /// Type 3.
    I16(i16),
    /// Type 4.
    U32(u32),
    /// Type 5.
    I32(i32),
    /// Type 6.
    F32(f32),
    /// Type 7.
    Bool(bool),
    /// Type 8, UTF-8.
    Str(String),
    /// Type 9.
    Array(GgufArray),
    /// Type 10.
    U64(u64),
    /// Type 11.
    I64(i64),
    /// Type 12.
    F64(f64),
}

/// An array of metadata values, all of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufArray {
    /// Of type 0.
    U8(Vec<u8>),
    /// Of type 1.
    I8(Vec<i8>),
    /// Of type 2.
    U16(Vec<u16>),
    /// Of type 3.
    I16(Vec<i16>),
    /// Of type 4.
    U32(Vec<u32>),
    /// Of type 5.
    I32(Vec<i32>),
    /// Of type 6.
    F32(Vec<f32>),
    /// Of type 7.
    Bool(Vec<bool>),
    /// Of type 8.
    Str(Vec<String>),
    /// Of type 9: arrays of arrays, which may differ in type and length.
    Array(Vec<GgufArray>),
    /// Of type 10.
    U64(Vec<u64>),
    /// Of type 11.
    I64(Vec<i64>),
    /// Of type 12.
    F64(Vec<f64>),
}

impl GgufArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            GgufArray::U8(v) => v.len(),
            GgufArray::I8(v) => v.len(),
            GgufArray::U16(v) => v.len(),
            GgufArray::I16(v) => v.len(),
            GgufArray::U32(v) => v.len(),
            GgufArray::I32(v) => v.len(),
            GgufArray::F32(v) => v.len(),
            GgufArray::Bool(v) => v.len(),
            GgufArray::Str(v) => v.len(),
            GgufArray::Array(v) => v.len(),
            GgufArray::U64(v) => v.len(),
            GgufArray::I64(v) => v.len(),
            GgufArray::F64(v) => v.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as 64-bit integers, if they are integers that fit.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        Some(match self {
            GgufArray::U8(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::I8(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::U16(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::I16(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::U32(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::I32(v) => v.iter().map(|x| i64::from(*x)).collect(),
            GgufArray::U64(v) => v.iter().map(|x| i64::try_from(*x).ok()).collect::<Option<_>>()?,
            GgufArray::I64(v) => v.clone(),
            GgufArray::F32(_)
            | GgufArray::Bool(_)
            | GgufArray::Str(_)
            | GgufArray::Array(_)
            | GgufArray::F64(_) => return None,
        })
    }

    fn type_id(&self) -> u32 {
        match self {
            GgufArray::U8(_) => 0,
            GgufArray::I8(_) => 1,
            GgufArray::U16(_) => 2,
            GgufArray::I16(_) => 3,
            GgufArray::U32(_) => 4,
            GgufArray::I32(_) => 5,
            GgufArray::F32(_) => 6,
            GgufArray::Bool(_) => 7,
            GgufArray::Str(_) => 8,
            GgufArray::Array(_) => 9,
            GgufArray::U64(_) => 10,
            GgufArray::I64(_) => 11,
            GgufArray::F64(_) => 12,
        }
    }
}

/// Names of value types by number.
const TYPE_NAMES: [&str; 13] =
    ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];

impl GgufValue {
    fn type_id(&self) -> u32 {
        match self {
            GgufValue::U8(_) => 0,
            GgufValue::I8(_) => 1,
            GgufValue::U16(_) => 2,
            GgufValue::I16(_) => 3,
            GgufValue::U32(_) => 4,
            GgufValue::I32(_) => 5,
            GgufValue::F32(_) => 6,
            GgufValue::Bool(_) => 7,
            GgufValue::Str(_) => 8,
            GgufValue::Array(_) => 9,
            GgufValue::U64(_) => 10,
            GgufValue::I64(_) => 11,
            GgufValue::F64(_) => 12,
        }
    }

    /// Name of the type, as in `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            GgufValue::Array(a) => format!("array of {}", TYPE_NAMES[a.type_id() as usize]),
            other => TYPE_NAMES[other.type_id() as usize].to_string(),
        }
    }

    /// The value as an integer, whatever its width.
    pub fn to_i64(&self) -> Option<i64> {
        match self {
            GgufValue::U8(x) => Some(i64::from(*x)),
            GgufValue::I8(x) => Some(i64::from(*x)),
            GgufValue::U16(x) => Some(i64::from(*x)),
            GgufValue::I16(x) => Some(i64::from(*x)),
            GgufValue::U32(x) => Some(i64::from(*x)),
            GgufValue::I32(x) => Some(i64::from(*x)),
            GgufValue::U64(x) => i64::try_from(*x).ok(),
            GgufValue::I64(x) => Some(*x),
            GgufValue::F32(_)
            | GgufValue::Bool(_)
            | GgufValue::Str(_)
            | GgufValue::Array(_)
            | GgufValue::F64(_) => None,
        }
    }
}

/// One entry of the tensor directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// 1 to 4 dimensions in file order, the contiguous one first; none is 0.
    pub dims: Vec<usize>,
    /// Element type.
    pub ggml_type: GgmlType,
    /// Which file of a split, from 0.
    pub part: usize,
    /// First byte, counted from the start of the *file*.
    pub offset: usize,
    /// Length in bytes.
    pub byte_len: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// What is wrong with a GGUF file, or with a question asked of it.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Any of the other errors, with the file that has it.
    #[error("GGUF file `{}`: {cause}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: Box<GgufError>,
    },
    /// The file does not start with `GGUF`.
    #[error("magic is `{found}`, expected `GGUF`")]
    Magic {
        /// First bytes, printable.
        found: String,
    },
    /// A version that this reader does not know.
    #[error("format version is {found}, expected 2 or 3")]
    Version {
        /// Version number in the file.
        found: u32,
    },
    /// The file is written for big-endian machines.
    #[error("byte order is big-endian, expected little-endian")]
    BigEndian,
    /// The file ends inside something.
    #[error("truncated at byte {offset}: {what} needs {needed} bytes, {left} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where in the file.
        offset: usize,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are.
        left: usize,
    },
    /// A count that cannot be true of a file of this size.
    #[error("{what} at byte {offset} says {count} items, but only {left} bytes are left")]
    AbsurdCount {
        /// Which count.
        what: String,
        /// Where in the file.
        offset: usize,
        /// The count.
        count: u64,
        /// Bytes after it.
        left: usize,
    },
    /// A string that is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// What was being read.
        what: String,
        /// Where in the file.
        offset: usize,
    },
    /// An empty or repeated name.
    #[error("{what} `{name}` at byte {offset} is {problem}")]
    Name {
        /// Metadata key or tensor.
        what: &'static str,
        /// The name.
        name: String,
        /// Where in the file.
        offset: usize,
        /// `empty` or `there twice`.
        problem: &'static str,
    },
    /// A metadata value type that does not exist.
    #[error("metadata key `{key}` at byte {offset} has value type {id}, known are 0 to 12")]
    ValueType {
        /// Metadata key.
        key: String,
        /// Where in the file.
        offset: usize,
        /// The type number.
        id: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata key `{key}` at byte {offset} holds boolean {found}, expected 0 or 1")]
    Boolean {
        /// Metadata key.
        key: String,
        /// Where in the file.
        offset: usize,
        /// The byte.
        found: u8,
    },
    /// Arrays nested too deep.
    #[error("metadata key `{key}` nests arrays deeper than {limit}")]
    Nesting {
        /// Metadata key.
        key: String,
        /// Deepest nesting that is read.
        limit: usize,
    },
    /// `general.alignment` is no power of two.
    #[error("metadata key `general.alignment` is {found}, expected a power of two")]
    Alignment {
        /// The value.
        found: i64,
    },
    /// A tensor with an impossible shape.
    #[error("tensor `{name}` at byte {offset} has dimensions {dims:?}: {problem}")]
    Shape {
        /// Tensor.
        name: String,
        /// Where its directory entry is.
        offset: usize,
        /// Dimensions as far as they were read.
        dims: Vec<u64>,
        /// What is wrong with them.
        problem: String,
    },
    /// A tensor type that this reader does not know.
    #[error("tensor `{name}` at byte {offset} has type {id}{}, which is not read", type_name(*id))]
    TensorType {
        /// Tensor.
        name: String,
        /// Where its directory entry is.
        offset: usize,
        /// The type number.
        id: u32,
    },
    /// A tensor's data that does not start aligned.
    #[error(
        "tensor `{name}` starts at data offset {start}, which is no multiple of the alignment {alignment}"
    )]
    Unaligned {
        /// Tensor.
        name: String,
        /// Offset from the start of the data.
        start: u64,
        /// Alignment in bytes.
        alignment: u64,
    },
    /// A tensor's data that does not lie inside the file.
    #[error(
        "tensor `{name}` needs {byte_len} bytes at data offset {start} (data begins at byte {data_start}), but the \
         file has {file_len} bytes"
    )]
    OutOfFile {
        /// Tensor.
        name: String,
        /// Offset from the start of the data.
        start: u64,
        /// Length in bytes.
        byte_len: u64,
        /// Where the data begins.
        data_start: u64,
        /// Length of the file.
        file_len: usize,
    },
    /// Parts of a split that do not make one model.
    #[error("{problem}")]
    Split {
        /// What is wrong with this part.
        problem: String,
    },
    /// A part of a split that is not there.
    #[error("part {no} of {count} of the model is missing: there is no `{}`", path.display())]
    PartMissing {
        /// The file that should be there.
        path: PathBuf,
        /// Which part, from 1.
        no: u32,
        /// Of how many.
        count: u32,
    },
    /// A metadata key that is needed and not there.
    #[error("metadata key `{key}` is missing")]
    MissingKey {
        /// Metadata key.
        key: String,
    },
    /// A metadata value of the wrong type.
    #[error("metadata key `{key}` is {found}, expected {wanted}")]
    WrongType {
        /// Metadata key.
        key: String,
        /// Type and, for numbers, value that was found.
        found: String,
        /// Type that was expected.
        wanted: &'static str,
    },
    /// A tensor that is needed and not there.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Tensor.
        name: String,
    },
}

/// What the ggml project called types that have no reader here, for messages.
fn type_name(id: u32) -> String {
    let name = match id {
        4 | 5 => "withdrawn in 2023",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        31..=33 => "Q4_0 in another order, withdrawn in 2024",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36..=38 => "IQ4_NL in another order, withdrawn in 2024",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return String::new(),
    };
    format!(" ({name})")
}

impl GgufError {
    fn in_file(self, path: &Path) -> GgufError {
        match self {
            e @ (GgufError::Open(_) | GgufError::InFile { .. } | GgufError::PartMissing { .. }) => e,
            cause => GgufError::InFile { path: path.to_path_buf(), cause: Box::new(cause) },
        }
    }

    /// The error without the file name around it.
    pub fn cause(&self) -> &GgufError {
        match self {
            GgufError::InFile { cause, .. } => cause,
            other => other,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self.cause() {
            GgufError::Open(_) | GgufError::InFile { .. } => {
                Some("check the path and whether the file may be read".to_string())
            }
            GgufError::Magic { found } if found.starts_with("vers") => {
                Some("the file is a pointer of git-lfs: run `git lfs pull` in its repository".to_string())
            }
            GgufError::Magic { .. } => Some(
                "give a `.gguf` file, or a folder with `config.json` and safetensors".to_string(),
            ),
            GgufError::Version { .. } | GgufError::BigEndian => Some(
                "convert the model again with a current llama.cpp on a little-endian machine".to_string(),
            ),
            GgufError::Truncated { .. } | GgufError::OutOfFile { .. } if self.is_piece() => Some(
                "it is the first of several pieces: join them in order into one `.gguf` file (`cat PIECE1 PIECE2 > \
                 MODEL.gguf`)"
                    .to_string(),
            ),
            GgufError::Truncated { .. } | GgufError::OutOfFile { .. } => {
                Some("the file looks cut off: download it again and compare its sha256".to_string())
            }
            GgufError::AbsurdCount { .. }
            | GgufError::NotUtf8 { .. }
            | GgufError::Name { .. }
            | GgufError::ValueType { .. }
            | GgufError::Boolean { .. }
            | GgufError::Nesting { .. }
            | GgufError::Alignment { .. }
            | GgufError::Shape { .. }
            | GgufError::Unaligned { .. } => {
                Some("the file is damaged: download it again and compare its sha256".to_string())
            }
            GgufError::TensorType { .. } => Some(format!(
                "use the same model in another quantisation; known are {}",
                GgmlType::ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ")
            )),
            GgufError::Split { .. } => Some(
                "put all parts of one download side by side under the names that they were published with"
                    .to_string(),
            ),
            GgufError::PartMissing { path, .. } => Some(format!(
                "put `{}` beside the other parts: all of them are needed, and none is a model alone",
                path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
            )),
            GgufError::MissingKey { .. } | GgufError::WrongType { .. } | GgufError::MissingTensor { .. } => {
                Some("the file was made without it: use another conversion of the model".to_string())
            }
        }
    }

    /// True for a file whose name says that it is a piece of one that was cut, not split.
    fn is_piece(&self) -> bool {
        let GgufError::InFile { path, .. } = self else { return false };
        let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        name.contains(".gguf-split-") || name.contains(".gguf.part") || name.ends_with("-split-a")
    }
}

#[derive(Clone, Debug)]
enum Backing<'a> {
    Borrowed(&'a [u8]),
    Mapped(Mapped),
}

/// A parsed GGUF file and its bytes.
#[derive(Clone, Debug)]
pub struct GgufFile<'a> {
    /// The files in order: one, or those of a split.
    parts: Vec<(Option<PathBuf>, Backing<'a>)>,
    version: u32,
    alignment: u64,
    metadata: Vec<(String, GgufValue)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
}

impl GgufFile<'_> {
    fn fail(&self, error: GgufError) -> GgufError {
        match self.path() {
            Some(path) => error.in_file(path),
            None => error,
        }
    }

    /// All bytes of the file; of a split, of its first part.
    pub fn bytes(&self) -> &[u8] {
        self.part_bytes(0)
    }

    fn part_bytes(&self, part: usize) -> &[u8] {
        match &self.parts[part].1 {
            Backing::Borrowed(b) => b,
            Backing::Mapped(m) => m.bytes(),
        }
    }

    /// The file, if it was opened by path; of a split, its first part.
    pub fn path(&self) -> Option<&Path> {
        self.parts[0].0.as_deref()
    }

    /// Number of files: 1, or the parts of a split.
    pub fn num_parts(&self) -> usize {
        self.parts.len()
    }

    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All metadata in file order.
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// The tensor directory in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The directory entry of a tensor, if it is there.
    pub fn find_tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|i| &self.tensors[*i])
    }

    /// The directory entry of a tensor.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`]
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.find_tensor(name).ok_or_else(|| self.fail(GgufError::MissingTensor { name: name.to_string() }))
    }

    /// The bytes of a tensor of this file's directory.
    ///
    /// # Panics
    /// If `info` comes from another file and lies outside this one.
    pub fn data(&self, info: &TensorInfo) -> &[u8] {
        &self.part_bytes(info.part)[info.offset..info.offset + info.byte_len]
    }

    /// Gives the memory of a tensor's bytes back to the system; reading them again fetches them from the file.
    pub fn release(&self, info: &TensorInfo) {
        if let Backing::Mapped(mapped) = &self.parts[info.part].1 {
            mapped.release(info.offset..info.offset + info.byte_len);
        }
    }

    /// The value of a key, if it is there.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.keys.get(key).map(|i| &self.metadata[*i].1)
    }

    fn need<T>(&self, key: &str, found: Result<Option<T>, GgufError>) -> Result<T, GgufError> {
        found?.ok_or_else(|| self.fail(GgufError::MissingKey { key: key.to_string() }))
    }

    fn typed<'s, T>(
        &'s self,
        key: &str,
        wanted: &'static str,
        convert: impl FnOnce(&'s GgufValue) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(v) => Ok(Some(v)),
            None => {
                let found = match value.to_i64() {
                    Some(n) => format!("{n} ({})", value.type_name()),
                    None => value.type_name(),
                };
                Err(self.fail(GgufError::WrongType { key: key.to_string(), found, wanted }))
            }
        }
    }

    /// An unsigned integer of any stored width that fits 32 bits; `None` if the key is absent.
    pub fn find_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "an unsigned 32-bit integer", |v| v.to_i64().and_then(|n| u32::try_from(n).ok()))
    }

    /// An unsigned integer of any stored width; `None` if the key is absent.
    pub fn find_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an unsigned integer", |v| match v {
            GgufValue::U64(n) => Some(*n),
            other => other.to_i64().and_then(|n| u64::try_from(n).ok()),
        })
    }

    /// A float (stored as f32 or f64); `None` if the key is absent.
    pub fn find_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a float", |v| match v {
            GgufValue::F32(x) => Some(*x),
            GgufValue::F64(x) => Some(*x as f32),
            _ => None,
        })
    }

    /// A boolean; `None` if the key is absent.
    pub fn find_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |v| if let GgufValue::Bool(b) = v { Some(*b) } else { None })
    }

    /// A string; `None` if the key is absent.
    pub fn find_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |v| if let GgufValue::Str(s) = v { Some(s.as_str()) } else { None })
    }

    /// An array of strings; `None` if the key is absent.
    pub fn find_str_array(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |v| match v {
            GgufValue::Array(GgufArray::Str(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of floats; `None` if the key is absent.
    pub fn find_f32_array(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.typed(key, "an array of 32-bit floats", |v| match v {
            GgufValue::Array(GgufArray::F32(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any stored width; `None` if the key is absent.
    pub fn find_i64_array(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        self.typed(key, "an array of integers", |v| match v {
            GgufValue::Array(a) => a.to_i64(),
            _ => None,
        })
    }

    /// Like [`GgufFile::find_u32`], but the key must be there.
    pub fn get_u32(&self, key: &str) -> Result<u32, GgufError> {
        self.need(key, self.find_u32(key))
    }

    /// Like [`GgufFile::find_u64`], but the key must be there.
    pub fn get_u64(&self, key: &str) -> Result<u64, GgufError> {
        self.need(key, self.find_u64(key))
    }

    /// Like [`GgufFile::find_f32`], but the key must be there.
    pub fn get_f32(&self, key: &str) -> Result<f32, GgufError> {
        self.need(key, self.find_f32(key))
    }

    /// Like [`GgufFile::find_bool`], but the key must be there.
    pub fn get_bool(&self, key: &str) -> Result<bool, GgufError> {
        self.need(key, self.find_bool(key))
    }

    /// Like [`GgufFile::find_str`], but the key must be there.
    pub fn get_str(&self, key: &str) -> Result<&str, GgufError> {
        self.need(key, self.find_str(key))
    }

    /// Like [`GgufFile::find_str_array`], but the key must be there.
    pub fn get_str_array(&self, key: &str) -> Result<&[String], GgufError> {
        self.need(key, self.find_str_array(key))
    }

    /// Like [`GgufFile::find_f32_array`], but the key must be there.
    pub fn get_f32_array(&self, key: &str) -> Result<&[f32], GgufError> {
        self.need(key, self.find_f32_array(key))
    }

    /// Like [`GgufFile::find_i64_array`], but the key must be there.
    pub fn get_i64_array(&self, key: &str) -> Result<Vec<i64>, GgufError> {
        self.need(key, self.find_i64_array(key))
    }
}
