//! How requests of `object_store` travel: over the one network client that everything here uses, whole answers only.
//!
//! An answer is read completely before it is given on: requests ask for ranges of a few MiB, so a body that is cut, or longer
//! than anything that was asked for, is found out here. What a store said last on this thread is kept for messages: the
//! library's own errors leave out the region that a bucket is in, and print more of an answer than a log should hold.

use std::cell::RefCell;
use std::future::Future;
use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use draftsmith_core::patience::shorten;
use hyper::body::Body as _;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpResponseBody, HttpService,
};
use ureq::http::{HeaderMap, Method, Request};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::error::Fault;

/// Bytes of the longest answer; requests ask for less.
const LONGEST_BODY: u64 = 64 << 20;
/// Seconds for those who hand out credentials on the machine itself: where there are none, nobody answers.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// What the last request of this thread came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Status of the answer.
    pub(crate) status: Option<u16>,
    /// The store's own word for what is wrong.
    pub(crate) code: String,
    /// Its words.
    pub(crate) message: String,
    /// The region that the bucket is in.
    pub(crate) region: Option<String>,
    /// Why there was no answer.
    pub(crate) fault: Option<Fault>,
    /// It was about credentials.
    pub(crate) is_metadata: bool,
}

thread_local! {
    static LAST: RefCell<Seen> = RefCell::default();
}

/// Runs on this thread, and tells what the last request came to. Nothing here waits for another task: requests are made
/// while the future is polled.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> (T, Seen) {
    LAST.with(|last| drop(last.take()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let done = runtime.expect("a runtime of one thread needs nothing").block_on(work);
    (done, LAST.with(RefCell::take))
}

/// Makes the client that `object_store` asks for.
#[derive(Clone, Debug)]
pub(crate) struct Connector(pub(crate) Arc<Link>);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl HttpService for Connector {
    // As `async_trait` writes it.
    fn call<'life0, 'async_trait>(
        &'life0 self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(std::future::ready(self.0.send(request)))
    }
}

/// The way to one store.
#[derive(Debug)]
pub(crate) struct Link {
    agent: Agent,
    impatient: Agent,
    /// Hosts that hand out credentials.
    metadata: Vec<String>,
    /// What no message may repeat.
    secrets: Vec<String>,
    /// Something has answered.
    alive: AtomicBool,
}

fn agent(timeout: Duration, is_metadata: bool) -> Agent {
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(timeout))
        .timeout_per_write(Some(timeout))
        .timeout_recv_response(Some(timeout))
        .timeout_per_read(Some(timeout))
        .user_agent(concat!("draftsmith/", env!("CARGO_PKG_VERSION")));
    match is_metadata {
        // What the machine says of itself is no matter of proxies.
        true => config.proxy(None).build().new_agent(),
        false => config.build().new_agent(),
    }
}

impl Link {
    pub(crate) fn new(timeout: Duration, metadata: Vec<String>, secrets: Vec<String>) -> Link {
        Link {
            agent: agent(timeout, false),
            impatient: agent(timeout.min(METADATA_TIMEOUT), true),
            metadata,
            secrets: secrets.into_iter().filter(|secret| secret.len() > 3).collect(),
            alive: AtomicBool::new(false),
        }
    }

    /// Whether anything at the store's address has answered yet.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let host = parts.uri.host().unwrap_or_default();
        let is_metadata = self.metadata.iter().any(|known| known == host);
        let agent = if is_metadata { &self.impatient } else { &self.agent };
        let body = bytes_of(body)?;
        let has_body = !body.is_empty() || matches!(parts.method, Method::POST | Method::PUT);
        let sent = match has_body {
            true => agent.run(Request::from_parts(parts, body)),
            false => agent.run(Request::from_parts(parts, ())),
        };
        let mut seen = Seen { is_metadata, ..Seen::default() };
        let answer = sent.map_err(fault).and_then(|answer| {
            if !is_metadata {
                self.alive.store(true, Ordering::Relaxed);
            }
            let (parts, body) = answer.into_parts();
            seen.status = Some(parts.status.as_u16());
            Ok((body_of(body)?, parts))
        });
        let done = match answer {
            Ok((bytes, parts)) => {
                if !parts.status.is_success() {
                    self.explain(&parts.headers, &bytes, &mut seen);
                }
                Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(bytes)))
            }
            Err(fault) => {
                seen.fault = Some(fault.clone());
                let kind = match fault {
                    Fault::NoConnection { .. } => HttpErrorKind::Connect,
                    Fault::Silence => HttpErrorKind::Timeout,
                    Fault::Cut => HttpErrorKind::Interrupted,
                    Fault::Status { .. } | Fault::Garbled { .. } | Fault::WrongBytes { .. } => {
                        HttpErrorKind::Decode
                    }
                };
                Err(HttpError::new(kind, fault))
            }
        };
        LAST.with(|last| last.replace(seen));
        done
    }

    /// What an answer says that is none.
    fn explain(&self, headers: &HeaderMap, body: &[u8], seen: &mut Seen) {
        let text = String::from_utf8_lossy(body);
        let element = |name: &str| {
            let (_, rest) = text.split_once(&format!("<{name}>"))?;
            let (inside, _) = rest.split_once(&format!("</{name}>"))?;
            Some(shorten(inside))
        };
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_string);
        seen.code = element("Code").or_else(|| header("x-ms-error-code")).unwrap_or_default();
        seen.message = self.without_secrets(element("Message").unwrap_or_default());
        if seen.message.is_empty() {
            seen.message.clone_from(&seen.code);
        }
        let moved = matches!(seen.status, Some(301 | 307 | 400 | 403));
        seen.region = header("x-amz-bucket-region")
            .or_else(|| element("Region"))
            .filter(|region| moved && !region.is_empty());
    }

    pub(crate) fn without_secrets(&self, mut text: String) -> String {
        for secret in &self.secrets {
            text = text.replace(secret.as_str(), "***");
        }
        text
    }
}

/// Bodies of requests lie in memory: they are there at once.
fn bytes_of(body: HttpRequestBody) -> Result<Vec<u8>, HttpError> {
    let mut out = Vec::with_capacity(body.content_length());
    let mut body = pin!(body);
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut context) {
        if let Ok(bytes) = frame?.into_data() {
            out.extend_from_slice(&bytes);
        }
    }
    Ok(out)
}

fn body_of(body: Body) -> Result<Vec<u8>, Fault> {
    body.into_with_config().limit(LONGEST_BODY).read_to_vec().map_err(|error| match error {
        ureq::Error::BodyExceedsLimit(limit) => {
            Fault::Garbled { reason: format!("more than {limit} bytes, where a range was asked for") }
        }
        ureq::Error::Timeout(_) => Fault::Silence,
        _ => Fault::Cut,
    })
}

fn fault(error: ureq::Error) -> Fault {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            Fault::NoConnection { reason: "no answer in time".to_string() }
        }
        ureq::Error::Timeout(_) => Fault::Silence,
        ureq::Error::Io(e) if is_cut(e.kind()) => Fault::Cut,
        ureq::Error::Protocol(e) => Fault::Garbled { reason: shorten(&e.to_string()) },
        other => Fault::NoConnection { reason: shorten(&other.to_string()) },
    }
}

fn is_cut(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
    )
}
