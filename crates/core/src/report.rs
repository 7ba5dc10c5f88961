//! How long work tells what it is doing, and how it is asked to stop.
//!
//! The library never prints. It is handed a [`Report`] and a [`Stop`]; the binary draws bars on a terminal and
//! writes plain lines otherwise, a program that embeds us does what it likes.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a task counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes moved.
    Bytes,
    /// Rows of a corpus.
    Rows,
    /// Optimiser steps.
    Steps,
    /// Tokens.
    Tokens,
}

impl Unit {
    /// The word after a count.
    pub fn word(self) -> &'static str {
        match self {
            Unit::Bytes => "bytes",
            Unit::Rows => "rows",
            Unit::Steps => "steps",
            Unit::Tokens => "tokens",
        }
    }
}

/// Where progress goes. One task at a time.
pub trait Report: Sync {
    /// A task begins; `total` is `None` when nobody knows it.
    fn begin(&self, task: &str, total: Option<u64>, unit: Unit);
    /// So much of the task is done, counted from its beginning.
    fn at(&self, done: u64);
    /// Numbers beside the bar, for example `loss 2.31`.
    fn detail(&self, text: &str);
    /// The task is over.
    fn end(&self);
    /// One line for the user, outside any task.
    fn note(&self, line: &str);
}

/// Says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Report for Silent {
    fn begin(&self, _task: &str, _total: Option<u64>, _unit: Unit) {}
    fn at(&self, _done: u64) {}
    fn detail(&self, _text: &str) {}
    fn end(&self) {}
    fn note(&self, _line: &str) {}
}

/// A request to stop at the next safe point: what is on disk then is what a later run goes on from.
#[derive(Debug, Default, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// True once somebody asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// For the callbacks of long work: goes on until somebody asks.
    pub fn flow(&self) -> ControlFlow<()> {
        if self.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// The flag itself, for code that polls a plain atomic.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }

    /// A shared handle to the flag.
    pub fn shared(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}
