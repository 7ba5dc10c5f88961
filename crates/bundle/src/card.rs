//! The words of a bundle: the model card (`README.md`) and the results (`RESULTS.md`).
//!
//! Every number comes from the manifest or a measured record; commands of other engines come from
//! [`engines`](crate::engines), and the card says that they were not run for it.

use std::fmt::Write as _;

use draftsmith_formats::run::BundleWeights;
use draftsmith_model::DraftConfig;

use crate::engines::Launch;
use crate::foreign::{Layout, launch, unserved};
use crate::manifest::{Manifest, Recommended, TunedDrafting};
use crate::results::{Measured, MeasuredResult, record_files};
use crate::stored;

/// `1234567` as `1,234,567`.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn measured(value: &Option<Measured>, unit: &str) -> String {
    match value {
        None => "–".into(),
        Some(Measured { value, ci95: None }) => format!("{value:.2}{unit}"),
        Some(Measured { value, ci95: Some([low, high]) }) => {
            format!("{value:.2}{unit} [{low:.2}, {high:.2}]")
        }
    }
}

fn rate(value: Option<f64>) -> String {
    value.map_or_else(|| "–".into(), |v| format!("{v:.1}"))
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// A scalar for YAML: quoted, so that nothing in it is syntax.
fn yaml(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " "))
}

/// The table of results; empty text if nothing was measured.
fn table(results: &[MeasuredResult]) -> String {
    let mut out = String::from(
        "| workload | drafting | sampling | rows | accept length | plain tok/s | spec tok/s | speedup | identical |\n|:---|:---|:---|---:|---:|---:|---:|---:|---:|\n",
    );
    for r in results {
        let identical = if r.identical_samples == r.samples {
            format!("all {}", r.samples)
        } else {
            format!("**{} of {}**", r.identical_samples, r.samples)
        };
        let _ = writeln!(
            out,
            "| {}{} | {} | {} | {} | {} | {} | {} | {} | {identical} |",
            cell(&r.workload),
            if r.doubts.is_empty() { "" } else { " (doubts)" },
            cell(&r.drafting),
            cell(&r.sampling),
            r.rows,
            measured(&r.accept_len, ""),
            rate(r.plain_tokens_per_s),
            rate(r.spec_tokens_per_s),
            measured(&r.speedup, "×"),
        );
    }
    out
}

/// Baselines and machines of the results, each named once.
fn conditions(results: &[MeasuredResult]) -> String {
    let mut baselines: Vec<&str> = results.iter().map(|r| r.baseline.as_str()).collect();
    baselines.dedup();
    let mut machines: Vec<&str> = results.iter().map(|r| r.machine.as_str()).collect();
    machines.dedup();
    format!(
        "`[low, high]`: 95 % confidence interval over rows. Accept length: committed tokens ÷ verify steps, the target's own token included. Speedup: decode time per token; baseline: {}. Machine: {}.",
        baselines.join("; "),
        machines.join("; ")
    )
}

fn doubts(results: &[MeasuredResult]) -> String {
    let lines: Vec<String> =
        results.iter().flat_map(|r| r.doubts.iter().map(|d| format!("* {}: {d}\n", r.workload))).collect();
    if lines.is_empty() {
        String::new()
    } else {
        format!("\nDoubts about these numbers:\n\n{}", lines.concat())
    }
}

/// `RESULTS.md`.
pub(crate) fn results(manifest: &Manifest, results: &[MeasuredResult]) -> String {
    let mut out = format!("# Measured results of {}\n\n", manifest.name);
    if results.is_empty() {
        out.push_str("Nothing was measured for this bundle.\n");
        return out;
    }
    let _ = write!(out, "{}\n{}\n{}", table(results), conditions(results), doubts(results));
    out.push_str(
        "\n## Accept rate at each depth\n\nDraft tokens accepted at a depth ÷ proposals that reached it.\n\n",
    );
    let depth = results.iter().map(|r| r.accept_rate_at.len()).max().unwrap_or(0);
    let _ = write!(out, "| workload | drafting | verify steps |");
    for d in 1..=depth {
        let _ = write!(out, " {d} |");
    }
    let _ = write!(out, "\n|:---|:---|---:|{}\n", "---:|".repeat(depth));
    for r in results {
        let _ =
            write!(out, "| {} | {} | {} |", cell(&r.workload), cell(&r.drafting), grouped(r.verify_steps));
        for d in 0..depth {
            let _ = write!(
                out,
                " {} |",
                r.accept_rate_at.get(d).map_or_else(String::new, |v| format!("{:.1} %", v * 100.0))
            );
        }
        out.push('\n');
    }
    out.push_str("\n## Raw records\n\n");
    for (name, _) in record_files(results) {
        let _ = writeln!(out, "* [`results/{name}`](results/{name})");
    }
    out
}

/// `README.md` of a bundle.
pub(crate) fn readme(manifest: &Manifest, config: &DraftConfig, results: &[MeasuredResult]) -> String {
    let mut out = opening(manifest, config);
    if !results.is_empty() {
        let _ = write!(
            out,
            "## Measured\n\n{}\n{}\n{}\nMore in [RESULTS.md](RESULTS.md); raw records in `results/`.\n\n",
            table(results),
            conditions(results),
            doubts(results)
        );
    }
    let _ = write!(
        out,
        "## Use\n\n{}\n\n{}Other engines:\n\n",
        recommended(manifest, results),
        own_command(manifest)
    );
    // Engines read BF16: what is stored so in SGLang's layout needs no export.
    let is_ready = stored::named(&manifest.draft.dtype) == BundleWeights::Bf16;
    let mut lines = if is_ready { launch(config, manifest, Layout::Sglang, "DIR") } else { Vec::new() };
    let sglang = (Layout::Sglang, "DIR-sglang");
    let exports = [(Layout::Vllm, "DIR-vllm"), (Layout::Gguf, "DIR-gguf")];
    let mut remarks = Vec::new();
    for (layout, folder) in (!is_ready).then_some(sglang).into_iter().chain(exports) {
        let unserved = unserved(config, layout);
        remarks.extend(unserved);
        lines.extend(
            launch(config, manifest, layout, folder).into_iter().filter(|_| unserved.is_none()).map(
                |mut line| {
                    let name = layout.name();
                    let target = if layout == Layout::Gguf { " --target TARGET.gguf" } else { "" };
                    line.command = format!(
                        "draftsmith bundle export DIR --format {name} --out {folder}{target}\n{}",
                        line.command
                    );
                    line
                },
            ),
        );
    }
    let _ = write!(out, "{}{}", commands(&lines), NOT_RUN);
    for remark in remarks {
        let _ = write!(out, " {remark}");
    }
    let _ = write!(out, "\n\n{}{}", facts(manifest), training(manifest));
    let _ = write!(
        out,
        "{}\n## Check\n\n`draftsmith bundle check DIR` compares every file, tensor and a numeric probe with [bundle.json](bundle.json).\n",
        licence(manifest)
    );
    out
}

/// `README.md` of an export.
pub(crate) fn export_readme(manifest: &Manifest, config: &DraftConfig, layout: Layout) -> String {
    let how = commands(&launch(config, manifest, layout, "DIR"));
    folder_readme(manifest, config, &format!("{how}{NOT_RUN}\n"))
}

/// The page beside a draft in a layout of others, with what it is for.
pub(crate) fn folder_readme(manifest: &Manifest, config: &DraftConfig, how: &str) -> String {
    format!(
        "{}## Use\n\n{}\n\n{how}\n{}{}{}",
        opening(manifest, config),
        recommended(manifest, &[]),
        facts(manifest),
        training(manifest),
        licence(manifest)
    )
}

const NOT_RUN: &str = "These commands follow the engines' documentation and were not run for this card; measured numbers here are from draftsmith.";

/// A licence as the hub's cards tell it: by its lower-case SPDX name, and what has none of those by a name beside `other`.
fn hub_license(license: &str) -> String {
    match license.strip_prefix("LicenseRef-") {
        Some("unknown") => "license: \"unknown\"\n".to_string(),
        None if !license.contains(' ') => format!("license: {}\n", yaml(&license.to_lowercase())),
        name => {
            format!("license: \"other\"\nlicense_name: {}\n", yaml(&name.unwrap_or(license).to_lowercase()))
        }
    }
}

/// Front matter, title and what it is for.
fn opening(manifest: &Manifest, config: &DraftConfig) -> String {
    let target = &manifest.target;
    let mut out = String::from("---\n");
    if let Some(hub) = &target.hub_name {
        let _ = writeln!(out, "base_model: {}", yaml(hub));
    }
    out.push_str(&hub_license(&manifest.license));
    let _ = write!(
        out,
        "library_name: draftsmith\npipeline_tag: text-generation\ntags:\n- speculative-decoding\n- {}\n- draft-model\n",
        config.name()
    );
    let _ = write!(
        out,
        "---\n\n# {}\n\n{} for **{}**. It proposes tokens, the target verifies them: the target decodes faster and its output does not change. The draft is of no use without its target.\n\n",
        manifest.name,
        config.title(),
        target.name
    );
    out
}

/// The command that runs the draft here, with the very weights that it was trained for.
fn own_command(manifest: &Manifest) -> String {
    let target = &manifest.target;
    // A path of the machine where it was made helps nobody else.
    let elsewhere = |r: &&String| r.starts_with("hf:") || r.starts_with("pip:");
    let sha256 = format!("sha256 `{}`", target.weights_sha256);
    let (comment, reference) = match target.references.iter().find(elsewhere) {
        Some(reference) => {
            (format!("`DIR` is this folder; the target's weights have {sha256}"), reference.as_str())
        }
        None => {
            let format = match target.weight_format.as_str() {
                "" => String::new(),
                format => format!(" ({format})"),
            };
            let from = match &target.hub_name {
                Some(hub) => format!(", made from hf:{hub}"),
                None => String::new(),
            };
            let what = format!("`TARGET` is {}{format} with {sha256}{from}", target.name);
            (format!("`DIR` is this folder; {what}"), "TARGET")
        }
    };
    format!(
        "```sh\n# draftsmith ({comment})\ndraftsmith generate --target {reference} --bundle DIR --prompt \"Why is the sky blue?\" --prove\n```\n\n"
    )
}

/// What to run it with, behind the verdict of the run that made it.
fn recommended(manifest: &Manifest, results: &[MeasuredResult]) -> String {
    let r = &manifest.recommended;
    let verdict = r.verdict.as_ref().map_or_else(String::new, |verdict| {
        let mut letters = verdict.chars();
        let first = letters.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
        format!("**{first}{}**\n\n", letters.as_str())
    });
    let tuned = r.tuned.as_ref().map_or_else(String::new, |tuned| {
        let how = match tuned.drafting {
            TunedDrafting::Plain => "without the draft".to_owned(),
            TunedDrafting::Auto => "automatic drafting".to_owned(),
            TunedDrafting::Chain { depth } => format!("a chain of depth {depth}"),
            TunedDrafting::Tree { depth, top_k, num_draft_tokens } => {
                format!("a tree of depth {depth}, top-k {top_k}, {num_draft_tokens} draft tokens")
            }
        };
        format!(" Tuned: {how} ({}); draftsmith decodes so unless it is told otherwise.", tuned.because)
    });
    format!("{verdict}{}{tuned}", setting(manifest, results))
}

/// The setting of fixed shape. Nothing that measured slower than the target alone is recommended.
fn setting(manifest: &Manifest, results: &[MeasuredResult]) -> String {
    let r = &manifest.recommended;
    let shape = if r.top_k <= 1 {
        format!("a chain of depth {}", r.depth)
    } else {
        format!("a tree of depth {}, top-k {}, {} draft tokens", r.depth, r.top_k, r.num_draft_tokens)
    };
    let because = if r.because.is_empty() { String::new() } else { format!(" ({})", r.because) };
    if r.pays {
        return format!("Recommended: {shape}{because}.");
    }
    let automatic = Recommended::automatic_speedup(results).filter(|speedup| *speedup >= 1.0);
    let instead = match automatic {
        Some(speedup) => format!(
            "Recommended: automatic drafting (`--auto`), {speedup:.2}x over target-only decoding where it was measured. No fixed setting was faster than the target alone there"
        ),
        None => "Decode without the draft here: where it was measured, no setting was faster than the target alone"
            .to_owned(),
    };
    format!(
        "{instead}; nearest came {shape}{because}. The commands for other engines name that setting: their costs differ, measure before you use it."
    )
}

/// A block of shell lines, one paragraph per engine.
fn commands(lines: &[Launch]) -> String {
    let paragraphs: Vec<String> = lines.iter().map(|l| format!("# {}\n{}\n", l.engine, l.command)).collect();
    format!("```sh\n{}```\n\n", paragraphs.join("\n"))
}

fn facts(manifest: &Manifest) -> String {
    let target = &manifest.target;
    let ids: Vec<String> = manifest.draft.target_layer_ids.iter().map(u32::to_string).collect();
    format!(
        "## What it is\n\n| | |\n|:---|:---|\n| target | {}{} |\n| target weights | {}, sha256 `{}` |\n| tokenizer, chat template | sha256 `{}`, `{}` |\n| captured layers (0-based, output of layer) | {} |\n| draft | {} parameters in {}, width {}, {} of {} token ids; the embedding is the target's |\n\n",
        target.name,
        target.hub_name.as_ref().map_or_else(String::new, |h| format!(" (`{h}`)")),
        target.weight_format,
        target.weights_sha256,
        target.tokenizer_sha256,
        target.template_sha256,
        ids.join(", "),
        grouped(manifest.draft.parameters),
        manifest.draft.dtype,
        manifest.draft.hidden_size,
        grouped(manifest.draft.draft_vocab_size),
        grouped(target.vocab_size),
    )
}

fn training(manifest: &Manifest) -> String {
    if let Some(from) = &manifest.imported {
        return format!(
            "## Where it comes from\n\nImported with draftsmith {} from `{}` ({} layout, weights sha256 `{}`), rounded to bfloat16. How it was trained is not known here.\n\n",
            manifest.draftsmith_version, from.reference, from.layout, from.weights_sha256
        );
    }
    let training = &manifest.training;
    let mut out = format!(
        "## How it was trained\n\nWith draftsmith {}{}: {} optimiser steps, {} tokens read with their prompts, peak learning rate {:e}, seed {}{}. {}Checkpoint chosen by {}. Answers were written by {}. The resolved run file is `run.toml` of the bundle.\n\n",
        manifest.draftsmith_version,
        training.ttt_length.map_or_else(String::new, |n| format!(" (training-time test of {n} steps)")),
        grouped(training.steps),
        grouped(training.tokens_read),
        training.lr_peak,
        training.seed,
        training.wall_s.map_or_else(String::new, |s| format!(", {:.0} minutes", s / 60.0)),
        training.begun_with.as_ref().map_or_else(String::new, |from| format!(
            "It began with the weights of {} (sha256 `{}`). ",
            from.name, from.weights_sha256
        )),
        if training.chosen_by.is_empty() { "hand" } else { &training.chosen_by },
        if training.on_policy { "the target itself" } else { "the sources of the data" },
    );
    if !training.data.is_empty() {
        out.push_str("| data | rows | tokens | trained tokens | licences |\n|:---|---:|---:|---:|:---|\n");
        for data in &training.data {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} |",
                cell(&data.name),
                grouped(data.rows),
                grouped(data.tokens),
                grouped(data.trained_tokens),
                cell(&data.licenses.join(", "))
            );
        }
        out.push('\n');
    }
    out
}

fn licence(manifest: &Manifest) -> String {
    format!(
        "## Licence\n\nThese weights: {} (see LICENSE). The target: {}. Attributions are in NOTICE.\n",
        manifest.license, manifest.target.license
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_told_in_the_words_of_the_hub() {
        for (license, told) in [
            ("Apache-2.0", "license: \"apache-2.0\"\n"),
            ("LicenseRef-unknown", "license: \"unknown\"\n"),
            ("LicenseRef-Gemma", "license: \"other\"\nlicense_name: \"gemma\"\n"),
            ("MIT OR Apache-2.0", "license: \"other\"\nlicense_name: \"mit or apache-2.0\"\n"),
        ] {
            assert_eq!(hub_license(license), told);
        }
    }
}
