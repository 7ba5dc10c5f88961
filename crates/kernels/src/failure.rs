//! A device that fails in the middle of its work: memory that runs out, a launch that is refused, a card that is gone.
//!
//! The signatures of the operations know no errors: networks, tape and engine are written over them without a `?` at every
//! step, and the CPU cannot fail. A backend whose device fails leaves the operation, and everything above it, by
//! unwinding with one [`DeviceFailure`]; whoever began the work takes it with [`catch_failure`] and has an error with a
//! hint. No panic is reported for it, and real panics pass through.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Why a device cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DeviceFailure {
    /// What failed, with the numbers.
    pub message: String,
    /// What the user can do about it.
    pub hint: String,
}

impl DeviceFailure {
    /// Leaves the work that is under way, up to [`catch_failure`]. The panic hook is not asked.
    pub fn raise(self) -> ! {
        resume_unwind(Box::new(self))
    }
}

/// Runs work on a device. What it leaves half done must not be used after an error: buffers, caches, optimiser states.
///
/// # Errors
/// What the device failed with.
pub fn catch_failure<T>(work: impl FnOnce() -> T) -> Result<T, DeviceFailure> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| match payload.downcast::<DeviceFailure>() {
        Ok(failure) => *failure,
        Err(panic) => resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_arrives_as_it_was_raised_and_a_panic_stays_one() {
        let failure = DeviceFailure { message: "no memory".into(), hint: "take less".into() };
        let raised = failure.clone();
        assert_eq!(catch_failure::<()>(move || raised.raise()), Err(failure));
        assert_eq!(catch_failure(|| 7), Ok(7));
        let panic = catch_unwind(|| catch_failure::<()>(|| panic!("a fault"))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"a fault"));
    }
}
