//! Gradients and the optimiser: what training needs beside [`crate::Kernels`].

use crate::Kernels;

/// Operations of the training step, each with its gradient.
pub trait TrainKernels: Kernels {}

impl TrainKernels for crate::Cpu {}
