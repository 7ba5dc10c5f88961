//! A draft that somebody else trained, in the internal form.
//!
//! The layout is recognised by what is there. Every tensor is taken exactly once, in the shape that the configuration
//! implies; what is missing, left over, misshapen or of a wrong type is an error that names it as the file does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use draftsmith_core::VocabMap;
use draftsmith_formats::atomic::{self, AtomicDir, AtomicError};
use draftsmith_formats::gguf::{GgmlType, GgufFile, content_sha256, only_model};
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use draftsmith_kernels::{Kernels, RopeScaling, WeightView, quant};
use draftsmith_model::eagle3::{Eagle3Config, Eagle3ConfigError, LAYERS_KEY};
use draftsmith_model::{DraftTensors, Infer, Ops, Target, rope_halves_from_pairs, weight_dtype};
use serde_json::{Map, Value};

use super::{Layout, gguf};
use crate::files::files_below;
use crate::layout::expected_tensors;
use crate::make::{Made, MakeInput};
use crate::manifest::{CONFIG_FILE, ImportedFrom, WEIGHTS_FILE};
use crate::network::make_with_target;
use crate::problem::layer_problem;
use crate::{BundleError, Problem};

/// Types of trained weights that are read.
const FLOATS: &str = "F32, F16 or BF16";
/// Tensors that published drafts carry beside the network: the target's own, and tables that follow from the
/// configuration.
const NOT_THE_DRAFTS: [&str; 3] =
    ["verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq"];
/// The target's embedding, which some drafts carry a copy of.
const EMBEDDING: &str = "embed_tokens.weight";
/// How far a carried embedding may be from the target's, as root mean square of differences over that of values:
/// 4-bit rows differ by up to 0.1, other embeddings by 1 and more.
const EMBEDDING_SHARE_MAX: f64 = 0.2;
/// Rows compared at once.
const EMBEDDING_ROWS: usize = 1024;
/// Largest target vocabulary that is believed: `t2d`, which would prove it, may be missing. Four times that of any
/// published model.
const VOCAB_MAX: usize = 1 << 20;

/// A draft read from another layout.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The layout that was recognised.
    pub layout: Layout,
    /// Its configuration.
    pub config: Eagle3Config,
    /// Its weights by internal name.
    pub tensors: DraftTensors,
    /// Draft ids to target ids.
    pub vocab_map: VocabMap,
    /// `[V, H]` the embedding that came along.
    pub embedding: Option<Vec<f32>>,
    /// Two keys that name different layers; [`Imported::set_layers`] decides.
    contradiction: Option<Problem>,
    /// Where it was read.
    path: PathBuf,
    /// The file with the weights.
    weights: PathBuf,
}

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

/// Reads a draft: a folder with `config.json` and safetensors, or a GGUF file (or a folder with one).
///
/// # Errors
/// [`BundleError::NoDraft`] if there is none; [`BundleError::Draft`] names what is wrong with it.
pub fn import(path: &Path) -> Result<Imported, BundleError> {
    import_with(path, None)
}

/// Like [`import`] with captured layers (0-based, output of layer) that hold whatever the draft's configuration says:
/// its own are not even read.
///
/// # Errors
/// As [`import`].
pub fn import_with(path: &Path, layers: Option<[u32; 3]>) -> Result<Imported, BundleError> {
    if let Some(file) = gguf_file(path)? {
        return from_gguf(&file, &GgufFile::open(&file)?, layers);
    }
    let config = path.join(CONFIG_FILE);
    if path.is_dir() && config.is_file() {
        return from_safetensors(path, &atomic::read(config)?, &SafetensorsDir::open(path)?, layers);
    }
    Err(BundleError::NoDraft { path: path.to_owned() })
}

/// The GGUF file that a path means: itself, or the only one in a folder without a configuration. A split is one.
fn gguf_file(path: &Path) -> Result<Option<PathBuf>, BundleError> {
    let is_gguf = |p: &Path| p.extension().is_some_and(|e| e == "gguf");
    if path.is_file() {
        return Ok(Some(path.to_owned()).filter(|p| is_gguf(p)));
    }
    if !path.is_dir() || path.join(CONFIG_FILE).is_file() {
        return Ok(None);
    }
    let mut files = files_below(path)?.into_iter().map(|f| path.join(f)).filter(|p| is_gguf(p));
    let file = files.next();
    match files.next() {
        None => Ok(file),
        Some(_) => only_model(path).map_err(|e| AtomicError::from_io("read", path, e).into()),
    }
}

/// Reads a draft from the text of its `config.json` and its weights; `path` is for errors.
///
/// # Errors
/// [`BundleError::Draft`] names what is wrong with it.
pub fn import_safetensors(
    path: &Path,
    config: &[u8],
    open: &SafetensorsDir,
) -> Result<Imported, BundleError> {
    from_safetensors(path, config, open, None)
}

fn from_safetensors(
    path: &Path,
    config: &[u8],
    open: &SafetensorsDir,
    layers: Option<[u32; 3]>,
) -> Result<Imported, BundleError> {
    let refused = |problems| BundleError::draft(path, "imported", problems);
    let bad = |e: Eagle3ConfigError| {
        refused(vec![Problem::Config { message: format!("`{CONFIG_FILE}`: {e}"), hint: e.hint() }])
    };
    let written: Map<String, Value> = serde_json::from_slice(config)
        .map_err(|e| bad(Eagle3ConfigError::Json { message: e.to_string() }))?;

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

/// Reads a draft from an opened GGUF file; `path` is for errors.
///
/// # Errors
/// Missing or mistyped keys; [`BundleError::Draft`] names what else is wrong.
pub fn import_gguf(path: &Path, file: &GgufFile<'_>) -> Result<Imported, BundleError> {
    from_gguf(path, file, None)
}

fn from_gguf(path: &Path, file: &GgufFile<'_>, layers: Option<[u32; 3]>) -> Result<Imported, BundleError> {
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
        for spec in expected_tensors(config) {
            let Some(stored) = self.layout.tensor_name(&spec.name).map(|name| name.into_owned()) else {
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
                config,
                tensors: parts.tensors,
                vocab_map,
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
    (!same).then_some(Problem::LayersDisagree { written_by, read_by })
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

impl Imported {
    /// Sets the captured layers (0-based, output of layer), whatever the draft's configuration says.
    pub fn set_layers(&mut self, layers: [u32; 3]) {
        self.config.target_layer_ids = Some(layers);
        self.contradiction = None;
    }

    /// Tensors with values that a bundle's bf16 cannot hold, by name: they are rounded when it is made.
    pub fn rounded(&self) -> Vec<&str> {
        // bf16 is the upper half of an f32.
        let changes = |values: &[f32]| values.iter().any(|v| v.to_bits() & 0xffff != 0);
        self.tensors
            .iter()
            .filter(|(_, (_, values))| changes(values))
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// Makes a bundle of it beside its target. `reference` is what the user called the draft; checkpoint and origin
    /// of `input` are filled in.
    ///
    /// # Errors
    /// As [`make_with_target`]; [`Problem::OwnEmbedding`] if the draft brings an embedding that is not the target's.
    pub fn make<K: Kernels>(
        &self,
        mut input: MakeInput,
        reference: &str,
        target: &Target<K>,
    ) -> Result<Made, BundleError> {
        if let Some(problem) = self.contradiction.clone().or_else(|| self.embedding_problem(target)) {
            return Err(BundleError::draft(&self.path, "imported", vec![problem]));
        }
        let num_layers = target.config().num_layers as u32;
        let layers = self.config.layers(num_layers);
        if let Some(problem) = layer_problem(layers, num_layers) {
            return Err(BundleError::draft(&self.path, "imported", vec![problem]));
        }
        let config = Eagle3Config { target_layer_ids: Some(layers), ..self.config.clone() };
        let value = config
            .to_value()
            .map_err(|source| BundleError::Config { path: self.path.join(CONFIG_FILE), source })?;
        let mut tensors: Vec<TensorData> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| TensorData::bf16(name, shape, values))
            .collect();
        let (d2t, t2d) = (self.vocab_map.d2t(), self.vocab_map.t2d());
        tensors.push(TensorData::i64("d2t", &[d2t.len()], &d2t));
        tensors.push(TensorData::bool("t2d", &[t2d.len()], &t2d));
        // Never committed: it goes away with the value.
        let scratch = AtomicDir::create(input.out.with_extension("import"))?;
        scratch.write(CONFIG_FILE, format!("{value:#}\n"))?;
        scratch.write(WEIGHTS_FILE, to_bytes(&tensors, &BTreeMap::new()))?;
        input.checkpoint = scratch.path().to_owned();
        input.imported = Some(ImportedFrom {
            reference: reference.to_owned(),
            layout: self.layout.name().to_owned(),
            weights_sha256: match self.layout {
                Layout::Gguf => content_sha256(&self.weights)?,
                Layout::Sglang | Layout::Vllm | Layout::Speculators => sha256_file(&self.weights)?,
            },
        });
        // What is wrong is wrong with the draft that was given, not with its copy.
        make_with_target(&input, target).map_err(|error| match error {
            BundleError::Draft { problem, more, .. } => {
                BundleError::Draft { path: self.path.clone(), action: "imported", problem, more }
            }
            other => other,
        })
    }

    /// What is wrong with the embedding that came along, if it is not the target's.
    fn embedding_problem<K: Kernels>(&self, target: &Target<K>) -> Option<Problem> {
        let own = self.embedding.as_ref()?;
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size);
        if (vocab, width) != (target.config().vocab_size, target.config().hidden_size) {
            return None; // told by name when the bundle is made
        }
        let (mut differences, mut squares) = (0.0f64, 0.0f64);
        for first in (0..vocab).step_by(EMBEDDING_ROWS) {
            let ids: Vec<u32> = (first..vocab.min(first + EMBEDDING_ROWS)).map(|id| id as u32).collect();
            let mut ops = Infer::new(target.kernels().as_ref());
            let rows = ops.embed(target.embedding(), &ids, target.config().embed_scale);
            for (theirs, ours) in own[first * width..].iter().zip(ops.values(&rows)) {
                differences += f64::from(theirs - ours).powi(2);
                squares += f64::from(ours).powi(2);
            }
        }
        let share = (differences / squares.max(f64::MIN_POSITIVE)).sqrt();
        // A NaN is not the target's either.
        let same = share <= EMBEDDING_SHARE_MAX;
        (!same).then(|| Problem::OwnEmbedding { name: EMBEDDING.to_owned(), share })
    }
}
