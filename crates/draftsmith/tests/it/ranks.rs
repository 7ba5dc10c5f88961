//! Runs of several processes that nothing but their environment has introduced, and under `torchrun`:
//! `DRAFTSMITH_TEST_TORCHRUN` names one, without it that test has nothing to run.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::mpi::{arguments, copy, ends_within, fails, kill, log, numbers, same_rows, weights, well};
use crate::support::{Ended, Home, repository};

/// A launch by hand.
struct Launch {
    home: Home,
    port: u16,
}

impl Launch {
    fn new() -> Launch {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        Launch { home: Home::new(), port }
    }

    /// Starts one rank of two.
    fn start(&self, rank: usize, args: &[String]) -> Child {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = self.home.command(&args);
        command
            .current_dir(repository())
            .envs([("RANK", rank.to_string()), ("WORLD_SIZE", "2".to_string())])
            .envs([("MASTER_ADDR", "127.0.0.1".to_string()), ("MASTER_PORT", self.port.to_string())]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn both(&self, args: &[String]) -> [Ended; 2] {
        let children = [1, 0].map(|rank| self.start(rank, args));
        let [one, zero] = children.map(|child| Ended::from(child.wait_with_output().unwrap()));
        [zero, one]
    }

    fn alone(&self, args: &[String]) -> Ended {
        Ended::from(self.home.spawn(args).wait_with_output().unwrap())
    }
}

#[track_caller]
fn until(what: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < Duration::from_secs(120), "the run does not come to {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn steps(dir: &Path) -> usize {
    log(dir).iter().filter(|line| line["event"] == "step").count()
}

#[test]
fn two_processes_by_hand_make_what_one_makes_and_end_with_each_other() {
    let launch = Launch::new();
    let more = ["run.threads=1", "bench.max_new_tokens=8"];
    let (alone, two) = (launch.home.path().join("alone"), launch.home.path().join("two"));
    well(&launch.alone(&arguments("run", &alone, &more)));
    let [zero, one] = launch.both(&arguments("run", &two, &more));
    assert!(well(&zero).stderr.contains("2 ranks; rank 0 of 2 ("), "{}", zero.stderr);
    assert_eq!((well(&one).stdout.as_str(), one.stderr.as_str()), ("", ""), "rank 0 alone prints");
    assert!(weights(&two) == weights(&alone));
    assert_eq!(numbers(&two), numbers(&alone));
    same_rows(&two, &alone);
    let bundle = |dir: &Path| std::fs::read(dir.join("bundle/model.safetensors")).unwrap();
    assert!(bundle(&two) == bundle(&alone));

    // One is killed in the middle of training; each time others go on.
    let dir = launch.home.path().join("killed");
    copy(&alone, &dir);
    std::fs::remove_dir_all(dir.join("train")).unwrap();
    let args = arguments("train", &dir, &more);
    for (victim, at) in [(1, 7), (0, 13)] {
        let mut ranks = [0, 1].map(|rank| Some(launch.start(rank, &args)));
        until("a step", || steps(&dir) >= at);
        let mut killed = ranks[victim].take().unwrap();
        kill(killed.id());
        killed.wait().unwrap();
        let (ended, _) = ends_within(ranks[1 - victim].take().unwrap(), Duration::from_secs(10));
        fails(&ended, &[&format!("rank {victim} of 2 ("), "is gone: "]);
    }
    assert!(!dir.join("train/last").exists(), "no attempt came to its end");
    let [zero, _] = launch.both(&args);
    assert!(well(&zero).stderr.contains("train: goes on"), "{}", zero.stderr);
    assert!(weights(&dir) == weights(&alone));
    assert_eq!(numbers(&dir), numbers(&alone), "every step is logged once, with the same numbers");
}

#[test]
fn processes_by_hand_that_do_not_fit_together_say_so_once() {
    let launch = Launch::new();
    let dir = launch.home.path().join("run");
    let zero = launch.start(0, &arguments("run", &dir, &[]));
    let one = launch.start(1, &arguments("run", &dir, &["train.lr=1e-3"]));
    let [zero, one] = [zero, one].map(|child| Ended::from(child.wait_with_output().unwrap()));
    fails(&zero, &["rank 1 of 2 (", "works on something else than rank 0: train.lr: 0.002 → 0.001"]);
    assert_eq!((one.code, one.stderr.as_str()), (Some(2), ""));
    // What is wrong for all is said once, without a name.
    let [zero, one] = launch.both(&arguments("run", &dir, &["train.lr=fast"]));
    fails(&zero, &["train.lr"]);
    assert!(!zero.stderr.contains("error: rank"), "{}", zero.stderr);
    assert_eq!((one.code, one.stderr.as_str()), (Some(2), ""));
    // What rank 0 cannot know.
    let taken = TcpListener::bind(("127.0.0.1", launch.port)).unwrap();
    fails(
        &Ended::from(launch.start(0, &arguments("run", &dir, &[])).wait_with_output().unwrap()),
        &[&format!("rank 0 cannot listen at 127.0.0.1:{}", taken.local_addr().unwrap().port())],
    );
    assert!(!dir.exists(), "nothing was begun");
}

#[test]
fn torchrun_starts_ranks_beside_its_own_store() {
    let Some(torchrun) = std::env::var_os("DRAFTSMITH_TEST_TORCHRUN") else { return };
    let home = Home::new();
    let (alone, two) = (home.path().join("alone"), home.path().join("two"));
    let more = ["run.threads=1"];
    well(&Ended::from(home.spawn(&arguments("train", &alone, &more)).wait_with_output().unwrap()));
    let run = |dir: &Path, how: &[&str]| {
        let mut command = Command::new(&torchrun);
        command
            .args(how)
            .args(["--nproc-per-node", "2", "--no-python", env!("CARGO_BIN_EXE_draftsmith")])
            .args(arguments("train", dir, &more))
            .current_dir(repository())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", home.path());
        Ended::from(command.stdin(Stdio::null()).output().unwrap())
    };
    well(&run(&two, &[]));
    assert!(weights(&two) == weights(&alone));
    // The store that torchrun shares, and none.
    for how in ["--standalone", "--rdzv-backend=c10d"] {
        std::fs::remove_dir_all(two.join("train")).unwrap();
        well(&run(&two, &[how]));
        assert!(weights(&two) == weights(&alone), "{how}");
    }
}
