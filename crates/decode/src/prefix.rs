//! Caches of finished sequences, kept for requests that begin with the same tokens: the next turn of a dialogue, the
//! same instructions again. A row of the cache depends on its own prefix alone, so reuse changes no bit.
//!
//! Beside the target's keys and values stands what the draft knows of the same text, so that a request with a draft
//! begins where one without would, but for one position: what the draft computes for a position needs the token behind
//! it, so the last shared position is read anew.

use draftsmith_kernels::Kernels;
use draftsmith_model::TargetKv;

use crate::drafter::{Drafter, DrafterSession};

/// Tokens from which reuse is worth looking for.
const SHORTEST: usize = 16;

/// A draft's part of a sequence.
type DraftPart<K> = Box<dyn DrafterSession<K>>;

struct Kept<K: Kernels> {
    /// The tokens in the cache.
    tokens: Vec<u32>,
    kv: TargetKv<K>,
    draft: Option<DraftPart<K>>,
}

/// Kept caches, oldest first.
pub(crate) struct Prefixes<K: Kernels> {
    /// Tokens kept at most, over all caches.
    limit: usize,
    /// Bytes of a token in the target's cache: by these, what a draft holds counts as tokens.
    token_bytes: usize,
    kept: Vec<Kept<K>>,
}

impl<K: Kernels> Kept<K> {
    /// What it takes, in tokens.
    fn size(&self, token_bytes: usize) -> usize {
        let draft = self.draft.as_ref().map_or(0, |draft| draft.held_bytes());
        self.tokens.len() + draft.div_ceil(token_bytes.max(1))
    }
}

impl<K: Kernels> Prefixes<K> {
    pub(crate) fn new(limit: usize, token_bytes: usize) -> Prefixes<K> {
        Prefixes { limit, token_bytes, kept: Vec::new() }
    }

    /// True if it keeps anything at all.
    pub(crate) fn is_on(&self) -> bool {
        self.limit > 0
    }

    /// Changes how much is kept; the oldest make room.
    pub(crate) fn limit(&mut self, tokens: usize) {
        self.limit = tokens;
        self.make_room();
    }

    /// Forgets what drafts know: another one takes their place.
    pub(crate) fn drop_drafts(&mut self) {
        self.kept.iter_mut().for_each(|kept| kept.draft = None);
    }

    /// Hands out the cache that shares the longest usable beginning with a prompt, cut to it. The last token of the
    /// prompt is never in it: its row is what the first answer token comes from. With a drafter, its part comes along.
    pub(crate) fn take(
        &mut self,
        prompt: &[u32],
        drafter: Option<&dyn Drafter<K>>,
    ) -> Option<(TargetKv<K>, Option<DraftPart<K>>)> {
        let usable = &prompt[..prompt.len().saturating_sub(1)];
        let shared = |kept: &Kept<K>| {
            let shared = kept.tokens.iter().zip(usable).take_while(|(a, b)| a == b).count();
            match (drafter, &kept.draft) {
                (None, _) => shared,
                (Some(_), Some(draft)) => shared.saturating_sub(1).min(draft.positions()),
                (Some(_), None) => 0,
            }
        };
        let (length, at) = self
            .kept
            .iter()
            .enumerate()
            .map(|(i, k)| (shared(k), i))
            .max()
            .filter(|(l, _)| *l >= SHORTEST)?;
        let Kept { mut kv, draft, .. } = self.kept.remove(at);
        kv.rollback_to(length);
        let draft = drafter.zip(draft).map(|(drafter, mut draft)| {
            drafter.rollback_to(draft.as_mut(), length);
            draft
        });
        Some((kv, draft))
    }

    /// Keeps a finished sequence's cache, which holds the first `kv.len()` of `tokens`, and what its draft knows; the
    /// oldest make room.
    pub(crate) fn keep(
        &mut self,
        mut tokens: Vec<u32>,
        kv: TargetKv<K>,
        drafted: Option<(&dyn Drafter<K>, DraftPart<K>)>,
    ) {
        tokens.truncate(kv.len());
        if tokens.len() < SHORTEST || tokens.len() > self.limit {
            return;
        }
        let draft = drafted.map(|(drafter, mut draft)| {
            let seen = draft.positions().min(tokens.len());
            drafter.rollback_to(draft.as_mut(), seen);
            draft
        });
        self.kept.push(Kept { tokens, kv, draft });
        self.make_room();
    }

    fn make_room(&mut self) {
        let mut total: usize = self.kept.iter().map(|k| k.size(self.token_bytes)).sum();
        while total > self.limit && !self.kept.is_empty() {
            total -= self.kept.remove(0).size(self.token_bytes);
        }
    }
}
