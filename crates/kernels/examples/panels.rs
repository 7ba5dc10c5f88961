//! Best times of products with each type: `panels [THREADS [TYPE…]]`.
use std::time::Instant;
use draftsmith_kernels::testing::infer::{DTYPES, Random, stored};
use draftsmith_kernels::{Cpu, Kernels, PackMode, WeightView};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads = args.first().map_or(2, |t| t.parse().unwrap());
    let level: Option<usize> = std::env::var("LEVEL").ok().map(|l| l.parse().unwrap());
    let mut paths = Cpu::all_paths(threads);
    let cpu = match level { Some(l) => paths.remove(l), None => paths.pop().unwrap() };
    let read = cpu.read_rate(128 << 20) / 1e9;
    println!("{} read {read:.1} GB/s dot {:.1} GMAC/s", cpu.features().path, cpu.dot_rate() / 1e9);
    let mut random = Random(1);
    for dtype in DTYPES {
        let name = format!("{dtype:?}").to_lowercase();
        if args.len() > 1 && !args[1..].contains(&name) { continue; }
        let (inputs, out) = (2048, std::env::var("OUT").map_or(8192, |o| o.parse().unwrap()));
        let one = stored(&mut random, dtype, 64, inputs);
        let data = one.repeat(out / 64);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        // More than the caches hold.
        let count = (96usize << 20).div_ceil(data.len());
        let packed: Vec<_> = (0..count).map(|_| cpu.pack("w", &w, PackMode::Stored).unwrap()).collect();
        let bytes: usize = packed.iter().map(|p| p.bytes()).sum();
        print!("{name:8} {:5.2} bits ({:5.3} of file)", packed[0].bytes() as f64 * 8.0 / (inputs * out) as f64, packed[0].bytes() as f64 / data.len() as f64);
        for rows in [1, 2, 4, 8, 16, 32] {
            let x = random.floats(rows * inputs);
            let mut y = [cpu.zeros(rows * out)];
            let mut best = f64::INFINITY;
            for _ in 0..(if rows > 8 { 6 } else { 12 }) {
                let start = Instant::now();
                for p in &packed { cpu.matmuls(&x, rows, &[(p, None)], &mut y); }
                best = best.min(start.elapsed().as_secs_f64());
            }
            let macs = (count * inputs * out * rows) as f64;
            if rows == 1 { print!("  1: {:5.1} GB/s {:4.0}%", bytes as f64 / best / 1e9, bytes as f64 / best / 1e7 / read); }
            print!("  {rows}: {:6.1}", macs / best / 1e9);
        }
        let x = random.floats(4 * inputs); for rows in [1, 4] { let mut best = f64::INFINITY; for _ in 0..8 { let start = Instant::now(); for p in &packed { cpu.argmax(&x, rows, p); } best = best.min(start.elapsed().as_secs_f64()); } print!("  max {rows}: {:.1}", (count * inputs * out * rows) as f64 / best / 1e9); } println!(" GMAC/s");
    }
}
