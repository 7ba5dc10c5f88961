//! A hub that bundles are pushed to and pulled from. It checks every request and keeps what a hub would keep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use draftsmith::formats::hash::sha256_hex;
use draftsmith::pull::git_blob_id;
use serde_json::{Value, json};

use crate::fake_http::{Out, Request, same, serve};

pub(crate) const TOKEN: &str = "hf_of_a_test";

/// What goes wrong at a step.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// An answer of this status, with words of the hub's own.
    Status(u16),
    /// The connection ends without an answer.
    Cut,
    /// An answer of 200 that says nothing.
    Empty,
}

#[derive(Default)]
pub(crate) struct State {
    /// Whether the repository `org/draft` is there, and private.
    pub(crate) repo: Option<bool>,
    /// Its files, by path.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) commits: usize,
    /// First line of the last commit.
    pub(crate) summary: String,
    /// The store of large files, by hash.
    pub(crate) store: BTreeMap<String, Vec<u8>>,
    verified: Vec<String>,
    parts: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    /// `STEP` of each request, in order; of a large file with its size.
    pub(crate) log: Vec<String>,
    /// A step that fails, once.
    pub(crate) trouble: Option<(&'static str, Trouble)>,
    /// Bytes per piece of a large file; `None`: in one.
    pub(crate) piece: Option<usize>,
    /// A path that the repository ignores.
    pub(crate) ignored: Option<&'static str>,
    /// Whether making a repository is forbidden.
    pub(crate) may_not_create: bool,
}

pub(crate) struct FakeHub {
    pub(crate) address: String,
    state: Arc<Mutex<State>>,
}

pub(crate) fn commit_of(number: usize) -> String {
    format!("{number:040x}")
}

impl FakeHub {
    /// `bundle`: the folder that is pushed, to compare sizes and samples with.
    pub(crate) fn start(bundle: PathBuf) -> FakeHub {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let own = Arc::new(Mutex::new(String::new()));
        let address = Arc::clone(&own);
        let url = serve(move |out, request| {
            let address = address.lock().unwrap().clone();
            answer(out, request, &mut shared.lock().unwrap(), &bundle, &address)
        });
        own.lock().unwrap().clone_from(&url);
        FakeHub { address: url, state }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }
}

fn unbase64(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => return Err(format!("`{}` is no base64", other as char)),
        };
        (bits, count) = (bits << 6 | u32::from(digit), count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    match text.len() % 4 {
        0 => Ok(bytes),
        _ => Err("base64 is not padded".to_string()),
    }
}

fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors")
}

/// Status, headers and body of an answer.
type Answer = (&'static str, String, Vec<u8>);

fn ok(body: &Value) -> Answer {
    ("200 OK", String::new(), body.to_string().into_bytes())
}

fn answer(
    out: &mut Out<'_>,
    request: &Request,
    state: &mut State,
    bundle: &Path,
    address: &str,
) -> std::io::Result<()> {
    use std::io::Write;
    let (step, checked) = handled(request, state, bundle, address);
    let (status, headers, body) = match checked {
        Ok(answer) => answer,
        // What a request has wrong is told to the one who sent it, and so to the test.
        Err(wrong) => (
            "400 Bad Request",
            String::new(),
            json!({ "error": format!("{step}: {wrong}") }).to_string().into_bytes(),
        ),
    };
    let status = match state.trouble.take_if(|(at, _)| *at == step) {
        Some((_, Trouble::Cut)) => return Err(std::io::Error::other("cut")),
        Some((_, Trouble::Empty)) => return out.whole("200 OK", "application/json", "", "{}"),
        Some((_, Trouble::Status(code))) => {
            let body = json!({ "error": format!("no, said the hub at {step}") }).to_string();
            return out.whole(&format!("{code} Something"), "application/json", "", &body);
        }
        None => status,
    };
    write!(out.0, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
    if request.method() == "HEAD" { Ok(()) } else { out.0.write_all(&body) }
}

/// The step that a request is, and what the hub answers. A step that is to fail changes nothing.
fn handled(
    request: &Request,
    state: &mut State,
    bundle: &Path,
    address: &str,
) -> (&'static str, Result<Answer, String>) {
    let (method, path) = (request.method(), request.path());
    let step = match (method, path) {
        ("POST", "/api/repos/create") => "create",
        ("GET", "/api/models/org/draft") => "show",
        ("POST", "/api/models/org/draft/preupload/main") => "preupload",
        ("POST", "/org/draft.git/info/lfs/objects/batch") => "batch",
        ("POST", "/api/models/org/draft/commit/main") => "commit",
        ("POST", "/verify") => "verify",
        ("GET", "/api/models/org/draft/revision/main") => "revision",
        ("PUT", path) if path.starts_with("/store/") => "put",
        ("POST", path) if path.starts_with("/store/") => "complete",
        ("HEAD" | "GET", path) if path.starts_with("/org/draft/resolve/main/") => "file",
        _ => "unknown",
    };
    let size = if matches!(step, "put") { format!(" {}", request.body.len()) } else { String::new() };
    state.log.push(format!("{step}{size}"));
    if state.trouble.as_ref().is_some_and(|(at, _)| *at == step) {
        return (step, Ok(ok(&json!({}))));
    }
    (step, done(step, request, state, bundle, address))
}

fn done(
    step: &str,
    request: &Request,
    state: &mut State,
    bundle: &Path,
    address: &str,
) -> Result<Answer, String> {
    let body =
        || -> Result<Value, String> { serde_json::from_slice(&request.body).map_err(|e| e.to_string()) };
    let kind = request.header("content-type");
    // The token is for the hub alone.
    match step {
        "put" | "complete" => same("authorization", request.header("authorization"), "")?,
        _ => same("authorization", request.header("authorization"), &format!("Bearer {TOKEN}"))?,
    }
    match step {
        "create" => {
            same("content-type", kind, "application/json")?;
            let body = body()?;
            let mut wanted = json!({ "name": "draft", "organization": "org", "type": "model" });
            if body["private"] == true {
                wanted["private"] = true.into();
            }
            same("body", &body.to_string(), &wanted.to_string())?;
            let said = |status, text: &str| {
                Ok((status, String::new(), json!({ "error": text }).to_string().into_bytes()))
            };
            match state.repo {
                _ if state.may_not_create => said("403 Forbidden", "this token may not create"),
                Some(_) => said("409 Conflict", "You already created this model repo"),
                None => {
                    state.repo = Some(body["private"] == true);
                    Ok(ok(&json!({ "url": format!("{address}/org/draft") })))
                }
            }
        }
        "show" => match state.repo {
            Some(private) => Ok(ok(&json!({ "id": "org/draft", "private": private }))),
            None => Ok(("404 Not Found", String::new(), Vec::new())),
        },
        "preupload" => {
            same("content-type", kind, "application/json")?;
            let mut files = Vec::new();
            for file in body()?["files"].as_array().ok_or("no files")? {
                let path = file["path"].as_str().ok_or("no path")?;
                let bytes = std::fs::read(bundle.join(path)).map_err(|e| format!("{path}: {e}"))?;
                same("size", &file["size"].to_string(), &bytes.len().to_string())?;
                let sample = unbase64(file["sample"].as_str().ok_or("no sample")?)?;
                if sample != bytes[..bytes.len().min(512)] {
                    return Err(format!("the sample of {path} is not its beginning"));
                }
                let there = state.files.get(path);
                files.push(json!({
                    "path": path,
                    "uploadMode": if is_large(path) { "lfs" } else { "regular" },
                    "shouldIgnore": state.ignored == Some(path),
                    "oid": there.map(|bytes| if is_large(path) { sha256_hex(bytes) } else { git_blob_id(bytes) }),
                }));
            }
            Ok(ok(&json!({ "files": files })))
        }
        "batch" => {
            same("content-type", kind, "application/vnd.git-lfs+json")?;
            same("accept", request.header("accept"), "application/vnd.git-lfs+json")?;
            let body = body()?;
            let objects = body["objects"].clone();
            let wanted = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": objects,
                "hash_algo": "sha256",
                "ref": { "name": "main" },
            });
            same("body", &body.to_string(), &wanted.to_string())?;
            let mut answers = Vec::new();
            for object in objects.as_array().ok_or("no objects")? {
                let (oid, size) =
                    (object["oid"].as_str().ok_or("no oid")?, object["size"].as_u64().ok_or("no size")?);
                let mut answer = json!({ "oid": oid, "size": size });
                // What was never verified may be anything.
                if !state.verified.iter().any(|verified| verified == oid) {
                    let (href, mut header) = (format!("{address}/store/{oid}"), json!({}));
                    if let Some(piece) = state.piece {
                        header["chunk_size"] = piece.to_string().into();
                        for part in 1..=(size as usize).div_ceil(piece) {
                            header[format!("{part:05}")] = format!("{href}/{part}").into();
                        }
                    }
                    // A hub behind another address may call itself by its own.
                    let verify = "https://huggingface.co/verify";
                    answer["actions"] = json!({
                        "upload": { "href": href, "header": header },
                        "verify": { "href": verify, "header": { "Authorization": "Basic xyz" } },
                    });
                }
                answers.push(answer);
            }
            Ok(ok(&json!({ "transfer": "basic", "objects": answers })))
        }
        "put" => {
            same("content-length", request.header("content-length"), &request.body.len().to_string())?;
            same("transfer-encoding", request.header("transfer-encoding"), "")?;
            let place = request.path().trim_start_matches("/store/");
            match place.split_once('/') {
                Some((oid, part)) => {
                    let part: usize = part.parse().map_err(|_| "no part")?;
                    state.parts.entry(oid.to_string()).or_default().insert(part, request.body.clone());
                    Ok(("200 OK", format!("ETag: \"etag-{part}\"\r\n"), Vec::new()))
                }
                None => {
                    same("sha256", &sha256_hex(&request.body), place)?;
                    state.store.insert(place.to_string(), request.body.clone());
                    Ok(("200 OK", String::new(), Vec::new()))
                }
            }
        }
        "complete" => {
            let oid = request.path().trim_start_matches("/store/").to_string();
            same("content-type", kind, "application/vnd.git-lfs+json")?;
            let parts = state.parts.remove(&oid).ok_or("no part came")?;
            let tags: Vec<Value> = parts
                .keys()
                .map(|part| json!({ "partNumber": part, "etag": format!("\"etag-{part}\"") }))
                .collect();
            same("body", &body()?.to_string(), &json!({ "oid": oid, "parts": tags }).to_string())?;
            let bytes: Vec<u8> = parts.into_values().flatten().collect();
            same("sha256", &sha256_hex(&bytes), &oid)?;
            state.store.insert(oid, bytes);
            Ok(ok(&json!({})))
        }
        "verify" => {
            let body = body()?;
            let oid = body["oid"].as_str().ok_or("no oid")?;
            let bytes = state.store.get(oid).ok_or("it did not come")?;
            same("size", &body["size"].to_string(), &bytes.len().to_string())?;
            state.verified.push(oid.to_string());
            Ok(ok(&json!({})))
        }
        "commit" => {
            same("content-type", kind, "application/x-ndjson")?;
            let text = String::from_utf8(request.body.clone()).map_err(|e| e.to_string())?;
            if !text.ends_with('\n') {
                return Err("the last line does not end".to_string());
            }
            let mut files = state.files.clone();
            for (i, line) in text.lines().enumerate() {
                let line: Value = serde_json::from_str(line).map_err(|e| format!("line {i}: {e}"))?;
                let value = &line["value"];
                let path = value["path"].as_str().unwrap_or_default().to_string();
                match line["key"].as_str() {
                    Some("header") if i == 0 => {
                        state.summary = value["summary"].as_str().ok_or("no summary")?.to_string();
                    }
                    Some("lfsFile") if i > 0 => {
                        same("algo", value["algo"].as_str().unwrap_or_default(), "sha256")?;
                        let oid = value["oid"].as_str().ok_or("no oid")?;
                        let bytes =
                            state.store.get(oid).ok_or_else(|| format!("{path} is not in the store"))?;
                        if !is_large(&path) || !state.verified.iter().any(|o| o == oid) {
                            return Err(format!("{path} is not large, or was not verified"));
                        }
                        same("size", &value["size"].to_string(), &bytes.len().to_string())?;
                        files.insert(path, bytes.clone());
                    }
                    Some("file") if i > 0 && !is_large(&path) => {
                        same("encoding", value["encoding"].as_str().unwrap_or_default(), "base64")?;
                        files.insert(path, unbase64(value["content"].as_str().ok_or("no content")?)?);
                    }
                    other => return Err(format!("line {i} is {other:?} for `{path}`")),
                }
            }
            if files == state.files {
                return Err("the commit is empty".to_string());
            }
            (state.files, state.commits) = (files, state.commits + 1);
            let oid = commit_of(state.commits);
            Ok(ok(&json!({
                "success": true, "commitOid": oid, "commitUrl": format!("{address}/org/draft/commit/{oid}"),
            })))
        }
        "revision" => {
            let siblings: Vec<Value> = state.files.keys().map(|path| json!({ "rfilename": path })).collect();
            Ok(ok(&json!({ "sha": commit_of(state.commits), "siblings": siblings })))
        }
        "file" => {
            let path = request.path().trim_start_matches("/org/draft/resolve/main/");
            let Some(bytes) = state.files.get(path) else {
                return Ok(("404 Not Found", String::new(), Vec::new()));
            };
            let tag = if is_large(path) { sha256_hex(bytes) } else { git_blob_id(bytes) };
            let headers = format!("X-Repo-Commit: {}\r\nETag: \"{tag}\"\r\n", commit_of(state.commits));
            Ok(("200 OK", headers, bytes.clone()))
        }
        _ => Err(format!("`{}` is unknown", request.line)),
    }
}
