//! How one token is chosen from a row of logits, with or without speculation.
//!
//! Sampling is keyed by position: the token at position `p` is the arg-max of `logits / T + noise(seed, p)` over
//! the tokens that survive min-p, top-k and top-p (the Gumbel-max form of sampling). The noise depends on seed, position
//! and token only, so a seeded request returns the same text whatever was drafted.
//!
//! Classic rejection sampling [leviathan2023] is given by [`accept_probability`] and [`residual`].

use crate::TargetTokenId;

/// How the target chooses a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep the `k` largest logits; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Key of the noise.
    pub seed: u64,
}

/// Share of the best token's probability below which top-k and top-p sampling never draws a token. Over a vocabulary
/// of 250,000 ids all such tokens together have less than a millionth of the mass.
const NEGLIGIBLE: f32 = 1e-12;

impl Default for Sampling {
    fn default() -> Self {
        Sampling::GREEDY
    }
}

impl Sampling {
    /// The arg-max, ties to the lower id.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };

    /// True if no noise is drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// True if every token may be drawn.
    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }
}

/// Index of the largest value, the lowest index among equals; NaN never wins.
fn argmax(values: impl Iterator<Item = f32>) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, v) in values.enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0
}

/// SplitMix64, the finaliser that turns a counter into well-mixed bits.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Standard Gumbel noise for (`seed`, `position`, `token`): counter-based, so any entry can be drawn alone.
pub fn gumbel_noise(seed: u64, position: u64, token: u32) -> f32 {
    let bits =
        mix(mix(seed ^ 0x6472_6166_7473_6d74).wrapping_add(mix(position)) ^ mix(u64::from(token) << 1 | 1));
    // 53 random bits, centred: never 0 and never 1, so both logarithms are finite.
    let uniform = ((bits >> 11) as f64 + 0.5) * (1.0 / (1u64 << 53) as f64);
    (-(-uniform.ln()).ln()) as f32
}

/// The tokens that survive temperature, min-p, top-k and top-p, in this order, with their probabilities, most probable first (ties to
/// the lower id).
///
/// # Shapes
/// - `logits`: `[V]`, natural scale.
pub fn token_distribution(logits: &[f32], sampling: &Sampling) -> Vec<(TargetTokenId, f64)> {
    if sampling.is_greedy() {
        return vec![(TargetTokenId(argmax(logits.iter().copied()) as u32), 1.0)];
    }
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Tokens this far below the best one have less than `NEGLIGIBLE` of its probability each. Dropping them first
    // keeps the sort and the exponentials to the few hundred tokens that can be drawn at all.
    let least = NEGLIGIBLE.max(sampling.min_p);
    let cutoff = max + sampling.temperature * least.ln();
    let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|i| logits[*i as usize] >= cutoff).collect();
    let k = if sampling.top_k == 0 { ids.len() } else { (sampling.top_k as usize).min(ids.len()) };
    if k < ids.len() {
        ids.select_nth_unstable_by(k, order);
        ids.truncate(k);
    }
    ids.sort_unstable_by(order);
    let inv_t = 1.0 / f64::from(sampling.temperature);
    let mut weights: Vec<f64> =
        ids.iter().map(|i| (f64::from(logits[*i as usize] - max) * inv_t).exp()).collect();
    if sampling.top_p < 1.0 {
        let wanted = f64::from(sampling.top_p) * weights.iter().sum::<f64>();
        let mut mass = 0.0;
        let keep = weights.iter().position(|w| {
            mass += w;
            mass >= wanted
        });
        weights.truncate(keep.map_or(weights.len(), |i| i + 1).max(1));
        ids.truncate(weights.len());
    }
    let kept: f64 = weights.iter().sum();
    ids.into_iter().zip(weights).map(|(i, w)| (TargetTokenId(i), w / kept)).collect()
}

/// The token at `position`: arg-max if greedy, else the Gumbel-max draw keyed by (seed, position).
///
/// # Shapes
/// - `logits`: `[V]`
pub fn choose_token(logits: &[f32], sampling: &Sampling, position: u64) -> TargetTokenId {
    if sampling.is_greedy() {
        return TargetTokenId(argmax(logits.iter().copied()) as u32);
    }
    let inv_t = 1.0 / sampling.temperature;
    if sampling.keeps_all() {
        let noisy = logits
            .iter()
            .enumerate()
            .map(|(i, l)| l * inv_t + gumbel_noise(sampling.seed, position, i as u32));
        return TargetTokenId(argmax(noisy) as u32);
    }
    let mut kept: Vec<TargetTokenId> =
        token_distribution(logits, sampling).into_iter().map(|(t, _)| t).collect();
    kept.sort_unstable();
    let noisy =
        kept.iter().map(|t| logits[t.0 as usize] * inv_t + gumbel_noise(sampling.seed, position, t.0));
    kept[argmax(noisy)]
}

/// Probability that a drafted token is kept by rejection sampling: `min(1, target / draft)` [leviathan2023, Alg. 1].
pub fn accept_probability(target_prob: f64, draft_prob: f64) -> f64 {
    if draft_prob <= 0.0 { 0.0 } else { (target_prob / draft_prob).min(1.0) }
}

/// The distribution to draw from after a rejection: `max(target - draft, 0)`, normalised; `None` if nothing is
/// left (the distributions are equal).
///
/// # Shapes
/// - `target_probs`, `draft_probs`: `[V]`
pub fn residual(target_probs: &[f64], draft_probs: &[f64]) -> Option<Vec<f64>> {
    let rest: Vec<f64> = target_probs.iter().zip(draft_probs).map(|(t, d)| (t - d).max(0.0)).collect();
    let total: f64 = rest.iter().sum();
    (total > 0.0).then(|| rest.into_iter().map(|r| r / total).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losslessness without sampling: add up every path that emits token `x`.
    #[track_caller]
    fn check_rejection(target: &[f64], draft: &[f64]) {
        let keep =
            |x: usize| if draft[x] == 0.0 { 0.0 } else { draft[x] * accept_probability(target[x], draft[x]) };
        let rejected: f64 = 1.0 - (0..target.len()).map(keep).sum::<f64>();
        let rest = residual(target, draft).unwrap_or_else(|| vec![0.0; target.len()]);
        for x in 0..target.len() {
            let emitted = keep(x) + rejected * rest[x];
            assert!(
                (emitted - target[x]).abs() < 1e-12,
                "token {x}: emitted {emitted}, target {}",
                target[x]
            );
        }
    }

    #[test]
    fn output_follows_the_target_whatever_the_draft_says() {
        check_rejection(&[0.5, 0.3, 0.2], &[0.2, 0.2, 0.6]);
        check_rejection(&[1.0, 0.0, 0.0], &[0.1, 0.8, 0.1]);
        check_rejection(&[0.5, 0.5, 0.0], &[0.5, 0.5, 0.0]);
        check_rejection(&[0.4, 0.6], &[1.0, 0.0]);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        assert_eq!(choose_token(&[1.0, 3.0, 3.0], &Sampling::GREEDY, 0), TargetTokenId(1));
        assert_eq!(choose_token(&[f32::NAN, 3.0, 2.0], &Sampling::GREEDY, 0), TargetTokenId(1));
    }

    #[test]
    fn gumbel_draws_follow_the_softmax() {
        let logits = [2.0f32, 1.0, 0.0, -1.0];
        let sampling = Sampling { temperature: 0.8, seed: 7, ..Sampling::GREEDY };
        let draws = 40_000u64;
        let mut counts = [0u64; 4];
        for position in 0..draws {
            counts[choose_token(&logits, &sampling, position).0 as usize] += 1;
        }
        for (token, prob) in token_distribution(&logits, &sampling) {
            let seen = counts[token.0 as usize] as f64 / draws as f64;
            // Four standard errors of a binomial share.
            let bound = 4.0 * (prob * (1.0 - prob) / draws as f64).sqrt();
            assert!((seen - prob).abs() < bound, "token {token}: drawn {seen}, softmax {prob}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_the_mass() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let at = |top_p| {
            token_distribution(&logits, &Sampling { temperature: 1.0, top_p, ..Sampling::GREEDY })
                .iter()
                .map(|(t, _)| t.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(at(0.4), vec![0]);
        assert_eq!(at(0.79), vec![0, 1]);
        assert_eq!(at(0.9), vec![0, 1, 2]);
        assert_eq!(at(1.0), vec![0, 1, 2, 3]);
    }

    #[test]
    fn min_p_keeps_what_has_that_share_of_the_best() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |min_p, temperature| {
            let sampling = Sampling { temperature, min_p, ..Sampling::GREEDY };
            token_distribution(&logits, &sampling).len()
        };
        assert_eq!(kept(0.0, 1.0), 4);
        assert_eq!(kept(0.25, 1.0), 3);
        assert_eq!(kept(0.5, 1.0), 2);
        // 0.05 / 0.5 becomes its square root at twice the temperature.
        assert_eq!(kept(0.25, 2.0), 4);
        assert_eq!(kept(1.0, 1.0), 1);
    }

    #[test]
    fn top_k_one_is_greedy_at_any_temperature() {
        let sampling = Sampling { temperature: 5.0, top_k: 1, seed: 3, ..Sampling::GREEDY };
        for position in 0..100 {
            assert_eq!(choose_token(&[0.0, 0.1, 0.05], &sampling, position), TargetTokenId(1));
        }
    }

    #[test]
    fn the_draw_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let sampling = Sampling { temperature: 1.0, top_k: 20, top_p: 0.95, seed: 11, ..Sampling::GREEDY };
        let run: Vec<_> = (0..64).map(|p| choose_token(&logits, &sampling, p)).collect();
        let again: Vec<_> = (0..64).rev().map(|p| choose_token(&logits, &sampling, p)).collect();
        assert!(run.iter().eq(again.iter().rev()));
        let other = Sampling { seed: 12, ..sampling };
        assert!((0..64).any(|p| choose_token(&logits, &other, p) != run[p as usize]));
    }
}
