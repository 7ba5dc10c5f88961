//! Readers of EAGLE-3 drafts in the layouts of others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_core::VocabMap;
use draftsmith_formats::gguf::{GgmlType, GgufFile};
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::{RopeScaling, WeightView, quant};
use draftsmith_model::eagle3::{Eagle3Config, LAYERS_KEY};
use draftsmith_model::{DraftConfig, DraftConfigError, DraftTensors, rope_halves_from_pairs, weight_dtype};
use serde_json::{Map, Value};

use super::{gguf, tensor_name};
use crate::foreign::Layout;
use crate::foreign::found::{FLOATS, Found, Stock, Values, floats, integers};
use crate::foreign::import::{EMBEDDING, Imported};
use crate::layout::expected_tensors;
use crate::manifest::CONFIG_FILE;
use crate::{BundleError, Problem};

/// Tensors that published drafts carry beside the network: the target's own, and tables that follow from the
/// configuration.
const NOT_THE_DRAFTS: [&str; 3] =
    ["verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq"];
/// Three layers that hold whatever a configuration says.
fn three(layers: Option<&[u32]>) -> Result<Option<[u32; 3]>, BundleError> {
    let count = |layers: &[u32]| BundleError::LayerCount { found: layers.len(), wanted: 3 };
    layers.map(|layers| layers.try_into().map_err(|_| count(layers))).transpose()
}

/// Reads a draft from the text of its `config.json` and its weights.
pub(crate) fn from_safetensors(
    path: &Path,
    written: Map<String, Value>,
    open: &SafetensorsDir,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let layers = three(layers)?;
    let refused = |problems| BundleError::draft(path, "imported", problems);
    let bad = |e: DraftConfigError| {
        refused(vec![Problem::Config { message: format!("`{CONFIG_FILE}`: {e}"), hint: e.hint() }])
    };
    let vllm = |name: &str| name.strip_prefix("model.").unwrap_or(name).starts_with("layers.0.");
    let vllm = open.names().any(vllm);
    let mut stock = Stock::of_safetensors(open, internal_name)?;
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
        stock.found.remove(name);
    }
    let weights = open.files().next().map_or_else(|| path.to_owned(), Path::to_path_buf);
    let mut taken = Taken { layout, stock };
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
            Some(_) => format!(
                "`config.json`: `speculators_model_type` is `{kind}`, only `eagle3`, `dflash`, `dspark` and `peagle` are built"
            ),
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
pub(crate) fn from_gguf(
    path: &Path,
    file: &GgufFile<'_>,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let layers = three(layers)?;
    let refused = |problem| BundleError::draft(path, "imported", vec![problem]);
    let architecture = file.get_str("general.architecture")?;
    if architecture != gguf::ARCHITECTURE {
        let message = format!(
            "`general.architecture` is `{architecture}`, a draft has `{}` or `dflash`",
            gguf::ARCHITECTURE
        );
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
    let mut taken = Taken { layout: Layout::Gguf, stock: Stock { found, ..Stock::default() } };
    let parts = taken.parts(&config, |ids| ids);
    // After the shapes are known to hold: tables are as long as a head is wide.
    if let Some(divisors) = divisors.filter(|_| taken.stock.problems.is_empty()) {
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

/// The tensors of a file while they are handed out.
struct Taken {
    layout: Layout,
    stock: Stock,
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
        for spec in expected_tensors(config) {
            let Some(stored) = tensor_name(self.layout, &spec.name) else { continue };
            if matches!(spec.name.as_str(), "d2t" | "t2d") {
                continue;
            }
            if let Some(values) = self.stock.take(&spec.name, &stored, &spec.shape, FLOATS, floats, false) {
                let name = spec.name.clone();
                tensors.insert(name, (spec.shape.clone(), values));
            }
        }
        let whole_vocabulary = config.draft_vocab_size == config.vocab_size;
        let (ids, covered) =
            self.stock.take_map(config.draft_vocab_size, config.vocab_size, whole_vocabulary);
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = self.stock.take(EMBEDDING, EMBEDDING, &shape, FLOATS, floats, true);
        self.stock.close(config.vocab_size);
        let vocab_map = match ids {
            _ if !self.stock.problems.is_empty() => None,
            None => Some(VocabMap::identity(config.vocab_size)),
            Some(ids) => {
                let ids = absolute(ids);
                self.stock.vocab_map(ids, covered, config.vocab_size, &["lm_head.weight"], &mut tensors)
            }
        };
        Parts { tensors, vocab_map, embedding }
    }

    fn finish(
        self,
        path: &Path,
        config: Eagle3Config,
        parts: Parts,
        weights: PathBuf,
    ) -> Result<Imported, BundleError> {
        match parts.vocab_map {
            Some(vocab_map) if self.stock.problems.is_empty() => Ok(Imported {
                layout: self.layout,
                config: DraftConfig::Eagle3(config),
                tensors: parts.tensors,
                vocab_map: Some(vocab_map),
                embedding: parts.embedding,
                head: None,
                contradiction: None,
                path: path.to_owned(),
                weights,
            }),
            _ => Err(BundleError::draft(path, "imported", self.stock.problems)),
        }
    }
}

/// The layers by SpecForge's key and by vLLM's, if both are there and do not mean the same.
pub(crate) fn layer_contradiction(config: &Map<String, Value>) -> Option<Problem> {
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
pub(crate) fn drop_layers(config: &mut Map<String, Value>) {
    config.remove(LAYERS_KEY);
    match config.get_mut("eagle_config") {
        Some(Value::Object(nested)) => drop(nested.remove(LAYERS_KEY)),
        // Of another shape it could only have been about layers.
        Some(_) => drop(config.remove("eagle_config")),
        None => {}
    }
}
