//! Training methods, losses, optimiser, schedule, trainer loop and resume
