//! The functions of NVIDIA's libraries that are called, by name: what differs between versions of CUDA is not used.
//!
//! Constants and layouts are those of NVIDIA's headers, the same from CUDA 12.0 to 13.x.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;

use crate::error::CudaError;

pub(crate) type DevicePointer = u64;
pub(crate) type Handle = *mut c_void;

/// Declares a table of functions and how it is loaded.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal ($($arg:ty),*) $(-> $ret:ty)?;)* }) => {
        $(#[$doc])*
        pub(crate) struct $name {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> functions!(@ret $($ret)?),)*
            _library: libloading::Library,
        }
        impl $name {
            /// Looks all functions up.
            pub(crate) fn load(library: libloading::Library, path: &Path) -> Result<$name, CudaError> {
                let missing = |symbol| CudaError::MissingFunction { path: path.display().to_string(), symbol };
                Ok($name {
                    $($field: {
                        // SAFETY: the declared type is that of NVIDIA's header; the library is kept beside the pointer.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> functions!(@ret $($ret)?)>(
                                concat!($symbol, "\0").as_bytes(),
                            )
                        };
                        *found.map_err(|_| missing($symbol))?
                    },)*
                    _library: library,
                })
            }
        }
    };
    (@ret) => { c_int };
    (@ret $ret:ty) => { $ret };
}

functions! {
    /// The driver.
    DriverApi {
        init = "cuInit"(c_uint);
        driver_version = "cuDriverGetVersion"(*mut c_int);
        device_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
        device_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int);
        context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        context_set = "cuCtxSetCurrent"(Handle);
        memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        allocate = "cuMemAlloc_v2"(*mut DevicePointer, usize);
        free = "cuMemFree_v2"(DevicePointer);
        to_device = "cuMemcpyHtoDAsync_v2"(DevicePointer, *const c_void, usize, Handle);
        to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePointer, usize, Handle);
        stream_create = "cuStreamCreate"(*mut Handle, c_uint);
        stream_wait = "cuStreamSynchronize"(Handle);
        stream_query = "cuStreamQuery"(Handle);
        stream_destroy = "cuStreamDestroy_v2"(Handle);
        module_load = "cuModuleLoadDataEx"(*mut Handle, *const c_void, c_uint, *mut c_int, *mut *mut c_void);
        module_unload = "cuModuleUnload"(Handle);
        module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
        allocate_host = "cuMemAllocHost_v2"(*mut *mut c_void, usize);
        free_host = "cuMemFreeHost"(*mut c_void);
        event_create = "cuEventCreate"(*mut Handle, c_uint);
        event_record = "cuEventRecord"(Handle, Handle);
        event_wait = "cuEventSynchronize"(Handle);
        event_destroy = "cuEventDestroy_v2"(Handle);
        stream_after = "cuStreamWaitEvent"(Handle, Handle, c_uint);
        capture_begin = "cuStreamBeginCapture_v2"(Handle, c_int);
        capture_end = "cuStreamEndCapture"(Handle, *mut Handle);
        graph_instantiate = "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
        graph_launch = "cuGraphLaunch"(Handle, Handle);
        graph_destroy = "cuGraphDestroy"(Handle);
        graph_exec_destroy = "cuGraphExecDestroy"(Handle);
        launch = "cuLaunchKernel"(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
        error_name = "cuGetErrorName"(c_int, *mut *const c_char);
        error_text = "cuGetErrorString"(c_int, *mut *const c_char);
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub(crate) const OUT_OF_MEMORY: c_int = 2;
/// After these the context answers nothing any more: device unavailable, ECC, NVLink, illegal address, timeout, assert, stack,
/// instruction, misaligned address, address space, program counter, launch.
pub(crate) const LOST: [c_int; 12] = [46, 214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719];
/// `CUDA_ERROR_NOT_READY`
pub(crate) const NOT_READY: c_int = 600;
/// `CUDA_ERROR_NO_DEVICE`
pub(crate) const NO_DEVICE: c_int = 100;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and the minor one behind it.
pub(crate) const CAPABILITY_MAJOR: c_int = 75;
/// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
pub(crate) const JIT_LOG: [c_int; 2] = [5, 6];
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may call what they like, on other streams.
pub(crate) const CAPTURE_THREAD_LOCAL: c_int = 1;
/// `CU_EVENT_DISABLE_TIMING`
pub(crate) const NO_TIMING: c_uint = 2;
/// `CU_STREAM_NON_BLOCKING`
pub(crate) const NON_BLOCKING: c_uint = 1;

impl DriverApi {
    /// What a code of the driver means.
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        match code {
            0 => Ok(()),
            _ => Err(self.failed(call, code, "")),
        }
    }

    /// The error of a call about something that has a name.
    pub(crate) fn failed(&self, call: &'static str, code: c_int, name: &str) -> CudaError {
        let meaning = self.describe(code);
        let reason = if name.is_empty() { meaning } else { format!("`{name}`: {meaning}") };
        match LOST.contains(&code) {
            true => CudaError::Lost { call, reason },
            false => CudaError::Call { call, reason },
        }
    }

    pub(crate) fn describe(&self, code: c_int) -> String {
        let text = |of: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: the driver writes a pointer to a constant text of its own, or nothing.
            unsafe {
                (of(code, &mut text) == 0 && !text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy())
            }
        };
        match (text(self.error_name), text(self.error_text)) {
            (Some(name), Some(meaning)) => format!("{name} ({meaning})"),
            _ => format!("error {code}"),
        }
    }
}

functions! {
    /// The compiler.
    NvrtcApi {
        version = "nvrtcVersion"(*mut c_int, *mut c_int);
        create = "nvrtcCreateProgram"(
            *mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        );
        destroy = "nvrtcDestroyProgram"(*mut Handle);
        compile = "nvrtcCompileProgram"(Handle, c_int, *const *const c_char);
        log_size = "nvrtcGetProgramLogSize"(Handle, *mut usize);
        log = "nvrtcGetProgramLog"(Handle, *mut c_char);
        ptx_size = "nvrtcGetPTXSize"(Handle, *mut usize);
        ptx = "nvrtcGetPTX"(Handle, *mut c_char);
    }
}

functions! {
    /// Matrix products.
    CublasLtApi {
        version = "cublasLtGetVersion"() -> usize;
        create = "cublasLtCreate"(*mut Handle);
        destroy = "cublasLtDestroy"(Handle);
        desc_create = "cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int);
        desc_destroy = "cublasLtMatmulDescDestroy"(Handle);
        desc_set = "cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize);
        layout_create = "cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64);
        layout_destroy = "cublasLtMatrixLayoutDestroy"(Handle);
        preference_create = "cublasLtMatmulPreferenceCreate"(*mut Handle);
        preference_destroy = "cublasLtMatmulPreferenceDestroy"(Handle);
        preference_set = "cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize);
        heuristic = "cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int
        );
        matmul = "cublasLtMatmul"(
            Handle, Handle, *const c_void, DevicePointer, Handle, DevicePointer, Handle, *const c_void, DevicePointer,
            Handle, DevicePointer, Handle, *const Algorithm, DevicePointer, usize, Handle
        );
    }
}

/// `cublasLtMatmulAlgo_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Heuristic {
    pub(crate) algorithm: Algorithm,
    pub(crate) workspace: usize,
    pub(crate) state: c_int,
    pub(crate) waves: f32,
    reserved: [c_int; 4],
}

/// `CUBLAS_COMPUTE_32F`: f32 sums, no rounding of f32 operands.
pub(crate) const COMPUTE_F32: c_int = 68;
/// `CUDA_R_32F`
pub(crate) const F32: c_int = 0;
/// `CUDA_R_16BF`
pub(crate) const BF16: c_int = 14;
/// `CUBLASLT_MATMUL_DESC_TRANSA` and `_TRANSB`.
pub(crate) const TRANSPOSE: [c_int; 2] = [3, 4];
/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`
pub(crate) const MAX_WORKSPACE: c_int = 1;
/// `CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES`, then those of B, C and D.
pub(crate) const MIN_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];

/// What a status of cuBLASLt means.
pub(crate) fn check_cublas(call: &'static str, status: c_int) -> Result<(), CudaError> {
    let name = match status {
        0 => return Ok(()),
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        _ => return Err(CudaError::Call { call, reason: format!("status {status}") }),
    };
    Err(CudaError::Call { call, reason: name.to_owned() })
}

functions! {
    /// Messages between cards.
    NcclApi {
        version = "ncclGetVersion"(*mut c_int);
        unique_id = "ncclGetUniqueId"(*mut UniqueId);
        init_rank = "ncclCommInitRank"(*mut Handle, c_int, UniqueId, c_int);
        send = "ncclSend"(DevicePointer, usize, c_int, c_int, Handle, Handle);
        receive = "ncclRecv"(DevicePointer, usize, c_int, c_int, Handle, Handle);
        group_start = "ncclGroupStart"();
        group_end = "ncclGroupEnd"();
        async_error = "ncclCommGetAsyncError"(Handle, *mut c_int);
        destroy = "ncclCommDestroy"(Handle);
        error_text = "ncclGetErrorString"(c_int) -> *const c_char;
        last_error = "ncclGetLastError"(Handle) -> *const c_char;
    }
}

/// `ncclUniqueId`, handed over by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

/// `ncclFloat32`
pub(crate) const NCCL_F32: c_int = 7;
/// `ncclInProgress`: nothing is wrong.
pub(crate) const NCCL_IN_PROGRESS: c_int = 7;
/// Of versions of NCCL: `10000 * major + 100 * minor + patch`.
pub(crate) fn nccl_version(code: c_int) -> String {
    format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
}

impl NcclApi {
    /// What a result means.
    pub(crate) fn check(&self, call: &'static str, result: c_int) -> Result<(), CudaError> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: both return a pointer to a text of the library's own, or none; the last error of this thread needs no handle.
        let texts = unsafe { [(self.error_text)(result), (self.last_error)(std::ptr::null_mut())] };
        let texts = texts.into_iter().filter(|text| !text.is_null()).map(|text| {
            // SAFETY: a text of the library ends with NUL and is read before another call.
            let text = unsafe { CStr::from_ptr(text) };
            text.to_string_lossy().split_whitespace().collect::<Vec<_>>().join(" ")
        });
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        let reason = if texts.is_empty() { format!("error {result}") } else { texts.join(": ") };
        Err(CudaError::Nccl { call, reason })
    }
}
