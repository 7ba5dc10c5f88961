//! The kernels through NVIDIA's own compiler, which needs no GPU: `DRAFTSMITH_TEST_NVRTC` names the folder of the library.

use std::io::Write;
use std::path::PathBuf;

use draftsmith_cuda::source::{Compiler, PTX_CUDA, ptx, text};
use draftsmith_cuda::{CudaError, CudaVersion, Search};

fn compiler() -> Compiler {
    let folder = std::env::var_os("DRAFTSMITH_TEST_NVRTC")
        .expect("DRAFTSMITH_TEST_NVRTC names the folder of NVRTC: CONTRIBUTING says how to get it");
    let search = Search { folders: vec![folder.into()], site_packages: Vec::new() };
    Compiler::open(&search, CudaVersion(13000)).unwrap_or_else(|error| panic!("{error}; {}", error.hint()))
}

#[test]
fn nvrtc_compiles_the_kernels_for_every_generation() {
    let compiler = compiler();
    for arch in [80, 86, 89, 90, 100, 120] {
        let ptx = compiler.compile(&text(), arch).unwrap_or_else(|error| panic!("{error}"));
        assert!(ptx.contains(&format!(".target sm_{arch}")), "sm_{arch}");
        // Nothing spills: an array in local memory is one that is indexed at run time.
        assert!(!ptx.contains("__local_depot"), "sm_{arch}: an array lies in local memory");
    }
}

#[test]
fn nvrtc_names_file_and_line_of_a_mistake() {
    let broken = text().replace("float scale = 1.0f / sqrtf", "float scale = 1.0f / sqrtg");
    match compiler().compile(&broken, 90) {
        Err(CudaError::Compile { arch: 90, log }) => assert!(log.contains("rows.cu("), "{log}"),
        other => panic!("a program with a mistake: {other:?}"),
    }
}

/// With `DRAFTSMITH_UPDATE_PTX` the file is written anew.
#[test]
fn nvrtc_makes_the_checked_in_ptx_of_the_source() {
    let compiler = compiler();
    let version = compiler.version().unwrap();
    assert_eq!(version, PTX_CUDA, "the checked-in PTX is made by NVRTC {PTX_CUDA}");
    let made = compiler.checked_in_ptx().unwrap();
    if std::env::var_os("DRAFTSMITH_UPDATE_PTX").is_some() {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/draftsmith.ptx.gz");
        let file = std::fs::File::create(path).unwrap();
        let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::best());
        gz.write_all(made.as_bytes()).unwrap();
        gz.finish().unwrap();
        return;
    }
    assert!(made == ptx(), "the checked-in PTX is not what the source gives: see `source.rs`");
}
