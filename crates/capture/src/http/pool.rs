//! Several servers of one target: who is asked next, and who is left out.
//!
//! A request goes to the server with the fewest requests under way for its weight, of equals to the one that was fastest
//! so far. A server that fails is left out for a pause that doubles with each failure in a row; then one request tries it,
//! which first checks it as at the start: what comes back may serve another model. What a server did not answer goes to
//! the others, as a request that waits for any of them.
//!
//! Invariants: a request is at one server at a time, and its answer is handed on once; of the requests that a failing
//! server had under way all go elsewhere, but its failure counts once; while one server answers nothing ends, and once none
//! has for as long as `retries` allows, one error names all of them and why.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Failure, Fault, Flow, Note, STOP_POLL, ServerError, pause};

/// Share of the newest request in what is known of a server's pace.
const NEWEST: f64 = 0.2;

/// How many of several servers answer, for whoever looks on while requests are under way.
#[derive(Clone, Debug, Default)]
pub struct Alive(Arc<Mutex<Option<(usize, usize)>>>);

impl Alive {
    /// Servers that answer, of how many; `None` if there is but one.
    pub fn count(&self) -> Option<(usize, usize)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same for a line of progress: `, 2 of 3 servers`, or nothing.
    pub fn words(&self) -> String {
        self.count().map_or(String::new(), |(alive, all)| format!(", {alive} of {all} servers"))
    }

    fn set(&self, alive: usize, all: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((alive, all));
    }
}

/// A server of a pool.
pub(crate) struct Seat<'a> {
    pub(crate) url: &'a str,
    /// Requests under way at once.
    pub(crate) limit: usize,
    pub(crate) weight: f64,
}

/// How a server stands.
#[derive(Default)]
struct Standing {
    under_way: usize,
    /// In a row; 0 once it answered.
    failures: u32,
    /// Left out until then; `None`: it takes requests.
    until: Option<Instant>,
    /// One request tries whether it is back.
    probed: bool,
    /// Counts outages: requests that were sent before one do not tell about the time after it.
    era: u64,
    why: Option<ServerError>,
    /// The user knows that it is left out.
    told: bool,
    /// Seconds per unit of work.
    pace: Option<f64>,
}

/// Leave to send one request to one server.
struct Lease {
    place: usize,
    era: u64,
    /// It was left out before: it must be checked as at the start.
    fresh: bool,
}

/// No server answers, and none has for as long as the run file allows.
#[derive(Debug)]
struct AllLost;

/// Several servers of one target.
pub(crate) struct Pool<'a> {
    seats: Vec<Seat<'a>>,
    standings: Mutex<Vec<Standing>>,
    /// A server got room, or stands otherwise than before.
    changed: Condvar,
    retries: u32,
    note: Note<'a>,
    alive: Alive,
}

/// What an attempt at one server gives: the answer and its units of work, or `None` if it was called off.
type Attempt<T> = Result<Option<(T, u64)>, Failure>;

impl<'a> Pool<'a> {
    pub(crate) fn new(seats: Vec<Seat<'a>>, retries: u32, note: Note<'a>, alive: Alive) -> Pool<'a> {
        let standings = seats.iter().map(|_| Standing::default()).collect();
        alive.set(seats.len(), seats.len());
        Pool { seats, standings: Mutex::new(standings), changed: Condvar::new(), retries, note, alive }
    }

    /// Requests under way at once, over all servers.
    pub(crate) fn capacity(&self) -> usize {
        self.seats.iter().map(|seat| seat.limit).sum()
    }

    fn standings(&self) -> MutexGuard<'_, Vec<Standing>> {
        self.standings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks all servers at once, before the first request. One that cannot be reached is left out; `None` stands in its
    /// place. `None` in place of all: it was called off.
    ///
    /// # Errors
    /// What is wrong with any of them, as far as another attempt would not mend it; no connection to any.
    pub(crate) fn check_all<T: Send>(
        &self,
        row: &str,
        flow: &Flow<'_>,
        check: &(dyn Fn(usize) -> Result<Option<T>, Failure> + Sync),
    ) -> Result<Option<Vec<Option<T>>>, ServerError> {
        let leases: Vec<Lease> = (0..self.seats.len()).map(|place| self.take(place, false)).collect();
        let results: Vec<Result<Option<T>, Failure>> = std::thread::scope(|scope| {
            let under_way: Vec<_> = leases.iter().map(|l| scope.spawn(move || check(l.place))).collect();
            let ended = under_way.into_iter().map(|thread| thread.join());
            ended.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let (mut found, mut wrong, mut reached) = (Vec::new(), Vec::new(), false);
        for (lease, result) in leases.iter().zip(results) {
            let failure = match result {
                Ok(result) => {
                    self.give_back(lease);
                    if result.is_none() && flow.is_cancelled() {
                        return Ok(None);
                    }
                    reached = true;
                    found.push(result);
                    continue;
                }
                Err(failure) => failure,
            };
            found.push(None);
            match failure {
                Failure::Lasting(error) => {
                    self.give_back(lease);
                    wrong.push(error);
                }
                Failure::Passing(fault) => {
                    reached |= !matches!(fault, Fault::NoConnection { .. });
                    self.left_out(lease, row, Failure::Passing(fault), true);
                }
            }
        }
        match wrong.len() {
            0 if reached => Ok(Some(found)),
            // A wrong address would only be told after minutes.
            0 => Err(self.none_left(row, BTreeMap::new())),
            1 => Err(wrong.remove(0)),
            _ => Err(ServerError::Several { each: wrong }),
        }
    }

    /// Has a request answered by one server after the other, until one does; `None` if it was called off.
    ///
    /// `attempt` gets the server's place and whether it must be checked first.
    pub(crate) fn ask<T>(
        &self,
        row: &str,
        flow: &Flow<'_>,
        attempt: &dyn Fn(usize, bool) -> Attempt<T>,
    ) -> Result<Option<T>, ServerError> {
        // What each server said to this request the last time, and those that will not be asked again for it.
        let (mut said, mut refused) = (BTreeMap::new(), Vec::new());
        let mut attempts = 0;
        loop {
            let lease = match self.lease(flow, &refused) {
                Ok(Some(lease)) => lease,
                Ok(None) => return Ok(None),
                Err(AllLost) => return Err(self.none_left(row, said)),
            };
            let began = Instant::now();
            let failure = match attempt(lease.place, lease.fresh) {
                Ok(Some((answer, units))) => {
                    self.answered(&lease, began.elapsed(), units);
                    return Ok(Some(answer));
                }
                Ok(None) => {
                    self.give_back(&lease);
                    return Ok(None);
                }
                Err(failure) => failure,
            };
            attempts += 1;
            said.insert(lease.place, self.error_of(&lease, row, &failure, 1));
            match &failure {
                Failure::Passing(_) => self.left_out(&lease, row, failure, false),
                Failure::Lasting(error) => {
                    refused.push(lease.place);
                    match error.is_of_the_request() {
                        true => self.give_back(&lease),
                        false => self.left_out(&lease, row, failure, true),
                    }
                }
            }
            let patience = (self.retries as usize + 1).saturating_mul(self.seats.len());
            if refused.len() == self.seats.len()
                || attempts >= patience
                || flow.draining.load(Ordering::Relaxed)
            {
                return Err(self.none_left(row, said));
            }
        }
    }

    /// The error that names all servers: what each said to this request, or why it is left out.
    fn none_left(&self, row: &str, mut said: BTreeMap<usize, ServerError>) -> ServerError {
        let standings = self.standings();
        let why = |(place, standing): (usize, &Standing)| said.remove(&place).or(standing.why.clone());
        ServerError::NoneLeft {
            row: row.to_string(),
            each: standings.iter().enumerate().filter_map(why).collect(),
        }
    }

    /// Waits for the least busy server that is not among `refused`; `None` if it was called off.
    fn lease(&self, flow: &Flow<'_>, refused: &[usize]) -> Result<Option<Lease>, AllLost> {
        let mut standings = self.standings();
        loop {
            if flow.is_cancelled() || flow.draining.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let now = Instant::now();
            let open = (0..self.seats.len()).filter(|place| !refused.contains(place));
            let room = |place: &usize| {
                let standing = &standings[*place];
                standing.until.is_none() && standing.under_way < self.seats[*place].limit
            };
            let busy = |place: usize| standings[place].under_way as f64 / self.seats[place].weight;
            // One that was not measured yet comes first.
            let pace = |place: usize| standings[place].pace.unwrap_or(0.0);
            let least_busy = open
                .clone()
                .filter(room)
                .min_by(|a, b| busy(*a).total_cmp(&busy(*b)).then(pace(*a).total_cmp(&pace(*b))));
            if let Some(place) = least_busy {
                return Ok(Some(Self::begin(&mut standings, place, false)));
            }
            let due = |place: &usize| {
                let standing = &standings[*place];
                !standing.probed && standing.until.is_some_and(|until| until <= now)
            };
            if let Some(place) = open.clone().filter(due).min_by_key(|place| standings[*place].until) {
                return Ok(Some(Self::begin(&mut standings, place, true)));
            }
            let lost = |place: usize| {
                let standing = &standings[place];
                standing.until.is_some() && !standing.probed && standing.failures > self.retries
            };
            if open.clone().all(lost) {
                return Err(AllLost);
            }
            let next = open.filter_map(|place| standings[place].until).min();
            let wait = next.map_or(STOP_POLL, |until| until.saturating_duration_since(now).min(STOP_POLL));
            let wait = wait.max(Duration::from_millis(1));
            standings = self.changed.wait_timeout(standings, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn take(&self, place: usize, fresh: bool) -> Lease {
        Self::begin(&mut self.standings(), place, fresh)
    }

    fn begin(standings: &mut [Standing], place: usize, fresh: bool) -> Lease {
        let standing = &mut standings[place];
        standing.under_way += 1;
        standing.probed |= fresh;
        Lease { place, era: standing.era, fresh }
    }

    /// Ends a lease; `change` sees how the server stands, unless it failed since the lease began.
    fn end(&self, lease: &Lease, change: impl FnOnce(&mut Standing)) {
        let mut standings = self.standings();
        let standing = &mut standings[lease.place];
        standing.under_way -= 1;
        if standing.era == lease.era {
            standing.probed &= !lease.fresh;
            change(standing);
        }
        let alive = standings.iter().filter(|standing| standing.until.is_none()).count();
        self.alive.set(alive, self.seats.len());
        drop(standings);
        self.changed.notify_all();
    }

    fn give_back(&self, lease: &Lease) {
        self.end(lease, |_| {});
    }

    fn answered(&self, lease: &Lease, took: Duration, units: u64) {
        let pace = took.as_secs_f64() / units.max(1) as f64;
        let mut back = false;
        self.end(lease, |standing| {
            standing.pace = Some(standing.pace.map_or(pace, |before| before + NEWEST * (pace - before)));
            standing.failures = 0;
            standing.why = None;
            if standing.until.take().is_some() {
                back = std::mem::take(&mut standing.told);
            }
        });
        if back {
            (self.note)(&format!("`{}` answers again", self.seats[lease.place].url));
        }
    }

    /// A failure as an error that names the server.
    fn error_of(&self, lease: &Lease, row: &str, failure: &Failure, attempts: u32) -> ServerError {
        match failure {
            Failure::Lasting(error) => error.clone(),
            Failure::Passing(fault) => ServerError::GaveUp {
                url: self.seats[lease.place].url.to_string(),
                row: row.to_string(),
                attempts,
                last: fault.clone(),
            },
        }
    }

    /// Leaves a server out for a while. `tell`: at once; else when it is not back at the first try, as single faults are
    /// common where many share a server.
    fn left_out(&self, lease: &Lease, row: &str, failure: Failure, tell: bool) {
        let (fault, why) = match &failure {
            Failure::Passing(fault) => (fault.clone(), fault.to_string()),
            Failure::Lasting(error) => (Fault::Cut, error.to_string()),
        };
        let mut said = None;
        self.end(lease, |standing| {
            standing.era += 1;
            standing.failures = standing.failures.saturating_add(1);
            standing.probed = false;
            let pause = pause(standing.failures, &fault, RandomState::new().hash_one(lease.place));
            standing.until = Some(Instant::now() + pause);
            standing.why = Some(self.error_of(lease, row, &failure, standing.failures));
            if !standing.told && (tell || standing.failures > 1) {
                standing.told = true;
                said = Some(pause);
            }
        });
        if let Some(pause) = said {
            (self.note)(&format!(
                "`{}` is left out: {why}; it is tried again in {:.0} s, then less and less often",
                self.seats[lease.place].url,
                pause.as_secs_f64().max(1.0)
            ));
        }
    }
}

/// The model that all servers list, of those that were asked; one for requests without a name is empty.
///
/// # Errors
/// [`ServerError::DifferentModels`].
pub(crate) fn one_model<'u>(
    listed: impl Iterator<Item = (&'u str, Option<String>)>,
) -> Result<Option<String>, ServerError> {
    let each: Vec<(String, String)> =
        listed.filter_map(|(url, model)| Some((url.to_string(), model?))).collect();
    if each.windows(2).any(|pair| pair[0].1 != pair[1].1) {
        return Err(ServerError::DifferentModels { each });
    }
    Ok(each.into_iter().next().map(|(_, model)| model))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    fn pool(weights: &[f64], limit: usize, retries: u32) -> Pool<'static> {
        let seats = weights.iter().enumerate().map(|(place, weight)| Seat {
            url: ["http://a", "http://b", "http://c"][place],
            limit,
            weight: *weight,
        });
        Pool::new(seats.collect(), retries, Arc::new(|_: &str| {}), Alive::default())
    }

    fn refused() -> Failure {
        Failure::Lasting(ServerError::Refused {
            url: "http://a".into(),
            row: "r".into(),
            status: 400,
            message: String::new(),
        })
    }

    fn places(pool: &Pool<'_>, flow: &Flow<'_>, count: usize) -> Vec<usize> {
        (0..count).map(|_| pool.lease(flow, &[]).unwrap().unwrap().place).collect()
    }

    #[test]
    fn the_least_busy_server_for_its_weight_comes_first_and_of_equals_the_fastest() {
        let stop = AtomicBool::new(false);
        let flow = Flow::new(&stop);
        assert_eq!(places(&pool(&[1.0, 1.0, 1.0], 2, 0), &flow, 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(places(&pool(&[1.0, 2.0], 9, 0), &flow, 6), [0, 1, 1, 0, 1, 1]);
        let measured = pool(&[1.0, 1.0, 1.0], 4, 0);
        for (place, pace) in [(0, 3.0), (1, 1.0), (2, 2.0)] {
            measured.standings()[place].pace = Some(pace);
        }
        assert_eq!(places(&measured, &flow, 4), [1, 2, 0, 1]);
    }

    #[test]
    fn a_failure_counts_once_for_all_that_was_under_way_and_its_requests_go_elsewhere() {
        let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (pool, flow) = (pool(&[1.0, 1.0], 8, 1), Flow::new(&stop));
        let sent: Vec<Lease> = (0..8).map(|_| pool.lease(&flow, &[]).unwrap().unwrap()).collect();
        for lease in sent.iter().filter(|lease| lease.place == 0) {
            pool.left_out(lease, "r", Failure::Passing(Fault::Cut), false);
        }
        let first = |pool: &Pool<'_>| {
            let standings = pool.standings();
            (standings[0].failures, standings[0].under_way)
        };
        assert_eq!(first(&pool), (1, 0));
        assert_eq!(pool.alive.words(), ", 1 of 2 servers");
        let answer = pool.ask("r", &flow, &|place, fresh| {
            asked.fetch_add(1, Ordering::Relaxed);
            assert!(!fresh);
            Ok(Some((place, 1)))
        });
        assert_eq!((answer.unwrap(), asked.into_inner()), (Some(1), 1));
    }

    #[test]
    fn a_server_that_comes_back_is_checked_before_it_is_used() {
        let stop = AtomicBool::new(false);
        let (pool, flow) = (pool(&[1.0, 1.0], 1, 9), Flow::new(&stop));
        // Only the second server is left, and it is busy, so the request waits for the first.
        let lease = pool.take(0, false);
        pool.left_out(&lease, "r", Failure::Passing(Fault::Cut), false);
        let busy = pool.take(1, false);
        let answer = pool.ask("r", &flow, &|place, fresh| Ok(Some(((place, fresh), 1)))).unwrap();
        assert_eq!(answer, Some((0, true)));
        assert_eq!(pool.alive.count(), Some((2, 2)));
        pool.give_back(&busy);
    }

    #[test]
    fn once_all_are_lost_one_error_names_each_and_why() {
        let stop = AtomicBool::new(false);
        let (pool, flow) = (pool(&[1.0, 1.0], 4, 1), Flow::new(&stop));
        let error = pool.ask::<()>("r", &flow, &|place, _| {
            Err(Failure::Passing(match place {
                0 => Fault::Silence,
                _ => Fault::Status { status: 503, message: "busy".into(), retry_after: None },
            }))
        });
        let error = error.unwrap_err().to_string();
        for part in ["no server is left for `r`", "`http://a`", "silence", "`http://b`", "status 503: busy"] {
            assert!(error.contains(part), "{error}");
        }
        // What the servers themselves refuse is the request's own fault, and nobody waits.
        let calm = self::pool(&[1.0, 1.0], 4, 100);
        let error = calm.ask::<()>("r", &flow, &|_, _| Err(refused())).unwrap_err();
        assert!(matches!(&error, ServerError::NoneLeft { each, .. } if each.len() == 2), "{error}");
        assert_eq!(calm.alive.count(), Some((2, 2)), "a refused request says nothing about the server");
    }

    #[test]
    fn servers_that_are_wrong_at_the_start_are_all_named() {
        let stop = AtomicBool::new(false);
        let flow = Flow::new(&stop);
        type Check = fn() -> Result<Option<u8>, Failure>;
        let check =
            |results: [Check; 3]| pool(&[1.0; 3], 1, 8).check_all("r", &flow, &|place| results[place]());
        let lost = || Err(Failure::Passing(Fault::NoConnection { reason: "refused".into() }));
        let well = || Ok(Some(1));
        assert_eq!(check([well, lost, well]).unwrap(), Some(vec![Some(1), None, Some(1)]));
        assert!(matches!(check([well, || Err(refused()), lost]), Err(ServerError::Refused { .. })));
        let several = check([|| Err(refused()), well, || Err(refused())]);
        assert!(matches!(several, Err(ServerError::Several { each }) if each.len() == 2));
        assert!(
            matches!(check([lost, lost, lost]), Err(ServerError::NoneLeft { each, .. }) if each.len() == 3)
        );
    }
}
