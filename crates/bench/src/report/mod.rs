//! The HTML report: one file, nothing fetched, readable without colour, printable.
//!
//! The first screen answers three questions: is it lossless, how long is the accept length, how much faster than
//! target-only decoding on this machine. The page computes nothing: every number comes from
//! [`summarize`](crate::summarize) or stands in the embedded records. Charts are drawn by `plots`; estimated
//! (`sim_`) values have charts of their own.

mod html;
mod plots;

pub(crate) use html::utc;

use crate::BenchError;
use crate::record::Record;

/// What a report shows besides its records.
#[derive(Clone, Debug, Default)]
pub struct ReportOptions {
    /// Heading; made from target and draft if `None`.
    pub title: Option<String>,
    /// How training went, if it is known.
    pub training: Option<TrainingCurve>,
}

/// Values over training. Estimated and measured ones are kept, and drawn, apart.
#[derive(Clone, Debug, Default)]
pub struct TrainingCurve {
    /// From the trainer's own accuracy: an estimate, not a measurement.
    pub sim_accept_len: Vec<TrainingPoint>,
    /// By real speculative decoding on held-out prompts.
    pub measured_accept_len: Vec<TrainingPoint>,
}

/// One value of a training curve.
#[derive(Clone, Copy, Debug)]
pub struct TrainingPoint {
    /// Optimiser step.
    pub step: u64,
    /// The value.
    pub value: f64,
    /// Ends of its 95 % interval, if it was measured on several rows.
    pub interval: Option<crate::Interval>,
    /// Rows behind it.
    pub rows: usize,
}

/// A report of some records with a heading made from them.
///
/// # Errors
/// [`BenchError::NoRecords`] for an empty list.
pub fn report_html(records: &[Record]) -> Result<String, BenchError> {
    report_html_with(records, &ReportOptions::default())
}

/// A report of some records.
///
/// # Errors
/// [`BenchError::NoRecords`] for an empty list.
pub fn report_html_with(records: &[Record], options: &ReportOptions) -> Result<String, BenchError> {
    if records.is_empty() {
        return Err(BenchError::NoRecords);
    }
    html::page(records, options)
}
