//! How gradients go between ranks that train on NVIDIA cards: from card to card by NCCL where all ranks can, else through host
//! memory, as between ranks on CPUs. The bits are the same either way.

use draftsmith_cuda::{Asked, Card, Cuda, CudaError, Nccl};
use draftsmith_train::Collective;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Error;
use crate::device::{Around, is_off};

/// `off` on any rank: gradients go through host memory.
const SWITCH: &str = "DRAFTSMITH_NCCL";

/// What a rank says before all decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Offer {
    /// What tells its card from all others.
    card: String,
    nccl: Offered,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Offered {
    /// There, in this version.
    Version(String),
    /// Not there, with what to do.
    Missing { message: String, hint: String },
    /// Not wanted.
    Off,
}

/// Why gradients go through host memory; `None` if they need not.
fn obstacle(offers: &[Offer]) -> Option<String> {
    if let Some(rank) = offers.iter().position(|offer| offer.nccl == Offered::Off) {
        return Some(format!("rank {rank} was started with {SWITCH}=off"));
    }
    let mut versions = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        match &offer.nccl {
            Offered::Missing { message, hint } => return Some(format!("rank {rank}: {message}; {hint}")),
            Offered::Version(version) => versions.push(version),
            Offered::Off => {}
        }
        if let Some(other) = offers[..rank].iter().position(|other| other.card == offer.card) {
            return Some(format!(
                "ranks {other} and {rank} share a card, and NCCL wants one for each; start one rank for each card"
            ));
        }
    }
    let other = versions.iter().position(|version| *version != versions[0])?;
    let (first, found) = (versions[0], versions[other]);
    Some(format!("rank 0 has NCCL {first}, rank {other} has {found}; install the same everywhere"))
}

/// Whatever joins all ranks, or why gradients go through host memory. All ranks call this; `meeting` is asked of rank 0 alone.
///
/// # Errors
/// All offered the same, and it fails; a rank that says what nobody knows.
fn decide<T>(
    collective: &dyn Collective,
    mine: &Offer,
    meeting: impl FnOnce() -> Result<Vec<u8>, CudaError>,
    join: impl FnOnce(&[u8]) -> Result<T, CudaError>,
) -> Result<Result<T, String>, Error> {
    let said = collective.gather(json!(mine).to_string().into_bytes());
    let offers: Result<Vec<Offer>, _> = said.iter().map(|said| serde_json::from_slice(said)).collect();
    let offers = offers.map_err(|e| {
        Error::input(format!("a rank says what nobody knows: {e}"), "start the same program everywhere")
    })?;
    if let Some(why) = obstacle(&offers) {
        return Ok(Err(why));
    }
    let wrong = |error: CudaError| Error::from(error.failure(Asked::RunFile));
    let found = if collective.is_first() { meeting().map_err(wrong) } else { Ok(Vec::new()) };
    let place = collective.broadcast(found.as_ref().map(Clone::clone).unwrap_or_default());
    found?;
    if place.is_empty() {
        // Rank 0 knows why, and ends all.
        collective.give_up(&[]);
        return Err(Error::input("rank 0 cannot begin with NCCL", "see what rank 0 says"));
    }
    join(&place).map(Ok).map_err(wrong)
}

/// The card of this rank, with a way to those of the others where there are others and all have one.
///
/// # Errors
/// A value of `DRAFTSMITH_NCCL` that is none; cards that are there, as NCCL is, and do not reach each other.
pub(crate) fn linked(
    cuda: &Cuda<Card>,
    collective: &dyn Collective,
    around: Around<'_>,
) -> Result<Cuda<Card>, Error> {
    if collective.ranks() == 1 {
        return Ok(cuda.clone());
    }
    let (card, report) = (cuda.launcher(), around.report);
    let wrong = |error: CudaError| Error::from(error.failure(Asked::RunFile));
    let nccl = match is_off(SWITCH, (around.variable)(SWITCH), "for gradients through host memory")? {
        false => Some(Nccl::open(&around.search(), card.driver())),
        true => None,
    };
    let offered = match &nccl {
        None => Offered::Off,
        Some(Ok(nccl)) => Offered::Version(nccl.version().to_string()),
        Some(Err(error)) => Offered::Missing { message: error.to_string(), hint: error.hint() },
    };
    let mine = Offer { card: card.uuid().map_err(wrong)?, nccl: offered };
    // What is missing is an obstacle to all, so nobody asks for it then.
    let here = || nccl.as_ref().and_then(|nccl| nccl.as_ref().ok()).expect("every rank offered it");
    let place = (collective.rank(), collective.ranks());
    let decided =
        decide(collective, &mine, || here().meeting(), |meeting| here().join(card, meeting, place))?;
    Ok(match decided {
        Ok(link) => {
            report.note(&format!(
                "train: gradients go from card to card by NCCL {}, which never ran on a card so far; hold a small run against one \
                 with {SWITCH}=off first",
                here().version()
            ));
            cuda.clone().with_peers(link)
        }
        Err(why) => {
            report.note(&format!("train: gradients go through host memory: {why}"));
            cuda.clone()
        }
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use draftsmith_core::report::{Report, Unit};
    use draftsmith_cuda::CudaOptions;
    use draftsmith_kernels::TrainKernels;
    use draftsmith_train::ranks::threads::on_ranks;

    use super::*;

    fn offer(card: &str, nccl: Offered) -> Offer {
        Offer { card: card.to_string(), nccl }
    }

    fn version(version: &str) -> Offered {
        Offered::Version(version.to_string())
    }

    #[test]
    fn what_keeps_ranks_from_nccl_is_named_with_the_way_out() {
        let here = || offer("a", version("2.30.7"));
        let missing =
            Offered::Missing { message: "`libnccl.so.2` was not found".into(), hint: "get it".into() };
        for (other, wanted) in [
            (offer("b", version("2.30.7")), None),
            (offer("b", Offered::Off), Some("rank 1 was started with DRAFTSMITH_NCCL=off")),
            (offer("b", missing), Some("rank 1: `libnccl.so.2` was not found; get it")),
            (
                offer("a", version("2.30.7")),
                Some("ranks 0 and 1 share a card, and NCCL wants one for each; start one rank for each card"),
            ),
            (
                offer("b", version("2.27.3")),
                Some("rank 0 has NCCL 2.30.7, rank 1 has 2.27.3; install the same everywhere"),
            ),
        ] {
            assert_eq!(obstacle(&[here(), other]).as_deref(), wanted);
        }
    }

    /// What a rank joined, or why it did not; or what failed.
    type Decided = Result<Result<String, String>, String>;

    /// What each rank comes to, and how often a meeting was asked for.
    fn decided(
        ranks: usize,
        offer_of: impl Fn(usize) -> Offer + Sync,
        meeting: Result<Vec<u8>, CudaError>,
    ) -> (Vec<Decided>, usize) {
        let asked = AtomicUsize::new(0);
        let found = on_ranks(ranks, |collective| {
            let rank = collective.rank();
            let meet = || {
                asked.fetch_add(1, Ordering::Relaxed);
                meeting.clone()
            };
            let join = |place: &[u8]| Ok(format!("{rank} at {}", String::from_utf8_lossy(place)));
            decide(collective, &offer_of(rank), meet, join).map_err(|error| error.to_string())
        });
        (found, asked.into_inner())
    }

    #[test]
    fn ranks_meet_where_the_first_says_or_none_does() {
        let card = |rank: usize| offer(&rank.to_string(), version("2.30.7"));
        let (found, asked) = decided(3, card, Ok(b"here".to_vec()));
        let wanted = (0..3).map(|rank| Ok(Ok(format!("{rank} at here"))));
        assert_eq!((found, asked), (wanted.collect(), 1));
        let off = |rank| if rank == 2 { offer("2", Offered::Off) } else { card(rank) };
        let (found, asked) = decided(3, off, Ok(b"here".to_vec()));
        let why = "rank 2 was started with DRAFTSMITH_NCCL=off".to_string();
        assert_eq!((found, asked), (vec![Ok(Err(why)); 3], 0));
    }

    #[test]
    fn a_first_rank_that_cannot_begin_says_why_alone() {
        let card = |rank: usize| offer(&rank.to_string(), version("2.30.7"));
        let error = CudaError::Nccl { call: "ncclGetUniqueId", reason: "no network".to_string() };
        let (found, asked) = decided(2, card, Err(error));
        assert_eq!(asked, 1);
        assert_eq!(found[0], Err("ncclGetUniqueId failed: no network".to_string()));
        assert_eq!(found[1], Err("rank 0 cannot begin with NCCL".to_string()));
    }

    /// A folder with the libraries of the crate `cuda`'s tests, which need no card.
    fn libraries(with_nccl: bool) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/tests/fake");
        let nccl = with_nccl.then_some(("nccl.c", "libnccl.so.2"));
        let all = [("driver.c", "libcuda.so.1"), ("cublaslt.c", "libcublasLt.so.12")];
        for (source, library) in all.into_iter().chain(nccl) {
            let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()));
            command.args(["-O1", "-w", "-fPIC", "-shared", "-DVERSION=13000", "-DDEVICES=4", "-DMAJOR=9"]);
            command.arg("-DMEMORY=(80ull<<30)").arg("-o").arg(folder.path().join(library));
            let done = command.arg(sources.join(source)).output().expect("a C compiler");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        folder
    }

    thread_local! {
        /// What the variables of a rank say.
        static VARIABLES: RefCell<HashMap<&'static str, String>> = RefCell::default();
    }

    fn variable(name: &str) -> Option<String> {
        VARIABLES.with_borrow(|all| all.get(name).cloned())
    }

    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);

    impl Report for Notes {
        fn begin(&self, _: &str, _: Option<u64>, _: Unit) {}
        fn at(&self, _: u64) {}
        fn detail(&self, _: &str) {}
        fn end(&self) {}
        fn note(&self, line: &str) {
            self.0.lock().unwrap().push(line.to_string());
        }
    }

    /// Whether each rank's card has peers, with what the rank is told.
    fn linked_on(
        folder: &Path,
        cards: &[usize],
        switch: impl Fn(usize) -> Option<&'static str> + Sync,
    ) -> Vec<Result<(bool, Vec<String>), String>> {
        on_ranks(cards.len(), |collective| {
            let rank = collective.rank();
            VARIABLES.with_borrow_mut(|all| {
                all.insert("DRAFTSMITH_CUDA_LIBS", folder.display().to_string());
                all.extend(switch(rank).map(|value| (SWITCH, value.to_string())));
            });
            let notes = Notes::default();
            let around = Around { variable, python: Path::new("no-such-python"), report: &notes };
            let card = Card::open(&around.search(), cards[rank]).unwrap();
            let cuda = Cuda::new(card, CudaOptions::default());
            let linked = linked(&cuda, collective, around).map_err(|error| error.to_string())?;
            assert_eq!(linked.end_peers(), Ok(()));
            Ok((linked.peers().is_some(), notes.0.into_inner().unwrap()))
        })
    }

    #[track_caller]
    fn check(found: Vec<Result<(bool, Vec<String>), String>>, has_peers: bool, begins: &str) {
        for found in found {
            let (peers, notes) = found.unwrap();
            assert_eq!(peers, has_peers, "{notes:?}");
            assert!(notes.len() == 1 && notes[0].starts_with(begins), "{notes:?}");
        }
    }

    #[test]
    fn cards_are_linked_where_all_can_be_and_the_user_is_told_what_happens() {
        let folder = libraries(true);
        let nothing = |_| None;
        check(
            linked_on(folder.path(), &[0, 1, 2], nothing),
            true,
            "train: gradients go from card to card by NCCL 2.30.7, which never ran on a card so far",
        );
        check(
            linked_on(folder.path(), &[0, 1, 0], nothing),
            false,
            "train: gradients go through host memory: ranks 0 and 2 share a card",
        );
        check(
            linked_on(folder.path(), &[0, 1], |rank| (rank == 1).then_some("off")),
            false,
            "train: gradients go through host memory: rank 1 was started with DRAFTSMITH_NCCL=off",
        );
        assert_eq!(linked_on(folder.path(), &[0], nothing), [Ok((false, Vec::new()))], "one alone");
        let wrong = linked_on(folder.path(), &[0, 1], |_| Some("on"));
        assert_eq!(wrong, vec![Err("`DRAFTSMITH_NCCL` is `on`".to_string()); 2]);
    }

    #[test]
    fn a_missing_library_leaves_the_way_over_the_host_and_names_the_package() {
        let folder = libraries(false);
        let found = linked_on(folder.path(), &[0, 1], |_| None);
        // (Unless the system has one, which this driver cannot serve.)
        if found.iter().any(Result::is_err) {
            return;
        }
        let notes = found[0].clone().unwrap().1;
        assert!(notes[0].contains("`pip install nvidia-nccl-cu13`"), "{notes:?}");
        check(found, false, "train: gradients go through host memory: rank 0: `libnccl.so.2` was not found");
    }
}
