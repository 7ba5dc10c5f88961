//! The three spellings of a model reference `[design §9]`.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::PullError;

/// Where a model (or any other file) comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// `hf:ORG/NAME[@REVISION][:FILE]`; without a file, the whole repository's weights and text files.
    Hf {
        /// `ORG/NAME`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// Path inside the repository.
        file: Option<String>,
    },
    /// `pip:PACKAGE==VERSION:PATH`: one file of a wheel.
    Pip {
        /// Distribution name.
        package: String,
        /// Exact version.
        version: String,
        /// Path inside the wheel.
        path: String,
    },
    /// A file or folder on this machine.
    Path(PathBuf),
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reference::Hf { repo, revision, file } => {
                write!(f, "hf:{repo}")?;
                if revision != "main" {
                    write!(f, "@{revision}")?;
                }
                match file {
                    Some(file) => write!(f, ":{file}"),
                    None => Ok(()),
                }
            }
            Reference::Pip { package, version, path } => write!(f, "pip:{package}=={version}:{path}"),
            Reference::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// True for a path that stays inside its folder whatever it is joined to.
pub(super) fn is_inner_path(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\\', '\0', ':'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

fn is_name(text: &str, more: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(['-', '.'])
        && !text.contains("..")
        && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

impl FromStr for Reference {
    type Err = PullError;

    fn from_str(text: &str) -> Result<Reference, PullError> {
        let bad = |reason: &str| PullError::BadReference {
            reference: text.to_string(),
            reason: reason.to_string(),
        };
        if let Some(rest) = text.strip_prefix("hf:") {
            let (repo, file) = match rest.split_once(':') {
                Some((repo, file)) => (repo, Some(file.to_string())),
                None => (rest, None),
            };
            let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
            let (org, name) = repo.split_once('/').ok_or_else(|| bad("expected `ORG/NAME` after `hf:`"))?;
            if !is_name(org, "-_.") || !is_name(name, "-_.") {
                return Err(bad("`ORG/NAME` may hold letters, digits, `-`, `_` and `.`"));
            }
            if !is_inner_path(revision) {
                return Err(bad("the revision after `@` is not a branch, tag or commit"));
            }
            if file.as_deref().is_some_and(|f| !is_inner_path(f)) {
                return Err(bad("the file is not a relative path inside the repository"));
            }
            Ok(Reference::Hf { repo: repo.to_string(), revision: revision.to_string(), file })
        } else if let Some(rest) = text.strip_prefix("pip:") {
            let (requirement, path) =
                rest.split_once(':').ok_or_else(|| bad("expected `:PATH/IN/WHEEL` after the version"))?;
            let (package, version) = requirement
                .split_once("==")
                .ok_or_else(|| bad("expected `PACKAGE==VERSION` after `pip:`"))?;
            if !is_name(package, "-_.") || !is_name(version, "-_.+!") {
                return Err(bad("package and version may hold letters, digits, `-`, `_`, `.`, `+` and `!`"));
            }
            if !is_inner_path(path) {
                return Err(bad("the path is not a relative path inside the wheel"));
            }
            Ok(Reference::Pip {
                package: package.to_string(),
                version: version.to_string(),
                path: path.to_string(),
            })
        } else if text.is_empty() {
            Err(bad("it is empty"))
        } else {
            Ok(Reference::Path(PathBuf::from(text)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let found = match text.parse::<Reference>() {
            Ok(reference) => format!("{reference:?}"),
            Err(PullError::BadReference { reason, .. }) => reason,
            Err(other) => panic!("unexpected error {other}"),
        };
        assert!(found.contains(expected), "`{text}` gave {found}, expected {expected}");
    }

    #[test]
    fn each_spelling_is_told_apart_and_bad_ones_say_why() {
        check("hf:a/b", r#"Hf { repo: "a/b", revision: "main", file: None }"#);
        check("hf:a/b@v1:x/y.gguf", r#"revision: "v1", file: Some("x/y.gguf")"#);
        check("hf:a/b@refs/pr/3", r#"revision: "refs/pr/3""#);
        check("pip:p-q==0.1.2:d/m.gguf", r#"Pip { package: "p-q", version: "0.1.2", path: "d/m.gguf" }"#);
        check("models/x.gguf", "Path(");
        check("", "it is empty");
        check("hf:alone", "ORG/NAME");
        check("hf:a/..", "may hold");
        check("hf:a/b:../x", "relative path inside the repository");
        check("hf:a/b:/etc/x", "relative path inside the repository");
        check("hf:a/b@../../x", "revision");
        check("pip:x:y", "PACKAGE==VERSION");
        check("pip:--index==1:y", "package and version");
        check("pip:x==1", ":PATH/IN/WHEEL");
        check("pip:x==1:../y", "inside the wheel");
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in ["hf:a/b", "hf:a/b@v1:x.gguf", "pip:p==1.0:m/x.gguf", "some/file"] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), text);
        }
    }
}
