//! Stage `capture`: hidden states of the target for every row of tokens, on disk or on the fly.
//!
//! ```text
//! capture/manifest.json, shard-*   the target cache
//! ```
//! The states come from the target in this process, or from a server of it; rows arrive in order either way.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use draftsmith_capture::{CaptureError, CaptureSource, InProcess, RemoteCapture, RemoteOptions, TokenRow};
use draftsmith_formats::cache::{CacheReader, CacheSpec, CacheWriter, CaptureRow, estimate_bytes};
use draftsmith_formats::run::{CaptureMode, CaptureServerTable, Stage};
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::Cpu;
use draftsmith_train::RowStore;
use serde::Serialize;
use serde_json::{Value, json};

use super::Run;
use crate::Error;
use crate::device::Compute;
use crate::doctor::{free_bytes, human};
use crate::report::{Report, Unit};
use crate::server::server_key;

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
    /// Bytes free where it goes, if the system says.
    pub free_bytes: Option<u64>,
    /// Minutes at the speed of a few rows just tried.
    pub minutes: f64,
    /// That speed.
    pub tokens_per_s: f64,
}

/// Rows that are tried for the estimate of minutes.
const TRIAL_ROWS: usize = 3;

impl Run<'_> {
    /// The bill of the capture stage. Earlier stages that are missing are done first.
    ///
    /// # Errors
    /// Those of the earlier stages and of the target.
    pub fn plan_capture(&self) -> Result<Bill, Error> {
        let last = if self.file.regenerate.enabled { Stage::Regenerate } else { Stage::Data };
        self.advance(last)?;
        let tokens = self.tokens()?;
        let mut source = self.capture_source(self.env.report)?;
        source.note_launch(self.env.report);
        self.bill(&tokens, &self.folder.stage_dir(Stage::Capture), &mut source)
    }

    fn bill(&self, tokens: &TokenFile, dir: &Path, source: &mut impl CaptureSource) -> Result<Bill, Error> {
        let began = Instant::now();
        let mut tried = 0;
        let mut numbers = 0..tokens.len().min(TRIAL_ROWS);
        source.capture_rows(&mut || numbers.next().map(|n| token_row(tokens, n)), &mut |row| {
            tried += row.len();
            ControlFlow::Continue(())
        })?;
        self.check_stop(Stage::Capture)?;
        let tokens_per_s = tried as f64 / began.elapsed().as_secs_f64().max(1e-9);
        let summary = tokens.summary();
        let there = dir.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
        let hidden = self.target()?.target.config().hidden_size as u64;
        Ok(Bill {
            rows: summary.rows,
            tokens: summary.tokens,
            trained_tokens: summary.trained_tokens,
            bytes: estimate_bytes(
                summary.tokens,
                hidden,
                self.layers()?.len() as u64,
                self.file.capture.dtype,
            ),
            free_bytes: free_bytes(there),
            minutes: summary.tokens as f64 / tokens_per_s / 60.0,
            tokens_per_s,
        })
    }

    fn capture_source<'n>(&'n self, report: &'n dyn Report) -> Result<Source<'n>, Error> {
        let (target, layers) = (self.target()?.target.clone(), self.layers()?);
        let Some(server) = &self.file.capture.server else {
            return Ok(Source::InProcess(match &self.compute {
                Compute::Cpu => Box::new(InProcess::new(target, layers)),
                #[cfg(feature = "gpu-flex")]
                Compute::Gpu(gpu) => Box::new(InProcess::new(self.target_on(gpu)?, layers)),
            }));
        };
        let mut key = None;
        for url in server.urls() {
            key = server_key(url, server.key_env.as_deref(), self.env.places, self.env.variable)?;
        }
        let note = Arc::new(|line: &str| report.note(line));
        let options = RemoteOptions { server, key, stop: self.env.stop.flag(), note };
        let capture = Box::new(RemoteCapture::new(options, target, layers));
        Ok(Source::Remote { capture, server })
    }

    fn cache_spec(&self, tokens: &TokenFile) -> Result<CacheSpec, Error> {
        let target = self.target()?;
        Ok(CacheSpec {
            target: target.reference.clone(),
            target_sha256: target.sha256.clone(),
            precision: self.arithmetic().to_string(),
            tokenizer_sha256: target.text.tokenizer.content_hash().to_string(),
            template_sha256: target.text.template()?.hash(),
            tokens_sha256: tokens.summary().sha256.clone(),
            target_layer_ids: self.layers()?.iter().map(|l| l.0).collect(),
            hidden_size: target.target.config().hidden_size as u32,
            dtype: self.file.capture.dtype,
            shard_rows: self.file.capture.shard_rows,
            rows: tokens.summary().rows,
        })
    }

    pub(super) fn capture(&self, dir: &Path, report: &dyn Report) -> Result<Value, Error> {
        let tokens = self.tokens()?;
        let spec = self.cache_spec(&tokens)?;
        let mut writer = CacheWriter::open(dir, &spec)?;
        let mut source = self.capture_source(report)?;
        source.note_launch(report);
        if writer.rows_done() == 0 {
            let bill = self.bill(&tokens, dir, &mut source)?;
            report.note(&format!(
                "capture: {} rows, {} tokens, about {}, {:.0} minutes",
                bill.rows,
                bill.tokens,
                human(bill.bytes),
                bill.minutes.ceil()
            ));
            if let Some(free) = bill.free_bytes.filter(|free| *free < bill.bytes) {
                return Err(Error::input(
                    format!(
                        "capture needs about {} in `{}`, but {} are free",
                        human(bill.bytes),
                        dir.display(),
                        human(free)
                    ),
                    "free space, put the run elsewhere with `run.dir`, or train without a cache: `capture.mode=online`",
                ));
            }
        }
        report.begin("capture", Some(spec.rows), Unit::Rows);
        let began = Instant::now();
        let (first, mut captured, mut failed) = (writer.rows_done(), 0u64, None);
        let (mut done, stop) = (first, self.env.stop);
        report.at(first);
        let mut numbers = first as usize..spec.rows as usize;
        let mut next = || {
            let number = if stop.requested() { None } else { numbers.next() };
            number.map(|n| token_row(&tokens, n))
        };
        let ended = source.capture_rows(&mut next, &mut |row| {
            if let Err(error) = writer.push(&row) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            done += 1;
            captured += row.len() as u64;
            report.at(done);
            report.detail(&format!(
                "{:.0} tokens/s",
                captured as f64 / began.elapsed().as_secs_f64().max(1e-9)
            ));
            ControlFlow::Continue(())
        });
        source.note_requests(report);
        if let Some(error) = failed {
            return Err(error.into());
        }
        ended?;
        self.check_stop(Stage::Capture)?;
        report.at(spec.rows);
        report.end();
        let bytes = writer.bytes_written();
        writer.finish()?;
        Ok(json!({ "rows": spec.rows, "tokens": tokens.summary().tokens, "bytes": bytes }))
    }

    /// The rows that training reads: from the cache, or captured as they are asked for.
    pub(super) fn row_store(&self) -> Result<Box<dyn RowStore + '_>, Error> {
        let tokens = self.tokens()?;
        let spec = self.cache_spec(&tokens)?;
        match self.file.capture.mode {
            CaptureMode::Cache => {
                let reader = CacheReader::open_for(self.folder.stage_dir(Stage::Capture), &spec)?;
                Ok(Box::new(reader))
            }
            CaptureMode::Online => {
                let source = self.capture_source(self.env.report)?;
                Ok(Box::new(OnlineStore { tokens, source, spec }))
            }
        }
    }
}

fn token_row(tokens: &TokenFile, number: usize) -> TokenRow {
    let row = tokens.row(number);
    TokenRow { number: number as u64, ids: row.ids.to_vec(), loss_mask: row.loss_mask.to_vec() }
}

/// Who computes the states.
enum Source<'a> {
    InProcess(Box<dyn CaptureSource>),
    Remote { capture: Box<RemoteCapture<'a, Cpu>>, server: &'a CaptureServerTable },
}

impl Source<'_> {
    /// Says what a server must show.
    fn note_launch(&self, report: &dyn Report) {
        if let Source::Remote { capture, server } = self {
            report.note(&format!("`{}` must run with {}", server.url, capture.launch()));
        }
    }

    /// Says how often a server was asked, and what went wrong with it.
    fn note_requests(&self, report: &dyn Report) {
        if let Source::Remote { capture, server } = self {
            report.note(&format!("`{}`: {}", server.url, capture.asked()));
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

/// Rows captured when asked for, rounded as a cache would have rounded them: online and offline training agree.
struct OnlineStore<'a> {
    tokens: TokenFile,
    source: Source<'a>,
    spec: CacheSpec,
}

impl RowStore for OnlineStore<'_> {
    fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.tokens.row_counts(row).0
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        let mut out = Vec::with_capacity(rows.len());
        let mut wanted = rows.iter();
        let mut next = || wanted.next().map(|n| token_row(&self.tokens, *n));
        self.source.capture_rows(&mut next, &mut |row| {
            out.push(row.stored_as(&self.spec));
            ControlFlow::Continue(())
        })?;
        if out.len() < rows.len() {
            return Err("interrupted".into());
        }
        Ok(out.into_iter().collect::<Result<_, _>>()?)
    }
}
