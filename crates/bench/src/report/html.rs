//! The page around the charts.

use std::fmt::Write as _;

use super::options::{ReportOptions, TrainingPoint};
use super::plots;
use super::words::{escape, utc};
use crate::BenchError;
use crate::record::{DeviceInfo, Record, Settings};
use crate::stats::Estimate;
use crate::summary::{BASELINE, Summary, advice_against, headline, summarize_each};
use crate::table::{value_or_dash, with_interval};

const STYLE: &str = include_str!("style.css");

/// Turns the links to embedded records into downloads; without scripts they lead to the text itself.
const SCRIPT: &str = "for(const a of document.querySelectorAll('a[data-record]')){const t=document.getElementById(a.dataset.record).textContent;a.href=URL.createObjectURL(new Blob([t],{type:'application/json'}));}";

/// JSON that may stand inside a script element: `<` occurs only inside strings, where an escape is the same text.
fn script_json(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// A name as part of a file name.
fn file_stem(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}

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

fn interval_text(estimate: &Option<Estimate>, digits: usize, unit: &str) -> String {
    match estimate.and_then(|e| e.interval) {
        Some(i) => format!("95 % interval {:.digits$} to {:.digits$}{unit}", i.low, i.high),
        None => "no interval: fewer than two rows".into(),
    }
}

fn sampling_text(settings: &Settings) -> String {
    if settings.temperature <= 0.0 {
        return "greedy".into();
    }
    let mut text = format!("temperature {}, seed {}", settings.temperature, settings.seed);
    if settings.top_k > 0 {
        let _ = write!(text, ", top-k {}", settings.top_k);
    }
    if settings.top_p < 1.0 {
        let _ = write!(text, ", top-p {}", settings.top_p);
    }
    text
}

/// Distinct values in order of appearance, joined: records may come from different sessions.
fn distinct(records: &[Record], value: impl Fn(&Record) -> String) -> String {
    let mut seen: Vec<String> = Vec::new();
    for record in records {
        let text = value(record);
        if !seen.contains(&text) {
            seen.push(text);
        }
    }
    seen.join(" · ")
}

pub(super) fn page(records: &[Record], options: &ReportOptions) -> Result<String, BenchError> {
    let shown = summarize_each(records);
    let per_record: Vec<Summary> = shown.iter().filter(|s| !s.is_total).cloned().collect();
    let Some((setting, best)) = headline(records) else { return Err(BenchError::NoRecords) };
    let first = &records[0];
    let title = options
        .title
        .clone()
        .unwrap_or_else(|| format!("{} with draft {}", first.target.name, first.draft.name));
    let mut out = String::with_capacity(1 << 17);
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{0}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{0}</h1>\n<p class=\"sub\">{1} · {2} · {3} · {4} · {5}</p>\n</header>\n<main>\n",
        escape(&title),
        escape(&distinct(records, |r| r.settings.drafting.label())),
        escape(&distinct(records, |r| sampling_text(&r.settings))),
        escape(&distinct(records, |r| threads_text(r.settings.threads))),
        escape(&distinct(records, |r| r.machine.cpu.clone())),
        escape(&utc(first.created_unix_s)),
    );
    let several = distinct(records, |r| r.settings.drafting.short_label()) != setting;
    if let Some(verdict) = &options.verdict {
        let _ = writeln!(out, "<p class=\"verdict\"><strong>{}</strong></p>", sentence(verdict));
    }
    answers(&mut out, &per_record, &best, several.then_some(setting.as_str()), advice_against(records));
    doubts(&mut out, &per_record, &best);
    results(&mut out, &shown);
    charts(&mut out, &shown, &per_record)?;
    if let Some(training) = &options.training {
        training_section(&mut out, &training.sim_accept_len, &training.measured_accept_len)?;
    }
    definitions(&mut out);
    conditions(&mut out, records);
    raw(&mut out, records)?;
    let _ = write!(out, "</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n");
    Ok(out)
}

fn threads_text(threads: u32) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

fn count(n: usize, word: &str) -> String {
    format!("{} {word}{}", grouped(n as u64), if n == 1 { "" } else { "s" })
}

/// The three answers of the first screen. Losslessness is told of all records; lengths and times of `total`, and
/// `setting` names it if several were measured.
fn answers(
    out: &mut String,
    all: &[Summary],
    total: &Summary,
    setting: Option<&str>,
    against: Option<String>,
) {
    let mut from = count(total.rows, "row");
    if let Some(setting) = setting {
        let _ = write!(from, ", {} (the fastest of the settings below)", escape(setting));
    }
    let outputs: usize = all.iter().map(|s| s.samples).sum();
    let equal: usize = all.iter().map(|s| s.identical_samples).sum();
    let (class, word) = if all.iter().any(|s| s.verify.is_some()) {
        ("yes", "drawn")
    } else if equal == outputs {
        ("yes", "yes")
    } else {
        ("no", "NO")
    };
    let lossless = if let Some(rule) = all.iter().find_map(|s| s.verify.as_ref()) {
        format!(
            "Outputs are drawn by the rule `{}`: from the target's distribution, and not the same texts.",
            escape(rule)
        )
    } else if equal == outputs {
        format!("All {} equal target-only decoding, token for token.", count(outputs, "output"))
    } else {
        format!("{} of {} differ from target-only decoding.", outputs - equal, count(outputs, "output"))
    };
    let rows: usize = all.iter().map(|s| s.rows).sum();
    let _ = write!(
        out,
        "<div class=\"answers\">\n<section class=\"answer\"><h2>Lossless?</h2><div class=\"big {class}\">{word}</div><p>{lossless}</p><p class=\"note\">{}</p></section>\n<section class=\"answer\"><h2>Accept length</h2><div class=\"big\">{} <small>tokens per verify step</small></div><p>{}</p><p class=\"note\">{} tokens in {} steps, {from}</p></section>\n",
        count(rows, "row"),
        value_or_dash(&total.accept_len, 2),
        interval_text(&total.accept_len, 2, ""),
        grouped(total.accept.committed_tokens),
        grouped(total.accept.verify_steps),
    );
    let speedup = total.speedup.map_or_else(|| "–".into(), |e| format!("{:.2}×", e.value));
    let against =
        against.map(|advice| format!("<p><strong>{}.</strong></p>", sentence(&advice))).unwrap_or_default();
    let _ = write!(
        out,
        "<section class=\"answer\"><h2>Speedup over target-only decoding</h2><div class=\"big\">{speedup} <small>decode time</small></div><p>{}; {} → {} tokens/s</p>{against}<p class=\"note\">{} with the prompt's prefill counted in; {from}, same session, interleaved</p></section>\n</div>\n",
        interval_text(&total.speedup, 2, "×"),
        value_or_dash(&total.plain_tokens_per_s, 1),
        value_or_dash(&total.spec_tokens_per_s, 1),
        total.speedup_with_prefill.map_or_else(|| "–".into(), |e| format!("{:.2}×", e.value)),
    );
}

/// Names of options and keys, marked by backticks in messages, as code; the first letter as a capital.
fn sentence(text: &str) -> String {
    let mut out = String::new();
    for (i, part) in text.split('`').enumerate() {
        match i % 2 {
            0 => out.push_str(&escape(part)),
            _ => {
                let _ = write!(out, "<code>{}</code>", escape(part));
            }
        }
    }
    match out.chars().next() {
        Some(first) if first.is_lowercase() => first.to_uppercase().chain(out.chars().skip(1)).collect(),
        _ => out,
    }
}

fn doubts(out: &mut String, per_record: &[Summary], total: &Summary) {
    let mut items = String::new();
    for summary in per_record {
        for doubt in &summary.doubts {
            let _ = writeln!(
                items,
                "<li><strong>{}</strong>: {}. <span class=\"advice\">{}.</span></li>",
                escape(&summary.name),
                sentence(&doubt.message()),
                sentence(doubt.advice())
            );
        }
    }
    if items.is_empty() {
        for doubt in &total.doubts {
            let _ = writeln!(
                items,
                "<li>{}. <span class=\"advice\">{}.</span></li>",
                sentence(&doubt.message()),
                sentence(doubt.advice())
            );
        }
    }
    if items.is_empty() {
        out.push_str(
            "<p class=\"note\">No doubts: outputs equal, rows enough, machine idle, clock steady.</p>\n",
        );
    } else {
        let _ = write!(
            out,
            "<section class=\"doubts\" id=\"doubts\"><h2>Doubts about these numbers</h2>\n<ul>\n{items}</ul></section>\n"
        );
    }
}

/// A workload's name, its setting in small print below.
fn stacked_name(name: &str) -> String {
    match name.split_once(" · ") {
        None => escape(name),
        Some((workload, setting)) => format!("{}<small>{}</small>", escape(workload), escape(setting)),
    }
}

/// Value with its interval in small print below.
fn stacked(estimate: &Option<Estimate>, digits: usize, unit: &str) -> String {
    match estimate {
        None => "–".into(),
        Some(e) => match e.interval {
            None => format!("{:.digits$}{unit}", e.value),
            Some(i) => {
                format!("{:.digits$}{unit}<small>{:.digits$} – {:.digits$}</small>", e.value, i.low, i.high)
            }
        },
    }
}

fn results(out: &mut String, shown: &[Summary]) {
    let _ = write!(
        out,
        "<section id=\"results\">\n<h2>Results per workload</h2>\n<div class=\"wide\"><table class=\"results\">\n<thead><tr><th scope=\"col\">workload</th><th scope=\"col\">rows</th><th scope=\"col\">tokens<small>committed</small></th><th scope=\"col\">accept length<small>tokens per step</small></th><th scope=\"col\">target-only<small>tokens/s</small></th><th scope=\"col\">with draft<small>tokens/s</small></th><th scope=\"col\">speedup<small>over target-only</small></th><th scope=\"col\">identical<small>outputs</small></th><th scope=\"col\">doubts</th></tr></thead>\n<tbody>\n"
    );
    for summary in shown {
        let class = if summary.is_total { " class=\"total\"" } else { "" };
        let identical = if let Some(rule) = &summary.verify {
            format!("drawn by {}", escape(rule))
        } else if summary.identical() {
            format!("<span class=\"yes\">all {}</span>", summary.samples)
        } else {
            format!("<span class=\"no\">{} of {}</span>", summary.identical_samples, summary.samples)
        };
        let doubts = match summary.doubts.len() {
            0 => "none".into(),
            n => format!("<a href=\"#doubts\">{n}</a>"),
        };
        let _ = writeln!(
            out,
            "<tr{class}><th scope=\"row\">{}</th><td data-of=\"rows\">{}</td><td data-of=\"tokens committed\">{}</td><td data-of=\"accept length, tokens per step\">{}</td><td data-of=\"target-only, tokens/s\">{}</td><td data-of=\"with draft, tokens/s\">{}</td><td data-of=\"speedup over target-only\">{}</td><td data-of=\"identical outputs\">{identical}</td><td data-of=\"doubts\">{doubts}</td></tr>",
            stacked_name(&summary.name),
            grouped(summary.rows as u64),
            grouped(summary.accept.committed_tokens),
            stacked(&summary.accept_len, 2, ""),
            stacked(&summary.plain_tokens_per_s, 1, ""),
            stacked(&summary.spec_tokens_per_s, 1, ""),
            stacked(&summary.speedup, 2, "×"),
        );
    }
    let _ = write!(
        out,
        "</tbody>\n</table></div>\n<p class=\"note\">Small print: 95 % confidence interval over rows. Speedup baseline: {BASELINE}.</p>\n</section>\n"
    );
}

/// A figure: heading, drawing, legend, caption, and the same numbers as a table.
fn figure(out: &mut String, id: &str, heading: &str, svg: &str, legend: &str, caption: &str, table: &str) {
    let _ = writeln!(
        out,
        "<figure id=\"{id}\"><h3>{heading}</h3>{svg}{legend}<figcaption>{caption}</figcaption><details><summary>The numbers as a table</summary><div class=\"wide\"><table>{table}</table></div></details></figure>"
    );
}

fn charts(out: &mut String, shown: &[Summary], per_record: &[Summary]) -> Result<(), BenchError> {
    out.push_str("<section id=\"charts\">\n<h2>Charts</h2>\n<p class=\"note\">All values here are measured.</p>\n<div class=\"plots\">\n");
    let rows_note = |s: &[Summary]| {
        s.iter().map(|s| format!("{} ({})", escape(&s.name), s.rows)).collect::<Vec<_>>().join(", ")
    };

    let mut table = String::from(
        "<thead><tr><th scope=\"col\">workload</th><th scope=\"col\">accept length</th><th scope=\"col\">rows</th><th scope=\"col\">verify steps</th></tr></thead><tbody>",
    );
    for s in shown {
        let _ = write!(
            table,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&s.name),
            with_interval(&s.accept_len, 3),
            s.rows,
            s.accept.verify_steps
        );
    }
    table.push_str("</tbody>");
    figure(
        out,
        "accept-length",
        "Accept length per workload",
        &plots::accept_len(shown)?,
        "",
        &format!(
            "Dot: committed tokens ÷ verify steps. Bar: 95 % interval over rows. Rows: {}.",
            rows_note(shown)
        ),
        &table,
    );

    let mut table = String::from(
        "<thead><tr><th scope=\"col\">workload</th><th scope=\"col\">target-only, tokens/s</th><th scope=\"col\">with draft, tokens/s</th><th scope=\"col\">speedup over target-only</th><th scope=\"col\">rows</th></tr></thead><tbody>",
    );
    for s in shown {
        let _ = write!(
            table,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&s.name),
            with_interval(&s.plain_tokens_per_s, 1),
            with_interval(&s.spec_tokens_per_s, 1),
            with_interval(&s.speedup, 2),
            s.rows
        );
    }
    table.push_str("</tbody>");
    figure(
        out,
        "speed",
        "Decoding speed per workload",
        &plots::tokens_per_s(shown)?,
        "<ul class=\"legend\"><li><span class=\"swatch\"></span>target-only decoding</li><li><span class=\"swatch spec\"></span>with the draft</li></ul>",
        &format!("Tokens per second of decode time, prefill not counted. Rows: {}.", rows_note(shown)),
        &table,
    );

    let with_rates: Vec<&Summary> = per_record.iter().filter(|s| !s.accept_rate_at.is_empty()).collect();
    for (i, chunk) in with_rates.chunks(plots::SERIES_MAX).enumerate() {
        let mut legend = String::from("<ul class=\"legend\">");
        for (j, s) in chunk.iter().enumerate() {
            let _ = write!(legend, "<li>{}{}</li>", plots::legend_marker(j)?, escape(&s.name));
        }
        legend.push_str("</ul>");
        let depth = chunk.iter().map(|s| s.accept_rate_at.len()).max().unwrap_or(0);
        let mut table = String::from("<thead><tr><th scope=\"col\">workload</th><th scope=\"col\">rows</th>");
        for d in 1..=depth {
            let _ = write!(table, "<th scope=\"col\">depth {d}<small>given depth {}</small></th>", d - 1);
        }
        table.push_str("</tr></thead><tbody>");
        for s in chunk {
            let _ = write!(table, "<tr><th scope=\"row\">{}</th><td>{}</td>", escape(&s.name), s.rows);
            for (rate, cond) in s.accept_rate_at.iter().zip(&s.cond_accept_rate_at) {
                let cond = cond.map_or_else(|| "–".into(), |e| format!("{:.1} %", e.value * 100.0));
                let _ = write!(table, "<td>{:.1} %<small>{cond}</small></td>", rate.value * 100.0);
            }
            table.push_str("</tr>");
        }
        table.push_str("</tbody>");
        let id = if i == 0 { "accept-rate".into() } else { format!("accept-rate-{}", i + 1) };
        figure(
            out,
            &id,
            "Accept rate at each depth",
            &plots::accept_rate(chunk)?,
            &legend,
            &format!(
                "Share of proposals that reached a depth and had it accepted. Thin bars: 95 % interval over rows. Rows: {}.",
                chunk
                    .iter()
                    .map(|s| format!("{} ({})", escape(&s.name), s.rows))
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
            &table,
        );
    }

    let mut table = String::from(
        "<thead><tr><th scope=\"col\">workload</th><th scope=\"col\">10th</th><th scope=\"col\">25th</th><th scope=\"col\">median</th><th scope=\"col\">75th</th><th scope=\"col\">90th</th><th scope=\"col\">rows</th></tr></thead><tbody>",
    );
    for s in per_record {
        let _ = write!(table, "<tr><th scope=\"row\">{}</th>", escape(&s.name));
        for p in [10.0, 25.0, 50.0, 75.0, 90.0] {
            let _ = write!(
                table,
                "<td>{}</td>",
                s.row_accept_len_percentile(p).map_or_else(|| "–".into(), |v| format!("{v:.2}"))
            );
        }
        let _ = write!(table, "<td>{}</td></tr>", s.row_accept_lens.len());
    }
    table.push_str("</tbody>");
    figure(
        out,
        "rows",
        "Accept length of single rows",
        &plots::row_distribution(per_record)?,
        "",
        &format!(
            "One dot per row; box: 25th to 75th percentile; thick bar: median. Rows: {}.",
            rows_note(per_record)
        ),
        &table,
    );
    out.push_str("</div>\n</section>\n");
    Ok(())
}

fn training_section(
    out: &mut String,
    sim: &[TrainingPoint],
    measured: &[TrainingPoint],
) -> Result<(), BenchError> {
    if sim.is_empty() && measured.is_empty() {
        return Ok(());
    }
    out.push_str("<section id=\"training\">\n<h2>Training</h2>\n<div class=\"plots\">\n");
    let table = |points: &[TrainingPoint]| {
        let mut table = String::from(
            "<thead><tr><th scope=\"col\">step</th><th scope=\"col\">value</th><th scope=\"col\">rows</th></tr></thead><tbody>",
        );
        for p in points {
            let _ = write!(
                table,
                "<tr><th scope=\"row\">{}</th><td>{:.3}</td><td>{}</td></tr>",
                p.step, p.value, p.rows
            );
        }
        table + "</tbody>"
    };
    if !measured.is_empty() {
        let svg =
            plots::training("Measured accept length while training", "tokens per verify step", measured, 0)?;
        figure(
            out,
            "training-measured",
            "Accept length, measured",
            &svg,
            "",
            "Real speculative decoding on held-out prompts; bars: 95 % interval over rows.",
            &table(measured),
        );
    }
    if !sim.is_empty() {
        let svg =
            plots::training("Estimated accept length while training", "sim_accept_len (estimated)", sim, 1)?;
        figure(
            out,
            "training-sim",
            "<code>sim_accept_len</code>, estimated",
            &svg,
            "",
            "An estimate from training accuracy, not a measurement; not comparable with the other charts.",
            &table(sim),
        );
    }
    out.push_str("</div>\n</section>\n");
    Ok(())
}

fn definitions(out: &mut String) {
    let _ = write!(
        out,
        "<section id=\"definitions\">\n<h2>What the numbers mean</h2>\n<dl>\n<dt>accept length</dt><dd>committed tokens ÷ verify steps; the target's own token is counted; cut at end-of-sequence and at the length limit; summed over tokens, not averaged over requests</dd>\n<dt>accept rate at depth d</dt><dd>draft tokens accepted at depth d ÷ proposals that reached depth d; “given depth d−1”: among those whose depth d−1 was accepted</dd>\n<dt>speedup</dt><dd>decode time per token, target-only ÷ with the draft; baseline: {BASELINE}; the side that goes first alternates</dd>\n<dt>identical</dt><dd>both outputs compared token by token</dd>\n<dt>95 % interval</dt><dd>delta method over rows (all turns of a row together), Student's t</dd>\n</dl>\n</section>\n"
    );
}

fn conditions(out: &mut String, records: &[Record]) {
    out.push_str("<section id=\"conditions\">\n<h2>Where and how</h2>\n<dl>\n");
    let mut item = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
    };
    let artifact = |a: &crate::record::ArtifactInfo| {
        let mut text = a.name.clone();
        if !a.kind.is_empty() {
            let _ = write!(text, " ({})", a.kind);
        }
        if let Some(hash) = &a.sha256 {
            let _ = write!(text, ", sha256 {hash}");
        }
        text
    };
    item("target", distinct(records, |r| artifact(&r.target)));
    item("draft", distinct(records, |r| artifact(&r.draft)));
    item("drafting", distinct(records, |r| r.settings.drafting.label()));
    item("sampling", distinct(records, |r| sampling_text(&r.settings)));
    item("answer limit", distinct(records, |r| format!("{} tokens", r.settings.max_new_tokens)));
    item("repeats", distinct(records, |r| r.settings.repeats.to_string()));
    item("warm-up", distinct(records, |r| format!("{} tokens per side", r.settings.warmup_tokens)));
    item("threads", distinct(records, |r| r.settings.threads.to_string()));
    item(
        "machine",
        distinct(records, |r| {
            let m = &r.machine;
            let mut text = format!("{}, {} logical processors", m.cpu, m.logical_cpus);
            if let Some(bytes) = m.memory_bytes {
                let _ = write!(text, ", {:.1} GiB memory", bytes as f64 / f64::from(1 << 30));
            }
            let _ = write!(text, ", {}", m.os);
            text
        }),
    );
    if records.iter().any(|r| r.machine.device.is_some()) {
        let name = |r: &Record| r.machine.device.as_ref().map_or_else(|| "cpu".to_owned(), DeviceInfo::text);
        item("computed on", distinct(records, name));
    }
    item("instruction sets", distinct(records, |r| r.machine.cpu_features.join(", ")));
    item(
        "other programs",
        distinct(records, |r| match (r.machine.others_busy_share, r.machine.load_average_1m) {
            (Some(share), _) => format!("used {:.1} % of the processors while measuring", share * 100.0),
            (None, Some(load)) => format!("load average {load:.2} before the first sample"),
            (None, None) => "unknown".into(),
        }),
    );
    item("draftsmith", distinct(records, |r| r.draftsmith_version.clone()));
    for record in records {
        let w = &record.workload;
        item(
            "workload",
            format!(
                "{}: {} of {} rows, measured {}, sha256 {}",
                w.name,
                w.rows_wanted,
                w.rows_total,
                utc(record.created_unix_s),
                w.sha256
            ),
        );
    }
    out.push_str("</dl>\n</section>\n");
}

fn raw(out: &mut String, records: &[Record]) -> Result<(), BenchError> {
    out.push_str("<section id=\"raw\" class=\"raw\">\n<h2>Raw records</h2>\n<p class=\"note\">Every sample behind this page; all numbers above can be derived again from them.</p>\n");
    for (i, record) in records.iter().enumerate() {
        let json = serde_json::to_string(record).map_err(|source| BenchError::Json { source })?;
        let stem = file_stem(&record.workload.name);
        let _ = write!(
            out,
            "<p><a href=\"#record-{i}\" data-record=\"record-{i}\" download=\"{stem}.json\">Download {}</a></p>\n<details><summary>{} as text</summary><script type=\"application/json\" class=\"record\" id=\"record-{i}\">{}</script></details>\n",
            escape(&format!("{stem}.json")),
            escape(&format!("{stem}.json")),
            script_json(&json)
        );
    }
    out.push_str("</section>\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(12_345_678), "12,345,678");
    }

    #[test]
    fn a_record_cannot_end_its_script_element() {
        assert_eq!(script_json("\"</script><!--\""), "\"\\u003c/script>\\u003c!--\"");
        let back: String = serde_json::from_str(&script_json("\"</script>\"")).unwrap();
        assert_eq!(back, "</script>");
    }
}
