//! States of a pack in the memory of the device that trains, and states of slots wherever they are.
//!
//! Shape legend: `S` slots of a pack, `F` width of the captured features, `Ht` target width.

use std::any::Any;
use std::sync::Arc;

use draftsmith_kernels::{Buffer, Coming, Memory};
use draftsmith_model::tape::OuterRows;

/// `[S, F]` features and `[S, Ht]` final states of a pack that lie where the method computes: captured there, they never were on the
/// host. Which device that is the type does not say, so that store and trainer need not know any.
#[derive(Clone, Debug)]
pub struct DeviceStates(Arc<dyn Any + Send + Sync>);

struct Both<B: Buffer> {
    features: B,
    last: B,
}

impl<B: Buffer> Drop for Both<B> {
    fn drop(&mut self) {
        self.features.give_back();
        self.last.give_back();
    }
}

impl DeviceStates {
    /// `features` `[S, F]` and `last` `[S, Ht]` of a pack.
    pub fn new<K: Memory>(features: K::Buf, last: K::Buf) -> DeviceStates {
        DeviceStates(Arc::new(Both { features, last }))
    }

    /// Features and final states that were sent, in this order.
    pub fn arrived<K: Memory>(sent: Coming<K::Buf>) -> DeviceStates {
        let [features, last] = sent.arrived().try_into().ok().expect("features and final states were sent");
        DeviceStates::new::<K>(features, last)
    }

    /// Features and final states.
    ///
    /// # Panics
    /// If they are those of another kind of device.
    pub fn get<K: Memory>(&self) -> (&K::Buf, &K::Buf) {
        let both: &Both<K::Buf> = self.0.downcast_ref().expect("states lie on the device that trains");
        (&both.features, &both.last)
    }
}

/// Final states of some slots of a pack.
pub(crate) enum SlotStates<'a> {
    /// `[N, Ht]`
    Host(Vec<f32>),
    /// Those of `[N]` slots.
    Device(&'a DeviceStates, Vec<u32>),
}

impl SlotStates<'_> {
    /// As a tape takes them.
    pub(crate) fn rows<K: Memory>(&self) -> OuterRows<'_, K::Buf> {
        match self {
            SlotStates::Host(values) => OuterRows::Host(values),
            SlotStates::Device(states, rows) => OuterRows::Device { buf: states.get::<K>().1, rows },
        }
    }
}
