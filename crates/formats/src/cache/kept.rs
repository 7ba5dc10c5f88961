//! Rows that are there before a cache is made: what answering left, in the order in which it came and before anyone knows the places
//! in a cache, and what lies in shards of earlier caches.
//!
//! ```text
//! kept-RRRR-NNNNN.dskept   of rank R, its Nth file:
//!     magic "DSKEPT01" · length of the spec u32 · the spec as JSON · records
//! record: length of the frame u32 · tokens u32 · trained tokens u32 · key (32 bytes) · sha256 (32 bytes) · frame
//! The hash is that of tokens, trained tokens and frame.
//! ```
//! A row is known by its ids and its loss mask, of which its key is the hash. Files are appended to and never flushed: what a
//! killed process or a power cut left of the last record is found by its hash, and that row is captured as if it had
//! not been kept.
//!
//! Invariant: a row is handed out only if its frame, or the shard that it lies in, has the hash that was written with it, so a cache
//! that is filled from here has the bytes of one that was not.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::places::{RowPlace, ids_and_mask, places_in, u32_at};
use super::row::CacheSpec;
use super::shard::StoredRow;
use super::{CacheManifest, ShardEntry};
use crate::atomic::{self, AtomicError};
use crate::hash::{self, Hasher};
use crate::mapped::Mapped;
use crate::tokens::pack_bits;

const KEPT_MAGIC: &[u8; 8] = b"DSKEPT01";
const PREFIX: &str = "kept-";
const ENDING: &str = ".dskept";

/// Bytes of a record before its frame.
const HEAD: usize = 12 + 32 + 32;
/// Bytes from which on the next file is begun: files are removed one by one as their rows are used up.
const FILE_BYTES: u64 = 64 << 20;
/// Bytes of the longest spec that is believed.
const SPEC_MAX: usize = 1 << 20;

/// What a kept row is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeptKey([u8; 32]);

impl KeptKey {
    /// That of the row with these ids and this loss mask, `[S]` each.
    pub fn of(ids: &[u32], loss_mask: &[bool]) -> KeptKey {
        let mut hasher = Hasher::default();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        hasher.field(&bytes);
        hasher.field(&pack_bits(loss_mask));
        KeptKey(hasher.finish_bytes())
    }
}

/// What kept rows depend on: not on the token file, which is not there yet.
fn spec_of(spec: &CacheSpec) -> CacheSpec {
    CacheSpec { target: String::new(), tokens_sha256: String::new(), shard_rows: 1, rows: 0, ..spec.clone() }
}

/// The kept files of a folder with their ranks and numbers, in order.
fn files_in(dir: &Path) -> Vec<(u32, u32, PathBuf)> {
    let parse = |name: &str| {
        let (rank, number) = name.strip_prefix(PREFIX)?.strip_suffix(ENDING)?.split_once('-')?;
        Some((rank.parse().ok()?, number.parse().ok()?))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let of = |path: PathBuf| parse(path.file_name()?.to_str()?).map(|(rank, number)| (rank, number, path));
    let mut files: Vec<_> = entries.filter_map(|entry| of(entry.path())).collect();
    files.sort();
    files
}

/// Keeps rows for a cache that is made later.
pub struct KeptWriter {
    dir: PathBuf,
    rank: u32,
    head: Vec<u8>,
    /// The next file's number.
    next: u32,
    /// The open file and its bytes.
    file: Option<(File, PathBuf, u64)>,
}

impl KeptWriter {
    /// Behind what is in the folder, of which nothing is touched.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(dir: &Path, rank: u32, spec: &CacheSpec) -> Result<KeptWriter, AtomicError> {
        atomic::create_dir_all(dir)?;
        let last =
            files_in(dir).into_iter().filter(|(of, ..)| *of == rank).map(|(_, number, _)| number).max();
        let spec = serde_json::to_vec(&spec_of(spec)).expect("a spec is plain data");
        let mut head = KEPT_MAGIC.to_vec();
        head.extend_from_slice(&(spec.len() as u32).to_le_bytes());
        head.extend_from_slice(&spec);
        let next = last.map_or(0, |last| last.saturating_add(1));
        Ok(KeptWriter { dir: dir.to_path_buf(), rank, head, next, file: None })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps a row.
    ///
    /// # Errors
    /// The disk; what was kept before stays.
    pub fn push(&mut self, key: KeptKey, row: &StoredRow) -> Result<(), AtomicError> {
        let StoredRow { frame, tokens, trained } = row;
        let mut record = Vec::with_capacity(HEAD + frame.len());
        for n in [frame.len() as u32, *tokens, *trained] {
            record.extend_from_slice(&n.to_le_bytes());
        }
        record.extend_from_slice(&key.0);
        record.extend_from_slice(&hash_of(frame, *tokens, *trained));
        record.extend_from_slice(frame);
        let (file, path, bytes) = match &mut self.file {
            Some(open) => open,
            None => {
                let path = self.dir.join(format!("{PREFIX}{:04}-{:05}{ENDING}", self.rank, self.next));
                // A name is tried once: what a full disk leaves of a file is not in the way of the next.
                self.next += 1;
                let wrap = |e| AtomicError::from_io("write", &path, e);
                let mut file = File::create_new(&path).map_err(wrap)?;
                write(&mut file, &self.head).map_err(wrap)?;
                self.file.insert((file, path, self.head.len() as u64))
            }
        };
        if let Err(error) = write(file, &record) {
            // Half a record would hide those behind it.
            let _ = file.set_len(*bytes);
            return Err(AtomicError::from_io("write", path, error));
        }
        *bytes += record.len() as u64;
        if *bytes >= FILE_BYTES {
            self.file = None;
        }
        Ok(())
    }
}

fn write(file: &mut File, bytes: &[u8]) -> std::io::Result<()> {
    #[cfg(test)]
    crate::atomic::small_disk::take(bytes.len())?;
    file.write_all(bytes)
}

fn hash_of(frame: &[u8], tokens: u32, trained: u32) -> [u8; 32] {
    let mut hasher = Hasher::default();
    hasher.update(&tokens.to_le_bytes());
    hasher.update(&trained.to_le_bytes());
    hasher.update(frame);
    hasher.finish_bytes()
}

/// Where a row lies in its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    at: usize,
    len: usize,
    tokens: u32,
    trained: u32,
    /// Of the record; `None` for a row of a shard, which has one for all.
    hash: Option<[u8; 32]>,
}

/// The records of a file, from the first on, as far as they are whole; none if it is of another spec.
fn records(bytes: &[u8], spec: &CacheSpec) -> Vec<(KeptKey, Place)> {
    let mut found = Vec::new();
    let Some(mut at) = records_at(bytes, spec) else { return found };
    while let Some(head) = bytes.get(at..).and_then(|rest| rest.get(..HEAD)) {
        let hash = |from: usize| <[u8; 32]>::try_from(&head[from..from + 32]).expect("32 bytes");
        let (len, begin) = (u32_at(head, 0) as usize, at + HEAD);
        let Some(end) = begin.checked_add(len).filter(|end| *end <= bytes.len()) else { break };
        let place = Place {
            file: 0,
            at: begin,
            len,
            tokens: u32_at(head, 4),
            trained: u32_at(head, 8),
            hash: Some(hash(44)),
        };
        found.push((KeptKey(hash(12)), place));
        at = end;
    }
    found
}

/// Where the records of a file of this spec begin.
fn records_at(bytes: &[u8], spec: &CacheSpec) -> Option<usize> {
    let rest = bytes.strip_prefix(KEPT_MAGIC)?;
    let len = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?) as usize;
    let json = rest.get(4..4usize.checked_add(len.min(SPEC_MAX + 1))?).filter(|_| len <= SPEC_MAX)?;
    let found: CacheSpec = serde_json::from_slice(json).ok()?;
    found.difference(&spec_of(spec)).is_none().then_some(KEPT_MAGIC.len() + 4 + len)
}

/// The rows of a whole shard of an earlier cache. Their frames are believed only once the shard has been hashed.
fn rows_of_shard(bytes: &[u8], places: &[RowPlace], spec: &CacheSpec) -> Vec<(KeptKey, Place)> {
    let row = |place: &RowPlace| {
        let (at, len, tokens) = (place.offset as usize, place.len as usize, place.tokens);
        let (ids, mask) = ids_and_mask(&bytes[at..at + len], tokens as usize, spec).ok()?;
        let trained = mask.iter().filter(|m| **m).count() as u32;
        Some((KeptKey::of(&ids, &mask), Place { file: 0, at, len, tokens, trained, hash: None }))
    };
    places.iter().filter_map(row).collect()
}

/// The shards of an earlier cache whose rows depend on the same as those of `spec`; none if it cannot be read.
fn shards_in(dir: &Path, spec: &CacheSpec) -> Vec<(Vec<(KeptKey, Place)>, Holder)> {
    let manifest = CacheManifest::read(dir).ok().flatten();
    let Some(manifest) = manifest.filter(|m| spec_of(&m.spec).difference(&spec_of(spec)).is_none()) else {
        return Vec::new();
    };
    let shard = |entry: ShardEntry| {
        let bytes = Mapped::open(dir.join(&entry.file)).ok()?;
        let places = places_in(&bytes, &entry, spec).ok()?;
        let rows = rows_of_shard(&bytes, &places, spec);
        Some((rows, Holder::Shard { bytes, sha256: entry.sha256, whole: OnceLock::new() }))
    };
    manifest.shards.into_iter().filter_map(shard).collect()
}

/// A file that rows lie in.
#[derive(Debug)]
enum Holder {
    /// What answering left, hashed row by row; removed once it is used up.
    Kept { path: PathBuf, bytes: Mapped },
    /// A shard of an earlier cache, which stays, and whether it has its hash, once that was asked.
    Shard { bytes: Mapped, sha256: String, whole: OnceLock<bool> },
    /// Used up.
    Gone,
}

/// What is there of the rows of a cache.
#[derive(Debug, Default)]
pub struct KeptRows {
    files: Vec<Holder>,
    /// By number of the row.
    rows: Vec<Option<Place>>,
    /// Of each file, the number behind the last row that is in it.
    used_until: Vec<u64>,
}

impl KeptRows {
    /// Looks for the rows of a cache, whose keys come in their order, among what answering left in `dir` and in the folders of
    /// earlier caches, finished or not. Files of other caches are left alone, and so is what cannot be read: those rows are captured.
    pub fn open(
        dir: &Path,
        earlier: &[PathBuf],
        spec: &CacheSpec,
        keys: impl Iterator<Item = KeptKey>,
    ) -> KeptRows {
        let mut files = Vec::new();
        let mut by_key: HashMap<KeptKey, Place> = HashMap::new();
        let mut add = |found: Vec<(KeptKey, Place)>, holder: Holder| {
            by_key.extend(found.into_iter().map(|(key, place)| (key, Place { file: files.len(), ..place })));
            files.push(holder);
        };
        for cache in earlier {
            shards_in(cache, spec).into_iter().for_each(|(rows, shard)| add(rows, shard));
        }
        // What lies twice is taken from the file that is used up.
        for (.., path) in files_in(dir) {
            if let Ok(bytes) = Mapped::open(&path) {
                add(records(&bytes, spec), Holder::Kept { path, bytes });
            }
        }
        let rows: Vec<Option<Place>> = match by_key.is_empty() {
            true => Vec::new(),
            false => keys.map(|key| by_key.get(&key).copied()).collect(),
        };
        let mut used_until = vec![0; files.len()];
        for (number, place) in (1..).zip(&rows) {
            if let Some(place) = place {
                used_until[place.file] = number;
            }
        }
        KeptRows { files, rows, used_until }
    }

    /// Bytes of the files that answering left.
    pub fn bytes(&self) -> u64 {
        let kept = |holder: &Holder| match holder {
            Holder::Kept { bytes, .. } => bytes.len() as u64,
            Holder::Shard { .. } | Holder::Gone => 0,
        };
        self.files.iter().map(kept).sum()
    }

    /// True if a row is there, as far as can be told without reading it.
    pub fn has(&self, row: u64) -> bool {
        self.rows.get(row as usize).is_some_and(Option::is_some)
    }

    /// The row with this number; `None` if it has to be captured.
    pub fn get(&self, row: u64) -> Option<StoredRow> {
        let place = self.rows.get(row as usize)?.as_ref()?;
        let bytes = match &self.files[place.file] {
            Holder::Kept { bytes, .. } => bytes,
            Holder::Shard { bytes, sha256, whole } => {
                let whole = whole.get_or_init(|| hash::sha256_hex(bytes) == *sha256);
                if !whole {
                    return None;
                }
                bytes
            }
            Holder::Gone => return None,
        };
        let frame = &bytes[place.at..place.at + place.len];
        let same = |hash| hash_of(frame, place.tokens, place.trained) == hash;
        place.hash.is_none_or(same).then(|| StoredRow {
            frame: frame.to_vec(),
            tokens: place.tokens,
            trained: place.trained,
        })
    }

    /// Removes the files that answering left whose rows all come before this one: the cache has them.
    pub fn release(&mut self, before: u64) {
        for (file, until) in self.files.iter_mut().zip(&self.used_until) {
            if *until > 0
                && *until <= before
                && let Holder::Kept { path, .. } = file
            {
                // What cannot be removed costs space and nothing else.
                let _ = fs::remove_file(path);
                *file = Holder::Gone;
            }
        }
    }
}

/// Removes all kept files of a folder, and the folder if nothing else is in it.
pub fn drop_kept(dir: &Path) {
    for (.., path) in files_in(dir) {
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_dir(dir);
}

#[cfg(test)]
mod tests {
    use super::super::tests::{content, fill, row, spec};
    use super::super::{CacheWriter, RowEncoder};
    use super::*;
    use crate::atomic::small_disk;
    use crate::run::CaptureDtype;

    fn tokens_of(row: u64) -> usize {
        2 + row as usize
    }

    fn key(number: u64) -> KeptKey {
        let row = row(number, tokens_of(number));
        KeptKey::of(&row.ids, &row.loss_mask)
    }

    /// As answering does: token by token, in pieces.
    fn stored(spec: &CacheSpec, number: u64) -> StoredRow {
        let row = row(number, tokens_of(number));
        let (hidden, mut encoder) = (spec.hidden_size as usize, RowEncoder::new(spec));
        let joined = hidden * spec.target_layer_ids.len();
        let mut at = 0;
        while at < row.len() {
            let to = row.len().min(at + 1 + at);
            encoder.push(&row.features[at * joined..to * joined], &row.last[at * hidden..to * hidden]);
            at = to;
        }
        // What was read too far is read again.
        encoder.truncate(row.len() - 1);
        let t = row.len() - 1;
        encoder.push(&row.features[t * joined..], &row.last[t * hidden..]);
        StoredRow::of(&encoder, &row.ids, &row.loss_mask, number).unwrap()
    }

    #[test]
    fn a_cache_of_kept_rows_has_the_bytes_of_one_that_was_captured() {
        for dtype in [CaptureDtype::Int8, CaptureDtype::Bf16] {
            let spec = spec(dtype, 9);
            let wanted = tempfile::tempdir().unwrap();
            fill(wanted.path(), &spec, 9);
            let dir = tempfile::tempdir().unwrap();
            let kept = dir.path().join("kept");
            // In another order, by two ranks, not all of them, one twice.
            for (rank, rows) in [(0, [7, 2, 4].as_slice()), (1, &[0, 8, 4])] {
                let mut writer = KeptWriter::open(&kept, rank, &spec).unwrap();
                rows.iter().for_each(|n| writer.push(key(*n), &stored(&spec, *n)).unwrap());
            }
            let mut rows = KeptRows::open(&kept, &[], &spec, (0..9).map(key));
            let mut writer = CacheWriter::open(dir.path().join("cache"), &spec).unwrap();
            for n in 0..9 {
                assert_eq!(rows.has(n), [0, 2, 4, 7, 8].contains(&n), "row {n}");
                match rows.get(n) {
                    Some(row) => writer.push_stored(&row).unwrap(),
                    None => writer.push(&row(n, tokens_of(n))).unwrap(),
                }
            }
            let manifest = writer.finish().unwrap();
            assert_eq!(content(&dir.path().join("cache")), content(wanted.path()));
            let trained: u64 = manifest.shards.iter().map(|s| s.trained_tokens).sum();
            let masks = (0..9).map(|n| row(n, tokens_of(n)).loss_mask);
            assert_eq!(trained, masks.flatten().filter(|m| *m).count() as u64);
            // Row 7 is the last of its file, row 8 of the other.
            assert_eq!(files_in(&kept).len(), 2);
            rows.release(7);
            assert_eq!(files_in(&kept).len(), 2);
            rows.release(8);
            assert_eq!(files_in(&kept).len(), 1);
            assert!(rows.get(7).is_none() && rows.get(8).is_some());
            drop_kept(&kept);
            assert!(!kept.exists());
        }
    }

    #[test]
    fn what_was_torn_damaged_or_made_for_another_cache_is_not_handed_out() {
        let spec = spec(CaptureDtype::Int8, 4);
        let dir = tempfile::tempdir().unwrap();
        let mut writer = KeptWriter::open(dir.path(), 0, &spec).unwrap();
        (0..3).for_each(|n| writer.push(key(n), &stored(&spec, n)).unwrap());
        drop(writer);
        let path = dir.path().join("kept-0000-00000.dskept");
        let whole = fs::read(&path).unwrap();
        let keys = || (0..4).map(key);
        let found = |spec: &CacheSpec| {
            let rows = KeptRows::open(dir.path(), &[], spec, keys());
            (0..4).filter(|n| rows.get(*n).is_some()).collect::<Vec<u64>>()
        };
        assert_eq!(found(&spec), [0, 1, 2]);
        // Any prefix gives whole rows or none.
        let ends = records(&whole, &spec).iter().map(|(_, p)| p.at + p.len).collect::<Vec<_>>();
        for len in (0..whole.len()).step_by(7) {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(found(&spec).len(), ends.iter().filter(|end| **end <= len).count(), "{len} bytes");
        }
        // Any other byte gives the rows that were written or none.
        let written: Vec<StoredRow> = (0..3).map(|n| stored(&spec, n)).collect();
        for at in (0..whole.len()).step_by(5) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            fs::write(&path, &bytes).unwrap();
            let rows = KeptRows::open(dir.path(), &[], &spec, keys());
            let same = |n: u64| rows.get(n).is_none_or(|row| row == written[n as usize]);
            assert!((0..3).all(same), "byte {at}");
        }
        // A process that goes on begins a file of its own.
        fs::write(&path, &whole[..ends[1] + 5]).unwrap();
        KeptWriter::open(dir.path(), 0, &spec).unwrap().push(key(3), &stored(&spec, 3)).unwrap();
        assert_eq!(found(&spec), [0, 1, 3]);
        // Other bytes than were written.
        let mut bytes = whole.clone();
        bytes[ends[0] - 1] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(found(&spec), [1, 2, 3]);
        let other = CacheSpec { target_layer_ids: vec![0, 2, 3], ..spec.clone() };
        assert_eq!(found(&other), [0u64; 0]);
        // The number of rows and the tokens of all do not matter.
        let later = CacheSpec { rows: 77, tokens_sha256: "other".into(), shard_rows: 9, ..spec.clone() };
        assert_eq!(found(&later), [1, 2, 3]);
    }

    #[test]
    fn rows_of_an_earlier_cache_are_taken_from_its_shards() {
        let now = spec(CaptureDtype::Int8, 9);
        let wanted = tempfile::tempdir().unwrap();
        fill(wanted.path(), &now, 9);
        let dir = tempfile::tempdir().unwrap();
        // Row 3 on its own, then others: an earlier cache of other tokens, of which the last shard is not finished.
        let (kept, cache) = (dir.path().join("kept"), dir.path().join("cache"));
        let order = [8, 1, 3, 0, 5];
        let before = CacheSpec { tokens_sha256: "other".into(), rows: 6, shard_rows: 2, ..now.clone() };
        let mut writer = CacheWriter::open(&cache, &before).unwrap();
        order.iter().for_each(|n| writer.push(&row(*n, tokens_of(*n))).unwrap());
        drop(writer);
        KeptWriter::open(&kept, 0, &now).unwrap().push(key(3), &stored(&now, 3)).unwrap();
        let earlier = [dir.path().join("none"), cache.clone()];
        let open = |spec: &CacheSpec| KeptRows::open(&kept, &earlier, spec, (0..9).map(key));
        let found = |rows: &KeptRows| (0..9).filter(|n| rows.get(*n).is_some()).collect::<Vec<u64>>();
        let mut rows = open(&now);
        assert_eq!(found(&rows), [0, 1, 3, 8]);
        let mut writer = CacheWriter::open(dir.path().join("new"), &now).unwrap();
        for n in 0..9 {
            match rows.get(n) {
                Some(row) => writer.push_stored(&row).unwrap(),
                None => writer.push(&row(n, tokens_of(n))).unwrap(),
            }
        }
        writer.finish().unwrap();
        assert_eq!(content(&dir.path().join("new")), content(wanted.path()));
        // What lies in both is used up where it can be removed, and shards stay.
        rows.release(9);
        assert_eq!((files_in(&kept).len(), found(&rows)), (0, vec![0, 1, 8]));
        assert_eq!(found(&open(&CacheSpec { precision: "f32".into(), ..now.clone() })), [0u64; 0]);
        // A byte that was not written costs the rows of its shard.
        let shard = cache.join("shard-00000.dscache");
        let whole = fs::read(&shard).unwrap();
        for at in (0..whole.len()).step_by(11) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            fs::write(&shard, &bytes).unwrap();
            assert_eq!(found(&open(&now)), [0, 3], "byte {at}");
        }
    }

    #[test]
    fn a_full_disk_costs_the_row_that_had_no_room() {
        let spec = spec(CaptureDtype::Bf16, 3);
        let dir = tempfile::tempdir().unwrap();
        let mut writer = KeptWriter::open(dir.path(), 0, &spec).unwrap();
        writer.push(key(0), &stored(&spec, 0)).unwrap();
        let error = small_disk::with(100, || writer.push(key(1), &stored(&spec, 1)).unwrap_err());
        assert!(error.is_disk_full() && error.to_string().contains("kept-0000-00000.dskept"), "{error}");
        writer.push(key(2), &stored(&spec, 2)).unwrap();
        let rows = KeptRows::open(dir.path(), &[], &spec, (0..3).map(key));
        assert_eq!([0, 1, 2].map(|n| rows.get(n).is_some()), [true, false, true]);
    }

    #[test]
    fn masks_and_ids_make_the_key() {
        let base = KeptKey::of(&[1, 2], &[false, true]);
        assert_ne!(base, KeptKey::of(&[1, 2], &[true, true]));
        assert_ne!(base, KeptKey::of(&[1, 3], &[false, true]));
        assert_ne!(base, KeptKey::of(&[1], &[false]));
        assert_eq!(base, KeptKey::of(&[1, 2], &[false, true]));
    }
}
