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
    for key in
        ["version", "platform", "cpu", "memory", "gpus", "cuda", "folders", "python", "variables", "findings"]
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

#[test]
fn every_shell_gets_a_script_with_every_verb() {
    for shell in ["bash", "zsh", "fish", "powershell"] {
        let script = Home::new().run(&["completions", shell]);
        assert_eq!((script.code, script.stderr.as_str()), (Some(0), ""), "{shell}");
        for word in ["quickstart", "serve", "--max-new-tokens"].map(|word| word.trim_start_matches('-')) {
            assert!(script.stdout.contains(word), "{shell}: no `{word}`");
        }
    }
    let none = Home::new().run(&["completions", "tcsh"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("tcsh") && none.stderr.contains("hint: "), "{}", none.stderr);
}

#[test]
fn bash_takes_the_script_and_completes_a_verb() {
    let home = Home::new();
    let script = home.write("draftsmith.bash", home.run(&["completions", "bash"]).stdout);
    let ask = format!(
        "source '{}'; COMP_WORDS=(draftsmith quick); COMP_CWORD=1; _draftsmith draftsmith quick draftsmith; echo \"${{COMPREPLY[@]}}\"",
        script.display()
    );
    let Ok(answer) = std::process::Command::new("bash").args(["-c", &ask]).output() else { return };
    assert_eq!(String::from_utf8(answer.stdout).unwrap().trim(), "quickstart");
}

#[test]
fn every_verb_has_a_manual_page() {
    let home = Home::new();
    let own = home.run(&["man"]);
    assert_eq!(own.code, Some(0));
    assert!(own.stdout.contains(".TH draftsmith 1") && own.stdout.contains("Exit codes"));
    assert_eq!(home.run(&["man", "share/man1"]).code, Some(0));
    let page = |name: &str| std::fs::read_to_string(home.path().join("share/man1").join(name)).unwrap();
    assert_eq!(page("draftsmith.1"), own.stdout);
    assert!(page("draftsmith-serve.1").contains("kv\\-budget"));
    assert!(page("draftsmith-bench-kernels.1").contains("threads"));
}

#[test]
fn a_name_of_the_hub_without_its_mark_is_understood() {
    let ended = Home::new().run(&["pull", "Qwen/Qwen2.5-0.5B-Instruct"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("hint: write `hf:Qwen/Qwen2.5-0.5B-Instruct`"), "{}", ended.stderr);
}
