//! Memory of packed weights.
//!
//! A pass over a model reads all of it once. In pages of 4 KiB that is a page walk every 64 lines, so weights stand side
//! by side in large chunks that the system may back with large pages.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapRaw};

/// Bytes of a chunk; larger weights get one of their own.
const CHUNK: usize = 32 << 20;
/// Start of a weight inside a chunk: whole cache lines, on any CPU.
const ALIGN: usize = 128;

/// The chunk that is being filled, and how far.
static OPEN: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

/// Zeroed bytes inside a chunk; the chunk goes with its last user.
pub(crate) struct Pages {
    chunk: Arc<MmapRaw>,
    from: usize,
    len: usize,
}

fn chunk(bytes: usize) -> Arc<MmapRaw> {
    let map = MmapMut::map_anon(bytes.max(1)).expect("the operating system refused memory for a weight");
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Arc::new(map.into())
}

impl Pages {
    pub(crate) fn new(len: usize) -> Pages {
        let size = len.next_multiple_of(ALIGN);
        if size > CHUNK / 2 {
            return Pages { chunk: chunk(len), from: 0, len };
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, used) = match open.take() {
            Some((map, used)) if used + size <= CHUNK => (map, used),
            _ => (chunk(CHUNK), 0),
        };
        let pages = Pages { chunk: Arc::clone(&map), from: used, len };
        *open = Some((map, used + size));
        pages
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside the chunk, which lives as long as `self`, and belongs to `self` alone.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.from), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.as_mut_ptr().add(self.from), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_zeroed_and_aligned() {
        let sizes = [1usize, 100, 4096, CHUNK / 2, CHUNK + 5, 0, 77, CHUNK / 3, CHUNK / 3, CHUNK / 3];
        let mut all: Vec<Pages> = sizes.iter().map(|len| Pages::new(*len)).collect();
        for (i, pages) in all.iter_mut().enumerate() {
            assert_eq!(pages.len(), sizes[i]);
            assert!(pages.iter().all(|b| *b == 0), "zeroed, and not written by others");
            pages.fill(i as u8 + 1);
            assert!(pages.is_empty() || pages.as_ptr().addr().is_multiple_of(ALIGN));
        }
        for (i, pages) in all.iter().enumerate() {
            assert!(pages.iter().all(|b| *b == i as u8 + 1));
        }
    }
}
