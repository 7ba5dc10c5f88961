//! `bundle.json`: what a bundle is, where it came from, and the hash of every other file in it.

use std::collections::BTreeSet;
use std::path::Path;

use draftsmith_formats::atomic;
pub use draftsmith_formats::bundle_files::{BUNDLE_FORMAT, FileEntry, MANIFEST_FILE, has_manifest};
use draftsmith_model::is_method;
use serde::{Deserialize, Serialize};

use crate::BundleError;
use crate::results::{MeasuredResult, Shape};

/// Newest version of the manifest that this crate reads and writes.
pub const BUNDLE_VERSION: u32 = 1;
/// Name of the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the draft's configuration.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the stored numeric probe.
pub const PROBE_FILE: &str = "probe.safetensors";

/// `bundle.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`BUNDLE_FORMAT`].
    pub format: String,
    /// Version of this layout.
    pub version: u32,
    /// Name of the draft.
    pub name: String,
    /// Kind of draft, as run files name it.
    pub method: String,
    /// Seconds since 1970, UTC.
    pub created_unix_s: u64,
    /// Version of the program that made it.
    pub draftsmith_version: String,
    /// SPDX expression of the weights' licence.
    pub license: String,
    /// The model it drafts for.
    pub target: TargetInfo,
    /// Shape of the draft.
    pub draft: DraftInfo,
    /// How it was trained.
    pub training: TrainingInfo,
    /// Where it comes from, if somebody else trained it: `training` is unknown then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<ImportedFrom>,
    /// What to run it with.
    pub recommended: Recommended,
    /// Every other file, sorted by path.
    pub files: Vec<FileEntry>,
}

/// The target, as it was during training.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetInfo {
    /// Name for people, `SmolLM2-135M-Instruct`.
    pub name: String,
    /// References that lead to it (`hf:`, `pip:`, path), best first.
    pub references: Vec<String>,
    /// Repository name on the Hugging Face hub, if it has one: model cards and other engines want it.
    pub hub_name: Option<String>,
    /// SPDX expression of its licence.
    pub license: String,
    /// Hash of its weights.
    pub weights_sha256: String,
    /// Hash of its tokenizer.
    pub tokenizer_sha256: String,
    /// Hash of its chat template.
    pub template_sha256: String,
    /// Width of its residual stream.
    pub hidden_size: u64,
    /// Its vocabulary.
    pub vocab_size: u64,
    /// Its decoder layers.
    pub num_layers: u64,
    /// Its longest context, if known.
    pub context_len: Option<u64>,
    /// Format of its weights, `Q4_1`.
    pub weight_format: String,
}

/// Shape of the draft.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DraftInfo {
    /// Width.
    pub hidden_size: u64,
    /// Ids that it can propose.
    pub draft_vocab_size: u64,
    /// Captured layers: 0-based, output of layer.
    pub target_layer_ids: Vec<u32>,
    /// Trained numbers (the embedding is the target's and not counted).
    pub parameters: u64,
    /// Type of the stored weights.
    pub dtype: String,
}

/// One source of training rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataInfo {
    /// Name or reference.
    pub name: String,
    /// Hash of the file.
    pub sha256: Option<String>,
    /// SPDX expressions of its rows' licences.
    pub licenses: Vec<String>,
    /// Rows used.
    pub rows: u64,
    /// Tokens of these rows.
    pub tokens: u64,
    /// Tokens that were trained on.
    pub trained_tokens: u64,
}

/// A draft that another one began with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BegunWith {
    /// What it is called.
    pub name: String,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
}

/// How the draft was trained.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingInfo {
    /// Where the rows came from.
    pub data: Vec<DataInfo>,
    /// True if the answers were written by the target itself.
    pub on_policy: bool,
    /// Optimiser steps up to the bundled checkpoint.
    pub steps: u64,
    /// Tokens that training read up to there, prompts and repeats counted. Bundles of before 2026-11-30 have the same number
    /// under a name that said too much.
    #[serde(alias = "trained_tokens_seen")]
    pub tokens_read: u64,
    /// Draft steps unrolled per position (training-time test), for a kind that is trained so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttt_length: Option<u32>,
    /// The draft whose weights it began with, if it began with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun_with: Option<BegunWith>,
    /// Largest learning rate.
    pub lr_peak: f64,
    /// Key of all randomness.
    pub seed: u64,
    /// How the checkpoint was chosen.
    pub chosen_by: String,
    /// Seconds of training, if known.
    pub wall_s: Option<f64>,
    /// Hash of the resolved run file.
    pub run_sha256: String,
}

/// Origin of a draft that was not trained here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportedFrom {
    /// What the user called it.
    pub reference: String,
    /// The layout it was in.
    pub layout: String,
    /// Hash of its weights there.
    pub weights_sha256: String,
}

/// The setting that measured best.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recommended {
    /// Draft steps per proposal.
    pub depth: u32,
    /// Candidates per node; 1 is a chain.
    pub top_k: u32,
    /// Draft tokens per proposal.
    pub num_draft_tokens: u32,
    /// Why, in a few words with the number.
    pub because: String,
    /// False if it measured slower than target-only decoding: then nothing is recommended, and the setting is only the
    /// best of those tried.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub pays: bool,
    /// What `bench tune` found to be fastest for one sequence; what decodes here when nobody says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Tuned>,
    /// Whether the draft is worth using where its run measured it, and what limited it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

/// The fastest setting of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// How it drafts.
    pub drafting: TunedDrafting,
    /// Where and against what it was measured, with the numbers.
    pub because: String,
}

/// A way to draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "shape", rename_all = "snake_case", deny_unknown_fields)]
pub enum TunedDrafting {
    /// Not at all: nothing was faster than the target alone.
    Plain,
    /// As much as pays.
    Auto,
    /// A list of tokens.
    Chain {
        /// Tokens per proposal.
        depth: u32,
    },
    /// A tree.
    Tree {
        /// Levels.
        depth: u32,
        /// Candidates per node.
        top_k: u32,
        /// Nodes kept.
        num_draft_tokens: u32,
    },
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

impl Recommended {
    /// The setting with the largest measured speedup (geometric mean over workloads; of equals the shorter one);
    /// `None` if no setting of fixed shape was measured on every workload.
    pub fn measured(results: &[MeasuredResult]) -> Option<Recommended> {
        let workloads: BTreeSet<&str> = results.iter().map(|r| r.workload.as_str()).collect();
        let mean = |shape, value| mean(results, &workloads, shape, value);
        let speedup = |r: &MeasuredResult| r.speedup.map(|m| m.value);
        let shapes: BTreeSet<Shape> = results.iter().filter_map(|r| r.shape).collect();
        let scored = shapes.iter().filter_map(|shape| Some((mean(Some(*shape), speedup)?, *shape)));
        let (best, shape) = scored.reduce(|best, other| if other.0 > best.0 { other } else { best })?;
        let accept_len = mean(Some(shape), |r| r.accept_len.map(|m| m.value));
        let pays = best >= 1.0;
        let mut because = format!(
            "{} measured on {}{}: {best:.2}x over target-only decoding",
            match shapes.len() {
                1 => "the only fixed setting".to_owned(),
                n => format!("best of {n} fixed settings"),
            },
            workloads.iter().copied().collect::<Vec<_>>().join(", "),
            if workloads.len() > 1 { " (geometric means)" } else { "" },
        );
        if let Some(accept_len) = accept_len {
            because.push_str(&format!(", accept length {accept_len:.2}"));
            if !pays {
                because.push_str(&format!(
                    ": a verify step commits {accept_len:.2} tokens and takes as long as {:.2} plain steps",
                    accept_len / best
                ));
            }
        }
        if let Some(automatic) = mean(None, speedup) {
            because.push_str(&format!("; automatic drafting {automatic:.2}x"));
        }
        let Shape { depth, top_k, num_draft_tokens } = shape;
        Some(Recommended { depth, top_k, num_draft_tokens, because, pays, tuned: None, verdict: None })
    }

    /// Geometric mean over the workloads of what automatic drafting gained; `None` if one was not measured with it.
    pub fn automatic_speedup(results: &[MeasuredResult]) -> Option<f64> {
        let workloads: BTreeSet<&str> = results.iter().map(|r| r.workload.as_str()).collect();
        mean(results, &workloads, None, |r| r.speedup.map(|m| m.value))
    }

    /// A chain.
    pub fn chain(depth: u32, because: impl Into<String>) -> Recommended {
        let because = because.into();
        Recommended {
            depth,
            top_k: 1,
            num_draft_tokens: depth,
            because,
            pays: true,
            tuned: None,
            verdict: None,
        }
    }
}

/// Geometric mean over all workloads of one way to draft.
fn mean(
    results: &[MeasuredResult],
    workloads: &BTreeSet<&str>,
    shape: Option<Shape>,
    value: fn(&MeasuredResult) -> Option<f64>,
) -> Option<f64> {
    let logs: Option<Vec<f64>> = workloads
        .iter()
        .map(|name| {
            let of = |r: &&MeasuredResult| r.workload == *name && r.shape == shape;
            results.iter().find(of).and_then(value).map(f64::ln)
        })
        .collect();
    let logs = logs.filter(|logs| !logs.is_empty())?;
    Some((logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

impl Manifest {
    /// Reads `bundle.json` of a folder.
    ///
    /// # Errors
    /// [`BundleError::NoManifest`], [`BundleError::Version`], [`BundleError::Manifest`] with file and line.
    pub fn read(dir: impl AsRef<Path>) -> Result<Manifest, BundleError> {
        let dir = dir.as_ref();
        let path = dir.join(MANIFEST_FILE);
        if !path.is_file() {
            return Err(BundleError::NoManifest { path: dir.to_owned() });
        }
        let bad = |problem: String| BundleError::Manifest { path: path.clone(), problem };
        let bytes = atomic::read(&path)?;
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if value.get("format").and_then(|f| f.as_str()) != Some(BUNDLE_FORMAT) {
            return Err(bad(format!("`format` is not `{BUNDLE_FORMAT}`")));
        }
        let found = value.get("version").and_then(|v| v.as_u64()).unwrap_or(0);
        if found == 0 || found > u64::from(BUNDLE_VERSION) {
            return Err(BundleError::Version { path, found, supported: BUNDLE_VERSION });
        }
        // From the text again, so that a wrong key is told with its line.
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if !is_method(&manifest.method) {
            return Err(bad(format!("method `{}` is not known here", manifest.method)));
        }
        Ok(manifest)
    }

    /// The manifest as JSON text.
    pub fn to_json(&self) -> Result<String, BundleError> {
        let mut text = serde_json::to_string_pretty(self).map_err(|source| BundleError::Json { source })?;
        text.push('\n');
        Ok(text)
    }
}
