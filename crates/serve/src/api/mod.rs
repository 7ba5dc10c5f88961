//! The routes: who may ask what, and in which shape.

mod admin;
mod answer;
mod ask;
mod echo;
mod error;
mod fields;
mod info;
mod records;
mod stream;

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::Value;
use tokio::sync::mpsc::unbounded_channel;

use crate::auth::client_of;
use crate::cors::share;
use crate::queue::{Client, Job};
use crate::speech::Speech;
use crate::{App, Service, page, random};
use ask::{Asked, Form};

pub(crate) use admin::reload;
pub(crate) use error::ApiError;

/// A body must be there after this.
const BODY_TIME: Duration = Duration::from_secs(30);
/// So much beyond the limit is read and thrown away, so that the peer gets to read the error.
const BODY_OVERFLOW: usize = 16 << 20;

/// The address that a connection comes from.
#[derive(Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/v1/chat/completions/render", post(info::render))
        .route("/tokenize", post(info::tokenize))
        .route("/api/state", get(info::state))
        .route("/api/bundle", get(info::bundle))
        .route("/api/records", get(info::records))
        .route("/api/records/{name}", get(info::record))
        .route("/api/records/{name}/summary", get(records::summary))
        .layer(from_fn_with_state(Arc::clone(&app), know_client));
    Router::new()
        .route("/admin/draft", post(admin::draft))
        .route("/health", get(info::health))
        .route("/metrics", get(info::metrics))
        .merge(guarded)
        .merge(page::routes())
        .fallback(async |request: Request| ApiError::no_route(request.uri().path()))
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::wrong_method(request.method().as_str(), request.uri().path())
        })
        .layer(from_fn_with_state(Arc::clone(&app), count))
        // Outermost: what a browser asks before carries no key.
        .layer(from_fn_with_state(Arc::clone(&app), share))
        .with_state(app)
}

/// Lets in who has a key, if keys are set, and names the client.
async fn know_client(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    let client: Client = match (keys.is_empty(), client_of(keys, request.headers())) {
        (_, Some(client)) => client,
        (true, None) => {
            let peer = request.extensions().get::<Peer>();
            peer.map_or_else(|| Arc::from(""), |peer| Arc::from(peer.0.to_string()))
        }
        (false, None) => return ApiError::wrong_key().into_response(),
    };
    request.extensions_mut().insert(client);
    next.run(request).await
}

/// Counts answers, and answers where a handler panics.
async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let mut handler = std::pin::pin!(next.run(request));
    let response = std::future::poll_fn(|cx| {
        let polled = catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(cx)));
        polled.unwrap_or_else(|_| {
            count_panic(&app);
            Poll::Ready(ApiError::failed("its handler panicked").into_response())
        })
    })
    .await;
    if let Some(service) = app.service.get() {
        service.metrics.count_request(route.as_deref().unwrap_or("other"), response.status().as_u16());
    }
    response
}

fn count_panic(app: &App) {
    if let Some(service) = app.service.get() {
        service.metrics.panics.inc();
    }
}

/// The JSON of a request's body.
async fn read_json(app: &App, body: Body) -> Result<Value, ApiError> {
    let bytes = tokio::time::timeout(BODY_TIME, read(body, app.options.limits.body_bytes))
        .await
        .map_err(|_| ApiError::slow_body())??;
    serde_json::from_slice(&bytes).map_err(|e| ApiError::malformed(format!("the body is no JSON: {e}")))
}

async fn read(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut seen = 0;
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|_| ApiError::malformed("the body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len();
        if seen <= limit {
            bytes.extend_from_slice(&data);
        } else if seen > limit + BODY_OVERFLOW {
            break;
        }
    }
    if seen > limit { Err(ApiError::too_large(limit)) } else { Ok(bytes) }
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(app, request, Form::Chat).await
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(app, request, Form::Completion).await
}

/// Work on texts of a request, beside the threads that serve connections.
async fn aside<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Service) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let shared = Arc::clone(app);
    tokio::task::spawn_blocking(move || work(shared.service()?)).await.unwrap_or_else(|_| {
        count_panic(app);
        Err(ApiError::failed("its texts cannot be read"))
    })
}

async fn complete(app: Arc<App>, request: Request, form: Form) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    app.service()?;
    let client = request.extensions().get::<Client>().cloned().unwrap_or_else(|| Arc::from(""));
    let body = read_json(&app, request.into_body()).await?;
    let default_max_tokens = app.options.limits.default_max_tokens;
    let asked = aside(&app, move |service| Asked::read(&body, form, service, default_max_tokens)).await?;
    if app.draining.load(Ordering::SeqCst) {
        return Err(ApiError::draining());
    }
    let service = app.service()?;
    let (events, answers) = unbounded_channel();
    let deadline = arrived + app.options.limits.request_time;
    let seed = asked.seed.unwrap_or_else(random);
    let jobs = (0..asked.sequences()).map(|choice| {
        let mut options = asked.options.clone();
        // The sequences of one prompt differ by their seed, and the same ones come again for the next prompt.
        options.sampling.seed = seed.wrapping_add((choice % asked.n) as u64);
        Job {
            id: app.next_id.fetch_add(1, Ordering::Relaxed),
            choice,
            client: Arc::clone(&client),
            prompt: Arc::clone(&asked.prompts[choice / asked.n]),
            options,
            speech: Speech::new(&service.tokenizer, asked.speech.clone()),
            events: events.clone(),
            submitted: arrived,
            deadline,
        }
    });
    service.queue.submit(jobs.collect()).map_err(|full| {
        let running = service.metrics.running.get().max(1) as u64;
        ApiError::queue_full(full.waiting, (full.waiting as u64 / running).clamp(1, 30))
    })?;
    drop(events);
    let head = answer::Head::new(&app, service, form);
    let timeout_s = app.options.limits.request_time.as_secs_f64();
    if asked.stream {
        let body = stream::body(head, asked, answers, timeout_s);
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        return Ok((headers, body).into_response());
    }
    answer::whole(&head, &asked, answers, timeout_s).await
}
