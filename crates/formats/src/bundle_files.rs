//! What of a bundle can be known without being able to use it: the list of its files, for those who carry it about, and
//! how it names what lies elsewhere.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

/// First field of a bundle's manifest.
pub const BUNDLE_FORMAT: &str = "draftsmith-bundle";
/// Name of a bundle's manifest, which lists every other file.
pub const MANIFEST_FILE: &str = "bundle.json";

/// True of a folder with a file of that name, whatever it says.
pub fn has_manifest(folder: &Path) -> bool {
    folder.join(MANIFEST_FILE).is_file()
}

/// A file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path inside the bundle, `/` between folders.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Hash.
    pub sha256: String,
}

/// The files that a manifest lists; `None` if it is the `bundle.json` of something else. Of whatever version it is, nothing
/// but the list is looked at.
///
/// # Errors
/// What is wrong with it, in words.
pub fn listed_files(manifest: &[u8]) -> Result<Option<Vec<FileEntry>>, String> {
    #[derive(Deserialize)]
    struct Listed {
        files: Vec<FileEntry>,
    }
    let value: serde_json::Value = serde_json::from_slice(manifest).map_err(|e| e.to_string())?;
    if value.get("format").and_then(|format| format.as_str()) != Some(BUNDLE_FORMAT) {
        return Ok(None);
    }
    let listed: Listed = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let mut paths: Vec<&str> = listed.files.iter().map(|entry| entry.path.as_str()).collect();
    paths.sort_unstable();
    if let Some(pair) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("it lists `{}` twice", pair[0]));
    }
    Ok(Some(listed.files))
}

/// A place as a bundle may name it: a reference (`hf:`, `pip:`) as it is, a relative path that stays below where it counts
/// from as it is, and of any other path, which is one of the machine that made the bundle, the last part.
///
/// ```
/// use draftsmith_formats::bundle_files::portable;
///
/// assert_eq!(portable("hf:ORG/NAME:model.gguf"), "hf:ORG/NAME:model.gguf");
/// assert_eq!(portable("recipes/data/prompts.jsonl"), "recipes/data/prompts.jsonl");
/// assert_eq!(portable("/big/me/models/model.gguf"), "model.gguf");
/// assert_eq!(portable("../models/tiny/"), "tiny");
/// ```
pub fn portable(place: &str) -> String {
    if !is_of_a_machine(place) {
        return place.to_string();
    }
    let parts = place.split(['/', '\\']).rev();
    let mut names = parts.filter(|part| !matches!(*part, "" | "." | ".." | "~") && !part.ends_with(':'));
    names.next().unwrap_or("unnamed").to_string()
}

/// True of a name that is no path: what it leads to is fetched.
pub fn is_reference(place: &str) -> bool {
    place.starts_with("hf:") || place.starts_with("pip:") || is_address(place)
}

/// True of a name that is an address in a store, known or not: it has a scheme.
///
/// ```
/// use draftsmith_formats::bundle_files::is_address;
///
/// assert!(is_address("s3://bucket/chats.jsonl"));
/// assert!(!is_address("hf:ORG/NAME:model.gguf"));
/// ```
pub fn is_address(place: &str) -> bool {
    place.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

/// True of a path that means something on one machine only: from the root, from home, from a drive, or upwards.
pub fn is_of_a_machine(place: &str) -> bool {
    if place.starts_with("file://") {
        return true;
    }
    if is_reference(place) {
        return false;
    }
    let drive = matches!(place.as_bytes(), [letter, b':', b'/' | b'\\', ..] if letter.is_ascii_alphabetic());
    let upwards = Path::new(place).components().any(|part| part == Component::ParentDir);
    drive || upwards || place == "~" || place.starts_with(['/', '\\']) || place.starts_with("~/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_machine_only_the_last_part_of_a_path_is_told() {
        #[track_caller]
        fn check(place: &str, expected: &str) {
            assert_eq!(portable(place), expected, "`{place}`");
            assert!(!is_of_a_machine(&portable(place)), "`{place}`");
        }
        for kept in [
            "hf:a/b@v1:x/y.gguf",
            "pip:p{1..3}==1:a{n}/b",
            "x.gguf",
            "a/b/c",
            "./a",
            "~x",
            "a:b",
            "s3://b/x.jsonl",
        ] {
            check(kept, kept);
        }
        check("/a/b/c.gguf", "c.gguf");
        check("/a/b/", "b");
        check("~/models/x", "x");
        check("../x", "x");
        check("a/../../x", "x");
        check("C:\\Users\\me\\x.gguf", "x.gguf");
        check("C:/x", "x");
        check("file:///a/b.jsonl", "b.jsonl");
        check("file:///", "unnamed");
        check("\\\\host\\share\\x", "x");
        for nameless in ["/", "..", "~", "C:\\"] {
            check(nameless, "unnamed");
        }
    }

    #[test]
    fn a_list_is_read_of_our_own_manifests_only() {
        let read = |text: &str| listed_files(text.as_bytes());
        assert_eq!(read(r#"{"format": "other", "files": 3}"#), Ok(None));
        assert_eq!(read("[]"), Ok(None));
        assert!(read("{").is_err());
        assert!(read(r#"{"format": "draftsmith-bundle"}"#).unwrap_err().contains("files"));
        let entry = r#"{"path": "a/b", "bytes": 3, "sha256": "00"}"#;
        let later =
            format!(r#"{{"format": "draftsmith-bundle", "version": 9, "new": 1, "files": [{entry}]}}"#);
        assert_eq!(read(&later).unwrap().unwrap()[0].path, "a/b");
        let twice = format!(r#"{{"format": "draftsmith-bundle", "files": [{entry}, {entry}]}}"#);
        assert!(read(&twice).unwrap_err().contains("`a/b` twice"));
    }
}
