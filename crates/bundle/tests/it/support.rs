//! The tiny target and made-up drafts for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_bundle::{
    CheckReport, Existing, MakeInput, Manifest, Recommended, TargetInfo, TrainingInfo, expected_tensors,
    make_with_target,
};
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, write};
use draftsmith_kernels::Cpu;
use draftsmith_model::DraftConfig;
use draftsmith_model::{Precision, Target};
use serde_json::{Value, json};

pub(crate) const VD: usize = 400;

pub(crate) fn target() -> Target<Cpu> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    Target::load(Arc::new(Cpu::new(1)), &path, Precision::Stored).unwrap()
}

/// `variant` is merged into the configuration.
pub(crate) fn write_draft(dir: &Path, target: &Target<Cpu>, variant: &Value) {
    let t = target.config();
    let mut config = json!({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
        "vocab_size": t.vocab_size, "draft_vocab_size": VD, "hidden_size": t.hidden_size,
        "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "initializer_range": 0.02
    });
    for (key, value) in variant.as_object().unwrap() {
        config[key] = value.clone();
    }
    let mut state = 1u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let tensors: Vec<TensorData> = expected_tensors(&*DraftConfig::from_value(&config).unwrap())
        .into_iter()
        .map(|spec| {
            let n = spec.shape.iter().product();
            match spec.dtype {
                // Every second id from 100 on.
                Dtype::I64 => {
                    TensorData::i64("d2t", &[VD], &std::array::from_fn::<_, VD, _>(|i| 100 + i as i64))
                }
                Dtype::BOOL => {
                    let covered: Vec<bool> =
                        (0..n).map(|t| (100..100 + 2 * VD).contains(&t) && t % 2 == 0).collect();
                    TensorData::bool("t2d", &[n], &covered)
                }
                _ if spec.shape.len() == 1 => TensorData::f32(
                    &spec.name,
                    &spec.shape,
                    &(0..n).map(|_| 1.0 + number()).collect::<Vec<_>>(),
                ),
                _ => TensorData::f32(
                    &spec.name,
                    &spec.shape,
                    &(0..n).map(|_| 0.3 * number()).collect::<Vec<_>>(),
                ),
            }
        })
        .collect();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write(dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

pub(crate) fn facts(target: &Target<Cpu>) -> TargetInfo {
    let config = target.config();
    TargetInfo {
        name: "tiny".into(),
        license: "CC0-1.0".into(),
        weights_sha256: "aa".repeat(32),
        hidden_size: config.hidden_size as u64,
        vocab_size: config.vocab_size as u64,
        num_layers: config.num_layers as u64,
        ..TargetInfo::default()
    }
}

pub(crate) fn input(root: &Path, target: &Target<Cpu>) -> MakeInput {
    MakeInput {
        out: root.join("bundle"),
        existing: Existing::Refuse,
        checkpoint: root.join("checkpoint"),
        weights: BundleWeights::Bf16,
        name: "tiny-eagle3".into(),
        target: facts(target),
        training: TrainingInfo::default(),
        imported: None,
        license: "CC0-1.0".into(),
        license_text: "CC0\n".into(),
        notice: String::new(),
        results: vec![],
        recommended: Recommended::chain(5, ""),
        run_toml: String::new(),
        report_html: None,
        probe_inputs: vec![],
        created_unix_s: 0,
    }
}

pub(crate) fn made(variant: &Value) -> (tempfile::TempDir, PathBuf, Target<Cpu>) {
    let root = tempfile::tempdir().unwrap();
    let target = target();
    write_draft(&root.path().join("checkpoint"), &target, variant);
    let made = make_with_target(&input(root.path(), &target), &target).unwrap();
    (root, made.path, target)
}

/// Writes sizes and hashes of all listed files anew.
pub(crate) fn relist(dir: &Path) {
    let mut manifest = Manifest::read(dir).unwrap();
    for file in &mut manifest.files {
        let path = dir.join(&file.path);
        file.bytes = std::fs::metadata(&path).unwrap().len();
        file.sha256 = sha256_file(&path).unwrap();
    }
    std::fs::write(dir.join("bundle.json"), manifest.to_json().unwrap()).unwrap();
}

/// Every tensor of a bundle as its file has it.
pub(crate) fn bundle_tensors(dir: &Path) -> Vec<TensorData> {
    let open = SafetensorsDir::open(dir).unwrap();
    open.names()
        .map(|name| {
            let t = open.get(name).unwrap();
            TensorData { name: name.into(), dtype: t.dtype, shape: t.shape.to_vec(), bytes: t.bytes.to_vec() }
        })
        .collect()
}

/// The check failed, by a problem of this kind that has this word.
#[track_caller]
pub(crate) fn fails_with(report: &CheckReport, kind: &str, word: &str) {
    let failures: Vec<String> = report.failures().map(|p| format!("{}: {p}", p.kind())).collect();
    assert!(!report.holds, "it should not hold");
    assert!(
        failures.iter().any(|f| f.starts_with(&format!("{kind}: ")) && f.contains(word)),
        "{failures:#?}"
    );
}
