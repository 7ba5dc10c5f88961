//! The step of the engine: propose, verify in one target pass for all sequences, commit or roll back.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_core::{
    AcceptStats, Distribution, DrawnChain, Draws, LayerId, TargetTokenId, TokenLogprobs, TokenTree,
    TreeVerdict, choose_token, verify_tree,
};
use draftsmith_kernels::{DrawRow, Kernels};
use draftsmith_model::{StepItem, StepOutput, Target};

use crate::DecodeError;
use crate::auto::{Grown, Pacer, Rates, StepTime};
use crate::calibrate;
use crate::costs::{Calibration, Costs, CostsOff, Ledger};
use crate::drafter::{Committed, DraftPlan, Drafter, Features};
use crate::drawn;
use crate::lookup::Lookup;
use crate::options::{GenerateOptions, States, Watch};
use crate::prefix::Prefixes;
use crate::session::{Auto, FinishReason, Finished, Generation, Session, TokenEvent, TokenOrigin};

/// What [`Engine::on_costs_off`] calls.
type CostsOffHook = Box<dyn Fn(&CostsOff) + Send + Sync>;

/// A target with an optional drafter.
pub struct Engine<K: Kernels> {
    target: Arc<Target<K>>,
    pub(crate) drafter: Option<Arc<dyn Drafter<K>>>,
    pub(crate) max_context: usize,
    pub(crate) costs: OnceLock<Costs>,
    /// What the steps say about the costs; `None` if they hold whatever happens.
    ledger: Option<Mutex<Ledger>>,
    /// Told when the steps contradict the costs.
    costs_off: Option<CostsOffHook>,
    /// What the last automatic sequence learnt about its proposals.
    rates: Mutex<Rates>,
    prefixes: Mutex<Prefixes<K>>,
    /// Memory for the logits of a step.
    logits: Mutex<Vec<f32>>,
}

impl<K: Kernels> Engine<K> {
    /// An engine on this target.
    pub fn new(target: Arc<Target<K>>, drafter: Option<Arc<dyn Drafter<K>>>) -> Engine<K> {
        let config = target.config();
        let max_context = config.max_position;
        // Keys and values as 16-bit floats.
        let token_bytes = 2 * 2 * config.kv_width() * config.num_layers;
        Engine {
            target,
            drafter,
            max_context,
            costs: OnceLock::new(),
            ledger: Some(Mutex::default()),
            costs_off: None,
            rates: Mutex::default(),
            prefixes: Mutex::new(Prefixes::new(0, token_bytes)),
            logits: Mutex::default(),
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
        self.ledger = Some(Mutex::default());
        self.rates = Mutex::default();
        self.prefixes().drop_drafts();
    }

    /// Sets costs that hold whatever the steps say.
    pub fn with_costs(mut self, costs: Costs) -> Engine<K> {
        self.costs = OnceLock::from(costs);
        self.ledger = None;
        self
    }

    /// Sets costs that were measured before, on this machine with this target, drafter and thread count. The times of
    /// real steps correct them.
    pub fn with_measured_costs(mut self, costs: Costs) -> Engine<K> {
        self.costs = OnceLock::from(costs);
        self.ledger = Some(Mutex::default());
        self
    }

    /// Calls `told` once if the times of real steps contradict the costs: passes of some sizes against each other, or
    /// all of them because the machine was busy when they were measured.
    pub fn on_costs_off(mut self, told: Box<dyn Fn(&CostsOff) + Send + Sync>) -> Engine<K> {
        self.costs_off = Some(told);
        self
    }

    /// Keeps the caches of finished sequences, up to `bytes` in all, for requests that begin with the same tokens.
    /// Those of sequences with a draft hold what the draft knows, too.
    pub fn with_prefix_cache(self, bytes: usize) -> Engine<K> {
        let config = self.target.config();
        let per_token = 2 * size_of::<f32>() * config.kv_width() * config.num_layers;
        self.limit_prefix_cache(bytes / per_token.max(1));
        self
    }

    /// Keeps as much as `tokens` take in the target's cache, what drafts hold counted in; the oldest make room.
    pub fn limit_prefix_cache(&self, tokens: usize) {
        self.prefixes().limit(tokens);
    }

    fn prefixes(&self) -> MutexGuard<'_, Prefixes<K>> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What passes cost here, as measured; at the first call, in about a second, if they are not set.
    pub fn costs(&self) -> &Costs {
        self.costs.get_or_init(|| self.calibrate(&mut |_, _| {}).costs)
    }

    /// The same as the steps since then correct it: what proposals are planned with.
    pub fn current_costs(&self) -> Costs {
        let costs = self.costs();
        match self.ledger() {
            Some(ledger) => ledger.corrected(costs),
            None => costs.clone(),
        }
    }

    /// Measures what passes cost here and now, in about a second, or three passes of each size where that takes longer.
    /// The engine goes on with the costs that it has. `progress` hears how much is done, of how much.
    pub fn calibrate(&self, progress: &mut dyn FnMut(usize, usize)) -> Calibration {
        calibrate::measure(&self.target, self.drafter.as_ref(), progress)
    }

    /// Bytes that a sequence with a draft keeps for each token beside the target's cache; 0 without a draft.
    pub fn draft_bytes_per_token(&self) -> usize {
        self.drafter.as_ref().map_or(0, |d| d.bytes_per_token())
    }

    /// Bytes that a sequence with a draft holds at most beside those: features that wait to be taken in.
    pub fn draft_bytes_per_sequence(&self) -> usize {
        self.drafter.as_ref().map_or(0, |d| d.bytes_per_session())
    }

    pub(crate) fn ledger(&self) -> Option<MutexGuard<'_, Ledger>> {
        Some(self.ledger.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Holds a pass against the costs, if there are any.
    fn learn_pass(&self, rows: usize, pass_ms: f32) {
        let Some(costs) = self.costs.get() else { return };
        let off = self.ledger().and_then(|mut ledger| ledger.pass(costs, rows, pass_ms));
        if let (Some(off), Some(told)) = (off, &self.costs_off) {
            told(&off);
        }
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
            self.step(std::slice::from_mut(&mut session), None, &mut |_, event| on_token(event));
        }
        Ok(self.end(session))
    }

    /// Starts a sequence.
    pub(crate) fn begin(
        &self,
        prompt_ids: &[u32],
        options: &GenerateOptions,
    ) -> Result<Session<K>, DecodeError> {
        let vocab = self.target.config().vocab_size;
        if prompt_ids.is_empty() {
            return Err(DecodeError::EmptyPrompt);
        }
        // An answer needs room for a token; without one the prompt may fill the context.
        let limit = self.max_context + usize::from(options.max_new_tokens == 0);
        if prompt_ids.len() >= limit {
            return Err(DecodeError::PromptTooLong { found: prompt_ids.len(), limit: self.max_context });
        }
        if let Some(position) = prompt_ids.iter().position(|id| *id as usize >= vocab) {
            return Err(DecodeError::TokenOutOfRange { id: prompt_ids[position], position, vocab });
        }
        let draft = drawn::plan(options, self.drafter.is_some())?;
        let drafter = match (draft, &self.drafter) {
            (DraftPlan::None, _) | (DraftPlan::Auto, None) => None,
            (_, None) => return Err(DecodeError::NoDraft),
            (_, Some(drafter)) => Some(drafter.begin()),
        };
        let auto = (draft == DraftPlan::Auto).then(|| {
            let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // Measured before the first step, not in it.
            self.costs();
            Auto {
                pacer: Pacer::new(rates),
                lookup: Lookup::default(),
                grown: Grown::default(),
                clock: Instant::now(),
                fed: false,
            }
        });
        let with = self.drafter.as_deref().filter(|_| drafter.is_some());
        let shared = match options.prompt_logprobs {
            // Kept rows of a prompt say nothing about its tokens any more.
            Some(_) => None,
            // The last token of what is asked for is never among what comes back.
            None => {
                let known = options.known_states.unwrap_or(prompt_ids.len());
                self.prefixes().take(&prompt_ids[..prompt_ids.len().min(known.saturating_add(1))], with)
            }
        };
        let (kv, known) = shared.unzip();
        let drafter = known.flatten().or(drafter);
        let kv = kv.unwrap_or_else(|| self.target.new_kv());
        Ok(Session {
            cached_len: kv.len(),
            kv,
            drafter,
            auto,
            drawn: None,
            tokens: prompt_ids.to_vec(),
            prompt_len: prompt_ids.len(),
            fill_to: prompt_ids.len(),
            prompt_logprobs: options.prompt_logprobs.map(|_| Vec::with_capacity(prompt_ids.len() - 1)),
            options: GenerateOptions { draft, ..options.clone() },
            grammar: options.grammar.as_ref().map(|g| g.begin()),
            stats: AcceptStats::default(),
            finish: (options.max_new_tokens == 0 && options.prompt_logprobs.is_none())
                .then_some(FinishReason::Length),
            prefill: Duration::ZERO,
            started: Instant::now(),
            first_token: None,
        })
    }

    /// Ends a sequence and keeps what the next ones can use: its cache, and what it learnt about its proposals.
    pub(crate) fn end(&self, session: Session<K>) -> Generation {
        if let Some(auto) = &session.auto {
            *self.rates.lock().unwrap_or_else(PoisonError::into_inner) = auto.pacer.rates().clone();
        }
        let Finished { generation, tokens, kv, drafter } = session.finish();
        self.prefixes().keep(tokens, kv, self.drafter.as_deref().zip(drafter));
        generation
    }

    /// Runs the head on the rows `wanted` of a step; full logits only for those whose arg-max is not enough.
    fn choices(
        &self,
        output: &StepOutput<K::Buf>,
        wanted: &[u32],
        argmax_only: impl Fn(usize) -> bool,
        by_device: impl Fn(usize) -> Option<Option<DrawRow>>,
    ) -> Choices {
        let vocab = self.target.config().vocab_size;
        let mut rows: Vec<Option<Choice>> = wanted.iter().map(|_| None).collect();
        if K::DRAWS && !(0..wanted.len()).all(&argmax_only) {
            // Which rows the device draws must not depend on the others: its noise and the host's are rounded apart, and a
            // text must not change with what else is in the step.
            let drawn: Vec<(usize, Option<DrawRow>)> =
                (0..wanted.len()).filter_map(|i| Some((i, by_device(i)?))).collect();
            let (own, draws): (Vec<u32>, Vec<_>) = drawn.iter().map(|(i, draw)| (wanted[*i], *draw)).unzip();
            let ids = if own.is_empty() { None } else { self.target.choose(output, &own, &draws) };
            for ((i, _), id) in drawn.iter().zip(ids.into_iter().flatten()) {
                rows[*i] = Some(Choice::Chosen(id));
            }
        }
        // What is left: places in `wanted`, of these those whose arg-max is not enough.
        let left: Vec<usize> = (0..wanted.len()).filter(|i| rows[*i].is_none()).collect();
        let asked: Vec<u32> = left.iter().map(|i| wanted[*i]).collect();
        let whole: Vec<u32> =
            (0u32..).zip(&left).filter(|(_, i)| !argmax_only(**i)).map(|(n, _)| n).collect();
        // The memory of the step before: fresh pages for a few rows of a large vocabulary take as long as choosing from them.
        let mut logits = std::mem::take(&mut *self.logits.lock().unwrap_or_else(PoisonError::into_inner));
        if left.is_empty() {
            logits.clear();
        } else {
            let best = self.target.argmax_and_logits(output, &asked, &whole, &mut logits);
            let mut with_logits = 0;
            for (i, best) in left.iter().zip(best) {
                rows[*i] = Some(match argmax_only(*i) {
                    true => Choice::Chosen(best),
                    false => {
                        with_logits += 1;
                        Choice::Logits(with_logits - 1)
                    }
                });
            }
        }
        let rows = rows.into_iter().map(|row| row.expect("every row was chosen or has logits")).collect();
        Choices { rows, logits, vocab }
    }

    /// One target pass over all unfinished sessions. `watch` comes with the ids of the sessions.
    pub(crate) fn step(
        &self,
        sessions: &mut [Session<K>],
        watch: Option<(&mut Watch<'_>, &[u64])>,
        on_token: &mut dyn FnMut(usize, &TokenEvent) -> ControlFlow<()>,
    ) {
        if sessions.iter().all(Session::is_over) {
            return;
        }
        // Propose.
        // Over all sequences: bounds the memory of a prefill and how long those that are decoding wait for it.
        let mut prefill_left = K::STEP_ROWS;
        let mut work: Vec<(usize, Vec<u32>, TokenTree)> = Vec::new();
        let mut decoding: Vec<usize> = Vec::new();
        for (index, session) in sessions.iter().enumerate().filter(|(_, s)| !s.is_over()) {
            let left = session.prompt_left();
            let rows = match left {
                0 => {
                    if session.finish.is_none() {
                        decoding.push(index);
                    }
                    vec![*session.tokens.last().expect("a session has tokens")]
                }
                _ => {
                    let from = session.kv.len();
                    session.tokens[from..from + left.min(prefill_left)].to_vec()
                }
            };
            if left > 0 {
                prefill_left -= rows.len();
            }
            if !rows.is_empty() {
                work.push((index, rows, TokenTree::default()));
            }
        }
        let rows: usize = work.iter().map(|(_, rows, _)| rows.len()).sum();
        let mut trees = self.propose(sessions, &decoding, rows - decoding.len()).into_iter();
        for (_, rows, tree) in work.iter_mut().filter(|(index, ..)| decoding.binary_search(index).is_ok()) {
            *tree = trees.next().expect("one for every sequence that decodes");
            rows.extend(tree.tokens.iter().map(|t| t.0));
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
        let layers: &[LayerId] = match (&watch, &self.drafter) {
            (Some((watch, _)), _) => watch.layers,
            (None, Some(drafter)) if wants_layers => drafter.target_layers(),
            _ => &[],
        };
        let began = Instant::now();
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
            let count = if session.finish.is_some() {
                0
            } else if *base >= session.fill_to {
                rows.len()
            } else {
                usize::from(session.prompt_left() == 0 && session.options.max_new_tokens > 0)
            };
            spans.push((first_row, wanted.len(), count));
            let end = first_row + rows.len() as u32;
            wanted.extend(end - count as u32..end);
            first_row = end;
        }
        let owner = |row: usize| spans.partition_point(|(_, at, _)| *at <= row) - 1;
        let choices = self.choices(
            &output,
            &wanted,
            |row| sessions[work[owner(row)].0].wants_argmax_only(),
            |row| {
                let of = owner(row);
                let (index, _, tree) = &work[of];
                // A drafted token's row says what follows it: its place is known from how deep it stands.
                let node = (row - spans[of].1).checked_sub(1).filter(|_| !tree.is_empty());
                let ahead = node.map_or(0, |node| tree.path_to(node as u32).len());
                sessions[*index].choice_by_device(ahead)
            },
        );
        let pass_ms = began.elapsed().as_secs_f32() * 1e3;
        // The head runs on every row of a pass that verifies; with a piece of a prompt it is another kind of pass.
        if wanted.len() == first_row as usize {
            self.learn_pass(wanted.len(), pass_ms);
        }
        // Commit or roll back.
        let mut costs: Option<Costs> = None;
        let mut fed: Vec<(usize, Vec<u32>, Vec<u32>)> = Vec::new();
        for (((index, rows, tree), base), (first_row, at, count)) in work.iter().zip(&bases).zip(&spans) {
            let session = &mut sessions[*index];
            if session.finish.is_some() {
                // Read for its states.
                continue;
            }
            let prefilled = *base < session.fill_to;
            let emit: &mut dyn FnMut(&TokenEvent) -> ControlFlow<()> = &mut |e| on_token(*index, e);
            if prefilled {
                let mut next: Vec<u32> =
                    session.tokens[*base + 1..(*base + rows.len() + 1).min(session.fill_to)].to_vec();
                self.score_prompt(session, &output, *first_row, *base);
                if session.prompt_left() == 0 && session.first_token.is_none() {
                    session.prefill = session.started.elapsed();
                }
                if session.prompt_left() == 0 && session.options.max_new_tokens == 0 {
                    session.finish = Some(FinishReason::Length);
                }
                if *count == 1 {
                    let chosen = choices.get(*at, session, &[]);
                    session.first_token.get_or_insert_with(Instant::now);
                    if let Some(auto) = &mut session.auto {
                        auto.clock = Instant::now();
                    }
                    next.push(chosen.id);
                    commit(session, vec![(chosen, TokenOrigin::Plain)], self.max_context, emit);
                }
                let rows: Vec<u32> = (*first_row..first_row + next.len() as u32).collect();
                fed.push((*index, rows, next));
                continue;
            }
            // What the target chooses along the path, its own last token included.
            let mut path: Vec<Chosen> = Vec::new();
            let verdict = match session.drawn.take().filter(|_| !tree.is_empty()) {
                Some(chain) => choices.verify_drawn(*at, session, &chain, &mut path),
                None => verify_tree(tree, |node| {
                    let chosen = choices.get(at + node.map_or(0, |n| n as usize + 1), session, &path);
                    let id = chosen.id;
                    path.push(chosen);
                    TargetTokenId(id)
                }),
            };
            let accepted = verdict.accepted_path.len();
            let leaf = tree.is_empty()
                || accepted > 0 && !tree.parents.contains(&verdict.accepted_path.last().copied());
            let last_origin = match (tree.is_empty(), leaf) {
                (true, _) => TokenOrigin::Plain,
                (false, true) => TokenOrigin::Bonus,
                (false, false) => TokenOrigin::Recovered,
            };
            let next: Vec<u32> = path.iter().map(|c| c.id).collect();
            let origins = std::iter::repeat_n(TokenOrigin::Draft, accepted).chain([last_origin]);
            let tokens: Vec<(Chosen, TokenOrigin)> = path.into_iter().zip(origins).collect();
            let committed = commit(session, tokens, self.max_context, emit);
            session.stats.record(tree.depth(), tree.len(), accepted.min(committed), committed);
            if let Some(auto) = &mut session.auto {
                let now = Instant::now();
                let time = StepTime { elapsed_ms: (now - auto.clock).as_secs_f32() * 1e3, pass_ms };
                auto.clock = now;
                let costs = costs.get_or_insert_with(|| self.current_costs());
                auto.pacer.learn(costs, &auto.grown, &verdict.accepted_path, accepted + 1, time);
            }
            // Rows that stay in the cache: the root and the accepted path.
            let keep: Vec<u32> =
                std::iter::once(0).chain(verdict.accepted_path.iter().map(|n| n + 1)).collect();
            session.kv.commit(self.target.kernels(), *base, &keep);
            let feature_rows: Vec<u32> = keep.iter().map(|r| first_row + r).collect();
            if let Some(auto) = &mut session.auto {
                auto.fed = auto.grown.root_ms.is_some();
            }
            fed.push((*index, feature_rows, next));
        }
        *self.logits.lock().unwrap_or_else(PoisonError::into_inner) = choices.logits;
        if let Some((watch, ids)) = watch {
            let (features, last) = self.target.states(&output);
            let (joined, width) = (features.len() / output.last.rows, output.last.width);
            let wanted = |index: usize| sessions[index].options.known_states.is_some();
            let parts = work.iter().zip(&bases).zip(&spans).filter(|(((index, ..), _), _)| wanted(*index));
            for (((index, rows, _), position), (first_row, ..)) in parts {
                let of = *first_row as usize..*first_row as usize + rows.len();
                let states = States {
                    position: *position,
                    features: &features[of.start * joined..of.end * joined],
                    last: &last[of.start * width..of.end * width],
                };
                (watch.on_states)(ids[*index], states);
            }
        }
        self.feed_drafter(sessions, &output, &fed);
    }

    /// Hands committed positions to the drafter, of sequences that have one and go on: rows of the step, and the tokens
    /// that follow them.
    fn feed_drafter(
        &self,
        sessions: &mut [Session<K>],
        output: &StepOutput<K::Buf>,
        fed: &[(usize, Vec<u32>, Vec<u32>)],
    ) {
        let Some(drafter) = &self.drafter else { return };
        // What ends may be gone on with.
        let keeps = self.prefixes().is_on();
        let mut fed = fed.iter().peekable();
        let mut committed = Vec::new();
        for (index, session) in sessions.iter_mut().enumerate() {
            let Some((_, rows, next_tokens)) = fed.next_if(|(of, ..)| *of == index) else { continue };
            if let Some(own) = session.drafter.as_deref_mut().filter(|_| keeps || session.finish.is_none()) {
                committed.push(Committed { session: own, features: Features { output, rows }, next_tokens });
            }
        }
        drafter.take_in(&mut committed);
    }
}

/// What the target says in the rows of a step that were asked for.
struct Choices {
    rows: Vec<Choice>,
    /// `[rows with logits, V]`
    logits: Vec<f32>,
    vocab: usize,
}

enum Choice {
    /// The arg-max, or what the device drew.
    Chosen(u32),
    /// Row of the logits.
    Logits(usize),
}

/// A token of the target's own choice.
struct Chosen {
    id: u32,
    logprobs: Option<TokenLogprobs>,
}

impl Choices {
    /// The target's token in row `row`, which follows the session's text and then `path`. To be asked in the order of
    /// the text: a grammar is taken forward with it.
    fn get<K: Kernels>(&self, row: usize, session: &mut Session<K>, path: &[Chosen]) -> Chosen {
        let raw = match self.rows[row] {
            Choice::Chosen(id) => return Chosen { id, logprobs: None },
            Choice::Logits(at) => &self.logits[at * self.vocab..(at + 1) * self.vocab],
        };
        let options = &session.options;
        let position = (session.tokens.len() + path.len()) as u64;
        let id = if options.shaping.is_none() && session.grammar.is_none() {
            choose_token(raw, &options.sampling, position)
        } else {
            let mut logits = raw.to_vec();
            let (prompt, answer) = session.tokens.split_at(session.prompt_len);
            let answer: Vec<u32> = answer.iter().copied().chain(path.iter().map(|c| c.id)).collect();
            options.shaping.apply(&mut logits, prompt, &answer);
            if let Some(grammar) = &mut session.grammar {
                grammar.mask(&mut logits);
            }
            let chosen = choose_token(&logits, &options.sampling, position);
            if let Some(grammar) = &mut session.grammar {
                grammar.advance(chosen.0);
            }
            chosen
        }
        .0;
        Chosen { id, logprobs: options.logprobs.map(|top| TokenLogprobs::of(raw, id, top)) }
    }

    /// Verifies a drawn chain whose rows begin at `row`, and adds what is committed to `path`.
    fn verify_drawn<K: Kernels>(
        &self,
        row: usize,
        session: &mut Session<K>,
        chain: &DrawnChain,
        path: &mut Vec<Chosen>,
    ) -> TreeVerdict {
        let raw = |i: usize| match self.rows[row + i] {
            Choice::Logits(at) => &self.logits[at * self.vocab..(at + 1) * self.vocab],
            Choice::Chosen(_) => unreachable!("rows of a sampled sequence have logits"),
        };
        let options = &session.options;
        // Where the grammar would stand behind the drafted tokens.
        let mut grammar = session.grammar.as_ref().map(|state| state.fork());
        let mut answer = session.tokens[session.prompt_len..].to_vec();
        let target = |i: usize| {
            if let Some(before) = i.checked_sub(1) {
                let token = chain.tokens[before].0;
                answer.push(token);
                if let Some(grammar) = &mut grammar {
                    grammar.advance(token);
                }
            }
            if options.shaping.is_none() && grammar.is_none() {
                return Distribution::of(raw(i), &options.sampling);
            }
            let mut logits = raw(i).to_vec();
            options.shaping.apply(&mut logits, &session.tokens[..session.prompt_len], &answer);
            if let Some(grammar) = &mut grammar {
                grammar.mask(&mut logits);
            }
            Distribution::of(&logits, &options.sampling)
        };
        let draws = Draws::new(options.sampling.seed, session.tokens.len() as u64);
        let verdict = draws.verify(options.verify, chain, target);
        let kept = &chain.tokens[..verdict.accepted_drafts];
        for (i, token) in kept.iter().chain([&verdict.target_token]).enumerate() {
            let id = token.0;
            if let Some(grammar) = &mut session.grammar {
                // What it notes of the rows that count, it notes here; the row itself was judged on the copy.
                grammar.mask(&mut raw(i).to_vec());
                grammar.advance(id);
            }
            path.push(Chosen {
                id,
                logprobs: options.logprobs.map(|top| TokenLogprobs::of(raw(i), id, top)),
            });
        }
        TreeVerdict {
            accepted_path: (0..verdict.accepted_drafts as u32).collect(),
            target_token: verdict.target_token,
        }
    }
}

/// Appends tokens until one ends the answer; returns how many were committed.
fn commit<K: Kernels>(
    session: &mut Session<K>,
    tokens: Vec<(Chosen, TokenOrigin)>,
    max_context: usize,
    on_token: &mut dyn FnMut(&TokenEvent) -> ControlFlow<()>,
) -> usize {
    let all = tokens.len();
    for (i, (Chosen { id, logprobs }, origin)) in tokens.into_iter().enumerate() {
        let event = TokenEvent { id, position: session.tokens.len(), origin, logprobs };
        session.tokens.push(id);
        let go_on = on_token(&event).is_continue();
        session.finish = if session.options.stop_ids.contains(&id) {
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
    all
}
