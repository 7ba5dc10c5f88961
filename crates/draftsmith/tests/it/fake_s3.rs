//! A server of our own that speaks as much of S3 as we ask, checks who asks, and fails as servers do. Google's and Azure's
//! protocols are near enough that small objects of theirs go through it too.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::fake_http::{Out, Request, serve};

/// How an answer goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Silence(Duration),
    Status(u16),
    Hangup,
    /// Half a body.
    Cut,
    /// Another byte in the middle.
    Wrong,
    /// Fewer bytes than were asked for, told as if those were all.
    Short,
    /// All of the object instead of a range.
    Whole,
    /// What was asked is done, but nobody hears of it.
    Unheard,
}

type Fail = Box<dyn Fn(&str, u64) -> Option<Fault> + Send + Sync>;

#[derive(Default)]
struct Stored {
    /// By bucket and key, with `/` between them.
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    uploads_begun: u64,
}

struct State {
    bucket: &'static str,
    region: &'static str,
    stored: Mutex<Stored>,
    fail: Mutex<Fail>,
    asked: Mutex<Vec<String>>,
    faults: Mutex<BTreeMap<String, u64>>,
}

/// A running server with one bucket.
#[derive(Clone)]
pub(crate) struct FakeS3 {
    address: String,
    state: Arc<State>,
}

/// Who may ask.
pub(crate) const KEY: &str = "AKFAKEKEY";
pub(crate) const SECRET: &str = "fake-secret-that-nobody-may-print";

impl FakeS3 {
    /// `fail` says what happens to the n-th request, by its method and path.
    pub(crate) fn start(fail: impl Fn(&str, u64) -> Option<Fault> + Send + Sync + 'static) -> FakeS3 {
        let state = Arc::new(State {
            bucket: "bucket",
            region: "eu-test-1",
            stored: Mutex::default(),
            fail: Mutex::new(Box::new(fail)),
            asked: Mutex::default(),
            faults: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        let address = serve(move |out, request| shared.answer(out, request));
        FakeS3 { address, state }
    }

    /// The variables that lead here.
    pub(crate) fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.address.clone()),
            ("AWS_REGION", self.state.region.to_string()),
            ("AWS_ACCESS_KEY_ID", KEY.to_string()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_string()),
        ]
    }

    pub(crate) fn url(&self) -> &str {
        &self.address
    }

    /// From now on.
    pub(crate) fn set_fail(&self, fail: impl Fn(&str, u64) -> Option<Fault> + Send + Sync + 'static) {
        *self.state.fail.lock().unwrap() = Box::new(fail);
    }

    /// Names of all objects.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state.stored.lock().unwrap().objects.keys().cloned().collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        self.state.stored.lock().unwrap().objects.get(name).cloned()
    }

    pub(crate) fn put(&self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.state.stored.lock().unwrap().objects.insert(name.to_string(), bytes.into());
    }

    pub(crate) fn remove(&self, name: &str) {
        self.state.stored.lock().unwrap().objects.remove(name);
    }

    /// Uploads in parts that are neither ended nor given up.
    pub(crate) fn open_uploads(&self) -> usize {
        self.state.stored.lock().unwrap().uploads.len()
    }

    /// Requests since the last call: `GET bucket/key?query`.
    pub(crate) fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.asked.lock().unwrap())
    }

    /// Faults so far.
    pub(crate) fn faults(&self) -> BTreeMap<String, u64> {
        self.state.faults.lock().unwrap().clone()
    }
}

fn tag(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    format!("\"{hash:016x}\"")
}

fn decoded(path: &str) -> String {
    let (bytes, mut out, mut at) = (path.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| u8::from_str_radix(&path[at + 1..at + 3], 16).unwrap());
        out.push(hex.unwrap_or(bytes[at]));
        at += if hex.is_some() { 3 } else { 1 };
    }
    String::from_utf8(out).unwrap()
}

/// An answer before faults.
struct Answer {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
    /// The length that is told where no body comes.
    told: Option<usize>,
}

impl Answer {
    fn new(status: &'static str, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, headers: String::new(), body: body.into(), told: None }
    }

    fn error(status: &'static str, code: &str, more: &str) -> Answer {
        let body = format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>told {code}</Message>{more}</Error>"
        );
        Answer::new(status, body)
    }
}

impl State {
    fn answer(&self, out: &mut Out<'_>, request: &Request) -> std::io::Result<()> {
        let (path, query) = request.path().split_once('?').unwrap_or((request.path(), ""));
        let name = decoded(path.trim_start_matches('/'));
        let line = format!("{} {name}{}{query}", request.method(), if query.is_empty() { "" } else { "?" });
        let nth = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(line.clone());
            asked.len() as u64 - 1
        };
        let fault = (self.fail.lock().unwrap())(&line, nth);
        if let Some(fault) = fault {
            let kind = match fault {
                Fault::Silence(_) => "Silence".to_string(),
                other => format!("{other:?}"),
            };
            *self.faults.lock().unwrap().entry(kind).or_default() += 1;
        }
        let gone = Err(std::io::ErrorKind::ConnectionAborted.into());
        match fault {
            Some(Fault::Silence(time)) => {
                std::thread::sleep(time);
                return gone;
            }
            Some(Fault::Status(status)) => {
                let body = "<Error><Code>SlowDown</Code><Message>try later</Message></Error>";
                let body = if request.method() == "HEAD" { "" } else { body };
                return out.whole(&format!("{status} Trouble"), "application/xml", "", body);
            }
            Some(Fault::Hangup) => return gone,
            _ => {}
        }
        let Answer { status, headers, mut body, told } = self.right(request, &name, query, fault);
        let length = told.unwrap_or(body.len());
        if request.method() == "HEAD" {
            body.clear();
        }
        let middle = body.len() / 2;
        match fault {
            Some(Fault::Unheard) => return gone,
            Some(Fault::Cut) => body.truncate(middle),
            Some(Fault::Wrong) if !body.is_empty() => body[middle] ^= 0x40,
            _ => {}
        }
        write!(out.0, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n")?;
        out.0.write_all(&body)?;
        if fault == Some(Fault::Cut) { gone } else { Ok(()) }
    }

    /// The answer of a server that is well.
    fn right(&self, request: &Request, name: &str, query: &str, fault: Option<Fault>) -> Answer {
        let authorization = request.header("authorization");
        if let Some(credential) = authorization.strip_prefix("AWS4-HMAC-SHA256 Credential=") {
            let mut parts = credential.split('/');
            if parts.next() != Some(KEY) {
                return Answer::error("403 Forbidden", "InvalidAccessKeyId", "");
            }
            if parts.nth(1) != Some(self.region) {
                let more = format!("<Region>{}</Region>", self.region);
                return Answer::error("400 Bad Request", "AuthorizationHeaderMalformed", &more);
            }
        } else if !authorization.is_empty() && authorization != "Bearer token" {
            return Answer::error("403 Forbidden", "AccessDenied", "");
        }
        let Some((bucket, key)) = name.split_once('/') else {
            return Answer::error("400 Bad Request", "InvalidRequest", "");
        };
        if bucket != self.bucket {
            return Answer::error("404 Not Found", "NoSuchBucket", "");
        }
        if key.starts_with("secret/") {
            return Answer::error("403 Forbidden", "AccessDenied", "");
        }
        let query: BTreeMap<&str, &str> =
            query.split('&').map(|q| q.split_once('=').unwrap_or((q, ""))).collect();
        let mut stored = self.stored.lock().unwrap();
        match (request.method(), query.get("uploadId"), query.contains_key("uploads")) {
            ("GET" | "HEAD", ..) => match stored.objects.get(name) {
                Some(bytes) => self.object(request, bytes, fault),
                None => Answer::error("404 Not Found", "NoSuchKey", ""),
            },
            ("POST", None, true) => {
                stored.uploads_begun += 1;
                let id = format!("upload{}", stored.uploads_begun);
                stored.uploads.insert(id.clone(), BTreeMap::new());
                let body = format!(
                    "<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
                );
                Answer::new("200 OK", body)
            }
            ("PUT", Some(id), _) => {
                let part: u32 = query["partNumber"].parse().unwrap();
                let Some(upload) = stored.uploads.get_mut(*id) else {
                    return Answer::error("404 Not Found", "NoSuchUpload", "");
                };
                upload.insert(part, request.body.clone());
                Answer { headers: format!("ETag: {}\r\n", tag(&request.body)), ..Answer::new("200 OK", "") }
            }
            ("POST", Some(id), _) => {
                let Some(parts) = stored.uploads.remove(*id) else {
                    return Answer::error("404 Not Found", "NoSuchUpload", "");
                };
                let text = String::from_utf8_lossy(&request.body).into_owned();
                assert_eq!(text.matches("<PartNumber>").count(), parts.len(), "{text}");
                let bytes: Vec<u8> = parts.into_values().flatten().collect();
                let body = format!(
                    "<CompleteMultipartUploadResult><Location>x</Location><Bucket>{bucket}</Bucket><Key>{key}</Key><ETag>{}</ETag></CompleteMultipartUploadResult>",
                    tag(&bytes).replace('"', "&quot;")
                );
                stored.objects.insert(name.to_string(), bytes);
                Answer::new("200 OK", body)
            }
            ("DELETE", Some(id), _) => {
                stored.uploads.remove(*id);
                Answer::new("204 No Content", "")
            }
            ("PUT", None, _) => {
                let headers = format!(
                    "ETag: {}\r\nLast-Modified: Mon, 02 Nov 2026 10:00:00 GMT\r\n",
                    tag(&request.body)
                );
                stored.objects.insert(name.to_string(), request.body.clone());
                // Azure says that it was made.
                let status =
                    if request.header("x-ms-blob-type").is_empty() { "200 OK" } else { "201 Created" };
                Answer { headers, ..Answer::new(status, "") }
            }
            (method, ..) => panic!("{method} {name}"),
        }
    }

    fn object(&self, request: &Request, bytes: &[u8], fault: Option<Fault>) -> Answer {
        let tag = tag(bytes);
        let if_match = request.header("if-match");
        if !if_match.is_empty() && if_match != tag {
            return Answer::error("412 Precondition Failed", "PreconditionFailed", "");
        }
        let mut headers = format!("ETag: {tag}\r\nLast-Modified: Mon, 02 Nov 2026 10:00:00 GMT\r\n");
        if request.method() == "HEAD" {
            return Answer { headers, told: Some(bytes.len()), ..Answer::new("200 OK", "") };
        }
        // Azure has a name of its own for it.
        let range = [request.header("range"), request.header("x-ms-range")].concat();
        let Some((from, to)) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
            return Answer { headers, ..Answer::new("200 OK", bytes) };
        };
        if fault == Some(Fault::Whole) {
            return Answer { headers, ..Answer::new("200 OK", bytes) };
        }
        let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
        if from >= bytes.len() {
            return Answer::error("416 Range Not Satisfiable", "InvalidRange", "");
        }
        let mut end = (to + 1).min(bytes.len());
        if fault == Some(Fault::Short) {
            end = from + (end - from).div_ceil(2);
        }
        headers += &format!("Content-Range: bytes {from}-{}/{}\r\n", end - 1, bytes.len());
        Answer { headers, ..Answer::new("206 Partial Content", &bytes[from..end]) }
    }
}
