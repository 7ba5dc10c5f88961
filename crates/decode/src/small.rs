//! An ordinary model of the target's tokenizer that drafts: it reads the text by itself and says how it would go on.
//!
//! A sequence's cache holds the committed text as far as it was read; proposals grow a tree behind it, whose rows on the
//! text's path stay when that is committed. Nothing is handed over with the committed positions: what is missing is
//! read from the text when the next proposal is asked for, at most [`READ`] rows a step, so a draft that rests costs
//! nothing, and a long prompt keeps nobody waiting.

use std::any::Any;
use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, TokenTree, gumbel_noise, token_distribution};
use draftsmith_kernels::{Kernels, TopK};
use draftsmith_model::{GrowItem, Rows, StepItem, StepOutput, Target, TargetKv};

use crate::drafter::{Ask, Children, Committed, Drafter, DrafterSession, Node};
use crate::drawn;

/// Rows of text read in one step over all sequences, beside those that go on from the step before.
const READ: usize = 256;
/// Missing tokens up to which a sequence goes on from the step before, or nearly.
const FEW: usize = 32;
/// Probability below that of the best token, as a logarithm, from which on a token is no guess: all such tokens of a
/// vocabulary of 250,000 together have less than a two-thousandth of the mass.
const HOPELESS: f32 = 20.0;

/// A model that drafts, beside the target.
pub(crate) struct SmallDrafter<K: Kernels> {
    small: Arc<Target<K>>,
    /// Ids that both models have: all below it.
    shared: usize,
}

/// A node that was asked for its children.
struct Grown {
    token: u32,
    parent: Option<u32>,
}

struct SmallSession<K: Kernels> {
    kv: TargetKv<K>,
    /// The committed tokens in the cache.
    read: Vec<u32>,
    /// Input of the head `[1, H]` behind the last of them, if that was the last row that ran.
    last: Option<Arc<Rows<K::Buf>>>,
    /// Rows in the cache behind those.
    grown: Vec<Grown>,
    bytes_per_token: usize,
}

impl<K: Kernels> SmallSession<K> {
    fn of(session: &mut dyn DrafterSession<K>) -> &mut SmallSession<K> {
        session.as_any_mut().downcast_mut().expect("a session goes back to the drafter that began it")
    }

    fn rollback_to(&mut self, positions: usize) {
        if positions < self.read.len() {
            self.read.truncate(positions);
            self.last = None;
        }
        self.grown.clear();
        self.kv.rollback_to(self.read.len());
    }

    /// Makes the cache a beginning of `text`, with the rows of the last proposal that turned out right; returns how many
    /// tokens are missing.
    fn follow(&mut self, kernels: &K, text: &[u32]) -> usize {
        let same = self.read.iter().zip(text).take_while(|(a, b)| a == b).count();
        if same < self.read.len() {
            self.rollback_to(same);
        }
        // The last token's row is what proposals come from, so it is never taken over.
        let usable = &text[..text.len().saturating_sub(1)];
        let mut path: Vec<u32> = Vec::new();
        for token in usable.get(self.read.len()..).unwrap_or_default() {
            let parent = path.last().copied();
            let is_next = |node: &Grown| node.parent == parent && node.token == *token;
            match self.grown.iter().position(is_next) {
                Some(at) => path.push(at as u32),
                None => break,
            }
        }
        if path.is_empty() {
            self.kv.rollback_to(self.read.len());
        } else {
            self.kv.commit(kernels, self.read.len(), &path);
            self.read.extend(path.iter().map(|at| self.grown[*at as usize].token));
            self.last = None;
        }
        self.grown.clear();
        if self.read.len() == text.len() && self.last.is_none() {
            self.rollback_to(text.len() - 1);
        }
        text.len() - self.read.len()
    }
}

impl<K: Kernels> DrafterSession<K> for SmallSession<K> {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn held_bytes(&self) -> usize {
        self.kv.len() * self.bytes_per_token
    }

    fn positions(&self) -> usize {
        usize::MAX
    }

    fn behind(&self, tokens: usize) -> usize {
        match tokens.saturating_sub(self.read.len()) {
            few if few <= FEW => 0,
            many => many,
        }
    }
}

/// Rows of one sequence in a pass, behind those that its cache holds.
struct Part<'a, K: Kernels> {
    session: &'a mut SmallSession<K>,
    tokens: Vec<u32>,
    parents: Vec<Option<u32>>,
    new_rows: usize,
}

/// How a row's children are chosen.
#[derive(Clone, Copy)]
struct Choice<'a> {
    k: usize,
    sampling: &'a Sampling,
    /// Where they stand.
    position: u64,
    /// See [`Ask::whole`].
    whole: bool,
}

impl<K: Kernels> SmallDrafter<K> {
    pub(crate) fn new(target: &Target<K>, small: Arc<Target<K>>) -> SmallDrafter<K> {
        let shared = target.config().vocab_size.min(small.config().vocab_size);
        SmallDrafter { small, shared }
    }

    /// What the model reads in place of a token: an id that it does not have stands for a padding of the target's
    /// vocabulary and says nothing.
    fn known(&self, token: u32) -> u32 {
        if (token as usize) < self.small.config().vocab_size { token } else { 0 }
    }

    /// The best children behind rows of a step.
    ///
    /// With a temperature, the position's own noise is added first: the target will choose by the same noise, so the
    /// draft's guess of that very draw is more often right than its most probable token.
    fn children(&self, output: &StepOutput<K::Buf>, rows: &[u32], choices: &[Choice<'_>]) -> Vec<Children> {
        let vocab = self.small.config().vocab_size;
        let mut found: Vec<Children> = vec![Vec::new(); choices.len()];
        // Rows whose outputs are needed on this side.
        let mut whole: Vec<usize> = Vec::new();
        let (mut single, mut several) = (Vec::new(), Vec::new());
        for (i, choice) in choices.iter().enumerate() {
            match (choice.sampling.is_greedy() && !choice.whole, choice.k) {
                (false, _) => whole.push(i),
                (true, 0 | 1) => single.push(i),
                (true, _) => several.push(i),
            }
        }
        let at = |of: &[usize]| of.iter().map(|i| rows[*i]).collect::<Vec<u32>>();
        if !single.is_empty() {
            for (i, best) in single.iter().zip(self.small.argmax(output, &at(&single))) {
                match (best as usize) < self.shared {
                    true => found[*i] = vec![(best, 0.0)],
                    false => whole.push(*i),
                }
            }
        }
        if !several.is_empty() {
            // Some more, should some of them be ids that the target does not have.
            let most = several.iter().map(|i| choices[*i].k).max().unwrap_or(0);
            for (i, TopK { mut best, log_sum }) in
                several.iter().zip(self.small.top_k(output, &at(&several), most))
            {
                if best.iter().any(|(id, _)| *id as usize >= self.shared) {
                    whole.push(*i);
                    continue;
                }
                let first = best.first().map_or(0.0, |b| b.1);
                best.truncate(choices[*i].k);
                found[*i] = best.into_iter().map(|(id, v)| (id, v - first - log_sum)).collect();
            }
        }
        if !whole.is_empty() {
            let logits = self.small.logits(output, &at(&whole));
            for (i, logits) in whole.iter().zip(logits.chunks_exact(vocab)) {
                let Choice { k, sampling, position, whole } = choices[*i];
                found[*i] = match whole {
                    true => drawn::children(&logits[..self.shared], sampling, |id| id),
                    false => chosen(&logits[..self.shared], k.max(1), sampling, position),
                };
            }
        }
        found
    }

    /// What `output` gives of single rows.
    fn only(last: &Arc<Rows<K::Buf>>) -> StepOutput<K::Buf> {
        StepOutput { hidden: Vec::new(), last: Arc::clone(last) }
    }
}

/// The best guesses at what the target chooses at a position, by these logits.
fn chosen(logits: &[f32], k: usize, sampling: &Sampling, position: u64) -> Children {
    if sampling.is_greedy() {
        let TopK { best, log_sum } = TopK::of(logits, k);
        let first = best.first().map_or(0.0, |b| b.1);
        return best.into_iter().map(|(id, v)| (id, v - first - log_sum)).collect();
    }
    let noise = |id: u32| gumbel_noise(sampling.seed, position, id);
    let all = sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0;
    let (ids, scores): (Vec<u32>, Vec<f32>) = if all {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = most - HOPELESS * sampling.temperature;
        let possible = (0u32..).zip(logits).filter(|(_, l)| **l >= least);
        possible.map(|(id, l)| (id, (l - most) / sampling.temperature + noise(id))).unzip()
    } else {
        let possible = token_distribution(logits, sampling).into_iter();
        possible.map(|(id, p)| (id.0, p.ln() as f32 + noise(id.0))).unzip()
    };
    let TopK { best, log_sum } = TopK::of(&scores, k);
    let first = best.first().map_or(0.0, |b| b.1);
    best.into_iter().map(|(at, s)| (ids[at as usize], s - first - log_sum)).collect()
}

impl<K: Kernels> Drafter<K> for SmallDrafter<K> {
    fn target_layers(&self) -> &[LayerId] {
        &[]
    }

    fn begin(&self) -> Box<dyn DrafterSession<K>> {
        Box::new(SmallSession {
            kv: self.small.new_kv(),
            read: Vec::new(),
            last: None,
            grown: Vec::new(),
            bytes_per_token: self.bytes_per_token(),
        })
    }

    /// The text is read when a proposal is asked for.
    fn take_in(&self, _: &mut [Committed<'_, K>]) {}

    fn rollback_to(&self, session: &mut dyn DrafterSession<K>, positions: usize) {
        SmallSession::of(session).rollback_to(positions);
    }

    fn roots(&self, asks: &mut [Ask<'_, K>]) -> Vec<Children> {
        let kernels = self.small.kernels().as_ref();
        let most = self.small.config().max_position;
        let mut found = vec![Vec::new(); asks.len()];
        let mut missing: Vec<(usize, usize)> = Vec::new();
        for (i, ask) in asks.iter_mut().enumerate() {
            // Behind its own context a model has nothing to say.
            if !ask.text.is_empty() && ask.text.len() <= most {
                missing.push((SmallSession::of(&mut *ask.session).follow(kernels, ask.text), i));
            }
        }
        // Those that go on first, then who has the least to read.
        missing.sort_unstable();
        let mut left = READ;
        let mut take = vec![0; asks.len()];
        for (count, i) in &missing {
            take[*i] = if *count <= FEW { *count } else { (*count).min(left) };
            left -= if *count <= FEW { 0 } else { take[*i] };
        }
        let done: Vec<bool> = {
            let mut done = vec![false; asks.len()];
            missing.iter().for_each(|(count, i)| done[*i] = take[*i] == *count);
            done
        };
        let choices: Vec<Choice<'_>> = asks
            .iter()
            .map(|ask| Choice {
                k: ask.k,
                sampling: ask.sampling,
                position: ask.text.len() as u64,
                whole: ask.whole,
            })
            .collect();
        let mut ends: Vec<(usize, u32)> = Vec::new();
        let mut rows = 0u32;
        let mut reading: Vec<Part<'_, K>> = Vec::new();
        for (i, ask) in asks.iter_mut().enumerate().filter(|(i, _)| take[*i] > 0) {
            let session = SmallSession::of(&mut *ask.session);
            let next = &ask.text[session.read.len()..session.read.len() + take[i]];
            session.read.extend_from_slice(next);
            session.last = None;
            rows += take[i] as u32;
            ends.push((i, rows - 1));
            let tokens = next.iter().map(|t| self.known(*t)).collect();
            let parents = TokenTree::chain_parents(take[i]);
            reading.push(Part { session, tokens, parents, new_rows: take[i] });
        }
        if !reading.is_empty() {
            let mut items: Vec<StepItem<'_, K>> = reading
                .iter_mut()
                .map(|part| StepItem {
                    kv: &mut part.session.kv,
                    tokens: &part.tokens,
                    parents: &part.parents,
                })
                .collect();
            let output = self.small.forward(&mut items, &[]);
            drop(items);
            let ops = draftsmith_model::Infer::new(kernels);
            for (part, (i, end)) in reading.iter_mut().zip(&ends) {
                part.session.last = done[*i].then(|| ops.gather(&output.last, &[*end]));
            }
            drop(reading);
            ends.retain(|(i, _)| done[*i]);
            let (of, at): (Vec<usize>, Vec<u32>) = ends.iter().copied().unzip();
            let chosen: Vec<Choice<'_>> = of.iter().map(|i| choices[*i]).collect();
            for (i, children) in of.iter().zip(self.children(&output, &at, &chosen)) {
                found[*i] = children;
            }
        }
        // Asked again, with nothing new.
        for (i, ask) in asks.iter_mut().enumerate().filter(|(i, _)| done[*i] && take[*i] == 0) {
            if let Some(last) = &SmallSession::of(&mut *ask.session).last {
                found[i] = self.children(&Self::only(last), &[0], &choices[i..=i]).remove(0);
            }
        }
        found
    }

    fn expand(&self, asks: &mut [Ask<'_, K>], nodes: &[Node]) -> Vec<(u32, Children)> {
        let most = self.small.config().max_position as u64;
        // The rows of a sequence stand together; of what lies behind the model's context nothing is said.
        let position = |node: &Node| asks[node.of].text.len() as u64 + node.depth as u64;
        let mut order: Vec<usize> = (0..nodes.len()).filter(|at| position(&nodes[*at]) < most).collect();
        order.sort_by_key(|at| nodes[*at].of);
        let mut found: Vec<(u32, Children)> = vec![(0, Vec::new()); nodes.len()];
        if order.is_empty() {
            return found;
        }
        let choices: Vec<Choice<'_>> = order
            .iter()
            .map(|at| {
                let (node, ask) = (&nodes[*at], &asks[nodes[*at].of]);
                Choice { k: ask.k, sampling: ask.sampling, position: position(node) + 1, whole: ask.whole }
            })
            .collect();
        let mut new_rows = vec![0; asks.len()];
        for at in &order {
            let Node { of, parent, token, .. } = nodes[*at];
            let session = SmallSession::of(&mut *asks[of].session);
            found[*at].0 = session.grown.len() as u32;
            session.grown.push(Grown { token, parent });
            new_rows[of] += 1;
        }
        let mut trees: Vec<Part<'_, K>> = asks
            .iter_mut()
            .zip(&new_rows)
            .filter(|(_, new_rows)| **new_rows > 0)
            .map(|(ask, new_rows)| {
                let session = SmallSession::of(&mut *ask.session);
                let tokens = session.grown.iter().map(|node| self.known(node.token)).collect();
                let parents = session.grown.iter().map(|node| node.parent).collect();
                Part { session, tokens, parents, new_rows: *new_rows }
            })
            .collect();
        let mut items: Vec<GrowItem<'_, K>> = trees
            .iter_mut()
            .map(|Part { session, tokens, parents, new_rows }| GrowItem {
                base: session.read.len(),
                kv: &mut session.kv,
                tokens,
                parents,
                new_rows: *new_rows,
            })
            .collect();
        let output = self.small.grow(&mut items);
        drop(items);
        let rows: Vec<u32> = (0..order.len() as u32).collect();
        for (at, children) in order.iter().zip(self.children(&output, &rows, &choices)) {
            found[*at].1 = children;
        }
        found
    }

    fn bytes_per_token(&self) -> usize {
        self.small.kv_bytes_per_token()
    }
}
