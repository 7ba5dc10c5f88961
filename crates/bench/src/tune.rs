//! `bench tune`: which way to draft is the fastest on this machine, at this load.
//!
//! All settings decode the same groups of prompts in turn, plain decoding among them; the one that goes first rotates.
//! A setting is judged by its tokens per second over those of plain decoding. Texts are compared as well: a setting
//! changes time, never the text.
//!
//! Shape legend: `G` groups of `N` sequences, `S` settings.

use std::time::Duration;

use serde::Serialize;

use crate::record::{ArtifactInfo, CostsInfo, Drafting, Machine};
use crate::stats::{Estimate, product, ratio};
use crate::table::with_interval;
use crate::{BenchError, BoxError};

/// Groups per load at least, so that an interval can be given.
const GROUPS: usize = 4;

/// Prompts decoded together.
#[derive(Clone, Debug)]
pub struct GroupOutput {
    /// `[N]` answers.
    pub token_ids: Vec<Vec<u32>>,
    /// Tokens that the time covers.
    pub tokens: usize,
    /// One sequence: from the first token to the last. Several: from the request to the last answer, prefills included.
    pub time: Duration,
    /// Verify steps over all sequences.
    pub verify_steps: u64,
    /// Tokens committed by them.
    pub committed_tokens: u64,
}

/// An engine to be tuned.
pub trait TuneRunner {
    /// How a setting drafts.
    fn settings(&self) -> Vec<Drafting>;
    /// Decodes prompts together with a setting, by number; `None` is plain decoding.
    fn decode(&mut self, setting: Option<usize>, prompts: &[&[u32]]) -> Result<GroupOutput, BoxError>;
}

/// What one setting reached at one load.
#[derive(Clone, Debug, Serialize)]
pub struct SettingResult {
    /// `plain`, `auto`, `chain 3`, `tree 5×4/16`.
    pub name: String,
    /// How it drafts; `None` is plain decoding.
    pub drafting: Option<Drafting>,
    /// Tokens per second of all sequences together.
    pub tokens_per_s: Option<Estimate>,
    /// Over plain decoding; `None` for plain decoding itself.
    pub speedup: Option<Estimate>,
    /// Committed tokens per verify step; `None` without drafts.
    pub accept_len: Option<f64>,
    /// Every text equals that of plain decoding.
    pub identical: bool,
}

/// All settings at one load.
#[derive(Clone, Debug, Serialize)]
pub struct LoadResult {
    /// Sequences at once.
    pub sequences: usize,
    /// `[S]`, plain decoding first.
    pub settings: Vec<SettingResult>,
    /// Name of the fastest.
    pub best: String,
}

/// `OUT.json` of `bench tune`.
#[derive(Clone, Debug, Serialize)]
pub struct TuneReport {
    /// One per load.
    pub loads: Vec<LoadResult>,
    /// Prompts used.
    pub prompts: usize,
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// Threads.
    pub threads: u32,
    /// The model.
    pub target: ArtifactInfo,
    /// The draft.
    pub draft: ArtifactInfo,
    /// Where it was run.
    pub machine: Machine,
    /// What the automatic plan decided by.
    pub costs: CostsInfo,
}

impl TuneReport {
    /// True if no setting changed a text.
    pub fn identical(&self) -> bool {
        self.loads.iter().flat_map(|l| &l.settings).all(|s| s.identical)
    }
}

/// Decodes `prompts` with every setting, in groups of `sequences`.
///
/// # Errors
/// What the runner says when it cannot decode.
pub fn tune_load(
    runner: &mut dyn TuneRunner,
    prompts: &[Vec<u32>],
    sequences: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<LoadResult, BenchError> {
    let settings = runner.settings();
    let sides = settings.len() + 1; // plain decoding first
    let groups = groups(prompts.len(), sequences);
    let mut outputs: Vec<Vec<GroupOutput>> = vec![Vec::new(); sides]; // [S, G]
    for (number, group) in groups.iter().enumerate() {
        let group: Vec<&[u32]> = group.iter().map(|i| prompts[*i].as_slice()).collect();
        for turn in 0..sides {
            let at = (number + turn) % sides;
            let done =
                runner.decode(at.checked_sub(1), &group).map_err(|source| BenchError::Kernels { source })?;
            outputs[at].push(done);
            progress(number * sides + turn + 1);
        }
    }
    let plain = &outputs[0];
    let seconds = |g: &GroupOutput| g.time.as_secs_f64();
    let results: Vec<SettingResult> = std::iter::once(None)
        .chain(settings.iter().map(Some))
        .zip(&outputs)
        .map(|(drafting, own)| {
            let rates: Vec<(f64, f64)> = own.iter().map(|g| (g.tokens as f64, seconds(g))).collect();
            let terms: Vec<[f64; 4]> = own
                .iter()
                .zip(plain)
                .map(|(g, p)| [g.tokens as f64, seconds(g), p.tokens as f64, seconds(p)])
                .collect();
            let steps: u64 = own.iter().map(|g| g.verify_steps).sum();
            let committed: u64 = own.iter().map(|g| g.committed_tokens).sum();
            SettingResult {
                name: drafting.map_or_else(|| "plain".to_owned(), Drafting::short_label),
                drafting: drafting.copied(),
                tokens_per_s: ratio(&rates),
                speedup: drafting.and_then(|_| product(&terms, [1.0, -1.0, -1.0, 1.0])),
                accept_len: drafting.filter(|_| steps > 0).map(|_| committed as f64 / steps as f64),
                identical: own.iter().zip(plain).all(|(g, p)| g.token_ids == p.token_ids),
            }
        })
        .collect();
    let rate = |s: &SettingResult| s.tokens_per_s.map_or(0.0, |e| e.value);
    let best = results.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)));
    let best = best.map_or_else(String::new, |s| s.name.clone());
    Ok(LoadResult { sequences, settings: results, best })
}

/// How many times a runner is asked at one load.
pub fn tune_steps(settings: usize, prompts: usize, sequences: usize) -> usize {
    (settings + 1) * groups(prompts, sequences).len()
}

/// `[G, N]` prompts by number, each as often as it takes to fill the groups.
fn groups(prompts: usize, sequences: usize) -> Vec<Vec<usize>> {
    let count = prompts.div_ceil(sequences).max(GROUPS.min(prompts));
    let mut next = (0..prompts).cycle();
    (0..count).map(|_| next.by_ref().take(sequences).collect()).collect()
}

/// Aligned text.
pub fn tune_text(report: &TuneReport) -> String {
    let mut out = report.machine.device_line();
    for load in &report.loads {
        let one = if load.sequences == 1 { "sequence" } else { "sequences" };
        out.push_str(&format!(
            "{:16}  {:>22}  {:>18}  {:>13}\n",
            format!("{} {one}", load.sequences),
            "tokens/s",
            "over plain",
            "accept length"
        ));
        for s in &load.settings {
            out.push_str(&format!(
                "{:16}  {:>22}  {:>18}  {:>13}{}{}\n",
                s.name,
                with_interval(&s.tokens_per_s, 0),
                with_interval(&s.speedup, 2),
                s.accept_len.map_or_else(|| "–".to_owned(), |a| format!("{a:.2}")),
                if s.name == load.best { "  ← fastest" } else { "" },
                if s.identical { "" } else { "  TEXT DIFFERS" },
            ));
        }
    }
    let without: Vec<String> = report
        .loads
        .iter()
        .filter(|load| load.settings.iter().any(|s| s.name == load.best && s.drafting.is_none()))
        .map(|load| load.sequences.to_string())
        .collect();
    if !without.is_empty() {
        out.push_str(&format!(
            "decode without the draft here at {} at once: no setting is faster than plain decoding\n",
            without.join(", ")
        ));
    }
    out.push_str(&format!(
        "{} prompts, up to {} tokens each, {} threads, settings in turn\n",
        report.prompts, report.max_new_tokens, report.threads
    ));
    out + &report.costs.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chains double the speed, trees halve it; a chain of 7 says something else.
    struct Made<'a>(&'a [Drafting]);

    impl TuneRunner for Made<'_> {
        fn settings(&self) -> Vec<Drafting> {
            self.0.to_vec()
        }

        fn decode(&mut self, setting: Option<usize>, prompts: &[&[u32]]) -> Result<GroupOutput, BoxError> {
            let drafting = setting.map(|s| self.0[s]);
            let ms = match drafting {
                None => 40,
                Some(Drafting::Chain { .. }) => 20,
                Some(_) => 80,
            };
            let last = if matches!(drafting, Some(Drafting::Chain { depth: 7 })) { 9 } else { 1 };
            Ok(GroupOutput {
                token_ids: prompts.iter().map(|p| vec![p[0], last]).collect(),
                tokens: 2 * prompts.len(),
                time: Duration::from_millis(ms * prompts.len() as u64),
                verify_steps: 2,
                committed_tokens: 3,
            })
        }
    }

    fn load(settings: &[Drafting], sequences: usize) -> LoadResult {
        let prompts: Vec<Vec<u32>> = (0..6).map(|i| vec![i, i + 1]).collect();
        let mut asked = 0;
        let mut made = Made(settings);
        let load = tune_load(&mut made, &prompts, sequences, &mut |done| asked = asked.max(done)).unwrap();
        assert_eq!(asked, tune_steps(settings.len(), prompts.len(), sequences));
        load
    }

    #[test]
    fn the_fastest_setting_is_named_with_its_gain() {
        let tree = Drafting::Tree { depth: 2, top_k: 2, num_draft_tokens: 4 };
        for sequences in [1, 4] {
            let load = load(&[tree, Drafting::Chain { depth: 3 }], sequences);
            assert_eq!(load.best, "chain 3");
            let speedup = |i: usize| load.settings[i].speedup.unwrap().value;
            assert!((speedup(1) - 0.5).abs() < 1e-9 && (speedup(2) - 2.0).abs() < 1e-9);
            assert!(load.settings[0].speedup.is_none() && load.settings[0].accept_len.is_none());
            assert_eq!(load.settings[2].accept_len, Some(1.5));
        }
    }

    #[test]
    fn where_nothing_is_faster_the_draft_is_left_out() {
        let report = |settings: &[Drafting]| TuneReport {
            loads: vec![load(settings, 1), load(&[Drafting::Chain { depth: 3 }], 4)],
            prompts: 6,
            max_new_tokens: 8,
            threads: 1,
            target: ArtifactInfo::default(),
            draft: ArtifactInfo::default(),
            machine: Machine::default(),
            costs: CostsInfo::default(),
        };
        let tree = Drafting::Tree { depth: 2, top_k: 2, num_draft_tokens: 4 };
        let text = tune_text(&report(&[tree]));
        assert!(text.contains("decode without the draft here at 1 at once"), "{text}");
        assert!(!tune_text(&report(&[Drafting::Chain { depth: 3 }])).contains("without the draft"));
    }

    #[test]
    fn a_changed_text_is_seen() {
        let load = load(&[Drafting::Chain { depth: 7 }], 1);
        assert_eq!(load.settings.iter().map(|s| s.identical).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn every_prompt_is_in_a_group_and_groups_are_full() {
        assert_eq!(groups(3, 1), [vec![0], vec![1], vec![2]]);
        assert_eq!(groups(5, 4), [vec![0, 1, 2, 3], vec![4, 0, 1, 2], vec![3, 4, 0, 1], vec![2, 3, 4, 0]]);
    }
}
