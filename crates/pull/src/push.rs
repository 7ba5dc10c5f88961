//! `push`: a bundle becomes a commit in a repository of a model hub.
//!
//! ```text
//! POST /api/repos/create                      409: it is there already
//! POST /api/models/REPO/preupload/REVISION    how each file goes (`regular`, `lfs`), and what is there of it
//! POST /REPO.git/info/lfs/objects/batch       where large files go; those that the hub has need not go anywhere
//! PUT  …                                      the bytes, in one piece or in parts
//! POST …                                      verify
//! POST /api/models/REPO/commit/REVISION       one line per file; small ones carry their content
//! ```
//! A repository shows either all of a bundle or nothing of it: there is one commit, and it comes last. Before the first
//! request every file is compared with what the bundle lists. The token goes to the hub alone, never to the store that it
//! hands large files to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::bundle_files::{FileEntry, MANIFEST_FILE};
use draftsmith_formats::hash::{sha256_file, sha256_hex};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use crate::encodings::{base64, git_blob_id};
use crate::http::{agent, encode, text};
use crate::places::Places;
use crate::push_error::PushError;

/// Files and objects per question.
const CHUNK: usize = 256;
/// Bytes of a file's beginning by which the hub judges how it goes.
const SAMPLE: usize = 512;
/// The address that a hub behind another one may still name.
const HUB: &str = "https://huggingface.co";
/// What the LFS protocol's questions and answers are.
const LFS: &str = "application/vnd.git-lfs+json";
/// Most of an answer that is read.
const ANSWER_MAX: u64 = 16 << 20;

/// What goes where.
#[derive(Clone, Copy, Debug)]
pub struct PushOptions<'a> {
    /// The folder of the bundle.
    pub folder: &'a Path,
    /// Every file that its manifest lists.
    pub files: &'a [FileEntry],
    /// `ORG/NAME`.
    pub repo: &'a str,
    /// Branch.
    pub revision: &'a str,
    /// A repository that is made is for its owners only.
    pub private: bool,
    /// First line of the commit.
    pub summary: &'a str,
}

/// A file on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushFile {
    /// Path inside bundle and repository.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Hash.
    pub sha256: String,
}

/// What a push would send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushPlan {
    /// Where the repository is shown.
    pub url: String,
    /// Branch.
    pub revision: String,
    /// A repository that is made is for its owners only.
    pub private: bool,
    /// Every file, `bundle.json` last.
    pub files: Vec<PushFile>,
    /// Their size.
    pub bytes: u64,
}

/// What a push did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pushed {
    /// Where the repository is shown.
    pub url: String,
    /// The commit that holds the bundle, if the hub says it.
    pub commit: Option<String>,
    /// True if the repository was made.
    pub created: bool,
    /// Large files whose bytes were sent.
    pub uploaded: Vec<String>,
    /// Files of the commit.
    pub committed: Vec<String>,
    /// Files that the repository had as they are.
    pub unchanged: Vec<String>,
    /// Bytes of the large files that were sent.
    pub bytes_sent: u64,
}

/// Reads a bundle and says what would be sent. Asks nobody.
///
/// # Errors
/// [`PushError::WrongFile`]: a file that is not what the bundle lists.
pub fn push_plan(places: &Places, options: &PushOptions<'_>) -> Result<PushPlan, PushError> {
    let mut files = Vec::with_capacity(options.files.len() + 1);
    for entry in options.files {
        let path = options.folder.join(&entry.path);
        let wrong = |problem: String| PushError::WrongFile { path: path.clone(), problem };
        if !crate::reference::is_inner_path(&entry.path) || entry.path == MANIFEST_FILE {
            return Err(wrong("is listed, but is no path inside the bundle".to_string()));
        }
        let Ok(meta) = std::fs::metadata(&path) else {
            return Err(wrong("is listed in `bundle.json`, but not there".to_string()));
        };
        if meta.len() != entry.bytes {
            let problem = format!("has {} bytes, but `bundle.json` lists {}", meta.len(), entry.bytes);
            return Err(wrong(problem));
        }
        let sha256 = sha256_file(&path)?;
        if sha256 != entry.sha256 {
            return Err(wrong(format!("has sha256 `{sha256}`, but `bundle.json` lists `{}`", entry.sha256)));
        }
        files.push(PushFile { path: entry.path.clone(), bytes: entry.bytes, sha256 });
    }
    let manifest = atomic::read(options.folder.join(MANIFEST_FILE))?;
    let (bytes, sha256) = (manifest.len() as u64, sha256_hex(&manifest));
    files.push(PushFile { path: MANIFEST_FILE.to_string(), bytes, sha256 });
    Ok(PushPlan {
        url: format!("{}/{}", places.hf_endpoint, options.repo),
        revision: options.revision.to_string(),
        private: options.private,
        bytes: files.iter().map(|file| file.bytes).sum(),
        files,
    })
}

/// Puts a bundle into a repository, which is made if it is not there.
///
/// # Errors
/// [`PushError`]; what it names was not done, and nothing was committed unless it says that it does not know.
pub fn push(
    places: &Places,
    options: &PushOptions<'_>,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Pushed, PushError> {
    let endpoint = places.hf_endpoint.as_str();
    let plan = push_plan(places, options)?;
    if places.offline {
        return Err(PushError::Offline);
    }
    let Some(token) = places.hf_token.as_deref() else {
        return Err(PushError::NoToken { endpoint: endpoint.to_string() });
    };
    let hub = Hub { endpoint, token, options, report, stop, agent: agent(0) };
    let created = hub.create()?;
    let ways = hub.preupload(&plan.files)?;
    let is_there = |file: &&PushFile| hub.is_there(file, &ways);
    let mut unchanged = Vec::new();
    let mut changed: Vec<&PushFile> = Vec::new();
    for file in &plan.files {
        match is_there(&file)? {
            true => unchanged.push(file.path.clone()),
            false => changed.push(file),
        }
    }
    let (large, small): (Vec<&PushFile>, Vec<&PushFile>) =
        changed.iter().partition(|file| ways.get(&file.path).is_some_and(|way| way.is_large));
    let uploaded = hub.upload(&large)?;
    let bytes_sent = uploaded.iter().map(|file| file.bytes).sum();
    let commit = match changed.is_empty() {
        true => hub.latest()?,
        false => Some(hub.commit(&large, &small)?),
    };
    Ok(Pushed {
        url: plan.url,
        commit,
        created,
        uploaded: uploaded.into_iter().map(|file| file.path.clone()).collect(),
        committed: changed.into_iter().map(|file| file.path.clone()).collect(),
        unchanged,
        bytes_sent,
    })
}

/// How a file goes.
struct Way {
    /// To the store of large files, in place of the commit.
    is_large: bool,
    /// What the repository holds under this path.
    there: Option<String>,
}

/// Where an object of the LFS protocol goes.
#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    actions: Option<Actions>,
    error: Option<Value>,
}

struct Hub<'a> {
    endpoint: &'a str,
    token: &'a str,
    options: &'a PushOptions<'a>,
    report: &'a dyn Report,
    stop: &'a Stop,
    /// Never follows a redirect: a body would be sent twice, or a token elsewhere.
    agent: Agent,
}

impl Hub<'_> {
    fn check_stop(&self) -> Result<(), PushError> {
        match self.stop.requested() {
            true => Err(PushError::Interrupted { repo: self.options.repo.to_string() }),
            false => Ok(()),
        }
    }

    fn failed(&self, step: &str, url: &str, error: &ureq::Error) -> PushError {
        if let Err(interrupted) = self.check_stop() {
            return interrupted;
        }
        let host = url.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        PushError::Unreachable { host, step: step.to_string(), reason: error.to_string() }
    }

    fn bad(&self, step: &str, reason: impl Into<String>) -> PushError {
        PushError::BadAnswer { step: step.to_string(), reason: reason.into() }
    }

    /// An answer of 2xx, or what the server says against it.
    fn accepted(&self, step: &str, mut answer: Response<Body>) -> Result<Response<Body>, PushError> {
        let status = answer.status().as_u16();
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let mut said = text(answer.headers(), "x-error-message").unwrap_or_default();
        if let Some(place) = text(answer.headers(), "location").filter(|_| (300..400).contains(&status)) {
            said = format!("it has moved to `{place}`");
        }
        if said.is_empty() {
            let body = answer.body_mut().with_config().limit(1 << 16).read_to_vec().unwrap_or_default();
            let error = serde_json::from_slice::<Value>(&body).unwrap_or_default();
            said = match &error["error"] {
                Value::String(text) => text.clone(),
                _ => error["message"].as_str().unwrap_or_default().to_string(),
            };
        }
        said = said.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect();
        Err(PushError::Status {
            status,
            step: step.to_string(),
            said,
            repo: self.options.repo.to_string(),
            endpoint: self.endpoint.to_string(),
        })
    }

    /// A question to the hub itself.
    fn post(&self, step: &str, url: &str, kind: &str, body: &[u8]) -> Result<Response<Body>, PushError> {
        self.check_stop()?;
        let mut request = self.agent.post(url).header("Content-Type", kind);
        if kind == LFS {
            request = request.header("Accept", LFS);
        }
        if self.is_hub(url) {
            request = request.header("Authorization", format!("Bearer {}", self.token));
        }
        let answer = request.send(body).map_err(|e| self.failed(step, url, &e))?;
        self.accepted(step, answer)
    }

    fn is_hub(&self, url: &str) -> bool {
        url.strip_prefix(self.endpoint).is_some_and(|rest| rest.starts_with('/'))
    }

    fn read<T: for<'de> Deserialize<'de>>(
        &self,
        step: &str,
        mut answer: Response<Body>,
    ) -> Result<T, PushError> {
        let bytes = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_vec();
        let bytes = bytes.map_err(|e| self.failed(step, self.endpoint, &e))?;
        serde_json::from_slice(&bytes).map_err(|e| self.bad(step, e.to_string()))
    }

    fn api(&self, what: &str) -> String {
        let Self { endpoint, options, .. } = self;
        format!("{endpoint}/api/models/{}/{what}/{}", options.repo, encode(options.revision, false))
    }

    /// What the hub says about the repository.
    fn ask(&self, step: &str, url: &str) -> Result<Value, PushError> {
        self.check_stop()?;
        let request = self.agent.get(url).header("Authorization", format!("Bearer {}", self.token));
        let answer = request.call().map_err(|e| self.failed(step, url, &e))?;
        self.read(step, self.accepted(step, answer)?)
    }

    /// True if the repository was made, false if it was there. What is to be private is seen to be before anything is sent.
    fn create(&self) -> Result<bool, PushError> {
        let step = format!("create the repository `{}`", self.options.repo);
        let (organization, name) = self.options.repo.split_once('/').unwrap_or(("", self.options.repo));
        let mut wanted = json!({ "name": name, "organization": organization, "type": "model" });
        if self.options.private {
            wanted["private"] = true.into();
        }
        let url = format!("{}/api/repos/create", self.endpoint);
        let refused = match self.post(&step, &url, "application/json", wanted.to_string().as_bytes()) {
            Ok(_) => None,
            // It is there; or the token may write to it, but make none.
            Err(error @ PushError::Status { status: 403 | 409, .. }) => Some(error),
            Err(error) => return Err(error),
        };
        let is_new = refused.is_none();
        let is_forbidden = matches!(refused, Some(PushError::Status { status: 403, .. }));
        if is_forbidden || self.options.private {
            let url = format!("{}/api/models/{}", self.endpoint, self.options.repo);
            let found = match (self.ask("show the repository", &url), refused) {
                (Ok(found), _) => found,
                (Err(PushError::Status { .. }), Some(error)) if is_forbidden => return Err(error),
                (Err(other), _) => return Err(other),
            };
            if self.options.private && found["private"] != true {
                return Err(PushError::NotPrivate { repo: self.options.repo.to_string() });
            }
        }
        Ok(is_new)
    }

    fn preupload(&self, files: &[PushFile]) -> Result<BTreeMap<String, Way>, PushError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Told {
            path: String,
            upload_mode: String,
            #[serde(default)]
            should_ignore: bool,
            #[serde(default)]
            oid: Option<String>,
        }
        #[derive(Deserialize)]
        struct Answer {
            files: Vec<Told>,
        }
        let step = "say how the files are to be sent";
        let mut ways = BTreeMap::new();
        for chunk in files.chunks(CHUNK) {
            let mut listed = Vec::with_capacity(chunk.len());
            for file in chunk {
                let mut sample = Vec::new();
                let mut start = self.open(&file.path)?.take(SAMPLE as u64);
                start.read_to_end(&mut sample).map_err(|e| self.unreadable(&file.path, e))?;
                listed.push(json!({ "path": file.path, "sample": base64(&sample), "size": file.bytes }));
            }
            let body = json!({ "files": listed }).to_string();
            let answer = self.post(step, &self.api("preupload"), "application/json", body.as_bytes())?;
            for told in self.read::<Answer>(step, answer)?.files {
                if told.should_ignore {
                    let repo = self.options.repo.to_string();
                    return Err(PushError::Ignored { repo, path: told.path });
                }
                let is_large = match told.upload_mode.as_str() {
                    "lfs" => true,
                    "regular" => false,
                    other => return Err(self.bad(step, format!("`{other}` is no way for `{}`", told.path))),
                };
                ways.insert(told.path, Way { is_large, there: told.oid });
            }
        }
        for file in files {
            match ways.get_mut(&file.path) {
                // The store of large files takes no empty one.
                Some(way) if file.bytes == 0 => way.is_large = false,
                Some(_) => {}
                None => return Err(self.bad(step, format!("nothing is said about `{}`", file.path))),
            }
        }
        Ok(ways)
    }

    /// True if the repository holds a file as it is.
    fn is_there(&self, file: &PushFile, ways: &BTreeMap<String, Way>) -> Result<bool, PushError> {
        let Some(Way { is_large, there: Some(there) }) = ways.get(&file.path) else { return Ok(false) };
        Ok(match is_large {
            true => *there == file.sha256,
            false => *there == git_blob_id(&self.content(&file.path)?),
        })
    }

    fn open(&self, path: &str) -> Result<File, PushError> {
        File::open(self.options.folder.join(path)).map_err(|e| self.unreadable(path, e))
    }

    fn unreadable(&self, path: &str, source: std::io::Error) -> PushError {
        AtomicError::from_io("read", &self.options.folder.join(path), source).into()
    }

    fn content(&self, path: &str) -> Result<Vec<u8>, PushError> {
        Ok(atomic::read(self.options.folder.join(path))?)
    }

    /// Sends the large files that the hub does not have; gives those.
    fn upload<'f>(&self, large: &[&'f PushFile]) -> Result<Vec<&'f PushFile>, PushError> {
        #[derive(Deserialize)]
        struct Answer {
            objects: Vec<Object>,
        }
        let step = "say where large files are to be sent";
        let mut sent = Vec::new();
        let mut seen = BTreeSet::new();
        // Files of the same content are one object.
        let objects: Vec<&'f PushFile> =
            large.iter().copied().filter(|file| seen.insert(file.sha256.as_str())).collect();
        for chunk in objects.chunks(CHUNK) {
            let listed: Vec<Value> =
                chunk.iter().map(|file| json!({ "oid": file.sha256, "size": file.bytes })).collect();
            let body = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": listed,
                "hash_algo": "sha256",
                "ref": { "name": self.options.revision },
            });
            let url = format!("{}/{}.git/info/lfs/objects/batch", self.endpoint, self.options.repo);
            let answer = self.post(step, &url, LFS, body.to_string().as_bytes())?;
            let mut answered = self.read::<Answer>(step, answer)?.objects;
            for file in chunk {
                let Some(at) = answered.iter().position(|object| object.oid == file.sha256) else {
                    return Err(self.bad(step, format!("nothing is said about `{}`", file.path)));
                };
                let object = answered.swap_remove(at);
                if let Some(error) = object.error {
                    let said = error["message"].as_str().unwrap_or("it does not say why").to_string();
                    return Err(PushError::Refused { path: file.path.clone(), said });
                }
                // Without actions the store has it.
                let Some(Actions { upload: Some(upload), verify }) = object.actions else { continue };
                self.send(file, &upload)?;
                if let Some(verify) = verify {
                    self.verify(file, &verify)?;
                }
                sent.push(*file);
            }
        }
        Ok(sent)
    }

    /// Sends the bytes of one file, in as many pieces as the hub wants.
    fn send(&self, file: &PushFile, upload: &Action) -> Result<(), PushError> {
        let step = format!("take `{}`", file.path);
        let nothing = BTreeMap::new();
        let header = upload.header.as_ref().unwrap_or(&nothing);
        let href = self.own(&upload.href);
        self.report.begin(&format!("push {}", file.path), Some(file.bytes), Unit::Bytes);
        let Some(chunk) = header.get("chunk_size") else {
            let more = header.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)));
            self.put(&step, file, &href, 0..file.bytes, more)?;
            self.report.end();
            return Ok(());
        };
        let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok()).filter(|bytes| *bytes > 0);
        let chunk = chunk.ok_or_else(|| self.bad(&step, "`chunk_size` is no number of bytes"))?;
        let number = |name: &String| {
            name.bytes().all(|b| b.is_ascii_digit()).then(|| name.parse::<u64>().ok()).flatten()
        };
        let mut parts: Vec<(u64, &str)> =
            header.iter().filter_map(|(name, url)| Some((number(name)?, url.as_str()?))).collect();
        parts.sort_unstable();
        if parts.len() as u64 != file.bytes.div_ceil(chunk) {
            let reason = format!("it gives {} places for pieces of {chunk} bytes", parts.len());
            return Err(self.bad(&step, reason));
        }
        let mut done = Vec::with_capacity(parts.len());
        for (i, (_, url)) in parts.iter().enumerate() {
            let from = i as u64 * chunk;
            let range = from..(from + chunk).min(file.bytes);
            let answer = self.put(&step, file, &self.own(url), range, std::iter::empty())?;
            let etag = text(answer.headers(), "etag").filter(|etag| !etag.is_empty());
            let etag = etag.ok_or_else(|| self.bad(&step, format!("piece {} has no `ETag`", i + 1)))?;
            done.push(json!({ "partNumber": i + 1, "etag": etag }));
        }
        self.report.end();
        let body = json!({ "oid": file.sha256, "parts": done }).to_string();
        self.check_stop()?;
        let request = self.agent.post(&href).header("Content-Type", LFS).header("Accept", LFS);
        let answer = request.send(body.as_bytes()).map_err(|e| self.failed(&step, &href, &e))?;
        self.accepted(&step, answer).map(drop)
    }

    /// Sends a range of a file. The address carries its own permission.
    fn put<'h>(
        &self,
        step: &str,
        file: &PushFile,
        url: &str,
        range: std::ops::Range<u64>,
        headers: impl Iterator<Item = (&'h str, &'h str)>,
    ) -> Result<Response<Body>, PushError> {
        self.check_stop()?;
        let mut bytes = self.open(&file.path)?;
        bytes.seek(SeekFrom::Start(range.start)).map_err(|e| self.unreadable(&file.path, e))?;
        let length = range.end - range.start;
        let mut body = Watched { bytes: bytes.take(length), at: range.start, hub: self };
        let mut request = self.agent.put(url).header("Content-Length", length.to_string());
        for (name, value) in headers.filter(|(name, _)| !name.eq_ignore_ascii_case("content-length")) {
            request = request.header(name, value);
        }
        let answer =
            request.send(SendBody::from_reader(&mut body)).map_err(|e| self.failed(step, url, &e))?;
        self.accepted(step, answer)
    }

    /// Has the hub look whether all of a file came.
    fn verify(&self, file: &PushFile, action: &Action) -> Result<(), PushError> {
        let step = format!("verify `{}`", file.path);
        let body = json!({ "oid": file.sha256, "size": file.bytes }).to_string();
        self.post(&step, &self.own(&action.href), "application/json", body.as_bytes()).map(drop)
    }

    /// An address of the hub under the one that it is reached by here.
    fn own(&self, href: &str) -> String {
        match href.strip_prefix(HUB).filter(|rest| rest.starts_with('/')) {
            Some(rest) => format!("{}{rest}", self.endpoint),
            None => href.to_string(),
        }
    }

    /// The commit that the branch points at.
    fn latest(&self) -> Result<Option<String>, PushError> {
        let found = self.ask("show the repository", &self.api("revision"))?;
        Ok(found["sha"].as_str().map(str::to_string))
    }

    fn commit(&self, large: &[&PushFile], small: &[&PushFile]) -> Result<String, PushError> {
        let step = "commit";
        let mut body = String::new();
        let mut line = |key: &str, value: Value| {
            body.push_str(&json!({ "key": key, "value": value }).to_string());
            body.push('\n');
        };
        line("header", json!({ "summary": self.options.summary, "description": "" }));
        for file in large {
            let value =
                json!({ "path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.bytes });
            line("lfsFile", value);
        }
        for file in small {
            let content = self.content(&file.path)?;
            if sha256_hex(&content) != file.sha256 {
                let path = self.options.folder.join(&file.path);
                return Err(PushError::WrongFile {
                    path,
                    problem: "changed while it was pushed".to_string(),
                });
            }
            line("file", json!({ "path": file.path, "content": base64(&content), "encoding": "base64" }));
        }
        let answer = self.post(step, &self.api("commit"), "application/x-ndjson", body.as_bytes())?;
        let told: Value = self.read(step, answer)?;
        match (told["commitOid"].as_str(), &told["success"]) {
            (Some(commit), success) if *success != false => Ok(commit.to_string()),
            _ => Err(self.bad(step, "it names no commit")),
        }
    }
}

/// Part of a file that is being sent: shows how far it is, and ends when the user wants it to.
struct Watched<'a> {
    bytes: std::io::Take<File>,
    at: u64,
    hub: &'a Hub<'a>,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.hub.stop.requested() {
            return Err(std::io::Error::other("interrupted"));
        }
        let count = self.bytes.read(buffer)?;
        self.at += count as u64;
        self.hub.report.at(self.at);
        Ok(count)
    }
}
