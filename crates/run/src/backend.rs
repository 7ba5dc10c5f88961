//! What differs from device to device beside the operations: loading, naming, what is known of its limits.

use std::path::Path;
use std::sync::Arc;

use draftsmith_bench::kernels::Limits;
use draftsmith_bench::record::DeviceInfo;
use draftsmith_core::report::{Report, Stop};
use draftsmith_cuda::{Asked, Cuda, Expanded, Launcher};
use draftsmith_formats::run::Device;
use draftsmith_kernels::Kernels;
use draftsmith_model::{ModelError, Precision, Target};
use draftsmith_pull::Places;

use crate::Error;
use crate::disk::human;
use crate::host::{Host, cpu_name};
use crate::packs::{self, LoadedFrom, PackCache};
use crate::passes;

/// A model that is to be loaded.
pub struct ToLoad<'a> {
    /// File or folder.
    pub path: &'a Path,
    /// In which arithmetic it is to run.
    pub precision: Precision,
    /// Hash of its weights, where it is known without reading them.
    pub sha256: Option<&'a str>,
    /// Bytes of its weights.
    pub bytes: u64,
    /// Caches.
    pub places: &'a Places,
    /// Where notes go.
    pub report: &'a dyn Report,
    /// Ends what is written beside.
    pub stop: &'a Stop,
}

/// Kernels that targets are loaded on, measured and served with: what differs from device to device beside the operations.
pub trait Backend: Kernels {
    /// The same with another number of threads, where that is a choice.
    fn with_threads(self: &Arc<Self>, threads: usize) -> Arc<Self>;

    /// Threads that it computes with; 1 if the host only drives a device.
    fn threads(&self) -> usize;

    /// Loads a target.
    ///
    /// # Errors
    /// Those of [`Target::load`].
    fn load(self: &Arc<Self>, model: &ToLoad<'_>) -> Result<(Target<Self>, LoadedFrom), ModelError>
    where
        Self: Sized;

    /// What the device is, for records; `None` for the CPU, which they name anyway.
    fn device(&self) -> Option<DeviceInfo>;

    /// Names everything that the times of passes depend on beside target, draft and threads.
    fn cost_key(&self) -> String;

    /// Instruction sets in use; of a device none.
    fn cpu_features(&self) -> Vec<String> {
        Vec::new()
    }

    /// What a pass of a target could take at best; `None` where that is not measured.
    fn limits(_target: &Target<Self>, _precision: Precision) -> Option<Limits>
    where
        Self: Sized,
    {
        None
    }

    /// Bytes of weights that a pass of one row reads, where they are counted.
    fn pass_bytes(_target: &Target<Self>) -> Option<u64>
    where
        Self: Sized,
    {
        None
    }

    /// True if the memory of this process is the memory that models take.
    fn is_host(&self) -> bool {
        false
    }

    /// Bytes of its memory.
    fn memory(&self) -> Option<u64> {
        None
    }

    /// Says so where so much memory is not free; the host's grows as it is used.
    ///
    /// # Errors
    /// What was asked for, and what is there.
    fn room(&self, _bytes: u64) -> Result<(), Error> {
        Ok(())
    }

    /// What is worth knowing of what was loaded since this was last asked.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

impl Backend for Host {
    fn with_threads(self: &Arc<Self>, threads: usize) -> Arc<Self> {
        if threads == Host::threads(self) { Arc::clone(self) } else { Arc::new(Host::new(threads)) }
    }

    fn threads(&self) -> usize {
        Host::threads(self)
    }

    fn load(self: &Arc<Self>, model: &ToLoad<'_>) -> Result<(Target<Self>, LoadedFrom), ModelError> {
        let ToLoad { path, precision, sha256, bytes, places, report, stop } = *model;
        match sha256 {
            Some(sha256) if places.pack_cache => {
                let cache =
                    PackCache { folder: packs::folder(places), smallest: packs::SMALLEST, report, stop };
                cache.load(self, path, precision, (sha256, bytes))
            }
            _ => Target::load(Arc::clone(self), path, precision).map(|target| (target, LoadedFrom::Packing)),
        }
    }

    fn device(&self) -> Option<DeviceInfo> {
        None
    }

    fn cost_key(&self) -> String {
        format!("{} {}", cpu_name(), self.features().path)
    }

    fn cpu_features(&self) -> Vec<String> {
        self.features()
            .offered
            .iter()
            .filter(|(_, here)| *here)
            .map(|(name, _)| (*name).to_string())
            .collect()
    }

    fn limits(target: &Target<Self>, precision: Precision) -> Option<Limits> {
        Some(passes::limits(target, precision))
    }

    fn pass_bytes(target: &Target<Self>) -> Option<u64> {
        Some(target.pass_bytes() as u64)
    }

    fn is_host(&self) -> bool {
        true
    }
}

impl<L: Launcher> Backend for Cuda<L> {
    fn with_threads(self: &Arc<Self>, _: usize) -> Arc<Self> {
        Arc::clone(self)
    }

    fn threads(&self) -> usize {
        1
    }

    fn load(self: &Arc<Self>, model: &ToLoad<'_>) -> Result<(Target<Self>, LoadedFrom), ModelError> {
        // Packed copies are of the CPU's panels; here the file's own blocks are uploaded.
        let target = Target::load(Arc::clone(self), model.path, model.precision)?;
        Ok((target, LoadedFrom::Packing))
    }

    fn device(&self) -> Option<DeviceInfo> {
        let about = self.launcher().about();
        Some(DeviceInfo {
            name: Device::Cuda(u32::try_from(about.number).ok().filter(|number| *number > 0)).to_string(),
            card: about.card,
            capability: about.capability,
            driver: about.driver,
            memory_bytes: about.memory,
            row_exact: <Self as Kernels>::ROW_EXACT,
        })
    }

    fn cost_key(&self) -> String {
        let about = self.launcher().about();
        format!("{} {} CUDA {}", about.card, about.capability, about.driver)
    }

    fn memory(&self) -> Option<u64> {
        Some(self.launcher().about().memory)
    }

    fn room(&self, bytes: u64) -> Result<(), Error> {
        Ok(Cuda::room(self, bytes).map_err(|error| error.failure(Asked::Flag))?)
    }

    fn notes(&self) -> Vec<String> {
        let note = |(name, Expanded { weights, file_bytes, bytes }): (String, Expanded)| {
            format!(
                "{weights} weights of {name} take {} on the card, {} in the file: its kernels do not read that type, the values \
                 are rounded to bf16",
                human(bytes),
                human(file_bytes)
            )
        };
        self.take_expanded().into_iter().map(note).collect()
    }
}
