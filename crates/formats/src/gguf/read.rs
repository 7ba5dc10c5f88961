//! The GGUF parser: a cursor that knows where it is and never believes a count.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;

use super::{Backing, DEFAULT_ALIGNMENT, GgmlType, GgufArray, GgufError, GgufFile, GgufValue, TensorInfo};

/// Arrays inside arrays deeper than this are refused; real files do not nest at all.
const MAX_NESTING: usize = 4;

/// ggml tensors have at most this many dimensions.
const MAX_DIMS: u32 = 4;

/// Smallest metadata entry: empty key (8), type (4), one byte.
const MIN_ENTRY: u64 = 13;

/// Smallest directory entry: empty name (8), number of dimensions (4), one dimension (8), type (4), offset (8).
const MIN_TENSOR: u64 = 32;

/// Room made in advance for items that a count promises. Counts are only checked against the bytes left, of which a
/// large file has many; beyond this, memory grows with what is really read.
const MAX_RESERVE: usize = 1 << 12;

pub(super) struct Parsed {
    pub(super) version: u32,
    pub(super) alignment: u64,
    pub(super) metadata: Vec<(String, GgufValue)>,
    pub(super) keys: HashMap<String, usize>,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) names: HashMap<String, usize>,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64, what: &dyn Fn() -> String) -> Result<&'a [u8], GgufError> {
        match usize::try_from(n).ok().filter(|n| *n <= self.left()) {
            Some(n) => {
                let slice = &self.bytes[self.at..self.at + n];
                self.at += n;
                Ok(slice)
            }
            None => Err(GgufError::Truncated { what: what(), offset: self.at, needed: n, left: self.left() }),
        }
    }

    fn array<const N: usize>(&mut self, what: &dyn Fn() -> String) -> Result<[u8; N], GgufError> {
        let slice = self.take(N as u64, what)?;
        Ok(slice.try_into().expect("`take` returns as many bytes as asked"))
    }

    fn u32(&mut self, what: &dyn Fn() -> String) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &dyn Fn() -> String) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of items of at least `min_bytes` each; refused if they cannot fit into what is left.
    fn count(&mut self, min_bytes: u64, what: &dyn Fn() -> String) -> Result<usize, GgufError> {
        let offset = self.at;
        let count = self.u64(what)?;
        self.check_count(count, min_bytes, offset, what)
    }

    fn check_count(
        &self,
        count: u64,
        min_bytes: u64,
        offset: usize,
        what: &dyn Fn() -> String,
    ) -> Result<usize, GgufError> {
        match count.checked_mul(min_bytes) {
            Some(bytes) if bytes <= self.left() as u64 => Ok(count as usize),
            _ => Err(GgufError::AbsurdCount { what: what(), offset, count, left: self.left() }),
        }
    }

    fn string(&mut self, what: &dyn Fn() -> String) -> Result<String, GgufError> {
        let len = self.u64(what)?;
        let offset = self.at;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(GgufError::NotUtf8 { what: what(), offset }),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<bool, GgufError> {
        let offset = self.at;
        match self.array::<1>(&|| value_of(key))?[0] {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(GgufError::Boolean { key: key.to_string(), offset, found }),
        }
    }

    /// `count` numbers of `N` bytes each.
    fn numbers<const N: usize, T>(
        &mut self,
        key: &str,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let count = self.count(N as u64, &|| length_of(key))?;
        // Cannot overflow: `count` accepted the product.
        let bytes = self.take((count * N) as u64, &|| value_of(key))?;
        let chunks = bytes.chunks_exact(N);
        Ok(chunks.map(|c| from(c.try_into().expect("chunks have N bytes"))).collect())
    }

    fn value(&mut self, key: &str) -> Result<GgufValue, GgufError> {
        let offset = self.at;
        let what = || value_of(key);
        Ok(match self.u32(&|| type_of(key))? {
            0 => GgufValue::U8(u8::from_le_bytes(self.array(&what)?)),
            1 => GgufValue::I8(i8::from_le_bytes(self.array(&what)?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.array(&what)?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.array(&what)?)),
            4 => GgufValue::U32(u32::from_le_bytes(self.array(&what)?)),
            5 => GgufValue::I32(i32::from_le_bytes(self.array(&what)?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.array(&what)?)),
            7 => GgufValue::Bool(self.boolean(key)?),
            8 => GgufValue::Str(self.string(&what)?),
            9 => GgufValue::Array(self.array_value(key, 1)?),
            10 => GgufValue::U64(u64::from_le_bytes(self.array(&what)?)),
            11 => GgufValue::I64(i64::from_le_bytes(self.array(&what)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array(&what)?)),
            id => return Err(GgufError::ValueType { key: key.to_string(), offset, id }),
        })
    }

    fn array_value(&mut self, key: &str, depth: usize) -> Result<GgufArray, GgufError> {
        if depth > MAX_NESTING {
            return Err(GgufError::Nesting { key: key.to_string(), limit: MAX_NESTING });
        }
        let offset = self.at;
        Ok(match self.u32(&|| type_of(key))? {
            0 => GgufArray::U8(self.numbers(key, u8::from_le_bytes)?),
            1 => GgufArray::I8(self.numbers(key, i8::from_le_bytes)?),
            2 => GgufArray::U16(self.numbers(key, u16::from_le_bytes)?),
            3 => GgufArray::I16(self.numbers(key, i16::from_le_bytes)?),
            4 => GgufArray::U32(self.numbers(key, u32::from_le_bytes)?),
            5 => GgufArray::I32(self.numbers(key, i32::from_le_bytes)?),
            6 => GgufArray::F32(self.numbers(key, f32::from_le_bytes)?),
            7 => {
                let count = self.count(1, &|| length_of(key))?;
                let flags = (0..count).map(|_| self.boolean(key));
                GgufArray::Bool(flags.collect::<Result<_, _>>()?)
            }
            8 => {
                let count = self.count(8, &|| length_of(key))?;
                let mut strings = Vec::with_capacity(count.min(MAX_RESERVE));
                for i in 0..count {
                    strings.push(self.string(&|| format!("element {i} of metadata key `{key}`"))?);
                }
                GgufArray::Str(strings)
            }
            9 => {
                // Type (4) and length (8) of an empty inner array.
                let count = self.count(12, &|| length_of(key))?;
                let mut arrays = Vec::with_capacity(count.min(MAX_RESERVE));
                for _ in 0..count {
                    arrays.push(self.array_value(key, depth + 1)?);
                }
                GgufArray::Array(arrays)
            }
            10 => GgufArray::U64(self.numbers(key, u64::from_le_bytes)?),
            11 => GgufArray::I64(self.numbers(key, i64::from_le_bytes)?),
            12 => GgufArray::F64(self.numbers(key, f64::from_le_bytes)?),
            id => return Err(GgufError::ValueType { key: key.to_string(), offset, id }),
        })
    }
}

fn value_of(key: &str) -> String {
    format!("value of metadata key `{key}`")
}

fn type_of(key: &str) -> String {
    format!("value type of metadata key `{key}`")
}

fn length_of(key: &str) -> String {
    format!("array length of metadata key `{key}`")
}

/// First bytes for an error message: printable ASCII as it is, the rest as hex.
fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for b in bytes {
        if b.is_ascii_graphic() {
            text.push(char::from(*b));
        } else {
            let _ = write!(text, "\\x{b:02x}");
        }
    }
    text
}

pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, GgufError> {
    let mut cursor = Cursor { bytes, at: 0 };
    let magic = bytes.get(..4).unwrap_or(bytes);
    if magic != b"GGUF" {
        return Err(GgufError::Magic { found: printable(magic) });
    }
    cursor.at = 4;
    let version = cursor.u32(&|| "format version".to_string())?;
    match version {
        2 | 3 => {}
        swapped if (1..=3).contains(&swapped.swap_bytes()) => return Err(GgufError::BigEndian),
        found => return Err(GgufError::Version { found }),
    }
    let tensor_count_at = cursor.at;
    let tensor_count = cursor.u64(&|| "number of tensors".to_string())?;
    let entries = cursor.count(MIN_ENTRY, &|| "number of metadata keys".to_string())?;
    let tensors_what = || "number of tensors".to_string();
    cursor.check_count(tensor_count, MIN_TENSOR, tensor_count_at, &tensors_what)?;

    let mut metadata = Vec::with_capacity(entries.min(MAX_RESERVE));
    let mut keys = HashMap::with_capacity(entries.min(MAX_RESERVE));
    for i in 0..entries {
        let offset = cursor.at;
        let key = cursor.string(&|| format!("name of metadata key {i}"))?;
        check_name("metadata key", &key, offset, keys.contains_key(&key))?;
        let value = cursor.value(&key)?;
        keys.insert(key.clone(), i);
        metadata.push((key, value));
    }
    let alignment = match keys.get("general.alignment").map(|i| &metadata[*i].1) {
        None => DEFAULT_ALIGNMENT,
        Some(value) => {
            let found = value.to_i64().unwrap_or(-1);
            let alignment = u64::try_from(found).ok().filter(|a| a.is_power_of_two());
            alignment.ok_or(GgufError::Alignment { found })?
        }
    };

    let count = cursor.check_count(tensor_count, MIN_TENSOR, tensor_count_at, &tensors_what)?;
    let mut entries = Vec::with_capacity(count.min(MAX_RESERVE));
    let mut names = HashMap::with_capacity(count.min(MAX_RESERVE));
    for i in 0..count {
        let entry = directory_entry(&mut cursor, i)?;
        check_name("tensor", &entry.name, entry.offset, names.contains_key(&entry.name))?;
        names.insert(entry.name.clone(), i);
        entries.push(entry);
    }

    let data_start = (cursor.at as u64).checked_next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(count.min(MAX_RESERVE));
    for entry in entries {
        tensors.push(place(entry, data_start.unwrap_or(u64::MAX), alignment, bytes.len())?);
    }
    Ok(Parsed { version, alignment, metadata, keys, tensors, names })
}

fn check_name(what: &'static str, name: &str, offset: usize, known: bool) -> Result<(), GgufError> {
    let problem = match (name.is_empty(), known) {
        (true, _) => "empty",
        (_, true) => "there twice",
        _ => return Ok(()),
    };
    Err(GgufError::Name { what, name: name.to_string(), offset, problem })
}

struct Entry {
    name: String,
    dims: Vec<usize>,
    ggml_type: GgmlType,
    byte_len: u64,
    start: u64,
    /// Where the directory entry is.
    offset: usize,
}

fn directory_entry(cursor: &mut Cursor<'_>, index: usize) -> Result<Entry, GgufError> {
    let offset = cursor.at;
    let name = cursor.string(&|| format!("name of tensor {index}"))?;
    let what = || format!("directory entry of tensor `{name}`");
    let rank = cursor.u32(&what)?;
    let shape = |dims: &[u64], problem: &str| GgufError::Shape {
        name: name.clone(),
        offset,
        dims: dims.to_vec(),
        problem: problem.to_string(),
    };
    if rank == 0 || rank > MAX_DIMS {
        return Err(shape(&[], &format!("{rank} dimensions, expected 1 to {MAX_DIMS}")));
    }
    let mut dims = Vec::new();
    for _ in 0..rank {
        dims.push(cursor.u64(&what)?);
    }
    let id = cursor.u32(&what)?;
    let start = cursor.u64(&what)?;
    let ggml_type =
        GgmlType::from_id(id).ok_or_else(|| GgufError::TensorType { name: name.clone(), offset, id })?;
    if dims.contains(&0) {
        return Err(shape(&dims, "a dimension is 0"));
    }
    let block = ggml_type.block_elements() as u64;
    if !dims[0].is_multiple_of(block) {
        return Err(shape(&dims, &format!("{ggml_type} needs rows of a multiple of {block} elements")));
    }
    let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let byte_len = elements.and_then(|n| (n / block).checked_mul(ggml_type.block_bytes() as u64));
    let small = || dims.iter().map(|d| usize::try_from(*d).ok()).collect::<Option<Vec<usize>>>();
    match byte_len.zip(small()) {
        Some((byte_len, dims)) => Ok(Entry { dims, ggml_type, byte_len, start, offset, name }),
        None => Err(shape(&dims, "its size overflows 64 bits")),
    }
}

fn place(entry: Entry, data_start: u64, alignment: u64, file_len: usize) -> Result<TensorInfo, GgufError> {
    let Entry { name, dims, ggml_type, byte_len, start, offset: _ } = entry;
    if !start.is_multiple_of(alignment) {
        return Err(GgufError::Unaligned { name, start, alignment });
    }
    let first = data_start.checked_add(start);
    match first.and_then(|f| f.checked_add(byte_len)).filter(|end| *end <= file_len as u64) {
        // Both are at most the length of the file, which is a `usize`.
        Some(end) => {
            let offset = (end - byte_len) as usize;
            Ok(TensorInfo { name, dims, ggml_type, part: 0, offset, byte_len: byte_len as usize })
        }
        None => Err(GgufError::OutOfFile { name, start, byte_len, data_start, file_len }),
    }
}

impl<'a> GgufFile<'a> {
    /// One parsed file with its bytes.
    pub(super) fn assemble(parsed: Parsed, backing: Backing<'a>, path: Option<PathBuf>) -> GgufFile<'a> {
        let Parsed { version, alignment, metadata, keys, tensors, names } = parsed;
        GgufFile { parts: vec![(path, backing)], version, alignment, metadata, keys, tensors, names }
    }
}
