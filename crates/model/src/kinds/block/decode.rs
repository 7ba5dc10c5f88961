//! A block draft ready to decode.

use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_kernels::{Kernels, KvDtype, PackMode, Segment, StepMask};

use super::{BlockConfig, BlockNet, BlockWeights};
use crate::draft::{
    Corrected, Correction, DraftAnswer, DraftError, DraftKv, DraftNetwork, DraftQuestion, PackDraft, Packing,
    PassNetwork, PassPart, Proposer, Shared,
};
use crate::infer::{CacheAttend, Infer, Linear, Rows};
use crate::kinds::DraftConfig;
use crate::ops::{Attend, Ops};

/// Network and packed weights. Embedding and head are the target's and handed in.
pub struct BlockDraft<K: Kernels> {
    /// The network.
    pub network: BlockNet,
    /// Its weights.
    pub weights: BlockWeights<Arc<Linear<K::Packed>>, Arc<K::Buf>>,
    /// Draft ids to target ids: rows of the target's head that proposals are chosen from.
    pub vocab_map: VocabMap,
    /// Positions by which the RoPE of a block stands further from its context than where it is: 0, but for those who look for
    /// the cause of a draft that is never accepted.
    pub rope_gap: i32,
    kv_dtype: KvDtype,
}

/// Attention of the blocks of several sequences, layer by layer.
struct BlockCaches<'a, 'b, K: Kernels> {
    config: &'a BlockConfig,
    kvs: &'a mut [&'b mut DraftKv<K>],
    /// A chain of a block's rows.
    parents: Vec<Option<u32>>,
    layer: usize,
}

impl<'k, K: Kernels> Attend<Infer<'k, K>> for BlockCaches<'_, '_, K> {
    fn attend(
        &mut self,
        ops: &mut Infer<'k, K>,
        q: Arc<Rows<K::Buf>>,
        k: Arc<Rows<K::Buf>>,
        v: Arc<Rows<K::Buf>>,
    ) -> Arc<Rows<K::Buf>> {
        let (layer, shape) = (self.layer, &self.config.layer);
        self.layer += 1;
        let window = self.config.sliding_window.filter(|_| self.config.sliding[layer]);
        let parents = &self.parents;
        let segments = self
            .kvs
            .iter_mut()
            .map(|kv| {
                let base = kv.len;
                let mask = match window {
                    Some(_) => StepMask::step(base, parents, window, shape.scale()),
                    None => StepMask::block(base, parents, shape.scale()),
                };
                Segment { kv: &mut kv.layers[layer], mask }
            })
            .collect();
        CacheAttend { segments, head_dim: shape.head_dim }.attend(ops, q, k, v)
    }
}

impl<K: Kernels> PackDraft<K, BlockConfig> for BlockDraft<K> {
    fn pack(
        config: BlockConfig,
        vocab_map: Option<VocabMap>,
        source: &mut Packing<'_, K>,
        mode: PackMode,
    ) -> Result<BlockDraft<K>, DraftError> {
        let weights = BlockWeights::build(&config, source)?;
        let vocab_map = vocab_map.unwrap_or_else(|| VocabMap::identity(config.vocab_size));
        let (network, kv_dtype) = (BlockNet::new(config), mode.kv_dtype());
        Ok(BlockDraft { network, weights, vocab_map, rope_gap: 0, kv_dtype })
    }
}

impl<K: Kernels> BlockDraft<K> {
    /// Empty caches.
    pub fn new_kv(&self, kernels: &K) -> DraftKv<K> {
        let (config, shape) = (&self.network.config, &self.network.config.layer);
        let layer = |_| kernels.kv_new(shape.num_key_value_heads, shape.head_dim, self.kv_dtype);
        DraftKv { layers: (0..config.sliding.len()).map(layer).collect(), len: 0 }
    }

    /// Takes the features `[C, K H]` of the next positions into the caches of their sequences, of which each has so many.
    pub fn take_in(&self, kernels: &K, features: &Arc<Rows<K::Buf>>, into: &mut [(&mut DraftKv<K>, usize)]) {
        let mut ops = Infer::new(kernels);
        let positions: Vec<u32> =
            into.iter().flat_map(|(kv, rows)| kv.len as u32..(kv.len + rows) as u32).collect();
        let layers = self.network.context(&mut ops, &self.weights, features, &positions);
        for (layer, (k, v)) in layers.iter().enumerate() {
            let mut from = 0u32;
            for (kv, rows) in into.iter_mut() {
                let own: Vec<u32> = (from..from + *rows as u32).collect();
                from += *rows as u32;
                let part = |x: &Arc<Rows<K::Buf>>| match own.len() == x.rows {
                    true => Arc::clone(x),
                    false => ops.gather(x, &own),
                };
                kernels.kv_write(&mut kv.layers[layer], kv.len, *rows, &part(k).buf, &part(v).buf);
            }
        }
        for (kv, rows) in into {
            kv.len += *rows;
        }
    }

    /// Runs a block behind the context of each sequence: embeddings of the slots, equally many for each, to inputs of the
    /// head `[sequences * Bk, H]`. What it leaves in the caches is dropped.
    pub fn run(
        &self,
        kernels: &K,
        embedded: Arc<Rows<K::Buf>>,
        kvs: &mut [&mut DraftKv<K>],
    ) -> Arc<Rows<K::Buf>> {
        let config = &self.network.config;
        let size = (embedded.rows / kvs.len().max(1)) as u32;
        let mut ops = Infer::new(kernels);
        let positions: Vec<u32> = kvs
            .iter()
            .flat_map(|kv| (0..size).map(|j| (kv.len as u32 + j).saturating_add_signed(self.rope_gap)))
            .collect();
        let parents = (0..size).map(|row| row.checked_sub(1)).collect();
        let mut attend = BlockCaches { config, kvs, parents, layer: 0 };
        let output = self.network.block(&mut ops, &self.weights, embedded, &positions, &mut attend);
        for kv in kvs.iter_mut() {
            let len = kv.len;
            kv.rollback_to(kernels, len);
        }
        output
    }

    /// Tokens of a block: the last token of the text, and mask tokens.
    pub fn block_tokens(&self, last: u32) -> Vec<u32> {
        let config = &self.network.config;
        std::iter::once(last)
            .chain(std::iter::repeat_n(config.mask_token_id, config.block_size - 1))
            .collect()
    }
}

impl<K: Kernels> DraftNetwork<K> for BlockDraft<K> {
    fn config(&self) -> DraftConfig {
        DraftConfig::Block(self.network.config.clone())
    }

    fn vocab_map(&self) -> Option<&VocabMap> {
        Some(&self.vocab_map).filter(|map| !map.is_identity())
    }

    fn kv_bytes_per_token(&self) -> usize {
        let (config, shape) = (&self.network.config, &self.network.config.layer);
        2 * config.sliding.len() * shape.kv_width() * self.kv_dtype.bytes()
    }

    /// The head is the target's, so what is answered is its input at the slot, and beside it what a Markov head adds to the
    /// logits before its last layer. The block ends at the slot that is asked for.
    fn answer(&self, kernels: &K, question: DraftQuestion<'_>) -> DraftAnswer {
        let config = &self.network.config;
        let DraftQuestion { token_ids, features, depth, embed } = question;
        let slots = features.len() / config.features_width();
        let mut ops = Infer::new(kernels);
        let mut kv = self.new_kv(kernels);
        let features = ops.input(features, config.features_width()); // [N, K H]
        self.take_in(kernels, &features, &mut [(&mut kv, slots)]);
        let mut fed = token_ids[..slots].to_vec();
        fed.extend(std::iter::repeat_n(config.mask_token_id, depth));
        let embeddings = embed(0, &fed); // [N + depth, H]
        let width = config.layer.hidden_size;
        let embedded = ops.input(&embeddings[(slots - 1) * width..], width); // [1 + depth, H]
        let output = self.run(kernels, embedded, &mut [&mut kv]); // [1 + depth, H]
        let last = ops.gather(&output, &[depth as u32]);
        let hidden = ops.values(&last);
        let mut logits = hidden.clone();
        if let Some(w) = &self.weights.markov {
            let (mut state, mut correction) = (None, None);
            for (j, token) in fed[slots - 1..].iter().enumerate() {
                let z = ops.gather(&output, &[j as u32]);
                let before = self.network.before(&mut ops, w, &[*token]);
                let (found, next) = self.network.correction(&mut ops, w, &z, &before, state);
                (state, correction) = (next, Some(found));
            }
            logits.extend(correction.map_or(Vec::new(), |c| ops.values(&c)));
        }
        DraftAnswer { token_ids: fed, embeddings, hidden, logits }
    }
    fn proposer(self: Box<Self>) -> Proposer<K> {
        Proposer::Pass(self)
    }
}

impl<K: Kernels> PassNetwork<K> for BlockDraft<K> {
    fn levels(&self) -> usize {
        self.network.config.proposals()
    }

    fn new_kv(&self, kernels: &K) -> DraftKv<K> {
        BlockDraft::new_kv(self, kernels)
    }

    fn take_in(&self, kernels: &K, features: &Shared<K>, part: PassPart<'_, K>) {
        BlockDraft::take_in(self, kernels, features, &mut [(part.kv, part.next_tokens.len())]);
    }

    fn pass(
        &self,
        kernels: &K,
        features: &Shared<K>,
        parts: &mut [PassPart<'_, K>],
        embed: &mut dyn FnMut(&[u32]) -> Shared<K>,
    ) -> Shared<K> {
        let mut into: Vec<(&mut DraftKv<K>, usize)> = Vec::new();
        let mut block_tokens = Vec::new();
        for PassPart { kv, next_tokens } in parts {
            block_tokens.extend(self.block_tokens(*next_tokens.last().expect("something was seen")));
            into.push((&mut **kv, next_tokens.len()));
        }
        BlockDraft::take_in(self, kernels, features, &mut into);
        let embedded = embed(&block_tokens);
        let mut kvs: Vec<&mut DraftKv<K>> = into.into_iter().map(|(kv, _)| kv).collect();
        let output = self.run(kernels, embedded, &mut kvs); // [n Bk, H]
        let config = &self.network.config;
        if config.first_proposal() == 0 {
            return output;
        }
        let size = config.block_size as u32;
        let rows: Vec<u32> = (0..kvs.len() as u32)
            .flat_map(|n| (config.first_proposal() as u32..size).map(move |slot| n * size + slot))
            .collect();
        Infer::new(kernels).gather(&output, &rows)
    }

    fn short_window(&self) -> Option<[usize; 2]> {
        let config = &self.network.config;
        let window = config.sliding_window.filter(|window| *window < config.block_size)?;
        Some([window, config.block_size])
    }

    fn corrects(&self) -> bool {
        self.weights.markov.is_some()
    }

    fn correct(&self, kernels: &K, levels: Correction<'_, K>) -> Option<Corrected<K>> {
        let w = self.weights.markov.as_ref()?;
        let mut ops = Infer::new(kernels);
        let Correction { output, logits, tokens, state, confident } = levels;
        let before = self.network.before(&mut ops, w, tokens);
        let (correction, state) = self.network.correction(&mut ops, w, &output, &before, state);
        let added = ops.linear(&correction, &w.w2, None);
        let sum = ops.add(logits, &added);
        let logits = ops.values(&sum);
        let head = self.weights.confidence.as_ref().filter(|_| confident);
        let confidence = head.map(|head| {
            let confidence = self.network.confidence(&mut ops, head, &output, Some(&before));
            ops.values(&confidence)
        });
        Some(Corrected { logits, state, confidence })
    }

    fn confidence(&self, kernels: &K, output: &Shared<K>) -> Option<Vec<f32>> {
        let head = self.weights.confidence.as_ref()?;
        let mut ops = Infer::new(kernels);
        let logits = self.network.confidence(&mut ops, head, output, None);
        Some(ops.values(&logits))
    }
}
