//! Answers written by the target itself: on-policy data.
//!
//! Every user turn is answered in order, earlier generated answers included, as the target will see them when it
//! serves. Rows are independent and keyed by id, so a run that is cut off goes on with the rows that are missing;
//! a greedy answer, and a seeded one too, does not depend on what is decoded beside it.
//!
//! Invariants: every dialogue that is taken from the source comes out exactly once, unless the run ends before it is
//! answered. Its rows hold every generated token exactly once, each answer behind the very ids that it answers.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;

use draftsmith_core::Sampling;
use draftsmith_formats::cache::RowEncoder;
use draftsmith_text::{Message, RenderOptions};
use serde::{Deserialize, Serialize};

use crate::error::RegenerateError;
use crate::{Answer, AnswerMark, Generator, IdsFrom, Outcome, Request};

/// A conversation whose user turns want answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Dialogue {
    /// Key of the row.
    pub id: String,
    /// For reports.
    pub domain: String,
    /// System turn first if there is one, then the user turns; assistant turns are dropped and written anew.
    pub turns: Vec<Message>,
    /// What the template gets besides the turns, as in training.
    pub render: RenderOptions,
}

/// Where an answer stands in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[usize; 3]", into = "[usize; 3]")]
pub struct AnswerSpan {
    /// Index of its message.
    pub message: usize,
    /// Its first token.
    pub start: usize,
    /// Behind its last token.
    pub end: usize,
}

impl From<[usize; 3]> for AnswerSpan {
    fn from([message, start, end]: [usize; 3]) -> AnswerSpan {
        AnswerSpan { message, start, end }
    }
}

impl From<AnswerSpan> for [usize; 3] {
    fn from(span: AnswerSpan) -> [usize; 3] {
        [span.message, span.start, span.end]
    }
}

/// Prompts and answers as they were asked and written, one after the other.
///
/// Turns share a row as long as the ids of the next prompt begin with this prompt and its answer. Where they do not
/// (the template takes reasoning out of earlier turns, or the answer's text is tokenised in another way when it is read
/// again), the next turn begins a row of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweredRow {
    /// `[S]` all tokens; the last answer ends the row.
    pub ids: Vec<u32>,
    /// The answers in it, in order.
    pub answers: Vec<AnswerSpan>,
}

impl AnsweredRow {
    /// Generated tokens.
    pub fn generated_tokens(&self) -> usize {
        self.answers.iter().map(|span| span.end - span.start).sum()
    }

    /// `[S]` true for generated tokens.
    pub fn loss_mask(&self) -> Vec<bool> {
        let mut mask = vec![false; self.ids.len()];
        self.answers.iter().for_each(|span| mask[span.start..span.end].fill(true));
        mask
    }

    /// True if the answers lie in the row, in order, and the last one ends it.
    pub fn is_sound(&self) -> bool {
        let mut at = 0;
        let in_order = self.answers.iter().all(|span| {
            let fits = at <= span.start && span.start <= span.end && span.end <= self.ids.len();
            at = span.end;
            fits
        });
        in_order && !self.answers.is_empty() && at == self.ids.len()
    }

    /// The row without its last answer and what asked for it; `None` if nothing is left.
    pub fn without_last(mut self) -> Option<AnsweredRow> {
        self.answers.pop();
        self.ids.truncate(self.answers.last()?.end);
        Some(self)
    }
}

/// A dialogue with its answers.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedDialogue {
    /// Key of the row.
    pub id: String,
    /// For reports.
    pub domain: String,
    /// All turns, answers included. It ends early after a marked answer, where the context is full, or where the
    /// template refuses to go on; without any answer it is empty.
    pub messages: Vec<Message>,
    /// The same as ids.
    pub rows: Vec<AnsweredRow>,
    /// The states of each row, where the source keeps them.
    pub states: Vec<Option<RowEncoder>>,
    /// Generated tokens in all turns.
    pub generated_tokens: usize,
    /// True if the answers are greedy.
    pub greedy: bool,
    /// The token limit ended the last answer.
    pub cut: bool,
    /// The mark of the last answer, if it has one.
    pub mark: Option<AnswerMark>,
    /// Why no prompt could be made for the next turn, if that ended the dialogue.
    pub refused: Option<String>,
    /// Answers of a server that gave their text alone: their ids were made here.
    pub tokenised_here: u64,
    /// Of those, answers where the server counted other tokens: how many more than we, and how often.
    pub count_differences: BTreeMap<i64, u64>,
}

/// How answers are chosen: a share of them greedily, the others sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingMix {
    /// Temperature of sampled answers; 0 makes all of them greedy.
    pub temperature: f32,
    /// Nucleus of sampled answers.
    pub top_p: f32,
    /// Key of sampled answers.
    pub seed: u64,
    /// Share of dialogues that are answered greedily.
    pub greedy_share: f64,
}

impl SamplingMix {
    /// How the dialogue with this id is answered, wherever and beside whatever it is.
    pub fn of(&self, id: &str) -> Sampling {
        if self.temperature <= 0.0 || share_of(id, self.seed) < self.greedy_share {
            return Sampling::GREEDY;
        }
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            // The key of a row keeps its draws apart from those of other rows.
            seed: self.seed ^ (share_of(id, !self.seed) * u64::MAX as f64) as u64,
            ..Sampling::GREEDY
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Dialogues finished in this call.
    pub dialogues: u64,
    /// Tokens generated in this call.
    pub tokens: u64,
    /// Those of the dialogues that have no answer: no user turn, or a first prompt that fills the context.
    pub unanswered: u64,
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
    rows: Vec<AnsweredRow>,
    /// Of each row.
    states: Vec<Option<RowEncoder>>,
    tokens: usize,
    sampling: Sampling,
    /// Of the last answer.
    cut: bool,
    mark: Option<AnswerMark>,
    refused: Option<String>,
    tokenised_here: u64,
    count_differences: BTreeMap<i64, u64>,
}

impl Running {
    fn new(dialogue: Dialogue, sampling: Sampling) -> Running {
        Running {
            dialogue,
            at: 0,
            messages: Vec::new(),
            rows: Vec::new(),
            states: Vec::new(),
            tokens: 0,
            sampling,
            cut: false,
            mark: None,
            refused: None,
            tokenised_here: 0,
            count_differences: BTreeMap::new(),
        }
    }

    /// Takes an answer over.
    fn take(&mut self, answer: Answer) {
        if let IdsFrom::Text { counted } = answer.ids_from {
            self.tokenised_here += 1;
            if let Some(counted) = counted {
                let more = counted as i64 - answer.ids.len() as i64;
                if more != 0 {
                    *self.count_differences.entry(more).or_default() += 1;
                }
            }
        }
        let message = self.messages.len();
        self.messages.push(Message::new("assistant", answer.text));
        self.tokens += answer.ids.len();
        (self.cut, self.mark) = (answer.cut, answer.mark);
        let start = answer.prompt_ids.len();
        let mut ids = answer.prompt_ids;
        let goes_on = self.rows.last().is_some_and(|row| ids.starts_with(&row.ids));
        ids.extend(answer.ids);
        let span = AnswerSpan { message, start, end: ids.len() };
        match self.rows.last_mut().filter(|_| goes_on) {
            Some(row) => {
                row.ids = ids;
                row.answers.push(span);
                self.states.pop();
            }
            None => self.rows.push(AnsweredRow { ids, answers: vec![span] }),
        }
        self.states.push(answer.states.map(|states| *states));
    }

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

    fn request(&self, key: usize) -> Request {
        Request {
            key,
            id: self.dialogue.id.clone(),
            messages: self.messages.clone(),
            render: self.dialogue.render.clone(),
            sampling: self.sampling,
            before: self
                .rows
                .last()
                .zip(self.states.last())
                .and_then(|(row, states)| Some((row.ids.clone(), states.clone()?))),
        }
    }

    fn finish(self) -> FinishedDialogue {
        FinishedDialogue {
            id: self.dialogue.id,
            domain: self.dialogue.domain,
            messages: if self.tokens == 0 { Vec::new() } else { self.messages },
            rows: if self.tokens == 0 { Vec::new() } else { self.rows },
            states: if self.tokens == 0 { Vec::new() } else { self.states },
            generated_tokens: self.tokens,
            greedy: self.sampling.is_greedy(),
            cut: self.cut,
            mark: self.mark,
            refused: self.refused,
            tokenised_here: self.tokenised_here,
            count_differences: self.count_differences,
        }
    }
}

/// Dialogues at work, in slots that requests are named by.
struct Table<'s> {
    source: &'s mut dyn Iterator<Item = Dialogue>,
    mix: SamplingMix,
    running: Vec<Option<Running>>,
    free: Vec<usize>,
    follow_up: VecDeque<usize>,
    progress: Progress,
    on_done: &'s mut dyn FnMut(FinishedDialogue, Progress) -> ControlFlow<()>,
    stopped: bool,
}

impl Table<'_> {
    fn next(&mut self) -> Option<Request> {
        if let Some(key) = self.follow_up.pop_front() {
            return self.running[key].as_ref().map(|running| running.request(key));
        }
        while !self.stopped {
            let dialogue = self.source.next()?;
            let sampling = self.mix.of(&dialogue.id);
            let mut running = Running::new(dialogue, sampling);
            if !running.advance() {
                let _ = self.done(running);
                continue;
            }
            let key = self.free.pop().unwrap_or_else(|| {
                self.running.push(None);
                self.running.len() - 1
            });
            let request = running.request(key);
            self.running[key] = Some(running);
            return Some(request);
        }
        None
    }

    fn answered(&mut self, key: usize, outcome: Outcome) -> ControlFlow<()> {
        let Some(mut running) = self.running.get_mut(key).and_then(Option::take) else {
            return ControlFlow::Continue(());
        };
        match outcome {
            // Turns answered so far are still a row.
            Outcome::NoRoom => {
                running.messages.pop();
            }
            Outcome::Refused(why) => {
                running.messages.pop();
                running.refused = Some(why);
            }
            Outcome::Answered(answer) => {
                self.progress.tokens += answer.ids.len() as u64;
                running.take(answer);
                if running.mark.is_none() && running.advance() {
                    self.running[key] = Some(running);
                    self.follow_up.push_back(key);
                    return ControlFlow::Continue(());
                }
            }
        }
        self.free.push(key);
        self.done(running)
    }

    fn done(&mut self, running: Running) -> ControlFlow<()> {
        self.progress.dialogues += 1;
        self.progress.unanswered += u64::from(running.tokens == 0);
        let flow = (self.on_done)(running.finish(), self.progress);
        self.stopped |= flow.is_break();
        flow
    }
}

/// Answers dialogues from `source` until it ends or `on_done` breaks.
///
/// A dialogue stops at a marked answer (which is kept), at a full context, and where no prompt can be made, and is
/// reported with the turns it has. Whether a dialogue is
/// answered greedily depends on its id and the seed alone.
///
/// # Errors
/// What the generator cannot do.
pub fn regenerate(
    source: &mut dyn Iterator<Item = Dialogue>,
    generator: &mut dyn Generator,
    mix: SamplingMix,
    on_done: &mut dyn FnMut(FinishedDialogue, Progress) -> ControlFlow<()>,
) -> Result<Progress, RegenerateError> {
    let table = RefCell::new(Table {
        source,
        mix,
        running: Vec::new(),
        free: Vec::new(),
        follow_up: VecDeque::new(),
        progress: Progress::default(),
        on_done,
        stopped: false,
    });
    generator.answer(&mut || table.borrow_mut().next(), &mut |key, answer| {
        table.borrow_mut().answered(key, answer)
    })?;
    Ok(table.into_inner().progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every prompt with the number of its turns.
    struct Counting;

    impl Generator for Counting {
        fn answer(
            &mut self,
            next: &mut dyn FnMut() -> Option<Request>,
            on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
        ) -> Result<(), RegenerateError> {
            while let Some(request) = next() {
                let turns = request.messages.len();
                let mark = request.messages[0].content.contains("bad").then_some(AnswerMark::Loop);
                // Prompts are as long as they have turns; one of the second kind reads its own answers in another way.
                let again = u32::from(request.messages[0].content.contains("anew"));
                let outcome = match turns {
                    5.. => Outcome::NoRoom,
                    3 if request.messages[2].content.contains("refused") => {
                        Outcome::Refused("no third turn".into())
                    }
                    _ => Outcome::Answered(Answer {
                        text: turns.to_string(),
                        prompt_ids: (0..turns as u32)
                            .map(|i| if i % 2 == 1 { i + again } else { i })
                            .collect(),
                        ids: vec![turns as u32],
                        ids_from: IdsFrom::Text { counted: Some(1 + turns as u64 / 3) },
                        cut: false,
                        states: None,
                        mark,
                    }),
                };
                if on_done(request.key, outcome).is_break() {
                    break;
                }
            }
            Ok(())
        }
    }

    fn dialogue(id: &str, turns: &[(&str, &str)]) -> Dialogue {
        let turns = turns.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        Dialogue { id: id.into(), domain: "test".into(), turns, render: RenderOptions::default() }
    }

    fn mix() -> SamplingMix {
        SamplingMix { temperature: 0.8, top_p: 0.9, seed: 1, greedy_share: 0.5 }
    }

    #[test]
    fn turns_are_answered_in_order_and_old_answers_are_dropped() {
        let rows = vec![
            dialogue("a", &[("system", "s"), ("user", "1"), ("assistant", "old"), ("user", "2")]),
            dialogue("b", &[("user", "bad"), ("user", "never asked")]),
            dialogue("c", &[("system", "no user turn")]),
            dialogue("d", &[("user", "1"), ("user", "2"), ("user", "3, too long")]),
            dialogue("e", &[("user", "anew"), ("user", "2")]),
            dialogue("f", &[("user", "1"), ("user", "refused"), ("user", "3")]),
        ];
        let mut done = Vec::new();
        let progress = regenerate(&mut rows.into_iter(), &mut Counting, mix(), &mut |d, _| {
            done.push(d);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(progress, Progress { dialogues: 6, tokens: 8, unanswered: 1 });
        done.sort_by(|a, b| a.id.cmp(&b.id));
        let texts = |d: &FinishedDialogue| d.messages.iter().map(|m| m.content.clone()).collect::<Vec<_>>();
        assert_eq!(texts(&done[0]), ["s", "1", "2", "2", "4"]);
        assert_eq!((texts(&done[1]), done[1].mark), (vec!["bad".into(), "1".into()], Some(AnswerMark::Loop)));
        assert_eq!((texts(&done[2]), done[2].generated_tokens), (vec![], 0));
        assert_eq!(texts(&done[3]), ["1", "1", "2", "3"]);
        // Rows: the answers stand behind what was asked, every generated token once.
        for dialogue in &done {
            let sum: usize = dialogue.rows.iter().map(AnsweredRow::generated_tokens).sum();
            assert_eq!(sum, dialogue.generated_tokens, "{}", dialogue.id);
            assert!(dialogue.rows.iter().all(AnsweredRow::is_sound));
        }
        let span = |message, start, end| AnswerSpan { message, start, end };
        assert_eq!(
            done[3].rows,
            [AnsweredRow { ids: vec![0, 1, 2, 3], answers: vec![span(1, 1, 2), span(3, 3, 4)] }]
        );
        assert_eq!(
            done[4].rows,
            [
                AnsweredRow { ids: vec![0, 1], answers: vec![span(1, 1, 2)] },
                AnsweredRow { ids: vec![0, 2, 2, 3], answers: vec![span(3, 3, 4)] }
            ]
        );
        assert_eq!(
            (done[5].refused.as_deref(), texts(&done[5])),
            (Some("no third turn"), vec!["1".into(), "1".into()])
        );
        assert_eq!((done[3].tokenised_here, &done[3].count_differences), (2, &BTreeMap::from([(1, 1)])));
    }

    #[test]
    fn a_break_ends_the_run_even_among_dialogues_without_a_user_turn() {
        let rows = (0..5).map(|i| dialogue(&i.to_string(), &[("system", "no user turn")]));
        let mut done = 0;
        let progress = regenerate(&mut rows.into_iter(), &mut Counting, mix(), &mut |_, _| {
            done += 1;
            if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(progress.unwrap(), Progress { dialogues: 2, tokens: 0, unanswered: 2 });
    }

    #[test]
    fn the_share_of_greedy_rows_is_as_asked() {
        let mix = SamplingMix { seed: 3, greedy_share: 0.3, ..mix() };
        let greedy = (0..4000).filter(|i| mix.of(&format!("row-{i}")).is_greedy()).count();
        assert!((1100..1300).contains(&greedy), "{greedy} of 4000");
    }
}
