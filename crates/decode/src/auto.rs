//! How much to draft, decided by cost.
//!
//! A draft token is worth verifying while (probability that it is accepted) x (time that an accepted token saves)
//! exceeds what one more row of the target's pass costs; growing the draft one node further must pay its own step as
//! well. Costs are measured on this machine ([`Costs`]), probabilities are the sources' own, corrected by how often
//! such proposals were accepted before ([`Rates`]).
//!
//! The choice changes time, never the text.

use draftsmith_core::{Sampling, TargetTokenId, TokenTree};
use draftsmith_kernels::Kernels;

use crate::drafter::DrafterSession;
use crate::lookup::Match;

/// Measured costs of an engine in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Target passes: pairs of rows and time, by rows ascending, the first for one row.
    pub verify_ms: Vec<(usize, f32)>,
    /// One more draft step of one row; 0 without a draft.
    pub draft_step_ms: f32,
    /// Taking the features of one step into the draft; 0 without a draft.
    pub extend_ms: f32,
}

impl Costs {
    /// Time of a pass of `rows`, interpolated between measured sizes and extended past the last.
    pub(crate) fn verify(&self, rows: usize) -> f32 {
        let points = &self.verify_ms;
        let at = points.partition_point(|(r, _)| *r < rows);
        match (points.get(at.wrapping_sub(1)), points.get(at)) {
            (_, Some((r, ms))) if *r == rows => *ms,
            (Some((r0, t0)), Some((r1, t1))) => t0 + (t1 - t0) * (rows - r0) as f32 / (r1 - r0) as f32,
            (Some((r1, t1)), None) => {
                let (r0, t0) = if at >= 2 { points[at - 2] } else { (0, 0.0) };
                t1 + (t1 - t0) / (r1 - r0) as f32 * (rows - r1) as f32
            }
            (None, Some((r, ms))) => ms * rows as f32 / *r as f32,
            (None, None) => 0.0,
        }
    }

    /// The smallest price of a row beyond `rows`, averaged up to any of the measured sizes.
    fn cheapest_row(&self, rows: usize) -> f32 {
        let now = self.verify(rows);
        let more = |r: usize| (self.verify(r) - now).max(0.0) / (r - rows) as f32;
        let sizes = self.verify_ms.iter().map(|(r, _)| *r).filter(|r| *r > rows);
        sizes.map(more).fold(more(rows + 1), f32::min)
    }
}

/// What made a node be proposed, as a class whose acceptance is counted.
type Class = u8;

/// Classes of the draft's probability.
const DRAFT_CLASSES: usize = 12;
/// Classes of a repetition: four lengths, its first token or a later one.
const LOOKUP_CLASSES: usize = 8;
/// Trials that the prior counts for.
const PRIOR_TRIALS: f32 = 4.0;
/// Trials after which older ones fade.
const MEMORY: f32 = 256.0;

fn draft_class(probability: f32) -> Class {
    ((probability * DRAFT_CLASSES as f32) as usize).min(DRAFT_CLASSES - 1) as Class
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

/// How often proposals of each class were accepted, given that their parent was.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    counts: [(f32, f32); DRAFT_CLASSES + LOOKUP_CLASSES],
    /// Chance that the best child of a node is accepted, over all nodes that were expanded.
    child: (f32, f32),
    /// Milliseconds of a plain step of one sequence as it really goes; `None` before the first.
    plain_ms: Option<f32>,
}

impl Default for Rates {
    fn default() -> Rates {
        let mut counts = [(0.0, PRIOR_TRIALS); DRAFT_CLASSES + LOOKUP_CLASSES];
        for (i, (hits, trials)) in counts.iter_mut().enumerate() {
            // A draft is believed at first; a repetition more the longer it is.
            let prior = if i < DRAFT_CLASSES {
                (i as f32 + 0.5) / DRAFT_CLASSES as f32
            } else {
                [0.2, 0.5, 0.3, 0.6, 0.5, 0.8, 0.7, 0.9][i - DRAFT_CLASSES]
            };
            *hits = prior * *trials;
        }
        Rates { counts, child: (0.5 * PRIOR_TRIALS, PRIOR_TRIALS), plain_ms: None }
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
    draft_steps: usize,
    /// Rows of the other sequences of the step.
    others: usize,
}

/// Nodes of a proposal at most.
pub(crate) const MOST_NODES: usize = 32;
/// Children of a node that are considered.
const CHILDREN: usize = 4;
/// Steps over which gain and pace are averaged.
const WINDOW: f32 = 24.0;
/// Plain steps at the very start, to know what a token costs without a draft.
const FIRST_LOOK: usize = 6;
/// The same at the start of later sequences: what was measured just after loading is too slow for long.
const NEXT_LOOK: usize = 2;
/// First pause of an unprofitable draft, in steps; doubles each time up to [`LONGEST_PAUSE`].
const PAUSE: usize = 48;
const LONGEST_PAUSE: usize = 1024;

/// The running decision of one sequence.
#[derive(Debug)]
pub(crate) struct Pacer {
    rates: Rates,
    /// Average milliseconds per token, the price of time.
    pace_ms: f32,
    /// Average milliseconds that the draft saved per step; negative: it costs more than it brings.
    gain_ms: f32,
    /// Steps until the draft is tried again.
    paused: usize,
    next_pause: usize,
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

impl Pacer {
    pub(crate) fn new(costs: &Costs, rates: Rates) -> Pacer {
        let paused = if rates.plain_ms.is_none() { FIRST_LOOK } else { NEXT_LOOK };
        let pace_ms = rates.plain_ms.unwrap_or_else(|| costs.verify(1));
        Pacer { rates, pace_ms, gain_ms: 0.0, paused, next_pause: PAUSE }
    }

    /// What was learnt, for the next sequence.
    pub(crate) fn rates(&self) -> &Rates {
        &self.rates
    }

    /// True while the draft is left out; its features are only collected.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused > 0
    }

    /// A proposal of at most `room` levels, verified together with `others` rows of other sequences.
    #[expect(clippy::too_many_arguments, reason = "everything that a proposal depends on")]
    pub(crate) fn grow<K: Kernels>(
        &mut self,
        costs: &Costs,
        mut drafter: Option<&mut (dyn DrafterSession<K> + '_)>,
        repetition: Option<Match>,
        text: &[u32],
        room: usize,
        others: usize,
        sampling: &Sampling,
    ) -> Grown {
        let mut grown = Grown { others, ..Grown::default() };
        let position = text.len() as u64 - 1;
        let plain = self.plain_token(costs, others);
        let price = if others == 0 { self.pace_ms.min(plain) } else { plain };
        let cheapest = costs.cheapest_row(others + 1);
        if others > 0 && price <= cheapest + costs.draft_step_ms {
            // At this load not even a sure token would pay: rest until the next look.
            self.paused = self.paused.max(2);
        }
        if self.paused > 0 {
            drafter = None;
        }
        let mut candidates: Vec<Candidate> = Vec::new();
        if room > 0 {
            let children = match drafter.as_deref_mut() {
                Some(d) => d.children(None, CHILDREN, sampling, position),
                None => Vec::new(),
            };
            if !children.is_empty() {
                grown.expanded.push(None);
            }
            self.offer(&mut candidates, &children, None, None, 0, 1.0);
            self.repeat(&mut candidates, repetition, text, None, 0, 1.0);
        }
        // Per number of nodes: expected gain of the proposal.
        let mut value = 0.0f32;
        let mut best = (0.0f32, 0usize);
        while grown.tree.len() < MOST_NODES {
            let Some(at) = (0..candidates.len())
                .max_by(|a, b| candidates[*a].path.total_cmp(&candidates[*b].path).then(b.cmp(a)))
            else {
                break;
            };
            let c = candidates.swap_remove(at);
            if c.path * price <= cheapest {
                break;
            }
            let rows = others + 1 + grown.tree.len();
            value += c.path * price - (costs.verify(rows + 1) - costs.verify(rows));
            let node = grown.tree.push(TargetTokenId(c.token), c.parent);
            grown.classes.push(c.classes);
            if value > best.0 {
                best = (value, grown.tree.len());
            }
            if c.depth + 1 >= room {
                continue;
            }
            let child = c.path * self.rates.child.0 / self.rates.child.1;
            let worth_a_step = child * price > costs.draft_step_ms + cheapest;
            if let (Some(d), true, true) = (drafter.as_deref_mut(), c.drafted, worth_a_step) {
                let handle = d.expand(c.parent_handle, c.token, c.depth);
                grown.draft_steps += 1;
                grown.expanded.push(Some(node));
                let children = d.children(Some(handle), CHILDREN, sampling, position + c.depth as u64 + 1);
                self.offer(&mut candidates, &children, Some(node), Some(handle), c.depth + 1, c.path);
            }
            let next = c.repeats.map(|m| Match { at: m.at + 1, ..m });
            self.repeat(&mut candidates, next, text, Some(node), c.depth + 1, c.path);
        }
        // Nodes were added best first and parents before children, so a prefix is a proposal of its own.
        grown.tree.tokens.truncate(best.1);
        grown.tree.parents.truncate(best.1);
        grown.classes.truncate(best.1);
        grown.expanded.retain(|n| n.is_none_or(|n| (n as usize) < best.1));
        grown
    }

    /// Adds the draft's children of a node.
    fn offer(
        &self,
        candidates: &mut Vec<Candidate>,
        children: &[(u32, f32)],
        parent: Option<u32>,
        parent_handle: Option<u32>,
        depth: usize,
        path: f32,
    ) {
        for (token, probability) in children {
            let class = draft_class(*probability);
            candidates.push(Candidate {
                token: *token,
                parent,
                parent_handle,
                drafted: true,
                depth,
                path: path * self.rates.rate(class),
                classes: [Some(class), None],
                repeats: None,
            });
        }
    }

    /// Adds the token that a repetition goes on with; joined to the draft's node if both propose it.
    fn repeat(
        &self,
        candidates: &mut Vec<Candidate>,
        repetition: Option<Match>,
        text: &[u32],
        parent: Option<u32>,
        depth: usize,
        path: f32,
    ) {
        let Some((m, token)) = repetition.and_then(|m| Some((m, *text.get(m.at)?))) else { return };
        let class = lookup_class(m.length, depth == 0);
        let rate = self.rates.rate(class);
        if let Some(same) = candidates.iter_mut().find(|c| c.parent == parent && c.token == token) {
            let own = same.path / path.max(f32::MIN_POSITIVE);
            same.path = path * (1.0 - (1.0 - own) * (1.0 - rate));
            same.classes[1] = Some(class);
            same.repeats = Some(m);
        } else {
            candidates.push(Candidate {
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

    /// Milliseconds per token of plain decoding beside `others` rows: what an accepted token saves.
    fn plain_token(&self, costs: &Costs, others: usize) -> f32 {
        match self.rates.plain_ms {
            Some(ms) if others == 0 => ms,
            _ => costs.verify(others + 1) / (others + 1) as f32,
        }
    }

    /// Learns from the step that verified `grown`, committed `committed` tokens and took `elapsed_ms` in all.
    pub(crate) fn learn(
        &mut self,
        costs: &Costs,
        grown: &Grown,
        accepted: &[u32],
        committed: usize,
        elapsed_ms: f32,
    ) {
        self.rates.learn(grown, accepted);
        let paused = self.paused > 0;
        let plain = self.plain_token(costs, grown.others);
        let extra = if grown.others == 0 {
            // What really happened: caches, other programs and the text side are in it.
            elapsed_ms - plain
        } else {
            let drafting = if paused || costs.draft_step_ms == 0.0 {
                0.0
            } else {
                costs.extend_ms + grown.draft_steps as f32 * costs.draft_step_ms
            };
            costs.verify(grown.others + 1 + grown.tree.len()) - costs.verify(grown.others + 1) + drafting
        };
        let committed = committed.max(1) as f32;
        self.pace_ms += ((plain + extra) / committed - self.pace_ms) / WINDOW;
        if paused {
            self.paused -= 1;
            if grown.others == 0 && grown.tree.is_empty() {
                let known = self.rates.plain_ms.get_or_insert(elapsed_ms);
                // Fast steps count for more: a draft has to win against plain decoding at its best, and a step that
                // something else held up says little.
                let weight = if elapsed_ms < *known { 0.4 } else { 1.0 / WINDOW };
                *known += (elapsed_ms.min(1.5 * *known) - *known) * weight;
            }
            return;
        }
        self.gain_ms += ((committed - 1.0) * plain - extra.min(4.0 * plain) - self.gain_ms) / WINDOW;
        // Half a window of steps that lose 4 % each.
        if self.gain_ms < -0.02 * plain && costs.draft_step_ms > 0.0 {
            self.paused = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
            self.gain_ms = 0.0;
        } else if self.gain_ms > 0.05 * plain {
            self.next_pause = PAUSE;
        }
    }
}

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

    /// One that knows the price of a plain step.
    fn awake(costs: &Costs) -> Pacer {
        let rates = Rates { plain_ms: Some(costs.verify(1)), ..Rates::default() };
        Pacer { paused: 0, ..Pacer::new(costs, rates) }
    }

    fn grown(costs: &Costs, probability: f32, room: usize) -> usize {
        let mut pacer = awake(costs);
        let mut draft = Sure(probability);
        let session: &mut dyn DrafterSession<Cpu> = &mut draft;
        pacer.grow(costs, Some(session), None, &[1, 2, 3], room, 0, &Sampling::GREEDY).tree.len()
    }

    #[test]
    fn costs_are_interpolated_and_extended() {
        let costs = costs(&[(1, 4.0), (2, 5.0), (4, 6.0)], 0.0);
        assert_eq!([1, 2, 3, 4, 6].map(|m| costs.verify(m)), [4.0, 5.0, 5.5, 6.0, 7.0]);
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
        let mut pacer = awake(&costs);
        let mut draft = Sure(0.9);
        let (mut proposed, mut paused) = (0, 0);
        for _ in 0..1000 {
            let session: &mut dyn DrafterSession<Cpu> = &mut draft;
            let grown = pacer.grow(&costs, Some(session), None, &[1, 2, 3], 8, 0, &Sampling::GREEDY);
            proposed += usize::from(!grown.tree.is_empty());
            paused += usize::from(pacer.is_paused());
            let time = costs.verify(grown.tree.len() + 1) + grown.draft_steps as f32 * 0.3;
            pacer.learn(&costs, &grown, &[], 1, time);
        }
        assert!(proposed < 100, "{proposed} proposals of a draft that is always wrong");
        assert!(paused > 800 && paused < 1000, "{paused}");
    }

    #[test]
    fn a_repetition_is_joined_to_the_draft_and_followed_alone() {
        let costs = costs(&[(1, 4.0), (8, 4.4), (32, 8.0)], 0.1);
        let mut pacer = awake(&costs);
        // After 7, 8 came 10, 50, 51; the draft says 10 as well, then 11.
        let text = [7, 8, 10, 50, 51, 9, 7, 8];
        let mut draft = Sure(0.9);
        let session: &mut dyn DrafterSession<Cpu> = &mut draft;
        let m = Match { at: 2, length: 4 };
        let grown = pacer.grow(&costs, Some(session), Some(m), &text, 8, 0, &Sampling::GREEDY);
        let tree = &grown.tree;
        assert_eq!(tree.tokens.iter().filter(|t| t.0 == 10).count(), 1);
        let branch = tree.tokens.iter().position(|t| t.0 == 50).expect("the repetition goes on");
        let parent = tree.parents[branch].expect("below the joined node") as usize;
        assert_eq!(tree.tokens[parent].0, 10);
        assert!(tree.validate().is_ok());
        // Without a draft the repetition is a chain.
        let grown = pacer.grow::<Cpu>(&costs, None, Some(m), &text, 8, 0, &Sampling::GREEDY);
        assert_eq!(grown.tree.tokens[0].0, 10);
        assert_eq!(grown.tree.parents, TokenTree::chain_parents(grown.tree.len()));
    }

    #[test]
    fn a_draft_rests_where_a_sure_token_would_not_pay_beside_the_others() {
        let text = [1, 2, 3];
        let grow = |others: usize| {
            let costs = costs(&[(1, 3.0), (2, 3.3), (8, 6.3), (16, 11.4), (32, 22.0)], 0.3);
            let mut pacer = awake(&costs);
            let mut sure = Sure(0.99);
            let grown = pacer.grow(&costs, Some(&mut sure), None, &text, 4, others, &Sampling::GREEDY);
            (grown.tree.len(), pacer.is_paused())
        };
        assert_eq!(grow(7), (0, true));
        let (nodes, paused) = grow(0);
        assert!(nodes > 0 && !paused);
    }
}
