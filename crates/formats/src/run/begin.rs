//! `draft.from`: a draft that begins with another one.

use super::DraftTable;

/// A key of `[draft]` that says otherwise than the draft that is begun with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetOtherwise {
    /// Dotted key.
    pub key: String,
    /// What it is set to, as TOML.
    pub set: String,
    /// What the draft has; `None` where that is the default.
    pub own: Option<String>,
}

impl DraftTable {
    /// Puts the keys that a draft was made by in place of those that stand at their defaults.
    ///
    /// # Errors
    /// The first key that is set otherwise.
    pub fn begin_with(&mut self, own: &DraftTable) -> Result<(), SetOtherwise> {
        let keys = |table: &DraftTable| match toml::Value::try_from(table) {
            Ok(toml::Value::Table(table)) => table,
            _ => toml::Table::new(),
        };
        let (set, has, default) = (keys(self), keys(own), keys(&DraftTable::default()));
        // How weights begin, and who chose the size, says nothing of a draft that has them.
        let says = |key: &str| !matches!(key, "from" | "init" | "size");
        let otherwise = set.iter().find(|(key, value)| {
            says(key) && default.get(key.as_str()) != Some(*value) && has.get(key.as_str()) != Some(*value)
        });
        if let Some((key, value)) = otherwise {
            return Err(SetOtherwise {
                key: format!("draft.{key}"),
                set: value.to_string(),
                own: has.get(key).map(toml::Value::to_string),
            });
        }
        let from = self.from.take();
        self.clone_from(own);
        self.from = from;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::DraftSize;

    #[test]
    fn a_draft_that_is_begun_with_says_what_the_run_file_leaves_open() {
        let own = DraftTable { vocab_size: 64, intermediate: Some(16), ..DraftTable::default() };
        let from = Some("name".to_owned());
        let mut table = DraftTable { from: from.clone(), intermediate: Some(16), ..DraftTable::default() };
        table.begin_with(&own).unwrap();
        assert_eq!(table, DraftTable { from: from.clone(), ..own.clone() });
        // Once more, as the run file is read that was saved.
        table.begin_with(&own).unwrap();
        let mut other =
            DraftTable { from, heads: Some(2), size: DraftSize::Written, ..DraftTable::default() };
        let before = other.clone();
        let error = other.begin_with(&own).unwrap_err();
        assert_eq!((error.key.as_str(), error.set.as_str(), error.own), ("draft.heads", "2", None));
        assert_eq!(other, before);
        other.heads = None;
        other.vocab_size = 32;
        let error = other.begin_with(&own).unwrap_err();
        assert_eq!((error.key.as_str(), error.own.as_deref()), ("draft.vocab_size", Some("64")));
    }
}
