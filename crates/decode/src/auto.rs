//! How much to draft, decided by cost.
//!
//! A draft token is worth verifying while (probability that it is accepted) x (time that an accepted token saves)
//! exceeds what one more row of the target's pass costs; growing the draft one node further must pay its own step as
//! well. Costs are measured on this machine ([`Costs`]), probabilities are the sources' own, corrected by how often
//! such proposals were accepted before ([`Rates`]). All sequences of a pass are planned together ([`grow`]): a row
//! costs what it adds to the rows that are there, whoever they belong to.
//!
//! Sources compete in one tree: the draft, whatever it is, and repetitions, of the text and below drafted tokens. The
//! draft is asked where its answer is worth what asking takes: its passes, and for a model that reads the text itself
//! what it would have to read first.
//!
//! Gains and prices are kept as shares of a plain step, so that they hold while the load of the machine changes.
//!
//! The choice changes time, never the text.

use std::time::Instant;

use draftsmith_core::{Sampling, TargetTokenId, TokenTree};
use draftsmith_kernels::Kernels;

use crate::costs::{Costs, Recent};
use crate::drafter::{Ask, Children, Drafter, DrafterSession, MOST_NODES, Node};
use crate::lookup::{Lookup, Match};

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
    /// What the draft adds where a long repetition goes on beside it, in plain steps.
    beside_repeat: f32,
    /// Steps of that kind in which the draft was left out since it was last asked.
    left_out: usize,
    /// Time, in plain steps, and tokens of the steps in which the draft was asked; how many those were, up to a window.
    asked: (f32, f32),
    asks: usize,
    /// Time that may be spent on reading texts anew for a draft that may not be worth it, in plain steps.
    spare: f32,
    /// Tokens of this answer so far, and of an answer on average.
    tokens: f32,
    answer: f32,
    /// Steps in which the draft was asked since it last rested.
    awake: usize,
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
            beside_repeat: 0.0,
            left_out: 0,
            asked: (1.5, 2.0),
            asks: 0,
            spare: 0.0,
            tokens: 0.0,
            answer: 128.0,
            awake: 0,
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
    /// Share in the pass of those; 0 where the draft was not asked.
    root_share: f32,
    /// What the longest repetition promised beside, in plain steps, and whether it is a long one.
    repeat: Option<(f32, bool)>,
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
/// Steps after which a draft must have promised this much on average, where several sequences are decoded: what proposals take there
/// beside passes and draft steps is not measured, and waiting for a loss to show takes as long as a short answer.
const SHOWN: usize = 12;
const LEAST_BESIDE: f32 = 0.02;
/// Length from which on a repetition counts as long: the draft may then be left out.
const LONG_REPEAT: usize = 4;
/// Steps with a long repetition after which the draft is asked all the same.
const LOOK_BESIDE: usize = 16;
/// Share of the time that may go into reading texts anew for a draft that may not be worth it.
const SPARE: f32 = 0.01;
/// What is left of a pause goes on in the next sequence up to this: another text may suit the draft better.
const CARRIED_PAUSE: usize = 48;

/// The running decision of one sequence.
#[derive(Debug)]
pub(crate) struct Pacer {
    rates: Rates,
}

/// What stands before a draft's first proposals.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// It has to read the text first,
    is_behind: bool,
    /// which takes so many plain steps.
    steps: f32,
    /// What a further row of the pass takes of what an accepted token saves.
    row: f32,
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
    /// Where further ones are looked for.
    pub lookup: Option<&'a Lookup>,
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

/// A time in units of another; one where that is nothing.
fn in_units(ms: f32, of: f32) -> f32 {
    if of > 0.0 { ms / of } else { 1.0 }
}

/// True if the draft cannot pay in such a pass even if it were always right. An accepted token saves `price`.
fn is_hopeless<K: Kernels>(costs: &Costs, load: Load, drafter: &dyn Drafter<K>, price: f32) -> bool {
    let sequences = load.sequences.max(1);
    let share = |ms: f32| ms / sequences as f32;
    let token = price - costs.cheapest_row(load.rows);
    let levels = drafter.deepest().min(SURE_LEVELS);
    let of_first = drafter.levels_per_pass().min(levels);
    let step = share(costs.draft_pass(sequences));
    let further = (levels - of_first) as f32 * (token - step).max(0.0);
    // A draft that is asked for each level by itself pays for the first with its first proposals.
    of_first as f32 * token + further <= share(costs.root_pass(sequences))
}

/// Levels of a draft that is always right.
const SURE_LEVELS: usize = 8;

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
        seeds.into_iter().map(|seed| Growing::begin(seed, costs, load, drafter)).collect();
    if let Some(drafter) = drafter {
        ask_for_roots(drafter, costs, &mut growing);
    }
    for one in &mut growing {
        one.repeat(one.seed.repetition, None, 0, 1.0);
    }
    loop {
        let chosen = choose(costs, load, &mut growing, drafter);
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
    drafter: Option<&dyn Drafter<K>>,
) -> Chosen {
    let levels_per_pass = drafter.map_or(1, |d| d.levels_per_pass());
    let deepest = drafter.map_or(0, |d| d.deepest());
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
                let has_children = one.seed.session.is_some() && c.drafted && c.depth + 1 < deepest;
                if has_children && (is_free || gain > 0.0) {
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
fn ask_for_roots<K: Kernels>(drafter: &dyn Drafter<K>, costs: &Costs, growing: &mut [Growing<'_, K>]) {
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
    let passes = in_units(costs.root_pass(count), costs.extend_ms);
    // Where one of them is still reading, the time says nothing of a step.
    let is_step = found.iter().all(|children| !children.is_empty());
    for (of, children) in asking.into_iter().zip(found) {
        let one = &mut growing[of];
        one.grown.root_ms = is_step.then_some(ms / passes);
        one.grown.root_share = passes / count as f32;
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
    let mut paid = wanted[free..].iter().take_while(|(.., gain)| *gain > costs.draft_row_ms).count();
    let gains: f32 = wanted[free..free + paid].iter().map(|(.., gain)| gain).sum();
    if gains <= costs.draft_pass(paid) {
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
    let steps = in_units(costs.draft_pass(paid), costs.draft_step_ms);
    let ms = ms_since(start) / steps;
    for ((of, at, gain), (handle, children)) in wanted.into_iter().zip(found) {
        let one = &mut growing[of];
        if gain.is_finite() {
            one.grown.draft_steps += steps / paid as f32;
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
    fn begin(
        mut seed: Seed<'a, K>,
        costs: &Costs,
        load: Load,
        drafter: Option<&dyn Drafter<K>>,
    ) -> Growing<'a, K> {
        let rates = &mut seed.pacer.rates;
        let plain = rates.plain_token(costs, load);
        let price = if load.is_alone() { plain * (rates.pace.0 / rates.pace.1).min(1.0) } else { plain };
        if !load.is_alone() && drafter.is_some_and(|drafter| is_hopeless(costs, load, drafter, price)) {
            // At this load not even a sure token would pay: rest until the next look.
            rates.paused = rates.paused.max(2);
        }
        let mut grown = Grown { load, ..Grown::default() };
        let repetition = seed.repetition.filter(|_| plain > 0.0);
        if let Some(m) = repetition {
            let (tokens, nodes) = rates.repeat_promise(m, seed.room, costs.cheapest_row(load.rows) / price);
            let rows_ms = costs.verify(load.rows + nodes) - costs.verify(load.rows);
            grown.repeat = Some(((tokens - rows_ms / plain).max(0.0), m.length >= LONG_REPEAT));
        }
        let behind = seed.session.as_ref().map_or(0, |session| session.behind(seed.text.len()));
        let reading = Reading {
            is_behind: behind > 0,
            steps: in_units(behind as f32 * costs.read_row_ms, plain),
            row: in_units(costs.cheapest_row(load.rows), price).min(1.0),
        };
        if rates.paused > 0 || !rates.is_worth_asking(&grown, reading, seed.room) {
            seed.session = None;
        }
        Growing { seed, price, candidates: Vec::new(), roots: Vec::new(), grown }
    }

    /// What the drafter is asked for this sequence; `None` while its draft rests.
    fn ask(&mut self) -> Option<Ask<'_, K>> {
        let position = self.seed.text.len() as u64 - 1;
        let session = self.seed.session.as_deref_mut()?;
        Some(Ask {
            session,
            sampling: self.seed.sampling,
            text: self.seed.text,
            position,
            k: CHILDREN,
            whole: false,
        })
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
        let next = match repeats {
            Some(m) => Some(Match { at: m.at + 1, ..m }),
            // Below a drafted token another repetition may begin.
            None => self.seed.lookup.and_then(|lookup| lookup.find_behind(self.seed.text, &self.path_to(at))),
        };
        self.repeat(next, Some(at), depth + 1, path);
    }

    /// The tokens from the first level to a candidate.
    fn path_to(&self, at: usize) -> Vec<u32> {
        let parents = std::iter::successors(Some(at), |at| self.candidates[*at].parent);
        let mut path: Vec<u32> = parents.map(|at| self.candidates[at].token).collect();
        path.reverse();
        path
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
        // Later tokens of a repetition are surer than where it begins, wherever that is.
        let is_first = parent.is_none_or(|parent| self.candidates[parent].repeats.is_none());
        let class = lookup_class(m.length, is_first);
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

impl Rates {
    /// Tokens that a repetition promises by itself, and nodes for them: as far as they are likelier than `least`.
    fn repeat_promise(&self, m: Match, room: usize, least: f32) -> (f32, usize) {
        let (mut path, mut tokens, mut nodes) = (1.0, 0.0, 0);
        while nodes < room.min(MOST_NODES) {
            path *= self.rate(lookup_class(m.length, nodes == 0));
            if path <= least {
                break;
            }
            tokens += path;
            nodes += 1;
        }
        (tokens, nodes)
    }

    /// Whether the draft is to be asked, if it is awake: not where a long repetition has shown to do without it, and
    /// not where reading what it missed takes longer than the rest of the answer would gain.
    fn is_worth_asking(&mut self, grown: &Grown, reading: Reading, room: usize) -> bool {
        if self.beside_repeat < 0.0 && grown.repeat.is_some_and(|(_, is_long)| is_long) {
            self.left_out += 1;
            if self.left_out < LOOK_BESIDE {
                return false;
            }
        }
        if reading.is_behind {
            let mut saved = (1.0 - self.asked.0 / self.asked.1).max(0.0);
            if self.asks < WINDOW as usize {
                // Not known yet. Of a draft that is as often sure as unsure, what is likelier than a row is dear.
                saved = saved.min((1.0 - reading.row).powi(2) / 2.0);
            }
            if saved * self.answer.min(room as f32) <= reading.steps {
                if self.spare < reading.steps {
                    return false;
                }
                self.spare -= reading.steps;
            }
        }
        self.left_out = 0;
        true
    }
}

impl Pacer {
    pub(crate) fn new(mut rates: Rates) -> Pacer {
        if rates.tokens > 0.0 {
            // An answer that is shorter than others says as much as one that is longer.
            rates.answer += (rates.tokens - rates.answer) / 4.0;
            rates.tokens = 0.0;
        }
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
        rates.tokens += committed;
        rates.spare += SPARE * (1.0 + extra);
        if paused {
            rates.paused -= 1;
            if load.is_alone() && grown.tree.is_empty() {
                rates.looked = Some(0);
                rates.beside.push(time.elapsed_ms - time.pass_ms);
            }
            return;
        }
        rates.looked = rates.looked.map(|steps| steps + 1);
        if grown.root_share == 0.0 {
            return;
        }
        // A repetition would have brought its part without the draft.
        let (without, is_long) = grown.repeat.unwrap_or_default();
        if is_long {
            rates.beside_repeat += (expected - extra - without - rates.beside_repeat) / WINDOW;
        }
        rates.asked.0 += (1.0 + extra - rates.asked.0) / WINDOW;
        rates.asked.1 += (committed - rates.asked.1) / WINDOW;
        rates.asks = (rates.asks + 1).min(WINDOW as usize);
        rates.promised += (expected - extra - without - rates.promised) / WINDOW;
        rates.kept += (committed - 1.0 - extra - without - rates.kept) / LONG_WINDOW;
        rates.awake += 1;
        let is_idle = !load.is_alone() && rates.awake >= SHOWN && rates.promised < LEAST_BESIDE;
        let is_losing = rates.promised < LOSS || rates.kept < LONG_LOSS;
        if (is_losing || is_idle) && costs.draft_step_ms.max(costs.extend_ms) > 0.0 {
            rates.awake = 0;
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
        let (draft_row_ms, extend_row_ms) = (0.2 * draft, 0.2 * draft);
        let verify_ms = verify.to_vec();
        Costs {
            verify_ms,
            draft_step_ms: draft,
            extend_ms: draft,
            draft_row_ms,
            extend_row_ms,
            read_row_ms: 0.0,
        }
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
            lookup: None,
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

    /// Its levels come of one pass.
    struct Block(Sure, usize);

    impl Drafter<Cpu> for Block {
        fn target_layers(&self) -> &[draftsmith_core::LayerId] {
            &[]
        }
        fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
            self.0.begin()
        }
        fn take_in(&self, committed: &mut [crate::Committed<'_, Cpu>]) {
            self.0.take_in(committed);
        }
        fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
            self.0.roots(asks)
        }
        fn expand(&self, asks: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
            assert!(nodes.iter().all(|node| node.depth + 1 < self.1), "nothing is below the last level");
            self.0.expand(asks, nodes)
        }
        fn levels_per_pass(&self) -> usize {
            self.1
        }
        fn deepest(&self) -> usize {
            self.1
        }
    }

    #[test]
    fn the_pass_of_a_block_is_paid_once_whatever_is_taken_of_it() {
        // A step of it would cost more than it brings.
        let costs = Costs { draft_step_ms: 9.0, ..costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 1.0) };
        let (mut pacer, draft) = (awake(), Block(Sure(0.95), 5));
        let found = grow(&costs, ALONE, Some(&draft), vec![seed(&mut pacer, &mut SureSession, 8)]).remove(0);
        assert_eq!((found.tree.len(), found.draft_steps, found.root_share), (5, 0.0, 1.0));
        assert!(found.draft_step_ms.is_none(), "what was free says nothing of a step");
        // Beside others it does not rest while its share in the pass pays.
        let load = Load { rows: 2, sequences: 2 };
        let mut pacer = awake();
        grow(&costs, load, Some(&draft), vec![seed(&mut pacer, &mut SureSession, 8)]);
        assert!(!pacer.is_paused());
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

    #[test]
    fn a_draft_is_left_out_where_a_long_repetition_does_without_it() {
        // Asking takes a quarter of a pass, and the draft says what the text says.
        let costs = costs(&[(1, 40.0), (8, 42.0), (32, 60.0)], 10.0);
        let text: Vec<u32> = (10..100).collect();
        let asked = |length: usize| {
            let (mut pacer, draft) = (awake(), Sure(0.9));
            (0..300)
                .filter(|_| {
                    let mut session = SureSession;
                    let repetition = Some(Match { at: 0, length });
                    let seed = Seed { repetition, text: &text, ..seed(&mut pacer, &mut session, 8) };
                    let grown = grow(&costs, ALONE, Some(&draft), vec![seed]).remove(0);
                    let accepted: Vec<u32> = (0..grown.tree.len() as u32).collect();
                    let pass_ms = costs.verify(grown.tree.len() + 1);
                    let elapsed_ms = pass_ms + 10.0 * (grown.root_share + grown.draft_steps);
                    let time = StepTime { elapsed_ms, pass_ms };
                    pacer.learn(&costs, &grown, &accepted, accepted.len() + 1, time);
                    grown.root_share > 0.0
                })
                .count()
        };
        assert!((10..60).contains(&asked(8)), "now and then: {}", asked(8));
    }

    /// One that has to read the text by itself.
    struct Reading(usize);

    impl DrafterSession<Cpu> for Reading {
        fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
            self
        }
        fn behind(&self, _: usize) -> usize {
            self.0
        }
    }

    #[test]
    fn a_text_is_read_for_a_draft_where_the_rest_of_the_answer_pays_for_it() {
        let costs = Costs { read_row_ms: 1.6, ..costs(&[(1, 44.0), (8, 46.0), (32, 90.0)], 10.0) };
        let is_asked_at = |costs: &Costs, load: Load, pacer: &mut Pacer, behind: usize, room: usize| {
            let mut session = Reading(behind);
            let text = &[1, 2, 3];
            let (lookup, repetition, sampling) = (None, None, &Sampling::GREEDY);
            let session: Option<&mut dyn DrafterSession<Cpu>> = Some(&mut session);
            let seed = Seed { pacer, session, repetition, lookup, text, room, sampling };
            grow(costs, load, Some(&Sure(0.9)), vec![seed]).remove(0).root_share > 0.0
        };
        let is_asked = |pacer: &mut Pacer, behind, room| is_asked_at(&costs, ALONE, pacer, behind, room);
        assert!(is_asked(&mut awake(), 0, 3));
        assert!(is_asked(&mut awake(), 500, 400));
        assert!(!is_asked(&mut awake(), 500, 20), "the answer ends before");
        assert!(!is_asked(&mut awake(), 4000, 400), "a long prompt");
        // Beside so many others that a row costs nearly what a token does, a draft that nobody knows yet is not read for.
        let full =
            Costs { read_row_ms: 0.1, ..self::costs(&[(1, 37.8), (4, 39.5), (8, 52.7), (16, 97.1)], 0.4) };
        for (sequences, wanted) in [(1, true), (3, true), (8, false)] {
            let load = Load { rows: sequences, sequences };
            assert_eq!(is_asked_at(&full, load, &mut awake(), 100, 60), wanted, "{sequences}");
            let mut known = awake();
            (known.rates.asked, known.rates.asks) = ((1.1, 1.4), WINDOW as usize);
            assert!(is_asked_at(&full, load, &mut known, 100, 60), "{sequences}");
        }
        // One that gained nothing: a text is read for it rarely, so that all of it takes a hundredth of the time.
        let mut useless = awake();
        useless.rates.asked = (1.3, 1.2);
        let mut read = 0;
        for step in 0..10_000 {
            let grown = Grown { load: ALONE, ..Grown::default() };
            useless.learn(&costs, &grown, &[], 1, StepTime { elapsed_ms: 44.0, pass_ms: 44.0 });
            useless.rates.paused = 0;
            read += usize::from(is_asked(&mut useless, 300, 400)) * usize::from(step > 0);
        }
        let share = read as f32 * 300.0 * 1.6 / (10_000.0 * 44.0);
        assert!(read > 3 && share < 0.011, "{read} times, {share} of the time");
    }

    #[test]
    fn a_repetition_may_begin_below_a_drafted_token() {
        let costs = costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 0.1);
        // The draft says 10; after 7, 10 came 50, 51, 52.
        let text = [7, 10, 50, 51, 52, 3, 7];
        let mut lookup = Lookup::default();
        let repetition = lookup.find(&text);
        assert_eq!(repetition, None);
        let (mut pacer, mut session) = (awake(), SureSession);
        let lookup = Some(&lookup);
        let seed = Seed { repetition, lookup, text: &text, ..seed(&mut pacer, &mut session, 8) };
        let tree = grow(&costs, ALONE, Some(&Sure(0.9)), vec![seed]).remove(0).tree;
        let at = |token: u32| tree.tokens.iter().position(|t| t.0 == token);
        let (first, then) = (at(10).expect("drafted"), at(50).expect("repeated"));
        assert_eq!(tree.parents[then], Some(first as u32));
        assert_eq!(tree.parents[at(51).expect("and on")], Some(then as u32));
    }
}
