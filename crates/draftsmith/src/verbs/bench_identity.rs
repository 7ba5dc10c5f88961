//! `draftsmith bench identity`: one text per prompt, however it is decoded.

use std::sync::Arc;

use draftsmith::Error;
use draftsmith::bench::Workload;
use draftsmith::bench::record::DeviceInfo;
use draftsmith::cli;
use draftsmith::core::Sampling;
use draftsmith::decode::{BatchOptions, Costs, DraftPlan, Engine, GenerateOptions};
use draftsmith::device::Backend;
use draftsmith::engine::{LoadedTarget, engine};
use draftsmith::formats::hash::sha256_hex;
use draftsmith::formats::run::Device;
use draftsmith::kernels::{Kernels, PackMode};
use draftsmith::measure::first_prompt;
use draftsmith::report::{Report, Unit};
use serde::Serialize;

use super::bench::{read_workloads, write_json};
use super::generate::sampling;
use super::{DraftSource, OnDevice, Session, target_sources};
use crate::failure::{Failure, NOT_HELD};
use crate::printer;

/// Sequences of the batched ways.
const BATCH: usize = 8;

/// Rows for nothing: whatever is known is proposed.
fn eager() -> Costs {
    Costs {
        verify_ms: vec![(1, 1.0), (32, 1.001)],
        draft_step_ms: 0.001,
        extend_ms: 0.001,
        ..Costs::default()
    }
}

/// A way to decode.
struct Way {
    name: &'static str,
    plan: DraftPlan,
    /// Without a draft: plain, or repetitions of the text alone.
    alone: bool,
}

const WAYS: [Way; 6] = [
    Way { name: "plain", plan: DraftPlan::None, alone: true },
    Way { name: "n-gram", plan: DraftPlan::Auto, alone: true },
    Way { name: "chain 3", plan: DraftPlan::Chain { depth: 3 }, alone: false },
    Way { name: "chain 7", plan: DraftPlan::Chain { depth: 7 }, alone: false },
    Way { name: "tree 16", plan: DraftPlan::Tree { depth: 5, top_k: 4, num_draft_tokens: 16 }, alone: false },
    Way { name: "automatic", plan: DraftPlan::Auto, alone: false },
];

#[derive(Serialize)]
struct PromptHash {
    id: String,
    /// Of the token ids, in decimal, one blank between two.
    sha256: String,
    tokens: usize,
}

#[derive(Serialize)]
struct Difference {
    id: String,
    way: String,
    /// First token that differs.
    at: usize,
}

#[derive(Serialize)]
struct Output {
    identical: bool,
    ways: Vec<String>,
    prompts: Vec<PromptHash>,
    differences: Vec<Difference>,
    temperature: f32,
    new_tokens: u32,
    target_sha256: String,
    draft_sha256: Option<String>,
    /// What it was computed on, if not on the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceInfo>,
}

struct Job<'a, K: Kernels> {
    engine: &'a Engine<K>,
    options: GenerateOptions,
    prompts: &'a [(String, Vec<u32>)],
    session: &'a Session,
}

impl<K: Kernels> Job<'_, K> {
    /// Every prompt's tokens.
    fn one_by_one(&self) -> Result<Vec<Vec<u32>>, Error> {
        let mut all = Vec::new();
        for (_, prompt) in self.prompts {
            all.push(
                self.engine.generate(prompt, &self.options, &mut |_| self.session.stop.flow())?.token_ids,
            );
            if self.session.stop.requested() {
                break;
            }
        }
        Ok(all)
    }

    fn batched(&self) -> Result<Vec<Vec<u32>>, Error> {
        let mut queue = self.prompts.iter().enumerate();
        let mut all = vec![Vec::new(); self.prompts.len()];
        self.engine.generate_batch(
            BatchOptions { batch_size: BATCH },
            &mut || queue.next().map(|(i, (_, prompt))| (i, prompt.clone(), self.options.clone())),
            &mut |i, done| {
                all[i] = done.token_ids;
                self.session.stop.flow()
            },
        )?;
        Ok(all)
    }
}

fn prompts<K: Kernels>(
    workloads: &[Workload],
    target: &LoadedTarget<K>,
) -> Result<Vec<(String, Vec<u32>)>, Failure> {
    let mut prompts = Vec::new();
    for workload in workloads {
        for row in &workload.rows {
            prompts.push((format!("{}/{}", workload.name, row.id), first_prompt(&target.text, row)?));
        }
    }
    Ok(prompts)
}

/// Thread counts where none are given.
const THREADS: [u32; 2] = [1, 2];

pub(crate) fn run(args: &cli::BenchIdentity, session: &Session) -> Result<u8, Failure> {
    let threads = match (args.computing.device, args.threads.first()) {
        (Device::Cpu, None) => Some(THREADS[0]),
        (_, first) => first.copied(),
    };
    session.work(args.computing.device, threads, args)
}

impl OnDevice for cli::BenchIdentity {
    fn on<K: Backend>(&self, session: &Session, kernels: &Arc<K>) -> Result<u8, Failure> {
        compare(self, session, kernels)
    }
}

fn compare<K: Backend>(args: &cli::BenchIdentity, session: &Session, device: &Arc<K>) -> Result<u8, Failure> {
    let threads: &[u32] = match (device.is_host(), args.threads.as_slice()) {
        (true, []) => &THREADS,
        (true, given) => given,
        // A card has none to choose.
        (false, _) => &[1],
    };
    let sampling: Sampling = sampling(&args.choosing)?;
    let workloads = read_workloads(&args.workload, args.limit)?;
    let mut wanted: Vec<PromptHash> = Vec::new();
    let mut first: Vec<Vec<u32>> = Vec::new();
    let mut differences: Vec<Difference> = Vec::new();
    let mut names: Vec<String> = Vec::new();
    let mut target_sha256 = String::new();
    let mut draft_sha256 = None;
    let source = DraftSource::of(args.bundle.as_ref(), args.draft_model.as_ref());
    let sources = target_sources(source, args.target.as_ref())?;
    let per_thread_count = 2 * if source.is_some() { WAYS.len() } else { 2 };
    session.printer.begin("bench identity", Some((threads.len() * per_thread_count) as u64), Unit::Rows);
    for threads in threads {
        let kernels = device.with_threads(*threads as usize);
        let target = session.load_target_on(&kernels, &sources, None, false)?;
        let draft = source.map(|source| session.load_source(source, &target, PackMode::Q8)).transpose()?;
        let alone = engine(&target, None).with_costs(eager());
        let with_draft = draft.as_ref().map(|draft| engine(&target, Some(draft)).with_costs(eager()));
        let prompts = prompts(&workloads, &target)?;
        target_sha256.clone_from(&target.sha256);
        draft_sha256 = draft.as_ref().and_then(|d| d.artifact.sha256.clone());
        for way in &WAYS {
            let Some(engine) = (if way.alone { Some(&alone) } else { with_draft.as_ref() }) else { continue };
            let options = GenerateOptions {
                max_new_tokens: args.new_tokens as usize,
                sampling,
                stop_ids: target.stop_ids(),
                draft: way.plan,
                ..GenerateOptions::default()
            };
            let job = Job { engine, options, prompts: &prompts, session };
            for batched in [false, true] {
                let on = match device.device() {
                    Some(device) => device.name,
                    None => format!("{threads} thread{}", if *threads == 1 { "" } else { "s" }),
                };
                let batch = if batched { "batch of 8" } else { "alone" };
                let name = format!("{}, {batch}, {on}", way.name);
                session.printer.detail(&name);
                let found = if batched { job.batched()? } else { job.one_by_one()? };
                if session.stop.requested() {
                    session.printer.end();
                    return Err(Failure::interrupted("interrupted: nothing was written", None));
                }
                if first.is_empty() {
                    wanted.extend(prompts.iter().zip(&found).map(|((id, _), ids)| {
                        let text: Vec<String> = ids.iter().map(u32::to_string).collect();
                        PromptHash { id: id.clone(), sha256: sha256_hex(text.join(" ")), tokens: ids.len() }
                    }));
                    first = found;
                } else {
                    for ((wanted, found), (id, _)) in first.iter().zip(&found).zip(&prompts) {
                        if wanted != found {
                            let at = wanted.iter().zip(found).take_while(|(a, b)| a == b).count();
                            differences.push(Difference { id: id.clone(), way: name.clone(), at });
                        }
                    }
                }
                names.push(name);
                session.printer.at(names.len() as u64);
            }
        }
    }
    session.printer.end();
    let output = Output {
        identical: differences.is_empty(),
        ways: names,
        prompts: wanted,
        differences,
        temperature: sampling.temperature,
        new_tokens: args.new_tokens,
        target_sha256,
        draft_sha256,
        device: device.device(),
    };
    if let Some(path) = &args.json {
        write_json(path, &output)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        for d in output.differences.iter().take(20) {
            printer::out(&format!(
                "{}: {} differs from {} at token {}\n",
                d.id, d.way, output.ways[0], d.at
            ))?;
        }
        let tokens: usize = output.prompts.iter().map(|p| p.tokens).sum();
        printer::out(&format!(
            "{} prompts, {tokens} tokens, {} ways to decode: {}\n",
            output.prompts.len(),
            output.ways.len(),
            match output.differences.len() {
                0 if K::ROW_EXACT => "proved, one text per prompt".to_owned(),
                0 => "one text per prompt".to_owned(),
                n => format!("{n} DIFFERENCES"),
            }
        ))?;
        if !K::ROW_EXACT {
            printer::out(
                "this device does not promise the same bits for a row alone and among others: an observation\n",
            )?;
        }
    }
    Ok(if output.identical { 0 } else { NOT_HELD })
}
