//! Logs of a run: one JSON line per event, and a TensorBoard event file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::io_error;

/// `log.jsonl`: one object per line, each with `step`.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    file: File,
}

impl JsonLog {
    /// Opens the log of a run that continues after `step` optimiser steps: later lines, left by a run that was
    /// killed after its last checkpoint, are dropped.
    pub fn open(path: &Path, step: u64) -> Result<JsonLog, TrainError> {
        let old = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io_error("read", path, e)),
        };
        let kept: Vec<u8> = old
            .split_inclusive(|b| *b == b'\n')
            .filter(|line| {
                let of_line =
                    serde_json::from_slice::<Value>(line).ok().and_then(|v| v.get("step")?.as_u64());
                of_line.is_some_and(|s| s <= step)
            })
            .flatten()
            .copied()
            .collect();
        if kept != old {
            draftsmith_formats::atomic::write(path, &kept)?;
        }
        let opened = OpenOptions::new().create(true).append(true).open(path);
        Ok(JsonLog { path: path.to_owned(), file: opened.map_err(|e| io_error("open", path, e))? })
    }

    /// Appends one line.
    pub fn write(&mut self, value: &Value) -> Result<(), TrainError> {
        self.file.write_all(format!("{value}\n").as_bytes()).map_err(|e| io_error("write", &self.path, e))
    }
}

/// A TensorBoard event file: TFRecord framing around hand-encoded `Event` messages with scalar summaries.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A length-delimited field of a protocol-buffer message.
fn bytes_field(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    varint(out, number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1]; // double wall_time = 1
    out.extend_from_slice(&wall_time.to_le_bytes());
    out.push(2 << 3); // int64 step = 2
    varint(&mut out, step);
    out
}

/// `Event { summary { value { tag, simple_value } … } }`
fn scalars(wall_time: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        bytes_field(&mut entry, 1, tag.as_bytes());
        entry.push(2 << 3 | 5); // float simple_value = 2
        entry.extend_from_slice(&(*value as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &entry);
    }
    let mut out = event(wall_time, step);
    bytes_field(&mut out, 5, &summary);
    out
}

/// Length, checksum of the length, data, checksum of the data; checksums are CRC-32C, rotated and offset.
fn record(data: &[u8]) -> Vec<u8> {
    let masked =
        |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let len = (data.len() as u64).to_le_bytes();
    let mut out = len.to_vec();
    out.extend_from_slice(&masked(&len));
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(data));
    out
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl TensorBoard {
    /// Creates an event file in `folder` for a run that continues after `step` steps. TensorBoard reads all files
    /// of a folder and shows the newest value of a step.
    pub fn create(folder: &Path, step: u64) -> Result<TensorBoard, TrainError> {
        draftsmith_formats::atomic::create_dir_all(folder)?;
        let path = folder.join(format!("events.out.tfevents.{:010}.draftsmith.{step}", now() as u64));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let mut log = TensorBoard { file: file.map_err(|e| io_error("create", &path, e))?, path };
        let mut first = event(now(), step);
        bytes_field(&mut first, 3, b"brain.Event:2");
        log.append(&first)?;
        Ok(log)
    }

    /// Writes named numbers of one step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), TrainError> {
        self.append(&scalars(now(), step, values))
    }

    fn append(&mut self, event: &[u8]) -> Result<(), TrainError> {
        self.file.write_all(&record(event)).map_err(|e| io_error("write", &self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_published_bytes() {
        // Derived by hand from the protobuf wire format and masked crc32c for Event(wall_time=1.5, step=300,
        // summary=[("a", 2.0)]).
        let data = scalars(1.5, 300, &[("a", 2.0)]);
        let wanted: &[u8] = &[
            0x09, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f, 0x10, 0xac, 0x02, 0x2a, 0x0a, 0x0a, 0x08, 0x0a, 0x01, b'a',
            0x15, 0, 0, 0, 0x40,
        ];
        assert_eq!(data, wanted);
        let framed = record(&data);
        assert_eq!(framed.len(), 8 + 4 + data.len() + 4);
        assert_eq!(framed[..8], (data.len() as u64).to_le_bytes());
    }

    #[test]
    fn checksums_are_masked_crc32c() {
        // crc32c("123456789") = 0xe3069283, the value of the polynomial's definition.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let framed = record(b"123456789");
        let masked = 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(framed[framed.len() - 4..], masked.to_le_bytes());
    }

    #[test]
    fn reopening_a_log_drops_lines_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = JsonLog::open(&path, 0).unwrap();
        for step in 1..=4 {
            log.write(&serde_json::json!({ "step": step })).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"step\": 5, tor")
            .unwrap();
        drop(log);
        JsonLog::open(&path, 3).unwrap().write(&serde_json::json!({ "step": 4, "again": true })).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4,\"again\":true}\n");
    }
}
