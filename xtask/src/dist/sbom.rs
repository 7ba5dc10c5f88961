//! The bill of materials: CycloneDX 1.5, of the packages that the program is built from and with.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::parts::sha256;
use crate::packages::Package;
use crate::tree::Tree;

/// `checksum` of each package in the lock file, by name and version.
fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Table = lock.parse()?;
    let text =
        |package: &toml::Value, key: &str| package.get(key).and_then(|v| v.as_str()).map(str::to_string);
    let packages = lock["package"].as_array().context("no package in Cargo.lock")?;
    let entries = packages.iter().filter_map(|package| {
        Some(((text(package, "name")?, text(package, "version")?), text(package, "checksum")?))
    });
    Ok(entries.collect())
}

/// The bill, as JSON.
pub(crate) fn of(
    tree: &Tree,
    packages: &BTreeMap<String, Package>,
    root: &str,
    program: &[u8],
) -> Result<Vec<u8>> {
    let checksums = checksums(&tree.read("Cargo.lock")?)?;
    let name = |id: &str| -> Result<String> {
        let package = packages.get(id).with_context(|| format!("`{id}` is no package of the program"))?;
        Ok(format!("pkg:cargo/{}@{}", package.name, package.version))
    };
    let component = |id: &str, package: &Package| -> Result<Value> {
        let mut value = json!({
            "type": if id == root { "application" } else { "library" },
            "bom-ref": name(id)?,
            "name": package.name,
            "version": package.version,
        });
        if let Some(license) = &package.license {
            value["licenses"] =
                json!([{ "expression": license.replace(" / ", " OR ").replace('/', " OR ") }]);
        }
        // What stands in this repository is nowhere else to be found.
        if package.source.is_some() {
            value["purl"] = json!(name(id)?);
        }
        if let Some(checksum) = checksums.get(&(package.name.clone(), package.version.clone())) {
            value["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
        }
        Ok(value)
    };
    let mut main = component(root, packages.get(root).context("root")?)?;
    main["hashes"] = json!([{ "alg": "SHA-256", "content": sha256(program) }]);
    let others = packages.iter().filter(|(id, _)| *id != root);
    let others: Vec<Value> = others.map(|(id, package)| component(id, package)).collect::<Result<_>>()?;
    let edges = packages.iter().map(|(id, package)| -> Result<Value> {
        let uses: Vec<String> = package.uses.iter().map(|id| name(id)).collect::<Result<_>>()?;
        Ok(json!({ "ref": name(id)?, "dependsOn": uses }))
    });
    let edges: Vec<Value> = edges.collect::<Result<_>>()?;
    let bill = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": main,
            "tools": { "components": [{ "type": "application", "name": "draftsmith xtask dist" }] },
        },
        "components": others,
        "dependencies": edges,
    });
    Ok((serde_json::to_string_pretty(&bill)? + "\n").into_bytes())
}
