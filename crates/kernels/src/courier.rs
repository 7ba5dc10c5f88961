//! Data that goes to a device while it computes.

use crate::DeviceFailure;

/// Sends data to a device beside its work, from any thread.
pub trait Courier<B>: Send {
    /// Begins to send, to a buffer for each part; `None` if there is no room for it, and the data stays with who has it. It begins when
    /// all that was asked of the device so far is done. What is asked of it later need not wait.
    fn send(&self, parts: &[&[f32]]) -> Option<Coming<B>>;
}

/// Makes what is asked of the device from then on wait for the data.
type Arrive = Box<dyn FnOnce() -> Result<(), DeviceFailure> + Send>;

/// Data on its way. Dropped before it was asked for, it arrives all the same: its memory serves nobody else before.
pub struct Coming<B> {
    bufs: Vec<B>,
    arrive: Option<Arrive>,
}

impl<B> Coming<B> {
    /// Data for these buffers; `arrive` is called once, before they are handed on or dropped.
    pub fn new(
        bufs: Vec<B>,
        arrive: impl FnOnce() -> Result<(), DeviceFailure> + Send + 'static,
    ) -> Coming<B> {
        Coming { bufs, arrive: Some(Box::new(arrive)) }
    }

    /// The buffers, for operations that are asked for from now on. An operation may fail as any other.
    pub fn arrived(mut self) -> Vec<B> {
        if let Some(Err(failure)) = self.arrive.take().map(|arrive| arrive()) {
            failure.raise();
        }
        std::mem::take(&mut self.bufs)
    }
}

impl<B> Drop for Coming<B> {
    fn drop(&mut self) {
        if let Some(arrive) = self.arrive.take() {
            // Who drops it hears of a device that failed at the next operation.
            let _ = arrive();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::catch_failure;

    #[test]
    fn what_is_on_its_way_arrives_once_asked_for_or_not() {
        let arrived = Arc::new(AtomicUsize::new(0));
        let coming = || {
            let arrived = Arc::clone(&arrived);
            Coming::new(vec![1, 2], move || {
                arrived.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
        };
        assert_eq!(coming().arrived(), [1, 2]);
        assert_eq!(arrived.load(Ordering::Relaxed), 1);
        drop(coming());
        assert_eq!(arrived.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_device_that_fails_under_way_says_so_to_who_asks() {
        let failure = || DeviceFailure { message: "lost".into(), hint: "look".into() };
        let coming = || Coming::new(vec![0u8], move || Err(failure()));
        assert_eq!(catch_failure(|| coming().arrived()), Err(failure()));
        drop(coming());
    }
}
