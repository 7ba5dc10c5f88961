//! The kernels for NVIDIA GPUs, on the host.

mod card;
mod decode;
mod nccl;
mod nvrtc;
mod shim;
mod stream;
