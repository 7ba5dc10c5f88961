//! The measurement on a made-up engine: order, warm-up, conversations, comparison, summaries, doubts.

use std::ops::ControlFlow;
use std::time::Duration;

use crate::common::{FakeDialogue, FakeRunner, measured, options, workload};
use draftsmith_bench::record::Order;
use draftsmith_bench::{
    BenchError, BusyTimes, Contract, Doubt, Record, run_workload, summarize, summarize_all, table,
};

/// Kinds of doubt about a record.
fn doubts_of(record: &Record) -> Vec<&'static str> {
    summarize(record).doubts.iter().map(Doubt::kind).collect()
}

#[test]
fn both_sides_alternate_after_a_warm_up() {
    let mut runner = FakeRunner::default();
    let record = measured(&mut runner, &workload("w", 3, 1), &options(20));
    let calls: Vec<_> = runner.calls.iter().map(|(side, _, n)| (*side, *n)).collect();
    assert_eq!(
        calls,
        [
            ("plain", 8),
            ("spec", 8),
            ("plain", 20),
            ("spec", 20),
            ("spec", 20),
            ("plain", 20),
            ("plain", 20),
            ("spec", 20)
        ]
    );
    let orders: Vec<_> = record.samples.iter().map(|s| s.order).collect();
    assert_eq!(orders, [Order::PlainFirst, Order::SpecFirst, Order::PlainFirst]);
}

#[test]
fn the_answer_of_a_turn_is_part_of_the_next_prompt() {
    let mut runner = FakeRunner::default();
    let record = measured(&mut runner, &workload("w", 1, 2), &options(20));
    assert_eq!(record.samples.len(), 2);
    let second = &runner.calls.last().unwrap().1;
    assert!(second.contains(&(2000 + 20)), "the first answer has 20 tokens: {second:?}");
    assert_eq!(record.samples[1].prompt_tokens as usize, second.len());
}

#[test]
fn summaries_are_ratios_of_sums() {
    let record = measured(&mut FakeRunner::default(), &workload("w", 30, 2), &options(40));
    let summary = summarize(&record);
    let steps: u64 = record.samples.iter().map(|s| s.accept.verify_steps).sum();
    let committed: u64 = record.samples.iter().map(|s| s.accept.committed_tokens).sum();
    assert_eq!(committed, 60 * 39);
    assert_eq!((summary.rows, summary.samples), (30, 60));
    assert_eq!(summary.accept_len.unwrap().value, committed as f64 / steps as f64);
    // 10 ms per plain token, 12 ms per verify step: known beforehand.
    assert!((summary.plain_tokens_per_s.unwrap().value - 100.0).abs() < 1e-9);
    let speedup = summary.speedup.unwrap();
    assert!((speedup.value - summary.accept_len.unwrap().value / 1.2).abs() < 1e-9);
    let interval = speedup.interval.unwrap();
    assert!(interval.low < speedup.value && speedup.value < interval.high);
    assert_eq!(summary.accept_rate_at.len(), 5);
    assert_eq!(doubts_of(&record), Vec::<&str>::new());
}

#[test]
fn repeats_add_times_but_not_counts() {
    let mut twice = options(40);
    twice.repeats = 2;
    let one = summarize(&measured(&mut FakeRunner::default(), &workload("w", 20, 1), &options(40)));
    let two = summarize(&measured(&mut FakeRunner::default(), &workload("w", 20, 1), &twice));
    assert_eq!((one.samples, two.samples), (20, 40));
    assert_eq!(one.accept, two.accept);
    assert_eq!(one.rows, two.rows);
}

#[test]
fn a_different_output_is_found_named_and_told() {
    let mut runner = FakeRunner::default();
    let workload = workload("w", 20, 1);
    // Rows 0 to 9 have prompts of 14 bytes, the others of 15.
    runner.spoil = Some((14, 7));
    let record = measured(&mut runner, &workload, &options(20));
    assert_eq!(record.samples[0].first_difference, Some(7));
    assert!(!record.samples[0].identical && record.samples[10].identical);
    let summary = summarize(&record);
    assert!(!summary.identical());
    assert!(matches!(
        &summary.doubts[0],
        Doubt::OutputsDiffer { samples: 10, of: 20, id, turn: 0, token_idx: 7 } if id == "w/0"
    ));
    assert!(!Contract::new(&record).identical);
    assert!(table::text(&[record]).contains("NO (10 of 20)"));
}

#[test]
fn every_doubt_is_raised_by_its_cause_alone() {
    let many = workload("w", 24, 1);
    let quiet = measured(&mut FakeRunner::default(), &many, &options(20));
    assert!(doubts_of(&quiet).is_empty(), "{:?}", doubts_of(&quiet));

    let few = measured(&mut FakeRunner::default(), &workload("w", 5, 1), &options(20));
    assert_eq!(doubts_of(&few), ["too_few_samples"]);

    let mut other = quiet.clone();
    other.draft.trained_beside = Some("cd".repeat(32));
    assert_eq!(doubts_of(&other), ["other_weights"]);
    other.draft.trained_beside.clone_from(&other.target.sha256);
    assert!(doubts_of(&other).is_empty(), "the same weights");

    let mut busy = quiet.clone();
    busy.machine.load_average_1m = Some(1.7);
    assert_eq!(doubts_of(&busy), ["machine_busy"]);

    // Our own work is in the load average; what others did while measuring counts for more.
    busy.machine.others_busy_share = Some(0.02);
    assert!(doubts_of(&busy).is_empty());
    busy.machine.others_busy_share = Some(0.3);
    assert_eq!(doubts_of(&busy), ["machine_busy"]);

    let mut crowded = quiet.clone();
    crowded.settings.threads = 8;
    assert_eq!(doubts_of(&crowded), ["too_many_threads"]);

    let mut cold = quiet.clone();
    cold.samples[0].plain.decode_ns *= 2;
    assert_eq!(doubts_of(&cold), ["first_sample_slow"]);

    // 2 warm-up calls, then 2 per sample: the second half of 24 samples starts after call 26.
    let mut throttled = FakeRunner { slow_from: Some((26, 1.3)), ..FakeRunner::default() };
    assert_eq!(doubts_of(&measured(&mut throttled, &many, &options(20))), ["clock_drift"]);

    let mut small = FakeRunner { context_len: 34, ..FakeRunner::default() };
    let partly = measured(&mut small, &workload("w", 40, 1), &options(20));
    assert_eq!((partly.samples.len(), partly.skipped.len()), (10, 30));
    assert_eq!(doubts_of(&partly), ["too_few_samples", "rows_skipped"]);

    let mut idle = quiet.clone();
    for sample in &mut idle.samples {
        sample.accept = Default::default();
    }
    assert_eq!(doubts_of(&idle), ["nothing_drafted"]);
    assert_eq!(summarize(&idle).accept_len, None);
    assert_eq!(Contract::new(&idle).accept_len, None);
}

#[test]
fn a_stopped_run_keeps_what_was_measured() {
    let mut seen = 0;
    let record = run_workload(
        &mut FakeRunner::default(),
        &mut FakeDialogue,
        &workload("w", 10, 1),
        &options(20),
        &mut |progress| {
            seen += usize::from(progress.sample.is_some());
            if progress.samples.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    )
    .unwrap();
    assert_eq!((seen, record.samples.len(), record.stopped_early), (3, 3, true));
    assert!(doubts_of(&record).contains(&"stopped_early"));
}

#[test]
fn nothing_measured_is_an_error_with_the_reason() {
    let mut tiny = FakeRunner { context_len: 8, ..FakeRunner::default() };
    let result = run_workload(&mut tiny, &mut FakeDialogue, &workload("w", 2, 1), &options(20), &mut |_| {
        ControlFlow::Continue(())
    });
    match result {
        Err(error @ BenchError::NothingMeasured { skipped: 2, .. }) => {
            assert!(error.to_string().contains("do not fit a context of 8"), "{error}");
            assert!(error.hint().is_some());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_record_survives_its_file_and_refuses_a_broken_one() {
    let record = measured(&mut FakeRunner::default(), &workload("w", 4, 2), &options(20));
    let text = record.to_json().unwrap();
    assert_eq!(Record::from_json("r.json", &text).unwrap(), record);
    let refused = |text: String, word: &str| {
        let error = Record::from_json("r.json", &text).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("r.json"), "{error}");
    };
    refused(text.replace("\"version\": 1", "\"version\": 2"), "version 2");
    refused(text.replace("draftsmith-bench-record", "other"), "format");
    refused(text.replace("\"stopped_early\"", "\"stoped_early\""), "stoped_early");
    refused(text.replace("\"identical\": true", "\"identical\": false"), "disagree");
    refused("{".into(), "EOF");
}

#[test]
fn the_contract_has_the_promised_keys_in_order() {
    let record = measured(&mut FakeRunner::default(), &workload("w", 20, 1), &options(20));
    let value = serde_json::to_value(Contract::new(&record)).unwrap();
    let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys[..11],
        [
            "accept_len",
            "accept_rate_at",
            "verify_steps",
            "committed_tokens",
            "plain_tokens_per_s",
            "spec_tokens_per_s",
            "speedup",
            "identical",
            "rows",
            "doubts",
            "machine"
        ]
    );
    assert_eq!(value["rows"], 20);
    assert_eq!(value["identical"], true);
    assert_eq!(value["accept_rate_at"].as_array().unwrap().len(), 5);
    assert_eq!(value["machine"]["cpu"], "Made-up CPU");
}

#[test]
fn the_total_sums_over_workloads() {
    let a = measured(&mut FakeRunner::default(), &workload("a", 12, 1), &options(20));
    let b = measured(&mut FakeRunner::default(), &workload("b", 12, 1), &options(80));
    let total = summarize_all(&[a.clone(), b.clone()]);
    let (sa, sb) = (summarize(&a), summarize(&b));
    assert_eq!(total.accept.verify_steps, sa.accept.verify_steps + sb.accept.verify_steps);
    assert_eq!(total.rows, 24);
    assert!(total.doubts.is_empty(), "24 rows together are enough: {:?}", total.doubts);
    let text = table::text(&[a.clone(), b.clone()]);
    assert_eq!(
        text.lines().take(4).map(|l| l.split_whitespace().next().unwrap()).collect::<Vec<_>>(),
        ["workload", "a", "b", "total"]
    );
    let markdown = table::markdown(&[a, b]);
    assert!(markdown.lines().nth(4).unwrap().starts_with("| total | 24 |"), "{markdown}");
}

#[test]
fn kernel_widths_take_turns_and_medians_are_kept_in_order() {
    use draftsmith_bench::kernels::{KernelOptions, KernelRunner, run_kernels};
    struct Fake(Vec<usize>);
    impl KernelRunner for Fake {
        fn step(&mut self, _: usize, m: usize) -> Result<Duration, draftsmith_bench::BoxError> {
            self.0.push(m);
            Ok(Duration::from_millis(10 + m as u64))
        }
        fn prefill(&mut self, tokens: usize) -> Result<Duration, draftsmith_bench::BoxError> {
            Ok(Duration::from_millis(tokens as u64))
        }
        fn decode(&mut self, _: usize, tokens: usize) -> Result<Duration, draftsmith_bench::BoxError> {
            Ok(Duration::from_millis(11 * tokens as u64))
        }
    }
    let mut fake = Fake(Vec::new());
    let options =
        KernelOptions { widths: vec![8, 1, 2, 2, 0], rounds: 2, warmup_rounds: 1, ..Default::default() };
    let report =
        run_kernels(&mut fake, &options, Default::default(), 2, Default::default(), &mut |_, _| ()).unwrap();
    assert_eq!(fake.0, [1, 2, 8, 1, 2, 8, 1, 2, 8]);
    let json = serde_json::to_string(&report).unwrap();
    assert!(
        json.starts_with("{\"t_ms\":{\"1\":11.0,\"2\":12.0,\"8\":18.0},\"prefill_tokens_per_s\":1000.0,"),
        "{json}"
    );
    assert!((report.decode_tokens_per_s - 1000.0 / 11.0).abs() < 1e-9);
}

#[test]
fn a_record_of_version_1_still_opens() {
    // Written by the first version of this crate from the made-up engine; never to be written anew.
    let record = Record::from_json("record-v1.json", include_str!("../data/record-v1.json")).unwrap();
    assert_eq!((record.samples.len(), record.skipped.len()), (4, 1));
    let summary = summarize(&record);
    assert_eq!(summary.accept.committed_tokens, 44);
    assert_eq!(summary.accept.verify_steps, 15);
    assert!(summary.identical());
}

#[test]
fn a_spoilt_record_is_refused_and_never_a_panic() {
    let text = include_str!("../data/record-v1.json");
    let mut refused = 0;
    for i in (0..text.len()).step_by(7) {
        for byte in [b'0', b'"', b'-', b'9', b'}', b' '] {
            let mut bytes = text.as_bytes().to_vec();
            bytes[i] = byte;
            let Ok(spoilt) = String::from_utf8(bytes) else { continue };
            match Record::from_json("spoilt", &spoilt) {
                // Some changes leave a record; then everything derived from it works, too.
                Ok(record) => {
                    let _ = Contract::new(&record);
                    let _ = table::text(&[record]);
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn what_others_used_is_busy_time_less_our_own() {
    let at = |total, busy, own| BusyTimes { total, busy, own };
    assert_eq!(BusyTimes::others_share(at(100, 50, 10), at(300, 150, 60)), Some(0.25));
    assert_eq!(BusyTimes::others_share(at(100, 50, 10), at(300, 60, 40)), Some(0.0));
    assert_eq!(BusyTimes::others_share(at(100, 50, 10), at(100, 60, 40)), None);
}
