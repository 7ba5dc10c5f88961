//! This machine: the kernels that it always has, and what its processor is called.

use draftsmith_kernels::Cpu;

/// The kernels that every machine has: those of work that nobody gives a device.
pub type Host = Cpu;

/// Threads to compute with when nobody says: as many as the process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the processor calls itself, or `unknown`.
pub fn cpu_name() -> String {
    told_cpu_name().unwrap_or_else(|| "unknown".to_string())
}

/// What the processor calls itself, where the system tells.
pub(crate) fn told_cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}
