//! Stage `regenerate`: the target answers the conversations itself, in this process or behind a server.
//!
//! ```text
//! regenerate/answers.jsonl      finished dialogues, as they finish; a later call goes on with the missing ones
//! regenerate/answers-rank-N.jsonl   those of another rank, while it is at work; they go into the log
//! regenerate/train.tokens       ids and loss mask of the answered conversations, in the order of the data
//! regenerate/validation.jsonl   the held-out conversations with their answers
//! regenerate/report.json        what was answered, what is odd about it, what is trained on
//! kept/                         states of the rows as they were written, until `capture` has taken them
//! ```
//! Which dialogues finish first depends on what is decoded beside them; what they say does not. So rows are put back
//! into the order of the data, and a limit on tokens counts in that order: the result does not depend on interruptions.
//!
//! Invariant: a row is what the model was asked and what it wrote, as ids. Every generated token is trained on or counted
//! among those left out; what cannot be asked is refused before anything is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::Path;

use draftsmith_capture::{
    Alive, Asked, Dialogue, EngineGenerator, FinishedDialogue, Generator, OpenAiGenerator, Progress,
    Prompter, SamplingMix, regenerate,
};
use draftsmith_core::report::{Report, Silent, Unit};
use draftsmith_data::{
    Conversation, DataError, LocatedRow, Report as DataReport, Row, RowError, control_token,
};
use draftsmith_decode::Engine;
use draftsmith_formats::atomic;
use draftsmith_formats::cache::{CacheSpec, KeptKey, KeptWriter, StoredRow};
use draftsmith_formats::run::{CaptureMode, Stage};
use draftsmith_text::{MaskOptions, Message, TextError};
use serde_json::{Value, json};

use super::Run;
use super::answers::{AnswerLine, Answers, KeptRow, Origin, Selection, Wanted, rank_logs};
use super::aside::link_file;
use super::data::{CONVERSATIONS, VALIDATION, add_tokens, to_json, write_rows};
use super::state::ANSWERS;
use crate::Error;
use crate::device::Compute;
use crate::disk::{free_bytes, human};
use crate::engine::engine;
use crate::ranks::Order;
use crate::server::server_keys;

/// Bytes that are left free on the disk of a run: answers are worth more than states, which can be computed again.
const ROOM_BYTES: u64 = 256 << 20;

/// Caches of answered turns that are kept for the next turns of their dialogues.
const PREFIX_CACHE_BYTES: usize = 256 << 20;

impl Run<'_> {
    /// Answers are worth more than the rest of their stage, and each is known by its own key: a stage made anew begins
    /// with those of the one that was set aside.
    pub(super) fn inherit_answers(&self, made: &Path) -> Result<(), Error> {
        let answers = made.join(ANSWERS);
        if answers.exists() {
            return Ok(());
        }
        let all = self.folder.all_aside(Stage::Regenerate, made);
        let logs = all.iter().map(|aside| aside.folder.join(ANSWERS));
        let longest = logs.filter_map(|log| Some((log.metadata().ok()?.len(), log))).max();
        if let Some((_, log)) = longest {
            atomic::create_dir_all(made)?;
            // What other ranks had not handed over when they were ended lies beside it.
            let beside = rank_logs(log.parent().unwrap_or(Path::new(".")));
            for log in beside.iter().chain([&log]) {
                link_file(log, &made.join(log.file_name().unwrap_or_default()))?;
            }
        }
        Ok(())
    }

    pub(super) fn regenerate(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let table = &self.file.regenerate;
        let mut refused = BTreeMap::new();
        let rows = self.askable(self.asked_rows(false)?, &mut refused)?;
        let held = self.askable(self.asked_rows(true)?, &mut BTreeMap::new())?;
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
        let target = self.target()?;
        let template_sha256 = target.text.template()?.hash();
        let origin = self.origin_of_answers(&template_sha256)?;
        let (wanted, held) = (wanted(rows, &origin)?, wanted(held, &origin)?);
        atomic::create_dir_all(dir)?;
        let mut answers = Answers::open(dir, wanted.iter().chain(&held))?;
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
        let asking =
            Asking { task: "answer held-out conversations", held: true, wanted: &held, max_tokens: None };
        self.answer(&asking, dir, &mut answers, report)?;
        let max_tokens = table.max_tokens;
        let asking = Asking { task: "answer conversations", held: false, wanted: &wanted, max_tokens };
        self.answer(&asking, dir, &mut answers, report)?;
        self.check_stop(Stage::Regenerate)?;

        let count = answers.reach(&wanted, table.max_tokens, &HashMap::new()).unwrap_or(wanted.len());
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

    /// The conversations to be asked, in the order of the data.
    fn asked_rows(&self, held: bool) -> Result<Vec<LocatedRow>, Error> {
        let data = self.folder.stage_dir(Stage::Data);
        let mut rows = self.rows_of(&data.join(if held { VALIDATION } else { CONVERSATIONS }))?;
        match (held, self.file.regenerate.max_rows) {
            (true, _) => rows.retain(|row| matches!(row.row, Row::Conversation(_))),
            (false, Some(max)) => rows.truncate(max as usize),
            (false, None) => {}
        }
        Ok(rows)
    }

    /// What all answers depend on.
    fn origin_of_answers<'o>(&'o self, template_sha256: &'o str) -> Result<Origin<'o>, Error> {
        let target = self.target()?;
        Ok(Origin {
            target_sha256: &target.sha256,
            template_sha256,
            tokenizer_sha256: target.text.tokenizer.content_hash(),
            max_context: self.prompter()?.max_context,
            mix: self.sampling_mix(),
            table: &self.file.regenerate,
            precision: self.arithmetic(),
        })
    }

    /// The rows whose first prompt can be made, with their places; the others are counted by reason, or are errors in strict
    /// mode. Nothing has been asked yet.
    fn askable(
        &self,
        rows: Vec<LocatedRow>,
        refused: &mut BTreeMap<String, u64>,
    ) -> Result<Vec<(u32, LocatedRow)>, Error> {
        let prompter = self.prompter()?;
        let mut out = Vec::with_capacity(rows.len());
        for (number, row) in (0..).zip(rows) {
            self.check_stop(Stage::Regenerate)?;
            let Row::Conversation(conversation) = &row.row else {
                out.push((number, row));
                continue;
            };
            let problem = match first_prompt(&prompter, conversation) {
                Ok(()) => {
                    out.push((number, row));
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

    /// Has the missing conversations answered, until all are or those from the first on have `max_tokens`. Ranks take turns with
    /// them, unless a server answers: each keeps a log of its own until this is over, and tells rank 0 how many tokens a row
    /// has, so that the limit is reached by the rows from the first on, whoever has them.
    fn answer(
        &self,
        asking: &Asking<'_>,
        dir: &Path,
        answers: &mut Answers,
        report: &dyn Report,
    ) -> Result<(), Error> {
        let Asking { task, held, wanted, max_tokens } = *asking;
        let missing: Vec<&Wanted> = wanted.iter().filter(|w| answers.get(w).is_none()).collect();
        if missing.is_empty() || answers.reach(wanted, max_tokens, &HashMap::new()).is_some() {
            return Ok(());
        }
        // A server is asked by one.
        let ranks = if self.file.regenerate.server.is_some() { 1 } else { self.env.ranks.count() };
        if ranks > 1 {
            let rows = missing.iter().map(|w| w.number).collect();
            self.env.ranks.order(&Order::Answer { held, rows });
        }
        let side = self.env.ranks.side(self.env.stop);
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
        // What others have answered, by place: their tokens. Rank 0 hears of it; the answers come when all is over.
        let (mut others, mut others_tokens) = (HashMap::<u32, u64>::new(), 0);
        // Takes over what others tell, and says how it goes on. `mine` is what this rank did.
        let mut look = |mine: Progress, answers: &Answers, told: Vec<[u64; 2]>| {
            for [row, tokens] in told {
                others.insert(row as u32, tokens);
                others_tokens += tokens;
            }
            let tokens = mine.tokens + others_tokens;
            report.at(match max_tokens {
                Some(max) => (tokens_before + tokens).min(max),
                None => rows_before + mine.dialogues + others.len() as u64,
            });
            let rate = tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
            report.detail(&format!("{tokens} tokens, {rate:.0} tokens/s{}", alive.words()));
            // Looked at row by row only once there are enough tokens in all.
            let enough = max_tokens.is_some_and(|max| tokens_before + tokens >= max)
                && answers.reach(wanted, max_tokens, &others).is_some();
            if stop.requested() || enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mine: Vec<&Wanted> = missing.iter().step_by(ranks).copied().collect();
        let mut keeper = if held { None } else { self.keeper(report)? };
        let mut last = Progress::default();
        let on_line = &mut |line: AnswerLine, progress: Progress| {
            answers.push(line)?;
            last = progress;
            let flow = look(progress, answers, side.told());
            if flow.is_break() {
                side.call_off();
            }
            Ok(flow)
        };
        let mut ended =
            self.answer_share(&mine, keeper.as_mut(), &|| side.is_over(), &alive, on_line, report);
        if ranks > 1 && ended.is_ok() {
            side.wait(|told| look(last, answers, told));
            ended = self.env.ranks.meet(&(), stop.requested()).and_then(|(_, stopped)| {
                if stopped {
                    stop.request();
                }
                answers.take_over(dir)
            });
        }
        report.end();
        ended
    }

    /// What another rank than the first does when it is called to answer.
    pub(super) fn follow_answer(&self, held: bool, numbers: &[u32]) -> Result<(), Error> {
        let (ranks, rank) = (self.env.ranks.count(), self.env.ranks.rank());
        let side = self.env.ranks.side(self.env.stop);
        let numbers: HashSet<u32> = numbers.iter().skip(rank).step_by(ranks).copied().collect();
        let rows = (0..).zip(self.asked_rows(held)?).filter(|(number, _)| numbers.contains(number));
        let template_sha256 = self.target()?.text.template()?.hash();
        let wanted = wanted(rows.collect(), &self.origin_of_answers(&template_sha256)?)?;
        let places: HashMap<&str, u32> = wanted.iter().map(|w| (w.key.as_str(), w.number)).collect();
        let mut log = Answers::of_rank(&self.made_by(Stage::Regenerate), rank)?;
        let on_line = &mut |line: AnswerLine, _: Progress| {
            let told = [u64::from(places[line.key.as_str()]), line.generated_tokens];
            log.push(line)?;
            side.tell(told);
            Ok(match side.is_over() || self.env.stop.requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        };
        let mine: Vec<&Wanted> = wanted.iter().collect();
        let mut keeper = if held { None } else { self.keeper(&Silent)? };
        let over = || side.is_over();
        self.answer_share(&mine, keeper.as_mut(), &over, &Alive::default(), on_line, &Silent)?;
        // Disks that machines share show to others what was closed.
        log.close()?;
        side.end();
        self.env.ranks.meet(&(), self.env.stop.requested())?;
        Ok(())
    }

    /// Has these conversations answered, until all are, `on_line` breaks, it is over or the user wants to stop.
    fn answer_share(
        &self,
        mine: &[&Wanted],
        mut keeper: Option<&mut Keeper>,
        over: &dyn Fn() -> bool,
        alive: &Alive,
        on_line: &mut dyn FnMut(AnswerLine, Progress) -> Result<ControlFlow<()>, Error>,
        report: &dyn Report,
    ) -> Result<(), Error> {
        let stop = self.env.stop;
        let keys: HashMap<&str, &String> = mine.iter().map(|w| (w.dialogue.id.as_str(), &w.key)).collect();
        let mut failed = None;
        let mut source = mine.iter().map(|w| w.dialogue.clone()).take_while(|_| !stop.requested() && !over());
        let keep = keeper.as_ref().map(|keeper| keeper.spec.clone());
        let mut on_done = |done: FinishedDialogue, progress: Progress| {
            // States first: an answer without them is captured again, states without an answer are of no use.
            if let Some(keeper) = &mut keeper {
                keeper.keep(&done, report);
            }
            let key = keys[done.id.as_str()].clone();
            on_line(AnswerLine::new(key, done), progress).unwrap_or_else(|error| {
                failed = Some(error);
                ControlFlow::Break(())
            })
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
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size, keep })
                }
                #[cfg(feature = "gpu-flex")]
                Compute::Gpu(gpu) => {
                    let engine = Engine::new(self.target_on(gpu)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size, keep })
                }
                Compute::Cuda(cuda) => {
                    let engine = Engine::new(self.target_on(cuda)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size, keep })
                }
                #[cfg(feature = "cuda-shim")]
                Compute::Shim(shim) => {
                    let engine = Engine::new(self.target_on(shim)?, None);
                    run(&mut EngineGenerator { engine: &engine, prompter, batch_size, keep })
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
        match failed {
            Some(error) => Err(error),
            None => Ok(ended.map(|_| ())?),
        }
    }
}

/// Keeps the states of answered rows for `capture`.
struct Keeper {
    spec: CacheSpec,
    /// `None` once there was no room.
    writer: Option<KeptWriter>,
}

impl Keeper {
    fn keep(&mut self, done: &FinishedDialogue, report: &dyn Report) {
        let Some(writer) = &mut self.writer else { return };
        for (row, states) in done.rows.iter().zip(&done.states) {
            let (Some(states), mask) = (states, row.loss_mask()) else { continue };
            // What cannot be stored is told by the stage that stores it.
            let Ok(stored) = StoredRow::of(states, &row.ids, &mask, 0) else { continue };
            let room = free_bytes(writer.dir()).is_none_or(|free| free >= ROOM_BYTES);
            let kept = match room {
                true => writer.push(KeptKey::of(&row.ids, &mask), &stored).map_err(|error| error.to_string()),
                false => Err(format!("less than {} are free", human(ROOM_BYTES))),
            };
            if let Err(why) = kept {
                report.note(&format!(
                    "regenerate: states of further answers are not kept, `capture` will compute them: {why}"
                ));
                self.writer = None;
                return;
            }
        }
    }
}

impl Run<'_> {
    /// True if the states of answers are kept for `capture`: where both stages compute in this process, row by row the same bits, and
    /// states are stored at all.
    pub(super) fn keeps_states(&self) -> bool {
        let (answers, capture) = (&self.file.regenerate, &self.file.capture);
        let here = answers.enabled && answers.server.is_none() && capture.server.is_none();
        here && capture.mode == CaptureMode::Cache && self.compute.row_exact()
    }

    fn keeper(&self, report: &dyn Report) -> Result<Option<Keeper>, Error> {
        if !self.keeps_states() {
            return Ok(None);
        }
        let spec = self.cache_spec_of(String::new(), 0)?;
        let opened = KeptWriter::open(&self.folder.kept_dir(), self.env.ranks.rank() as u32, &spec);
        Ok(match opened {
            Ok(writer) => Some(Keeper { spec, writer: Some(writer) }),
            Err(error) => {
                report
                    .note(&format!("regenerate: states are not kept, `capture` will compute them: {error}"));
                None
            }
        })
    }
}

/// Conversations that want answers.
#[derive(Clone, Copy)]
struct Asking<'a> {
    /// For progress.
    task: &'a str,
    /// They are the held-out ones.
    held: bool,
    /// All of them, in the order of the data.
    wanted: &'a [Wanted],
    /// Enough answers, from the first on.
    max_tokens: Option<u64>,
}

/// Conversations with the keys of their answers.
fn wanted(rows: Vec<(u32, LocatedRow)>, origin: &Origin<'_>) -> Result<Vec<Wanted>, Error> {
    rows.into_iter()
        .map(|(number, row)| {
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
            Ok(Wanted { number, key: origin.key(&dialogue), dialogue, row })
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
