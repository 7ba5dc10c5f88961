//! Runs of several processes under `mpirun`. `DRAFTSMITH_TEST_MPI` names a program that was built with the feature `mpi`; without
//! it these tests have nothing to run. `.ci/run features` builds one.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Ended, Home, repository};

/// The smoke recipe, cut down to seconds, with four micro-batches in a step.
const SMALL: [&str; 13] = [
    "data.sources.0.max_rows=80",
    "regenerate.max_rows=80",
    "regenerate.max_new_tokens=48",
    "train.epochs=6",
    "train.max_steps=24",
    "train.tokens_per_step=1024",
    "train.pack_length=256",
    "train.checkpoint_every=5",
    "train.log_every=1",
    "validate.every=10",
    "validate.prompts=5",
    "validate.max_new_tokens=16",
    "bench.limit=2",
];

/// The program, if there is one.
fn program() -> Option<PathBuf> {
    std::env::var_os("DRAFTSMITH_TEST_MPI").map(PathBuf::from)
}

pub(crate) fn arguments(verb: &str, dir: &Path, more: &[&str]) -> Vec<String> {
    let mut args = vec![verb.to_string(), "recipes/smoke.toml".into(), format!("run.dir={}", dir.display())];
    args.extend(SMALL.iter().chain(more).map(|s| s.to_string()));
    args
}

/// `mpirun` of several programs: how many of each, and their arguments.
fn mpirun(home: &Home, program: &Path, groups: &[(usize, Vec<String>)]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe"]);
    for (i, (count, args)) in groups.iter().enumerate() {
        if i > 0 {
            command.arg(":");
        }
        command.args(["-n", &count.to_string()]).arg(program).args(args);
    }
    command
        .current_dir(repository())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home.path())
        .stdin(Stdio::null());
    command
}

fn on_ranks(home: &Home, program: &Path, ranks: usize, args: Vec<String>) -> Ended {
    Ended::from(mpirun(home, program, &[(ranks, args)]).output().unwrap())
}

#[track_caller]
pub(crate) fn well(ended: &Ended) -> &Ended {
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    ended
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// A run whose rows are captured, to be copied and trained on.
fn captured(home: &Home, program: &Path) -> PathBuf {
    let dir = home.path().join("captured");
    well(&on_ranks(home, program, 1, arguments("capture", &dir, &[])));
    dir
}

pub(crate) fn weights(dir: &Path) -> Vec<Vec<u8>> {
    [
        "train/checkpoints/step-00000024/tensors.safetensors",
        "train/last/model.safetensors",
        "train/best/model.safetensors",
    ]
    .iter()
    .map(|file| std::fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{file}: {e}")))
    .collect()
}

pub(crate) fn log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("train/log.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What was logged, without what depends on time and on the ranks.
pub(crate) fn numbers(dir: &Path) -> Vec<Value> {
    let mut lines = log(dir);
    for line in &mut lines {
        line["tokens_per_s"] = Value::Null;
        line.as_object_mut().unwrap().remove("ranks");
    }
    lines
}

#[test]
fn mpi_one_two_three_and_four_ranks_train_the_same_weights() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let captured = captured(&home, &program);
    let whole = home.path().join("alone");
    copy(&captured, &whole);
    let args = arguments("train", &whole, &["run.threads=2"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    well(&Ended::from(home.command(&args).current_dir(repository()).output().unwrap()));
    assert_eq!(log(&whole).iter().filter(|line| line["event"] == "step").count(), 24);
    for ranks in [1, 2, 3, 4] {
        let dir = home.path().join(format!("ranks-{ranks}"));
        copy(&captured, &dir);
        let ended = on_ranks(&home, &program, ranks, arguments("train", &dir, &[]));
        let lines: Vec<&str> =
            well(&ended).stdout.lines().filter(|line| line.starts_with("train ")).collect();
        assert_eq!(lines.len(), 1, "rank 0 alone prints: {}", ended.stdout);
        assert!(weights(&dir) == weights(&whole), "{ranks} ranks");
        assert_eq!(numbers(&dir), numbers(&whole), "{ranks} ranks");
        for line in log(&dir).iter().filter(|line| line["event"] == "step") {
            assert_eq!(line["ranks"]["ranks"].as_u64(), (ranks > 1).then_some(ranks as u64));
        }
    }
    // Traffic of a step: twice the gradient, but for the share that stays. Rank 0 owns the smaller slices where one is.
    let config = std::fs::read(whole.join("train/last/model.safetensors")).unwrap();
    assert!(!config.is_empty());
    let trained = trained_parameters(&whole);
    for ranks in [2, 4] {
        let step = log(&home.path().join(format!("ranks-{ranks}"))).swap_remove(0);
        let sent = step["ranks"]["sent_bytes"].as_u64().unwrap() as f64;
        let formula = 4.0 * 2.0 * (ranks as f64 - 1.0) / ranks as f64 * trained as f64;
        assert!(
            (sent / formula - 1.0).abs() < 1e-3,
            "{sent} bytes over {ranks} ranks, the formula says {formula}"
        );
    }
}

/// Values of the weights in a checkpoint, from the header of its file.
fn trained_parameters(dir: &Path) -> u64 {
    let bytes = std::fs::read(dir.join("train/checkpoints/step-00000024/tensors.safetensors")).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let of = |tensor: &Value| -> u64 {
        tensor["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product()
    };
    header.as_object().unwrap().iter().filter(|(name, _)| name.starts_with("w.")).map(|(_, t)| of(t)).sum()
}

#[test]
fn mpi_a_whole_run_of_two_ranks_equals_one_of_one() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let folders = [1, 2].map(|ranks| {
        let dir = home.path().join(format!("run-{ranks}"));
        let ended = on_ranks(&home, &program, ranks, arguments("run", &dir, &["bench.max_new_tokens=12"]));
        for stage in ["data ", "regenerate ", "capture ", "train ", "bundle ", "bench "] {
            let lines = well(&ended).stdout.lines().filter(|line| line.starts_with(stage)).count();
            assert_eq!(lines, 1, "{}", ended.stdout);
        }
        assert_eq!(ended.stderr.contains("2 ranks; rank 0 of 2 ("), ranks == 2, "{}", ended.stderr);
        dir
    });
    let bundle = |dir: &Path| std::fs::read(dir.join("bundle/model.safetensors")).unwrap();
    assert!(bundle(&folders[0]) == bundle(&folders[1]));
    assert!(weights(&folders[0]) == weights(&folders[1]));
    same_rows(&folders[1], &folders[0]);
}

/// What `regenerate` and `capture` make; answers by line, for they are kept as they come.
#[track_caller]
pub(crate) fn same_rows(found: &Path, wanted: &Path) {
    for stage in ["regenerate", "capture"] {
        let names = |dir: &Path| {
            let entries = std::fs::read_dir(dir.join(stage)).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(found), names(wanted));
        for name in names(wanted) {
            let read = |dir: &Path| {
                let mut bytes = std::fs::read(dir.join(stage).join(&name)).unwrap();
                if name == "answers.jsonl" {
                    let mut lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
                    lines.sort();
                    bytes = lines.concat();
                }
                bytes
            };
            assert!(read(found) == read(wanted), "{stage}/{name} differs");
        }
    }
}

/// Waits until something is so while a run is under way.
#[track_caller]
fn wait_for(child: &mut Child, what: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < Duration::from_secs(120), "the run does not come to {what}");
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it came to {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn kill(process: u32) {
    assert!(Command::new("kill").args(["-9", &process.to_string()]).status().unwrap().success());
}

#[test]
fn mpi_rows_of_a_rank_that_is_killed_are_made_by_any_other_number() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let more = ["data.sources.0.max_rows=400", "regenerate.max_rows=400", "capture.shard_rows=8"];
    let whole = home.path().join("whole");
    well(&on_ranks(&home, &program, 1, arguments("capture", &whole, &more)));
    let dir = home.path().join("killed");
    let lines = |log: &str| {
        let text = std::fs::read_to_string(dir.join("regenerate").join(log)).unwrap_or_default();
        text.lines().count()
    };
    let has_part = || {
        let entries = std::fs::read_dir(dir.join("capture")).into_iter().flatten().flatten();
        entries.filter(|e| e.file_name().to_string_lossy().ends_with(".json")).count() > 3
    };
    let start = |ranks| {
        let mut command = mpirun(&home, &program, &[(ranks, arguments("capture", &dir, &more))]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let end = |mut child: Child, what: &str, victim: usize, so: &dyn Fn() -> bool| {
        wait_for(&mut child, what, so);
        kill(process_of(victim, &format!("run.dir={}", dir.display())).expect("the rank runs"));
        let (ended, _) = ends_within(child, Duration::from_secs(10));
        assert_ne!(ended.code, Some(0));
    };
    // Answers: one that keeps a log of its own, then the one that has them all.
    end(start(3), "answers of rank 1", 1, &|| lines("answers-rank-1.jsonl") > 8);
    let before = lines("answers.jsonl") + lines("answers-rank-1.jsonl") + lines("answers-rank-2.jsonl");
    end(start(2), "more answers", 0, &|| lines("answers.jsonl") > before + 20);
    let before = lines("answers.jsonl");
    assert!(before < 440, "there is something left to answer");
    // States, by another number each time; the last one is alone.
    end(start(4), "a part of the states", 2, &has_part);
    assert_eq!(lines("answers.jsonl"), 440, "no answer is lost, none is there twice");
    let ended = on_ranks(&home, &program, 1, arguments("capture", &dir, &more));
    assert!(well(&ended).stderr.contains("capture: goes on"), "{}", ended.stderr);
    same_rows(&dir, &whole);
}

#[test]
fn mpi_a_limit_of_tokens_takes_the_same_rows_whoever_answers() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let more = ["regenerate.max_tokens=700"];
    let folders = [1, 2, 4].map(|ranks| {
        let dir = home.path().join(format!("ranks-{ranks}"));
        well(&on_ranks(&home, &program, ranks, arguments("regenerate", &dir, &more)));
        dir
    });
    for file in ["train.tokens", "validation.jsonl", "report.json"] {
        let read = |dir: &Path| std::fs::read(dir.join("regenerate").join(file)).unwrap();
        for dir in &folders[1..] {
            assert!(read(dir) == read(&folders[0]), "{file} of {}", dir.display());
        }
    }
}

#[test]
fn mpi_a_full_disk_of_one_rank_ends_all_with_file_and_hint() {
    let Some(program) = program() else { return };
    let home = Home::new();
    // Rank 1 alone may write no file of more than so many bytes, from when the stage has begun: MPI has large files of its own.
    let limited = |bytes: u32, verb: &str, dir: &Path, more: &[&str]| {
        let mut command = mpirun(&home, &program, &[(1, arguments(verb, dir, more))]);
        command.args([":", "-n", "1", "bash", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(&program);
        command.args(arguments(verb, dir, more)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        wait_for(&mut child, verb, || dir.join("state").join(format!("{verb}.json")).is_file());
        let process = process_of(1, &format!("run.dir={}", dir.display())).expect("the rank runs");
        let limit = format!("--fsize={bytes}:{bytes}");
        let done = Command::new("prlimit").args(["--pid", &process.to_string(), &limit]).status().unwrap();
        assert!(done.success());
        ends_within(child, Duration::from_secs(60)).0
    };
    let dir = home.path().join("states");
    let states = ["capture.shard_rows=16"];
    well(&on_ranks(&home, &program, 1, arguments("regenerate", &dir, &states)));
    let ended = limited(65_536, "capture", &dir, &states);
    fails(&ended, &["rank 1 of 2 (", "no space left while writing `", "capture/part-"]);
    assert!(ended.stderr.contains("hint: free space and run the same command again"), "{}", ended.stderr);
    // What rank 0 had under way when all were ended is a temporary file, and goes with the next run.
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir.join("capture")).unwrap().flatten();
        entries.map(|e| e.file_name().into_string().unwrap()).collect()
    };
    well(&on_ranks(&home, &program, 2, arguments("capture", &dir, &states)));
    assert!(
        names(&dir).iter().all(|name| name.starts_with("shard-") || name == "manifest.json"),
        "{:?}",
        names(&dir)
    );
    let dir = home.path().join("answers");
    let ended = limited(2048, "regenerate", &dir, &[]);
    fails(&ended, &["rank 1 of 2 (", "no space left while writing `", "answers-rank-1.jsonl"]);
    well(&on_ranks(&home, &program, 3, arguments("regenerate", &dir, &[])));
    let whole = home.path().join("states");
    for file in ["train.tokens", "validation.jsonl", "report.json"] {
        let read = |dir: &Path| std::fs::read(dir.join("regenerate").join(file)).unwrap();
        assert!(read(&dir) == read(&whole), "{file}");
    }
}

/// The process of a rank, by what its environment says; `mark` tells it from those of other tests.
fn process_of(rank: usize, mark: &str) -> Option<u32> {
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let process = entry.file_name().to_str()?.parse().ok()?;
        let read = |file: &str| std::fs::read(entry.path().join(file)).ok();
        let has = |bytes: &[u8], text: &str| bytes.split(|b| *b == 0).any(|part| part == text.as_bytes());
        let ours = has(&read("cmdline")?, mark) && has(&read("environ")?, &wanted);
        ours.then_some(process)
    })
}

/// Waits for the end, for so long.
#[track_caller]
pub(crate) fn ends_within(mut child: Child, time: Duration) -> (Ended, Duration) {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > time {
            let _ = child.kill();
            panic!("the ranks go on for {} s after one of them died", time.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let took = began.elapsed();
    (Ended::from(child.wait_with_output().unwrap()), took)
}

#[test]
fn mpi_a_rank_that_is_killed_ends_all_and_another_number_of_ranks_goes_on() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let captured = captured(&home, &program);
    let whole = home.path().join("whole");
    copy(&captured, &whole);
    well(&on_ranks(&home, &program, 1, arguments("train", &whole, &[])));
    let dir = home.path().join("killed");
    copy(&captured, &dir);
    // A rank that writes and one that does not; each time others go on.
    for (ranks, victim, steps) in [(2, 1, 7), (4, 3, 12), (3, 0, 17)] {
        let mut command = mpirun(&home, &program, &[(ranks, arguments("train", &dir, &[]))]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while log(&dir).iter().filter(|line| line["event"] == "step").count() < steps {
            assert!(began.elapsed() < Duration::from_secs(120), "the run does not come to step {steps}");
            assert!(child.try_wait().unwrap().is_none(), "the run ended before it was killed");
            std::thread::sleep(Duration::from_millis(2));
        }
        let process = process_of(victim, &format!("run.dir={}", dir.display())).expect("the rank runs");
        assert!(Command::new("kill").args(["-9", &process.to_string()]).status().unwrap().success());
        let (ended, took) = ends_within(child, Duration::from_secs(10));
        assert_ne!(ended.code, Some(0));
        assert!(
            ended.stderr.contains(&format!("rank {victim}")) && ended.stderr.contains("signal 9"),
            "{}",
            ended.stderr
        );
        assert!(took < Duration::from_secs(10));
    }
    assert!(!dir.join("train/last").exists(), "no attempt came to its end");
    let ended = on_ranks(&home, &program, 2, arguments("train", &dir, &[]));
    assert!(well(&ended).stderr.contains("train: goes on"), "{}", ended.stderr);
    assert!(weights(&dir) == weights(&whole));
    assert_eq!(numbers(&dir), numbers(&whole), "every step is logged once, with the same numbers");
}

#[track_caller]
pub(crate) fn fails(ended: &Ended, wanted: &[&str]) {
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "one line says it: {}", ended.stderr);
    for text in wanted {
        assert!(errors[0].contains(text), "`{text}` in {}", errors[0]);
    }
    assert!(ended.stderr.lines().any(|line| line.starts_with("hint: ")), "{}", ended.stderr);
}

#[test]
fn mpi_ranks_that_do_not_fit_together_are_refused_in_one_line() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let dir = home.path().join("run");
    let both = |mine: Vec<String>, theirs: Vec<String>| {
        Ended::from(mpirun(&home, &program, &[(1, mine), (1, theirs)]).output().unwrap())
    };
    let mine = || arguments("run", &dir, &[]);
    let other = both(mine(), arguments("run", &dir, &["train.lr=1e-3"]));
    fails(&other, &["rank 1 of 2 (", "works on something else than rank 0: train.lr: 0.002 → 0.001"]);
    let target = home.path().join("target");
    copy(&repository().join("fixtures/tiny-target"), &target);
    let file = target.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let other = both(mine(), arguments("run", &dir, &[&format!("target.source={}", target.display())]));
    fails(&other, &["rank 1 of 2 (", "target weights changed"]);
    let mut missing = mine();
    missing[1] = "recipes/none.toml".to_string();
    fails(&both(mine(), missing), &["rank 1 of 2 (", "recipes/none.toml"]);
    // What is wrong for all is said once, without a name.
    let all = on_ranks(&home, &program, 3, arguments("run", &dir, &["train.lr=fast"]));
    fails(&all, &["train.lr"]);
    assert!(!all.stderr.contains("error: rank"), "{}", all.stderr);
    assert!(!dir.exists(), "nothing was begun");
    let plan = on_ranks(&home, &program, 2, vec!["run".into(), "recipes/smoke.toml".into(), "--plan".into()]);
    fails(&plan, &["`mpirun` started 2 processes, but `run --plan` works as one"]);
}

#[test]
fn mpi_a_rank_that_does_not_come_ends_all_within_two_minutes() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let dir = home.path().join("run");
    let mut command = mpirun(&home, &program, &[(1, arguments("run", &dir, &[]))]);
    command.args([":", "-n", "1", "sleep", "300"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (ended, _) = ends_within(command.spawn().unwrap(), Duration::from_secs(120));
    fails(&ended, &["rank 0 waited 60 s for another to start, in vain"]);
    assert!(!dir.exists(), "nothing was begun");
}

#[test]
fn mpi_rows_that_a_rank_cannot_read_end_all_with_its_name() {
    let Some(program) = program() else { return };
    let home = Home::new();
    let dir = captured(&home, &program);
    // The rows are gone for rank 1 alone: it looks for them in another folder.
    let other = home.path().join("elsewhere");
    let args = |dir: &Path| arguments("train", dir, &[]);
    std::fs::create_dir_all(&other).unwrap();
    let ended = Ended::from(mpirun(&home, &program, &[(1, args(&dir)), (1, args(&other))]).output().unwrap());
    fails(&ended, &["rank 1 of 2 (", "run.dir"]);
    // Damaged for whoever reads them.
    let mut shard = std::fs::read_dir(dir.join("capture")).unwrap().flatten().map(|e| e.path());
    let shard = shard.find(|path| path.extension().is_some_and(|e| e == "dscache")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    // Most rows of it, for a short training does not read all.
    let (first, last) = (bytes.len() / 8, bytes.len() / 8 * 7);
    bytes[first..last].iter_mut().for_each(|b| *b ^= 0x55);
    std::fs::write(&shard, bytes).unwrap();
    let began = Instant::now();
    let ended = on_ranks(&home, &program, 2, args(&dir));
    fails(&ended, &[shard.file_name().unwrap().to_str().unwrap()]);
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_program_that_cannot_join_the_others_says_so_once_and_touches_nothing() {
    if cfg!(feature = "mpi") {
        return;
    }
    let mut home = Home::new();
    home.set("OMPI_COMM_WORLD_SIZE", 2).set("OMPI_COMM_WORLD_RANK", 0);
    let run = |home: &Home, verb: &[&str]| home.run(&[verb, &["recipes/none.toml"]].concat());
    let first = run(&home, &["run"]);
    fails(&first, &["`mpirun` started 2 processes, but this program was built without MPI"]);
    assert!(first.stderr.contains("--features mpi"), "{}", first.stderr);
    fails(&run(&home, &["make"]), &["`mpirun` started 2 processes, but `make` works as one"]);
    home.set("OMPI_COMM_WORLD_RANK", 1);
    let second = run(&home, &["train"]);
    assert_eq!((second.code, second.stderr.as_str()), (Some(2), ""));
    // What each process may do for itself is done.
    assert_eq!(home.run(&["completions", "bash"]).code, Some(0));
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}
