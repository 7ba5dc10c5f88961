//! What a check can find: one variant per kind, with what was found and what was wanted.

use draftsmith_model::DraftConfig;
use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Something about a bundle that does not hold.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Problem {
    /// The manifest lists a file that is not there.
    #[error("file `{path}` is missing")]
    FileMissing {
        /// Path inside the bundle.
        path: String,
    },
    /// The manifest lists a path that leads out of the bundle.
    #[error("file `{path}` is not a path inside the bundle")]
    FilePath {
        /// Path as listed.
        path: String,
    },
    /// A file has another size than listed.
    #[error("file `{path}` has {found} bytes, `bundle.json` says {wanted}")]
    FileSize {
        /// Path inside the bundle.
        path: String,
        /// Listed size.
        wanted: u64,
        /// Size on disk.
        found: u64,
    },
    /// A file has other bytes than listed.
    #[error("file `{path}` has hash {found}, `bundle.json` says {wanted}")]
    FileHash {
        /// Path inside the bundle.
        path: String,
        /// Listed hash.
        wanted: String,
        /// Hash on disk.
        found: String,
    },
    /// A file that the manifest does not list.
    #[error("file `{path}` is not listed in `bundle.json`")]
    FileUnlisted {
        /// Path inside the bundle.
        path: String,
    },
    /// A file that every bundle has is not listed.
    #[error("`bundle.json` does not list `{path}`")]
    FileNotListed {
        /// Path inside the bundle.
        path: String,
    },
    /// Weights that cannot be read at all.
    #[error("{message}")]
    Weights {
        /// The reader's words, file named.
        message: String,
    },
    /// A tensor is missing.
    #[error("tensor `{name}` is missing; wanted {dtype} {shape:?}")]
    TensorMissing {
        /// Which.
        name: String,
        /// Wanted type.
        dtype: &'static str,
        /// Wanted shape.
        shape: Vec<usize>,
    },
    /// A tensor that no part of the network takes.
    #[error("tensor `{name}` {shape:?} belongs to no part of the draft")]
    TensorExtra {
        /// Which.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two tensors of a file are the same tensor of the draft.
    #[error("tensors `{before}` and `{name}` are the same part of the draft")]
    TensorTwice {
        /// The later one.
        name: String,
        /// The earlier one.
        before: String,
    },
    /// A tensor of an export holds other numbers than the bundle's.
    #[error("tensor `{name}` differs from the bundle: number {index} is {found}, wanted {wanted}")]
    TensorDiffers {
        /// As the export calls it.
        name: String,
        /// Flat index of the first difference.
        index: usize,
        /// Number in the bundle.
        wanted: f64,
        /// Number in the export.
        found: f64,
    },
    /// Two keys of a foreign configuration name different layers.
    #[error("`{}` captures what layers {written_by:?} write, `{}` what layers {read_by:?} read", keys[0], keys[1])]
    LayersDisagree {
        /// The two keys.
        keys: [&'static str; 2],
        /// Counted from 0.
        written_by: Vec<i64>,
        /// Of the layer behind.
        read_by: Vec<i64>,
    },
    /// RoPE divisors that no configuration key can say.
    #[error("tensor `{name}` holds divisors that are no known RoPE scaling")]
    RopeDivisors {
        /// Which.
        name: String,
    },
    /// A draft brings an embedding that is not its target's.
    #[error("tensor `{name}` is not the target's: it differs by {:.0} % of its size", share * 100.0)]
    OwnEmbedding {
        /// Which.
        name: String,
        /// Root mean square of the differences over that of the target's rows.
        share: f64,
    },
    /// An engine cannot serve the draft, or may stumble over it.
    #[error("{engine} {}: {what}", if *fatal { "cannot serve this draft" } else { "may refuse this draft" })]
    Engine {
        /// Which.
        engine: &'static str,
        /// Why.
        what: String,
        /// False if it may work.
        fatal: bool,
    },
    /// A fact of an export is not the bundle's.
    #[error("`{key}` is {found} in the export, the bundle wants {wanted}")]
    ExportDiffers {
        /// Key of the export.
        key: String,
        /// What follows from the bundle.
        wanted: String,
        /// What stands there.
        found: String,
    },
    /// The layer gives another hidden state than the bundle's network.
    #[error("probe {probe} at depth {depth}: hidden state {index} is {found}, wanted {wanted}")]
    HiddenDiffers {
        /// 0-based probe.
        probe: usize,
        /// Draft steps after the first.
        depth: u32,
        /// Where the difference is largest.
        index: usize,
        /// The bundle's.
        wanted: f32,
        /// The export's.
        found: f32,
    },
    /// A tensor has another shape.
    #[error("tensor `{name}` has shape {found:?}, wanted {wanted:?}")]
    TensorShape {
        /// Which.
        name: String,
        /// Shape from `config.json`.
        wanted: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has another element type.
    #[error("tensor `{name}` is {found}, wanted {wanted}")]
    TensorDtype {
        /// Which.
        name: String,
        /// Wanted type.
        wanted: &'static str,
        /// Type in the file.
        found: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor `{name}` holds {count} numbers that are not finite, the first at index {first}")]
    TensorNotFinite {
        /// Which.
        name: String,
        /// How many.
        count: usize,
        /// Flat index of the first.
        first: usize,
    },
    /// All numbers of a tensor are equal (a norm of ones is not meant).
    #[error("every number of tensor `{name}` is {value}")]
    TensorConstant {
        /// Which.
        name: String,
        /// The value.
        value: f32,
    },
    /// The weights look as they were made at the start of training.
    #[error(
        "the draft looks untrained: every norm is 1 and every matrix has the initial spread of {initializer_range}"
    )]
    Untrained {
        /// Standard deviation of initial weights.
        initializer_range: f32,
    },
    /// `d2t` and `t2d` make no vocabulary map.
    #[error("{contradiction}")]
    VocabMap {
        /// Which entry contradicts, in the words of [`draftsmith_core::VocabMapError`].
        contradiction: String,
    },
    /// `config.json` cannot be read as a draft.
    #[error("{message}")]
    Config {
        /// The reader's words, file named.
        message: String,
        /// The reader's advice.
        hint: Option<String>,
    },
    /// A captured layer that the target does not have.
    #[error("the draft reads what layer {layer} writes, but the target has {num_layers} layers, 0 to {}", num_layers.saturating_sub(1))]
    LayerOutside {
        /// Counted from 0.
        layer: u32,
        /// Of the target.
        num_layers: u32,
    },
    /// Captured layers that are not different ones in the order in which a target computes them.
    #[error("the draft reads layers {layers:?}, expected {} different ones in ascending order", in_words(layers.len()))]
    LayerOrder {
        /// Counted from 0.
        layers: Vec<u32>,
    },
    /// `config.json` lacks what an engine needs.
    #[error("`config.json`: `{key}` is {found}, but {engine} needs {wanted}")]
    ConfigKey {
        /// Dotted key.
        key: String,
        /// JSON text found.
        found: String,
        /// Who needs it.
        engine: &'static str,
        /// What it needs.
        wanted: String,
    },
    /// Manifest and `config.json` disagree.
    #[error("`bundle.json` says {key} is {manifest}, `config.json` says {config}")]
    ManifestDisagrees {
        /// What about.
        key: &'static str,
        /// Value in the manifest.
        manifest: String,
        /// Value in the configuration.
        config: String,
    },
    /// The draft was made for another target.
    #[error("the draft was trained for a target with {what} {trained}, but this target has {found}")]
    WrongTarget {
        /// `hidden size`, `vocabulary`, `tokenizer hash`, ...
        what: &'static str,
        /// Value in the bundle.
        trained: String,
        /// Value of the target at hand.
        found: String,
    },
    /// The draft is meant for fewer positions than the target.
    #[error("`config.json`: `max_position_embeddings` is {found}, but the target's context is {context}")]
    ShortContext {
        /// Positions of the draft.
        found: usize,
        /// Positions of the target.
        context: u64,
    },
    /// The network gave another number of logits than stored.
    #[error("probe {probe}: the draft network gave {found} logits, {wanted} are stored")]
    ProbeSize {
        /// 0-based probe.
        probe: usize,
        /// Stored.
        wanted: usize,
        /// Given.
        found: usize,
    },
    /// The network gave other logits than stored.
    #[error(
        "probe {probe} at depth {depth}: the draft network gives logit {found} for draft id {draft_id}, stored is {stored}"
    )]
    ProbeDiffers {
        /// 0-based probe.
        probe: usize,
        /// Draft steps after the first.
        depth: u32,
        /// Where the difference is largest.
        draft_id: usize,
        /// Stored value.
        stored: f32,
        /// Value now.
        found: f32,
    },
    /// The target embeds a token of the probe in another way than when the bundle was made.
    #[error("the target's embedding of token {token_id} is not the one that the draft was bundled with")]
    EmbeddingDiffers {
        /// Which.
        token_id: u32,
    },
    /// The stored probe cannot be read.
    #[error("{message}")]
    ProbeFile {
        /// The reader's words, file named.
        message: String,
    },
    /// The bundle is larger than what we ship.
    #[error("the bundle has {bytes} bytes; more than {limit} do not belong into a source repository")]
    Large {
        /// Sum of its files.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

impl Problem {
    /// False for remarks about something that may work all the same.
    pub fn is_fatal(&self) -> bool {
        !matches!(
            self,
            Problem::Engine { fatal: false, .. } | Problem::ShortContext { .. } | Problem::Large { .. }
        )
    }

    /// Stable name for scripts.
    pub fn kind(&self) -> &'static str {
        match self {
            Problem::FileMissing { .. } => "file_missing",
            Problem::FilePath { .. } => "file_path",
            Problem::FileSize { .. } => "file_size",
            Problem::FileHash { .. } => "file_hash",
            Problem::FileUnlisted { .. } => "file_unlisted",
            Problem::FileNotListed { .. } => "file_not_listed",
            Problem::Weights { .. } => "weights",
            Problem::TensorMissing { .. } => "tensor_missing",
            Problem::TensorExtra { .. } => "tensor_extra",
            Problem::TensorTwice { .. } => "tensor_twice",
            Problem::TensorDiffers { .. } => "tensor_differs",
            Problem::LayersDisagree { .. } => "layers_disagree",
            Problem::RopeDivisors { .. } => "rope_divisors",
            Problem::OwnEmbedding { .. } => "own_embedding",
            Problem::Engine { .. } => "engine",
            Problem::ExportDiffers { .. } => "export_differs",
            Problem::HiddenDiffers { .. } => "hidden_differs",
            Problem::TensorShape { .. } => "tensor_shape",
            Problem::TensorDtype { .. } => "tensor_dtype",
            Problem::TensorNotFinite { .. } => "tensor_not_finite",
            Problem::TensorConstant { .. } => "tensor_constant",
            Problem::Untrained { .. } => "untrained",
            Problem::VocabMap { .. } => "vocab_map",
            Problem::Config { .. } => "config",
            Problem::LayerOutside { .. } => "layer_outside",
            Problem::LayerOrder { .. } => "layer_order",
            Problem::ConfigKey { .. } => "config_key",
            Problem::ManifestDisagrees { .. } => "manifest_disagrees",
            Problem::WrongTarget { .. } => "wrong_target",
            Problem::ShortContext { .. } => "short_context",
            Problem::ProbeSize { .. } => "probe_size",
            Problem::ProbeDiffers { .. } => "probe_differs",
            Problem::EmbeddingDiffers { .. } => "embedding_differs",
            Problem::ProbeFile { .. } => "probe_file",
            Problem::Large { .. } => "large",
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Problem::FileMissing { .. } | Problem::FileSize { .. } | Problem::FileHash { .. } => {
                "the bundle is not what was made: fetch it again, or make it anew with `draftsmith bundle`".into()
            }
            Problem::FileUnlisted { .. } => "remove the file, or keep it outside the bundle".into(),
            Problem::TensorExtra { name, .. } if name.contains("embed") => {
                "the embedding is the target's own: drop it from the draft".into()
            }
            Problem::TensorShape { wanted, found, .. } if wanted.iter().rev().eq(found) => {
                "it is transposed: weights are stored as [out, in]".into()
            }
            Problem::TensorMissing { .. } | Problem::TensorExtra { .. } | Problem::TensorShape { .. } => {
                "names and shapes follow from `config.json` in the SpecForge layout; check both files".into()
            }
            Problem::TensorDtype { wanted, .. } if wanted.contains("F16") && *wanted != "BF16" => {
                "use the draft as it was trained: quantised weights of a draft are not read".into()
            }
            Problem::TensorDtype { .. } => {
                "weights are stored as `draft.dtype` of `bundle.json` says, `d2t` as I64, `t2d` as BOOL; make the bundle anew from the \
                 checkpoint".into()
            }
            Problem::TensorNotFinite { .. } => "training diverged: go back to an earlier checkpoint, lower `train.lr`".into(),
            Problem::TensorConstant { .. } | Problem::Untrained { .. } => {
                "bundle a checkpoint that was trained".into()
            }
            Problem::VocabMap { .. } => {
                "`d2t` holds offsets (target id - draft id), ascending by target id, and `t2d` marks the same ids".into()
            }
            Problem::WrongTarget { .. } => "use the target named in `bundle.json`, or train a draft for this one".into(),
            Problem::ShortContext { .. } => "engines may refuse or crash on longer prompts".into(),
            Problem::ProbeDiffers { .. } => {
                "the network that runs the draft is not the one that trained it; accept length would suffer".into()
            }
            Problem::OwnEmbedding { .. } => {
                "drafts with an embedding of their own are not built here; is this the target it was trained for?".into()
            }
            Problem::LayersDisagree { .. } => "say which is meant: `--layers A,B,C`, counted from 0".into(),
            Problem::RopeDivisors { .. } => "import the draft from its safetensors folder, whose `config.json` names the scaling".into(),
            Problem::Engine { fatal: true, .. } => "choose another layout, or train a draft without this switch".into(),
            Problem::TensorDiffers { .. } | Problem::ExportDiffers { .. } | Problem::HiddenDiffers { .. } => {
                "export the bundle again".into()
            }
            Problem::TensorTwice { .. } => "remove one of the two".into(),
            Problem::Large { .. } => "store its weights in 8 bits (`bundle.weights = \"mxint8\"`), or ship it by a model hub".into(),
            Problem::Config { hint, .. } => return hint.clone(),
            Problem::LayerOutside { .. } | Problem::LayerOrder { .. } => {
                "import the draft with the layers that it was trained on, `--layers LOW,MID,HIGH` counted from 0, or \
                 name the target that it was made for"
                    .into()
            }
            Problem::FilePath { .. } | Problem::FileNotListed { .. } | Problem::Weights { .. } => {
                "the bundle is not what `draftsmith bundle` makes: make it anew from its checkpoint or import".into()
            }
            Problem::ConfigKey { .. } | Problem::ManifestDisagrees { .. } => {
                "one of the bundle's files was changed by hand: make the bundle anew from its checkpoint or import".into()
            }
            Problem::ProbeSize { .. } | Problem::ProbeFile { .. } => {
                "make the bundle anew from its checkpoint or import: its probe is of another draft".into()
            }
            Problem::EmbeddingDiffers { .. } => "use the target named in `bundle.json`".into(),
            Problem::Engine { fatal: false, .. } => return None,
        })
    }
}

/// A small number as a word.
fn in_words(n: usize) -> String {
    const WORDS: [&str; 9] = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"];
    WORDS.get(n).map_or_else(|| n.to_string(), |word| (*word).to_owned())
}

/// What is wrong with the captured layers of a draft for a target with so many layers. The default layers of a target
/// too shallow for different ones are fine.
pub fn layer_problem(draft: &DraftConfig, num_layers: u32) -> Option<Problem> {
    let layers = draft.layers(num_layers);
    if let Some(layer) = layers.iter().copied().find(|layer| *layer >= num_layers) {
        return Some(Problem::LayerOutside { layer, num_layers });
    }
    let ascending = layers.windows(2).all(|pair| pair[0] < pair[1]);
    (!ascending && layers != draft.default_layers(num_layers)).then_some(Problem::LayerOrder { layers })
}

impl Serialize for Problem {
    /// `{"kind", "message", "hint"}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut problem = serializer.serialize_struct("Problem", 3)?;
        problem.serialize_field("kind", self.kind())?;
        problem.serialize_field("message", &self.to_string())?;
        problem.serialize_field("hint", &self.hint())?;
        problem.end()
    }
}
