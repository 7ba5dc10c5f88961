//! The licence texts that ask to go with a program: those of every package in it, each text once.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::packages::Package;

const STARTS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"];

/// One text file over all of them.
pub(crate) fn of(packages: &BTreeMap<String, Package>) -> Result<Vec<u8>> {
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut without = Vec::new();
    for package in packages.values().filter(|p| p.source.is_some()) {
        let title = format!("{} {}", package.name, package.version);
        let mut found = false;
        for entry in std::fs::read_dir(&package.folder).with_context(|| format!("sources of {title}"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().to_uppercase();
            if !entry.file_type()?.is_file() || !STARTS.iter().any(|start| name.starts_with(start)) {
                continue;
            }
            let text = String::from_utf8_lossy(&std::fs::read(entry.path())?).replace("\r\n", "\n");
            texts.entry(text.trim().to_string()).or_default().push(title.clone());
            found = true;
        }
        if !found {
            without.push(format!("{title}: {}", package.license.as_deref().unwrap_or("no licence named")));
        }
    }
    let mut page = String::from(
        "draftsmith is built from these packages. Licence texts, each once, with those who use it:\n",
    );
    let rule = "=".repeat(100);
    // By the first package that has it, so that a new package moves nothing.
    let mut texts: Vec<(Vec<String>, String)> = texts
        .into_iter()
        .map(|(text, mut titles)| {
            titles.sort();
            titles.dedup();
            (titles, text)
        })
        .collect();
    texts.sort();
    for (titles, text) in texts {
        page.push_str(&format!("\n{rule}\n{}\n{rule}\n\n{text}\n", titles.join(", ")));
    }
    if !without.is_empty() {
        without.sort();
        page.push_str(&format!(
            "\n{rule}\nPackages whose sources hold no text, by what they name:\n{rule}\n\n"
        ));
        page.push_str(&(without.join("\n") + "\n"));
    }
    Ok(page.into_bytes())
}
