//! Stage `capture`: hidden states of the target for every row of tokens, on disk or on the fly.
//!
//! ```text
//! capture/manifest.json, shard-*   the target cache
//! ```
//! The states come from the target in this process, or from a server of it; rows arrive in order either way. Several processes
//! share the rows ([`Shared`]) unless a server has them; the finished cache is the same. With
//! `[capture.store]` shards lie here only until the store has them, and each process uploads those that it made. Rows whose states answering kept, or a capture has that was set aside
//! ([`KeptRows`]), are copied: what grew by some rows costs those rows.

use std::cell::Cell;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use draftsmith_capture::{
    Alive, CaptureError, CaptureSource, InProcess, RemoteCapture, RemoteOptions, TokenRow,
};
use draftsmith_core::report::{Report, Silent, Unit};
use draftsmith_cuda::{Cuda, Launcher};
use draftsmith_data::Row;
use draftsmith_formats::cache::{
    CacheReader, CacheSpec, CaptureRow, KeptKey, KeptRows, Part, PartWriter, StoredRow, drop_kept,
    estimate_bytes,
};
use draftsmith_formats::run::{CaptureMode, CaptureServerTable, Stage};
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::{Cpu, catch_failure};
use draftsmith_train::RowStore;
use serde::Serialize;
use serde_json::{Value, json};

use super::Run;
use super::answers::is_zero;
use super::aside::Aside;
use super::state::Phase;
use crate::Error;
use crate::device::Compute;
use crate::disk::{free_bytes, human};
use crate::measure::prompt_ids;
use crate::online::{CardRows, OnlineRows, token_row};
use crate::ranks::Order;
use crate::server::server_keys;
use crate::stored::{Shared, Sink};

/// What a capture costs.
#[derive(Debug, Clone, Serialize)]
pub struct Bill {
    /// Rows of tokens.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their trained tokens.
    pub trained_tokens: u64,
    /// Bytes of the finished cache, estimated before compression.
    pub bytes: u64,
    /// Of the tokens, those whose states answering keeps or an earlier capture has: they are copied.
    #[serde(skip_serializing_if = "is_zero")]
    pub kept_tokens: u64,
    /// Bytes free where it goes, if the system says.
    pub free_bytes: Option<u64>,
    /// Minutes at the speed of a few rows just tried.
    pub minutes: f64,
    /// That speed.
    pub tokens_per_s: f64,
    /// What rows and tokens were counted from, if not from finished rows: they are estimates then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_from: Option<String>,
}

/// Rows and tokens that capture will see.
struct Amount {
    rows: u64,
    tokens: u64,
    trained_tokens: u64,
    /// Tokens of rows whose states are there before.
    kept_tokens: u64,
    estimated_from: Option<String>,
}

/// Rows that are tried for the estimate of minutes.
const TRIAL_ROWS: usize = 3;
/// Bytes that need room while kept rows are copied: what is used up is removed file by file.
const COPY_BYTES: u64 = 256 << 20;
/// Conversations whose tokens are counted for an estimate, spread over all of them.
const SAMPLE_ROWS: usize = 200;

impl Run<'_> {
    /// The bill of the capture stage. No stage is begun and nothing is written: where rows of tokens are not there yet,
    /// their number and length are estimated from the conversations, and the bill says so.
    ///
    /// # Errors
    /// Those of the data and of the target.
    pub fn plan_capture(&self) -> Result<Bill, Error> {
        self.decided.iter().for_each(|decided| self.env.report.note(decided));
        let last = if self.file.regenerate.enabled { Stage::Regenerate } else { Stage::Data };
        let dir = self.folder.stage_dir(Stage::Capture);
        let done = self.tokens_now(last)?;
        let (amount, rows) = match &done {
            Some(path) => {
                let tokens = TokenFile::open(path)?;
                let spec = self.cache_spec(&tokens)?;
                counted(&tokens, &self.kept_rows(&tokens, &spec))
            }
            None => self.estimate()?,
        };
        catch_failure(|| {
            let mut source = self.capture_source(self.env.report)?;
            source.note_launch(self.env.report);
            self.bill(amount, rows, &dir, &mut source)
        })?
    }

    /// The rows of tokens, if they are there for the inputs of now.
    pub(super) fn tokens_now(&self, last: Stage) -> Result<Option<PathBuf>, Error> {
        let (due, made) = (self.due(last)?, self.made_by(last));
        let here = self.folder.read(last)?.filter(|f| due.keys.contains(&f.key) && f.phase == Phase::Done);
        let folder = match here {
            Some(_) => Some(made),
            None => {
                let aside = self.folder.find_aside(last, &made, &due.keys)?;
                let done = |a: &Aside| a.file.as_ref().is_some_and(|file| file.phase == Phase::Done);
                aside.filter(done).map(|aside| aside.folder)
            }
        };
        Ok(folder.map(|folder| folder.join("train.tokens")).filter(|path| path.is_file()))
    }

    /// Rows and tokens as the conversations let expect, and a few rows to try.
    fn estimate(&self) -> Result<(Amount, Vec<TokenRow>), Error> {
        let (table, target) = (&self.file.regenerate, self.target()?);
        let mut rows = self.load_conversations(self.env.report)?.0.rows;
        if let Some(max) = table.max_rows.filter(|_| table.enabled) {
            rows.truncate(max as usize);
        }
        let longest = self.file.data.max_length as usize;
        let (every, mut sampled) = (rows.len().div_ceil(SAMPLE_ROWS).max(1), 0u64);
        let (mut all, mut whole, mut trained, mut trial) = (0u64, 0u64, 0u64, Vec::new());
        let mut refused = None;
        for row in rows.iter().step_by(every) {
            let (ids, answers) = match &row.row {
                Row::Tokens(row) => (row.ids.clone(), row.loss_mask.iter().filter(|m| **m).count()),
                Row::Conversation(row) => {
                    let count = |text: &str| target.text.tokenizer.encode(text, false).map(|ids| ids.len());
                    let said = |m: &&draftsmith_text::Message| m.role == "assistant";
                    let (mut turns, mut written) = (0usize, 0usize);
                    for message in row.messages.iter().filter(said) {
                        turns += 1;
                        written += count(&message.content)?;
                    }
                    let ids = match prompt_ids(&target.text, &row.messages) {
                        Ok(ids) => ids,
                        // Whatever is wrong with a row is the stage's to tell or to count.
                        Err(error) => {
                            refused.get_or_insert(error);
                            continue;
                        }
                    };
                    match table.enabled {
                        false => (ids, written),
                        // Nobody knows how much the target will say: at most this much.
                        true => {
                            let answers = turns.max(1) * table.max_new_tokens as usize;
                            let prompt = ids.len().saturating_sub(written);
                            let mut ids = ids;
                            let filler = ids.last().copied().unwrap_or_default();
                            ids.resize(prompt + answers, filler);
                            (ids, answers)
                        }
                    }
                }
            };
            let kept = ids.len().min(longest);
            (sampled, all) = (sampled + 1, all + kept as u64);
            // What is cut to length is another row than the one that is written.
            whole += if ids.len() <= longest { kept as u64 } else { 0 };
            trained += answers.min(kept) as u64;
            if trial.len() < TRIAL_ROWS {
                let ids = ids[..kept].to_vec();
                let loss_mask = vec![true; ids.len()];
                trial.push(TokenRow { number: trial.len() as u64, ids, loss_mask });
            }
        }
        if let Some(error) = refused.filter(|_| sampled == 0) {
            return Err(error);
        }
        let share = rows.len() as f64 / sampled.max(1) as f64;
        let scaled = |n: u64| (n as f64 * share).round() as u64;
        let mut from = format!("the length of {sampled} of {} conversations", rows.len());
        let (mut tokens, mut trained_tokens) = (scaled(all), scaled(trained));
        let mut count = rows.len() as u64;
        if table.enabled {
            from.push_str(&format!(
                ", with answers as long as `regenerate.max_new_tokens` = {} allows; none is written yet",
                table.max_new_tokens
            ));
            // The limit counts answers; prompts come with them.
            if let Some(max) = table.max_tokens.filter(|max| *max < trained_tokens) {
                let part = max as f64 / trained_tokens as f64;
                tokens = (tokens as f64 * part).round() as u64;
                count = (count as f64 * part).ceil() as u64;
                trained_tokens = max;
            }
        }
        let kept_tokens = match self.keeps_states() {
            true => (tokens as f64 * whole as f64 / all.max(1) as f64).round() as u64,
            false => 0,
        };
        Ok((Amount { rows: count, tokens, trained_tokens, kept_tokens, estimated_from: Some(from) }, trial))
    }

    fn bill(
        &self,
        amount: Amount,
        trial: Vec<TokenRow>,
        dir: &Path,
        source: &mut impl CaptureSource,
    ) -> Result<Bill, Error> {
        let began = Instant::now();
        let mut tried = 0;
        let mut trial = trial.into_iter();
        source.capture_rows(&mut || trial.next(), &mut |row| {
            tried += row.len();
            ControlFlow::Continue(())
        })?;
        self.check_stop(Stage::Capture)?;
        let tokens_per_s = tried as f64 / began.elapsed().as_secs_f64().max(1e-9);
        let there = dir.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
        let hidden = self.target()?.target.config().hidden_size as u64;
        let layers = self.layers()?.len() as u64;
        Ok(Bill {
            rows: amount.rows,
            tokens: amount.tokens,
            trained_tokens: amount.trained_tokens,
            bytes: estimate_bytes(amount.tokens, hidden, layers, self.file.capture.dtype),
            free_bytes: free_bytes(there),
            kept_tokens: amount.kept_tokens,
            minutes: match tried {
                0 => 0.0,
                _ => amount.tokens.saturating_sub(amount.kept_tokens) as f64 / tokens_per_s / 60.0,
            },
            tokens_per_s,
            estimated_from: amount.estimated_from,
        })
    }

    pub(super) fn capture_source<'n>(&'n self, report: &'n dyn Report) -> Result<Source<'n>, Error> {
        let (target, layers) = (self.target()?.target.clone(), self.layers()?);
        let Some(server) = &self.file.capture.server else {
            return Ok(Source::InProcess(match &self.compute {
                Compute::Cpu => Box::new(InProcess::new(target, layers)),
                #[cfg(feature = "gpu-flex")]
                Compute::Gpu(gpu) => Box::new(InProcess::new(self.target_on(gpu)?, layers)),
                Compute::Cuda(cuda) => Box::new(InProcess::new(self.target_on(cuda)?, layers)),
                #[cfg(feature = "cuda-shim")]
                Compute::Shim(shim) => Box::new(InProcess::new(self.target_on(shim)?, layers)),
            }));
        };
        let (key_env, variable) = (server.key_env.as_deref(), self.env.variable);
        let key = server_keys(&server.all_addresses(), key_env, self.env.places, variable)?;
        let note = Arc::new(|line: &str| report.note(line));
        let options = RemoteOptions { server, key, stop: self.env.stop.flag(), note };
        let capture = Box::new(RemoteCapture::new(options, target, layers));
        Ok(Source::Remote { capture, server })
    }

    /// Tokens whose states are there.
    pub(super) fn kept_now(&self, tokens: &TokenFile) -> Result<u64, Error> {
        let kept = self.kept_rows(tokens, &self.cache_spec(tokens)?);
        Ok(kept_tokens(tokens, &kept))
    }

    /// What answering left of these rows, and what captures that were set aside have of them.
    fn kept_rows(&self, tokens: &TokenFile, spec: &CacheSpec) -> KeptRows {
        let keys = (0..tokens.len()).map(|n| {
            let row = tokens.row(n);
            KeptKey::of(&row.ids, &row.loss_mask)
        });
        let aside = self.folder.all_aside(Stage::Capture, &self.made_by(Stage::Capture));
        let earlier: Vec<PathBuf> = aside.into_iter().map(|aside| aside.folder).collect();
        KeptRows::open(&self.folder.kept_dir(), &earlier, spec, keys)
    }

    fn cache_spec(&self, tokens: &TokenFile) -> Result<CacheSpec, Error> {
        self.cache_spec_of(tokens.summary().sha256.clone(), tokens.summary().rows)
    }

    /// The cache of rows with this hash.
    pub(super) fn cache_spec_of(&self, tokens_sha256: String, rows: u64) -> Result<CacheSpec, Error> {
        let target = self.target()?;
        Ok(CacheSpec {
            target: target.reference.clone(),
            target_sha256: target.sha256.clone(),
            precision: self.arithmetic().to_string(),
            tokenizer_sha256: target.text.tokenizer.content_hash().to_string(),
            template_sha256: target.text.template()?.hash(),
            tokens_sha256,
            target_layer_ids: self.layers()?.iter().map(|l| l.0).collect(),
            hidden_size: target.target.config().hidden_size as u32,
            dtype: self.file.capture.dtype,
            shard_rows: self.file.capture.shard_rows,
            rows,
        })
    }

    pub(super) fn capture(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let tokens = self.tokens()?;
        let spec = self.cache_spec(&tokens)?;
        // A server is asked by one.
        let ranks = if self.file.capture.server.is_some() { 1 } else { self.env.ranks.count() };
        let work = match self.shared(dir, &spec, ranks)? {
            Some(shared) => Work::Together(Box::new(shared)),
            None => Work::Alone(self.sink(dir, &spec)?),
        };
        let place = work.place();
        place.iter().for_each(|place| report.note(&format!("capture: goes to `{place}`")));
        let mut source = self.capture_source(report)?;
        source.note_launch(report);
        let mut kept = self.kept_rows(&tokens, &spec);
        if work.rows_done() == 0 {
            let (amount, trial) = counted(&tokens, &kept);
            let mut bill = self.bill(amount, trial, dir, &mut source)?;
            bill.minutes /= ranks as f64;
            report.note(&format!(
                "capture: {} rows, {} tokens{}, about {}, {:.0} min{}",
                bill.rows,
                bill.tokens,
                match bill.kept_tokens {
                    0 => String::new(),
                    kept => format!(", the states of {kept} are there already"),
                },
                human(bill.bytes),
                bill.minutes.ceil(),
                if ranks > 1 { format!(" by {ranks} ranks") } else { String::new() }
            ));
            let needed = match &work {
                Work::Alone(sink) => sink.bytes_here(bill.bytes, &spec),
                Work::Together(shared) => shared.bytes_here(bill.bytes, &spec, ranks),
            };
            // What is copied makes room as it goes.
            let needed = needed.min(needed.saturating_sub(kept.bytes()) + COPY_BYTES);
            if let Some(free) = bill.free_bytes.filter(|free| *free < needed) {
                return Err(Error::input(
                    format!(
                        "capture needs about {} in `{}`, but {} are free",
                        human(needed),
                        dir.display(),
                        human(free)
                    ),
                    "free space, put the run elsewhere with `run.dir`, or train without a cache: `capture.mode=online`",
                ));
            }
        }
        report.begin("capture", Some(spec.rows), Unit::Rows);
        let began = Instant::now();
        let (mut done, mut captured, alive) = (work.rows_done(), 0, source.alive());
        report.at(done);
        let mut count = |rows: u64, tokens: u64| {
            done += rows;
            captured += tokens;
            report.at(done);
            let rate = captured as f64 / began.elapsed().as_secs_f64().max(1e-9);
            report.detail(&format!("{rate:.0} tokens/s{}", alive.words()));
        };
        let mut summary = json!({ "rows": spec.rows, "tokens": tokens.summary().tokens });
        place.into_iter().for_each(|place| summary["store"] = place.into());
        let rows = (&tokens, &mut kept);
        let (ended, notes) = match work {
            Work::Alone(sink) => self.capture_alone(sink, &spec, rows, &mut source, &mut count),
            Work::Together(shared) => {
                match self.capture_together(dir, *shared, rows, (&mut source, ranks), &mut count) {
                    Ok(shared) => shared.finish(),
                    Err(error) => (Err(error), Vec::new()),
                }
            }
        };
        notes.iter().for_each(|note| report.note(note));
        source.note_requests(report);
        summary["bytes"] = ended?.into();
        drop_kept(&self.folder.kept_dir());
        report.at(spec.rows);
        report.end();
        Ok(summary)
    }

    /// Captures all missing rows, one after the other. Gives the bytes of all, and what is to be said of where they went.
    fn capture_alone(
        &self,
        mut sink: Sink,
        spec: &CacheSpec,
        (tokens, kept): (&TokenFile, &mut KeptRows),
        source: &mut Source<'_>,
        count: &mut dyn FnMut(u64, u64),
    ) -> (Result<u64, Error>, Vec<String>) {
        let (numbers, stop) = (sink.rows_done()..spec.rows, self.env.stop);
        let rows = Rows { tokens, kept, spec };
        let ended = rows.hand_on(numbers, source, &|| stop.requested(), &mut |row, kept| {
            sink.push(&row)?;
            kept.release(sink.rows_finished());
            count(1, row.tokens());
            Ok(())
        });
        let notes = sink.notes();
        let all = || {
            ended?;
            self.check_stop(Stage::Capture)?;
            let bytes = sink.bytes_written();
            sink.finish()?;
            Ok(bytes)
        };
        (all(), notes)
    }

    /// Captures all missing rows, each rank those of its share. Gives what they wrote, to be joined.
    fn capture_together(
        &self,
        dir: &Path,
        mut shared: Shared,
        (tokens, kept): (&TokenFile, &mut KeptRows),
        (source, ranks): (&mut Source<'_>, usize),
        count: &mut dyn FnMut(u64, u64),
    ) -> Result<Shared, Error> {
        let shares = shared.parts().shares(ranks, |row| tokens.row_counts(row as usize).0 as u64);
        if ranks > 1 {
            self.env.ranks.order(&Order::Capture { shares: shares.clone() });
        }
        let side = self.env.ranks.side(self.env.stop);
        let mine = self.capture_share(dir, (tokens, kept), &shares[0], source, &mut |row_tokens| {
            count(1, row_tokens);
            side.told().into_iter().for_each(|[rows, tokens]| count(rows, tokens));
            if self.env.stop.requested() {
                side.call_off();
            }
            false
        })?;
        let mut made = vec![mine];
        if ranks > 1 {
            side.wait(|told| {
                told.into_iter().for_each(|[rows, tokens]| count(rows, tokens));
                self.env.stop.flow()
            });
            let (all, stopped) = self.env.ranks.meet(&made[0], self.env.stop.requested())?;
            made = all;
            if stopped {
                self.env.stop.request();
            }
        }
        made.into_iter().flatten().for_each(|part| shared.add(part));
        self.check_stop(Stage::Capture)?;
        Ok(shared)
    }

    /// What another rank than the first does when it is called to capture.
    pub(super) fn follow_capture(&self, shares: &[Vec<Range<u64>>]) -> Result<(), Error> {
        let dir = self.made_by(Stage::Capture);
        let (tokens, side) = (self.tokens()?, self.env.ranks.side(self.env.stop));
        let mut source = self.capture_source(&Silent)?;
        let share = &shares[self.env.ranks.rank()];
        let mut kept = self.kept_rows(&tokens, &self.cache_spec(&tokens)?);
        let made = self.capture_share(&dir, (&tokens, &mut kept), share, &mut source, &mut |row_tokens| {
            side.tell([1, row_tokens]);
            side.is_over()
        })?;
        side.end();
        self.env.ranks.meet(&made, self.env.stop.requested())?;
        Ok(())
    }

    /// Captures the rows of a share into parts, until `on_row` says that it is over or the user wants to stop: then the part under
    /// way is lost, and finished ones are kept.
    fn capture_share(
        &self,
        dir: &Path,
        (tokens, kept): (&TokenFile, &mut KeptRows),
        share: &[Range<u64>],
        source: &mut Source<'_>,
        on_row: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Vec<Part>, Error> {
        let spec = self.cache_spec(tokens)?;
        let (over, mut finished) = (Cell::new(false), self.finished(dir, &spec)?);
        let (mut waiting, mut writer) = (share.iter(), None::<PartWriter>);
        let numbers = share.iter().cloned().flatten();
        let ends = || over.get() || self.env.stop.requested();
        let rows = Rows { tokens, kept, spec: &spec };
        let ended = rows.hand_on(numbers, source, &ends, &mut |row, _| {
            let part = match &mut writer {
                Some(part) => part,
                None => {
                    let rows = waiting.next().expect("a row is of a part").clone();
                    writer.insert(PartWriter::create(dir, &spec, rows)?)
                }
            };
            if part.push(&row)?
                && let Some(full) = writer.take()
            {
                finished.take(full.finish()?)?;
            }
            over.set(over.get() || on_row(row.tokens()));
            Ok(())
        });
        let (made, notes) = finished.finish();
        notes.iter().for_each(|note| self.env.report.note(note));
        match ended.and(made) {
            // A wish to stop ends transfers too; what did not arrive is here, and goes the next time.
            Err(Error::Interrupted { .. }) if self.env.stop.requested() => Ok(Vec::new()),
            made => made,
        }
    }

    /// The rows that training reads: from the cache, or captured as they are asked for.
    pub(super) fn row_store(&self) -> Result<Box<dyn RowStore + '_>, Error> {
        let tokens = self.tokens()?;
        let spec = self.cache_spec(&tokens)?;
        match self.file.capture.mode {
            CaptureMode::Cache => {
                if let Some(stored) = self.stored_rows(&spec)? {
                    return Ok(stored);
                }
                let reader = CacheReader::open_for(self.folder.stage_dir(Stage::Capture), &spec)?;
                Ok(Box::new(reader))
            }
            CaptureMode::Online => self.online_rows(tokens, spec),
        }
    }

    /// Rows that are captured as they are asked for: on the card that trains where the target is there too, else through the host.
    fn online_rows(&self, tokens: TokenFile, spec: CacheSpec) -> Result<Box<dyn RowStore + '_>, Error> {
        match &self.compute {
            Compute::Cuda(cuda) if self.file.capture.server.is_none() => self.card_rows(cuda, tokens, spec),
            #[cfg(feature = "cuda-shim")]
            Compute::Shim(shim) if self.file.capture.server.is_none() => self.card_rows(shim, tokens, spec),
            _ => {
                let source = self.capture_source(self.env.report)?;
                Ok(Box::new(OnlineRows { tokens, source, spec }))
            }
        }
    }

    fn card_rows<L: Launcher>(
        &self,
        cuda: &Cuda<L>,
        tokens: TokenFile,
        spec: CacheSpec,
    ) -> Result<Box<dyn RowStore + '_>, Error> {
        let target = InProcess::new(self.target_on(cuda)?, self.layers()?);
        Ok(Box::new(CardRows::new(tokens, target, cuda.clone(), spec)))
    }
}

/// What is there to capture, and a few rows to try.
fn counted(tokens: &TokenFile, kept: &KeptRows) -> (Amount, Vec<TokenRow>) {
    let (summary, all) = (tokens.summary(), 0..tokens.len());
    let amount = Amount {
        rows: summary.rows,
        tokens: summary.tokens,
        trained_tokens: summary.trained_tokens,
        kept_tokens: kept_tokens(tokens, kept),
        estimated_from: None,
    };
    let trial = all.filter(|n| !kept.has(*n as u64)).take(TRIAL_ROWS);
    (amount, trial.map(|n| token_row(tokens, n)).collect())
}

/// Tokens of the rows whose states are there.
fn kept_tokens(tokens: &TokenFile, kept: &KeptRows) -> u64 {
    let rows = (0..tokens.len()).filter(|n| kept.has(*n as u64));
    rows.map(|n| tokens.row_counts(n).0 as u64).sum()
}

/// The rows of a capture.
struct Rows<'a> {
    tokens: &'a TokenFile,
    /// What is there of them.
    kept: &'a mut KeptRows,
    spec: &'a CacheSpec,
}

impl Rows<'_> {
    /// Hands on the rows with these numbers as they are stored, in order: what is kept as it is, the others from the source, until
    /// `ends` says so or `on_row` fails.
    fn hand_on(
        self,
        numbers: impl Iterator<Item = u64>,
        source: &mut Source<'_>,
        ends: &dyn Fn() -> bool,
        on_row: &mut dyn FnMut(StoredRow, &mut KeptRows) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Rows { tokens, kept, spec } = self;
        let mut numbers = numbers.peekable();
        while let Some(number) = numbers.next().filter(|_| !ends()) {
            if let Some(row) = kept.get(number) {
                on_row(row, kept)?;
                continue;
            }
            // With those behind it that are not kept either: a source may take several at once.
            let neighbours = std::iter::from_fn(|| numbers.next_if(|n| !kept.has(*n)));
            let run: Vec<u64> = std::iter::once(number).chain(neighbours).collect();
            let (mut asked, mut came, mut failed) = (run.iter(), run.iter(), None);
            let mut next = || {
                let number = if ends() { None } else { asked.next() };
                number.map(|n| token_row(tokens, *n as usize))
            };
            let ended = source.capture_rows(&mut next, &mut |row| {
                let number = *came.next().expect("a row that was asked for");
                let stored = StoredRow::of_row(&row, spec, number).map_err(Error::from);
                match stored.and_then(|row| on_row(row, kept)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        failed = Some(error);
                        ControlFlow::Break(())
                    }
                }
            });
            failed.map_or(Ok(()), Err)?;
            ended?;
        }
        Ok(())
    }
}

/// How rows come to the cache.
enum Work {
    /// One after the other, here or in a store.
    Alone(Sink),
    /// In parts that are joined.
    Together(Box<Shared>),
}

impl Work {
    /// The store that they go to.
    fn place(&self) -> Option<String> {
        match self {
            Work::Alone(sink) => sink.place(),
            Work::Together(shared) => shared.place(),
        }
    }

    /// Rows that are there already.
    fn rows_done(&self) -> u64 {
        match self {
            Work::Alone(sink) => sink.rows_done(),
            Work::Together(shared) => shared.parts().rows_done(),
        }
    }
}

/// Who computes the states.
pub(super) enum Source<'a> {
    InProcess(Box<dyn CaptureSource>),
    Remote { capture: Box<RemoteCapture<'a, Cpu>>, server: &'a CaptureServerTable },
}

impl Source<'_> {
    /// Says what a server must show.
    fn note_launch(&self, report: &dyn Report) {
        if let Source::Remote { capture, server } = self {
            let addresses = server.addresses();
            let all = addresses.join("`, `");
            let each = if addresses.len() > 1 { " each" } else { "" };
            report.note(&format!("`{all}` must{each} run with {}", capture.launch()));
        }
    }

    /// How many of several servers answer.
    fn alive(&self) -> Alive {
        match self {
            Source::InProcess(_) => Alive::default(),
            Source::Remote { capture, .. } => capture.alive(),
        }
    }

    /// Says how often a server was asked, and what went wrong with it.
    fn note_requests(&self, report: &dyn Report) {
        if let Source::Remote { capture, server } = self {
            match server.addresses().as_slice() {
                [url] => report.note(&format!("`{url}`: {}", capture.asked())),
                _ => capture.asked_each().iter().for_each(|(url, asked)| {
                    report.note(&format!("`{url}`: {asked}"));
                }),
            }
        }
    }
}

impl CaptureSource for Source<'_> {
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        match self {
            Source::InProcess(target) => target.capture_rows(next, on_row),
            Source::Remote { capture, .. } => capture.capture_rows(next, on_row),
        }
    }
}
