//! A draft loaded for decoding: configuration, packed weights and vocabulary map from one folder or from memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use draftsmith_core::{VocabMap, VocabMapError};
use draftsmith_formats::safetensors_dir::{SafetensorsDir, SafetensorsError};
use draftsmith_kernels::{KernelError, Kernels, KvDtype, PackMode, WeightView};

use crate::eagle3::{BuildWeights, Eagle3, Eagle3Config, Eagle3ConfigError, Eagle3Weights};
use crate::infer::Linear;

/// A draft that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// `config.json` could not be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// File.
        path: String,
        /// Cause.
        source: std::io::Error,
    },
    /// `config.json` is wrong.
    #[error("`{place}`: {source}")]
    Config {
        /// File.
        place: String,
        /// Cause.
        source: Eagle3ConfigError,
    },
    /// The weights file is broken.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A tensor is missing.
    #[error("draft `{place}` has no tensor `{name}`")]
    Missing {
        /// Folder.
        place: String,
        /// Tensor.
        name: String,
    },
    /// A tensor that the network does not use.
    #[error("draft `{place}` has tensor `{name}`, which its configuration does not use")]
    Unexpected {
        /// Folder.
        place: String,
        /// Tensor.
        name: String,
    },
    /// A tensor of another shape.
    #[error("tensor `{name}` of draft `{place}` has shape {found:?}, expected {wanted:?}")]
    Shape {
        /// Folder.
        place: String,
        /// Tensor.
        name: String,
        /// Shape found.
        found: Vec<usize>,
        /// Shape expected.
        wanted: Vec<usize>,
    },
    /// `d2t` and `t2d` are no vocabulary map.
    #[error("draft `{place}`: {source}")]
    Vocab {
        /// Folder.
        place: String,
        /// Cause.
        source: VocabMapError,
    },
    /// A weight does not fit its shape.
    #[error("draft `{place}`: {source}")]
    Kernel {
        /// Folder.
        place: String,
        /// Cause.
        source: KernelError,
    },
}

impl DraftError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            DraftError::Read { .. } => {
                Some("a draft is a folder with `config.json` and `model.safetensors`".into())
            }
            DraftError::Config { source, .. } => source.hint(),
            DraftError::Safetensors(e) => e.hint(),
            DraftError::Missing { .. } | DraftError::Unexpected { .. } | DraftError::Shape { .. } => {
                Some(
                    "a draft in another engine's layout is made usable by `draftsmith bundle import FOLDER --target \
                     TARGET --out BUNDLE`; of one in SpecForge's, `config.json` and weights must be of one training"
                        .into(),
                )
            }
            DraftError::Vocab { .. } | DraftError::Kernel { .. } => {
                Some("the folder's files are not of one draft: take all of them from the same place".into())
            }
        }
    }
}

/// Values of a draft by tensor name, `[out, in]` row-major.
pub type DraftTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Packed weights of an EAGLE-3 draft.
pub type PackedEagle3<K> = Eagle3Weights<Arc<Linear<<K as Kernels>::Packed>>, Arc<<K as Kernels>::Buf>>;

/// An EAGLE-3 draft ready to decode.
pub struct Draft<K: Kernels> {
    /// The network.
    pub network: Eagle3,
    /// Its weights.
    pub weights: PackedEagle3<K>,
    /// Draft ids to target ids.
    pub vocab_map: VocabMap,
    kv_dtype: KvDtype,
}

struct Packing<'a, K> {
    kernels: &'a K,
    tensors: &'a DraftTensors,
    mode: PackMode,
    place: &'a str,
    used: usize,
}

impl<K: Kernels> Packing<'_, K> {
    fn take(&mut self, name: &str, wanted: &[usize]) -> Result<&[f32], DraftError> {
        let place = self.place.to_owned();
        let (shape, values) = self
            .tensors
            .get(name)
            .ok_or_else(|| DraftError::Missing { place: place.clone(), name: name.to_owned() })?;
        if shape != wanted {
            let (found, wanted) = (shape.clone(), wanted.to_vec());
            return Err(DraftError::Shape { place, name: name.to_owned(), found, wanted });
        }
        self.used += 1;
        Ok(values)
    }
}

impl<K: Kernels> BuildWeights for Packing<'_, K> {
    type W = Arc<Linear<K::Packed>>;
    type N = Arc<K::Buf>;
    type Error = DraftError;

    fn linear(&mut self, name: &str, out: usize, inp: usize) -> Result<Self::W, DraftError> {
        let (kernels, mode, place) = (self.kernels, self.mode, self.place.to_owned());
        let values = self.take(name, &[out, inp])?;
        let packed = kernels
            .pack(name, &WeightView::f32(values, out, inp), mode)
            .map_err(|source| DraftError::Kernel { place, source })?;
        Ok(Arc::new(Linear { packed, out_features: out, in_features: inp }))
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Self::N, DraftError> {
        let kernels = self.kernels;
        Ok(Arc::new(kernels.upload(self.take(name, &[width])?)))
    }
}

impl<K: Kernels> Draft<K> {
    /// Packs a draft from values in memory.
    ///
    /// `mode` is normally [`PackMode::Q8`]: the draft then stays in the caches of the CPU; [`PackMode::F32`] is
    /// the specification.
    ///
    /// # Errors
    /// A missing, extra or misshapen tensor, named.
    pub fn from_tensors(
        kernels: &K,
        config: Eagle3Config,
        tensors: &DraftTensors,
        vocab_map: VocabMap,
        mode: PackMode,
        place: &str,
    ) -> Result<Draft<K>, DraftError> {
        let mut source = Packing { kernels, tensors, mode, place, used: 0 };
        let weights = Eagle3Weights::build(&config, &mut source)?;
        if source.used != tensors.len() {
            let known = config.tensors();
            let extra = tensors.keys().find(|name| !known.iter().any(|(k, _)| k == *name));
            if let Some(name) = extra {
                return Err(DraftError::Unexpected { place: place.to_owned(), name: name.clone() });
            }
        }
        Ok(Draft { network: Eagle3::new(config), weights, vocab_map, kv_dtype: mode.kv_dtype() })
    }

    /// An empty cache of its layer.
    pub fn new_kv(&self, kernels: &K) -> K::Kv {
        let config = &self.network.config;
        kernels.kv_new(config.num_key_value_heads, config.head_dim, self.kv_dtype)
    }

    /// Bytes of keys and values that [`Draft::new_kv`] keeps for each position.
    pub fn kv_bytes_per_token(&self) -> usize {
        let config = &self.network.config;
        2 * config.num_key_value_heads * config.head_dim * self.kv_dtype.bytes()
    }

    /// Loads a draft folder: `config.json` and `model.safetensors` [formats §2.1].
    pub fn load(kernels: &K, dir: &Path, mode: PackMode) -> Result<Draft<K>, DraftError> {
        let (config, tensors, vocab_map) = read_draft(dir)?;
        Draft::from_tensors(kernels, config, &tensors, vocab_map, mode, &dir.display().to_string())
    }
}

/// Reads a draft folder into memory: configuration, float tensors, vocabulary map. `embed_tokens.weight` is
/// skipped: the target's embedding is used.
pub fn read_draft(dir: &Path) -> Result<(Eagle3Config, DraftTensors, VocabMap), DraftError> {
    let place = dir.display().to_string();
    let config_path = dir.join("config.json");
    let text = std::fs::read_to_string(&config_path)
        .map_err(|source| DraftError::Read { path: config_path.display().to_string(), source })?;
    let config = Eagle3Config::from_json(&text)
        .map_err(|source| DraftError::Config { place: config_path.display().to_string(), source })?;
    let file = SafetensorsDir::open(dir)?;
    let mut tensors = DraftTensors::new();
    for name in file.names() {
        if matches!(name, "d2t" | "t2d" | "embed_tokens.weight") {
            continue;
        }
        let tensor = file.get(name)?;
        tensors.insert(name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32()?));
    }
    let vocab_map = if file.find("d2t").is_none() && config.draft_vocab_size == config.vocab_size {
        VocabMap::identity(config.vocab_size)
    } else {
        let d2t = file.get("d2t")?;
        d2t.expect_shape(&[config.draft_vocab_size])?;
        let t2d = file.get("t2d")?;
        t2d.expect_shape(&[config.vocab_size])?;
        VocabMap::from_tensors(&d2t.to_i64()?, &t2d.to_bool()?)
            .map_err(|source| DraftError::Vocab { place, source })?
    };
    Ok((config, tensors, vocab_map))
}
