//! Models that cannot be used, and drafts of another target: one `error:` line, one `hint:`, exit code 2.

use std::path::{Path, PathBuf};

use draftsmith::bundle::{Manifest, TargetInfo};
use draftsmith::core::VocabMap;
use draftsmith::model::eagle3::Eagle3Config;
use draftsmith::train::DraftWeights;
use draftsmith::train::eagle3::random_weights;
use insta::assert_snapshot;

use crate::support::{Home, repository, tiny_target};

fn fixture(name: &str) -> PathBuf {
    repository().join("fixtures").join(name)
}

/// What `generate` says about these bytes as a GGUF file.
fn gguf(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = std::fs::read(fixture("gguf/llama-f32.gguf")).unwrap();
    change(&mut bytes);
    let home = Home::new();
    home.write("m.gguf", bytes);
    let text = home.snapshot(&["generate", "--target", "m.gguf", "--prompt-ids", "1"]);
    assert!(text.contains("exit: 2"), "{text}");
    text
}

/// Place of a tensor's description: right behind its name.
fn behind_name(bytes: &[u8], name: &str) -> usize {
    let mut wanted = (name.len() as u64).to_le_bytes().to_vec();
    wanted.extend_from_slice(name.as_bytes());
    bytes.windows(wanted.len()).position(|w| w == wanted).expect("the tensor is in the file") + wanted.len()
}

#[test]
fn a_gguf_with_a_bad_magic_is_refused() {
    assert_snapshot!(gguf(|b| b[..4].copy_from_slice(b"GGML")));
}

#[test]
fn a_gguf_that_ends_in_its_head_is_refused() {
    assert_snapshot!(gguf(|b| b.truncate(200)));
}

#[test]
fn a_gguf_that_ends_in_its_weights_is_refused() {
    assert_snapshot!(gguf(|b| b.truncate(b.len() - 100)));
}

#[test]
fn a_gguf_with_an_absurd_count_of_tensors_is_refused() {
    assert_snapshot!(gguf(|b| b[8..16].copy_from_slice(&(1u64 << 60).to_le_bytes())));
}

#[test]
fn a_gguf_with_an_absurd_count_of_keys_is_refused() {
    assert_snapshot!(gguf(|b| b[16..24].copy_from_slice(&u64::MAX.to_le_bytes())));
}

#[test]
fn a_gguf_whose_shape_overflows_is_refused() {
    assert_snapshot!(gguf(|b| {
        let at = behind_name(b, "blk.0.ffn_up.weight") + 4;
        b[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    }));
}

#[test]
fn a_gguf_whose_offset_is_past_the_end_is_refused() {
    assert_snapshot!(gguf(|b| {
        // Number of dimensions, two dimensions, type; then the offset.
        let at = behind_name(b, "blk.0.ffn_up.weight") + 4 + 16 + 4;
        b[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    }));
}

#[test]
fn a_gguf_of_an_unknown_architecture_is_refused() {
    assert_snapshot!(gguf(|b| {
        let text = String::from_utf8_lossy(b).into_owned();
        assert!(text.contains("llama"));
        for at in 0..b.len() - 5 {
            if &b[at..at + 5] == b"llama" {
                b[at..at + 5].copy_from_slice(b"mamba");
            }
        }
    }));
}

/// A copy of the tiny target with one file changed.
fn folder(file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let home = Home::new();
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        home.write(&format!("m/{name}"), std::fs::read(fixture("tiny-target").join(name)).unwrap());
    }
    let bytes = std::fs::read(home.path().join("m").join(file)).unwrap();
    home.write(&format!("m/{file}"), change(bytes));
    let text = home.snapshot(&["generate", "--target", "m", "--prompt-ids", "1"]);
    assert!(text.contains("exit: 2"), "{text}");
    text
}

/// Changes the JSON head of a safetensors file.
fn head(bytes: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut value: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    change(&mut value);
    let text = serde_json::to_vec(&value).unwrap();
    [&(text.len() as u64).to_le_bytes(), text.as_slice(), &bytes[8 + len..]].concat()
}

const TENSOR: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn safetensors_with_an_absurd_head_are_refused() {
    assert_snapshot!(folder("model.safetensors", |mut b| {
        b[..8].copy_from_slice(&(1u64 << 50).to_le_bytes());
        b
    }));
}

#[test]
fn safetensors_that_end_early_are_refused() {
    assert_snapshot!(folder("model.safetensors", |mut b| {
        b.truncate(b.len() / 2);
        b
    }));
}

#[test]
fn safetensors_with_offsets_past_the_end_are_refused() {
    assert_snapshot!(folder("model.safetensors", |b| head(&b, |v| {
        v[TENSOR]["data_offsets"] = serde_json::json!([1u64 << 40, (1u64 << 40) + 81920]);
    })));
}

#[test]
fn safetensors_whose_shape_overflows_are_refused() {
    assert_snapshot!(folder("model.safetensors", |b| head(&b, |v| {
        v[TENSOR]["shape"] = serde_json::json!([u64::MAX / 2, 128]);
    })));
}

#[test]
fn safetensors_with_a_missing_tensor_are_refused() {
    assert_snapshot!(folder("model.safetensors", |b| head(&b, |v| {
        let tensors = v.as_object_mut().unwrap();
        let tensor = tensors.remove(TENSOR).unwrap();
        tensors.insert("model.layers.0.mlp.op_proj.weight".to_string(), tensor);
    })));
}

#[test]
fn a_folder_of_an_unknown_architecture_is_refused() {
    assert_snapshot!(folder("config.json", |b| {
        String::from_utf8(b)
            .unwrap()
            .replace("LlamaForCausalLM", "MambaForCausalLM")
            .replace("\"llama\"", "\"mamba\"")
            .into_bytes()
    }));
}

#[test]
fn a_folder_without_a_tokenizer_is_refused() {
    let home = Home::new();
    for name in ["config.json", "model.safetensors", "tokenizer_config.json"] {
        home.write(&format!("m/{name}"), std::fs::read(fixture("tiny-target").join(name)).unwrap());
    }
    assert_snapshot!(home.snapshot(&["generate", "--target", "m", "--prompt", "a"]));
}

/// An untrained draft folder for the tiny target with some numbers changed.
fn draft(folder: &Path, change: impl FnOnce(&mut Eagle3Config)) {
    let target = tiny_target();
    let mut config = Eagle3Config::for_target(target.target.config(), 64);
    change(&mut config);
    let ids: Vec<u32> = (0..config.draft_vocab_size as u32).collect();
    let weights = DraftWeights {
        method: "eagle3",
        config: config.to_value().unwrap(),
        tensors: random_weights(&config, 1),
        vocab_map: Some(VocabMap::from_target_ids(&ids, config.vocab_size).unwrap()),
    };
    weights.save(folder).unwrap();
}

fn generate_with(home: &Home) -> String {
    let target = fixture("tiny-target").display().to_string();
    home.snapshot(&["generate", "--target", &target, "--bundle", "draft", "--prompt", "a"])
}

#[test]
fn a_draft_of_another_width_is_refused() {
    let home = Home::new();
    draft(&home.path().join("draft"), |c| c.target_hidden_size = 64);
    assert_snapshot!(generate_with(&home));
}

#[test]
fn a_draft_of_another_vocabulary_is_refused() {
    let home = Home::new();
    draft(&home.path().join("draft"), |c| c.vocab_size = 2000);
    assert_snapshot!(generate_with(&home));
}

#[test]
fn a_bundle_made_with_another_template_is_refused() {
    let home = Home::new();
    draft(&home.path().join("draft"), |_| {});
    let target = tiny_target().info();
    let manifest = Manifest {
        format: draftsmith::bundle::BUNDLE_FORMAT.to_string(),
        version: draftsmith::bundle::BUNDLE_VERSION,
        name: "other".to_string(),
        method: "eagle3".to_string(),
        created_unix_s: 0,
        draftsmith_version: "0.1.0".to_string(),
        license: "MIT".to_string(),
        target: TargetInfo { template_sha256: "0".repeat(64), ..target },
        draft: Default::default(),
        training: Default::default(),
        imported: None,
        recommended: draftsmith::bundle::Recommended::chain(5, ""),
        files: Vec::new(),
    };
    home.write("draft/bundle.json", manifest.to_json().unwrap());
    assert_snapshot!(generate_with(&home));
}

#[test]
fn a_bundle_that_is_none_is_refused() {
    let home = Home::new();
    assert_snapshot!(generate_with(&home));
    home.write("draft/readme.txt", "x");
    assert_snapshot!(generate_with(&home));
    assert_snapshot!(home.snapshot(&["bundle", "check", "draft"]));
    assert_snapshot!(home.snapshot(&["bench", "--bundle", "draft", "--workload", "none.jsonl"]));
    home.write("w.jsonl", "{\"id\": \"a\", \"turns\": [\"b\"]}\n");
    assert_snapshot!(home.snapshot(&["bench", "--bundle", "draft", "--workload", "w.jsonl"]));
}

#[test]
fn tuning_measures_every_setting_at_every_load_and_changes_no_text() {
    let home = Home::new();
    draft(&home.path().join("draft"), |_| {});
    home.write(
        "w.jsonl",
        "{\"id\": \"a\", \"turns\": [\"Calculate 22 + 20.\"]}\n{\"id\": \"b\", \"turns\": [\"Why?\"]}\n",
    );
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let tuned = home
        .run(&[
            "bench",
            "tune",
            "--bundle",
            "draft",
            "--target",
            &tiny,
            "--workload",
            "w.jsonl",
            "--max-new-tokens",
            "8",
            "--sequences",
            "1,2",
            "--json",
        ])
        .json();
    let loads = tuned["loads"].as_array().unwrap();
    assert_eq!(loads.iter().map(|l| l["sequences"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
    for load in loads {
        let settings = load["settings"].as_array().unwrap();
        assert_eq!(settings.len(), 9, "plain and eight ways to draft");
        assert!(settings.iter().all(|s| s["identical"] == true), "{load}");
        assert!(settings.iter().any(|s| s["name"] == load["best"]), "{load}");
        assert!(
            settings[1..].iter().all(|s| s["speedup"]["value"].as_f64().is_some_and(|v| v > 0.0)),
            "{load}"
        );
    }
}

#[test]
fn drafts_are_compared_on_the_same_prompts_and_none_changes_a_text() {
    let home = Home::new();
    draft(&home.path().join("a/draft"), |_| {});
    draft(&home.path().join("b/draft"), |_| {});
    let long = "why ".repeat(2000);
    home.write(
        "w.jsonl",
        format!("{{\"id\": \"a\", \"turns\": [\"Calculate 22 + 20.\"]}}\n{{\"id\": \"b\", \"turns\": [\"Why?\"]}}\n{{\"id\": \"c\", \"turns\": [\"{long}\"]}}\n"),
    );
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let args = ["bench", "compare", "--target", &tiny, "--bundle", "a/draft", "--bundle", "b/draft"];
    let more = ["--draft-model", &tiny, "--workload", "w.jsonl", "--max-new-tokens", "8", "--depth", "3"];
    let ended = home.run(&[&args[..], &more, &["--json", "out.json", "--markdown", "out.md"]].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("row `c` of `w` is left out"), "{}", ended.stderr);
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap();
    let found: serde_json::Value = serde_json::from_str(&read("out.json")).unwrap();
    let names: Vec<_> = found["drafts"].as_array().unwrap().iter().map(|d| d["name"].as_str()).collect();
    assert!(names.iter().any(|n| n.is_some_and(|n| n.contains("(a/draft)"))), "{names:?}");
    assert!(found["drafts"][0]["weights_bytes"].is_null() || found["drafts"][0]["weights_bytes"].is_u64());
    assert_eq!(found["sides"].as_array().unwrap().len(), 7, "three drafts twice, and repetitions");
    let samples = found["workloads"][0]["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2);
    for prompt in samples {
        let sides = prompt.as_array().unwrap();
        assert!(sides.len() == 8 && sides.iter().all(|s| s["identical"] == true), "{prompt}");
        // The target drafts for itself: every step commits a whole proposal and one more.
        let (steps, tokens) =
            (sides[5]["verify_steps"].as_u64().unwrap(), sides[5]["tokens"].as_u64().unwrap());
        assert_eq!(steps, tokens.div_ceil(4), "{prompt}");
    }
    let page = read("out.md");
    assert!(
        page.contains("| w | repetitions alone |") && ended.stdout.contains("repetitions alone"),
        "{page}"
    );
    let bad = home.run(&["bench", "compare", "--workload", "w.jsonl"]);
    assert!(bad.code == Some(2) && bad.stderr.contains("--bundle <BUNDLE>"), "{}", bad.stderr);
}
