//! One error for all stages: each library's own words, plus what only the front knows.

use std::path::PathBuf;

use crate::pull::PullError;
use crate::run::state::StateError;
use crate::target::TargetTextError;

/// Declares the enum, its conversions and its hints in one table.
macro_rules! errors {
    ($($(#[doc = $doc:literal])* $variant:ident($error:ty),)*) => {
        /// What a stage or a verb ends with.
        #[derive(Debug, thiserror::Error)]
        pub enum Error {
            $($(#[doc = $doc])* #[error(transparent)] $variant(#[from] $error),)*
            /// The user pressed Ctrl-C; what is on disk is whole.
            #[error("interrupted during `{what}`")]
            Interrupted {
                /// The stage or verb.
                what: String,
                /// The command that goes on.
                resume: Option<String>,
            },
            /// A rule between inputs that no single library sees.
            #[error("{message}")]
            Input {
                /// What is wrong, with the key or file.
                message: String,
                /// What to do about it.
                hint: Option<String>,
            },
        }

        impl Error {
            /// What the user can do about it.
            pub fn hint(&self) -> Option<String> {
                if let Error::RunFile(error) = self
                    && error.hint().is_none()
                {
                    return Some("docs/RUN_FILE.md lists every key with its type and default".to_string());
                }
                match self {
                    $(Error::$variant(error) => error.hint(),)*
                    Error::Interrupted { resume, .. } => {
                        resume.as_ref().map(|command| format!("`{command}` goes on where this stopped"))
                    }
                    Error::Input { hint, .. } => hint.clone(),
                }
            }
        }
    };
}

errors! {
    /// A model reference gave nothing.
    Pull(PullError),
    /// Tokenizer or chat template.
    TargetText(TargetTextError),
    /// The run file.
    RunFile(draftsmith_formats::run::RunError),
    /// The folder of the run.
    State(StateError),
    /// The disk.
    Disk(draftsmith_formats::atomic::AtomicError),
    /// Weights and networks.
    Model(draftsmith_model::ModelError),
    /// A draft's weights.
    Draft(draftsmith_model::DraftError),
    /// Prompts and drafts that do not fit.
    Decode(draftsmith_decode::DecodeError),
    /// Rows of conversations.
    Data(draftsmith_data::DataError),
    /// Workloads and measurements.
    Bench(draftsmith_bench::BenchError),
    /// Safetensors files.
    Safetensors(draftsmith_formats::safetensors_dir::SafetensorsError),
    /// GGUF files.
    Gguf(draftsmith_formats::gguf::GgufError),
    /// Bundles.
    Bundle(draftsmith_bundle::BundleError),
    /// The token file.
    Tokens(draftsmith_formats::tokens::TokensError),
    /// The target cache.
    Cache(draftsmith_formats::cache::CacheError),
    /// Hidden states of the target.
    Capture(draftsmith_capture::CaptureError),
    /// Answers by the target.
    Regenerate(draftsmith_capture::RegenerateError),
    /// Training.
    Train(draftsmith_train::TrainError),
    /// Listening.
    Serve(draftsmith_serve::ServeError),
    /// Rendering and tokenising.
    Text(draftsmith_text::TextError),
}

#[cfg(feature = "gpu-flex")]
impl From<draftsmith_gpu::DeviceError> for Error {
    fn from(error: draftsmith_gpu::DeviceError) -> Error {
        Error::Input { message: error.to_string(), hint: error.hint() }
    }
}

impl From<draftsmith_formats::gguf::ContentError> for Error {
    fn from(error: draftsmith_formats::gguf::ContentError) -> Error {
        match error {
            draftsmith_formats::gguf::ContentError::Gguf(error) => error.into(),
            draftsmith_formats::gguf::ContentError::Read(error) => error.into(),
        }
    }
}

impl Error {
    /// A rule between inputs that no single library sees.
    pub fn input(message: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Input { message: message.into(), hint: Some(hint.into()) }
    }

    /// A file that cannot be read.
    pub fn unreadable(path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        draftsmith_formats::atomic::AtomicError::from_io("read", &path.into(), source).into()
    }

    /// True if the user asked for it.
    pub fn is_interrupt(&self) -> bool {
        match self {
            Error::Interrupted { .. } => true,
            Error::Pull(error) => error.is_interrupt(),
            _ => false,
        }
    }
}
