//! Launches that wait for each other and start together, on the host shim: what they read and write is what it would be one by one.

use std::path::Path;

use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Cuda, CudaOptions, Graphs, source};
use draftsmith_kernels::testing::{host, noise};
use draftsmith_kernels::{Kernels, Memory, TrainKernels};

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn device(graphs: Graphs) -> Cuda<Shim> {
    Cuda::new(Shim::new(folder()).unwrap(), CudaOptions { graphs, ..CudaOptions::default() })
}

const WIDTH: usize = 24;

/// Rows of `x` added up, a launch and a table for each list of rows.
fn sums(k: &Cuda<Shim>, x: &[f32], lists: &[[u32; 3]], factor: f32) -> Vec<f32> {
    let x = k.upload(x);
    let mut sum = k.zeros(3 * WIDTH);
    for rows in lists {
        let mut chosen = k.scratch(3 * WIDTH);
        k.gather_rows(&x, WIDTH, rows, &mut chosen);
        k.add(&mut sum, &chosen);
    }
    k.scale(&mut sum, factor);
    host(k, &sum, 3 * WIDTH)
}

fn lists(count: u32, seed: u32) -> Vec<[u32; 3]> {
    (0..count).map(|i| [(i + seed) % 10, (3 * i + 1) % 10, (7 * i + 2 * seed) % 10]).collect()
}

/// The same with nothing but numbers.
fn wanted(x: &[f32], lists: &[[u32; 3]], factor: f32) -> Vec<f32> {
    let mut sum = vec![0.0f32; 3 * WIDTH];
    for rows in lists {
        for (row, sum) in rows.iter().zip(sum.chunks_exact_mut(WIDTH)) {
            let from = &x[*row as usize * WIDTH..];
            sum.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
    }
    sum.iter().map(|x| x * factor).collect()
}

#[test]
fn work_that_comes_again_starts_at_once_and_reads_the_tables_of_its_own_time() {
    let (on, off) = (device(Graphs::On), device(Graphs::Off));
    for step in 0..6 {
        let (x, lists) = (noise(step.into(), 10 * WIDTH), lists(50, step));
        let wanted = wanted(&x, &lists, 0.5);
        assert_eq!(sums(&on, &x, &lists, 0.5), wanted, "step {step}");
        assert_eq!(sums(&off, &x, &lists, 0.5), wanted, "step {step}");
    }
    // A step is 1 + 50 · 2 + 1 launches: lists of 32 and of 64, and 6 that nobody records. The second step records, four replay.
    let (on, off) = (on.started(), off.started());
    assert_eq!((on.launches, off.launches), (6 * 102, 6 * 102));
    assert_eq!((on.recorded, on.replayed), (2, 5 * 96));
    assert_eq!(on.calls, 102 + 5 * (2 + 6));
    assert_eq!((off.recorded, off.replayed, off.calls), (0, 0, off.launches));
    // Tables lie side by side in what one call copies, with and without that.
    assert_eq!((on.tables, on.copies), (6 * 50, 6 * 3));
    assert_eq!((off.tables, off.copies), (on.tables, on.copies));
}

#[test]
fn work_that_differs_in_one_number_is_other_work() {
    let k = device(Graphs::On);
    let (x, lists) = (noise(1, 10 * WIDTH), lists(10, 0));
    for step in 0..5u8 {
        let factor = 1.0 + f32::from(step % 4);
        assert_eq!(sums(&k, &x, &lists, factor), wanted(&x, &lists, factor), "step {step}");
    }
    // The fifth is the first again.
    assert_eq!((k.started().recorded, k.started().replayed), (1, 22));
}

#[test]
fn tables_that_fill_all_copies_under_way_are_read_where_they_belong() {
    let k = device(Graphs::On);
    let rows = 100_000;
    let x: Vec<f32> = (0..256u16).map(f32::from).collect();
    let x = k.upload(&x);
    // Forty of 400 kB, of which two fit into one copy, and one that is too large for any.
    let mut all = Vec::new();
    for i in 0..41u32 {
        let rows = if i == 40 { 2 * rows } else { rows };
        let ids: Vec<u32> = (0..rows as u32).map(|row| (row + i) % 256).collect();
        let mut y = k.scratch(rows);
        k.gather_rows(&x, 1, &ids, &mut y);
        all.push((ids, y));
    }
    let started = k.started();
    assert_eq!((started.tables, started.copies), (40, 20));
    for (ids, y) in &all {
        let wanted: Vec<f32> = ids.iter().map(|id| *id as f32).collect();
        assert!(host(&k, y, ids.len()) == wanted);
    }
    // More than may be under way without a result: it waits for them.
    for i in 0..150u32 {
        let ids: Vec<u32> = (0..rows as u32).map(|row| (row * 3 + i) % 256).collect();
        k.gather_rows(&x, 1, &ids, &mut all[i as usize % 40].1);
        all[i as usize % 40].0 = ids;
    }
    for (ids, y) in &all {
        let wanted: Vec<f32> = ids.iter().map(|id| *id as f32).collect();
        assert!(host(&k, y, ids.len()) == wanted);
    }
}

#[test]
fn memory_that_is_given_back_to_the_device_was_used_before() {
    let shim = Shim::of(folder(), &source::text(), 4 << 20).unwrap();
    let k = Cuda::new(shim, CudaOptions::default());
    for _ in 0..3 {
        // Fills that wait, of memory that lies unused when the large one asks for all.
        let small: Vec<_> = (0..10).map(|_| k.zeros(80_000)).collect();
        drop(small);
        let large = k.zeros(900_000);
        assert!(host(&k, &large, 900_000).iter().all(|x| *x == 0.0));
    }
    assert_eq!(k.started().launches, 33);
}

#[test]
fn threads_that_share_a_device_do_not_mix_their_work() {
    let k = device(Graphs::On);
    std::thread::scope(|scope| {
        for thread in 0..3u32 {
            let k = k.clone();
            scope.spawn(move || {
                for step in 0..40 {
                    let (x, lists) = (noise(thread.into(), 10 * WIDTH), lists(20, step));
                    assert_eq!(sums(&k, &x, &lists, 2.0), wanted(&x, &lists, 2.0), "{thread}, {step}");
                }
            });
        }
    });
}

#[test]
fn data_that_is_sent_beside_the_work_is_there_when_it_was_asked_for() {
    let k = device(Graphs::On);
    let courier = k.courier().unwrap();
    // More than the host's memory for it holds at once, of all sizes.
    for round in 0..6u64 {
        let parts = [noise(round, 3000 + 500 * round as usize), Vec::new(), noise(round + 9, 7)];
        let coming = courier.send(&[&parts[0], &parts[1], &parts[2]]).unwrap();
        // Work of other memory goes on meanwhile.
        let x = noise(1, 10 * WIDTH);
        assert_eq!(sums(&k, &x, &lists(5, 1), 1.0), wanted(&x, &lists(5, 1), 1.0));
        if round == 3 {
            // Nobody wants it: its memory is used by others.
            drop(coming);
            let zeros = k.zeros(4500);
            assert_eq!(host(&k, &zeros, 4500), vec![0.0; 4500]);
            continue;
        }
        let bufs = coming.arrived();
        for (buf, part) in bufs.iter().zip(&parts) {
            assert_eq!(host(&k, buf, part.len()), *part, "round {round}");
        }
    }
}

#[test]
fn data_for_which_there_is_no_room_stays_where_it_is() {
    let shim = Shim::of(folder(), &source::text(), 1 << 20).unwrap();
    let k = Cuda::new(shim, CudaOptions::default());
    let courier = k.courier().unwrap();
    assert!(courier.send(&[&[1.0; 1000], &vec![0.0; 400_000]]).is_none());
    let bufs = courier.send(&[&[1.0; 1000]]).unwrap().arrived();
    assert_eq!(host(&k, &bufs[0], 1000), [1.0; 1000]);
}
