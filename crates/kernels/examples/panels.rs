//! Multiply-adds per second of products with each stored type, with weights in the nearest caches and in memory.
//!
//! `cargo run --release -p draftsmith-kernels --example panels -- [KEY=VALUE…]`
//!
//! Keys: `threads` (2), `rows` (1,4,8,16,32), `types` (all; `q4k,q5_0`), `megabytes` (4), `inputs` (1536), `path` (`portable`, `avx2`,
//! `avx512-vnni`; the best one if it is left out).
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::time::Instant;

use draftsmith_kernels::testing::infer::{DTYPES, Random, stored};
use draftsmith_kernels::{Cpu, Kernels, Memory, PackMode, WeightView};

const OUTPUTS: usize = 1024;

fn main() {
    let (mut threads, mut megabytes, mut inputs) = (2, 4, 1536);
    let (mut rows, mut types, mut path) = ("1,4,8,16,32".to_owned(), String::new(), None);
    for arg in std::env::args().skip(1) {
        let (key, value) = arg.split_once('=').expect("KEY=VALUE");
        let number = || value.parse().expect("a number");
        match key {
            "threads" => threads = number(),
            "megabytes" => megabytes = number(),
            "inputs" => inputs = number(),
            "rows" => value.clone_into(&mut rows),
            "types" => value.clone_into(&mut types),
            "path" => path = Some(value.to_owned()),
            _ => panic!("no key {key}"),
        }
    }
    let rows: Vec<usize> = rows.split(',').map(|r| r.parse().expect("numbers")).collect();
    let cpu = Cpu::all_paths(threads)
        .into_iter()
        .rfind(|cpu| path.as_ref().is_none_or(|p| cpu.features().path == p))
        .expect("a path that this CPU has");
    println!("{} threads, {}, GMAC/s at {rows:?} rows", threads, cpu.features().path);
    let mut random = Random(1);
    for dtype in DTYPES {
        let name = format!("{dtype:?}").to_lowercase();
        if !types.is_empty() && !types.split(',').any(|t| t == name) {
            continue;
        }
        let data = stored(&mut random, dtype, OUTPUTS, inputs);
        let w = WeightView { dtype, out_features: OUTPUTS, in_features: inputs, data: &data };
        let count = (megabytes << 20).div_ceil(data.len());
        let packed: Vec<_> =
            (0..count).map(|_| cpu.pack("w", &w, PackMode::Stored).expect("a complete weight")).collect();
        let mut line = format!("{name:8}");
        for rows in &rows {
            let x = random.floats(rows * inputs);
            let mut y = [cpu.zeros(rows * OUTPUTS)];
            let macs = (count * inputs * OUTPUTS * rows) as f64;
            let mut best = f64::INFINITY;
            let began = Instant::now();
            while began.elapsed().as_millis() < 120 {
                let start = Instant::now();
                for p in &packed {
                    cpu.matmuls(&x, *rows, &[(p, None)], &mut y);
                }
                best = best.min(start.elapsed().as_secs_f64());
            }
            line += &format!(" {:7.1}", macs / best / 1e9);
        }
        println!("{line}");
    }
}
