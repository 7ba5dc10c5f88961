//! Ranks as threads of one process.

use super::*;
use draftsmith_train::ranks::threads;

fn launch(variables: &[(&str, &str)]) -> Option<Launch> {
    Launch::of(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_string()))
}

#[test]
fn launchers_are_known_by_their_variables() {
    let of = |by, ranks, rank| Some((by, ranks, rank));
    let launch = |variables: &[(&str, &str)]| launch(variables).map(|l| (l.by, l.ranks, l.rank));
    assert_eq!(launch(&[]), None);
    assert_eq!(launch(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")]), None);
    let mpirun = [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3")];
    assert_eq!(launch(&mpirun), of("mpirun", 4, 3));
    assert_eq!(launch(&[("PMI_SIZE", "2"), ("PMI_RANK", "1")]), of("mpiexec", 2, 1));
    // A job of many tasks, whose script is one process; then a step of it.
    let job = [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")];
    assert_eq!(launch(&job), None);
    assert_eq!(launch(&[job[0], ("SLURM_PROCID", "5"), ("SLURM_STEP_NUM_TASKS", "8")]), of("srun", 8, 5));
    assert_eq!(launch(&[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_PROCID", "0")]), None);
    let by_hand = [("WORLD_SIZE", "2"), ("RANK", "0")];
    assert_eq!(launch(&by_hand), of("WORLD_SIZE", 2, 0));
    assert_eq!(launch(&[by_hand[0], by_hand[1], ("TORCHELASTIC_RUN_ID", "none")]), of("torchrun", 2, 0));
    assert_eq!(launch(&[("WORLD_SIZE", "two"), ("RANK", "0")]), None);
    // What stands beside a place to meet counts first; elsewhere it is the launcher's.
    let place = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
    let both = [mpirun[0], mpirun[1], by_hand[0], by_hand[1]];
    assert_eq!(launch(&both), of("mpirun", 4, 3));
    assert_eq!(launch(&[&both[..], &place].concat()), of("WORLD_SIZE", 2, 0));
    assert_eq!(launch(&[&mpirun[..], &place].concat()), of("mpirun", 4, 3));
}

#[test]
fn a_launch_that_cannot_be_joined_is_refused_with_the_way_out() {
    let join = |launch: &Launch| Ranks::join(Some(launch), |_| (), |_| ()).unwrap_err();
    let by_hand = launch(&[("WORLD_SIZE", "2"), ("RANK", "0")]).unwrap();
    let error = join(&by_hand);
    assert_eq!(
        error.to_string(),
        "`WORLD_SIZE` says that 2 processes work together, but not where rank 0 is"
    );
    assert!(error.hint().unwrap().starts_with("set `MASTER_ADDR` and `MASTER_PORT` to "));
    let error = by_hand.refuse("make");
    assert_eq!(
        error.to_string(),
        "`WORLD_SIZE` says that 2 processes work together, but `make` works as one"
    );
    assert_eq!(error.hint().unwrap(), "start `draftsmith make` with `RANK` and `WORLD_SIZE` unset");
    let bad =
        launch(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "x")]);
    assert_eq!(join(&bad.unwrap()).to_string(), "`MASTER_PORT` is `x`, which is no port");
    #[cfg(not(feature = "mpi"))]
    {
        let error = join(&launch(&[("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "0")]).unwrap());
        assert!(error.to_string().contains("`srun` started 8 processes"), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("--features mpi") && hint.contains("MASTER_ADDR"), "{hint}");
    }
    assert_eq!(Ranks::join(None, |_| (), |_| ()).unwrap().count(), 1);
}

#[test]
fn the_place_of_a_process_on_its_machine_is_what_its_launcher_says() {
    let of = |variables: &[(&str, &str)]| {
        local_rank(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_string()))
    };
    assert_eq!(of(&[]), None);
    assert_eq!(of(&[("LOCAL_RANK", "3"), ("SLURM_LOCALID", "1")]), Some(3));
    assert_eq!(of(&[("OMPI_COMM_WORLD_LOCAL_RANK", "2")]), Some(2));
    assert_eq!(of(&[("SLURM_LOCALID", "1")]), Some(1));
    assert_eq!(of(&[("MPI_LOCALRANKID", "0")]), Some(0));
    assert_eq!(of(&[("LOCAL_RANK", "-1")]), None);
}

pub(super) fn hello(host: &str, cores: &str, num_cores: usize) -> Hello {
    let (host, cores, version) = (host.to_string(), cores.to_string(), "1.0.0".to_string());
    Hello { host, process: 7, version, cores, num_cores }
}

#[test]
fn ranks_share_the_cores_that_they_may_run_on() {
    let free = [hello("a", "0-15", 16), hello("a", "0-15", 16), hello("b", "0-15", 16)];
    assert_eq!((0..3).map(|r| threads_of(&free, r)).collect::<Vec<_>>(), [8, 8, 16]);
    let bound = [hello("a", "0", 1), hello("a", "1", 1)];
    assert_eq!((threads_of(&bound, 0), threads_of(&bound, 1)), (1, 1));
    let crowded = vec![hello("a", "0-1", 2); 4];
    assert_eq!(threads_of(&crowded, 3), 1);
}

/// What each of so many ranks comes to.
fn on_ranks<T: Send>(count: usize, work: impl Fn(usize, Box<dyn Collective>) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = threads::links(count)
            .into_iter()
            .enumerate()
            .map(|(rank, link)| scope.spawn(move || work(rank, Box::new(draftsmith_train::Ranks::new(link)))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn agreed(
    count: usize,
    found: impl Fn(usize) -> Result<BTreeMap<String, String>, Error> + Sync,
) -> Vec<String> {
    on_ranks(count, |rank, collective| {
        let ranks = Ranks::of(collective, &hello("host", "0-3", 4)).unwrap();
        match ranks.agree(found(rank), |found| found.clone()) {
            Ok(_) => "agreed".to_string(),
            Err(error) => {
                // Rank 0 says it: what another said to it now would be told beside that, or instead of it.
                ranks.give_up(&error.told());
                format!("{error} | {}", error.hint().unwrap())
            }
        }
    })
}

#[test]
fn what_one_rank_alone_finds_is_said_to_rank_0() {
    let said = on_ranks(2, |_, collective| {
        let ranks = Ranks::of(collective, &hello("host", "0", 1)).unwrap();
        let give_up = || ranks.give_up(&Error::input("the disk is full", "make room").told());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(give_up)).err()?;
        panicked.downcast::<String>().ok().map(|words| *words)
    });
    let words = "gave up: [[\"rank 1 of 2 (host, process 7): the disk is full\",\"make room\"]]";
    assert_eq!(said, [None, Some(words.to_string())]);
}

#[test]
fn ranks_that_found_different_things_all_say_the_same_of_it() {
    let of = |lr: &str| {
        let found = [("train.lr", lr), ("target weights", "aa")];
        found.into_iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(agreed(3, |_| Ok(of("0.1"))), ["agreed"; 3]);
    let other = agreed(2, |rank| Ok(of(["0.1", "0.2"][rank])));
    let wanted = "rank 1 of 2 (host, process 7) works on something else than rank 0: train.lr: 0.1 → 0.2 | \
                  start all ranks with the same command, run file, model and data";
    assert_eq!(other, [wanted; 2]);
    let target = agreed(2, |rank| {
        let mut found = of("0.1");
        found.insert("target weights".to_string(), ["aa", "bb"][rank].to_string());
        Ok(found)
    });
    assert!(target[0].contains("rank 1 of 2 (host, process 7)"), "{target:?}");
    assert!(target[0].contains("target weights changed"), "{target:?}");
    let one = agreed(2, |rank| match rank {
        0 => Ok(of("0.1")),
        _ => Err(Error::input("`a.toml` is not there", "name one that is")),
    });
    assert_eq!(one, ["rank 1 of 2 (host, process 7): `a.toml` is not there | name one that is"; 2]);
    let all = agreed(3, |_| Err(Error::input("`a.toml` is not there", "name one that is")));
    assert_eq!(all, ["`a.toml` is not there | name one that is"; 3]);
}

#[test]
fn ranks_of_different_versions_do_not_begin() {
    let said = on_ranks(2, |rank, collective| {
        let mine = Hello { version: ["1.0.0", "2.0.0"][rank].to_string(), ..hello("host", "0", 1) };
        Ranks::of(collective, &mine).unwrap_err().to_string()
    });
    let wanted = "rank 1 of 2 (host, process 7) is draftsmith 2.0.0, rank 0 is draftsmith 1.0.0";
    assert_eq!(said, [wanted; 2]);
}

#[test]
fn the_others_hear_what_rank_0_calls_them_to() {
    let heard = on_ranks(3, |rank, collective| {
        let ranks = Ranks::of(collective, &hello("host", "0", 1)).unwrap();
        let orders = [Order::Train { key: "k".to_string() }, Order::End];
        match rank {
            0 => orders.iter().for_each(|order| ranks.order(order)),
            _ => assert_eq!([ranks.hear().unwrap(), ranks.hear().unwrap()], orders),
        }
        ranks.note()
    });
    assert_eq!(heard[0].as_deref(), Some("3 ranks; rank 0 of 3 (host, process 7) has 1 thread"));
}
