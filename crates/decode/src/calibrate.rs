//! What passes of a target and steps of its draft cost on this machine, measured with made-up tokens: the cost of a
//! pass depends on their number alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_kernels::Kernels;
use draftsmith_model::{StepItem, StepOutput, Target, TargetKv};

use crate::auto::Costs;
use crate::drafter::{Drafter, Features};

/// Rows of the measured passes.
const SIZES: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
/// Context behind them.
const CONTEXT: usize = 128;
/// Timed passes of one size in a row; the median counts.
const TIMED: usize = 5;
/// Untimed passes before them: after passes of another size it takes a few until the caches have settled, and decoding
/// goes on with alike passes.
const SETTLE: usize = 2;
/// The same for passes that only wait for memory, which settle more slowly.
const SETTLE_SMALL: usize = 16;
/// Rows up to which a pass counts as small.
const SMALL: usize = 4;
/// No further size is begun after this.
const LIMIT: Duration = Duration::from_millis(900);

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

/// The middle one; 0 of none.
fn median(times: &mut [f32]) -> f32 {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// Measures them; the first two sizes in any case, the rest as time allows.
pub(crate) fn measure<K: Kernels>(target: &Target<K>, drafter: Option<&Arc<dyn Drafter<K>>>) -> Costs {
    let context = CONTEXT.min(target.config().max_position / 4).max(1);
    let layers = drafter.map_or(&[][..], |d| d.target_layers());
    let mut kv = target.new_kv();
    let output = pass(target, &mut kv, context, layers);
    let began = Instant::now();
    let mut times: Vec<Vec<f32>> = vec![Vec::new(); SIZES.len()];
    for (i, rows) in SIZES.iter().enumerate() {
        if i > 1 && began.elapsed() > LIMIT || context + rows > target.config().max_position {
            continue;
        }
        let settle = if *rows <= SMALL { SETTLE_SMALL } else { SETTLE };
        for number in 0..settle + TIMED {
            let start = Instant::now();
            pass(target, &mut kv, *rows, layers);
            if number >= settle {
                times[i].push(ms(start.elapsed()));
            }
            kv.rollback_to(context);
            // A large model on a small machine: two timed passes have to do.
            if number > settle && began.elapsed() > LIMIT {
                break;
            }
        }
    }
    let mut verify_ms: Vec<(usize, f32)> = Vec::new();
    for (rows, times) in SIZES.iter().zip(&mut times) {
        if !times.is_empty() {
            // More rows never cost less; what says otherwise is noise.
            let floor = verify_ms.last().map_or(0.0, |(_, ms)| *ms);
            verify_ms.push((*rows, median(times).max(floor)));
        }
    }
    let (mut extend, mut step) = (Vec::new(), Vec::new());
    if let Some(drafter) = drafter {
        let mut session = Arc::clone(drafter).begin();
        let all: Vec<u32> = (0..context as u32).collect();
        session.extend(&Features { output: &output, rows: &all }, &tokens(target, 1, context));
        for _ in 0..3 * TIMED {
            // About what one step commits.
            let rows: Vec<u32> = (0..2.min(context as u32)).collect();
            let start = Instant::now();
            session.extend(&Features { output: &output, rows: &rows }, &tokens(target, 1, rows.len()));
            let best = session.children(None, 1, &Sampling::GREEDY, 0);
            extend.push(ms(start.elapsed()));
            let start = Instant::now();
            let handle = session.expand(None, best.first().map_or(0, |b| b.0), 0);
            session.children(Some(handle), 4, &Sampling::GREEDY, 1);
            step.push(ms(start.elapsed()));
        }
    }
    Costs { verify_ms, draft_step_ms: median(&mut step), extend_ms: median(&mut extend) }
}
