//! The measurement: every prompt both ways, interleaved, compared token by token.
//!
//! Back-to-back blocks of one side drift as the chip warms, so both sides alternate inside every sample, and the
//! side that goes first alternates from sample to sample.

use std::ops::ControlFlow;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use draftsmith_core::VerifyRule;

use crate::record::{
    Accept, ArtifactInfo, Drafting, Machine, Order, RECORD_FORMAT, RECORD_VERSION, Record, Sample, Settings,
    Side, Skipped, WorkloadInfo,
};
use crate::runner::{BusyTimes, Dialogue, RunOptions, RunOutput, Runner};
use crate::workload::Workload;
use crate::{BenchError, BoxError};

/// What to measure and how to label it.
#[derive(Clone, Debug)]
pub struct MeasureOptions {
    /// How both sides decode.
    pub run: RunOptions,
    /// Runs of each prompt and side; 1 or more.
    pub repeats: usize,
    /// Tokens decoded by each side before the first sample, on the first prompt.
    pub warmup_tokens: usize,
    /// How the runner drafts; kept in the record.
    pub drafting: Drafting,
    /// Worker threads of the engine; kept in the record.
    pub threads: u32,
    /// The target; kept in the record.
    pub target: ArtifactInfo,
    /// The draft; kept in the record.
    pub draft: ArtifactInfo,
    /// The machine; kept in the record.
    pub machine: Machine,
}

/// Where a measurement stands, told after every sample.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// Name of the workload.
    pub workload: &'a str,
    /// Rows done.
    pub rows_done: usize,
    /// Rows in all.
    pub rows: usize,
    /// The sample just taken; `None` after the warm-up.
    pub sample: Option<&'a Sample>,
    /// Samples so far, the last included.
    pub samples: &'a [Sample],
    /// Time since the first sample began.
    pub elapsed: Duration,
}

/// Runs every row of a workload both ways.
///
/// The answer of turn `n` becomes part of the prompt of turn `n + 1` (the plain answer, should the two differ).
/// `progress` may stop the run; what was measured until then is returned, marked as stopped early.
///
/// # Errors
/// [`BenchError::Dialogue`] and [`BenchError::Run`] name the row. [`BenchError::NothingMeasured`] if every row
/// was skipped, [`BenchError::Stopped`] if the run was stopped before the first sample.
pub fn run_workload(
    runner: &mut dyn Runner,
    dialogue: &mut dyn Dialogue,
    workload: &Workload,
    options: &MeasureOptions,
    progress: &mut dyn FnMut(&Progress<'_>) -> ControlFlow<()>,
) -> Result<Record, BenchError> {
    let created_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let repeats = options.repeats.max(1);
    let mut samples: Vec<Sample> = Vec::new();
    let mut skipped = Vec::new();
    let mut stopped_early = false;
    let mut warm = options.warmup_tokens == 0;
    let mut begin = Instant::now();
    let mut busy_before = runner.busy_times();

    'rows: for (rows_done, row) in workload.rows.iter().enumerate() {
        let mut answers: Vec<String> = Vec::new();
        for turn in 0..row.turns.len() {
            let dialogue_error = |source: BoxError| BenchError::Dialogue { id: row.id.clone(), turn, source };
            let prompt_ids = dialogue.prompt(row, &answers).map_err(dialogue_error)?;
            let room = runner.context_len().saturating_sub(prompt_ids.len());
            if prompt_ids.is_empty() || room < options.run.max_new_tokens {
                skipped.push(Skipped {
                    id: row.id.clone(),
                    turn: turn as u32,
                    reason: format!(
                        "its prompt of {} tokens and {} new ones do not fit a context of {}",
                        prompt_ids.len(),
                        options.run.max_new_tokens,
                        runner.context_len()
                    ),
                });
                break; // later turns of this row need this answer
            }
            if !warm {
                let warmup = RunOptions {
                    max_new_tokens: options.warmup_tokens.min(options.run.max_new_tokens),
                    ..options.run
                };
                let run_error =
                    |side| move |source| BenchError::Run { id: row.id.clone(), turn, side, source };
                runner.plain(&prompt_ids, &warmup).map_err(run_error("plain"))?;
                runner.spec(&prompt_ids, &warmup).map_err(run_error("speculative"))?;
                warm = true;
                begin = Instant::now();
                busy_before = runner.busy_times();
                let state = Progress {
                    workload: &workload.name,
                    rows_done,
                    rows: workload.rows.len(),
                    sample: None,
                    samples: &samples,
                    elapsed: Duration::ZERO,
                };
                if progress(&state).is_break() {
                    stopped_early = true;
                    break 'rows;
                }
            }
            let mut answer: Option<Vec<u32>> = None;
            for repeat in 0..repeats {
                let order =
                    if samples.len().is_multiple_of(2) { Order::PlainFirst } else { Order::SpecFirst };
                let start = begin.elapsed();
                let (plain, spec) = both(runner, &prompt_ids, &options.run, order)
                    .map_err(|(side, source)| BenchError::Run { id: row.id.clone(), turn, side, source })?;
                let first_difference = first_difference(&plain.token_ids, &spec.token_ids);
                samples.push(Sample {
                    id: row.id.clone(),
                    turn: turn as u32,
                    repeat: repeat as u32,
                    order,
                    start_ns: nanos(start),
                    prompt_tokens: prompt_ids.len() as u32,
                    plain: side(&plain),
                    spec: side(&spec),
                    accept: Accept::from(&spec.stats),
                    identical: first_difference.is_none(),
                    first_difference: first_difference.map(|i| i as u32),
                });
                answer.get_or_insert(plain.token_ids);
                let last_of_row = turn + 1 == row.turns.len() && repeat + 1 == repeats;
                let state = Progress {
                    workload: &workload.name,
                    rows_done: rows_done + usize::from(last_of_row),
                    rows: workload.rows.len(),
                    sample: samples.last(),
                    samples: &samples,
                    elapsed: begin.elapsed(),
                };
                if progress(&state).is_break() {
                    stopped_early = rows_done + 1 < workload.rows.len() || !last_of_row;
                    break 'rows;
                }
            }
            let answer = answer.expect("at least one repeat was run");
            answers.push(dialogue.answer(&answer).map_err(dialogue_error)?);
        }
    }
    if samples.is_empty() {
        return Err(match skipped.first() {
            Some(first) if !stopped_early => BenchError::NothingMeasured {
                workload: workload.name.clone(),
                skipped: skipped.len(),
                first: first.reason.clone(),
            },
            _ => BenchError::Stopped { workload: workload.name.clone() },
        });
    }
    let busy_after = runner.busy_times();
    let others_busy_share = busy_before.zip(busy_after).and_then(|(a, b)| BusyTimes::others_share(a, b));
    let sampling = options.run.sampling;
    Ok(Record {
        format: RECORD_FORMAT.to_owned(),
        version: RECORD_VERSION,
        created_unix_s,
        draftsmith_version: env!("CARGO_PKG_VERSION").to_owned(),
        workload: WorkloadInfo {
            name: workload.name.clone(),
            sha256: workload.sha256.clone(),
            rows_total: workload.rows_total as u64,
            rows_wanted: workload.rows.len() as u64,
        },
        target: options.target.clone(),
        draft: options.draft.clone(),
        settings: Settings {
            max_new_tokens: options.run.max_new_tokens as u32,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            seed: sampling.seed,
            verify: (options.run.verify != VerifyRule::Seeded && !sampling.is_greedy())
                .then(|| options.run.verify.name().to_string()),
            drafting: options.drafting,
            threads: options.threads,
            repeats: repeats as u32,
            warmup_tokens: options.warmup_tokens as u32,
        },
        machine: Machine { others_busy_share, ..options.machine.clone() },
        costs: None,
        stopped_early,
        skipped,
        samples,
    })
}

/// Both sides in the given order; the error carries the name of the side.
fn both(
    runner: &mut dyn Runner,
    prompt_ids: &[u32],
    options: &RunOptions,
    order: Order,
) -> Result<(RunOutput, RunOutput), (&'static str, BoxError)> {
    match order {
        Order::PlainFirst => {
            let plain = runner.plain(prompt_ids, options).map_err(|e| ("plain", e))?;
            let spec = runner.spec(prompt_ids, options).map_err(|e| ("speculative", e))?;
            Ok((plain, spec))
        }
        Order::SpecFirst => {
            let spec = runner.spec(prompt_ids, options).map_err(|e| ("speculative", e))?;
            let plain = runner.plain(prompt_ids, options).map_err(|e| ("plain", e))?;
            Ok((plain, spec))
        }
    }
}

/// Index of the first difference; a missing token differs from any.
pub fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    (common < a.len() || common < b.len()).then_some(common)
}

fn side(output: &RunOutput) -> Side {
    Side {
        tokens: output.token_ids.len() as u32,
        decode_tokens: output.decode_tokens as u32,
        prefill_ns: nanos(output.prefill),
        decode_ns: nanos(output.decode),
        finish: output.finish,
    }
}

/// Nanoseconds as an integer; 584 years fit.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
