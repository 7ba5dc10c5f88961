//! Where fetched things live, and how they are fetched.

use std::path::{Path, PathBuf};

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
    /// `HF_HUB_OFFLINE`, `DRAFTSMITH_PYTHON`, `HOME`, `PATH`. A token file is read here, once.
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
            python: var("DRAFTSMITH_PYTHON")
                .map_or_else(|| python(&var("PATH").unwrap_or_default()), PathBuf::from),
            pack_cache: true,
        }
    }

    /// Hashes of large files that are known.
    pub fn hash_records(&self) -> HashRecords {
        HashRecords::new(self.pack_cache.then(|| self.cache.join("hashes")))
    }
}

/// The interpreter when nobody names one: `python3`, or the first on the path that is no environment without pip. Such are what uv
/// makes, and a program that is started from one has it first on its path.
fn python(path: &str) -> PathBuf {
    let mut found = std::env::split_paths(path).map(|folder| folder.join("python3")).filter(|p| p.is_file());
    match found.next() {
        Some(first) if has_no_pip(&first) => found.find(|python| !has_no_pip(python)),
        _ => None,
    }
    .unwrap_or_else(|| PathBuf::from("python3"))
}

/// True if an interpreter belongs to a virtual environment whose packages are without pip.
fn has_no_pip(python: &Path) -> bool {
    let Some(environment) = python.parent().and_then(Path::parent) else { return false };
    if !environment.join("pyvenv.cfg").is_file() {
        return false;
    }
    let versions = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
    !versions.map(|version| version.path().join("site-packages/pip")).any(|pip| pip.is_dir())
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    /// Folders `bin` of interpreters: on the system, or in an environment with or without pip.
    fn path(root: &Path, made: &[(&str, &[&str])]) -> String {
        let bins = made.iter().map(|(name, files)| {
            for file in files.iter().chain(&["bin/python3"]) {
                let file = root.join(name).join(file);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(file, "").unwrap();
            }
            root.join(name).join("bin")
        });
        std::env::join_paths(bins.collect::<Vec<_>>()).unwrap().into_string().unwrap()
    }

    #[test]
    fn environments_without_pip_are_passed_over() {
        const BARE: (&str, &[&str]) = ("bare", &["pyvenv.cfg", "lib/python3.12/site-packages/draftsmith.py"]);
        const FULL: (&str, &[&str]) =
            ("full", &["pyvenv.cfg", "lib/python3.9/site-packages/pip/__init__.py"]);
        const SYSTEM: (&str, &[&str]) = ("usr", &[]);
        #[track_caller]
        fn check(made: &[(&str, &[&str])], expected: &str) {
            let root = tempfile::tempdir().unwrap();
            let path = path(root.path(), made);
            let places = Places::from_vars(|name| (name == "PATH").then(|| path.clone()));
            let found = places.python.strip_prefix(root.path()).unwrap_or(&places.python);
            assert_eq!(found, Path::new(expected));
            let named = |name: &str| match name {
                "DRAFTSMITH_PYTHON" => Some("pypy".to_string()),
                _ => (name == "PATH").then(|| path.clone()),
            };
            assert_eq!(Places::from_vars(named).python, Path::new("pypy"));
        }
        check(&[BARE, SYSTEM], "usr/bin/python3");
        check(&[BARE, FULL, SYSTEM], "full/bin/python3");
        // As the system itself finds it, where that is good.
        check(&[SYSTEM, BARE], "python3");
        check(&[FULL, BARE], "python3");
        // Nothing better: the error names what every manual says.
        check(&[BARE], "python3");
        check(&[], "python3");
    }
}
