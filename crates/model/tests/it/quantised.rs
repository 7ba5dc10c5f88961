//! Quantised folders: values of the programs that define the formats, bit for bit, logits of transformers, and rows that do
//! not depend on what is decoded beside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::hash::sha256_hex;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, write};
use draftsmith_kernels::Cpu;
use draftsmith_model::{ModelError, Precision, StepItem, Target, TargetTensors, quantised_layers};

const CASES: [&str; 16] = [
    "awq_g32",
    "awq_g64",
    "awq_g128",
    "gptq_g64_sym",
    "gptq_g32_act",
    "gptq_v2_g128",
    "gptq_channel_head",
    "gptq_int8",
    "fp8_block",
    "fp8_tensor",
    "ct_fp8_channel",
    "ct_fp8_block",
    "ct_int4_group_asym",
    "ct_int4_group_act",
    "ct_int4_channel",
    "ct_int8_mixed",
];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quantised").join(name)
}

fn hash(values: &[f32]) -> String {
    sha256_hex(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}

#[test]
fn values_are_those_of_the_programs_that_define_the_formats() {
    for name in CASES {
        let wanted: BTreeMap<String, String> =
            serde_json::from_slice(&std::fs::read(fixture(name).join("values.json")).unwrap()).unwrap();
        let tensors = TargetTensors::load(&fixture(name)).unwrap();
        let mut seen = 0;
        for (part, values) in &tensors.last_layer {
            let layer = format!("model.layers.0.{}", part.strip_suffix(".weight").unwrap());
            if let Some(wanted) = wanted.get(&layer) {
                assert_eq!(&hash(values), wanted, "{name}: {layer}");
                seen += 1;
            }
        }
        if let Some(wanted) = wanted.get("lm_head") {
            assert_eq!(&hash(tensors.head.as_ref().unwrap()), wanted, "{name}: head");
            seen += 1;
        }
        assert_eq!(seen, wanted.len(), "{name}: {wanted:?}");
    }
}

/// Root mean square of the differences as a share of the values'.
fn off(found: &[f32], wanted: &[f32]) -> f32 {
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>();
    let error = square(&mut found.iter().zip(wanted).map(|(f, w)| f - w));
    (error / square(&mut wanted.iter().copied())).sqrt()
}

#[test]
fn logits_are_those_of_transformers_alone_and_beside_others() {
    for name in CASES {
        let expected = SafetensorsDir::open(fixture(name).join("expected.safetensors")).unwrap();
        let wanted = expected.get("logits").unwrap().to_f32().unwrap();
        let ids = expected.get("input_ids").unwrap().to_i64().unwrap();
        let ids: Vec<u32> = ids.into_iter().map(|i| i as u32).collect();
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        for (precision, tolerance) in [
            (Precision::F32, 1e-5),
            // Activations in 8 bits beside whole numbers; beside 8-bit floats they stay, and keys and values are f16.
            (Precision::Stored, if name.contains("fp8") { 5e-3 } else { 0.03 }),
        ] {
            let target = Target::load(Arc::new(Cpu::new(2)), &fixture(name), precision).unwrap();
            let vocab = target.config().vocab_size;
            let run = |kv: &mut _, tokens: &[u32]| {
                let parents = TokenTree::chain_parents(tokens.len());
                let output = target.forward(&mut [StepItem { kv, tokens, parents: &parents }], &[LayerId(0)]);
                target.logits(&output, &rows[..tokens.len()])
            };
            let all = run(&mut target.new_kv(), &ids);
            let error = off(&all, &wanted);
            assert!(error < tolerance, "{name} {precision:?}: off by {error} of its size");

            // One by one and in chunks.
            for chunk in [1, 5] {
                let mut kv = target.new_kv();
                let again: Vec<f32> = ids.chunks(chunk).flat_map(|part| run(&mut kv, part)).collect();
                assert!(again == all, "{name} {precision:?}: chunks of {chunk} give other bits");
            }
            // Beside another sequence, in a tree of two branches.
            let (mut a, mut b) = (target.new_kv(), target.new_kv());
            run(&mut a, &ids[..10]);
            run(&mut b, &ids[..4]);
            let tree = [ids[10], ids[10], ids[11]];
            let parents = [None, None, Some(1)];
            let output = target.forward(
                &mut [
                    StepItem { kv: &mut b, tokens: &ids[4..13], parents: &TokenTree::chain_parents(9) },
                    StepItem { kv: &mut a, tokens: &tree, parents: &parents },
                ],
                &[],
            );
            let found = target.logits(&output, &[0, 8, 9, 10, 11]);
            for (row, position) in [4, 12, 10, 10, 11].into_iter().enumerate() {
                let (found, wanted) = (&found[row * vocab..][..vocab], &all[position * vocab..][..vocab]);
                assert!(found == wanted, "{name} {precision:?}: position {position} in a batch");
            }
            let best = target.argmax(&output, &[9, 11]);
            let first = |p: usize| {
                let row = &all[p * vocab..][..vocab];
                (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
            };
            assert_eq!(best, [first(10), first(11)], "{name} {precision:?}");
        }
    }
}

#[test]
fn layers_are_shown_with_the_form_that_they_run_in() {
    let forms = |name: &str| {
        let mut forms = BTreeMap::new();
        for layer in quantised_layers(&fixture(name)).unwrap() {
            *forms.entry(layer.form).or_insert(0) += 1;
        }
        forms.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(forms("awq_g64"), [("4 bits, f16 and zero per group", 6)]);
    assert_eq!(forms("gptq_g64_sym"), [("4 bits, f16 per group", 7)]);
    assert_eq!(forms("gptq_g32_act"), [("4 bits, f16 and zero per group, inputs reordered", 7)]);
    assert_eq!(forms("gptq_channel_head"), [("4 bits, f16 per group", 8)]);
    // One group of all inputs needs no order.
    assert_eq!(forms("gptq_int8"), [("8 bits, f16 and zero per group", 7)]);
    assert_eq!(forms("fp8_block"), [("FP8, f32 per group", 7)]);
    assert_eq!(forms("ct_fp8_channel"), [("FP8, f32 per group", 6)]);
    assert_eq!(
        forms("ct_int4_channel"),
        [("4 bits, f16 per group", 6), ("4 bits, f32 and zero per group", 1)]
    );
    assert_eq!(forms("ct_int8_mixed"), [("4 bits, f16 per group", 2), ("8 bits, f16 and zero per group", 5)]);
    assert_eq!(quantised_layers(Path::new("no/such/folder")).unwrap(), []);
}

/// A copy of a case with changes to its configuration and tensors.
fn changed(
    name: &str,
    config: impl Fn(&mut serde_json::Value),
    tensors: impl Fn(&str, TensorData) -> Vec<TensorData>,
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = fixture(name);
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config(&mut json);
    std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    let dir = SafetensorsDir::open(&source).unwrap();
    let data: Vec<TensorData> = dir
        .names()
        .map(|name| dir.find(name).unwrap())
        .flat_map(|t| {
            let data = TensorData {
                name: t.name.into(),
                dtype: t.dtype,
                shape: t.shape.to_vec(),
                bytes: t.bytes.to_vec(),
            };
            tensors(t.name, data)
        })
        .collect();
    write(folder.path().join("model.safetensors"), &data, &BTreeMap::new()).unwrap();
    folder
}

#[track_caller]
fn refused(folder: &Path, wanted: &str, hint: &str) {
    let error: ModelError =
        Target::load(Arc::new(Cpu::new(1)), folder, Precision::Stored).err().expect(wanted);
    let said = error.to_string().replace(&format!("{}/", folder.display()), "");
    assert!(said.contains(wanted), "{said}\nnot\n{wanted}");
    assert!(!said.contains('\n'), "{said}");
    assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    const Q: &str = "model.layers.0.self_attn.q_proj";
    type Change = fn(TensorData) -> Vec<TensorData>;
    let gone: Change = |_| Vec::new();
    let short: Change = |t| {
        let row = t.bytes.len() / t.shape[0];
        vec![TensorData {
            shape: [&[t.shape[0] - 1], &t.shape[1..]].concat(),
            bytes: t.bytes[row..].to_vec(),
            ..t
        }]
    };
    let floats: Change = |t| vec![TensorData::f32(&t.name, &t.shape, &vec![1.0; t.shape.iter().product()])];
    let cases: [(&str, &str, Change, &str); 24] = [
        (
            "awq_g32",
            "scales",
            gone,
            "qweight` of `model.safetensors` needs `model.layers.0.self_attn.q_proj.scales`, which is missing",
        ),
        ("awq_g32", "qzeros", gone, "needs `model.layers.0.self_attn.q_proj.qzeros`, which is missing"),
        ("awq_g32", "qweight", gone, "has no tensor `model.layers.0.self_attn.q_proj.weight`"),
        (
            "awq_g32",
            "scales",
            short,
            "q_proj.scales` of `model.safetensors` has shape [3, 128], expected [4, 128] for groups of 32 of 128 inputs",
        ),
        (
            "awq_g32",
            "qzeros",
            short,
            "q_proj.qzeros` of `model.safetensors` has shape [3, 16], expected [4, 16]",
        ),
        (
            "awq_g32",
            "qweight",
            floats,
            "q_proj.qweight` of `model.safetensors` is stored as F32, expected I32",
        ),
        (
            "awq_g32",
            "scales",
            |t| vec![TensorData { dtype: Dtype::I16, ..t }],
            "is stored as I16, expected F16, BF16 or F32",
        ),
        ("gptq_g32_act", "scales", gone, "q_proj.scales`, which is missing"),
        (
            "gptq_g32_act",
            "g_idx",
            short,
            "q_proj.g_idx` of `model.safetensors` has shape [127], expected [128] for as many inputs",
        ),
        (
            "gptq_g32_act",
            "g_idx",
            |mut t| {
                t.bytes[20..24].copy_from_slice(&4i32.to_le_bytes());
                vec![t]
            },
            "q_proj.g_idx` of `model.safetensors` has group 4 at input 5, but there are 4 groups",
        ),
        (
            "gptq_g32_act",
            "g_idx",
            |mut t| {
                t.bytes[..4].copy_from_slice(&(-1i32).to_le_bytes());
                vec![t]
            },
            "has group -1 at input 0, but there are 4 groups",
        ),
        (
            "gptq_g32_act",
            "g_idx",
            |t| vec![TensorData { dtype: Dtype::F32, ..t }],
            "is stored as F32, expected I32",
        ),
        (
            "gptq_g64_sym",
            "qweight",
            short,
            "q_proj.g_idx` of `model.safetensors` has shape [128], expected [120] for as many inputs",
        ),
        (
            "fp8_block",
            "weight_scale_inv",
            gone,
            "q_proj.weight` of `model.safetensors` needs `model.layers.0.self_attn.q_proj.weight_scale`, which is missing",
        ),
        (
            "fp8_block",
            "weight_scale_inv",
            |t| {
                vec![TensorData {
                    shape: vec![1, 2],
                    bytes: [t.bytes.clone(), t.bytes].concat(),
                    name: t.name,
                    dtype: t.dtype,
                }]
            },
            "has shape [1, 2], expected [1, 1] for blocks of 128 x 128 of a weight of 128 x 128",
        ),
        (
            "fp8_tensor",
            "weight",
            |mut t| {
                t.bytes[130] = 0xff;
                vec![t]
            },
            "q_proj.weight` of `model.safetensors` has no number at 2 of output 1",
        ),
        (
            "fp8_tensor",
            "weight_scale",
            |mut t| {
                t.bytes.copy_from_slice(&f32::NAN.to_le_bytes());
                vec![t]
            },
            "has NaN at 0, which is no scale",
        ),
        (
            "fp8_tensor",
            "weight",
            |t| vec![TensorData { dtype: Dtype::F8_E5M2, ..t }],
            "is stored as F8_E5M2, expected F8_E4M3",
        ),
        (
            "ct_int4_group_asym",
            "weight_zero_point",
            gone,
            "needs `model.layers.0.self_attn.q_proj.weight_zero_point`, which is missing",
        ),
        ("ct_int4_group_asym", "weight_shape", gone, "q_proj.weight_shape`, which is missing"),
        (
            "ct_int4_group_asym",
            "weight_shape",
            |mut t| {
                t.bytes[8..16].copy_from_slice(&1000i64.to_le_bytes());
                vec![t]
            },
            "q_proj.weight_shape` of `model.safetensors` is [128, 1000], but `model.layers.0.self_attn.q_proj.weight_packed` has 128 x 16 words of 4 bits",
        ),
        (
            "ct_int4_group_asym",
            "weight_scale",
            short,
            "has shape [127, 4], expected [128, 4] for 128 outputs and groups of 32 inputs",
        ),
        (
            "ct_int4_channel",
            "weight_packed",
            short,
            "but `model.layers.0.self_attn.q_proj.weight_packed` has 127 x 16 words of 4 bits",
        ),
        (
            "ct_int8_mixed",
            "weight",
            |t| vec![TensorData { dtype: Dtype::U8, ..t }],
            "q_proj.weight` of `model.safetensors` is stored as U8, but `quantization_config.config_groups.group_0` says 8 bits, whole numbers",
        ),
    ];
    for (case, part, change, wanted) in cases {
        let own = format!("{Q}.{part}");
        let folder = changed(case, |_| {}, |name, data| if name == own { change(data) } else { vec![data] });
        if !fixture(case).join("quantize_config.json").is_file() {
            refused(folder.path(), wanted, "from one repository and revision");
        }
    }
}

#[test]
fn what_a_configuration_says_and_is_not_read_is_refused_by_key() {
    use serde_json::{Value, json};
    type Change = fn(&mut Value);
    let cases: [(&str, Change, &str); 22] = [
        (
            "awq_g32",
            |q| q["bits"] = json!(8),
            "`quantization_config.bits` of `config.json` is 8; of AWQ 4 bits are read",
        ),
        (
            "awq_g32",
            |q| q["version"] = json!("gemv"),
            "`quantization_config.version` of `config.json` is `gemv`; of AWQ the layout `gemm` is read",
        ),
        (
            "awq_g32",
            |q| q["group_size"] = json!(64),
            "has shape [4, 128], expected [2, 128] for groups of 64 of 128 inputs",
        ),
        (
            "awq_g32",
            |q| q["group_size"] = json!(0),
            "`quantization_config.group_size` of `config.json` is 0, expected a group size, or -1",
        ),
        (
            "awq_g32",
            |q| q["group_size"] = json!("32"),
            "`quantization_config.group_size` of `config.json` is \"32\", no whole number",
        ),
        (
            "awq_g32",
            |q| q["modules_to_not_convert"] = json!(["self_attn.v_proj"]),
            "v_proj.qweight` of `model.safetensors` is quantised, but `quantization_config.modules_to_not_convert` of `config.json` leaves it out by `self_attn.v_proj`",
        ),
        (
            "awq_g32",
            |q| q["modules_to_not_convert"] = json!(["(a"]),
            "`quantization_config.modules_to_not_convert` of `config.json` has the pattern `(a`: a `(` has no `)`",
        ),
        ("gptq_g64_sym", |q| q["bits"] = json!(3), "is 3; of GPTQ 4 and 8 bits are read"),
        (
            "gptq_g64_sym",
            |q| q["bits"] = Value::Null,
            "`quantization_config.bits` of `config.json` is missing",
        ),
        (
            "gptq_g64_sym",
            |q| q["checkpoint_format"] = json!("marlin"),
            "is `marlin`; of GPTQ the layouts `gptq` and `gptq_v2` are read",
        ),
        (
            "gptq_g64_sym",
            |q| q["pack_dtype"] = json!("int16"),
            "is `int16`; of GPTQ words of `int32` are read",
        ),
        ("fp8_block", |q| q["weight_block_size"] = json!([128]), "is [128], expected two sizes of a block"),
        (
            "fp8_block",
            |q| q["weight_block_size"] = json!([0, 128]),
            "is [0,128], expected two sizes of a block",
        ),
        ("fp8_block", |q| q["fmt"] = json!("e5m2"), "is `e5m2`; 8-bit floats are read as `e4m3`"),
        (
            "ct_int4_channel",
            |q| q["config_groups"] = Value::Null,
            "`quantization_config.config_groups` of `config.json` is missing",
        ),
        (
            "ct_int4_channel",
            |q| q["config_groups"]["group_0"]["weights"]["num_bits"] = json!(3),
            "`quantization_config.config_groups.group_0.weights.num_bits` of `config.json` is 3;",
        ),
        (
            "ct_int4_channel",
            |q| q["config_groups"]["group_0"]["weights"]["strategy"] = json!("tensor_group"),
            "is `tensor_group`; `tensor`, `channel`, `group` and `block` are read",
        ),
        (
            "ct_int4_channel",
            |q| q["config_groups"]["group_0"]["weights"]["strategy"] = json!("group"),
            "config_groups.group_0.weights.group_size` of `config.json` is missing",
        ),
        (
            "ct_int4_channel",
            |q| q["config_groups"]["group_0"]["targets"] = json!(["re:[a"]),
            "config_groups.group_0.targets` of `config.json` has the pattern `re:[a`",
        ),
        (
            "ct_int4_channel",
            |q| q["config_groups"]["group_0"]["targets"] = json!(["re:.*mlp"]),
            "is quantised, but no target of `quantization_config.config_groups` of `config.json` names it",
        ),
        (
            "ct_int4_channel",
            |q| q["ignore"] = json!(["re:.*q_proj"]),
            "is quantised, but `quantization_config.ignore` of `config.json` leaves it out by `re:.*q_proj`",
        ),
        (
            "ct_int4_channel",
            |q| q["sparsity_config"] = json!({"format": "sparse-24-bitmask"}),
            "`quantization_config.sparsity_config.format` of `config.json` is not `dense`",
        ),
    ];
    for (case, change, wanted) in cases {
        let folder = changed(case, |c| change(&mut c["quantization_config"]), |_, data| vec![data]);
        refused(folder.path(), wanted, "");
    }
    // Formats of methods that are read, but not these.
    for format in ["nvfp4-pack-quantized", "marlin-24"] {
        let folder = changed(
            "ct_int4_channel",
            |c| c["quantization_config"]["format"] = json!(format),
            |_, d| vec![d],
        );
        refused(folder.path(), "is quantised with compressed-tensors, which is not read", "GGUF");
    }
}

#[test]
fn forms_that_fit_no_group_run_as_floats_with_the_same_values() {
    // Groups that are not full: the list of GPTQ gives one input of the first group to the second.
    let moved = |name: &str, mut data: TensorData| {
        if name.ends_with("q_proj.g_idx") {
            let at = data.bytes.chunks_exact(4).position(|g| g == 0i32.to_le_bytes()).unwrap();
            data.bytes[4 * at] = 1;
        }
        vec![data]
    };
    let folder = changed("gptq_g32_act", |_| {}, moved);
    let form = |folder: &Path| {
        quantised_layers(folder).unwrap().into_iter().find(|l| l.tensor.contains("q_proj")).unwrap().form
    };
    assert_eq!(form(folder.path()), "F32");
    let name = "self_attn.q_proj.weight";
    let values = |folder: &Path| {
        TargetTensors::load(folder).unwrap().last_layer.into_iter().find(|(n, _)| *n == name).unwrap().1
    };
    let (found, before) = (values(folder.path()), values(&fixture("gptq_g32_act")));
    let columns: Vec<usize> =
        (0..128).filter(|k| (0..128).any(|o| found[o * 128 + k] != before[o * 128 + k])).collect();
    assert_eq!(columns.len(), 1, "one input changes its scales");

    // A list of zeros means nothing: groups stand in order.
    let blank = |name: &str, data: TensorData| match name.ends_with("g_idx") {
        true => vec![TensorData { bytes: vec![0; data.bytes.len()], ..data }],
        false => vec![data],
    };
    let folder = changed("gptq_g64_sym", |_| {}, blank);
    assert_eq!(form(folder.path()), "4 bits, f16 per group");
    assert!(values(folder.path()) == values(&fixture("gptq_g64_sym")));
}

/// The seeds of the fuzz target with some bytes changed: errors or values, never a panic.
#[test]
fn damaged_folders_are_errors_or_have_values() {
    use draftsmith_formats::hf_config::HfConfig;
    use draftsmith_model::quantised_values;
    let seeds = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/quantised");
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let (mut read, mut refused) = (0, 0);
    let mut seeds: Vec<PathBuf> = std::fs::read_dir(seeds).unwrap().map(|e| e.unwrap().path()).collect();
    seeds.sort();
    assert_eq!(seeds.len(), 7);
    for seed in seeds {
        let bytes = std::fs::read(&seed).unwrap();
        let config_len = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        for round in 0..1500 {
            let mut bytes = bytes[2..].to_vec();
            for _ in 0..if round == 0 { 0 } else { 1 + random(3) } {
                let at = random(bytes.len());
                // Digits of shapes and sizes, more than other bytes, lead to new places.
                bytes[at] =
                    if bytes[at].is_ascii_digit() { b'0' + random(10) as u8 } else { random(256) as u8 };
            }
            let (config, weights) = bytes.split_at(config_len);
            let Ok(config) = HfConfig::parse(Path::new("config.json"), config) else { continue };
            let Ok(open) = SafetensorsDir::from_bytes("model.safetensors", weights.to_vec()) else {
                continue;
            };
            match quantised_values(&config, &open) {
                Ok(all) => {
                    assert!(round > 0 || all.len() == 1, "{}", seed.display());
                    read += 1;
                }
                Err(error) => {
                    assert!(round > 0, "{}: {error}", seed.display());
                    assert!(error.hint().is_some() && !error.to_string().is_empty());
                    refused += 1;
                }
            }
        }
    }
    assert!(read > 1000 && refused > 50, "{read} read, {refused} refused");
}
