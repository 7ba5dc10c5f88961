//! How often a setting of a draft is right, and whether another one is far better.
//!
//! At every position of a text the draft proposes a chain, and as many of its tokens count as the target would commit.
//! Two settings are compared at the same positions, so what is hard to guess is hard for both.

use std::sync::Arc;

use draftsmith_core::Sampling;
use draftsmith_decode::{Ask, Committed, Drafter, DrafterSession, Features, Node};
use draftsmith_kernels::Kernels;
use draftsmith_model::{Infer, Rows, StepOutput, Target};
use serde::Serialize;

use super::setting::{Copies, Feed, Setting};
use super::texts::{Text, Texts};

/// Positions that are taken for one draw: what stands side by side in a text is alike.
const CLUSTER: usize = 8;
/// Normal quantile of the interval around a difference: 99.9 %, one-sided. Some thirty settings are tried on each draft, and one
/// that is right does worse by nearly all of them.
const SURE: f64 = 3.0;
/// The one of the interval around an accept length: 95 %.
const INTERVAL: f64 = 1.96;
/// A setting is far better if it has at least so many times the accepted tokens (a layer next to the right one costs some
/// ten percent of a small draft's) …
const FACTOR: f64 = 1.05;
/// … and so many more at each position.
const MORE: f64 = 0.02;
/// Where two settings are not told apart beyond this many standard errors, the plainer one is meant.
const TIE: f64 = 2.0;

/// Accepted draft tokens at every position of every text.
#[derive(Clone, Debug)]
pub struct Scores {
    /// Tokens of a proposal at most.
    pub depth: usize,
    /// `[texts][positions]`
    pub accepted: Vec<Vec<usize>>,
    /// The same: how many could have been at most, for a text ends.
    pub room: Vec<Vec<usize>>,
}

/// What is told of a setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measure {
    /// Tokens that a step commits, the target's own included, when the texts are decoded with such chains.
    pub accept_len: f64,
    /// Its interval, 95 %.
    pub accept_len_low: f64,
    /// Its upper end.
    pub accept_len_high: f64,
    /// Share of positions at which the draft's first, second, … token is accepted.
    pub accept_rate_at: Vec<f64>,
    /// Positions asked.
    pub positions: usize,
    /// Tokens of a proposal at most.
    pub depth: usize,
}

/// A sequence under way.
struct Asked<'a, K: Kernels> {
    text: &'a Text,
    output: StepOutput<K::Buf>,
    session: Box<dyn DrafterSession<K>>,
    fed: usize,
}

/// Asks a setting at all positions of the texts.
///
/// # Errors
/// What of it does not fit the target, as a sentence.
pub fn score<K: Kernels>(
    setting: &Setting,
    target: &Target<K>,
    copies: &Copies,
    texts: &Texts,
    depth: usize,
) -> Result<Scores, String> {
    let drafter = setting.drafter(target, copies)?;
    let depth = depth.min(drafter.deepest());
    let mut asked = Vec::new();
    for text in &texts.texts {
        let output = output(setting, target, texts.width, text)?;
        asked.push(Asked { text, output, session: drafter.begin(), fed: 0 });
    }
    let most = texts.texts.iter().map(|text| text.positions()).max().unwrap_or(0);
    let mut scores = Scores {
        depth,
        accepted: vec![Vec::new(); asked.len()],
        room: texts
            .texts
            .iter()
            .map(|t| (0..t.positions()).map(|at| depth.min(t.positions() - at)).collect())
            .collect(),
    };
    for at in 0..most {
        let mut open: Vec<(usize, &mut Asked<'_, K>)> =
            asked.iter_mut().enumerate().filter(|(_, one)| at < one.text.positions()).collect();
        let accepted = propose(setting.feed, drafter.as_ref(), &mut open, at, depth);
        for ((of, _), accepted) in open.iter().zip(accepted) {
            scores.accepted[*of].push(accepted);
        }
    }
    Ok(scores)
}

/// A text's states as this setting reads them.
fn output<K: Kernels>(
    setting: &Setting,
    target: &Target<K>,
    width: usize,
    text: &Text,
) -> Result<StepOutput<K::Buf>, String> {
    let ops = Infer::new(target.kernels().as_ref());
    let hidden = setting
        .taps
        .iter()
        .map(|tap| {
            let states = text.states.get(tap).ok_or("it reads a layer that the target does not have")?;
            let shifted: Vec<f32>;
            let states = match setting.feed {
                Feed::Next | Feed::OwnToken => states,
                Feed::StateBefore => {
                    let rest = states.len() - width;
                    shifted = [&states[..width], &states[..rest]].concat();
                    &shifted
                }
            };
            Ok(ops.input(states, width))
        })
        .collect::<Result<Vec<Arc<Rows<_>>>, String>>()?;
    let last = Arc::clone(hidden.first().ok_or("it reads no layer")?);
    Ok(StepOutput { hidden, last })
}

/// Hands over what is known at a position of each text and counts how many proposed tokens are the text's.
fn propose<K: Kernels>(
    feed: Feed,
    drafter: &dyn Drafter<K>,
    open: &mut [(usize, &mut Asked<'_, K>)],
    at: usize,
    depth: usize,
) -> Vec<usize> {
    for (_, one) in open.iter_mut() {
        // Of the last token the target has no state yet.
        let known = one.text.prompt + 1 + at;
        let rows: Vec<u32> = (one.fed as u32..known as u32 - 1).collect();
        let shift = match feed {
            Feed::Next | Feed::StateBefore => 1,
            Feed::OwnToken => 0,
        };
        let next_tokens = &one.text.tokens[one.fed + shift..known - 1 + shift];
        one.fed = known - 1;
        let features = Features { output: &one.output, rows: &rows };
        drafter.take_in(&mut [Committed { session: one.session.as_mut(), features, next_tokens }]);
    }
    let skipped = match feed {
        Feed::Next | Feed::StateBefore => 0,
        Feed::OwnToken => 1,
    };
    let texts: Vec<&Text> = open.iter().map(|(_, one)| one.text).collect();
    let mut asks: Vec<Ask<'_, K>> = open
        .iter_mut()
        .map(|(_, one)| {
            let known = one.text.prompt + 1 + at;
            Ask {
                session: one.session.as_mut(),
                sampling: &Sampling::GREEDY,
                text: &one.text.tokens[..known],
                position: known as u64 - 1,
                k: 1,
                whole: false,
            }
        })
        .collect();
    // Of each text whose chain is right so far: which it is, the node to go on from, and what the draft says behind it.
    let mut going: Vec<(usize, Option<u32>, Option<u32>)> = drafter
        .roots(&mut asks)
        .into_iter()
        .enumerate()
        .map(|(of, children)| (of, None, children.first().map(|c| c.0)))
        .collect();
    let mut accepted = vec![0; texts.len()];
    for level in 0..depth + skipped {
        let right = |(of, parent, said): &(usize, Option<u32>, Option<u32>)| {
            let place = texts[*of].prompt + 1 + at + level - skipped;
            let truth = *texts[*of].tokens.get(place)?;
            // What is known already is given, whatever the draft says.
            let holds = level < skipped || *said == Some(truth);
            holds.then_some(Node { of: *of, parent: *parent, token: truth, depth: level })
        };
        let nodes: Vec<Node> = going.iter().filter_map(right).collect();
        if level >= skipped {
            nodes.iter().for_each(|node| accepted[node.of] += 1);
        }
        if nodes.is_empty() || level + 1 == depth + skipped {
            break;
        }
        let grown = drafter.expand(&mut asks, &nodes);
        going = nodes
            .iter()
            .zip(grown)
            .map(|(node, (handle, children))| (node.of, Some(handle), children.first().map(|c| c.0)))
            .collect();
    }
    accepted
}

impl Scores {
    /// Those of a draft that cannot be asked: nothing is accepted.
    pub fn nothing(texts: &Texts, depth: usize) -> Scores {
        let each = |of: &dyn Fn(usize, usize) -> usize| -> Vec<Vec<usize>> {
            texts.texts.iter().map(|t| (0..t.positions()).map(|at| of(t.positions(), at)).collect()).collect()
        };
        Scores { depth, accepted: each(&|_, _| 0), room: each(&|positions, at| depth.min(positions - at)) }
    }

    /// Accepted tokens at a position, of `depth` at most.
    pub fn mean(&self, depth: usize) -> f64 {
        let (mut sum, mut count) = (0usize, 0usize);
        for n in self.accepted.iter().flatten() {
            sum += (*n).min(depth);
            count += 1;
        }
        sum as f64 / count.max(1) as f64
    }

    /// The texts decoded with these chains: committed tokens of each step.
    fn steps(&self) -> Vec<f64> {
        let mut steps = Vec::new();
        for (accepted, room) in self.accepted.iter().zip(&self.room) {
            let mut at = 0;
            while at < accepted.len() {
                let n = accepted[at].min(room[at]);
                // Behind the last token of a text the target adds none.
                let committed = (n + 1).min(accepted.len() - at);
                steps.push(committed as f64);
                at += n + 1;
            }
        }
        steps
    }

    /// For people.
    pub fn measure(&self) -> Measure {
        let steps = self.steps();
        let (mean, error) = mean_and_error(&steps);
        let positions = self.accepted.iter().map(Vec::len).sum();
        let rate = |i: usize| {
            let could = self.room.iter().flatten().filter(|room| **room > i).count();
            let did = self.accepted.iter().flatten().filter(|n| **n > i).count();
            did as f64 / could.max(1) as f64
        };
        Measure {
            accept_len: mean,
            accept_len_low: (mean - INTERVAL * error).max(1.0),
            accept_len_high: mean + INTERVAL * error,
            accept_rate_at: (0..self.depth).map(rate).collect(),
            positions,
            depth: self.depth,
        }
    }

    /// True if so few tokens are accepted that the draft and the target hardly know each other.
    pub fn is_nothing(&self) -> bool {
        let flat: Vec<f64> = self.accepted.iter().flatten().map(|n| *n as f64).collect();
        let (mean, error) = mean_and_error(&flat);
        mean + INTERVAL * error < 0.1
    }

    /// The differences to another setting at the same positions, in clusters: their mean and its standard error.
    fn against(&self, own: &Scores) -> (f64, f64) {
        let depth = self.depth.min(own.depth);
        let cut = |n: &usize| (*n).min(depth) as f64;
        let clusters: Vec<f64> = self
            .accepted
            .iter()
            .zip(&own.accepted)
            .flat_map(|(a, b)| {
                let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| cut(a) - cut(b)).collect();
                let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
                differences.chunks(CLUSTER).map(mean).collect::<Vec<f64>>()
            })
            .collect();
        mean_and_error(&clusters)
    }

    /// True if this setting is far better than the draft's own: beyond accident, and by much.
    pub fn is_far_better(&self, own: &Scores) -> bool {
        let depth = self.depth.min(own.depth);
        let (found, was) = (self.mean(depth), own.mean(depth));
        let (difference, error) = self.against(own);
        difference - SURE * error > 0.0 && found >= FACTOR * was && found >= was + MORE
    }

    /// True if it is worth all texts after a look at some of them: it is no worse there.
    pub fn is_promising(&self, own: &Scores) -> bool {
        let depth = self.depth.min(own.depth);
        self.mean(depth) >= own.mean(depth)
    }

    /// True if it is better than another one beyond a tie.
    pub fn beats(&self, other: &Scores) -> bool {
        let (difference, error) = self.against(other);
        difference > TIE * error && difference > 0.01
    }

    /// The first texts alone.
    pub fn first(&self, texts: usize) -> Scores {
        Scores {
            depth: self.depth,
            accepted: self.accepted.iter().take(texts).cloned().collect(),
            room: self.room.iter().take(texts).cloned().collect(),
        }
    }
}

fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(accepted: &[&[usize]], depth: usize) -> Scores {
        let room = |text: &[usize]| (0..text.len()).map(|at| depth.min(text.len() - at)).collect();
        Scores {
            depth,
            accepted: accepted.iter().map(|text| text.to_vec()).collect(),
            room: accepted.iter().map(|text| room(text)).collect(),
        }
    }

    #[test]
    fn the_accept_length_is_that_of_a_walk_over_the_text() {
        // Steps at 0 (two accepted), 3 (none), 4 (one; the text ends there).
        let found = scores(&[&[2, 9, 9, 0, 1, 9]], 2).measure();
        assert_eq!(found.accept_len, (3.0 + 1.0 + 2.0) / 3.0);
        assert_eq!(found.positions, 6);
        let nothing = scores(&[&[0; 10]], 3);
        assert_eq!(nothing.measure().accept_len, 1.0);
        assert_eq!(nothing.measure().accept_rate_at, [0.0; 3]);
    }

    #[test]
    fn a_setting_is_far_better_beyond_accident_and_by_much() {
        let own = scores(&[&[0; 16], &[1; 16]], 4);
        let by = |a: usize, b: usize| scores(&[&[a; 16], &[b; 16]], 4);
        assert!(by(2, 2).is_far_better(&own));
        assert!(!own.is_far_better(&own));
        assert!(!by(0, 2).is_far_better(&own), "one of the two texts may be an accident");
        let slightly: Vec<usize> = (0..64).map(|i| 1 + usize::from(i % 32 == 0)).collect();
        let own = scores(&[&[1; 64], &[1; 64]], 4);
        assert!(!scores(&[&slightly, &slightly], 4).is_far_better(&own), "sure, but not by much");
        assert!(scores(&[&slightly, &slightly], 4).beats(&own));
    }
}
