//! Stage `capture`: hidden states of the target for every row of tokens, on disk or on the fly.
//!
//! ```text
//! capture/manifest.json, shard-*   the target cache
//! ```

use std::path::Path;
use std::time::Instant;

use draftsmith_capture::{CaptureError, CaptureSource, InProcess};
use draftsmith_formats::cache::{CacheReader, CacheSpec, CacheWriter, CaptureRow, estimate_bytes};
use draftsmith_formats::run::Stage;
use draftsmith_formats::tokens::TokenFile;
use draftsmith_train::RowStore;
use serde::Serialize;
use serde_json::{Value, json};

use super::Run;
use crate::Error;
use crate::device::Compute;
use crate::doctor::{free_bytes, human};
use crate::report::{Report, Unit};

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
        let tokens = TokenFile::open(self.tokens_path())?;
        self.bill(&tokens, &self.folder.stage_dir(Stage::Capture))
    }

    fn bill(&self, tokens: &TokenFile, dir: &Path) -> Result<Bill, Error> {
        let mut source = self.capture_source()?;
        let began = Instant::now();
        let mut tried = 0;
        for row in tokens.rows().take(TRIAL_ROWS) {
            tried += row.ids.len();
            source.capture(&row.ids, &row.loss_mask)?;
        }
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

    fn capture_source(&self) -> Result<Box<dyn CaptureSource<Error = CaptureError>>, Error> {
        Ok(match &self.compute {
            Compute::Cpu => Box::new(InProcess::new(self.target()?.target.clone(), self.layers()?)),
            #[cfg(feature = "gpu-flex")]
            Compute::Gpu(gpu) => Box::new(InProcess::new(self.target_on(gpu)?, self.layers()?)),
        })
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
        let tokens = TokenFile::open(self.tokens_path())?;
        let spec = self.cache_spec(&tokens)?;
        let mut writer = CacheWriter::open(dir, &spec)?;
        let mut source = self.capture_source()?;
        if writer.rows_done() == 0 {
            let bill = self.bill(&tokens, dir)?;
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
        let mut captured = 0u64;
        let first = writer.rows_done();
        for number in first..spec.rows {
            report.at(number);
            self.check_stop(Stage::Capture)?;
            let row = tokens.row(number as usize);
            let states =
                source.capture(&row.ids, &row.loss_mask).map_err(|source| row_error(number, &source))?;
            writer.push(&states)?;
            captured += row.ids.len() as u64;
            report.detail(&format!(
                "{:.0} tokens/s",
                captured as f64 / began.elapsed().as_secs_f64().max(1e-9)
            ));
        }
        report.at(spec.rows);
        report.end();
        let bytes = writer.bytes_written();
        writer.finish()?;
        Ok(json!({ "rows": spec.rows, "tokens": tokens.summary().tokens, "bytes": bytes }))
    }

    /// The rows that training reads: from the cache, or captured as they are asked for.
    pub(super) fn row_store(&self) -> Result<Box<dyn RowStore + '_>, Error> {
        let tokens = TokenFile::open(self.tokens_path())?;
        let spec = self.cache_spec(&tokens)?;
        match self.file.capture.mode {
            draftsmith_formats::run::CaptureMode::Cache => {
                let reader = CacheReader::open_for(self.folder.stage_dir(Stage::Capture), &spec)?;
                Ok(Box::new(reader))
            }
            draftsmith_formats::run::CaptureMode::Online => {
                Ok(Box::new(OnlineStore { tokens, source: self.capture_source()?, spec }))
            }
        }
    }
}

fn row_error(number: u64, source: &CaptureError) -> Error {
    Error::Input { message: format!("row {number}: {source}"), hint: None }
}

/// Rows captured when asked for, rounded as a cache would have rounded them: online and offline training agree.
struct OnlineStore {
    tokens: TokenFile,
    source: Box<dyn CaptureSource<Error = CaptureError>>,
    spec: CacheSpec,
}

impl RowStore for OnlineStore {
    fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.tokens.row_counts(row).0
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        let mut out = Vec::with_capacity(rows.len());
        for i in rows {
            let row = self.tokens.row(*i);
            let states = self.source.capture(&row.ids, &row.loss_mask)?;
            out.push(states.stored_as(&self.spec)?);
        }
        Ok(out)
    }
}
