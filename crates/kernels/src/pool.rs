//! A persistent worker pool for jobs of microseconds.
//!
//! Workers spin briefly for the next job, then sleep. A job is a number of tasks; whoever is awake claims the next
//! task index. A sleeping worker is woken but not waited for: only workers that entered a job are. Which thread
//! computes a task never changes its result, because tasks write disjoint outputs.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};

/// Spin rounds before a waiting worker sleeps; about 50 µs at 140 cycles a pause.
const SPIN_ROUNDS: u32 = 1 << 10;
/// Set in `Shared::gate` while a job accepts workers; the low bits count workers inside.
const OPEN: u64 = 1 << 32;

type Task<'a> = &'a (dyn Fn(usize) + Sync + 'a);

struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    epoch: AtomicU64,
    gate: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the thread that holds `Pool::busy` while the gate is closed and empty, and read
// only by workers that entered through the open gate; the raw pointer outlives the job because `run` does not
// return before the gate is empty again.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is to a `Sync` closure.
unsafe impl Send for Shared {}

/// A pointer that tasks share.
pub(crate) struct SendPtr<T>(pub *mut T);
// SAFETY: tasks write disjoint parts behind the pointer; every use says which.
unsafe impl<T> Sync for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Send for SendPtr<T> {}
impl<T> SendPtr<T> {
    /// Through a method, so that closures capture the wrapper and not the pointer.
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

/// The pool. Dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    busy: Mutex<()>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` in total, the caller's included.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("kernels-{i}"))
                    .spawn(move || work(&shared))
                    .expect("the operating system refused a thread")
            })
            .collect();
        Pool { shared, busy: Mutex::new(()), workers }
    }

    /// Threads in total, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0..tasks)`, each index once, and returns when all are done.
    ///
    /// A call from inside a task, or while another thread uses the pool, runs on the calling thread alone.
    ///
    /// # Panics
    /// If a task panics. Who catches that finds the pool as it was, with all its threads.
    pub fn run(&self, tasks: usize, task: Task<'_>) {
        let guard = match self.busy.try_lock() {
            _ if self.workers.is_empty() || tasks <= 1 => None,
            Ok(guard) => Some(guard),
            // A task of an earlier job panicked in its caller. The lock guards no data, and `CloseGate` left the pool
            // ready: taken for busy, it would run on one thread for good.
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_guard) = guard else {
            (0..tasks).for_each(task);
            return;
        };
        let shared = &*self.shared;
        // SAFETY: the gate is closed and empty (the previous `run` waited for that), and `busy` keeps other
        // callers out; erasing the lifetime is sound because this function waits for the gate to empty below.
        unsafe {
            let task: *const (dyn Fn(usize) + Sync) = std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(task);
            *shared.job.get() = Some(Job { task, tasks });
        }
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.store(OPEN, Ordering::Release);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let closer = CloseGate { shared };
        loop {
            let index = shared.next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            task(index);
        }
        drop(closer);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a pool task panicked");
    }
}

/// Closes the gate and waits for the workers inside, also when the caller's own task panics.
struct CloseGate<'a> {
    shared: &'a Shared,
}

impl Drop for CloseGate<'_> {
    fn drop(&mut self) {
        // A panicking caller must not let workers start more tasks.
        if std::thread::panicking() {
            self.shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        }
        self.shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut rounds = 0u32;
        while self.shared.gate.load(Ordering::Acquire) != 0 {
            rounds += 1;
            if rounds > SPIN_ROUNDS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        // The caller's own panic says it already; the next job must not be blamed for this one.
        if std::thread::panicking() {
            self.shared.panicked.store(false, Ordering::Relaxed);
        }
    }
}

fn enter(shared: &Shared) -> bool {
    let mut gate = shared.gate.load(Ordering::Acquire);
    while gate & OPEN != 0 {
        match shared.gate.compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => gate = now,
        }
    }
    false
}

fn work(shared: &Shared) {
    let mut seen = 0u64;
    loop {
        let mut rounds = 0u32;
        while shared.epoch.load(Ordering::Acquire) == seen {
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            rounds += 1;
            if rounds < SPIN_ROUNDS {
                std::hint::spin_loop();
                continue;
            }
            let lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.sleepers.fetch_add(1, Ordering::SeqCst);
            let lock = shared
                .wake
                .wait_while(lock, |()| {
                    shared.epoch.load(Ordering::SeqCst) == seen && !shared.stop.load(Ordering::Relaxed)
                })
                .unwrap_or_else(PoisonError::into_inner);
            shared.sleepers.fetch_sub(1, Ordering::SeqCst);
            drop(lock);
            rounds = 0;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        if !enter(shared) {
            continue;
        }
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: the gate was open when this worker entered, so the job is set and stays until it leaves.
            let job = unsafe { (*shared.job.get()).as_ref() }.expect("an open gate has a job");
            loop {
                let index = shared.next.fetch_add(1, Ordering::Relaxed);
                if index >= job.tasks {
                    break;
                }
                // SAFETY: see `Pool::run`: the closure outlives the open gate.
                unsafe { (*job.task)(index) };
            }
        }));
        if done.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.gate.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _lock = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_thread_count() {
        for threads in 1..5 {
            let pool = Pool::new(threads);
            for tasks in [0usize, 1, 2, 7, 100] {
                for _ in 0..200 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let sum = AtomicUsize::new(0);
            pool.run(50, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 49 * 50 / 2);
        }
    }

    #[test]
    fn a_call_inside_a_task_runs_in_place() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.load(Ordering::Relaxed), 12);
    }

    #[test]
    fn a_panicking_task_panics_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|i| assert!(i != 5, "task 5 fails on purpose"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(4, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 6);
    }

    /// Tasks that wait until every thread of the pool is in one: true if all came.
    fn all_threads_work(pool: &Pool) -> bool {
        let inside = AtomicUsize::new(0);
        let all = AtomicUsize::new(0);
        let began = std::time::Instant::now();
        pool.run(pool.threads(), &|_| {
            inside.fetch_add(1, Ordering::SeqCst);
            // Alone on one thread, the first task would wait here in vain.
            while inside.load(Ordering::SeqCst) < pool.threads() && began.elapsed().as_secs() < 5 {
                std::thread::yield_now();
            }
            all.fetch_max(inside.load(Ordering::SeqCst), Ordering::SeqCst);
        });
        all.load(Ordering::SeqCst) == pool.threads() && began.elapsed().as_secs() < 5
    }

    #[test]
    fn after_a_caught_panic_the_pool_has_all_its_threads() {
        let pool = Pool::new(3);
        assert!(all_threads_work(&pool));
        for _ in 0..20 {
            // Every task panics, so the caller's do, too: its guard is dropped while it unwinds.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(30, &|i| panic!("task {i} fails on purpose"));
            }));
            assert!(result.is_err());
            // A worker's panic of that job is not laid to this one.
            assert!(all_threads_work(&pool), "the pool is serial");
        }
    }
}
