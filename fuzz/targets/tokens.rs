//! Any bytes as a packed token file: an error, or a file whose every row can be read.

#![no_main]

use draftsmith_formats::tokens::TokenFile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = TokenFile::from_bytes("fuzz.tokens", bytes.to_vec()) {
        let tokens: usize = file.rows().map(|row| row.ids.len()).sum();
        assert_eq!(tokens as u64, file.summary().tokens);
        let _ = file.verify();
    }
});
