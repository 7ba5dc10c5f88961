//! What the operations are made of: launches over buffers, products, uploads of small tables.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_kernels::{DeviceFailure, RopeTable};

use crate::error::{Asked, CudaError};
use crate::launcher::{Arg, At, DeviceLink, Launch, Launcher, Operand, Product};
use crate::memory::{Block, Buf, Half, KeptTable, Pool, Table};
use crate::pages::{KvShape, Slabs};
use crate::stream::{LARGEST_TABLE, Started, Stream};

/// Threads of a block.
pub(crate) const THREADS: usize = 256;
/// Blocks of a launch whose threads go on in steps.
const BLOCKS: usize = 4096;
/// Blocks that a launch may have along y.
pub(crate) const BLOCKS_Y: usize = 65_535;

/// Settings of [`Cuda`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// What operands of products are rounded to; everything else is f32.
    pub operands: Operands,
    /// Logits over a vocabulary that exist at once; 0: 64 Mi, which are 256 MiB.
    pub logits: usize,
    /// Whether lists of launches that come again start by one call.
    pub graphs: Graphs,
    /// What asked for the device: advice on failures names its settings.
    pub asked: Asked,
}

/// Types of the operands of matrix products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operands {
    /// bfloat16, with sums in f32: what the tensor cores are for.
    #[default]
    Bf16,
    /// Not rounded: to compare with the CPU.
    F32,
}

/// Whether launches that come again word for word are started as a CUDA graph. Nothing that is computed depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Graphs {
    /// They are.
    #[default]
    On,
    /// Each launch is started by itself.
    Off,
}

/// Weights that stand in a larger form on the device than in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expanded {
    /// How many.
    pub weights: usize,
    /// Their bytes in the file.
    pub file_bytes: u64,
    /// Their bytes on the device.
    pub bytes: u64,
}

/// Angles of a RoPE table on the device.
struct Angles<L: Launcher> {
    table: RopeTable,
    positions: usize,
    block: Arc<Block<L>>,
}

/// Pages of keys and values by their shape.
pub(crate) type SlabsByShape<L> = HashMap<KvShape, Arc<Mutex<Slabs<L>>>>;

/// The operations of training and decoding on one device.
pub struct Cuda<L: Launcher> {
    pub(crate) pool: Arc<Pool<L>>,
    pub(crate) operands: Operands,
    pub(crate) logits_at_once: usize,
    asked: Asked,
    /// Weights that the device holds in a larger form than the file, by the type in the file.
    pub(crate) expanded: Arc<Mutex<BTreeMap<String, Expanded>>>,
    angles: Arc<Mutex<Vec<Angles<L>>>>,
    /// Pages of keys and values by their shape.
    pub(crate) slabs: Arc<Mutex<SlabsByShape<L>>>,
    /// Tables of the last steps.
    pub(crate) tables: Arc<Mutex<Vec<KeptTable<L>>>>,
    /// The way to the devices of other processes.
    pub(crate) link: Option<Arc<dyn DeviceLink<L::Memory>>>,
}

impl<L: Launcher> Clone for Cuda<L> {
    fn clone(&self) -> Self {
        Cuda {
            pool: Arc::clone(&self.pool),
            operands: self.operands,
            logits_at_once: self.logits_at_once,
            asked: self.asked,
            expanded: Arc::clone(&self.expanded),
            angles: Arc::clone(&self.angles),
            slabs: Arc::clone(&self.slabs),
            tables: Arc::clone(&self.tables),
            link: self.link.clone(),
        }
    }
}

/// An argument that may be the null buffer.
pub(crate) type Place<'a, L> = Option<At<'a, <L as Launcher>::Memory>>;

impl<L: Launcher> Cuda<L> {
    /// The operations on a device.
    pub fn new(launcher: L, options: CudaOptions) -> Cuda<L> {
        Cuda {
            pool: Pool::new(Stream::new(launcher, options.graphs == Graphs::On)),
            operands: options.operands,
            logits_at_once: if options.logits == 0 { 1 << 26 } else { options.logits },
            asked: options.asked,
            expanded: Arc::default(),
            angles: Arc::default(),
            slabs: Arc::default(),
            tables: Arc::default(),
            link: None,
        }
    }

    /// `to[..len] (+)= from[..len]`, each from its place on.
    pub(crate) fn copy_values(
        &self,
        from: Option<At<'_, L::Memory>>,
        to: Option<At<'_, L::Memory>>,
        len: usize,
        accumulate: bool,
    ) {
        let args = [Arg::Buffer(from), Arg::Buffer(to), Arg::I64(len as i64), Arg::I32(accumulate.into())];
        self.over(len, "add_to", &args);
    }

    /// The same device, with a way to those of other processes.
    pub fn with_peers(self, link: impl DeviceLink<L::Memory> + 'static) -> Cuda<L> {
        Cuda { link: Some(Arc::new(link)), ..self }
    }

    /// Gives up the way to the devices of other processes, as all of them do: [`DeviceLink::end`].
    ///
    /// # Errors
    /// As there.
    pub fn end_peers(&self) -> Result<(), CudaError> {
        self.link.as_ref().map_or(Ok(()), |link| link.end())
    }

    /// The device.
    pub fn launcher(&self) -> &L {
        self.pool.stream.launcher()
    }

    /// What it was asked to start so far.
    pub fn started(&self) -> Started {
        self.pool.stream.started()
    }

    /// Weights that were put on the device in a larger form than the file has since this was last asked, by the type in the file.
    pub fn take_expanded(&self) -> BTreeMap<String, Expanded> {
        std::mem::take(&mut *self.expanded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether so much memory is free.
    ///
    /// # Errors
    /// [`CudaError::Memory`], which names what is free.
    pub fn room(&self, bytes: u64) -> Result<(), CudaError> {
        let (free, total) = self.launcher().memory()?;
        if bytes > free { Err(CudaError::Memory { wanted: bytes, free, total }) } else { Ok(()) }
    }

    /// Tries whether so much memory can be had, and gives it back.
    ///
    /// # Errors
    /// [`CudaError::Memory`], which names what is free.
    pub fn reserve(&self, bytes: usize) -> Result<(), CudaError> {
        self.pool.take(bytes).map(drop)
    }

    /// The operations' signatures know no errors (only memory can run out, and a card can fail): what goes wrong under way
    /// leaves them as a [`DeviceFailure`].
    pub(crate) fn must<T>(&self, result: Result<T, CudaError>) -> T {
        match result {
            Ok(value) => value,
            Err(error) => self.failure(error).raise(),
        }
    }

    /// An error as who asked for the device hears of it.
    pub(crate) fn failure(&self, error: CudaError) -> DeviceFailure {
        error.failure(self.asked)
    }

    pub(crate) fn block(&self, bytes: usize) -> Block<L> {
        self.must(self.pool.take(bytes))
    }

    /// Values that stay on the device.
    pub(crate) fn put_values<T: bytemuck::Pod>(&self, values: &[T]) -> Block<L> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let block = self.block(bytes.len());
        self.must(self.pool.stream.write(block.at(0), bytes));
        block
    }

    /// A table for launches that are asked for while it is held.
    pub(crate) fn table<T: bytemuck::Pod>(&self, values: &[T]) -> Table<L> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len() <= LARGEST_TABLE {
            match self.pool.stream.table(bytes) {
                // The pool may have memory that lies unused.
                Err(CudaError::Memory { .. }) => {}
                other => return Table::Among(self.must(other)),
            }
        }
        Table::Own(self.put_values(values))
    }

    /// Host copies of `out.len()` values from a place on.
    pub(crate) fn fetch<T: bytemuck::Pod>(&self, from: At<'_, L::Memory>, out: &mut [T]) {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.must(self.pool.stream.read(from, bytemuck::cast_slice_mut(out)));
    }

    /// A launch of whole blocks.
    pub(crate) fn launch(
        &self,
        kernel: &'static str,
        grid: (usize, usize),
        threads: usize,
        args: &[Arg<'_, L::Memory>],
    ) {
        if grid.0 == 0 || grid.1 == 0 {
            return;
        }
        assert!(grid.1 <= BLOCKS_Y, "{} blocks along y", grid.1);
        self.must(self.pool.stream.launch(Launch { kernel, grid, threads: threads as u32, args }));
    }

    /// A launch over `count` values.
    pub(crate) fn over(&self, count: usize, kernel: &'static str, args: &[Arg<'_, L::Memory>]) {
        self.launch(kernel, (count.div_ceil(THREADS).min(BLOCKS), 1), THREADS, args);
    }

    /// A launch of a warp for each of `count`.
    pub(crate) fn warps(&self, count: usize, kernel: &'static str, args: &[Arg<'_, L::Memory>]) {
        self.launch(kernel, (count.div_ceil(THREADS / 32), 1), THREADS, args);
    }

    /// The first `len` values rounded to bf16, from the buffer's copy if there is one.
    fn half(&self, buf: &Buf<L>, len: usize) -> Arc<Block<L>> {
        let mut half = buf.half.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(half) = half.as_ref().filter(|half| half.len >= len) {
            return Arc::clone(&half.block);
        }
        let block = Arc::new(self.block(len * 2));
        let args = [Arg::Buffer(buf.place(0)), Arg::Buffer(Some(block.at(0))), Arg::I64(len as i64)];
        self.over(len, "round_to_bf16", &args);
        *half = Some(Half { block: Arc::clone(&block), len });
        block
    }

    /// `c (+)= a · b` from value `first` of `a` and `to` of `c` on; `b` from its beginning, unless `b_first` says otherwise.
    pub(crate) fn product(
        &self,
        mut shape: Product,
        (a, a_first, a_all): (&Buf<L>, usize, usize),
        (b, b_first, b_all): (&Buf<L>, usize, usize),
        c: At<'_, L::Memory>,
    ) {
        if shape.m == 0 || shape.n == 0 {
            return;
        }
        if shape.k == 0 {
            if !shape.accumulate {
                self.fill(c, shape.m * shape.n, 0.0);
            }
            return;
        }
        assert!(a_all <= a.capacity && b_all <= b.capacity, "complete operands");
        let stream = &self.pool.stream;
        match self.operands {
            Operands::F32 => {
                shape.operands = Operand::F32;
                let (a, b) = (a.place(a_first), b.place(b_first));
                let (a, b) = (a.expect("an operand has memory"), b.expect("an operand has memory"));
                self.must(stream.product(shape, a, b, c));
            }
            Operands::Bf16 => {
                shape.operands = Operand::Bf16;
                let (a, b) = (self.half(a, a_all), self.half(b, b_all));
                self.must(stream.product(shape, a.at(a_first * 2), b.at(b_first * 2), c));
            }
        }
    }

    /// Overwrites `count` values.
    pub(crate) fn fill(&self, at: At<'_, L::Memory>, count: usize, value: f32) {
        self.over(count, "fill", &[Arg::Buffer(Some(at)), Arg::F32(value), Arg::I64(count as i64)]);
    }

    /// Cosines and sines of all positions up to `last`.
    pub(crate) fn angles(&self, table: &RopeTable, last: u32) -> Arc<Block<L>> {
        let mut known = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = last as usize + 1;
        if let Some(found) = known.iter().find(|a| a.positions >= needed && a.table == *table) {
            return Arc::clone(&found.block);
        }
        known.retain(|a| a.table != *table);
        let positions = needed.next_multiple_of(1024);
        let values: Vec<f32> = (0..positions as u32)
            .flat_map(|p| {
                let (cos, sin) = table.angles(p);
                cos.iter().chain(sin).copied()
            })
            .collect();
        let block = Arc::new(self.put_values(&values));
        known.push(Angles { table: table.clone(), positions, block: Arc::clone(&block) });
        block
    }
}
