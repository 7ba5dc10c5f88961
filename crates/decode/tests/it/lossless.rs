//! Output with speculation equals output without, whatever the draft says: greedy and seeded, chains and trees,
//! alone and in a batch, with penalties and under a grammar. The target is the small trained one of the repo; drafts have random weights, are always
//! wrong, or are always right.

use std::any::Any;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use draftsmith_core::{LayerId, Sampling, Shaping, TargetTokenId, TokenLogprobs, TokenTree};
use draftsmith_decode::{
    Ask, Batch, BatchOptions, Children, Committed, Costs, DecodeError, DraftPlan, Drafter, DrafterSession,
    Engine, Features, FinishReason, GenerateOptions, Generation, Grammar, GrammarState, Node, Shape,
    TokenEvent, drafter,
};
use draftsmith_kernels::Cpu;
use draftsmith_model::StepItem;
use draftsmith_model::eagle3::Feedback;

use crate::common::{random_draft, rows, target};

fn options(draft: DraftPlan, sampling: Sampling, max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, sampling, stop_ids: vec![2], draft, ..GenerateOptions::default() }
}

fn run(engine: &Engine<Cpu>, prompt: &[u32], options: &GenerateOptions) -> Generation {
    engine.generate(prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

const PLANS: [DraftPlan; 9] = [
    DraftPlan::Chain { depth: 1 },
    DraftPlan::Chain { depth: 2 },
    DraftPlan::Chain { depth: 3 },
    DraftPlan::Chain { depth: 4 },
    DraftPlan::Chain { depth: 5 },
    DraftPlan::Chain { depth: 6 },
    DraftPlan::Chain { depth: 7 },
    DraftPlan::Tree { depth: 4, top_k: 3, num_draft_tokens: 12 },
    DraftPlan::Tree { depth: 6, top_k: 8, num_draft_tokens: 40 },
];

/// Rows almost for nothing: an automatic plan drafts as much as it may.
fn cheap() -> Costs {
    Costs { verify_ms: vec![(1, 4.0), (32, 4.1)], draft_step_ms: 0.01, extend_ms: 0.01, ..Costs::default() }
}

/// Costs of a machine on which it depends.
fn fair() -> Costs {
    Costs {
        verify_ms: vec![(1, 4.0), (2, 5.0), (4, 6.4), (16, 13.5)],
        draft_step_ms: 0.3,
        extend_ms: 0.4,
        ..Costs::default()
    }
}

const SEEDED: Sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 17, ..Sampling::GREEDY };

#[test]
fn greedy_text_matches_the_recorded_one() {
    let engine = Engine::new(target(), None);
    for row in rows() {
        let sure = row.margins.iter().position(|m| *m < 0.01).unwrap_or(row.tokens.len());
        let until_eos = row.tokens.iter().position(|t| *t == 2).map_or(row.tokens.len(), |p| p + 1);
        let found = run(&engine, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 64));
        let count = sure.min(until_eos).min(found.token_ids.len());
        assert!(count > 5);
        assert_eq!(found.token_ids[..count], row.tokens[..count]);
    }
}

#[test]
fn any_eagle_draft_gives_the_same_text() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    for (seed, feedback, fc_norm) in [(1, Feedback::PreNorm, false), (2, Feedback::PostNorm, true)] {
        let draft = random_draft(&target, seed, feedback, fc_norm);
        let drafter = drafter(&target, draft).unwrap();
        let engine = Engine::new(Arc::clone(&target), Some(drafter));
        for sampling in
            [Sampling::GREEDY, SEEDED, Sampling { temperature: 1.5, top_k: 40, seed: 5, ..Sampling::GREEDY }]
        {
            for row in rows() {
                let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, sampling, 40));
                for plan in PLANS {
                    let found = run(&engine, &row.prompt, &options(plan, sampling, 40));
                    assert_eq!(found.token_ids, wanted.token_ids, "{plan:?} {sampling:?}");
                    assert_eq!(found.finish_reason, wanted.finish_reason);
                    assert_eq!(found.stats.committed_tokens as usize, found.token_ids.len() - 1);
                }
            }
        }
    }
}

#[test]
fn an_automatic_plan_gives_the_same_text_with_a_draft_and_from_repetitions_alone() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let draft = random_draft(&target, 4, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let (mut proposed, mut accepted) = (0, 0);
    for costs in [cheap(), fair()] {
        for drafter in [None, Some(Arc::clone(&drafter))] {
            let engine = Engine::new(Arc::clone(&target), drafter).with_costs(costs.clone());
            for sampling in [Sampling::GREEDY, SEEDED] {
                for row in rows() {
                    let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, sampling, 60));
                    let found = run(&engine, &row.prompt, &options(DraftPlan::Auto, sampling, 60));
                    assert_eq!(found.token_ids, wanted.token_ids, "{costs:?} {sampling:?}");
                    assert_eq!(found.finish_reason, wanted.finish_reason);
                    proposed += found.stats.proposed_drafts;
                    accepted += found.stats.accepted_drafts;
                }
            }
        }
    }
    assert!(proposed > 100 && accepted > 0, "{proposed} proposed, {accepted} accepted");
}

#[test]
fn an_automatic_plan_goes_deep_when_the_draft_is_right_and_rows_are_cheap() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let row = rows().remove(0);
    let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 41));
    let whole = [&row.prompt[..], &wanted.token_ids[..]].concat();
    let script = move |from: usize| TokenTree::chain(whole.get(from).map(|t| TargetTokenId(*t)));
    let engine = Engine::new(Arc::clone(&target), Some(Arc::new(Scripted(script)))).with_costs(cheap());
    let found = run(&engine, &row.prompt, &options(DraftPlan::Auto, Sampling::GREEDY, 41));
    assert_eq!(found.token_ids, wanted.token_ids);
    assert!(found.stats.verify_steps <= 12, "{} steps for 40 tokens", found.stats.verify_steps);
}

#[test]
fn costs_are_measured_once_and_plausible() {
    let target = target();
    let draft = random_draft(&target, 5, Feedback::PreNorm, false);
    let engine = Engine::new(Arc::clone(&target), Some(drafter(&target, draft).unwrap()));
    let costs = engine.costs().clone();
    assert_eq!(&costs, engine.costs());
    assert_eq!(costs.verify_ms[0].0, 1);
    assert!(costs.verify_ms.len() > 3 && costs.verify_ms.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1));
    assert!(costs.draft_step_ms > 0.0 && costs.extend_ms > 0.0);
    let alone = Engine::new(target, None);
    assert_eq!((alone.costs().draft_step_ms, alone.costs().extend_ms), (0.0, 0.0));
}

/// Proposes what a function of the committed tokens says.
struct Scripted<F>(F);

/// Positions that were handed over.
struct ScriptedSession(usize);

impl DrafterSession<Cpu> for ScriptedSession {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl<F: Fn(usize) -> TokenTree + Send + Sync + 'static> Drafter<Cpu> for Scripted<F> {
    fn target_layers(&self) -> &[LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        Box::new(ScriptedSession(0))
    }
    fn take_in(&self, committed: &mut [Committed<'_, Cpu>]) {
        for Committed { session, features, next_tokens } in committed {
            assert_eq!(features.rows.len(), next_tokens.len());
            session.as_any_mut().downcast_mut::<ScriptedSession>().unwrap().0 += next_tokens.len();
        }
    }
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        let children = |ask: &mut Ask<'_, Cpu>| {
            let tree = (self.0)(ask.position as usize + 1);
            let roots = tree.tokens.iter().zip(&tree.parents).filter(|(_, parent)| parent.is_none());
            roots.take(ask.k).map(|(token, _)| (token.0, 0.9f32.ln())).collect()
        };
        asks.iter_mut().map(children).collect()
    }
    fn expand(&self, _: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        nodes.iter().map(|_| (0, Vec::new())).collect()
    }
    fn propose(&self, asks: &mut [Ask<'_, Cpu>], shapes: &[Shape]) -> Vec<TokenTree> {
        let mut trees = Vec::new();
        for (ask, shape) in asks.iter_mut().zip(shapes) {
            let seen = ask.session.as_any_mut().downcast_mut::<ScriptedSession>().unwrap().0;
            assert_eq!(seen as u64, ask.position, "every committed position was handed over once");
            let mut tree = (self.0)(ask.position as usize + 1);
            let keep = tree.depths().iter().take_while(|d| (**d as usize) < shape.depth).count();
            tree.tokens.truncate(keep);
            tree.parents.truncate(keep);
            trees.push(tree);
        }
        trees
    }
}

#[test]
fn a_draft_that_knows_the_answer_is_accepted_to_its_end() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    for sampling in [Sampling::GREEDY, SEEDED] {
        for row in rows() {
            let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, sampling, 41));
            let whole = [&row.prompt[..], &wanted.token_ids[..]].concat();
            let script = move |from: usize| {
                let to = (from + 4).min(whole.len());
                TokenTree::chain(whole[from.min(to)..to].iter().map(|t| TargetTokenId(*t)))
            };
            let engine = Engine::new(Arc::clone(&target), Some(Arc::new(Scripted(script))));
            let found = run(&engine, &row.prompt, &options(DraftPlan::Chain { depth: 4 }, sampling, 41));
            assert_eq!(found.token_ids, wanted.token_ids);
            let steps = (found.token_ids.len() - 1).div_ceil(5) as u64;
            assert_eq!(found.stats.verify_steps, steps, "five tokens a step");
        }
    }
}

#[test]
fn a_draft_that_is_always_wrong_costs_steps_but_not_text() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let script = |_: usize| {
        let mut tree = TokenTree::chain([TargetTokenId(1), TargetTokenId(1)]);
        tree.push(TargetTokenId(0), None);
        tree
    };
    let engine = Engine::new(Arc::clone(&target), Some(Arc::new(Scripted(script))));
    for row in rows() {
        let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 30));
        let plan = DraftPlan::Tree { depth: 2, top_k: 2, num_draft_tokens: 3 };
        let found = run(&engine, &row.prompt, &options(plan, Sampling::GREEDY, 30));
        assert_eq!(found.token_ids, wanted.token_ids);
        assert_eq!(found.stats.accept_len(), Some(1.0));
        assert_eq!(found.stats.accepted_drafts, 0);
    }
}

#[test]
fn requests_in_a_batch_get_the_text_they_get_alone() {
    let target = target();
    let draft = random_draft(&target, 3, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let engine = Engine::new(target, Some(drafter)).with_costs(cheap());
    let requests: Vec<(Vec<u32>, GenerateOptions)> = rows()
        .into_iter()
        .enumerate()
        .map(|(i, row)| {
            let plan = [DraftPlan::None, PLANS[4], DraftPlan::Auto, PLANS[7]][i % 4];
            let sampling = if i % 2 == 0 { Sampling::GREEDY } else { SEEDED };
            (row.prompt, options(plan, sampling, 10 + 5 * i))
        })
        .collect();
    let alone: Vec<Vec<u32>> = requests.iter().map(|(p, o)| run(&engine, p, o).token_ids).collect();
    for batch_size in [1, 3, 8] {
        let mut queue = requests.iter().cloned().enumerate();
        let mut done: Vec<Option<Vec<u32>>> = vec![None; requests.len()];
        engine
            .generate_batch(
                BatchOptions { batch_size },
                &mut || queue.next().map(|(i, (p, o))| (i, p, o)),
                &mut |id, generation| {
                    done[id] = Some(generation.token_ids);
                    ControlFlow::Continue(())
                },
            )
            .unwrap();
        for (found, wanted) in done.iter().zip(&alone) {
            assert_eq!(found.as_ref(), Some(wanted), "batch of {batch_size}");
        }
    }
}

#[test]
fn a_turn_that_begins_like_an_earlier_one_gets_the_text_of_a_fresh_engine() {
    let target = target();
    let fresh = Engine::new(Arc::clone(&target), None);
    let keeping = Engine::new(Arc::clone(&target), None).with_prefix_cache(64 << 20);
    for sampling in [Sampling::GREEDY, SEEDED] {
        for row in rows() {
            let mut text = row.prompt.clone();
            for turn in 0..3 {
                let asked = options(DraftPlan::None, sampling, 12);
                let wanted = run(&fresh, &text, &asked);
                assert_eq!(run(&keeping, &text, &asked).token_ids, wanted.token_ids, "turn {turn}");
                // The next turn repeats everything; the one after that differs inside the answer.
                text.extend(&wanted.token_ids);
                if turn == 1 {
                    let at = text.len() - 2;
                    text[at] = 5;
                }
                text.extend([7, 8, 9]);
            }
        }
    }
    // A cache without room keeps nothing and still answers.
    let none = Engine::new(target, None).with_prefix_cache(1);
    let row = rows().remove(0);
    let asked = options(DraftPlan::None, Sampling::GREEDY, 12);
    assert_eq!(run(&none, &row.prompt, &asked).token_ids, run(&fresh, &row.prompt, &asked).token_ids);
}

#[test]
fn limits_end_a_generation_inside_an_accepted_prefix() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let row = rows().remove(0);
    let free = run(&plain, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 40));
    let whole = [&row.prompt[..], &free.token_ids[..]].concat();
    let script = move |from: usize| {
        let to = (from + 7).min(whole.len());
        TokenTree::chain(whole[from.min(to)..to].iter().map(|t| TargetTokenId(*t)))
    };
    let engine = Engine::new(Arc::clone(&target), Some(Arc::new(Scripted(script))));
    for limit in 1..12 {
        let found = run(&engine, &row.prompt, &options(PLANS[6], Sampling::GREEDY, limit));
        assert_eq!(found.token_ids, free.token_ids[..limit]);
        assert_eq!(found.finish_reason, FinishReason::Length);
    }
    // A stop id in the middle of an accepted proposal: nothing after it is committed or counted.
    let stop = free.token_ids[3];
    let first = free.token_ids.iter().position(|t| *t == stop).unwrap();
    let mut with_stop = options(PLANS[6], Sampling::GREEDY, 40);
    with_stop.stop_ids = vec![stop];
    let found = run(&engine, &row.prompt, &with_stop);
    assert_eq!(found.token_ids, free.token_ids[..=first]);
    assert_eq!(found.finish_reason, FinishReason::Stop);
    assert_eq!(found.stats.committed_tokens as usize, first);
    // The end of the context.
    let short = Engine::new(target, None).with_max_context(row.prompt.len() + 4);
    let found = run(&short, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 40));
    assert_eq!(found.token_ids.len(), 4);
}

#[test]
fn bad_requests_are_refused() {
    let engine = Engine::new(target(), None);
    let refuse = |prompt: &[u32], plan| {
        engine
            .generate(prompt, &options(plan, Sampling::GREEDY, 4), &mut |_| ControlFlow::Continue(()))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refuse(&[], DraftPlan::None), "the prompt is empty");
    assert_eq!(
        refuse(&[5, 1_000_000], DraftPlan::None),
        "prompt token 1000000 at position 1 is outside the target's vocabulary of 1024"
    );
    assert_eq!(refuse(&[5], PLANS[0]), "speculation was asked for, but no draft is loaded");
    assert!(refuse(&vec![5; 100_000], DraftPlan::None).contains("but the context ends at"));
}

/// Only ids of the class that the last token calls for; any at the beginning.
#[derive(Debug)]
struct Classes;

struct ClassState(u32);

impl Grammar for Classes {
    fn begin(&self) -> Box<dyn GrammarState> {
        Box::new(ClassState(0))
    }
}

impl GrammarState for ClassState {
    fn mask(&mut self, logits: &mut [f32]) {
        for (id, logit) in logits.iter_mut().enumerate() {
            if id as u32 % 3 != self.0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    fn advance(&mut self, id: u32) {
        assert_eq!(id % 3, self.0, "only what the mask left is committed");
        self.0 = (self.0 + 1 + id % 2) % 3;
    }
    fn fork(&self) -> Box<dyn GrammarState> {
        Box::new(ClassState(self.0))
    }
}

/// Tokens, and what was said about them.
fn events(
    engine: &Engine<Cpu>,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Vec<(u32, Option<TokenLogprobs>)> {
    let mut seen = Vec::new();
    let mut note = |event: &TokenEvent| {
        seen.push((event.id, event.logprobs.clone()));
        ControlFlow::Continue(())
    };
    let done = engine.generate(prompt, options, &mut note).unwrap();
    assert_eq!(done.token_ids, seen.iter().map(|s| s.0).collect::<Vec<_>>());
    seen
}

#[test]
fn penalties_grammars_and_log_probabilities_do_not_see_the_draft() {
    let target = target();
    let plain = Engine::new(Arc::clone(&target), None);
    let draft = random_draft(&target, 6, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let eagle = Engine::new(Arc::clone(&target), Some(drafter)).with_costs(cheap());
    let penalties = Shaping {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.6,
        logit_bias: vec![(9, 2.0)],
    };
    let shapes: [(Shaping, Option<Arc<dyn Grammar>>); 3] = [
        (penalties.clone(), None),
        (Shaping::default(), Some(Arc::new(Classes))),
        (penalties, Some(Arc::new(Classes))),
    ];
    let (mut accepted, mut changed, mut cases) = (0, 0, 0);
    for sampling in [Sampling::GREEDY, SEEDED] {
        for row in rows() {
            let free = run(&plain, &row.prompt, &options(DraftPlan::None, sampling, 30));
            for (shaping, grammar) in &shapes {
                let asked = |draft| GenerateOptions {
                    shaping: shaping.clone(),
                    grammar: grammar.clone(),
                    logprobs: Some(3),
                    ..options(draft, sampling, 30)
                };
                let wanted = events(&plain, &row.prompt, &asked(DraftPlan::None));
                let ids: Vec<u32> = wanted.iter().map(|w| w.0).collect();
                cases += 1;
                changed += u32::from(ids != free.token_ids);
                let says = wanted.iter().map(|w| w.1.as_ref().unwrap());
                assert!(says.clone().all(|s| s.chosen <= s.top[0].1 && s.top.len() == 3));
                for plan in [PLANS[0], PLANS[4], PLANS[7], DraftPlan::Auto] {
                    assert_eq!(events(&eagle, &row.prompt, &asked(plan)), wanted, "{plan:?} {sampling:?}");
                }
                // A draft that knows the answer, grammar or not.
                let whole = [&row.prompt[..], &ids[..]].concat();
                let script = move |from: usize| {
                    let to = (from + 4).min(whole.len());
                    TokenTree::chain(whole[from.min(to)..to].iter().map(|t| TargetTokenId(*t)))
                };
                let knows = Engine::new(Arc::clone(&target), Some(Arc::new(Scripted(script))));
                let found = run(&knows, &row.prompt, &asked(PLANS[3]));
                assert_eq!(found.token_ids, ids);
                accepted += found.stats.accepted_drafts;
            }
        }
    }
    assert!(accepted > 100, "{accepted}");
    assert!(changed * 2 > cases, "{changed} of {cases} texts differ from the free ones");
}

#[test]
fn a_batch_takes_requests_in_and_out_between_steps() {
    let target = target();
    let draft = random_draft(&target, 3, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let engine = || Arc::new(Engine::new(Arc::clone(&target), Some(Arc::clone(&drafter))));
    let plain = Engine::new(Arc::clone(&target), None);
    let rows = rows();
    // Longer than what one step reads: the others go on while this prompt is read in pieces.
    let long: Vec<u32> = rows.iter().flat_map(|r| r.prompt.clone()).cycle().take(700).collect();
    let prompts: Vec<&[u32]> =
        std::iter::once(&long[..]).chain(rows.iter().map(|r| &r.prompt[..])).take(4).collect();
    let asked = options(PLANS[2], Sampling::GREEDY, 20);
    let wanted: Vec<Vec<u32>> = prompts
        .iter()
        .map(|p| run(&plain, p, &options(DraftPlan::None, Sampling::GREEDY, 20)).token_ids)
        .collect();

    let mut batch = Batch::new(engine());
    let mut done: Vec<Option<Generation>> = vec![None; prompts.len()];
    let (mut steps, mut next) = (0, 0);
    while done.iter().any(Option::is_none) {
        if steps % 2 == 0 && next < prompts.len() {
            batch.admit(next as u64, prompts[next], &asked).unwrap();
            next += 1;
        }
        if steps == 5 {
            // A new draft in the middle: those under way go on without one.
            batch.replace_engine(engine()).unwrap();
            assert!(batch.cancel(99).is_none());
        }
        for (id, generation) in batch.step(&mut |_, _| ControlFlow::Continue(())) {
            done[id as usize] = Some(generation);
        }
        steps += 1;
    }
    assert!(batch.is_empty());
    for (found, wanted) in done.iter().flatten().zip(&wanted) {
        assert_eq!(&found.token_ids, wanted);
    }

    batch.admit(7, prompts[1], &asked).unwrap();
    batch.step(&mut |_, _| ControlFlow::Continue(()));
    let cut = batch.cancel(7).unwrap();
    assert_eq!((cut.finish_reason, batch.len()), (FinishReason::Cancelled, 0));
    assert!(wanted[1].starts_with(&cut.token_ids) && cut.token_ids.len() < 20);
    let other = Arc::new(Engine::new(crate::common::target(), None));
    assert_eq!(batch.replace_engine(other).unwrap_err(), DecodeError::AnotherTarget);
}

/// Counts the positions that an EAGLE-3 drafter is handed.
struct Counting {
    inner: Arc<dyn Drafter<Cpu>>,
    handed: AtomicUsize,
}

impl Drafter<Cpu> for Counting {
    fn target_layers(&self) -> &[LayerId] {
        self.inner.target_layers()
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        self.inner.begin()
    }
    fn take_in(&self, committed: &mut [Committed<'_, Cpu>]) {
        let rows: usize = committed.iter().map(|c| c.next_tokens.len()).sum();
        self.handed.fetch_add(rows, Ordering::Relaxed);
        self.inner.take_in(committed);
    }
    fn rollback_to(&self, session: &mut dyn DrafterSession<Cpu>, positions: usize) {
        self.inner.rollback_to(session, positions);
    }
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        self.inner.roots(asks)
    }
    fn expand(&self, asks: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        self.inner.expand(asks, nodes)
    }
}

#[test]
fn a_turn_with_a_draft_reads_only_what_is_new_and_proposes_what_a_fresh_one_would() {
    let target = target();
    let new_drafter = || drafter(&target, random_draft(&target, 8, Feedback::PreNorm, false)).unwrap();
    let fresh = Engine::new(Arc::clone(&target), Some(new_drafter())).with_costs(cheap());
    for sampling in [Sampling::GREEDY, SEEDED] {
        for plan in [
            DraftPlan::Chain { depth: 3 },
            DraftPlan::Tree { depth: 3, top_k: 2, num_draft_tokens: 6 },
            DraftPlan::Auto,
        ] {
            let counting = Arc::new(Counting { inner: new_drafter(), handed: AtomicUsize::new(0) });
            let drafter: Arc<dyn Drafter<Cpu>> = Arc::clone(&counting) as _;
            let keeping = Engine::new(Arc::clone(&target), Some(drafter)).with_costs(cheap());
            let keeping = keeping.with_prefix_cache(64 << 20);
            let mut text: Vec<u32> = rows()[0].prompt.iter().copied().cycle().take(300).collect();
            let mut known = 0;
            for turn in 0..4 {
                // Another plan each turn leaves nothing that another cannot go on with.
                let asked = options(if turn == 2 { DraftPlan::None } else { plan }, sampling, 12);
                let wanted = run(&fresh, &text, &asked);
                counting.handed.store(0, Ordering::Relaxed);
                let found = run(&keeping, &text, &asked);
                assert_eq!(found.token_ids, wanted.token_ids, "{plan:?}, turn {turn}");
                let handed = counting.handed.load(Ordering::Relaxed);
                if plan != DraftPlan::Auto && turn != 2 {
                    assert_eq!(found.stats, wanted.stats, "the same was proposed and accepted");
                }
                match turn {
                    // What was asked since the last answer is new, and this one; the last step may have been cut.
                    1 => assert!(handed <= text.len() + 12 - known + 5, "{handed} of {}", text.len()),
                    2 => assert_eq!(handed, 0, "without a draft"),
                    // The turn before took the cache and left none for a draft.
                    _ => assert!(handed + 1 >= text.len(), "{handed} of {}", text.len()),
                }
                // The last token of an answer is not in any cache.
                known = text.len() + wanted.token_ids.len() - 1;
                text.extend(&wanted.token_ids);
                text.extend([7, 8, 9]);
            }
            // Inside the answer something else is said: what is shared ends there.
            let at = text.len() - 8;
            text[at] = 5;
            let asked = options(plan, sampling, 12);
            counting.handed.store(0, Ordering::Relaxed);
            assert_eq!(run(&keeping, &text, &asked).token_ids, run(&fresh, &text, &asked).token_ids);
            assert!(counting.handed.load(Ordering::Relaxed) < 60);
        }
    }
}

#[test]
fn features_that_wait_are_bounded_and_taken_in_by_pieces_with_the_same_result() {
    let target = target();
    let draft = random_draft(&target, 8, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let text: Vec<u32> = rows().iter().flat_map(|r| r.prompt.clone()).cycle().take(901).collect();
    let mut kv = target.new_kv();
    let parents = TokenTree::chain_parents(900);
    let item = StepItem { kv: &mut kv, tokens: &text[..900], parents: &parents };
    let output = target.forward(&mut [item], drafter.target_layers());
    let take_in = |session: &mut Box<dyn DrafterSession<Cpu>>, rows: &[u32]| {
        let next_tokens: Vec<u32> = rows.iter().map(|r| text[*r as usize + 1]).collect();
        let features = Features { output: &output, rows };
        drafter.take_in(&mut [Committed { session: session.as_mut(), features, next_tokens: &next_tokens }]);
    };
    let bits = |list: &Children| list.iter().map(|(t, p)| (*t, p.to_bits())).collect::<Vec<_>>();
    let says = |sessions: &mut [Box<dyn DrafterSession<Cpu>>]| {
        let sampling = &Sampling::GREEDY;
        let ask = |session| Ask { session, sampling, text: &[], position: 900, k: 5, whole: false };
        let mut asks: Vec<Ask<'_, Cpu>> = sessions.iter_mut().map(|s| ask(s.as_mut())).collect();
        let first = drafter.roots(&mut asks);
        // Two levels, of each sequence two nodes: the second hangs below the first.
        let node = |of: usize, parent, token, depth| Node { of, parent, token, depth };
        let below = |of: usize| node(of, None, first[of][0].0, 0);
        let second = drafter.expand(&mut asks, &(0..first.len()).map(below).collect::<Vec<_>>());
        let further = |of: usize| node(of, Some(second[of].0), second[of].1[0].0, 1);
        let other = |of: usize| node(of, None, first[of][1].0, 0);
        let nodes: Vec<Node> = (0..first.len()).flat_map(|of| [further(of), other(of)]).collect();
        let third = drafter.expand(&mut asks, &nodes);
        let third = third.chunks(2).map(|pair| [bits(&pair[0].1), bits(&pair[1].1)]);
        let levels = first.iter().zip(&second).zip(third);
        levels.map(|((a, (_, b)), c)| (bits(a), bits(b), c)).collect::<Vec<_>>()
    };
    // A position at a time, each taken in at once.
    let mut plain = [drafter.begin()];
    for row in 0..900u32 {
        take_in(&mut plain[0], &[row]);
        drafter.roots(&mut [Ask {
            session: plain[0].as_mut(),
            sampling: &Sampling::GREEDY,
            text: &[],
            position: 0,
            k: 1,
            whole: false,
        }]);
    }
    let (per_token, per_session) = (drafter.bytes_per_token(), drafter.bytes_per_session());
    assert!(per_token > 0 && plain[0].held_bytes() == 900 * per_token);
    let wanted = says(&mut plain).remove(0);
    let mut late: Vec<Box<dyn DrafterSession<Cpu>>> = Vec::new();
    for piece in [1, 100, 256, 257, 900] {
        let mut session = drafter.begin();
        let all: Vec<u32> = (0..900).collect();
        for rows in all.chunks(piece) {
            take_in(&mut session, rows);
            let held = session.held_bytes();
            assert!(held <= 900 * per_token + per_session, "{held} bytes in pieces of {piece}");
        }
        assert!(session.held_bytes() > 600 * per_token, "what waits is counted, too");
        late.push(session);
    }
    // One alone, and the others side by side in one pass.
    assert_eq!(says(&mut late[..1]), std::slice::from_ref(&wanted));
    assert_eq!(says(&mut late), vec![wanted; 5]);
}

#[test]
fn drafts_that_rest_under_load_hold_no_more_than_they_may() {
    let target = target();
    let draft = random_draft(&target, 8, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    // No row is worth its time: all of them rest.
    let dear = Costs {
        verify_ms: vec![(1, 1.0), (32, 64.0)],
        draft_step_ms: 5.0,
        extend_ms: 5.0,
        ..Costs::default()
    };
    let plain = Engine::new(Arc::clone(&target), None);
    let engine = Engine::new(target, Some(drafter)).with_costs(dear);
    let long: Vec<u32> = rows().iter().flat_map(|r| r.prompt.clone()).cycle().take(600).collect();
    let mut batch = Batch::new(&engine);
    for id in 0..4 {
        let asked = options(DraftPlan::Auto, Sampling::GREEDY, 300);
        batch.admit(id, &long[..600 - id as usize], &asked).unwrap();
    }
    let may = engine.draft_bytes_per_sequence() + 900 * engine.draft_bytes_per_token();
    let mut done = 0;
    while !batch.is_empty() {
        for (id, found) in batch.step(&mut |_, _| ControlFlow::Continue(())) {
            let asked = options(DraftPlan::None, Sampling::GREEDY, 300);
            assert_eq!(found.token_ids, run(&plain, &long[..600 - id as usize], &asked).token_ids);
            done += 1;
        }
        assert!(batch.draft_bytes() <= batch.len() * may, "{} bytes", batch.draft_bytes());
    }
    assert_eq!(done, 4);
}

#[test]
fn steps_correct_measured_costs_and_not_the_text() {
    let target = target();
    let draft = random_draft(&target, 8, Feedback::PreNorm, false);
    let drafter = drafter(&target, draft).unwrap();
    let plain = Engine::new(Arc::clone(&target), None);
    // Nothing takes as long as this.
    let wrong = Costs {
        verify_ms: vec![(1, 1e6), (32, 1e6)],
        draft_step_ms: 1e5,
        extend_ms: 1e5,
        ..Costs::default()
    };
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    let engine = Engine::new(target, Some(drafter))
        .with_measured_costs(wrong.clone())
        .on_costs_off(Box::new(move |off| hears.lock().unwrap().push(off.clone())));
    for row in rows() {
        let wanted = run(&plain, &row.prompt, &options(DraftPlan::None, Sampling::GREEDY, 60));
        let found = run(&engine, &row.prompt, &options(DraftPlan::Auto, Sampling::GREEDY, 60));
        assert_eq!(found.token_ids, wanted.token_ids);
    }
    assert_eq!(engine.costs(), &wrong, "what was measured stays what it is");
    let now = engine.current_costs();
    assert!(now.verify_ms[0].1 < 1e4 && now.draft_step_ms < 1e5, "{now:?}");
    assert_eq!(told.lock().unwrap().len(), 1, "told once");
}
