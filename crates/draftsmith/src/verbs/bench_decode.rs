//! `draftsmith bench decode`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith::bench::decode::{DecodeOptions, DecodeRow, Side, SideCosts, Timed, decode_text, run_decode};
use draftsmith::bench::kernels::KernelRunner;
use draftsmith::bench::{BoxError, BusyTimes, RunOptions, Runner, Workload};
use draftsmith::cli;
use draftsmith::core::{Sampling, VerifyRule};
use draftsmith::costs::with_costs;
use draftsmith::decode::{BatchOptions, DraftPlan, Engine, GenerateOptions};
use draftsmith::device::Backend;
use draftsmith::engine::engine;
use draftsmith::formats::run::Device;
use draftsmith::kernels::{Kernels, PackMode};
use draftsmith::measure::{
    EngineRunner, TargetPasses, busy_times_with, first_prompt, machine, peak_memory_bytes,
};
use draftsmith::peer::Peer;
use draftsmith::report::{Report, Unit};
use draftsmith::{Error, bench};
use serde::Serialize;

use super::bench::write_json;
use super::{DraftSource, OnDevice, Session, target_sources};
use crate::failure::Failure;
use crate::printer;

/// Rounds of the prefill measurement.
const PREFILL_ROUNDS: usize = 5;

/// Rounds of the passes, their rows, and the context in front of them.
const STEP_ROUNDS: usize = 9;
const STEP_ROWS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const STEP_CONTEXT: usize = 256;

/// Our engine as a side.
struct Ours<'a, K: Kernels> {
    runner: EngineRunner<'a, K>,
    /// Passes of the target, for plain decoding.
    passes: Option<TargetPasses<K>>,
    load_s: f64,
}

impl<K: Backend> Side for Ours<'_, K> {
    fn name(&self) -> String {
        match self.runner.plan {
            DraftPlan::None => concat!("draftsmith ", env!("CARGO_PKG_VERSION")).to_owned(),
            _ => concat!("draftsmith ", env!("CARGO_PKG_VERSION"), ", with draft").to_owned(),
        }
    }

    fn decode(&mut self, prompt_ids: &[u32], new_tokens: usize) -> Result<Timed, BoxError> {
        let options =
            RunOptions { max_new_tokens: new_tokens, sampling: Sampling::GREEDY, verify: VerifyRule::Seeded };
        let done = self.runner.spec(prompt_ids, &options)?;
        Ok(Timed { token_ids: done.token_ids, prefill: done.prefill, decode: done.decode })
    }

    fn step(&mut self, context: usize, rows: usize) -> Result<Option<Duration>, BoxError> {
        self.passes.as_mut().map(|passes| passes.step(context, rows)).transpose()
    }

    fn costs(&mut self) -> Result<SideCosts, BoxError> {
        // The draft is in the same process, and read beside the target.
        let is_plain = matches!(self.runner.plan, DraftPlan::None);
        let target = self.runner.engine.target();
        // The memory of a card is not this process's.
        let is_host = target.kernels().is_host();
        Ok(SideCosts {
            load_s: is_plain.then_some(self.load_s),
            peak_memory_bytes: if is_plain && is_host { peak_memory_bytes() } else { None },
            weight_bytes_per_token: if is_plain { K::pass_bytes(target) } else { None },
        })
    }
}

/// Many sequences at once against one.
#[derive(Serialize)]
struct Together {
    sequences: usize,
    tokens_per_s: f64,
    over_one: Option<f64>,
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    report: &'a bench::decode::DecodeReport,
    batch: Option<Together>,
}

/// Time of `new_tokens` for every prompt in one batch.
fn batch_time<K: Kernels>(
    engine: &Engine<K>,
    prompts: &[Vec<u32>],
    new_tokens: usize,
) -> Result<Duration, Error> {
    let mut queue = prompts.iter().cloned().enumerate();
    let began = Instant::now();
    let options = GenerateOptions { max_new_tokens: new_tokens, ..GenerateOptions::default() };
    engine.generate_batch(
        BatchOptions { batch_size: prompts.len() },
        &mut || queue.next().map(|(i, prompt)| (i, prompt, options.clone())),
        &mut |_, _| ControlFlow::Continue(()),
    )?;
    Ok(began.elapsed())
}

pub(crate) fn run(args: &cli::BenchDecode, session: &Session) -> Result<u8, Failure> {
    if args.computing.device != Device::Cpu && args.peer.is_some() {
        return Err(Failure::input(
            format!("`--peer` decodes on the CPU, and `--device {}` on a card", args.computing.device),
            Some("leave one of them out: sides are compared on the same hardware".to_string()),
        ));
    }
    session.work(args.computing.device, args.threads, args)
}

impl OnDevice for cli::BenchDecode {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        measure(self, session, kernels)
    }
}

fn measure<K: Backend>(args: &cli::BenchDecode, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
    let workload = Workload::read(&args.workload, args.limit.map(|l| l as usize)).map_err(Error::from)?;
    let source = DraftSource::of(args.bundle.as_ref(), args.draft_model.as_ref());
    let sources = target_sources(source, args.target.as_ref())?;
    let target = session.load_target_on(kernels, &sources, None, false)?;
    let draft = source.map(|source| session.load_source(source, &target, PackMode::Q8)).transpose()?;
    let mut engine = engine(&target, draft.as_ref());
    if draft.is_some() {
        engine = with_costs(engine, &session.places, &target, draft.as_ref(), &session.printer);
    }
    let mut rows = Vec::new();
    for row in &workload.rows {
        let prompt_ids = match (&target.text.template, row.turns.first()) {
            // Every side reads the same ids, so a model without a template is measured on the bare text.
            (None, Some(turn)) => target.text.tokenizer.encode(turn, true).map_err(Error::from)?,
            _ => first_prompt(&target.text, row)?,
        };
        rows.push(DecodeRow { id: row.id.clone(), prompt_ids });
    }
    let new_tokens = args.new_tokens as usize;
    let longest = rows.iter().map(|r| r.prompt_ids.len()).max().unwrap_or(0) + new_tokens;
    let context = target.target.config().max_position;
    let prefill_tokens = (args.prefill_tokens as usize).min(context - 1);
    let step_context = STEP_CONTEXT.min(context / 2);
    if longest > context {
        return Err(Failure::input(
            format!(
                "the longest prompt and {new_tokens} new tokens need {longest} positions, the target has {context}"
            ),
            Some("lower `--new-tokens`".to_string()),
        ));
    }
    let mut peer = match args.peer {
        None => None,
        Some(cli::PeerKind::LlamaCppPython) => {
            let python = args.peer_python.clone().unwrap_or_else(|| PathBuf::from("python3"));
            if target.path.is_dir() {
                return Err(Failure::input(
                    "llama-cpp-python reads GGUF files, this target is a folder",
                    Some("name a GGUF file with `--target`".to_string()),
                ));
            }
            let needed = longest.max(prefill_tokens + 1).max(step_context + STEP_ROWS[STEP_ROWS.len() - 1]);
            Some(Peer::llama_cpp_python(&python, &target.path, target.threads, needed)?)
        }
    };
    let ours = |plan, passes| {
        let runner = EngineRunner { engine: &engine, plan, stop_ids: Vec::new(), stop: &session.stop };
        Ours { runner, passes, load_s: target.load_time.as_secs_f64() }
    };
    let mut plain = ours(DraftPlan::None, Some(TargetPasses::new(&target)));
    let mut spec = ours(DraftPlan::Auto, None);
    let peer_process = peer.as_ref().map(Peer::process_id);
    let busy_before = busy_times_with(peer_process);
    let mut sides: Vec<&mut dyn Side> = vec![&mut plain];
    if draft.is_some() {
        sides.push(&mut spec);
    }
    if let Some(peer) = &mut peer {
        sides.push(peer);
    }
    session.printer.begin("bench decode", Some(rows.len() as u64), Unit::Rows);
    let report = run_decode(
        &mut sides,
        &rows,
        &DecodeOptions {
            new_tokens,
            prefill_tokens,
            prefill_rounds: PREFILL_ROUNDS,
            step_rows: STEP_ROWS.into_iter().filter(|m| step_context + m <= context).collect(),
            step_context,
            step_rounds: STEP_ROUNDS,
        },
        (target.artifact(), machine(kernels.as_ref()), target.threads as u32),
        &mut |done| session.printer.at(done as u64),
    );
    session.printer.end();
    if session.stop.requested() {
        return Err(Failure::interrupted("interrupted: nothing was written", None));
    }
    let mut report = report.map_err(Error::from)?;
    let busy = busy_before.zip(busy_times_with(peer_process));
    report.judge(busy.and_then(|(before, after)| BusyTimes::others_share(before, after)));
    let batch = match args.batch.map(|b| b as usize) {
        None => None,
        Some(sequences) => {
            let prompts: Vec<Vec<u32>> =
                rows.iter().map(|r| r.prompt_ids.clone()).cycle().take(sequences).collect();
            // The prefill is in both times.
            let first = batch_time(&engine, &prompts, 1)?;
            let all = batch_time(&engine, &prompts, new_tokens + 1)?;
            let seconds = all.saturating_sub(first).as_secs_f64().max(1e-9);
            let tokens_per_s = (sequences * new_tokens) as f64 / seconds;
            let one = report.sides[0].decode_tokens_per_s.map(|e| e.value);
            Some(Together { sequences, tokens_per_s, over_one: one.map(|one| tokens_per_s / one) })
        }
    };
    let output = Output { report: &report, batch };
    if let Some(path) = &args.json {
        write_json(path, &output)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        printer::out(&decode_text(&report))?;
        if let Some(b) = &output.batch {
            let over = b.over_one.map_or_else(String::new, |o| format!(", {o:.2} times one sequence"));
            printer::out(&format!(
                "{} sequences at once: {:.0} tokens/s{over}\n",
                b.sequences, b.tokens_per_s
            ))?;
        }
    }
    Ok(0)
}
