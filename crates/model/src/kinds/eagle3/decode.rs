//! An EAGLE-3 draft ready to decode, and asked a question by hand.

use std::sync::Arc;

use draftsmith_core::{DraftTokenId, VocabMap};
use draftsmith_kernels::{Kernels, KvDtype, PackMode, StepMask};

use super::{Eagle3, Eagle3Config, Eagle3Weights};
use crate::draft::{
    ChainNetwork, DraftAnswer, DraftError, DraftNetwork, DraftQuestion, PackDraft, Packing, Proposer, Shared,
};
use crate::infer::{CacheAttend, Infer, Linear};
use crate::kinds::DraftConfig;

/// Network and packed weights.
pub struct Eagle3Draft<K: Kernels> {
    /// The network.
    pub network: Eagle3,
    /// Its weights.
    pub weights: Eagle3Weights<Arc<Linear<K::Packed>>, Arc<K::Buf>>,
    /// Draft ids to target ids.
    pub vocab_map: VocabMap,
    kv_dtype: KvDtype,
}

impl<K: Kernels> PackDraft<K, Eagle3Config> for Eagle3Draft<K> {
    fn pack(
        config: Eagle3Config,
        vocab_map: Option<VocabMap>,
        source: &mut Packing<'_, K>,
        mode: PackMode,
    ) -> Result<Eagle3Draft<K>, DraftError> {
        let weights = Eagle3Weights::build(&config, source)?;
        let vocab_map = vocab_map.unwrap_or_else(|| VocabMap::identity(config.vocab_size));
        Ok(Eagle3Draft { network: Eagle3::new(config), weights, vocab_map, kv_dtype: mode.kv_dtype() })
    }
}

impl<K: Kernels> Eagle3Draft<K> {
    /// An empty cache of its layer.
    pub fn new_kv(&self, kernels: &K) -> K::Kv {
        let config = &self.network.config;
        kernels.kv_new(config.num_key_value_heads, config.head_dim, self.kv_dtype)
    }
}

impl<K: Kernels> DraftNetwork<K> for Eagle3Draft<K> {
    fn config(&self) -> DraftConfig {
        DraftConfig::Eagle3(self.network.config.clone())
    }

    fn vocab_map(&self) -> Option<&VocabMap> {
        Some(&self.vocab_map)
    }

    fn kv_bytes_per_token(&self) -> usize {
        let config = &self.network.config;
        2 * config.num_key_value_heads * config.head_dim * self.kv_dtype.bytes()
    }

    fn answer(&self, kernels: &K, question: DraftQuestion<'_>) -> DraftAnswer {
        let (network, weights, config) = (&self.network, &self.weights, &self.network.config);
        let DraftQuestion { token_ids, features, depth, embed } = question;
        let slots = features.len() / config.features_width();
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let mut kv = self.new_kv(kernels);
        let mut ops = Infer::new(kernels);

        let features = ops.input(features, config.features_width()); // [N, 3 Ht]
        let mut hidden = network.project(&mut ops, weights, &features); // [N, H]
        let mut tokens = token_ids[..slots].to_vec();
        let mut answer = DraftAnswer::default();
        // All rows stay uncommitted: one chain, as a proposal behind an empty cache.
        let mut parents: Vec<Option<u32>> = Vec::new();
        for step in 0..=depth {
            let first = parents.len();
            parents.extend((first as u32..(first + tokens.len()) as u32).map(|row| row.checked_sub(1)));
            // The feature of a drafted token stands one position behind the token itself, so rows and positions agree.
            let positions: Vec<u32> = (first as u32..parents.len() as u32).collect();
            let mask = StepMask { new_rows: tokens.len(), ..StepMask::step(0, &parents, None, scale) };
            let rows = embed(first, &tokens); // [R, H]
            let embedded = ops.input(&rows, config.hidden_size);
            answer.embeddings.extend(rows);
            answer.token_ids.extend_from_slice(&tokens);
            let mut attend = CacheAttend::one(&mut kv, mask, config.head_dim);
            let output = network.step(&mut ops, weights, &embedded, &hidden, &positions, &mut attend); // [R, H]
            let head_input = network.head_input(&mut ops, weights, &output); // [R, H]
            let last = [tokens.len() as u32 - 1];
            let head_row = ops.gather(&head_input, &last); // [1, H]
            let logits = network.logits(&mut ops, weights, &head_row); // [1, Vd]
            answer.logits = ops.values(&logits);
            let last_output = ops.gather(&output, &last); // [1, H]
            answer.hidden = ops.values(&last_output);
            let (logits, fed) = (&answer.logits, slots + step);
            tokens = vec![token_ids.get(fed).copied().unwrap_or_else(|| {
                let best =
                    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
                self.vocab_map.to_target(DraftTokenId(best as u32)).0
            })];
            let feedback = network.feedback(&output, &head_input);
            hidden = ops.gather(&feedback, &last); // [1, H]
        }
        answer
    }
    fn proposer(self: Box<Self>) -> Proposer<K> {
        Proposer::Chain(self)
    }
}

impl<K: Kernels> ChainNetwork<K> for Eagle3Draft<K> {
    fn new_kv(&self, kernels: &K) -> Option<K::Kv> {
        Some(Eagle3Draft::new_kv(self, kernels))
    }

    fn head_dim(&self) -> usize {
        self.network.config.head_dim
    }

    fn project(&self, kernels: &K, features: &Shared<K>) -> Shared<K> {
        self.network.project(&mut Infer::new(kernels), &self.weights, features)
    }

    fn step(
        &self,
        kernels: &K,
        embedded: &Shared<K>,
        hidden: &Shared<K>,
        positions: &[u32],
        attend: &mut CacheAttend<'_, K::Kv>,
    ) -> (Shared<K>, Shared<K>) {
        let (network, weights, mut ops) = (&self.network, &self.weights, Infer::new(kernels));
        let output = network.step(&mut ops, weights, embedded, hidden, positions, attend); // [R, H]
        let head_input = network.head_input(&mut ops, weights, &output); // [R, H]
        (network.feedback(&output, &head_input), head_input)
    }

    fn head(&self) -> &Arc<Linear<K::Packed>> {
        &self.weights.lm_head
    }
}
