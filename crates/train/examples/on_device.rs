//! What a machine with an NVIDIA GPU is asked: `on_device STAGE [--shim]`, a line of JSON for each result.
//!
//! * `doctor`: driver, cards, libraries.
//! * `tests`: the checks that every implementation of the operations must pass, and the same bits twice.
//! * `smoke`: steps of training beside the CPU's, from the same weights.
//! * `speed [SHAPE]`: tokens per second and memory of a training step; `smollm2` or `llama8b`.
//!
//! With `--shim` the kernels run on the host, and `speed` takes a tiny shape: to try the program where no GPU is. With `--nothing` no
//! kernel runs at all, and `speed` is what the host needs to drive a card.
//! DRAFTSMITH_CUDA_LIBS and DRAFTSMITH_PYTHON say where libraries are, DRAFTSMITH_DEVICE the number of the card.
#![allow(clippy::print_stdout, reason = "an example reports on standard output")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use draftsmith_core::VocabMap;
use draftsmith_cuda::nothing::Nothing;
use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Card, Cuda, CudaOptions, Launcher, Operands, Report, Search, Started};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::testing::{self, infer};
use draftsmith_kernels::{Cpu, Memory, TrainKernels};
use draftsmith_model::eagle3::Eagle3Config;
use draftsmith_train::eagle3::{TargetSide, random_weights};
use draftsmith_train::{
    AdamW, AdamWOptions, DeviceStates, Eagle3Options, Eagle3Train, Method, Mode, Pack, Rng,
};
use serde_json::{Value, json};

/// A device that can be opened again.
trait Opener {
    type Device: Launcher;
    fn open(&self, operands: Operands) -> Cuda<Self::Device>;
    /// Bytes free on the device, where that means something.
    fn free(&self, device: &Cuda<Self::Device>) -> Option<u64>;
    /// Steps that are timed.
    const STEPS: usize = 6;
}

struct OnCard {
    search: Search,
    number: usize,
}

impl Opener for OnCard {
    type Device = Card;
    fn open(&self, operands: Operands) -> Cuda<Card> {
        match Card::open(&self.search, self.number) {
            Ok(card) => Cuda::new(card, CudaOptions { operands, ..CudaOptions::default() }),
            Err(error) => {
                println!(
                    "{}",
                    json!({ "stage": "open", "ok": false, "error": error.to_string(), "hint": error.hint() })
                );
                std::process::exit(2)
            }
        }
    }
    fn free(&self, device: &Cuda<Card>) -> Option<u64> {
        Launcher::memory(device.launcher()).ok().map(|(free, _)| free)
    }
}

struct OnHost(PathBuf);

impl Opener for OnHost {
    type Device = Shim;
    fn open(&self, operands: Operands) -> Cuda<Shim> {
        let shim = Shim::new(&self.0).unwrap_or_else(|error| panic!("{error}"));
        Cuda::new(shim, CudaOptions { operands, ..CudaOptions::default() })
    }
    fn free(&self, _: &Cuda<Shim>) -> Option<u64> {
        None
    }
}

/// No device: what the host does is all that is timed.
struct OnNothing;

impl Opener for OnNothing {
    type Device = Nothing;
    fn open(&self, operands: Operands) -> Cuda<Nothing> {
        Cuda::new(Nothing::default(), CudaOptions { operands, ..CudaOptions::default() })
    }
    fn free(&self, _: &Cuda<Nothing>) -> Option<u64> {
        None
    }
    const STEPS: usize = 60;
}

/// Sizes of a draft and of what it is trained on.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    vocab: usize,
    draft_vocab: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ttt_length: usize,
    slots: usize,
    /// Tokens of a document; the pack is filled with such.
    document: usize,
}

const TINY: Shape = Shape {
    name: "tiny",
    vocab: 96,
    draft_vocab: 48,
    hidden: 32,
    intermediate: 48,
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    ttt_length: 3,
    slots: 40,
    document: 17,
};
const SMOLLM2: Shape = Shape {
    name: "smollm2",
    vocab: 49_152,
    draft_vocab: 8_192,
    hidden: 576,
    intermediate: 1_536,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    ttt_length: 7,
    slots: 2_048,
    document: 2_048,
};
const LLAMA8B: Shape = Shape {
    name: "llama8b",
    vocab: 128_256,
    draft_vocab: 32_000,
    hidden: 4_096,
    intermediate: 14_336,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    ttt_length: 7,
    slots: 2_048,
    document: 2_048,
};

impl Shape {
    fn config(&self) -> Eagle3Config {
        let config = json!({
            "vocab_size": self.vocab, "draft_vocab_size": self.draft_vocab, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0
        });
        Eagle3Config::from_value(&config).expect("a valid configuration")
    }

    /// Small values of a table; faster than normal draws, whose shape a speed does not depend on.
    fn table(&self) -> Vec<f32> {
        testing::noise(3, self.vocab * self.hidden).into_iter().map(|x| x * 0.17).collect()
    }

    fn method<K: TrainKernels>(&self, kernels: K, table: &[f32]) -> Eagle3Train<K> {
        let step = self.vocab / self.draft_vocab;
        let ids: Vec<u32> = (0..self.draft_vocab as u32).map(|i| i * step as u32).collect();
        let map = VocabMap::from_target_ids(&ids, self.vocab).expect("a valid map");
        let options = Eagle3Options { ttt_length: self.ttt_length, ..Eagle3Options::default() };
        let config = self.config();
        let weights = random_weights(&config, 1);
        let target = TargetSide { embed: table, head: None };
        Eagle3Train::new(kernels, config, options, map, &target, &weights).expect("shapes fit")
    }

    /// Documents of which 60 % are trained, with final states close to rows of the draft's vocabulary.
    fn pack(&self, table: &[f32]) -> Pack {
        let (h, step) = (self.hidden, (self.vocab / self.draft_vocab) as u32);
        let mut rng = Rng::new(1, &[]);
        let (mut pack, mut number) = (Pack::default(), 0);
        while pack.len() < self.slots {
            let len = self.document.min(self.slots - pack.len());
            let ids: Vec<u32> = (0..len).map(|_| rng.below(self.draft_vocab as u64) as u32 * step).collect();
            let row = CaptureRow {
                loss_mask: (0..len).map(|t| t * 10 >= len * 4).collect(),
                features: testing::noise(7 + number, len * 3 * h),
                last: ids
                    .iter()
                    .flat_map(|i| &table[*i as usize * h..(*i as usize + 1) * h])
                    .copied()
                    .collect(),
                ids,
            };
            pack.push(number, &row, self.slots, 3 * h, h).expect("a row of the right shape");
            number += 1;
        }
        pack
    }
}

/// Runs a check that panics where something is wrong.
fn check(stage: &str, what: &str, f: impl FnOnce()) -> bool {
    let began = Instant::now();
    let failed = catch_unwind(AssertUnwindSafe(f)).err().map(|why| {
        let text = why.downcast_ref::<String>().cloned();
        text.or_else(|| why.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
    });
    let ms = began.elapsed().as_secs_f64() * 1e3;
    println!(
        "{}",
        json!({ "stage": stage, "what": what, "ok": failed.is_none(), "ms": ms, "error": failed })
    );
    failed.is_none()
}

/// What a bf16 of 8 significant bits loses in operands of products.
const BF16: f64 = 2e-2;
/// The same on the average of many products.
const BF16_MEAN: f64 = 5e-3;
/// What a product loses where a backend rounds its inputs for quantised weights.
const QUANTISED: f64 = 1e-2;

fn tests<O: Opener>(opener: &O) -> bool {
    let mut well = true;
    for (name, operands, rounding) in [("f32", Operands::F32, 0.0), ("bf16", Operands::Bf16, BF16)] {
        let k = &opener.open(operands);
        type Check<'a, K> = (&'a str, fn(&K, f64));
        let all: [Check<'_, Cuda<O::Device>>; 11] = [
            ("linear", testing::train::linear),
            ("norm", testing::train::norm),
            ("rotation", testing::train::rotation),
            ("gating", testing::train::gating),
            ("copies", |k, _| testing::train::copies(k)),
            ("attention", testing::train::attention),
            ("head widths", testing::train::head_widths),
            ("spans", testing::train::spans),
            ("loss", testing::train::loss),
            ("token loss", testing::train::token_loss),
            ("cells", testing::train::cells),
        ];
        for (what, f) in all {
            well &= check("tests", &format!("{what}, {name}"), || f(k, rounding));
        }
        let decoding: &[Check<'_, Cuda<O::Device>>] = match operands {
            Operands::F32 => &[
                ("products", |k, _| infer::matmuls(k, 0.0, QUANTISED)),
                ("biases", infer::biases),
                ("ties", |k, _| infer::ties(k)),
                ("rows of tables", infer::embedding),
                ("rows of decoding", infer::rowwise),
                ("gates of decoding", infer::gates),
                ("experts", |k, _| infer::experts(k, 0.0, QUANTISED)),
                ("columns", |k, _| infer::columns(k)),
                ("work that comes again", |k, _| infer::again(k)),
                ("attention over pages", infer::attention),
                ("blocks", infer::blocks),
                ("moved slots", infer::compaction),
                ("large numbers", |k, _| infer::beyond_f16(k)),
            ],
            Operands::Bf16 => &[
                ("products", |k, _| infer::matmuls(k, BF16_MEAN, QUANTISED)),
                ("biases", infer::biases),
                ("ties", |k, _| infer::ties(k)),
                ("rows of tables", infer::embedding),
            ],
        };
        for (what, f) in decoding {
            well &= check("tests", &format!("{what}, {name}"), || f(k, rounding));
        }
        let Started { launches, replayed, calls, recorded, .. } = k.started();
        println!(
            "{}",
            json!({ "stage": "tests", "what": format!("launches, {name}"), "launches": launches, "replayed": replayed,
                    "calls": calls, "graphs": recorded })
        );
        well &= check("tests", &format!("adamw, {name}"), || testing::train::adamw(k));
        well &= check("tests", &format!("the same bits twice, {name}"), || {
            let table = TINY.table();
            let grads = || {
                let mut method = TINY.method(k.clone(), &table);
                method.micro_batch(&TINY.pack(&table), Mode::Train).expect("a good pack");
                let ids = method.tape().trained();
                ids.iter().map(|id| method.tape().grad_values(*id).expect("a gradient")).collect::<Vec<_>>()
            };
            assert!(grads() == grads(), "two runs differ");
        });
    }
    well
}

/// Losses and gradient norms of some steps.
fn curve<K: TrainKernels>(kernels: K, shape: Shape, steps: usize) -> Vec<[f64; 2]> {
    let table = shape.table();
    let (mut method, pack) = (shape.method(kernels, &table), shape.pack(&table));
    let mut optimizer = AdamW::new(AdamWOptions::default(), method.tape());
    (0..steps)
        .map(|_| {
            let stats = method.micro_batch(&pack, Mode::Train).expect("a good pack");
            let norm = optimizer.step(method.tape_mut(), 1e-3, stats.weight).expect("finite");
            [stats.loss / stats.weight, norm]
        })
        .collect()
}

fn smoke<O: Opener>(opener: &O) -> bool {
    let steps = 10;
    let wanted = curve(Cpu::new(4), TINY, steps);
    let mut well = true;
    for (name, operands, tolerance) in [("f32", Operands::F32, 1e-3), ("bf16", Operands::Bf16, 5e-2)] {
        well &= check("smoke", &format!("ten steps beside the CPU's, {name}"), || {
            let found = curve(opener.open(operands), TINY, steps);
            println!("{}", json!({ "stage": "smoke", "operands": name, "device": found, "cpu": wanted }));
            for (found, wanted) in found.iter().flatten().zip(wanted.iter().flatten()) {
                assert!((found - wanted).abs() <= tolerance * (1.0 + wanted.abs()), "{found}, not {wanted}");
            }
        });
    }
    well
}

fn speed<O: Opener>(opener: &O, shape: Shape) {
    let k = opener.open(Operands::Bf16);
    let before = opener.free(&k);
    let table = shape.table();
    let (mut method, mut pack) = (shape.method(k.clone(), &table), shape.pack(&table));
    let mut optimizer = AdamW::new(AdamWOptions::default(), method.tape());
    // As a run has it: states of the next pack are on their way while a step computes.
    let mut courier = k.courier().expect("a card has one");
    let (features, states) = (std::mem::take(&mut pack.features), std::mem::take(&mut pack.last));
    let mut coming = courier.send(&[&features, &states]);
    let mut ms = Vec::new();
    let started = k.started();
    let mut last = Value::Null;
    for _ in 0..O::STEPS {
        // New numbers: the target's head is streamed, as for rows of a first epoch.
        pack.rows.iter_mut().for_each(|row| *row += 1_000_000);
        let began = Instant::now();
        let here = coming.take().expect("room for a pack ahead");
        pack.on_device = Some(DeviceStates::arrived::<Cuda<O::Device>>(here));
        std::thread::scope(|scope| {
            let (courier, parts) = (&mut courier, [&features[..], &states[..]]);
            let next = scope.spawn(move || courier.send(&parts));
            let stats = method.micro_batch(&pack, Mode::Train).expect("a good pack");
            // Reading the norm waits for everything before it.
            let norm = optimizer.step(method.tape_mut(), 1e-4, stats.weight).expect("finite");
            let mut one = [0.0];
            let kernels = method.tape().kernels();
            kernels.download(&kernels.zeros(1), 0, &mut one);
            ms.push(began.elapsed().as_secs_f64() * 1e3);
            last = json!({ "loss": stats.loss / stats.weight, "grad_norm": norm });
            coming = next.join().expect("a thread that ends");
        });
    }
    let used = before.zip(opener.free(&k)).map(|(before, after)| before.saturating_sub(after));
    let mut sorted = ms[1..].to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    let launches = (k.started().launches - started.launches) as f64 / O::STEPS as f64;
    println!(
        "{}",
        json!({
            "stage": "speed", "side": "draftsmith", "shape": shape.name, "slots": shape.slots, "ttt": shape.ttt_length,
            "ms": ms, "tokens_per_s": shape.slots as f64 / median * 1e3, "memory_bytes": used, "launches": launches,
            "last": last
        })
    );
}

fn doctor(libraries: Option<&str>, python: Option<&PathBuf>) {
    let report = Report::of(libraries, python.map(PathBuf::as_path));
    let driver = match &report.driver {
        Ok((version, cards)) => json!({ "cuda": version.to_string(), "cards": format!("{cards:?}") }),
        Err(error) => json!({ "error": error.to_string(), "hint": error.hint() }),
    };
    let libraries = report.libraries.iter().map(|(library, found)| match found {
        Ok(path) => json!({ "name": library.name(), "path": path.display().to_string() }),
        Err(error) => json!({ "name": library.name(), "error": error.to_string(), "hint": error.hint() }),
    });
    println!(
        "{}",
        json!({ "stage": "doctor", "driver": driver, "libraries": libraries.collect::<Vec<_>>() })
    );
}

fn run<O: Opener>(opener: &O, stage: &str, shapes: &[Shape]) -> bool {
    match stage {
        "tests" => tests(opener),
        "smoke" => smoke(opener),
        "speed" => {
            shapes.iter().for_each(|shape| speed(opener, *shape));
            true
        }
        other => {
            println!("{}", json!({ "ok": false, "error": format!("no stage `{other}`") }));
            false
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (flags, words): (Vec<&str>, Vec<&str>) =
        args.iter().map(String::as_str).partition(|a| a.starts_with("--"));
    let stage = words.first().copied().unwrap_or("tests");
    let libraries = std::env::var("DRAFTSMITH_CUDA_LIBS").ok();
    let python = PathBuf::from(std::env::var("DRAFTSMITH_PYTHON").unwrap_or_else(|_| "python3".to_owned()));
    if stage == "doctor" {
        doctor(libraries.as_deref(), Some(&python));
        return ExitCode::SUCCESS;
    }
    let well = if flags.contains(&"--shim") {
        run(&OnHost(std::env::temp_dir()), stage, &[TINY])
    } else {
        let shapes = match words.get(1) {
            Some(&"smollm2") => vec![SMOLLM2],
            Some(&"llama8b") => vec![LLAMA8B],
            _ => vec![SMOLLM2, LLAMA8B],
        };
        if flags.contains(&"--nothing") {
            return if run(&OnNothing, stage, &shapes) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        let number = std::env::var("DRAFTSMITH_DEVICE").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
        run(&OnCard { search: Search::new(libraries.as_deref(), Some(&python)), number }, stage, &shapes)
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
