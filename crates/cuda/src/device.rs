//! Which cards there are, and which of them a run may use.

use std::ffi::{CStr, c_int};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::api::{CAPABILITY_MAJOR, DriverApi, NO_DEVICE};
use crate::error::CudaError;
use crate::library::{CudaVersion, Library};
use crate::search::Search;

/// The oldest CUDA that a driver must know.
pub const MIN_CUDA: CudaVersion = CudaVersion(12000);
/// The oldest compute capability: bf16 in the tensor cores.
pub const MIN_CAPABILITY: (u32, u32) = (8, 0);

/// A card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `N` of `cuda:N`.
    pub number: usize,
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
}

/// What a driver says before a device is opened.
pub trait Cards {
    /// The CUDA it knows.
    fn version(&self) -> CudaVersion;
    /// Its devices.
    ///
    /// # Errors
    /// If it does not say.
    fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError>;
}

/// Checks that a device can be used.
///
/// # Errors
/// A driver or a card that is too old, or a number that no device has.
pub fn choose(cards: &impl Cards, number: usize) -> Result<DeviceInfo, CudaError> {
    let found = cards.version();
    if found < MIN_CUDA {
        return Err(CudaError::OldDriver { found, needed: MIN_CUDA });
    }
    let devices = cards.devices()?;
    let count = devices.len();
    let device =
        devices.into_iter().nth(number).ok_or(CudaError::NoSuchDevice { asked: number, found: count })?;
    if device.capability < MIN_CAPABILITY {
        return Err(CudaError::OldCard { name: device.name, found: device.capability });
    }
    Ok(device)
}

/// The driver, started.
#[derive(Clone)]
pub struct Driver {
    pub(crate) api: Arc<DriverApi>,
    version: CudaVersion,
}

impl Driver {
    /// Finds and starts the driver.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], or a driver that does not start.
    pub fn open(search: &Search) -> Result<Driver, CudaError> {
        let (library, path) = search.open(Library::Driver, MIN_CUDA)?;
        let api = DriverApi::load(library, &path)?;
        let mut version = 0;
        // SAFETY: `cuInit` takes no memory; the version is one number, and is said without `cuInit` too.
        let (version, started) = unsafe {
            api.check("cuDriverGetVersion", (api.driver_version)(&mut version))?;
            (CudaVersion(version.unsigned_abs()), (api.init)(0))
        };
        // A driver without a card does not start; that there is none is said when one is asked for.
        if started != 0 && started != NO_DEVICE {
            return Err(CudaError::DriverFails { reason: api.describe(started) });
        }
        Ok(Driver { api: Arc::new(api), version })
    }
}

impl Cards for Driver {
    fn version(&self) -> CudaVersion {
        self.version
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError> {
        let api = &self.api;
        let mut count = 0;
        // SAFETY: one number is written.
        let code = unsafe { (api.device_count)(&mut count) };
        // A driver that was not started, for there is no card.
        if code == NO_DEVICE || code == 3 {
            return Ok(Vec::new());
        }
        api.check("cuDeviceGetCount", code)?;
        (0..count)
            .map(|number| {
                let (mut device, mut name, mut memory) = (0, [0u8; 256], 0usize);
                let mut capability: [c_int; 2] = [0; 2];
                // SAFETY: numbers are written to numbers, the name into its buffer with its length.
                unsafe {
                    api.check("cuDeviceGet", (api.device_get)(&mut device, number))?;
                    api.check(
                        "cuDeviceGetName",
                        (api.device_name)(name.as_mut_ptr().cast(), name.len() as c_int - 1, device),
                    )?;
                    for (i, value) in capability.iter_mut().enumerate() {
                        let attribute = CAPABILITY_MAJOR + i as c_int;
                        api.check("cuDeviceGetAttribute", (api.device_attribute)(value, attribute, device))?;
                    }
                    api.check("cuDeviceTotalMem", (api.device_memory)(&mut memory, device))?;
                }
                let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
                Ok(DeviceInfo {
                    number: number.unsigned_abs() as usize,
                    name: name.to_string_lossy().into_owned(),
                    capability: (capability[0].unsigned_abs(), capability[1].unsigned_abs()),
                    memory: memory as u64,
                })
            })
            .collect()
    }
}

/// What a machine has of NVIDIA's, for `doctor`.
#[derive(Clone, Debug)]
pub struct Report {
    /// The driver's CUDA and its cards, or why there is none.
    pub driver: Result<(CudaVersion, Vec<DeviceInfo>), CudaError>,
    /// Libraries beside the driver: where they are, or what is missing.
    pub libraries: Vec<(Library, Result<PathBuf, CudaError>)>,
}

impl Report {
    /// Looks for driver, cards and libraries, as [`Search::new`] is told where. Without a driver nothing else is looked
    /// for, and no Python is started.
    pub fn of(folders: Option<&str>, python: Option<&Path>) -> Report {
        let driver = match Driver::open(&Search::new(folders, None)) {
            Ok(driver) => driver,
            Err(error) => return Report { driver: Err(error), libraries: Vec::new() },
        };
        let search = Search::new(folders, python);
        let found = |library| (library, search.open(library, driver.version).map(|(_, path)| path));
        let libraries = [Library::CublasLt, Library::Nvrtc, Library::Nccl].map(found).into();
        Report { driver: driver.devices().map(|devices| (driver.version, devices)), libraries }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(CudaVersion, Vec<DeviceInfo>);
    impl Cards for Fake {
        fn version(&self) -> CudaVersion {
            self.0
        }
        fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError> {
            Ok(self.1.clone())
        }
    }

    fn card(number: usize, name: &str, capability: (u32, u32)) -> DeviceInfo {
        DeviceInfo { number, name: name.to_owned(), capability, memory: 80 << 30 }
    }

    #[test]
    fn old_drivers_wrong_numbers_and_old_cards_are_refused() {
        let two = vec![card(0, "NVIDIA H100", (9, 0)), card(1, "Tesla V100", (7, 0))];
        assert_eq!(choose(&Fake(CudaVersion(13000), two.clone()), 0), Ok(two[0].clone()));
        for (version, devices, number, wanted) in [
            (11080, two.clone(), 0, "the NVIDIA driver knows CUDA 11.8, CUDA 12.0 is needed"),
            (12000, Vec::new(), 0, "there is no device `cuda:0`: the driver shows none"),
            (12000, two[..1].to_vec(), 1, "there is no device `cuda:1`: the driver shows one, `cuda:0`"),
            (13000, two, 1, "`Tesla V100` has compute capability 7.0, 8.0 is needed"),
        ] {
            let error = choose(&Fake(CudaVersion(version), devices), number).unwrap_err();
            assert_eq!(error.to_string(), wanted);
            assert!(error.hint().contains("run.device") || error.hint().contains("card"), "{}", error.hint());
        }
    }

    #[test]
    fn a_file_that_is_no_driver_is_an_error_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
        let search = Search { folders: vec![folder.path().to_path_buf()], site_packages: Vec::new() };
        // Goes on to the system's, which this machine may have.
        match Driver::open(&search) {
            Ok(driver) => assert!(driver.version() >= CudaVersion(1000)),
            Err(error) => assert!(!error.hint().is_empty(), "{error}"),
        }
        let report = Report::of(folder.path().to_str(), None);
        assert_eq!(report.driver.is_err(), report.libraries.is_empty());
    }
}
