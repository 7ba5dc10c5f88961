//! Stores beside a server of our own that speaks S3 and fails, and beside a folder.

#[path = "../../../draftsmith/tests/it/fake_http.rs"]
#[expect(dead_code, reason = "it serves other tests too")]
mod fake_http;
#[path = "../../../draftsmith/tests/it/fake_s3.rs"]
mod fake_s3;

#[path = "../../../draftsmith/tests/it/moto.rs"]
mod moto;

mod captures;
mod objects;

use std::time::Duration;

use draftsmith_core::report::Stop;
use draftsmith_store::{Address, Settings, Store, StoreError};

use fake_s3::FakeS3;

/// A client of an address, with these variables.
fn open(address: &str, variables: &[(&str, String)], retries: u32, stop: &Stop) -> Result<Store, StoreError> {
    open_patiently(address, variables, retries, stop, Duration::from_millis(700))
}

/// The same of a server that may take its time.
fn open_patiently(
    address: &str,
    variables: &[(&str, String)],
    retries: u32,
    stop: &Stop,
    timeout: Duration,
) -> Result<Store, StoreError> {
    let address: Address = address.parse()?;
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone());
    let settings = Settings { offline: false, variable: &variable, timeout, retries, stop: stop.clone() };
    Store::open(&address, settings)
}

/// The bucket of a fake.
fn bucket(fake: &FakeS3, path: &str) -> Store {
    open(&format!("s3://bucket/{path}"), &fake.variables(), 8, &Stop::default()).unwrap()
}

/// Bytes that differ from place to place.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}
