//! The bill of a run before it begins: rows, tokens, steps, time, disk and memory of every stage.
//!
//! Amounts are counted from the conversations, or from finished stages; times come from [rates](crate::rates) of this
//! machine. No stage is begun and nothing is written into the folder of the run. Sums over amounts and rates are pure
//! functions, so that they are tested with made-up ones.

use std::path::PathBuf;
use std::time::Instant;

use draftsmith_bench::Workload;
use draftsmith_core::report::Silent;
use draftsmith_data::Row;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::run::{CaptureMode, RunFile, Stage};
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::PackMode;
use draftsmith_model::DraftConfig;
use draftsmith_text::MaskOptions;
use draftsmith_train::{Order, RowStore, TrainError};
use serde::Serialize;

use super::Run;
use super::aside::bytes_below;
use super::data::to_json;
use super::state::Phase;
use crate::Error;
use crate::among::{Among, RanksPlan};
use crate::disk::free_bytes;
use crate::measure::{prompt_ids, prompt_ids_with};
use crate::rates::{Prompted, Rates, TrialAnswer, mean};
use crate::rules::{Facts, Warning, warnings};
use crate::stored::on_the_way;

/// Conversations whose tokens are counted, spread over all of them.
const SAMPLE_ROWS: usize = 200;
/// Accept length that drafts are taken to have where steps of speculation are counted: between those of short and long
/// trainings in docs/LOG.md.
const ACCEPT_LEN: f64 = 1.6;
/// What a proposal takes over the bytes that it reads: small passes wait for more than memory.
const PROPOSAL_FACTOR: f64 = 1.5;
/// Rows that `capture` tries before it begins.
const TRIAL_ROWS: f64 = 3.0;
/// Bytes of a generated token in `answers.jsonl`, with its part of the question: ids and text, by logs of real runs.
const ANSWER_BYTES: f64 = 20.0;
/// Bytes of a token in a token file.
const TOKEN_BYTES: f64 = 4.125;
/// Memory of a run that drops no caches: what `regenerate` keeps for next turns.
const PREFIX_CACHE: u64 = 256 << 20;

/// Whether a stage has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    /// Done under the inputs of now: it costs nothing.
    Done,
    /// It goes on where it stopped; the bill is for what is left, as far as that is known.
    Interrupted,
    /// It has not begun.
    Waiting,
}

/// The bill of one stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StagePlan {
    /// Its word.
    pub stage: Stage,
    /// Whether it has something to do.
    pub state: StageState,
    /// Rows that it goes through.
    pub rows: Option<u64>,
    /// Tokens that it goes through, or writes.
    pub tokens: Option<u64>,
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Seconds; `None` where nobody here can know.
    pub seconds: Option<f64>,
    /// What the seconds are made of.
    pub how: String,
    /// Bytes on disk when it is done.
    pub disk_bytes: u64,
    /// Of those, bytes that nothing needs once the run is over.
    pub freed_bytes: u64,
    /// Most memory; of a rank, where there are several.
    pub memory_bytes: Option<u64>,
    /// Where there are several ranks: what the busiest one sends to others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Where there are several ranks: seconds that more of them would not shorten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixed_seconds: Option<f64>,
}

impl StagePlan {
    /// Of a stage of which nothing is known.
    fn unknown(stage: Stage) -> StagePlan {
        StagePlan {
            stage,
            state: StageState::Waiting,
            rows: None,
            tokens: None,
            steps: None,
            seconds: None,
            how: String::new(),
            disk_bytes: 0,
            freed_bytes: 0,
            memory_bytes: None,
            sent_bytes: None,
            fixed_seconds: None,
        }
    }
}

/// The bill of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The folder of the run.
    pub run: PathBuf,
    /// Stages in order.
    pub stages: Vec<StagePlan>,
    /// Seconds of all that is left to do.
    pub seconds: f64,
    /// Bytes that are still to be written.
    pub disk_bytes: u64,
    /// Of those, bytes that nothing needs once the run is over.
    pub freed_bytes: u64,
    /// Bytes free where they go, if the system says.
    pub free_bytes: Option<u64>,
    /// Most memory of a stage that is left to do.
    pub memory_bytes: Option<u64>,
    /// The sizes of a draft that left them to the target.
    pub draft: Option<String>,
    /// How the rates were found, with whatever speaks against them.
    pub measured: String,
    /// Seconds since 1970 when they were; `None` if nothing had to be measured.
    pub measured_unix_s: Option<u64>,
    /// What of this run is bound to disappoint.
    pub warnings: Vec<Warning>,
    /// About the ranks, if the plan was asked for several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RanksPlan>,
}

/// What stages go through.
#[derive(Clone, Debug, Default)]
pub(crate) struct Amounts {
    /// Conversations to train on, and those held out.
    pub(crate) rows: u64,
    pub(crate) held: u64,
    /// Questions in them.
    pub(crate) requests: u64,
    pub(crate) held_requests: u64,
    /// Some of them.
    pub(crate) prompts: Vec<Prompted>,
    /// Tokens and trained tokens of each row that training sees; estimated where answers are not written.
    pub(crate) lengths: Vec<(u32, u32)>,
    /// Generated tokens.
    pub(crate) generated: u64,
    /// Rows of tokens are there.
    pub(crate) counted: bool,
    /// Of the tokens, those whose states answering keeps or an earlier capture has.
    pub(crate) kept_tokens: u64,
    /// Bytes of the conversations as the stage writes them.
    pub(crate) bytes: u64,
    /// Seconds of reading them, and of making tokens of one.
    pub(crate) read_s: f64,
    pub(crate) tokenise_s: f64,
}

impl Amounts {
    pub(crate) fn tokens(&self) -> u64 {
        self.lengths.iter().map(|(tokens, _)| u64::from(*tokens)).sum()
    }

    /// Share of the tokens whose states are only copied.
    pub(crate) fn kept_share(&self) -> f64 {
        self.kept_tokens as f64 / self.tokens().max(1) as f64
    }

    pub(crate) fn trained(&self) -> u64 {
        self.lengths.iter().map(|(_, trained)| u64::from(*trained)).sum()
    }

    /// Every question that will be asked: tokens of prompt and answer.
    pub(crate) fn asked(&self, rates: &Rates, longest: u32) -> Vec<(u32, u32)> {
        let all = self.dialogues(rates, longest, self.rows, self.requests);
        all.iter().flatten().map(|turn| (turn.prompt, turn.answer)).collect()
    }

    /// Conversations as they will be answered: questions and answers as drawn from the samples.
    fn dialogues(&self, rates: &Rates, longest: u32, count: u64, requests: u64) -> Vec<Vec<Turn>> {
        let answers = expected_answers(rates, longest);
        let cut_share = answers.iter().map(|answer| answer.cut).sum::<f64>() / answers.len().max(1) as f64;
        let per_row = requests as f64 / count.max(1) as f64;
        let (mut asked, mut drawn, mut cut) = (0.0, 0usize, 0.0);
        let mut dialogues = Vec::with_capacity(count as usize);
        for row in 0..count as usize {
            let sample = self.prompts.get(row % self.prompts.len().max(1));
            let prompt = sample.map_or(32, |p| p.tokens / p.turns.max(1));
            asked += per_row;
            let turns = (asked.floor() as u32).max(1);
            asked = (asked - f64::from(turns)).max(0.0);
            let mut dialogue = Vec::new();
            for _ in 0..turns {
                drawn += 1;
                let number = drawn % answers.len().max(1);
                let looping = rates.answers.get(number).is_some_and(|a| a.looping);
                let answer = answers.get(number).map_or(longest, |answer| answer.tokens);
                dialogue.push(Turn { prompt, answer, looping });
                if looping {
                    break;
                }
                // As many dialogues end at a cut answer as there are chances for it.
                if dialogue.len() < turns as usize {
                    cut += cut_share;
                    if cut > 1.0 - 1e-3 {
                        cut -= 1.0;
                        break;
                    }
                }
            }
            dialogues.push(dialogue);
        }
        dialogues
    }
}

/// A question and its answer, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turn {
    prompt: u32,
    answer: u32,
    /// The dialogue ends here, and this answer is not trained on.
    looping: bool,
}

/// An answer as it will be.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Expected {
    tokens: u32,
    /// Chance that the token limit ends it, and its dialogue with it.
    cut: f64,
}

/// Answers that were written, and what those that the trial cut would have gone on for.
fn expected_answers(rates: &Rates, longest: u32) -> Vec<Expected> {
    let ended = rates.answers.iter().filter(|a| !a.cut).count();
    let written: u64 = rates.answers.iter().map(|a| u64::from(a.tokens)).sum();
    // An answer ends at a token with this chance.
    let chance = (ended as f64 / written.max(1) as f64).max(1e-6);
    let of = |answer: &TrialAnswer| {
        let left = f64::from(longest.saturating_sub(answer.tokens));
        match answer.cut {
            true => {
                let cut = (-chance * left).exp();
                let more = ((1.0 - cut) / chance).round() as u32;
                Expected { tokens: (answer.tokens + more).min(longest), cut }
            }
            false => Expected {
                tokens: answer.tokens.min(longest),
                cut: f64::from(u8::from(answer.tokens > longest)),
            },
        }
    };
    rates.answers.iter().map(of).collect()
}

/// Tokens of answers as they will be.
fn answer_lengths(rates: &Rates, longest: u32) -> Vec<u32> {
    expected_answers(rates, longest).into_iter().map(|answer| answer.tokens).collect()
}

/// Row lengths as training asks for them.
struct Lengths<'a>(&'a [(u32, u32)]);

impl RowStore for Lengths<'_> {
    fn num_rows(&self) -> usize {
        self.0.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.0[row].0 as usize
    }

    fn read(&mut self, _: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        Err("there are lengths alone".into())
    }
}

/// What training does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Training {
    pub(crate) steps: u64,
    pub(crate) passes: f64,
    /// Slots of the first pass, and of later ones.
    pub(crate) slots: [f64; 2],
}

/// Micro-batches of a step.
fn micro_batches(file: &RunFile) -> u64 {
    let pack = file.train.pack_length as usize;
    ((file.train.tokens_per_step as usize + pack / 2) / pack.max(1)).max(1) as u64
}

/// Steps over rows of these lengths.
pub(crate) fn training(file: &RunFile, lengths: &[(u32, u32)]) -> Training {
    let table = &file.train;
    let pack = table.pack_length as usize;
    let order = Order::new(&Lengths(lengths), pack, table.seed.unwrap_or(file.run.seed));
    let per_step = micro_batches(file);
    let packs: Vec<u64> = (0..u64::from(table.epochs)).map(|epoch| order.epoch(epoch).len() as u64).collect();
    let all: u64 = packs.iter().sum();
    let steps = all.div_ceil(per_step).min(table.max_steps.unwrap_or(u64::MAX));
    let used = (steps * per_step).min(all);
    let tokens: f64 = lengths.iter().map(|(tokens, _)| (*tokens as usize).min(pack) as f64).sum();
    let first = packs.first().copied().unwrap_or(0);
    let per_pack = tokens * packs.len() as f64 / all.max(1) as f64;
    let new = used.min(first) as f64 * per_pack;
    let old = used.saturating_sub(first) as f64 * per_pack;
    Training { steps, passes: (new + old) / tokens.max(1.0), slots: [new, old] }
}

/// Drafts that training measures: at every validation, at the end, and the means of the best.
fn validations(file: &RunFile, steps: u64) -> u64 {
    match file.validate.every {
        0 => 0,
        every => {
            let trained = steps.div_ceil(every).max(1);
            trained + trained.min(u64::from(file.validate.average_best)).saturating_sub(1)
        }
    }
}

/// Seconds of `tokens` decoded with a draft `depth` tokens ahead.
fn speculation(rates: &Rates, depth: u32, tokens: f64) -> f64 {
    let proposal = rates.proposal_bytes as f64 / f64::from(rates.validate_depth().max(1)) * f64::from(depth)
        / rates.pass_bytes.max(1) as f64
        * rates.pass(1)
        * PROPOSAL_FACTOR;
    tokens / ACCEPT_LEN * (rates.pass(depth + 1) + proposal)
}

/// What a rank's part of a queue of answers takes, when all together are to have `max_tokens`.
fn answers_seconds(
    rates: &Rates,
    asked: &[(u32, u32)],
    batch: usize,
    (max_tokens, among): (Option<u64>, &Among),
) -> f64 {
    // Lengths are drawn from few samples in turn, so any neighbours are as good as what a rank really has.
    let mine = &asked[..asked.len().div_ceil(among.ranks as usize)];
    rates.batch_seconds(mine, batch, max_tokens.map(|max| max.div_ceil(among.ranks))).0
}

/// The bills of all stages, as if none were done.
pub(crate) fn bills(
    file: &RunFile,
    amounts: &Amounts,
    rates: &Rates,
    bench: &[(u64, u64)],
    among: &Among,
) -> Vec<StagePlan> {
    let mut bills = Vec::new();
    let trained = training(file, &amounts.lengths);
    let shares_moments = file.train.shard_optimizer && among.ranks > 1;
    // What answers kept is not given back before the process ends.
    let carried = match file.regenerate.enabled && !amounts.counted {
        true => PREFIX_CACHE.min(amounts.kept_bytes(rates) / among.ranks),
        false => 0,
    };
    for stage in super::stages_of(file) {
        let mut bill = StagePlan::unknown(stage);
        // What rank 0 does alone, or every rank in full.
        let mut fixed = None;
        let (tokens, draft_bytes) = (amounts.tokens() as f64, 2 * rates.parameters);
        let longest = mean(rates.answers.iter().map(|a| a.tokens as usize)).max(16.0);
        match stage {
            Stage::Data => {
                bill.rows = Some(amounts.rows);
                let mut seconds = amounts.read_s;
                bill.disk_bytes = amounts.bytes;
                if !file.regenerate.enabled {
                    seconds += amounts.rows as f64 * amounts.tokenise_s;
                    bill.disk_bytes += (tokens * TOKEN_BYTES) as u64;
                    bill.tokens = Some(amounts.tokens());
                }
                bill.seconds = Some(seconds);
                bill.how = "the time it took to read them".to_string();
            }
            Stage::Regenerate => {
                let table = &file.regenerate;
                let batch = table.batch_size as usize;
                bill.rows = Some(amounts.rows.min(amounts.lengths.len() as u64));
                bill.tokens = Some(amounts.generated);
                if table.server.is_some() {
                    bill.how = "a server answers: nothing was asked of it".to_string();
                } else if rates.answers.is_empty() {
                    bill.how = "another device answers: it was not measured".to_string();
                } else {
                    let longest = table.max_new_tokens;
                    let dialogues = |rows, requests| -> Vec<(u32, u32)> {
                        let all = amounts.dialogues(rates, longest, rows, requests);
                        all.iter().flatten().map(|turn| (turn.prompt, turn.answer)).collect()
                    };
                    let held = dialogues(amounts.held, amounts.held_requests);
                    let rows = dialogues(amounts.rows, amounts.requests);
                    let held_s = answers_seconds(rates, &held, batch, (None, among));
                    let rows_s = answers_seconds(rates, &rows, batch, (table.max_tokens, among));
                    let prompts_s = amounts.rows as f64 * amounts.tokenise_s;
                    bill.seconds = Some(held_s + rows_s + prompts_s);
                    fixed = Some(prompts_s);
                    bill.how = format!(
                        "{} prompts answered: {:.0} tokens on average, {:.0} tokens/s in batches of {batch}",
                        rates.answers.len(),
                        mean(answer_lengths(rates, longest).into_iter().map(|n| n as usize)),
                        amounts.generated as f64 / rows_s.max(1e-9),
                    );
                }
                let written = amounts.generated as f64 + amounts.held_requests as f64 * longest;
                bill.disk_bytes = (written * ANSWER_BYTES + tokens * TOKEN_BYTES) as u64;
                // States wait until their rows are whole.
                let whole = mean(amounts.lengths.iter().map(|(tokens, _)| *tokens as usize));
                let waiting = match amounts.kept_tokens {
                    0 => 0.0,
                    _ => f64::from(table.batch_size) * whole * rates.capture_bytes,
                };
                bill.memory_bytes = Some(rates.memory[0] + carried + waiting as u64);
            }
            Stage::Capture => {
                bill.rows = Some(amounts.lengths.len() as u64);
                bill.tokens = Some(amounts.tokens());
                let tried = TRIAL_ROWS * tokens / amounts.lengths.len().max(1) as f64;
                if file.capture.server.is_some() {
                    bill.how = "a server computes the states: nothing was asked of it".to_string();
                } else {
                    let most = among.share(amounts.lengths.len() as u64);
                    let kept = amounts.kept_share();
                    let tried = tried.min(tokens * (1.0 - kept));
                    bill.seconds = Some(tokens * most * rates.states_s(kept) + tried * rates.capture_s);
                    fixed = Some(tried * rates.capture_s);
                    bill.how = format!("{:.0} tokens/s over a few rows", 1.0 / rates.capture_s.max(1e-12));
                    if kept > 0.0 {
                        let when =
                            if amounts.counted { "there already" } else { "kept when they are answered" };
                        bill.how = format!("{:.0} % {when}; else {}", 100.0 * kept, bill.how);
                    }
                }
                bill.disk_bytes = (tokens * rates.capture_bytes) as u64;
                if file.capture.store.is_some() {
                    let rows = amounts.lengths.len() as u64;
                    bill.disk_bytes = on_the_way(bill.disk_bytes, rows, file.capture.shard_rows, among.ranks);
                }
                bill.freed_bytes = bill.disk_bytes;
                bill.memory_bytes = Some(rates.memory[1]);
            }
            Stage::Train => {
                bill.rows = Some(amounts.lengths.len() as u64);
                bill.steps = Some(trained.steps);
                let slots = trained.slots[0] + trained.slots[1];
                bill.tokens = Some(slots as u64);
                let checkpoint = 12 * rates.parameters;
                let validate = &file.validate;
                if rates.update_s > 0.0 {
                    let drafts = validations(file, trained.steps) as f64;
                    let prompt = mean(amounts.prompts.iter().map(|p| p.ids.len()));
                    let answer = f64::from(validate.max_new_tokens).min(longest.max(8.0));
                    let prompts = validate.prompts.min(amounts.held.max(1) as u32);
                    let one = f64::from(prompts)
                        * among.share(u64::from(prompts))
                        * (prompt * rates.pass(32) / 32.0 + speculation(rates, validate.depth, answer));
                    let checkpoints = trained.steps.div_ceil(file.train.checkpoint_every.max(1)) as f64;
                    let written = checkpoints * checkpoint as f64 + 2.0 * drafts * draft_bytes as f64;
                    // Micro-batches of a step that the busiest rank has.
                    let most = among.share(micro_batches(file));
                    let capture = match file.capture.mode {
                        CaptureMode::Online => slots * most * rates.capture_s,
                        CaptureMode::Cache => 0.0,
                    };
                    let updates = trained.steps as f64 * rates.update_s
                        / if shares_moments { among.ranks as f64 } else { 1.0 };
                    let backward = trained.slots[0] * rates.slot_s[0] + trained.slots[1] * rates.slot_s[1];
                    let sent = trained.steps * among.sent_bytes_a_step(micro_batches(file), rates.parameters);
                    // A checkpoint has all moments: rank 0 gets those of the others.
                    let (handed_in, others) = match shares_moments {
                        true => (checkpoints as u64 * 8 * rates.parameters / among.ranks, among.ranks - 1),
                        false => (0, 0),
                    };
                    let sending = (sent + handed_in * others) as f64 / among.link_bytes_per_s;
                    let sent = sent + handed_in;
                    let stepping = backward * most + updates + sending;
                    let written_s = written * rates.disk_s;
                    bill.seconds = Some(rates.train_setup_s + stepping + capture + drafts * one + written_s);
                    let whole_updates = if shares_moments { 0.0 } else { updates };
                    fixed = Some(rates.train_setup_s + whole_updates + sending + written_s);
                    bill.sent_bytes = Some(sent).filter(|_| among.ranks > 1);
                    bill.how = format!(
                        "{:.0} tokens/s over a few steps, {drafts:.0} validations of {one:.0} s",
                        slots / stepping.max(1e-9)
                    );
                } else {
                    bill.how = "another device trains: it was not measured".to_string();
                }
                let kept = u64::from(file.train.keep_checkpoints)
                    .min(trained.steps.div_ceil(file.train.checkpoint_every.max(1)));
                let candidates = match file.validate.average_best {
                    best @ 2.. => u64::from(best).min(validations(file, trained.steps)),
                    _ => 0,
                };
                let best = u64::from(file.validate.every > 0);
                bill.freed_bytes = kept * checkpoint + (1 + candidates) * draft_bytes;
                bill.disk_bytes = bill.freed_bytes + best * draft_bytes;
                // A draft that is validated is there in f32, and twice as it is saved; checkpoints are written tensor by
                // tensor. Gradients are held aside, one for each level of the tree over the micro-batches of a step.
                let draft = 4 * rates.parameters + 2 * draft_bytes;
                let held = among.sums_aside(micro_batches(file)) * 4 * rates.parameters;
                let elsewhere = match shares_moments && rates.update_s > 0.0 {
                    true => among.moments_elsewhere(rates.parameters),
                    false => 0,
                };
                let trained = rates.memory[2].saturating_sub(elsewhere);
                bill.memory_bytes = Some(trained + draft + held + carried);
            }
            Stage::Bundle => {
                bill.seconds = Some(rates.train_setup_s + 4.0 * draft_bytes as f64 * rates.disk_s);
                bill.how = "by the draft's bytes".to_string();
                bill.disk_bytes = draft_bytes;
                bill.memory_bytes = Some(rates.memory[1] + 2 * draft_bytes);
            }
            Stage::Bench => {
                let turns: u64 = bench.iter().map(|(_, turns)| turns).sum();
                bill.rows = Some(bench.iter().map(|(rows, _)| rows).sum());
                let table = &file.bench;
                let answers = answer_lengths(rates, table.max_new_tokens.max(file.regenerate.max_new_tokens));
                let answer = match answers.is_empty() {
                    true => f64::from(table.max_new_tokens),
                    false => mean(answers.iter().map(|n| (*n).min(table.max_new_tokens) as usize)),
                };
                let depth = table.tree.as_ref().map_or(table.depth, |tree| tree.nodes);
                let prompt = mean(amounts.prompts.iter().map(|p| p.ids.len())) * rates.pass(32) / 32.0;
                let plain = answer * rates.pass(1) + prompt;
                let mut one = plain + prompt + speculation(rates, depth, answer);
                // An automatic plan is about as fast as the faster side.
                let auto = if table.auto { 2.0 * plain } else { 0.0 };
                one += auto;
                let plans = if table.auto { 2.0 } else { 1.0 };
                let calibration = if table.auto { 2.0 } else { 0.0 };
                bill.seconds = Some(turns as f64 * one + calibration + rates.train_setup_s);
                bill.tokens = Some((turns as f64 * answer * 2.0 * plans) as u64);
                bill.how = format!("{turns} answers of {answer:.0} tokens, each with and without the draft");
                bill.disk_bytes = 2 * (300 << 10) + turns * 2 * (2 << 10);
                bill.memory_bytes = Some(rates.memory[1] + 2 * draft_bytes);
            }
        }
        // Whatever was not taken apart is rank 0's.
        bill.fixed_seconds = bill.seconds.map(|seconds| fixed.unwrap_or(seconds)).filter(|_| among.ranks > 1);
        bills.push(bill);
    }
    bills
}

impl Amounts {
    /// Bytes of caches of answered turns, as they come to pile up.
    fn kept_bytes(&self, rates: &Rates) -> u64 {
        let tokens: u64 = self.lengths.iter().map(|(tokens, _)| u64::from(*tokens)).sum();
        tokens.saturating_mul(rates.kv_bytes)
    }
}

impl Run<'_> {
    /// The bill of all stages. Nothing is begun and nothing is written into the folder of the run.
    ///
    /// # Errors
    /// Those of the data and of the target.
    pub fn plan(&self) -> Result<Plan, Error> {
        self.plan_among(&Among::ALONE)
    }

    /// The bill of all stages for so many processes. Rates are those of this process: each rank is taken to be like it.
    ///
    /// # Errors
    /// Those of the data and of the target.
    pub fn plan_among(&self, among: &Among) -> Result<Plan, Error> {
        let stages = self.stages();
        let mut states = Vec::new();
        for stage in &stages {
            states.push(self.stage_state(*stage)?);
        }
        let all_done = states.iter().all(|(state, _)| *state == StageState::Done);
        let mut measured = "nothing had to be measured: every stage is done".to_string();
        let (mut measured_unix_s, mut told, mut parameters) = (None, Vec::new(), 0);
        let mut alone: Vec<StagePlan> = stages.iter().map(|stage| StagePlan::unknown(*stage)).collect();
        let mut bills = alone.clone();
        if !all_done {
            let (amounts, rates, kept) = self.survey()?;
            measured = how_measured(&rates, kept);
            measured_unix_s = Some(rates.measured_unix_s);
            parameters = rates.parameters;
            told = warnings(&self.facts(Some(&amounts), rates.coverage));
            let workloads = self.workload_rows()?;
            alone = self::bills(&self.file, &amounts, &rates, &workloads, &Among::ALONE);
            bills = match among.ranks {
                1 => alone.clone(),
                _ => self::bills(&self.file, &amounts, &rates, &workloads, among),
            };
        }
        self.without_what_is_done(&mut alone, &states);
        self.without_what_is_done(&mut bills, &states);
        let memory_bytes = bills.iter().filter_map(|b| b.memory_bytes).max();
        let seconds = |bills: &[StagePlan]| bills.iter().filter_map(|b| b.seconds).sum();
        let ranks = (among.ranks > 1).then(|| {
            let pack_length = self.file.train.pack_length;
            let step = (micro_batches(&self.file), pack_length);
            let plan = RanksPlan::new(among, step, parameters, self.file.train.shard_optimizer);
            RanksPlan {
                alone_seconds: seconds(&alone),
                fixed_seconds: bills.iter().filter_map(|b| b.fixed_seconds).sum(),
                one_machine_memory_bytes: memory_bytes.map(|bytes| bytes * among.ranks),
                ..plan
            }
        });
        let root = self.folder.root();
        let there = root.ancestors().find(|p| p.is_dir()).unwrap_or(std::path::Path::new("."));
        Ok(Plan {
            run: root.to_path_buf(),
            seconds: seconds(&bills),
            disk_bytes: bills.iter().map(|b| b.disk_bytes).sum(),
            freed_bytes: bills.iter().map(|b| b.freed_bytes).sum(),
            free_bytes: free_bytes(there),
            memory_bytes,
            stages: bills,
            draft: self.decided.clone(),
            measured,
            measured_unix_s,
            warnings: told,
            ranks,
        })
    }

    /// Takes from bills what earlier calls have done.
    fn without_what_is_done(&self, bills: &mut [StagePlan], states: &[(StageState, f64)]) {
        for (bill, (state, part)) in bills.iter_mut().zip(states) {
            bill.state = *state;
            let there = bytes_below(&self.made_by(bill.stage));
            match state {
                StageState::Done => {
                    bill.seconds = Some(0.0);
                    bill.how = "done before".to_string();
                    (bill.disk_bytes, bill.freed_bytes, bill.memory_bytes) = (0, 0, None);
                    (bill.sent_bytes, bill.fixed_seconds) = (None, None);
                }
                StageState::Interrupted => {
                    let left = |seconds: Option<f64>| seconds.map(|seconds| seconds * (1.0 - part));
                    (bill.seconds, bill.fixed_seconds) = (left(bill.seconds), left(bill.fixed_seconds));
                    bill.sent_bytes = bill.sent_bytes.map(|bytes| (bytes as f64 * (1.0 - part)) as u64);
                    bill.disk_bytes = bill.disk_bytes.saturating_sub(there);
                    bill.how.push_str(&format!("; {:.0} % is done", 100.0 * part));
                }
                StageState::Waiting => {}
            }
        }
    }

    /// Whether a stage is done, and which share of it.
    fn stage_state(&self, stage: Stage) -> Result<(StageState, f64), Error> {
        let due = self.due(stage)?;
        if self.is_done(&due)? {
            return Ok((StageState::Done, 1.0));
        }
        let file = self.folder.read(stage)?.filter(|file| due.keys.contains(&file.key));
        Ok(match file.filter(|file| file.phase == Phase::Running) {
            None => (StageState::Waiting, 0.0),
            Some(file) => {
                let progress = file.progress;
                let part = progress.and_then(|p| Some(p.done as f64 / p.total.filter(|t| *t > 0)? as f64));
                (StageState::Interrupted, part.unwrap_or(0.0).clamp(0.0, 1.0))
            }
        })
    }

    /// Amounts and rates, and whether the rates are kept ones.
    pub(crate) fn survey(&self) -> Result<(Amounts, Rates, bool), Error> {
        let mut amounts = self.count()?;
        let (rates, kept) = self.rates(&amounts.prompts)?;
        self.complete(&mut amounts, &rates);
        Ok((amounts, rates, kept))
    }

    /// Counts conversations, and tokens where they are there.
    pub(crate) fn count(&self) -> Result<Amounts, Error> {
        let table = &self.file.regenerate;
        let began = Instant::now();
        let (loaded, held) = self.load_conversations(&Silent)?;
        let mut amounts = Amounts { read_s: began.elapsed().as_secs_f64(), ..Amounts::default() };
        let mut rows = loaded.rows;
        if let Some(max) = table.max_rows.filter(|_| table.enabled) {
            rows.truncate(max as usize);
        }
        let questions = |row: &Row| match row {
            Row::Conversation(c) => c.messages.iter().filter(|m| m.role == "user").count().max(1) as u64,
            Row::Tokens(_) => 1,
        };
        amounts.rows = rows.len() as u64;
        amounts.requests = rows.iter().map(|row| questions(&row.row)).sum();
        amounts.held = held.len() as u64;
        amounts.held_requests = held.iter().map(|row| questions(&row.row)).sum();
        let target = self.target()?;
        let longest = self.file.data.max_length as usize;
        let every = rows.len().div_ceil(SAMPLE_ROWS).max(1);
        let (mut bytes, mut sampled, mut refused) = (0, 0usize, None);
        let began = Instant::now();
        for row in rows.iter().step_by(every) {
            sampled += 1;
            bytes += to_json(row, "0").to_string().len() as u64 + 16;
            let prompted = match &row.row {
                Row::Tokens(row) => Prompted {
                    tokens: row.ids.len() as u32,
                    turns: 1,
                    ids: row.ids.clone(),
                    loss_mask: row.loss_mask.clone(),
                },
                Row::Conversation(row) if table.enabled => {
                    let first = row.messages.iter().position(|m| m.role == "user");
                    let first = first.map_or(row.messages.len(), |at| at + 1);
                    let render = row.mask_options(&MaskOptions::default()).render;
                    let asked: Vec<_> =
                        row.messages[..first].iter().filter(|m| m.role != "assistant").cloned().collect();
                    let ids = match prompt_ids_with(&target.text, &asked, &render) {
                        Ok(ids) => ids,
                        // Whatever is wrong with a row is the stage's to tell or to count.
                        Err(error) => {
                            refused.get_or_insert(error);
                            continue;
                        }
                    };
                    let mut tokens = ids.len();
                    for later in row.messages[first..].iter().filter(|m| m.role != "assistant") {
                        // A turn has marks around it.
                        tokens += target.text.tokenizer.encode(&later.content, false)?.len() + 6;
                    }
                    Prompted {
                        ids,
                        loss_mask: Vec::new(),
                        tokens: tokens as u32,
                        turns: row.messages.iter().filter(|m| m.role == "user").count().max(1) as u32,
                    }
                }
                Row::Conversation(row) => {
                    let mut ids = match prompt_ids(&target.text, &row.messages) {
                        Ok(ids) => ids,
                        Err(error) => {
                            refused.get_or_insert(error);
                            continue;
                        }
                    };
                    let mut written = 0;
                    for message in row.messages.iter().filter(|m| m.role == "assistant") {
                        written += target.text.tokenizer.encode(&message.content, false)?.len();
                    }
                    ids.truncate(longest);
                    let loss_mask = (0..ids.len()).map(|at| at + written >= ids.len()).collect();
                    Prompted { tokens: ids.len() as u32, turns: 1, ids, loss_mask }
                }
            };
            amounts.prompts.push(prompted);
        }
        if let Some(error) = refused.filter(|_| amounts.prompts.is_empty()) {
            return Err(error);
        }
        amounts.tokenise_s = began.elapsed().as_secs_f64() / sampled.max(1) as f64;
        amounts.bytes = (bytes as f64 / sampled.max(1) as f64 * (amounts.rows + amounts.held) as f64) as u64;
        let last = if table.enabled { Stage::Regenerate } else { Stage::Data };
        if let Some(path) = self.tokens_now(last)? {
            let tokens = TokenFile::open(&path)?;
            let length = |n| {
                let (all, trained) = tokens.row_counts(n);
                (all as u32, trained as u32)
            };
            amounts.lengths = (0..tokens.len()).map(length).collect();
            amounts.generated = tokens.summary().trained_tokens;
            amounts.kept_tokens = self.kept_now(&tokens)?;
            amounts.counted = true;
        }
        Ok(amounts)
    }

    /// Rows of tokens as they will be, where they are not there yet.
    pub(crate) fn complete(&self, amounts: &mut Amounts, rates: &Rates) {
        if amounts.counted {
            return;
        }
        let (table, longest) = (&self.file.regenerate, self.file.data.max_length);
        if !table.enabled {
            let sample = &amounts.prompts;
            let of = |row: u64| {
                let prompt = &sample[row as usize % sample.len()];
                let trained = prompt.loss_mask.iter().filter(|t| **t).count() as u32;
                (prompt.tokens.min(longest), trained)
            };
            amounts.lengths =
                if sample.is_empty() { Vec::new() } else { (0..amounts.rows).map(of).collect() };
            amounts.generated = amounts.trained();
            return;
        }
        let mut dialogues = amounts.dialogues(rates, table.max_new_tokens, amounts.rows, amounts.requests);
        if let Some(max) = table.max_tokens {
            let mut written = 0;
            dialogues.retain(|turns| {
                let before = written;
                written += turns.iter().map(|turn| u64::from(turn.answer)).sum::<u64>();
                before < max
            });
        }
        amounts.generated = dialogues.iter().flatten().map(|turn| u64::from(turn.answer)).sum();
        // Loops are left out, unless most of them are to stay.
        let keeps_loops = table.max_loop_share > 0.5;
        let length = |turns: &Vec<Turn>| {
            let kept = turns.iter().filter(|turn| keeps_loops || !turn.looping);
            let (tokens, answers) =
                kept.fold((0, 0), |(all, new), turn| (all + turn.prompt + turn.answer, new + turn.answer));
            (answers > 0).then_some((tokens.min(longest), answers.min(longest)))
        };
        amounts.lengths = dialogues.iter().filter_map(length).collect();
        if self.keeps_states() {
            // What is cut to length is another row than the one that was written.
            let whole = amounts.lengths.iter().map(|(tokens, _)| *tokens).filter(|tokens| *tokens < longest);
            amounts.kept_tokens = whole.map(u64::from).sum();
        }
    }

    /// Rows and turns of each workload.
    fn workload_rows(&self) -> Result<Vec<(u64, u64)>, Error> {
        let limit = self.file.bench.limit.map(|limit| limit as usize);
        let of = |path: &PathBuf| -> Result<(u64, u64), Error> {
            let rows = Workload::read(path, limit)?.rows;
            Ok((rows.len() as u64, rows.iter().map(|row| row.turns.len() as u64).sum()))
        };
        self.file.bench.workloads.iter().map(of).collect()
    }

    /// Bytes that a proposal of the draft reads at the depth of validation.
    pub(crate) fn proposal_bytes(&self) -> Result<u64, Error> {
        let target = self.target()?.target.config();
        let size = (self.file.draft.vocab_size as usize).min(target.vocab_size);
        let config = DraftConfig::from_table(&self.file.draft, target, size).map_err(TrainError::from)?;
        Ok(config.work(self.file.validate.depth as usize, PackMode::Q8).bytes)
    }

    /// What is known of this run, for [`warnings`].
    pub(crate) fn facts(&self, amounts: Option<&Amounts>, coverage: Option<f64>) -> Facts {
        let file = &self.file;
        let trained = amounts.map(|amounts| training(file, &amounts.lengths));
        let validates = file.validate.every > 0;
        let held = |amounts: &Amounts| amounts.held.min(u64::from(file.validate.prompts));
        Facts {
            rows: amounts.map(|amounts| amounts.rows.min(amounts.lengths.len() as u64)),
            given: amounts.map(|amounts| amounts.rows),
            max_answers: file.regenerate.max_tokens.filter(|_| file.regenerate.enabled),
            trained_tokens: amounts.map(Amounts::trained),
            steps: trained.map(|t| t.steps),
            passes: trained.map(|t| t.passes),
            max_steps: file.train.max_steps,
            tokens_per_step: file.train.tokens_per_step,
            coverage,
            lr: file.train.lr,
            method: Some(file.draft.method.clone()),
            random: file.draft.init == draftsmith_formats::run::DraftInit::Random,
            width: self.target.get().map(|target| target.target.config().hidden_size),
            own_answers: file.regenerate.enabled,
            held_out: amounts.map(held).filter(|_| validates),
        }
    }
}

/// How rates were found, in a sentence.
fn how_measured(rates: &Rates, kept: bool) -> String {
    let age = crate::costs::unix_s().saturating_sub(rates.measured_unix_s);
    let when = match (kept, age) {
        (false, _) => format!("measured now, in {:.0} s", rates.took_s),
        (true, 0..7200) => format!("measured {} min ago", age / 60),
        (true, 7200..172_800) => format!("measured {} h ago", age / 3600),
        (true, _) => format!("measured {} days ago", age / 86_400),
    };
    match rates.doubt() {
        Some(doubt) => format!("{when}; {doubt}"),
        None => when,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A step of a sequence takes 10 ms, each further one 1 ms; a prompt token 1 ms.
    fn rates() -> Rates {
        Rates {
            prefill_s: 1e-3,
            step_s: vec![(1, 0.010), (32, 0.041)],
            answers_factor: 1.0,
            verify_ms: vec![(1, 10.0), (8, 17.0), (32, 41.0)],
            pass_bytes: 100_000_000,
            capture_s: 1e-3,
            capture_bytes: 2000.0,
            slot_s: [1e-3, 0.5e-3],
            update_s: 0.1,
            parameters: 1_000_000,
            proposal_bytes: 5_000_000,
            disk_s: 1e-8,
            memory: [100, 200, 300],
            answers: vec![
                TrialAnswer { prompt: 50, tokens: 100, cut: false, looping: false },
                TrialAnswer { prompt: 50, tokens: 50, cut: false, looping: false },
            ],
            ..Rates::default()
        }
    }

    #[test]
    fn cut_answers_go_on_as_the_others_end() {
        let cut = |tokens| TrialAnswer { prompt: 1, tokens, cut: true, looping: false };
        let ended = |tokens| TrialAnswer { prompt: 1, tokens, cut: false, looping: false };
        let rates = Rates { answers: vec![ended(50), ended(70), cut(80)], ..Rates::default() };
        let lengths = answer_lengths(&rates, 256);
        assert_eq!(lengths[..2], [50, 70]);
        assert!((140..180).contains(&lengths[2]), "{lengths:?}");
        let rates = Rates { answers: vec![cut(80), cut(80)], ..Rates::default() };
        assert_eq!(answer_lengths(&rates, 256), [256, 256]);
        assert_eq!(answer_lengths(&rates, 60), [60, 60]);
    }

    #[test]
    fn a_dialogue_ends_at_a_loop() {
        let answer = |tokens, looping| TrialAnswer { prompt: 9, tokens, cut: false, looping };
        let rates = Rates { answers: vec![answer(10, false), answer(20, true)], ..Rates::default() };
        let prompt = Prompted { ids: vec![1; 5], tokens: 10, turns: 2, ..Prompted::default() };
        let amounts = Amounts { prompts: vec![prompt], ..Amounts::default() };
        // Two turns each: the first is a loop, so the second is not asked; then one that ends well, and a loop.
        let dialogues = amounts.dialogues(&rates, 64, 2, 4);
        let turn = |answer, looping| Turn { prompt: 5, answer, looping };
        assert_eq!(dialogues, [vec![turn(20, true)], vec![turn(10, false), turn(20, true)]]);
    }

    #[test]
    fn a_dialogue_ends_at_an_answer_that_the_limit_cuts() {
        let answer = |tokens, cut| TrialAnswer { prompt: 9, tokens, cut, looping: false };
        let turns = |answers: Vec<TrialAnswer>, longest| {
            let rates = Rates { answers, ..Rates::default() };
            let prompt = Prompted { ids: vec![1; 5], tokens: 10, turns: 2, ..Prompted::default() };
            let amounts = Amounts { prompts: vec![prompt], ..Amounts::default() };
            let dialogues = amounts.dialogues(&rates, longest, 100, 200);
            dialogues.iter().map(Vec::len).sum::<usize>()
        };
        // None ever ends by itself; all do before the limit; all are longer than it.
        assert_eq!(turns(vec![answer(60, true)], 64), 100);
        assert_eq!(turns(vec![answer(60, false)], 64), 200);
        assert_eq!(turns(vec![answer(60, false)], 32), 100);
        // One of 100 tokens ended an answer, so e^-0.7 of those that go on are still going on 70 tokens later: half of every
        // second answer. A quarter of the dialogues ends at the first.
        let asked = turns(vec![answer(30, false), answer(70, true)], 140);
        assert!((174..=178).contains(&asked), "{asked}");
    }

    fn file(more: &str) -> RunFile {
        let text = format!(
            "[target]\nsource = \"-\"\n[data]\nsources = [{{ path = \"-\" }}]\nmax_length = 512\n{more}"
        );
        RunFile::parse(Path::new("run.toml"), &text, &[]).unwrap()
    }

    #[test]
    fn steps_are_those_that_training_makes() {
        // 64 rows of 256 fill 32 packs of 512, two of them a step.
        let lengths = [(256, 200); 64];
        let table = "[train]\npack_length = 512\ntokens_per_step = 1024\n";
        let one = training(&file(table), &lengths);
        assert_eq!(one, Training { steps: 16, passes: 1.0, slots: [16_384.0, 0.0] });
        let three = training(&file(&format!("{table}epochs = 3\n")), &lengths);
        assert_eq!((three.steps, three.slots), (48, [16_384.0, 32_768.0]));
        let limited = training(&file(&format!("{table}epochs = 3\nmax_steps = 24\n")), &lengths);
        assert_eq!((limited.steps, limited.passes), (24, 1.5));
        assert_eq!(training(&file(table), &[]).steps, 0);
    }

    /// A hundred conversations, all alike.
    fn amounts() -> Amounts {
        Amounts {
            rows: 100,
            held: 8,
            requests: 100,
            held_requests: 8,
            prompts: vec![Prompted { ids: vec![1; 50], tokens: 50, turns: 1, ..Prompted::default() }],
            lengths: vec![(125, 75); 100],
            generated: 7500,
            ..Amounts::default()
        }
    }

    #[test]
    fn every_stage_has_its_bill() {
        let file = file(
            "[regenerate]\nbatch_size = 2\n[train]\npack_length = 512\ntokens_per_step = 512\ncheckpoint_every = 10\n\
             [validate]\nevery = 10\nprompts = 8\n",
        );
        let amounts = Amounts { bytes: 10_000, ..amounts() };
        let bills = bills(&file, &amounts, &rates(), &[(4, 4)], &Among::ALONE);
        let stages: Vec<Stage> = bills.iter().map(|b| b.stage).collect();
        assert_eq!(stages, [Stage::Data, Stage::Regenerate, Stage::Capture, Stage::Train, Stage::Bundle]);
        let of = |stage: Stage| bills.iter().find(|b| b.stage == stage).unwrap();
        // 54 waves of about 75 steps of two, and 108 prompts.
        let answered = of(Stage::Regenerate).seconds.unwrap();
        assert!((45.0..60.0).contains(&answered), "{answered}");
        let captured = of(Stage::Capture);
        assert!((captured.seconds.unwrap() - 12.9).abs() < 0.1, "{captured:?}");
        assert_eq!((captured.disk_bytes, captured.freed_bytes), (25_000_000, 25_000_000));
        let train = of(Stage::Train);
        assert_eq!(train.steps, Some(25));
        // Two checkpoints of 12 MB, the last draft, three of the best, and the best of all.
        assert_eq!(train.disk_bytes, 24_000_000 + 5 * 2_000_000);
        let seconds = train.seconds.unwrap();
        assert!(seconds > 12.5 + 2.5 && seconds < 60.0, "{seconds}");
        assert_eq!(train.memory_bytes, Some(300 + 8_000_000));
    }

    #[test]
    fn ranks_may_share_the_moments() {
        let of = |shard, ranks| {
            let file = file(&format!(
                "[train]\npack_length = 512\ntokens_per_step = 4096\nshard_optimizer = {shard}\n[validate]\nevery = 0\n"
            ));
            let rates = Rates { memory: [0, 0, 50_000_000], ..rates() };
            let mut bills = bills(&file, &amounts(), &rates, &[(4, 4)], &Among::new(ranks, 10.0));
            bills.retain(|bill| bill.stage == Stage::Train);
            bills.remove(0)
        };
        assert_eq!(of(true, 1), of(false, 1), "one process has nobody to share them with");
        let (whole, shared) = (of(false, 4), of(true, 4));
        // Three quarters of two moments of 4 MB each.
        assert_eq!(whole.memory_bytes.unwrap() - shared.memory_bytes.unwrap(), 6_000_000);
        // As much in a step; a quarter of the moments to rank 0 for the one checkpoint, which gets three of them.
        assert_eq!((whole.steps, whole.sent_bytes), (Some(4), Some(24_000_000)));
        assert_eq!(shared.sent_bytes, Some(24_000_000 + 2_000_000));
        let handing_in = 6e6 / 1.25e9;
        let seconds = whole.seconds.unwrap() - shared.seconds.unwrap();
        assert!((seconds - (4.0 * 0.1 * 0.75 - handing_in)).abs() < 1e-9, "{seconds}");
        let fixed = whole.fixed_seconds.unwrap() - shared.fixed_seconds.unwrap();
        assert!((fixed - (4.0 * 0.1 - handing_in)).abs() < 1e-9, "{fixed}");
    }

    #[test]
    fn ranks_share_what_can_be_shared() {
        let file = file(
            "[regenerate]\nbatch_size = 2\n[train]\npack_length = 512\ntokens_per_step = 4096\ncheckpoint_every = 10\n\
             [validate]\nevery = 10\nprompts = 8\n",
        );
        let amounts = Amounts { tokenise_s: 1e-3, ..amounts() };
        let of = |ranks, gbit| bills(&file, &amounts, &rates(), &[(4, 4)], &Among::new(ranks, gbit));
        let (one, four) = (of(1, 10.0), of(4, 10.0));
        assert_eq!(one, bills(&file, &amounts, &rates(), &[(4, 4)], &Among::ALONE));
        assert!(one.iter().all(|bill| bill.sent_bytes.is_none() && bill.fixed_seconds.is_none()));
        for (one, four) in one.iter().zip(&four) {
            let (a, b) = (one.seconds.unwrap(), four.seconds.unwrap());
            let fixed = four.fixed_seconds.unwrap();
            match one.stage {
                Stage::Data | Stage::Bundle | Stage::Bench => assert_eq!((a, fixed), (b, b)),
                // 25 rows each, and the three of the trial.
                Stage::Capture => assert!((b - (0.25 * 12.5 + 0.375)).abs() < 1e-9, "{b}"),
                Stage::Regenerate => {
                    assert!((fixed - 0.1).abs() < 1e-9, "prompts are made by rank 0: {fixed}");
                    assert!(((a - 0.1) / (b - 0.1) - 4.0).abs() < 0.5, "{a} {b}");
                }
                Stage::Train => {
                    // Eight micro-batches of a step, two each; four steps of 10 M, of which 3/4 go out twice.
                    assert_eq!((one.steps, four.steps), (Some(4), Some(4)));
                    assert_eq!(four.sent_bytes, Some(4 * 6_000_000));
                    let sending = 24e6 / 1.25e9;
                    let checkpoints = 12e6 * 1e-8 + 2.0 * 2e6 * 1e-8;
                    assert!((fixed - (4.0 * 0.1 + sending + checkpoints)).abs() < 1e-6, "{fixed}");
                    assert!(((a - fixed + sending) / (b - fixed) - 4.0).abs() < 1e-6, "{a} {b}");
                    // Three levels of the tree held aside by one process, one by each of four.
                    assert_eq!(one.memory_bytes.unwrap() - four.memory_bytes.unwrap(), 2 * 4_000_000);
                }
            }
        }
        // A slower link shows in training alone.
        let slow = of(4, 1.0);
        let differ: Vec<Stage> =
            four.iter().zip(&slow).filter(|(a, b)| a != b).map(|(a, _)| a.stage).collect();
        assert_eq!(differ, [Stage::Train]);
        // As many ranks as one likes: somebody has a whole row, micro-batch and prompt.
        let many = of(1000, 10.0);
        let train = many.iter().find(|b| b.stage == Stage::Train).unwrap();
        assert!(train.seconds.unwrap() > train.fixed_seconds.unwrap());
    }
}
