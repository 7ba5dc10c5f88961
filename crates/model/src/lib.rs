//! Target and draft networks written once over the kernels, tape, KV cache with rollback, weight loading
