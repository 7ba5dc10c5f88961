//! Readers of DFlash, DSpark and P-EAGLE drafts in the layouts of others.
//!
//! Configurations are put into the words of SpecForge's first: engines keep the same facts at the top, in a table of
//! their own, or with a prefix, and number layers in two ways.

use std::path::Path;

use draftsmith_core::VocabMap;
use draftsmith_formats::gguf::{GgmlType, GgufFile};
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::{WeightView, quant};
use draftsmith_model::{DraftConfig, DraftConfigError, DraftTensors, weight_dtype};
use serde_json::{Map, Value, json};

use super::{MARKOV_ROWS, gguf};
use crate::foreign::Layout;
use crate::foreign::eagle3::{drop_layers, layer_contradiction};
use crate::foreign::found::{FLOATS, Found, Stock, Values, floats, integers};
use crate::foreign::import::{EMBEDDING, HEAD, Imported};
use crate::layout::expected_tensors;
use crate::manifest::CONFIG_FILE;
use crate::{BundleError, Problem};

/// Layers counted from 1, as EAGLE-3 and vLLM's readers name them.
const READ_BY: &str = "eagle_aux_hidden_state_layer_ids";
/// Layers counted from 0.
const WRITTEN_BY: &str = "target_layer_ids";
/// Tables that engines look into, in the order in which they are believed.
const TABLES: [&str; 2] = ["dflash_config", "dspark_config"];
/// Facts that stand in a table, at the top, or at the top with this prefix.
const PREFIX: &str = "dspark_";
/// Facts of a block beside its block size, by the names that SpecForge gives them.
const FACTS: [&str; 8] = [
    "mask_token_id",
    WRITTEN_BY,
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_head_alpha",
    "projector_type",
];
/// Architectures that are these kinds under other names.
const BLOCK_NAMES: [&str; 4] =
    ["DFlashDraftModel", "Qwen3DSparkModel", "DSparkDraftModel", "DFlash2DraftModel"];
const P_EAGLE_NAMES: [&str; 2] = ["PEagleDraftModel", "PeagleLlamaForCausalLM"];
/// Names of EAGLE-3 under which vLLM serves P-EAGLE, too: a token for masked slots makes the difference.
const EAGLE3_NAMES: [&str; 2] = ["Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3"];
const P_EAGLE_TOKENS: [&str; 2] = ["pard_token", "ptd_token_id"];

/// Switches that change the network, and the value that leaves it as it is built here.
const SWITCHES: [(&str, Value); 6] = [
    ("use_swa", Value::Bool(false)),
    ("add_swa_attention_sink_bias", Value::Bool(false)),
    ("is_neox_style", Value::Bool(true)),
    ("attention_value_scale", Value::Null),
    ("logit_scale", Value::Null),
    ("conv_kernel_size", Value::Null),
];

/// True for a configuration of one of these kinds.
pub(crate) fn is_one(config: &Map<String, Value>) -> bool {
    let architecture = config.get("architectures").and_then(|a| a[0].as_str()).unwrap_or_default();
    match config.get("speculators_model_type").and_then(Value::as_str) {
        Some(kind) => matches!(kind, "dflash" | "dspark" | "peagle"),
        None => {
            BLOCK_NAMES.contains(&architecture)
                || is_p_eagle(config, architecture)
                || TABLES.iter().any(|table| config.contains_key(*table))
        }
    }
}

fn is_p_eagle(config: &Map<String, Value>, architecture: &str) -> bool {
    P_EAGLE_NAMES.contains(&architecture)
        || EAGLE3_NAMES.contains(&architecture)
            && P_EAGLE_TOKENS.iter().any(|key| config.get(*key).is_some_and(|id| !id.is_null()))
}

fn config_problem(error: DraftConfigError) -> Problem {
    Problem::Config { message: format!("`{CONFIG_FILE}`: {error}"), hint: error.hint() }
}

/// A value that has no network here.
fn unsupported(key: &str, found: &Value, supported: &'static str) -> Problem {
    let found = found.to_string().chars().take(80).collect();
    config_problem(DraftConfigError::Unsupported { key: key.to_owned(), found, supported })
}

/// Reads a draft from its parsed `config.json` and its weights.
pub(crate) fn from_safetensors(
    path: &Path,
    written: Map<String, Value>,
    open: &SafetensorsDir,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let refused = |problem| BundleError::draft(path, "imported", vec![problem]);
    let layout = match written.contains_key("speculators_model_type") {
        true => Layout::Speculators,
        false if says_vllm(&written) => Layout::Vllm,
        false => Layout::Sglang,
    };
    let (mut flat, contradiction) = in_one_form(written, layers.is_some()).map_err(refused)?;
    // No file has fewer tensors than layers: what follows is made for each of them.
    let count = open.names().count() as u64;
    if let Some(found) = flat.get("num_hidden_layers").filter(|n| n.as_u64().is_none_or(|n| n > count)) {
        let wanted = "a positive integer, at most the number of tensors";
        let (key, found) = ("num_hidden_layers".to_owned(), found.to_string().chars().take(80).collect());
        return Err(refused(config_problem(DraftConfigError::Key { key, wanted, found })));
    }
    flat.remove("auto_map");
    let mut config = DraftConfig::from_value(&Value::Object(flat)).map_err(|e| refused(config_problem(e)))?;
    if let Some(layers) = layers {
        set_layers(&mut config, layers)?;
    }
    let mut stock = Stock::of_safetensors(open, str::to_owned)?;
    for name in ["verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq"] {
        stock.found.remove(name);
    }
    let weights = open.files().next().map_or_else(|| path.to_owned(), Path::to_path_buf);
    let parts =
        parts(&config, layout, stock).map_err(|problems| BundleError::draft(path, "imported", problems))?;
    Ok(parts.imported(layout, config, contradiction, path, &weights))
}

fn set_layers(config: &mut DraftConfig, layers: &[u32]) -> Result<(), BundleError> {
    let (found, wanted) = (layers.len(), config.shape().captured_layers);
    let count = |_| BundleError::LayerCount { found, wanted };
    config.set_target_layers(layers).map_err(count)
}

/// vLLM's reader wants facts at the top that others keep in a table.
fn says_vllm(written: &Map<String, Value>) -> bool {
    let nested = written.get("eagle_config").is_some_and(|nested| nested.get(READ_BY).is_some());
    written.contains_key("sample_from_anchor") || written.contains_key(READ_BY) && !nested
}

/// A configuration in SpecForge's words, and two keys of it that name different layers. `without_layers` takes every
/// word about layers out, be it right or wrong.
fn in_one_form(
    written: Map<String, Value>,
    without_layers: bool,
) -> Result<(Map<String, Value>, Option<Problem>), Problem> {
    let mut flat = match written.contains_key("speculators_model_type") {
        true => of_speculators(written)?,
        false => written,
    };
    let architecture = flat.get("architectures").and_then(|a| a[0].as_str()).unwrap_or_default().to_owned();
    if architecture == "DFlash2DraftModel" {
        let supported = "use a DFlash, DSpark or P-EAGLE draft";
        return Err(unsupported("architectures", &json!(["DFlash2DraftModel"]), supported));
    }
    if is_p_eagle(&flat, &architecture) {
        flat.insert("architectures".into(), json!([P_EAGLE_NAMES[0]]));
        if flat.get("mask_token_id").is_some_and(|id| !id.is_null()) && !flat.contains_key("pard_token") {
            let mask = flat.remove("mask_token_id").unwrap_or_default();
            if !mask.is_u64() {
                let found = mask.to_string().chars().take(80).collect();
                let (key, wanted) = ("mask_token_id".to_owned(), "a token id");
                return Err(config_problem(DraftConfigError::Key { key, wanted, found }));
            }
            flat.insert("pard_token".into(), mask);
        }
        for key in ["fc_norm", "norm_output", "norm_before_fc"] {
            if let Some(found) = flat.get(key).filter(|v| !v.is_null() && **v != Value::Bool(false)) {
                return Err(unsupported(key, found, "use a P-EAGLE draft without this norm"));
            }
        }
        if without_layers {
            drop_layers(&mut flat);
        }
        let contradiction = layer_contradiction(&flat);
        let nested = flat.get("eagle_config").and_then(|nested| nested.get(READ_BY));
        let read_by = flat.get(READ_BY).filter(|ids| !ids.is_null()).cloned();
        if let (true, Some(read_by)) = (nested.is_none_or(Value::is_null), read_by) {
            let ids = one_less(READ_BY, &read_by)?;
            flat.insert("eagle_config".into(), json!({ READ_BY: ids }));
        }
        return Ok((flat, contradiction));
    }
    // Facts of a block, gathered into the one table that the network's reader looks into.
    let mut table = Map::new();
    for name in TABLES.iter().rev() {
        match flat.remove(*name) {
            None | Some(Value::Null) => {}
            Some(Value::Object(found)) => table.extend(found),
            Some(found) => {
                let (key, wanted) = ((*name).to_owned(), "an object or null");
                let found = found.to_string().chars().take(80).collect();
                return Err(config_problem(DraftConfigError::Key { key, wanted, found }));
            }
        }
    }
    for key in FACTS.into_iter().chain(["block_size"]) {
        let prefixed = flat.remove(&format!("{PREFIX}{key}"));
        let top = flat.get(key).filter(|v| !v.is_null()).cloned();
        let Some(found) = top.or(prefixed.filter(|v| !v.is_null())) else { continue };
        if let Some(other) = table.get(key).filter(|other| !other.is_null() && **other != found)
            && !(without_layers && key == WRITTEN_BY)
        {
            let message = format!("`{CONFIG_FILE}`: `{key}` is {found}, in its table it is {other}");
            let hint = format!("remove one of the two `{key}`: the one that the draft was not trained with");
            return Err(Problem::Config { message, hint: Some(hint) });
        }
        table.insert(key.into(), found);
    }
    if let Some(size) = table.remove("block_size") {
        flat.insert("block_size".into(), size);
    }
    for (key, built) in &SWITCHES {
        let found = table.get(*key).or(flat.get(*key)).filter(|v| !v.is_null() && *v != built);
        // A factor of one changes nothing.
        if let Some(found) = found.filter(|v| v.as_f64() != Some(1.0)) {
            return Err(unsupported(key, found, "use a draft that was trained without this switch"));
        }
    }
    let from_anchor = [flat.remove("sample_from_anchor"), table.remove("sample_from_anchor")];
    let bonus = flat.remove("dspark_bonus_anchor").and_then(|bonus| bonus.as_bool());
    let causal = [flat.remove("is_causal"), table.remove("causal"), table.remove("is_causal")];
    if without_layers {
        table.remove(WRITTEN_BY);
        flat.remove(READ_BY);
    }
    let mut contradiction = None;
    if let Some(read_by) = flat.remove(READ_BY).filter(|ids| !ids.is_null()) {
        let ids = one_less(READ_BY, &read_by)?;
        match table.get(WRITTEN_BY).filter(|ids| !ids.is_null()) {
            None => drop(table.insert(WRITTEN_BY.into(), json!(ids))),
            Some(own) if *own == json!(ids) => {}
            Some(own) => {
                let list = |value: &Value| -> Vec<i64> {
                    value.as_array().into_iter().flatten().filter_map(Value::as_i64).collect()
                };
                contradiction = Some(Problem::LayersDisagree {
                    keys: ["dflash_config.target_layer_ids", READ_BY],
                    written_by: list(own),
                    read_by: list(&read_by),
                });
            }
        }
    }
    let spark = table.get("projector_type").is_some_and(|p| p == "dspark") || architecture.contains("DSpark");
    for found in from_anchor.iter().flatten().chain(&bonus.map(|bonus| Value::Bool(!bonus))) {
        if *found != Value::Bool(spark) {
            let supported = "DSpark proposes from the slot of the last token on, DFlash from the one behind it: use \
                             a draft that was trained so";
            return Err(unsupported("sample_from_anchor", found, supported));
        }
    }
    // Full layers see their block as a whole, sliding ones causally; a switch that says otherwise has no network.
    let slides = flat.get("layer_types").and_then(Value::as_array).into_iter().flatten();
    let slides = slides.map(|kind| kind == "sliding_attention").collect::<Vec<bool>>();
    for found in causal.iter().flatten().filter(|v| !v.is_null()) {
        let as_built = match found.as_bool() {
            Some(true) => !slides.is_empty() && slides.iter().all(|s| *s),
            Some(false) => !slides.contains(&true),
            None => false,
        };
        if !as_built {
            let supported = "use a draft whose full layers see their block as a whole and whose sliding layers see \
                             it causally";
            return Err(unsupported("dflash_config.causal", found, supported));
        }
    }
    let name = if spark { BLOCK_NAMES[1] } else { BLOCK_NAMES[0] };
    flat.insert("architectures".into(), json!([name]));
    if !table.is_empty() {
        // The reader takes the table's word before the top's.
        FACTS.iter().for_each(|key| drop(flat.remove(*key)));
        flat.insert(TABLES[0].into(), Value::Object(table));
    }
    Ok((flat, contradiction))
}

/// Layers counted from 1 as they are counted from 0.
fn one_less(key: &str, list: &Value) -> Result<Vec<u64>, Problem> {
    let ids = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let ids: Option<Vec<u64>> = ids.iter().map(|id| id.as_u64().and_then(|id| id.checked_sub(1))).collect();
    ids.filter(|ids| !ids.is_empty()).ok_or_else(|| {
        config_problem(DraftConfigError::Layers {
            key: key.to_owned(),
            wanted: "a list of layer ids, counted from 1",
            found: list.to_string().chars().take(80).collect(),
            hint: "name the target's layers that read the states, counted from 1",
        })
    })
}

/// A `speculators` configuration as one flat object: the layer's keys under the draft's own.
fn of_speculators(written: Map<String, Value>) -> Result<Map<String, Value>, Problem> {
    let kind = written.get("speculators_model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some(Value::Object(layer)) = written.get("transformer_layer_config") else {
        let message = format!("`{CONFIG_FILE}`: `transformer_layer_config` is no object");
        let hint = "take `config.json` from the draft's repository again";
        return Err(Problem::Config { message, hint: Some(hint.into()) });
    };
    let mut flat = layer.clone();
    // The layer's configuration is often a copy of the target's; embedding and head are told by the draft's kind.
    flat.insert("tie_word_embeddings".into(), Value::Bool(false));
    let slides = layer.get("layer_types").and_then(Value::as_array).into_iter().flatten();
    let slides = slides.into_iter().any(|kind| kind == "sliding_attention");
    for (key, value) in written {
        let layers_own = key == "model_type" && flat.contains_key("model_type");
        if !layers_own && !matches!(key.as_str(), "transformer_layer_config" | "speculators_config") {
            flat.insert(key, value);
        }
    }
    let name = match kind.as_str() {
        "dflash" => BLOCK_NAMES[0],
        "dspark" => BLOCK_NAMES[1],
        _ => P_EAGLE_NAMES[0],
    };
    flat.insert("architectures".into(), json!([name]));
    if kind == "peagle" {
        return Ok(flat);
    }
    // Where the library's default is meant, it is said.
    flat.entry("sample_from_anchor").or_insert(Value::Bool(kind == "dspark"));
    let non_causal = flat.remove("sliding_window_non_causal").unwrap_or(Value::Bool(true));
    if slides && non_causal != Value::Bool(false) {
        let supported = "use a draft whose sliding layers see their block causally";
        return Err(unsupported("sliding_window_non_causal", &non_causal, supported));
    }
    if let Some(ids) = flat.remove("aux_hidden_state_layer_ids").filter(|ids| !ids.is_null()) {
        flat.insert(READ_BY.into(), ids);
    }
    Ok(flat)
}

/// Reads a draft from an opened GGUF file of the architecture `dflash`.
pub(crate) fn from_gguf(
    path: &Path,
    file: &GgufFile<'_>,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let refused = |problem| BundleError::draft(path, "imported", vec![problem]);
    let config = DraftConfig::Block(gguf::config(file, layers)?.map_err(refused)?);
    let mut stock = Stock::default();
    for info in file.tensors() {
        let shape: Vec<usize> = info.dims.iter().rev().copied().collect();
        let internal = match (gguf::internal_name(&info.name), info.name.as_str()) {
            (Some(name), _) => name,
            (None, "token_embd.weight") => EMBEDDING.to_owned(),
            (None, "output.weight") => HEAD.to_owned(),
            // Never an internal name by chance: what the architecture does not know belongs to no part.
            (None, other) => format!("gguf:{other}"),
        };
        let data = file.data(info);
        let values = match (info.ggml_type, weight_dtype(info.ggml_type), &shape[..]) {
            (GgmlType::I64, ..) => Values::Integers(integers(data, i64::from_le_bytes)),
            (_, Some(dtype), [.., in_features]) => {
                let out_features = info.elements() / in_features;
                let view = WeightView { dtype, out_features, in_features: *in_features, data };
                Values::Floats(quant::dequantize(&view))
            }
            _ => Values::Other,
        };
        let (name, dtype) = (info.name.clone(), info.ggml_type.to_string());
        stock.found.insert(internal, Found { name, shape, dtype, values });
    }
    let parts = parts(&config, Layout::Gguf, stock)
        .map_err(|problems| BundleError::draft(path, "imported", problems))?;
    Ok(parts.imported(Layout::Gguf, config, None, path, path))
}

/// Everything but the configuration.
struct Parts {
    tensors: DraftTensors,
    vocab_map: Option<VocabMap>,
    embedding: Option<Vec<f32>>,
    head: Option<Vec<f32>>,
}

impl Parts {
    fn imported(
        self,
        layout: Layout,
        config: DraftConfig,
        contradiction: Option<Problem>,
        path: &Path,
        weights: &Path,
    ) -> Imported {
        Imported {
            layout,
            config,
            tensors: self.tensors,
            vocab_map: self.vocab_map,
            embedding: self.embedding,
            head: self.head,
            contradiction,
            path: path.to_owned(),
            weights: weights.to_owned(),
        }
    }
}

/// Takes every tensor that the configuration implies.
fn parts(config: &DraftConfig, layout: Layout, mut stock: Stock) -> Result<Parts, Vec<Problem>> {
    let shape = config.shape();
    let mut tensors = DraftTensors::new();
    for spec in expected_tensors(&**config) {
        if matches!(spec.name.as_str(), "d2t" | "t2d") {
            continue;
        }
        // vLLM's way of storing the stand-in for features has fewer dimensions of one in front.
        if spec.name == "mask_hidden"
            && let Some(found) = stock.found.get_mut("mask_hidden")
            && found.shape.iter().rev().skip(1).all(|n| *n == 1)
            && found.shape.last() == spec.shape.last()
        {
            found.shape.clone_from(&spec.shape);
        }
        let gguf_name = gguf::tensor_name(&spec.name).filter(|_| layout == Layout::Gguf);
        let stored = gguf_name.unwrap_or_else(|| spec.name.clone());
        if let Some(values) = stock.take(&spec.name, &stored, &spec.shape, FLOATS, floats, false) {
            tensors.insert(spec.name, (spec.shape, values));
        }
    }
    let whole = shape.draft_vocab_size == shape.vocab_size;
    let ids = stock.take_map(shape.draft_vocab_size, shape.vocab_size, whole);
    let (mut embedding, mut head) = (None, None);
    if !shape.has_embedding {
        let rows = [shape.vocab_size, shape.hidden_size];
        embedding = stock.take(EMBEDDING, EMBEDDING, &rows, FLOATS, floats, true);
        let rows = [shape.draft_vocab_size, shape.hidden_size];
        head = stock.take(HEAD, HEAD, &rows, FLOATS, floats, true);
    }
    stock.close(shape.vocab_size);
    if !stock.problems.is_empty() {
        return Err(stock.problems);
    }
    let vocab_map = match ids {
        (None, _) => shape.has_vocab_map.then(|| VocabMap::identity(shape.vocab_size)),
        (Some(offsets), covered) => {
            let absolute = |(draft, offset): (usize, &i64)| offset.saturating_add(draft as i64);
            let targets = offsets.iter().enumerate().map(absolute).collect();
            if let Some(rows) = head.take() {
                tensors.insert(HEAD.into(), (vec![shape.draft_vocab_size, shape.hidden_size], rows));
            }
            let by_id = [MARKOV_ROWS, HEAD];
            let map = stock.vocab_map(targets, covered, shape.vocab_size, &by_id, &mut tensors);
            if !shape.has_embedding {
                head = tensors.remove(HEAD).map(|(_, rows)| rows);
            }
            map.filter(|_| shape.has_vocab_map)
        }
    };
    if !stock.problems.is_empty() {
        return Err(stock.problems);
    }
    Ok(Parts { tensors, vocab_map, embedding, head })
}
