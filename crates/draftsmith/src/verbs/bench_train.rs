//! `draftsmith bench train`.

use std::path::PathBuf;
use std::time::Instant;

use draftsmith::bench::BoxError;
use draftsmith::bench::train::{StepShape, StepTime, Trainer, run_train, train_text};
use draftsmith::device::Host;
use draftsmith::engine::default_threads;
use draftsmith::kernels::train::Products;
use draftsmith::measure::{machine, peak_memory_bytes};
use draftsmith::peer::TorchPeer;
use draftsmith::report::{Report, Unit};
use draftsmith::train::{AdamW, AdamWOptions, MadeUpShape, Method, Mode, Pack, TrainError, made_up};
use draftsmith::{Error, cli};

use super::Session;
use super::bench::write_json;
use crate::failure::Failure;
use crate::printer;

/// Learning rate of every side; AdamW needs one, nothing is learnt here.
const LR: f64 = 1e-4;

/// Our trainer as a side: one row of made-up features, every slot trained.
struct Ours {
    products: Products,
    method: Box<dyn Method<Kernels = Host>>,
    optimizer: AdamW<Host>,
    pack: Pack,
}

impl Ours {
    fn new(shape: StepShape, kernels: Host, products: Products) -> Result<Ours, TrainError> {
        let shape = MadeUpShape {
            slots: shape.slots,
            hidden: shape.hidden,
            intermediate: shape.intermediate,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            vocab: shape.draft_vocab,
            eps: shape.eps,
            rope_theta: shape.rope_theta,
            unrolled_steps: shape.ttt_length,
        };
        let (method, pack) = made_up(kernels, shape)?;
        let optimizer = AdamW::new(AdamWOptions::default(), method.tape());
        Ok(Ours { products, method, optimizer, pack })
    }
}

impl Trainer for Ours {
    fn name(&self) -> String {
        let products = match self.products {
            Products::F32 => "",
            Products::Bf16 => ", bf16",
            Products::Bf16x3 => ", bf16x3",
        };
        format!("draftsmith {}{products}", env!("CARGO_PKG_VERSION"))
    }

    fn step(&mut self) -> Result<StepTime, BoxError> {
        let began = Instant::now();
        let stats = self.method.micro_batch(&self.pack, Mode::Train)?;
        self.optimizer.step(self.method.tape_mut(), LR, stats.weight)?;
        let time = began.elapsed();
        Ok(StepTime { time, loss: stats.loss / stats.weight, peak_bytes: peak_memory_bytes() })
    }
}

pub(crate) fn run(args: &cli::BenchTrain, session: &Session) -> Result<u8, Failure> {
    let shape =
        StepShape::smollm2_135m(args.slots as usize, args.draft_vocab as usize, args.ttt_length as usize);
    let threads = args.threads.map_or_else(default_threads, |t| t as usize);
    let python = args.peer_python.clone().unwrap_or_else(|| PathBuf::from("python3"));
    let (products, needs) = match args.products {
        cli::ProductsKind::F32 => (Products::F32, ""),
        cli::ProductsKind::Bf16 => (
            Products::Bf16,
            "`--products bf16` is for CPUs that multiply bf16 numbers (Intel AMX, AVX-512 BF16)",
        ),
        cli::ProductsKind::Bf16x3 => {
            (Products::Bf16x3, "`--products bf16x3` is for CPUs with tile registers (Intel AMX)")
        }
    };
    if !products.is_offered() {
        return Err(Error::input(
            format!("{needs}, and this one does not have them"),
            "leave it out: products are computed in f32",
        )
        .into());
    }
    let kernels = Host::new(threads).with_products(products);
    let machine = machine(&kernels);
    let mut peers = Vec::new();
    for peer in &args.peer {
        let compile = *peer == cli::TrainPeerKind::TorchCompiled;
        peers.push(TorchPeer::start(&python, shape, threads, compile, LR)?);
    }
    let mut ours = Ours::new(shape, kernels, products).map_err(Error::from)?;
    let mut sides: Vec<&mut dyn Trainer> = vec![&mut ours];
    sides.extend(peers.iter_mut().map(|p| p as &mut dyn Trainer));
    session.printer.begin("bench train", Some(u64::from(args.steps)), Unit::Steps);
    let report = run_train(&mut sides, args.steps as usize, (shape, machine, threads as u32), &mut |done| {
        session.printer.at(done as u64);
    });
    session.printer.end();
    if session.stop.requested() {
        return Err(Failure::interrupted("interrupted: nothing was written", None));
    }
    let report = report.map_err(Error::from)?;
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    if !args.json.as_deref().is_some_and(cli::is_stdout) {
        printer::out(&train_text(&report))?;
    }
    Ok(0)
}
