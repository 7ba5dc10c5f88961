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

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use draftsmith_capture::{
    Asked, Dialogue, EngineGenerator, FinishedDialogue, Generator, OpenAiGenerator, Progress, Prompter,
    SamplingMix, regenerate,
};
use draftsmith_data::{LocatedRow, Report as DataReport, Row};
#[cfg(feature = "gpu-flex")]
use draftsmith_decode::Engine;
use draftsmith_formats::atomic;
use draftsmith_formats::run::Stage;
use draftsmith_text::MaskOptions;
use serde_json::{Value, json};

use super::Run;
use super::answers::{AnswerLine, Answers, Origin, Selection, Wanted};
use super::data::{CONVERSATIONS, VALIDATION, add_tokens, to_json, write_rows};
use crate::Error;
use crate::device::Compute;
use crate::engine::engine;
use crate::report::{Report, Unit};
use crate::server::server_key;

/// Finished dialogues.
pub(super) const ANSWERS: &str = "answers.jsonl";
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
        let (wanted, held) = (wanted(rows, &origin)?, wanted(held, &origin)?);
        atomic::create_dir_all(dir)?;
        let mut answers = Answers::open(&dir.join(ANSWERS), wanted.iter().chain(&held))?;
        let before = wanted.iter().filter(|w| answers.get(w).is_some()).count();
        if before > 0 {
            report.note(&format!("regenerate: {before} of {} answers are there already", wanted.len()));
        }
        self.answer("answer held-out conversations", &held, &mut answers, None, report)?;
        self.answer("answer conversations", &wanted, &mut answers, table.max_tokens, report)?;
        self.check_stop(Stage::Regenerate)?;

        let count = answers.reach(&wanted, table.max_tokens).unwrap_or(wanted.len());
        let choose = |wanted: &[Wanted]| -> (Vec<LocatedRow>, Selection) {
            let mut selection = Selection::new(table, wanted.len());
            let lines = wanted.iter().filter_map(|w| Some((w, answers.get(w)?)));
            let rows = lines.filter_map(|(w, line)| selection.take(&w.row, line)).collect();
            (rows, selection)
        };
        let (validation, of_validation) = choose(&held);
        let (kept, selection) = choose(&wanted[..count]);
        write_rows(&dir.join(VALIDATION), validation.iter().map(|row| to_json(row, &row.id())))?;
        let so_far =
            DataReport { rows_read: kept.len() as u64, rows: kept.len() as u64, ..DataReport::default() };
        let (summary, prepared) =
            self.prepare(dir, kept.into_iter().map(Ok), so_far, report, Stage::Regenerate)?;
        let total = selection.total();
        let page = json!({
            "answers": total,
            "domains": selection.domains,
            "validation": of_validation.total(),
            "rows": prepared,
        });
        let text = serde_json::to_string_pretty(&page).expect("a report holds only what JSON can say") + "\n";
        atomic::write(dir.join("report.json"), text)?;
        selection.table().lines().chain(prepared.table().lines()).for_each(|line| report.note(line));
        let mut value = json!({
            "dialogues": total.dialogues,
            "generated_tokens": total.generated_tokens,
            "empty_answers": total.empty,
            "cut_answers": total.cut,
            "looping_answers": total.looping,
            "left_out_answers": total.left_out,
            "validation_rows": validation.len(),
        });
        add_tokens(&mut value, &summary);
        Ok(value)
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
            report.detail(&format!("{} tokens, {rate:.0} tokens/s", progress.tokens));
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
            },
            Some(server) => {
                let note = |line: &str| report.note(line);
                let mut generator = OpenAiGenerator {
                    server,
                    key: server_key(
                        &server.url,
                        server.key_env.as_deref(),
                        self.env.places,
                        self.env.variable,
                    )?,
                    prompter,
                    batch_size,
                    stop: stop.flag(),
                    note: &note,
                    asked: Asked::default(),
                };
                let ended = run(&mut generator);
                report.note(&format!("`{}`: {}", server.url, generator.asked));
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
