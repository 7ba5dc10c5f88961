use super::*;
use proptest::prelude::*;

/// A small file with every value type and several tensor types.
fn sample() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.set("general.architecture", GgufValue::Str("llama".into()));
    w.set("a.u8", GgufValue::U8(1)).set("a.i8", GgufValue::I8(-1));
    w.set("a.u16", GgufValue::U16(2)).set("a.i16", GgufValue::I16(-2));
    w.set("a.u32", GgufValue::U32(3)).set("a.i32", GgufValue::I32(-3));
    w.set("a.f32", GgufValue::F32(0.5)).set("a.bool", GgufValue::Bool(true));
    w.set("a.u64", GgufValue::U64(u64::MAX)).set("a.i64", GgufValue::I64(-4));
    w.set("a.f64", GgufValue::F64(0.25));
    w.set("b.strings", GgufValue::Array(GgufArray::Str(vec!["Ä".into(), String::new(), "b c".into()])));
    w.set("b.floats", GgufValue::Array(GgufArray::F32(vec![1.0, -1.0])));
    w.set("b.ints", GgufValue::Array(GgufArray::I32(vec![1, -1])));
    w.set("b.flags", GgufValue::Array(GgufArray::Bool(vec![true, false])));
    let inner = vec![GgufArray::U8(vec![1, 2]), GgufArray::U64(vec![]), GgufArray::I64(vec![-1])];
    w.set("b.nested", GgufValue::Array(GgufArray::Array(inner)));
    let f32s: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let q4: Vec<u8> = (0..36).collect();
    w.tensor("x", &[3, 2], GgmlType::F32, &f32s);
    w.tensor("y", &[32, 2], GgmlType::Q4_0, &q4);
    w.tensor("z", &[1], GgmlType::BF16, &q4[..2]);
    w.to_bytes()
}

/// Bytes of a file with the given counts, metadata and directory, as a hand would write them.
fn raw(tensors: u64, keys: u64, rest: &[u8]) -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    b.extend(3u32.to_le_bytes());
    b.extend(tensors.to_le_bytes());
    b.extend(keys.to_le_bytes());
    b.extend_from_slice(rest);
    b
}

fn raw_str(text: &str) -> Vec<u8> {
    let mut b = (text.len() as u64).to_le_bytes().to_vec();
    b.extend_from_slice(text.as_bytes());
    b
}

fn raw_tensor(name: &str, dims: &[u64], id: u32, start: u64) -> Vec<u8> {
    let mut b = raw_str(name);
    b.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
    b.extend(id.to_le_bytes());
    b.extend(start.to_le_bytes());
    b
}

#[track_caller]
fn check_refused(bytes: &[u8], expected: &str) {
    let err = GgufFile::parse(bytes).expect_err("must be refused");
    assert_eq!(err.to_string(), expected);
    assert!(err.hint().is_some());
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample();
    let file = GgufFile::parse(&bytes).unwrap();
    assert_eq!((file.version(), file.alignment()), (3, 32));
    assert_eq!(file.get_str("general.architecture").unwrap(), "llama");
    assert_eq!(file.get_u32("a.u8").unwrap(), 1);
    assert_eq!(file.get_u32("a.u32").unwrap(), 3);
    assert_eq!(file.get_u64("a.u64").unwrap(), u64::MAX);
    assert_eq!(file.get_f32("a.f32").unwrap(), 0.5);
    assert_eq!(file.get_f32("a.f64").unwrap(), 0.25);
    assert!(file.get_bool("a.bool").unwrap());
    assert_eq!(file.get_str_array("b.strings").unwrap(), ["Ä", "", "b c"]);
    assert_eq!(file.get_f32_array("b.floats").unwrap(), [1.0, -1.0]);
    assert_eq!(file.get_i64_array("b.ints").unwrap(), [1, -1]);
    assert!(matches!(file.get("b.nested"), Some(GgufValue::Array(GgufArray::Array(a))) if a.len() == 3));
    assert_eq!(file.find_u32("absent").unwrap(), None);
    let y = file.tensor("y").unwrap();
    assert_eq!((y.dims.as_slice(), y.ggml_type, y.elements()), ([32, 2].as_slice(), GgmlType::Q4_0, 64));
    assert_eq!(file.data(y), (0..36).collect::<Vec<u8>>());
    assert!(file.tensors().iter().all(|t| t.offset % 32 == 0));

    // Written again from what was read: the same bytes.
    let mut again = GgufWriter::new();
    for (key, value) in file.metadata() {
        again.set(key.clone(), value.clone());
    }
    for t in file.tensors() {
        again.tensor(t.name.clone(), &t.dims, t.ggml_type, file.data(t));
    }
    assert_eq!(again.to_bytes(), bytes);
}

#[test]
fn a_version_2_file_reads_the_same() {
    let mut bytes = sample();
    bytes[4] = 2;
    let file = GgufFile::parse(&bytes).unwrap();
    assert_eq!((file.version(), file.tensors().len()), (2, 3));
}

#[test]
fn a_mapped_file_names_itself_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, sample()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.data(file.tensor("z").unwrap()), [0, 1]);
    let err = file.get_str("a.u32").unwrap_err();
    let expected =
        format!("GGUF file `{}`: metadata key `a.u32` is 3 (u32), expected a string", path.display());
    assert_eq!(err.to_string(), expected);
    let err = file.get_u32("a.i32").unwrap_err();
    assert!(err.to_string().ends_with("is -3 (i32), expected an unsigned 32-bit integer"), "{err}");
    let err = file.get_u32("llama.block_count").unwrap_err();
    assert!(err.to_string().ends_with("metadata key `llama.block_count` is missing"), "{err}");
    let err = file.tensor("w").unwrap_err();
    assert!(err.to_string().ends_with("tensor `w` is missing"), "{err}");
    std::fs::write(&path, b"").unwrap();
    let err = GgufFile::open(&path).unwrap_err();
    assert!(err.to_string().ends_with("magic is ``, expected `GGUF`"), "{err}");
    assert!(matches!(GgufFile::open(dir.path()), Err(GgufError::Open(_))));
    assert!(matches!(GgufFile::open(dir.path().join("none")), Err(GgufError::Open(_))));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = sample();
    let file = GgufFile::parse(&bytes).unwrap();
    let end = file.tensors().iter().map(|t| t.offset + t.byte_len).max().unwrap();
    for len in 0..end {
        assert!(GgufFile::parse(&bytes[..len]).is_err(), "cut at {len} of {end}");
    }
    assert!(GgufFile::parse(&bytes[..end]).is_ok());
}

#[test]
fn wrong_heads_are_refused() {
    check_refused(b"", "magic is ``, expected `GGUF`");
    check_refused(b"GG", "magic is `GG`, expected `GGUF`");
    check_refused(b"PK\x03\x04aaaaaaaa", "magic is `PK\\x03\\x04`, expected `GGUF`");
    check_refused(b"GGUF\x01\0\0\0", "format version is 1, expected 2 or 3");
    check_refused(b"GGUF\0\0\0\x03", "byte order is big-endian, expected little-endian");
    check_refused(b"GGUF\x03\0", "truncated at byte 4: format version needs 4 bytes, 2 are left");
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    check_refused(
        &raw(0, u64::MAX, &[]),
        "number of metadata keys at byte 16 says 18446744073709551615 items, but only 0 bytes are left",
    );
    check_refused(
        &raw(u64::MAX / 32, 0, &[0; 64]),
        "number of tensors at byte 8 says 576460752303423487 items, but only 64 bytes are left",
    );
    for (id, item) in [(0u32, 1u64), (4, 4), (7, 1), (8, 8), (9, 12), (10, 8)] {
        for count in [u64::MAX, u64::MAX / item, 1 << 40, 100 / item + 1] {
            let mut entry = raw_str("k");
            entry.extend(9u32.to_le_bytes());
            entry.extend(id.to_le_bytes());
            entry.extend(count.to_le_bytes());
            entry.extend([0; 100]);
            check_refused(
                &raw(0, 1, &entry),
                &format!(
                    "array length of metadata key `k` at byte 41 says {count} items, but only 100 bytes are left"
                ),
            );
        }
    }
    let mut entry = raw_str("k");
    entry.extend(8u32.to_le_bytes());
    entry.extend((1u64 << 60).to_le_bytes());
    check_refused(
        &raw(0, 1, &entry),
        "truncated at byte 45: value of metadata key `k` needs 1152921504606846976 bytes, 0 are left",
    );
}

#[test]
fn broken_metadata_is_refused_with_its_key() {
    let entry = |id: u32, value: &[u8]| {
        let mut e = raw_str("k");
        e.extend(id.to_le_bytes());
        e.extend_from_slice(value);
        e
    };
    check_refused(
        &raw(0, 1, &entry(13, &[0; 8])),
        "metadata key `k` at byte 33 has value type 13, known are 0 to 12",
    );
    check_refused(
        &raw(0, 1, &entry(7, &[2])),
        "metadata key `k` at byte 37 holds boolean 2, expected 0 or 1",
    );
    check_refused(
        &raw(0, 1, &entry(8, b"\x02\0\0\0\0\0\0\0\xff\xfe")),
        "value of metadata key `k` at byte 45 is not UTF-8",
    );
    let twice = [entry(0, &[1]), entry(0, &[1])].concat();
    check_refused(&raw(0, 2, &twice), "metadata key `k` at byte 38 is there twice");
    let mut nameless = raw_str("");
    nameless.extend([0; 8]);
    check_refused(&raw(0, 1, &nameless), "metadata key `` at byte 24 is empty");

    let mut deep = Vec::new();
    for _ in 0..50 {
        deep.extend(9u32.to_le_bytes());
        deep.extend(1u64.to_le_bytes());
    }
    check_refused(&raw(0, 1, &entry(9, &deep)), "metadata key `k` nests arrays deeper than 4");

    for bad in [0u32, 3, 33] {
        let mut e = raw_str("general.alignment");
        e.extend(4u32.to_le_bytes());
        e.extend(bad.to_le_bytes());
        check_refused(
            &raw(0, 1, &e),
            &format!("metadata key `general.alignment` is {bad}, expected a power of two"),
        );
    }
}

#[test]
fn broken_tensors_are_refused_with_their_name() {
    let one = |dims: &[u64], id, start| {
        let mut b = raw(1, 0, &raw_tensor("w", dims, id, start));
        b.resize(b.len().next_multiple_of(32) + 64, 0);
        b
    };
    assert!(GgufFile::parse(&one(&[4, 4], 0, 0)).is_ok());
    check_refused(&one(&[4], 99, 0), "tensor `w` at byte 24 has type 99, which is not read");
    check_refused(&one(&[0, 4], 0, 0), "tensor `w` at byte 24 has dimensions [0, 4]: a dimension is 0");
    check_refused(
        &one(&[33], 2, 0),
        "tensor `w` at byte 24 has dimensions [33]: Q4_0 needs rows of a multiple of 32 elements",
    );
    check_refused(
        &one(&[1, 1, 1, 1, 1], 0, 0),
        "tensor `w` at byte 24 has dimensions []: 5 dimensions, expected 1 to 4",
    );
    for dims in [[1u64 << 33, 1 << 33], [u64::MAX, 2], [1 << 62, 2]] {
        let expected = format!("tensor `w` at byte 24 has dimensions {dims:?}: its size overflows 64 bits");
        check_refused(&one(&dims, 0, 0), &expected);
    }
    check_refused(
        &one(&[4], 0, 31),
        "tensor `w` starts at data offset 31, which is no multiple of the alignment 32",
    );
    check_refused(
        &one(&[4], 0, 64),
        "tensor `w` needs 16 bytes at data offset 64 (data begins at byte 64), but the file has 128 bytes",
    );
    let far = u64::MAX - 31;
    check_refused(
        &one(&[4], 0, far),
        &format!(
            "tensor `w` needs 16 bytes at data offset {far} (data begins at byte 64), but the file has 128 bytes"
        ),
    );
    let mut twice = raw(2, 0, &[raw_tensor("w", &[1], 0, 0), raw_tensor("w", &[1], 0, 0)].concat());
    twice.resize(256, 0);
    check_refused(&twice, "tensor `w` at byte 57 is there twice");
}

#[test]
fn block_sizes_are_those_of_ggml() {
    for t in GgmlType::ALL {
        assert_eq!(GgmlType::from_id(t.id()), Some(*t));
        assert!([1, 32, 64, 256].contains(&t.block_elements()));
    }
    // Bits per weight as the ggml project states them.
    let bits = |t: GgmlType| t.block_bytes() as f64 * 8.0 / t.block_elements() as f64;
    assert_eq!(bits(GgmlType::Q4_0), 4.5);
    assert_eq!(bits(GgmlType::Q4_1), 5.0);
    assert_eq!(bits(GgmlType::Q5_0), 5.5);
    assert_eq!(bits(GgmlType::Q5_1), 6.0);
    assert_eq!(bits(GgmlType::Q8_0), 8.5);
    assert_eq!(bits(GgmlType::Q2K), 2.625);
    assert_eq!(bits(GgmlType::Q3K), 3.4375);
    assert_eq!(bits(GgmlType::Q4K), 4.5);
    assert_eq!(bits(GgmlType::Q5K), 5.5);
    assert_eq!(bits(GgmlType::Q6K), 6.5625);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sample();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(file) = GgufFile::parse(&bytes) {
            for t in file.tensors() {
                prop_assert_eq!(file.data(t).len(), t.byte_len);
            }
        }
    }

    #[test]
    fn any_bytes_after_the_magic_never_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        let _ = GgufFile::parse(&bytes);
    }
}
