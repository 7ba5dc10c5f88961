//! What a bench record is and what it says, for the page: kinds are told by shape, summaries are those of `bench --json`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use draftsmith_bench::{Contract, Record};
use serde_json::Value;

use super::aside;
use super::error::ApiError;
use super::info::{find_records, read_record, shown};
use crate::{App, Service};

/// One word for what a record measured; `None` for a shape that is not ours.
pub(super) fn kind(record: &Value) -> Option<&'static str> {
    let has = |key: &str| record.get(key).is_some();
    let a_side_has = |key: &str| {
        record["sides"].as_array().is_some_and(|sides| sides.iter().any(|side| side.get(key).is_some()))
    };
    let shapes = [
        (record["format"] == "draftsmith-bench-record", "decode"),
        (a_side_has("decode_tokens_per_s"), "peers"),
        (a_side_has("slots_per_s"), "training"),
        (has("t_ms"), "kernels"),
        (has("loads"), "tuning"),
        (has("ways"), "identity"),
    ];
    shapes.into_iter().find(|(fits, _)| *fits).map(|(_, kind)| kind)
}

/// What `bench --json` says of a record.
pub(super) async fn summary(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let model = shown(&app, query.as_deref())?;
    let shared = Arc::clone(&app);
    let read = move |service: &Service| {
        let value = find_records(&shared, service)
            .remove(&name)
            .and_then(|path| read_record(&path))
            .ok_or_else(|| ApiError::no_record(&name))?;
        let record = Record::from_json(&name, &value.to_string())
            .map_err(|error| ApiError::invalid("name", error.to_string()))?;
        serde_json::to_value(Contract::new(&record))
            .map_err(|error| ApiError::internal(format!("the summary cannot be written: {error}")))
    };
    Ok(Json(aside(&app, model, read).await?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::kind;

    #[test]
    fn a_record_is_known_by_its_shape() {
        assert_eq!(kind(&json!({"format": "draftsmith-bench-record"})), Some("decode"));
        assert_eq!(kind(&json!({"sides": [{"name": "a", "decode_tokens_per_s": {}}]})), Some("peers"));
        assert_eq!(kind(&json!({"sides": [{"slots_per_s": {}}]})), Some("training"));
        assert_eq!(kind(&json!({"t_ms": {"1": 3.5}})), Some("kernels"));
        assert_eq!(kind(&json!({"loads": []})), Some("tuning"));
        assert_eq!(kind(&json!({"ways": [], "identical": true})), Some("identity"));
        for other in [json!({}), json!([1]), json!(null), json!({"sides": 3})] {
            assert_eq!(kind(&other), None, "{other}");
        }
    }
}
