//! What came in, what came out, and where the difference went.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Change, DropReason, Location, RowNotes};

/// Names of unused keys that are counted one by one; data sets whose keys are data have more.
const MAX_KEYS: usize = 64;

/// Counts of one domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainCounts {
    /// Rows that came out.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their trained tokens.
    pub trained_tokens: u64,
}

/// Row lengths in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// Half of the rows are at most this long.
    pub p50: u64,
    /// 95 of 100 rows are at most this long.
    pub p95: u64,
    /// The longest row.
    pub max: u64,
}

/// The report of a data stage. Rows are conserved: `rows_read + rows_repeated + rows_split` equals
/// `rows + held_back + limited` and all of `dropped` together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rows read from files.
    pub rows_read: u64,
    /// Rows added by weights above 1.
    pub rows_repeated: u64,
    /// Rows left out by weights below 1 and by row limits.
    pub limited: u64,
    /// Rows held back for validation.
    pub held_back: u64,
    /// Rows added because a template rewrites history, so that each answer became a row.
    pub rows_split: u64,
    /// Rows that came out.
    pub rows: u64,
    /// Tokens of those rows; zero before tokenisation.
    pub tokens: u64,
    /// Trained tokens of those rows.
    pub trained_tokens: u64,
    /// Rows cut to the length limit after a whole turn.
    pub cut_at_turn: u64,
    /// Rows cut to the length limit inside a turn.
    pub cut_inside_turn: u64,
    /// Trained tokens behind the length limit, in rows that were cut.
    #[serde(default)]
    pub trained_tokens_cut: u64,
    /// Trained tokens of rows that were dropped after they had become tokens.
    #[serde(default)]
    pub trained_tokens_dropped: u64,
    /// Rows that did not come out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// The first row that was dropped for each reason: file, place and what is wrong.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub first_dropped: BTreeMap<String, String>,
    /// Rows that were changed, by change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub changed: BTreeMap<String, u64>,
    /// Rows with a key that held something and that nobody read, by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unused_keys: BTreeMap<String, u64>,
    /// Rows of the file for validation that did not come out, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub validation_dropped: BTreeMap<String, u64>,
    /// Rows that came out, by domain.
    pub domains: BTreeMap<String, DomainCounts>,
    /// Row lengths; absent before tokenisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lengths: Option<Lengths>,
}

impl Report {
    /// Counts a row that does not come out; `why` is kept of the first one for each reason.
    pub(crate) fn drop_row(&mut self, reason: DropReason, location: &Location, why: &dyn std::fmt::Display) {
        *self.dropped.entry(reason.name().to_owned()).or_default() += 1;
        self.first_dropped.entry(reason.name().to_owned()).or_insert_with(|| {
            // The name of the file alone: a report does not depend on where it was made.
            let file =
                location.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let unit = if location.is_line { "line" } else { "row" };
            format!("`{file}`, {unit} {}: {why}", location.number)
        });
    }

    /// Counts rows that were lost together with one that was counted.
    pub(crate) fn drop_more(&mut self, reason: DropReason, rows: u64) {
        if rows > 0 {
            *self.dropped.entry(reason.name().to_owned()).or_default() += rows;
        }
    }

    /// Counts `rows` changed rows.
    pub fn change(&mut self, change: Change, rows: u64) {
        if rows > 0 {
            *self.changed.entry(change.name().to_owned()).or_default() += rows;
        }
    }

    /// Counts what was changed in a row, and its keys that nobody read.
    pub fn note(&mut self, notes: &RowNotes) {
        for change in &notes.changes {
            self.change(*change, 1);
        }
        for key in &notes.unused_keys {
            let known = self.unused_keys.contains_key(key) || self.unused_keys.len() < MAX_KEYS;
            let key = if known { key.as_str() } else { "(other keys)" };
            *self.unused_keys.entry(key.to_owned()).or_default() += 1;
        }
    }

    /// Rows for which a change is counted.
    pub fn changed_by(&self, change: Change) -> u64 {
        self.changed.get(change.name()).copied().unwrap_or(0)
    }

    /// Rows dropped for a reason.
    pub fn dropped_for(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason.name()).copied().unwrap_or(0)
    }

    /// All dropped rows.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// `12 empty, 3 duplicate`, or `none`.
    pub fn dropped_in_words(&self) -> String {
        let parts: Vec<String> = self.dropped.iter().map(|(name, count)| format!("{count} {name}")).collect();
        if parts.is_empty() { "none dropped".into() } else { parts.join(", ") }
    }

    /// Sets [`Report::lengths`] from the lengths of the rows.
    pub(crate) fn set_lengths(&mut self, mut lengths: Vec<u64>) {
        lengths.sort_unstable();
        let at = |share: usize| lengths.get((lengths.len() * share).div_ceil(100).saturating_sub(1)).copied();
        self.lengths =
            at(50).zip(at(95)).zip(lengths.last()).map(|((p50, p95), max)| Lengths { p50, p95, max: *max });
    }

    /// The report as a table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: u64| {
            if value > 0 {
                out.push_str(&format!("{name:<28} {:>12}\n", grouped(value)));
            }
        };
        line("rows read", self.rows_read);
        line("  repeated by weight", self.rows_repeated);
        line("  split by the template", self.rows_split);
        line("  beyond limits", self.limited);
        line("  held back", self.held_back);
        for (reason, count) in &self.dropped {
            line(&format!("  dropped: {reason}"), *count);
        }
        for (change, count) in &self.changed {
            line(&format!("  changed: {change}"), *count);
        }
        for (reason, count) in &self.validation_dropped {
            line(&format!("  of validation: {reason}"), *count);
        }
        line("rows", self.rows);
        line("tokens", self.tokens);
        line("trained tokens", self.trained_tokens);
        line("rows cut after a turn", self.cut_at_turn);
        line("rows cut inside a turn", self.cut_inside_turn);
        line("trained tokens cut off", self.trained_tokens_cut);
        line("trained tokens dropped", self.trained_tokens_dropped);
        if let Some(lengths) = &self.lengths {
            let values = format!("{} / {} / {}", lengths.p50, lengths.p95, lengths.max);
            out.push_str(&format!("{:<28} {values:>12}\n", "row length p50 / p95 / max"));
        }
        if !self.unused_keys.is_empty() {
            let keys: Vec<String> = self
                .unused_keys
                .iter()
                .map(|(key, count)| format!("{} ({})", key.escape_debug(), grouped(*count)))
                .collect();
            out.push_str(&format!("keys nobody used: {}\n", keys.join(", ")));
        }
        for (reason, first) in &self.first_dropped {
            out.push_str(&format!("first {reason}: {first}\n"));
        }
        if !self.domains.is_empty() {
            out.push_str(&format!(
                "\n{:<24} {:>10} {:>7} {:>12} {:>12}\n",
                "domain", "rows", "share", "tokens", "trained"
            ));
        }
        let mut domains: Vec<_> = self.domains.iter().collect();
        domains.sort_by(|a, b| b.1.rows.cmp(&a.1.rows).then(a.0.cmp(b.0)));
        for (name, counts) in domains {
            let share = 100.0 * counts.rows as f64 / self.rows.max(1) as f64;
            out.push_str(&format!(
                "{name:<24} {:>10} {share:>6.1}% {:>12} {:>12}\n",
                grouped(counts.rows),
                grouped(counts.tokens),
                grouped(counts.trained_tokens),
            ));
        }
        out
    }
}

/// 1234567 as `1,234,567`.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let cases: Vec<String> = [0, 12, 999, 1000, 1_234_567].map(grouped).to_vec();
        assert_eq!(cases, ["0", "12", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn the_report_goes_through_json_and_prints() {
        let mut report =
            Report { rows_read: 1500, rows: 2, tokens: 30, trained_tokens: 12, ..Report::default() };
        let location = Location { path: std::path::Path::new("x/a.jsonl").into(), number: 7, is_line: true };
        report.drop_row(DropReason::Empty, &location, &"the conversation is empty");
        report.drop_row(DropReason::Empty, &location, &"another");
        report.change(Change::BlankSystemLeftOut, 2);
        let mut notes =
            RowNotes { unused_keys: vec!["rejected".into(), "score".into()], ..RowNotes::default() };
        report.note(&notes);
        notes.unused_keys = (0..100).map(|i| format!("k{i}")).collect();
        report.note(&notes);
        assert_eq!((report.unused_keys.len(), report.unused_keys["(other keys)"]), (MAX_KEYS + 1, 38));
        report.unused_keys.retain(|key, _| !key.starts_with(['k', '(']));
        report.domains.insert("math".into(), DomainCounts { rows: 2, tokens: 30, trained_tokens: 12 });
        report.set_lengths(vec![10, 20]);
        assert_eq!(report.lengths, Some(Lengths { p50: 10, p95: 20, max: 20 }));
        let json = serde_json::to_string(&report).expect("JSON");
        assert_eq!(serde_json::from_str::<Report>(&json).expect("a report"), report);
        let table = report.table();
        assert!(table.contains("rows read                           1,500"), "{table}");
        for words in [
            "  dropped: empty                        2\n",
            "  changed: blank_system_left_out            2\n",
            "keys nobody used: rejected (1), score (1)\n",
            "first empty: `a.jsonl`, line 7: the conversation is empty\n",
        ] {
            assert!(table.contains(words), "{words}{table}");
        }
        assert!(
            table.contains("math                              2  100.0%           30           12"),
            "{table}"
        );
    }
}
