//! Workloads, measurement, statistics, doubts and reports.
//!
//! A measurement ends in a [`Record`] of raw samples; tables, the JSON of the command line and the HTML report are
//! derived from records by [`summarize`] and can be derived again by a stranger.
//!
//! Rules kept here:
//! * both sides of a speedup are measured in one session, alternating; every speedup names its baseline;
//! * counts and nanoseconds are stored, ratios derived, absence is `None`;
//! * the unit of sampling is the row: intervals are over rows;
//! * measured and `sim_` values never share a chart.

pub mod compare;
pub mod decode;
pub mod doubts;
mod error;
pub mod kernels;
mod measure;
pub mod record;
mod report;
mod runner;
pub mod stats;
mod summary;
pub mod table;
pub mod timing;
pub mod train;
pub mod tune;
mod workload;

pub use doubts::{Doubt, other_weights};
pub use error::{BenchError, BoxError};
pub use measure::{MeasureOptions, Progress, first_difference, run_workload};
pub use record::Record;
pub use report::{ReportOptions, TrainingCurve, TrainingPoint, report_html, report_html_with};
pub use runner::{BusyTimes, Dialogue, RunOptions, RunOutput, Runner};
pub use stats::{Estimate, Interval};
pub use summary::{
    BASELINE, Contract, Summary, advice_against, headline, summarize, summarize_all, summarize_each,
};
pub use workload::{Workload, WorkloadRow, workload_name};
