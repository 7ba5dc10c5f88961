//! The draftsmith binary.
fn main() {}
