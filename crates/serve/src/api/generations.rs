//! The answers that were decoded last, to the client that asked for them.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::Value;

use super::error::ApiError;
use crate::App;
use crate::generations::Generations;
use crate::queue::Client;

fn kept(app: &App) -> Result<&Generations, ApiError> {
    Some(&*app.generations).filter(|kept| kept.keeps()).ok_or_else(ApiError::keeps_none)
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(kept(&app)?.list(&client).into()))
}

pub(super) async fn one(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let found = kept(&app)?.one(&client, &id).ok_or_else(|| ApiError::no_generation(&id))?;
    Ok(Json(Value::clone(&found)))
}
