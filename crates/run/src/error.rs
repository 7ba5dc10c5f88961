//! One error for all stages: each library's own words, plus what no single library knows.

use std::path::PathBuf;

use draftsmith_pull::{PullError, PushError};

use crate::state::StateError;
use crate::target::TargetTextError;

/// One thing that is wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// What is wrong, with file, line and key.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

fn joined(faults: &[Told]) -> String {
    faults.iter().map(|fault| fault.message.as_str()).collect::<Vec<_>>().join("; ")
}

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
            /// Several things at once, each with its own advice.
            #[error("{}", joined(faults))]
            Several {
                /// What is wrong, in the order in which it was found.
                faults: Vec<Told>,
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
                let own = match self {
                    $(Error::$variant(error) => error.hint(),)*
                    Error::Interrupted { resume, .. } => {
                        resume.as_ref().map(|command| format!("`{command}` goes on where this stopped"))
                    }
                    Error::Input { hint, .. } => hint.clone(),
                    Error::Several { faults } => {
                        let mut hints: Vec<&str> = Vec::new();
                        for hint in faults.iter().filter_map(|fault| fault.hint.as_deref()) {
                            if !hints.contains(&hint) {
                                hints.push(hint);
                            }
                        }
                        (!hints.is_empty()).then(|| hints.join("; "))
                    }
                };
                own.or_else(|| self.general_hint().map(str::to_string))
            }
        }
    };
}

impl Error {
    /// What to do where the library that failed has no better words.
    fn general_hint(&self) -> Option<&'static str> {
        Some(match self {
            Error::RunFile(draftsmith_formats::run::RunError::Read { .. }) => {
                "give the path of a run file; `recipes/smoke.toml` is one to begin with"
            }
            Error::RunFile(_) => {
                "correct the line that the message names; docs/RUN_FILE.md lists every key with its type and default"
            }
            Error::Pull(_) => {
                "check how the reference is written: `hf:ORG/NAME:FILE`, `pip:NAME==VERSION:PATH` or a path"
            }
            Error::Push(_) => "check the reference of the repository: `hf:ORG/NAME` or `hf:ORG/NAME@BRANCH`",
            Error::TargetText(_) | Error::Text(_) => {
                "get tokenizer and chat template of the model again, or give a template with `data.template`"
            }
            Error::Model(_) | Error::Gguf(_) | Error::Safetensors(_) => {
                "get the model's files again, all from one revision, or name another model"
            }
            Error::Draft(_) | Error::Bundle(_) => {
                "make the bundle again (`draftsmith run`), get it again, or name another one"
            }
            Error::Decode(_) => "use the draft with the target that it was trained for",
            Error::Data(_) => "correct the rows that the message names, or leave that file out",
            Error::Bench(_) => "correct the workload or the record that the message names, or measure again",
            Error::Tokens(_) | Error::Cache(_) => {
                "move the folder of the stage that the message names away: the next `draftsmith run` makes it again"
            }
            Error::Capture(_) | Error::Regenerate(_) => {
                "look at the target or the server that the message names; the same command goes on where this stopped"
            }
            Error::Train(_) => "run the same command again: training goes on from its last checkpoint",
            Error::State(_) | Error::Disk(_) => {
                "check that the path is right, and that it can be read and written"
            }
            Error::Interrupted { .. } | Error::Input { .. } | Error::Several { .. } => return None,
        })
    }
}

errors! {
    /// A model reference gave nothing.
    Pull(PullError),
    /// A bundle was not put on a hub.
    Push(PushError),
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
    /// Rendering and tokenising.
    Text(draftsmith_text::TextError),
}

impl From<draftsmith_cuda::CudaError> for Error {
    fn from(error: draftsmith_cuda::CudaError) -> Error {
        draftsmith_kernels::DeviceFailure::from(error).into()
    }
}

impl From<draftsmith_kernels::DeviceFailure> for Error {
    fn from(failure: draftsmith_kernels::DeviceFailure) -> Error {
        Error::Input { message: failure.message, hint: Some(failure.hint) }
    }
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

    /// Everything that it tells, one by one.
    pub fn told(&self) -> Vec<Told> {
        match self {
            Error::Several { faults } => faults.clone(),
            one => vec![Told { message: one.to_string(), hint: one.hint() }],
        }
    }

    /// The error that tells all of these; `None` of nothing.
    pub(crate) fn of_all(mut faults: Vec<Told>) -> Option<Error> {
        match faults.len() {
            0 => None,
            1 => faults.pop().map(|Told { message, hint }| Error::Input { message, hint }),
            _ => Some(Error::Several { faults }),
        }
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
            Error::Push(error) => error.is_interrupt(),
            _ => false,
        }
    }
}
