//! Bundles by name: whatever a user writes where a bundle is asked becomes the folder of one.

use std::path::{Path, PathBuf};

use draftsmith_bundle::has_manifest;
use draftsmith_core::report::{Report, Stop};
use draftsmith_pull::{Places, Reference, is_hub_name, pull_bundle};

use crate::Error;
use crate::catalogue::{catalogue, catalogued};
use crate::engine::bundle_place;
use crate::state::RunFolder;

/// Where bundles are looked for, and fetched to.
#[derive(Clone, Copy)]
pub struct Shelf<'a> {
    /// Caches and network.
    pub places: &'a Places,
    /// Folders that may hold what ships with draftsmith, in order.
    pub roots: &'a [PathBuf],
    /// Where progress goes.
    pub report: &'a dyn Report,
    /// The wish to stop.
    pub stop: &'a Stop,
}

impl Shelf<'_> {
    /// The folder of a bundle: a path that is there (the folder of a run means its bundle), a name of the catalogue, or
    /// `hf:ORG/NAME`, which is fetched. A path that is there wins over a name.
    ///
    /// # Errors
    /// What is none of these, with what could be meant; those of [`pull_bundle`].
    pub fn bundle(&self, written: &Path) -> Result<PathBuf, Error> {
        let text = written.to_string_lossy();
        if text.starts_with("hf:") || text.starts_with("pip:") {
            return self.pulled(&text);
        }
        if written.exists() {
            let place = bundle_place(written);
            // What is no bundle may be a bare draft: whoever wants one says so. A run that has none yet is told here.
            return match place == written && RunFolder::new(written).is_run() && !has_manifest(written) {
                true => Err(Error::input(
                    format!("the run in `{}` has no bundle yet", written.display()),
                    format!("finish it: `draftsmith run {}`", RunFolder::new(written).run_file().display()),
                )),
                false => Ok(place),
            };
        }
        self.named(&text)
    }

    /// The folder of a bundle of the catalogue.
    ///
    /// # Errors
    /// A name that is none, with what could be meant.
    pub fn named(&self, name: &str) -> Result<PathBuf, Error> {
        if let Some(entry) = catalogued(name) {
            return match (entry.find_below(self.roots), &entry.reference) {
                (Some(folder), _) => Ok(folder),
                (None, Some(reference)) => self.pulled(reference),
                (None, None) => Err(Error::input(
                    format!("bundle `{}` ships with draftsmith, but was not found here", entry.name),
                    "install the wheel or unpack the archive, which bring it, run inside the repository, or give the \
                     bundle's folder",
                )),
            };
        }
        Err(self.unknown(Path::new(name)))
    }

    fn pulled(&self, reference: &str) -> Result<PathBuf, Error> {
        let reference: Reference = reference.parse()?;
        Ok(pull_bundle(&reference, self.places, self.report, self.stop)?.path)
    }

    fn unknown(&self, written: &Path) -> Error {
        let shown = written.display();
        let names: Vec<&str> = catalogue().iter().map(|entry| entry.name.as_str()).collect();
        let mut hint = String::new();
        let as_typed = written.to_string_lossy().to_ascii_lowercase();
        let meant = names.iter().find(|name| as_typed.len() > 3 && name.starts_with(as_typed.as_str()));
        match meant {
            Some(name) => hint.push_str(&format!("write `{name}`; ")),
            None if is_hub_name(written) => {
                hint.push_str(&format!("write `hf:{shown}` if it is a repository on the Hugging Face hub; "));
            }
            None => {}
        }
        hint.push_str(&format!(
            "a bundle is a folder (`draftsmith run` makes one), the folder of a run, `hf:ORG/NAME` or a name: {}; \
             `draftsmith list` shows those that are here",
            names.join(", ")
        ));
        Error::input(format!("bundle `{shown}` does not exist"), hint)
    }

    /// Refuses to write into the cache that other tools share.
    ///
    /// # Errors
    /// A bundle in that cache.
    pub fn check_own(&self, bundle: &Path) -> Result<(), Error> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        match real(bundle).starts_with(real(&self.places.hf_cache)) {
            true => Err(Error::input(
                format!("`{}` lies in the hub's cache, which is not written to", bundle.display()),
                format!("work on a copy: `cp -rL {} DIR`", bundle.display()),
            )),
            false => Ok(()),
        }
    }
}
