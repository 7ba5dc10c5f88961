//! The order of work on a device: launches wait for each other on the host and start together.
//!
//! Starting a kernel and copying a table cost the host more than a small step of decoding costs the device. So launches wait until
//! there are some, or somebody asks for a result; the tables that they read are copied by one call; and a list of launches that was
//! started before, word for word, is recorded and from then on started by one call (a CUDA graph). A recorded list is used for an
//! equal list alone, so it touches the memory that these launches would touch, and what is started is the same with and without it.
//!
//! Memory that launches touch stays allocated until they have started: buffers go back to the pool, not to the device, and the
//! pool has all waiting launches started before it frees anything. Whatever is not a launch (copies, products, messages to other
//! devices) starts what waits first.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::CudaError;
use crate::launcher::{Arg, At, Launch, Launcher, Product};

/// Launches that wait for each other at most. After a result the first ones wait for fewer, so that the device has something to do.
const MOST_WAITING: usize = 128;
const FIRST_WAITING: usize = 32;
/// Lists shorter than this are not worth a record.
const LEAST_RECORDED: usize = 8;
/// Records that are kept, and the lists before in which one must have been to be recorded.
const RECORDS: usize = 256;
const REMEMBERED: usize = 128;
/// Bytes of tables that are copied by one call, and the largest table that goes there.
const ARENA: usize = 1 << 20;
pub(crate) const LARGEST_TABLE: usize = ARENA / 2;
/// Copies of tables that may be under way.
const ARENAS: usize = 32;
/// Smallest room of a table.
const LEAST_ROOM: usize = 512;

/// What a device was asked to start so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Started {
    /// Launches.
    pub launches: u64,
    /// Of them, those that started as part of a recorded list.
    pub replayed: u64,
    /// Calls that started them: one for a recorded list, one for each other launch.
    pub calls: u64,
    /// Lists that were recorded.
    pub recorded: u64,
    /// Tables that launches read, and copies that brought them.
    pub tables: u64,
    /// See [`Started::tables`].
    pub copies: u64,
}

/// A table among others that one copy brings: their memory, and its bytes there.
pub(crate) type Among<L> = (Arc<<L as Launcher>::Memory>, (usize, usize));

/// Memory for tables, on both sides.
struct Arena<L: Launcher> {
    memory: Arc<L::Memory>,
    staging: L::Staging,
    /// The copy that read it last.
    sent: u64,
    /// A launch that waits reads a table here.
    awaited: bool,
}

/// A recorded list.
struct Record<L: Launcher> {
    launches: Vec<L::Ready>,
    graph: L::Graph,
    /// When it was used last.
    used: u64,
}

struct State<L: Launcher> {
    waiting: Vec<L::Ready>,
    /// How many launches wait for each other now.
    patience: usize,
    arenas: Vec<Arena<L>>,
    /// The arena that is being filled, and how far.
    filling: Option<(usize, usize)>,
    /// Copies that were started, and how many of them are known to be done.
    sent: u64,
    done: u64,
    records: HashMap<u64, Record<L>>,
    /// Hashes of the lists that started last.
    recent: VecDeque<u64>,
    /// Whether lists are recorded: no more once the device had no room for one.
    records_on: bool,
    lists: u64,
    started: Started,
}

/// A device whose work waits to be started together.
pub(crate) struct Stream<L: Launcher> {
    // Records go before the kernels that they start.
    state: Mutex<State<L>>,
    launcher: L,
}

/// A quick hash of words: lists that share one are told apart by comparing them.
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.write_u64(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| self.write_u64((*byte).into()));
    }
    fn write_u64(&mut self, word: u64) {
        // Odd, and without a pattern: digits of the golden ratio.
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }
}

/// Room of a table: a few sizes, so that lists stay equal while tables grow.
fn room(bytes: usize) -> usize {
    let bytes = bytes.max(LEAST_ROOM);
    let step = (bytes.next_power_of_two() / 8).max(LEAST_ROOM);
    bytes.next_multiple_of(step)
}

impl<L: Launcher> Stream<L> {
    /// Lists are recorded if `records` says so.
    pub(crate) fn new(launcher: L, records: bool) -> Stream<L> {
        let state = State {
            waiting: Vec::new(),
            patience: FIRST_WAITING,
            arenas: Vec::new(),
            filling: None,
            sent: 0,
            done: 0,
            records: HashMap::new(),
            recent: VecDeque::new(),
            records_on: records,
            lists: 0,
            started: Started::default(),
        };
        Stream { launcher, state: Mutex::new(state) }
    }

    pub(crate) fn launcher(&self) -> &L {
        &self.launcher
    }

    /// What was started so far.
    pub(crate) fn started(&self) -> Started {
        self.state().started
    }

    fn state(&self) -> MutexGuard<'_, State<L>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a launch.
    ///
    /// # Errors
    /// Of this one what [`Launcher::ready`] refuses; of those that waited, and of it, what their start says.
    pub(crate) fn launch(&self, launch: Launch<'_, L::Memory>) -> Result<(), CudaError> {
        let mut state = self.state();
        let places = launch.args.iter().flat_map(|arg| match arg {
            Arg::Buffer(at) => std::slice::from_ref(at),
            Arg::Buffers(all) => all,
            Arg::I32(_) | Arg::U32(_) | Arg::I64(_) | Arg::F32(_) => &[],
        });
        for at in places.flatten() {
            let arena = state.arenas.iter_mut().find(|arena| std::ptr::eq(&*arena.memory, at.memory));
            arena.into_iter().for_each(|arena| arena.awaited = true);
        }
        let ready = self.launcher.ready(launch)?;
        state.waiting.push(ready);
        if state.waiting.len() < state.patience {
            return Ok(());
        }
        state.patience = (2 * state.patience).min(MOST_WAITING);
        self.start(&mut state)
    }

    /// A table for launches that are asked for from now on. It has at most [`LARGEST_TABLE`] bytes.
    ///
    /// # Errors
    /// As [`Stream::begin`]; memory that runs out.
    pub(crate) fn table(&self, bytes: &[u8]) -> Result<Among<L>, CudaError> {
        assert!(bytes.len() <= LARGEST_TABLE, "a table of {} bytes", bytes.len());
        let (mut state, room) = (self.state(), room(bytes.len()));
        if state.filling.is_some_and(|(_, used)| used + room > ARENA) {
            self.start(&mut state)?;
        }
        let (arena, used) = match state.filling {
            Some(filling) => filling,
            None => (self.free_arena(&mut state)?, 0),
        };
        state.filling = Some((arena, used + room));
        state.started.tables += 1;
        let arena = &mut state.arenas[arena];
        arena.staging[used..used + bytes.len()].copy_from_slice(bytes);
        Ok((Arc::clone(&arena.memory), (used, used + bytes.len())))
    }

    /// An arena that no copy reads, with no table that is held or that a waiting launch reads; the first one, so that equal work
    /// finds equal places.
    fn free_arena(&self, state: &mut State<L>) -> Result<usize, CudaError> {
        let free = |state: &State<L>| {
            let held = |arena: &Arena<L>| arena.awaited || Arc::strong_count(&arena.memory) > 1;
            state.arenas.iter().position(|arena| arena.sent <= state.done && !held(arena))
        };
        if let Some(arena) = free(state) {
            return Ok(arena);
        }
        if state.arenas.len() >= ARENAS {
            self.start(state)?;
            self.launcher.wait()?;
            state.done = state.sent;
            if let Some(arena) = free(state) {
                return Ok(arena);
            }
        }
        let memory = Arc::new(self.launcher.allocate(ARENA)?);
        state.arenas.push(Arena { memory, staging: self.launcher.staging(ARENA)?, sent: 0, awaited: false });
        Ok(state.arenas.len() - 1)
    }

    /// Starts all launches that wait.
    ///
    /// # Errors
    /// What the device refuses.
    pub(crate) fn begin(&self) -> Result<(), CudaError> {
        self.start(&mut self.state())
    }

    fn start(&self, state: &mut State<L>) -> Result<(), CudaError> {
        if let Some((arena, used)) = state.filling.take() {
            state.sent += 1;
            state.started.copies += 1;
            let sent = state.sent;
            let arena = &mut state.arenas[arena];
            arena.sent = sent;
            self.launcher.write_staged(At::new(&arena.memory, 0), &arena.staging, used)?;
        }
        state.arenas.iter_mut().for_each(|arena| arena.awaited = false);
        let waiting = std::mem::take(&mut state.waiting);
        if waiting.is_empty() {
            return Ok(());
        }
        state.started.launches += waiting.len() as u64;
        if !state.records_on || waiting.len() < LEAST_RECORDED {
            return self.start_each(state, &waiting);
        }
        state.lists += 1;
        let now = state.lists;
        let mut hasher = Mix(0);
        waiting.hash(&mut hasher);
        let hash = hasher.finish();
        let known = state.records.get_mut(&hash).filter(|record| record.launches == waiting);
        if let Some(record) = known {
            record.used = now;
            state.started.replayed += waiting.len() as u64;
            state.started.calls += 1;
            return self.launcher.replay(&record.graph);
        }
        let again = state.recent.contains(&hash);
        if !again {
            state.recent.truncate(REMEMBERED - 1);
            state.recent.push_front(hash);
            return self.start_each(state, &waiting);
        }
        if state.records.len() >= RECORDS {
            let oldest = state.records.iter().min_by_key(|(_, record)| record.used).map(|(hash, _)| *hash);
            oldest.map(|hash| state.records.remove(&hash));
        }
        match self.launcher.record(&waiting) {
            Ok(graph) => {
                state.started.recorded += 1;
                state.started.replayed += waiting.len() as u64;
                state.started.calls += 1;
                let replayed = self.launcher.replay(&graph);
                state.records.insert(hash, Record { launches: waiting, graph, used: now });
                replayed
            }
            // The work itself needs no record, and the room that records take.
            Err(CudaError::Memory { .. }) => {
                state.records.clear();
                state.records_on = false;
                self.start_each(state, &waiting)
            }
            Err(error) => Err(error),
        }
    }

    fn start_each(&self, state: &mut State<L>, launches: &[L::Ready]) -> Result<(), CudaError> {
        state.started.calls += launches.len() as u64;
        launches.iter().try_for_each(|launch| self.launcher.start(launch))
    }

    /// Starts what waits, and gives up the room of records: before memory is freed.
    ///
    /// # Errors
    /// What the device refuses.
    pub(crate) fn forget(&self) -> Result<(), CudaError> {
        let mut state = self.state();
        self.start(&mut state)?;
        state.records.clear();
        state.recent.clear();
        Ok(())
    }

    /// [`Launcher::write`], in its turn.
    ///
    /// # Errors
    /// As there; what the start of launches before says.
    pub(crate) fn write(&self, to: At<'_, L::Memory>, data: &[u8]) -> Result<(), CudaError> {
        self.begin()?;
        self.launcher.write(to, data)
    }

    /// [`Launcher::copy_beside`], behind what was asked for so far.
    ///
    /// # Errors
    /// As there; what the start of launches before says.
    pub(crate) fn send(
        &self,
        copies: &[(At<'_, L::Memory>, Range<usize>)],
        from: &L::Staging,
    ) -> Result<L::Mark, CudaError> {
        let mut state = self.state();
        self.start(&mut state)?;
        self.launcher.copy_beside(copies, from)
    }

    /// [`Launcher::after`]: launches that wait already need not wait for the copies.
    ///
    /// # Errors
    /// As there; what the start of launches before says.
    pub(crate) fn after(&self, mark: &L::Mark) -> Result<(), CudaError> {
        let mut state = self.state();
        self.start(&mut state)?;
        self.launcher.after(mark)
    }

    /// [`Launcher::read`], in its turn.
    ///
    /// # Errors
    /// As there; what the start of launches before says.
    pub(crate) fn read(&self, from: At<'_, L::Memory>, out: &mut [u8]) -> Result<(), CudaError> {
        let sent = {
            let mut state = self.state();
            self.start(&mut state)?;
            state.sent
        };
        // Others may ask for work while this waits.
        self.launcher.read(from, out)?;
        let mut state = self.state();
        state.done = state.done.max(sent);
        state.patience = FIRST_WAITING;
        Ok(())
    }

    /// [`Launcher::product`], in its turn.
    ///
    /// # Errors
    /// As there; what the start of launches before says.
    pub(crate) fn product(
        &self,
        product: Product,
        a: At<'_, L::Memory>,
        b: At<'_, L::Memory>,
        c: At<'_, L::Memory>,
    ) -> Result<(), CudaError> {
        self.begin()?;
        self.launcher.product(product, a, b, c)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::shim::Shim;

    #[test]
    fn a_table_has_room_for_a_few_steps_more() {
        assert_eq!([0, 4, 512, 513].map(room), [512, 512, 512, 1024]);
        for bytes in (1..LARGEST_TABLE).step_by(4093) {
            let room = room(bytes);
            assert!(room >= bytes && room <= bytes + (bytes / 4).max(512), "{bytes} in {room}");
            assert!(room <= ARENA && room.is_multiple_of(512));
        }
    }

    /// What one thread does may come between a table of another and the launch that reads it.
    #[test]
    fn a_table_stays_until_the_launch_that_reads_it_has_started() {
        let folder = std::env::temp_dir().join("draftsmith-shim");
        let kernels = format!(
            "{}\nKERNEL(first_of, IN(u32) from, OUT(u32) to, int at) {{ if (THREAD == 0) to[at] = from[0]; }}",
            crate::source::FILES[0].1
        );
        let stream = Stream::new(Shim::of(Path::new(&folder), &kernels, u64::MAX).unwrap(), true);
        let memory = stream.launcher().allocate(8).unwrap();
        let to = At::new(&memory, 0);
        let launch = |(from, within): &Among<Shim>, at: i32| {
            let from = At { memory: &**from, offset: within.0, within: *within };
            let args = [Arg::Buffer(Some(from)), Arg::Buffer(Some(to)), Arg::I32(at)];
            stream.launch(Launch { kernel: "first_of", grid: (1, 1), threads: 32, args: &args }).unwrap();
        };
        let mut found = [0u8; 8];
        let one = stream.table(&[1, 0, 0, 0]).unwrap();
        stream.read(to, &mut found).unwrap();
        launch(&one, 0);
        drop(one);
        let two = stream.table(&[2, 0, 0, 0]).unwrap();
        launch(&two, 1);
        stream.read(to, &mut found).unwrap();
        assert_eq!(found, [1, 0, 0, 0, 2, 0, 0, 0]);
        // And no longer: the place of the first is there again.
        drop(two);
        let three = stream.table(&[3]).unwrap();
        assert!(std::ptr::eq(&*three.0, &*stream.state().arenas[0].memory));
        assert_eq!(stream.state().arenas.len(), 2);
    }
}
