//! Stage `regenerate`: the target answers the conversations itself, in this process or behind a server.
//!
//! ```text
//! regenerate/answers.jsonl      finished dialogues, as they finish; a later call goes on with the missing ones
//! regenerate/train.tokens       ids and loss mask of the answered conversations, in the order of the data
//! regenerate/validation.jsonl   the held-out conversations with their answers
//! regenerate/report.json        what was answered, what is odd about it, what is trained on
//! ```
//! Which dialogues finish first depends on what is decoded beside them; what they say does not. So rows are put back
//! into the order of the data, and a limit on tokens counts in that order: the result does not depend on interruptions.
//!
//! Invariant: a row is what the model was asked and what it wrote, as ids. Every generated token is trained on or counted
//! among those left out; what cannot be asked is refused before anything is.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;

use draftsmith_capture::{
    Alive, Asked, Dialogue, EngineGenerator, FinishedDialogue, Generator, OpenAiGenerator, Progress,
    Prompter, SamplingMix, regenerate,
};
use draftsmith_core::report::{Report, Unit};
use draftsmith_data::{
    Conversation, DataError, LocatedRow, Report as DataReport, Row, RowError, control_token,
};
use draftsmith_decode::Engine;
use draftsmith_formats::atomic;
use draftsmith_formats::run::Stage;
use draftsmith_text::{MaskOptions, Message, TextError};
use serde_json::{Value, json};

use super::Run;
use super::answers::{AnswerLine, Answers, KeptRow, Origin, Selection, Wanted};
use super::data::{CONVERSATIONS, VALIDATION, add_tokens, to_json, write_rows};
use super::state::ANSWERS;
use crate::Error;
use crate::device::Compute;
use crate::engine::engine;
use crate::server::server_keys;

/// Caches of answered turns that are kept for the next turns of their dialogues.
const PREFIX_CACHE_BYTES: usize = 256 << 20;

impl Run<'_> {
    pub(super) fn regenerate(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let table = &self.file.regenerate;
        let data = self.folder.stage_dir(Stage::Data);
        let mut rows = self.rows_of(&data.join(CONVERSATIONS))?;
        if let Some(max) = table.max_rows {
            rows.truncate(max as usize);
        }
        let mut held = self.rows_of(&data.join(VALIDATION))?;
        held.retain(|row| matches!(row.row, Row::Conversation(_)));
        let target = self.target()?;
        let template_sha256 = target.text.template()?.hash();
        let origin = Origin {
            target_sha256: &target.sha256,
            template_sha256: &template_sha256,
            tokenizer_sha256: target.text.tokenizer.content_hash(),
            max_context: self.prompter()?.max_context,
            mix: self.sampling_mix(),
            table,
            precision: self.arithmetic(),
        };
        let mut refused = BTreeMap::new();
        let (rows, held) = (self.askable(rows, &mut refused)?, self.askable(held, &mut BTreeMap::new())?);
        if rows.is_empty() {
            let why: Vec<String> = refused.iter().map(|(why, n)| format!("{n} {why}")).collect();
            return Err(Error::input(
                format!("no conversation can be asked ({})", why.join(", ")),
                "`draftsmith data preview` shows what the template makes of a row; with `data.strict = true` the first \
                 problem is named",
            ));
        }
        if !refused.is_empty() {
            let why: Vec<String> = refused.iter().map(|(why, n)| format!("{n} {why}")).collect();
            report.note(&format!("regenerate: conversations that cannot be asked: {}", why.join(", ")));
        }
        let (wanted, held) = (wanted(rows, &origin)?, wanted(held, &origin)?);
        atomic::create_dir_all(dir)?;
        let mut answers = Answers::open(&dir.join(ANSWERS), wanted.iter().chain(&held))?;
        let before = wanted.iter().filter(|w| answers.get(w).is_some()).count();
        if before > 0 {
            report.note(&format!("regenerate: {before} of {} answers are there already", wanted.len()));
        }
        if answers.without_ids() > 0 {
            report.note(&format!(
                "regenerate: {} answers in `answers.jsonl` were kept by an earlier version without their token ids; they \
                 are asked for again, as a row must hold exactly what was written",
                answers.without_ids()
            ));
        }
        self.answer("answer held-out conversations", &held, &mut answers, None, report)?;
        self.answer("answer conversations", &wanted, &mut answers, table.max_tokens, report)?;
        self.check_stop(Stage::Regenerate)?;

        let count = answers.reach(&wanted, table.max_tokens).unwrap_or(wanted.len());
        let tokenizer = &target.text.tokenizer;
        let (validation, mut of_validation) = Selection::choose(tokenizer, table, &held, &answers);
        let (kept, mut selection) = Selection::choose(tokenizer, table, &wanted[..count], &answers);
        // Held-out rows are neither cut nor dropped.
        let mut trained: BTreeMap<&str, u64> = BTreeMap::new();
        for row in &validation {
            *trained.entry(row.row.domain()).or_default() += trained_tokens(&row.row);
        }
        of_validation.settle(|domain| trained.get(domain).copied().unwrap_or(0), 0, 0);
        self.check_balance(&of_validation)?;
        write_rows(&dir.join(VALIDATION), validation.iter().map(validation_line))?;
        let unasked = refused.values().sum::<u64>();
        let of_dialogues = kept.len() as u64 - selection.rows_split.total();
        let so_far = DataReport {
            rows_read: of_dialogues + unasked,
            rows_split: selection.rows_split.total(),
            rows: kept.len() as u64,
            dropped: refused,
            ..DataReport::default()
        };
        let kept = kept.into_iter().map(|kept| Ok(kept.row));
        let (summary, prepared) = self.prepare(dir, kept, so_far, report, Stage::Regenerate)?;
        let trained = |domain: &str| prepared.domains.get(domain).map_or(0, |d| d.trained_tokens);
        selection.settle(trained, prepared.trained_tokens_cut, prepared.trained_tokens_dropped);
        self.check_balance(&selection)?;
        let total = selection.total();
        if summary.trained_tokens != total.trained_tokens {
            return Err(unbalanced(total.trained_tokens, summary.trained_tokens));
        }
        let page = json!({
            "answers": total,
            "left_out_tokens": selection.left_out,
            "domains": selection.domains,
            "validation": of_validation.total(),
            "rows": prepared,
            "rows_split": selection.rows_split,
        });
        let text = serde_json::to_string_pretty(&page).expect("a report holds only what JSON can say") + "\n";
        atomic::write(dir.join("report.json"), text)?;
        selection.table().lines().chain(prepared.table().lines()).for_each(|line| report.note(line));
        let mut value = json!({
            "dialogues": total.dialogues,
            "generated_tokens": total.generated_tokens,
            "left_out_tokens": total.left_out_tokens,
            "empty_answers": total.empty,
            "cut_answers": total.cut,
            "looping_answers": total.looping,
            "left_out_answers": total.left_out,
            "validation_rows": validation.len(),
        });
        add_tokens(&mut value, &summary);
        Ok(value)
    }

    /// The rows whose first prompt can be made; the others are counted by reason, or are errors in strict mode. Nothing
    /// has been asked yet.
    fn askable(
        &self,
        rows: Vec<LocatedRow>,
        refused: &mut BTreeMap<String, u64>,
    ) -> Result<Vec<LocatedRow>, Error> {
        let prompter = self.prompter()?;
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            self.check_stop(Stage::Regenerate)?;
            let Row::Conversation(conversation) = &row.row else {
                out.push(row);
                continue;
            };
            let problem = match first_prompt(&prompter, conversation) {
                Ok(()) => {
                    out.push(row);
                    continue;
                }
                Err(Problem::Row(problem)) => problem,
                Err(Problem::Text(source)) if self.file.data.strict => {
                    return Err(DataError::Text { location: row.location, source }.into());
                }
                Err(Problem::Text(source)) => RowError::TemplateRefused { message: source.to_string() },
            };
            if self.file.data.strict {
                return Err(DataError::BadRow { location: row.location, problem }.into());
            }
            *refused.entry(problem.reason().name().to_string()).or_default() += 1;
        }
        Ok(out)
    }

    /// Every generated token must be accounted for.
    fn check_balance(&self, selection: &Selection<'_>) -> Result<(), Error> {
        let total = selection.total();
        match selection.is_balanced() {
            true => Ok(()),
            false => {
                Err(unbalanced(total.generated_tokens, total.trained_tokens + selection.left_out.total()))
            }
        }
    }

    fn sampling_mix(&self) -> SamplingMix {
        let table = &self.file.regenerate;
        SamplingMix {
            temperature: table.temperature as f32,
            top_p: table.top_p as f32,
            seed: table.seed.unwrap_or(self.file.run.seed),
            greedy_share: table.greedy_share,
        }
    }

    fn prompter(&self) -> Result<Prompter<'_>, Error> {
        let target = self.target()?;
        let context = target.target.config().max_position;
        Ok(Prompter {
            tokenizer: &target.text.tokenizer,
            template: target.text.template()?,
            max_new_tokens: self.file.regenerate.max_new_tokens as usize,
            max_context: self.file.target.max_context.map_or(context, |m| context.min(m as usize)),
        })
    }

    /// Has the missing conversations answered, until all are or those from the first on have `max_tokens`.
    fn answer(
        &self,
        task: &str,
        wanted: &[Wanted],
        answers: &mut Answers,
        max_tokens: Option<u64>,
        report: &dyn Report,
    ) -> Result<(), Error> {
        let missing: Vec<&Wanted> = wanted.iter().filter(|w| answers.get(w).is_none()).collect();
        if missing.is_empty() || answers.reach(wanted, max_tokens).is_some() {
            return Ok(());
        }
        let done: Vec<&AnswerLine> = wanted.iter().filter_map(|w| answers.get(w)).collect();
        let (rows_before, tokens_before) =
            (done.len() as u64, done.iter().map(|line| line.generated_tokens).sum::<u64>());
        // Progress counts what ends the task: tokens if they are limited, else rows.
        match max_tokens {
            Some(max) => report.begin(task, Some(max), Unit::Tokens),
            None => report.begin(task, Some(wanted.len() as u64), Unit::Rows),
        }
        report.at(max_tokens.map_or(rows_before, |max| tokens_before.min(max)));
        let began = std::time::Instant::now();
        let alive = Alive::default();
        let stop = self.env.stop;
        let keys: HashMap<&str, &String> = missing.iter().map(|w| (w.dialogue.id.as_str(), &w.key)).collect();
        let mut failed = None;
        let mut source = missing.iter().map(|w| w.dialogue.clone()).take_while(|_| !stop.requested());
        let mut on_done = |done: FinishedDialogue, progress: Progress| {
            let key = keys[done.id.as_str()];
            if let Err(error) = answers.push(AnswerLine::new(key.clone(), done)) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            report.at(match max_tokens {
                Some(max) => (tokens_before + progress.tokens).min(max),
                None => rows_before + progress.dialogues,
            });
            let rate = progress.tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
            report.detail(&format!("{} tokens, {rate:.0} tokens/s{}", progress.tokens, alive.words()));
            // Looked at row by row only once there are enough tokens in all.
            let enough = max_tokens.is_some_and(|max| tokens_before + progress.tokens >= max)
                && answers.reach(wanted, max_tokens).is_some();
            if stop.requested() || enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut run = |generator: &mut dyn Generator| {
            regenerate(&mut source, generator, self.sampling_mix(), &mut on_done)
        };
        let prompter = self.prompter()?;
        let batch_size = self.file.regenerate.batch_size as usize;
        let ended = match &self.file.regenerate.server {
            None => match &self.compute {
                Compute::Cpu => {
                    let engine = engine(self.target()?, None).with_prefix_cache(PREFIX_CACHE_BYTES);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size })
                }
                #[cfg(feature = "gpu-flex")]
                Compute::Gpu(gpu) => {
                    let engine = Engine::new(self.target_on(gpu)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size })
                }
                Compute::Cuda(cuda) => {
                    let engine = Engine::new(self.target_on(cuda)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size })
                }
                #[cfg(feature = "cuda-shim")]
                Compute::Shim(shim) => {
                    let engine = Engine::new(self.target_on(shim)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size })
                }
            },
            Some(server) => {
                let note = |line: &str| report.note(line);
                let addresses = server.addresses();
                let mut generator = OpenAiGenerator {
                    server,
                    key: server_keys(
                        &addresses,
                        server.key_env.as_deref(),
                        self.env.places,
                        self.env.variable,
                    )?,
                    prompter,
                    batch_size,
                    stop: stop.flag(),
                    note: &note,
                    asked: Asked::default(),
                    asked_each: Vec::new(),
                    alive: alive.clone(),
                };
                let ended = run(&mut generator);
                match addresses.as_slice() {
                    [url] => report.note(&format!("`{url}`: {}", generator.asked)),
                    _ => generator.asked_each.iter().for_each(|(url, asked)| {
                        report.note(&format!("`{url}`: {asked}"));
                    }),
                }
                ended
            }
        };
        report.end();
        match failed {
            Some(error) => Err(error),
            None => Ok(ended.map(|_| ())?),
        }
    }
}

/// Conversations with the keys of their answers.
fn wanted(rows: Vec<LocatedRow>, origin: &Origin<'_>) -> Result<Vec<Wanted>, Error> {
    rows.into_iter()
        .map(|row| {
            let Row::Conversation(conversation) = &row.row else {
                return Err(Error::input(
                    format!("{}: the row is tokens already, so it cannot be answered anew", row.location),
                    "set `regenerate.enabled = false` for pre-tokenised rows",
                ));
            };
            let dialogue = Dialogue {
                id: row.id(),
                domain: row.domain().to_string(),
                turns: conversation.messages.clone(),
                render: conversation.mask_options(&MaskOptions::default()).render,
            };
            Ok(Wanted { key: origin.key(&dialogue), dialogue, row })
        })
        .collect()
}

/// What keeps a prompt from being made.
enum Problem {
    Row(RowError),
    Text(TextError),
}

/// Makes the first prompt of a conversation, as it will be asked.
fn first_prompt(prompter: &Prompter<'_>, conversation: &Conversation) -> Result<(), Problem> {
    let asked = conversation.messages.iter().enumerate().filter(|(_, m)| m.role != "assistant");
    if let Some(problem) = control_token(prompter.tokenizer, asked) {
        return Err(Problem::Row(problem));
    }
    let asked: Vec<Message> =
        conversation.messages.iter().filter(|m| m.role != "assistant").cloned().collect();
    let end = asked.iter().position(|m| m.role == "user").map_or(asked.len(), |at| at + 1);
    let render = conversation.mask_options(&MaskOptions::default()).render;
    match prompter.text(&asked[..end], &render) {
        Ok(_) => Ok(()),
        Err(TextError::TemplateRaised { message }) => {
            Err(Problem::Row(RowError::TemplateRefused { message }))
        }
        Err(other) => Err(Problem::Text(other)),
    }
}

fn trained_tokens(row: &LocatedRow) -> u64 {
    match &row.row {
        Row::Tokens(row) => row.trained_tokens() as u64,
        Row::Conversation(_) => 0,
    }
}

/// A held-out row as a line: its turns for people, its ids and mask for whoever reads it back.
fn validation_line(kept: &KeptRow<'_>) -> Value {
    let turns = LocatedRow { row: Row::Conversation(kept.conversation()), ..kept.row.clone() };
    let id = kept.row.id();
    let mut line = to_json(&turns, &id);
    let tokens = to_json(&kept.row, &id);
    for key in ["input_ids", "loss_mask"] {
        line[key] = tokens[key].clone();
    }
    line
}

fn unbalanced(generated: u64, found: u64) -> Error {
    Error::input(
        format!(
            "{generated} tokens were generated, but {found} of them are trained on or counted as left out"
        ),
        "this is a fault of draftsmith: please report it with the run file and `regenerate/answers.jsonl`",
    )
}
