//! What the second networks of all kinds of drafts share: tensors of either container by published names, and sums in
//! f64. Nothing of the exporter, of the importer or of `model` is used.

use std::path::Path;

use draftsmith_formats::gguf::{GgmlType, GgufError, GgufFile};
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use serde_json::Value;

use super::{GGUF_FILE, Layout};
use crate::BundleError;

/// Row-major `[out, in]`.
pub(crate) struct Matrix {
    pub(crate) columns: usize,
    pub(crate) values: Vec<f64>,
}

impl Matrix {
    pub(crate) fn apply(&self, x: &[f64]) -> Vec<f64> {
        self.values
            .chunks_exact(self.columns)
            .map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>())
            .collect()
    }
}

/// A tensor as it lies in the file, to be compared with the bundle's.
pub(crate) struct Stored {
    /// Type as the container calls it.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

/// Gets at the tensors of either container by published name.
pub(crate) enum File {
    Safetensors(SafetensorsDir),
    Gguf(GgufFile<'static>),
}

impl File {
    pub(crate) fn open(dir: &Path, layout: Layout) -> Result<File, BundleError> {
        Ok(match layout {
            Layout::Gguf => File::Gguf(GgufFile::open(dir.join(GGUF_FILE))?),
            Layout::Sglang | Layout::Vllm | Layout::Speculators => {
                File::Safetensors(SafetensorsDir::open(dir)?)
            }
        })
    }

    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            File::Safetensors(dir) => dir.names().map(str::to_owned).collect(),
            File::Gguf(file) => file.tensors().iter().map(|t| t.name.clone()).collect(),
        }
    }

    /// A tensor's numbers (none if its type is one that an export never has); `None` if it is not there.
    pub(crate) fn find(&self, name: &str) -> Option<Stored> {
        match self {
            File::Safetensors(dir) => {
                let tensor = dir.find(name)?;
                let values = match (tensor.to_f32(), tensor.to_i64(), tensor.to_bool()) {
                    (Ok(floats), ..) => floats.into_iter().map(f64::from).collect(),
                    (_, Ok(ids), _) => ids.into_iter().map(|id| id as f64).collect(),
                    (.., Ok(flags)) => flags.into_iter().map(|flag| f64::from(u8::from(flag))).collect(),
                    _ => Vec::new(),
                };
                Some(Stored { dtype: format!("{:?}", tensor.dtype), shape: tensor.shape.to_vec(), values })
            }
            File::Gguf(file) => {
                let info = file.find_tensor(name)?;
                let bytes = file.data(info);
                let values = match info.ggml_type {
                    GgmlType::F32 => bytes
                        .chunks_exact(4)
                        .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                        .collect(),
                    // bf16 is the upper half of an f32.
                    GgmlType::BF16 => bytes
                        .chunks_exact(2)
                        .map(|b| f64::from(f32::from_le_bytes([0, 0, b[0], b[1]])))
                        .collect(),
                    GgmlType::I64 => bytes
                        .chunks_exact(8)
                        .map(|b| i64::from_le_bytes(b.try_into().expect("chunks have eight bytes")) as f64)
                        .collect(),
                    _ => Vec::new(),
                };
                let shape = info.dims.iter().rev().copied().collect();
                Some(Stored { dtype: info.ggml_type.to_string(), shape, values })
            }
        }
    }
}

/// How positions turn queries and keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rope {
    theta: f64,
    /// Divides every frequency.
    linear: f64,
    /// Llama 3's `factor`, `low_freq_factor`, `high_freq_factor`, original length.
    llama3: Option<[f64; 4]>,
}

impl Rope {
    /// From the part of a `config.json` that describes a layer; `number` reads a key of a value.
    pub(crate) fn of_json(
        layer: &Value,
        number: &dyn Fn(&Value, &str) -> Result<f64, BundleError>,
    ) -> Result<Rope, BundleError> {
        let scaling = &layer["rope_scaling"];
        Ok(Rope {
            theta: number(layer, "rope_theta")?,
            linear: if scaling["rope_type"] == "linear" { number(scaling, "factor")? } else { 1.0 },
            llama3: match scaling["rope_type"] == "llama3" {
                true => Some([
                    number(scaling, "factor")?,
                    number(scaling, "low_freq_factor")?,
                    number(scaling, "high_freq_factor")?,
                    number(scaling, "original_max_position_embeddings")?,
                ]),
                false => None,
            },
        })
    }

    /// From a GGUF file's keys. Llama 3's scaling is a tensor of divisors there.
    pub(crate) fn of_gguf(file: &GgufFile<'_>, architecture: &str) -> Result<Rope, GgufError> {
        let number = |key: &str| file.get_f32(&format!("{architecture}.rope.{key}")).map(f64::from);
        Ok(Rope {
            theta: number("freq_base")?,
            linear: match file.find_str(&format!("{architecture}.rope.scaling.type"))? {
                Some("linear") => number("scaling.factor")?,
                _ => 1.0,
            },
            llama3: None,
        })
    }

    /// Frequencies of the rotation, `[hd / 2]`.
    pub(crate) fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let plain = self.theta.powf(-2.0 * i as f64 / head_dim as f64) / self.linear;
                let Some([factor, low, high, original]) = self.llama3 else { return plain };
                let turns = original * plain / (2.0 * std::f64::consts::PI);
                match turns {
                    t if t > high => plain,
                    t if t < low => plain / factor,
                    t => {
                        let keep = (t - low) / (high - low);
                        plain * (keep + (1.0 - keep) / factor)
                    }
                }
            })
            .collect()
    }
}

pub(crate) fn normed(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// Values mixed for one query over the rows that it sees.
///
/// # Shapes
/// - `query`, result: `[nh hd]`
/// - `keys`, `values`: a row `[nkv hd]` for each position
/// - `shape`: query heads, key heads, head width
pub(crate) fn attended(
    query: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    seen: &[usize],
    [heads, kv_heads, head_dim]: [usize; 3],
) -> Vec<f64> {
    let mut mixed = vec![0.0; heads * head_dim];
    for head in 0..heads {
        let shared = head / (heads / kv_heads) * head_dim;
        let own = head * head_dim..(head + 1) * head_dim;
        let dot = |at: &usize| -> f64 {
            let key = &keys[*at][shared..shared + head_dim];
            query[own.clone()].iter().zip(key).map(|(a, b)| a * b).sum::<f64>() / (head_dim as f64).sqrt()
        };
        let scores: Vec<f64> = seen.iter().map(dot).collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (weight, at) in weights.iter().zip(seen) {
            for (m, v) in mixed[own.clone()].iter_mut().zip(&values[*at][shared..shared + head_dim]) {
                *m += weight / sum * v;
            }
        }
    }
    mixed
}
