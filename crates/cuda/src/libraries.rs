//! Where the libraries are: among the system's, in folders that the user names, and in Python's packages, where PyTorch
//! and NVIDIA's wheels leave them. Nothing is needed to build or to start.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{CudaError, CudaVersion};

/// A library of NVIDIA's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver: devices, memory, launches.
    Driver,
    /// Matrix products.
    CublasLt,
    /// The compiler of CUDA C; needed only where the kernels that draftsmith brings do not fit the driver.
    Nvrtc,
}

impl Library {
    /// Its name, as a developer says it.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "driver",
            Library::CublasLt => "cuBLASLt",
            Library::Nvrtc => "NVRTC",
        }
    }

    /// Its file without a version.
    pub fn file(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::CublasLt => "libcublasLt.so",
            Library::Nvrtc => "libnvrtc.so",
        }
    }

    /// Files by which it may be found under a driver that knows `driver`, the best first. A library may be older than
    /// the driver, not of a newer major version.
    pub fn files(self, driver: CudaVersion) -> Vec<String> {
        match self {
            Library::Driver if cfg!(windows) => vec!["nvcuda.dll".to_owned()],
            Library::Driver => vec![self.file().to_owned()],
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
    fn package_folders(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &[],
            Library::CublasLt => &["nvidia/cu13/lib", "nvidia/cublas/lib"],
            Library::Nvrtc => &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
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
        }
    }
}

/// Where to look beside the system's libraries.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Folders that the user names; they come first.
    pub folders: Vec<PathBuf>,
    /// `site-packages` of Python; they come last.
    pub site_packages: Vec<PathBuf>,
}

impl Search {
    /// The folders of a list as paths are listed on this system, and the packages of a Python, if it starts.
    pub fn new(folders: Option<&str>, python: Option<&Path>) -> Search {
        let folders = folders.map(|list| std::env::split_paths(list).collect()).unwrap_or_default();
        Search { folders, site_packages: python.map(site_packages).unwrap_or_default() }
    }

    /// What to try to load, in order: full paths where a file is there, and bare names for the system's loader.
    pub fn candidates(&self, library: Library, driver: CudaVersion) -> Vec<PathBuf> {
        let names = library.files(driver);
        let within = |folder: &Path| {
            names.iter().map(|name| folder.join(name)).filter(|path| path.is_file()).collect::<Vec<_>>()
        };
        let mut all: Vec<PathBuf> = self.folders.iter().flat_map(|folder| within(folder)).collect();
        all.extend(names.iter().map(PathBuf::from));
        for packages in &self.site_packages {
            all.extend(library.package_folders().iter().flat_map(|folder| within(&packages.join(folder))));
        }
        all
    }

    /// Folders that an error names.
    pub fn searched(&self) -> Vec<PathBuf> {
        self.folders.iter().chain(&self.site_packages).cloned().collect()
    }

    /// Opens a library.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`] or [`CudaError::MissingLibrary`].
    pub fn open(
        &self,
        library: Library,
        driver: CudaVersion,
    ) -> Result<(libloading::Library, PathBuf), CudaError> {
        let mut reason = String::new();
        for path in self.candidates(library, driver) {
            // SAFETY: loading runs the library's initialisers; these are NVIDIA's own files or ones the user named.
            match unsafe { libloading::Library::new(&path) } {
                Ok(opened) => return Ok((opened, path)),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(match library {
            Library::Driver => CudaError::NoDriver { reason },
            Library::CublasLt | Library::Nvrtc => {
                CudaError::MissingLibrary { library, searched: self.searched(), driver }
            }
        })
    }
}

/// Folders of packages of a Python; none if it does not start.
fn site_packages(python: &Path) -> Vec<PathBuf> {
    const PROGRAM: &str = "import site, sysconfig\n\
        paths = [sysconfig.get_paths()['purelib'], *site.getsitepackages(), site.getusersitepackages()]\n\
        print('\\n'.join(dict.fromkeys(paths)))";
    let output =
        Command::new(python).args(["-c", PROGRAM]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    match output {
        Ok(done) if done.status.success() => String::from_utf8_lossy(&done.stdout)
            .lines()
            .map(PathBuf::from)
            .filter(|path| path.is_dir())
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_wheels_are_found_and_none_is_newer_than_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let (own, packages) = (folder.path().join("own"), folder.path().join("packages"));
        for file in [
            "own/libnvrtc.so.12",
            "packages/nvidia/cu13/lib/libnvrtc.so.13",
            "packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "packages/nvidia/cublas/lib/libcublasLt.so.12",
        ] {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "not a library").unwrap();
        }
        let search = Search { folders: vec![own.clone()], site_packages: vec![packages.clone()] };
        let names = |library, driver| -> Vec<String> {
            let strip = |p: PathBuf| p.strip_prefix(folder.path()).unwrap_or(&p).display().to_string();
            search.candidates(library, CudaVersion(driver)).into_iter().map(strip).collect()
        };
        assert_eq!(
            names(Library::Nvrtc, 13000),
            [
                "own/libnvrtc.so.12",
                "libnvrtc.so.13",
                "libnvrtc.so.12",
                "packages/nvidia/cu13/lib/libnvrtc.so.13",
                "packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
            ]
        );
        assert_eq!(
            names(Library::CublasLt, 12040),
            ["libcublasLt.so.12", "packages/nvidia/cublas/lib/libcublasLt.so.12"]
        );
        // Files of that name that are no libraries are passed over, and what was searched is named.
        // (Unless the system has one.)
        if let Err(error) = search.open(Library::CublasLt, CudaVersion(12040)) {
            let driver = CudaVersion(12040);
            let searched = vec![own, packages];
            assert_eq!(error, CudaError::MissingLibrary { library: Library::CublasLt, searched, driver });
        }
    }
}
