//! An ordinary model as draft: the text is the plain one whatever it says; the target as its own draft is accepted to
//! the end, in every family; what it knows of a text does not depend on how it came to read it.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::Sampling;
use draftsmith_decode::{
    Ask, Batch, BatchOptions, Children, Costs, DraftPlan, Drafter, DrafterSession, Engine, GenerateOptions,
    Generation, Node, small_drafter,
};
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, Target};
use serde_json::{Value, json};

use crate::common::prompts;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn load(path: &Path, threads: usize) -> Arc<Target<Cpu>> {
    Arc::new(Target::load(Arc::new(Cpu::new(threads)), path, Precision::Stored).unwrap())
}

/// The tiny target with its first layers alone and another number of ids: the first ones, or more of them, which then
/// repeat tokens that it often writes, half as loud again.
fn small(layers: usize, vocab: usize) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(fixture("tiny-target/model.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let data = &bytes[8 + header_len..];
    let (mut out, mut head) = (Vec::new(), json!({}));
    for (name, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let layer =
            name.strip_prefix("model.layers.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        if layer.is_some_and(|layer| layer >= layers) {
            continue;
        }
        let mut tensor = tensor.clone();
        let at = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let mut values = data[at(0)..at(1)].to_vec();
        if name == "model.embed_tokens.weight" {
            let width = 2 * 128;
            values.truncate(vocab * width);
            for id in values.len() / width..vocab {
                for value in data[at(0) + (id % 300) * width..][..width].chunks_exact(2) {
                    let value =
                        f32::from_bits(u32::from(u16::from_le_bytes([value[0], value[1]])) << 16) * 1.5;
                    values.extend(((value.to_bits() >> 16) as u16).to_le_bytes());
                }
            }
            tensor["shape"] = json!([vocab, 128]);
        }
        tensor["data_offsets"] = json!([out.len(), out.len() + values.len()]);
        out.extend(values);
        head[name] = tensor;
    }
    let head = serde_json::to_vec(&head).unwrap();
    let file = [&(head.len() as u64).to_le_bytes()[..], &head, &out].concat();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let text = std::fs::read_to_string(fixture("tiny-target/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = layers.into();
    config["vocab_size"] = vocab.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

const PLANS: [DraftPlan; 5] = [
    DraftPlan::Chain { depth: 1 },
    DraftPlan::Chain { depth: 5 },
    DraftPlan::Tree { depth: 4, top_k: 3, num_draft_tokens: 12 },
    DraftPlan::Tree { depth: 6, top_k: 8, num_draft_tokens: 40 },
    DraftPlan::Auto,
];

const SEEDED: Sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 17, ..Sampling::GREEDY };
const FREE: Sampling = Sampling { temperature: 1.1, seed: 5, ..Sampling::GREEDY };

fn options(draft: DraftPlan, sampling: Sampling, max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, sampling, stop_ids: vec![2], draft, ..GenerateOptions::default() }
}

fn run(engine: &Engine<Cpu>, prompt: &[u32], options: &GenerateOptions) -> Generation {
    engine.generate(prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn cheap() -> Costs {
    Costs { verify_ms: vec![(1, 4.0), (32, 4.1)], draft_step_ms: 0.01, extend_ms: 0.01, ..Costs::default() }
}

#[test]
fn any_small_model_gives_the_same_text_alone_and_in_a_batch_on_any_number_of_threads() {
    for threads in [1, 2] {
        let target = load(&fixture("tiny-target"), threads);
        let plain = Engine::new(Arc::clone(&target), None);
        let all = [(7, 1024), (7, 400), (2, 1024), (7, 1100)];
        for (layers, vocab) in all.into_iter().take(if threads == 1 { 4 } else { 2 }) {
            let (_dir, path) = small(layers, vocab);
            let small = load(&path, threads);
            let engine = Engine::new(Arc::clone(&target), Some(small_drafter(&target, small)));
            let engine = engine.with_costs(cheap());
            let (mut proposed, mut accepted) = (0, 0);
            for sampling in [Sampling::GREEDY, SEEDED, FREE] {
                let wanted: Vec<Generation> = prompts()
                    .iter()
                    .map(|p| run(&plain, p, &options(DraftPlan::None, sampling, 20)))
                    .collect();
                for plan in PLANS {
                    for (prompt, wanted) in prompts().iter().zip(&wanted) {
                        let found = run(&engine, prompt, &options(plan, sampling, 20));
                        assert_eq!(found.token_ids, wanted.token_ids, "{vocab} {plan:?} {sampling:?}");
                        proposed += found.stats.proposed_drafts;
                        accepted += found.stats.accepted_drafts;
                    }
                    let mut left = prompts().into_iter().enumerate();
                    let mut done = vec![None; wanted.len()];
                    engine
                        .generate_batch(
                            BatchOptions { batch_size: 3 },
                            &mut || left.next().map(|(i, prompt)| (i, prompt, options(plan, sampling, 20))),
                            &mut |i, generation| {
                                done[i] = Some(generation.token_ids);
                                ControlFlow::Continue(())
                            },
                        )
                        .unwrap();
                    for (found, wanted) in done.iter().zip(&wanted) {
                        assert_eq!(found.as_ref(), Some(&wanted.token_ids), "{vocab} {plan:?} in a batch");
                    }
                }
            }
            assert!(proposed > 300 && accepted > 30, "{layers}, {vocab}: {accepted} of {proposed}");
        }
    }
}

/// Steps of a chain of `depth` that is always right, for so many tokens.
fn fewest(tokens: usize, depth: usize) -> u64 {
    (tokens - 1).div_ceil(depth + 1) as u64
}

#[test]
fn the_target_as_its_own_draft_is_accepted_to_the_end() {
    let path = fixture("tiny-target");
    let target = load(&path, 2);
    let plain = Engine::new(Arc::clone(&target), None);
    let engine = Engine::new(Arc::clone(&target), Some(small_drafter(&target, load(&path, 2))));
    // With noise, too: the draft adds what the target will add.
    for sampling in [Sampling::GREEDY, SEEDED, FREE, Sampling { top_k: 7, ..FREE }] {
        for depth in [1, 4, 9] {
            for prompt in prompts() {
                let wanted = run(&plain, &prompt, &options(DraftPlan::None, sampling, 50));
                let found = run(&engine, &prompt, &options(DraftPlan::Chain { depth }, sampling, 50));
                assert_eq!(found.token_ids, wanted.token_ids);
                let steps = fewest(found.token_ids.len(), depth);
                assert_eq!(found.stats.verify_steps, steps, "{sampling:?}, {depth} levels");
            }
        }
    }
}

/// Windows, capped logits, two kinds of angles, experts, sinks: a level of a tree is computed as the step computes it.
#[test]
fn every_family_drafts_for_itself_without_a_miss() {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(fixture("families"))
        .unwrap()
        .chain(std::fs::read_dir(fixture("experts")).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    paths.sort();
    assert!(paths.len() > 15, "{}", paths.len());
    for path in paths {
        let target = load(&path, 2);
        let most = target.config().max_position;
        let tokens = most.min(64) - 12;
        let plain = Engine::new(Arc::clone(&target), None);
        let engine = Engine::new(Arc::clone(&target), Some(small_drafter(&target, load(&path, 1))));
        for prompt in [&[5, 9, 13, 7, 5, 9][..], &[3]] {
            let asked =
                |draft| GenerateOptions { stop_ids: vec![], ..options(draft, Sampling::GREEDY, tokens) };
            let wanted = run(&plain, prompt, &asked(DraftPlan::None));
            let found = run(&engine, prompt, &asked(DraftPlan::Chain { depth: 5 }));
            assert_eq!(found.token_ids, wanted.token_ids, "{}", path.display());
            assert_eq!(found.stats.verify_steps, fewest(tokens, 5), "{}", path.display());
            let tree = DraftPlan::Tree { depth: 4, top_k: 3, num_draft_tokens: 20 };
            let found = run(&engine, prompt, &asked(tree));
            assert_eq!(found.token_ids, wanted.token_ids, "{}", path.display());
        }
    }
}

#[test]
fn ids_that_one_of_the_two_does_not_have_are_never_proposed() {
    let target = load(&fixture("tiny-target"), 1);
    let (_dir, path) = small(8, 1324);
    let small = load(&path, 1);
    // The louder copies would win: the model itself says so.
    let alone = Engine::new(Arc::clone(&small), None);
    let own = run(&alone, &prompts()[0], &options(DraftPlan::None, Sampling::GREEDY, 8));
    assert!(own.token_ids.iter().any(|id| *id >= 1024), "{:?}", own.token_ids);
    let drafter = small_drafter(&target, small);
    for sampling in [Sampling::GREEDY, SEEDED] {
        for (k, prompt) in [1, 2, 9].into_iter().flat_map(|k| prompts().into_iter().map(move |p| (k, p))) {
            let mut session = drafter.begin();
            let ask = Ask {
                session: session.as_mut(),
                sampling: &sampling,
                text: &prompt,
                position: 0,
                k,
                whole: false,
            };
            let mut asks = [ask];
            let first = drafter.roots(&mut asks).remove(0);
            // Of what top-p leaves there may be fewer.
            assert!(first.len() == k || !first.is_empty() && !sampling.is_greedy(), "{first:?}");
            let node = |token| Node { of: 0, parent: None, token, depth: 0 };
            let nodes: Vec<Node> = first.iter().map(|(token, _)| node(*token)).collect();
            let below = drafter.expand(&mut asks, &nodes);
            let all = first.iter().chain(below.iter().flat_map(|(_, children)| children));
            assert!(
                all.clone().all(|(token, p)| *token < 1024 && *p <= 1e-6),
                "{:?}",
                all.collect::<Vec<_>>()
            );
        }
    }
    // A text with ids that the small model does not have is read over.
    let (_dir, path) = self::small(8, 300);
    let drafter = small_drafter(&target, load(&path, 1));
    let mut session = drafter.begin();
    let text = [5, 1000, 7, 9];
    let ask =
        Ask { session: session.as_mut(), sampling: &SEEDED, text: &text, position: 3, k: 4, whole: false };
    let first = drafter.roots(&mut [ask]).remove(0);
    assert!(first.len() == 4 && first.iter().all(|(token, _)| *token < 300), "{first:?}");
}

fn bits(list: &Children) -> Vec<(u32, u32)> {
    list.iter().map(|(t, p)| (*t, p.to_bits())).collect()
}

/// What a drafter says of a text, two levels deep.
fn says(
    drafter: &dyn Drafter<Cpu>,
    session: &mut dyn DrafterSession<Cpu>,
    text: &[u32],
) -> Vec<Vec<(u32, u32)>> {
    let position = text.len() as u64 - 1;
    let mut asks = [Ask { session, sampling: &Sampling::GREEDY, text, position, k: 4, whole: false }];
    let first = drafter.roots(&mut asks).remove(0);
    let nodes: Vec<Node> = first
        .iter()
        .take(2)
        .map(|(token, _)| Node { of: 0, parent: None, token: *token, depth: 0 })
        .collect();
    let below = drafter.expand(&mut asks, &nodes);
    let further: Vec<Node> = below
        .iter()
        .map(|(handle, children)| Node { of: 0, parent: Some(*handle), token: children[0].0, depth: 1 })
        .collect();
    let last = drafter.expand(&mut asks, &further);
    std::iter::once(bits(&first)).chain(below.iter().chain(&last).map(|(_, list)| bits(list))).collect()
}

#[test]
fn what_is_said_of_a_text_does_not_depend_on_how_it_was_read() {
    let target = load(&fixture("tiny-target"), 2);
    let (_dir, path) = small(6, 1024);
    let drafter = small_drafter(&target, load(&path, 2));
    let text: Vec<u32> = prompts().into_iter().flatten().cycle().take(900).collect();
    // At most 256 tokens are read at once; meanwhile nothing is said.
    let mut fresh = drafter.begin();
    let mut session = drafter.begin();
    let wait = |session: &mut dyn DrafterSession<Cpu>, text: &[u32]| {
        let mut rounds = 0;
        loop {
            let mut asks =
                [Ask { session, sampling: &Sampling::GREEDY, text, position: 0, k: 4, whole: false }];
            rounds += 1;
            if !drafter.roots(&mut asks)[0].is_empty() {
                return rounds;
            }
        }
    };
    assert_eq!(wait(fresh.as_mut(), &text), 4);
    assert_eq!(fresh.held_bytes(), 900 * drafter.bytes_per_token());
    let wanted = says(drafter.as_ref(), fresh.as_mut(), &text);
    assert_eq!(says(drafter.as_ref(), fresh.as_mut(), &text), wanted, "asked again");
    // Token by token, with proposals in between; some of their rows stay.
    wait(session.as_mut(), &text[..400]);
    for end in 400..900 {
        says(drafter.as_ref(), session.as_mut(), &text[..end]);
    }
    assert_eq!(says(drafter.as_ref(), session.as_mut(), &text), wanted);
    // Back to the middle, over another text, and again.
    drafter.rollback_to(session.as_mut(), 700);
    assert_eq!(session.held_bytes(), 700 * drafter.bytes_per_token());
    let other: Vec<u32> = text[..750].iter().copied().chain([7, 8, 9]).collect();
    let elsewhere = says(drafter.as_ref(), session.as_mut(), &other);
    assert_ne!(elsewhere, wanted);
    wait(session.as_mut(), &text);
    assert_eq!(says(drafter.as_ref(), session.as_mut(), &text), wanted);
    // What it proposed itself and what of that was committed.
    let mut grown = text[..300].to_vec();
    let mut session = drafter.begin();
    wait(session.as_mut(), &grown);
    for kept in [0, 1, 2, 3, 2, 1] {
        let said = says(drafter.as_ref(), session.as_mut(), &grown);
        let (a, b, c) = (said[0][0].0, said[1][0].0, said[3][0].0);
        grown.extend([a, b, c].iter().take(kept));
        grown.push(77);
        let mut fresh = drafter.begin();
        wait(fresh.as_mut(), &grown);
        let fresh = says(drafter.as_ref(), fresh.as_mut(), &grown);
        assert_eq!(says(drafter.as_ref(), session.as_mut(), &grown), fresh, "{kept} kept");
    }
}

#[test]
fn a_text_beyond_the_context_of_the_model_is_answered_with_nothing() {
    let target = load(&fixture("tiny-target"), 1);
    let small = load(&fixture("families/phi3"), 1);
    let most = small.config().max_position;
    let drafter = small_drafter(&target, small);
    let text: Vec<u32> = (0..=most as u32).map(|i| i % 50).collect();
    for (length, roots, below) in [(most - 1, true, true), (most, true, false), (most + 1, false, false)] {
        let mut session = drafter.begin();
        let text = &text[..length];
        let mut asks = [Ask {
            session: session.as_mut(),
            sampling: &Sampling::GREEDY,
            text,
            position: 0,
            k: 2,
            whole: false,
        }];
        let first = drafter.roots(&mut asks).remove(0);
        assert_eq!(!first.is_empty(), roots, "{length}");
        if let Some((token, _)) = first.first() {
            let node = Node { of: 0, parent: None, token: *token, depth: 0 };
            assert_eq!(!drafter.expand(&mut asks, &[node])[0].1.is_empty(), below, "{length}");
        }
    }
}

#[test]
fn a_kept_cache_serves_a_request_with_a_small_model_as_one_without() {
    let target = load(&fixture("tiny-target"), 2);
    let (_dir, path) = small(7, 1024);
    let drafter = small_drafter(&target, load(&path, 2));
    let plain = Engine::new(Arc::clone(&target), None);
    let engine = Engine::new(Arc::clone(&target), Some(drafter)).with_costs(cheap());
    engine.limit_prefix_cache(4000);
    let mut text: Vec<u32> = prompts().into_iter().flatten().take(200).collect();
    for turn in 0..4 {
        let asked = options(PLANS[[1, 2, 4, 1][turn]], Sampling::GREEDY, 20);
        let wanted = run(&plain, &text, &options(DraftPlan::None, Sampling::GREEDY, 20));
        let found = run(&engine, &text, &asked);
        assert_eq!(found.token_ids, wanted.token_ids, "turn {turn}");
        text.extend(found.token_ids);
        text.extend(&prompts()[turn]);
    }
    // Held bytes are those of the text that it has read, and of nothing else.
    let mut batch = Batch::new(&engine);
    batch.admit(0, &text, &options(PLANS[1], Sampling::GREEDY, 30)).unwrap();
    let may = (text.len() + 40) * engine.draft_bytes_per_token();
    let mut most = 0;
    while !batch.is_empty() {
        batch.step(&mut |_, _| ControlFlow::Continue(()));
        most = most.max(batch.draft_bytes());
    }
    assert!(most > 0 && most <= may && engine.draft_bytes_per_sequence() == 0, "{most} of {may}");
}
