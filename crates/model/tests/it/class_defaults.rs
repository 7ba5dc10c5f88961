//! Configurations that leave keys out mean what transformers' configuration classes make of them.

use std::path::{Path, PathBuf};

use draftsmith_formats::gguf::{GgmlType, GgufFile, GgufValue, GgufWriter};
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

/// The table turns its pairs by these frequencies and leaves the rest of a head alone.
#[track_caller]
fn turns_like(table: &RopeTable, wanted: &Value, name: &str) {
    let factor = wanted["factor"].as_f64().unwrap();
    let values: Vec<f64> = wanted["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for position in [1u32, 7, 300] {
        let (cos, sin) = table.angles(position);
        for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let (factor, angle) = match values.get(i) {
                Some(v) => (factor, v * f64::from(position)),
                None => (1.0, 0.0),
            };
            let (c, s) = (factor * angle.cos(), factor * angle.sin());
            // Frequencies are computed in f32 there.
            let close = |found: f32, wanted: f64| (f64::from(found) - wanted).abs() < 1e-4;
            assert!(close(*cos, c) && close(*sin, s), "{name}: pair {i} at {position}");
        }
    }
}

#[test]
fn targets_have_the_defaults_of_their_class() {
    let cases = cases("targets");
    assert!(cases.len() > 80);
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
        assert!((found.attention_scale / scale - 1.0).abs() < 1e-6, "{name}: attention scale");
        let activation = match want["activation"].as_str().unwrap() {
            "silu" => Activation::Silu,
            _ => Activation::GeluTanh,
        };
        assert_eq!(found.activation, activation, "{name}: activation");
        let windows: Vec<Option<usize>> =
            want["windows"].as_array().unwrap().iter().map(|w| w.as_u64().map(|w| w as usize)).collect();
        assert_eq!(found.windows, windows, "{name}: windows");
        assert_eq!(f64::from(found.rope_theta), want["rope"]["rope_theta"].as_f64().unwrap(), "{name}: base");
        assert_eq!(found.rotary_dim, size("rotary_dim"), "{name}: values that are turned");
        match want["rope"]["rope_type"].as_str().unwrap() {
            "yarn" | "longrope" => {}
            _ => {
                assert_eq!(found.rope_scaling, scaling(&want["rope"]), "{name}: RoPE scaling");
                let wanted = table(&want["rope"], found.rotary_dim);
                if found.rotary_dim == found.head_dim {
                    assert_eq!(angles(&found.rope), angles(&wanted), "{name}: RoPE");
                }
            }
        }
        if want["frequencies"].is_object() {
            turns_like(&found.rope, &want["frequencies"], name);
        }
        let (from, long) = found.rope_long.as_ref().map(|(from, table)| (*from, table)).unzip();
        assert_eq!(from.map(|n| n as u64), want["long_from"].as_u64(), "{name}: where LongRoPE begins");
        if let Some(long) = long {
            turns_like(long, &want["long"], name);
        }
        let turns: Vec<bool> =
            want["turns"].as_array().unwrap().iter().map(|t| t.as_bool().unwrap()).collect();
        assert_eq!(found.turns, turns, "{name}: layers with RoPE");
        let float = |value: &Value| value.as_f64().map(|x| x as f32);
        let caps = [found.attention_softcap, found.final_softcap];
        assert_eq!(caps, [0, 1].map(|i| float(&want["softcaps"][i])), "{name}: caps");
        let factors = [found.residual_scale, found.logit_divisor].map(Some);
        assert_eq!(factors, [0, 1].map(|i| float(&want["multipliers"][i])), "{name}: multipliers");
        assert_eq!(Some(found.embed_scale), float(&want["embed_scale"]), "{name}: embeddings");
        let biases = [found.qkv_bias, found.o_bias, found.mlp_bias];
        assert_eq!(biases, [0, 1, 2].map(|i| want["biases"][i] == true), "{name}: biases");
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
    refused(r#"{"model_type": "phi"}"#, "architecture `phi`", "gemma3");
    refused(r#"{}"#, "has no key `model_type`", "`model_type`");
    refused(
        &format!(r#"{{"model_type": "llama", {small}, "rope_scaling": {{"type": "dynamic", "factor": 4}}}}"#),
        "RoPE scaling `dynamic`",
        "choose another model",
    );
    refused(
        &format!(
            r#"{{"model_type": "llama", {small}, "rope_parameters": {{"rope_type": "default", "partial_rotary_factor": 0.5}}}}"#
        ),
        "`partial_rotary_factor` 0.5",
        "choose another model",
    );
    for (family, keys, what) in [
        ("mistral", r#""attention_bias": true"#, "`attention_bias`"),
        ("qwen2", r#""mlp_bias": true"#, "`mlp_bias`"),
        ("phi3", r#""attention_bias": true"#, "`attention_bias`"),
        ("phi3", r#""rope_scaling": {"type": "linear2"}"#, "RoPE scaling `linear2`"),
        ("qwen2", r#""rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}"#, "RoPE scaling `mrope`"),
        ("qwen3", r#""rope_scaling": {"type": "su", "factor": 2.0}"#, "RoPE scaling `su`"),
        ("gemma2", r#""use_bidirectional_attention": true"#, "`use_bidirectional_attention`"),
        ("gemma2", r#""hidden_activation": "gelu""#, "activation `gelu`"),
        ("granite", r#""hidden_act": "relu""#, "activation `relu`"),
        ("llama", r#""kv_lora_rank": 512"#, "`kv_lora_rank`"),
        ("llama", r#""num_local_experts": 8"#, "`num_local_experts`"),
        ("llama", r#""residual_multiplier": 0.2"#, "`residual_multiplier`"),
        ("olmo2", r#""clip_qkv": 8.0"#, "`clip_qkv`"),
        ("olmo2", r#""partial_rotary_factor": 0.5"#, "`partial_rotary_factor` 0.5"),
        ("qwen3", r#""final_logit_softcapping": 30.0"#, "`final_logit_softcapping`"),
        (
            "smollm3",
            r#""layer_types": ["full_attention", "chunked_attention", "full_attention", "full_attention"]"#,
            "layers of type `chunked_attention`",
        ),
    ] {
        refused(&format!(r#"{{"model_type": "{family}", {small}, {keys}}}"#), what, "choose another model");
    }
    for (family, keys, what) in [
        ("smollm3", r#""no_rope_layers": [1, 0]"#, "`no_rope_layers` has 2 entries for 4 layers"),
        ("smollm3", r#""no_rope_layer_interval": 0"#, "`no_rope_layer_interval` is 0"),
        ("granite", r#""logits_scaling": 0.0"#, "`logits_scaling` is 0"),
        ("gemma2", r#""attn_logit_softcapping": -1.0"#, "`attn_logit_softcapping` is -1"),
        (
            "glm4",
            r#""partial_rotary_factor": 0.01"#,
            "`partial_rotary_factor` 0.01 turns 1 of the 128 values",
        ),
        (
            "phi3",
            r#""rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}"#,
            "`short_factor` has 1 entries for 8 frequencies",
        ),
    ] {
        refused(&format!(r#"{{"model_type": "{family}", {small}, {keys}}}"#), what, "another copy");
    }
    refused(
        &format!(r#"{{"model_type": "phi3", {small}, "rope_scaling": {{"type": "longrope"}}}}"#),
        "has no key `rope_scaling.short_factor`",
        "`rope_scaling.short_factor`",
    );
    // Neutral values change nothing, and `null` is none.
    for keys in
        [r#""clip_qkv": null"#, r#""num_experts": 0"#, r#""residual_multiplier": 1.0"#, r#""alibi": false"#]
    {
        let config = format!(r#"{{"model_type": "llama", {small}, {keys}}}"#);
        let hf = HfConfig::parse(Path::new("m/config.json"), config.as_bytes()).unwrap();
        TargetConfig::from_hf(&hf).unwrap();
    }
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

/// Metadata of a small model with these keys besides.
fn gguf(arch: &str, keys: &[(&str, GgufValue)]) -> Vec<u8> {
    let table = [0u8; 4 * 16 * 8];
    let freqs = [0u8; 4 * 2];
    let mut file = GgufWriter::new();
    file.set("general.architecture", GgufValue::Str(arch.to_owned()));
    for (key, value) in [
        ("embedding_length", 16),
        ("block_count", 4),
        ("feed_forward_length", 24),
        ("attention.head_count", 2),
    ] {
        file.set(format!("{arch}.{key}"), GgufValue::U32(value));
    }
    file.set(format!("{arch}.attention.layer_norm_rms_epsilon"), GgufValue::F32(1e-5));
    for (key, value) in keys {
        match key.strip_prefix("tensor ") {
            Some(name) => file.tensor(name, &[2], GgmlType::F32, &freqs),
            None => file.set(format!("{arch}.{key}"), value.clone()),
        };
    }
    file.tensor("token_embd.weight", &[16, 8], GgmlType::F32, &table);
    file.to_bytes()
}

#[test]
fn metadata_that_changes_results_is_read_or_refused_by_name() {
    let float = GgufValue::F32;
    let int = GgufValue::U32;
    let text = |t: &str| GgufValue::Str(t.to_owned());
    for (arch, keys, what) in [
        ("phi2", vec![], "architecture `phi2`"),
        ("llama", vec![("expert_count", int(8))], "mixture of experts"),
        ("llama", vec![("attn_logit_softcapping", float(50.0))], "`llama.attn_logit_softcapping`"),
        ("llama", vec![("logit_scale", float(0.1))], "`llama.logit_scale`"),
        ("qwen3", vec![("attention.causal", GgufValue::Bool(false))], "`qwen3.attention.causal`"),
        ("qwen2", vec![("attention.sliding_window", int(16))], "sliding-window layers"),
        ("olmo2", vec![("attention.sliding_window", int(16))], "sliding-window layers"),
        ("olmo2", vec![("attention.clamp_kqv", float(8.0))], "`olmo2.attention.clamp_kqv`"),
        ("glm4", vec![("nextn_predict_layers", int(1))], "`glm4.nextn_predict_layers`"),
        ("qwen2", vec![("rope.dimension_count", int(4))], "RoPE on 4 of 8 values"),
        ("llama", vec![("rope.scaling.type", text("dynamic"))], "RoPE scaling `dynamic`"),
        ("llama", vec![("rope.scaling.type", text("longrope"))], "RoPE scaling `longrope`"),
        (
            "llama",
            vec![
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", float(4.0)),
                ("rope.scaling.yarn_log_multiplier", float(0.1)),
            ],
            "`llama.rope.scaling.yarn_log_multiplier`",
        ),
        (
            "llama",
            vec![("attention.key_length", int(8)), ("attention.value_length", int(4))],
            "values of 4 beside keys of 8",
        ),
        ("glm4", vec![("rope.dimension_count", int(3))], "RoPE turns 3 of the 8 values"),
        (
            "phi3",
            vec![("rope.dimension_count", int(4)), ("tensor rope_factors_long.weight", int(0))],
            "one is missing",
        ),
        ("phi3", vec![("tensor rope_freqs.weight", int(0))], "`rope_freqs.weight` does not match"),
        ("granite", vec![("logit_scale", float(-1.0))], "`logit_scale` is -1"),
        (
            "gemma2",
            vec![("final_logit_softcapping", float(f32::NAN))],
            "`gemma2.final_logit_softcapping` is NaN",
        ),
    ] {
        let bytes = gguf(arch, &keys);
        let error = TargetConfig::from_gguf(&GgufFile::parse(&bytes).unwrap()).unwrap_err();
        assert!(error.to_string().contains(what), "{arch} {keys:?}: {error}");
        assert!(error.hint().is_some(), "{error}");
    }
    let read = |arch: &str, keys: &[(&str, GgufValue)]| {
        let bytes = gguf(arch, keys);
        TargetConfig::from_gguf(&GgufFile::parse(&bytes).unwrap()).unwrap()
    };
    // A factor without a type is linear, also by its oldest name; neutral values are none.
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        let found = read("llama", &[(key, float(4.0))]);
        assert_eq!(found.rope_scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!(read("llama", &[(key, float(1.0))]).rope_scaling, RopeScaling::None);
    }
    assert_eq!(read("llama", &[("attention.sliding_window", int(6))]).windows, [Some(6); 4]);
    assert_eq!(read("llama", &[("attention.sliding_window", int(0))]).windows, [None; 4]);
    assert_eq!(read("qwen2", &[("attention.causal", GgufValue::Bool(true))]).windows, [None; 4]);
    let gemma = read("gemma2", &[]);
    assert_eq!(gemma.windows, [Some(4096), None, Some(4096), None]);
    assert_eq!([gemma.attention_softcap, gemma.final_softcap], [Some(50.0), Some(30.0)]);
    assert_eq!(read("smollm3", &[]).turns, [true, true, true, false]);
    let granite = read("granite", &[("residual_scale", float(0.5)), ("attention.scale", float(0.25))]);
    assert_eq!((granite.residual_scale, granite.attention_scale), (0.5, 0.25));
    // Gemma 2 27B divides by the hidden size per head.
    let large = [("block_count", int(46)), ("attention.key_length", int(4))];
    assert_eq!(read("gemma2", &large).attention_scale, 1.0 / 8f32.sqrt());
    assert_eq!(read("gemma2", &large[1..]).attention_scale, 0.5);
}
