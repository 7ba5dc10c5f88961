//! The engine on the kernels for NVIDIA GPUs, which run on the host here: answers and hidden states are those of the CPU
//! where nothing is rounded, and do not depend on what else is in the batch where products are.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Cuda, CudaOptions, Graphs};
use draftsmith_decode::{BatchOptions, DraftPlan, Engine, GenerateOptions, drafter};
use draftsmith_kernels::{Cpu, Kernels, PackMode};
use draftsmith_model::{Draft, Infer, Precision, StepItem, Target};

use crate::common::rows;

fn load<K: Kernels>(kernels: K, precision: Precision) -> Arc<Target<K>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    Arc::new(Target::load(Arc::new(kernels), &path, precision).unwrap())
}

fn device() -> Cuda<Shim> {
    Cuda::new(Shim::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap(), CudaOptions::default())
}

/// Greedy and drawn answers to short prompts.
fn answers<K: Kernels>(engine: &Engine<K>, batch_size: usize, which: &[usize]) -> BTreeMap<usize, Vec<u32>> {
    let prompts = rows();
    let sampled = |seed, top_p, top_k| Sampling { temperature: 0.8, top_p, top_k, seed, ..Sampling::GREEDY };
    let samplings = [Sampling::GREEDY, sampled(3, 0.9, 0), sampled(4, 1.0, 0), sampled(5, 0.8, 40)];
    let mut waiting = which.iter().copied();
    let mut found = BTreeMap::new();
    let mut next = || {
        let i = waiting.next()?;
        let prompt = prompts[i].prompt.iter().take(6 + 2 * i).copied().collect();
        let options =
            GenerateOptions { max_new_tokens: 4, sampling: samplings[i], ..GenerateOptions::default() };
        Some((i, prompt, options))
    };
    engine
        .generate_batch(BatchOptions { batch_size }, &mut next, &mut |i, generation| {
            found.insert(i, generation.token_ids);
            ControlFlow::Continue(())
        })
        .unwrap();
    found
}

#[test]
fn answers_on_the_kernels_for_cuda_are_those_of_the_cpu() {
    let cpu = answers(&Engine::new(load(Cpu::new(2), Precision::F32), None), 3, &[0, 1, 2, 3]);
    let cuda = answers(&Engine::new(load(device(), Precision::F32), None), 3, &[0, 1, 2, 3]);
    assert_eq!(cpu.len(), 4);
    assert_eq!(cuda, cpu);
}

#[test]
fn an_answer_does_not_depend_on_the_batch_where_products_are_rounded() {
    let engine = Engine::new(load(device(), Precision::Stored), None);
    let together = answers(&engine, 4, &[0, 1, 2]);
    for i in [1, 2] {
        assert_eq!(answers(&engine, 1, &[i])[&i], together[&i]);
    }
}

/// Captured layers and final states of a row, in pieces of so many tokens.
fn states<K: Kernels>(target: &Target<K>, ids: &[u32], piece: usize) -> Vec<f32> {
    let (ops, mut kv) = (Infer::new(target.kernels().as_ref()), target.new_kv());
    let mut all = Vec::new();
    for part in ids.chunks(piece) {
        let parents = TokenTree::chain_parents(part.len());
        let item = StepItem { kv: &mut kv, tokens: part, parents: &parents };
        let output = target.forward(&mut [item], &[LayerId(1), LayerId(6)]);
        for (i, token) in (0..part.len()).enumerate() {
            for layer in output.hidden.iter().chain([&output.last]) {
                let values = ops.values(layer);
                all.extend_from_slice(&values[i * layer.width..(token + 1) * layer.width]);
            }
        }
    }
    all
}

#[test]
fn states_on_the_kernels_for_cuda_are_those_of_the_cpu() {
    let ids = &rows()[0].prompt[..9];
    let check = |precision, tolerance: f32| {
        let wanted = states(&load(Cpu::new(2), precision), ids, 9);
        let target = load(device(), precision);
        let whole = states(&target, ids, 9);
        assert!(whole == states(&target, ids, 4), "pieces of a prefill change no bit");
        let size = (wanted.iter().map(|w| w * w).sum::<f32>() / wanted.len() as f32).sqrt();
        let error = whole.iter().zip(&wanted).map(|(f, w)| (f - w).powi(2)).sum::<f32>();
        let error = (error / wanted.len() as f32).sqrt();
        assert!(error <= tolerance * size, "{precision:?}: {error} of {size}");
    };
    check(Precision::F32, 1e-4);
    check(Precision::Stored, 2e-2);
}

#[test]
fn a_draw_is_the_devices_with_and_without_a_draft_and_whatever_else_is_in_the_step() {
    let target = load(device(), Precision::Stored);
    // A block for each row.
    let drawn = || target.kernels().launcher().blocks("draw_rows");
    let draft = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-drafts/eagle3");
    let draft = Draft::load(target.kernels().as_ref(), &draft, PackMode::Q8).unwrap();
    let engine = Engine::new(Arc::clone(&target), Some(drafter(&target, draft).unwrap()));
    let prompt = &rows_of()[..8];
    let options = |draft, logprobs| GenerateOptions {
        max_new_tokens: 6,
        sampling: Sampling { temperature: 0.8, top_p: 0.9, seed: 5, ..Sampling::GREEDY },
        draft,
        logprobs,
        ..GenerateOptions::default()
    };
    let run = |all: Vec<GenerateOptions>| {
        let before = drawn();
        let batch_size = all.len();
        let mut waiting = all.into_iter().enumerate();
        let mut found = Vec::new();
        engine
            .generate_batch(
                BatchOptions { batch_size },
                &mut || waiting.next().map(|(i, options)| (i, prompt.to_vec(), options)),
                &mut |i, generation| {
                    found.push((i, generation));
                    ControlFlow::Continue(())
                },
            )
            .unwrap();
        found.sort_by_key(|(i, _)| *i);
        let found: Vec<_> = found.into_iter().map(|(_, generation)| generation).collect();
        (found, drawn() - before)
    };
    let (plain, drawn) = run(vec![options(DraftPlan::None, None)]);
    assert_eq!((plain[0].token_ids.len(), drawn), (6, 6));
    let tree = DraftPlan::Tree { depth: 2, top_k: 2, num_draft_tokens: 4 };
    for plan in [DraftPlan::Chain { depth: 2 }, tree] {
        let (with, drawn) = run(vec![options(plan, None)]);
        assert_eq!(with[0].token_ids, plain[0].token_ids, "{plan:?}");
        // Beside the first token and one row of each step, rows of drafted tokens.
        let steps = with[0].stats.verify_steps as usize;
        assert!(drawn > 1 + steps, "{plan:?}: {drawn} in {steps} steps");
    }
    // A neighbour that asks for more than the token is chosen for on the host, and it alone.
    let (mixed, drawn) = run(vec![options(DraftPlan::None, None), options(DraftPlan::None, Some(1))]);
    assert_eq!(mixed[0].token_ids, plain[0].token_ids);
    assert_eq!(drawn, 6);
}

#[test]
fn steps_of_an_answer_start_as_graphs_and_change_no_token() {
    let draft = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-drafts/eagle3");
    let prompt = &rows_of()[..8];
    // Tokens, launches, calls that started them.
    let run = |graphs, plan| {
        let shim = Shim::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
        let kernels = Cuda::new(shim, CudaOptions { graphs, ..CudaOptions::default() });
        let target = load(kernels, Precision::Stored);
        let draft = Draft::load(target.kernels().as_ref(), &draft, PackMode::Q8).unwrap();
        let engine = Engine::new(Arc::clone(&target), Some(drafter(&target, draft).unwrap()));
        let before = target.kernels().started();
        let options = GenerateOptions { max_new_tokens: 14, draft: plan, ..GenerateOptions::default() };
        let tokens = engine.generate(prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap().token_ids;
        let started = target.kernels().started();
        let tables = (started.tables - before.tables, started.copies - before.copies);
        (tokens, started.launches - before.launches, started.calls - before.calls, tables)
    };
    for plan in [DraftPlan::None, DraftPlan::Chain { depth: 2 }] {
        let (tokens, launches, calls, (tables, copies)) = run(Graphs::On, plan);
        let (wanted, all, each, _) = run(Graphs::Off, plan);
        assert_eq!((tokens.len(), launches), (14, all), "{plan:?}");
        assert_eq!(tokens, wanted, "{plan:?}");
        assert_eq!(each, all, "{plan:?}");
        assert!(2 * calls < launches, "{plan:?}: {calls} calls for {launches} launches");
        assert!(3 * copies < tables, "{plan:?}: {copies} copies for {tables} tables");
    }
}

/// A prompt of the fixture.
fn rows_of() -> Vec<u32> {
    rows()[0].prompt.clone()
}
