//! The GGUF writer: version 3, metadata first, tensors in the order given.

use std::io::{self, Write};
use std::path::Path;

use super::{DEFAULT_ALIGNMENT, GgmlType, GgufArray, GgufValue};
use crate::atomic::{self, AtomicError};

struct Tensor<'a> {
    name: String,
    dims: Vec<usize>,
    ggml_type: GgmlType,
    data: &'a [u8],
}

/// Collects metadata and tensors and writes them as one file.
#[derive(Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<Tensor<'a>>,
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> GgufWriter<'a> {
        GgufWriter::default()
    }

    /// Sets a metadata value; a key that is set again keeps its place and gets the new value.
    pub fn set(&mut self, key: impl Into<String>, value: GgufValue) -> &mut Self {
        let key = key.into();
        match self.metadata.iter_mut().find(|(k, _)| *k == key) {
            Some(slot) => slot.1 = value,
            None => self.metadata.push((key, value)),
        }
        self
    }

    /// Adds a tensor.
    ///
    /// # Shapes
    /// - `dims`: file order, the contiguous dimension first
    ///
    /// # Panics
    /// If the bytes do not match shape and type, or the name is taken.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[usize],
        ggml_type: GgmlType,
        data: &'a [u8],
    ) -> &mut Self {
        let name = name.into();
        let block = ggml_type.block_elements();
        assert!(matches!(dims, [first, ..] if dims.len() <= 4 && first % block == 0), "shape of `{name}`");
        let bytes = dims.iter().product::<usize>() / block * ggml_type.block_bytes();
        assert!(bytes > 0 && data.len() == bytes, "`{name}` needs {bytes} bytes, not {}", data.len());
        assert!(self.tensors.iter().all(|t| t.name != name), "`{name}` is there already");
        self.tensors.push(Tensor { name, dims: dims.to_vec(), ggml_type, data });
        self
    }

    /// Writes the file to any writer.
    pub fn write_to(&self, w: &mut dyn Write) -> io::Result<()> {
        let align = |n: u64| n.next_multiple_of(DEFAULT_ALIGNMENT);
        let mut head = Vec::new();
        head.extend_from_slice(b"GGUF");
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        // Written here and not settable: the alignment is the default.
        let metadata: Vec<_> = self.metadata.iter().filter(|(k, _)| k != "general.alignment").collect();
        head.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            put_str(&mut head, key);
            put_value(&mut head, value);
        }
        let mut start = 0u64;
        for t in &self.tensors {
            put_str(&mut head, &t.name);
            head.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
            for d in &t.dims {
                head.extend_from_slice(&(*d as u64).to_le_bytes());
            }
            head.extend_from_slice(&t.ggml_type.id().to_le_bytes());
            head.extend_from_slice(&start.to_le_bytes());
            start = align(start + t.data.len() as u64);
        }
        head.resize(align(head.len() as u64) as usize, 0);
        w.write_all(&head)?;
        for t in &self.tensors {
            w.write_all(t.data)?;
            let padding = align(t.data.len() as u64) as usize - t.data.len();
            w.write_all(&[0; DEFAULT_ALIGNMENT as usize][..padding])?;
        }
        Ok(())
    }

    /// The file as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("writing to memory does not fail");
        bytes
    }

    /// Writes the file atomically.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), AtomicError> {
        atomic::write_with(path, |w| self.write_to(w))
    }
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    out.extend_from_slice(&value.type_id().to_le_bytes());
    match value {
        GgufValue::U8(x) => out.push(*x),
        GgufValue::I8(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::U16(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::I16(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::U32(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::I32(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::F32(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::Bool(x) => out.push(u8::from(*x)),
        GgufValue::Str(x) => put_str(out, x),
        GgufValue::Array(x) => put_array(out, x),
        GgufValue::U64(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::I64(x) => out.extend_from_slice(&x.to_le_bytes()),
        GgufValue::F64(x) => out.extend_from_slice(&x.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    out.extend_from_slice(&array.type_id().to_le_bytes());
    out.extend_from_slice(&(array.len() as u64).to_le_bytes());
    match array {
        GgufArray::U8(v) => out.extend_from_slice(v),
        GgufArray::I8(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::U16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::I16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::U32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::I32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::F32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::Bool(v) => out.extend(v.iter().map(|x| u8::from(*x))),
        GgufArray::Str(v) => v.iter().for_each(|x| put_str(out, x)),
        GgufArray::Array(v) => v.iter().for_each(|x| put_array(out, x)),
        GgufArray::U64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::I64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        GgufArray::F64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
    }
}
