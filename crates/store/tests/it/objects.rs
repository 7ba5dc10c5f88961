//! Single objects: every passing fault is survived, every lasting one is told with what to do.

use std::time::{Duration, Instant};

use draftsmith_core::report::Stop;
use draftsmith_store::{Address, Settings, Store, StoreError};

use crate::fake_s3::{FakeS3, Fault, KEY, SECRET};
use crate::moto::Moto;
use crate::{bucket, bytes, open, open_patiently};

#[test]
fn objects_go_and_come_whole_through_every_passing_fault() {
    let folder = tempfile::tempdir().unwrap();
    let large = bytes(37_000_000, 1);
    let file = folder.path().join("large");
    std::fs::write(&file, &large).unwrap();
    let faults = [
        Fault::Silence(Duration::from_millis(1500)),
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Hangup,
        Fault::Cut,
        Fault::Unheard,
    ];
    // Every other request fails, those for parts too.
    let fake = FakeS3::start(move |_, nth| (nth % 2 == 0).then(|| faults[(nth / 2) as usize % faults.len()]));
    let store = bucket(&fake, "a/b c");
    store.write("small", b"hello".to_vec()).unwrap();
    assert_eq!(fake.get("bucket/a/b c/small").unwrap(), b"hello");
    store.write_file("large", &file).unwrap();
    assert_eq!(fake.get("bucket/a/b c/large").unwrap(), large);
    assert_eq!(fake.open_uploads(), 0);
    let found = store.find("large").unwrap().unwrap();
    assert_eq!(found.size, large.len() as u64);
    let tag = found.tag.as_deref();
    let read = store.read("large", 3..20_000_003, tag, |_| Ok(())).unwrap();
    assert_eq!(read, large[3..20_000_003]);
    assert_eq!(store.read_whole("small", 10).unwrap().unwrap(), b"hello");
    assert_eq!(store.find("none").unwrap(), None);
    assert_eq!(store.read_whole("none", 10).unwrap(), None);
    assert!(fake.faults().len() >= 6, "{:?}", fake.faults());
    let told = store.asked().to_string();
    assert!(told.contains("of them failed: ") && told.contains("status 500"), "{told}");
}

#[test]
fn bytes_that_are_wrong_are_asked_for_again_and_never_given_on() {
    let fake = FakeS3::start(|_, _| None);
    let all = bytes(100_000, 2);
    fake.put("bucket/x", all.clone());
    let store = bucket(&fake, "");
    for fault in [Fault::Wrong, Fault::Short, Fault::Whole, Fault::Cut] {
        fake.take_asked();
        fake.set_fail(move |_, nth| (nth < 2).then_some(fault));
        let wanted = all[100..50_000].to_vec();
        let check = |got: &[u8]| if got == wanted { Ok(()) } else { Err("other bytes".to_string()) };
        assert_eq!(store.read("x", 100..50_000, None, check).unwrap(), wanted, "{fault:?}");
        assert_eq!(fake.take_asked().len(), 3, "{fault:?}");
    }
    fake.set_fail(|_, _| Some(Fault::Wrong));
    let began = Instant::now();
    let error = store.read("x", 0..10, None, |_| Err("other bytes".to_string())).unwrap_err();
    let told = error.to_string();
    assert!(told.contains("`s3://bucket/x` could not be read (attempts: 4)"), "{told}");
    assert!(told.contains("wrong bytes: other bytes"), "{told}");
    assert!(error.hint().unwrap().contains("damaged"));
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[track_caller]
fn check(done: Result<impl std::fmt::Debug, StoreError>, told: &str, hint: &str) {
    let error = done.unwrap_err();
    let (text, advice) = (error.to_string(), error.hint().unwrap_or_default());
    assert!(text.contains(told), "`{text}` has no `{told}`");
    assert!(advice.contains(hint), "`{advice}` has no `{hint}`");
    assert!(!text.contains(SECRET) && !advice.contains(SECRET));
}

#[test]
fn what_does_not_pass_is_told_at_once_with_what_to_do() {
    let fake = FakeS3::start(|_, _| None);
    fake.put("bucket/x", bytes(1000, 3));
    let store = bucket(&fake, "");
    let read = |store: &Store, name: &str| store.read(name, 0..10, None, |_| Ok(()));
    check(read(&store, "y"), "`s3://bucket/y` does not exist", "check bucket and name");
    check(
        read(&store, "secret/y"),
        "no access to `s3://bucket/secret/y`: status 403: told AccessDenied",
        "AWS_ACCESS_KEY_ID",
    );
    check(
        store.read("x", 0..10, Some("\"other\""), |_| Ok(())),
        "`s3://bucket/x` was changed",
        "nobody writes it",
    );
    check(store.read("x", 2000..2010, None, |_| Ok(())), "`s3://bucket/x` was changed", "");
    check(store.read_whole("x", 10), "it has 1000 bytes, more than 10", "");
    let asked = fake.take_asked();
    assert_eq!(asked.len(), 5, "nothing is asked twice: {asked:?}");
    let with = |change: (&'static str, &str)| {
        let mut variables = fake.variables();
        variables.retain(|(name, _)| *name != change.0);
        variables.push((change.0, change.1.to_string()));
        variables
    };
    let stop = Stop::default();
    let elsewhere = open("s3://other/x", &fake.variables(), 8, &stop).unwrap();
    check(read(&elsewhere, "y"), "the bucket of `s3://other/x/y` does not exist", "make the bucket");
    check(elsewhere.reach(), "the bucket of `s3://other/x/", "make the bucket");
    check(elsewhere.write("y", vec![1]), "the bucket of `s3://other/x/y` does not exist", "AWS_ENDPOINT_URL");
    store.reach().unwrap();
    let region = open("s3://bucket/x", &with(("AWS_REGION", "us-east-1")), 8, &stop).unwrap();
    check(
        read(&region, "y"),
        "is not in the region that was asked: it is in `eu-test-1`",
        "set AWS_REGION=eu-test-1",
    );
    let key = open("s3://bucket/x", &with(("AWS_ACCESS_KEY_ID", "WRONG")), 8, &stop).unwrap();
    check(read(&key, "y"), "status 403: told InvalidAccessKeyId", "AWS_SECRET_ACCESS_KEY");
    // A size is asked without a body that could say why.
    check(key.find("y"), "no access to `s3://bucket/x/y`: status 403", "AWS_SECRET_ACCESS_KEY");
    let mut nobody = fake.variables();
    nobody.retain(|(name, _)| !name.contains("KEY"));
    let half = [nobody.clone(), vec![("AWS_ACCESS_KEY_ID", KEY.to_string())]].concat();
    check(
        open("s3://bucket/x", &half, 8, &stop),
        "`s3://bucket/x` cannot be opened: Missing SecretAccessKey",
        "AWS_SECRET",
    );
    // Where the machine hands out credentials nobody listens.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    nobody.push(("AWS_METADATA_ENDPOINT", format!("http://localhost:{closed}")));
    let began = Instant::now();
    let nobody = open("s3://bucket/x", &nobody, 8, &stop).unwrap();
    check(nobody.find("y"), "there are no credentials for `s3://bucket/x`", "AWS_SKIP_SIGNATURE=true");
    assert!(began.elapsed() < Duration::from_secs(5));
    for (address, told) in [("az://c/x", "cannot be opened"), ("s4://b/x", "scheme `s4`")] {
        check(
            open(address, &[], 8, &stop),
            told,
            if address.starts_with("az") { "AZURE_STORAGE_ACCOUNT_NAME" } else { "write `s3://" },
        );
    }
}

#[test]
fn patience_ends_with_the_last_fault_and_a_wish_to_stop_ends_it_at_once() {
    let fake = FakeS3::start(|_, _| Some(Fault::Status(503)));
    let stop = Stop::default();
    let store = open("s3://bucket/x", &fake.variables(), 3, &stop).unwrap();
    check(
        store.write("y", vec![1]),
        "`s3://bucket/x/y` could not be written (attempts: 4); the last time: status 503: try later",
        "goes on where this stopped",
    );
    assert_eq!(fake.take_asked().len(), 4);
    assert!(store.take_notes()[0].contains("attempt 4 of 4"), "{:?}", store.take_notes());
    // Where nobody ever listened nobody is waited for.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let variables = [fake.variables(), vec![("AWS_ENDPOINT_URL_S3", format!("http://{closed}"))]].concat();
    let nowhere = open("s3://bucket/x", &variables, 8, &stop).unwrap();
    check(nowhere.find("y"), "(attempts: 1); the last time: no connection", "AWS_ENDPOINT_URL");
    let waiting = open("s3://bucket/x", &fake.variables(), 50, &stop).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            stop.request();
        });
        assert!(matches!(waiting.find("y"), Err(StoreError::Stopped)));
    });
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn offline_only_folders_and_this_machine_are_used() {
    let open = |address: &str, endpoint: Option<&str>| {
        let address: Address = address.parse().unwrap();
        let variable = |name: &str| match name {
            "AWS_ENDPOINT_URL" => endpoint.map(str::to_string),
            "AWS_SKIP_SIGNATURE" => Some("true".to_string()),
            _ => None,
        };
        let timeout = Duration::from_secs(1);
        let settings =
            Settings { offline: true, variable: &variable, timeout, retries: 0, stop: Stop::default() };
        Store::open(&address, settings)
    };
    check(open("s3://b/x", None), "`s3://b/x` is elsewhere, but the network is switched off", "file:///");
    check(open("s3://b/x", Some("http://elsewhere:9000")), "switched off", "HF_HUB_OFFLINE");
    open("s3://b/x", Some("http://127.0.0.1:9000")).unwrap();
    open("file:///tmp/x", None).unwrap();
}

#[test]
fn a_folder_is_a_store_too() {
    let folder = tempfile::tempdir().unwrap();
    let at = format!("file://{}/a b", folder.path().display());
    let store = open(&at, &[], 8, &Stop::default()).unwrap();
    check(store.reach(), "a b` does not exist", "mount it");
    std::fs::create_dir(folder.path().join("a b")).unwrap();
    store.reach().unwrap();
    let large = bytes(17_000_000, 4);
    let file = folder.path().join("large");
    std::fs::write(&file, &large).unwrap();
    store.write_file("deep/large", &file).unwrap();
    assert_eq!(std::fs::read(folder.path().join("a b/deep/large")).unwrap(), large);
    let found = store.find("deep/large").unwrap().unwrap();
    let read = store.read("deep/large", 10..16_000_010, found.tag.as_deref(), |_| Ok(())).unwrap();
    assert_eq!(read, large[10..16_000_010]);
    store.write("deep/large", b"short".to_vec()).unwrap();
    check(store.read("deep/large", 0..5, found.tag.as_deref(), |_| Ok(())), "was changed", "nobody writes");
    assert_eq!(store.read_whole("deep/large", 100).unwrap().unwrap(), b"short");
    assert_eq!(store.find("none").unwrap(), None);
    check(store.read("none", 0..1, None, |_| Ok(())), "none` does not exist", "check its name");
    let names: Vec<_> = std::fs::read_dir(folder.path().join("a b/deep")).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "nothing half-written stays: {names:?}");
    std::fs::write(folder.path().join("a b/file"), "x").unwrap();
    check(store.write("file/below", vec![1]), "could not be written", "look at the folder");
}

#[test]
fn google_and_azure_are_spoken_to_as_well() {
    let fake = FakeS3::start(|_, nth| (nth % 3 == 1).then_some(Fault::Status(503)));
    let google = [("GOOGLE_BASE_URL", fake.url().to_string()), ("GOOGLE_BEARER_TOKEN", "token".to_string())];
    let azure = [
        ("AZURE_STORAGE_ENDPOINT", fake.url().to_string()),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account".to_string()),
        ("AZURE_SKIP_SIGNATURE", "true".to_string()),
    ];
    for (address, variables) in [("gs://bucket/g", &google[..]), ("az://bucket/z", &azure[..])] {
        let store = open(address, variables, 8, &Stop::default()).unwrap();
        store.write("x", b"0123456789".to_vec()).unwrap();
        let found = store.find("x").unwrap().unwrap();
        assert_eq!((found.size, found.tag.is_some()), (10, true), "{address}");
        let read = store.read("x", 3..7, found.tag.as_deref(), |_| Ok(())).unwrap();
        assert_eq!(read, b"3456", "{address}");
        assert_eq!(store.find("y").unwrap(), None);
    }
    assert_eq!(fake.names(), ["bucket/g/x", "bucket/z/x"]);
}

#[test]
fn moto_takes_and_gives_objects_as_our_own_server_does() {
    let moto = Moto::start();
    moto.put("bucket", b"");
    let folder = tempfile::tempdir().unwrap();
    let large = bytes(37_000_000, 5);
    let file = folder.path().join("large");
    std::fs::write(&file, &large).unwrap();
    let stop = Stop::default();
    let store =
        open_patiently("s3://bucket/a b/ü", &moto.variables(), 3, &stop, Duration::from_secs(60)).unwrap();
    store.reach().unwrap();
    store.write("small", b"hello".to_vec()).unwrap();
    store.write_file("large", &file).unwrap();
    let found = store.find("large").unwrap().unwrap();
    assert_eq!(found.size, large.len() as u64);
    let tag = found.tag.as_deref();
    assert_eq!(store.read("large", 5..20_000_005, tag, |_| Ok(())).unwrap(), large[5..20_000_005]);
    assert_eq!(store.read_whole("small", 10).unwrap().unwrap(), b"hello");
    assert_eq!(store.find("none").unwrap(), None);
    store.write("large", b"other".to_vec()).unwrap();
    check(store.read("large", 0..5, tag, |_| Ok(())), "was changed", "nobody writes it");
    check(store.read("none", 0..5, None, |_| Ok(())), "none` does not exist", "check bucket and name");
    let elsewhere =
        open_patiently("s3://other/x", &moto.variables(), 3, &stop, Duration::from_secs(60)).unwrap();
    check(elsewhere.reach(), "the bucket of `s3://other/x/", "make the bucket");
    check(elsewhere.write("y", vec![1]), "the bucket of `s3://other/x/y` does not exist", "make the bucket");
    assert!(store.asked().faults.is_empty(), "{}", store.asked());
}
