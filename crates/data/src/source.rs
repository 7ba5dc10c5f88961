//! Files of conversations, read row by row.
//!
//! JSON Lines, JSON arrays and Parquet; plain, gzip or zstd. What a file is, its first bytes say: names lie and pipes
//! have none. One line at a time is in memory, and a line has a limit.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as ParquetRow};
use serde_json::{Map, Value};

use crate::row::{json_detail, parse_row};
use crate::{DataError, Location, Row, RowError};

/// How files are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Longest line in bytes.
    pub max_line_bytes: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        // The longest rows of public chat data have some hundred kB; 16 MiB is no conversation.
        ReadOptions { max_line_bytes: 16 << 20 }
    }
}

/// A JSON array is read whole; a longer one has to be JSON Lines.
const MAX_ARRAY_BYTES: u64 = 1 << 30;

enum Kind {
    Lines { reader: Box<dyn BufRead + Send>, buffer: Vec<u8> },
    Array(std::vec::IntoIter<Value>),
    Parquet(Box<RowIter<'static>>),
    Done,
}

/// Rows of one file, each with its place; rows that are no conversation come as [`RowError`].
///
/// After an error of the file itself (`Err(DataError)`) the reader is at its end.
pub struct SourceReader {
    path: Arc<Path>,
    kind: Kind,
    /// Line or row last read.
    number: u64,
    options: ReadOptions,
}

impl std::fmt::Debug for SourceReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceReader")
            .field("path", &self.path)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl SourceReader {
    /// Opens a file.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Parquet`], and for a JSON array [`DataError::BrokenJson`].
    pub fn open(path: &Path, options: ReadOptions) -> Result<SourceReader, DataError> {
        let io = |source| DataError::Io { path: path.to_path_buf(), source };
        let mut file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(io::Error::new(io::ErrorKind::IsADirectory, "is a folder")));
        }
        let mut magic = [0u8; 4];
        let length = read_up_to(&mut file, &mut magic).map_err(io)?;
        let magic = &magic[..length];
        let path: Arc<Path> = path.into();
        if magic == b"PAR1" {
            return SourceReader::open_parquet(path, options);
        }
        let start = io::Cursor::new(magic.to_vec()).chain(file);
        let reader: Box<dyn BufRead + Send> = match magic {
            [0x28, 0xb5, 0x2f, 0xfd] => {
                let decoder = zstd::stream::read::Decoder::new(start).map_err(io)?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
            [0x1f, 0x8b, ..] => {
                Box::new(BufReader::with_capacity(1 << 16, flate2::read::MultiGzDecoder::new(start)))
            }
            _ => Box::new(BufReader::with_capacity(1 << 16, start)),
        };
        SourceReader::open_text(path, reader, options)
    }

    /// Reads text that does not come from a file; `path` is the name in messages.
    ///
    /// # Errors
    /// As [`SourceReader::open`].
    pub fn from_reader(
        path: &Path,
        reader: Box<dyn BufRead + Send>,
        options: ReadOptions,
    ) -> Result<SourceReader, DataError> {
        SourceReader::open_text(path.into(), reader, options)
    }

    fn open_text(
        path: Arc<Path>,
        mut reader: Box<dyn BufRead + Send>,
        options: ReadOptions,
    ) -> Result<SourceReader, DataError> {
        let io = |source| DataError::Io { path: path.to_path_buf(), source };
        let mut first = reader.fill_buf().map_err(io)?;
        let bom = if first.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        first = &first[bom..];
        // An array opens with `[`; in JSON Lines every row is an object.
        let is_array = first.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
        reader.consume(bom);
        let kind = if is_array {
            let mut text = Vec::new();
            reader.take(MAX_ARRAY_BYTES + 1).read_to_end(&mut text).map_err(io)?;
            if text.len() as u64 > MAX_ARRAY_BYTES {
                let location = Location { path, number: 1, is_line: true };
                return Err(DataError::LineTooLong { location, limit: MAX_ARRAY_BYTES as usize });
            }
            let rows: Vec<Value> = serde_json::from_slice(&text).map_err(|e| DataError::BrokenJson {
                path: path.to_path_buf(),
                line: e.line() as u64,
                column: e.column(),
                detail: json_detail(&e),
            })?;
            Kind::Array(rows.into_iter())
        } else {
            Kind::Lines { reader, buffer: Vec::new() }
        };
        Ok(SourceReader { path, kind, number: 0, options })
    }

    fn open_parquet(path: Arc<Path>, options: ReadOptions) -> Result<SourceReader, DataError> {
        let broken = |e: parquet::errors::ParquetError| DataError::Parquet {
            path: path.to_path_buf(),
            row: 0,
            detail: e.to_string(),
        };
        let file = File::open(&path).map_err(|source| DataError::Io { path: path.to_path_buf(), source })?;
        let reader = SerializedFileReader::new(file).map_err(broken)?;
        // The row iterator takes it for granted that row groups open.
        for group in 0..reader.num_row_groups() {
            reader.get_row_group(group).map_err(broken)?;
        }
        Ok(SourceReader {
            path,
            kind: Kind::Parquet(Box::new(RowIter::from_file_into(Box::new(reader)))),
            number: 0,
            options,
        })
    }

    fn location(&self, is_line: bool) -> Location {
        Location { path: Arc::clone(&self.path), number: self.number, is_line }
    }

    /// The next row: `Ok((place, Ok(row)))`, or `Ok((place, Err(problem)))` for a row that is no conversation.
    ///
    /// # Errors
    /// [`DataError::BrokenJson`], [`DataError::LineTooLong`], [`DataError::IoAt`], [`DataError::Parquet`].
    #[expect(clippy::type_complexity, reason = "the three outcomes are what the caller needs to tell apart")]
    pub fn next_row(&mut self) -> Result<Option<(Location, Result<Row, RowError>)>, DataError> {
        let result = self.step();
        if !matches!(result, Ok(Some(_))) {
            self.kind = Kind::Done;
        }
        result
    }

    #[expect(clippy::type_complexity, reason = "as next_row")]
    fn step(&mut self) -> Result<Option<(Location, Result<Row, RowError>)>, DataError> {
        loop {
            let is_line = matches!(self.kind, Kind::Lines { .. });
            self.number += 1;
            let location = self.location(is_line);
            match &mut self.kind {
                Kind::Done => return Ok(None),
                Kind::Array(rows) => {
                    let Some(value) = rows.next() else { return Ok(None) };
                    return Ok(Some((location, parse_row(&value))));
                }
                Kind::Parquet(rows) => {
                    let row = match rows.next() {
                        None => return Ok(None),
                        Some(Err(e)) => {
                            return Err(DataError::Parquet {
                                path: self.path.to_path_buf(),
                                row: self.number,
                                detail: e.to_string(),
                            });
                        }
                        Some(Ok(row)) => row,
                    };
                    return Ok(Some((location, parse_row(&row_to_json(&row)))));
                }
                Kind::Lines { reader, buffer } => {
                    buffer.clear();
                    let limit = self.options.max_line_bytes;
                    let read = reader
                        .by_ref()
                        .take(limit as u64 + 1)
                        .read_until(b'\n', buffer)
                        .map_err(|source| DataError::IoAt { location: location.clone(), source })?;
                    if read == 0 {
                        return Ok(None);
                    }
                    if buffer.len() > limit {
                        return Err(DataError::LineTooLong { location, limit });
                    }
                    if buffer.iter().all(u8::is_ascii_whitespace) {
                        continue;
                    }
                    return match crate::parse_conversation_line(buffer) {
                        Err(RowError::BrokenJson { column, detail }) => Err(DataError::BrokenJson {
                            path: self.path.to_path_buf(),
                            line: self.number,
                            column,
                            detail,
                        }),
                        row => Ok(Some((location, row))),
                    };
                }
            }
        }
    }
}

impl Iterator for SourceReader {
    type Item = Result<(Location, Result<Row, RowError>), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_row().transpose()
    }
}

/// `read` until the buffer is full or the file ends.
fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}

/// A Parquet row as the JSON that the same data set would have.
fn row_to_json(row: &ParquetRow) -> Value {
    let columns = row.get_column_iter().map(|(name, field)| (name.clone(), field_to_json(field)));
    Value::Object(columns.collect::<Map<_, _>>())
}

fn field_to_json(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) | Field::Date(v) | Field::TimeMillis(v) => (*v).into(),
        Field::Long(v) | Field::TimeMicros(v) | Field::TimestampMillis(v) | Field::TimestampMicros(v) => {
            (*v).into()
        }
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float16(v) => f64::from(v.to_f32()).into(),
        Field::Float(v) => f64::from(*v).into(),
        Field::Double(v) => (*v).into(),
        Field::Str(text) => text.as_str().into(),
        // Text that the writer did not mark as such.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned().into(),
        Field::Decimal(_) => field.to_string().into(),
        Field::Group(row) => row_to_json(row),
        Field::ListInternal(list) => list.elements().iter().map(field_to_json).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| match field {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(k, v)| (key(k), field_to_json(v))).collect())
        }
    }
}
