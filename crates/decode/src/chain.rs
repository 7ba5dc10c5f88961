//! Drafters that propose token by token: what the network says of one is fed with the next, as EAGLE-3 does [eagle3 §9].
//!
//! A sequence's cache holds one slot per committed position, computed from true features; proposals append to it and
//! are dropped when the next committed positions are taken in. The rows of all sequences go through the layer and the
//! head together; each depends on its own sequence alone.

use std::any::Any;
use std::sync::Arc;

use draftsmith_core::{DraftTokenId, LayerId, Sampling, TokenTree, VocabMap, gumbel_noise};
use draftsmith_kernels::{Kernels, Segment, StepMask, TopK};
use draftsmith_model::{CacheAttend, ChainNetwork, Infer, Linear, Ops, Rows, Shared, Target};

use crate::DecodeError;
use crate::drafter::{
    Ask, Borrowed, Children, Committed, Drafter, DrafterSession, Features, Node, first_rows,
};
use crate::drawn;

/// Positions whose features may wait at most. They are much larger than what the cache keeps of them, and a sequence
/// that never drafts would hold those of its whole text; taken in by so many, a position costs the least.
const DEFERRED_ROWS: usize = 256;

/// A draft that proposes token by token, beside the target it was made for.
pub(crate) struct ChainDrafter<K: Kernels> {
    kernels: Arc<K>,
    draft: Box<dyn ChainNetwork<K>>,
    /// Draft ids to target ids.
    vocab_map: VocabMap,
    embedding: Arc<Linear<K::Packed>>,
    embed_scale: f32,
    layers: Vec<LayerId>,
    /// Of a position's captured states side by side.
    features_width: usize,
}

/// A row of activations.
struct Row<K: Kernels> {
    of: Shared<K>,
    at: u32,
}

/// What the layer says behind the last committed position.
struct Last<K: Kernels> {
    /// Hidden input of the next depth.
    feedback: Row<K>,
    /// Input of the head.
    head_input: Row<K>,
}

struct ChainSession<K: Kernels> {
    /// Its cache, if the network attends to anything.
    kv: Option<K::Kv>,
    /// Committed slots.
    len: usize,
    last: Option<Last<K>>,
    /// Features of committed positions that are not in the cache yet, and the tokens that follow them.
    pending: Vec<Shared<K>>,
    pending_tokens: Vec<u32>,
    /// Hidden inputs below the nodes expanded since then, and their parents among them.
    grown: Vec<Row<K>>,
    grown_parents: Vec<Option<u32>>,
    bytes_per_token: usize,
}

impl<K: Kernels> ChainSession<K> {
    fn of(session: &mut dyn DrafterSession<K>) -> &mut ChainSession<K> {
        session.as_any_mut().downcast_mut().expect("a session goes back to the drafter that began it")
    }

    /// Forgets the nodes grown.
    fn rollback(&mut self, kernels: &K) {
        if let Some(kv) = &mut self.kv {
            kernels.kv_compact(kv, self.len, &[]);
        }
        self.grown.clear();
        self.grown_parents.clear();
    }
}

/// Rows of a pass that belong to one sequence.
struct Part<'a, K: Kernels> {
    kv: Option<&'a mut K::Kv>,
    /// Committed slots.
    base: usize,
    /// Parents of all uncommitted rows, among them.
    parents: &'a [Option<u32>],
    /// How many of them are new.
    new_rows: usize,
}

/// How a row's children are chosen.
#[derive(Clone, Copy)]
struct Choice<'a> {
    k: usize,
    sampling: &'a Sampling,
    /// Where they stand.
    position: u64,
    /// All of them are wanted, with their probabilities.
    whole: bool,
}

impl<K: Kernels> ChainDrafter<K> {
    /// Joins draft and target.
    ///
    /// # Errors
    /// [`DecodeError::DraftMismatch`] if their shapes disagree.
    pub(crate) fn new(
        target: &Target<K>,
        draft: Box<dyn ChainNetwork<K>>,
        borrowed: Borrowed<K>,
    ) -> Result<ChainDrafter<K>, DecodeError> {
        let (d, t) = (draft.config(), target.config());
        let shape = d.shape();
        let vocab_map = draft.vocab_map().cloned().unwrap_or_else(|| VocabMap::identity(shape.vocab_size));
        for (what, draft, target) in [
            ("target hidden size", shape.target_hidden_size, t.hidden_size),
            ("vocabulary", shape.vocab_size, t.vocab_size),
            ("embedding width", shape.hidden_size, t.hidden_size),
            ("vocabulary map", vocab_map.target_vocab(), t.vocab_size),
            ("draft vocabulary", vocab_map.draft_vocab(), shape.draft_vocab_size),
        ] {
            if draft != target {
                return Err(DecodeError::DraftMismatch { what, draft, target });
            }
        }
        let layers: Vec<LayerId> = d.layers(t.num_layers as u32).into_iter().map(LayerId).collect();
        if let Some(outside) = layers.iter().find(|l| l.0 as usize >= t.num_layers) {
            let (draft, target) = (outside.0 as usize, t.num_layers);
            return Err(DecodeError::DraftMismatch { what: "captured layer", draft, target });
        }
        Ok(ChainDrafter {
            kernels: Arc::clone(target.kernels()),
            draft,
            vocab_map,
            embedding: borrowed.embedding,
            embed_scale: borrowed.embed_scale,
            layers,
            features_width: shape.features_width(),
        })
    }

    fn ops(&self) -> Infer<'_, K> {
        Infer::new(self.kernels.as_ref())
    }

    /// Runs the layer on the rows of all parts; returns hidden inputs of the next depth and inputs of the head.
    fn step(
        &self,
        hidden: &Shared<K>,
        tokens: &[u32],
        positions: &[u32],
        parts: Vec<Part<'_, K>>,
    ) -> (Shared<K>, Shared<K>) {
        let embedded = self.ops().embed(&self.embedding, tokens, self.embed_scale); // [R, H]
        let head_dim = self.draft.head_dim();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let segments = parts
            .into_iter()
            .filter_map(|Part { kv, base, parents, new_rows }| {
                let mask = StepMask { new_rows, ..StepMask::step(base, parents, None, scale) };
                kv.map(|kv| Segment { kv, mask })
            })
            .collect();
        let mut attend = CacheAttend { segments, head_dim };
        self.draft.step(&self.kernels, &embedded, hidden, positions, &mut attend)
    }

    /// Rows from wherever they lie, one below the other.
    fn collect(&self, rows: &[&Row<K>]) -> Shared<K> {
        let ops = self.ops();
        let first = &rows[0].of;
        if rows.iter().all(|row| Arc::ptr_eq(&row.of, first)) {
            let at: Vec<u32> = rows.iter().map(|row| row.at).collect();
            let in_order = at.len() == first.rows && at.iter().enumerate().all(|(i, at)| i == *at as usize);
            return if in_order { Arc::clone(first) } else { ops.gather(first, &at) };
        }
        let pieces: Vec<Shared<K>> = rows.iter().map(|row| ops.gather(&row.of, &[row.at])).collect();
        self.stack(&pieces)
    }

    /// Rows of equal width one below the other.
    fn stack(&self, inputs: &[Shared<K>]) -> Shared<K> {
        if let [one] = inputs {
            return Arc::clone(one);
        }
        // Side by side in one row is the same memory as one below the other.
        let width = inputs[0].width;
        let rows = inputs.iter().map(|i| i.rows).sum();
        let mut buf = self.kernels.scratch(rows * width);
        let parts: Vec<_> = inputs.iter().map(|i| (&i.buf, i.rows * width)).collect();
        self.kernels.concat_cols(&parts, 1, &mut buf);
        Arc::new(Rows { buf, rows, width })
    }

    /// Takes the pending positions of these sequences into their caches, in one pass.
    fn flush(&self, sessions: &mut [&mut ChainSession<K>]) {
        let mut sessions: Vec<&mut &mut ChainSession<K>> =
            sessions.iter_mut().filter(|s| !s.pending_tokens.is_empty()).collect();
        if sessions.is_empty() {
            return;
        }
        let ops = self.ops();
        let (mut features, mut tokens, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let mut parents: Vec<Vec<Option<u32>>> = Vec::new();
        for session in &mut sessions {
            session.rollback(&self.kernels);
            features.append(&mut session.pending);
            let own = std::mem::take(&mut session.pending_tokens);
            positions.extend(session.len as u32..(session.len + own.len()) as u32);
            parents.push(TokenTree::chain_parents(own.len()));
            tokens.extend(own);
        }
        let joined = self.stack(&features); // [R, 3 Ht]
        drop(features);
        let hidden = self.draft.project(&self.kernels, &joined); // [R, H]
        drop(joined);
        let parts = sessions.iter_mut().zip(&parents).map(|(session, parents)| Part {
            base: session.len,
            kv: session.kv.as_mut(),
            parents,
            new_rows: parents.len(),
        });
        let parts = parts.collect();
        let (feedback, head_input) = self.step(&hidden, &tokens, &positions, parts);
        let mut end = 0u32;
        let ends: Vec<u32> = parents
            .iter()
            .map(|own| {
                end += own.len() as u32;
                end - 1
            })
            .collect();
        let (feedback, head_input) = (ops.gather(&feedback, &ends), ops.gather(&head_input, &ends));
        for (at, (session, own)) in sessions.into_iter().zip(&parents).enumerate() {
            session.len += own.len();
            let row = |of: &Shared<K>| Row { of: Arc::clone(of), at: at as u32 };
            session.last = Some(Last { feedback: row(&feedback), head_input: row(&head_input) });
        }
    }

    /// The best children behind rows of head inputs `[R, H]`, by draft log-probability.
    ///
    /// With a temperature, the position's own noise is added first: the target will choose by the same noise, so the
    /// draft's guess of that very draw is more often right than its most probable token.
    fn children(&self, head_input: &Shared<K>, choices: &[Choice<'_>]) -> Vec<Children> {
        let head = self.draft.head();
        let target = |draft: u32| self.vocab_map.to_target(DraftTokenId(draft)).0;
        let mut found: Vec<Children> = vec![Vec::new(); choices.len()];
        let pick = |wanted: &dyn Fn(&Choice<'_>) -> bool| -> Vec<u32> {
            (0..choices.len() as u32).filter(|i| wanted(&choices[*i as usize])).collect()
        };
        let ops = self.ops();
        let some = |rows: &[u32]| match rows.len() == choices.len() {
            true => Arc::clone(head_input),
            false => ops.gather(head_input, rows),
        };
        // The arg-max alone needs no outputs, and no probability.
        let single = pick(&|c| c.sampling.is_greedy() && c.k <= 1 && !c.whole);
        if !single.is_empty() {
            let best = self.kernels.argmax(&some(&single).buf, single.len(), &head.packed);
            for (row, draft) in single.iter().zip(best) {
                found[*row as usize] = vec![(target(draft), 0.0)];
            }
        }
        let greedy = pick(&|c| c.sampling.is_greedy() && c.k > 1 && !c.whole);
        if let Some(most) = greedy.iter().map(|row| choices[*row as usize].k).max() {
            let input = some(&greedy);
            let best = self.kernels.top_k(&input.buf, greedy.len(), (&head.packed, head.out_features), most);
            for (row, TopK { best, log_sum }) in greedy.iter().zip(best) {
                let most = best.first().map_or(0.0, |b| b.1);
                let children = best.into_iter().take(choices[*row as usize].k);
                found[*row as usize] =
                    children.map(|(draft, value)| (target(draft), value - most - log_sum)).collect();
            }
        }
        let drawn = pick(&|c| !c.sampling.is_greedy() || c.whole);
        if !drawn.is_empty() {
            let mut ops = self.ops();
            let logits = ops.linear(&some(&drawn), head, None);
            let logits = ops.values(&logits);
            for (row, logits) in drawn.iter().zip(logits.chunks_exact(head.out_features)) {
                let Choice { k, sampling, position, whole } = choices[*row as usize];
                if whole {
                    found[*row as usize] = drawn::children(logits, sampling, target);
                    continue;
                }
                let noisy: Vec<f32> = logits
                    .iter()
                    .enumerate()
                    .map(|(i, l)| {
                        l / sampling.temperature + gumbel_noise(sampling.seed, position, target(i as u32))
                    })
                    .collect();
                let TopK { best, log_sum } = match k {
                    0 | 1 => TopK { best: TopK::best(&noisy, 1), log_sum: 0.0 },
                    _ => TopK::of(&noisy, k),
                };
                let most = best.first().map_or(0.0, |b| b.1);
                found[*row as usize] =
                    best.into_iter().map(|(draft, s)| (target(draft), s - most - log_sum)).collect();
            }
        }
        found
    }

    /// Keeps committed positions until they are needed, or there are too many of them.
    fn defer(&self, session: &mut ChainSession<K>, features: Features<'_, K>, next_tokens: &[u32]) {
        assert!(features.rows.len() == next_tokens.len(), "one following token per position");
        let Features { output, rows } = features;
        for (rows, next_tokens) in rows.chunks(DEFERRED_ROWS).zip(next_tokens.chunks(DEFERRED_ROWS)) {
            if session.pending_tokens.len() + rows.len() > DEFERRED_ROWS {
                self.flush(&mut [&mut *session]);
            }
            let piece = Features { output, rows };
            session.pending.push(Arc::new(piece.concat(self.kernels.as_ref())));
            session.pending_tokens.extend_from_slice(next_tokens);
        }
    }
}

impl<K: Kernels> Drafter<K> for ChainDrafter<K> {
    fn target_layers(&self) -> &[LayerId] {
        &self.layers
    }

    fn begin(&self) -> Box<dyn DrafterSession<K>> {
        Box::new(ChainSession {
            kv: self.draft.new_kv(self.kernels.as_ref()),
            len: 0,
            last: None,
            pending: Vec::new(),
            pending_tokens: Vec::new(),
            grown: Vec::new(),
            grown_parents: Vec::new(),
            bytes_per_token: self.bytes_per_token(),
        })
    }

    fn take_in(&self, committed: &mut [Committed<'_, K>]) {
        for Committed { session, features, next_tokens } in committed {
            self.defer(ChainSession::of(*session), *features, next_tokens);
        }
    }

    fn rollback_to(&self, session: &mut dyn DrafterSession<K>, positions: usize) {
        let session = ChainSession::of(session);
        let waiting = positions.saturating_sub(session.len);
        session.len = session.len.min(positions);
        session.last = None;
        session.rollback(&self.kernels);
        session.pending_tokens.truncate(waiting);
        session.pending = first_rows(self.kernels.as_ref(), std::mem::take(&mut session.pending), waiting);
    }

    fn roots(&self, asks: &mut [Ask<'_, K>]) -> Vec<Children> {
        let choices: Vec<Choice<'_>> = asks
            .iter()
            .map(|ask| Choice {
                k: ask.k,
                sampling: ask.sampling,
                position: ask.position + 1,
                whole: ask.whole,
            })
            .collect();
        let mut sessions: Vec<&mut ChainSession<K>> =
            asks.iter_mut().map(|ask| ChainSession::of(&mut *ask.session)).collect();
        self.flush(&mut sessions);
        sessions.iter_mut().for_each(|session| session.rollback(&self.kernels));
        // A sequence of which nothing was seen has nothing to offer.
        let seen: Vec<usize> = (0..sessions.len()).filter(|i| sessions[*i].last.is_some()).collect();
        let rows: Vec<&Row<K>> = sessions.iter().filter_map(|s| Some(&s.last.as_ref()?.head_input)).collect();
        let mut found = vec![Vec::new(); choices.len()];
        if !rows.is_empty() {
            let chosen: Vec<Choice<'_>> = seen.iter().map(|i| choices[*i]).collect();
            for (i, children) in seen.iter().zip(self.children(&self.collect(&rows), &chosen)) {
                found[*i] = children;
            }
        }
        found
    }

    fn expand(&self, asks: &mut [Ask<'_, K>], nodes: &[Node]) -> Vec<(u32, Children)> {
        // The rows of a sequence stand together.
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.sort_by_key(|at| nodes[*at].of);
        let choices: Vec<Choice<'_>> = order
            .iter()
            .map(|at| {
                let (node, ask) = (&nodes[*at], &asks[nodes[*at].of]);
                let position = ask.position + node.depth as u64 + 2;
                Choice { k: ask.k, sampling: ask.sampling, position, whole: ask.whole }
            })
            .collect();
        let mut sessions: Vec<&mut ChainSession<K>> =
            asks.iter_mut().map(|ask| ChainSession::of(&mut *ask.session)).collect();
        let inputs: Vec<&Row<K>> = order
            .iter()
            .map(|at| {
                let session = &sessions[nodes[*at].of];
                match nodes[*at].parent {
                    Some(parent) => &session.grown[parent as usize],
                    None => &session.last.as_ref().expect("roots were asked for before").feedback,
                }
            })
            .collect();
        let hidden = self.collect(&inputs); // [R, H]
        let tokens: Vec<u32> = order.iter().map(|at| nodes[*at].token).collect();
        // The feature of a drafted token stands one position behind the token itself.
        let positions: Vec<u32> =
            order.iter().map(|at| (sessions[nodes[*at].of].len + nodes[*at].depth) as u32).collect();
        let mut new_rows = vec![0; sessions.len()];
        for at in &order {
            let node = &nodes[*at];
            sessions[node.of].grown_parents.push(node.parent);
            new_rows[node.of] += 1;
        }
        let parts = sessions
            .iter_mut()
            .zip(&new_rows)
            .filter(|(_, new_rows)| **new_rows > 0)
            .map(|(session, new_rows)| {
                let ChainSession { kv, len, grown_parents, .. } = &mut **session;
                Part { kv: kv.as_mut(), base: *len, parents: grown_parents, new_rows: *new_rows }
            })
            .collect();
        let (feedback, head_input) = self.step(&hidden, &tokens, &positions, parts);
        let children = self.children(&head_input, &choices);
        let mut found: Vec<(u32, Children)> = vec![(0, Vec::new()); nodes.len()];
        for (row, (at, children)) in order.iter().zip(children).enumerate() {
            let session = &mut sessions[nodes[*at].of];
            session.grown.push(Row { of: Arc::clone(&feedback), at: row as u32 });
            found[*at] = (session.grown.len() as u32 - 1, children);
        }
        found
    }

    fn bytes_per_token(&self) -> usize {
        self.draft.kv_bytes_per_token()
    }

    fn bytes_per_session(&self) -> usize {
        DEFERRED_ROWS * self.features_width * size_of::<f32>()
    }
}

impl<K: Kernels> DrafterSession<K> for ChainSession<K> {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn held_bytes(&self) -> usize {
        let waiting: usize = self.pending.iter().map(|p| p.rows * p.width * size_of::<f32>()).sum();
        waiting + self.len * self.bytes_per_token
    }

    fn positions(&self) -> usize {
        self.len + self.pending_tokens.len()
    }
}
