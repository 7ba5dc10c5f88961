//! What calls NCCL, over a driver and an NCCL without a card, each process a thread.

use std::path::Path;
use std::sync::mpsc::channel;

use draftsmith_cuda::{Card, Cuda, CudaError, CudaOptions, CudaVersion, DeviceLink, Nccl, Search};
use draftsmith_kernels::{DeviceFailure, Memory, Part, TrainKernels, catch_failure};

use crate::card::{compile, libraries};

/// A folder with driver, cuBLASLt and NCCL.
fn all(driver: &[&str], nccl: &[&str]) -> (tempfile::TempDir, Search) {
    let four = ["VERSION=13000", "DEVICES=4", "MAJOR=9", "MEMORY=(80ull<<30)"];
    let (folder, search) = libraries(&[&four[..], driver].concat(), true);
    compile(folder.path(), "nccl.c", "libnccl.so.2", nccl);
    (folder, search)
}

/// What the library counts: communicators that are open, and groups that this thread has open.
fn counts(folder: &Path) -> [i32; 2] {
    // SAFETY: our own library, which is loaded already.
    let library = unsafe { libloading::Library::new(folder.join("libnccl.so.2")) }.unwrap();
    ["fake_open", "fake_depth"].map(|name| {
        // SAFETY: functions of that type, which take nothing.
        unsafe { library.get::<unsafe extern "C" fn() -> i32>(name.as_bytes()).unwrap()() }
    })
}

/// What each rank comes to on a card of its own.
fn on_cards<T: Send>(search: &Search, ranks: usize, work: impl Fn(usize, Cuda<Card>) -> T + Sync) -> Vec<T> {
    let (work, mut tell, mut hear) = (&work, Vec::new(), Vec::new());
    for _ in 0..ranks {
        let (sender, receiver) = channel::<Vec<u8>>();
        tell.push(sender);
        hear.push(receiver);
    }
    let tell = &tell;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .zip(hear)
            .map(|(rank, hear)| {
                let tell = tell.clone();
                scope.spawn(move || {
                    let card = Card::open(search, rank).unwrap();
                    let nccl = Nccl::open(search, card.driver()).unwrap();
                    assert_eq!(nccl.version(), "2.30.7");
                    assert!(nccl.path().ends_with("libnccl.so.2"));
                    assert_eq!(card.uuid().unwrap(), format!("{:02x}", rank + 1).repeat(16));
                    if rank == 0 {
                        let meeting = nccl.meeting().unwrap();
                        tell.iter().for_each(|rank| rank.send(meeting.clone()).unwrap());
                    }
                    let link = nccl.join(&card, &hear.recv().unwrap(), (rank, ranks)).unwrap();
                    work(rank, Cuda::new(card, CudaOptions::default()).with_peers(link))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn host(k: &Cuda<Card>, buf: &<Cuda<Card> as Memory>::Buf, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    k.download(buf, 0, &mut out);
    out
}

fn part(rank: usize, buf: usize, values: std::ops::Range<usize>) -> Part {
    Part { rank, buf, values }
}

#[test]
fn parts_of_buffers_go_from_card_to_card() {
    let (folder, search) = all(&[], &[]);
    for ranks in 2..=4 {
        let found = on_cards(&search, ranks, |rank, k| {
            // Value `i` of rank `r`: `100 r + i`.
            let mut own = k.upload(&(0..10).map(|i| (100 * rank + i) as f32).collect::<Vec<_>>());
            let mut came = k.upload(&[-1.0; 12]);
            let others: Vec<usize> = (0..ranks).filter(|other| *other != rank).collect();
            // To each two parts, the later one first, and an empty one, which is none; and each one's slice to all.
            let outgoing = others.iter().flat_map(|to| {
                [part(*to, 0, 6..9), part(*to, 0, 4..4), part(*to, 0, 4..5), part(*to, 0, rank..rank + 1)]
            });
            let incoming = others.iter().enumerate().flat_map(|(i, from)| {
                let at = 4 * i;
                [
                    part(*from, 1, at..at + 3),
                    part(*from, 1, 0..0),
                    part(*from, 1, at + 3..at + 4),
                    part(*from, 0, *from..from + 1),
                ]
            });
            let peers = k.peers().expect("joined");
            let (outgoing, incoming): (Vec<_>, Vec<_>) = (outgoing.collect(), incoming.collect());
            for _ in 0..2 {
                peers.exchange(&mut [&mut own, &mut came], &outgoing, &incoming);
            }
            let found = (host(&k, &own, 10), host(&k, &came, 12));
            assert_eq!(k.end_peers(), Ok(()));
            // Once is enough, and nothing goes that way any more.
            assert_eq!(k.end_peers(), Ok(()));
            let exchange = || peers.exchange(&mut [&mut own, &mut came], &outgoing, &incoming);
            let failure = catch_failure(exchange).unwrap_err();
            assert!(failure.message.ends_with("the way between them was given up"), "{}", failure.message);
            found
        });
        for (rank, (own, came)) in found.into_iter().enumerate() {
            let mut wanted: Vec<f32> = (0..10).map(|i| (100 * rank + i) as f32).collect();
            (0..ranks).for_each(|from| wanted[from] = (100 * from + from) as f32);
            assert_eq!(own, wanted, "rank {rank} of {ranks}");
            let others = (0..ranks).filter(|other| *other != rank);
            let mut wanted: Vec<f32> =
                others.flat_map(|from| [6, 7, 8, 4].map(|i| (100 * from + i) as f32)).collect();
            wanted.resize(12, -1.0);
            assert_eq!(came, wanted, "rank {rank} of {ranks}");
        }
        assert_eq!(counts(folder.path()), [0, 0], "each was destroyed");
    }
}

/// What an exchange of two ranks fails with, and another one after it.
fn failures(driver: &[&str], nccl: &[&str]) -> (Vec<[DeviceFailure; 2]>, [i32; 2]) {
    let (folder, search) = all(driver, nccl);
    let found = on_cards(&search, 2, |rank, k| {
        let (mut sent, mut came) = (k.upload(&[1.0]), k.upload(&[0.0]));
        let mut exchange = || {
            let peers = k.peers().expect("joined");
            let bufs = &mut [&mut sent, &mut came];
            catch_failure(|| peers.exchange(bufs, &[part(1 - rank, 0, 0..1)], &[part(1 - rank, 1, 0..1)]))
        };
        let failed = [exchange().unwrap_err(), exchange().unwrap_err()];
        assert_eq!(counts(folder.path())[1], 0, "a group that failed is ended");
        assert!(k.end_peers().is_err(), "who failed does not wait for the others");
        failed
    });
    (found, counts(folder.path()))
}

#[test]
fn a_card_does_not_wait_for_one_that_is_lost() {
    // The card would work for ever, and nobody waits for it when all is dropped.
    let (found, counts) = failures(&["PENDING=1000000"], &["ASYNC=6"]);
    for [first, later] in found {
        assert_eq!(first.message, "an exchange between cards failed: remote process exited");
        assert!(first.hint.contains("DRAFTSMITH_NCCL=off"), "{}", first.hint);
        assert_eq!(later.message, "an exchange between cards failed: an earlier one failed");
    }
    assert_eq!(counts, [2, 0], "left alone");
}

#[test]
fn what_the_library_refuses_names_the_call() {
    let (found, counts) = failures(&[], &["SEND=4"]);
    for [first, _] in found {
        assert_eq!(first.message, "ncclSend failed: an error of a test: a send of a test");
    }
    assert_eq!(counts, [2, 0]);
    let (found, _) = failures(&["LOSE=700"], &[]);
    for [first, _] in found {
        assert!(first.message.starts_with("the GPU stopped during cuStreamQuery: "), "{}", first.message);
    }
}

#[test]
fn a_meeting_that_is_none_is_refused() {
    let (_folder, search) = all(&[], &[]);
    let card = Card::open(&search, 0).unwrap();
    let join = |meeting: &[u8]| {
        let nccl = Nccl::open(&search, card.driver()).unwrap();
        nccl.join(&card, meeting, (0, 1)).err().expect("no meeting").to_string()
    };
    assert_eq!(join(&[1, 2, 3]), "ncclCommInitRank failed: a meeting of 3 bytes");
    assert_eq!(join(&[7; 128]), "ncclCommInitRank failed: an error of a test: no id of a meeting");
    // Twice the same rank.
    let meeting = Nccl::open(&search, card.driver()).unwrap().meeting().unwrap();
    let first = Nccl::open(&search, card.driver()).unwrap().join(&card, &meeting, (0, 1)).unwrap();
    assert_eq!(join(&meeting), "ncclCommInitRank failed: an error of a test: Duplicate rank");
    assert_eq!(first.end(), Ok(()));
}

#[test]
fn a_device_without_peers_has_none_and_a_missing_library_is_named() {
    let (folder, search) = libraries(&crate::card::GOOD, true);
    let card = Card::open(&search, 0).unwrap();
    // (Unless the system has one.)
    if let Err(error) = Nccl::open(&search, card.driver()) {
        let wanted = format!(
            "`libnccl.so.2` was not found among the system's libraries and in `{}`",
            folder.path().display()
        );
        assert_eq!(error.to_string(), wanted);
        assert!(error.hint().starts_with("`pip install nvidia-nccl-cu13`"), "{}", error.hint());
    }
    assert!(Cuda::new(card, CudaOptions::default()).peers().is_none());
    compile(folder.path(), "cublaslt.c", "libnccl.so.2", &[]);
    let error = Nccl::open(&search, CudaVersion(12080)).err().expect("no NCCL");
    assert!(matches!(error, CudaError::MissingFunction { symbol: "ncclGetVersion", .. }), "{error}");
}

#[test]
fn nccl_library_is_called_as_it_wants() {
    let folder = std::env::var_os("DRAFTSMITH_TEST_NCCL")
        .expect("DRAFTSMITH_TEST_NCCL names the folder of NCCL, on a machine without a card");
    let (_folder, mut search) = libraries(&crate::card::GOOD, true);
    search.folders.push(folder.into());
    let card = Card::open(&search, 0).unwrap();
    let nccl = Nccl::open(&search, card.driver()).unwrap();
    assert!(nccl.version().starts_with("2."), "{}", nccl.version());
    // A place to meet needs no card, and goes by value to what does.
    let meeting = nccl.meeting().unwrap();
    assert!(meeting.len() == 128 && meeting.iter().any(|byte| *byte != 0), "{meeting:?}");
    let error = nccl.join(&card, &meeting, (0, 1)).err().expect("no card");
    let CudaError::Nccl { call: "ncclCommInitRank", reason } = &error else { panic!("{error}") };
    assert!(reason.starts_with("unhandled cuda error"), "{reason}");
    assert!(reason.contains("CUDA driver version is insufficient"), "{reason}");
}
