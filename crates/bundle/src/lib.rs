//! Checkpoint to bundle: checks, probe, model card, exports
