//! The kind of a draft as a word, and what the tables of a kind say to the other keys.
//!
//! Which kinds there are is known to whoever has their networks. Here stand the tables of those that have keys of their
//! own; a kind without any needs nothing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

use super::{DraftTable, RunFile};

/// Names of the tables that belong to one kind, in `[draft]` and `[train]`.
pub(super) const TABLES: [&str; 4] = ["eagle3", "dflash", "dspark", "p-eagle"];

/// Kind of draft, by its word in run files, manifests and records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Method(Cow<'static, str>);

impl Method {
    /// The kind of a word, known or not.
    pub const fn of(name: &'static str) -> Method {
        Method(Cow::Borrowed(name))
    }

    /// The word.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Default for Method {
    fn default() -> Self {
        Method::of("eagle3")
    }
}

impl JsonSchema for Method {
    fn schema_name() -> Cow<'static, str> {
        "Method".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "Kind of draft." })
    }
}

/// A word that `draft.method` may be, for the pages about run files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodWord {
    /// The word.
    pub name: &'static str,
    /// What it means, as a sentence.
    pub about: &'static str,
}

/// What the tables of a kind say to the other keys; as it stands, what a kind without tables says.
pub(super) trait KindTable {
    /// Target layers that `capture.layers` must name; `None` for any number.
    fn captured_layers(&self) -> Option<usize> {
        None
    }

    /// The draft has the target's width: `draft.hidden` means nothing.
    fn has_target_width(&self) -> bool {
        true
    }

    /// Published settings of `[train]` that hold where a run file does not say, if they are not those of all kinds.
    fn train_defaults(&self) -> &'static [(&'static str, f64)] {
        &[]
    }

    /// The mask token that is named.
    fn mask_token_id(&self) -> Option<u32> {
        None
    }

    /// What captured states differ by where no key names their layers; `None` for those that kinds with three layers share.
    fn layers_of_draft(&self, method: &str) -> Option<toml::Value> {
        Some(method.into())
    }
}

struct NoTable;

impl KindTable for NoTable {}

impl DraftTable {
    /// A kind of draft and nothing else.
    pub fn of(method: Method) -> DraftTable {
        DraftTable { method, ..DraftTable::default() }
    }

    /// The table of the kind.
    pub(super) fn own(&self) -> &dyn KindTable {
        match self.method.name() {
            "eagle3" => &self.eagle3,
            "dflash" => &self.dflash,
            "dspark" => &self.dspark,
            "p-eagle" => &self.p_eagle,
            _ => &NoTable,
        }
    }

    /// The number of layers, for a kind that has such a key.
    pub fn layers_mut(&mut self) -> Option<&mut u32> {
        match self.method.name() {
            "dflash" => Some(&mut self.dflash.layers),
            "dspark" => Some(&mut self.dspark.layers),
            "p-eagle" => Some(&mut self.p_eagle.layers),
            _ => None,
        }
    }

    /// The mask token that is named for the kind of draft.
    pub fn mask_token_id(&self) -> Option<u32> {
        self.own().mask_token_id()
    }
}

impl RunFile {
    /// Fills in what the kind has published for the keys of `[train]` that a run file and its overrides leave out.
    pub(super) fn take_train_defaults(&mut self, written: &toml::Table) {
        let train = written.get("train").and_then(toml::Value::as_table);
        for (key, value) in self.draft.own().train_defaults() {
            if train.is_some_and(|train| train.contains_key(*key)) {
                continue;
            }
            match *key {
                "lr" => self.train.lr = *value,
                "warmup_ratio" => self.train.warmup_ratio = *value,
                "max_grad_norm" => self.train.max_grad_norm = *value,
                other => unreachable!("`{other}` has no default of a kind"),
            }
        }
    }
}
