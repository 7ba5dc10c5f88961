//! The data that the repository carries.

use std::path::{Path, PathBuf};

use draftsmith_data::{Decontaminator, Dedupe, LoadOptions, Loaded, Row, SourceSpec, load, read_workload};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/data")
}

fn prompts(name: &str) -> Loaded {
    let options = LoadOptions { strict: true, dedupe: Dedupe::Off, ..LoadOptions::default() };
    load(&[SourceSpec::new(folder().join(name))], &options, |_| {}).expect("every row is good")
}

#[test]
fn every_row_is_valid_and_of_an_allowed_licence() {
    let allowed = [
        "MIT",
        "Apache-2.0",
        "BSD-3-Clause",
        "CC0-1.0",
        "CC0-1.0 (base prompt) + CC0-1.0 (constraint)",
        "Apache-2.0 (base prompt) + CC0-1.0 (constraint)",
    ];
    let files = [
        ("prompts-math.jsonl.zst", 8_200),
        ("prompts-general.jsonl.zst", 7_000),
        ("prompts-valid.jsonl.zst", 201),
    ];
    for (name, rows) in files {
        let loaded = prompts(name);
        assert_eq!(loaded.rows.len(), rows, "{name}");
        for row in &loaded.rows {
            let Row::Conversation(row) = &row.row else { panic!("tokens") };
            assert!(allowed.contains(&row.license.as_deref().expect("a licence")), "{row:?}");
        }
    }
    let size: u64 = files
        .iter()
        .map(|(name, _)| std::fs::metadata(folder().join(name)).expect("the file is there").len())
        .sum();
    assert!(size <= 3_000_000, "{size}");
}

#[test]
fn no_training_prompt_overlaps_with_the_evaluation_files_or_the_held_back_rows() {
    let mut texts = Vec::new();
    for name in ["gsm8k.jsonl", "mtbench.jsonl"] {
        for item in read_workload(&folder().join("eval").join(name), None).expect("a workload") {
            texts.extend(item.turns);
        }
    }
    assert_eq!(texts.len(), 80 + 2 * 40);
    let evaluation = Decontaminator::new(texts.iter().map(String::as_str));
    let mut train = prompts("prompts-math.jsonl.zst");
    train.rows.extend(prompts("prompts-general.jsonl.zst").rows);
    let turns = |row: &Row| match row {
        Row::Conversation(row) => row.messages.iter().map(|m| m.content.clone()).collect::<Vec<_>>(),
        Row::Tokens(_) => Vec::new(),
    };
    let overlapping: Vec<String> = train
        .rows
        .iter()
        .filter(|row| turns(&row.row).iter().any(|text| evaluation.overlaps(text)))
        .map(|row| row.id())
        .collect();
    assert!(overlapping.is_empty(), "{overlapping:?}");
    // Held back and training rows together have no prompt twice.
    let count = train.rows.len();
    train.rows.extend(prompts("prompts-valid.jsonl.zst").rows);
    let held = draftsmith_data::hold_back(&mut train, 201);
    assert_eq!((held.len(), train.rows.len()), (201, count));
}
