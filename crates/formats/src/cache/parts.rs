//! A cache that several processes fill, each with rows of its own.
//!
//! Each writes *parts*: files like shards, of rows that follow each other inside one shard, and beside each a record of it.
//! One process joins them: a part that is a whole shard takes its name, others are copied frame by frame. So a shard is
//! written twice only where two processes share it, which happens once between each two of them.
//!
//! ```text
//! part-0000000128-00064.dscache   rows 128 to 191, in the format of a shard
//! part-0000000128-00064.json      what it was made from, its counts, its hash
//! ```
//! Invariant: the finished cache has the bytes of one that a single writer filled, whoever wrote which rows. A part with a record
//! is complete; it is taken by whoever opens the cache next, and its rows are never computed again.
//!
//! Shards may lie elsewhere, in a store. Then a part that is a whole shard goes there as soon as it is finished, under the shard's
//! name; its record stays until the manifest there lists the shard.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::places::places_in;
use super::shard::{ShardFile, StoredRow};
use super::{CacheError, CacheManifest, CacheSpec, CacheWriter, ShardEntry, shard_name};
use crate::atomic::{self, AtomicError};
use crate::hash;
use crate::mapped::Mapped;

const PART: &str = "part-";
const DATA: &str = ".dscache";
const RECORD: &str = ".json";

/// A finished part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its first row.
    pub first: u64,
    /// Its file, counts and hash.
    pub entry: ShardEntry,
}

impl Part {
    fn rows(&self) -> Range<u64> {
        self.first..self.first.saturating_add(self.entry.rows)
    }

    /// True of a whole shard that lies elsewhere, under its own name.
    pub fn is_elsewhere(&self) -> bool {
        !self.entry.file.starts_with(PART)
    }

    /// The shard that it is the whole of, behind those that a manifest lists; `None` of less than a shard.
    pub fn as_shard(&self, manifest: &CacheManifest) -> Option<ShardEntry> {
        let (rows, size) = (self.rows(), u64::from(manifest.spec.shard_rows).max(1));
        let behind = rows.start.checked_sub(manifest.rows_done())?;
        let begins = behind.is_multiple_of(size);
        let ends = rows.end - rows.start == size || rows.end == manifest.spec.rows;
        let shard = manifest.shards.len() + usize::try_from(behind / size).ok()?;
        (begins && ends && rows.end - rows.start <= size)
            .then(|| ShardEntry { file: shard_name(shard), ..self.entry.clone() })
    }

    /// Says that the part lies elsewhere from now on, as this shard, and removes it from a folder.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn moved(self, dir: &Path, spec: &CacheSpec, shard: ShardEntry) -> Result<Part, CacheError> {
        let path = dir.join(&self.entry.file);
        let part = Part { first: self.first, entry: shard };
        // The record first: until it says so, the part here is what counts.
        Record { spec: spec.clone(), part: part.clone() }.write(dir)?;
        fs::remove_file(&path).map_err(|e| AtomicError::from_io("remove", &path, e))?;
        Ok(part)
    }
}

/// What stands beside a part.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    spec: CacheSpec,
    part: Part,
}

impl Record {
    fn write(&self, dir: &Path) -> Result<(), CacheError> {
        let text = serde_json::to_string_pretty(self).expect("a record is plain data") + "\n";
        Ok(atomic::write(dir.join(part_name(&self.part.rows()) + RECORD), text)?)
    }
}

/// Name of a part without its ending.
fn part_name(rows: &Range<u64>) -> String {
    format!("{PART}{:010}-{:05}", rows.start, rows.end - rows.start)
}

/// Writes one part. Dropped before it is finished it leaves nothing.
pub struct PartWriter {
    dir: PathBuf,
    spec: CacheSpec,
    rows: Range<u64>,
    shard: ShardFile,
}

impl PartWriter {
    /// A part of these rows, in a folder that [`Parts::open`] has opened; the rows are those of one share.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn create(dir: &Path, spec: &CacheSpec, rows: Range<u64>) -> Result<PartWriter, CacheError> {
        let shard = ShardFile::create(dir, part_name(&rows) + DATA)?;
        Ok(PartWriter { dir: dir.to_path_buf(), spec: spec.clone(), rows, shard })
    }

    /// Adds the next row. True once all are there.
    ///
    /// # Errors
    /// As [`CacheWriter::push_stored`].
    pub fn push(&mut self, row: &StoredRow) -> Result<bool, CacheError> {
        let number = self.rows.start + self.shard.rows();
        if number >= self.rows.end {
            return Err(CacheError::Row { row: number, problem: "its part is full".to_string() });
        }
        self.shard.push(row)?;
        Ok(number + 1 == self.rows.end)
    }

    /// Ends the part.
    ///
    /// # Errors
    /// [`CacheError::Row`] if rows are missing, [`CacheError::File`].
    pub fn finish(self) -> Result<Part, CacheError> {
        let PartWriter { dir, spec, rows, shard } = self;
        let next = rows.start + shard.rows();
        if next < rows.end {
            return Err(CacheError::Row { row: next, problem: "its part ends before it".to_string() });
        }
        // Part first, record second: a part without a record is written again.
        let part = Part { first: rows.start, entry: shard.close()? };
        let record = Record { spec, part };
        record.write(&dir)?;
        Ok(record.part)
    }
}

/// A cache under way, with all its parts.
#[derive(Debug)]
pub struct Parts {
    dir: PathBuf,
    manifest: CacheManifest,
    /// By their first rows; they do not overlap, and each lies in one shard.
    parts: BTreeMap<u64, Part>,
}

impl Parts {
    /// Starts a cache, or goes on with one that was interrupted, whoever wrote it. Parts that are of no use are removed.
    ///
    /// # Errors
    /// As [`CacheWriter::open`].
    pub fn open(dir: impl AsRef<Path>, spec: &CacheSpec) -> Result<Parts, CacheError> {
        let dir = dir.as_ref();
        CacheWriter::open(dir, spec)?;
        let missing = || CacheError::Missing { path: dir.to_path_buf() };
        let manifest = CacheManifest::read(dir)?.ok_or_else(missing)?;
        Parts::find(dir, manifest, None)
    }

    /// Goes on behind the shards of a manifest, which lie elsewhere. `is_there` says whether a shard that this does not list yet lies
    /// there too.
    ///
    /// # Errors
    /// The folder cannot be read or written; those of `is_there`.
    pub fn go_on<E: From<CacheError>>(
        dir: impl AsRef<Path>,
        manifest: CacheManifest,
        mut is_there: impl FnMut(&ShardEntry) -> Result<bool, E>,
    ) -> Result<Parts, E> {
        let dir = dir.as_ref();
        CacheWriter::go_on(dir, manifest.clone())?;
        let mut gone = Vec::new();
        for part in Parts::find(dir, manifest.clone(), Some(&gone))?.parts.into_values() {
            if part.is_elsewhere() && !is_there(&part.entry)? {
                gone.push(part.first);
            }
        }
        Ok(Parts::find(dir, manifest, Some(&gone))?)
    }

    /// True if parts were left in a folder.
    pub fn are_in(dir: &Path) -> bool {
        let Ok(entries) = fs::read_dir(dir) else { return false };
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(PART) && name.ends_with(RECORD)
        })
    }

    /// The parts in a folder, and removes what is of no use there. Shards lie elsewhere where `gone` names parts that do not,
    /// though they should.
    fn find(dir: &Path, manifest: CacheManifest, gone: Option<&[u64]>) -> Result<Parts, CacheError> {
        let mut parts = Parts { dir: dir.to_path_buf(), manifest, parts: BTreeMap::new() };
        let unreadable = |e| CacheError::from(AtomicError::from_io("read", dir, e));
        let mut names: Vec<String> = Vec::new();
        for entry in fs::read_dir(dir).map_err(unreadable)? {
            names.push(entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let mut useful: Vec<String> = Vec::new();
        for name in names.iter().filter(|name| name.starts_with(PART) && name.ends_with(RECORD)) {
            let Some(part) = parts.read_record(&dir.join(name), gone) else { continue };
            useful.extend([name.clone(), part.entry.file.clone()]);
            parts.parts.insert(part.first, part);
        }
        for name in &names {
            if name.starts_with(PART) && !useful.contains(name) {
                // What cannot be removed costs space and nothing else.
                let _ = fs::remove_file(dir.join(name));
            }
            let unfinished = name.strip_prefix('.').filter(|rest| rest.starts_with(PART));
            for ending in [DATA, RECORD] {
                if let Some((stem, _)) = unfinished.and_then(|rest| rest.split_once(ending)) {
                    atomic::clean_leftovers(&dir.join(format!("{stem}{ending}")));
                }
            }
        }
        Ok(parts)
    }

    /// The part that a record is of, if it can be used.
    fn read_record(&self, path: &Path, gone: Option<&[u64]>) -> Option<Part> {
        let Record { spec, part } = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let rows = part.rows();
        let behind = self.parts.last_key_value().map_or(self.in_shards(), |(_, last)| last.rows().end);
        let fits = spec.difference(self.spec()).is_none()
            && behind <= rows.start
            && rows.start < rows.end
            && rows.end <= spec.rows
            && self.shard_of(rows.start) == self.shard_of(rows.end - 1);
        if !fits {
            return None;
        }
        if part.entry.file != part_name(&rows) + DATA {
            let shard = part.as_shard(&self.manifest).filter(|shard| *shard == part.entry);
            return shard.filter(|_| gone.is_some_and(|gone| !gone.contains(&part.first))).map(|_| part);
        }
        let length = fs::metadata(self.dir.join(&part.entry.file)).ok()?.len();
        (length == part.entry.bytes).then_some(part)
    }

    fn spec(&self) -> &CacheSpec {
        &self.manifest.spec
    }

    /// Rows in shards: the first ones.
    fn in_shards(&self) -> u64 {
        self.manifest.rows_done()
    }

    /// Which shard a row goes to, counted from those that are finished.
    fn shard_of(&self, row: u64) -> u64 {
        (row - self.in_shards()) / u64::from(self.spec().shard_rows)
    }

    /// True if every row that is there is in a shard: a [`CacheWriter`] may go on alone.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Rows that need not be captured again.
    pub fn rows_done(&self) -> u64 {
        self.in_shards() + self.parts.values().map(|part| part.entry.rows).sum::<u64>()
    }

    /// Rows that nobody has captured, in order.
    pub fn missing(&self) -> Vec<Range<u64>> {
        let (mut gaps, mut at) = (Vec::new(), self.in_shards());
        for part in self.parts.values() {
            gaps.push(at..part.first);
            at = part.rows().end;
        }
        gaps.push(at..self.spec().rows);
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }

    /// The missing rows, shared out: for each rank what follows each other, with about as many tokens as every other, cut where
    /// shards begin.
    pub fn shares(&self, ranks: usize, tokens: impl Fn(u64) -> u64) -> Vec<Vec<Range<u64>>> {
        let tokens = |row| tokens(row).max(1);
        let all: u64 = self.missing().into_iter().flatten().map(tokens).sum();
        let mut shares: Vec<Vec<Range<u64>>> = vec![Vec::new(); ranks];
        let mut before = 0;
        for row in self.missing().into_iter().flatten() {
            // A row is the rank's that has the middle of it.
            let middle = u128::from(2 * before + tokens(row));
            let rank = (middle * ranks as u128 / u128::from(2 * all)) as usize;
            before += tokens(row);
            match shares[rank].last_mut() {
                Some(range) if range.end == row && self.shard_of(row) == self.shard_of(range.start) => {
                    range.end += 1;
                }
                _ => shares[rank].push(row..row + 1),
            }
        }
        shares
    }

    /// Takes a part that was finished after this was opened.
    pub fn add(&mut self, part: Part) {
        self.parts.insert(part.first, part);
    }

    /// The parts of the next shard, if none of its rows is missing, and how the shard is called.
    fn next_shard(&self) -> Option<(Vec<Part>, String)> {
        let from = self.in_shards();
        let to = (from + u64::from(self.spec().shard_rows)).min(self.spec().rows);
        let parts: Vec<Part> = self.parts.range(from..to).map(|(_, part)| part.clone()).collect();
        // They do not overlap, so as many rows as the shard has are all of them.
        let is_whole = from < to && parts.iter().map(|part| part.entry.rows).sum::<u64>() == to - from;
        is_whole.then(|| (parts, shard_name(self.manifest.shards.len())))
    }

    /// Removes parts that are in shards, with their records: they are of no use any more.
    fn remove(&mut self, parts: &[Part]) {
        for part in parts {
            let _ = fs::remove_file(self.dir.join(part_name(&part.rows()) + RECORD));
            if !part.is_elsewhere() {
                let _ = fs::remove_file(self.dir.join(&part.entry.file));
            }
            self.parts.remove(&part.first);
        }
    }

    /// Makes shards of parts, from the first on, as far as no row is missing.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] if a part is not what its record says, [`CacheError::File`].
    pub fn join(&mut self) -> Result<(), CacheError> {
        while let Some((parts, name)) = self.next_shard() {
            let entry = match parts.as_slice() {
                [whole] => {
                    let path = self.dir.join(&name);
                    fs::rename(self.dir.join(&whole.entry.file), &path)
                        .map_err(|e| AtomicError::from_io("rename to", &path, e))?;
                    ShardEntry { file: name, ..whole.entry.clone() }
                }
                parts => self.copy(parts, name)?,
            };
            // Shard first, manifest second, as in a writer.
            let manifest = self.manifest.with(entry);
            manifest.write(&self.dir)?;
            self.manifest = manifest;
            self.remove(&parts);
        }
        Ok(())
    }

    /// Makes shards of parts where shards lie elsewhere. `hand_over` brings one there, and gives its entry; `list` writes the manifest
    /// there. Nothing is removed before it is listed.
    ///
    /// # Errors
    /// As [`Parts::join`], and those of both.
    pub fn join_elsewhere<E: From<CacheError>>(
        &mut self,
        mut hand_over: impl FnMut(&Path, ShardEntry) -> Result<ShardEntry, E>,
        list: impl FnOnce(&CacheManifest) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut joined = Vec::new();
        while let Some((parts, name)) = self.next_shard() {
            let entry = match parts.as_slice() {
                [whole] if whole.is_elsewhere() => whole.entry.clone(),
                [whole] => {
                    let entry = ShardEntry { file: name, ..whole.entry.clone() };
                    hand_over(&self.dir.join(&whole.entry.file), entry)?
                }
                parts => {
                    let path = self.dir.join(&name);
                    let entry = hand_over(&path, self.copy(parts, name)?)?;
                    fs::remove_file(&path)
                        .map_err(|e| CacheError::from(AtomicError::from_io("remove", &path, e)))?;
                    entry
                }
            };
            self.manifest = self.manifest.with(entry);
            joined.extend(parts);
        }
        if !joined.is_empty() {
            list(&self.manifest)?;
            self.manifest.write(&self.dir)?;
            self.remove(&joined);
        }
        Ok(())
    }

    /// The shards that are there.
    pub fn manifest(&self) -> &CacheManifest {
        &self.manifest
    }

    /// Writes a shard of several parts.
    fn copy(&self, parts: &[Part], name: String) -> Result<ShardEntry, CacheError> {
        let mut shard = ShardFile::create(&self.dir, name)?;
        for part in parts {
            let path = self.dir.join(&part.entry.file);
            let file = Mapped::open(&path)?;
            let damaged = |problem: String| CacheError::Damaged { path: path.clone(), problem };
            if hash::sha256_hex(file.bytes()) != part.entry.sha256 {
                return Err(damaged("its sha256 is not that of its record".to_string()));
            }
            for place in places_in(&file, &part.entry, self.spec()).map_err(damaged)? {
                shard.push_frame(&file[place.offset as usize..place.end() as usize], place.tokens)?;
            }
            shard.count_trained(part.entry.trained_tokens);
        }
        Ok(shard.close()?)
    }

    /// Ends the cache.
    ///
    /// # Errors
    /// As [`Parts::join`]; [`CacheError::Incomplete`] if rows are missing.
    pub fn finish(mut self) -> Result<CacheManifest, CacheError> {
        self.join()?;
        match self.manifest.complete {
            true => Ok(self.manifest),
            false => {
                let (done, rows) = (self.rows_done(), self.spec().rows);
                Err(CacheError::Incomplete { path: self.dir, done, rows })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::CacheReader;
    use super::super::tests::{content, fill, row, spec};
    use super::*;
    use crate::atomic::small_disk;
    use crate::run::CaptureDtype;

    fn tokens_of(row: u64) -> usize {
        2 + row as usize
    }

    fn stored(spec: &CacheSpec, number: u64, tokens: usize) -> StoredRow {
        StoredRow::of_row(&row(number, tokens), spec, number).unwrap()
    }

    /// Writes parts; of the last range of a share only so many rows.
    fn write(dir: &Path, spec: &CacheSpec, share: &[Range<u64>]) -> Vec<Part> {
        let of = |range: &Range<u64>| {
            let mut writer = PartWriter::create(dir, spec, range.clone()).unwrap();
            for number in range.clone() {
                let full = writer.push(&stored(spec, number, tokens_of(number))).unwrap();
                assert_eq!(full, number + 1 == range.end);
            }
            writer.finish().unwrap()
        };
        share.iter().map(of).collect()
    }

    fn alone(spec: &CacheSpec) -> Vec<(String, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), spec, spec.rows);
        content(dir.path())
    }

    #[test]
    fn any_number_of_writers_makes_the_same_bytes() {
        for rows in [1, 3, 8, 20] {
            let spec = spec(CaptureDtype::Int8, rows);
            let wanted = alone(&spec);
            for ranks in 1..=6 {
                // From nothing, and behind a shard that one writer left.
                for before in [0, 3] {
                    let dir = tempfile::tempdir().unwrap();
                    fill(dir.path(), &spec, before.min(rows));
                    let mut parts = Parts::open(dir.path(), &spec).unwrap();
                    assert!(parts.is_empty());
                    let shares = parts.shares(ranks, |row| tokens_of(row) as u64);
                    assert_eq!(shares.len(), ranks);
                    let all: Vec<u64> = shares.iter().flatten().cloned().flatten().collect();
                    assert_eq!(all, (before.min(rows)..rows).collect::<Vec<_>>(), "each row once, in order");
                    for share in &shares {
                        write(dir.path(), &spec, share).into_iter().for_each(|part| parts.add(part));
                    }
                    assert_eq!((parts.rows_done(), parts.missing()), (rows, vec![]));
                    assert!(parts.finish().unwrap().complete);
                    assert_eq!(content(dir.path()), wanted, "{rows} rows by {ranks}, behind {before}");
                }
            }
        }
    }

    /// Brings a shard to a folder, as to a store.
    fn bring(store: &Path, path: &Path, entry: ShardEntry) -> ShardEntry {
        std::fs::copy(path, store.join(&entry.file)).unwrap();
        ShardEntry { rows_sha256: Some("of its places".to_string()), ..entry }
    }

    /// As a rank does: what is a whole shard goes to the store at once.
    fn write_and_move(dir: &Path, store: &Path, manifest: &CacheManifest, share: &[Range<u64>]) -> Vec<Part> {
        let spec = &manifest.spec;
        let of = |part: Part| match part.as_shard(manifest) {
            Some(shard) => {
                let shard = bring(store, &dir.join(&part.entry.file), shard);
                part.moved(dir, spec, shard).unwrap()
            }
            None => part,
        };
        write(dir, spec, share).into_iter().map(of).collect()
    }

    fn go_on(dir: &Path, manifest: &CacheManifest, lost: &[&str]) -> Parts {
        let is_there = |shard: &ShardEntry| Ok::<bool, CacheError>(!lost.contains(&shard.file.as_str()));
        Parts::go_on(dir, manifest.clone(), is_there).unwrap()
    }

    #[test]
    fn shards_that_lie_elsewhere_are_brought_there_once_and_are_those_of_one_writer() {
        for rows in [1, 3, 8, 20] {
            let spec = spec(CaptureDtype::Int8, rows);
            let wanted = alone(&spec);
            for ranks in 1..=5 {
                let (dir, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
                let mut manifest = CacheManifest::begin(&spec);
                // Behind a shard that lies there already.
                if rows == 20 {
                    let first = write(dir.path(), &spec, std::slice::from_ref(&(0..3))).remove(0);
                    let path = dir.path().join(&first.entry.file);
                    let shard = first.as_shard(&manifest).unwrap();
                    manifest = manifest.with(bring(store.path(), &path, shard));
                }
                let parts = go_on(dir.path(), &manifest, &[]);
                assert!(parts.is_empty());
                let shares = parts.shares(ranks, |row| tokens_of(row) as u64);
                for share in &shares {
                    write_and_move(dir.path(), store.path(), &manifest, share);
                }
                // A kill: whoever comes next finds all of it, and less than a shard for each two ranks lies here.
                let mut parts = go_on(dir.path(), &manifest, &[]);
                assert_eq!((parts.missing(), parts.rows_done()), (vec![], rows));
                let here = |ending: &str| {
                    content(dir.path())
                        .iter()
                        .filter(|(n, _)| n.starts_with(PART) && n.ends_with(ending))
                        .count()
                };
                assert!(here(DATA) <= 2 * (ranks - 1), "{} parts of {ranks} ranks", here(DATA));
                let mut listed = None;
                let hand_over = |path: &Path, entry| Ok::<_, CacheError>(bring(store.path(), path, entry));
                let list = |manifest: &CacheManifest| {
                    listed = Some(manifest.clone());
                    Ok(())
                };
                parts.join_elsewhere(hand_over, list).unwrap();
                assert!(listed.as_ref().unwrap().complete);
                assert_eq!((here(DATA), here(RECORD)), (0, 0), "what is listed is not kept here");
                let mut listed = listed.unwrap();
                listed.shards.iter_mut().for_each(|shard| shard.rows_sha256 = None);
                assert_eq!(parts.finish().unwrap().shards.len(), listed.shards.len());
                listed.write(store.path()).unwrap();
                assert_eq!(content(store.path()), wanted, "{rows} rows by {ranks}");
            }
        }
    }

    #[test]
    fn a_shard_that_the_store_lost_and_a_listing_that_failed_are_made_good() {
        let spec = spec(CaptureDtype::Bf16, 10);
        let (dir, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let manifest = CacheManifest::begin(&spec);
        let shares = go_on(dir.path(), &manifest, &[]).shares(2, |_| 1);
        assert_eq!(shares, [vec![0..3, 3..5], vec![5..6, 6..9, 9..10]]);
        for share in &shares {
            write_and_move(dir.path(), store.path(), &manifest, share);
        }
        let lost = [shard_name(2)];
        let mut parts = go_on(dir.path(), &manifest, &[&lost[0]]);
        assert_eq!(parts.missing(), std::slice::from_ref(&(6..9)));
        // The manifest is not written: nothing that lies here may go.
        let before = content(dir.path());
        let hand_over = |path: &Path, entry| Ok::<_, CacheError>(bring(store.path(), path, entry));
        let refused = || CacheError::Missing { path: store.path().to_path_buf() };
        parts.join_elsewhere(hand_over, |_| Err(refused())).unwrap_err();
        assert_eq!(content(dir.path()), before);
        let mut parts = go_on(dir.path(), &manifest, &[]);
        assert_eq!(parts.missing(), std::slice::from_ref(&(6..9)), "its record went, too");
        write_and_move(dir.path(), store.path(), &manifest, std::slice::from_ref(&(6..9)))
            .into_iter()
            .for_each(|part| parts.add(part));
        parts.join_elsewhere(hand_over, |_| Ok(())).unwrap();
        assert!(parts.finish().unwrap().complete);
        // A folder that shards lie in themselves has no use for records of others.
        let parts = Parts::open(tempfile::tempdir().unwrap().path(), &spec).unwrap();
        assert_eq!(parts.missing(), std::slice::from_ref(&(0..10)));
        let (dir, manifest) = (tempfile::tempdir().unwrap(), parts.manifest().clone());
        go_on(dir.path(), &manifest, &[]);
        write_and_move(dir.path(), store.path(), &manifest, std::slice::from_ref(&(0..3)));
        assert!(Parts::are_in(dir.path()));
        assert_eq!(Parts::open(dir.path(), &spec).unwrap().missing(), std::slice::from_ref(&(0..10)));
        assert!(!Parts::are_in(dir.path()));
    }

    #[test]
    fn shares_are_alike_in_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(CaptureDtype::Int8, 400);
        let parts = Parts::open(dir.path(), &spec).unwrap();
        for ranks in [1, 2, 3, 7] {
            let sum = |share: &Vec<Range<u64>>| share.iter().cloned().flatten().sum::<u64>();
            let sums: Vec<u64> = parts.shares(ranks, |row| row).iter().map(sum).collect();
            let (least, most) = (sums.iter().min().unwrap(), sums.iter().max().unwrap());
            assert!(most - least <= 2 * 400, "{sums:?}");
        }
        // More ranks than rows: some have nothing to do.
        let shares = parts.shares(1000, |_| 1);
        assert_eq!(shares.iter().flatten().count(), 400);
    }

    #[test]
    fn what_some_of_them_finished_before_a_kill_is_taken_by_any_other_number() {
        let spec = spec(CaptureDtype::Bf16, 20);
        let wanted = alone(&spec);
        for (first, then) in [(4, 1), (4, 3), (1, 2), (3, 5)] {
            let dir = tempfile::tempdir().unwrap();
            let parts = Parts::open(dir.path(), &spec).unwrap();
            let shares = parts.shares(first, |row| tokens_of(row) as u64);
            drop(parts);
            // Rank 0 came nowhere, the others not to their ends; one was killed inside a part, one before its record.
            let mut made = 0;
            for share in &shares[1..] {
                write(dir.path(), &spec, &share[..share.len() - 1]);
                made += share[..share.len() - 1].iter().cloned().flatten().count() as u64;
            }
            std::fs::write(dir.path().join(".part-0000000000-00003.dscache.1-0.tmp"), b"half").unwrap();
            std::fs::write(dir.path().join("part-0000000000-00003.dscache"), b"no record").unwrap();
            std::fs::write(dir.path().join("part-0000000001-00001.json"), b"{}").unwrap();
            let mut parts = Parts::open(dir.path(), &spec).unwrap();
            assert_eq!(parts.rows_done(), made);
            let left = parts.shares(then, |_| 1);
            assert_eq!(left.iter().flatten().cloned().flatten().count() as u64, 20 - made, "no row twice");
            for share in &left {
                write(dir.path(), &spec, share).into_iter().for_each(|part| parts.add(part));
            }
            parts.finish().unwrap();
            assert_eq!(content(dir.path()), wanted, "{first} then {then}");
            CacheReader::open(dir.path()).unwrap().verify().unwrap();
        }
    }

    #[test]
    fn parts_of_another_cache_or_damaged_ones_do_not_come_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let mine = spec(CaptureDtype::Int8, 9);
        Parts::open(dir.path(), &mine).unwrap();
        let mut other = mine.clone();
        other.tokens_sha256 = "other".to_string();
        write(dir.path(), &other, std::slice::from_ref(&(0..3)));
        write(dir.path(), &mine, &[3..5, 5..6]);
        let parts = Parts::open(dir.path(), &mine).unwrap();
        assert_eq!(parts.missing(), [0..3, 6..9]);
        assert!(!dir.path().join("part-0000000000-00003.dscache").exists());
        // Too short: written again. The right length, but other bytes: found when it is joined.
        let path = dir.path().join("part-0000000005-00001.dscache");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[1..]).unwrap();
        assert_eq!(Parts::open(dir.path(), &mine).unwrap().missing(), [0..3, 5..9]);
        let path = dir.path().join("part-0000000003-00002.dscache");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let mut parts = Parts::open(dir.path(), &mine).unwrap();
        write(dir.path(), &mine, &[0..3, 5..6, 6..9]).into_iter().for_each(|part| parts.add(part));
        let error = parts.finish().unwrap_err();
        assert!(error.to_string().contains("part-0000000003-00002.dscache` is damaged"), "{error}");
    }

    #[test]
    fn a_full_disk_leaves_no_half_part_and_no_half_shard() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(CaptureDtype::Bf16, 3);
        let mut parts = Parts::open(dir.path(), &spec).unwrap();
        let before = content(dir.path());
        let error = small_disk::with(3000, || {
            let mut writer = PartWriter::create(dir.path(), &spec, 0..3).unwrap();
            (0..3).find_map(|number| writer.push(&stored(&spec, number, 9)).err()).unwrap()
        });
        assert!(error.to_string().starts_with("no space left while writing `"), "{error}");
        assert!(error.to_string().contains("part-0000000000-00003.dscache"), "{error}");
        assert!(error.hint().unwrap().contains("run the same command again"));
        assert_eq!(content(dir.path()), before);
        // While a shard is joined: the parts stay, and are joined once there is room.
        write(dir.path(), &spec, &[0..1, 1..3]).into_iter().for_each(|part| parts.add(part));
        let before = content(dir.path());
        let error = small_disk::with(1000, || parts.join().unwrap_err());
        assert!(error.to_string().contains(&shard_name(0)), "{error}");
        assert_eq!(content(dir.path()), before);
        Parts::open(dir.path(), &spec).unwrap().finish().unwrap();
        assert_eq!(content(dir.path()), alone(&spec));
    }

    #[test]
    fn a_part_has_exactly_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(CaptureDtype::Int8, 3);
        let mut writer = PartWriter::create(dir.path(), &spec, 1..2).unwrap();
        assert!(writer.push(&stored(&spec, 1, 4)).unwrap());
        assert_eq!(
            writer.push(&stored(&spec, 2, 4)).unwrap_err().to_string(),
            "row 2 cannot be stored: its part is full"
        );
        let writer = PartWriter::create(dir.path(), &spec, 0..2).unwrap();
        let error = writer.finish().unwrap_err();
        assert_eq!(error.to_string(), "row 0 cannot be stored: its part ends before it");
    }
}
