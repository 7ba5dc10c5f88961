//! What a request asks for, and a batch.

use std::sync::Arc;

use draftsmith_core::{LayerId, Sampling, Shaping, VerifyRule};

use crate::drafter::DraftPlan;
use crate::grammar::Grammar;

/// One request's settings. By default greedy, without a draft, and nothing to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Changes of the logits before that.
    pub shaping: Shaping,
    /// Ids that end the answer; they are part of the output.
    pub stop_ids: Vec<u32>,
    /// How much to draft.
    pub draft: DraftPlan,
    /// Which draft tokens of a sampled answer are kept. But for [`VerifyRule::Seeded`] the draft draws a chain: an
    /// automatic plan is a chain of 5 then, and a tree is refused.
    pub verify: VerifyRule,
    /// Log-probabilities with every token: of that token, and of this many of the best ones.
    pub logprobs: Option<usize>,
    /// Log-probabilities of the prompt's own tokens, and of this many of the best ones in the place of each.
    pub prompt_logprobs: Option<usize>,
    /// What the answer must be.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// In a batch with a [`Watch`]: the states of all tokens are wanted, and the caller knows those of so many first ones. Those alone
    /// may come from a kept cache.
    pub known_states: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_new_tokens: 0,
            sampling: Sampling::GREEDY,
            shaping: Shaping::default(),
            stop_ids: Vec::new(),
            draft: DraftPlan::None,
            verify: VerifyRule::Seeded,
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
            known_states: None,
        }
    }
}

/// Hears the hidden states of every token of the requests that want them: of prompts and answers, the last token of an answer
/// included, which is read for this alone.
pub struct Watch<'w> {
    /// The captured layers, `K` of them.
    pub layers: &'w [LayerId],
    /// Called with the id of a request and states that follow those that it got before.
    pub on_states: &'w mut dyn FnMut(u64, States<'_>),
}

/// States of neighbouring tokens of a request.
#[derive(Clone, Copy, Debug)]
pub struct States<'s> {
    /// Where the first of them stands.
    pub position: usize,
    /// `[n, K * Ht]` outputs of the captured layers, before any norm; per token the layers in order.
    pub features: &'s [f32],
    /// `[n, Ht]` final states after the final norm.
    pub last: &'s [f32],
}

/// Settings of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Sequences decoded side by side.
    pub batch_size: usize,
}
