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
}

/// A machine, by what things take on it.
struct Sim {
    real: Costs,
    /// Factor over time, by the tokens committed so far.
    load: fn(u64) -> f32,
    /// Share by which passes differ, and every twentieth one is held up by so much.
    noise: f32,
    made: Made,
}

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
                let drafting = Drafting { made: self.made, root: place };
                let mut session = DraftingSession { nodes: Vec::new() };
                let slept = pacer.is_paused();
                let seed = Seed {
                    pacer: &mut pacer,
                    session: Some(&mut session),
                    repetition: None,
                    text: &[1],
                    room: 31,
                    sampling: &Sampling::GREEDY,
                };
                let load = Load { rows: 1, sequences: 1 };
                let grown = grow(&costs, load, Some(&drafting), vec![seed]).remove(0);
                let (mut accepted, mut node) = (Vec::new(), None);
                while let Some(next) = (0..grown.tree.len()).find(|i| {
                    grown.tree.parents[*i] == node
                        && grown.tree.tokens[*i].0 == token(place + 1 + accepted.len() as u64, true)
                }) {
                    accepted.push(next as u32);
                    node = Some(next as u32);
                }
                let rows = 1 + grown.tree.len();
                let pass_ms = self.pass(rows, place, step);
                let load = (self.load)(place);
                let extend = if slept { 0.0 } else { self.real.extend_ms * load };
                let elapsed_ms = pass_ms + extend + grown.draft_steps * self.real.draft_step_ms * load;
                off |= ledger.pass(measured, rows, pass_ms).is_some();
                if grown.draft_steps > 0.0 {
                    ledger.draft_step(measured, self.real.draft_step_ms * load);
                }
                if !slept {
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
        let chains: Vec<f32> = (0..8).map(|depth| self.chain(depth)).collect();
        let best = (0..8).min_by(|a, b| chains[*a].total_cmp(&chains[*b])).unwrap();
        (chains[best] / self.auto(measured).0, chains[0] / chains[best], best)
    }
}

fn costs(verify: &[(usize, f32)], draft_step_ms: f32, extend_ms: f32) -> Costs {
    Costs { verify_ms: verify.to_vec(), draft_step_ms, extend_ms }
}

/// A 1.5B target on two cores.
fn large() -> Costs {
    costs(&[(1, 44.6), (2, 44.9), (4, 45.5), (8, 57.0), (16, 103.0), (32, 190.0)], 1.4, 2.0)
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
                    let sim = Sim { real: real.clone(), load, noise, made };
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
            let sim = Sim { real: large(), load: calm, noise: 0.05, made };
            checks.check(&format!("{name}, draft {worse}"), &sim, &measured.clone().sound(), 0.95);
        }
    }
    checks.end();
    let sim = Sim { real: large(), load: calm, noise: 0.05, made: Made { worse: 1.0, decay: 0.93, seed: 5 } };
    assert!(sim.auto(&disturbed.sound()).1, "it is told that the costs are off");
    assert!(!sim.auto(&large()).1, "and not where they are right");
    let busy = Sim { load: neighbour, noise: 0.3, ..sim };
    assert!(!busy.auto(&large()).1, "nor where the machine is busy now");
}
