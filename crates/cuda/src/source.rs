//! The kernels' text, what it compiles to, and the compiler.

use std::ffi::{CString, c_int};
use std::io::Read;
use std::ptr::null_mut;

use crate::api::NvrtcApi;
use crate::error::CudaError;
use crate::library::{CudaVersion, Library};
use crate::search::Search;

/// The files of the kernels in the order in which they are compiled, as one program.
pub const FILES: [(&str, &str); 8] = [
    ("prelude.cuh", include_str!("../kernels/prelude.cuh")),
    ("rows.cu", include_str!("../kernels/rows.cu")),
    ("attention.cu", include_str!("../kernels/attention.cu")),
    ("tensor_attention.cu", include_str!("../kernels/tensor_attention.cu")),
    ("loss.cu", include_str!("../kernels/loss.cu")),
    ("optim.cu", include_str!("../kernels/optim.cu")),
    ("weights.cu", include_str!("../kernels/weights.cu")),
    ("decode.cu", include_str!("../kernels/decode.cu")),
];

/// The compute capability that [`ptx`] is for: cards from it on run it.
pub const PTX_ARCH: u32 = 80;
/// The CUDA that a driver must know to read [`ptx`].
pub const PTX_CUDA: CudaVersion = CudaVersion(12080);
/// [`ptx`] as it is kept.
const COMPRESSED: &[u8] = include_bytes!("../kernels/draftsmith.ptx.gz");

/// What the kernels compile to, by the version of NVRTC that its head names.
pub fn ptx() -> String {
    let mut text = String::new();
    let read = flate2::read::GzDecoder::new(COMPRESSED).read_to_string(&mut text);
    read.expect("the kept kernels are whole, as a test sees");
    text
}

/// All files as one text; errors of a compiler name the file and line.
pub fn text() -> String {
    FILES.iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}")).collect()
}

/// A mark of a text, for [`text`] kept at the head of [`ptx`] (FNV-1a).
pub fn mark(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The compiler, loaded.
pub struct Compiler {
    api: NvrtcApi,
}

impl Compiler {
    /// Finds and opens NVRTC.
    ///
    /// # Errors
    /// If it is found nowhere, or is none.
    pub fn open(search: &Search, driver: CudaVersion) -> Result<Compiler, CudaError> {
        let (library, path) = search.open(Library::Nvrtc, driver)?;
        Ok(Compiler { api: NvrtcApi::load(library, &path)? })
    }

    /// Its version.
    ///
    /// # Errors
    /// If it does not say.
    pub fn version(&self) -> Result<CudaVersion, CudaError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two numbers are written.
        self.check("nvrtcVersion", unsafe { (self.api.version)(&mut major, &mut minor) })?;
        Ok(CudaVersion(1000 * major.unsigned_abs() + 10 * minor.unsigned_abs()))
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        match code {
            0 => Ok(()),
            _ => Err(CudaError::Call { call, reason: format!("NVRTC's error {code}") }),
        }
    }

    /// Compiles a program to PTX for a compute capability (80 for 8.0).
    ///
    /// # Errors
    /// What the compiler complains about.
    pub fn compile(&self, source: &str, arch: u32) -> Result<String, CudaError> {
        let architecture = format!("--gpu-architecture=compute_{arch}");
        Ok(self.run(source, arch, &[architecture])?.0)
    }

    /// Compiles a program down to the machine's own code, and returns what the assembler says of each kernel: registers,
    /// shared memory, what spills.
    ///
    /// # Errors
    /// What the compiler or the assembler complains about.
    pub fn assemble(&self, source: &str, arch: u32) -> Result<String, CudaError> {
        let options = [format!("--gpu-architecture=sm_{arch}"), "--ptxas-options=--verbose".to_owned()];
        Ok(self.run(source, arch, &options)?.1)
    }

    /// PTX and the compiler's log.
    fn run(&self, source: &str, arch: u32, options: &[String]) -> Result<(String, String), CudaError> {
        let text = |s: String| CString::new(s).map_err(|_| CudaError::Compile { arch, log: "a NUL".into() });
        let (source, name) = (text(source.to_owned())?, text("draftsmith.cu".to_owned())?);
        let standard = ["--std=c++17".to_owned()];
        let options: Vec<CString> =
            options.iter().chain(&standard).map(|o| text(o.clone())).collect::<Result<_, _>>()?;
        let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: texts end with NUL and outlive the calls; the program is destroyed once; buffers have the sizes that
        // the library names.
        unsafe {
            let none = std::ptr::null();
            self.check(
                "nvrtcCreateProgram",
                (self.api.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none),
            )?;
            let compiled = (self.api.compile)(program, options.len() as c_int, options.as_ptr());
            let (mut size, mut log) = (0, Vec::new());
            if (self.api.log_size)(program, &mut size) == 0 {
                log.resize(size, 0);
                (self.api.log)(program, log.as_mut_ptr().cast());
            }
            let log = until_nul(&log);
            let result = if compiled == 0 {
                self.check("nvrtcGetPTXSize", (self.api.ptx_size)(program, &mut size)).and_then(|()| {
                    let mut ptx = vec![0u8; size];
                    self.check("nvrtcGetPTX", (self.api.ptx)(program, ptx.as_mut_ptr().cast()))?;
                    Ok((until_nul(&ptx), log))
                })
            } else {
                Err(CudaError::Compile { arch, log })
            };
            (self.api.destroy)(&mut program);
            result
        }
    }

    /// [`ptx`] as this compiler makes it: with the text's mark and without the compiler's own notes.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn checked_in_ptx(&self) -> Result<String, CudaError> {
        let version = self.version()?;
        let compiled = self.compile(&text(), PTX_ARCH)?;
        let lines = compiled.lines().filter(|line| !line.starts_with("//") && !line.is_empty());
        let body: String = lines.flat_map(|line| [line, "\n"]).collect();
        Ok(format!("// source {:016x}, NVRTC {version}\n{body}", mark(&text())))
    }
}

fn until_nul(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiled_kernels_are_those_of_the_source() {
        let ptx = ptx();
        let head = ptx.lines().next().unwrap_or_default();
        assert_eq!(
            head,
            format!("// source {:016x}, NVRTC {PTX_CUDA}", mark(&text())),
            "the kernels changed: make the PTX anew, CONTRIBUTING says how"
        );
        assert!(ptx.contains(".target sm_80\n") && ptx.contains(".visible .entry adamw("));
    }
}
