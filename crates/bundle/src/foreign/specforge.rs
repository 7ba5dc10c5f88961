//! SpecForge's own folder: SGLang's tensors and numbering, under the names by which SpecForge finds a network
//! [formats §1.2].
//!
//! Its trainer knows a DSpark draft as `DSparkDraftModel`, with the Markov head's words in the table alone, and tells
//! transformers where the class of a block draft stands (`auto_map`). For EAGLE-3 and P-EAGLE both folders are the same.

use std::collections::BTreeMap;

use draftsmith_model::DraftConfig;
use serde_json::{Value, json};

use super::Layout;
use super::export::{ExportInput, Exported, export_as};
use crate::manifest::{CONFIG_FILE, Manifest};
use crate::{BundleError, Problem, card};

/// The word on the command line.
pub const SPECFORGE: &str = "specforge";

/// SGLang's name of an architecture, SpecForge's, and the module of its class.
const NAMES: [[&str; 3]; 2] =
    [["DFlashDraftModel", "DFlashDraftModel", "dflash"], ["Qwen3DSparkModel", "DSparkDraftModel", "dspark"]];
/// What SGLang's folder repeats at the top.
const REPEATED: [&str; 4] =
    ["markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"];

/// Writes a bundle's draft as the folder that SpecForge trains on; the layout of the input counts for nothing.
///
/// # Errors
/// As [`export`](super::export) for [`Layout::Sglang`].
pub fn export_specforge(input: ExportInput<'_>) -> Result<Exported, BundleError> {
    let input = ExportInput { layout: Layout::Sglang, ..input };
    let mut exported = export_as(&input, &dress)?;
    // It serves nothing.
    exported.launch.clear();
    exported.warnings.retain(|problem| !matches!(problem, Problem::Engine { .. }));
    Ok(exported)
}

/// SpecForge's words for SGLang's.
fn dress(
    manifest: &Manifest,
    config: &DraftConfig,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> Result<(), BundleError> {
    let written = files.get(CONFIG_FILE).map(Vec::as_slice).unwrap_or_default();
    let mut value: Value = serde_json::from_slice(written)
        .map_err(|e| BundleError::Manifest { path: CONFIG_FILE.into(), problem: e.to_string() })?;
    let name = value["architectures"][0].as_str().unwrap_or_default().to_owned();
    if let (Some([_, own, module]), Some(object)) =
        (NAMES.iter().find(|[sglang, ..]| *sglang == name), value.as_object_mut())
    {
        REPEATED.iter().for_each(|key| drop(object.remove(*key)));
        object.insert("architectures".into(), json!([own]));
        object.insert("auto_map".into(), json!({ "AutoModel": format!("{module}.{own}") }));
    }
    files.insert(CONFIG_FILE.into(), format!("{value:#}\n").into());
    let how = "SpecForge loads this folder as a draft to go on training with. For an engine, export the bundle in that \
               engine's layout.\n";
    files.insert("README.md".into(), card::folder_readme(manifest, config, how).into());
    Ok(())
}
