//! Licences of weights, and the repository that a target comes from.

use std::path::Path;

use draftsmith_formats::gguf::GgufFile;
use draftsmith_pull::Reference;

use crate::Error;

/// Stands for a licence that nobody told us.
const UNKNOWN_LICENSE: &str = "LicenseRef-unknown";

/// The licence that a model file names.
pub(crate) fn target_license(path: &Path) -> String {
    if path.is_dir() {
        return UNKNOWN_LICENSE.to_string();
    }
    GgufFile::open(path)
        .ok()
        .and_then(|file| file.find_str("general.license").ok().flatten().map(spdx))
        .filter(|license| !license.trim().is_empty())
        .unwrap_or_else(|| UNKNOWN_LICENSE.to_string())
}

/// The hub writes licences in lower case.
fn spdx(name: &str) -> String {
    match name {
        "apache-2.0" => "Apache-2.0",
        "mit" => "MIT",
        "cc0-1.0" => "CC0-1.0",
        other => other,
    }
    .to_string()
}

/// The repository of the base model: as named, or that of the first hub reference.
pub(crate) fn hub_name(named: Option<&str>, sources: &[String]) -> Result<Option<String>, Error> {
    if let Some(name) = named {
        return match format!("hf:{name}").parse() {
            Ok(Reference::Hf { repo, file: None, .. }) if repo == name => Ok(Some(repo)),
            _ => Err(Error::input(
                format!("base model `{name}` is no repository on the hub"),
                "write it as `ORG/NAME`, without `hf:`, revision or file",
            )),
        };
    }
    let mut references = sources.iter().filter_map(|s| s.parse().ok());
    Ok(references.find_map(|reference| match reference {
        Reference::Hf { repo, .. } => Some(repo),
        Reference::Pip { .. } | Reference::PipParts(_) | Reference::Path(_) => None,
    }))
}

/// The text that goes with a licence; a line that names it where we have none.
pub(crate) fn license_text(license: &str) -> String {
    match license {
        "Apache-2.0" => include_str!("../../../LICENSE-APACHE").to_string(),
        "MIT" => include_str!("../../../LICENSE-MIT").to_string(),
        other => format!("The weights in this folder are licensed under {other} (SPDX expression).\n"),
    }
}
