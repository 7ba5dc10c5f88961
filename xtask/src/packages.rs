//! The packages that a build is made of, and what they are licensed under.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::tree::{Findings, Tree};

/// Packages that name a file in place of an expression, and what that file is.
const READ: [(&str, &str); 1] = [("cfg_block", "Apache-2.0")];

/// One package of the lock file.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// An SPDX expression; `None` if the package has none.
    pub(crate) license: Option<String>,
    /// `None` for the packages of this repository.
    pub(crate) source: Option<String>,
    pub(crate) folder: PathBuf,
    /// What it is built from and with, by id; tests apart.
    pub(crate) uses: BTreeSet<String>,
}

/// Every package that is built somewhere here for a target, by id.
pub(crate) fn all(tree: &Tree, target: &str) -> Result<BTreeMap<String, Package>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target])
        .current_dir(&tree.root)
        .output()?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let text = |value: &Value| value.as_str().map(str::to_string);
    let mut packages = BTreeMap::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let name = text(&package["name"]).context("name")?;
        let manifest = PathBuf::from(package["manifest_path"].as_str().context("manifest_path")?);
        let read = READ.iter().find(|(n, _)| *n == name).map(|(_, license)| license.to_string());
        packages.insert(
            text(&package["id"]).context("id")?,
            Package {
                version: text(&package["version"]).context("version")?,
                license: text(&package["license"]).or(read),
                source: text(&package["source"]),
                folder: manifest.parent().context("a manifest in no folder")?.to_path_buf(),
                uses: BTreeSet::new(),
                name,
            },
        );
    }
    for node in metadata["resolve"]["nodes"].as_array().context("resolve.nodes")? {
        let id = node["id"].as_str().context("id")?;
        let package = packages.get_mut(id).with_context(|| format!("`{id}` is resolved and no package"))?;
        for dependency in node["deps"].as_array().context("deps")? {
            let kinds = dependency["dep_kinds"].as_array().context("dep_kinds")?;
            if kinds.iter().any(|kind| kind["kind"].as_str() != Some("dev")) {
                package.uses.insert(text(&dependency["pkg"]).context("pkg")?);
            }
        }
    }
    Ok(packages)
}

/// Those that the program is made of.
pub(crate) fn of_program(tree: &Tree, target: &str) -> Result<BTreeMap<String, Package>> {
    let mut all = all(tree, target)?;
    let root = all.iter().find(|(_, p)| p.source.is_none() && p.name == "draftsmith");
    let mut open = vec![root.context("no package `draftsmith`")?.0.clone()];
    let mut found = BTreeMap::new();
    while let Some(id) = open.pop() {
        if let Some(package) = all.remove(&id) {
            open.extend(package.uses.iter().cloned());
            found.insert(id, package);
        }
    }
    Ok(found)
}

/// Every package may be used under licences that `deny.toml` allows.
pub(crate) fn check(tree: &Tree, findings: &mut Findings) -> Result<()> {
    let rules: toml::Table = tree.read("deny.toml")?.parse()?;
    let licenses = rules["licenses"].as_table().context("`licenses` in deny.toml")?;
    let names = |value: &toml::Value| -> BTreeSet<String> {
        value.as_array().into_iter().flatten().filter_map(|v| v.as_str()).map(str::to_string).collect()
    };
    let allowed = names(&licenses["allow"]);
    let empty = Vec::new();
    let exceptions = licenses.get("exceptions").and_then(|e| e.as_array()).unwrap_or(&empty);
    let (mut used, mut excepted) = (BTreeSet::new(), BTreeSet::new());
    for package in all(tree, "x86_64-unknown-linux-gnu")?.values() {
        let exception = exceptions
            .iter()
            .find(|e| e.get("crate").and_then(|c| c.as_str()) == Some(package.name.as_str()));
        let more = exception.and_then(|e| e.get("allow")).map(names).unwrap_or_default();
        let Some(license) = &package.license else {
            findings.push(format!("deny.toml: `{}` names no licence", package.name));
            continue;
        };
        match grants(license, &|name| allowed.contains(name)) {
            Some(by) => used.extend(by),
            None => match grants(license, &|name| allowed.contains(name) || more.contains(name)) {
                Some(_) => {
                    excepted.insert(package.name.clone());
                }
                None => findings.push(format!(
                    "deny.toml: `{}` is under `{license}`, which is not allowed",
                    package.name
                )),
            },
        }
    }
    for name in allowed.difference(&used) {
        findings.push(format!("deny.toml: no package needs `{name}`"));
    }
    for exception in exceptions {
        let name = exception.get("crate").and_then(|c| c.as_str()).context("`crate` of an exception")?;
        if !excepted.contains(name) {
            findings.push(format!("deny.toml: `{name}` needs no exception"));
        }
    }
    Ok(())
}

/// The allowed licences by which an SPDX expression can be met, or `None`.
fn grants(expression: &str, allowed: &dyn Fn(&str) -> bool) -> Option<BTreeSet<String>> {
    // Old manifests write `MIT/Apache-2.0` for `OR`.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = either(&words, &mut at, allowed);
    if at == words.len() { met } else { None }
}

fn either(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> Option<BTreeSet<String>> {
    let mut met = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        let other = both(words, at, allowed);
        met = match (met, other) {
            (Some(a), Some(b)) => Some(a.into_iter().chain(b).collect()),
            (a, b) => a.or(b),
        };
    }
    met
}

fn both(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> Option<BTreeSet<String>> {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        let other = one(words, at, allowed);
        met = met.zip(other).map(|(a, b)| a.into_iter().chain(b).collect());
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> Option<BTreeSet<String>> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let met = either(words, at, allowed);
        *at += 1;
        return met;
    }
    let mut name = word.to_string();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{word} WITH {}", words.get(*at + 1)?);
        *at += 2;
    }
    allowed(&name).then(|| BTreeSet::from([name]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_by_what_is_allowed() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"];
        let met = |expression: &str| grants(expression, &|name| allowed.contains(&name)).is_some();
        for expression in [
            "MIT",
            "GPL-3.0 OR MIT",
            "MIT/GPL-3.0",
            "Apache-2.0 / MIT",
            "MIT AND Apache-2.0",
            "(MIT OR GPL-3.0) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
            "GPL-3.0 AND Zlib OR MIT",
        ] {
            assert!(met(expression), "{expression}");
        }
        for expression in [
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT OR GPL-3.0) AND Zlib",
            "MIT WITH other",
            "MIT MIT",
            "",
            "MIT OR (",
        ] {
            assert!(!met(expression), "{expression}");
        }
    }
}
