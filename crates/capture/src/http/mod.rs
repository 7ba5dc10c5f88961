//! One server over HTTP and how patiently it is asked; several of them as a `Pool`.
//!
//! Invariant: an answer is given on only when it is whole. Whatever else comes (silence, a status that asks to come
//! again, half a body, no JSON) is a fault, and the same request is sent again after a pause that doubles each time. A
//! server that was never reached is not waited for: a wrong address would only be told after minutes.

mod error;
mod pool;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use draftsmith_core::patience::{self, shorten};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};

pub use error::{Asker, Fault, ServerError};
pub use pool::Alive;
pub(crate) use pool::{Pool, Seat, one_model};

/// Pause before the first repetition; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause that a server may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Repetitions of one request that nobody hears about: single faults are common where many share a server.
const QUIET_REPETITIONS: u32 = 2;
/// Bytes read of a body that is not an answer.
pub(crate) const SIDE_BODY_BYTES: u64 = 1 << 20;
/// A wish to stop is noticed this often in a pause.
const STOP_POLL: Duration = Duration::from_millis(50);

/// How requests under way are called off.
#[derive(Debug)]
pub(crate) struct Flow<'a> {
    /// The user's wish to stop.
    stop: &'a AtomicBool,
    /// Answers that are coming are still welcome, but nothing is asked again.
    pub(crate) draining: AtomicBool,
    /// Nobody wants the answers any more.
    pub(crate) cancelled: AtomicBool,
}

impl<'a> Flow<'a> {
    pub(crate) fn new(stop: &'a AtomicBool) -> Flow<'a> {
        Flow { stop, draining: AtomicBool::new(false), cancelled: AtomicBool::new(false) }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.stop.load(Ordering::Relaxed)
    }
}

/// Why an attempt gave nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Worth another attempt.
    Passing(Fault),
    /// The next attempt would end the same way.
    Lasting(ServerError),
}

impl Failure {
    /// As an error, where nobody tries again: [`Patience::Waits`] leaves only those.
    pub(crate) fn into_error(self, url: &str, row: &str) -> ServerError {
        match self {
            Failure::Lasting(error) => error,
            Failure::Passing(last) => {
                ServerError::GaveUp { url: url.to_string(), row: row.to_string(), attempts: 1, last }
            }
        }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::Passing(fault)
    }
}

/// Who waits for a server that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// The request itself, for as long as the run file allows: there is no other server.
    Waits,
    /// Nobody here: another server is asked.
    Once,
}

/// How often a server was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Requests sent.
    pub requests: u64,
    /// Those that failed and were worth another attempt, by what went wrong.
    pub faults: BTreeMap<String, u64>,
}

impl std::ops::Add for Asked {
    type Output = Asked;

    fn add(mut self, other: Asked) -> Asked {
        self.requests += other.requests;
        for (kind, count) in other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} requests", self.requests)?;
        let faults: Vec<String> = self.faults.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        if faults.is_empty() { Ok(()) } else { write!(f, ", of them failed: {}", faults.join(", ")) }
    }
}

fn agent(timeout_s: f64, connections: usize) -> Agent {
    let timeout = Some(Duration::from_secs_f64(timeout_s));
    let tls = ureq::tls::TlsConfig::builder().root_certs(ureq::tls::RootCerts::PlatformVerifier).build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        // A redirected POST would arrive as a GET.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(timeout)
        .timeout_recv_response(timeout)
        .timeout_per_read(timeout)
        .max_idle_connections(connections)
        .max_idle_connections_per_host(connections)
        .user_agent(concat!("draftsmith/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

fn with_key<B>(request: RequestBuilder<B>, key: Option<&str>) -> RequestBuilder<B> {
    match key {
        Some(key) => request.header("Authorization", format!("Bearer {key}")),
        None => request,
    }
}

/// The page beside `/v1` that an engine keeps its counters on; `None` if it has none.
pub(crate) fn side_page(url: &str, page: &str, key: Option<&str>, timeout_s: f64) -> Option<String> {
    let url = url.trim_end_matches('/');
    let root = url.strip_suffix("/v1").unwrap_or(url);
    let request = with_key(agent(timeout_s, 1).get(format!("{root}/{page}")), key);
    let answer = request.call().ok().filter(|answer| answer.status() == 200)?;
    String::from_utf8(read_body(answer, SIDE_BODY_BYTES).ok()?).ok()
}

/// Whether something listens at an address: one attempt, any answer counts.
///
/// # Errors
/// [`ServerError::GaveUp`] if there is no connection.
pub fn knock(url: &str, key: Option<&str>, timeout_s: f64) -> Result<(), ServerError> {
    let http = Http::new(HttpOptions {
        url,
        key: key.map(str::to_string),
        timeout_s,
        retries: 0,
        connections: 1,
        note: Arc::new(|_: &str| {}),
    });
    match http.only_model(Patience::Waits, &Flow::new(&AtomicBool::new(false))) {
        Err(Failure::Lasting(error @ ServerError::GaveUp { last: Fault::NoConnection { .. }, .. })) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// Takes what a user should know: requests that keep failing.
pub type Note<'a> = Arc<dyn Fn(&str) + Send + Sync + 'a>;

/// Where a server is and how patiently it is asked.
pub(crate) struct HttpOptions<'a> {
    pub(crate) url: &'a str,
    pub(crate) key: Option<String>,
    pub(crate) timeout_s: f64,
    pub(crate) retries: u32,
    /// Requests under way at once.
    pub(crate) connections: usize,
    /// Takes what a user should know: requests that keep failing.
    pub(crate) note: Note<'a>,
}

/// One server.
pub(crate) struct Http<'a> {
    url: &'a str,
    key: Option<String>,
    agent: Agent,
    retries: u32,
    note: Note<'a>,
    asked: Mutex<Asked>,
    /// Something at the address has answered, or taken a connection.
    alive: AtomicBool,
}

impl<'a> Http<'a> {
    pub(crate) fn new(options: HttpOptions<'a>) -> Http<'a> {
        Http {
            url: options.url.trim_end_matches('/'),
            key: options.key,
            agent: agent(options.timeout_s, options.connections),
            retries: options.retries,
            note: options.note,
            asked: Mutex::default(),
            alive: AtomicBool::new(false),
        }
    }

    /// Its address, for messages.
    pub(crate) fn url(&self) -> &'a str {
        self.url
    }

    pub(crate) fn note(&self, line: &str) {
        (self.note)(line);
    }

    /// Requests so far.
    pub(crate) fn asked(&self) -> Asked {
        self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn count(&self, add: impl FnOnce(&mut Asked)) {
        add(&mut self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// One attempt, or as many as the patience allows; `None` if it was called off.
    pub(crate) fn ask<T>(
        &self,
        patience: Patience,
        row: &str,
        flow: &Flow<'_>,
        attempt: impl Fn() -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        match patience {
            Patience::Waits => self.persist(row, flow, attempt).map_err(Failure::Lasting),
            Patience::Once if flow.is_cancelled() => Ok(None),
            Patience::Once => attempt().map(Some).inspect_err(|failure| {
                if let Failure::Passing(fault) = failure {
                    self.count(|asked| *asked.faults.entry(fault.kind()).or_default() += 1);
                }
            }),
        }
    }

    /// The only model that the server lists; `None` if it was called off.
    pub(crate) fn only_model(&self, patience: Patience, flow: &Flow<'_>) -> Result<Option<String>, Failure> {
        #[derive(Deserialize)]
        struct Model {
            id: String,
        }
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        self.ask(patience, "models", flow, || {
            let request = self.agent.get(format!("{}/models", self.url)).header("Accept", "application/json");
            let request = with_key(request, self.key.as_deref());
            let answer = self.check(request.call(), "models", "application/json")?;
            let models: Models = parse(&read_body(answer, SIDE_BODY_BYTES)?)?;
            let mut models: Vec<String> = models.data.into_iter().map(|m| m.id).collect();
            match models.len() {
                1 => Ok(models.remove(0)),
                _ => Err(Failure::Lasting(ServerError::WhichModel { url: self.url.to_string(), models })),
            }
        })
    }

    /// One attempt; `row` names the request in errors.
    pub(crate) fn post(
        &self,
        path: &str,
        row: &str,
        body: &impl Serialize,
        wanted: &'static str,
    ) -> Result<Response<Body>, Failure> {
        let request = self
            .agent
            .post(format!("{}/{path}", self.url))
            .header("Content-Type", "application/json")
            .header("Accept", wanted);
        let request = with_key(request, self.key.as_deref());
        let bytes = serde_json::to_vec(body).expect("a request holds only what JSON can say");
        self.check(request.send(&bytes), row, wanted)
    }

    /// An answer of the wanted type, or why there is none.
    fn check(
        &self,
        sent: Result<Response<Body>, ureq::Error>,
        row: &str,
        wanted: &'static str,
    ) -> Result<Response<Body>, Failure> {
        self.count(|asked| asked.requests += 1);
        let refused = matches!(&sent, Err(ureq::Error::HostNotFound | ureq::Error::ConnectionFailed))
            || matches!(&sent, Err(ureq::Error::Io(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused);
        if !refused {
            self.alive.store(true, Ordering::Relaxed);
        }
        let mut answer = match sent {
            Ok(answer) => answer,
            Err(ureq::Error::Timeout(_)) => return Err(Fault::Silence.into()),
            Err(ureq::Error::Io(e)) if e.kind() != std::io::ErrorKind::ConnectionRefused => {
                return Err(Fault::Cut.into());
            }
            Err(e) => return Err(Fault::NoConnection { reason: shorten(&e.to_string()) }.into()),
        };
        let status = answer.status().as_u16();
        let header =
            |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_string);
        if status == 200 {
            let found = header("content-type").unwrap_or_default();
            return match found.starts_with(wanted) {
                true => Ok(answer),
                false => Err(Fault::ContentType { found: shorten(&found), wanted }.into()),
            };
        }
        // Dates are not used by servers of models; the usual pause stands in for one.
        let retry_after = header("retry-after")
            .and_then(|text| text.trim().parse::<f64>().ok())
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .map(|pause| pause.min(LONGEST_RETRY_AFTER));
        let location = header("location").map(|to| format!("it moved to `{to}`"));
        let text = answer.body_mut().with_config().limit(SIDE_BODY_BYTES).lossy_utf8(true).read_to_string();
        let said = match serde_json::from_str(text.as_deref().unwrap_or_default()) {
            Ok(body) => error_text(&body),
            Err(_) => shorten(text.as_deref().unwrap_or_default()),
        };
        let message = self.without_key(location.unwrap_or(said));
        let (url, row) = (self.url.to_string(), row.to_string());
        Err(match status {
            408 | 425 | 429 | 500.. => Failure::Passing(Fault::Status { status, message, retry_after }),
            401 | 403 => {
                Failure::Lasting(ServerError::NoAccess { url, status, message, had_key: self.key.is_some() })
            }
            _ => Failure::Lasting(ServerError::Refused { url, row, status, message }),
        })
    }

    /// Servers like to repeat the key that they refuse.
    fn without_key(&self, text: String) -> String {
        match &self.key {
            Some(key) if !key.is_empty() => text.replace(key.as_str(), "***"),
            _ => text,
        }
    }

    /// Tries until it works, cannot work, or the patience ends; `None` if it was called off.
    fn persist<T>(
        &self,
        row: &str,
        flow: &Flow<'_>,
        attempt: impl Fn() -> Result<T, Failure>,
    ) -> Result<Option<T>, ServerError> {
        let mut attempts = 0;
        loop {
            if flow.is_cancelled() {
                return Ok(None);
            }
            let fault = match attempt() {
                Ok(done) => return Ok(Some(done)),
                Err(Failure::Lasting(error)) => return Err(error),
                Err(Failure::Passing(fault)) => fault,
            };
            self.count(|asked| *asked.faults.entry(fault.kind()).or_default() += 1);
            attempts += 1;
            let never_seen =
                matches!(fault, Fault::NoConnection { .. }) && !self.alive.load(Ordering::Relaxed);
            if attempts > self.retries || never_seen || flow.draining.load(Ordering::Relaxed) {
                let (url, row) = (self.url.to_string(), row.to_string());
                return Err(ServerError::GaveUp { url, row, attempts, last: fault });
            }
            let pause = pause(attempts, &fault, RandomState::new().hash_one(row));
            if attempts > QUIET_REPETITIONS {
                (self.note)(&format!(
                    "`{}`, request for `{row}`: {fault}; attempt {} of {} in {:.0} s",
                    self.url,
                    attempts + 1,
                    self.retries + 1,
                    pause.as_secs_f64()
                ));
            }
            let until = Instant::now() + pause;
            while Instant::now() < until && !flow.is_cancelled() && !flow.draining.load(Ordering::Relaxed) {
                std::thread::sleep(STOP_POLL.min(until.saturating_duration_since(Instant::now())));
            }
        }
    }
}

/// The pause that we make; never less than the server asked for.
fn pause(attempts: u32, fault: &Fault, random: u64) -> Duration {
    let ours = patience::pause(FIRST_PAUSE, attempts, random);
    match fault {
        Fault::Status { retry_after: Some(theirs), .. } => ours.max(*theirs),
        _ => ours,
    }
}

/// A body of at most `limit` bytes.
pub(crate) fn read_body(answer: Response<Body>, limit: u64) -> Result<Vec<u8>, Fault> {
    answer.into_body().into_with_config().limit(limit).read_to_vec().map_err(|e| match e {
        ureq::Error::Timeout(_) => Fault::Silence,
        ureq::Error::BodyExceedsLimit(limit) => Fault::TooLarge { limit },
        _ => Fault::Cut,
    })
}

/// A JSON body; anything else is a fault.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(bytes).map_err(|e| Fault::Garbled { reason: e.to_string() })
}

/// What an error body says, in one short line.
pub(crate) fn error_text(body: &Value) -> String {
    let text = ["message", "detail", "error"].iter().find_map(|key| match &body[*key] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        inner => Some(error_text(inner)),
    });
    shorten(&text.unwrap_or_else(|| match body {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use draftsmith_core::patience::LONGEST_PAUSE;

    use super::*;

    #[test]
    fn pauses_double_with_jitter_and_heed_the_server() {
        for attempts in 1..12 {
            let whole = FIRST_PAUSE.as_secs_f64() * f64::from(1u32 << (attempts - 1));
            let whole = whole.min(LONGEST_PAUSE.as_secs_f64());
            for random in [0, u64::MAX / 3, u64::MAX] {
                let pause = pause(attempts, &Fault::Cut, random).as_secs_f64();
                assert!(pause >= 0.499 * whole && pause <= whole, "{pause} at attempt {attempts}");
            }
        }
        assert_ne!(pause(3, &Fault::Cut, 1 << 60), pause(3, &Fault::Cut, 1 << 63));
        let asked =
            Fault::Status { status: 429, message: String::new(), retry_after: Some(Duration::from_secs(90)) };
        assert_eq!(pause(1, &asked, 0), Duration::from_secs(90));
        assert!(pause(u32::MAX, &Fault::Cut, 0) <= LONGEST_PAUSE);
    }

    #[test]
    fn error_bodies_are_told_in_one_line() {
        for (body, text) in [
            (json!({"error": {"message": "no such model\nhelp"}}), "no such model"),
            (json!({"detail": "missing"}), "missing"),
            (json!("plain"), "plain"),
            (json!({"error": "flat"}), "flat"),
            (json!({"x": 1}), "{\"x\":1}"),
        ] {
            assert_eq!(error_text(&body), text);
        }
    }
}
