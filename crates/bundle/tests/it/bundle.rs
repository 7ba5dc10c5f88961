//! Bundles of a small made-up draft: made, checked, and spoilt in every way that must be noticed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_bundle::{
    BUNDLE_BYTES_MAX, BundleError, CheckOptions, CheckReport, DataInfo, Existing, MakeInput, Manifest,
    Measured, MeasuredResult, Probe, ProbeInput, Problem, Recommended, Shape, Status, TargetInfo,
    TrainingInfo, check, expected_tensors, input_of, make, remake,
};
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, write};
use draftsmith_model::DraftConfig;
use serde_json::{Value, json};

use crate::support::{bundle_tensors, fails_with, relist};

const V: usize = 40;
const VD: usize = 24;

fn config_value() -> Value {
    json!({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
        "vocab_size": V, "draft_vocab_size": VD, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "initializer_range": 0.02,
        "bos_token_id": 1, "eos_token_id": 2
    })
}

fn config() -> DraftConfig {
    DraftConfig::from_value(&config_value()).unwrap()
}

/// Numbers around 0 that depend on the tensor's name; norms around 1.
fn values(name: &str, n: usize, is_norm: bool) -> Vec<f32> {
    let mut state = name.bytes().fold(7u64, |h, b| h.wrapping_mul(131).wrapping_add(u64::from(b)));
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let x = (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5;
            if is_norm { 1.0 + 0.2 * x } else { 0.1 * x }
        })
        .collect()
}

fn weights() -> Vec<TensorData> {
    expected_tensors(&*config())
        .into_iter()
        .map(|spec| {
            let n = spec.shape.iter().product();
            match spec.name.as_str() {
                // Draft id i is target id i + 3.
                "d2t" => TensorData::i64("d2t", &[VD], &[3; VD]),
                "t2d" => TensorData::bool(
                    "t2d",
                    &[V],
                    &std::array::from_fn::<_, V, _>(|t| (3..3 + VD).contains(&t)),
                ),
                name => TensorData::f32(name, &spec.shape, &values(name, n, spec.shape.len() == 1)),
            }
        })
        .collect()
}

fn write_checkpoint(dir: &Path, config: &Value, tensors: &[TensorData]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write(dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
}

fn target() -> TargetInfo {
    TargetInfo {
        name: "Toy-8L-Instruct".into(),
        references: vec!["/home/somebody/toy.gguf".into(), "hf:toy/Toy-8L-Instruct".into()],
        hub_name: Some("toy/Toy-8L-Instruct".into()),
        license: "Apache-2.0".into(),
        weights_sha256: "aa".repeat(32),
        tokenizer_sha256: "bb".repeat(32),
        template_sha256: "cc".repeat(32),
        hidden_size: 64,
        vocab_size: V as u64,
        num_layers: 8,
        context_len: Some(2048),
        weight_format: "Q4_1".into(),
    }
}

/// Stands for the real network: every stored number counts, by its place.
fn network(weights: &SafetensorsDir, input: &ProbeInput) -> Vec<f32> {
    let mut sums = vec![input.token_ids.iter().sum::<u32>() as f32 / 100.0 + input.depth as f32; VD];
    for name in weights.names().filter(|n| !matches!(*n, "d2t" | "t2d")) {
        let Ok(values) = weights.get(name).and_then(|t| t.to_f32()) else { continue };
        for (i, value) in values.iter().enumerate() {
            sums[i % VD] += value * input.features[i % input.features.len()];
        }
    }
    sums
}

fn input(root: &Path) -> MakeInput {
    let result = MeasuredResult {
        workload: "gsm8k".into(),
        drafting: "chain, depth 5".into(),
        shape: Some(Shape { depth: 5, num_draft_tokens: 5, top_k: 1 }),
        sampling: "greedy".into(),
        rows: 80,
        samples: 80,
        identical_samples: 80,
        verify_steps: 4000,
        accept_len: Some(Measured { value: 2.314, ci95: Some([2.2, 2.43]) }),
        accept_rate_at: vec![0.7, 0.4, 0.15],
        plain_tokens_per_s: Some(40.0),
        spec_tokens_per_s: Some(66.4),
        speedup: Some(Measured { value: 1.66, ci95: Some([1.6, 1.72]) }),
        baseline: "target-only decoding, same session, interleaved".into(),
        machine: "Made-up CPU, 2 threads".into(),
        doubts: vec![],
        record_json: "{\"format\":\"draftsmith-bench-record\"}\n".into(),
    };
    let again = MeasuredResult {
        drafting: "chain, depth 3".into(),
        shape: Some(Shape { depth: 3, num_draft_tokens: 3, top_k: 1 }),
        doubts: vec!["only 5 rows were measured, 20 are wanted".into()],
        ..result.clone()
    };
    MakeInput {
        out: root.join("bundle"),
        existing: Existing::Refuse,
        checkpoint: root.join("checkpoint"),
        weights: BundleWeights::Bf16,
        name: "toy-8l-eagle3".into(),
        target: target(),
        training: TrainingInfo {
            data: vec![DataInfo {
                name: "prompts-mini".into(),
                sha256: Some("dd".repeat(32)),
                licenses: vec!["MIT".into(), "CC0-1.0".into()],
                rows: 3000,
                tokens: 900_000,
                trained_tokens: 600_000,
            }],
            on_policy: true,
            steps: 1500,
            tokens_read: 1_200_000,
            ttt_length: Some(7),
            begun_with: None,
            lr_peak: 1e-4,
            seed: 7,
            chosen_by: "accept length on held-out prompts".into(),
            wall_s: Some(5400.0),
            run_sha256: String::new(),
        },
        imported: None,
        license: "Apache-2.0".into(),
        license_text: "Apache License\n".into(),
        notice: "Data: ...\n".into(),
        results: vec![result, again],
        recommended: Recommended::chain(5, "largest measured speedup"),
        run_toml: "[train]\nseed = 7\n".into(),
        report_html: Some("<!doctype html>".into()),
        probe_inputs: vec![],
        created_unix_s: 1_795_442_700,
    }
}

/// An answer of equal logits.
fn constant(input: ProbeInput, logit: f32, count: usize) -> Probe {
    Probe { input, logits: vec![logit; count] }
}

/// A made bundle in a fresh folder.
fn made() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    write_checkpoint(&root.path().join("checkpoint"), &config_value(), &weights());
    let input = input(root.path());
    // The bundle rounds to bf16, so the network is asked with rounded weights, as a caller does.
    let rounded = root.path().join("rounded");
    let bf16: Vec<TensorData> = weights()
        .into_iter()
        .map(|t| match t.dtype {
            Dtype::F32 => {
                let v: Vec<f32> =
                    t.bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
                TensorData::bf16(&t.name, &t.shape, &v)
            }
            _ => t,
        })
        .collect();
    write_checkpoint(&rounded, &config_value(), &bf16);
    let open = SafetensorsDir::open(&rounded).unwrap();
    let made = make(&input, &mut |q| Ok(Probe { logits: network(&open, &q), input: q })).unwrap();
    assert_eq!(made.warnings, []);
    assert!(made.bytes < BUNDLE_BYTES_MAX);
    let out = made.path;
    (root, out)
}

fn checked(dir: &Path) -> CheckReport {
    let target = target();
    let open = SafetensorsDir::open(dir);
    let mut network = |q: &ProbeInput| match &open {
        Ok(open) => Ok(network(open, q)),
        Err(e) => Err(e.to_string().into()),
    };
    check(dir, CheckOptions { target: Some(&target), network: Some(&mut network), embedding: None }).unwrap()
}

/// Replaces the weights of a bundle and brings the manifest in line, so that only the tensors themselves can tell.
fn with_weights(dir: &Path, tensors: &[TensorData]) {
    write(dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
    relist(dir);
}

fn set_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(&path, value.to_string()).unwrap();
    relist(dir);
}

#[test]
fn a_made_bundle_holds_in_every_check() {
    let (_root, dir) = made();
    let report = checked(&dir);
    assert!(report.holds, "{}", report.text());
    let lines: Vec<_> = report.checks.iter().map(|c| (c.name, c.status)).collect();
    let held =
        ["files", "config", "tensors", "vocab_map", "target", "probe", "size"].map(|n| (n, Status::Held));
    assert_eq!(lines, held);
}

#[test]
fn the_expected_tensors_are_the_published_ones() {
    let found: Vec<(String, Vec<usize>, Dtype)> =
        expected_tensors(&*config()).into_iter().map(|t| (t.name, t.shape, t.dtype)).collect();
    let w = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec(), Dtype::BF16);
    // [eagle3 §2.1] with H = Ht = 64, I = 96, nh hd = 64, nkv hd = 32.
    let mut wanted = vec![
        w("fc.weight", &[64, 192]),
        w("midlayer.input_layernorm.weight", &[64]),
        w("midlayer.hidden_norm.weight", &[64]),
        w("midlayer.self_attn.q_proj.weight", &[64, 128]),
        w("midlayer.self_attn.k_proj.weight", &[32, 128]),
        w("midlayer.self_attn.v_proj.weight", &[32, 128]),
        w("midlayer.self_attn.o_proj.weight", &[64, 64]),
        w("midlayer.post_attention_layernorm.weight", &[64]),
        w("midlayer.mlp.gate_proj.weight", &[96, 64]),
        w("midlayer.mlp.up_proj.weight", &[96, 64]),
        w("midlayer.mlp.down_proj.weight", &[64, 96]),
        w("norm.weight", &[64]),
        w("lm_head.weight", &[VD, 64]),
    ];
    wanted.push(("d2t".into(), vec![VD], Dtype::I64));
    wanted.push(("t2d".into(), vec![V], Dtype::BOOL));
    assert_eq!(found, wanted);
}

#[test]
fn dropping_any_tensor_names_it() {
    let (_root, dir) = made();
    let all = bundle_tensors(&dir);
    for i in 0..all.len() {
        let mut rest = all.clone();
        let gone = rest.remove(i);
        with_weights(&dir, &rest);
        let report = check(&dir, CheckOptions::default()).unwrap();
        fails_with(&report, "tensor_missing", &format!("`{}`", gone.name));
    }
}

#[test]
fn renaming_any_tensor_names_both() {
    let (_root, dir) = made();
    let all = bundle_tensors(&dir);
    for i in 0..all.len() {
        let mut tensors = all.clone();
        let old = tensors[i].name.clone();
        tensors[i].name = format!("model.{old}");
        with_weights(&dir, &tensors);
        let report = check(&dir, CheckOptions::default()).unwrap();
        fails_with(&report, "tensor_missing", &format!("`{old}`"));
        fails_with(&report, "tensor_extra", &format!("`model.{old}`"));
    }
}

#[test]
fn transposing_any_matrix_names_it_unless_it_is_square_and_then_the_probe_tells() {
    let (_root, dir) = made();
    let all = bundle_tensors(&dir);
    for i in 0..all.len() {
        let mut tensors = all.clone();
        let [rows, cols] = tensors[i].shape[..] else { continue };
        let bytes = &all[i].bytes;
        tensors[i].shape = vec![cols, rows];
        tensors[i].bytes = (0..cols)
            .flat_map(|c| {
                (0..rows).flat_map(move |r| {
                    let at = (r * cols + c) * 2;
                    bytes[at..at + 2].to_vec()
                })
            })
            .collect();
        with_weights(&dir, &tensors);
        let report = check(&dir, CheckOptions::default()).unwrap();
        if rows == cols {
            assert!(report.holds, "a square transpose cannot be seen in the shapes");
            fails_with(&checked(&dir), "probe_differs", "probe 0");
        } else {
            fails_with(&report, "tensor_shape", &format!("`{}`", all[i].name));
            let hint = report.failures().next().unwrap().hint().unwrap();
            assert!(hint.contains("transposed"), "{hint}");
        }
    }
}

#[test]
fn retyping_any_tensor_names_it() {
    let (_root, dir) = made();
    let all = bundle_tensors(&dir);
    for i in 0..all.len() {
        let mut tensors = all.clone();
        let n: usize = tensors[i].shape.iter().product();
        tensors[i] = TensorData::f16(&all[i].name, &all[i].shape, &vec![0.5; n]);
        with_weights(&dir, &tensors);
        let report = check(&dir, CheckOptions::default()).unwrap();
        fails_with(&report, "tensor_dtype", &format!("`{}`", all[i].name));
    }
}

#[test]
fn spoiling_the_numbers_of_any_tensor_names_it() {
    let (_root, dir) = made();
    let all = bundle_tensors(&dir);
    for i in 0..all.len() {
        if all[i].dtype != Dtype::BF16 {
            continue;
        }
        let mut tensors = all.clone();
        tensors[i].bytes[6..8].copy_from_slice(&[0xc0, 0x7f]); // NaN at index 3
        with_weights(&dir, &tensors);
        fails_with(
            &check(&dir, CheckOptions::default()).unwrap(),
            "tensor_not_finite",
            &format!("`{}` holds 1", all[i].name),
        );
        tensors[i].bytes.fill(0);
        with_weights(&dir, &tensors);
        fails_with(
            &check(&dir, CheckOptions::default()).unwrap(),
            "tensor_constant",
            &format!("`{}` is 0", all[i].name),
        );
    }
}

#[test]
fn a_draft_as_it_was_made_at_the_start_looks_untrained() {
    let (_root, dir) = made();
    let uniform_as_wide_as_the_initial_normal = 0.02 * 12f32.sqrt();
    let tensors: Vec<TensorData> = bundle_tensors(&dir)
        .into_iter()
        .map(|t| {
            let n: usize = t.shape.iter().product();
            match (t.dtype, t.shape.len()) {
                (Dtype::BF16, 1) => TensorData::bf16(&t.name, &t.shape, &vec![1.0; n]),
                (Dtype::BF16, _) => {
                    let v: Vec<f32> = values(&t.name, n, false)
                        .iter()
                        .map(|x| x * 10.0 * uniform_as_wide_as_the_initial_normal)
                        .collect();
                    let mean = v.iter().sum::<f32>() / n as f32;
                    let std = (v.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n as f32).sqrt();
                    TensorData::bf16(&t.name, &t.shape, &v.iter().map(|x| x * 0.02 / std).collect::<Vec<_>>())
                }
                _ => t,
            }
        })
        .collect();
    with_weights(&dir, &tensors);
    fails_with(&check(&dir, CheckOptions::default()).unwrap(), "untrained", "0.02");
}

#[test]
fn a_broken_vocabulary_map_is_told_with_its_place() {
    let (_root, dir) = made();
    let mut tensors = bundle_tensors(&dir);
    for t in &mut tensors {
        if t.name == "t2d" {
            t.bytes[0] = 1;
        }
    }
    with_weights(&dir, &tensors);
    fails_with(&checked(&dir), "vocab_map", "`t2d[0]`");
    // Initial buffers: zeros and all true.
    let (_root, dir) = made();
    let mut tensors = bundle_tensors(&dir);
    for t in &mut tensors {
        match t.name.as_str() {
            "d2t" => t.bytes.fill(0),
            "t2d" => t.bytes.fill(1),
            _ => {}
        }
    }
    with_weights(&dir, &tensors);
    fails_with(&checked(&dir), "vocab_map", "`t2d[24]`");
}

#[test]
fn any_changed_file_is_named() {
    let (_root, dir) = made();
    let manifest = Manifest::read(&dir).unwrap();
    assert!(manifest.files.len() >= 10, "{:?}", manifest.files);
    for file in &manifest.files {
        let path = dir.join(&file.path);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let last = bad.len() - 1;
        bad[last] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        fails_with(&check(&dir, CheckOptions::default()).unwrap(), "file_hash", &format!("`{}`", file.path));
        std::fs::write(&path, &good[..last]).unwrap();
        fails_with(&check(&dir, CheckOptions::default()).unwrap(), "file_size", &format!("`{}`", file.path));
        std::fs::remove_file(&path).unwrap();
        fails_with(
            &check(&dir, CheckOptions::default()).unwrap(),
            "file_missing",
            &format!("`{}`", file.path),
        );
        std::fs::write(&path, &good).unwrap();
    }
    std::fs::write(dir.join("results/extra.txt"), "x").unwrap();
    fails_with(&check(&dir, CheckOptions::default()).unwrap(), "file_unlisted", "`results/extra.txt`");
}

#[test]
fn a_listed_path_cannot_leave_the_bundle() {
    let (_root, dir) = made();
    for path in ["../checkpoint/config.json", "/etc/hostname", "results/../../x"] {
        let mut manifest = Manifest::read(&dir).unwrap();
        manifest.files[0].path = path.into();
        std::fs::write(dir.join("bundle.json"), manifest.to_json().unwrap()).unwrap();
        fails_with(&check(&dir, CheckOptions::default()).unwrap(), "file_path", path);
    }
}

#[test]
fn the_configuration_is_held_to_what_engines_need() {
    let cases: [(&str, Value, &str); 9] = [
        ("architectures", json!(["LlamaForCausalLM"]), "every engine"),
        ("model_type", json!("eagle3"), "\"llama\""),
        ("head_dim", Value::Null, "a positive integer"),
        ("torch_dtype", json!("float32"), "bfloat16"),
        ("draft_vocab_size", Value::Null, "a positive integer"),
        ("rope_theta", Value::Null, "a positive number"),
        ("eagle_aux_hidden_state_layer_ids", json!([1, 3, 4]), "vLLM"),
        ("eagle_aux_hidden_state_layer_ids", Value::Null, "vLLM"),
        ("eagle_config", Value::Null, "SGLang"),
    ];
    for (key, value, word) in cases {
        let (_root, dir) = made();
        set_config(&dir, |c| c[key] = value);
        let report = check(&dir, CheckOptions::default()).unwrap();
        fails_with(&report, "config_key", word);
        fails_with(&report, "config_key", key);
    }
    let (_root, dir) = made();
    set_config(&dir, |c| c["tie_word_embeddings"] = json!(true));
    fails_with(&checked(&dir), "config", "tie_word_embeddings");
    let (_root, dir) = made();
    set_config(&dir, |c| c["max_position_embeddings"] = json!(512));
    let report = checked(&dir);
    assert!(report.holds);
    assert_eq!(report.checks[1].status, Status::Warned);
}

#[test]
fn a_different_size_in_the_configuration_is_told_by_manifest_and_tensors() {
    let (_root, dir) = made();
    set_config(&dir, |c| c["intermediate_size"] = json!(128));
    fails_with(&checked(&dir), "tensor_shape", "midlayer.mlp.gate_proj.weight");
    let (_root, dir) = made();
    set_config(&dir, |c| c["vocab_size"] = json!(41));
    let report = checked(&dir);
    fails_with(&report, "manifest_disagrees", "target.vocab_size");
    fails_with(&report, "tensor_shape", "`t2d`");
}

#[test]
fn a_draft_for_another_target_is_refused_and_another_quantisation_is_not() {
    let (_root, dir) = made();
    let run = |edit: &dyn Fn(&mut TargetInfo)| {
        let mut other = target();
        edit(&mut other);
        check(&dir, CheckOptions { target: Some(&other), network: None, embedding: None }).unwrap()
    };
    fails_with(&run(&|t| t.hidden_size = 128), "wrong_target", "hidden size 64");
    fails_with(&run(&|t| t.vocab_size = 50), "wrong_target", "vocabulary 40");
    fails_with(&run(&|t| t.num_layers = 9), "wrong_target", "layer count");
    fails_with(&run(&|t| t.tokenizer_sha256 = "0".into()), "wrong_target", "tokenizer hash");
    fails_with(&run(&|t| t.template_sha256 = "0".into()), "wrong_target", "template hash");
    let report = run(&|t| t.weights_sha256 = "0".into());
    assert!(report.holds);
    assert_eq!(report.checks[4].status, Status::Warned);
}

#[test]
fn a_network_that_computes_something_else_is_found_by_the_probe() {
    let (_root, dir) = made();
    let trained = target();
    let open = SafetensorsDir::open(&dir).unwrap();
    let mut off = |q: &ProbeInput| {
        let mut logits = network(&open, q);
        if q.depth == 2 {
            logits[11] += 0.1;
        }
        Ok(logits)
    };
    let report =
        check(&dir, CheckOptions { target: Some(&trained), network: Some(&mut off), embedding: None })
            .unwrap();
    fails_with(&report, "probe_differs", "probe 1 at depth 2");
    fails_with(&report, "probe_differs", "draft id 11");
    let mut rounding = |q: &ProbeInput| Ok(network(&open, q).iter().map(|v| v * (1.0 + 1e-5)).collect());
    assert!(
        check(&dir, CheckOptions { target: Some(&trained), network: Some(&mut rounding), embedding: None })
            .unwrap()
            .holds
    );
    let mut nan = |_: &ProbeInput| Ok(vec![f32::NAN; VD]);
    fails_with(
        &check(&dir, CheckOptions { target: Some(&trained), network: Some(&mut nan), embedding: None })
            .unwrap(),
        "probe_differs",
        "NaN",
    );
    let mut short = |_: &ProbeInput| Ok(vec![0.0; 3]);
    fails_with(
        &check(&dir, CheckOptions { target: Some(&trained), network: Some(&mut short), embedding: None })
            .unwrap(),
        "probe_size",
        "3",
    );
    // These probes hold no embeddings, so a network is not asked without its target.
    let alone = check(&dir, CheckOptions { network: Some(&mut off), ..CheckOptions::default() }).unwrap();
    assert_eq!(alone.checks[5].status, Status::Skipped);
    let without = check(&dir, CheckOptions::default()).unwrap();
    assert_eq!(without.checks[5].status, Status::Skipped);
}

#[test]
fn what_is_no_bundle_is_an_error_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let error = check(dir.path(), CheckOptions::default()).unwrap_err();
    assert!(matches!(error, BundleError::NoManifest { .. }));
    assert!(error.hint().unwrap().contains("bundle.json"));
    let (_root, dir) = made();
    let text = std::fs::read_to_string(dir.join("bundle.json")).unwrap();
    let refused = |new: String| {
        std::fs::write(dir.join("bundle.json"), new).unwrap();
        Manifest::read(&dir).unwrap_err()
    };
    assert!(matches!(
        refused(text.replace("\"version\": 1", "\"version\": 9")),
        BundleError::Version { found: 9, .. }
    ));
    let error = refused(
        text.replace("\"license\": \"Apache-2.0\",\n  \"target\"", "\"licence\": \"x\",\n  \"target\""),
    )
    .to_string();
    assert!(error.contains("licence") && error.contains("line 8"), "{error}");
    assert!(refused("[]".into()).to_string().contains("format"));
}

#[test]
fn a_checkpoint_that_does_not_fit_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let input = input(root.path());
    let failed = |tensors: &[TensorData], config: &Value, input: &MakeInput| {
        write_checkpoint(&input.checkpoint, config, tensors);
        let error = make(input, &mut |q| Ok(constant(q, 0.0, VD))).unwrap_err();
        assert!(!input.out.exists());
        let names: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["checkpoint"], "only the checkpoint is there");
        error
    };
    let mut missing = weights();
    missing.retain(|t| t.name != "norm.weight");
    let error = failed(&missing, &config_value(), &input);
    assert!(error.to_string().contains("`norm.weight` is missing"), "{error}");
    let mut zero = weights();
    for t in &mut zero {
        if t.name == "midlayer.mlp.up_proj.weight" || t.name == "fc.weight" {
            t.bytes.fill(0);
        }
    }
    let error = failed(&zero, &config_value(), &input).to_string();
    assert!(error.contains("`fc.weight`") && error.ends_with("(and 1 more)"), "{error}");
    let mut config = config_value();
    config["hidden_size"] = json!("wide");
    assert!(failed(&weights(), &config, &input).to_string().contains("hidden_size"));
    let mut other = input.clone();
    other.target.hidden_size = 96;
    assert!(failed(&weights(), &config_value(), &other).to_string().contains("hidden size"));
    let mut unnamed = input.clone();
    unnamed.license = " ".into();
    let error = failed(&weights(), &config_value(), &unnamed);
    assert!(matches!(error, BundleError::MissingField { field: "license" }));
    // A network that fails, or gives too few logits.
    let error = make(&input, &mut |_| Err("no target".into())).unwrap_err();
    assert!(matches!(error, BundleError::Probe { index: 0, .. }));
    assert!(make(&input, &mut |q| Ok(constant(q, 0.0, 2))).unwrap_err().to_string().contains("2 logits"));
    assert!(!input.out.exists());
}

#[test]
fn an_existing_bundle_is_kept_or_replaced_as_asked() {
    let (root, dir) = made();
    let before = std::fs::read(dir.join("bundle.json")).unwrap();
    let mut again = input(root.path());
    again.created_unix_s += 1;
    let error = make(&again, &mut |q| Ok(constant(q, 0.1, VD))).unwrap_err();
    assert!(matches!(error, BundleError::Exists { .. }));
    assert_eq!(std::fs::read(dir.join("bundle.json")).unwrap(), before);
    again.existing = Existing::Replace;
    make(&again, &mut |q| Ok(constant(q, 0.1, VD))).unwrap();
    assert_eq!(Manifest::read(&dir).unwrap().created_unix_s, again.created_unix_s);
}

#[test]
fn the_same_input_makes_the_same_bytes() {
    let (_a, first) = made();
    let (_b, second) = made();
    assert_eq!(
        std::fs::read(first.join("bundle.json")).unwrap(),
        std::fs::read(second.join("bundle.json")).unwrap()
    );
}

#[test]
fn an_embedding_in_the_checkpoint_is_dropped_and_in_a_bundle_refused() {
    let root = tempfile::tempdir().unwrap();
    let mut tensors = weights();
    tensors.push(TensorData::f32("embed_tokens.weight", &[V, 64], &vec![0.25; V * 64]));
    let input = input(root.path());
    write_checkpoint(&input.checkpoint, &config_value(), &tensors);
    let made = make(&input, &mut |q| Ok(constant(q, 0.1, VD))).unwrap();
    let mut tensors = bundle_tensors(&made.path);
    assert!(tensors.iter().all(|t| t.name != "embed_tokens.weight"));
    tensors.push(TensorData::bf16("embed_tokens.weight", &[V, 64], &vec![0.25; V * 64]));
    with_weights(&made.path, &tensors);
    let report = check(&made.path, CheckOptions::default()).unwrap();
    fails_with(&report, "tensor_extra", "`embed_tokens.weight`");
    assert!(report.failures().next().unwrap().hint().unwrap().contains("target's own"));
}

#[test]
fn the_card_says_what_was_measured_and_how_to_run_it() {
    let (_root, dir) = made();
    let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
    for part in [
        "base_model: \"toy/Toy-8L-Instruct\"",
        "license: \"apache-2.0\"",
        "| gsm8k | chain, depth 5 | greedy | 80 | 2.31 [2.20, 2.43] | 40.0 | 66.4 | 1.66× [1.60, 1.72] | all 80 |",
        "| gsm8k (doubts) | chain, depth 3 |",
        "baseline: target-only decoding, same session, interleaved.",
        "* gsm8k: only 5 rows were measured, 20 are wanted",
        "draftsmith generate --target hf:toy/Toy-8L-Instruct --bundle DIR",
        "--speculative-algorithm EAGLE3",
        "--speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6",
        "\"method\": \"eagle3\"",
        "max_draft_len: 5",
        "draftsmith bundle export DIR --format vllm --out DIR-vllm",
        "-md DIR-gguf/draft.gguf --spec-type draft-eagle3 --spec-draft-n-max 5",
        "1,500 optimiser steps, 1,200,000 tokens read with their prompts, peak learning rate 1e-4, seed 7, 90 minutes",
        "| prompts-mini | 3,000 | 900,000 | 600,000 | MIT, CC0-1.0 |",
        "width 64, 24 of 40 token ids",
    ] {
        assert!(card.contains(part), "`{part}` is not in\n{card}");
    }
    assert!(!card.contains("/home/somebody"), "a local path is of no use to others");
    let results = std::fs::read_to_string(dir.join("RESULTS.md")).unwrap();
    assert!(results.contains("| gsm8k | chain, depth 5 | 4,000 | 70.0 % | 40.0 % | 15.0 % |"), "{results}");
    assert!(dir.join("results/gsm8k.json").is_file() && dir.join("results/gsm8k-2.json").is_file());
    assert!(dir.join("results/report.html").is_file());
}

#[test]
fn a_report_can_be_read_by_machines() {
    let (_root, dir) = made();
    let mut tensors = bundle_tensors(&dir);
    tensors.retain(|t| t.name != "norm.weight");
    with_weights(&dir, &tensors);
    let value = serde_json::to_value(check(&dir, CheckOptions::default()).unwrap()).unwrap();
    assert_eq!(value["holds"], false);
    assert_eq!(value["checks"][2]["name"], "tensors");
    assert_eq!(value["checks"][2]["status"], "failed");
    assert_eq!(value["checks"][2]["problems"][0]["kind"], "tensor_missing");
    assert!(value["checks"][2]["problems"][0]["hint"].is_string());
    let Some(Problem::TensorMissing { name, .. }) =
        check(&dir, CheckOptions::default()).unwrap().failures().next().cloned()
    else {
        panic!("the missing tensor is the first failure")
    };
    assert_eq!(name, "norm.weight");
}

#[test]
fn a_manifest_of_version_1_still_opens() {
    // Written by the first version of this crate; never to be written anew.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bundle.json"), include_str!("../data/bundle-v1.json")).unwrap();
    let manifest = Manifest::read(dir.path()).unwrap();
    assert_eq!(manifest.name, "toy-8l-eagle3");
    assert_eq!(manifest.draft.target_layer_ids, [1, 3, 4]);
    assert_eq!(manifest.training.data[0].trained_tokens, 600_000);
    assert_eq!(manifest.training.tokens_read, 1_200_000);
}

#[test]
fn a_spoilt_manifest_or_probe_is_told_and_never_a_panic() {
    let (_root, dir) = made();
    let good = std::fs::read_to_string(dir.join("bundle.json")).unwrap();
    for i in (0..good.len()).step_by(11) {
        for byte in [b'0', b'"', b'-', b'}'] {
            let mut bytes = good.as_bytes().to_vec();
            bytes[i] = byte;
            std::fs::write(dir.join("bundle.json"), &bytes).unwrap();
            if let Ok(report) = check(&dir, CheckOptions::default()) {
                let _ = report.text();
            }
        }
    }
    std::fs::write(dir.join("bundle.json"), &good).unwrap();
    let good = std::fs::read(dir.join("probe.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for i in 0..header {
        let mut bytes = good.clone();
        bytes[i] ^= 0x11;
        std::fs::write(dir.join("probe.safetensors"), &bytes).unwrap();
        assert!(!checked(&dir).holds, "byte {i}");
    }
}

#[test]
fn the_setting_that_measured_best_over_all_workloads_is_recommended() {
    let base = input(Path::new("/")).results.remove(0);
    let result = |workload: &str, depth: u32, speedup: f64| MeasuredResult {
        workload: workload.into(),
        shape: (depth > 0).then_some(Shape { depth, num_draft_tokens: depth, top_k: 1 }),
        speedup: Some(Measured { value: speedup, ci95: None }),
        ..base.clone()
    };
    let mut results = vec![
        result("a", 5, 0.8),
        result("b", 5, 0.9),
        // Better on one, worse over both.
        result("a", 7, 1.2),
        result("b", 7, 0.5),
        // Not measured on the second workload.
        result("a", 2, 2.0),
        result("a", 0, 1.1),
        result("b", 0, 1.1),
    ];
    let best = Recommended::measured(&results).unwrap();
    assert_eq!((best.depth, best.top_k, best.num_draft_tokens), (5, 1, 5));
    assert_eq!(
        best.because,
        "best of 3 fixed settings measured on a, b (geometric means): 0.85x over target-only decoding, accept length 2.31: a \
         verify step commits 2.31 tokens and takes as long as 2.73 plain steps; automatic drafting 1.10x"
    );
    assert!(!best.pays, "slower than the target alone");
    let faster = [result("a", 1, 1.0), result("b", 1, 1.02)];
    assert!(Recommended::measured(&faster).unwrap().pays);
    // Of equals the shorter one: verifying less is never slower elsewhere.
    results.extend([result("a", 3, 0.8), result("b", 3, 0.9)]);
    assert_eq!(Recommended::measured(&results).unwrap().depth, 3);
    results.retain(|r| r.shape.is_none());
    assert_eq!(Recommended::measured(&results), None);
    assert_eq!(Recommended::measured(&[]), None);
}

/// The card of a bundle whose only fixed setting measured `chain`, and automatic drafting `automatic`.
fn card_with(chain: f64, automatic: Option<f64>) -> (String, Manifest) {
    let (_root, dir) = made();
    let mut again = input_of(&dir).unwrap();
    let mut result = input(Path::new("/")).results.remove(0);
    result.speedup = Some(Measured { value: chain, ci95: None });
    let auto = automatic.map(|speedup| MeasuredResult {
        shape: None,
        drafting: "as much as pays".into(),
        speedup: Some(Measured { value: speedup, ci95: None }),
        ..result.clone()
    });
    again.results = std::iter::once(result).chain(auto).collect();
    again.recommended = Recommended::measured(&again.results).unwrap();
    let made = remake(&again).unwrap();
    assert!(checked(&dir).holds);
    assert_eq!(Manifest::read(&dir).unwrap(), made.manifest);
    (std::fs::read_to_string(dir.join("README.md")).unwrap(), made.manifest)
}

#[test]
fn nothing_that_measured_below_one_is_recommended() {
    let (card, manifest) = card_with(0.85, None);
    assert!(!manifest.recommended.pays && !card.contains("Recommended:"), "{card}");
    assert!(card.contains("Decode without the draft here"), "{card}");
    assert!(card.contains("commits 2.31 tokens and takes as long as 2.72 plain steps"), "{card}");
    let (card, _) = card_with(0.85, Some(0.97));
    assert!(card.contains("Decode without the draft here") && !card.contains("Recommended:"), "{card}");
    let (card, _) = card_with(0.85, Some(1.12));
    assert!(card.contains("Recommended: automatic drafting (`--auto`), 1.12x"), "{card}");
    let (card, manifest) = card_with(1.3, Some(1.12));
    assert!(manifest.recommended.pays && card.contains("Recommended: a chain of depth 5"), "{card}");
    assert!(!manifest.to_json().unwrap().contains("pays"), "older programs read bundles that pay");
}

#[test]
fn the_cards_own_command_names_the_very_weights() {
    let card = |references: &[&str]| {
        let (_root, dir) = made();
        let mut again = input_of(&dir).unwrap();
        again.target.references = references.iter().map(|r| (*r).to_string()).collect();
        remake(&again).unwrap();
        std::fs::read_to_string(dir.join("README.md")).unwrap()
    };
    let sha256 = "aa".repeat(32);
    let named = card(&["pip:toy==1.0:toy/q4.gguf", "hf:toy/Toy"]);
    assert!(named.contains("generate --target pip:toy==1.0:toy/q4.gguf --bundle DIR"), "{named}");
    assert!(named.contains(&format!("the target's weights have sha256 `{sha256}`")), "{named}");
    // A file of one machine: the base model has other weights, so its name is no command.
    let local = card(&["/home/somebody/toy.gguf"]);
    assert!(local.contains("draftsmith generate --target TARGET --bundle DIR"), "{local}");
    assert!(
        local.contains(&format!(
            "`TARGET` is Toy-8L-Instruct (Q4_1) with sha256 `{sha256}`, made from hf:toy/Toy-8L-Instruct"
        )),
        "{local}"
    );
}

#[test]
fn a_bundle_made_again_from_itself_keeps_weights_and_probe() {
    let (_root, dir) = made();
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let (weights, probe) = (read("model.safetensors"), read("probe.safetensors"));
    let mut again = input_of(&dir).unwrap();
    again.target.hub_name = Some("other/Base".into());
    let made = remake(&again).unwrap();
    assert_eq!(made.manifest.target.hub_name.as_deref(), Some("other/Base"));
    assert!(weights == read("model.safetensors") && probe == read("probe.safetensors"));
    let card = String::from_utf8(read("README.md")).unwrap();
    assert!(card.contains("base_model: \"other/Base\"") && card.contains("vllm serve other/Base"), "{card}");
    assert!(checked(&dir).holds);
}
