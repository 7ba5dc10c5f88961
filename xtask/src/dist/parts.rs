//! What wheel and archive are made of.

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::elf::Needs;
use crate::tree::Tree;

/// One file of a wheel or archive.
pub(crate) struct Entry {
    /// With `/`, relative to the root of what it stands in.
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) executable: bool,
}

impl Entry {
    pub(crate) fn file(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Entry {
        Entry { name: name.into(), bytes: bytes.into(), executable: false }
    }
}

/// What wheel and archive are made of.
pub(crate) struct Parts<'t> {
    pub(crate) tree: &'t Tree,
    pub(crate) version: String,
    pub(crate) program: Vec<u8>,
    pub(crate) needs: Needs,
    pub(crate) sbom: Vec<u8>,
    /// Licences of the packages in the program.
    pub(crate) notices: Vec<u8>,
}

impl Parts<'_> {
    /// Tracked files below a folder, by what they are called below it.
    pub(crate) fn below(&self, folder: &str) -> Result<Vec<Entry>> {
        let prefix = format!("{folder}/");
        let files = self.tree.files.iter().filter_map(|f| Some((f, f.strip_prefix(&prefix)?)));
        let entries: Vec<Entry> = files
            .map(|(file, name)| {
                let path = self.tree.root.join(file);
                let bytes = std::fs::read(&path).with_context(|| format!("cannot read `{file}`"))?;
                Ok(Entry::file(name, bytes))
            })
            .collect::<Result<_>>()?;
        match entries.is_empty() {
            true => bail!("there is no file below `{folder}`"),
            false => Ok(entries),
        }
    }

    /// Our own licences, and the notices of others.
    pub(crate) fn licences(&self) -> Result<Vec<Entry>> {
        let mut entries = vec![Entry::file("THIRD-PARTY.txt", self.notices.clone())];
        for file in ["LICENSE-APACHE", "LICENSE-MIT", "NOTICE"] {
            entries.push(Entry::file(file, self.tree.read(file)?));
        }
        Ok(entries)
    }
}

/// In hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
