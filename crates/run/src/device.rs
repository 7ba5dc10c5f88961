//! Which implementation of the operations is computed on: chosen here, and nowhere else above the engine.
//!
//! Stages ask for the device of a run file ([`Compute::open`]); what decodes asks for that of `--device`
//! ([`Compute::for_decoding`]) and is handed its kernels as a type ([`Compute::work`]), so loading, measuring and serving are
//! written once over [`Backend`].

use std::path::Path;
use std::sync::Arc;

use draftsmith_core::report::Report;
use draftsmith_cuda::{Asked, Card, Cuda, CudaError, CudaOptions, Graphs, Search};
use draftsmith_formats::run::{Device, RunTable};
#[cfg(feature = "gpu-flex")]
use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};
use draftsmith_kernels::{Kernels, catch_failure};

use crate::Error;
pub use crate::backend::{Backend, ToLoad};
pub use crate::host::Host;
use crate::ranks::local_rank;

/// `off`: kernels of NVIDIA GPUs are started one by one, not as CUDA graphs.
const GRAPHS: &str = "DRAFTSMITH_CUDA_GRAPHS";

/// Something that is done on a device, whatever its kernels are.
pub trait Work {
    /// What comes of it.
    type Done;
    /// Does it.
    fn on<K: Backend>(self, kernels: Arc<K>) -> Self::Done;
}

/// What a device is looked for with.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    /// Looks up an environment variable.
    pub variable: fn(&str) -> Option<String>,
    /// The Python whose packages bring NVIDIA's libraries.
    pub python: &'a Path,
    /// Where notes go.
    pub report: &'a dyn Report,
}

impl Around<'_> {
    /// Where NVIDIA's libraries are looked for.
    pub(crate) fn search(&self) -> Search {
        let folders = (self.variable)("DRAFTSMITH_CUDA_LIBS");
        Search::new(folders.as_deref(), Some(self.python))
    }
}

/// A device, open.
#[derive(Clone)]
pub enum Compute {
    /// The CPU, with the kernels of the loaded target.
    Cpu,
    /// Another device, through burn.
    #[cfg(feature = "gpu-flex")]
    Gpu(Gpu),
    /// An NVIDIA GPU behind its driver.
    Cuda(Cuda<Card>),
    /// Its kernels on the host: for tests.
    #[cfg(feature = "cuda-shim")]
    Shim(Cuda<draftsmith_cuda::shim::Shim>),
}

impl Compute {
    /// Opens the device that a run file names.
    ///
    /// # Errors
    /// A device that this build or this machine does not have.
    pub(crate) fn open(run: &RunTable, around: Around<'_>) -> Result<Compute, Error> {
        match run.device.unwrap_or_default() {
            Device::Cpu if run.gpu_dtype.is_some() => Err(Error::input(
                "`run.gpu_dtype` is set, but `run.device` is `cpu`",
                "set `run.device=gpu`, or leave `run.gpu_dtype` out",
            )),
            Device::Cpu => Ok(Compute::Cpu),
            Device::Cuda(_) if run.gpu_dtype.is_some() => Err(Error::input(
                "`run.gpu_dtype` is set, but `run.device` is `cuda`, where products are bf16 and all else is f32",
                "leave `run.gpu_dtype` out",
            )),
            Device::Cuda(number) => Compute::cuda(number, Asked::RunFile, around),
            device => Compute::other(device, run),
        }
    }

    /// Whether its rows have the same bits whatever they are computed beside: [`Kernels::ROW_EXACT`].
    pub(crate) fn row_exact(&self) -> bool {
        match self {
            Compute::Cpu => Host::ROW_EXACT,
            #[cfg(feature = "gpu-flex")]
            Compute::Gpu(_) => Gpu::ROW_EXACT,
            Compute::Cuda(_) => Cuda::<Card>::ROW_EXACT,
            #[cfg(feature = "cuda-shim")]
            Compute::Shim(_) => Cuda::<draftsmith_cuda::shim::Shim>::ROW_EXACT,
        }
    }

    /// Opens the device of `--device`, to decode on.
    ///
    /// # Errors
    /// A device that this machine does not have, or that does not decode with a draft.
    pub fn for_decoding(device: Device, around: Around<'_>) -> Result<Compute, Error> {
        match device {
            Device::Cpu => Ok(Compute::Cpu),
            Device::Cuda(number) => Compute::cuda(number, Asked::Flag, around),
            Device::Gpu | Device::GpuFlex => Err(Error::input(
                format!(
                    "`--device {device}` answers, captures and trains (`run.device`): its products are not the same bits for one \
                     row and for several, so it verifies no draft"
                ),
                "give `--device cuda` on a machine with an NVIDIA card, or leave `--device` out",
            )),
        }
    }

    /// Does work on the device; on the CPU with so many threads.
    ///
    /// # Errors
    /// What the device failed with in the middle of it.
    pub fn work<W: Work>(&self, threads: usize, work: W) -> Result<W::Done, Error> {
        Ok(catch_failure(|| match self {
            Compute::Cpu => work.on(Arc::new(Host::new(threads))),
            #[cfg(feature = "gpu-flex")]
            Compute::Gpu(_) => unreachable!("`for_decoding` gives none"),
            Compute::Cuda(cuda) => work.on(Arc::new(cuda.clone())),
            #[cfg(feature = "cuda-shim")]
            Compute::Shim(shim) => work.on(Arc::new(shim.clone())),
        })?)
    }

    fn cuda(number: Option<u32>, asked: Asked, around: Around<'_>) -> Result<Compute, Error> {
        let graphs = graphs((around.variable)(GRAPHS))?;
        let options = CudaOptions { asked, graphs, ..CudaOptions::default() };
        #[cfg(feature = "cuda-shim")]
        if let Some(folder) = (around.variable)("DRAFTSMITH_CUDA_SHIM") {
            use draftsmith_cuda::shim::Shim;
            let limit = (around.variable)("DRAFTSMITH_CUDA_SHIM_BYTES").and_then(|bytes| bytes.parse().ok());
            let shim = match limit {
                None => Shim::new(Path::new(&folder)),
                Some(bytes) => Shim::of(Path::new(&folder), &draftsmith_cuda::source::text(), bytes),
            };
            return Ok(Compute::Shim(Cuda::new(shim?, options)));
        }
        let search = around.search();
        let card = card(number, local_rank(around.variable), |number| Card::open(&search, number))
            .map_err(|error| error.failure(asked))?;
        let (key, cpu) = match asked {
            Asked::RunFile => ("run.device", "run.device=cpu"),
            Asked::Flag => ("--device", "--device cpu"),
        };
        around.report.note(&format!(
            "{key}: the kernels for NVIDIA GPUs are tested on the host alone and were never timed on a card; hold a small run \
             against `{cpu}` first",
        ));
        Ok(Compute::Cuda(Cuda::new(card, options)))
    }

    #[cfg(feature = "gpu-flex")]
    fn other(device: Device, run: &RunTable) -> Result<Compute, Error> {
        use draftsmith_formats::run::GpuDtype;
        let accelerator = match device {
            Device::Gpu => Accelerator::gpu()?,
            Device::Cpu | Device::GpuFlex | Device::Cuda(_) => Accelerator::flex(),
        };
        let storage = match run.gpu_dtype.unwrap_or_default() {
            GpuDtype::F32 => Storage::F32,
            GpuDtype::Bf16 => Storage::Bf16,
        };
        if !accelerator.stores(storage) {
            return Err(Error::input(
                "`run.gpu_dtype` is `bf16`, which the shaders for this GPU do not know",
                "leave `run.gpu_dtype` out",
            ));
        }
        Ok(Compute::Gpu(Gpu::new(accelerator, GpuOptions { storage })))
    }

    #[cfg(not(feature = "gpu-flex"))]
    fn other(_: Device, _: &RunTable) -> Result<Compute, Error> {
        Err(Error::input(
            "`run.device` asks for a GPU, but this build has no GPU support",
            "build with `cargo build --release --features gpu`, or set `run.device=cpu`",
        ))
    }
}

/// What the variable asks for.
fn graphs(value: Option<String>) -> Result<Graphs, Error> {
    let off = is_off(GRAPHS, value, "to start each kernel by itself")?;
    Ok(if off { Graphs::Off } else { Graphs::On })
}

/// Whether a variable that switches something off is `off`; `meaning` is what that does.
///
/// # Errors
/// Any other value.
pub(crate) fn is_off(name: &str, value: Option<String>, meaning: &str) -> Result<bool, Error> {
    match value.as_deref() {
        None | Some("") => Ok(false),
        Some("off") => Ok(true),
        Some(other) => Err(Error::input(
            format!("`{name}` is `{other}`"),
            format!("set it to `off` {meaning}, or leave it out"),
        )),
    }
}

/// Opens the card of a number; where none is given, the one of this process among those on its machine. A launcher may show each
/// process one card alone, whatever its place.
fn card<C>(
    number: Option<u32>,
    local_rank: Option<u32>,
    open: impl Fn(usize) -> Result<C, CudaError>,
) -> Result<C, CudaError> {
    match (open(number.or(local_rank).unwrap_or(0) as usize), number) {
        (Err(CudaError::NoSuchDevice { found: 1, .. }), None) => open(0),
        (opened, _) => opened,
    }
}

/// Values of `run.device` that this build can compute on, GPUs with the name that burn gives them.
pub fn devices() -> Vec<String> {
    let cpu = std::iter::once("cpu".to_string());
    #[cfg(feature = "gpu-flex")]
    return cpu
        .chain(Accelerator::gpus().into_iter().map(|gpu| format!("gpu ({})", gpu.name())))
        .chain(std::iter::once("gpu:flex".to_string()))
        .collect();
    #[cfg(not(feature = "gpu-flex"))]
    cpu.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_of_a_machine_takes_another_card_unless_a_number_is_given() {
        let opened = |number, local, found: usize| {
            card(number, local, |asked| match asked < found {
                true => Ok(asked),
                false => Err(CudaError::NoSuchDevice { asked, found }),
            })
        };
        assert_eq!(opened(None, None, 4), Ok(0));
        assert_eq!(opened(None, Some(3), 4), Ok(3));
        assert_eq!(opened(Some(1), Some(3), 4), Ok(1));
        // One card is all that a process may see; with two of them somebody has started too many.
        assert_eq!(opened(None, Some(3), 1), Ok(0));
        assert_eq!(opened(None, Some(3), 2), Err(CudaError::NoSuchDevice { asked: 3, found: 2 }));
        assert_eq!(opened(Some(3), None, 1), Err(CudaError::NoSuchDevice { asked: 3, found: 1 }));
        assert_eq!(opened(None, None, 0), Err(CudaError::NoSuchDevice { asked: 0, found: 0 }));
    }
    #[test]
    fn graphs_are_on_unless_they_are_not_wanted() {
        assert_eq!(graphs(None).unwrap(), Graphs::On);
        assert_eq!(graphs(Some(String::new())).unwrap(), Graphs::On);
        assert_eq!(graphs(Some("off".into())).unwrap(), Graphs::Off);
        assert_eq!(graphs(Some("0".into())).unwrap_err().to_string(), "`DRAFTSMITH_CUDA_GRAPHS` is `0`");
    }
}
