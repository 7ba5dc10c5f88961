//! Rows that ranks share: whole runs over the tiny target, with ranks as threads.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_formats::run::{RunFile, Stage};
use draftsmith_pull::Places;
use draftsmith_train::ranks::threads;

use super::tests::hello;
use super::*;
use crate::{Env, Origin, Run};

/// Asks some of the ranks to stop once a task is so far; keeps what it was told.
struct Watch<'s> {
    task: &'static str,
    at: u64,
    stops: &'s [Stop],
    now: Mutex<String>,
    told: Mutex<Vec<String>>,
}

impl Report for Watch<'_> {
    fn begin(&self, task: &str, total: Option<u64>, unit: Unit) {
        *self.now.lock().unwrap() = task.to_string();
        self.note(&format!("{task}: {total:?} {}", unit.word()));
    }

    fn at(&self, done: u64) {
        if done >= self.at && *self.now.lock().unwrap() == self.task {
            self.stops.iter().for_each(Stop::request);
        }
        let line = format!("{} at {done}", self.now.lock().unwrap());
        self.note(&line);
    }

    fn detail(&self, _: &str) {}

    fn end(&self) {}

    fn note(&self, line: &str) {
        self.told.lock().unwrap().push(line.to_string());
    }
}

fn fixture(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    root.join(name).display().to_string()
}

fn file(dir: &Path, more: &[&str]) -> RunFile {
    let (target, rows, held) = (fixture(""), fixture("prompts-train.jsonl"), fixture("prompts-valid.jsonl"));
    let text = format!(
        "[run]\nname = \"rows\"\nseed = 7\n[target]\nsource = {target:?}\n[data]\nsources = [{{ path = {rows:?} }}]\n\
         validation = {held:?}\nmax_length = 256\n[regenerate]\nmax_rows = 40\nmax_new_tokens = 20\nbatch_size = 3\n\
         [capture]\nshard_rows = 6\n[draft]\nvocab_size = 512\n[bundle]\nlicense = \"CC0-1.0\"\n"
    );
    let mut overrides = vec![format!("run.dir={}", dir.display())];
    overrides.extend(more.iter().map(|o| o.to_string()));
    RunFile::parse(Path::new("run.toml"), &text, &overrides).unwrap()
}

/// How a run by so many ranks ended, and what rank 0 was told. The ranks in `stopped` are to stop when a task is so far.
fn run(
    dir: &Path,
    ranks: usize,
    more: &[&str],
    watched: (&'static str, u64, &[usize]),
) -> (Result<(), String>, Vec<String>) {
    let links = Mutex::new(threads::links(ranks));
    let collective = |_| -> Box<dyn Collective> {
        Box::new(draftsmith_train::Ranks::new(links.lock().unwrap().pop().expect("one of each rank")))
    };
    run_over(collective, Stage::Capture, dir, ranks, more, watched)
}

/// The same up to a stage, over whatever gives each thread the collective of a rank; it may be any rank's that is not given yet.
fn run_over(
    collective: impl Fn(usize) -> Box<dyn Collective> + Sync,
    last: Stage,
    dir: &Path,
    ranks: usize,
    more: &[&str],
    (task, at, stopped): (&'static str, u64, &[usize]),
) -> (Result<(), String>, Vec<String>) {
    let cache = dir.parent().unwrap().join("cache");
    let stops: Vec<Stop> = (0..ranks).map(|_| Stop::default()).collect();
    let to_stop: Vec<Stop> = stopped.iter().map(|rank| stops[*rank].clone()).collect();
    let watch = Watch { task, at, stops: &to_stop, now: Mutex::default(), told: Mutex::default() };
    let (stops, watch) = (&stops, &watch);
    let work = |collective: Box<dyn Collective>| {
        let rank = collective.rank();
        let ranks = Ranks::of(collective, &hello("host", "0-1", 2)).unwrap();
        let var = |name: &str| (name == "DRAFTSMITH_CACHE").then(|| cache.display().to_string());
        let places = Places { offline: true, pack_cache: false, ..Places::from_vars(var) };
        let (stop, variable) = (&stops[rank], |_: &str| None);
        let env = Env { places: &places, report: watch, stop, variable, roots: &[], ranks: &ranks };
        let origin = Origin { verb: "run".into(), path: "run.toml".into(), overrides: Vec::new() };
        let run = Run::open(file(dir, more), origin, env).unwrap();
        let done = run.advance(last);
        if done.is_err() && ranks.is_first() {
            // The program ends all of them; threads have to be told.
            ranks.order(&Order::End);
        }
        done.map(drop).map_err(|e| e.to_string())
    };
    let ended = std::thread::scope(|scope| {
        let work = &work;
        let collective = &collective;
        let threads: Vec<_> = (0..ranks)
            .map(|thread| {
                scope.spawn(move || {
                    let collective = collective(thread);
                    (collective.rank(), work(collective))
                })
            })
            .collect();
        let mut ended: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        ended.sort_by_key(|(rank, _)| *rank);
        ended.into_iter().map(|(_, ended)| ended).collect::<Vec<_>>()
    });
    assert!(ended[1..].iter().all(Result::is_ok), "{ended:?}");
    (ended[0].clone(), watch.told.lock().unwrap().clone())
}

const NEVER: (&str, u64, &[usize]) = ("", u64::MAX, &[]);

/// What a run made of its rows; answers by key, for they are kept as they come.
fn made(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for stage in ["regenerate", "capture"] {
        for entry in std::fs::read_dir(dir.join(stage)).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            if path.ends_with("answers.jsonl") {
                let mut lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
                lines.sort();
                bytes = lines.concat();
            }
            all.push((path.strip_prefix(dir).unwrap().to_path_buf(), bytes));
        }
    }
    all.sort();
    all
}

fn names(all: &[(PathBuf, Vec<u8>)]) -> Vec<String> {
    all.iter().map(|(path, _)| path.display().to_string()).collect()
}

#[track_caller]
fn same(found: &[(PathBuf, Vec<u8>)], wanted: &[(PathBuf, Vec<u8>)]) {
    assert_eq!(names(found), names(wanted));
    for ((path, found), (_, wanted)) in found.iter().zip(wanted) {
        assert!(found == wanted, "{} differs", path.display());
    }
}

#[test]
fn any_number_of_ranks_writes_the_answers_and_states_of_one() {
    let home = tempfile::tempdir().unwrap();
    let alone = home.path().join("alone");
    let (ended, told) = run(&alone, 1, &[], NEVER);
    assert_eq!(ended, Ok(()));
    let wanted = made(&alone);
    let rows = told.iter().rfind(|line| line.starts_with("answer conversations at ")).cloned();
    assert_eq!(rows.as_deref(), Some("answer conversations at 40"));
    for ranks in [2, 3, 5] {
        let dir = home.path().join(format!("ranks-{ranks}"));
        let (ended, told) = run(&dir, ranks, &[], NEVER);
        assert_eq!(ended, Ok(()));
        same(&made(&dir), &wanted);
        // Rank 0 speaks for all.
        for last in ["answer held-out conversations at 40", "answer conversations at 40", "capture at "] {
            assert!(told.iter().any(|line| line.starts_with(last)), "{last}: {told:?}");
        }
        let of = |line: &&String| line.contains("ranks; ") || line.contains(&format!("by {ranks} ranks"));
        assert_eq!(told.iter().filter(of).count(), 2, "{told:?}");
    }
}

#[test]
fn a_limit_of_tokens_takes_the_same_rows_whoever_answers_them() {
    let home = tempfile::tempdir().unwrap();
    let limit = ["regenerate.max_tokens=300"];
    let alone = home.path().join("alone");
    assert_eq!(run(&alone, 1, &limit, NEVER).0, Ok(()));
    let mut wanted = made(&alone);
    // More rows than are needed may have been answered; what is made of them must not differ.
    let results =
        |all: &mut Vec<(PathBuf, Vec<u8>)>| all.retain(|(path, _)| !path.ends_with("answers.jsonl"));
    results(&mut wanted);
    let report = std::fs::read_to_string(alone.join("regenerate/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let generated = report["answers"]["generated_tokens"].as_u64().unwrap();
    assert!((300..320).contains(&generated), "{generated}: the last row reaches the limit");
    assert!(report["answers"]["dialogues"].as_u64().unwrap() < 40);
    for ranks in [2, 3, 4] {
        let dir = home.path().join(format!("ranks-{ranks}"));
        assert_eq!(run(&dir, ranks, &limit, NEVER).0, Ok(()));
        let mut found = made(&dir);
        results(&mut found);
        same(&found, &wanted);
    }
}

/// Goes on twice with other numbers of ranks, stopped in the answers and in the capture. False if a stop came too late to find any
/// work undone, which rests with the machine.
fn stopped_and_resumed(dir: &Path, counts: [usize; 3], wanted: &[(PathBuf, Vec<u8>)]) -> bool {
    // The signal reaches rank 0 alone, or another alone: all stop.
    let last = counts[0] - 1;
    let (ended, _) = run(dir, counts[0], &[], ("answer conversations", 9, &[last]));
    let lines = || std::fs::read_to_string(dir.join("regenerate/answers.jsonl")).unwrap().lines().count();
    let before = lines();
    if before == 80 {
        return false;
    }
    assert!(ended.as_ref().is_err_and(|e| e.contains("interrupted")), "{ended:?}");
    assert!((49..80).contains(&before), "{before} answers, held-out ones included");
    let (ended, told) = run(dir, counts[1], &[], ("capture", 12, &[0]));
    if ended.is_ok() {
        return false;
    }
    assert!(ended.as_ref().is_err_and(|e| e.contains("interrupted")), "{ended:?}");
    assert!(told.iter().any(|line| line.contains(&format!("{} of 40 answers are there", before - 40))));
    assert_eq!(lines(), 80, "none twice");
    assert_eq!(run(dir, counts[2], &[], NEVER).0, Ok(()));
    same(&made(dir), wanted);
    true
}

#[test]
fn what_was_stopped_goes_on_with_any_other_number_of_ranks() {
    let home = tempfile::tempdir().unwrap();
    let alone = home.path().join("alone");
    assert_eq!(run(&alone, 1, &[], NEVER).0, Ok(()));
    let wanted = made(&alone);
    for (case, counts) in [[3, 1, 2], [1, 4, 3], [2, 3, 1]].into_iter().enumerate() {
        let mut tries = (0..20).map(|n| home.path().join(format!("case-{case}-{n}")));
        assert!(tries.any(|dir| stopped_and_resumed(&dir, counts, &wanted)), "no stop came in time");
    }
}

#[test]
fn logs_of_ranks_that_were_killed_are_taken_over_once() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("run");
    assert!(run(&dir, 1, &[], ("answer conversations", 20, &[0])).0.is_err());
    // As a kill leaves them: a rank's own log, one line of it already handed over, the last one half written.
    let log = dir.join("regenerate/answers.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let (mine, theirs) = lines.split_at(lines.len() - 8);
    std::fs::write(&log, mine.concat()).unwrap();
    let theirs = [&[mine[mine.len() - 1]], &theirs[..7], &[&theirs[7][..theirs[7].len() / 2]]].concat();
    std::fs::write(dir.join("regenerate/answers-rank-2.jsonl"), theirs.concat()).unwrap();
    let (ended, told) = run(&dir, 2, &[], NEVER);
    assert_eq!(ended, Ok(()));
    let there = format!("{} of 40 answers are there", lines.len() - 1 - 40);
    assert!(told.iter().any(|line| line.contains(&there)), "{there}: {told:?}");
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.lines().count(), 80);
    assert_eq!(std::fs::read_dir(dir.join("regenerate")).unwrap().count(), 4, "no log of a rank is left");
}

#[test]
fn ranks_over_sockets_answer_capture_and_train_as_one() {
    let home = tempfile::tempdir().unwrap();
    let more = [
        "train.pack_length=256",
        "train.tokens_per_step=1024",
        "train.max_steps=6",
        "train.epochs=8",
        "validate.prompts=2",
        "validate.max_new_tokens=8",
    ];
    let alone = home.path().join("alone");
    let one = |_| -> Box<dyn Collective> { Box::new(Alone) };
    assert_eq!(run_over(one, Stage::Train, &alone, 1, &more, NEVER).0, Ok(()));
    let trained = |dir: &Path| std::fs::read(dir.join("train/last/model.safetensors")).unwrap();
    for ranks in [2, 3] {
        let (dir, port) = (home.path().join(format!("ranks-{ranks}")), super::tcp_tests::free_port());
        let collective = |rank| super::tcp_tests::collective(port, rank, ranks);
        assert_eq!(run_over(collective, Stage::Train, &dir, ranks, &more, NEVER).0, Ok(()));
        same(&made(&dir), &made(&alone));
        assert!(trained(&dir) == trained(&alone), "{ranks} ranks");
        let log = std::fs::read_to_string(dir.join("train/log.jsonl")).unwrap();
        assert!(log.contains(&format!("\"ranks\":{ranks}")), "{log}");
    }
}

#[cfg(feature = "object-store")]
mod stored {
    use super::*;

    /// What a store holds, by name; and the report of its capture.
    fn objects(store: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let captures: Vec<PathBuf> =
            std::fs::read_dir(store).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(captures.len(), 1, "{captures:?}");
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.strip_prefix(&captures[0]).unwrap().to_path_buf(), std::fs::read(&path).unwrap())
        };
        let mut all: Vec<_> = std::fs::read_dir(&captures[0]).unwrap().map(read).collect();
        all.sort();
        all
    }

    /// A folder that is a store, and the key that says so.
    fn store(home: &Path, name: &str) -> (PathBuf, String) {
        let store = home.join(format!("store-{name}"));
        std::fs::create_dir(&store).unwrap();
        let key = format!("capture.store.url=\"file://{}\"", store.display());
        (store, key)
    }

    /// Files of states in the folder of a run.
    fn states_here(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir.join("capture")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains("shard-") || name.contains("part-")).collect()
    }

    #[test]
    fn any_number_of_ranks_fills_a_store_as_one_does() {
        let home = tempfile::tempdir().unwrap();
        let (alone, key) = store(home.path(), "alone");
        assert_eq!(run(&home.path().join("alone"), 1, &[&key], NEVER).0, Ok(()));
        let wanted = objects(&alone);
        for ranks in [2, 3, 5] {
            let (dir, (store, key)) =
                (home.path().join(format!("ranks-{ranks}")), store(home.path(), &ranks.to_string()));
            let (ended, told) = run(&dir, ranks, &[&key], NEVER);
            assert_eq!(ended, Ok(()));
            same(&objects(&store), &wanted);
            assert_eq!(states_here(&dir), Vec::<String>::new());
            let of = |words: &str| told.iter().any(|line| line.contains(words));
            assert!(of("capture: goes to `file://") && of(&format!("by {ranks} ranks")), "{told:?}");
        }
    }

    /// False if a stop came too late to find any work undone, which rests with the machine.
    fn stopped_and_resumed(
        home: &Path,
        name: &str,
        counts: [usize; 2],
        wanted: &[(PathBuf, Vec<u8>)],
    ) -> bool {
        let (dir, (store, key)) = (home.join(name), store(home, name));
        let far = |told: &[String]| {
            let at = told.iter().filter_map(|line| line.strip_prefix("capture at "));
            at.map(|at| at.parse::<u64>().unwrap()).collect::<Vec<_>>()
        };
        let (ended, told) = run(&dir, counts[0], &[&key], ("capture", 20, &[0]));
        if ended.is_ok() {
            return false;
        }
        assert!(ended.as_ref().is_err_and(|e| e.contains("interrupted")), "{ended:?}");
        let before = far(&told).into_iter().max().unwrap();
        let (ended, told) = run(&dir, counts[1], &[&key], NEVER);
        assert_eq!(ended, Ok(()));
        // No more than a shard of each rank is captured again.
        let begun = far(&told)[0];
        assert!(begun + 6 * counts[0] as u64 >= before, "{begun} of {before} rows were kept");
        same(&objects(&store), wanted);
        assert_eq!(states_here(&dir), Vec::<String>::new());
        begun > 0
    }

    #[test]
    fn a_store_that_some_ranks_began_to_fill_is_filled_by_any_other_number() {
        let home = tempfile::tempdir().unwrap();
        let (alone, key) = store(home.path(), "alone");
        assert_eq!(run(&home.path().join("alone"), 1, &[&key], NEVER).0, Ok(()));
        let wanted = objects(&alone);
        for (case, counts) in [[3, 1], [1, 3], [2, 4]].into_iter().enumerate() {
            let resumed =
                |n: usize| stopped_and_resumed(home.path(), &format!("case-{case}-{n}"), counts, &wanted);
            assert!((0..20).any(resumed), "no stop came in time");
        }
    }
}
