//! Times of target passes, the medians of many: `m` rows of one sequence behind a context (a verify), one row of each of `n`
//! sequences behind contexts of their own (a batch that decodes), and a prefill. What is measured takes turns in short runs.
//!
//! `cargo run --release -p draftsmith-decode --example step_time -- MODEL.gguf [KEY=VALUE…]`
//!
//! Keys: `threads` (2), `rows` (1,2,4,6,8,16,32), `sequences` (none), `prefill` (512), `context` (256), `runs` (4),
//! `path` (`portable`, `avx2`, `avx512-vnni`; the best one if it is left out).
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use draftsmith_core::TokenTree;
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, StepItem, Target, TargetKv};

/// Passes of one kind in a row: the first ones pay for the caches that another kind left.
const IN_A_ROW: usize = 12;

fn numbers(list: &str) -> Vec<usize> {
    list.split(',').filter(|n| !n.is_empty()).map(|n| n.parse().expect("numbers")).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn fill(target: &Target<Cpu>, ids: &[u32]) -> TargetKv<Cpu> {
    let mut kv = target.new_kv();
    for part in ids.chunks(256) {
        let parents = TokenTree::chain_parents(part.len());
        target.forward(&mut [StepItem { kv: &mut kv, tokens: part, parents: &parents }], &[]);
    }
    kv
}

fn main() {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().expect("give the model file"));
    let (mut threads, mut context, mut runs) = (2, 256, 4);
    let (mut rows, mut sequences, mut prefill) = ("1,2,4,6,8,16,32".to_owned(), String::new(), 512);
    let mut level = None;
    for arg in args {
        let (key, value) = arg.split_once('=').expect("KEY=VALUE");
        let number = || value.parse().expect("a number");
        match key {
            "threads" => threads = number(),
            "context" => context = number(),
            "prefill" => prefill = number(),
            "runs" => runs = number(),
            "rows" => value.clone_into(&mut rows),
            "sequences" => value.clone_into(&mut sequences),
            "path" => level = Some(value.to_owned()),
            _ => panic!("no key {key}"),
        }
    }
    let cpu = match level {
        None => Cpu::new(threads),
        Some(name) => Cpu::all_paths(threads)
            .into_iter()
            .find(|cpu| cpu.features().path == name)
            .expect("a path that this CPU has"),
    };
    let target = Target::load(Arc::new(cpu), &path, Precision::Stored).expect("a loadable model");
    let ids: Vec<u32> = (0..context.max(prefill) as u32 + 64).map(|i| 1000 + i * 37 % 20000).collect();
    let rows = numbers(&rows);
    let sequences = numbers(&sequences);
    let count = sequences.iter().copied().max().unwrap_or(0);
    let mut kvs: Vec<TargetKv<Cpu>> =
        (0..count.max(1)).map(|i| fill(&target, &ids[i..i + context])).collect();
    let mut times = vec![Vec::new(); rows.len() + sequences.len()];
    let mut prefills = Vec::new();
    for _ in 0..runs {
        for (times, (number, wide)) in
            times.iter_mut().zip(rows.iter().map(|m| (*m, false)).chain(sequences.iter().map(|n| (*n, true))))
        {
            for pass in 0..IN_A_ROW {
                let parents = TokenTree::chain_parents(if wide { 1 } else { number });
                let start = Instant::now();
                let mut items: Vec<StepItem<'_, Cpu>> = kvs
                    .iter_mut()
                    .take(if wide { number } else { 1 })
                    .enumerate()
                    .map(|(i, kv)| StepItem { kv, tokens: &ids[i..i + parents.len()], parents: &parents })
                    .collect();
                let output = target.forward(&mut items, &[]);
                let chosen: Vec<u32> = (0..number as u32).collect();
                assert_eq!(target.argmax(&output, &chosen).len(), number);
                if pass >= 2 {
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
                kvs.iter_mut().for_each(|kv| kv.rollback_to(context));
            }
        }
        if prefill > 0 {
            let start = Instant::now();
            fill(&target, &ids[..prefill]);
            prefills.push(start.elapsed().as_secs_f64());
        }
    }
    let (of_rows, of_sequences) = times.split_at_mut(rows.len());
    for (m, times) in rows.iter().zip(of_rows) {
        let median = median(times);
        println!("{m:3} rows behind {context}: {median:7.2} ms, best {:7.2}", times[0]);
    }
    for (n, times) in sequences.iter().zip(of_sequences) {
        let median = median(times);
        let rate = *n as f64 / median * 1e3;
        println!("{n:3} sequences: {median:7.2} ms, best {:7.2}, {rate:6.0} tokens/s", times[0]);
    }
    if prefill > 0 {
        println!("prefill of {prefill}: {:.0} tokens/s", prefill as f64 / median(&mut prefills));
    }
}
