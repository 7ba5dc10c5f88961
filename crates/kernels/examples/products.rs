//! Multiply-adds per second of the large products of training, in f32, of bf16 numbers, and as three of those.
//!
//! `cargo run --release -p draftsmith-kernels --example products -- [THREADS] [MILLISECONDS]`
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::time::Instant;

use draftsmith_kernels::testing::noise;
use draftsmith_kernels::train::linear::{matmul, matmul_dw_acc, matmul_dx};
use draftsmith_kernels::train::{LinearShape, Products, Team};

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let (threads, time) = (args.next().unwrap_or(1), args.next().unwrap_or(400));
    let all = [Products::F32, Products::Bf16, Products::Bf16x3];
    let offered: Vec<Products> = all.into_iter().filter(|p| p.is_offered()).collect();
    println!("{threads} threads; GMAC/s of y, dx and dw: {offered:?}");
    for (rows, out, inp) in
        [(1024, 576, 1152), (1024, 1536, 576), (600, 16384, 576), (512, 2048, 896), (1024, 896, 2688)]
    {
        let s = LinearShape { rows, out, inp };
        let (x, w) = (noise(1, rows * inp), noise(2, out * inp));
        let (mut y, mut dx, mut dw) = (noise(3, rows * out), vec![0.0; rows * inp], vec![0.0; out * inp]);
        let macs = (rows * out * inp) as f64;
        let mut line = format!("{rows:>5} rows {inp:>5} to {out:>5} ");
        let mut rates = vec![[0.0f64; 3]; offered.len()];
        let began = Instant::now();
        // In turn, so that a slow moment meets both.
        while began.elapsed().as_millis() < time as u128 {
            for (products, rates) in offered.iter().copied().zip(&mut rates) {
                let team = Team { threads, products };
                let mut timed = |i: usize, f: &mut dyn FnMut()| {
                    let start = Instant::now();
                    f();
                    rates[i] = rates[i].max(macs / start.elapsed().as_secs_f64() / 1e9);
                };
                timed(0, &mut || matmul(team, &x, &w, s, &mut y));
                timed(1, &mut || matmul_dx(team, &y, &w, s, false, &mut dx));
                timed(2, &mut || matmul_dw_acc(team, &y, &x, s, &mut dw));
            }
        }
        for rates in rates {
            line += &rates.map(|r| format!("{r:>8.1}")).concat();
        }
        println!("{line}");
    }
}
