//! Device memory: a capacity, and the values that were written last.
//!
//! Tensors are immutable, so an operation replaces the tensor of its result buffer. A buffer may be longer than what
//! is written to it; the rest reads as zeros.

use burn_tensor::{DType, FloatDType, Tensor};
use draftsmith_kernels::Buffer;

use crate::Gpu;

/// An array of floats on the device.
#[derive(Clone, Debug, Default)]
pub struct Buf {
    capacity: usize,
    /// The written beginning; `None` is nothing.
    values: Option<Tensor<1>>,
}

impl Buffer for Buf {
    fn give_back(&mut self) {
        // The device's own allocator keeps the memory for the next tensor.
        *self = Buf::default();
    }
}

/// A weight `[O, I]` in the storage type.
#[derive(Clone, Debug)]
pub struct Packed(pub(crate) Tensor<2>);

impl Buf {
    /// All zeros, which take no memory until something is written.
    pub(crate) fn zeros(capacity: usize) -> Buf {
        Buf { capacity, values: None }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the values.
    pub(crate) fn clear(&mut self) {
        self.values = None;
    }

    /// Makes `values` the content.
    pub(crate) fn set<const D: usize>(&mut self, values: Tensor<D>) {
        let len = values.shape().num_elements();
        assert!(len <= self.capacity, "{len} values in a buffer of {}", self.capacity);
        self.values = Some(values.reshape([len]));
    }
}

impl Gpu {
    /// The first `rows * width` values as they are stored.
    pub(crate) fn stored(&self, buf: &Buf, rows: usize, width: usize) -> Tensor<2> {
        let len = rows * width;
        assert!(len <= buf.capacity, "{len} values from a buffer of {}", buf.capacity);
        let filled = |values: Tensor<1>| {
            let have = values.dims()[0];
            let dtype: DType = values.dtype();
            match have.cmp(&len) {
                std::cmp::Ordering::Equal => values,
                std::cmp::Ordering::Greater => values.slice(0..len),
                std::cmp::Ordering::Less => {
                    Tensor::cat(vec![values, Tensor::zeros([len - have], (&self.device, dtype))], 0)
                }
            }
        };
        buf.values.clone().map_or_else(|| self.zeros(len), filled).reshape([rows, width])
    }

    /// The first `rows * width` values as f32.
    pub(crate) fn read(&self, buf: &Buf, rows: usize, width: usize) -> Tensor<2> {
        self.stored(buf, rows, width).cast(FloatDType::F32)
    }

    /// As [`Gpu::stored`], leaving the buffer empty: what is made of it may reuse its memory.
    pub(crate) fn take(&self, buf: &mut Buf, rows: usize, width: usize) -> Tensor<2> {
        let taken = Buf { capacity: buf.capacity, values: buf.values.take() };
        self.stored(&taken, rows, width)
    }

    /// Writes an activation in the storage type.
    pub(crate) fn keep<const D: usize>(&self, y: &mut Buf, values: Tensor<D>) {
        y.set(values.cast(self.storage));
    }

    /// Writes an activation, or adds it to the one that is there.
    pub(crate) fn keep_or_add(&self, y: &mut Buf, values: Tensor<2>, accumulate: bool) {
        if accumulate {
            let [rows, width] = values.dims();
            let sum = self.take(y, rows, width).cast(FloatDType::F32) + values;
            self.keep(y, sum);
        } else {
            self.keep(y, values);
        }
    }

    /// Adds to a gradient of weights, which is f32.
    pub(crate) fn add_master(&self, sum: &mut Buf, values: Tensor<2>) {
        let [rows, width] = values.dims();
        let total = self.take(sum, rows, width).cast(FloatDType::F32) + values;
        sum.set(total);
    }
}
