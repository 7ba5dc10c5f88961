//! Tables of summaries: aligned text for terminals, Markdown for model cards.

use crate::record::Record;
use crate::stats::Estimate;
use crate::summary::{BASELINE, Summary, advice_against, summarize_each};

/// Value with its interval: `2.31 [2.20, 2.42]`, or `–` if there is none.
pub fn with_interval(estimate: &Option<Estimate>, digits: usize) -> String {
    match estimate {
        None => "–".into(),
        Some(Estimate { value, interval: None, .. }) => format!("{value:.digits$}"),
        Some(Estimate { value, interval: Some(i), .. }) => {
            format!("{value:.digits$} [{:.digits$}, {:.digits$}]", i.low, i.high)
        }
    }
}

/// Value alone, or `–`.
pub fn value_or_dash(estimate: &Option<Estimate>, digits: usize) -> String {
    estimate.map_or_else(|| "–".into(), |e| format!("{:.digits$}", e.value))
}

const HEADER: [&str; 8] =
    ["workload", "rows", "tokens", "accept length", "plain tok/s", "spec tok/s", "speedup", "identical"];

fn cells(summary: &Summary) -> [String; 8] {
    let speedup = with_interval(&summary.speedup, 2);
    [
        summary.name.clone(),
        summary.rows.to_string(),
        summary.accept.committed_tokens.to_string(),
        with_interval(&summary.accept_len, 2),
        value_or_dash(&summary.plain_tokens_per_s, 1),
        value_or_dash(&summary.spec_tokens_per_s, 1),
        if summary.speedup.is_some() { speedup.replacen(' ', "× ", 1).to_string() } else { speedup },
        if let Some(rule) = &summary.verify {
            format!("drawn by {rule}")
        } else if summary.identical() {
            format!("yes ({})", summary.samples)
        } else {
            format!("NO ({} of {})", summary.samples - summary.identical_samples, summary.samples)
        },
    ]
}

/// Aligned text, with doubts below. Ends with a line feed.
pub fn text(records: &[Record]) -> String {
    let summaries = summarize_each(records);
    let rows: Vec<[String; 8]> = summaries.iter().map(cells).collect();
    let mut width = HEADER.map(|h| h.chars().count());
    for row in &rows {
        for (w, cell) in width.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: [&str; 8]| {
        let mut text = String::new();
        for (i, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(width[i] - cell.chars().count());
            // Names to the left, numbers to the right.
            match i {
                0 => text.push_str(&format!("{cell}{pad}")),
                _ => text.push_str(&format!("  {pad}{cell}")),
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(HEADER);
    for row in &rows {
        line(std::array::from_fn(|i| row[i].as_str()));
    }
    out.push_str(&format!("[low, high]: 95 % confidence interval over rows. speedup: decode time per token, baseline {BASELINE}.\n"));
    out.push_str(&records.first().map_or_else(String::new, |record| record.machine.device_line()));
    if let Some(advice) = advice_against(records) {
        out.push_str(&format!("{advice}\n"));
    }
    for summary in summaries.iter().filter(|s| !s.is_total) {
        for doubt in &summary.doubts {
            out.push_str(&format!("doubt ({}): {}\n  {}\n", summary.name, doubt.message(), doubt.advice()));
        }
    }
    out
}

/// Markdown, with doubts as a list below. Ends with a line feed.
pub fn markdown(records: &[Record]) -> String {
    let summaries = summarize_each(records);
    let mut out = format!("| {} |\n|:---|{}\n", HEADER.join(" | "), "---:|".repeat(HEADER.len() - 1));
    for summary in &summaries {
        out.push_str(&format!("| {} |\n", cells(summary).map(|c| c.replace('|', "\\|")).join(" | ")));
    }
    out.push_str(&format!(
        "\n`[low, high]`: 95 % confidence interval over rows. Accept length: committed tokens ÷ verify steps, the target's own token included. Speedup: decode time per token; baseline: {BASELINE}.\n"
    ));
    if let Some(advice) = advice_against(records) {
        out.push_str(&format!("\n{}{}.\n", advice[..1].to_uppercase(), &advice[1..]));
    }
    let doubts: Vec<String> = summaries
        .iter()
        .filter(|s| !s.is_total)
        .flat_map(|s| s.doubts.iter().map(|d| format!("* {}: {} ({})\n", s.name, d.message(), d.advice())))
        .collect();
    if !doubts.is_empty() {
        out.push_str("\nDoubts:\n\n");
        out.extend(doubts);
    }
    out
}
