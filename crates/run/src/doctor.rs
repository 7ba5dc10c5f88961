//! `doctor`: what this machine offers, what is missing, and how to get it.
//!
//! Only looks; changes nothing. What cannot be found out is `None`, never a made-up number.

pub mod draft;
mod folder;
mod keys;
mod probes;
pub mod score;
mod setting;
pub mod texts;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use draftsmith_pull::Places;
use serde::Serialize;

use crate::disk::{free_bytes, human, writable};
use crate::host::{Host, told_cpu_name};
use crate::packs::Copies;

/// Everything `doctor` found.
#[derive(Debug, Serialize)]
pub struct Doctor {
    /// This program.
    pub version: &'static str,
    /// `linux x86_64` and the like.
    pub platform: String,
    /// The processor.
    pub cpu: Cpu,
    /// Main memory.
    pub memory: Memory,
    /// Graphics processors.
    pub gpus: Vec<Gpu>,
    /// What there is of NVIDIA's CUDA. No stage computes on it yet.
    pub cuda: Cuda,
    /// Values of `run.device` that this build can compute on.
    pub devices: Vec<String>,
    /// Folders we write to or read from.
    pub folders: Vec<Folder>,
    /// Packed weights that starts have kept.
    pub packed_copies: Copies,
    /// The user's Python, needed for `pip:` references only.
    pub python: Python,
    /// Variables that change what `pull` does, if set. Tokens are shown as `set`.
    pub variables: Vec<(String, String)>,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
}

/// The processor.
#[derive(Debug, Serialize)]
pub struct Cpu {
    /// Name as the system gives it.
    pub name: Option<String>,
    /// Threads this process may use.
    pub threads: Option<usize>,
    /// Features that our kernels have a fast path for, and whether they are here.
    pub features: Vec<(&'static str, bool)>,
}

/// Main memory, in bytes.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// All of it.
    pub total: Option<u64>,
    /// What can be had without swapping.
    pub available: Option<u64>,
    /// The limit of the control group this process runs in.
    pub limit: Option<u64>,
}

/// A graphics processor.
#[derive(Debug, Serialize)]
pub struct Gpu {
    /// Name, or the device file where no tool names it.
    pub name: String,
    /// Who said so.
    pub seen_by: &'static str,
}

/// NVIDIA's driver, cards and libraries.
#[derive(Debug, Serialize)]
pub struct Cuda {
    /// The CUDA that the driver knows.
    pub driver: Option<String>,
    /// Why there is no driver to speak of.
    pub missing: Option<String>,
    /// Its cards.
    pub cards: Vec<CudaCard>,
    /// Libraries beside the driver, if there is one.
    pub libraries: Vec<CudaLibrary>,
}

/// A card that CUDA shows.
#[derive(Debug, Serialize)]
pub struct CudaCard {
    /// `N` of `cuda:N`.
    pub number: usize,
    /// Name.
    pub name: String,
    /// Compute capability.
    pub capability: String,
    /// Bytes of memory.
    pub memory: u64,
}

/// A library of CUDA's.
#[derive(Debug, Serialize)]
pub struct CudaLibrary {
    /// `cuBLASLt`, `NVRTC` or `NCCL`.
    pub name: &'static str,
    /// What alone needs it, where most do without.
    pub only_for: Option<&'static str>,
    /// Where it is, or the name by which the system finds it.
    pub path: Option<PathBuf>,
    /// What installs it, if it is missing.
    pub install: Option<String>,
}

/// A folder and the room in it.
#[derive(Debug, Serialize)]
pub struct Folder {
    /// What it is for.
    pub purpose: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it exists yet.
    pub exists: bool,
    /// Whether we may write there (or create it).
    pub writable: bool,
    /// Bytes free on its device.
    pub free: Option<u64>,
}

/// The user's Python.
#[derive(Debug, Serialize)]
pub struct Python {
    /// What would be started.
    pub command: PathBuf,
    /// `Python 3.11.7`.
    pub version: Option<String>,
    /// `pip 23.2.1`.
    pub pip: Option<String>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something works less well, or one road is closed.
    Note,
    /// The main job does not work here.
    Problem,
}

/// One thing that is not as it should be.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What is so.
    pub message: String,
    /// How to change it.
    pub hint: String,
}

/// Memory that the smallest real run needs, in bytes: SmolLM2-135M, its draft, and activations.
const MEMORY_MIN: u64 = 2 << 30;
/// Room that the smallest real run needs: the model, the captured states and the checkpoints.
const DISK_MIN: u64 = 4 << 30;

/// Looks at everything.
pub fn examine(places: &Places, folder: &Path, var: impl Fn(&str) -> Option<String>) -> Doctor {
    let mut doctor = Doctor {
        version: env!("CARGO_PKG_VERSION"),
        platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        cpu: Cpu {
            name: told_cpu_name(),
            threads: std::thread::available_parallelism().ok().map(usize::from),
            features: Host::new(1).features().offered,
        },
        memory: memory(),
        gpus: gpus(),
        cuda: cuda(var("DRAFTSMITH_CUDA_LIBS").as_deref(), &places.python),
        devices: crate::device::devices(),
        folders: vec![
            look_at("runs and results (the current folder)", folder),
            look_at("files unpacked from packages", &places.cache),
            look_at("model hub cache", &places.hf_cache),
        ],
        packed_copies: crate::packs::copies(places),
        python: python(places),
        variables: Vec::new(),
        findings: Vec::new(),
    };
    for name in [
        "DRAFTSMITH_CACHE",
        "DRAFTSMITH_PYTHON",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HTTPS_PROXY",
        "DRAFTSMITH_CUDA_LIBS",
        "DRAFTSMITH_CUDA_GRAPHS",
        "DRAFTSMITH_NCCL",
        "CUDA_VISIBLE_DEVICES",
        "DRAFTSMITH_RANKS_PORT",
    ] {
        if let Some(value) = var(name).filter(|v| !v.is_empty()) {
            let secret = name == "HF_TOKEN" || value.contains('@');
            doctor.variables.push((name.to_string(), if secret { "set".to_string() } else { value }));
        }
    }
    doctor.findings = findings(&doctor, places);
    doctor
}

impl Doctor {
    /// True if the main job works here.
    pub fn is_well(&self) -> bool {
        self.findings.iter().all(|f| f.severity != Severity::Problem)
    }
}

fn findings(doctor: &Doctor, places: &Places) -> Vec<Finding> {
    let mut list = Vec::new();
    let mut add = |severity, message: String, hint: &str| {
        list.push(Finding { severity, message, hint: hint.to_string() });
    };
    let has = |name: &str| doctor.cpu.features.iter().any(|(n, on)| *n == name && *on);
    let fast = has("neon") || ["avx2", "fma", "f16c"].iter().all(|name| has(name));
    if !fast {
        add(
            Severity::Note,
            "the processor lacks AVX2, FMA or F16C, and NEON".to_string(),
            "everything works through the portable kernels, several times slower; a processor from 2013 on has them",
        );
    }
    let memory = [doctor.memory.available, doctor.memory.limit].into_iter().flatten().min();
    if let Some(memory) = memory.filter(|m| *m < MEMORY_MIN) {
        add(
            Severity::Problem,
            format!(
                "{} of memory are free, the smallest real run needs {}",
                human(memory),
                human(MEMORY_MIN)
            ),
            "close other programs, or raise the memory limit of the container",
        );
    }
    for folder in &doctor.folders {
        if !folder.writable {
            add(
                Severity::Problem,
                format!("`{}` ({}) cannot be written", folder.path.display(), folder.purpose),
                "change its permissions, or choose another folder (DRAFTSMITH_CACHE, HF_HOME, or `cd`)",
            );
        }
        if let Some(free) = folder.free.filter(|f| *f < DISK_MIN) {
            add(
                Severity::Note,
                format!("{} are free for `{}`", human(free), folder.path.display()),
                "the recipe for SmolLM2-135M wants about 4 GiB; `draftsmith capture --plan` prints what a run needs",
            );
        }
    }
    if doctor.python.version.is_none() {
        add(
            Severity::Note,
            format!("`{}` does not start", doctor.python.command.display()),
            "needed for `pip:` references only (the default target is one): install Python 3 with pip, or set \
             DRAFTSMITH_PYTHON",
        );
    } else if doctor.python.pip.is_none() {
        add(
            Severity::Note,
            format!("`{} -m pip` does not start", doctor.python.command.display()),
            "needed for `pip:` references only (the default target is one): `python3 -m ensurepip`, or your system's \
             package `python3-pip`",
        );
    }
    if places.offline {
        add(
            Severity::Note,
            "the network is switched off by HF_HUB_OFFLINE".to_string(),
            "only what is in the caches can be used; unset it to pull models",
        );
    }
    if !doctor.gpus.is_empty() && !doctor.devices.iter().any(|device| device.starts_with("gpu (")) {
        add(
            Severity::Note,
            format!("a GPU is here ({}), and this build computes on the processor", doctor.gpus[0].name),
            "nothing to do: every stage works without it; `cargo build --release --features gpu` makes a build that \
             is meant for it and never ran on one",
        );
    }
    list
}

/// Bytes of memory that this process may use: the machine's, or less where the system sets a limit; `None` if it does not
/// say.
pub fn memory_bytes() -> Option<u64> {
    let memory = memory();
    memory.total.into_iter().chain(memory.limit).min()
}

fn memory() -> Memory {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let line = info.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    };
    // `max` (no limit) does not parse, which is what we want.
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok())
        .filter(|limit| *limit < 1 << 60);
    Memory { total: field("MemTotal:"), available: field("MemAvailable:"), limit }
}

fn gpus() -> Vec<Gpu> {
    if let Some(text) =
        output(Path::new("nvidia-smi"), &["--query-gpu=name,memory.total", "--format=csv,noheader"])
    {
        let found: Vec<Gpu> = text
            .lines()
            .filter(|l| !l.trim().is_empty())
            .map(|l| Gpu { name: l.trim().to_string(), seen_by: "nvidia-smi" })
            .collect();
        if !found.is_empty() {
            return found;
        }
    }
    let nodes = ["/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128"];
    nodes
        .iter()
        .filter(|node| Path::new(node).exists())
        .map(|node| Gpu { name: (*node).to_string(), seen_by: "device file" })
        .collect()
}

fn cuda(folders: Option<&str>, python: &Path) -> Cuda {
    let report = draftsmith_cuda::Report::of(folders, Some(python));
    let libraries = report.libraries.into_iter().map(|(library, found)| {
        let (path, install) = match found {
            Ok(path) => (Some(path), None),
            Err(error) => (None, Some(error.hint())),
        };
        CudaLibrary { name: library.name(), only_for: library.purpose(), path, install }
    });
    let libraries = libraries.collect();
    match report.driver {
        Err(error) => Cuda { driver: None, missing: Some(error.to_string()), cards: Vec::new(), libraries },
        Ok((version, cards)) => Cuda {
            driver: Some(version.to_string()),
            missing: None,
            cards: cards
                .into_iter()
                .map(|card| CudaCard {
                    number: card.number,
                    name: card.name,
                    capability: format!("{}.{}", card.capability.0, card.capability.1),
                    memory: card.memory,
                })
                .collect(),
            libraries,
        },
    }
}

fn python(places: &Places) -> Python {
    let command = places.python.clone();
    let version = output(&command, &["--version"]).map(|v| v.trim().to_string());
    let pip = output(&command, &["-m", "pip", "--version", "--disable-pip-version-check"])
        .map(|v| v.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
    Python { command, version, pip }
}

fn output(program: &Path, args: &[&str]) -> Option<String> {
    let done = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
}

fn look_at(purpose: &'static str, path: &Path) -> Folder {
    let exists = path.is_dir();
    // The nearest folder that is there: it says whether ours can be made, and how much room it has.
    let there = path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    Folder { purpose, path: path.to_path_buf(), exists, writable: writable(there), free: free_bytes(there) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offline_machine_without_python_is_told_both_and_is_still_well() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().display().to_string();
        let var = |name: &str| match name {
            "HOME" => Some(home.clone()),
            "HF_HUB_OFFLINE" => Some("1".to_string()),
            "DRAFTSMITH_PYTHON" => Some(format!("{home}/no-such-python")),
            "HF_TOKEN" => Some("secret".to_string()),
            _ => None,
        };
        let doctor = examine(&Places::from_vars(var), folder.path(), var);
        let messages: Vec<&str> = doctor.findings.iter().map(|f| f.message.as_str()).collect();
        assert!(messages.iter().any(|m| m.contains("HF_HUB_OFFLINE")), "{messages:?}");
        assert!(messages.iter().any(|m| m.contains("no-such-python")), "{messages:?}");
        let text = serde_json::to_string(&doctor).unwrap();
        assert!(!text.contains("secret"), "the token must not be shown");
    }
}
