//! A made-up engine whose times and acceptance are numbers, not clocks: what is measured is known beforehand.

use std::time::Duration;

use draftsmith_bench::record::{ArtifactInfo, Drafting, Finish, Machine};
use draftsmith_bench::{
    BoxError, Dialogue, MeasureOptions, Record, RunOptions, RunOutput, Runner, Workload, WorkloadRow,
    run_workload,
};
use draftsmith_core::{AcceptStats, Sampling, VerifyRule};

/// Token `i` of the answer to a prompt, from the prompt alone.
fn answer_token(prompt: &[u32], i: usize) -> u32 {
    let seed = prompt.iter().fold(17u32, |h, t| h.wrapping_mul(31).wrapping_add(*t));
    (seed.wrapping_mul(2_654_435_761).rotate_left(i as u32 % 31) ^ i as u32) % 1000
}

/// Which calls were made, and what the engine pretends.
pub(crate) struct FakeRunner {
    pub(crate) calls: Vec<(&'static str, Vec<u32>, usize)>,
    pub(crate) context_len: usize,
    pub(crate) depth: usize,
    /// Time of one target pass.
    pub(crate) step: Duration,
    /// Time per pass is multiplied by this for calls from this number on.
    pub(crate) slow_from: Option<(usize, f64)>,
    /// The speculative answer is spoilt at this token for prompts of this length.
    pub(crate) spoil: Option<(usize, usize)>,
}

impl Default for FakeRunner {
    fn default() -> FakeRunner {
        FakeRunner {
            calls: Vec::new(),
            context_len: 2048,
            depth: 5,
            step: Duration::from_millis(10),
            slow_from: None,
            spoil: None,
        }
    }
}

impl FakeRunner {
    fn pass(&self) -> Duration {
        match self.slow_from {
            Some((call, factor)) if self.calls.len() > call => self.step.mul_f64(factor),
            _ => self.step,
        }
    }
}

impl Runner for FakeRunner {
    fn plain(&mut self, prompt: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError> {
        self.calls.push(("plain", prompt.to_vec(), options.max_new_tokens));
        let n = options.max_new_tokens;
        Ok(RunOutput {
            token_ids: (0..n).map(|i| answer_token(prompt, i)).collect(),
            decode_tokens: n - 1,
            finish: Finish::Length,
            prefill: Duration::from_millis(prompt.len() as u64),
            decode: self.pass() * (n as u32 - 1),
            stats: AcceptStats::default(),
        })
    }

    fn spec(&mut self, prompt: &[u32], options: &RunOptions) -> Result<RunOutput, BoxError> {
        self.calls.push(("spec", prompt.to_vec(), options.max_new_tokens));
        let n = options.max_new_tokens;
        let mut token_ids: Vec<u32> = (0..n).map(|i| answer_token(prompt, i)).collect();
        if let Some((len, at)) = self.spoil
            && len == prompt.len()
        {
            token_ids[at] += 1;
        }
        let mut stats = AcceptStats::default();
        let mut done = 1;
        let mut steps = 0u32;
        while done < n {
            // Accepts a number of drafts that depends on the prompt: rows differ, runs do not.
            let accepted = (answer_token(prompt, done + 7) as usize % (self.depth + 1)).min(n - done - 1);
            stats.record(self.depth, self.depth, accepted, accepted + 1);
            done += accepted + 1;
            steps += 1;
        }
        Ok(RunOutput {
            token_ids,
            decode_tokens: n - 1,
            finish: Finish::Length,
            prefill: Duration::from_millis(prompt.len() as u64),
            decode: self.pass().mul_f64(1.2) * steps,
            stats,
        })
    }

    fn context_len(&self) -> usize {
        self.context_len
    }
}

/// Words are tokens: the prompt is the conversation's bytes, the answer its numbers.
pub(crate) struct FakeDialogue;

impl Dialogue for FakeDialogue {
    fn prompt(&mut self, row: &WorkloadRow, answers: &[String]) -> Result<Vec<u32>, BoxError> {
        let mut ids = Vec::new();
        for (i, turn) in row.turns.iter().take(answers.len() + 1).enumerate() {
            ids.extend(turn.bytes().map(u32::from));
            if let Some(answer) = answers.get(i) {
                ids.push(2000 + answer.split(' ').count() as u32);
            }
        }
        Ok(ids)
    }

    fn answer(&mut self, token_ids: &[u32]) -> Result<String, BoxError> {
        Ok(token_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
    }
}

pub(crate) fn options(max_new_tokens: usize) -> MeasureOptions {
    MeasureOptions {
        run: RunOptions { max_new_tokens, sampling: Sampling::GREEDY, verify: VerifyRule::Seeded },
        repeats: 1,
        warmup_tokens: 8,
        drafting: Drafting::Chain { depth: 5 },
        threads: 2,
        target: ArtifactInfo {
            name: "toy-target".into(),
            sha256: Some("ab".repeat(32)),
            kind: "Q4_1".into(),
            trained_beside: None,
        },
        draft: ArtifactInfo {
            name: "toy-draft".into(),
            sha256: None,
            kind: "eagle3".into(),
            trained_beside: None,
        },
        machine: Machine {
            cpu: "Made-up CPU".into(),
            cpu_features: vec!["avx2".into()],
            logical_cpus: 2,
            memory_bytes: Some(8 << 30),
            os: "linux x86_64".into(),
            load_average_1m: Some(0.1),
            others_busy_share: None,
            device: None,
        },
    }
}

pub(crate) fn workload(name: &str, rows: usize, turns: usize) -> Workload {
    let mut workload =
        Workload { name: name.into(), sha256: "cd".repeat(32), rows_total: rows + 3, rows: Vec::new() };
    for i in 0..rows {
        let turns = (0..turns).map(|t| format!("{name} row {i} turn {t}")).collect();
        workload.rows.push(WorkloadRow { id: format!("{name}/{i}"), turns, system: None });
    }
    workload
}

pub(crate) fn measured(runner: &mut FakeRunner, workload: &Workload, options: &MeasureOptions) -> Record {
    let mut record = run_workload(runner, &mut FakeDialogue, workload, options, &mut |_| {
        std::ops::ControlFlow::Continue(())
    })
    .expect("the fake engine does not fail");
    record.created_unix_s = 1_795_442_700;
    for (i, sample) in record.samples.iter_mut().enumerate() {
        sample.start_ns = i as u64 * 1_000_000;
    }
    record
}
