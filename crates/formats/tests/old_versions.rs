//! Files of every released format version still open, with the content they were written with.
//!
//! `tests/fixtures/vN` was written by the example `write_fixtures` when version `N` was the newest.

use std::path::PathBuf;

use draftsmith_formats::cache::{CacheReader, CaptureDtype};
use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::run::RunFile;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_formats::tokens::TokenFile;

mod content;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

#[test]
fn a_token_file_of_version_1_opens() {
    let file = TokenFile::open(fixture("rows.tokens")).unwrap();
    file.verify().unwrap();
    assert_eq!(file.meta(), &content::meta());
    assert_eq!(file.rows().collect::<Vec<_>>(), content::token_rows());
}

#[test]
fn a_target_cache_of_version_1_opens() {
    for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
        let cache =
            CacheReader::open_for(fixture(content::cache_name(dtype)), &content::spec(dtype)).unwrap();
        cache.verify().unwrap();
        let rows: Vec<_> = (0..cache.len()).map(|i| cache.row(i).unwrap()).collect();
        assert_eq!(rows, content::capture_rows(), "{dtype:?}");
    }
}

#[test]
fn a_run_file_of_version_1_loads() {
    let run = RunFile::load(fixture("run.toml"), &[]).unwrap();
    assert_eq!(RunFile::load(fixture("run-resolved.toml"), &[]).unwrap(), run);
    assert_eq!(run.train.lr, 3e-4);
    assert_eq!(run.capture.layers, Some(vec![1, 14, 26]));
}

#[test]
fn containers_of_others_open() {
    let tensors = SafetensorsDir::open(fixture("tensors.safetensors")).unwrap();
    for wanted in content::tensors() {
        let found = tensors.get(&wanted.name).unwrap();
        assert_eq!(
            (found.dtype, found.shape, found.bytes),
            (wanted.dtype, &wanted.shape[..], &wanted.bytes[..])
        );
    }
    assert_eq!(tensors.metadata("tokenizer"), Some("k"));
    let gguf = GgufFile::open(fixture("model.gguf")).unwrap();
    assert_eq!(gguf.get_u32("llama.block_count").unwrap(), 2);
    assert_eq!(gguf.get_str_array("tokenizer.ggml.tokens").unwrap(), ["a", "Ġb"]);
    assert_eq!(gguf.data(gguf.tensor("q").unwrap()), [7; 34]);
    assert_eq!(gguf.bytes(), content::gguf().to_bytes());
}
