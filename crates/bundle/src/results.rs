//! What was measured with a draft, for the tables of its bundle.

use std::collections::BTreeSet;

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

/// What a draft gained with the way to draft that gained most.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Headline {
    /// Over target-only decoding: geometric mean over the workloads.
    pub speedup: f64,
    /// Committed tokens per verify step, likewise.
    pub accept_len: Option<f64>,
    /// How it was drafted, `chain, depth 1`.
    pub drafting: String,
    /// Workloads, by name.
    pub workloads: Vec<String>,
    /// Every compared text was that of the target alone.
    pub identical: bool,
    /// Machine and threads, in words.
    pub machine: String,
    /// Reasons not to trust the number, each with its workload.
    #[serde(default)]
    pub doubts: Vec<String>,
    /// The records behind it, as the bundle's folder `results` holds them.
    pub records: Vec<String>,
}

impl Headline {
    /// The largest speedup of the ways to draft that were measured on every workload; `None` if there is none.
    pub fn of(results: &[MeasuredResult]) -> Option<Headline> {
        let workloads: BTreeSet<&str> = results.iter().map(|r| r.workload.as_str()).collect();
        let ways: BTreeSet<&str> = results.iter().map(|r| r.drafting.as_str()).collect();
        let files = record_files(results);
        let mean = |values: Option<Vec<f64>>| {
            let values = values.filter(|values| !values.is_empty())?;
            Some((values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp())
        };
        let scored = ways.iter().filter_map(|way| {
            // Of several records of one workload the first counts, as in the recommendation.
            let of = |name: &str| results.iter().position(|r| r.workload == name && r.drafting == *way);
            let found: Vec<usize> = workloads.iter().map(|name| of(name)).collect::<Option<_>>()?;
            let one = |value: fn(&MeasuredResult) -> Option<Measured>| {
                mean(found.iter().map(|i| value(&results[*i]).map(|m| m.value)).collect())
            };
            Some(Headline {
                speedup: one(|r| r.speedup)?,
                accept_len: one(|r| r.accept_len),
                drafting: (*way).to_string(),
                workloads: workloads.iter().map(|name| (*name).to_string()).collect(),
                identical: found.iter().all(|i| results[*i].identical_samples == results[*i].samples),
                machine: results[*found.first()?].machine.clone(),
                doubts: found
                    .iter()
                    .map(|i| &results[*i])
                    .flat_map(|r| r.doubts.iter().map(|doubt| format!("{}: {doubt}", r.workload)))
                    .collect(),
                records: found.iter().map(|i| format!("results/{}", files[*i].0)).collect(),
            })
        });
        scored.reduce(|best, other| if other.speedup > best.speedup { other } else { best })
    }
}

/// A distinct file name for each record: the workload's name, numbered where several settings were measured.
pub(crate) fn record_files(results: &[MeasuredResult]) -> Vec<(String, &String)> {
    let mut taken = BTreeSet::new();
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
