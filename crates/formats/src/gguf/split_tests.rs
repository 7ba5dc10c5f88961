//! Splits: whole ones read as the file they were made from, all others are one error each.

use std::path::{Path, PathBuf};

use super::*;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn part_name(no: usize) -> String {
    format!("llama-f32-{no:05}-of-00003.gguf")
}

/// A folder with the fixture's parts.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for no in 1..=3 {
        let name = part_name(no);
        std::fs::copy(fixtures().join("gguf-split").join(&name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn any_part_reads_as_the_file_that_was_split() {
    let whole = GgufFile::open(fixtures().join("gguf/llama-f32.gguf")).unwrap();
    for no in 1..=3 {
        let split = GgufFile::open(fixtures().join("gguf-split").join(part_name(no))).unwrap();
        assert_eq!((split.num_parts(), split.tensors().len()), (3, whole.tensors().len()));
        for tensor in whole.tensors() {
            let found = split.tensor(&tensor.name).unwrap();
            assert_eq!((&found.dims, found.ggml_type), (&tensor.dims, tensor.ggml_type));
            assert!(split.data(found) == whole.data(tensor), "{}", tensor.name);
            split.release(found);
        }
        for (key, value) in whole.metadata() {
            assert_eq!(split.get(key), Some(value), "{key}");
        }
        assert!(split.path().unwrap().ends_with(part_name(1)));
    }
}

#[test]
fn bytes_in_memory_make_a_split_too() {
    let bytes: Vec<Vec<u8>> =
        (1..=3).map(|no| std::fs::read(fixtures().join("gguf-split").join(part_name(no))).unwrap()).collect();
    let parts: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    assert_eq!(GgufFile::parse_parts(&parts).unwrap().num_parts(), 3);
    let twice = GgufFile::parse_parts(&[parts[0], parts[0], parts[2]]).unwrap_err();
    assert_eq!(twice.to_string(), "it is part 1 of 3 by its own words, but part 2 of 3 by its name");
    assert!(GgufFile::parse_parts(&parts[..2]).is_err());
    assert!(GgufFile::parse_parts(&[]).is_err());
    // One part alone is a file like any other to who asks for no more.
    assert_eq!(GgufFile::parse(parts[1]).unwrap().num_parts(), 1);
}

#[test]
fn the_hash_of_a_split_is_that_of_its_parts_in_order() {
    let folder = folder();
    let first = folder.path().join(part_name(1));
    let hash = content_sha256(&first).unwrap();
    assert_eq!(content_sha256(&folder.path().join(part_name(3))).unwrap(), hash);
    let mut hasher = crate::hash::Hasher::default();
    for no in 1..=3 {
        hasher.field(crate::hash::sha256_file(folder.path().join(part_name(no))).unwrap().as_bytes());
    }
    assert_eq!(hash, hasher.finish());
    // Names do not count.
    for no in 1..=3 {
        let renamed = folder.path().join(part_name(no).replace("llama-f32", "other"));
        std::fs::rename(folder.path().join(part_name(no)), renamed).unwrap();
    }
    assert_eq!(content_sha256(&folder.path().join("other-00002-of-00003.gguf")).unwrap(), hash);
    // Of a file that is whole it is the file's.
    let whole = fixtures().join("gguf/llama-f32.gguf");
    assert_eq!(content_sha256(&whole).unwrap(), crate::hash::sha256_file(&whole).unwrap());
}

#[test]
fn a_folder_with_one_model_means_that_model() {
    let folder = folder();
    assert_eq!(only_model(folder.path()).unwrap(), Some(folder.path().join(part_name(1))));
    std::fs::remove_file(folder.path().join(part_name(1))).unwrap();
    assert_eq!(only_model(folder.path()).unwrap(), Some(folder.path().join(part_name(2))));
    std::fs::copy(fixtures().join("gguf/f16.gguf"), folder.path().join("f16.gguf")).unwrap();
    assert_eq!(only_model(folder.path()).unwrap(), None, "two models");
    assert_eq!(only_model(tempfile::tempdir().unwrap().path()).unwrap(), None);
}

/// What opening part `no` says after a change to the folder.
#[track_caller]
fn refused(no: usize, change: impl FnOnce(&Path), message: &str, hint: &str) {
    let folder = folder();
    change(folder.path());
    let error = GgufFile::open(folder.path().join(part_name(no))).unwrap_err();
    let text = error.to_string().replace(&format!("{}/", folder.path().display()), "");
    assert!(text.contains(message), "{text}");
    assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
}

/// Changes the value of an integer key in place: `key`, its type, then the bytes.
fn set(path: &Path, key: &str, value: u16) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len() + 4;
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn splits_that_are_not_whole_are_refused() {
    let part = |folder: &Path, no: usize| folder.join(part_name(no));
    for no in [1, 2] {
        refused(
            no,
            |f| std::fs::remove_file(part(f, 3)).unwrap(),
            "part 3 of 3 of the model is missing: there is no `llama-f32-00003-of-00003.gguf`",
            "put `llama-f32-00003-of-00003.gguf` beside the other parts",
        );
    }
    refused(
        2,
        |f| std::fs::remove_file(part(f, 1)).unwrap(),
        "part 1 of 3 of the model is missing",
        "beside the other parts",
    );
    refused(
        1,
        |f| {
            let bytes = std::fs::read(part(f, 2)).unwrap();
            std::fs::write(part(f, 2), &bytes[..bytes.len() - 4000]).unwrap();
        },
        "GGUF file `llama-f32-00002-of-00003.gguf`: tensor `",
        "download it again",
    );
    refused(
        1,
        |f| {
            std::fs::copy(part(f, 2), part(f, 3)).unwrap();
        },
        "`llama-f32-00003-of-00003.gguf`: it is part 2 of 3 by its own words, but part 3 of 3 by its name",
        "one download",
    );
    refused(
        3,
        |f| {
            std::fs::rename(part(f, 2), f.join("x")).unwrap();
            std::fs::rename(part(f, 3), part(f, 2)).unwrap();
            std::fs::rename(f.join("x"), part(f, 3)).unwrap();
        },
        "it is part 2 of 3 by its own words, but part 3 of 3 by its name",
        "one download",
    );
    // A part of another split that has as many: its tensors are there already, or too many in all.
    refused(
        1,
        |f| {
            std::fs::copy(part(f, 2), part(f, 3)).unwrap();
            set(&part(f, 3), "split.no", 2);
        },
        "is in an earlier part, too",
        "one download",
    );
    refused(
        1,
        |f| set(&part(f, 2), "split.tensors.count", 99),
        "it is of a split with 99 tensors, the parts before it of one with ",
        "one download",
    );
    refused(
        1,
        |f| {
            for no in 1..=3 {
                set(&part(f, no), "split.tensors.count", 99);
            }
        },
        "metadata key `split.tensors.count` says 99, but all parts together have ",
        "one download",
    );
    refused(
        1,
        |f| set(&part(f, 1), "split.count", 4),
        "it is part 1 of 4 by its own words, but part 1 of 3 by its name",
        "names that they were published with",
    );
    refused(
        1,
        |f| set(&part(f, 1), "split.no", 7),
        "metadata key `split.no` is no number from 0 to 2",
        "one download",
    );
    refused(
        2,
        |f| {
            std::fs::copy(fixtures().join("gguf/f16.gguf"), part(f, 3)).unwrap();
        },
        "it stands for part 3 of 3, but is no part of a split",
        "one download",
    );
    let folder = folder();
    let renamed = folder.path().join("model.gguf");
    std::fs::rename(part(folder.path(), 1), &renamed).unwrap();
    let error = GgufFile::open(&renamed).unwrap_err().to_string();
    assert!(
        error.contains("it is part 1 of 3, but its name does not end in `-00001-of-00003.gguf`"),
        "{error}"
    );
}

#[test]
fn a_merged_file_is_whole_whatever_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m-00001-of-00002.gguf");
    // Merging leaves the key with a count of 0.
    let mut w = GgufWriter::new();
    w.set("split.count", GgufValue::U16(0)).tensor("x", &[1], GgmlType::F32, &[0; 4]);
    w.write(&path).unwrap();
    assert_eq!(GgufFile::open(&path).unwrap().num_parts(), 1);
    assert_eq!(parts_of(&path).unwrap(), [path]);
}

#[test]
fn names_of_parts_are_told_from_others() {
    let name = SplitName::parse("a-b-00002-of-00010.gguf").unwrap();
    assert_eq!((name.prefix(), name.no, name.count), ("a-b", 2, 10));
    assert_eq!(name.part(10), "a-b-00010-of-00010.gguf");
    for other in
        ["a.gguf", "a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-1-of-2.gguf", "a-00001-of-00002.bin"]
    {
        assert_eq!(SplitName::parse(other), None, "{other}");
    }
}
