//! Work whose rows the ranks share: what each tells rank 0 while it is at it, and how rank 0 calls it off.
//!
//! What is told serves progress, and an end before all rows are done. Results are what the ranks wrote; they meet when the work is
//! over, and nothing that is told here is among them.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use draftsmith_core::report::Stop;
use draftsmith_train::Collective;

/// Between two messages of a rank.
const TELL_EVERY: Duration = Duration::from_millis(50);
/// Between two questions of rank 0, once its own rows are done.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// What a message says.
const ITEMS: u8 = 0;
const ENDED: u8 = 1;
const OVER: u8 = 2;

/// Two numbers about a row or about several.
pub(crate) type Item = [u64; 2];

/// One round of shared work.
pub(crate) struct Side<'a> {
    collective: &'a dyn Collective,
    /// Messages of other rounds are too late.
    round: u64,
    /// A rank that was asked to stop asks rank 0.
    stop: &'a Stop,
    state: RefCell<State>,
}

struct State {
    /// Not told yet.
    waiting: Vec<Item>,
    told_at: Instant,
    /// By rank: it does no more.
    ended: Vec<bool>,
    /// Rank 0 called it off.
    over: bool,
}

impl<'a> Side<'a> {
    /// The round that the last order began.
    pub(super) fn new(collective: &'a dyn Collective, round: u64, stop: &'a Stop) -> Side<'a> {
        let ended = (0..collective.ranks()).map(|rank| rank == 0).collect();
        let state = State { waiting: Vec::new(), told_at: Instant::now(), ended, over: false };
        Side { collective, round, stop, state: RefCell::new(state) }
    }

    fn post(&self, to: usize, kind: u8, items: &[Item]) {
        let mut words = self.round.to_le_bytes().to_vec();
        words.push(kind);
        words.extend(items.iter().flatten().flat_map(|n| n.to_le_bytes()));
        self.collective.post(to, &words);
    }

    /// Tells rank 0, now or soon. Rank 0 knows what it did itself.
    pub(crate) fn tell(&self, item: Item) {
        if self.collective.is_first() {
            return;
        }
        let mut state = self.state.borrow_mut();
        state.waiting.push(item);
        if state.told_at.elapsed() >= TELL_EVERY {
            self.post(0, ITEMS, &state.waiting);
            state.waiting.clear();
            state.told_at = Instant::now();
        }
    }

    /// This rank does no more in this round.
    pub(crate) fn end(&self) {
        if !self.collective.is_first() {
            let waiting = std::mem::take(&mut self.state.borrow_mut().waiting);
            self.post(0, ITEMS, &waiting);
            let stopped: &[Item] = if self.stop.requested() { &[[0, 0]] } else { &[] };
            self.post(0, ENDED, stopped);
        }
    }

    /// Takes what was posted; gives the items.
    fn take(&self) -> Vec<Item> {
        let mut items = Vec::new();
        let mut state = self.state.borrow_mut();
        for (from, words) in self.collective.posted() {
            let Some((round, rest)) = words.split_first_chunk() else { continue };
            if u64::from_le_bytes(*round) != self.round {
                continue;
            }
            match rest.split_first() {
                Some((&ENDED, stopped)) => {
                    state.ended[from] = true;
                    if !stopped.is_empty() {
                        self.stop.request();
                    }
                }
                Some((&OVER, _)) => state.over = true,
                Some((_, rest)) => {
                    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                    items.extend(rest.chunks_exact(16).map(|item| [number(&item[..8]), number(&item[8..])]));
                }
                None => {}
            }
        }
        items
    }

    /// What the others told since rank 0 last asked.
    pub(crate) fn told(&self) -> Vec<Item> {
        self.take()
    }

    /// True once rank 0 called the round off.
    pub(crate) fn is_over(&self) -> bool {
        if !self.collective.is_first() {
            self.take();
        }
        self.state.borrow().over
    }

    /// Tells the others that no more rows are wanted.
    pub(crate) fn call_off(&self) {
        let mut state = self.state.borrow_mut();
        if self.collective.is_first() && !state.over {
            state.over = true;
            (1..self.collective.ranks()).for_each(|rank| self.post(rank, OVER, &[]));
        }
    }

    /// Rank 0 waits until the others do no more, and hears what they tell meanwhile; a break calls the round off.
    pub(crate) fn wait(&self, mut heard: impl FnMut(Vec<Item>) -> ControlFlow<()>) {
        loop {
            let told = self.told();
            if heard(told).is_break() {
                self.call_off();
            }
            if self.state.borrow().ended.iter().all(|ended| *ended) {
                return;
            }
            std::thread::sleep(ASK_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_train::Ranks;
    use draftsmith_train::ranks::threads;

    #[test]
    fn a_rank_that_is_to_stop_stops_rank_0() {
        let stopped = std::thread::scope(|scope| {
            let work = |link| {
                let (collective, stop) = (Ranks::new(link), Stop::default());
                let side = Side::new(&collective, 1, &stop);
                if !collective.is_first() {
                    stop.request();
                    side.end();
                } else {
                    side.wait(|_| ControlFlow::Continue(()));
                }
                stop.requested()
            };
            let threads: Vec<_> =
                threads::links(2).into_iter().map(|link| scope.spawn(move || work(link))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(stopped, [true, true]);
    }

    #[test]
    fn rank_0_hears_of_all_rows_and_can_call_the_rest_off() {
        for ranks in 1..=4u64 {
            let heard = std::thread::scope(|scope| {
                let work = |link| {
                    let (collective, stop) = (Ranks::new(link), Stop::default());
                    let rank = collective.rank() as u64;
                    // What an earlier round left is not heard.
                    let early = Side::new(&collective, 6, &stop);
                    early.tell([99, 99]);
                    early.end();
                    collective.barrier();
                    let side = Side::new(&collective, 7, &stop);
                    if rank > 0 {
                        (0..10).for_each(|row| side.tell([rank, row]));
                        side.end();
                        while !side.is_over() {
                            std::thread::yield_now();
                        }
                        return Vec::new();
                    }
                    let mut all = Vec::new();
                    side.wait(|items| {
                        all.extend(items);
                        match all.len() as u64 == 10 * (ranks - 1) {
                            true => ControlFlow::Break(()),
                            false => ControlFlow::Continue(()),
                        }
                    });
                    all.sort();
                    all
                };
                let threads: Vec<_> = threads::links(ranks as usize)
                    .into_iter()
                    .map(|link| scope.spawn(move || work(link)))
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
            });
            let wanted: Vec<Item> = (1..ranks).flat_map(|rank| (0..10).map(move |row| [rank, row])).collect();
            assert_eq!(heard[0], wanted);
        }
    }
}
