//! A capture in a store, read row by row through a bounded local cache.
//!
//! Training asks for rows in an order that mixes all shards, so the unit of what is fetched and kept is the row: each epoch
//! reads every row once, however small the cache is. The order is known before ([`StoredCache::expect`]): rows are fetched ahead
//! in it, and where room is needed the row goes whose turn comes last.
//!
//! Invariant: a row is used only if its bytes have the hash that its row places give, and those the hash that the manifest gives.
//! Files of the cache together have no more than its bytes; a file that is not what it should be is fetched again.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::cache::{
    CacheError, CacheManifest, CacheSpec, CaptureRow, RowPlace, RowPlaces, ShardEntry, decode_frame,
};
use draftsmith_formats::hash::{Hasher, sha256_hex};

use crate::client::Store;
use crate::error::StoreError;
use crate::writer::manifest_in;

/// Row places are small: so many are fetched at once.
const INDEX_READERS: usize = 8;
/// Bytes of a shard that are read at once where its row places have to be made.
const SHARD_PIECE: u64 = 8 << 20;

/// The local side.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Folder of the cache; it is ours alone.
    pub dir: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Rows fetched ahead at once.
    pub readers: usize,
}

/// One row of the capture.
#[derive(Clone, Copy, Debug)]
struct Row {
    shard: u32,
    place: RowPlace,
    hash: [u8; 32],
}

/// A complete capture in a store.
#[derive(Debug)]
pub struct StoredCache {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    manifest: CacheManifest,
    rows: Vec<Row>,
    dir: PathBuf,
    /// Bytes that files of rows may have.
    bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
}

/// A turn that never comes.
const NEVER: u32 = u32::MAX;

/// What is here, what is on its way, and what comes when.
#[derive(Debug, Default)]
struct State {
    /// Rows in the order in which they will be asked for.
    expected: Vec<u32>,
    /// The first of them that was not asked for yet.
    at: usize,
    /// The first of them that nobody fetches or has fetched yet.
    next: usize,
    /// The next two turns of each row: what is expected ends with the next epoch.
    turns: Vec<[u32; 2]>,
    /// Rows whose files are here, with their bytes.
    have: HashMap<u32, u64>,
    /// The same by their next turn; without those that are being read.
    by_turn: BTreeSet<(u32, u32)>,
    /// Rows on their way.
    flying: BTreeSet<u32>,
    /// Bytes of files, and of rows on their way that will be files.
    bytes: u64,
    /// Rows that could not be had.
    failed: HashMap<u32, StoreError>,
    /// Files cannot be written any more.
    is_full: bool,
    ended: bool,
}

impl State {
    fn turn(&self, row: u32) -> u32 {
        self.turns.get(row as usize).map_or(NEVER, |turns| turns[0])
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, row: u32) -> PathBuf {
        self.dir.join(format!("{row}.row"))
    }

    fn len(&self, row: u32) -> u64 {
        u64::from(self.rows[row as usize].place.len)
    }

    /// Makes room for a row that is wanted at a turn, at the cost of rows that are wanted later. False where there is none.
    fn make_room(&self, state: &mut State, row: u32, turn: u32) -> bool {
        let len = self.len(row);
        if state.is_full || len > self.bytes {
            return false;
        }
        while state.bytes + len > self.bytes {
            match state.by_turn.last().copied() {
                Some((later, other)) if later > turn => self.forget(state, other),
                _ => return false,
            }
        }
        true
    }

    fn forget(&self, state: &mut State, row: u32) {
        state.by_turn.remove(&(state.turn(row), row));
        if let Some(len) = state.have.remove(&row) {
            state.bytes -= len;
        }
        // A file that stays behind is found, or overwritten, later.
        drop(fs::remove_file(self.file(row)));
    }

    /// Fetches a row and checks it.
    fn fetch(&self, number: u32) -> Result<Vec<u8>, StoreError> {
        let Row { shard, place, hash } = self.rows[number as usize];
        let entry = &self.manifest.shards[shard as usize];
        self.store.read(&entry.file, place.offset..place.end(), None, |bytes| {
            match RowPlaces::hash(bytes) == hash {
                true => Ok(()),
                false => Err(format!(
                    "row {number} at byte {} has not the hash that it was written with",
                    place.offset
                )),
            }
        })
    }

    /// Keeps a row for which room was made. False where the disk does not take it.
    fn keep(&self, row: u32, bytes: &[u8]) -> bool {
        let path = self.file(row);
        let partial = path.with_extension("part");
        // Its hash says whether it is whole, so it need not reach the device first.
        fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, &path)).is_ok() || {
            drop(fs::remove_file(&partial));
            false
        }
    }

    /// A row on its way has arrived, or not.
    fn landed(&self, row: u32, kept: bool) {
        let mut state = self.lock();
        state.flying.remove(&row);
        match kept {
            true => {
                let turn = state.turn(row);
                state.have.insert(row, self.len(row));
                state.by_turn.insert((turn, row));
            }
            false => state.bytes -= self.len(row),
        }
        drop(state);
        self.changed.notify_all();
    }

    /// What a reader does until the end: the next row that will be asked for, as soon as there is room.
    fn read_ahead(&self) {
        let mut state = self.lock();
        while !state.ended {
            let Some(row) = state.expected.get(state.next).copied() else {
                state = self.wait(state);
                continue;
            };
            let turn = state.next;
            let is_here = state.have.contains_key(&row) || state.flying.contains(&row);
            // What is too large for the cache, or was asked for meanwhile, is nobody's to fetch ahead.
            if is_here || turn < state.at || state.failed.contains_key(&row) || self.len(row) > self.bytes {
                state.next += 1;
                continue;
            }
            if !self.make_room(&mut state, row, turn as u32) {
                state = self.wait(state);
                continue;
            }
            state.next += 1;
            state.flying.insert(row);
            state.bytes += self.len(row);
            drop(state);
            match self.fetch(row) {
                Ok(bytes) => {
                    let kept = self.keep(row, &bytes);
                    if !kept {
                        self.lock().is_full = true;
                    }
                    self.landed(row, kept);
                }
                Err(error) => {
                    self.lock().failed.insert(row, error);
                    self.landed(row, false);
                }
            }
            state = self.lock();
        }
    }

    /// The bytes of a row, from the cache or from the store.
    fn bytes_of(&self, row: u32) -> Result<Vec<u8>, StoreError> {
        let mut state = self.lock();
        loop {
            if let Some(error) = state.failed.remove(&row) {
                return Err(error);
            }
            if state.flying.contains(&row) {
                state = self.wait(state);
                continue;
            }
            if !state.have.contains_key(&row) {
                break;
            }
            // Out of reach of those who look for room, while it is read.
            let turn = state.turn(row);
            state.by_turn.remove(&(turn, row));
            drop(state);
            let found = fs::read(self.file(row));
            let good = found.ok().filter(|bytes| RowPlaces::hash(bytes) == self.rows[row as usize].hash);
            state = self.lock();
            let turn = state.turn(row);
            state.by_turn.insert((turn, row));
            match good {
                Some(bytes) => return Ok(bytes),
                None => self.forget(&mut state, row),
            }
        }
        let turn = state.at as u32;
        let kept = self.make_room(&mut state, row, turn);
        state.flying.insert(row);
        state.bytes += if kept { self.len(row) } else { 0 };
        drop(state);
        let fetched = self.fetch(row);
        let written = kept && fetched.as_ref().is_ok_and(|bytes| self.keep(row, bytes));
        if kept {
            if !written && fetched.is_ok() {
                self.lock().is_full = true;
            }
            self.landed(row, written);
        } else {
            self.lock().flying.remove(&row);
            self.changed.notify_all();
        }
        fetched
    }

    /// A row was asked for: if it was its turn, the next one's has come.
    fn passed(&self, row: u32) {
        let mut state = self.lock();
        if state.expected.get(state.at) != Some(&row) {
            return;
        }
        let before = state.turn(row);
        let is_kept = state.by_turn.remove(&(before, row));
        let at = state.at as u32;
        if let Some(turns) = state.turns.get_mut(row as usize).filter(|turns| turns[0] <= at) {
            *turns = [turns[1], NEVER];
        }
        if is_kept {
            let turn = state.turn(row);
            state.by_turn.insert((turn, row));
        }
        state.at += 1;
        drop(state);
        self.changed.notify_all();
    }
}

impl StoredCache {
    /// Opens a capture and reads where its rows lie.
    ///
    /// # Errors
    /// [`CacheError::Missing`], [`CacheError::Differs`] or [`CacheError::Incomplete`] of a capture that cannot be used; what keeps
    /// from reading.
    pub fn open(store: &Store, wanted: &CacheSpec, options: CacheOptions) -> Result<StoredCache, StoreError> {
        let folder = || PathBuf::from(store.address().to_string());
        let manifest = manifest_in(store, wanted)?.ok_or_else(|| CacheError::Missing { path: folder() })?;
        if !manifest.complete {
            let (done, rows) = (manifest.rows_done(), manifest.spec.rows);
            return Err(CacheError::Incomplete { path: folder(), done, rows }.into());
        }
        atomic::create_dir_all(&options.dir)?;
        let all = all_places(store, &manifest, &options.dir)?;
        let mut rows = Vec::new();
        for (shard, places) in all.into_iter().enumerate() {
            let shard = shard as u32;
            rows.extend(places.rows.into_iter().map(|(place, hash)| Row { shard, place, hash }));
        }
        let (dir, bytes) = (options.dir, options.bytes);
        let state = Mutex::new(found_in(&dir, &rows));
        let shared =
            Shared { store: store.clone(), manifest, rows, dir, bytes, state, changed: Condvar::new() };
        {
            let mut state = shared.lock();
            while state.bytes > shared.bytes {
                let Some((_, row)) = state.by_turn.last().copied() else { break };
                shared.forget(&mut state, row);
            }
        }
        let shared = Arc::new(shared);
        let reader = |_| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.read_ahead())
        };
        let readers = (0..options.readers).map(reader).collect();
        Ok(StoredCache { shared, readers })
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.shared.rows.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.shared.rows.is_empty()
    }

    /// Tokens of a row, without reading it.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_tokens(&self, row: usize) -> usize {
        self.shared.rows[row].place.tokens as usize
    }

    /// Bytes of the rows whose files are here.
    pub fn bytes_here(&self) -> u64 {
        self.shared.lock().bytes
    }

    /// The rows that will be asked for, in their order, in place of what was expected before.
    pub fn expect(&self, rows: &[usize]) {
        let mut state = self.shared.lock();
        state.expected = rows.iter().map(|row| *row as u32).collect();
        (state.at, state.next) = (0, 0);
        let mut turns = vec![[NEVER; 2]; self.len()];
        for (turn, row) in state.expected.iter().enumerate() {
            let turns = &mut turns[*row as usize];
            if let Some(free) = turns.iter_mut().find(|turn| **turn == NEVER) {
                *free = turn as u32;
            }
        }
        state.turns = turns;
        // Those that are being read right now come back by themselves.
        let kept: Vec<u32> = state.by_turn.iter().map(|(_, row)| *row).collect();
        state.by_turn = kept.into_iter().map(|row| (state.turn(row), row)).collect();
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Reads a row.
    ///
    /// # Errors
    /// What keeps from reading; [`CacheError::Damaged`] of a frame that does not decode.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> Result<CaptureRow, StoreError> {
        let shared = &self.shared;
        let Row { shard, place, .. } = shared.rows[row];
        let frame = shared.bytes_of(row as u32)?;
        shared.passed(row as u32);
        decode_frame(&frame, place.tokens as usize, &shared.manifest.spec).map_err(|problem| {
            let entry = &shared.manifest.shards[shard as usize];
            let problem = format!("row {row} at byte {}: {problem}", place.offset);
            entry.damaged(&shared.store.address().to_string(), problem).into()
        })
    }
}

impl Drop for StoredCache {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for reader in self.readers.drain(..) {
            drop(reader.join());
        }
    }
}

/// What an earlier process left in the folder of the cache.
fn found_in(dir: &Path, rows: &[Row]) -> State {
    let mut state = State::default();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let number =
            path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u32>().ok());
        let (Some(number), Some(extension)) = (number, path.extension().and_then(|e| e.to_str())) else {
            continue;
        };
        let len = rows.get(number as usize).map(|row| u64::from(row.place.len));
        match extension {
            "row" if entry.metadata().ok().map(|meta| meta.len()) == len => {
                state.have.insert(number, len.unwrap_or_default());
                state.by_turn.insert((NEVER, number));
                state.bytes += len.unwrap_or_default();
            }
            // Half a row, or one of another capture.
            "row" | "part" => drop(fs::remove_file(path)),
            _ => {}
        }
    }
    state
}

/// The row places of all shards.
fn all_places(store: &Store, manifest: &CacheManifest, dir: &Path) -> Result<Vec<RowPlaces>, StoreError> {
    let count = manifest.shards.len();
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<Option<Result<RowPlaces, StoreError>>>> =
        Mutex::new((0..count).map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..INDEX_READERS.min(count) {
            scope.spawn(|| {
                loop {
                    let shard = next.fetch_add(1, Ordering::Relaxed);
                    let Some(entry) = manifest.shards.get(shard) else { return };
                    let places = places_of(store, entry, &manifest.spec, dir);
                    if places.is_err() {
                        // Nobody begins with another one.
                        next.store(count, Ordering::Relaxed);
                    }
                    found.lock().unwrap_or_else(PoisonError::into_inner)[shard] = Some(places);
                }
            });
        }
    });
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    // The first that failed, if one did: those behind it were not looked for.
    found.into_iter().flatten().collect()
}

/// The row places of a shard: kept here, beside it in the store, or, of a capture that somebody copied there, made from all
/// its bytes.
fn places_of(
    store: &Store,
    entry: &ShardEntry,
    spec: &CacheSpec,
    dir: &Path,
) -> Result<RowPlaces, StoreError> {
    let kept = dir.join(format!("{}.rows", entry.rows_sha256.as_deref().unwrap_or(&entry.sha256)));
    let parse = |bytes: &[u8]| {
        RowPlaces::parse(bytes, entry, spec)
            .map_err(|problem| entry.damaged(&store.address().to_string(), problem))
    };
    if let Ok(bytes) = fs::read(&kept)
        && entry.rows_sha256.as_ref().is_none_or(|wanted| *wanted == sha256_hex(&bytes))
        && let Ok(places) = parse(&bytes)
    {
        return Ok(places);
    }
    let (bytes, places) = match &entry.rows_sha256 {
        Some(wanted) => {
            let name = entry.rows_file();
            let size = store.find(&name)?.map(|found| found.size);
            let size = size.ok_or_else(|| StoreError::Missing { object: store.address().join(&name) })?;
            let bytes = store.read(&name, 0..size, None, |bytes| match sha256_hex(bytes) == *wanted {
                true => Ok(()),
                false => Err("its sha256 is not the one that the manifest gives".to_string()),
            })?;
            let places = parse(&bytes)?;
            (bytes, places)
        }
        None => {
            let places = places_by_reading(store, entry, spec, dir)?;
            (places.to_bytes(), places)
        }
    };
    atomic::write(&kept, &bytes)?;
    Ok(places)
}

fn places_by_reading(
    store: &Store,
    entry: &ShardEntry,
    spec: &CacheSpec,
    dir: &Path,
) -> Result<RowPlaces, StoreError> {
    use std::io::Write;
    let path = dir.join(format!(".{}", entry.file));
    let disk = |e| StoreError::from(AtomicError::from_io("write", &path, e));
    let read = || {
        let mut file = fs::File::create(&path).map_err(disk)?;
        let (mut hasher, mut at) = (Hasher::default(), 0);
        while at < entry.bytes {
            let end = (at + SHARD_PIECE).min(entry.bytes);
            let piece = store.read(&entry.file, at..end, None, |_| Ok(()))?;
            file.write_all(&piece).map_err(disk)?;
            hasher.update(&piece);
            at = end;
        }
        let folder = store.address().to_string();
        let found = hasher.finish();
        if found != entry.sha256 {
            let problem = format!("its sha256 is {found}, the manifest says {}", entry.sha256);
            return Err(entry.damaged(&folder, problem).into());
        }
        let shard = draftsmith_formats::mapped::Mapped::open(&path).map_err(CacheError::from)?;
        RowPlaces::of_shard(&shard, entry, spec).map_err(|problem| entry.damaged(&folder, problem).into())
    };
    let places = read();
    drop(fs::remove_file(&path));
    places
}
