//! `cargo xtask toy-kind`: a new kind of draft touches one module in `model`, one in `train`, and a line of each list.
//!
//! `fixtures/toy-kind.patch` adds such a kind with a test. It is applied to a copy of the tree, what it touches is held
//! against that rule, and its test is built and run there, without optimisation.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::tree::Tree;

const PATCH: &str = "fixtures/toy-kind.patch";
/// Folders in which it adds one file.
const MODULES: [&str; 2] = ["crates/model/src/kinds/", "crates/train/src/methods/"];
/// Where its test is added.
const TESTS: &str = "crates/run/tests/";
/// Files in which it adds lines, and how many at most: the module, the variant, and a comment on that.
const LISTS: [(&str, usize); 2] =
    [("crates/model/src/kinds/mod.rs", 3), ("crates/train/src/methods/mod.rs", 2)];

pub(crate) fn run(tree: &Tree) -> Result<ExitCode> {
    let home = tree.root.join("target/toy-kind");
    let (fresh, copy) = (home.join("fresh"), home.join("tree"));
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    for file in &tree.files {
        let to = fresh.join(file);
        fs::create_dir_all(to.parent().context("a file stands in a folder")?)?;
        fs::copy(tree.root.join(file), &to).with_context(|| format!("cannot copy `{file}`"))?;
    }
    let patch = tree.root.join(PATCH);
    let touched = git(&fresh, &["apply", "--numstat"], &patch)?;
    check(tree, &touched)?;
    git(&fresh, &["apply"], &patch)?;
    // Only what changed since the last time is written, so that little is compiled again.
    let files: BTreeSet<String> = tree
        .files
        .iter()
        .cloned()
        .chain(touched.lines().filter_map(|l| Some(l.split('\t').nth(2)?.to_string())))
        .collect();
    for old in files_below(&copy, &copy)? {
        if !files.contains(&old) {
            fs::remove_file(copy.join(old))?;
        }
    }
    for file in &files {
        let (from, to) = (fresh.join(file), copy.join(file));
        let new = fs::read(&from)?;
        if fs::read(&to).ok().as_ref() != Some(&new) {
            fs::create_dir_all(to.parent().context("a file stands in a folder")?)?;
            fs::write(&to, new)?;
        }
    }
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--release", "--package", "draftsmith-run", "--test", "toy_kind"])
        .current_dir(&copy)
        // Of its own: cargo tells crates of a workspace apart by their place inside it, so this copy and the tree would take each
        // other's libraries for their own.
        .env("CARGO_TARGET_DIR", home.join("target"))
        // The test is short and its build is not.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
        .status()
        .context("cargo runs the test of the toy kind")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What `git apply --numstat` says, held against the rule.
fn check(tree: &Tree, touched: &str) -> Result<()> {
    let mut missing: Vec<&str> = MODULES.iter().copied().chain([TESTS]).collect();
    for line in touched.lines() {
        let mut parts = line.split('\t');
        let (Some(added), Some(removed), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
            bail!("`git apply --numstat` says `{line}`");
        };
        let (added, removed): (usize, usize) = (added.parse()?, removed.parse()?);
        let is_new = !tree.files.iter().any(|f| f == file);
        let place = missing.iter().position(|folder| {
            file.strip_prefix(folder).is_some_and(|name| name.ends_with(".rs") && !name.contains('/'))
        });
        let list = LISTS.iter().find(|(list, _)| *list == file);
        match (is_new, place, list) {
            (true, Some(place), _) => {
                missing.remove(place);
            }
            (false, _, Some((_, most))) if removed == 0 && added <= *most => {}
            _ => bail!(
                "{PATCH} touches `{file}` (+{added} -{removed}): a new kind may add one module in each of {} and lines \
                 to its list there",
                MODULES.join(" and ")
            ),
        }
    }
    match missing.as_slice() {
        [] => Ok(()),
        some => bail!("{PATCH} adds no file in {}", some.join(", ")),
    }
}

/// Runs git on a patch, in a folder that is no part of this repository.
fn git(folder: &Path, args: &[&str], patch: &Path) -> Result<String> {
    let outside = folder.parent().context("the copy stands in a folder")?;
    let output = Command::new("git")
        .args(args)
        .arg(patch)
        .current_dir(folder)
        .env("GIT_CEILING_DIRECTORIES", outside)
        .stdin(Stdio::null())
        .output()
        .context("git applies the patch")?;
    if !output.status.success() {
        bail!("{PATCH} does not apply: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn files_below(root: &Path, folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return Ok(files) };
    for entry in entries {
        let path = entry?.path();
        match path.is_dir() {
            true => files.extend(files_below(root, &path)?),
            false => files.push(path.strip_prefix(root)?.display().to_string()),
        }
    }
    Ok(files)
}
