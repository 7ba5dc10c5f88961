//! Messages through the system's MPI library.
//!
//! Waiting is done by asking now and then, not by MPI's own waiting calls: those keep a core busy, and rank 0 may be at a stage
//! for hours that is its alone. While it asks, rank 0 also hears of ranks that fail.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use draftsmith_train::Link;
use draftsmith_train::ranks::{Incoming, Outgoing};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::request::{LocalScope, Request};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};

use crate::{Error, Told};

/// Of messages of the collective, of last words, and of what is told meanwhile.
const WORK: i32 = 1;
const LAST_WORDS: i32 = 2;
const POSTED: i32 = 3;
/// What was posted and is not underway yet is kept in a buffer of so many bytes.
const BUFFER: usize = 8 << 20;
/// MPI counts by 32-bit numbers.
const LARGEST_MESSAGE: usize = 1 << 30;
/// A rank that does not say hello in this time is missing.
const HELLO: Duration = Duration::from_secs(60);
/// How long a rank that fails waits for rank 0 to end all of them; then it does so itself.
const GRACE: Duration = Duration::from_secs(5);
/// How long a wait asks without a pause, beside the time that its bytes take at `BYTES_PER_S`.
const EAGER: Duration = Duration::from_millis(20);
const BYTES_PER_S: f64 = 2e8;
/// Between two questions of a longer wait.
const PAUSE: Duration = Duration::from_micros(500);

/// All processes of the launch.
pub(super) struct MpiLink {
    world: SimpleCommunicator,
    /// Ends MPI when it is dropped.
    _universe: Universe,
    tell: fn(&Told),
    /// A wait that lasts longer means that somebody is missing.
    patience: Cell<Option<Duration>>,
}

type Pending<'a, 's> = Request<'a, [u8], &'s LocalScope<'a>>;

impl MpiLink {
    /// All are there: from now on a wait may last.
    pub(super) fn greeted(&self) {
        self.patience.set(None);
    }

    /// Ends all because of what a rank says.
    fn end(&self, words: &[u8]) -> ! {
        let told: Vec<(String, Option<String>)> = serde_json::from_slice(words).unwrap_or_default();
        for (message, hint) in told {
            (self.tell)(&Told { message, hint });
        }
        self.world.abort(2)
    }

    /// Last words of another rank, if there are any: this does not return then.
    fn listen(&self) {
        let Some(status) = self.world.any_process().immediate_probe_with_tag(LAST_WORDS) else { return };
        let from = self.world.process_at_rank(status.source_rank());
        let (words, _) = from.receive_vec_with_tag::<u8>(LAST_WORDS);
        self.end(&words);
    }

    /// Asks until all requests are done. `missing` names who is waited for.
    fn wait(&self, mut pending: Vec<Pending<'_, '_>>, bytes: usize, missing: &str) {
        let began = Instant::now();
        let eager = EAGER + Duration::from_secs_f64(bytes as f64 / BYTES_PER_S);
        while !pending.is_empty() {
            pending = pending.into_iter().filter_map(|request| request.test().err()).collect();
            if self.world.rank() == 0 {
                self.listen();
            }
            let waited = began.elapsed();
            if let Some(patience) = self.patience.get().filter(|patience| waited > *patience) {
                (self.tell)(&in_vain(self.world.rank() as usize, patience, missing));
                self.world.abort(2);
            }
            match waited < eager {
                true => std::thread::yield_now(),
                false => std::thread::sleep(PAUSE),
            }
        }
    }
}

impl Link for MpiLink {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn ranks(&self) -> usize {
        self.world.size() as usize
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]) {
        let bytes = incoming.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()
            + outgoing.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
        let mut ranks: Vec<String> = incoming.iter().map(|(rank, _)| rank.to_string()).collect();
        ranks.dedup();
        let missing = match ranks.as_slice() {
            [] => "the others to take its messages".to_string(),
            [one] => format!("rank {one}"),
            more => format!("ranks {}", more.join(", ")),
        };
        mpi::request::scope(|scope| {
            let mut pending: Vec<Pending<'_, '_>> = Vec::new();
            for (from, bytes) in incoming {
                let from = self.world.process_at_rank(*from as i32);
                for part in bytes.chunks_mut(LARGEST_MESSAGE) {
                    pending.push(from.immediate_receive_into_with_tag(scope, part, WORK));
                }
            }
            for (to, bytes) in outgoing {
                let to = self.world.process_at_rank(*to as i32);
                for part in bytes.chunks(LARGEST_MESSAGE) {
                    pending.push(to.immediate_send_with_tag(scope, part, WORK));
                }
            }
            self.wait(pending, bytes, &missing);
        });
    }

    fn post(&self, to: usize, words: &[u8]) {
        self.world.process_at_rank(to as i32).buffered_send_with_tag(words, POSTED);
    }

    fn posted(&self) -> Vec<(usize, Vec<u8>)> {
        // Whoever asks is not in a wait, where rank 0 would hear of ranks that fail.
        if self.world.rank() == 0 {
            self.listen();
        }
        let mut all = Vec::new();
        while let Some(status) = self.world.any_process().immediate_probe_with_tag(POSTED) {
            let from = status.source_rank();
            let (words, _) = self.world.process_at_rank(from).receive_vec_with_tag::<u8>(POSTED);
            all.push((from as usize, words));
        }
        all
    }

    fn give_up(&self, words: &[u8]) {
        if !words.is_empty() {
            self.world.process_at_rank(0).buffered_send_with_tag(words, LAST_WORDS);
        }
        std::thread::sleep(GRACE);
    }

    fn abort(&self, code: u8) {
        self.world.abort(i32::from(code))
    }
}

fn in_vain(rank: usize, patience: Duration, missing: &str) -> Told {
    Told {
        message: format!("rank {rank} waited {} s for {missing}, in vain", patience.as_secs()),
        hint: Some("look at what the launcher started, and whether its hosts reach each other".into()),
    }
}

/// Ends this process if MPI does not begin in time: it waits for every process of the launch, for ever. The launcher ends the
/// others then. Rank 0 is the first to say so; should it be the one that is missing, another does.
fn begins(rank: usize, tell: fn(&Told), exit: fn(u8)) -> std::sync::mpsc::Sender<()> {
    let (begun, waits) = std::sync::mpsc::channel();
    let patience = if rank == 0 { HELLO } else { HELLO + GRACE };
    std::thread::spawn(move || {
        if waits.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            tell(&in_vain(rank, patience, "another to start"));
            exit(2);
        }
    });
    begun
}

/// All processes that a launcher started, through MPI, and the name of this one's host. Until [`MpiLink::greeted`] a wait
/// that lasts too long ends all.
pub(super) fn join(
    by: &str,
    (rank, ranks): (usize, usize),
    tell: fn(&Told),
    exit: fn(u8),
) -> Result<(Rc<MpiLink>, String), Error> {
    let broken = |what: String| {
        Error::input(
            what,
            format!(
                "use the `{by}` of the MPI library that this program was built with; under Slurm `srun --mpi=list` shows \
                 what it knows"
            ),
        )
    };
    let begun = begins(rank, tell, exit);
    let universe = mpi::initialize_with_threading(Threading::Funneled);
    drop(begun);
    let Some((mut universe, _)) = universe else {
        return Err(broken("MPI does not begin".to_string()));
    };
    universe.set_buffer_size(BUFFER);
    let world = universe.world();
    if world.size() as usize != ranks {
        return Err(broken(format!("`{by}` started {ranks} processes, but MPI sees {}", world.size())));
    }
    let host = mpi::environment::processor_name().unwrap_or_else(|_| "unknown host".to_string());
    let patience = Cell::new(Some(HELLO));
    Ok((Rc::new(MpiLink { world, _universe: universe, tell, patience }), host))
}
