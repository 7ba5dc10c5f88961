//! Drafts in the layouts of other engines: out of a bundle, into one, and compared with it [formats §2.1, §3].
//!
//! There is one internal form, the bundle's own (`model`'s tensor names, layer ids that count from 0 and mean the
//! output of a layer). Every layout is a renaming of it, so each tensor is accounted for on both ways: what has no
//! place is an error that names it, never a number left as it was.

mod eagle3;
mod export;
mod found;
mod gguf_keys;
mod import;
mod parallel;
mod plain;
mod specforge;
mod verify;

pub use export::{ExportInput, Exported, export};
pub use import::{Imported, import, import_gguf, import_safetensors, import_with};
pub use specforge::{SPECFORGE, export_specforge};
pub use verify::verify_export;

use std::borrow::Cow;

use draftsmith_formats::gguf::GgufValue;
use draftsmith_model::{DraftConfig, Published, TargetConfig};
use serde_json::{Map, Value};

use crate::Problem;
use crate::engines::{LLAMA_CPP, Launch, Rules, SGLANG, VLLM};
use crate::manifest::Manifest;
use crate::problem::layer_problem;
use parallel::Parallel;

/// Name of the file in an exported GGUF folder.
pub const GGUF_FILE: &str = "draft.gguf";
/// Version of the `speculators` configuration that is written.
const SPECULATORS_VERSION: &str = "0.9.0";

/// A published way to store a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// SpecForge's, which SGLang and TensorRT-LLM load.
    Sglang,
    /// vLLM's.
    Vllm,
    /// The `speculators` library's: vLLM's tensors, a configuration that names the target.
    Speculators,
    /// One llama.cpp file, with the target's tokenizer.
    Gguf,
}

impl Layout {
    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Sglang => "sglang",
            Layout::Vllm => "vllm",
            Layout::Speculators => "speculators",
            Layout::Gguf => "gguf",
        }
    }

    /// The engine that reads it.
    fn engine(self) -> &'static str {
        match self {
            Layout::Sglang => SGLANG,
            Layout::Vllm | Layout::Speculators => VLLM,
            Layout::Gguf => LLAMA_CPP,
        }
    }
}

/// What an export may need of the target at hand.
pub struct TargetFacts<'a> {
    /// Shapes and switches.
    pub config: &'a TargetConfig,
    /// `tokenizer.*` of a GGUF file; only [`Layout::Gguf`] needs it.
    pub tokenizer: &'a [(String, GgufValue)],
}

/// Problems that the engines of a layout have with a draft, fatal and other.
pub(crate) fn lint(
    config: &DraftConfig,
    layout: Layout,
    manifest: &Manifest,
    target: Option<&TargetFacts<'_>>,
) -> Vec<Problem> {
    let mut rules = Rules::of(layout.engine());
    match config.published() {
        // That it has no layout is all that there is to say.
        Published::Nowhere => return Vec::new(),
        Published::Eagle3(config) => eagle3::lint(layout, config, manifest, target, &mut rules),
        Published::Block(block) => parallel::block_rules(layout, block, &mut rules),
        Published::PEagle(_) => parallel::p_eagle_rules(layout, &mut rules),
    }
    rules.rule(
        layout == Layout::Speculators && manifest.target.hub_name.is_none(),
        false,
        "the configuration names no target, so it must be given at the start",
    );
    // None of the engines scales a draft's embedding; Gemma's draft was trained with scaled rows. Some drafts bring their
    // own.
    rules.rule(
        target.is_some_and(|t| t.config.embed_scale != 1.0) && !config.shape().has_embedding,
        true,
        "the target scales its embedding, and the draft's copy is read unscaled",
    );
    let mut problems = rules.problems();
    let found = config.shape().max_position_embeddings;
    if let Some(context) = manifest.target.context_len
        && (found as u64) < context
    {
        problems.push(Problem::ShortContext { found, context });
    }
    problems
}

/// What engines that load a bundle as it is need of its `config.json`, beyond what the network needs.
pub(crate) fn config_problems(
    object: &Map<String, Value>,
    config: &DraftConfig,
    num_layers: Option<u64>,
) -> Vec<Problem> {
    let mut problems = match config.published() {
        Published::Eagle3(config) => eagle3::config_problems(object, config, num_layers),
        Published::Nowhere | Published::Block(_) | Published::PEagle(_) => Vec::new(),
    };
    problems.extend(num_layers.and_then(|layers| layer_problem(config, layers as u32)));
    problems
}

/// Commands for the engines that read a layout; `dir` is the folder of the draft.
pub fn launch(config: &DraftConfig, manifest: &Manifest, layout: Layout, dir: &str) -> Vec<Launch> {
    match config.published() {
        Published::Nowhere => Vec::new(),
        Published::Eagle3(_) => eagle3::launch(manifest, layout, dir),
        Published::Block(block) => {
            parallel::launch(&Parallel::Block(Cow::Borrowed(block)), manifest, layout, dir)
        }
        Published::PEagle(config) => {
            parallel::launch(&Parallel::PEagle(Cow::Borrowed(config)), manifest, layout, dir)
        }
    }
}

/// Why no engine of a layout serves a draft, as a sentence for its card; `None` if one does.
pub(crate) fn unserved(config: &DraftConfig, layout: Layout) -> Option<&'static str> {
    match config.published() {
        Published::Nowhere => Some("No other engine knows this kind of draft."),
        Published::Eagle3(config) => eagle3::unserved(config, layout),
        Published::Block(block) => parallel::unserved(&Parallel::Block(Cow::Borrowed(block)), layout),
        Published::PEagle(config) => parallel::unserved(&Parallel::PEagle(Cow::Borrowed(config)), layout),
    }
}
