//! The kernels on the host, for tests: [`Launcher`] over the C++ in `shim/`.
//!
//! The shim's library is compiled by `$CXX`, `c++`, `g++` or `clang++` when it is first asked for, and kept in the folder
//! that the caller names, by what it was made of. One launch runs at a
//! time. An error of the shim (a race, a place outside a buffer) is a [`CudaError::Call`].

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::{Deref, DerefMut, Range};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_kernels::train::LinearShape;
use draftsmith_kernels::train::linear::{matmul, matmul_acc, matmul_dw_acc, matmul_dx};
use half::bf16;

use crate::error::CudaError;
use crate::launcher::{About, Arg, At, DeviceLink, Launch, Launcher, Message, Operand, Product};
use crate::source;

const HEADER: &str = include_str!("../shim/shim.h");
const MACHINE: &str = include_str!("../shim/shim.cpp");

type RawLaunch =
    unsafe extern "C" fn(*const c_char, u32, u32, u32, *mut *mut c_void, *const u64, u64) -> *const c_char;

/// A library has one machine, and all who load it share it.
static RUNNING: Mutex<()> = Mutex::new(());

/// The compiled shim.
struct Library {
    launch: RawLaunch,
    alloc: unsafe extern "C" fn(u64) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    data: unsafe extern "C" fn(*mut c_void) -> *mut u8,
    _library: libloading::Library,
}

/// A device whose kernels run on the host.
#[derive(Clone)]
pub struct Shim {
    library: Arc<Library>,
    /// Bytes that it has, and that are in use.
    limit: u64,
    used: Arc<AtomicU64>,
    /// Bytes that were copied to it and from it.
    copied: Arc<[AtomicU64; 2]>,
    /// How often it was waited for, and one.
    waits: Arc<AtomicU64>,
    /// Blocks that ran, by kernel.
    blocks: Arc<Mutex<BTreeMap<&'static str, usize>>>,
}

/// Memory of a [`Shim`].
pub struct ShimMemory {
    shim: Shim,
    buffer: *mut c_void,
    bytes: usize,
}

// SAFETY: the shim's buffers belong to no thread; launches and copies are kept apart by a lock.
unsafe impl Send for ShimMemory {}
// SAFETY: as above.
unsafe impl Sync for ShimMemory {}

impl Drop for ShimMemory {
    fn drop(&mut self) {
        self.shim.used.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        // SAFETY: allocated by the shim and freed once.
        unsafe { (self.shim.library.free)(self.buffer) };
    }
}

/// Memory of the host that a [`Shim`] copies from. It panics where it is changed while a card might still read it.
pub struct ShimStaging {
    bytes: Vec<u8>,
    /// How often the device had been waited for when it was copied last.
    copied: AtomicU64,
    waits: Arc<AtomicU64>,
    /// Copies beside the work read it.
    read: Arc<AtomicBool>,
}

/// Copies of a [`Shim`] beside its work. They happen as late as they may: where somebody waits for them.
pub struct ShimMark {
    shim: Shim,
    copies: Mutex<Vec<(*mut c_void, usize, Vec<u8>)>>,
    read: Arc<AtomicBool>,
}

// SAFETY: the shim's buffers belong to no thread; copies are kept apart by a lock.
unsafe impl Send for ShimMark {}
// SAFETY: as above.
unsafe impl Sync for ShimMark {}

impl ShimMark {
    /// Makes the copies, unless they were made.
    fn copy(&self) {
        let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        for (buffer, offset, bytes) in copies.drain(..) {
            // SAFETY: the places were checked when the copies were asked for; their memory lives until somebody waited for them.
            unsafe {
                let place = (self.shim.library.data)(buffer).add(offset);
                place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            }
        }
    }
}

impl Deref for ShimStaging {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for ShimStaging {
    fn deref_mut(&mut self) -> &mut [u8] {
        let done = *self.copied.get_mut() < self.waits.load(Ordering::Relaxed);
        let done = done && !self.read.load(Ordering::Relaxed);
        assert!(done, "memory of the host changes before the device was waited for");
        &mut self.bytes
    }
}

/// A pointer as the shim's kernels take it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Pointer {
    buffer: *mut c_void,
    at: i64,
    begin: i64,
    end: i64,
}

/// An argument in memory of its own, as the shim's kernels take it.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Stored {
    Pointers(Vec<Pointer>),
    Word([u8; 8], u64),
}

/// A launch on a [`Shim`].
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ShimLaunch {
    kernel: &'static str,
    grid: (usize, usize),
    threads: u32,
    args: Vec<Stored>,
}

// SAFETY: the shim's buffers belong to no thread; launches are kept apart by a lock.
unsafe impl Send for ShimLaunch {}
// SAFETY: as above.
unsafe impl Sync for ShimLaunch {}

fn failed(call: &'static str, reason: impl Into<String>) -> CudaError {
    CudaError::Call { call, reason: reason.into() }
}

/// Compiles a program of kernels behind the shim into `folder`, unless that was done before.
fn compile(folder: &Path, kernels: &str) -> Result<PathBuf, CudaError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let wrong = |error: std::io::Error| failed("the shim's files", error.to_string());
    let program = format!("#define DRAFTSMITH_SHIM\n{kernels}\n#line 1 \"shim.cpp\"\n{MACHINE}");
    let name = format!("shim-{:016x}.so", source::mark(&format!("{HEADER}{program}")));
    let library = folder.join(name);
    if library.is_file() {
        return Ok(library);
    }
    // Others may be at the same: each works in a folder of its own, and the last one's file stays.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let own = folder.join(format!("shim-{}-{count}", std::process::id()));
    std::fs::create_dir_all(&own).map_err(wrong)?;
    std::fs::write(own.join("shim.h"), HEADER).map_err(wrong)?;
    std::fs::write(own.join("kernels.cpp"), program).map_err(wrong)?;
    let chosen = std::env::var("CXX").ok();
    let compilers = chosen.iter().map(String::as_str).chain(["c++", "g++", "clang++"]);
    for compiler in compilers {
        let mut command = Command::new(compiler);
        command.args(["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-o"]);
        command.arg(own.join("shim.so")).arg(own.join("kernels.cpp"));
        match command.output() {
            Ok(done) if done.status.success() => {
                std::fs::rename(own.join("shim.so"), &library).map_err(wrong)?;
                std::fs::remove_dir_all(&own).map_err(wrong)?;
                return Ok(library);
            }
            Ok(done) => return Err(failed("the C++ compiler", String::from_utf8_lossy(&done.stderr))),
            Err(_) => {}
        }
    }
    Err(failed("the C++ compiler", "none of `$CXX`, `c++`, `g++`, `clang++` starts: install one"))
}

impl Shim {
    /// The kernels of this crate, with memory enough.
    ///
    /// # Errors
    /// If they do not compile.
    pub fn new(folder: &Path) -> Result<Shim, CudaError> {
        Shim::of(folder, &source::text(), u64::MAX)
    }

    /// Other kernels, and so many bytes of memory.
    ///
    /// # Errors
    /// If they do not compile.
    pub fn of(folder: &Path, kernels: &str, limit: u64) -> Result<Shim, CudaError> {
        let path = compile(folder, kernels)?;
        // SAFETY: the library was compiled from our own files; loading it registers its kernels.
        let library = unsafe { libloading::Library::new(path) }
            .map_err(|error| failed("the shim", error.to_string()))?;
        // SAFETY: the types are those of the functions in `shim.cpp`; the library is kept beside the pointers.
        let library = unsafe {
            Library {
                launch: symbol(&library, b"shim_launch\0")?,
                alloc: symbol(&library, b"shim_alloc\0")?,
                free: symbol(&library, b"shim_free\0")?,
                data: symbol(&library, b"shim_data\0")?,
                _library: library,
            }
        };
        Ok(Shim {
            library: Arc::new(library),
            limit,
            used: Arc::default(),
            copied: Arc::default(),
            waits: Arc::new(1.into()),
            blocks: Arc::default(),
        })
    }

    /// Bytes that were copied to the device and from it so far, without the operands of products, which run on the host here.
    pub fn copied(&self) -> [u64; 2] {
        [0, 1].map(|way| self.copied[way].load(Ordering::Relaxed))
    }

    /// Blocks of a kernel that ran so far.
    pub fn blocks(&self, kernel: &str) -> usize {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.get(kernel).copied().unwrap_or_default()
    }

    fn put(&self, to: At<'_, ShimMemory>, data: &[u8]) -> Result<(), CudaError> {
        let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let place = self.bytes(to, data.len())?;
        // SAFETY: so many bytes are there, and nobody else is at the device's memory.
        unsafe { place.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        Ok(())
    }

    fn get(&self, from: At<'_, ShimMemory>, out: &mut [u8]) -> Result<(), CudaError> {
        let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let place = self.bytes(from, out.len())?;
        // SAFETY: as above.
        unsafe { out.as_mut_ptr().copy_from_nonoverlapping(place, out.len()) };
        Ok(())
    }

    /// The bytes from a place on.
    fn bytes(&self, at: At<'_, ShimMemory>, len: usize) -> Result<*mut u8, CudaError> {
        let end = at.within.1.min(at.memory.bytes);
        if at.offset + len > end {
            let reason = format!("{len} bytes from {} of {end}", at.offset);
            return Err(failed("a copy or a product", reason));
        }
        // SAFETY: inside the buffer, checked just above.
        Ok(unsafe { (self.library.data)(at.memory.buffer).add(at.offset) })
    }

    /// Values of an operand, widened.
    fn operand(&self, at: At<'_, ShimMemory>, len: usize, kind: Operand) -> Result<Vec<f32>, CudaError> {
        let mut bytes = vec![0u8; len * kind.bytes()];
        self.get(at, &mut bytes)?;
        let values = bytes.chunks_exact(kind.bytes());
        Ok(match kind {
            Operand::F32 => values.map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Operand::Bf16 => values.map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
        })
    }
}

/// # Safety
/// `T` is the type of the function.
unsafe fn symbol<T: Copy>(library: &libloading::Library, name: &[u8]) -> Result<T, CudaError> {
    // SAFETY: the caller's promise.
    let found = unsafe { library.get::<T>(name) };
    found.map(|f| *f).map_err(|error| failed("the shim", error.to_string()))
}

impl Launcher for Shim {
    type Memory = ShimMemory;
    type Ready = ShimLaunch;
    type Graph = Vec<ShimLaunch>;
    type Staging = ShimStaging;
    type Mark = ShimMark;

    fn about(&self) -> About {
        About {
            number: 0,
            card: "none: the kernels run on the host, for tests".to_owned(),
            capability: "0.0".to_owned(),
            memory: self.limit,
            driver: "none".to_owned(),
        }
    }

    fn memory(&self) -> Result<(u64, u64), CudaError> {
        Ok((self.limit - self.used.load(Ordering::Relaxed), self.limit))
    }

    fn allocate(&self, bytes: usize) -> Result<ShimMemory, CudaError> {
        let used = self.used.load(Ordering::Relaxed);
        let free = self.limit - used;
        if bytes as u64 > free {
            return Err(CudaError::Memory { wanted: bytes as u64, free, total: self.limit });
        }
        self.used.fetch_add(bytes as u64, Ordering::Relaxed);
        // SAFETY: takes a size.
        let buffer = unsafe { (self.library.alloc)(bytes as u64) };
        Ok(ShimMemory { shim: self.clone(), buffer, bytes })
    }

    fn write(&self, to: At<'_, ShimMemory>, data: &[u8]) -> Result<(), CudaError> {
        self.copied[0].fetch_add(data.len() as u64, Ordering::Relaxed);
        self.put(to, data)
    }

    fn staging(&self, bytes: usize) -> Result<ShimStaging, CudaError> {
        let (waits, read) = (Arc::clone(&self.waits), Arc::default());
        Ok(ShimStaging { bytes: vec![0; bytes], copied: AtomicU64::new(0), waits, read })
    }

    fn write_staged(
        &self,
        to: At<'_, ShimMemory>,
        from: &ShimStaging,
        bytes: usize,
    ) -> Result<(), CudaError> {
        from.copied.store(self.waits.load(Ordering::Relaxed), Ordering::Relaxed);
        self.write(to, &from[..bytes])
    }

    fn read(&self, from: At<'_, ShimMemory>, out: &mut [u8]) -> Result<(), CudaError> {
        self.copied[1].fetch_add(out.len() as u64, Ordering::Relaxed);
        self.wait()?;
        self.get(from, out)
    }

    fn copy_beside(
        &self,
        copies: &[(At<'_, ShimMemory>, Range<usize>)],
        from: &ShimStaging,
    ) -> Result<ShimMark, CudaError> {
        let mut kept = Vec::new();
        for (to, bytes) in copies {
            self.copied[0].fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.bytes(*to, bytes.len())?;
            kept.push((to.memory.buffer, to.offset, from[bytes.clone()].to_vec()));
        }
        from.read.store(true, Ordering::Relaxed);
        Ok(ShimMark { shim: self.clone(), copies: Mutex::new(kept), read: Arc::clone(&from.read) })
    }

    fn after(&self, mark: &ShimMark) -> Result<(), CudaError> {
        mark.copy();
        Ok(())
    }

    fn wait_for(&self, mark: &ShimMark) -> Result<(), CudaError> {
        mark.copy();
        mark.read.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn ready(&self, launch: Launch<'_, ShimMemory>) -> Result<ShimLaunch, CudaError> {
        let pointer = |at: &Option<At<'_, ShimMemory>>| match at {
            Some(at) => {
                let (begin, end) = (at.within.0 as i64, at.within.1.min(at.memory.bytes) as i64);
                Pointer { buffer: at.memory.buffer, at: at.offset as i64, begin, end }
            }
            None => Pointer { buffer: std::ptr::null_mut(), at: 0, begin: 0, end: 0 },
        };
        let wide = |bytes: [u8; 4]| {
            let mut all = [0; 8];
            all[..4].copy_from_slice(&bytes);
            Stored::Word(all, 4)
        };
        let args = launch.args.iter().map(|arg| match arg {
            Arg::Buffer(at) => Stored::Pointers(vec![pointer(at)]),
            Arg::Buffers(all) => Stored::Pointers(all.iter().map(pointer).collect()),
            Arg::I32(x) => wide(x.to_ne_bytes()),
            Arg::U32(x) => wide(x.to_ne_bytes()),
            Arg::F32(x) => wide(x.to_ne_bytes()),
            Arg::I64(x) => Stored::Word(x.to_ne_bytes(), 8),
        });
        let Launch { kernel, grid, threads, .. } = launch;
        Ok(ShimLaunch { kernel, grid, threads, args: args.collect() })
    }

    fn start(&self, launch: &ShimLaunch) -> Result<(), CudaError> {
        let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stored = launch.args.clone();
        let (mut arguments, sizes): (Vec<*mut c_void>, Vec<u64>) = stored
            .iter_mut()
            .map(|s| match s {
                Stored::Pointers(all) => (all.as_mut_ptr().cast(), (all.len() * size_of::<Pointer>()) as u64),
                Stored::Word(bytes, size) => (bytes.as_mut_ptr().cast(), *size),
            })
            .unzip();
        let name = CString::new(launch.kernel).map_err(|_| failed("shim_launch", "a name with NUL"))?;
        // SAFETY: the shim compares number and sizes of the arguments with the kernel's parameters before it reads them;
        // the text it returns lives until the next launch, which the lock keeps away.
        unsafe {
            let error = (self.library.launch)(
                name.as_ptr(),
                launch.grid.0 as u32,
                launch.grid.1 as u32,
                launch.threads,
                arguments.as_mut_ptr(),
                sizes.as_ptr(),
                sizes.len() as u64,
            );
            if error.is_null() {
                let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
                *blocks.entry(launch.kernel).or_default() += launch.grid.0 * launch.grid.1;
                return Ok(());
            }
            Err(failed("shim_launch", CStr::from_ptr(error).to_string_lossy()))
        }
    }

    fn record(&self, launches: &[ShimLaunch]) -> Result<Vec<ShimLaunch>, CudaError> {
        Ok(launches.to_vec())
    }

    fn replay(&self, graph: &Vec<ShimLaunch>) -> Result<(), CudaError> {
        graph.iter().try_for_each(|launch| self.start(launch))
    }

    fn product(
        &self,
        p: Product,
        a: At<'_, ShimMemory>,
        b: At<'_, ShimMemory>,
        c: At<'_, ShimMemory>,
    ) -> Result<(), CudaError> {
        let (a, b) = (self.operand(a, p.m * p.k, p.operands)?, self.operand(b, p.k * p.n, p.operands)?);
        let mut out = vec![0.0f32; p.m * p.n];
        self.get(c, bytemuck::cast_slice_mut(&mut out))?;
        match (p.a_transposed, p.b_transposed, p.accumulate) {
            (false, true, false) => {
                matmul(1, &a, &b, LinearShape { rows: p.m, out: p.n, inp: p.k }, &mut out)
            }
            (false, true, true) => {
                matmul_acc(1, &a, &b, LinearShape { rows: p.m, out: p.n, inp: p.k }, &mut out);
            }
            (false, false, add) => {
                matmul_dx(1, &a, &b, LinearShape { rows: p.m, out: p.k, inp: p.n }, add, &mut out);
            }
            (true, false, add) => {
                if !add {
                    out.fill(0.0);
                }
                matmul_dw_acc(1, &a, &b, LinearShape { rows: p.k, out: p.m, inp: p.n }, &mut out);
            }
            (true, true, _) => return Err(failed("a product", "both operands are transposed")),
        }
        self.put(c, bytemuck::cast_slice(&out))
    }
}

/// A way between devices that threads of one process have.
pub struct ShimLink {
    rank: usize,
    /// By rank.
    to: Vec<Sender<Vec<u8>>>,
    /// By rank.
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

/// Ends for the devices of so many threads, by rank.
pub fn links(ranks: usize) -> Vec<ShimLink> {
    let mut links: Vec<ShimLink> =
        (0..ranks).map(|rank| ShimLink { rank, to: Vec::new(), from: Vec::new() }).collect();
    for from in 0..ranks {
        for to in 0..ranks {
            let (sender, receiver) = channel();
            links[from].to.push(sender);
            links[to].from.push(Mutex::new(receiver));
        }
    }
    links
}

impl ShimLink {
    /// What a card would take without a word and get wrong.
    fn check(
        &self,
        outgoing: &[Message<'_, ShimMemory>],
        incoming: &[Message<'_, ShimMemory>],
    ) -> Result<(), CudaError> {
        let wrong = |reason: &str| Err(failed("an exchange", reason));
        let all = || outgoing.iter().chain(incoming);
        if all().any(|message| message.rank == self.rank || message.rank >= self.to.len()) {
            return wrong("a message to nobody else");
        }
        if all().any(|message| message.bytes == 0 || message.bytes % size_of::<f32>() != 0) {
            return wrong("a message of no whole values");
        }
        let overlap = |a: &Message<'_, ShimMemory>, b: &Message<'_, ShimMemory>| {
            let (from, to) = (a.at.offset, b.at.offset);
            a.at.memory.buffer == b.at.memory.buffer && from < to + b.bytes && to < from + a.bytes
        };
        for (i, message) in incoming.iter().enumerate() {
            if outgoing.iter().chain(&incoming[..i]).any(|other| overlap(message, other)) {
                return wrong("what comes in overlaps another message");
            }
        }
        Ok(())
    }
}

impl DeviceLink<ShimMemory> for ShimLink {
    fn exchange(
        &self,
        outgoing: &[Message<'_, ShimMemory>],
        incoming: &[Message<'_, ShimMemory>],
    ) -> Result<(), CudaError> {
        self.check(outgoing, incoming)?;
        let gone = || failed("an exchange", "another thread is gone");
        for message in outgoing {
            let mut bytes = vec![0; message.bytes];
            message.at.memory.shim.get(message.at, &mut bytes)?;
            self.to[message.rank].send(bytes).map_err(|_| gone())?;
        }
        for message in incoming {
            let from = self.from[message.rank].lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = from.recv().map_err(|_| gone())?;
            if bytes.len() != message.bytes {
                let reason = format!("{} bytes came, {} were expected", bytes.len(), message.bytes);
                return Err(failed("an exchange", reason));
            }
            message.at.memory.shim.put(message.at, &bytes)?;
        }
        Ok(())
    }

    fn end(&self) -> Result<(), CudaError> {
        Ok(())
    }
}
