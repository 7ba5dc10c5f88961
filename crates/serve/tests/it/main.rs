//! The server without the binary around it.

mod common;
mod faults;
mod listening;
