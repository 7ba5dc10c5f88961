//! Summaries of records: what tables, reports and the command-line contract show. One function derives them all.

use draftsmith_core::AcceptStats;
use serde::Serialize;

use crate::doubts::{Doubt, doubts};
use crate::record::{Machine, Record};
use crate::stats::{Estimate, Interval, percentile, product, ratio};

/// What every speedup here is relative to.
pub const BASELINE: &str = "target-only decoding, same session, interleaved";

/// Numbers of one workload, or of several together.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Name of the workload, or `total`; with the drafting where several are compared.
    pub name: String,
    /// True if several workloads are summed.
    pub is_total: bool,
    /// Rows with at least one sample.
    pub rows: usize,
    /// Samples: rows times turns times repeats.
    pub samples: usize,
    /// Counts over all rows, first repeat only (repeats give the same counts).
    pub accept: AcceptStats,
    /// Committed tokens per verify step.
    pub accept_len: Option<Estimate>,
    /// Per depth: accepted / proposals that reached it.
    pub accept_rate_at: Vec<Estimate>,
    /// Per depth: accepted given that the depth before was.
    pub cond_accept_rate_at: Vec<Option<Estimate>>,
    /// Accept length of each row.
    pub row_accept_lens: Vec<f64>,
    /// Target-only decoding, tokens per second of decode time.
    pub plain_tokens_per_s: Option<Estimate>,
    /// Speculative decoding, tokens per second of decode time.
    pub spec_tokens_per_s: Option<Estimate>,
    /// Decode time per token, target-only / speculative. Baseline: [`BASELINE`].
    pub speedup: Option<Estimate>,
    /// The same with the prefill in both times: what a waiting user feels.
    pub speedup_with_prefill: Option<Estimate>,
    /// Samples whose outputs are equal token by token.
    pub identical_samples: usize,
    /// Rule by which outputs are drawn anew instead of being the same, if there is one.
    pub verify: Option<String>,
    /// Reasons not to trust the above.
    pub doubts: Vec<Doubt>,
}

impl Summary {
    /// True if every output equals target-only decoding.
    pub fn identical(&self) -> bool {
        self.identical_samples == self.samples
    }

    /// Percentile of the rows' accept lengths.
    pub fn row_accept_len_percentile(&self, p: f64) -> Option<f64> {
        percentile(&self.row_accept_lens, p)
    }
}

/// Sums over the samples of one row.
#[derive(Default)]
struct Row {
    accept: AcceptStats,
    plain_ns: f64,
    plain_tokens: f64,
    spec_ns: f64,
    spec_tokens: f64,
    plain_total_ns: f64,
    plain_total_tokens: f64,
    spec_total_ns: f64,
    spec_total_tokens: f64,
}

/// Summary of one record.
pub fn summarize(record: &Record) -> Summary {
    summary(&record.workload.name, &[record], doubts(record))
}

/// Summaries for tables and reports: one per record, then the total of each setting that has several records.
///
/// Records of different drafting or sampling are never summed; their setting then becomes part of the name.
pub fn summarize_each(records: &[Record]) -> Vec<Summary> {
    let groups = groups(records);
    let mut out = Vec::new();
    for (label, members) in &groups {
        let named =
            |name: &str| if groups.len() > 1 { format!("{name} · {label}") } else { name.to_owned() };
        for record in members {
            let mut one = summarize(record);
            one.name = named(&one.name);
            out.push(one);
        }
        if members.len() > 1 {
            let mut total = summarize_refs(members);
            total.name = named(&total.name);
            out.push(total);
        }
    }
    out
}

/// The summary to put first: all records together, or of several settings the one with the largest speedup.
/// `None` of nothing.
pub fn headline(records: &[Record]) -> Option<(String, Summary)> {
    let totals = groups(records).into_iter().map(|(label, members)| {
        let one = if members.len() == 1 { summarize(members[0]) } else { summarize_refs(&members) };
        (label, one)
    });
    let value = |s: &Summary| s.speedup.map_or(f64::NEG_INFINITY, |e| e.value);
    totals.max_by(|a, b| value(&a.1).total_cmp(&value(&b.1)))
}

/// What to do where no setting was faster than the target alone, and what limited the fastest one; `None` if one was
/// faster, or nothing was measured.
pub fn advice_against(records: &[Record]) -> Option<String> {
    let (setting, best) = headline(records)?;
    let speedup = best.speedup?.value;
    if speedup >= 1.0 {
        return None;
    }
    let limit =
        best.accept_len.map(|e| e.value).filter(|_| speedup > 0.0).map_or_else(String::new, |length| {
            format!(
                ": a verify step commits {length:.2} tokens and takes as long as {:.2} plain steps",
                length / speedup
            )
        });
    if groups(records).len() == 1 && setting != "auto" {
        // Another one may pay: nothing is known of them.
        return Some(format!(
            "not with {setting}, the only setting tried: it reached {speedup:.2}x of target-only decoding{limit}; `--auto` \
             drafts as much as pays, and `bench tune` tries the others"
        ));
    }
    Some(format!(
        "decode without the draft here: the fastest setting ({setting}) reached {speedup:.2}x of target-only decoding{limit}"
    ))
}

/// Records by setting, in order of appearance.
fn groups(records: &[Record]) -> Vec<(String, Vec<&Record>)> {
    let mut groups: Vec<(String, Vec<&Record>)> = Vec::new();
    for record in records {
        let settings = &record.settings;
        let mut label = settings.drafting.short_label();
        if settings.temperature > 0.0 {
            label.push_str(&format!(", T {}", settings.temperature));
        }
        match groups.iter_mut().find(|(l, _)| *l == label) {
            Some((_, members)) => members.push(record),
            None => groups.push((label, vec![record])),
        }
    }
    groups
}

/// Summary of several records together, named `total`; doubts are those of the records, each named once.
pub fn summarize_all(records: &[Record]) -> Summary {
    summarize_refs(&records.iter().collect::<Vec<_>>())
}

fn summarize_refs(records: &[&Record]) -> Summary {
    let mut all: Vec<Doubt> = Vec::new();
    for record in records {
        for doubt in doubts(record) {
            // A small workload is no doubt about the total if all together have rows enough.
            if !matches!(doubt, Doubt::TooFewSamples { .. }) && !all.contains(&doubt) {
                all.push(doubt);
            }
        }
    }
    let mut total = summary("total", records, all);
    total.is_total = true;
    if total.rows < crate::doubts::ROWS_WANTED {
        total.doubts.push(Doubt::TooFewSamples { rows: total.rows, wanted: crate::doubts::ROWS_WANTED });
    }
    total
}

fn summary(name: &str, records: &[&Record], doubts: Vec<Doubt>) -> Summary {
    let mut rows: Vec<Row> = Vec::new();
    let mut samples = 0;
    let mut identical_samples = 0;
    for record in records {
        let mut index = std::collections::HashMap::new();
        for sample in &record.samples {
            let at = *index.entry(sample.id.as_str()).or_insert_with(|| {
                rows.push(Row::default());
                rows.len() - 1
            });
            let row = &mut rows[at];
            samples += 1;
            identical_samples += usize::from(sample.identical);
            if sample.repeat == 0 {
                row.accept.add(&AcceptStats::from(&sample.accept));
            }
            // A side without decoded tokens has no rate; then neither side of this sample is counted.
            if sample.plain.decode_tokens > 0 && sample.spec.decode_tokens > 0 {
                row.plain_ns += sample.plain.decode_ns as f64;
                row.plain_tokens += f64::from(sample.plain.decode_tokens);
                row.spec_ns += sample.spec.decode_ns as f64;
                row.spec_tokens += f64::from(sample.spec.decode_tokens);
            }
            row.plain_total_ns += sample.plain.prefill_ns as f64 + sample.plain.decode_ns as f64;
            row.plain_total_tokens += f64::from(sample.plain.tokens);
            row.spec_total_ns += sample.spec.prefill_ns as f64 + sample.spec.decode_ns as f64;
            row.spec_total_tokens += f64::from(sample.spec.tokens);
        }
    }
    let mut accept = AcceptStats::default();
    rows.iter().for_each(|row| accept.add(&row.accept));
    let at = |counts: &[u64], i: usize| counts.get(i).copied().unwrap_or(0) as f64;
    let accept_rate_at = (0..accept.proposals_at.len())
        .filter_map(|i| {
            let pairs: Vec<_> =
                rows.iter().map(|r| (at(&r.accept.accepted_at, i), at(&r.accept.proposals_at, i))).collect();
            ratio(&pairs).map(within_0_and_1)
        })
        .collect();
    let cond_accept_rate_at = (0..accept.proposals_at.len())
        .map(|i| {
            let reached = |r: &Row| match i {
                0 => at(&r.accept.proposals_at, 0),
                _ => at(&r.accept.accepted_at, i - 1),
            };
            let pairs: Vec<_> = rows.iter().map(|r| (at(&r.accept.accepted_at, i), reached(r))).collect();
            ratio(&pairs).map(within_0_and_1)
        })
        .collect();
    let per_row = |f: &dyn Fn(&Row) -> [f64; 4]| rows.iter().map(f).collect::<Vec<_>>();
    let rate = |f: &dyn Fn(&Row) -> [f64; 2]| {
        product(&rows.iter().map(f).collect::<Vec<_>>(), [1.0, -1.0]).map(|e| scaled(e, 1e9))
    };
    Summary {
        name: name.to_owned(),
        is_total: false,
        rows: rows.len(),
        samples,
        accept_len: ratio(
            &rows
                .iter()
                .map(|r| (r.accept.committed_tokens as f64, r.accept.verify_steps as f64))
                .collect::<Vec<_>>(),
        ),
        accept_rate_at,
        cond_accept_rate_at,
        row_accept_lens: rows.iter().filter_map(|r| r.accept.accept_len()).collect(),
        plain_tokens_per_s: rate(&|r| [r.plain_tokens, r.plain_ns]),
        spec_tokens_per_s: rate(&|r| [r.spec_tokens, r.spec_ns]),
        speedup: product(
            &per_row(&|r| [r.plain_ns, r.plain_tokens, r.spec_ns, r.spec_tokens]),
            [1.0, -1.0, -1.0, 1.0],
        ),
        speedup_with_prefill: product(
            &per_row(&|r| [r.plain_total_ns, r.plain_total_tokens, r.spec_total_ns, r.spec_total_tokens]),
            [1.0, -1.0, -1.0, 1.0],
        ),
        accept,
        identical_samples,
        verify: records.iter().find_map(|record| record.settings.verify.clone()),
        doubts,
    }
}

fn scaled(e: Estimate, factor: f64) -> Estimate {
    let interval = e.interval.map(|i| Interval { low: i.low * factor, high: i.high * factor });
    Estimate { value: e.value * factor, interval, rows: e.rows }
}

/// A share cannot leave 0..=1, however few rows there are.
fn within_0_and_1(e: Estimate) -> Estimate {
    let interval = e.interval.map(|i| Interval { low: i.low.max(0.0), high: i.high.min(1.0) });
    Estimate { interval, ..e }
}

/// `OUT.json` of `bench` [design §11]: the fixed keys first, then what weakens or explains them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contract {
    /// Committed tokens per verify step; `null` before the first step.
    pub accept_len: Option<f64>,
    /// Per depth: accepted / proposals that reached it.
    pub accept_rate_at: Vec<f64>,
    /// Target passes that verified a proposal.
    pub verify_steps: u64,
    /// Tokens committed by them.
    pub committed_tokens: u64,
    /// Target-only decoding.
    pub plain_tokens_per_s: Option<f64>,
    /// Speculative decoding.
    pub spec_tokens_per_s: Option<f64>,
    /// Decode time per token, target-only / speculative.
    pub speedup: Option<f64>,
    /// True if every output equals target-only decoding.
    pub identical: bool,
    /// Rows measured.
    pub rows: usize,
    /// Reasons not to trust the numbers.
    pub doubts: Vec<Doubt>,
    /// Where they were taken.
    pub machine: Machine,
    /// What the speedup is relative to.
    pub speedup_baseline: &'static str,
    /// 95 % interval over rows, `[low, high]`.
    pub accept_len_ci95: Option<[f64; 2]>,
    /// 95 % interval over rows, `[low, high]`.
    pub speedup_ci95: Option<[f64; 2]>,
    /// Speedup with the prefill in both times.
    pub speedup_with_prefill: Option<f64>,
    /// Per depth: accepted given that the depth before was.
    pub cond_accept_rate_at: Vec<Option<f64>>,
    /// Rows times turns times repeats.
    pub samples: usize,
    /// Samples whose outputs are equal.
    pub identical_samples: usize,
    /// Names of the workloads.
    pub workloads: Vec<String>,
}

impl Contract {
    /// The contract of one record.
    pub fn new(record: &Record) -> Contract {
        contract(&summarize(record), vec![record.workload.name.clone()], &record.machine)
    }

    /// The contract of several records together; `None` of nothing. The machine is that of the first.
    pub fn of_all(records: &[Record]) -> Option<Contract> {
        let machine = &records.first()?.machine;
        let names = records.iter().map(|r| r.workload.name.clone()).collect();
        Some(contract(&summarize_all(records), names, machine))
    }
}

fn contract(summary: &Summary, workloads: Vec<String>, machine: &Machine) -> Contract {
    let value = |e: &Option<Estimate>| e.map(|e| e.value);
    let interval = |e: &Option<Estimate>| e.and_then(|e| e.interval).map(|i| [i.low, i.high]);
    Contract {
        accept_len: value(&summary.accept_len),
        accept_rate_at: summary.accept_rate_at.iter().map(|e| e.value).collect(),
        verify_steps: summary.accept.verify_steps,
        committed_tokens: summary.accept.committed_tokens,
        plain_tokens_per_s: value(&summary.plain_tokens_per_s),
        spec_tokens_per_s: value(&summary.spec_tokens_per_s),
        speedup: value(&summary.speedup),
        identical: summary.identical(),
        rows: summary.rows,
        doubts: summary.doubts.clone(),
        machine: machine.clone(),
        speedup_baseline: BASELINE,
        accept_len_ci95: interval(&summary.accept_len),
        speedup_ci95: interval(&summary.speedup),
        speedup_with_prefill: value(&summary.speedup_with_prefill),
        cond_accept_rate_at: summary.cond_accept_rate_at.iter().map(value).collect(),
        samples: summary.samples,
        identical_samples: summary.identical_samples,
        workloads,
    }
}
