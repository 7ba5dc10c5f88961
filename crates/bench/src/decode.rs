//! `bench decode`: the same prompts decoded by several sides in turn, ours and those of other engines.
//!
//! Every side decodes the same number of tokens greedily, past any end of text, so that each gets the same work; the
//! side that goes first rotates from row to row.

use std::time::Duration;

use serde::Serialize;

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
    /// Raw times of the prefills.
    pub prefill_ns: Vec<u64>,
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
    /// Threads of every side.
    pub threads: u32,
    /// The model.
    pub target: ArtifactInfo,
    /// Where it was run.
    pub machine: Machine,
    /// Raw times.
    pub rows: Vec<RowTimes>,
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
                prefill_ns: prefill_ns[i].clone(),
            }
        })
        .collect();
    Ok(DecodeReport {
        sides: results,
        new_tokens: options.new_tokens,
        prefill_tokens: options.prefill_tokens,
        threads,
        target,
        machine,
        rows: times,
    })
}

/// Aligned text.
pub fn decode_text(report: &DecodeReport) -> String {
    let width = report.sides.iter().map(|s| s.name.chars().count()).max().unwrap_or(0).max(4);
    let mut out = format!(
        "{:width$}  {:>24}  {:>20}  {:>14}  {:>12}\n",
        "side", "decode tokens/s", "first over this", "prefill tok/s", "first/this"
    );
    for side in &report.sides {
        let number =
            |v: Option<f64>, digits: usize| v.map_or_else(|| "–".into(), |v| format!("{v:.digits$}"));
        out.push_str(&format!(
            "{:width$}  {:>24}  {:>20}  {:>14}  {:>12}\n",
            side.name,
            with_interval(&side.decode_tokens_per_s, 1),
            with_interval(&side.first_over_this, 2),
            number(side.prefill_tokens_per_s, 0),
            number(side.prefill_first_over_this, 2),
        ));
    }
    out.push_str(&format!(
        "{} prompts, {} tokens each, prefill of {} tokens, {} threads, sides in turn\n",
        report.rows.len(),
        report.new_tokens,
        report.prefill_tokens,
        report.threads
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed {
        ms_per_token: u64,
        calls: usize,
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
    }

    #[test]
    fn rates_and_ratios_follow_from_the_times() {
        let (mut fast, mut slow) =
            (Fixed { ms_per_token: 5, calls: 0 }, Fixed { ms_per_token: 10, calls: 0 });
        let rows: Vec<DecodeRow> =
            (0..3).map(|i| DecodeRow { id: i.to_string(), prompt_ids: vec![1; 4 + i] }).collect();
        let options = DecodeOptions { new_tokens: 11, prefill_tokens: 100, prefill_rounds: 3 };
        let report = run_decode(
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
        assert_eq!(report.rows[2].equal_tokens, [11, 11]);
        assert_eq!((fast.calls, slow.calls), (7, 7));
        assert!(decode_text(&report).contains("2.00 [2.00, 2.00]"), "{}", decode_text(&report));
    }
}
