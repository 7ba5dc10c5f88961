//! `bundle.json`: where a draft comes from, what is in its folder, and numbers to recognise it by.
//!
//! The manifest is read first. It lists every other file of the folder with size and hash, every tensor with shape,
//! type and hash, and a probe: a fixed input and what the draft answered when the bundle was made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::{self, AtomicError};
use crate::hash;
use crate::safetensors_dir::{SafetensorsDir, SafetensorsError};

/// Name of the manifest in the folder.
pub const MANIFEST_NAME: &str = "bundle.json";

/// Newest version that this code reads and writes.
pub const BUNDLE_VERSION: u32 = 1;

/// The first field of the manifest.
const FORMAT: &str = "draftsmith-bundle";

/// Content of `bundle.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleManifest {
    /// Always `draftsmith-bundle`.
    pub format: String,
    /// Format version.
    pub version: u32,
    /// Name on the model card.
    pub name: String,
    /// Licence of the weights, as an SPDX expression.
    pub license: Option<String>,
    /// Kind of draft, such as `eagle3`.
    pub method: String,
    /// Version of the program that wrote the bundle.
    pub code_version: String,
    /// The model that the draft belongs to.
    pub target: TargetProvenance,
    /// What it was trained on.
    pub data: DataProvenance,
    /// The run that made it.
    pub run: RunProvenance,
    /// Every file of the folder except `bundle.json`, sorted by path.
    pub files: Vec<FileEntry>,
    /// Every tensor of the weights, sorted by name.
    pub tensors: Vec<TensorEntry>,
    /// Numbers to recognise the network by.
    pub probe: Option<Probe>,
}

/// The model that a draft belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetProvenance {
    /// Model reference that was used.
    pub source: String,
    /// SHA-256 of its weights file, or over the hashes of its shards in order.
    pub sha256: String,
    /// Architecture name, such as `llama`.
    pub architecture: String,
    /// Width of its hidden states.
    pub hidden_size: u32,
    /// Size of its vocabulary.
    pub vocab_size: u32,
    /// Number of its decoder layers.
    pub num_layers: u32,
    /// 0-based layers whose output the draft reads.
    pub target_layer_ids: Vec<u32>,
    /// SHA-256 of its tokenizer.
    pub tokenizer_sha256: String,
    /// SHA-256 of its chat template.
    pub template_sha256: String,
}

/// What a draft was trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataProvenance {
    /// Content hash of the token file.
    pub sha256: String,
    /// Paths or references of the sources.
    pub sources: Vec<String>,
    /// Rows.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens with loss.
    pub trained_tokens: u64,
}

/// The run that made a draft.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunProvenance {
    /// Its name.
    pub name: String,
    /// SHA-256 of the text of the resolved run file.
    pub file_sha256: String,
    /// Optimiser step of the checkpoint.
    pub step: u64,
    /// SHA-256 of the weights in the checkpoint.
    pub checkpoint_sha256: String,
    /// Seeds by name.
    pub seeds: BTreeMap<String, u64>,
    /// Numbers of the last validation, by name; measured ones never start with `sim_`.
    pub metrics: BTreeMap<String, f64>,
}

/// A file of the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path inside the folder, with `/`.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Hash.
    pub sha256: String,
}

/// A tensor of the weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Type as safetensors spells it.
    pub dtype: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Hash of its bytes.
    pub sha256: String,
}

/// A fixed input and what the draft answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// `[S]` input tokens in target ids; the features beside them are derived from `seed`.
    pub input_ids: Vec<u32>,
    /// Seed of the features.
    pub seed: u64,
    /// Hash of the input features as little-endian f32.
    pub features_sha256: String,
    /// `[S]` arg-max of the logits in draft ids.
    pub argmax: Vec<u32>,
    /// The first logits of the last position.
    pub logits: Vec<f32>,
    /// Largest difference between `logits` and a check's own that counts as equal; other processors sum in
    /// another order.
    pub tolerance: f32,
}

/// What is wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] AtomicError),
    /// The weights are no weights.
    #[error(transparent)]
    Weights(#[from] SafetensorsError),
    /// The manifest is not readable.
    #[error("bundle manifest `{}`: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong, with line and column.
        problem: String,
    },
    /// A version from the future.
    #[error("bundle `{}` has format version {found}, this program reads up to {newest}", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Version in the file.
        found: u32,
        /// Newest version that is known.
        newest: u32,
    },
    /// A listed path that leads out of the folder.
    #[error("bundle manifest `{}` lists `{entry}`, which is not a path inside the folder", path.display())]
    EntryPath {
        /// The manifest.
        path: PathBuf,
        /// The path.
        entry: String,
    },
    /// A file with other content than the manifest says.
    #[error("`{}` has {what} {found}, but `bundle.json` says {wanted}", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// `size`, `sha256` or a tensor's property.
        what: String,
        /// What was found.
        found: String,
        /// What the manifest says.
        wanted: String,
    },
    /// A file of the folder that the manifest does not list.
    #[error("`{}` is not listed in `bundle.json`", path.display())]
    Unlisted {
        /// The file.
        path: PathBuf,
    },
    /// A tensor that is only in the weights or only in the manifest.
    #[error("tensor `{name}` is {where_found}")]
    Tensor {
        /// The tensor.
        name: String,
        /// Where it is and where not.
        where_found: &'static str,
    },
}

impl BundleError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            BundleError::File(e) => e.hint(),
            BundleError::Weights(e) => e.hint(),
            BundleError::Manifest { .. } => Some("is this the folder of a bundle?".to_string()),
            BundleError::Version { .. } => Some("update draftsmith".to_string()),
            BundleError::EntryPath { .. } => Some("do not trust this bundle".to_string()),
            BundleError::Differs { .. } | BundleError::Unlisted { .. } | BundleError::Tensor { .. } => {
                Some("the bundle was changed after it was made: get it again or make it again".to_string())
            }
        }
    }
}

impl FileEntry {
    /// Size and hash of a file of the folder.
    pub fn of(dir: &Path, relative: &str) -> Result<FileEntry, BundleError> {
        let path = dir.join(relative);
        let sha256 = hash::sha256_file(&path)?;
        let meta = std::fs::metadata(&path).map_err(|e| AtomicError::from_io("read", &path, e))?;
        Ok(FileEntry { path: relative.to_string(), bytes: meta.len(), sha256 })
    }
}

/// The tensor table of opened weights.
pub fn tensor_table(weights: &SafetensorsDir) -> Vec<TensorEntry> {
    let entry = |t: crate::safetensors_dir::Tensor<'_>| TensorEntry {
        name: t.name.to_string(),
        dtype: t.dtype.to_string(),
        shape: t.shape.to_vec(),
        sha256: hash::sha256_hex(t.bytes),
    };
    weights.names().filter_map(|name| weights.find(name)).map(entry).collect()
}

/// All files below a folder except the manifest, as relative paths with `/`, sorted.
pub fn list_files(dir: &Path) -> Result<Vec<String>, BundleError> {
    let mut out = Vec::new();
    let mut open = vec![(dir.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = open.pop() {
        let fail = |e| AtomicError::from_io("list", &folder, e);
        for entry in std::fs::read_dir(&folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type().map_err(fail)?.is_dir() {
                open.push((entry.path(), format!("{name}/")));
            } else if name != MANIFEST_NAME && name != ".lock" {
                out.push(name);
            }
        }
    }
    out.sort();
    Ok(out)
}

impl BundleManifest {
    /// The value of [`BundleManifest::format`].
    pub fn format_name() -> String {
        FORMAT.to_string()
    }

    /// Reads the manifest of a folder.
    pub fn read(dir: impl AsRef<Path>) -> Result<BundleManifest, BundleError> {
        let path = dir.as_ref().join(MANIFEST_NAME);
        let bytes = atomic::read(&path)?;
        let problem = |problem: String| BundleError::Manifest { path: path.clone(), problem };
        // The version decides how to read the rest, so it is looked at alone first.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| problem(e.to_string()))?;
        if head.format != FORMAT {
            return Err(problem(format!("`format` is `{}`, expected `{FORMAT}`", head.format)));
        }
        if head.version == 0 || head.version > BUNDLE_VERSION {
            return Err(BundleError::Version { path, found: head.version, newest: BUNDLE_VERSION });
        }
        let manifest: BundleManifest = serde_json::from_slice(&bytes).map_err(|e| problem(e.to_string()))?;
        for file in &manifest.files {
            let mut parts = Path::new(&file.path).components();
            let inside = !file.path.is_empty()
                && !file.path.contains(['\\', ':'])
                && parts.all(|p| matches!(p, Component::Normal(_)));
            if !inside {
                return Err(BundleError::EntryPath { path, entry: file.path.clone() });
            }
        }
        Ok(manifest)
    }

    /// The manifest as it is written.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("the manifest is plain data");
        text.push('\n');
        text
    }

    /// Writes the manifest into a folder.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<(), BundleError> {
        Ok(atomic::write(dir.as_ref().join(MANIFEST_NAME), self.to_json())?)
    }

    /// Compares size and hash of every listed file, and finds files that are not listed.
    pub fn verify_files(&self, dir: impl AsRef<Path>) -> Result<(), BundleError> {
        let dir = dir.as_ref();
        for wanted in &self.files {
            let path = dir.join(&wanted.path);
            let meta = std::fs::metadata(&path).map_err(|e| AtomicError::from_io("read", &path, e))?;
            let differs = |what: &str, found: String, wanted: String| BundleError::Differs {
                path: path.clone(),
                what: what.to_string(),
                found,
                wanted,
            };
            if meta.len() != wanted.bytes {
                return Err(differs("size", meta.len().to_string(), wanted.bytes.to_string()));
            }
            let sha256 = hash::sha256_file(&path)?;
            if sha256 != wanted.sha256 {
                return Err(differs("sha256", sha256, wanted.sha256.clone()));
            }
        }
        let listed: BTreeSet<&str> = self.files.iter().map(|f| f.path.as_str()).collect();
        match list_files(dir)?.into_iter().find(|f| !listed.contains(f.as_str())) {
            Some(extra) => Err(BundleError::Unlisted { path: dir.join(extra) }),
            None => Ok(()),
        }
    }

    /// Compares the tensor table with opened weights.
    pub fn verify_tensors(&self, weights: &SafetensorsDir) -> Result<(), BundleError> {
        let found = tensor_table(weights);
        let by_name: BTreeMap<&str, &TensorEntry> = found.iter().map(|t| (t.name.as_str(), t)).collect();
        for wanted in &self.tensors {
            let Some(found) = by_name.get(wanted.name.as_str()) else {
                let where_found = "listed in `bundle.json`, but not in the weights";
                return Err(BundleError::Tensor { name: wanted.name.clone(), where_found });
            };
            let differs = |what: &str, found: String, wanted_value: String| BundleError::Differs {
                path: weights.path().to_path_buf(),
                what: format!("tensor `{}` with {what}", wanted.name),
                found,
                wanted: wanted_value,
            };
            if found.dtype != wanted.dtype {
                return Err(differs("type", found.dtype.clone(), wanted.dtype.clone()));
            }
            if found.shape != wanted.shape {
                return Err(differs("shape", format!("{:?}", found.shape), format!("{:?}", wanted.shape)));
            }
            if found.sha256 != wanted.sha256 {
                return Err(differs("sha256", found.sha256.clone(), wanted.sha256.clone()));
            }
        }
        let listed: BTreeSet<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        match found.into_iter().find(|t| !listed.contains(t.name.as_str())) {
            Some(extra) => {
                let where_found = "in the weights, but not listed in `bundle.json`";
                Err(BundleError::Tensor { name: extra.name, where_found })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors_dir::{self, TensorData};

    fn manifest(dir: &Path) -> BundleManifest {
        let weights = [TensorData::f32("w", &[2], &[1.0, 2.0]), TensorData::i64("d2t", &[1], &[0])];
        safetensors_dir::write(dir.join("model.safetensors"), &weights, &BTreeMap::new()).unwrap();
        atomic::write(dir.join("sub/README.md"), "hi").unwrap();
        let weights = SafetensorsDir::open(dir).unwrap();
        let files = list_files(dir).unwrap();
        BundleManifest {
            format: BundleManifest::format_name(),
            version: BUNDLE_VERSION,
            name: "x".into(),
            license: Some("Apache-2.0".into()),
            method: "eagle3".into(),
            code_version: "0.1.0".into(),
            target: TargetProvenance {
                source: "m.gguf".into(),
                sha256: hash::sha256_hex(b"m"),
                architecture: "llama".into(),
                hidden_size: 8,
                vocab_size: 16,
                num_layers: 4,
                target_layer_ids: vec![1, 2, 3],
                tokenizer_sha256: hash::sha256_hex(b"t"),
                template_sha256: hash::sha256_hex(b"c"),
            },
            data: DataProvenance::default(),
            run: RunProvenance {
                metrics: BTreeMap::from([("accept_len".into(), 2.25)]),
                ..Default::default()
            },
            files: files.iter().map(|f| FileEntry::of(dir, f).unwrap()).collect(),
            tensors: tensor_table(&weights),
            probe: Some(Probe {
                input_ids: vec![1, 2],
                seed: 7,
                features_sha256: hash::sha256_hex(b""),
                argmax: vec![0, 3],
                logits: vec![0.1, -2.5e-7],
                tolerance: 1e-3,
            }),
        }
    }

    #[test]
    fn an_untouched_bundle_verifies() {
        let dir = tempfile::tempdir().unwrap();
        let written = manifest(dir.path());
        written.write(dir.path()).unwrap();
        let read = BundleManifest::read(dir.path()).unwrap();
        assert_eq!(read, written);
        read.verify_files(dir.path()).unwrap();
        read.verify_tensors(&SafetensorsDir::open(dir.path()).unwrap()).unwrap();
        assert_eq!(
            read.files.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(),
            ["model.safetensors", "sub/README.md"]
        );
    }

    #[test]
    fn a_changed_bundle_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let m = manifest(dir.path());
        let said = |m: &BundleManifest| m.verify_files(dir.path()).unwrap_err().to_string();
        std::fs::write(dir.path().join("sub/README.md"), "ho").unwrap();
        assert!(said(&m).contains("README.md` has sha256"), "{}", said(&m));
        std::fs::write(dir.path().join("sub/README.md"), "hallo").unwrap();
        assert!(said(&m).contains("README.md` has size 5, but `bundle.json` says 2"), "{}", said(&m));
        std::fs::write(dir.path().join("sub/README.md"), "hi").unwrap();
        std::fs::write(dir.path().join("extra"), "").unwrap();
        assert!(said(&m).contains("extra` is not listed"), "{}", said(&m));
        std::fs::remove_file(dir.path().join("extra")).unwrap();
        std::fs::remove_file(dir.path().join("sub/README.md")).unwrap();
        assert!(said(&m).starts_with("cannot read `"), "{}", said(&m));
    }

    #[test]
    fn changed_tensors_are_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let m = manifest(dir.path());
        let check = |tensors: &[TensorData], expected: &str| {
            let path = dir.path().join("other.safetensors");
            safetensors_dir::write(&path, tensors, &BTreeMap::new()).unwrap();
            let err = m.verify_tensors(&SafetensorsDir::open(&path).unwrap()).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        };
        let d2t = || TensorData::i64("d2t", &[1], &[0]);
        check(&[d2t(), TensorData::f32("w", &[2], &[1.0, 2.5])], "tensor `w` with sha256");
        check(&[d2t(), TensorData::f32("w", &[1, 2], &[1.0, 2.0])], "tensor `w` with shape [1, 2]");
        check(&[d2t(), TensorData::bf16("w", &[2], &[1.0, 2.0])], "tensor `w` with type BF16");
        check(&[d2t()], "tensor `w` is listed in `bundle.json`, but not in the weights");
        let w = || TensorData::f32("w", &[2], &[1.0, 2.0]);
        check(
            &[d2t(), w(), TensorData::f32("x", &[1], &[0.0])],
            "tensor `x` is in the weights, but not listed",
        );
    }

    #[test]
    fn broken_manifests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let m = manifest(dir.path());
        let said = |text: &str| {
            std::fs::write(dir.path().join(MANIFEST_NAME), text).unwrap();
            BundleManifest::read(dir.path()).unwrap_err().to_string()
        };
        let json = m.to_json();
        assert!(said(&json[..json.len() / 2]).contains("EOF while parsing"));
        assert!(said(&json.replace("draftsmith-bundle", "other")).contains("`format` is `other`"));
        assert!(said(&json.replacen("\"version\": 1", "\"version\": 2", 1)).contains("format version 2"));
        assert!(said(&json.replace("sub/README.md", "../README.md")).contains("lists `../README.md`"));
        assert!(said(&json.replace("sub/README.md", "/etc/x")).contains("lists `/etc/x`"));
        assert!(said(&json.replace("\"license\"", "\"lisense\"")).contains("unknown field `lisense`"));
    }
}
