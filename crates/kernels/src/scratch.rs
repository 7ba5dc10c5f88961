//! Memory of finished buffers, kept for the next ones: a decode step asks for the same sizes again and again.

use std::cell::RefCell;

use crate::Buffer;

/// Buffers kept per thread.
const KEPT: usize = 64;
/// Bytes kept per thread.
const KEPT_BYTES: usize = 64 << 20;

#[derive(Default)]
struct Free {
    buffers: Vec<Vec<f32>>,
    bytes: usize,
}

thread_local! {
    static FREE: RefCell<Free> = RefCell::default();
}

fn bytes(buffer: &Vec<f32>) -> usize {
    buffer.capacity() * size_of::<f32>()
}

/// A buffer of `len` values with unspecified content.
pub(crate) fn take(len: usize) -> Vec<f32> {
    let kept = FREE.with_borrow_mut(|free| {
        // The smallest that is large enough, unless most of it would lie idle.
        let fits = |b: &Vec<f32>| b.capacity() >= len && b.capacity() / 4 <= len;
        let at = (0..free.buffers.len())
            .filter(|i| fits(&free.buffers[*i]))
            .min_by_key(|i| free.buffers[*i].capacity())?;
        let buffer = free.buffers.swap_remove(at);
        free.bytes -= bytes(&buffer);
        Some(buffer)
    });
    let mut buffer = kept.unwrap_or_default();
    // Fills only what the buffer did not have before.
    buffer.resize(len, 0.0);
    buffer
}

impl Buffer for Vec<f32> {
    fn give_back(&mut self) {
        let buffer = std::mem::take(self);
        // Gone at the end of a thread, when the list itself is gone.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let bytes = bytes(&buffer);
            if bytes > 0 && free.buffers.len() < KEPT && free.bytes + bytes <= KEPT_BYTES {
                free.bytes += bytes;
                free.buffers.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_for_the_same_and_for_smaller_sizes() {
        let mut first = take(1000);
        let place = first.as_ptr();
        first.give_back();
        assert!(first.is_empty());
        let again = take(900);
        assert_eq!((again.len(), again.as_ptr()), (900, place));
        let mut small = again;
        small.give_back();
        // A tiny request does not take a large buffer.
        let (tiny, large) = (take(10), take(1000));
        assert_ne!(tiny.as_ptr(), place);
        assert_eq!(large.as_ptr(), place);
    }
}
