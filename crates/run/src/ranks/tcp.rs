//! Messages over TCP: two connections between each two ranks, as [`meet`] made them.
//!
//! Messages of the work are moved by whoever asks for an exchange, as far as both sides take them, with pauses in between: a
//! rank that waits leaves its core. What is said beside the work (posts, last words, the end, and a sign of life every second) is
//! heard by a thread for each other rank, whatever the process is at: one that is gone, or silent, ends all.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_train::Link;
use draftsmith_train::ranks::{Incoming, Outgoing};

use super::meet::Pair;
use crate::Told;

/// Between two signs of life, and between two looks for those of another.
const BEAT: Duration = Duration::from_secs(1);
/// So many looks in vain: the other is gone. A process that was stopped itself has looked once in that time.
const SILENT: u32 = 7;
/// How long a rank waits for rank 0 to end all; then it does so itself.
const GRACE: Duration = Duration::from_secs(5);
/// How long those behind rank 1 wait for it where rank 0 is gone.
const SECOND: Duration = Duration::from_secs(2);
/// What was said last is underway before the process ends, and heard before another is missed.
const LINGER: Duration = Duration::from_millis(100);
/// A wait asks without a pause, then with short ones, then with longer ones.
const EAGER: Duration = Duration::from_millis(1);
const SOON: Duration = Duration::from_millis(20);
const SHORT_PAUSE: Duration = Duration::from_micros(50);
const PAUSE: Duration = Duration::from_micros(500);
/// Bytes that go one way before it is the other's turn.
const TURN: usize = 1 << 20;
/// Longest thing that is said beside the work.
const LONGEST: usize = 64 << 20;

/// What is said beside the work.
const ALIVE: u8 = 0;
const POSTED: u8 = 1;
const LAST_WORDS: u8 = 2;
const END: u8 = 3;
const BYE: u8 = 4;

/// How a link tells the user of an end, and ends its process.
#[derive(Clone)]
pub(super) struct Ends {
    pub(super) tell: Arc<dyn Fn(&Told) + Send + Sync>,
    /// Returns in tests alone.
    pub(super) exit: Arc<dyn Fn(u8) + Send + Sync>,
}

/// A lock whose holders only move values: a panic in one leaves them whole.
fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads of a link share.
struct Shared {
    rank: usize,
    /// By rank, `None` for this one; a connection that failed to take something whole takes nothing more.
    sides: Vec<Option<Mutex<(TcpStream, bool)>>>,
    /// By rank.
    works: Vec<Option<TcpStream>>,
    /// By rank, as errors call them.
    names: Vec<String>,
    /// What was posted and not asked for.
    board: Mutex<Vec<(usize, Vec<u8>)>>,
    /// Last words of another rank.
    words: Mutex<Option<Vec<u8>>>,
    /// Somebody ends all.
    ended: AtomicBool,
    /// The way to end this process has returned.
    outlived: AtomicBool,
    /// This rank has done its work.
    closing: AtomicBool,
    ends: Ends,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.ended.load(Ordering::SeqCst) || self.closing.load(Ordering::SeqCst)
    }

    /// Says something to a rank; nothing to one that does not take it.
    fn say(&self, to: usize, kind: u8, words: &[u8]) {
        if let Some(side) = &self.sides[to] {
            say(&mut locked(side), kind, words);
        }
    }

    /// A sign of life to all that nobody is talking to: others hear a word anyway.
    fn beat(&self) {
        for side in self.sides.iter().flatten() {
            if let Ok(mut side) = side.try_lock() {
                say(&mut side, ALIVE, &[]);
            }
        }
    }

    /// Ends all ranks, unless somebody does so already.
    fn end_all(&self, told: &[Told], code: u8) {
        if self.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        told.iter().for_each(|told| (self.ends.tell)(told));
        let until = Instant::now() + LINGER;
        let mut left: Vec<_> = self.sides.iter().flatten().collect();
        while !left.is_empty() && Instant::now() < until {
            // One that somebody is talking to is next.
            left.retain(|side| side.try_lock().map(|mut side| say(&mut side, END, &[code])).is_err());
            std::thread::sleep(PAUSE);
        }
        std::thread::sleep(LINGER);
        self.end(code);
    }

    /// Ends this process.
    fn end(&self, code: u8) {
        (self.ends.exit)(code);
        for side in self.sides.iter().flatten() {
            let _ = locked(side).0.shutdown(Shutdown::Both);
        }
        for work in self.works.iter().flatten() {
            let _ = work.shutdown(Shutdown::Both);
        }
        self.outlived.store(true, Ordering::SeqCst);
    }

    /// This process ends in another thread.
    fn wait_for_end(&self) -> ! {
        while !self.outlived.load(Ordering::SeqCst) {
            std::thread::sleep(PAUSE);
        }
        panic!("rank {} outlives the end of all", self.rank);
    }

    /// Ends all because of what a rank says.
    fn end_with(&self, words: &[u8]) -> ! {
        let said: Vec<(String, Option<String>)> = serde_json::from_slice(words).unwrap_or_default();
        let mut told: Vec<Told> = said.into_iter().map(|(message, hint)| Told { message, hint }).collect();
        if told.is_empty() {
            told.push(Told {
                message: "a rank ends and does not say why".to_string(),
                hint: Some(
                    "see what the other ranks wrote before, and that all are the same program".to_string(),
                ),
            });
        }
        self.end_all(&told, 2);
        self.wait_for_end()
    }

    /// What ends this process while it waits or asks.
    fn look(&self) {
        if self.ended.load(Ordering::SeqCst) {
            self.wait_for_end();
        }
        if self.rank == 0
            && let Some(words) = locked(&self.words).take()
        {
            self.end_with(&words);
        }
    }

    /// A rank is gone. Rank 0 says so, or the next one if it is rank 0; others do where these do not.
    fn lost(&self, other: usize, reason: &str) {
        let wait = match (self.rank, other) {
            (0, _) | (1, 0) => LINGER,
            (_, 0) => SECOND,
            _ => GRACE,
        };
        let until = Instant::now() + wait;
        while !self.is_over() && Instant::now() < until {
            std::thread::sleep(PAUSE);
        }
        if !self.is_over() {
            self.end_all(&[gone(&self.names[other], reason)], 2);
        }
    }

    /// A message to or from a rank cannot be moved. Whoever listens knows more.
    fn broken(&self, other: usize, reason: &str) -> ! {
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            self.look();
            std::thread::sleep(PAUSE);
        }
        self.end_all(&[gone(&self.names[other], reason)], 2);
        self.wait_for_end()
    }

    /// Hears what a rank says, until it has done its work.
    ///
    /// # Errors
    /// It says nothing more.
    fn hear(&self, from: usize, stream: &TcpStream) -> Result<(), String> {
        loop {
            let mut head = [0; 5];
            self.fill(stream, &mut head)?;
            let [kind, len @ ..] = head;
            let len = u32::from_le_bytes(len) as usize;
            if len > LONGEST {
                return Err(format!("it says something of {len} bytes"));
            }
            let mut words = Vec::new();
            while words.len() < len {
                let at = words.len();
                words.resize(len.min(at + TURN), 0);
                self.fill(stream, &mut words[at..])?;
            }
            match kind {
                ALIVE => {}
                POSTED => locked(&self.board).push((from, words)),
                LAST_WORDS => *locked(&self.words) = Some(words),
                END => {
                    if !self.ended.swap(true, Ordering::SeqCst) {
                        // Others are to hear of the end before they miss this rank.
                        std::thread::sleep(LINGER);
                        self.end(words.first().copied().unwrap_or(2));
                    }
                    return Ok(());
                }
                BYE => return Ok(()),
                kind => return Err(format!("it says what nobody knows ({kind})")),
            }
        }
    }

    fn fill(&self, mut stream: &TcpStream, mut buffer: &mut [u8]) -> Result<(), String> {
        let mut silent = 0;
        while !buffer.is_empty() {
            match stream.read(buffer) {
                Ok(0) => return Err("it closed the connection".to_string()),
                Ok(n) => {
                    silent = 0;
                    buffer = &mut buffer[n..];
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    silent += 1;
                    if silent == SILENT || self.is_over() {
                        return Err(format!("nothing was heard of it for {SILENT} s"));
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.to_string()),
            }
        }
        Ok(())
    }
}

fn say((stream, whole): &mut (TcpStream, bool), kind: u8, words: &[u8]) {
    assert!(words.len() <= LONGEST, "what is said beside the work is short");
    let mut bytes = Vec::with_capacity(5 + words.len());
    bytes.push(kind);
    bytes.extend((words.len() as u32).to_le_bytes());
    bytes.extend(words);
    // A connection that does not take it is missed by whoever listens at it.
    *whole = *whole && stream.write_all(&bytes).is_ok();
}

fn gone(name: &str, reason: &str) -> Told {
    Told {
        message: format!("{name} is gone: {reason}"),
        hint: Some(
            "look at what it said itself, at the log of its machine (`dmesg`) and at the network; the same command goes on from \
             what was saved last"
                .to_string(),
        ),
    }
}

/// All ranks of a launch that has met.
pub(super) struct TcpLink {
    shared: Arc<Shared>,
    /// Dropped: no more signs of life.
    _beats: Sender<()>,
}

impl TcpLink {
    /// Over the connections to each other rank, by rank.
    ///
    /// # Errors
    /// The system refuses a thread or a setting of a connection.
    pub(super) fn new(rank: usize, pairs: Vec<Option<Pair>>, ends: Ends) -> io::Result<TcpLink> {
        let (mut sides, mut works, mut names, mut ears) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (other, pair) in pairs.into_iter().enumerate() {
            let Some(Pair { side, work, name }) = pair else {
                sides.push(None);
                works.push(None);
                names.push(String::new());
                continue;
            };
            side.set_read_timeout(Some(BEAT))?;
            side.set_write_timeout(Some(GRACE))?;
            work.set_nonblocking(true)?;
            ears.push((other, side.try_clone()?));
            sides.push(Some(Mutex::new((side, true))));
            works.push(Some(work));
            names.push(name);
        }
        let shared = Arc::new(Shared {
            rank,
            sides,
            works,
            names,
            board: Mutex::default(),
            words: Mutex::default(),
            ended: AtomicBool::new(false),
            outlived: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ends,
        });
        for (other, stream) in ears {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("rank {other}")).spawn(move || {
                if let Err(reason) = shared.hear(other, &stream) {
                    shared.lost(other, &reason);
                }
            })?;
        }
        let (beats, ended) = channel();
        let beating = Arc::clone(&shared);
        std::thread::Builder::new().name("ranks".to_string()).spawn(move || {
            while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                beating.beat();
            }
        })?;
        Ok(TcpLink { shared, _beats: beats })
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        if !self.shared.ended.load(Ordering::SeqCst) {
            (0..self.ranks()).for_each(|to| self.shared.say(to, BYE, &[]));
        }
    }
}

/// Why a message does not move.
enum Stuck {
    Broken(io::Error),
    /// Bytes that the other side sends, and that are expected.
    OtherLength(u64, usize),
}

/// Bytes that a connection took or gave, `None` if it does neither now; `end` is what nothing at all means.
fn taken(moved: io::Result<usize>, end: ErrorKind) -> Result<Option<usize>, Stuck> {
    match moved {
        Ok(0) => Err(Stuck::Broken(end.into())),
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) if e.kind() == ErrorKind::Interrupted => Ok(Some(0)),
        Err(e) => Err(Stuck::Broken(e)),
    }
}

/// Before each message.
const HEAD: usize = 8;

/// Messages to one rank.
#[derive(Default)]
struct Leaving<'a> {
    messages: VecDeque<([u8; HEAD], &'a [u8])>,
    /// Bytes of the first one that have left, its head's among them.
    at: usize,
}

impl Leaving<'_> {
    /// How many bytes it took now.
    fn go_on(&mut self, mut stream: &TcpStream) -> Result<usize, Stuck> {
        let mut moved = 0;
        while let Some((head, body)) = self.messages.front()
            && moved < TURN
        {
            let written = match head.get(self.at..) {
                Some(head) if !head.is_empty() => {
                    stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])
                }
                _ => stream.write(&body[self.at - HEAD..]),
            };
            let Some(n) = taken(written, ErrorKind::WriteZero)? else { break };
            moved += n;
            self.at += n;
            if self.at == HEAD + body.len() {
                self.messages.pop_front();
                self.at = 0;
            }
        }
        Ok(moved)
    }
}

/// Messages from one rank.
#[derive(Default)]
struct Arriving<'a> {
    messages: VecDeque<&'a mut [u8]>,
    head: [u8; HEAD],
    /// Bytes of the first one that have come, its head's among them.
    at: usize,
}

impl Arriving<'_> {
    /// How many bytes came now.
    fn go_on(&mut self, mut stream: &TcpStream) -> Result<usize, Stuck> {
        let mut moved = 0;
        while let Some(body) = self.messages.front_mut()
            && moved < TURN
        {
            let read = match self.at {
                at @ ..HEAD => stream.read(&mut self.head[at..]),
                at => stream.read(&mut body[at - HEAD..]),
            };
            let Some(n) = taken(read, ErrorKind::UnexpectedEof)? else { break };
            moved += n;
            self.at += n;
            if self.at == HEAD {
                let said = u64::from_le_bytes(self.head);
                if said != body.len() as u64 {
                    return Err(Stuck::OtherLength(said, body.len()));
                }
            }
            if self.at == HEAD + body.len() {
                self.messages.pop_front();
                self.at = 0;
            }
        }
        Ok(moved)
    }
}

impl Link for TcpLink {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn ranks(&self) -> usize {
        self.shared.sides.len()
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]) {
        let shared = &*self.shared;
        let mut leaving: Vec<Leaving<'_>> = (0..self.ranks()).map(|_| Leaving::default()).collect();
        let mut arriving: Vec<Arriving<'_>> = (0..self.ranks()).map(|_| Arriving::default()).collect();
        for (to, bytes) in outgoing {
            leaving[*to].messages.push_back(((bytes.len() as u64).to_le_bytes(), bytes));
        }
        for (from, bytes) in incoming {
            arriving[*from].messages.push_back(bytes);
        }
        let mut moved_at = Instant::now();
        loop {
            let (mut moved, mut done) = (0, true);
            for (other, work) in shared.works.iter().enumerate() {
                let (to, from) = (&mut leaving[other], &mut arriving[other]);
                let Some(work) = work else {
                    assert!(to.messages.is_empty() && from.messages.is_empty(), "nobody sends to itself");
                    continue;
                };
                let went = to.go_on(work).and_then(|out| Ok(out + from.go_on(work)?));
                match went {
                    Ok(bytes) => moved += bytes,
                    Err(Stuck::Broken(e)) => shared.broken(other, &e.to_string()),
                    Err(Stuck::OtherLength(said, wanted)) => {
                        let message =
                            format!("{} sends {said} bytes where {wanted} are expected", shared.names[other]);
                        let hint = Some("start the same program everywhere".to_string());
                        shared.end_all(&[Told { message, hint }], 2);
                        shared.wait_for_end();
                    }
                }
                done &= to.messages.is_empty() && from.messages.is_empty();
            }
            // Done comes first: what ends this rank and another alike is told by rank 0 as its own.
            if done {
                return;
            }
            shared.look();
            if moved > 0 {
                moved_at = Instant::now();
                continue;
            }
            match moved_at.elapsed() {
                idle if idle < EAGER => std::thread::yield_now(),
                idle if idle < SOON => std::thread::sleep(SHORT_PAUSE),
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    fn post(&self, to: usize, words: &[u8]) {
        self.shared.say(to, POSTED, words);
    }

    fn posted(&self) -> Vec<(usize, Vec<u8>)> {
        self.shared.look();
        std::mem::take(&mut *locked(&self.shared.board))
    }

    fn give_up(&self, words: &[u8]) {
        if !words.is_empty() {
            self.shared.say(0, LAST_WORDS, words);
        }
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            if self.shared.ended.load(Ordering::SeqCst) {
                self.shared.wait_for_end();
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn abort(&self, code: u8) {
        self.shared.end_all(&[], code);
        self.shared.wait_for_end();
    }
}
