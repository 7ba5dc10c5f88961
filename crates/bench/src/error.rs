//! What can go wrong while measuring.

use std::path::PathBuf;

/// An error of another layer, passed through with its own message.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why a benchmark could not be read, run or written.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A workload file could not be opened or unpacked.
    #[error("workload `{}` cannot be read: {source}", path.display())]
    ReadWorkload {
        /// The file.
        path: PathBuf,
        /// What the operating system or the decompressor said.
        source: std::io::Error,
    },
    /// A row of a workload is no row.
    #[error("workload `{workload}`, line {line}: {problem}")]
    Row {
        /// File or name of the workload.
        workload: String,
        /// 1-based.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A workload holds no rows.
    #[error("workload `{workload}` holds no rows")]
    Empty {
        /// File or name of the workload.
        workload: String,
    },
    /// No row of the workload could be measured.
    #[error(
        "no row of workload `{workload}` could be measured: {skipped} skipped, the first because {first}"
    )]
    NothingMeasured {
        /// Name of the workload.
        workload: String,
        /// Rows skipped.
        skipped: usize,
        /// Reason of the first.
        first: String,
    },
    /// The caller stopped the run before one sample was complete.
    #[error("stopped before the first sample of workload `{workload}` was complete")]
    Stopped {
        /// Name of the workload.
        workload: String,
    },
    /// The chat template or tokenizer failed on a row.
    #[error("row `{id}`, turn {turn}: {source}")]
    Dialogue {
        /// Row.
        id: String,
        /// 0-based turn.
        turn: usize,
        /// What the text layer said.
        source: BoxError,
    },
    /// The engine failed on a row.
    #[error("row `{id}`, turn {turn}, {side} run: {source}")]
    Run {
        /// Row.
        id: String,
        /// 0-based turn.
        turn: usize,
        /// `plain` or `speculative`.
        side: &'static str,
        /// What the engine said.
        source: BoxError,
    },
    /// The engine failed outside a workload.
    #[error("the engine failed while it was measured: {source}")]
    Kernels {
        /// What the engine said.
        source: BoxError,
    },
    /// A record file is not one.
    #[error("`{name}` is no bench record: {problem}")]
    Record {
        /// File or name.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A record was written by a later version.
    #[error("bench record `{name}` has format version {found}, but this program reads up to {supported}")]
    RecordVersion {
        /// File or name.
        name: String,
        /// Version in the file.
        found: u32,
        /// Newest version known here.
        supported: u32,
    },
    /// A record could not be turned into JSON.
    #[error("the record cannot be written as JSON: {source}")]
    Json {
        /// What the serialiser said.
        source: serde_json::Error,
    },
    /// A chart could not be drawn.
    #[error("chart `{chart}` cannot be drawn: {problem}")]
    Chart {
        /// Its title.
        chart: &'static str,
        /// What the plotting library said.
        problem: String,
    },
    /// A report of nothing.
    #[error("a report needs at least one record")]
    NoRecords,
}

impl BenchError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            BenchError::ReadWorkload { .. } => {
                "give a JSONL file, plain or packed as .gz or .zst, with rows {\"id\", \"turns\": [..]}"
                    .into()
            }
            BenchError::Row { .. } => {
                "each row is one JSON object: {\"id\": \"..\", \"turns\": [\"first user turn\", ..]}".into()
            }
            BenchError::Empty { .. } => {
                "give a file with at least one row, or raise `--limit` above 0".into()
            }
            BenchError::NothingMeasured { .. } => {
                "use a workload with shorter prompts, or lower `--max-new-tokens`".into()
            }
            BenchError::RecordVersion { .. } => {
                "read it with the draftsmith version that wrote it, or a later one".into()
            }
            BenchError::Record { .. } => {
                "records are what `bench --report DIR` writes to DIR; `--json FILE` is their summary".into()
            }
            _ => return None,
        })
    }
}
