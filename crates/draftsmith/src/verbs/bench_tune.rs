//! `draftsmith bench tune`.

use std::time::Instant;

use draftsmith::Error;
use draftsmith::bench::record::Drafting;
use draftsmith::bench::tune::{GroupOutput, TuneReport, TuneRunner, tune_load, tune_steps, tune_text};
use draftsmith::bench::{BenchError, BoxError};
use draftsmith::cli;
use draftsmith::costs::{used, with_costs};
use draftsmith::decode::{BatchOptions, DraftPlan, Engine, FinishReason, GenerateOptions, Generation};
use draftsmith::engine::engine;
use draftsmith::kernels::Cpu;
use draftsmith::measure::{drafting, first_prompt, machine};
use draftsmith::report::{Report, Stop, Unit};

use super::bench::{read_workloads, target_and_draft, write_json};
use super::{DraftSource, Session};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// What is compared with plain decoding.
const SETTINGS: [DraftPlan; 8] = [
    DraftPlan::Auto,
    DraftPlan::Chain { depth: 1 },
    DraftPlan::Chain { depth: 2 },
    DraftPlan::Chain { depth: 3 },
    DraftPlan::Chain { depth: 5 },
    DraftPlan::Chain { depth: 7 },
    DraftPlan::Tree { depth: 3, top_k: 3, num_draft_tokens: 8 },
    DraftPlan::Tree { depth: 5, top_k: 4, num_draft_tokens: 16 },
];

struct Runner<'a> {
    engine: &'a Engine<Cpu>,
    stop_ids: Vec<u32>,
    max_new_tokens: usize,
    stop: &'a Stop,
}

impl TuneRunner for Runner<'_> {
    fn settings(&self) -> Vec<Drafting> {
        SETTINGS.iter().map(drafting).collect()
    }

    fn decode(&mut self, setting: Option<usize>, prompts: &[&[u32]]) -> Result<GroupOutput, BoxError> {
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            stop_ids: self.stop_ids.clone(),
            draft: setting.map_or(DraftPlan::None, |s| SETTINGS[s]),
            ..GenerateOptions::default()
        };
        let (done, tokens, time): (Vec<Generation>, _, _) = if let [prompt] = prompts {
            let done = self.engine.generate(prompt, &options, &mut |_| self.stop.flow())?;
            let (tokens, time) = (done.token_ids.len().saturating_sub(1), done.decode);
            (vec![done], tokens, time)
        } else {
            let mut queue = prompts.iter().enumerate();
            let mut done: Vec<Option<Generation>> = prompts.iter().map(|_| None).collect();
            let began = Instant::now();
            self.engine.generate_batch(
                BatchOptions { batch_size: prompts.len() },
                &mut || queue.next().map(|(i, prompt)| (i, prompt.to_vec(), options.clone())),
                &mut |i, generation| {
                    done[i] = Some(generation);
                    self.stop.flow()
                },
            )?;
            let time = began.elapsed();
            let done: Vec<Generation> = done.into_iter().flatten().collect();
            let tokens = done.iter().map(|d| d.token_ids.len()).sum();
            (done, tokens, time)
        };
        if done.len() < prompts.len() || done.iter().any(|d| d.finish_reason == FinishReason::Cancelled) {
            return Err("interrupted".into());
        }
        Ok(GroupOutput {
            tokens,
            time,
            verify_steps: done.iter().map(|d| d.stats.verify_steps).sum(),
            committed_tokens: done.iter().map(|d| d.stats.committed_tokens).sum(),
            token_ids: done.into_iter().map(|d| d.token_ids).collect(),
        })
    }
}

pub(crate) fn run(args: &cli::BenchTune, session: &Session) -> Result<u8, Failure> {
    let workloads = read_workloads(&args.workload, Some(args.limit))?;
    let source = DraftSource::needed(args.bundle.as_ref(), args.draft_model.as_ref());
    let (target, draft) = target_and_draft(source, args.target.as_ref(), args.threads, session)?;
    let engine =
        with_costs(engine(&target, Some(&draft)), &session.places, &target, Some(&draft), &session.printer);
    let mut prompts = Vec::new();
    for row in workloads.iter().flat_map(|w| &w.rows) {
        prompts.push(first_prompt(&target.text, row)?);
    }
    let mut runner = Runner {
        engine: &engine,
        stop_ids: target.stop_ids(),
        max_new_tokens: args.max_new_tokens as usize,
        stop: &session.stop,
    };
    // The first passes over the weights are slower.
    if let Some(first) = prompts.first() {
        let warm = runner.decode(Some(0), &[first]);
        warm.map_err(|source| Error::from(BenchError::Kernels { source }))?;
    }
    let steps = |n: &u32| tune_steps(SETTINGS.len(), prompts.len(), *n as usize);
    let total: usize = args.sequences.iter().map(steps).sum();
    session.printer.begin("bench tune", Some(total as u64), Unit::Steps);
    let mut loads = Vec::new();
    let mut before = 0;
    for n in &args.sequences {
        let load = tune_load(&mut runner, &prompts, *n as usize, &mut |done| {
            session.printer.at((before + done) as u64);
        });
        if session.stop.requested() {
            session.printer.end();
            return Err(Failure::interrupted("interrupted: nothing was written", None));
        }
        loads.push(load.map_err(Error::from)?);
        before += steps(n);
    }
    session.printer.end();
    let report = TuneReport {
        loads,
        prompts: prompts.len(),
        max_new_tokens: args.max_new_tokens as usize,
        threads: target.threads as u32,
        target: target.artifact(),
        draft: draft.artifact.clone(),
        machine: machine(target.target.kernels()),
        costs: used(&engine, &session.places, &target, Some(&draft)),
    };
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        printer::out(&tune_text(&report))?;
    }
    Ok(if report.identical() { 0 } else { NOT_HELD })
}
