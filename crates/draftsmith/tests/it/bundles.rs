//! Bundles in and out of other engines' layouts, and looked at: what the user sees.

use std::collections::BTreeMap;

use draftsmith::bundle::Manifest;
use draftsmith::core::VocabMap;
use draftsmith::formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use draftsmith::model::TargetConfig;
use draftsmith::model::eagle3::Eagle3Config;
use draftsmith::target::TargetText;
use draftsmith::train::DraftWeights;
use draftsmith::train::eagle3::random_weights;
use insta::assert_snapshot;

use crate::support::{Home, repository};

pub(crate) fn target() -> String {
    repository().join("fixtures/tiny-target").display().to_string()
}

/// A draft folder for the tiny target, as somebody else would hand it over.
pub(crate) fn foreign_draft(home: &Home, change: impl FnOnce(&mut Eagle3Config)) {
    let path = repository().join("fixtures/tiny-target/config.json");
    let hf = draftsmith::formats::hf_config::HfConfig::open(&path).unwrap();
    let mut config = Eagle3Config::for_target(&TargetConfig::from_hf(&hf).unwrap(), 64);
    change(&mut config);
    let mut tensors = random_weights(&config, 1);
    // Trained weights do not have the spread of initial ones.
    let matrices = tensors.iter_mut().filter(|t| t.shape.len() > 1);
    matrices.flat_map(|t| &mut t.values).for_each(|x| *x *= 2.0);
    let ids: Vec<u32> = (0..64).map(|i| 7 * i).collect();
    let weights = DraftWeights {
        method: "eagle3",
        config: config.to_value().unwrap(),
        tensors,
        vocab_map: Some(VocabMap::from_target_ids(&ids, config.vocab_size).unwrap()),
    };
    weights.save(&home.path().join("theirs")).unwrap();
}

fn import<'a>(target: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["bundle", "import", "theirs", "--target", target, "--out", "bundle", "-q"], more].concat()
}

/// A home with a bundle of an imported draft in it.
pub(crate) fn with_bundle() -> Home {
    let home = Home::new();
    foreign_draft(&home, |_| {});
    let made = home.run(&import(&target(), &["--base-model", "org/tiny", "--license", "CC0-1.0"]));
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    home
}

#[test]
fn an_import_says_which_tensors_lose_bits() {
    let home = Home::new();
    let rounded = |draft: &str| {
        let args =
            ["bundle", "import", draft, "--target", &target(), "--out", "bundle", "--replace", "--json"];
        let made =
            home.run(&[args.as_slice(), &["--base-model", "org/tiny", "--license", "CC0-1.0"]].concat());
        let names = made.json()["rounded_to_bf16"].as_array().unwrap().len();
        (names, made.stderr.contains("are rounded to bf16, among them `fc.weight`"))
    };
    foreign_draft(&home, |_| {});
    assert_eq!(rounded("theirs"), (0, false), "bf16 stays as it is");
    let path = home.path().join("theirs/model.safetensors");
    let file = SafetensorsDir::open(&path).unwrap();
    let wider = |name: &str| {
        let tensor = file.get(name).unwrap();
        match (tensor.dtype, name) {
            (Dtype::I64, _) => TensorData::i64(name, tensor.shape, &tensor.to_i64().unwrap()),
            (Dtype::BOOL, _) => TensorData::bool(name, tensor.shape, &tensor.to_bool().unwrap()),
            (_, "norm.weight") => TensorData::f32(name, tensor.shape, &tensor.to_f32().unwrap()),
            _ => {
                let values: Vec<f32> = tensor.to_f32().unwrap().iter().map(|v| v * 1.001).collect();
                TensorData::f32(name, tensor.shape, &values)
            }
        }
    };
    let tensors: Vec<TensorData> = file.names().map(wider).collect();
    let matrices = tensors.len() - 3; // without the norm that is still exact, `d2t` and `t2d`
    std::fs::write(&path, to_bytes(&tensors, &BTreeMap::new())).unwrap();
    assert_eq!(rounded("theirs"), (matrices, true));
}

#[test]
fn an_imported_draft_is_a_bundle_that_checks_exports_and_decodes() {
    let home = with_bundle();
    let manifest = Manifest::read(home.path().join("bundle")).unwrap();
    assert_eq!((manifest.name.as_str(), manifest.license.as_str()), ("theirs", "CC0-1.0"));
    assert_eq!(manifest.target.hub_name.as_deref(), Some("org/tiny"));
    assert_eq!(manifest.imported.unwrap().layout, "sglang");
    let target = target();
    let checked = home.run(&["bundle", "check", "bundle", "--target", &target, "--json"]).json();
    assert_eq!(checked["holds"], true);
    for format in ["sglang", "vllm", "speculators", "gguf"] {
        let args = [
            "bundle", "export", "bundle", "--format", format, "--out", format, "--target", &target, "--json",
        ];
        let exported = home.run(&args).json();
        assert!(exported["launch"][0]["command"].as_str().unwrap().contains(format), "{exported}");
        let same = home.run(&["bundle", "verify-export", format, "--bundle", "bundle", "--json"]).json();
        assert_eq!(same["holds"], true, "{same}");
    }
    // The tokenizer that the GGUF draft carries is the target's.
    let carried = TargetText::open(&home.path().join("gguf/draft.gguf"), None).unwrap();
    let own = TargetText::open(target.as_ref(), None).unwrap();
    for text in ["Calculate 22 + 20.", "it's  1234\n\nÜ 日本 <|im_end|>"] {
        assert_eq!(carried.tokenizer.encode(text, true).unwrap(), own.tokenizer.encode(text, true).unwrap());
    }
    assert!(carried.template.is_some() == own.template.is_some());
    let args = ["generate", "--target", &target, "--bundle", "bundle", "--prompt", "Calculate 2 + 3."];
    let proved =
        home.run(&[args.as_slice(), &["--depth", "3", "--prove", "--max-new-tokens", "12"]].concat());
    assert_eq!(proved.code, Some(0), "{}", proved.stderr);
}

#[test]
fn drafts_that_cannot_be_imported_are_named() {
    let home = Home::new();
    assert_snapshot!(home.snapshot(&import(&target(), &[])));
    home.write("theirs/readme.txt", "no draft");
    assert_snapshot!(home.snapshot(&import(&target(), &[])));

    let home = Home::new();
    foreign_draft(&home, |_| {});
    assert_snapshot!(home.snapshot(&import(&target(), &["--layers", "1,2"])));
    assert_snapshot!(home.snapshot(&import(&target(), &["--base-model", "https://org/tiny"])));
    let weights = home.path().join("theirs/model.safetensors");
    let open = SafetensorsDir::open(&weights).unwrap();
    let tensors: Vec<TensorData> = open
        .names()
        .filter(|name| *name != "fc.weight")
        .map(|name| {
            let t = open.get(name).unwrap();
            TensorData { name: name.into(), dtype: t.dtype, shape: t.shape.to_vec(), bytes: t.bytes.to_vec() }
        })
        .collect();
    draftsmith::formats::safetensors_dir::write(&weights, &tensors, &Default::default()).unwrap();
    assert_snapshot!(home.snapshot(&import(&target(), &[])));

    let home = Home::new();
    foreign_draft(&home, |config| config.target_hidden_size = 64);
    assert_snapshot!(home.snapshot(&import(&target(), &[])));
}

#[test]
fn exports_that_cannot_be_made_are_named() {
    let home = with_bundle();
    let export = |more: &[&str]| home.snapshot(&[&["bundle", "export"], more].concat());
    assert_snapshot!(export(&["theirs", "--format", "vllm", "--out", "out"]));
    assert_snapshot!(export(&["bundle", "--format", "gguf", "--out", "out"]));
    assert_snapshot!(export(&["bundle", "--format", "vllm", "--out", "theirs"]));
    assert_snapshot!(export(&["bundle", "--format", "onnx", "--out", "out"]));
}

#[test]
fn an_export_that_is_not_the_bundles_ends_with_1_and_says_where() {
    let home = with_bundle();
    assert_snapshot!(home.snapshot(&["bundle", "export", "bundle", "--format", "vllm", "--out", "vllm"]));
    let path = home.path().join("vllm/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_snapshot!(home.snapshot(&["bundle", "verify-export", "vllm", "--bundle", "bundle"]));
    assert_snapshot!(home.snapshot(&["bundle", "verify-export", "nowhere", "--bundle", "bundle"]));
}

#[test]
fn a_card_is_written_anew_with_the_measured_setting() {
    let home = with_bundle();
    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    let target = target();
    let args = ["bench", "--bundle", "bundle", "--target", &target, "--workload", &workload, "--limit", "2"];
    let measured =
        home.run(&[args.as_slice(), &["--depth", "2", "--max-new-tokens", "8", "--report", "m"]].concat());
    assert_eq!(measured.code, Some(0), "{}", measured.stderr);
    let before = std::fs::read(home.path().join("bundle/model.safetensors")).unwrap();
    let card = home.run(&["bundle", "card", "bundle", "--record", "m/eval.json", "--json"]).json();
    assert_eq!(card["recommended"]["depth"], 2, "{card}");
    assert!(card["recommended"]["because"].as_str().unwrap().contains("measured on eval"), "{card}");
    let readme = std::fs::read_to_string(home.path().join("bundle/README.md")).unwrap();
    assert!(readme.contains("--speculative-num-steps 2") && readme.contains("## Measured"), "{readme}");
    assert!(before == std::fs::read(home.path().join("bundle/model.safetensors")).unwrap());
    let report = |path: &str| std::fs::read(home.path().join(path)).unwrap();
    assert!(
        report("bundle/results/report.html") == report("m/report.html"),
        "the report shows other records"
    );
    assert_eq!(home.run(&["bundle", "check", "bundle", "--json"]).json()["holds"], true);
    // Once more from its own records: the same.
    let again = home.run(&["bundle", "card", "bundle", "--json"]).json();
    assert_eq!(again, card);
}

#[test]
fn whatever_lies_at_a_path_is_shown_as_a_tree() {
    let home = with_bundle();
    assert_snapshot!(home.snapshot(&["inspect", "theirs"]));
    assert_snapshot!(home.snapshot(&["inspect", "nowhere"]));
    home.write("broken.gguf", "GGUF");
    assert_snapshot!(home.snapshot(&["inspect", "broken.gguf"]));
    let shown = home.run(&["inspect", "bundle", "--json"]).json();
    assert_eq!(
        (shown["kind"].as_str(), shown["facts"]["license"].as_str()),
        (Some("bundle"), Some("CC0-1.0"))
    );
    let files = shown["children"].as_array().unwrap();
    let weights = files.iter().find(|f| f["name"] == "model.safetensors").unwrap();
    let manifest = Manifest::read(home.path().join("bundle")).unwrap();
    let listed = manifest.files.iter().find(|f| f.path == "model.safetensors").unwrap();
    assert_eq!(weights["sha256"], listed.sha256);
    let gguf = repository().join("fixtures/gguf/llama-q8_0.gguf").display().to_string();
    let shown = home.run(&["inspect", &gguf, "--no-hashes", "--json"]).json();
    assert_eq!((shown["kind"].as_str(), shown.get("sha256")), (Some("gguf"), None));
    assert_eq!(shown["facts"]["general.architecture"], "llama");
}
