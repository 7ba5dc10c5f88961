//! A draft's folder as it is, and what would have to be changed for it to be read at all.
//!
//! Reading is the importer's: what it refuses is tried again with one thing corrected that the refusal points to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use draftsmith_bundle::{BundleError, CONFIG_FILE, Imported, Problem, import_safetensors, import_with};
use draftsmith_core::VocabMap;
use draftsmith_formats::atomic;
use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};
use serde_json::{Map, Value, json};

use crate::Error;

/// A draft that could be read after something in it was corrected.
pub(crate) struct Repaired {
    /// Stable name of what was wrong.
    pub(crate) id: &'static str,
    /// What is wrong, as a sentence.
    pub(crate) what: String,
    /// The key or tensor.
    pub(crate) key: String,
    /// What stands there.
    pub(crate) found: Option<String>,
    /// What to write in its place.
    pub(crate) write: String,
    /// The draft as it is read then.
    pub(crate) imported: Imported,
}

/// How a folder was read.
pub(crate) enum Opened {
    /// As it is.
    Whole(Box<Imported>),
    /// Not at all; or with corrections, of which any may be the right one.
    Refused {
        /// Why.
        problem: Problem,
        /// Problems beside it.
        more: usize,
        /// What helped.
        repaired: Vec<Repaired>,
    },
}

/// Reads a draft.
///
/// # Errors
/// A path without a draft, a file that cannot be read, a kind that is not built.
pub(crate) fn open(path: &Path) -> Result<(Map<String, Value>, Opened), Error> {
    let raw = raw_config(path);
    match import_with(path, None) {
        Ok(imported) => Ok((raw, Opened::Whole(Box::new(imported)))),
        Err(BundleError::Draft { path: at, action, problem, more }) => {
            let repaired = match SafetensorsDir::open(path) {
                Ok(weights) if !raw.is_empty() => repairs(path, &raw, &weights, &problem),
                _ => Vec::new(),
            };
            // What a configuration asks for and nothing here can do is not about the draft.
            if repaired.is_empty() && matches!(*problem, Problem::Config { .. }) {
                return Err(BundleError::Draft { path: at, action, problem, more }.into());
            }
            Ok((raw, Opened::Refused { problem: *problem, more, repaired }))
        }
        Err(other) => Err(other.into()),
    }
}

/// The configuration of a folder; empty where there is none.
fn raw_config(path: &Path) -> Map<String, Value> {
    let file: PathBuf = path.join(CONFIG_FILE);
    let bytes = if path.is_dir() && file.is_file() { atomic::read(file).ok() } else { None };
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// What a refused folder is tried with.
struct Attempt {
    id: &'static str,
    what: String,
    key: String,
    found: Option<String>,
    write: String,
    config: Map<String, Value>,
    /// The two tables of the vocabulary, if they are others; `t2d` may go.
    tables: Option<(Vec<i64>, Option<Vec<bool>>)>,
}

fn repairs(
    path: &Path,
    raw: &Map<String, Value>,
    weights: &SafetensorsDir,
    problem: &Problem,
) -> Vec<Repaired> {
    let attempts = match problem {
        Problem::VocabMap { .. } => tables(raw, weights),
        Problem::TensorExtra { name, .. } => by_name(raw, weights, name, true),
        Problem::TensorMissing { name, .. } => by_name(raw, weights, name, false),
        Problem::TensorShape { name, found, .. } => by_shape(raw, name, found),
        _ => Vec::new(),
    };
    attempts.into_iter().filter_map(|attempt| attempt.read(path, weights)).collect()
}

impl Attempt {
    fn read(self, path: &Path, weights: &SafetensorsDir) -> Option<Repaired> {
        let config = Value::Object(self.config).to_string();
        let imported = match &self.tables {
            None => import_safetensors(path, config.as_bytes(), weights),
            Some((d2t, t2d)) => {
                let mut tensors: Vec<TensorData> = weights
                    .names()
                    .filter(|name| !matches!(*name, "d2t" | "t2d"))
                    .filter_map(|name| {
                        let t = weights.get(name).ok()?;
                        let (shape, bytes) = (t.shape.to_vec(), t.bytes.to_vec());
                        Some(TensorData { name: name.to_owned(), dtype: t.dtype, shape, bytes })
                    })
                    .collect();
                tensors.push(TensorData::i64("d2t", &[d2t.len()], d2t));
                tensors.extend(t2d.as_ref().map(|t2d| TensorData::bool("t2d", &[t2d.len()], t2d)));
                let bytes = to_bytes(&tensors, &BTreeMap::new());
                let open = SafetensorsDir::from_bytes(weights.path(), bytes).ok()?;
                import_safetensors(path, config.as_bytes(), &open)
            }
        };
        let Attempt { id, what, key, found, write, .. } = self;
        imported.ok().map(|imported| Repaired { id, what, key, found, write, imported })
    }
}

/// Ways in which `d2t` and `t2d` may have been meant.
fn tables(raw: &Map<String, Value>, weights: &SafetensorsDir) -> Vec<Attempt> {
    let d2t = weights.find("d2t").and_then(|t| t.to_i64().ok());
    let t2d = weights.find("t2d").and_then(|t| t.to_bool().ok());
    let Some(d2t) = d2t else { return Vec::new() };
    let marked: Option<Vec<i64>> =
        t2d.as_ref().map(|t2d| (0i64..).zip(t2d).filter(|(_, set)| **set).map(|(id, _)| id).collect());
    let offsets = |ids: &[i64]| ids.iter().zip(0i64..).map(|(id, draft)| id - draft).collect::<Vec<i64>>();
    let entries = |list: &[i64]| {
        let first: Vec<String> = list.iter().take(3).map(i64::to_string).collect();
        format!("{}, …", first.join(", "))
    };
    let attempt = |id, what: &str, key: &str, write: String, d2t: Vec<i64>, t2d: Option<Vec<bool>>| Attempt {
        id,
        what: what.to_owned(),
        key: key.to_owned(),
        found: None,
        write,
        config: raw.clone(),
        tables: Some((d2t, t2d)),
    };
    let mut attempts = Vec::new();
    let ascending = d2t.windows(2).all(|pair| pair[0] < pair[1]);
    let ids: BTreeSet<i64> = d2t.iter().copied().collect();
    let agrees = marked.as_ref().is_none_or(|marked| ids.iter().eq(marked));
    if ids.len() == d2t.len() && agrees {
        let fixed = offsets(&d2t);
        let what = "`d2t` holds target ids where offsets belong (target id less draft id)";
        let write = format!("offsets: {} in place of {}", entries(&fixed), entries(&d2t));
        attempts.push(Attempt {
            found: Some(entries(&d2t)),
            ..attempt("absolute_d2t", what, "d2t", write, fixed, t2d.clone())
        });
        if ascending {
            return attempts;
        }
    }
    let is_map = t2d.as_ref().is_none_or(|t2d| VocabMap::from_offsets(&d2t, t2d.len()).is_ok());
    if t2d.is_some() && is_map {
        let what = "`t2d` does not mark the ids that `d2t` leads to, and `d2t` is right";
        let write = "true exactly where `d2t` leads to (draft id plus offset)".to_owned();
        attempts.push(attempt("t2d_disagrees", what, "t2d", write, d2t.clone(), None));
    }
    if let Some(marked) = marked.filter(|marked| marked.len() == d2t.len()) {
        let fixed = offsets(&marked);
        let what = "`d2t` does not lead to the ids that `t2d` marks, and `t2d` is right";
        let write = format!("offsets to the marked ids: {}", entries(&fixed));
        attempts.push(attempt("d2t_disagrees", what, "d2t", write, fixed, t2d));
    }
    attempts
}

/// Sets a key wherever it stands, or at the top.
fn with(raw: &Map<String, Value>, key: &str, value: &Value) -> (Map<String, Value>, Option<String>) {
    fn set(map: &mut Map<String, Value>, key: &str, value: &Value, found: &mut Option<String>) {
        for (name, inside) in map.iter_mut() {
            if name == key {
                found.get_or_insert(inside.to_string());
                inside.clone_from(value);
            } else if let Value::Object(inside) = inside {
                set(inside, key, value, found);
            }
        }
    }
    let (mut config, mut found) = (raw.clone(), None);
    set(&mut config, key, value, &mut found);
    if found.is_none() {
        config.insert(key.to_owned(), value.clone());
    }
    (config, found)
}

fn of_key(raw: &Map<String, Value>, id: &'static str, what: String, key: &str, value: Value) -> Attempt {
    let (config, found) = with(raw, key, &value);
    let (key, write) = (key.to_owned(), value.to_string());
    Attempt { id, what, key, found, write, config, tables: None }
}

/// A tensor that is left over, or missing: the switch that says whether it is there.
fn by_name(raw: &Map<String, Value>, weights: &SafetensorsDir, name: &str, is_there: bool) -> Vec<Attempt> {
    let side = if is_there { "there, and the configuration has no use for it" } else { "not there" };
    let what = format!("tensor `{name}` is {side}");
    let flag = |id, key: &str| vec![of_key(raw, id, what.clone(), key, json!(is_there))];
    if name.contains("fc_norm") || name.contains("aux_norm_") {
        return flag("fc_norm", "fc_norm");
    }
    if name.ends_with("input_norm.weight") {
        return flag("norm_before_fc", "norm_before_fc");
    }
    if name.contains("confidence_head") {
        return flag("enable_confidence_head", "enable_confidence_head");
    }
    if name.contains("markov_head") {
        let rank = weights.find("markov_head.markov_w1.weight").map_or(0, |t| t.shape[t.shape.len() - 1]);
        return vec![of_key(raw, "markov_rank", what, "markov_rank", json!(rank))];
    }
    let layer = |name: &str| -> Option<usize> {
        name.strip_prefix("model.").unwrap_or(name).strip_prefix("layers.")?.split('.').next()?.parse().ok()
    };
    if layer(name).is_some() {
        let layers: BTreeSet<usize> = weights.names().filter_map(layer).collect();
        return vec![of_key(raw, "num_hidden_layers", what, "num_hidden_layers", json!(layers.len()))];
    }
    Vec::new()
}

/// A tensor of another shape: the number in the configuration that it follows from.
fn by_shape(raw: &Map<String, Value>, name: &str, found: &[usize]) -> Vec<Attempt> {
    let number = |key: &str| -> Option<usize> {
        let inside = raw.get("transformer_layer_config").and_then(Value::as_object);
        let value = raw.get(key).or_else(|| inside.and_then(|inside| inside.get(key)))?;
        value.as_u64().map(|n| n as usize)
    };
    let head_dim =
        number("head_dim").or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?));
    let per_head = |n: usize| head_dim.filter(|dim| *dim > 0 && n.is_multiple_of(*dim)).map(|dim| n / dim);
    let rows = found.first().copied().unwrap_or(0);
    let columns = found.get(1).copied().unwrap_or(0);
    let layers = match raw.get("dflash_config").and_then(|t| t.get("target_layer_ids")) {
        Some(Value::Array(list)) => list.len(),
        _ => 3,
    };
    let end = |suffix: &str| name.ends_with(suffix);
    let (key, value) = match () {
        () if end("lm_head.weight") || end("d2t") => ("draft_vocab_size", Some(rows)),
        () if end("t2d") => ("vocab_size", Some(rows)),
        () if end("gate_proj.weight") || end("up_proj.weight") => ("intermediate_size", Some(rows)),
        () if end("down_proj.weight") => ("intermediate_size", Some(columns)),
        () if end("q_norm.weight") || end("k_norm.weight") => ("head_dim", Some(rows)),
        () if end("q_proj.weight") => ("num_attention_heads", per_head(rows)),
        () if end("o_proj.weight") => ("num_attention_heads", per_head(columns)),
        () if end("k_proj.weight") || end("v_proj.weight") => ("num_key_value_heads", per_head(rows)),
        () if name.contains("markov_") => ("markov_rank", Some(columns)),
        () if end("fc.weight") => ("target_hidden_size", Some(columns / layers.max(1))),
        () => ("", None),
    };
    let Some(value) = value.filter(|n| *n > 0) else { return Vec::new() };
    let what = format!("tensor `{name}` has shape {found:?}, which `{key}` does not tell");
    vec![of_key(raw, "shape", what, key, json!(value))]
}
