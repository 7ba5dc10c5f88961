//! Pages that are generated from the program: written by `--write`, compared otherwise.

use anyhow::Result;

use crate::tree::{Findings, Tree};

pub(crate) fn check(tree: &Tree, write: bool, findings: &mut Findings) -> Result<()> {
    let schema =
        serde_json::to_string_pretty(&draftsmith::formats::run::json_schema(&draftsmith::model::methods()))?
            + "\n";
    let record = tree.read("bench/results/2026-11-29-two-ranks.json")?;
    let pages = [
        ("docs/SCALING.md", draftsmith::run::scale::page(&serde_json::from_str(&record)?)),
        ("docs/CLI.md", draftsmith::cli::reference_page()),
        ("docs/RUN_FILE.md", run_file_page()),
        ("docs/run.schema.json", schema),
    ];
    for (file, page) in pages {
        let path = tree.root.join(file);
        if write {
            draftsmith::formats::atomic::write(&path, page.as_bytes())?;
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(page.as_str()) {
            findings.push(format!("{file}: not what the program says; run `cargo xtask tidy --write`"));
        }
    }
    Ok(())
}

/// `docs/RUN_FILE.md`: every key of a run file with type, default and meaning.
fn run_file_page() -> String {
    let mut page = String::from(
        "# Run file\n\nGenerated from the program by `cargo xtask tidy --write`; do not edit. A run file is TOML, one \
         table per stage; an unknown key is an error. Any key can be set on the command line after the file, as \
         `table.key=value`. The completed copy is saved beside the results and runs again to the same end. \
         [run.schema.json](run.schema.json) lets an editor check and complete it.\n",
    );
    for key in draftsmith::formats::run::reference(&draftsmith::model::methods()) {
        let cell = |text: &str| text.replace('|', "\\|");
        if key.kind == "table" {
            page.push_str(&format!(
                "\n## `[{}]`\n\n{}\n\n| key | type | default | meaning |\n|---|---|---|---|\n",
                key.key,
                cell(&key.description)
            ));
        } else {
            let default = match (key.required, &key.default) {
                (true, _) => "must be set".to_string(),
                (false, Some(value)) => format!("`{}`", cell(value)),
                (false, None) => String::new(),
            };
            page.push_str(&format!(
                "| `{}` | {} | {default} | {} |\n",
                key.key,
                cell(&key.kind),
                cell(&key.description)
            ));
        }
    }
    page
}
