//! Writes the fixtures of the newest format versions: `cargo run --release -p draftsmith-formats --example
//! write_fixtures -- crates/formats/tests/fixtures/v1`. A fixture of a released version is never written again.

use std::collections::BTreeMap;
use std::path::PathBuf;

#[path = "../tests/content/mod.rs"]
mod content;

use draftsmith_formats::cache::{CacheWriter, CaptureDtype};
use draftsmith_formats::tokens::TokenWriter;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = PathBuf::from(std::env::args().nth(1).ok_or("which folder?")?);
    let mut tokens = TokenWriter::create(dir.join("rows.tokens"), &content::meta())?;
    for row in content::token_rows() {
        tokens.push(&row)?;
    }
    tokens.finish()?;
    for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
        let spec = content::spec(dtype);
        let mut cache = CacheWriter::open(dir.join(content::cache_name(dtype)), &spec)?;
        for row in content::capture_rows() {
            cache.push(&row)?;
        }
        cache.finish()?;
    }
    let shapes: BTreeMap<String, String> = content::meta();
    draftsmith_formats::safetensors_dir::write(
        dir.join("tensors.safetensors"),
        &content::tensors(),
        &shapes,
    )?;
    content::gguf().write(dir.join("model.gguf"))?;
    let run = draftsmith_formats::run::RunFile::load(dir.join("run.toml"), &[])?;
    draftsmith_formats::atomic::write(dir.join("run-resolved.toml"), run.to_toml())?;
    Ok(())
}
