//! Checkpoint to bundle: checks, probe, model card.
//!
//! A bundle is one folder that a serving engine loads as a draft (`config.json` and `model.safetensors` in the
//! SpecForge layout) with proof of what it is: `bundle.json` (provenance and the hash of every file), a numeric
//! probe, a model card, measured results and their raw records. [`make`] writes it in one atomic step, [`check`]
//! verifies it. [`export`] writes its draft in the layout of another engine and [`verify_export`] reads that back by
//! its own way; [`import`] makes a bundle of a draft that somebody else trained.

mod card;
mod check;
mod engines;
mod error;
mod files;
mod foreign;
mod layout;
mod make;
mod manifest;
mod network;
mod portable;
mod probe;
mod problem;
mod results;
mod stored;

pub use check::{BUNDLE_BYTES_MAX, CheckLine, CheckOptions, CheckReport, Status, check, target_problems};
pub use engines::Launch;
pub use error::{BoxError, BundleError};
pub use foreign::{
    ExportInput, Exported, GGUF_FILE, Imported, Layout, SPECFORGE, TargetFacts, export, export_specforge,
    import, import_gguf, import_safetensors, import_with, launch, verify_export,
};
pub use layout::{TensorSpec, expected_tensors, number_problems};
pub use make::{Existing, Made, MakeInput, input_of, make, remake};
pub use manifest::{
    BUNDLE_FORMAT, BUNDLE_VERSION, BegunWith, CONFIG_FILE, DataInfo, DraftInfo, FileEntry, ImportedFrom,
    MANIFEST_FILE, Manifest, PROBE_FILE, Recommended, TargetInfo, TrainingInfo, Tuned, TunedDrafting,
    WEIGHTS_FILE, has_manifest,
};
pub use network::{answer_beside, check_alone, check_with_target, make_with_target, run_draft};
pub use portable::machine_places;
pub use probe::{AnswerFn, EmbedFn, PROBE_TOLERANCE, Probe, ProbeFn, ProbeInput};
pub use problem::{Problem, layer_problem};
pub use results::{Headline, Measured, MeasuredResult, Shape};
