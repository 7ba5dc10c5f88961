//! The files of a folder.

use std::path::Path;

use draftsmith_formats::atomic;

use crate::BundleError;

/// Every file below a folder, `/` between folders, sorted.
pub(crate) fn files_below(dir: &Path) -> Result<Vec<String>, BundleError> {
    let failed = |path: &Path, e| atomic::AtomicError::from_io("list", path, e);
    let mut found = Vec::new();
    let mut folders = vec![(dir.to_owned(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|e| failed(&folder, e))? {
            let entry = entry.map_err(|e| failed(&folder, e))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            // Links are not followed: one could lead in a circle.
            match entry.file_type().map_err(|e| failed(&folder, e))?.is_dir() {
                true => folders.push((entry.path(), name + "/")),
                false => found.push(name),
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}
