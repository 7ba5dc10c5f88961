//! Any bytes as a draft of another layout: an error that says what is wrong, or a draft whose parts fit each other.
//!
//! The first two bytes are the length of `config.json`, the rest is `model.safetensors`; a file that begins with
//! `GGUF` is read as one.

#![no_main]

use std::path::Path;

use draftsmith_bundle::{import_gguf, import_safetensors};
use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::safetensors_dir::SafetensorsDir;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("draft");
    let imported = if bytes.starts_with(b"GGUF") {
        let Ok(file) = GgufFile::parse(bytes) else { return };
        import_gguf(path, &file)
    } else {
        let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
        let Some((config, weights)) = rest.split_at_checked(u16::from_le_bytes(*length).into()) else {
            return;
        };
        let Ok(open) = SafetensorsDir::from_bytes(path, weights.to_vec()) else { return };
        import_safetensors(path, config, &open)
    };
    match imported {
        Ok(draft) => {
            for (name, (shape, values)) in &draft.tensors {
                assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
            }
            let shape = draft.config.shape();
            if let Some(map) = &draft.vocab_map {
                assert_eq!(map.draft_vocab(), shape.draft_vocab_size);
                assert_eq!(map.target_vocab(), shape.vocab_size);
            }
        }
        Err(e) => {
            let _ = (e.to_string(), e.hint());
        }
    }
});
