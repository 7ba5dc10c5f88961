//! Learning from rejections: positions where the draft's own proposal is rejected are trained on again [draft_opd].
//!
//! Ordinary training counts every slot behind every position alike, whether decoding would get there or not. Here the
//! draft, as it stands, proposes over rows that it has just been trained on, from their captured states, and the rows are
//! walked as decoding walks them: a proposal, what the target takes of it, the target's own token, the next proposal. The
//! place where a proposal ends is kept, and for a while these places make up a share of every step's loss.
//!
//! Up to the first rejection the draft's own tokens are the row's, so the states that it decoded from are those that the row
//! was captured with, and the target's distribution there is known: no pass of the target is needed. What a draft proposes
//! behind a rejected token is never verified, in a chain or in a tree, so there is nothing to learn from it.
//!
//! A token is rejected if it is not the target's most likely one. Where the row was sampled and goes on with another token,
//! the proposal ends without a verdict: were such places trained on because the text left the draft, the draft would learn
//! the rare tokens that were drawn there instead of the distribution that they were drawn from.
//!
//! What is kept is part of the checkpoint, and what is drawn from it is a function of seed and step, so a resumed run equals
//! an uninterrupted one bit for bit.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use draftsmith_core::{DraftTokenId, TargetTokenId, VocabMap};
use draftsmith_formats::run::ReplayTable;
use serde::Serialize;

use crate::{BatchStats, Collective, Method, Pack, PackShape, Rng, RowStore, TrainError};

/// Names the random stream.
const STREAM: u64 = 0x7265_706c_6179;

/// Settings of the replay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplayOptions {
    /// Share of a step's loss that rejected positions make up, above 0 and below 1.
    pub share: f64,
    /// Slots of the rows that a step replays at most; one row is always taken.
    pub tokens: usize,
    /// Steps between looks at what the draft proposes.
    pub every: u64,
    /// Rows whose rejected positions are kept; the oldest go first.
    pub buffer: usize,
}

impl ReplayOptions {
    /// The settings of a run file; `None` if nothing is replayed.
    pub fn from_table(table: &ReplayTable) -> Option<ReplayOptions> {
        (table.share > 0.0).then_some(ReplayOptions {
            share: table.share,
            tokens: table.tokens as usize,
            every: table.every,
            buffer: table.buffer as usize,
        })
    }
}

/// How a proposal ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By its length or that of the answer, or where the row goes on with another token than the target's most likely one.
    Open,
    /// With a token that the target rejects.
    Rejected,
    /// With a token that the target rejects for one that the draft cannot propose.
    Unreachable,
}

/// What becomes of the proposal behind a token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// Slot of the pack that holds the last committed token.
    pub anchor: u32,
    /// Tokens of the proposal that the target takes.
    pub accepted: u32,
    /// What follows them.
    pub end: End,
}

/// A rejected token: the first one of a proposal that the target does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejected {
    /// Slot that holds the last committed token: of the pack, or of the row where a row is meant.
    pub anchor: u32,
    /// Tokens of the proposal before it.
    pub depth: u32,
}

/// A kind of draft that can learn from its rejections.
pub trait Replays {
    /// What becomes of the proposals behind all trained tokens of a pack, by ascending anchor.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    fn propose(&mut self, pack: &Pack) -> Result<Vec<Proposed>, TrainError>;

    /// Adds the gradients of rejected positions alone. Their factors add up to `coefficients`
    /// ([`BatchStats::coefficients`]).
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    fn replay(
        &mut self,
        pack: &Pack,
        rejected: &[Rejected],
        coefficients: f64,
    ) -> Result<BatchStats, TrainError>;
}

/// Proposals behind all tokens of a pack, followed slot by slot.
pub(crate) struct Chains<'a> {
    pack: &'a Pack,
    vocab_map: &'a VocabMap,
    /// `[S]` the target's most likely token in the place of each slot's own, where that is known and to be proposed.
    choices: &'a [Option<u32>],
    limit: u32,
    depth: u32,
    live: Vec<u32>,
    done: Vec<Proposed>,
}

impl<'a> Chains<'a> {
    /// Proposals of at most `limit` tokens. The first slot of a document has no choice.
    pub(crate) fn new(
        pack: &'a Pack,
        vocab_map: &'a VocabMap,
        choices: &'a [Option<u32>],
        limit: usize,
    ) -> Chains<'a> {
        let known = |p: usize| choices.get(p).copied().flatten().is_some();
        let anchors = 0..pack.len() as u32;
        let live = anchors.filter(|a| pack.loss_mask[*a as usize] && known(*a as usize + 1)).collect();
        Chains { pack, vocab_map, choices, limit: limit as u32, depth: 0, live, done: Vec::new() }
    }

    /// Anchors of the proposals that go on, ascending.
    pub(crate) fn live(&self) -> &[u32] {
        &self.live
    }

    /// Takes the next token of every proposal that goes on.
    pub(crate) fn judge(&mut self, tops: &[u32]) {
        assert_eq!(tops.len(), self.live.len(), "one token for each proposal");
        let depth = self.depth;
        self.depth += 1;
        let mut live = Vec::new();
        for (anchor, top) in self.live.iter().zip(tops) {
            let at = (anchor + 1 + depth) as usize;
            let choice = self.choices[at].expect("proposals end before");
            let taken = self.vocab_map.to_target(DraftTokenId(*top)) == TargetTokenId(choice);
            let follows = taken && self.pack.ids[at] == choice;
            let next = self.choices.get(at + 1).copied().flatten();
            if follows && self.depth < self.limit && next.is_some() {
                live.push(*anchor);
                continue;
            }
            let end = match taken {
                true => End::Open,
                false if self.vocab_map.to_draft(TargetTokenId(choice)).is_some() => End::Rejected,
                false => End::Unreachable,
            };
            self.done.push(Proposed { anchor: *anchor, accepted: depth + u32::from(follows), end });
        }
        self.live = live;
    }

    /// All proposals by anchor.
    pub(crate) fn finish(mut self) -> Vec<Proposed> {
        self.done.sort_unstable_by_key(|p| p.anchor);
        self.done
    }
}

/// Of all proposals those that decoding makes: each begins at the target's own token behind the one before.
pub fn walk(pack: &Pack, proposed: &[Proposed]) -> Vec<Proposed> {
    let mut at = vec![None; pack.len()];
    for p in proposed {
        at[p.anchor as usize] = Some(*p);
    }
    let mut steps = Vec::new();
    for doc in &pack.docs {
        let mut slot = doc.start as usize;
        while slot < doc.end() {
            slot += match at[slot] {
                Some(p) => {
                    steps.push(p);
                    p.accepted as usize + 1
                }
                None => 1,
            };
        }
    }
    steps
}

/// What the replay has done so far in this process.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReplayReport {
    /// Seconds spent.
    pub seconds: f64,
    /// Mean loss of this step's replayed positions; `None` if there were none.
    pub loss: Option<f64>,
    /// Replayed positions of this step.
    pub positions: u64,
    /// Slots of the rows that they are in.
    pub slots: u64,
    /// Rows that are kept.
    pub buffered_rows: usize,
    /// Tokens per verify step that the last look comes to, on rows that were trained on. Not a measured accept length.
    pub sim_accept_len: Option<f64>,
    /// Per slot of a proposal: how many of the proposals that got there were rejected there, in the last look.
    pub rejected: Vec<Option<f64>>,
}

/// Rejected positions of a row.
#[derive(Clone, Debug, PartialEq)]
struct Kept {
    row: u64,
    /// Slots are those of the row.
    rejected: Vec<Rejected>,
}

/// What a look at one micro-batch finds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Look {
    /// Proposals that decoding makes.
    steps: u64,
    /// Tokens that they commit.
    tokens: u64,
    /// Per slot of a proposal: proposals that got there, and those that were rejected there.
    counts: Vec<(u64, u64)>,
    /// By row of the pack; rows without rejected positions too.
    found: Vec<Kept>,
}

impl Look {
    fn new(pack: &Pack, proposed: &[Proposed]) -> Look {
        let mut look = Look::default();
        look.found.extend(pack.rows.iter().map(|row| Kept { row: *row, rejected: Vec::new() }));
        let mut doc = 0;
        for p in walk(pack, proposed) {
            while pack.docs[doc].end() <= p.anchor as usize {
                doc += 1;
            }
            look.steps += 1;
            look.tokens += u64::from(p.accepted) + 1;
            let judged = p.accepted as usize + usize::from(p.end != End::Open);
            look.counts.resize(look.counts.len().max(judged), (0, 0));
            look.counts[..judged].iter_mut().for_each(|c| c.0 += 1);
            if p.end != End::Open {
                look.counts[judged - 1].1 += 1;
            }
            if p.end == End::Rejected {
                let anchor = p.anchor - pack.docs[doc].start;
                look.found[doc].rejected.push(Rejected { anchor, depth: p.accepted });
            }
        }
        look
    }

    /// As numbers for other processes, behind that of the micro-batch.
    fn write(&self, number: usize, to: &mut Vec<u64>) {
        to.extend([number as u64, self.steps, self.tokens, self.counts.len() as u64]);
        to.extend(self.counts.iter().flat_map(|(got, rejected)| [*got, *rejected]));
        to.push(self.found.len() as u64);
        for kept in &self.found {
            to.extend([kept.row, kept.rejected.len() as u64]);
            to.extend(kept.rejected.iter().flat_map(|r| [u64::from(r.anchor), u64::from(r.depth)]));
        }
    }

    /// Takes back what [`Look::write`] gave, without the number.
    fn read(values: &mut dyn Iterator<Item = u64>) -> Look {
        let mut next = || values.next().expect("as many numbers as were written");
        let (steps, tokens) = (next(), next());
        let counts = (0..next()).map(|_| (next(), next())).collect();
        let mut found = Vec::new();
        for _ in 0..next() {
            let row = next();
            let rejected =
                (0..next()).map(|_| Rejected { anchor: next() as u32, depth: next() as u32 }).collect();
            found.push(Kept { row, rejected });
        }
        Look { steps, tokens, counts, found }
    }
}

/// Rows with rejected positions, and when they are looked for and trained on.
pub(crate) struct Replay {
    options: ReplayOptions,
    seed: u64,
    pack_slots: usize,
    /// Oldest first.
    kept: VecDeque<Kept>,
    report: ReplayReport,
    spent: Duration,
}

impl Replay {
    pub(crate) fn new(options: ReplayOptions, seed: u64, pack_slots: usize) -> Replay {
        let report = ReplayReport::default();
        Replay { options, seed, pack_slots, kept: VecDeque::new(), report, spent: Duration::ZERO }
    }

    /// The rows that a step trains on again, as places in what is kept.
    fn draw(&self, step: u64, slots_of: impl Fn(u64) -> usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.kept.len()).collect();
        Rng::new(self.seed, &[STREAM, step]).shuffle(&mut order);
        let mut filled = 0;
        let taken = order.iter().take_while(|place| {
            let first = filled == 0;
            filled += slots_of(self.kept[**place].row);
            first || filled <= self.options.tokens
        });
        taken.copied().collect()
    }

    /// Adds the gradients of a step's share to those of its rows, which had losses with these factors. The optimiser then
    /// divides by as much more as is returned.
    pub(crate) fn train<M: Method + ?Sized>(
        &mut self,
        method: &mut M,
        store: &mut dyn RowStore,
        (step, pass): (u64, u64),
        stats: &BatchStats,
    ) -> Result<f64, TrainError> {
        let began = Instant::now();
        (self.report.loss, self.report.positions, self.report.slots) = (None, 0, 0);
        let most = self.pack_slots;
        let drawn = self.draw(step, |row| store.row_slots(row as usize).min(most));
        // A step without a loss of its own has nothing that a share could be of.
        if drawn.is_empty() || stats.coefficients <= 0.0 {
            return Ok(1.0);
        }
        let numbers: Vec<usize> = drawn.iter().map(|place| self.kept[*place].row as usize).collect();
        let (feature_width, last_width) = (method.feature_width(), method.last_width());
        let mut pack = Pack { pass, ..Pack::default() };
        store.fill(&numbers, PackShape { row_slots: most, feature_width, last_width }, &mut pack)?;
        let mut rejected = Vec::new();
        for (place, doc) in drawn.iter().zip(&pack.docs) {
            let (kept, start) = (&self.kept[*place], doc.start);
            rejected.extend(kept.rejected.iter().map(|r| Rejected { anchor: start + r.anchor, ..*r }));
        }
        rejected.sort_unstable();
        let share = self.options.share;
        let coefficients = stats.coefficients * share / (1.0 - share);
        let found = replays(method)?.replay(&pack, &rejected, coefficients)?;
        self.report.loss = (found.coefficients > 0.0).then(|| found.loss / found.coefficients);
        self.report.positions = rejected.len() as u64;
        self.report.slots = pack.len() as u64;
        self.spent += began.elapsed();
        // Rows whose positions have no loss leave the step as it is.
        Ok(1.0 + found.coefficients / stats.coefficients)
    }

    /// After a step: looks, if it is time, at what the draft proposes over the rows of that step. Each process looks at its
    /// own micro-batches, which come with their numbers; all keep what all have found, in the order of the micro-batches.
    pub(crate) fn look<M: Method + ?Sized>(
        &mut self,
        method: &mut M,
        packs: &[(usize, Pack)],
        step: u64,
        collective: &dyn Collective,
    ) -> Result<(), TrainError> {
        if !self.is_due(step) {
            return Ok(());
        }
        let began = Instant::now();
        let mut mine = Vec::new();
        for (number, pack) in packs {
            let look = Look::new(pack, &replays(method)?.propose(pack)?);
            look.write(*number, &mut mine);
        }
        let bytes = mine.into_iter().flat_map(u64::to_le_bytes).collect();
        let mut looks: Vec<(usize, Look)> = Vec::new();
        for said in collective.gather(bytes) {
            let value = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("chunks of eight bytes"));
            let mut values = said.chunks_exact(8).map(value);
            while let Some(number) = values.next() {
                looks.push((number as usize, Look::read(&mut values)));
            }
        }
        looks.sort_by_key(|(number, _)| *number);
        let (mut steps, mut tokens) = (0u64, 0u64);
        // Per slot of a proposal: proposals that got there, and those that were rejected there.
        let mut counts: Vec<(u64, u64)> = Vec::new();
        for (_, look) in looks {
            steps += look.steps;
            tokens += look.tokens;
            counts.resize(counts.len().max(look.counts.len()), (0, 0));
            counts.iter_mut().zip(&look.counts).for_each(|(sum, c)| *sum = (sum.0 + c.0, sum.1 + c.1));
            for found in look.found {
                self.kept.retain(|kept| kept.row != found.row);
                if !found.rejected.is_empty() {
                    self.kept.push_back(found);
                }
            }
        }
        let surplus = self.kept.len().saturating_sub(self.options.buffer);
        self.kept.drain(..surplus);
        self.report.sim_accept_len = (steps > 0).then(|| tokens as f64 / steps as f64);
        self.report.rejected = counts.iter().map(|(n, r)| (*n > 0).then(|| *r as f64 / *n as f64)).collect();
        self.spent += began.elapsed();
        Ok(())
    }

    /// Whether rows of a step are looked at after it.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.options.every.max(1))
    }

    pub(crate) fn report(&self) -> ReplayReport {
        let (seconds, buffered_rows) = (self.spent.as_secs_f64(), self.kept.len());
        ReplayReport { seconds, buffered_rows, ..self.report.clone() }
    }

    /// What is kept: row, anchor and depth of each position, oldest row first.
    pub(crate) fn state(&self) -> Vec<i64> {
        let of = |kept: &Kept| {
            let row = kept.row;
            kept.rejected
                .iter()
                .flat_map(move |r| [row as i64, i64::from(r.anchor), i64::from(r.depth)])
                .collect::<Vec<_>>()
        };
        self.kept.iter().flat_map(of).collect()
    }

    /// Takes back what [`Replay::state`] gave; `None` if it is none.
    pub(crate) fn restore(&mut self, state: &[i64]) -> Option<()> {
        self.kept.clear();
        if !state.len().is_multiple_of(3) {
            return None;
        }
        for place in state.chunks_exact(3) {
            let row = u64::try_from(place[0]).ok()?;
            let rejected =
                Rejected { anchor: u32::try_from(place[1]).ok()?, depth: u32::try_from(place[2]).ok()? };
            match self.kept.back_mut().filter(|kept| kept.row == row) {
                Some(kept) => kept.rejected.push(rejected),
                None => self.kept.push_back(Kept { row, rejected: vec![rejected] }),
            }
        }
        Some(())
    }
}

/// The kind's own part.
///
/// # Errors
/// It has none.
pub(crate) fn replays<M: Method + ?Sized>(method: &mut M) -> Result<&mut dyn Replays, TrainError> {
    let name = method.name();
    method.replays().ok_or(TrainError::NoReplay { method: name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_kernels::train::DocSpan;

    fn pack(ids: &[u32], from: usize) -> Pack {
        Pack {
            docs: vec![DocSpan { start: 0, len: ids.len() as u32 }],
            rows: vec![0],
            ids: ids.to_vec(),
            loss_mask: (0..ids.len()).map(|i| i >= from && i + 1 < ids.len()).collect(),
            ..Pack::default()
        }
    }

    fn proposed(anchor: u32, accepted: u32, end: End) -> Proposed {
        Proposed { anchor, accepted, end }
    }

    #[test]
    fn a_proposal_ends_at_the_first_token_that_is_not_the_targets_choice() {
        // The answer begins at slot 1; at slot 4 the row goes on with another token than the target's first choice.
        let pack = pack(&[9, 1, 2, 3, 4, 5, 6], 1);
        let choices = [None, Some(1), Some(2), Some(3), Some(7), Some(5), None];
        let map = VocabMap::from_target_ids(&[1, 2, 3, 5, 7, 8], 10).unwrap();
        let mut chains = Chains::new(&pack, &map, &choices, 3);
        assert_eq!(chains.live(), [1, 2, 3, 4]);
        let draft = |id: u32| map.to_draft(TargetTokenId(id)).unwrap().0;
        // Behind slot 4 a token that is not 5.
        chains.judge(&[draft(2), draft(3), draft(7), draft(8)]);
        assert_eq!(chains.live(), [1, 2]);
        chains.judge(&[draft(3), draft(1)]);
        assert_eq!(chains.live(), [1]);
        chains.judge(&[draft(7)]);
        let all = chains.finish();
        let wanted = [
            proposed(1, 2, End::Open),
            proposed(2, 1, End::Rejected),
            proposed(3, 0, End::Open),
            proposed(4, 0, End::Rejected),
        ];
        assert_eq!(all, wanted);
        // Two taken and the target's own: the next proposal begins at slot 4.
        assert_eq!(walk(&pack, &all), [wanted[0], wanted[3]]);
    }

    #[test]
    fn a_token_that_cannot_be_proposed_is_nothing_to_learn_from() {
        let pack = pack(&[9, 1, 2, 3], 1);
        let choices = [None, Some(1), Some(2), None];
        let map = VocabMap::from_target_ids(&[1, 3], 10).unwrap();
        let mut chains = Chains::new(&pack, &map, &choices, 3);
        chains.judge(&[1]);
        assert_eq!(chains.finish(), [proposed(1, 0, End::Unreachable)]);
    }

    #[test]
    fn what_a_look_finds_comes_back_from_its_numbers() {
        let look = Look {
            steps: 4,
            tokens: 9,
            counts: vec![(4, 1), (2, 2)],
            found: vec![
                Kept { row: 7, rejected: vec![Rejected { anchor: 3, depth: 1 }] },
                Kept { row: 2, rejected: Vec::new() },
            ],
        };
        let mut values = Vec::new();
        look.write(5, &mut values);
        Look::default().write(6, &mut values);
        let mut values = values.into_iter();
        assert_eq!((values.next(), Look::read(&mut values)), (Some(5), look));
        assert_eq!((values.next(), Look::read(&mut values)), (Some(6), Look::default()));
        assert_eq!(values.next(), None);
    }

    #[test]
    fn draws_are_repeatable_differ_by_step_and_keep_to_their_tokens() {
        let options = ReplayOptions { share: 0.5, tokens: 100, every: 2, buffer: 9 };
        let mut replay = Replay::new(options, 3, 1000);
        let state: Vec<i64> = (0..20).flat_map(|row| [row, 4, 1, row, 9, 0]).collect();
        replay.restore(&state).unwrap();
        assert_eq!(replay.state(), state);
        let first = replay.draw(1, |_| 30);
        assert_eq!(first.len(), 3);
        assert_eq!(first, replay.draw(1, |_| 30));
        assert_ne!(first, replay.draw(2, |_| 30));
        assert_eq!(replay.draw(1, |_| 300).len(), 1, "one row is always taken");
        assert!(replay.restore(&[1, 2]).is_none() && replay.restore(&[1, -2, 0]).is_none());
    }
}
