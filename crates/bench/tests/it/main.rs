//! Measurements and their report, on a made-up engine.

mod common;
mod measure;
mod report;
