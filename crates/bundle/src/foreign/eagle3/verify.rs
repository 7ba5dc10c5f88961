//! An EAGLE-3 export read back by a way of its own and compared with its bundle.

use std::path::Path;

use draftsmith_formats::mxint8;
use draftsmith_formats::safetensors_dir::Tensor;
use draftsmith_kernels::{Kernels, PackMode};
use draftsmith_model::eagle3::Eagle3Config;
use draftsmith_model::{Draft, DraftConfig};

use super::plain::{Entry, Plain, inventory, layout_of};
use super::tensor_name;
use crate::check::{CheckLine, line, skipped};
use crate::foreign::Layout;
use crate::foreign::plain::Stored;
use crate::layout::expected_tensors;
use crate::manifest::{Manifest, PROBE_FILE, WEIGHTS_FILE};
use crate::network::hidden_state;
use crate::probe::{self, PROBE_TOLERANCE, difference};
use crate::{BundleError, Problem};

/// Compares every tensor number by number, the captured layers, and the answers to the bundle's probes.
pub(crate) fn compare<K: Kernels>(
    export: &Path,
    bundle: &Path,
    manifest: &Manifest,
    config: &Eagle3Config,
    kernels: &K,
) -> Result<(Layout, Vec<CheckLine>), BundleError> {
    let layout = layout_of(export)?.ok_or_else(|| BundleError::NoDraft { path: export.to_owned() })?;
    let layers = config.layers(manifest.target.num_layers as u32);
    let draft = Draft::load(kernels, bundle, PackMode::F32)
        .map_err(|source| BundleError::Probe { index: 0, source: source.into() })?;
    let config = &DraftConfig::Eagle3(config.clone());
    let tensors = tensors(export, layout, bundle, config)?;
    let mut checks = vec![tensors];
    if checks[0].problems.is_empty() {
        let plain = Plain::read(export, layout)?;
        let mut problems = Vec::new();
        let mut same = |key: &str, wanted: String, found: String| {
            if wanted != found {
                problems.push(Problem::ExportDiffers { key: key.to_owned(), wanted, found });
            }
        };
        same("captured layers", format!("{layers:?}"), format!("{:?}", plain.layers));
        let map = draft.vocab_map().map(|map| map.target_ids()).unwrap_or_default();
        let targets: Vec<i64> = map.iter().map(|id| i64::from(*id)).collect();
        same("target ids", summary(&targets), summary(&plain.targets));
        checks.push(line(
            "config",
            format!("{} layout: captured layers, target ids", layout.name()),
            problems,
        ));
        checks.push(numbers(bundle, config, &draft, &plain, kernels)?);
    } else {
        checks.extend(["config", "probe"].map(|name| skipped(name, "the tensors do not hold")));
    }
    Ok((layout, checks))
}

/// A list of ids short enough for a message: its length and its hash.
fn summary(ids: &[i64]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    format!("{} ids, sha256 {}", ids.len(), draftsmith_formats::hash::sha256_hex(bytes))
}

/// Every tensor there, none left over, all numbers the bundle's.
fn tensors(
    export: &Path,
    layout: Layout,
    bundle: &Path,
    config: &DraftConfig,
) -> Result<CheckLine, BundleError> {
    let weights = mxint8::open(bundle.join(WEIGHTS_FILE))?;
    let (entries, left) = inventory(export, layout)?;
    let mut problems: Vec<Problem> =
        left.into_iter().map(|name| Problem::TensorExtra { name, shape: Vec::new() }).collect();
    for entry in &entries {
        let wanted = entry.bundle.and_then(|name| weights.find(name));
        problems.extend(tensor_problem(entry, wanted, layout, config.shape().head_dim)?);
    }
    // A tensor of the bundle that the layout would have taken, had it been there.
    for spec in expected_tensors(&**config) {
        let missing = !entries.iter().any(|entry| entry.bundle == Some(spec.name.as_str()));
        if missing && let Some(name) = tensor_name(layout, &spec.name) {
            let (name, dtype) = (name.into_owned(), "BF16");
            problems.push(Problem::TensorMissing { name, dtype, shape: spec.shape });
        }
    }
    let detail = format!("{} tensors: names, types, shapes, every number", entries.len());
    Ok(line("tensors", detail, problems))
}

/// What is wrong with one tensor of an export. `wanted` is the bundle's; without one there is nothing to compare.
fn tensor_problem(
    entry: &Entry,
    wanted: Option<Tensor<'_>>,
    layout: Layout,
    head_dim: usize,
) -> Result<Option<Problem>, BundleError> {
    let name = || entry.name.to_owned();
    let Some(wanted) = wanted else {
        // Only RoPE divisors have no counterpart; the probe tells if they are wrong.
        let surplus = entry.stored.as_ref().filter(|_| entry.bundle.is_some());
        return Ok(surplus.map(|found| Problem::TensorExtra { name: name(), shape: found.shape.clone() }));
    };
    let dtype = match (entry.name, layout, wanted.shape) {
        ("d2t", ..) => "I64",
        ("t2d", ..) => "BOOL",
        (_, Layout::Gguf, [_]) => "F32",
        _ => "BF16",
    };
    let Some(Stored { dtype: found_dtype, shape, values }) = &entry.stored else {
        return Ok(Some(Problem::TensorMissing { name: name(), dtype, shape: wanted.shape.to_vec() }));
    };
    if found_dtype != dtype {
        return Ok(Some(Problem::TensorDtype { name: name(), wanted: dtype, found: found_dtype.clone() }));
    }
    if shape != wanted.shape {
        let (wanted, found) = (wanted.shape.to_vec(), shape.clone());
        return Ok(Some(Problem::TensorShape { name: name(), wanted, found }));
    }
    let own: Vec<f64> = match entry.name {
        "d2t" => {
            let from = |draft: usize| if layout == Layout::Gguf { draft as f64 } else { 0.0 };
            wanted.to_i64()?.into_iter().enumerate().map(|(draft, id)| id as f64 + from(draft)).collect()
        }
        "t2d" => wanted.to_bool()?.into_iter().map(|flag| f64::from(u8::from(flag))).collect(),
        _ => wanted.to_f32()?.into_iter().map(f64::from).collect(),
    };
    let columns = shape.last().copied().unwrap_or(1).max(1);
    let pairs = layout == Layout::Gguf && matches!(entry.name, "blk.0.attn_q.weight" | "blk.0.attn_k.weight");
    for (index, found) in values.iter().enumerate() {
        // Where this number stands in the bundle: llama.cpp's pair `(2 i, 2 i + 1)` is the bundle's `(i, i + hd / 2)`.
        let (row, column) = (index / columns, index % columns);
        let (first, in_head) = (row / head_dim * head_dim, row % head_dim);
        let from = if pairs { first + in_head / 2 + in_head % 2 * (head_dim / 2) } else { row };
        let wanted = own[from * columns + column];
        if wanted != *found {
            return Ok(Some(Problem::TensorDiffers { name: name(), index, wanted, found: *found }));
        }
    }
    Ok(None)
}

/// Hidden state and logits of the probes, by our network and by the export's.
fn numbers<K: Kernels>(
    bundle: &Path,
    config: &DraftConfig,
    draft: &Draft<K>,
    plain: &Plain,
    kernels: &K,
) -> Result<CheckLine, BundleError> {
    let probes = probe::from_file(&bundle.join(PROBE_FILE), &**config)?;
    if probes.iter().any(|p| p.input.embeddings.is_empty()) {
        return Ok(skipped("probe", "the bundle's probe has no embeddings"));
    }
    let mut problems = Vec::new();
    let mut worst_hidden = 0.0f32;
    for (index, probe) in probes.iter().enumerate() {
        let ours = hidden_state(kernels, draft, &probe.input)
            .map_err(|source| BundleError::Probe { index, source })?;
        let (hidden, _) = plain.answer(&probe.input);
        let (share, at) = difference(&ours, &hidden);
        worst_hidden = worst_hidden.max(share);
        if share > PROBE_TOLERANCE {
            let depth = probe.input.depth;
            let (wanted, found) = (ours[at], hidden[at]);
            problems.push(Problem::HiddenDiffers { probe: index, depth, index: at, wanted, found });
        }
    }
    let (worst, logits) = probe::run(&probes, &mut |question| Ok(plain.answer(question).1))?;
    problems.extend(logits);
    let detail = format!(
        "{} probes, largest difference {worst_hidden:.1e} of the hidden state, {worst:.1e} of the largest logit \
         (limit {PROBE_TOLERANCE:.0e})",
        probes.len()
    );
    Ok(line("probe", detail, problems))
}
