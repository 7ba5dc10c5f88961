//! Models and drafts as they are published: short configurations, split files, quantised folders, drafts whose
//! configuration leaves things open or is wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith::formats::gguf::{GgmlType, GgufValue, GgufWriter, SplitName, content_sha256};
use draftsmith::formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use draftsmith::model::rope_pairs_from_halves;
use draftsmith::target::gguf_tokenizer;
use serde_json::{Value, json};

use crate::bundles::{foreign_draft, target};
use crate::support::{Ended, Home, repository};

fn tiny() -> PathBuf {
    repository().join("fixtures/tiny-target")
}

#[track_caller]
fn refused(ended: &Ended, message: &str, hint: &str) {
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let errors = ended.stderr.lines().filter(|l| l.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", ended.stderr);
    let hints: Vec<&str> = ended.stderr.lines().filter_map(|l| l.strip_prefix("hint: ")).collect();
    assert!(ended.stderr.contains(message), "{}", ended.stderr);
    assert!(hints.len() == 1 && hints[0].contains(hint), "{}", ended.stderr);
}

/// The tiny target as a GGUF model in `count` parts.
fn split_target(folder: &Path, count: u32) -> Vec<PathBuf> {
    let open = SafetensorsDir::open(tiny()).unwrap();
    let mut tensors = Vec::new();
    for name in open.names() {
        let tensor = open.get(name).unwrap();
        let mut dims: Vec<usize> = tensor.shape.to_vec();
        dims.reverse();
        let parts: Vec<&str> = name.split('.').collect();
        let layer = |part: &str| format!("blk.{}.{part}.weight", parts[2]);
        let (gguf, rows_of) = match parts[parts.len() - 2] {
            "embed_tokens" => ("token_embd.weight".to_string(), None),
            "norm" => ("output_norm.weight".to_string(), None),
            "lm_head" => ("output.weight".to_string(), None),
            "input_layernorm" => (layer("attn_norm"), None),
            "post_attention_layernorm" => (layer("ffn_norm"), None),
            "q_proj" => (layer("attn_q"), Some(32)),
            "k_proj" => (layer("attn_k"), Some(32)),
            "v_proj" => (layer("attn_v"), None),
            "o_proj" => (layer("attn_output"), None),
            "gate_proj" => (layer("ffn_gate"), None),
            "up_proj" => (layer("ffn_up"), None),
            "down_proj" => (layer("ffn_down"), None),
            other => panic!("{other}"),
        };
        let values: Vec<u8> = match (dims.len(), rows_of) {
            (1, _) => tensor.to_f32().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            (_, Some(head_dim)) => rope_pairs_from_halves(tensor.bytes, dims[1], head_dim),
            (_, None) => tensor.bytes.to_vec(),
        };
        let kind = if dims.len() == 1 { GgmlType::F32 } else { GgmlType::BF16 };
        tensors.push((gguf, dims, kind, values));
    }
    let per_part = tensors.len().div_ceil(count as usize);
    let name = SplitName::parse(&format!("tiny-00001-of-{count:05}.gguf")).unwrap();
    let mut paths = Vec::new();
    for (no, chunk) in tensors.chunks(per_part).enumerate() {
        let mut w = GgufWriter::new();
        if no == 0 {
            w.set("general.architecture", GgufValue::Str("llama".into()));
            for (key, n) in [
                ("block_count", 8),
                ("context_length", 1024),
                ("embedding_length", 128),
                ("feed_forward_length", 320),
                ("attention.head_count", 4),
                ("attention.head_count_kv", 2),
                ("rope.dimension_count", 32),
            ] {
                w.set(format!("llama.{key}"), GgufValue::U32(n));
            }
            w.set("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(1e-5));
            w.set("llama.rope.freq_base", GgufValue::F32(10_000.0));
            for (key, value) in gguf_tokenizer(&tiny()).unwrap() {
                w.set(key, value);
            }
        }
        w.set("split.no", GgufValue::U16(no as u16));
        w.set("split.count", GgufValue::U16(count as u16));
        w.set("split.tensors.count", GgufValue::I32(tensors.len() as i32));
        for (name, dims, kind, values) in chunk {
            w.tensor(name.as_str(), dims, *kind, values);
        }
        let path = folder.join(name.part(no as u32 + 1));
        std::fs::create_dir_all(folder).unwrap();
        w.write(&path).unwrap();
        paths.push(path);
    }
    paths
}

const ASK: [&str; 4] = ["--prompt", "Calculate 22 + 20.", "--max-new-tokens", "8"];

fn generate(home: &Home, model: &str) -> Ended {
    home.run(&[&["generate", "-q", "--threads", "1", "--target", model], ASK.as_slice()].concat())
}

#[test]
fn a_split_model_answers_as_the_whole_one_from_any_part_and_from_its_folder() {
    let home = Home::new();
    let parts = split_target(&home.path().join("m"), 3);
    let whole = generate(&home, &tiny().display().to_string());
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let hash = content_sha256(&parts[0]).unwrap();
    for model in ["m/tiny-00001-of-00003.gguf", "m/tiny-00003-of-00003.gguf", "m"] {
        let answer = generate(&home, model);
        assert_eq!((answer.code, &answer.stdout), (Some(0), &whole.stdout), "{model}: {}", answer.stderr);
        let pulled = home.run(&["pull", "--json", "--sha256", &hash, model]).json();
        assert_eq!(pulled["path"], "m/tiny-00001-of-00003.gguf");
        assert_eq!(pulled["sha256"], hash);
        let bytes: u64 = parts.iter().map(|p| p.metadata().unwrap().len()).sum();
        assert_eq!(pulled["bytes"], bytes);
    }
    // As a tree: one model, whichever part is named; in its folder the first part holds it.
    for model in ["m/tiny-00001-of-00003.gguf", "m/tiny-00002-of-00003.gguf"] {
        let shown = home.run(&["inspect", "--json", model]).json();
        assert_eq!((shown["kind"].as_str(), shown["sha256"].as_str()), (Some("gguf"), Some(hash.as_str())));
        assert_eq!(shown["facts"]["general.architecture"], "llama");
        assert!(shown.to_string().contains("ffn_down"), "{shown}");
    }
    let shown = home.run(&["inspect", "--json", "m"]).json();
    let kinds: Vec<&str> =
        shown["children"].as_array().unwrap().iter().map(|c| c["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["gguf", "gguf part", "gguf part"]);
    assert_eq!(shown["bytes"], home.run(&["pull", "--json", "m"]).json()["bytes"]);

    // A bundle's origin names the whole.
    foreign_draft(&home, |_| {});
    let args =
        ["bundle", "import", "theirs", "--target", "m", "--out", "b", "--base-model", "org/tiny", "-q"];
    let made = home.run(&args);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let manifest = draftsmith::bundle::Manifest::read(home.path().join("b")).unwrap();
    assert_eq!((manifest.target.name.as_str(), manifest.target.weights_sha256), ("tiny", hash));
    let drafted = home.run(
        &[&["generate", "-q", "--threads", "1", "--target", "m", "--bundle", "b", "--prove"], ASK.as_slice()]
            .concat(),
    );
    assert_eq!(drafted.code, Some(0), "{}", drafted.stderr);
}

#[test]
fn splits_that_are_not_whole_say_which_part() {
    let home = Home::new();
    let parts = split_target(&home.path().join("m"), 3);
    std::fs::remove_file(&parts[1]).unwrap();
    for model in ["m/tiny-00001-of-00003.gguf", "m/tiny-00003-of-00003.gguf", "m"] {
        let ended = generate(&home, model);
        refused(
            &ended,
            "part 2 of 3 of the model is missing",
            "put `tiny-00002-of-00003.gguf` beside the other parts",
        );
    }
    std::fs::copy(&parts[2], &parts[1]).unwrap();
    refused(
        &generate(&home, "m"),
        "it is part 3 of 3 by its own words, but part 2 of 3 by its name",
        "one download",
    );
    let bytes = std::fs::read(&parts[2]).unwrap();
    split_target(&home.path().join("m"), 3);
    std::fs::write(&parts[2], &bytes[..bytes.len() / 2]).unwrap();
    refused(&generate(&home, "m"), "m/tiny-00003-of-00003.gguf`: tensor `", "download it again");
    let wrong = home.run(&["pull", "--sha256", &"0".repeat(64), "m/tiny-00001-of-00003.gguf"]);
    assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
}

/// The tiny target with its tensors and configuration changed.
fn folder(
    home: &Home,
    name: &str,
    config: impl FnOnce(&mut Value),
    change: impl Fn(&str, TensorData) -> Vec<TensorData>,
) -> String {
    for file in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        home.write(&format!("{name}/{file}"), std::fs::read(tiny().join(file)).unwrap());
    }
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(tiny().join("config.json")).unwrap()).unwrap();
    config(&mut value);
    home.write(&format!("{name}/config.json"), value.to_string());
    let open = SafetensorsDir::open(tiny()).unwrap();
    let tensors: Vec<TensorData> = open
        .names()
        .flat_map(|name| {
            let tensor = open.get(name).unwrap();
            let (dtype, shape, bytes) = (tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec());
            change(name, TensorData { name: name.into(), dtype, shape, bytes })
        })
        .collect();
    home.write(&format!("{name}/model.safetensors"), to_bytes(&tensors, &BTreeMap::new()));
    name.to_string()
}

fn added(base: &str, parts: &[(&str, Dtype, usize)]) -> Vec<TensorData> {
    let of = |(end, dtype, size): &(&str, Dtype, usize)| TensorData {
        name: format!("{base}{end}"),
        dtype: *dtype,
        shape: vec![4],
        bytes: vec![0; 4 * size],
    };
    parts.iter().map(of).collect()
}

/// Folder, `quantization_config`, tensors in place of a projection (ending, type, bytes per element), and how it is named.
type Case<'a> = (&'a str, Option<Value>, &'a [(&'a str, Dtype, usize)], &'a str);

#[test]
fn quantised_folders_are_named_for_what_they_are() {
    let home = Home::new();
    let cases: [Case; 9] = [
        ("no-word", None, &[("qweight", Dtype::I32, 4), ("qzeros", Dtype::I32, 4)], "AWQ or GPTQ"),
        ("no-word-g", None, &[("qweight", Dtype::I32, 4), ("g_idx", Dtype::I32, 4)], "GPTQ"),
        ("fp8-no-word", None, &[("weight", Dtype::F8_E4M3, 1)], "FP8"),
        (
            "packed",
            Some(json!({ "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized" })),
            &[("weight_packed", Dtype::U8, 1), ("weight_scale", Dtype::BF16, 2)],
            "compressed-tensors",
        ),
        (
            "bnb",
            Some(json!({ "quant_method": "bitsandbytes", "load_in_4bit": true })),
            &[("weight", Dtype::U8, 1), ("weight.absmax", Dtype::F32, 4)],
            "bitsandbytes",
        ),
        ("hqq", Some(json!({ "quant_method": "hqq" })), &[("W_q", Dtype::U8, 1)], "HQQ"),
        ("aqlm", Some(json!({ "quant_method": "aqlm" })), &[("codebooks", Dtype::F16, 2)], "AQLM"),
        ("eetq", Some(json!({ "quant_method": "eetq" })), &[("weight", Dtype::I8, 1)], "EETQ"),
        ("ao", Some(json!({ "quant_method": "torchao" })), &[("weight", Dtype::I8, 1)], "torchao"),
    ];
    for (name, method, parts, wanted) in cases {
        let changed = |tensor: &str, data: TensorData| match tensor.strip_suffix("q_proj.weight") {
            Some(base) => added(&format!("{base}q_proj."), parts),
            None => vec![data],
        };
        let config = |c: &mut Value| c["quantization_config"] = method.clone().unwrap_or(Value::Null);
        folder(&home, name, config, changed);
        let message = format!("error: `{name}` is quantised with {wanted}, which is not read\n");
        refused(&generate(&home, name), &message, "or a GGUF file of it");
    }
    // Scales of keys and values beside plain weights.
    folder(
        &home,
        "kv",
        |_| {},
        |name, data| match name.strip_suffix("k_proj.weight") {
            Some(base) => {
                [vec![data], added(&format!("{base}k_proj."), &[("k_scale", Dtype::F32, 4)])].concat()
            }
            None => vec![data],
        },
    );
    refused(&generate(&home, "kv"), "scales for FP8 keys and values", "or a GGUF file of it");
    // The name of the folder says what the original is called.
    let suffix = |name: &str| {
        folder(
            &home,
            name,
            |c| c["quantization_config"] = json!({ "quant_method": "hqq" }),
            |name, data| match name.strip_suffix("weight") {
                Some(base) if name.contains("q_proj") => added(base, &[("W_q", Dtype::U8, 1)]),
                _ => vec![data],
            },
        );
        generate(&home, name)
    };
    refused(&suffix("Tiny-1M-AWQ"), "AWQ", "use the original `Tiny-1M` of its makers");
    let hub = "hub/models--Qwen--Qwen9-1M-AWQ/snapshots/0a1b";
    refused(&suffix(hub), "AWQ", "use the original, `hf:Qwen/Qwen9-1M`");
    // Weights that are plain whatever the configuration says are read as they are.
    folder(
        &home,
        "plain",
        |c| c["quantization_config"] = json!({ "quant_method": "fp8" }),
        |_, data| vec![data],
    );
    let answer = generate(&home, "plain");
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    // Pickled weights of an old quantised folder.
    let pickled = suffix("old");
    assert_eq!(pickled.code, Some(2));
    std::fs::remove_file(home.path().join("old/model.safetensors")).unwrap();
    home.write("old/pytorch_model.bin", "PK");
    refused(&generate(&home, "old"), "is quantised with HQQ", "GGUF");
}

/// Every projection of the tiny target in bytes with a scale per output.
fn in_bytes(name: &str, data: TensorData) -> Vec<TensorData> {
    let Some(base) = name.strip_suffix("weight").filter(|base| base.contains("_proj.")) else {
        return vec![data];
    };
    let [rows, columns] = data.shape[..] else { panic!("a matrix") };
    let values: Vec<f32> = data
        .bytes
        .chunks_exact(2)
        .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
        .collect();
    let (mut bytes, mut scales) = (Vec::new(), Vec::new());
    for row in values.chunks_exact(columns) {
        let scale = row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
        bytes.extend(row.iter().map(|v| (v / scale).round() as i8 as u8));
        scales.push(scale);
    }
    let weight = TensorData { dtype: Dtype::I8, shape: vec![rows, columns], name: name.into(), bytes };
    vec![weight, TensorData::f32(&format!("{base}weight_scale"), &[rows, 1], &scales)]
}

fn bytes_config(config: &mut Value) {
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": { "group_0": {
            "targets": ["Linear"],
            "weights": { "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true },
        } },
    });
}

#[test]
fn a_quantised_folder_answers_shows_its_forms_and_drafts_without_loss() {
    let home = Home::new();
    folder(&home, "q", bytes_config, in_bytes);
    let whole = generate(&home, &tiny().display().to_string());
    let answer = generate(&home, "q");
    assert_eq!((answer.code, &answer.stdout), (Some(0), &whole.stdout), "{}", answer.stderr);
    let shown = home.run(&["inspect", "q"]);
    assert!(shown.stdout.contains("runs_as = 8 bits, f32 and zero per group"), "{}", shown.stdout);
    // A tensor that does not fit: one line that names file and tensor.
    let broken = |name: &str, data: TensorData| {
        let mut made = in_bytes(name, data);
        if name.contains("layers.3.mlp.up_proj") {
            made.pop();
        }
        made
    };
    folder(&home, "broken", bytes_config, broken);
    for command in [&["inspect", "broken"][..], &["generate", "-q", "--target", "broken", "--prompt", "x"]] {
        refused(
            &home.run(command),
            "error: tensor `model.layers.3.mlp.up_proj.weight` of `broken/model.safetensors` needs \
             `model.layers.3.mlp.up_proj.weight_scale`, which is missing\n",
            "from one repository and revision",
        );
    }
    let odd = |config: &mut Value| {
        bytes_config(config);
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(6);
    };
    folder(&home, "odd", odd, in_bytes);
    refused(
        &generate(&home, "odd"),
        "error: `quantization_config.config_groups.group_0.weights.num_bits` of `odd/config.json` is 6; ",
        "another quantisation of the model",
    );
}

#[test]
fn shards_and_types_that_do_not_exist_are_named() {
    let home = Home::new();
    folder(&home, "m", |_| {}, |_, data| vec![data]);
    let model = home.path().join("m/model.safetensors");
    std::fs::rename(&model, home.path().join("m/a.safetensors")).unwrap();
    let index = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let open = SafetensorsDir::open(home.path().join("m/a.safetensors")).unwrap();
        let mut map: serde_json::Map<String, Value> =
            open.names().map(|name| (name.to_owned(), json!("a.safetensors"))).collect();
        change(&mut map);
        home.write("m/model.safetensors.index.json", json!({ "weight_map": map }).to_string());
        generate(&home, "m")
    };
    assert_eq!(index(&|_| {}).code, Some(0));
    let missing = index(&|map| {
        map.insert("model.norm.weight".into(), json!("b.safetensors"));
    });
    refused(&missing, "m/b.safetensors`", "put it beside the others");
    let absent = index(&|map| {
        map.insert("model.norm.bias".into(), json!("a.safetensors"));
    });
    refused(
        &absent,
        "tensor `model.norm.bias` is not in `m/a.safetensors`, where the index puts it",
        "download",
    );
    let left_out = index(&|map| {
        map.remove("model.norm.weight");
    });
    refused(&left_out, "`m` has no tensor `model.norm.weight`", "from one repository and revision");
    let odd = index(&|map| {
        map.insert("model.norm.weight".into(), json!(7));
    });
    refused(&odd, "shard index `m/model.safetensors.index.json`", "download it again");

    // A type of a GGUF tensor that nobody has defined.
    let parts = split_target(&home.path().join("g"), 2);
    let mut bytes = std::fs::read(&parts[1]).unwrap();
    let name = b"output_norm.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    // Number of dimensions, one dimension, type.
    bytes[at + 4 + 8..at + 4 + 8 + 4].copy_from_slice(&99u32.to_le_bytes());
    std::fs::write(&parts[1], bytes).unwrap();
    let unknown = generate(&home, "g");
    refused(&unknown, "g/tiny-00002-of-00002.gguf`: tensor `output_norm.weight`", "");
    assert!(unknown.stderr.contains("99"), "{}", unknown.stderr);
}

#[test]
fn what_no_download_mends_is_not_advised_to_be_fetched_again() {
    let home = Home::new();
    let with = |name: &str, more: &'static str| {
        folder(
            &home,
            name,
            |_| {},
            |tensor, data| match tensor {
                "model.norm.weight" if more.is_empty() => Vec::new(),
                "model.norm.weight" => [vec![data], added("", &[(more, Dtype::F32, 4)])].concat(),
                _ => vec![data],
            },
        );
        generate(&home, name)
    };
    refused(&with("missing", ""), "has no tensor `model.norm.weight`", "take both from one repository");
    refused(&with("more", "mystery.weight"), "has tensor `mystery.weight`", "use the plain model");
    folder(&home, "wide", |c| c["vocab_size"] = json!(2048), |_, data| vec![data]);
    refused(&generate(&home, "wide"), "has shape [1024, 128], expected [2048, 128]", "do not fit");
    folder(
        &home,
        "phi",
        |c| {
            c["model_type"] = json!("phi");
        },
        |_, data| vec![data],
    );
    refused(&generate(&home, "phi"), "architecture `phi`", "llama (also SmolLM), mistral, qwen2");
    folder(&home, "typed", |c| c["hidden_size"] = json!("128"), |_, data| vec![data]);
    refused(
        &generate(&home, "typed"),
        "`hidden_size` = \"128\"",
        "set `hidden_size` to a non-negative integer",
    );
    home.write("lfs.gguf", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n");
    refused(&generate(&home, "lfs.gguf"), "magic is `vers`", "git lfs pull");
    home.write("adapter/adapter_config.json", "{}");
    refused(&generate(&home, "adapter"), "holds an adapter, not a model", "merge it");
}

/// The draft of [`foreign_draft`] with other words about its layers.
fn layers_written(home: &Home, write: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = home.path().join("theirs/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let object = config.as_object_mut().unwrap();
    object.remove("eagle_config");
    object.remove("eagle_aux_hidden_state_layer_ids");
    write(object);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn drafts_whose_layers_are_open_or_wrong_import_where_the_command_line_is_right() {
    const KEY: &str = "eagle_aux_hidden_state_layer_ids";
    let target = target();
    let open = [
        json!({ "eagle_config": { KEY: [], "use_aux_hidden_state": true } }),
        json!({ "eagle_config": { KEY: null } }),
        json!({ "eagle_config": {} }),
        json!({ "eagle_config": null, KEY: [] }),
        json!({ KEY: null }),
        json!({}),
    ];
    let wrong = [
        json!({ "eagle_config": { KEY: [1, 3] } }),
        json!({ "eagle_config": { KEY: ["1", "3", "4"] } }),
        json!({ "eagle_config": { KEY: "1,3,4" } }),
        json!({ "eagle_config": [1, 3, 4] }),
        json!({ KEY: [0, 3, 4] }),
        json!({ KEY: [2, 4, 5, 8] }),
        json!({ "eagle_config": { KEY: [-1, 3, 4] } }),
    ];
    let outside = [
        (
            json!({ "eagle_config": { KEY: [1, 3, 60] } }),
            "reads what layer 60 writes, but the target has 8 layers, 0 to 7",
        ),
        (json!({ KEY: [2, 4, 9] }), "reads what layer 8 writes"),
        (
            json!({ "eagle_config": { KEY: [4, 3, 1] } }),
            "reads layers [4, 3, 1], expected three different ones in ascending order",
        ),
        (json!({ "eagle_config": { KEY: [1, 1, 4] } }), "reads layers [1, 1, 4]"),
    ];
    let home = Home::new();
    foreign_draft(&home, |_| {});
    let import = |words: &Value, layers: Option<&str>| {
        layers_written(&home, |object| object.extend(words.as_object().unwrap().clone()));
        let mut args =
            vec!["bundle", "import", "theirs", "--target", &target, "--out", "b", "--replace", "-q"];
        args.extend(["--base-model", "org/tiny", "--license", "CC0-1.0"]);
        if let Some(layers) = layers {
            args.extend(["--layers", layers]);
        }
        home.run(&args)
    };
    let made = || draftsmith::bundle::Manifest::read(home.path().join("b")).unwrap().draft.target_layer_ids;
    for words in &open {
        let ended = import(words, None);
        assert_eq!(ended.code, Some(0), "{words}: {}", ended.stderr);
        assert_eq!(made(), [1, 3, 4], "{words}: the default of 8 layers");
    }
    for words in &wrong {
        refused(&import(words, None), "should be", "--layers LOW,MID,HIGH");
    }
    for (words, message) in &outside {
        refused(&import(words, None), message, "--layers LOW,MID,HIGH");
    }
    let all = open.iter().chain(&wrong).chain(outside.iter().map(|(words, _)| words));
    for words in all {
        let ended = import(words, Some("0,2,5"));
        assert_eq!(ended.code, Some(0), "{words}: {}", ended.stderr);
        assert_eq!(made(), [0, 2, 5], "{words}");
    }
    let fine = json!({});
    refused(&import(&fine, Some("1,3,60")), "reads what layer 60 writes", "--layers LOW,MID,HIGH");
    refused(&import(&fine, Some("4,3,1")), "`--layers` is [4, 3, 1]", "low, mid, high");
    refused(&import(&fine, Some("1,1,3")), "`--layers` is [1, 1, 3]", "low, mid, high");
    refused(
        &import(&fine, Some("-1,3,4")),
        "`--layers` has `-1`, expected whole numbers counted from 0",
        "low, mid, high",
    );
}

#[test]
fn a_bundle_with_layers_that_the_target_lacks_is_refused_by_every_verb() {
    let home = crate::bundles::with_bundle();
    let path = home.path().join("bundle/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([1, 3, 60]);
    config["eagle_aux_hidden_state_layer_ids"] = json!([2, 4, 61]);
    std::fs::write(&path, config.to_string()).unwrap();
    let target = target();
    for format in ["sglang", "vllm", "speculators", "gguf"] {
        let args = ["bundle", "export", "bundle", "--format", format, "--out", "v", "--target", &target];
        refused(&home.run(&args), "reads what layer 60 writes, but the target has 8 layers", "--layers");
        // Without a target named, `gguf` looks for the one that the bundle names first.
        let (told, hint) = match format {
            "gguf" => ("names its target as `tiny-target`, which is not here", "--target"),
            _ => ("reads what layer 60 writes", "--layers"),
        };
        refused(&home.run(&args[..7]), told, hint);
        assert!(!home.path().join("v").exists());
    }
    let args = ["generate", "--target", &target, "--bundle", "bundle", "--prompt", "a"];
    refused(&home.run(&args), "reads what layer 60 writes", "--layers");
    let checked = home.run(&["bundle", "check", "bundle"]);
    assert_eq!(checked.code, Some(1));
    assert!(checked.stdout.contains("reads what layer 60 writes"), "{}", checked.stdout);
}

#[test]
fn a_target_with_other_weights_than_the_bundles_is_told() {
    let home = crate::bundles::with_bundle();
    // The same network with one weight changed in its last bit: it decodes, and is another model.
    folder(
        &home,
        "other",
        |_| {},
        |name, mut data| {
            if name == "model.layers.0.mlp.up_proj.weight" {
                data.bytes[0] ^= 1;
            }
            vec![data]
        },
    );
    let bundle = draftsmith::bundle::Manifest::read(home.path().join("bundle")).unwrap();
    let found = draftsmith::target::model_hash(&home.path().join("other")).unwrap();
    let told = |ended: &Ended| {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let warning = ended.stderr.lines().find(|l| l.starts_with("warning: "));
        warning.is_some_and(|w| w.contains(&bundle.target.weights_sha256) && w.contains(&found))
    };
    let ask = ["--prompt", "Calculate 2 + 3.", "--max-new-tokens", "4", "--threads", "1", "--depth", "2"];
    let generate = |target: &str| {
        home.run(&[&["generate", "--target", target, "--bundle", "bundle"], ask.as_slice()].concat())
    };
    assert!(told(&generate("other")));
    assert!(!told(&generate(&target())), "its own weights are no news");
    home.write("w.jsonl", "{\"id\": \"a\", \"turns\": [\"Calculate 22 + 20.\"]}\n");
    let bench = |target: &str| {
        let args =
            ["bench", "--bundle", "bundle", "--target", target, "--workload", "w.jsonl", "--depth", "2"];
        home.run(&[args.as_slice(), &["--max-new-tokens", "8", "--report", "m"]].concat())
    };
    assert!(told(&bench("other")));
    let record: Value =
        serde_json::from_slice(&std::fs::read(home.path().join("m/w.json")).unwrap()).unwrap();
    assert_eq!(record["draft"]["trained_beside"], bundle.target.weights_sha256);
    let report = std::fs::read_to_string(home.path().join("m/report.html")).unwrap();
    assert!(report.contains("The draft was trained beside target weights with hash"));
}
