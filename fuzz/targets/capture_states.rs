//! Any bytes as an answer with hidden states, JSON or a safetensors file: an error that names the field, or states of the
//! shape that was asked for.

#![no_main]

use std::path::Path;

use draftsmith_capture::{StatesShape, read_json_states, read_state_file};

const SHAPE: StatesShape<'static> = StatesShape { ids: &[5, 6, 7], states: 2, width: 4 };

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let read = match bytes.first() {
        Some(b'{') => read_json_states(bytes, SHAPE),
        _ => read_state_file(Path::new("fuzz.safetensors"), bytes.to_vec(), SHAPE),
    };
    if let Ok(values) = read {
        assert_eq!(values.len(), 24);
        assert!(values.iter().all(|v| v.is_finite()));
    }
});
