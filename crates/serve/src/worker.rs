//! The thread that owns the batch. Everything that touches the engine while serving happens here, between or in steps.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use draftsmith_core::{AcceptStats, TokenLogprobs};
use draftsmith_decode::{
    Batch, DecodeError, DraftPlan, Engine, FinishReason, Generation, Survived, TokenEvent,
};
use draftsmith_kernels::{DeviceFailure, Kernels};
use draftsmith_text::Tokenizer;
use serde_json::json;

use crate::Log;
use crate::board::Board;
use crate::metrics::{Metrics, observe_tokens};
use crate::queue::{End, Event, Job, Order, Outcome, Queue};
use crate::swap::{InUse, Loaded, Replacement, Verdict, Watch, judge};

/// With nothing to do the worker still looks around this often: requests in the queue may be abandoned.
const IDLE: Duration = Duration::from_millis(200);

/// A sequence in the batch.
struct Running {
    job: Job,
    /// From its arrival until it was taken in.
    queued: Duration,
    /// The draft it was admitted under.
    era: u64,
    /// When its last token came; before the first, when it arrived.
    last: Instant,
    tokens: usize,
    /// Log-probabilities of the prompt are still to be told.
    owes_prompt: bool,
    /// Of this step.
    fresh: Fresh,
}

#[derive(Default)]
struct Fresh {
    tokens: u64,
    /// Of these, those that a verify step committed.
    committed: u64,
}

impl Running {
    fn drafts(&self) -> bool {
        self.job.options.draft != DraftPlan::None
    }

    fn push(&mut self, tokenizer: &Tokenizer, event: &TokenEvent) -> ControlFlow<()> {
        self.fresh.tokens += 1;
        // The first token comes from the prefill, which verifies nothing.
        if self.tokens > 0 && self.drafts() {
            self.fresh.committed += 1;
        }
        self.tokens += 1;
        match self.job.speech.push(tokenizer, event) || self.job.is_abandoned() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn tell_prompt(&mut self, scores: Vec<TokenLogprobs>) {
        self.owes_prompt = false;
        // A reader that left is found by the next sweep.
        let _ = self.job.events.send((self.job.choice, Event::Prompt(scores)));
    }
}

/// What the worker shares with the rest of the server.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) board: Arc<Board>,
    pub(crate) log: Log,
}

/// How much runs side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Cache slots over all sequences.
    pub(crate) slots: usize,
    pub(crate) sequences: usize,
    /// Verify steps after which a new draft is judged.
    pub(crate) watch_steps: u64,
}

/// See the module.
pub(crate) struct Worker<K: Kernels> {
    shared: Shared,
    room: Room,
    batch: Batch<Arc<Engine<K>>, K>,
    in_use: InUse<K>,
    /// Drafts that [`Order::Replace`] tells of.
    replacements: Receiver<Replacement<K>>,
    running: HashMap<u64, Running>,
    reserved: usize,
    /// Counts the drafts that were in use.
    era: u64,
    /// Finished sequences of the draft in use, the latest `watch_steps` verify steps of them.
    recent: VecDeque<AcceptStats>,
    watch: Option<Watch<K>>,
}

impl<K: Kernels> Worker<K> {
    pub(crate) fn new(
        in_use: InUse<K>,
        replacements: Receiver<Replacement<K>>,
        room: Room,
        shared: Shared,
    ) -> Worker<K> {
        let batch = Batch::new(Arc::clone(&in_use.engine));
        Worker {
            shared,
            room,
            batch,
            in_use,
            replacements,
            running: HashMap::new(),
            reserved: 0,
            era: 0,
            recent: VecDeque::new(),
            watch: None,
        }
    }

    /// Works until it is told to stop.
    pub(crate) fn run(mut self) {
        loop {
            // A panic in a step is kept to its request there. This is for any other: whoever waits is told, and those who
            // come later are served.
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(_) => self.begin_anew(),
            }
        }
    }

    /// Orders, then a step if there is something to decode. Breaks when it is told to stop.
    fn turn(&mut self) -> ControlFlow<()> {
        while let Some(order) = self.shared.queue.next_order() {
            match order {
                // One was sent for each order.
                Order::Replace => {
                    if let Ok(replacement) = self.replacements.try_recv() {
                        self.replace(replacement);
                    }
                }
                Order::CutAll => self.cut_all(),
                Order::Stop => {
                    self.cut_all();
                    return ControlFlow::Break(());
                }
            }
        }
        self.sweep();
        self.admit();
        if self.running.is_empty() {
            self.shared.queue.wait(IDLE);
        } else {
            self.step();
        }
        ControlFlow::Continue(())
    }

    /// Fails everything under way and goes on with an empty batch.
    fn begin_anew(&mut self) {
        self.shared.metrics.panics.inc();
        self.batch = Batch::new(Arc::clone(&self.in_use.engine));
        self.reserved = 0;
        for (_, running) in self.running.drain() {
            self.shared.metrics.count_finished("error");
            running.job.refuse(Outcome::Failed("a fault between two steps".into()));
        }
        (self.shared.log)("a fault between two steps: the requests under way failed, others are served");
        self.show_load();
        // A fault that comes at every turn must not keep the machine busy.
        std::thread::sleep(IDLE);
    }

    /// Ends what is abandoned or overdue.
    fn sweep(&mut self) {
        let now = Instant::now();
        let gone = |job: &Job| job.is_abandoned() || job.deadline <= now;
        for job in self.shared.queue.remove(gone) {
            self.shared.metrics.count_finished("abort");
            job.refuse(Outcome::Timeout);
        }
        let gone: Vec<u64> = self.running.iter().filter(|(_, r)| gone(&r.job)).map(|(id, _)| *id).collect();
        for id in gone {
            self.cut(id, Outcome::Timeout);
        }
    }

    fn cut_all(&mut self) {
        for job in self.shared.queue.remove(|_| true) {
            job.refuse(Outcome::Drained);
        }
        let ids: Vec<u64> = self.running.keys().copied().collect();
        for id in ids {
            self.cut(id, Outcome::Drained);
        }
    }

    fn cut(&mut self, id: u64, outcome: Outcome) {
        if let Some(generation) = self.batch.cancel(id) {
            self.finish(id, generation, Some(outcome));
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.room.sequences {
            let Some(job) = self.shared.queue.take(self.room.slots - self.reserved) else { break };
            let batch = &mut self.batch;
            let begun = catch_unwind(AssertUnwindSafe(|| batch.admit(job.id, &job.prompt, &job.options)));
            if let Some(outcome) = match begun {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(Outcome::Refused(error.to_string())),
                Err(payload) => Some(Outcome::Failed(match payload.downcast::<DeviceFailure>() {
                    Ok(failure) => failure.message,
                    Err(_) => "it cannot be begun".into(),
                })),
            } {
                if matches!(outcome, Outcome::Failed(_)) {
                    self.shared.metrics.panics.inc();
                }
                self.shared.metrics.count_finished("error");
                job.refuse(outcome);
                continue;
            }
            let metrics = &self.shared.metrics;
            let queued = job.submitted.elapsed();
            metrics.queue_time.observe(queued.as_secs_f64());
            metrics.prompt_tokens.inc_by(job.prompt.len() as u64);
            metrics.request_prompt_tokens.observe(job.prompt.len() as f64);
            self.reserved += job.slots();
            let (id, last) = (job.id, job.submitted);
            let owes_prompt = job.options.prompt_logprobs.is_some();
            let running =
                Running { job, queued, era: self.era, last, tokens: 0, owes_prompt, fresh: Fresh::default() };
            self.running.insert(id, running);
        }
        self.make_room();
        self.show_load();
    }

    fn show_load(&self) {
        let metrics = &self.shared.metrics;
        metrics.running.set(self.running.len() as i64);
        metrics.waiting.set(self.shared.queue.waiting() as i64);
        metrics.cache_share.set(self.reserved as f64 / self.room.slots.max(1) as f64);
    }

    fn step(&mut self) {
        // What ends in this step may be kept in the place that it had.
        self.batch.engine().limit_prefix_cache(self.room.slots);
        let Worker { batch, running, shared, .. } = self;
        let Survived { mut finished, failed, panics } =
            batch.step_isolated(&mut |id, event| match running.get_mut(&id) {
                Some(running) => running.push(&shared.tokenizer, event),
                None => ControlFlow::Break(()),
            });
        for (id, running) in running.iter_mut().filter(|(_, running)| running.owes_prompt) {
            let ended = finished.iter_mut().find(|(done, _)| done == id);
            let scores = match ended {
                Some((_, generation)) => generation.prompt_logprobs.take(),
                None => batch.take_prompt_logprobs(*id),
            };
            if let Some(scores) = scores {
                running.tell_prompt(scores);
            }
        }
        if panics > 0 {
            self.shared.metrics.panics.inc_by(panics);
            let lost = failed.len();
            (self.shared.log)(&format!("a fault in a step: {lost} failed of {}", self.running.len()));
        }
        for (id, message) in failed {
            self.fail(id, message);
        }
        let now = Instant::now();
        let (mut sum, mut steps) = (Fresh::default(), 0);
        for running in self.running.values_mut() {
            let fresh = std::mem::take(&mut running.fresh);
            if fresh.tokens == 0 {
                continue;
            }
            let gap = now - running.last;
            running.last = now;
            if running.tokens == fresh.tokens as usize {
                self.shared.metrics.ttft.observe(gap.as_secs_f64());
            } else {
                observe_tokens(&self.shared.metrics.inter_token, gap, fresh.tokens as usize);
            }
            sum.tokens += fresh.tokens;
            sum.committed += fresh.committed;
            // One per sequence, also if its last token is a drafted one: then the answer was cut there.
            steps += u64::from(fresh.committed > 0);
            let delta = running.job.speech.take();
            if !delta.is_empty() {
                // A reader that left is found by the next sweep.
                let _ = running.job.events.send((running.job.choice, Event::Delta(delta)));
            }
        }
        self.shared.metrics.generated_tokens.inc_by(sum.tokens);
        self.shared.board.count(sum.tokens, steps, sum.committed);
        for (id, generation) in finished {
            self.finish(id, generation, None);
        }
        self.make_room();
    }

    /// Caches of finished sequences are kept in what those under way leave of the slots.
    fn make_room(&self) {
        self.batch.engine().limit_prefix_cache(self.room.slots - self.reserved);
    }

    /// Ends a request that made the engine panic.
    fn fail(&mut self, id: u64, message: String) {
        let Some(running) = self.running.remove(&id) else { return };
        self.reserved -= running.job.slots();
        self.shared.metrics.count_finished("error");
        running.job.refuse(Outcome::Failed(message));
        self.show_load();
    }

    /// Tells a request how its sequence ended. `cut`: by us, before its end.
    fn finish(&mut self, id: u64, generation: Generation, cut: Option<Outcome>) {
        let Some(running) = self.running.remove(&id) else { return };
        let (era, drafts) = (running.era, running.drafts());
        self.reserved -= running.job.slots();
        let job = running.job;
        let metrics = &self.shared.metrics;
        let outcome = match (cut, generation.finish_reason) {
            (Some(cut), _) => cut,
            (None, FinishReason::Length) => Outcome::Length,
            // What breaks off is a stop text, or a reader that left and reads no reason.
            (None, FinishReason::Stop | FinishReason::Cancelled) => Outcome::Stop,
        };
        metrics.count_finished(match (&outcome, job.is_abandoned()) {
            (Outcome::Stop, false) => "stop",
            (Outcome::Length, false) => "length",
            _ => "abort",
        });
        metrics.count_steps(&generation.stats);
        metrics.prefix_queries.inc_by(job.prompt.len() as u64);
        metrics.prefix_hits.inc_by(generation.cached_tokens as u64);
        metrics.request_time.observe(job.submitted.elapsed().as_secs_f64());
        metrics.request_generated_tokens.observe(running.tokens as f64);
        let stats = generation.stats.clone();
        let end = End {
            outcome,
            rest: job.speech.finish(),
            tokens: running.tokens,
            stats: generation.stats,
            queued: running.queued,
            prefill: generation.prefill,
            decode: generation.decode,
            cached: generation.cached_tokens,
        };
        let _ = job.events.send((job.choice, Event::End(end)));
        self.show_load();
        if era == self.era && drafts {
            self.learn(stats);
        }
    }

    /// Adds what the draft in use did, and judges it if it is on probation.
    fn learn(&mut self, stats: AcceptStats) {
        self.shared.board.add(&stats);
        if let Some(watch) = &mut self.watch {
            watch.since.add(&stats);
        }
        self.recent.push_back(stats);
        let mut steps: u64 = self.recent.iter().map(|s| s.verify_steps).sum();
        while let Some(first) = self.recent.front().map(|s| s.verify_steps)
            && steps - first >= self.room.watch_steps
        {
            steps -= first;
            self.recent.pop_front();
        }
        let watch_steps = self.room.watch_steps;
        if let Some(watch) = self.watch.take_if(|watch| watch.since.verify_steps >= watch_steps) {
            self.conclude(watch);
        }
    }

    fn recent_stats(&self) -> AcceptStats {
        let mut sum = AcceptStats::default();
        self.recent.iter().for_each(|stats| sum.add(stats));
        sum
    }

    /// Goes on with another engine and returns the one before.
    fn switch_to(&mut self, in_use: InUse<K>) -> Result<InUse<K>, DecodeError> {
        self.batch.replace_engine(Arc::clone(&in_use.engine))?;
        self.shared.board.set_draft(in_use.info.clone());
        self.era += 1;
        Ok(std::mem::replace(&mut self.in_use, in_use))
    }

    fn replace(&mut self, replacement: Replacement<K>) {
        let Loaded { info, engine } = replacement.loaded;
        // Measured here, where nothing else computes. A draft that panics there costs nobody an answer.
        let measure = || {
            engine.costs();
        };
        if catch_unwind(AssertUnwindSafe(measure)).is_err() {
            self.shared.metrics.panics.inc();
            // Who asked hears that the change broke off, as nobody says how it ended.
            return;
        }
        let name = info.name.clone();
        let switched = self.switch_to(InUse { engine: Arc::new(engine), info: Some(info) }).map(|old| {
            let (fallback, before) = match self.watch.take() {
                // Never proven: what is gone back to is still the one before.
                Some(watch) => (watch.fallback, watch.before),
                None => (old, self.recent_stats()),
            };
            self.recent.clear();
            self.watch = Some(Watch { fallback, before, since: AcceptStats::default() });
            self.note("switched", &name, "watched for a fall of the accept length");
        });
        // The one who asked may have left.
        let _ = replacement.done.send(switched);
    }

    /// Ends a probation.
    fn conclude(&mut self, watch: Watch<K>) {
        let name = self.in_use.info.as_ref().map_or_else(String::new, |draft| draft.name.clone());
        let length = |stats: &AcceptStats| match stats.accept_len() {
            Some(length) => format!("{length:.2}"),
            None => "unknown".to_string(),
        };
        let reason = format!("accept length {} after {} before", length(&watch.since), length(&watch.before));
        match judge(&watch.before, &watch.since) {
            Verdict::Keep => self.note("kept", &name, &reason),
            Verdict::GoBack => {
                self.switch_to(watch.fallback).expect("both decode the target that is being served");
                self.recent = VecDeque::from([watch.before]);
                self.note("rolled_back", &name, &reason);
            }
        }
    }

    fn note(&self, outcome: &str, draft: &str, reason: &str) {
        self.shared.metrics.count_swap(outcome);
        self.shared.board.set_swap(json!({"outcome": outcome, "draft": draft, "reason": reason}));
        (self.shared.log)(&format!("draft `{draft}`: {} ({reason})", outcome.replace('_', " ")));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use draftsmith_core::Sampling;
    use draftsmith_decode::{GenerateOptions, Grammar, GrammarState};
    use draftsmith_kernels::Cpu;
    use draftsmith_model::{Precision, Target};
    use draftsmith_text::SpecialIds;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::speech::{Speech, SpeechOptions};

    /// Lets everything through, until a fault.
    #[derive(Debug)]
    struct Fuse {
        tokens: u32,
        at_the_begin: bool,
    }

    impl Grammar for Fuse {
        fn begin(&self) -> Box<dyn GrammarState> {
            assert!(!self.at_the_begin, "a fault at the begin");
            Box::new(FuseState(AtomicU32::new(self.tokens)))
        }
    }

    struct FuseState(AtomicU32);

    impl GrammarState for FuseState {
        fn mask(&mut self, _: &mut [f32]) {
            assert!(self.0.load(Ordering::Relaxed) > 0, "a fault in the middle");
        }
        fn advance(&mut self, _: u32) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
        fn fork(&self) -> Box<dyn GrammarState> {
            Box::new(FuseState(AtomicU32::new(self.0.load(Ordering::Relaxed))))
        }
    }

    type Answers = UnboundedReceiver<(usize, Event)>;

    fn job(id: u64, tokenizer: &Tokenizer, grammar: Option<Fuse>) -> (Job, Answers) {
        let (events, answers) = unbounded_channel();
        let now = Instant::now();
        let options = GenerateOptions {
            max_new_tokens: 20,
            sampling: Sampling { temperature: 0.7, seed: id, ..Sampling::GREEDY },
            grammar: grammar.map(|fuse| Arc::new(fuse) as _),
            ..GenerateOptions::default()
        };
        let job = Job {
            id,
            choice: 0,
            client: Arc::from(id.to_string()),
            prompt: Arc::from([1, 87, 85, 289, 201, 74]),
            options,
            speech: Speech::new(tokenizer, SpeechOptions::default()),
            events,
            submitted: now,
            deadline: now + Duration::from_secs(60),
        };
        (job, answers)
    }

    /// Text and outcome of an answer.
    fn answer(mut answers: Answers) -> (String, Outcome) {
        let mut text = String::new();
        loop {
            match answers.try_recv().expect("an answer has an end").1 {
                Event::Prompt(_) => panic!("nobody asked for that"),
                Event::Delta(delta) => text.push_str(&delta.text),
                Event::End(end) => return (text + &end.rest.text, end.outcome),
            }
        }
    }

    #[test]
    fn a_request_with_a_fault_fails_alone_and_is_counted() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
        let target = Target::load(Arc::new(Cpu::new(2)), &fixture, Precision::Stored).unwrap();
        let engine = Arc::new(Engine::new(Arc::new(target), None));
        let json = std::fs::read(fixture.join("tokenizer.json")).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_json(&json, SpecialIds::default()).unwrap());
        let serve = |faults: [Option<Fuse>; 4]| {
            let queue = Arc::new(Queue::new(8));
            let metrics = Arc::new(Metrics::new("m"));
            let shared = Shared {
                tokenizer: Arc::clone(&tokenizer),
                queue: Arc::clone(&queue),
                metrics: Arc::clone(&metrics),
                board: Arc::new(Board::new(None)),
                log: Arc::new(|_| {}),
            };
            let room = Room { slots: 1000, sequences: 4, watch_steps: 10 };
            let in_use = InUse { engine: Arc::clone(&engine), info: None };
            let (_, replacements) = std::sync::mpsc::channel();
            let mut worker = Worker::new(in_use, replacements, room, shared);
            let mut readers = Vec::new();
            for (id, fault) in (0..).zip(faults) {
                let (job, reader) = job(id, &tokenizer, fault);
                queue.submit(vec![job]).unwrap();
                readers.push(reader);
            }
            assert_eq!(worker.turn(), ControlFlow::Continue(()));
            while !worker.running.is_empty() {
                assert_eq!(worker.turn(), ControlFlow::Continue(()));
            }
            assert_eq!((worker.reserved, metrics.running.get()), (0, 0));
            let answers: Vec<(String, Outcome)> = readers.into_iter().map(answer).collect();
            (answers, metrics)
        };
        let fuse = |tokens, at_the_begin| Some(Fuse { tokens, at_the_begin });
        let (wanted, metrics) = serve([None, fuse(99, false), None, None]);
        assert!(wanted.iter().all(|(_, outcome)| *outcome == Outcome::Length));
        assert_eq!(metrics.panics.get(), 0);
        for (fault, said) in [
            (fuse(0, false), "a fault in the middle"),
            (fuse(7, false), "a fault in the middle"),
            (fuse(7, true), "it cannot be begun"),
        ] {
            let (found, metrics) = serve([None, fault, None, None]);
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                match i {
                    1 => assert_eq!(found.1, Outcome::Failed(said.to_string())),
                    _ => assert_eq!(found, wanted, "beside {said}"),
                }
            }
            assert!(metrics.panics.get() > 0);
            let page = metrics.page(0.0);
            assert!(page.contains("finished_reason=\"error\"} 1"), "{page}");
            assert!(page.contains("draftsmith:panics_total"), "{page}");
        }
    }

    #[test]
    fn a_fault_between_steps_fails_what_is_under_way_and_the_next_request_is_answered() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
        let target = Target::load(Arc::new(Cpu::new(1)), &fixture, Precision::Stored).unwrap();
        let engine = Arc::new(Engine::new(Arc::new(target), None));
        let json = std::fs::read(fixture.join("tokenizer.json")).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_json(&json, SpecialIds::default()).unwrap());
        let queue = Arc::new(Queue::new(8));
        let shared = Shared {
            tokenizer: Arc::clone(&tokenizer),
            queue: Arc::clone(&queue),
            metrics: Arc::new(Metrics::new("m")),
            board: Arc::new(Board::new(None)),
            log: Arc::new(|_| {}),
        };
        let room = Room { slots: 1000, sequences: 4, watch_steps: 10 };
        let (_, replacements) = std::sync::mpsc::channel();
        let mut worker = Worker::new(InUse { engine, info: None }, replacements, room, shared);
        let (first, reader) = job(0, &tokenizer, None);
        queue.submit(vec![first]).unwrap();
        assert_eq!(worker.turn(), ControlFlow::Continue(()));
        worker.begin_anew();
        assert!(matches!(answer(reader), (_, Outcome::Failed(_))));
        let (second, reader) = job(1, &tokenizer, None);
        queue.submit(vec![second]).unwrap();
        while worker.turn().is_continue() && (!worker.running.is_empty() || queue.waiting() > 0) {}
        assert_eq!(answer(reader).1, Outcome::Length);
    }
}
