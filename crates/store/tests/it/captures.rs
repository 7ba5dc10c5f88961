//! Captures: written through faults and kills, read row by row through a small cache, the same rows as from a folder.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use draftsmith_core::report::Stop;
use draftsmith_formats::cache::{
    CacheError, CacheManifest, CacheReader, CacheSpec, CacheWriter, CaptureDtype, CaptureRow, PartWriter,
    StoredRow,
};
use draftsmith_store::{
    CacheOptions, ShardUploads, Store, StoreError, StoredCache, StoredParts, StoredWriter, capture_folder,
};

use crate::fake_s3::{FakeS3, Fault};
use crate::{bucket, open};

const ROWS: u64 = 22;

fn spec() -> CacheSpec {
    CacheSpec {
        target: "made up".to_string(),
        target_sha256: "aa".to_string(),
        precision: "stored".to_string(),
        tokenizer_sha256: "bb".to_string(),
        template_sha256: "cc".to_string(),
        tokens_sha256: "dd".to_string(),
        target_layer_ids: vec![1, 3],
        hidden_size: 64,
        dtype: CaptureDtype::Int8,
        shard_rows: 4,
        rows: ROWS,
    }
}

fn row(number: u64) -> CaptureRow {
    let len = 3 + (number * 5 % 17) as usize;
    // Noise, as states are.
    let value = |i: usize| {
        let mut x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ (number + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    CaptureRow {
        ids: (0..len).map(|i| (number * 31 + i as u64) as u32).collect(),
        loss_mask: (0..len).map(|i| i % 3 > 0).collect(),
        features: (0..len * 128).map(value).collect(),
        last: (0..len * 64).map(|i| value(i + 7)).collect(),
    }
}

/// The same capture in a folder.
fn in_folder(dir: &Path) -> CacheReader {
    let mut writer = CacheWriter::open(dir, &spec()).unwrap();
    (0..ROWS).for_each(|number| writer.push(&row(number)).unwrap());
    writer.finish().unwrap();
    CacheReader::open(dir).unwrap()
}

/// A row on its way into a store.
fn stored(number: u64) -> StoredRow {
    StoredRow::of_row(&row(number), &spec(), number).unwrap()
}

/// Captures what is not there yet, up to a row.
fn capture(dir: &Path, store: &Store, up_to: u64, others: &[std::path::PathBuf]) -> StoredWriter {
    let mut writer = StoredWriter::open(dir, &spec(), store, others).unwrap();
    for number in writer.rows_done()..up_to {
        writer.push(&stored(number)).unwrap();
    }
    writer
}

fn options(dir: &Path, bytes: u64) -> CacheOptions {
    CacheOptions { dir: dir.to_path_buf(), bytes, readers: 3 }
}

/// An order that mixes all shards, twice through.
fn order() -> Vec<usize> {
    let rows = ROWS as usize;
    (0..2 * rows).map(|i| (i * 7 + i / rows) % rows).collect()
}

fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).unwrap().flatten();
    // Files come and go meanwhile.
    let rows = files.filter(|f| f.path().extension().is_some_and(|e| e == "row"));
    rows.filter_map(|f| f.metadata().ok()).map(|meta| meta.len()).sum()
}

fn shards_in(dir: &Path) -> usize {
    let files = std::fs::read_dir(dir).unwrap().flatten();
    files.filter(|f| f.path().extension().is_some_and(|e| e == "dscache")).count()
}

#[test]
fn a_capture_through_faults_has_the_bytes_of_one_in_a_folder_and_is_read_as_the_same_rows() {
    let home = tempfile::tempdir().unwrap();
    let whole = in_folder(&home.path().join("whole"));
    let faults = [
        Fault::Silence(Duration::from_millis(900)),
        Fault::Status(500),
        Fault::Hangup,
        Fault::Cut,
        Fault::Wrong,
        Fault::Short,
        Fault::Whole,
        Fault::Unheard,
    ];
    let fake = FakeS3::start(move |line, nth| {
        // Manifests have no hash of their own.
        let fault = faults[(nth / 4) as usize % faults.len()];
        let spared = line.contains("manifest") && matches!(fault, Fault::Wrong);
        (nth % 4 == 1 && !spared).then_some(fault)
    });
    let folder = capture_folder(&spec(), 1);
    let store = bucket(&fake, "runs").inside(&folder);
    let dir = home.path().join("staged");
    capture(&dir, &store, ROWS, &[]).finish().unwrap();
    assert_eq!(shards_in(&dir), 0, "what the store has is not kept here");
    for entry in &whole.manifest().shards {
        let name = format!("bucket/runs/{folder}/{}", entry.file);
        assert_eq!(fake.get(&name).unwrap(), std::fs::read(whole.path().join(&entry.file)).unwrap());
    }
    // Each step through the rows again and again: cold, with a cache that holds a few rows, and with none at all.
    for (bytes, name) in [(6_000, "small"), (1 << 20, "large"), (10, "none")] {
        let local = home.path().join(name);
        let cache = StoredCache::open(&store, &spec(), options(&local, bytes)).unwrap();
        assert_eq!(cache.len(), ROWS as usize);
        cache.expect(&order());
        for number in order() {
            assert_eq!(cache.row_tokens(number), whole.row_tokens(number));
            assert_eq!(cache.row(number).unwrap(), whole.row(number).unwrap(), "row {number}");
            assert!(cache.bytes_here() <= bytes, "{} of {bytes}", cache.bytes_here());
            assert!(bytes_in(&local) <= bytes);
        }
        // Not the row whose turn it is.
        assert_eq!(cache.row(3).unwrap(), whole.row(3).unwrap());
    }
    assert!(fake.faults().len() >= 6, "{:?}", fake.faults());
}

#[test]
fn each_row_is_asked_for_once_an_epoch_and_never_again_where_the_cache_holds_all() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    capture(&home.path().join("staged"), &store, ROWS, &[]).finish().unwrap();
    let reads = |fake: &FakeS3| fake.take_asked().iter().filter(|line| line.ends_with(".dscache")).count();
    for (bytes, wanted) in [(1u64 << 20, ROWS as usize), (10, 2 * ROWS as usize)] {
        let local = home.path().join(bytes.to_string());
        let cache = StoredCache::open(&store, &spec(), options(&local, bytes)).unwrap();
        fake.take_asked();
        cache.expect(&order());
        order().into_iter().for_each(|number| drop(cache.row(number).unwrap()));
        drop(cache);
        assert_eq!(reads(&fake), wanted);
    }
    // The next process finds them; of a smaller cache it keeps what fits.
    let local = home.path().join((1u64 << 20).to_string());
    let cache = StoredCache::open(&store, &spec(), options(&local, 1 << 20)).unwrap();
    (0..ROWS as usize).for_each(|number| drop(cache.row(number).unwrap()));
    let asked = fake.take_asked();
    assert!(!asked.iter().any(|line| line.contains("shard-")), "{asked:?}");
    drop(cache);
    let cache = StoredCache::open(&store, &spec(), options(&local, 5_000)).unwrap();
    assert!(cache.bytes_here() <= 5_000 && bytes_in(&local) <= 5_000 && cache.bytes_here() > 0);
}

#[test]
fn rows_are_fetched_before_they_are_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    capture(&home.path().join("staged"), &store, ROWS, &[]).finish().unwrap();
    let cache = StoredCache::open(&store, &spec(), options(&home.path().join("rows"), 1 << 20)).unwrap();
    cache.expect(&order());
    for _ in 0..2000 {
        if bytes_in(&home.path().join("rows")) == cache.bytes_here() && cache.bytes_here() > 0 {
            let files = std::fs::read_dir(home.path().join("rows")).unwrap().flatten();
            if files.filter(|f| f.path().extension().is_some_and(|e| e == "row")).count() == ROWS as usize {
                break;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    fake.set_fail(|_, _| Some(Fault::Status(503)));
    order().into_iter().for_each(|number| drop(cache.row(number).unwrap()));
}

#[test]
fn a_capture_that_is_given_up_goes_on_behind_the_last_finished_shard() {
    let home = tempfile::tempdir().unwrap();
    let whole = in_folder(&home.path().join("whole"));
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    let dir = home.path().join("staged");
    // As a process that is killed: nothing is ended, and what was finished here may not be there yet.
    let mut writer = capture(&dir, &store, 10, &[]);
    assert_eq!(writer.rows_done(), 10);
    writer.push(&stored(10)).unwrap();
    drop(writer);
    let error = StoredCache::open(&store, &spec(), options(&home.path().join("rows"), 1000)).unwrap_err();
    assert!(matches!(error, StoreError::Cache(CacheError::Incomplete { done: 8, rows: 22, .. })), "{error}");
    // A shard that was finished here and not uploaded.
    fake.set_fail(|line, _| {
        (line.starts_with("PUT") && line.contains("shard-00003")).then_some(Fault::Status(403))
    });
    let stop = Stop::default();
    let short = open("s3://bucket/x", &fake.variables(), 1, &stop).unwrap();
    let mut writer = StoredWriter::open(&dir, &spec(), &short, &[]).unwrap();
    assert_eq!(writer.rows_done(), 8);
    let failed = (8..ROWS).find_map(|number| writer.push(&stored(number)).err());
    let failed = failed.unwrap_or_else(|| writer.finish().unwrap_err());
    assert!(failed.to_string().contains("`s3://bucket/x/shard-00003.dscache`"), "{failed}");
    assert!(shards_in(&dir) >= 1);
    fake.set_fail(|_, _| None);
    // Its folder is lost: what the store has is all that counts.
    let other = home.path().join("other machine");
    let writer = capture(&other, &store, 0, &[]);
    assert_eq!(writer.rows_done(), 12);
    drop(writer);
    let writer = StoredWriter::open(&dir, &spec(), &store, &[]).unwrap();
    assert!(writer.rows_done() >= 16, "{}", writer.rows_done());
    drop(writer);
    let manifest = capture(&dir, &store, ROWS, &[]).finish().unwrap();
    assert!(manifest.complete);
    for entry in &whole.manifest().shards {
        let bytes = fake.get(&format!("bucket/x/{}", entry.file)).unwrap();
        assert_eq!(bytes, std::fs::read(whole.path().join(&entry.file)).unwrap(), "{}", entry.file);
    }
    // Whoever comes later has nothing to do.
    fake.take_asked();
    let done = capture(&home.path().join("third"), &store, ROWS, &[]);
    assert_eq!(done.rows_done(), ROWS);
    done.finish().unwrap();
    assert!(!fake.take_asked().iter().any(|line| line.starts_with("PUT")));
}

#[test]
fn a_capture_that_lies_in_a_folder_is_uploaded_and_stays() {
    let home = tempfile::tempdir().unwrap();
    let whole = in_folder(&home.path().join("whole"));
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    let others = [home.path().join("nothing"), whole.path().to_path_buf()];
    let writer = capture(&home.path().join("staged"), &store, 0, &others);
    assert_eq!(writer.rows_done(), ROWS);
    assert!(writer.finish().unwrap().complete);
    whole.verify().unwrap();
}

#[test]
fn a_capture_that_somebody_copied_there_is_read_once_and_then_row_by_row() {
    let home = tempfile::tempdir().unwrap();
    let whole = in_folder(&home.path().join("whole"));
    let share = home.path().join("share");
    std::fs::create_dir(&share).unwrap();
    for file in std::fs::read_dir(whole.path()).unwrap().flatten() {
        std::fs::copy(file.path(), share.join(file.file_name())).unwrap();
    }
    let store = open(&format!("file://{}", share.display()), &[], 2, &Stop::default()).unwrap();
    let local = home.path().join("rows");
    for _ in 0..2 {
        let cache = StoredCache::open(&store, &spec(), options(&local, 3_000)).unwrap();
        for number in order() {
            assert_eq!(cache.row(number).unwrap(), whole.row(number).unwrap());
        }
    }
    let names: Vec<String> =
        std::fs::read_dir(&share).unwrap().flatten().map(|f| f.file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.ends_with(".rows")), "nothing is written there: {names:?}");
}

#[test]
fn damage_is_told_with_object_and_row_and_a_damaged_cache_heals() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let store = open("s3://bucket/x", &fake.variables(), 1, &Stop::default()).unwrap();
    capture(&home.path().join("staged"), &store, ROWS, &[]).finish().unwrap();
    let local = home.path().join("rows");
    let cache = StoredCache::open(&store, &spec(), options(&local, 1 << 20)).unwrap();
    let right: Vec<CaptureRow> = (0..ROWS as usize).map(|number| cache.row(number).unwrap()).collect();
    drop(cache);
    // Half a file, another file, no file.
    std::fs::write(local.join("3.row"), b"half").unwrap();
    let five = std::fs::read(local.join("5.row")).unwrap();
    std::fs::write(local.join("5.row"), vec![7; five.len()]).unwrap();
    std::fs::remove_file(local.join("6.row")).unwrap();
    std::fs::write(local.join("7.part"), b"killed").unwrap();
    let cache = StoredCache::open(&store, &spec(), options(&local, 1 << 20)).unwrap();
    for (number, right) in right.iter().enumerate() {
        assert_eq!(&cache.row(number).unwrap(), right);
    }
    assert_eq!(std::fs::read(local.join("5.row")).unwrap(), five);
    drop(cache);
    // In the store.
    let shard = "bucket/x/shard-00001.dscache";
    let mut bytes = fake.get(shard).unwrap();
    bytes[40] ^= 1;
    fake.put(shard, bytes);
    let cache = StoredCache::open(&store, &spec(), options(&home.path().join("new"), 1 << 20)).unwrap();
    cache.expect(&order());
    let error = order().into_iter().find_map(|number| cache.row(number).err()).unwrap();
    let told = error.to_string();
    assert!(told.contains("`s3://bucket/x/shard-00001.dscache` could not be read"), "{told}");
    assert!(told.contains("row 4 at byte 8"), "{told}");
    drop(cache);
    let mut places = fake.get("bucket/x/shard-00002.dscache.rows").unwrap();
    places[30] ^= 1;
    fake.put("bucket/x/shard-00002.dscache.rows", places);
    let open =
        |name: &str| StoredCache::open(&store, &spec(), options(&home.path().join(name), 1000)).unwrap_err();
    let told = open("places").to_string();
    assert!(told.contains("shard-00002.dscache.rows`") && told.contains("sha256"), "{told}");
    fake.remove("bucket/x/shard-00002.dscache.rows");
    assert!(open("none").to_string().contains("shard-00002.dscache.rows` does not exist"));
    fake.remove("bucket/x/manifest.json");
    let told = open("none");
    assert!(told.to_string().contains("`s3://bucket/x` holds no target cache"), "{told}");
}

#[test]
fn captures_of_other_rows_lie_in_other_folders_and_never_mix() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    capture(&home.path().join("staged"), &store, ROWS, &[]).finish().unwrap();
    let other = CacheSpec { tokens_sha256: "ee".to_string(), ..spec() };
    assert_ne!(capture_folder(&spec(), 1), capture_folder(&other, 1));
    assert_ne!(capture_folder(&spec(), 1), capture_folder(&spec(), 2));
    let renamed = CacheSpec { target: "another name of it".to_string(), ..spec() };
    assert_eq!(capture_folder(&spec(), 1), capture_folder(&renamed, 1));
    let before: BTreeMap<String, Option<Vec<u8>>> =
        fake.names().into_iter().map(|name| (name.clone(), fake.get(&name))).collect();
    let error = StoredWriter::open(home.path().join("o"), &other, &store, &[]).err().unwrap();
    assert!(matches!(error, StoreError::Cache(CacheError::Differs { what: "tokens_sha256", .. })), "{error}");
    let error = StoredCache::open(&store, &other, options(&home.path().join("rows"), 1000)).unwrap_err();
    assert!(error.to_string().contains("`s3://bucket/x` was captured with tokens_sha256"), "{error}");
    let after = fake.names().into_iter().map(|name| (name.clone(), fake.get(&name))).collect();
    assert_eq!(before, after, "nothing there was touched");
    fake.put("bucket/x/manifest.json", "{");
    let error = StoredWriter::open(home.path().join("o"), &spec(), &store, &[]).err().unwrap();
    assert!(error.to_string().contains("target cache manifest `s3://bucket/x/manifest.json`"), "{error}");
}

#[test]
fn a_store_that_fails_for_good_ends_the_capture_with_its_name() {
    let home = tempfile::tempdir().unwrap();
    let refuse = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&refuse);
    let fake = FakeS3::start(move |_, _| now.load(Ordering::Relaxed).then_some(Fault::Status(500)));
    let store = open("s3://bucket/x", &fake.variables(), 1, &Stop::default()).unwrap();
    let mut writer = StoredWriter::open(home.path(), &spec(), &store, &[]).unwrap();
    refuse.store(true, Ordering::Relaxed);
    let failed = (0..ROWS).find_map(|number| writer.push(&stored(number)).err());
    let failed = failed.unwrap_or_else(|| writer.finish().unwrap_err());
    assert!(
        failed.to_string().contains("/shard-00000.dscache` could not be written (attempts: 2)"),
        "{failed}"
    );
    // Nothing that was finished is lost.
    let kept = CacheManifest::read(home.path()).unwrap().unwrap();
    assert!(!kept.shards.is_empty() && home.path().join("shard-00000.dscache").is_file());
}

/// As ranks do: each writes the ranges of its share, and uploads what is a whole shard; of the last one only so many ranges.
fn share_out(dir: &Path, store: &Store, ranks: usize, last: usize) -> StoredParts {
    let mut shared = StoredParts::open(dir, &spec(), store, &[]).unwrap();
    let shares = shared.parts().shares(ranks, |_| 1);
    for (rank, share) in shares.iter().enumerate() {
        let mut uploads = ShardUploads::begin(dir, &spec(), store).unwrap();
        let ranges = if rank + 1 == ranks { last.min(share.len()) } else { share.len() };
        for range in &share[..ranges] {
            let mut part = PartWriter::create(dir, &spec(), range.clone()).unwrap();
            for number in range.clone() {
                part.push(&stored(number)).unwrap();
            }
            uploads.take(part.finish().unwrap()).unwrap();
        }
        uploads.finish().unwrap().into_iter().for_each(|part| shared.add(part));
    }
    shared
}

#[test]
fn a_capture_by_several_has_the_objects_of_one_and_any_number_goes_on_with_it() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let objects = |name: &str, manifest: &CacheManifest| {
        let mut names: Vec<String> =
            manifest.shards.iter().flat_map(|entry| [entry.file.clone(), entry.rows_file()]).collect();
        names.push("manifest.json".to_string());
        let get = |file: &String| fake.get(&format!("bucket/{name}/{file}")).unwrap();
        names.iter().map(|file| (file.clone(), get(file))).collect::<Vec<_>>()
    };
    let alone = capture(&home.path().join("alone"), &bucket(&fake, "alone"), ROWS, &[]).finish().unwrap();
    let wanted = objects("alone", &alone);
    for (case, (ranks, last, then)) in
        [(1, 99, 2), (2, 0, 1), (3, 1, 3), (4, 1, 2), (3, 0, 4)].into_iter().enumerate()
    {
        let (name, dir) = (format!("case-{case}"), home.path().join(format!("case-{case}")));
        let store = bucket(&fake, &name);
        drop(share_out(&dir, &store, ranks, last));
        fake.take_asked();
        let shared = share_out(&dir, &store, then, 99);
        let manifest = shared.finish().unwrap();
        assert!(objects(&name, &manifest) == wanted, "{ranks} then {then}");
        assert_eq!(shards_in(&dir), 0, "what the store has is not kept here");
        // Nothing travels twice but the manifest.
        let mut puts: Vec<String> = fake.take_asked();
        puts.retain(|line| line.starts_with("PUT") && !line.contains("manifest"));
        let all = puts.len();
        puts.sort();
        puts.dedup();
        assert_eq!(puts.len(), all);
        // And one process finds it finished.
        let done = capture(&dir, &store, ROWS, &[]);
        assert_eq!(done.rows_done(), ROWS);
        done.finish().unwrap();
    }
}

#[test]
fn a_shard_of_a_rank_that_the_store_refuses_ends_it_with_its_name_and_stays_here() {
    let home = tempfile::tempdir().unwrap();
    let fake = FakeS3::start(|_, _| None);
    let store = bucket(&fake, "x");
    let shared = StoredParts::open(home.path(), &spec(), &store, &[]).unwrap();
    let ranges = shared.parts().shares(1, |_| 1).remove(0);
    fake.set_fail(|line, _| {
        (line.starts_with("PUT") && line.contains("shard-00001")).then_some(Fault::Status(403))
    });
    let mut uploads = ShardUploads::begin(home.path(), &spec(), &store).unwrap();
    let failed = ranges.iter().find_map(|range| {
        let mut part = PartWriter::create(home.path(), &spec(), range.clone()).unwrap();
        for number in range.clone() {
            part.push(&stored(number)).unwrap();
        }
        uploads.take(part.finish().unwrap()).err()
    });
    let failed = failed.unwrap_or_else(|| uploads.finish().unwrap_err());
    assert!(failed.to_string().contains("`s3://bucket/x/shard-00001.dscache`"), "{failed}");
    fake.set_fail(|_, _| None);
    let again = StoredParts::open(home.path(), &spec(), &store, &[]).unwrap();
    assert!(again.parts().rows_done() >= 8, "{}", again.parts().rows_done());
    drop(again);
    assert!(share_out(home.path(), &store, 2, 99).finish().unwrap().complete);
    // Without a beginning there is nothing to upload to.
    let nowhere = ShardUploads::begin(&home.path().join("nowhere"), &spec(), &store).map(drop).unwrap_err();
    assert!(matches!(nowhere, StoreError::Cache(CacheError::Missing { .. })), "{nowhere}");
}
