//! What the settings of a draft are called in its own folder.

use draftsmith_bundle::Layout;
use draftsmith_model::{DraftConfig, Published};
use serde_json::{Map, Value};

/// Objects that settings stand in beside the outermost one, the most particular first.
const INSIDE: [&str; 6] = [
    "dflash_config",
    "dspark_config",
    "eagle_config",
    "rope_scaling",
    "rope_parameters",
    "transformer_layer_config",
];

/// A draft's own words.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    /// How it is stored.
    pub(crate) layout: Layout,
    /// `eagle3.` or `dflash.` in a GGUF file.
    prefix: &'static str,
    /// `config.json`, if there is one.
    pub(crate) raw: Map<String, Value>,
}

/// The captured layers.
const LAYERS: [&str; 4] = [
    "target_layer_ids",
    "aux_hidden_state_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "dspark_target_layer_ids",
];

impl Words {
    /// Of a folder with this configuration, or of a GGUF file.
    pub(crate) fn new(layout: Layout, config: &DraftConfig, raw: Map<String, Value>) -> Words {
        let prefix = match config.published() {
            Published::Eagle3(_) | Published::Nowhere => "eagle3",
            Published::Block(_) | Published::PEagle(_) => "dflash",
        };
        Words { layout, prefix, raw }
    }

    fn is_gguf(&self) -> bool {
        self.layout == Layout::Gguf
    }

    /// The dotted place of the first of these keys that is there; else of the first of them, at the top.
    pub(crate) fn place(&self, names: &[&str]) -> String {
        for name in names {
            if let Some(place) = place_in(&self.raw, name) {
                return place;
            }
        }
        names.first().map_or_else(String::new, |name| (*name).to_owned())
    }

    /// The key of a number or switch, and its GGUF name.
    pub(crate) fn key(&self, names: &[&str], gguf: &str) -> String {
        match self.is_gguf() {
            true if gguf.contains(' ') || gguf.starts_with("tokenizer.") => gguf.to_owned(),
            true => format!("{}.{gguf}", self.prefix),
            false => self.place(names),
        }
    }

    /// The value at a dotted place as it is written.
    pub(crate) fn found(&self, place: &str) -> Option<String> {
        let mut parts = place.split('.');
        let first = self.raw.get(parts.next()?)?;
        let value = parts.try_fold(first, |at, part| at.get(part))?;
        (!value.is_null()).then(|| value.to_string())
    }

    /// The key of the captured layers, and whether it counts from 1 there (by the layer that reads a state).
    pub(crate) fn layers(&self) -> (String, u32) {
        if self.is_gguf() {
            return (format!("{}.target_layers", self.prefix), 1);
        }
        // Of two keys, the one that is believed: counted from 0, inside a table.
        let nested = place_in_tables(&self.raw, &LAYERS);
        let place = nested.unwrap_or_else(|| self.place(&LAYERS));
        let from_one =
            !place.contains('.') && place != "target_layer_ids" && place != "dspark_target_layer_ids";
        match (self.found(&place).is_some(), self.prefix) {
            (true, _) => (place, u32::from(from_one)),
            // Not written at all: where SpecForge and SGLang look for it.
            (false, "eagle3") => ("eagle_config.eagle_aux_hidden_state_layer_ids".to_owned(), 0),
            (false, _) => ("dflash_config.target_layer_ids".to_owned(), 0),
        }
    }
}

fn place_in_tables(raw: &Map<String, Value>, names: &[&str]) -> Option<String> {
    INSIDE.iter().find_map(|table| {
        let object = raw.get(*table)?.as_object()?;
        let name = names.iter().find(|name| object.get(**name).is_some_and(|v| !v.is_null()))?;
        Some(format!("{table}.{name}"))
    })
}

fn place_in(raw: &Map<String, Value>, name: &str) -> Option<String> {
    if raw.get(name).is_some_and(|value| !value.is_null()) {
        return Some(name.to_owned());
    }
    INSIDE.iter().find_map(|table| {
        let inside = place_in(raw.get(*table)?.as_object()?, name)?;
        Some(format!("{table}.{inside}"))
    })
}
