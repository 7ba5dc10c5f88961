//! The files that are looked at, and what is found.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The repository and its tracked files.
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
    /// Relative to the root, `/` as separator.
    pub(crate) files: Vec<String>,
}

impl Tree {
    pub(crate) fn open() -> Result<Tree> {
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

    pub(crate) fn read(&self, file: &str) -> Result<String> {
        std::fs::read_to_string(self.root.join(file)).with_context(|| format!("cannot read `{file}`"))
    }
}

/// One finding: where, and what.
pub(crate) type Findings = Vec<String>;
