//! The command line as data: what `--help` and `docs/CLI.md` say.
//!
//! A verb stands here only once it works. Progress and messages go to stderr, results to stdout; `--json` makes the
//! result one JSON value.

mod decode;
mod names;
mod serve;
mod shell;
mod stages;
mod written;

use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, Parser, Subcommand};
use draftsmith_formats::run::Device;

pub use decode::{
    Bench, BenchCompare, BenchDecode, BenchIdentity, BenchKernels, BenchTrain, BenchTune, BenchVerb,
    Choosing, Computing, Drafting, Generate, PeerKind, ProductsKind, Quickstart, TrainPeerKind, Verifying,
};
pub use names::{List, Pull, Push};
pub use serve::{KvBudget, Memory, NamedModel, Serve};
pub use shell::{Completions, Man};
pub use stages::{
    Bundle, BundleCard, BundleCheck, BundleExport, BundleImport, BundleMake, BundleVerb, BundleVerifyExport,
    Capture, Data, DataPrepare, DataPreview, DataRender, DataVerb, ExportFormat, Init, Make, Making,
    Regenerate, Run, RunArgs, Status, Train,
};
pub use written::{completion_script, man_pages};

/// Trains, packages and measures draft models for speculative decoding.
#[derive(Debug, Parser)]
#[command(
    name = "draftsmith",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done; 1 done, but what was to be checked does not hold; 2 the input was wrong; \
                  101 a bug; 130 interrupted.\nStart with `draftsmith doctor`."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// No progress on stderr.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Never touch the network; use what is in the caches.
    #[arg(long, global = true)]
    pub offline: bool,
    /// Neither use nor keep packed weights and hashes of models in the cache folder: read the model itself.
    #[arg(long, global = true)]
    pub no_pack_cache: bool,
}

/// The verbs, in the order in which a newcomer meets them.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "each verb is documented at its arguments")]
pub enum Verb {
    Quickstart(Quickstart),
    Doctor(Doctor),
    List(List),
    Pull(Pull),
    Push(Push),
    Make(Make),
    Init(Init),
    Run(Run),
    Status(Status),
    Data(Data),
    Regenerate(Regenerate),
    Capture(Capture),
    Train(Train),
    Bundle(Bundle),
    Inspect(Inspect),
    Generate(Generate),
    Bench(Bench),
    Serve(Serve),
    Completions(Completions),
    Man(Man),
}

/// Says what works on this machine, what is missing and how to get it; or what is wrong with a draft.
///
/// With `--draft`, the draft (in any layout that `bundle import` reads, or a bundle) is asked at the positions of a few texts
/// that the target wrote, as its folder says and under settings that are known to be got wrong. A setting that does far
/// better is named, with the key that it is about and what to write there (docs/DOCTOR.md).
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  draftsmith doctor\n  draftsmith doctor --json\n  \
                        draftsmith doctor --draft hf:ORG/DRAFT --target hf:ORG/MODEL\n  \
                        draftsmith doctor --draft draft.gguf --target model.gguf --workload recipes/data/eval/gsm8k.jsonl\n  \
                        draftsmith doctor --draft DIR --device cuda\n\n\
                        Ends with 1 if the main job does not work here, or if something about the draft is suspected."
)]
pub struct Doctor {
    /// Other patients.
    #[command(subcommand)]
    pub verb: Option<DoctorVerb>,
    /// Look into this draft: a folder, a `.gguf` file, a bundle or its name in `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(long, value_name = "REF")]
    pub draft: Option<String>,
    /// The target that it drafts for (default: the sources that a bundle names).
    #[arg(long, value_name = "REF", requires = "draft")]
    pub target: Option<String>,
    /// Prompts: the first turn of each of the first rows (default: built-in ones).
    #[arg(long, value_name = "FILE", requires = "draft")]
    pub workload: Option<PathBuf>,
    /// Rows of the workload.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "workload", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
    /// Tokens per answer.
    #[arg(long, value_name = "M", default_value_t = 64, requires = "draft", value_parser = clap::value_parser!(u32).range(8..))]
    pub max_new_tokens: u32,
    /// Ask it on the CPU (`cpu`) or on an NVIDIA GPU: `cuda`, or `cuda:N` for card N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", requires = "draft", value_parser = decode::device)]
    pub device: Device,
    /// Threads (default: as many as this process may use).
    #[arg(long, value_name = "N", requires = "draft", value_parser = clap::value_parser!(u32).range(1..))]
    pub threads: Option<u32>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Verbs of `doctor`.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "each verb is documented at its arguments")]
pub enum DoctorVerb {
    ServeGap(ServeGap),
}

/// Replays prompts against a live OpenAI-compatible engine and against ours, and names where they part.
///
/// Greedy, one request at a time. Compared are the prompts (as far as the engine counts their tokens), the texts, and how
/// many drafts were accepted at each position, as far as the engine's metrics tell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith doctor serve-gap http://127.0.0.1:8000/v1 --bundle runs/smoke/bundle --workload fixtures/tiny-target/eval.jsonl\n  \
    draftsmith doctor serve-gap http://127.0.0.1:8000/v1 --target REF --workload FILE --extra '{\"repeat_penalty\": 1.0}'\n\n\
    Counters are those of the whole engine: nobody else should use it meanwhile. Ends with 1 if there is a gap.")]
#[command(group = clap::ArgGroup::new("ours").required(true).multiple(true).args(["bundle", "target"]))]
pub struct ServeGap {
    /// Address of the engine up to and including the version.
    #[arg(value_name = "URL")]
    pub url: String,
    /// The draft that the engine serves: folder, name or `hf:ORG/NAME` of a bundle. Without it only texts are compared.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// The target (default: what the bundle was made for).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// Prompts: the first turn of each row.
    #[arg(long, value_name = "FILE")]
    pub workload: PathBuf,
    /// Rows.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: u32,
    /// Tokens per answer.
    #[arg(long, value_name = "M", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Draft tokens per proposal, as in the engine.
    #[arg(long, value_name = "D", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: u32,
    /// How prompts are sent: `text`, `ids` or `chat` (docs/SERVERS.md).
    #[arg(long, value_name = "API", default_value = "text", value_parser = ["text", "ids", "chat"])]
    pub api: String,
    /// Name of the model in requests (default: the only one that the engine lists).
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Environment variable that holds the API key.
    #[arg(long, value_name = "NAME")]
    pub key_env: Option<String>,
    /// More fields of every request, as a JSON object.
    #[arg(long, value_name = "JSON")]
    pub extra: Option<String>,
    /// Threads to compute with (default: all; results do not depend on it).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Shows what lies at a path as a tree: any model, draft, bundle, cache, checkpoint, token file or run.
///
/// Tensors with type, shape, size and hash; files with size and hash; what they say about themselves.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  draftsmith inspect model.gguf\n  draftsmith inspect runs/smoke/bundle --json\n  \
                        draftsmith inspect runs/smoke --no-hashes"
)]
pub struct Inspect {
    /// File or folder, or a bundle's name in `draftsmith list`.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Do not read every byte for its hash.
    #[arg(long)]
    pub no_hashes: bool,
    /// Print one JSON object: name, kind, bytes, dtype, shape, sha256, facts, children.
    #[arg(long)]
    pub json: bool,
}

/// A path that means stdout when it is `-`.
pub fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

/// `docs/CLI.md`: every verb's help, as `--help` prints it.
pub fn reference_page() -> String {
    let mut page = String::from(
        "# Command line\n\nGenerated from the program by `cargo xtask tidy --write`; do not edit. Progress and \
         messages go to stderr, results to stdout.\n",
    );
    let mut command = Cli::command().term_width(100).color(clap::ColorChoice::Never);
    command.build();
    page_of(&mut command, 2, &mut page);
    page
}

fn page_of(command: &mut clap::Command, level: usize, page: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_string();
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    page.push_str(&format!("\n{} {name}\n\n```text\n{}\n```\n", "#".repeat(level), help.join("\n").trim()));
    for sub in command.get_subcommands_mut() {
        if !sub.is_hide_set() && sub.get_name() != "help" {
            page_of(sub, (level + 1).min(4), page);
        }
    }
}

impl Verb {
    /// Every argument that names a bundle, of whatever verb was called.
    pub fn bundles_mut(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Verb::Doctor(args) => match &mut args.verb {
                Some(DoctorVerb::ServeGap(args)) => args.bundle.iter_mut().collect(),
                // Its draft may be of any layout.
                None => Vec::new(),
            },
            Verb::Bundle(args) => match &mut args.verb {
                BundleVerb::Check(args) => vec![&mut args.dir],
                BundleVerb::Export(args) => vec![&mut args.dir],
                BundleVerb::VerifyExport(args) => vec![&mut args.bundle],
                BundleVerb::Card(args) => vec![&mut args.dir],
                BundleVerb::Make(_) | BundleVerb::Import(_) => Vec::new(),
            },
            Verb::Bench(args) => match &mut args.verb {
                Some(BenchVerb::Decode(args)) => args.bundle.iter_mut().collect(),
                Some(BenchVerb::Identity(args)) => args.bundle.iter_mut().collect(),
                Some(BenchVerb::Tune(args)) => args.bundle.iter_mut().collect(),
                Some(BenchVerb::Compare(args)) => args.bundle.iter_mut().collect(),
                Some(BenchVerb::Kernels(_) | BenchVerb::Train(_)) => Vec::new(),
                None => args.bundle.iter_mut().collect(),
            },
            Verb::Generate(args) => args.bundle.iter_mut().collect(),
            Verb::Serve(args) => args.bundle.iter_mut().collect(),
            Verb::Quickstart(args) => args.bundle.iter_mut().collect(),
            Verb::Push(args) => vec![&mut args.bundle],
            Verb::List(_)
            | Verb::Pull(_)
            | Verb::Make(_)
            | Verb::Init(_)
            | Verb::Run(_)
            | Verb::Status(_)
            | Verb::Data(_)
            | Verb::Regenerate(_)
            | Verb::Capture(_)
            | Verb::Train(_)
            | Verb::Inspect(_)
            | Verb::Completions(_)
            | Verb::Man(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_examples_and_json() {
        fn check(command: &clap::Command) {
            let subs: Vec<_> = command.get_subcommands().collect();
            // What `completions` and `man` print has a form of its own.
            let own_form = matches!(command.get_name(), "completions" | "man");
            if subs.is_empty() {
                let help = command.get_after_help().map(|h| h.to_string()).unwrap_or_default();
                assert!(help.contains("Examples:"), "`{}` has no examples", command.get_name());
                assert!(
                    own_form || command.get_arguments().any(|a| a.get_long() == Some("json")),
                    "`{}` has no --json",
                    command.get_name()
                );
            }
            subs.into_iter().for_each(check);
        }
        check(&Cli::command());
    }
}
