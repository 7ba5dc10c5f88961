//! Hashes of large files, kept so that a start need not read a file to know it.
//!
//! A record holds what the system says about the file when it was hashed: device, inode, size, and the times of the
//! last change of its content and of its entry. The latter cannot be set by programs, so writing into a file, renaming
//! another over it and putting its old time back all show. A file that changed less than [`SETTLED`] before it was read
//! gets no record, since clocks of file systems are coarse. Where a system has none of this every start hashes.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::atomic::{self, AtomicError};
use crate::hash::{is_sha256_hex, sha256_file, sha256_hex};

/// Smaller files are hashed each time: that takes a few milliseconds.
const SMALLEST: u64 = 16 << 20;
/// How long a file must have been left alone.
const SETTLED: Duration = Duration::from_secs(3);
/// Records in a folder, of which the oldest go.
const MOST: usize = 256;

/// What a file is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Identity {
    #[cfg(unix)]
    fn of(path: &Path) -> Option<Identity> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path).ok()?;
        let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        Some(Identity {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.size(),
            modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        })
    }

    #[cfg(not(unix))]
    fn of(_: &Path) -> Option<Identity> {
        None
    }

    /// Nothing changed for a while before `now`.
    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        self.modified_ns.max(self.changed_ns) + SETTLED.as_nanos() as i128 <= now
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    path: PathBuf,
    file: Identity,
    sha256: String,
}

/// A folder of records; none means that every file is hashed.
#[derive(Clone, Debug)]
pub struct HashRecords {
    folder: Option<PathBuf>,
}

impl HashRecords {
    /// Records in a folder, which need not exist.
    pub fn new(folder: Option<PathBuf>) -> HashRecords {
        HashRecords { folder }
    }

    fn record_path(&self, path: &Path) -> Option<PathBuf> {
        let key = sha256_hex(path.as_os_str().as_encoded_bytes());
        Some(self.folder.as_ref()?.join(format!("{}.json", &key[..32])))
    }

    /// The hash of a file if a record of it is there and holds.
    pub fn find(&self, path: &Path) -> Option<String> {
        let path = path.canonicalize().ok()?;
        let record: Record = serde_json::from_slice(&std::fs::read(self.record_path(&path)?).ok()?).ok()?;
        let holds = record.version == 1 && record.path == path && is_sha256_hex(&record.sha256);
        (holds && Identity::of(&path)? == record.file).then_some(record.sha256)
    }

    /// SHA-256 of a file, from its record or from its bytes.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn sha256_file(&self, path: impl AsRef<Path>) -> Result<String, AtomicError> {
        let path = path.as_ref();
        if let Some(sha256) = self.find(path) {
            return Ok(sha256);
        }
        let (before, now) = (Identity::of(path), SystemTime::now());
        let sha256 = sha256_file(path)?;
        if let Some(file) = before
            && file.bytes >= SMALLEST
            && file.is_settled(now)
            && Identity::of(path).is_some_and(|after| after == file)
        {
            self.keep(path, file, &sha256);
        }
        Ok(sha256)
    }

    /// Where the folder cannot be written nothing is kept, and the next start hashes again.
    fn keep(&self, path: &Path, file: Identity, sha256: &str) {
        let Ok(path) = path.canonicalize() else { return };
        let Some(target) = self.record_path(&path) else { return };
        let record = Record { version: 1, path, file, sha256: sha256.to_owned() };
        let Ok(text) = serde_json::to_string(&record) else { return };
        if atomic::write(&target, text + "\n").is_ok() {
            self.prune();
        }
    }

    fn prune(&self) {
        let Some(entries) = self.folder.as_ref().and_then(|f| std::fs::read_dir(f).ok()) else { return };
        let mut records: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|e| e.path().extension().is_some_and(|e| e == "json"))
            .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
            .collect();
        records.sort();
        let excess = records.len().saturating_sub(MOST);
        for (_, path) in &records[..excess] {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::fs::{File, FileTimes};

    /// Reads `find` before and after something is done to a file whose hash was recorded.
    #[track_caller]
    fn check(change: impl FnOnce(&Path, SystemTime), holds: bool) {
        let dir = tempfile::tempdir().unwrap();
        let records = HashRecords::new(Some(dir.path().join("hashes")));
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, b"weights").unwrap();
        let modified = path.metadata().unwrap().modified().unwrap();
        let sha256 = sha256_file(&path).unwrap();
        records.keep(&path, Identity::of(&path).unwrap(), &sha256);
        assert_eq!(records.find(&path).as_deref(), Some(sha256.as_str()));
        std::thread::sleep(Duration::from_millis(20));
        change(&path, modified);
        assert_eq!(records.find(&path).is_some(), holds);
        assert_eq!(records.sha256_file(&path).unwrap(), sha256_file(&path).unwrap());
    }

    #[test]
    fn a_record_holds_for_the_file_that_was_hashed_and_for_no_other() {
        let put_back = |path: &Path, time| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_times(FileTimes::new().set_modified(time))
                .unwrap();
        };
        check(|_, _| {}, true);
        check(|path, _| drop(std::fs::read(path).unwrap()), true);
        // Of the same length, of another, the same bytes in a new file.
        check(|path, _| std::fs::write(path, b"WEIGHTS").unwrap(), false);
        check(|path, _| std::fs::write(path, b"weight").unwrap(), false);
        // The time is put back.
        check(
            |path, time| {
                std::fs::write(path, b"WEIGHTS").unwrap();
                put_back(path, time);
            },
            false,
        );
        // Another file with that time takes its place.
        check(
            |path, time| {
                let other = path.with_extension("other");
                std::fs::write(&other, b"WEIGHTS").unwrap();
                put_back(&other, time);
                std::fs::rename(&other, path).unwrap();
            },
            false,
        );
    }

    #[test]
    fn a_file_that_just_changed_is_not_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"a").unwrap();
        let identity = Identity::of(&path).unwrap();
        assert!(!identity.is_settled(SystemTime::now()));
        assert!(identity.is_settled(SystemTime::now() + 2 * SETTLED));
        // Of a clock that stood wrong.
        assert!(!identity.is_settled(UNIX_EPOCH));
    }

    #[test]
    fn broken_records_and_no_folder_hash_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"a").unwrap();
        let records = HashRecords::new(Some(dir.path().to_path_buf()));
        let target = records.record_path(&path.canonicalize().unwrap()).unwrap();
        for text in ["", "{", r#"{"version":1}"#] {
            std::fs::write(&target, text).unwrap();
            assert_eq!(records.sha256_file(&path).unwrap(), sha256_hex(b"a"));
        }
        assert_eq!(HashRecords::new(None).sha256_file(&path).unwrap(), sha256_hex(b"a"));
    }
}
