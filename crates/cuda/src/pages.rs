//! Keys and values in pages: memory that sequences share and give back page by page.
//!
//! A page holds [`PAGE`] slots of one layer of one sequence, in the layout of `decode.cu`. Pages of one shape lie in slabs
//! that are taken when they are needed, each larger than the one before, and stay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use draftsmith_kernels::KvDtype;

use crate::error::CudaError;
use crate::launcher::{Arg, Launcher};
use crate::memory::{Block, Pool};

/// Slots of a page: as many as a warp has lanes.
pub(crate) const PAGE: usize = 32;
/// Slabs that a kernel takes, and where a page's number says in which of them it is.
const SLABS: usize = 32;
const SLAB_SHIFT: u32 = 26;
/// Bytes of the first slab, and of the largest.
const FIRST_SLAB: usize = 1 << 20;
const LARGEST_SLAB: usize = 2 << 30;

/// Shape of keys and values of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KvShape {
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: KvDtype,
}

impl KvShape {
    /// Values of a row of keys.
    pub(crate) fn width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn page_bytes(self) -> usize {
        2 * PAGE * self.width() * self.dtype.bytes()
    }
}

/// The slabs of one shape.
pub(crate) struct Slabs<L: Launcher> {
    shape: KvShape,
    blocks: Vec<Block<L>>,
    free: Vec<u32>,
}

impl<L: Launcher> Slabs<L> {
    pub(crate) fn new(shape: KvShape) -> Slabs<L> {
        Slabs { shape, blocks: Vec::new(), free: Vec::new() }
    }

    /// A page that nobody has.
    fn take(&mut self, pool: &Arc<Pool<L>>) -> Result<u32, CudaError> {
        if let Some(page) = self.free.pop() {
            return Ok(page);
        }
        let (slab, bytes) = (self.blocks.len(), self.shape.page_bytes());
        let wanted = FIRST_SLAB.checked_shl(slab as u32).unwrap_or(LARGEST_SLAB).min(LARGEST_SLAB);
        let pages = (wanted / bytes).clamp(1, 1 << SLAB_SHIFT);
        if slab == SLABS {
            let reason = format!("{slab} slabs of keys and values are full");
            return Err(CudaError::Call { call: "a page of keys and values", reason });
        }
        // Where a large slab is not to be had, a smaller one may be.
        let mut pages = pages;
        let block = loop {
            match pool.take(pages * bytes) {
                Err(CudaError::Memory { .. }) if pages > 1 && slab > 0 => pages /= 4,
                other => break other?,
            }
            pages = pages.max(1);
        };
        self.blocks.push(block);
        let first = (slab as u32) << SLAB_SHIFT;
        // The lowest first.
        self.free.extend((first..first + pages as u32).rev());
        self.take(pool)
    }

    /// All slabs as a kernel takes them.
    pub(crate) fn arg(&self) -> Arg<'_, L::Memory> {
        let there = self.blocks.iter().map(|block| Some(block.at(0)));
        Arg::Buffers(there.chain(std::iter::repeat(None)).take(SLABS).collect())
    }
}

/// Keys and values of one layer of one sequence.
pub struct KvPages<L: Launcher> {
    pub(crate) shape: KvShape,
    slabs: Arc<Mutex<Slabs<L>>>,
    pub(crate) pages: Vec<u32>,
    /// Slots in use.
    pub(crate) len: usize,
}

impl<L: Launcher> KvPages<L> {
    pub(crate) fn new(shape: KvShape, slabs: Arc<Mutex<Slabs<L>>>) -> KvPages<L> {
        KvPages { shape, slabs, pages: Vec::new(), len: 0 }
    }

    pub(crate) fn slabs(&self) -> MutexGuard<'_, Slabs<L>> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has pages for `len` slots, and none beyond.
    pub(crate) fn resize(&mut self, len: usize, pool: &Arc<Pool<L>>) -> Result<(), CudaError> {
        let wanted = len.div_ceil(PAGE);
        if wanted == self.pages.len() {
            self.len = len;
            return Ok(());
        }
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        while self.pages.len() > wanted {
            slabs.free.extend(self.pages.pop());
        }
        while self.pages.len() < wanted {
            let page = slabs.take(pool)?;
            self.pages.push(page);
        }
        self.len = len;
        Ok(())
    }

    /// Page and place in it of a slot.
    pub(crate) fn place(&self, slot: usize) -> [u32; 2] {
        [self.pages[slot / PAGE], (slot % PAGE) as u32]
    }
}

impl<L: Launcher> Drop for KvPages<L> {
    fn drop(&mut self) {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        slabs.free.append(&mut self.pages);
    }
}
