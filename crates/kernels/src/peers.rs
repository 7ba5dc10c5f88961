//! Messages between the devices of processes that train together.

use std::ops::Range;

/// Values of a buffer that go to another process, or that come from one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The other process.
    pub rank: usize,
    /// Which of the buffers of the call.
    pub buf: usize,
    /// Which of its values.
    pub values: Range<usize>,
}

/// The devices of other processes. All of them call the same exchanges in the same order.
pub trait Peers<B> {
    /// Sends and receives until all is done, as one group: no order of the processes can make them wait for each other. Messages
    /// of a pair arrive in the order of their lists, and both sides know their lengths. Nobody sends to itself; what comes in
    /// overlaps nothing else of the call. Empty parts are no messages.
    fn exchange(&self, bufs: &mut [&mut B], outgoing: &[Part], incoming: &[Part]);

    /// `to[at..at + len] (+)= from[at..at + len]`, each at a place of its own, in f32. The empty part may lie anywhere.
    fn copy(&self, from: (&B, usize), to: (&mut B, usize), len: usize, accumulate: bool);
}
