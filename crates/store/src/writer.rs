//! A capture that goes to a store while it is made.
//!
//! A shard is finished in a local folder, uploaded with its row places on a thread of its own, listed in the manifest of the
//! store, and only then removed here: so at most three shards need room on the disk, and a process that is killed loses the one
//! it was filling. Who comes after it uploads what was finished and not uploaded, and goes on behind that.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::cache::{
    CacheError, CacheManifest, CacheSpec, CacheWriter, MANIFEST_NAME, Part, Parts, RowPlaces, ShardEntry,
    StoredRow,
};
use draftsmith_formats::hash::sha256_file;
use draftsmith_formats::mapped::Mapped;

use crate::client::Store;
use crate::error::StoreError;

/// Bytes of the largest manifest that is believed.
pub(crate) const MANIFEST_MAX: u64 = 256 << 20;

/// Reads the manifest of a capture in a store, and holds it against what is wanted; `None` if there is none.
pub(crate) fn manifest_in(store: &Store, wanted: &CacheSpec) -> Result<Option<CacheManifest>, StoreError> {
    let Some(bytes) = store.read_whole(MANIFEST_NAME, MANIFEST_MAX)? else { return Ok(None) };
    let path = PathBuf::from(store.address().join(MANIFEST_NAME).to_string());
    let manifest = CacheManifest::parse(&bytes, &path)?;
    manifest.check_spec(wanted, Path::new(&store.address().to_string()))?;
    Ok(Some(manifest))
}

/// A finished shard on its way.
struct Job {
    path: PathBuf,
    entry: ShardEntry,
    /// It is ours alone, and goes when the store has it.
    remove: bool,
}

/// Writes a target cache into a store. After a kill, opening it again goes on behind the last finished shard.
pub struct StoredWriter {
    writer: CacheWriter,
    dir: PathBuf,
    /// Shards that were handed over.
    handed: usize,
    courier: Courier<Job, CacheManifest>,
}

impl StoredWriter {
    /// Starts a capture in a store, or goes on with one. Shards are made in `dir`; finished ones of the same capture there, and
    /// in the folders of `others`, are uploaded instead of being made again.
    ///
    /// # Errors
    /// What keeps from reading or writing in either place.
    pub fn open(
        dir: impl AsRef<Path>,
        spec: &CacheSpec,
        store: &Store,
        others: &[PathBuf],
    ) -> Result<StoredWriter, StoreError> {
        let dir = dir.as_ref();
        let mut upload = Upload::begin(store.clone(), spec)?;
        upload.bring(dir, others)?;
        let writer = CacheWriter::go_on(dir, upload.manifest.clone())?;
        let handed = writer.manifest().shards.len();
        let courier = Courier::start(move |waiting| upload.run(waiting));
        Ok(StoredWriter { writer, dir: dir.to_path_buf(), handed, courier })
    }

    /// Rows that need not be captured again: the next row to push has this number.
    pub fn rows_done(&self) -> u64 {
        self.writer.rows_done()
    }

    /// Rows in finished shards, here or in the store.
    pub fn rows_finished(&self) -> u64 {
        self.writer.manifest().rows_done()
    }

    /// Bytes in finished shards and the open one.
    pub fn bytes_written(&self) -> u64 {
        self.writer.bytes_written()
    }

    /// Adds the row with number [`StoredWriter::rows_done`].
    ///
    /// # Errors
    /// Those of [`CacheWriter::push_stored`], and of an upload that failed meanwhile.
    pub fn push(&mut self, row: &StoredRow) -> Result<(), StoreError> {
        self.writer.push_stored(row)?;
        let shards = &self.writer.manifest().shards;
        while self.handed < shards.len() {
            let entry = shards[self.handed].clone();
            let job = Job { path: self.dir.join(&entry.file), entry, remove: true };
            self.courier.send(job)?;
            self.handed += 1;
        }
        Ok(())
    }

    /// Ends the capture: afterwards the store has all of it.
    ///
    /// # Errors
    /// [`CacheError::Incomplete`] if rows are missing; what keeps from uploading.
    pub fn finish(mut self) -> Result<CacheManifest, StoreError> {
        let manifest = self.courier.wait()?;
        match manifest.complete {
            true => Ok(manifest),
            false => Err(CacheError::Incomplete {
                path: self.dir.clone(),
                done: self.rows_done(),
                rows: manifest.spec.rows,
            }
            .into()),
        }
    }
}

/// A thread that uploads what it is sent.
struct Courier<J, T> {
    jobs: Option<SyncSender<J>>,
    thread: Option<JoinHandle<Result<T, StoreError>>>,
}

impl<J: Send + 'static, T: Send + 'static> Courier<J, T> {
    fn start(work: impl FnOnce(&Receiver<J>) -> Result<T, StoreError> + Send + 'static) -> Courier<J, T> {
        // One shard may wait while another travels.
        let (jobs, waiting) = sync_channel(1);
        Courier { jobs: Some(jobs), thread: Some(std::thread::spawn(move || work(&waiting))) }
    }

    /// Fails as the upload did that failed meanwhile.
    fn send(&mut self, job: J) -> Result<(), StoreError> {
        match self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) {
            true => Ok(()),
            false => Err(self.wait().err().unwrap_or(StoreError::Stopped)),
        }
    }

    /// Waits until the store has all.
    fn wait(&mut self) -> Result<T, StoreError> {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            // A panic there was told where it happened.
            Some(Err(_)) | None => Err(StoreError::Stopped),
        }
    }
}

impl<J, T> Drop for Courier<J, T> {
    fn drop(&mut self) {
        // Whoever gives up waits for what is on its way: the next one would otherwise upload it beside this one.
        self.jobs = None;
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// The side that talks to the store.
struct Upload {
    store: Store,
    manifest: CacheManifest,
}

impl Upload {
    fn begin(store: Store, spec: &CacheSpec) -> Result<Upload, StoreError> {
        let manifest = match manifest_in(&store, spec)? {
            Some(manifest) => manifest,
            None => {
                let new = CacheManifest::begin(spec);
                // Now, not after the first shard: whoever may not write there learns it before the work.
                store.write(MANIFEST_NAME, new.to_text().into_bytes())?;
                new
            }
        };
        Ok(Upload { store, manifest })
    }

    fn run(mut self, jobs: &Receiver<Job>) -> Result<CacheManifest, StoreError> {
        for job in jobs {
            self.shard(&job)?;
        }
        Ok(self.manifest)
    }

    /// Uploads finished shards of the capture that lie in `dir`, or in the folders of `others`.
    fn bring(&mut self, dir: &Path, others: &[PathBuf]) -> Result<(), StoreError> {
        // Nearest first: what this very capture left.
        for folder in std::iter::once(dir).chain(others.iter().map(PathBuf::as_path)) {
            let found = CacheManifest::read(folder).ok().flatten();
            let spec = &self.manifest.spec;
            let Some(found) = found.filter(|found| found.spec.difference(spec).is_none()) else { continue };
            for entry in found.shards.get(self.manifest.shards.len()..).unwrap_or_default() {
                let path = folder.join(&entry.file);
                let is_whole = path.metadata().is_ok_and(|meta| meta.len() == entry.bytes)
                    && sha256_file(&path).is_ok_and(|sha256| sha256 == entry.sha256);
                if !is_whole {
                    break;
                }
                self.shard(&Job { path, entry: entry.clone(), remove: folder == dir })?;
            }
        }
        Ok(())
    }

    /// Shard first, then its row places, then the manifest that lists both.
    fn shard(&mut self, job: &Job) -> Result<(), StoreError> {
        let Job { path, entry, remove } = job;
        let manifest = self.manifest.with(upload(&self.store, &self.manifest.spec, path, entry.clone())?);
        self.list(&manifest)?;
        self.manifest = manifest;
        if *remove {
            std::fs::remove_file(path).map_err(|e| AtomicError::from_io("remove", path, e))?;
        }
        Ok(())
    }

    fn list(&self, manifest: &CacheManifest) -> Result<(), StoreError> {
        self.store.write(MANIFEST_NAME, manifest.to_text().into_bytes())
    }
}

/// Uploads a shard, then its row places. Gives its entry, with the hash of these.
fn upload(
    store: &Store,
    spec: &CacheSpec,
    path: &Path,
    mut entry: ShardEntry,
) -> Result<ShardEntry, StoreError> {
    let places = {
        let shard = Mapped::open(path).map_err(CacheError::from)?;
        RowPlaces::of_shard(&shard, &entry, spec)
            .map_err(|problem| CacheError::Damaged { path: path.to_path_buf(), problem })?
    };
    let rows = places.to_bytes();
    entry.rows_sha256 = Some(draftsmith_formats::hash::sha256_hex(&rows));
    store.write_file(&entry.file, path)?;
    store.write(&entry.rows_file(), rows)?;
    Ok(entry)
}

/// A capture in a store that several processes fill, each with rows of its own ([`Parts`]). Whoever makes a whole shard uploads it
/// ([`ShardUploads`]); this is the side of the one that lists them.
///
/// Parts that are less than a shard, two between each two processes, wait in a folder that all see, with the records of all
/// that the manifest does not list yet: so a run that was killed goes on from there.
pub struct StoredParts {
    parts: Parts,
    upload: Upload,
}

impl StoredParts {
    /// Starts a capture in a store, or goes on with one. Finished shards are uploaded as [`StoredWriter::open`] does.
    ///
    /// # Errors
    /// What keeps from reading or writing in either place.
    pub fn open(
        dir: impl AsRef<Path>,
        spec: &CacheSpec,
        store: &Store,
        others: &[PathBuf],
    ) -> Result<StoredParts, StoreError> {
        let dir = dir.as_ref();
        let mut upload = Upload::begin(store.clone(), spec)?;
        upload.bring(dir, others)?;
        let parts = Parts::go_on(dir, upload.manifest.clone(), |shard| {
            Ok::<bool, StoreError>(store.find(&shard.file)?.is_some_and(|found| found.size == shard.bytes))
        })?;
        Ok(StoredParts { parts, upload })
    }

    /// The parts.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Takes a part that was finished after this was opened.
    pub fn add(&mut self, part: Part) {
        self.parts.add(part);
    }

    /// Ends the capture: uploads what lies here, and lists all.
    ///
    /// # Errors
    /// [`CacheError::Incomplete`] if rows are missing; what keeps from uploading.
    pub fn finish(mut self) -> Result<CacheManifest, StoreError> {
        let StoredParts { parts, upload: side } = &mut self;
        parts.join_elsewhere(
            |path, entry| upload(&side.store, &side.manifest.spec, path, entry),
            |manifest| side.list(manifest),
        )?;
        Ok(self.parts.finish()?)
    }
}

/// Uploads the whole shards that a process makes, on a thread of its own.
pub struct ShardUploads {
    courier: Courier<Part, Vec<Part>>,
}

impl ShardUploads {
    /// Of a capture that [`StoredParts::open`] has begun in a folder.
    ///
    /// # Errors
    /// [`CacheError::Missing`] if it has not.
    pub fn begin(dir: &Path, spec: &CacheSpec, store: &Store) -> Result<ShardUploads, StoreError> {
        let missing = || CacheError::Missing { path: dir.to_path_buf() };
        let manifest = CacheManifest::read(dir)?.ok_or_else(missing)?;
        manifest.check_spec(spec, dir)?;
        let (dir, spec, store) = (dir.to_path_buf(), spec.clone(), store.clone());
        let work = move |waiting: &Receiver<Part>| {
            let mut made = Vec::new();
            for part in waiting {
                made.push(match part.as_shard(&manifest) {
                    None => part,
                    Some(shard) => {
                        let shard = upload(&store, &manifest.spec, &dir.join(&part.entry.file), shard)?;
                        part.moved(&dir, &spec, shard)?
                    }
                });
            }
            Ok(made)
        };
        Ok(ShardUploads { courier: Courier::start(work) })
    }

    /// Takes a finished part. Less than a shard stays where it is.
    ///
    /// # Errors
    /// Those of an upload that failed meanwhile.
    pub fn take(&mut self, part: Part) -> Result<(), StoreError> {
        self.courier.send(part)
    }

    /// Waits until the store has all; gives the parts as they are now.
    ///
    /// # Errors
    /// Those of an upload.
    pub fn finish(mut self) -> Result<Vec<Part>, StoreError> {
        self.courier.wait()
    }
}
