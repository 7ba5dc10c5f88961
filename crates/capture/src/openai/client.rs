//! One server and how patiently it is asked.
//!
//! Invariant: an answer is given on only when it is whole. Whatever else comes (silence, a status that asks to come
//! again, half a stream, no JSON) is a fault, and the same request is sent again after a pause that doubles each time.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use draftsmith_formats::run::{ServerApi, ServerTable};
use serde::Deserialize;
use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};

use super::error::{Fault, ServerError};
use super::wire::{self, Reply};
use crate::{Prompt, Request};

/// Pause before the first repetition; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause that we choose ourselves.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Longest pause that a server may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Repetitions of one request that nobody hears about: single faults are common where many share a server.
const QUIET_REPETITIONS: u32 = 2;
/// Bytes read of a body that is not an answer.
const SIDE_BODY_BYTES: u64 = 1 << 20;
/// A wish to stop is noticed this often in a pause.
const STOP_POLL: Duration = Duration::from_millis(50);

/// How requests under way are called off.
#[derive(Debug)]
pub(super) struct Flow<'a> {
    /// The user's wish to stop.
    stop: &'a AtomicBool,
    /// Answers that are coming are still welcome, but nothing is asked again.
    pub(super) draining: AtomicBool,
    /// Nobody wants the answers any more.
    pub(super) cancelled: AtomicBool,
}

impl<'a> Flow<'a> {
    pub(super) fn new(stop: &'a AtomicBool) -> Flow<'a> {
        Flow { stop, draining: AtomicBool::new(false), cancelled: AtomicBool::new(false) }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.stop.load(Ordering::Relaxed)
    }
}

/// Why an attempt gave nothing.
enum Failure {
    Passing(Fault),
    Lasting(ServerError),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::Passing(fault)
    }
}

/// How often a server was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Requests sent.
    pub requests: u64,
    /// Those that failed and were worth another attempt, by what went wrong.
    pub faults: BTreeMap<String, u64>,
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} requests", self.requests)?;
        let faults: Vec<String> = self.faults.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        if faults.is_empty() { Ok(()) } else { write!(f, ", of them failed: {}", faults.join(", ")) }
    }
}

fn agent(table: &ServerTable, connections: usize) -> Agent {
    let timeout = Some(Duration::from_secs_f64(table.timeout_s));
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

/// The metrics page of a server, which stands beside `/v1`; `None` if it has none.
pub fn metrics_page(table: &ServerTable, key: Option<&str>) -> Option<String> {
    let url = table.url.trim_end_matches('/');
    let root = url.strip_suffix("/v1").unwrap_or(url);
    let request = with_key(agent(table, 1).get(format!("{root}/metrics")), key);
    let answer = request.call().ok().filter(|answer| answer.status() == 200)?;
    String::from_utf8(read_body(answer).ok()?).ok()
}

/// One server.
pub(super) struct Client<'a> {
    pub(super) table: &'a ServerTable,
    url: &'a str,
    key: Option<String>,
    agent: Agent,
    model: String,
    stops: Vec<String>,
    note: &'a (dyn Fn(&str) + Sync),
    asked: Mutex<Asked>,
}

impl<'a> Client<'a> {
    /// Finds out which model is meant.
    pub(super) fn connect(
        table: &'a ServerTable,
        key: Option<String>,
        connections: usize,
        stops: Vec<String>,
        note: &'a (dyn Fn(&str) + Sync),
        flow: &Flow<'_>,
    ) -> Result<Option<Client<'a>>, ServerError> {
        let agent = agent(table, connections);
        let url = table.url.trim_end_matches('/');
        let asked = Mutex::default();
        let mut client = Client { table, url, key, agent, model: String::new(), stops, note, asked };
        match &table.model {
            Some(model) => client.model.clone_from(model),
            None => match client.persist("models", flow, || client.only_model())? {
                Some(model) => client.model = model,
                None => return Ok(None),
            },
        }
        Ok(Some(client))
    }

    /// Requests so far.
    pub(super) fn asked(&self) -> Asked {
        self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn count(&self, add: impl FnOnce(&mut Asked)) {
        add(&mut self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Streams the answer to a prompt; `None` if it was called off.
    pub(super) fn answer(
        &self,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<Option<(Reply, bool)>, ServerError> {
        let mut body = self.body(request, prompt);
        body.insert("stream".to_string(), true.into());
        body.insert("stream_options".to_string(), serde_json::json!({ "include_usage": true }));
        let limit = wire::byte_limit(prompt.max_new_tokens);
        let reply = self.persist(&request.id, flow, || {
            let answer = self.post(&request.id, &body, "text/event-stream")?;
            let go_on = || !flow.is_cancelled();
            let Some(reply) = Reply::stream(answer.into_body().into_reader(), limit, &go_on)? else {
                return Ok(None);
            };
            let cut = reply.is_cut()?;
            Ok(Some((reply, cut)))
        })?;
        let Some((reply, cut)) = reply.flatten() else { return Ok(None) };
        self.compare(request, prompt, &reply)?;
        match reply.beside {
            Some(what) => {
                let (url, row) = (self.url.to_string(), request.id.clone());
                Err(ServerError::NotPlain { url, row, what })
            }
            None => Ok(Some((reply, cut))),
        }
    }

    /// Asks for one token, without a stream, to learn how many tokens the server reads in the prompt: not all servers
    /// say so in a stream.
    pub(super) fn greet(
        &self,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<(), ServerError> {
        let mut body = self.body(request, prompt);
        body.insert("max_tokens".to_string(), 1.into());
        let reply = self.persist(&request.id, flow, || {
            let mut reply = Reply::default();
            reply.take(&read_body(self.post(&request.id, &body, "application/json")?)?)?;
            Ok(reply)
        })?;
        let Some(reply) = reply else { return Ok(()) };
        if reply.prompt_tokens.is_none() && self.table.compare_prompts {
            (self.note)(&format!(
                "`{}` does not count the tokens of prompts: whether it reads what training sees is not known",
                self.url
            ));
        }
        self.compare(request, prompt, &reply)
    }

    fn compare(&self, request: &Request, prompt: &Prompt, reply: &Reply) -> Result<(), ServerError> {
        let ours = prompt.ids.len();
        match reply.prompt_tokens {
            Some(theirs) if theirs != ours as u64 && self.table.compare_prompts => {
                let (url, row) = (self.url.to_string(), request.id.clone());
                Err(ServerError::OtherPrompt { url, row, ours, theirs })
            }
            _ => Ok(()),
        }
    }

    fn body(&self, request: &Request, prompt: &Prompt) -> Map<String, Value> {
        let mut body = wire::body(self.table.api, request, prompt, &self.stops);
        body.insert("model".to_string(), self.model.as_str().into());
        body.extend(self.table.extra.clone());
        body
    }

    fn only_model(&self) -> Result<String, Failure> {
        #[derive(Deserialize)]
        struct Model {
            id: String,
        }
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        let request = self.agent.get(format!("{}/models", self.url)).header("Accept", "application/json");
        let request = with_key(request, self.key.as_deref());
        let answer = self.check(request.call(), "models", "application/json")?;
        let models: Models = serde_json::from_slice(&read_body(answer)?)
            .map_err(|e| Fault::Garbled { reason: e.to_string() })?;
        let mut models: Vec<String> = models.data.into_iter().map(|m| m.id).collect();
        match models.len() {
            1 => Ok(models.remove(0)),
            _ => Err(Failure::Lasting(ServerError::WhichModel { url: self.url.to_string(), models })),
        }
    }

    fn post(
        &self,
        row: &str,
        body: &Map<String, Value>,
        wanted: &'static str,
    ) -> Result<Response<Body>, Failure> {
        let path = match self.table.api {
            ServerApi::Text | ServerApi::Ids => "completions",
            ServerApi::Chat => "chat/completions",
        };
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
        let mut answer = match sent {
            Ok(answer) => answer,
            Err(ureq::Error::Timeout(_)) => return Err(Fault::Silence.into()),
            Err(ureq::Error::Io(e)) if e.kind() != std::io::ErrorKind::ConnectionRefused => {
                return Err(Fault::Cut.into());
            }
            Err(e) => return Err(Fault::NoConnection { reason: wire::shorten(&e.to_string()) }.into()),
        };
        let status = answer.status().as_u16();
        let header =
            |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_string);
        if status == 200 {
            let found = header("content-type").unwrap_or_default();
            return match found.starts_with(wanted) {
                true => Ok(answer),
                false => Err(Fault::ContentType { found: wire::shorten(&found), wanted }.into()),
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
            Ok(body) => wire::error_text(&body),
            Err(_) => wire::shorten(text.as_deref().unwrap_or_default()),
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
            if attempts > self.table.retries || flow.draining.load(Ordering::Relaxed) {
                let (url, row) = (self.url.to_string(), row.to_string());
                return Err(ServerError::GaveUp { url, row, attempts, last: fault });
            }
            let pause = pause(attempts, &fault, RandomState::new().hash_one(row));
            if attempts > QUIET_REPETITIONS {
                (self.note)(&format!(
                    "`{}`, request for `{row}`: {fault}; attempt {} of {} in {:.0} s",
                    self.url,
                    attempts + 1,
                    self.table.retries + 1,
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

/// Between half and all of a pause that doubles with each attempt, so that requests that failed together do not come
/// back together; never less than the server asked for.
fn pause(attempts: u32, fault: &Fault, random: u64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << (attempts - 1).min(16)).min(LONGEST_PAUSE);
    let jitter = 0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64;
    let ours = doubled.mul_f64(jitter);
    match fault {
        Fault::Status { retry_after: Some(theirs), .. } => ours.max(*theirs),
        _ => ours,
    }
}

fn read_body(answer: Response<Body>) -> Result<Vec<u8>, Fault> {
    answer.into_body().into_with_config().limit(SIDE_BODY_BYTES).read_to_vec().map_err(|e| match e {
        ureq::Error::Timeout(_) => Fault::Silence,
        ureq::Error::BodyExceedsLimit(limit) => Fault::TooLarge { limit },
        _ => Fault::Cut,
    })
}

#[cfg(test)]
mod tests {
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
}
