//! Arguments of `serve`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::{Computing, Drafting, Verifying};

/// Answers OpenAI's HTTP API, with the draft of a bundle or a smaller model.
///
/// Neither the draft nor the load changes the text of an answer. Requests beyond the budget of the cache wait, in one
/// line per API key; SIGTERM ends the server after the answers under way, SIGHUP reads the draft anew.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    draftsmith serve --bundle runs/smoke/bundle\n  \
    draftsmith serve --bundle DIR --target REF --host 0.0.0.0 --port 8000 --api-keys-file keys.txt\n  \
    draftsmith serve --target REF --draft-model SMALLER\n  \
    draftsmith serve --target REF --kv-budget 4GiB --max-running 16 --queue 64\n  \
    draftsmith serve --bundle DIR --depth 3 --log-json\n  \
    draftsmith serve --bundle DIR --device cuda --kv-budget 16GiB\n  \
    draftsmith serve --model coder=runs/coder/bundle --model small=hf:ORG/NAME:FILE.gguf --memory 12\n\n\
    Routes: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health, /metrics, /version,\n\
    /openapi.json, /tokenize, /v1/chat/completions/render, /api/state, /api/bundle, /api/records,\n\
    /api/runs, /api/generations, /admin/draft (docs/SERVE.md).\n\
    Without --depth or a tree as much is drafted as pays at the load.\n\
    Keys may also stand in DRAFTSMITH_API_KEYS (with commas), that of /admin in DRAFTSMITH_ADMIN_KEY.")]
#[command(group = clap::ArgGroup::new("served").required(true).multiple(true).args(["bundle", "target", "models"]))]
pub struct Serve {
    /// The draft: the folder of a bundle or of a run that made one, a name of `draftsmith list`, or `hf:ORG/NAME`.
    #[arg(long, value_name = "BUNDLE")]
    pub bundle: Option<PathBuf>,
    /// In place of a bundle, an ordinary model of the same tokenizer that drafts: `hf:…`, `pip:…` or a path.
    #[arg(long, value_name = "REF", conflicts_with = "bundle", requires = "target")]
    pub draft_model: Option<String>,
    /// The target (default: the sources that the bundle names).
    #[arg(long, value_name = "REF")]
    pub target: Option<String>,
    /// One of several models: the name that requests give, and a bundle folder, a run folder or, without a draft, a model
    /// (`hf:…`, `pip:…` or a path). `,target=REF` behind a bundle names its target. May be given again. A model is loaded
    /// when a request names it.
    #[arg(long = "model", value_name = "NAME=BUNDLE", conflicts_with_all = ["bundle", "target", "draft_model", "model_name"])]
    pub models: Vec<NamedModel>,
    /// With `--model`, GiB that the loaded models may take together, by estimate (or `12GiB`, `900MiB`; default: four fifths
    /// of the machine's, or of the card's with `--device`). Where there is no room the model that was not used for longest is unloaded.
    #[arg(long, value_name = "GIB", requires = "models", conflicts_with_all = ["bundle", "target"])]
    pub memory: Option<Memory>,
    /// Address or name to listen at; the default is reached from this machine only.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,
    /// Port; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Name of the model in requests (default: the target's).
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// File with one API key per line, `KEY` or `NAME KEY`; `#` begins a comment.
    #[arg(long, value_name = "FILE")]
    pub api_keys_file: Option<PathBuf>,
    /// File with the key of /admin; without one only this machine may use it.
    #[arg(long, value_name = "FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// Origin whose pages may use the server from a browser, `http://HOST:PORT`, or `*` for all; may be given again.
    #[arg(long, value_name = "ORIGIN", aliases = ["cors", "cors-origin"])]
    pub allow_origin: Vec<String>,
    /// Room for keys and values over all sequences, in tokens or bytes (`65536`, `512MiB`, `4GiB`).
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub kv_budget: KvBudget,
    /// Sequences decoded side by side.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_running: u32,
    /// Sequences that wait; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue: u32,
    /// Open connections; more wait to be accepted.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_connections: u32,
    /// Bytes of a request's body.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_body: u32,
    /// Tokens of an answer when the request does not say.
    #[arg(long, value_name = "M", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Seconds from the arrival of a request to the end of its answer.
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub request_timeout: u32,
    /// Seconds that answers under way get after SIGTERM.
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub drain_timeout: u32,
    /// Verify steps over which a new draft is watched before it is kept or taken back.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub watch_steps: u32,
    /// Folder of bench records to show beside the bundle's.
    #[arg(long, value_name = "DIR")]
    pub records: Option<PathBuf>,
    /// Folder of runs, or one run, to show with their training curves while they go on.
    #[arg(long, value_name = "DIR")]
    pub runs: Option<PathBuf>,
    /// Answers that are kept in memory, prompt and tokens, for the page of generations; each key sees its own (without
    /// keys: each address).
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub keep_generations: u32,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub verifying: Verifying,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub drafting: Drafting,
    /// Draft nothing unless a request says so.
    #[arg(long, conflicts_with_all = ["auto", "depth", "tree_top_k", "tree_nodes"])]
    pub no_draft: bool,
    /// How the model writes calls of tools, if its chat template does not tell: `hermes`, `llama3_json`, `mistral`, …
    /// (docs/SERVE.md).
    #[arg(long, value_name = "FORMAT")]
    pub tool_format: Option<String>,
    /// Tell of each request on stderr once it ended: id, key, tokens, times, accept length.
    #[arg(long)]
    pub log_requests: bool,
    /// The same as one JSON object a line; other lines of the server are objects with `time` and `message` then.
    #[arg(long)]
    pub log_json: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at the type")]
    pub computing: Computing,
    /// Threads to compute with (default: all; results do not depend on it).
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Print one JSON object once the model answers: url, model, draft; of several models at once: url, models.
    #[arg(long)]
    pub json: bool,
}

/// A model of several: `NAME=PLACE`, or `NAME=BUNDLE,target=REF`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedModel {
    /// What requests call it.
    pub name: String,
    /// A bundle's folder, or a reference of a target.
    pub place: String,
    /// The target of a bundle, in place of the sources that it names.
    pub target: Option<String>,
}

impl FromStr for NamedModel {
    type Err = String;

    fn from_str(text: &str) -> Result<NamedModel, String> {
        let wrong = || "expected `NAME=BUNDLE`, for example `coder=runs/coder/bundle`".to_string();
        let (name, place) = text.split_once('=').ok_or_else(wrong)?;
        let (place, target) = match place.split_once(",target=") {
            Some((place, target)) => (place, Some(target.to_owned())),
            None => (place, None),
        };
        let empty = name.is_empty() || place.is_empty() || target.as_deref() == Some("");
        if empty || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(wrong());
        }
        Ok(NamedModel { name: name.to_owned(), place: place.to_owned(), target })
    }
}

/// An amount of memory: GiB, or a number with KiB, MiB or GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(
    /// In bytes.
    pub u64,
);

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Memory, String> {
        let wrong = || "expected a number of GiB above 0, or one with KiB, MiB or GiB".to_string();
        let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(at);
        let factor: u64 = match unit.trim() {
            "" | "GiB" => 1 << 30,
            "MiB" => 1 << 20,
            "KiB" => 1 << 10,
            _ => return Err(wrong()),
        };
        let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
        match (1.0..=(1u64 << 50) as f64).contains(&bytes) {
            true => Ok(Memory(bytes as u64)),
            false => Err(wrong()),
        }
    }
}

/// Room for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    /// So many tokens.
    Tokens(u64),
    /// So many bytes.
    Bytes(u64),
}

impl KvBudget {
    /// What is left of a number of bytes when so many are taken. A number of tokens leaves other bytes out.
    pub fn without(self, bytes: usize) -> KvBudget {
        match self {
            KvBudget::Tokens(tokens) => KvBudget::Tokens(tokens),
            KvBudget::Bytes(all) => KvBudget::Bytes(all.saturating_sub(bytes as u64)),
        }
    }

    /// Tokens that fit, each taking `token_bytes`.
    pub fn tokens(self, token_bytes: usize) -> usize {
        let tokens = match self {
            KvBudget::Tokens(tokens) => tokens,
            KvBudget::Bytes(bytes) => bytes / (token_bytes as u64).max(1),
        };
        usize::try_from(tokens).unwrap_or(usize::MAX)
    }
}

/// As it is written: tokens, or bytes in a unit.
impl std::fmt::Display for KvBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KvBudget::Tokens(tokens) => write!(f, "{tokens}"),
            KvBudget::Bytes(bytes) if bytes % (1 << 30) == 0 => write!(f, "{}GiB", bytes >> 30),
            KvBudget::Bytes(bytes) if bytes % (1 << 20) == 0 => write!(f, "{}MiB", bytes >> 20),
            KvBudget::Bytes(bytes) => write!(f, "{}KiB", bytes.div_ceil(1 << 10)),
        }
    }
}

impl FromStr for KvBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<KvBudget, String> {
        let wrong = || "expected a number of tokens, or of bytes with KiB, MiB or GiB".to_string();
        let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(at);
        let number: u64 = number.parse().ok().filter(|n| *n > 0).ok_or_else(wrong)?;
        let factor: u64 = match unit.trim() {
            "" => return Ok(KvBudget::Tokens(number)),
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(wrong()),
        };
        number.checked_mul(factor).map(KvBudget::Bytes).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_a_name_and_a_place_and_memory_is_in_gib() {
        let parse = |text: &str| text.parse::<NamedModel>().ok().map(|m| (m.name, m.place));
        let named = |name: &str, place: &str| Some((name.to_string(), place.to_string()));
        assert_eq!(parse("a=runs/a"), named("a", "runs/a"));
        assert_eq!(parse("org/a:7b=pip:p==1.0:m.gguf"), named("org/a:7b", "pip:p==1.0:m.gguf"));
        let with_target = "a=b,target=hf:o/n".parse::<NamedModel>().unwrap();
        assert_eq!((with_target.place.as_str(), with_target.target.as_deref()), ("b", Some("hf:o/n")));
        for wrong in ["", "a", "=b", "a=", "a b=c", "a=b,target="] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        let memory = |text: &str| text.parse::<Memory>().ok().map(|memory| memory.0);
        assert_eq!(
            (memory("12"), memory("0.5"), memory("12GiB")),
            (Some(12 << 30), Some(1 << 29), Some(12 << 30))
        );
        assert_eq!((memory("900MiB"), memory("1.5KiB")), (Some(900 << 20), Some(1536)));
        for wrong in ["", "0", "-1", "4GB", "1.2.3", "x", "9999999999"] {
            assert_eq!(memory(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn budgets_are_tokens_or_bytes() {
        let parse = |text: &str| text.parse::<KvBudget>().ok();
        assert_eq!(parse("65536"), Some(KvBudget::Tokens(65536)));
        assert_eq!(parse("4GiB"), Some(KvBudget::Bytes(4 << 30)));
        for wrong in ["", "0", "4GB", "-1", "1.5GiB", "99999999999GiB"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        assert_eq!(KvBudget::Bytes(1 << 20).tokens(1 << 10), 1 << 10);
        for text in ["65536", "4GiB", "3MiB", "1500KiB"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        // Features that wait for a draft are taken off a number of bytes.
        assert_eq!(KvBudget::Bytes(1 << 20).without(1 << 19).tokens(1 << 10), 1 << 9);
        assert_eq!(KvBudget::Bytes(1 << 20).without(1 << 21).tokens(1 << 10), 0);
        assert_eq!(KvBudget::Tokens(77).without(1 << 21).tokens(1 << 10), 77);
    }
}
