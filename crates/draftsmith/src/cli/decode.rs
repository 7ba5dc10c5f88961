//! Arguments of the verbs that decode.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use draftsmith_core::VerifyRule;
use draftsmith_formats::run::Device;

/// Where target and draft are computed.
#[derive(Debug, Args)]
pub struct Computing {
    /// Compute on the CPU (`cpu`) or on an NVIDIA GPU: `cuda`, or `cuda:N` for card N. A text is the same with and without a draft
    /// on each; the texts of two devices may part where their rounding does.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    pub device: Device,
}

/// A device as it is written.
pub(super) fn device(word: &str) -> Result<Device, String> {
    let unknown = |why: String| match word.starts_with("cuda:") {
        true => format!("{why}: expected `cuda` or `cuda:N`, with the number that `draftsmith doctor` shows"),
        false => "expected `cpu`, `cuda` or `cuda:N`".to_owned(),
    };
    Device::try_from(word.to_owned()).map_err(unknown)
}

/// How proposals look.
#[derive(Debug, Args)]
pub struct Drafting {
    /// Draft as much as pays by the costs measured on this machine, and repetitions of the text (default of `generate`
    /// and `serve` with a bundle that `bench tune --write` has not tuned; works without one).
    #[arg(long, conflicts_with_all = ["depth", "tree_top_k", "tree_nodes"])]
    pub auto: bool,
    /// Draft tokens per proposal (a chain), or levels of the tree (default of `bench`: 5).
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: Option<u32>,
    /// Draft a tree: candidates per node.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tree_top_k: Option<u32>,
    /// Draft a tree: draft tokens kept in all (default: 4 per level).
    #[arg(long, value_name = "N", requires = "tree_top_k", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub tree_nodes: Option<u32>,
}

/// Which draft tokens of a sampled answer are kept.
#[derive(Debug, Args)]
pub struct Verifying {
    /// Rule at a temperature above 0. `seeded`: the same text with and without a draft. `rejection`, and `block`, which
    /// keeps at least as much: the draft draws a chain, and the text is a draw from the same distribution.
    #[arg(long, value_name = "RULE", default_value_t = VerifyRule::Seeded)]
    pub verify: VerifyRule,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct Choosing {
    /// Sample at this temperature; 0 is greedy.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample from the smallest set of tokens with this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Sample from this many best tokens; 0: from all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u32,
    /// The same seed gives the same text, with and without a draft.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

/// Decodes one answer, with a draft if a bundle or a smaller model is given.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith generate --target fixtures/tiny-target --prompt \"Calculate 22 + 20.\"\n  \
    draftsmith generate --target REF --bundle runs/smoke/bundle --prompt \"Why?\" --temperature 0.8 --seed 7 --json\n  \
    draftsmith generate --bundle runs/smoke --messages chat.json --prove\n  \
    draftsmith generate --bundle smollm2-135m-instruct-eagle3 --prompt \"Why?\"\n  \
    draftsmith generate --target REF --draft-model SMALLER --prompt \"Why?\"\n  \
    draftsmith generate --target REF --auto --prompt \"Repeat this list: …\"\n  \
    draftsmith generate --bundle DIR --prompt \"Why?\" --device cuda --prove\n\n\
    With --prove the answer is decoded both ways and compared token by token; ends with 1 if they differ.\n\
    JSON: prompt_ids, token_ids, text, finish_reason, accept_len.")]
#[command(group = clap::ArgGroup::new("input").required(true).args(["prompt", "prompt_ids", "messages"]))]
pub struct Generate {
    /// The target: `hf:…`, `pip:…` or a path (default: the sources that the bundle names).
    #[arg(long, value_name = "REF", required_unless_present = "bundle")]
    pub target: Option<String>,
    /// The draft: the folder of a bundle or of a run that made one, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle")]
    pub draft_model: Option<String>,
    /// A user message, put into the model's chat template.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Token ids, used as they are.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub prompt_ids: Option<Vec<u32>>,
    /// JSON file: a list of messages, or an object with `messages`.
    #[arg(long, value_name = "FILE")]
    pub messages: Option<PathBuf>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// End the answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub choosing: Choosing,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub drafting: Drafting,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub verifying: Verifying,
    /// Decode both ways and compare token by token.
    #[arg(long)]
    pub prove: bool,
    /// Compute on the weights expanded to 32-bit floats: slow, the specification.
    #[arg(long)]
    pub f32: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all; results do not depend on it).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Measures accept length and speedup against target-only decoding, interleaved.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    group = clap::ArgGroup::new("draft").required(true).args(["bundle", "draft_model"]),
    after_help = "Examples:\n  \
    draftsmith bench --bundle runs/smoke/bundle --workload fixtures/tiny-target/eval.jsonl\n  \
    draftsmith bench --bundle DIR --workload recipes/data/eval/gsm8k.jsonl --limit 20 --json out.json\n  \
    draftsmith bench --target REF --draft-model SMALLER --workload FILE --auto\n  \
    draftsmith bench --bundle DIR --workload FILE --device cuda --json out.json\n  \
    draftsmith bench kernels --target fixtures/tiny-target\n\n\
    Rows: {\"id\", \"turns\": [user turn, …]}, plain, .gz or .zst. Ends with 1 if an answer differs from\n\
    target-only decoding."
)]
pub struct Bench {
    /// Verbs besides the measurement of a bundle.
    #[command(subcommand)]
    pub verb: Option<BenchVerb>,
    /// The bundle: its folder or that of the run that made it, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle", requires = "target")]
    pub draft_model: Option<String>,
    /// Prompts; several files are several workloads.
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    pub workload: Vec<PathBuf>,
    /// The target (default: the sources that the bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Rows per workload (default: all).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Runs of each prompt and side.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub choosing: Choosing,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub drafting: Drafting,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub verifying: Verifying,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Write the raw records (one file per workload) and `report.html` into this folder.
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Verbs of `bench`.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "each verb is documented at its arguments")]
pub enum BenchVerb {
    Kernels(BenchKernels),
    Decode(BenchDecode),
    Identity(BenchIdentity),
    Tune(BenchTune),
    Compare(BenchCompare),
    Train(BenchTrain),
}

/// Finds the fastest way to draft on this machine: chains, trees and the automatic plan in turn with plain decoding,
/// for one sequence and for several at once.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("draft").required(true).args(["bundle", "draft_model"]))]
#[command(after_help = "Examples:\n  \
    draftsmith bench tune --bundle bundles/smollm2-135m-instruct-eagle3 --workload recipes/data/eval/gsm8k.jsonl\n  \
    draftsmith bench tune --bundle DIR --workload A.jsonl --workload B.jsonl --sequences 1,4,16 --json out.json\n\n\
    Ends with 1 if a setting changes a text. The draft's vocabulary is fixed when it is trained (`draft.vocab_size`).")]
pub struct BenchTune {
    /// The bundle: its folder or that of the run that made it, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle", requires = "target")]
    pub draft_model: Option<String>,
    /// Prompts, the first turn of each row; may be given several times.
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    pub workload: Vec<PathBuf>,
    /// The target (default: the sources that the bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Rows per file.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 96, value_parser = clap::value_parser!(u32).range(2..))]
    pub max_new_tokens: u32,
    /// Loads: how many sequences are decoded at once.
    #[arg(long, value_name = "1,8", value_delimiter = ',', default_values_t = [1, 8], value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sequences: Vec<u32>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Write the fastest setting for one sequence into the bundle: `generate` and `serve` use it unless they are told
    /// otherwise.
    #[arg(long, conflicts_with = "draft_model")]
    pub write: bool,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Measures drafts beside each other: every draft alone and with the automatic plan, repetitions of the text alone, and
/// plain decoding, on the same prompts in turn.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("draft").required(true).multiple(true).args(["bundle", "draft_model"]))]
#[command(after_help = "Examples:\n  \
    draftsmith bench compare --bundle runs/a/bundle --bundle runs/b/bundle --workload recipes/data/eval/gsm8k.jsonl\n  \
    draftsmith bench compare --target REF --bundle DIR --draft-model SMALLER --workload A.jsonl --workload B.jsonl --markdown table.md\n\n\
    Ends with 1 if a draft changes a text. JSON holds every sample, so that all numbers can be made again from it.")]
pub struct BenchCompare {
    /// A bundle: folder, name or `hf:ORG/NAME`; may be given several times.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Vec<PathBuf>,
    /// An ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path; may be given several times.
    #[arg(long, value_name = "REF", requires = "target")]
    pub draft_model: Vec<String>,
    /// Prompts, the first turn of each row; may be given several times.
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    pub workload: Vec<PathBuf>,
    /// The target (default: the sources that the first bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Rows per file.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub max_new_tokens: u32,
    /// Tokens of a proposal where a draft stands alone.
    #[arg(long, value_name = "D", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: u32,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Write the tables as Markdown.
    #[arg(long, value_name = "OUT.md")]
    pub markdown: Option<PathBuf>,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Proves that the text does not depend on how it is decoded: plain, from repetitions, with chains and a tree of the
/// draft; alone and in a batch; with every thread count.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bench identity --bundle DIR --workload recipes/data/eval/mtbench.jsonl --limit 10\n  \
    draftsmith bench identity --target REF --bundle DIR --workload FILE --temperature 0.8 --top-p 0.95 --json out.json\n  \
    draftsmith bench identity --bundle DIR --workload FILE --device cuda:1\n\n\
    Ends with 1 if any text differs. JSON: identical, ways, prompts (id, sha256 of the token ids), differences.")]
pub struct BenchIdentity {
    /// The target: `hf:…`, `pip:…` or a path (default: the sources that the bundle names).
    #[arg(long, value_name = "REF", required_unless_present = "bundle")]
    pub target: Option<String>,
    /// The draft: folder, name or `hf:ORG/NAME` of a bundle; without one only plain decoding and repetitions are compared.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle")]
    pub draft_model: Option<String>,
    /// Prompts, the first turn of each row; may be given several times.
    #[arg(long, value_name = "FILE.jsonl", required = true)]
    pub workload: Vec<PathBuf>,
    /// Rows per file (default: all).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: u32,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Thread counts of the CPU (default: 1,2).
    #[arg(long, value_name = "1,2", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Vec<u32>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub choosing: Choosing,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Frameworks to compare training with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TrainPeerKind {
    /// PyTorch, operation by operation.
    Torch,
    /// PyTorch through `torch.compile`; the first step compiles, which takes minutes.
    TorchCompiled,
}

/// Measures one training step at the shapes of a SmolLM2-135M draft against other frameworks, sides in turn.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bench train\n  \
    draftsmith bench train --peer torch --peer torch-compiled --peer-python runs/peers/torch/bin/python --json out.json\n\n\
    `bench/peers/install-torch.sh` installs the peer. A step is forward, backward, clipping and AdamW over one row of\n\
    made-up features with every slot trained, in 32-bit floats. Every side computes the teacher's probabilities over\n\
    the draft vocabulary in each step; the rest of the target's head is in no side's time.")]
pub struct BenchTrain {
    /// Slots of the row.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..=65536))]
    pub slots: u32,
    /// Ids of the draft's head.
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(16..=262144))]
    pub draft_vocab: u32,
    /// Steps of the unroll.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=15))]
    pub ttt_length: u32,
    /// Our large products: in f32, or as three products of bf16 numbers on tile registers (`train.products`).
    #[arg(long, value_enum, default_value_t = ProductsKind::F32)]
    pub products: ProductsKind,
    /// Measured steps of each side, after one that is not.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Compare with this framework; may be given several times.
    #[arg(long, value_enum)]
    pub peer: Vec<TrainPeerKind>,
    /// The peers' Python interpreter (default: `python3`).
    #[arg(long, value_name = "PATH", requires = "peer")]
    pub peer_python: Option<PathBuf>,
    /// Threads of every side (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// How large products of training are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProductsKind {
    /// In f32.
    F32,
    /// Of numbers rounded to bf16, with f32 sums.
    Bf16,
    /// Three products of bf16 numbers.
    Bf16x3,
}

/// Engines to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PeerKind {
    /// llama.cpp through its Python package.
    LlamaCppPython,
}

/// Measures decode and prefill rates against another engine: same weights, prompts and threads, sides in turn.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bench decode --target REF --workload recipes/data/eval/gsm8k.jsonl --limit 10\n  \
    draftsmith bench decode --target REF --bundle DIR --workload FILE --peer llama-cpp-python \\\n      \
    --peer-python runs/peers/llama-cpp-python/bin/python --batch 32 --json out.json\n  \
    draftsmith bench decode --bundle DIR --workload FILE --device cuda --batch 8 --json out.json\n\n\
    `bench/peers/install-llama-cpp-python.sh` installs the peer. Every side decodes the same number of tokens greedily,\n\
    past any end of text.")]
pub struct BenchDecode {
    /// The target: `hf:…`, `pip:…` or a path (default: the sources that the bundle names).
    #[arg(long, value_name = "REF", required_unless_present = "bundle")]
    pub target: Option<String>,
    /// Measure our decoding with this draft as well: folder, name or `hf:ORG/NAME` of a bundle.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle")]
    pub draft_model: Option<String>,
    /// Prompts; the first turn of each row.
    #[arg(long, value_name = "FILE.jsonl")]
    pub workload: PathBuf,
    /// Rows (default: all).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Tokens per prompt and side.
    #[arg(long, value_name = "M", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub new_tokens: u32,
    /// Length of the measured prefill.
    #[arg(long, value_name = "M", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    pub prefill_tokens: u32,
    /// Also decode this many sequences at once.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub batch: Option<u32>,
    /// Compare with this engine.
    #[arg(long, value_name = "ENGINE")]
    pub peer: Option<PeerKind>,
    /// Interpreter that has the peer (default: `python3`).
    #[arg(long, value_name = "PATH", requires = "peer")]
    pub peer_python: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads of every side (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Measures what one target pass of m tokens costs, and prefill and decode rates.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith bench kernels --target fixtures/tiny-target\n  \
                        draftsmith bench kernels --target REF --threads 1 --json out.json")]
pub struct BenchKernels {
    /// The target: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF")]
    pub target: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Compute on the weights expanded to 32-bit floats.
    #[arg(long)]
    pub f32: bool,
    /// Context behind every pass, in tokens (default: 256, or half of what the model can).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,
    /// Write one JSON object to a file, or print it if none is named.
    #[arg(long, value_name = "OUT.json", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Shows what a draft gains, from nothing: pulls SmolLM2-135M-Instruct, decodes the same prompts with and without the
/// draft that ships here, and proves that the texts are equal.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  draftsmith quickstart\n  draftsmith quickstart --device cuda\n  draftsmith quickstart --json"
)]
pub struct Quickstart {
    /// The target, if it is here already (default: the sources that the bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// The draft: folder, name or `hf:ORG/NAME` (default: the bundle that ships with draftsmith).
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "M", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
}
