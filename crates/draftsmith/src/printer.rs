//! Everything the user sees: results on stdout, progress on stderr.
//!
//! On a terminal a bar with rate and time left; otherwise plain lines, few enough for a log file.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use draftsmith::disk::human;
use draftsmith::report::{Report, Unit};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;

/// Without a terminal a running task writes a line this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

enum Task {
    None,
    Bar(ProgressBar),
    Lines {
        name: String,
        total: Option<u64>,
        unit: Unit,
        began: Instant,
        last: Instant,
        done: u64,
        detail: String,
    },
}

/// Progress on stderr.
pub(crate) struct Printer {
    quiet: bool,
    terminal: bool,
    task: Mutex<Task>,
}

impl Printer {
    pub(crate) fn new(quiet: bool) -> Printer {
        Printer { quiet, terminal: std::io::stderr().is_terminal(), task: Mutex::new(Task::None) }
    }

    fn task(&self) -> std::sync::MutexGuard<'_, Task> {
        self.task.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn line(&self, text: &str) {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

fn count(value: u64, unit: Unit) -> String {
    match unit {
        Unit::Bytes => human(value),
        other => format!("{value} {}", other.word()),
    }
}

/// `1h02m`, `4m10s`, `7s`.
pub(crate) fn duration(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s / 60 % 60),
    }
}

impl Report for Printer {
    fn begin(&self, task: &str, total: Option<u64>, unit: Unit) {
        if self.quiet {
            return;
        }
        let mut slot = self.task();
        if self.terminal {
            let bar = match total {
                Some(total) => ProgressBar::new(total),
                None => ProgressBar::new_spinner(),
            };
            let counts = match unit {
                Unit::Bytes => "{binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
                Unit::Rows | Unit::Steps | Unit::Tokens => "{human_pos}/{human_len} {per_sec:.dim}",
            };
            let template = match total {
                Some(_) => format!("{{prefix}} {{bar:24}} {counts} eta {{eta}} {{msg}}"),
                None => "{prefix} {spinner} {human_pos} {elapsed} {msg}".to_string(),
            };
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style);
            }
            bar.set_prefix(task.to_string());
            bar.enable_steady_tick(Duration::from_millis(250));
            *slot = Task::Bar(bar);
        } else {
            let size = total.map(|t| format!(" ({})", count(t, unit))).unwrap_or_default();
            self.line(&format!("{task}{size}"));
            let now = Instant::now();
            *slot = Task::Lines {
                name: task.to_string(),
                total,
                unit,
                began: now,
                last: now,
                done: 0,
                detail: String::new(),
            };
        }
    }

    fn at(&self, value: u64) {
        let mut slot = self.task();
        match &mut *slot {
            Task::None => {}
            Task::Bar(bar) => bar.set_position(value),
            Task::Lines { name, total, unit, last, done, detail, .. } => {
                *done = value;
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    let of = match total {
                        Some(total) if *total > 0 => {
                            format!("{} of {}", count(value, *unit), count(*total, *unit))
                        }
                        _ => count(value, *unit),
                    };
                    let line = format!("{name}: {of} {detail}");
                    self.line(line.trim_end());
                }
            }
        }
    }

    fn detail(&self, text: &str) {
        match &mut *self.task() {
            Task::None => {}
            Task::Bar(bar) => bar.set_message(text.to_string()),
            Task::Lines { detail, .. } => *detail = text.to_string(),
        }
    }

    fn end(&self) {
        let mut slot = self.task();
        match std::mem::replace(&mut *slot, Task::None) {
            Task::None => {}
            Task::Bar(bar) => bar.finish_and_clear(),
            Task::Lines { name, unit, began, done, detail, .. } => {
                let line =
                    format!("{name}: done, {} in {} {detail}", count(done, unit), duration(began.elapsed()));
                self.line(line.trim_end());
            }
        }
    }

    fn note(&self, line: &str) {
        if self.quiet {
            return;
        }
        match &*self.task() {
            Task::Bar(bar) => bar.println(line),
            Task::None | Task::Lines { .. } => self.line(line),
        }
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        if let Task::Bar(bar) = &*self.task() {
            bar.finish_and_clear();
        }
    }
}

/// Writes a result to stdout. A reader that went away (`| head`) ends us quietly.
pub(crate) fn out(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// The same for what need not be text.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    match written {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(Failure::input(
            format!("cannot write to stdout: {e}"),
            Some("free the device that stdout goes to, or send it elsewhere".to_string()),
        )),
        Ok(()) => Ok(()),
    }
}

/// Writes a result as one line of JSON.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).expect("results hold only what JSON can say");
    out(&format!("{text}\n"))
}
