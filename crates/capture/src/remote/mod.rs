//! Hidden states by servers of vLLM or SGLang, as these servers are, without patches.
//!
//! What must be here all the same: the target's weights. The final norm (vLLM hands out the state before it) and the
//! comparison of the first row use them now, the teacher's head and the draft's embedding do in training.
//!
//! Invariants: rows are handed on in order, each once; every answer has the ids, the length, the number of layers, the
//! width and the type that were asked for, or it is an error that names the field; nothing is padded, cut or dropped.
//! Answers do not say which layers they hold, so the first row is compared with the target in this process.
//!
//! Shape legend: `S` tokens of a row, `K` captured layers, `L` layers of the target, `Ht` target width.

mod compare;
mod sglang;
mod states;
mod vllm;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};

use draftsmith_core::LayerId;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::run::{CaptureServerKind, CaptureServerTable};
use draftsmith_kernels::Kernels;
use draftsmith_model::Target;

use self::sglang::Sglang;
use self::states::RemoteStates;
use self::vllm::Vllm;
use crate::http::{
    Alive, Asked, Failure, Flow, Http, HttpOptions, Note, Patience, Pool, Seat, ServerError, one_model,
};
use crate::{CaptureError, CaptureSource, TokenRow};

pub use sglang::read_json_states;
pub use states::{StatesProblem, StatesShape};
pub use vllm::read_state_file;

/// One server, or of SGLang one pair.
enum Engine<'a> {
    Vllm(Vllm<'a>),
    Sglang(Sglang<'a>),
}

impl<'a> Engine<'a> {
    /// The server at a place of the table; nothing is sent yet. `at_once`: requests under way.
    fn new(options: &RemoteOptions<'a>, place: usize, at_once: usize, patience: Patience) -> Engine<'a> {
        let table = options.server;
        let http = |url: &'a str| {
            Http::new(HttpOptions {
                url,
                key: options.key.clone(),
                timeout_s: table.timeout_s,
                retries: table.retries,
                connections: at_once,
                note: Arc::clone(&options.note),
            })
        };
        let url = table.addresses()[place];
        match table.kind {
            CaptureServerKind::Vllm => {
                let folder = table.folder(place).unwrap_or(Path::new(""));
                Engine::Vllm(Vllm::new(table, http(url), folder, patience))
            }
            CaptureServerKind::Sglang => {
                let second = table.final_address(place).unwrap_or(url);
                Engine::Sglang(Sglang { layers: http(url), last: http(second), patience })
            }
        }
    }

    fn url(&self) -> &'a str {
        match self {
            Engine::Vllm(vllm) => vllm.http.url(),
            Engine::Sglang(sglang) => sglang.layers.url(),
        }
    }

    /// Finds out which model is meant: an empty name where requests name none. `None` if it was called off.
    fn connect(&self, flow: &Flow<'_>) -> Result<Option<String>, Failure> {
        match self {
            Engine::Vllm(vllm) => vllm.connect(flow),
            Engine::Sglang(_) => Ok(Some(String::new())),
        }
    }

    /// States of a row; `None` if it was called off.
    fn states(
        &self,
        row: &TokenRow,
        layers: usize,
        width: usize,
        flow: &Flow<'_>,
    ) -> Result<Option<RemoteStates>, Failure> {
        match self {
            Engine::Vllm(vllm) => vllm.states(row, layers, width, flow),
            Engine::Sglang(sglang) => sglang.states(row, layers, width, flow),
        }
    }

    fn asked(&self) -> Asked {
        match self {
            Engine::Vllm(vllm) => vllm.http.asked(),
            Engine::Sglang(sglang) => sglang.layers.asked() + sglang.last.asked(),
        }
    }
}

/// The server, or all of them.
struct Servers<'a> {
    engines: Vec<Engine<'a>>,
    /// Chooses among several.
    pool: Option<Pool<'a>>,
    /// What several servers list, as found at the start.
    model: OnceLock<String>,
    /// Several were checked, with the first row.
    checked: AtomicBool,
}

/// What a [`RemoteCapture`] is made from.
pub struct RemoteOptions<'a> {
    /// Where the server is and how it is asked; checked with the run file.
    pub server: &'a CaptureServerTable,
    /// The key that it wants.
    pub key: Option<String>,
    /// Set when the states are not wanted any more.
    pub stop: &'a AtomicBool,
    /// Takes what a user should know: requests that keep failing, servers that are left out.
    pub note: Note<'a>,
}

/// A server, or several of the same model, as a [`CaptureSource`].
pub struct RemoteCapture<'a, K: Kernels> {
    options: RemoteOptions<'a>,
    source: Arc<Source<K>>,
    servers: Option<Servers<'a>>,
    alive: Alive,
    /// The first row was compared with the target in this process. (Of several servers each was, before its first row.)
    compared: bool,
}

/// The target in this process, and what is wanted of it.
struct Source<K: Kernels> {
    kind: CaptureServerKind,
    target: Arc<Target<K>>,
    layers: Vec<LayerId>,
}

impl<K: Kernels> Source<K> {
    /// What the server must be started with to show these layers, in its own numbers.
    fn launch(&self) -> String {
        match self.kind {
            CaptureServerKind::Vllm => vllm::launch(&self.layers, self.target.config().num_layers as u32),
            CaptureServerKind::Sglang => sglang::launch(&self.layers),
        }
    }

    /// The row as training wants it.
    fn row(&self, row: TokenRow, states: RemoteStates) -> CaptureRow {
        let mut last = states.last;
        if self.kind == CaptureServerKind::Vllm {
            last = self.target.normed(&last);
        }
        CaptureRow { ids: row.ids, loss_mask: row.loss_mask, features: states.features, last }
    }

    /// Compares a row of the server at `url` with the target in this process.
    fn compare(&self, row: &CaptureRow, number: u64, url: &str) -> Result<(), CaptureError> {
        compare::compare(row, number, &self.target, &self.layers, url, || self.launch())
    }
}

impl<'a, K: Kernels> RemoteCapture<'a, K> {
    /// Captures the outputs of `layers` of the target that the servers serve. Nothing is sent yet.
    pub fn new(
        options: RemoteOptions<'a>,
        target: Arc<Target<K>>,
        layers: Vec<LayerId>,
    ) -> RemoteCapture<'a, K> {
        let source = Arc::new(Source { kind: options.server.kind, target, layers });
        let compared = !options.server.compare_states;
        RemoteCapture { options, source, servers: None, alive: Alive::default(), compared }
    }

    /// How often the servers were asked so far.
    pub fn asked(&self) -> Asked {
        self.asked_each().into_iter().fold(Asked::default(), |sum, (_, asked)| sum + asked)
    }

    /// The same for each address.
    pub fn asked_each(&self) -> Vec<(String, Asked)> {
        let engines = self.servers.iter().flat_map(|servers| &servers.engines);
        engines.map(|engine| (engine.url().to_string(), engine.asked())).collect()
    }

    /// How many of several servers answer.
    pub fn alive(&self) -> Alive {
        self.alive.clone()
    }

    /// What the server must be started with to show these layers, in its own numbers.
    pub fn launch(&self) -> String {
        self.source.launch()
    }

    /// The server, or all of them; `None` if it was called off.
    fn connect(&self, flow: &Flow<'_>) -> Result<Option<Servers<'a>>, ServerError> {
        let table = self.options.server;
        let at_once = table.concurrency as usize;
        let addresses = table.addresses();
        let (model, checked) = (OnceLock::new(), AtomicBool::new(false));
        if addresses.len() < 2 {
            let engine = Engine::new(&self.options, 0, at_once, Patience::Waits);
            let connected = engine.connect(flow);
            return match connected.map_err(|failure| failure.into_error(engine.url(), "models"))? {
                Some(_) => Ok(Some(Servers { engines: vec![engine], pool: None, model, checked })),
                None => Ok(None),
            };
        }
        let seats: Vec<Seat<'a>> = addresses
            .iter()
            .zip(table.weights())
            .map(|(url, weight)| {
                let limit = (at_once as f64 * weight).round().max(1.0) as usize;
                Seat { url: url.trim_end_matches('/'), limit, weight }
            })
            .collect();
        let engines = seats.iter().enumerate();
        let engines = engines
            .map(|(place, seat)| Engine::new(&self.options, place, seat.limit, Patience::Once))
            .collect();
        let pool = Pool::new(seats, table.retries, Arc::clone(&self.options.note), self.alive.clone());
        Ok(Some(Servers { engines, pool: Some(pool), model, checked }))
    }

    /// The row as training wants it, compared if it is the first of the only server.
    fn finish(&mut self, row: TokenRow, states: RemoteStates, url: &str) -> Result<CaptureRow, CaptureError> {
        let number = row.number;
        let row = self.source.row(row, states);
        if !self.compared {
            self.source.compare(&row, number, url)?;
            self.compared = true;
        }
        Ok(row)
    }

    fn capture_side_by_side(
        &mut self,
        servers: &Servers<'_>,
        flow: &Flow<'_>,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        let source = Arc::clone(&self.source);
        let (vocab, compares) = (source.target.config().vocab_size, self.options.server.compare_states);
        let concurrency = self.options.server.concurrency as usize;
        let at_once = servers.pool.as_ref().map_or(concurrency, Pool::capacity);
        let url = servers.engines.first().map_or("", Engine::url);
        let (sender, receiver) = mpsc::channel();
        // The first row that failed: which one comes first must not depend on who answers first.
        let mut failed: Option<(u64, CaptureError)> = None;
        std::thread::scope(|scope| {
            let (mut asked, mut handed_on, mut under_way) = (0u64, 0u64, 0usize);
            // Rows that came before one that is asked for longer.
            let mut early: BTreeMap<u64, (TokenRow, RemoteStates)> = BTreeMap::new();
            loop {
                // Rows that wait count too: a slow one must not let the others pile up.
                while failed.is_none() && !flow.is_cancelled() && under_way + early.len() < at_once {
                    let Some(row) = next() else { break };
                    let (place, sender) = (asked, sender.clone());
                    if let Err(error) = row.check(vocab) {
                        failed = Some((place, error));
                        break;
                    }
                    if let Err(error) = servers.check(&source, &row, compares, flow) {
                        failed = Some((place, error.into()));
                        break;
                    }
                    asked += 1;
                    under_way += 1;
                    let source = Arc::clone(&source);
                    scope.spawn(move || {
                        let states = servers.states(&source, &row, compares, flow);
                        // The receiver outlives all requests.
                        let _ = sender.send((place, row, states));
                    });
                }
                if failed.is_some() {
                    flow.draining.store(true, Ordering::Relaxed);
                }
                if under_way == 0 {
                    break;
                }
                // A sender is kept here, so this waits until an answer comes.
                let Ok((place, row, states)) = receiver.recv() else { break };
                under_way -= 1;
                match states {
                    Ok(Some(states)) => {
                        early.insert(place, (row, states));
                    }
                    Ok(None) => {}
                    Err(error) if failed.as_ref().is_none_or(|(first, _)| place < *first) => {
                        failed = Some((place, error.into()));
                    }
                    Err(_) => {}
                }
                while !flow.is_cancelled()
                    && let Some((row, states)) = early.remove(&handed_on)
                {
                    let place = handed_on;
                    handed_on += 1;
                    let goes_on = match self.finish(row, states, url) {
                        Ok(row) => on_row(row).is_continue(),
                        Err(error) => {
                            failed = Some((place, error));
                            false
                        }
                    };
                    if !goes_on {
                        flow.cancelled.store(true, Ordering::Relaxed);
                    }
                }
            }
        });
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl Servers<'_> {
    /// States of a row from one server, which is first checked, if it must be: its model, and its states against the
    /// target in this process. `None` if it was called off.
    fn states_of<K: Kernels>(
        &self,
        place: usize,
        source: &Source<K>,
        row: &TokenRow,
        compares: bool,
        flow: &Flow<'_>,
    ) -> Result<Option<(RemoteStates, String)>, Failure> {
        let engine = &self.engines[place];
        let Some(model) = engine.connect(flow)? else { return Ok(None) };
        let (layers, width) = (source.layers.len(), source.target.config().hidden_size);
        let Some(states) = engine.states(row, layers, width, flow)? else { return Ok(None) };
        if !compares {
            return Ok(Some((states, model)));
        }
        let whole = source.row(row.clone(), states.clone());
        match source.compare(&whole, row.number, engine.url()) {
            Ok(()) => Ok(Some((states, model))),
            Err(CaptureError::Server(error)) => Err(Failure::Lasting(error)),
            Err(
                CaptureError::Empty { .. }
                | CaptureError::Lengths { .. }
                | CaptureError::TokenOutOfRange { .. },
            ) => {
                unreachable!("the row was checked before it was asked for")
            }
        }
    }

    /// Checks several servers with the first row that is asked for, once.
    fn check<K: Kernels>(
        &self,
        source: &Source<K>,
        row: &TokenRow,
        compares: bool,
        flow: &Flow<'_>,
    ) -> Result<(), ServerError> {
        let Some(pool) = self.pool.as_ref().filter(|_| !self.checked.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let name = format!("row {}", row.number);
        // All names first: the states of a model that is not meant need not be computed.
        let listed = pool.check_all(&name, flow, &|place| self.engines[place].connect(flow))?;
        let Some(listed) = listed else { return Ok(()) };
        let urls = self.engines.iter().map(Engine::url);
        if let Some(model) = one_model(urls.zip(listed.iter().cloned()))? {
            let _ = self.model.set(model);
        }
        let compare = |place: usize| match &listed[place] {
            Some(_) => Ok(self.states_of(place, source, row, compares, flow)?.map(|_| ())),
            None => Ok(None),
        };
        if pool.check_all(&name, flow, &compare)?.is_none() {
            return Ok(());
        }
        self.checked.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// States of a row, from whichever server gives them; `None` if it was called off.
    fn states<K: Kernels>(
        &self,
        source: &Source<K>,
        row: &TokenRow,
        compares: bool,
        flow: &Flow<'_>,
    ) -> Result<Option<RemoteStates>, ServerError> {
        let (layers, width) = (source.layers.len(), source.target.config().hidden_size);
        let name = format!("row {}", row.number);
        let Some(pool) = &self.pool else {
            let Some(engine) = self.engines.first() else { return Ok(None) };
            let states = engine.states(row, layers, width, flow);
            return states.map_err(|failure| failure.into_error(engine.url(), &name));
        };
        let tokens = row.ids.len() as u64;
        pool.ask(&name, flow, &|place, fresh| {
            if !fresh {
                let states = self.engines[place].states(row, layers, width, flow)?;
                return Ok(states.map(|states| (states, tokens)));
            }
            let Some((states, found)) = self.states_of(place, source, row, compares, flow)? else {
                return Ok(None);
            };
            let wanted = self.model.get_or_init(|| found.clone());
            if *wanted != found {
                let (url, wanted) = (self.engines[place].url().to_string(), wanted.clone());
                return Err(Failure::Lasting(ServerError::OtherModel { url, found, wanted }));
            }
            Ok(Some((states, tokens)))
        })
    }
}

impl<K: Kernels> CaptureSource for RemoteCapture<'_, K> {
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        let flow = Flow::new(self.options.stop);
        let servers = match self.servers.take() {
            Some(servers) => servers,
            None => match self.connect(&flow)? {
                Some(servers) => servers,
                None => return Ok(()),
            },
        };
        // Of several servers each is compared where it is checked.
        self.compared |= servers.pool.is_some();
        let ended = self.capture_side_by_side(&servers, &flow, next, on_row);
        self.servers = Some(servers);
        ended
    }
}
