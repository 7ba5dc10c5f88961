//! Targets beside the programs that define them.

mod class_defaults;
mod experts;
mod families;
mod quantised;
mod real_model;
