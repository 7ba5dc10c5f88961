//! What a bundle says is for others: it names no folder of the machine that made it.

use std::path::Path;

use draftsmith_formats::atomic;
use draftsmith_formats::bundle_files::{is_of_a_machine, portable};
use draftsmith_formats::run::RunFile;

use crate::BundleError;
use crate::manifest::{ImportedFrom, Manifest, TargetInfo, TrainingInfo};

/// Between the names of several files.
const BETWEEN: &str = ", ";
/// The resolved run file of a bundle.
pub(crate) const RUN_FILE: &str = "run.toml";

fn parsed(run_toml: &str) -> Option<RunFile> {
    // An import has none, and one of a later version is left as it is.
    RunFile::parse(Path::new(RUN_FILE), run_toml, &[]).ok()
}

/// Names of data files, joined.
fn joined(names: &str) -> String {
    names.split(BETWEEN).map(portable).collect::<Vec<_>>().join(BETWEEN)
}

/// What of a bundle names places.
pub(crate) struct Told<'a> {
    pub(crate) target: &'a mut TargetInfo,
    pub(crate) training: &'a mut TrainingInfo,
    pub(crate) imported: &'a mut Option<ImportedFrom>,
    pub(crate) notice: &'a mut String,
    pub(crate) run_toml: &'a mut String,
}

impl Told<'_> {
    /// Puts what others may know in place of folders of this machine.
    pub(crate) fn make_portable(self) {
        let run = parsed(self.run_toml);
        // Free text names the same places as the fields.
        let mut known: Vec<String> = run.iter().flat_map(RunFile::machine_places).collect();
        known.extend(self.imported.iter().map(|from| from.reference.clone()));
        known.extend(places_of(&self.target.references, self.training));
        known.retain(|place| is_of_a_machine(place) && place.len() > 1);
        known.sort_by_key(|place| std::cmp::Reverse(place.len()));
        for place in &known {
            *self.notice = self.notice.replace(place.as_str(), &portable(place));
        }
        if let Some(run) = run.filter(|run| !run.machine_places().is_empty()) {
            *self.run_toml = run.portable().to_toml();
        }
        self.target.references.iter_mut().for_each(|reference| *reference = portable(reference));
        self.target.references.dedup();
        self.training.data.iter_mut().for_each(|data| data.name = joined(&data.name));
        if let Some(from) = self.imported {
            from.reference = portable(&from.reference);
        }
    }
}

fn places_of(references: &[String], training: &TrainingInfo) -> Vec<String> {
    let data = training.data.iter().flat_map(|data| data.name.split(BETWEEN)).map(str::to_string);
    references.iter().cloned().chain(data).collect()
}

/// Folders and files of the machine that made a bundle, as far as it names them: what is made today has none.
///
/// # Errors
/// A run file that cannot be read.
pub fn machine_places(dir: &Path, manifest: &Manifest) -> Result<Vec<String>, BundleError> {
    let mut places = places_of(&manifest.target.references, &manifest.training);
    places.extend(manifest.imported.iter().map(|from| from.reference.clone()));
    places.retain(|place| is_of_a_machine(place));
    let path = dir.join(RUN_FILE);
    if path.is_file() {
        let text = String::from_utf8_lossy(&atomic::read(&path)?).into_owned();
        places.extend(parsed(&text).iter().flat_map(RunFile::machine_places));
    }
    places.sort_unstable();
    places.dedup();
    Ok(places)
}
