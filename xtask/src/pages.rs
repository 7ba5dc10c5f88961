//! Pages that are generated from the program: written by `--write`, compared otherwise.

use anyhow::Result;

use crate::{Findings, Tree};

pub(crate) fn check(tree: &Tree, write: bool, findings: &mut Findings) -> Result<()> {
    let pages = [("docs/CLI.md", draftsmith::cli::reference_page())];
    for (file, page) in pages {
        let path = tree.root.join(file);
        if write {
            draftsmith::formats::atomic::write(&path, page.as_bytes())?;
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(page.as_str()) {
            findings.push(format!("{file}: not what the program says; run `cargo xtask tidy --write`"));
        }
    }
    Ok(())
}
