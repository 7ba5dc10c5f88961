//! Drafts in the layouts of other engines: out of a bundle, into one, and compared with it [formats §2.1, §3].
//!
//! There is one internal form, the bundle's own (`model`'s tensor names, layer ids that count from 0 and mean the
//! output of a layer). Every layout is a renaming of it, so each tensor is accounted for on both ways: what has no
//! place is an error that names it, never a number left as it was.

mod export;
mod gguf;
mod import;
mod lint;
mod plain;
mod verify;

pub use export::{ExportInput, Exported, export};
pub use import::{Imported, import, import_gguf, import_safetensors, import_with};
pub use verify::verify_export;

use std::borrow::Cow;

use draftsmith_formats::gguf::GgufValue;
use draftsmith_model::TargetConfig;

/// Name of the file in an exported GGUF folder.
pub const GGUF_FILE: &str = "draft.gguf";

/// A published way to store an EAGLE-3 draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// SpecForge's, which SGLang and TensorRT-LLM load: `midlayer.*`, layer ids from 0 under `eagle_config`.
    Sglang,
    /// vLLM's: `layers.0.*`, layer numbers from 1 at the top level.
    Vllm,
    /// The `speculators` library's: vLLM's tensors, a configuration that names the target.
    Speculators,
    /// One llama.cpp file of architecture `eagle3`, with the target's tokenizer.
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

    /// What a tensor of the internal form is called here; `None` if the layout has no place for it.
    pub(crate) fn tensor_name(self, name: &str) -> Option<Cow<'_, str>> {
        match self {
            Layout::Sglang => Some(name.into()),
            Layout::Vllm | Layout::Speculators => Some(match name.strip_prefix("midlayer.") {
                Some(rest) => format!("layers.0.{rest}").into(),
                None => name.into(),
            }),
            Layout::Gguf => gguf::tensor_name(name).map(Cow::Borrowed),
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
