//! `draftsmith bench compare`.

use std::sync::Arc;

use draftsmith::Error;
use draftsmith::bench::compare::{
    CompareReport, CompareRunner, ComparedDraft, SideInfo, compare_markdown, compare_text, compare_workload,
    mean_speedups,
};
use draftsmith::bench::{BenchError, BoxError, BusyTimes, RunOptions, RunOutput, Runner};
use draftsmith::bundle::WEIGHTS_FILE;
use draftsmith::cli;
use draftsmith::core::{Sampling, VerifyRule};
use draftsmith::costs::{used, with_costs};
use draftsmith::decode::{DraftPlan, Engine};
use draftsmith::device::Backend;
use draftsmith::engine::{LoadedDraft, engine};
use draftsmith::formats::atomic;
use draftsmith::kernels::{Kernels, PackMode};
use draftsmith::measure::{EngineRunner, busy_times_with, drafting, first_prompt, machine};
use draftsmith::report::{Report, Stop, Unit};

use super::bench::{read_workloads, write_json};
use super::{DraftSource, OnDevice, Session, target_and_draft};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// Tokens of the first pass of a side, which is slower and not counted.
const WARMUP_TOKENS: usize = 16;

struct Sides<'a, K: Kernels> {
    /// One per draft, and one that has none.
    engines: &'a [Engine<K>],
    /// Number of an engine, and its plan.
    sides: &'a [(usize, DraftPlan)],
    stop_ids: Vec<u32>,
    max_new_tokens: usize,
    stop: &'a Stop,
}

impl<K: Kernels> Sides<'_, K> {
    fn run(&self, side: Option<usize>, prompt: &[u32], limit: usize) -> Result<RunOutput, BoxError> {
        let (engine, plan) = side.map_or((self.engines.len() - 1, DraftPlan::None), |s| self.sides[s]);
        let mut runner = EngineRunner {
            engine: &self.engines[engine],
            plan,
            stop_ids: self.stop_ids.clone(),
            stop: self.stop,
        };
        let options = RunOptions {
            max_new_tokens: limit,
            sampling: Sampling::default(),
            verify: VerifyRule::default(),
        };
        match side {
            None => runner.plain(prompt, &options),
            Some(_) => runner.spec(prompt, &options),
        }
    }
}

impl<K: Kernels> CompareRunner for Sides<'_, K> {
    fn decode(&mut self, side: Option<usize>, prompt: &[u32]) -> Result<RunOutput, BoxError> {
        self.run(side, prompt, self.max_new_tokens)
    }
}

/// Names for people, none twice: the draft's own, else with its folder, else with a number.
fn names<K: Kernels>(drafts: &[LoadedDraft<K>]) -> Vec<String> {
    let own = |draft: &LoadedDraft<K>| draft.artifact.name.clone();
    let with_place = |draft: &LoadedDraft<K>| {
        let place = draft.path.components().rev().take(2).collect::<Vec<_>>();
        let place: Vec<_> = place.iter().rev().map(|c| c.as_os_str().to_string_lossy()).collect();
        format!("{} ({})", draft.artifact.name, place.join("/"))
    };
    let unique = |names: &[String]| {
        let mut sorted: Vec<&String> = names.iter().collect();
        sorted.sort_unstable();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    let first: Vec<String> = drafts.iter().map(own).collect();
    if unique(&first) {
        return first;
    }
    let second: Vec<String> = drafts.iter().map(with_place).collect();
    if unique(&second) {
        return second;
    }
    second.into_iter().enumerate().map(|(number, name)| format!("{name} {}", number + 1)).collect()
}

/// Runs the verb.
pub(crate) fn run(args: &cli::BenchCompare, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::BenchCompare {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        compare(self, session, kernels)
    }
}

fn compare<K: Backend>(args: &cli::BenchCompare, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    // Wrong files are told before a model is fetched.
    let workloads = read_workloads(&args.workload, Some(args.limit))?;
    let bundles = args.bundle.iter().map(|dir| DraftSource::Bundle(dir));
    let sources: Vec<DraftSource<'_>> =
        bundles.chain(args.draft_model.iter().map(|reference| DraftSource::Model(reference))).collect();
    let (target, first) = target_and_draft(kernels, sources[0], args.target.as_ref(), session)?;
    let mut drafts = vec![first];
    for source in &sources[1..] {
        drafts.push(session.load_source(*source, &target, PackMode::Q8)?);
    }
    let mut engines = Vec::new();
    for draft in drafts.iter().map(Some).chain([None]) {
        let plain = engine(&target, draft);
        engines.push(with_costs(plain, &session.places, &target, draft, &session.printer));
    }
    let alone = DraftPlan::Chain { depth: args.depth as usize };
    let mut sides: Vec<(usize, DraftPlan)> =
        (0..drafts.len()).flat_map(|draft| [(draft, alone), (draft, DraftPlan::Auto)]).collect();
    sides.push((drafts.len(), DraftPlan::Auto));

    let mut runner = Sides {
        engines: &engines,
        sides: &sides,
        stop_ids: target.stop_ids(),
        max_new_tokens: args.max_new_tokens as usize,
        stop: &session.stop,
    };
    let interrupted = || Failure::interrupted("interrupted: nothing was written", None);
    let prompts_of = |workload: &draftsmith::bench::Workload| -> Result<Vec<Vec<u32>>, Failure> {
        let context = target.target.config().max_position;
        let mut prompts = Vec::new();
        for row in &workload.rows {
            let prompt = first_prompt(&target.text, row)?;
            if prompt.len() + args.max_new_tokens as usize > context {
                session.printer.note(&format!(
                    "row `{}` of `{}` is left out: its {} tokens and {} new ones do not fit a context of {context}",
                    row.id,
                    workload.name,
                    prompt.len(),
                    args.max_new_tokens
                ));
                continue;
            }
            prompts.push(prompt);
        }
        if prompts.is_empty() {
            return Err(Failure::input(
                format!("no row of `{}` fits the target's context", workload.name),
                Some("lower `--max-new-tokens`".to_string()),
            ));
        }
        Ok(prompts)
    };
    let prompts: Vec<Vec<Vec<u32>>> = workloads.iter().map(prompts_of).collect::<Result<_, _>>()?;
    // The first passes over the weights are slower.
    for side in (0..sides.len()).map(Some).chain([None]) {
        let warm = runner.run(side, &prompts[0][0], WARMUP_TOKENS.min(args.max_new_tokens as usize));
        if session.stop.requested() {
            return Err(interrupted());
        }
        warm.map_err(|source| Error::from(BenchError::Kernels { source }))?;
    }
    let turns = sides.len() + 1;
    let total: usize = prompts.iter().map(|p| p.len() * turns).sum();
    session.printer.begin("bench compare", Some(total as u64), Unit::Steps);
    let busy_before = busy_times_with(None);
    let (mut done, mut compared) = (0, Vec::new());
    for (workload, prompts) in workloads.iter().zip(&prompts) {
        session.printer.detail(&workload.name);
        let one =
            compare_workload(&mut runner, sides.len(), &workload.name, &workload.sha256, prompts, &mut |n| {
                session.printer.at((done + n) as u64)
            });
        if session.stop.requested() {
            session.printer.end();
            return Err(interrupted());
        }
        compared.push(one.map_err(Error::from)?);
        done += prompts.len() * turns;
    }
    session.printer.end();
    let busy = busy_before.zip(busy_times_with(None)).and_then(|(a, b)| BusyTimes::others_share(a, b));

    let described =
        drafts.iter().zip(names(&drafts)).zip(&engines).map(|((draft, name), engine)| ComparedDraft {
            name,
            draft: draft.artifact.clone(),
            weights_bytes: draft
                .manifest
                .as_ref()
                .and_then(|_| std::fs::metadata(draft.path.join(WEIGHTS_FILE)).ok())
                .map(|file| file.len()),
            costs: used(engine, &session.places, &target, Some(draft)).measured,
        });
    let report = CompareReport {
        drafts: described.collect(),
        sides: sides
            .iter()
            .map(|(draft, plan)| SideInfo {
                draft: Some(*draft).filter(|d| *d < drafts.len()),
                drafting: drafting(plan),
            })
            .collect(),
        mean_speedup: mean_speedups(sides.len(), &compared),
        workloads: compared,
        max_new_tokens: args.max_new_tokens as usize,
        threads: target.threads as u32,
        target: target.artifact(),
        machine: draftsmith::bench::record::Machine { others_busy_share: busy, ..machine(kernels.as_ref()) },
    };
    if let Some(path) = &args.markdown {
        atomic::write(path, compare_markdown(&report)).map_err(Error::from)?;
    }
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        printer::out(&compare_text(&report))?;
    }
    Ok(if report.identical() { 0 } else { NOT_HELD })
}
