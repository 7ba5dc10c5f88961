//! Targets with experts compute what transformers computes, from folders and GGUF files, the same bits however their
//! rows are cut; configurations that contradict their weights are refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::Cpu;
use draftsmith_model::{Infer, ModelError, Precision, StepItem, Target, TargetConfig, TargetTensors};

const QWEN: [&str; 3] = ["qwen3_moe", "qwen3_moe_shares", "qwen3_moe_mixed"];
const GPT_OSS: [&str; 2] = ["gpt_oss_plain_rope", "gpt_oss_mxfp4"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/experts").join(name)
}

/// Logits of all positions, in pieces of so many rows.
fn logits(target: &Target<Cpu>, ids: &[u32], piece: usize) -> Vec<f32> {
    let mut kv = target.new_kv();
    let mut all = Vec::new();
    for part in ids.chunks(piece) {
        let parents = TokenTree::chain_parents(part.len());
        let out = target.forward(&mut [StepItem { kv: &mut kv, tokens: part, parents: &parents }], &[]);
        all.extend(target.logits(&out, &(0..part.len() as u32).collect::<Vec<_>>()));
    }
    all
}

/// The root mean square of the differences, as a share of the values'.
fn error(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = found.iter().zip(wanted).map(|(f, w)| square(f - w)).sum();
    (off / wanted.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

#[track_caller]
fn check(name: &str, file: &str, precision: Precision, tolerance: f64) {
    let expected = SafetensorsDir::open(fixture(name).join("expected.safetensors")).unwrap();
    let want = |name: &str| expected.get(name).unwrap().to_f32().unwrap();
    let ids: Vec<u32> =
        expected.get("input_ids").unwrap().to_i64().unwrap().into_iter().map(|i| i as u32).collect();
    let what = format!("{name}/{file} {precision:?}");
    let load = |threads| {
        let path = fixture(name).join(file);
        Target::load(Arc::new(Cpu::new(threads)), &path, precision).unwrap_or_else(|e| panic!("{what}: {e}"))
    };
    let target = load(2);
    let layers: Vec<LayerId> = (0..target.config().num_layers as u32).map(LayerId).collect();
    let mut kv = target.new_kv();
    let parents = TokenTree::chain_parents(ids.len());
    let output = target.forward(&mut [StepItem { kv: &mut kv, tokens: &ids, parents: &parents }], &layers);
    for (layer, hidden) in output.hidden.iter().enumerate() {
        let found = Infer::new(target.kernels().as_ref()).values(hidden);
        let off = error(&found, &want(&format!("hidden.{layer}")));
        assert!(off <= tolerance, "{what}: layer {layer} is off by {off:e} of its size");
    }
    let all = logits(&target, &ids, ids.len());
    let off = error(&all, &want("logits"));
    assert!(off <= tolerance, "{what}: logits are off by {off:e} of their size");

    // Other pieces, other threads: the same bits.
    for (threads, piece) in [(1, 1), (1, 24), (2, 1), (2, 5)] {
        assert!(logits(&load(threads), &ids, piece) == all, "{what}: {threads} threads, pieces of {piece}");
    }
    // Two sequences in a step, one of them a tree.
    let (mut a, mut b) = (target.new_kv(), target.new_kv());
    let prefill = |kv: &mut _, tokens: &[u32]| {
        let parents = TokenTree::chain_parents(tokens.len());
        target.forward(&mut [StepItem { kv, tokens, parents: &parents }], &[]);
    };
    prefill(&mut a, &ids[..9]);
    prefill(&mut b, &ids[..14]);
    let tree = [ids[9], 5, ids[10], ids[10]];
    let mut items = [
        StepItem { kv: &mut a, tokens: &tree, parents: &[None, None, Some(0), Some(1)] },
        StepItem { kv: &mut b, tokens: &ids[14..15], parents: &[None] },
    ];
    let output = target.forward(&mut items, &[]);
    let vocab = target.config().vocab_size;
    let found = target.logits(&output, &[0, 2, 4]);
    for (row, position) in [9, 10, 14].into_iter().enumerate() {
        let (found, wanted) = (&found[row * vocab..][..vocab], &all[position * vocab..][..vocab]);
        assert!(found == wanted, "{what}: position {position} in a tree beside another sequence");
    }
}

#[test]
fn targets_with_experts_compute_what_transformers_computes() {
    for name in QWEN.into_iter().chain(GPT_OSS) {
        for file in ["", "model.gguf"] {
            check(name, file, Precision::F32, 3e-5);
            // Keys and values in f16; 4-bit floats times activations in 8 bits.
            check(name, file, Precision::Stored, if name == "gpt_oss_mxfp4" { 0.05 } else { 3e-3 });
        }
    }
}

#[test]
fn both_containers_hold_the_same_weights() {
    let bits = |name: &str, file: &str| {
        let target =
            Target::load(Arc::new(Cpu::new(1)), &fixture(name).join(file), Precision::Stored).unwrap();
        logits(&target, &[5, 9, 3, 17, 30, 8], 6)
    };
    // Norms and biases are f32 in GGUF files, and exactly so.
    for name in QWEN.into_iter().chain(GPT_OSS) {
        assert!(bits(name, "") == bits(name, "model.gguf"), "{name}");
    }
}

#[test]
fn a_pass_of_one_row_counts_the_experts_that_compute_it() {
    for (name, experts, used, layers) in [("qwen3_moe", 8, 2, 2), ("gpt_oss_mxfp4", 8, 2, 3)] {
        let target = Target::load(Arc::new(Cpu::new(1)), &fixture(name), Precision::Stored).unwrap();
        let c = target.config();
        let width = c.experts.as_ref().unwrap().width;
        let each = 3 * width * c.hidden_size;
        let dense = layers * (c.q_width() * 2 + c.kv_width() * 2 + experts) * c.hidden_size
            + c.vocab_size * c.hidden_size;
        assert_eq!(target.pass_macs(), dense + layers * used * each, "{name}");
        // Only experts of the first model have a side of this width.
        let of_width = |w: &&draftsmith_kernels::PackedWeight| {
            name != "qwen3_moe" || [w.in_features(), w.out_features()].contains(&width)
        };
        if name == "qwen3_moe" {
            let chosen: usize = target.pass_packed().filter(of_width).map(|w| w.bytes()).sum();
            assert_eq!(target.all_bytes() - target.pass_bytes(), chosen / used * (experts - used), "{name}");
        }
    }
}

#[test]
fn a_draft_takes_no_expert_for_its_mlp() {
    let tensors = TargetTensors::load(&fixture("qwen3_moe")).unwrap();
    assert!(!tensors.config.mlp_is_a_drafts());
    assert!(tensors.last_layer.iter().all(|(name, _)| !name.starts_with("mlp.")));
    let tensors = TargetTensors::load(&fixture("gpt_oss_plain_rope")).unwrap();
    assert!(!tensors.config.attention_is_a_drafts());
    // The last layer of this one has a plain MLP.
    let tensors = TargetTensors::load(&fixture("qwen3_moe_mixed")).unwrap();
    assert!(
        tensors.config.mlp_is_a_drafts() && tensors.last_layer.iter().any(|(n, _)| n.starts_with("mlp."))
    );
}

fn config(name: &str) -> String {
    std::fs::read_to_string(fixture(name).join("config.json")).unwrap()
}

/// A folder with the weights of a fixture and another configuration.
fn folder(name: &str, from: &str, to: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = config(name);
    assert!(text.contains(from), "{name} has no `{from}`");
    std::fs::write(dir.path().join("config.json"), text.replace(from, to)).unwrap();
    std::fs::copy(fixture(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

#[track_caller]
fn refused(path: &Path, wanted: &str) {
    let error = match Target::load(Arc::new(Cpu::new(1)), path, Precision::Stored) {
        Ok(_) => panic!("loaded, but should say `{wanted}`"),
        Err(error) => error,
    };
    let text = error.to_string();
    assert!(text.contains(wanted), "`{text}` does not say `{wanted}`");
    assert!(text.contains(path.to_str().unwrap()) && !text.contains('\n'), "{text}");
    assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{text}");
}

#[test]
fn counts_of_experts_that_contradict_the_weights_are_refused() {
    let count = r#""num_local_experts": 8"#;
    let used = r#""num_experts_per_tok": 2"#;
    for (name, from, to, wanted) in [
        ("qwen3_moe", count, r#""num_local_experts": 9"#, "expected [9, 32]"),
        ("qwen3_moe", count, r#""num_local_experts": 7"#, "expected [7, 32]"),
        ("qwen3_moe", count, r#""num_local_experts": 0"#, "impossible shapes: 0 experts"),
        ("qwen3_moe", count, r#""num_local_experts": 99999999"#, "99999999 experts"),
        ("qwen3_moe", used, r#""num_experts_per_tok": 9"#, "9 of 8 experts compute a token"),
        ("qwen3_moe", used, r#""num_experts_per_tok": 0"#, "0 of 8 experts compute a token"),
        ("qwen3_moe", used, r#""num_experts_per_tok": -1"#, "num_experts_per_tok"),
        (
            "qwen3_moe",
            r#""moe_intermediate_size": 20"#,
            r#""moe_intermediate_size": 24"#,
            "expected [24, 32]",
        ),
        (
            "qwen3_moe",
            r#""moe_intermediate_size": 20"#,
            r#""moe_intermediate_size": 0"#,
            "experts of width 0",
        ),
        (
            "qwen3_moe",
            r#""decoder_sparse_step": 1"#,
            r#""decoder_sparse_step": 0"#,
            "`decoder_sparse_step` is 0",
        ),
        ("qwen3_moe", r#""decoder_sparse_step": 1"#, r#""decoder_sparse_step": 2"#, "mlp.gate_proj.weight"),
        ("qwen3_moe", r#""mlp_only_layers": []"#, r#""mlp_only_layers": [5]"#, "names layer 5 of 2"),
        ("qwen3_moe_mixed", r#""decoder_sparse_step": 2"#, r#""decoder_sparse_step": 1"#, "mlp.gate.weight"),
        ("gpt_oss_mxfp4", count, r#""num_local_experts": 4"#, "expected [4, 32]"),
        ("gpt_oss_mxfp4", r#""intermediate_size": 32"#, r#""intermediate_size": 64"#, "expected"),
        ("gpt_oss_mxfp4", r#""intermediate_size": 32"#, r#""intermediate_size": 48"#, "expected"),
        (
            "gpt_oss_plain_rope",
            r#""attention_bias": true"#,
            r#""attention_bias": false"#,
            "self_attn.k_proj.bias",
        ),
    ] {
        refused(folder(name, from, to).path(), wanted);
    }
}

#[test]
fn a_missing_expert_and_one_too_many_are_named() {
    use draftsmith_formats::safetensors_dir::{TensorData, write};
    let dir = SafetensorsDir::open(fixture("qwen3_moe")).unwrap();
    let all: Vec<(String, Vec<usize>, Vec<f32>)> = dir
        .names()
        .map(|name| {
            let tensor = dir.get(name).unwrap();
            (name.to_owned(), tensor.shape.to_vec(), tensor.to_f32().unwrap())
        })
        .collect();
    let save = |tensors: &[(String, Vec<usize>, Vec<f32>)]| {
        let out = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("qwen3_moe/config.json"), out.path().join("config.json")).unwrap();
        let data: Vec<TensorData> = tensors.iter().map(|(n, s, v)| TensorData::bf16(n, s, v)).collect();
        write(out.path().join("model.safetensors"), &data, &Default::default()).unwrap();
        out
    };
    let gone = "model.layers.1.mlp.experts.6.up_proj.weight";
    let fewer: Vec<_> = all.iter().filter(|(n, ..)| n != gone).cloned().collect();
    refused(save(&fewer).path(), &format!("no tensor `{gone}`"));
    let mut more = all.clone();
    let extra = all.iter().find(|(n, ..)| n == gone).unwrap();
    more.push((gone.replace("experts.6", "experts.8"), extra.1.clone(), extra.2.clone()));
    refused(save(&more).path(), "8 experts in `config.json`, but a tensor");
    refused(save(&more).path(), "model.layers.1.mlp.experts.8.up_proj.weight");
    // The same tensors without a change load.
    assert!(Target::load(Arc::new(Cpu::new(1)), save(&all).path(), Precision::Stored).is_ok());
}

#[test]
fn routers_of_other_families_are_refused_by_name() {
    for (key, wanted) in [
        (r#""n_shared_experts": 1"#, "shared experts (`n_shared_experts`)"),
        (r#""shared_expert_intermediate_size": 64"#, "shared experts (`shared_expert_intermediate_size`)"),
        (r#""n_group": 4"#, "experts chosen by groups (`n_group`)"),
        (r#""topk_group": 2"#, "experts chosen by groups (`topk_group`)"),
        (r#""scoring_func": "sigmoid""#, "scores by `sigmoid` (`scoring_func`)"),
        (r#""topk_method": "noaux_tc""#, "chooses by `noaux_tc` (`topk_method`)"),
        (r#""routed_scaling_factor": 2.5"#, "times 2.5 (`routed_scaling_factor`)"),
        (r#""first_k_dense_replace": 1"#, "`first_k_dense_replace`"),
    ] {
        let text = config("qwen3_moe").replacen('{', &format!("{{ {key},"), 1);
        let hf = HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        let error = TargetConfig::from_hf(&hf).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{key}: {error}");
        assert!(error.to_string().contains(wanted), "{key}: {error}");
        assert!(error.hint().is_some());
    }
    // What changes nothing is no reason.
    for key in
        [r#""n_shared_experts": 0"#, r#""n_group": 1"#, r#""scoring_func": "softmax""#, r#""n_group": null"#]
    {
        let text = config("qwen3_moe").replacen('{', &format!("{{ {key},"), 1);
        let hf = HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        assert!(TargetConfig::from_hf(&hf).is_ok(), "{key}");
    }
}

#[test]
fn older_configurations_count_experts_under_another_key() {
    let text = config("qwen3_moe").replace("num_local_experts", "num_experts");
    let hf = HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap();
    assert_eq!(TargetConfig::from_hf(&hf).unwrap().experts.unwrap().routing.experts, 8);
}

#[test]
fn what_a_configuration_of_experts_leaves_out_is_that_of_its_class() {
    let read = |text: &str| {
        TargetConfig::from_hf(&HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap()).unwrap()
    };
    let c = read(r#"{"model_type": "qwen3_moe"}"#);
    let e = c.experts.unwrap();
    assert_eq!((e.routing.experts, e.routing.used, e.width, e.routing.normalised), (128, 8, 768, false));
    assert_eq!((c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim), (2048, 24, 32, 4, 64));
    assert_eq!((c.intermediate_size, c.vocab_size, c.rope_theta), (6144, 151_936, 10_000.0));
    assert!(e.layers.iter().all(|l| *l) && c.windows.iter().all(Option::is_none));
    let c = read(r#"{"model_type": "gpt_oss", "rope_parameters": {"rope_type": "default"}}"#);
    let e = c.experts.unwrap();
    assert_eq!((e.routing.experts, e.routing.used, e.width, e.routing.normalised), (128, 4, 2880, true));
    assert_eq!((c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim), (2880, 36, 64, 8, 64));
    assert_eq!((c.vocab_size, c.rope_theta, c.max_position), (201_088, 150_000.0, 131_072));
    assert_eq!(c.windows[..4], [Some(128), None, Some(128), None]);
    assert!(c.sinks && c.o_bias && c.qkv_bias);
    // Without a table RoPE is scaled as that of the published models.
    let table = r#"{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096}"#;
    let told = read(&format!(r#"{{"model_type": "gpt_oss", "rope_scaling": {table}}}"#));
    assert!(read(r#"{"model_type": "gpt_oss"}"#).rope == told.rope && told.rope != c.rope);
}

/// A GGUF file with the number behind a key replaced.
fn with_number(name: &str, key: &str, value: u32) -> tempfile::TempDir {
    let mut bytes = std::fs::read(fixture(name).join("model.gguf")).unwrap();
    let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len();
    // Behind the key stand its type, an unsigned 32-bit number, and the number.
    assert_eq!(bytes[at..at + 4], 4u32.to_le_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&value.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.gguf"), bytes).unwrap();
    dir
}

#[test]
fn counts_in_gguf_files_that_contradict_the_tensors_are_refused() {
    for (name, key, value, wanted) in [
        ("qwen3_moe", "qwen3moe.expert_count", 9, "expected [9, 32]"),
        ("qwen3_moe", "qwen3moe.expert_count", 4, "expected [4, 32]"),
        ("qwen3_moe", "qwen3moe.expert_count", 0, "0 experts"),
        ("qwen3_moe", "qwen3moe.expert_used_count", 9, "9 of 8 experts"),
        ("qwen3_moe", "qwen3moe.expert_used_count", 0, "0 of 8 experts"),
        ("qwen3_moe", "qwen3moe.expert_feed_forward_length", 64, "expected [8, 64, 32]"),
        ("gpt_oss_mxfp4", "gpt-oss.expert_count", 16, "expected [16, 32]"),
        ("gpt_oss_mxfp4", "gpt-oss.expert_used_count", 17, "17 of 8 experts"),
    ] {
        refused(&with_number(name, key, value).path().join("model.gguf"), wanted);
    }
}

#[test]
fn routers_of_other_families_in_gguf_files_are_refused_by_name() {
    // Keys of the same length and type in place of one that is not needed.
    for (to, value, wanted) in [
        ("qwen3moe.expert_group_count", 4, "experts chosen by groups (`qwen3moe.expert_group_count`)"),
        ("qwen3moe.expert_gating_func", 2, "scores by sigmoid (`qwen3moe.expert_gating_func`)"),
        ("qwen3moe.expert_shared_count", 1, "shared experts (`qwen3moe.expert_shared_count`)"),
    ] {
        let from = "qwen3moe.attention.value_length";
        let mut bytes = std::fs::read(fixture("qwen3_moe/model.gguf")).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        // A shorter key moves what follows; the tensors begin at the next multiple of 32.
        let old_end = header_end(&bytes);
        let key = [
            (to.len() as u64).to_le_bytes().as_slice(),
            to.as_bytes(),
            &4u32.to_le_bytes(),
            &u32::to_le_bytes(value),
        ]
        .concat();
        let body = bytes.split_off(old_end);
        bytes.splice(at - 8..at + from.len() + 8, key);
        let padding = (32 - bytes.len() % 32) % 32;
        bytes.extend(vec![0; padding]);
        bytes.extend(body);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        refused(&path, wanted);
    }
}

/// Where the tensors of a GGUF file begin, padding included; the bytes before the last padding are part of no tensor.
fn header_end(bytes: &[u8]) -> usize {
    use draftsmith_formats::gguf::GgufFile;
    let file = GgufFile::parse(bytes).unwrap();
    let first = file.tensors().iter().map(|t| file.data(t).as_ptr().addr()).min().unwrap();
    first - bytes.as_ptr().addr()
}
