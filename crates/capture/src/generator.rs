//! The seam of regeneration: who answers prompts, and what both kinds of source share.
//!
//! Invariant: a prompt is rendered and counted here, by the target's own template and tokenizer, whoever answers it;
//! an answer is judged here too. So a row does not tell whether this process or a server wrote it. An answer comes with
//! the ids that were asked and those that were written: rows are made of them, and nothing is rendered or tokenised a
//! second time.

use std::ops::ControlFlow;

use draftsmith_core::Sampling;
use draftsmith_formats::cache::RowEncoder;
use draftsmith_text::{ChatTemplate, Message, RenderOptions, TextError, Tokenizer, is_reasoning_mark};
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

/// Where the ids of an answer come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdsFrom {
    /// The model: they are what it wrote.
    #[default]
    Model,
    /// The text of a server that gives no ids, tokenised here by itself.
    Text {
        /// Tokens that the server counted, if it counts.
        counted: Option<u64>,
    },
}

/// One generated answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text for the next turn, as a chat client would send it back: without the stop token and control tokens, but
    /// with reasoning and its marks. What of that the next turns see is the template's decision.
    pub text: String,
    /// `[P]` the prompt as it was asked.
    pub prompt_ids: Vec<u32>,
    /// `[S]` all generated tokens, the stop token included if the model wrote one.
    pub ids: Vec<u32>,
    /// Where they come from.
    pub ids_from: IdsFrom,
    /// The token limit ended it, not the model.
    pub cut: bool,
    /// What is odd about it.
    pub mark: Option<AnswerMark>,
    /// The states of prompt and answer, if the source keeps them.
    pub states: Option<Box<RowEncoder>>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With an answer.
    Answered(Answer),
    /// The prompt leaves no room in the context.
    NoRoom,
    /// The prompt cannot be made: what the template or the tokenizer said.
    Refused(String),
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
    /// `[S]` ids of what the conversation said so far and their states, where a source kept them: those of the same beginning need
    /// not be computed again.
    pub before: Option<(Vec<u32>, RowEncoder)>,
}

/// Answers prompts: the target in this process, or a server.
pub trait Generator {
    /// Answers until `next` is empty and everything handed out is answered, or `on_done` breaks. `next` may give
    /// something again after an answer. `on_done` gets the key of a request and how it ended.
    ///
    /// # Errors
    /// What the source cannot do; requests already answered have been reported.
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
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
    /// The prompt of a request, or how it ends without one.
    pub(crate) fn prompt(&self, request: &Request) -> Result<Prompt, Outcome> {
        let refused = |e: TextError| Outcome::Refused(e.to_string());
        let text = self.text(&request.messages, &request.render).map_err(refused)?;
        let ids = self.tokenizer.encode(&text, false).map_err(refused)?;
        if ids.len() + 1 >= self.max_context {
            return Err(Outcome::NoRoom);
        }
        let max_new_tokens = self.max_new_tokens.min(self.max_context - ids.len());
        Ok(Prompt { text, ids, max_new_tokens })
    }

    /// A prompt as the template writes it: the turns and the generation prompt.
    ///
    /// # Errors
    /// Those of the template; [`TextError::DoubleBos`].
    pub fn text(&self, messages: &[Message], render: &RenderOptions) -> Result<String, TextError> {
        let text = self.template.render(messages, &render.with_generation_prompt(true))?;
        if let Some(bos) = self.tokenizer.bos_id()
            && let Ok(piece) = std::str::from_utf8(self.tokenizer.token_to_piece(bos))
            && !piece.is_empty()
            && text.strip_prefix(piece).is_some_and(|rest| rest.starts_with(piece))
        {
            return Err(TextError::DoubleBos { bos });
        }
        Ok(text)
    }

    /// Judges an answer. `ids` are all generated tokens; `cut` if the token limit ended it, else a stop token did.
    pub(crate) fn judge(&self, prompt_ids: Vec<u32>, ids: Vec<u32>, ids_from: IdsFrom, cut: bool) -> Answer {
        let body = match ids.split_last() {
            Some((last, body)) if self.tokenizer.eos_ids().contains(last) => body,
            _ => &ids,
        };
        let text = self.answer_text(body);
        let mark = if text.trim().is_empty() {
            Some(AnswerMark::Empty)
        } else if ends_in_loop(body) {
            Some(AnswerMark::Loop)
        } else if cut {
            Some(AnswerMark::Cut)
        } else {
            None
        };
        Answer { text, prompt_ids, ids, ids_from, cut, mark, states: None }
    }

    /// The text of an answer's tokens: control tokens are left out, as servers do, but marks of reasoning are not:
    /// templates cut at them.
    fn answer_text(&self, body: &[u32]) -> String {
        let shown = |id: &u32| {
            !self.tokenizer.is_special(*id) || is_reasoning_mark(self.tokenizer.token_to_piece(*id))
        };
        let shown: Vec<u32> = body.iter().copied().filter(shown).collect();
        self.tokenizer.decode(&shown, false)
    }

    /// The token that ends a turn: the stop token that the template writes behind an answer, else the first one.
    pub(crate) fn stop_id(&self) -> Option<u32> {
        let eos = self.tokenizer.eos_ids();
        let turns = [Message::new("user", "a"), Message::new("assistant", "b")];
        let ids = self
            .template
            .render(&turns, &RenderOptions::default())
            .ok()
            .and_then(|text| self.tokenizer.encode(text.get(text.rfind('b')?..)?, false).ok());
        ids.and_then(|ids| ids.into_iter().find(|id| eos.contains(id))).or(eos.first().copied())
    }
}

/// True if the tail is one run of 1 to 64 tokens at least three times in a row and 24 tokens long in all.
pub fn ends_in_loop(ids: &[u32]) -> bool {
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
