//! Configurations that leave keys out mean what transformers' configuration classes make of them.

use std::path::{Path, PathBuf};

use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::{Activation, RopeScaling, RopeTable};
use draftsmith_model::TargetConfig;
use draftsmith_model::eagle3::Eagle3Config;
use serde_json::Value;

fn cases(of: &str) -> Vec<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/class-defaults/cases.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    all[of].as_array().unwrap().clone()
}

fn scaling(rope: &Value) -> RopeScaling {
    let float = |key: &str| rope[key].as_f64().unwrap() as f32;
    match rope["rope_type"].as_str().unwrap() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: float("factor") },
        "llama3" => RopeScaling::Llama3 {
            factor: float("factor"),
            low_freq_factor: float("low_freq_factor"),
            high_freq_factor: float("high_freq_factor"),
            original_max_position: rope["original_max_position_embeddings"].as_u64().unwrap() as u32,
        },
        other => panic!("{other}"),
    }
}

fn table(rope: &Value, head_dim: usize) -> RopeTable {
    RopeTable::new(head_dim, rope["rope_theta"].as_f64().unwrap() as f32, &scaling(rope))
}

/// Angles of a few positions: two tables that agree there are the same table.
fn angles(table: &RopeTable) -> Vec<f32> {
    [1u32, 7, 300]
        .iter()
        .flat_map(|p| {
            let (c, s) = table.angles(*p);
            [c.to_vec(), s.to_vec()].concat()
        })
        .collect()
}

#[test]
fn targets_have_the_defaults_of_their_class() {
    let cases = cases("targets");
    assert!(cases.len() > 40);
    for case in &cases {
        let (name, want) = (case["name"].as_str().unwrap(), &case["expected"]);
        let text = case["config"].to_string();
        let hf = HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        let found = TargetConfig::from_hf(&hf).unwrap_or_else(|e| panic!("{name}: {e}"));
        let size = |key: &str| want[key].as_u64().unwrap() as usize;
        for (key, found) in [
            ("vocab_size", found.vocab_size),
            ("hidden_size", found.hidden_size),
            ("intermediate_size", found.intermediate_size),
            ("num_hidden_layers", found.num_layers),
            ("num_attention_heads", found.num_heads),
            ("num_key_value_heads", found.num_kv_heads),
            ("head_dim", found.head_dim),
            ("max_position_embeddings", found.max_position),
        ] {
            assert_eq!(found, size(key), "{name}: {key}");
        }
        assert_eq!(found.rms_norm_eps, want["rms_norm_eps"].as_f64().unwrap() as f32, "{name}: epsilon");
        assert_eq!(found.tied, want["tie_word_embeddings"], "{name}: tied");
        let scale = 1.0 / (want["query_scale"].as_f64().unwrap() as f32).sqrt();
        assert_eq!(found.attention_scale, scale, "{name}: attention scale");
        let activation = match want["activation"].as_str().unwrap() {
            "silu" => Activation::Silu,
            _ => Activation::GeluTanh,
        };
        assert_eq!(found.activation, activation, "{name}: activation");
        let windows: Vec<Option<usize>> =
            want["windows"].as_array().unwrap().iter().map(|w| w.as_u64().map(|w| w as usize)).collect();
        assert_eq!(found.windows, windows, "{name}: windows");
        assert_eq!(found.rope_scaling, scaling(&want["rope"]), "{name}: RoPE scaling");
        assert_eq!(f64::from(found.rope_theta), want["rope"]["rope_theta"].as_f64().unwrap(), "{name}: base");
        assert_eq!(angles(&found.rope), angles(&table(&want["rope"], found.head_dim)), "{name}: RoPE");
        let local = found.rope_local.as_deref().map(angles);
        let wanted = want.get("rope_local").filter(|r| r.is_object());
        assert_eq!(local, wanted.map(|r| angles(&table(r, found.head_dim))), "{name}: RoPE of windows");
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        assert_eq!(found.eos_ids, ids(&want["eos_token_ids"]), "{name}: ends");
        assert_eq!(found.bos_id.map(u64::from), want["bos_token_id"].as_u64(), "{name}: begin");
        assert!(want["model_type"].as_str().unwrap().starts_with(found.family.name()), "{name}: family");
    }
}

#[test]
fn drafts_have_the_defaults_of_their_layer() {
    for case in &cases("drafts") {
        let (name, want) = (case["name"].as_str().unwrap(), &case["expected"]);
        let found = Eagle3Config::from_value(&case["config"]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let size = |key: &str| want[key].as_u64().unwrap() as usize;
        for (key, found) in [
            ("vocab_size", found.vocab_size),
            ("vocab_size", found.draft_vocab_size),
            ("hidden_size", found.hidden_size),
            ("hidden_size", found.target_hidden_size),
            ("intermediate_size", found.intermediate_size),
            ("num_attention_heads", found.num_attention_heads),
            ("num_key_value_heads", found.num_key_value_heads),
            ("head_dim", found.head_dim),
            ("max_position_embeddings", found.max_position_embeddings),
        ] {
            assert_eq!(found, size(key), "{name}: {key}");
        }
        for (key, found) in
            [("rms_norm_eps", found.rms_norm_eps), ("initializer_range", found.initializer_range)]
        {
            assert_eq!(found, want[key].as_f64().unwrap() as f32, "{name}: {key}");
        }
        assert_eq!(f64::from(found.rope_theta), want["rope"]["rope_theta"].as_f64().unwrap(), "{name}: base");
        assert_eq!(found.rope_scaling, scaling(&want["rope"]), "{name}: RoPE scaling");
    }
}

#[track_caller]
fn refused(config: &str, message: &str, hint: &str) {
    let hf = HfConfig::parse(Path::new("m/config.json"), config.as_bytes()).unwrap();
    let error = TargetConfig::from_hf(&hf).unwrap_err();
    assert!(error.to_string().contains(message), "{config}: {error}");
    assert!(error.hint().unwrap_or_default().contains(hint), "{config}: {:?}", error.hint());
}

#[test]
fn what_is_not_built_is_named_with_a_way_out() {
    let small = r#""hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4"#;
    refused(r#"{"model_type": "phi3"}"#, "architecture `phi3`", "gemma3 (text)");
    refused(r#"{}"#, "has no key `model_type`", "`model_type`");
    refused(
        &format!(r#"{{"model_type": "llama", {small}, "rope_scaling": {{"type": "yarn", "factor": 4}}}}"#),
        "RoPE scaling `yarn`",
        "choose another model",
    );
    refused(
        &format!(
            r#"{{"model_type": "llama", {small}, "rope_parameters": {{"rope_type": "default", "partial_rotary_factor": 0.5}}}}"#
        ),
        "`partial_rotary_factor` 0.5",
        "choose another model",
    );
    refused(
        &format!(r#"{{"model_type": "gemma3_text", {small}, "layer_types": ["full_attention"]}}"#),
        "`layer_types` has 1 entries for 4 layers",
        "another copy",
    );
    refused(
        r#"{"model_type": "llama", "hidden_size": "64"}"#,
        "`hidden_size` = \"64\"",
        "set `hidden_size` to",
    );
    refused(
        &format!(r#"{{"model_type": "qwen2", {small}, "use_sliding_window": "yes"}}"#),
        "`use_sliding_window` = \"yes\"",
        "a boolean",
    );
}

#[test]
fn both_spellings_of_a_configuration_are_one_model() {
    let families = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/families");
    let mut seen = 0;
    for entry in std::fs::read_dir(families).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("config.v4.json").is_file() {
            continue;
        }
        let [new, old] = ["config.json", "config.v4.json"].map(|file| {
            let config = TargetConfig::from_hf(&HfConfig::open(folder.join(file)).unwrap()).unwrap();
            format!("{config:?}")
        });
        assert_eq!(new, old, "{}", folder.display());
        seen += 1;
    }
    assert!(seen >= 10);
}
