//! Verification of a chain whose tokens the draft has drawn from its own distribution: the text follows the target's
//! distribution, but is not that of a seed without the draft.
//!
//! Two rules. *Rejection* decides token by token [leviathan2023, Alg. 1]. *Block* decides jointly how much of the chain
//! is kept, and keeps at least as much on average [block_verification, Alg. 2].
//!
//! Shape legend: `D` draft tokens in one proposal.

use std::fmt;
use std::str::FromStr;

use crate::choose::{full_softmax, mix, unit};
use crate::{Sampling, TargetTokenId, Verdict, token_distribution};

/// Which draft tokens of a sampled answer are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VerifyRule {
    /// Those that equal the target's own draw, which is keyed by seed and position: the same text with and without a
    /// draft.
    #[default]
    Seeded,
    /// Token by token, by the ratio of both probabilities; equal to plain sampling in distribution.
    Rejection,
    /// Jointly for the whole chain; equal to plain sampling in distribution.
    Block,
}

impl VerifyRule {
    /// All rules.
    pub const ALL: [VerifyRule; 3] = [VerifyRule::Seeded, VerifyRule::Rejection, VerifyRule::Block];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            VerifyRule::Seeded => "seeded",
            VerifyRule::Rejection => "rejection",
            VerifyRule::Block => "block",
        }
    }
}

impl fmt::Display for VerifyRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for VerifyRule {
    type Err = String;

    fn from_str(text: &str) -> Result<VerifyRule, String> {
        let found = VerifyRule::ALL.into_iter().find(|rule| rule.name() == text);
        found.ok_or_else(|| "expected `seeded`, `rejection` or `block`".to_string())
    }
}

/// Probabilities of tokens, ascending by id; all others have none.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution(Vec<(TargetTokenId, f64)>);

impl Distribution {
    /// What [`crate::choose_token`] draws from.
    ///
    /// # Shapes
    /// - `logits`: `[V]`, natural scale.
    pub fn of(logits: &[f32], sampling: &Sampling) -> Distribution {
        match full_softmax(logits, sampling) {
            Some(all) => Distribution(all),
            None => Distribution::new(token_distribution(logits, sampling)).expect("a token is left"),
        }
    }

    /// Weights in any order, each token once, made to sum up to 1. `None` if nothing has any.
    pub fn new(mut weights: Vec<(TargetTokenId, f64)>) -> Option<Distribution> {
        weights.retain(|(_, weight)| *weight > 0.0);
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        if !(total > 0.0 && total.is_finite()) {
            return None;
        }
        weights.iter_mut().for_each(|(_, weight)| *weight /= total);
        weights.sort_unstable_by_key(|(token, _)| *token);
        Some(Distribution(weights))
    }

    /// The probability of a token.
    pub fn prob(&self, token: TargetTokenId) -> f64 {
        self.0.binary_search_by_key(&token, |(t, _)| *t).map_or(0.0, |at| self.0[at].1)
    }

    /// The token at a place of the cumulated probabilities, `uniform` in `[0, 1)`.
    pub fn draw(&self, uniform: f64) -> TargetTokenId {
        let mut mass = 0.0;
        let found = self.0.iter().find(|(_, prob)| {
            mass += prob;
            uniform < mass
        });
        // The sum may end a rounding below 1.
        found.or(self.0.last()).map_or(TargetTokenId(0), |(token, _)| *token)
    }

    /// `max(scale * self - draft, 0)` for every token that has some of it.
    fn rest(&self, scale: f64, draft: &Distribution) -> Vec<(TargetTokenId, f64)> {
        let mut drafted = draft.0.iter().peekable();
        let mut rest = Vec::new();
        for (token, prob) in &self.0 {
            while drafted.next_if(|(other, _)| other < token).is_some() {}
            let draft_prob =
                drafted.peek().filter(|(other, _)| other == token).map_or(0.0, |(_, prob)| *prob);
            let left = scale * prob - draft_prob;
            if left > 0.0 {
                rest.push((*token, left));
            }
        }
        rest
    }

    /// What to draw from behind a token that was not kept.
    fn residual(&self, scale: f64, draft: &Distribution) -> Distribution {
        // Nothing is left only where nothing is refused, up to rounding.
        Distribution::new(self.rest(scale, draft)).unwrap_or_else(|| self.clone())
    }
}

/// Probability that a drafted token is kept by itself: `min(1, target / draft)` [leviathan2023, Alg. 1].
pub fn accept_probability(target_prob: f64, draft_prob: f64) -> f64 {
    if draft_prob <= 0.0 { 0.0 } else { (target_prob / draft_prob).min(1.0) }
}

/// A chain that was drawn, and what each token was drawn from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DrawnChain {
    /// `[D]`
    pub tokens: Vec<TargetTokenId>,
    /// `[D]`
    pub draft_probs: Vec<Distribution>,
}

/// How much of a drawn chain is kept, and what the target's own token is drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Draft tokens kept, a prefix of the proposal.
    pub accepted_drafts: usize,
    /// Of the token after them.
    pub next: Distribution,
}

/// Decides how much of a chain is kept.
///
/// `target(i)` is the target's distribution after the first `i` draft tokens; it is asked in ascending order, and for no
/// more than needed: never behind a token that the target cannot say. `coin(p)` is true with probability `p`,
/// independently of everything else.
///
/// # Panics
/// For [`VerifyRule::Seeded`], which compares tokens ([`crate::verify_tree`]).
pub fn verify_drawn(
    rule: VerifyRule,
    chain: &DrawnChain,
    mut target: impl FnMut(usize) -> Distribution,
    mut coin: impl FnMut(f64) -> bool,
) -> Kept {
    let steps = chain.tokens.iter().zip(&chain.draft_probs);
    match rule {
        VerifyRule::Seeded => panic!("the seeded rule compares tokens"),
        VerifyRule::Rejection => {
            for (i, (token, draft_probs)) in steps.enumerate() {
                let target_probs = target(i);
                let accept = accept_probability(target_probs.prob(*token), draft_probs.prob(*token));
                if !coin(accept) {
                    return Kept { accepted_drafts: i, next: target_probs.residual(1.0, draft_probs) };
                }
            }
            Kept { accepted_drafts: chain.tokens.len(), next: target(chain.tokens.len()) }
        }
        VerifyRule::Block => {
            // Probability that at least so many tokens are kept, given the chain up to there.
            let mut reach = 1.0;
            // The longest beginning kept so far, with what stands behind it.
            let (mut accepted_drafts, mut reached, mut behind) = (0, reach, target(0));
            let mut target_prob = chain.tokens.first().map_or(0.0, |token| behind.prob(*token));
            for (i, (token, draft_probs)) in steps.enumerate() {
                reach = (reach * target_prob / draft_probs.prob(*token)).min(1.0);
                if reach.is_nan() || reach <= 0.0 {
                    break;
                }
                let end = i + 1;
                let target_probs = target(end);
                target_prob = chain.tokens.get(end).map_or(0.0, |token| target_probs.prob(*token));
                // It ends here, unless more is kept: what the target still has to give here, beside what the draft goes
                // on with.
                let stop = match chain.draft_probs.get(end) {
                    None => reach,
                    Some(next) => {
                        match target_probs.rest(reach, next).iter().map(|(_, prob)| prob).sum::<f64>() {
                            rest if rest > 0.0 => rest / (rest + (1.0 - reach)),
                            _ => 0.0,
                        }
                    }
                };
                if coin(stop) {
                    (accepted_drafts, reached, behind) = (end, reach, target_probs);
                }
            }
            let next = match chain.draft_probs.get(accepted_drafts) {
                None => behind,
                Some(draft_probs) => behind.residual(reached, draft_probs),
            };
            Kept { accepted_drafts, next }
        }
    }
}

/// Randomness of a step that verifies a drawn chain. Keyed by the seed and by where the step began, which no two steps
/// of an answer share: a number that decided about one proposal is never used for another.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    key: u64,
}

impl Draws {
    /// Of the step whose first draft token would stand at `position`.
    pub fn new(seed: u64, position: u64) -> Draws {
        // Another constant than that of the noise which plain steps choose by.
        Draws { key: mix(mix(seed ^ 0x7665_7269_6679_2e31).wrapping_add(mix(position))) }
    }

    /// For the draft's token at a depth, in `[0, 1)`.
    pub fn draft(self, depth: usize) -> f64 {
        unit(self.key, 3 * depth as u64)
    }

    /// For the decision about it.
    pub fn coin(self, depth: usize) -> f64 {
        unit(self.key, 3 * depth as u64 + 1)
    }

    /// For the target's own token.
    pub fn next(self) -> f64 {
        unit(self.key, 2)
    }

    /// The step's verdict by these numbers.
    pub fn verify(
        self,
        rule: VerifyRule,
        chain: &DrawnChain,
        target: impl FnMut(usize) -> Distribution,
    ) -> Verdict {
        let mut depth = 0;
        let kept = verify_drawn(rule, chain, target, |prob| {
            depth += 1;
            self.coin(depth - 1) < prob
        });
        Verdict { accepted_drafts: kept.accepted_drafts, target_token: kept.next.draw(self.next()) }
    }
}

#[cfg(test)]
mod tests;
