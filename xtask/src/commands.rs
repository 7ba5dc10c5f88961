//! Commands in the documents and in `--help` are commands that the program has.

use anyhow::Result;
use clap::{CommandFactory, Parser};
use draftsmith::cli::Cli;

use crate::tree::{Findings, Tree};

/// The arguments of a line that calls us, or `None`.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.trim().trim_start_matches("$ ");
    let rest = [
        "draftsmith ",
        "cargo run --release -- ",
        "./target/release/draftsmith ",
        "target/release/draftsmith ",
    ]
    .iter()
    .find_map(|start| line.strip_prefix(start))?;
    let rest = rest.split(" #").next().unwrap_or_default();
    let mut words = Vec::new();
    let mut quote = None;
    let mut word = String::new();
    for c in rest.chars() {
        match quote {
            Some(q) if c == q => quote = None,
            Some(_) => word.push(c),
            None if c == '\'' || c == '"' => quote = Some(c),
            None if c == '>' || c == '|' => break,
            None if c.is_whitespace() => words.push(std::mem::take(&mut word)),
            None => word.push(c),
        }
    }
    words.push(word);
    words.retain(|w| !w.is_empty());
    Some(words)
}

fn check_line(place: &str, line: &str, findings: &mut Findings) {
    let Some(words) = arguments(line) else { return };
    let parsed = Cli::try_parse_from(std::iter::once("draftsmith".to_string()).chain(words));
    if let Some(error) = parsed.err().filter(|e| e.exit_code() != 0) {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        findings.push(format!("{place}: `{}` does not work: {first}", line.trim()));
    }
}

pub(crate) fn check(tree: &Tree, findings: &mut Findings) -> Result<()> {
    for file in tree.files.iter().filter(|f| f.ends_with(".md") && *f != "docs/CLI.md") {
        let text = tree.read(file)?;
        let mut shell = false;
        for (n, line) in text.lines().enumerate() {
            if let Some(language) = line.trim().strip_prefix("```") {
                shell = !shell && matches!(language, "sh" | "console" | "bash");
            } else if shell {
                check_line(&format!("{file}:{}", n + 1), line, findings);
            }
        }
    }
    let mut program = Cli::command();
    program.build();
    examples(&program, findings);
    let readme = tree.read("README.md")?;
    for wanted in ["cargo run --release -- quickstart", "cargo nextest run --release --workspace"] {
        if !readme.contains(wanted) {
            findings.push(format!("README.md: does not say `{wanted}`"));
        }
    }
    let ci = tree.read(".ci/run")?;
    let test = readme.lines().find(|l| l.starts_with("cargo nextest run")).unwrap_or_default();
    if test.is_empty() || !ci.contains(test) {
        findings.push(format!(".ci/run: does not run the README's test command `{test}`"));
    }
    Ok(())
}

fn examples(command: &clap::Command, findings: &mut Findings) {
    let help = command.get_after_help().map(|h| h.to_string()).unwrap_or_default();
    let joined = help.replace("\\\n", " ");
    for line in joined.lines().filter(|l| l.starts_with("  draftsmith ")) {
        check_line(&format!("--help of {}", command.get_name()), line, findings);
    }
    command.get_subcommands().for_each(|sub| examples(sub, findings));
}
