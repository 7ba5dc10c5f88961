//! What passes of a target and steps of its draft cost on this machine, measured with made-up tokens: the cost of a
//! pass depends on their number alone, but for experts, of which tokens that are all different choose about as many as can be.
//!
//! What is measured is a [`Probe`], so that the plan of the measurement can be tested with made-up times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_kernels::Kernels;
use draftsmith_model::{StepItem, StepOutput, Target, TargetKv};

use crate::costs::{Calibration, Costs};
use crate::drafter::{Ask, BoxedSession, Committed, Drafter, Features, Node};

/// Rows that are measured on every machine, however slow: a curve with less says nothing about a proposal.
const NEEDED: [usize; 5] = [1, 2, 4, 8, 16];
/// Further sizes, as time allows; those that say most first.
const WANTED: [usize; 5] = [32, 3, 6, 12, 24];
/// Context behind the passes at most.
const CONTEXT: usize = 128;
/// Rows per pass that the context is read with.
const CONTEXT_CHUNK: usize = 32;
/// No further piece of context is read after this.
const CONTEXT_LIMIT: Duration = Duration::from_millis(300);
/// Rounds over the sizes: what disturbs the machine for a moment does not fall on one size alone.
const ROUNDS: usize = 2;
/// Timed passes of one size in a round.
const TIMED: usize = 3;
/// Untimed passes before them: after passes of another size it takes a few until the caches have settled, and decoding
/// goes on with alike passes.
const SETTLE: usize = 2;
/// The same for passes that only wait for memory, which settle more slowly.
const SETTLE_SMALL: usize = 12;
/// Rows up to which a pass counts as small.
const SMALL: usize = 4;
/// No further settling pass of a size is begun after this. One is always made in the first round: it also makes room
/// for the rows.
const SETTLE_LIMIT: f32 = 40.0;
/// No further timed pass is begun after this, but for one of each needed size and round.
const LIMIT: f32 = 900.0;
/// No settling beyond the first pass of a size and none of the wanted sizes is begun after this.
const WANTED_LIMIT: f32 = 600.0;
/// Draft steps that are timed at least and at most, and for how long.
const DRAFT_STEPS: (usize, usize) = (3, 15);
const DRAFT_LIMIT: f32 = 300.0;

/// Something whose passes can be timed, in milliseconds.
pub(crate) trait Probe {
    /// Rows of a pass at most.
    fn most_rows(&self) -> usize;
    /// A pass of so many rows.
    fn pass(&mut self, rows: usize) -> f32;
    /// What a draft takes; `None` without one.
    fn draft(&mut self) -> Option<DraftTimes>;
}

/// Rows, or sequences, of a draft's larger passes.
const SEVERAL: usize = 4;

/// One round of a draft's work.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DraftTimes {
    /// Positions that had waited before: the first number is then no step's.
    waited: usize,
    /// Features of a step taken in and first proposals; the same for [`SEVERAL`] sequences.
    extend: (f32, f32),
    /// One more step; the same of [`SEVERAL`] rows.
    step: (f32, f32),
}

/// The middle one; 0 of none.
fn median(times: &mut [f32]) -> f32 {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// Measures the needed sizes, and the others as time allows. `progress` hears how many sizes and rounds of them are
/// done, of how many.
pub(crate) fn calibrate(probe: &mut dyn Probe, progress: &mut dyn FnMut(usize, usize)) -> Calibration {
    let mut spent = 0.0;
    let mut times: Vec<(usize, Vec<f32>)> = Vec::new();
    let fits = |rows: &&usize| **rows <= probe.most_rows().max(1);
    let needed: Vec<usize> = NEEDED.iter().filter(fits).copied().collect();
    let wanted: Vec<usize> = WANTED.iter().filter(fits).copied().collect();
    // Twice the needed ones, there and back; in between the others, if there is time.
    let rounds = needed.iter().map(|rows| (0, true, *rows));
    let rounds = rounds.chain(wanted.iter().map(|rows| (0, false, *rows)));
    let rounds: Vec<(usize, bool, usize)> = rounds
        .chain((1..ROUNDS).flat_map(|n| needed.iter().rev().map(move |rows| (n, true, *rows))))
        .collect();
    let all = rounds.len() + 1;
    for (done, (round, is_needed, rows)) in rounds.into_iter().enumerate() {
        progress(done, all);
        if !is_needed && spent > WANTED_LIMIT {
            continue;
        }
        let mut settling = 0.0;
        let most = if rows <= SMALL { SETTLE_SMALL } else { SETTLE };
        for number in 0..most {
            // Caches that hold a model twenty times over have nothing to settle.
            if settling > SETTLE_LIMIT || (number > 0 || round > 0) && spent > WANTED_LIMIT {
                break;
            }
            settling += probe.pass(rows);
        }
        spent += settling;
        for number in 0..TIMED {
            if number > 0 && spent > LIMIT {
                break;
            }
            let ms = probe.pass(rows);
            spent += ms;
            match times.iter_mut().find(|(r, _)| *r == rows) {
                Some((_, own)) => own.push(ms),
                None => times.push((rows, vec![ms])),
            }
        }
    }
    progress(all - 1, all);
    let [mut extend, mut extends, mut step, mut steps] = [const { Vec::new() }; 4];
    let (mut drafting, mut read) = (0.0, None);
    while step.len() < DRAFT_STEPS.1 && (step.len() < DRAFT_STEPS.0 || drafting < DRAFT_LIMIT) {
        let Some(times) = probe.draft() else { break };
        match times.waited {
            0 => extend.push(times.extend.0),
            waited => read = Some((waited, times.extend.0)),
        }
        drafting += times.extend.0 + times.extend.1 + times.step.0 + times.step.1;
        extends.push(times.extend.1);
        step.push(times.step.0);
        steps.push(times.step.1);
    }
    progress(all, all);
    times.sort_unstable_by_key(|(rows, _)| *rows);
    let passes = times.iter().map(|(_, own)| own.len()).sum();
    let (mut verify_ms, mut spread) = (Vec::new(), Vec::new());
    for (rows, own) in &mut times {
        let middle = median(own);
        // Whatever disturbs a pass makes it longer, so the lower third is closer to what it takes.
        verify_ms.push((*rows, own[(own.len() - 1) / 3]));
        if own.len() > 1 && own[0] > 0.0 {
            spread.push(middle / own[0] - 1.0);
        }
    }
    let (draft_step_ms, extend_ms) = (median(&mut step), median(&mut extend));
    let further = |several: f32, one: f32| ((several - one) / (SEVERAL - 1) as f32).max(0.0);
    let costs = Costs {
        verify_ms,
        draft_step_ms,
        extend_ms,
        draft_row_ms: further(median(&mut steps), draft_step_ms),
        extend_row_ms: further(median(&mut extends), extend_ms),
        read_row_ms: read.map_or(0.0, |(waited, ms)| ((ms - extend_ms) / waited as f32).max(0.0)),
    };
    let spread = spread.iter().sum::<f32>() / spread.len().max(1) as f32;
    Calibration { costs: costs.sound(), spread, passes }
}

/// A target, and a session of its draft.
struct Machine<'a, K: Kernels> {
    target: &'a Target<K>,
    kv: TargetKv<K>,
    context: usize,
    layers: &'a [LayerId],
    draft: Option<(&'a dyn Drafter<K>, Vec<Drafted<K>>)>,
    /// Positions of the first that wait.
    waiting: usize,
    /// Of the last piece of context.
    features: StepOutput<K::Buf>,
    rows: usize,
}

/// A sequence of the draft's.
struct Drafted<K: Kernels> {
    session: BoxedSession<K>,
    /// What it is told that was committed, the token behind it included.
    text: Vec<u32>,
}

fn tokens<K: Kernels>(target: &Target<K>, from: usize, count: usize) -> Vec<u32> {
    let vocab = target.config().vocab_size;
    (from..from + count).map(|i| (i * 7919 % vocab) as u32).collect()
}

fn pass<K: Kernels>(
    target: &Target<K>,
    kv: &mut TargetKv<K>,
    rows: usize,
    layers: &[LayerId],
) -> StepOutput<K::Buf> {
    let tokens = tokens(target, kv.len(), rows);
    let parents = TokenTree::chain_parents(rows);
    let output = target.forward(&mut [StepItem { kv, tokens: &tokens, parents: &parents }], layers);
    target.argmax(&output, &(0..rows as u32).collect::<Vec<_>>());
    output
}

fn ms(time: Duration) -> f32 {
    time.as_secs_f32() * 1e3
}

impl<K: Kernels> Probe for Machine<'_, K> {
    fn most_rows(&self) -> usize {
        self.target.config().max_position.saturating_sub(self.context)
    }

    fn pass(&mut self, rows: usize) -> f32 {
        let start = Instant::now();
        pass(self.target, &mut self.kv, rows, self.layers);
        let time = ms(start.elapsed());
        self.kv.rollback_to(self.context);
        time
    }

    fn draft(&mut self) -> Option<DraftTimes> {
        let (drafter, all) = self.draft.as_mut()?;
        // About what one step commits.
        let rows: Vec<u32> = (0..self.rows.min(2) as u32).collect();
        let features = Features { output: &self.features, rows: &rows };
        let next = tokens(self.target, 1, rows.len());
        let mut times = DraftTimes { waited: std::mem::take(&mut self.waiting), ..DraftTimes::default() };
        for several in [false, true] {
            let all = if several { &mut all[..] } else { &mut all[..1] };
            for one in all.iter_mut() {
                let from = one.text.len();
                one.text.extend(tokens(self.target, from, rows.len()));
            }
            let start = Instant::now();
            let mut committed: Vec<Committed<'_, K>> = all
                .iter_mut()
                .map(|one| Committed { session: one.session.as_mut(), features, next_tokens: &next })
                .collect();
            drafter.take_in(&mut committed);
            drop(committed);
            let sampling = &Sampling::GREEDY;
            let mut asks: Vec<Ask<'_, K>> = all
                .iter_mut()
                .map(|Drafted { session, text }| {
                    let position = text.len() as u64 - 1;
                    Ask { session: session.as_mut(), sampling, text, position, k: 4, whole: false }
                })
                .collect();
            let best = drafter.roots(&mut asks);
            let extend = ms(start.elapsed());
            let count = if several { SEVERAL } else { 1 };
            // Where fewer are known others do: the time is the same.
            let token = |i: usize| best[0].get(i).map_or(i as u32, |b| b.0);
            let nodes: Vec<Node> =
                (0..count).map(|i| Node { of: 0, parent: None, token: token(i), depth: 0 }).collect();
            let start = Instant::now();
            drafter.expand(&mut asks[..1], &nodes);
            let step = ms(start.elapsed());
            match several {
                false => (times.extend.0, times.step.0) = (extend, step),
                true => (times.extend.1, times.step.1) = (extend, step),
            }
        }
        Some(times)
    }
}

/// Measures a target and its draft.
pub(crate) fn measure<K: Kernels>(
    target: &Target<K>,
    drafter: Option<&Arc<dyn Drafter<K>>>,
    progress: &mut dyn FnMut(usize, usize),
) -> Calibration {
    let context = CONTEXT.min(target.config().max_position / 4).max(1);
    let layers = drafter.map_or(&[][..], |d| d.target_layers());
    let mut kv = target.new_kv();
    let mut draft = drafter.map(|d| {
        // The further ones have no more than a few tokens: they are there for their rows.
        let of = |i: usize| Drafted { session: d.begin(), text: tokens(target, i, 9) };
        (d.as_ref(), (0..SEVERAL).map(of).collect::<Vec<_>>())
    });
    let began = Instant::now();
    let (features, rows) = loop {
        let rows = CONTEXT_CHUNK.min(context - kv.len());
        let output = pass(target, &mut kv, rows, layers);
        if let Some((drafter, drafted)) = &mut draft {
            let all: Vec<u32> = (0..rows as u32).collect();
            let next_tokens = &tokens(target, kv.len(), rows);
            let features = Features { output: &output, rows: &all };
            let session = drafted[0].session.as_mut();
            drafter.take_in(&mut [Committed { session, features, next_tokens }]);
        }
        if kv.len() == context || began.elapsed() > CONTEXT_LIMIT {
            break (output, rows);
        }
    };
    let context = kv.len();
    if let Some((_, all)) = &mut draft {
        all[0].text = tokens(target, 0, context + 1);
    }
    let machine = &mut Machine { target, kv, context, layers, draft, waiting: context, features, rows };
    calibrate(machine, progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes that take what a function of rows and of the time so far says.
    struct Fake<F> {
        time: F,
        most: usize,
        spent: f32,
        passes: Vec<usize>,
        drafted: usize,
    }

    impl<F: Fn(usize, f32) -> f32> Probe for Fake<F> {
        fn most_rows(&self) -> usize {
            self.most
        }
        fn pass(&mut self, rows: usize) -> f32 {
            let ms = (self.time)(rows, self.spent);
            self.spent += ms;
            self.passes.push(rows);
            ms
        }
        fn draft(&mut self) -> Option<DraftTimes> {
            self.drafted += 1;
            let (waited, first) = if self.drafted == 1 { (100, 51.5) } else { (0, 1.5) };
            Some(DraftTimes { waited, extend: (first, 2.1), step: (1.2, 1.5) })
        }
    }

    fn run<F: Fn(usize, f32) -> f32>(time: F) -> (Calibration, Fake<F>) {
        let mut fake = Fake { time, most: 1000, spent: 0.0, passes: Vec::new(), drafted: 0 };
        let mut last = (0, 0);
        let found = calibrate(&mut fake, &mut |done, all| last = (done, all));
        assert!(last.0 == last.1 && last.1 > 0);
        (found, fake)
    }

    /// Of a 1.5B target on two cores.
    fn large(rows: usize) -> f32 {
        let costs = Costs {
            verify_ms: vec![(1, 44.6), (4, 45.5), (8, 57.0), (16, 103.0), (32, 190.0)],
            ..Costs::default()
        };
        costs.verify(rows)
    }

    #[test]
    fn slow_passes_are_measured_at_every_needed_size() {
        for factor in [1.2, 3.0, 40.0] {
            let (found, fake) = run(|rows, _| factor * large(rows));
            let sizes: Vec<usize> = found.costs.verify_ms.iter().map(|(rows, _)| *rows).collect();
            for rows in NEEDED {
                assert!(sizes.contains(&rows), "{rows} of {sizes:?}");
                let (found, real) = (found.costs.verify(rows), factor * large(rows));
                assert!((found / real - 1.0).abs() < 0.02, "{rows} rows: {found} for {real}");
            }
            assert!((1..64).all(|rows| found.costs.verify(rows + 1) > found.costs.verify(rows)));
            // One pass to settle and one that is timed, then one more: three of each size at the slowest.
            let least: f32 = NEEDED.iter().map(|rows| 3.0 * factor * large(*rows)).sum();
            assert!(fake.spent < least.max(1800.0 * factor), "{} ms", fake.spent);
        }
    }

    #[test]
    fn fast_passes_settle_first_and_are_measured_at_all_sizes() {
        let (found, fake) = run(|rows, _| 0.1 * large(rows));
        assert_eq!(found.costs.verify_ms.len(), NEEDED.len() + WANTED.len());
        assert!(fake.spent < 1500.0, "{} ms", fake.spent);
        assert_eq!(fake.passes[..SETTLE_SMALL / 2], [1; SETTLE_SMALL / 2]);
        assert!(found.spread < 1e-3 && (found.costs.draft_step_ms, found.costs.extend_ms) == (1.2, 1.5));
        let Costs { draft_row_ms, extend_row_ms, read_row_ms, .. } = found.costs;
        for (found, wanted) in [(draft_row_ms, 0.1), (extend_row_ms, 0.2), (read_row_ms, 0.5)] {
            assert!((found - wanted).abs() < 1e-4, "{found} for {wanted}");
        }
    }

    #[test]
    fn a_disturbance_does_not_fall_on_one_size_alone() {
        // For half a second of the first passes everything takes three times as long.
        let (found, _) = run(|rows, spent| large(rows) * if spent < 500.0 { 3.0 } else { 1.0 });
        let ratio = found.costs.verify(1) / large(1);
        assert!((0.95..1.1).contains(&ratio), "{ratio}");
        assert!(found.spread > 0.2, "{}", found.spread);
        let growth = found.costs.verify(16) / found.costs.verify(1);
        assert!((growth / (large(16) / large(1)) - 1.0).abs() < 0.1, "{growth}");
    }

    #[test]
    fn a_short_context_is_measured_as_far_as_it_goes() {
        let mut fake =
            Fake { time: |rows, _| large(rows), most: 5, spent: 0.0, passes: Vec::new(), drafted: 0 };
        let found = calibrate(&mut fake, &mut |_, _| {});
        assert_eq!(found.costs.verify_ms.last().map(|p| p.0), Some(4));
        assert!(fake.passes.iter().all(|rows| *rows <= 5));
    }
}
