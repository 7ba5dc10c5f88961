//! The HTML report: self-contained, well formed, accessible, with the raw records inside.

use crate::common::{FakeRunner, measured, options, workload};
use draftsmith_bench::{
    BenchError, Interval, Record, ReportOptions, TrainingCurve, TrainingPoint, report_html, report_html_with,
    table,
};

fn two_records() -> Vec<Record> {
    vec![
        measured(&mut FakeRunner::default(), &workload("gsm8k", 24, 1), &options(60)),
        measured(
            &mut FakeRunner { depth: 3, ..FakeRunner::default() },
            &workload("mtbench", 12, 2),
            &options(40),
        ),
    ]
}

/// Panics where a tag is closed that was not opened last.
fn assert_well_formed(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        if rest.starts_with('!') {
            continue;
        }
        let end = rest.find('>').expect("an open angle bracket is closed");
        let (tag, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closing tag at ..{}", &after[..after.len().min(80)]);
            continue;
        }
        let name = tag.split([' ', '\n', '/']).next().unwrap();
        if tag.ends_with('/') || ["meta", "br", "link"].contains(&name) {
            continue;
        }
        if name == "script" || name == "style" {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).expect("it is closed") + close.len()..];
            continue;
        }
        open.push(name);
    }
    assert_eq!(open, Vec::<&str>::new());
}

#[test]
fn the_report_needs_nothing_from_elsewhere() {
    let html = report_html(&two_records()).unwrap();
    for fetched in ["src=", "@import", "url(", "<link", "<img", "<iframe", "//cdn"] {
        assert!(!html.contains(fetched), "{fetched}");
    }
    let outside: Vec<&str> = html
        .match_indices("http")
        .map(|(i, _)| &html[i..(i + 30).min(html.len())])
        .filter(|t| !t.starts_with("http://www.w3.org/2000/svg"))
        .collect();
    assert_eq!(outside, Vec::<&str>::new());
}

#[test]
fn every_tag_is_closed_and_every_chart_has_a_text() {
    let html = report_html(&two_records()).unwrap();
    assert_well_formed(&html);
    let charts = html.matches("role=\"img\"").count();
    assert_eq!(charts, 4);
    assert_eq!(html.matches("<desc>").count(), charts);
    assert_eq!(html.matches("The numbers as a table").count(), charts);
    assert!(!html.contains("\"#0"), "a placeholder colour was left");
}

#[test]
fn the_embedded_records_are_the_records() {
    let records = two_records();
    let html = report_html(&records).unwrap();
    for (i, record) in records.iter().enumerate() {
        let start = html.find(&format!("id=\"record-{i}\">")).unwrap() + format!("id=\"record-{i}\">").len();
        let text = &html[start..start + html[start..].find("</script>").unwrap()];
        assert_eq!(Record::from_json("embedded", text).unwrap(), *record);
    }
}

#[test]
fn speedups_name_their_baseline_and_doubts_stand_beside() {
    let html = report_html(&two_records()).unwrap();
    assert!(html.contains("Speedup over target-only decoding"));
    assert!(html.contains("Only 12 rows were measured"));
    assert!(html.contains("href=\"#doubts\""));
    assert!(!html.contains("sim_"), "nothing estimated without a training curve");
}

#[test]
fn estimated_and_measured_curves_are_apart() {
    let point = |step, value, rows| TrainingPoint {
        step,
        value,
        rows,
        interval: (rows > 0).then_some(Interval { low: value - 0.1, high: value + 0.1 }),
    };
    let training = TrainingCurve {
        sim_accept_len: (0..50).map(|i| point(i * 20, 1.0 + i as f64 / 40.0, 0)).collect(),
        measured_accept_len: (1..5).map(|i| point(i * 250, 1.4 + i as f64 / 8.0, 16)).collect(),
    };
    let options = ReportOptions {
        title: Some("A <b>title</b>".into()),
        training: Some(training),
        verdict: Some("worth using <here>".into()),
    };
    let html = report_html_with(&two_records(), &options).unwrap();
    assert_well_formed(&html);
    assert_eq!(html.matches("role=\"img\"").count(), 6);
    assert!(html.contains("not a measurement"));
    assert!(html.contains("Worth using &lt;here&gt;"));
    assert!(html.contains("A &lt;b&gt;title&lt;/b&gt;") && !html.contains("<b>title"));
}

#[test]
fn a_single_row_and_a_hostile_name_are_no_problem() {
    let mut record = measured(&mut FakeRunner::default(), &workload("w", 1, 1), &options(12));
    record.workload.name = "</script><script>\"&'".into();
    let html = report_html(&[record]).unwrap();
    assert_well_formed(&html);
    assert!(!html.contains("</script><script>\"&'"));
    assert!(html.contains("no interval: fewer than two rows"));
    assert!(matches!(report_html(&[]), Err(BenchError::NoRecords)));
}

#[test]
fn many_workloads_share_no_marker() {
    let records: Vec<Record> = (0..13)
        .map(|i| {
            measured(
                &mut FakeRunner::default(),
                &workload(&format!("workload-number-{i}"), 20, 1),
                &options(30),
            )
        })
        .collect();
    let html = report_html(&records).unwrap();
    assert_well_formed(&html);
    assert_eq!(html.matches("id=\"accept-rate").count(), 3, "13 workloads, 6 to a chart");
}

#[test]
fn several_settings_are_compared_and_never_summed() {
    let mut deep = options(60);
    deep.drafting = draftsmith_bench::record::Drafting::Tree { depth: 5, top_k: 4, num_draft_tokens: 16 };
    let records = vec![
        measured(
            &mut FakeRunner { depth: 2, ..FakeRunner::default() },
            &workload("gsm8k", 24, 1),
            &options(60),
        ),
        measured(&mut FakeRunner::default(), &workload("gsm8k", 24, 1), &deep),
        measured(&mut FakeRunner::default(), &workload("mtbench", 24, 1), &deep),
    ];
    let names: Vec<String> = draftsmith_bench::summarize_each(&records).into_iter().map(|s| s.name).collect();
    assert_eq!(
        names,
        ["gsm8k · chain 5", "gsm8k · tree 5×4/16", "mtbench · tree 5×4/16", "total · tree 5×4/16"]
    );
    let (setting, best) = draftsmith_bench::headline(&records).unwrap();
    assert_eq!((setting.as_str(), best.rows), ("tree 5×4/16", 48));
    let html = report_html(&records).unwrap();
    assert_well_formed(&html);
    assert!(html.contains("tree 5×4/16 (the fastest of the settings below)"));
    assert!(html.contains("All 72 outputs equal target-only decoding"));
}

#[test]
fn a_difference_in_a_slower_setting_is_not_hidden() {
    let mut deep = options(60);
    deep.drafting = draftsmith_bench::record::Drafting::Chain { depth: 7 };
    let mut slow = FakeRunner { depth: 2, spoil: Some((18, 4)), ..FakeRunner::default() };
    let records = vec![
        measured(&mut slow, &workload("gsm8k", 24, 1), &options(60)),
        measured(&mut FakeRunner::default(), &workload("gsm8k", 24, 1), &deep),
    ];
    let html = report_html(&records).unwrap();
    assert!(html.contains("10 of 48 outputs differ from target-only decoding"));
    assert!(!html.contains("<div class=\"big yes\">"));
}

#[test]
fn where_drafting_loses_report_and_table_say_so_and_why() {
    let slow = [measured(
        &mut FakeRunner { depth: 0, ..FakeRunner::default() },
        &workload("gsm8k", 24, 1),
        &options(60),
    )];
    let why = "a verify step commits 1.00 tokens and takes as long as 1.20 plain steps";
    for text in [report_html(&slow).unwrap(), table::text(&slow), table::markdown(&slow)] {
        let lower = text.to_lowercase();
        assert!(lower.contains("the only setting tried: it reached 0.83x"), "{text}");
        assert!(text.contains(why) && lower.contains("bench tune"), "{text}");
    }
    let mut deep = options(60);
    deep.drafting = draftsmith_bench::record::Drafting::Chain { depth: 7 };
    let slower =
        measured(&mut FakeRunner { depth: 0, ..FakeRunner::default() }, &workload("gsm8k", 24, 1), &deep);
    let both = [slow[0].clone(), slower];
    for text in [report_html(&both).unwrap(), table::text(&both), table::markdown(&both)] {
        assert!(text.to_lowercase().contains("decode without the draft here"), "{text}");
    }
    assert_well_formed(&report_html(&slow).unwrap());
    let fast = two_records();
    for text in [report_html(&fast).unwrap(), table::text(&fast), table::markdown(&fast)] {
        assert!(!text.contains("without the draft"), "{text}");
    }
}
