//! Any line as a row of conversations: an error, or a row.

#![no_main]

use draftsmith_data::parse_conversation_line;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for line in bytes.split(|b| *b == b'\n') {
        match parse_conversation_line(line) {
            Ok(row) => {
                let _ = (row.id(), row.domain().len());
            }
            Err(e) => {
                let _ = e.to_string();
            }
        }
    }
});
