//! How one token is chosen from a row of logits, with or without speculation.
//!
//! Sampling is keyed by position: the token at position `p` is the arg-max of `logits / T + noise(seed, p)` over
//! the tokens that survive min-p, top-k and top-p (the Gumbel-max form of sampling). The noise depends on seed, position
//! and token only, so a seeded request returns the same text whatever was drafted.
//!
//! Rules that are equal to it in distribution alone are in [`crate::verify_drawn`].

use crate::TargetTokenId;

/// How the target chooses a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 means greedy, as does what cannot be told from it ([`Sampling::is_greedy`]).
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

/// At this temperature and below the arg-max is taken: of two different 32-bit logits of 1 or more the larger is then
/// drawn with all but `e^-12` of the mass, and equal ones go by id, as they do at 0.
const GREEDY_BELOW: f32 = 1e-8;

/// From this temperature on logits are divided as they are, in 32 bits. Below, the largest one is taken off first and
/// the rest is in 64 bits: the quotients would leave the noise no digits, and in the end overflow.
const DIVIDED_AS_IS: f32 = 1e-4;

impl Default for Sampling {
    fn default() -> Self {
        Sampling::GREEDY
    }
}

impl Sampling {
    /// The arg-max, ties to the lower id.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };

    /// True if no noise is drawn: at a temperature of 0 and so near to it that the arg-max is what it means.
    pub fn is_greedy(&self) -> bool {
        // Also if it is no number.
        self.temperature.is_nan() || self.temperature <= GREEDY_BELOW
    }

    /// True if every token may be drawn.
    fn keeps_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }

    /// How scores come from logits of which `max` is the largest: the factor if logits are simply multiplied by it.
    fn factor(&self, max: f32) -> Option<f32> {
        let factor = 1.0 / self.temperature;
        (self.temperature >= DIVIDED_AS_IS && (max * factor).is_finite()).then_some(factor)
    }
}

/// What a backend that draws by itself must know of [`choose_token`]'s rule for one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawKey {
    /// Logits are multiplied by it: one over the temperature.
    pub factor: f32,
    /// Least share of the best token's probability; 0 if every token may be drawn.
    pub least_share: f32,
    /// Of the noise: `mix(key ^ mix(2 token + 1)) >> 11`, with the finaliser of SplitMix64, are its 53 bits.
    pub key: u64,
}

impl Sampling {
    /// The draw at a position in the form that backends take; `None` where logits are not multiplied as they are, or the
    /// arg-max is taken.
    pub fn draw_key(&self, position: u64) -> Option<DrawKey> {
        let factor = 1.0 / self.temperature;
        let plain = !self.is_greedy() && self.temperature >= DIVIDED_AS_IS && factor > 0.0;
        let least_share = if self.keeps_all() { 0.0 } else { NEGLIGIBLE.max(self.min_p).min(1.0) };
        plain.then(|| DrawKey { factor, least_share, key: noise_key(self.seed, position) })
    }
}

/// Index of the largest value, the lowest index among equals; NaN never wins.
fn argmax<T: PartialOrd>(values: impl Iterator<Item = T>, least: T) -> usize {
    let mut best = (0, least);
    for (i, v) in values.enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0
}

/// The largest value; `-inf` for a row of NaN.
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let mut chunks = values.chunks_exact(lanes.len());
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for chunk in &mut chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = larger(*lane, *v));
    }
    lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// SplitMix64, the finaliser that turns a counter into well-mixed bits.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// What the noise of a (`seed`, `position`) is drawn from.
fn noise_key(seed: u64, position: u64) -> u64 {
    mix(seed ^ 0x6472_6166_7473_6d74).wrapping_add(mix(position))
}

/// 53 random bits of a token.
fn noise_bits(key: u64, token: u32) -> u64 {
    mix(key ^ mix(u64::from(token) << 1 | 1)) >> 11
}

/// The number of values of [`noise_bits`].
const NOISE_VALUES: f64 = (1u64 << 53) as f64;

/// A number in `[0, 1)` of a key and a counter.
pub(crate) fn unit(key: u64, counter: u64) -> f64 {
    (mix(key ^ mix(counter)) >> 11) as f64 / NOISE_VALUES
}

/// No noise is larger: `-ln(-ln(1 - 2^-53))` is 36.737.
const NOISE_MAX: f64 = 36.74;

/// Noise of these bits; the more bits, the more noise.
fn noise_of(bits: u64) -> f32 {
    // Centred: never 0, and never 1 but for all bits set, where the half is rounded up; both logarithms are finite.
    let uniform = ((bits as f64 + 0.5) * (1.0 / NOISE_VALUES)).min(1.0 - f64::EPSILON / 2.0);
    (-(-uniform.ln()).ln()) as f32
}

/// Standard Gumbel noise for (`seed`, `position`, `token`): counter-based, so any entry can be drawn alone.
pub fn gumbel_noise(seed: u64, position: u64, token: u32) -> f32 {
    noise_of(noise_bits(noise_key(seed, position), token))
}

/// Bits whose noise is below `noise`, and so is that of all smaller bits; `None` if no bits are known to be.
fn bits_below(noise: f64) -> Option<u64> {
    // The share of draws above it, `1 - exp(-exp(-noise))`, without the loss of digits near 1.
    let above = -(-(-noise).exp()).exp_m1();
    // Some bits less than that: these functions are exact to a unit or two in the last place, and bits are halves off.
    let bits = NOISE_VALUES * (1.0 - above * (1.0 + 1e-9)) - 4.0;
    (bits >= 1.0).then_some(bits as u64)
}

/// Tokens of which one bound of the noise is shared.
const BLOCK: usize = 128;

/// Index of the largest `logits * factor + noise`, the lowest among equals: what adding the noise to every logit gives.
///
/// Most tokens are so far below the best one that only rare noise could lift them over it. Noise is two logarithms of
/// some random bits and grows with them, so these are compared with the bits that it would take, and the logarithms are
/// left out; where no bits would do, the bits are, too. `max` is the largest logit; `max * factor` is finite.
fn noisy_argmax(logits: &[f32], max: f32, factor: f32, key: u64) -> usize {
    let score = |i: usize| logits[i] * factor + noise_of(noise_bits(key, i as u32));
    let Some(first) = logits.iter().position(|l| *l == max) else { return 0 };
    let mut best = (first, score(first));
    for (block, values) in logits.chunks(BLOCK).enumerate() {
        let start = block * BLOCK;
        let top = largest(values) * factor;
        // Sums and noise are rounded to 32 bits on the other way: this is more than that can add.
        let slack =
            (f64::from(best.1.abs()) + f64::from(top.abs()) + NOISE_MAX) * f64::from(f32::EPSILON) * 4.0;
        let needed = f64::from(best.1) - f64::from(top) - slack;
        // Also a block without a number.
        if needed > NOISE_MAX || top == f32::NEG_INFINITY {
            continue;
        }
        let hopeless = bits_below(needed);
        let end = start + values.len();
        let hope = |i: usize| hopeless.is_none_or(|bits| noise_bits(key, i as u32) > bits);
        // Without a branch per token: almost no block has one.
        if !(start..end).fold(false, |any, i| any | hope(i)) {
            continue;
        }
        for i in (start..end).filter(|i| hope(*i)) {
            let value = score(i);
            if value > best.1 || value == best.1 && i < best.0 {
                best = (i, value);
            }
        }
    }
    best.0
}

/// The tokens that survive temperature, min-p, top-k and top-p, in this order, with their probabilities, most probable
/// first (ties to the lower id). A logit that is no number has no probability; a row without any chance at all gives
/// token 0.
///
/// # Shapes
/// - `logits`: `[V]`, natural scale.
pub fn token_distribution(logits: &[f32], sampling: &Sampling) -> Vec<(TargetTokenId, f64)> {
    if sampling.is_greedy() {
        return vec![(TargetTokenId(greedy(logits) as u32), 1.0)];
    }
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let max = largest(logits);
    // Tokens this far below the best one have less than `NEGLIGIBLE` of its probability each. Dropping them first
    // keeps the sort and the exponentials to the few hundred tokens that can be drawn at all.
    let least = NEGLIGIBLE.max(sampling.min_p).min(1.0);
    // No number at an infinite temperature, where all that is possible is equally probable.
    let cutoff = max + sampling.temperature * least.ln();
    let possible = |l: f32| l > f32::NEG_INFINITY && (cutoff.is_nan() || l >= cutoff);
    let mut ids = indices_of(logits, possible);
    if ids.is_empty() {
        return vec![(TargetTokenId(0), 1.0)];
    }
    let k = if sampling.top_k == 0 { ids.len() } else { (sampling.top_k as usize).min(ids.len()) };
    if k < ids.len() {
        ids.select_nth_unstable_by(k, order);
        ids.truncate(k);
    }
    let inv_t = 1.0 / f64::from(sampling.temperature);
    // Beside an infinite logit the others have no chance; infinity less itself would be no number.
    let weight = |i: &u32| {
        let l = logits[*i as usize];
        if l == max { 1.0 } else { (f64::from(l - max) * inv_t).exp().max(0.0) }
    };
    let weights = match (sampling.top_p < 1.0).then(|| nucleus(&mut ids, order, weight, sampling.top_p)) {
        Some(Some(weights)) => weights,
        found => {
            ids.sort_unstable_by(order);
            let mut weights: Vec<f64> = ids.iter().map(weight).collect();
            if found.is_some() {
                let wanted = f64::from(sampling.top_p) * weights.iter().sum::<f64>();
                weights.truncate(reaching(&weights, wanted).map_or(weights.len(), |i| i + 1).max(1));
                ids.truncate(weights.len());
            }
            weights
        }
    };
    let kept: f64 = weights.iter().sum();
    ids.into_iter().zip(weights).map(|(i, w)| (TargetTokenId(i), w / kept)).collect()
}

/// Indices of the logits that are `possible`, without a branch for each.
fn indices_of(logits: &[f32], possible: impl Fn(f32) -> bool) -> Vec<u32> {
    let mut ids = Vec::new();
    for (block, values) in logits.chunks(BLOCK).enumerate() {
        let mut found = [0u32; BLOCK];
        let mut count = 0;
        for (i, l) in values.iter().enumerate() {
            found[count] = (block * BLOCK + i) as u32;
            count += usize::from(possible(*l));
        }
        ids.extend_from_slice(&found[..count]);
    }
    ids
}

/// The first index at which the sum of the weights so far is `wanted`.
fn reaching(weights: &[f64], wanted: f64) -> Option<usize> {
    let mut mass = 0.0;
    weights.iter().position(|w| {
        mass += w;
        mass >= wanted
    })
}

/// What sorting all of `ids` and cutting where the mass reaches `top_p` gives, from a sort of the first of them alone; `None`,
/// with `ids` in another order, if sums in another order could cut elsewhere.
fn nucleus(
    ids: &mut Vec<u32>,
    order: impl Fn(&u32, &u32) -> std::cmp::Ordering,
    weight: impl Fn(&u32) -> f64,
    top_p: f32,
) -> Option<Vec<f64>> {
    let wanted = f64::from(top_p) * ids.iter().map(&weight).sum::<f64>();
    // The sums of a million numbers from zero on are off by less than 2.3e-10 of them.
    let slack = wanted * 1e-9;
    let mut first = 64;
    while first < ids.len() && first < 1 << 16 {
        ids.select_nth_unstable_by(first, &order);
        ids[..first].sort_unstable_by(&order);
        let mut weights: Vec<f64> = ids[..first].iter().map(&weight).collect();
        if let Some(last) = reaching(&weights, wanted + slack) {
            let surely = reaching(&weights, wanted - slack) == Some(last) && ids.len() < 1 << 20;
            if !surely {
                return None;
            }
            weights.truncate(last + 1);
            ids.truncate(last + 1);
            return Some(weights);
        }
        first *= 8;
    }
    None
}

fn greedy(logits: &[f32]) -> usize {
    argmax(logits.iter().copied(), f32::NEG_INFINITY)
}

/// The token at `position`: arg-max if greedy, else the Gumbel-max draw keyed by (seed, position). A logit that is no
/// number is never chosen.
///
/// # Shapes
/// - `logits`: `[V]`
pub fn choose_token(logits: &[f32], sampling: &Sampling, position: u64) -> TargetTokenId {
    if sampling.is_greedy() {
        return TargetTokenId(greedy(logits) as u32);
    }
    let max = largest(logits);
    if max == f32::NEG_INFINITY {
        return TargetTokenId(0);
    }
    let factor = sampling.factor(max);
    if sampling.keeps_all()
        && let Some(factor) = factor
    {
        return TargetTokenId(noisy_argmax(logits, max, factor, noise_key(sampling.seed, position)) as u32);
    }
    let mut kept: Vec<TargetTokenId> = match sampling.keeps_all() {
        true => (0..logits.len() as u32).map(TargetTokenId).collect(),
        false => token_distribution(logits, sampling).into_iter().map(|(t, _)| t).collect(),
    };
    kept.sort_unstable();
    let noise = |t: &TargetTokenId| gumbel_noise(sampling.seed, position, t.0);
    let logit = |t: &TargetTokenId| logits[t.0 as usize];
    let at = match factor {
        Some(factor) => argmax(kept.iter().map(|t| logit(t) * factor + noise(t)), f32::NEG_INFINITY),
        None => {
            let temperature = f64::from(sampling.temperature);
            let below = |l: f32| if l == max { 0.0 } else { f64::from(l) - f64::from(max) };
            let noisy = kept.iter().map(|t| below(logit(t)) / temperature + f64::from(noise(t)));
            argmax(noisy, f64::NEG_INFINITY)
        }
    };
    kept.get(at).copied().unwrap_or(TargetTokenId(0))
}

/// The distribution that is drawn from where every token may be, ascending by id; `None` where settings leave some out,
/// or the temperature is so low that logits are not divided as they are.
///
/// # Shapes
/// - `logits`: `[V]`
pub(crate) fn full_softmax(logits: &[f32], sampling: &Sampling) -> Option<Vec<(TargetTokenId, f64)>> {
    let max = largest(logits);
    if sampling.is_greedy() || !sampling.keeps_all() || !max.is_finite() {
        return None;
    }
    sampling.factor(max)?;
    let inv_t = 1.0 / f64::from(sampling.temperature);
    let weight = |l: f32| if l == max { 1.0 } else { (f64::from(l - max) * inv_t).exp() };
    // What is no number has no chance.
    let possible = logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY);
    let mut weights: Vec<_> = possible.map(|(i, l)| (TargetTokenId(i as u32), weight(*l))).collect();
    let total: f64 = weights.iter().map(|(_, w)| w).sum();
    weights.iter_mut().for_each(|(_, w)| *w /= total);
    Some(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// The specification of the draw from all tokens: noise for each of them.
    fn plain(logits: &[f32], sampling: &Sampling, position: u64) -> usize {
        let factor = 1.0 / sampling.temperature;
        let noisy = logits
            .iter()
            .enumerate()
            .map(|(i, l)| l * factor + gumbel_noise(sampling.seed, position, i as u32));
        argmax(noisy, f32::NEG_INFINITY)
    }

    /// The specification of the distribution: everything is sorted.
    fn sorted(logits: &[f32], sampling: &Sampling) -> Vec<(TargetTokenId, f64)> {
        let max = largest(logits);
        let cutoff = max + sampling.temperature * NEGLIGIBLE.max(sampling.min_p).min(1.0).ln();
        let mut ids: Vec<u32> = (0..logits.len() as u32)
            .filter(|i| logits[*i as usize] > f32::NEG_INFINITY && logits[*i as usize] >= cutoff)
            .collect();
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if sampling.top_k > 0 {
            ids.truncate(sampling.top_k as usize);
        }
        let inv_t = 1.0 / f64::from(sampling.temperature);
        let mut weights: Vec<f64> =
            ids.iter().map(|i| (f64::from(logits[*i as usize] - max) * inv_t).exp()).collect();
        if sampling.top_p < 1.0 {
            let wanted = f64::from(sampling.top_p) * weights.iter().sum::<f64>();
            weights.truncate(reaching(&weights, wanted).map_or(weights.len(), |i| i + 1).max(1));
        }
        let kept: f64 = weights.iter().sum();
        ids.into_iter().zip(weights).map(|(i, w)| (TargetTokenId(i), w / kept)).collect()
    }

    #[test]
    fn a_distribution_is_that_of_everything_sorted() {
        let mut counter = 1 << 20;
        let mut cut = 0;
        for size in [3usize, 64, 65, 200, 1000, 5000, 40_000] {
            for shape in 0..6 {
                let u = &mut counter;
                let logits: Vec<f32> = (0..size)
                    .map(|i| match shape {
                        // All equal; many ties; flat; wide; peaked; a sum that a share reaches exactly.
                        0 => 1.25,
                        1 => (uniform(u) * 6.0).floor(),
                        2 => uniform(u),
                        3 => uniform(u) * 30.0 - 15.0,
                        4 => uniform(u).ln() * -2.0,
                        _ => {
                            if i < 4 {
                                0.0
                            } else {
                                -1e30
                            }
                        }
                    })
                    .collect();
                for top_p in [-1.0, 0.0, 1e-6, 0.25, 0.5, 0.75, 0.9, 0.95, 0.999, 1.0] {
                    for (temperature, top_k) in [(0.3, 0), (0.8, 0), (2.0, 0), (1.0, 50), (1.0, 300)] {
                        let sampling = Sampling { temperature, top_k, top_p, ..Sampling::GREEDY };
                        let found = token_distribution(&logits, &sampling);
                        assert_eq!(
                            found,
                            sorted(&logits, &sampling),
                            "size {size}, shape {shape}, {sampling:?}"
                        );
                        cut += usize::from(found.len() < size);
                    }
                }
            }
        }
        assert!(cut > 1000, "{cut} of the distributions leave something out");
    }

    /// Some uniform numbers of a counter.
    fn uniform(counter: &mut u64) -> f32 {
        *counter += 1;
        (mix(*counter) >> 40) as f32 / (1u64 << 24) as f32
    }

    #[test]
    fn a_draw_from_all_tokens_is_that_with_the_noise_of_each() {
        let mut counter = 0;
        let mut cases = 0;
        for size in [1usize, 2, 5, 127, 128, 129, 1000, 4096] {
            for shape in 0..12 {
                for seed in 0..40u64 {
                    let u = &mut counter;
                    let logits: Vec<f32> = (0..size)
                        .map(|i| match shape {
                            // All equal; a few values with many ties; flat, wide and peaked rows; far from zero.
                            0 => 1.25,
                            1 => (uniform(u) * 4.0).floor(),
                            2 => uniform(u),
                            3 => uniform(u) * 30.0 - 15.0,
                            4 => {
                                if i == size / 2 {
                                    40.0
                                } else {
                                    uniform(u)
                                }
                            }
                            5 => uniform(u) * 1e4 - 5e3,
                            6 => 1e6 + (uniform(u) * 16.0).floor(),
                            7 => -1e6 - (uniform(u) * 16.0).floor(),
                            // Masked ones, none but one left, no numbers, and nothing possible at all.
                            8 => {
                                if uniform(u) < 0.9 {
                                    f32::NEG_INFINITY
                                } else {
                                    uniform(u) * 3.0
                                }
                            }
                            9 => {
                                if i + 1 == size {
                                    -3.0
                                } else {
                                    f32::NEG_INFINITY
                                }
                            }
                            10 => {
                                if uniform(u) < 0.3 {
                                    f32::NAN
                                } else {
                                    uniform(u) * 8.0
                                }
                            }
                            _ => {
                                if i % 2 == 0 {
                                    f32::NAN
                                } else {
                                    f32::NEG_INFINITY
                                }
                            }
                        })
                        .collect();
                    for temperature in [1e-4, 0.05, 0.7, 1.0, 2.0, 1e3, 1e30, f32::MAX] {
                        let sampling = Sampling { temperature, seed: seed * 977, ..Sampling::GREEDY };
                        let wanted = plain(&logits, &sampling, seed);
                        let found = choose_token(&logits, &sampling, seed).0 as usize;
                        assert_eq!(found, wanted, "size {size}, shape {shape}, T {temperature}, seed {seed}");
                        cases += 1;
                    }
                }
            }
        }
        assert_eq!(cases, 8 * 12 * 40 * 8);
    }

    #[test]
    fn bits_that_are_taken_for_hopeless_have_less_noise() {
        let mut counter = 1 << 40;
        let largest = noise_of((1 << 53) - 1);
        assert!(largest.is_finite() && f64::from(largest) < NOISE_MAX, "{largest}");
        assert!(noise_of(0).is_finite() && bits_below(-10.0).is_none());
        for _ in 0..200_000 {
            let noise = f64::from(uniform(&mut counter)) * 40.0 - 3.0;
            if let Some(bits) = bits_below(noise) {
                assert!(bits < 1 << 53, "{noise}: {bits}");
                let found = f64::from(noise_of(bits));
                assert!(found <= noise + 4e-6, "{noise}: {bits} bits have {found}");
                // And not so few that nothing is left out.
                assert!(noise >= 33.0 || found > noise - 0.2, "{noise}: {bits} bits have {found}");
            }
        }
    }

    #[test]
    fn near_zero_a_temperature_is_greedy() {
        let rows: [&[f32]; 6] = [
            &[1.0, 2.0, 3.0, 2.5],
            &[-4.0, -1.0, -3.0],
            &[20.0, 20.000002, 19.0],
            &[0.0, -0.5, 0.25],
            &[f32::NAN, -3.0, f32::NEG_INFINITY, -2.0],
            &[3.0e38, -3.0e38, 3.2e38],
        ];
        for temperature in [f32::from_bits(1), 1e-45, 1e-40, 1e-38, 1e-30, 1e-12, 1e-8] {
            for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.3)] {
                for (row, position) in rows.iter().zip(0..) {
                    let sampling = Sampling { temperature, top_k, top_p, min_p, seed: 5 };
                    let wanted = choose_token(row, &Sampling::GREEDY, 0);
                    assert_eq!(choose_token(row, &sampling, position), wanted, "T {temperature:e}, {row:?}");
                    let best = token_distribution(row, &sampling)[0];
                    assert_eq!((best.0, best.1), (wanted, 1.0), "T {temperature:e}, {row:?}");
                }
            }
        }
        // Not so near, and still no draw but the best, where the others are far.
        for temperature in [1e-7, 1e-6, 1e-5, 1e-4, 1e-3] {
            for position in 0..200 {
                let sampling = Sampling { temperature, seed: 9, ..Sampling::GREEDY };
                assert_eq!(choose_token(&[1.0, 2.0, 3.0, 2.5], &sampling, position), TargetTokenId(2));
                assert_eq!(choose_token(&[-9.0, -8.0, -9.5], &sampling, position), TargetTokenId(1));
            }
        }
    }

    #[test]
    fn low_temperatures_and_large_logits_draw_from_the_softmax() {
        // Two tokens at odds of e, however small the temperature and however large the logits.
        let odds = |logits: [f32; 3], temperature: f32| {
            let draws = 20_000u64;
            let sampling = Sampling { temperature, seed: 21, ..Sampling::GREEDY };
            let hits = (0..draws).filter(|p| choose_token(&logits, &sampling, *p).0 == 1).count();
            hits as f64 / draws as f64
        };
        let e = std::f64::consts::E;
        for (logits, temperature) in [
            ([0.0, 1e-6, -1.0], 1e-6),
            ([0.0, 2e-5, -1.0], 2e-5),
            ([1e-7, 4e-7, -1.0], 3e-7),
            ([1e38, 2e38, -3e38], 1e38),
            ([-3.0e38, -2.9e38, f32::MIN], 1e37),
        ] {
            let found = odds(logits, temperature);
            assert!((found - e / (1.0 + e)).abs() < 0.015, "{logits:?} at {temperature:e}: {found}");
        }
    }

    #[test]
    fn extremes_of_every_setting_have_an_answer() {
        let logits = [1.0, f32::NAN, 3.0, f32::NEG_INFINITY, 2.0];
        let settings =
            [f32::NAN, f32::NEG_INFINITY, -1.0, 0.0, f32::from_bits(1), 0.5, 1.0, 2.0, f32::INFINITY];
        for temperature in settings {
            for (top_p, min_p) in settings.iter().flat_map(|p| settings.map(|m| (*p, m))) {
                for top_k in [0, 1, 2, u32::MAX] {
                    let sampling = Sampling { temperature, top_k, top_p, min_p, seed: 1 };
                    for position in 0..4 {
                        let token = choose_token(&logits, &sampling, position).0;
                        assert!([0, 2, 4].contains(&token), "{sampling:?}: {token}");
                    }
                    let mass: f64 = token_distribution(&logits, &sampling).iter().map(|(_, p)| p).sum();
                    assert!((mass - 1.0).abs() < 1e-12, "{sampling:?}: {mass}");
                }
            }
        }
        // At an infinite temperature all that is possible is equally probable.
        let hot = Sampling { temperature: f32::INFINITY, ..Sampling::GREEDY };
        let third = token_distribution(&logits, &hot);
        assert_eq!(third.iter().map(|(t, _)| t.0).collect::<Vec<_>>(), [2, 4, 0]);
        assert!(third.iter().all(|(_, p)| (p - 1.0 / 3.0).abs() < 1e-12));
        // Beside an infinite logit nothing else is drawn.
        for sampling in
            [hot, Sampling { temperature: 1.0, ..hot }, Sampling { temperature: 1.0, top_k: 3, ..hot }]
        {
            for position in 0..20 {
                assert_eq!(choose_token(&[1.0, f32::INFINITY, 2.0], &sampling, position), TargetTokenId(1));
            }
        }
        assert_eq!(choose_token(&[], &hot, 0), TargetTokenId(0));
        assert_eq!(token_distribution(&[f32::NAN; 2], &hot), [(TargetTokenId(0), 1.0)]);
    }
}
