//! Crate edges and libraries, compared with the tables in ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::tree::{Findings, Tree};
use crate::uses;

const PAGE: &str = "ARCHITECTURE.md";
/// Libraries that only one crate may see: the reason that crate exists.
const OWNED: [(&str, &[&str]); 6] = [
    ("axum", &["serve"]),
    ("ureq", &["capture", "pull", "store"]),
    ("tokenizers", &["text"]),
    ("clap", &["draftsmith", "xtask"]),
    ("gemm", &["kernels"]),
    ("parquet", &["data"]),
];

/// Rows of the table that follows a heading, cells trimmed and without backticks.
fn table(page: &str, heading: &str) -> Result<Vec<Vec<String>>> {
    let (_, after) =
        page.split_once(&format!("\n{heading}\n")).with_context(|| format!("no `{heading}` in {PAGE}"))?;
    let rows: Vec<Vec<String>> = after
        .lines()
        .skip_while(|l| !l.starts_with('|'))
        .take_while(|l| l.starts_with('|'))
        .skip(2)
        .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().replace('`', "")).collect())
        .collect();
    if rows.is_empty() {
        bail!("no table under `{heading}` in {PAGE}");
    }
    Ok(rows)
}

fn names(cell: &str) -> BTreeSet<String> {
    cell.split(',').map(str::trim).filter(|n| !n.is_empty() && *n != "—").map(str::to_string).collect()
}

fn short(package: &str) -> String {
    package.strip_prefix("draftsmith-").unwrap_or(package).to_string()
}

pub(crate) fn check(tree: &Tree, findings: &mut Findings) -> Result<()> {
    let page = tree.read(PAGE)?;
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(&tree.root)
        .output()?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut used = BTreeSet::new();
    let packages = metadata["packages"].as_array().context("packages")?;
    uses::check(tree, packages, findings)?;
    for package in packages {
        let name = short(package["name"].as_str().context("name")?);
        let edges = edges.entry(name.clone()).or_default();
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            let library = dependency["name"].as_str().context("dependency name")?;
            let ours = dependency["path"].is_string();
            if !ours {
                used.insert(library.to_string());
            }
            // What tests use is not what the crate sees.
            if dependency["kind"].as_str() == Some("dev") {
                continue;
            }
            if ours {
                edges.insert(short(library));
            }
            if let Some((_, owners)) =
                OWNED.iter().find(|(l, owners)| *l == library && !owners.contains(&name.as_str()))
            {
                findings.push(format!(
                    "crates/{name}/Cargo.toml: `{library}` belongs to {} alone",
                    owners.join(", ")
                ));
            }
        }
    }
    edges.remove("xtask");
    layers(&page, &edges, findings)?;
    libraries(tree, &page, &used, findings)
}

fn layers(page: &str, edges: &BTreeMap<String, BTreeSet<String>>, findings: &mut Findings) -> Result<()> {
    let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in table(page, "## Crates")? {
        let [_, name, _, may_use, ..] = row.as_slice() else {
            bail!("a row of the crate table has too few cells")
        };
        allowed.insert(name.clone(), names(may_use));
    }
    for (name, uses) in edges {
        let Some(allowed) = allowed.get(name) else {
            findings.push(format!("{PAGE}: crate `{name}` is missing from the table"));
            continue;
        };
        for other in uses.iter().filter(|u| !allowed.contains("all") && !allowed.contains(*u)) {
            findings.push(format!("crates/{name}/Cargo.toml: `{name}` may not use `{other}` ({PAGE})"));
        }
        for other in allowed.iter().filter(|a| *a != "all" && !uses.contains(*a)) {
            findings.push(format!("{PAGE}: `{name}` is said to use `{other}`, and does not"));
        }
    }
    for name in allowed.keys().filter(|n| !edges.contains_key(*n)) {
        findings.push(format!("{PAGE}: there is no crate `{name}`"));
    }
    Ok(())
}

/// Every library we keep is listed with its reason, and every listed one is used.
fn libraries(tree: &Tree, page: &str, used: &BTreeSet<String>, findings: &mut Findings) -> Result<()> {
    let listed: BTreeSet<String> =
        table(page, "## Libraries")?.iter().filter_map(|row| row.first()).flat_map(|c| names(c)).collect();
    for name in used.difference(&listed) {
        findings.push(format!("{PAGE}: library `{name}` is used and not listed"));
    }
    for name in listed.difference(used) {
        findings.push(format!("{PAGE}: library `{name}` is listed and not used"));
    }
    let manifest = tree.read("Cargo.toml")?;
    let declared = manifest.split("[workspace.dependencies]").nth(1).unwrap_or_default();
    for line in declared.lines().take_while(|l| !l.starts_with('[')) {
        let Some((name, _)) = line.split_once(" = ") else { continue };
        if !name.starts_with("draftsmith-") && !used.contains(name) {
            findings.push(format!("Cargo.toml: library `{name}` is declared and used by no crate"));
        }
    }
    Ok(())
}
