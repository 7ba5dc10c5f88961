//! Arguments of the stages of a run.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use draftsmith_run::among::LINK_GBIT;

/// A run file and changes to it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The run file.
    #[arg(value_name = "RUN.toml")]
    pub run_file: PathBuf,
    /// Keys that differ from the file, for example `train.lr=5e-5`.
    #[arg(value_name = "table.key=value")]
    pub overrides: Vec<String>,
    /// Print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
}

/// Conversations to token ids and loss mask.
#[derive(Debug, Args)]
pub struct Data {
    /// What to do.
    #[command(subcommand)]
    pub verb: DataVerb,
}

/// Verbs of `data`.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "each verb is documented at its arguments")]
pub enum DataVerb {
    Prepare(DataPrepare),
    Preview(DataPreview),
    Render(DataRender),
}

/// Reads, checks, mixes and tokenises the conversations of a run file, and reports what was dropped and why.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith data prepare recipes/smoke.toml\n  \
                        draftsmith data prepare recipes/smoke.toml data.max_length=128 --json")]
pub struct DataPrepare {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
}

/// Shows conversations as the model sees them, with the trained part marked.
///
/// In colour on a terminal; elsewhere the trained part stands between `⟦` and `⟧`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith data preview fixtures/tiny-target/prompts-train.jsonl --target fixtures/tiny-target\n  \
    draftsmith data preview rows.jsonl.zst --target hf:ORG/NAME --row 12 --rows 3")]
pub struct DataPreview {
    /// JSONL (plain, .gz, .zst) or Parquet file of conversations, here or in a store.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Model whose tokenizer and template are used.
    #[arg(long, value_name = "REF")]
    pub target: String,
    /// First row shown, from 1.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub row: u64,
    /// Rows shown.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub rows: u64,
    /// Jinja file that replaces the model's own chat template.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Print one JSON object per row: ids, loss_mask, text.
    #[arg(long)]
    pub json: bool,
}

/// Renders conversations with a model's chat template, nothing added and nothing left out.
///
/// A row is a JSON object with `messages` and, where wanted, `tools`, `chat_template_kwargs`, `add_generation_prompt`,
/// `now` (seconds since 1970 for `strftime_now`) and `template` (a template's text, for this row alone). What a
/// template refuses is printed as `error`, and the next row follows.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith data render rows.jsonl --target fixtures/tiny-target\n  \
    draftsmith data render rows.jsonl --target hf:ORG/NAME --template other.jinja --json")]
pub struct DataRender {
    /// JSONL file of conversations.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Model whose tokenizer and template are used.
    #[arg(long, value_name = "REF")]
    pub target: String,
    /// Jinja file that replaces the model's own chat template.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Print one JSON object per row: text and ids, or error.
    #[arg(long)]
    pub json: bool,
}

/// Lets the target answer the conversations of a run file itself, so that the draft learns what the target says.
///
/// The hidden states that this process computes on the way are kept for `capture`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith regenerate recipes/smoke.toml\n  \
                        draftsmith regenerate recipes/smoke.toml regenerate.temperature=0")]
pub struct Regenerate {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
}

/// Stores the hidden states of the target that training reads.
///
/// The target computes them in this process, or behind a server of vLLM or SGLang that `[capture.server]` names
/// (docs/SERVERS.md says how to start one). Those that `regenerate` kept are copied.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith capture recipes/smoke.toml --plan\n  \
                        draftsmith capture recipes/smoke.toml capture.dtype=bf16\n  \
                        draftsmith capture RUN.toml 'capture.server={ kind = \"vllm\", url = \
                        \"http://127.0.0.1:8000/v1\", shared_dir = \"/dev/shm/states\" }'")]
pub struct Capture {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
    /// Only print the bill: rows, tokens, bytes, minutes. No stage is begun; what is not there yet is estimated.
    #[arg(long)]
    pub plan: bool,
}

/// Trains a draft.
///
/// Earlier stages that are not done yet are done first. Interrupted training goes on from its last checkpoint and ends
/// with the same weights.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith train recipes/smoke.toml\n  \
                        draftsmith train recipes/smollm2-135m-eagle3.toml train.lr=5e-5 run.name=lower-lr")]
pub struct Train {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
}

/// Makes and checks the folder that is handed over.
#[derive(Debug, Args)]
pub struct Bundle {
    /// What to do.
    #[command(subcommand)]
    pub verb: BundleVerb,
}

/// Verbs of `bundle`.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "each verb is documented at its arguments")]
pub enum BundleVerb {
    Make(BundleMake),
    Check(BundleCheck),
    Export(BundleExport),
    VerifyExport(BundleVerifyExport),
    Import(BundleImport),
    Card(BundleCard),
}

/// Puts the best checkpoint of a run into one folder: weights, vocabulary map, provenance, model card.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith bundle make recipes/smoke.toml")]
pub struct BundleMake {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
}

/// Verifies a bundle: every file, tensor and hash, and a numeric probe. Ends with 1 if something does not hold.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith bundle check runs/smoke/bundle\n  \
                        draftsmith bundle check runs/smoke/bundle --target fixtures/tiny-target --json")]
pub struct BundleCheck {
    /// The bundle: its folder or that of the run that made it, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(value_name = "BUNDLE")]
    pub dir: PathBuf,
    /// The target it was made for: its hash, template and embedding are checked too.
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Layouts that a draft is written in.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum ExportFormat {
    /// SGLang's folder, which TensorRT-LLM reads, too.
    Sglang,
    /// SpecForge's own folder, to go on training there.
    Specforge,
    /// vLLM's folder.
    Vllm,
    /// The `speculators` library's folder, which vLLM starts from alone.
    Speculators,
    /// One llama.cpp file with the target's tokenizer.
    Gguf,
}

/// Writes a bundle's draft in the layout of another engine, and prints how that engine is started.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bundle export runs/smoke/bundle --format vllm --out draft-vllm\n  \
    draftsmith bundle export DIR --format gguf --target model.gguf --out draft-gguf\n\n\
    What the engine cannot serve is refused before anything is written. `bundle verify-export` compares the result.")]
pub struct BundleExport {
    /// The bundle: its folder or that of the run that made it, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(value_name = "BUNDLE")]
    pub dir: PathBuf,
    /// The layout.
    #[arg(long, value_name = "LAYOUT")]
    pub format: ExportFormat,
    /// Folder to be made.
    #[arg(long, value_name = "DIR2")]
    pub out: PathBuf,
    /// The target (default for `gguf`, whose draft carries the target's tokenizer: the sources that the bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Replace the folder if it is there.
    #[arg(long)]
    pub replace: bool,
    /// Print one JSON object: path, files, warnings, launch.
    #[arg(long)]
    pub json: bool,
}

/// Compares an export with its bundle: every number, and a probe answered by a reader and a network of its own. Ends
/// with 1 if something differs.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  draftsmith bundle verify-export draft-vllm --bundle runs/smoke/bundle\n  \
                        draftsmith bundle verify-export draft-gguf --bundle DIR --json"
)]
pub struct BundleVerifyExport {
    /// The exported folder.
    #[arg(value_name = "DIR2")]
    pub dir: PathBuf,
    /// The bundle that it was made from: folder, name or `hf:ORG/NAME`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Writes a bundle's model card, results and recommended setting anew from records of `bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bundle card bundles/draft --base-model ORG/MODEL\n  \
    draftsmith bench --bundle bundles/draft --workload w.jsonl --report measured\n  \
    draftsmith bundle card bundles/draft --record measured/w.json")]
pub struct BundleCard {
    /// The bundle: its folder or that of the run that made it, or a name of `draftsmith list`.
    #[arg(value_name = "BUNDLE")]
    pub dir: PathBuf,
    /// Records that become its results; may be given several times (default: those it has).
    #[arg(long, value_name = "FILE")]
    pub record: Vec<PathBuf>,
    /// Repository of the target on the Hugging Face hub, for model card and engines.
    #[arg(long, value_name = "ORG/NAME")]
    pub base_model: Option<String>,
    /// Print one JSON object: path, recommended.
    #[arg(long)]
    pub json: bool,
}

/// Makes a bundle of a draft that somebody else trained, so that it can be measured and used here.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith bundle import hf:ORG/DRAFT --target hf:ORG/MODEL --out bundles/draft\n  \
    draftsmith bundle import draft.gguf --target model.gguf --out bundles/draft --license Apache-2.0\n\n\
    Reads the EAGLE-3 layouts of SpecForge and SGLang, vLLM, speculators, and llama.cpp's GGUF. Every tensor is\n\
    accounted for; what is missing or left over is an error.")]
pub struct BundleImport {
    /// The draft: a folder, a `.gguf` file, or `hf:ORG/NAME`.
    #[arg(value_name = "REF")]
    pub draft: String,
    /// The target it was trained for.
    #[arg(long, value_name = "REF")]
    pub target: String,
    /// Folder of the bundle.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Name on the model card (default: the last part of the reference).
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Licence of the draft's weights, as an SPDX expression.
    #[arg(long, value_name = "SPDX", default_value = "LicenseRef-unknown")]
    pub license: String,
    /// Repository of the target on the Hugging Face hub, for model card and engines.
    #[arg(long, value_name = "ORG/NAME")]
    pub base_model: Option<String>,
    /// Captured layers, 0-based output of layer, where the draft's configuration leaves them open or is wrong.
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', allow_hyphen_values = true)]
    pub layers: Option<Vec<String>>,
    /// Replace the bundle if it is there.
    #[arg(long)]
    pub replace: bool,
    /// Print one JSON object: path, layout, bytes, warnings.
    #[arg(long)]
    pub json: bool,
}

/// Does all stages of a run file, from conversations to a measured bundle.
///
/// Finished stages are not done again unless what they were made from changed; then the old result is kept as
/// `STAGE.old-KEY` and found again when the run file is edited back. Killed at any moment, the same command goes on.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  draftsmith run recipes/smoke.toml\n  draftsmith run recipes/smoke.toml --plan\n  \
                        draftsmith run recipes/smoke.toml --plan --ranks 4 --link-gbit 100\n  \
                        draftsmith run recipes/smollm2-135m-eagle3.toml run.threads=2"
)]
pub struct Run {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub run: RunArgs,
    /// Only print the bill of all stages: rows, tokens, steps, time, disk, memory. No stage is begun; what this machine
    /// takes is measured in about half a minute, or known from the last time.
    #[arg(long)]
    pub plan: bool,
    /// With `--plan`: the bill for so many processes, each on a machine like this one (docs/RANKS.md): what is shared, what is
    /// not, what goes between them.
    #[arg(long, value_name = "N", requires = "plan", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub ranks: Option<u32>,
    /// With `--ranks`: what each can send to the others, in Gbit/s.
    #[arg(long, value_name = "G", requires = "ranks", default_value_t = LINK_GBIT, value_parser = gbit)]
    pub link_gbit: f64,
}

/// What a run file is made of.
#[derive(Debug, Args)]
pub struct Making {
    /// The target: `hf:…`, `pip:…` or a path.
    #[arg(value_name = "TARGET")]
    pub target: String,
    /// Conversations of the kind that the draft is for: JSONL (plain, .gz, .zst) or Parquet; may be given several times
    /// (default: the prompts that ship with draftsmith).
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Begin with the weights of this draft: a name of `draftsmith list`, `hf:ORG/NAME`, or the folder of a bundle or of a run
    /// (`./NAME` for one that lies here).
    #[arg(long, value_name = "BUNDLE")]
    pub from: Option<String>,
    /// Hours for the whole run.
    #[arg(long, value_name = "H", default_value_t = 1.0, value_parser = hours)]
    pub hours: f64,
    /// The run file (default: `NAME.toml`).
    #[arg(long, value_name = "RUN.toml")]
    pub out: Option<PathBuf>,
    /// Name of the run (default: the target's).
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Write the run file anew if it is there.
    #[arg(long)]
    pub replace: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Hours from a few seconds to a year.
fn gbit(text: &str) -> Result<f64, String> {
    let gbit = text.parse::<f64>().ok().filter(|gbit| (0.001..=1e6).contains(gbit));
    gbit.ok_or_else(|| "expected Gbit/s, at least 0.001 and at most 1000000".to_string())
}

fn hours(text: &str) -> Result<f64, String> {
    let hours = text.parse::<f64>().ok().filter(|hours| (0.001..=8760.0).contains(hours));
    hours.ok_or_else(|| "expected hours, at least 0.001 and at most 8760".to_string())
}

/// Writes a run file for a target by rules: looks at target, data and machine, and spends the hours that it is given.
///
/// Kind and size of the draft, answers, steps and learning rate follow from what was measured (docs/LOG.md); the file
/// says why, and every key can be changed. Some conversations are held out beside it, to choose drafts by and to measure
/// the result on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith init hf:ORG/NAME --data chats.jsonl --hours 2\n  \
                        draftsmith init fixtures/tiny-target --data fixtures/tiny-target/prompts-train.jsonl --hours 0.02 --out tiny.toml\n\n\
                        Then `draftsmith run RUN.toml --plan` shows the bill, and `draftsmith run RUN.toml` does it.")]
pub struct Init {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub making: Making,
}

/// Makes a draft for a target, from nothing to a measured bundle and a verdict: `init`, the bill, and `run`.
///
/// It begins at once. Stopped at any moment, the same command goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith make hf:ORG/NAME --data chats.jsonl --hours 2\n  \
                        draftsmith make fixtures/tiny-target --data fixtures/tiny-target/prompts-train.jsonl --hours 0.02\n  \
                        draftsmith make hf:ORG/NAME --plan")]
pub struct Make {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub making: Making,
    /// Write the run file and print the bill, no more.
    #[arg(long)]
    pub plan: bool,
}

/// Shows where a run is: stages, rows or steps done, time left, best accept length.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith status\n  draftsmith status runs/smoke\n  \
                        draftsmith status recipes/smoke.toml --json")]
pub struct Status {
    /// Folder of a run or its run file; none: every run in `runs`.
    #[arg(value_name = "RUN")]
    pub run: Option<PathBuf>,
    /// Print one JSON object per run.
    #[arg(long)]
    pub json: bool,
}
