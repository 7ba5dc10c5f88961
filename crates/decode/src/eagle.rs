//! The EAGLE-3 drafter: one decoder layer over the target's features and its own outputs [eagle3 §9].
//!
//! The draft's cache holds one slot per committed position, computed from true features; proposals append to it and
//! are dropped by the next [`DrafterSession::extend`].

use std::sync::Arc;

use draftsmith_core::{DraftTokenId, LayerId, Sampling, TokenTree, gumbel_noise};
use draftsmith_kernels::{Kernels, StepMask};
use draftsmith_model::eagle3::Eagle3Draft;
use draftsmith_model::{CacheAttend, DraftNetwork, Infer, Linear, Rows, Target};

use crate::DecodeError;
use crate::drafter::{DraftPlan, Drafter, DrafterSession, Features};

/// Positions whose features may wait at most. They are much larger than what the cache keeps of them, and a sequence
/// that never drafts would hold those of its whole text; taken in by so many, a position costs the least.
const DEFERRED_ROWS: usize = 256;

/// An EAGLE-3 draft beside the target it was made for.
pub(crate) struct EagleDrafter<K: Kernels> {
    kernels: Arc<K>,
    draft: Arc<Eagle3Draft<K>>,
    embedding: Arc<Linear<K::Packed>>,
    embed_scale: f32,
    layers: Vec<LayerId>,
}

impl<K: Kernels> EagleDrafter<K> {
    /// Joins draft and target.
    ///
    /// # Errors
    /// [`DecodeError::DraftMismatch`] if their shapes disagree.
    pub(crate) fn new(target: &Target<K>, draft: Arc<Eagle3Draft<K>>) -> Result<EagleDrafter<K>, DecodeError> {
        let (d, t) = (&draft.network.config, target.config());
        for (what, draft, target) in [
            ("target hidden size", d.target_hidden_size, t.hidden_size),
            ("vocabulary", d.vocab_size, t.vocab_size),
            ("embedding width", d.hidden_size, t.hidden_size),
            ("vocabulary map", draft.vocab_map.target_vocab(), t.vocab_size),
            ("draft vocabulary", draft.vocab_map.draft_vocab(), d.draft_vocab_size),
        ] {
            let wanted = if what == "draft vocabulary" { d.draft_vocab_size } else { target };
            if draft != wanted {
                return Err(DecodeError::DraftMismatch { what, draft, target: wanted });
            }
        }
        let layers: Vec<LayerId> = match d.target_layer_ids {
            Some(ids) => ids.map(LayerId).to_vec(),
            None => draftsmith_core::default_target_layers(t.num_layers as u32).to_vec(),
        };
        if let Some(outside) = layers.iter().find(|l| l.0 as usize >= t.num_layers) {
            let (draft, target) = (outside.0 as usize, t.num_layers);
            return Err(DecodeError::DraftMismatch { what: "captured layer", draft, target });
        }
        Ok(EagleDrafter {
            kernels: Arc::clone(target.kernels()),
            draft,
            embedding: Arc::clone(target.embedding()),
            embed_scale: t.embed_scale,
            layers,
        })
    }
}

impl<K: Kernels> Drafter<K> for EagleDrafter<K> {
    fn target_layers(&self) -> &[LayerId] {
        &self.layers
    }

    fn begin(self: Arc<Self>) -> Box<dyn DrafterSession<K>> {
        let kv = self.draft.new_kv(self.kernels.as_ref());
        Box::new(EagleSession {
            drafter: self,
            kv,
            len: 0,
            last: None,
            pending: Vec::new(),
            pending_tokens: Vec::new(),
            grown: Vec::new(),
            grown_parents: Vec::new(),
        })
    }

    fn bytes_per_token(&self) -> usize {
        self.draft.kv_bytes_per_token()
    }

    fn bytes_per_session(&self) -> usize {
        let config = &self.draft.network.config;
        DEFERRED_ROWS * self.layers.len() * config.target_hidden_size * size_of::<f32>()
    }
}

/// Activations that several nodes may share.
type Shared<K> = Arc<Rows<<K as Kernels>::Buf>>;

/// Output of one draft row.
struct Head<K: Kernels> {
    /// `[1, H]` hidden input of the next depth.
    feedback: Arc<Rows<K::Buf>>,
    /// `[Vd]`
    logits: Vec<f32>,
}

struct EagleSession<K: Kernels> {
    drafter: Arc<EagleDrafter<K>>,
    kv: K::Kv,
    /// Committed slots.
    len: usize,
    last: Option<Head<K>>,
    /// Features of committed positions that are not in the cache yet, and the tokens that follow them.
    pending: Vec<Shared<K>>,
    pending_tokens: Vec<u32>,
    /// Nodes expanded one by one since then, and their parents among them.
    grown: Vec<Head<K>>,
    grown_parents: Vec<Option<u32>>,
}

/// A node considered for the tree.
struct Candidate {
    token: u32,
    parent: Option<u32>,
    /// Cumulative log-probability.
    score: f32,
}

impl<K: Kernels> EagleSession<K> {
    /// Runs the layer on rows whose parents are given among the uncommitted ones; returns outputs and head inputs.
    fn step(
        &mut self,
        hidden: &Arc<Rows<K::Buf>>,
        tokens: &[u32],
        parents: &[Option<u32>],
        positions: &[u32],
    ) -> (Shared<K>, Shared<K>) {
        let drafter = self.drafter.as_ref();
        let (network, weights) = (&drafter.draft.network, &drafter.draft.weights);
        let mut ops = Infer::new(drafter.kernels.as_ref());
        let embedded =
            draftsmith_model::Ops::embed(&mut ops, &drafter.embedding, tokens, drafter.embed_scale);
        let scale = 1.0 / (network.config.head_dim as f32).sqrt();
        let mask = StepMask { new_rows: tokens.len(), ..StepMask::step(self.len, parents, None, scale) };
        let mut attend = CacheAttend::one(&mut self.kv, mask, network.config.head_dim);
        let output = network.step(&mut ops, weights, &embedded, hidden, positions, &mut attend);
        let head_input = network.head_input(&mut ops, weights, &output);
        (output, head_input)
    }

    /// Feedback and logits of chosen rows.
    fn heads(
        &self,
        output: &Arc<Rows<K::Buf>>,
        head_input: &Arc<Rows<K::Buf>>,
        rows: &[u32],
    ) -> Vec<Head<K>> {
        let drafter = self.drafter.as_ref();
        let (network, weights) = (&drafter.draft.network, &drafter.draft.weights);
        let mut ops = Infer::new(drafter.kernels.as_ref());
        let input = ops.gather(head_input, rows);
        let logits_rows = network.logits(&mut ops, weights, &input);
        let logits = ops.values(&logits_rows);
        let feedback = network.feedback(output, head_input);
        rows.iter()
            .zip(logits.chunks_exact(network.config.draft_vocab_size))
            .map(|(row, logits)| Head { feedback: ops.gather(&feedback, &[*row]), logits: logits.to_vec() })
            .collect()
    }

    /// The `k` best children of a node by draft log-probability, best first.
    ///
    /// With a temperature, the position's own noise is added first: the target will choose by the same noise, so
    /// the draft's guess of that very draw is more often right than its most probable token.
    fn best(
        &self,
        logits: &[f32],
        k: usize,
        sampling: &Sampling,
        position: u64,
        normalised: bool,
    ) -> Vec<(u32, f32)> {
        let map = &self.drafter.draft.vocab_map;
        let target = |i: usize| map.to_target(DraftTokenId(i as u32)).0;
        let noisy: Vec<f32>;
        let scores = if sampling.is_greedy() {
            logits
        } else {
            noisy = logits
                .iter()
                .enumerate()
                .map(|(i, l)| l / sampling.temperature + gumbel_noise(sampling.seed, position, target(i)))
                .collect();
            &noisy
        };
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
        for (i, score) in scores.iter().enumerate() {
            if best.len() < k || *score > best[k - 1].1 {
                let at = best.partition_point(|(_, s)| *s >= *score);
                best.insert(at, (i as u32, *score));
                best.truncate(k);
            }
        }
        let max = best.first().map_or(0.0, |b| b.1);
        let log_total =
            if !normalised { 0.0 } else { scores.iter().map(|s| (s - max).exp()).sum::<f32>().ln() };
        best.into_iter().map(|(i, s)| (target(i as usize), s - max - log_total)).collect()
    }

    fn rollback(&mut self) {
        self.drafter.kernels.kv_compact(&mut self.kv, self.len, &[]);
        self.grown.clear();
        self.grown_parents.clear();
    }

    /// Takes the pending positions into the cache and computes what follows the last of them.
    fn flush(&mut self) {
        if let Some((output, head_input, rows)) = self.take_in() {
            self.last = self.heads(&output, &head_input, &[rows as u32 - 1]).pop();
        }
    }

    /// Takes the pending positions into the cache; returns outputs and head inputs, and their number.
    fn take_in(&mut self) -> Option<(Shared<K>, Shared<K>, usize)> {
        let next_tokens = std::mem::take(&mut self.pending_tokens);
        if next_tokens.is_empty() {
            return None;
        }
        self.rollback();
        let drafter = Arc::clone(&self.drafter);
        let mut ops = Infer::new(drafter.kernels.as_ref());
        let pending = std::mem::take(&mut self.pending);
        let joined = self.stack(&pending);
        drop(pending);
        let hidden = drafter.draft.network.project(&mut ops, &drafter.draft.weights, &joined);
        let rows = next_tokens.len();
        let parents = TokenTree::chain_parents(rows);
        let positions: Vec<u32> = (self.len as u32..(self.len + rows) as u32).collect();
        let (output, head_input) = self.step(&hidden, &next_tokens, &parents, &positions);
        self.len += rows;
        Some((output, head_input, rows))
    }
}

impl<K: Kernels> DrafterSession<K> for EagleSession<K> {
    fn extend(&mut self, features: &Features<'_, K>, next_tokens: &[u32]) {
        self.defer(features, next_tokens);
        self.flush();
    }

    fn defer(&mut self, features: &Features<'_, K>, next_tokens: &[u32]) {
        assert!(features.rows.len() == next_tokens.len(), "one following token per position");
        let Features { output, rows } = *features;
        for (rows, next_tokens) in rows.chunks(DEFERRED_ROWS).zip(next_tokens.chunks(DEFERRED_ROWS)) {
            if self.pending_tokens.len() + rows.len() > DEFERRED_ROWS {
                // What follows them is asked for only once the positions behind are in.
                self.take_in();
            }
            let piece = Features { output, rows };
            self.pending.push(Arc::new(piece.concat(self.drafter.kernels.as_ref())));
            self.pending_tokens.extend_from_slice(next_tokens);
        }
    }

    fn held_bytes(&self) -> usize {
        let waiting: usize = self.pending.iter().map(|p| p.rows * p.width * size_of::<f32>()).sum();
        waiting + self.len * self.drafter.bytes_per_token()
    }

    fn children(
        &mut self,
        node: Option<u32>,
        k: usize,
        sampling: &Sampling,
        position: u64,
    ) -> Vec<(u32, f32)> {
        if node.is_none() {
            self.flush();
            self.rollback();
        }
        let head = node.map_or(self.last.as_ref(), |n| self.grown.get(n as usize));
        let Some(head) = head else { return Vec::new() };
        let best = self.best(&head.logits, k, sampling, position + 1, true);
        best.into_iter().map(|(token, score)| (token, score.exp())).collect()
    }

    fn expand(&mut self, parent: Option<u32>, token: u32, depth: usize) -> u32 {
        let from = parent.map_or(self.last.as_ref(), |p| self.grown.get(p as usize));
        let hidden = Arc::clone(&from.expect("children were asked for before").feedback);
        let mut parents = std::mem::take(&mut self.grown_parents);
        parents.push(parent);
        // The feature of a drafted token stands one position behind the token itself.
        let (output, head_input) = self.step(&hidden, &[token], &parents, &[(self.len + depth) as u32]);
        self.grown_parents = parents;
        self.grown.extend(self.heads(&output, &head_input, &[0]));
        self.grown.len() as u32 - 1
    }

    fn propose(&mut self, plan: &DraftPlan, room: usize, sampling: &Sampling, position: u64) -> TokenTree {
        let (depth, top_k, nodes) = match plan {
            // An automatic plan grows its tree node by node.
            DraftPlan::None | DraftPlan::Auto => return TokenTree::default(),
            DraftPlan::Chain { depth } => (*depth, 1, *depth),
            DraftPlan::Tree { depth, top_k, num_draft_tokens } => {
                (*depth, (*top_k).max(1), *num_draft_tokens)
            }
        };
        let depth = depth.min(room);
        self.flush();
        let Some(last) = self.last.take() else { return TokenTree::default() };
        self.rollback();
        let mut candidates: Vec<Candidate> = self
            // Chains need no probabilities.
            .best(&last.logits, top_k, sampling, position + 1, top_k > 1)
            .into_iter()
            .map(|(token, score)| Candidate { token, parent: None, score })
            .collect();
        // Candidate of each uncommitted cache row, and parents among those rows.
        let mut row_of: Vec<Option<u32>> = vec![None; candidates.len()];
        let mut parents: Vec<Option<u32>> = Vec::new();
        let mut heads: Vec<Option<Head<K>>> = Vec::new();
        let mut frontier: Vec<u32> = (0..candidates.len() as u32).collect();
        for level in 1..depth {
            frontier.sort_by(|a, b| {
                candidates[*b as usize].score.total_cmp(&candidates[*a as usize].score).then(a.cmp(b))
            });
            frontier.truncate(top_k);
            if frontier.is_empty() {
                break;
            }
            let first = parents.len();
            let mut tokens = Vec::with_capacity(frontier.len());
            let mut inputs: Vec<Arc<Rows<K::Buf>>> = Vec::with_capacity(frontier.len());
            for node in &frontier {
                let candidate = &candidates[*node as usize];
                let parent_row = candidate.parent.and_then(|p| row_of[p as usize]);
                row_of[*node as usize] = Some(parents.len() as u32);
                parents.push(parent_row);
                tokens.push(candidate.token);
                inputs.push(match parent_row {
                    None => Arc::clone(&last.feedback),
                    Some(row) => Arc::clone(
                        &heads[row as usize].as_ref().expect("a parent was expanded a level before").feedback,
                    ),
                });
            }
            let hidden = self.stack(&inputs);
            // The feature of a drafted token stands one position behind the token itself.
            let positions = vec![(self.len + level - 1) as u32; tokens.len()];
            let (output, head_input) = self.step(&hidden, &tokens, &parents, &positions);
            let rows: Vec<u32> = (0..tokens.len() as u32).collect();
            let level_heads = self.heads(&output, &head_input, &rows);
            let mut next = Vec::new();
            for (i, head) in level_heads.into_iter().enumerate() {
                let parent = frontier[i];
                let base = candidates[parent as usize].score;
                for (token, score) in
                    self.best(&head.logits, top_k, sampling, position + level as u64 + 1, top_k > 1)
                {
                    next.push(candidates.len() as u32);
                    candidates.push(Candidate { token, parent: Some(parent), score: base + score });
                    row_of.push(None);
                }
                debug_assert_eq!(heads.len(), first + i);
                heads.push(Some(head));
            }
            frontier = next;
        }
        self.last = Some(last);
        self.rollback();
        best_nodes(&candidates, if depth == 0 { 0 } else { nodes })
    }
}

impl<K: Kernels> EagleSession<K> {
    /// Rows of equal width one below the other.
    fn stack(&self, inputs: &[Arc<Rows<K::Buf>>]) -> Arc<Rows<K::Buf>> {
        if let [one] = inputs {
            return Arc::clone(one);
        }
        // Side by side in one row is the same memory as one below the other.
        let kernels = self.drafter.kernels.as_ref();
        let width = inputs[0].width;
        let rows = inputs.iter().map(|i| i.rows).sum();
        let mut buf = kernels.scratch(rows * width);
        let parts: Vec<_> = inputs.iter().map(|i| (&i.buf, i.rows * width)).collect();
        kernels.concat_cols(&parts, 1, &mut buf);
        Arc::new(Rows { buf, rows, width })
    }
}

/// The `count` best candidates by cumulative score as a tree. A child never scores above its parent and stands
/// after it, so the choice is closed under parents.
fn best_nodes(candidates: &[Candidate], count: usize) -> TokenTree {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| candidates[*b].score.total_cmp(&candidates[*a].score).then(a.cmp(b)));
    order.truncate(count);
    order.sort_unstable();
    let mut place = vec![None; candidates.len()];
    let mut tree = TokenTree::default();
    for index in order {
        let candidate = &candidates[index];
        let parent = match candidate.parent {
            None => None,
            Some(p) => match place[p as usize] {
                Some(at) => Some(at),
                // Not reached by the argument above; kept so that a NaN score cannot make a broken tree.
                None => continue,
            },
        };
        place[index] = Some(tree.push(draftsmith_core::TargetTokenId(candidate.token), parent));
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_nodes_are_closed_under_parents() {
        let node = |token, parent, score| Candidate { token, parent, score };
        let candidates = [
            node(10, None, -0.1),
            node(11, None, -2.0),
            node(12, Some(0), -0.3),
            node(13, Some(0), -1.5),
            node(14, Some(2), -0.4),
        ];
        let tree = best_nodes(&candidates, 3);
        assert_eq!(tree.tokens.iter().map(|t| t.0).collect::<Vec<_>>(), [10, 12, 14]);
        assert_eq!(tree.parents, [None, Some(0), Some(1)]);
        assert!(best_nodes(&candidates, 0).is_empty());
        assert!(best_nodes(&candidates, 9).validate().is_ok());
    }
}
