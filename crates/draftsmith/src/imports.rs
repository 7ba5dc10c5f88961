//! A draft that somebody else trained becomes a bundle beside its target.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use draftsmith_bundle::{Existing, Imported, Made, MakeInput, Recommended, TargetInfo, TrainingInfo};

use crate::Error;
use crate::engine::LoadedTarget;
use crate::run::bundle::{hub_name, license_text, target_license};

/// Depth that an unmeasured draft is recommended with: the default of `bench`.
const DEPTH: u32 = 5;

/// What a bundle says about an imported draft.
pub struct ImportOptions<'a> {
    /// What the user called the draft.
    pub reference: &'a str,
    /// Folder of the bundle.
    pub out: &'a Path,
    /// What to do if it exists.
    pub existing: Existing,
    /// Name on the model card; the last part of the reference if not given.
    pub name: Option<&'a str>,
    /// SPDX expression of the draft's weights.
    pub license: &'a str,
    /// The target's repository on the hub, if the reference does not say it.
    pub base_model: Option<&'a str>,
}

/// Makes the bundle.
///
/// # Errors
/// A draft that does not fit the target, named; a folder that is taken.
pub fn import_draft(
    draft: &Imported,
    target: &LoadedTarget,
    options: &ImportOptions<'_>,
) -> Result<Made, Error> {
    let reference = options.reference;
    let last = reference.trim_end_matches('/').rsplit(['/', ':']).next().unwrap_or(reference);
    let input = MakeInput {
        out: options.out.to_path_buf(),
        existing: options.existing,
        checkpoint: Default::default(), // of the import's own making
        name: options.name.unwrap_or(last).to_string(),
        target: TargetInfo {
            license: target_license(&target.path),
            hub_name: options
                .base_model
                .map(str::to_string)
                .or_else(|| hub_name(std::slice::from_ref(&target.reference))),
            ..target.info()
        },
        training: TrainingInfo::default(),
        imported: None,
        license: options.license.to_string(),
        license_text: license_text(options.license),
        notice: format!("Draft `{reference}`, trained by others; imported by draftsmith.\n"),
        results: Vec::new(),
        recommended: Recommended::chain(DEPTH, "nothing was measured yet"),
        run_toml: String::new(),
        report_html: None,
        probe_inputs: Vec::new(),
        created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    };
    Ok(draft.make(input, reference, &target.target)?)
}
