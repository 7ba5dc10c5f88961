//! `bundle check`: every file, every tensor, the map, the configuration, the target, the numbers.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::mxint8;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_model::DraftConfig;
use serde::Serialize;

use crate::files::files_below;
use crate::foreign::config_problems;
use crate::layout::{WeightTypes, read_config, vocab_map, weight_problems};
use crate::manifest::{CONFIG_FILE, MANIFEST_FILE, Manifest, PROBE_FILE, TargetInfo, WEIGHTS_FILE};
use crate::probe::{self, EmbedFn, ProbeFn};
use crate::{BundleError, Problem, stored};

/// Largest bundle that belongs into a source repository.
pub const BUNDLE_BYTES_MAX: u64 = 25 << 20;

/// How one check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It holds.
    Held,
    /// It holds, with a remark.
    Warned,
    /// It does not hold.
    Failed,
    /// What it needs was not given, or an earlier check failed.
    Skipped,
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckLine {
    /// Stable name: `files`, `config`, `tensors`, `vocab_map`, `target`, `probe`, `size`.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was looked at, with counts.
    pub detail: String,
    /// What does not hold.
    pub problems: Vec<Problem>,
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckReport {
    /// Name of the bundle.
    pub name: String,
    /// True if nothing failed.
    pub holds: bool,
    /// One line per check, always the same ones in the same order.
    pub checks: Vec<CheckLine>,
}

impl CheckReport {
    pub(crate) fn new(name: String, checks: Vec<CheckLine>) -> CheckReport {
        CheckReport { name, holds: checks.iter().all(|c| c.status != Status::Failed), checks }
    }

    /// Everything that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Problem> {
        self.checks.iter().filter(|c| c.status == Status::Failed).flat_map(|c| &c.problems)
    }

    /// One line per check, problems and hints indented below. Ends with a line feed.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for check in &self.checks {
            let mark = match check.status {
                Status::Held => "ok     ",
                Status::Warned => "warning",
                Status::Failed => "FAILED ",
                Status::Skipped => "skipped",
            };
            out.push_str(&format!("{mark}  {:9}  {}\n", check.name, check.detail));
            for problem in &check.problems {
                out.push_str(&format!("           {problem}\n"));
                if let Some(hint) = problem.hint() {
                    out.push_str(&format!("             hint: {hint}\n"));
                }
            }
        }
        out
    }
}

/// What a check may use besides the bundle itself.
#[derive(Default)]
pub struct CheckOptions<'a> {
    /// The target at hand, to be compared with the one in the manifest.
    pub target: Option<&'a TargetInfo>,
    /// Runs the real draft network on a probe; see [`ProbeInput`](crate::ProbeInput).
    pub network: Option<&'a mut ProbeFn<'a>>,
    /// Rows of the target's embedding, to be compared with those stored in the probe.
    pub embedding: Option<&'a mut EmbedFn<'a>>,
}

/// Checks a bundle.
///
/// # Errors
/// Only if there is no bundle to check, or the network itself fails; whatever does not hold is in the report.
pub fn check(dir: impl AsRef<Path>, options: CheckOptions<'_>) -> Result<CheckReport, BundleError> {
    let dir = dir.as_ref();
    let manifest = Manifest::read(dir)?;
    let mut checks = vec![files(dir, &manifest)?];
    let (config_line, config) = config(dir, &manifest);
    checks.push(config_line);
    let config = config.as_ref();
    let [tensors, map] = tensors(dir, config, stored::named(&manifest.draft.dtype));
    let usable = tensors.status == Status::Held && map.status == Status::Held;
    checks.extend([tensors, map]);
    checks.push(target(&manifest, config, options.target));
    let same_weights = options.target.map(|found| found.weights_sha256 == manifest.target.weights_sha256);
    checks.push(numbers(dir, config, usable, same_weights, options)?);
    checks.push(size(dir, &manifest));
    Ok(CheckReport::new(manifest.name, checks))
}

pub(crate) fn line(name: &'static str, detail: String, problems: Vec<Problem>) -> CheckLine {
    let status = if problems.is_empty() { Status::Held } else { Status::Failed };
    CheckLine { name, status, detail, problems }
}

pub(crate) fn skipped(name: &'static str, why: &str) -> CheckLine {
    CheckLine { name, status: Status::Skipped, detail: why.into(), problems: Vec::new() }
}

/// True for `a/b.json`: relative, and never upwards.
fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.contains('\\')
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

fn files(dir: &Path, manifest: &Manifest) -> Result<CheckLine, BundleError> {
    let mut problems = Vec::new();
    let mut bytes = 0u64;
    let mut listed = BTreeSet::new();
    for entry in &manifest.files {
        if !is_inside(&entry.path) {
            problems.push(Problem::FilePath { path: entry.path.clone() });
            continue;
        }
        listed.insert(entry.path.clone());
        let path = dir.join(&entry.path);
        let Some(metadata) = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file) else {
            problems.push(Problem::FileMissing { path: entry.path.clone() });
            continue;
        };
        bytes += metadata.len();
        if metadata.len() != entry.bytes {
            problems.push(Problem::FileSize {
                path: entry.path.clone(),
                wanted: entry.bytes,
                found: metadata.len(),
            });
            continue;
        }
        let found = sha256_file(&path)?;
        if found != entry.sha256 {
            problems.push(Problem::FileHash {
                path: entry.path.clone(),
                wanted: entry.sha256.clone(),
                found,
            });
        }
    }
    for path in [CONFIG_FILE, WEIGHTS_FILE, PROBE_FILE] {
        if !listed.contains(path) {
            problems.push(Problem::FileNotListed { path: path.into() });
        }
    }
    for path in files_below(dir)? {
        if path != MANIFEST_FILE && !listed.contains(&path) {
            problems.push(Problem::FileUnlisted { path });
        }
    }
    Ok(line("files", format!("{} files, {bytes} bytes, sizes and hashes", manifest.files.len()), problems))
}

fn config(dir: &Path, manifest: &Manifest) -> (CheckLine, Option<DraftConfig>) {
    let form = stored::named(&manifest.draft.dtype);
    let (object, config) = match read_config(&dir.join(CONFIG_FILE)) {
        Ok(read) => read,
        Err(problem) => return (line("config", "config.json".into(), vec![problem]), None),
    };
    let shape = config.shape();
    let mut problems = config_problems(&object, &config, Some(manifest.target.num_layers));
    let mut same = |key: &'static str, manifest: String, config: String| {
        if manifest != config {
            problems.push(Problem::ManifestDisagrees { key, manifest, config });
        }
    };
    same("target.hidden_size", manifest.target.hidden_size.to_string(), shape.target_hidden_size.to_string());
    same("target.vocab_size", manifest.target.vocab_size.to_string(), shape.vocab_size.to_string());
    same("draft.hidden_size", manifest.draft.hidden_size.to_string(), shape.hidden_size.to_string());
    same(
        "draft.draft_vocab_size",
        manifest.draft.draft_vocab_size.to_string(),
        shape.draft_vocab_size.to_string(),
    );
    same("draft.dtype", manifest.draft.dtype.clone(), stored::declared(&object));
    let ids = config.target_layers().unwrap_or_default();
    same("draft.target_layer_ids", format!("{:?}", manifest.draft.target_layer_ids), format!("{ids:?}"));
    let mut line = line("config", format!("{} keys, for {}", object.len(), stored::readers(form)), problems);
    if let Some(context) = manifest.target.context_len
        && (shape.max_position_embeddings as u64) < context
    {
        line.problems.push(Problem::ShortContext { found: shape.max_position_embeddings, context });
        if line.status == Status::Held {
            line.status = Status::Warned;
        }
    }
    (line, Some(config))
}

fn tensors(dir: &Path, config: Option<&DraftConfig>, form: BundleWeights) -> [CheckLine; 2] {
    let Some(config) = config else {
        return [
            skipped("tensors", "config.json cannot be read"),
            skipped("vocab_map", "config.json cannot be read"),
        ];
    };
    let opened = SafetensorsDir::open(dir.join(WEIGHTS_FILE))
        .and_then(|weights| Ok((stored::problems(&weights, form), mxint8::widened(weights)?)));
    let (mut problems, weights) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            let problem = Problem::Weights { message: e.to_string() };
            return [line("tensors", WEIGHTS_FILE.into(), vec![problem]), skipped("vocab_map", "no weights")];
        }
    };
    problems.extend(weight_problems(config, &weights, WeightTypes::Bundle));
    let tensors = line(
        "tensors",
        format!("{} tensors: names, shapes, types, finite, trained", weights.len()),
        problems,
    );
    let map = match vocab_map(&**config, &weights) {
        None if !config.shape().has_vocab_map => {
            line("vocab_map", "the draft proposes target ids".into(), Vec::new())
        }
        None => skipped("vocab_map", "`d2t` or `t2d` is unusable"),
        Some(Err(problem)) => line("vocab_map", "`d2t` against `t2d`".into(), vec![problem]),
        Some(Ok(map)) => line(
            "vocab_map",
            format!(
                "{} draft ids into {} target ids, `d2t` agrees with `t2d`",
                map.draft_vocab(),
                map.target_vocab()
            ),
            Vec::new(),
        ),
    };
    [tensors, map]
}

fn target(manifest: &Manifest, config: Option<&DraftConfig>, found: Option<&TargetInfo>) -> CheckLine {
    let Some(found) = found else { return skipped("target", "no target was given to compare with") };
    let trained = &manifest.target;
    let mut problems = target_problems(trained, found);
    // The configuration is what the engines go by, so it is compared as well if the manifest agrees.
    if problems.is_empty()
        && let Some(config) = config
    {
        let mut same = |what, wanted: u64, is: usize| {
            if wanted != is as u64 {
                problems.push(Problem::WrongTarget {
                    what,
                    trained: is.to_string(),
                    found: wanted.to_string(),
                });
            }
        };
        same("hidden size", found.hidden_size, config.shape().target_hidden_size);
        same("vocabulary", found.vocab_size, config.shape().vocab_size);
    }
    let mut line = line("target", format!("`{}`: sizes, tokenizer and template", found.name), problems);
    if line.status == Status::Held && trained.weights_sha256 != found.weights_sha256 {
        // Another quantisation of the same model works, with another accept length.
        line.status = Status::Warned;
        line.problems.push(Problem::WrongTarget {
            what: "weights hash",
            trained: trained.weights_sha256.clone(),
            found: found.weights_sha256.clone(),
        });
    }
    line
}

/// Whether a draft trained for one target fits another: sizes, tokenizer, template. Empty means yes.
pub fn target_problems(trained: &TargetInfo, found: &TargetInfo) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut same = |what, trained: String, found: String| {
        if trained != found {
            problems.push(Problem::WrongTarget { what, trained, found });
        }
    };
    same("hidden size", trained.hidden_size.to_string(), found.hidden_size.to_string());
    same("vocabulary", trained.vocab_size.to_string(), found.vocab_size.to_string());
    same("layer count", trained.num_layers.to_string(), found.num_layers.to_string());
    same("tokenizer hash", trained.tokenizer_sha256.clone(), found.tokenizer_sha256.clone());
    same("template hash", trained.template_sha256.clone(), found.template_sha256.clone());
    problems
}

/// Runs the probe. `usable`: the tensors hold; `same_weights`: what is known of the target at hand.
fn numbers(
    dir: &Path,
    config: Option<&DraftConfig>,
    usable: bool,
    same_weights: Option<bool>,
    options: CheckOptions<'_>,
) -> Result<CheckLine, BundleError> {
    let Some(config) = config else { return Ok(skipped("probe", "config.json cannot be read")) };
    let probes = match probe::from_file(&dir.join(PROBE_FILE), &**config) {
        Ok(probes) => probes,
        Err(e) => {
            return Ok(line("probe", PROBE_FILE.into(), vec![Problem::ProbeFile { message: e.to_string() }]));
        }
    };
    let alone = probes.iter().all(|p| !p.input.embeddings.is_empty());
    let network = match (options.network, same_weights) {
        _ if !usable => return Ok(skipped("probe", "the weights do not hold")),
        (None, _) => return Ok(skipped("probe", "the draft network was not run")),
        // Without stored embeddings the target's own are used: other weights give other numbers, and rightly so.
        (_, None) if !alone => return Ok(skipped("probe", "it needs the target")),
        (_, Some(false)) if !alone => {
            return Ok(skipped("probe", "it was answered beside other target weights"));
        }
        (Some(network), _) => network,
    };
    let (worst, mut problems) = probe::run(&probes, network)?;
    if let (Some(embed), Some(true)) = (options.embedding, same_weights) {
        problems.extend(probe::embedding_problems(&probes, embed)?);
    }
    let detail = format!(
        "{} probes, largest difference {:.1e} of the largest logit (limit {:.0e})",
        probes.len(),
        worst,
        probe::PROBE_TOLERANCE
    );
    Ok(line("probe", detail, problems))
}

fn size(dir: &Path, manifest: &Manifest) -> CheckLine {
    let own = std::fs::metadata(dir.join(MANIFEST_FILE)).map_or(0, |m| m.len());
    let bytes = manifest.files.iter().fold(own, |sum, f| sum.saturating_add(f.bytes));
    let mut line = line("size", format!("{:.1} MB", bytes as f64 / 1e6), Vec::new());
    if bytes > BUNDLE_BYTES_MAX {
        line.status = Status::Warned;
        line.problems.push(Problem::Large { bytes, limit: BUNDLE_BYTES_MAX });
    }
    line
}
