//! The catalogue of bundles that ships inside the program: names that stand for a folder or a repository wherever a
//! bundle is asked. Its numbers are those of the bundles' own records; a test compares them.

use std::path::PathBuf;
use std::sync::OnceLock;

use draftsmith_bundle::{Headline, has_manifest};
use serde::{Deserialize, Serialize};

/// The file, as it stands in the repository.
const TEXT: &str = include_str!("../../../bundles/catalogue.json");

/// One bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueEntry {
    /// What it is called by: `--bundle NAME`.
    pub name: String,
    /// Its name on the model card.
    pub title: String,
    /// Kind of draft.
    pub kind: String,
    /// SPDX expression of its weights' licence.
    pub license: String,
    /// Folder that ships with draftsmith.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Repository on a hub, `hf:ORG/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Size of all its files.
    pub bytes: u64,
    /// Hash of its weights.
    pub weights_sha256: String,
    /// The model it drafts for.
    pub target: CatalogueTarget,
    /// What it gained where it was measured; the records lie in the bundle.
    #[serde(default)]
    pub measured: Option<Headline>,
}

/// A target, as the catalogue names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueTarget {
    /// Name for people.
    pub name: String,
    /// References that lead to it, best first.
    pub references: Vec<String>,
    /// Hash of its weights.
    pub weights_sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    #[serde(rename = "format")]
    _format: String,
    #[serde(rename = "version")]
    _version: u32,
    bundles: Vec<CatalogueEntry>,
}

/// Every bundle of the catalogue.
pub fn catalogue() -> &'static [CatalogueEntry] {
    static READ: OnceLock<Vec<CatalogueEntry>> = OnceLock::new();
    READ.get_or_init(|| {
        let catalogue: Catalogue = serde_json::from_str(TEXT).expect("tests read the catalogue");
        catalogue.bundles
    })
}

/// The bundle of this name.
pub fn catalogued(name: &str) -> Option<&'static CatalogueEntry> {
    catalogue().iter().find(|entry| entry.name.eq_ignore_ascii_case(name))
}

impl CatalogueEntry {
    /// The folder of the bundle below the first of some folders that has it.
    pub fn find_below(&self, roots: &[PathBuf]) -> Option<PathBuf> {
        let folder = self.folder.as_ref()?;
        roots.iter().map(|root| root.join(folder)).find(|found| has_manifest(found))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use draftsmith_bundle::{MANIFEST_FILE, Manifest, WEIGHTS_FILE};

    use super::*;
    use crate::imports::measured_results;

    /// As many digits as the catalogue has.
    fn rounded(value: f64) -> f64 {
        (value * 1e4).round() / 1e4
    }

    #[test]
    fn the_catalogue_says_what_the_bundles_say() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut found = Vec::new();
        let entries = std::fs::read_dir(root.join("bundles")).unwrap().flatten();
        let mut folders: Vec<PathBuf> = entries.map(|e| e.path()).filter(|path| has_manifest(path)).collect();
        folders.sort();
        for folder in folders {
            let manifest = Manifest::read(&folder).unwrap();
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let own = std::fs::metadata(folder.join(MANIFEST_FILE)).unwrap().len();
            let weights = manifest.files.iter().find(|file| file.path == WEIGHTS_FILE).unwrap();
            found.push(CatalogueEntry {
                folder: Some(Path::new("bundles").join(&name)),
                name,
                title: manifest.name.clone(),
                kind: manifest.method.clone(),
                license: manifest.license.clone(),
                reference: None,
                bytes: own + manifest.files.iter().map(|file| file.bytes).sum::<u64>(),
                weights_sha256: weights.sha256.clone(),
                target: CatalogueTarget {
                    name: manifest.target.name.clone(),
                    references: manifest.target.references.clone(),
                    weights_sha256: manifest.target.weights_sha256.clone(),
                },
                measured: Headline::of(&measured_results(&folder).unwrap()).map(|measured| Headline {
                    speedup: rounded(measured.speedup),
                    accept_len: measured.accept_len.map(rounded),
                    ..measured
                }),
            });
        }
        let as_json = |entries: &[CatalogueEntry]| serde_json::to_string_pretty(entries).unwrap();
        let (said, found) = (as_json(catalogue()), as_json(&found));
        assert!(said == found, "`bundles` of bundles/catalogue.json must be:\n{found}\nand is:\n{said}");
    }

    #[test]
    fn names_are_found_whatever_their_case_and_are_no_paths_or_references() {
        for entry in catalogue() {
            assert_eq!(catalogued(&entry.name.to_uppercase()), Some(entry));
            let is_path = entry.name.starts_with('.') || entry.name.contains(['/', '\\', ':']);
            assert!(!is_path, "{}", entry.name);
            assert!(entry.folder.is_some() || entry.reference.is_some(), "{}", entry.name);
        }
        assert_eq!(catalogued("no-such-bundle"), None);
    }
}
