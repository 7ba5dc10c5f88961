//! The engine as `bench` sees it: two ways to decode, a dialogue, and timed passes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_bench::kernels::{KernelRunner, Limits};
use draftsmith_bench::record::{Drafting, Finish, Machine};
use draftsmith_bench::{BoxError, BusyTimes, Dialogue, RunOptions, RunOutput, Runner, WorkloadRow};
use draftsmith_core::report::Stop;
use draftsmith_core::{AcceptStats, TokenTree};
use draftsmith_decode::{DraftPlan, Engine, FinishReason, GenerateOptions, Generation};
use draftsmith_kernels::Kernels;
use draftsmith_model::{Precision, StepItem, Target, TargetKv};
use draftsmith_text::{Message, RenderOptions};

use crate::backend::Backend;
use crate::engine::LoadedTarget;
pub use crate::host::cpu_name;
use crate::host::default_threads;
use crate::passes::made_up_tokens;
use crate::target::TargetText;

/// Decodes a prompt with and without the drafter of an engine.
pub struct EngineRunner<'a, K: Kernels> {
    /// Target and drafter.
    pub engine: &'a Engine<K>,
    /// How the drafter proposes.
    pub plan: DraftPlan,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Ends an answer early; the caller then stops the measurement.
    pub stop: &'a Stop,
}

impl<K: Kernels> EngineRunner<'_, K> {
    fn run(&self, prompt: &[u32], options: &RunOptions, draft: DraftPlan) -> Result<RunOutput, BoxError> {
        let options = GenerateOptions {
            max_new_tokens: options.max_new_tokens,
            sampling: options.sampling,
            verify: options.verify,
            stop_ids: self.stop_ids.clone(),
            draft,
            ..GenerateOptions::default()
        };
        let done = self.engine.generate(prompt, &options, &mut |_| self.stop.flow())?;
        if done.finish_reason == FinishReason::Cancelled {
            return Err("interrupted".into());
        }
        Ok(output(done))
    }
}

fn output(done: Generation) -> RunOutput {
    RunOutput {
        // The first token comes from the prefill, the clock of the decoding starts with it.
        decode_tokens: done.token_ids.len().saturating_sub(1),
        token_ids: done.token_ids,
        finish: match done.finish_reason {
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length | FinishReason::Cancelled => Finish::Length,
        },
        prefill: done.prefill,
        decode: done.decode,
        stats: done.stats,
    }
}

impl<K: Kernels> Runner for EngineRunner<'_, K> {
    fn plain(&mut self, prompt_ids: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError> {
        let mut output = self.run(prompt_ids, options, DraftPlan::None)?;
        // Plain steps verify nothing.
        output.stats = AcceptStats::default();
        Ok(output)
    }

    fn spec(&mut self, prompt_ids: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError> {
        self.run(prompt_ids, options, self.plan)
    }

    fn context_len(&self) -> usize {
        self.engine.target().config().max_position
    }

    fn busy_times(&mut self) -> Option<BusyTimes> {
        busy_times()
    }
}

/// Processor times of the machine and of this process, in ticks; `None` where `/proc` does not tell.
pub(crate) fn busy_times() -> Option<BusyTimes> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<u64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|t| t.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in the first two already.
    let idle = ticks.get(3)? + ticks.get(4)?;
    let total: u64 = ticks.iter().take(8).sum();
    let own = process_ticks("self")?;
    Some(BusyTimes { total, busy: total - idle, own })
}

/// The same with another process counted as ours.
pub fn busy_times_with(process: Option<u32>) -> Option<BusyTimes> {
    let mut times = busy_times()?;
    if let Some(id) = process {
        times.own += process_ticks(&id.to_string())?;
    }
    Some(times)
}

/// Processor time of a process, in ticks.
fn process_ticks(id: &str) -> Option<u64> {
    let own = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name in brackets may hold blanks, so fields are counted behind it: the first there is number 3.
    let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Conversations in the target's own template.
pub struct TemplateDialogue<'a> {
    /// Tokenizer and template.
    pub text: &'a TargetText,
}

/// The prompt of a workload row after `answers` of its turns.
fn turn_prompt(text: &TargetText, row: &WorkloadRow, answers: &[String]) -> Result<Vec<u32>, crate::Error> {
    let mut messages = Vec::new();
    if let Some(system) = &row.system {
        messages.push(Message::new("system", system.as_str()));
    }
    for (i, turn) in row.turns.iter().take(answers.len() + 1).enumerate() {
        messages.push(Message::new("user", turn.as_str()));
        if let Some(answer) = answers.get(i) {
            messages.push(Message::new("assistant", answer.as_str()));
        }
    }
    prompt_ids(text, &messages)
}

/// The prompt of a workload row's first turn.
///
/// # Errors
/// As [`prompt_ids`].
pub fn first_prompt(text: &TargetText, row: &WorkloadRow) -> Result<Vec<u32>, crate::Error> {
    turn_prompt(text, row, &[])
}

impl Dialogue for TemplateDialogue<'_> {
    fn prompt(&mut self, row: &WorkloadRow, answers: &[String]) -> Result<Vec<u32>, BoxError> {
        Ok(turn_prompt(self.text, row, answers)?)
    }

    fn answer(&mut self, token_ids: &[u32]) -> Result<String, BoxError> {
        Ok(self.text.tokenizer.decode(token_ids, true))
    }
}

/// Messages to the ids of a prompt that asks for an answer.
///
/// # Errors
/// A model without a template, or a template that refuses the messages.
pub fn prompt_ids(text: &TargetText, messages: &[Message]) -> Result<Vec<u32>, crate::Error> {
    prompt_ids_with(text, messages, &RenderOptions::default())
}

/// [`prompt_ids`] for a template that asks for the date: `now` in seconds since 1970, or the fixed date of training.
///
/// # Errors
/// As [`prompt_ids`].
pub fn prompt_ids_at(
    text: &TargetText,
    messages: &[Message],
    now: Option<i64>,
) -> Result<Vec<u32>, crate::Error> {
    prompt_ids_with(text, messages, &RenderOptions { now, ..RenderOptions::default() })
}

/// [`prompt_ids`] with tools and template variables.
///
/// # Errors
/// As [`prompt_ids`].
pub fn prompt_ids_with(
    text: &TargetText,
    messages: &[Message],
    render: &RenderOptions,
) -> Result<Vec<u32>, crate::Error> {
    let rendered = text.template()?.render(messages, &render.with_generation_prompt(true))?;
    // The template writes its own BOS.
    Ok(text.tokenizer.encode(&rendered, false)?)
}

/// The shape of a proposal, for records.
pub fn drafting(plan: &DraftPlan) -> Drafting {
    match *plan {
        DraftPlan::None => Drafting::Chain { depth: 0 },
        DraftPlan::Auto => Drafting::Auto,
        DraftPlan::Chain { depth } => Drafting::Chain { depth: depth as u32 },
        DraftPlan::Tree { depth, top_k, num_draft_tokens } => Drafting::Tree {
            depth: depth as u32,
            top_k: top_k as u32,
            num_draft_tokens: num_draft_tokens as u32,
        },
    }
}

/// The machine, for records.
pub fn machine<K: Backend>(kernels: &K) -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let memory_bytes = read("/proc/meminfo").and_then(|text| {
        text.lines()
            .find(|l| l.starts_with("MemTotal:"))?
            .split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    });
    let load_average_1m = read("/proc/loadavg").and_then(|text| text.split_whitespace().next()?.parse().ok());
    Machine {
        cpu: cpu_name(),
        cpu_features: kernels.cpu_features(),
        logical_cpus: default_threads() as u32,
        memory_bytes,
        os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        load_average_1m,
        others_busy_share: None,
        device: kernels.device(),
    }
}

/// Most memory that this process has held so far; `None` where the system does not say.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Timed passes of a target over made-up tokens: the cost of a pass depends on their number alone.
pub struct TargetPasses<K: Kernels> {
    target: Arc<Target<K>>,
    precision: Precision,
    /// The context of the last pass; rolled back instead of computed again.
    kv: Option<TargetKv<K>>,
}

impl<K: Kernels> TargetPasses<K> {
    /// Passes of this target.
    pub fn new(target: &LoadedTarget<K>) -> TargetPasses<K> {
        TargetPasses { target: Arc::clone(&target.target), precision: target.precision, kv: None }
    }

    /// Runs `count` tokens in one pass and gives the time, with the choice of the target after the last `logits` rows.
    fn pass(&self, kv: &mut TargetKv<K>, count: usize, logits: usize) -> Duration {
        let tokens = made_up_tokens(self.target.config().vocab_size, count, kv.len());
        let parents = TokenTree::chain_parents(count);
        let began = Instant::now();
        let output = self.target.forward(&mut [StepItem { kv, tokens: &tokens, parents: &parents }], &[]);
        let rows: Vec<u32> = (count - logits..count).map(|r| r as u32).collect();
        let best = self.target.argmax(&output, &rows);
        let time = began.elapsed();
        debug_assert_eq!(best.len(), logits);
        time
    }

    fn context(&mut self, tokens: usize) -> TargetKv<K> {
        if let Some(mut kv) = self.kv.take().filter(|kv| kv.len() >= tokens) {
            kv.rollback_to(tokens);
            return kv;
        }
        let mut kv = self.target.new_kv();
        let mut left = tokens;
        while left > 0 {
            let now = left.min(256);
            self.pass(&mut kv, now, 1);
            left -= now;
        }
        kv
    }
}

impl<K: Backend> KernelRunner for TargetPasses<K> {
    fn limits(&mut self) -> Option<Limits> {
        K::limits(&self.target, self.precision)
    }

    fn step(&mut self, context_tokens: usize, m: usize) -> Result<Duration, BoxError> {
        let mut kv = self.context(context_tokens);
        // Every row of a verify pass is asked for its choice.
        let time = self.pass(&mut kv, m, m);
        self.kv = Some(kv);
        Ok(time)
    }

    fn prefill(&mut self, tokens: usize) -> Result<Duration, BoxError> {
        let mut kv = self.target.new_kv();
        let mut left = tokens;
        let mut time = Duration::ZERO;
        while left > 0 {
            let now = left.min(256);
            time += self.pass(&mut kv, now, 1);
            left -= now;
        }
        Ok(time)
    }

    fn decode(&mut self, context_tokens: usize, tokens: usize) -> Result<Duration, BoxError> {
        let mut kv = self.context(context_tokens);
        Ok((0..tokens).map(|_| self.pass(&mut kv, 1, 1)).sum())
    }
}
