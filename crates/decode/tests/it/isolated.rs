//! A panic costs the request that it comes from, and log-probabilities of prompts are those of the target's own rows.

use std::any::Any;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use draftsmith_core::{LayerId, Sampling, TargetTokenId, TokenLogprobs, TokenTree};
use draftsmith_decode::{
    Ask, Batch, Children, Committed, DraftPlan, Drafter, DrafterSession, Engine, FinishReason,
    GenerateOptions, Grammar, GrammarState, Node, Shape,
};
use draftsmith_kernels::Cpu;
use draftsmith_model::{StepItem, Target};

use crate::common::target;

/// Prompts of different lengths; the last one is read in several steps.
fn prompts() -> Vec<Vec<u32>> {
    let prompt = |length: u32, from: u32| (0..length).map(|i| 3 + (from + i * 37) % 1000).collect();
    vec![prompt(5, 11), prompt(40, 7), prompt(23, 400), prompt(9, 77), prompt(600, 1)]
}

/// Any text; a request that runs into `fatal` panics there, if it has one.
#[derive(Debug)]
struct Fuse {
    fatal: Option<u32>,
    burnt: AtomicU32,
}

struct FuseState {
    left: u32,
    fatal: bool,
    last: u32,
}

impl Grammar for Fuse {
    fn begin(&self) -> Box<dyn GrammarState> {
        self.burnt.fetch_add(1, Ordering::Relaxed);
        Box::new(FuseState { left: self.fatal.unwrap_or(0), fatal: self.fatal.is_some(), last: 0 })
    }
}

impl GrammarState for FuseState {
    fn mask(&mut self, logits: &mut [f32]) {
        assert!(!self.fatal || self.left > 0, "the fuse is burnt");
        // The text depends on the state: one that is not put right after a step that broke off shows.
        logits[(self.last as usize * 7 + 3) % 1024] += 4.0;
    }
    fn advance(&mut self, id: u32) {
        self.left = self.left.saturating_sub(1);
        self.last = self.last.wrapping_mul(31).wrapping_add(id);
    }
    fn fork(&self) -> Box<dyn GrammarState> {
        Box::new(FuseState { ..*self })
    }
}

/// Guesses some tokens, right and wrong ones, and panics once where it is told to.
struct Shaky {
    at: usize,
    fired: AtomicBool,
}

/// Tokens that were handed over.
struct ShakySession(Vec<u32>);

impl DrafterSession<Cpu> for ShakySession {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

fn seen(session: &mut dyn DrafterSession<Cpu>) -> &mut Vec<u32> {
    &mut session.as_any_mut().downcast_mut::<ShakySession>().unwrap().0
}

impl Drafter<Cpu> for Shaky {
    fn target_layers(&self) -> &[LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        Box::new(ShakySession(Vec::new()))
    }
    fn take_in(&self, committed: &mut [Committed<'_, Cpu>]) {
        for Committed { session, next_tokens, .. } in committed {
            let seen = seen(*session);
            seen.extend(*next_tokens);
            if seen.len() >= self.at && !self.fired.swap(true, Ordering::SeqCst) {
                panic!("a drafter's fault");
            }
        }
    }
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        vec![Vec::new(); asks.len()]
    }
    fn expand(&self, _: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        nodes.iter().map(|_| (0, Vec::new())).collect()
    }
    fn propose(&self, asks: &mut [Ask<'_, Cpu>], shapes: &[Shape]) -> Vec<TokenTree> {
        let one = |(ask, shape): (&mut Ask<'_, Cpu>, &Shape)| {
            let last = seen(ask.session).last().copied().unwrap_or(3);
            TokenTree::chain((0..shape.depth.min(3) as u32).map(|i| TargetTokenId((last + i * 5) % 1024)))
        };
        asks.iter_mut().zip(shapes).map(one).collect()
    }
}

fn options(request: usize, draft: DraftPlan) -> GenerateOptions {
    let sampling = Sampling { temperature: 0.8, seed: request as u64, ..Sampling::GREEDY };
    let grammar: Option<Arc<dyn Grammar>> =
        (request % 2 == 1).then(|| Arc::new(Fuse { fatal: None, burnt: AtomicU32::new(0) }) as _);
    GenerateOptions { max_new_tokens: 30, sampling, draft, grammar, logprobs: Some(1), ..Default::default() }
}

/// Tokens per request, failures and what they said, panics.
type Decoded = (Vec<Option<Vec<u32>>>, Vec<(u64, String)>, u64);

/// Runs all requests to their ends; tokens heard and returned per request (none if it failed), failures, panics.
fn decode(batch: &mut Batch<&Engine<Cpu>, Cpu>, deaf: Option<(u64, usize)>) -> Decoded {
    let count = prompts().len();
    let (mut heard, mut done) = (vec![Vec::new(); count], vec![None; count]);
    let (mut failures, mut panics) = (Vec::new(), 0);
    while !batch.is_empty() {
        let survived = batch.step_isolated(&mut |id, event| {
            assert!(deaf != Some((id, heard[id as usize].len())), "nobody listens");
            heard[id as usize].push(event.id);
            ControlFlow::Continue(())
        });
        for (id, generation) in survived.finished {
            assert_eq!(generation.token_ids, heard[id as usize], "each token is told once");
            assert_eq!(generation.finish_reason, FinishReason::Length);
            done[id as usize] = Some(generation.token_ids);
        }
        failures.extend(survived.failed);
        panics += survived.panics;
    }
    (done, failures, panics)
}

fn admit(engine: &Engine<Cpu>, draft: DraftPlan, fatal: Option<(usize, u32)>) -> Batch<&Engine<Cpu>, Cpu> {
    let mut batch = Batch::new(engine);
    for (request, prompt) in prompts().iter().enumerate() {
        let mut options = options(request, draft);
        if let Some((_, left)) = fatal.filter(|(at, _)| *at == request) {
            options.grammar = Some(Arc::new(Fuse { fatal: Some(left), burnt: AtomicU32::new(0) }));
        }
        batch.admit(request as u64, prompt, &options).unwrap();
    }
    batch
}

#[test]
fn a_request_that_panics_ends_alone_and_the_others_say_the_same() {
    let target = target();
    let alone = Engine::new(Arc::clone(&target), None);
    let (wanted, failures, panics) = decode(&mut admit(&alone, DraftPlan::None, None), None);
    assert_eq!((failures.len(), panics), (0, 0));
    let calm = || Shaky { at: usize::MAX, fired: AtomicBool::new(false) };
    let drafting = Engine::new(target, Some(Arc::new(calm())));
    for (engine, plan) in [(&alone, DraftPlan::None), (&drafting, DraftPlan::Chain { depth: 3 })] {
        for bad in 0..prompts().len() {
            // At its first token, and in the middle, when the others are in the middle, too.
            for left in [0, 1, 9] {
                let (found, failures, panics) = decode(&mut admit(engine, plan, Some((bad, left))), None);
                assert_eq!(failures, [(bad as u64, "the fuse is burnt".to_string())]);
                assert_eq!(panics, 2, "in the step and alone");
                for (request, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                    match request == bad {
                        true => assert_eq!(*found, None),
                        false => assert_eq!(found, wanted, "request {request} beside {bad}"),
                    }
                }
            }
        }
    }
    // The one who listens panics.
    let (found, failures, panics) =
        decode(&mut admit(&drafting, DraftPlan::Chain { depth: 3 }, None), Some((2, 4)));
    assert_eq!((failures, panics), (vec![(2, "nobody listens".to_string())], 1));
    assert_eq!(found.iter().filter(|f| f.is_some()).count(), 4);
    assert!(found.iter().zip(&wanted).all(|(found, wanted)| found.is_none() || found == wanted));
}

#[test]
fn a_drafter_that_panics_costs_no_request() {
    let target = target();
    let alone = Engine::new(Arc::clone(&target), None);
    let (wanted, ..) = decode(&mut admit(&alone, DraftPlan::None, None), None);
    for at in [1, 6, 24, 45, 610] {
        let shaky = Shaky { at, fired: AtomicBool::new(false) };
        let engine = Engine::new(Arc::clone(&target), Some(Arc::new(shaky)));
        let mut batch = admit(&engine, DraftPlan::Chain { depth: 3 }, None);
        let (found, failures, panics) = decode(&mut batch, None);
        assert_eq!((failures.len(), panics), (0, 1), "at {at}");
        assert_eq!(found, wanted, "at {at}");
    }
}

/// Log-probabilities of a prompt from one pass over all of it.
fn scores(target: &Target<Cpu>, prompt: &[u32], top: usize) -> Vec<TokenLogprobs> {
    let mut kv = target.new_kv();
    let parents = TokenTree::chain_parents(prompt.len());
    let item = StepItem { kv: &mut kv, tokens: prompt, parents: &parents };
    let output = target.forward(&mut [item], &[]);
    let rows: Vec<u32> = (0..prompt.len() as u32 - 1).collect();
    let logits = target.logits(&output, &rows);
    let of = logits.chunks_exact(target.config().vocab_size).zip(&prompt[1..]);
    of.map(|(logits, id)| TokenLogprobs::of(logits, *id, top)).collect()
}

#[test]
fn log_probabilities_of_a_prompt_are_those_of_the_targets_rows() {
    let target = target();
    let engine = Engine::new(Arc::clone(&target), None).with_prefix_cache(1 << 24);
    for (at, prompt) in prompts().iter().enumerate() {
        let wanted = scores(&target, prompt, 3);
        let mass: f64 = scores(&target, prompt, 1024)[0].top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
        assert!((mass - 1.0).abs() < 1e-4, "{mass}");
        for max_new_tokens in [0, 12] {
            // The second time the prompt is in the cache of finished sequences, and is read all the same.
            for _ in 0..2 {
                let asked = GenerateOptions { max_new_tokens, ..options(at, DraftPlan::None) };
                let plain = engine.generate(prompt, &asked, &mut |_| ControlFlow::Continue(())).unwrap();
                assert_eq!(plain.prompt_logprobs, None);
                let asked = GenerateOptions { prompt_logprobs: Some(3), ..asked };
                let found = engine.generate(prompt, &asked, &mut |_| ControlFlow::Continue(())).unwrap();
                assert_eq!(found.token_ids, plain.token_ids);
                assert_eq!(found.finish_reason, FinishReason::Length);
                assert_eq!(found.prompt_logprobs.as_ref(), Some(&wanted), "prompt {at}");
            }
        }
    }
    // Side by side, handed out as soon as the prompt is read, and once.
    let mut batch = Batch::new(&engine);
    for (id, prompt) in prompts().iter().enumerate() {
        let asked = GenerateOptions { prompt_logprobs: Some(3), ..options(id, DraftPlan::Auto) };
        batch.admit(id as u64, prompt, &asked).unwrap();
    }
    let mut taken = vec![None; prompts().len()];
    while !batch.is_empty() {
        let survived = batch.step_isolated(&mut |_, _| ControlFlow::Continue(()));
        assert!(survived.finished.iter().all(|(_, generation)| generation.prompt_logprobs.is_none()));
        for (id, taken) in taken.iter_mut().enumerate() {
            if let Some(scores) = batch.take_prompt_logprobs(id as u64) {
                assert!(taken.replace(scores).is_none());
            }
        }
    }
    for (prompt, taken) in prompts().iter().zip(taken) {
        assert_eq!(taken, Some(scores(&target, prompt, 3)));
    }
    // A prompt of one token has none, and one may fill the context if nothing is generated.
    let asked = GenerateOptions { prompt_logprobs: Some(0), ..GenerateOptions::default() };
    let one = engine.generate(&[5], &asked, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((one.prompt_logprobs, one.token_ids.len()), (Some(vec![]), 0));
    let whole: Vec<u32> = (0..target.config().max_position as u32).map(|i| 3 + i % 1000).collect();
    let full = engine.generate(&whole, &asked, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(full.prompt_logprobs.map(|scores| scores.len()), Some(whole.len() - 1));
    let more = GenerateOptions { max_new_tokens: 1, ..asked };
    assert!(engine.generate(&whole, &more, &mut |_| ControlFlow::Continue(())).is_err());
}
