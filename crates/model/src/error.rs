//! What loading a model can refuse.

use draftsmith_formats::gguf::{GgmlType, GgufError};
use draftsmith_formats::hf_config::HfConfigError;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_kernels::KernelError;

use crate::dtype::weight_dtype;
use crate::family::{FAMILIES, Family};
use crate::quantised;

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The container is broken.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The container is broken.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// `config.json` is broken.
    #[error(transparent)]
    Config(#[from] HfConfigError),
    /// A weight does not fit its shape.
    #[error("`{place}`: {source}")]
    Kernel {
        /// File.
        place: String,
        /// What the kernels said.
        source: KernelError,
    },
    /// No forward for this architecture.
    #[error("`{place}` has architecture `{found}`, which is not built")]
    UnknownArchitecture {
        /// File.
        place: String,
        /// Architecture named there.
        found: String,
    },
    /// A folder of quantised weights.
    #[error("`{place}` is quantised with {method}, which is not read")]
    Quantised {
        /// Folder.
        place: String,
        /// By which method, as people spell it.
        method: String,
    },
    /// What a configuration says about quantised weights is not read, or contradicts itself.
    #[error("`{key}` of `{place}` {problem}")]
    QuantisedConfig {
        /// File of the configuration.
        place: String,
        /// Dotted key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor of a quantised layer does not fit the others, or the configuration.
    #[error("tensor `{name}` of `{place}` {problem}")]
    QuantisedTensor {
        /// File.
        place: String,
        /// Tensor.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A folder with an adapter only.
    #[error("`{place}` holds an adapter, not a model")]
    Adapter {
        /// Folder.
        place: String,
    },
    /// A known architecture with an unknown switch.
    #[error("`{place}` uses {what}, which is not built")]
    Unsupported {
        /// File.
        place: String,
        /// The switch.
        what: String,
    },
    /// Numbers that contradict each other.
    #[error("`{place}` has impossible shapes: {what}")]
    Shapes {
        /// File.
        place: String,
        /// Which.
        what: String,
    },
    /// A tensor is missing.
    #[error("`{place}` has no tensor `{name}`")]
    MissingTensor {
        /// File.
        place: String,
        /// Tensor.
        name: String,
    },
    /// A tensor has another shape.
    #[error("tensor `{name}` of `{place}` has shape {found:?}, expected {wanted:?}")]
    TensorShape {
        /// File.
        place: String,
        /// Tensor.
        name: String,
        /// Shape found, row-major.
        found: Vec<usize>,
        /// Shape expected.
        wanted: Vec<usize>,
    },
    /// A tensor has a type that no kernel reads.
    #[error("tensor `{name}` of `{place}` is stored as {found}, which is not built")]
    TensorType {
        /// File.
        place: String,
        /// Tensor.
        name: String,
        /// Stored type.
        found: String,
    },
    /// A tensor that the network does not use.
    #[error("`{place}` has tensor `{name}`, which this architecture does not use")]
    UnexpectedTensor {
        /// File.
        place: String,
        /// Tensor.
        name: String,
    },
    /// The path is neither a GGUF file nor a model folder.
    #[error("`{place}` is neither a GGUF file nor a folder with `config.json` and safetensors")]
    NotAModel {
        /// Path.
        place: String,
    },
}

impl ModelError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            ModelError::Gguf(e) => e.hint(),
            ModelError::Safetensors(e) => e.hint(),
            ModelError::Config(e) => e.hint(),
            ModelError::UnknownArchitecture { .. } => {
                Some(format!("choose a model of a family that is read: {}", families()))
            }
            ModelError::Quantised { place, .. } => Some(quantised::advice(place)),
            ModelError::QuantisedConfig { .. } => Some(
                "correct the key, or use another quantisation of the model: AWQ (`gemm`), GPTQ, FP8 (`e4m3`) and \
                 compressed-tensors are read, and GGUF files"
                    .into(),
            ),
            ModelError::QuantisedTensor { .. } => Some(
                "the file is damaged, or from another quantisation than config.json: take both from one repository \
                 and revision"
                    .into(),
            ),
            ModelError::Adapter { .. } => {
                Some("merge it into the model that it was trained for, and give the merged folder".into())
            }
            ModelError::MissingTensor { place, .. } => Some(match is_gguf(place) {
                true => "the file was made without it: use another conversion of the model".into(),
                false => {
                    "config.json and weights are of two models, or the weights are of a variant that is not \
                          read: take both from one repository and revision"
                        .into()
                }
            }),
            ModelError::UnexpectedTensor { .. } => Some(
                "the model has a part more than its family: use the plain model that it was made from".into(),
            ),
            ModelError::TensorType { .. } => Some(format!(
                "use the same model in another quantisation; weights are read as {}",
                read_types()
            )),
            ModelError::NotAModel { place } if first_gguf(place).is_some() => Some(format!(
                "the folder holds several GGUF models: name one, for example `{}`",
                first_gguf(place).unwrap_or_default()
            )),
            ModelError::NotAModel { .. } => {
                Some("give a `.gguf` file, or a folder as the Hugging Face hub has it".into())
            }
            ModelError::Unsupported { .. } => Some(format!(
                "choose another model; read are {}, with RoPE plain, linear, llama3, yarn or longrope, as \
                 `docs/MODELS.md` lists them",
                families()
            )),
            ModelError::TensorShape { place, .. } if !is_gguf(place) => Some(
                "config.json and weights do not fit: take both from one repository and revision (keys that \
                 config.json leaves out have the defaults of transformers' classes)"
                    .into(),
            ),
            ModelError::Kernel { .. } | ModelError::Shapes { .. } | ModelError::TensorShape { .. } => {
                Some("the model contradicts itself: use another copy or conversion of it".into())
            }
        }
    }
}

/// Families that are read, for hints.
fn families() -> String {
    let names: Vec<String> = FAMILIES
        .iter()
        .map(|spec| match spec.family {
            Family::Llama => "llama (also SmolLM)".to_owned(),
            Family::Qwen2 => "qwen2 (also 2.5)".to_owned(),
            Family::Gemma3 => "gemma3 (text)".to_owned(),
            Family::Phi3 => "phi3 (also 3.5 and 4-mini)".to_owned(),
            _ => spec.name.to_owned(),
        })
        .collect();
    let (last, others) = names.split_last().expect("there are families");
    format!("{} and {last}", others.join(", "))
}

/// A GGUF file of a folder.
fn first_gguf(place: &str) -> Option<String> {
    let mut files: Vec<String> = std::fs::read_dir(place)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .map(|path| path.display().to_string())
        .collect();
    files.sort();
    files.into_iter().next()
}

fn is_gguf(place: &str) -> bool {
    place.ends_with(".gguf")
}

/// Element types of GGUF tensors that weights may have, in the order of their numbers.
fn read_types() -> String {
    let names: Vec<&str> =
        GgmlType::ALL.iter().filter(|t| weight_dtype(**t).is_some()).map(|t| t.name()).collect();
    names.join(", ")
}
