//! Any bytes as a safetensors file: an error, or a file whose every tensor can be read, and whose 8-bit weights can be widened.

#![no_main]

use draftsmith_formats::mxint8;
use draftsmith_formats::safetensors_dir::SafetensorsDir;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    match SafetensorsDir::from_bytes("fuzz.safetensors", bytes.to_vec()) {
        Ok(file) => {
            for name in file.names() {
                let tensor = file.get(name).expect("listed tensors are there");
                let _ = (tensor.to_f32(), tensor.to_i64(), tensor.to_bool());
            }
            if let Err(e) = mxint8::widened(file) {
                let _ = (e.to_string(), e.hint());
            }
        }
        Err(e) => {
            let _ = (e.to_string(), e.hint());
        }
    }
});
