//! A draft whose size is chosen by rule.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Broken, broken_with};
use super::{DraftInit, RunFile};

/// Who says how large a draft is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DraftSize {
    /// The keys of `[draft]`.
    #[default]
    Written,
    /// The target: vocabulary, feed-forward width and layers are as large as a proposal may be that reads 4 % of what
    /// a pass of the target reads.
    Auto,
}

impl RunFile {
    /// A key that says what `draft.size = "auto"` decides is a contradiction; `written` is the run file as it stands.
    pub(super) fn check_size(&self, written: &toml::Table) -> Result<(), Broken> {
        if self.draft.size != DraftSize::Auto {
            return Ok(());
        }
        if self.draft.from.is_some() {
            let problem = "is set beside `draft.from`, whose draft has a size";
            return broken_with("draft.size", problem, "leave `draft.size` out, or `draft.from`".to_owned());
        }
        let draft = written.get("draft").and_then(toml::Value::as_table);
        let sets = |table: Option<&toml::Table>, key: &str| table.is_some_and(|t| t.contains_key(key));
        let own = draft.and_then(|d| d.get(self.draft.method.name())).and_then(toml::Value::as_table);
        let contradiction = ["vocab_size", "intermediate"]
            .into_iter()
            .find(|key| sets(draft, key))
            .map(|key| format!("draft.{key}"))
            .or_else(|| sets(own, "layers").then(|| format!("draft.{}.layers", self.draft.method.name())))
            .or_else(|| {
                let starts_from_target = sets(draft, "init") && self.draft.init == DraftInit::Target;
                starts_from_target.then(|| "draft.init".to_owned())
            });
        match contradiction {
            Some(key) => {
                let advice = format!("leave `{key}` out, or `draft.size`");
                broken_with(&key, "is set beside `draft.size = \"auto\"`, which decides it", advice)
            }
            None => Ok(()),
        }
    }
}
