//! Bundles as they are made, checked and handed to other engines.

mod bundle;
mod foreign;
mod stored;
mod support;
mod tiny_target;
