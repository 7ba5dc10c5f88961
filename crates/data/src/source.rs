//! Files of conversations, read row by row.
//!
//! JSON Lines, JSON arrays and Parquet; plain, gzip or zstd. What a file is, its first bytes say: names lie and pipes
//! have none. One line at a time is in memory, and a line has a limit. What is wrong with one line, one element or one
//! group of Parquet rows is a [`RowError`], and the next one is read; a [`DataError`] is wrong with the file.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row as ParquetRow};
use serde_json::{Map, Value};

use crate::json::{self, Element, Elements, Repairs};
use crate::notes::RowNotes;
use crate::ranged::{Blocks, Ranged, Shared, Stream};
use crate::row::{parse_line, parse_row};
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

/// Bytes that are looked at to tell what a file is; blanks may stand in front of an array's bracket.
const PEEK: usize = 512;

/// A JSON array is read whole; a longer one has to be JSON Lines.
const MAX_ARRAY_BYTES: u64 = 1 << 30;

enum Kind {
    Lines { reader: Box<dyn BufRead + Send>, buffer: Vec<u8> },
    Array(Elements),
    Parquet(Box<Groups>),
    Done,
}

/// Row groups of a Parquet file, one after the other: what is broken in one costs the rest of that one.
struct Groups {
    file: Box<dyn FileReader>,
    /// Where it reads from, if it lies elsewhere.
    blocks: Option<Arc<Blocks>>,
    /// The group that comes next.
    next: usize,
    rows: Option<ReaderIter>,
    /// Rows of the group at hand that were not read yet.
    left: u64,
}

impl Groups {
    fn next_row(&mut self) -> Option<Result<ParquetRow, String>> {
        loop {
            match self.rows.as_mut().map(Iterator::next) {
                Some(Some(Ok(row))) => {
                    self.left = self.left.saturating_sub(1);
                    return Some(Ok(row));
                }
                Some(Some(Err(error))) => {
                    self.rows = None;
                    return Some(Err(error.to_string()));
                }
                Some(None) | None => {}
            }
            self.rows = None;
            if self.next >= self.file.num_row_groups() {
                return None;
            }
            let group = self.next;
            self.next += 1;
            self.left = u64::try_from(self.file.metadata().row_group(group).num_rows()).unwrap_or(0);
            let schema = self.file.metadata().file_metadata().schema_descr_ptr();
            let opened = self.file.get_row_group(group).and_then(|g| TreeBuilder::new().as_iter(schema, &*g));
            match opened {
                Ok(rows) => self.rows = Some(rows),
                Err(error) => return Some(Err(error.to_string())),
            }
        }
    }
}

/// A Parquet file as it was opened, and where it reads from if it lies elsewhere.
type OpenedParquet = (Result<Box<dyn FileReader>, parquet::errors::ParquetError>, Option<Arc<Blocks>>);

/// Files that hold no rows we read, by their first bytes: what each is, and what to do with it.
const OTHER_FILES: [(&[u8], &str, &str); 12] = [
    (b"PK\x03\x04", "a zip archive", "unpack it and name the file inside"),
    (b"BZh", "packed with bzip2", "unpack it, or pack it with gzip or zstd"),
    (b"\xfd7zXZ\0", "packed with xz", "unpack it, or pack it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and name the file inside"),
    (b"ARROW1", "an Arrow file", "write it as Parquet or JSON Lines (`datasets`: `to_parquet`, `to_json`)"),
    (b"Obj\x01", "an Avro file", "write it as Parquet or JSON Lines"),
    (b"ORC", "an ORC file", "write it as Parquet or JSON Lines"),
    (b"SQLite format 3", "an SQLite database", "write its rows as Parquet or JSON Lines"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch the file with `git lfs pull`",
    ),
    (b"<", "a page or XML, not rows", "fetch the file itself; its address may need another form or a login"),
    (b"\xff\xfe", "UTF-16 text", "write it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "write it as UTF-8"),
];

/// Rows of one file, each with its place; rows that are no conversation come as [`RowError`].
///
/// After an error of the file itself (`Err(DataError)`) the reader is at its end.
pub struct SourceReader {
    path: Arc<Path>,
    kind: Kind,
    /// Line or row last read.
    number: u64,
    options: ReadOptions,
    notes: RowNotes,
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
    /// [`DataError::Io`], [`DataError::Parquet`], [`DataError::UnknownFile`], [`DataError::ArrayTooLong`].
    pub fn open(path: &Path, options: ReadOptions) -> Result<SourceReader, DataError> {
        let io = |source| DataError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(io::Error::new(io::ErrorKind::IsADirectory, "is a folder")));
        }
        let again = || {
            let file = File::open(path).map_err(io)?;
            Ok((SerializedFileReader::new(file).map(|file| Box::new(file) as Box<dyn FileReader>), None))
        };
        SourceReader::open_bytes(path.into(), Box::new(file), options, again)
    }

    /// Opens a file that lies elsewhere; `name` is what messages call it. It is read as a stream, or of Parquet in blocks, and
    /// never lies here as a whole.
    ///
    /// # Errors
    /// As [`SourceReader::open`].
    pub fn open_ranged(
        name: &Path,
        file: Arc<dyn Ranged>,
        options: ReadOptions,
    ) -> Result<SourceReader, DataError> {
        let stream = Box::new(Stream::new(Arc::clone(&file)));
        let again = || {
            let blocks = Arc::new(Blocks::new(file));
            let reader = SerializedFileReader::new(Shared(Arc::clone(&blocks)));
            if let Some(source) = blocks.take_failure() {
                return Err(DataError::Io { path: name.to_path_buf(), source });
            }
            let reader = reader.map(|reader| {
                blocks.for_columns(reader.metadata().file_metadata().schema_descr().num_columns());
                Box::new(reader) as Box<dyn FileReader>
            });
            Ok((reader, Some(blocks)))
        };
        SourceReader::open_bytes(name.into(), stream, options, again)
    }

    /// `parquet` opens the same file once more, where its first bytes say that it is one.
    fn open_bytes(
        path: Arc<Path>,
        mut file: Box<dyn Read + Send>,
        options: ReadOptions,
        parquet: impl FnOnce() -> Result<OpenedParquet, DataError>,
    ) -> Result<SourceReader, DataError> {
        let io = |source| DataError::Io { path: path.to_path_buf(), source };
        let mut magic = [0u8; 4];
        let length = read_up_to(&mut *file, &mut magic).map_err(io)?;
        let magic = &magic[..length];
        if magic == b"PAR1" {
            return SourceReader::open_parquet(path, parquet()?, options);
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
        let mut start = Vec::with_capacity(PEEK);
        reader.by_ref().take(PEEK as u64).read_to_end(&mut start).map_err(io)?;
        let mut first = start.as_slice();
        let bom = if first.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        first = &first[bom..];
        let unknown = |what, advice| Err(DataError::UnknownFile { path: path.to_path_buf(), what, advice });
        if let Some((_, what, advice)) = OTHER_FILES.iter().find(|(start, _, _)| first.starts_with(start)) {
            return unknown(what, advice);
        }
        if matches!(first, [0, b'{' | b'[', ..] | [b'{' | b'[', 0, ..]) {
            return unknown("UTF-16 text", "write it as UTF-8");
        }
        // An array opens with `[`; in JSON Lines every row is an object.
        let is_array = first.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
        let mut reader: Box<dyn BufRead + Send> = Box::new(io::Cursor::new(start).chain(reader));
        reader.consume(bom);
        let kind = if is_array {
            let mut text = Vec::new();
            reader.take(MAX_ARRAY_BYTES + 1).read_to_end(&mut text).map_err(io)?;
            if text.len() as u64 > MAX_ARRAY_BYTES {
                return Err(DataError::ArrayTooLong { path: path.to_path_buf(), limit: MAX_ARRAY_BYTES });
            }
            Kind::Array(Elements::new(text))
        } else {
            Kind::Lines { reader, buffer: Vec::new() }
        };
        Ok(SourceReader { path, kind, number: 0, options, notes: RowNotes::default() })
    }

    fn open_parquet(
        path: Arc<Path>,
        (opened, blocks): OpenedParquet,
        options: ReadOptions,
    ) -> Result<SourceReader, DataError> {
        let broken = |e: parquet::errors::ParquetError| DataError::Parquet {
            path: path.to_path_buf(),
            row: 0,
            detail: e.to_string(),
        };
        let file = opened.map_err(broken)?;
        Ok(SourceReader {
            path,
            kind: Kind::Parquet(Box::new(Groups { file, blocks, next: 0, rows: None, left: 0 })),
            number: 0,
            options,
            notes: RowNotes::default(),
        })
    }

    /// What to know about the row last read besides itself.
    pub fn notes(&self) -> &RowNotes {
        &self.notes
    }

    fn location(&self, is_line: bool) -> Location {
        Location { path: Arc::clone(&self.path), number: self.number, is_line }
    }

    /// The next row: `Ok((place, Ok(row)))`, or `Ok((place, Err(problem)))` for a row that is no conversation.
    ///
    /// # Errors
    /// [`DataError::BrokenJson`] for an array that is not closed, [`DataError::IoAt`].
    #[expect(clippy::type_complexity, reason = "the three outcomes are what the caller needs to tell apart")]
    pub fn next_row(&mut self) -> Result<Option<(Location, Result<Row, RowError>)>, DataError> {
        self.notes = RowNotes::default();
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
                Kind::Array(elements) => {
                    let broken = |line, column, detail| DataError::BrokenJson {
                        path: self.path.to_path_buf(),
                        line,
                        column,
                        detail,
                    };
                    let (range, line) = match elements.next() {
                        Element::End => return Ok(None),
                        Element::Item(range, line) => (range, line),
                        Element::Cut(range, line) => {
                            let error = serde_json::from_slice::<Value>(elements.bytes(range)).err();
                            let (below, column) = error.as_ref().map_or((1, 0), |e| (e.line(), e.column()));
                            let line = line + below.saturating_sub(1) as u64;
                            return Err(broken(
                                line,
                                column,
                                "the array that the file starts with is not closed".into(),
                            ));
                        }
                        Element::More(line) => {
                            return Err(broken(
                                line,
                                1,
                                "more text follows the array that the file starts with".into(),
                            ));
                        }
                    };
                    let row = match json::parse(elements.bytes(range)) {
                        Ok((value, repairs)) => parse_row(&value, &repairs, &mut self.notes),
                        Err(RowError::BrokenJson { column, detail }) => {
                            let detail = format!("{detail} (the row starts on line {line})");
                            Err(RowError::BrokenJson { column, detail })
                        }
                        Err(problem) => Err(problem),
                    };
                    return Ok(Some((location, row)));
                }
                Kind::Parquet(groups) => {
                    let row = match groups.next_row() {
                        None => return Ok(None),
                        Some(Ok(row)) => {
                            let mut repairs = Repairs::default();
                            let value = row_to_json(&row, &mut repairs);
                            parse_row(&value, &repairs, &mut self.notes)
                        }
                        Some(Err(detail)) => {
                            // That nothing comes from where the file lies is no fault of its rows.
                            if let Some(source) = groups.blocks.as_ref().and_then(|b| b.take_failure()) {
                                return Err(DataError::IoAt { location, source });
                            }
                            // This row, and those behind it in its group.
                            let lost = std::mem::take(&mut groups.left).max(1);
                            self.number += lost - 1;
                            let detail = match lost {
                                1 => detail,
                                _ => format!("{detail} ({lost} rows up to row {} are lost)", self.number),
                            };
                            self.notes.rows_lost = lost - 1;
                            Err(RowError::BrokenParquet { detail })
                        }
                    };
                    return Ok(Some((location, row)));
                }
                Kind::Lines { reader, buffer } => {
                    buffer.clear();
                    let limit = self.options.max_line_bytes;
                    let at = |source| DataError::IoAt { location: location.clone(), source };
                    let read =
                        reader.by_ref().take(limit as u64 + 1).read_until(b'\n', buffer).map_err(at)?;
                    if read == 0 {
                        return Ok(None);
                    }
                    if buffer.len() > limit {
                        if buffer.last() != Some(&b'\n') {
                            skip_line(reader).map_err(at)?;
                        }
                        return Ok(Some((location, Err(RowError::LineTooLong { limit }))));
                    }
                    if buffer.iter().all(u8::is_ascii_whitespace) {
                        continue;
                    }
                    let row = parse_line(buffer, &mut self.notes);
                    return Ok(Some((location, row)));
                }
            }
        }
    }
}

/// Reads to the end of a line without keeping it.
fn skip_line(reader: &mut dyn BufRead) -> io::Result<()> {
    loop {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        match bytes.iter().position(|b| *b == b'\n') {
            Some(at) => {
                reader.consume(at + 1);
                return Ok(());
            }
            None => {
                let length = bytes.len();
                reader.consume(length);
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
fn read_up_to(file: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
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
fn row_to_json(row: &ParquetRow, repairs: &mut Repairs) -> Value {
    let columns = row.get_column_iter().map(|(name, field)| {
        let mut finite = true;
        let value = field_to_json(field, &mut finite);
        if !finite {
            repairs.not_finite.insert(name.clone());
        }
        (name.clone(), value)
    });
    Value::Object(columns.collect::<Map<_, _>>())
}

fn field_to_json(field: &Field, finite: &mut bool) -> Value {
    let mut float = |value: f64| {
        *finite &= value.is_finite();
        value.into()
    };
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
        Field::Float16(v) => float(f64::from(v.to_f32())),
        Field::Float(v) => float(f64::from(*v)),
        Field::Double(v) => float(*v),
        Field::Str(text) => text.as_str().into(),
        // Text that the writer did not mark as such; other bytes are numbers, so that nobody takes them for text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => bytes.data().iter().copied().collect(),
        },
        Field::Decimal(_) => field.to_string().into(),
        Field::Group(row) => {
            let columns =
                row.get_column_iter().map(|(name, field)| (name.clone(), field_to_json(field, finite)));
            Value::Object(columns.collect::<Map<_, _>>())
        }
        Field::ListInternal(list) => {
            list.elements().iter().map(|field| field_to_json(field, finite)).collect()
        }
        Field::MapInternal(map) => {
            let key = |field: &Field| match field {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            let entries = map.entries().iter().map(|(k, v)| (key(k), field_to_json(v, finite)));
            Value::Object(entries.collect())
        }
    }
}
