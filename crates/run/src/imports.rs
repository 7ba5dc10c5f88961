//! A draft that somebody else trained becomes a bundle beside its target, and a bundle gets a card with its results.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use draftsmith_bench::{Record, report_html};
use draftsmith_bundle::{
    Existing, Imported, Made, MakeInput, MeasuredResult, Recommended, TargetInfo, TrainingInfo, Tuned,
    WEIGHTS_FILE, input_of, remake,
};
use draftsmith_formats::atomic;
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::run::BundleWeights;

use crate::Error;
use crate::bench::measured;
use crate::engine::{LoadedTarget, bundle_place};
use crate::license::{hub_name, license_text, target_license};

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
        weights: BundleWeights::Bf16,
        name: options.name.unwrap_or(last).to_string(),
        target: TargetInfo {
            license: target_license(&target.path),
            hub_name: hub_name(options.base_model, std::slice::from_ref(&target.reference))?,
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

/// Writes a bundle's model card, results and report anew: from these records (its own if there are none), with the setting that
/// measured best.
///
/// # Errors
/// A folder that is no bundle, a record that is none or was measured with another draft.
pub fn rewrite_card(dir: &Path, records: &[PathBuf], base_model: Option<&str>) -> Result<Made, Error> {
    let mut input = input_of(dir)?;
    let paths = match records {
        [] => records_of(dir)?,
        given => given.to_vec(),
    };
    let weights = sha256_file(dir.join(WEIGHTS_FILE))?;
    let mut read = Vec::new();
    for path in &paths {
        let text = String::from_utf8_lossy(&atomic::read(path)?).into_owned();
        let record = Record::from_json(&path.display().to_string(), &text)?;
        if record.draft.sha256.as_ref().is_some_and(|found| *found != weights) {
            return Err(Error::input(
                format!("record `{}` was measured with another draft", path.display()),
                format!("measure this one: `draftsmith bench --bundle {} --report DIR`", dir.display()),
            ));
        }
        input.results.push(measured(&record)?);
        read.push(record);
    }
    // With the records that it has, the report that shows them stays, training curve and all.
    if !records.is_empty() {
        input.report_html = Some(report_html(&read)?);
    }
    if let Some(recommended) = Recommended::measured(&input.results) {
        let Recommended { tuned, verdict, .. } = input.recommended;
        // A verdict spoke of the records that the bundle had.
        let verdict = verdict.filter(|_| records.is_empty());
        input.recommended = Recommended { tuned, verdict, ..recommended };
    }
    if base_model.is_some() {
        input.target.hub_name = hub_name(base_model, &[])?;
    }
    Ok(remake(&input)?)
}

/// Writes the fastest setting of this machine into a bundle: what `generate` and `serve` use unless they are told
/// otherwise.
///
/// # Errors
/// A folder that is no bundle, or that cannot be written.
pub fn write_tuned(dir: &Path, tuned: Tuned) -> Result<Made, Error> {
    let dir = &bundle_place(dir);
    let mut input = input_of(dir)?;
    input.results = measured_results(dir)?;
    input.recommended.tuned = Some(tuned);
    Ok(remake(&input)?)
}

/// What a bundle's own records say, in the order of their names.
///
/// # Errors
/// A record that cannot be read, or is none.
pub fn measured_results(dir: &Path) -> Result<Vec<MeasuredResult>, Error> {
    let mut results = Vec::new();
    for path in records_of(dir)? {
        let text = String::from_utf8_lossy(&atomic::read(&path)?).into_owned();
        results.push(measured(&Record::from_json(&path.display().to_string(), &text)?)?);
    }
    Ok(results)
}

/// The raw records of a bundle, by name.
fn records_of(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let folder = dir.join("results");
    let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.map(|e| e.path()).map_err(|e| Error::unreadable(&folder, e)))
        .collect::<Result<_, _>>()?;
    found.retain(|path| path.extension().is_some_and(|e| e == "json"));
    // `gsm8k-2.json` was the second of `gsm8k.json`, which the dot would put behind it.
    found.sort_by_key(|path| path.file_stem().map(|s| s.to_owned()));
    Ok(found)
}
