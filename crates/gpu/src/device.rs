//! Which device to run on.

use burn_tensor::Device;

/// A device by name: `flex`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// burn's CPU backend: slower than the CPU implementation, the same code as on a GPU.
    Flex,
    /// An NVIDIA GPU by its number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No GPU that this build can use.
    #[error("no GPU was found")]
    None,
    /// A device that does not exist.
    #[error("there is no device `cuda:{wanted}`; `{found}` are there")]
    Missing {
        /// Number asked for.
        wanted: usize,
        /// Devices found.
        found: usize,
    },
}

impl DeviceError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            DeviceError::None if cfg!(feature = "cuda") => {
                Some("check that `nvidia-smi` lists the GPU, or compute on the CPU: `--device cpu`".into())
            }
            DeviceError::None => {
                Some("this build knows no kind of GPU; compute on the CPU: `--device cpu`".into())
            }
            DeviceError::Missing { found, .. } => {
                Some(format!("devices count from 0: the last one is `cuda:{}`", found.saturating_sub(1)))
            }
        }
    }
}

impl Accelerator {
    /// The GPUs of this machine that this build can use.
    pub fn gpus() -> Vec<Accelerator> {
        #[cfg(feature = "cuda")]
        return (0..cuda_devices()).map(Accelerator::Cuda).collect();
        #[cfg(not(feature = "cuda"))]
        Vec::new()
    }

    /// The first GPU.
    ///
    /// # Errors
    /// [`DeviceError::None`]
    pub fn gpu() -> Result<Accelerator, DeviceError> {
        Accelerator::gpus().into_iter().next().ok_or(DeviceError::None)
    }

    /// Its name.
    pub fn name(self) -> String {
        match self {
            Accelerator::Flex => "flex".into(),
            #[cfg(feature = "cuda")]
            Accelerator::Cuda(index) => format!("cuda:{index}"),
        }
    }

    pub(crate) fn open(self) -> Result<Device, DeviceError> {
        match self {
            Accelerator::Flex => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Accelerator::Cuda(index) => match cuda_devices() {
                0 => Err(DeviceError::None),
                found if index >= found => Err(DeviceError::Missing { wanted: index, found }),
                _ => Ok(Device::cuda(index)),
            },
        }
    }
}

/// The number of CUDA devices; 0 without a driver.
#[cfg(feature = "cuda")]
fn cuda_devices() -> usize {
    Device::enumerate(burn_tensor::DeviceType::Cuda).len()
}
