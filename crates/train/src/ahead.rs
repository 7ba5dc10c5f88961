//! Packs that are read while the device computes: a thread has the store, and fills the next pack before it is asked for. Where the
//! device has a [`Courier`] the thread sends the states there, too.
//!
//! What is read, and what training does with it, is the same as without the thread: packs are handed out in the order of the calls, and
//! an error of a pack that was read ahead is that of the call which asks for it.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::{Coming, Courier, DeviceFailure, TrainKernels, catch_failure};

use crate::{DeviceStates, Pack, PackShape, RowStore, TrainError};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A pack by what it holds.
type Key = (Vec<usize>, PackShape);

/// What the thread is asked.
enum Request {
    Fill(Key),
    Read(Vec<usize>),
    Expect(Vec<Vec<usize>>),
}

/// What it answers, in the order of the requests; to what is expected nothing.
enum Answer<B> {
    Filled(Box<Filled<B>>),
    Read(Result<Vec<CaptureRow>, BoxError>),
}

/// A pack, with its states where they are on their way to the device; how the device failed.
type Filled<B> = Result<Result<(Pack, Option<Coming<B>>), TrainError>, DeviceFailure>;

/// Fills a pack, and sends its states.
fn filled<B>(
    store: &mut dyn RowStore,
    (rows, shape): &Key,
    courier: Option<&dyn Courier<B>>,
) -> Result<(Pack, Option<Coming<B>>), TrainError> {
    let mut pack = Pack::default();
    store.fill(rows, *shape, &mut pack)?;
    let coming = courier.filter(|_| pack.on_device.is_none());
    let coming = coming.and_then(|courier| courier.send(&[&pack.features, &pack.last]));
    if coming.is_some() {
        (pack.features, pack.last) = (Vec::new(), Vec::new());
    }
    Ok((pack, coming))
}

/// A store whose next pack is under way.
pub(crate) struct Ahead<K: TrainKernels> {
    requests: Sender<Request>,
    answers: Receiver<Answer<K::Buf>>,
    /// Slots of each row.
    slots: Vec<usize>,
    /// Packs that will be asked for, the next one first.
    coming: VecDeque<Vec<usize>>,
    /// The pack that the thread was asked for before anybody wanted it; with it once it was seen.
    next: Option<(Key, Option<Filled<K::Buf>>)>,
}

impl<K: TrainKernels> Ahead<K> {
    /// A thread that has the store until this is dropped, and sends states to the device of `kernels`.
    pub(crate) fn new<'scope>(
        scope: &'scope Scope<'scope, '_>,
        store: &'scope mut (dyn RowStore + Send),
        kernels: &K,
    ) -> Ahead<K> {
        let courier = kernels.courier();
        let slots = (0..store.num_rows()).map(|row| store.row_slots(row)).collect();
        let ((requests, asked), (said, answers)) = (channel(), channel());
        scope.spawn(move || {
            while let Ok(request) = asked.recv() {
                let answer = match request {
                    Request::Fill(key) => {
                        Answer::Filled(Box::new(catch_failure(|| filled(store, &key, courier.as_deref()))))
                    }
                    Request::Read(rows) => Answer::Read(store.read(&rows)),
                    Request::Expect(packs) => {
                        store.expect(&packs);
                        continue;
                    }
                };
                // Nobody waits any more.
                if said.send(answer).is_err() {
                    return;
                }
            }
        });
        Ahead { requests, answers, slots, coming: VecDeque::new(), next: None }
    }

    fn ask(&self, request: Request) {
        // A thread that ended by a panic is heard of where its answer is missing.
        let _ = self.requests.send(request);
    }

    /// The answer to the last request: one that was asked for before comes first, and is kept.
    fn answer(&mut self) -> Answer<K::Buf> {
        self.next = match self.next.take() {
            Some((key, None)) => {
                let Answer::Filled(pack) = self.hear() else { unreachable!("a pack was asked for first") };
                Some((key, Some(*pack)))
            }
            seen => seen,
        };
        self.hear()
    }

    /// Asks for the pack that is wanted next, if that is known and not under way.
    fn look_ahead(&mut self, shape: PackShape) {
        let wanted = self.coming.front().map(|rows| (rows.clone(), shape));
        if self.next.as_ref().map(|(key, _)| key) == wanted.as_ref() {
            return;
        }
        // What nobody will ask for is heard and dropped.
        if let Some((_, None)) = self.next.take() {
            self.hear();
        }
        if let Some(key) = wanted {
            self.ask(Request::Fill(key.clone()));
            self.next = Some((key, None));
        }
    }

    fn hear(&self) -> Answer<K::Buf> {
        self.answers.recv().expect("the thread that reads lives as long as this")
    }

    fn take(&mut self, rows: &[usize], shape: PackShape) -> Filled<K::Buf> {
        if let Some((_, pack)) =
            self.next.take_if(|((known, for_shape), _)| known == rows && *for_shape == shape)
        {
            return pack.unwrap_or_else(|| match self.hear() {
                Answer::Filled(pack) => *pack,
                Answer::Read(_) => unreachable!("a pack was asked for first"),
            });
        }
        self.ask(Request::Fill((rows.to_vec(), shape)));
        match self.answer() {
            Answer::Filled(pack) => *pack,
            Answer::Read(_) => unreachable!("a pack was asked for"),
        }
    }
}

impl<K: TrainKernels> RowStore for Ahead<K> {
    fn num_rows(&self) -> usize {
        self.slots.len()
    }

    fn row_slots(&self, row: usize) -> usize {
        self.slots[row]
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, BoxError> {
        self.ask(Request::Read(rows.to_vec()));
        match self.answer() {
            Answer::Read(rows) => rows,
            Answer::Filled(_) => unreachable!("rows were asked for"),
        }
    }

    fn fill(&mut self, rows: &[usize], shape: PackShape, pack: &mut Pack) -> Result<(), TrainError> {
        assert!(pack.is_empty(), "a pack is filled once");
        let filled = self.take(rows, shape);
        let filled = filled.unwrap_or_else(|failure| failure.raise());
        if self.coming.front().is_some_and(|next| next == rows) {
            self.coming.pop_front();
        }
        self.look_ahead(shape);
        let (filled, coming) = filled?;
        *pack = Pack { pass: pack.pass, ..filled };
        if let Some(coming) = coming {
            pack.on_device = Some(DeviceStates::arrived::<K>(coming));
        }
        Ok(())
    }

    fn looks_ahead(&self) -> bool {
        true
    }

    fn expect(&mut self, packs: &[Vec<usize>]) {
        self.ask(Request::Expect(packs.to_vec()));
        self.coming = packs.iter().cloned().collect();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use draftsmith_kernels::Cpu;

    use super::*;

    /// Rows of one slot each; notes what it was asked.
    struct Noting(Arc<Mutex<Vec<String>>>);

    impl RowStore for Noting {
        fn num_rows(&self) -> usize {
            9
        }
        fn row_slots(&self, row: usize) -> usize {
            row
        }
        fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, BoxError> {
            self.0.lock().unwrap().push(format!("{rows:?}"));
            if rows.contains(&8) {
                return Err("broken".into());
            }
            let row = |n: &usize| CaptureRow {
                ids: vec![*n as u32],
                loss_mask: vec![true],
                features: vec![0.5],
                last: vec![0.25],
            };
            Ok(rows.iter().map(row).collect())
        }
        fn expect(&mut self, packs: &[Vec<usize>]) {
            self.0.lock().unwrap().push(format!("expect {packs:?}"));
        }
    }

    const SHAPE: PackShape = PackShape { row_slots: 4, feature_width: 1, last_width: 1 };

    #[test]
    fn packs_come_as_they_are_asked_for_and_errors_with_them() {
        let notes = Arc::default();
        let mut store = Noting(Arc::clone(&notes));
        std::thread::scope(|scope| {
            let mut ahead = Ahead::new(scope, &mut store, &Cpu::new(1));
            assert_eq!((ahead.num_rows(), ahead.row_slots(7)), (9, 7));
            let fill = |ahead: &mut Ahead<Cpu>, rows: &[usize], shape| {
                let mut pack = Pack { pass: 5, ..Pack::default() };
                ahead.fill(rows, shape, &mut pack).map(|()| {
                    assert_eq!((pack.pass, pack.features.len()), (5, rows.len()));
                    pack.ids
                })
            };
            ahead.expect(&[vec![1, 2], vec![3], vec![8], vec![4]]);
            assert_eq!(fill(&mut ahead, &[1, 2], SHAPE).unwrap(), [1, 2]);
            // Others between: what is under way is kept.
            assert_eq!(fill(&mut ahead, &[5], SHAPE).unwrap(), [5]);
            assert_eq!(ahead.read(&[6]).unwrap()[0].ids, [6]);
            // Another shape is another pack.
            let other = PackShape { row_slots: 2, ..SHAPE };
            assert_eq!(fill(&mut ahead, &[3], other).unwrap(), [3]);
            assert!(fill(&mut ahead, &[8], SHAPE).is_err());
            assert_eq!(fill(&mut ahead, &[4], SHAPE).unwrap(), [4]);
            // Behind the last one nothing is read.
            assert_eq!(fill(&mut ahead, &[7], SHAPE).unwrap(), [7]);
        });
        let wanted = [
            "expect [[1, 2], [3], [8], [4]]",
            "[1, 2]",
            "[3]",
            "[5]",
            "[6]",
            "[3]",
            "[8]",
            "[8]",
            "[4]",
            "[7]",
        ];
        assert_eq!(*notes.lock().unwrap(), wanted);
    }
}
