//! Any text as a run file, its last line as an override: an error, or a run that writes back to itself.

#![no_main]

use std::path::Path;

use draftsmith_formats::run::RunFile;

const SMALL: &str = "[target]\nsource = \"m\"\n[[data.sources]]\npath = \"a\"\n";

libfuzzer_sys::fuzz_target!(|text: &str| {
    let path = Path::new("fuzz.toml");
    let last = text.lines().last().unwrap_or_default().to_string();
    for result in [RunFile::parse(path, text, &[]), RunFile::parse(path, SMALL, &[last])] {
        match result {
            Ok(run) => {
                let again = RunFile::parse(path, &run.to_toml(), &[]).expect("the resolved copy loads");
                assert_eq!(run, again);
                assert_eq!(run.hash(), again.hash());
            }
            Err(e) => {
                let _ = (e.to_string(), e.hint());
            }
        }
    }
});
