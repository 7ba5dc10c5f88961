//! Packed weights kept in the cache folder, which the next start maps in place of packing again.
//!
//! A copy is about as large as the model. It is used only if it was made by this version from the very bytes of the
//! model, if every checksum holds, and if panels of each weight are what packing gives. Any other is written anew, with
//! a note; a start never fails for want of it.
//!
//! Kept are copies of models, experts included, of [`SMALLEST`] bytes or more, where the disk has room for three of them. What was not used
//! for [`UNUSED`] is removed, so is the least recently used until all are within [`MOST`], and so are copies of the same
//! model by other versions that were not used for [`UNUSED_VERSION`]. Only files `*.panels` of this folder are touched.
//! Folders in a quantised form (AWQ, GPTQ, FP8, compressed-tensors) are packed at every start, and have no copy.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use draftsmith_core::report::{Report, Stop};
use draftsmith_formats::atomic::{AtomicError, is_being_written};
use draftsmith_formats::hash::sha256_hex;
use draftsmith_formats::packed::{PackedError, PackedFile, PackedKey, PackedWriter};
use draftsmith_kernels::{
    KeptPanels, KernelError, Kernels, PANEL_VERSION, PackMode, PackedWeight, SharedBytes, WeightView,
};
use draftsmith_model::{ModelError, Packing, Precision, Target};
use draftsmith_pull::Places;

use crate::disk::{free_bytes, human};
use crate::host::Host;

/// Smaller models are packed in a moment.
pub const SMALLEST: u64 = 64 << 20;
/// Bytes of all copies.
pub const MOST: u64 = 64 << 30;
/// How long a copy stays that nobody uses.
pub const UNUSED: Duration = Duration::from_secs(30 * 86_400);
/// The same for a copy by another version beside one of this.
pub const UNUSED_VERSION: Duration = Duration::from_secs(86_400);
/// Uses are noted no more often.
const NOTED: Duration = Duration::from_secs(3600);

const ENDING: &str = "panels";

/// The copies that lie in a cache folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copies {
    /// How many.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Where copies are kept.
pub fn folder(places: &Places) -> PathBuf {
    places.cache.join("packed")
}

/// What is kept now.
pub fn copies(places: &Places) -> Copies {
    let all = listed(&folder(places));
    Copies { count: all.len(), bytes: all.iter().map(|copy| copy.bytes).sum() }
}

struct Copy {
    used: SystemTime,
    bytes: u64,
    path: PathBuf,
}

fn listed(folder: &Path) -> Vec<Copy> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == ENDING))
        .filter_map(|entry| {
            let meta = entry.metadata().ok()?;
            Some(Copy { used: meta.modified().ok()?, bytes: meta.len(), path: entry.path() })
        })
        .collect()
}

/// Which copies go, `new` having just been written.
fn superfluous(copies: &[Copy], new: &Path, now: SystemTime, most: u64) -> Vec<PathBuf> {
    let model = |path: &Path| {
        path.file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.split_once('-'))
            .map(|(model, _)| model.to_owned())
    };
    let unused = |copy: &Copy| now.duration_since(copy.used).unwrap_or_default();
    let mut others: Vec<&Copy> = copies.iter().filter(|copy| copy.path != new).collect();
    others.sort_by_key(|copy| std::cmp::Reverse(copy.used));
    let mut sum: u64 = copies.iter().filter(|copy| copy.path == new).map(|copy| copy.bytes).sum();
    let mut gone = Vec::new();
    for copy in others {
        let of_other_version = model(&copy.path).is_some() && model(&copy.path) == model(new);
        if unused(copy) > UNUSED
            || of_other_version && unused(copy) > UNUSED_VERSION
            || sum.saturating_add(copy.bytes) > most
        {
            gone.push(copy.path.clone());
        } else {
            sum += copy.bytes;
        }
    }
    gone
}

/// How a target was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadedFrom {
    /// Packed from its file.
    Packing,
    /// Mapped from a copy that an earlier start kept.
    Copy,
}

/// Copies of one folder, for targets of one precision.
pub struct PackCache<'a> {
    /// Where they are.
    pub folder: PathBuf,
    /// Smaller models are not kept.
    pub smallest: u64,
    /// For notes.
    pub report: &'a dyn Report,
    /// Ends the writing of a copy.
    pub stop: &'a Stop,
}

impl PackCache<'_> {
    /// Loads a target of `bytes` bytes whose hash is known, from its copy if there is a good one; else packs it and keeps
    /// a copy.
    ///
    /// # Errors
    /// Those of [`Target::load`]; none for the sake of a copy.
    pub fn load(
        &self,
        kernels: &Arc<Host>,
        path: &Path,
        precision: Precision,
        (sha256, bytes): (&str, u64),
    ) -> Result<(Target<Host>, LoadedFrom), ModelError> {
        let plain = || Ok((Target::load(Arc::clone(kernels), path, precision)?, LoadedFrom::Packing));
        // Weights as floats are the specification, not a way to work.
        if precision != Precision::Stored || bytes < self.smallest {
            return plain();
        }
        let key = PackedKey { weights_sha256: sha256.to_owned(), layout: layout() };
        let name = format!("{:.16}-{:.16}.{ENDING}", key.weights_sha256, sha256_hex(&key.layout));
        let copy = self.folder.join(name);
        let (why, is_first) = match PackedFile::open(&copy, &key, kernels.threads()) {
            Ok(file) => match self.mapped(kernels, path, file)? {
                Some(target) => {
                    note_use(&copy);
                    return Ok((target, LoadedFrom::Copy));
                }
                None => (format!("`{}` is not what packing gives", copy.display()), false),
            },
            Err(PackedError::Absent { .. }) => (String::new(), true),
            Err(error) => (error.to_string(), false),
        };
        if !is_first {
            self.report.note(&format!("{why}: packing again"));
        }
        self.packed(kernels, path, &copy, key, bytes, is_first)
    }

    /// The target over a mapped copy, or `None` if that does not fit it.
    fn mapped(
        &self,
        kernels: &Arc<Host>,
        path: &Path,
        file: PackedFile,
    ) -> Result<Option<Target<Host>>, ModelError> {
        let bytes: SharedBytes = Arc::new(file.bytes().clone());
        let from = FromCopy { kernels, file, bytes, next: AtomicUsize::new(0), fits: AtomicBool::new(true) };
        let target = Target::load_with(Arc::clone(kernels), path, Precision::Stored, &from)?;
        let is_complete = from.next.into_inner() == from.file.len();
        Ok((from.fits.into_inner() && is_complete).then_some(target))
    }

    /// Packs, and keeps what it packs if it can.
    fn packed(
        &self,
        kernels: &Arc<Host>,
        path: &Path,
        copy: &Path,
        key: PackedKey,
        bytes: u64,
        is_first: bool,
    ) -> Result<(Target<Host>, LoadedFrom), ModelError> {
        let there = copy.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
        let no_room = free_bytes(there).is_some_and(|free| free / 3 < bytes) || bytes > MOST;
        let mut failed = None;
        // Another start of this model may be at it.
        let writer = match no_room || is_being_written(copy) {
            true => None,
            false => PackedWriter::create(copy, key).map_err(|error| failed = Some(error)).ok(),
        };
        let keep = Keep { kernels, stop: self.stop, writer: Mutex::new((writer, failed)) };
        let target = Target::load_with(Arc::clone(kernels), path, Precision::Stored, &keep)?;
        let (writer, failed) = keep.writer.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Quantised folders hand nothing over to keep.
        let writer = writer.filter(|writer| !writer.is_empty());
        match (writer.map(PackedWriter::finish).transpose(), failed) {
            (Err(error), _) | (_, Some(error)) => {
                self.report
                    .note(&format!("packed weights are not kept, the next start packs again: {error}"));
            }
            (Ok(Some(bytes)), None) => {
                if is_first {
                    self.report.note(&format!(
                        "kept packed weights for the next start: {} in `{}` (`--no-pack-cache` does without)",
                        human(bytes),
                        self.folder.display()
                    ));
                }
                for path in superfluous(&listed(&self.folder), copy, SystemTime::now(), MOST) {
                    // Whoever has it mapped keeps it.
                    let _ = std::fs::remove_file(path);
                }
            }
            (Ok(None), None) => {}
        }
        Ok((target, LoadedFrom::Packing))
    }
}

/// What the bytes of a copy depend on beside the model.
fn layout() -> String {
    format!(
        "draftsmith {}, panels {PANEL_VERSION}, stored, {}-endian",
        env!("CARGO_PKG_VERSION"),
        if cfg!(target_endian = "little") { "little" } else { "big" }
    )
}

/// A copy's own time says when it was used last.
fn note_use(copy: &Path) {
    let now = SystemTime::now();
    let Ok(file) = std::fs::File::options().append(true).open(copy) else { return };
    let used = file.metadata().and_then(|meta| meta.modified());
    if used.is_ok_and(|used| now.duration_since(used).is_ok_and(|since| since > NOTED)) {
        let _ = file.set_modified(now);
    }
}

/// Weights of a copy, in the order in which they were packed.
struct FromCopy<'a> {
    kernels: &'a Host,
    file: PackedFile,
    bytes: SharedBytes,
    next: AtomicUsize,
    fits: AtomicBool,
}

impl Packing<PackedWeight> for FromCopy<'_> {
    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<PackedWeight, KernelError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(entry) = self.file.at(number, name) {
            let kept = KeptPanels {
                form: &entry.form,
                largest_scale: f32::from_bits(entry.largest_scale_bits),
                bytes: Arc::clone(&self.bytes),
                range: entry.at..entry.at + entry.len,
            };
            if let Some(packed) = PackedWeight::from_kept(name, weight, mode, &kept)? {
                return Ok(packed);
            }
        }
        // The target will not be used.
        self.fits.store(false, Ordering::Relaxed);
        self.kernels.pack(name, weight, mode)
    }
}

/// Packs, and writes what it packs. A write that fails ends the writing, not the packing.
struct Keep<'a> {
    kernels: &'a Host,
    stop: &'a Stop,
    writer: Mutex<(Option<PackedWriter>, Option<AtomicError>)>,
}

impl Packing<PackedWeight> for Keep<'_> {
    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<PackedWeight, KernelError> {
        let packed = self.kernels.pack(name, weight, mode)?;
        let mut guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (writer, failed) = &mut *guard;
        if self.stop.requested() {
            *writer = None;
        }
        if let Some(open) = writer {
            let scale = packed.largest_scale().to_bits();
            if let Err(error) = open.add(name, packed.form(), scale, packed.panel_bytes_all()) {
                *failed = Some(error);
                *writer = None;
            }
        }
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_core::TokenTree;
    use draftsmith_model::StepItem;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
    }

    fn fixture() -> PathBuf {
        fixtures().join("tiny-target")
    }

    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);

    impl Report for Notes {
        fn note(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
        fn begin(&self, _: &str, _: Option<u64>, _: draftsmith_core::report::Unit) {}
        fn at(&self, _: u64) {}
        fn detail(&self, _: &str) {}
        fn end(&self) {}
    }

    fn logits(target: &Target<Host>) -> Vec<u32> {
        let tokens = [5, 9, 3, 17, 20];
        let mut kv = target.new_kv();
        let item = StepItem { kv: &mut kv, tokens: &tokens, parents: &TokenTree::chain_parents(5) };
        let output = target.forward(&mut [item], &[]);
        target.logits(&output, &[0, 1, 2, 3, 4]).iter().map(|l| l.to_bits()).collect()
    }

    /// Loads through the cache; whether from a copy, and how many notes. The logits must be those of plain loading.
    #[track_caller]
    fn load(folder: &Path, sha256: &str) -> (LoadedFrom, usize) {
        load_model(&fixture(), folder, sha256)
    }

    #[track_caller]
    fn load_model(model: &Path, folder: &Path, sha256: &str) -> (LoadedFrom, usize) {
        let kernels = Arc::new(Host::new(2));
        let (notes, stop) = (Notes::default(), Stop::default());
        let cache = PackCache { folder: folder.to_path_buf(), smallest: 0, report: &notes, stop: &stop };
        let (target, from) = cache.load(&kernels, model, Precision::Stored, (sha256, 1000)).unwrap();
        let plain = Target::load(Arc::clone(&kernels), model, Precision::Stored).unwrap();
        assert_eq!(logits(&target), logits(&plain));
        (from, notes.0.into_inner().unwrap().len())
    }

    fn key(sha256: &str) -> PackedKey {
        PackedKey { weights_sha256: sha256.to_owned(), layout: layout() }
    }

    fn only(folder: &Path) -> PathBuf {
        let all: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    #[test]
    fn a_copy_gives_the_same_logits_and_a_bad_one_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("packed");
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        assert_eq!(load(&folder, &a), (LoadedFrom::Packing, 1));
        assert_eq!(load(&folder, &a), (LoadedFrom::Copy, 0));
        let copy = only(&folder);
        let whole = std::fs::read(&copy).unwrap();
        let mut flipped = whole.clone();
        flipped[5000] ^= 1;
        for bytes in [&flipped[..], &whole[..whole.len() / 2], b"", b"something else"] {
            std::fs::write(&copy, bytes).unwrap();
            assert_eq!(load(&folder, &a), (LoadedFrom::Packing, 1), "{} bytes", bytes.len());
            assert_eq!(std::fs::read(&copy).unwrap(), whole);
            assert_eq!(load(&folder, &a), (LoadedFrom::Copy, 0));
        }
        // The copy of another model under this name.
        load(&folder, &b);
        let other =
            std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).find(|p| *p != copy).unwrap();
        std::fs::rename(other, &copy).unwrap();
        assert_eq!(load(&folder, &a), (LoadedFrom::Packing, 1));
        assert_eq!(load(&folder, &a), (LoadedFrom::Copy, 0));
    }

    #[test]
    fn experts_are_kept_weight_by_weight() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["qwen3_moe", "qwen3_moe/model.gguf", "qwen3_moe_mixed", "gpt_oss", "gpt_oss_mxfp4"];
        for (number, name) in names.into_iter().enumerate() {
            let (folder, model) =
                (dir.path().join(number.to_string()), fixtures().join("experts").join(name));
            let sha256 = "e".repeat(64);
            assert_eq!(load_model(&model, &folder, &sha256), (LoadedFrom::Packing, 1), "{name}");
            assert_eq!(load_model(&model, &folder, &sha256), (LoadedFrom::Copy, 0), "{name}");
            // One expert that another model has: every weight is looked at.
            let copy = only(&folder);
            let key = key(&sha256);
            let file = PackedFile::open(&copy, &key, 1).unwrap();
            let entries: Vec<_> = (0..file.len()).map(|i| file.nth(i).unwrap().clone()).collect();
            assert!(entries.iter().any(|e| e.name.contains("of expert 1 of layer")), "{name}");
            let mapped = file.bytes().to_vec();
            let mut writer = PackedWriter::create(&copy, key).unwrap();
            for entry in entries {
                let mut bytes = mapped[entry.at..entry.at + entry.len].to_vec();
                if entry.name == "down_proj of expert 1 of layer 1" {
                    bytes.iter_mut().for_each(|b| *b ^= 1);
                }
                writer.add(&entry.name, &entry.form, entry.largest_scale_bits, &bytes).unwrap();
            }
            writer.finish().unwrap();
            assert_eq!(load_model(&model, &folder, &sha256), (LoadedFrom::Packing, 1), "{name}");
        }
    }

    #[test]
    fn quantised_folders_have_no_copy_and_a_foreign_one_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "awq_g128",
            "gptq_g32_act",
            "gptq_int8",
            "fp8_block",
            "ct_fp8_channel",
            "ct_int4_group_act",
            "ct_int8_mixed",
        ];
        for name in names {
            let (folder, model) = (dir.path().join(name), fixtures().join("quantised").join(name));
            let sha256 = "f".repeat(64);
            for _ in 0..2 {
                assert_eq!(load_model(&model, &folder, &sha256), (LoadedFrom::Packing, 0), "{name}");
                assert_eq!(std::fs::read_dir(&folder).map_or(0, Iterator::count), 0, "{name}");
            }
            // A whole copy of another model under its key.
            load(&folder, &sha256);
            assert_eq!(load_model(&model, &folder, &sha256), (LoadedFrom::Packing, 1), "{name}");
        }
    }

    #[test]
    fn a_copy_by_code_that_packed_otherwise_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("packed");
        let sha256 = "a".repeat(64);
        load(&folder, &sha256);
        let copy = only(&folder);
        let whole = std::fs::read(&copy).unwrap();
        let key = key(&sha256);
        // Whole, of the right key, and every checksum holds: a form or a panel is another, or a weight is missing.
        for wrong in 0..4 {
            let file = PackedFile::open(&copy, &key, 1).unwrap();
            let entries: Vec<_> = (0..file.len()).map(|i| file.nth(i).unwrap().clone()).collect();
            let mapped = file.bytes().to_vec();
            let mut writer = PackedWriter::create(&copy, key.clone()).unwrap();
            for (number, entry) in entries.iter().enumerate() {
                let mut bytes = mapped[entry.at..entry.at + entry.len].to_vec();
                let mut form = entry.form.clone();
                match (wrong, number) {
                    (0, 3) => bytes[0] ^= 1,
                    (1, 3) => form = "Q9".to_owned(),
                    (2, n) if n + 1 == entries.len() => continue,
                    (3, 3) => bytes.truncate(bytes.len() - 1),
                    _ => {}
                }
                writer.add(&entry.name, &form, entry.largest_scale_bits, &bytes).unwrap();
            }
            writer.finish().unwrap();
            assert_eq!(load(&folder, &sha256), (LoadedFrom::Packing, 1), "{wrong}");
            assert_eq!(std::fs::read(&copy).unwrap(), whole);
        }
    }

    #[test]
    fn several_starts_at_once_leave_one_good_copy() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("packed");
        let sha256 = "a".repeat(64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| load(&folder, &sha256));
            }
        });
        only(&folder);
        assert_eq!(load(&folder, &sha256), (LoadedFrom::Copy, 0));
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_one_note() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("packed");
        std::fs::write(&file, b"no folder").unwrap();
        assert_eq!(load(&file, &"a".repeat(64)), (LoadedFrom::Packing, 1));
    }

    #[test]
    fn old_copies_go_by_the_rule() {
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let copy = |name: &str, days: u32, bytes| Copy { used: now - day * days, bytes, path: name.into() };
        #[track_caller]
        fn check(copies: &[Copy], gone: &[&str]) {
            let found = superfluous(copies, Path::new("new-1.panels"), SystemTime::now(), 100);
            assert_eq!(found, gone.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
        let new = || copy("new-1.panels", 0, 40);
        check(&[new(), copy("a-1.panels", 2, 10), copy("b-1.panels", 29, 10)], &[]);
        check(&[new(), copy("a-1.panels", 31, 10)], &["a-1.panels"]);
        // Of another version: one that is in use stays.
        check(&[new(), copy("new-0.panels", 2, 10)], &["new-0.panels"]);
        check(&[new(), copy("new-0.panels", 0, 10)], &[]);
        // The least recently used go first.
        check(&[new(), copy("a-1.panels", 9, 40), copy("b-1.panels", 3, 40)], &["a-1.panels"]);
        check(&[copy("new-1.panels", 0, 400), copy("a-1.panels", 1, 1)], &["a-1.panels"]);
    }
}
