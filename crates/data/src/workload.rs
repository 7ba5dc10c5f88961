//! Workloads: prompts to measure on, `{"id", "turns": [user turn, …], "system"?, "tools"?, "category"?, "meta"?}`.

use std::io::{self, BufRead};
use std::path::Path;

use serde_json::Value;

use crate::{DataError, ReadOptions, Row, RowError, SourceReader};

/// One conversation to measure on: user turns that the target answers one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkItem {
    /// The row's id; its place where the file gives none.
    pub id: String,
    /// User turns.
    pub turns: Vec<String>,
    /// System message.
    pub system: Option<String>,
    /// Tool descriptions.
    pub tools: Option<Value>,
    /// Category for tables.
    pub category: Option<String>,
}

/// Reads one line of a workload. Rows in the shapes of training data are fine too: their user turns are taken.
///
/// # Errors
/// [`RowError`]; never panics.
pub fn parse_work_item(line: &[u8]) -> Result<WorkItem, RowError> {
    item_of(crate::parse_conversation_line(line)?)
}

fn item_of(row: Row) -> Result<WorkItem, RowError> {
    let Row::Conversation(row) = row else {
        return Err(RowError::WrongType { field: "input_ids", wanted: "a prompt in words" });
    };
    let turns = row.messages.iter().filter(|m| m.role == "user").map(|m| m.content.clone()).collect();
    let system = row.messages.first().filter(|m| m.role == "system").map(|m| m.content.clone());
    Ok(WorkItem { id: row.id.unwrap_or_default(), turns, system, tools: row.tools, category: row.domain })
}

/// Reads a workload file (plain, gzip, zstd), at most `limit` rows.
///
/// # Errors
/// [`DataError`], with file and line; a file without rows is [`DataError::NoRows`].
pub fn read_workload(path: &Path, limit: Option<usize>) -> Result<Vec<WorkItem>, DataError> {
    collect(SourceReader::open(path, ReadOptions::default())?, path, limit)
}

/// Reads a workload that is in memory; `name` is its name in messages.
///
/// # Errors
/// As [`read_workload`].
pub fn read_workload_bytes(
    name: &Path,
    bytes: Vec<u8>,
    limit: Option<usize>,
) -> Result<Vec<WorkItem>, DataError> {
    let reader: Box<dyn BufRead + Send> = Box::new(io::Cursor::new(bytes));
    collect(SourceReader::from_reader(name, reader, ReadOptions::default())?, name, limit)
}

fn collect(mut reader: SourceReader, path: &Path, limit: Option<usize>) -> Result<Vec<WorkItem>, DataError> {
    let mut items = Vec::new();
    while limit.is_none_or(|limit| items.len() < limit) {
        let Some((location, row)) = reader.next_row()? else { break };
        let mut item = row
            .and_then(item_of)
            .map_err(|problem| DataError::BadRow { location: location.clone(), problem })?;
        if item.id.is_empty() {
            item.id = location.number.to_string();
        }
        items.push(item);
    }
    if items.is_empty() && limit != Some(0) {
        return Err(DataError::NoRows {
            files: format!("`{}`", path.display()),
            dropped: "it has no rows".into(),
        });
    }
    Ok(items)
}
