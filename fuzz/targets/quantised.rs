//! Any bytes as a quantised folder: an error that names a key or a tensor, or values of every quantised weight.
//!
//! The first two bytes are the length of `config.json`, the rest is `model.safetensors`.

#![no_main]

use std::path::Path;

use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_model::quantised_values;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let Some((config, weights)) = rest.split_at_checked(u16::from_le_bytes(*length).into()) else { return };
    let Ok(config) = HfConfig::parse(Path::new("config.json"), config) else { return };
    let Ok(open) = SafetensorsDir::from_bytes("fuzz.safetensors", weights.to_vec()) else { return };
    match quantised_values(&config, &open) {
        Ok(all) => {
            for (name, values) in &all {
                assert!(!values.is_empty() && open.find(name).is_some(), "{name}");
            }
        }
        Err(e) => {
            let _ = (e.to_string(), e.hint());
        }
    }
});
