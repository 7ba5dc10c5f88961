//! Drafts in the layouts of other engines: out, back in with identical logits, and spoilt in every way.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_bundle::{
    BundleError, CheckReport, Existing, ExportInput, GGUF_FILE, Imported, Layout, MakeInput, Problem,
    SPECFORGE, TargetFacts, export, export_specforge, import, verify_export,
};
use draftsmith_core::{Sampling, VocabMap};
use draftsmith_decode::{DraftPlan, Engine, GenerateOptions, Generation, drafter};
use draftsmith_formats::gguf::{GgmlType, GgufArray, GgufFile, GgufValue, GgufWriter};
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, write};
use draftsmith_kernels::{Cpu, PackMode};
use draftsmith_model::{Draft, Infer, Ops, Target, read_draft};
use serde_json::{Value, json};

use crate::support::{VD, input, made};

mod parallel;

const LAYOUTS: [Layout; 4] = [Layout::Sglang, Layout::Vllm, Layout::Speculators, Layout::Gguf];

/// Stands for what a GGUF target carries.
fn tokenizer() -> Vec<(String, GgufValue)> {
    vec![
        ("tokenizer.ggml.model".into(), GgufValue::Str("gpt2".into())),
        (
            "tokenizer.ggml.tokens".into(),
            GgufValue::Array(GgufArray::Str((0..1024).map(|i| format!("t{i}")).collect())),
        ),
        ("tokenizer.ggml.eos_token_id".into(), GgufValue::U32(2)),
    ]
}

fn try_export(bundle: &Path, layout: Layout, target: &Target<Cpu>) -> Result<PathBuf, BundleError> {
    let out = bundle.with_file_name(layout.name());
    let tokenizer = tokenizer();
    let facts = TargetFacts { config: target.config(), tokenizer: &tokenizer };
    let exported =
        export(&ExportInput { bundle, layout, out: &out, existing: Existing::Replace, target: Some(facts) })?;
    assert!(!exported.launch.is_empty());
    Ok(out)
}

fn verified(export: &Path, bundle: &Path, target: &Target<Cpu>) -> CheckReport {
    verify_export(export, bundle, target.kernels().as_ref()).unwrap()
}

/// The bundle made of an import, beside the bundle that was exported.
fn imported_bundle(draft: &Imported, bundle: &Path, target: &Target<Cpu>) -> Result<PathBuf, BundleError> {
    let root = bundle.parent().unwrap();
    let out = root.join("imported");
    let input = MakeInput { out: out.clone(), existing: Existing::Replace, ..input(root, target) };
    draft.make(input, "somebody's draft", target)?;
    Ok(out)
}

#[test]
fn every_layout_comes_back_with_identical_weights_and_logits() {
    let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "rope_theta": 500000.0});
    let served: &[(Value, &[Layout])] = &[
        (json!({}), &LAYOUTS),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}), &LAYOUTS),
        (llama3, &LAYOUTS),
        (json!({"fc_norm": true, "norm_output": true}), &[Layout::Sglang, Layout::Vllm, Layout::Speculators]),
        (
            json!({"norm_before_residual": true, "norm_before_fc": true}),
            &[Layout::Vllm, Layout::Speculators, Layout::Gguf],
        ),
    ];
    for (variant, layouts) in served {
        let (_root, bundle, target) = made(variant);
        for layout in *layouts {
            let place = format!("{variant} as {}", layout.name());
            let out = try_export(&bundle, *layout, &target).unwrap();
            let report = verified(&out, &bundle, &target);
            assert!(report.holds && report.checks.len() == 3, "{place}:\n{}", report.text());

            let draft = import(&out).unwrap();
            assert_eq!(draft.layout, *layout);
            let back = imported_bundle(&draft, &bundle, &target).unwrap();
            let bytes = |dir: &Path, file: &str| std::fs::read(dir.join(file)).unwrap();
            assert!(bytes(&back, "model.safetensors") == bytes(&bundle, "model.safetensors"), "{place}");
            // The probe holds the answers of the whole network: the same bits.
            assert!(bytes(&back, "probe.safetensors") == bytes(&bundle, "probe.safetensors"), "{place}");
        }
    }
}

#[test]
fn what_an_engine_cannot_serve_is_refused_before_anything_is_written() {
    for (variant, layout, word) in [
        (json!({"fc_norm": true}), Layout::Gguf, "llama.cpp cannot serve this draft: `fc_norm`"),
        (json!({"norm_output": true}), Layout::Gguf, "`norm_output`"),
        (json!({"norm_before_residual": true}), Layout::Sglang, "SGLang cannot serve this draft"),
        (json!({"norm_before_fc": true}), Layout::Sglang, "`norm_before_fc`"),
        (
            json!({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}}),
            Layout::Sglang,
            "never what the last layer writes",
        ),
    ] {
        let (_root, bundle, target) = made(&variant);
        let error = try_export(&bundle, layout, &target).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        assert!(error.hint().is_some());
        assert!(!bundle.with_file_name(layout.name()).exists());
    }
    let (_root, bundle, target) = made(&json!({}));
    let out = bundle.with_file_name("nothing");
    let facts = TargetFacts { config: target.config(), tokenizer: &[] };
    for target in [None, Some(facts)] {
        let input = ExportInput {
            bundle: &bundle,
            layout: Layout::Gguf,
            out: &out,
            existing: Existing::Refuse,
            target,
        };
        assert!(matches!(export(&input), Err(BundleError::NoTokenizer)));
    }
}

#[test]
fn each_layout_numbers_layers_by_the_one_key_that_its_engines_read() {
    let (_root, bundle, target) =
        made(&json!({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}));
    let config = |layout| -> Value {
        let out = try_export(&bundle, layout, &target).unwrap();
        serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap()
    };
    let nested = |c: &Value| c["eagle_config"]["eagle_aux_hidden_state_layer_ids"].clone();
    let top = |c: &Value| c["eagle_aux_hidden_state_layer_ids"].clone();
    let sglang = config(Layout::Sglang);
    assert_eq!((nested(&sglang), top(&sglang)), (json!([0, 1, 2]), Value::Null));
    for layout in [Layout::Vllm, Layout::Speculators] {
        let config = config(layout);
        assert_eq!((nested(&config), top(&config)), (Value::Null, json!([1, 2, 3])), "{}", layout.name());
        let nulls = config.as_object().unwrap().values().any(Value::is_null);
        assert!(!nulls, "`null` where a number is expected: {config}");
    }
    let speculators = config(Layout::Speculators);
    assert_eq!(speculators["transformer_layer_config"]["vocab_size"], 1024);
    assert_eq!(speculators["draft_vocab_size"], VD);
    assert_eq!(speculators["speculators_config"]["proposal_methods"][0]["speculative_tokens"], 5);
    let out = try_export(&bundle, Layout::Gguf, &target).unwrap();
    let file = GgufFile::open(out.join(GGUF_FILE)).unwrap();
    assert_eq!(file.get_i64_array("eagle3.target_layers").unwrap(), [1, 2, 3]);
    // Absolute ids: every second one from 100 on.
    let d2t = file.data(file.tensor("d2t").unwrap());
    let ids: Vec<i64> = d2t.chunks_exact(8).map(|c| i64::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(ids, (0..VD as i64).map(|i| 100 + 2 * i).collect::<Vec<_>>());
}

/// A tensor of an export, whatever its container.
#[derive(Clone)]
struct Part {
    name: String,
    /// Row-major.
    shape: Vec<usize>,
    kind: Kind,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Safetensors(Dtype),
    Gguf(GgmlType),
}

fn parts(dir: &Path, layout: Layout) -> Vec<Part> {
    if layout == Layout::Gguf {
        let file = GgufFile::open(dir.join(GGUF_FILE)).unwrap();
        let part = |t: &draftsmith_formats::gguf::TensorInfo| Part {
            name: t.name.clone(),
            shape: t.dims.iter().rev().copied().collect(),
            kind: Kind::Gguf(t.ggml_type),
            bytes: file.data(t).to_vec(),
        };
        return file.tensors().iter().map(part).collect();
    }
    let file = SafetensorsDir::open(dir).unwrap();
    let part = |name: &str| {
        let t = file.get(name).unwrap();
        let (shape, bytes) = (t.shape.to_vec(), t.bytes.to_vec());
        Part { name: name.into(), shape, kind: Kind::Safetensors(t.dtype), bytes }
    };
    file.names().map(part).collect()
}

/// Puts another tensor in the place of number `i` of an export, or none.
fn replace_one(dir: &Path, layout: Layout, all: &[Part], i: usize, changed: Option<Part>) {
    let mut parts = all.to_vec();
    match changed {
        Some(part) => parts[i] = part,
        None => drop(parts.remove(i)),
    }
    replace(dir, layout, &parts);
}

/// Puts other tensors into an export.
fn replace(dir: &Path, layout: Layout, parts: &[Part]) {
    if layout == Layout::Gguf {
        let path = dir.join(GGUF_FILE);
        let file = GgufFile::open(&path).unwrap();
        let mut writer = GgufWriter::new();
        for (key, value) in file.metadata() {
            writer.set(key.clone(), value.clone());
        }
        for part in parts {
            let Kind::Gguf(ggml_type) = part.kind else { panic!("a GGUF tensor") };
            let dims: Vec<usize> = part.shape.iter().rev().copied().collect();
            writer.tensor(part.name.clone(), &dims, ggml_type, &part.bytes);
        }
        let bytes = writer.to_bytes();
        drop(file);
        std::fs::write(path, bytes).unwrap();
        return;
    }
    let tensors: Vec<TensorData> = parts
        .iter()
        .map(|part| {
            let Kind::Safetensors(dtype) = part.kind else { panic!("a safetensors tensor") };
            TensorData {
                name: part.name.clone(),
                dtype,
                shape: part.shape.clone(),
                bytes: part.bytes.clone(),
            }
        })
        .collect();
    write(dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

fn transposed(part: &Part) -> Option<Part> {
    let [rows, columns] = part.shape[..] else { return None };
    let size = part.bytes.len() / (rows * columns);
    let mut bytes = Vec::with_capacity(part.bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * size;
            bytes.extend_from_slice(&part.bytes[at..at + size]);
        }
    }
    Some(Part { shape: vec![columns, rows], bytes, ..part.clone() })
}

/// The same number of elements in a type that means something else.
fn retyped(part: &Part) -> Part {
    let n: usize = part.shape.iter().product();
    let (kind, size) = match part.kind {
        Kind::Safetensors(Dtype::I64) => (Kind::Safetensors(Dtype::F32), 4),
        Kind::Safetensors(Dtype::BOOL) => (Kind::Safetensors(Dtype::I64), 8),
        Kind::Safetensors(_) => (Kind::Safetensors(Dtype::I64), 8),
        Kind::Gguf(GgmlType::I64) => (Kind::Gguf(GgmlType::F32), 4),
        Kind::Gguf(_) => (Kind::Gguf(GgmlType::I32), 4),
    };
    Part { kind, bytes: vec![1; n * size], ..part.clone() }
}

/// What an import and a comparison say about changed tensors: the import names one of `names`, the comparison all.
#[track_caller]
fn check_named(dir: &Path, layout: Layout, bundle: &Path, target: &Target<Cpu>, names: &[&str], what: &str) {
    let place = format!("{} {what} {names:?}", layout.name());
    let error = import(dir).expect_err(&place).to_string();
    assert!(names.iter().any(|name| error.contains(&format!("`{name}`"))), "{place}: {error}");
    let report = verified(dir, bundle, target);
    let told = |name: &&str| report.failures().any(|p| p.to_string().contains(&format!("`{name}`")));
    assert!(names.iter().all(told), "{place}:\n{}", report.text());
}

#[test]
fn a_tensor_dropped_renamed_transposed_or_retyped_is_named_in_every_layout() {
    let (_root, bundle, target) = made(&json!({}));
    for layout in LAYOUTS {
        let dir = try_export(&bundle, layout, &target).unwrap();
        let all = parts(&dir, layout);
        assert_eq!(all.len(), if layout == Layout::Gguf { 14 } else { 15 });
        for (i, part) in all.iter().enumerate() {
            let with = |changed| replace_one(&dir, layout, &all, i, changed);
            let name = part.name.as_str();
            // `t2d` follows from `d2t`: an import does without it, and an export without it is not the bundle's.
            if name == "t2d" {
                with(None);
                assert!(import(&dir).is_ok());
                let report = verified(&dir, &bundle, &target);
                assert!(report.failures().any(|p| p.to_string().contains("`t2d`")), "{}", report.text());
            } else {
                with(None);
                check_named(&dir, layout, &bundle, &target, &[name], "dropped");
            }
            let renamed = format!("{name}.old");
            with(Some(Part { name: renamed.clone(), ..part.clone() }));
            check_named(&dir, layout, &bundle, &target, &[name, &renamed], "renamed");
            with(Some(retyped(part)));
            check_named(&dir, layout, &bundle, &target, &[name], "retyped");
            if let Some(other) = transposed(part) {
                let square = other.shape == part.shape;
                with(Some(other));
                if square {
                    // Only the numbers can tell.
                    let report = verified(&dir, &bundle, &target);
                    let told = |p: &Problem| matches!(p, Problem::TensorDiffers { name: n, .. } if n == name);
                    assert!(report.failures().any(told), "{}", report.text());
                } else {
                    check_named(&dir, layout, &bundle, &target, &[name], "transposed");
                }
            }
        }
        replace(&dir, layout, &all);
        assert!(verified(&dir, &bundle, &target).holds);
    }
}

#[test]
fn an_export_with_one_other_number_or_layer_is_told() {
    let (_root, bundle, target) = made(&json!({}));
    for layout in LAYOUTS {
        let dir = try_export(&bundle, layout, &target).unwrap();
        let all = parts(&dir, layout);
        for i in 0..all.len() {
            let mut changed = all.clone();
            *changed[i].bytes.last_mut().unwrap() ^= 1;
            replace(&dir, layout, &changed);
            let report = verified(&dir, &bundle, &target);
            let name = &all[i].name;
            let told = |p: &Problem| matches!(p, Problem::TensorDiffers { name: n, .. } if n == name);
            assert!(report.failures().any(told), "{} {name}:\n{}", layout.name(), report.text());
        }
        replace(&dir, layout, &all);
    }
    // The network of the export is not ours: a switch that only the configuration carries shows in its numbers.
    for (key, value, kind) in [
        ("rope_theta", json!(20000.0), "hidden_differs"),
        ("norm_output", json!(true), "hidden_differs"),
        ("rms_norm_eps", json!(0.1), "hidden_differs"),
        ("eagle_aux_hidden_state_layer_ids", json!([1, 2, 4]), "export_differs"),
    ] {
        let dir = try_export(&bundle, Layout::Vllm, &target).unwrap();
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let report = verified(&dir, &bundle, &target);
        assert!(report.failures().any(|p| p.kind() == kind), "{key}:\n{}", report.text());
    }
}

/// Numbers that depend on their place alone.
fn number(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    }
}

/// A draft folder as SpecForge writes one, from its published key set and plain numbers: nothing here comes from our
/// own tables.
fn specforge_folder(dir: &Path) {
    let (h, i, q, kv, v, vd) = (128, 160, 128, 64, 1024, 96);
    let float_keys: [(&str, &[usize]); 13] = [
        ("fc.weight", &[h, 3 * h]),
        ("lm_head.weight", &[vd, h]),
        ("midlayer.hidden_norm.weight", &[h]),
        ("midlayer.input_layernorm.weight", &[h]),
        ("midlayer.mlp.down_proj.weight", &[h, i]),
        ("midlayer.mlp.gate_proj.weight", &[i, h]),
        ("midlayer.mlp.up_proj.weight", &[i, h]),
        ("midlayer.post_attention_layernorm.weight", &[h]),
        ("midlayer.self_attn.k_proj.weight", &[kv, 2 * h]),
        ("midlayer.self_attn.o_proj.weight", &[h, q]),
        ("midlayer.self_attn.q_proj.weight", &[q, 2 * h]),
        ("midlayer.self_attn.v_proj.weight", &[kv, 2 * h]),
        ("norm.weight", &[h]),
    ];
    let mut next = number(5);
    let mut tensors: Vec<TensorData> = float_keys
        .iter()
        .map(|(name, shape)| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> =
                (0..n).map(|_| if shape.len() == 1 { 1.0 + 0.1 * next() } else { 0.1 * next() }).collect();
            TensorData::bf16(name, shape, &values)
        })
        .collect();
    // Target ids 3, 13, 23, …: offset 3 + 9 i.
    let offsets: Vec<i64> = (0..vd as i64).map(|d| 3 + 9 * d).collect();
    let covered: Vec<bool> = (0..v).map(|t| t % 10 == 3 && t / 10 < vd).collect();
    tensors.push(TensorData::i64("d2t", &[vd], &offsets));
    tensors.push(TensorData::bool("t2d", &[v], &covered));
    std::fs::create_dir_all(dir).unwrap();
    write(dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "draft_vocab_size": vd, "eos_token_id": 2, "head_dim": 32, "hidden_act": "silu",
        "hidden_size": h, "initializer_range": 0.02, "intermediate_size": i, "max_position_embeddings": 2048,
        "max_window_layers": 4, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": v
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_folder_with_specforges_key_set_imports_and_decodes_losslessly() {
    let (root, bundle, target) = made(&json!({}));
    let folder = root.path().join("specforge");
    specforge_folder(&folder);
    let mut draft = import(&folder).unwrap();
    assert_eq!((draft.layout, draft.tensors.len()), (Layout::Sglang, 13));
    assert_eq!(draft.rounded(), [""; 0]);
    draft.tensors.get_mut("norm.weight").unwrap().1[0] = 1.001;
    assert_eq!(draft.rounded(), ["norm.weight"]);
    let dir = imported_bundle(&draft, &bundle, &target).unwrap();
    let manifest = draftsmith_bundle::Manifest::read(&dir).unwrap();
    assert_eq!(manifest.imported.as_ref().unwrap().layout, "sglang");
    assert!(std::fs::read_to_string(dir.join("README.md")).unwrap().contains("somebody's draft"));

    let target = Arc::new(target);
    let plain = decode(&Engine::new(Arc::clone(&target), None), DraftPlan::None, Sampling::GREEDY);
    let drafted = decode(&engine_with(&target, &dir), DraftPlan::Chain { depth: 4 }, Sampling::GREEDY);
    assert_eq!(plain.token_ids, drafted.token_ids);
    assert!(drafted.stats.proposed_drafts > 0);
}

fn engine_with(target: &Arc<Target<Cpu>>, draft: &Path) -> Engine<Cpu> {
    let draft = Draft::load(target.kernels().as_ref(), draft, PackMode::Q8).unwrap();
    Engine::new(Arc::clone(target), Some(drafter(target, draft).unwrap()))
}

fn decode(engine: &Engine<Cpu>, draft: DraftPlan, sampling: Sampling) -> Generation {
    let options = GenerateOptions { max_new_tokens: 24, sampling, draft, ..GenerateOptions::default() };
    engine.generate(&[1, 300, 17, 42, 901, 5], &options, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_draft_whose_ids_stand_in_another_order_is_the_same_draft() {
    let (_root, bundle, target) = made(&json!({}));
    for layout in [Layout::Vllm, Layout::Gguf] {
        let dir = try_export(&bundle, layout, &target).unwrap();
        let mut all = parts(&dir, layout);
        let head = all.iter().position(|p| p.name == "lm_head.weight" || p.name == "output.weight").unwrap();
        let row = all[head].bytes.len() / VD;
        let rows = all[head].bytes.chunks_exact(row).rev();
        all[head].bytes = rows.flatten().copied().collect();
        let d2t = all.iter().position(|p| p.name == "d2t").unwrap();
        let ids = (0..VD as i64).rev().map(|i| 100 + 2 * i).enumerate();
        let stored = |(draft, id): (usize, i64)| if layout == Layout::Gguf { id } else { id - draft as i64 };
        all[d2t].bytes = ids.map(stored).flat_map(i64::to_le_bytes).collect();
        replace(&dir, layout, &all);
        let back = imported_bundle(&import(&dir).unwrap(), &bundle, &target).unwrap();
        let (_, ours, map) = read_draft(&bundle).unwrap();
        let (_, theirs, other) = read_draft(&back).unwrap();
        assert!(ours == theirs && map == other, "{}", layout.name());
    }
}

#[test]
fn wrong_maps_are_refused_and_a_missing_one_means_the_whole_vocabulary() {
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Gguf, &target).unwrap();
    let all = parts(&dir, Layout::Gguf);
    let d2t = all.iter().position(|p| p.name == "d2t").unwrap();
    for (id, word) in [(5_000i64, "5000"), (-1, "-1"), (i64::MIN, "d2t"), (i64::MAX, "d2t"), (102, "102")] {
        let mut changed = all.clone();
        changed[d2t].bytes[..8].copy_from_slice(&id.to_le_bytes());
        replace(&dir, Layout::Gguf, &changed);
        let error = import(&dir).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("d2t"), "{error}");
    }
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Vllm, &target).unwrap();
    let mut all = parts(&dir, Layout::Vllm);
    all.retain(|p| !matches!(p.name.as_str(), "d2t" | "t2d"));
    let head = all.iter_mut().find(|p| p.name == "lm_head.weight").unwrap();
    head.bytes = head.bytes.iter().copied().cycle().take(1024 * 128 * 2).collect();
    head.shape = vec![1024, 128];
    replace(&dir, Layout::Vllm, &all);
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("draft_vocab_size");
    std::fs::write(&path, config.to_string()).unwrap();
    assert_eq!(import(&dir).unwrap().vocab_map, Some(VocabMap::identity(1024)));
}

#[test]
fn an_embedding_that_comes_along_must_be_the_targets() {
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Speculators, &target).unwrap();
    let mut all = parts(&dir, Layout::Speculators);
    let ids: Vec<u32> = (0..1024).collect();
    let mut ops = Infer::new(target.kernels().as_ref());
    let rows = ops.embed(target.embedding(), &ids, target.config().embed_scale);
    let mut values = ops.values(&rows);
    let embedding = |values: &[f32]| {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let kind = Kind::Safetensors(Dtype::F32);
        Part { name: "embed_tokens.weight".into(), shape: vec![1024, 128], kind, bytes }
    };
    all.push(embedding(&values));
    replace(&dir, Layout::Speculators, &all);
    imported_bundle(&import(&dir).unwrap(), &bundle, &target).unwrap();

    values.reverse();
    *all.last_mut().unwrap() = embedding(&values);
    replace(&dir, Layout::Speculators, &all);
    let error = imported_bundle(&import(&dir).unwrap(), &bundle, &target).unwrap_err();
    assert!(error.to_string().contains("`embed_tokens.weight` is not the target's"), "{error}");
}

#[test]
fn foreign_spellings_are_read_and_two_of_one_are_refused() {
    let (_root, bundle, target) = made(&json!({"fc_norm": true}));
    let dir = try_export(&bundle, Layout::Sglang, &target).unwrap();
    let all = parts(&dir, Layout::Sglang);
    let mut spelt = all.clone();
    for part in &mut spelt {
        part.name = match part.name.as_str() {
            "fc_norm.0.weight" => "aux_norm_low.weight".into(),
            "fc_norm.1.weight" => "aux_norm_mid.weight".into(),
            "fc_norm.2.weight" => "aux_norm_high.weight".into(),
            name => format!("model.{name}"),
        };
    }
    replace(&dir, Layout::Sglang, &spelt);
    assert_eq!(import(&dir).unwrap().tensors, read_draft(&bundle).unwrap().1);
    let mut twice = all.clone();
    twice.push(Part {
        name: "model.norm.weight".into(),
        ..all.iter().find(|p| p.name == "norm.weight").unwrap().clone()
    });
    replace(&dir, Layout::Sglang, &twice);
    let error = import(&dir).unwrap_err().to_string();
    assert!(error.contains("`model.norm.weight`") && error.contains("`norm.weight`"), "{error}");
}

#[test]
fn keys_that_name_different_layers_are_refused_until_somebody_decides() {
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Sglang, &target).unwrap();
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([1, 3, 4]);
    for (top, fits) in [(json!([2, 4, 5]), true), (json!([1, 3, 4]), false)] {
        config["eagle_aux_hidden_state_layer_ids"] = top;
        std::fs::write(&path, config.to_string()).unwrap();
        let mut draft = import(&dir).unwrap();
        let result = imported_bundle(&draft, &bundle, &target);
        assert_eq!(result.is_ok(), fits);
        if let Err(error) = result {
            assert!(error.to_string().contains("[1, 3, 4]"), "{error}");
            assert!(error.hint().unwrap().contains("--layers"));
            draft.set_layers(&[0, 2, 3]).unwrap();
            let dir = imported_bundle(&draft, &bundle, &target).unwrap();
            assert_eq!(read_draft(&dir).unwrap().0.target_layers(), Some(vec![0, 2, 3]));
        }
    }
}

#[test]
fn paths_without_a_draft_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let none = |path: &Path| matches!(import(path), Err(BundleError::NoDraft { .. }));
    assert!(none(dir.path()) && none(&dir.path().join("nowhere")));
    std::fs::write(dir.path().join("pytorch_model.bin"), "PK").unwrap();
    assert!(none(dir.path()) && none(&dir.path().join("pytorch_model.bin")));
    let hint = import(dir.path()).unwrap_err().hint().unwrap();
    assert!(hint.contains("pickled"), "{hint}");
}

#[test]
fn damaged_files_are_errors_and_never_panics() {
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Gguf, &target).unwrap();
    damage(&dir.join(GGUF_FILE), 11, 1_000);
}

/// Imports a GGUF file with some bytes changed, many times over.
fn damage(path: &Path, seed: u64, rounds: usize) {
    let whole = std::fs::read(path).unwrap();
    let mut next = number(seed);
    let mut at = |n: usize| ((next() + 0.5) * n as f32) as usize % n;
    // Keys, names and directory stand in the first bytes behind the tokens.
    let head = GgufFile::open(path).unwrap().tensors().iter().map(|t| t.offset).min().unwrap();
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        for _ in 0..=at(3) {
            let place = at(head);
            bytes[place] = at(256) as u8;
        }
        std::fs::write(path, &bytes).unwrap();
        if let Err(error) = import(path.parent().unwrap()) {
            assert!(!error.to_string().is_empty());
        }
    }
}

#[test]
fn a_draft_that_went_out_and_came_back_proposes_the_same() {
    let (_root, bundle, target) = made(&json!({}));
    let dir = try_export(&bundle, Layout::Gguf, &target).unwrap();
    let back = imported_bundle(&import(&dir).unwrap(), &bundle, &target).unwrap();
    let target = Arc::new(target);
    let sampling = Sampling { temperature: 0.8, seed: 3, ..Sampling::GREEDY };
    let [here, there] = [&bundle, &back].map(|folder| {
        let answer = decode(&engine_with(&target, folder), DraftPlan::Chain { depth: 3 }, sampling);
        (answer.token_ids, answer.stats)
    });
    assert_eq!(here, there);
}

/// Runs a script of `bench/peers` where the package that it needs is installed.
#[expect(clippy::print_stderr, reason = "a comparison that did not happen must be seen")]
fn peer(variable: &str, package: &str, script: &str, args: &[&Path]) -> Option<String> {
    let python = std::env::var(variable).unwrap_or_else(|_| "python3".into());
    let run = |args: &[&std::ffi::OsStr]| std::process::Command::new(&python).args(args).output();
    let import = format!("import {package}");
    if !run(&["-c".as_ref(), import.as_ref()]).is_ok_and(|output| output.status.success()) {
        eprintln!("not compared: `{python}` has no package `{package}`");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/peers").join(script);
    let args: Vec<&std::ffi::OsStr> =
        std::iter::once(script.as_os_str()).chain(args.iter().map(|arg| arg.as_os_str())).collect();
    let output = run(&args).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    Some(said)
}

#[test]
fn the_gguf_package_reads_the_same_numbers_where_it_is_installed() {
    for variant in [json!({}), json!({"norm_before_residual": true, "norm_before_fc": true})] {
        let (_root, bundle, target) = made(&variant);
        let file = try_export(&bundle, Layout::Gguf, &target).unwrap().join(GGUF_FILE);
        let said = peer("DRAFTSMITH_PYTHON", "gguf", "check_gguf_draft.py", &[&file, &bundle, &file]);
        assert!(said.is_none_or(|said| said.starts_with("equal: ")));
    }
}
