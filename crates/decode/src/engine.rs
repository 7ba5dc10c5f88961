//! The step of the engine: propose, verify in one target pass for all sequences, commit or roll back.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_core::{AcceptStats, LayerId, Sampling, TargetTokenId, TokenTree, choose_token, verify_tree};
use draftsmith_kernels::Kernels;
use draftsmith_model::{StepItem, StepOutput, Target};

use crate::DecodeError;
use crate::auto::{Costs, Grown, Pacer, Rates};
use crate::calibrate;
use crate::drafter::{DraftPlan, Drafter, Features};
use crate::lookup::Lookup;
use crate::prefix::Prefixes;
use crate::session::{Auto, FinishReason, Generation, Session, TokenEvent, TokenOrigin};

/// Prompt tokens taken into one step; bounds the memory of a prefill. Does not change any bit of the result.
const PREFILL_CHUNK: usize = 256;

/// One request's settings.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Ids that end the answer; they are part of the output.
    pub stop_ids: Vec<u32>,
    /// How much to draft.
    pub draft: DraftPlan,
}

/// Settings of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Sequences decoded side by side.
    pub batch_size: usize,
}

/// A target with an optional drafter.
pub struct Engine<K: Kernels> {
    target: Arc<Target<K>>,
    drafter: Option<Arc<dyn Drafter<K>>>,
    max_context: usize,
    costs: OnceLock<Costs>,
    /// What the last automatic sequence learnt about its proposals.
    rates: Mutex<Rates>,
    prefixes: Mutex<Prefixes<K>>,
}

impl<K: Kernels> Engine<K> {
    /// An engine on this target.
    pub fn new(target: Arc<Target<K>>, drafter: Option<Arc<dyn Drafter<K>>>) -> Engine<K> {
        let max_context = target.config().max_position;
        Engine {
            target,
            drafter,
            max_context,
            costs: OnceLock::new(),
            rates: Mutex::default(),
            prefixes: Mutex::new(Prefixes::new(0)),
        }
    }

    /// Limits prompt and answer together; never above what the target was made for.
    pub fn with_max_context(mut self, max_context: usize) -> Engine<K> {
        self.max_context = max_context.min(self.target.config().max_position);
        self
    }

    /// The target.
    pub fn target(&self) -> &Arc<Target<K>> {
        &self.target
    }

    /// True if a drafter is loaded.
    pub fn has_drafter(&self) -> bool {
        self.drafter.is_some()
    }

    /// Replaces the drafter; costs are measured anew.
    pub fn set_drafter(&mut self, drafter: Option<Arc<dyn Drafter<K>>>) {
        self.drafter = drafter;
        self.costs = OnceLock::new();
        self.rates = Mutex::default();
    }

    /// Sets costs that were measured before, on this machine with this target, drafter and thread count.
    pub fn with_costs(mut self, costs: Costs) -> Engine<K> {
        self.costs = OnceLock::from(costs);
        self
    }

    /// Keeps the caches of finished sequences, up to `bytes` in all, for requests that begin with the same tokens.
    /// Sequences with a draft neither use nor leave one: the draft would miss the features of the shared part.
    pub fn with_prefix_cache(mut self, bytes: usize) -> Engine<K> {
        let config = self.target.config();
        let per_token = 2 * size_of::<f32>() * config.kv_width() * config.num_layers;
        self.prefixes = Mutex::new(Prefixes::new(bytes / per_token.max(1)));
        self
    }

    /// What passes cost here; measured at the first call, in about a second.
    pub fn costs(&self) -> &Costs {
        self.costs.get_or_init(|| calibrate::measure(&self.target, self.drafter.as_deref()))
    }

    /// Generates one answer. `on_token` sees each committed token and may end the generation.
    ///
    /// # Errors
    /// Prompts that are empty, too long or outside the vocabulary; a plan without a drafter.
    pub fn generate(
        &self,
        prompt_ids: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&TokenEvent) -> ControlFlow<()>,
    ) -> Result<Generation, DecodeError> {
        let mut session = self.begin(prompt_ids, options)?;
        while session.finish.is_none() {
            self.step(std::slice::from_mut(&mut session), &mut |_, event| on_token(event));
        }
        Ok(self.end(session))
    }

    /// Generates many answers with continuous batching: a finished sequence's place is taken by the next request.
    ///
    /// `next` hands out requests (an id and a prompt) until it returns `None`; `on_done` receives each answer as it
    /// finishes and may stop the batch (answers under way are dropped).
    ///
    /// # Errors
    /// As [`Engine::generate`], for the first bad request.
    pub fn generate_batch(
        &self,
        batch: BatchOptions,
        next: &mut dyn FnMut() -> Option<(usize, Vec<u32>, GenerateOptions)>,
        on_done: &mut dyn FnMut(usize, Generation) -> ControlFlow<()>,
    ) -> Result<(), DecodeError> {
        let mut running: Vec<Session<'_, K>> = Vec::new();
        let mut ids: Vec<usize> = Vec::new();
        let mut drained = false;
        loop {
            while !drained && running.len() < batch.batch_size.max(1) {
                match next() {
                    None => drained = true,
                    Some((id, prompt, options)) => {
                        running.push(self.begin(&prompt, &options)?);
                        ids.push(id);
                    }
                }
            }
            if running.is_empty() {
                return Ok(());
            }
            self.step(&mut running, &mut |_, _| ControlFlow::Continue(()));
            let mut i = 0;
            while i < running.len() {
                if running[i].finish.is_some() {
                    let (session, id) = (running.swap_remove(i), ids.swap_remove(i));
                    if on_done(id, self.end(session)).is_break() {
                        return Ok(());
                    }
                } else {
                    i += 1;
                }
            }
        }
    }

    fn begin(&self, prompt_ids: &[u32], options: &GenerateOptions) -> Result<Session<'_, K>, DecodeError> {
        let vocab = self.target.config().vocab_size;
        if prompt_ids.is_empty() {
            return Err(DecodeError::EmptyPrompt);
        }
        if prompt_ids.len() >= self.max_context {
            return Err(DecodeError::PromptTooLong { found: prompt_ids.len(), limit: self.max_context });
        }
        if let Some(position) = prompt_ids.iter().position(|id| *id as usize >= vocab) {
            return Err(DecodeError::TokenOutOfRange { id: prompt_ids[position], position, vocab });
        }
        let drafter = match (options.draft, &self.drafter) {
            (DraftPlan::None, _) | (DraftPlan::Auto, None) => None,
            (_, None) => return Err(DecodeError::NoDraft),
            (_, Some(drafter)) => Some(drafter.begin()),
        };
        let auto = (options.draft == DraftPlan::Auto).then(|| {
            let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Auto {
                pacer: Pacer::new(self.costs(), rates),
                lookup: Lookup::default(),
                grown: Grown::default(),
                clock: Instant::now(),
            }
        });
        let shared = match &drafter {
            None => self.prefixes.lock().unwrap_or_else(PoisonError::into_inner).take(prompt_ids),
            Some(_) => None,
        };
        Ok(Session {
            kv: shared.unwrap_or_else(|| self.target.new_kv()),
            drafter,
            auto,
            tokens: prompt_ids.to_vec(),
            prompt_len: prompt_ids.len(),
            options: options.clone(),
            stats: AcceptStats::default(),
            finish: (options.max_new_tokens == 0).then_some(FinishReason::Length),
            prefill: Duration::ZERO,
            started: Instant::now(),
            first_token: None,
        })
    }

    /// Ends a sequence and keeps what the next ones can use: its cache, and what it learnt about its proposals.
    fn end(&self, session: Session<'_, K>) -> Generation {
        if let Some(auto) = &session.auto {
            *self.rates.lock().unwrap_or_else(PoisonError::into_inner) = auto.pacer.rates().clone();
        }
        let alone = session.drafter.is_none();
        let (generation, tokens, kv) = session.finish();
        if alone {
            self.prefixes.lock().unwrap_or_else(PoisonError::into_inner).keep(tokens, kv);
        }
        generation
    }

    /// Runs the head on the rows `wanted` of a step; full logits only for those that are sampled.
    fn choices(
        &self,
        output: &StepOutput<K::Buf>,
        wanted: &[u32],
        is_greedy: impl Fn(usize) -> bool,
    ) -> Choices {
        let (mut greedy, mut sampled, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for (i, row) in wanted.iter().enumerate() {
            if is_greedy(i) {
                rows.push(Choice::Greedy(0));
                greedy.push(*row);
            } else {
                rows.push(Choice::Sampled(sampled.len()));
                sampled.push(*row);
            }
        }
        if !greedy.is_empty() {
            let mut ids = self.target.argmax(output, &greedy).into_iter();
            for row in &mut rows {
                if let Choice::Greedy(id) = row {
                    *id = ids.next().expect("one arg-max per greedy row");
                }
            }
        }
        let logits = if sampled.is_empty() { Vec::new() } else { self.target.logits(output, &sampled) };
        Choices { rows, logits, vocab: self.target.config().vocab_size }
    }

    /// One target pass over all unfinished sessions.
    fn step(
        &self,
        sessions: &mut [Session<'_, K>],
        on_token: &mut dyn FnMut(usize, &TokenEvent) -> ControlFlow<()>,
    ) {
        // Propose.
        let others = sessions.iter().filter(|s| s.finish.is_none()).count().saturating_sub(1);
        let mut work: Vec<(usize, Vec<u32>, TokenTree)> = Vec::new();
        for (index, session) in sessions.iter_mut().enumerate().filter(|(_, s)| s.finish.is_none()) {
            let left = session.prompt_left();
            if left > 0 {
                let from = session.kv.len();
                let chunk = session.tokens[from..from + left.min(PREFILL_CHUNK)].to_vec();
                work.push((index, chunk, TokenTree::default()));
                continue;
            }
            // The target adds one token itself, so a proposal may be one shorter than the room.
            let room = session.room(self.max_context) - 1;
            let position = session.tokens.len() as u64 - 1;
            let sampling = &session.options.sampling;
            let tree = match (&mut session.auto, &mut session.drafter) {
                (Some(auto), drafter) => {
                    let repetition = auto.lookup.find(&session.tokens);
                    let drafter = drafter.as_deref_mut();
                    auto.grown = auto.pacer.grow(
                        self.costs(),
                        drafter,
                        repetition,
                        &session.tokens,
                        room,
                        others,
                        sampling,
                    );
                    auto.grown.tree.clone()
                }
                (None, None) => TokenTree::default(),
                (None, Some(d)) => d.propose(&session.options.draft, room, sampling, position),
            };
            let mut rows = vec![*session.tokens.last().expect("a session has tokens")];
            rows.extend(tree.tokens.iter().map(|t| t.0));
            work.push((index, rows, tree));
        }
        // Verify: the root row, then the tree below it.
        let parents: Vec<Vec<Option<u32>>> = work
            .iter()
            .map(|(_, rows, tree)| {
                if tree.is_empty() {
                    TokenTree::chain_parents(rows.len())
                } else {
                    let below = tree.parents.iter().map(|p| Some(p.map_or(0, |p| p + 1)));
                    std::iter::once(None).chain(below).collect()
                }
            })
            .collect();
        let wants_layers = work.iter().any(|(index, ..)| sessions[*index].drafter.is_some());
        let layers: &[LayerId] = match &self.drafter {
            Some(drafter) if wants_layers => drafter.target_layers(),
            _ => &[],
        };
        let bases: Vec<usize> = work.iter().map(|(index, ..)| sessions[*index].kv.len()).collect();
        let output = {
            let mut kvs: Vec<Option<&mut _>> = sessions.iter_mut().map(|s| Some(&mut s.kv)).collect();
            let mut items: Vec<StepItem<'_, K>> = work
                .iter()
                .zip(&parents)
                .map(|((index, rows, _), parents)| StepItem {
                    kv: kvs[*index].take().expect("each session is in the step once"),
                    tokens: rows,
                    parents,
                })
                .collect();
            self.target.forward(&mut items, layers)
        };
        // Logits: every row of a verify, the last row of a finished prefill.
        let mut first_row = 0u32;
        let mut wanted: Vec<u32> = Vec::new();
        let mut spans: Vec<(u32, usize, usize)> = Vec::new();
        for ((index, rows, _), base) in work.iter().zip(&bases) {
            let session = &sessions[*index];
            let count = if *base >= session.prompt_len {
                rows.len()
            } else {
                usize::from(session.prompt_left() == 0)
            };
            spans.push((first_row, wanted.len(), count));
            let end = first_row + rows.len() as u32;
            wanted.extend(end - count as u32..end);
            first_row = end;
        }
        let choices = self.choices(&output, &wanted, |row| {
            let owner = spans.partition_point(|(_, at, _)| *at <= row) - 1;
            sessions[work[owner].0].options.sampling.is_greedy()
        });
        // Commit or roll back.
        for (((index, rows, tree), base), (first_row, at, count)) in work.iter().zip(&bases).zip(&spans) {
            let session = &mut sessions[*index];
            let sampling = session.options.sampling;
            let prefilled = *base < session.prompt_len;
            let emit: &mut dyn FnMut(&TokenEvent) -> ControlFlow<()> = &mut |e| on_token(*index, e);
            if prefilled {
                let mut next: Vec<u32> =
                    session.tokens[*base + 1..(*base + rows.len() + 1).min(session.prompt_len)].to_vec();
                if *count == 1 {
                    let choice = choices.get(*at, &sampling, session.prompt_len as u64);
                    session.prefill = session.started.elapsed();
                    session.first_token = Some(Instant::now());
                    if let Some(auto) = &mut session.auto {
                        auto.clock = Instant::now();
                    }
                    commit(session, &[(choice.0, TokenOrigin::Plain)], self.max_context, emit);
                    next.push(choice.0);
                }
                let rows: Vec<u32> = (*first_row..first_row + next.len() as u32).collect();
                session.feed_drafter(&Features { output: &output, rows: &rows }, &next);
                continue;
            }
            // The choice after a node of depth d stands d + 2 positions behind the root row's own position.
            let root_position = *base as u64;
            let root_choice = choices.get(*at, &sampling, root_position + 1);
            let depths = tree.depths();
            let below: Vec<TargetTokenId> = depths
                .iter()
                .enumerate()
                .map(|(i, depth)| choices.get(at + i + 1, &sampling, root_position + u64::from(*depth) + 2))
                .collect();
            let verdict = verify_tree(tree, root_choice, &below);
            let accepted = verdict.accepted_path.len();
            let mut tokens: Vec<(u32, TokenOrigin)> = verdict
                .accepted_path
                .iter()
                .map(|n| (tree.tokens[*n as usize].0, TokenOrigin::Draft))
                .collect();
            let leaf = tree.is_empty()
                || accepted > 0 && !tree.parents.contains(&verdict.accepted_path.last().copied());
            let origin = match (tree.is_empty(), leaf) {
                (true, _) => TokenOrigin::Plain,
                (false, true) => TokenOrigin::Bonus,
                (false, false) => TokenOrigin::Recovered,
            };
            tokens.push((verdict.target_token.0, origin));
            let committed = commit(session, &tokens, self.max_context, emit);
            session.stats.record(tree.depth(), tree.len(), accepted.min(committed), committed);
            if let Some(auto) = &mut session.auto {
                let now = Instant::now();
                let elapsed_ms = (now - auto.clock).as_secs_f32() * 1e3;
                auto.clock = now;
                auto.pacer.learn(self.costs(), &auto.grown, &verdict.accepted_path, accepted + 1, elapsed_ms);
            }
            // Rows that stay in the cache: the root and the accepted path.
            let keep: Vec<u32> =
                std::iter::once(0).chain(verdict.accepted_path.iter().map(|n| n + 1)).collect();
            session.kv.commit(self.target.kernels(), *base, &keep);
            let feature_rows: Vec<u32> = keep.iter().map(|r| first_row + r).collect();
            let next: Vec<u32> = tokens.iter().map(|(t, _)| *t).collect();
            session.feed_drafter(&Features { output: &output, rows: &feature_rows }, &next);
        }
    }
}

/// What the target says in the rows of a step that were asked for.
struct Choices {
    rows: Vec<Choice>,
    /// `[sampled rows, V]`
    logits: Vec<f32>,
    vocab: usize,
}

enum Choice {
    /// The arg-max.
    Greedy(u32),
    /// Row of the logits.
    Sampled(usize),
}

impl Choices {
    /// The target's token after row `row`, at `position`.
    fn get(&self, row: usize, sampling: &Sampling, position: u64) -> TargetTokenId {
        match self.rows[row] {
            Choice::Greedy(id) => TargetTokenId(id),
            Choice::Sampled(at) => {
                choose_token(&self.logits[at * self.vocab..(at + 1) * self.vocab], sampling, position)
            }
        }
    }
}

/// Appends tokens until one ends the answer; returns how many were committed.
fn commit<K: Kernels>(
    session: &mut Session<'_, K>,
    tokens: &[(u32, TokenOrigin)],
    max_context: usize,
    on_token: &mut dyn FnMut(&TokenEvent) -> ControlFlow<()>,
) -> usize {
    for (i, (id, origin)) in tokens.iter().enumerate() {
        let event = TokenEvent { id: *id, position: session.tokens.len(), origin: *origin };
        session.tokens.push(*id);
        let go_on = on_token(&event).is_continue();
        session.finish = if session.options.stop_ids.contains(id) {
            Some(FinishReason::Stop)
        } else if session.room(max_context) == 0 {
            Some(FinishReason::Length)
        } else if !go_on {
            Some(FinishReason::Cancelled)
        } else {
            None
        };
        if session.finish.is_some() {
            return i + 1;
        }
    }
    tokens.len()
}
