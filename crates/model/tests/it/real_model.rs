//! Parity with llama.cpp on the real target, as recorded in `fixtures/oracle`.
//!
//! Needs the model file; see the README on `DRAFTSMITH_TEST_TARGET`.
#![expect(clippy::print_stdout, reason = "the distances belong beside the verdict")]

use std::path::PathBuf;
use std::sync::Arc;

use draftsmith_core::TokenTree;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, StepItem, Target};

/// Largest logit difference allowed to the f32 path of llama.cpp.
const F32_LOGITS: f32 = 2e-3;
/// Generated positions are compared up to the first whose top-two margin is below this.
const F32_MARGIN: f64 = 0.05;
const STORED_MARGIN: f64 = 0.5;

fn model_path() -> PathBuf {
    PathBuf::from(std::env::var_os("DRAFTSMITH_TEST_TARGET").expect(
        "set DRAFTSMITH_TEST_TARGET to SmolLM2-135M-Instruct.Q4_1.gguf (`draftsmith pull` prints its path)",
    ))
}

fn oracle(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/oracle").join(name)
}

struct Row {
    id: String,
    /// The weights of the one target, or the file name of one of several.
    weights: String,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    margins: Vec<f64>,
}

fn rows() -> Vec<Row> {
    read_rows("smollm2_greedy.jsonl", "weights")
}

fn read_rows(file: &str, weights: &str) -> Vec<Row> {
    let text = std::fs::read_to_string(oracle(file)).unwrap();
    text.lines()
        .map(|line| {
            let v: serde_json::Value = serde_json::from_str(line).unwrap();
            let ids =
                |key: &str| v[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
            Row {
                id: v["id"].as_str().unwrap().into(),
                weights: v[weights].as_str().unwrap().into(),
                prompt: ids("prompt_token_ids"),
                tokens: ids("token_ids"),
                margins: v["top1_minus_top2_logit"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|x| x.as_f64().unwrap())
                    .collect(),
            }
        })
        .collect()
}

/// Logits after each of the given ids.
fn forward(target: &Target<Cpu>, ids: &[u32], from: usize) -> Vec<Vec<f32>> {
    let mut kv = target.new_kv();
    let parents = TokenTree::chain_parents(ids.len());
    let output = target.forward(&mut [StepItem { kv: &mut kv, tokens: ids, parents: &parents }], &[]);
    let wanted: Vec<u32> = (from as u32..ids.len() as u32).collect();
    target.logits(&output, &wanted).chunks_exact(target.config().vocab_size).map(<[f32]>::to_vec).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// Positions whose arg-max was compared; teacher forced, so one early tie does not end the comparison by chance.
fn check_tokens(target: &Target<Cpu>, weights: &str, margin: f64) -> usize {
    check_rows(target, rows().into_iter().filter(|r| r.weights == weights), margin)
}

fn check_rows(target: &Target<Cpu>, rows: impl Iterator<Item = Row>, margin: f64) -> usize {
    let mut compared = 0;
    for row in rows {
        let sure = row.margins.iter().position(|m| *m < margin).unwrap_or(row.tokens.len());
        let ids = [&row.prompt[..], &row.tokens[..row.tokens.len() - 1]].concat();
        let logits = forward(target, &ids, row.prompt.len() - 1);
        for (i, (logits, token)) in logits.iter().zip(&row.tokens[..sure]).enumerate() {
            assert_eq!(argmax(logits), *token, "{} {}: token {i}", row.weights, row.id);
        }
        compared += sure;
    }
    compared
}

#[test]
fn real_model_f32_matches_the_oracle() {
    let target = Target::load(Arc::new(Cpu::new(2)), &model_path(), Precision::F32).unwrap();
    let expected = SafetensorsDir::open(oracle("logits_code_py.safetensors")).unwrap();
    let wanted = expected.get("f32").unwrap().to_f32().unwrap();
    let rows = rows();
    let prompt = &rows.iter().find(|r| r.id == "code_py").unwrap().prompt;
    let found = forward(&target, prompt, prompt.len() - 1).remove(0);
    let worst = found.iter().zip(&wanted).map(|(f, w)| (f - w).abs()).fold(0.0, f32::max);
    assert!(worst <= F32_LOGITS, "logits after the prompt differ by {worst}");
    let compared = check_tokens(&target, "f32_dequant", F32_MARGIN);
    println!("f32 path: largest logit difference {worst:.2e}, {compared} tokens equal");
    assert!(compared > 100);
}

#[test]
fn real_model_integer_path_matches_the_oracle() {
    let target = Target::load(Arc::new(Cpu::new(2)), &model_path(), Precision::Stored).unwrap();
    let compared = check_tokens(&target, "q4_1_shipped", STORED_MARGIN);
    println!("integer path: {compared} tokens equal");
    assert!(compared > 20);
}

/// Targets of real size, whose files hold block types of many kinds. `DRAFTSMITH_TEST_REAL_TARGETS` is a folder with
/// some of the files that `fixtures/oracle/README.md` names.
#[test]
fn real_model_targets_of_a_real_size_match_the_oracle() {
    let folder = PathBuf::from(std::env::var_os("DRAFTSMITH_TEST_REAL_TARGETS").expect(
        "set DRAFTSMITH_TEST_REAL_TARGETS to a folder with qwen2.5-coder-0.5b-instruct-q4_k_m.gguf or others",
    ));
    let mut found = 0;
    for (name, file) in [
        ("qwen2.5-coder-0.5b-instruct-q4_k_m", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        ("qwen2.5-coder-1.5b-instruct-q4_k_m", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        ("gemma-3-270m-q4_k_m", "gemma-3-270m-it-q4_k_m.gguf"),
    ] {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        found += 1;
        let target = Target::load(Arc::new(Cpu::new(2)), &path, Precision::Stored).unwrap();
        let own =
            || read_rows("real_targets_greedy.jsonl", "target").into_iter().filter(|r| r.weights == name);
        let compared = check_rows(&target, own(), STORED_MARGIN);
        // Behind the first doubt, too: the texts are followed as recorded, wherever llama.cpp was sure.
        let (mut sure, mut equal) = (0, 0);
        for row in own() {
            let ids = [&row.prompt[..], &row.tokens[..row.tokens.len() - 1]].concat();
            let logits = forward(&target, &ids, row.prompt.len() - 1);
            for ((logits, token), margin) in logits.iter().zip(&row.tokens).zip(&row.margins) {
                if *margin >= 2.0 * STORED_MARGIN {
                    sure += 1;
                    equal += usize::from(argmax(logits) == *token);
                }
            }
        }
        println!("{name}: {compared} tokens equal up to the first doubt, {equal} of {sure} sure ones in all");
        assert!(compared > 0 && sure > 50 && equal * 100 >= sure * 98);
    }
    assert!(found > 0, "no target in {}", folder.display());
}

/// KL divergence of next-token distributions from the f32 path, over the recorded greedy texts.
#[test]
fn real_model_integer_path_stays_close_to_f32() {
    let kernels = Arc::new(Cpu::new(2));
    let exact = Target::load(Arc::clone(&kernels), &model_path(), Precision::F32).unwrap();
    let stored = Target::load(kernels, &model_path(), Precision::Stored).unwrap();
    let softmax = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = logits.iter().map(|l| f64::from(l - max).exp()).collect();
        let total: f64 = e.iter().sum();
        e.into_iter().map(|v| v / total).collect::<Vec<f64>>()
    };
    let (mut sum, mut count, mut agree) = (0.0, 0, 0);
    for row in rows().iter().filter(|r| r.weights == "f32_dequant") {
        let ids = [&row.prompt[..], &row.tokens[..row.tokens.len() - 1]].concat();
        let from = row.prompt.len() - 1;
        for (a, b) in forward(&exact, &ids, from).iter().zip(forward(&stored, &ids, from)) {
            agree += usize::from(argmax(a) == argmax(&b));
            let (p, q) = (softmax(a), softmax(&b));
            sum += p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            count += 1;
        }
    }
    let mean = sum / f64::from(count);
    println!("mean KL {mean:.2e} nats over {count} positions, arg-max agrees at {agree}");
    // llama.cpp's own integer path is of this order; the bound catches a wrong scale or minimum.
    assert!(mean < 2e-2, "mean KL {mean}");
}
