//! From a training checkpoint to a bundle, in one atomic step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::{self, AtomicDir};
use draftsmith_formats::hash::sha256_hex;
use draftsmith_formats::mxint8;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};
use draftsmith_model::DraftConfig;

use crate::card;
use crate::check::BUNDLE_BYTES_MAX;
use crate::layout::{WeightTypes, expected_tensors, read_config, vocab_map, weight_problems};
use crate::manifest::{
    BUNDLE_FORMAT, BUNDLE_VERSION, CONFIG_FILE, DraftInfo, FileEntry, ImportedFrom, MANIFEST_FILE, Manifest,
    PROBE_FILE, Recommended, TargetInfo, TrainingInfo, WEIGHTS_FILE,
};
use crate::portable::{RUN_FILE, Told};
use crate::probe::{AnswerFn, ProbeInput, fits, from_file, to_file};
use crate::problem::layer_problem;
use crate::results::{MeasuredResult, record_files};
use crate::{BundleError, Problem, stored};

/// What to do if the bundle's folder exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and fail.
    Refuse,
    /// Replace it in one step.
    Replace,
}

/// Everything a bundle is made of.
#[derive(Clone, Debug)]
pub struct MakeInput {
    /// Folder to be made.
    pub out: PathBuf,
    /// What to do if it exists.
    pub existing: Existing,
    /// Folder with `config.json` and `model.safetensors` of the draft.
    pub checkpoint: PathBuf,
    /// How the weights are stored.
    pub weights: BundleWeights,
    /// Name of the draft.
    pub name: String,
    /// The target it was trained for.
    pub target: TargetInfo,
    /// How it was trained.
    pub training: TrainingInfo,
    /// Where it comes from, if somebody else trained it.
    pub imported: Option<ImportedFrom>,
    /// SPDX expression of the weights' licence.
    pub license: String,
    /// Its text, `LICENSE` in the bundle.
    pub license_text: String,
    /// Attributions of data and target, `NOTICE` in the bundle.
    pub notice: String,
    /// Measured results.
    pub results: Vec<MeasuredResult>,
    /// The setting that measured best.
    pub recommended: Recommended,
    /// The resolved run file, `run.toml` in the bundle.
    pub run_toml: String,
    /// HTML report, `results/report.html` in the bundle.
    pub report_html: Option<String>,
    /// Questions for the numeric probe; [`ProbeInput::made_up`] if empty.
    pub probe_inputs: Vec<ProbeInput>,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
}

/// A bundle that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Its folder.
    pub path: PathBuf,
    /// What `bundle.json` says.
    pub manifest: Manifest,
    /// Sum of its files.
    pub bytes: u64,
    /// What deserves a word ([`Problem::Large`]).
    pub warnings: Vec<Problem>,
}

/// Makes a bundle. `network` answers the probes with the draft of the *checkpoint* as bundled (weights rounded to
/// bf16, or to 8 bits).
///
/// Nothing is left on disk if it fails. Places of this machine become references or names: what a bundle says is for
/// others.
///
/// # Errors
/// [`BundleError::Draft`] names the first tensor or key that does not fit; [`BundleError::MissingField`] if
/// name or licence is empty; [`BundleError::Exists`].
pub fn make(input: &MakeInput, network: &mut AnswerFn<'_>) -> Result<Made, BundleError> {
    for (field, value) in [
        ("name", &input.name),
        ("license", &input.license),
        ("target.license", &input.target.license),
        ("target.name", &input.target.name),
    ] {
        if value.trim().is_empty() {
            return Err(BundleError::MissingField { field });
        }
    }
    if input.existing == Existing::Refuse && input.out.exists() {
        return Err(BundleError::Exists { path: input.out.clone() });
    }
    let mut input = input.clone();
    let MakeInput { target, training, imported, notice, run_toml, .. } = &mut input;
    Told { target, training, imported, notice, run_toml }.make_portable();
    let refused = |problems| BundleError::draft(&input.checkpoint, "bundled", problems);
    let (_, mut config) =
        read_config(&input.checkpoint.join(CONFIG_FILE)).map_err(|problem| refused(vec![problem]))?;
    // Engines have different defaults: the layers are always written.
    let num_layers = input.target.num_layers as u32;
    let layers = config.layers(num_layers);
    let bad = |source| BundleError::Config { path: input.checkpoint.join(CONFIG_FILE), source };
    config.set_target_layers(&layers).map_err(bad)?;
    let shape = config.shape();
    let weights = mxint8::open(&input.checkpoint)?;
    let mut problems = weight_problems(&config, &weights, WeightTypes::Checkpoint);
    problems.extend(layer_problem(&config, num_layers));
    if let Some(Err(problem)) = vocab_map(&*config, &weights) {
        problems.push(problem);
    }
    for (what, trained, found) in [
        ("hidden size", shape.target_hidden_size as u64, input.target.hidden_size),
        ("vocabulary", shape.vocab_size as u64, input.target.vocab_size),
    ] {
        if trained != found {
            problems.push(Problem::WrongTarget {
                what,
                trained: trained.to_string(),
                found: found.to_string(),
            });
        }
    }
    if !problems.is_empty() {
        return Err(refused(problems));
    }

    let (tensors, parameters) = bundled_tensors(&config, &weights, input.weights)?;
    let mut config_value = config.to_value().map_err(bad)?;
    stored::declare(&mut config_value, input.weights);
    let questions = match input.probe_inputs.as_slice() {
        [] => ProbeInput::made_up(shape.features_width(), shape.vocab_size),
        given => given.to_vec(),
    };
    let mut probes = Vec::with_capacity(questions.len());
    for (index, question) in questions.into_iter().enumerate() {
        let probe = network(question).map_err(|source| BundleError::Probe { index, source })?;
        let (found, wanted) = (probe.logits.len(), shape.answer_width);
        if found != wanted || probe.logits.iter().any(|v| !v.is_finite()) {
            let source = format!("{found} logits, wanted {wanted} finite ones").into();
            return Err(BundleError::Probe { index, source });
        }
        fits(&probe.input, &*config)
            .map_err(|problem| BundleError::Probe { index, source: problem.into() })?;
        probes.push(probe);
    }
    let mut manifest = Manifest {
        format: BUNDLE_FORMAT.into(),
        version: BUNDLE_VERSION,
        name: input.name.clone(),
        method: config.name().into(),
        created_unix_s: input.created_unix_s,
        draftsmith_version: env!("CARGO_PKG_VERSION").into(),
        license: input.license.clone(),
        target: input.target.clone(),
        draft: DraftInfo {
            hidden_size: shape.hidden_size as u64,
            draft_vocab_size: shape.draft_vocab_size as u64,
            target_layer_ids: layers,
            parameters,
            dtype: stored::name(input.weights).into(),
        },
        training: TrainingInfo { run_sha256: sha256_hex(&input.run_toml), ..input.training.clone() },
        imported: input.imported.clone(),
        recommended: input.recommended.clone(),
        files: Vec::new(),
    };

    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let json = |value: &serde_json::Value| {
        serde_json::to_string_pretty(value).map(|t| t + "\n").map_err(|source| BundleError::Json { source })
    };
    let one = BTreeMap::from([("format".to_owned(), "pt".to_owned())]); // what the Python loaders look for
    files.insert(CONFIG_FILE.into(), json(&config_value)?.into());
    files.insert(WEIGHTS_FILE.into(), to_bytes(&tensors, &one));
    files.insert(PROBE_FILE.into(), to_file(&probes, shape.features_width()));
    files.insert(RUN_FILE.into(), input.run_toml.clone().into());
    files.insert("LICENSE".into(), input.license_text.clone().into());
    files.insert("NOTICE".into(), input.notice.clone().into());
    for (name, record) in record_files(&input.results) {
        files.insert(format!("results/{name}"), record.clone().into());
    }
    if let Some(report) = &input.report_html {
        files.insert("results/report.html".into(), report.clone().into());
    }
    files.insert("README.md".into(), card::readme(&manifest, &config, &input.results).into());
    files.insert("RESULTS.md".into(), card::results(&manifest, &input.results).into());

    let dir = AtomicDir::create(&input.out)?;
    for (path, bytes) in &files {
        dir.write(path, bytes)?;
        manifest.files.push(FileEntry {
            path: path.clone(),
            bytes: bytes.len() as u64,
            sha256: sha256_hex(bytes),
        });
    }
    let text = manifest.to_json()?;
    dir.write(MANIFEST_FILE, &text)?;
    match input.existing {
        Existing::Refuse => dir.commit()?,
        Existing::Replace => dir.commit_replacing()?,
    }
    let bytes = text.len() as u64 + files.values().map(|b| b.len() as u64).sum::<u64>();
    let warnings = match bytes > BUNDLE_BYTES_MAX {
        true => vec![Problem::Large { bytes, limit: BUNDLE_BYTES_MAX }],
        false => Vec::new(),
    };
    Ok(Made { path: input.out.clone(), manifest, bytes, warnings })
}

/// What an existing bundle was made of, for [`remake`]; results are left to the caller.
///
/// # Errors
/// A folder that is no bundle, or a file of it that cannot be read.
pub fn input_of(dir: &Path) -> Result<MakeInput, BundleError> {
    let manifest = Manifest::read(dir)?;
    let text = |name: &str| -> Result<String, BundleError> {
        Ok(String::from_utf8_lossy(&atomic::read(dir.join(name))?).into_owned())
    };
    let report = "results/report.html";
    Ok(MakeInput {
        out: dir.to_owned(),
        existing: Existing::Replace,
        checkpoint: dir.to_owned(),
        weights: stored::named(&manifest.draft.dtype),
        name: manifest.name,
        target: manifest.target,
        training: manifest.training,
        imported: manifest.imported,
        license: manifest.license,
        license_text: text("LICENSE")?,
        notice: text("NOTICE")?,
        results: Vec::new(),
        recommended: manifest.recommended,
        run_toml: text(RUN_FILE)?,
        report_html: if dir.join(report).is_file() { Some(text(report)?) } else { None },
        probe_inputs: Vec::new(),
        created_unix_s: manifest.created_unix_s,
    })
}

/// Makes a bundle again from itself, with the same weights and stored probes: other results, another card.
///
/// # Errors
/// As [`make`].
pub fn remake(input: &MakeInput) -> Result<Made, BundleError> {
    let (_, config) = read_config(&input.checkpoint.join(CONFIG_FILE))
        .map_err(|problem| BundleError::draft(&input.checkpoint, "bundled", vec![problem]))?;
    let stored = from_file(&input.checkpoint.join(PROBE_FILE), &*config)?;
    let probe_inputs = stored.iter().map(|probe| probe.input.clone()).collect();
    let mut answers = stored.into_iter();
    make(&MakeInput { probe_inputs, ..input.clone() }, &mut |_| {
        answers.next().ok_or_else(|| "there are more questions than stored answers".into())
    })
}

/// The tensors of the bundle in its types, and the count of trained numbers.
fn bundled_tensors(
    config: &DraftConfig,
    weights: &SafetensorsDir,
    form: BundleWeights,
) -> Result<(Vec<TensorData>, u64), BundleError> {
    let mut parameters = 0;
    let mut tensors = Vec::new();
    for spec in expected_tensors(&**config) {
        let tensor = weights.get(&spec.name)?;
        match spec.name.as_str() {
            "d2t" => tensors.push(TensorData::i64("d2t", &spec.shape, &tensor.to_i64()?)),
            "t2d" => tensors.push(TensorData::bool("t2d", &spec.shape, &tensor.to_bool()?)),
            name => {
                parameters += tensor.elements() as u64;
                tensors.extend(stored::tensors(name, &spec.shape, &tensor.to_f32()?, form));
            }
        }
    }
    Ok((tensors, parameters))
}
