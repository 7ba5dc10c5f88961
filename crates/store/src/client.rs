//! Objects of one folder of a store: read in ranges, written whole, repeated where a fault may pass.
//!
//! Invariant: what is given on has the length that was asked for and passed the caller's check, and an object is there whole or
//! not at all. Every error names the object. Nothing is ever removed from a store but the parts of an upload that was given up.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use draftsmith_core::patience::pause;
use draftsmith_core::report::Stop;
use draftsmith_formats::atomic::AtomicError;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectStoreExt, PutPayload};

use crate::address::{Address, BadAddress, Scheme};
use crate::connect::{Seen, run};
use crate::error::{Fault, StoreError};
use crate::settings::{Client, client, plain};

/// Bytes that one request reads at most.
const PIECE: u64 = 8 << 20;
/// Bytes of a part of an upload; a larger object than `PARTS_MAX` of them has larger ones.
const PART: u64 = 16 << 20;
/// Parts that S3 allows.
const PARTS_MAX: u64 = 10_000;
/// Pause before the first repetition; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(300);
/// Repetitions that nobody hears about.
const QUIET_REPETITIONS: u32 = 2;
/// Bytes that are not the right ones come again more often than not: so often are they asked for once more.
const WRONG_BYTES_RETRIES: u32 = 3;
/// A wish to stop is noticed this often in a pause.
const STOP_POLL: Duration = Duration::from_millis(50);
/// Notes that nobody took are not kept for ever.
const NOTES_MAX: usize = 100;

/// How patiently a store is asked, and where its client comes from.
pub struct Settings<'a> {
    /// Nothing but folders may be used.
    pub offline: bool,
    /// Looks up a variable of the environment.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// Silence after which a request is repeated.
    pub timeout: Duration,
    /// How often it is repeated.
    pub retries: u32,
    /// The wish to stop.
    pub stop: Stop,
}

/// How often a store was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Requests of ours; a client may make more of one.
    pub requests: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Those that failed and were worth another attempt, by what went wrong.
    pub faults: BTreeMap<String, u64>,
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} requests", self.requests)?;
        let faults: Vec<String> = self.faults.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        if faults.is_empty() { Ok(()) } else { write!(f, ", of them failed: {}", faults.join(", ")) }
    }
}

/// What a store says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Bytes.
    pub size: u64,
    /// Another content has another tag; not every store has tags.
    pub tag: Option<String>,
    /// When it was written.
    pub written: String,
}

impl Object {
    /// All that is known of its content without reading it.
    pub fn identity(&self) -> String {
        let version = self.tag.as_deref().unwrap_or(&self.written);
        format!("{} bytes, {}", self.size, version.trim_matches('"'))
    }
}

/// A folder of a store, for any number of threads.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    address: Address,
    client: Client,
    retries: u32,
    stop: Stop,
    asked: Mutex<Asked>,
    notes: Mutex<Vec<String>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.0.address).finish()
    }
}

/// Why an attempt gave nothing.
enum Failure {
    Passing(Fault),
    Lasting(StoreError),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A client of the folder at an address. Nothing is asked yet.
    ///
    /// # Errors
    /// [`StoreError::Offline`], [`StoreError::Settings`].
    pub fn open(address: &Address, settings: Settings<'_>) -> Result<Store, StoreError> {
        if settings.offline && !address.is_local() && !is_here(address.scheme, settings.variable) {
            return Err(StoreError::Offline { address: address.clone() });
        }
        let client = client(address, settings.timeout, settings.variable)?;
        Ok(Store(Arc::new(Inner {
            address: address.clone(),
            client,
            retries: settings.retries,
            stop: settings.stop,
            asked: Mutex::default(),
            notes: Mutex::default(),
        })))
    }

    /// A folder inside, through the same client; its requests are counted by themselves.
    #[must_use]
    pub fn inside(&self, name: &str) -> Store {
        let Inner { address, client, retries, stop, .. } = &*self.0;
        let client = Client {
            objects: Arc::clone(&client.objects),
            parts: client.parts.clone(),
            link: Arc::clone(&client.link),
        };
        Store(Arc::new(Inner {
            address: address.join(name),
            client,
            retries: *retries,
            stop: stop.clone(),
            asked: Mutex::default(),
            notes: Mutex::default(),
        }))
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.0.address
    }

    /// Requests so far.
    pub fn asked(&self) -> Asked {
        lock(&self.0.asked).clone()
    }

    /// What a user should know and was not told yet: requests that keep failing.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.0.notes))
    }

    /// What there is under a name; `None` of nothing.
    ///
    /// # Errors
    /// [`StoreError::NoBucket`] and what else keeps from asking.
    pub fn find(&self, name: &str) -> Result<Option<Object>, StoreError> {
        let object = self.0.address.join(name);
        let path = path_of(&object)?;
        let found = self.persist(&object, "read", || {
            let (found, seen) = run(self.0.client.objects.head(&path));
            found.map_err(|error| self.judge(&object, "read", &error, seen))
        });
        match found {
            Ok(meta) => Ok(Some(Object {
                size: meta.size,
                tag: meta.e_tag,
                written: meta.last_modified.to_rfc3339(),
            })),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The bucket is there and lets us read; of a folder, it is there.
    ///
    /// # Errors
    /// [`StoreError::NoBucket`], [`StoreError::Missing`] of a folder, and what else keeps from reading.
    pub fn reach(&self) -> Result<(), StoreError> {
        if let Some(folder) = self.0.address.folder() {
            let object = self.0.address.clone();
            return match folder.is_dir() {
                true => Ok(()),
                false => Err(StoreError::Missing { object }),
            };
        }
        // An answer without a body, as that to a question for the size, does not tell a missing bucket from a missing object.
        match self.read("manifest.json", 0..1, None, |_| Ok(())) {
            Ok(_) | Err(StoreError::Missing { .. } | StoreError::Changed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Bytes of an object that pass a check. With a tag it must be that content.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Changed`], and what else keeps from reading.
    pub fn read(
        &self,
        name: &str,
        range: Range<u64>,
        tag: Option<&str>,
        check: impl Fn(&[u8]) -> Result<(), String>,
    ) -> Result<Vec<u8>, StoreError> {
        let object = self.0.address.join(name);
        let path = path_of(&object)?;
        let mut attempts = 0;
        loop {
            let mut bytes = Vec::with_capacity(usize::try_from(range.end - range.start).unwrap_or_default());
            let mut at = range.start;
            while at < range.end {
                let piece = at..(at + PIECE).min(range.end);
                let got = self.persist(&object, "read", || self.piece(&object, &path, &piece, tag))?;
                bytes.extend_from_slice(&got);
                at = piece.end;
            }
            match check(&bytes) {
                Ok(()) => {
                    lock(&self.0.asked).bytes_read += bytes.len() as u64;
                    return Ok(bytes);
                }
                Err(problem) => {
                    let most = self.0.retries.min(WRONG_BYTES_RETRIES);
                    self.again(&object, "read", &mut attempts, most, Fault::WrongBytes { problem })?;
                }
            }
        }
    }

    fn piece(
        &self,
        object: &Address,
        path: &ObjectPath,
        range: &Range<u64>,
        tag: Option<&str>,
    ) -> Result<hyper::body::Bytes, Failure> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            if_match: tag.map(str::to_string),
            ..GetOptions::default()
        };
        let (got, seen) = run(async { self.0.client.objects.get_opts(path, options).await?.bytes().await });
        let bytes = got.map_err(|error| self.judge(object, "read", &error, seen))?;
        let (found, wanted) = (bytes.len() as u64, range.end - range.start);
        if found != wanted {
            let reason = format!("{found} bytes, where {wanted} were asked for");
            return Err(Failure::Passing(Fault::Garbled { reason }));
        }
        Ok(bytes)
    }

    /// A small object, whole; `None` if there is none.
    ///
    /// # Errors
    /// It is larger than the limit, and what else keeps from reading.
    pub fn read_whole(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
        // Whoever writes it puts another one in its place: then it is read once more.
        for attempt in 0.. {
            let Some(found) = self.find(name)? else { return Ok(None) };
            if found.size > limit {
                return Err(StoreError::Refused {
                    object: self.0.address.join(name),
                    status: 200,
                    message: format!("it has {} bytes, more than {limit}", found.size),
                });
            }
            match self.read(name, 0..found.size, found.tag.as_deref(), |_| Ok(())) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(StoreError::Changed { .. }) if attempt < WRONG_BYTES_RETRIES => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the loop ends by itself")
    }

    /// Writes an object, in place of the one that was there.
    ///
    /// # Errors
    /// What keeps from writing.
    pub fn write(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
        let object = self.0.address.join(name);
        let path = path_of(&object)?;
        let len = bytes.len() as u64;
        let payload = PutPayload::from(bytes);
        self.persist(&object, "written", || {
            let (done, seen) = run(self.0.client.objects.put(&path, payload.clone()));
            done.map(drop).map_err(|error| self.judge(&object, "written", &error, seen))
        })?;
        lock(&self.0.asked).bytes_written += len;
        Ok(())
    }

    /// Writes a file as an object, in parts if it is large.
    ///
    /// # Errors
    /// The file cannot be read; what keeps from writing.
    pub fn write_file(&self, name: &str, file: &Path) -> Result<(), StoreError> {
        let disk = |e| StoreError::from(AtomicError::from_io("read", file, e));
        let mut open = std::fs::File::open(file).map_err(disk)?;
        let size = open.metadata().map_err(disk)?.len();
        let part = PART.max(size.div_ceil(PARTS_MAX));
        let mut next = |at: u64| -> Result<Vec<u8>, StoreError> {
            let len = part.min(size - at);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
            open.read_exact(&mut bytes).map_err(disk)?;
            Ok(bytes)
        };
        if size <= part {
            return self.write(name, next(0)?);
        }
        let object = self.0.address.join(name);
        let path = path_of(&object)?;
        let Some(parts) = &self.0.client.parts else {
            return self.write_in_folder(&object, &path, size, part, &mut next);
        };
        let id = self.persist(&object, "written", || {
            let (id, seen) = run(parts.create_multipart(&path));
            id.map_err(|error| self.judge(&object, "written", &error, seen))
        })?;
        let mut upload = || {
            let (mut done, mut at) = (Vec::new(), 0);
            while at < size {
                let payload = PutPayload::from(next(at)?);
                at += payload.content_length() as u64;
                done.push(self.persist(&object, "written", || {
                    let (part, seen) = run(parts.put_part(&path, &id, done.len(), payload.clone()));
                    part.map_err(|error| self.judge(&object, "written", &error, seen))
                })?);
            }
            let ended = self.persist(&object, "written", || {
                let (ended, seen) = run(parts.complete_multipart(&path, &id, done.clone()));
                ended.map(drop).map_err(|error| self.judge(&object, "written", &error, seen))
            });
            match ended {
                // The answer to the first attempt was lost on the way: the upload is over, and the object there.
                Err(StoreError::Missing { .. })
                    if self.find(name)?.is_some_and(|found| found.size == size) =>
                {
                    Ok(())
                }
                ended => ended,
            }
        };
        let done = upload();
        if done.is_err() {
            // What was sent costs money as long as it is kept. It is ours, and nobody else knows its number.
            drop(run(parts.abort_multipart(&path, &id)));
        }
        done?;
        lock(&self.0.asked).bytes_written += size;
        Ok(())
    }

    /// In a folder: beside its final name, and moved there when it is whole.
    fn write_in_folder(
        &self,
        object: &Address,
        path: &ObjectPath,
        size: u64,
        part: u64,
        next: &mut dyn FnMut(u64) -> Result<Vec<u8>, StoreError>,
    ) -> Result<(), StoreError> {
        let failed = |(done, seen): (object_store::Result<()>, Seen)| {
            done.map_err(|error| match self.judge(object, "written", &error, seen) {
                Failure::Lasting(error) => error,
                Failure::Passing(last) => {
                    StoreError::GaveUp { object: object.clone(), action: "written", attempts: 1, last }
                }
            })
        };
        let (begun, seen) = run(self.0.client.objects.put_multipart(path));
        let mut upload = match begun {
            Ok(upload) => upload,
            Err(error) => return failed((Err(error), seen)),
        };
        let mut at = 0;
        while at < size {
            if self.0.stop.requested() {
                drop(run(upload.abort()));
                return Err(StoreError::Stopped);
            }
            let payload = PutPayload::from(next(at)?);
            at += payload.content_length() as u64;
            debug_assert!(payload.content_length() as u64 <= part);
            if let Err(error) = failed(run(upload.put_part(payload))) {
                drop(run(upload.abort()));
                return Err(error);
            }
        }
        failed(run(async { upload.complete().await.map(drop) }))?;
        lock(&self.0.asked).bytes_written += size;
        Ok(())
    }

    /// Tries until it works, cannot work, or the patience ends.
    fn persist<T>(
        &self,
        object: &Address,
        action: &'static str,
        attempt: impl Fn() -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        let mut attempts = 0;
        loop {
            if self.0.stop.requested() {
                return Err(StoreError::Stopped);
            }
            lock(&self.0.asked).requests += 1;
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Failure::Lasting(error)) => return Err(error),
                Err(Failure::Passing(fault)) => {
                    self.again(object, action, &mut attempts, self.0.retries, fault)?;
                }
            }
        }
    }

    /// Waits before another attempt, or gives up.
    fn again(
        &self,
        object: &Address,
        action: &'static str,
        attempts: &mut u32,
        most: u32,
        fault: Fault,
    ) -> Result<(), StoreError> {
        *lock(&self.0.asked).faults.entry(fault.kind()).or_default() += 1;
        *attempts += 1;
        // What was never reached is not waited for: a wrong address would only be told after minutes.
        let never_seen = matches!(fault, Fault::NoConnection { .. }) && !self.0.client.link.is_alive();
        if *attempts > most || never_seen {
            let object = object.clone();
            return Err(StoreError::GaveUp { object, action, attempts: *attempts, last: fault });
        }
        let pause = pause(FIRST_PAUSE, *attempts, RandomState::new().hash_one(&object.path));
        if *attempts > QUIET_REPETITIONS {
            let mut notes = lock(&self.0.notes);
            if notes.len() < NOTES_MAX {
                notes.push(format!(
                    "`{object}`: {fault}; attempt {} of {} in {:.0} s",
                    *attempts + 1,
                    most + 1,
                    pause.as_secs_f64()
                ));
            }
        }
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if self.0.stop.requested() {
                return Err(StoreError::Stopped);
            }
            std::thread::sleep(STOP_POLL.min(until.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }

    /// What an error of the library is, beside what came over the wire.
    fn judge(
        &self,
        object: &Address,
        action: &'static str,
        error: &object_store::Error,
        seen: Seen,
    ) -> Failure {
        use object_store::Error;
        let object = object.clone();
        if object.scheme == Scheme::File {
            return Failure::Lasting(in_folder(object, action, error));
        }
        let Seen { status, code, message, region, fault, is_metadata } = seen;
        // Whoever had credentials before will have them again.
        if is_metadata && !self.0.client.link.is_alive() {
            let reason = fault.map_or_else(|| message.clone(), |fault| fault.to_string());
            return Failure::Lasting(StoreError::NoCredentials { address: self.0.address.clone(), reason });
        }
        if let Some(fault) = fault {
            return Failure::Passing(fault);
        }
        if is_metadata {
            return Failure::Passing(Fault::Status { status: status.unwrap_or_default(), message });
        }
        let Some(status) = status else {
            // Nothing was sent: a file of credentials that cannot be read, or the like.
            let problem = self.0.client.link.without_secrets(plain(error));
            return Failure::Lasting(StoreError::Settings { address: self.0.address.clone(), problem });
        };
        // Of two regions the store's own word counts; a wrong one is told as a redirect, or as a refusal.
        let misplaced = matches!(status, 301 | 307)
            || matches!(code.as_str(), "AuthorizationHeaderMalformed" | "PermanentRedirect");
        Failure::Lasting(match (status, error) {
            _ if misplaced => StoreError::WrongRegion { object, region },
            (404, _) if matches!(code.as_str(), "NoSuchBucket" | "ContainerNotFound") => {
                StoreError::NoBucket { object }
            }
            (404, _) => StoreError::Missing { object },
            (412, _) => StoreError::Changed { object },
            (401 | 403, _) => StoreError::NoAccess { object, status, message },
            (400, _) if matches!(code.as_str(), "ExpiredToken" | "InvalidToken") => {
                StoreError::NoAccess { object, status, message }
            }
            // A range behind the end: it became shorter.
            (416, _) => StoreError::Changed { object },
            (408 | 409 | 425 | 429 | 500.., _) => return Failure::Passing(Fault::Status { status, message }),
            (200..300, Error::NotSupported { .. } | Error::NotImplemented { .. }) => {
                StoreError::Refused { object, status, message: plain(error) }
            }
            (200..300, _) => {
                let reason = self.0.client.link.without_secrets(plain(error));
                return Failure::Passing(Fault::Garbled { reason: reason.chars().take(300).collect() });
            }
            _ => StoreError::Refused { object, status, message },
        })
    }
}

/// What the system said, where the store is a folder.
fn in_folder(object: Address, action: &'static str, error: &object_store::Error) -> StoreError {
    use std::error::Error as _;
    use std::io::ErrorKind;
    let mut chain = error.source();
    let mut io = None;
    while let Some(cause) = chain {
        io = cause.downcast_ref::<std::io::Error>().or(io);
        chain = cause.source();
    }
    let kind = io.map(std::io::Error::kind);
    match (error, kind) {
        (object_store::Error::NotFound { .. }, _) | (_, Some(ErrorKind::NotFound)) => {
            StoreError::Missing { object }
        }
        (object_store::Error::Precondition { .. }, _) => StoreError::Changed { object },
        _ => StoreError::Folder {
            object,
            action,
            reason: io.map_or_else(|| plain(error), ToString::to_string),
            is_full: matches!(
                kind,
                Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
            ),
        },
    }
}

/// True where the endpoint is this machine: no network is needed then.
fn is_here(scheme: Scheme, variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let names: &[&str] = match scheme {
        Scheme::File => return true,
        Scheme::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"],
        Scheme::Gs => &["GOOGLE_BASE_URL"],
        Scheme::Az => &["AZURE_STORAGE_ENDPOINT"],
    };
    // The first that is set has the say.
    let host = names.iter().find_map(|name| variable(name)).and_then(|url| {
        let uri: ureq::http::Uri = url.parse().ok()?;
        uri.host().map(str::to_string)
    });
    host.is_some_and(|host| matches!(host.as_str(), "localhost" | "127.0.0.1" | "[::1]"))
}

fn path_of(object: &Address) -> Result<ObjectPath, BadAddress> {
    let bad = |problem: String| BadAddress { address: object.to_string(), problem };
    match object.scheme {
        Scheme::File => ObjectPath::from_absolute_path(format!("/{}", object.path))
            .map_err(|error| bad(format!("is no path: {error}"))),
        _ => {
            ObjectPath::parse(&object.path).map_err(|error| bad(format!("is no name of an object: {error}")))
        }
    }
}
