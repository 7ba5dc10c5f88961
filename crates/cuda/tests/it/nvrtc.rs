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
fn nvrtc_assembles_the_kernels_for_every_generation() {
    let compiler = compiler();
    for arch in [80, 90, 120] {
        let log = compiler.assemble(&text(), arch).unwrap_or_else(|error| panic!("{error}"));
        let kernels = log.matches("Compiling entry function").count();
        assert_eq!(kernels, ptx().matches(".visible .entry").count(), "sm_{arch}: {log}");
        // What does not fit into registers goes through memory: a few words of one kernel at most.
        let spilled = |line: &str| -> Option<u32> {
            line.split_once(" bytes spill stores")?.0.rsplit([' ', ',']).next()?.parse().ok()
        };
        let worst = log.lines().filter_map(spilled).max();
        assert!(worst.is_some_and(|bytes| bytes <= 256), "sm_{arch}: {worst:?} bytes spill");
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
