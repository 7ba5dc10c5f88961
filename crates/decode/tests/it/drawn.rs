//! Answers whose draft tokens are drawn and judged by rejection or jointly: distributed as the target's own, and the
//! same again with the same seed, alone and in a batch.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use draftsmith_core::{Distribution, LayerId, Sampling, Shaping, TargetTokenId, VerifyRule};
use draftsmith_decode::{
    Ask, Batch, Children, Committed, DecodeError, DraftPlan, Drafter, DrafterSession, Engine,
    GenerateOptions, Generation, Grammar, GrammarState, Node, TokenOrigin, drafter,
};
use draftsmith_kernels::Cpu;
use draftsmith_model::eagle3::Feedback;

use crate::common::{random_draft, rows, target};

const RULES: [VerifyRule; 2] = [VerifyRule::Rejection, VerifyRule::Block];

fn run(engine: &Engine<Cpu>, prompt: &[u32], options: &GenerateOptions) -> Generation {
    engine.generate(prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Guesses the same tokens everywhere, with these weights.
struct Guesses(Vec<(u32, f32)>);

struct GuessSession;

impl DrafterSession<Cpu> for GuessSession {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Guesses {
    fn children(&self, asks: usize) -> Vec<Children> {
        vec![self.0.iter().map(|(id, weight)| (*id, weight.ln())).collect(); asks]
    }
}

impl Drafter<Cpu> for Guesses {
    fn target_layers(&self) -> &[LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        Box::new(GuessSession)
    }
    fn take_in(&self, _: &mut [Committed<'_, Cpu>]) {}
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        assert!(asks.iter().all(|ask| ask.whole));
        self.children(asks.len())
    }
    fn expand(&self, _: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        (0..).zip(self.children(nodes.len())).collect()
    }
}

/// Only ids that leave another rest than the last one.
#[derive(Debug)]
struct Changing;

struct ChangingState(u32);

impl Grammar for Changing {
    fn begin(&self) -> Box<dyn GrammarState> {
        Box::new(ChangingState(7))
    }
}

impl GrammarState for ChangingState {
    fn mask(&mut self, logits: &mut [f32]) {
        for (id, logit) in logits.iter_mut().enumerate() {
            if id as u32 % 4 == self.0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    fn advance(&mut self, id: u32) {
        assert_ne!(id % 4, self.0, "only what the mask left is judged or committed");
        self.0 = id % 4;
    }
    fn fork(&self) -> Box<dyn GrammarState> {
        Box::new(ChangingState(self.0))
    }
}

/// Logits after a text but for a constant, as the plain engine tells them: good for everything that a constant does not
/// change, which leaves the repetition penalty out.
fn logits(engine: &Engine<Cpu>, text: &[u32]) -> Vec<f32> {
    let vocab = engine.target().config().vocab_size;
    let options = GenerateOptions { max_new_tokens: 1, logprobs: Some(vocab), ..GenerateOptions::default() };
    let mut row = vec![f32::NEG_INFINITY; vocab];
    let mut note = |event: &draftsmith_decode::TokenEvent| {
        for (id, value) in &event.logprobs.as_ref().unwrap().top {
            row[*id as usize] = *value;
        }
        ControlFlow::Continue(())
    };
    engine.generate(text, &options, &mut note).unwrap();
    row
}

/// Texts of `length` tokens with their probabilities under all settings, by the target alone.
fn exact(
    engine: &Engine<Cpu>,
    prompt: &[u32],
    options: &GenerateOptions,
    length: usize,
) -> BTreeMap<Vec<u32>, f64> {
    let mut texts = BTreeMap::from([(Vec::new(), 1.0)]);
    for _ in 0..length {
        let mut longer = BTreeMap::new();
        for (text, prob) in texts {
            let mut row = logits(engine, &[prompt, &text].concat());
            options.shaping.apply(&mut row, prompt, &text);
            if let Some(grammar) = &options.grammar {
                let mut state = grammar.begin();
                text.iter().for_each(|id| state.advance(*id));
                state.mask(&mut row);
            }
            let next = Distribution::of(&row, &options.sampling);
            for id in 0..row.len() as u32 {
                let own = next.prob(TargetTokenId(id));
                if own > 0.0 {
                    longer.insert([&text[..], &[id]].concat(), prob * own);
                }
            }
        }
        texts = longer;
    }
    texts
}

/// Chi-square of counts against probabilities, and a bound that one of 30,000 true ones is above: rare cells together.
fn chi_square(
    counts: &BTreeMap<Vec<u32>, usize>,
    probs: &BTreeMap<Vec<u32>, f64>,
    draws: usize,
) -> (f64, f64) {
    let (mut sum, mut cells) = (0.0, 0.0f64);
    let (mut rare_seen, mut rare_wanted) = (0.0, 0.0);
    for (text, prob) in probs {
        let (seen, wanted) = (counts.get(text).copied().unwrap_or(0) as f64, prob * draws as f64);
        if wanted < 8.0 {
            rare_seen += seen;
            rare_wanted += wanted;
        } else {
            sum += (seen - wanted).powi(2) / wanted;
            cells += 1.0;
        }
    }
    if rare_wanted >= 8.0 {
        sum += (rare_seen - rare_wanted).powi(2) / rare_wanted;
        cells += 1.0;
    }
    let free = cells - 1.0;
    // Wilson and Hilferty, four standard deviations.
    let spread = 2.0 / (9.0 * free);
    (sum, free * (1.0 - spread + 4.0 * spread.sqrt()).powi(3))
}

#[test]
fn texts_are_distributed_as_the_targets_own() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let prompt = &rows()[0].prompt;
    let settings = [
        (
            GenerateOptions {
                sampling: Sampling { temperature: 1.4, top_k: 4, ..Sampling::GREEDY },
                ..Default::default()
            },
            1,
        ),
        (
            GenerateOptions {
                sampling: Sampling {
                    temperature: 2.0,
                    top_k: 3,
                    top_p: 0.98,
                    min_p: 0.01,
                    ..Sampling::GREEDY
                },
                shaping: Shaping { presence_penalty: 0.8, frequency_penalty: 0.4, ..Shaping::default() },
                grammar: Some(Arc::new(Changing)),
                ..Default::default()
            },
            2,
        ),
    ];
    const DRAWS: usize = 3000;
    for (options, offset) in settings {
        let options = GenerateOptions { max_new_tokens: 4, draft: DraftPlan::Chain { depth: 3 }, ..options };
        let probs = exact(&plain, prompt, &options, 4);
        // What the target may say, with weights that are not its own, and some that it never says.
        let mut shares: BTreeMap<u32, f64> = BTreeMap::new();
        for (text, prob) in &probs {
            text.iter().for_each(|id| *shares.entry(*id).or_default() += prob);
        }
        let mut guesses: Vec<(u32, f32)> =
            shares.iter().map(|(id, share)| (*id, share.sqrt() as f32 + 0.02)).collect();
        guesses.push((1023, 0.1));
        let engine = Engine::new(Arc::clone(&target), Some(Arc::new(Guesses(guesses))));
        for rule in RULES {
            let mut counts: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
            let (mut accepted, mut proposed) = (0, 0);
            for draw in 0..DRAWS {
                let sampling = Sampling { seed: (offset * DRAWS + draw) as u64, ..options.sampling };
                let done =
                    run(&engine, prompt, &GenerateOptions { verify: rule, sampling, ..options.clone() });
                assert!(probs.contains_key(&done.token_ids), "{rule}: {:?}", done.token_ids);
                *counts.entry(done.token_ids).or_default() += 1;
                accepted += done.stats.accepted_drafts;
                proposed += done.stats.proposed_drafts;
            }
            let (found, bound) = chi_square(&counts, &probs, DRAWS);
            assert!(found < bound, "{rule}: chi-square {found}, bound {bound}");
            assert!(accepted * 10 > proposed, "{rule}: {accepted} of {proposed} accepted");
        }
        // A wrong distribution is found: the draft's tokens, whatever the target says of them.
        let uniform: BTreeMap<Vec<u32>, usize> =
            probs.keys().map(|t| (t.clone(), DRAWS / probs.len())).collect();
        let (found, bound) = chi_square(&uniform, &probs, DRAWS);
        assert!(found > bound, "{found}, {bound}");
    }
}

#[test]
fn a_seed_gives_the_same_text_again_alone_and_in_a_batch() {
    let target = target();
    let draft = random_draft(&target, 6, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let engine = Arc::new(Engine::new(Arc::clone(&target), Some(drafter)));
    let plans = [DraftPlan::Chain { depth: 1 }, DraftPlan::Chain { depth: 5 }, DraftPlan::Auto];
    for rule in RULES {
        let asked = |i: usize| GenerateOptions {
            max_new_tokens: 30,
            sampling: Sampling { temperature: 1.2, top_p: 0.97, seed: i as u64, ..Sampling::GREEDY },
            stop_ids: vec![2],
            draft: plans[i % 3],
            verify: if i == 4 { VerifyRule::Seeded } else { rule },
            ..GenerateOptions::default()
        };
        let prompts: Vec<Vec<u32>> = rows().into_iter().map(|row| row.prompt).take(6).collect();
        let alone: Vec<Generation> =
            prompts.iter().enumerate().map(|(i, p)| run(&engine, p, &asked(i))).collect();
        let proposed: u64 = alone.iter().map(|done| done.stats.proposed_drafts).sum();
        assert!(proposed > 100, "{proposed}");
        for (i, (prompt, first)) in prompts.iter().zip(&alone).enumerate() {
            let again = run(&engine, prompt, &asked(i));
            assert_eq!((again.token_ids, again.stats), (first.token_ids.clone(), first.stats.clone()));
        }
        let mut batch = Batch::new(Arc::clone(&engine));
        for (i, prompt) in prompts.iter().enumerate() {
            batch.admit(i as u64, prompt, &asked(i)).unwrap();
        }
        let mut seen = 0;
        while !batch.is_empty() {
            for (id, done) in batch.step(&mut |_, _| ControlFlow::Continue(())) {
                assert_eq!(done.token_ids, alone[id as usize].token_ids, "{rule}, {id}");
                seen += 1;
            }
        }
        assert_eq!(seen, prompts.len());
    }
}

#[test]
fn where_nothing_is_sampled_all_rules_are_one() {
    let target = target();
    let draft = random_draft(&target, 7, Feedback::PreNorm, false);
    let engine = Engine::new(Arc::clone(&target), Some(drafter(&target, draft).unwrap()));
    let plan = DraftPlan::Tree { depth: 3, top_k: 2, num_draft_tokens: 6 };
    let options = GenerateOptions { max_new_tokens: 20, draft: plan, ..GenerateOptions::default() };
    let wanted = run(&engine, &rows()[0].prompt, &options);
    for rule in RULES {
        let found = run(&engine, &rows()[0].prompt, &GenerateOptions { verify: rule, ..options.clone() });
        assert_eq!((found.token_ids, found.stats), (wanted.token_ids.clone(), wanted.stats.clone()));
    }
}

#[test]
fn a_tree_is_refused_and_origins_and_log_probabilities_are_told() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let prompt = &rows()[0].prompt;
    let sampling = Sampling { temperature: 0.9, seed: 3, ..Sampling::GREEDY };
    let tree = DraftPlan::Tree { depth: 3, top_k: 2, num_draft_tokens: 6 };
    let guesses = Guesses((0..1024).map(|id| (id, 1.0)).collect());
    let engine = Engine::new(Arc::clone(&target), Some(Arc::new(guesses)));
    for rule in RULES {
        let options = GenerateOptions {
            max_new_tokens: 12,
            sampling,
            verify: rule,
            logprobs: Some(1024),
            ..GenerateOptions::default()
        };
        let refused = GenerateOptions { draft: tree, ..options.clone() };
        let error = engine.generate(prompt, &refused, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert_eq!(error, DecodeError::NeedsChain { rule });
        assert!(error.hint().is_some());
        let mut text = prompt.clone();
        let mut origins = Vec::new();
        let mut note = |event: &draftsmith_decode::TokenEvent| {
            let said = event.logprobs.as_ref().unwrap();
            let own = logits(&plain, &text);
            assert!((said.chosen - own[event.id as usize]).abs() < 1e-5);
            text.push(event.id);
            origins.push(event.origin);
            ControlFlow::Continue(())
        };
        let chain = GenerateOptions { draft: DraftPlan::Chain { depth: 4 }, ..options };
        engine.generate(prompt, &chain, &mut note).unwrap();
        assert_eq!(origins[0], TokenOrigin::Plain);
        assert!(origins[1..].iter().all(|origin| *origin != TokenOrigin::Plain || origins.len() == 12));
    }
}
