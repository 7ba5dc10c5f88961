//! A card behind the driver: one context, one stream, products by cuBLASLt.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{NonNull, from_ref, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::{self, CublasLtApi, DriverApi, Handle, Heuristic, check_cublas};
use crate::device::{Cards, DeviceInfo, Driver, choose};
use crate::error::CudaError;
use crate::launcher::{About, At, Launch, Launcher, Operand, Product, Words};
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
    /// Where copies run beside the work.
    beside: Handle,
    /// Where launches are taken down; nothing ever runs there, so other threads may use the other streams meanwhile.
    recorder: Handle,
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
            for stream in [self.recorder, self.beside, self.stream] {
                (self.api.stream_wait)(stream);
                (self.api.stream_destroy)(stream);
            }
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
        let (mut device, mut context) = (0, null_mut());
        let [mut stream, mut beside, mut recorder] = [null_mut(); 3];
        // SAFETY: handles are written to handles; the context is current before the stream is made.
        unsafe {
            api.check("cuDeviceGet", (api.device_get)(&mut device, number as c_int))?;
            let retained = (api.context_retain)(&mut context, device);
            if retained == api::OUT_OF_MEMORY {
                return Err(CudaError::Memory { wanted: 512 << 20, free: 0, total: info.memory });
            }
            api.check("cuDevicePrimaryCtxRetain", retained)?;
            api.check("cuCtxSetCurrent", (api.context_set)(context))?;
            for stream in [&mut stream, &mut beside, &mut recorder] {
                api.check("cuStreamCreate", (api.stream_create)(stream, api::NON_BLOCKING))?;
            }
        }
        let stuck = AtomicBool::new(false);
        let context = Arc::new(Context { api, device, context, stream, beside, recorder, stuck });
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

/// A launch on a [`Card`].
#[derive(PartialEq, Eq, Hash)]
pub struct CardLaunch {
    kernel: &'static str,
    function: usize,
    grid: (u32, u32),
    threads: u32,
    words: Words,
}

/// A CUDA graph, ready to be launched.
pub struct CardGraph {
    context: Arc<Context>,
    exec: usize,
}

impl Drop for CardGraph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by the driver and destroyed once, when no launch of it is under way.
            unsafe {
                (self.context.api.stream_wait)(self.context.stream);
                (self.context.api.graph_exec_destroy)(self.exec as Handle);
            }
        }
    }
}

/// Page-locked memory of the host.
pub struct CardStaging {
    context: Arc<Context>,
    place: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory of the host, owned by this alone.
unsafe impl Send for CardStaging {}

impl Deref for CardStaging {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated, and zeroed at once.
        unsafe { std::slice::from_raw_parts(self.place.as_ptr(), self.bytes) }
    }
}

impl DerefMut for CardStaging {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.place.as_ptr(), self.bytes) }
    }
}

impl Drop for CardStaging {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by the driver and freed once, when no stream reads it any more.
            unsafe {
                (self.context.api.stream_wait)(self.context.stream);
                (self.context.api.stream_wait)(self.context.beside);
                (self.context.api.free_host)(self.place.as_ptr().cast());
            }
        }
    }
}

impl Card {
    /// Hands a launch to a stream.
    fn start_on(&self, stream: Handle, launch: &CardLaunch) -> Result<(), CudaError> {
        let (api, Words { values, starts }) = (&self.context.api, &launch.words);
        let mut pointers: Vec<*mut c_void> =
            starts.iter().map(|i| from_ref(&values[*i]).cast_mut().cast()).collect();
        // SAFETY: the operations pass what the kernel takes, which the host shim checks for every one of them; the driver copies
        // the parameters before it returns, and writes to none.
        let code = unsafe {
            (api.launch)(
                launch.function as Handle,
                launch.grid.0,
                launch.grid.1,
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

    /// An executable graph of a captured one, written to `exec`.
    fn instantiate(&self, graph: Handle, exec: &mut Handle) -> Result<(), CudaError> {
        let api = &self.context.api;
        // SAFETY: the graph was captured just now; a handle is written to a handle.
        let code = unsafe { (api.graph_instantiate)(exec, graph, 0) };
        if code == api::OUT_OF_MEMORY {
            let (free, total) = memory(&self.context)?;
            // What a graph takes the driver does not say: it is little.
            return Err(CudaError::Memory { wanted: 1 << 20, free, total });
        }
        api.check("cuGraphInstantiate", code)
    }
}

/// A place in the order of a stream.
pub struct CardMark {
    context: Arc<Context>,
    event: usize,
}

impl CardMark {
    /// What a stream was asked so far.
    fn of(context: &Arc<Context>, stream: Handle) -> Result<CardMark, CudaError> {
        let (api, mut event) = (&context.api, null_mut());
        // SAFETY: a handle is written to a handle, and recorded on a stream of the context.
        unsafe {
            api.check("cuEventCreate", (api.event_create)(&mut event, api::NO_TIMING))?;
            let mark = CardMark { context: Arc::clone(context), event: event as usize };
            api.check("cuEventRecord", (api.event_record)(event, stream))?;
            Ok(mark)
        }
    }

    /// The stream goes on when the other has come to this place.
    fn before(&self, stream: Handle) -> Result<(), CudaError> {
        let api = &self.context.api;
        // SAFETY: event and stream live, and belong to one context.
        api.check("cuStreamWaitEvent", unsafe { (api.stream_after)(stream, self.event as Handle, 0) })
    }
}

impl Drop for CardMark {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by the driver and destroyed once; who waits for it already goes on waiting.
            unsafe { (self.context.api.event_destroy)(self.event as Handle) };
        }
    }
}

/// A call that failed, as one that need not be made.
fn of_graphs(error: CudaError) -> CudaError {
    match error {
        CudaError::Call { call, reason } => CudaError::Graph { call, reason },
        other => other,
    }
}

impl Launcher for Card {
    type Memory = CardMemory;
    type Ready = CardLaunch;
    type Graph = CardGraph;
    type Staging = CardStaging;
    type Mark = CardMark;

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
        // own before the call returns, so `data` is free afterwards; page-locked memory comes from `write_staged` alone.
        api.check("cuMemcpyHtoDAsync", unsafe {
            (api.to_device)(place, data.as_ptr().cast(), data.len(), stream)
        })
    }

    fn staging(&self, bytes: usize) -> Result<CardStaging, CudaError> {
        self.context.enter()?;
        let (api, mut place) = (&self.context.api, null_mut());
        // SAFETY: a pointer is written to a pointer.
        let code = unsafe { (api.allocate_host)(&mut place, bytes.max(1)) };
        if code == api::OUT_OF_MEMORY {
            // The host's, of which the driver says no numbers.
            return Err(CudaError::Memory { wanted: bytes as u64, free: 0, total: 0 });
        }
        api.check("cuMemAllocHost", code)?;
        let place = NonNull::new(place.cast::<u8>()).ok_or_else(|| CudaError::Call {
            call: "cuMemAllocHost",
            reason: "no memory, and no error".to_owned(),
        })?;
        // SAFETY: so many bytes were allocated just above.
        unsafe { place.write_bytes(0, bytes) };
        Ok(CardStaging { context: Arc::clone(&self.context), place, bytes })
    }

    fn write_staged(
        &self,
        to: At<'_, CardMemory>,
        from: &CardStaging,
        bytes: usize,
    ) -> Result<(), CudaError> {
        // Page-locked memory is read when the copy's turn comes: what the caller has to heed.
        self.write(to, &from[..bytes])
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

    fn copy_beside(
        &self,
        copies: &[(At<'_, CardMemory>, Range<usize>)],
        from: &CardStaging,
    ) -> Result<CardMark, CudaError> {
        self.context.enter()?;
        let (api, beside) = (&self.context.api, self.context.beside);
        CardMark::of(&self.context, self.context.stream)?.before(beside)?;
        for (to, bytes) in copies {
            let data = &from[bytes.clone()];
            // SAFETY: the caller names places inside allocations, and keeps the page-locked memory as it is until the copy is done.
            api.check("cuMemcpyHtoDAsync", unsafe {
                (api.to_device)(to.memory.address(to.offset), data.as_ptr().cast(), data.len(), beside)
            })?;
        }
        CardMark::of(&self.context, beside)
    }

    fn after(&self, mark: &CardMark) -> Result<(), CudaError> {
        self.context.enter()?;
        mark.before(self.context.stream)
    }

    fn wait_for(&self, mark: &CardMark) -> Result<(), CudaError> {
        self.context.enter()?;
        let api = &self.context.api;
        // SAFETY: the event lives.
        api.check("cuEventSynchronize", unsafe { (api.event_wait)(mark.event as Handle) })
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        let api = &self.context.api;
        // SAFETY: the stream lives as long as the context.
        api.check("cuStreamSynchronize", unsafe { (api.stream_wait)(self.context.stream) })
    }

    fn ready(&self, launch: Launch<'_, CardMemory>) -> Result<CardLaunch, CudaError> {
        self.context.enter()?;
        let size = |n: usize| {
            u32::try_from(n).map_err(|_| CudaError::Call {
                call: "cuLaunchKernel",
                reason: format!("{n} blocks of `{}`", launch.kernel),
            })
        };
        let grid = (size(launch.grid.0)?, size(launch.grid.1)?);
        let function = self.function(launch.kernel)? as usize;
        let words = Words::of(launch.args, |at| at.memory.address(at.offset));
        Ok(CardLaunch { kernel: launch.kernel, function, grid, threads: launch.threads, words })
    }

    fn start(&self, launch: &CardLaunch) -> Result<(), CudaError> {
        self.context.enter()?;
        self.start_on(self.context.stream, launch)
    }

    fn record(&self, launches: &[CardLaunch]) -> Result<CardGraph, CudaError> {
        self.context.enter()?;
        let (api, stream) = (&self.context.api, self.context.recorder);
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // SAFETY: the stream takes launches down instead of running them until the capture ends, which it does whatever they come
        // to, and nobody else uses it; handles are written to handles, and the graph is destroyed when the executable one has been made of it.
        unsafe {
            let begun = (api.capture_begin)(stream, api::CAPTURE_THREAD_LOCAL);
            api.check("cuStreamBeginCapture", begun).map_err(of_graphs)?;
            let taken = launches.iter().try_for_each(|launch| self.start_on(stream, launch));
            let ended = (api.capture_end)(stream, &mut graph);
            let made = taken
                .and_then(|()| api.check("cuStreamEndCapture", ended))
                .and_then(|()| self.instantiate(graph, &mut exec));
            if !graph.is_null() {
                (api.graph_destroy)(graph);
            }
            made.map_err(of_graphs)?;
        }
        Ok(CardGraph { context: Arc::clone(&self.context), exec: exec as usize })
    }

    fn replay(&self, graph: &CardGraph) -> Result<(), CudaError> {
        self.context.enter()?;
        let api = &self.context.api;
        // SAFETY: the graph lives; what its launches touch is allocated, by the promise of who replays it.
        let launched = unsafe { (api.graph_launch)(graph.exec as Handle, self.context.stream) };
        api.check("cuGraphLaunch", launched).map_err(of_graphs)
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
