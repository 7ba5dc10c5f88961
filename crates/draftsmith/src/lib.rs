//! Trains, packages, measures and serves draft models for speculative decoding
