//! A card behind the driver: one context, one stream, products by cuBLASLt.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr::{from_mut, from_ref, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::{self, CublasLtApi, DriverApi, Handle, Heuristic, check_cublas};
use crate::device::{Cards, DeviceInfo, Driver, choose};
use crate::error::CudaError;
use crate::launcher::{About, Arg, At, Launch, Launcher, Operand, Product};
use crate::library::{CudaVersion, Library};
use crate::search::Search;
use crate::source::{Compiler, PTX_CUDA, ptx, text};

/// Memory that products may use beside their operands: 32 MiB, what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// The context of a device, kept while anything of it lives.
pub(crate) struct Context {
    pub(crate) api: Arc<DriverApi>,
    device: c_int,
    context: Handle,
    pub(crate) stream: Handle,
    /// Work of the stream waits for a process that is lost: whoever waits for the stream waits for ever.
    stuck: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there, which `enter` sees to.
unsafe impl Send for Context {}
// SAFETY: as above; calls on one stream are ordered by the driver.
unsafe impl Sync for Context {}

impl Context {
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        if self.stuck.load(Ordering::Relaxed) {
            let reason = "an earlier one failed".to_owned();
            return Err(CudaError::Nccl { call: "an exchange between cards", reason });
        }
        // SAFETY: the context lives as long as `self`.
        self.api.check("cuCtxSetCurrent", unsafe { (self.api.context_set)(self.context) })
    }
}

impl Context {
    /// Work that was started does not end: from now on the card is left alone, to the end of the process.
    pub(crate) fn give_up(&self) {
        self.stuck.store(true, Ordering::Relaxed);
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if *self.stuck.get_mut() {
            return;
        }
        // SAFETY: nothing else of the context lives; errors at the end change nothing.
        unsafe {
            (self.api.context_set)(self.context);
            (self.api.stream_wait)(self.stream);
            (self.api.stream_destroy)(self.stream);
            (self.api.context_release)(self.device);
        }
    }
}

/// Memory of a [`Card`].
pub struct CardMemory {
    context: Arc<Context>,
    pointer: u64,
}

impl CardMemory {
    /// The address of a byte.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.pointer + offset as u64
    }
}

impl Drop for CardMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by the driver and freed once; it waits for what still uses it.
            unsafe { (self.context.api.free)(self.pointer) };
        }
    }
}

/// A product whose descriptors and algorithm are chosen.
struct Plan {
    desc: Handle,
    /// Of `b`, `a` and `c`: the library counts by columns, so that the operands change places.
    layouts: [Handle; 3],
    algorithm: Heuristic,
}

/// Products by cuBLASLt, planned once per shape.
struct Products {
    api: CublasLtApi,
    handle: Handle,
    plans: Mutex<HashMap<(Product, [u32; 3]), Plan>>,
    context: Arc<Context>,
}

// SAFETY: the library's handles may be used from any thread; plans are changed under their lock.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        let plans = std::mem::take(self.plans.get_mut().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: each handle was created by the library and is destroyed once.
        unsafe {
            for plan in plans.into_values() {
                (self.api.desc_destroy)(plan.desc);
                plan.layouts.iter().for_each(|layout| {
                    (self.api.layout_destroy)(*layout);
                });
            }
            (self.api.destroy)(self.handle);
        }
    }
}

/// A card that is open: [`Launcher`] over the driver.
pub struct Card {
    // Dropped in this order: all but the last need the context.
    products: Products,
    workspace: CardMemory,
    functions: Mutex<HashMap<&'static str, usize>>,
    module: usize,
    context: Arc<Context>,
    info: DeviceInfo,
    driver: CudaVersion,
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the stream is waited for, so nothing of the module runs; it is unloaded once.
            unsafe {
                (self.context.api.stream_wait)(self.context.stream);
                (self.context.api.module_unload)(self.module as Handle);
            }
        }
    }
}

impl Card {
    /// Opens `cuda:number`: driver, context, cuBLASLt, kernels.
    ///
    /// # Errors
    /// Whatever is missing or too old, or what the driver refuses.
    pub fn open(search: &Search, number: usize) -> Result<Card, CudaError> {
        let driver = Driver::open(search)?;
        let info = choose(&driver, number)?;
        let (library, path) = search.open(Library::CublasLt, driver.version())?;
        let cublas = CublasLtApi::load(library, &path)?;
        let api = Arc::clone(&driver.api);
        let (mut device, mut context, mut stream) = (0, null_mut(), null_mut());
        // SAFETY: handles are written to handles; the context is current before the stream is made.
        unsafe {
            api.check("cuDeviceGet", (api.device_get)(&mut device, number as c_int))?;
            let retained = (api.context_retain)(&mut context, device);
            if retained == api::OUT_OF_MEMORY {
                return Err(CudaError::Memory { wanted: 512 << 20, free: 0, total: info.memory });
            }
            api.check("cuDevicePrimaryCtxRetain", retained)?;
            api.check("cuCtxSetCurrent", (api.context_set)(context))?;
            api.check("cuStreamCreate", (api.stream_create)(&mut stream, api::NON_BLOCKING))?;
        }
        let context = Arc::new(Context { api, device, context, stream, stuck: AtomicBool::new(false) });
        let module = load_kernels(&context, search, driver.version(), &info)? as usize;
        let mut handle = null_mut();
        // SAFETY: a handle is written to a handle, under the current context.
        check_cublas("cublasLtCreate", unsafe { (cublas.create)(&mut handle) })?;
        let plans = Mutex::new(HashMap::new());
        let products = Products { api: cublas, handle, plans, context: Arc::clone(&context) };
        let workspace = allocate(&context, WORKSPACE)?;
        Ok(Card {
            products,
            workspace,
            functions: Mutex::new(HashMap::new()),
            module,
            context,
            info,
            driver: driver.version(),
        })
    }

    /// The card.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What its work is ordered by.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The CUDA that the driver knows.
    pub fn driver(&self) -> CudaVersion {
        self.driver
    }

    /// What tells this card, or the part of one, from all others.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn uuid(&self) -> Result<String, CudaError> {
        let (api, mut uuid) = (&self.context.api, [0u8; 16]);
        // SAFETY: sixteen bytes are written.
        api.check("cuDeviceGetUuid", unsafe { (api.device_uuid)(&mut uuid, self.context.device) })?;
        Ok(uuid.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The version of cuBLASLt.
    pub fn cublas_version(&self) -> usize {
        // SAFETY: takes and writes nothing.
        unsafe { (self.products.api.version)() }
    }

    /// Waits for all that was started.
    ///
    /// # Errors
    /// Failures of what was started.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        let api = &self.context.api;
        // SAFETY: the stream lives as long as the context.
        api.check("cuStreamSynchronize", unsafe { (api.stream_wait)(self.context.stream) })
    }

    fn function(&self, name: &'static str) -> Result<Handle, CudaError> {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = known.get(name) {
            return Ok(*function as Handle);
        }
        let symbol = CString::new(name).map_err(|_| CudaError::Call {
            call: "cuModuleGetFunction",
            reason: format!("`{name}` is no name"),
        })?;
        let (api, mut function) = (&self.context.api, null_mut());
        // SAFETY: a handle is written to a handle; the name ends with NUL.
        let code = unsafe { (api.module_function)(&mut function, self.module as Handle, symbol.as_ptr()) };
        if code != 0 {
            return Err(api.failed("cuModuleGetFunction", code, name));
        }
        known.insert(name, function as usize);
        Ok(function)
    }
}

fn memory(context: &Context) -> Result<(u64, u64), CudaError> {
    context.enter()?;
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: two numbers are written.
    context.api.check("cuMemGetInfo", unsafe { (context.api.memory_info)(&mut free, &mut total) })?;
    Ok((free as u64, total as u64))
}

fn allocate(context: &Arc<Context>, bytes: usize) -> Result<CardMemory, CudaError> {
    context.enter()?;
    let mut pointer = 0;
    // SAFETY: a pointer is written to a pointer.
    let code = unsafe { (context.api.allocate)(&mut pointer, bytes.max(1)) };
    if code == api::OUT_OF_MEMORY {
        let (free, total) = memory(context)?;
        return Err(CudaError::Memory { wanted: bytes as u64, free, total });
    }
    context.api.check("cuMemAlloc", code)?;
    Ok(CardMemory { context: Arc::clone(context), pointer })
}

/// The compiled kernels that came with the program; where the driver is too old for them, or refuses them, what NVRTC
/// makes of the source.
fn load_kernels(
    context: &Context,
    search: &Search,
    driver: CudaVersion,
    info: &DeviceInfo,
) -> Result<Handle, CudaError> {
    let brought = if driver < PTX_CUDA {
        Err(CudaError::OldDriver { found: driver, needed: PTX_CUDA })
    } else {
        load_module(context, &ptx())
    };
    let why = match brought {
        Ok(module) => return Ok(module),
        Err(why) => why,
    };
    let compiler = match Compiler::open(search, driver) {
        Ok(compiler) => compiler,
        // A driver that only needs the compiler is told so.
        Err(missing) if matches!(why, CudaError::OldDriver { .. }) => return Err(missing),
        Err(_) => return Err(why),
    };
    // A driver reads what a compiler of its own version or an older one writes.
    let version = compiler.version()?;
    if version > driver {
        return Err(CudaError::OldDriver { found: driver, needed: version.min(PTX_CUDA) });
    }
    // An older compiler does not know the newest cards; their driver reads code for older ones.
    let own = info.capability.0 * 10 + info.capability.1;
    let compiled =
        compiler.compile(&text(), own).or_else(|_| compiler.compile(&text(), crate::source::PTX_ARCH))?;
    load_module(context, &compiled)
}

fn load_module(context: &Context, ptx: &str) -> Result<Handle, CudaError> {
    context.enter()?;
    let image = CString::new(ptx)
        .map_err(|_| CudaError::Call { call: "cuModuleLoadDataEx", reason: "a NUL in the code".into() })?;
    let mut log = vec![0u8; 8192];
    let mut options = api::JIT_LOG;
    let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
    let (api, mut module) = (&context.api, null_mut());
    // SAFETY: the image ends with NUL; the log has the size that the second option names.
    let code = unsafe {
        (api.module_load)(&mut module, image.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    if code == 0 {
        return Ok(module);
    }
    let log = String::from_utf8_lossy(log.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
    Err(CudaError::Call {
        call: "cuModuleLoadDataEx",
        reason: format!("{} {}", api.describe(code), log.trim()),
    })
}

impl Launcher for Card {
    type Memory = CardMemory;

    fn about(&self) -> About {
        let DeviceInfo { number, name, capability: (major, minor), memory } = self.info.clone();
        About {
            number,
            card: name,
            capability: format!("{major}.{minor}"),
            memory,
            driver: self.driver.to_string(),
        }
    }

    fn memory(&self) -> Result<(u64, u64), CudaError> {
        memory(&self.context)
    }

    fn allocate(&self, bytes: usize) -> Result<CardMemory, CudaError> {
        allocate(&self.context, bytes)
    }

    fn write(&self, to: At<'_, CardMemory>, data: &[u8]) -> Result<(), CudaError> {
        if data.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        let (api, stream) = (&self.context.api, self.context.stream);
        let place = to.memory.address(to.offset);
        // SAFETY: the caller names a place inside the allocation. Memory that is not page-locked is copied to the driver's
        // own before the call returns, so `data` is free afterwards.
        api.check("cuMemcpyHtoDAsync", unsafe {
            (api.to_device)(place, data.as_ptr().cast(), data.len(), stream)
        })
    }

    fn read(&self, from: At<'_, CardMemory>, out: &mut [u8]) -> Result<(), CudaError> {
        if out.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        let (api, stream) = (&self.context.api, self.context.stream);
        let place = from.memory.address(from.offset);
        // SAFETY: the caller names a place inside the allocation; the stream is waited for before `out` is looked at.
        unsafe {
            api.check("cuMemcpyDtoHAsync", (api.to_host)(out.as_mut_ptr().cast(), place, out.len(), stream))?;
            api.check("cuStreamSynchronize", (api.stream_wait)(stream))
        }
    }

    fn launch(&self, launch: Launch<'_, CardMemory>) -> Result<(), CudaError> {
        let function = self.function(launch.kernel)?;
        self.context.enter()?;
        // Parameters one after the other, eight bytes each or a multiple of that: little-endian, so that a smaller number
        // stands at the beginning of its place.
        let address = |at: &Option<At<'_, CardMemory>>| at.map_or(0, |at| at.memory.address(at.offset));
        let (mut values, mut starts) = (Vec::with_capacity(launch.args.len()), Vec::new());
        for arg in launch.args {
            starts.push(values.len());
            match arg {
                Arg::Buffer(at) => values.push(address(at)),
                Arg::Buffers(all) => values.extend(all.iter().map(address)),
                Arg::I32(x) => values.push(u64::from(x.cast_unsigned())),
                Arg::U32(x) => values.push(u64::from(*x)),
                Arg::I64(x) => values.push(x.cast_unsigned()),
                Arg::F32(x) => values.push(u64::from(x.to_bits())),
            }
        }
        let mut pointers: Vec<*mut c_void> =
            starts.iter().map(|i| from_mut(&mut values[*i]).cast()).collect();
        let size = |n: usize| {
            u32::try_from(n).map_err(|_| CudaError::Call {
                call: "cuLaunchKernel",
                reason: format!("{n} blocks of `{}`", launch.kernel),
            })
        };
        let (x, y) = (size(launch.grid.0)?, size(launch.grid.1)?);
        let api = &self.context.api;
        // SAFETY: the operations pass what the kernel takes, which the host shim checks for every one of them.
        let code = unsafe {
            let stream = self.context.stream;
            (api.launch)(
                function,
                x,
                y,
                1,
                launch.threads,
                1,
                1,
                0,
                stream,
                pointers.as_mut_ptr(),
                null_mut(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        Err(api.failed("cuLaunchKernel", code, launch.kernel))
    }

    fn product(
        &self,
        p: Product,
        a: At<'_, CardMemory>,
        b: At<'_, CardMemory>,
        c: At<'_, CardMemory>,
    ) -> Result<(), CudaError> {
        self.context.enter()?;
        let places = [b, a, c].map(|at| at.memory.address(at.offset));
        let alignment = places.map(|place| 1 << place.trailing_zeros().min(8));
        let products = &self.products;
        let mut plans = products.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry((p, alignment)) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(products.plan(p, alignment)?),
        };
        let (one, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: the plan's layouts are those of the operands, which the caller promises to be there; factors are host
        // numbers, read during the call.
        let status = unsafe {
            (products.api.matmul)(
                products.handle,
                plan.desc,
                from_ref(&one).cast(),
                places[0],
                plan.layouts[0],
                places[1],
                plan.layouts[1],
                from_ref(&beta).cast(),
                places[2],
                plan.layouts[2],
                places[2],
                plan.layouts[2],
                &plan.algorithm.algorithm,
                self.workspace.pointer,
                WORKSPACE,
                self.context.stream,
            )
        };
        check_cublas("cublasLtMatmul", status)
    }
}

impl Products {
    /// The library counts by columns: a row-major `[r, c]` is its `c x r`. So it is asked for `cᵀ = bᵀ · aᵀ`, and operands
    /// that stand as they are named need no transposition.
    fn plan(&self, p: Product, alignment: [u32; 3]) -> Result<Plan, CudaError> {
        let (api, kind) = (&self.api, if p.operands == Operand::Bf16 { api::BF16 } else { api::F32 });
        let (m, n, k) = (p.m as u64, p.n as u64, p.k as u64);
        let (mut desc, mut preference, mut layouts) = (null_mut(), null_mut(), [null_mut(); 3]);
        // SAFETY: handles are written to handles, attributes are numbers of the size named, and what was made is destroyed
        // when something fails.
        unsafe {
            check_cublas(
                "cublasLtMatmulDescCreate",
                (api.desc_create)(&mut desc, api::COMPUTE_F32, api::F32),
            )?;
            let mut make = || -> Result<Heuristic, CudaError> {
                for (attribute, transposed) in
                    api::TRANSPOSE.into_iter().zip([p.b_transposed, p.a_transposed])
                {
                    let op = c_int::from(transposed);
                    let set = (api.desc_set)(desc, attribute, from_ref(&op).cast(), size_of::<c_int>());
                    check_cublas("cublasLtMatmulDescSetAttribute", set)?;
                }
                let shapes = [
                    (kind, if p.b_transposed { (k, n) } else { (n, k) }),
                    (kind, if p.a_transposed { (m, k) } else { (k, m) }),
                    (api::F32, (n, m)),
                ];
                for (layout, (kind, (rows, cols))) in layouts.iter_mut().zip(shapes) {
                    let made = (api.layout_create)(layout, kind, rows, cols, rows as i64);
                    check_cublas("cublasLtMatrixLayoutCreate", made)?;
                }
                check_cublas("cublasLtMatmulPreferenceCreate", (api.preference_create)(&mut preference))?;
                let set = (api.preference_set)(
                    preference,
                    api::MAX_WORKSPACE,
                    from_ref(&WORKSPACE).cast(),
                    size_of::<usize>(),
                );
                check_cublas("cublasLtMatmulPreferenceSetAttribute", set)?;
                // Without these the library takes operands to be aligned to 256 bytes.
                let aligned = [alignment[0], alignment[1], alignment[2], alignment[2]];
                for (attribute, bytes) in api::MIN_ALIGNMENT.into_iter().zip(aligned) {
                    let set = (api.preference_set)(preference, attribute, from_ref(&bytes).cast(), 4);
                    check_cublas("cublasLtMatmulPreferenceSetAttribute", set)?;
                }
                let (mut found, mut count) = (Heuristic::default(), 0);
                let status = (api.heuristic)(
                    self.handle,
                    desc,
                    layouts[0],
                    layouts[1],
                    layouts[2],
                    layouts[2],
                    preference,
                    1,
                    &mut found,
                    &mut count,
                );
                check_cublas("cublasLtMatmulAlgoGetHeuristic", status)?;
                if count == 0 {
                    let reason = format!("no algorithm for {p:?}");
                    return Err(CudaError::Call { call: "cublasLtMatmulAlgoGetHeuristic", reason });
                }
                check_cublas("cublasLtMatmulAlgoGetHeuristic", found.state)?;
                Ok(found)
            };
            let made = make();
            if !preference.is_null() {
                (api.preference_destroy)(preference);
            }
            match made {
                Ok(algorithm) => Ok(Plan { desc, layouts, algorithm }),
                Err(error) => {
                    layouts.iter().filter(|layout| !layout.is_null()).for_each(|layout| {
                        (api.layout_destroy)(*layout);
                    });
                    (api.desc_destroy)(desc);
                    Err(error)
                }
            }
        }
    }
}
