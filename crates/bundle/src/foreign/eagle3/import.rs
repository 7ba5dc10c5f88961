//! Readers of EAGLE-3 drafts in the layouts of others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_core::VocabMap;
use draftsmith_formats::gguf::{GgmlType, GgufFile};
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir};
use draftsmith_kernels::{RopeScaling, WeightView, quant};
use draftsmith_model::eagle3::{Eagle3Config, LAYERS_KEY};
use draftsmith_model::{DraftConfig, DraftConfigError, DraftTensors, rope_halves_from_pairs, weight_dtype};
use serde_json::{Map, Value};

use super::{gguf, tensor_name};
use crate::foreign::import::{EMBEDDING, Imported};
use crate::foreign::Layout;
use crate::layout::expected_tensors;
use crate::manifest::CONFIG_FILE;
use crate::{BundleError, Problem};

/// Types of trained weights that are read.
const FLOATS: &str = "F32, F16 or BF16";
/// Tensors that published drafts carry beside the network: the target's own, and tables that follow from the
/// configuration.
const NOT_THE_DRAFTS: [&str; 3] =
    ["verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq"];
/// Largest target vocabulary that is believed: `t2d`, which would prove it, may be missing. Four times that of any
/// published model.
const VOCAB_MAX: usize = 1 << 20;

/// A tensor of a foreign file under its internal name.
struct Found {
    /// As the file calls it.
    name: String,
    shape: Vec<usize>,
    /// Its type as the file calls it.
    dtype: String,
    values: Values,
}

enum Values {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
    Flags(Vec<bool>),
    /// Of a type that no draft has.
    Other,
}

/// Three layers that hold whatever a configuration says.
fn three(layers: Option<&[u32]>) -> Result<Option<[u32; 3]>, BundleError> {
    let count = |layers: &[u32]| BundleError::LayerCount { found: layers.len(), wanted: 3 };
    layers.map(|layers| layers.try_into().map_err(|_| count(layers))).transpose()
}

/// Reads a draft from the text of its `config.json` and its weights.
pub(crate) fn from_safetensors(
    path: &Path,
    config: &[u8],
    open: &SafetensorsDir,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let layers = three(layers)?;
    let refused = |problems| BundleError::draft(path, "imported", problems);
    let bad = |e: DraftConfigError| {
        refused(vec![Problem::Config { message: format!("`{CONFIG_FILE}`: {e}"), hint: e.hint() }])
    };
    let written: Map<String, Value> = serde_json::from_slice(config)
        .map_err(|e| bad(DraftConfigError::Json { message: e.to_string() }))?;

    let mut problems = Vec::new();
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    let mut vllm = false;
    for name in open.names() {
        let tensor = open.get(name)?;
        let plain = name.strip_prefix("model.").unwrap_or(name);
        vllm |= plain.starts_with("layers.0.");
        let values = match tensor.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Values::Floats(tensor.to_f32()?),
            Dtype::I64 | Dtype::I32 => Values::Integers(tensor.to_i64()?),
            Dtype::BOOL | Dtype::U8 => Values::Flags(tensor.to_bool()?),
            _ => Values::Other,
        };
        let entry = Found {
            name: name.to_owned(),
            shape: tensor.shape.to_vec(),
            dtype: format!("{:?}", tensor.dtype),
            values,
        };
        if let Some(before) = found.insert(internal_name(plain), entry) {
            problems.push(Problem::TensorTwice { name: name.to_owned(), before: before.name });
        }
    }
    let speculators = written.contains_key("speculators_model_type");
    let layout = match (speculators, vllm) {
        (true, _) => Layout::Speculators,
        (false, true) => Layout::Vllm,
        (false, false) => Layout::Sglang,
    };
    let flat =
        if speculators { flattened(written).map_err(|problem| refused(vec![problem]))? } else { written };
    let mut flat = flat;
    if layers.is_some() {
        drop_layers(&mut flat);
    }
    let contradiction = layer_contradiction(&flat);
    let mut config = Eagle3Config::from_value(&Value::Object(flat)).map_err(bad)?;
    config.target_layer_ids = layers.or(config.target_layer_ids);
    for name in NOT_THE_DRAFTS {
        found.remove(name);
    }
    let weights = open.files().next().map_or_else(|| path.to_owned(), Path::to_path_buf);
    let mut taken = Taken { layout, found, problems };
    let parts = taken.parts(&config, |ids| {
        ids.iter().enumerate().map(|(d, offset)| offset.saturating_add(d as i64)).collect()
    });
    Ok(Imported { contradiction, ..taken.finish(path, config, parts, weights)? })
}

/// The internal name of a safetensors name without `model.`.
fn internal_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("layers.0.") {
        return format!("midlayer.{rest}");
    }
    // SGLang's own spelling of the norms per captured layer.
    for (i, level) in ["low", "mid", "high"].iter().enumerate() {
        if name.strip_prefix("aux_norm_").is_some_and(|rest| rest == format!("{level}.weight")) {
            return format!("fc_norm.{i}.weight");
        }
    }
    name.to_owned()
}

/// A `speculators` configuration as one flat object: the layer's keys under the draft's own.
fn flattened(written: Map<String, Value>) -> Result<Map<String, Value>, Problem> {
    let kind = written.get("speculators_model_type").and_then(Value::as_str).unwrap_or_default();
    let layer = written.get("transformer_layer_config").and_then(Value::as_object);
    let (true, Some(layer)) = (kind == "eagle3", layer) else {
        let message = match layer {
            None => "`config.json`: `transformer_layer_config` is no object".into(),
            Some(_) => format!("`config.json`: `speculators_model_type` is `{kind}`, only `eagle3` is built"),
        };
        let hint = "take `config.json` from the draft's repository again; drafts of other kinds are not read";
        return Err(Problem::Config { message, hint: Some(hint.into()) });
    };
    let mut flat = layer.clone();
    // The layer's configuration is often a copy of the target's; the draft has a head of its own all the same.
    flat.insert("tie_word_embeddings".into(), Value::Bool(false));
    flat.insert(
        "num_hidden_layers".into(),
        layer.get("num_hidden_layers").cloned().unwrap_or_else(|| 1.into()),
    );
    for (key, value) in written {
        // The class whose defaults hold is the layer's.
        let layers_own = key == "model_type" && flat.contains_key("model_type");
        if !layers_own && !matches!(key.as_str(), "transformer_layer_config" | "speculators_config") {
            flat.insert(key, value);
        }
    }
    Ok(flat)
}

/// Reads a draft from an opened GGUF file.
pub(crate) fn from_gguf(path: &Path, file: &GgufFile<'_>, layers: Option<&[u32]>) -> Result<Imported, BundleError> {
    let layers = three(layers)?;
    let refused = |problem| BundleError::draft(path, "imported", vec![problem]);
    let architecture = file.get_str("general.architecture")?;
    if architecture != gguf::ARCHITECTURE {
        let message =
            format!("`general.architecture` is `{architecture}`, a draft has `{}`", gguf::ARCHITECTURE);
        let hint = "give the file of a draft here, and the model that it drafts for with `--target`";
        return Err(refused(Problem::Config { message, hint: Some(hint.into()) }));
    }
    let mut config = gguf::config(file, layers)?.map_err(refused)?;
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for info in file.tensors() {
        let shape: Vec<usize> = info.dims.iter().rev().copied().collect();
        let internal = match (gguf::internal_name(&info.name), info.name.as_str()) {
            (Some(name), _) => name.to_owned(),
            (None, "token_embd.weight") => EMBEDDING.to_owned(),
            (None, gguf::ROPE_FREQS) => gguf::ROPE_FREQS.to_owned(),
            // Never an internal name by chance: what GGUF does not know belongs to no part.
            (None, other) => format!("gguf:{other}"),
        };
        let data = file.data(info);
        let values = match info.ggml_type {
            GgmlType::I64 => Values::Integers(integers(data, i64::from_le_bytes)),
            GgmlType::I32 => Values::Integers(integers(data, |b| i64::from(i32::from_le_bytes(b)))),
            other => match (weight_dtype(other), &shape[..]) {
                (Some(dtype), [.., in_features]) => {
                    let out_features = info.elements() / in_features;
                    let rows = match gguf::is_rotated(&internal) && out_features % config.head_dim == 0 {
                        true => rope_halves_from_pairs(data, out_features, config.head_dim).into(),
                        false => std::borrow::Cow::Borrowed(data),
                    };
                    let view = WeightView { dtype, out_features, in_features: *in_features, data: &rows };
                    Values::Floats(quant::dequantize(&view))
                }
                _ => Values::Other,
            },
        };
        found.insert(
            internal,
            Found { name: info.name.clone(), shape, dtype: info.ggml_type.to_string(), values },
        );
    }
    let divisors = found.remove(gguf::ROPE_FREQS);
    let mut taken = Taken { layout: Layout::Gguf, found, problems: Vec::new() };
    let parts = taken.parts(&config, |ids| ids);
    // After the shapes are known to hold: tables are as long as a head is wide.
    if let Some(divisors) = divisors.filter(|_| taken.problems.is_empty()) {
        let scaling = match &divisors.values {
            Values::Floats(values) if config.rope_scaling == RopeScaling::None => {
                gguf::scaling_of(values, &config)
            }
            _ => None,
        };
        config.rope_scaling =
            scaling.ok_or_else(|| refused(Problem::RopeDivisors { name: gguf::ROPE_FREQS.to_owned() }))?;
    }
    taken.finish(path, config, parts, path.to_owned())
}

fn integers<const N: usize>(data: &[u8], from: impl Fn([u8; N]) -> i64) -> Vec<i64> {
    data.chunks_exact(N).map(|c| from(c.try_into().expect("chunks have N bytes"))).collect()
}

/// The tensors of a file while they are handed out.
struct Taken {
    layout: Layout,
    found: BTreeMap<String, Found>,
    problems: Vec<Problem>,
}

/// Everything but the configuration.
struct Parts {
    tensors: DraftTensors,
    vocab_map: Option<VocabMap>,
    embedding: Option<Vec<f32>>,
}

impl Taken {
    /// Takes every tensor that the configuration implies. `absolute` turns the stored `d2t` into target ids.
    fn parts(&mut self, config: &Eagle3Config, absolute: impl Fn(Vec<i64>) -> Vec<i64>) -> Parts {
        let mut tensors = DraftTensors::new();
        let (mut ids, mut covered) = (None, None);
        for spec in expected_tensors(&DraftConfig::Eagle3(config.clone())) {
            let Some(stored) = tensor_name(self.layout, &spec.name).map(|name| name.into_owned()) else {
                continue;
            };
            let whole_vocabulary = config.draft_vocab_size == config.vocab_size;
            match spec.name.as_str() {
                // Not every layout has it, and it follows from `d2t`.
                "t2d" => {
                    covered = self.take(
                        "t2d",
                        &stored,
                        &spec.shape,
                        "BOOL",
                        |v| match v {
                            Values::Flags(flags) => Some(flags),
                            _ => None,
                        },
                        true,
                    )
                }
                "d2t" => {
                    ids = self.take(
                        "d2t",
                        &stored,
                        &spec.shape,
                        "I64",
                        |v| match v {
                            Values::Integers(ids) => Some(ids),
                            _ => None,
                        },
                        whole_vocabulary,
                    )
                }
                name => {
                    let values = self.take(name, &stored, &spec.shape, FLOATS, floats, false);
                    if let Some(values) = values {
                        tensors.insert(name.to_owned(), (spec.shape.clone(), values));
                    }
                }
            }
        }
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = self.take(EMBEDDING, EMBEDDING, &shape, FLOATS, floats, true);
        for (_, left) in std::mem::take(&mut self.found) {
            self.problems.push(Problem::TensorExtra { name: left.name, shape: left.shape });
        }
        if config.vocab_size > VOCAB_MAX {
            let message = format!("a vocabulary of {} ids is more than {VOCAB_MAX}", config.vocab_size);
            let hint = "take `config.json` and weights from the same repository and revision";
            self.problems.push(Problem::Config { message, hint: Some(hint.into()) });
        }
        let vocab_map = match ids {
            _ if !self.problems.is_empty() => None,
            None => Some(VocabMap::identity(config.vocab_size)),
            Some(ids) => self.vocab_map(absolute(ids), covered, config, &mut tensors),
        };
        Parts { tensors, vocab_map, embedding }
    }

    /// One tensor in the wanted shape and kind; `None` is told unless the tensor is `optional` and not there.
    fn take<T>(
        &mut self,
        name: &str,
        stored: &str,
        shape: &[usize],
        dtype: &'static str,
        values: impl Fn(Values) -> Option<T>,
        optional: bool,
    ) -> Option<T> {
        let Some(found) = self.found.remove(name) else {
            if !optional {
                let name = stored.to_owned();
                self.problems.push(Problem::TensorMissing { name, dtype, shape: shape.to_vec() });
            }
            return None;
        };
        if found.shape != shape {
            let (name, found) = (found.name, found.shape);
            self.problems.push(Problem::TensorShape { name, wanted: shape.to_vec(), found });
            return None;
        }
        let taken = values(found.values);
        if taken.is_none() {
            self.problems.push(Problem::TensorDtype { name: found.name, wanted: dtype, found: found.dtype });
        }
        taken
    }

    /// The map of target ids, with the head's rows put in their ascending order if they were in another.
    fn vocab_map(
        &mut self,
        targets: Vec<i64>,
        covered: Option<Vec<bool>>,
        config: &Eagle3Config,
        tensors: &mut DraftTensors,
    ) -> Option<VocabMap> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|draft| targets[*draft]);
        let offsets: Vec<i64> = order
            .iter()
            .enumerate()
            .map(|(draft, from)| targets[*from].saturating_sub(draft as i64))
            .collect();
        let map = match covered {
            Some(flags) => VocabMap::from_tensors(&offsets, &flags),
            None => VocabMap::from_offsets(&offsets, config.vocab_size),
        };
        if order.iter().enumerate().any(|(to, from)| to != *from)
            && let Some((_, head)) = tensors.get_mut("lm_head.weight")
        {
            let width = config.hidden_size;
            *head = order.iter().flat_map(|from| head[from * width..(from + 1) * width].to_vec()).collect();
        }
        map.map_err(|e| self.problems.push(Problem::VocabMap { contradiction: e.to_string() })).ok()
    }

    fn finish(
        self,
        path: &Path,
        config: Eagle3Config,
        parts: Parts,
        weights: PathBuf,
    ) -> Result<Imported, BundleError> {
        match parts.vocab_map {
            Some(vocab_map) if self.problems.is_empty() => Ok(Imported {
                layout: self.layout,
                config: DraftConfig::Eagle3(config),
                tensors: parts.tensors,
                vocab_map: Some(vocab_map),
                embedding: parts.embedding,
                contradiction: None,
                path: path.to_owned(),
                weights,
            }),
            _ => Err(BundleError::draft(path, "imported", self.problems)),
        }
    }
}

fn floats(values: Values) -> Option<Vec<f32>> {
    match values {
        Values::Floats(values) => Some(values),
        Values::Integers(_) | Values::Flags(_) | Values::Other => None,
    }
}

/// The layers by SpecForge's key and by vLLM's, if both are there and do not mean the same.
fn layer_contradiction(config: &Map<String, Value>) -> Option<Problem> {
    // An empty list says nothing, so it contradicts nothing.
    let list = |value: &Value| -> Option<Vec<i64>> {
        value
            .as_array()?
            .iter()
            .map(Value::as_i64)
            .collect::<Option<Vec<i64>>>()
            .filter(|ids| !ids.is_empty())
    };
    let written_by = list(config.get("eagle_config")?.get(LAYERS_KEY)?)?;
    let read_by = list(config.get(LAYERS_KEY)?)?;
    let same = written_by.iter().map(|id| id + 1).eq(read_by.iter().copied());
    let keys = ["eagle_config", LAYERS_KEY];
    (!same).then_some(Problem::LayersDisagree { keys, written_by, read_by })
}

/// Takes every word about captured layers out of a configuration, be it right or wrong.
fn drop_layers(config: &mut Map<String, Value>) {
    config.remove(LAYERS_KEY);
    match config.get_mut("eagle_config") {
        Some(Value::Object(nested)) => drop(nested.remove(LAYERS_KEY)),
        // Of another shape it could only have been about layers.
        Some(_) => drop(config.remove("eagle_config")),
        None => {}
    }
}

