//! A run: its folder, and its stages one after the other.

pub mod state;
