//! Where the libraries are: among the system's, in folders that the user names, and in Python's packages, where PyTorch
//! and NVIDIA's wheels leave them. Nothing is needed to build or to start.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::CudaError;
use crate::library::{CudaVersion, Library};

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
            Library::CublasLt | Library::Nvrtc | Library::Nccl => {
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
            "packages/nvidia/nccl/lib/libnccl.so.2",
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
        for driver in [12040, 13000] {
            let wanted = ["libnccl.so.2", "packages/nvidia/nccl/lib/libnccl.so.2"];
            assert_eq!(names(Library::Nccl, driver), wanted);
        }
        // Files of that name that are no libraries are passed over, and what was searched is named.
        // (Unless the system has one.)
        if let Err(error) = search.open(Library::CublasLt, CudaVersion(12040)) {
            let driver = CudaVersion(12040);
            let searched = vec![own, packages];
            assert_eq!(error, CudaError::MissingLibrary { library: Library::CublasLt, searched, driver });
        }
    }
}
