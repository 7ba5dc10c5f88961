//! `bench compare`: drafts of any kind beside each other, on the same prompts in one session.
//!
//! Plain decoding and every side decode each prompt in turn; the one that goes first rotates from prompt to prompt.
//! A side is a draft with a setting, or repetitions of the text alone. Every speedup is over plain decoding.
//!
//! Shape legend: `W` workloads, `P` prompts, `S` sides.

use serde::Serialize;

use crate::record::{ArtifactInfo, Drafting, Machine, PassCosts};
use crate::runner::RunOutput;
use crate::stats::{Estimate, Interval, product, ratio};
use crate::table::{value_or_dash, with_interval};
use crate::{BenchError, BoxError};

/// A draft that takes part.
#[derive(Clone, Debug, Serialize)]
pub struct ComparedDraft {
    /// For people; no two are the same.
    pub name: String,
    /// What it is.
    pub draft: ArtifactInfo,
    /// Bytes of its weights file; `None` for an ordinary model.
    pub weights_bytes: Option<u64>,
    /// Measured on this machine before the first prompt.
    pub costs: PassCosts,
}

impl ComparedDraft {
    /// Milliseconds of a proposal of `depth` tokens for one sequence, features taken in.
    pub fn proposal_ms(&self, depth: u32) -> f32 {
        self.costs.extend_ms + self.costs.draft_step_ms * depth.saturating_sub(1) as f32
    }

    /// The same over a target pass of one row.
    fn share(&self, depth: u32) -> Option<f32> {
        let (_, pass) = self.costs.verify_ms.first()?;
        (*pass > 0.0).then(|| self.proposal_ms(depth) / pass)
    }
}

/// One way to decode.
#[derive(Clone, Debug, Serialize)]
pub struct SideInfo {
    /// Number of its draft; `None` drafts from repetitions of the text alone.
    pub draft: Option<usize>,
    /// How it drafts.
    pub drafting: Drafting,
}

/// What can decode a prompt by every side.
pub trait CompareRunner {
    /// `side` by number; `None` is plain decoding.
    fn decode(&mut self, side: Option<usize>, prompt: &[u32]) -> Result<RunOutput, BoxError>;
}

/// One prompt by one side.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ComparedSample {
    /// Tokens that the time covers.
    pub tokens: usize,
    /// From the first token to the last.
    pub decode_ns: u64,
    /// Target passes that verified something or nothing.
    pub verify_steps: u64,
    /// Tokens committed by them.
    pub committed_tokens: u64,
    /// The text is that of plain decoding.
    pub identical: bool,
}

/// What one side reached.
#[derive(Clone, Debug, Serialize)]
pub struct SideResult {
    /// Committed tokens per target pass.
    pub accept_len: Option<Estimate>,
    /// Of decoding.
    pub tokens_per_s: Option<Estimate>,
    /// Over plain decoding.
    pub speedup: Option<Estimate>,
    /// Every text is that of plain decoding.
    pub identical: bool,
}

/// One workload.
#[derive(Clone, Debug, Serialize)]
pub struct ComparedWorkload {
    /// Name of the file.
    pub name: String,
    /// Hash of the file.
    pub sha256: String,
    /// Plain decoding.
    pub plain_tokens_per_s: Option<Estimate>,
    /// `[S]`
    pub sides: Vec<SideResult>,
    /// `[P, 1 + S]`, plain decoding first.
    pub samples: Vec<Vec<ComparedSample>>,
}

/// `OUT.json` of `bench compare`.
#[derive(Clone, Debug, Serialize)]
pub struct CompareReport {
    /// All drafts.
    pub drafts: Vec<ComparedDraft>,
    /// `[S]`
    pub sides: Vec<SideInfo>,
    /// `[W]`
    pub workloads: Vec<ComparedWorkload>,
    /// `[S]` geometric mean of the workloads' speedups.
    pub mean_speedup: Vec<Option<Estimate>>,
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// Threads.
    pub threads: u32,
    /// The model.
    pub target: ArtifactInfo,
    /// Where it was run.
    pub machine: Machine,
}

impl CompareReport {
    /// True if no side changed a text.
    pub fn identical(&self) -> bool {
        self.workloads.iter().flat_map(|w| &w.sides).all(|s| s.identical)
    }

    fn side_name(&self, side: &SideInfo) -> String {
        match side.draft {
            None => "repetitions alone".to_owned(),
            Some(draft) => format!("{}, {}", self.drafts[draft].name, side.drafting.short_label()),
        }
    }
}

/// Decodes every prompt by plain decoding and by all sides.
///
/// # Shapes
/// - `prompts`: `[P]` token ids
///
/// # Errors
/// What the runner says when it cannot decode.
pub fn compare_workload(
    runner: &mut dyn CompareRunner,
    sides: usize,
    name: &str,
    sha256: &str,
    prompts: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<ComparedWorkload, BenchError> {
    let turns = sides + 1; // plain decoding first
    let mut samples = Vec::with_capacity(prompts.len()); // [P, 1 + S]
    for (number, prompt) in prompts.iter().enumerate() {
        let mut outputs: Vec<Option<RunOutput>> = vec![None; turns];
        for turn in 0..turns {
            let at = (number + turn) % turns;
            let done = runner.decode(at.checked_sub(1), prompt);
            outputs[at] = Some(done.map_err(|source| BenchError::Kernels { source })?);
            progress(number * turns + turn + 1);
        }
        let outputs: Vec<RunOutput> = outputs.into_iter().flatten().collect();
        let sample = |output: &RunOutput| ComparedSample {
            tokens: output.decode_tokens,
            decode_ns: u64::try_from(output.decode.as_nanos()).unwrap_or(u64::MAX),
            verify_steps: output.stats.verify_steps,
            committed_tokens: output.stats.committed_tokens,
            identical: output.token_ids == outputs[0].token_ids,
        };
        samples.push(outputs.iter().map(sample).collect::<Vec<_>>());
    }
    let rate = |s: &ComparedSample| (s.tokens as f64, s.decode_ns as f64 * 1e-9);
    let rates = |at: usize| ratio(&samples.iter().map(|p| rate(&p[at])).collect::<Vec<_>>());
    let results = (1..turns).map(|at| {
        let steps: Vec<(f64, f64)> =
            samples.iter().map(|p| (p[at].committed_tokens as f64, p[at].verify_steps as f64)).collect();
        let terms: Vec<[f64; 4]> = samples
            .iter()
            .map(|p| {
                let ((tokens, time), (plain_tokens, plain_time)) = (rate(&p[at]), rate(&p[0]));
                [tokens, time, plain_tokens, plain_time]
            })
            .collect();
        SideResult {
            accept_len: ratio(&steps),
            tokens_per_s: rates(at),
            speedup: product(&terms, [1.0, -1.0, -1.0, 1.0]),
            identical: samples.iter().all(|p| p[at].identical),
        }
    });
    let sides = results.collect();
    Ok(ComparedWorkload {
        name: name.to_owned(),
        sha256: sha256.to_owned(),
        plain_tokens_per_s: rates(0),
        sides,
        samples,
    })
}

/// Geometric mean of estimates of different workloads, which are independent: on the log scale their half widths add up
/// as squares. `None` unless all are known.
pub fn geometric_mean(estimates: &[Option<Estimate>]) -> Option<Estimate> {
    let known: Vec<Estimate> = estimates.iter().copied().collect::<Option<_>>()?;
    let n = known.len() as f64;
    let value = (known.iter().map(|e| e.value.ln()).sum::<f64>() / n).exp();
    let halves: Option<Vec<f64>> =
        known.iter().map(|e| e.interval.map(|i| (i.high / i.low).ln() / 2.0)).collect();
    let interval = halves.filter(|_| !known.is_empty()).map(|halves| {
        let factor = (halves.iter().map(|h| h * h).sum::<f64>().sqrt() / n).exp();
        Interval { low: value / factor, high: value * factor }
    });
    (!known.is_empty()).then(|| Estimate { value, interval, rows: known.iter().map(|e| e.rows).sum() })
}

/// `[S]` mean speedups over workloads.
pub fn mean_speedups(sides: usize, workloads: &[ComparedWorkload]) -> Vec<Option<Estimate>> {
    let of = |side: usize| workloads.iter().map(|w| w.sides[side].speedup).collect::<Vec<_>>();
    (0..sides).map(|side| geometric_mean(&of(side))).collect()
}

/// Cells of both tables: drafts with their costs, and sides by workload.
fn tables(report: &CompareReport) -> [Vec<Vec<String>>; 2] {
    let depth = |draft: usize| {
        report.sides.iter().find_map(|s| match s.drafting {
            Drafting::Chain { depth } if s.draft == Some(draft) => Some(depth),
            _ => None,
        })
    };
    let mut drafts = vec![["draft", "kind", "MB", "proposal", "ms", "of a pass"].map(str::to_owned).to_vec()];
    for (number, draft) in report.drafts.iter().enumerate() {
        let depth = depth(number).unwrap_or(1);
        drafts.push(vec![
            draft.name.clone(),
            draft.draft.kind.clone(),
            draft.weights_bytes.map_or_else(|| "–".to_owned(), |b| format!("{:.1}", b as f64 / 1e6)),
            format!("{depth} tokens"),
            format!("{:.2}", draft.proposal_ms(depth)),
            draft.share(depth).map_or_else(|| "–".to_owned(), |s| format!("{:.0} %", 100.0 * s)),
        ]);
    }
    let header = ["workload", "side", "accept length", "tokens/s", "over plain"].map(str::to_owned).to_vec();
    let mut sides = vec![header];
    for workload in &report.workloads {
        let plain = value_or_dash(&workload.plain_tokens_per_s, 1);
        sides.push(vec![workload.name.clone(), "plain".into(), "1.00".into(), plain, "1.00".into()]);
        for (info, side) in report.sides.iter().zip(&workload.sides) {
            let differs = if side.identical { "" } else { "  TEXT DIFFERS" };
            sides.push(vec![
                workload.name.clone(),
                report.side_name(info),
                with_interval(&side.accept_len, 2),
                value_or_dash(&side.tokens_per_s, 1),
                with_interval(&side.speedup, 2) + differs,
            ]);
        }
    }
    if report.workloads.len() > 1 {
        for (info, mean) in report.sides.iter().zip(&report.mean_speedup) {
            sides.push(vec![
                "geometric mean".into(),
                report.side_name(info),
                String::new(),
                String::new(),
                with_interval(mean, 2),
            ]);
        }
    }
    [drafts, sides]
}

fn closing(report: &CompareReport) -> String {
    let prompts: usize = report.workloads.iter().map(|w| w.samples.len()).sum();
    let busy = report.machine.others_busy_share;
    format!(
        "{}; {prompts} prompts, greedy, up to {} tokens each, {} threads, sides in turn; others used {} of the \
         processors\n{}",
        report.target.name,
        report.max_new_tokens,
        report.threads,
        busy.map_or_else(|| "an unknown share".to_owned(), |s| format!("{:.0} %", 100.0 * s)),
        report.machine.device_line(),
    )
}

/// Aligned text.
pub fn compare_text(report: &CompareReport) -> String {
    let mut out = String::new();
    for table in tables(report) {
        let columns = table[0].len();
        let width = |c: usize| table.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &table {
            let padded = row
                .iter()
                .zip(&widths)
                .map(|(cell, w)| format!("{cell}{}", " ".repeat(w - cell.chars().count())));
            out.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
            out.push('\n');
        }
        out.push('\n');
    }
    out + &closing(report)
}

/// The same in Markdown.
pub fn compare_markdown(report: &CompareReport) -> String {
    let mut out = String::new();
    for table in tables(report) {
        for (number, row) in table.iter().enumerate() {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            out.push_str(&format!("| {} |\n", cells.join(" | ")));
            if number == 0 {
                out.push_str(&format!("|{}\n", "---|".repeat(row.len())));
            }
        }
        out.push('\n');
    }
    out + &closing(report)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use draftsmith_core::AcceptStats;

    use super::*;
    use crate::record::Finish;

    /// Side 0 is twice as fast as plain decoding, side 1 half as fast; the last one says something else.
    struct Made {
        asked: Vec<Option<usize>>,
    }

    impl CompareRunner for Made {
        fn decode(&mut self, side: Option<usize>, prompt: &[u32]) -> Result<RunOutput, BoxError> {
            self.asked.push(side);
            let (ms, steps) = match side {
                None => (40, 8),
                Some(0) => (20, 4),
                Some(_) => (80, 8),
            };
            let stats = AcceptStats { verify_steps: steps, committed_tokens: 8, ..AcceptStats::default() };
            Ok(RunOutput {
                token_ids: vec![prompt[0], if side == Some(2) { 9 } else { 1 }],
                decode_tokens: 8,
                finish: Finish::Length,
                prefill: Duration::ZERO,
                decode: Duration::from_millis(ms + u64::from(prompt[0] % 2)),
                stats: if side.is_none() { AcceptStats::default() } else { stats },
            })
        }
    }

    fn workload(name: &str) -> (ComparedWorkload, Vec<Option<usize>>) {
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| vec![i]).collect();
        let (mut made, mut last) = (Made { asked: Vec::new() }, 0);
        let done = compare_workload(&mut made, 3, name, "", &prompts, &mut |n| last = n).unwrap();
        assert_eq!(last, 20);
        (done, made.asked)
    }

    fn report(names: &[&str]) -> CompareReport {
        let draft = ComparedDraft {
            name: "a | b".into(),
            draft: ArtifactInfo { kind: "eagle3".into(), ..ArtifactInfo::default() },
            weights_bytes: Some(5_000_000),
            costs: PassCosts {
                verify_ms: vec![(1, 10.0)],
                draft_step_ms: 0.5,
                extend_ms: 1.0,
                ..PassCosts::default()
            },
        };
        let side = |draft, drafting| SideInfo { draft, drafting };
        let workloads: Vec<ComparedWorkload> = names.iter().map(|name| workload(name).0).collect();
        CompareReport {
            drafts: vec![draft],
            sides: vec![
                side(Some(0), Drafting::Chain { depth: 5 }),
                side(Some(0), Drafting::Auto),
                side(None, Drafting::Auto),
            ],
            mean_speedup: mean_speedups(3, &workloads),
            workloads,
            max_new_tokens: 8,
            threads: 2,
            target: ArtifactInfo { name: "T".into(), ..ArtifactInfo::default() },
            machine: Machine::default(),
        }
    }

    #[test]
    fn every_prompt_is_decoded_by_every_side_in_turn_and_the_first_one_rotates() {
        let (_, asked) = workload("w");
        let all = [None, Some(0), Some(1), Some(2)];
        for (number, turns) in asked.chunks(4).enumerate() {
            let rotated: Vec<_> = (0..4).map(|turn| all[(number + turn) % 4]).collect();
            assert_eq!(turns, rotated);
        }
    }

    #[test]
    fn speedups_and_accept_lengths_are_ratios_of_sums() {
        let (workload, _) = workload("w");
        let plain = 5.0 * 0.040 + 0.002;
        let speedup = workload.sides[0].speedup.unwrap();
        assert!((speedup.value - plain / (5.0 * 0.020 + 0.002)).abs() < 1e-9, "{speedup:?}");
        assert_eq!(workload.sides[0].accept_len.unwrap().value, 2.0);
        assert!(workload.sides[1].speedup.unwrap().value < 0.51);
        assert!((workload.plain_tokens_per_s.unwrap().value - 40.0 / plain).abs() < 1e-9);
        assert_eq!(workload.sides.iter().map(|s| s.identical).collect::<Vec<_>>(), [true, true, false]);
    }

    #[test]
    fn a_mean_is_geometric_and_its_interval_narrower_than_its_parts() {
        let estimate = |value: f64| {
            Some(Estimate {
                value,
                interval: Some(Interval { low: value / 1.2, high: value * 1.2 }),
                rows: 4,
            })
        };
        let mean = geometric_mean(&[estimate(1.0), estimate(4.0)]).unwrap();
        assert!((mean.value - 2.0).abs() < 1e-12 && mean.rows == 8);
        let interval = mean.interval.unwrap();
        assert!((interval.high / 2.0 - 1.2f64.powf(0.5f64.sqrt())).abs() < 1e-12, "{interval:?}");
        assert!((interval.high * interval.low - 4.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[estimate(1.0), None]), None);
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn the_tables_hold_costs_means_and_what_differs() {
        let text = compare_text(&report(&["one", "two"]));
        // 1.0 + 4 × 0.5 of a pass of 10 ms.
        assert!(text.contains("5.0  5 tokens  3.00  30 %"), "{text}");
        assert!(text.contains("geometric mean  a | b, chain 5"), "{text}");
        assert_eq!(text.matches("TEXT DIFFERS").count(), 2, "{text}");
        assert!(!compare_text(&report(&["one"])).contains("geometric mean"));
        let page = compare_markdown(&report(&["one"]));
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        let lines: Vec<&str> = page.lines().filter(|line| line.starts_with('|')).collect();
        assert!(lines.iter().all(|line| [6, 7].contains(&cells(line))), "{page}");
        assert!(page.contains("| a \\| b, auto |"), "{page}");
    }
}
