//! From a path, or bytes that someone else holds, to a file.

use std::path::Path;

use super::{Backing, GgufError, GgufFile, read, split};
use crate::mapped::Mapped;

impl GgufFile<'static> {
    /// Maps and parses a file; the result owns the mapping. Of a split any part stands for the whole: all parts are
    /// opened, and the metadata is that of the first.
    ///
    /// # Errors
    /// [`GgufError`], naming the file; [`GgufError::PartMissing`] and [`GgufError::Split`] for a split that is not
    /// whole.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile<'static>, GgufError> {
        split::open(path.as_ref())
    }

    /// Maps and parses one file, be it a part of a split.
    pub fn open_part(path: impl AsRef<Path>) -> Result<GgufFile<'static>, GgufError> {
        let path = path.as_ref();
        let mapped = Mapped::open(path)?;
        let parsed = read::parse(mapped.bytes()).map_err(|e| e.in_file(path))?;
        Ok(GgufFile::assemble(parsed, Backing::Mapped(mapped), Some(path.to_path_buf())))
    }
}

impl<'a> GgufFile<'a> {
    /// Parses bytes that someone else holds.
    pub fn parse(bytes: &'a [u8]) -> Result<GgufFile<'a>, GgufError> {
        Ok(GgufFile::assemble(read::parse(bytes)?, Backing::Borrowed(bytes), None))
    }

    /// Parses all parts of a split whose bytes someone else holds, in order.
    pub fn parse_parts(parts: &[&'a [u8]]) -> Result<GgufFile<'a>, GgufError> {
        split::parse(parts)
    }
}
