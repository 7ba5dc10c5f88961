//! Stage `regenerate`: the target answers the conversations itself.
//!
//! ```text
//! regenerate/answers.jsonl   finished dialogues, as they finish; a later call goes on with the missing ones
//! regenerate/train.tokens    ids and loss mask of the answered conversations, in the order of the data
//! ```
//! Which dialogues finish first depends on what is decoded beside them; what they say does not. So rows are put back
//! into the order of the data, and a limit on tokens counts in that order: the result does not depend on interruptions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use draftsmith_capture::{
    AnswerMark, Dialogue, EngineGenerator, FinishedDialogue, RegenerateOptions, regenerate,
};
use draftsmith_data::{Conversation, LocatedRow, Report as DataReport, Row};
use draftsmith_formats::atomic;
use draftsmith_formats::run::Stage;
use draftsmith_text::{Message, RenderOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Run;
use super::data::{CONVERSATIONS, RowLog, add_tokens, to_text};
use crate::Error;
use crate::engine::engine;
use crate::report::{Report, Unit};

/// Caches of answered turns that are kept for the next turns of their dialogues.
const PREFIX_CACHE_BYTES: usize = 256 << 20;

/// One line of `answers.jsonl`.
#[derive(Serialize, Deserialize)]
struct AnswerLine {
    id: String,
    domain: String,
    messages: Vec<Message>,
    generated_tokens: u64,
    greedy: bool,
    mark: Option<AnswerMark>,
}

impl From<FinishedDialogue> for AnswerLine {
    fn from(done: FinishedDialogue) -> AnswerLine {
        AnswerLine {
            id: done.id,
            domain: done.domain,
            messages: done.messages,
            generated_tokens: done.generated_tokens as u64,
            greedy: done.greedy,
            mark: done.mark,
        }
    }
}

impl Run<'_> {
    pub(super) fn regenerate(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let table = &self.file.regenerate;
        let mut rows = self.rows_of(&self.folder.stage_dir(Stage::Data).join(CONVERSATIONS))?;
        if let Some(max) = table.max_rows {
            rows.truncate(max as usize);
        }
        let mut order = Vec::new();
        let mut dialogues = Vec::new();
        for row in &rows {
            let Row::Conversation(conversation) = &row.row else {
                return Err(Error::input(
                    format!("{}: the row is tokens already, so it cannot be answered anew", row.location),
                    "set `regenerate.enabled = false` for pre-tokenised rows",
                ));
            };
            order.push(row.id());
            dialogues.push(Dialogue {
                id: row.id(),
                domain: row.domain().to_string(),
                turns: conversation.messages.clone(),
            });
        }
        atomic::create_dir_all(dir)?;
        let (mut log, lines) = RowLog::open(&dir.join("answers.jsonl"))?;
        let mut answers: HashMap<String, AnswerLine> = HashMap::new();
        for line in lines {
            if let Ok(line) = serde_json::from_value::<AnswerLine>(line) {
                answers.insert(line.id.clone(), line);
            }
        }
        let max_tokens = table.max_tokens.unwrap_or(u64::MAX);
        let missing: Vec<Dialogue> = dialogues.into_iter().filter(|d| !answers.contains_key(&d.id)).collect();
        if !missing.is_empty() && taken(&order, &answers, max_tokens).is_none() {
            self.answer(&order, missing, &mut answers, &mut log, max_tokens, report)?;
        }
        drop(log);
        self.check_stop(Stage::Regenerate)?;
        let count = taken(&order, &answers, max_tokens).unwrap_or(order.len());
        let mut marks = [0u64; 3];
        let mut tokens = 0;
        let mut kept = Vec::new();
        for (id, row) in order.iter().zip(rows).take(count) {
            let Some(line) = answers.remove(id) else { continue };
            tokens += line.generated_tokens;
            if let Some(mark) = line.mark {
                marks[mark as usize] += 1;
            }
            if let Some(row) = usable(row, line) {
                kept.push(Ok(row));
            }
        }
        let so_far =
            DataReport { rows_read: kept.len() as u64, rows: kept.len() as u64, ..DataReport::default() };
        let (summary, prepared) = self.prepare(dir, kept.into_iter(), so_far, report, Stage::Regenerate)?;
        atomic::write(dir.join("report.json"), to_text(&prepared))?;
        prepared.table().lines().for_each(|line| report.note(line));
        let mut value = json!({
            "dialogues": count,
            "generated_tokens": tokens,
            "empty_answers": marks[AnswerMark::Empty as usize],
            "cut_answers": marks[AnswerMark::Cut as usize],
            "looping_answers": marks[AnswerMark::Loop as usize],
        });
        add_tokens(&mut value, &summary);
        Ok(value)
    }

    fn answer(
        &self,
        order: &[String],
        missing: Vec<Dialogue>,
        answers: &mut HashMap<String, AnswerLine>,
        log: &mut RowLog,
        max_tokens: u64,
        report: &dyn Report,
    ) -> Result<(), Error> {
        let table = &self.file.regenerate;
        let target = self.target()?;
        let engine = engine(target, None).with_prefix_cache(PREFIX_CACHE_BYTES);
        let context = target.target.config().max_position;
        let options = RegenerateOptions {
            max_new_tokens: table.max_new_tokens as usize,
            temperature: table.temperature as f32,
            top_p: table.top_p as f32,
            seed: table.seed.unwrap_or(self.file.run.seed),
            greedy_share: table.greedy_share,
            batch_size: table.batch_size as usize,
            max_context: self.file.target.max_context.map_or(context, |m| context.min(m as usize)),
        };
        let mut generator = EngineGenerator {
            engine: &engine,
            tokenizer: &target.text.tokenizer,
            template: target.text.template()?,
            render: RenderOptions::default(),
            stop_ids: target.stop_ids(),
            max_new_tokens: options.max_new_tokens,
            max_context: options.max_context,
            batch_size: options.batch_size,
        };
        // Progress counts what ends the stage: tokens if they are limited, else rows.
        let limited = max_tokens != u64::MAX;
        let done_before: u64 = answers.values().map(|a| a.generated_tokens).sum();
        match limited {
            true => report.begin("answer conversations", Some(max_tokens), Unit::Tokens),
            false => report.begin("answer conversations", Some(order.len() as u64), Unit::Rows),
        }
        report.at(if limited { done_before.min(max_tokens) } else { answers.len() as u64 });
        let began = std::time::Instant::now();
        let mut failed = None;
        let stop = self.env.stop;
        // Dialogues whose first prompt cannot be asked never come back: they count as answered with nothing.
        let template = target.text.template()?;
        let fits = |dialogue: &Dialogue| -> bool {
            let end = dialogue.turns.iter().position(|m| m.role == "user");
            let ask = RenderOptions::default().with_generation_prompt(true);
            let text = end.map(|end| template.render(&dialogue.turns[..=end], &ask));
            match text {
                None => false,
                // A template that fails is told by the generator, with the dialogue's name.
                Some(Err(_)) => true,
                Some(Ok(text)) => target
                    .text
                    .tokenizer
                    .encode(&text, false)
                    .is_ok_and(|ids| ids.len() + 1 < options.max_context),
            }
        };
        let unasked: RefCell<Vec<AnswerLine>> = RefCell::new(Vec::new());
        let mut source = missing.into_iter().take_while(|_| !stop.requested()).filter(|dialogue| {
            let fits = fits(dialogue);
            if !fits {
                unasked.borrow_mut().push(AnswerLine {
                    id: dialogue.id.clone(),
                    domain: dialogue.domain.clone(),
                    messages: Vec::new(),
                    generated_tokens: 0,
                    greedy: false,
                    mark: None,
                });
            }
            fits
        });
        regenerate(&mut source, &mut generator, &options, &mut |done, progress| {
            for line in unasked.borrow_mut().drain(..) {
                answers.insert(line.id.clone(), line);
            }
            let line = AnswerLine::from(done);
            if let Err(error) = serde_json::to_value(&line)
                .map_err(|e| Error::input(e.to_string(), ""))
                .and_then(|v| log.push(&v))
            {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            answers.insert(line.id.clone(), line);
            report.at(match limited {
                true => (done_before + progress.tokens).min(max_tokens),
                false => answers.len() as u64,
            });
            let rate = progress.tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
            report.detail(&format!("{} tokens, {rate:.0} tokens/s", progress.tokens));
            if stop.requested() || taken(order, answers, max_tokens).is_some() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        report.end();
        match failed {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// How many rows, from the first, reach the limit of tokens; `None` while they do not, or while one of them is missing.
fn taken(order: &[String], answers: &HashMap<String, AnswerLine>, max_tokens: u64) -> Option<usize> {
    if max_tokens == u64::MAX {
        return None;
    }
    let mut sum = 0;
    for (i, id) in order.iter().enumerate() {
        sum += answers.get(id)?.generated_tokens;
        if sum >= max_tokens {
            return Some(i + 1);
        }
    }
    None
}

/// The answered row, without a last answer that is empty or a loop; `None` if nothing is left of it.
fn usable(row: LocatedRow, line: AnswerLine) -> Option<LocatedRow> {
    let LocatedRow { row: Row::Conversation(before), location, repeat } = row else { return None };
    let mut messages = line.messages;
    if matches!(line.mark, Some(AnswerMark::Empty | AnswerMark::Loop)) {
        messages.truncate(messages.len().saturating_sub(2));
    }
    let last_answer_cut = line.mark == Some(AnswerMark::Cut);
    let row = Conversation { messages, last_answer_cut, ..before };
    row.has_answer().then_some(LocatedRow { row: Row::Conversation(row), location, repeat })
}
