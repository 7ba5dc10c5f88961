//! What driving an NVIDIA GPU costs the host: plain decoding of a target on a device that does nothing, so all time is the host's.
//! A card waits for the host from the result of a step to the first launch of the next; the rest of the host's time passes while it
//! computes, unless its kernels are the quicker ones.
//!
//! `cargo run --release -p draftsmith-decode --example host_time -- MODEL.gguf [KEY=VALUE…]`
//!
//! Keys: `sequences` (1,8,64,256,1024), `prompt` (64), `tokens` (64), `graphs` (`on`, `off`).
#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use draftsmith_cuda::{About, Arg, At, Cuda, CudaError, CudaOptions, Graphs, Launch, Launcher, Product};
use draftsmith_decode::{BatchOptions, Engine, GenerateOptions};
use draftsmith_model::{Precision, Target};

/// A device without kernels: it takes all calls, and adds up how long it had nothing to do.
#[derive(Default)]
struct Nothing {
    allocated: AtomicU64,
    /// When the last result was handed out, if nothing was started since.
    resting: Mutex<Option<Instant>>,
    idle_ns: Arc<AtomicU64>,
}

impl Nothing {
    fn begin(&self) {
        if let Some(since) = self.resting.lock().unwrap().take() {
            self.idle_ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

/// Memory that is an address alone.
struct Address(u64);

/// A launch as a card would take it.
#[derive(PartialEq, Eq, Hash)]
struct Taken {
    kernel: &'static str,
    grid: (usize, usize),
    values: Vec<u64>,
    starts: Vec<usize>,
}

impl Launcher for Nothing {
    type Memory = Address;
    type Ready = Taken;
    type Graph = ();
    type Staging = Vec<u8>;
    type Mark = ();

    fn allocate(&self, bytes: usize) -> Result<Address, CudaError> {
        Ok(Address(self.allocated.fetch_add(bytes as u64, Ordering::Relaxed)))
    }
    fn staging(&self, bytes: usize) -> Result<Vec<u8>, CudaError> {
        Ok(vec![0; bytes])
    }
    fn write(&self, _: At<'_, Address>, _: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }
    fn write_staged(&self, _: At<'_, Address>, _: &Vec<u8>, _: usize) -> Result<(), CudaError> {
        Ok(())
    }
    fn copy_beside(&self, _: &[(At<'_, Address>, Range<usize>)], _: &Vec<u8>) -> Result<(), CudaError> {
        Ok(())
    }
    fn after(&self, (): &()) -> Result<(), CudaError> {
        Ok(())
    }
    fn wait_for(&self, (): &()) -> Result<(), CudaError> {
        Ok(())
    }
    fn read(&self, _: At<'_, Address>, out: &mut [u8]) -> Result<(), CudaError> {
        out.fill(0);
        *self.resting.lock().unwrap() = Some(Instant::now());
        Ok(())
    }
    fn wait(&self) -> Result<(), CudaError> {
        Ok(())
    }
    fn ready(&self, launch: Launch<'_, Address>) -> Result<Taken, CudaError> {
        let address = |at: &Option<At<'_, Address>>| at.map_or(0, |at| at.memory.0 + at.offset as u64);
        let (mut values, mut starts) = (Vec::with_capacity(launch.args.len()), Vec::new());
        for arg in launch.args {
            starts.push(values.len());
            match arg {
                Arg::Buffer(at) => values.push(address(at)),
                Arg::Buffers(all) => values.extend(all.iter().map(address)),
                Arg::I32(x) => values.push(u64::from(x.cast_unsigned())),
                Arg::U32(x) => values.push(u64::from(*x)),
                Arg::I64(x) => values.push(x.cast_unsigned()),
                Arg::F32(x) => values.push(u64::from(x.to_bits())),
            }
        }
        Ok(Taken { kernel: launch.kernel, grid: launch.grid, values, starts })
    }
    fn start(&self, _: &Taken) -> Result<(), CudaError> {
        self.begin();
        Ok(())
    }
    fn record(&self, _: &[Taken]) -> Result<(), CudaError> {
        Ok(())
    }
    fn replay(&self, (): &()) -> Result<(), CudaError> {
        self.begin();
        Ok(())
    }
    fn about(&self) -> About {
        let none = String::from("none");
        About { number: 0, card: none.clone(), capability: none.clone(), memory: 0, driver: none }
    }
    fn memory(&self) -> Result<(u64, u64), CudaError> {
        Ok((u64::MAX, u64::MAX))
    }
    fn product(
        &self,
        _: Product,
        _: At<'_, Address>,
        _: At<'_, Address>,
        _: At<'_, Address>,
    ) -> Result<(), CudaError> {
        Ok(())
    }
}

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
    let idle = Arc::clone(&device.launcher().idle_ns);
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
            idle.store(0, Ordering::Relaxed);
            engine
                .generate_batch(BatchOptions { batch_size: number }, &mut next, &mut |_, generation| {
                    assert_eq!(generation.token_ids.len(), tokens, "no token ends a text");
                    ControlFlow::Continue(())
                })
                .expect("plain decoding");
            let (seconds, after) = (begun.elapsed().as_secs_f64(), device.started());
            let idle = idle.load(Ordering::Relaxed) as f64 / 1e9;
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
