//! Finished work whose inputs changed: set aside, never removed, and taken back when the inputs come back.
//!
//! ```text
//! runs/NAME/STAGE.old-KEY/             what the stage made; KEY is the beginning of its key
//! runs/NAME/state/STAGE.old-KEY.json   its stage file
//! ```
//! Setting aside moves the folder first and the stage file second; taking back goes the other way round. So a kill
//! leaves, in both directions, a stage file whose folder is still aside: [`RunFolder::mend`] puts it back.

use std::fs;
use std::path::{Path, PathBuf};

use draftsmith_formats::atomic::{self, AtomicDir, AtomicError};
use draftsmith_formats::run::Stage;

use super::state::{RunFolder, StageFile, StateError, read_stage_file};

/// Characters of the key in names.
const KEY_SHOWN: usize = 8;

/// A stage that is kept for when its inputs come back.
#[derive(Debug, Clone)]
pub struct Aside {
    /// Which stage.
    pub stage: Stage,
    /// What it made.
    pub folder: PathBuf,
    /// What is known about it; `None` for a folder that had no stage file.
    pub file: Option<StageFile>,
}

impl Aside {
    /// Bytes of the folder.
    pub fn bytes(&self) -> u64 {
        bytes_below(&self.folder)
    }

    /// The command that frees them.
    pub fn free_command(&self) -> String {
        free_command(&self.folder)
    }
}

/// The command that frees what a folder holds.
pub fn free_command(folder: &Path) -> String {
    format!("rm -r {}", shell_word(&folder.display().to_string()))
}

/// A path as a shell reads it.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=~".contains(c);
    match text.chars().all(plain) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

fn short(key: &str) -> &str {
    key.get(..KEY_SHOWN).unwrap_or(key)
}

/// `made` with `.old-TAG` behind its name.
fn beside(made: &Path, tag: &str) -> PathBuf {
    let mut name = made.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".old-{tag}"));
    made.with_file_name(name)
}

/// A name like `beside(made, tag)` that is not taken.
fn free_beside(made: &Path, tag: &str) -> PathBuf {
    let first = beside(made, tag);
    let numbered = (2..).map(|n| beside(made, &format!("{tag}-{n}")));
    std::iter::once(first).chain(numbered).find(|p| p.symlink_metadata().is_err()).expect("names do not end")
}

fn rename(from: &Path, to: &Path) -> Result<(), StateError> {
    fs::rename(from, to).map_err(|e| AtomicError::from_io("move", from, e).into())
}

impl RunFolder {
    fn aside_file(&self, stage: Stage, key: &str) -> PathBuf {
        self.state_dir().join(format!("{}.old-{}.json", stage.name(), short(key)))
    }

    /// Ends an interrupted move: if the stage file is here and its folder is not, but lies aside, it comes back.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn mend(&self, stage: Stage, made: &Path) -> Result<(), StateError> {
        let Some(file) = self.read(stage)? else { return Ok(()) };
        let folder = beside(made, short(&file.key));
        match made.symlink_metadata().is_err() && folder.is_dir() {
            true => rename(&folder, made),
            false => Ok(()),
        }
    }

    /// Sets a stage aside. `stays`: the folder stays in place as well, for a stage that replaces it when the new one is
    /// ready. `None` if the stage had made nothing.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn set_aside(
        &self,
        stage: Stage,
        made: &Path,
        file: StageFile,
        stays: bool,
    ) -> Result<Option<Aside>, StateError> {
        let folder = beside(made, short(&file.key));
        if !made.is_dir() {
            self.forget(stage)?;
            return Ok(None);
        }
        if folder.symlink_metadata().is_ok() {
            rename(&folder, &free_beside(made, short(&file.key)))?;
        }
        match stays {
            true => link_tree(made, &folder)?,
            false => rename(made, &folder)?,
        }
        rename(&self.stage_file(stage), &self.aside_file(stage, &file.key))?;
        Ok(Some(Aside { stage, folder, file: Some(file) }))
    }

    /// Sets aside a folder that no stage file speaks of.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn set_aside_unknown(&self, stage: Stage, made: &Path, stays: bool) -> Result<Aside, StateError> {
        let folder = free_beside(made, "unknown");
        match stays {
            true => link_tree(made, &folder)?,
            false => rename(made, &folder)?,
        }
        Ok(Aside { stage, folder, file: None })
    }

    /// The stage that was set aside under one of these keys, with its folder.
    ///
    /// # Errors
    /// [`StateError::BadStageFile`].
    pub fn find_aside(
        &self,
        stage: Stage,
        made: &Path,
        keys: &[String],
    ) -> Result<Option<Aside>, StateError> {
        for key in keys {
            let folder = beside(made, short(key));
            let file = read_stage_file(self.aside_file(stage, key))?;
            if let Some(file) = file.filter(|file| file.key == *key && folder.is_dir()) {
                return Ok(Some(Aside { stage, folder, file: Some(file) }));
            }
        }
        Ok(None)
    }

    /// Takes back what [`RunFolder::find_aside`] found. Nothing may lie in its place.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn take_back(&self, made: &Path, aside: &Aside) -> Result<(), StateError> {
        if let Some(file) = &aside.file {
            rename(&self.aside_file(aside.stage, &file.key), &self.stage_file(aside.stage))?;
        }
        rename(&aside.folder, made)
    }

    /// Everything that a stage has aside, by name.
    pub fn all_aside(&self, stage: Stage, made: &Path) -> Vec<Aside> {
        let start = beside(made, "").file_name().unwrap_or_default().to_string_lossy().into_owned();
        let parent = made.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut found: Vec<Aside> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&start) && entry.path().is_dir())
            .map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let file = self.aside_file(stage, &name[start.len()..]);
                Aside {
                    stage,
                    folder: parent.join(entry.file_name()),
                    file: read_stage_file(file).ok().flatten(),
                }
            })
            .collect();
        found.sort_by(|a, b| a.folder.cmp(&b.folder));
        found
    }
}

/// A second folder with the same files: links where the system has them, else copies. Files of ours are replaced whole
/// and never written into, so a link keeps what it has. The folder is whole or absent.
fn link_tree(from: &Path, to: &Path) -> Result<(), StateError> {
    let dir = AtomicDir::create(to)?;
    let mut folders = vec![PathBuf::new()];
    while let Some(inside) = folders.pop() {
        let here = from.join(&inside);
        let failed = |e| AtomicError::from_io("read", &here, e);
        for entry in fs::read_dir(&here).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = inside.join(entry.file_name());
            let copy = dir.path().join(&name);
            if entry.file_type().map_err(failed)?.is_dir() {
                atomic::create_dir_all(&copy)?;
                folders.push(name);
            } else {
                link_file(&entry.path(), &copy)?;
            }
        }
    }
    Ok(dir.commit()?)
}

/// One file under a second name: a link, or else a copy.
pub(super) fn link_file(from: &Path, to: &Path) -> Result<(), StateError> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to).map(|_| ()).map_err(|e| AtomicError::from_io("copy", from, e).into())
}

/// Bytes of all files below a folder; none if it is not there.
pub fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
            _ => entry.metadata().map_or(0, |m| m.len()),
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::state::Phase;

    fn begin(folder: &RunFolder, key: &str, text: &str) -> PathBuf {
        let file = StageFile {
            key: key.to_string(),
            phase: Phase::Done,
            seconds: 1.0,
            progress: None,
            summary: Value::Null,
            inputs: [("train.lr".to_string(), text.to_string())].into(),
        };
        let made = folder.stage_dir(Stage::Train);
        atomic::write(made.join("best/w"), text).unwrap();
        folder.write(Stage::Train, &file).unwrap();
        made
    }

    fn key(n: char) -> String {
        n.to_string().repeat(64)
    }

    #[test]
    fn a_stage_set_aside_is_found_by_its_key_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        let made = begin(&folder, &key('a'), "one");
        let file = folder.read(Stage::Train).unwrap().unwrap();
        let aside = folder.set_aside(Stage::Train, &made, file, false).unwrap().unwrap();
        assert_eq!(aside.folder, dir.path().join("train.old-aaaaaaaa"));
        assert_eq!((aside.bytes(), made.exists()), (3, false));
        assert!(folder.read(Stage::Train).unwrap().is_none());
        let made = begin(&folder, &key('b'), "other");
        let file = folder.read(Stage::Train).unwrap().unwrap();
        assert!(folder.find_aside(Stage::Train, &made, &[key('c')]).unwrap().is_none());
        // The same beginning is not the same key.
        assert!(
            folder.find_aside(Stage::Train, &made, &[format!("aaaaaaaa{}", key('c'))]).unwrap().is_none()
        );
        let back = folder.find_aside(Stage::Train, &made, &[key('c'), key('a')]).unwrap().unwrap();
        folder.set_aside(Stage::Train, &made, file, false).unwrap();
        folder.take_back(&made, &back).unwrap();
        assert_eq!(fs::read_to_string(made.join("best/w")).unwrap(), "one");
        assert_eq!(folder.read(Stage::Train).unwrap().unwrap().key, key('a'));
        let left: Vec<PathBuf> =
            folder.all_aside(Stage::Train, &made).into_iter().map(|a| a.folder).collect();
        assert_eq!(left, [dir.path().join("train.old-bbbbbbbb")]);
    }

    #[test]
    fn a_kill_between_the_two_moves_loses_nothing_in_either_direction() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        let made = begin(&folder, &key('a'), "one");
        // In both directions the stage file is here and its folder aside.
        fs::rename(&made, dir.path().join("train.old-aaaaaaaa")).unwrap();
        folder.mend(Stage::Train, &made).unwrap();
        assert_eq!(fs::read_to_string(made.join("best/w")).unwrap(), "one");
    }

    #[test]
    fn a_folder_that_stays_is_kept_as_it_was_when_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(dir.path());
        let made = begin(&folder, &key('a'), "one");
        let file = folder.read(Stage::Train).unwrap().unwrap();
        let aside = folder.set_aside(Stage::Train, &made, file, true).unwrap().unwrap();
        assert!(made.join("best/w").is_file());
        atomic::write(made.join("best/w"), "new").unwrap();
        assert_eq!(fs::read_to_string(aside.folder.join("best/w")).unwrap(), "one");
    }

    #[test]
    fn a_path_with_blanks_is_quoted_for_the_shell() {
        assert_eq!(shell_word("runs/a/train.old-1"), "runs/a/train.old-1");
        assert_eq!(shell_word("my runs/it's"), "'my runs/it'\\''s'");
    }
}
