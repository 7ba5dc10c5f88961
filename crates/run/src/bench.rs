//! Stage `bench`: the finished bundle against target-only decoding, then once more the bundle, with its results.

use std::path::Path;

use draftsmith_bench::record::Drafting;
use draftsmith_bench::{
    BASELINE, Contract, MeasureOptions, Record, ReportOptions, RunOptions, TrainingCurve, TrainingPoint,
    Workload, report_html_with, run_workload, summarize,
};
use draftsmith_bundle::{Measured, MeasuredResult, Shape};
use draftsmith_core::report::{Report, Unit};
use draftsmith_core::{Sampling, VerifyRule};
use draftsmith_decode::DraftPlan;
use draftsmith_formats::atomic;
use draftsmith_formats::run::Stage;
use draftsmith_kernels::PackMode;
use serde_json::{Value, json};

use super::state::REPORT;
use super::{Run, StageDone};
use crate::Error;
use crate::costs::{used, with_costs};
use crate::curve::Curve;
use crate::engine::{draft_plan, engine, load_draft};
use crate::measure::{EngineRunner, TemplateDialogue, drafting, machine};
use crate::rules::{Facts, Warning, warnings};
use crate::verdict::{Best, Names, verdict};

/// Tokens decoded by each side before the first sample.
const WARMUP_TOKENS: usize = 16;

impl Run<'_> {
    pub(super) fn bench(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let table = &self.file.bench;
        let target = self.target()?;
        let bundle = self.file.bundle_dir();
        let draft = load_draft(&bundle, target, PackMode::Q8)?;
        let plan = match &table.tree {
            None => draft_plan(table.depth, None),
            Some(tree) => draft_plan(tree.depth, Some((tree.top_k, Some(tree.nodes)))),
        };
        let mut engine = engine(target, Some(&draft));
        let mut plans = vec![plan];
        if table.auto {
            engine = with_costs(engine, self.env.places, target, Some(&draft), report);
            plans.push(DraftPlan::Auto);
        }
        let options = |plan: &DraftPlan| MeasureOptions {
            run: RunOptions {
                max_new_tokens: table.max_new_tokens as usize,
                sampling: Sampling::GREEDY,
                verify: VerifyRule::Seeded,
            },
            repeats: 1,
            warmup_tokens: WARMUP_TOKENS,
            drafting: drafting(plan),
            threads: target.threads as u32,
            target: target.artifact(),
            draft: draft.artifact.clone(),
            machine: machine(target.target.kernels().as_ref()),
        };
        atomic::create_dir_all(dir)?;
        let mut records = Vec::new();
        let measured_plans =
            table.workloads.iter().flat_map(|path| plans.iter().map(move |plan| (path, *plan)));
        for (path, plan) in measured_plans {
            let workload = Workload::read(path, table.limit.map(|l| l as usize))?;
            let options = options(&plan);
            let end = if plan == DraftPlan::Auto { "-auto" } else { "" };
            let file = dir.join(format!("{}{end}.json", workload.name));
            // A record that is there was finished before an interruption.
            if let Ok(text) = std::fs::read_to_string(&file)
                && let Ok(record) = Record::from_json(&workload.name, &text)
                && record.workload.sha256 == workload.sha256
                && record.draft == options.draft
                && record.settings.drafting == options.drafting
            {
                records.push(record);
                continue;
            }
            let mut runner =
                EngineRunner { engine: &engine, plan, stop_ids: target.stop_ids(), stop: self.env.stop };
            let mut dialogue = TemplateDialogue { text: &target.text };
            let title = format!("bench {}, {}", workload.name, options.drafting.label());
            report.begin(&title, Some(workload.rows.len() as u64), Unit::Rows);
            let record = run_workload(&mut runner, &mut dialogue, &workload, &options, &mut |p| {
                report.at(p.rows_done as u64);
                self.env.stop.flow()
            });
            report.end();
            self.check_stop(Stage::Bench)?;
            let mut record = record?;
            record.costs =
                (plan == DraftPlan::Auto).then(|| used(&engine, self.env.places, target, Some(&draft)));
            atomic::write(&file, record.to_json()?)?;
            records.push(record);
        }
        let curve = self.training_curve();
        let best = Best::of(&records);
        let verdict = verdict(best.as_ref(), &self.told()?, &self.names());
        let paragraph = verdict.paragraph();
        let options = ReportOptions { title: None, training: curve, verdict: Some(paragraph.clone()) };
        let html = report_html_with(&records, &options)?;
        atomic::write(dir.join(REPORT), &html)?;
        draftsmith_bench::table::text(&records).lines().for_each(|line| report.note(line));
        let results = records.iter().map(measured).collect::<Result<Vec<_>, _>>()?;
        let key = self.folder.read(Stage::Bundle)?.map(|f| f.key).unwrap_or_default();
        self.make_bundle(&bundle, &key, results, Some((html, paragraph)))?;
        // An accept length over several ways to draft would be that of none of them.
        let plans: Vec<Value> = plans.iter().map(|plan| of_plan(&records, plan)).collect();
        let mut results = json!(Contract::of_all(&records));
        let mut summary = json!({ "report": self.in_folder(&dir.join(REPORT)) });
        if let [first, _, ..] = plans.as_slice() {
            let identical = plans.iter().all(|plan| plan["identical"] != false);
            results = first.clone();
            results["identical"] = identical.into();
            summary["plans"] = plans.into();
        }
        summary["results"] = results;
        summary["verdict"] = json!(verdict);
        Ok(summary)
    }

    /// The verdict on a run whose stages are done: that of the measurement, or that there is none.
    ///
    /// # Errors
    /// Stage files that cannot be read.
    pub fn verdict(&self, done: &[StageDone]) -> Result<Value, Error> {
        let measured = done.iter().find(|d| d.stage == Stage::Bench).map(|d| &d.file.summary["verdict"]);
        // A measurement of an earlier version has none.
        if let Some(verdict) = measured.filter(|verdict| verdict.is_object()) {
            return Ok(verdict.clone());
        }
        let folder = self.folder.stage_dir(Stage::Bench);
        let mut records: Vec<Record> = Vec::new();
        for path in self.file.bench.workloads.iter().filter(|_| measured.is_some()) {
            let name = Workload::read(path, Some(1))?.name;
            for end in ["", "-auto"] {
                let text =
                    std::fs::read_to_string(folder.join(format!("{name}{end}.json"))).unwrap_or_default();
                records.extend(Record::from_json(&name, &text));
            }
        }
        let best = Best::of(&records);
        Ok(json!(verdict(best.as_ref(), &self.told()?, &self.names())))
    }

    /// What the finished stages let expect of the draft.
    fn told(&self) -> Result<Vec<Warning>, Error> {
        let summary = |stage| -> Result<Value, Error> {
            Ok(self.folder.read(stage)?.map_or(Value::Null, |file| file.summary))
        };
        let (data, train) = (summary(Stage::Data)?, summary(Stage::Train)?);
        let tokens = if self.file.regenerate.enabled { summary(Stage::Regenerate)? } else { data.clone() };
        let all = tokens["tokens"].as_u64().filter(|tokens| *tokens > 0);
        let held =
            data["validation_rows"].as_u64().map(|rows| rows.min(u64::from(self.file.validate.prompts)));
        Ok(warnings(&Facts {
            rows: tokens["dialogues"].as_u64().or(data["rows"].as_u64()),
            given: data["rows"].as_u64(),
            trained_tokens: tokens["trained_tokens"].as_u64(),
            steps: train["steps"].as_u64(),
            passes: all.zip(train["slots"].as_u64()).map(|(all, slots)| slots as f64 / all as f64),
            held_out: held.filter(|_| self.file.validate.every > 0),
            ..self.facts(None, train["vocab_coverage"].as_f64())
        }))
    }

    /// What commands of the verdict are made of.
    fn names(&self) -> Names {
        let train = &self.file.train;
        let mut further = Vec::new();
        if let Some(max) = self.file.regenerate.max_tokens.filter(|_| self.file.regenerate.enabled) {
            further.push(format!("regenerate.max_tokens={}", 2 * max));
        }
        match train.max_steps {
            Some(steps) => further.push(format!("train.max_steps={}", 2 * steps)),
            None if f64::from(train.epochs) * 2.0 <= crate::rules::MOST_PASSES => {
                further.push(format!("train.epochs={}", 2 * train.epochs));
            }
            None => {}
        }
        let mut run = self.origin.resume();
        // Whichever verb came this far, the way on is the whole run.
        if let Some(rest) = run.strip_prefix(&format!("draftsmith {} ", self.origin.verb)) {
            run = format!("draftsmith run {rest}");
        }
        Names {
            bundle: self.file.bundle_dir(),
            run,
            target: self.file.from_here().target.source.0.swap_remove(0),
            anew: format!("{}-more", self.file.run.name),
            workloads: self.file.bench.workloads.clone(),
            further,
        }
    }

    /// Validations of the training log.
    fn training_curve(&self) -> Option<TrainingCurve> {
        let rows = self.file.validate.prompts as usize;
        let mut curve = TrainingCurve::default();
        for point in Curve::of(&self.folder)?.validations {
            let interval = match (point.low, point.high) {
                (Some(low), Some(high)) => Some(draftsmith_bench::Interval { low, high }),
                _ => None,
            };
            let (step, value) = (point.step, point.accept_len);
            curve.measured_accept_len.push(TrainingPoint { step, value, interval, rows });
        }
        (!curve.measured_accept_len.is_empty()).then_some(curve)
    }
}

/// What was measured of one way to draft, over all workloads.
fn of_plan(records: &[Record], plan: &DraftPlan) -> Value {
    let drafting = drafting(plan);
    let own: Vec<Record> = records.iter().filter(|r| r.settings.drafting == drafting).cloned().collect();
    let mut results = json!(Contract::of_all(&own));
    results["drafting"] = drafting.label().into();
    results
}

/// A record as the bundle's tables show it.
pub(crate) fn measured(record: &Record) -> Result<MeasuredResult, Error> {
    let summary = summarize(record);
    let estimate = |e: &Option<draftsmith_bench::Estimate>| {
        e.map(|e| Measured { value: e.value, ci95: e.interval.map(|i| [i.low, i.high]) })
    };
    let settings = &record.settings;
    Ok(MeasuredResult {
        workload: record.workload.name.clone(),
        drafting: settings.drafting.label(),
        shape: match settings.drafting {
            Drafting::Auto => None,
            Drafting::Chain { depth } => Some(Shape { depth, num_draft_tokens: depth, top_k: 1 }),
            Drafting::Tree { depth, top_k, num_draft_tokens } => {
                Some(Shape { depth, num_draft_tokens, top_k })
            }
        },
        sampling: match settings.temperature <= 0.0 {
            true => "greedy".to_string(),
            false => format!("temperature {}, top-p {}", settings.temperature, settings.top_p),
        },
        rows: summary.rows as u64,
        samples: summary.samples as u64,
        identical_samples: summary.identical_samples as u64,
        verify_steps: summary.accept.verify_steps,
        accept_len: estimate(&summary.accept_len),
        accept_rate_at: summary.accept_rate_at.iter().map(|e| e.value).collect(),
        plain_tokens_per_s: summary.plain_tokens_per_s.map(|e| e.value),
        spec_tokens_per_s: summary.spec_tokens_per_s.map(|e| e.value),
        speedup: estimate(&summary.speedup),
        baseline: BASELINE.to_string(),
        machine: format!("{}, {} threads", record.machine.cpu, settings.threads),
        doubts: summary.doubts.iter().map(|d| d.message()).collect(),
        record_json: record.to_json()?,
    })
}
