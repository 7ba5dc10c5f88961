//! Any bytes as a GGUF file: an error, or a file whose every tensor can be read.

#![no_main]

use draftsmith_formats::gguf::GgufFile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // As a split in two: the second part begins where a second file would.
    if let Some(at) = bytes.windows(4).skip(1).position(|w| w == b"GGUF") {
        let (first, second) = bytes.split_at(at + 1);
        if let Ok(file) = GgufFile::parse_parts(&[first, second]) {
            for tensor in file.tensors() {
                assert_eq!(file.data(tensor).len(), tensor.byte_len);
            }
        }
    }
    match GgufFile::parse(bytes) {
        Ok(file) => {
            for tensor in file.tensors() {
                assert_eq!(file.data(tensor).len(), tensor.byte_len);
            }
            for (key, value) in file.metadata() {
                assert!(file.get(key).is_some_and(|v| v.type_name() == value.type_name()));
                let _ = (file.find_u32(key), file.find_f32(key), file.find_str(key), file.find_i64_array(key));
            }
        }
        Err(e) => {
            let _ = (e.to_string(), e.hint());
        }
    }
});
