//! What loading a model can refuse.

use draftsmith_formats::gguf::GgufError;
use draftsmith_formats::hf_config::HfConfigError;
use draftsmith_formats::safetensors_dir::SafetensorsError;
use draftsmith_kernels::KernelError;

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
                Some("built are llama (also SmolLM), qwen2, qwen3 and gemma3 (text)".into())
            }
            ModelError::MissingTensor { .. } | ModelError::UnexpectedTensor { .. } => {
                Some("the file is incomplete or of another architecture; fetch it again".into())
            }
            ModelError::TensorType { .. } => Some(
                "weights are F32, F16, BF16 or a quantised GGUF type, never integers; fetch or convert the model again"
                    .into(),
            ),
            ModelError::NotAModel { .. } => {
                Some("give a `.gguf` file, or a folder as the Hugging Face hub has it".into())
            }
            ModelError::Kernel { .. }
            | ModelError::Unsupported { .. }
            | ModelError::Shapes { .. }
            | ModelError::TensorShape { .. } => None,
        }
    }
}
