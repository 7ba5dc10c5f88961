//! Stage `data`: files of conversations to checked rows and, where the answers stay as they are, to tokens.
//!
//! ```text
//! data/conversations.jsonl   rows in their final order
//! data/validation.jsonl      rows held back
//! data/train.tokens          ids and loss mask, unless answers are regenerated
//! data/report.json           what was read and dropped
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use draftsmith_core::report::{Report, Unit};
use draftsmith_data::{
    Change, Conversation, Dedupe, LoadOptions, Loaded, LocatedRow, PrepareOptions, Preparer, ReadOptions,
    Report as DataReport, Row, SourceReader, hold_back, leave_out_prompts, load,
};
use draftsmith_formats::atomic::{self, AtomicError, AtomicFile};
use draftsmith_formats::run::Stage;
use draftsmith_formats::tokens::{TokenFile, TokenRow, TokenSummary, TokenWriter};
use draftsmith_text::MaskOptions;
use serde_json::{Value, json};

use super::Run;
use crate::Error;
use crate::elsewhere::data_error;

/// Rows of conversations in their final order.
pub(super) const CONVERSATIONS: &str = "conversations.jsonl";
/// Rows held back.
pub(super) const VALIDATION: &str = "validation.jsonl";

impl Run<'_> {
    /// All conversations in their final order, without those held back, and these.
    pub(super) fn load_conversations(&self, report: &dyn Report) -> Result<(Loaded, Vec<LocatedRow>), Error> {
        let data = &self.file.data;
        let regenerate = self.file.regenerate.enabled;
        report.begin("read conversations", None, Unit::Rows);
        let options = LoadOptions {
            read: ReadOptions::default(),
            strict: data.strict,
            dedupe: match (data.dedupe, regenerate) {
                (false, _) => Dedupe::Off,
                (true, false) => Dedupe::Conversation,
                (true, true) => Dedupe::Prompt,
            },
            system: data.system.clone(),
            decontaminate: None,
            shuffle: true,
            seed: self.file.run.seed,
        };
        let mut loaded = load(&self.inputs.sources, &options, |rows| report.at(rows)).map_err(data_error)?;
        report.at(loaded.report.rows_read);
        report.end();
        self.check_stop(Stage::Data)?;
        let validation = match &self.inputs.validation {
            Some(source) => {
                let options = LoadOptions { shuffle: false, dedupe: Dedupe::Off, ..options };
                let held = load(std::slice::from_ref(source), &options, |_| {}).map_err(data_error)?;
                loaded.report.validation_dropped = held.report.dropped;
                leave_out_prompts(&mut loaded, &held.rows);
                held.rows
            }
            None => hold_back(&mut loaded, data.validation_rows as usize),
        };
        Ok((loaded, validation))
    }

    pub(super) fn data(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let regenerate = self.file.regenerate.enabled;
        let (mut loaded, validation) = self.load_conversations(report)?;
        if loaded.rows.is_empty() {
            return Err(Error::input(
                "no rows are left to train on after those for validation were held back",
                "lower `data.validation_rows`, give more data, or another file in `data.validation`",
            ));
        }
        atomic::create_dir_all(dir)?;
        write_rows(&dir.join(VALIDATION), with_unique_ids(&validation, &mut 0))?;
        let mut repeated_ids = 0;
        write_rows(&dir.join(CONVERSATIONS), with_unique_ids(&loaded.rows, &mut repeated_ids))?;
        loaded.report.change(Change::IdRepeated, repeated_ids);
        let licenses: BTreeSet<&str> =
            loaded.rows.iter().filter_map(|row| field(row, |c| &c.license)).collect();
        let origins: BTreeSet<&str> =
            loaded.rows.iter().filter_map(|row| field(row, |c| &c.source)).collect();
        let mut summary = json!({
            "rows": loaded.rows.len(),
            "validation_rows": validation.len(),
            "licenses": licenses,
            "origins": origins,
        });
        let page;
        if regenerate {
            page = loaded.report.table();
            atomic::write(dir.join("report.json"), to_text(&loaded.report))?;
        } else {
            let (tokens, prepared) =
                self.prepare(dir, loaded.rows.into_iter().map(Ok), loaded.report, report, Stage::Data)?;
            page = prepared.table();
            atomic::write(dir.join("report.json"), to_text(&prepared))?;
            add_tokens(&mut summary, &tokens);
        }
        page.lines().for_each(|line| report.note(line));
        Ok(summary)
    }

    /// Tokenises rows into `train.tokens`.
    pub(super) fn prepare(
        &self,
        dir: &Path,
        rows: impl Iterator<Item = Result<LocatedRow, Error>>,
        so_far: DataReport,
        report: &dyn Report,
        stage: Stage,
    ) -> Result<(TokenSummary, DataReport), Error> {
        let target = self.target()?;
        let template = target.text.template()?;
        let total = so_far.rows;
        let options = PrepareOptions {
            mask: MaskOptions::default(),
            max_length: self.file.data.max_length as usize,
            min_trained_tokens: self.file.data.min_trained_tokens as usize,
            target_vocab: target.target.config().vocab_size,
            strict: data_is_strict(stage, self.file.data.strict),
        };
        let mut preparer = Preparer::new(&target.text.tokenizer, template, options, so_far);
        // Rows to be answered were compared as prompts; answers that are alike all the same were all asked for.
        if self.file.data.dedupe && stage == Stage::Data {
            preparer = preparer.without_duplicates();
        }
        let meta = [
            ("target_sha256".to_string(), target.sha256.clone()),
            ("tokenizer_sha256".to_string(), target.text.tokenizer.content_hash().to_string()),
            ("template_sha256".to_string(), template.hash()),
        ];
        let mut writer = TokenWriter::create(dir.join("train.tokens"), &meta.into_iter().collect())?;
        report.begin("tokenise", Some(total), Unit::Rows);
        for (done, row) in rows.enumerate() {
            let row = row?;
            for prepared in preparer.push(&row)? {
                writer.push(&TokenRow {
                    id: prepared.id,
                    domain: prepared.domain,
                    ids: prepared.ids,
                    loss_mask: prepared.loss_mask,
                })?;
            }
            report.at(done as u64 + 1);
            self.check_stop(stage)?;
        }
        report.end();
        if writer.summary().rows == 0 {
            let dropped = preparer.report();
            let first = dropped.first_dropped.values().next().map(|first| format!("the first: {first}; "));
            return Err(Error::input(
                format!("no row is left to train on ({})", dropped.dropped_in_words()),
                format!(
                    "{}mend the rows, or with `data.strict = true` see each fault by itself",
                    first.unwrap_or_default()
                ),
            ));
        }
        let summary = writer.finish()?;
        let (data_report, _) = preparer.finish();
        Ok((summary, data_report))
    }

    /// The token file that capture and training read: as the stage left it, with every generated token in it or counted
    /// among those left out.
    pub(super) fn tokens(&self) -> Result<TokenFile, Error> {
        let path = self.tokens_path();
        let tokens = TokenFile::open(&path)?;
        let stage = if self.file.regenerate.enabled { Stage::Regenerate } else { Stage::Data };
        let Some(file) = self.folder.read(stage)? else { return Ok(tokens) };
        let count = |key: &str| file.summary[key].as_u64();
        let (trained, sha256) = (tokens.summary().trained_tokens, tokens.summary().sha256.as_str());
        let differs = count("trained_tokens").is_some_and(|n| n != trained)
            || file.summary["tokens_sha256"].as_str().is_some_and(|s| s != sha256);
        let lost = count("generated_tokens")
            .zip(count("left_out_tokens"))
            .filter(|(generated, left_out)| *generated != trained + left_out);
        // Answers that are there already are taken over.
        let state = self.folder.root().join("state").join(format!("{}.json", stage.name()));
        let again = || format!("delete `{}` and run again: the stage is made anew", state.display());
        match (differs, lost) {
            (false, None) => Ok(tokens),
            (_, Some((generated, left_out))) => Err(Error::input(
                format!(
                    "`{}` trains {trained} tokens, but {generated} were generated and {left_out} left out",
                    path.display()
                ),
                again(),
            )),
            (true, None) => Err(Error::input(
                format!("`{}` is not the file that stage `{}` wrote", path.display(), stage.name()),
                again(),
            )),
        }
    }

    /// Rows of a file that this run wrote, one after the other.
    pub(super) fn rows_of(&self, path: &Path) -> Result<Vec<LocatedRow>, Error> {
        let mut reader = SourceReader::open(path, ReadOptions::default())?;
        let mut rows = Vec::new();
        while let Some((location, row)) = reader.next_row()? {
            let row = row.map_err(|problem| draftsmith_data::DataError::BadRow {
                location: location.clone(),
                problem,
            })?;
            rows.push(LocatedRow { row, location, repeat: 0 });
        }
        Ok(rows)
    }
}

/// Counts of a token file in the summary of a stage.
pub(super) fn add_tokens(summary: &mut Value, tokens: &TokenSummary) {
    summary["token_rows"] = tokens.rows.into();
    summary["tokens"] = tokens.tokens.into();
    summary["trained_tokens"] = tokens.trained_tokens.into();
    summary["tokens_sha256"] = tokens.sha256.clone().into();
}

pub(super) fn to_text(report: &DataReport) -> String {
    serde_json::to_string_pretty(report).expect("a report holds only what JSON can say") + "\n"
}

/// Answers that the target wrote are not the user's mistake, whatever is wrong with them.
fn data_is_strict(stage: Stage, strict: bool) -> bool {
    strict && stage == Stage::Data
}

fn field<'r>(row: &'r LocatedRow, get: impl Fn(&'r Conversation) -> &'r Option<String>) -> Option<&'r str> {
    match &row.row {
        Row::Conversation(row) => get(row).as_deref(),
        Row::Tokens(_) => None,
    }
}

/// Rows as lines; they are keyed by id from here on. `repeated` counts the ids that had to be changed for it.
fn with_unique_ids<'r>(rows: &'r [LocatedRow], repeated: &'r mut u64) -> impl Iterator<Item = Value> + 'r {
    let mut ids = BTreeSet::new();
    rows.iter().map(move |row| {
        let base = row.id();
        let mut id = base.clone();
        let mut n = 2;
        while !ids.insert(id.clone()) {
            id = format!("{base}~{n}");
            n += 1;
        }
        *repeated += u64::from(n > 2);
        to_json(row, &id)
    })
}

/// A row as one line that [`SourceReader`] reads back to the same row.
pub(super) fn to_json(row: &LocatedRow, id: &str) -> Value {
    match &row.row {
        Row::Conversation(c) => {
            let mut value = json!({ "id": id, "domain": row.domain(), "messages": c.messages });
            let more = [("source", &c.source), ("license", &c.license)];
            for (key, text) in more {
                if let Some(text) = text {
                    value[key] = text.clone().into();
                }
            }
            if let Some(tools) = &c.tools {
                value["tools"] = tools.clone();
            }
            if c.last_answer_cut {
                value["finish_reason"] = "length".into();
            }
            if !c.kwargs.is_empty() {
                value["chat_template_kwargs"] = Value::Object(c.kwargs.clone());
            }
            value
        }
        Row::Tokens(t) => {
            let mask: Vec<u8> = t.loss_mask.iter().map(|m| u8::from(*m)).collect();
            json!({ "id": id, "domain": row.domain(), "input_ids": t.ids, "loss_mask": mask })
        }
    }
}

/// Writes rows as JSONL, whole or not at all.
pub(super) fn write_rows(path: &Path, rows: impl Iterator<Item = Value>) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    for row in rows {
        let line = serde_json::to_string(&row).expect("a row is JSON") + "\n";
        file.write_all(line.as_bytes()).map_err(|e| file.error(e))?;
    }
    Ok(file.commit()?)
}

/// Appends lines to a log of finished rows; a line that was torn by a kill is cut off first.
pub(super) struct RowLog {
    file: BufWriter<File>,
    path: std::path::PathBuf,
}

impl RowLog {
    /// Opens the log and gives the lines that are in it.
    pub(super) fn open(path: &Path) -> Result<(RowLog, Vec<Value>), Error> {
        let mut lines = Vec::new();
        let mut keep = 0usize;
        if path.is_file() {
            let bytes = atomic::read(path)?;
            for line in bytes.split_inclusive(|b| *b == b'\n') {
                match serde_json::from_slice(line) {
                    Ok(value) if line.ends_with(b"\n") => lines.push(value),
                    _ => break,
                }
                keep += line.len();
            }
        }
        let disk = |e| Error::from(AtomicError::from_io("write", path, e));
        let file = File::options().create(true).append(true).truncate(false).open(path).map_err(disk)?;
        file.set_len(keep as u64).map_err(disk)?;
        Ok((RowLog { file: BufWriter::new(file), path: path.to_path_buf() }, lines))
    }

    pub(super) fn push(&mut self, row: &Value) -> Result<(), Error> {
        let line = serde_json::to_string(row).expect("a row is JSON") + "\n";
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(|e| AtomicError::from_io("write", &self.path, e).into())
    }

    /// Flushes to the device.
    pub(super) fn sync(&self) -> Result<(), Error> {
        let synced = self.file.get_ref().sync_data();
        synced.map_err(|e| AtomicError::from_io("write", &self.path, e).into())
    }
}
