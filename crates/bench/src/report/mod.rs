//! The HTML report: one file, nothing fetched, readable without colour, printable.
//!
//! The first screen answers three questions: is it lossless, how long is the accept length, how much faster than
//! target-only decoding on this machine. The page computes nothing: every number comes from
//! [`summarize`](crate::summarize) or stands in the embedded records. Charts are drawn by `plots`; estimated
//! (`sim_`) values have charts of their own.

mod html;
mod options;
mod plots;
mod words;

pub use options::{ReportOptions, TrainingCurve, TrainingPoint};
pub(crate) use words::utc;

use crate::BenchError;
use crate::record::Record;

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
