//! NVIDIA GPUs: the operations of training ([`draftsmith_kernels::TrainKernels`]) and of decoding
//! ([`draftsmith_kernels::Kernels`]) by kernels of our own.
//!
//! Nothing of CUDA is needed to build or to start: driver and cuBLASLt are looked for when a device is opened
//! ([`Search`]), and what is missing is an error that names the package which brings it. The kernels
//! (`kernels/*.cu`) come compiled to PTX; where a driver is too old for that, NVRTC compiles them. Processes that train together send
//! gradients from card to card by NCCL ([`Nccl`]), where it is there.
//!
//! The libraries are called by name through `libloading`: bindings that are chosen when the program is built know the
//! file names of one version of CUDA, and end the program where a library is missing.
//!
//! # Layers
//! [`Cuda`] turns operations into launches of kernels and products over a [`Launcher`]: a [`Card`] behind the driver,
//! or in the tests the host shim (`shim/`), which compiles the same kernels with the system's C++ compiler, runs every
//! thread as a fiber, and fails at places outside buffers, races between barriers, and arguments that do not fit.
//!
//! # What is promised, and what is not
//! Sums have one fixed order: the same call on the same card gives the same bits. Values agree with the CPU's within the
//! rounding of f32, or of bf16 where products round their operands ([`Operands`]). Operations of decoding are row-exact for
//! any number of rows: no bit of a row depends on what else is in the call. Products of training, by cuBLASLt, are not. No part
//! of this crate has run on a GPU so far.

mod api;
mod attention;
mod card;
mod courier;
mod device;
mod error;
mod infer;
mod launcher;
mod library;
mod memory;
mod nccl;
#[cfg(feature = "shim")]
pub mod nothing;
mod ops;
mod pages;
mod peers;
mod search;
#[cfg(feature = "shim")]
pub mod shim;
pub mod source;
mod states;
mod stream;
mod train;
mod weights;

pub use card::{Card, CardGraph, CardLaunch, CardMark, CardMemory, CardStaging};
pub use device::{Cards, DeviceInfo, Driver, MIN_CAPABILITY, MIN_CUDA, Report, choose};
pub use error::{Asked, CudaError};
pub use launcher::{About, Arg, At, DeviceLink, Launch, Launcher, Message, Operand, Product};
pub use library::{CudaVersion, Library};
pub use memory::Buf;
pub use nccl::{Nccl, NcclLink};
pub use ops::{Cuda, CudaOptions, Expanded, Graphs, Operands};
pub use pages::KvPages;
pub use search::Search;
pub use states::{KeptAs, UnfitState};
pub use stream::Started;
pub use weights::Packed;
