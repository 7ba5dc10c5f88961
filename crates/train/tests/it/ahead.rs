//! Rows that a thread reads while the device computes: the same training, and errors where they belong.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use draftsmith_cuda::Cuda;
use draftsmith_cuda::shim::Shim;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_train::{
    Alone, Eagle3Options, Flow, Hooks, Outcome, ReplayOptions, RowStore, TrainError, TrainOptions, train,
};

use crate::golden::cuda_shim;
use crate::infer::Random;
use crate::learning::{Memory, options};

/// Who read which rows.
type Reads = Arc<Mutex<Vec<(ThreadId, Vec<usize>)>>>;

/// Rows that may be read by any thread.
struct Anywhere {
    rows: Memory,
    reads: Reads,
    /// A row that cannot be read.
    broken: Option<usize>,
}

impl RowStore for Anywhere {
    fn num_rows(&self) -> usize {
        self.rows.num_rows()
    }
    fn row_slots(&self, row: usize) -> usize {
        self.rows.row_slots(row)
    }
    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        self.reads.lock().unwrap().push((std::thread::current().id(), rows.to_vec()));
        match self.broken.filter(|row| rows.contains(row)) {
            Some(row) => Err(format!("row {row} is broken").into()),
            None => self.rows.read(rows),
        }
    }
    fn beside(&mut self) -> Option<&mut (dyn RowStore + Send)> {
        Some(self)
    }
}

fn run(
    device: Cuda<Shim>,
    random: &Random,
    store: &mut dyn RowStore,
    options: &TrainOptions,
) -> Result<Outcome, TrainError> {
    let mut method = random.method_on(device, Eagle3Options { ttt_length: 2, ..Eagle3Options::default() });
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective: &Alone };
    train(&mut method, store, options, hooks)
}

fn settings(dir: &Path, replay: Option<ReplayOptions>) -> TrainOptions {
    TrainOptions {
        tokens_per_step: 64,
        pack_slots: 32,
        max_steps: Some(5),
        epochs: 9,
        validate_every: None,
        replay,
        ..options(dir)
    }
}

fn draft(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("last/model.safetensors")).unwrap()
}

#[test]
fn rows_that_another_thread_reads_train_the_same_draft() {
    let random = Random::new(8, &[9, 20, 14, 30, 7, 25, 11]);
    for replay in [None, Some(ReplayOptions { share: 0.4, tokens: 24, every: 1, buffer: 6 })] {
        let here = tempfile::tempdir().unwrap();
        let mut rows = Memory(random.rows.clone());
        run(cuda_shim(), &random, &mut rows, &settings(here.path(), replay)).unwrap();
        let (beside, reads) = (tempfile::tempdir().unwrap(), Reads::default());
        let mut store = Anywhere { rows, reads: Arc::clone(&reads), broken: None };
        run(cuda_shim(), &random, &mut store, &settings(beside.path(), replay)).unwrap();
        assert!(draft(beside.path()) == draft(here.path()), "{replay:?}");
        let reads = reads.lock().unwrap();
        assert!(
            reads.iter().all(|(thread, _)| *thread != std::thread::current().id() && *thread == reads[0].0)
        );
        // Two packs a step, none of them in vain; with replay one more in each step but the first.
        let replayed = if replay.is_some() { 4 } else { 0 };
        assert_eq!(reads.len(), 5 * 2 + replayed);
    }
}

#[test]
fn a_row_that_cannot_be_read_ends_training_when_its_turn_comes() {
    let random = Random::new(8, &[32, 32, 32, 32, 32, 32, 32]);
    let reads = Reads::default();
    let mut store = Anywhere { reads: Arc::clone(&reads), ..store_of(&random) };
    let dir = tempfile::tempdir().unwrap();
    run(cuda_shim(), &random, &mut store, &settings(dir.path(), None)).unwrap();
    // The first row of the third step.
    let broken = reads.lock().unwrap()[4].1[0];
    for checkpoint_every in [1, 100] {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Anywhere { broken: Some(broken), ..store_of(&random) };
        let options = TrainOptions { checkpoint_every, ..settings(dir.path(), None) };
        let error = run(cuda_shim(), &random, &mut store, &options).unwrap_err();
        let TrainError::Rows { source } = error else { panic!("{error}") };
        assert_eq!(source.to_string(), format!("row {broken} is broken"));
        let log = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
        assert_eq!(log.lines().count(), 2, "two steps were done");
    }
}

fn store_of(random: &Random) -> Anywhere {
    Anywhere { rows: Memory(random.rows.clone()), reads: Arc::default(), broken: None }
}
