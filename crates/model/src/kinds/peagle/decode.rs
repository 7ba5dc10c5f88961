//! A P-EAGLE draft ready to decode.

use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_kernels::{Kernels, KvDtype, PackMode, Segment, StepMask};

use super::{PEagleConfig, PEagleNet, PEagleWeights};
use crate::draft::{
    DraftAnswer, DraftError, DraftKv, DraftNetwork, DraftQuestion, PackDraft, Packing, PassNetwork, PassPart,
    Proposer, Shared,
};
use crate::infer::{CacheAttend, Infer, Linear, Rows};
use crate::kinds::DraftConfig;
use crate::ops::{Attend, Ops};

/// Network and packed weights, the draft's own embedding among them.
pub struct PEagleDraft<K: Kernels> {
    /// The network.
    pub network: PEagleNet,
    /// Its weights.
    pub weights: PEagleWeights<Arc<Linear<K::Packed>>, Arc<K::Buf>>,
    /// Draft ids to target ids.
    pub vocab_map: VocabMap,
    kv_dtype: KvDtype,
}

/// Rows of one sequence in a pass: real slots, then entries that stand for what is not known.
pub struct PEaglePart<'a, K: Kernels> {
    /// Its caches.
    pub kv: &'a mut DraftKv<K>,
    /// The token behind each of the new real slots.
    pub next_tokens: &'a [u32],
    /// Entries behind them.
    pub unknown: usize,
}

struct Caches<'a, 'b, K: Kernels> {
    config: &'a PEagleConfig,
    parts: &'a mut [PEaglePart<'b, K>],
    /// Per part a chain of its rows.
    parents: Vec<Vec<Option<u32>>>,
    layer: usize,
}

impl<'k, K: Kernels> Attend<Infer<'k, K>> for Caches<'_, '_, K> {
    fn attend(
        &mut self,
        ops: &mut Infer<'k, K>,
        q: Arc<Rows<K::Buf>>,
        k: Arc<Rows<K::Buf>>,
        v: Arc<Rows<K::Buf>>,
    ) -> Arc<Rows<K::Buf>> {
        let (layer, shape) = (self.layer, &self.config.layer);
        self.layer += 1;
        let segments = self
            .parts
            .iter_mut()
            .zip(&self.parents)
            .map(|(part, parents)| {
                let mask = StepMask::step(part.kv.len, parents, None, shape.scale());
                Segment { kv: &mut part.kv.layers[layer], mask }
            })
            .collect();
        CacheAttend { segments, head_dim: shape.head_dim }.attend(ops, q, k, v)
    }
}

impl<K: Kernels> PackDraft<K, PEagleConfig> for PEagleDraft<K> {
    fn pack(
        config: PEagleConfig,
        vocab_map: Option<VocabMap>,
        source: &mut Packing<'_, K>,
        mode: PackMode,
    ) -> Result<PEagleDraft<K>, DraftError> {
        let weights = PEagleWeights::build(&config, source)?;
        let vocab_map = vocab_map.unwrap_or_else(|| VocabMap::identity(config.vocab_size));
        Ok(PEagleDraft { network: PEagleNet::new(config), weights, vocab_map, kv_dtype: mode.kv_dtype() })
    }
}

impl<K: Kernels> PEagleDraft<K> {
    /// Empty caches.
    pub fn new_kv(&self, kernels: &K) -> DraftKv<K> {
        let (config, shape) = (&self.network.config, &self.network.config.layer);
        let layer = |_| kernels.kv_new(shape.num_key_value_heads, shape.head_dim, self.kv_dtype);
        DraftKv { layers: (0..config.num_layers).map(layer).collect(), len: 0 }
    }

    /// Runs the new rows of several sequences, whose features `[C, 3 Ht]` stand one after the other: output of the last
    /// layer `[R, H]`, the rows of a sequence together. The real slots stay in the caches, the entries behind them do not.
    pub fn run(
        &self,
        kernels: &K,
        features: &Arc<Rows<K::Buf>>,
        parts: &mut [PEaglePart<'_, K>],
    ) -> Arc<Rows<K::Buf>> {
        let config = &self.network.config;
        let mut ops = Infer::new(kernels);
        let (network, w) = (&self.network, &self.weights);
        let projected = network.project(&mut ops, w, features); // [C, H]
        let all = if parts.iter().any(|p| p.unknown > 0) {
            let unknown = network.unknown(&mut ops, w); // [1, H]
            ops.stack(&[&projected, &unknown])
        } else {
            projected
        };
        let stand_in = features.rows as u32;
        let (mut order, mut tokens, mut positions, mut parents) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut from = 0u32;
        for part in parts.iter() {
            let (real, unknown) = (part.next_tokens.len(), part.unknown);
            order.extend((from..from + real as u32).chain(std::iter::repeat_n(stand_in, unknown)));
            from += real as u32;
            tokens.extend(part.next_tokens.iter().copied());
            tokens.extend(std::iter::repeat_n(config.mask_token_id, unknown));
            positions.extend(part.kv.len as u32..(part.kv.len + real + unknown) as u32);
            parents.push((0..(real + unknown) as u32).map(|row| row.checked_sub(1)).collect());
        }
        let hidden = ops.select(&all, &order); // [R, H]
        let mut attend = Caches { config, parts, parents, layer: 0 };
        let output = network.layers(&mut ops, w, &tokens, &hidden, &positions, &mut attend);
        for part in parts.iter_mut() {
            part.kv.len += part.next_tokens.len();
            let len = part.kv.len;
            part.kv.rollback_to(kernels, len);
        }
        output
    }
}

impl<K: Kernels> DraftNetwork<K> for PEagleDraft<K> {
    fn config(&self) -> DraftConfig {
        DraftConfig::PEagle(self.network.config.clone())
    }

    fn vocab_map(&self) -> Option<&VocabMap> {
        Some(&self.vocab_map)
    }

    fn kv_bytes_per_token(&self) -> usize {
        let (config, shape) = (&self.network.config, &self.network.config.layer);
        2 * config.num_layers * shape.kv_width() * self.kv_dtype.bytes()
    }

    fn answer(&self, kernels: &K, question: DraftQuestion<'_>) -> DraftAnswer {
        let config = &self.network.config;
        let DraftQuestion { token_ids, features, depth, embed } = question;
        let slots = features.len() / config.features_width();
        let mut kv = self.new_kv(kernels);
        let mut ops = Infer::new(kernels);
        let features = ops.input(features, config.features_width()); // [N, 3 Ht]
        let next_tokens = &token_ids[..slots];
        let output =
            self.run(kernels, &features, &mut [PEaglePart { kv: &mut kv, next_tokens, unknown: depth }]);
        let last = ops.gather(&output, &[(slots + depth) as u32 - 1]); // [1, H]
        let head_input = self.network.head_input(&mut ops, &self.weights, &last);
        let logits = self.network.logits(&mut ops, &self.weights, &head_input); // [1, Vd]
        // The embedding is the draft's own; the target's is asked for so that a question can be stored as others are.
        let mut fed = next_tokens.to_vec();
        fed.extend(std::iter::repeat_n(config.mask_token_id, depth));
        let embeddings = embed(0, &fed);
        DraftAnswer { token_ids: fed, embeddings, hidden: ops.values(&last), logits: ops.values(&logits) }
    }
    fn proposer(self: Box<Self>) -> Proposer<K> {
        Proposer::Pass(self)
    }
}

impl<K: Kernels> PassNetwork<K> for PEagleDraft<K> {
    fn levels(&self) -> usize {
        self.network.config.num_depths
    }

    fn new_kv(&self, kernels: &K) -> DraftKv<K> {
        PEagleDraft::new_kv(self, kernels)
    }

    fn take_in(&self, kernels: &K, features: &Shared<K>, part: PassPart<'_, K>) {
        let part = PEaglePart { kv: part.kv, next_tokens: part.next_tokens, unknown: 0 };
        self.run(kernels, features, &mut [part]);
    }

    /// Its embedding is its own.
    fn pass(
        &self,
        kernels: &K,
        features: &Shared<K>,
        parts: &mut [PassPart<'_, K>],
        _embed: &mut dyn FnMut(&[u32]) -> Shared<K>,
    ) -> Shared<K> {
        let unknown = self.network.config.num_depths - 1;
        let mut rows = Vec::new();
        let mut from = 0u32;
        for part in parts.iter() {
            let last = from + part.next_tokens.len() as u32 - 1;
            rows.extend(last..=last + unknown as u32);
            from = last + unknown as u32 + 1;
        }
        let mut parts: Vec<PEaglePart<'_, K>> = parts
            .iter_mut()
            .map(|part| PEaglePart { kv: &mut *part.kv, next_tokens: part.next_tokens, unknown })
            .collect();
        let mut ops = Infer::new(kernels);
        let output = self.run(kernels, features, &mut parts);
        let output = ops.gather(&output, &rows);
        self.network.head_input(&mut ops, &self.weights, &output)
    }

    fn head(&self) -> Option<&Arc<Linear<K::Packed>>> {
        Some(&self.weights.lm_head)
    }
}
