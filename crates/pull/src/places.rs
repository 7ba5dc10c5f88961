//! Where fetched things live, and how they are fetched.

use std::path::PathBuf;

use draftsmith_formats::hash_records::HashRecords;

/// Where fetched things live and how they are fetched. Read from the environment by the caller.
#[derive(Debug, Clone)]
pub struct Places {
    /// Our own cache folder.
    pub cache: PathBuf,
    /// Hub cache: holds `models--ORG--NAME` folders.
    pub hf_cache: PathBuf,
    /// Base address of the hub, without a slash at the end.
    pub hf_endpoint: String,
    /// Access token of the hub.
    pub hf_token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// Interpreter whose `-m pip` is used.
    pub python: PathBuf,
    /// Keep and use packed weights and hashes of large files, so that a start need not read them.
    pub pack_cache: bool,
}

impl Places {
    /// Follows the conventions of the hub's own tools and of XDG; `var` looks a variable up.
    ///
    /// `DRAFTSMITH_CACHE`, `XDG_CACHE_HOME`, `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_HUB_OFFLINE`, `DRAFTSMITH_PYTHON`, `HOME`. A token file is read here, once.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Places {
        let var = |name: &str| var(name).filter(|v| !v.is_empty());
        let home = PathBuf::from(var("HOME").unwrap_or_else(|| ".".to_string()));
        let expand = |text: String| match text.strip_prefix("~/") {
            Some(rest) => home.join(rest),
            None => PathBuf::from(text),
        };
        let user_cache = var("XDG_CACHE_HOME").map(&expand).unwrap_or_else(|| home.join(".cache"));
        let hf_home = var("HF_HOME").map(&expand).unwrap_or_else(|| user_cache.join("huggingface"));
        let token_file = var("HF_TOKEN_PATH").map(&expand).unwrap_or_else(|| hf_home.join("token"));
        let token = var("HF_TOKEN")
            .or_else(|| std::fs::read_to_string(token_file).ok())
            .map(|t| t.trim().to_string())
            .filter(|t| !t.is_empty());
        let is_true = |v: String| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Places {
            cache: var("DRAFTSMITH_CACHE").map(&expand).unwrap_or_else(|| user_cache.join("draftsmith")),
            hf_cache: var("HF_HUB_CACHE").map(&expand).unwrap_or_else(|| hf_home.join("hub")),
            hf_endpoint: var("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_string())
                .trim_end_matches('/')
                .to_string(),
            hf_token: token,
            offline: var("HF_HUB_OFFLINE").is_some_and(is_true),
            python: PathBuf::from(var("DRAFTSMITH_PYTHON").unwrap_or_else(|| "python3".to_string())),
            pack_cache: true,
        }
    }

    /// Hashes of large files that are known.
    pub fn hash_records(&self) -> HashRecords {
        HashRecords::new(self.pack_cache.then(|| self.cache.join("hashes")))
    }
}
