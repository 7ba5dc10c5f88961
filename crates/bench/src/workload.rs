//! Workloads: rows of user turns whose answers are measured.
//!
//! A file holds one JSON object per line, `{"id", "turns": [user turn, ..]}`; other keys are allowed and ignored
//! (evaluation sets carry references and categories). Plain, `.gz` and `.zst`, told apart by their first bytes,
//! not by the file's name.

use std::io::Read;
use std::path::Path;

use draftsmith_formats::hash::sha256_hex;
use serde::Deserialize;

use crate::BenchError;

/// No workload file may unpack to more than this (a packed file of a few kilobytes can claim to hold terabytes).
const UNPACKED_BYTES_MAX: u64 = 1 << 30;

/// One conversation to be held.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct WorkloadRow {
    /// Names the row in records.
    pub id: String,
    /// User turns; the answer to each becomes part of the prompt of the next.
    pub turns: Vec<String>,
    /// System message, if the row brings one.
    #[serde(default)]
    pub system: Option<String>,
}

/// A named list of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Name in tables: the file name without its endings.
    pub name: String,
    /// Hash of the file as stored (before unpacking).
    pub sha256: String,
    /// Rows in the file, before any limit.
    pub rows_total: usize,
    /// The rows to run.
    pub rows: Vec<WorkloadRow>,
}

/// What records call a file of prompts: its name without what says how it is written.
///
/// ```
/// use draftsmith_bench::workload_name;
///
/// assert_eq!(workload_name("eval/gsm8k.jsonl".as_ref()), "gsm8k");
/// assert_eq!(workload_name("own-Q4_K.1.jsonl.zst".as_ref()), "own-Q4_K.1");
/// ```
pub fn workload_name(path: &Path) -> String {
    let mut name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    for end in [".zst", ".gz", ".jsonl", ".json"] {
        if let Some(rest) = name.strip_suffix(end) {
            name = rest.to_string();
        }
    }
    let name = name.trim_start_matches('.');
    if name.is_empty() { "workload".to_string() } else { name.to_string() }
}

impl Workload {
    /// Reads a workload file; `limit` keeps the first rows only.
    pub fn read(path: impl AsRef<Path>, limit: Option<usize>) -> Result<Workload, BenchError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path)
            .map_err(|source| BenchError::ReadWorkload { path: path.to_owned(), source })?;
        let text =
            unpack(&bytes).map_err(|source| BenchError::ReadWorkload { path: path.to_owned(), source })?;
        let name = workload_name(path);
        let mut workload = Workload::parse(&path.display().to_string(), &text, limit)?;
        workload.name = name;
        workload.sha256 = sha256_hex(&bytes);
        Ok(workload)
    }

    /// Reads rows from text; `name` is used in errors and tables.
    pub fn parse(name: &str, text: &str, limit: Option<usize>) -> Result<Workload, BenchError> {
        let row_error =
            |line: usize, problem: String| BenchError::Row { workload: name.to_owned(), line, problem };
        let mut rows = Vec::new();
        let mut rows_total = 0;
        let mut ids = std::collections::HashSet::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            rows_total += 1;
            if limit.is_some_and(|limit| rows.len() >= limit) {
                continue;
            }
            let row: WorkloadRow =
                serde_json::from_str(line).map_err(|e| row_error(index + 1, json_problem(&e)))?;
            if row.turns.is_empty() {
                return Err(row_error(index + 1, format!("row `{}` has no turns", row.id)));
            }
            if let Some(empty) = row.turns.iter().position(|t| t.trim().is_empty()) {
                return Err(row_error(index + 1, format!("turn {empty} of row `{}` is empty", row.id)));
            }
            if !ids.insert(row.id.clone()) {
                return Err(row_error(index + 1, format!("id `{}` was used by a row before", row.id)));
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(BenchError::Empty { workload: name.to_owned() });
        }
        Ok(Workload { name: name.to_owned(), sha256: sha256_hex(text), rows_total, rows })
    }
}

/// serde's message, with the column in front of it instead of a line number that is always 1.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let message = text.split(" at line ").next().unwrap_or(&text);
    format!("column {}: {message}", error.column())
}

fn unpack(bytes: &[u8]) -> std::io::Result<String> {
    let mut text = String::new();
    let limit = UNPACKED_BYTES_MAX + 1;
    if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        zstd::stream::read::Decoder::new(bytes)?.take(limit).read_to_string(&mut text)?;
    } else if bytes.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(bytes).take(limit).read_to_string(&mut text)?;
    } else {
        bytes.take(limit).read_to_string(&mut text)?;
    }
    if text.len() as u64 > UNPACKED_BYTES_MAX {
        return Err(std::io::Error::other(format!("it unpacks to more than {UNPACKED_BYTES_MAX} bytes")));
    }
    Ok(text.trim_start_matches('\u{feff}').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str =
        "{\"id\":\"a/1\",\"turns\":[\"hi\",\"more\"],\"meta\":{}}\n\n{\"id\":\"a/2\",\"turns\":[\"yo\"]}\n";

    #[track_caller]
    fn refused(text: &str, line: usize, word: &str) {
        match Workload::parse("w", text, None) {
            Err(BenchError::Row { line: found, problem, .. }) => {
                assert_eq!(found, line);
                assert!(problem.contains(word), "{problem}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rows_keep_their_order_and_the_limit_counts_rows_not_lines() {
        let all = Workload::parse("w", TWO, None).unwrap();
        assert_eq!((all.rows.len(), all.rows_total), (2, 2));
        assert_eq!(all.rows[0].turns, ["hi", "more"]);
        let one = Workload::parse("w", TWO, Some(1)).unwrap();
        assert_eq!((one.rows.len(), one.rows_total), (1, 2));
    }

    #[test]
    fn a_broken_row_is_refused_with_its_line() {
        refused("{\"id\":\"a\",\"turns\":[\"x\"]}\n{\"id\":", 2, "column");
        refused("{\"id\":\"a\",\"turns\":[]}", 1, "no turns");
        refused("{\"id\":\"a\",\"turns\":[\"  \"]}", 1, "is empty");
        refused("{\"turns\":[\"x\"]}", 1, "id");
        refused("{\"id\":\"a\",\"turns\":[\"x\"]}\n{\"id\":\"a\",\"turns\":[\"y\"]}", 2, "before");
        assert!(matches!(Workload::parse("w", "\n", None), Err(BenchError::Empty { .. })));
    }

    #[test]
    fn packed_files_read_like_plain_ones_whatever_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("set.jsonl");
        std::fs::write(&plain, TWO).unwrap();
        let zst = dir.path().join("set.jsonl.zst");
        std::fs::write(&zst, zstd::encode_all(TWO.as_bytes(), 1).unwrap()).unwrap();
        let gz = dir.path().join("odd-name");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, TWO.as_bytes()).unwrap();
        std::fs::write(&gz, encoder.finish().unwrap()).unwrap();
        let want = Workload::read(&plain, None).unwrap();
        assert_eq!(want.name, "set");
        for path in [zst, gz] {
            assert_eq!(Workload::read(&path, None).unwrap().rows, want.rows);
        }
        std::fs::write(&plain, zstd::encode_all(TWO.as_bytes(), 1).unwrap().split_at(20).0).unwrap();
        assert!(matches!(Workload::read(&plain, None), Err(BenchError::ReadWorkload { .. })));
    }
}
