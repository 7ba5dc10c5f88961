//! The engine on the kernels for NVIDIA GPUs, which run on the host here: answers and hidden states are those of the CPU
//! where nothing is rounded, and do not depend on what else is in the batch where products are.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, TokenTree};
use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Cuda, CudaOptions};
use draftsmith_decode::{BatchOptions, Engine, GenerateOptions};
use draftsmith_kernels::{Cpu, Kernels};
use draftsmith_model::{Infer, Precision, StepItem, Target};

#[expect(dead_code, reason = "drafts and recorded texts are of the suites beside this one")]
mod common;
use common::rows;

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
