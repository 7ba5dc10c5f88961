//! [`Peers`] of a device: buffers to places in memory, messages by the device's own link.

use draftsmith_kernels::{Part, Peers};

use crate::launcher::{Launcher, Message};
use crate::memory::Buf;
use crate::ops::Cuda;

impl<L: Launcher> Peers<Buf<L>> for Cuda<L> {
    fn exchange(&self, bufs: &mut [&mut Buf<L>], outgoing: &[Part], incoming: &[Part]) {
        incoming.iter().for_each(|part| bufs[part.buf].changed());
        let link = self.link.as_ref().expect("a device without peers exchanges nothing");
        let message = |part: &Part| {
            let (buf, values) = (&bufs[part.buf], &part.values);
            assert!(values.end <= buf.capacity, "values {values:?} of {}", buf.capacity);
            let at = buf.place(values.start).filter(|_| !values.is_empty())?;
            Some(Message { rank: part.rank, at, bytes: values.len() * size_of::<f32>() })
        };
        let messages = |parts: &[Part]| parts.iter().filter_map(message).collect::<Vec<_>>();
        self.must(self.pool.stream.begin());
        self.must(link.exchange(&messages(outgoing), &messages(incoming)));
    }

    fn copy(
        &self,
        (from, from_at): (&Buf<L>, usize),
        (to, to_at): (&mut Buf<L>, usize),
        len: usize,
        accumulate: bool,
    ) {
        assert!(from_at + len <= from.capacity && to_at + len <= to.capacity, "whole parts");
        to.changed();
        self.copy_values(from.place(from_at), to.place(to_at), len, accumulate);
    }
}
