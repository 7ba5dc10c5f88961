//! The seam below the operations: memory, launches and matrix products of one device. A card behind the driver is one
//! ([`crate::Card`]), the host shim of the tests the other.

use std::hash::Hash;
use std::ops::{DerefMut, Range};

use crate::error::CudaError;

/// A place in a device's memory, in bytes from its beginning.
pub struct At<'a, M> {
    /// The allocation.
    pub memory: &'a M,
    /// Bytes from its beginning.
    pub offset: usize,
    /// First byte of what the place is in, and the one behind its last: an allocation may be larger than what was asked for, or
    /// have several tables. The host shim holds kernels to it.
    pub within: (usize, usize),
}

impl<'a, M> At<'a, M> {
    /// A place in an allocation that is one thing as a whole.
    pub fn new(memory: &'a M, offset: usize) -> At<'a, M> {
        At { memory, offset, within: (0, usize::MAX) }
    }

    /// So many bytes further on.
    pub fn plus(self, bytes: usize) -> At<'a, M> {
        At { offset: self.offset + bytes, ..self }
    }
}

impl<M> Clone for At<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M> Copy for At<'_, M> {}

/// An argument of a kernel. Its size is that of the kernel's parameter.
pub enum Arg<'a, M> {
    /// A buffer, or the null buffer.
    Buffer(Option<At<'a, M>>),
    /// A structure of buffers.
    Buffers(Vec<Option<At<'a, M>>>),
    /// `int`
    I32(i32),
    /// `u32`
    U32(u32),
    /// `i64`
    I64(i64),
    /// `float`
    F32(f32),
}

/// Arguments as the driver takes them.
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct Words {
    /// One after the other, eight bytes each or a multiple of that: little-endian, so that a smaller number stands at the beginning
    /// of its place.
    pub(crate) values: Vec<u64>,
    /// Where each of them begins.
    pub(crate) starts: Vec<usize>,
}

impl Words {
    /// Arguments with the addresses of their places; the null buffer is 0.
    pub(crate) fn of<M>(args: &[Arg<'_, M>], address: impl Fn(&At<'_, M>) -> u64) -> Words {
        let address = |at: &Option<At<'_, M>>| at.as_ref().map_or(0, &address);
        let (mut values, mut starts) = (Vec::with_capacity(args.len()), Vec::new());
        for arg in args {
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
        Words { values, starts }
    }
}

/// A launch of a kernel.
pub struct Launch<'a, M> {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks along x and y.
    pub grid: (usize, usize),
    /// Threads of a block: whole warps, 256 at most.
    pub threads: u32,
    /// In the order of the kernel's parameters.
    pub args: &'a [Arg<'a, M>],
}

/// Types of the operands of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// 32 bits, not rounded.
    F32,
    /// bfloat16; sums are f32.
    Bf16,
}

impl Operand {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Operand::F32 => 4,
            Operand::Bf16 => 2,
        }
    }
}

/// `c[m, n] (+)= a · b` of dense row-major matrices; `c` is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// `a` stands as `[k, m]` instead of `[m, k]`.
    pub a_transposed: bool,
    /// `b` stands as `[n, k]` instead of `[k, n]`.
    pub b_transposed: bool,
    /// Adds to `c` instead of overwriting it.
    pub accumulate: bool,
    /// Type of `a` and `b`.
    pub operands: Operand,
}

/// What a device is, for records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// `N` of `cuda:N`.
    pub number: usize,
    /// `NVIDIA H100 80GB HBM3`.
    pub card: String,
    /// Compute capability, `9.0`.
    pub capability: String,
    /// Bytes of memory.
    pub memory: u64,
    /// The CUDA that the driver knows, `13.0`.
    pub driver: String,
}

/// Bytes for the device of another process, or a place for bytes from there.
pub struct Message<'a, M> {
    /// The other process.
    pub rank: usize,
    /// Where they are, or are to be.
    pub at: At<'a, M>,
    /// How many there are: whole values of four bytes.
    pub bytes: usize,
}

/// A way from the memory of a device to that of other processes' devices.
pub trait DeviceLink<M>: Send + Sync {
    /// As [`draftsmith_kernels::Peers::exchange`], in the order of the device's calls: what was started before is sent, and what
    /// is started afterwards finds what came. Returns when all is there.
    ///
    /// # Errors
    /// A message that the library refuses, or another process that is lost.
    fn exchange(&self, outgoing: &[Message<'_, M>], incoming: &[Message<'_, M>]) -> Result<(), CudaError>;
    /// Gives up what the link takes of the device. All processes call this, and it returns when all have: where something failed
    /// nobody does. Nothing is exchanged afterwards.
    ///
    /// # Errors
    /// What the library says.
    fn end(&self) -> Result<(), CudaError>;
}

/// A device. Everything runs in the order of the calls.
pub trait Launcher: Send + Sync + 'static {
    /// An allocation; dropping it gives it back.
    type Memory: Send + Sync;
    /// A launch with all that its start needs, beside the memory itself. Equal ones do the same.
    type Ready: Eq + Hash + Send + Sync;
    /// Launches that the device knows as one.
    type Graph: Send + Sync;
    /// Memory of the host that the device copies from by itself.
    type Staging: DerefMut<Target = [u8]> + Send;
    /// The end of copies beside the work.
    type Mark: Send + Sync;

    /// `bytes` of memory with unspecified content, aligned for everything.
    ///
    /// # Errors
    /// [`CudaError::Memory`] if there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, CudaError>;
    /// `bytes` of memory of the host.
    ///
    /// # Errors
    /// What the driver refuses.
    fn staging(&self, bytes: usize) -> Result<Self::Staging, CudaError>;
    /// Copies from the host; `data` may change when the call returns.
    ///
    /// # Errors
    /// What the driver refuses.
    fn write(&self, to: At<'_, Self::Memory>, data: &[u8]) -> Result<(), CudaError>;
    /// Copies the first `bytes` of host memory, which must not change before the next [`Launcher::read`] or [`Launcher::wait`] has
    /// returned.
    ///
    /// # Errors
    /// What the driver refuses.
    fn write_staged(
        &self,
        to: At<'_, Self::Memory>,
        from: &Self::Staging,
        bytes: usize,
    ) -> Result<(), CudaError>;
    /// Copies pieces of host memory beside the work: they begin when all calls before are done, and later ones do not wait for them
    /// ([`Launcher::after`]). The host memory must not change before [`Launcher::wait_for`] has returned.
    ///
    /// # Errors
    /// What the driver refuses.
    fn copy_beside(
        &self,
        copies: &[(At<'_, Self::Memory>, Range<usize>)],
        from: &Self::Staging,
    ) -> Result<Self::Mark, CudaError>;
    /// Calls from now on find what was copied.
    ///
    /// # Errors
    /// What the driver refuses.
    fn after(&self, mark: &Self::Mark) -> Result<(), CudaError>;
    /// Returns when the copies are done.
    ///
    /// # Errors
    /// Their failures.
    fn wait_for(&self, mark: &Self::Mark) -> Result<(), CudaError>;
    /// Copies to the host, when all calls before are done.
    ///
    /// # Errors
    /// What the driver refuses, failures of calls before among them.
    fn read(&self, from: At<'_, Self::Memory>, out: &mut [u8]) -> Result<(), CudaError>;
    /// Returns when all calls before are done.
    ///
    /// # Errors
    /// Their failures.
    fn wait(&self) -> Result<(), CudaError>;
    /// A launch that may be started later, while its memory is allocated.
    ///
    /// # Errors
    /// A kernel that is not there, or sizes that no device takes.
    fn ready(&self, launch: Launch<'_, Self::Memory>) -> Result<Self::Ready, CudaError>;
    /// Starts a kernel.
    ///
    /// # Errors
    /// What the driver refuses.
    fn start(&self, launch: &Self::Ready) -> Result<(), CudaError>;
    /// Makes one of launches, each of which was started before. None of them runs.
    ///
    /// # Errors
    /// What the driver refuses; [`CudaError::Memory`] if the device has no room for it.
    fn record(&self, launches: &[Self::Ready]) -> Result<Self::Graph, CudaError>;
    /// Starts recorded launches, one after the other.
    ///
    /// # Errors
    /// What the driver refuses.
    fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError>;
    /// What the device is, for records.
    fn about(&self) -> About;
    /// Bytes free and in all.
    ///
    /// # Errors
    /// If the driver does not say.
    fn memory(&self) -> Result<(u64, u64), CudaError>;
    /// Starts a product. No size is zero.
    ///
    /// # Errors
    /// What the library refuses.
    fn product(
        &self,
        product: Product,
        a: At<'_, Self::Memory>,
        b: At<'_, Self::Memory>,
        c: At<'_, Self::Memory>,
    ) -> Result<(), CudaError>;
}
