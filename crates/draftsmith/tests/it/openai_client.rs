//! `serve` as the official Python client sees it.
//!
//! A group of its own (`openai_client_`): it needs a Python with the package `openai`, named by
//! `DRAFTSMITH_TEST_OPENAI_PYTHON`, and fails without one.

use std::process::Command;

use crate::bundles::with_bundle;
use crate::serve::Served;
use crate::support::repository;

#[test]
fn openai_client_gets_what_it_asks_for_and_errors_that_it_knows() {
    let python = std::env::var_os("DRAFTSMITH_TEST_OPENAI_PYTHON")
        .expect("DRAFTSMITH_TEST_OPENAI_PYTHON names a python that has the package `openai`");
    let home = with_bundle();
    home.write("keys", "sesame\n");
    let served = Served::start(home, &["--bundle", "bundle", "--api-keys-file", "keys"]);
    let script = repository().join("bench/peers/openai_client.py");
    let ended = Command::new(python).arg(script).args([&served.url, "sesame"]).output().unwrap();
    let (said, failed) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{said}{failed}");
    assert!(said.contains("ok a schema gives the same text without a draft"), "{said}");
}
