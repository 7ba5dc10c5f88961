//! Which implementation of the operations the heavy stages run on.

use std::path::Path;

use draftsmith_core::report::Report;
use draftsmith_cuda::{Card, Cuda, CudaOptions, Search};
use draftsmith_formats::run::{Device, RunTable};
#[cfg(feature = "gpu-flex")]
use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};

use crate::Error;

/// What a device is looked for with.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    /// Looks up an environment variable.
    pub variable: fn(&str) -> Option<String>,
    /// The Python whose packages bring NVIDIA's libraries.
    pub python: &'a Path,
    /// Where notes go.
    pub report: &'a dyn Report,
}

/// The device of a run, open.
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
            Device::Cuda(number) => Compute::cuda(number, around),
            device => Compute::other(device, run),
        }
    }

    fn cuda(number: u32, around: Around<'_>) -> Result<Compute, Error> {
        #[cfg(feature = "cuda-shim")]
        if let Some(folder) = (around.variable)("DRAFTSMITH_CUDA_SHIM") {
            let shim = draftsmith_cuda::shim::Shim::new(std::path::Path::new(&folder))?;
            return Ok(Compute::Shim(Cuda::new(shim, CudaOptions::default())));
        }
        let folders = (around.variable)("DRAFTSMITH_CUDA_LIBS");
        let card = Card::open(&Search::new(folders.as_deref(), Some(around.python)), number as usize)?;
        around.report.note(
            "run.device: the kernels for NVIDIA GPUs are tested on the host alone and were never timed on a card; \
             hold a small run against `run.device=cpu` first",
        );
        Ok(Compute::Cuda(Cuda::new(card, CudaOptions::default())))
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
