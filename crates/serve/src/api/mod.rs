//! The routes: who may ask what, and in which shape.

mod admin;
mod answer;
mod ask;
mod echo;
mod error;
mod fields;
mod generations;
mod info;
mod ledger;
mod openapi;
mod records;
mod responses;
mod runs;
mod stream;
mod tools;

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::handler::Handler;
use axum::http::header;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::auth::client_of;
use crate::cors::share;
use crate::fleet::Lease;
use crate::queue::{Client, Event, Job};
use crate::speech::Speech;
use crate::{App, Service, page, random};
use ask::{Asked, Form};
use fields::Fields;
use ledger::Ledger;

pub(crate) use admin::reload;
pub(crate) use error::ApiError;

/// A body must be there after this.
const BODY_TIME: Duration = Duration::from_secs(30);
/// So much beyond the limit is read and thrown away, so that the peer gets to read the error.
const BODY_OVERFLOW: usize = 16 << 20;

/// The address that a connection comes from.
#[derive(Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// The routes as they are made, and a list of them for those who compare it with the description.
#[derive(Default)]
struct Routes {
    router: Router<Arc<App>>,
    /// Method, lower case, and path.
    made: Vec<(&'static str, &'static str)>,
}

impl Routes {
    fn get<H: Handler<T, Arc<App>>, T: 'static>(mut self, path: &'static str, handler: H) -> Routes {
        self.made.push(("get", path));
        Routes { router: self.router.route(path, get(handler)), ..self }
    }

    fn post<H: Handler<T, Arc<App>>, T: 'static>(mut self, path: &'static str, handler: H) -> Routes {
        self.made.push(("post", path));
        Routes { router: self.router.route(path, post(handler)), ..self }
    }
}

/// Routes that want a key, where there are keys.
fn guarded() -> Routes {
    Routes::default()
        .post("/v1/chat/completions", chat)
        .post("/v1/completions", completions)
        .post("/v1/responses", responses)
        .post("/v1/embeddings", embeddings)
        .get("/v1/models", info::models)
        .get("/v1/models/{*name}", info::model)
        .post("/v1/chat/completions/render", info::render)
        .post("/tokenize", info::tokenize)
        .get("/api/state", info::state)
        .get("/api/bundle", info::bundle)
        .get("/api/records", info::records)
        .get("/api/records/{name}", info::record)
        .get("/api/records/{name}/summary", records::summary)
        .get("/api/generations", generations::list)
        .get("/api/generations/{id}", generations::one)
        .get("/api/runs", runs::list)
        .get("/api/runs/{name}", runs::one)
}

/// Routes for everybody, or with a key of their own.
fn open() -> Routes {
    Routes::default()
        .post("/admin/draft", admin::draft)
        .get("/health", info::health)
        .get("/metrics", info::metrics)
        .get("/version", info::version)
        .get("/openapi.json", openapi::document)
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let guarded = guarded().router.layer(from_fn_with_state(Arc::clone(&app), know_client));
    open()
        .router
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
async fn count(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let named = Named::default();
    request.extensions_mut().insert(named.clone());
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
    let model = named.0.get().map(String::as_str);
    if let Some(metrics) = app.metrics(model) {
        metrics.count_request(route.as_deref().unwrap_or("other"), response.status().as_u16());
    }
    response
}

/// The model that a request turned out to name, for its count.
#[derive(Clone, Default)]
struct Named(Arc<OnceLock<String>>);

fn count_panic(app: &App) {
    if let Some(metrics) = app.metrics(None) {
        metrics.panics.inc();
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

async fn responses(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(app, request, Form::Responses).await
}

/// OpenAI's clients know this route, and a model that writes text has nothing to answer there.
async fn embeddings() -> ApiError {
    ApiError::no_such_api(
        "/v1/embeddings",
        "the model that is served writes text; use one made for embeddings",
    )
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    complete(app, request, Form::Completion).await
}

/// Work on texts of a request, beside the threads that serve connections.
async fn aside<T: Send + 'static>(
    app: &Arc<App>,
    model: Lease,
    work: impl FnOnce(&Service) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(move || work(&model)).await.unwrap_or_else(|_| {
        count_panic(app);
        Err(ApiError::failed("its texts cannot be read"))
    })
}

/// The body of a request and the model that it names.
async fn read_for_model(
    app: &Arc<App>,
    request: Request,
    arrived: Instant,
) -> Result<(Value, Lease), ApiError> {
    app.served()?;
    let named = request.extensions().get::<Named>().cloned().unwrap_or_default();
    let body = read_json(app, request.into_body()).await?;
    let name = match app.fleet() {
        Some(_) => Fields::of(&body)?.string("model")?.map(str::to_owned),
        None => None,
    };
    let model = app.lease(name.as_deref(), arrived).await.inspect_err(|_| {
        // Also of one that cannot be loaded; a name of none of ours is counted with the others.
        let _ = named.0.set(name.clone().unwrap_or_default());
    })?;
    let _ = named.0.set(model.name.clone());
    Ok((body, model))
}

async fn complete(app: Arc<App>, request: Request, form: Form) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let client = request.extensions().get::<Client>().cloned().unwrap_or_else(|| Arc::from(""));
    let route = match form {
        Form::Chat => "/v1/chat/completions",
        Form::Completion => "/v1/completions",
        Form::Responses => "/v1/responses",
    };
    let mut ledger = Ledger::new(&app, route, &client);
    let begun = begin(&app, request, form, arrived, client).await;
    let (head, asked, answers) = begun.inspect_err(|error| ledger.fail(error, false))?;
    ledger.begin(&head, &asked, &app);
    let timeout_s = app.options.limits.request_time.as_secs_f64();
    if asked.stream {
        let body = match form {
            Form::Responses => responses::body(head, asked, answers, timeout_s, ledger),
            Form::Chat | Form::Completion => stream::body(head, asked, answers, timeout_s, ledger),
        };
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        return Ok((headers, body).into_response());
    }
    let answer = match form {
        Form::Responses => responses::whole(&head, &asked, answers, timeout_s, &mut ledger).await,
        Form::Chat | Form::Completion => answer::whole(&head, &asked, answers, timeout_s, &mut ledger).await,
    };
    answer.inspect_err(|error| ledger.fail(error, false))
}

type Begun = (answer::Head, Asked, UnboundedReceiver<(usize, Event)>);

/// Reads a request and puts its sequences into the queue.
async fn begin(
    app: &Arc<App>,
    request: Request,
    form: Form,
    arrived: Instant,
    client: Client,
) -> Result<Begun, ApiError> {
    let (body, service) = read_for_model(app, request, arrived).await?;
    let default_max_tokens = app.options.limits.default_max_tokens;
    let keeps = app.generations.keeps();
    let read = move |service: &Service| Asked::read(&body, form, service, default_max_tokens, keeps);
    let asked = aside(app, service.clone(), read).await?;
    if app.draining.load(Ordering::SeqCst) {
        return Err(ApiError::draining());
    }
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
    Ok((answer::Head::new(app, service, form), asked, answers))
}
