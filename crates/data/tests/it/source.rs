//! Files in all shapes.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use draftsmith_data::{
    DataError, ReadOptions, Row, RowError, SourceReader, parse_conversation_line, parse_work_item,
    read_workload,
};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

use crate::{chat, write};

fn contents(path: &Path) -> Vec<String> {
    let reader = SourceReader::open(path, ReadOptions::default()).expect("it opens");
    reader
        .map(|item| match item.expect("a row") {
            (_, Ok(Row::Conversation(row))) => {
                row.messages.iter().map(|m| m.content.clone()).collect::<Vec<_>>().join("|")
            }
            (location, other) => panic!("{location}: {other:?}"),
        })
        .collect()
}

#[test]
fn plain_packed_and_array_files_give_the_same_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let lines = format!("{}\n \n{}", chat("a", "b"), chat("c", "d"));
    let array = format!("[{},{}]", chat("a", "b"), chat("c", "d"));
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).expect("gzip");
        encoder.finish().expect("gzip")
    };
    let files = [
        write(folder.path(), "a.jsonl", &lines),
        write(folder.path(), "bom.jsonl", format!("\u{feff}{lines}")),
        write(folder.path(), "b.jsonl.zst", zstd::encode_all(lines.as_bytes(), 3).expect("zstd")),
        write(folder.path(), "c.jsonl.gz", gzip(lines.as_bytes())),
        // Two members, as parallel compressors write them; and a name that says nothing.
        write(
            folder.path(),
            "d",
            [gzip(chat("a", "b").as_bytes()), gzip(chat("c", "d").as_bytes())].concat(),
        ),
        write(folder.path(), "e.json", &array),
        write(folder.path(), "f.json.gz", gzip(array.as_bytes())),
    ];
    for file in files {
        assert_eq!(contents(&file), ["a|b", "c|d"], "{}", file.display());
    }
}

#[test]
fn parquet_with_a_list_of_messages_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("chat.parquet");
    let schema = "message chat {
        optional binary id (UTF8);
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); } } }
    }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let file = std::fs::File::create(&path).expect("a file");
    let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    // Two rows: two turns and one. Definition and repetition levels as the format wants them.
    let columns: [(&[&str], &[i16], &[i16]); 3] = [
        (&["x", "y"], &[1, 1], &[0, 0]),
        (&["user", "assistant", "user"], &[4, 4, 4], &[0, 1, 0]),
        (&["a", "b", "c"], &[4, 4, 4], &[0, 1, 0]),
    ];
    for (values, definition, repetition) in columns {
        let mut column = group.next_column().expect("a column").expect("a column");
        let values: Vec<ByteArray> = values.iter().map(|v| ByteArray::from(*v)).collect();
        column
            .typed::<ByteArrayType>()
            .write_batch(&values, Some(definition), Some(repetition))
            .expect("written");
        column.close().expect("closed");
    }
    group.close().expect("closed");
    writer.close().expect("closed");
    assert_eq!(contents(&path), ["a|b", "c"]);

    let mut bytes = std::fs::read(&path).expect("bytes");
    bytes.truncate(bytes.len() - 7);
    let broken = write(folder.path(), "broken.parquet", bytes);
    let error = SourceReader::open(&broken, ReadOptions::default()).expect_err("broken");
    assert!(matches!(error, DataError::Parquet { .. }), "{error}");
}

#[track_caller]
fn fails(name: &str, bytes: impl AsRef<[u8]>, max_line_bytes: usize, expected: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), name, bytes);
    let error = SourceReader::open(&path, ReadOptions { max_line_bytes })
        .and_then(|reader| reader.collect::<Result<Vec<_>, _>>())
        .expect_err("a broken file");
    let message = error.to_string().replace(&path.display().to_string(), name);
    assert!(message.starts_with(expected), "{message}");
    assert!(error.hint().is_some());
}

#[test]
fn broken_files_are_named_with_their_line() {
    let good = chat("a", "b");
    fails(
        "a.jsonl",
        format!("{good}{good}{{\"messages\": ]\n{good}"),
        999,
        "`a.jsonl`: broken JSON at line 3, column 14: ",
    );
    fails(
        "a.jsonl",
        format!("{good}{}", &good[..20]),
        999,
        "`a.jsonl`: broken JSON at line 2, column 20: EOF",
    );
    fails("a.jsonl", b"\xff\xfe\n", 999, "`a.jsonl`: broken JSON at line 1");
    fails("a.jsonl", format!("{good}{good}"), 40, "`a.jsonl`, line 1 is longer than 40 bytes");
    fails("a.json", format!("[{good},\n{{]"), 999, "`a.json`: broken JSON at line 3");
    let mut packed = zstd::encode_all(good.repeat(100).as_bytes(), 3).expect("zstd");
    packed.truncate(packed.len() - 5);
    fails("a.jsonl.zst", &packed, 999, "cannot read `a.jsonl.zst`");
    fails("a.parquet", b"PAR1nothing", 999, "`a.parquet`: broken Parquet at row 0");
}

#[test]
fn a_missing_file_has_a_hint() {
    let error =
        SourceReader::open(Path::new("no/such/file.jsonl"), ReadOptions::default()).expect_err("missing");
    assert!(error.to_string().starts_with("cannot read `no/such/file.jsonl`"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("check the path")));
}

#[test]
fn workloads_are_read_and_their_broken_rows_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows = "{\"id\":\"x/1\",\"category\":\"math\",\"turns\":[\"a\",\"b\"],\"system\":\"s\",\"meta\":{}}\n{\"turns\":[\"c\"]}\n";
    let path = write(folder.path(), "w.jsonl.zst", zstd::encode_all(rows.as_bytes(), 3).expect("zstd"));
    let items = read_workload(&path, None).expect("a workload");
    assert_eq!(items.len(), 2);
    assert_eq!((items[0].id.as_str(), items[0].category.as_deref()), ("x/1", Some("math")));
    assert_eq!(
        (items[0].turns.as_slice(), items[0].system.as_deref()),
        (&["a".into(), "b".into()][..], Some("s"))
    );
    assert_eq!(items[1].id, "2");
    assert_eq!(read_workload(&path, Some(1)).expect("a workload").len(), 1);
    let path = write(folder.path(), "bad.jsonl", "{\"turns\":[\"a\"]}\n{\"turns\":[]}\n");
    let error = read_workload(&path, None).expect_err("a broken row");
    assert!(error.to_string().ends_with("line 2: the conversation is empty"), "{error}");
    let path = write(folder.path(), "empty.jsonl", "");
    assert!(matches!(read_workload(&path, None), Err(DataError::NoRows { .. })));
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail_politely(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_conversation_line(&line);
    }

    #[test]
    fn any_json_parses_or_fails_politely(
        line in "\\{(\"(messages|conversations|turns|prompt|input_ids|loss_mask|tools|system|id|role|content|from|value|tool_calls)\":|\\[|\\]|\\{|\\}|,|\"user\"|\"assistant\"|1|-1|null|true){0,30}\\}",
    ) {
        if let Err(error) = parse_conversation_line(line.as_bytes()) {
            let _ = error.reason();
        }
        let _ = parse_work_item(line.as_bytes());
    }
}

#[test]
fn deep_nesting_is_refused() {
    let line = format!("{{\"messages\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(parse_conversation_line(line.as_bytes()), Err(RowError::BrokenJson { .. })));
}
