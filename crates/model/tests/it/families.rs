//! Every family computes what transformers computes on tiny random models, from every container and storage type.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::{Activation, Cpu, Kernels, Memory};
use draftsmith_model::{Family, Infer, Norms, Precision, QkNorm, StepItem, Target, TargetConfig};

/// Float32 rounding moves these logits by about 1e-5; see the fixtures' README.
const FLOAT_TOLERANCE: Tolerance = Tolerance::Absolute(1e-4);

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// How far values may be from the recorded ones.
#[derive(Clone, Copy)]
enum Tolerance {
    /// Every value by this much.
    Absolute(f32),
    /// The root mean square of the differences, as a share of the values'.
    RelativeRms(f32),
}

#[track_caller]
fn close(what: &str, found: &[f32], wanted: &[f32], tolerance: Tolerance) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let tolerance = match tolerance {
        Tolerance::Absolute(t) => t,
        Tolerance::RelativeRms(share) => {
            let square = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>();
            let error = square(&mut found.iter().zip(wanted).map(|(f, w)| f - w));
            let size = square(&mut wanted.iter().copied());
            let ratio = (error / size).sqrt();
            assert!(ratio <= share, "{what}: off by {ratio} of its size");
            return;
        }
    };
    let worst = found.iter().zip(wanted).map(|(f, w)| (f - w).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: off by {worst}");
}

#[track_caller]
fn check(model: &str, expected: &str, precision: Precision, tolerance: Tolerance) {
    let kernels = Arc::new(Cpu::new(2));
    let target = Target::load(Arc::clone(&kernels), &fixture(model), precision).unwrap();
    let expected = SafetensorsDir::open(fixture(expected)).unwrap();
    let want = |name: &str| expected.get(name).unwrap().to_f32().unwrap();
    let ids: Vec<u32> =
        expected.get("input_ids").unwrap().to_i64().unwrap().into_iter().map(|i| i as u32).collect();
    let layers: Vec<LayerId> = (0..target.config().num_layers as u32).map(LayerId).collect();
    let ops = Infer::new(kernels.as_ref());

    // All at once.
    let mut kv = target.new_kv();
    let rows = TokenTree::chain_parents(ids.len());
    let output = target.forward(&mut [StepItem { kv: &mut kv, tokens: &ids, parents: &rows }], &layers);
    for (layer, hidden) in layers.iter().zip(&output.hidden) {
        if expected.find(&format!("hidden.{}", layer.0)).is_some() {
            close(
                &format!("{model}: output of layer {}", layer.0),
                &ops.values(hidden),
                &want(&format!("hidden.{}", layer.0)),
                tolerance,
            );
        }
    }
    close(&format!("{model}: last"), &ops.values(&output.last), &want("last"), tolerance);
    let all: Vec<u32> = (0..ids.len() as u32).collect();
    let logits = target.logits(&output, &all);
    close(&format!("{model}: logits"), &logits, &want("logits"), tolerance);

    // One by one, and in chunks: the same bits.
    for chunk in [1usize, 3] {
        let mut kv = target.new_kv();
        let mut again = Vec::new();
        for part in ids.chunks(chunk) {
            let rows = TokenTree::chain_parents(part.len());
            let out = target.forward(&mut [StepItem { kv: &mut kv, tokens: part, parents: &rows }], &layers);
            again.extend(target.logits(&out, &all[..part.len()]));
        }
        assert!(again == logits, "{model}: chunks of {chunk} give other bits");
    }

    // Two sequences in one step, one of them a tree whose second branch repeats the first: the same bits.
    let (mut a, mut b) = (target.new_kv(), target.new_kv());
    // Where LongRoPE changes its angles, the tree has rows on both sides.
    let half = target.config().rope_long.as_ref().map_or(ids.len() / 2, |(original, _)| original - 1);
    let step = |kv: &mut _, tokens: &[u32]| {
        let rows = TokenTree::chain_parents(tokens.len());
        target.forward(&mut [StepItem { kv, tokens, parents: &rows }], &[])
    };
    step(&mut a, &ids[..half]);
    step(&mut b, &ids[..half + 1]);
    let (next, after) = (&ids[half..half + 2], &ids[half + 1..half + 2]);
    let tree = [next[0], next[0], next[1], next[1]];
    let parents = [None, None, Some(0), Some(1)];
    let output = target.forward(
        &mut [
            StepItem { kv: &mut a, tokens: &tree, parents: &parents },
            StepItem { kv: &mut b, tokens: after, parents: &[None] },
        ],
        &[],
    );
    let vocab = target.config().vocab_size;
    let found = target.logits(&output, &[0, 1, 2, 3, 4]);
    for (row, position) in [(0, half), (1, half), (2, half + 1), (3, half + 1), (4, half + 1)] {
        assert!(
            found[row * vocab..(row + 1) * vocab] == logits[position * vocab..(position + 1) * vocab],
            "{model}: row {row} of the tree step differs from position {position}"
        );
    }

    // Commit the second branch, go on, and compare again; then roll back and repeat.
    a.commit(kernels.as_ref(), half, &[1, 3]);
    let rest = &ids[half + 2..];
    for _ in 0..2 {
        let rows = TokenTree::chain_parents(rest.len());
        let output = target.forward(&mut [StepItem { kv: &mut a, tokens: rest, parents: &rows }], &[]);
        let found = target.logits(&output, &all[..rest.len()]);
        assert!(found[..] == logits[(half + 2) * vocab..], "{model}: after commit or rollback");
        a.rollback_to(half + 2);
    }
    // Back to before the tree, and on in two steps.
    a.rollback_to(half - 1);
    let mut again = Vec::new();
    for part in [&ids[half - 1..half + 1], &ids[half + 1..]] {
        let rows = TokenTree::chain_parents(part.len());
        let output = target.forward(&mut [StepItem { kv: &mut a, tokens: part, parents: &rows }], &[]);
        again.extend(target.logits(&output, &all[..part.len()]));
    }
    assert!(again[..] == logits[(half - 1) * vocab..], "{model}: after a longer rollback");
    // The greedy choice is that of the logits.
    let output = step(&mut target.new_kv(), &ids);
    let best: Vec<u32> = logits
        .chunks_exact(vocab)
        .map(|row| (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32)
        .collect();
    assert_eq!(target.argmax(&output, &all), best, "{model}: greedy choices");
}

/// Folders of `fixtures/families`.
const FOLDERS: [&str; 22] = [
    "llama",
    "llama_tied",
    "llama_tied_bf16",
    "llama_linear",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen2_f16",
    "qwen2_yarn",
    "qwen3",
    "qwen3_sharded",
    "qwen3_window",
    "qwen3_yarn",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi3_longrope",
    "olmo2",
    "smollm3",
    "granite",
    "glm4",
    "glm4_no_bias",
];

/// Folders with experts, which `experts.rs` compares; each has its GGUF twin inside.
const EXPERTS: [&str; 6] =
    ["qwen3_moe", "qwen3_moe_shares", "qwen3_moe_mixed", "gpt_oss", "gpt_oss_plain_rope", "gpt_oss_mxfp4"];

#[test]
fn safetensors_families_match_transformers() {
    for family in FOLDERS {
        let expected = format!("families/{family}/expected.safetensors");
        let model = format!("families/{family}");
        check(&model, &expected, Precision::F32, FLOAT_TOLERANCE);
        // The same but for keys and values in f16.
        check(&model, &expected, Precision::Stored, Tolerance::RelativeRms(2e-3));
    }
}

#[test]
fn the_same_weights_in_a_gguf_file_are_the_same_model() {
    let mut seen = 0;
    for family in FOLDERS {
        let model = format!("families/{family}.gguf");
        if fixture(&model).is_file() {
            let expected = format!("families/{family}/expected.safetensors");
            check(&model, &expected, Precision::F32, FLOAT_TOLERANCE);
            seen += 1;
        }
    }
    // The others are other storage types, and a window that llama.cpp has no key for.
    assert_eq!(seen, FOLDERS.len() - 4);
}

#[test]
fn gguf_families_match_transformers() {
    for name in ["llama-f32", "llama-q8_0", "qwen2-q8_0", "qwen3-q8_0", "gemma3-q8_0"] {
        let expected = format!("gguf/{name}.safetensors");
        check(&format!("gguf/{name}.gguf"), &expected, Precision::F32, FLOAT_TOLERANCE);
        // Activations rounded to 8 bits, in models whose rows are a single block.
        if name != "llama-f32" {
            check(&format!("gguf/{name}.gguf"), &expected, Precision::Stored, Tolerance::RelativeRms(0.05));
        }
    }
}

#[test]
fn a_split_file_is_the_model_that_was_split() {
    for part in ["00001", "00003"] {
        let model = format!("gguf-split/llama-f32-{part}-of-00003.gguf");
        check(&model, "gguf/llama-f32.safetensors", Precision::F32, FLOAT_TOLERANCE);
    }
}

/// The values of `tensor`, de-quantised and out of the packed form, are the expected ones bit for bit.
#[track_caller]
fn check_values(container: &str, tensor: &str, expected: &SafetensorsDir) {
    use draftsmith_formats::gguf::GgufFile;
    use draftsmith_kernels::{PackMode, WeightView, quant};
    let file = GgufFile::open(fixture(container)).unwrap();
    let info = file.tensor(tensor).unwrap();
    let dtype = draftsmith_model::weight_dtype(info.ggml_type).unwrap();
    assert_eq!(dtype.block(), (info.ggml_type.block_elements(), info.ggml_type.block_bytes()));
    let [inputs, rows] = info.dims[..] else { panic!("a matrix") };
    let view = WeightView { dtype, out_features: rows, in_features: inputs, data: file.data(info) };
    view.check(tensor).unwrap();
    let found = quant::dequantize(&view);
    let wanted = expected.get(tensor).unwrap().to_f32().unwrap();
    let kernels = Cpu::new(1);
    let ids: Vec<u32> = (0..rows as u32).collect();
    let unpacked = |mode: PackMode| {
        let packed = kernels.pack(tensor, &view, mode).unwrap();
        let mut values = kernels.zeros(rows * inputs);
        kernels.embed(&packed, &ids, 1.0, &mut values);
        values
    };
    for (how, found) in
        [("de-quantised", found), ("packed", unpacked(PackMode::Stored)), ("floats", unpacked(PackMode::F32))]
    {
        assert_eq!(found.len(), wanted.len());
        for (i, (f, w)) in found.iter().zip(&wanted).enumerate() {
            assert!(f.to_bits() == w.to_bits(), "{container} {tensor} {how}: value {i} is {f}, not {w}");
        }
    }
}

#[test]
fn block_types_dequantise_to_the_recorded_values() {
    for name in ["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k"] {
        let expected = SafetensorsDir::open(fixture(&format!("gguf/{name}.safetensors"))).unwrap();
        check_values(&format!("gguf/{name}.gguf"), "weight", &expected);
    }
}

#[test]
fn every_type_has_the_values_of_the_gguf_package_with_scales_of_any_size() {
    use draftsmith_formats::gguf::GgufFile;
    let expected = SafetensorsDir::open(fixture("gguf/all_types.safetensors")).unwrap();
    let file = GgufFile::open(fixture("gguf/all_types.gguf")).unwrap();
    for tensor in file.tensors() {
        check_values("gguf/all_types.gguf", &tensor.name, &expected);
    }
    let stored: Vec<_> =
        file.tensors().iter().map(|t| draftsmith_model::weight_dtype(t.ggml_type).unwrap()).collect();
    for dtype in draftsmith_kernels::WeightDtype::ALL {
        assert!(stored.contains(&dtype), "no tensor of {dtype:?}");
    }
}

/// What a fixture shows of its family beyond a plain Llama.
fn traits_of(c: &TargetConfig) -> Vec<String> {
    let mut traits = Vec::new();
    let mut say = |on: bool, what: &str| {
        if on {
            traits.push(what.to_owned());
        }
    };
    say(c.tied, "tied head");
    say(c.qkv_bias && !c.o_bias, "biases on q, k, v");
    say(c.qkv_bias && c.o_bias, "biases in attention");
    say(c.mlp_bias, "biases in the MLP");
    say(c.qk_norm == QkNorm::Head, "norms on q and k heads");
    say(c.qk_norm == QkNorm::Full, "norms on whole q and k");
    say(c.norms == Norms::Post, "norms on outputs only");
    say(c.norms == Norms::Sandwich, "norms on inputs and outputs");
    say(c.activation == Activation::GeluTanh, "GELU");
    say(c.windows.iter().all(Option::is_some), "window on every layer");
    say(
        c.windows.iter().any(Option::is_some) && c.windows.iter().any(Option::is_none),
        "window on some layers",
    );
    say(c.turns.contains(&false), "layers without RoPE");
    say(c.rotary_dim < c.head_dim, "part of a head turned");
    say(c.rope_local.is_some(), "own RoPE under windows");
    say(c.attention_softcap.is_some() || c.final_softcap.is_some(), "capped logits");
    say(c.residual_scale != 1.0, "multipliers");
    let experts = c.experts.as_ref().map(|e| e.layers.contains(&false));
    say(experts == Some(false), "experts in all layers");
    say(experts == Some(true), "experts in some layers");
    say(c.sinks, "attention sinks");
    say(matches!(c.activation, Activation::ClampedSwiglu { .. }), "clamped SwiGLU");
    traits
}

/// `rope_type` of a fixture, and where its table stands.
fn rope_type(folder: &Path) -> String {
    let config = HfConfig::open(folder).unwrap();
    let table = config.find_table("rope_parameters").unwrap().unwrap();
    let table = table.find_table("full_attention").unwrap().unwrap_or(table);
    table.get_str("rope_type").unwrap().to_owned()
}

/// `docs/MODELS.md` between its marks: every row stands for fixtures whose logits the tests above compare.
fn table_of_models() -> String {
    let gguf = |family: Family, folder: &str| -> Vec<String> {
        let twin = [fixture(&format!("{folder}.gguf")), fixture(&format!("{folder}/model.gguf"))];
        let quantised = fixture(&format!("gguf/{}-q8_0.gguf", family.name()));
        let files = twin.into_iter().chain([quantised]).filter(|path| path.is_file());
        files
            .map(|path| {
                let file = draftsmith_formats::gguf::GgufFile::open(path).unwrap();
                let down = file.tensors().iter().find(|t| t.name.contains("ffn_down"));
                down.expect("an MLP").ggml_type.to_string()
            })
            .collect()
    };
    let mut text = String::from(
        "| family | `model_type` | safetensors | `general.architecture` | GGUF | RoPE | what the fixtures have |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for family in Family::ALL {
        let (mut dtypes, mut types, mut ropes, mut traits) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new(), Vec::new());
        let mut model_type = String::new();
        let dense = FOLDERS.iter().map(|name| format!("families/{name}"));
        for name in dense.chain(EXPERTS.iter().map(|name| format!("experts/{name}"))) {
            let folder = fixture(&name);
            let hf = HfConfig::open(&folder).unwrap();
            let config = TargetConfig::from_hf(&hf).unwrap();
            if config.family != family {
                continue;
            }
            model_type = hf.get_str("model_type").unwrap().to_owned();
            let quantised = hf.find_table("quantization_config").unwrap();
            dtypes.insert(match &quantised {
                Some(table) => table.get_str("quant_method").unwrap().to_owned(),
                None => hf.get_str("dtype").unwrap().to_owned(),
            });
            ropes.insert(rope_type(&folder));
            for found in traits_of(&config) {
                if !traits.contains(&found) {
                    traits.push(found);
                }
            }
            types.extend(gguf(family, &name));
        }
        assert!(!dtypes.is_empty() && !types.is_empty(), "{} has no fixture", family.name());
        let list = |items: &mut dyn Iterator<Item = &str>| items.collect::<Vec<_>>().join(", ");
        text += &format!(
            "| {} | `{model_type}` | {} | `{}` | {} | {} | {} |\n",
            family.name(),
            list(&mut dtypes.iter().map(String::as_str)),
            family.gguf_architecture(),
            list(&mut types.iter().map(String::as_str)),
            list(&mut ropes.iter().map(String::as_str)),
            list(&mut traits.iter().map(String::as_str)),
        );
    }
    text
}

#[test]
fn the_table_of_models_lists_what_the_fixtures_prove() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/MODELS.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- families -->\n", "<!-- /families -->");
    let (head, rest) = page.split_once(begin).expect("the page has its marks");
    let (_, tail) = rest.split_once(end).expect("the page has its marks");
    let wanted = format!("{head}{begin}{}{end}{tail}", table_of_models());
    if std::env::var_os("UPDATE_PAGES").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    } else {
        assert!(page == wanted, "docs/MODELS.md is not current: run this test with UPDATE_PAGES=1");
    }
}
