//! The processes of a run: how a launcher's are found, how they agree before the work, and how one that fails ends all.
//!
//! Every rank reads the run file and looks at target and data; then all compare what they found. From there on rank 0 does
//! the stages as if it were alone, and calls the others to those that are shared: they wait for its [`Order`]s and follow.

mod meet;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
mod rows_tests;
mod side;
mod tcp;
#[cfg(test)]
mod tcp_tests;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use draftsmith_core::report::Stop;
use draftsmith_train::{Alone, Collective};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::engine::default_threads;
use crate::state::{WHY_SHOWN, changes};
use crate::{Error, Told};

use meet::{Missed, Place};
pub(crate) use side::Side;
use tcp::{Ends, TcpLink};

/// What a launcher says of its processes in their environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The command, or the variable, that makes them several.
    pub by: &'static str,
    /// How many processes there are.
    pub ranks: usize,
    /// Which of them this is.
    pub rank: usize,
    /// Where they meet without MPI.
    place: Option<Place>,
}

/// Launchers with their variables for the number of processes and for the number of a process. A Slurm job has its number of
/// tasks everywhere, a step alone has that of the step.
const LAUNCHERS: [(&str, &str, &str); 4] = [
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
];

/// Sets `WORLD_SIZE` and `RANK`, and where rank 0 is.
const TORCHRUN: &str = "torchrun";
/// Set by hand.
const WORLD_SIZE: &str = "WORLD_SIZE";

/// Variables for the number of a process among those on its machine.
const LOCAL_RANKS: [&str; 4] =
    ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"];

/// Which of the processes on its machine this is, where a launcher says so.
pub(crate) fn local_rank(variable: impl Fn(&str) -> Option<String>) -> Option<u32> {
    LOCAL_RANKS.iter().find_map(|name| variable(name)?.trim().parse().ok())
}

impl Launch {
    /// The launcher that started more than this process; `None` if nobody did. Where ranks meet counts before what any launcher of
    /// MPI says, if rank and number of ranks stand beside it.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let place = Place::of(&variable);
        let by_hand = match variable("TORCHELASTIC_RUN_ID") {
            Some(_) => TORCHRUN,
            None => WORLD_SIZE,
        };
        let by_hand = (by_hand, WORLD_SIZE, "RANK");
        let (first, last) = if place.is_some() { (Some(by_hand), None) } else { (None, Some(by_hand)) };
        first.into_iter().chain(LAUNCHERS).chain(last).find_map(|(by, size, rank)| {
            let (ranks, rank) = (number(size)?, number(rank)?);
            (ranks > 1).then(|| Launch { by, ranks, rank, place: place.clone() })
        })
    }

    /// Whether its processes are told of by `RANK` and `WORLD_SIZE`.
    fn is_by_hand(&self) -> bool {
        self.by == TORCHRUN || self.by == WORLD_SIZE
    }

    /// What it does, in words.
    fn started(&self) -> String {
        match self.by {
            WORLD_SIZE => format!("`WORLD_SIZE` says that {} processes work together", self.ranks),
            by => format!("`{by}` started {} processes", self.ranks),
        }
    }

    /// How to do without it.
    fn without(&self) -> String {
        match self.by {
            WORLD_SIZE => "with `RANK` and `WORLD_SIZE` unset".to_string(),
            by => format!("without `{by}`"),
        }
    }

    /// Refuses to be one of several where a command works as one process.
    ///
    /// # Errors
    /// Always.
    pub fn refuse(&self, verb: &str) -> Error {
        Error::input(
            format!("{}, but `{verb}` works as one", self.started()),
            format!("start `draftsmith {verb}` {}", self.without()),
        )
    }
}

/// What rank 0 calls the others to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Answer conversations, each rank every so manieth.
    Answer {
        /// The held-out ones.
        held: bool,
        /// Which are wanted, by their places among those of the data.
        rows: Vec<u32>,
    },
    /// Capture rows of tokens.
    Capture {
        /// By rank.
        shares: Vec<Vec<Range<u64>>>,
    },
    /// Train under this key.
    Train {
        /// Key of the stage.
        key: String,
    },
    /// All is done.
    End,
}

/// What a rank says of itself when it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    host: String,
    process: u32,
    version: String,
    /// Cores that it may run on, as the system writes them.
    cores: String,
    /// How many that are.
    num_cores: usize,
}

impl Hello {
    fn mine(host: String) -> Hello {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Hello {
            host,
            process: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            cores: cores.unwrap_or_default().trim().to_string(),
            num_cores: default_threads(),
        }
    }
}

/// Threads of a rank whose run file names none: its cores, shared with the ranks that may run on the same ones.
fn threads_of(hellos: &[Hello], rank: usize) -> usize {
    let me = &hellos[rank];
    let beside = hellos.iter().filter(|h| h.host == me.host && h.cores == me.cores).count();
    (me.num_cores / beside.max(1)).max(1)
}

/// The processes of a run.
pub struct Ranks {
    collective: Box<dyn Collective>,
    /// By rank: `rank 1 of 4 (host, process 77)`.
    names: Vec<String>,
    threads: usize,
    /// Orders so far.
    orders: Cell<u64>,
    /// All know what is wrong, and rank 0 says it.
    known: Cell<bool>,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranks").field("names", &self.names).field("threads", &self.threads).finish()
    }
}

impl Ranks {
    /// This process and no other.
    pub fn alone() -> Ranks {
        let (names, threads) = (vec!["rank 0".to_string()], default_threads());
        Ranks { collective: Box::new(Alone), names, threads, orders: Cell::new(0), known: Cell::new(false) }
    }

    /// Finds the others of a launch. `tell` is called when another rank fails, before all end, and for what rank 0 cannot know of
    /// this one; `exit` ends this process where there is no other way.
    ///
    /// # Errors
    /// A launcher whose processes this build cannot join, or that are not what it says; ranks of different versions.
    pub fn join(launch: Option<&Launch>, tell: fn(&Told), exit: fn(u8)) -> Result<Ranks, Error> {
        let Some(launch) = launch else { return Ok(Ranks::alone()) };
        match &launch.place {
            Some(place) if launch.is_by_hand() || cfg!(not(feature = "mpi")) => {
                let ends = Ends { tell: Arc::new(tell), exit: Arc::new(exit) };
                Ranks::over_tcp(place, (launch.rank, launch.ranks), meet::PATIENCE, ends)
            }
            None if launch.is_by_hand() => Err(Error::input(
                format!("{}, but not where rank 0 is", launch.started()),
                "set `MASTER_ADDR` and `MASTER_PORT` to an address of rank 0's machine and a free port there, the same for all \
                 ranks (docs/RANKS.md)",
            )),
            _ => Ranks::join_mpi(launch, tell, exit),
        }
    }

    #[cfg(not(feature = "mpi"))]
    fn join_mpi(launch: &Launch, _: fn(&Told), _: fn(u8)) -> Result<Ranks, Error> {
        Err(Error::input(
            format!("{}, but this program was built without MPI", launch.started()),
            format!(
                "set `MASTER_ADDR` and `MASTER_PORT` to an address of rank 0's machine and a free port there, the same for all \
                 ranks; or build it with `cargo build --release --features mpi` (docs/RANKS.md); or start it {}",
                launch.without()
            ),
        ))
    }

    #[cfg(feature = "mpi")]
    fn join_mpi(launch: &Launch, tell: fn(&Told), exit: fn(u8)) -> Result<Ranks, Error> {
        let (link, host) = mpi::join(launch.by, (launch.rank, launch.ranks), tell, exit)?;
        let ranks = draftsmith_train::Ranks::new(std::rc::Rc::clone(&link));
        let found = Ranks::of(Box::new(ranks), &Hello::mine(host));
        link.greeted();
        found
    }

    /// Meets the others over TCP.
    ///
    /// # Errors
    /// Those that do not come in time, and what stands in this one's way: that is told here where this is not rank 0.
    fn over_tcp(
        place: &Place,
        (rank, ranks): (usize, usize),
        patience: Duration,
        ends: Ends,
    ) -> Result<Ranks, Error> {
        let link = match rank < ranks {
            true => meet::meet(place, (rank, ranks), patience).and_then(|pairs| {
                let link = TcpLink::new(rank, pairs, ends.clone());
                link.map_err(|e| {
                    Missed::Mine(Error::input(format!("rank {rank} cannot begin: {e}"), "end other programs"))
                })
            }),
            false => Err(Missed::Mine(Error::input(
                format!("`RANK` is {rank} and `WORLD_SIZE` {ranks}"),
                format!("ranks count from 0 to {}", ranks - 1),
            ))),
        };
        match link {
            Ok(link) => Ranks::of(Box::new(draftsmith_train::Ranks::new(link)), &Hello::mine(meet::host())),
            Err(Missed::Mine(error)) => {
                if rank > 0 {
                    error.told().iter().for_each(|told| (ends.tell)(told));
                }
                Err(error)
            }
            Err(Missed::Told) => Err(Error::input("not all ranks came", "see what rank 0 says")),
        }
    }

    /// Of a collective whose processes say this of themselves.
    ///
    /// # Errors
    /// Different versions.
    fn of(collective: Box<dyn Collective>, mine: &Hello) -> Result<Ranks, Error> {
        let said = collective.gather(json!(mine).to_string().into_bytes());
        let rank = collective.rank();
        let count = said.len();
        let mut hellos: Vec<Hello> = Vec::new();
        for (number, said) in said.iter().enumerate() {
            let hello = serde_json::from_slice(said).map_err(|_| {
                Error::input(
                    format!("rank {number} of {count} is another program than rank {rank}"),
                    "start the same program everywhere",
                )
            })?;
            hellos.push(hello);
        }
        let names = hellos.iter().enumerate();
        let names = names.map(|(i, h)| format!("rank {i} of {count} ({}, process {})", h.host, h.process));
        let names: Vec<String> = names.collect();
        if let Some(other) = hellos.iter().position(|h| h.version != hellos[0].version) {
            return Err(Error::input(
                format!(
                    "{} is draftsmith {}, rank 0 is draftsmith {}",
                    names[other], hellos[other].version, hellos[0].version
                ),
                "start the same program everywhere",
            ));
        }
        Ok(Ranks {
            collective,
            names,
            threads: threads_of(&hellos, rank),
            orders: Cell::new(0),
            known: Cell::new(false),
        })
    }

    /// What training needs of them.
    pub fn collective(&self) -> &dyn Collective {
        self.collective.as_ref()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.collective.ranks()
    }

    /// Which this is, from 0.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// True of the one that prints and writes.
    pub fn is_first(&self) -> bool {
        self.collective.is_first()
    }

    /// This rank, with host and process; nothing where there are no others.
    pub fn name(&self) -> Option<&str> {
        (self.count() > 1).then(|| self.names[self.collective.rank()].as_str())
    }

    /// Threads of this rank where nobody says.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// What the user is told before the work; nothing where there are no others.
    pub fn note(&self) -> Option<String> {
        (self.count() > 1).then(|| {
            let threads = if self.threads == 1 { "thread" } else { "threads" };
            format!("{} ranks; {} has {} {threads}", self.count(), self.names[0], self.threads)
        })
    }

    /// Goes on if all ranks can, and say the same of what they found.
    ///
    /// # Errors
    /// What is wrong with any of them, on all of them.
    pub fn agree<T>(
        &self,
        found: Result<T, Error>,
        said: impl FnOnce(&T) -> BTreeMap<String, String>,
    ) -> Result<T, Error> {
        if self.count() == 1 {
            return found;
        }
        let mine = match &found {
            Ok(found) => Said::Found(said(found)),
            Err(error) => Said::Faults(error.told().into_iter().map(|t| (t.message, t.hint)).collect()),
        };
        let all = self.collective.gather(json!(mine).to_string().into_bytes());
        let all: Vec<Said> = all
            .iter()
            .map(|said| serde_json::from_slice(said).unwrap_or_else(|_| Said::Faults(Vec::new())))
            .collect();
        let Some(faults) = judge(&all, &self.names) else { return found };
        self.known.set(true);
        Err(Error::of_all(faults).unwrap_or_else(|| {
            Error::input("a rank says nothing of what it found", "start the same program everywhere")
        }))
    }

    /// Calls the others.
    pub(crate) fn order(&self, order: &Order) {
        self.orders.set(self.orders.get() + 1);
        self.collective.broadcast(json!(order).to_string().into_bytes());
    }

    /// Waits for rank 0.
    ///
    /// # Errors
    /// It says what this version does not know.
    pub(crate) fn hear(&self) -> Result<Order, Error> {
        self.orders.set(self.orders.get() + 1);
        let said = self.collective.broadcast(Vec::new());
        serde_json::from_slice(&said).map_err(|e| {
            Error::input(format!("rank 0 says what nobody knows: {e}"), "start the same program everywhere")
        })
    }

    /// The messages beside the work that the last order began.
    pub(crate) fn side<'a>(&'a self, stop: &'a Stop) -> Side<'a> {
        Side::new(self.collective(), self.orders.get(), stop)
    }

    /// Ends work that was shared: all ranks come here, each with what it made and whether it was to stop before its rows were
    /// done. Gives what all made, by rank, and whether any of them was to stop.
    ///
    /// # Errors
    /// A rank says what nobody knows.
    pub(crate) fn meet<T: Serialize + for<'d> Deserialize<'d>>(
        &self,
        made: &T,
        stopped: bool,
    ) -> Result<(Vec<T>, bool), Error> {
        let said = self.collective.gather(json!([made, stopped]).to_string().into_bytes());
        let (mut all, mut any) = (Vec::new(), false);
        for (rank, said) in said.iter().enumerate() {
            let (made, stopped): (T, bool) = serde_json::from_slice(said).map_err(|e| {
                Error::input(
                    format!("{} says what nobody knows: {e}", self.names[rank]),
                    "start the same program everywhere",
                )
            })?;
            all.push(made);
            any |= stopped;
        }
        Ok((all, any))
    }

    /// This rank fails. Rank 0 is told, unless all came to the same; it tells the user and ends all. Returns where this is
    /// rank 0, or if it did not.
    pub fn give_up(&self, told: &[Told]) {
        let Some(name) = self.name().filter(|_| !self.is_first()) else { return };
        let words = match self.known.get() {
            true => String::new(),
            false => {
                let words = told.iter().map(|t| (format!("{name}: {}", t.message), &t.hint));
                json!(words.collect::<Vec<_>>()).to_string()
            }
        };
        self.collective.give_up(words.as_bytes());
    }

    /// Ends all ranks at once, where there are several.
    pub fn abort(&self, code: u8) {
        self.collective.abort(code);
    }
}

/// What a rank says to the others before the work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    /// What it works on.
    Found(BTreeMap<String, String>),
    /// What is wrong, with advice.
    Faults(Vec<(String, Option<String>)>),
}

/// What is wrong with what the ranks say; `None` if nothing is.
fn judge(all: &[Said], names: &[String]) -> Option<Vec<Told>> {
    let told =
        |(message, hint): &(String, Option<String>)| Told { message: message.clone(), hint: hint.clone() };
    if let Said::Faults(faults) = &all[0]
        && all.iter().all(|said| *said == all[0])
    {
        return Some(faults.iter().map(told).collect());
    }
    let mut faults: Vec<Told> = Vec::new();
    for (said, name) in all.iter().zip(names) {
        let Said::Faults(list) = said else { continue };
        for fault in list {
            let Told { message, hint } = told(fault);
            faults.push(Told { message: format!("{name}: {message}"), hint });
        }
    }
    if all.iter().any(|said| matches!(said, Said::Faults(_))) {
        return Some(faults);
    }
    let Said::Found(first) = &all[0] else { return None };
    for (said, name) in all.iter().zip(names) {
        let Said::Found(found) = said else { continue };
        let mut lines = changes(first, found);
        if lines.is_empty() {
            continue;
        }
        let more = lines.len().saturating_sub(WHY_SHOWN);
        lines.truncate(WHY_SHOWN);
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        faults.push(Told {
            message: format!("{name} works on something else than rank 0: {}{more}", lines.join(", ")),
            hint: Some("start all ranks with the same command, run file, model and data".to_string()),
        });
    }
    (!faults.is_empty()).then_some(faults)
}
