use std::collections::BTreeMap;

use super::*;
use TargetTokenId as T;

/// Some uniform numbers of a counter.
fn uniform(counter: &mut u64) -> f64 {
    *counter += 1;
    unit(mix(*counter), 0)
}

/// A distribution over `vocab` ids, peaked and with zeros now and then.
fn random(counter: &mut u64, vocab: u32) -> Distribution {
    let sharp = 1.0 + 5.0 * uniform(counter);
    let zeros = uniform(counter) < 0.4;
    loop {
        let weights = (0..vocab).map(|id| {
            let none = zeros && uniform(counter) < 0.4;
            (T(id), if none { 0.0 } else { uniform(counter).powf(sharp) })
        });
        if let Some(found) = Distribution::new(weights.collect()) {
            return found;
        }
    }
}

/// A model: a distribution behind every text of less than `length` tokens.
type Model = BTreeMap<Vec<u32>, Distribution>;

fn texts(vocab: u32, length: usize) -> Vec<Vec<u32>> {
    (0..length).fold(vec![Vec::new()], |shorter, _| {
        shorter.iter().flat_map(|t| (0..vocab).map(move |id| [&t[..], &[id]].concat())).collect()
    })
}

fn model(vocab: u32, length: usize, mut of: impl FnMut(&[u32]) -> Distribution) -> Model {
    (0..length).flat_map(|l| texts(vocab, l)).map(|text| (text.clone(), of(&text))).collect()
}

fn prob_of(model: &Model, text: &[u32]) -> f64 {
    (0..text.len()).map(|i| model[&text[..i]].prob(T(text[i]))).product()
}

/// Every draft of `depth` tokens with its probability, every outcome of every coin with its own: what is kept, and what
/// the next token is drawn from.
fn outcomes(
    rule: VerifyRule,
    target: &Model,
    draft: &Model,
    vocab: u32,
    depth: usize,
) -> Vec<(f64, Vec<u32>, Kept)> {
    let mut all = Vec::new();
    for text in texts(vocab, depth) {
        let drafted = prob_of(draft, &text);
        if drafted == 0.0 {
            continue;
        }
        let chain = DrawnChain {
            tokens: text.iter().map(|id| T(*id)).collect(),
            draft_probs: (0..depth).map(|i| draft[&text[..i]].clone()).collect(),
        };
        for sides in 0..1u32 << depth {
            let (mut weight, mut coins) = (drafted, 0);
            let kept = verify_drawn(
                rule,
                &chain,
                |i| target[&text[..i]].clone(),
                |prob| {
                    assert!((0.0..=1.0).contains(&prob), "{prob}");
                    let side = sides >> coins & 1 == 1;
                    coins += 1;
                    weight *= if side { prob } else { 1.0 - prob };
                    side
                },
            );
            // Coins that were not thrown are counted with one of their sides.
            if weight > 0.0 && sides >> coins == 0 {
                all.push((weight, text[..kept.accepted_drafts].to_vec(), kept));
            }
        }
    }
    all
}

/// The distribution of texts of `length` tokens: what a step gives, and the target's own tokens behind it.
fn emitted(
    all: &[(f64, Vec<u32>, Kept)],
    target: &Model,
    vocab: u32,
    length: usize,
) -> BTreeMap<Vec<u32>, f64> {
    let mut found: BTreeMap<Vec<u32>, f64> = BTreeMap::new();
    for (weight, start, kept) in all {
        for id in 0..vocab {
            let begun = [&start[..], &[id]].concat();
            let weight = weight * kept.next.prob(T(id));
            if weight == 0.0 {
                continue;
            }
            for end in texts(vocab, length.saturating_sub(begun.len())) {
                let text = [&begun[..], &end].concat();
                let rest: f64 =
                    (begun.len()..text.len()).map(|i| target[&text[..i]].prob(T(text[i]))).product();
                *found.entry(text[..length].to_vec()).or_default() += weight * rest;
            }
        }
    }
    found
}

#[track_caller]
fn check(target: &Model, draft: &Model, vocab: u32, depth: usize) -> [f64; 2] {
    [VerifyRule::Rejection, VerifyRule::Block].map(|rule| {
        let all = outcomes(rule, target, draft, vocab, depth);
        let mass: f64 = all.iter().map(|(weight, ..)| weight).sum();
        assert!((mass - 1.0).abs() < 1e-12, "{rule}, depth {depth}: {mass}");
        for length in 1..=depth + 1 {
            let found = emitted(&all, target, vocab, length);
            for text in texts(vocab, length) {
                let (found, wanted) = (found.get(&text).copied().unwrap_or(0.0), prob_of(target, &text));
                assert!(
                    (found - wanted).abs() < 1e-12,
                    "{rule}, depth {depth}, {text:?}: {found}, not {wanted}"
                );
            }
        }
        all.iter().map(|(weight, start, _)| weight * start.len() as f64).sum()
    })
}

#[test]
fn texts_follow_the_target_and_a_block_keeps_at_least_as_much() {
    let mut counter = 1;
    let mut more = 0;
    for round in 0..120 {
        for (vocab, depth) in [(2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (2, 3), (3, 3)] {
            let target = model(vocab, depth + 1, |_| random(&mut counter, vocab));
            // Unlike the target; near it; equal to it in part.
            let draft = model(vocab, depth + 1, |text| {
                let own = random(&mut counter, vocab);
                let share = match round % 3 {
                    0 => 0.0,
                    1 => 0.7,
                    _ => f64::from(u8::from(uniform(&mut counter) < 0.5)),
                };
                let mixed = (0..vocab).map(T);
                let mixed =
                    mixed.map(|id| (id, share * target[text].prob(id) + (1.0 - share) * own.prob(id)));
                Distribution::new(mixed.collect()).unwrap()
            });
            let [rejection, block] = check(&target, &draft, vocab, depth);
            assert!(block >= rejection - 1e-12, "depth {depth}: {block} by block, {rejection} by rejection");
            more += usize::from(block > rejection + 1e-3);
            assert!(depth > 1 || (block - rejection).abs() < 1e-12, "one token: {block}, {rejection}");
        }
    }
    assert!(more > 100, "a block kept more in {more} cases");
}

#[test]
fn a_draft_that_is_the_target_is_kept_whole() {
    let mut counter = 77;
    for depth in 1..=3 {
        let target = model(3, depth + 1, |_| random(&mut counter, 3));
        for kept in check(&target, &target, 3, depth) {
            assert!((kept - depth as f64).abs() < 1e-12, "{kept} of {depth}");
        }
    }
}

#[test]
fn a_draft_without_chance_is_refused_and_the_target_goes_on_alone() {
    let at = |ids: &[u32]| Distribution::new(ids.iter().map(|id| (T(*id), 1.0)).collect()).unwrap();
    let target = model(4, 4, |_| at(&[0, 1]));
    let draft = model(4, 4, |_| at(&[2, 3]));
    assert_eq!(check(&target, &draft, 4, 3), [0.0, 0.0]);
    // And so is a token behind one that is kept: nothing is asked behind it.
    for rule in [VerifyRule::Rejection, VerifyRule::Block] {
        let chain =
            DrawnChain { tokens: vec![T(0), T(2), T(0)], draft_probs: vec![at(&[0]), at(&[2]), at(&[0])] };
        let mut asked = Vec::new();
        let note = |i| {
            asked.push(i);
            at(&[0])
        };
        let kept = verify_drawn(rule, &chain, note, |prob| prob >= 0.5);
        assert_eq!((kept.accepted_drafts, kept.next), (1, at(&[0])), "{rule}");
        assert_eq!(asked, [0, 1], "{rule}");
    }
}

#[test]
fn the_example_of_the_paper_gains() {
    // Two tokens, the same distributions everywhere: 1/3, 2/3 against 2/3, 1/3. Token by token 10/9 are kept, jointly 11/9.
    let of = |a: f64| Distribution::new(vec![(T(0), a), (T(1), 1.0 - a)]).unwrap();
    let target = model(2, 3, |_| of(1.0 / 3.0));
    let draft = model(2, 3, |_| of(2.0 / 3.0));
    let [rejection, block] = check(&target, &draft, 2, 2);
    assert!((rejection - 10.0 / 9.0).abs() < 1e-12, "{rejection}");
    assert!((block - 11.0 / 9.0).abs() < 1e-12, "{block}");
}

#[test]
fn distributions_are_those_of_plain_sampling() {
    let mut counter = 5;
    for size in [1usize, 5, 300] {
        let logits: Vec<f32> = (0..size).map(|_| uniform(&mut counter) as f32 * 9.0 - 4.0).collect();
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (0.8, 0, 1.0, 0.0),
            (0.8, 7, 1.0, 0.0),
            (1.3, 0, 0.9, 0.0),
            (1.0, 50, 0.95, 0.02),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed: 3 };
            let found = Distribution::of(&logits, &sampling);
            assert!(found.0.is_sorted_by_key(|(t, _)| *t));
            let wanted = token_distribution(&logits, &sampling);
            assert_eq!(found.0.len(), wanted.len());
            for (token, prob) in wanted {
                assert!((found.prob(token) - prob).abs() < 1e-12, "{sampling:?}");
            }
        }
    }
    let sampling = Sampling { temperature: 0.7, ..Sampling::GREEDY };
    let masked = [f32::NEG_INFINITY, 1.0, f32::NAN, 2.0];
    assert_eq!(Distribution::of(&masked, &sampling).0.iter().map(|(t, _)| t.0).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(Distribution::of(&[f32::NAN; 3], &sampling).0, [(T(0), 1.0)]);
    assert_eq!(Distribution::of(&[1.0, f32::INFINITY], &sampling).0, [(T(1), 1.0)]);
}

#[test]
fn draws_are_even_and_apart() {
    let of = |seed, position| {
        let draws = Draws::new(seed, position);
        [draws.draft(0), draws.draft(1), draws.coin(0), draws.coin(1), draws.next()]
    };
    assert_eq!(of(7, 3), of(7, 3));
    let mut all: Vec<f64> = (0..2000).flat_map(|i| of(i / 50, i % 50)).collect();
    assert!(all.iter().all(|u| (0.0..1.0).contains(u)));
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    // Five standard errors.
    assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0 / all.len() as f64).sqrt(), "{mean}");
    all.sort_by(f64::total_cmp);
    all.dedup();
    assert_eq!(all.len(), 10_000);
    assert_eq!(Distribution(vec![(T(4), 0.5), (T(9), 0.5)]).draw(1.0 - f64::EPSILON), T(9));
}

#[test]
fn rules_have_names() {
    for rule in VerifyRule::ALL {
        assert_eq!(rule.name().parse(), Ok(rule));
    }
    assert!("classic".parse::<VerifyRule>().is_err());
}
