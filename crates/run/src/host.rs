//! This machine: the kernels that it always has, and what its processor is called.

use draftsmith_kernels::Cpu;

/// The kernels that every machine has: those of work that nobody gives a device.
pub type Host = Cpu;

/// Threads to compute with when nobody says: as many as the process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the processor calls itself.
pub fn cpu_name() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        })
        .unwrap_or_else(|| "unknown".to_string())
}
