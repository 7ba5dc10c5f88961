//! The trainer loop: packs in, optimiser steps, logs, checkpoints, validation. It knows no method.

use std::path::{Path, PathBuf};
use std::time::Instant;

use draftsmith_formats::run::{RunFile, Schedule};
use draftsmith_kernels::TrainKernels;
use draftsmith_model::tape::{Grads, Tape};
use serde::Serialize;
use serde_json::json;

use crate::ahead::Ahead;
use crate::average::Candidates;
use crate::checkpoint::{self, Best, TrainState, ValidationResult};
use crate::device_sums::{join_slices, sum_slice};
use crate::replay::{Replay, ReplayOptions, ReplayReport, replays};
use crate::{
    AdamW, AdamWOptions, BatchStats, Collective, DraftWeights, JsonLog, LrSchedule, Method, Mode, Order,
    Pack, PackShape, RowStore, Slices, SumTree, TensorBoard, TrainError, Visit,
};

/// Settings of the loop.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Run folder of the stage: `checkpoints/`, `candidates/`, `best/`, `last/`, `log.jsonl`, `tensorboard/` go here.
    pub dir: PathBuf,
    /// Hash of everything in the run file that changes the result.
    pub run_hash: String,
    /// Highest learning rate.
    pub lr: f64,
    /// Share of the steps in which it rises.
    pub warmup_ratio: f64,
    /// What it does then.
    pub schedule: LrSchedule,
    /// Optimiser.
    pub adamw: AdamWOptions,
    /// Passes over the data.
    pub epochs: u64,
    /// Stop, and end the schedule, after this many optimiser steps.
    pub max_steps: Option<u64>,
    /// Slots per optimiser step, over all its packs.
    pub tokens_per_step: usize,
    /// Slots per pack.
    pub pack_slots: usize,
    /// Steps between log lines.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Steps between validations; the last step is always validated. `None`: only the last.
    pub validate_every: Option<u64>,
    /// Best validated drafts whose means are measured after the last step; below 2 none.
    pub average_best: usize,
    /// Seed of the data order.
    pub seed: u64,
    /// Learning from rejections; `None`: off.
    pub replay: Option<ReplayOptions>,
    /// Ranks share the moments of the optimiser. Changes memory and never a bit; nothing for one process.
    pub shard_optimizer: bool,
}

impl TrainOptions {
    /// The settings of a run file. `run_hash` is its hash over everything that changes the result of training.
    pub fn from_run(run: &RunFile, dir: PathBuf, run_hash: String) -> TrainOptions {
        let t = &run.train;
        TrainOptions {
            dir,
            run_hash,
            lr: t.lr,
            warmup_ratio: t.warmup_ratio,
            schedule: match t.schedule {
                Schedule::Cosine => LrSchedule::Cosine,
                Schedule::Constant => LrSchedule::Constant,
            },
            adamw: AdamWOptions {
                beta1: t.beta1,
                beta2: t.beta2,
                weight_decay: t.weight_decay,
                max_grad_norm: t.max_grad_norm,
                ..AdamWOptions::default()
            },
            epochs: u64::from(t.epochs),
            max_steps: t.max_steps,
            tokens_per_step: t.tokens_per_step as usize,
            pack_slots: t.pack_length as usize,
            log_every: t.log_every,
            checkpoint_every: t.checkpoint_every,
            keep_checkpoints: t.keep_checkpoints as usize,
            validate_every: (run.validate.every > 0).then_some(run.validate.every),
            average_best: run.validate.average_best as usize,
            seed: t.seed.unwrap_or(run.run.seed),
            replay: ReplayOptions::from_table(&t.replay),
            shard_optimizer: t.shard_optimizer,
        }
    }
}

/// Measures a draft after `step` optimiser steps by real speculative decoding.
pub type Validator<'a> =
    dyn FnMut(&DraftWeights, u64) -> Result<ValidationResult, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// What one optimiser step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Mean loss of the step; `None` if none of its slots is trained.
    pub loss: Option<f64>,
    /// Learning rate used.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Per depth: share of loss-mask slots where the draft's first choice is the target's; `None` without slots.
    pub acc: Vec<Option<f64>>,
    /// Per depth: mean expected acceptance over trained slots.
    pub alpha: Vec<Option<f64>>,
    /// Accept length that the training metrics come to; `None` for methods that do not say. Not a measured one.
    pub sim_accept_len: Option<f64>,
    /// Slots of this step.
    pub slots: u64,
    /// Slots trained on so far, all passes counted.
    pub total_slots: u64,
    /// Slots per second of this process, over all its steps.
    pub tokens_per_s: f64,
    /// Seconds until the last step at that speed.
    pub eta_s: f64,
    /// What the replay did, if it is on.
    pub replay: Option<ReplayReport>,
    /// What several processes did for it, where there are several.
    pub ranks: Option<RanksReport>,
}

/// What happens while training.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Before the first step of this process.
    Started {
        /// Steps of the whole run.
        total_steps: u64,
        /// Steps that an earlier process did.
        done_steps: u64,
        /// Micro-batches per optimiser step.
        packs_per_step: usize,
    },
    /// An optimiser step.
    Step(Box<StepReport>),
    /// A checkpoint was written.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// A draft was measured.
    Validated {
        /// Steps done.
        step: u64,
        /// Drafts that the measured one is the mean of; 0 for the draft as it was trained.
        mean_of: usize,
        /// What was measured.
        result: ValidationResult,
        /// Whether it is the best so far.
        is_best: bool,
    },
}

/// What the caller wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Write a checkpoint and return.
    Stop,
}

/// What the caller hands in.
pub struct Hooks<'a> {
    /// Called for every event; may stop the run.
    pub on_event: &'a mut dyn FnMut(&Event) -> Flow,
    /// Measures drafts; without it the last draft is the result.
    pub validate: Option<&'a mut Validator<'a>>,
    /// The processes that train together. Rank 0 alone writes, and what its `on_event` answers counts for all.
    pub collective: &'a dyn Collective,
}

impl Hooks<'_> {
    /// Tells an event. What rank 0 wants next is what all do.
    fn tell(&mut self, event: &Event) -> Flow {
        let flow = (self.on_event)(event);
        match self.collective.broadcast(vec![u8::from(flow == Flow::Stop)]).as_slice() {
            [0] => Flow::Continue,
            _ => Flow::Stop,
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// State after the last step.
    pub state: TrainState,
    /// All steps were done.
    pub finished: bool,
    /// Folder of the draft to use: `best/` if drafts were measured, else `last/`. `None` if stopped early.
    pub draft: Option<PathBuf>,
}

/// Walks through the packs of all epochs.
struct Packs<'a> {
    order: Order,
    store: &'a mut dyn RowStore,
    options: &'a TrainOptions,
    /// Packs of the current epoch.
    current: (u64, Vec<Vec<usize>>),
}

/// Which pack comes next: epoch, and number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    epoch: u64,
    pack: u64,
}

impl Packs<'_> {
    /// The numbers of the rows of an epoch's packs.
    fn of_epoch(&mut self, epoch: u64) -> &[Vec<usize>] {
        if self.current.0 != epoch {
            self.current = (epoch, self.order.epoch(epoch));
        }
        &self.current.1
    }

    /// The place behind a place; `None` of a place behind the last epoch.
    fn behind(&mut self, place: Place) -> Option<Place> {
        if place.epoch >= self.options.epochs {
            return None;
        }
        let Place { epoch, pack } = place;
        Some(match pack + 1 < self.of_epoch(epoch).len() as u64 {
            true => Place { epoch, pack: pack + 1 },
            false => Place { epoch: epoch + 1, pack: 0 },
        })
    }

    /// The places of the step that begins at a place, and the one behind them.
    fn of_step(&mut self, mut place: Place, packs_per_step: usize) -> (Vec<Place>, Place) {
        let mut places = Vec::new();
        for _ in 0..packs_per_step {
            let Some(next) = self.behind(place) else { break };
            places.push(place);
            place = next;
        }
        (places, place)
    }

    /// Tells a store that looks ahead which packs a rank reads from a place on, in their order, to the end of the next epoch or
    /// of so many steps.
    fn tell(&mut self, mut place: Place, packs_per_step: usize, mut steps: u64, collective: &dyn Collective) {
        if !self.store.looks_ahead() {
            return;
        }
        let (rank, ranks) = (collective.rank(), collective.ranks());
        let last = place.epoch + 1;
        let mut packs = Vec::new();
        while steps > 0 && place.epoch <= last {
            let (places, next) = self.of_step(place, packs_per_step);
            if places.is_empty() {
                break;
            }
            let tree = SumTree::new(places.len(), ranks);
            for piece in tree.pieces_of(rank) {
                for visit in tree.visits(piece) {
                    if let Visit::MicroBatch(number) = visit {
                        let Place { epoch, pack } = places[number];
                        packs.push(self.of_epoch(epoch)[pack as usize].clone());
                    }
                }
            }
            (place, steps) = (next, steps - 1);
        }
        self.store.expect(&packs);
    }

    /// Reads the pack at a place.
    fn read(
        &mut self,
        place: Place,
        (feature_width, last_width): (usize, usize),
    ) -> Result<Pack, TrainError> {
        let numbers = self.of_epoch(place.epoch)[place.pack as usize].clone();
        let shape = PackShape { row_slots: self.options.pack_slots, feature_width, last_width };
        let mut out = Pack { pass: place.epoch, ..Pack::default() };
        self.store.fill(&numbers, shape, &mut out)?;
        Ok(out)
    }
}

/// What the ranks did for the sums of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RanksReport {
    /// How many there are.
    pub ranks: usize,
    /// Bytes of gradients that rank 0 sent in this step; and of parameters, where ranks share the optimiser.
    pub sent_bytes: u64,
    /// Seconds that rank 0 spent in this step for that.
    pub sum_s: f64,
    /// Seconds that it waited for the others to be ready for that.
    pub wait_s: f64,
}

/// The micro-batches of one step, shared by rank.
struct Step<'a> {
    places: &'a [Place],
    widths: (usize, usize),
    collective: &'a dyn Collective,
    /// How parameters are cut, where ranks share the optimiser: then each gets the sums of its own slices alone.
    slices: Option<Slices>,
    /// Packs are wanted after the step.
    keep: bool,
}

/// Sums over a step's micro-batches, this process's packs by number where they are wanted, and what several processes did.
type Ran = (BatchStats, Vec<(usize, Pack)>, Option<RanksReport>);

impl Step<'_> {
    /// Leaves the gradients of all micro-batches in the tape, with nothing of use outside this rank's slices where there are some.
    /// Returns the sums over all of them, and this process's packs by number where they are wanted.
    fn run<M: Method + ?Sized>(&self, method: &mut M, packs: &mut Packs<'_>) -> Result<Ran, TrainError> {
        let (rank, ranks) = (self.collective.rank(), self.collective.ranks());
        let tree = SumTree::new(self.places.len(), ranks);
        let (mut found, mut seen) = (Vec::new(), Vec::new());
        // Sums of this process's pieces but the last, which stays where gradients are added up.
        let (mut done, mut held) = (Vec::new(), Vec::new());
        for (i, piece) in tree.pieces_of(rank).enumerate() {
            if i > 0 {
                done.push(method.tape_mut().take_grads());
            }
            for visit in tree.visits(piece) {
                match visit {
                    Visit::MicroBatch(number) => {
                        let pack = packs.read(self.places[number], self.widths)?;
                        found.push((number, method.micro_batch(&pack, Mode::Train)?));
                        if self.keep {
                            seen.push((number, pack));
                        }
                    }
                    Visit::Hold => held.push(method.tape_mut().take_grads()),
                    Visit::Add => {
                        let even = held.pop().expect("a sum is added that was put aside");
                        method.tape_mut().add_grads(even);
                    }
                }
            }
        }
        let began = Instant::now();
        if ranks > 1 {
            found = self.share(&found);
        }
        let wait_s = began.elapsed().as_secs_f64();
        found.sort_by_key(|(number, _)| *number);
        let mut stats = BatchStats::default();
        found.iter().for_each(|(_, more)| stats.add(more));
        seen.sort_by_key(|(number, _)| *number);
        if ranks == 1 {
            return Ok((stats, seen, None));
        }
        let (began, before) = (Instant::now(), self.collective.sent_bytes());
        let tape = method.tape_mut();
        match tape.kernels().peers().is_some() {
            true => self.sum_on_devices(tape, &tree, &mut done),
            false => self.sum_on_hosts(tape, &tree, &done),
        }
        done.into_iter().for_each(|grads| tape.drop_grads(grads));
        let sent_bytes = self.collective.sent_bytes() - before;
        let report = RanksReport { ranks, sent_bytes, sum_s: began.elapsed().as_secs_f64(), wait_s };
        Ok((stats, seen, Some(report)))
    }

    /// Sums the gradients over all processes; `done` are those of this one's pieces but the last.
    fn sum_on_hosts<K: TrainKernels>(&self, tape: &mut Tape<K>, tree: &SumTree, done: &[Grads<K::Buf>]) {
        let rank = self.collective.rank();
        let has_piece = tree.pieces_of(rank).next().is_some();
        for (place, id) in tape.trained().into_iter().enumerate() {
            let mut mine: Vec<Vec<f32>> = done.iter().map(|grads| tape.taken_values(grads, place)).collect();
            if has_piece {
                mine.push(tape.grad_values(id).expect("trained parameters have gradients"));
            }
            let len = tape.param(id).numel();
            let sum = match &self.slices {
                None => self.collective.sum(tree, mine, len),
                Some(slices) => {
                    let slices = slices.of(place, len);
                    let mut sum = vec![0.0; len];
                    sum[slices[rank].clone()]
                        .copy_from_slice(&self.collective.sum_slice(tree, mine, &slices));
                    sum
                }
            };
            tape.set_grad(id, &sum);
        }
    }

    /// The same between devices, with the same bits: nothing of a gradient comes to the host.
    fn sum_on_devices<K: TrainKernels>(
        &self,
        tape: &mut Tape<K>,
        tree: &SumTree,
        done: &mut [Grads<K::Buf>],
    ) {
        let (collective, rank) = (self.collective, self.collective.rank());
        let cut = self.slices.unwrap_or_else(|| Slices::of_lines(collective));
        for (place, id) in tape.trained().into_iter().enumerate() {
            let slices = cut.of(place, tape.param(id).numel());
            let (kernels, mut bufs) = tape.grad_bufs_mut(place, done);
            let peers = kernels.peers().expect("asked before");
            let to_all = self.slices.is_none();
            let sent = sum_slice((kernels, peers), tree, &mut bufs, &slices, rank);
            collective.count_sent(sent);
            if let Some(sum) = bufs.pop().filter(|_| to_all) {
                collective.count_sent(join_slices(peers, sum, &slices, rank));
            }
        }
    }

    /// The sums of all micro-batches, of those of all processes.
    fn share(&self, mine: &[(usize, BatchStats)]) -> Vec<(usize, BatchStats)> {
        let mut bytes = Vec::new();
        for (number, stats) in mine {
            let stats = stats.to_bytes();
            bytes.extend([*number as u64, stats.len() as u64].into_iter().flat_map(u64::to_le_bytes));
            bytes.extend(stats);
        }
        let mut all = Vec::new();
        for said in self.collective.gather(bytes) {
            let mut rest = said.as_slice();
            while let Some((number, tail)) = rest.split_first_chunk() {
                let (len, tail) = tail.split_first_chunk().expect("a length stands behind a number");
                let (stats, tail) = tail.split_at(u64::from_le_bytes(*len) as usize);
                all.push((u64::from_le_bytes(*number) as usize, BatchStats::from_bytes(stats)));
                rest = tail;
            }
        }
        all
    }
}

fn ratio(n: f64, d: u64) -> Option<f64> {
    (d > 0).then(|| n / d as f64)
}

/// All processes begin at the same step of the same number of steps.
///
/// # Errors
/// They see other checkpoints or other rows.
fn same_beginning(
    state: &TrainState,
    total_steps: u64,
    collective: &dyn Collective,
) -> Result<(), TrainError> {
    let mine = format!("step {} of {total_steps}", state.step);
    let all = collective.gather(mine.into_bytes());
    let other = all.iter().position(|said| *said != all[0]);
    let words = |said: &[u8]| String::from_utf8_lossy(said).into_owned();
    other.map_or(Ok(()), |rank| {
        Err(TrainError::Beginning { rank, found: words(&all[rank]), wanted: words(&all[0]) })
    })
}

/// Trains until the last step, resuming from the newest checkpoint of the folder.
///
/// # Errors
/// See [`TrainError`]. After an error the newest checkpoint is still good.
pub fn train<M: Method + ?Sized>(
    method: &mut M,
    store: &mut dyn RowStore,
    options: &TrainOptions,
    hooks: Hooks<'_>,
) -> Result<Outcome, TrainError> {
    if M::Kernels::HOST_IS_FREE
        && let Some(store) = store.beside()
    {
        return std::thread::scope(|scope| {
            let mut store = Ahead::new(scope, store, method.tape().kernels());
            train_on(method, &mut store, options, hooks)
        });
    }
    train_on(method, store, options, hooks)
}

/// [`train`], with rows that are read where they are asked for.
fn train_on<M: Method + ?Sized>(
    method: &mut M,
    store: &mut dyn RowStore,
    options: &TrainOptions,
    mut hooks: Hooks<'_>,
) -> Result<Outcome, TrainError> {
    let order = Order::new(store, options.pack_slots, options.seed);
    let packs_per_step =
        ((options.tokens_per_step + options.pack_slots / 2) / options.pack_slots.max(1)).max(1);
    let available = order.total_packs(options.epochs).div_ceil(packs_per_step as u64);
    let total_steps = available.min(options.max_steps.unwrap_or(u64::MAX));
    if total_steps == 0 {
        return Err(TrainError::NoData);
    }
    let checkpoints = options.dir.join("checkpoints");
    let candidates = Candidates::new(&options.dir, options.average_best);
    let collective = hooks.collective;
    let mut optimizer = match options.shard_optimizer && collective.ranks() > 1 {
        true => AdamW::sharded(options.adamw, method.tape(), Slices::among::<M::Kernels>(collective)),
        false => AdamW::new(options.adamw, method.tape()),
    };
    let start = TrainState::start(method.name(), &options.run_hash, options.seed);
    let mut replay = options.replay.map(|replay| Replay::new(replay, options.seed, options.pack_slots));
    if replay.is_some() {
        replays(method)?;
    }
    let resumed =
        checkpoint::resume(&checkpoints, method, &mut optimizer, replay.as_mut(), &start, collective)?;
    let mut state = resumed.unwrap_or(start);
    same_beginning(&state, total_steps, collective)?;
    let mut logs = match collective.is_first() {
        true => Some(Logs::open(&options.dir, state.step)?),
        false => None,
    };
    let widths = (method.feature_width(), method.last_width());
    let mut packs = Packs { order, store, options, current: (u64::MAX, Vec::new()) };
    let (began, done_before, slots_before) = (Instant::now(), state.step, state.slots);
    let mut flow = hooks.tell(&Event::Started { total_steps, done_steps: state.step, packs_per_step });
    let mut saved_at = state.step;
    let mut has_trained = state.step > 0;
    let mut told = None;
    while state.step < total_steps && flow == Flow::Continue {
        let epoch = state.epoch;
        let keep = replay.as_ref().is_some_and(|replay| replay.is_due(state.step + 1));
        let begin = Place { epoch, pack: state.pack };
        if told != Some(epoch) {
            packs.tell(begin, packs_per_step, total_steps - state.step, collective);
            told = Some(epoch);
        }
        let (places, place) = packs.of_step(begin, packs_per_step);
        let step = Step { places: &places, widths, collective, slices: optimizer.slices().copied(), keep };
        let (stats, seen, mut ranks) = step.run(method, &mut packs)?;
        (state.epoch, state.pack) = (place.epoch, place.pack);
        let lr = options.schedule.lr(options.lr, options.warmup_ratio, total_steps, state.step);
        // A step without a single trained slot has no gradient; it still counts, so that the schedule is kept.
        let divisor = if stats.weight > 0.0 { stats.weight } else { 1.0 };
        let more = match &mut replay {
            Some(replay) => replay.train(method, &mut *packs.store, (state.step, epoch), &stats)?,
            None => 1.0,
        };
        let before = collective.sent_bytes();
        let (grad_norm, joining_s) =
            optimizer.step_among(method.tape_mut(), (lr, divisor * more), collective)?;
        if let Some(ranks) = &mut ranks {
            ranks.sent_bytes += collective.sent_bytes() - before;
            ranks.sum_s += joining_s;
        }
        state.step += 1;
        if let Some(replay) = &mut replay {
            replay.look(method, &seen, state.step, collective)?;
        }
        state.slots += stats.slots;
        has_trained |= stats.depths.iter().any(|depth| depth.trained > 0);
        let loss = (stats.weight > 0.0).then(|| stats.loss / divisor);
        if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            return Err(TrainError::Diverged { step: state.step, loss, grad_norm });
        }
        let elapsed = began.elapsed().as_secs_f64().max(1e-9);
        let (new_steps, left) = (state.step - done_before, total_steps - state.step);
        let report = StepReport {
            step: state.step,
            total_steps,
            epoch,
            loss,
            lr,
            grad_norm,
            acc: stats.depths.iter().map(|d| ratio(d.correct as f64, d.slots)).collect(),
            alpha: stats.depths.iter().map(|d| ratio(d.alpha, d.trained)).collect(),
            sim_accept_len: ratio(stats.sim_accepted, stats.blocks),
            slots: stats.slots,
            total_slots: state.slots,
            tokens_per_s: (state.slots - slots_before) as f64 / elapsed,
            eta_s: elapsed / new_steps as f64 * left as f64,
            replay: replay.as_ref().map(Replay::report),
            ranks,
        };
        if let Some(logs) = &mut logs
            && (state.step.is_multiple_of(options.log_every.max(1)) || left == 0)
        {
            logs.write(&report)?;
        }
        flow = hooks.tell(&Event::Step(Box::new(report)));
        let due = options.validate_every.is_some_and(|n| state.step.is_multiple_of(n.max(1))) || left == 0;
        if due && hooks.validate.is_some() && flow == Flow::Continue {
            let mut validation =
                Validation { options, candidates: &candidates, hooks: &mut hooks, logs: logs.as_mut() };
            flow = validation.trained(method, &mut state)?;
            if left == 0 && flow == Flow::Continue {
                flow = validation.means(method, &mut state)?;
            }
        }
        if left == 0 || flow == Flow::Stop || state.step.is_multiple_of(options.checkpoint_every.max(1)) {
            let path = checkpoints.join(checkpoint::folder_name(state.step));
            let saved = (&state, replay.as_ref());
            let by = (&optimizer, collective);
            checkpoint::save(&checkpoints, method, by, saved, options.keep_checkpoints)?;
            if collective.is_first() {
                candidates.prune(&state.candidates)?;
            }
            saved_at = state.step;
            if hooks.tell(&Event::Checkpoint { step: state.step, path }) == Flow::Stop {
                flow = Flow::Stop;
            }
        }
    }
    if state.step < total_steps {
        if saved_at != state.step {
            let (saved, by) = ((&state, replay.as_ref()), (&optimizer, collective));
            checkpoint::save(&checkpoints, method, by, saved, options.keep_checkpoints)?;
        }
        return Ok(Outcome { state, finished: false, draft: None });
    }
    // Rows may have lost their trained tokens where they were cut to a pack: a draft that learnt nothing is no result.
    if !has_trained {
        return Err(TrainError::NoData);
    }
    let last = options.dir.join("last");
    if collective.is_first() {
        method.draft()?.save(&last)?;
    }
    let draft = if state.best.is_some() { options.dir.join("best") } else { last };
    Ok(Outcome { state, finished: true, draft: Some(draft) })
}

/// Measures drafts and keeps the best.
struct Validation<'a, 'h> {
    options: &'a TrainOptions,
    candidates: &'a Candidates,
    hooks: &'a mut Hooks<'h>,
    /// Those of rank 0.
    logs: Option<&'a mut Logs>,
}

impl Validation<'_, '_> {
    /// The draft as it is now.
    fn trained<M: Method + ?Sized>(
        &mut self,
        method: &M,
        state: &mut TrainState,
    ) -> Result<Flow, TrainError> {
        // What is measured is what is saved: weights rounded to bfloat16.
        let draft = method.draft()?.rounded();
        let (found, flow) = self.measure(&draft, state, Vec::new())?;
        if let Some(logs) = &mut self.logs {
            logs.board.scalars(state.step, &[("validation/accept_len", found.result.accept_len)])?;
        }
        let write = self.hooks.collective.is_first();
        self.candidates.offer(&mut state.candidates, &found, write.then_some(&draft))?;
        Ok(flow)
    }

    /// The means of the best drafts so far.
    fn means<M: Method + ?Sized>(&mut self, method: &M, state: &mut TrainState) -> Result<Flow, TrainError> {
        // They are read from what rank 0 wrote.
        self.hooks.collective.barrier();
        for count in 2..=state.candidates.len() {
            let of = &state.candidates[..count];
            let steps = of.iter().map(|b| b.step).collect();
            let draft = self.candidates.mean(of, method.draft()?)?;
            if self.measure(&draft, state, steps)?.1 == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }

    /// Measures a draft; it becomes the best if it is.
    fn measure(
        &mut self,
        draft: &DraftWeights,
        state: &mut TrainState,
        mean_of: Vec<u64>,
    ) -> Result<(Best, Flow), TrainError> {
        let step = state.step;
        let measure = self.hooks.validate.as_mut().expect("asked for only with a measure");
        let result = measure(draft, step).map_err(|source| TrainError::Validation { source })?;
        let is_best = state.best.as_ref().is_none_or(|b| result.accept_len > b.result.accept_len);
        let found = Best { step, result: result.clone(), mean_of };
        if is_best {
            state.best = Some(found.clone());
        }
        if let Some(logs) = &mut self.logs {
            if is_best {
                draft.save(&self.options.dir.join("best"))?;
            }
            logs.log.write(&json!({
                "event": "validation",
                "step": step,
                "mean_of": found.mean_of,
                "accept_len": result.accept_len,
                "low": result.low,
                "high": result.high,
                "verify_steps": result.verify_steps,
                "committed_tokens": result.committed_tokens,
                "best": is_best,
            }))?;
        }
        let event = Event::Validated { step, mean_of: found.mean_of.len(), result, is_best };
        Ok((found, self.hooks.tell(&event)))
    }
}

/// What is written beside the checkpoints.
struct Logs {
    log: JsonLog,
    board: TensorBoard,
}

impl Logs {
    /// Those of a run that goes on after `step` steps.
    fn open(dir: &Path, step: u64) -> Result<Logs, TrainError> {
        draftsmith_formats::atomic::create_dir_all(dir)?;
        let log = JsonLog::open(&dir.join("log.jsonl"), step)?;
        Ok(Logs { log, board: TensorBoard::create(&dir.join("tensorboard"), step)? })
    }

    fn write(&mut self, r: &StepReport) -> Result<(), TrainError> {
        let mut line = json!({
            "event": "step",
            "step": r.step,
            "total_steps": r.total_steps,
            "epoch": r.epoch,
            "loss": r.loss,
            "lr": r.lr,
            "grad_norm": r.grad_norm,
            "acc": r.acc,
            "alpha": r.alpha,
            "slots": r.slots,
            "total_slots": r.total_slots,
            "tokens_per_s": r.tokens_per_s,
        });
        if let Some(length) = r.sim_accept_len {
            line["sim_accept_len"] = json!(length);
        }
        if let Some(ranks) = &r.ranks {
            line["ranks"] = json!(ranks);
        }
        if let Some(replay) = &r.replay {
            line["replay"] = json!(replay);
        }
        self.log.write(&line)?;
        let loss = r.loss.map(|loss| ("train/loss".to_owned(), loss));
        let others = [
            ("train/lr".to_owned(), r.lr),
            ("train/grad_norm".to_owned(), r.grad_norm),
            ("train/tokens_per_s".to_owned(), r.tokens_per_s),
        ];
        let sim = r.sim_accept_len.map(|length| ("train/sim_accept_len".to_owned(), length));
        let names: Vec<(String, f64)> = loss
            .into_iter()
            .chain(sim)
            .chain(others)
            .chain(r.acc.iter().enumerate().filter_map(|(k, a)| Some((format!("train/acc_{k}"), (*a)?))))
            .chain(r.alpha.iter().enumerate().filter_map(|(k, a)| Some((format!("train/alpha_{k}"), (*a)?))))
            .collect();
        let values: Vec<(&str, f64)> = names.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        self.board.scalars(r.step, &values)
    }
}
