//! Which device to run on.

use burn_tensor::Device;

use crate::storage::Storage;

/// A device that this build can use.
#[derive(Clone, Debug, PartialEq)]
pub struct Accelerator(pub(crate) Device);

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No GPU that this build can use.
    #[error("no GPU was found")]
    None,
}

impl DeviceError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let built =
            if cfg!(feature = "wgpu") { "check the GPU's driver" } else { "this build knows no kind of GPU" };
        Some(format!("{built}, or compute on the CPU"))
    }
}

impl Accelerator {
    /// burn's CPU backend: slower than the CPU implementation, the same code as on a GPU.
    pub fn flex() -> Accelerator {
        Accelerator(Device::flex())
    }

    /// The GPUs of this machine that this build can use.
    pub fn gpus() -> Vec<Accelerator> {
        #[cfg(feature = "wgpu")]
        return Device::enumerate(burn_tensor::DeviceType::Wgpu).into_iter().map(Accelerator).collect();
        #[cfg(not(feature = "wgpu"))]
        Vec::new()
    }

    /// A graphics driver that computes on the processor, for tests: it is none of [`Accelerator::gpus`].
    #[cfg(feature = "wgpu")]
    pub fn software() -> Accelerator {
        Accelerator(Device::wgpu(burn_tensor::DeviceKind::Cpu))
    }

    /// Whether values can be stored so on it.
    pub fn stores(&self, storage: Storage) -> bool {
        self.0.supports_dtype(storage.dtype())
    }

    /// The first GPU.
    ///
    /// # Errors
    /// [`DeviceError::None`]
    pub fn gpu() -> Result<Accelerator, DeviceError> {
        Accelerator::gpus().into_iter().next().ok_or(DeviceError::None)
    }

    /// As burn names it.
    pub fn name(&self) -> String {
        format!("{:?}", self.0)
    }
}
