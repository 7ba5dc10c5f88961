//! Time of one verify pass over `m` rows behind a context (256 tokens), the median of many.
//!
//! `cargo run --release -p draftsmith-decode --example step_time -- MODEL.gguf [THREADS] [ROWS,ROWS,…] [CONTEXT] [PATH]`
//!
//! PATH is `portable`, `avx2` or `avx512-vnni`; the best one if it is left out.
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use draftsmith_core::TokenTree;
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, StepItem, Target};

fn main() {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().expect("give the model file"));
    let threads = args.next().map_or(2, |t| t.parse().expect("threads is a number"));
    let sizes: Vec<usize> = args
        .next()
        .unwrap_or_else(|| "1,2,4,6,8,16,32".to_owned())
        .split(',')
        .map(|m| m.parse().expect("rows are numbers"))
        .collect();
    let context: usize = args.next().map_or(256, |c| c.parse().expect("context is a number"));
    let cpu = match args.next() {
        None => Cpu::new(threads),
        Some(name) => Cpu::all_paths(threads)
            .into_iter()
            .find(|cpu| cpu.features().path == name)
            .expect("a path that this CPU has"),
    };
    let target = Target::load(Arc::new(cpu), &path, Precision::Stored).expect("a loadable model");
    let ids: Vec<u32> = (0..context.max(512) as u32).map(|i| 1000 + i * 37 % 20000).collect();
    let mut kv = target.new_kv();
    for len in [512, context] {
        let start = Instant::now();
        let mut fresh = target.new_kv();
        target.forward(
            &mut [StepItem { kv: &mut fresh, tokens: &ids[..len], parents: &TokenTree::chain_parents(len) }],
            &[],
        );
        println!("prefill of {len}: {:.0} tokens/s", len as f64 / start.elapsed().as_secs_f64());
        if len == context {
            kv = fresh;
        }
    }
    for m in sizes {
        let mut times = Vec::new();
        for _ in 0..60 {
            let start = Instant::now();
            let parents = TokenTree::chain_parents(m);
            let output =
                target.forward(&mut [StepItem { kv: &mut kv, tokens: &ids[..m], parents: &parents }], &[]);
            let rows: Vec<u32> = (0..m as u32).collect();
            assert_eq!(target.argmax(&output, &rows).len(), m);
            times.push(start.elapsed().as_secs_f64() * 1e3);
            kv.rollback_to(context);
        }
        times.sort_by(f64::total_cmp);
        println!("t({m}) = {:.2} ms (min {:.2})", times[times.len() / 2], times[0]);
    }
}
