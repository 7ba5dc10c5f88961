//! The binary as its users see it: stdout, stderr and exit code.

mod cli;
mod hub;
mod pip;
mod support;
