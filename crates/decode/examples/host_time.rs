//! What driving an NVIDIA GPU costs the host: plain decoding of a target on a device that does nothing, so all time is the host's.
//! A card waits for the host from the result of a step to the first launch of the next; the rest of the host's time passes while it
//! computes, unless its kernels are the quicker ones.
//!
//! `cargo run --release -p draftsmith-decode --example host_time -- MODEL.gguf [KEY=VALUE…]`
//!
//! Keys: `sequences` (1,8,64,256,1024), `prompt` (64), `tokens` (64), `graphs` (`on`, `off`).
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use draftsmith_cuda::nothing::Nothing;
use draftsmith_cuda::{Cuda, CudaOptions, Graphs};
use draftsmith_decode::{BatchOptions, Engine, GenerateOptions};
use draftsmith_model::{Precision, Target};

fn main() {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().expect("give the model file"));
    let (mut sequences, mut prompt, mut tokens) = ("1,8,64,256,1024".to_owned(), 64, 64);
    let mut graphs = Graphs::On;
    for arg in args {
        let (key, value) = arg.split_once('=').expect("KEY=VALUE");
        let number = || value.parse().expect("a number");
        match key {
            "sequences" => value.clone_into(&mut sequences),
            "prompt" => prompt = number(),
            "tokens" => tokens = number(),
            "graphs" => graphs = if value == "off" { Graphs::Off } else { Graphs::On },
            _ => panic!("no key {key}"),
        }
    }
    let device = Cuda::new(Nothing::default(), CudaOptions { graphs, ..CudaOptions::default() });
    let target = Target::load(Arc::new(device.clone()), &path, Precision::Stored).expect("a loadable model");
    let engine = Engine::new(Arc::new(target), None);
    for number in sequences.split(',') {
        let number: usize = number.parse().expect("numbers");
        // Twice as many tokens take as much longer as the steps beyond; prompts cancel out.
        let run = |tokens: usize| {
            let mut waiting = 0..number;
            let mut next = || {
                let i = waiting.next()?;
                let ids = (0..prompt as u32).map(|at| 1000 + (at * 37 + i as u32 * 11) % 20_000).collect();
                Some((i, ids, GenerateOptions { max_new_tokens: tokens, ..GenerateOptions::default() }))
            };
            let (before, begun) = (device.started(), Instant::now());
            device.launcher().take_idle_s();
            engine
                .generate_batch(BatchOptions { batch_size: number }, &mut next, &mut |_, generation| {
                    assert_eq!(generation.token_ids.len(), tokens, "no token ends a text");
                    ControlFlow::Continue(())
                })
                .expect("plain decoding");
            let (seconds, after) = (begun.elapsed().as_secs_f64(), device.started());
            let idle = device.launcher().take_idle_s();
            [
                seconds * 1e3,
                idle * 1e3,
                (after.launches - before.launches) as f64,
                (after.calls - before.calls) as f64,
                (after.tables - before.tables) as f64,
                (after.copies - before.copies) as f64,
            ]
        };
        // The first run finds all that later ones find again.
        run(tokens);
        let (short, long) = (run(tokens), run(2 * tokens));
        let per_step: Vec<f64> = (0..6).map(|i| (long[i] - short[i]) / tokens as f64).collect();
        println!(
            "{number:5} sequences: {:7.3} ms a step, {:6.3} of them before the first launch; {:.0} launches by {:.0} calls, {:.0} tables \
             by {:.0} copies",
            per_step[0], per_step[1], per_step[2], per_step[3], per_step[4], per_step[5],
        );
    }
}
