//! How much to draft, decided by cost.
//!
//! A draft token is worth verifying while (probability that it is accepted) x (time that an accepted token saves)
//! exceeds what one more row of the target's pass costs; growing the draft one node further must pay its own step as
//! well. Costs are measured on this machine ([`Costs`]), probabilities are the sources' own, corrected by how often
//! such proposals were accepted before ([`Rates`]). All sequences of a pass are planned together ([`grow`]): a row
//! costs what it adds to the rows that are there, whoever they belong to.
//!
//! Gains and prices are kept as shares of a plain step, so that they hold while the load of the machine changes.
//!
//! The choice changes time, never the text.

use std::time::Instant;

use draftsmith_core::{Sampling, TargetTokenId, TokenTree};
use draftsmith_kernels::Kernels;

use crate::costs::{Costs, Recent};
use crate::drafter::{Ask, Children, Drafter, DrafterSession, MOST_NODES, Node};
use crate::lookup::Match;

/// What made a node be proposed, as a class whose acceptance is counted.
type Class = u8;

/// Classes of the draft's probability in one level.
const BY_PROBABILITY: usize = 12;
/// Levels that are told apart: deeper ones rest on the draft's own features.
const BY_DEPTH: usize = 3;
/// Classes of the draft's nodes.
const DRAFT_CLASSES: usize = BY_PROBABILITY * BY_DEPTH;
/// Classes of a repetition: four lengths, its first token or a later one.
const LOOKUP_CLASSES: usize = 8;
/// Trials that the prior counts for.
const PRIOR_TRIALS: f32 = 4.0;
/// Trials after which older ones fade.
const MEMORY: f32 = 256.0;

fn draft_class(probability: f32, depth: usize) -> Class {
    let by_probability = ((probability * BY_PROBABILITY as f32) as usize).min(BY_PROBABILITY - 1);
    (depth.min(BY_DEPTH - 1) * BY_PROBABILITY + by_probability) as Class
}

fn lookup_class(length: usize, first: bool) -> Class {
    let by_length = match length {
        0..=2 => 0,
        3 => 1,
        4..=7 => 2,
        _ => 3,
    };
    (DRAFT_CLASSES + 2 * by_length + usize::from(!first)) as Class
}

/// What was learnt about proposals and their price; goes from one sequence to the next.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    /// How often proposals of each class were accepted, given that their parent was: hits and trials.
    counts: [(f32, f32); DRAFT_CLASSES + LOOKUP_CLASSES],
    /// Chance that the best child of a node is accepted, over all nodes that were expanded.
    child: (f32, f32),
    /// Milliseconds of a plain step of one sequence beside its pass.
    beside: Recent,
    /// Average time of a step, in plain steps, and average tokens that it committed.
    pace: (f32, f32),
    /// Average gain of a step by what its proposal promised, in plain steps; negative: drafting costs more than it
    /// brings. Promises vary far less than what becomes of each.
    promised: f32,
    /// The same by what became of them, over a longer time.
    kept: f32,
    /// Steps until the draft is tried again.
    paused: usize,
    next_pause: usize,
    /// Steps since a plain one was seen; `None` before the first.
    looked: Option<usize>,
}

impl Default for Rates {
    fn default() -> Rates {
        let mut counts = [(0.0, PRIOR_TRIALS); DRAFT_CLASSES + LOOKUP_CLASSES];
        for (i, (hits, trials)) in counts.iter_mut().enumerate() {
            // A draft is believed at first; a repetition more the longer it is.
            let prior = if i < DRAFT_CLASSES {
                ((i % BY_PROBABILITY) as f32 + 0.5) / BY_PROBABILITY as f32
            } else {
                [0.2, 0.5, 0.3, 0.6, 0.5, 0.8, 0.7, 0.9][i - DRAFT_CLASSES]
            };
            *hits = prior * *trials;
        }
        Rates {
            counts,
            child: (0.5 * PRIOR_TRIALS, PRIOR_TRIALS),
            beside: Recent::default(),
            pace: (1.0, 1.0),
            promised: 0.0,
            kept: 0.0,
            paused: FIRST_LOOK,
            next_pause: PAUSE,
            looked: None,
        }
    }
}

impl Rates {
    fn rate(&self, class: Class) -> f32 {
        let (hits, trials) = self.counts[class as usize];
        hits / trials
    }

    fn count((hits, trials): &mut (f32, f32), accepted: bool) {
        *hits += f32::from(u8::from(accepted));
        *trials += 1.0;
        if *trials > MEMORY {
            *hits *= 0.5;
            *trials *= 0.5;
        }
    }

    /// Learns from a verified proposal.
    fn learn(&mut self, grown: &Grown, accepted: &[u32]) {
        let is_accepted = |node: Option<u32>| node.is_none_or(|n| accepted.contains(&n));
        for (i, classes) in grown.classes.iter().enumerate() {
            // A node below a rejected one says nothing.
            if is_accepted(grown.tree.parents[i]) {
                for class in classes.iter().flatten() {
                    Rates::count(&mut self.counts[*class as usize], accepted.contains(&(i as u32)));
                }
            }
        }
        for node in &grown.expanded {
            if is_accepted(*node) {
                let hit = accepted.iter().any(|a| grown.tree.parents[*a as usize] == *node);
                // Expanded, but no child was worth a row: unknown.
                if grown.tree.parents.contains(node) {
                    Rates::count(&mut self.child, hit);
                }
            }
        }
    }
}

/// A proposal and what it was made from.
#[derive(Default)]
pub(crate) struct Grown {
    pub tree: TokenTree,
    /// Per node the classes of the sources that proposed it.
    classes: Vec<[Option<Class>; 2]>,
    /// Nodes (`None`: the root) whose children the draft was asked for.
    expanded: Vec<Option<u32>>,
    /// Draft steps taken beside the features of the committed tokens, a pass over several rows shared among them.
    pub draft_steps: f32,
    /// Milliseconds of such a step alone, as the last one shows, and of the draft's first proposals.
    pub draft_step_ms: Option<f32>,
    pub root_ms: Option<f32>,
    /// Share in the pass of those.
    root_share: f32,
    /// Tokens that are likely to be accepted.
    expected: f32,
    /// What its rows add to the time of the pass.
    rows_ms: f32,
    /// The pass that it is verified in.
    load: Load,
}

/// Rows of a pass before anything automatic is proposed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    /// All of them: one per sequence that decodes, the trees of fixed plans, pieces of prompts.
    pub rows: usize,
    /// Sequences that decode.
    pub sequences: usize,
}

impl Load {
    /// One sequence and nothing else.
    pub(crate) fn is_alone(&self) -> bool {
        self.rows == 1
    }
}

/// Times of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepTime {
    /// From the end of the sequence's step before to the end of this one.
    pub elapsed_ms: f32,
    /// The target's pass alone.
    pub pass_ms: f32,
}

/// Children of a node that are considered.
const CHILDREN: usize = 4;
/// Steps over which gain and pace are averaged.
const WINDOW: f32 = 24.0;
/// Steps over which it is averaged what became of the promises.
const LONG_WINDOW: f32 = 96.0;
/// Plain steps at the very start, to know what a token costs without a draft.
const FIRST_LOOK: usize = 4;
/// Steps with a draft after which the next sequence begins with a plain one: it shows what the others are worth.
const LOOK_EVERY: usize = 128;
/// First pause of an unprofitable draft, in steps; doubles each time up to [`LONGEST_PAUSE`].
const PAUSE: usize = 48;
const LONGEST_PAUSE: usize = 1024;
/// Average gain below which the draft is left out: half a window of steps that promise to lose 4 % each,
const LOSS: f32 = -0.02;
/// and what became of the promises: more than chance makes of a draft that neither gains nor loses.
const LONG_LOSS: f32 = -0.08;
/// What is left of a pause goes on in the next sequence up to this: another text may suit the draft better.
const CARRIED_PAUSE: usize = 48;

/// The running decision of one sequence.
#[derive(Debug)]
pub(crate) struct Pacer {
    rates: Rates,
}

/// A node that may be proposed.
struct Candidate {
    token: u32,
    parent: Option<usize>,
    /// Name inside the drafter, once the draft ran on it.
    handle: Option<u32>,
    /// The draft proposed it (or knows its parent), so it can be expanded.
    drafted: bool,
    depth: usize,
    /// Probability that the path up to here is accepted.
    path: f32,
    classes: [Option<Class>; 2],
    /// Place in the text of the repetition that goes on with this token, and its length.
    repeats: Option<Match>,
    /// Its children, once they are known.
    children: Option<Vec<usize>>,
}

/// A sequence that wants a proposal.
pub(crate) struct Seed<'a, K: Kernels> {
    pub pacer: &'a mut Pacer,
    pub session: Option<&'a mut dyn DrafterSession<K>>,
    pub repetition: Option<Match>,
    pub text: &'a [u32],
    /// Levels at most.
    pub room: usize,
    pub sampling: &'a Sampling,
}

/// A proposal under way.
struct Growing<'a, K: Kernels> {
    seed: Seed<'a, K>,
    /// Milliseconds that an accepted token saves.
    price: f32,
    candidates: Vec<Candidate>,
    /// Candidates of the first level.
    roots: Vec<usize>,
    grown: Grown,
}

/// What a further row costs of a draft pass, as a share of what the first one costs.
const DRAFT_ROW: f32 = 0.2;

/// A draft pass of so many rows, in passes of one.
fn draft_pass(rows: usize) -> f32 {
    1.0 + DRAFT_ROW * (rows.max(1) - 1) as f32
}

/// Proposals for the sequences of a pass that decode with an automatic plan. `drafter` is that of all sessions.
///
/// The plan is made anew with what each pass of the draft shows: nodes are chosen best first among those that are
/// known, over all sequences; the children of chosen ones, where asking for them pays, are asked for in one pass.
pub(crate) fn grow<K: Kernels>(
    costs: &Costs,
    load: Load,
    drafter: Option<&dyn Drafter<K>>,
    seeds: Vec<Seed<'_, K>>,
) -> Vec<Grown> {
    let mut growing: Vec<Growing<'_, K>> =
        seeds.into_iter().map(|seed| Growing::begin(seed, costs, load)).collect();
    if let Some(drafter) = drafter {
        ask_for_roots(drafter, &mut growing);
    }
    for one in &mut growing {
        one.repeat(one.seed.repetition, None, 0, 1.0);
    }
    loop {
        let chosen = choose(costs, load, &mut growing, drafter.map_or(1, |d| d.levels_per_pass()));
        match drafter {
            Some(drafter) if !chosen.wanted.is_empty() => expand(drafter, costs, &mut growing, chosen.wanted),
            _ => return end(costs, load, growing, &chosen.order[..chosen.best]),
        }
    }
}

/// What is proposed if no more becomes known.
struct Chosen {
    /// Sequence and candidate of each node, in the order of adding.
    order: Vec<(usize, usize)>,
    /// So many of them are worth their rows.
    best: usize,
    /// Nodes whose children are worth asking for, with what that is worth.
    wanted: Vec<(usize, usize, f32)>,
}

fn choose<K: Kernels>(
    costs: &Costs,
    load: Load,
    growing: &mut [Growing<'_, K>],
    levels_per_pass: usize,
) -> Chosen {
    let mut open: Vec<Vec<usize>> = growing.iter().map(|one| one.roots.clone()).collect();
    let mut nodes = vec![0usize; growing.len()];
    let mut chosen = Chosen { order: Vec::new(), best: 0, wanted: Vec::new() };
    let (mut value, mut best_value) = (0.0f32, 0.0f32);
    loop {
        let rows = load.rows + chosen.order.len();
        let mut next: Option<(usize, usize, f32)> = None;
        for (of, one) in growing.iter().enumerate().filter(|(of, _)| nodes[*of] < MOST_NODES) {
            if let Some((at, worth)) = one.best(&open[of])
                && next.is_none_or(|(_, _, most)| worth > most)
            {
                next = Some((of, at, worth));
            }
        }
        let Some((of, at, worth)) = next else { break };
        // Nothing that comes later is worth more.
        let cheapest = costs.cheapest_row(rows);
        if worth <= cheapest {
            break;
        }
        value += worth - (costs.verify(rows + 1) - costs.verify(rows));
        chosen.order.push((of, at));
        nodes[of] += 1;
        if value > best_value {
            (best_value, chosen.best) = (value, chosen.order.len());
        }
        open[of].retain(|other| *other != at);
        let one = &mut growing[of];
        if one.candidates[at].children.is_none() {
            let c = &one.candidates[at];
            if c.depth + 1 < one.seed.room {
                let rates = &one.seed.pacer.rates;
                let gain = c.path * rates.child.0 / rates.child.1 * one.price - cheapest;
                // The first level came of a pass of its own.
                let is_free = !(c.depth + 1).is_multiple_of(levels_per_pass);
                if one.seed.session.is_some() && c.drafted && (is_free || gain > 0.0) {
                    chosen.wanted.push((of, at, if is_free { f32::INFINITY } else { gain }));
                    continue;
                }
            }
            one.go_on(at, None);
        }
        open[of].extend(one.candidates[at].children.iter().flatten());
    }
    chosen
}

/// First levels of all sequences whose draft is awake.
fn ask_for_roots<K: Kernels>(drafter: &dyn Drafter<K>, growing: &mut [Growing<'_, K>]) {
    let start = Instant::now();
    let mut asking: Vec<usize> = Vec::new();
    let mut asks: Vec<Ask<'_, K>> = Vec::new();
    for (of, one) in growing.iter_mut().enumerate().filter(|(_, one)| one.seed.room > 0) {
        if let Some(ask) = one.ask() {
            asking.push(of);
            asks.push(ask);
        }
    }
    if asks.is_empty() {
        return;
    }
    let found = drafter.roots(&mut asks);
    drop(asks);
    let (count, ms) = (asking.len(), ms_since(start));
    for (of, children) in asking.into_iter().zip(found) {
        let one = &mut growing[of];
        one.grown.root_ms = Some(ms / draft_pass(count));
        one.grown.root_share = draft_pass(count) / count as f32;
        if !children.is_empty() {
            one.grown.expanded.push(None);
        }
        one.offer(&children, None, 0, 1.0);
    }
}

/// Asks for the children of those nodes that are worth a share of a pass; the others go on without.
fn expand<K: Kernels>(
    drafter: &dyn Drafter<K>,
    costs: &Costs,
    growing: &mut [Growing<'_, K>],
    mut wanted: Vec<(usize, usize, f32)>,
) {
    wanted.sort_by(|a, b| b.2.total_cmp(&a.2));
    let free = wanted.partition_point(|(.., gain)| gain.is_infinite());
    let row = DRAFT_ROW * costs.draft_step_ms;
    let mut paid = wanted[free..].iter().take_while(|(.., gain)| *gain > row).count();
    let gains: f32 = wanted[free..free + paid].iter().map(|(.., gain)| gain).sum();
    if gains <= costs.draft_step_ms * draft_pass(paid) {
        paid = 0;
    }
    for (of, at, _) in wanted.drain(free + paid..) {
        growing[of].go_on(at, None);
    }
    if wanted.is_empty() {
        return;
    }
    let start = Instant::now();
    let mut asking: Vec<Option<usize>> = vec![None; growing.len()];
    for (of, ..) in &wanted {
        asking[*of] = Some(0);
    }
    for (of_ask, asking) in asking.iter_mut().flatten().enumerate() {
        *asking = of_ask;
    }
    let nodes: Vec<Node> = wanted
        .iter()
        .map(|(of, at, _)| {
            let candidates = &growing[*of].candidates;
            let Candidate { token, parent, depth, .. } = candidates[*at];
            let parent = parent.and_then(|p| candidates[p].handle);
            Node { of: asking[*of].expect("it asks"), parent, token, depth }
        })
        .collect();
    let mut asks: Vec<Ask<'_, K>> = growing
        .iter_mut()
        .zip(&asking)
        .filter(|(_, asking)| asking.is_some())
        .map(|(one, _)| one.ask().expect("only drafted nodes are expanded"))
        .collect();
    let found = drafter.expand(&mut asks, &nodes);
    drop(asks);
    let ms = ms_since(start) / draft_pass(paid);
    for ((of, at, gain), (handle, children)) in wanted.into_iter().zip(found) {
        let one = &mut growing[of];
        if gain.is_finite() {
            one.grown.draft_steps += draft_pass(paid) / paid as f32;
            one.grown.draft_step_ms = Some(ms);
        }
        one.candidates[at].handle = Some(handle);
        one.go_on(at, Some(&children));
    }
}

/// The chosen nodes as proposals.
fn end<K: Kernels>(
    costs: &Costs,
    load: Load,
    growing: Vec<Growing<'_, K>>,
    order: &[(usize, usize)],
) -> Vec<Grown> {
    let added_ms = costs.verify(load.rows + order.len()) - costs.verify(load.rows);
    let end = |(of, one): (usize, Growing<'_, K>)| {
        // Nodes were added best first and parents before children, so a prefix is a proposal of its own.
        let own: Vec<usize> = order.iter().filter(|(o, _)| *o == of).map(|(_, at)| *at).collect();
        one.end(&own, added_ms * own.len() as f32 / order.len().max(1) as f32)
    };
    growing.into_iter().enumerate().map(end).collect()
}

fn ms_since(start: Instant) -> f32 {
    start.elapsed().as_secs_f32() * 1e3
}

impl<'a, K: Kernels> Growing<'a, K> {
    fn begin(mut seed: Seed<'a, K>, costs: &Costs, load: Load) -> Growing<'a, K> {
        let rates = &mut seed.pacer.rates;
        let plain = rates.plain_token(costs, load);
        let price = if load.is_alone() { plain * (rates.pace.0 / rates.pace.1).min(1.0) } else { plain };
        let share = draft_pass(load.sequences) / load.sequences.max(1) as f32;
        if !load.is_alone() && price <= costs.cheapest_row(load.rows) + share * costs.draft_step_ms {
            // At this load not even a sure token would pay: rest until the next look.
            rates.paused = rates.paused.max(2);
        }
        if rates.paused > 0 {
            seed.session = None;
        }
        let grown = Grown { load, ..Grown::default() };
        Growing { seed, price, candidates: Vec::new(), roots: Vec::new(), grown }
    }

    /// What the drafter is asked for this sequence; `None` while its draft rests.
    fn ask(&mut self) -> Option<Ask<'_, K>> {
        let position = self.seed.text.len() as u64 - 1;
        let session = self.seed.session.as_deref_mut()?;
        Some(Ask { session, sampling: self.seed.sampling, position, k: CHILDREN, whole: false })
    }

    /// The most probable of some candidates and what it is worth.
    fn best(&self, open: &[usize]) -> Option<(usize, f32)> {
        let path = |at: usize| self.candidates[at].path;
        let at = open.iter().copied().max_by(|a, b| path(*a).total_cmp(&path(*b)).then(b.cmp(a)))?;
        Some((at, path(at) * self.price))
    }

    /// Makes a candidate's children known: the draft's, if it was asked, and the repetition's.
    fn go_on(&mut self, at: usize, children: Option<&Children>) {
        let Candidate { depth, path, repeats, .. } = self.candidates[at];
        self.candidates[at].children = Some(Vec::new());
        if depth + 1 >= self.seed.room {
            return;
        }
        if let Some(children) = children {
            self.offer(children, Some(at), depth + 1, path);
        }
        let next = repeats.map(|m| Match { at: m.at + 1, ..m });
        self.repeat(next, Some(at), depth + 1, path);
    }

    /// The proposal of these nodes, whose rows take `rows_ms`.
    fn end(mut self, nodes: &[usize], rows_ms: f32) -> Grown {
        let mut place: Vec<Option<u32>> = vec![None; self.candidates.len()];
        for at in nodes {
            let c = &self.candidates[*at];
            let parent = c.parent.and_then(|p| place[p]);
            place[*at] = Some(self.grown.tree.push(TargetTokenId(c.token), parent));
            self.grown.classes.push(c.classes);
            self.grown.expected += c.path;
        }
        let expanded = nodes.iter().filter(|at| self.candidates[**at].handle.is_some());
        self.grown.expanded.extend(expanded.map(|at| place[*at]));
        self.grown.rows_ms = rows_ms;
        self.grown
    }

    fn push(&mut self, candidate: Candidate) {
        let at = self.candidates.len();
        match candidate.parent {
            None => self.roots.push(at),
            Some(p) => self.candidates[p].children.get_or_insert_default().push(at),
        }
        self.candidates.push(candidate);
    }

    /// Adds the draft's children of a node.
    fn offer(&mut self, children: &Children, parent: Option<usize>, depth: usize, path: f32) {
        for (token, log_probability) in children {
            let class = draft_class(log_probability.exp(), depth);
            self.push(Candidate {
                token: *token,
                parent,
                handle: None,
                drafted: true,
                depth,
                path: path * self.seed.pacer.rates.rate(class),
                classes: [Some(class), None],
                repeats: None,
                children: None,
            });
        }
    }

    /// Adds the token that a repetition goes on with; joined to the draft's node if both propose it.
    fn repeat(&mut self, repetition: Option<Match>, parent: Option<usize>, depth: usize, path: f32) {
        let text = self.seed.text;
        let Some((m, token)) = repetition.and_then(|m| Some((m, *text.get(m.at)?))) else { return };
        if depth >= self.seed.room {
            return;
        }
        let class = lookup_class(m.length, depth == 0);
        let rate = self.seed.pacer.rates.rate(class);
        if let Some(same) = self.candidates.iter_mut().find(|c| c.parent == parent && c.token == token) {
            let own = same.path / path.max(f32::MIN_POSITIVE);
            same.path = path * (1.0 - (1.0 - own) * (1.0 - rate));
            same.classes[1] = Some(class);
            same.repeats = Some(m);
        } else {
            self.push(Candidate {
                token,
                parent,
                handle: None,
                drafted: false,
                depth,
                path: path * rate,
                classes: [None, Some(class)],
                repeats: Some(m),
                children: None,
            });
        }
    }
}

impl Rates {
    /// Milliseconds per token of plain decoding in such a pass: what an accepted token saves.
    fn plain_token(&self, costs: &Costs, load: Load) -> f32 {
        if load.is_alone() {
            return costs.verify(1) + self.beside.median().unwrap_or(0.0).max(0.0);
        }
        let sequences = load.sequences.max(1);
        costs.verify(sequences) / sequences as f32
    }
}

impl Pacer {
    pub(crate) fn new(mut rates: Rates) -> Pacer {
        rates.paused = match rates.looked {
            None => FIRST_LOOK,
            Some(steps) => rates.paused.clamp(usize::from(steps >= LOOK_EVERY), CARRIED_PAUSE),
        };
        Pacer { rates }
    }

    /// What was learnt, for the next sequence.
    pub(crate) fn rates(&self) -> &Rates {
        &self.rates
    }

    /// True while the draft is left out; its features are only collected.
    #[cfg(test)]
    pub(crate) fn is_paused(&self) -> bool {
        self.rates.paused > 0
    }

    /// Learns from the step that verified `grown` and committed `committed` tokens.
    pub(crate) fn learn(
        &mut self,
        costs: &Costs,
        grown: &Grown,
        accepted: &[u32],
        committed: usize,
        time: StepTime,
    ) {
        self.rates.learn(grown, accepted);
        let rates = &mut self.rates;
        let (load, paused) = (grown.load, rates.paused > 0);
        let plain = rates.plain_token(costs, load);
        if plain <= 0.0 {
            // Costs that say nothing teach nothing.
            return;
        }
        let drafting = match paused {
            true => 0.0,
            false => grown.root_share * costs.extend_ms + grown.draft_steps * costs.draft_step_ms,
        };
        // The pass counts as costs say, which know passes like it under this load; a single one says little.
        let mut extra = grown.rows_ms + drafting;
        if load.is_alone() {
            // What really happened beside it: the text side and the choice of the proposal are in that.
            let beside = time.elapsed_ms - time.pass_ms - rates.beside.median().unwrap_or(0.0);
            extra = grown.rows_ms + beside.clamp(0.0, 3.0 * drafting + 0.1 * plain);
        }
        let (extra, committed) = (extra / plain, committed.max(1) as f32);
        let expected = grown.expected;
        rates.pace.0 += (1.0 + extra - rates.pace.0) / WINDOW;
        rates.pace.1 += (committed - rates.pace.1) / WINDOW;
        if paused {
            rates.paused -= 1;
            if load.is_alone() && grown.tree.is_empty() {
                rates.looked = Some(0);
                rates.beside.push(time.elapsed_ms - time.pass_ms);
            }
            return;
        }
        rates.looked = rates.looked.map(|steps| steps + 1);
        rates.promised += (expected - extra - rates.promised) / WINDOW;
        rates.kept += (committed - 1.0 - extra - rates.kept) / LONG_WINDOW;
        if (rates.promised < LOSS || rates.kept < LONG_LOSS) && costs.draft_step_ms > 0.0 {
            rates.paused = rates.next_pause;
            rates.next_pause = (rates.next_pause * 2).min(LONGEST_PAUSE);
            (rates.promised, rates.kept) = (0.0, 0.0);
        } else if rates.promised > 0.05 {
            rates.next_pause = PAUSE;
        }
    }
}

#[cfg(test)]
mod simulated;

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_kernels::Cpu;

    fn costs(verify: &[(usize, f32)], draft: f32) -> Costs {
        Costs { verify_ms: verify.to_vec(), draft_step_ms: draft, extend_ms: draft }
    }

    /// Proposes 10, 11, 12, … with one probability.
    struct Sure(f32);

    struct SureSession;

    impl DrafterSession<Cpu> for SureSession {
        fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
            self
        }
    }

    impl Drafter<Cpu> for Sure {
        fn target_layers(&self) -> &[draftsmith_core::LayerId] {
            &[]
        }
        fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
            Box::new(SureSession)
        }
        fn take_in(&self, _: &mut [crate::Committed<'_, Cpu>]) {}
        fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
            vec![vec![(10, self.0.ln())]; asks.len()]
        }
        fn expand(&self, _: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
            nodes.iter().map(|node| (node.token - 10, vec![(node.token + 1, self.0.ln())])).collect()
        }
    }

    const ALONE: Load = Load { rows: 1, sequences: 1 };

    /// One that has seen plain steps.
    fn awake() -> Pacer {
        Pacer::new(Rates { looked: Some(0), paused: 0, ..Rates::default() })
    }

    fn seed<'a>(pacer: &'a mut Pacer, session: &'a mut SureSession, room: usize) -> Seed<'a, Cpu> {
        Seed {
            pacer,
            session: Some(session),
            repetition: None,
            text: &[1, 2, 3],
            room,
            sampling: &Sampling::GREEDY,
        }
    }

    fn grown(costs: &Costs, probability: f32, room: usize) -> usize {
        let (mut pacer, draft) = (awake(), Sure(probability));
        grow(costs, ALONE, Some(&draft), vec![seed(&mut pacer, &mut SureSession, room)])[0].tree.len()
    }

    #[test]
    fn surer_drafts_and_cheaper_passes_are_drafted_deeper() {
        let cheap = costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 0.1);
        let dear = costs(&[(1, 4.0), (2, 7.9), (8, 30.0), (32, 120.0)], 0.1);
        assert_eq!(grown(&dear, 0.5, 8), 0);
        assert!(grown(&dear, 0.5, 8) <= grown(&dear, 0.99, 8));
        assert!(grown(&cheap, 0.3, 8) < grown(&cheap, 0.99, 8), "{}", grown(&cheap, 0.3, 8));
        assert!(grown(&cheap, 0.99, 8) >= 4);
        assert_eq!(grown(&cheap, 0.99, 2), 2, "never deeper than the room");
        assert_eq!(grown(&cheap, 0.99, 0), 0);
    }

    #[test]
    fn rejections_end_the_drafting_and_it_is_tried_again_later() {
        let costs = costs(&[(1, 4.0), (2, 5.0), (8, 8.0)], 0.3);
        let (mut pacer, draft) = (awake(), Sure(0.9));
        let (mut proposed, mut paused) = (0, 0);
        for _ in 0..1000 {
            let grown =
                grow(&costs, ALONE, Some(&draft), vec![seed(&mut pacer, &mut SureSession, 8)]).remove(0);
            proposed += usize::from(!grown.tree.is_empty());
            paused += usize::from(pacer.is_paused());
            let pass_ms = costs.verify(grown.tree.len() + 1);
            let extend_ms = if pacer.is_paused() { 0.0 } else { 0.3 };
            let elapsed_ms = pass_ms + extend_ms + grown.draft_steps * 0.3;
            pacer.learn(&costs, &grown, &[], 1, StepTime { elapsed_ms, pass_ms });
        }
        assert!(proposed < 100, "{proposed} proposals of a draft that is always wrong");
        assert!(paused > 800 && paused < 1000, "{paused}");
    }

    #[test]
    fn a_repetition_is_joined_to_the_draft_and_followed_alone() {
        let costs = costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 0.1);
        let (mut pacer, draft) = (awake(), Sure(0.9));
        // After 7, 8 came 10, 50, 51; the draft says 10 as well, then 11.
        let text = [7, 8, 10, 50, 51, 9, 7, 8];
        let m = Match { at: 2, length: 4 };
        let mut session = SureSession;
        let with_text = Seed { repetition: Some(m), text: &text, ..seed(&mut pacer, &mut session, 8) };
        let grown = grow(&costs, ALONE, Some(&draft), vec![with_text]).remove(0);
        let tree = &grown.tree;
        assert_eq!(tree.tokens.iter().filter(|t| t.0 == 10).count(), 1);
        let branch = tree.tokens.iter().position(|t| t.0 == 50).expect("the repetition goes on");
        let parent = tree.parents[branch].expect("below the joined node") as usize;
        assert_eq!(tree.tokens[parent].0, 10);
        assert!(tree.validate().is_ok());
        // Without a draft the repetition is a chain.
        let alone =
            Seed { repetition: Some(m), text: &text, session: None, ..seed(&mut pacer, &mut session, 8) };
        let grown = grow(&costs, ALONE, Some(&draft), vec![alone]).remove(0);
        assert_eq!(grown.tree.tokens[0].0, 10);
        assert_eq!(grown.tree.parents, TokenTree::chain_parents(grown.tree.len()));
    }

    #[test]
    fn a_draft_rests_where_a_sure_token_would_not_pay_beside_the_others() {
        let grown = |others: usize| {
            let costs = costs(&[(1, 3.0), (2, 3.3), (8, 6.3), (16, 11.4), (32, 22.0)], 1.2);
            let mut pacer = awake();
            let load = Load { rows: others + 1, sequences: others + 1 };
            let nodes = grow(&costs, load, Some(&Sure(0.99)), vec![seed(&mut pacer, &mut SureSession, 4)])[0]
                .tree
                .len();
            (nodes, pacer.is_paused())
        };
        assert_eq!(grown(7), (0, true));
        let (nodes, paused) = grown(0);
        assert!(nodes > 0 && !paused);
    }

    /// Nodes of each of so many sequences that are planned together, beside other rows.
    fn nodes(costs: &Costs, sequences: usize, other_rows: usize, probability: f32) -> Vec<usize> {
        let mut pacers: Vec<Pacer> = (0..sequences).map(|_| awake()).collect();
        let mut sessions: Vec<SureSession> = (0..sequences).map(|_| SureSession).collect();
        let load = Load { rows: sequences + other_rows, sequences };
        let seeds = pacers.iter_mut().zip(&mut sessions).map(|(p, s)| seed(p, s, 8)).collect();
        grow(costs, load, Some(&Sure(probability)), seeds).iter().map(|g| g.tree.len()).collect()
    }

    #[test]
    fn trees_of_siblings_and_pieces_of_prompts_count_in_the_price_of_a_row() {
        // Up to 16 rows are almost free, every further one costs as much as a plain token of many.
        let costs = costs(&[(1, 45.0), (2, 45.2), (8, 46.0), (16, 48.0), (32, 190.0)], 0.3);
        let alone = nodes(&costs, 1, 0, 0.8)[0];
        assert!(alone >= 6, "{alone}");
        let six = nodes(&costs, 6, 0, 0.8);
        assert!(six.iter().sum::<usize>() <= 10, "{six:?} beside 6 rows of their own");
        assert!(six.iter().all(|n| *n < alone) && six.iter().any(|n| *n > 0), "{six:?} after {alone}");
        // Nobody takes all of the room.
        assert!(six.iter().max() <= six.iter().min().map(|n| n + 1).as_ref(), "{six:?}");
        // A piece of a prompt fills the pass: six more rows would take more than they save.
        assert_eq!(nodes(&costs, 6, 64, 0.8), [0; 6]);
        let beside = nodes(&costs, 1, 64, 0.8)[0];
        assert!(beside > 0 && beside < alone, "{beside} after {alone}");
    }

    #[test]
    fn a_pause_goes_on_in_the_next_sequence_but_not_for_long() {
        let costs = costs(&[(1, 4.0), (2, 5.0), (8, 8.0)], 0.3);
        let mut rates = Rates::default();
        let mut proposed = 0;
        for sequence in 0..40 {
            let (mut pacer, draft) = (Pacer::new(rates), Sure(0.9));
            for _ in 0..16 {
                let grown =
                    grow(&costs, ALONE, Some(&draft), vec![seed(&mut pacer, &mut SureSession, 8)]).remove(0);
                proposed += usize::from(!grown.tree.is_empty());
                let pass_ms = costs.verify(grown.tree.len() + 1);
                let elapsed_ms = pass_ms + grown.draft_steps * 0.3;
                pacer.learn(&costs, &grown, &[], 1, StepTime { elapsed_ms, pass_ms });
            }
            assert!(sequence == 0 || pacer.rates.paused <= LONGEST_PAUSE);
            rates = pacer.rates().clone();
        }
        assert!(
            (4..120).contains(&proposed),
            "{proposed} proposals of a draft that is always wrong in 640 steps"
        );
    }
}
