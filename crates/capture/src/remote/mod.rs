//! Hidden states by a server of vLLM or SGLang, as these servers are, without patches.
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use draftsmith_core::LayerId;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::run::{CaptureServerKind, CaptureServerTable};
use draftsmith_kernels::Kernels;
use draftsmith_model::Target;

use self::sglang::Sglang;
use self::states::RemoteStates;
use self::vllm::Vllm;
use crate::http::{Asked, Flow, Http, HttpOptions, Note, ServerError};
use crate::{CaptureError, CaptureSource, TokenRow};

pub use sglang::read_json_states;
pub use states::{StatesProblem, StatesShape};
pub use vllm::read_state_file;

/// The servers of one kind.
enum Engine<'a> {
    Vllm(Vllm<'a>),
    Sglang(Sglang<'a>),
}

impl<'a> Engine<'a> {
    /// `None` if it was called off.
    fn connect(options: &RemoteOptions<'a>, flow: &Flow<'_>) -> Result<Option<Engine<'a>>, ServerError> {
        let table = options.server;
        let http = |url: &'a str| {
            Http::new(HttpOptions {
                url,
                key: options.key.clone(),
                timeout_s: table.timeout_s,
                retries: table.retries,
                connections: table.concurrency as usize,
                note: Arc::clone(&options.note),
            })
        };
        Ok(match table.kind {
            CaptureServerKind::Vllm => Vllm::connect(table, http(&table.url), flow)?.map(Engine::Vllm),
            CaptureServerKind::Sglang => {
                let second = table.final_url.as_deref().unwrap_or(&table.url);
                Some(Engine::Sglang(Sglang { layers: http(&table.url), last: http(second) }))
            }
        })
    }

    /// States of a row; `None` if it was called off.
    fn states(
        &self,
        row: &TokenRow,
        layers: usize,
        width: usize,
        flow: &Flow<'_>,
    ) -> Result<Option<RemoteStates>, ServerError> {
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

/// What a [`RemoteCapture`] is made from.
pub struct RemoteOptions<'a> {
    /// Where the server is and how it is asked; checked with the run file.
    pub server: &'a CaptureServerTable,
    /// The key that it wants.
    pub key: Option<String>,
    /// Set when the states are not wanted any more.
    pub stop: &'a AtomicBool,
    /// Takes what a user should know: requests that keep failing.
    pub note: Note<'a>,
}

/// A server as a [`CaptureSource`].
pub struct RemoteCapture<'a, K: Kernels> {
    options: RemoteOptions<'a>,
    target: Arc<Target<K>>,
    layers: Vec<LayerId>,
    engine: Option<Engine<'a>>,
    /// The first row was compared with the target in this process.
    compared: bool,
}

impl<'a, K: Kernels> RemoteCapture<'a, K> {
    /// Captures the outputs of `layers` of the target that the server serves. Nothing is sent yet.
    pub fn new(
        options: RemoteOptions<'a>,
        target: Arc<Target<K>>,
        layers: Vec<LayerId>,
    ) -> RemoteCapture<'a, K> {
        let compared = !options.server.compare_states;
        RemoteCapture { options, target, layers, engine: None, compared }
    }

    /// How often the server was asked so far.
    pub fn asked(&self) -> Asked {
        self.engine.as_ref().map(Engine::asked).unwrap_or_default()
    }

    /// What the server must be started with to show these layers, in its own numbers.
    pub fn launch(&self) -> String {
        match self.options.server.kind {
            CaptureServerKind::Vllm => vllm::launch(&self.layers, self.target.config().num_layers as u32),
            CaptureServerKind::Sglang => sglang::launch(&self.layers),
        }
    }

    /// The row as training wants it, compared if it is the first.
    fn finish(&mut self, row: TokenRow, states: RemoteStates) -> Result<CaptureRow, CaptureError> {
        let mut last = states.last;
        if self.options.server.kind == CaptureServerKind::Vllm {
            last = self.target.normed(&last);
        }
        let number = row.number;
        let row = CaptureRow { ids: row.ids, loss_mask: row.loss_mask, features: states.features, last };
        if !self.compared {
            let url = self.options.server.url.trim_end_matches('/');
            compare::compare(&row, number, &self.target, &self.layers, url, || self.launch())?;
            self.compared = true;
        }
        Ok(row)
    }

    fn capture_side_by_side(
        &mut self,
        engine: &Engine<'_>,
        flow: &Flow<'_>,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        let (layers, config) = (self.layers.len(), self.target.config().clone());
        let at_once = self.options.server.concurrency as usize;
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
                    if let Err(error) = row.check(config.vocab_size) {
                        failed = Some((place, error));
                        break;
                    }
                    asked += 1;
                    under_way += 1;
                    scope.spawn(move || {
                        let states = engine.states(&row, layers, config.hidden_size, flow);
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
                    let goes_on = match self.finish(row, states) {
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

impl<K: Kernels> CaptureSource for RemoteCapture<'_, K> {
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        let flow = Flow::new(self.options.stop);
        let engine = match self.engine.take() {
            Some(engine) => engine,
            None => match Engine::connect(&self.options, &flow)? {
                Some(engine) => engine,
                None => return Ok(()),
            },
        };
        let ended = self.capture_side_by_side(&engine, &flow, next, on_row);
        self.engine = Some(engine);
        ended
    }
}
