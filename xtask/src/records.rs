//! Records in `bench/results` and the documents that cite them.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::tree::{Findings, Tree};

const FOLDER: &str = "bench/results/";

/// Every record is named by a document, and what documents name is there.
pub(crate) fn check(tree: &Tree, findings: &mut Findings) -> Result<()> {
    let records: BTreeSet<&str> = tree.files.iter().filter_map(|f| f.strip_prefix(FOLDER)).collect();
    let mut cited = BTreeSet::new();
    for file in tree.files.iter().filter(|f| f.ends_with(".md")) {
        let text = tree.read(file)?;
        for name in named(&text) {
            let found: Vec<&str> = records.iter().copied().filter(|record| matches(&name, record)).collect();
            cited.extend(&found);
            if found.is_empty() && name.starts_with(|c: char| c.is_ascii_digit()) {
                findings.push(format!("{file}: cites `{FOLDER}{name}`, which is not there"));
            }
        }
    }
    for record in records.difference(&cited) {
        findings.push(format!("{FOLDER}{record}: no document cites it: cite it, or leave it out"));
    }
    Ok(())
}

/// Records as a text names them: `bench/results/NAME`, with `*` for any part, and what goes on from such a name as `-END`.
fn named(text: &str) -> BTreeSet<String> {
    let quoted = text.split('\n').flat_map(|line| line.split('`').skip(1).step_by(2));
    let linked = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link));
    quoted
        .chain(linked)
        .filter_map(|name| match name.split_once(FOLDER) {
            Some((_, record)) => Some(record.to_string()),
            None => {
                let end = name.trim_start_matches('…');
                (end.starts_with('-') && end.contains('.') && !end.contains(' ')).then(|| format!("*{end}"))
            }
        })
        .filter(|name| !name.is_empty())
        .collect()
}

/// True if a name with `*` for any part is that of a record.
fn matches(name: &str, record: &str) -> bool {
    match name.split_once('*') {
        None => name == record,
        Some((head, rest)) => {
            let Some(left) = record.strip_prefix(head) else { return false };
            (0..=left.len()).any(|at| left.is_char_boundary(at) && matches(rest, &left[at..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_named_whole_by_a_star_or_by_their_end() {
        let text = "a `bench/results/2026-a.json`, `-b.txt`, `…-c.json`; [x](../bench/results/2026-*-d.json) `-v` [r](bench/results/)";
        let named: Vec<String> = named(text).into_iter().collect();
        assert_eq!(named, ["*-b.txt", "*-c.json", "2026-*-d.json", "2026-a.json"]);
        assert!(matches("2026-*-d.json", "2026-11-d.json") && matches("*-b.txt", "2026-b.txt"));
        assert!(!matches("2026-*-d.json", "2026-11-e.json") && !matches("2026-a.json", "2026-a.jsonl"));
    }
}
