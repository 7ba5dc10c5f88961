//! `POST /admin/draft`: another draft, while serving.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{Peer, aside, read_json};
use crate::auth::client_of;
use crate::fleet::Lease;
use crate::swap::Candidate;
use crate::{App, Service};

/// What is continued: any text does.
const PROBE: &str = "The quick brown fox jumps over the lazy dog. Then";

/// Names under which a browser on this machine reaches us; a foreign page that had its name point here has another.
const OWN_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// May this request change what is served?
fn admit(app: &App, peer: Option<Peer>, headers: &HeaderMap) -> Result<(), ApiError> {
    if let Some(key) = &app.options.admin_key {
        return match client_of(std::slice::from_ref(key), headers) {
            Some(_) => Ok(()),
            None => Err(ApiError::wrong_key()),
        };
    }
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let host = text(header::HOST);
    let host = host
        .rsplit_once(':')
        .map_or(host, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host });
    let forwarded = headers.contains_key("x-forwarded-for") || headers.contains_key(header::FORWARDED);
    let local = peer.is_some_and(|peer| peer.0.is_loopback());
    if !local || forwarded || !OWN_NAMES.contains(&host) {
        return Err(ApiError::forbidden("without an admin key only this machine may change the draft"));
    }
    Ok(())
}

pub(super) async fn draft(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    admit(&app, request.extensions().get::<Peer>().copied(), request.headers())?;
    // A page of another site can send anything but this without being asked.
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if !kind.is_some_and(|kind| kind.starts_with("application/json")) {
        return Err(ApiError::malformed("the type of the body is not `application/json`"));
    }
    let body = read_json(&app, request.into_body()).await?;
    let fields = Fields::of(&body)?;
    let bundle = match fields.string("bundle")? {
        Some(folder) => PathBuf::from(folder),
        None => return Err(ApiError::invalid("bundle", "`bundle` is missing")),
    };
    let name = match app.fleet() {
        Some(_) => fields.string("model")?.map(str::to_owned),
        None => None,
    };
    let model = app.lease(name.as_deref(), Instant::now()).await?;
    swap(&app, model, bundle).await.map(Json)
}

/// Loads the draft in use anew.
pub(crate) async fn reload(app: Arc<App>) {
    let models = match (app.fleet(), app.service()) {
        (Some(fleet), _) => fleet.all_loaded(),
        (None, Ok(model)) => vec![model],
        (None, Err(_)) => Vec::new(),
    };
    let with_drafts = models.into_iter().filter_map(|model| {
        let bundle = model.board.draft()?.bundle;
        Some((model, bundle))
    });
    let with_drafts: Vec<_> = with_drafts.collect();
    if with_drafts.is_empty() {
        (app.options.log)("nothing to reload: no draft is loaded");
    }
    for (model, bundle) in with_drafts {
        // What comes of it is logged there.
        let _ = swap(&app, model, bundle).await;
    }
}

/// Changes the draft, or says why not.
async fn swap(app: &Arc<App>, model: Lease, bundle: PathBuf) -> Result<Value, ApiError> {
    if app.swapping.swap(true, Ordering::SeqCst) {
        return Err(ApiError::busy("another change of the draft is under way"));
    }
    let shared = Arc::clone(app);
    // On a task of its own: the change goes on if the one who asked leaves, and the mark is taken away in any case.
    let task = tokio::spawn(async move {
        let changed = change(&shared, &model, bundle.clone()).await;
        shared.swapping.store(false, Ordering::SeqCst);
        if let Err(error) = &changed {
            let service = &model;
            let reason = error.message();
            service.metrics.count_swap("refused");
            let note = json!({"outcome": "refused", "draft": bundle, "reason": reason});
            service.board.set_swap(note);
            (shared.options.log)(&format!("draft `{}`: refused ({reason})", bundle.display()));
        }
        changed
    });
    task.await.unwrap_or_else(|_| Err(ApiError::internal("the change broke off")))
}

async fn change(app: &Arc<App>, model: &Lease, bundle: PathBuf) -> Result<Value, ApiError> {
    let Candidate { info, hand_over } =
        aside(app, model.clone(), move |service| load(service, &bundle)).await?;
    hand_over()
        .await
        .map_err(|_| match app.draining.load(Ordering::SeqCst) {
            true => ApiError::draining(),
            false => ApiError::failed("the change of the draft broke off"),
        })?
        .map_err(|error| ApiError::invalid("bundle", error.to_string()))?;
    Ok(json!({
        "outcome": "switched",
        "draft": {"name": info.name, "kind": info.kind, "bundle": info.bundle, "sha256": info.sha256},
        "watch_steps": app.options.limits.watch_steps,
    }))
}

/// Reads a bundle and lets it decode a little.
fn load(service: &Service, bundle: &Path) -> Result<Candidate, ApiError> {
    let prompt = service.tokenizer.encode(PROBE, true).map_err(|e| ApiError::internal(e.to_string()))?;
    service.candidates.read(bundle, &prompt).map_err(|why| ApiError::invalid("bundle", why))
}
