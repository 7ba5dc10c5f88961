//! Ranks over real sockets of this machine, each a thread.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::Instant;

use draftsmith_train::Link;

use super::*;

/// A port that is free now.
pub(super) fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// What a link told of its end, and how it ended.
#[derive(Default)]
struct Seen {
    told: Mutex<Vec<String>>,
    code: Mutex<Option<u8>>,
}

fn ends(seen: &Arc<Seen>) -> Ends {
    let (told, code) = (Arc::clone(seen), Arc::clone(seen));
    let tell = move |t: &Told| {
        told.told.lock().unwrap().push(format!("{} | {}", t.message, t.hint.clone().unwrap_or_default()))
    };
    Ends { tell: Arc::new(tell), exit: Arc::new(move |c| *code.code.lock().unwrap() = Some(c)) }
}

const SOON: Duration = Duration::from_secs(20);

/// The link of a rank whose launch meets at a port.
fn link(port: u16, rank: usize, ranks: usize, seen: &Arc<Seen>) -> TcpLink {
    match meet::meet(&Place::here(port), (rank, ranks), SOON) {
        Ok(pairs) => TcpLink::new(rank, pairs, ends(seen)).unwrap(),
        Err(Missed::Mine(error)) => panic!("rank {rank}: {error}"),
        Err(Missed::Told) => panic!("rank {rank} hears that not all came"),
    }
}

/// What a rank needs.
pub(super) fn collective(port: u16, rank: usize, ranks: usize) -> Box<dyn Collective> {
    Box::new(draftsmith_train::Ranks::new(link(port, rank, ranks, &Arc::default())))
}

/// What each of so many ranks comes to; an error where it panicked. And what each saw.
fn on_links<T: Send>(
    ranks: usize,
    work: impl Fn(TcpLink) -> T + Sync,
) -> (Vec<std::thread::Result<T>>, Vec<Arc<Seen>>) {
    let (work, port) = (&work, free_port());
    let seen: Vec<Arc<Seen>> = (0..ranks).map(|_| Arc::default()).collect();
    let done = std::thread::scope(|scope| {
        let threads: Vec<_> = seen
            .iter()
            .enumerate()
            .map(|(rank, seen)| scope.spawn(move || work(link(port, rank, ranks, seen))))
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    (done, seen)
}

fn well<T>((done, seen): (Vec<std::thread::Result<T>>, Vec<Arc<Seen>>)) -> Vec<T> {
    for seen in seen {
        assert_eq!(
            (seen.told.lock().unwrap().as_slice(), *seen.code.lock().unwrap()),
            (&[] as &[String], None)
        );
    }
    done.into_iter().map(|done| done.expect("no rank panics")).collect()
}

#[test]
fn messages_larger_than_any_buffer_go_both_ways_at_once_and_in_order() {
    const LEN: usize = 24 << 20;
    let byte = |from: usize, to: usize, i: usize| (i * 7 + from * 31 + to * 101) as u8;
    for ranks in [2, 3] {
        well(on_links(ranks, |link| {
            let me = link.rank();
            let others: Vec<usize> = (0..ranks).filter(|rank| *rank != me).collect();
            let large: Vec<Vec<u8>> =
                others.iter().map(|to| (0..LEN).map(|i| byte(me, *to, i)).collect()).collect();
            let small = [me as u8; 3];
            let mut outgoing: Vec<(usize, &[u8])> = Vec::new();
            for (to, large) in others.iter().zip(&large) {
                outgoing.extend([(*to, large.as_slice()), (*to, &[]), (*to, &small)]);
            }
            let mut found: Vec<(Vec<u8>, [u8; 3])> = others.iter().map(|_| (vec![0; LEN], [9; 3])).collect();
            let mut none: Vec<[u8; 0]> = others.iter().map(|_| []).collect();
            let mut incoming: Vec<(usize, &mut [u8])> = Vec::new();
            for ((from, (large, small)), none) in others.iter().zip(&mut found).zip(&mut none) {
                incoming.extend([
                    (*from, large.as_mut_slice()),
                    (*from, none.as_mut_slice()),
                    (*from, small.as_mut_slice()),
                ]);
            }
            link.exchange(&outgoing, &mut incoming);
            for (from, (large, small)) in others.iter().zip(&found) {
                assert!(large.iter().enumerate().all(|(i, b)| *b == byte(*from, me, i)), "{from} to {me}");
                assert_eq!(*small, [*from as u8; 3]);
            }
        }));
    }
}

#[test]
fn a_rank_can_be_far_ahead_and_one_that_waits_leaves_its_core() {
    let waited = well(on_links(2, |link| {
        let mut number = [0; 4];
        if link.rank() == 0 {
            // Nobody takes these yet.
            for i in 0..2000u32 {
                link.exchange(&[(1, &i.to_le_bytes())], &mut []);
                link.post(1, &i.to_le_bytes());
            }
            std::thread::sleep(Duration::from_millis(1500));
            link.exchange(&[(1, &7u32.to_le_bytes())], &mut []);
            return (0.0, 0.0);
        }
        std::thread::sleep(Duration::from_millis(300));
        for i in 0..2000u32 {
            link.exchange(&[], &mut [(0, &mut number)]);
            assert_eq!(u32::from_le_bytes(number), i);
        }
        let mut posted = Vec::new();
        while posted.len() < 2000 {
            posted.extend(link.posted());
        }
        assert!(posted.iter().enumerate().all(|(i, post)| *post == (0, (i as u32).to_le_bytes().to_vec())));
        let (began, before) = (Instant::now(), cpu_seconds());
        link.exchange(&[], &mut [(0, &mut number)]);
        (began.elapsed().as_secs_f64(), cpu_seconds() - before)
    }));
    let (waited, worked) = waited[1];
    assert!(waited > 0.5 && worked < 0.25 * waited, "{worked} s of the core in {waited} s of waiting");
}

/// Seconds for which this thread had a core; 0 where the system does not say.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or_default() / 1e9
}

/// Sums of values whose order shows in the bits.
#[test]
fn sums_are_those_of_threads_and_of_one() {
    use draftsmith_train::{Alone, SumTree};
    let gradient = |i: usize| -> Vec<f32> {
        (0..1001).map(|k| ((i * 37 + k * 11) % 97) as f32 * 10f32.powi((i * 5 + k) as i32 % 9 - 4)).collect()
    };
    let add = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(a, b)| a + b).collect::<Vec<f32>>();
    for micro_batches in [3, 4, 6] {
        let pieces = |tree: &SumTree, rank| -> Vec<Vec<f32>> {
            let of = |piece| {
                let (mut now, mut held) = (vec![0.0; 1001], Vec::new());
                for visit in tree.visits(piece) {
                    match visit {
                        draftsmith_train::Visit::MicroBatch(i) => now = gradient(i),
                        draftsmith_train::Visit::Hold => held.push(now.clone()),
                        draftsmith_train::Visit::Add => now = add(held.pop().unwrap(), now),
                    }
                }
                now
            };
            tree.pieces_of(rank).map(of).collect()
        };
        let tree = SumTree::new(micro_batches, 1);
        let wanted = Alone.sum(&tree, pieces(&tree, 0), 1001);
        for ranks in 2..=4 {
            let sums = well(on_links(ranks, |link| {
                let collective = draftsmith_train::Ranks::new(link);
                let tree = SumTree::new(micro_batches, ranks);
                let sum = collective.sum(&tree, pieces(&tree, collective.rank()), 1001);
                let all = collective.gather(vec![collective.rank() as u8; collective.rank()]);
                assert_eq!(all, (0..ranks).map(|rank| vec![rank as u8; rank]).collect::<Vec<_>>());
                assert_eq!(collective.broadcast(vec![collective.rank() as u8; 5]), [0; 5]);
                sum
            }));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(sums.iter().all(|sum| bits(sum) == bits(&wanted)), "{micro_batches} over {ranks}");
        }
    }
}

/// Both connections of a rank that comes and does not behave: what it does then is up to the test.
fn guest(port: u16, rank: usize, ranks: usize) -> meet::Pair {
    match meet::meet(&Place::here(port), (rank, ranks), SOON) {
        Ok(mut pairs) => pairs[0].take().unwrap(),
        Err(_) => panic!("rank {rank} does not come in"),
    }
}

/// What rank 0 of two tells, with what code it ends and after how long, where rank 1 does this.
fn rank_1(does: impl FnOnce(meet::Pair) + Send + 'static) -> (Vec<String>, Option<u8>, Duration) {
    let (port, seen) = (free_port(), Arc::new(Seen::default()));
    let other = std::thread::spawn(move || does(guest(port, 1, 2)));
    let first = link(port, 0, 2, &seen);
    let began = Instant::now();
    let waits = std::thread::spawn(move || first.exchange(&[], &mut [(1, &mut [0; 4])]));
    assert!(waits.join().is_err(), "rank 0 does not outlive it");
    let took = began.elapsed();
    other.join().unwrap();
    let told = seen.told.lock().unwrap().clone();
    (told, *seen.code.lock().unwrap(), took)
}

#[test]
fn a_rank_that_is_gone_ends_all_with_its_name() {
    let (told, code, took) = rank_1(drop);
    assert_eq!((told.len(), code), (1, Some(2)), "{told:?}");
    assert!(told[0].starts_with("rank 1 of 2 (") && told[0].contains("is gone: "), "{told:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_rank_whose_machine_vanished_is_missed_within_ten_seconds() {
    // It says nothing and closes nothing.
    let (told, code, took) = rank_1(|pair| {
        std::thread::sleep(Duration::from_secs(9));
        drop(pair);
    });
    assert_eq!((told.len(), code), (1, Some(2)), "{told:?}");
    assert!(told[0].contains("nothing was heard of it for 7 s"), "{told:?}");
    assert!(took < Duration::from_secs(9), "{took:?}");
}

#[test]
fn what_no_rank_says_ends_all_and_takes_no_memory() {
    let said: [(&[u8], &str); 3] = [
        (&[1, 255, 255, 255, 255], "it says something of 4294967295 bytes"),
        (&[99, 0, 0, 0, 0], "it says what nobody knows (99)"),
        (&[1, 9, 0, 0, 0, 1], "it closed the connection"),
    ];
    for (bytes, wanted) in said {
        let (told, code, _) = rank_1(move |pair| {
            (&pair.side).write_all(bytes).unwrap();
            pair.side.shutdown(std::net::Shutdown::Write).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        });
        assert_eq!(code, Some(2));
        assert!(told[0].contains(wanted), "{told:?}");
    }
    let (told, code, _) = rank_1(|pair| {
        (&pair.work).write_all(&u64::MAX.to_le_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(500));
    });
    assert_eq!(code, Some(2));
    assert!(told[0].contains("sends 18446744073709551615 bytes where 4 are expected"), "{told:?}");
}

#[test]
fn last_words_are_told_by_rank_0_and_end_all() {
    let (done, seen) = on_links(3, |link| match link.rank() {
        1 => link.give_up(br#"[["rank 1 of 3: the disk is full","free space"]]"#),
        _ => link.exchange(&[], &mut [((link.rank() + 1) % 3, &mut [0; 4])]),
    });
    assert!(done.iter().all(Result::is_err));
    let told: Vec<Vec<String>> = seen.iter().map(|seen| seen.told.lock().unwrap().clone()).collect();
    assert_eq!(told[0], ["rank 1 of 3: the disk is full | free space"]);
    assert!(told[1].is_empty() && told[2].is_empty(), "{told:?}");
    assert!(seen.iter().all(|seen| *seen.code.lock().unwrap() == Some(2)));
}

#[test]
fn an_end_reaches_all_with_its_code() {
    for who in [0, 2] {
        let (done, seen) = on_links(3, |link| match link.rank() == who {
            true => link.abort(130),
            false => link.exchange(&[], &mut [(who, &mut [0; 4])]),
        });
        assert!(done.iter().all(Result::is_err));
        for seen in &seen {
            assert_eq!((seen.told.lock().unwrap().len(), *seen.code.lock().unwrap()), (0, Some(130)));
        }
    }
}

#[test]
fn where_rank_0_is_gone_rank_1_says_so() {
    let (port, ranks) = (free_port(), 3);
    let seen: Vec<Arc<Seen>> = (0..ranks).map(|_| Arc::default()).collect();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..ranks)
            .map(|rank| {
                let seen = &seen[rank];
                scope.spawn(move || link(port, rank, ranks, seen).exchange(&[], &mut [(0, &mut [0; 4])]))
            })
            .collect();
        // It comes and goes without a word.
        assert!(meet::meet(&Place::here(port), (0, ranks), SOON).is_ok());
        assert!(others.into_iter().all(|other| other.join().is_err()));
    });
    let told = seen[1].told.lock().unwrap().clone();
    assert_eq!(told.len(), 1);
    assert!(told[0].starts_with("rank 0 of 3 (") && told[0].contains("is gone"), "{told:?}");
    assert!(seen[2].told.lock().unwrap().is_empty(), "it is said once");
    assert!(seen[1..].iter().all(|seen| *seen.code.lock().unwrap() == Some(2)));
}

fn missed(result: Result<Vec<Option<meet::Pair>>, Missed>) -> String {
    match result {
        Ok(_) => "came".to_string(),
        Err(Missed::Told) => "told".to_string(),
        Err(Missed::Mine(error)) => format!("{error} | {}", error.hint().unwrap()),
    }
}

const BRIEFLY: Duration = Duration::from_secs(1);

#[test]
fn a_rank_that_does_not_come_is_named() {
    let port = free_port();
    let (first, second) = std::thread::scope(|scope| {
        let second = scope.spawn(move || missed(meet::meet(&Place::here(port), (1, 4), SOON)));
        (missed(meet::meet(&Place::here(port), (0, 4), BRIEFLY)), second.join().unwrap())
    });
    let wanted =
        format!("rank 0 waited 1 s at 127.0.0.1:{port} for ranks 2, 3 of 4, in vain | start all ranks");
    assert!(first.starts_with(&wanted), "{first}");
    assert_eq!(second, "told");
    let alone = missed(meet::meet(&Place::here(port), (1, 2), BRIEFLY));
    let wanted = format!("rank 1 of 2 found no rank 0 at 127.0.0.1:{port} within 1 s: 127.0.0.1:{port}: ");
    assert!(alone.starts_with(&wanted) && alone.contains("| start rank 0 with"), "{alone}");
    // Somebody else listens there.
    let other = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let taken = missed(meet::meet(&Place::here(port), (0, 2), BRIEFLY));
    assert!(taken.starts_with(&format!("rank 0 cannot listen at 127.0.0.1:{port}: ")), "{taken}");
    assert!(taken.contains("DRAFTSMITH_RANKS_PORT"), "{taken}");
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        let _ = stream.write_all(&[b'?'; 500]);
        let _ = stream.read(&mut [0; 500]);
    });
    let stranger = missed(meet::meet(&Place::here(port), (1, 2), Duration::from_millis(100)));
    assert!(stranger.contains("what listens there is not draftsmith"), "{stranger}");
    answers.join().unwrap();
}

#[test]
fn strangers_and_ranks_that_do_not_belong_here_are_turned_away_and_the_others_go_on() {
    let port = free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let seen: [Arc<Seen>; 2] = Default::default();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| link(port, 0, 2, &seen[0]));
        // One that says nothing, some that say anything, one that goes at once.
        let connect = || loop {
            match TcpStream::connect(address) {
                Ok(stream) => return stream,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let _silent = connect();
        let mut rng = draftsmith_train::Rng::new(3, &[1]);
        for round in 0..20 {
            let mut bytes: Vec<u8> = (0..300).map(|_| rng.below(256) as u8).collect();
            if round % 2 == 0 {
                // As a card begins.
                bytes[..12].copy_from_slice(b"DSRANKS\n\x01\0\0\0");
            }
            let _ = connect().write_all(&bytes);
        }
        (&connect()).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        drop(connect());
        let other = |rank, ranks| missed(meet::meet(&Place::here(port), (rank, ranks), SOON));
        let count = other(1, 3);
        assert!(
            count.starts_with("rank 1 of 3 (") && count.contains("it is one of 3 ranks, rank 0 is one of 2"),
            "{count}"
        );
        let mut protocol = connect();
        protocol.write_all(b"DSRANKS\n\x63\0\0\0").unwrap();
        let mut answer = [0; 13];
        protocol.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"DSRANKS\n\x01\0\0\0\x04", "it is told that this is another protocol");
        // The real one.
        let second = link(port, 1, 2, &seen[1]);
        let first = first.join().unwrap();
        let heard = scope.spawn(move || {
            let mut word = [0; 4];
            second.exchange(&[], &mut [(0, &mut word)]);
            word
        });
        first.exchange(&[(1, b"fine")], &mut []);
        assert_eq!(&heard.join().unwrap(), b"fine");
    });
    assert!(seen.iter().all(|seen| seen.told.lock().unwrap().is_empty()));
}

#[test]
fn of_two_processes_with_one_rank_the_second_is_refused() {
    let port = free_port();
    let seen: [Arc<Seen>; 3] = Default::default();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| link(port, 0, 3, &seen[0]));
        let one = scope.spawn(|| link(port, 1, 3, &seen[1]));
        std::thread::sleep(Duration::from_millis(800));
        let again = missed(meet::meet(&Place::here(port), (1, 3), SOON));
        assert!(again.contains("is refused: another process has come as this rank"), "{again}");
        assert!(again.contains("`RANK` of its own"), "{again}");
        let two = scope.spawn(|| link(port, 2, 3, &seen[2]));
        let links = [first, one, two].map(|thread| thread.join().unwrap());
        assert_eq!(links.map(|link| (link.rank(), link.ranks())), [(0, 3), (1, 3), (2, 3)]);
    });
}

#[test]
fn a_process_that_was_ended_before_all_came_can_be_started_again() {
    let port = free_port();
    let seen: [Arc<Seen>; 3] = Default::default();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| link(port, 0, 3, &seen[0]));
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
        // It comes, and does not wait for the third.
        let gone = missed(meet::meet(&Place::here(port), (1, 3), Duration::ZERO));
        assert!(gone.contains("rank 1 of 3 lost rank 0"), "{gone}");
        let one = scope.spawn(|| link(port, 1, 3, &seen[1]));
        let two = scope.spawn(|| link(port, 2, 3, &seen[2]));
        let links = [first, one, two].map(|thread| thread.join().unwrap());
        assert_eq!(links.map(|link| link.rank()), [0, 1, 2]);
    });
}

#[test]
fn a_rank_beyond_the_number_of_ranks_is_refused_at_once() {
    let seen = Arc::new(Seen::default());
    let error = Ranks::over_tcp(&Place::here(1), (2, 2), SOON, ends(&seen)).unwrap_err();
    assert_eq!(error.to_string(), "`RANK` is 2 and `WORLD_SIZE` 2");
    assert_eq!(seen.told.lock().unwrap().len(), 1, "rank 0 cannot say it");
}

#[test]
fn ranks_greet_each_other_over_sockets() {
    let port = free_port();
    let notes = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|rank| {
                scope.spawn(move || {
                    let ranks =
                        Ranks::over_tcp(&Place::here(port), (rank, 3), SOON, ends(&Arc::default())).unwrap();
                    let mine = if rank < 2 { "a" } else { "b" };
                    let error = ranks
                        .agree(Ok(mine), |mine| BTreeMap::from([("data".to_string(), mine.to_string())]));
                    (ranks.name().unwrap().to_string(), error.unwrap_err().to_string())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for (rank, (name, error)) in notes.iter().enumerate() {
        assert!(name.starts_with(&format!("rank {rank} of 3 (")), "{name}");
        assert!(error.starts_with("rank 2 of 3 (") && error.contains("works on something else"), "{error}");
    }
}
