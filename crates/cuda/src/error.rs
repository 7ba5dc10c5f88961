//! What can be wrong with a GPU, and what to do about it.

use std::fmt;
use std::path::PathBuf;

use draftsmith_kernels::DeviceFailure;

use crate::library::{CudaVersion, Library};

/// Widest heads that the kernels take.
pub(crate) const MOST_HEAD_DIM: usize = 256;

/// Bytes, as a person reads them.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1u64 << 20) as f64;
        match self.0 as f64 / MIB {
            mib if mib >= 1024.0 => write!(f, "{:.1} GiB", mib / 1024.0),
            mib if mib >= 1.0 => write!(f, "{mib:.1} MiB"),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

/// Why a GPU cannot be used, or what it refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The driver's library cannot be loaded.
    #[error("no NVIDIA driver was found: {reason}")]
    NoDriver {
        /// What the system says.
        reason: String,
    },
    /// The driver is there and does not start.
    #[error("the NVIDIA driver does not start: {reason}")]
    DriverFails {
        /// What it says.
        reason: String,
    },
    /// The driver knows a CUDA that is too old.
    #[error("the NVIDIA driver knows CUDA {found}, CUDA {needed} is needed")]
    OldDriver {
        /// What it knows.
        found: CudaVersion,
        /// What is needed.
        needed: CudaVersion,
    },
    /// A library was found nowhere.
    #[error("`{}` was not found{}", library.file(), looked_in(searched))]
    MissingLibrary {
        /// Which.
        library: Library,
        /// Folders that were searched, beside those of the system.
        searched: Vec<PathBuf>,
        /// What the driver knows: the package must not be newer.
        driver: CudaVersion,
    },
    /// A library lacks a function.
    #[error("`{path}` has no function `{symbol}`")]
    MissingFunction {
        /// The library.
        path: String,
        /// The function.
        symbol: &'static str,
    },
    /// No device has this number.
    #[error("there is no device `cuda:{asked}`: {}", counted(*found))]
    NoSuchDevice {
        /// The number asked for.
        asked: usize,
        /// Devices that the driver shows.
        found: usize,
    },
    /// The card is older than the kernels.
    #[error("`{name}` has compute capability {}.{}, 8.0 is needed", found.0, found.1)]
    OldCard {
        /// The card.
        name: String,
        /// Its capability.
        found: (u32, u32),
    },
    /// Memory ran out.
    #[error(
        "{} of memory were asked for on the GPU, {} of {} are free",
        Bytes(*wanted),
        Bytes(*free),
        Bytes(*total)
    )]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
        /// Bytes of the card.
        total: u64,
    },
    /// The card does not answer any more: a kernel broke off, memory has an error, or somebody took the card away.
    #[error("the GPU stopped during {call}: {reason}")]
    Lost {
        /// The function that heard of it; what failed may lie before it.
        call: &'static str,
        /// What the driver says.
        reason: String,
    },
    /// A call of a library failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// Messages between cards failed.
    #[error("{call} failed: {reason}")]
    Nccl {
        /// The function.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// Launches cannot start as one graph.
    #[error("{call} failed: {reason}")]
    Graph {
        /// The function.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// Heads wider than the kernels take.
    #[error("heads of {found} values, the kernels for NVIDIA GPUs take {MOST_HEAD_DIM} at most")]
    WideHeads {
        /// Values of a head.
        found: usize,
    },
    /// The kernels do not compile.
    #[error("the kernels do not compile for compute capability {arch}: {log}")]
    Compile {
        /// `80` for 8.0.
        arch: u32,
        /// What the compiler says.
        log: String,
    },
}

fn looked_in(folders: &[PathBuf]) -> String {
    if folders.is_empty() {
        return " among the system's libraries".to_owned();
    }
    let names: Vec<String> = folders.iter().map(|f| format!("`{}`", f.display())).collect();
    format!(" among the system's libraries and in {}", names.join(", "))
}

fn counted(found: usize) -> String {
    match found {
        0 => "the driver shows none".to_owned(),
        1 => "the driver shows one, `cuda:0`".to_owned(),
        n => format!("the driver shows {n}, `cuda:0` to `cuda:{}`", n - 1),
    }
}

/// Where a device is asked for: what is advised is said in these words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    /// `run.device` of a run file.
    #[default]
    RunFile,
    /// `--device` of a command that decodes.
    Flag,
}

impl Asked {
    /// How to do without a card.
    fn cpu(self) -> &'static str {
        match self {
            Asked::RunFile => "set `run.device=cpu`",
            Asked::Flag => "leave `--device` out: the CPU decodes",
        }
    }

    /// What names the number of a card.
    fn name(self) -> &'static str {
        match self {
            Asked::RunFile => "set `run.device`",
            Asked::Flag => "set `--device`",
        }
    }

    /// What takes less memory.
    fn less(self) -> &'static str {
        match self {
            Asked::RunFile => {
                "answer fewer prompts at once (`regenerate.batch_size`), pack fewer tokens (`train.pack_length`), unroll fewer \
                 steps (`train.eagle3.ttt_length`), end other programs on the card, or take a larger one"
            }
            Asked::Flag => {
                "keep less of the text (`serve --kv-budget`, `--max-running`), decode fewer sequences at once, name a smaller \
                 target or a file of fewer bits, end other programs on the card, or take a larger one"
            }
        }
    }
}

impl CudaError {
    /// What the user of a run file can do about it.
    pub fn hint(&self) -> String {
        self.hint_for(Asked::RunFile)
    }

    /// What the user can do about it.
    pub fn hint_for(&self, asked: Asked) -> String {
        let cpu = asked.cpu();
        match self {
            CudaError::NoDriver { .. } => {
                format!("install NVIDIA's driver (in a container: start it with `--gpus all`), or {cpu}")
            }
            CudaError::DriverFails { .. } => format!(
                "see whether `nvidia-smi` works: the driver's module and library must be of one version and the card \
                 must be visible; or {cpu}"
            ),
            CudaError::OldDriver { needed, .. } => {
                format!("update NVIDIA's driver to one that knows CUDA {needed}, or {cpu}")
            }
            CudaError::MissingLibrary { library, driver, .. } => format!(
                "`pip install {}`, or name the folder that has it in DRAFTSMITH_CUDA_LIBS",
                library.package(*driver)
            ),
            CudaError::MissingFunction { .. } => {
                "the library is too old or another one of that name: update it, or name the folder of the right one in \
                 DRAFTSMITH_CUDA_LIBS"
                    .into()
            }
            CudaError::NoSuchDevice { found: 0, .. } => {
                format!("see whether CUDA_VISIBLE_DEVICES hides the card, or {cpu}")
            }
            CudaError::NoSuchDevice { .. } => format!(
                "{} to a number that is there; CUDA_VISIBLE_DEVICES hides cards and counts anew",
                asked.name()
            ),
            CudaError::OldCard { .. } => {
                format!("use a card from Ampere (A100, RTX 30) on, or {cpu}")
            }
            CudaError::Memory { .. } => asked.less().into(),
            CudaError::Lost { .. } => {
                let saved = match asked {
                    Asked::RunFile => "the same command goes on from what was saved last",
                    Asked::Flag => "then start the command again",
                };
                format!("look for Xid and ECC errors in the driver's log (`dmesg`, `nvidia-smi -q`); {saved}")
            }
            CudaError::Call { .. } => {
                format!("see `draftsmith doctor` and the driver's log (`dmesg`), or {cpu}")
            }
            CudaError::Nccl { .. } => {
                "start again with NCCL_DEBUG=INFO to see more of it, or with DRAFTSMITH_NCCL=off on any rank: gradients then go \
                 through host memory (docs/RANKS.md)"
                    .into()
            }
            CudaError::Graph { .. } => {
                "start again with DRAFTSMITH_CUDA_GRAPHS=off: each kernel is then started by itself, and nothing that is computed \
                 changes; and report it"
                    .into()
            }
            CudaError::WideHeads { .. } => cpu.into(),
            CudaError::Compile { .. } => "this is a fault of draftsmith: report it with the text above".into(),
        }
    }
}

impl CudaError {
    /// The same as a failure of a device.
    pub fn failure(&self, asked: Asked) -> DeviceFailure {
        DeviceFailure { message: self.to_string(), hint: self.hint_for(asked) }
    }
}

impl From<CudaError> for DeviceFailure {
    fn from(error: CudaError) -> DeviceFailure {
        error.failure(Asked::RunFile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_advised_names_what_asked_for_the_card() {
        let errors = [
            CudaError::NoDriver { reason: String::new() },
            CudaError::DriverFails { reason: String::new() },
            CudaError::OldDriver { found: CudaVersion(11040), needed: CudaVersion(12000) },
            CudaError::NoSuchDevice { asked: 1, found: 0 },
            CudaError::NoSuchDevice { asked: 1, found: 1 },
            CudaError::OldCard { name: String::new(), found: (7, 0) },
            CudaError::Memory { wanted: 2, free: 1, total: 1 },
            CudaError::Lost { call: "cuLaunchKernel", reason: String::new() },
            CudaError::Call { call: "cuLaunchKernel", reason: String::new() },
            CudaError::WideHeads { found: 512 },
        ];
        for error in errors {
            let (run, flag) = (error.hint(), error.hint_for(Asked::Flag));
            assert!(run.contains("run.") || run.contains("saved") || run.contains("train."), "{run}");
            for word in ["run.", "train.", "regenerate."] {
                assert!(!flag.contains(word), "{error}: {flag}");
            }
        }
    }

    #[test]
    fn messages_name_numbers_and_hints_name_what_to_do() {
        let old = CudaError::OldDriver { found: CudaVersion(11040), needed: CudaVersion(12000) };
        assert_eq!(old.to_string(), "the NVIDIA driver knows CUDA 11.4, CUDA 12.0 is needed");
        let memory = CudaError::Memory { wanted: 90 << 30, free: (79 << 30) + (1 << 29), total: 80 << 30 };
        assert_eq!(
            memory.to_string(),
            "90.0 GiB of memory were asked for on the GPU, 79.5 GiB of 80.0 GiB are free"
        );
        let none = CudaError::NoSuchDevice { asked: 3, found: 2 };
        assert_eq!(none.to_string(), "there is no device `cuda:3`: the driver shows 2, `cuda:0` to `cuda:1`");
        let missing = |driver| CudaError::MissingLibrary {
            library: Library::CublasLt,
            searched: vec!["/a".into()],
            driver: CudaVersion(driver),
        };
        assert_eq!(
            missing(12080).to_string(),
            "`libcublasLt.so` was not found among the system's libraries and in `/a`"
        );
        assert!(
            missing(12080).hint().starts_with("`pip install nvidia-cublas-cu12`"),
            "{}",
            missing(12080).hint()
        );
        assert!(
            missing(13000).hint().starts_with("`pip install \"nvidia-cublas<14\"`"),
            "{}",
            missing(13000).hint()
        );
        let nccl = |driver| CudaError::MissingLibrary {
            library: Library::Nccl,
            searched: Vec::new(),
            driver: CudaVersion(driver),
        };
        assert_eq!(nccl(12080).to_string(), "`libnccl.so.2` was not found among the system's libraries");
        for (driver, package) in [(12080, "nvidia-nccl-cu12"), (13000, "nvidia-nccl-cu13")] {
            let hint = nccl(driver).hint();
            assert!(hint.starts_with(&format!("`pip install {package}`")), "{hint}");
        }
    }
}
