//! `hf:`: files of a model hub, in the cache layout that every tool of that hub shares.
//!
//! ```text
//! models--ORG--NAME/refs/REVISION        commit that a branch or tag pointed at
//! models--ORG--NAME/blobs/ETAG           the bytes; `ETAG.incomplete` while they come
//! models--ORG--NAME/snapshots/COMMIT/F   relative link into blobs
//! ```
//! A repository with a bundle gives the files that its `bundle.json` lists, each checked by size and hash; any other its
//! weights and text files. A blob whose name is a sha256 (large files) is checked against it before it gets its name. A download that
//! stopped goes on from where it was, by a range request.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use draftsmith_core::report::Unit;
use draftsmith_formats::atomic::{self, AtomicError};
use draftsmith_formats::bundle_files::{FileEntry, MANIFEST_FILE, listed_files};
use draftsmith_formats::gguf::{self, SplitName};
use draftsmith_formats::hash;
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use crate::error::PullError;
use crate::found::{Context, Pulled, check_hash, folder, model, open_partial};
use crate::http::{agent, encode, text};
use crate::reference::{Reference, is_inner_path};

/// One file as the hub describes it.
struct Remote {
    commit: String,
    etag: String,
    size: Option<u64>,
}

struct Repo<'a> {
    context: &'a Context<'a>,
    reference: &'a Reference,
    repo: &'a str,
    revision: &'a str,
    /// A repository without a bundle is of no use.
    only_bundle: bool,
    root: PathBuf,
    /// Never follows a redirect: the headers of the first answer describe the file.
    head: Agent,
    get: Agent,
}

impl<'a> Repo<'a> {
    fn new(context: &'a Context<'a>, reference: &'a Reference, repo: &'a str, revision: &'a str) -> Repo<'a> {
        Repo {
            context,
            reference,
            repo,
            revision,
            only_bundle: false,
            root: context.places.hf_cache.join(format!("models--{}", repo.replace('/', "--"))),
            head: agent(0),
            get: agent(10),
        }
    }
}

/// A repository that holds a bundle; of any other nothing but its list is fetched.
pub(super) fn pull_bundle(
    context: &Context<'_>,
    reference: &Reference,
    repo: &str,
    revision: &str,
) -> Result<Pulled, PullError> {
    Repo { only_bundle: true, ..Repo::new(context, reference, repo, revision) }.all()
}

pub(super) fn pull(
    context: &Context<'_>,
    reference: &Reference,
    repo: &str,
    revision: &str,
    file: Option<&str>,
    sha256: Option<&str>,
) -> Result<Pulled, PullError> {
    let repo = Repo::new(context, reference, repo, revision);
    match file {
        Some(file) => match SplitName::parse(file).filter(|name| name.count > 1) {
            Some(name) => repo.split(&name, sha256),
            None => repo.one(file, sha256),
        },
        None if sha256.is_some() => Err(PullError::HashOfFolder { reference: reference.to_string() }),
        None => repo.all(),
    }
}

impl Repo<'_> {
    fn name(&self) -> String {
        self.reference.to_string()
    }

    /// The commit that the cache knows for the revision.
    fn cached_commit(&self) -> Option<String> {
        if is_commit(self.revision) {
            return Some(self.revision.to_string());
        }
        let text = fs::read_to_string(self.root.join("refs").join(self.revision)).ok()?;
        let commit = text.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    fn cached_file(&self, file: &str) -> Option<PathBuf> {
        let path = self.root.join("snapshots").join(self.cached_commit()?).join(file);
        path.is_file().then_some(path)
    }

    fn done(&self, path: PathBuf, sha256: Option<&str>, cached: bool) -> Result<Pulled, PullError> {
        let found = self.context.places.hash_records().sha256_file(&path)?;
        check_hash(self.reference, &found, sha256)?;
        let bytes = fs::metadata(&path).map_err(|e| AtomicError::from_io("read", &path, e))?.len();
        Ok(Pulled { path, reference: self.name(), sha256: Some(found), bytes, cached })
    }

    fn one(&self, file: &str, sha256: Option<&str>) -> Result<Pulled, PullError> {
        // What is pinned (by commit or by hash) and here needs no network.
        if let Some(path) = self.cached_file(file) {
            let pinned = is_commit(self.revision) || sha256.is_some();
            if pinned || self.context.places.offline {
                match self.done(path, sha256, true) {
                    Err(PullError::WrongHash { .. }) if !self.context.places.offline => {}
                    answer => return answer,
                }
            }
        }
        if self.context.places.offline {
            return Err(PullError::Offline { reference: self.name(), looked_in: self.root.clone() });
        }
        let (path, cached) = match self.fetch(file, sha256) {
            Ok(found) => found,
            // No connection, but an earlier answer is here: that is what the cache is for.
            Err(PullError::Unreachable { reason, .. }) if self.cached_file(file).is_some() => {
                self.context.report.note(&format!("using the cached copy of {}: {reason}", self.name()));
                (self.cached_file(file).expect("checked by the guard"), true)
            }
            Err(error) => return Err(error),
        };
        self.done(path, sha256, cached)
    }

    /// All parts of a split: each is fetched as a file of its own, the hash is that of the whole.
    fn split(&self, name: &SplitName, sha256: Option<&str>) -> Result<Pulled, PullError> {
        let parts: Vec<Pulled> =
            name.parts().map(|part| self.one(&part, None)).collect::<Result<_, PullError>>()?;
        let path = parts.first().map(|part| part.path.clone()).unwrap_or_default();
        let cached = parts.iter().all(|part| part.cached);
        if gguf::parts_of(&path)?.len() != parts.len() {
            // By its name a part, by its own words whole.
            return model(self.reference, &path, sha256, cached, &self.context.places.hash_records());
        }
        // Each was hashed when it came.
        let hashes: Vec<String> = parts.iter().filter_map(|part| part.sha256.clone()).collect();
        let found = gguf::joined_sha256(&hashes);
        check_hash(self.reference, &found, sha256)?;
        let bytes = parts.iter().map(|part| part.bytes).sum();
        Ok(Pulled { path, reference: self.name(), sha256: Some(found), bytes, cached })
    }

    /// Weights and text files of the repository's top folder.
    fn all(&self) -> Result<Pulled, PullError> {
        // A bundle that is pinned and whole needs no network; whatever lacks a file needs it.
        if is_commit(self.revision) || self.context.places.offline {
            match self.cached_bundle()? {
                Some(Ok(pulled)) => return Ok(pulled),
                Some(Err(problem)) if self.context.places.offline => return Err(problem),
                Some(Err(_)) | None => {}
            }
        }
        let offline = |repo: &Self| {
            let snapshot = repo.root.join("snapshots").join(repo.cached_commit()?);
            let whole = !matches!(repo.cached_bundle(), Ok(Some(Err(_))) | Err(_));
            let wanted = if repo.only_bundle { MANIFEST_FILE } else { "config.json" };
            (whole && snapshot.join(wanted).is_file()).then_some(snapshot)
        };
        if self.context.places.offline {
            let alone = || {
                let snapshot = self.root.join("snapshots").join(self.cached_commit()?);
                gguf::only_model(&snapshot).ok().flatten()
            };
            return match (offline(self), alone()) {
                (None, _) if self.only_bundle => {
                    Err(PullError::Offline { reference: self.name(), looked_in: self.root.clone() })
                }
                (Some(path), _) => Ok(folder(self.reference, path, true)),
                (None, Some(file)) => {
                    model(self.reference, &file, None, true, &self.context.places.hash_records())
                }
                (None, None) => {
                    Err(PullError::Offline { reference: self.name(), looked_in: self.root.clone() })
                }
            };
        }
        let (commit, files) = match self.list() {
            Ok(list) => list,
            Err(PullError::Unreachable { reason, .. }) if offline(self).is_some() => {
                self.context.report.note(&format!("using the cached copy of {}: {reason}", self.name()));
                return Ok(folder(self.reference, offline(self).expect("checked by the guard"), true));
            }
            Err(error) => return Err(error),
        };
        if files.iter().any(|file| file == MANIFEST_FILE)
            && let Some(pulled) = self.bundle(&commit)?
        {
            return Ok(pulled);
        }
        if self.only_bundle {
            return Err(PullError::NoBundle { reference: self.name() });
        }
        let wanted: Vec<&String> = files
            .iter()
            .filter(|f| !f.contains('/'))
            .filter(|f| {
                [".safetensors", ".json", ".jinja"].iter().any(|end| f.ends_with(end))
                    || *f == "tokenizer.model"
            })
            .collect();
        if !wanted.iter().any(|f| f.ends_with(".safetensors")) {
            // Every part of a split stands for the first.
            let first =
                |file: &String| SplitName::parse(file).map_or_else(|| file.clone(), |name| name.part(1));
            let mut models: Vec<String> = files.iter().filter(|f| f.ends_with(".gguf")).map(first).collect();
            models.sort();
            models.dedup();
            let reason = match models.as_slice() {
                [only] if !only.contains('/') => {
                    return match SplitName::parse(only).filter(|name| name.count > 1) {
                        Some(name) => self.split(&name, None),
                        None => self.one(only, None),
                    };
                }
                [file, ..] => format!("it holds no safetensors files; name one file, for example `:{file}`"),
                [] => "it holds no safetensors files".to_string(),
            };
            return Err(PullError::BadAnswer { reference: self.name(), reason });
        }
        let mut cached = true;
        for file in wanted {
            let (_, was_here) = self.fetch(file, None)?;
            cached &= was_here;
        }
        Ok(folder(self.reference, self.root.join("snapshots").join(commit), cached))
    }

    /// The bundle that the cache holds of the revision, if it holds one: whole, or what is wrong with it.
    fn cached_bundle(&self) -> Result<Option<Result<Pulled, PullError>>, PullError> {
        let Some(commit) = self.cached_commit() else { return Ok(None) };
        let snapshot = self.root.join("snapshots").join(commit);
        let manifest = snapshot.join(MANIFEST_FILE);
        if !manifest.is_file() {
            return Ok(None);
        }
        let Ok(Some(entries)) = listed_files(&atomic::read(&manifest)?) else { return Ok(None) };
        for entry in &entries {
            if let Err(problem) = self.check_listed(&snapshot, entry) {
                return Ok(Some(Err(problem)));
            }
        }
        Ok(Some(Ok(self.bundle_done(snapshot, &entries, true)?)))
    }

    fn bundle_done(&self, path: PathBuf, entries: &[FileEntry], cached: bool) -> Result<Pulled, PullError> {
        let manifest = path.join(MANIFEST_FILE);
        let own = fs::metadata(&manifest).map_err(|e| AtomicError::from_io("read", &manifest, e))?.len();
        let bytes = own + entries.iter().map(|entry| entry.bytes).sum::<u64>();
        Ok(Pulled { path, reference: self.name(), sha256: None, bytes, cached })
    }

    fn wrong_file(&self, file: &str, problem: String) -> PullError {
        PullError::BundleFile { reference: self.name(), file: file.to_string(), problem }
    }

    fn check_listed(&self, snapshot: &Path, entry: &FileEntry) -> Result<(), PullError> {
        if !is_inner_path(&entry.path) {
            return Err(self.wrong_file(&entry.path, "is listed, but is no path inside it".to_string()));
        }
        let path = snapshot.join(&entry.path);
        let Ok(meta) = fs::metadata(&path) else {
            return Err(self.wrong_file(&entry.path, "is listed, but not there".to_string()));
        };
        self.check_size(entry, meta.len())?;
        self.check_sha256(entry, &self.context.places.hash_records().sha256_file(&path)?)
    }

    fn check_size(&self, entry: &FileEntry, found: u64) -> Result<(), PullError> {
        match found == entry.bytes {
            true => Ok(()),
            false => {
                let problem = format!("has {found} bytes, but `{MANIFEST_FILE}` lists {}", entry.bytes);
                Err(self.wrong_file(&entry.path, problem))
            }
        }
    }

    fn check_sha256(&self, entry: &FileEntry, found: &str) -> Result<(), PullError> {
        match found.eq_ignore_ascii_case(&entry.sha256) {
            true => Ok(()),
            false => {
                let problem = format!("has sha256 `{found}`, but `{MANIFEST_FILE}` lists `{}`", entry.sha256);
                Err(self.wrong_file(&entry.path, problem))
            }
        }
    }

    /// Every file that the bundle of this commit lists, each as it is listed; `None` if its `bundle.json` is none of ours.
    fn bundle(&self, commit: &str) -> Result<Option<Pulled>, PullError> {
        let (manifest, mut cached) = self.fetch(MANIFEST_FILE, None)?;
        let entries = listed_files(&atomic::read(&manifest)?)
            .map_err(|problem| self.wrong_file(MANIFEST_FILE, format!("cannot be read: {problem}")))?;
        let Some(entries) = entries else { return Ok(None) };
        let snapshot = self.root.join("snapshots").join(commit);
        let moved = || PullError::BadAnswer {
            reference: self.name(),
            reason: "the repository was changed while it was fetched".to_string(),
        };
        if !manifest.starts_with(&snapshot) {
            return Err(moved());
        }
        for entry in &entries {
            // What is here needs no question: its hash says that it is the one.
            if self.check_listed(&snapshot, entry).is_ok() {
                continue;
            }
            if !is_inner_path(&entry.path) {
                return Err(self.wrong_file(&entry.path, "is listed, but is no path inside it".to_string()));
            }
            let url = self.url(&entry.path);
            let remote = self.describe(&url).map_err(|error| match error {
                PullError::NotFound { .. } => {
                    self.wrong_file(&entry.path, "is listed, but the repository lacks it".to_string())
                }
                other => other,
            })?;
            if remote.commit != commit {
                return Err(moved());
            }
            // The hub says beforehand what it has: nothing wrong need be fetched to be found wrong.
            remote.size.map_or(Ok(()), |size| self.check_size(entry, size))?;
            if hash::is_sha256_hex(&remote.etag) {
                self.check_sha256(entry, &remote.etag)?;
            }
            let blob = self.root.join("blobs").join(&remote.etag);
            // A blob that is damaged on this disk is fetched anew, once.
            loop {
                let (path, was_here) = self.keep(&entry.path, &url, &remote)?;
                match self.check_listed(&snapshot, entry) {
                    Ok(()) => {
                        cached &= was_here;
                        break;
                    }
                    Err(problem) => {
                        let _ = fs::remove_file(&path);
                        let _ = fs::remove_file(&blob);
                        if !was_here {
                            return Err(problem);
                        }
                    }
                }
            }
        }
        Ok(Some(self.bundle_done(snapshot, &entries, cached)?))
    }

    fn url(&self, file: &str) -> String {
        let endpoint = &self.context.places.hf_endpoint;
        format!("{endpoint}/{}/resolve/{}/{}", self.repo, encode(self.revision, false), encode(file, true))
    }

    /// Commit and file names of the revision.
    fn list(&self) -> Result<(String, Vec<String>), PullError> {
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(serde::Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        let url = format!(
            "{}/api/models/{}/revision/{}",
            self.context.places.hf_endpoint,
            self.repo,
            encode(self.revision, false)
        );
        let mut answer = self.send(&self.get, &url, false, None)?;
        self.check_status(answer.status().as_u16())?;
        let bad = |reason: String| PullError::BadAnswer { reference: self.name(), reason };
        let text =
            answer.body_mut().with_config().limit(64 << 20).read_to_vec().map_err(|e| bad(e.to_string()))?;
        let info: Info = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(PullError::BadAnswer {
                reference: self.name(),
                reason: format!("`{}` is not a commit", info.sha),
            });
        }
        Ok((info.sha, info.siblings.into_iter().map(|s| s.rfilename).filter(|f| is_inner_path(f)).collect()))
    }

    fn send(
        &self,
        agent: &Agent,
        url: &str,
        head: bool,
        from: Option<u64>,
    ) -> Result<Response<Body>, PullError> {
        let mut request = if head { agent.head(url) } else { agent.get(url) };
        request = request.header("Accept-Encoding", "identity");
        if let Some(token) = &self.context.places.hf_token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some(from) = from {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().map_err(|e| PullError::Unreachable {
            reference: self.name(),
            host: self.context.places.hf_endpoint.clone(),
            reason: e.to_string(),
        })
    }

    fn check_status(&self, status: u16) -> Result<(), PullError> {
        match status {
            200..=399 => Ok(()),
            401 | 403 => Err(PullError::NoAccess {
                reference: self.name(),
                status,
                had_token: self.context.places.hf_token.is_some(),
            }),
            404 => Err(PullError::NotFound { reference: self.name(), status }),
            408 | 429 | 500.. => Err(PullError::Unreachable {
                reference: self.name(),
                host: self.context.places.hf_endpoint.clone(),
                reason: format!("the server answered {status}"),
            }),
            _ => Err(PullError::BadAnswer {
                reference: self.name(),
                reason: format!("the server answered {status}"),
            }),
        }
    }

    fn describe(&self, url: &str) -> Result<Remote, PullError> {
        let mut url = url.to_string();
        // A renamed repository answers with a relative redirect; an absolute one leads to the bytes.
        for _ in 0..5 {
            let answer = self.send(&self.head, &url, true, None)?;
            let status = answer.status().as_u16();
            self.check_status(status)?;
            let headers = answer.headers();
            let location = text(headers, "location");
            match location {
                Some(path) if (300..400).contains(&status) && path.starts_with('/') => {
                    url = format!("{}{path}", self.context.places.hf_endpoint);
                }
                _ => return self.remote(headers),
            }
        }
        Err(PullError::BadAnswer { reference: self.name(), reason: "too many redirects".to_string() })
    }

    fn remote(&self, headers: &HeaderMap) -> Result<Remote, PullError> {
        let bad = |reason: &str| PullError::BadAnswer { reference: self.name(), reason: reason.to_string() };
        let commit = text(headers, "x-repo-commit").ok_or_else(|| bad("no `X-Repo-Commit` header"))?;
        let etag = text(headers, "x-linked-etag")
            .or_else(|| text(headers, "etag"))
            .ok_or_else(|| bad("no `ETag` header"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        if !is_commit(&commit) || !is_inner_path(&etag) || etag.contains('/') {
            return Err(bad("`X-Repo-Commit` or `ETag` is not usable as a file name"));
        }
        let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
        Ok(Remote { commit, etag, size: size.and_then(|s| s.parse().ok()) })
    }

    /// The snapshot path of a file, and whether its bytes were here already.
    fn fetch(&self, file: &str, sha256: Option<&str>) -> Result<(PathBuf, bool), PullError> {
        let url = self.url(file);
        let remote = self.describe(&url)?;
        if let (Some(wanted), true) = (sha256, hash::is_sha256_hex(&remote.etag)) {
            // The hub already says which bytes it has: no need to fetch them to find them wrong.
            check_hash(self.reference, &remote.etag, Some(wanted))?;
        }
        self.keep(file, &url, &remote)
    }

    /// Gives a file that the hub described its place, fetching what is not here.
    fn keep(&self, file: &str, url: &str, remote: &Remote) -> Result<(PathBuf, bool), PullError> {
        let blob = self.root.join("blobs").join(&remote.etag);
        let cached = blob.is_file();
        if !cached {
            self.download(url, file, remote, &blob)?;
        }
        let snapshot = self.root.join("snapshots").join(&remote.commit).join(file);
        link(&blob, &snapshot, file)?;
        if !is_commit(self.revision) {
            let pointer = self.root.join("refs").join(self.revision);
            if let Some(parent) = pointer.parent() {
                atomic::create_dir_all(parent)?;
            }
            atomic::write(&pointer, remote.commit.as_bytes())?;
        }
        Ok((snapshot, cached))
    }

    fn download(&self, url: &str, file: &str, remote: &Remote, blob: &Path) -> Result<(), PullError> {
        let parent = self.root.join("blobs");
        atomic::create_dir_all(&parent)?;
        let partial = parent.join(format!("{}.incomplete", remote.etag));
        let disk = |e| PullError::from(AtomicError::from_io("write", &partial, e));
        // One writer: a second process waits here and then finds the blob done.
        let mut out = open_partial(&partial).map_err(disk)?;
        if blob.is_file() {
            return Ok(());
        }
        let mut have = out.seek(SeekFrom::End(0)).map_err(disk)?;
        if remote.size.is_some_and(|size| have > size) {
            have = 0;
        }
        let complete = remote.size == Some(have) && have > 0;
        if !complete {
            have = self.receive(url, file, remote, &mut out, have, &partial)?;
        }
        if let Some(want) = remote.size.filter(|want| *want != have) {
            return Err(PullError::CutShort {
                reference: self.name(),
                have,
                want,
                reason: "the connection was closed".to_string(),
            });
        }
        if hash::is_sha256_hex(&remote.etag) {
            let found = hash::sha256_file(&partial)?;
            if found != remote.etag {
                let _ = fs::remove_file(&partial);
                return Err(PullError::WrongHash {
                    reference: self.name(),
                    found,
                    wanted: remote.etag.clone(),
                });
            }
        }
        out.sync_all().map_err(disk)?;
        fs::rename(&partial, blob).map_err(|e| AtomicError::from_io("rename", &partial, e))?;
        Ok(())
    }

    /// Appends what is missing; returns the bytes on disk.
    fn receive(
        &self,
        url: &str,
        file: &str,
        remote: &Remote,
        out: &mut File,
        mut have: u64,
        partial: &Path,
    ) -> Result<u64, PullError> {
        let disk = |e| PullError::from(AtomicError::from_io("write", partial, e));
        let answer = self.send(&self.get, url, false, (have > 0).then_some(have))?;
        let status = answer.status().as_u16();
        self.check_status(status)?;
        if status != 206 {
            have = 0; // the server sends everything, whatever was asked
        } else if !range_starts_at(answer.headers(), have) {
            return Err(PullError::BadAnswer {
                reference: self.name(),
                reason: "the range in the answer is not the one that was asked for".to_string(),
            });
        }
        out.set_len(have).map_err(disk)?;
        out.seek(SeekFrom::Start(have)).map_err(disk)?;
        self.context.report.begin(&format!("pull {file}"), remote.size, Unit::Bytes);
        self.context.report.at(have);
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0u8; 1 << 18];
        loop {
            if self.context.stop.requested() {
                return Err(PullError::Interrupted { reference: self.name() });
            }
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => {
                    return Err(PullError::CutShort {
                        reference: self.name(),
                        have,
                        want: remote.size.unwrap_or(have),
                        reason: e.to_string(),
                    });
                }
            };
            have += n as u64;
            if remote.size.is_some_and(|size| have > size) {
                return Err(PullError::BadAnswer {
                    reference: self.name(),
                    reason: "more bytes came than were announced".to_string(),
                });
            }
            out.write_all(&buffer[..n]).map_err(disk)?;
            self.context.report.at(have);
        }
        self.context.report.end();
        Ok(have)
    }
}

fn range_starts_at(headers: &HeaderMap, have: u64) -> bool {
    text(headers, "content-range")
        .and_then(|r| r.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok())
        .is_some_and(|start| start == have)
}

/// A 40-digit git commit.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Puts a relative link to the blob into the snapshot (a copy where links are not to be had).
fn link(blob: &Path, snapshot: &Path, file: &str) -> Result<(), PullError> {
    if snapshot.is_file() {
        return Ok(());
    }
    let parent = snapshot.parent().expect("a snapshot path has its commit folder above it");
    atomic::create_dir_all(parent)?;
    let depth = file.split('/').count() + 1;
    let name = blob.file_name().expect("a blob path ends in its tag");
    let mut relative = PathBuf::new();
    for _ in 0..depth {
        relative.push("..");
    }
    relative.push("blobs");
    relative.push(name);
    // A link whose blob was deleted by hand stands in the way of the new one.
    if snapshot.is_symlink() {
        let _ = fs::remove_file(snapshot);
    }
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&relative, snapshot);
    #[cfg(not(unix))]
    let linked = fs::hard_link(blob, snapshot);
    match linked {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => match fs::copy(blob, snapshot) {
            Ok(_) => Ok(()),
            Err(e) => Err(AtomicError::from_io("write", snapshot, e).into()),
        },
    }
}
