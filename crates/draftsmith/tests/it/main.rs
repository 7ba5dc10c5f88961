//! The binary as its users see it: stdout, stderr and exit code.

mod block_drafts;
mod bundles;
mod capture_servers;
mod cli;
mod decode;
mod device;
mod experts;
mod fake_capture;
mod fake_http;
mod fake_openai;
mod generators;
mod hub;
mod models;
mod openai_client;
mod pip;
mod published;
mod regenerate;
mod rows;
mod run_file;
mod run_folder;
mod serve;
mod serve_gap;
mod stages;
mod support;
mod templates;
mod thinking;
