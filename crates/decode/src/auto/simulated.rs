//! Automatic plans on simulated machines: what a target's passes and a draft's steps take is a function, what the draft
//! gets right is drawn. Nothing here looks at a clock, so the speeds are exact.

use draftsmith_kernels::Cpu;

use super::*;
use crate::costs::Ledger;

/// A number in 0..1 that belongs to these.
fn drawn(keys: &[u64]) -> f32 {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for key in keys {
        x = (x ^ key.wrapping_mul(0xff51_afd7_ed55_8ccd)).rotate_left(29).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^= x >> 32;
    }
    (x >> 40) as f32 / (1u64 << 24) as f32
}

/// A draft: how sure it is at a place of the text, and whether it is right.
#[derive(Clone, Copy)]
struct Made {
    /// Exponent over the drawn probability: the larger, the worse the draft.
    worse: f32,
    /// What a further level takes off.
    decay: f32,
    seed: u64,
}

impl Made {
    /// Probability of the best token at a place, drafted `depth` levels below the text.
    fn sure(&self, place: u64, depth: usize) -> f32 {
        drawn(&[self.seed, place]).powf(self.worse) * self.decay.powi(depth as i32)
    }

    fn is_right(&self, place: u64, depth: usize) -> bool {
        drawn(&[self.seed, place, 7]) < self.sure(place, depth)
    }
}

/// The token of the text at a place, and one that never is.
fn token(place: u64, right: bool) -> u32 {
    2 * place as u32 + u32::from(!right)
}

/// Handle = place below the root, with a bit for being on the text.
struct Drafting {
    made: Made,
    root: u64,
    /// Levels of a pass that gives all it has; 1: a pass for each level, of any number.
    levels: usize,
}

struct DraftingSession {
    nodes: Vec<(u64, bool)>,
}

impl DrafterSession<Cpu> for DraftingSession {
    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

impl Drafting {
    fn children(&self, place: u64, on_text: bool) -> Children {
        let next = place + 1;
        let depth = (place - self.root) as usize;
        let sure = self.made.sure(next, depth);
        let right = on_text && self.made.is_right(next, depth);
        // The second guess is right in a third of what is left.
        let second = on_text && !right && drawn(&[self.made.seed, next, 9]) < 1.0 / 3.0;
        vec![
            (token(next, right), sure.ln()),
            (token(next, second) + 1_000_000 * u32::from(!second), ((1.0 - sure) / 3.0).ln()),
        ]
    }
}

impl Drafter<Cpu> for Drafting {
    fn target_layers(&self) -> &[draftsmith_core::LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        Box::new(DraftingSession { nodes: Vec::new() })
    }
    fn take_in(&self, _: &mut [crate::Committed<'_, Cpu>]) {}
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        asks.iter().map(|_| self.children(self.root, true)).collect()
    }
    fn expand(&self, asks: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        let mut found = Vec::new();
        for node in nodes {
            let session = asks[node.of].session.as_any_mut().downcast_mut::<DraftingSession>().unwrap();
            let (place, on_text) = node.parent.map_or((self.root, true), |p| session.nodes[p as usize]);
            let right = on_text && node.token == token(place + 1, true);
            session.nodes.push((place + 1, right));
            found.push((session.nodes.len() as u32 - 1, self.children(place + 1, right)));
        }
        found
    }
    fn levels_per_pass(&self) -> usize {
        self.levels
    }
    fn deepest(&self) -> usize {
        if self.levels > 1 { self.levels } else { usize::MAX }
    }
}

/// A machine, by what things take on it.
struct Sim {
    real: Costs,
    /// Factor over time, by the tokens committed so far.
    load: fn(u64) -> f32,
    /// Share by which passes differ, and every twentieth one is held up by so much.
    noise: f32,
    made: Made,
    levels: usize,
}

/// Share of a pass of several sequences that proposals cost beside what is known.
const UNSEEN: f32 = 0.02;
const TOKENS: u64 = 3000;
/// Tokens of an answer.
const ANSWER: u64 = 100;

impl Sim {
    fn pass(&self, rows: usize, at: u64, step: u64) -> f32 {
        let noise = 1.0 + self.noise * (drawn(&[step, 1]) - 0.5);
        let held_up = if drawn(&[step, 2]) < 0.05 { 1.0 + 4.0 * self.noise } else { 1.0 };
        self.real.verify(rows) * (self.load)(at) * noise * held_up
    }

    /// Milliseconds for all tokens with a chain.
    fn chain(&self, depth: usize) -> f32 {
        let (mut place, mut time, mut step) = (0u64, 0.0, 0u64);
        while place < TOKENS {
            let kept = (0..depth).take_while(|d| self.made.is_right(place + 1 + *d as u64, *d)).count();
            let drafting = match depth {
                0 => 0.0,
                _ if self.levels > 1 => self.real.extend_ms,
                _ => self.real.extend_ms + (depth - 1) as f32 * self.real.draft_step_ms,
            };
            time += self.pass(1 + depth, place, step) + drafting * (self.load)(place);
            place += kept as u64 + 1;
            step += 1;
        }
        time
    }

    /// The same with an automatic plan that was told these costs, and whether they were found to be off.
    fn auto(&self, measured: &Costs) -> (f32, bool) {
        let (mut place, mut time, mut step) = (0u64, 0.0, 0u64);
        let (mut ledger, mut rates, mut off) = (Ledger::default(), Rates::default(), false);
        while place < TOKENS {
            let mut pacer = Pacer::new(rates);
            let end = place + ANSWER;
            while place < end {
                let costs = ledger.corrected(measured);
                let drafting = self.drafting(place);
                let mut session = DraftingSession { nodes: Vec::new() };
                let seed = Seed {
                    pacer: &mut pacer,
                    session: Some(&mut session),
                    repetition: None,
                    lookup: None,
                    text: &[1],
                    room: 31,
                    sampling: &Sampling::GREEDY,
                };
                let load = Load { rows: 1, sequences: 1 };
                let grown = grow(&costs, load, Some(&drafting), vec![seed]).remove(0);
                let accepted = right(&grown, place);
                let rows = 1 + grown.tree.len();
                let pass_ms = self.pass(rows, place, step);
                let load = (self.load)(place);
                let extend = if grown.root_share > 0.0 { self.real.extend_ms * load } else { 0.0 };
                let elapsed_ms = pass_ms + extend + grown.draft_steps * self.real.draft_step_ms * load;
                off |= ledger.pass(measured, rows, pass_ms).is_some();
                if grown.draft_steps > 0.0 {
                    ledger.draft_step(measured, self.real.draft_step_ms * load);
                }
                if extend > 0.0 {
                    ledger.extend(measured, extend);
                }
                let committed = accepted.len() + 1;
                let costs = ledger.corrected(measured);
                pacer.learn(&costs, &grown, &accepted, committed, StepTime { elapsed_ms, pass_ms });
                time += elapsed_ms;
                place += committed as u64;
                step += 1;
            }
            rates = pacer.rates().clone();
        }
        (time, off)
    }

    /// Speed of an automatic plan over that of the best chain, no chain among them, and that one's over plain decoding.
    fn over_best(&self, measured: &Costs) -> (f32, f32, usize) {
        let most = if self.levels > 1 { self.levels + 1 } else { 8 };
        let chains: Vec<f32> = (0..most).map(|depth| self.chain(depth)).collect();
        let best = (0..most).min_by(|a, b| chains[*a].total_cmp(&chains[*b])).unwrap();
        (chains[best] / self.auto(measured).0, chains[0] / chains[best], best)
    }

    /// Speed of `count` sequences at once with an automatic plan over plain decoding of as many.
    fn together(&self, count: usize) -> f32 {
        let costs = &self.real;
        let mut pacers: Vec<Pacer> = (0..count).map(|_| Pacer::new(Rates::default())).collect();
        let mut places: Vec<u64> = (0..count as u64).map(|of| 100_000 * of).collect();
        let (mut time, mut plain) = (0.0, 0.0);
        for step in 0..600 {
            if step % 60 == 0 && step > 0 {
                let next = |pacer: &Pacer| Pacer::new(pacer.rates().clone());
                pacers = pacers.iter().map(next).collect();
            }
            let drafting = Many { each: places.iter().map(|root| self.drafting(*root)).collect() };
            let mut sessions: Vec<ManySession> =
                (0..count).map(|of| ManySession { of, own: DraftingSession { nodes: Vec::new() } }).collect();
            let seeds = pacers.iter_mut().zip(&mut sessions).map(|(pacer, session)| Seed {
                pacer,
                session: Some(session),
                repetition: None,
                lookup: None,
                text: &[1],
                room: 31,
                sampling: &Sampling::GREEDY,
            });
            let load = Load { rows: count, sequences: count };
            let grown = grow(costs, load, Some(&drafting), seeds.collect());
            let rows = count + grown.iter().map(|g| g.tree.len()).sum::<usize>();
            let asked = grown.iter().filter(|g| g.root_share > 0.0).count();
            let steps: f32 = grown.iter().map(|g| g.draft_steps).sum();
            let pass_ms = costs.verify(rows);
            let elapsed_ms = pass_ms + costs.root_pass(asked) + steps * costs.draft_step_ms;
            // Beside what costs know, a step with proposals takes somewhat longer.
            time += elapsed_ms + if asked > 0 { UNSEEN * pass_ms } else { 0.0 };
            for ((grown, pacer), place) in grown.iter().zip(&mut pacers).zip(&mut places) {
                let accepted = right(grown, *place);
                let committed = accepted.len() + 1;
                pacer.learn(costs, grown, &accepted, committed, StepTime { elapsed_ms, pass_ms });
                *place += committed as u64;
                plain += committed as f32 * costs.verify(count) / count as f32;
            }
        }
        plain / time
    }

    fn drafting(&self, root: u64) -> Drafting {
        Drafting { made: self.made, root, levels: self.levels }
    }
}

/// The nodes of a proposal that the text goes on with.
fn right(grown: &Grown, place: u64) -> Vec<u32> {
    let (mut accepted, mut node) = (Vec::new(), None);
    while let Some(next) = (0..grown.tree.len()).find(|i| {
        grown.tree.parents[*i] == node
            && grown.tree.tokens[*i].0 == token(place + 1 + accepted.len() as u64, true)
    }) {
        accepted.push(next as u32);
        node = Some(next as u32);
    }
    accepted
}

/// Several sequences' drafts as one.
struct Many {
    each: Vec<Drafting>,
}

struct ManySession {
    of: usize,
    own: DraftingSession,
}

impl DrafterSession<Cpu> for ManySession {
    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

impl Drafter<Cpu> for Many {
    fn target_layers(&self) -> &[draftsmith_core::LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        unreachable!("sessions are made by hand")
    }
    fn take_in(&self, _: &mut [crate::Committed<'_, Cpu>]) {}
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        let of = |ask: &mut Ask<'_, Cpu>| ask.session.as_any_mut().downcast_mut::<ManySession>().unwrap().of;
        asks.iter_mut().map(of).map(|of| self.each[of].children(self.each[of].root, true)).collect()
    }
    fn expand(&self, asks: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        let one = |node: &Node| {
            let session = asks[node.of].session.as_any_mut().downcast_mut::<ManySession>().unwrap();
            let drafting = &self.each[session.of];
            let nodes = &mut session.own.nodes;
            let (place, on_text) = node.parent.map_or((drafting.root, true), |p| nodes[p as usize]);
            let right = on_text && node.token == token(place + 1, true);
            nodes.push((place + 1, right));
            (nodes.len() as u32 - 1, drafting.children(place + 1, right))
        };
        nodes.iter().map(one).collect()
    }
    fn levels_per_pass(&self) -> usize {
        self.each[0].levels
    }
    fn deepest(&self) -> usize {
        self.each[0].deepest()
    }
}

fn costs(verify: &[(usize, f32)], draft_step_ms: f32, extend_ms: f32) -> Costs {
    Costs { verify_ms: verify.to_vec(), draft_step_ms, extend_ms, ..Costs::default() }
}

/// A 1.5B target on two cores.
fn large() -> Costs {
    costs(&[(1, 44.6), (2, 44.9), (4, 45.5), (8, 57.0), (16, 103.0), (32, 190.0)], 1.4, 2.0)
}

/// The same where memory is fast for its cores: a row costs nearly what a sequence does.
fn wide() -> Costs {
    let verify = [
        (1, 37.8),
        (2, 38.1),
        (4, 39.5),
        (6, 45.2),
        (8, 52.7),
        (12, 75.9),
        (16, 97.1),
        (24, 144.0),
        (32, 192.6),
    ];
    Costs { draft_row_ms: 0.05, extend_row_ms: 0.1, ..costs(&verify, 0.39, 0.6) }
}

/// A 135M target: a draft step is a large part of a pass.
fn small() -> Costs {
    costs(&[(1, 4.0), (2, 4.3), (4, 4.9), (8, 6.0), (16, 10.5), (32, 20.0)], 0.6, 0.8)
}

fn calm(_: u64) -> f32 {
    1.0
}

/// A neighbour comes and goes.
fn neighbour(at: u64) -> f32 {
    if (at / 700).is_multiple_of(2) { 1.0 } else { 1.7 }
}

const DRAFTS: [f32; 4] = [0.4, 1.0, 2.0, 5.0];

/// Compares, and notes what falls short.
#[derive(Default)]
struct Checks {
    lines: String,
    short: usize,
}

impl Checks {
    fn check(&mut self, name: &str, sim: &Sim, measured: &Costs, least: f32) {
        let (share, speedup, best) = sim.over_best(measured);
        let short = share < least;
        self.short += usize::from(short);
        let mark = if short { "  SHORT" } else { "" };
        self.lines += &format!("{name}: {share:.3} of chain {best}, which is {speedup:.2}x{mark}\n");
    }

    #[track_caller]
    fn end(self) {
        assert!(self.short == 0, "\n{}", self.lines);
    }
}

#[test]
fn automatic_plans_reach_the_best_chain() {
    let mut checks = Checks::default();
    for (name, real) in [("large", large()), ("small", small())] {
        for worse in DRAFTS {
            for (load, noise) in [(calm as fn(u64) -> f32, 0.02), (neighbour, 0.3)] {
                for seed in [3, 4] {
                    let made = Made { worse, decay: 0.93, seed };
                    let sim = Sim { real: real.clone(), load, noise, made, levels: 1 };
                    checks.check(&format!("{name}, draft {worse}, noise {noise}"), &sim, &real, 0.97);
                }
            }
        }
    }
    checks.end();
}

#[test]
fn costs_of_a_disturbed_measurement_are_made_good() {
    // Only two sizes, the second floored to the first: every row looked free.
    let flat = costs(&[(1, 90.0), (2, 90.0)], 1.4, 2.0);
    // Every size held up in its own way.
    let disturbed = costs(&[(1, 90.0), (2, 91.0), (4, 92.0), (8, 95.0), (16, 110.0)], 4.0, 6.0);
    let mut checks = Checks::default();
    for worse in DRAFTS {
        for (name, measured) in [("flat", &flat), ("disturbed", &disturbed)] {
            let made = Made { worse, decay: 0.93, seed: 5 };
            let sim = Sim { real: large(), load: calm, noise: 0.05, made, levels: 1 };
            checks.check(&format!("{name}, draft {worse}"), &sim, &measured.clone().sound(), 0.95);
        }
    }
    checks.end();
    let made = Made { worse: 1.0, decay: 0.93, seed: 5 };
    let sim = Sim { real: large(), load: calm, noise: 0.05, made, levels: 1 };
    assert!(sim.auto(&disturbed.sound()).1, "it is told that the costs are off");
    assert!(!sim.auto(&large()).1, "and not where they are right");
    let busy = Sim { load: neighbour, noise: 0.3, ..sim };
    assert!(!busy.auto(&large()).1, "nor where the machine is busy now");
}

/// What an ordinary model takes that drafts for a target: a large part of its pass, and little for further rows.
fn with_small(target: Costs, share: f32) -> Costs {
    let step = share * target.verify(1);
    Costs {
        draft_step_ms: step,
        extend_ms: 1.05 * step,
        draft_row_ms: 0.03 * step,
        extend_row_ms: 0.06 * step,
        ..target
    }
}

#[test]
fn a_draft_whose_step_is_a_quarter_of_a_pass_is_used_where_it_pays() {
    let mut checks = Checks::default();
    for (name, target) in [("large", large()), ("small", small())] {
        for share in [0.1, 0.25, 0.5, 1.0] {
            let real = with_small(target.clone(), share);
            for worse in [0.15, 0.4, 1.0, 2.0] {
                let made = Made { worse, decay: 0.98, seed: 6 };
                let sim = Sim { real: real.clone(), load: calm, noise: 0.05, made, levels: 1 };
                // Of a draft that is nearly always right it learns how deep to go while it goes.
                let least = if worse < 0.2 { 0.95 } else { 0.97 };
                checks.check(&format!("{name}, step {share} of a pass, draft {worse}"), &sim, &real, least);
            }
        }
    }
    checks.end();
}

#[test]
fn a_block_is_paid_once_and_taken_as_far_as_it_pays() {
    let mut checks = Checks::default();
    for (name, target) in [("large", large()), ("small", small())] {
        for (levels, share) in [(4, 0.05), (8, 0.1), (16, 0.3)] {
            // What is asked for below the first level is there already.
            let extend_ms = share * target.verify(1);
            let real = Costs { extend_ms, draft_step_ms: 0.0, ..target.clone() };
            for worse in DRAFTS {
                for decay in [0.93, 0.8] {
                    let made = Made { worse, decay, seed: 8 };
                    let sim = Sim { real: real.clone(), load: calm, noise: 0.05, made, levels };
                    checks.check(
                        &format!("{name}, {levels} levels, draft {worse}, {decay}"),
                        &sim,
                        &real,
                        0.97,
                    );
                }
            }
        }
    }
    checks.end();
}

#[test]
fn several_sequences_are_never_slower_than_without_a_draft() {
    let (mut lines, mut short) = (String::new(), 0);
    for (name, real, levels) in [
        ("chain", large(), 1),
        ("chain on fast memory", wide(), 1),
        ("chain on a small target", Costs { draft_row_ms: 0.1, extend_row_ms: 0.15, ..small() }, 1),
        ("small model", with_small(large(), 0.3), 1),
        ("block", Costs { extend_ms: 3.0, extend_row_ms: 0.8, draft_step_ms: 0.0, ..large() }, 7),
        (
            "block on a small target",
            Costs { extend_ms: 0.8, extend_row_ms: 0.2, draft_step_ms: 0.0, ..small() },
            7,
        ),
    ] {
        for worse in [0.15, 0.4, 1.0, 2.0, 5.0] {
            for count in [2, 4, 8, 16] {
                let made = Made { worse, decay: 0.93, seed: 9 };
                let sim = Sim { real: real.clone(), load: calm, noise: 0.0, made, levels };
                let speedup = sim.together(count);
                short += usize::from(speedup < 0.98);
                lines += &format!("{name}, draft {worse}, {count} sequences: {speedup:.3}\n");
            }
        }
    }
    assert!(short == 0, "\n{lines}");
    // Where rows are nearly free, all of them gain.
    let made = Made { worse: 0.15, decay: 0.98, seed: 9 };
    let sim = Sim { real: with_small(large(), 0.1), load: calm, noise: 0.0, made, levels: 1 };
    assert!(sim.together(2) > 1.3, "{}", sim.together(2));
}
