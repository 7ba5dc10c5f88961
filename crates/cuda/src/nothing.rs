//! A device that does nothing, for measurements: what driving a card costs the host is all the time that there is.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::CudaError;
use crate::launcher::{About, At, Launch, Launcher, Product, Words};

/// A device without kernels: it takes all calls, and adds up how long it had nothing to do.
#[derive(Default)]
pub struct Nothing {
    allocated: AtomicU64,
    /// When the last result was handed out, if nothing was started since.
    resting: Mutex<Option<Instant>>,
    idle_ns: AtomicU64,
}

impl Nothing {
    /// Seconds from results to the first launch behind each, since this was last asked.
    pub fn take_idle_s(&self) -> f64 {
        self.idle_ns.swap(0, Ordering::Relaxed) as f64 / 1e9
    }

    fn resting(&self) -> MutexGuard<'_, Option<Instant>> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) {
        if let Some(since) = self.resting().take() {
            self.idle_ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

/// Memory that is an address alone.
pub struct Address(u64);

/// A launch as a card would take it.
#[derive(PartialEq, Eq, Hash)]
pub struct Taken {
    kernel: &'static str,
    grid: (usize, usize),
    words: Words,
}

impl Launcher for Nothing {
    type Memory = Address;
    type Ready = Taken;
    type Graph = ();
    type Staging = Vec<u8>;
    type Mark = ();

    fn allocate(&self, bytes: usize) -> Result<Address, CudaError> {
        Ok(Address(self.allocated.fetch_add(bytes as u64, Ordering::Relaxed)))
    }
    fn staging(&self, bytes: usize) -> Result<Vec<u8>, CudaError> {
        Ok(vec![0; bytes])
    }
    fn write(&self, _: At<'_, Address>, _: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }
    fn write_staged(&self, _: At<'_, Address>, _: &Vec<u8>, _: usize) -> Result<(), CudaError> {
        Ok(())
    }
    fn copy_beside(&self, _: &[(At<'_, Address>, Range<usize>)], _: &Vec<u8>) -> Result<(), CudaError> {
        Ok(())
    }
    fn after(&self, (): &()) -> Result<(), CudaError> {
        Ok(())
    }
    fn wait_for(&self, (): &()) -> Result<(), CudaError> {
        Ok(())
    }
    fn read(&self, _: At<'_, Address>, out: &mut [u8]) -> Result<(), CudaError> {
        out.fill(0);
        *self.resting() = Some(Instant::now());
        Ok(())
    }
    fn wait(&self) -> Result<(), CudaError> {
        Ok(())
    }
    fn ready(&self, launch: Launch<'_, Address>) -> Result<Taken, CudaError> {
        let words = Words::of(launch.args, |at| at.memory.0 + at.offset as u64);
        Ok(Taken { kernel: launch.kernel, grid: launch.grid, words })
    }
    fn start(&self, _: &Taken) -> Result<(), CudaError> {
        self.begin();
        Ok(())
    }
    fn record(&self, _: &[Taken]) -> Result<(), CudaError> {
        Ok(())
    }
    fn replay(&self, (): &()) -> Result<(), CudaError> {
        self.begin();
        Ok(())
    }
    fn about(&self) -> About {
        let none = String::from("none");
        About { number: 0, card: none.clone(), capability: none.clone(), memory: 0, driver: none }
    }
    fn memory(&self) -> Result<(u64, u64), CudaError> {
        Ok((u64::MAX, u64::MAX))
    }
    fn product(
        &self,
        _: Product,
        _: At<'_, Address>,
        _: At<'_, Address>,
        _: At<'_, Address>,
    ) -> Result<(), CudaError> {
        self.begin();
        Ok(())
    }
}
