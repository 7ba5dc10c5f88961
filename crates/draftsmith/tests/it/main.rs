//! The binary as its users see it: stdout, stderr and exit code.

mod begun;
mod block_drafts;
mod bundles;
mod capture_servers;
mod cli;
mod decode;
mod device;
mod doctor_draft;
mod experts;
mod fake_capture;
mod fake_http;
mod fake_hub;
mod fake_openai;
#[cfg(feature = "object-store")]
#[expect(dead_code, reason = "it serves the tests of crate `store` too")]
mod fake_s3;
mod generators;
mod hub;
mod installed;
mod make;
mod models;
#[cfg(feature = "object-store")]
mod moto;
mod mpi;
mod names;
#[cfg(not(feature = "object-store"))]
mod no_stores;
mod openai_client;
mod pip;
mod published;
mod push;
mod ranks;
mod real_model;
mod regenerate;
mod rows;
mod run_file;
mod run_folder;
mod serve;
mod serve_gap;
mod serve_models;
mod served_runs;
mod several_servers;
mod small;
mod stages;
#[cfg(feature = "object-store")]
mod stores;
mod support;
mod templates;
mod thinking;
mod tools;
