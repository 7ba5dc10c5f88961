//! The seam of regeneration: who answers prompts, and what both kinds of source share.
//!
//! Invariant: a prompt is rendered and counted here, by the target's own template and tokenizer, whoever answers it;
//! an answer is judged here too. So a row does not tell whether this process or a server wrote it.

use std::ops::ControlFlow;

use draftsmith_core::Sampling;
use draftsmith_text::{ChatTemplate, Message, RenderOptions, TextError, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::RegenerateError;

/// What is odd about an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerMark {
    /// No text.
    Empty,
    /// Ended by the token limit.
    Cut,
    /// Ends in a loop: one run of tokens at least three times in a row.
    Loop,
}

/// One generated answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text, without the stop token.
    pub text: String,
    /// Generated tokens, the stop token included.
    pub tokens: usize,
    /// The token limit ended it, not the model.
    pub cut: bool,
    /// What is odd about it.
    pub mark: Option<AnswerMark>,
}

/// A prompt that wants an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Names the request when it is answered.
    pub key: usize,
    /// The conversation it belongs to, for messages.
    pub id: String,
    /// The turns so far; the last one is the user's.
    pub messages: Vec<Message>,
    /// What the template gets besides.
    pub render: RenderOptions,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Answers prompts: the target in this process, or a server.
pub trait Generator {
    /// Answers until `next` is empty and everything handed out is answered, or `on_done` breaks. `next` may give
    /// something again after an answer. `on_done` gets the key of a request and its answer, or `None` if its prompt
    /// leaves no room in the context.
    ///
    /// # Errors
    /// What the source cannot do; requests already answered have been reported.
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Option<Answer>) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError>;
}

/// A rendered prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// As the template writes it.
    pub text: String,
    /// `[S]` its tokens.
    pub ids: Vec<u32>,
    /// Longest answer that fits.
    pub max_new_tokens: usize,
}

/// Renders prompts and judges answers, for every kind of source.
#[derive(Clone, Debug)]
pub struct Prompter<'a> {
    /// The target's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The target's template.
    pub template: &'a ChatTemplate,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Longest prompt and answer together.
    pub max_context: usize,
}

impl Prompter<'_> {
    /// The prompt of a request; `None` if it leaves no room for an answer.
    pub(crate) fn prompt(&self, request: &Request) -> Result<Option<Prompt>, RegenerateError> {
        let render = || -> Result<(String, Vec<u32>), TextError> {
            let text =
                self.template.render(&request.messages, &request.render.with_generation_prompt(true))?;
            let ids = self.tokenizer.encode(&text, false)?;
            Ok((text, ids))
        };
        let (text, ids) =
            render().map_err(|source| RegenerateError::Text { id: request.id.clone(), source })?;
        if ids.len() + 1 >= self.max_context {
            return Ok(None);
        }
        let max_new_tokens = self.max_new_tokens.min(self.max_context - ids.len());
        Ok(Some(Prompt { text, ids, max_new_tokens }))
    }

    /// An answer of `body` tokens, which read as `text`; `cut` if the token limit ended it, else a stop token did.
    pub(crate) fn judge(&self, text: String, body: &[u32], cut: bool) -> Answer {
        let mark = if text.trim().is_empty() {
            Some(AnswerMark::Empty)
        } else if ends_in_loop(body) {
            Some(AnswerMark::Loop)
        } else if cut {
            Some(AnswerMark::Cut)
        } else {
            None
        };
        Answer { text, tokens: body.len() + usize::from(!cut), cut, mark }
    }
}

/// True if the tail is one run of 1 to 64 tokens at least three times in a row and 24 tokens long in all.
fn ends_in_loop(ids: &[u32]) -> bool {
    (1..=64).any(|period| {
        let tail = (3 * period).max(24);
        ids.len() >= tail && {
            let tail = &ids[ids.len() - tail..];
            tail.iter().zip(&tail[period..]).all(|(a, b)| a == b)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_found_and_ordinary_text_is_not() {
        let text: Vec<u32> = (0..200).map(|i| i * i % 97).collect();
        assert!(!ends_in_loop(&text));
        for period in [1usize, 3, 10, 64] {
            let mut looping = text.clone();
            let tail: Vec<u32> =
                (0..period as u32).map(|i| 500 + i).cycle().take((4 * period).max(30)).collect();
            looping.extend(tail);
            assert!(ends_in_loop(&looping), "period {period}");
        }
        assert!(!ends_in_loop(&[7; 10]), "ten equal tokens are not yet a loop");
    }
}
