//! What a manifest lists is named by a source of its crate; files of a crate name each other in no circle.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::modules::{Circles, Modules};
use crate::source::{Source, names_library};
use crate::tree::{Findings, Tree};

/// Listed and named nowhere: crate, library, and why it must stand there.
const UNNAMED: [(&str, &str, &str); 1] =
    [("draftsmith-pull", "flate2", "its feature chooses the backend that `zip` unpacks with")];

/// The text of a package, by who sees it.
struct Texts {
    code: Vec<String>,
    tests: Vec<String>,
    build: Vec<String>,
}

impl Texts {
    /// True if a dependency of this kind is named where that kind is seen.
    fn name(&self, library: &str, kind: Option<&str>) -> bool {
        let texts = match kind {
            Some("dev") => &self.tests,
            Some("build") => &self.build,
            _ => &self.code,
        };
        texts.iter().any(|text| names_library(text, library))
    }
}

/// Looks through every package that `cargo metadata` lists.
pub(crate) fn check(tree: &Tree, packages: &[Value], findings: &mut Findings) -> Result<()> {
    let mut unnamed = BTreeSet::new();
    let mut circles = Circles::default();
    for package in packages {
        let name = package["name"].as_str().context("name")?;
        let manifest = package["manifest_path"].as_str().context("manifest_path")?;
        let manifest = std::path::Path::new(manifest).strip_prefix(&tree.root)?.display().to_string();
        let texts = texts(tree, manifest.trim_end_matches("Cargo.toml"), &mut circles, findings)?;
        let dependencies = package["dependencies"].as_array().context("dependencies")?;
        for dependency in dependencies {
            let library = dependency["name"].as_str().context("dependency name")?;
            let kind = dependency["kind"].as_str();
            let what = if kind == Some("dev") { "dev-dependency" } else { "dependency" };
            let path = dependency["rename"].as_str().unwrap_or(library).replace('-', "_");
            let again = |other: &Value| {
                other["name"] == library && other["kind"].is_null() && other["target"].is_null()
            };
            if kind == Some("dev") && dependencies.iter().any(again) {
                findings.push(format!(
                    "{manifest}: `{library}` stands in both kinds of dependencies; one is enough"
                ));
            } else if texts.name(&path, kind) {
                continue;
            } else if UNNAMED.iter().any(|(of, l, _)| *of == name && *l == library) {
                unnamed.insert((name.to_string(), library.to_string()));
            } else if kind.is_none() && texts.name(&path, Some("dev")) {
                findings.push(format!(
                    "{manifest}: dependency `{library}` is named in tests alone: make it a dev-dependency"
                ));
            } else {
                findings.push(format!(
                    "{manifest}: {what} `{library}` is named in no source of the crate: leave it out"
                ));
            }
        }
    }
    circles.finish(findings);
    for (of, library, _) in UNNAMED {
        if !unnamed.contains(&(of.to_string(), library.to_string())) {
            findings.push(format!("xtask/src/uses.rs: `{library}` of `{of}` needs no exception"));
        }
    }
    Ok(())
}

/// Reads the sources below the folder of a package, and looks for circles among them.
fn texts(tree: &Tree, folder: &str, circles: &mut Circles, findings: &mut Findings) -> Result<Texts> {
    let mut texts = Texts { code: Vec::new(), tests: Vec::new(), build: Vec::new() };
    // What no root reaches without `#[cfg(test)]` is compiled for tests alone.
    let mut compiled = BTreeSet::new();
    for root in ["src/lib.rs", "src/main.rs"].map(|root| format!("{folder}{root}")) {
        if tree.files.contains(&root) {
            let modules = Modules::of(tree, &root)?;
            circles.check(&modules, findings);
            compiled.extend(modules.files().map(str::to_string));
        }
    }
    for file in tree.files.iter().filter(|f| f.ends_with(".rs")) {
        let Some(inside) = file.strip_prefix(folder) else { continue };
        let source = Source::of(&tree.read(file)?);
        match inside.split('/').next() {
            Some("src") if compiled.contains(file) => {
                texts.code.push(source.code);
                texts.tests.push(source.tests);
            }
            Some("src" | "tests" | "examples" | "benches") => texts.tests.extend([source.code, source.tests]),
            Some("build.rs") => texts.build.push(source.code),
            _ => {}
        }
    }
    Ok(texts)
}
