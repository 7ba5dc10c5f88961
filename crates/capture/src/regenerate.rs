//! Answers written by the target itself: on-policy data.
//!
//! Every user turn is answered in order, earlier generated answers included, as the target will see them when it
//! serves. Rows are independent and keyed by id, so a run that is cut off goes on with the rows that are missing;
//! a greedy answer, and a seeded one too, does not depend on what is decoded beside it.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use draftsmith_core::Sampling;
use draftsmith_decode::{BatchOptions, DecodeError, DraftPlan, Engine, FinishReason, GenerateOptions};
use draftsmith_kernels::Kernels;
use draftsmith_text::{ChatTemplate, Message, RenderOptions, TextError, Tokenizer};
use serde::{Deserialize, Serialize};

/// A conversation whose user turns want answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Dialogue {
    /// Key of the row.
    pub id: String,
    /// For reports.
    pub domain: String,
    /// System turn first if there is one, then the user turns; assistant turns are dropped and written anew.
    pub turns: Vec<Message>,
}

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
    /// What is odd about it.
    pub mark: Option<AnswerMark>,
}

/// A dialogue with its answers.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedDialogue {
    /// Key of the row.
    pub id: String,
    /// For reports.
    pub domain: String,
    /// All turns, answers included. It ends early after a marked answer.
    pub messages: Vec<Message>,
    /// Generated tokens in all turns.
    pub generated_tokens: usize,
    /// True if the answers are greedy.
    pub greedy: bool,
    /// The mark of the last answer, if it has one.
    pub mark: Option<AnswerMark>,
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct RegenerateOptions {
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// Temperature of sampled answers.
    pub temperature: f32,
    /// Nucleus of sampled answers.
    pub top_p: f32,
    /// Key of sampled answers.
    pub seed: u64,
    /// Share of dialogues that are answered greedily.
    pub greedy_share: f64,
    /// Dialogues answered side by side.
    pub batch_size: usize,
    /// Longest prompt and answer together.
    pub max_context: usize,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Dialogues finished in this call.
    pub dialogues: u64,
    /// Tokens generated in this call.
    pub tokens: u64,
    /// Dialogues whose prompt was too long or could not be rendered.
    pub skipped: u64,
}

/// What stops a run.
#[derive(Debug, thiserror::Error)]
pub enum RegenerateError {
    /// The engine refused a request.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The template failed on a dialogue.
    #[error("dialogue `{id}`: {source}")]
    Text {
        /// The dialogue.
        id: String,
        /// Cause.
        source: TextError,
    },
}

impl RegenerateError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            RegenerateError::Decode(e) => e.hint(),
            RegenerateError::Text { source, .. } => source.hint(),
        }
    }
}

/// Answers batches of prompts. `next` hands out (key, messages, sampling) until it returns `None`; `on_done` gets
/// each answer and may ask for more work by making `next` return something again.
pub trait Generator {
    /// Answers until `next` is empty and everything handed out is answered, or `on_done` breaks.
    ///
    /// # Errors
    /// What the source cannot do; requests already answered have been reported.
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<(usize, Vec<Message>, Sampling)>,
        on_done: &mut dyn FnMut(usize, Result<Answer, DecodeError>) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError>;
}

/// The target in this process as a [`Generator`].
pub struct EngineGenerator<'a, K: Kernels> {
    /// The engine; decodes without a draft.
    pub engine: &'a Engine<K>,
    /// The target's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The target's template.
    pub template: &'a ChatTemplate,
    /// Template variables.
    pub render: RenderOptions,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Longest prompt and answer together.
    pub max_context: usize,
    /// Prompts answered side by side.
    pub batch_size: usize,
}

impl<K: Kernels> Generator for EngineGenerator<'_, K> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<(usize, Vec<Message>, Sampling)>,
        on_done: &mut dyn FnMut(usize, Result<Answer, DecodeError>) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let mut failed: Option<RegenerateError> = None;
        let mut stopped = false;
        // `next` and `on_done` are both needed inside two closures.
        let next = std::cell::RefCell::new(next);
        let on_done = std::cell::RefCell::new(on_done);
        let prompt = |messages: &[Message]| -> Result<Vec<u32>, TextError> {
            let text = self.template.render(messages, &self.render.with_generation_prompt(true))?;
            self.tokenizer.encode(&text, false)
        };
        let stop_flag = std::cell::Cell::new(false);
        while failed.is_none() && !stopped {
            let mut handed_out = false;
            let result = self.engine.generate_batch(
                BatchOptions { batch_size: self.batch_size },
                &mut || loop {
                    if stop_flag.get() || failed.is_some() {
                        return None;
                    }
                    let (key, messages, sampling) = (next.borrow_mut())()?;
                    handed_out = true;
                    match prompt(&messages) {
                        Err(source) => {
                            failed = Some(RegenerateError::Text { id: key.to_string(), source });
                            return None;
                        }
                        Ok(ids) if ids.len() + 1 >= self.max_context => {
                            let error =
                                DecodeError::PromptTooLong { found: ids.len(), limit: self.max_context };
                            if (on_done.borrow_mut())(key, Err(error)).is_break() {
                                stop_flag.set(true);
                                return None;
                            }
                        }
                        Ok(ids) => {
                            let room = self.max_context - ids.len();
                            let options = GenerateOptions {
                                max_new_tokens: self.max_new_tokens.min(room),
                                sampling,
                                stop_ids: self.stop_ids.clone(),
                                draft: DraftPlan::None,
                            };
                            return Some((key, ids, options));
                        }
                    }
                },
                &mut |key, generation| {
                    let answer = self.judge(&generation.token_ids, generation.finish_reason);
                    let flow = (on_done.borrow_mut())(key, Ok(answer));
                    if flow.is_break() {
                        stop_flag.set(true);
                    }
                    flow
                },
            );
            result?;
            // Follow-up turns may have been queued by the last answers.
            stopped = stop_flag.get() || !handed_out;
        }
        failed.map_or(Ok(()), Err)
    }
}

impl<K: Kernels> EngineGenerator<'_, K> {
    fn judge(&self, ids: &[u32], finish: FinishReason) -> Answer {
        let body = match ids.split_last() {
            Some((last, body)) if self.stop_ids.contains(last) => body,
            _ => ids,
        };
        let text = self.tokenizer.decode(body, true);
        let mark = if text.trim().is_empty() {
            Some(AnswerMark::Empty)
        } else if ends_in_loop(body) {
            Some(AnswerMark::Loop)
        } else if finish == FinishReason::Length {
            Some(AnswerMark::Cut)
        } else {
            None
        };
        Answer { text, tokens: ids.len(), mark }
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

/// A number in `0..1` from a key, the same on every machine.
fn share_of(id: &str, seed: u64) -> f64 {
    // FNV-1a, mixed once more; only spread matters.
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ seed;
    for byte in id.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

struct Running {
    dialogue: Dialogue,
    /// Next turn of the dialogue to be taken over.
    at: usize,
    messages: Vec<Message>,
    tokens: usize,
    sampling: Sampling,
}

impl Running {
    /// Takes over turns up to and including the next user turn; false at the end.
    fn advance(&mut self) -> bool {
        while let Some(turn) = self.dialogue.turns.get(self.at) {
            self.at += 1;
            match turn.role.as_str() {
                "assistant" => {}
                "user" => {
                    self.messages.push(turn.clone());
                    return true;
                }
                _ => self.messages.push(turn.clone()),
            }
        }
        false
    }
}

/// Answers dialogues from `source` until it ends or `on_done` breaks.
///
/// A dialogue stops at a marked answer (which is kept) and is reported with the turns it has. Whether a dialogue is
/// answered greedily depends on its id and the seed alone.
///
/// # Errors
/// Template failures, and what the generator cannot do. Prompts that are too long are skipped and counted.
pub fn regenerate(
    source: &mut dyn Iterator<Item = Dialogue>,
    generator: &mut dyn Generator,
    options: &RegenerateOptions,
    on_done: &mut dyn FnMut(FinishedDialogue, Progress) -> ControlFlow<()>,
) -> Result<Progress, RegenerateError> {
    struct State<'s> {
        source: &'s mut dyn Iterator<Item = Dialogue>,
        running: Vec<Option<Running>>,
        free: Vec<usize>,
        follow_up: VecDeque<usize>,
        progress: Progress,
    }
    let state = std::cell::RefCell::new(State {
        source,
        running: Vec::new(),
        free: Vec::new(),
        follow_up: VecDeque::new(),
        progress: Progress::default(),
    });
    let mut next = || {
        let mut s = state.borrow_mut();
        if let Some(key) = s.follow_up.pop_front() {
            let running = s.running[key].as_ref()?;
            return Some((key, running.messages.clone(), running.sampling));
        }
        loop {
            let dialogue = s.source.next()?;
            let greedy =
                options.temperature <= 0.0 || share_of(&dialogue.id, options.seed) < options.greedy_share;
            let sampling = match greedy {
                true => Sampling::GREEDY,
                // The key of a row keeps its draws apart from those of other rows.
                false => Sampling {
                    temperature: options.temperature,
                    top_k: 0,
                    top_p: options.top_p,
                    seed: options.seed ^ (share_of(&dialogue.id, !options.seed) * u64::MAX as f64) as u64,
                },
            };
            let mut running = Running { dialogue, at: 0, messages: Vec::new(), tokens: 0, sampling };
            if !running.advance() {
                s.progress.skipped += 1;
                continue;
            }
            let messages = running.messages.clone();
            let key = s.free.pop().unwrap_or_else(|| {
                s.running.push(None);
                s.running.len() - 1
            });
            s.running[key] = Some(running);
            return Some((key, messages, sampling));
        }
    };
    let mut answered = |key: usize, answer: Result<Answer, DecodeError>| {
        let mut s = state.borrow_mut();
        let Some(mut running) = s.running[key].take() else { return ControlFlow::Continue(()) };
        let mark = match answer {
            Err(_) => {
                // The context is full. Turns answered so far are still a row.
                running.messages.pop();
                if running.tokens == 0 {
                    s.progress.skipped += 1;
                    s.free.push(key);
                    return ControlFlow::Continue(());
                }
                None
            }
            Ok(answer) => {
                running.messages.push(Message::new("assistant", answer.text));
                running.tokens += answer.tokens;
                s.progress.tokens += answer.tokens as u64;
                if answer.mark.is_none() && running.advance() {
                    s.running[key] = Some(running);
                    s.follow_up.push_back(key);
                    return ControlFlow::Continue(());
                }
                answer.mark
            }
        };
        s.free.push(key);
        s.progress.dialogues += 1;
        let progress = s.progress;
        drop(s);
        let done = FinishedDialogue {
            id: running.dialogue.id,
            domain: running.dialogue.domain,
            messages: running.messages,
            generated_tokens: running.tokens,
            greedy: running.sampling.is_greedy(),
            mark,
        };
        on_done(done, progress)
    };
    generator.answer(&mut next, &mut answered)?;
    let progress = state.borrow().progress;
    Ok(progress)
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

    /// Answers every prompt with the number of its turns.
    struct Counting;

    impl Generator for Counting {
        fn answer(
            &mut self,
            next: &mut dyn FnMut() -> Option<(usize, Vec<Message>, Sampling)>,
            on_done: &mut dyn FnMut(usize, Result<Answer, DecodeError>) -> ControlFlow<()>,
        ) -> Result<(), RegenerateError> {
            while let Some((key, messages, _)) = next() {
                let answer = if messages.len() > 4 {
                    Err(DecodeError::PromptTooLong { found: 9, limit: 8 })
                } else {
                    let mark = messages[0].content.contains("bad").then_some(AnswerMark::Loop);
                    Ok(Answer { text: messages.len().to_string(), tokens: 1, mark })
                };
                if on_done(key, answer).is_break() {
                    break;
                }
            }
            Ok(())
        }
    }

    fn dialogue(id: &str, turns: &[(&str, &str)]) -> Dialogue {
        let turns = turns.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        Dialogue { id: id.into(), domain: "test".into(), turns }
    }

    fn options() -> RegenerateOptions {
        RegenerateOptions {
            max_new_tokens: 8,
            temperature: 0.8,
            top_p: 0.9,
            seed: 1,
            greedy_share: 0.5,
            batch_size: 2,
            max_context: 100,
        }
    }

    #[test]
    fn turns_are_answered_in_order_and_old_answers_are_dropped() {
        let rows = vec![
            dialogue("a", &[("system", "s"), ("user", "1"), ("assistant", "old"), ("user", "2")]),
            dialogue("b", &[("user", "bad"), ("user", "never asked")]),
            dialogue("c", &[("system", "no user turn")]),
            dialogue("d", &[("user", "1"), ("user", "2"), ("user", "3, too long")]),
        ];
        let mut done = Vec::new();
        let progress = regenerate(&mut rows.into_iter(), &mut Counting, &options(), &mut |d, _| {
            done.push(d);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(progress, Progress { dialogues: 3, tokens: 5, skipped: 1 });
        done.sort_by(|a, b| a.id.cmp(&b.id));
        let texts = |d: &FinishedDialogue| d.messages.iter().map(|m| m.content.clone()).collect::<Vec<_>>();
        assert_eq!(texts(&done[0]), ["s", "1", "2", "2", "4"]);
        assert_eq!((texts(&done[1]), done[1].mark), (vec!["bad".into(), "1".into()], Some(AnswerMark::Loop)));
        assert_eq!(texts(&done[2]), ["1", "1", "2", "3"]);
    }

    #[test]
    fn the_share_of_greedy_rows_is_as_asked() {
        let greedy = (0..4000).filter(|i| share_of(&format!("row-{i}"), 3) < 0.3).count();
        assert!((1100..1300).contains(&greedy), "{greedy} of 4000");
    }
}
