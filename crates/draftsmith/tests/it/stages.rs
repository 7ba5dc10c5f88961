//! Whole runs on the tiny target: all stages, a disk that is full, and a process that is killed again and again.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::run_folder::files;
use crate::support::{Home, repository};

/// The smoke recipe, cut down to seconds.
const SMALL: [&str; 14] = [
    "data.sources.0.max_rows=60",
    // Many copies make the data stage long enough to be caught at work; few of them are answered.
    "data.sources.0.weight=100",
    "regenerate.max_rows=60",
    "regenerate.max_new_tokens=32",
    "capture.shard_rows=6",
    "train.epochs=2",
    "train.max_steps=24",
    "train.tokens_per_step=512",
    "train.pack_length=256",
    "train.checkpoint_every=5",
    "train.log_every=1",
    "validate.every=10",
    "validate.prompts=4",
    "validate.max_new_tokens=16",
];

fn arguments(dir: &Path, more: &[&str]) -> Vec<String> {
    let mut args =
        vec!["run".to_string(), "recipes/smoke.toml".to_string(), format!("run.dir={}", dir.display())];
    args.extend(SMALL.iter().map(|s| s.to_string()));
    args.push("bench.limit=2".to_string());
    args.push("bench.max_new_tokens=12".to_string());
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

fn spawn(home: &Home, dir: &Path, more: &[&str]) -> Child {
    home.spawn(&arguments(dir, more))
}

#[track_caller]
pub(crate) fn finish(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    stderr
}

fn stage(dir: &Path, name: &str) -> Option<Value> {
    let text = std::fs::read_to_string(dir.join("state").join(format!("{name}.json"))).ok()?;
    serde_json::from_str(&text).ok()
}

pub(crate) fn bytes(path: PathBuf) -> Vec<u8> {
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Kills the run as soon as `now` says so; false if it ended first.
pub(crate) fn kill_when(mut child: Child, now: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(120) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if now() {
            child.kill().unwrap(); // SIGKILL on Unix
            child.wait().unwrap();
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("the run did not come to where it should be killed");
}

#[test]
fn a_capture_that_grew_costs_the_rows_that_came_and_has_the_bytes_of_one_from_nothing() {
    let home = Home::new();
    let stage = |dir: &Path, rows: &str| {
        let mut args = arguments(dir, &["data.sources.0.weight=1", rows]);
        args[0] = "capture".to_string();
        args.retain(|arg| !arg.starts_with("bench."));
        args
    };
    // Tokens whose states are there before it computes any.
    let copied = |said: &str| {
        let note = said.lines().find(|line| line.starts_with("capture: 30 rows")).unwrap();
        let states = note.split_once("the states of ").and_then(|(_, rest)| rest.split_once(' '));
        states.map_or(0, |(count, _)| count.parse::<u64>().unwrap())
    };
    let grown = home.path().join("grown");
    finish(home.spawn(&stage(&grown, "regenerate.max_rows=12")));
    let before: usize = files(&grown.join("capture")).values().map(Vec::len).sum();
    let said = finish(home.spawn(&stage(&grown, "regenerate.max_rows=30")));
    assert!(copied(&said) > 0, "{said}");
    // Not the states that answering kept: they are of the rows that came.
    let again = home.path().join("again");
    finish(home.spawn(&stage(&again, "regenerate.max_rows=12")));
    let mut regenerate = stage(&again, "regenerate.max_rows=30");
    regenerate[0] = "regenerate".to_string();
    finish(home.spawn(&regenerate));
    std::fs::remove_dir_all(again.join("kept")).unwrap();
    let said = finish(home.spawn(&stage(&again, "regenerate.max_rows=30")));
    assert!(copied(&said) > 0, "{said}");

    let whole = home.path().join("whole");
    let mut regenerate = stage(&whole, "regenerate.max_rows=30");
    regenerate[0] = "regenerate".to_string();
    finish(home.spawn(&regenerate));
    std::fs::remove_dir_all(whole.join("kept")).unwrap();
    let said = finish(home.spawn(&stage(&whole, "regenerate.max_rows=30")));
    assert_eq!(copied(&said), 0, "{said}");
    let wanted = files(&whole.join("capture"));
    assert!(before < wanted.values().map(Vec::len).sum());
    assert!(files(&grown.join("capture")) == wanted, "the caches differ");
    assert!(files(&again.join("capture")) == wanted, "the caches differ");
}

#[test]
fn states_that_answering_kept_make_the_cache_that_capture_makes() {
    let home = Home::new();
    // `data.max_length` cuts some rows: those were not kept as they are captured.
    let stage = |stage: &str, dir: &Path| {
        let mut args = arguments(dir, &["data.sources.0.weight=1", "data.max_length=60"]);
        args[0] = stage.to_string();
        args.retain(|arg| !arg.starts_with("bench."));
        args
    };
    let kept = home.path().join("kept");
    finish(home.spawn(&stage("regenerate", &kept)));
    let bytes: usize = files(&kept.join("kept")).values().map(Vec::len).sum();
    let status = || home.run(&["status", "kept", "--json"]).json();
    assert!(bytes > 0 && status()["kept_states"]["bytes"] == bytes, "{bytes} bytes: {}", status());
    assert!(home.run(&["status", "kept"]).stdout.contains("rm -r kept/kept"));
    let said = finish(home.spawn(&stage("capture", &kept)));
    let note = said.lines().find(|line| line.starts_with("capture: ")).unwrap_or_default();
    let numbers: Vec<u64> = note.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [_, tokens, kept_tokens, ..] = numbers[..] else { panic!("{said}") };
    assert!(note.contains("are there already"), "{note}");
    assert!(tokens / 2 < kept_tokens && kept_tokens < tokens, "{note}");
    assert!(!kept.join("kept").exists(), "states that were copied are removed");
    assert!(status()["kept_states"].is_null());

    let computed = home.path().join("computed");
    finish(home.spawn(&stage("regenerate", &computed)));
    std::fs::remove_dir_all(computed.join("kept")).unwrap();
    let said = finish(home.spawn(&stage("capture", &computed)));
    assert!(!said.contains("are there already"), "{said}");
    assert!(files(&kept.join("capture")) == files(&computed.join("capture")), "the caches differ");

    // Killed while it answers, and with some of what it kept damaged.
    let killed = home.path().join("killed");
    let answers = || std::fs::read_to_string(killed.join("regenerate/answers.jsonl")).unwrap_or_default();
    kill_when(home.spawn(&stage("regenerate", &killed)), || answers().lines().count() >= 12);
    finish(home.spawn(&stage("regenerate", &killed)));
    let (name, mut damaged) = files(&killed.join("kept")).into_iter().next().unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(killed.join("kept").join(name), damaged).unwrap();
    finish(home.spawn(&stage("capture", &killed)));
    assert!(files(&kept.join("capture")) == files(&killed.join("capture")), "the caches differ");
}

#[test]
fn a_run_that_is_killed_in_every_stage_ends_with_the_same_weights() {
    let home = Home::new();
    let whole = home.path().join("whole");
    finish(spawn(&home, &whole, &[]));

    let killed = home.path().join("killed");
    let lines = |path: PathBuf| std::fs::read_to_string(path).map_or(0, |text| text.lines().count());
    let shards = || {
        let text = std::fs::read_to_string(killed.join("capture/manifest.json")).unwrap_or_default();
        text.matches("dscache").count()
    };
    let running = |name: &str| stage(&killed, name).is_some_and(|s| s["phase"] == "running");
    // Each stage is killed in its middle where it has one that can be seen, else as soon as it has begun.
    let moments: [(&str, &dyn Fn() -> bool); 5] = [
        ("data", &|| running("data")),
        ("regenerate", &|| lines(killed.join("regenerate/answers.jsonl")) >= 5),
        ("capture", &|| shards() >= 2),
        ("train", &|| lines(killed.join("train/log.jsonl")) >= 14),
        ("bundle", &|| running("bundle")),
    ];
    for (name, moment) in moments {
        let mut hit = false;
        // A short stage may be over before the signal arrives: it is then done once more.
        for _ in 0..20 {
            if kill_when(spawn(&home, &killed, &[]), moment) && running(name) {
                hit = true;
                break;
            }
            let _ = std::fs::remove_file(killed.join(format!("state/{name}.json")));
        }
        assert!(hit, "`{name}` was never caught at work");
    }
    let said = finish(spawn(&home, &killed, &[]));
    assert!(said.contains("data: done before") && said.contains("bundle: goes on"), "{said}");
    for file in ["train/last/model.safetensors", "train/best/model.safetensors", "bundle/model.safetensors"] {
        assert_eq!(bytes(whole.join(file)), bytes(killed.join(file)), "{file} differs");
    }
    let counts = |dir: &Path| {
        let mut rows: Vec<Value> = std::fs::read_to_string(dir.join("train/log.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|row| row["event"] == "step")
            .collect();
        rows.iter_mut().for_each(|row| row["tokens_per_s"] = Value::Null);
        rows
    };
    assert_eq!(counts(&whole), counts(&killed), "every step is logged once, with the same numbers");
}

#[test]
fn a_finished_run_is_not_done_again_and_a_changed_key_redoes_what_depends_on_it() {
    let home = Home::new();
    let dir = home.path().join("run");
    finish(spawn(&home, &dir, &[]));
    let again = finish(spawn(&home, &dir, &[]));
    for name in ["data", "regenerate", "capture", "train", "bundle", "bench"] {
        assert!(again.contains(&format!("{name}: done before")), "{name} in {again}");
    }
    let changed = finish(spawn(&home, &dir, &["train.lr=1e-3", "run.threads=1"]));
    for (name, what) in
        [("capture", "done before"), ("train", "inputs changed"), ("bundle", "inputs changed")]
    {
        assert!(changed.contains(&format!("{name}: {what}")), "{name} in {changed}");
    }
    let status = home.run(&["status", "run", "--json"]).json();
    assert_eq!(status["busy"], false);
    assert!(status["stages"].as_array().unwrap().iter().all(|s| s["state"] == "done"), "{status}");
    assert!(status["best_accept_len"].as_f64().is_some_and(|a| a >= 1.0), "{status}");

    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let check = home.run(&["bundle", "check", "run/bundle", "--target", &tiny, "--json"]).json();
    assert_eq!(check["holds"], true, "{check}");
    let mut weights = bytes(dir.join("bundle/model.safetensors"));
    let last = weights.len() - 1;
    weights[last] ^= 1;
    std::fs::write(dir.join("bundle/model.safetensors"), weights).unwrap();
    let broken = home.run(&["bundle", "check", "run/bundle", "--json"]);
    assert_eq!(broken.code, Some(1), "what was to be checked does not hold: {}", broken.stderr);

    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    let draft = dir.join("train/best").display().to_string();
    let bench = home.run(&[
        "bench",
        "--bundle",
        &draft,
        "--target",
        &tiny,
        "--workload",
        &workload,
        "--limit",
        "2",
        "--max-new-tokens",
        "12",
        "--json",
        "out.json",
    ]);
    assert_eq!(bench.code, Some(0), "{}", bench.stderr);
    let out: Value = serde_json::from_slice(&bytes(home.path().join("out.json"))).unwrap();
    for key in [
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
        "machine",
    ] {
        assert!(!out[key].is_null(), "`{key}` in {out}");
    }
    assert_eq!(out["identical"], true);
    let proof = home
        .run(&[
            "generate",
            "--target",
            &tiny,
            "--bundle",
            &draft,
            "--prompt",
            "Calculate 2 + 3.",
            "--prove",
            "--json",
        ])
        .json();
    assert_eq!(proof["identical"], true);
    assert!(proof["accept_len"].as_f64().is_some_and(|a| a >= 1.0), "{proof}");
}

#[test]
fn training_online_gives_the_same_weights_as_training_from_the_cache() {
    let home = Home::new();
    let (cache, online) = (home.path().join("cache"), home.path().join("online"));
    let few = ["train.max_steps=6", "validate.every=0", "bench.workloads=[]"];
    finish(spawn(&home, &cache, &few));
    finish(spawn(&home, &online, &[few.as_slice(), &["capture.mode=online"]].concat()));
    assert!(!online.join("capture").exists());
    let file = "train/last/model.safetensors";
    assert_eq!(bytes(cache.join(file)), bytes(online.join(file)));
}

#[cfg(unix)]
#[test]
fn the_first_ctrl_c_stops_cleanly_and_says_how_to_go_on() {
    let home = Home::new();
    let dir = home.path().join("run");
    let mut child = spawn(&home, &dir, &["train.max_steps=4000", "train.epochs=1000"]);
    let began = Instant::now();
    while !dir.join("train/log.jsonl").is_file() {
        assert!(began.elapsed() < Duration::from_secs(120), "training did not begin");
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let interrupted =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("error: interrupted during `train`\nhint: `draftsmith run recipes/smoke.toml"),
        "{stderr}"
    );
    let status = home.run(&["status", "run", "--json"]).json();
    let train = status["stages"].as_array().unwrap().iter().find(|s| s["stage"] == "train").unwrap().clone();
    assert_eq!(train["state"], "interrupted", "{train}");
    assert!(train["progress"]["done"].as_u64().is_some(), "{train}");
}

#[test]
fn the_bill_is_printed_before_anything_is_captured() {
    let home = Home::new();
    let dir = home.path().join("run");
    let mut args = arguments(&dir, &[]);
    args[0] = "capture".to_string();
    args.push("--plan".to_string());
    args.push("--json".to_string());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = home.command(&args).current_dir(repository()).output().unwrap();
    let bill: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["rows", "tokens", "trained_tokens", "bytes", "tokens_per_s"] {
        assert!(bill[key].as_f64().is_some_and(|v| v > 0.0), "`{key}` in {bill}");
    }
    // Answers that are written here leave their states.
    assert_eq!((&bill["kept_tokens"], &bill["minutes"]), (&bill["tokens"], &Value::from(0.0)));
    let given = [&args[..], &["regenerate.enabled=false"]].concat();
    let output = home.command(&given).current_dir(repository()).output().unwrap();
    let bill: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(bill["minutes"].as_f64().is_some_and(|v| v > 0.0), "{bill}");
    assert!(bill["kept_tokens"].is_null(), "{bill}");
    assert!(!dir.join("capture").exists());
}

/// A file size limit stands for a full disk: the system refuses the write in the same place.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_during_capture_is_told_and_nothing_half_written_stays() {
    let home = Home::new();
    let dir = home.path().join("run");
    let limited = |blocks: &str| {
        let args = arguments(
            &dir,
            &[
                "data.sources.0.weight=1",
                "capture.shard_rows=60",
                "validate.every=0",
                "train.max_steps=2",
                "bench.workloads=[]",
            ],
        );
        let mut command = std::process::Command::new("sh");
        command
            .args([
                "-c",
                "trap '' XFSZ; ulimit -f \"$0\"; exec \"$@\"",
                blocks,
                env!("CARGO_BIN_EXE_draftsmith"),
                "--quiet",
            ])
            .args(args)
            .current_dir(repository())
            .env("HOME", home.path());
        command.output().unwrap()
    };
    let full = limited("1024");
    let stderr = String::from_utf8_lossy(&full.stderr).replace(&home.path().display().to_string(), "[HOME]");
    assert_eq!(full.status.code(), Some(2), "{stderr}");
    insta::assert_snapshot!(stderr);
    let left: Vec<_> =
        std::fs::read_dir(dir.join("capture")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["manifest.json"], "no part of a shard may stay");
    let after = limited("unlimited");
    assert_eq!(after.status.code(), Some(0), "{}", String::from_utf8_lossy(&after.stderr));
}

#[test]
fn two_processes_do_not_work_in_one_folder() {
    let home = Home::new();
    let dir = home.path().join("run");
    let child = spawn(&home, &dir, &[]);
    let began = Instant::now();
    while !dir.join("state/data.json").is_file() {
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = spawn(&home, &dir, &[]).wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("error: another draftsmith works in"), "{stderr}");
    finish(child);
}

#[test]
fn a_status_without_runs_says_how_to_begin_one() {
    insta::assert_snapshot!(Home::new().snapshot(&["status"]));
    insta::assert_snapshot!(Home::new().snapshot(&["status", "none"]));
}
