//! A server of S3 that others wrote.
//!
//! Tests beside it are a group of their own (`moto_`): they need a Python with the package `moto[server]`, named by
//! `DRAFTSMITH_TEST_MOTO`, and fail without one.

use std::time::Duration;

/// A server of S3 that others wrote, on a port of its own until it is dropped.
pub(crate) struct Moto {
    process: std::process::Child,
    pub(crate) url: String,
}

impl Moto {
    pub(crate) fn start() -> Moto {
        let python = std::env::var_os("DRAFTSMITH_TEST_MOTO")
            .expect("DRAFTSMITH_TEST_MOTO names a python that has the package `moto[server]`");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = std::process::Command::new(python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let moto = Moto { process, url: format!("http://127.0.0.1:{port}") };
        for _ in 0..600 {
            if ureq::get(format!("{}/moto-api/", moto.url)).call().is_ok() {
                return moto;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("moto does not answer at {}", moto.url);
    }

    /// The variables that lead here.
    pub(crate) fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.url.clone()),
            ("AWS_REGION", "us-east-1".to_string()),
            ("AWS_ACCESS_KEY_ID", "any".to_string()),
            ("AWS_SECRET_ACCESS_KEY", "any".to_string()),
        ]
    }

    /// Puts an object, or makes a bucket.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        ureq::put(format!("{}/{name}", self.url)).send(bytes).unwrap();
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
