//! The OpenAI protocol of answers over [`Http`]: what is sent, and what makes an answer whole.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use draftsmith_formats::run::{ServerApi, ServerTable};
use serde_json::{Map, Value};
use ureq::Body;
use ureq::http::Response;

use super::wire::{self, Reply};
use crate::http::{
    Asked, Failure, Flow, Http, HttpOptions, Note, Patience, SIDE_BODY_BYTES, ServerError, read_body,
    side_page,
};
use crate::{Prompt, Request};

/// The metrics page of a server, which stands beside `/v1`; `None` if it has none. Of several servers, the first.
pub fn metrics_page(table: &ServerTable, key: Option<&str>) -> Option<String> {
    side_page(table.addresses().first()?, "metrics", key, table.timeout_s)
}

/// One server.
pub(super) struct Client<'a> {
    http: Http<'a>,
    table: &'a ServerTable,
    /// Waits or not, whenever it is asked.
    patience: Patience,
    /// The name in requests; empty until it is known.
    model: Mutex<String>,
    stops: Vec<String>,
    /// The server is asked for token ids: it gave them with its first answer.
    gives_ids: AtomicBool,
}

impl<'a> Client<'a> {
    /// Nothing is sent yet.
    pub(super) fn new(
        table: &'a ServerTable,
        url: &'a str,
        patience: Patience,
        key: Option<String>,
        connections: usize,
        stops: Vec<String>,
        note: Note<'a>,
    ) -> Client<'a> {
        let (timeout_s, retries) = (table.timeout_s, table.retries);
        let http = Http::new(HttpOptions { url, key, timeout_s, retries, connections, note });
        let model = Mutex::new(table.model.clone().unwrap_or_default());
        Client { http, table, patience, model, stops, gives_ids: AtomicBool::new(false) }
    }

    /// Its address.
    pub(super) fn url(&self) -> &'a str {
        self.http.url()
    }

    /// Finds out which model is meant; `None` if it was called off.
    pub(super) fn connect(&self, flow: &Flow<'_>) -> Result<Option<String>, Failure> {
        let model = match &self.table.model {
            Some(model) => Some(model.clone()),
            None => self.http.only_model(self.patience, flow)?,
        };
        if let Some(model) = &model {
            self.model.lock().unwrap_or_else(PoisonError::into_inner).clone_from(model);
        }
        Ok(model)
    }

    /// Requests so far.
    pub(super) fn asked(&self) -> Asked {
        self.http.asked()
    }

    /// Streams the answer to a prompt; `None` if it was called off.
    pub(super) fn answer(
        &self,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<Option<(Reply, bool)>, Failure> {
        let reply = match self.gives_ids.load(Ordering::Relaxed) {
            false => self.stream(request, prompt, flow, false)?,
            true => match self.stream(request, prompt, flow, true) {
                // Some servers give ids, but not in streams of every endpoint.
                Err(error) if knows_no_field(&error) => {
                    if self.gives_ids.swap(false, Ordering::Relaxed) {
                        self.http.note(&format!("`{}` gives no token ids in streams", self.http.url()));
                    }
                    self.stream(request, prompt, flow, false)?
                }
                reply => reply?,
            },
        };
        let Some((reply, cut)) = reply else { return Ok(None) };
        self.compare(request, prompt, &reply)?;
        match reply.beside {
            Some(what) => {
                let (url, row) = (self.http.url().to_string(), request.id.clone());
                Err(Failure::Lasting(ServerError::NotPlain { url, row, what }))
            }
            None => Ok(Some((reply, cut))),
        }
    }

    fn stream(
        &self,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
        with_ids: bool,
    ) -> Result<Option<(Reply, bool)>, Failure> {
        let mut body = self.body(request, prompt, with_ids);
        body.insert("stream".to_string(), true.into());
        body.insert("stream_options".to_string(), serde_json::json!({ "include_usage": true }));
        let limit = wire::byte_limit(prompt.max_new_tokens);
        let reply = self.http.ask(self.patience, &request.id, flow, || {
            let answer = self.post(&request.id, &body, "text/event-stream")?;
            let go_on = || !flow.is_cancelled();
            let Some(reply) = Reply::stream(answer.into_body().into_reader(), limit, &go_on)? else {
                return Ok(None);
            };
            let cut = reply.is_cut()?;
            Ok(Some((reply, cut)))
        })?;
        Ok(reply.flatten())
    }

    /// Asks for one token, without a stream, to learn how many tokens the server reads in the prompt (not all servers
    /// say so in a stream) and whether it gives token ids.
    pub(super) fn greet(&self, request: &Request, prompt: &Prompt, flow: &Flow<'_>) -> Result<(), Failure> {
        let ask = |with_ids: bool| {
            let mut body = self.body(request, prompt, with_ids);
            body.insert("max_tokens".to_string(), 1.into());
            self.http.ask(self.patience, &request.id, flow, || {
                let mut reply = Reply::default();
                reply
                    .take(&read_body(self.post(&request.id, &body, "application/json")?, SIDE_BODY_BYTES)?)?;
                Ok(reply)
            })
        };
        let reply = match ask(true) {
            Err(error) if knows_no_field(&error) => ask(false)?,
            reply => reply?,
        };
        let Some(reply) = reply else { return Ok(()) };
        self.gives_ids.store(reply.ids.is_some(), Ordering::Relaxed);
        if reply.ids.is_none() {
            self.http.note(&format!(
                "`{}` gives no token ids: the text of its answers is tokenised here, and its counts are compared",
                self.http.url()
            ));
        }
        if reply.prompt_tokens.is_none() && self.table.compare_prompts {
            self.http.note(&format!(
                "`{}` does not count the tokens of prompts: whether it reads what training sees is not known",
                self.http.url()
            ));
        }
        self.compare(request, prompt, &reply)
    }

    fn compare(&self, request: &Request, prompt: &Prompt, reply: &Reply) -> Result<(), Failure> {
        let ours = prompt.ids.len();
        match reply.prompt_tokens {
            Some(theirs) if theirs != ours as u64 && self.table.compare_prompts => {
                let (url, row) = (self.http.url().to_string(), request.id.clone());
                Err(Failure::Lasting(ServerError::OtherPrompt { url, row, ours, theirs }))
            }
            _ => match reply.prompt_ids.as_ref().filter(|_| self.table.compare_prompts) {
                Some(theirs) if *theirs != prompt.ids => {
                    let at = theirs.iter().zip(&prompt.ids).take_while(|(a, b)| a == b).count();
                    let id = |ids: &[u32]| ids.get(at).map_or("nothing".to_string(), u32::to_string);
                    Err(Failure::Lasting(ServerError::Unexpected {
                        url: self.http.url().to_string(),
                        row: request.id.clone(),
                        field: format!("prompt_token_ids[{at}]").into(),
                        found: id(theirs).into(),
                        wanted: id(&prompt.ids).into(),
                    }))
                }
                _ => Ok(()),
            },
        }
    }

    fn body(&self, request: &Request, prompt: &Prompt, with_ids: bool) -> Map<String, Value> {
        let mut body = wire::body(self.table.api, request, prompt, &self.stops);
        if with_ids {
            // The name that vLLM and SGLang share.
            body.insert("return_token_ids".to_string(), true.into());
        }
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner).clone();
        body.insert("model".to_string(), model.into());
        body.extend(self.table.extra.clone());
        body
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
        self.http.post(path, row, body, wanted)
    }
}

/// True if the server may have refused a request for a field that it does not know.
fn knows_no_field(failure: &Failure) -> bool {
    matches!(failure, Failure::Lasting(ServerError::Refused { status: 400 | 422, .. }))
}
