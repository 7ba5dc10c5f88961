//! The OpenAI protocol of answers over [`Http`]: what is sent, and what makes an answer whole.

use std::sync::Arc;

use draftsmith_formats::run::{ServerApi, ServerTable};
use serde_json::{Map, Value};
use ureq::Body;
use ureq::http::Response;

use super::wire::{self, Reply};
use crate::http::{
    Asked, Failure, Flow, Http, HttpOptions, SIDE_BODY_BYTES, ServerError, read_body, side_page,
};
use crate::{Prompt, Request};

/// The metrics page of a server, which stands beside `/v1`; `None` if it has none.
pub fn metrics_page(table: &ServerTable, key: Option<&str>) -> Option<String> {
    side_page(&table.url, "metrics", key, table.timeout_s)
}

/// One server.
pub(super) struct Client<'a> {
    http: Http<'a>,
    table: &'a ServerTable,
    model: String,
    stops: Vec<String>,
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
        let http = Http::new(HttpOptions {
            url: &table.url,
            key,
            timeout_s: table.timeout_s,
            retries: table.retries,
            connections,
            note: Arc::new(note),
        });
        let model = match &table.model {
            Some(model) => Some(model.clone()),
            None => http.only_model(flow)?,
        };
        Ok(model.map(|model| Client { http, table, model, stops }))
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
    ) -> Result<Option<(Reply, bool)>, ServerError> {
        let mut body = self.body(request, prompt);
        body.insert("stream".to_string(), true.into());
        body.insert("stream_options".to_string(), serde_json::json!({ "include_usage": true }));
        let limit = wire::byte_limit(prompt.max_new_tokens);
        let reply = self.http.persist(&request.id, flow, || {
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
                let (url, row) = (self.http.url().to_string(), request.id.clone());
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
        let reply = self.http.persist(&request.id, flow, || {
            let mut reply = Reply::default();
            reply.take(&read_body(self.post(&request.id, &body, "application/json")?, SIDE_BODY_BYTES)?)?;
            Ok(reply)
        })?;
        let Some(reply) = reply else { return Ok(()) };
        if reply.prompt_tokens.is_none() && self.table.compare_prompts {
            self.http.note(&format!(
                "`{}` does not count the tokens of prompts: whether it reads what training sees is not known",
                self.http.url()
            ));
        }
        self.compare(request, prompt, &reply)
    }

    fn compare(&self, request: &Request, prompt: &Prompt, reply: &Reply) -> Result<(), ServerError> {
        let ours = prompt.ids.len();
        match reply.prompt_tokens {
            Some(theirs) if theirs != ours as u64 && self.table.compare_prompts => {
                let (url, row) = (self.http.url().to_string(), request.id.clone());
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
