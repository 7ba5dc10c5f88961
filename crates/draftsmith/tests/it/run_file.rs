//! Run files that cannot run: file, key and line in one `error:` line, exit code 2, nothing written.

use insta::assert_snapshot;

use crate::support::{Home, repository};

/// What `run` says about a run file whose lines come after a good beginning.
fn run(more: &str, overrides: &[&str]) -> String {
    let home = Home::new();
    let tiny = repository().join("fixtures/tiny-target");
    home.write(
        "good.jsonl",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}\n",
    );
    // What the target's context has room for, unless the test is about that.
    let length = if more.starts_with("max_length") { "#" } else { "max_length = 1024" };
    home.write(
        "run.toml",
        format!(
            "bundle = {{ license = \"MIT\" }}\n[target]\nsource = \"{}\"\n[data]\n{length}\n\
             sources = [{{ path = \"good.jsonl\" }}]\n{more}",
            tiny.display()
        ),
    );
    let args: Vec<&str> = ["run", "run.toml"].into_iter().chain(overrides.iter().copied()).collect();
    let text = home.snapshot(&args);
    assert!(text.contains("exit: 2"), "{text}");
    assert!(!home.path().join("runs").exists(), "nothing may be written");
    text
}

#[test]
fn a_misspelt_key_is_named_with_its_line_and_what_was_meant() {
    assert_snapshot!(run("[train]\nttt_lenght = 7\n", &[]));
}

#[test]
fn an_unknown_table_is_named() {
    assert_snapshot!(run("[trian]\nlr = 1e-4\n", &[]));
}

#[test]
fn a_wrong_type_is_named() {
    assert_snapshot!(run("[train]\nlr = \"fast\"\n", &[]));
    assert_snapshot!(run("[train]\nepochs = -1\n", &[]));
    assert_snapshot!(run("[draft]\nmethod = \"eagle4\"\n", &[]));
}

#[test]
fn a_value_out_of_range_is_named() {
    assert_snapshot!(run("[train]\nlr = -1.0\n", &[]));
    assert_snapshot!(run("max_length = 1\n", &[]));
}

#[test]
fn a_wrong_override_is_named() {
    assert_snapshot!(run("", &["train.lrr=1"]));
    assert_snapshot!(run("", &["train"]));
}

#[test]
fn text_that_is_no_toml_is_named_with_its_line() {
    assert_snapshot!(run("[train\n", &[]));
}

#[test]
fn a_run_file_that_is_not_there_is_named() {
    assert_snapshot!(Home::new().snapshot(&["run", "none.toml"]));
}

#[test]
fn a_missing_licence_is_told_before_the_work() {
    assert_snapshot!(run("", &["bundle.license="]));
}

#[test]
fn files_that_are_not_there_are_told_before_the_work() {
    assert_snapshot!(run("", &["data.sources.0.path=none.jsonl"]));
    assert_snapshot!(run("", &["bench.workloads=[\"none.jsonl\"]"]));
    assert_snapshot!(run("", &["data.template=none.jinja"]));
    assert_snapshot!(run("", &["target.source=none.gguf"]));
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let text = run(
        "max_length = 1\n[train]\nlrr = 1\nepochs = -1\n[bench]\nworkloads = [\"none.jsonl\"]\n[draft]\nhidden = 7\n",
        &["data.sources.0.path=gone.jsonl", "bundle.license=' '", "validate.depth=0"],
    );
    let told: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    let wanted = [
        "run file `run.toml`, line 9: unknown key `train.lrr`",
        "run file `run.toml`, line 10: `train.epochs` is ",
        "run file `run.toml`, line 7: `data.max_length` is 1, expected at least 2",
        "override `validate.depth=0`: `validate.depth` is 0, expected at least 1",
        "override `bundle.license=' '`: `bundle.license` is missing",
        "run file `run.toml`, line 12: `bench.workloads.0` names `none.jsonl`, which does not exist",
        "`data.sources.0.path` names `gone.jsonl`, which does not exist",
        "run file `run.toml`, line 14: `draft.hidden` is 7, but the draft shares the target's embedding",
    ];
    assert_eq!(told.len(), wanted.len(), "{text}");
    for (told, wanted) in told.iter().zip(wanted) {
        assert!(told.starts_with(wanted), "{told}\nexpected {wanted}\nin {text}");
    }
    assert_eq!(text.lines().filter(|line| line.starts_with("hint: ")).count(), wanted.len(), "{text}");
}

#[test]
fn the_status_of_a_run_file_that_nobody_began_says_so() {
    let home = Home::new();
    home.write(
        "own/a.toml",
        "[run]\nname = \"a\"\n[target]\nsource = \"x\"\n[data]\nsources = [{ path = \"y.jsonl\" }]\n",
    );
    let ended = home.run(&["status", "own/a.toml"]);
    assert_eq!(ended.code, Some(2));
    assert_eq!(
        ended.stderr,
        "error: the run of `own/a.toml` was not begun here: there is no `runs/a`\n\
         hint: `draftsmith run own/a.toml` begins it, `--plan` behind it shows the bill\n"
    );
}
