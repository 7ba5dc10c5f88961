//! A bundle's EAGLE-3 draft in the layout of another engine.

use std::collections::BTreeMap;

use draftsmith_core::LayerId;
use draftsmith_formats::gguf::{GgmlType, GgufWriter};
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use draftsmith_model::eagle3::{ARCHITECTURES, Eagle3Config};
use draftsmith_model::{DraftConfigError, rope_pairs_from_halves};
use serde_json::{Map, Value, json};

use super::{gguf, tensor_name};
use crate::BundleError;
use crate::foreign::{GGUF_FILE, Layout, SPECULATORS_VERSION, TargetFacts};
use crate::layout::{TensorSpec, expected_tensors};
use crate::manifest::{CONFIG_FILE, Manifest, WEIGHTS_FILE};

/// The files of a layout that hold the draft, from a checked bundle whose configuration names the layers.
pub(crate) fn files(
    config: &Eagle3Config,
    layout: Layout,
    manifest: &Manifest,
    weights: &SafetensorsDir,
    target: Option<&TargetFacts<'_>>,
) -> Result<BTreeMap<String, Vec<u8>>, BundleError> {
    let layers = config.layers(manifest.target.num_layers as u32);
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    match layout {
        Layout::Gguf => {
            let tokenizer = target.map_or(&[][..], |t| t.tokenizer);
            if tokenizer.is_empty() {
                return Err(BundleError::NoTokenizer);
            }
            let mut writer = Gguf::new(config, weights)?;
            writer.keys = gguf::metadata(config, &manifest.name, &manifest.license, layers);
            writer.keys.extend(tokenizer.iter().cloned());
            files.insert(GGUF_FILE.into(), writer.to_bytes());
        }
        Layout::Sglang | Layout::Vllm | Layout::Speculators => {
            let value = match layout {
                Layout::Speculators => speculators_config(config, manifest, layers, target),
                _ => config.to_value().map(|value| one_numbering(value, layout)),
            };
            let value = value.map_err(|source| BundleError::Config { path: CONFIG_FILE.into(), source })?;
            files.insert(CONFIG_FILE.into(), format!("{value:#}\n").into());
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            files.insert(WEIGHTS_FILE.into(), to_bytes(&renamed(config, weights, layout)?, &metadata));
        }
    }
    Ok(files)
}

fn specs(config: &Eagle3Config) -> Vec<TensorSpec> {
    expected_tensors(config)
}

/// The bundle's tensors under the layout's names, bytes as they are.
fn renamed(
    config: &Eagle3Config,
    weights: &SafetensorsDir,
    layout: Layout,
) -> Result<Vec<TensorData>, BundleError> {
    specs(config)
        .into_iter()
        .filter_map(|spec| Some((tensor_name(layout, &spec.name)?.into_owned(), spec)))
        .map(|(name, spec)| {
            let tensor = weights.get(&spec.name)?;
            Ok(TensorData { name, dtype: tensor.dtype, shape: spec.shape, bytes: tensor.bytes.to_vec() })
        })
        .collect()
}

/// A configuration with only the key that the layout's engines number layers by, and without `null`: some loaders
/// expect a number where they find a key [ecosystem §1].
fn one_numbering(mut value: Value, layout: Layout) -> Value {
    let object = value.as_object_mut().expect("a configuration is an object");
    object.retain(|_, value| !value.is_null());
    match layout {
        Layout::Vllm => {
            object.remove("eagle_config");
            object.insert("architectures".into(), json!([ARCHITECTURES[1]]));
        }
        Layout::Sglang | Layout::Speculators | Layout::Gguf => {
            object.remove("eagle_aux_hidden_state_layer_ids");
        }
    }
    value
}

/// The nested configuration of the `speculators` library [formats §1.4].
fn speculators_config(
    config: &Eagle3Config,
    manifest: &Manifest,
    layers: [u32; 3],
    target: Option<&TargetFacts<'_>>,
) -> Result<Value, DraftConfigError> {
    let mut layer = one_numbering(config.to_value()?, Layout::Speculators);
    let object = layer.as_object_mut().expect("a configuration is an object");
    let mut own = Map::new();
    for key in ["draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"] {
        own.insert(key.into(), object.remove(key).unwrap_or(Value::Bool(false)));
    }
    for key in ["eagle_config", "target_hidden_size"] {
        object.remove(key);
    }
    object.insert("architectures".into(), json!(["LlamaForCausalLM"]));
    let architectures: Vec<&str> = target.map(|t| t.config.family.architecture()).into_iter().collect();
    let mut value = json!({
        "architectures": [ARCHITECTURES[2]],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": "bfloat16",
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": layers.map(|id| LayerId(id).as_next_input()),
        "embed_requires_grad": false,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{
                "proposal_type": "greedy",
                "speculative_tokens": manifest.recommended.depth,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }],
            "verifier": { "name_or_path": manifest.target.hub_name, "architectures": architectures },
        },
    });
    value.as_object_mut().expect("built as an object").extend(own);
    Ok(value)
}

/// The parts of a GGUF file; the writer borrows the tensors' bytes.
struct Gguf {
    keys: Vec<(String, draftsmith_formats::gguf::GgufValue)>,
    tensors: Vec<(&'static str, Vec<usize>, GgmlType, Vec<u8>)>,
}

impl Gguf {
    /// The tensors of a checked bundle: matrices as they are (q and k in the other RoPE order), norms as F32, `d2t`
    /// as target ids.
    fn new(config: &Eagle3Config, weights: &SafetensorsDir) -> Result<Gguf, BundleError> {
        let f32_bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors = Vec::new();
        for spec in specs(config) {
            let Some(name) = gguf::tensor_name(&spec.name) else { continue };
            let tensor = weights.get(&spec.name)?;
            let dims: Vec<usize> = spec.shape.iter().rev().copied().collect();
            let (ggml_type, bytes) = match (spec.dtype, &spec.shape[..]) {
                (Dtype::I64, _) => {
                    let ids = tensor.to_i64()?;
                    let targets = ids.iter().enumerate().map(|(draft, offset)| draft as i64 + offset);
                    (GgmlType::I64, targets.flat_map(i64::to_le_bytes).collect())
                }
                (_, [_]) => (GgmlType::F32, f32_bytes(&tensor.to_f32()?)),
                (_, [rows, ..]) if gguf::is_rotated(&spec.name) => {
                    (GgmlType::BF16, rope_pairs_from_halves(tensor.bytes, *rows, config.head_dim))
                }
                _ => (GgmlType::BF16, tensor.bytes.to_vec()),
            };
            tensors.push((name, dims, ggml_type, bytes));
        }
        if let Some(divisors) = gguf::rope_divisors(config) {
            tensors.push((gguf::ROPE_FREQS, vec![divisors.len()], GgmlType::F32, f32_bytes(&divisors)));
        }
        Ok(Gguf { keys: Vec::new(), tensors })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.keys {
            writer.set(key.clone(), value.clone());
        }
        for (name, dims, ggml_type, bytes) in &self.tensors {
            writer.tensor(*name, dims, *ggml_type, bytes);
        }
        writer.to_bytes()
    }
}
