//! What calls the driver and cuBLASLt, over libraries without a card that are compiled here: what is missing or too old,
//! memory that runs out, and products counted by columns.

use std::path::{Path, PathBuf};
use std::process::Command;

use draftsmith_cuda::{
    Card, Cuda, CudaError, CudaOptions, Graphs, Launcher, Operands, Report, Search, Started,
};
use draftsmith_kernels::{Memory, TrainKernels, catch_failure, testing};

/// Compiles one of the libraries in `tests/fake`.
pub(crate) fn compile(folder: &Path, source: &str, library: &str, defines: &[&str]) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake").join(source);
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()));
    command.args(["-O1", "-w", "-fPIC", "-shared", "-o"]).arg(folder.join(library)).arg(from);
    command.args(defines.iter().map(|define| format!("-D{define}")));
    let done = command.output().expect("a C compiler");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// A folder with a driver, and with cuBLASLt if that is wanted.
pub(crate) fn libraries(driver: &[&str], cublas: bool) -> (tempfile::TempDir, Search) {
    let folder = tempfile::tempdir().unwrap();
    compile(folder.path(), "driver.c", "libcuda.so.1", driver);
    if cublas {
        compile(folder.path(), "cublaslt.c", "libcublasLt.so.12", &[]);
    }
    let search = Search { folders: vec![folder.path().to_path_buf()], site_packages: Vec::new() };
    (folder, search)
}

pub(crate) const GOOD: [&str; 4] = ["VERSION=13000", "DEVICES=2", "MAJOR=9", "MEMORY=(80ull<<30)"];

#[track_caller]
fn refused(driver: &[&str], cublas: bool, number: usize) -> CudaError {
    let (_folder, search) = libraries(driver, cublas);
    match Card::open(&search, number) {
        Err(error) => error,
        Ok(card) => panic!("{:?} opens", card.info()),
    }
}

#[test]
fn an_old_driver_is_named_with_what_is_needed() {
    let error = refused(&["VERSION=11040", "DEVICES=1", "MAJOR=9", "MEMORY=1024"], true, 0);
    assert_eq!(error.to_string(), "the NVIDIA driver knows CUDA 11.4, CUDA 12.0 is needed");
    assert!(error.hint().starts_with("update NVIDIA's driver to one that knows CUDA 12.0"));
}

#[test]
fn a_driver_older_than_the_compiled_kernels_asks_for_the_compiler() {
    let error = refused(&["VERSION=12040", "DEVICES=1", "MAJOR=9", "MEMORY=(80ull<<30)"], true, 0);
    let CudaError::MissingLibrary { library, .. } = &error else {
        return assert!(system_has_nvrtc(), "{error}");
    };
    assert_eq!(library.name(), "NVRTC");
    assert!(error.hint().starts_with("`pip install nvidia-cuda-nvrtc-cu12`"), "{}", error.hint());
}

/// Whether the loader of this system finds NVRTC by itself.
fn system_has_nvrtc() -> bool {
    // SAFETY: NVIDIA's library, loaded as `Card::open` does.
    unsafe { libloading::Library::new("libnvrtc.so.12") }.is_ok()
}

#[test]
fn wrong_numbers_and_old_cards_are_refused() {
    let error = refused(&GOOD, true, 2);
    assert_eq!(error.to_string(), "there is no device `cuda:2`: the driver shows 2, `cuda:0` to `cuda:1`");
    let error = refused(&["VERSION=13000", "DEVICES=0", "MAJOR=9", "MEMORY=1024"], true, 0);
    assert_eq!(error.to_string(), "there is no device `cuda:0`: the driver shows none");
    let error = refused(&["VERSION=13000", "DEVICES=1", "MAJOR=7", "MEMORY=1024"], true, 0);
    assert_eq!(error.to_string(), "`First Card` has compute capability 7.0, 8.0 is needed");
}

#[test]
fn a_missing_library_is_named_with_its_package() {
    // (Unless the system has one.)
    if let CudaError::MissingLibrary { library, .. } =
        refused(&["VERSION=12080", "DEVICES=1", "MAJOR=9", "MEMORY=(1ull<<30)"], false, 0)
    {
        assert_eq!(library.name(), "cuBLASLt");
    }
}

#[test]
fn a_library_without_its_functions_is_named() {
    let folder = tempfile::tempdir().unwrap();
    compile(folder.path(), "cublaslt.c", "libcuda.so.1", &[]);
    let search = Search { folders: vec![folder.path().to_path_buf()], site_packages: Vec::new() };
    let error = Card::open(&search, 0).err().expect("no driver");
    let path: PathBuf = folder.path().join("libcuda.so.1");
    assert_eq!(error.to_string(), format!("`{}` has no function `cuInit`", path.display()));
}

#[test]
fn memory_that_runs_out_is_named_with_what_is_free() {
    let error = refused(&["VERSION=13000", "DEVICES=1", "MAJOR=9", "MEMORY=(16<<20)"], true, 0);
    assert_eq!(
        error.to_string(),
        "32.0 MiB of memory were asked for on the GPU, 16.0 MiB of 16.0 MiB are free"
    );
    let (_folder, search) = libraries(&["VERSION=13000", "DEVICES=1", "MAJOR=9", "MEMORY=(64<<20)"], true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    let error = k.reserve(40 << 20).unwrap_err();
    assert_eq!(
        error.to_string(),
        "40.0 MiB of memory were asked for on the GPU, 32.0 MiB of 64.0 MiB are free"
    );
    assert_eq!(k.reserve(30 << 20), Ok(()));
}

#[test]
fn products_of_row_major_matrices_go_through_a_library_that_counts_by_columns() {
    let (_folder, search) = libraries(&GOOD, true);
    for (operands, rounding) in [(Operands::F32, 0.0), (Operands::Bf16, 2e-2)] {
        let card = Card::open(&search, 1).unwrap();
        assert_eq!((card.info().name.as_str(), card.info().number), ("Second Card", 1));
        assert_eq!(card.cublas_version(), 120_803);
        let k = Cuda::new(card, CudaOptions { operands, ..CudaOptions::default() });
        testing::train::linear(&k, rounding);
    }
}

#[test]
fn what_the_driver_refuses_names_call_and_kernel() {
    let (_folder, search) = libraries(&GOOD, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    let failure = catch_failure(|| testing::train::copies(&k)).unwrap_err();
    assert_eq!(
        failure.message,
        "cuModuleGetFunction failed: `copy_cols`: CUDA_ERROR_OF_A_TEST (an error of a test)"
    );
    assert!(failure.hint.contains("run.device=cpu"), "{}", failure.hint);
}

#[test]
fn a_card_that_is_lost_says_so_where_it_is_noticed() {
    let lost: Vec<&str> = GOOD.into_iter().chain(["LOSE=719"]).collect();
    let (_folder, search) = libraries(&lost, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    let failure = catch_failure(|| {
        let buf = k.zeros(8);
        testing::host(&k, &buf, 8)
    })
    .unwrap_err();
    let meaning = "CUDA_ERROR_OF_A_TEST (an error of a test)";
    assert_eq!(failure.message, format!("the GPU stopped during cuStreamSynchronize: {meaning}"));
    assert!(failure.hint.contains("goes on from what was saved last"), "{}", failure.hint);
    let refused: Vec<&str> = GOOD.into_iter().chain(["REFUSE=700"]).collect();
    let (_folder, search) = libraries(&refused, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    let failure = catch_failure(|| testing::host(&k, &k.zeros(8), 8)).unwrap_err();
    assert_eq!(failure.message, format!("the GPU stopped during cuLaunchKernel: `fill`: {meaning}"));
}

/// Fills of twelve buffers, and what comes of the last.
fn filled<L: Launcher>(k: &Cuda<L>) -> Vec<f32> {
    let bufs: Vec<_> = (0..12).map(|_| k.zeros(5)).collect();
    testing::host(k, &bufs[11], 5)
}

#[test]
fn launches_that_come_again_start_as_one_graph() {
    let (_folder, search) = libraries(&GOOD, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    for _ in 0..4 {
        assert_eq!(filled(&k), [0.0; 5]);
    }
    // Seen, recorded, replayed twice.
    let Started { launches, replayed, calls, recorded, .. } = k.started();
    assert_eq!((launches, replayed, calls, recorded), (48, 36, 15, 1));
    // Not where that is not wanted.
    let off = CudaOptions { graphs: Graphs::Off, ..CudaOptions::default() };
    let k = Cuda::new(Card::open(&search, 0).unwrap(), off);
    for _ in 0..4 {
        assert_eq!(filled(&k), [0.0; 5]);
    }
    assert_eq!((k.started().calls, k.started().recorded), (48, 0));
}

#[test]
fn data_goes_beside_the_work_of_a_card() {
    let (_folder, search) = libraries(&GOOD, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    let courier = k.courier().unwrap();
    for round in 0..4u8 {
        let parts = [vec![f32::from(round); 9], vec![0.5; 700]];
        let coming = courier.send(&[&parts[0], &parts[1]]).unwrap();
        assert_eq!(filled(&k), [0.0; 5]);
        let bufs = coming.arrived();
        for (buf, part) in bufs.iter().zip(&parts) {
            assert_eq!(testing::host(&k, buf, part.len()), *part);
        }
    }
    drop(courier.send(&[&[1.0; 8]]));
    drop(courier);
}

#[test]
fn a_card_without_room_for_graphs_computes_without_them() {
    let full: Vec<&str> = GOOD.into_iter().chain(["GRAPHS=2"]).collect();
    let (_folder, search) = libraries(&full, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    for _ in 0..4 {
        assert_eq!(filled(&k), [0.0; 5]);
    }
    assert_eq!((k.started().calls, k.started().recorded), (48, 0));
    // Any other refusal is one of the work.
    let refused: Vec<&str> = GOOD.into_iter().chain(["GRAPHS=801"]).collect();
    let (_folder, search) = libraries(&refused, true);
    let k = Cuda::new(Card::open(&search, 0).unwrap(), CudaOptions::default());
    filled(&k);
    let failure = catch_failure(|| filled(&k)).unwrap_err();
    let meaning = "CUDA_ERROR_OF_A_TEST (an error of a test)";
    assert_eq!(failure.message, format!("cuGraphInstantiate failed: {meaning}"));
    assert!(failure.hint.contains("DRAFTSMITH_CUDA_GRAPHS=off"), "{}", failure.hint);
}

#[test]
fn a_report_shows_cards_and_what_is_missing() {
    let (folder, _) = libraries(&GOOD, true);
    let report = Report::of(folder.path().to_str(), None);
    let (version, cards) = report.driver.unwrap();
    assert_eq!((version.to_string().as_str(), cards.len()), ("13.0", 2));
    assert_eq!(
        (cards[1].name.as_str(), cards[1].capability, cards[1].memory),
        ("Second Card", (9, 0), 80 << 30)
    );
    let path = report.libraries[0].1.as_ref().unwrap();
    assert!(path.ends_with("libcublasLt.so.12") || path.ends_with("libcublasLt.so.13"), "{path:?}");
    let (library, found) = report.libraries.last().unwrap();
    assert_eq!((library.name(), library.purpose()), ("NCCL", Some("training on several GPUs")));
    // (Unless the system has one.)
    if let Err(error) = found {
        assert!(error.hint().starts_with("`pip install nvidia-nccl-cu13`"), "{}", error.hint());
    }
}
