//! Runs of training, for the page. Unlike all else they need no model: a run can be watched while one is loaded.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::Value;

use super::count_panic;
use super::error::ApiError;
use crate::{App, Runs};

/// Reads from the disk, away from the threads that answer.
async fn ask<T: Send + 'static>(
    app: &Arc<App>,
    read: impl FnOnce(&dyn Runs) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let runs = Arc::clone(app.options.runs.as_ref().ok_or_else(ApiError::no_runs)?);
    tokio::task::spawn_blocking(move || read(&*runs)).await.map_err(|_| {
        count_panic(app);
        ApiError::failed("its runs cannot be read")
    })
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(ask(&app, |runs| runs.list().into()).await?))
}

pub(super) async fn one(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let run = {
        let name = name.clone();
        ask(&app, move |runs| runs.run(&name)).await?
    };
    run.map(Json).ok_or_else(|| ApiError::no_run(&name))
}
