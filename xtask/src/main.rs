//! `cargo xtask tidy`: what holds for the whole tree and no compiler checks.
//!
//! Prints every finding, one a line, and ends with 1 if there is one. `--write` first writes the generated pages.

mod commands;
mod crates;
mod pages;
mod text;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

/// The repository and its tracked files.
struct Tree {
    root: PathBuf,
    /// Relative to the root, `/` as separator.
    files: Vec<String>,
}

impl Tree {
    fn open() -> Result<Tree> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
        let list = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(&root)
            .output()
            .context("git lists the files that are looked at")?;
        if !list.status.success() {
            bail!("`git ls-files` failed: {}", String::from_utf8_lossy(&list.stderr).trim());
        }
        let mut files: Vec<String> = String::from_utf8(list.stdout)?
            .lines()
            .filter(|f| root.join(f).is_file())
            .map(str::to_string)
            .collect();
        files.sort();
        files.dedup();
        Ok(Tree { root, files })
    }

    fn read(&self, file: &str) -> Result<String> {
        std::fs::read_to_string(self.root.join(file)).with_context(|| format!("cannot read `{file}`"))
    }
}

/// One finding: where, and what.
type Findings = Vec<String>;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let write = match args.as_slice() {
        ["tidy"] => false,
        ["tidy", "--write"] => true,
        _ => bail!("usage: cargo xtask tidy [--write]"),
    };
    let tree = Tree::open()?;
    let mut findings = Findings::new();
    pages::check(&tree, write, &mut findings)?;
    crates::check(&tree, &mut findings)?;
    text::check(&tree, &mut findings)?;
    commands::check(&tree, &mut findings)?;
    let mut out = std::io::stdout().lock();
    for finding in &findings {
        writeln!(out, "{finding}")?;
    }
    if findings.is_empty() {
        writeln!(out, "tidy: {} files, nothing to complain about", tree.files.len())?;
        Ok(ExitCode::SUCCESS)
    } else {
        writeln!(out, "tidy: {} findings", findings.len())?;
        Ok(ExitCode::FAILURE)
    }
}
