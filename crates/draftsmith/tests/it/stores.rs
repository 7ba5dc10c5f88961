//! Runs whose data and captures lie in stores: the same weights as from this disk, whatever goes wrong on the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fake_s3::{FakeS3, Fault, SECRET};
use crate::moto::Moto;
use crate::stages::{bytes, finish, kill_when};
use crate::support::{Ended, Home, repository};

/// A training of seconds whose captures have several shards.
fn arguments(dir: &Path, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = [
        "train",
        "recipes/smoke.toml",
        "regenerate.enabled=false",
        "data.sources.0.max_rows=60",
        "capture.shard_rows=6",
        "train.epochs=2",
        "train.max_steps=16",
        "train.tokens_per_step=512",
        "train.pack_length=256",
        "train.checkpoint_every=4",
        "train.log_every=1",
        "validate.every=0",
        "bench.workloads=[]",
    ]
    .map(str::to_string)
    .to_vec();
    args.push(format!("run.dir={}", dir.display()));
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

fn weights(dir: &Path) -> Vec<u8> {
    bytes(dir.join("train/last/model.safetensors"))
}

/// What has to be in the store: the shards of a capture on this disk.
fn shards(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().flatten();
    let shards = files.filter(|f| f.path().extension().is_some_and(|e| e == "dscache"));
    shards.map(|f| (f.file_name().into_string().unwrap(), bytes(f.path()))).collect()
}

fn store(url: &str, more: &str) -> String {
    let comma = if more.is_empty() { "" } else { ", " };
    format!("capture.store={{ url = \"{url}\"{comma}{more} }}")
}

/// The only folder inside one.
fn only_folder(dir: &Path) -> PathBuf {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().flatten().map(|f| f.path()).collect();
    assert_eq!(folders.len(), 1, "{folders:?}");
    folders.remove(0)
}

/// Rows of the recipe as they would lie in a bucket.
fn prompts(name: &str) -> Vec<u8> {
    std::fs::read(repository().join("fixtures/tiny-target").join(name)).unwrap()
}

/// Shards of the only capture in a fake, by name.
fn stored(fake: &FakeS3) -> BTreeMap<String, Vec<u8>> {
    let names = fake.names().into_iter().filter(|name| name.ends_with(".dscache"));
    names.map(|name| (name.rsplit('/').next().unwrap().to_string(), fake.get(&name).unwrap())).collect()
}

#[test]
fn a_run_through_a_folder_gives_the_weights_of_one_on_this_disk() {
    let home = Home::new();
    let (here, there, share) =
        (home.path().join("here"), home.path().join("there"), home.path().join("share"));
    std::fs::create_dir(&share).unwrap();
    finish(home.spawn(&arguments(&here, &[])));
    let url = format!("file://{}", share.display());
    // Room for a few of the 60 rows.
    let said = finish(home.spawn(&arguments(&there, &[&store(&url, "cache_bytes = 300000")])));
    assert!(said.contains(&format!("capture: goes to `{url}/capture-")), "{said}");
    assert_eq!(weights(&here), weights(&there));
    assert_eq!(shards(&here.join("capture")), shards(&only_folder(&share)));
    assert!(shards(&there.join("capture")).is_empty(), "what the store has is not kept here");
    let rows = only_folder(&there.join("capture/rows"));
    let kept: u64 = std::fs::read_dir(rows).unwrap().flatten().map(|f| f.metadata().unwrap().len()).sum();
    // With the row places of ten shards.
    assert!(kept > 100_000 && kept <= 300_000 + 10 * 400, "{kept}");

    // Another run with the same rows finds its capture there; one with other layers has its own beside it.
    let second = home.path().join("second");
    let said = finish(home.spawn(&arguments(&second, &[&store(&url, ""), "train.lr=1e-3"])));
    assert!(!said.contains(" tokens, about "), "it was captured again: {said}");
    assert_ne!(weights(&second), weights(&here));
    let layers = home.path().join("layers");
    finish(home.spawn(&arguments(&layers, &[&store(&url, ""), "capture.layers=[1, 2, 5]"])));
    assert_eq!(std::fs::read_dir(&share).unwrap().count(), 2);

    // A capture on this disk is taken there, not made again, and training does not notice.
    let moved = home.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    let said = finish(home.spawn(&arguments(&here, &[&store(&format!("file://{}", moved.display()), "")])));
    assert!(!said.contains(" tokens, about ") && said.contains("train: done before"), "{said}");
    assert_eq!(shards(&only_folder(&moved)), shards(&place_of(&there)));
}

/// The folder of the capture of a run, as its stage file has it.
fn place_of(dir: &Path) -> PathBuf {
    let text = std::fs::read_to_string(dir.join("state/capture.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&text).unwrap();
    PathBuf::from(state["summary"]["store"].as_str().unwrap().strip_prefix("file://").unwrap())
}

#[test]
fn a_run_through_a_failing_server_with_data_from_there_gives_the_same_weights() {
    let mut home = Home::new();
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&arguments(&here, &[])));
    let faults = [
        Fault::Status(500),
        Fault::Cut,
        Fault::Hangup,
        Fault::Wrong,
        Fault::Status(503),
        Fault::Short,
        Fault::Unheard,
        Fault::Whole,
    ];
    let fake = FakeS3::start(move |line, nth| {
        let fault = faults[(nth / 7) as usize % faults.len()];
        // Rows of conversations and manifests have no hash of their own.
        let spared = fault == Fault::Wrong && !line.contains("dscache");
        let silent = (nth == 20).then_some(Fault::Silence(Duration::from_millis(3500)));
        (nth % 7 == 3 && !spared).then_some(fault).or(silent)
    });
    fake.put("bucket/data/train.jsonl", prompts("prompts-train.jsonl"));
    fake.put("bucket/data/valid.jsonl", prompts("prompts-valid.jsonl"));
    for (name, value) in fake.variables() {
        home.set(name, value);
    }
    let captures = store("s3://bucket/captures", "cache_bytes = 300000, timeout_s = 2, readers = 3");
    let more = [
        "data.sources.0.path=s3://bucket/data/train.jsonl",
        "data.validation=s3://bucket/data/valid.jsonl",
        captures.as_str(),
    ];
    let said = finish(home.spawn(&arguments(&there, &more)));
    assert_eq!(weights(&here), weights(&there));
    assert_eq!(shards(&here.join("capture")), stored(&fake));
    assert!(fake.faults().len() >= 7, "{:?}", fake.faults());
    assert!(said.contains("of them failed: "), "{said}");
    // Nothing that a run leaves behind knows the key.
    for file in walk(&there) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()), "{}", file.display());
    }
    assert!(!said.contains(SECRET));
    // Done is done: the data is looked at, and nothing is read again.
    fake.take_asked();
    let again = finish(home.spawn(&arguments(&there, &more)));
    assert!(again.contains("data: done before") && again.contains("train: done before"), "{again}");
    assert!(fake.take_asked().iter().all(|line| line.starts_with("HEAD")));
    // Other data under the same name is noticed.
    let mut changed = prompts("prompts-train.jsonl");
    changed.extend_from_slice(b"\n");
    fake.put("bucket/data/train.jsonl", changed);
    let again = finish(home.spawn(&arguments(&there, &more)));
    assert!(again.contains("content of data.sources.0.path"), "{again}");
    assert_eq!(weights(&here), weights(&there), "a blank line more is the same data");
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path().is_dir() {
            true => found.extend(walk(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_objects_and_weights() {
    let mut home = Home::new();
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&arguments(&here, &[])));
    // Slow enough to be caught between two objects.
    let fake = FakeS3::start(|line, _| {
        std::thread::sleep(Duration::from_millis(if line.starts_with("PUT") { 30 } else { 1 }));
        None
    });
    for (name, value) in fake.variables() {
        home.set(name, value);
    }
    let url = store("s3://bucket/captures", "cache_bytes = 300000");
    let run = || home.spawn(&arguments(&there, &[&url]));
    let count = |ending: &str| fake.names().iter().filter(|name| name.ends_with(ending)).count();
    for wanted in [1, 2, 4, 7] {
        // A shard that is there, and perhaps not what tells where its rows lie.
        kill_when(run(), || count(".dscache") >= wanted);
        let whole = count(".rows");
        assert!(whole + 1 >= wanted, "{whole} of {wanted}: what was finished stays");
    }
    let steps = || {
        let text = std::fs::read_to_string(there.join("train/log.jsonl")).unwrap_or_default();
        text.lines().count()
    };
    kill_when(run(), || steps() >= 6);
    finish(run());
    assert_eq!(shards(&here.join("capture")), stored(&fake));
    assert_eq!(weights(&here), weights(&there));
    assert_eq!(fake.open_uploads(), 0);
}

#[test]
fn what_cannot_be_is_one_error_with_its_key_and_what_to_do() {
    let mut home = Home::new();
    let fake = FakeS3::start(|_, _| None);
    fake.put("bucket/rows.jsonl", prompts("prompts-train.jsonl"));
    for (name, value) in fake.variables() {
        home.set(name, value);
    }
    let run = home.path().join("run");
    let check = |home: &Home, more: &[&str], told: &str, hint: &str| {
        let ended = home.spawn(&arguments(&run, more)).wait_with_output().unwrap();
        let ended = Ended::from(ended);
        assert_eq!(ended.code, Some(2), "{more:?}: {}", ended.stderr);
        let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error:")).collect();
        assert_eq!(errors.len(), 1, "{more:?}: {}", ended.stderr);
        assert!(errors[0].contains(told), "{more:?}: {}", ended.stderr);
        let hints: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("hint:")).collect();
        assert!(hints.len() == 1 && hints[0].contains(hint), "{more:?}: {}", ended.stderr);
        assert!(!ended.stderr.contains(SECRET));
    };
    let source = |path: &str| format!("data.sources.0.path={path}");
    check(
        &home,
        &[&source("s4://bucket/x")],
        "`data.sources.0.path`: `s4://bucket/x` has the scheme `s4`",
        "write `s3://BUCKET/PATH`",
    );
    check(&home, &[&source("s3:///x")], "names no bucket", "s3://BUCKET/PATH");
    check(&home, &[&source("s3://bucket")], "`s3://bucket` names no object", "s3://BUCKET/PATH");
    check(
        &home,
        &[&source("s3://bucket/none.jsonl")],
        "`s3://bucket/none.jsonl` does not exist",
        "check bucket and name",
    );
    check(&home, &[&source("s3://other/x.jsonl")], "the bucket of `s3://other/", "make the bucket");
    check(
        &home,
        &[&source("s3://bucket/secret/x.jsonl")],
        "no access to `s3://bucket/secret/x.jsonl`: status 403",
        "AWS_ACCESS_KEY_ID",
    );
    check(&home, &[&store("s3://other/x", "")], "the bucket of `s3://other/x", "make the bucket");
    check(&home, &[&store("bucket/x", "")], "`bucket/x` has no scheme", "file:///FOLDER/PATH");
    check(&home, &[&store("/mnt/x", "")], "a folder is written `file:///mnt/x`", "file:///FOLDER/PATH");
    check(
        &home,
        &[&store("file:///does/not/exist", "")],
        "`file:///does/not/exist` does not exist",
        "mount it",
    );
    check(&home, &[&store("s3://me:word@bucket/x", "")], "holds a user name or password", "docs/STORE.md");
    check(&home, &[&store("s3://bucket/x", "readers = 0")], "capture.store.readers` is 0", "");
    check(
        &home,
        &[&store("s3://bucket/x", ""), "capture.mode=online"],
        "`capture.store` is set, but",
        "capture.mode",
    );
    check(&home, &["--offline", &source("gs://bucket/x.jsonl")], "the network is switched off", "--offline");
    home.set("AWS_REGION", "us-east-1");
    check(&home, &[&store("s3://bucket/x", "")], "it is in `eu-test-1`", "set AWS_REGION=eu-test-1");
    home.set("AWS_REGION", "eu-test-1").set("AWS_ACCESS_KEY_ID", "WRONG");
    check(&home, &[&store("s3://bucket/x", "")], "no access to `s3://bucket/x", "AWS_SECRET_ACCESS_KEY");
    // A cache that the disk cannot hold is told before training, not in it.
    home.set("AWS_ACCESS_KEY_ID", crate::fake_s3::KEY);
    check(
        &home,
        &[&store("s3://bucket/x", "cache_bytes = 9000000000000000")],
        "`capture.store.cache_bytes` asks for 8185",
        "cache_dir",
    );
}

#[test]
fn rows_in_a_store_can_be_looked_at() {
    let mut home = Home::new();
    let fake = FakeS3::start(|_, _| None);
    fake.put("bucket/rows.jsonl", prompts("prompts-train.jsonl"));
    for (name, value) in fake.variables() {
        home.set(name, value);
    }
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let file = repository().join("fixtures/tiny-target/prompts-train.jsonl").display().to_string();
    let look = |path: &str| home.run(&["data", "preview", path, "--target", &target, "--row", "3"]);
    let (here, there) = (look(&file), look("s3://bucket/rows.jsonl"));
    assert_eq!(there.code, Some(0), "{}", there.stderr);
    assert_eq!(here.stdout.replace(&file, ""), there.stdout.replace("s3://bucket/rows.jsonl", ""));
    let none = look("s3://bucket/none.jsonl");
    assert!(none.stderr.starts_with("error: `s3://bucket/none.jsonl` does not exist"), "{}", none.stderr);
}

#[test]
fn moto_keeps_data_and_capture_of_a_run_that_gives_the_same_weights() {
    let moto = Moto::start();
    moto.put("bucket", b"");
    moto.put("bucket/data/train.jsonl", &prompts("prompts-train.jsonl"));
    let mut home = Home::new();
    for (name, value) in moto.variables() {
        home.set(name, value);
    }
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&arguments(&here, &[])));
    // One shard of more than a part, so that it goes up in parts.
    let large = |dir: &Path, more: &[&str]| {
        let whole = ["data.sources.0.max_rows=400", "capture.shard_rows=400", "capture.dtype=bf16"];
        let more: Vec<&str> = [more, &whole[..]].concat();
        finish(home.spawn(&arguments(dir, &more)))
    };
    let source = "data.sources.0.path=s3://bucket/data/train.jsonl";
    let url = store("s3://bucket/captures", "cache_bytes = 300000");
    let killed = kill_when(home.spawn(&arguments(&there, &[source, &url])), || {
        let list = ureq::get(format!("{}/bucket?list-type=2&prefix=captures/", moto.url)).call();
        let text = list.unwrap().into_body().read_to_string().unwrap();
        text.matches(".dscache<").count() >= 2
    });
    assert!(killed);
    finish(home.spawn(&arguments(&there, &[source, &url])));
    assert_eq!(weights(&here), weights(&there));
    let (one, other) = (home.path().join("large here"), home.path().join("large there"));
    large(&one, &[]);
    large(&other, &[source, &store("s3://bucket/large", "")]);
    let size: usize = shards(&one.join("capture")).values().map(Vec::len).sum();
    assert!(size > 16 << 20, "{size} bytes are one part");
    assert_eq!(weights(&one), weights(&other));
}
