//! A draft that somebody else trained, in the internal form.
//!
//! The layout is recognised by what is there. Every tensor is taken exactly once, in the shape that the configuration
//! implies; what is missing, left over, misshapen or of a wrong type is an error that names it as the file does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_formats::atomic::{self, AtomicDir, AtomicError};
use draftsmith_formats::gguf::{GgufFile, content_sha256, only_model};
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::mxint8;
use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};
use draftsmith_kernels::Kernels;
use draftsmith_model::{DraftConfig, DraftConfigError, DraftTensors, Infer, Linear, Ops, Target};
use serde_json::{Map, Value};

use super::{Layout, eagle3, parallel};
use crate::files::files_below;
use crate::make::{Made, MakeInput};
use crate::manifest::{CONFIG_FILE, ImportedFrom, WEIGHTS_FILE};
use crate::network::make_with_target;
use crate::problem::layer_problem;
use crate::{BundleError, Problem};

/// The target's embedding, which some drafts carry a copy of.
pub(crate) const EMBEDDING: &str = "embed_tokens.weight";
/// The head, which drafts that use the target's carry a copy of.
pub(crate) const HEAD: &str = "lm_head.weight";
/// How far a carried embedding may be from the target's, as root mean square of differences over that of values:
/// 4-bit rows differ by up to 0.1, other embeddings by 1 and more.
const EMBEDDING_SHARE_MAX: f64 = 0.2;
/// Rows compared at once.
const EMBEDDING_ROWS: usize = 1024;

/// A draft read from another layout.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The layout that was recognised.
    pub layout: Layout,
    /// Its configuration.
    pub config: DraftConfig,
    /// Its weights by internal name.
    pub tensors: DraftTensors,
    /// Draft ids to target ids; `None` if it proposes target ids.
    pub vocab_map: Option<VocabMap>,
    /// `[V, H]` the embedding that came along.
    pub embedding: Option<Vec<f32>>,
    /// `[Vd, H]` the target's head that came along, where the draft has none of its own.
    pub head: Option<Vec<f32>>,
    /// Two keys that name different layers; [`Imported::set_layers`] decides.
    pub(crate) contradiction: Option<Problem>,
    /// Where it was read.
    pub(crate) path: PathBuf,
    /// The file with the weights.
    pub(crate) weights: PathBuf,
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
pub fn import_with(path: &Path, layers: Option<&[u32]>) -> Result<Imported, BundleError> {
    if let Some(file) = gguf_file(path)? {
        return by_architecture(&file, &GgufFile::open(&file)?, layers);
    }
    let config = path.join(CONFIG_FILE);
    if path.is_dir() && config.is_file() {
        return by_config(path, &atomic::read(config)?, &mxint8::open(path)?, layers);
    }
    Err(BundleError::NoDraft { path: path.to_owned() })
}

/// A folder's draft, of the kind that its configuration names.
fn by_config(
    path: &Path,
    config: &[u8],
    open: &SafetensorsDir,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    let bad = |e: DraftConfigError| {
        let problem = Problem::Config { message: format!("`{CONFIG_FILE}`: {e}"), hint: e.hint() };
        BundleError::draft(path, "imported", vec![problem])
    };
    let written: Map<String, Value> =
        serde_json::from_slice(config).map_err(|e| bad(DraftConfigError::Json { message: e.to_string() }))?;
    match parallel::is_one(&written) {
        true => parallel::from_safetensors(path, written, open, layers),
        false => eagle3::from_safetensors(path, written, open, layers),
    }
}

/// A GGUF file's draft, of the kind that its architecture names.
fn by_architecture(
    path: &Path,
    file: &GgufFile<'_>,
    layers: Option<&[u32]>,
) -> Result<Imported, BundleError> {
    match file.get_str("general.architecture")? {
        parallel::ARCHITECTURE => parallel::from_gguf(path, file, layers),
        _ => eagle3::from_gguf(path, file, layers),
    }
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
    by_config(path, config, open, None)
}

/// Reads a draft from an opened GGUF file; `path` is for errors.
///
/// # Errors
/// Missing or mistyped keys; [`BundleError::Draft`] names what else is wrong.
pub fn import_gguf(path: &Path, file: &GgufFile<'_>) -> Result<Imported, BundleError> {
    by_architecture(path, file, None)
}

impl Imported {
    /// Sets the captured layers (0-based, output of layer), whatever the draft's configuration says.
    ///
    /// # Errors
    /// [`BundleError::LayerCount`].
    pub fn set_layers(&mut self, layers: &[u32]) -> Result<(), BundleError> {
        let (found, wanted) = (layers.len(), self.config.shape().captured_layers);
        self.config.set_target_layers(layers).map_err(|_| BundleError::LayerCount { found, wanted })?;
        self.contradiction = None;
        Ok(())
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
        if let Some(problem) =
            self.contradiction.clone().or_else(|| self.borrowed_problems(target).into_iter().next())
        {
            return Err(BundleError::draft(&self.path, "imported", vec![problem]));
        }
        let num_layers = target.config().num_layers as u32;
        if let Some(problem) = layer_problem(&self.config, num_layers) {
            return Err(BundleError::draft(&self.path, "imported", vec![problem]));
        }
        let bad = |source| BundleError::Config { path: self.path.join(CONFIG_FILE), source };
        let mut config = self.config.clone();
        config.set_target_layers(&self.config.layers(num_layers)).map_err(bad)?;
        let value = config.to_value().map_err(bad)?;
        let mut tensors: Vec<TensorData> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| TensorData::bf16(name, shape, values))
            .collect();
        if let Some(map) = &self.vocab_map {
            let (d2t, t2d) = (map.d2t(), map.t2d());
            tensors.push(TensorData::i64("d2t", &[d2t.len()], &d2t));
            tensors.push(TensorData::bool("t2d", &[t2d.len()], &t2d));
        }
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

    /// The keys of its configuration that name different layers.
    pub fn contradiction(&self) -> Option<&Problem> {
        self.contradiction.as_ref()
    }

    /// What is wrong with embedding and head that came along, where they are not the target's.
    pub fn borrowed_problems<K: Kernels>(&self, target: &Target<K>) -> Vec<Problem> {
        let shape = self.config.shape();
        if (shape.vocab_size, shape.hidden_size) != (target.config().vocab_size, target.config().hidden_size)
        {
            return Vec::new(); // told by name when the bundle is made
        }
        let all: Vec<u32> = (0..shape.vocab_size as u32).collect();
        let part = self.vocab_map.as_ref().map_or(&all[..], |map| map.target_ids());
        let scale = target.config().embed_scale;
        let embedding =
            self.embedding.as_ref().map(|own| (EMBEDDING, own, target.embedding(), scale, &all[..]));
        let head = self.head.as_ref().map(|own| (HEAD, own, target.head(), 1.0, part));
        let other = embedding.into_iter().chain(head).filter_map(|(name, own, table, scale, ids)| {
            let share = share_of_difference(target, own, table, scale, ids);
            // A NaN is not the target's either.
            let same = share <= EMBEDDING_SHARE_MAX;
            (!same).then(|| Problem::OwnEmbedding { name: name.to_owned(), share })
        });
        other.collect()
    }
}

/// How far rows `[ids.len(), H]` are from those of a target's table, as a share of these.
fn share_of_difference<K: Kernels>(
    target: &Target<K>,
    own: &[f32],
    table: &Arc<Linear<K::Packed>>,
    scale: f32,
    ids: &[u32],
) -> f64 {
    let (mut differences, mut squares) = (0.0f64, 0.0f64);
    let width = target.config().hidden_size;
    for (part, theirs) in ids.chunks(EMBEDDING_ROWS).zip(own.chunks(EMBEDDING_ROWS * width)) {
        let mut ops = Infer::new(target.kernels().as_ref());
        let rows = ops.embed(table, part, scale);
        for (theirs, ours) in theirs.iter().zip(ops.values(&rows)) {
            differences += f64::from(theirs - ours).powi(2);
            squares += f64::from(ours).powi(2);
        }
    }
    (differences / squares.max(f64::MIN_POSITIVE)).sqrt()
}
