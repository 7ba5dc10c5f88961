//! Device memory that is used again, and the buffers of the operations.
//!
//! A block that is dropped goes back to its pool and serves the next request of its size class. All work runs in the order
//! of the calls on one stream, so a block may be handed out while what used it before still runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_kernels::Buffer;

use crate::error::CudaError;
use crate::launcher::{At, Launcher};
use crate::stream::{Among, Stream};

/// Smallest block.
const LEAST: usize = 512;

/// Unused memory of one size class, by the number of its allocation.
type Unused<L> = BTreeMap<u64, <L as Launcher>::Memory>;

/// Memory of a device by size class.
pub(crate) struct Pool<L: Launcher> {
    pub(crate) stream: Stream<L>,
    free: Mutex<BTreeMap<usize, Unused<L>>>,
    allocated: AtomicU64,
}

/// Bytes that a request is given: at most an eighth more, so that requests of like sizes share blocks.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(LEAST);
    let step = (bytes.next_power_of_two() / 16).max(LEAST);
    bytes.div_ceil(step) * step
}

impl<L: Launcher> Pool<L> {
    pub(crate) fn new(stream: Stream<L>) -> Arc<Pool<L>> {
        Arc::new(Pool { stream, free: Mutex::new(BTreeMap::new()), allocated: AtomicU64::new(0) })
    }

    /// A block of at least `bytes`.
    ///
    /// # Errors
    /// [`CudaError::Memory`], after everything that lies unused was given back.
    pub(crate) fn take(self: &Arc<Pool<L>>, bytes: usize) -> Result<Block<L>, CudaError> {
        let class = size_class(bytes);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The oldest first: work that comes again finds the memory that it had.
        let kept = free.get_mut(&class).and_then(BTreeMap::pop_first);
        let (number, memory) = match kept {
            Some(kept) => kept,
            None => {
                let launcher = self.stream.launcher();
                let memory = match launcher.allocate(class) {
                    Err(CudaError::Memory { .. }) => {
                        self.stream.forget()?;
                        free.clear();
                        launcher.allocate(class)?
                    }
                    other => other?,
                };
                (self.allocated.fetch_add(1, Ordering::Relaxed), memory)
            }
        };
        Ok(Block { memory: Some(memory), number, bytes, class, pool: Arc::clone(self) })
    }
}

/// A piece of device memory.
pub(crate) struct Block<L: Launcher> {
    /// Always there until the block is dropped.
    memory: Option<L::Memory>,
    /// Of the allocation.
    number: u64,
    /// That were asked for.
    bytes: usize,
    class: usize,
    pool: Arc<Pool<L>>,
}

impl<L: Launcher> Block<L> {
    /// A place `offset` bytes from the beginning.
    pub(crate) fn at(&self, offset: usize) -> At<'_, L::Memory> {
        let memory = self.memory.as_ref().expect("a block has memory until it is dropped");
        At { memory, offset, within: (0, self.bytes) }
    }
}

impl<L: Launcher> Drop for Block<L> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.entry(self.class).or_default().insert(self.number, memory);
        }
    }
}

/// A table on the device, for launches that are asked for while it is held.
pub(crate) enum Table<L: Launcher> {
    /// Among others that one copy brings.
    Among(Among<L>),
    /// In memory of its own.
    Own(Block<L>),
}

impl<L: Launcher> Table<L> {
    /// A place `offset` bytes from the beginning.
    pub(crate) fn at(&self, offset: usize) -> At<'_, L::Memory> {
        match self {
            Table::Among((memory, within)) => At { memory, offset: within.0 + offset, within: *within },
            Table::Own(block) => block.at(offset),
        }
    }
}

/// A table that the next layers of a step are given again if they ask for the same.
pub(crate) struct KeptTable<L: Launcher> {
    pub(crate) words: Vec<u32>,
    pub(crate) table: Arc<Table<L>>,
}

/// The copy of a buffer that products read.
pub(crate) struct Half<L: Launcher> {
    pub(crate) block: Arc<Block<L>>,
    /// Values that were rounded.
    pub(crate) len: usize,
}

/// An array of f32 on the device, and, once a product has asked for it, its values rounded to bf16. Whatever writes to the
/// array drops the rounded copy, or writes it too.
pub struct Buf<L: Launcher> {
    pub(crate) capacity: usize,
    pub(crate) block: Option<Block<L>>,
    pub(crate) half: Mutex<Option<Half<L>>>,
}

impl<L: Launcher> Default for Buf<L> {
    fn default() -> Buf<L> {
        Buf { capacity: 0, block: None, half: Mutex::new(None) }
    }
}

impl<L: Launcher> Buf<L> {
    /// The place of value `index`, if the buffer has memory at all.
    pub(crate) fn place(&self, index: usize) -> Option<At<'_, L::Memory>> {
        self.block.as_ref().map(|block| block.at(index * size_of::<f32>()))
    }

    /// Forgets the rounded copy: the values change.
    pub(crate) fn changed(&mut self) {
        *self.half.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<L: Launcher> Buffer for Buf<L> {
    fn give_back(&mut self) {
        *self = Buf::default();
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn a_block_is_at_most_an_eighth_larger_than_what_was_asked_for() {
        for bytes in [0usize, 1, 512, 513, 4096, 5000, 100_000, (1 << 30) + 1] {
            let class = size_class(bytes);
            assert!(class >= bytes && class <= (bytes + bytes / 8).max(bytes + 512), "{bytes} in {class}");
            assert_eq!(size_class(class), class);
        }
    }
}
