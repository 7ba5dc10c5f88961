//! A draft loaded for decoding, whatever its kind: configuration, packed weights and vocabulary map from one folder or
//! from memory, and what decoding asks of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use draftsmith_core::{VocabMap, VocabMapError};
use draftsmith_formats::mxint8;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_kernels::{KernelError, Kernels, Memory, PackMode, WeightView};

use crate::draft_config::DraftConfigError;
use crate::infer::{CacheAttend, Linear, Rows};
use crate::kinds::{Draft, DraftConfig};
use crate::weights::BuildWeights;

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
        source: DraftConfigError,
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

/// What the network is asked, by hand.
pub struct DraftQuestion<'a> {
    /// `[N]` the token that follows each feature's position; then the tokens fed at later steps. Where these end the
    /// network feeds its own arg-max.
    pub token_ids: &'a [u32],
    /// `[N, captured layers * Ht]` captured states side by side.
    pub features: &'a [f32],
    /// Steps after the first.
    pub depth: usize,
    /// Rows `[R, H]` of the target's embedding for tokens that stand from this one on among those fed.
    pub embed: &'a mut dyn FnMut(usize, &[u32]) -> Vec<f32>,
}

/// What it answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DraftAnswer {
    /// The tokens that were fed.
    pub token_ids: Vec<u32>,
    /// Their embeddings, one below the other.
    pub embeddings: Vec<f32>,
    /// `[H]` output of the last layer at the last slot, before the final norm.
    pub hidden: Vec<f32>,
    /// `[Vd]` logits there.
    pub logits: Vec<f32>,
}

/// What all others need of a loaded draft.
pub trait DraftNetwork<K: Kernels> {
    /// Shapes and switches.
    fn config(&self) -> DraftConfig;
    /// Draft ids to target ids; `None` if it proposes target ids.
    fn vocab_map(&self) -> Option<&VocabMap>;
    /// Bytes of keys and values that it keeps for each position.
    fn kv_bytes_per_token(&self) -> usize;
    /// Runs the network on a question that fits it.
    fn answer(&self, kernels: &K, question: DraftQuestion<'_>) -> DraftAnswer;
    /// How it proposes.
    fn proposer(self: Box<Self>) -> Proposer<K>;
}

/// Activations that several may share.
pub type Shared<K> = Arc<Rows<<K as Memory>::Buf>>;

/// How a draft proposes.
pub enum Proposer<K: Kernels> {
    /// Token by token.
    Chain(Box<dyn ChainNetwork<K>>),
    /// Several levels in one pass.
    Pass(Box<dyn PassNetwork<K>>),
}

/// A network that proposes token by token: what it says of one is fed with the next.
pub trait ChainNetwork<K: Kernels>: DraftNetwork<K> + Send + Sync {
    /// An empty cache of a sequence; `None` if it attends to nothing.
    fn new_kv(&self, kernels: &K) -> Option<K::Kv>;
    /// Width of a head.
    fn head_dim(&self) -> usize;
    /// Captured states of positions `[R, captured layers * Ht]` → what is fed with the tokens behind them `[R, H]`.
    fn project(&self, kernels: &K, features: &Shared<K>) -> Shared<K>;
    /// Embeddings of tokens `[R, H]` and what is fed with them → what is fed with the next `[R, H]`, and inputs of the head
    /// `[R, H]`.
    fn step(
        &self,
        kernels: &K,
        embedded: &Shared<K>,
        hidden: &Shared<K>,
        positions: &[u32],
        attend: &mut CacheAttend<'_, K::Kv>,
    ) -> (Shared<K>, Shared<K>);
    /// Its own head, `[Vd, H]`.
    fn head(&self) -> &Arc<Linear<K::Packed>>;
}

/// Keys and values of one sequence's committed positions in all layers.
pub struct DraftKv<K: Kernels> {
    /// A cache for each layer.
    pub(crate) layers: Vec<K::Kv>,
    pub(crate) len: usize,
}

impl<K: Kernels> DraftKv<K> {
    /// Committed positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first position.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Goes back to the first `len` positions, if there are more.
    pub fn rollback_to(&mut self, kernels: &K, len: usize) {
        self.len = self.len.min(len);
        let len = self.len;
        self.layers.iter_mut().for_each(|layer| kernels.kv_compact(layer, len, &[]));
    }
}

/// One sequence in a pass.
pub struct PassPart<'a, K: Kernels> {
    /// Its caches.
    pub kv: &'a mut DraftKv<K>,
    /// The tokens behind its new positions, whose captured states are handed over with it.
    pub next_tokens: &'a [u32],
}

/// Levels to be corrected by the tokens before them.
pub struct Correction<'a, K: Kernels> {
    /// `[R, H]` inputs of the head.
    pub output: Shared<K>,
    /// `[R, Vd]` what the head makes of them.
    pub logits: Shared<K>,
    /// `[R]` the token before each.
    pub tokens: &'a [u32],
    /// `[R, M]` what the correction of the level before left; `None` at the first.
    pub state: Option<Shared<K>>,
    /// Confidences are wanted, too.
    pub confident: bool,
}

/// Corrected levels.
pub struct Corrected<K: Kernels> {
    /// `[R, Vd]`
    pub logits: Vec<f32>,
    /// `[R, M]` for the next level, if the kind has such.
    pub state: Option<Shared<K>>,
    /// `[R]` logits of the probability that the best token is accepted, if they are wanted and the kind has such.
    pub confidence: Option<Vec<f32>>,
}

/// A network that proposes several levels in one pass.
pub trait PassNetwork<K: Kernels>: DraftNetwork<K> + Send + Sync {
    /// Levels of a pass.
    fn levels(&self) -> usize;
    /// Empty caches of a sequence.
    fn new_kv(&self, kernels: &K) -> DraftKv<K>;
    /// Takes positions of a sequence into its caches without asking what follows; `features` are theirs.
    fn take_in(&self, kernels: &K, features: &Shared<K>, part: PassPart<'_, K>);
    /// Takes in what is new of each sequence, of which all have something, and proposes behind it: inputs of the head
    /// `[sequences * levels, H]`. `embed` gives rows `[R, H]` of the target's embedding.
    fn pass(
        &self,
        kernels: &K,
        features: &Shared<K>,
        parts: &mut [PassPart<'_, K>],
        embed: &mut dyn FnMut(&[u32]) -> Shared<K>,
    ) -> Shared<K>;
    /// Its own head; `None` if it uses that of the target, or rows of it.
    fn head(&self) -> Option<&Arc<Linear<K::Packed>>> {
        None
    }
    /// A window that is shorter than the block that it should hold: both lengths.
    fn short_window(&self) -> Option<[usize; 2]> {
        None
    }
    /// Levels depend on the tokens above them: [`PassNetwork::correct`] is asked for each.
    fn corrects(&self) -> bool {
        false
    }
    /// Corrects levels by the tokens before them; `None` where they do not depend on each other.
    fn correct(&self, _kernels: &K, _levels: Correction<'_, K>) -> Option<Corrected<K>> {
        None
    }
    /// `[R]` logits of the probability that the best token at inputs of the head `[R, H]` is accepted, if that depends on
    /// nothing else.
    fn confidence(&self, _kernels: &K, _output: &Shared<K>) -> Option<Vec<f32>> {
        None
    }
}

/// A network that is packed by its configuration.
pub(crate) trait PackDraft<K: Kernels, C>: Sized {
    /// Packs what `source` holds; without a map the draft speaks the whole target vocabulary.
    fn pack(
        config: C,
        vocab_map: Option<VocabMap>,
        source: &mut Packing<'_, K>,
        mode: PackMode,
    ) -> Result<Self, DraftError>;
}

/// Takes weights by name, in the shapes that a network asks for, and packs them.
pub(crate) struct Packing<'a, K> {
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
        // A weight may be stored with more dimensions of one in front.
        let outer = shape.len().saturating_sub(wanted.len());
        if shape[outer..] != *wanted || shape[..outer].iter().any(|n| *n != 1) {
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
    /// Packs a draft from values in memory; `vocab_map` is `None` if it proposes target ids.
    ///
    /// `mode` is normally [`PackMode::Q8`]: the draft then stays in the caches of the CPU; [`PackMode::F32`] is
    /// the specification.
    ///
    /// # Errors
    /// A missing, extra or misshapen tensor, named.
    pub fn from_tensors(
        kernels: &K,
        config: DraftConfig,
        tensors: &DraftTensors,
        vocab_map: Option<VocabMap>,
        mode: PackMode,
        place: &str,
    ) -> Result<Draft<K>, DraftError> {
        let mut source = Packing { kernels, tensors, mode, place, used: 0 };
        let known = config.tensors();
        let draft = Draft::pack(config, vocab_map, &mut source, mode)?;
        if source.used != tensors.len() {
            let extra = tensors.keys().find(|name| !known.iter().any(|(k, _)| k == *name));
            if let Some(name) = extra {
                return Err(DraftError::Unexpected { place: place.to_owned(), name: name.clone() });
            }
        }
        Ok(draft)
    }

    /// Loads a draft folder: `config.json` and `model.safetensors` [formats §2.1].
    ///
    /// # Errors
    /// As [`read_draft`] and [`Draft::from_tensors`].
    pub fn load(kernels: &K, dir: &Path, mode: PackMode) -> Result<Draft<K>, DraftError> {
        let (config, tensors, vocab_map) = read_draft(dir)?;
        Draft::from_tensors(kernels, config, &tensors, vocab_map, mode, &dir.display().to_string())
    }
}

/// The configuration of a draft folder; its weights are not looked at.
///
/// # Errors
/// `config.json` is missing, or cannot be read as one.
pub fn read_draft_config(dir: &Path) -> Result<DraftConfig, DraftError> {
    let path = dir.join("config.json");
    let place = path.display().to_string();
    let text =
        std::fs::read_to_string(&path).map_err(|source| DraftError::Read { path: place.clone(), source })?;
    DraftConfig::from_json(&text).map_err(|source| DraftError::Config { place, source })
}

/// Reads a draft folder into memory: configuration, float tensors, vocabulary map if the kind has one.
/// `embed_tokens.weight` is skipped where the target's embedding is used.
///
/// # Errors
/// A file that is missing or damaged, named.
pub fn read_draft(dir: &Path) -> Result<(DraftConfig, DraftTensors, Option<VocabMap>), DraftError> {
    let place = dir.display().to_string();
    let config = read_draft_config(dir)?;
    let shape = config.shape();
    let file = mxint8::open(dir)?;
    let mut tensors = DraftTensors::new();
    for name in file.names() {
        if matches!(name, "d2t" | "t2d") || name == "embed_tokens.weight" && !shape.has_embedding {
            continue;
        }
        let tensor = file.get(name)?;
        tensors.insert(name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32()?));
    }
    let whole = shape.draft_vocab_size == shape.vocab_size;
    let vocab_map = if !shape.has_vocab_map {
        None
    } else if file.find("d2t").is_none() && whole {
        Some(VocabMap::identity(shape.vocab_size))
    } else {
        let d2t = file.get("d2t")?;
        d2t.expect_shape(&[shape.draft_vocab_size])?;
        let t2d = file.get("t2d")?;
        t2d.expect_shape(&[shape.vocab_size])?;
        let map = VocabMap::from_tensors(&d2t.to_i64()?, &t2d.to_bool()?);
        Some(map.map_err(|source| DraftError::Vocab { place, source })?)
    };
    Ok((config, tensors, vocab_map))
}
