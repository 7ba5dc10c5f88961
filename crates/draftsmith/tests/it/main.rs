//! The binary as its users see it: stdout, stderr and exit code.

mod bundles;
mod cli;
mod decode;
mod device;
mod fake_openai;
mod generators;
mod hub;
mod models;
mod pip;
mod regenerate;
mod rows;
mod run_file;
mod serve_gap;
mod stages;
mod support;
