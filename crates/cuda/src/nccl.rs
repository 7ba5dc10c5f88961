//! Messages between cards by NCCL, each card in a process of its own.

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::api::{self, Handle, NcclApi, UniqueId, nccl_version};
use crate::card::{Card, CardMemory, Context};
use crate::error::CudaError;
use crate::launcher::{DeviceLink, Message};
use crate::library::{CudaVersion, Library};
use crate::search::Search;

/// How long a wait asks without a pause.
const EAGER: Duration = Duration::from_millis(1);
/// Between two questions of a longer wait.
const PAUSE: Duration = Duration::from_micros(50);

/// The library, loaded.
pub struct Nccl {
    api: Arc<NcclApi>,
    path: PathBuf,
    version: String,
}

impl Nccl {
    /// Finds it.
    ///
    /// # Errors
    /// [`CudaError::MissingLibrary`], or a library that lacks a function or does not say its version.
    pub fn open(search: &Search, driver: CudaVersion) -> Result<Nccl, CudaError> {
        let (library, path) = search.open(Library::Nccl, driver)?;
        let (api, mut version) = (Arc::new(NcclApi::load(library, &path)?), 0);
        // Never unloaded: threads of the library's own may still end when the last handle is gone.
        std::mem::forget(Arc::clone(&api));
        // SAFETY: one number is written.
        api.check("ncclGetVersion", unsafe { (api.version)(&mut version) })?;
        Ok(Nccl { api, path, version: nccl_version(version) })
    }

    /// Its version, `2.30.7`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where one process waits for the others, to be told to all of them: 128 bytes.
    ///
    /// # Errors
    /// What the library says: no network interface, for one.
    pub fn meeting(&self) -> Result<Vec<u8>, CudaError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: an id is written to an id.
        self.api.check("ncclGetUniqueId", unsafe { (self.api.unique_id)(&mut id) })?;
        Ok(id.0.to_vec())
    }

    /// Meets the others, of whom each has a card of its own. All call this; it returns when all have come.
    ///
    /// # Errors
    /// A meeting that none is, or whatever keeps the cards from each other.
    pub fn join(
        &self,
        card: &Card,
        meeting: &[u8],
        (rank, ranks): (usize, usize),
    ) -> Result<NcclLink, CudaError> {
        const CALL: &str = "ncclCommInitRank";
        let wrong = |reason: String| CudaError::Nccl { call: CALL, reason };
        let id = meeting.try_into().map_err(|_| wrong(format!("a meeting of {} bytes", meeting.len())))?;
        let number = |n: usize| c_int::try_from(n).map_err(|_| wrong(format!("{n} ranks")));
        let (number_of_ranks, number) = (number(ranks)?, number(rank)?);
        let context = Arc::clone(card.context());
        context.enter()?;
        let mut comm = null_mut();
        // SAFETY: a handle is written to a handle; the id goes by value, as the header says; the card's context is current.
        let joined = unsafe { (self.api.init_rank)(&mut comm, number_of_ranks, UniqueId(id), number) };
        self.api.check(CALL, joined)?;
        Ok(NcclLink { api: Arc::clone(&self.api), comm: Mutex::new(Some(Comm(comm))), context })
    }
}

/// A handle of the library.
struct Comm(Handle);

// SAFETY: the library's handles may be used from any thread, by one at a time, which their lock sees to.
unsafe impl Send for Comm {}

/// The way from a card to those of the other processes. If it is not ended it stays to the end of the process: without the others
/// the library may wait for ever there.
pub struct NcclLink {
    api: Arc<NcclApi>,
    /// None once it was ended.
    comm: Mutex<Option<Comm>>,
    context: Arc<Context>,
}

impl NcclLink {
    /// Starts all messages as one group on the card's stream.
    fn start(
        &self,
        comm: Handle,
        outgoing: &[Message<'_, CardMemory>],
        incoming: &[Message<'_, CardMemory>],
    ) -> Result<(), CudaError> {
        let (api, stream) = (&self.api, self.context.stream);
        // SAFETY: takes nothing.
        api.check("ncclGroupStart", unsafe { (api.group_start)() })?;
        let place = |message: &Message<'_, CardMemory>| message.at.memory.address(message.at.offset);
        let sent = outgoing.iter().try_for_each(|message| {
            // SAFETY: the caller names a place inside the allocation, which lives until the exchange is over.
            api.check("ncclSend", unsafe {
                let (count, peer) = (message.bytes / size_of::<f32>(), message.rank as c_int);
                (api.send)(place(message), count, api::NCCL_F32, peer, comm, stream)
            })
        });
        let all = sent.and_then(|()| {
            incoming.iter().try_for_each(|message| {
                // SAFETY: as above; nobody else is at what comes in, for work of the card runs in the order of its stream.
                api.check("ncclRecv", unsafe {
                    let (count, peer) = (message.bytes / size_of::<f32>(), message.rank as c_int);
                    (api.receive)(place(message), count, api::NCCL_F32, peer, comm, stream)
                })
            })
        });
        // A group that was begun is ended, whatever happened in it: the library keeps it for the thread.
        // SAFETY: takes nothing.
        let ended = api.check("ncclGroupEnd", unsafe { (api.group_end)() });
        all.and(ended)
    }

    /// Waits for the stream, and asks meanwhile whether another process is lost: the card would wait for it for ever.
    fn wait(&self, comm: Handle) -> Result<(), CudaError> {
        let (api, driver, began) = (&self.api, &self.context.api, Instant::now());
        loop {
            // SAFETY: the stream lives as long as the context.
            let state = unsafe { (driver.stream_query)(self.context.stream) };
            let mut failure = 0;
            // SAFETY: the handle is in use by nobody else; one number is written.
            let asked = unsafe { (api.async_error)(comm, &mut failure) };
            api.check("ncclCommGetAsyncError", asked)?;
            if failure != api::NCCL_IN_PROGRESS {
                api.check("an exchange between cards", failure)?;
            }
            match state {
                api::NOT_READY if began.elapsed() > EAGER => std::thread::sleep(PAUSE),
                api::NOT_READY => std::thread::yield_now(),
                state => return driver.check("cuStreamQuery", state),
            }
        }
    }
}

impl DeviceLink<CardMemory> for NcclLink {
    fn exchange(
        &self,
        outgoing: &[Message<'_, CardMemory>],
        incoming: &[Message<'_, CardMemory>],
    ) -> Result<(), CudaError> {
        if outgoing.is_empty() && incoming.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        let held = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = held.as_ref().map(|comm| comm.0).ok_or_else(|| CudaError::Nccl {
            call: "an exchange between cards",
            reason: "the way between them was given up".to_owned(),
        })?;
        let done = self.start(comm, outgoing, incoming).and_then(|()| self.wait(comm));
        if done.is_err() {
            self.context.give_up();
        }
        done
    }

    fn end(&self) -> Result<(), CudaError> {
        self.context.enter()?;
        let mut held = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Comm(comm)) = held.take() else { return Ok(()) };
        // SAFETY: the handle was made by the library and is given up once; the context is current.
        self.api.check("ncclCommDestroy", unsafe { (self.api.destroy)(comm) })
    }
}
