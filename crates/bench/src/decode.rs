//! `bench decode`: the same prompts decoded by several sides in turn, ours and those of other engines.
//!
//! Every side decodes the same number of tokens greedily, past any end of text, so that each gets the same work; the
//! side that goes first rotates from row to row.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::doubts::{Doubt, decode_doubts};
use crate::record::{ArtifactInfo, Machine};
use crate::stats::{Estimate, median, product, ratio};
use crate::table::with_interval;
use crate::{BenchError, BoxError};

/// One answer of one side.
pub struct Timed {
    /// Tokens decoded.
    pub token_ids: Vec<u32>,
    /// From the request to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// An engine that decodes.
pub trait Side {
    /// Name and version, `llama-cpp-python 0.3.36`.
    fn name(&self) -> String;
    /// Decodes `new_tokens` greedily, ignoring ends of text.
    fn decode(&mut self, prompt_ids: &[u32], new_tokens: usize) -> Result<Timed, BoxError>;
    /// Time of one pass of `rows` tokens behind `context` others, each asked for its most probable successor; `None`
    /// where the side has no such pass of its own.
    fn step(&mut self, _context: usize, _rows: usize) -> Result<Option<Duration>, BoxError> {
        Ok(None)
    }
    /// What it took to be there; asked for at the end.
    fn costs(&mut self) -> Result<SideCosts, BoxError> {
        Ok(SideCosts::default())
    }
}

/// What a side costs besides time per token. `None` where nobody knows.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SideCosts {
    /// Seconds from the file to an engine that can decode, the start of its process not counted.
    pub load_s: Option<f64>,
    /// Most memory that its process held, mapped files included.
    pub peak_memory_bytes: Option<u64>,
    /// Weights that are read for one token, for one sequence.
    pub weight_bytes_per_token: Option<u64>,
}

/// How much to measure.
#[derive(Clone, Debug)]
pub struct DecodeOptions {
    /// Tokens per prompt and side.
    pub new_tokens: usize,
    /// Length of the made-up prompt of the prefill measurement.
    pub prefill_tokens: usize,
    /// Rounds of it.
    pub prefill_rounds: usize,
    /// Rows of the measured passes.
    pub step_rows: Vec<usize>,
    /// Tokens in front of them.
    pub step_context: usize,
    /// Rounds over them.
    pub step_rounds: usize,
}

/// A prompt.
pub struct DecodeRow {
    /// For the record.
    pub id: String,
    /// Token ids.
    pub prompt_ids: Vec<u32>,
}

/// Raw times of one prompt, sides in the order of the report.
#[derive(Clone, Debug, Serialize)]
pub struct RowTimes {
    /// The prompt.
    pub id: String,
    /// Its tokens.
    pub prompt_tokens: usize,
    /// Tokens decoded, first token not counted.
    pub tokens: Vec<usize>,
    /// First token to last.
    pub decode_ns: Vec<u64>,
    /// Tokens at the start that equal those of the first side.
    pub equal_tokens: Vec<usize>,
}

/// What one side did.
#[derive(Clone, Debug, Serialize)]
pub struct SideResult {
    /// Name and version.
    pub name: String,
    /// Tokens per second over all prompts.
    pub decode_tokens_per_s: Option<Estimate>,
    /// Decode rate of the first side over this side's, over prompts.
    pub first_over_this: Option<Estimate>,
    /// Prefill rate, median of the rounds.
    pub prefill_tokens_per_s: Option<f64>,
    /// Prefill rate of the first side over this side's, medians.
    pub prefill_first_over_this: Option<f64>,
    /// The same over the rounds, with its interval.
    pub prefill_ratio: Option<Estimate>,
    /// Raw times of the prefills.
    pub prefill_ns: Vec<u64>,
    /// Median time of a pass by its rows, in milliseconds.
    pub step_ms: BTreeMap<usize, f64>,
    /// Time of a pass of this side over that of the first side, by rows, over the rounds.
    pub step_over_first: BTreeMap<usize, Estimate>,
    /// Raw times of the passes.
    pub step_ns: BTreeMap<usize, Vec<u64>>,
    /// Load time, memory, bytes.
    #[serde(flatten)]
    pub costs: SideCosts,
}

/// `OUT.json` of `bench decode`.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeReport {
    /// The sides; the first is our plain decoding.
    pub sides: Vec<SideResult>,
    /// Tokens per prompt and side.
    pub new_tokens: usize,
    /// Length of the prefill.
    pub prefill_tokens: usize,
    /// Tokens in front of the measured passes.
    pub step_context: usize,
    /// Threads of every side.
    pub threads: u32,
    /// The model.
    pub target: ArtifactInfo,
    /// Where it was run.
    pub machine: Machine,
    /// Reasons not to trust the numbers.
    pub doubts: Vec<Doubt>,
    /// Raw times.
    pub rows: Vec<RowTimes>,
}

impl DecodeReport {
    /// Notes what others did meanwhile, and whatever else there is to doubt.
    pub fn judge(&mut self, others_busy_share: Option<f64>) {
        self.machine.others_busy_share = others_busy_share;
        let first: Vec<(f64, f64)> =
            self.rows.iter().map(|row| (row.tokens[0] as f64, row.decode_ns[0] as f64 / 1e6)).collect();
        self.doubts = decode_doubts(&self.machine, self.threads, &first);
    }
}

/// Runs all sides on all rows.
///
/// # Errors
/// What a side says when it cannot decode.
pub fn run_decode(
    sides: &mut [&mut dyn Side],
    rows: &[DecodeRow],
    options: &DecodeOptions,
    (target, machine, threads): (ArtifactInfo, Machine, u32),
    progress: &mut dyn FnMut(usize),
) -> Result<DecodeReport, BenchError> {
    let failed = |source| BenchError::Kernels { source };
    let count = sides.len();
    let mut times = Vec::new();
    if let Some(row) = rows.first() {
        // The first pass over weights is slower.
        for side in sides.iter_mut() {
            side.decode(&row.prompt_ids, 8).map_err(failed)?;
        }
    }
    for (number, row) in rows.iter().enumerate() {
        let mut done: Vec<Option<Timed>> = (0..count).map(|_| None).collect();
        for turn in 0..count {
            let at = (number + turn) % count;
            done[at] = Some(sides[at].decode(&row.prompt_ids, options.new_tokens).map_err(failed)?);
        }
        let done: Vec<Timed> = done.into_iter().flatten().collect();
        let first = &done[0].token_ids;
        times.push(RowTimes {
            id: row.id.clone(),
            prompt_tokens: row.prompt_ids.len(),
            tokens: done.iter().map(|d| d.token_ids.len().saturating_sub(1)).collect(),
            decode_ns: done.iter().map(|d| d.decode.as_nanos() as u64).collect(),
            equal_tokens: done
                .iter()
                .map(|d| d.token_ids.iter().zip(first).take_while(|(a, b)| a == b).count())
                .collect(),
        });
        progress(number + 1);
    }
    let mut prefill_ns: Vec<Vec<u64>> = vec![Vec::new(); count];
    if let Some(row) = rows.first() {
        let ids: Vec<u32> = row.prompt_ids.iter().copied().cycle().take(options.prefill_tokens).collect();
        for round in 0..options.prefill_rounds {
            for turn in 0..count {
                let at = (round + turn) % count;
                let done = sides[at].decode(&ids, 1).map_err(failed)?;
                prefill_ns[at].push(done.prefill.as_nanos() as u64);
            }
        }
    }
    let mut step_ns: Vec<BTreeMap<usize, Vec<u64>>> = vec![BTreeMap::new(); count];
    for round in 0..options.step_rounds {
        for (number, m) in options.step_rows.iter().enumerate() {
            for turn in 0..count {
                let at = (round + number + turn) % count;
                // Not timed: threads of the side before may still look for work, and a pass is over before they rest.
                sides[at].step(options.step_context, *m).map_err(failed)?;
                if let Some(time) = sides[at].step(options.step_context, *m).map_err(failed)? {
                    step_ns[at].entry(*m).or_default().push(time.as_nanos() as u64);
                }
            }
        }
    }
    let mut costs = Vec::new();
    for side in sides.iter_mut() {
        costs.push(side.costs().map_err(failed)?);
    }
    // Paired by rounds: numbers of this side over those of the first.
    let over_first = |this: &[u64], first: &[u64]| {
        let pairs: Vec<(f64, f64)> = this.iter().zip(first).map(|(a, b)| (*a as f64, *b as f64)).collect();
        ratio(&pairs)
    };
    let prefill_rate = |ns: &[u64]| {
        let rates: Vec<f64> =
            ns.iter().map(|ns| options.prefill_tokens as f64 * 1e9 / (*ns).max(1) as f64).collect();
        median(&rates)
    };
    let first_prefill = prefill_rate(&prefill_ns[0]);
    let results = (0..count)
        .map(|i| {
            let rate: Vec<(f64, f64)> =
                times.iter().map(|t| (t.tokens[i] as f64, t.decode_ns[i] as f64 / 1e9)).collect();
            let terms: Vec<[f64; 4]> = times
                .iter()
                .map(|t| {
                    let ns = |i: usize| t.decode_ns[i] as f64;
                    [t.tokens[0] as f64, ns(0), t.tokens[i] as f64, ns(i)]
                })
                .collect();
            let prefill = prefill_rate(&prefill_ns[i]);
            SideResult {
                name: sides[i].name(),
                decode_tokens_per_s: ratio(&rate),
                first_over_this: if i == 0 { None } else { product(&terms, [1.0, -1.0, -1.0, 1.0]) },
                prefill_tokens_per_s: prefill,
                prefill_first_over_this: match (i, first_prefill, prefill) {
                    (1.., Some(first), Some(own)) if own > 0.0 => Some(first / own),
                    _ => None,
                },
                prefill_ratio: if i == 0 { None } else { over_first(&prefill_ns[i], &prefill_ns[0]) },
                prefill_ns: prefill_ns[i].clone(),
                step_ms: step_ns[i]
                    .iter()
                    .filter_map(|(m, ns)| {
                        let ms: Vec<f64> = ns.iter().map(|ns| *ns as f64 / 1e6).collect();
                        Some((*m, median(&ms)?))
                    })
                    .collect(),
                step_over_first: match i {
                    0 => BTreeMap::new(),
                    _ => step_ns[i]
                        .iter()
                        .filter_map(|(m, ns)| Some((*m, over_first(ns, step_ns[0].get(m)?)?)))
                        .collect(),
                },
                step_ns: step_ns[i].clone(),
                costs: costs[i],
            }
        })
        .collect();
    Ok(DecodeReport {
        sides: results,
        new_tokens: options.new_tokens,
        prefill_tokens: options.prefill_tokens,
        step_context: options.step_context,
        threads,
        target,
        machine,
        doubts: Vec::new(),
        rows: times,
    })
}

/// Aligned text.
pub fn decode_text(report: &DecodeReport) -> String {
    let width = report.sides.iter().map(|s| s.name.chars().count()).max().unwrap_or(0).max(4);
    let mut out = format!(
        "{:width$}  {:>24}  {:>20}  {:>14}  {:>20}\n",
        "side", "decode tokens/s", "first over this", "prefill tok/s", "first over this"
    );
    for side in &report.sides {
        let number =
            |v: Option<f64>, digits: usize| v.map_or_else(|| "–".into(), |v| format!("{v:.digits$}"));
        out.push_str(&format!(
            "{:width$}  {:>24}  {:>20}  {:>14}  {:>20}\n",
            side.name,
            with_interval(&side.decode_tokens_per_s, 1),
            with_interval(&side.first_over_this, 2),
            number(side.prefill_tokens_per_s, 0),
            with_interval(&side.prefill_ratio, 2),
        ));
    }
    costs_text(report, width, &mut out);
    steps_text(report, width, &mut out);
    out.push_str(&format!(
        "{} prompts, {} tokens each, prefill of {} tokens, {} threads, sides in turn\n",
        report.rows.len(),
        report.new_tokens,
        report.prefill_tokens,
        report.threads
    ));
    out.push_str(&report.machine.device_line());
    for doubt in &report.doubts {
        out.push_str(&format!("doubt: {} ({})\n", doubt.message(), doubt.advice()));
    }
    out
}

/// What each side took to be there.
fn costs_text(report: &DecodeReport, width: usize, out: &mut String) {
    let mb = |v: Option<u64>| v.map_or_else(|| "–".into(), |v| format!("{:.0}", v as f64 / 1e6));
    if report.sides.iter().all(|s| s.costs.load_s.is_none() && s.costs.peak_memory_bytes.is_none()) {
        return;
    }
    out.push_str(&format!(
        "\n{:width$}  {:>10}  {:>14}  {:>14}\n",
        "side", "load s", "peak MB", "MB per token"
    ));
    for side in &report.sides {
        let load = side.costs.load_s.map_or_else(|| "–".into(), |s| format!("{s:.2}"));
        let (peak, bytes) = (mb(side.costs.peak_memory_bytes), mb(side.costs.weight_bytes_per_token));
        out.push_str(&format!("{:width$}  {load:>10}  {peak:>14}  {bytes:>14}\n", side.name));
    }
}

/// Times of passes by their rows.
fn steps_text(report: &DecodeReport, width: usize, out: &mut String) {
    let sides: Vec<&SideResult> = report.sides.iter().filter(|s| !s.step_ms.is_empty()).collect();
    let Some(first) = sides.first() else { return };
    out.push_str(&format!("\n{:width$}", "ms per pass"));
    for m in first.step_ms.keys() {
        out.push_str(&format!("  {:>18}", format!("{m} rows")));
    }
    out.push('\n');
    for side in &sides {
        out.push_str(&format!("{:width$}", side.name));
        for m in first.step_ms.keys() {
            let ms = side.step_ms.get(m).map_or_else(|| "–".into(), |ms| format!("{ms:.1}"));
            out.push_str(&format!("  {ms:>18}"));
        }
        out.push('\n');
        if !side.step_over_first.is_empty() {
            out.push_str(&format!("{:width$}", "  over the first"));
            for m in first.step_ms.keys() {
                let over = side.step_over_first.get(m).copied();
                out.push_str(&format!("  {:>18}", with_interval(&over, 2)));
            }
            out.push('\n');
        }
    }
    out.push_str(&format!("passes behind {} tokens\n\n", report.step_context));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed {
        ms_per_token: u64,
        calls: usize,
        steps: u64,
    }

    impl Side for Fixed {
        fn name(&self) -> String {
            format!("{} ms", self.ms_per_token)
        }
        fn decode(&mut self, prompt_ids: &[u32], new_tokens: usize) -> Result<Timed, BoxError> {
            self.calls += 1;
            Ok(Timed {
                token_ids: (0..new_tokens as u32).collect(),
                prefill: Duration::from_millis(self.ms_per_token * prompt_ids.len() as u64),
                decode: Duration::from_millis(self.ms_per_token * (new_tokens as u64 - 1)),
            })
        }
        fn step(&mut self, context: usize, rows: usize) -> Result<Option<Duration>, BoxError> {
            assert_eq!(context, 64);
            // The first of two pays for what the other side left running.
            self.steps += 1;
            let paid = 1 + (self.steps % 2);
            Ok(Some(Duration::from_millis(paid * self.ms_per_token * rows as u64)))
        }
        fn costs(&mut self) -> Result<SideCosts, BoxError> {
            let peak = Some(1_000_000 * self.ms_per_token);
            Ok(SideCosts { load_s: Some(0.5), peak_memory_bytes: peak, weight_bytes_per_token: None })
        }
    }

    #[test]
    fn rates_and_ratios_follow_from_the_times() {
        let (mut fast, mut slow) =
            (Fixed { ms_per_token: 5, calls: 0, steps: 0 }, Fixed { ms_per_token: 10, calls: 0, steps: 0 });
        let rows: Vec<DecodeRow> =
            (0..3).map(|i| DecodeRow { id: i.to_string(), prompt_ids: vec![1; 4 + i] }).collect();
        let options = DecodeOptions {
            new_tokens: 11,
            prefill_tokens: 100,
            prefill_rounds: 3,
            step_rows: vec![1, 4],
            step_context: 64,
            step_rounds: 2,
        };
        let mut report = run_decode(
            &mut [&mut fast, &mut slow],
            &rows,
            &options,
            (ArtifactInfo::default(), Machine::default(), 2),
            &mut |_| {},
        )
        .unwrap();
        let rate = |i: usize| report.sides[i].decode_tokens_per_s.unwrap().value;
        assert!((rate(0) - 200.0).abs() < 1e-6 && (rate(1) - 100.0).abs() < 1e-6);
        assert!((report.sides[1].first_over_this.unwrap().value - 2.0).abs() < 1e-9);
        assert_eq!(report.sides[1].prefill_first_over_this, Some(2.0));
        assert!((report.sides[1].prefill_ratio.unwrap().value - 2.0).abs() < 1e-9);
        assert_eq!(report.sides[0].step_ms, BTreeMap::from([(1, 5.0), (4, 20.0)]));
        assert!((report.sides[1].step_over_first[&4].value - 2.0).abs() < 1e-9);
        assert_eq!(report.sides[1].costs.peak_memory_bytes, Some(10_000_000));
        report.judge(Some(0.5));
        let kinds: Vec<&str> = report.doubts.iter().map(Doubt::kind).collect();
        assert_eq!(kinds, ["too_few_samples", "machine_busy"]);
        assert_eq!(report.rows[2].equal_tokens, [11, 11]);
        assert_eq!((fast.calls, slow.calls), (7, 7));
        assert!(decode_text(&report).contains("2.00 [2.00, 2.00]"), "{}", decode_text(&report));
    }
}
