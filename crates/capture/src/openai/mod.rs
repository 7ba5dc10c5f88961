//! Any server that speaks the OpenAI protocol as a [`Generator`], or several that serve the same model.
//!
//! Requests run side by side, one thread each, up to a bound. What the run asks for and gets stays on the calling
//! thread, so a run sees the same calls as from the target in this process, only in another order.
//!
//! Invariants: an answer is reported once, and only when it is whole; after an error nothing new is asked, and the
//! answers that are still coming are reported before the error is.

mod client;
mod wire;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};

use draftsmith_formats::run::ServerTable;

use self::client::Client;
use self::wire::Reply;
use crate::http::{Alive, Asked, Failure, Flow, Patience, Pool, Seat, ServerError, one_model};
use crate::{Answer, Generator, IdsFrom, Outcome, Prompt, Prompter, RegenerateError, Request};

pub use client::metrics_page;

/// A server, or several of the same model, as a [`Generator`].
pub struct OpenAiGenerator<'a> {
    /// Where they are and how they are asked; checked with the run file.
    pub server: &'a ServerTable,
    /// The key that they want.
    pub key: Option<String>,
    /// Renders prompts and judges answers.
    pub prompter: Prompter<'a>,
    /// Requests under way at once, at each server of weight 1.
    pub batch_size: usize,
    /// Set when the answers are not wanted any more.
    pub stop: &'a AtomicBool,
    /// Takes what a user should know: requests that keep failing, servers that are left out.
    pub note: &'a (dyn Fn(&str) + Sync),
    /// How often they were asked so far.
    pub asked: Asked,
    /// The same for each address.
    pub asked_each: Vec<(String, Asked)>,
    /// How many of several answer.
    pub alive: Alive,
}

impl Generator for OpenAiGenerator<'_> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let tokenizer = self.prompter.tokenizer;
        let stops = tokenizer.eos_ids().iter().map(|id| tokenizer.token_to_piece(*id));
        let stops = stops.map(|piece| String::from_utf8_lossy(piece).into_owned()).filter(|s| !s.is_empty());
        let stops: Vec<String> = stops.collect();
        let flow = Flow::new(self.stop);
        let addresses = self.server.addresses();
        let seats: Vec<Seat<'_>> = addresses
            .iter()
            .zip(self.server.weights())
            .map(|(url, weight)| {
                let limit = (self.batch_size as f64 * weight).round().max(1.0) as usize;
                Seat { url: url.trim_end_matches('/'), limit, weight }
            })
            .collect();
        let several = seats.len() > 1;
        let client = |seat: &Seat<'_>, url| {
            let patience = if several { Patience::Once } else { Patience::Waits };
            let limit = if several { seat.limit } else { self.batch_size };
            Client::new(
                self.server,
                url,
                patience,
                self.key.clone(),
                limit,
                stops.clone(),
                Arc::new(self.note),
            )
        };
        let clients: Vec<Client<'_>> =
            seats.iter().zip(&addresses).map(|(seat, url)| client(seat, *url)).collect();
        let pool =
            several.then(|| Pool::new(seats, self.server.retries, Arc::new(self.note), self.alive.clone()));
        let side = Side { clients, pool, model: OnceLock::new() };
        if !side.connect(&flow)? {
            return Ok(());
        }
        let ended = self.ask_all(&side, &flow, next, on_done);
        self.asked_each =
            side.clients.iter().map(|client| (client.url().to_string(), client.asked())).collect();
        self.asked = self.asked_each.iter().fold(Asked::default(), |sum, (_, asked)| sum + asked.clone());
        ended
    }
}

/// The server, or all of them.
struct Side<'a> {
    clients: Vec<Client<'a>>,
    /// Chooses among several.
    pool: Option<Pool<'a>>,
    /// What several servers list, as found at the start.
    model: OnceLock<String>,
}

impl Side<'_> {
    /// What can be known before there is a request; false if it was called off.
    fn connect(&self, flow: &Flow<'_>) -> Result<bool, ServerError> {
        match (&self.pool, self.clients.first()) {
            (None, Some(client)) => client
                .connect(flow)
                .map(|model| model.is_some())
                .map_err(|failure| failure.into_error(client.url(), "models")),
            // Several are asked all that there is to ask with the first request.
            (Some(_), _) => Ok(true),
            (None, None) => Ok(false),
        }
    }

    /// Before the first answer: whether the model there reads what training will see, of several at once.
    fn greet(&self, request: &Request, prompt: &Prompt, flow: &Flow<'_>) -> Result<(), ServerError> {
        let Some(pool) = &self.pool else {
            let Some(client) = self.clients.first() else { return Ok(()) };
            let greeted = client.greet(request, prompt, flow);
            return greeted.map_err(|failure| failure.into_error(client.url(), &request.id));
        };
        // All names first: a model that is not meant need not read the prompt.
        let row = &request.id;
        let listed = pool.check_all(row, flow, &|place| self.clients[place].connect(flow))?;
        let Some(listed) = listed else { return Ok(()) };
        let urls = self.clients.iter().map(Client::url);
        if let Some(model) = one_model(urls.zip(listed.iter().cloned()))? {
            let _ = self.model.set(model);
        }
        let greet = |place: usize| match &listed[place] {
            Some(_) => self.clients[place].greet(request, prompt, flow).map(Some),
            None => Ok(None),
        };
        pool.check_all(row, flow, &greet).map(|_| ())
    }

    fn answer(
        &self,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<Option<(Reply, bool)>, ServerError> {
        let Some(pool) = &self.pool else {
            let Some(client) = self.clients.first() else { return Ok(None) };
            let answer = client.answer(request, prompt, flow);
            return answer.map_err(|failure| failure.into_error(client.url(), &request.id));
        };
        pool.ask(&request.id, flow, &|place, fresh| {
            let client = &self.clients[place];
            if fresh {
                // Another program may have started at the address meanwhile.
                let Some(found) = client.connect(flow)? else { return Ok(None) };
                let wanted = self.model.get_or_init(|| found.clone());
                if *wanted != found {
                    let (url, wanted) = (client.url().to_string(), wanted.clone());
                    return Err(Failure::Lasting(ServerError::OtherModel { url, found, wanted }));
                }
                client.greet(request, prompt, flow)?;
            }
            let Some((reply, cut)) = client.answer(request, prompt, flow)? else { return Ok(None) };
            // Without a count a token is taken to have four letters.
            let tokens = reply.counted.unwrap_or(reply.text.len() as u64 / 4);
            Ok(Some(((reply, cut), 1 + tokens)))
        })
    }
}

impl OpenAiGenerator<'_> {
    fn ask_all(
        &self,
        side: &Side<'_>,
        flow: &Flow<'_>,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let at_once = side.pool.as_ref().map_or(self.batch_size, Pool::capacity);
        let (sender, receiver) = mpsc::channel();
        let mut failed = None;
        let mut greeted = false;
        let mut under_way = 0;
        std::thread::scope(|scope| {
            let mut ended = false;
            let mut report = |key: usize, outcome: Outcome| {
                if !ended && on_done(key, outcome).is_break() {
                    ended = true;
                    flow.cancelled.store(true, Ordering::Relaxed);
                }
            };
            loop {
                while failed.is_none() && !flow.is_cancelled() && under_way < at_once {
                    let Some(request) = next() else { break };
                    let prompt = match self.prompter.prompt(&request) {
                        Ok(prompt) => prompt,
                        Err(outcome) => {
                            report(request.key, outcome);
                            continue;
                        }
                    };
                    if !greeted {
                        if let Err(error) = side.greet(&request, &prompt, flow) {
                            failed = Some(error.into());
                            break;
                        }
                        greeted = true;
                    }
                    under_way += 1;
                    let sender = sender.clone();
                    scope.spawn(move || {
                        let answer = self.ask(side, &request, &prompt, flow);
                        // The receiver outlives all requests.
                        let _ = sender.send((request.key, answer));
                    });
                }
                if failed.is_some() {
                    flow.draining.store(true, Ordering::Relaxed);
                }
                if under_way == 0 {
                    break;
                }
                // A sender is kept here, so this waits until an answer comes.
                let Ok((key, answer)) = receiver.recv() else { break };
                under_way -= 1;
                match answer {
                    Ok(Some(answer)) => report(key, Outcome::Answered(answer)),
                    Ok(None) => {}
                    Err(error) => {
                        failed.get_or_insert(error);
                    }
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    fn ask(
        &self,
        side: &Side<'_>,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<Option<Answer>, RegenerateError> {
        let Some((reply, cut)) = side.answer(request, prompt, flow)? else { return Ok(None) };
        let tokenizer = self.prompter.tokenizer;
        let prompt_ids = reply.prompt_ids.clone().unwrap_or_else(|| prompt.ids.clone());
        let ends = |ids: &[u32]| ids.last().is_some_and(|id| tokenizer.eos_ids().contains(id));
        // Ids are used if they are whole: some servers lose a part of them in streams.
        let whole = reply.ids.clone().filter(|ids| reply.counted.is_none_or(|n| n == ids.len() as u64));
        if let Some(mut ids) = whole {
            if !cut && !ends(&ids) {
                ids.extend(self.prompter.stop_id());
            }
            return Ok(Some(self.prompter.judge(prompt_ids, ids, IdsFrom::Model, cut)));
        }
        // The answer by itself, as the model wrote it behind the prompt; the stop token is not part of the text.
        let mut ids = tokenizer
            .encode(&reply.text, false)
            .map_err(|source| RegenerateError::Text { id: request.id.clone(), source })?;
        if !cut {
            ids.extend(self.prompter.stop_id());
        }
        let ids_from = IdsFrom::Text { counted: reply.counted };
        let answer = self.prompter.judge(prompt_ids, ids, ids_from, cut);
        Ok(Some(Answer { text: reply.text, ..answer }))
    }
}
