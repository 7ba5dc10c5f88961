//! Constrained output: what `response_format` asks for.

use std::sync::Arc;

use draftsmith_decode::Grammar;
use serde_json::Value;

use crate::api::ApiError;

/// The grammar of a JSON schema; `{"type": "object"}` for any object.
///
/// # Errors
/// Constrained output is not built yet.
pub(crate) fn grammar(_schema: &Value) -> Result<Arc<dyn Grammar>, ApiError> {
    Err(ApiError::unsupported("response_format", "only `text` is answered"))
}
