//! `draftsmith bench` and `draftsmith bench kernels`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith::bench::kernels::{KernelOptions, kernels_text, run_kernels};
use draftsmith::bench::{
    Contract, MeasureOptions, Progress, Record, RunOptions, Workload, report_html, run_workload, table,
};
use draftsmith::cli;
use draftsmith::core::VerifyRule;
use draftsmith::costs::{used, with_costs};
use draftsmith::decode::DraftPlan;
use draftsmith::device::Backend;
use draftsmith::engine::engine;
use draftsmith::formats::atomic;
use draftsmith::measure::{EngineRunner, TargetPasses, TemplateDialogue, drafting, machine};
use draftsmith::report::{Report, Unit};
use draftsmith::{Error, bench};

use super::generate::{DEFAULT_DEPTH, plan, rule, sampling};
use super::{DraftSource, OnDevice, Session, target_and_draft};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// Tokens decoded by each side before the first sample.
const WARMUP_TOKENS: usize = 16;

/// Writes a JSON value to a file, or prints it for `-`.
pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Failure> {
    if cli::is_stdout(path) {
        return printer::json(value);
    }
    let text = serde_json::to_string_pretty(value).expect("results hold only what JSON can say");
    Ok(atomic::write(path, text + "\n").map_err(Error::from)?)
}

/// The first `limit` rows of each file.
pub(super) fn read_workloads(files: &[PathBuf], limit: Option<u32>) -> Result<Vec<Workload>, Failure> {
    let read = |file| Workload::read(file, limit.map(|l| l as usize));
    Ok(files.iter().map(read).collect::<Result<_, _>>().map_err(Error::from)?)
}

pub(crate) fn workloads(args: &cli::Bench, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::Bench {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        measure(self, session, kernels)
    }
}

fn measure<K: Backend>(args: &cli::Bench, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let source = DraftSource::needed(args.bundle.as_ref(), args.draft_model.as_ref());
    let sampling = sampling(&args.choosing)?;
    let plan = plan(&args.drafting).unwrap_or(DraftPlan::Chain { depth: DEFAULT_DEPTH as usize });
    let verify = rule(&args.verifying, &args.drafting, &sampling)?;
    // Wrong files are told before a model is fetched.
    let workloads = read_workloads(&args.workload, args.limit)?;
    let (target, draft) = target_and_draft(kernels, source, args.target.as_ref(), session)?;
    let mut engine = engine(&target, Some(&draft));
    if plan == DraftPlan::Auto {
        engine = with_costs(engine, &session.places, &target, Some(&draft), &session.printer);
    }
    let options = MeasureOptions {
        run: RunOptions { max_new_tokens: args.max_new_tokens as usize, sampling, verify },
        repeats: args.repeats as usize,
        warmup_tokens: WARMUP_TOKENS,
        drafting: drafting(&plan),
        threads: target.threads as u32,
        target: target.artifact(),
        draft: draft.artifact.clone(),
        machine: machine(kernels.as_ref()),
    };
    let mut records: Vec<Record> = Vec::new();
    for workload in &workloads {
        let mut runner =
            EngineRunner { engine: &engine, plan, stop_ids: target.stop_ids(), stop: &session.stop };
        let mut dialogue = TemplateDialogue { text: &target.text };
        session.printer.begin(
            &format!("bench {}", workload.name),
            Some(workload.rows.len() as u64),
            Unit::Rows,
        );
        let record =
            run_workload(&mut runner, &mut dialogue, workload, &options, &mut |p| progress(p, session));
        session.printer.end();
        match record {
            _ if session.stop.requested() => {
                return Err(Failure::interrupted("interrupted: nothing was written", None));
            }
            Ok(mut record) => {
                record.costs =
                    (plan == DraftPlan::Auto).then(|| used(&engine, &session.places, &target, Some(&draft)));
                records.push(record);
            }
            Err(error) => return Err(Error::from(error).into()),
        }
    }
    if let Some(folder) = &args.report {
        write_report(folder, &records)?;
    }
    let contract = Contract::of_all(&records).ok_or_else(|| {
        Failure::input("nothing was measured", Some("name a workload with `--workload FILE`".to_string()))
    })?;
    match &args.json {
        Some(path) => {
            write_json(path, &contract)?;
            if !cli::is_stdout(path) {
                printer::out(&table::text(&records))?;
            }
        }
        None => printer::out(&table::text(&records))?,
    }
    Ok(if contract.identical || verify != VerifyRule::Seeded { 0 } else { NOT_HELD })
}

/// Raw records and the page made from them.
pub(crate) fn write_report(folder: &Path, records: &[Record]) -> Result<(), Failure> {
    atomic::create_dir_all(folder).map_err(Error::from)?;
    for record in records {
        let text = record.to_json().map_err(Error::from)?;
        atomic::write(folder.join(format!("{}.json", record.workload.name)), text).map_err(Error::from)?;
    }
    let html = report_html(records).map_err(Error::from)?;
    Ok(atomic::write(folder.join("report.html"), html).map_err(Error::from)?)
}

pub(crate) fn progress(p: &Progress<'_>, session: &Session) -> ControlFlow<()> {
    session.printer.at(p.rows_done as u64);
    let (committed, steps) = p.samples.iter().fold((0u64, 0u64), |(c, s), sample| {
        (c + sample.accept.committed_tokens, s + sample.accept.verify_steps)
    });
    if steps > 0 {
        session.printer.detail(&format!("accept length {:.2}", committed as f64 / steps as f64));
    }
    session.stop.flow()
}

pub(crate) fn kernels(args: &cli::BenchKernels, session: &Session) -> Result<u8, Failure> {
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::BenchKernels {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        time(self, session, kernels)
    }
}

fn time<K: Backend>(args: &cli::BenchKernels, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let target = session.load_target_on(kernels, std::slice::from_ref(&args.target), None, args.f32)?;
    let context = target.target.config().max_position;
    let mut options = KernelOptions::default();
    // A small model's context may be shorter than what is measured by default.
    options.prefill_tokens = options.prefill_tokens.min(context);
    options.context_tokens = args.context.map_or(options.context_tokens.min(context / 2), |c| c as usize);
    options.decode_tokens = options.decode_tokens.min(context / 4);
    let longest = options.context_tokens + options.decode_tokens.max(32);
    if longest > context {
        return Err(Failure::input(
            format!(
                "`--context {}` and the passes behind it need {longest} positions, the target has {context}",
                options.context_tokens
            ),
            Some("lower `--context`".to_string()),
        ));
    }
    session.printer.begin("bench kernels", None, Unit::Steps);
    let report = run_kernels(
        &mut TargetPasses::new(&target),
        &options,
        target.artifact(),
        target.threads as u32,
        machine(kernels.as_ref()),
        &mut |done, _| session.printer.at(done as u64),
    );
    session.printer.end();
    let report: bench::kernels::KernelReport = report.map_err(Error::from)?;
    match &args.json {
        Some(path) => {
            write_json(path, &report)?;
            if !cli::is_stdout(path) {
                printer::out(&kernels_text(&report))?;
            }
        }
        None => printer::out(&kernels_text(&report))?,
    }
    Ok(0)
}
