//! Reasons not to trust a number, each with advice. A record with doubts is written all the same; tables and
//! reports show them next to the number that they weaken.

use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::record::{ArtifactInfo, Machine, Record, Sample};
use crate::stats::median;

/// Fewer rows than this and intervals are wide and quantiles of little meaning.
pub const ROWS_WANTED: usize = 20;
/// A first sample slower than the median of the others by this factor was not warm.
const FIRST_SAMPLE_FACTOR: f64 = 1.3;
/// Share of the logical processors that others may use before timings suffer.
const OTHERS_SHARE_MAX: f64 = 0.1;
/// Load average per logical processor above which the machine was not idle before.
const LOAD_SHARE_MAX: f64 = 0.25;
/// Change of the plain time per token between both halves that means throttling or a noisy neighbour.
const DRIFT_MAX: f64 = 0.10;
/// Samples needed before halves can be compared.
const DRIFT_SAMPLES_MIN: usize = 8;

/// A reason not to trust a number.
#[derive(Clone, Debug, PartialEq)]
pub enum Doubt {
    /// Speculation changed the output: the claim of losslessness does not hold.
    OutputsDiffer {
        /// Samples that differ.
        samples: usize,
        /// Samples in all.
        of: usize,
        /// Row of the first.
        id: String,
        /// Its 0-based turn.
        turn: u32,
        /// First token index that differs.
        token_idx: u32,
    },
    /// The draft was trained beside other weights of its target.
    OtherWeights {
        /// Their hash.
        trained: String,
        /// Hash of the target that was measured.
        found: String,
    },
    /// Too few rows for the interval to mean much.
    TooFewSamples {
        /// Rows measured.
        rows: usize,
        /// Rows wanted.
        wanted: usize,
    },
    /// The first sample was slower than the rest.
    FirstSampleSlow {
        /// Its plain time per token.
        first_ms: f64,
        /// Median of the others.
        median_ms: f64,
    },
    /// The machine was at work before we measured.
    MachineBusy {
        /// Load average before the first sample.
        load: f64,
        /// Logical processors.
        logical_cpus: u32,
    },
    /// Other programs were running while we measured.
    OthersBusy {
        /// Share of all processors that they used.
        share: f64,
    },
    /// More worker threads than processors.
    TooManyThreads {
        /// Threads used.
        threads: u32,
        /// Logical processors.
        logical_cpus: u32,
    },
    /// The machine became faster or slower while measuring.
    ClockDrift {
        /// Median plain time per token in the first half.
        first_half_ms: f64,
        /// The same in the second half.
        second_half_ms: f64,
    },
    /// Rows were left out.
    RowsSkipped {
        /// How many turns.
        turns: usize,
        /// Reason of the first.
        first: String,
    },
    /// The caller stopped before the last row.
    StoppedEarly {
        /// Rows with at least one sample.
        rows: usize,
        /// Rows asked for.
        wanted: u64,
    },
    /// No verify step took place.
    NothingDrafted,
    /// The device's kernels do not give a row the same bits alone and among others.
    NotRowExact {
        /// As it was asked for.
        device: String,
    },
}

impl Doubt {
    /// The doubt about times that were taken while others used this share of all processors, if it is one.
    pub fn of_others(share: f64) -> Option<Doubt> {
        (share > OTHERS_SHARE_MAX).then_some(Doubt::OthersBusy { share })
    }

    /// Stable name for scripts.
    pub fn kind(&self) -> &'static str {
        match self {
            Doubt::OutputsDiffer { .. } => "outputs_differ",
            Doubt::OtherWeights { .. } => "other_weights",
            Doubt::TooFewSamples { .. } => "too_few_samples",
            Doubt::FirstSampleSlow { .. } => "first_sample_slow",
            Doubt::MachineBusy { .. } | Doubt::OthersBusy { .. } => "machine_busy",
            Doubt::TooManyThreads { .. } => "too_many_threads",
            Doubt::ClockDrift { .. } => "clock_drift",
            Doubt::RowsSkipped { .. } => "rows_skipped",
            Doubt::StoppedEarly { .. } => "stopped_early",
            Doubt::NothingDrafted => "nothing_drafted",
            Doubt::NotRowExact { .. } => "not_row_exact",
        }
    }

    /// The fact.
    pub fn message(&self) -> String {
        match self {
            Doubt::OutputsDiffer { samples, of, id, turn, token_idx } => format!(
                "outputs differ from target-only decoding in {samples} of {of} samples, first in row `{id}`, turn {turn}, at token {token_idx}"
            ),
            Doubt::OtherWeights { trained, found } => {
                format!("the draft was trained beside target weights with hash {trained}, these have {found}")
            }
            Doubt::TooFewSamples { rows, wanted } => {
                format!("only {rows} rows were measured, {wanted} are wanted")
            }
            Doubt::FirstSampleSlow { first_ms, median_ms } => format!(
                "the first sample took {first_ms:.2} ms per token, the median of the others is {median_ms:.2} ms"
            ),
            Doubt::MachineBusy { load, logical_cpus } => {
                format!("the load average before the first sample was {load:.2} on {logical_cpus} processors")
            }
            Doubt::OthersBusy { share } => {
                format!("other programs used {:.0} % of the processors while measuring", share * 100.0)
            }
            Doubt::TooManyThreads { threads, logical_cpus } => {
                format!("{threads} worker threads share {logical_cpus} processors")
            }
            Doubt::ClockDrift { first_half_ms, second_half_ms } => format!(
                "plain decoding took {first_half_ms:.2} ms per token in the first half of the samples and {second_half_ms:.2} ms in the second"
            ),
            Doubt::RowsSkipped { turns, first } => {
                format!("{turns} turns were left out, the first because {first}")
            }
            Doubt::StoppedEarly { rows, wanted } => {
                format!("the run was stopped after {rows} of {wanted} rows")
            }
            Doubt::NothingDrafted => "no verify step took place".into(),
            Doubt::NotRowExact { device } => format!(
                "`{device}` does not promise the same bits for a row alone and among others: equal texts are an observation"
            ),
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Doubt::OutputsDiffer { .. } => {
                "do not use this draft or engine build until the difference is explained: run `generate --prove` on the row"
            }
            Doubt::OtherWeights { .. } => {
                "another quantisation of the same model changes the accept length a little, other weights much: measure with the target named in `bundle.json`"
            }
            Doubt::TooFewSamples { .. } => "raise `--limit`, or use a larger workload",
            Doubt::FirstSampleSlow { .. } => "measure again; if it stays, lengthen the warm-up",
            Doubt::MachineBusy { .. } | Doubt::OthersBusy { .. } => "close other programs and measure again",
            Doubt::TooManyThreads { .. } => "set `--threads` to the number of processors or lower",
            Doubt::ClockDrift { .. } => {
                "the chip throttled or others were at work: measure again on an idle, cool machine (the speedup suffers less than the rates, since both sides alternate)"
            }
            Doubt::RowsSkipped { .. } => "use a workload with shorter prompts, or lower `--max-new-tokens`",
            Doubt::StoppedEarly { .. } => "let it run to the end",
            Doubt::NothingDrafted => "answers ended before the first proposal: raise `--max-new-tokens`",
            Doubt::NotRowExact { .. } => {
                "decode where it is promised (`--device cpu` or `cuda`), or compare more texts"
            }
        }
    }
}

impl Serialize for Doubt {
    /// `{"kind", "message", "advice"}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut doubt = serializer.serialize_struct("Doubt", 3)?;
        doubt.serialize_field("kind", self.kind())?;
        doubt.serialize_field("message", &self.message())?;
        doubt.serialize_field("advice", self.advice())?;
        doubt.end()
    }
}

/// Whether a draft stands beside other weights than those it was trained beside; `None` where one of the hashes is not
/// known.
pub fn other_weights(draft: &ArtifactInfo, target: &ArtifactInfo) -> Option<Doubt> {
    let (trained, found) = (draft.trained_beside.clone()?, target.sha256.clone()?);
    (trained != found).then_some(Doubt::OtherWeights { trained, found })
}

/// All doubts about one record.
pub fn doubts(record: &Record) -> Vec<Doubt> {
    let mut found = Vec::new();
    let samples = &record.samples;
    let differing: Vec<&Sample> = samples.iter().filter(|s| !s.identical).collect();
    if let (None, Some(first)) = (&record.settings.verify, differing.first()) {
        found.push(Doubt::OutputsDiffer {
            samples: differing.len(),
            of: samples.len(),
            id: first.id.clone(),
            turn: first.turn,
            token_idx: first.first_difference.unwrap_or(0),
        });
    }
    found.extend(other_weights(&record.draft, &record.target));
    let rows = samples.iter().map(|s| s.id.as_str()).collect::<std::collections::HashSet<_>>().len();
    if samples.iter().all(|s| s.accept.verify_steps == 0) {
        found.push(Doubt::NothingDrafted);
    }
    if rows < ROWS_WANTED {
        found.push(Doubt::TooFewSamples { rows, wanted: ROWS_WANTED });
    }
    if record.stopped_early {
        found.push(Doubt::StoppedEarly { rows, wanted: record.workload.rows_wanted });
    }
    if let Some(first) = record.skipped.first() {
        found.push(Doubt::RowsSkipped { turns: record.skipped.len(), first: first.reason.clone() });
    }
    machine_doubts(&record.machine, record.settings.threads, &mut found);
    let ms: Vec<f64> = samples
        .iter()
        .filter(|s| s.plain.decode_tokens > 0)
        .map(|s| s.plain.decode_ns as f64 / f64::from(s.plain.decode_tokens) / 1e6)
        .collect();
    time_doubts(&ms, &mut found);
    found
}

/// All doubts about a comparison of engines; `rows` are tokens and milliseconds of the first side.
pub fn decode_doubts(machine: &Machine, threads: u32, rows: &[(f64, f64)]) -> Vec<Doubt> {
    let mut found = Vec::new();
    if rows.len() < ROWS_WANTED {
        found.push(Doubt::TooFewSamples { rows: rows.len(), wanted: ROWS_WANTED });
    }
    machine_doubts(machine, threads, &mut found);
    let ms: Vec<f64> =
        rows.iter().filter(|(tokens, _)| *tokens > 0.0).map(|(tokens, ms)| ms / tokens).collect();
    time_doubts(&ms, &mut found);
    found
}

fn machine_doubts(machine: &Machine, threads: u32, found: &mut Vec<Doubt>) {
    if let Some(device) = machine.device.as_ref().filter(|device| !device.row_exact) {
        found.push(Doubt::NotRowExact { device: device.name.clone() });
    }
    match (machine.others_busy_share, machine.load_average_1m) {
        (Some(share), _) if share > OTHERS_SHARE_MAX => found.push(Doubt::OthersBusy { share }),
        (Some(_), _) => {}
        (None, Some(load)) if load > LOAD_SHARE_MAX * f64::from(machine.logical_cpus.max(1)) => {
            found.push(Doubt::MachineBusy { load, logical_cpus: machine.logical_cpus });
        }
        (None, _) => {}
    }
    if machine.logical_cpus > 0 && threads > machine.logical_cpus {
        found.push(Doubt::TooManyThreads { threads, logical_cpus: machine.logical_cpus });
    }
}

/// Doubts about times per token, in milliseconds, in the order in which they were taken.
fn time_doubts(ms: &[f64], found: &mut Vec<Doubt>) {
    if let Some((first_ms, rest)) = ms.split_first()
        && rest.len() >= 2
        && let Some(median_ms) = median(rest)
        && *first_ms > FIRST_SAMPLE_FACTOR * median_ms
    {
        found.push(Doubt::FirstSampleSlow { first_ms: *first_ms, median_ms });
    }
    if ms.len() >= DRIFT_SAMPLES_MIN {
        let (first, second) = ms.split_at(ms.len() / 2);
        if let (Some(first_half_ms), Some(second_half_ms)) = (median(first), median(second))
            && (second_half_ms / first_half_ms - 1.0).abs() > DRIFT_MAX
        {
            found.push(Doubt::ClockDrift { first_half_ms, second_half_ms });
        }
    }
}
