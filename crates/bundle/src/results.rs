//! What was measured with a draft, for the tables of its bundle.

use serde::{Deserialize, Serialize};

/// A proposal of fixed shape; ordered from short to long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Draft steps per proposal.
    pub depth: u32,
    /// Draft tokens per proposal.
    pub num_draft_tokens: u32,
    /// Candidates per node; 1 is a chain.
    pub top_k: u32,
}

/// A value with the ends of its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The value.
    pub value: f64,
    /// `[low, high]`, if there were rows enough.
    pub ci95: Option<[f64; 2]>,
}

/// One measured workload, for the tables; the record behind it is stored beside.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredResult {
    /// Workload.
    pub workload: String,
    /// How it was drafted, `chain, depth 5`.
    pub drafting: String,
    /// The same in numbers; `None` if it was not fixed.
    pub shape: Option<Shape>,
    /// How tokens were chosen, `greedy`.
    pub sampling: String,
    /// Rows measured.
    pub rows: u64,
    /// Outputs compared.
    pub samples: u64,
    /// Outputs equal to target-only decoding.
    pub identical_samples: u64,
    /// Verify steps.
    pub verify_steps: u64,
    /// Committed tokens per verify step.
    pub accept_len: Option<Measured>,
    /// Accepted / proposed per depth.
    pub accept_rate_at: Vec<f64>,
    /// Target-only decoding.
    pub plain_tokens_per_s: Option<f64>,
    /// Speculative decoding.
    pub spec_tokens_per_s: Option<f64>,
    /// Over target-only decoding.
    pub speedup: Option<Measured>,
    /// What the speedup is relative to, in words.
    pub baseline: String,
    /// Machine and threads, in words.
    pub machine: String,
    /// Reasons not to trust the numbers.
    pub doubts: Vec<String>,
    /// The raw record.
    pub record_json: String,
}

/// A distinct file name for each record: the workload's name, numbered where several settings were measured.
pub(crate) fn record_files(results: &[MeasuredResult]) -> Vec<(String, &String)> {
    let mut taken = std::collections::BTreeSet::new();
    results
        .iter()
        .map(|result| {
            let stem: String = result
                .workload
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' })
                .collect();
            let mut name = format!("{stem}.json");
            let mut n = 2;
            while !taken.insert(name.clone()) {
                name = format!("{stem}-{n}.json");
                n += 1;
            }
            (name, &result.record_json)
        })
        .collect()
}
