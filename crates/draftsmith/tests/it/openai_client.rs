//! `serve` as the official Python client sees it.
//!
//! A group of its own (`openai_client_`): it needs a Python with the package `openai`, named by
//! `DRAFTSMITH_TEST_OPENAI_PYTHON`, and fails without one.

use std::process::Command;

use crate::bundles::with_bundle;
use crate::serve::Served;
use crate::support::repository;
use crate::tools::with_tools;

/// What the script says of a server.
fn ask(served: &Served, key: Option<&str>) -> String {
    let python = std::env::var_os("DRAFTSMITH_TEST_OPENAI_PYTHON")
        .expect("DRAFTSMITH_TEST_OPENAI_PYTHON names a python that has the package `openai`");
    let script = repository().join("bench/peers/openai_client.py");
    let ended = Command::new(python).arg(script).arg(&served.url).args(key).output().unwrap();
    let (said, failed) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{said}{failed}");
    said.into_owned()
}

#[test]
fn openai_client_gets_what_it_asks_for_and_errors_that_it_knows() {
    let home = with_bundle();
    home.write("keys", "sesame\n");
    let served = Served::start(home, &["--bundle", "bundle", "--api-keys-file", "keys"]);
    let said = ask(&served, Some("sesame"));
    assert!(said.contains("ok a schema gives the same text without a draft"), "{said}");
    assert!(said.contains("ok a template that knows no tools says so"), "{said}");
}

#[test]
fn openai_client_calls_tools_whole_and_streamed() {
    let served = with_tools(&[]);
    let said = ask(&served, None);
    for line in [
        "a streamed call is the same",
        "the call is the same without a draft",
        "a streamed response is the same",
    ] {
        assert!(said.contains(&format!("ok {line}")), "{said}");
    }
}
