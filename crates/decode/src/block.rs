//! Drafters whose one pass proposes several levels: blocks (DFlash, DSpark) and rollouts (P-EAGLE) [dflash §1.4, §3.3,
//! §4.3].
//!
//! A sequence's caches hold one slot per committed position, made of its features; a pass appends a block and drops it
//! again. Where nothing corrects a level by the token before it, all levels are chosen from at once, and the same
//! tokens follow whatever was chosen above. A Markov head is asked token by token.

use std::any::Any;
use std::sync::Arc;

use draftsmith_core::{DraftTokenId, LayerId, Sampling, VocabMap, gumbel_noise};
use draftsmith_kernels::{Kernels, PackMode, TopK, WeightView};
use draftsmith_model::{Correction, DraftKv, Infer, Linear, Ops, PassNetwork, PassPart, Shared, Target};

use crate::DecodeError;
use crate::drafter::{
    Ask, Borrowed, Children, Committed, Drafter, DrafterSession, Features, Node, first_rows,
};
use crate::drawn;

/// Positions whose features may wait at most.
const DEFERRED_ROWS: usize = 256;

/// Children of a node that are wanted: all that may be drawn ([`Ask::whole`]).
const WHOLE: usize = usize::MAX;

fn wanted_children<K: Kernels>(ask: &Ask<'_, K>) -> usize {
    if ask.whole { WHOLE } else { ask.k }
}

/// A draft that proposes several levels at once, beside the target it was made for.
pub(crate) struct BlockDrafter<K: Kernels> {
    kernels: Arc<K>,
    draft: Box<dyn PassNetwork<K>>,
    embedding: Arc<Linear<K::Packed>>,
    embed_scale: f32,
    /// What levels are chosen with: the target's head, rows of it, or the draft's own.
    head: Arc<Linear<K::Packed>>,
    vocab_map: VocabMap,
    layers: Vec<LayerId>,
    /// Of a position's captured states side by side.
    features_width: usize,
    /// Levels of a pass.
    levels: usize,
}

/// What a pass said of a sequence.
enum Levels<K: Kernels> {
    /// Children of every level, whatever stands above.
    Fixed(Vec<Children>),
    /// Inputs of the head `[levels, H]` and its logits `[levels, Vd]`, to be corrected by the token before.
    Open { output: Shared<K>, logits: Shared<K> },
}

struct BlockSession<K: Kernels> {
    kv: DraftKv<K>,
    /// Features of committed positions that are not in the caches yet, and the tokens that follow them.
    pending: Vec<Shared<K>>,
    pending_tokens: Vec<u32>,
    /// The last token of the text.
    last_token: Option<u32>,
    levels: Option<Levels<K>>,
    /// State of a Markov head at each node grown.
    states: Vec<Option<Shared<K>>>,
    /// That of the first level.
    root_state: Option<Shared<K>>,
    bytes_per_token: usize,
}

impl<K: Kernels> BlockSession<K> {
    fn of(session: &mut dyn DrafterSession<K>) -> &mut BlockSession<K> {
        session.as_any_mut().downcast_mut().expect("a session goes back to the drafter that began it")
    }
}

impl<K: Kernels> DrafterSession<K> for BlockSession<K> {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn held_bytes(&self) -> usize {
        let waiting: usize = self.pending.iter().map(|p| p.rows * p.width * size_of::<f32>()).sum();
        waiting + self.kv.len() * self.bytes_per_token
    }

    fn positions(&self) -> usize {
        self.kv.len() + self.pending_tokens.len()
    }
}

impl<K: Kernels> BlockDrafter<K> {
    /// Joins draft and target.
    ///
    /// # Errors
    /// [`DecodeError::DraftMismatch`] if their shapes disagree, or a window is shorter than a block.
    pub(crate) fn new(
        target: &Target<K>,
        net: Box<dyn PassNetwork<K>>,
        borrowed: Borrowed<K>,
    ) -> Result<BlockDrafter<K>, DecodeError> {
        let t = target.config();
        let kernels = Arc::clone(target.kernels());
        if let Some([draft, target]) = net.short_window() {
            return Err(DecodeError::DraftMismatch { what: "window inside a block", draft, target });
        }
        let config = net.config();
        let (shape, layers) = (config.shape(), config.layers(t.num_layers as u32));
        let map = net.vocab_map().cloned().unwrap_or_else(|| VocabMap::identity(shape.vocab_size));
        for (what, draft, target) in [
            ("target hidden size", shape.target_hidden_size, t.hidden_size),
            ("vocabulary", shape.vocab_size, t.vocab_size),
            ("vocabulary map", map.target_vocab(), t.vocab_size),
            ("draft vocabulary", map.draft_vocab(), shape.draft_vocab_size),
        ] {
            if draft != target {
                return Err(DecodeError::DraftMismatch { what, draft, target });
            }
        }
        if let Some(outside) = layers.iter().find(|l| **l as usize >= t.num_layers) {
            let (draft, target) = (*outside as usize, t.num_layers);
            return Err(DecodeError::DraftMismatch { what: "captured layer", draft, target });
        }
        let vocab_map = map;
        let head = match net.head() {
            Some(own) => Arc::clone(own),
            None if vocab_map.is_identity() => borrowed.head,
            None => part_of_head(kernels.as_ref(), &borrowed.head, &vocab_map),
        };
        let layers = layers.into_iter().map(LayerId).collect();
        Ok(BlockDrafter {
            kernels,
            levels: net.levels(),
            draft: net,
            embedding: borrowed.embedding,
            embed_scale: borrowed.embed_scale,
            head,
            vocab_map,
            layers,
            features_width: shape.features_width(),
        })
    }

    fn ops(&self) -> Infer<'_, K> {
        Infer::new(self.kernels.as_ref())
    }

    /// Takes positions that wait into the caches, without asking what follows.
    fn flush(&self, session: &mut BlockSession<K>) {
        let tokens = std::mem::take(&mut session.pending_tokens);
        if tokens.is_empty() {
            return;
        }
        let pending: Vec<Shared<K>> = std::mem::take(&mut session.pending);
        let features = self.ops().stack(&pending.iter().collect::<Vec<_>>());
        let part = PassPart { kv: &mut session.kv, next_tokens: &tokens };
        self.draft.take_in(&self.kernels, &features, part);
    }

    /// One pass for all sequences of which something new was seen: inputs of the head, [`BlockDrafter::levels`] rows each.
    fn pass(&self, sessions: &mut [&mut BlockSession<K>]) -> Shared<K> {
        let mut ops = self.ops();
        let mut features: Vec<Shared<K>> = Vec::new();
        let mut tokens: Vec<Vec<u32>> = Vec::new();
        for session in sessions.iter_mut() {
            features.append(&mut session.pending);
            tokens.push(std::mem::take(&mut session.pending_tokens));
        }
        let features = ops.stack(&features.iter().collect::<Vec<_>>());
        let mut parts: Vec<PassPart<'_, K>> = sessions
            .iter_mut()
            .zip(&tokens)
            .map(|(session, next_tokens)| PassPart { kv: &mut session.kv, next_tokens })
            .collect();
        let mut embed = |tokens: &[u32]| self.ops().embed(&self.embedding, tokens, self.embed_scale);
        self.draft.pass(&self.kernels, &features, &mut parts, &mut embed)
    }

    /// The best tokens of one row of logits, with their log-probabilities.
    ///
    /// With a temperature, the position's own noise is added first: the target will choose by the same noise, so the
    /// draft's guess of that very draw is more often right than its most probable token.
    fn best(&self, logits: &[f32], k: usize, sampling: &Sampling, position: u64) -> Children {
        let target = |draft: usize| self.vocab_map.to_target(DraftTokenId(draft as u32)).0;
        if k == WHOLE {
            return drawn::children(logits, sampling, |draft| target(draft as usize));
        }
        let noisy: Vec<f32>;
        let scores = if sampling.is_greedy() {
            logits
        } else {
            let noise = |i: usize| gumbel_noise(sampling.seed, position, target(i));
            noisy = logits.iter().enumerate().map(|(i, l)| l / sampling.temperature + noise(i)).collect();
            &noisy
        };
        self.children(match k {
            0 | 1 => TopK { best: TopK::best(scores, 1), log_sum: 0.0 },
            _ => TopK::of(scores, k),
        })
    }

    /// The best of a row of logits as tokens of the target.
    fn children(&self, TopK { best, log_sum }: TopK) -> Children {
        let most = best.first().map_or(0.0, |b| b.1);
        let target = |draft: u32| self.vocab_map.to_target(DraftTokenId(draft)).0;
        best.into_iter().map(|(draft, value)| (target(draft), value - most - log_sum)).collect()
    }

    /// Children of all levels of sequences whose levels do not depend on each other.
    fn fixed(&self, output: &Shared<K>, asks: &[(usize, &Sampling, u64)]) -> Vec<Vec<Children>> {
        let rows = output.rows;
        if asks.iter().all(|(k, sampling, _)| *k <= 1 && sampling.is_greedy()) {
            let best = self.kernels.argmax(&output.buf, rows, &self.head.packed);
            let child = |draft: &u32| vec![(self.vocab_map.to_target(DraftTokenId(*draft)).0, 0.0)];
            return best.chunks(self.levels).map(|levels| levels.iter().map(child).collect()).collect();
        }
        let confidence = self.draft.confidence(&self.kernels, output);
        let vocab = self.head.out_features;
        if asks.iter().all(|(_, sampling, _)| sampling.is_greedy()) {
            let most = asks.iter().map(|(k, ..)| *k).max().unwrap_or(0);
            let best = self.kernels.top_k(&output.buf, rows, (&self.head.packed, vocab), most);
            let mut all: Vec<Children> = best.into_iter().map(|best| self.children(best)).collect();
            if let Some(confidence) = &confidence {
                all.iter_mut().zip(confidence).for_each(|(children, c)| trust(children, *c));
            }
            let own = |(levels, (k, ..)): (&[Children], &(usize, &Sampling, u64))| {
                levels.iter().map(|level| level.iter().take((*k).max(1)).copied().collect()).collect()
            };
            return all.chunks(self.levels).zip(asks).map(own).collect();
        }
        let mut ops = self.ops();
        let logits = ops.linear(output, &self.head, None);
        let logits = ops.values(&logits);
        asks.iter()
            .zip(logits.chunks(self.levels * vocab))
            .enumerate()
            .map(|(of, ((k, sampling, position), levels))| {
                let level = |(level, logits): (usize, &[f32])| {
                    let mut children = self.best(logits, *k, sampling, position + 1 + level as u64);
                    if let Some(confidence) = confidence.as_ref().filter(|_| *k > 1) {
                        trust(&mut children, confidence[of * self.levels + level]);
                    }
                    children
                };
                levels.chunks(vocab).enumerate().map(level).collect()
            })
            .collect()
    }

    /// Children behind tokens at levels of sequences with a Markov head, and the head's state there.
    fn corrected(&self, wanted: &[Open<'_, K>]) -> Vec<(Option<Shared<K>>, Children)> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let ops = self.ops();
        let row = |of: &Shared<K>, level: usize| self.ops().gather(of, &[level as u32]);
        let outputs: Vec<Shared<K>> = wanted.iter().map(|c| row(c.output, c.level)).collect();
        let logits: Vec<Shared<K>> = wanted.iter().map(|c| row(c.logits, c.level)).collect();
        let tokens: Vec<u32> = wanted.iter().map(|c| c.token).collect();
        let states: Vec<&Shared<K>> = wanted.iter().filter_map(|c| c.state).collect();
        let levels = Correction {
            output: self.ops().stack(&outputs.iter().collect::<Vec<_>>()),
            logits: self.ops().stack(&logits.iter().collect::<Vec<_>>()),
            tokens: &tokens,
            // A state is there for all of them, for they stand behind the first level, or for none.
            state: (states.len() == wanted.len()).then(|| self.ops().stack(&states)),
            confident: wanted.iter().any(|c| c.k > 1),
        };
        let Some(found) = self.draft.correct(&self.kernels, levels) else { return Vec::new() };
        wanted
            .iter()
            .zip(found.logits.chunks(self.head.out_features))
            .enumerate()
            .map(|(i, (c, logits))| {
                let state = found.state.as_ref().map(|next| ops.gather(next, &[i as u32]));
                let mut children = self.best(logits, c.k, c.sampling, c.position);
                if let Some(confidence) = &found.confidence {
                    trust(&mut children, confidence[i]);
                }
                (state, children)
            })
            .collect()
    }
}

/// Gives a slot's best token the probability that the confidence head has for it (a logit), and the others what is left
/// at most. The order stays.
///
/// The head was trained on how often the target takes what the slot proposes, which the draft's own probabilities are
/// only a guess of.
fn trust(children: &mut Children, confidence: f32) {
    let Some((_, best)) = children.first() else { return };
    let best = best.exp();
    let accepted = 1.0 / (1.0 + (-confidence).exp());
    for (i, (_, log_probability)) in children.iter_mut().enumerate() {
        let p = log_probability.exp();
        let share = accepted * p / best.max(f32::MIN_POSITIVE);
        let rest = (1.0 - accepted) * p / (1.0 - best).max(f32::EPSILON);
        let found = if i == 0 { accepted } else { share.min(rest) };
        *log_probability = found.max(f32::MIN_POSITIVE).ln();
    }
}

/// A level to be corrected.
struct Open<'a, K: Kernels> {
    output: &'a Shared<K>,
    logits: &'a Shared<K>,
    level: usize,
    /// The token before.
    token: u32,
    state: Option<&'a Shared<K>>,
    k: usize,
    sampling: &'a Sampling,
    position: u64,
}

/// Rows of the target's head that proposals are chosen from, packed like the draft.
fn part_of_head<K: Kernels>(kernels: &K, head: &Linear<K::Packed>, map: &VocabMap) -> Arc<Linear<K::Packed>> {
    let width = head.in_features;
    let mut rows = kernels.scratch(map.draft_vocab() * width);
    kernels.embed(&head.packed, map.target_ids(), 1.0, &mut rows);
    let mut values = vec![0.0; map.draft_vocab() * width];
    kernels.download(&rows, 0, &mut values);
    let view = WeightView::f32(&values, map.draft_vocab(), width);
    let packed = kernels.pack("part of the head", &view, PackMode::Q8).expect("rows are whole");
    Arc::new(Linear { packed, out_features: map.draft_vocab(), in_features: width })
}

impl<K: Kernels> Drafter<K> for BlockDrafter<K> {
    fn target_layers(&self) -> &[LayerId] {
        &self.layers
    }

    fn begin(&self) -> Box<dyn DrafterSession<K>> {
        Box::new(BlockSession {
            kv: self.draft.new_kv(self.kernels.as_ref()),
            pending: Vec::new(),
            pending_tokens: Vec::new(),
            last_token: None,
            levels: None,
            states: Vec::new(),
            root_state: None,
            bytes_per_token: self.bytes_per_token(),
        })
    }

    fn take_in(&self, committed: &mut [Committed<'_, K>]) {
        for Committed { session, features, next_tokens } in committed {
            let session = BlockSession::of(*session);
            assert!(features.rows.len() == next_tokens.len(), "one following token per position");
            let Features { output, rows } = *features;
            for (rows, next_tokens) in rows.chunks(DEFERRED_ROWS).zip(next_tokens.chunks(DEFERRED_ROWS)) {
                // The newest positions always wait: a pass begins with at least one.
                if session.pending_tokens.len() + rows.len() > DEFERRED_ROWS {
                    self.flush(session);
                }
                let piece = Features { output, rows };
                session.pending.push(Arc::new(piece.concat(self.kernels.as_ref())));
                session.pending_tokens.extend_from_slice(next_tokens);
                session.last_token = next_tokens.last().copied();
            }
        }
    }

    fn rollback_to(&self, session: &mut dyn DrafterSession<K>, positions: usize) {
        let session = BlockSession::of(session);
        let waiting = positions.saturating_sub(session.kv.len());
        session.kv.rollback_to(&self.kernels, positions);
        session.pending_tokens.truncate(waiting);
        session.pending = first_rows(self.kernels.as_ref(), std::mem::take(&mut session.pending), waiting);
        // Known again once the positions behind are handed over.
        (session.last_token, session.levels, session.root_state) = (None, None, None);
        session.states.clear();
    }

    fn roots(&self, asks: &mut [Ask<'_, K>]) -> Vec<Children> {
        let wanted: Vec<(usize, &Sampling, u64)> =
            asks.iter().map(|ask| (wanted_children(ask), ask.sampling, ask.position)).collect();
        let mut sessions: Vec<&mut BlockSession<K>> =
            asks.iter_mut().map(|ask| BlockSession::of(&mut *ask.session)).collect();
        for session in &mut sessions {
            session.states.clear();
            session.root_state = None;
        }
        let new: Vec<usize> =
            (0..sessions.len()).filter(|i| !sessions[*i].pending_tokens.is_empty()).collect();
        if !new.is_empty() {
            let mut fresh: Vec<&mut BlockSession<K>> = sessions
                .iter_mut()
                .filter(|session| !session.pending_tokens.is_empty())
                .map(|session| &mut **session)
                .collect();
            let output = self.pass(&mut fresh); // [n levels, H]
            if self.draft.corrects() {
                let mut ops = self.ops();
                let logits = ops.linear(&output, &self.head, None); // [n levels, Vd]
                for (i, session) in fresh.into_iter().enumerate() {
                    let rows: Vec<u32> = ((i * self.levels) as u32..((i + 1) * self.levels) as u32).collect();
                    let (output, logits) = (ops.gather(&output, &rows), ops.gather(&logits, &rows));
                    session.levels = Some(Levels::Open { output, logits });
                }
            } else {
                let asked: Vec<(usize, &Sampling, u64)> = new.iter().map(|i| wanted[*i]).collect();
                for (session, levels) in fresh.into_iter().zip(self.fixed(&output, &asked)) {
                    session.levels = Some(Levels::Fixed(levels));
                }
            }
        }
        let mut found = vec![Vec::new(); sessions.len()];
        let mut open: Vec<(usize, Open<'_, K>)> = Vec::new();
        for (i, session) in sessions.iter().enumerate() {
            let (k, sampling, position) = wanted[i];
            match (&session.levels, session.last_token) {
                (Some(Levels::Fixed(levels)), _) => found[i] = levels[0].clone(),
                (Some(Levels::Open { output, logits }), Some(token)) => {
                    let position = position + 1;
                    let state = None;
                    open.push((i, Open { output, logits, level: 0, token, state, k, sampling, position }));
                }
                // A sequence of which nothing was seen has nothing to offer.
                _ => {}
            }
        }
        let (which, open): (Vec<usize>, Vec<Open<'_, K>>) = open.into_iter().unzip();
        let answers = self.corrected(&open);
        drop(open);
        for (i, (state, children)) in which.into_iter().zip(answers) {
            sessions[i].root_state = state;
            found[i] = children;
        }
        found
    }

    fn expand(&self, asks: &mut [Ask<'_, K>], nodes: &[Node]) -> Vec<(u32, Children)> {
        let wanted: Vec<(usize, &Sampling, u64)> =
            asks.iter().map(|ask| (wanted_children(ask), ask.sampling, ask.position)).collect();
        let mut sessions: Vec<&mut BlockSession<K>> =
            asks.iter_mut().map(|ask| BlockSession::of(&mut *ask.session)).collect();
        let mut found: Vec<(Option<Shared<K>>, Children)> =
            nodes.iter().map(|_| (None, Vec::new())).collect();
        let mut open: Vec<(usize, Open<'_, K>)> = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            let session = &sessions[node.of];
            let level = node.depth + 1;
            if level >= self.levels {
                continue;
            }
            match &session.levels {
                Some(Levels::Fixed(levels)) => found[i].1.clone_from(&levels[level]),
                Some(Levels::Open { output, logits }) => {
                    let (k, sampling, position) = wanted[node.of];
                    let state = match node.parent {
                        None => session.root_state.as_ref(),
                        Some(parent) => session.states[parent as usize].as_ref(),
                    };
                    let (token, position) = (node.token, position + 1 + level as u64);
                    open.push((i, Open { output, logits, level, token, state, k, sampling, position }));
                }
                None => {}
            }
        }
        let (which, open): (Vec<usize>, Vec<Open<'_, K>>) = open.into_iter().unzip();
        let answers = self.corrected(&open);
        drop(open);
        for (i, answer) in which.into_iter().zip(answers) {
            found[i] = answer;
        }
        nodes
            .iter()
            .zip(found)
            .map(|(node, (state, children))| {
                let session = &mut sessions[node.of];
                session.states.push(state);
                (session.states.len() as u32 - 1, children)
            })
            .collect()
    }

    /// A Markov head is asked for each token, and by far not for nothing: it has a row for every one.
    fn levels_per_pass(&self) -> usize {
        if self.draft.corrects() { 1 } else { self.levels }
    }

    fn deepest(&self) -> usize {
        self.levels
    }

    fn bytes_per_token(&self) -> usize {
        self.draft.kv_bytes_per_token()
    }

    fn bytes_per_session(&self) -> usize {
        DEFERRED_ROWS * self.features_width * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::trust;

    #[test]
    fn a_confidence_takes_the_place_of_the_best_probability_and_keeps_the_order() {
        for probabilities in [[0.5, 0.49, 0.005], [0.9, 0.05, 0.01], [0.2, 0.2, 0.2], [1.0, 0.0, 0.0]] {
            for confidence in [-20.0f32, -2.0, 0.0, 3.0, 20.0] {
                let mut children: Vec<(u32, f32)> =
                    probabilities.iter().zip(7..).map(|(p, token)| (token, f32::ln(*p))).collect();
                trust(&mut children, confidence);
                let accepted = 1.0 / (1.0 + (-confidence).exp());
                assert!((children[0].1.exp() - accepted).abs() < 1e-6, "{probabilities:?} {confidence}");
                let tokens: Vec<u32> = children.iter().map(|c| c.0).collect();
                assert_eq!(tokens, [7, 8, 9]);
                assert!(children.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{children:?}");
                let rest: f32 = children[1..].iter().map(|c| c.1.exp()).sum();
                assert!(rest <= 1.0 - accepted + 1e-5, "{children:?} {confidence}");
            }
        }
        trust(&mut Vec::new(), 1.0);
    }
}
