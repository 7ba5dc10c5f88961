//! The small trained target of the repo, its recorded texts, and a draft with random weights.

use std::path::PathBuf;
use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_kernels::{Cpu, PackMode};
use draftsmith_model::eagle3::{Eagle3Config, Feedback};
use draftsmith_model::{Draft, DraftConfig, DraftTensors, Precision, Target};

pub(crate) fn target() -> Arc<Target<Cpu>> {
    target_on(2)
}

/// The same on so many threads.
pub(crate) fn target_on(threads: usize) -> Arc<Target<Cpu>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    Arc::new(Target::load(Arc::new(Cpu::new(threads)), &path, Precision::Stored).unwrap())
}

pub(crate) struct Row {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) margins: Vec<f64>,
}

pub(crate) fn rows() -> Vec<Row> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target/expected.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| {
            let v: serde_json::Value = serde_json::from_str(line).unwrap();
            let list = |key: &str| v[key].as_array().unwrap().clone();
            let ids = |key: &str| list(key).iter().map(|x| x.as_u64().unwrap() as u32).collect();
            Row {
                prompt: ids("prompt_token_ids"),
                tokens: ids("token_ids"),
                margins: list("top1_minus_top2_logit").iter().map(|x| x.as_f64().unwrap()).collect(),
            }
        })
        .collect()
}

/// The prompts of the recorded texts.
pub(crate) fn prompts() -> Vec<Vec<u32>> {
    rows().into_iter().map(|row| row.prompt).collect()
}

/// A draft with random weights on a third of the vocabulary.
pub(crate) fn random_draft(target: &Target<Cpu>, seed: u64, feedback: Feedback, fc_norm: bool) -> Draft<Cpu> {
    let t = target.config();
    let (h, vocab) = (t.hidden_size, t.vocab_size);
    let config = Eagle3Config {
        vocab_size: vocab,
        draft_vocab_size: vocab / 3,
        hidden_size: h,
        target_hidden_size: h,
        intermediate_size: 2 * h,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: draftsmith_kernels::RopeScaling::None,
        max_position_embeddings: 512,
        fc_norm,
        norm_before_fc: false,
        norm_before_residual: false,
        feedback,
        initializer_range: 0.02,
        target_layer_ids: None,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    };
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f32 / (1u64 << 31) as f32 - 0.5) * 0.4
    };
    let mut tensors = DraftTensors::new();
    for (name, shape) in config.tensors() {
        if name == "d2t" || name == "t2d" {
            continue;
        }
        let count = shape.iter().product();
        let norm = name.contains("norm");
        let values = (0..count).map(|_| if norm { 1.0 } else { next() }).collect();
        tensors.insert(name, (shape, values));
    }
    let ids: Vec<u32> = (0..vocab as u32 / 3).map(|i| i * 3).collect();
    let map = VocabMap::from_target_ids(&ids, vocab).unwrap();
    let kernels = target.kernels();
    let config = DraftConfig::Eagle3(config);
    Draft::from_tensors(kernels.as_ref(), config, &tensors, Some(map), PackMode::Q8, "test").unwrap()
}
