//! Files and folders that are either whole or absent.
//!
//! Everything is written to a temporary name in the same folder, flushed to the device, and renamed. A reader
//! never sees a half-written artefact under its final name, whatever kills the writer.
//!
//! Temporary names are `.NAME.PID-N.tmp`. The writer holds an exclusive advisory lock on its temporary file or
//! folder, so the next write of the same `NAME` can tell leftovers of a killed run, which
//! it removes, from the work of a writer that is still alive, which it leaves alone. A process id alone could not
//! tell: in a fresh container the new run often has the old one's id.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a file or folder could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AtomicError {
    /// The file system is full, or the user's quota or file size limit is reached.
    #[error("no space left while writing `{}`", path.display())]
    DiskFull {
        /// Final path of what was being written.
        path: PathBuf,
    },
    /// The final path names no file: it is empty, a root, or ends in `..`.
    #[error("`{}` is not a path that a file can be written to", path.display())]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// A folder already stands where the new one should go.
    #[error("`{}` already exists", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// Any other failure of the operating system.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl AtomicError {
    /// Wraps an operating-system error, telling a full disk from everything else.
    pub fn from_io(action: &'static str, path: &Path, source: io::Error) -> AtomicError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                AtomicError::DiskFull { path: path.to_path_buf() }
            }
            _ => AtomicError::Io { action, path: path.to_path_buf(), source },
        }
    }

    /// True if the device had no room left.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, AtomicError::DiskFull { .. })
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            AtomicError::DiskFull { path } => Some(format!(
                "free space on the device that holds `{}` and run the same command again; nothing half-written was \
                 left behind",
                parent_of(path).display()
            )),
            AtomicError::BadPath { .. } => None,
            AtomicError::Exists { .. } => Some("remove it or choose another name".to_string()),
            AtomicError::Io { source, path, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some(format!("check the permissions of `{}`", parent_of(path).display()))
                }
                _ => None,
            },
        }
    }
}

/// The folder of a path, `.` for a bare file name.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn name_of(path: &Path) -> Result<String, AtomicError> {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .ok_or_else(|| AtomicError::BadPath { path: path.to_path_buf() })
}

/// Number of temporary names this process has given out.
static COUNTER: AtomicU64 = AtomicU64::new(0);

fn temporary_name(path: &Path, kind: &str) -> Result<PathBuf, AtomicError> {
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    Ok(parent_of(path).join(format!(".{}.{}-{n}.{kind}", name_of(path)?, std::process::id())))
}

/// `PID-N` of a temporary name of `name`, or `None` if the entry is something else.
fn is_temporary_of(entry: &str, name: &str, kind: &str) -> bool {
    let inner = entry
        .strip_prefix('.')
        .and_then(|e| e.strip_prefix(name))
        .and_then(|e| e.strip_prefix('.'))
        .and_then(|e| e.strip_suffix(kind))
        .and_then(|e| e.strip_suffix('.'));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    inner.and_then(|e| e.split_once('-')).is_some_and(|(pid, n)| digits(pid) && digits(n))
}

/// Entries of the folder of `path` that are temporary names of it.
fn temporaries_of(path: &Path, kind: &str) -> Vec<PathBuf> {
    let Ok(name) = name_of(path) else { return Vec::new() };
    let Ok(entries) = fs::read_dir(parent_of(path)) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| is_temporary_of(&e.file_name().to_string_lossy(), &name, kind))
        .map(|e| e.path())
        .collect()
}

/// Whether somebody is writing `path` right now.
pub fn is_being_written(path: &Path) -> bool {
    let held = |entry: &PathBuf| {
        File::open(entry).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    };
    temporaries_of(path, "tmp").iter().any(held)
}

/// Removes temporary files and folders that killed writers of `path` left behind.
///
/// Called by every writer here; failures are ignored, since a leftover only costs space.
pub fn clean_leftovers(path: &Path) {
    for entry in temporaries_of(path, "tmp") {
        // Where a folder cannot be opened or locked (other systems, some network file systems) leftovers stay.
        let Ok(held) = File::open(&entry) else { continue };
        if held.try_lock().is_err() {
            continue;
        }
        // The lock is held until the entry is gone, so a writer that has just made it can notice.
        let _ = if entry.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
        drop(held);
    }
}

/// Takes the lock of a fresh temporary. `false`: someone cleaned it away before it was locked.
fn lock_fresh(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Ok(()) => path.exists(),
        Err(TryLockError::WouldBlock) => false,
        // File systems without locks: leftovers are then never cleaned (the cleaner needs the lock too).
        Err(TryLockError::Error(_)) => true,
    }
}

/// Flushes a folder's entries to the device, so that a rename survives a power cut.
fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// A file being written under a temporary name; [`AtomicFile::commit`] gives it its final one.
///
/// Dropped without commit, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    /// `None` only after commit.
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts the file, making its folder if needed and removing leftovers of killed writers.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicFile, AtomicError> {
        let path = path.as_ref();
        name_of(path)?;
        create_dir_all(parent_of(path))?;
        clean_leftovers(path);
        loop {
            let temporary = temporary_name(path, "tmp")?;
            match OpenOptions::new().read(true).write(true).create_new(true).open(&temporary) {
                Ok(file) if lock_fresh(&file, &temporary) => {
                    let file = Some(BufWriter::with_capacity(1 << 16, file));
                    return Ok(AtomicFile { path: path.to_path_buf(), temporary, file });
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(AtomicError::from_io("create", path, e)),
            }
        }
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Wraps an error of `write` on this file so that it names the final path.
    pub fn error(&self, source: io::Error) -> AtomicError {
        AtomicError::from_io("write", &self.path, source)
    }

    /// Flushes to the device and renames to the final path, replacing a file that stands there.
    pub fn commit(self) -> Result<(), AtomicError> {
        self.commit_with(true)
    }

    /// The same without waiting for the device: after a power cut the file may hold anything. For what can be made anew
    /// and whose readers check every byte.
    pub fn commit_unflushed(self) -> Result<(), AtomicError> {
        self.commit_with(false)
    }

    fn commit_with(mut self, flush: bool) -> Result<(), AtomicError> {
        let done = self.finish(flush);
        done.map_err(|e| AtomicError::from_io("write", &self.path, e))
        // On failure `drop` removes the temporary file.
    }

    fn finish(&mut self, flush: bool) -> io::Result<()> {
        let writer = self.file.as_mut().expect("a file is committed once");
        writer.flush()?;
        if flush {
            writer.get_ref().sync_all()?;
        }
        // The lock stays held through the rename: an unlocked temporary could be cleaned away in between.
        fs::rename(&self.temporary, &self.path)?;
        self.file = None;
        if flush { sync_dir(parent_of(&self.path)) } else { Ok(()) }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        #[cfg(test)]
        small_disk::take(buf.len())?;
        self.file.as_mut().expect("a file is committed once").write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().expect("a file is committed once").flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        self.file.as_mut().expect("a file is committed once").seek(pos)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(writer) = self.file.take() {
            // The buffer is not worth flushing; the file goes.
            let (file, _unwritten) = writer.into_parts();
            let _ = fs::remove_file(&self.temporary);
            drop(file);
        }
    }
}

/// Writes a whole file atomically.
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), AtomicError> {
    write_with(path, |w| w.write_all(bytes.as_ref()))
}

/// Writes a file atomically through a closure; if that fails, nothing is left and the old file stays.
pub fn write_with<T>(
    path: impl AsRef<Path>,
    fill: impl FnOnce(&mut AtomicFile) -> io::Result<T>,
) -> Result<T, AtomicError> {
    let mut file = AtomicFile::create(path)?;
    match fill(&mut file) {
        Ok(value) => file.commit().map(|()| value),
        Err(e) => Err(file.error(e)),
    }
}

/// Reads a whole file, naming it if that fails.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>, AtomicError> {
    let path = path.as_ref();
    fs::read(path).map_err(|e| AtomicError::from_io("read", path, e))
}

/// Makes a folder and its parents, naming it if that fails.
pub fn create_dir_all(path: impl AsRef<Path>) -> Result<(), AtomicError> {
    let path = path.as_ref();
    fs::create_dir_all(path).map_err(|e| AtomicError::from_io("create folder", path, e))
}

/// Removes a folder with all it holds, if it is there.
pub fn remove_dir_all(path: impl AsRef<Path>) -> Result<(), AtomicError> {
    let path = path.as_ref();
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(AtomicError::from_io("remove", path, e)),
        _ => Ok(()),
    }
}

/// A folder being built under a temporary name; [`AtomicDir::commit`] gives it its final one.
///
/// Dropped without commit, it leaves nothing.
#[derive(Debug)]
pub struct AtomicDir {
    destination: PathBuf,
    temporary: PathBuf,
    /// Held as long as the folder is being built; `None` where folders cannot be opened.
    _lock: Option<File>,
    committed: bool,
}

impl AtomicDir {
    /// Starts the folder next to `path`, removing leftovers of killed writers.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicDir, AtomicError> {
        let path = path.as_ref();
        name_of(path)?;
        create_dir_all(parent_of(path))?;
        recover(path)?;
        clean_leftovers(path);
        loop {
            let temporary = temporary_name(path, "tmp")?;
            match fs::create_dir(&temporary) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(AtomicError::from_io("create folder", path, e)),
            }
            match File::open(&temporary) {
                Ok(lock) if lock_fresh(&lock, &temporary) => {
                    let (destination, _lock) = (path.to_path_buf(), Some(lock));
                    return Ok(AtomicDir { destination, temporary, _lock, committed: false });
                }
                Ok(_) => {}
                Err(_) if cfg!(not(unix)) => {
                    let destination = path.to_path_buf();
                    return Ok(AtomicDir { destination, temporary, _lock: None, committed: false });
                }
                // Cleaned away by another writer before it was locked.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    let _ = fs::remove_dir_all(&temporary);
                    return Err(AtomicError::from_io("create folder", path, e));
                }
            }
        }
    }

    /// The temporary folder: write files into this.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// The path that the folder will have.
    pub fn final_path(&self) -> &Path {
        &self.destination
    }

    /// Writes one file into the folder (`relative` may have parent folders).
    pub fn write(&self, relative: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), AtomicError> {
        let named = self.destination.join(relative.as_ref());
        let inside = self.temporary.join(relative.as_ref());
        #[cfg(test)]
        small_disk::take(bytes.as_ref().len()).map_err(|e| AtomicError::from_io("write", &named, e))?;
        fs::create_dir_all(parent_of(&inside))
            .map_err(|e| AtomicError::from_io("create folder of", &named, e))?;
        fs::write(&inside, bytes).map_err(|e| AtomicError::from_io("write", &named, e))
    }

    /// Writes one file into the folder through a closure.
    ///
    /// # Errors
    /// Those of the file and of the closure, which name it.
    pub fn write_with<T>(
        &self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
    ) -> Result<T, AtomicError> {
        let write = || {
            let mut file = BufWriter::with_capacity(1 << 16, File::create(self.temporary.join(name))?);
            let made = fill(&mut file)?;
            file.flush()?;
            Ok(made)
        };
        write().map_err(|e| AtomicError::from_io("write", &self.destination.join(name), e))
    }

    /// Flushes everything in the folder and renames it to its final path.
    ///
    /// # Errors
    /// [`AtomicError::Exists`] if something stands there already.
    pub fn commit(self) -> Result<(), AtomicError> {
        if self.destination.symlink_metadata().is_ok() {
            return Err(AtomicError::Exists { path: self.destination.clone() });
        }
        self.finish(None)
    }

    /// Like [`AtomicDir::commit`], but replaces a folder that stands there.
    ///
    /// Folders cannot be replaced in one step everywhere, so the old one is first moved aside. A writer killed
    /// between the two renames leaves it as `.NAME.PID-N.old`; [`recover`] moves it back.
    pub fn commit_replacing(self) -> Result<(), AtomicError> {
        let aside = match self.destination.symlink_metadata() {
            Ok(_) => Some(temporary_name(&self.destination, "old")?),
            Err(_) => None,
        };
        self.finish(aside)
    }

    fn finish(mut self, aside: Option<PathBuf>) -> Result<(), AtomicError> {
        let named = |action| {
            let path = self.destination.clone();
            move |e| AtomicError::from_io(action, &path, e)
        };
        sync_tree(&self.temporary).map_err(named("flush"))?;
        if let Some(aside) = &aside {
            fs::rename(&self.destination, aside).map_err(named("replace"))?;
        }
        if let Err(e) = fs::rename(&self.temporary, &self.destination) {
            if let Some(aside) = &aside {
                let _ = fs::rename(aside, &self.destination);
            }
            return Err(named("rename to")(e));
        }
        sync_dir(parent_of(&self.destination)).map_err(named("flush the folder of"))?;
        self.committed = true;
        if let Some(aside) = aside {
            // The new folder is in place; what is left of the old one goes at the next write at the latest.
            let _ = fs::remove_dir_all(aside);
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Ends an interrupted [`AtomicDir::commit_replacing`]: moves the old folder back if the new one never arrived,
/// removes it if it did.
pub fn recover(path: impl AsRef<Path>) -> Result<(), AtomicError> {
    let path = path.as_ref();
    for old in temporaries_of(path, "old") {
        if path.symlink_metadata().is_ok() {
            let _ = fs::remove_dir_all(&old);
        } else {
            fs::rename(&old, path).map_err(|e| AtomicError::from_io("recover", path, e))?;
        }
    }
    Ok(())
}

/// Flushes every file and folder below `dir`, inner first.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            OpenOptions::new().write(true).open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

/// A disk that runs full, for tests of the writers built on this module.
#[cfg(test)]
pub(crate) mod small_disk {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Runs `f` on a disk with room for this many bytes.
    pub(crate) fn with<T>(bytes: usize, f: impl FnOnce() -> T) -> T {
        LEFT.set(Some(bytes));
        let out = f();
        LEFT.set(None);
        out
    }

    pub(crate) fn take(bytes: usize) -> io::Result<()> {
        match LEFT.get() {
            Some(left) if left < bytes => Err(io::ErrorKind::StorageFull.into()),
            Some(left) => {
                LEFT.set(Some(left - bytes));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/a.bin");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(path.parent().unwrap()), ["a.bin"]);
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_says_that_the_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write(&path, b"old").unwrap();
        let err = write_with(&path, |w| {
            w.write_all(&[0; 100_000])?;
            Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert!(err.is_disk_full());
        assert_eq!(err.to_string(), format!("no space left while writing `{}`", path.display()));
        assert!(err.hint().unwrap().contains("free space"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_full_device_of_the_kernel_is_told_as_a_full_disk() {
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let err = full.write_all(b"x").unwrap_err();
        assert!(AtomicError::from_io("write", Path::new("/dev/full"), err).is_disk_full());
    }

    #[test]
    fn leftovers_of_killed_writers_go_and_live_writers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        // What kill -9 leaves: unlocked temporaries.
        fs::write(dir.path().join(".a.bin.1-0.tmp"), b"half").unwrap();
        fs::create_dir(dir.path().join(".a.bin.1-1.tmp")).unwrap();
        fs::write(dir.path().join(".a.bin.1-1.tmp/x"), b"half").unwrap();
        fs::create_dir(dir.path().join(".a.bin.1-2.tmp")).unwrap();
        // Files of other names.
        fs::write(dir.path().join(".a.bin.bak.tmp"), b"mine").unwrap();
        fs::write(dir.path().join(".b.bin.1-0.tmp"), b"other").unwrap();
        let alive = AtomicFile::create(&path).unwrap();
        assert_eq!(names(dir.path()).len(), 3);
        let alive_dir = AtomicDir::create(&path).unwrap();
        alive_dir.write("x", b"kept").unwrap();
        write(&path, b"done").unwrap();
        assert!(alive.temporary.exists() && alive_dir.path().join("x").exists());
        alive.commit().unwrap();
        drop(alive_dir);
        assert_eq!(names(dir.path()), [".a.bin.bak.tmp", ".b.bin.1-0.tmp", "a.bin"]);
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ckpt");
        let build = |text: &str| {
            let new = AtomicDir::create(&path).unwrap();
            new.write("inner/a.txt", text).unwrap();
            assert!(new.path() != path);
            new
        };
        drop(build("dropped"));
        assert!(names(dir.path()).is_empty());
        build("one").commit().unwrap();
        assert_eq!(names(&path), ["inner"]);
        let refused = build("two").commit().unwrap_err();
        assert!(matches!(refused, AtomicError::Exists { .. }));
        assert_eq!(fs::read_to_string(path.join("inner/a.txt")).unwrap(), "one");
        build("three").commit_replacing().unwrap();
        assert_eq!(fs::read_to_string(path.join("inner/a.txt")).unwrap(), "three");
        assert_eq!(names(dir.path()), ["ckpt"]);
    }

    #[test]
    fn a_replacement_killed_half_way_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ckpt");
        fs::create_dir(dir.path().join(".ckpt.7-3.old")).unwrap();
        fs::write(dir.path().join(".ckpt.7-3.old/a"), b"old").unwrap();
        recover(&path).unwrap();
        assert_eq!(names(dir.path()), ["ckpt"]);
        assert_eq!(fs::read(path.join("a")).unwrap(), b"old");
        fs::create_dir(dir.path().join(".ckpt.7-4.old")).unwrap();
        recover(&path).unwrap();
        assert_eq!(names(dir.path()), ["ckpt"]);
    }

    #[test]
    fn errors_name_the_final_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let err = write(dir.path().join("file/below"), b"").unwrap_err();
        assert!(err.to_string().contains("file"), "{err}");
        assert!(matches!(write("", b""), Err(AtomicError::BadPath { .. })));
        assert!(matches!(write("..", b""), Err(AtomicError::BadPath { .. })));
    }
}
