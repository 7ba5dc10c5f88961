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
use crate::drafter::{DrafterSession, MOST_NODES};
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
    /// Draft steps taken, beside the features of the committed tokens.
    pub draft_steps: usize,
    /// Milliseconds of those steps, and of the draft's first proposals.
    pub draft_ms: f32,
    pub root_ms: Option<f32>,
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
/// A pause of so many steps is no reason to put a prompt's features off: they are needed soon.
const SOON: usize = 8;
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

/// A node that may be added.
struct Candidate {
    token: u32,
    parent: Option<u32>,
    /// Handle of the parent inside the drafter; `None` is the root.
    parent_handle: Option<u32>,
    /// The draft proposed it (or knows its parent), so it can be expanded.
    drafted: bool,
    depth: usize,
    /// Probability that the path up to here is accepted.
    path: f32,
    classes: [Option<Class>; 2],
    /// Place in the text of the repetition that goes on with this token, and its length.
    repeats: Option<Match>,
}

/// A sequence that wants a proposal.
pub(crate) struct Seed<'a, K: Kernels> {
    pub pacer: &'a mut Pacer,
    pub drafter: Option<&'a mut (dyn DrafterSession<K> + 'static)>,
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
    /// Path of each node.
    paths: Vec<f32>,
    grown: Grown,
}

/// Proposals for the sequences of a pass that decode with an automatic plan.
pub(crate) fn grow<K: Kernels>(costs: &Costs, load: Load, seeds: Vec<Seed<'_, K>>) -> Vec<Grown> {
    let mut growing: Vec<Growing<'_, K>> =
        seeds.into_iter().map(|seed| Growing::begin(seed, costs, load)).collect();
    // Sequence of each node, in the order of adding.
    let mut order: Vec<usize> = Vec::new();
    let mut value = 0.0f32;
    // Per number of nodes: expected gain of the proposals.
    let mut best = (0.0f32, 0usize);
    loop {
        let rows = load.rows + order.len();
        let mut next: Option<(usize, usize, f32)> = None;
        for (of, one) in growing.iter().enumerate() {
            if let Some((at, worth)) = one.best()
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
        growing[of].add(at, costs, cheapest);
        order.push(of);
        if value > best.0 {
            best = (value, order.len());
        }
    }
    let all = best.1;
    let added_ms = costs.verify(load.rows + all) - costs.verify(load.rows);
    let count = |of: usize| order[..all].iter().filter(|o| **o == of).count();
    let kept: Vec<usize> = (0..growing.len()).map(count).collect();
    growing
        .into_iter()
        .zip(kept)
        // Nodes were added best first and parents before children, so a prefix is a proposal of its own.
        .map(|(one, nodes)| one.end(nodes, added_ms * nodes as f32 / all.max(1) as f32))
        .collect()
}

fn ms_since(start: Instant) -> f32 {
    start.elapsed().as_secs_f32() * 1e3
}

impl<'a, K: Kernels> Growing<'a, K> {
    fn begin(mut seed: Seed<'a, K>, costs: &Costs, load: Load) -> Growing<'a, K> {
        let rates = &mut seed.pacer.rates;
        let plain = rates.plain_token(costs, load);
        let price = if load.is_alone() { plain * (rates.pace.0 / rates.pace.1).min(1.0) } else { plain };
        if !load.is_alone() && price <= costs.cheapest_row(load.rows) + costs.draft_step_ms {
            // At this load not even a sure token would pay: rest until the next look.
            rates.paused = rates.paused.max(2);
        }
        if rates.paused > 0 {
            seed.drafter = None;
        }
        let grown = Grown { load, ..Grown::default() };
        let mut one = Growing { seed, price, candidates: Vec::new(), paths: Vec::new(), grown };
        if one.seed.room > 0 {
            let position = one.seed.text.len() as u64 - 1;
            let start = Instant::now();
            let children = match one.seed.drafter.as_deref_mut() {
                Some(d) => d.children(None, CHILDREN, one.seed.sampling, position),
                None => Vec::new(),
            };
            if one.seed.drafter.is_some() {
                one.grown.root_ms = Some(ms_since(start));
            }
            if !children.is_empty() {
                one.grown.expanded.push(None);
            }
            one.offer(&children, None, None, 0, 1.0);
            one.repeat(one.seed.repetition, None, 0, 1.0);
        }
        one
    }

    /// The most probable candidate and what it is worth.
    fn best(&self) -> Option<(usize, f32)> {
        if self.grown.tree.len() >= MOST_NODES {
            return None;
        }
        let path = |at: usize| self.candidates[at].path;
        let at = (0..self.candidates.len()).max_by(|a, b| path(*a).total_cmp(&path(*b)).then(b.cmp(a)))?;
        Some((at, path(at) * self.price))
    }

    /// Adds a candidate, and its children to the candidates.
    fn add(&mut self, at: usize, costs: &Costs, cheapest: f32) {
        let c = self.candidates.swap_remove(at);
        let node = self.grown.tree.push(TargetTokenId(c.token), c.parent);
        self.grown.classes.push(c.classes);
        self.paths.push(c.path);
        if c.depth + 1 >= self.seed.room {
            return;
        }
        let rates = &self.seed.pacer.rates;
        let child = c.path * rates.child.0 / rates.child.1;
        let worth_a_step = child * self.price > costs.draft_step_ms + cheapest;
        let position = self.seed.text.len() as u64 - 1;
        if let (Some(d), true, true) = (self.seed.drafter.as_deref_mut(), c.drafted, worth_a_step) {
            let start = Instant::now();
            let handle = d.expand(c.parent_handle, c.token, c.depth);
            let children =
                d.children(Some(handle), CHILDREN, self.seed.sampling, position + c.depth as u64 + 1);
            self.grown.draft_ms += ms_since(start);
            self.grown.draft_steps += 1;
            self.grown.expanded.push(Some(node));
            self.offer(&children, Some(node), Some(handle), c.depth + 1, c.path);
        }
        let next = c.repeats.map(|m| Match { at: m.at + 1, ..m });
        self.repeat(next, Some(node), c.depth + 1, c.path);
    }

    /// The proposal: the first `nodes` of it, whose rows take `rows_ms`.
    fn end(mut self, nodes: usize, rows_ms: f32) -> Grown {
        self.grown.tree.tokens.truncate(nodes);
        self.grown.tree.parents.truncate(nodes);
        self.grown.classes.truncate(nodes);
        self.grown.expanded.retain(|n| n.is_none_or(|n| (n as usize) < nodes));
        self.grown.expected = self.paths[..nodes].iter().sum();
        self.grown.rows_ms = rows_ms;
        self.grown
    }

    /// Adds the draft's children of a node.
    fn offer(
        &mut self,
        children: &[(u32, f32)],
        parent: Option<u32>,
        parent_handle: Option<u32>,
        depth: usize,
        path: f32,
    ) {
        for (token, probability) in children {
            let class = draft_class(*probability, depth);
            self.candidates.push(Candidate {
                token: *token,
                parent,
                parent_handle,
                drafted: true,
                depth,
                path: path * self.seed.pacer.rates.rate(class),
                classes: [Some(class), None],
                repeats: None,
            });
        }
    }

    /// Adds the token that a repetition goes on with; joined to the draft's node if both propose it.
    fn repeat(&mut self, repetition: Option<Match>, parent: Option<u32>, depth: usize, path: f32) {
        let text = self.seed.text;
        let Some((m, token)) = repetition.and_then(|m| Some((m, *text.get(m.at)?))) else { return };
        let class = lookup_class(m.length, depth == 0);
        let rate = self.seed.pacer.rates.rate(class);
        if let Some(same) = self.candidates.iter_mut().find(|c| c.parent == parent && c.token == token) {
            let own = same.path / path.max(f32::MIN_POSITIVE);
            same.path = path * (1.0 - (1.0 - own) * (1.0 - rate));
            same.classes[1] = Some(class);
            same.repeats = Some(m);
        } else {
            self.candidates.push(Candidate {
                token,
                parent,
                parent_handle: None,
                drafted: false,
                depth,
                path: path * rate,
                classes: [None, Some(class)],
                repeats: Some(m),
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
    pub(crate) fn is_paused(&self) -> bool {
        self.rates.paused > 0
    }

    /// True if it is left out for longer than it takes to look at plain steps.
    pub(crate) fn is_resting(&self) -> bool {
        self.rates.paused > SOON
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
            false => costs.extend_ms + grown.draft_steps as f32 * costs.draft_step_ms,
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

    impl DrafterSession<Cpu> for Sure {
        fn extend(&mut self, _: &crate::Features<'_, Cpu>, _: &[u32]) {}
        fn defer(&mut self, _: &crate::Features<'_, Cpu>, _: &[u32]) {}
        fn propose(&mut self, _: &crate::DraftPlan, _: usize, _: &Sampling, _: u64) -> TokenTree {
            TokenTree::default()
        }
        fn children(&mut self, node: Option<u32>, _: usize, _: &Sampling, _: u64) -> Vec<(u32, f32)> {
            vec![(10 + node.map_or(0, |n| n + 1), self.0)]
        }
        fn expand(&mut self, parent: Option<u32>, _: u32, _: usize) -> u32 {
            parent.map_or(0, |p| p + 1)
        }
    }

    const ALONE: Load = Load { rows: 1, sequences: 1 };

    /// One that has seen plain steps.
    fn awake() -> Pacer {
        Pacer::new(Rates { looked: Some(0), paused: 0, ..Rates::default() })
    }

    fn seed<'a>(pacer: &'a mut Pacer, draft: &'a mut Sure, room: usize) -> Seed<'a, Cpu> {
        Seed {
            pacer,
            drafter: Some(draft),
            repetition: None,
            text: &[1, 2, 3],
            room,
            sampling: &Sampling::GREEDY,
        }
    }

    fn grown(costs: &Costs, probability: f32, room: usize) -> usize {
        let (mut pacer, mut draft) = (awake(), Sure(probability));
        grow(costs, ALONE, vec![seed(&mut pacer, &mut draft, room)])[0].tree.len()
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
        let (mut pacer, mut draft) = (awake(), Sure(0.9));
        let (mut proposed, mut paused) = (0, 0);
        for _ in 0..1000 {
            let grown = grow(&costs, ALONE, vec![seed(&mut pacer, &mut draft, 8)]).remove(0);
            proposed += usize::from(!grown.tree.is_empty());
            paused += usize::from(pacer.is_paused());
            let pass_ms = costs.verify(grown.tree.len() + 1);
            let extend_ms = if pacer.is_paused() { 0.0 } else { 0.3 };
            let elapsed_ms = pass_ms + extend_ms + grown.draft_steps as f32 * 0.3;
            pacer.learn(&costs, &grown, &[], 1, StepTime { elapsed_ms, pass_ms });
        }
        assert!(proposed < 100, "{proposed} proposals of a draft that is always wrong");
        assert!(paused > 800 && paused < 1000, "{paused}");
    }

    #[test]
    fn a_repetition_is_joined_to_the_draft_and_followed_alone() {
        let costs = costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 0.1);
        let (mut pacer, mut draft) = (awake(), Sure(0.9));
        // After 7, 8 came 10, 50, 51; the draft says 10 as well, then 11.
        let text = [7, 8, 10, 50, 51, 9, 7, 8];
        let m = Match { at: 2, length: 4 };
        let with_text = Seed { repetition: Some(m), text: &text, ..seed(&mut pacer, &mut draft, 8) };
        let grown = grow(&costs, ALONE, vec![with_text]).remove(0);
        let tree = &grown.tree;
        assert_eq!(tree.tokens.iter().filter(|t| t.0 == 10).count(), 1);
        let branch = tree.tokens.iter().position(|t| t.0 == 50).expect("the repetition goes on");
        let parent = tree.parents[branch].expect("below the joined node") as usize;
        assert_eq!(tree.tokens[parent].0, 10);
        assert!(tree.validate().is_ok());
        // Without a draft the repetition is a chain.
        let alone =
            Seed { repetition: Some(m), text: &text, drafter: None, ..seed(&mut pacer, &mut draft, 8) };
        let grown = grow(&costs, ALONE, vec![alone]).remove(0);
        assert_eq!(grown.tree.tokens[0].0, 10);
        assert_eq!(grown.tree.parents, TokenTree::chain_parents(grown.tree.len()));
    }

    #[test]
    fn a_draft_rests_where_a_sure_token_would_not_pay_beside_the_others() {
        let grown = |others: usize| {
            let costs = costs(&[(1, 3.0), (2, 3.3), (8, 6.3), (16, 11.4), (32, 22.0)], 0.3);
            let (mut pacer, mut sure) = (awake(), Sure(0.99));
            let load = Load { rows: others + 1, sequences: others + 1 };
            let nodes = grow(&costs, load, vec![seed(&mut pacer, &mut sure, 4)])[0].tree.len();
            (nodes, pacer.is_paused())
        };
        assert_eq!(grown(7), (0, true));
        let (nodes, paused) = grown(0);
        assert!(nodes > 0 && !paused);
    }

    /// Nodes of each of so many sequences that are planned together, beside other rows.
    fn nodes(costs: &Costs, sequences: usize, other_rows: usize, probability: f32) -> Vec<usize> {
        let mut pacers: Vec<Pacer> = (0..sequences).map(|_| awake()).collect();
        let mut drafts: Vec<Sure> = (0..sequences).map(|_| Sure(probability)).collect();
        let load = Load { rows: sequences + other_rows, sequences };
        let seeds = pacers.iter_mut().zip(&mut drafts).map(|(p, d)| seed(p, d, 8)).collect();
        grow(costs, load, seeds).iter().map(|g| g.tree.len()).collect()
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
            let (mut pacer, mut draft) = (Pacer::new(rates), Sure(0.9));
            for _ in 0..16 {
                let grown = grow(&costs, ALONE, vec![seed(&mut pacer, &mut draft, 8)]).remove(0);
                proposed += usize::from(!grown.tree.is_empty());
                let pass_ms = costs.verify(grown.tree.len() + 1);
                let elapsed_ms = pass_ms + grown.draft_steps as f32 * 0.3;
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
