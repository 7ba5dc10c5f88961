//! `draftsmith bench tune`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use draftsmith::Error;
use draftsmith::bench::record::Drafting;
use draftsmith::bench::tune::{
    GroupOutput, LoadResult, TuneReport, TuneRunner, tune_load, tune_steps, tune_text,
};
use draftsmith::bench::{BenchError, BoxError};
use draftsmith::bundle::{Tuned, TunedDrafting};
use draftsmith::cli;
use draftsmith::costs::{used, with_costs};
use draftsmith::decode::{BatchOptions, DraftPlan, Engine, FinishReason, GenerateOptions, Generation};
use draftsmith::device::Backend;
use draftsmith::engine::engine;
use draftsmith::imports::write_tuned;
use draftsmith::kernels::Kernels;
use draftsmith::measure::{drafting, first_prompt, machine};
use draftsmith::report::{Report, Stop, Unit};

use super::bench::{read_workloads, write_json};
use super::{DraftSource, OnDevice, Session, target_and_draft};
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

struct Runner<'a, K: Kernels> {
    engine: &'a Engine<K>,
    stop_ids: Vec<u32>,
    max_new_tokens: usize,
    stop: &'a Stop,
}

impl<K: Kernels> TuneRunner for Runner<'_, K> {
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
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::BenchTune {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        tune(self, session, kernels)
    }
}

fn tune<K: Backend>(args: &cli::BenchTune, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    if args.write && !args.sequences.contains(&1) {
        return Err(Failure::input(
            "`--write` keeps the fastest setting for one sequence, and `--sequences` has no 1",
            Some("give `--sequences 1,8`, or leave `--write` out".to_string()),
        ));
    }
    if let Some(bundle) = args.bundle.as_ref().filter(|_| args.write) {
        session.shelf().check_own(bundle)?;
    }
    let workloads = read_workloads(&args.workload, Some(args.limit))?;
    let source = DraftSource::needed(args.bundle.as_ref(), args.draft_model.as_ref());
    let (target, draft) = target_and_draft(kernels, source, args.target.as_ref(), session)?;
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
        machine: machine(kernels.as_ref()),
        costs: used(&engine, &session.places, &target, Some(&draft)),
    };
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        printer::out(&tune_text(&report))?;
    }
    if args.write {
        write(&report, args.bundle.as_deref(), session)?;
    }
    Ok(if report.identical() { 0 } else { NOT_HELD })
}

/// The setting that a bundle is given: the fastest for one sequence.
///
/// A fixed shape is kept only where it is shown to beat the automatic plan and loses to it at none of the loads: that one
/// adapts, and falls silent where drafting loses. Decoding without the draft is kept where nothing was faster at any load.
fn chosen(one: &LoadResult, report: &TuneReport) -> Tuned {
    let of = |load: &LoadResult, drafting: Option<Drafting>| {
        load.settings.iter().find(|s| s.drafting == drafting).and_then(|s| s.speedup)
    };
    let best = one.settings.iter().find(|s| s.name == one.best);
    let shape = best.and_then(|s| s.drafting);
    let auto = of(one, Some(Drafting::Auto)).map_or(1.0, |e| e.value.max(1.0));
    let beats = best.and_then(|s| s.speedup?.interval).is_some_and(|interval| interval.low > auto);
    let holds = report.loads.iter().all(|load| {
        let here = of(load, shape).map_or(1.0, |e| e.value);
        here >= of(load, Some(Drafting::Auto)).map_or(1.0, |e| e.value.max(1.0))
    });
    let is_plain =
        |load: &LoadResult| load.settings.iter().any(|s| s.name == load.best && s.drafting.is_none());
    let drafting = match shape {
        None if report.loads.iter().all(is_plain) => TunedDrafting::Plain,
        Some(Drafting::Chain { depth }) if beats && holds => TunedDrafting::Chain { depth },
        Some(Drafting::Tree { depth, top_k, num_draft_tokens }) if beats && holds => {
            TunedDrafting::Tree { depth, top_k, num_draft_tokens }
        }
        _ => TunedDrafting::Auto,
    };
    let speedup = best.and_then(|s| s.speedup).map_or_else(
        || "no setting was faster than the target alone for one sequence".to_string(),
        |e| {
            let interval = e.interval.map_or_else(String::new, |i| format!(" [{:.2}, {:.2}]", i.low, i.high));
            format!(
                "fastest for one sequence was {}, {:.2}x{interval} over the target alone",
                one.best, e.value
            )
        },
    );
    let kept = name(drafting);
    let doubt = match one.best == kept {
        true => String::new(),
        false => format!(", not shown to beat {kept} at every load"),
    };
    let because = format!(
        "{speedup}{doubt}; {} prompts, {}, {} threads",
        report.prompts, report.machine.cpu, report.threads
    );
    Tuned { drafting, because }
}

/// As the table names it.
fn name(tuned: TunedDrafting) -> String {
    let shape = match tuned {
        TunedDrafting::Plain => return "plain".to_owned(),
        TunedDrafting::Auto => Drafting::Auto,
        TunedDrafting::Chain { depth } => Drafting::Chain { depth },
        TunedDrafting::Tree { depth, top_k, num_draft_tokens } => {
            Drafting::Tree { depth, top_k, num_draft_tokens }
        }
    };
    shape.short_label()
}

fn write(report: &TuneReport, bundle: Option<&Path>, session: &Session) -> Result<(), Failure> {
    let load = report.loads.iter().find(|load| load.sequences == 1);
    // Looked at before anything was measured.
    let (Some(load), Some(bundle)) = (load, bundle) else { return Ok(()) };
    let tuned = chosen(load, report);
    let line = format!("written into `{}`: {}; {}", bundle.display(), name(tuned.drafting), tuned.because);
    write_tuned(bundle, tuned)?;
    session.printer.note(&line);
    Ok(())
}

#[cfg(test)]
mod tests {
    use draftsmith::bench::record::{ArtifactInfo, CostsInfo, Machine};
    use draftsmith::bench::tune::SettingResult;
    use draftsmith::bench::{Estimate, Interval};

    use super::*;

    fn load(sequences: usize, best: &str, chain: (f64, f64), auto: (f64, f64)) -> LoadResult {
        let result = |drafting: Option<Drafting>, speedup: Option<(f64, f64)>| SettingResult {
            name: drafting.map_or("plain".to_string(), |d| d.short_label()),
            drafting,
            tokens_per_s: None,
            speedup: speedup.map(|(value, low)| Estimate {
                value,
                interval: Some(Interval { low, high: 2.0 * value - low }),
                rows: 8,
            }),
            accept_len: None,
            identical: true,
        };
        let settings = vec![
            result(None, None),
            result(Some(Drafting::Chain { depth: 3 }), Some(chain)),
            result(Some(Drafting::Auto), Some(auto)),
        ];
        LoadResult { sequences, settings, best: best.to_string() }
    }

    #[track_caller]
    fn check(loads: Vec<LoadResult>, expected: TunedDrafting) {
        let report = TuneReport {
            loads,
            prompts: 8,
            max_new_tokens: 96,
            threads: 2,
            target: ArtifactInfo::default(),
            draft: ArtifactInfo::default(),
            machine: Machine::default(),
            costs: CostsInfo::default(),
        };
        let tuned = chosen(&report.loads[0], &report);
        assert_eq!(tuned.drafting, expected);
        let doubted = tuned.because.contains(&format!("not shown to beat {} at every load", name(expected)));
        assert_eq!(doubted, name(expected) != report.loads[0].best, "{}", tuned.because);
    }

    #[test]
    fn a_fixed_shape_is_kept_only_where_it_is_shown_to_beat_the_automatic_plan() {
        let chain = TunedDrafting::Chain { depth: 3 };
        check(vec![load(1, "chain 3", (1.4, 1.3), (1.2, 1.1))], chain);
        check(vec![load(1, "chain 3", (1.4, 1.15), (1.2, 1.1))], TunedDrafting::Auto);
        check(vec![load(1, "chain 3", (1.02, 0.9), (0.95, 0.9))], TunedDrafting::Auto);
        check(vec![load(1, "auto", (1.2, 1.1), (1.4, 1.3))], TunedDrafting::Auto);
        let many = load(8, "auto", (0.75, 0.7), (0.98, 0.9));
        check(vec![load(1, "chain 3", (1.4, 1.3), (1.2, 1.1)), many], TunedDrafting::Auto);
        check(vec![load(1, "plain", (0.8, 0.7), (0.9, 0.8))], TunedDrafting::Plain);
        let many = load(8, "auto", (0.9, 0.8), (1.2, 1.1));
        check(vec![load(1, "plain", (0.8, 0.7), (0.9, 0.8)), many], TunedDrafting::Auto);
    }
}
