//! A copy that somebody installed: what ships with the program is found from any folder.

use std::path::Path;
use std::process::Command;

use crate::support::{Ended, Home};

const BUNDLE: &str = "bundles/smollm2-135m-instruct-eagle3";

/// Puts the program at a path of a home, without copying its bytes where that can be.
fn install(home: &Home, name: &str) -> std::path::PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_draftsmith"));
    let path = home.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    if std::fs::hard_link(program, &path).is_err() {
        std::fs::copy(program, &path).unwrap();
    }
    path
}

/// A bundle that is found is read: this one is none, which the message says of its place.
fn broken_bundle(home: &Home, share: &str) -> String {
    let file = home.write(&format!("{share}/{BUNDLE}/bundle.json"), "{");
    file.canonicalize().unwrap().display().to_string()
}

fn quickstart(program: &Path, home: &Home, data: Option<&str>) -> Ended {
    let elsewhere = home.path().join("elsewhere");
    std::fs::create_dir_all(&elsewhere).unwrap();
    let mut command = Command::new(program);
    command.args(["quickstart", "--offline"]).current_dir(elsewhere).env_clear().env("HOME", home.path());
    if let Some(data) = data {
        command.env("XDG_DATA_HOME", data);
    }
    Ended::from(command.output().unwrap())
}

#[track_caller]
fn finds(ended: &Ended, manifest: &str) {
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains(&format!("`{manifest}`")), "{}", ended.stderr);
}

#[test]
fn the_draft_is_found_in_the_folder_that_installers_share() {
    let home = Home::new();
    let program = install(&home, "prefix/bin/draftsmith");
    let manifest = broken_bundle(&home, "prefix/share/draftsmith");
    finds(&quickstart(&program, &home, None), &manifest);
}

#[test]
#[cfg(unix)]
fn a_link_to_the_program_is_followed() {
    let home = Home::new();
    let program = install(&home, "tools/draftsmith/bin/draftsmith");
    let manifest = broken_bundle(&home, "tools/draftsmith/share/draftsmith");
    let link = home.path().join("link");
    std::os::unix::fs::symlink(program, &link).unwrap();
    finds(&quickstart(&link, &home, None), &manifest);
}

#[test]
fn the_draft_is_found_beside_the_program_of_an_unpacked_folder() {
    let home = Home::new();
    let program = install(&home, "unpacked/draftsmith");
    let manifest = broken_bundle(&home, "unpacked");
    finds(&quickstart(&program, &home, None), &manifest);
}

#[test]
fn the_draft_is_found_in_the_users_own_data() {
    let home = Home::new();
    let program = install(&home, "cargo/bin/draftsmith");
    let manifest = broken_bundle(&home, ".local/share/draftsmith");
    finds(&quickstart(&program, &home, None), &manifest);
    // A variable that says nothing is as good as none.
    finds(&quickstart(&program, &home, Some("")), &manifest);
    let other = broken_bundle(&home, "data/draftsmith");
    finds(&quickstart(&program, &home, Some(&home.path().join("data").display().to_string())), &other);
}

#[test]
fn a_draft_that_came_with_nothing_is_told_with_the_ways_to_get_it() {
    let home = Home::new();
    let program = install(&home, "cargo/bin/draftsmith");
    let ended = quickstart(&program, &home, None);
    assert_eq!(ended.code, Some(2));
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(
        lines[0],
        format!("error: the draft `{BUNDLE}` was not found here, above here, or beside the program")
    );
    assert!(lines[1].starts_with("hint: install the wheel or unpack the archive"), "{}", lines[1]);
    let data = home.path().join(".local/share/draftsmith");
    assert!(lines[1].contains(&format!("`bundles` into `{}`", data.display())), "{}", lines[1]);
}
