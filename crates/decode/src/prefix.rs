//! Caches of finished sequences, kept for requests that begin with the same tokens: the next turn of a dialogue, the
//! same instructions again. A row of the cache depends on its own prefix alone, so reuse changes no bit.

use draftsmith_kernels::Kernels;
use draftsmith_model::TargetKv;

/// Tokens from which reuse is worth looking for.
const SHORTEST: usize = 16;

struct Kept<K: Kernels> {
    /// The tokens in the cache.
    tokens: Vec<u32>,
    kv: TargetKv<K>,
}

/// Kept caches, oldest first.
pub(crate) struct Prefixes<K: Kernels> {
    /// Tokens kept at most, over all caches.
    limit: usize,
    kept: Vec<Kept<K>>,
}

impl<K: Kernels> Prefixes<K> {
    pub(crate) fn new(limit: usize) -> Prefixes<K> {
        Prefixes { limit, kept: Vec::new() }
    }

    /// Hands out the cache that shares the longest beginning with a prompt, cut to what it shares. The last token of
    /// the prompt is never in it: its row is what the first answer token comes from.
    pub(crate) fn take(&mut self, prompt: &[u32]) -> Option<TargetKv<K>> {
        let usable = &prompt[..prompt.len().saturating_sub(1)];
        let shared = |kept: &Kept<K>| kept.tokens.iter().zip(usable).take_while(|(a, b)| a == b).count();
        let (length, at) = self
            .kept
            .iter()
            .enumerate()
            .map(|(i, k)| (shared(k), i))
            .max()
            .filter(|(l, _)| *l >= SHORTEST)?;
        let mut kv = self.kept.remove(at).kv;
        kv.rollback_to(length);
        Some(kv)
    }

    /// Keeps a finished sequence's cache, which holds the first `kv.len()` of `tokens`; the oldest make room.
    pub(crate) fn keep(&mut self, mut tokens: Vec<u32>, kv: TargetKv<K>) {
        tokens.truncate(kv.len());
        if tokens.len() < SHORTEST || tokens.len() > self.limit {
            return;
        }
        self.kept.push(Kept { tokens, kv });
        let mut total: usize = self.kept.iter().map(|k| k.tokens.len()).sum();
        while total > self.limit {
            total -= self.kept.remove(0).tokens.len();
        }
    }
}
