//! A target with experts gives each request one text: alone, in a batch, with any number of threads, with and without
//! speculation from repetitions.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use draftsmith_core::Sampling;
use draftsmith_decode::{BatchOptions, Costs, DraftPlan, Engine, GenerateOptions};
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, Target};

fn engine(name: &str, threads: usize) -> Engine<Cpu> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/experts").join(name);
    Engine::new(Arc::new(Target::load(Arc::new(Cpu::new(threads)), &path, Precision::Stored).unwrap()), None)
}

fn options(draft: DraftPlan, sampling: Sampling) -> GenerateOptions {
    GenerateOptions { max_new_tokens: 48, sampling, draft, ..GenerateOptions::default() }
}

fn alone(engine: &Engine<Cpu>, prompt: &[u32], options: &GenerateOptions) -> Vec<u32> {
    engine.generate(prompt, options, &mut |_| ControlFlow::Continue(())).unwrap().token_ids
}

#[test]
fn experts_give_one_text_alone_in_a_batch_on_any_threads_and_with_speculation() {
    let prompts: [&[u32]; 4] =
        [&[5, 9, 13, 7, 5, 9, 13, 7, 5, 9], &[3], &[17, 17, 17, 17, 17], &[4, 8, 15, 16, 23, 42]];
    let seeded = Sampling { temperature: 0.8, top_p: 0.95, seed: 17, ..Sampling::GREEDY };
    for name in ["qwen3_moe", "qwen3_moe_mixed/model.gguf", "gpt_oss_mxfp4", "gpt_oss_plain_rope/model.gguf"]
    {
        for sampling in [Sampling::GREEDY, seeded] {
            let plain = options(DraftPlan::None, sampling);
            let one = engine(name, 1);
            let texts: Vec<Vec<u32>> = prompts.iter().map(|p| alone(&one, p, &plain)).collect();
            assert!(texts.iter().all(|t| !t.is_empty()));
            // Rows almost for nothing, so that every repetition is proposed.
            let cheap = Costs {
                verify_ms: vec![(1, 4.0), (32, 4.1)],
                draft_step_ms: 0.01,
                extend_ms: 0.01,
                ..Costs::default()
            };
            let two = engine(name, 2).with_costs(cheap);
            let mut proposed = 0;
            for (prompt, text) in prompts.iter().zip(&texts) {
                assert_eq!(alone(&two, prompt, &plain), *text, "{name}: two threads");
                let found = two
                    .generate(prompt, &options(DraftPlan::Auto, sampling), &mut |_| ControlFlow::Continue(()))
                    .unwrap();
                assert_eq!(found.token_ids, *text, "{name}: speculation");
                proposed += found.stats.proposed_drafts;
            }
            assert!(proposed > 0, "{name}: something was proposed");
            for draft in [DraftPlan::None, DraftPlan::Auto] {
                let mut queue = prompts.iter().enumerate();
                let mut found: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
                let mut next = || queue.next().map(|(i, p)| (i, p.to_vec(), options(draft, sampling)));
                two.generate_batch(BatchOptions { batch_size: 3 }, &mut next, &mut |i, generation| {
                    found[i] = generation.token_ids;
                    ControlFlow::Continue(())
                })
                .unwrap();
                assert_eq!(found, texts, "{name}: in a batch, {draft:?}");
            }
        }
    }
}
