//! An export of a draft that proposes several tokens at once, read back by a way of its own and compared with its bundle.

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith_core::VocabMap;
use draftsmith_formats::mxint8;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir};
use draftsmith_kernels::{Kernels, PackMode};
use draftsmith_model::Draft;

use super::plain::{Facts, Plain, inventory, layout_of, published};
use super::{MARKOV_ROWS, Parallel, whole};
use crate::check::{CheckLine, line, skipped};
use crate::foreign::Layout;
use crate::foreign::plain::Stored;
use crate::layout::{TensorSpec, expected_tensors, vocab_map};
use crate::manifest::{Manifest, PROBE_FILE, WEIGHTS_FILE};
use crate::network::hidden_state;
use crate::probe::{self, PROBE_TOLERANCE, difference};
use crate::{BundleError, Problem};

/// Compares every tensor number by number, what the configuration says, and the answers to the bundle's probes.
pub(crate) fn compare<K: Kernels>(
    export: &Path,
    bundle: &Path,
    manifest: &Manifest,
    draft: &Parallel<'_>,
    kernels: &K,
) -> Result<(Layout, Vec<CheckLine>), BundleError> {
    let layout = layout_of(export)?.ok_or_else(|| BundleError::NoDraft { path: export.to_owned() })?;
    let weights = mxint8::open(bundle.join(WEIGHTS_FILE))?;
    let specs = expected_tensors(&*whole(draft));
    let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
    let (stored, left) = inventory(export, layout, &names)?;
    let mut problems: Vec<Problem> =
        left.into_iter().map(|name| Problem::TensorExtra { name, shape: Vec::new() }).collect();
    let map = vocab_map(&**draft, &weights).and_then(Result::ok);
    let mut count = 0;
    for spec in &specs {
        let Some(name) = published(layout, &spec.name) else { continue };
        count += 1;
        let own = own_numbers(spec, &weights, map.as_ref())?;
        problems.extend(tensor_problem(layout, name, spec, stored.get(&spec.name), &own));
    }
    let detail = format!("{count} tensors: names, types, shapes, every number");
    let mut checks = vec![line("tensors", detail, problems)];
    if !checks[0].problems.is_empty() {
        checks.extend(["config", "probe"].map(|name| skipped(name, "the tensors do not hold")));
        return Ok((layout, checks));
    }
    let facts = Facts::read(export, layout)?;
    checks.push(said(layout, manifest, draft, &facts));
    checks.push(answers(bundle, draft, kernels, facts, stored)?);
    Ok((layout, checks))
}

/// A tensor of the bundle as an export should hold it.
fn own_numbers(
    spec: &TensorSpec,
    weights: &SafetensorsDir,
    map: Option<&VocabMap>,
) -> Result<Vec<f64>, BundleError> {
    let tensor = weights.get(&spec.name)?;
    let values: Vec<f64> = match spec.dtype {
        Dtype::I64 => tensor.to_i64()?.into_iter().map(|id| id as f64).collect(),
        Dtype::BOOL => tensor.to_bool()?.into_iter().map(|flag| f64::from(u8::from(flag))).collect(),
        _ => tensor.to_f32()?.into_iter().map(f64::from).collect(),
    };
    let Some(map) = map.filter(|_| spec.name == MARKOV_ROWS) else { return Ok(values) };
    // A row for each id of the vocabulary: zeros where the draft has none.
    let width = spec.shape[1];
    let mut rows = vec![0.0; spec.shape[0] * width];
    for (draft, id) in map.target_ids().iter().enumerate() {
        for column in 0..width {
            rows[*id as usize * width + column] = values[draft * width + column];
        }
    }
    Ok(rows)
}

fn tensor_problem(
    layout: Layout,
    name: String,
    spec: &TensorSpec,
    stored: Option<&Stored>,
    own: &[f64],
) -> Option<Problem> {
    let dtype = match (spec.dtype, layout, spec.shape.len()) {
        (Dtype::I64, ..) => "I64",
        (Dtype::BOOL, ..) => "BOOL",
        (_, Layout::Gguf, 1) => "F32",
        _ => "BF16",
    };
    let wanted = || spec.shape.clone();
    let Some(found) = stored else {
        return Some(Problem::TensorMissing { name, dtype, shape: wanted() });
    };
    if found.dtype != dtype {
        return Some(Problem::TensorDtype { name, wanted: dtype, found: found.dtype.clone() });
    }
    if found.shape != spec.shape {
        return Some(Problem::TensorShape { name, wanted: wanted(), found: found.shape.clone() });
    }
    let index = found.values.iter().zip(own).position(|(found, own)| found != own)?;
    Some(Problem::TensorDiffers { name, index, wanted: own[index], found: found.values[index] })
}

/// Layers, mask token and block, as the export's engine reads them.
fn said(layout: Layout, manifest: &Manifest, draft: &Parallel<'_>, facts: &Facts) -> CheckLine {
    let mut problems = Vec::new();
    let mut same = |key: &str, wanted: String, found: String| {
        if wanted != found {
            problems.push(Problem::ExportDiffers { key: key.to_owned(), wanted, found });
        }
    };
    let layers = draft.layers(manifest.target.num_layers as u32);
    same("captured layers", format!("{layers:?}"), format!("{:?}", facts.layers));
    let (mask, block, from_anchor) = match draft {
        Parallel::Block(block) => (block.mask_token_id, block.block_size, block.spark.is_some()),
        Parallel::PEagle(config) => (config.mask_token_id, 0, false),
    };
    same("mask token", mask.to_string(), facts.mask.to_string());
    same("block size", block.to_string(), facts.block.to_string());
    same("sample from anchor", from_anchor.to_string(), facts.from_anchor.to_string());
    let proposes = whole(draft).shape().draft_vocab_size;
    same("draft vocabulary", proposes.to_string(), facts.proposes.to_string());
    line("config", format!("{} layout: captured layers, mask token, block", layout.name()), problems)
}

/// The probes, by our network and by the export's.
fn answers<K: Kernels>(
    bundle: &Path,
    draft: &Parallel<'_>,
    kernels: &K,
    facts: Facts,
    stored: BTreeMap<String, Stored>,
) -> Result<CheckLine, BundleError> {
    let probes = probe::from_file(&bundle.join(PROBE_FILE), &**draft)?;
    if probes.iter().any(|p| p.input.embeddings.is_empty()) {
        return Ok(skipped("probe", "the bundle's probe has no embeddings"));
    }
    let network = Draft::load(kernels, bundle, PackMode::F32)
        .map_err(|source| BundleError::Probe { index: 0, source: source.into() })?;
    let plain = Plain::new(facts, stored);
    let mut problems = Vec::new();
    let mut worst_hidden = 0.0f32;
    for (index, probe) in probes.iter().enumerate() {
        let ours = hidden_state(kernels, &network, &probe.input)
            .map_err(|source| BundleError::Probe { index, source })?;
        let (hidden, _) = plain.answer(&probe.input);
        let (share, at) = difference(&ours, &hidden);
        worst_hidden = worst_hidden.max(share);
        if share > PROBE_TOLERANCE {
            let (depth, wanted, found) = (probe.input.depth, ours[at], hidden[at]);
            problems.push(Problem::HiddenDiffers { probe: index, depth, index: at, wanted, found });
        }
    }
    let (worst, others) = probe::run(&probes, &mut |question| Ok(plain.answer(question).1))?;
    problems.extend(others);
    let detail = format!(
        "{} probes, largest difference {worst_hidden:.1e} of the hidden state, {worst:.1e} of the answer (limit \
         {PROBE_TOLERANCE:.0e})",
        probes.len()
    );
    Ok(line("probe", detail, problems))
}
