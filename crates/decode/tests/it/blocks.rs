//! Drafts that propose a block in one pass: the text is the plain one, alone and in a batch, with 1 and 2 threads, for any
//! plan; and a proposal depends on its own sequence alone. The target is the small trained one of the repo, drafts have
//! random weights.

use std::ops::ControlFlow;
use std::sync::Arc;

use draftsmith_core::{Sampling, TokenTree, VocabMap};
use draftsmith_decode::{
    Ask, BatchOptions, Children, Committed, Costs, DraftPlan, Drafter, DrafterSession, Engine, Features,
    GenerateOptions, Generation, Node, drafter,
};
use draftsmith_kernels::{Cpu, PackMode};
use draftsmith_model::block::BlockConfig;
use draftsmith_model::peagle::PEagleConfig;
use draftsmith_model::{Draft, DraftConfig, DraftTensors, StepItem, Target};
use serde_json::{Value, json};

use crate::common::{prompts, target_on};

/// Random weights, but final norm and layers so quiet that proposals follow the target's own head to some extent.
fn draft(target: &Target<Cpu>, config: DraftConfig, seed: u64) -> Draft<Cpu> {
    let mut state = seed;
    let mut next = |scale: f32| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f32 / (1u64 << 31) as f32 - 0.5) * scale
    };
    let mut tensors = DraftTensors::new();
    for (name, shape) in config.tensors() {
        let count = shape.iter().product();
        let values = (0..count).map(|_| if name.contains("norm") { 1.0 } else { next(0.4) }).collect();
        tensors.insert(name, (shape, values));
    }
    let shape = config.shape();
    let step = shape.vocab_size / shape.draft_vocab_size;
    let ids: Vec<u32> = (0..shape.draft_vocab_size as u32).map(|i| i * step as u32).collect();
    let map = shape.has_vocab_map.then(|| VocabMap::from_target_ids(&ids, shape.vocab_size).unwrap());
    Draft::from_tensors(target.kernels().as_ref(), config, &tensors, map, PackMode::Q8, "test").unwrap()
}

fn block(target: &Target<Cpu>, more: &Value, vocab: usize, window: Option<usize>) -> DraftConfig {
    let t = target.config();
    let mut nested = json!({"mask_token_id": t.vocab_size - 1, "target_layer_ids": [0, t.num_layers - 1]});
    nested.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let sliding = if window.is_some() { "sliding_attention" } else { "full_attention" };
    let value = json!({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "vocab_size": t.vocab_size,
        "draft_vocab_size": vocab, "hidden_size": t.hidden_size, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "block_size": 6, "layer_types": ["full_attention", sliding], "use_sliding_window": window.is_some(),
        "sliding_window": window, "dflash_config": nested
    });
    DraftConfig::Block(BlockConfig::from_value(&value).unwrap())
}

fn spark(kind: &str) -> Value {
    json!({"projector_type": "dspark", "markov_rank": 32, "markov_head_type": kind, "enable_confidence_head": true,
        "confidence_head_with_markov": true})
}

fn peagle(target: &Target<Cpu>) -> DraftConfig {
    let t = target.config();
    let value = json!({
        "architectures": ["PEagleDraftModel"], "model_type": "llama", "vocab_size": t.vocab_size,
        "draft_vocab_size": t.vocab_size / 3, "hidden_size": t.hidden_size, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "pard_token": t.vocab_size - 1, "num_depths": 4
    });
    DraftConfig::PEagle(PEagleConfig::from_value(&value).unwrap())
}

fn kinds(target: &Target<Cpu>) -> Vec<(&'static str, DraftConfig)> {
    let vocab = target.config().vocab_size;
    vec![
        ("dflash", block(target, &json!({}), vocab, None)),
        ("dflash, part of the head, window", block(target, &json!({}), vocab / 3, Some(24))),
        ("vanilla", block(target, &spark("vanilla"), vocab, None)),
        ("gated", block(target, &spark("gated"), vocab / 3, None)),
        ("rnn", block(target, &spark("rnn"), vocab / 3, Some(16))),
        ("p-eagle", peagle(target)),
    ]
}

const PLANS: [DraftPlan; 5] = [
    DraftPlan::Chain { depth: 1 },
    DraftPlan::Chain { depth: 4 },
    // Deeper than a block.
    DraftPlan::Chain { depth: 9 },
    DraftPlan::Tree { depth: 4, top_k: 3, num_draft_tokens: 12 },
    DraftPlan::Auto,
];

const SEEDED: Sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 17, ..Sampling::GREEDY };

fn options(draft: DraftPlan, sampling: Sampling) -> GenerateOptions {
    GenerateOptions { max_new_tokens: 32, sampling, stop_ids: vec![2], draft, ..GenerateOptions::default() }
}

fn run(engine: &Engine<Cpu>, prompt: &[u32], options: &GenerateOptions) -> Generation {
    engine.generate(prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn cheap() -> Costs {
    Costs { verify_ms: vec![(1, 4.0), (32, 4.1)], draft_step_ms: 0.01, extend_ms: 0.01, ..Costs::default() }
}

#[test]
fn any_block_draft_gives_the_same_text_alone_and_in_a_batch_on_any_number_of_threads() {
    for threads in [1, 2] {
        let target = target_on(threads);
        let plain = Engine::new(Arc::clone(&target), None);
        for (kind, config) in kinds(&target) {
            let drafter = drafter(&target, draft(&target, config, 3)).unwrap();
            let engine = Engine::new(Arc::clone(&target), Some(drafter)).with_costs(cheap());
            let mut proposed = 0;
            for sampling in [Sampling::GREEDY, SEEDED] {
                let wanted: Vec<Generation> =
                    prompts().iter().map(|p| run(&plain, p, &options(DraftPlan::None, sampling))).collect();
                for plan in PLANS {
                    for (prompt, wanted) in prompts().iter().zip(&wanted) {
                        let found = run(&engine, prompt, &options(plan, sampling));
                        assert_eq!(found.token_ids, wanted.token_ids, "{kind} {plan:?} {sampling:?}");
                        proposed += found.stats.proposed_drafts;
                    }
                    let mut left = prompts().into_iter().enumerate();
                    let mut done = vec![None; wanted.len()];
                    engine
                        .generate_batch(
                            BatchOptions { batch_size: 3 },
                            &mut || left.next().map(|(i, prompt)| (i, prompt, options(plan, sampling))),
                            &mut |i, generation| {
                                done[i] = Some(generation.token_ids);
                                ControlFlow::Continue(())
                            },
                        )
                        .unwrap();
                    for (found, wanted) in done.iter().zip(&wanted) {
                        assert_eq!(found.as_ref(), Some(&wanted.token_ids), "{kind} {plan:?} in a batch");
                    }
                }
            }
            assert!(proposed > 500, "{kind}: {proposed}");
        }
    }
}

#[test]
fn a_window_shorter_than_a_block_is_refused() {
    let target = target_on(1);
    let config = block(&target, &json!({}), target.config().vocab_size, Some(4));
    let error = drafter(&target, draft(&target, config, 3)).err().unwrap();
    assert!(error.to_string().contains("window inside a block"), "{error}");
}

type Sessions = Vec<Box<dyn DrafterSession<Cpu>>>;

/// What is proposed at three levels of each sequence: the first, below its best, below that one's best, and below the
/// second best of the first.
fn says(drafter: &dyn Drafter<Cpu>, sessions: &mut Sessions) -> Vec<[Vec<(u32, u32)>; 4]> {
    let sampling = &Sampling::GREEDY;
    let mut asks: Vec<Ask<'_, Cpu>> = sessions
        .iter_mut()
        .map(|session| Ask {
            session: session.as_mut(),
            sampling,
            text: &[],
            position: 400,
            k: 3,
            whole: false,
        })
        .collect();
    let first = drafter.roots(&mut asks);
    let node = |of: usize, parent, token, depth| Node { of, parent, token, depth };
    let below: Vec<Node> = (0..first.len()).map(|of| node(of, None, first[of][0].0, 0)).collect();
    let second = drafter.expand(&mut asks, &below);
    let further: Vec<Node> = (0..first.len())
        .flat_map(|of| {
            let (handle, children) = &second[of];
            [node(of, Some(*handle), children[0].0, 1), node(of, None, first[of][1].0, 0)]
        })
        .collect();
    let third = drafter.expand(&mut asks, &further);
    let bits = |list: &Children| list.iter().map(|(t, p)| (*t, p.to_bits())).collect::<Vec<_>>();
    let levels = first.iter().zip(&second).zip(third.chunks(2));
    levels.map(|((a, (_, b)), c)| [bits(a), bits(b), bits(&c[0].1), bits(&c[1].1)]).collect()
}

#[test]
fn features_come_in_pieces_are_taken_back_and_side_by_side_with_the_same_proposals() {
    let target = target_on(2);
    let text: Vec<u32> = prompts().into_iter().flatten().cycle().take(401).collect();
    let parents = TokenTree::chain_parents(400);
    for (kind, config) in kinds(&target) {
        let drafter = drafter(&target, draft(&target, config, 3)).unwrap();
        let mut kv = target.new_kv();
        let item = StepItem { kv: &mut kv, tokens: &text[..400], parents: &parents };
        let output = target.forward(&mut [item], drafter.target_layers());
        let hand = |session: &mut Box<dyn DrafterSession<Cpu>>, rows: std::ops::Range<u32>| {
            let rows: Vec<u32> = rows.collect();
            let next_tokens: Vec<u32> = rows.iter().map(|r| text[*r as usize + 1]).collect();
            let features = Features { output: &output, rows: &rows };
            let session = session.as_mut();
            drafter.take_in(&mut [Committed { session, features, next_tokens: &next_tokens }]);
        };
        let mut plain = vec![drafter.begin()];
        for row in 0..400 {
            hand(&mut plain[0], row..row + 1);
            let sampling = &Sampling::GREEDY;
            // The last one is asked below.
            if row < 399 {
                drafter.roots(&mut [Ask {
                    session: plain[0].as_mut(),
                    sampling,
                    text: &[],
                    position: 0,
                    k: 1,
                    whole: false,
                }]);
            }
        }
        assert_eq!(plain[0].positions(), 400);
        let wanted = says(drafter.as_ref(), &mut plain).remove(0);
        assert!(wanted.iter().all(|children| children.len() == 3), "{kind}: {wanted:?}");
        let (per_token, per_session) = (drafter.bytes_per_token(), drafter.bytes_per_session());
        let mut others: Sessions = Vec::new();
        for piece in [7, 256, 257, 400] {
            let mut session = drafter.begin();
            for from in (0..400).step_by(piece) {
                hand(&mut session, from..(from + piece as u32).min(400));
                assert!(session.held_bytes() <= 400 * per_token + per_session);
            }
            others.push(session);
        }
        // Back into what waits, into what is in the caches, and to nothing.
        for (at, to) in [399, 390, 100, 0].into_iter().enumerate() {
            drafter.rollback_to(others[at].as_mut(), to);
            assert_eq!(others[at].positions(), to, "{kind}");
            hand(&mut others[at], to as u32..400);
        }
        assert_eq!(says(drafter.as_ref(), &mut others), vec![wanted; 4], "{kind}");
    }
}

#[test]
fn a_turn_that_begins_like_an_earlier_one_proposes_what_a_fresh_engine_would() {
    let target = target_on(2);
    for (kind, config) in kinds(&target) {
        let new = || drafter(&target, draft(&target, config.clone(), 3)).unwrap();
        let fresh = Engine::new(Arc::clone(&target), Some(new())).with_costs(cheap());
        let keeping = Engine::new(Arc::clone(&target), Some(new())).with_costs(cheap());
        let keeping = keeping.with_prefix_cache(64 << 20);
        for plan in
            [DraftPlan::Chain { depth: 3 }, DraftPlan::Tree { depth: 3, top_k: 2, num_draft_tokens: 6 }]
        {
            let mut text: Vec<u32> = prompts()[0].iter().copied().cycle().take(300).collect();
            for turn in 0..3 {
                let asked = options(plan, Sampling::GREEDY);
                let (wanted, found) = (run(&fresh, &text, &asked), run(&keeping, &text, &asked));
                assert_eq!(found.token_ids, wanted.token_ids, "{kind}, turn {turn}");
                assert_eq!(found.stats, wanted.stats, "{kind}: the same was proposed and accepted");
                text.extend(&wanted.token_ids);
                text.extend([7, 8, 9]);
            }
        }
    }
}
