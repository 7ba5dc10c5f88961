//! Names: versions of CUDA, NVIDIA's libraries, their files, and the packages that bring them.

use std::fmt;

/// A version of CUDA: what a driver or a library knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion(
    /// `1000 * major + 10 * minor`, as the driver counts.
    pub u32,
);

impl CudaVersion {
    /// The major number.
    pub fn major(self) -> u32 {
        self.0 / 1000
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.0 % 1000 / 10)
    }
}

/// A library of NVIDIA's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver: devices, memory, launches.
    Driver,
    /// Matrix products.
    CublasLt,
    /// The compiler of CUDA C; needed only where the kernels that draftsmith brings do not fit the driver.
    Nvrtc,
    /// Messages between cards; needed only where several processes train together.
    Nccl,
}

impl Library {
    /// Its name, as a developer says it.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "driver",
            Library::CublasLt => "cuBLASLt",
            Library::Nvrtc => "NVRTC",
            Library::Nccl => "NCCL",
        }
    }

    /// Its file without a version.
    pub fn file(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::CublasLt => "libcublasLt.so",
            Library::Nvrtc => "libnvrtc.so",
            Library::Nccl => "libnccl.so.2",
        }
    }

    /// What alone it is for, where most do without it.
    pub fn purpose(self) -> Option<&'static str> {
        match self {
            Library::Driver | Library::CublasLt => None,
            Library::Nvrtc => Some("drivers that are too old for the compiled kernels"),
            Library::Nccl => Some("training on several GPUs"),
        }
    }

    /// Files by which it may be found under a driver that knows `driver`, the best first. A library may be older than
    /// the driver, not of a newer major version.
    pub fn files(self, driver: CudaVersion) -> Vec<String> {
        match self {
            Library::Driver if cfg!(windows) => vec!["nvcuda.dll".to_owned()],
            Library::Driver | Library::Nccl => vec![self.file().to_owned()],
            Library::CublasLt | Library::Nvrtc => (12..=driver.major().clamp(12, 13))
                .rev()
                .map(|major| match (self, cfg!(windows)) {
                    (Library::CublasLt, true) => format!("cublasLt64_{major}.dll"),
                    (_, true) => format!("nvrtc64_{major}0_0.dll"),
                    _ => format!("{}.{major}", self.file()),
                })
                .collect(),
        }
    }

    /// Folders of Python's `site-packages` that have it.
    pub(crate) fn package_folders(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &[],
            Library::CublasLt => &["nvidia/cu13/lib", "nvidia/cublas/lib"],
            Library::Nvrtc => &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
            Library::Nccl => &["nvidia/nccl/lib"],
        }
    }

    /// The package that brings it, as `pip install` takes it.
    pub fn package(self, driver: CudaVersion) -> &'static str {
        match (self, driver.major()) {
            (Library::Driver, _) => "(no package: the driver belongs to the system)",
            (Library::CublasLt, 13..) => "\"nvidia-cublas<14\"",
            (Library::CublasLt, _) => "nvidia-cublas-cu12",
            (Library::Nvrtc, 13..) => "\"nvidia-cuda-nvrtc<14\"",
            (Library::Nvrtc, _) => "nvidia-cuda-nvrtc-cu12",
            (Library::Nccl, 13..) => "nvidia-nccl-cu13",
            (Library::Nccl, _) => "nvidia-nccl-cu12",
        }
    }
}
