//! Files in all shapes.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use draftsmith_data::{
    DataError, DropReason, LoadOptions, Ranged, ReadOptions, Row, RowError, SourceReader, SourceSpec, load,
    parse_conversation_line, parse_work_item, read_workload,
};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;

use crate::{chat, write};

/// A file as it is read from elsewhere; requests from this number on fail.
#[derive(Debug)]
struct Elsewhere(Vec<u8>, AtomicU64);

impl Elsewhere {
    fn of(path: &Path, requests: u64) -> Arc<Elsewhere> {
        Arc::new(Elsewhere(std::fs::read(path).expect("a file"), AtomicU64::new(requests)))
    }
}

impl Ranged for Elsewhere {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, from: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let left = self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map_err(|_| std::io::Error::other("the line is dead"))?;
        Ok(self.0[from as usize..from as usize + len].to_vec())
    }
}

/// The texts of a file's rows, which are the same wherever it lies.
fn contents(path: &Path) -> Vec<String> {
    let here = rows_of(SourceReader::open(path, ReadOptions::default()).expect("it opens"));
    let file = Elsewhere::of(path, u64::MAX);
    let there = SourceReader::open_ranged(path, file, ReadOptions::default()).expect("it opens elsewhere");
    assert_eq!(here, rows_of(there), "{}", path.display());
    here
}

#[test]
fn what_keeps_from_reading_a_file_elsewhere_is_told_as_that() {
    let folder = tempfile::tempdir().expect("a folder");
    let long: String = (0..30_000).map(|i| chat(&format!("{i} {}", "x".repeat(900)), "b") + "\n").collect();
    let lines = write(folder.path(), "a.jsonl", &long);
    let packed = write(folder.path(), "b.jsonl.zst", zstd::encode_all(long.as_bytes(), 1).expect("zstd"));
    let dead = |path: &Path, requests: u64| {
        let opened = SourceReader::open_ranged(path, Elsewhere::of(path, requests), ReadOptions::default());
        opened.and_then(|mut reader| {
            while reader.next_row()?.is_some() {}
            Ok(())
        })
    };
    assert!(matches!(dead(&lines, 0), Err(DataError::Io { .. })));
    assert!(matches!(dead(&packed, 0), Err(DataError::Io { .. })));
    match dead(&lines, 2) {
        Err(DataError::IoAt { location, source }) => {
            assert!(location.number > 10_000, "{location}");
            assert_eq!(source.to_string(), "the line is dead");
        }
        other => panic!("{other:?}"),
    }
    dead(&lines, 4).expect("30 MB are four pieces");
    let loaded = |requests| {
        let elsewhere: Option<Arc<dyn Ranged>> = Some(Elsewhere::of(&lines, requests));
        let source = SourceSpec { elsewhere, ..SourceSpec::new("s3://b/a.jsonl") };
        // Not even where broken rows are dropped: these rows are not broken.
        load(&[source], &LoadOptions::default(), |_| {})
    };
    assert_eq!(loaded(4).expect("rows").rows.len(), 30_000);
    let error = loaded(3).expect_err("dead");
    assert!(error.to_string().starts_with("cannot read `s3://b/a.jsonl`, line "), "{error}");
}

fn rows_of(reader: SourceReader) -> Vec<String> {
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
        write(folder.path(), "blank.json", format!("\u{feff}\n\n     {array}")),
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
    // A file elsewhere that is gone when its rows are read is no broken file. Opening takes two requests.
    let mut dead =
        SourceReader::open_ranged(&path, Elsewhere::of(&path, 2), ReadOptions::default()).expect("it opens");
    match dead.next_row() {
        Err(DataError::IoAt { source, .. }) => assert_eq!(source.to_string(), "the line is dead"),
        other => panic!("{other:?}"),
    }
    assert!(dead.next_row().expect("its end").is_none());

    let mut bytes = std::fs::read(&path).expect("bytes");
    bytes.truncate(bytes.len() - 7);
    let broken = write(folder.path(), "broken.parquet", bytes);
    let error = SourceReader::open(&broken, ReadOptions::default()).expect_err("broken");
    assert!(matches!(error, DataError::Parquet { .. }), "{error}");
}

#[test]
fn a_broken_group_of_parquet_rows_costs_itself_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pairs.parquet");
    let schema = "message pairs { required binary prompt (UTF8); required binary completion (UTF8); \
                  optional double score; required binary blob; }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let file = std::fs::File::create(&path).expect("a file");
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).expect("a writer");
    // The second group holds bytes in a text column that are no text.
    for values in [["a", "b"].map(str::as_bytes), [b"c", b"\xff\xfe"], ["e", "f"].map(str::as_bytes)] {
        let mut group = writer.next_row_group().expect("a row group");
        for column in ["prompt", "completion", "score", "blob"] {
            let mut writer = group.next_column().expect("a column").expect("a column");
            let values = values.map(|v| ByteArray::from(v.to_vec()));
            match column {
                "prompt" => writer.typed::<ByteArrayType>().write_batch(&values, None, None),
                "completion" => writer.typed::<ByteArrayType>().write_batch(
                    &[values[1].clone(), values[0].clone()],
                    None,
                    None,
                ),
                "score" => writer.typed::<DoubleType>().write_batch(&[f64::NAN], Some(&[1, 0]), None),
                _ => writer.typed::<ByteArrayType>().write_batch(
                    &[b"\xff".to_vec(), b"x".to_vec()].map(ByteArray::from),
                    None,
                    None,
                ),
            }
            .expect("written");
            writer.close().expect("closed");
        }
        group.close().expect("closed");
    }
    writer.close().expect("closed");
    let loaded = load(&[SourceSpec::new(&path)], &LoadOptions::default(), |_| {}).expect("rows");
    let found: Vec<u64> = loaded.rows.iter().map(|row| row.location.number).collect();
    assert_eq!(found, [1, 2, 5, 6]);
    let report = &loaded.report;
    assert_eq!((report.rows_read, report.dropped_for(DropReason::BrokenParquet)), (6, 2));
    assert!(
        report.first_dropped["broken_parquet"].starts_with("`pairs.parquet`, row 3: broken Parquet: "),
        "{report:?}"
    );
    assert!(report.changed.is_empty(), "NaN in a column that nobody reads: {report:?}");
    assert_eq!(report.unused_keys["blob"], 4);
    let strict = LoadOptions { strict: true, ..LoadOptions::default() };
    let error = load(&[SourceSpec::new(&path)], &strict, |_| {}).expect_err("strict");
    assert!(error.to_string().contains("row 3: broken Parquet"), "{error}");
}

#[track_caller]
fn fails(name: &str, bytes: impl AsRef<[u8]>, expected: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), name, bytes);
    let error = SourceReader::open(&path, ReadOptions::default())
        .and_then(|reader| reader.collect::<Result<Vec<_>, _>>())
        .expect_err("a broken file");
    let message = error.to_string().replace(&path.display().to_string(), name);
    assert!(message.starts_with(expected), "{message}");
    assert!(error.hint().is_some());
}

#[test]
fn broken_files_are_named() {
    let good = chat("a", "b");
    fails("a.json", format!("[{good},\n{{]"), "`a.json`: broken JSON at line 3, column 2: the array that");
    fails(
        "a.json",
        format!("[{good}]\n[{good}]"),
        "`a.json`: broken JSON at line 3, column 1: more text follows",
    );
    let mut packed = zstd::encode_all(good.repeat(100).as_bytes(), 3).expect("zstd");
    packed.truncate(packed.len() - 5);
    fails("a.jsonl.zst", &packed, "cannot read `a.jsonl.zst`");
    fails("a.parquet", b"PAR1nothing", "`a.parquet`: broken Parquet at row 0");
    fails("a.jsonl", b"\xff\xfe{\0}\0", "`a.jsonl` is UTF-16 text");
    fails("a.jsonl", b"{\0}\0", "`a.jsonl` is UTF-16 text");
    fails("a.jsonl", b"PK\x03\x04rest", "`a.jsonl` is a zip archive");
    fails(
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "`a.parquet` is a Git LFS pointer",
    );
    fails("a.jsonl", b"<!doctype html>", "`a.jsonl` is a page");
}

/// What is wrong with the rows of a file whose other rows are `a|b`, one text each.
#[track_caller]
fn bad_rows(name: &str, bytes: impl AsRef<[u8]>, max_line_bytes: usize, expected: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(folder.path(), name, bytes);
    let reader = SourceReader::open(&path, ReadOptions { max_line_bytes }).expect("it opens");
    let mut found = Vec::new();
    let mut good = 0;
    for item in reader {
        match item.expect("the file is whole") {
            (_, Ok(_)) => good += 1,
            (location, Err(problem)) => found.push(format!(
                "{} {} {}: {problem}",
                if location.is_line { "line" } else { "row" },
                location.number,
                problem.reason().name()
            )),
        }
    }
    assert_eq!(good, 2, "{found:?}");
    assert_eq!(found, expected);
}

#[test]
fn a_broken_row_costs_itself_alone() {
    let good = chat("a", "b");
    let between = |bad: &[u8]| [good.as_bytes(), bad, b"\n", good.as_bytes()].concat();
    bad_rows(
        "a.jsonl",
        between(b"{\"messages\": ]"),
        999,
        &["line 2 broken_json: broken JSON at column 14: expected value"],
    );
    bad_rows(
        "a.jsonl",
        between(b"{\"prompt\": \"\xff\"}"),
        999,
        &["line 2 invalid_utf8: byte 13 is not UTF-8"],
    );
    bad_rows(
        "a.jsonl",
        between(b"{\"prompt\": \"x\0\"}"),
        999,
        &["line 2 broken_json: broken JSON at column 14: the text holds NUL bytes"],
    );
    bad_rows(
        "a.jsonl",
        between(&[0; 9]),
        999,
        &["line 2 broken_json: broken JSON at column 1: the text holds NUL bytes"],
    );
    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(200_000));
    bad_rows(
        "a.jsonl",
        between(long.as_bytes()),
        999,
        &["line 2 line_too_long: the line is longer than 999 bytes"],
    );
    let cut = format!("{good}{good}{}", &good[..20]);
    bad_rows(
        "a.jsonl",
        cut,
        999,
        &["line 3 cut_off: the line ends inside the row (EOF while parsing an object)"],
    );
    let windows = good.replace('\n', "\r\n");
    bad_rows("a.jsonl", format!("\u{feff}{windows}\r\n\u{feff}{windows}"), 999, &[]);
    bad_rows(
        "a.json",
        format!("[{good},\n\n{{\"prompt\": nan}},[],{good}]"),
        999,
        &[
            "row 2 broken_json: broken JSON at column 13: expected ident (the row starts on line 4)",
            "row 3 not_a_conversation: the row is not a JSON object",
        ],
    );
    let mut array = format!("[{good},{{\"prompt\":\"").into_bytes();
    array.extend_from_slice(b"\xff\"}, {\"prompt\": NaN, \"instruction\": \"x\"}]");
    bad_rows("a.json", array, 999, &["row 2 invalid_utf8: byte 12 is not UTF-8"]);
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
fn what_python_wrote_is_noted_where_it_is_read() {
    let notes = |line: &str| {
        let reader: Box<dyn std::io::BufRead + Send> = Box::new(std::io::Cursor::new(line.to_owned()));
        let mut reader = SourceReader::from_reader(Path::new("a.jsonl"), reader, ReadOptions::default())
            .expect("it opens");
        let row = reader.next_row().expect("a row").expect("a row").1;
        assert!(row.is_ok(), "{row:?}");
        reader.notes().changes.iter().map(|change| change.name()).collect::<Vec<_>>()
    };
    assert_eq!(notes(r#"{"score":NaN,"prompt":"a"}"#), [""; 0]);
    assert_eq!(notes(r#"{"score":"\ud83d","prompt":"a"}"#), [""; 0]);
    assert_eq!(notes(r#"{"system":NaN,"prompt":"a"}"#), ["not_finite_as_null"]);
    assert_eq!(notes(r#"{"prompt":"\ud83d"}"#), ["surrogate_replaced"]);
    assert_eq!(
        notes(r#"{"messages":[{"role":"user","content":"\ud83d","x":[1e999]}]}"#),
        ["surrogate_replaced", "not_finite_as_null"]
    );
}

#[test]
fn deep_nesting_is_refused() {
    let line = format!("{{\"messages\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(parse_conversation_line(line.as_bytes()), Err(RowError::BrokenJson { .. })));
}
