//! Bundles whose weights lie in 8 bits: half as long, one draft for whoever reads them, and told where they are spoilt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_bundle::{
    Existing, ExportInput, Layout, MakeInput, Manifest, check_alone, check_with_target, export, input_of,
    make_with_target, remake, verify_export,
};
use draftsmith_formats::mxint8;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes, write};
use draftsmith_kernels::Cpu;
use draftsmith_model::{Target, read_draft};
use serde_json::{Value, json};

use crate::support::{bundle_tensors, facts, fails_with, input, relist, target, write_draft};

fn made() -> (tempfile::TempDir, PathBuf, Target<Cpu>) {
    let root = tempfile::tempdir().unwrap();
    let target = target();
    write_draft(&root.path().join("checkpoint"), &target, &json!({}));
    let input = MakeInput { weights: BundleWeights::Mxint8, ..input(root.path(), &target) };
    let made = make_with_target(&input, &target).unwrap();
    (root, made.path, target)
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_bundle_in_8_bits_is_the_rounded_checkpoint_at_half_the_length() {
    let (root, dir, target) = made();
    let report = check_with_target(&dir, &facts(&target), &target).unwrap();
    assert!(report.holds, "{}", report.text());
    assert!(report.text().contains("keys, for draftsmith; engines load an export"), "{}", report.text());
    assert_eq!(Manifest::read(&dir).unwrap().draft.dtype, "mxint8");
    assert_eq!(config_of(&dir)["quantization_config"], json!({"quant_method": "mxint8", "group_size": 32}));

    let (_, checkpoint, _) = read_draft(&root.path().join("checkpoint")).unwrap();
    let (_, bundled, _) = read_draft(&dir).unwrap();
    assert_eq!(bundled.keys().collect::<Vec<_>>(), checkpoint.keys().collect::<Vec<_>>());
    let mut narrowed = 0;
    for (name, (shape, values)) in &checkpoint {
        let (found_shape, found) = &bundled[name];
        let wanted: Vec<f32> = match mxint8::fits(shape) {
            true => rounded(name, shape, values),
            false => values.iter().map(|x| half(*x)).collect(),
        };
        narrowed += usize::from(mxint8::fits(shape));
        assert!(found_shape == shape && *found == wanted, "{name}");
    }
    assert_eq!(narrowed, checkpoint.values().filter(|(shape, _)| shape.len() == 2).count());

    let bf16 = root.path().join("bf16");
    make_with_target(&MakeInput { out: bf16.clone(), ..input(root.path(), &target) }, &target).unwrap();
    let long = |dir: &Path| -> usize {
        bundle_tensors(dir)
            .iter()
            .filter(|t| !matches!(t.dtype, Dtype::I64 | Dtype::BOOL))
            .map(|t| t.bytes.len())
            .sum()
    };
    let ratio = long(&dir) as f64 / long(&bf16) as f64;
    assert!((0.5..0.53).contains(&ratio), "{ratio}");
}

/// What 8 bits leave of a matrix.
fn rounded(name: &str, shape: &[usize], values: &[f32]) -> Vec<f32> {
    let file = to_bytes(&mxint8::narrow(name, shape, values), &BTreeMap::new());
    let wide = mxint8::widened(SafetensorsDir::from_bytes("", file).unwrap()).unwrap();
    wide.get(name).unwrap().to_f32().unwrap()
}

/// To bf16, nearest even.
fn half(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[test]
fn engines_get_the_same_numbers_in_bf16() {
    let (_root, dir, target) = made();
    let (_, bundled, _) = read_draft(&dir).unwrap();
    for layout in [Layout::Sglang, Layout::Vllm] {
        let out = dir.with_file_name(layout.name());
        export(&ExportInput { bundle: &dir, layout, out: &out, existing: Existing::Refuse, target: None })
            .unwrap();
        assert!(config_of(&out).get("quantization_config").is_none());
        let report = verify_export(&out, &dir, target.kernels().as_ref()).unwrap();
        assert!(report.holds, "{}", report.text());
        assert!(bundle_tensors(&out).iter().all(|t| !matches!(t.dtype, Dtype::I8 | Dtype::F8_E8M0)));
        if layout == Layout::Sglang {
            let (_, exported, _) = read_draft(&out).unwrap();
            assert!(exported == bundled);
        }
    }
    let card = std::fs::read_to_string(dir.join("README.md")).unwrap();
    assert!(card.contains("draftsmith bundle export DIR --format sglang --out DIR-sglang"), "{card}");
    assert!(card.contains("parameters in mxint8"), "{card}");
}

#[test]
fn made_again_from_itself_it_stays_as_it_is() {
    let (_root, dir, _) = made();
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let before: Vec<Vec<u8>> = ["model.safetensors", "probe.safetensors", "config.json"].map(read).into();
    let input = input_of(&dir).unwrap();
    assert_eq!(input.weights, BundleWeights::Mxint8);
    remake(&input).unwrap();
    assert!(before == ["model.safetensors", "probe.safetensors", "config.json"].map(read));
    assert!(check_alone(&dir, &Cpu::new(1)).unwrap().holds);
}

#[test]
fn what_lies_otherwise_than_the_bundle_says_is_named() {
    let cpu = Cpu::new(1);
    let spoil = |edit: &dyn Fn(&Path)| {
        let (root, dir, _) = made();
        edit(&dir);
        (check_alone(&dir, &cpu).unwrap(), root)
    };
    let with = |dir: &Path, tensors: &[TensorData]| {
        write(dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
        relist(dir);
    };
    let (report, _root) = spoil(&|dir| {
        let without: Vec<_> =
            bundle_tensors(dir).into_iter().filter(|t| t.name != "fc.weight_scale").collect();
        with(dir, &without);
    });
    fails_with(&report, "weights", "`fc.weight_scale` is missing");
    let (report, _root) = spoil(&|dir| {
        let wide = mxint8::open(dir).unwrap();
        let fc = wide.get("fc.weight").unwrap();
        let mut all: Vec<_> =
            bundle_tensors(dir).into_iter().filter(|t| !t.name.starts_with("fc.weight")).collect();
        all.push(TensorData::bf16("fc.weight", fc.shape, &fc.to_f32().unwrap()));
        with(dir, &all);
    });
    fails_with(&report, "tensor_dtype", "`fc.weight`");
    let (report, _root) = spoil(&|dir| {
        let mut manifest = Manifest::read(dir).unwrap();
        manifest.draft.dtype = "bfloat16".into();
        std::fs::write(dir.join("bundle.json"), manifest.to_json().unwrap()).unwrap();
    });
    fails_with(&report, "manifest_disagrees", "draft.dtype is bfloat16, `config.json` says mxint8");
    fails_with(&report, "tensor_dtype", "`fc.weight`");
    let (report, _root) = spoil(&|dir| {
        let mut config = config_of(dir);
        config.as_object_mut().unwrap().remove("quantization_config");
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        relist(dir);
    });
    fails_with(&report, "manifest_disagrees", "draft.dtype is mxint8, `config.json` says bfloat16");
    // A power that is no number makes its whole block none.
    let (report, _root) = spoil(&|dir| {
        let mut all = bundle_tensors(dir);
        all.iter_mut().find(|t| t.name == "fc.weight_scale").unwrap().bytes[3] = 255;
        with(dir, &all);
    });
    fails_with(&report, "tensor_not_finite", "`fc.weight`");
    // Another power is another draft, as the probe tells.
    let (report, _root) = spoil(&|dir| {
        let mut all = bundle_tensors(dir);
        let scale = all.iter_mut().find(|t| t.name == "fc.weight_scale").unwrap();
        scale.bytes.iter_mut().for_each(|exponent| *exponent += 1);
        with(dir, &all);
    });
    fails_with(&report, "probe_differs", "");
}
