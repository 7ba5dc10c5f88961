//! The bench record: raw samples, counts, settings, hashes, machine. Every summary is derived from it, so that a
//! stranger can derive it again.
//!
//! Times are integers of nanoseconds; counts are never divided here; nothing is estimated.

use draftsmith_core::AcceptStats;
use serde::{Deserialize, Serialize};

use crate::BenchError;

/// First field of a record file.
pub const RECORD_FORMAT: &str = "draftsmith-bench-record";
/// Newest version of the record that this crate reads and writes.
pub const RECORD_VERSION: u32 = 1;

/// What one measuring run of one workload saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Always [`RECORD_FORMAT`].
    pub format: String,
    /// Version of this layout.
    pub version: u32,
    /// Seconds since 1970, UTC, when the first sample began.
    pub created_unix_s: u64,
    /// Version of the program that measured.
    pub draftsmith_version: String,
    /// The rows that were run.
    pub workload: WorkloadInfo,
    /// The model that was made faster.
    pub target: ArtifactInfo,
    /// What drafted.
    pub draft: ArtifactInfo,
    /// How it was run.
    pub settings: Settings,
    /// Where it was run.
    pub machine: Machine,
    /// What an automatic plan decided by; `None` for fixed plans and in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub costs: Option<CostsInfo>,
    /// True if the caller stopped before the last row.
    pub stopped_early: bool,
    /// Rows left out, with the reason.
    pub skipped: Vec<Skipped>,
    /// One entry per row, turn and repeat, in the order of measuring.
    pub samples: Vec<Sample>,
}

/// Where rows came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadInfo {
    /// Name in tables.
    pub name: String,
    /// Hash of the workload file as stored.
    pub sha256: String,
    /// Rows in that file.
    pub rows_total: u64,
    /// Rows asked for (after `--limit`).
    pub rows_wanted: u64,
}

/// A model file or folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArtifactInfo {
    /// Name for people.
    pub name: String,
    /// Hash of its weights, if it has any.
    pub sha256: Option<String>,
    /// Method for a draft (`eagle3`), weight format for a target (`Q4_1`).
    pub kind: String,
    /// Of a draft: hash of the target's weights that it was trained beside, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_beside: Option<String>,
}

/// How the drafter proposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "shape", rename_all = "snake_case", deny_unknown_fields)]
pub enum Drafting {
    /// A list of `depth` tokens.
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
    /// Draft and repetitions of the text, as much of each as pays by measured costs.
    Auto,
}

impl Drafting {
    /// Shortest form, for names of rows: `chain 5`, `tree 5×4/16`.
    pub fn short_label(&self) -> String {
        match self {
            Drafting::Auto => "auto".to_owned(),
            Drafting::Chain { depth } => format!("chain {depth}"),
            Drafting::Tree { depth, top_k, num_draft_tokens } => {
                format!("tree {depth}×{top_k}/{num_draft_tokens}")
            }
        }
    }

    /// In words.
    pub fn label(&self) -> String {
        match self {
            Drafting::Auto => "as much as pays".to_owned(),
            Drafting::Chain { depth } => format!("chain, depth {depth}"),
            Drafting::Tree { depth, top_k, num_draft_tokens } => {
                format!("tree, depth {depth}, top-k {top_k}, {num_draft_tokens} tokens")
            }
        }
    }
}

/// Everything that changes the numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Limit of an answer.
    pub max_new_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// Key of the noise.
    pub seed: u64,
    /// Rule of a verification that gives the target's distribution and not the same text, `rejection` or `block`; the
    /// outputs of both sides are two draws then. `None`: the texts are to be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<String>,
    /// How the drafter proposes.
    pub drafting: Drafting,
    /// Worker threads of the engine.
    pub threads: u32,
    /// Runs of each prompt and side.
    pub repeats: u32,
    /// Tokens decoded per side before the first sample.
    pub warmup_tokens: u32,
}

/// The machine, as the caller describes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Processor name.
    pub cpu: String,
    /// Instruction sets that the kernels use.
    pub cpu_features: Vec<String>,
    /// Logical processors.
    pub logical_cpus: u32,
    /// Memory in bytes, if known.
    pub memory_bytes: Option<u64>,
    /// Operating system and architecture, `linux x86_64`.
    pub os: String,
    /// Mean number of runnable tasks in the minute before the first sample, if known. Our own work is in it, so it
    /// is looked at only where `others_busy_share` is not known.
    pub load_average_1m: Option<f64>,
    /// Share of all processors that other programs used while measuring, 0 to 1, if known.
    #[serde(default)]
    pub others_busy_share: Option<f64>,
    /// What target and draft ran on, if not on the processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceInfo>,
}

impl Machine {
    /// What it was computed on, as a line of a text; nothing for the processor.
    pub fn device_line(&self) -> String {
        self.device.as_ref().map_or_else(String::new, |device| format!("computed on {}\n", device.text()))
    }
}

/// A device beside the processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceInfo {
    /// As it is asked for: `cuda`, `cuda:1`.
    pub name: String,
    /// What it calls itself.
    pub card: String,
    /// Compute capability.
    pub capability: String,
    /// The CUDA that its driver knows.
    pub driver: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Whether a row's result depends, by how its kernels are made, on nothing else in the step: then texts are the same with and
    /// without a draft by rule; otherwise where they are, that is an observation.
    pub row_exact: bool,
}

impl DeviceInfo {
    /// One line for people.
    pub fn text(&self) -> String {
        format!("{} ({}, compute {}, driver for CUDA {})", self.name, self.card, self.capability, self.driver)
    }
}

/// What passes cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassCosts {
    /// Target passes: rows and milliseconds, by rows ascending.
    pub verify_ms: Vec<(u32, f32)>,
    /// One more draft step.
    pub draft_step_ms: f32,
    /// What each further row adds to it.
    #[serde(default)]
    pub draft_row_ms: f32,
    /// Taking a step into the draft, with its first proposals.
    pub extend_ms: f32,
    /// What each further sequence adds to that.
    #[serde(default)]
    pub extend_row_ms: f32,
    /// Taking in a position that had to wait, among many.
    #[serde(default)]
    pub read_row_ms: f32,
}

/// Costs that an automatic plan was made by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostsInfo {
    /// Seconds since 1970, UTC, when they were measured; `None` if they were not kept.
    pub measured_unix_s: Option<u64>,
    /// Share of all processors that others used meanwhile, if known.
    pub others_busy_share: Option<f64>,
    /// How far passes of one size lay apart: the middle one above the fastest, as a share.
    pub spread: Option<f32>,
    /// As measured.
    pub measured: PassCosts,
    /// As the steps corrected them by the end of the run.
    pub corrected: PassCosts,
}

impl CostsInfo {
    /// One line per curve.
    pub fn text(&self) -> String {
        let curve = |costs: &PassCosts| {
            let points: Vec<String> =
                costs.verify_ms.iter().map(|(rows, ms)| format!("{rows}: {ms:.1}")).collect();
            format!(
                "{} ms, draft step {:.2}, extend {:.2}",
                points.join(", "),
                costs.draft_step_ms,
                costs.extend_ms
            )
        };
        let date = self.measured_unix_s.map_or_else(|| "not kept".to_owned(), crate::report::utc);
        let busy =
            self.others_busy_share.map_or_else(|| "unknown".to_owned(), |s| format!("{:.0} %", s * 100.0));
        let spread = self.spread.map_or_else(|| "unknown".to_owned(), |s| format!("{:.0} %", s * 100.0));
        format!(
            "costs measured  {}; {date}, others busy {busy}, spread {spread}\ncosts corrected {}\n",
            curve(&self.measured),
            curve(&self.corrected)
        )
    }
}

/// A row that was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Row.
    pub id: String,
    /// 0-based turn.
    pub turn: u32,
    /// Why.
    pub reason: String,
}

/// Which side went first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Target-only decoding, then speculation.
    PlainFirst,
    /// Speculation, then target-only decoding.
    SpecFirst,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token was chosen.
    Stop,
    /// The length limit was reached.
    Length,
    /// The caller cancelled.
    Cancelled,
}

/// One prompt, both ways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Row.
    pub id: String,
    /// 0-based turn.
    pub turn: u32,
    /// 0-based repeat.
    pub repeat: u32,
    /// Which side went first.
    pub order: Order,
    /// Nanoseconds from the start of the measurement to the start of this sample.
    pub start_ns: u64,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Target-only decoding.
    pub plain: Side,
    /// Speculative decoding.
    pub spec: Side,
    /// Verify counts of the speculative side.
    pub accept: Accept,
    /// True if both sides gave the same tokens.
    pub identical: bool,
    /// First index at which they differ.
    pub first_difference: Option<u32>,
}

/// Time and size of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Side {
    /// Tokens of the answer.
    pub tokens: u32,
    /// Tokens of the answer that the decode time covers (the prefill yields the others).
    pub decode_tokens: u32,
    /// Prompt processing.
    pub prefill_ns: u64,
    /// From the end of the prefill to the last token.
    pub decode_ns: u64,
    /// Why the answer ended.
    pub finish: Finish,
}

/// [`AcceptStats`] as stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// Target passes that verified a proposal.
    pub verify_steps: u64,
    /// Tokens committed by them, the target's own included.
    pub committed_tokens: u64,
    /// Draft tokens offered.
    pub proposed_drafts: u64,
    /// Draft tokens committed.
    pub accepted_drafts: u64,
    /// Steps whose proposal reached each depth.
    pub proposals_at: Vec<u64>,
    /// Steps that committed a draft token at each depth.
    pub accepted_at: Vec<u64>,
}

impl From<&AcceptStats> for Accept {
    fn from(stats: &AcceptStats) -> Accept {
        Accept {
            verify_steps: stats.verify_steps,
            committed_tokens: stats.committed_tokens,
            proposed_drafts: stats.proposed_drafts,
            accepted_drafts: stats.accepted_drafts,
            proposals_at: stats.proposals_at.clone(),
            accepted_at: stats.accepted_at.clone(),
        }
    }
}

impl From<&Accept> for AcceptStats {
    fn from(stored: &Accept) -> AcceptStats {
        AcceptStats {
            verify_steps: stored.verify_steps,
            committed_tokens: stored.committed_tokens,
            proposed_drafts: stored.proposed_drafts,
            accepted_drafts: stored.accepted_drafts,
            proposals_at: stored.proposals_at.clone(),
            accepted_at: stored.accepted_at.clone(),
        }
    }
}

impl Record {
    /// Reads a record and checks what its numbers rely on; `name` is used in errors.
    pub fn from_json(name: &str, text: &str) -> Result<Record, BenchError> {
        let bad = |problem: String| BenchError::Record { name: name.to_owned(), problem };
        // The version is looked at before anything else, so that a later layout is named as such.
        let value: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        if value.get("format").and_then(|f| f.as_str()) != Some(RECORD_FORMAT) {
            return Err(bad(format!("its `format` is not `{RECORD_FORMAT}`")));
        }
        let version = value.get("version").and_then(|v| v.as_u64()).unwrap_or(0);
        if version == 0 || version > u64::from(RECORD_VERSION) {
            return Err(BenchError::RecordVersion {
                name: name.to_owned(),
                found: u32::try_from(version).unwrap_or(u32::MAX),
                supported: RECORD_VERSION,
            });
        }
        let record: Record = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
        record.validate().map_err(bad)?;
        Ok(record)
    }

    /// The record as JSON text, readable and stable in order.
    pub fn to_json(&self) -> Result<String, BenchError> {
        let mut text = serde_json::to_string_pretty(self).map_err(|source| BenchError::Json { source })?;
        text.push('\n');
        Ok(text)
    }

    fn validate(&self) -> Result<(), String> {
        for sample in &self.samples {
            let accept = &sample.accept;
            let place = format!("sample `{}` turn {}", sample.id, sample.turn);
            if accept.proposals_at.len() != accept.accepted_at.len() {
                return Err(format!("{place}: `proposals_at` and `accepted_at` differ in length"));
            }
            if accept
                .accepted_at
                .iter()
                .zip(&accept.proposals_at)
                .any(|(a, p)| a > p || *p > accept.verify_steps)
            {
                return Err(format!("{place}: more accepted than proposed at some depth"));
            }
            if accept.committed_tokens < accept.verify_steps {
                return Err(format!("{place}: fewer committed tokens than verify steps"));
            }
            if sample.identical != sample.first_difference.is_none() {
                return Err(format!("{place}: `identical` and `first_difference` disagree"));
            }
        }
        Ok(())
    }
}
