//! A bundle's DFlash, DSpark or P-EAGLE draft in the layout of another engine.

use std::collections::BTreeMap;

use draftsmith_core::LayerId;
use draftsmith_formats::gguf::{GgmlType, GgufWriter};
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use draftsmith_model::DraftConfigError;
use draftsmith_model::block::BlockConfig;
use serde_json::{Map, Value, json};

use super::{MARKOV_ROWS, Parallel, gguf, whole};
use crate::BundleError;
use crate::foreign::{GGUF_FILE, Layout, SPECULATORS_VERSION, TargetFacts};
use crate::layout::{expected_tensors, vocab_map};
use crate::manifest::{CONFIG_FILE, Manifest, WEIGHTS_FILE};

/// The layers, counted from 1.
const LAYERS_KEY: &str = "eagle_aux_hidden_state_layer_ids";

/// The files of a layout that hold the draft, from a checked bundle whose configuration names the layers.
pub(crate) fn files(
    draft: &Parallel<'_>,
    layout: Layout,
    manifest: &Manifest,
    weights: &SafetensorsDir,
    target: Option<&TargetFacts<'_>>,
) -> Result<BTreeMap<String, Vec<u8>>, BundleError> {
    let layers = draft.layers(manifest.target.num_layers as u32);
    let tensors = tensors(draft, weights)?;
    let draft = whole(draft);
    if layout == Layout::Gguf {
        let Parallel::Block(block) = &draft else {
            return Err(BundleError::NoLayout { method: draft.name(), layout: layout.name() });
        };
        let tokenizer = target.map_or(&[][..], |t| t.tokenizer);
        if tokenizer.is_empty() {
            return Err(BundleError::NoTokenizer);
        }
        let bytes = gguf_bytes(block, manifest, &layers, tokenizer, &tensors);
        return Ok(BTreeMap::from([(GGUF_FILE.to_owned(), bytes)]));
    }
    let value = match layout {
        Layout::Speculators => speculators_config(&draft, manifest, &layers, target),
        _ => flat_config(&draft, layout, &layers),
    };
    let value = value.map_err(|source| BundleError::Config { path: CONFIG_FILE.into(), source })?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(BTreeMap::from([
        (CONFIG_FILE.to_owned(), format!("{value:#}\n").into()),
        (WEIGHTS_FILE.to_owned(), to_bytes(&tensors, &metadata)),
    ]))
}

/// The draft's tensors under their internal names, for the whole vocabulary where the head is the target's.
fn tensors(draft: &Parallel<'_>, weights: &SafetensorsDir) -> Result<Vec<TensorData>, BundleError> {
    // Checked before: a map that contradicts itself was told.
    let ids = vocab_map(&**draft, weights).and_then(Result::ok);
    let ids = ids.as_ref().filter(|_| matches!(draft, Parallel::Block(_)));
    expected_tensors(&*whole(draft))
        .into_iter()
        .map(|spec| {
            let tensor = weights.get(&spec.name)?;
            let bytes = match ids.filter(|_| spec.name == MARKOV_ROWS) {
                None => tensor.bytes.to_vec(),
                Some(ids) => {
                    let row = tensor.bytes.len() / ids.draft_vocab().max(1);
                    let mut bytes = vec![0; ids.target_vocab() * row];
                    for (id, values) in ids.target_ids().iter().zip(tensor.bytes.chunks_exact(row)) {
                        bytes[*id as usize * row..][..row].copy_from_slice(values);
                    }
                    bytes
                }
            };
            Ok(TensorData { name: spec.name, dtype: tensor.dtype, shape: spec.shape, bytes })
        })
        .collect()
}

fn gguf_bytes(
    config: &BlockConfig,
    manifest: &Manifest,
    layers: &[u32],
    tokenizer: &[(String, draftsmith_formats::gguf::GgufValue)],
    tensors: &[TensorData],
) -> Vec<u8> {
    let mut keys = gguf::metadata(config, &manifest.name, &manifest.license, layers);
    // The draft's own mask token, whatever the target's tokenizer has.
    keys.extend(tokenizer.iter().filter(|(key, _)| key != gguf::MASK_TOKEN).cloned());
    let narrow = |tensor: &TensorData| -> Vec<u8> {
        // bf16 is the upper half of an f32.
        tensor.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect()
    };
    let stored: Vec<_> = tensors
        .iter()
        .filter_map(|tensor| {
            let name = gguf::tensor_name(&tensor.name)?;
            let dims: Vec<usize> = tensor.shape.iter().rev().copied().collect();
            let (ggml_type, bytes) = match (tensor.shape.len(), tensor.dtype) {
                (1, Dtype::BF16) => (GgmlType::F32, narrow(tensor)),
                _ => (GgmlType::BF16, tensor.bytes.clone()),
            };
            Some((name, dims, ggml_type, bytes))
        })
        .collect();
    let mut writer = GgufWriter::new();
    for (key, value) in &keys {
        writer.set(key.clone(), value.clone());
    }
    for (name, dims, ggml_type, bytes) in &stored {
        writer.tensor(name.clone(), dims, *ggml_type, bytes);
    }
    writer.to_bytes()
}

fn read_by(layers: &[u32]) -> Vec<u32> {
    layers.iter().map(|id| LayerId(*id).as_next_input()).collect()
}

fn object(value: &mut Value) -> &mut Map<String, Value> {
    value.as_object_mut().expect("a configuration is an object")
}

/// The `config.json` of SpecForge and SGLang, or of vLLM, without `null`: some loaders expect a number where they find a
/// key [ecosystem §1].
fn flat_config(draft: &Parallel<'_>, layout: Layout, layers: &[u32]) -> Result<Value, DraftConfigError> {
    let mut value = draft.to_value()?;
    object(&mut value).retain(|_, value| !value.is_null());
    if layout == Layout::Vllm {
        match draft {
            Parallel::Block(block) => {
                // DFlash reads the nested keys, DSpark those at the top; both count from 0. A nested `true` stops DSpark:
                // vLLM 0.32.0 starts it as a DFlash draft, which must not propose from the anchor.
                let from_anchor = json!(block.spark.is_some());
                if block.spark.is_none() {
                    value["dflash_config"]["sample_from_anchor"] = from_anchor.clone();
                }
                value["sample_from_anchor"] = from_anchor;
                value["target_layer_ids"] = json!(layers);
                value["mask_token_id"] = json!(block.mask_token_id);
            }
            Parallel::PEagle(_) => {
                object(&mut value).remove("eagle_config");
                // vLLM 0.32.0 puts `Eagle3` before every other name, and has no network for what comes of it.
                value["architectures"] = json!(["Eagle3LlamaForCausalLM"]);
            }
        }
    } else if matches!(draft, Parallel::PEagle(_)) {
        object(&mut value).remove(LAYERS_KEY);
    }
    Ok(value)
}

/// The nested configuration of the `speculators` library [formats §1.4].
fn speculators_config(
    draft: &Parallel<'_>,
    manifest: &Manifest,
    layers: &[u32],
    target: Option<&TargetFacts<'_>>,
) -> Result<Value, DraftConfigError> {
    let mut layer = flat_config(draft, Layout::Sglang, layers)?;
    let flat = object(&mut layer);
    let mut take = |key: &str| flat.remove(key);
    let mut own = Map::new();
    // What is the draft's, not the layer's.
    for key in [
        "block_size",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
        "norm_before_residual",
        "num_depths",
    ] {
        own.extend(take(key).map(|value| (key.to_owned(), value)));
    }
    for key in [
        "dflash_config",
        "eagle_config",
        "draft_vocab_size",
        "target_hidden_size",
        "num_target_layers",
        "pard_token",
        "ptd_token_id",
    ] {
        take(key);
    }
    let (kind, architecture, class, mask, tokens) = match draft {
        Parallel::Block(block) => {
            own.insert("aux_hidden_state_layer_ids".into(), json!(read_by(layers)));
            own.insert("sample_from_anchor".into(), json!(block.spark.is_some()));
            // Of sliding layers; without one the engine takes the switch for all others.
            own.insert("sliding_window_non_causal".into(), json!(!block.sliding.contains(&true)));
            let (kind, architecture) = match block.spark {
                Some(_) => ("dspark", "DSparkSpeculator"),
                None => ("dflash", "DFlashSpeculator"),
            };
            (kind, architecture, "Qwen3ForCausalLM", block.mask_token_id, block.proposals())
        }
        Parallel::PEagle(config) => {
            own.insert(LAYERS_KEY.into(), json!(read_by(layers)));
            for key in ["norm_before_fc", "fc_norm", "norm_output"] {
                own.insert(key.into(), json!(false));
            }
            // Its embedding was trained.
            own.insert("embed_requires_grad".into(), json!(true));
            ("peagle", "PEagleSpeculator", "LlamaForCausalLM", config.mask_token_id, config.num_depths)
        }
    };
    layer["architectures"] = json!([class]);
    let architectures: Vec<&str> = target.map(|t| t.config.family.architecture()).into_iter().collect();
    let mut value = json!({
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": "bfloat16",
        "draft_vocab_size": draft.shape().draft_vocab_size,
        "target_hidden_size": draft.shape().target_hidden_size,
        "mask_token_id": mask,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{
                "proposal_type": "greedy",
                "speculative_tokens": tokens,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            }],
            "verifier": { "name_or_path": manifest.target.hub_name, "architectures": architectures },
        },
    });
    object(&mut value).extend(own);
    Ok(value)
}
