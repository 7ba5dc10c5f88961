//! The layouts in which EAGLE-3 drafts are published [formats §2.1, §3].

mod engines;
mod export;
mod gguf;
mod import;
mod lint;
mod plain;
mod verify;

use std::borrow::Cow;

pub(crate) use engines::{config_problems, launch, unserved};
pub(crate) use export::files;
pub(crate) use import::{drop_layers, from_gguf, from_safetensors, layer_contradiction};
pub(crate) use lint::lint;
pub(crate) use verify::compare;

use super::Layout;

/// What a tensor of the internal form is called in a layout (`midlayer.*` in SpecForge's, `layers.0.*` in vLLM's);
/// `None` if the layout has no place for it.
fn tensor_name(layout: Layout, name: &str) -> Option<Cow<'_, str>> {
    match layout {
        Layout::Sglang => Some(name.into()),
        Layout::Vllm | Layout::Speculators => Some(match name.strip_prefix("midlayer.") {
            Some(rest) => format!("layers.0.{rest}").into(),
            None => name.into(),
        }),
        Layout::Gguf => gguf::tensor_name(name).map(Cow::Borrowed),
    }
}
