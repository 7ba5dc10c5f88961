//! The server without the binary around it.

mod faults;
mod listening;
