//! The data sets that people train on: `fixtures/data-sets/NAME.jsonl` gives `NAME.txt`, written by hand.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use draftsmith_data::{ReadOptions, Row, SourceReader};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/data-sets")
}

/// Rows as text: a paragraph each, of what comes out or of why it does not.
fn described(path: &Path) -> String {
    let mut reader = SourceReader::open(path, ReadOptions::default()).expect("it opens");
    let mut out = String::new();
    while let Some((location, row)) = reader.next_row().expect("the file is whole") {
        let mut line = |text: String| writeln!(out, "{text}").expect("text grows");
        match row {
            Err(problem) => {
                line(format!("dropped as {}: {problem}", problem.reason().name()));
                let error = draftsmith_data::DataError::BadRow { location, problem };
                line(format!("hint: {}", error.hint().expect("a hint")));
            }
            Ok(Row::Tokens(row)) => {
                let mask: Vec<u8> = row.loss_mask.iter().map(|m| u8::from(*m)).collect();
                line(format!("ids {:?} mask {mask:?}", row.ids));
            }
            Ok(Row::Conversation(row)) => {
                for (name, text) in [
                    ("id", &row.id),
                    ("domain", &row.domain),
                    ("source", &row.source),
                    ("license", &row.license),
                ] {
                    if let Some(text) = text {
                        line(format!("({name} {text})"));
                    }
                }
                if let Some(tools) = &row.tools {
                    line(format!("(tools {tools})"));
                }
                if row.last_answer_cut {
                    line("(cut)".into());
                }
                for message in &row.messages {
                    let mut fields = serde_json::to_value(message).expect("a message is JSON");
                    let fields = fields.as_object_mut().expect("an object");
                    fields.retain(|key, _| key != "role" && key != "content");
                    let more = match fields.is_empty() {
                        true => String::new(),
                        false => format!(" {}", Value::Object(fields.clone())),
                    };
                    line(format!("{}: {:?}{more}", message.role, message.content));
                }
            }
        }
        let notes = reader.notes();
        if !notes.unused_keys.is_empty() {
            writeln!(out, "unused: {}", notes.unused_keys.join(", ")).expect("text grows");
        }
        for change in &notes.changes {
            writeln!(out, "changed: {}", change.name()).expect("text grows");
        }
        out.push('\n');
    }
    out
}

#[test]
fn every_data_set_gives_the_rows_that_stand_beside_it() {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("the fixtures")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    files.sort();
    assert_eq!(files.len(), 15, "{files:?}");
    let mut wrong = Vec::new();
    for file in files {
        let found = described(&file);
        let expected = std::fs::read_to_string(file.with_extension("txt")).unwrap_or_default();
        if found != expected {
            wrong.push(format!("── {}\n{found}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
