//! Who is next: requests wait in one line per client, and the lines take turns.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::speech::{Delta, Speech};
use draftsmith_core::TokenLogprobs;
use draftsmith_decode::GenerateOptions;

/// Who asked: the name of an API key, or the address of the peer. Lines are fair between these.
pub(crate) type Client = Arc<str>;

/// What the worker tells a request. At most one delta per step, so the channel is bounded by the token limit and a slow
/// reader holds nobody up.
#[derive(Debug)]
pub(crate) enum Event {
    /// Log-probabilities of the prompt's tokens but the first: before anything else, if they were asked for.
    Prompt(Vec<TokenLogprobs>),
    /// Tokens that were committed, and the text that is certain now.
    Delta(Delta),
    /// Nothing follows.
    End(End),
}

/// Why and how an answer ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) outcome: Outcome,
    /// Text and tokens that were held back.
    pub(crate) rest: Delta,
    /// Tokens generated.
    pub(crate) tokens: usize,
    pub(crate) stats: draftsmith_core::AcceptStats,
    /// From its arrival until it was taken in.
    pub(crate) queued: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
    /// Prompt tokens that were in a kept cache.
    pub(crate) cached: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A stop id or a stop text.
    Stop,
    /// The token limit or the context.
    Length,
    /// Its time was up.
    Timeout,
    /// The server goes down.
    Drained,
    /// The engine refused it.
    Refused(String),
    /// Something in it made the engine panic; others go on.
    Failed(String),
}

impl Outcome {
    /// One word for it.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Timeout => "timeout",
            Outcome::Drained => "drained",
            Outcome::Refused(_) => "refused",
            Outcome::Failed(_) => "failed",
        }
    }
}

/// One sequence to decode.
pub(crate) struct Job {
    /// Unique in this process.
    pub(crate) id: u64,
    /// Which of the request's sequences it is.
    pub(crate) choice: usize,
    pub(crate) client: Client,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) options: GenerateOptions,
    pub(crate) speech: Speech,
    pub(crate) events: UnboundedSender<(usize, Event)>,
    pub(crate) submitted: Instant,
    pub(crate) deadline: Instant,
}

impl Job {
    /// Cache slots that it may come to use.
    pub(crate) fn slots(&self) -> usize {
        self.prompt.len() + self.options.max_new_tokens
    }

    /// Nobody reads the answer any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Ends it before it began.
    pub(crate) fn refuse(self, outcome: Outcome) {
        let end = End {
            outcome,
            rest: Delta::default(),
            tokens: 0,
            stats: Default::default(),
            queued: self.submitted.elapsed(),
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            cached: 0,
        };
        // A reader that left needs no answer.
        let _ = self.events.send((self.choice, Event::End(end)));
    }
}

/// Something the worker does between steps.
pub(crate) enum Order {
    /// Another draft, which lies in the worker's channel.
    Replace,
    /// End every sequence now.
    CutAll,
    /// End the worker.
    Stop,
}

#[derive(Default)]
struct State {
    /// One line per client that waits; the front line is next.
    lines: VecDeque<(Client, VecDeque<Job>)>,
    waiting: usize,
    orders: VecDeque<Order>,
}

/// The lines, shared by the handlers and the worker.
pub(crate) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    limit: usize,
}

/// No room in the queue.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// Sequences that wait already.
    pub(crate) waiting: usize,
}

impl Queue {
    /// A queue in which at most `limit` sequences wait.
    pub(crate) fn new(limit: usize) -> Queue {
        Queue { state: Mutex::default(), wake: Condvar::new(), limit }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the sequences of one request, all or none.
    pub(crate) fn submit(&self, jobs: Vec<Job>) -> Result<(), Full> {
        let mut state = self.state();
        if state.waiting + jobs.len() > self.limit {
            return Err(Full { waiting: state.waiting });
        }
        state.waiting += jobs.len();
        for job in jobs {
            match state.lines.iter_mut().find(|(client, _)| *client == job.client) {
                Some((_, line)) => line.push_back(job),
                None => state.lines.push_back((Arc::clone(&job.client), VecDeque::from([job]))),
            }
        }
        self.wake.notify_one();
        Ok(())
    }

    /// Hands the worker an order.
    pub(crate) fn order(&self, order: Order) {
        self.state().orders.push_back(order);
        self.wake.notify_one();
    }

    /// The next order, if there is one.
    pub(crate) fn next_order(&self) -> Option<Order> {
        self.state().orders.pop_front()
    }

    /// The next sequence if it needs at most `slots`; its client goes to the end of the lines. Who is next is not
    /// passed over for being large, so nobody starves.
    pub(crate) fn take(&self, slots: usize) -> Option<Job> {
        let mut state = self.state();
        let (_, line) = state.lines.front()?;
        if line.front()?.slots() > slots {
            return None;
        }
        let (client, mut line) = state.lines.pop_front()?;
        let job = line.pop_front()?;
        if !line.is_empty() {
            state.lines.push_back((client, line));
        }
        state.waiting -= 1;
        Some(job)
    }

    /// Takes out those that `gone` says, wherever they stand.
    pub(crate) fn remove(&self, gone: impl Fn(&Job) -> bool) -> Vec<Job> {
        let mut state = self.state();
        let mut removed = Vec::new();
        for (_, line) in &mut state.lines {
            let (out, kept): (VecDeque<Job>, VecDeque<Job>) =
                std::mem::take(line).into_iter().partition(&gone);
            removed.extend(out);
            *line = kept;
        }
        state.lines.retain(|(_, line)| !line.is_empty());
        state.waiting -= removed.len();
        removed
    }

    /// Sequences that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.state().waiting
    }

    /// Sleeps until there is a sequence or an order, at most for `time`.
    pub(crate) fn wait(&self, time: Duration) {
        let idle = |state: &mut State| state.lines.is_empty() && state.orders.is_empty();
        // Whether time or work ended the wait, the caller looks for itself.
        let _ = self.wake.wait_timeout_while(self.state(), time, idle);
    }
}

#[cfg(test)]
mod tests {
    use draftsmith_text::{SpecialIds, Tokenizer};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::speech::SpeechOptions;

    /// A sequence of `slots` cache slots, and the end that its reader holds.
    fn job(id: u64, client: &str, slots: usize) -> (Job, UnboundedReceiver<(usize, Event)>) {
        let json = include_bytes!("../../../fixtures/tiny-target/tokenizer.json");
        let tokenizer = Tokenizer::from_json(json, SpecialIds::default()).unwrap();
        let (events, answers) = unbounded_channel();
        let now = Instant::now();
        let job = Job {
            id,
            choice: 0,
            client: client.into(),
            prompt: Arc::from([1]),
            options: GenerateOptions { max_new_tokens: slots - 1, ..GenerateOptions::default() },
            speech: Speech::new(&tokenizer, SpeechOptions::default()),
            events,
            submitted: now,
            deadline: now + Duration::from_secs(60),
        };
        (job, answers)
    }

    #[test]
    fn lines_of_clients_take_turns_and_a_large_request_is_waited_for() {
        let queue = Queue::new(8);
        let mut readers = Vec::new();
        for (id, client, slots) in [(1, "a", 10), (2, "a", 10), (3, "a", 10), (4, "b", 50), (5, "c", 10)] {
            let (job, reader) = job(id, client, slots);
            readers.push(reader);
            queue.submit(vec![job]).unwrap();
        }
        let take = |slots| queue.take(slots).map(|job| job.id);
        assert_eq!(take(100), Some(1));
        assert_eq!(take(40), None, "the large one is next; nobody passes it");
        assert_eq!((take(50), take(50), take(50), take(50)), (Some(4), Some(5), Some(2), Some(3)));
        assert_eq!((take(50), queue.waiting()), (None, 0));
    }

    #[test]
    fn a_request_gets_in_with_all_its_sequences_or_none() {
        let queue = Queue::new(3);
        let jobs = |ids: [u64; 2]| ids.map(|id| job(id, "a", 2).0).into();
        queue.submit(jobs([1, 2])).unwrap();
        assert_eq!(queue.submit(jobs([3, 4])), Err(Full { waiting: 2 }));
        assert_eq!(queue.waiting(), 2);
    }

    #[test]
    fn those_whose_reader_left_are_found_in_the_line() {
        let queue = Queue::new(8);
        let (stays, _reader) = job(1, "a", 2);
        let (leaves, gone) = job(2, "a", 2);
        queue.submit(vec![stays, leaves]).unwrap();
        drop(gone);
        let removed: Vec<u64> = queue.remove(Job::is_abandoned).iter().map(|job| job.id).collect();
        assert_eq!((removed, queue.waiting()), (vec![2], 1));
    }
}
