//! What an answer with states must look like, and how one that does not is told.

use crate::http::{Failure, Fault, ServerError};

/// States as a server gives them.
#[derive(Clone)]
pub(super) struct RemoteStates {
    /// `[S, K * Ht]` outputs of the captured layers.
    pub(super) features: Vec<f32>,
    /// `[S, Ht]` the final state, before or after the final norm: the server's kind tells.
    pub(super) last: Vec<f32>,
}

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct StatesShape<'a> {
    /// `[S]` token ids.
    pub ids: &'a [u32],
    /// States per token.
    pub states: usize,
    /// Values per state.
    pub width: usize,
}

impl StatesShape<'_> {
    /// Values of the whole answer.
    pub(super) fn values(&self) -> u64 {
        self.ids.len() as u64 * self.states as u64 * self.width as u64
    }
}

/// Why an answer with states is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatesProblem {
    /// It cannot be read; the next one may be whole.
    Garbled {
        /// Why.
        reason: String,
    },
    /// It is whole, but holds something else.
    Field {
        /// The field.
        field: String,
        /// What it says.
        found: String,
        /// What it should say.
        wanted: String,
    },
}

impl StatesProblem {
    pub(super) fn field(
        field: impl Into<String>,
        found: impl std::fmt::Display,
        wanted: impl std::fmt::Display,
    ) -> StatesProblem {
        StatesProblem::Field { field: field.into(), found: found.to_string(), wanted: wanted.to_string() }
    }

    /// As the failure of a request to `url` for `row`.
    pub(super) fn of(self, url: &str, row: &str) -> Failure {
        match self {
            StatesProblem::Garbled { reason } => Failure::Passing(Fault::Garbled { reason }),
            StatesProblem::Field { field, found, wanted } => Failure::Lasting(ServerError::Unexpected {
                url: url.to_string(),
                row: row.to_string(),
                field: field.into(),
                found: found.into(),
                wanted: wanted.into(),
            }),
        }
    }
}

/// Compares token ids.
pub(super) fn same_ids(field: &str, found: &[i64], wanted: &[u32]) -> Result<(), StatesProblem> {
    if found.len() != wanted.len() {
        let (found, wanted) = (format!("{} tokens", found.len()), wanted.len());
        return Err(StatesProblem::field(field, found, wanted));
    }
    match found.iter().zip(wanted).position(|(a, b)| *a != i64::from(*b)) {
        Some(at) => Err(StatesProblem::field(format!("{field}[{at}]"), found[at], wanted[at])),
        None => Ok(()),
    }
}

/// Refuses infinities and not-a-numbers.
pub(super) fn finite(field: &str, values: &[f32], width: usize) -> Result<(), StatesProblem> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(at) => {
            let place = format!("{field}, state {} value {}", at / width, at % width);
            Err(StatesProblem::field(place, values[at], "a finite number"))
        }
        None => Ok(()),
    }
}
